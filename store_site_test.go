package main

// The scrapes that a store holds and those that are read, over a disk that
// fails and forgets; and a log that is rewritten while batches come and go.

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// names1 names scrape n of spool 1.
func names1(n uint64) ScrapeNames { return ScrapeNames{1, Ranges{{n, n}}} }

// spoolLists returns what the store says of spool 1 of site x.
func spoolLists(s *Store) string {
	st := s.RefreshSpoolStatus("x", 1)
	return fmt.Sprintf("held %v, read %v", st.Held, st.Read)
}

// At each file operation of a named push the process is killed or the disk fails: the
// scrape is held if and only if its samples are, and it is if the push was acknowledged.
// Sent again, it is held once.
func TestNamedPushCrashAnywhere(t *testing.T) {
	for _, compact := range []bool{false, true} {
		for at, reached := 0, true; reached; at++ {
			for mode, f := range []fault{{Err: errDisk}, {Err: errFull}, {Kill: true}, {Kill: true}} {
				what := fmt.Sprintf("compact %t, operation %d, mode %d", compact, at, mode)
				fsys := newStoreFS(uint64(at)<<2 | uint64(mode))
				k := newStoreKit(t, fsys)
				s := k.open()
				old, pts := point{"m", 0, k.clock.ms(9), 7}, []point{{"m", 1, k.clock.ms(5), 1}, {"n", 1, k.clock.ms(5), 2}}
				if _, err := s.Append(t.Context(), "x", storePush("x", old), names1(1)); err != nil {
					t.Fatal(err)
				}
				reached = false
				seen := 0
				fsys.hook = func(int, string, string) fault {
					if seen++; seen-1 != at {
						return fault{}
					}
					reached = true
					return f
				}
				res, err := s.Append(t.Context(), "x", storePush("x", pts...), names1(3))
				if compact {
					c := s.sites["x"]
					if c.Lock(t.Context()) == nil {
						c.RewriteLog(nil, s.KeptSince()) // may fail
						c.Unlock()
					}
				}
				fsys.hook = nil
				if mode == 2 {
					fsys.restart()
				} else {
					fsys.crash()
				}
				s = k.open()
				got := allHeld(t, s)
				want, wantSpool := pushed("x", old), "held 1, read "
				if len(got) == 3 {
					want, wantSpool = pushed("x", append(pts, old)...), "held 1,3, read "
				} else if err == nil {
					t.Errorf("%s: acknowledged and lost", what)
				}
				wantHeld(t, what, got, want)
				damaged := len(k.errors) > 0 // the disk has a later part of the write and not an earlier one
				if lists := spoolLists(s); lists != wantSpool && !(damaged && lists == "held , read ") {
					t.Errorf("%s: %+v, %v; %d samples, %s", what, res, err, len(got), lists)
				}
				again, err := s.Append(t.Context(), "x", storePush("x", pts...), names1(3))
				if err != nil || again.Accepted != 3-len(got) || again.Duplicates != len(got)-1 {
					t.Errorf("%s: again: %+v, %v", what, again, err)
				}
				fsys.crash()
				s = k.open()
				wantHeld(t, what+", again", allHeld(t, s), pushed("x", append(pts, old)...))
				if lists := spoolLists(s); lists != "held 1,3, read " && !(damaged && lists == "held 3, read ") {
					t.Errorf("%s: again: %s", what, lists)
				}
				if t.Failed() {
					t.FailNow()
				}
			}
		}
	}
}

