package main

// The slots of a semaphore.

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

// A semaphore has as many slots as it was made with. TryAcquire fails when none is free, and
// Acquire waits for a free slot or the end of its context.
func TestSemaphore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSemaphore(2)
		if first, second, third := s.TryAcquire(), s.TryAcquire(), s.TryAcquire(); !first || !second || third || s.InUse() != 2 {
			t.Fatalf("TryAcquire returned %t, %t, %t; %d slots are in use", first, second, third, s.InUse())
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.Acquire(ended); !errors.Is(err, context.Canceled) || s.InUse() != 2 {
			t.Errorf("Acquire with an ended context: %v; %d slots are in use", err, s.InUse())
		}
		acquired := make(chan error, 1)
		go func() { acquired <- s.Acquire(t.Context()) }()
		if synctest.Wait(); len(acquired) != 0 {
			t.Error("Acquire returned although no slot was free")
		}
		s.Release()
		if err := <-acquired; err != nil || s.InUse() != 2 {
			t.Errorf("Acquire after a Release: %v; %d slots are in use", err, s.InUse())
		}
	})
}
