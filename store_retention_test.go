package main

// Retention by the samples' own time. Expired samples are not served. Each is counted once, and
// also counted as unread if a consumer has not read it, unless the client pushes it to the site's
// owner too. While the new time of a stepped clock is in doubt, no sample expires unless it is too
// old by both times.

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// wantExpired fails the test unless the store's counters have these values: expired for all expired
// samples, and unread for the samples that expired unread.
func wantExpired(t *testing.T, s *Store, when string, expired, unread int64) {
	t.Helper()
	if st := s.Stats(); st.Expired != expired || st.ExpiredUnread != unread {
		t.Errorf("%s: %d samples are counted as expired and %d of them as unread; want %d and %d", when, st.Expired, st.ExpiredUnread, expired, unread)
	}
}

// Samples expire by their own time, not by the time of their push. Maintenance frees a batch when
// all its samples have expired, and the expired series of a site when they are more than half of
// its series.
func TestRetentionIsBySampleTime(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(7100), 1}, point{"m", 2, k.clock.ms(10), 2}) // the old sample shares a batch with a new sample
	k.push(s, "a", point{"m", 3, k.clock.ms(7000), 3})
	k.push(s, "b", point{"m", 4, k.clock.ms(7000), 4})
	k.clock.Add(300 * time.Second)
	s.expireAndCompact(context.Background(), false)
	wantExpired(t, s, "after 5 minutes", 3, 0)
	if n := s.totals.Samples.Load(); n != 1 {
		t.Errorf("%d samples are in memory, want 1", n)
	}
	if got := allHeld(t, s); len(got) != 1 || s.sites["a"].data.Table.Len() != 1 {
		t.Errorf("held: %v; site a has %d series, want 1 sample and 1 series", got, s.sites["a"].data.Table.Len())
	}
	k.clock.Add(2 * time.Hour)
	s.expireAndCompact(context.Background(), false)
	if got := allHeld(t, s); len(got) != 0 {
		t.Errorf("held although all samples have expired: %v", got)
	}
	if got := s.sites["b"].data.Table.Len(); got != 0 {
		t.Errorf("site b has %d series, and no samples", got)
	}
}

// A site whose samples have all expired is still known after a crash, with the time of its last
// push, and its next batch has a higher number.
func TestRetentionKeepsSite(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "b", point{"m", 4, k.clock.ms(0), 4})
	seq := s.sites["b"].data.Seq
	k.clock.Add(2*time.Hour + time.Minute)
	s.expireAndCompact(context.Background(), false)
	fsys.crash()
	s = k.open()
	st := s.Stats().Sites
	if len(st) != 1 || st[0].ID != "b" || st[0].LastPush == 0 || s.sites["b"].data.Seq <= seq {
		t.Errorf("after a crash: sites %+v; batch numbers start above %d, want above %d", st, s.sites["b"].data.Seq, seq)
	}
	k.push(s, "b", point{"m", 4, k.clock.ms(1), 4})
}

// An expired sample is not served, even if its batch has samples that have not expired. An expired
// sample is counted once, even if several consumers have not read it.
func TestExpiredSamplesAreNotServed(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	fresh := []point{{"m", 2, k.clock.ms(10), 2}, {"m", 1, k.clock.ms(5), 3}}
	k.push(s, "a", append(fresh, point{"m", 1, k.clock.ms(7190), 1}, point{"m", 3, k.clock.ms(7191), 1})...)
	k.push(s, "b", point{"m", 1, k.clock.ms(7199), 9})
	confirm(t, s.Consumers, "far", k.clock.Now(), map[uint64]uint64{SiteKey("a"): s.sites["a"].data.Seq})
	k.clock.Add(20 * time.Second)
	for _, scrape := range []struct {
		consumer string
		want     map[heldSample]float64
	}{
		{"one", pushed("a", fresh...)},
		{"two", pushed("a", fresh...)},
		{"one", nil},
	} {
		wantHeld(t, "served to consumer "+scrape.consumer, drain(t, k, s, scrape.consumer), scrape.want)
		wantExpired(t, s, "after a scrape of consumer "+scrape.consumer, 3, 3)
	}
	for _, b := range s.Stats().Sites[0].Backlogs {
		if b.UnreadSamples != 0 {
			t.Errorf("a consumer has a backlog of expired samples: %+v", b)
		}
	}
	s.expireAndCompact(context.Background(), false)
	wantExpired(t, s, "after maintenance", 3, 3)
}

