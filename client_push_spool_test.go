package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A delivered scrape stays in the spool until every consumer has read it.
func TestPusherKeepsUntilRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		c, log := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2)
		mustDrain(t, c)
		a.expect("the first push", "1 2")
		expectSpool(t, "the first push", c, 0, 2, 0)
		if !strings.Contains(log.String(), "undelivered=0 unread=2") {
			t.Errorf("the log lacks the undelivered and unread scrapes:\n%s", log)
		}
		a.consume()
		spoolOnes(t, c, 3)
		mustDrain(t, c)
		a.expect("all scrapes but the newest are read", "3")
		expectSpool(t, "all scrapes but the newest are read", c, 0, 1, 0)
	})
}

// If the answer to a push is lost, the client first asks the server which scrapes the server holds.
// It does not push scrapes again that the server has stored.
func TestPusherAsksAfterLostAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{lostAnswers: 1}
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolOnes(t, c, 1)
		mustDrain(t, c)
		a.expect("a lost answer", "1", "ask")
		expectSpool(t, "a lost answer", c, 0, 1, 0)
		if !c.pusher.IsHealthy() {
			t.Error("the pusher is not healthy after the server listed the scrape as held")
		}
	})
}

// While the client has nothing to push, it asks the server once in askInterval whether consumers
// have read the held scrapes. The spool deletes the files of read scrapes. For an empty spool, the
// metrics of the number, the bytes and the age of its scrapes are 0.
func TestPusherAsksWithNothingToPush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolOnes(t, c, 1)
		mustDrain(t, c)
		a.consume()
		mustDrain(t, c)
		a.expect("right after the push", "1")
		time.Sleep(askInterval)
		mustDrain(t, c)
		a.expect("askInterval after the push", "ask")
		expectSpool(t, "askInterval after the push", c, 0, 0, 0)
		mustDrain(t, c)
		a.expect("an empty spool")
		if n := len(spoolFiles(c.spool.cfg.FS.(*crashFS))); n > 0 {
			t.Errorf("%d scrape files are left, want 0", n)
		}
		text := metricsText(t, c.cfg.Metrics)
		for _, state := range []string{"undelivered", "held", "elsewhere"} {
			for _, want := range []string{"scrapes", "bytes", "oldest_age_seconds"} {
				if want = fmt.Sprintf("telemeter_spool_%s{state=%q} 0\n", want, state); !strings.Contains(text, want) {
					t.Errorf("the metrics lack %s", want)
				}
			}
		}
	})
}

// After an outage in which a push may have arrived, the client asks the server which scrapes the
// server holds before it repeats the push. The client does not ask if it sent no push during the
// outage.
func TestPusherAsksAfterOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		a.down.Store(true)
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolOnes(t, c, 1)
		time.AfterFunc(10*time.Minute, func() { a.down.Store(false) })
		mustDrain(t, c)
		// The client had no upload token during the first outage, so it sent no push. It therefore
		// need not ask which scrapes the server holds.
		a.expect("after the first outage", "1")
		a.down.Store(true)
		spoolOnes(t, c, 2)
		time.AfterFunc(10*time.Minute, func() { a.down.Store(false) })
		mustDrain(t, c)
		a.expect("after the second outage", "ask", "2")
	})
}

// After a 503 the client sends the push again. It does not first ask the server which scrapes the
// server holds, because that would be one more request for an overloaded server.
func TestPusherDoesNotAskAfter503(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &queueServer{}, &queueServer{}
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a, b}, nil)
		spoolOnes(t, c, 1)
		a.unavailable, b.unavailable = 2, 1
		mustDrain(t, c)
		a.expect("server a busy, then free", "1", "1")
		b.expect("server b busy, then free", "1", "1")
	})
}

