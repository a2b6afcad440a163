package main

// The end of a server: how long it goes on serving, in virtual time, what it logs of unread
// samples, and what signals do to a real process.

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// newLeaveRig returns a server in virtual time, without listeners.
func newLeaveRig(t *testing.T) *srvRig {
	r := &srvRig{t: t, log: &logBuffer{}}
	store, err := OpenStore(StoreConfig{Retention: 2 * time.Hour, MaxSampleAge: time.Hour, Now: time.Now, OnError: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	r.store = store
	r.server = NewServer(ServerConfig{
		Name: "s1", Store: store, Metrics: NewMetrics(), Log: slog.New(slog.NewTextHandler(r.log, nil)), Now: time.Now,
		MaxSampleAge: time.Hour, LimitBytes: 1 << 20, LimitScrape: 1000,
	})
	r.server.SetReady(true)
	return r
}

// hold has the server hold a push.
func (r *srvRig) hold(id, text string) {
	r.t.Helper()
	push := &pushRequest{ClusterID: id, Arrival: time.Now().UnixMilli()}
	if a, err := r.server.storeForwarded(r.t.Context(), push, []byte(text)); err != nil || a.Status != 200 {
		r.t.Fatal(a, err)
	}
}

// Drain ends when all is read that somebody waits for, when no push is handled any more,
// after 75 seconds, or when it is told to.
func TestDrain(t *testing.T) {
	const within = drainPoll
	for _, c := range []struct {
		name   string
		before func(r *srvRig, x *AnswerReadTracker)
		during func(r *srvRig, x *AnswerReadTracker) // beside Drain
		cancel time.Duration                         // after which it is told to end; 0: never
		want   time.Duration
	}{
		{name: "nothing held"},
		{name: "no consumer", before: func(r *srvRig, _ *AnswerReadTracker) { r.hold("a", "up 1\n") }},
		{name: "all is read", before: func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.scrapeOn(x, "consumer=x")
			r.scrapeOn(x, "consumer=x")
		}},
		{name: "nobody reads", before: func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.scrapeOn(x, "consumer=x")
		}, want: drainTimeout},
		{name: "told to end", before: func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.scrapeOn(x, "consumer=x")
		}, cancel: 3 * time.Second, want: 3 * time.Second},
		{name: "the consumer is away", before: func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.scrapeOn(x, "consumer=x")
			time.Sleep(drainConsumerIdle + time.Second)
		}},
		{name: "the consumer may be about to come", before: func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.scrapeOn(x, "consumer=x")
			time.Sleep(drainConsumerIdle)
		}, want: drainTimeout},
		{name: "confirmed by the next scrape", before: func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.scrapeOn(x, "consumer=x")
		}, during: func(r *srvRig, x *AnswerReadTracker) {
			time.Sleep(10*time.Second - time.Millisecond)
			r.scrapeOn(x, "consumer=x")
		}, want: 10 * time.Second},
		{name: "served, not confirmed", before: func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.scrapeOn(x, "consumer=x")
		}, during: func(r *srvRig, _ *AnswerReadTracker) {
			time.Sleep(10 * time.Second)
			r.scrapeOn(&AnswerReadTracker{}, "consumer=x")
		}, want: drainTimeout},
		{name: "one of two has read", before: func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.hold("b", "up 1\n")
			r.scrapeOn(x, "consumer=x")
			r.scrapeOn(x, "consumer=x")
			r.scrapeOn(x, "consumer=y")
		}, during: func(r *srvRig, x *AnswerReadTracker) {
			time.Sleep(20*time.Second - time.Millisecond)
			r.scrapeOn(x, "consumer=y")
		}, want: 20 * time.Second},
		{name: "a push is being handled", before: func(r *srvRig, _ *AnswerReadTracker) { r.server.uploads.TryAcquire() }, during: func(r *srvRig, _ *AnswerReadTracker) {
			time.Sleep(5*time.Second - time.Millisecond)
			r.server.uploads.Release()
		}, want: 5 * time.Second},
		{name: "a push comes to its end, and is read", before: func(r *srvRig, x *AnswerReadTracker) {
			r.scrapeOn(x, "consumer=x")
			r.server.uploads.TryAcquire()
		}, during: func(r *srvRig, x *AnswerReadTracker) {
			time.Sleep(5*time.Second - time.Millisecond)
			r.hold("a", "up 1\n")
			r.server.uploads.Release()
			time.Sleep(5 * time.Second)
			r.scrapeOn(x, "consumer=x")
			time.Sleep(5 * time.Second)
			r.scrapeOn(x, "consumer=x")
		}, want: 15 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, x := newLeaveRig(t), &AnswerReadTracker{}
				if c.before != nil {
					c.before(r, x)
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if c.cancel > 0 {
					time.AfterFunc(c.cancel, cancel)
				}
				if c.during != nil {
					go c.during(r, x)
				}
				begin := time.Now()
				r.server.WaitUntilRead(ctx)
				if took := time.Since(begin); took < c.want || took > c.want+within {
					t.Errorf("it took %v, want %v", took, c.want)
				}
				cancel()
			})
		})
	}
}

