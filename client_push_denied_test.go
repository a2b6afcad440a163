package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// If every server denies access, the client logs once at level Error what a person must do, and
// tries again after at most five minutes. It counts the attempts as denied and keeps all scrapes.
// Reload makes it try at once.
func TestPusherDenied(t *testing.T) {
	for _, tt := range []struct {
		name string
		deny func() (*http.Response, error)
		want string // text that the line at level Error must contain
	}{
		{"revoked token", func() (*http.Response, error) { return respond(401, nil, TokenRevokedText), nil }, "--revoked-file"},
		{"revoked cluster ID", func() (*http.Response, error) { return respond(401, nil, ClusterRevokedText), nil }, "--revoked-file"},
		{"expired token", func() (*http.Response, error) { return respond(401, nil, TokenExpiredText), nil }, "--mode token --id site --to https://a.example --to https://b.example"},
		{"forged token", func() (*http.Response, error) { return respond(401, nil, TokenForgedText), nil }, "other keys"},
		{"damaged token", func() (*http.Response, error) { return respond(401, nil, TokenMalformedText), nil }, "copy the token from the hub again"},
		{"other cluster ID", func() (*http.Response, error) { return respond(403, nil, OtherClusterText), nil }, "correct --id"},
		{"proxy", func() (*http.Response, error) { return respond(403, nil, "<html>"), nil }, "if a proxy or a login page answered"},
		{"untrusted server", func() (*http.Response, error) {
			return nil, &DeniedError{fmt.Errorf("handshake at %v", time.Now()), "replace it"}
		}, "replace it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var denies atomic.Bool
				denies.Store(true)
				var hub *fakeHub
				var attempts atomic.Int32
				c, hub, log := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
					cfg.FromClient.Transport = &counting{}
					cfg.ToClient = &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
						if denies.Load() {
							attempts.Add(1)
							return tt.deny()
						}
						return hub.RoundTrip(r)
					})}
				})
				stop := startClient(t, c)
				time.Sleep(time.Hour)
				synctest.Wait()
				if n := attempts.Load(); n < 2*12 || n > 2*13 {
					t.Errorf("got %d requests to the two servers in an hour, want one to each every five minutes", n)
				}
				var errorLines []string
				for line := range strings.Lines(log.String()) {
					if strings.Contains(line, "level=ERROR") {
						errorLines = append(errorLines, line)
					}
				}
				if n := len(errorLines); n < 2 || n > 2*7 || !strings.Contains(errorLines[0], tt.want) {
					t.Errorf("logged %d errors in an hour, want one for each server every ten minutes, with %q; log:\n%s", n, tt.want, log)
				}
				if denied, failed := c.pusher.pushes.Value("denied"), c.pusher.pushes.Value("failed"); denied != float64(attempts.Load()) || failed != 0 {
					t.Errorf("counted %v attempts as denied and %v as failed, want %d and 0", denied, failed, attempts.Load())
				}
				denies.Store(false)
				c.Reload(*c.state.Load())
				synctest.Wait()
				if got := hub.received(); len(got) < 30 || !slices.Equal(got, upTo(len(got))) {
					t.Errorf("at once after the reload the hub has the scrapes %v, want all of the hour", got)
				}
				stop()
			})
		})
	}
}

// If one server of several denies access, the client tries that server about every five minutes, and
// with the first push after a reload.
func TestPusherDeniedByOneOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newTestClient(t, "a 1\n", nil)
		var denials atomic.Int64
		hub.answer = func(r *http.Request) *http.Response {
			if r.URL.Host == "a.example" {
				denials.Add(1) // twice for each try: with the token of before, and with a renewed one
				return respond(401, nil, TokenRevokedText)
			}
			return nil
		}
		stop := startClient(t, c)
		defer stop()
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := denials.Load(); n < 2*9 || n > 2*12 {
			t.Errorf("the server that denies access got %d requests in an hour, want two about every five minutes", n)
		}
		before := denials.Load()
		for denials.Load() == before { // until the next denial, after which deniedPause begins anew
			time.Sleep(time.Second)
		}
		synctest.Wait()
		before = denials.Load()
		c.Reload(*c.state.Load())
		time.Sleep(c.cfg.Interval)
		synctest.Wait()
		if n := denials.Load(); n == before {
			t.Error("the push after a reload does not try the server that denied access")
		}
	})
}

