package main

// Tests of the slots of scrapes: which scrapes wait for which slots, how long a scrape keeps its
// slot, and what happens when the timeout of a scrape passes.

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const announcedTimeout = "X-Prometheus-Scrape-Timeout-Seconds"

// stuckWriter is the ResponseWriter of an answer that its reader does not take: Write reports to
// writing, and then waits until free is closed.
type stuckWriter struct {
	http.ResponseWriter
	writing chan<- struct{}
	free    <-chan struct{}
}

func (w stuckWriter) Write(p []byte) (int, error) {
	select {
	case w.writing <- struct{}{}:
	case <-w.free:
	}
	<-w.free
	return len(p), nil
}

// holdSlots begins n scrapes from 127.0.0.1 whose answers nobody takes, and returns when all of them
// are being written. They end when free is called.
func (r *consumerRig) holdSlots(n int, query string) (free func()) {
	r.t.Helper()
	writing, freed := make(chan struct{}), make(chan struct{})
	var scrapes sync.WaitGroup
	for range n {
		req := httptest.NewRequest("GET", "/federate?"+query, nil)
		req.RemoteAddr = "127.0.0.1:9"
		scrapes.Go(func() { r.server.federate.ServeHTTP(stuckWriter{httptest.NewRecorder(), writing, freed}, req) })
	}
	for range n {
		<-writing
	}
	free = sync.OnceFunc(func() {
		close(freed)
		scrapes.Wait()
	})
	r.t.Cleanup(free)
	return free
}

// A consumer that confirmed a scrape, and whose selectors are cheap, is served while scrapes without
// a name, of consumers that confirmed nothing, or of slow readers take all slots of others. Several
// scrapes of one such consumer do not keep out other such consumers. A scrape without a slot is
// answered 503 with Retry-After when its timeout has passed.
func TestEstablishedConsumersKeepSlots(t *testing.T) {
	r := newConsumerRig(t)
	r.pushUps(1, 2)
	const costly = `consumer=x&match[]={__name__=~"up|a.{1000}"}`
	client := scraperOf(t)
	for _, query := range []string{"consumer=x", "consumer=z", costly} {
		for range 2 {
			if got := r.ups(client, query, ""); got == "" {
				t.Fatalf("%s got no samples", query)
			}
		}
	}
	check := func(when string, want map[string]int) {
		t.Helper()
		for query, status := range want {
			var headers []string
			if status == 503 {
				headers = []string{announcedTimeout, "0.05"}
			}
			got := r.get(client, "GET", query, "", headers...)
			busy := got.header.Get("Retry-After") != "" && strings.Contains(got.body, "too many other scrapes")
			if got.status != status || busy != (status == 503) {
				t.Errorf("%s: %q was answered %d %v %.100s, want %d", when, query, got.status, got.header, got.body, status)
			}
		}
	}
	check("no slot is taken", map[string]int{"": 200, "consumer=y": 200, costly: 200, "consumer=x": 200})
	freeOthers := r.holdSlots(cap(r.server.federate.slots.others), "")
	check("all slots of others are taken", map[string]int{"": 503, "consumer=new": 503, costly: 503, "consumer=x": 200, "consumer=z": 200})
	freeX := r.holdSlots(1, "consumer=x")
	check("the slot of x is taken, too", map[string]int{"consumer=x": 503, "consumer=z": 200})
	freeOthers()
	check("only the slot of x is taken", map[string]int{"": 200, "consumer=x": 200})
	freeX()
	check("all slots are free again", map[string]int{"": 200, costly: 200, "consumer=x": 200})
	if s := r.server.federate.slots; s.others.InUse()+s.established.InUse()+len(s.scraping) != 0 {
		t.Errorf("%d, %d and %d slots are in use at the end", s.others.InUse(), s.established.InUse(), len(s.scraping))
	}
}

// A scraper that does not read its answer loses its connection when its timeout passes, and the next
// scrape gets its slot then. The timeout is the announced one, but at most a minute, or else 30 s.
func TestSlowReaderLosesSlot(t *testing.T) {
	for announced, want := range map[string]time.Duration{"": 30 * time.Second, "5": 5 * time.Second, "3600": time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			r := newVirtualRig(t)
			var text strings.Builder
			for i := range 500 {
				fmt.Fprintf(&text, "up{instance=\"%d\"} 1\n", i)
			}
			r.hold("site-a", text.String())
			l, end := runHTTPServer(r.server.InternalHandler(true).ServeHTTP)
			for range cap(r.server.federate.slots.others) {
				conn, ok := l.dial()
				if !ok {
					t.Fatal("the connection was not accepted")
				}
				defer conn.Close()
				fmt.Fprintf(conn, "GET /federate HTTP/1.1\r\nHost: localhost\r\n%s: %s\r\n\r\n", announcedTimeout, announced)
				synctest.Wait()
			}
			begin := time.Now()
			rec := httptest.NewRecorder()
			req := httptest.NewRequest("GET", "/federate", nil)
			req.Header.Set(announcedTimeout, "120")
			r.server.federate.ServeHTTP(rec, req)
			got := time.Since(begin)
			if want == time.Minute { // the timeout of both scrapes is a minute
				if got != want {
					t.Errorf("announced %q: the next scrape was answered %d after %v, want %v", announced, rec.Code, got, want)
				}
			} else if rec.Code != 200 || got != want || strings.Count(rec.Body.String(), "up{") != 500 {
				t.Errorf("announced %q: the next scrape was answered %d after %v, want 200 after %v", announced, rec.Code, got, want)
			}
			if _, err := end(); err != nil {
				t.Error(err)
			}
			if err := r.store.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// If the timeout of a consumer's scrape passes before the answer begins, the scrape is answered 503.
// The next scrape on the same connection does not confirm it.
func TestScrapeTimeoutConfirmsNothing(t *testing.T) {
	r := newConsumerRig(t)
	client := scraperOf(t)
	r.pushUps(1, 2)
	for range 20 { // the timeout passes either while the scrape waits for a slot, or after that
		got := r.get(client, "GET", "consumer=x&match[]=up", "", announcedTimeout, "1e-9")
		if got.status != 503 || got.header.Get("Retry-After") == "" {
			t.Fatalf("a scrape whose timeout has passed was answered %d %v %s", got.status, got.header, got.body)
		}
	}
	for i, want := range []string{"1 2 ", "2 "} {
		if got := r.ups(client, "consumer=x&match[]=up", ""); got != want {
			t.Errorf("scrape %d: got %q, want %q", i, got, want)
		}
	}
}

// A scrape no longer waits for a slot when its connection has ended.
func TestWaitingScrapeEndsWithConnection(t *testing.T) {
	r := newConsumerRig(t)
	r.pushUps(1)
	r.holdSlots(cap(r.server.federate.slots.others), "")
	ended := make(chan *http.Request, 1)
	r.during = func(req *http.Request) { ended <- req }
	begin := time.Now()
	conn := dialRaw(t, strings.TrimPrefix(r.url, "http://"))
	conn.send("GET /federate HTTP/1.1\r\nHost: localhost\r\n" + announcedTimeout + ": 60\r\n\r\n")
	conn.Close()
	if <-ended; time.Since(begin) > 50*time.Second {
		t.Error("the scrape waited for its timeout after its connection had ended")
	}
}