// LogUnreadSamples says what is unread and for whom, or that nothing is.
func TestLogUnread(t *testing.T) {
	const waits = `msg="samples are unread; they are lost, but for those of clients with a spool, because there is no storage directory" `
	for _, c := range []struct {
		name string
		do   func(r *srvRig, x *AnswerReadTracker)
		want []string
	}{
		{"nothing held", func(*srvRig, *AnswerReadTracker) {}, []string{`msg="nothing unread"`}},
		{"nobody is known", func(r *srvRig, _ *AnswerReadTracker) { r.hold("a", "up 1\nn 1\n") }, []string{`msg="no consumer is known, so that nothing is read" samples=2`}},
		{"all read", func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\n")
			r.scrapeOn(x, "consumer=x")
			r.scrapeOn(x, "consumer=x")
		}, []string{`msg="nothing unread"`}},
		{"unread", func(r *srvRig, x *AnswerReadTracker) {
			r.hold("a", "up 1\nn 1\n")
			r.scrapeOn(x, "consumer=y")
			r.scrapeOn(x, "consumer=x")
			r.scrapeOn(x, "consumer=x")
			r.hold("b", "up 1\n")
			time.Sleep(drainConsumerIdle + time.Second) // it says so of those that are not waited for too
		}, []string{waits + "consumer=x address=192.0.2.1 samples=1 sites=1", waits + "consumer=y address=192.0.2.1 samples=3 sites=2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newLeaveRig(t)
				c.do(r, &AnswerReadTracker{})
				before := r.log.String()
				r.server.LogUnreadSamples()
				log := strings.TrimPrefix(r.log.String(), before)
				for _, want := range c.want {
					if !strings.Contains(log, want) {
						t.Errorf("it does not log %s:\n%s", want, log)
					}
				}
				if n := strings.Count(log, "\n"); n != len(c.want) {
					t.Errorf("%d lines:\n%s", n, log)
				}
			})
		})
	}
}

// still reports whether a process runs.
func (p *process) still() bool {
	p.t.Helper()
	return p.cmd.Process.Signal(syscall.Signal(0)) == nil
}

// ended waits until a process has ended by itself, and returns the exit status.
func (p *process) ended() int {
	p.t.Helper()
	return p.end(syscall.Signal(0))
}

