package main

// The percentage of the garbage collector is tested for heaps of all sizes, and in a server that
// starts and ends.

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"testing/synctest"
	"time"
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
	const before = 73
	start := debug.SetGCPercent(before)
	defer debug.SetGCPercent(start)
	current := func() int {
		percent := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(percent)
		return int(percent[0].Value.Uint64())
	}
	live := make([]byte, 256<<20)
	for _, gogc := range []string{"", "73"} {
		t.Setenv("GOGC", gogc)
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- tuneGC(ctx) }()
			time.Sleep(3 * tuneGCEvery)
			synctest.Wait()
			if got := current(); gogc == "" && got >= 20 || gogc != "" && got != before {
				t.Errorf("GOGC=%q: the percentage is %d", gogc, got)
			}
			cancel()
			if err := <-done; err != nil || current() != before {
				t.Errorf("GOGC=%q: tuneGC returned %v and left %d %%, want %d %%", gogc, err, current(), before)
			}
		})
	}
	runtime.KeepAlive(live)
}