// Samples that expire unread are counted as unread. Samples that a client with a spool pushed to a
// server that does not own the site are not counted as unread, because such a client pushes them to
// the owner too.
func TestExpiredUnreadOnOtherServer(t *testing.T) {
	for _, test := range []struct {
		owned bool
		names ScrapeNames
		lost  int64
	}{
		{true, ScrapeNames{}, 1},
		{true, names1(1), 1},
		{false, ScrapeNames{}, 1},
		{false, names1(1), 0},
	} {
		k := newStoreKit(t, newStoreFS(1))
		k.cfg.Owned = func(hash uint64) bool { return test.owned && hash == SiteKey("a") }
		s := k.open()
		k.pushNamed(s, "a", test.names, point{"m", 1, k.clock.ms(0), 1})
		s.Consumers.BeginScrape(1, "c", "", "conn", k.clock.Now())
		k.clock.Add(3 * time.Hour)
		s.sites["a"].DropExpired(s.KeptSince())
		wantExpired(t, s, fmt.Sprintf("owned %t, scrapes %q", test.owned, test.names), 1, test.lost)
	}
}

// Expired samples are counted once, whether expiry or a rewrite of the log drops them. The
// samples that a consumer has not read are also counted as unread.
func TestExpiredSamplesAreCounted(t *testing.T) {
	for _, test := range []struct {
		name string
		drop func(s *Store)
	}{
		{"expiry", func(s *Store) { s.sites["a"].DropExpired(s.KeptSince()) }},
		{"rewrite", func(s *Store) { rewriteLog(t, s, "a") }},
		{"expiry and rewrite", func(s *Store) {
			s.sites["a"].DropExpired(s.KeptSince())
			rewriteLog(t, s, "a")
		}},
	} {
		k := newStoreKit(t, newStoreFS(1))
		s := k.open()
		for i := range 4 {
			k.push(s, "a", point{"m", 1, k.clock.ms(7000 - i), 1}, point{"m", 2, k.clock.ms(10 - i), 2})
			if i == 0 { // the consumer reads the first batch only
				confirm(t, s.Consumers, "c", k.clock.Now(), map[uint64]uint64{SiteKey("a"): s.sites["a"].data.Seq})
			}
		}
		k.push(s, "a", point{"m", 1, k.clock.ms(7050), 1}) // all samples of this batch will expire
		k.clock.Add(5 * time.Minute)
		test.drop(s)
		wantExpired(t, s, test.name, 5, 4)
	}
}

// readAll has consumer c read all batches of site a so far.
func readAll(t *testing.T, k *storeKit, s *Store) {
	t.Helper()
	confirm(t, s.Consumers, "c", k.clock.Now(), map[uint64]uint64{SiteKey("a"): s.sites["a"].data.Seq})
}

