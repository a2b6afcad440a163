package main

// Tests of the queue of requests to the authorization service, in virtual time: strangers send
// requests to /authorize from a few and from many addresses while sites authorize.

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// authorizeFlood is a server without listeners, and an authorization service that permits every
// token that begins with "good". It must be used in a bubble of synctest.
type authorizeFlood struct {
	*srvRig
	took time.Duration // how long the service takes to answer

	mu       sync.Mutex // guards the fields below
	asked    int        // requests to the service
	inFlight int        // requests that the service is handling
	peak     int        // highest inFlight so far
}

func newAuthorizeFlood(t *testing.T, took time.Duration) *authorizeFlood {
	f := &authorizeFlood{srvRig: newVirtualRig(t), took: took}
	f.keys = testKeys(t, 1)
	f.reload(func(*ReloadableServerConfig) {})
	f.server.cfg.ExternalAuthorizer = NewExternalAuthorizer(&url.URL{Scheme: "http", Host: "service"}, &http.Client{Transport: f, Timeout: time.Minute}, time.Now)
	return f
}

// RoundTrip answers a request to the authorization service.
func (f *authorizeFlood) RoundTrip(req *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.asked++
	f.inFlight++
	f.peak = max(f.peak, f.inFlight)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.inFlight--
	}()
	select {
	case <-time.After(f.took):
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
	rec := httptest.NewRecorder()
	if strings.Contains(string(body), `"authorization_token":"good`) {
		WriteJSON(rec, map[string]string{"status": "ok"})
	} else {
		http.Error(rec, "unknown token", http.StatusUnauthorized)
	}
	return rec.Result(), nil
}

// authorize sends a request to /authorize from an address, and returns the status of the answer.
func (f *authorizeFlood) authorize(ctx context.Context, address, clusterID, token string) int {
	req := httptest.NewRequest("POST", "/authorize?id="+clusterID, nil).WithContext(ctx)
	req.RemoteAddr = address + ":9"
	req.Header.Set("Authorization", "Bearer "+token)
	rec := httptest.NewRecorder()
	f.server.ExternalHandler().ServeHTTP(rec, req)
	return rec.Code
}

// flood sends requests with random tokens from n addresses until ctx ends, perAddress at a time from
// each address. The second result waits until all have ended.
func (f *authorizeFlood) flood(ctx context.Context, n, perAddress int) (requests *int, wait func()) {
	requests = new(int)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range n * perAddress {
		wg.Go(func() {
			for j := 0; ctx.Err() == nil; j++ {
				mu.Lock()
				*requests++
				mu.Unlock()
				f.authorize(ctx, fmt.Sprintf("10.0.%d.%d", i%n/200, i%n%200), "site-a", fmt.Sprint("bad-", i, "-", j))
				select {
				case <-time.After(time.Second):
				case <-ctx.Done():
				}
			}
		})
	}
	return requests, wg.Wait
}

// While strangers flood /authorize from a few or from many addresses, no request of a site is
// refused if the site or its address was authorized within a day: neither a request with the same
// token from a new address, nor a request of a new site from the same address, nor 40 requests at
// once. A request of a site at a new address is not refused as long as the strangers have few
// addresses. The log stays short, and every refusal is counted.
func TestAuthorizeUnderFlood(t *testing.T) {
	for _, c := range []struct {
		addresses int // of strangers
		newcomers bool
	}{{1, true}, {30, true}, {100, false}} {
		t.Run(fmt.Sprint(c.addresses), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newAuthorizeFlood(t, 50*time.Millisecond)
				ask := func(address, clusterID, token string) {
					t.Helper()
					if code := f.authorize(t.Context(), address, clusterID, token); code != 200 {
						t.Errorf("%s from %s was answered %d, want 200", clusterID, address, code)
					}
				}
				for i := range 3 {
					ask(fmt.Sprint("192.0.2.", i), fmt.Sprint("site-", i), fmt.Sprint("good-", i))
				}
				time.Sleep(23 * time.Hour)
				ctx, cancel := context.WithCancel(t.Context())
				requests, wait := f.flood(ctx, c.addresses, maxQueuedPerStranger+4)
				begin := time.Now()
				time.Sleep(5 * time.Second)
				var wg sync.WaitGroup
				for range 40 {
					wg.Go(func() { ask("192.0.2.0", "site-0", "good-0") })
				}
				wg.Wait()
				for i := range 20 {
					time.Sleep(300 * time.Millisecond)
					ask("192.0.2.0", "site-0", "good-0")
					ask("192.0.2.1", fmt.Sprint("new-", i), fmt.Sprint("good-new-", i))
					ask(fmt.Sprint("192.0.3.", i), "site-2", "good-2")
					if c.newcomers {
						ask(fmt.Sprint("192.0.4.", i), fmt.Sprint("newcomer-", i), "good")
					}
				}
				took := time.Since(begin)
				cancel()
				wait()
				if f.peak > 2*maxAuthorizing || c.addresses == 1 && f.peak > maxAuthorizingPerSender+4 {
					t.Errorf("%d requests were in flight to the service", f.peak)
				}
				if lines, limit := strings.Count(f.log.String(), "\n"), 3*int(took/LimitedLogEvery+1); lines > limit {
					t.Errorf("the log has %d lines, want at most %d", lines, limit)
				}
				if !strings.Contains(f.log.String(), " suppressed=") {
					t.Error("the log does not say how many messages were suppressed")
				}
				counted := 0.0
				for _, reason := range []string{"forged", "overloaded", "canceled", "unavailable"} {
					counted += f.server.unauthorizedTotal.Value(reason)
				}
				if counted != float64(*requests) {
					t.Errorf("%v refusals are counted, want %d", counted, *requests)
				}
			})
		})
	}
}

