package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// The client renews its upload token before the token expires.
func TestClientRenewsUploadToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newTestClient(t, "a 1\n", nil)
		runFor(t, c, 3*time.Hour)
		for i := 1; i < len(hub.asked); i++ {
			if age := hub.asked[i].Sub(hub.asked[i-1]); age >= time.Hour || age < 40*time.Minute {
				t.Errorf("an upload token that is valid for an hour was renewed after %v, want 40 to 60 minutes", age)
			}
		}
		if len(hub.asked) < 3 {
			t.Errorf("requested %d upload tokens in three hours, want at least 3", len(hub.asked))
		}
	})
}

// The client answers a 401 by requesting one new upload token and repeating the push.
func TestPusherRenewsRefusedToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newTestClient(t, "a 1\n", nil)
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
			t.Fatal(err)
		}
		asked, pushes := len(hub.asked), len(hub.at)
		refused := false
		hub.answer = func(r *http.Request) *http.Response {
			if !refused {
				refused = true
				return respond(401, nil, "expired")
			}
			return nil
		}
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(hub.asked) != asked+1 || len(hub.at) != pushes+2 {
			t.Errorf("after a 401 the client requested %d upload tokens and pushed %d times, want 1 and 2", len(hub.asked)-asked, len(hub.at)-pushes)
		}
	})
}

// If the servers refuse each new upload token too, the client returns the server's error. The
// client does not request tokens in a tight loop.
func TestPusherRevokedToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newTestClient(t, "a 1\n", nil)
		hub.answer = func(*http.Request) *http.Response { return respond(401, nil, "revoked") }
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := c.ScrapeOnceAndDrain(ctx); err == nil || !strings.Contains(err.Error(), "revoked") {
			t.Errorf("got the error %v, want the server's error", err)
		}
		// Each round requests about one token at each of the two servers. The pauses between rounds
		// double, and the first pause is at most 1 s.
		if n := len(hub.asked); n > 16 {
			t.Errorf("requested %d upload tokens in 10 s, want at most 16", n)
		}
	})
}

// After a status other than 200, 400 and 413, the client keeps the scrapes of the push and pushes
// them again. If every server denies access (401 or 403), a drain with a deadline ends at once.
func TestPusherRetriesOtherStatuses(t *testing.T) {
	for _, status := range []int{201, 302, 401, 403, 404, 405, 408, 415, 429, 500, 502, 503} {
		synctest.Test(t, func(t *testing.T) {
			c, hub, _ := newSpoolClient(t, "", diskSpool(), nil)
			hub.answer = func(*http.Request) *http.Response { return respond(status, nil, "") }
			spoolAll(t, c, "a 1\n", "b 1\n")
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			least, most := 10, 100
			if status == 401 || status == 403 {
				least, most = 2, 4 // at each of the two servers, with the first upload token, and after 401 with a new one
			}
			if err := c.pusher.DrainSpool(ctx); err == nil || c.spool.Stats().Scrapes != 2 || len(hub.at) < least || len(hub.at) > most {
				t.Errorf("status %d: got the error %v after %d attempts, want an error after %d to %d attempts; spool: %+v, want 2 scrapes", status, err, len(hub.at), least, most, c.spool.Stats())
			}
			hub.answer = nil
			if err := c.pusher.DrainSpool(t.Context()); err != nil || strings.Join(hub.bodies, "") != "a 1\nb 1\n" {
				t.Errorf("status %d: then got the error %v and the pushes %q, want both scrapes", status, err, hub.bodies)
			}
		})
	}
}

