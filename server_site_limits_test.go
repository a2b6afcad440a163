package main

// Tests of SitePushLimiter: the rate limit and the pushes in flight of each site, and the bound on
// the number of sites in memory. Most tests pass the current time to each call, because the limiter
// has no clock.

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// rateNow is the current time at the start of most tests of SitePushLimiter.
var rateNow = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// push begins a push of the site id and ends it at once. It returns 0 if the push was allowed, else
// how long its client should wait before it tries again.
func push(s *SitePushLimiter, id string, now time.Time) time.Duration {
	wait, err := s.AcquirePush(id, now)
	if err == nil {
		s.ReleasePush(id)
		return 0
	}
	return wait
}

// checkBurst checks that exactly n pushes of site a are allowed at the time now, and that the next
// push has to wait 1 s.
func checkBurst(t *testing.T, s *SitePushLimiter, now time.Time, n int) {
	t.Helper()
	for i := range n {
		if wait := push(s, "a", now); wait != 0 {
			t.Fatalf("push %d of %d has to wait %v", i+1, n, wait)
		}
	}
	if wait := push(s, "a", now); wait != time.Second {
		t.Fatalf("push %d has to wait %v, want 1s", n+1, wait)
	}
}

// A site may push 60 times, one push after the other, without waiting. The next push has to wait
// one interval of the rate limit. It is refused a nanosecond before the interval is over, and
// allowed when the interval is over. Other sites are not affected.
func TestRateLimitBurst(t *testing.T) {
	s := NewSitePushLimiter(time.Second, 1<<20)
	checkBurst(t, s, rateNow, rateBurst)
	wait, err := s.AcquirePush("a", rateNow)
	if wait != time.Second || err == nil || !strings.Contains(err.Error(), "one every 1s, after a burst of 60") {
		t.Fatalf("after a burst: wait %v, %v", wait, err)
	}
	if wait := push(s, "a", rateNow.Add(wait-1)); wait != 1 {
		t.Errorf("a nanosecond too early: wait %v, want 1ns", wait)
	}
	if wait := push(s, "a", rateNow.Add(wait)); wait != 0 {
		t.Errorf("after the time to wait: wait %v, want 0", wait)
	}
	if wait := push(s, "b", rateNow); wait != 0 {
		t.Errorf("another site has to wait %v, want 0", wait)
	}
}

// After a burst a site may push once per interval of the rate limit. Refused pushes do not count
// towards the rate limit.
func TestRateLimitInterval(t *testing.T) {
	s, now := NewSitePushLimiter(time.Second, 1<<20), rateNow
	checkBurst(t, s, now, rateBurst)
	for range 5 {
		now = now.Add(time.Second)
		checkBurst(t, s, now, 1)
	}
}

// A site that has used up its burst may push n times without waiting after a pause of n intervals
// of the rate limit, but at most 60 times.
func TestRateLimitAfterPause(t *testing.T) {
	s, now := NewSitePushLimiter(time.Second, 1<<20), rateNow
	checkBurst(t, s, now, rateBurst)
	now = now.Add(10 * time.Second)
	checkBurst(t, s, now, 10)
	checkBurst(t, s, now.Add(1000*time.Hour), rateBurst)
}

// For pushes at random times, the number of accepted pushes in a time span is at most one burst,
// and one more push for each interval of the rate limit in the span. A refused push is accepted if
// it is sent again after exactly the time that AcquirePush returned.
func TestRateLimitRandom(t *testing.T) {
	rnd := rand.New(rand.NewPCG(testSeed(t, 0), 0))
	s := NewSitePushLimiter(time.Second, 1<<20)
	var accepted []time.Time
	now := rateNow
	for range 5000 {
		now = now.Add(time.Duration(rnd.ExpFloat64() * float64(400*time.Millisecond)))
		if wait := push(s, "a", now); wait > 0 {
			now = now.Add(wait)
			if again := push(s, "a", now); again != 0 {
				t.Fatalf("a push was told to wait %v, and then %v more", wait, again)
			}
		}
		accepted = append(accepted, now)
	}
	for i := range accepted {
		for j := i + rateBurst; j < min(len(accepted), i+4*rateBurst); j++ {
			if span := accepted[j].Sub(accepted[i]); j-i+1 > rateBurst+int(span/time.Second) {
				t.Fatalf("%d pushes were accepted in %v", j-i+1, span)
			}
		}
	}
}

// If the interval between pushes is 0, there is no rate limit.
func TestNoRateLimit(t *testing.T) {
	s := NewSitePushLimiter(0, 1<<20)
	for i := range 1000 {
		if wait := push(s, "a", rateNow); wait != 0 {
			t.Fatalf("push %d has to wait %v, want 0", i, wait)
		}
	}
}