// Strangers behind the same address as a site do not keep out the site that was authorized within a
// day.
func TestAuthorizeBehindSharedAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newAuthorizeFlood(t, 2*time.Second)
		for i := range 2 {
			ctx, cancel := context.WithCancel(t.Context())
			if code := f.authorize(ctx, "10.0.0.0", "site-b", "good"); code != 200 {
				t.Errorf("request %d of the site was answered %d", i, code)
			}
			_, wait := f.flood(ctx, 1, maxQueuedPerKnown+4)
			time.Sleep(permissionMemory)
			if code := f.authorize(ctx, "10.0.0.0", "site-b", "good"); code != 200 {
				t.Errorf("under flood %d the site was answered %d", i, code)
			}
			cancel()
			wait()
		}
	})
}

// An address has at most 4 requests in flight and 16 in all. The 17th is refused at once, and a
// request that gets no slot is refused after 10 s. All addresses of an IPv6 /64 count as one.
func TestAuthorizeShares(t *testing.T) {
	for _, network := range []string{"192.0.2.1", "[2001:db8::N]", "[::ffff:192.0.2.1]", "malformed N"} {
		t.Run(network, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newAuthorizeFlood(t, 30*time.Second)
				var wg sync.WaitGroup
				var mu sync.Mutex
				answered := map[time.Duration]int{} // number of requests, by the time until the answer
				for i := range 20 {
					wg.Go(func() {
						begin := time.Now()
						f.authorize(t.Context(), strings.ReplaceAll(network, "N", strconv.Itoa(i)), "site-a", fmt.Sprint("bad-", i))
						mu.Lock()
						defer mu.Unlock()
						answered[time.Since(begin)]++
					})
				}
				synctest.Wait()
				if code := f.authorize(t.Context(), "192.0.2.77", "site-a", "bad"); code != 401 {
					t.Errorf("another address was answered %d", code)
				}
				wg.Wait()
				if f.peak != maxAuthorizingPerSender+1 || answered[0] != 4 || answered[maxAuthorizeWait] != 12 || answered[f.took] != 4 {
					t.Errorf("%d requests were in flight, answers by time %v", f.peak, answered)
				}
				if n := f.server.unauthorizedTotal.Value("overloaded"); n != 16 {
					t.Errorf("%v requests are counted as overloaded, want 16", n)
				}
			})
		})
	}
}

// Equal questions at the same time ask the service once. If the client whose request asks closes
// its connection, another request asks. When all clients have closed their connections, nothing
// waits.
func TestAuthorizeEqualQuestions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newAuthorizeFlood(t, time.Second)
		var wg sync.WaitGroup
		first, leave := context.WithCancel(t.Context())
		wg.Go(func() { f.authorize(first, "192.0.2.1", "site-a", "good") })
		synctest.Wait()
		codes := make([]int, 10)
		for i := range codes {
			wg.Go(func() { codes[i] = f.authorize(t.Context(), "192.0.2.2", "site-a", "good") })
		}
		time.Sleep(time.Second / 2)
		if f.asked != 1 {
			t.Errorf("the service was asked %d times, want once", f.asked)
		}
		leave()
		wg.Wait()
		for _, code := range codes {
			if code != 200 {
				t.Errorf("an equal question was answered %d", code)
			}
		}
		if f.asked != 2 {
			t.Errorf("the service was asked %d times, want twice", f.asked)
		}
		ctx, cancel := context.WithCancel(t.Context())
		for i := range 100 {
			wg.Go(func() { f.authorize(ctx, fmt.Sprint("192.0.3.", i%5), "site-b", fmt.Sprint("bad-", i)) })
		}
		synctest.Wait()
		begin := time.Now()
		cancel()
		wg.Wait()
		a := f.server.cfg.ExternalAuthorizer
		if n := len(a.strangers.senders) + a.strangers.queued + a.strangers.slots.InUse() + len(a.questions); n != 0 || time.Since(begin) != 0 {
			t.Errorf("after all clients have left, %d requests wait", n)
		}
	})
}