// A TLS port answers 400 to a push over plain HTTP. This is no refusal of the samples, so the client
// keeps the scrapes. The error says what to change.
func TestPusherKeepsScrapesIfServerWantsTLS(t *testing.T) {
	for _, body := range []string{
		"this listener speaks TLS: use https://\n",                                                   // telemeter
		"Client sent an HTTP request to an HTTPS server.\n",                                          // net/http
		"<html><head><title>400 The plain HTTP request was sent to HTTPS port</title></head></html>", // nginx
	} {
		synctest.Test(t, func(t *testing.T) {
			c, hub, log := newSpoolClient(t, "", diskSpool(), nil)
			hub.answer = func(*http.Request) *http.Response { return respond(400, nil, body) }
			spoolAll(t, c, "a 1\n", "b 1\n")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := c.pusher.DrainSpool(ctx); err == nil || c.spool.Stats().Scrapes != 2 || c.dropped.Value(DropRefused) != 0 || !strings.Contains(log.String(), "write https:// instead of http:// in --to") {
				t.Errorf("answer %q: got the error %v, want one that says what to change; spool: %+v, want 2 scrapes", body, err, c.spool.Stats())
			}
		})
	}
}

// A redirect to a login page is logged once, although its query differs each time. The line does not
// have the query, and says how to follow a redirect to a server.
func TestPusherLogsRedirectOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, log := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.To, cfg.ToClient.CheckRedirect = cfg.To[:1], func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		})
		hub.answer = func(r *http.Request) *http.Response {
			resp := respond(302, http.Header{"Location": {fmt.Sprintf("https://user:password@login.example/in?state=%d", len(hub.at))}}, "<html>")
			resp.Request = r
			return resp
		}
		spoolAll(t, c, "a 1\n")
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		c.pusher.DrainSpool(ctx)
		const want = "https://a.example/upload answered 302 Found to https://login.example/in; redirects of a server are not followed: if that is the server, pass https://login.example as --to"
		if len(hub.at) < 5 || strings.Count(log.String(), "level=WARN") != 1 || !strings.Contains(log.String(), want) || strings.Contains(log.String(), "state=") || strings.Contains(log.String(), "password") {
			t.Errorf("after %d redirects, want one warning with %q; log:\n%s", len(hub.at), want, log)
		}
	})
}

// A 200 does not remove a scrape from the spool if its body is not from a telemeter server, but
// from a proxy or a login page, for example.
func TestPusherIgnoresForeign200(t *testing.T) {
	for _, body := range []string{"", "<html>", "{", `{"accepted":1`, "{}", "null", "[]", `"ok"`, `{"status":"ok"}`, `{"accepted":"all"}`, `{"accepted":null}`} {
		synctest.Test(t, func(t *testing.T) {
			c, hub, log := newSpoolClient(t, "", diskSpool(), nil)
			hub.answer = func(*http.Request) *http.Response { return respond(200, nil, body) }
			spoolAll(t, c, "a 1\n")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := c.pusher.DrainSpool(ctx); err == nil || c.spool.Stats().Scrapes != 1 || !strings.Contains(log.String(), "the answer") {
				t.Errorf("answer %q: got the error %v, want one about the answer; spool: %+v, want one scrape", body, err, c.spool.Stats())
			}
		})
	}
}

// The client obeys a Retry-After header in seconds or with a date, even if the server's clock is
// wrong. It ignores a malformed Retry-After header and a date in the past. If the header asks for
// more than MaxRetryAfter, the client waits for MaxRetryAfter.
func TestPusherRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.To, cfg.ToClient.CheckRedirect = cfg.To[:1], func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		})
		date := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
		for _, tt := range []struct {
			after string        // value of the Retry-After header, if until is 0
			until time.Duration // if not 0, the Retry-After header is a date that is this far ahead of the server's clock
			ahead time.Duration // how far the server's clock is ahead of the client's; 0 means that the answer has no Date header
			want  time.Duration // shortest allowed pause before the next attempt; 0 means the usual pause after a first failure
		}{
			{after: "37", want: 37 * time.Second},
			{until: 38 * time.Second, want: 38 * time.Second},
			{until: 39 * time.Second, ahead: time.Hour, want: 39 * time.Second},
			{until: 40 * time.Second, ahead: -time.Hour, want: 40 * time.Second},
			{after: "99999", want: 2 * time.Minute}, // the pause is reduced to MaxRetryAfter, which is 2 minutes here
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
			least, most := tt.want, 2*tt.want // jitter makes the pause at most twice as long
			if tt.want == 0 {
				least, most = minBackoff/2, minBackoff
				// A date has whole seconds, so Retry-After may ask for up to a second less.
			} else if tt.until > 0 && tt.ahead == 0 {
				least -= time.Second
			}
			if took := time.Since(begin); took < least || took > most {
				t.Errorf("%+v: the client waited %v, want %v to %v", tt, took, least, most)
			} else if took%time.Second == 0 {
				t.Errorf("%+v: the client waited %v, without jitter", tt, took)
			}
		}
	})
}

