package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// counting is a source that gives a sample n 1, 2, 3… and notes when it did.
type counting struct {
	hang  atomic.Bool
	extra time.Duration // by which its clock is ahead
	date  bool
	mu    sync.Mutex // guards at while a client runs
	at    []time.Time
}

func (s *counting) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.at)
}

func (s *counting) RoundTrip(r *http.Request) (*http.Response, error) {
	if s.hang.Load() {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = append(s.at, time.Now())
	header := http.Header{}
	if s.date {
		header.Set("Date", time.Now().Add(s.extra).UTC().Format(http.TimeFormat))
	}
	return respond(200, header, fmt.Sprintf("n %d\n", len(s.at))), nil
}

// received returns the values of n in all pushes, in their order.
func (h *fakeHub) received() (ns []int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for line := range strings.Lines(strings.Join(h.bodies, "")) {
		f := strings.Fields(line)
		n, err := strconv.Atoi(f[1])
		if err != nil || f[0] != "n" {
			h.t.Errorf("received %q", line)
		}
		ns = append(ns, n)
	}
	return ns
}

func (h *fakeHub) pushes() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.bodies)
}

func upTo(n int) (ns []int) {
	for i := range n {
		ns = append(ns, i+1)
	}
	return ns
}

func diskSpool() SpoolConfig { return SpoolConfig{FS: newCrashFS(1, "/s"), Dir: "/s"} }

// An outage of the destination, of whichever kind: scrapes go on at their
// interval, and when it is over all of them arrive at once, several to a push.
func TestClientOutage(t *testing.T) {
	for name, fail := range map[string]func(r *http.Request) (*http.Response, error){
		"unreachable": func(*http.Request) (*http.Response, error) { return nil, fmt.Errorf("no route to host") },
		"hanging":     func(r *http.Request) (*http.Response, error) { <-r.Context().Done(); return nil, r.Context().Err() },
		"refusing":    func(*http.Request) (*http.Response, error) { return respond(503, nil, "disk full"), nil },
		"forgetful":   func(*http.Request) (*http.Response, error) { return respond(404, nil, "no such path"), nil },
		"bad gateway": func(*http.Request) (*http.Response, error) { return respond(400, nil, "captive portal"), nil },
	} {
		synctest.Test(t, func(t *testing.T) {
			var down atomic.Bool
			source := &counting{}
			var hub *fakeHub
			c, hub, log := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
				cfg.FromClient.Transport = source
				cfg.ToClient = &http.Client{Timeout: 40 * time.Second, Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
					if down.Load() && (name != "bad gateway" || r.URL.Path == "/authorize") {
						return fail(r)
					}
					return hub.RoundTrip(r)
				})}
			})
			hub.expires = 60 // so that a token is asked for
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() { ended <- c.Run(ctx) }()
			time.Sleep(10 * time.Minute)
			synctest.Wait()
			before := hub.pushes()
			down.Store(true)
			log.Reset()
			time.Sleep(time.Hour)
			synctest.Wait()
			if rec := httptest.NewRecorder(); true {
				c.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/healthz/ready", nil))
				if rec.Code != 503 {
					t.Errorf("%s: ready says %d in an outage", name, rec.Code)
				}
			}
			if n := strings.Count(log.String(), "\n"); n > 260 { // two for each attempt, and not above two attempts a minute
				t.Errorf("%s: %d lines in an hour of outage", name, n)
			}
			if n := c.spool.Stats().Scrapes; n != source.count()-before {
				t.Errorf("%s: %d scrapes in the spool, of %d with %d delivered", name, n, source.count(), before)
			}
			down.Store(false)
			// The longest pause between attempts, and the longest of two.
			time.Sleep(maxBackoff + 80*time.Second)
			synctest.Wait()
			if got := hub.received(); !slices.Equal(got, upTo(source.count())) {
				t.Errorf("%s: after the outage there is %v, of %d", name, got, source.count())
			}
			if n := hub.pushes() - before; n > 12 {
				t.Errorf("%s: a backlog of an hour took %d pushes", name, n)
			}
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
			for i := 2; i < len(source.at); i++ {
				if gap := source.at[i].Sub(source.at[i-1]); gap != 2*time.Minute {
					t.Errorf("%s: scrape %d came %v after the one before", name, i, gap)
				}
			}
		})
	}
}

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
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- c.Run(ctx) }()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		source.hang.Store(true)
		down.Store(false)
		time.Sleep(maxBackoff + time.Second)
		synctest.Wait()
		if got := hub.received(); !slices.Equal(got, upTo(source.count())) || len(got) < 30 {
			t.Errorf("while the source hangs there is %v, of %d", got, source.count())
		}
		if c.scrapes.Value("failed") < 5 {
			t.Errorf("%v scrapes counted as failed", c.scrapes.Value("failed"))
		}
		// The next scrape begins when the source lets it, at its phase.
		source.hang.Store(false)
		n := source.count()
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := source.count() - n; got < 5 {
			t.Errorf("%d scrapes in the minute after", got)
		}
		cancel()
		<-ended
		for i := 2; i < len(source.at); i++ {
			if gap := source.at[i].Sub(source.at[i-1]); gap%(10*time.Second) != 0 {
				t.Errorf("scrape %d came %v after the one before", i, gap)
			}
		}
	})
}

