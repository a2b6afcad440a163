package main

// Tests of the semaphore that bounds how many requests a server handles at once: how TryAcquire,
// Acquire and Release use its slots.

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

// A semaphore has as many slots as its constructor was given. TryAcquire returns false if no slot
// is free. Acquire waits until a slot is free or its context ends.
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

// Goroutines that wait for a slot get it in the order in which they began to wait.
func TestSemaphoreOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSemaphore(1)
		s.TryAcquire()
		order := make(chan int, 10)
		for i := range cap(order) {
			go func() {
				s.Acquire(t.Context())
				order <- i
			}()
			synctest.Wait()
		}
		for want := range cap(order) {
			s.Release()
			if got := <-order; got != want {
				t.Errorf("goroutine %d got the slot, want %d", got, want)
			}
		}
	})
}