// A server that lost its disk gets all unread scrapes again. The client sends new scrapes first,
// and repeated scrapes in at most one push a second.
func TestPusherFillsEmptyServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2, 3, 4, 5)
		mustDrain(t, c)
		a.held = nil
		a.expect("before the disk is lost", "1 2 3 4 5")
		c.pusher.size = pushScrapeLimit{max: 2, careful: 1 << 20} // a push has at most two scrapes
		spoolOnes(t, c, 6)
		time.AfterFunc(1500*time.Millisecond, func() {
			at := c.moment()
			c.spool.Add(Scrape{At: at, SourceTime: at.Wall, Samples: 1, Size: 4, Gzip: Gzip([]byte("n 7\n"))})
		})
		mustDrain(t, c)
		for i := 2; i < len(a.at); i++ {
			if gap := a.at[i].Sub(a.at[i-1]); gap > time.Second {
				t.Errorf("request %d came %v after the previous request, want at most 1 s", i, gap)
			}
		}
		if gap := a.at[5-1].Sub(a.at[2]); gap < time.Second {
			t.Errorf("two pushes of repeated scrapes came within %v, want at least 1 s", gap)
		}
		a.expect("the disk is lost", "6", "1 2", "3 4", "7", "5")
		expectSpool(t, "the disk is lost", c, 0, 7, 0)
		// The server loses its disk again. This time the client has no new scrape to push.
		a.held = nil
		time.Sleep(askInterval)
		mustDrain(t, c)
		a.expect("the disk is lost again", "ask", "1 2", "3 4", "5 6", "7")
		expectSpool(t, "the disk is lost again", c, 0, 7, 0)
	})
}

// A 200 removes the scrapes of the push from the spool if no consumer is known, or if the server
// does not support spools (its answers do not list the scrapes that it holds).
func TestPusherRemovesAfter200(t *testing.T) {
	for name, a := range map[string]*queueServer{"no consumer": {noConsumers: true}, "a server without spools": {noSpools: true}} {
		synctest.Test(t, func(t *testing.T) {
			spool := diskSpool()
			c, _ := newQueueClient(t, spool, []*queueServer{a}, nil)
			spoolOnes(t, c, 1, 2)
			mustDrain(t, c)
			a.expect(name, "1 2")
			expectSpool(t, name, c, 0, 0, 0)
			spoolOnes(t, c, 3)
			c, _ = newQueueClient(t, spool, []*queueServer{a}, nil)
			mustDrain(t, c)
			a.expect(name+", after a restart", "ask", "3")
			expectSpool(t, name+", after a restart", c, 0, 0, 0)
		})
	}
}

// A declined scrape is a scrape whose samples the server dropped although it answered 200. The
// client keeps a declined scrape in the spool, pushes it again after a minute and logs it once. The
// declined scrape does not hold up the other scrapes.
func TestPusherDeclined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{declines: func(line string) bool { return line == "n 2\n" }}
		c, log := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2, 3)
		if err := c.pusher.DrainSpool(t.Context()); !errors.Is(err, errDeclined) || c.pusher.IsHealthy() {
			t.Errorf("got the error %v, want errDeclined and an unhealthy pusher", err)
		}
		a.expect("one scrape declined", "1 2 3", "2")
		expectSpool(t, "one scrape declined", c, 1, 2, 0)
		// The client does not push the declined scrape 2 again before declinedPause has passed.
		c.pusher.DrainSpool(t.Context())
		time.Sleep(time.Minute)
		c.pusher.DrainSpool(t.Context())
		spoolOnes(t, c, 4)
		a.declines = nil
		mustDrain(t, c)
		if !c.pusher.IsHealthy() {
			t.Error("the pusher is not healthy after all scrapes were delivered")
		}
		if n := strings.Count(log.String(), "the server dropped all samples of a scrape"); n != 1 || c.dropped.Value(DropByServer) > 0 {
			t.Errorf("logged the declined scrape %d times, want once and no dropped sample counted; log:\n%s", n, log)
		}
		// Scrape 2 is declined again. Then the new scrape 4 is pushed before scrape 2, each in a
		// push of its own.
		a.expect("declined again, then accepted", "2", "4", "2")
		expectSpool(t, "declined again, then accepted", c, 0, 4, 0)
	})
}

// If a server does not answer a push, the client turns to the next server. It asks the next server
// which scrapes that server holds before it pushes the same scrapes to it.
func TestPusherAsksNextServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &queueServer{}, &queueServer{}
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a, b}, nil)
		spoolOnes(t, c, 1)
		mustDrain(t, c)
		spoolOnes(t, c, 2)
		a.lostAnswers = 1
		b.held = a.names.Add(a.names[0].From+60, a.names[0].From+60) // server b holds scrape 1 and a number that is not in the spool
		mustDrain(t, c)
		a.expect("server a", "1", "2")
		b.expect("server b", "ask", "2")
		expectSpool(t, "at the end", c, 0, 2, 0)
	})
}