// The next start counts the samples that expired after the newest push or the newest saved time of a
// scrape, and the unread samples among them as unread. In this test the saved time is that of the
// last scrape, so that no sample is counted twice.
func TestExpiredWhileDownAreCounted(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	k.push(s, "a", k.series("m", 16)...)
	k.push(s, "b", k.series("m", 16)...)
	k.clock.Add(100 * time.Minute)
	k.push(s, "a", k.series("m", 3)...)
	readAll(t, k, s)
	k.clock.Add(time.Second)
	k.push(s, "a", append(k.series("m", 5), point{"old", 1, k.clock.ms(100 * 60), 1})...)
	k.push(s, "b", k.series("m", 7)...)
	k.clock.Add(time.Second)
	k.push(s, "b", k.series("m", 9)...)
	k.clock.Add(30 * time.Minute)
	for _, id := range []string{"a", "b"} {
		s.sites[id].DropExpired(s.KeptSince())
	}
	wantExpired(t, s, "in the first process", 16+1+16, 1+16)
	confirm(t, s.Consumers, "c", k.clock.Now(), nil) // the saved time of this scrape shows the next process that the last process still ran at that time
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = k.open()
	wantExpired(t, s, "after a restart at once", 0, 0)
	s.Close()
	k.clock.Add(3 * time.Hour)
	wantExpired(t, k.open(), "after a restart three hours later", 3+5+7+9, 5+7+9)
}

// If the file of the cursors is lost while no process runs, the samples that expired meanwhile
// count as unread.
func TestExpiredWhileDownWithoutCursors(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "a", k.series("m", 4)...)
	readAll(t, k, s)
	s.Close()
	fsys.Remove(consumersPath)
	k.clock.Add(3 * time.Hour)
	wantExpired(t, k.open(), "after a restart without cursors", 4, 4)
}

// Samples that expire during a rewrite of their log are counted once and are not served.
func TestExpiryDuringRewrite(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(10), 1})
	k.push(s, "a", point{"m", 2, k.clock.ms(7190), 2}, point{"m", 3, k.clock.ms(5), 3})
	k.push(s, "a", point{"m", 4, k.clock.ms(7190), 4})
	c := s.sites["a"]
	before := s.KeptSince()
	expired := false
	fsys.hook = func(int, string, string) fault {
		if !expired { // expire samples in the middle of the rewrite, as a scrape does
			expired = true
			k.clock.Add(20 * time.Second)
			c.DropExpired(s.KeptSince())
		}
		return fault{}
	}
	if err := c.Lock(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := c.RewriteLog(nil, before); err != nil || !expired {
		t.Fatalf("rewrite: %v; samples expired during it: %t", err, expired)
	}
	c.Unlock()
	want := pushed("a", point{"m", 1, k.clock.ms(30), 1}, point{"m", 3, k.clock.ms(25), 3})
	wantHeld(t, "after the rewrite", contents(&c.data), want)
	c.DropExpired(s.KeptSince())
	wantExpired(t, s, "after the rewrite", 2, 0)
	if n := s.totals.Samples.Load(); n != 3 {
		t.Errorf("%d samples are in memory, want 3", n)
	}
	wantHeld(t, "served", drain(t, k, s, "central"), want)
}

// steppedClock is a store whose wall clock stepped three hours ahead 45 seconds ago. Since then
// maintenance has run every second. points are the samples of site a.
type steppedClock struct {
	*storeKit
	s         *Store
	monotonic time.Time
	steps     []WallClockStepEvent
	points    []point
	right     int64 // ms; the right time when the step happened
}

func newSteppedClock(t *testing.T) *steppedClock {
	t.Helper()
	c := &steppedClock{storeKit: newStoreKit(t, newStoreFS(1))}
	c.monotonic = c.clock.Now()
	start := c.monotonic
	clock := NewCheckedWallClock(c.clock.Now, func() time.Duration { return c.monotonic.Sub(start) }, func(e WallClockStepEvent) { c.steps = append(c.steps, e) })
	c.cfg.NowInterval = clock.NowInterval
	c.s = c.open()
	c.points = []point{{"m", 1, c.clock.ms(7000), 1}, {"m", 1, c.clock.ms(3600), 2}, {"m", 1, c.clock.ms(0), 3}}
	c.push(c.s, "a", c.points...)
	confirm(t, c.s.Consumers, "central", c.clock.Now(), nil)
	c.right = c.clock.ms(0)
	c.clock.Add(3 * time.Hour)
	for range 45 {
		c.pass(time.Second)
		c.s.expireAndCompact(context.Background(), false)
		c.s.Consumers.DropIdle(c.s.cfg.NowInterval().Earliest)
	}
	return c
}

