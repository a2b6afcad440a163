package main

// The slots of a semaphore.

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

func TestSemaphore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSemaphore(2)
		if first, second, third := s.TryAcquire(), s.TryAcquire(), s.TryAcquire(); !first || !second || third || s.InUse() != 2 {
			t.Fatalf("%d slots are in use of 2", s.InUse())
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.Acquire(ended); !errors.Is(err, context.Canceled) || s.InUse() != 2 {
			t.Errorf("%v, and %d slots are in use", err, s.InUse())
		}
		acquired := make(chan error, 1)
		go func() { acquired <- s.Acquire(t.Context()) }()
		if synctest.Wait(); len(acquired) != 0 {
			t.Error("a slot was acquired when none was free")
		}
		s.Release()
		if err := <-acquired; err != nil || s.InUse() != 2 {
			t.Errorf("%v, and %d slots are in use", err, s.InUse())
		}
	})
}
