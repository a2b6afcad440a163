package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// While the client's only server answers 503 without Retry-After, the pause between attempts
// doubles.
func TestPusherBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		c, hub, log := newTestClient(t, "a 1\n", func(c *ClientConfig, _ *ClientReloadConfig) { c.To = c.To[:1] })
		hub.answer = func(*http.Request) *http.Response {
			if n++; n <= 4 {
				return respond(503, nil, "busy")
			}
			return nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if err := c.ScrapeOnceAndDrain(ctx); err != nil {
			t.Fatalf("%v\n%s", err, log)
		}
		want := minBackoff
		for i := 1; i < len(hub.at); i++ {
			if gap := hub.at[i].Sub(hub.at[i-1]); gap < want/2 || gap > want {
				t.Errorf("attempt %d came %v after the previous attempt, want %v to %v", i, gap, want/2, want)
			}
			want *= 2
		}
	})
}

// The client waits at least as long as the server's Retry-After header asks for before it pushes
// again.
func TestPusherObeysRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		c, hub, _ := newTestClient(t, "a 1\n", func(c *ClientConfig, _ *ClientReloadConfig) { c.To = c.To[:1] })
		hub.answer = func(*http.Request) *http.Response {
			if n++; n == 1 {
				return respond(429, http.Header{"Retry-After": {"37"}}, "slow down")
			}
			return nil
		}
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(hub.at) != 2 || hub.at[1].Sub(hub.at[0]) < 37*time.Second {
			t.Errorf("got attempts at %v, want two at least 37 s apart", hub.at)
		}
	})
}

// If the server's Retry-After asks for a pause that ends after the deadline of the context,
// DrainSpool returns the server's error before the deadline. The scrape stays in the spool.
func TestPusherEndsBeforeDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		c, hub, _ := newTestClient(t, "a 1\n", func(c *ClientConfig, _ *ClientReloadConfig) { c.To = c.To[:1] })
		hub.answer = func(*http.Request) *http.Response {
			return respond(503, http.Header{"Retry-After": {"3600"}}, "disk full")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if err := c.ScrapeOnceAndDrain(ctx); err == nil || !strings.Contains(err.Error(), "disk full") {
			t.Errorf("got the error %v, want the server's error", err)
		}
		if took := time.Since(start); took > 2*time.Minute {
			t.Errorf("the drain took %v, want less than the deadline of 2 minutes", took)
		}
		if n := c.spool.Stats().Scrapes; n != 1 {
			t.Errorf("%d scrapes in the spool, want the undelivered one", n)
		}
	})
}

// If a server fails, the client pushes to the next server with the same upload token. The client
// logs the failover.
func TestPusherFailsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, log := newTestClient(t, "a 1\n", nil)
		hub.answer = func(r *http.Request) *http.Response {
			if r.URL.Host == "a.example" {
				return respond(502, nil, "")
			}
			return nil
		}
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(hub.hosts, []string{"a.example", "b.example"}) {
			t.Errorf("tried the servers %v, want a.example and then b.example", hub.hosts)
		}
		if len(hub.asked) != 1 {
			t.Errorf("requested %d upload tokens, want 1, because every server accepts it", len(hub.asked))
		}
		if !strings.Contains(log.String(), "trying the next") {
			t.Errorf("the failover is not logged; log:\n%s", log)
		}
	})
}

// A push that the server refuses as invalid (400) is not sent again. The client counts its samples
// as refused.
func TestPusherRefusedPush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newTestClient(t, "a 1\n", nil)
		hub.answer = func(*http.Request) *http.Response { return respond(400, nil, "line 1: no") }
		err := c.ScrapeOnceAndDrain(t.Context())
		if err == nil || !strings.Contains(err.Error(), "line 1: no") || len(hub.at) != 1 {
			t.Errorf("got the error %v after %d attempts, want the server's error after one attempt", err, len(hub.at))
		}
		if got := c.dropped.Value(DropRefused); got != 1 || c.spool.Stats().Scrapes != 0 {
			t.Errorf("%v samples counted as refused, want 1; spool: %+v, want it empty", got, c.spool.Stats())
		}
	})
}