// TestServerLeaves: at SIGTERM a process takes no pushes any more, and serves its consumers
// until they have read all.
func TestServerLeaves(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "site-7", "--ttl", "1h")
	const draining = "serving consumers what they have not read, before the end"
	const unread = `samples are unread; they are served when this server starts again" consumer=central address=127.0.0.1 samples=1 sites=1`
	for _, c := range []struct {
		name    string
		consume int // scrapes before the signal
		signals []syscall.Signal
		reads   bool // there is one more scrape then
		want    string
	}{
		{"no consumer", 0, []syscall.Signal{syscall.SIGTERM}, false, `msg="no consumer is known, so that nothing is read" samples=1`},
		{"all read", 2, []syscall.Signal{syscall.SIGTERM}, false, `msg="nothing unread"`},
		{"reads then", 1, []syscall.Signal{syscall.SIGTERM}, true, `msg="nothing unread"`},
		{"SIGTERM twice", 1, []syscall.Signal{syscall.SIGTERM, syscall.SIGTERM}, false, unread},
		{"SIGTERM, SIGINT", 1, []syscall.Signal{syscall.SIGTERM, syscall.SIGINT}, false, unread},
		{"SIGINT", 1, []syscall.Signal{syscall.SIGINT}, false, unread},
	} {
		t.Run(c.name, func(t *testing.T) {
			storage := strings.ReplaceAll(c.name, " ", "-")
			m := startMember(t, dir, "a", "--storage-dir", storage)
			agree(t, 1, m)
			if code := m.push(token, "up 1\n"); code != http.StatusOK {
				t.Fatalf("a push: %d", code)
			}
			http.DefaultClient.CloseIdleConnections() // the next push needs the listener
			scraper := scraperOf(t)
			scrape := func() string {
				t.Helper()
				resp, err := scraper.Get(m.internal + "/federate?consumer=central")
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				b, err := io.ReadAll(resp.Body)
				if err != nil || resp.StatusCode != http.StatusOK {
					t.Fatalf("%s %v", resp.Status, err)
				}
				return upsOf(string(b))
			}
			for range c.consume {
				if got := scrape(); got != "1 " {
					t.Errorf("before the end: %q", got)
				}
			}
			m.cmd.Process.Signal(c.signals[0])
			if c.reads || len(c.signals) > 1 {
				m.await(draining)
				eventually(t, "no push is taken", func() bool {
					req, err := http.NewRequest("POST", m.external+"/upload", strings.NewReader("up 2\n"))
					if err != nil {
						t.Fatal(err)
					}
					req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(token))
					resp, err := http.DefaultClient.Do(req)
					if err != nil {
						return true
					}
					resp.Body.Close()
					return resp.StatusCode == http.StatusServiceUnavailable
				})
				if sd := get(t, m.internal+"/sd"); !strings.Contains(sd, "127.0.0.1:") {
					t.Errorf("/sd says %s", sd)
				}
				if !m.still() {
					t.Fatal("it ended before all was read")
				}
			}
			if c.reads {
				scrape()
			}
			if len(c.signals) > 1 {
				m.cmd.Process.Signal(c.signals[1])
			}
			if code := m.ended(); code != exitOK {
				t.Errorf("exit %d", code)
			}
			log := m.text()
			if !strings.Contains(log, c.want) || strings.Contains(log, "nothing unread") != strings.Contains(c.want, "nothing unread") {
				t.Errorf("it does not say %s", c.want)
			}
			if c.want == unread { // and so it is
				again := startMember(t, dir, "a", "--storage-dir", storage)
				if got := upsOf(get(t, again.internal+"/federate?consumer=central")); got != "1 " {
					t.Errorf("after a restart: %q", got)
				}
				again.end(syscall.SIGINT)
			}
		})
	}
}

// A member that leaves stays in /sd of all and off the ring until its consumer has read what
// it holds; the others take its sites at once.
func TestMemberLeaves(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	a := startMember(t, dir, "a")
	b := startMember(t, dir, "b", "--join", a.ringAddr)
	agree(t, 2, a, b)
	token := ""
	for i := 0; ; i++ { // of a site that b owns
		id := fmt.Sprint("site", i)
		token = mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", id)
		if code := b.push(token, "m 1\n"); code != http.StatusOK {
			t.Fatalf("a push: %d", code)
		}
		if _, owner := shows(t, id, a, b); owner == b {
			break
		}
	}
	scraper := scraperOf(t)
	scrape := func() {
		t.Helper()
		resp, err := scraper.Get(b.internal + "/federate?consumer=central")
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	scrape()
	b.cmd.Process.Signal(syscall.SIGTERM)
	b.await("serving consumers what they have not read")
	eventually(t, "a is alone on its ring", func() bool {
		shares := map[string]float64{}
		for _, m := range a.debug().Members {
			shares[m.Name] = m.Share
		}
		return shares["a"] == 1 && shares["b"] == 0
	})
	for range 3 {
		if code := a.push(token, "m 2\n"); code != http.StatusOK {
			t.Errorf("a push to the other: %d", code)
		}
	}
	for _, m := range []*memberProcess{a, b} {
		if sd := get(t, m.internal+"/sd"); strings.Count(sd, "127.0.0.1:") != 2 {
			t.Errorf("/sd of %s says %s", m.name, sd)
		}
	}
	if n := strings.Count(get(t, a.internal+"/metrics"), `telemeter_forwards_sent_total{result="kept"} 0`); n != 1 {
		t.Error("a push waited for the one that leaves")
	}
	if !b.still() {
		t.Fatal("it ended before all was read")
	}
	scrape()
	if code := b.ended(); code != exitOK || !strings.Contains(b.text(), `msg="nothing unread"`) {
		t.Errorf("exit %d", code)
	}
	eventually(t, "the leave is known", func() bool {
		for _, m := range a.debug().Members {
			if m.Name == "b" {
				return m.State == "left"
			}
		}
		return false
	})
}
