package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A scrape with more pieces than the server's rate limit allows at once is delivered, and each
// piece is delivered once.
func TestPusherPiecesUnderRateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newSpoolClient(t, "", diskSpool(), func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.To = cfg.To[:1] })
		limiter := NewSitePushLimiter(time.Second, 1<<20)
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
			t.Errorf("got the error %v and %d pushes, want 256 with all samples in order", err, len(hub.bodies))
		}
	})
}

// If a scrape is too large for one push, the client pushes it in pieces. Only a push that ends with
// the last sample of the scrape has the header with the number of the scrape.
func TestPusherNamesLastPiece(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &queueServer{limit: 8}
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a}, nil)
		spoolAll(t, c, "n 1\nn 2\nn 3\nn 4\nn 5\n")
		mustDrain(t, c)
		var named []string
		for i, h := range a.headers {
			if h.Get(SpoolHeader) != "" {
				named = append(named, a.events[i])
			}
		}
		if want := []string{"1 2 3 4 5", "3 4 5", "4 5"}; !slices.Equal(named, want) {
			t.Errorf("the pushes %q name the scrape, want %q", named, want)
		}
		a.expect("a scrape in pieces", "1 2 3 4 5", "1 2", "3 4 5", "3", "4 5")
		expectSpool(t, "a scrape in pieces", c, 0, 1, 0)
	})
}

// If two servers each accepted some pieces of a scrape, neither server holds the whole scrape. The
// client then pushes all pieces again, to one server.
func TestPusherPiecesGoToOneServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &queueServer{limit: 8}, &queueServer{limit: 8}
		a.onRequest = func(event string) { a.down.Store(event == "1 2") }
		c, _ := newQueueClient(t, diskSpool(), []*queueServer{a, b}, nil)
		spoolAll(t, c, "n 1\nn 2\nn 3\nn 4\n")
		mustDrain(t, c)
		a.expect("server a", "1 2 3 4", "1 2")
		b.expect("server b", "3 4", "ask", "1 2 3 4", "1 2", "3 4")
		expectSpool(t, "at the end", c, 0, 1, 0)
	})
}
