package main

// The server tunes Go's garbage collector, because nearly all of its memory is samples that live
// for hours. With Go's default, the process would use twice the memory of these samples. A smaller
// percentage costs little, because the samples have few pointers that the collector must follow.
// The environment variable GOGC of Go's runtime overrides the tuning.

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// The heap may grow beyond the live objects by spareHeap bytes, or by minGCPercent percent of
	// them if that is more. spareHeap keeps collections rare while the heap is small.
	spareHeap    = 24 << 20
	minGCPercent = 8
	maxGCPercent = 100 // Go's default

	tuneGCEvery = time.Second
)

// gcPercent returns the value for debug.SetGCPercent for a heap with liveBytes bytes of live
// objects.
func gcPercent(liveBytes uint64) int {
	return int(min(max(spareHeap*100/max(1, liveBytes), minGCPercent), maxGCPercent))
}

// tuneGC adapts the percentage of the garbage collector to the live objects until ctx ends. Then it
// restores the percentage of before. It first returns the memory to the operating system that the
// start of the server needed. If the environment variable GOGC is set, it changes nothing. It always
// returns nil.
func tuneGC(ctx context.Context) error {
	debug.FreeOSMemory()
	if os.Getenv("GOGC") != "" {
		<-ctx.Done()
		return nil
	}
	defer debug.SetGCPercent(debug.SetGCPercent(maxGCPercent))
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	percent := maxGCPercent
	for ok := true; ok; _, ok = Sleep(ctx, tuneGCEvery, nil) {
		metrics.Read(live)
		if next := gcPercent(live[0].Value.Uint64()); next != percent {
			percent = next
			debug.SetGCPercent(percent)
		}
	}
	return nil
}
