package main

// Tests of the status of a client: what it shows of scrapes and pushes, which problems it names, and
// which answer browsers and other clients get.

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// clientGet returns the answer of a path of a client's listener to a request with an Accept header.
func clientGet(h http.Handler, path, accept string) *httptest.ResponseRecorder {
	req, rec := httptest.NewRequest("GET", path, nil), httptest.NewRecorder()
	req.Header.Set("Accept", accept)
	h.ServeHTTP(rec, req)
	return rec
}

// After a scrape and a push, the status has no problem and no null, survives JSON, and does not show
// the password of --from. A browser gets a page, and others get the list of paths.
func TestClientStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fails := false
		c, _, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.From, _ = url.Parse("http://user:topsecret@source.example/metrics")
			cfg.FromClient = &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
				if fails {
					return nil, errors.New("refused")
				}
				return respond(200, nil, "a{x=\"1\"} 1\na{x=\"2\"} 1\nb 1\n"), nil
			})}
		})
		if got, want := c.Status().Problems, []string{"the source has not been scraped yet"}; !slices.Equal(got, want) {
			t.Errorf("at the start the problems are %q, want %q", got, want)
		}
		begin := time.Now()
		runFor(t, c, time.Minute)
		st := c.Status()
		if len(st.Problems) != 0 || st.Source.Samples < 3 || st.Destination.LastPush == nil || st.Destination.LastPush.Before(begin) || st.Destination.Server != "https://a.example" || st.Destination.Samples != st.Source.Kept || len(st.Spool.States) != 3 {
			t.Errorf("after a push the status is %+v", st)
		}
		if st.Sent == nil || st.Sent.Samples != st.Source.Kept || !slices.Contains(st.Sent.Families, FamilyCount{"a", 2}) {
			t.Errorf("the scrape sent last is %+v", st.Sent)
		}
		fails = true
		runFor(t, c, 5*time.Minute)
		if got := c.Status().Problems; len(got) != 1 || !strings.HasPrefix(got[0], "the source has failed for ") || !strings.HasSuffix(got[0], ": refused") {
			t.Errorf("with a failing source the problems are %q", got)
		}
		h := c.Handler(false)
		answer := clientGet(h, "/api/status", "text/html")
		var decoded ClientStatus
		if err := json.Unmarshal(answer.Body.Bytes(), &decoded); err != nil || !reflect.DeepEqual(&decoded, c.Status()) || strings.Contains(answer.Body.String(), "null") {
			t.Errorf("/api/status was answered %s, decoded as %+v, %v", answer.Body, decoded, err)
		}
		page := clientGet(h, "/", "text/html")
		if page.Code != 200 || page.Header().Get("Content-Type") != "text/html; charset=utf-8" || !strings.Contains(page.Body.String(), "the source has failed for") {
			t.Errorf("a browser gets %d %v %s", page.Code, page.Header(), page.Body)
		}
		index := clientGet(h, "/", "*/*")
		if index.Header().Get("Content-Type") != "application/json" || !strings.Contains(index.Body.String(), `"/federate"`) {
			t.Errorf("another client gets %v %s", index.Header(), index.Body)
		}
		for _, text := range []string{answer.Body.String(), page.Body.String()} {
			if strings.Contains(text, "topsecret") || !strings.Contains(text, "source.example") {
				t.Errorf("the answer shows the password, or not the source:\n%s", text)
			}
		}
	})
}