// A push that is due does not wait long for a source that hangs since.
func TestClientPushesWithoutSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &counting{}
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.FromClient.Transport = source
			cfg.ScrapeInterval = 10 * time.Second
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- c.Run(ctx) }()
		time.Sleep(2*time.Second + c.untilNextPhase(time.Now().Add(2*time.Second), 2*time.Minute) + time.Minute)
		synctest.Wait()
		source.hang.Store(true)
		if n := c.spool.Stats().Scrapes; n < 5 {
			t.Fatalf("%d scrapes wait for the next push", n)
		}
		time.Sleep(time.Minute + pushGrace)
		synctest.Wait()
		if got := hub.received(); !slices.Equal(got, upTo(source.count())) {
			t.Errorf("received %v, of %d", got, source.count())
		}
		cancel()
		<-ended
	})
}

// Scrapes more frequent than pushes travel together, and the last of them is
// that of the push's own time.
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
				t.Errorf("push %d came %v after the one before", i, gap)
			}
			if n := strings.Count(hub.bodies[i], "\n"); n != 8 {
				t.Errorf("push %d has %d scrapes, want 8", i, n)
			}
			if !slices.Contains(source.at, hub.at[i]) {
				t.Errorf("push %d does not have the scrape of its own time", i)
			}
		}
		if len(hub.at) < 9 || hub.at[0] != source.at[0] || !slices.Equal(hub.received(), upTo(len(hub.received()))) {
			t.Errorf("pushes at %v of %v", hub.at, hub.received())
		}
	})
}