// The server answers 429 with Retry-After to a push over the rate limit of its site. Pushes with a
// client token and pushes with an upload token count towards the same limit of the site. Other
// sites are not affected. The refusals do not fill the process log.
func TestUploadRateLimit(t *testing.T) {
	r := newSrvRig(t)
	pushOverLimit := func() {
		t.Helper()
		got := r.push("site-a", "up 1\n")
		if wait, _ := strconv.Atoi(got.header.Get("Retry-After")); got.status != 429 || wait != 1 || !strings.Contains(got.body, "1s") || !strings.Contains(got.body, "60") {
			t.Fatalf("a push over the limit was answered %d %v %s", got.status, got.header, got.body)
		}
	}
	for range rateBurst {
		r.accepted(r.push("site-a", "up 1\n"))
	}
	pushOverLimit()
	r.accepted(r.push("site-b", "up 1\n"))
	if got := r.upload(r.token(KindClient, "site-a"), nil); got.status != 429 {
		t.Errorf("with the client token: answered %d, want 429", got.status)
	}
	r.clock.Store(int64(time.Second)) // the time at which Retry-After allowed the next push
	r.accepted(r.push("site-a", "up 1\n"))
	pushOverLimit()
	r.clock.Store(int64(time.Minute + time.Second))
	for range rateBurst {
		r.accepted(r.push("site-a", "up 1\n"))
	}
	pushOverLimit()
	if n := strings.Count(r.log.String(), "\n"); n > 5 {
		t.Errorf("the log has %d lines, want at most 5", n)
	}
}

// A site may have four pushes in flight. The limiter refuses a fifth push, and the refused push
// does not count towards the rate limit. A push in flight counts towards the rate limit.
func TestPushesInFlight(t *testing.T) {
	s := NewSitePushLimiter(time.Second, 1<<20)
	for range maxPushesPerSite {
		if _, err := s.AcquirePush("a", rateNow); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		if wait, err := s.AcquirePush("a", rateNow); wait != time.Second || err == nil || !strings.Contains(err.Error(), "4 pushes of this cluster ID") {
			t.Fatalf("a fifth push in flight: wait %v, %v", wait, err)
		}
	}
	if _, err := s.AcquirePush("b", rateNow); err != nil {
		t.Errorf("a push of another site: %v", err)
	}
	s.ReleasePush("a")
	if _, err := s.AcquirePush("a", rateNow); err != nil {
		t.Errorf("after one push ended: %v", err)
	}
	for range maxPushesPerSite {
		s.ReleasePush("a")
	}
	checkBurst(t, s, rateNow, rateBurst-maxPushesPerSite-1)
}