// Each thing that needs attention is exactly one problem of a client that works otherwise.
func TestClientStatusProblems(t *testing.T) {
	for _, c := range []struct {
		name  string
		cause func(c *Client, hub *fakeHub)
		want  string // the problem begins with this text
	}{
		{"source without series", func(c *Client, _ *fakeHub) {
			c.unmatchedNow = []string{"--rename x=y"}
			got := &CleanedScrape{Scraped: 2}
			c.setScraped(got, c.cfg.Now())
			c.LogUnmatchedFlags(got)
		}, "no series leaves the site: all series were dropped"},
		{"failing destination", func(_ *Client, hub *fakeHub) {
			hub.answer = func(*http.Request) *http.Response { return respond(503, nil, "no room") }
		}, "pushes have failed for "},
		{"expiring token", func(c *Client, _ *fakeHub) { c.reloadExpiry(48*time.Hour + time.Second) }, "the client token expires in 2d: " + RenewToken},
		{"expired token", func(c *Client, _ *fakeHub) { c.reloadExpiry(-4 * time.Hour) }, "the client token expired 4h ago: " + RenewToken},
		{"full spool", func(c *Client, _ *fakeHub) {
			c.spool.Add(Scrape{At: c.moment(), Samples: 1, Size: 4, Gzip: Gzip([]byte("a 1\n"))})
			c.spool.cfg.Limit = c.spool.Stats().Bytes
		}, "the spool uses 100 % of --spool-limit; when it is full, the oldest scrapes are dropped"},
		{"clock", func(c *Client, _ *fakeHub) { c.pusher.setClockOffset(-2 * time.Minute) }, "the clock of the source is off by 2m: synchronize"},
		{"unmatched flag", func(c *Client, _ *fakeHub) { c.unmatchedNow = []string{"--rename x=y"} }, "--rename x=y matches no series of the source: correct or remove it"},
		{"error in the log", func(c *Client, _ *fakeHub) { c.cfg.Warnings.add(LoggedWarning{c.cfg.Now(), "ERROR", "cannot write"}) }, "error "},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, hub, _ := newTestClient(t, "a 1\n", nil)
				runFor(t, client, time.Minute)
				if got := client.Status().Problems; len(got) != 0 {
					t.Fatalf("at first the problems are %q", got)
				}
				c.cause(client, hub)
				if hub.answer != nil {
					runFor(t, client, 5*time.Minute)
				}
				if got := client.Status().Problems; len(got) != 1 || !strings.HasPrefix(got[0], c.want) {
					t.Errorf("the problems are %q, want one that begins with %q", got, c.want)
				}
			})
		})
	}
}

// A failure of the source or of the destination is one problem while it lasts, and none afterwards,
// although the log has an error.
func TestClientStatusRecovers(t *testing.T) {
	for name, want := range map[string]string{"source": "the source has failed for ", "destination": "pushes have failed for "} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				isDown := false
				client, hub, _ := newTestClient(t, "a 1\n", func(cfg *ClientConfig, _ *ClientReloadConfig) {
					cfg.Warnings = &WarningLog{}
					cfg.Log = slog.New(cfg.Warnings.Handler(cfg.Log.Handler()))
					works := cfg.FromClient.Transport
					cfg.FromClient.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
						if isDown && name == "source" {
							return respond(500, nil, "down"), nil
						}
						return works.RoundTrip(r)
					})
				})
				hub.answer = func(*http.Request) *http.Response {
					if isDown && name == "destination" {
						return respond(401, nil, "revoked")
					}
					return nil
				}
				isDown = true
				runFor(t, client, 5*time.Minute)
				st := client.Status()
				if got := st.Problems; len(got) != 1 || !strings.HasPrefix(got[0], want) {
					t.Errorf("while it is down, the problems are %q, want one that begins with %q", got, want)
				}
				if !slices.ContainsFunc(st.Warnings, func(w LoggedWarning) bool { return w.Level == "ERROR" }) {
					t.Errorf("the log has no error: %+v", st.Warnings)
				}
				isDown = false
				client.pusher.RetryNow()
				runFor(t, client, 5*time.Minute)
				if got := client.Status().Problems; len(got) != 0 {
					t.Errorf("when it works again, the problems are %q", got)
				}
			})
		})
	}
}

// reloadExpiry lets the client's token expire after d.
func (c *Client) reloadExpiry(d time.Duration) {
	st := *c.state.Load()
	st.TokenExpires = c.cfg.Now().Add(d).Unix()
	c.state.Store(&st)
}
