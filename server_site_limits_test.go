package main

// The rate limit of a site and its pushes in flight, on a clock of the test's own, and the bound on
// the sites that are tracked.

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var rateNow = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// push begins and ends a push, and returns for how long it was put off.
func push(s *SitePushLimiter, id string, now time.Time) time.Duration {
	wait, err := s.AcquirePush(id, now)
	if err == nil {
		s.ReleasePush(id)
		return 0
	}
	return wait
}

func TestSitesRateLimit(t *testing.T) {
	s := NewSitePushLimiter(time.Second)
	now := rateNow
	for i := range rateBurst {
		if wait := push(s, "a", now); wait != 0 {
			t.Fatalf("push %d of a burst of %d waits %v", i+1, rateBurst, wait)
		}
	}
	wait, err := s.AcquirePush("a", now)
	if wait != time.Second || err == nil || !strings.Contains(err.Error(), "one every 1s, after a burst of 60") {
		t.Fatalf("after a burst: %v, %v", wait, err)
	}
	if wait := push(s, "a", now.Add(wait-1)); wait != 1 {
		t.Errorf("a nanosecond early: %v", wait)
	}
	for range 5 { // refusals cost nothing
		now = now.Add(time.Second)
		if wait := push(s, "a", now); wait != 0 {
			t.Errorf("at the rate: waits %v", wait)
		}
		if wait := push(s, "a", now); wait != time.Second {
			t.Errorf("twice at the rate: waits %v", wait)
		}
	}
	if wait := push(s, "b", now); wait != 0 {
		t.Errorf("another site waits %v", wait)
	}
	now = now.Add(10 * time.Second) // some of the burst is there again
	for i := range 10 {
		if wait := push(s, "a", now); wait != 0 {
			t.Errorf("push %d after 10 s of rest waits %v", i+1, wait)
		}
	}
	if wait := push(s, "a", now); wait != time.Second {
		t.Errorf("push 11 after 10 s of rest waits %v", wait)
	}
	now = now.Add(1000 * time.Hour) // but never more than all of it
	for range rateBurst {
		push(s, "a", now)
	}
	if wait := push(s, "a", now); wait != time.Second {
		t.Errorf("after a long rest and a burst: %v", wait)
	}
}

// However pushes come, none that is accepted breaks: in any span no more than a
// burst and one for each interval.
func TestSitesRateLimitProperty(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	s := NewSitePushLimiter(time.Second)
	var taken []time.Time
	now := rateNow
	for range 5000 {
		now = now.Add(time.Duration(rnd.ExpFloat64() * float64(400*time.Millisecond)))
		wait := push(s, "a", now)
		if wait == 0 {
			taken = append(taken, now)
		} else if again := push(s, "a", now.Add(wait)); again != 0 {
			t.Fatalf("seed %d: told to wait %v, and then %v more", seed, wait, again)
		} else {
			now = now.Add(wait)
			taken = append(taken, now)
		}
	}
	for i := range taken {
		for j := i + rateBurst; j < len(taken); j += 7 {
			if span := taken[j].Sub(taken[i]); j-i > rateBurst+int(span/time.Second) {
				t.Fatalf("seed %d: %d pushes in %v", seed, j-i+1, span)
			}
		}
	}
}

func TestSitesWithoutRateLimit(t *testing.T) {
	s := NewSitePushLimiter(0)
	for i := range 1000 {
		if wait := push(s, "a", rateNow); wait != 0 {
			t.Fatalf("push %d waits %v", i, wait)
		}
	}
}