// After a restart, a client delivers the scrape in its spool to a real server, without a failed
// push.
func TestPusherAsksServer(t *testing.T) {
	r := newSrvRig(t)
	spool := diskSpool()
	start := func() *Client {
		c, _, _ := newSpoolClient(t, "", spool, func(cfg *ClientConfig, st *ClientReloadConfig) {
			cfg.To, cfg.ToClient, cfg.Now = []string{r.external.URL}, http.DefaultClient, r.now
			st.Token = r.token(KindClient, "site")
		})
		return c
	}
	c := start()
	text := fmt.Sprintf("n 1 %d\n", r.now().UnixMilli())
	at := c.moment()
	if err := c.spool.Add(Scrape{At: at, SourceTime: at.Wall, Samples: 1, Size: len(text), Gzip: Gzip([]byte(text))}); err != nil {
		t.Fatal(err)
	}
	c = start()
	mustDrain(t, c)
	if held := r.held("site", ""); !strings.Contains(held, text[1:]) || c.pusher.pushes.Value("failed") != 0 {
		t.Errorf("the server holds %q, want %q; failed pushes: %v", held, text, c.pusher.pushes.Value("failed"))
	}
}

// A push that names scrapes lists the consumers that earlier answers of a server listed, also after
// a restart of the client. It omits a consumer that has not scraped for more than a day.
func TestPusherSendsConsumers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{consumers: []ConsumerAge{{1, 10 * time.Second}, {2, 23 * time.Hour}}}
		spool, boot := diskSpool(), testBoot()
		start := func() *Client {
			c, _ := newQueueClient(t, spool, []*queueServer{a}, func(cfg *ClientConfig) { cfg.Boot = boot })
			return c
		}
		c := start()
		sends := func(want string) {
			t.Helper()
			spoolOnes(t, c, 1)
			mustDrain(t, c)
			if got := a.headers[len(a.headers)-1].Get(ConsumersHeader); got != want {
				t.Errorf("the push lists the consumers %q, want %q", got, want)
			}
		}
		sends("")
		a.consumers = nil // as after the loss of the server's disk: its answers list no consumers
		sends("0000000000000001:70,0000000000000002:82860")
		c = start()
		time.Sleep(50 * time.Minute)
		sends("0000000000000001:3130,0000000000000002:85920")
		a.consumers = []ConsumerAge{{1, 5 * time.Second}}
		time.Sleep(10 * time.Minute)
		sends("0000000000000001:3790") // consumer 2 is omitted, because it has not scraped for more than a day
		sends("0000000000000001:65")
	})
}

// A push asks the server to sync it if a scrape of the push is in memory only, because the spool has no
// directory or because its disk is full.
func TestPusherAsksForSync(t *testing.T) {
	disk, full := diskSpool(), diskSpool()
	full.FS.(*crashFS).hook = failOn("open", "", 0, errFull)
	for _, c := range []struct {
		name  string
		spool SpoolConfig
		want  string
	}{{"on disk", disk, ""}, {"disk full", full, "1"}, {"no directory", SpoolConfig{}, "1"}} {
		synctest.Test(t, func(t *testing.T) {
			a := &queueServer{}
			client, _ := newQueueClient(t, c.spool, []*queueServer{a}, nil)
			at := client.moment()
			client.spool.Add(Scrape{At: at, SourceTime: at.Wall, Samples: 1, Size: 4, Gzip: Gzip([]byte("n 1\n"))}) // fails if the disk is full
			mustDrain(t, client)
			if got := a.headers[0].Get(SyncHeader); got != c.want {
				t.Errorf("%s: %s is %q, want %q", c.name, SyncHeader, got, c.want)
			}
			a.expect(c.name, "1")
		})
	}
}