// A client that one server denies access pushes to the next server.
func TestPusherDeniedByOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, log := newTestClient(t, "a 1\n", nil)
		hub.answer = func(r *http.Request) *http.Response {
			if r.URL.Host == "a.example" {
				return respond(401, nil, TokenRevokedText)
			}
			return nil
		}
		begin := time.Now()
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil || len(hub.bodies) != 1 || time.Since(begin) > time.Second {
			t.Errorf("got the error %v and %d pushes after %v, want one push at once", err, len(hub.bodies), time.Since(begin))
		}
		if !strings.Contains(log.String(), `level=ERROR msg="destination failed; trying the next server" to=https://a.example`) {
			t.Errorf("the denial is not logged as an error; log:\n%s", log)
		}
	})
}

// An answer with 404 or 405, or a 200 without an upload token, is not a telemeter server's. The
// error says so and names the flag to check.
func TestPusherForeignServer(t *testing.T) {
	for _, tt := range []struct {
		status int
		body   string
	}{{404, "404 page not found"}, {405, ""}, {200, "<html>"}} {
		synctest.Test(t, func(t *testing.T) {
			c, _, log := newTestClient(t, "a 1\n", func(cfg *ClientConfig, _ *ClientReloadConfig) {
				cfg.ToClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) { return respond(tt.status, nil, tt.body), nil })
			})
			runFor(t, c, time.Minute)
			if !strings.Contains(log.String(), "telemeter server") || !strings.Contains(log.String(), "check --to") {
				t.Errorf("status %d: the log does not say that no telemeter server answered:\n%s", tt.status, log)
			}
		})
	}
}

// A failure whose text changes is logged at once. A failure with the same text, apart from the
// address of the local end of the connection, is logged again after ten minutes.
func TestPusherLogsChangedFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var cause atomic.Pointer[string]
		port := 40000
		c, _, log := newTestClient(t, "a 1\n", func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.To = cfg.To[:1]
			cfg.ToClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
				port++
				return nil, fmt.Errorf("read tcp 10.0.0.1:%d->192.0.2.1:9003: %s", port, *cause.Load())
			})
		})
		set := func(text string) { cause.Store(&text) }
		set("connection reset")
		stop := startClient(t, c)
		expect := func(what string, after time.Duration, reset, refused int) {
			t.Helper()
			time.Sleep(after)
			synctest.Wait()
			if got := [...]int{strings.Count(log.String(), "connection reset"), strings.Count(log.String(), "no route")}; got != [...]int{reset, refused} {
				t.Errorf("%s: logged the two causes %v times, want %d and %d; log:\n%s", what, got, reset, refused, log)
			}
		}
		expect("first cause", 9*time.Minute, 1, 0)
		set("no route")
		expect("other cause", 3*time.Minute, 1, 1)
		set("connection reset")
		expect("first cause again", 6*time.Minute, 2, 1)
		if !strings.Contains(log.String(), "suppressed=") {
			t.Errorf("no line says how many were left out; log:\n%s", log)
		}
		stop()
	})
}