// ForEach reports for each site the time of the last failed push, the token expiry and the clock
// offset that were set last.
func TestSiteHealth(t *testing.T) {
	s := NewSitePushLimiter(time.Second, 1<<20)
	s.SetTokenExpiry("a", 1234, rateNow)
	s.AddRefusal(newRefusal(rateNow.Add(time.Second), resultMalformed, "b", "bad"), true)
	s.AddRefusal(newRefusal(rateNow.Add(2*time.Second), resultMalformed, "a", "bad"), true)
	s.SetTokenExpiry("a", 0, rateNow)
	push(s, "c", rateNow)
	s.SetClockOffset("c", time.Hour, rateNow)
	s.SetClockOffset("c", -90*time.Second, rateNow)
	s.SetClockOffset("b", 0, rateNow)
	var got []string
	s.ForEach(func(id string, st siteHealth) {
		if !s.mu.TryLock() {
			t.Fatal("ForEach holds the lock while it calls its function, so that pushes would wait")
		}
		s.mu.Unlock()
		got = append(got, fmt.Sprint(id, " ", max(st.LastFailure.Unix()-rateNow.Unix(), -1), " ", st.TokenExpiry, " ", st.ClockOffsetAt.Equal(rateNow), " ", st.ClockOffset))
	})
	slices.Sort(got)
	if want := []string{"a 2 0 false 0s", "b 1 0 true 0s", "c -1 0 true -1m30s"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TakeSiteLog returns true for a site and a cause at most once within siteLogEvery, with the number
// of calls for which it returned false before.
func TestTakeSiteLog(t *testing.T) {
	s := NewSitePushLimiter(time.Second, 1<<20)
	for i, c := range []struct {
		id, cause  string
		after      time.Duration // time of the call, as a duration since rateNow
		want       bool
		suppressed int
	}{
		{"a", "x", 0, true, 0}, {"a", "x", 0, false, 0}, {"b", "x", 0, true, 0}, {"a", "y", 0, true, 0}, {"a", "x", siteLogEvery - 1, false, 0},
		{"a", "x", siteLogEvery, true, 2}, {"a", "x", 2*siteLogEvery - 1, false, 0}, {"b", "x", 2*siteLogEvery - 1, true, 0},
	} {
		if suppressed, got := s.TakeSiteLog(c.id, c.cause, rateNow.Add(c.after)); got != c.want || suppressed != c.suppressed {
			t.Errorf("call %d, site %s and cause %s after %v: got %t and %d suppressed, want %t and %d", i, c.id, c.cause, c.after, got, suppressed, c.want, c.suppressed)
		}
	}
}

// The refusals of a site are logged at most once in LimitedLogEvery, and the next line says how many
// were not logged. Other sites are not affected.
func TestRefusalsLoggedByRate(t *testing.T) {
	r := newSrvRig(t)
	for range 5 {
		r.push("site-a", "malformed\n")
	}
	r.push("site-b", "malformed\n")
	r.clock.Add(int64(LimitedLogEvery))
	r.push("site-a", "malformed\n")
	var got []string
	for line := range strings.Lines(r.log.String()) {
		_, id, _ := strings.Cut(line, "cluster_id=")
		_, suppressed, _ := strings.Cut(line, "suppressed=")
		got = append(got, id[:len("site-a")]+" "+strings.TrimSpace(suppressed))
	}
	if want := []string{"site-a ", "site-b ", "site-a 4"}; !slices.Equal(got, want) {
		t.Errorf("the log has refusals of %q, want %q", got, want)
	}
}

// When maxTrackedSites sites are tracked, a new site makes the limiter forget the sites that have
// been idle for more than a day. The limiter keeps a site that has a push in flight or had a call
// within the last day. It also keeps a site that has used up its rate limit, because forgetting the
// site would let it push faster.
func TestTrackedSitesAreBounded(t *testing.T) {
	s := NewSitePushLimiter(time.Hour, 1<<20)
	count := func() (n int) {
		s.ForEach(func(string, siteHealth) { n++ })
		return n
	}
	s.AcquirePush("in flight", rateNow)
	later := rateNow.Add(siteIdle)
	for i := range rateBurst { // these pushes use up the rate limit of the site for 60 hours
		if wait := push(s, "limited", rateNow); wait != 0 {
			t.Fatalf("push %d has to wait %v", i, wait)
		}
	}
	for i := count(); i < maxTrackedSites; i++ {
		s.SetTokenExpiry(fmt.Sprint(i), 1, rateNow)
	}
	s.SetTokenExpiry("5", 2, later) // this call is later than the calls for the other sites, so site 5 is not idle
	if wait, err := s.AcquirePush("new", later); wait != time.Minute || err == nil {
		t.Errorf("a new site over the limit: wait %v, %v", wait, err)
	}
	s.AddRefusal(newRefusal(later, resultMalformed, "new", "bad"), true)
	s.SetTokenExpiry("new", 1, later)
	s.SetClockOffset("new", time.Second, later)
	if wait := push(s, "7", later); wait != 0 {
		t.Errorf("a tracked site has to wait %v, want 0", wait)
	}
	if n := count(); n != maxTrackedSites {
		t.Errorf("%d sites are tracked, want %d", n, maxTrackedSites)
	}
	if wait := push(s, "new", later.Add(1)); wait != 0 {
		t.Errorf("a new site has to wait %v although others are idle", wait)
	}
	if n := count(); n != 5 {
		t.Errorf("%d sites are tracked, want 5: in flight, limited, 5, 7 and new", n)
	}
	if push(s, "limited", rateNow.Add(30*time.Minute)) == 0 {
		t.Error("a site that has used up its rate limit was forgotten")
	}
	s.ReleasePush("in flight")
}

// If maxTrackedSites sites are tracked, a new site may push as soon as other tracked sites have
// been idle for more than a day, even if these sites have pushed before.
func TestTrackedSitesMakeRoom(t *testing.T) {
	s := NewSitePushLimiter(time.Second, 1<<20)
	for i := range maxTrackedSites {
		id := strconv.Itoa(i)
		if _, err := s.AcquirePush(id, testNow); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			s.ReleasePush(id)
		}
	}
	if wait, err := s.AcquirePush("one more", testNow); err == nil || wait <= 0 {
		t.Errorf("a site over the limit: wait %v, %v", wait, err)
	}
	s.AddRefusal(newRefusal(testNow, resultMalformed, "one more", "bad"), true)
	s.SetTokenExpiry("one more", 7, testNow)
	later := testNow.Add(siteIdle + time.Second)
	if _, err := s.AcquirePush("one more", later); err != nil {
		t.Errorf("a new site after the others were idle for a day: %v", err)
	}
	if len(s.sites) != 2 {
		t.Errorf("%d sites are tracked, want 2: the new one and the one with a push in flight", len(s.sites))
	}
	s.ReleasePush("0")
}

// Concurrent calls of SitePushLimiter lose no count of pushes: after a pause every site has exactly
// its whole burst again.
func TestSiteLimitsConcurrent(t *testing.T) {
	s := NewSitePushLimiter(time.Second, 1<<20)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 500 {
				id := fmt.Sprint(i % 3)
				push(s, id, rateNow)
				s.AddRefusal(newRefusal(rateNow, resultMalformed, id, "bad"), true)
				s.SetTokenExpiry(id, 1, rateNow)
				s.SetClockOffset(id, time.Second, rateNow)
				s.ForEach(func(string, siteHealth) {})
			}
		})
	}
	wg.Wait()
	accepted := 0
	for i := range 3 {
		for push(s, fmt.Sprint(i), rateNow.Add(rateBurst*time.Second)) == 0 {
			accepted++
		}
	}
	if accepted != 3*rateBurst {
		t.Errorf("%d pushes were accepted after a pause, want %d", accepted, 3*rateBurst)
	}
}