// A scrape that is refused as invalid is set aside, and a scrape that is too large is pushed in
// pieces. All other scrapes and pieces are delivered, in a bounded number of requests.
func TestPusherRefusals(t *testing.T) {
	a, b, bad, z := "a 1\na 2\n", "b 1\nb 2\n", "bad 1\nb 3\n", "z 1\n"
	long := "l " + strings.Repeat("1", 100) + "\n"
	for _, tt := range []struct {
		name    string
		limit   int      // bytes of text above which the server answers 413
		texts   []string // texts of the scrapes in the spool
		want    string   // texts that the server must accept, concatenated
		refused float64  // samples that the client must count as refused
		aside   int      // files that the spool must set aside
		most    int      // most pushes allowed
	}{
		{"nothing refused", 1000, []string{a, b, z}, a + b + z, 0, 0, 1},
		{"one of several invalid", 1000, []string{a, b, bad, z}, a + b + z, 2, 1, 5},
		{"the only one invalid", 1000, []string{bad}, "", 2, 1, 1},
		{"the last one invalid", 1000, []string{a, bad}, a, 2, 1, 3},
		{"several too large", 16, []string{a, b, a, b, a}, a + b + a + b + a, 0, 0, 6},
		{"one too large", 8, []string{a + b}, a + b, 0, 0, 3},
		{"too large down to single lines", 4, []string{a + b + a}, a + b + a, 0, 0, 11},
		{"one line too large", 10, []string{a + long + b, z}, a + b + z, 1, 1, 10},
		// The server also refuses the sample "a 2", because that sample is in the same piece as the
		// bad line.
		{"too large and invalid", 10, []string{a + bad + b, z}, "a 1\nb 3\n" + b + z, 2, 1, 12},
	} {
		synctest.Test(t, func(t *testing.T) {
			spool := diskSpool()
			c, hub, log := newSpoolClient(t, "", spool, nil)
			sizedHub(hub, tt.limit)
			spoolAll(t, c, tt.texts...)
			err := c.pusher.DrainSpool(t.Context())
			if (err != nil) != (tt.refused > 0) || c.dropped.Value(DropRefused) != tt.refused {
				t.Errorf("%s: got the error %v and %v samples counted as refused", tt.name, err, c.dropped.Value(DropRefused))
			}
			if got := strings.Join(hub.bodies, ""); got != tt.want {
				t.Errorf("%s: delivered %q, want %q", tt.name, got, tt.want)
			}
			names := spoolFiles(spool.FS.(*crashFS))
			if len(names) != tt.aside || tt.aside > 0 && !strings.HasSuffix(names[0], ".log.refused") || c.spool.Stats().Scrapes != 0 {
				t.Errorf("%s: the files are %v, want %d set aside and an empty spool", tt.name, names, tt.aside)
			}
			if len(hub.at) > tt.most {
				t.Errorf("%s: got %d requests, want at most %d", tt.name, len(hub.at), tt.most)
			}
			if got := strings.Contains(log.String(), "refused a scrape"); got != (tt.refused > 0) {
				t.Errorf("%s: logged that a scrape was refused: %v; log:\n%s", tt.name, got, log)
			}
		})
	}
}

// While the client delivers a backlog, it waits for the timeout of a hanging server only now and
// then, not at each push. When that server answers again, the client returns to it.
func TestPusherFailsOverInBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hanging atomic.Bool
		hanging.Store(true)
		var hub *fakeHub
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.To = []string{"https://a.example", "https://b.example", "https://c.example"}
			cfg.ToClient = &http.Client{Timeout: 40 * time.Second, Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
				if hanging.Load() && r.URL.Host == "a.example" {
					<-r.Context().Done()
					return nil, r.Context().Err()
				}
				time.Sleep(3 * time.Second)
				return hub.RoundTrip(r)
			})}
		})
		sizedHub(hub, 6)
		const n = 100
		for i := range n {
			spoolAll(t, c, fmt.Sprintf("n %03d\n", i))
		}
		begin := time.Now()
		if err := c.pusher.DrainSpool(t.Context()); err != nil || hub.pushes() != n {
			t.Errorf("got the error %v and %d pushes, want %d", err, hub.pushes(), n)
		}
		if took := time.Since(begin); took > 15*time.Minute {
			t.Errorf("%d pushes of 3 s each took %v, want at most 15 minutes", n, took)
		}
		if slices.Contains(hub.hosts, "c.example") {
			t.Error("the client tried c.example although b.example answered")
		}
		// The client also returns to the first server if that server answers again during a drain.
		for i := range n {
			spoolAll(t, c, fmt.Sprintf("n %03d\n", i))
		}
		time.AfterFunc(time.Minute, func() { hanging.Store(false) })
		hub.hosts = nil
		if err := c.pusher.DrainSpool(t.Context()); err != nil {
			t.Error(err)
		}
		back := slices.Index(hub.hosts, "a.example")
		if back < 0 || back > n/2+20 || slices.Contains(hub.hosts[back:], "b.example") {
			t.Errorf("the client returned to a.example after %d of %d pushes, want soon and for good", back, len(hub.hosts))
		}
	})
}