// spoolAll puts scrapes with these texts into the client's spool, a minute apart.
func spoolAll(t *testing.T, c *Client, texts ...string) {
	t.Helper()
	for _, text := range texts {
		at := c.moment()
		if err := c.spool.Add(Scrape{At: at, SourceTime: at.Wall, Samples: strings.Count(text, "\n"), Size: len(text), Gzip: Gzip([]byte(text))}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
	}
}

// answerByText has the hub answer a push by its text: nil accepts it.
func (h *fakeHub) answerByText(by func(text string) *http.Response) {
	h.answer = func(r *http.Request) *http.Response {
		var b bytes.Buffer
		b.ReadFrom(r.Body)
		r.Body = respond(200, nil, b.String()).Body
		var d Decompressor
		text, _, err := d.Decompress(b.Bytes(), "gzip", 1<<20)
		if err != nil {
			return respond(400, nil, err.Error())
		}
		return by(string(text))
	}
}

// sizedHub answers 413 to what is longer than limit, and 400 to what holds "bad".
func sizedHub(hub *fakeHub, limit int) {
	hub.answerByText(func(text string) *http.Response {
		switch {
		case len(text) > limit:
			return respond(413, nil, "too long")
		case strings.Contains(text, "bad"):
			return respond(400, nil, "bad line")
		}
		return nil
	})
}

func TestPusherRefusals(t *testing.T) {
	a, b, bad, z := "a 1\na 2\n", "b 1\nb 2\n", "bad 1\nb 3\n", "z 1\n"
	long := "l " + strings.Repeat("1", 100) + "\n"
	for _, tt := range []struct {
		name    string
		limit   int
		texts   []string
		want    string // delivered
		refused float64
		aside   int
		most    int // requests
	}{
		{"all is well", 1000, []string{a, b, z}, a + b + z, 0, 0, 1},
		{"one of several", 1000, []string{a, b, bad, z}, a + b + z, 2, 1, 5},
		{"one alone", 1000, []string{bad}, "", 2, 1, 1},
		{"the last", 1000, []string{a, bad}, a, 2, 1, 3},
		{"several too large", 16, []string{a, b, a, b, a}, a + b + a + b + a, 0, 0, 6},
		{"one too large", 8, []string{a + b}, a + b, 0, 0, 3},
		{"down to lines", 4, []string{a + b + a}, a + b + a, 0, 0, 11},
		{"one line too large", 10, []string{a + long + b, z}, a + b + z, 1, 1, 10},
		{"too large and bad", 10, []string{a + bad + b, z}, "a 1\nb 3\n" + b + z, 2, 1, 12}, // a 2 travels with bad
	} {
		synctest.Test(t, func(t *testing.T) {
			spool := diskSpool()
			c, hub, log := newSpoolClient(t, "", spool, nil)
			sizedHub(hub, tt.limit)
			spoolAll(t, c, tt.texts...)
			err := c.pusher.DrainSpool(t.Context())
			if (err != nil) != (tt.refused > 0) || c.dropped.Value(DropRefused) != tt.refused {
				t.Errorf("%s: %v; %v samples counted as refused", tt.name, err, c.dropped.Value(DropRefused))
			}
			if got := strings.Join(hub.bodies, ""); got != tt.want {
				t.Errorf("%s: delivered %q, want %q", tt.name, got, tt.want)
			}
			names := spoolFiles(spool.FS.(*crashFS))
			if len(names) != tt.aside || tt.aside > 0 && !strings.HasSuffix(names[0], ".log.refused") || c.spool.Stats().Scrapes != 0 {
				t.Errorf("%s: files %v", tt.name, names)
			}
			if len(hub.at) > tt.most {
				t.Errorf("%s: %d requests, want %d at most", tt.name, len(hub.at), tt.most)
			}
			if got := strings.Contains(log.String(), "refused a scrape"); got != (tt.refused > 0) {
				t.Errorf("%s: log:\n%s", tt.name, log)
			}
		})
	}
}

// A scrape in more pieces than the server's rate limit allows at once arrives all the same,
// each piece once: what was delivered is not sent again.
func TestPusherSplitsUnderRateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.To = cfg.To[:1] })
		limiter := NewSitePushLimiter(time.Second)
		sizedHub(hub, 6)
		answer := hub.answer
		hub.answer = func(r *http.Request) *http.Response {
			if wait, err := limiter.AcquirePush("site", time.Now()); err != nil {
				return respond(429, http.Header{"Retry-After": {strconv.Itoa(int(wait/time.Second) + 1)}}, err.Error())
			}
			defer limiter.ReleasePush("site")
			return answer(r)
		}
		var text strings.Builder
		for i := range 256 {
			fmt.Fprintf(&text, "n %03d\n", i)
		}
		spoolAll(t, c, text.String())
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
		defer cancel()
		if err := c.pusher.DrainSpool(ctx); err != nil || strings.Join(hub.bodies, "") != text.String() {
			t.Errorf("%v; %d pushes arrived of 256", err, len(hub.bodies))
		}
	})
}

// A site with more series than the server holds of it: what fits goes on arriving, and
// what does not is not tried line by line.
func TestPusherTooManySeries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, log := newSpoolClient(t, "", diskSpool(), nil)
		held := map[string]bool{}
		hub.answerByText(func(text string) *http.Response {
			more := map[string]bool{}
			for line := range strings.Lines(text) {
				if name, _, _ := strings.Cut(line, " "); !held[name] {
					more[name] = true
				}
			}
			if len(held)+len(more) > 1000 {
				return respond(413, nil, "more than 1000 series")
			}
			for name := range more {
				held[name] = true
			}
			return nil
		})
		for round := range 3 {
			var text strings.Builder
			for i := range 1500 {
				fmt.Fprintf(&text, "m%d %d\n", i, round)
			}
			spoolAll(t, c, text.String())
			before := len(hub.at)
			hub.bodies = nil
			if err := c.pusher.DrainSpool(t.Context()); err == nil || !strings.Contains(err.Error(), "more than 1000 series") {
				t.Errorf("round %d: %v", round, err)
			}
			if n := strings.Count(strings.Join(hub.bodies, ""), "\n"); n != 1000 || len(hub.at)-before > 60 {
				t.Errorf("round %d: %d samples arrived in %d requests", round, n, len(hub.at)-before)
			}
		}
		if n := c.dropped.Value(DropRefused); n != 1500 || c.spool.Stats().Scrapes != 0 {
			t.Errorf("%v samples counted as refused, %+v\n%s", n, c.spool.Stats(), log)
		}
	})
}

