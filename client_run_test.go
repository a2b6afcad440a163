package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The client first pushes when it starts. It pushes again at the site's phase, an instant in each
// interval that depends on the cluster ID, and from then on once in each interval.
func TestClientPhase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		c, hub, _ := newTestClient(t, "a 1\n", nil)
		runFor(t, c, 20*time.Minute)
		if len(hub.at) < 10 || len(hub.at) > 11 {
			t.Fatalf("got %d pushes in 20 minutes at an interval of 2 minutes, want 10 or 11", len(hub.at))
		}
		if first := hub.at[0].Sub(start); first > time.Second {
			t.Errorf("the first push came after %v, want at most 1 s", first)
		}
		for i := 2; i < len(hub.at); i++ {
			if gap := hub.at[i].Sub(hub.at[i-1]); gap != 2*time.Minute {
				t.Errorf("push %d came %v after the previous push, want 2 minutes", i, gap)
			}
		}
	})
}

// The phase of a client, the instant in each interval at which it pushes, depends on the cluster
// ID.
func TestClientPhaseDependsOnClusterID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, _ := newTestClient(t, "", nil)
		other, _, _ := newTestClient(t, "", func(c *ClientConfig, _ *ClientReloadConfig) { c.ClusterID = "other" })
		if a, b := c.untilNextPhase(time.Now(), 2*time.Minute), other.untilNextPhase(time.Now(), 2*time.Minute); a == b {
			t.Errorf("two cluster IDs have the same phase: the next pushes are in %v and %v", a, b)
		}
	})
}

// If the wall clock is slewed and therefore lags behind the client's timer, the client still does
// not scrape twice in an interval.
func TestClientPhaseOfSlewedClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &counting{}
		start := time.Now()
		c, hub, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.FromClient.Transport = source
			cfg.Now = func() time.Time { now := time.Now(); return now.Add(-now.Sub(start) / 2000) }
		})
		runFor(t, c, 2*time.Hour)
		if len(source.at) > 61 || len(source.at) < 59 || len(hub.at) > 61 {
			t.Errorf("got %d scrapes and %d pushes in 2 hours at an interval of 2 minutes, want about 60", len(source.at), len(hub.at))
		}
	})
}

// If the client scrapes more often than it pushes, a push has all scrapes since the previous push.
// The client pushes as soon as it has made the newest of them.
func TestClientScrapeInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &counting{}
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.FromClient.Transport = source
			cfg.ScrapeInterval = 15 * time.Second
		})
		runFor(t, c, 20*time.Minute)
		for i := 3; i < len(hub.at); i++ {
			if gap := hub.at[i].Sub(hub.at[i-1]); gap != 2*time.Minute {
				t.Errorf("push %d came %v after the previous push, want 2 minutes", i, gap)
			}
			if n := strings.Count(hub.bodies[i], "\n"); n != 8 {
				t.Errorf("push %d has %d scrapes, want 8", i, n)
			}
			if !slices.Contains(source.at, hub.at[i]) {
				t.Errorf("push %d comes at no time of a scrape", i)
			}
		}
		if len(hub.at) < 9 || hub.at[0] != source.at[0] || !slices.Equal(hub.received(), upTo(len(hub.received()))) {
			t.Errorf("pushes at %v with the scrapes %v; want at least 9 pushes, the first at the first scrape, and all scrapes in order", hub.at, hub.received())
		}
	})
}

// If the client scrapes and pushes at the same interval, it pushes each scrape as soon as the
// scrape is made. Only the first scrape may be pushed later, because the server refuses the first
// attempt here. The test starts the client at 20 different times of the interval.
func TestClientPushesAtOnce(t *testing.T) {
	for i := range 20 {
		synctest.Test(t, func(t *testing.T) {
			time.Sleep(time.Duration(i) * 6 * time.Second)
			var scraped []time.Time
			c, hub, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
				cfg.To = cfg.To[:1]
				cfg.FromClient = &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
					scraped = append(scraped, time.Now())
					return respond(200, nil, "a 1\n"), nil
				})}
			})
			n := 0
			hub.answer = func(*http.Request) *http.Response {
				if n++; n == 1 {
					return respond(503, http.Header{"Retry-After": {"5"}}, "busy")
				}
				return nil
			}
			runFor(t, c, 7*time.Minute)
			for k, at := range scraped[1:] {
				if !slices.ContainsFunc(hub.at, at.Equal) {
					t.Errorf("a client started at %v: no push at the time of scrape %d; scrapes at %v, pushes at %v", time.Duration(i)*6*time.Second, k+1, scraped, hub.at)
					break
				}
			}
		})
	}
}

// During an outage of the destination the client goes on scraping at its interval. After the outage
// it delivers all scrapes soon, several in a push.
func TestClientOutage(t *testing.T) {
	for name, fail := range map[string]func(r *http.Request) (*http.Response, error){
		"unreachable":               func(*http.Request) (*http.Response, error) { return nil, fmt.Errorf("no route to host") },
		"hanging":                   func(r *http.Request) (*http.Response, error) { <-r.Context().Done(); return nil, r.Context().Err() },
		"answers 503":               func(*http.Request) (*http.Response, error) { return respond(503, nil, "disk full"), nil },
		"answers 404":               func(*http.Request) (*http.Response, error) { return respond(404, nil, "no such path"), nil },
		"answers 400 to /authorize": func(*http.Request) (*http.Response, error) { return respond(400, nil, "captive portal"), nil },
	} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { clientOutage(t, name, fail) }) })
	}
}