// A scrape is held once its samples are, whichever push brought them, and read once every
// consumer has read them; it stays read through compaction, eviction, expiry and restarts.
func TestSiteSpoolsHeldAndRead(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	push := func(n uint64, pts ...point) AppendResult {
		t.Helper()
		res, err := s.Append(t.Context(), "x", storePush("x", pts...), names1(n))
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	conn := &AnswerReadTracker{}
	scrape := func() {
		t.Helper()
		r, _, err := s.Consumers.BeginScrape(1, "p", "", conn, k.clock.Now())
		if err != nil {
			t.Fatal(err)
		}
		scraper(s, time.Minute).ServeUnreadAndNewest(r, 0, false, nil)
	}
	want := func(what, lists string) {
		t.Helper()
		if got := spoolLists(s); got != lists {
			t.Errorf("%s: %s, want %s", what, got, lists)
		}
	}
	reopen := func() {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = k.open()
		conn = &AnswerReadTracker{}
	}
	compact := func() {
		t.Helper()
		c := s.sites["x"]
		if err := c.Lock(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer c.Unlock()
		if err := c.RewriteLog(nil, s.KeptSince()); err != nil {
			t.Fatal(err)
		}
	}
	old := k.clock.ms(60)
	push(1, point{"m", 1, old, 1})
	want("nobody has scraped", "held 1, read ")
	push(2, point{"m", 1, old, 1}) // repeats
	push(3)                        // a source that gave nothing
	want("a scrape without a new sample", "held 1-3, read ")
	scrape()
	want("served, not confirmed", "held 1-3, read ")
	scrape()
	want("confirmed", "held , read 1-3")
	push(4, point{"m", 1, old + 1, 2})
	want("another", "held 4, read 1-3")
	compact()
	want("compacted", "held 4, read 1-3")
	reopen()
	want("restarted", "held 4, read 1-3")
	scrape()
	scrape()
	want("read", "held , read 1-4")
	if _, ok := s.sites["x"].TryEvictOldestBatch(math.MaxInt64); !ok {
		t.Fatal("nothing is evicted")
	}
	compact()
	reopen()
	want("evicted", "held , read 1-4")
	before := len(allHeld(t, s))
	if res := push(1, point{"m", 1, old, 1}); res.Accepted != 0 || res.Duplicates != 1 || len(allHeld(t, s)) != before {
		t.Errorf("a scrape that was read came again: %+v", res)
	}
	s.Consumers.BeginScrape(2, "new", "", &AnswerReadTracker{}, k.clock.Now())
	want("a new consumer comes", "held , read 1-4")
	push(5, point{"m", 1, old + 2, 3})
	scrape()
	scrape()
	want("the new consumer has not read", "held 5, read 1-4")
	k.clock.Add(3 * time.Hour)
	scrape() // the other one is dead by now
	compact()
	reopen()
	want("expired", "held , read 1-5")
	if len(k.errors) > 0 {
		t.Error(k.errors)
	}
}

// A store vouches for a scrape only if its clock does: one whose samples are all dropped
// for their time, and several of which some samples are, are not held.
func TestSiteSpoolsUntimely(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	good, old, ahead := k.clock.ms(5), k.clock.ms(7201), k.clock.ms(-61)
	for i, test := range []struct {
		times   []int64
		numbers Ranges
		held    bool
	}{
		{[]int64{good}, Ranges{{1, 1}}, true},
		{[]int64{old}, Ranges{{2, 2}}, false},
		{[]int64{ahead}, Ranges{{3, 3}}, false},
		{[]int64{good + 1, old}, Ranges{{4, 4}}, true}, // a source with an old sample
		{[]int64{good + 1, old}, Ranges{{5, 5}}, true}, // again: nothing new
		{[]int64{good + 2, old}, Ranges{{6, 7}}, false},
		{[]int64{good + 3, ahead}, Ranges{{8, 8}, {10, 10}}, false},
		{[]int64{good + 3}, Ranges{{11, 12}}, true},
		{nil, Ranges{{13, 13}}, true},
	} {
		var pts []point
		for _, at := range test.times {
			pts = append(pts, point{"m", 1, at, 1})
		}
		if _, err := s.Append(t.Context(), "x", storePush("x", pts...), ScrapeNames{1, test.numbers}); err != nil {
			t.Fatal(err)
		}
		if held := s.RefreshSpoolStatus("x", 1).Held.Has(test.numbers[0].From); held != test.held {
			t.Errorf("push %d, scrapes %v: held %t", i, test.numbers, held)
		}
	}
}

// A scrape whose batch was evicted is still read after a compaction, also when the cursors
// are lost: nothing else says any more that it was.
func TestSiteSpoolsReadIsKept(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	for n := range uint64(2) {
		if _, err := s.Append(t.Context(), "x", storePush("x", point{"m", 1, k.clock.ms(60) + int64(n), 1}), names1(n+1)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		r, _, err := s.Consumers.BeginScrape(1, "p", "", "conn", k.clock.Now())
		if err != nil {
			t.Fatal(err)
		}
		scraper(s, time.Minute).ServeUnreadAndNewest(r, 0, false, nil)
	}
	c := s.sites["x"]
	if _, ok := c.TryEvictOldestBatch(math.MaxInt64); !ok {
		t.Fatal("nothing is evicted")
	}
	if err := c.Lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.RewriteLog(nil, s.KeptSince()); err != nil {
		t.Fatal(err)
	}
	c.Unlock()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := fsys.Remove(consumersPath); err != nil {
		t.Fatal(err)
	}
	if lists := spoolLists(k.open()); lists != "held 2, read 1" {
		t.Error(lists)
	}
}

// The numbers known of a site's spools are bounded, and a client that pushes every second while
// no consumer scrapes for two hours is not asked for a scrape again.
func TestSiteSpoolsAreBounded(t *testing.T) {
	var s SiteSpools
	for seq := range uint64(7200) {
		s.AddHeldScrapes(names1(seq+1), seq+1)
	}
	if held, read := s.HeldAndRead(1); held.String() != "1-7200" || len(read) > 0 {
		t.Errorf("held %v, read %v", held, read)
	}
	s.MarkReadUpTo(3600)
	held, read := s.HeldAndRead(1)
	if len(held) != 1 || len(read) != 1 || read[0].To > 3600 || read[0].To < 3600-8 || held[0].From != read[0].To+1 {
		t.Errorf("half is read: held %v, read %v", held, read)
	}
	s.MarkReadUpTo(7200)
	if held, read := s.HeldAndRead(1); len(held) > 0 || read.String() != "1-7200" {
		t.Errorf("all is read: held %v, read %v", held, read)
	}
	for n := range uint64(3 * MaxRanges) { // nothing merges
		s.AddHeldScrapes(ScrapeNames{2, Ranges{{2*n + 1, 2*n + 1}}}, n+1)
	}
	if held, _ := s.HeldAndRead(2); len(held) > MaxRanges || !held.Has(6*MaxRanges-1) {
		t.Errorf("%d ranges", len(held))
	}
	for id := range uint64(20) {
		s.AddHeldScrapes(ScrapeNames{id + 10, Ranges{{1, 1}}}, 3*MaxRanges+id)
	}
	if n := len(s.spools); n != maxSpools {
		t.Errorf("%d spools are known", n)
	}
	var back SiteSpools
	for _, payload := range s.EncodeRecords() {
		if err := back.DecodeRecord(payload); err != nil {
			t.Fatal(err)
		}
	}
	if held, _ := back.HeldAndRead(29); !held.Has(1) {
		t.Errorf("kept: %v", held)
	}
}

// A log that is damaged or cut short claims no scrape of which it may have lost samples.
func TestSiteSpoolsDamage(t *testing.T) {
	for _, compacted := range []bool{false, true} {
		fsys := newStoreFS(1)
		k := newStoreKit(t, fsys)
		s := k.open()
		for n := range uint64(6) {
			if _, err := s.Append(t.Context(), "x", storePush("x", point{"m", int(n), k.clock.ms(60) + int64(n), 1}), names1(n+1)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if n > 1 { // the first two are read
					break
				}
				r, _, err := s.Consumers.BeginScrape(1, "p", "", "conn", k.clock.Now())
				if err != nil {
					t.Fatal(err)
				}
				scraper(s, time.Minute).ServeUnreadAndNewest(r, 0, false, nil)
			}
		}
		if _, err := s.Append(t.Context(), "x", storePush("x", point{"m", 3, k.clock.ms(60) + 3, 1}), names1(7)); err != nil { // repeats scrape 4
			t.Fatal(err)
		}
		if lists := spoolLists(s); lists != "held 3-7, read 1-2" {
			t.Fatal(lists)
		}
		if compacted {
			c := s.sites["x"]
			if err := c.Lock(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := c.RewriteLog(nil, s.KeptSince()); err != nil {
				t.Fatal(err)
			}
			c.Unlock()
		}
		path := s.logPathOf("x")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		whole, err := fsys.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for at := range whole {
			data := slices.Clone(whole)
			data[at] ^= 0x55
			cut := slices.Clone(whole[:at])
			for what, content := range map[string][]byte{"flipped": data, "cut": cut} {
				fsys.put(path, content)
				s := k.open()
				st := s.RefreshSpoolStatus("x", 1)
				got := allHeld(t, s)
				for n := range uint64(6) {
					if _, has := got[heldSample{string(storePush("x", point{"m", int(n), 0, 1}).Arena), k.clock.ms(60) + int64(n)}]; !has && st.Held.Has(n+1) {
						t.Fatalf("compacted %t, %s at %d: scrape %d is held without its sample: %v", compacted, what, at, n+1, st.Held)
					}
				}
				if st.Held.Has(7) && len(got) < 4 {
					t.Fatalf("compacted %t, %s at %d: scrape 7 is held without the sample that it repeats", compacted, what, at)
				}
				s.Close()
				fsys.put(path, whole)
			}
		}
	}
}

// A batch that was evicted, and came back before its log was rewritten, stands there twice. It
// is held once when the log is read again, as it came last.
func TestEvictedComesBack(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	at := k.clock.ms(0)
	k.push(s, "x", point{"m", 1, at, 1}, point{"m", 2, at, 2})
	k.push(s, "x", point{"m", 1, at + 1, 3})
	if n, ok := s.sites["x"].TryEvictOldestBatch(math.MaxInt64); !ok || n != 2 {
		t.Fatal(n, ok)
	}
	k.push(s, "x", point{"m", 1, at, 1}, point{"m", 1, at + 2, 4})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = k.open()
	defer s.Close()
	want := pushed("x", point{"m", 1, at, 1}, point{"m", 2, at, 2}, point{"m", 1, at + 1, 3}, point{"m", 1, at + 2, 4})
	got := map[heldSample]float64{}
	n := 0
	s.ViewSite("x", func(held *SiteSamples) {
		for _, b := range held.Batches {
			for i, id := range b.IDs {
				got[heldSample{string(held.Table.Line(id)), b.Time(i)}] = b.V[i]
				n++
			}
		}
	})
	if !maps.Equal(got, want) || n != len(want) {
		t.Errorf("%d samples are held: %v, want %v", n, got, want)
	}
}

// Samples that are evicted during the rewrite of a log are not in the new log.
func TestRewriteMeetsEviction(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	var points []point
	for i := range 3 {
		points = append(points, point{"m", 1, k.clock.ms(100 - i), float64(i)})
		k.push(s, "a", points[i])
	}
	c := s.sites["a"]
	evicted := int64(0)
	fsys.hook = func(_ int, op, _ string) fault {
		if op == "rename" {
			n, _ := c.TryEvictOldestBatch(k.clock.ms(0))
			evicted += n
		}
		return fault{}
	}
	if err := c.Lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.RewriteLog(nil, s.KeptSince()); err != nil || evicted != 1 {
		t.Fatalf("%v, %d evicted", err, evicted)
	}
	c.Unlock()
	wantHeld(t, "rewritten", allHeld(t, s), pushed("a", points[1:]...))
}

// A call that waited for the lock of a site that was forgotten meanwhile leaves the site's
// next log alone.
func TestForgottenMeanwhile(t *testing.T) {
	for name, do := range map[string]func(s *Store) error{
		"maintain": func(s *Store) error { s.expireAndCompact(context.Background(), true); return nil },
		"push": func(s *Store) error {
			p := storePush("a", point{"m", 2, s.cfg.Now().UnixMilli(), 2})
			_, err := s.Append(context.Background(), "a", p, ScrapeNames{})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fsys := newStoreFS(1)
				k := newStoreKit(t, fsys)
				s := k.open()
				k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
				k.clock.Add(forgetAfter + time.Hour)
				c, err := s.acquireSite(t.Context(), "a")
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan error)
				go func() { done <- do(s) }()
				synctest.Wait() // it waits
				c.DropExpired(s.KeptSince())
				if err := c.RemoveLog(); err != nil {
					t.Fatal(err)
				}
				s.dropEmptySite(c)
				k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
				c.Unlock()
				if err := <-done; err != nil {
					t.Error(err)
				}
				want := pushed("a", point{"m", 1, k.clock.ms(0), 1})
				if name == "push" {
					maps.Copy(want, pushed("a", point{"m", 2, k.clock.ms(0), 2}))
				}
				wantHeld(t, "held", allHeld(t, s), want)
				fsys.crash()
				wantHeld(t, "after a crash", allHeld(t, k.open()), want)
			})
		})
	}
}