// The client logs and counts the samples that a server dropped. The log line includes the hint in
// the server's answer, if there is one.
func TestPusherLogsHint(t *testing.T) {
	for _, tt := range []struct{ answer, want string }{
		{`{"accepted":0,"dropped":{"too_old":1},"hint":"the times are wrong"}`, `"the server dropped samples" reason=too_old samples=1 hint="the times are wrong"` + "\n"},
		{`{"accepted":0,"dropped":{"too_old":1}}`, `"the server dropped samples" reason=too_old samples=1` + "\n"},
	} {
		c, hub, log := newTestClient(t, "a 1\n", nil)
		hub.answer = func(*http.Request) *http.Response { return respond(200, nil, tt.answer) }
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil || !strings.Contains(log.String(), tt.want) {
			t.Errorf("got the error %v and the log:\n%s\nwant %s", err, log, tt.want)
		}
		if text := metricsText(t, c.cfg.Metrics); !strings.Contains(text, `telemeter_samples_dropped_total{reason="by_server"} 1`) {
			t.Errorf("the dropped sample is not counted; metrics:\n%s", text)
		}
	}
}

// If the connection is too slow for a large push within the timeout, the client sends smaller
// pushes.
func TestPusherSlowConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.To = cfg.To[:1] })
		one := len(Gzip([]byte("n 10\n")))
		c.pusher.cfg.ToClient = &http.Client{Timeout: 40 * time.Second, Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			select { // sending a push takes ten seconds for each of its scrapes
			case <-r.Context().Done():
				return nil, r.Context().Err()
			case <-time.After(time.Duration(r.ContentLength) * 10 * time.Second / time.Duration(one)):
			}
			return hub.RoundTrip(r)
		})}
		for n := range 60 {
			spoolAll(t, c, fmt.Sprintf("n %d\n", n+1))
		}
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := c.pusher.DrainSpool(ctx); err != nil || !slices.Equal(hub.received(), upTo(60)) {
			t.Errorf("got the error %v after %v, and the hub has the scrapes %v, want 1 to 60", err, time.Since(start), hub.received())
		}
	})
}

// While no scrape file of the spool can be read, the pusher waits. It delivers the scrapes when
// their files can be read again. A single file that cannot be read does not hold up the other
// scrapes.
func TestPusherWaitsForSpool(t *testing.T) {
	for _, tt := range []struct {
		name, unread string // unread: the end of the names of the files that cannot be read
		meanwhile    []int  // values of the scrapes that are delivered while reads fail
	}{
		// The number of the first scrape is the wall clock in ms, and the clock of synctest starts
		// at 946684800000 ms (the year 2000).
		{"all files", ".log", nil}, {"one file", scrapeFileName(946684800_000), []int{2, 3}},
	} {
		synctest.Test(t, func(t *testing.T) {
			spool := diskSpool()
			disk := spool.FS.(*crashFS)
			c, hub, log := newSpoolClient(t, "", spool, nil)
			spoolAll(t, c, "n 1\n", "n 2\n", "n 3\n")
			disk.hook = failOn("read", tt.unread, 0, errDisk)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
			defer cancel()
			if err := c.pusher.DrainSpool(ctx); !errors.Is(err, errDisk) {
				t.Errorf("%s: the drain ended with the error %v, want %v", tt.name, err, errDisk)
			}
			if got := hub.received(); !slices.Equal(got, tt.meanwhile) || c.pusher.IsHealthy() {
				t.Errorf("%s: while reads fail the hub has the scrapes %v, want %v, and the pusher must not be healthy", tt.name, got, tt.meanwhile)
			}
			if n := c.spoolErrors.Value(); n < 15 || n > 50 || strings.Count(log.String(), "\n") > 50 || !strings.Contains(log.String(), "spool failed; scrapes are kept") {
				t.Errorf("%s: %v spool errors counted, want 15 to 50 and at most 50 log lines; log:\n%s", tt.name, n, log)
			}
			disk.hook = readFault{2, errDisk}.hook("read", tt.unread)
			if err := c.pusher.DrainSpool(t.Context()); err != nil {
				t.Errorf("%s: then the drain failed: %v", tt.name, err)
			}
			got := hub.received()
			slices.Sort(got)
			if !slices.Equal(got, upTo(3)) || !c.pusher.IsHealthy() || c.dropped.Value(DropSpoolDamaged) > 0 || len(spoolFiles(disk)) > 0 {
				t.Errorf("%s: finally the hub has the scrapes %v, want 1 to 3; %v samples dropped as damaged and files %q, want none", tt.name, got, c.dropped.Value(DropSpoolDamaged), spoolFiles(disk))
			}
		})
	}
}