// clientOutage runs a client through an outage of one hour. During the outage fail answers the
// client's requests to the server; in the case "answers 400 to /authorize" it answers only the
// requests for upload tokens.
func clientOutage(t *testing.T, name string, fail func(r *http.Request) (*http.Response, error)) {
	var down atomic.Bool
	source := &counting{}
	var hub *fakeHub
	c, hub, log := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
		cfg.FromClient.Transport = source
		cfg.ToClient = &http.Client{Timeout: 40 * time.Second, Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			if down.Load() && (name != "answers 400 to /authorize" || r.URL.Path == "/authorize") {
				return fail(r)
			}
			return hub.RoundTrip(r)
		})}
	})
	hub.expires = 60 // seconds, so that the client has to request new tokens during the outage
	stop := startClient(t, c)
	time.Sleep(10 * time.Minute)
	synctest.Wait()
	before := hub.pushes()

	down.Store(true)
	log.Reset()
	time.Sleep(time.Hour)
	synctest.Wait()
	rec := httptest.NewRecorder()
	c.Handler(false).ServeHTTP(rec, httptest.NewRequest("GET", "/healthz/ready", nil))
	if rec.Code != 503 || !strings.HasPrefix(rec.Body.String(), "not ready: no push has delivered") {
		t.Errorf("/healthz/ready answers %d %s during the outage, want 503 because of the pushes", rec.Code, rec.Body)
	}
	if n := strings.Count(log.String(), "\n"); n > 260 { // two lines for each attempt, and at most about two attempts a minute
		t.Errorf("logged %d lines in an hour of outage, want at most 260", n)
	}
	if n, want := c.spool.Stats().Scrapes, source.count()-before; n != want {
		t.Errorf("%d scrapes in the spool, want %d: %d were made and %d delivered", n, want, source.count(), before)
	}

	down.Store(false)
	time.Sleep(maxBackoff + 2*40*time.Second) // the longest pause, and the timeouts of two attempts
	synctest.Wait()
	if got := hub.received(); !slices.Equal(got, upTo(source.count())) {
		t.Errorf("after the outage the hub has the scrapes %v, want 1 to %d", got, source.count())
	}
	if n := hub.pushes() - before; n > 12 {
		t.Errorf("the backlog of an hour took %d pushes, want at most 12", n)
	}
	stop()
	for i := 2; i < len(source.at); i++ {
		if gap := source.at[i].Sub(source.at[i-1]); gap != 2*time.Minute {
			t.Errorf("scrape %d came %v after the previous scrape, want 2 minutes", i, gap)
		}
	}
}

// While the source hangs, the client delivers the backlog of the spool. When the source answers
// again, the client scrapes at the same phase of the interval as before.
func TestClientHangingSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &counting{}
		var down atomic.Bool
		down.Store(true)
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.FromClient = &http.Client{Transport: source}
			cfg.ScrapeInterval = 10 * time.Second
		})
		hub.answer = func(*http.Request) *http.Response {
			if down.Load() {
				return respond(503, nil, "")
			}
			return nil
		}
		stop := startClient(t, c)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		source.hang.Store(true)
		down.Store(false)
		time.Sleep(maxBackoff + time.Second)
		synctest.Wait()
		if got := hub.received(); !slices.Equal(got, upTo(source.count())) || len(got) < 30 {
			t.Errorf("while the source hangs the hub has the scrapes %v, want 1 to %d", got, source.count())
		}
		if n := c.scrapes.Value("failed"); n < 5 {
			t.Errorf("counted %v failed scrapes, want at least 5", n)
		}
		source.hang.Store(false)
		n := source.count()
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := source.count() - n; got < 5 {
			t.Errorf("got %d scrapes in the minute after the source answered again, want at least 5", got)
		}
		stop()
		for i := 2; i < len(source.at); i++ {
			if gap := source.at[i].Sub(source.at[i-1]); gap%(10*time.Second) != 0 {
				t.Errorf("scrape %d came %v after the previous scrape, want a multiple of 10 s", i, gap)
			}
		}
	})
}

// A source that begins to hang delays a push by no more than pushGrace.
func TestClientPushesWithoutSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &counting{}
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.FromClient.Transport = source
			cfg.ScrapeInterval = 10 * time.Second
		})
		stop := startClient(t, c)
		time.Sleep(2*time.Second + c.untilNextPhase(time.Now().Add(2*time.Second), 2*time.Minute) + time.Minute)
		synctest.Wait()
		source.hang.Store(true)
		if n := c.spool.Stats().Scrapes; n < 5 {
			t.Fatalf("%d scrapes wait for the next push, want at least 5", n)
		}
		time.Sleep(time.Minute + pushGrace)
		synctest.Wait()
		if got := hub.received(); !slices.Equal(got, upTo(source.count())) {
			t.Errorf("the hub has the scrapes %v, want 1 to %d", got, source.count())
		}
		stop()
	})
}