// A failure is logged even if a server has just dropped samples for many reasons.
func TestPusherLogsFailureAfterManyDrops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, log := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.To = cfg.To[:1] })
		drops := map[string]int{}
		for i := range maxLoggedFailures {
			drops[fmt.Sprint("reason", i)] = 1
		}
		hub.answer = func(*http.Request) *http.Response {
			dropped, _ := json.Marshal(drops)
			return respond(200, nil, fmt.Sprintf(`{"accepted":1,"duplicates":0,"dropped":%s}`, dropped))
		}
		spoolAll(t, c, "a 1\n")
		mustDrain(t, c)
		spoolAll(t, c, "a 1\n")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		hub.answer = func(*http.Request) *http.Response { return respond(503, nil, "overloaded") }
		c.pusher.DrainSpool(ctx)
		if n := strings.Count(log.String(), "the server dropped samples"); n != maxLoggedFailures || strings.Count(log.String(), "level=WARN msg=\"destination failed") != 1 {
			t.Errorf("logged %d reasons of drops, want %d, and one failure; log:\n%s", n, maxLoggedFailures, log)
		}
	})
}

// While the client pushes a long backlog, it logs every ten seconds how far it has come. The last
// line counts all scrapes of the drain, also if the drain paused, and states how long it took.
func TestPusherLogsProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, log := newSpoolClient(t, "", diskSpool(), nil)
		const n = 60
		for i := range n {
			spoolAll(t, c, fmt.Sprintf("n %d\n", 10+i))
		}
		pushes := 0
		hub.answer = func(r *http.Request) *http.Response {
			time.Sleep(time.Second)
			if pushes++; pushes == n/2 || pushes == n/2+1 { // both servers fail once
				return respond(503, http.Header{"Retry-After": {"60"}}, "busy")
			}
			return nil
		}
		c.pusher.size.max, c.pusher.size.careful = 1, 1000 // one scrape in each push
		begin := time.Now()
		mustDrain(t, c)
		took := time.Since(begin)
		if lines := strings.Count(log.String(), "pushing a backlog"); lines != 6 {
			t.Errorf("logged %d lines about the progress, want 6; log:\n%s", lines, log)
		}
		for _, want := range []string{
			`msg="pushing a backlog" done=10 left=50 per_second=1.0 time_left=50s`,
			fmt.Sprintf("msg=pushed samples=%d scrapes=%d pushes=%d took=%v undelivered=0", n, n, n, took.Round(time.Millisecond)),
		} {
			if strings.Count(log.String(), want) != 1 {
				t.Errorf("the log has no line %s:\n%s", want, log)
			}
		}
	})
}

// A client whose spool directory is new warns if the site pushed from another spool before. It does
// not warn if the site is new, or if the directory is the old one.
func TestClientWarnsOfOtherSpool(t *testing.T) {
	r := newSrvRig(t)
	push := func(spool SpoolConfig) (warned bool) {
		t.Helper()
		c, _, log := newSpoolClient(t, fmt.Sprintf("n 1 %d\n", r.now().UnixMilli()), spool, func(cfg *ClientConfig, st *ClientReloadConfig) {
			cfg.To, cfg.ToClient, cfg.Now = []string{r.external.URL}, http.DefaultClient, r.now
			st.Token = r.token(KindClient, "site")
		})
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
			t.Fatal(err)
		}
		return strings.Contains(log.String(), `level=WARN msg="the spool is new, but this site pushed from another spool before`)
	}
	first := diskSpool()
	for _, tt := range []struct {
		name  string
		spool SpoolConfig
		want  bool
	}{
		{"the first spool of the site", first, false},
		{"a new spool", diskSpool(), true},
		{"the first spool again", first, false},
		{"a spool in memory", SpoolConfig{}, false},
	} {
		if got := push(tt.spool); got != tt.want {
			t.Errorf("%s: warned: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// A client whose token has expired logs this at level Error, with what to do.
func TestClientSaysTokenExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, log := newTestClient(t, "a 1\n", func(_ *ClientConfig, st *ClientReloadConfig) { st.TokenExpires = time.Now().Add(-time.Hour).Unix() })
		runFor(t, c, time.Hour)
		if strings.Count(log.String(), `level=ERROR msg="the client token has expired, so servers refuse this site: make a new token on the hub`) != 1 {
			t.Errorf("the log does not say once that the token has expired:\n%s", log)
		}
	})
}