// Only 400 and 413 are about what is sent: nothing else costs a scrape.
func TestPusherRetriesWhatIsNotFinal(t *testing.T) {
	for _, status := range []int{201, 302, 401, 403, 404, 405, 408, 415, 429, 500, 502, 503} {
		synctest.Test(t, func(t *testing.T) {
			c, hub, _ := newSpoolClient(t, "", diskSpool(), nil)
			hub.answer = func(*http.Request) *http.Response { return respond(status, nil, "") }
			spoolAll(t, c, "a 1\n", "b 1\n")
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			if err := c.pusher.DrainSpool(ctx); err == nil || c.spool.Stats().Scrapes != 2 || len(hub.at) < 10 {
				t.Errorf("%d: %v after %d attempts; in the spool: %+v", status, err, len(hub.at), c.spool.Stats())
			}
			hub.answer = nil
			if err := c.pusher.DrainSpool(t.Context()); err != nil || strings.Join(hub.bodies, "") != "a 1\nb 1\n" {
				t.Errorf("%d: then %v, %q", status, err, hub.bodies)
			}
		})
	}
}

// A server that hangs costs its timeout once in a while, not at each push of a backlog;
// and when it is back it is the first again.
func TestPusherFailsOverInABacklog(t *testing.T) {
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
			t.Errorf("%v, %d pushes", err, hub.pushes())
		}
		if took := time.Since(begin); took > 15*time.Minute {
			t.Errorf("%d pushes of 3 s took %v", n, took)
		}
		if slices.Contains(hub.hosts, "c.example") {
			t.Error("it went on from one that worked")
		}
		// In a backlog that does not end, too.
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
			t.Errorf("back at the first after %d pushes of %d", back, len(hub.hosts))
		}
	})
}

// The client logs what the server answers about dropped samples.
func TestPusherLogsHint(t *testing.T) {
	for _, tt := range []struct{ answer, want string }{
		{`{"accepted":0,"dropped":{"too_old":1},"hint":"the times are wrong"}`, `"the server dropped samples" reason=too_old samples=1 hint="the times are wrong"` + "\n"},
		{`{"accepted":0,"dropped":{"too_old":1}}`, `"the server dropped samples" reason=too_old samples=1` + "\n"},
	} {
		c, hub, log := newTestClient(t, "a 1\n", nil)
		hub.answer = func(*http.Request) *http.Response { return respond(200, nil, tt.answer) }
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil || !strings.Contains(log.String(), tt.want) {
			t.Errorf("%v, logged:\n%s\nwant %s", err, log, tt.want)
		}
		if text := metricsText(t, c.cfg.Metrics); !strings.Contains(text, `telemeter_samples_dropped_total{reason="by_server"} 1`) {
			t.Errorf("not counted:\n%s", text)
		}
	}
}

// A 200 that is not a server's, but a proxy's or a login page's, costs no scrape.
func TestPusherBelievesNoOther200(t *testing.T) {
	for _, body := range []string{"", "<html>", "{", `{"accepted":1`, "{}", "null", "[]", `"ok"`, `{"status":"ok"}`, `{"accepted":"all"}`, `{"accepted":null}`} {
		synctest.Test(t, func(t *testing.T) {
			c, hub, log := newSpoolClient(t, "", diskSpool(), nil)
			hub.answer = func(*http.Request) *http.Response { return respond(200, nil, body) }
			spoolAll(t, c, "a 1\n")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := c.pusher.DrainSpool(ctx); err == nil || c.spool.Stats().Scrapes != 1 || !strings.Contains(log.String(), "its answer") {
				t.Errorf("%q: %v, in the spool: %+v", body, err, c.spool.Stats())
			}
		})
	}
}

