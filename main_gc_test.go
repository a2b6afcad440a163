package main

// The percentage of the garbage collector is tested for heaps of all sizes, and in a server that
// starts and ends.

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
)

// The spare part of the heap is 24 MiB, but at most as much as Go's default allows and at least the
// smallest percentage of the live objects.
func TestGCPercent(t *testing.T) {
	for live, want := range map[uint64]int{0: 100, 1: 100, 24 << 20: 100, 48 << 20: 50, 96 << 20: 25, 480 << 20: minGCPercent, 1 << 40: minGCPercent} {
		if got := gcPercent(live); got != want {
			t.Errorf("%d live bytes: got %d %%, want %d %%", live, got, want)
		}
	}
}

// tuneGC sets a lower percentage while much is live, and restores the percentage at its end. With
// GOGC in the environment it changes nothing.
func TestTuneGC(t *testing.T) {
	start := debug.SetGCPercent(100)
	defer debug.SetGCPercent(start)
	current := func() int {
		percent := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(percent)
		return int(percent[0].Value.Uint64())
	}
	live := make([]byte, 256<<20)
	for _, gogc := range []string{"", "100"} {
		t.Setenv("GOGC", gogc)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- tuneGC(ctx) }()
		if gogc == "" {
			eventually(t, "the percentage is low", func() bool { return current() < 20 })
		}
		cancel()
		if err := <-done; err != nil || current() != 100 {
			t.Errorf("GOGC=%q: tuneGC returned %v and left %d %%, want 100 %%", gogc, err, current())
		}
	}
	runtime.KeepAlive(live)
}