// While the disk is full, the client keeps scrapes in memory and logs the failure once. When the
// disk works again, the client writes these scrapes to disk and logs once that the spool works.
func TestClientDiskFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFullDiskRig(t)
		stop := startClient(t, r.client)
		r.run(10 * time.Minute)
		r.fill()
		r.run(10 * time.Minute)
		if n := r.client.spool.Stats().InMemory; n != 5 || r.client.spoolErrors.Value() != 5 {
			t.Errorf("%d scrapes in memory and %v errors counted, want 5 each", n, r.client.spoolErrors.Value())
		}
		r.free()
		r.run(10 * time.Minute)
		if failed, works := strings.Count(r.log.String(), "spool failed"), strings.Count(r.log.String(), "spool works again"); failed != 1 || works != 1 {
			t.Errorf("logged the failure %d times and its end %d times, want once each; log:\n%s", failed, works, r.log)
		}
		if n := r.client.spool.Stats().InMemory; n != 0 {
			t.Errorf("%d scrapes in memory after the disk works again, want 0", n)
		}
		r.down.Store(false)
		stop()
	})
}

// If some scrapes are only in memory at shutdown, the client tries once more to push.
func TestClientPushesMemoryAtShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFullDiskRig(t)
		stop := startClient(t, r.client)
		r.run(30 * time.Minute)
		r.fill()
		r.run(4 * time.Minute)
		r.free()
		if n := r.client.spool.Stats().InMemory; n == 0 {
			t.Error("no scrape is in memory before the shutdown")
		}
		r.down.Store(false)
		stop()
		if got := r.hub.received(); !slices.Equal(got, upTo(len(r.source.at))) || len(got) < 15 {
			t.Errorf("the hub has the scrapes %v, want 1 to %d", got, len(r.source.at))
		}
		if err := r.client.Close(); err != nil {
			t.Error(err)
		}
	})
}

// fullDiskRig is a client whose server (the hub) is down and whose disk a test can fill.
type fullDiskRig struct {
	client *Client
	disk   *crashFS
	source *counting
	hub    *fakeHub
	log    *logBuffer
	down   atomic.Bool // the hub answers 503
}

func newFullDiskRig(t *testing.T) *fullDiskRig {
	t.Helper()
	spool := diskSpool()
	r := &fullDiskRig{disk: spool.FS.(*crashFS), source: &counting{}}
	r.client, r.hub, r.log = newSpoolClient(t, "", spool, func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.FromClient.Transport = r.source })
	r.hub.tellsTime = true // the hub's answers state its time, so the times of scrapes are final from the second scrape on
	r.down.Store(true)
	r.hub.answer = func(*http.Request) *http.Response {
		if r.down.Load() {
			return respond(503, nil, "")
		}
		return nil
	}
	return r
}

func (r *fullDiskRig) run(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// fill makes all writes to the disk fail.
func (r *fullDiskRig) fill() {
	r.disk.mu.Lock()
	defer r.disk.mu.Unlock()
	r.disk.hook = failOn("write", "", 0, errFull)
}

// free makes the disk work again.
func (r *fullDiskRig) free() {
	r.disk.mu.Lock()
	defer r.disk.mu.Unlock()
	r.disk.hook = nil
}

// An outage of the source is logged when it begins, every ten minutes while it lasts, and when it
// ends.
func TestClientLogsOutageOfSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		broken := func() bool { at := time.Since(begin); return at > 5*time.Minute && at < 34*time.Minute }
		c, hub, log := newTestClient(t, "", func(c *ClientConfig, _ *ClientReloadConfig) {
			c.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
				if broken() {
					return nil, errors.New("connection refused")
				}
				return respond(200, nil, "a 1\n"), nil
			})
			c.Interval, c.ScrapeInterval = 10*time.Second, 10*time.Second
		})
		hub.t = t
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		c.Run(ctx)
		failed, back := strings.Count(log.String(), "source failed"), strings.Count(log.String(), "source works again")
		if failed != 3 || back != 1 {
			t.Errorf("logged an outage of half an hour %d times and its end %d times, want 3 times and once", failed, back)
		}
		if n := c.scrapes.Value("failed"); n < 170 || !strings.Contains(log.String(), fmt.Sprintf(`"source works again" failed=%v`, n)) {
			t.Errorf("%v scrapes failed, want at least 170 and their number in the log:\n%s", n, log)
		}
	})
}

// During the last 30 days before the client token expires, the client logs a warning once a day.
func TestClientWarnsOfExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, log := newTestClient(t, "a 1\n", func(cfg *ClientConfig, st *ClientReloadConfig) {
			cfg.Interval = time.Hour
			st.TokenExpires = time.Now().Add(29 * 24 * time.Hour).Unix()
		})
		runFor(t, c, 60*time.Hour)
		if n := strings.Count(log.String(), "the client token expires soon"); n != 3 {
			t.Errorf("warned %d times in 60 hours, want 3", n)
		}
	})
}
