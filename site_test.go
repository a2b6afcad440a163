package main

// site_test.go: several batches at once, as they are handed over, over a disk that
// fails and forgets and under every limit; and a cluster that is let go while pushes
// come.

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// handedOver are n batches of two samples each, as another server held them.
func handedOver(id string, clock *storeClock, n int) (all []Appending, points [][]point) {
	for i := range n {
		at := clock.ms(100 - i)
		pts := []point{{"m", i % 3, at, float64(i)}, {"n", i, at, float64(i)}}
		points = append(points, pts)
		all = append(all, Appending{storePush(id, pts...), &Handed{Accepted: at, Had: []uint64{uint64(i)}}})
	}
	return all, points
}

// At each file operation of taking three batches the process is killed or the disk
// fails: what was held stays, of the three the first few are there or none, all if
// they were acknowledged, and taking them again adds the rest.
func TestAppendAllCrashAnywhere(t *testing.T) {
	for name, before := range map[string][]point{"new": nil, "known": {{"m", 0, 1_700_000_000_000, 7}, {"o", 0, 1_700_000_000_000, 8}}} {
		for at, reached := 0, true; reached; at++ {
			for mode, f := range []fault{{Err: errDisk}, {Err: errFull}, {Kill: true}, {Kill: true}} {
				what := fmt.Sprintf("%s, operation %d, mode %d", name, at, mode)
				fsys := newStoreFS(uint64(at)<<2 | uint64(mode))
				k := newStoreKit(t, fsys)
				s := k.open()
				if before != nil {
					k.push(s, "x", before...)
				}
				all, points := handedOver("x", k.clock, 3)
				reached = false
				seen := 0
				fsys.hook = func(int, string, string) fault {
					if seen++; seen-1 != at {
						return fault{}
					}
					reached = true
					return f
				}
				prefixes := []map[heldSample]float64{pushed("x", before...)}
				for _, pts := range points {
					next := maps.Clone(prefixes[len(prefixes)-1])
					maps.Copy(next, pushed("x", pts...))
					prefixes = append(prefixes, next)
				}
				res, err := s.AppendAll(t.Context(), "x", all)
				fsys.hook = nil
				if err == nil {
					wantHeld(t, what, allHeld(t, s), prefixes[3])
					prefixes = prefixes[3:]
				} else {
					wantHeld(t, what+", not taken", allHeld(t, s), prefixes[0])
				}
				if mode == 2 {
					fsys.restart()
				} else {
					fsys.crash()
				}
				s = k.open()
				got := allHeld(t, s)
				if !slices.ContainsFunc(prefixes, func(p map[heldSample]float64) bool { return maps.Equal(p, got) }) {
					t.Errorf("%s: %+v, %v; after a crash %d samples: %v", what, res, err, len(got), got)
				}
				again, err := s.AppendAll(t.Context(), "x", all)
				if err != nil || again.Accepted+again.Duplicates != 6 || again.Accepted != len(before)+6-len(got) {
					t.Errorf("%s: again: %+v, %v; %d were held", what, again, err, len(got))
				}
				fsys.crash()
				s = k.open()
				wantHeld(t, what+", again", allHeld(t, s), prefixes[len(prefixes)-1])
				for i, b := range s.clusters["x"].held.Batches {
					if n := len(s.clusters["x"].held.Batches) - 3; i >= n && !slices.Equal(b.Had, []uint64{uint64(i - n)}) {
						t.Errorf("%s: batch %d was had by %v", what, i, b.Had)
					}
				}
				if t.Failed() {
					t.FailNow()
				}
			}
		}
	}
}