// If no consumer reads from a server for half an hour, the client pushes to the next server for
// half an hour, and then to the first again.
func TestPusherLeavesUnreadServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &queueServer{}, &queueServer{}
		c, log := newQueueClient(t, diskSpool(), []*queueServer{a, b}, nil)
		var where []string
		for n := range 80 {
			spoolOnes(t, c, n) // takes a minute of virtual time
			before := len(a.events)
			mustDrain(t, c)
			if len(a.events) > before {
				where = append(where, "a")
			} else {
				where = append(where, "b")
				b.consume()
			}
		}
		where = slices.Compact(where)
		if want := []string{"a", "b", "a"}; !slices.Equal(where, want) {
			t.Errorf("the pushes went to the servers %v, want %v", where, want)
		}
		if n := strings.Count(log.String(), "no consumer reads scrapes on a server"); n != 1 {
			t.Errorf("logged the change of the server %d times, want once", n)
		}
		if len(b.read) == 0 || b.read[0].From != a.names[0].From {
			t.Errorf("server b has read the scrapes %v, want all of %v, which server a held", b.read, a.names)
		}
		// If the next server does not answer, the client returns to the first server at once. It
		// does not try the next server again for half an hour.
		b.down.Store(true)
		for n := range 75 {
			spoolOnes(t, c, n)
			mustDrain(t, c)
		}
		if n := strings.Count(log.String(), "trying the next server\" to=https://b"); n > 3 {
			t.Errorf("server b was tried %d times while down, want at most 3", n)
		}
		expectSpool(t, "at the end", c, 0, c.spool.Stats().Scrapes, 0)
	})
}

// After a restart the client asks the server which scrapes of the client's spool the server holds.
// The client then pushes only the other scrapes.
func TestPusherRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		spool := diskSpool()
		c, _ := newQueueClient(t, spool, []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2)
		mustDrain(t, c)
		spoolOnes(t, c, 3)
		a.expect("before the restart", "1 2")
		spool.FS.(*crashFS).crash()
		c, _ = newQueueClient(t, spool, []*queueServer{a}, nil)
		expectSpool(t, "before the first answer", c, 3, 0, 0)
		mustDrain(t, c)
		a.expect("after the restart", "ask", "3")
		expectSpool(t, "after the restart", c, 0, 3, 0)
	})
}

// If the client's spool directory was restored from an old copy, the client does not give a used
// number to a new scrape. It pushes the scrapes that the server lists neither as held nor as read.
func TestPusherRestoredSpool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		spool := diskSpool()
		disk := spool.FS.(*crashFS)
		c, _ := newQueueClient(t, spool, []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2)
		old := disk.contents()
		spoolOnes(t, c, 3, 4)
		mustDrain(t, c)
		a.consume()
		used := slices.Clone(a.names)
		for name := range disk.contents() {
			disk.Remove(name)
		}
		for name, data := range old {
			disk.put(name, []byte(data))
		}
		id := c.spool.ID()
		c, _ = newQueueClient(t, spool, []*queueServer{a}, nil)
		if c.spool.ID() != id {
			t.Error("the restored spool has a new ID, want the same")
		}
		a.expect("before the restore", "1 2 3 4")
		a.names = nil
		spoolOnes(t, c, 5)
		mustDrain(t, c)
		a.expect("after the restore", "ask", "5")
		if used.Has(a.names[0].From) || len(a.names) != 1 || a.names[0].From != a.names[0].To {
			t.Errorf("after the restore the pushes name %v, want one number that is not in %v", a.names, used)
		}
		expectSpool(t, "after the restore", c, 0, 1, 0)
	})
}

// Without a spool directory, scrapes that a server holds do not count as lost when the client ends.
func TestPusherMemoryOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{}
		c, log := newQueueClient(t, SpoolConfig{}, []*queueServer{a}, nil)
		spoolOnes(t, c, 1, 2)
		mustDrain(t, c)
		spoolOnes(t, c, 3)
		if n := c.spool.Stats().InMemory; n != 1 {
			t.Errorf("%d scrapes are in memory only and undelivered, want 1", n)
		}
		if err := c.Close(); err != nil || c.dropped.Value(DropSpoolHeld) != 2 || c.dropped.Value(DropSpoolClosed) != 1 {
			t.Errorf("got the error %v; dropped %v samples as held and %v as lost, want 2 and 1", err, c.dropped.Value(DropSpoolHeld), c.dropped.Value(DropSpoolClosed))
		}
		if strings.Count(log.String(), "level=ERROR") != 1 || strings.Count(log.String(), "level=INFO msg=\"scrapes dropped from the spool before every consumer read them") != 1 {
			t.Errorf("want one line at level ERROR about the lost scrape and one at level INFO about the held ones; log:\n%s", log)
		}
	})
}