func TestSitesInFlight(t *testing.T) {
	s := NewSitePushLimiter(time.Second)
	for range maxPushesPerSite {
		if _, err := s.AcquirePush("a", rateNow); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 { // these do not count for the rate
		if wait, err := s.AcquirePush("a", rateNow); wait != time.Second || err == nil || !strings.Contains(err.Error(), "4 pushes of this cluster ID") {
			t.Fatalf("one more in flight: %v, %v", wait, err)
		}
	}
	if _, err := s.AcquirePush("b", rateNow); err != nil {
		t.Errorf("another site: %v", err)
	}
	s.ReleasePush("a")
	if _, err := s.AcquirePush("a", rateNow); err != nil {
		t.Errorf("after one ended: %v", err)
	}
	for range maxPushesPerSite {
		s.ReleasePush("a")
	}
	for i := range rateBurst - maxPushesPerSite - 1 {
		if wait := push(s, "a", rateNow); wait != 0 {
			t.Fatalf("push %d waits %v", i, wait)
		}
	}
	if push(s, "a", rateNow) == 0 {
		t.Error("pushes in flight do not count for the rate")
	}
}

func TestSitesActivity(t *testing.T) {
	s := NewSitePushLimiter(time.Second)
	s.SetTokenExpiry("a", 1234, rateNow)
	s.SetPushFailed("b", rateNow.Add(time.Second))
	s.SetPushFailed("a", rateNow.Add(2*time.Second))
	s.SetTokenExpiry("a", 0, rateNow)
	push(s, "c", rateNow)
	s.SetClockOffset("c", time.Hour, rateNow)
	s.SetClockOffset("c", -90*time.Second, rateNow)
	s.SetClockOffset("b", 0, rateNow)
	var got []string
	s.ForEach(func(id string, st siteHealth) {
		got = append(got, fmt.Sprint(id, " ", max(st.LastFailure.Unix()-rateNow.Unix(), -1), " ", st.TokenExpiry, " ", st.ClockOffsetAt.Equal(rateNow), " ", st.ClockOffset))
	})
	slices.Sort(got)
	if want := []string{"a 2 0 false 0s", "b 1 0 true 0s", "c -1 0 true -1m30s"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSitesUntimely(t *testing.T) {
	s := NewSitePushLimiter(time.Second)
	for i, c := range []struct {
		id    string
		after time.Duration
		tell  bool
	}{
		{"a", 0, true}, {"a", 0, false}, {"b", 0, true}, {"a", untimelyLogEvery - 1, false}, {"a", untimelyLogEvery, true},
		{"a", 2*untimelyLogEvery - 1, false}, {"b", 2*untimelyLogEvery - 1, true},
	} {
		if got := s.TakeUntimelyWarning(c.id, rateNow.Add(c.after)); got != c.tell {
			t.Errorf("%d: %t", i, got)
		}
	}
}

func TestSitesBounded(t *testing.T) {
	s := NewSitePushLimiter(time.Hour)
	count := func() (n int) {
		s.ForEach(func(string, siteHealth) { n++ })
		return n
	}
	s.AcquirePush("in flight", rateNow)
	later := rateNow.Add(siteIdle)
	for i := range rateBurst {
		if wait := push(s, "due", rateNow); wait != 0 { // is owed no push for 60 hours
			t.Fatal(i, wait)
		}
	}
	for i := count(); i < maxTrackedSites; i++ {
		s.SetTokenExpiry(fmt.Sprint(i), 1, rateNow)
	}
	s.SetTokenExpiry("5", 2, later) // seen lately
	if wait, err := s.AcquirePush("new", later); wait != time.Minute || err == nil {
		t.Errorf("one too many: %v, %v", wait, err)
	}
	s.SetPushFailed("new", later)
	s.SetTokenExpiry("new", 1, later)
	s.SetClockOffset("new", time.Second, later)
	if wait := push(s, "7", later); wait != 0 {
		t.Errorf("a known site is put off for %v", wait)
	}
	if count() != maxTrackedSites {
		t.Errorf("%d sites are tracked", count())
	}
	// Those seen a day ago go, but for what would let them push faster.
	if wait := push(s, "new", later.Add(1)); wait != 0 {
		t.Errorf("put off for %v though many were idle", wait)
	}
	if n := count(); n != 5 {
		t.Errorf("%d sites are tracked, not those in flight, due, 5, 7 and new", n)
	}
	if push(s, "due", rateNow.Add(30*time.Minute)) == 0 {
		t.Error("a site was forgotten that had used up its burst")
	}
	s.ReleasePush("in flight")
}

func TestSitesConcurrent(t *testing.T) {
	s := NewSitePushLimiter(time.Second)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 500 {
				id := fmt.Sprint(i % 3)
				push(s, id, rateNow)
				s.SetPushFailed(id, rateNow)
				s.SetTokenExpiry(id, 1, rateNow)
				s.SetClockOffset(id, time.Second, rateNow)
				s.ForEach(func(string, siteHealth) {})
			}
		})
	}
	wg.Wait()
	taken := 0
	for i := range 3 {
		for push(s, fmt.Sprint(i), rateNow.Add(rateBurst*time.Second)) == 0 {
			taken++
		}
	}
	if taken != 3*rateBurst {
		t.Errorf("%d pushes after a rest, want %d", taken, 3*rateBurst)
	}
}