// Where one of several batches meets a limit none is held, in memory as on disk.
func TestAppendAllLimits(t *testing.T) {
	for name, test := range map[string]struct {
		limit func(*StoreConfig)
		err   error
	}{
		"series":   {func(c *StoreConfig) { c.LimitSeries = 5 }, ErrSeriesLimit}, // the three have 6, with x's own 7
		"samples":  {func(c *StoreConfig) { c.LimitSamples = 6 }, ErrFull},
		"storage":  {func(c *StoreConfig) { c.LimitStorage = 400 }, ErrFull},
		"clusters": {func(c *StoreConfig) { c.LimitClusters = 1 }, ErrFull},
		"a batch of the future": {func(c *StoreConfig) {
			now := c.Now
			c.Now = func() time.Time { return now().Add(-98*time.Second - maxAhead - time.Millisecond) }
		}, errAhead},
	} {
		fsys := newStoreFS(1)
		k := newStoreKit(t, fsys)
		all, _ := handedOver("x", k.clock, 3)
		test.limit(&k.cfg)
		s := k.open()
		id := "x"
		if name == "clusters" {
			id = "y"
		}
		old := point{"o", 0, k.cfg.Now().UnixMilli(), 1}
		k.push(s, id, old)
		seq, size := s.totals.Newest.Load(), s.Stats().Bytes
		for range 2 {
			if res, err := s.AppendAll(t.Context(), "x", all); !errors.Is(err, test.err) || res != (AppendResult{}) {
				t.Errorf("%s: %+v, %v", name, res, err)
			}
		}
		wantHeld(t, name, allHeld(t, s), pushed(id, old))
		if s.totals.Newest.Load() != seq || s.Stats().Bytes != size || s.Stats().Clusters[0].Series != 1 || len(s.Stats().Clusters) != 1 {
			t.Errorf("%s: something is left: %+v", name, s.Stats())
		}
		fsys.crash()
		wantHeld(t, name+", after a crash", allHeld(t, k.open()), pushed(id, old))
	}
}

// What another server's clock says is held by this one's: nothing is accepted later
// than now, so that no site looks alive when it is silent.
func TestAppendAllForeignClock(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	for _, at := range []int64{k.clock.ms(-600), MaxClockTime, math.MaxInt64} {
		all, _ := handedOver("x", k.clock, 2)
		all[1].Handed.Accepted = at
		all = append(all, Appending{&Push{}, &Handed{Accepted: at}})
		for range 2 {
			if _, err := s.AppendAll(t.Context(), "x", all); err != nil {
				t.Fatal(err)
			}
		}
		if got := s.Stats().Clusters[0].Accepted; got != k.clock.ms(0) {
			t.Errorf("accepted at %d is %d ahead", at, got-k.clock.ms(0))
		}
		k.clock.Add(time.Minute)
	}
	k.clock.Add(forgetAfter + time.Hour)
	s.maintain(t.Context(), false)
	if n := len(s.Stats().Clusters); n != 0 {
		t.Error("a silent site is known for ever")
	}
}

