package main

// Tests of the replay window, which must accept each packet counter at most once.

import (
	"math/rand/v2"
	"testing"
)

// A replay window that starts after a random counter accepts a counter exactly if three conditions
// hold: the counter is above the start, it was not accepted before, and it is not more than
// windowSize below the highest accepted counter. The test compares the window with a set of all
// accepted counters.
func TestReplayWindow(t *testing.T) {
	seed := testSeed(t, 0)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		start := rng.Uint64N(1 << 40)
		if rng.IntN(10) == 0 {
			start = ^uint64(0) - rng.Uint64N(3000)
		}
		var w ReplayWindow
		w.StartAfter(start)
		seen, top := map[uint64]bool{}, start
		for range 2000 {
			count := top + rng.Uint64N(300) - 100
			switch rng.IntN(50) {
			case 0:
				count = top + rng.Uint64N(5000)
			case 1:
				count = rng.Uint64()
			case 2:
				count = start - rng.Uint64N(2000)
			}
			if count > start && count-start > 1<<62 { // no sender sends so many packets
				continue
			}
			want := count > start && !seen[count] && (count >= top || top-count <= windowSize)
			if got := w.Accept(count); got != want {
				t.Fatalf("window started at %d, highest counter %d: Accept(%d) is %v, want %v", start, top, count, got, want)
			}
			if want {
				seen[count] = true
				top = max(top, count)
			}
		}
	}
}