func (c *steppedClock) pass(d time.Duration) {
	c.clock.Add(d)
	c.monotonic = c.monotonic.Add(d)
}

// While the new time of the clock is in doubt, the store refuses a sample with ErrClockInDoubt if
// only the old time or only the new time allows it. It drops a sample that is too old by both
// times.
func TestClockStepRefusesDoubtfulSamples(t *testing.T) {
	c := newSteppedClock(t)
	for name, at := range map[string]int64{"the old time": c.right + 1000, "the new time": c.clock.ms(0)} {
		if _, err := c.tryPush(c.s, "a", point{"m", 5, at, 1}); !errors.Is(err, ErrClockInDoubt) {
			t.Errorf("a sample that only %s allows: got %v, want ErrClockInDoubt", name, err)
		}
	}
	if res, err := c.tryPush(c.s, "a", point{"m", 5, c.right - 1000*3600*5, 1}); err != nil || res.TooOld != 1 {
		t.Errorf("a sample that is too old by both times: got %+v, %v", res, err)
	}
}

// While the new time of the clock is in doubt, no sample expires by the new time alone. Samples
// that are too old by the old or the new time are not served. All samples are served once the clock
// is set back.
func TestClockStepIsReverted(t *testing.T) {
	c := newSteppedClock(t)
	if got := drain(t, c.storeKit, c.s, "central"); len(got) != 0 || len(allHeld(t, c.s)) != 3 || c.s.Stats().Expired != 0 {
		t.Errorf("in doubt: served %v, held %v, %d expired; want no sample served, 3 held, 0 expired", got, allHeld(t, c.s), c.s.Stats().Expired)
	}
	c.clock.Add(-3 * time.Hour)
	wantHeld(t, "served after the clock was set back", drain(t, c.storeKit, c.s, "central"), pushed("a", c.points...))
	c.push(c.s, "a", point{"m", 5, c.clock.ms(0), 1})
	if len(c.steps) != 2 || c.steps[0].Size != 3*time.Hour || !c.steps[1].Reverted {
		t.Errorf("got clock events %+v, want a step of 3h and its reversal", c.steps)
	}
}

// A new time of the clock that lasts five minutes is accepted. Then samples expire by the new time.
func TestClockStepIsAccepted(t *testing.T) {
	c := newSteppedClock(t)
	if got := drain(t, c.storeKit, c.s, "central"); len(got) != 0 {
		t.Errorf("in doubt: served %v", got)
	}
	c.pass(5 * time.Minute)
	c.push(c.s, "a", point{"m", 5, c.clock.ms(0), 1})
	c.s.expireAndCompact(context.Background(), false)
	wantExpired(t, c.s, "after the new time was accepted", 3, 3)
	if len(c.steps) != 2 || !c.steps[1].Accepted {
		t.Errorf("got clock events %+v, want a step and its acceptance", c.steps)
	}
}

// While the new time of the clock is in doubt, the server forgets no consumer that is idle by only
// one of the two times.
func TestClockInDoubtForgetsNoConsumer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newStoreKit(t, newStoreFS(1))
		k.cfg.Now = func() time.Time { return time.Now().Add(25 * time.Hour) }
		k.cfg.NowInterval = func() PresentTimeRange { return PresentTimeRange{time.Now(), k.cfg.Now()} }
		s := k.open()
		confirm(t, s.Consumers, "central", time.Now(), nil)
		ctx, cancel := context.WithTimeout(t.Context(), 5*maintainEvery)
		defer cancel()
		if err := s.Run(ctx); err != nil || len(cursorsOf(s.Consumers)) != 1 {
			t.Errorf("Run returned %v; consumers %v are known, want 1", err, cursorsOf(s.Consumers))
		}
	})
}
