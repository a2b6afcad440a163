package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// cleaningScrape is the source's answer that the client of newCleaningClient cleans. cleanedScrape
// is the text that this client pushes for it. The anonymized values were computed with
//
//	printf %s 10.1.2.3:9100 | openssl dgst -sha256 -hmac 0123456789abcdef -binary |
//	head -c16 | base64 | tr +/ -_
const (
	cleaningScrape = `# TYPE up gauge
up{instance="10.1.2.3:9100",job="node"} 1 1700000000000
up{instance="10.1.2.4:9100",job="node"} 0 1700000000000
ALERTS{alertname="A"} 1
push_time_seconds 5
bad{__x="1"} 1
empty{a="",b="c"} 3
`
	cleanedScrape = `up{instance="a5mQbxN11M-zwP-u2jRwGg",job="node",region="north"} 1 1700000000000
up{instance="iwegJ1u42NbOhCAeX1xOwg",job="node",region="north"} 0 1700000000000
alerts{alertname="A",region="north"} 1 1700000001234
empty{b="c",region="north"} 3 1700000001234
`
)

// newCleaningClient returns a client whose source answers with cleaningScrape. The client renames
// ALERTS, anonymizes the label instance and adds the label region. The client's wall clock stands
// still.
func newCleaningClient(t *testing.T) (*Client, *fakeHub) {
	t.Helper()
	c, hub, _ := newTestClient(t, cleaningScrape, func(cfg *ClientConfig, st *ClientReloadConfig) {
		cfg.Now = func() time.Time { return time.UnixMilli(1700000001234) }
		st.NewCleaner = func() *ClientCleaner {
			c := &ClientCleaner{
				Rename: map[string]string{"ALERTS": "alerts"}, Anonymize: []string{"instance"},
				Labels: []Label{{[]byte("region"), []byte("north")}},
			}
			c.SetSalt([]byte("0123456789abcdef"))
			return c
		}
	})
	return c, hub
}

// The client renames series, anonymizes label values and adds labels before it pushes a scrape. It
// drops and counts samples with reserved names or invalid label sets.
func TestClientCleans(t *testing.T) {
	c, hub := newCleaningClient(t)
	if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if hub.bodies[0] != cleanedScrape {
		t.Errorf("the client pushed:\n%swant:\n%s", hub.bodies[0], cleanedScrape)
	}
	if reserved, invalid := c.dropped.Value(DropReserved), c.dropped.Value(DropInvalid); reserved != 1 || invalid != 1 {
		t.Errorf("dropped samples: %v as reserved, %v as invalid, want 1 each", reserved, invalid)
	}
}

// A dry run prints the samples of a scrape after the client has cleaned them.
func TestClientDryRun(t *testing.T) {
	c, _ := newCleaningClient(t)
	scraped, err := c.Scrape(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	text, err := scraped.Pieces[0].Text()
	if err != nil {
		t.Fatal(err)
	}
	if got := string(text); got != cleanedScrape {
		t.Errorf("a dry run prints:\n%swant:\n%s", got, cleanedScrape)
	}
}

// The client's own /federate shows the cleaned samples that the client pushed last.
func TestClientFederateShowsCleanedSamples(t *testing.T) {
	c, _ := newCleaningClient(t)
	if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
		t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	c.Handler(false).ServeHTTP(rec, httptest.NewRequest("GET", "/federate", nil))
	for line := range strings.Lines(cleanedScrape) {
		if !strings.Contains(rec.Body.String(), line) {
			t.Errorf("/federate lacks the line %s", line)
		}
	}
}

// The client's own /federate shows the newest delivered scrape. If that scrape was pushed in
// pieces, /federate shows all pieces.
func TestClientFederateShowsAllPieces(t *testing.T) {
	var text strings.Builder
	for i := range 300 {
		fmt.Fprintf(&text, "m%d{x=\"%x\"} 1 5\n", i, ClusterIDHash(fmt.Sprint(i)))
	}
	from := text.String()
	c, hub, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
		cfg.LimitBytes = 4 << 10
		cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) { return respond(200, nil, from), nil })
	})
	handler := c.Handler(false)
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
					t.Errorf("/federate shows the line %q, which was not delivered last", line)
				}
			}
		}
		if n := strings.Count(want, "\n"); lines != n {
			t.Errorf("/federate shows %d samples, want %d", lines, n)
		}
	}
	if len(hub.bodies) < 3 {
		t.Errorf("got %d pushes; the first scrape was not pushed in pieces", len(hub.bodies))
	}
}

// If ScrapeOnceAndDrain cannot deliver its scrape, the scrape stays in the spool. The next call of
// ScrapeOnceAndDrain delivers both scrapes.
func TestClientOnceKeepsUndelivered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.FromClient.Transport = &counting{} })
		hub.answer = func(*http.Request) *http.Response { return respond(503, nil, "") }
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := c.ScrapeOnceAndDrain(ctx)
		if err == nil || !strings.Contains(err.Error(), "destination: ") || !strings.Contains(err.Error(), "scrapes kept in the spool: 1,") {
			t.Errorf("got the error %v, want a failed destination and one scrape in the spool", err)
		}
		hub.answer = nil
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil || fmt.Sprint(hub.received()) != "[1 2]" {
			t.Errorf("then got the error %v and received %v, want both scrapes", err, hub.received())
		}
	})
}

// ScrapeOnceAndDrain delivers the scrapes in the spool even if the source fails.
func TestClientOnceDeliversWithoutSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) { return nil, errors.New("connection refused") })
		})
		spoolAll(t, c, "n 1\n")
		if err := c.ScrapeOnceAndDrain(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "source: ") || fmt.Sprint(hub.received()) != "[1]" {
			t.Errorf("got the error %v and received %v, want a failed source and the scrape of the spool", err, hub.received())
		}
	})
}

// Errors, logs and metrics name the part that failed: the source or the destination.
func TestClientNamesTheFailedPart(t *testing.T) {
	for _, tt := range []struct {
		part                          string
		sourceFails                   bool
		scrapesFailed, scrapesInSpool int
	}{
		{"source", true, 1, 0},
		{"destination", false, 0, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			c, hub, log := newTestClient(t, "a 1\nb 2\n", func(c *ClientConfig, _ *ClientReloadConfig) {
				if tt.sourceFails {
					c.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) { return nil, errors.New("connection refused") })
				}
			})
			if !tt.sourceFails {
				hub.answer = func(*http.Request) *http.Response { return respond(500, nil, "") }
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := c.ScrapeOnceAndDrain(ctx); err == nil || !strings.HasPrefix(err.Error(), tt.part+": ") {
				t.Errorf("a failing %s: got the error %v", tt.part, err)
			}
			scrapes, pushes := c.scrapes.Value("failed"), c.pusher.pushes.Value("failed")
			if int(scrapes) != tt.scrapesFailed || (pushes > 0) == tt.sourceFails {
				t.Errorf("a failing %s: counted %v failed scrapes and %v failed pushes", tt.part, scrapes, pushes)
			}
			for _, part := range []string{"source", "destination"} {
				if logged := strings.Contains(log.String(), part+" failed"); logged != (part == tt.part) {
					t.Errorf("a failing %s: logged that the %s failed: %v; log:\n%s", tt.part, part, logged, log)
				}
			}
			if n := c.spool.Stats().Scrapes; n != tt.scrapesInSpool {
				t.Errorf("a failing %s: %d scrapes in the spool, want %d", tt.part, n, tt.scrapesInSpool)
			}
		})
	}
}