// A cluster is let go while pushes of it come: each push is held afterwards, or was
// seen before. Nothing is counted that is not there.
func TestReleaseWithPushes(t *testing.T) {
	for _, dir := range []string{"disk", ""} {
		k := newStoreKit(t, DiskFS{})
		if k.cfg.Dir = ""; dir != "" {
			k.cfg.Dir = t.TempDir()
		}
		s := k.open()
		const writers, pushes = 4, 150
		away := map[heldSample]float64{} // handed over and dropped
		released := 0
		// hand does what a handoff does, to nobody.
		hand := func() {
			for range 3 {
				var upTo uint64
				got := map[heldSample]float64{}
				if !s.Look("x", func(held *Cluster) {
					upTo = held.Seq
					for _, b := range held.Batches {
						for i, id := range b.IDs {
							got[heldSample{string(held.Table.Line(id)), b.Time(i)}] = b.V[i]
						}
					}
				}) {
					return
				}
				maps.Copy(away, got)
				done, err := s.Release(t.Context(), "x", upTo, s.Oldest())
				if err != nil {
					t.Error(err)
				}
				if done {
					released++
					return
				}
			}
		}
		var work, background sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		for w := range writers {
			work.Go(func() {
				for i := range pushes {
					p := point{"m", w, k.clock.ms(0) - int64(i), float64(i)}
					if res, err := s.Append(t.Context(), "x", storePush("x", p)); err != nil || res.Accepted != 1 {
						t.Errorf("%+v, %v", res, err)
					}
					for i%30 == 0 && s.Look("x", func(*Cluster) {}) { // or there is always another push
						runtime.Gosched()
					}
				}
			})
		}
		background.Go(func() {
			for ctx.Err() == nil {
				hand()
			}
		})
		background.Go(func() {
			for ctx.Err() == nil {
				s.maintain(ctx, true)
			}
		})
		work.Wait()
		cancel()
		background.Wait()
		maps.Copy(away, allHeld(t, s))
		if len(away) != writers*pushes {
			t.Errorf("%d samples of %d", len(away), writers*pushes)
		}
		hand()
		if n := len(s.Stats().Clusters); n != 0 || s.totals.Samples.Load() != 0 || s.Stats().Bytes != 0 || released < 2 {
			t.Errorf("released %d times; left: %d clusters, %d samples, %d bytes", released, n, s.totals.Samples.Load(), s.Stats().Bytes)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if s = k.open(); len(s.Stats().Clusters) != 0 {
			t.Error("what was released is back")
		}
		s.Close()
		if len(k.errors) > 0 {
			t.Error(k.errors)
		}
	}
}

// A crash, or a disk that fails, while a cluster is let go: it is there or not, and
// what another push brought meanwhile is there.
func TestReleaseCrashAnywhere(t *testing.T) {
	old, late := point{"m", 0, 1_700_000_000_000, 1}, point{"m", 0, 1_700_000_000_001, 2}
	for at, reached := 0, true; reached; at++ {
		for mode, f := range []fault{{Err: errDisk}, {Kill: true}, {Kill: true}} {
			fsys := newStoreFS(uint64(at)<<2 | uint64(mode))
			k := newStoreKit(t, fsys)
			s := k.open()
			k.push(s, "x", old)
			seq := s.totals.Newest.Load()
			reached = false
			seen := 0
			fsys.hook = func(int, string, string) fault {
				if seen++; seen-1 != at {
					return fault{}
				}
				reached = true
				return f
			}
			done, err := s.Release(t.Context(), "x", seq, s.Oldest())
			if done != (err == nil) {
				t.Errorf("operation %d, mode %d: %t, %v", at, mode, done, err)
			}
			_, pushErr := s.Append(t.Context(), "x", storePush("x", late))
			fsys.hook = nil
			if mode == 1 {
				fsys.restart()
			} else {
				fsys.crash()
			}
			s = k.open()
			got := allHeld(t, s)
			if _, ok := got[heldSample{string(storePush("x", late).Line(storePush("x", late).Samples[0])), late.t}]; pushErr == nil && !ok {
				t.Errorf("operation %d, mode %d: acknowledged and lost", at, mode)
			}
			if pushErr == nil && done && len(got) != 1 {
				t.Errorf("operation %d, mode %d: %v", at, mode, got)
			}
			if c := s.clusters["x"]; c != nil && c.held.Seq < seq {
				t.Errorf("operation %d, mode %d: sequence numbers begin again", at, mode)
			}
		}
	}
}

// Of a cluster a part is handed over, a consumer reads on after it, and the server ends:
// what it never had here is not taken for had.
func TestHandedDoesNotComeBack(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	at := k.clock.ms(0)
	k.push(s, "x", point{"m", 1, at, 1})
	var first uint64
	s.Look("x", func(held *Cluster) { first = held.Seq })
	k.push(s, "x", point{"m", 1, at + 1, 2})
	if done, err := s.Release(t.Context(), "x", first, s.Oldest()); done || err != nil {
		t.Fatal(done, err)
	}
	scrape := func() int {
		reading, _, err := s.Consumers.Begin(1, "p", "", "c", k.clock.Now())
		if err != nil {
			t.Fatal(err)
		}
		_, n, _ := (&Scraper{Store: s, MaxAge: -time.Second, Now: k.clock.Now}).Unread(reading, 0, false, nil)
		return n
	}
	if a, b := scrape(), scrape(); a != 1 || b != 0 {
		t.Fatalf("read %d, %d", a, b)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = k.open()
	defer s.Close()
	wantHeld(t, "after a restart", allHeld(t, s), pushed("x", point{"m", 1, at + 1, 2}))
}

// What was dropped, and came back before its log was rewritten, stands there twice. It
// is held once when the log is read again, as it came last, and can be handed over.
func TestDroppedComesBack(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	at := k.clock.ms(0)
	k.push(s, "x", point{"m", 1, at, 1}, point{"m", 2, at, 2})
	k.push(s, "x", point{"m", 1, at + 1, 3})
	var first uint64
	s.Look("x", func(held *Cluster) { first = held.Batches[0].Seq })
	s.clusters["x"].Drop(first, s.Oldest())
	k.push(s, "x", point{"m", 1, at, 1}, point{"m", 1, at + 2, 4})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = k.open()
	defer s.Close()
	want := pushed("x", point{"m", 1, at, 1}, point{"m", 2, at, 2}, point{"m", 1, at + 1, 3}, point{"m", 1, at + 2, 4})
	got := map[heldSample]float64{}
	n := 0
	var handed []byte
	s.Look("x", func(held *Cluster) {
		for _, b := range held.Batches {
			for i, id := range b.IDs {
				got[heldSample{string(held.Table.Line(id)), b.Time(i)}] = b.V[i]
				n++
			}
		}
		handed, _, _ = AppendBatches(nil, held, s.Oldest(), 1<<20, func(*Batch) []uint64 { return nil })
	})
	if !maps.Equal(got, want) || n != len(want) {
		t.Errorf("%d samples are held: %v, want %v", n, got, want)
	}
	if _, err := DecodeBatches(handed, "x"); err != nil {
		t.Errorf("handed over: %v", err)
	}
}

// What is evicted while a log is rewritten does not come back with the new one.
func TestRewriteMeetsEviction(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	var points []point
	for i := range 3 {
		points = append(points, point{"m", 1, k.clock.ms(100 - i), float64(i)})
		k.push(s, "a", points[i])
	}
	c := s.clusters["a"]
	evicted := int64(0)
	fsys.hook = func(_ int, op, _ string) fault {
		if op == "rename" {
			n, _ := c.Evict(k.clock.ms(0))
			evicted += n
		}
		return fault{}
	}
	if err := c.Take(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Rewrite(nil, s.Oldest()); err != nil || evicted != 1 {
		t.Fatalf("%v, %d evicted", err, evicted)
	}
	c.Free()
	wantHeld(t, "rewritten", allHeld(t, s), pushed("a", points[1:]...))
}

// Who waited for a cluster that was forgotten meanwhile leaves its next log alone.
func TestForgottenMeanwhile(t *testing.T) {
	for name, do := range map[string]func(s *Store) error{
		"maintain": func(s *Store) error { s.maintain(context.Background(), true); return nil },
		"release": func(s *Store) error {
			_, err := s.Release(context.Background(), "a", math.MaxUint64, s.Oldest())
			return err
		},
		"push": func(s *Store) error {
			p := storePush("a", point{"m", 2, s.cfg.Now().UnixMilli(), 2})
			_, err := s.Append(context.Background(), "a", p)
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
				c, err := s.acquire(t.Context(), "a")
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan error)
				go func() { done <- do(s) }()
				synctest.Wait() // it waits
				c.Expire(s.Oldest())
				if err := c.Remove(); err != nil {
					t.Fatal(err)
				}
				s.forget(c)
				k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
				c.Free()
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