// shiftRig is a client whose source has a wrong clock. The spool is kept when the client starts
// again. The client scrapes once a minute.
type shiftRig struct {
	t      *testing.T
	source *counting
	spool  SpoolConfig
	bootID string
	boot   func() (int64, string)
	client *Client
}

func newShiftRig(t *testing.T) *shiftRig {
	return &shiftRig{t: t, source: &counting{date: true}, spool: diskSpool(), bootID: "boot-1", boot: testBoot()}
}

// start starts a client whose only server is to. The client has the spool of the previous client,
// as after a restart.
func (r *shiftRig) start(to *queueServer) {
	r.client, _ = newQueueClient(r.t, r.spool, []*queueServer{to}, func(cfg *ClientConfig) {
		cfg.FromClient.Transport = r.source
		cfg.Boot = func() (int64, string) { ms, _ := r.boot(); return ms, r.bootID }
	})
}

// scrape makes one scrape with the source's clock ahead by sourceAhead, and waits a minute.
func (r *shiftRig) scrape(sourceAhead time.Duration) {
	r.t.Helper()
	r.source.extra = sourceAhead
	if err := r.client.scrapeAndSpool(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	time.Sleep(time.Minute)
}

// scrapeFour makes and pushes four scrapes. Before the first scrape the client knows no server's
// time. The source's clock is 10 minutes behind at scrapes 1 and 2, is set back to 40 minutes
// behind before scrape 3, and loses another 20 s before scrape 4.
func (r *shiftRig) scrapeFour() {
	r.t.Helper()
	r.scrape(-10 * time.Minute)
	mustDrain(r.t, r.client)
	r.scrape(-10 * time.Minute)
	r.scrape(-40 * time.Minute)
	mustDrain(r.t, r.client)
	r.scrape(-40*time.Minute - 20*time.Second)
	mustDrain(r.t, r.client)
}

// The client corrects the times of scrapes if the error of the source's clock is at least MinClockShift.
// It keeps a shift while the error differs from it by at most shiftTolerance, and follows a larger
// step. A header
// of the last push and a metric of the client state the error.
func TestPusherCorrectsTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, a := newShiftRig(t), &queueServer{}
		begin := time.Now()
		r.start(a)
		r.scrapeFour()
		lines := slices.Collect(strings.Lines(strings.Join(a.texts, "")))
		if len(lines) != 4 {
			t.Fatalf("the server has %d samples, want 4", len(lines))
		}
		for i, line := range lines {
			var n, ms int64
			fmt.Sscanf(line, "n %d %d", &n, &ms)
			want := begin.Add(time.Duration(i) * time.Minute).UnixMilli()
			if i == 3 { // the source's clock drifted by 20 s, which does not change the shift
				want -= 20_000
			}
			// The source's Date header has whole seconds, so a corrected time may be off by up to 2
			// s.
			if n != int64(i+1) || ms < want-2000 || ms > want+2000 {
				t.Errorf("sample %d: %q is %d ms off", i+1, line, ms-want)
			}
		}
		if got := a.headers[len(a.headers)-1].Get(ClockOffsetHeader); got < "2419000" || got > "2421000" || len(got) != 7 {
			t.Errorf("the last push states a clock offset of %q ms, want about 2420000", got)
		}
		if text := metricsText(t, r.client.cfg.Metrics); !strings.Contains(text, "telemeter_source_clock_offset_seconds 24") {
			t.Errorf("the metrics do not have the clock offset:\n%s", text)
		}
	})
}

// A scrape has the same times whenever it is sent again: to the same server after a restart, to
// another server whose clock is wrong, and after a reboot.
func TestPusherCorrectsTimesOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, a, b := newShiftRig(t), &queueServer{}, &queueServer{ahead: 20 * time.Minute}
		r.start(a)
		r.scrapeFour()
		first := strings.Join(a.texts, "")
		for _, tt := range []struct {
			name, bootID string
			to           *queueServer
		}{
			{"the same server, after a restart", "boot-1", a},
			{"another server, after a reboot", "boot-2", b},
			{"another server, after a second reboot", "boot-3", b},
		} {
			a.held, b.held, a.texts, b.texts = nil, nil, nil, nil
			r.bootID = tt.bootID
			r.start(tt.to)
			mustDrain(t, r.client)
			if got := strings.Join(tt.to.texts, ""); got != first {
				t.Errorf("%s: the client sent:\n%swant:\n%s", tt.name, got, first)
			}
		}
	})
}