// What a server asks for counts in either form, whatever its clock shows; nonsense asks
// for nothing.
func TestPusherRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.To = cfg.To[:1] })
		date := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
		for _, tt := range []struct {
			after string
			until time.Duration // or as a date, of a clock that is so much ahead
			ahead time.Duration // 0: the server states no date
			want  time.Duration // 0 for the pause of a first failure
		}{
			{after: "37", want: 37 * time.Second},
			{until: 38 * time.Second, want: 38 * time.Second},
			{until: 39 * time.Second, ahead: time.Hour, want: 39 * time.Second},
			{until: 40 * time.Second, ahead: -time.Hour, want: 40 * time.Second},
			{after: "99999", want: 2 * time.Minute}, // no longer than --interval
			{until: 1000 * time.Hour, want: 2 * time.Minute},
			{until: -time.Minute}, {after: "-5"}, {after: "99999999999999999999"}, {after: "1.5"}, {after: "soon"},
		} {
			refused := false
			hub.answer = func(*http.Request) *http.Response {
				if refused {
					return nil
				}
				refused = true
				h := http.Header{"Retry-After": {tt.after}}
				if tt.until != 0 {
					h.Set("Retry-After", date(tt.ahead+tt.until))
				}
				if tt.ahead != 0 {
					h.Set("Date", date(tt.ahead))
				}
				return respond(503, h, "busy")
			}
			spoolAll(t, c, "a 1\n")
			begin := time.Now()
			if err := c.pusher.DrainSpool(t.Context()); err != nil {
				t.Fatal(err)
			}
			least, most := tt.want, 2*tt.want // sites that were refused together come back apart
			if tt.want == 0 {
				least, most = minBackoff/2, minBackoff
			} else if tt.until > 0 && tt.ahead == 0 { // a date has no fraction
				least -= time.Second
			}
			if took := time.Since(begin); took < least || took > most {
				t.Errorf("%+v: it waited %v", tt, took)
			} else if took%time.Second == 0 {
				t.Errorf("%+v: it waited %v, as would all that are told so", tt, took)
			}
		}
	})
}

// A line that is too slow for a large push within a timeout gets smaller ones.
func TestPusherSlowLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.To = cfg.To[:1] })
		one := len(Gzip([]byte("n 10\n")))
		c.pusher.cfg.ToClient = &http.Client{Timeout: 40 * time.Second, Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			select { // ten seconds for each scrape
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
			t.Errorf("%v after %v: received %v", err, time.Since(start), hub.received())
		}
	})
}

// A wall clock that is slewed reaches the phase after the timer: no second scrape.
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
			t.Errorf("%d scrapes, %d pushes in 2 hours at an interval of 2 minutes", len(source.at), len(hub.at))
		}
	})
}

