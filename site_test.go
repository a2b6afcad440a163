package main

// site_test.go: several batches at once, as they are handed over, over a disk that
// fails and forgets and under every limit; and a cluster that is let go while pushes
// come.

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"testing"
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
