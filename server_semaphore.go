package main

// A semaphore bounds how many goroutines do one thing at a time: uploads in flight, pushes being
// decoded, forwarded pushes, questions to the --authorize URL.

import "context"

// semaphore has as many slots as its capacity. It is safe for concurrent use.
type semaphore chan struct{}

// newSemaphore returns a semaphore with slots free slots.
func newSemaphore(slots int) semaphore { return make(semaphore, slots) }

// TryAcquire takes a slot, and returns false if none is free.
func (s semaphore) TryAcquire() bool {
	select {
	case s <- struct{}{}:
		return true
	default:
		return false
	}
}

// Acquire waits for a slot and takes it. The error is that ctx has ended.
func (s semaphore) Acquire(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Release gives a slot back.
func (s semaphore) Release() { <-s }

// InUse returns the number of slots taken.
func (s semaphore) InUse() int { return len(s) }