// A disk that is full costs nothing while memory allows, and is told of once.
func TestClientDiskFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		spool := diskSpool()
		disk := spool.FS.(*crashFS)
		source := &counting{}
		c, hub, log := newSpoolClient(t, "", spool, func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.FromClient.Transport = source })
		hub.tellsTime = true // so that times are final from the second scrape on
		var down atomic.Bool
		down.Store(true)
		hub.answer = func(*http.Request) *http.Response {
			if down.Load() {
				return respond(503, nil, "")
			}
			return nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- c.Run(ctx) }()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		disk.mu.Lock()
		disk.hook = failOn("write", "", 0, errFull)
		disk.mu.Unlock()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := c.spool.Stats().InMemory; n != 5 || c.spoolErrors.Value() != 5 {
			t.Errorf("%d scrapes in memory, %v errors counted", n, c.spoolErrors.Value())
		}
		disk.mu.Lock()
		disk.hook = nil
		disk.mu.Unlock()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if strings.Count(log.String(), "spool failed") != 1 || strings.Count(log.String(), "spool works again") != 1 {
			t.Errorf("log:\n%s", log)
		}
		if n := c.spool.Stats().InMemory; n != 0 {
			t.Errorf("%d scrapes still in memory when the disk works", n)
		}
		// At the end, what is in memory only gets one more attempt.
		disk.mu.Lock()
		disk.hook = failOn("write", "", 0, errFull)
		disk.mu.Unlock()
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		disk.mu.Lock()
		disk.hook = nil
		disk.mu.Unlock()
		down.Store(false)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if got := hub.received(); !slices.Equal(got, upTo(len(source.at))) || len(got) < 15 {
			t.Errorf("received %v, of %d", got, len(source.at))
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

// While the spool cannot be read the pusher waits, and what is there is delivered when
// it can be. For a single file that cannot be read nothing else waits.
func TestPusherWaitsForSpool(t *testing.T) {
	for _, tt := range []struct {
		name, unread string
		meanwhile    []int
	}{
		{"all", ".log", nil}, {"one", scrapeFileName(946684800_000), []int{2, 3}}, // numbers begin at the clock's milliseconds
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
				t.Errorf("%s: ended with %v", tt.name, err)
			}
			if got := hub.received(); !slices.Equal(got, tt.meanwhile) || c.pusher.IsHealthy() {
				t.Errorf("%s: received %v meanwhile", tt.name, got)
			}
			if n := c.spoolErrors.Value(); n < 15 || n > 50 || strings.Count(log.String(), "\n") > 50 || !strings.Contains(log.String(), "spool failed; scrapes are kept") {
				t.Errorf("%s: %v errors counted, log:\n%s", tt.name, n, log)
			}
			disk.hook = readFault{2, errDisk}.hook("read", tt.unread)
			if err := c.pusher.DrainSpool(t.Context()); err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
			got := hub.received()
			slices.Sort(got)
			if !slices.Equal(got, upTo(3)) || !c.pusher.IsHealthy() || c.dropped.Value(DropSpoolDamaged) > 0 || len(spoolFiles(disk)) > 0 {
				t.Errorf("%s: received %v, %v samples counted as dropped, files %q", tt.name, got, c.dropped.Value(DropSpoolDamaged), spoolFiles(disk))
			}
		})
	}
}

func TestClientOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		spool := diskSpool()
		broken := false
		c, hub, _ := newSpoolClient(t, "", spool, func(cfg *ClientConfig, _ *ClientReloadConfig) {
			source := &counting{}
			cfg.FromClient.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
				if broken {
					return nil, fmt.Errorf("connection refused")
				}
				return source.RoundTrip(r)
			})
		})
		hub.answer = func(*http.Request) *http.Response { return respond(503, nil, "") }
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := c.ScrapeOnceAndDrain(ctx)
		if err == nil || !strings.Contains(err.Error(), "destination: ") || !strings.Contains(err.Error(), "scrapes kept in the spool: 1,") {
			t.Errorf("got %v", err)
		}
		// The next delivers both; and one that cannot scrape delivers all the same.
		hub.answer = nil
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil || !slices.Equal(hub.received(), upTo(2)) {
			t.Errorf("%v, received %v", err, hub.received())
		}
		spoolAll(t, c, "n 3\n")
		broken = true
		if err := c.ScrapeOnceAndDrain(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "source: ") || !slices.Equal(hub.received(), upTo(3)) {
			t.Errorf("%v, received %v", err, hub.received())
		}
	})
}

// What the listener shows is what was delivered last, in all its pieces.
func TestClientShowsWhatWasSent(t *testing.T) {
	var text strings.Builder
	for i := range 300 {
		fmt.Fprintf(&text, "m%d{x=\"%x\"} 1 5\n", i, ClusterIDHash(fmt.Sprint(i)))
	}
	from := text.String()
	c, hub, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
		cfg.LimitBytes = 4 << 10
		cfg.From, _ = url.Parse("http://source.example/metrics")
		cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) { return respond(200, nil, from), nil })
	})
	handler := c.Handler()
	for _, want := range []string{"", text.String(), "z 1 7\n"} {
		if want != "" {
			from = want
			if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		rec := httptest.NewRecorder()
		handler.ServeHTTP(rec, httptest.NewRequest("GET", "/federate", nil))
		lines := 0
		for line := range strings.Lines(rec.Body.String()) {
			if !strings.HasPrefix(line, "#") {
				lines++
				if !strings.Contains(want, line) {
					t.Errorf("shows %q", line)
				}
			}
		}
		if lines != strings.Count(want, "\n") {
			t.Errorf("shows %d lines of %d", lines, strings.Count(want, "\n"))
		}
	}
	if len(hub.bodies) < 3 {
		t.Errorf("%d pushes: the first scrape was not in pieces", len(hub.bodies))
	}
}
