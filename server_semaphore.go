package main

// A semaphore bounds how many goroutines do one kind of work at a time: handling pushes, decoding
// pushes, forwarding pushes, answering scrapes, or asking the service at the --authorize URL.

import "context"

// semaphore is a counting semaphore; its capacity is the number of slots. Goroutines that wait get
// slots in the order in which they began to wait, because the senders of a channel do. It is safe
// for concurrent use.
type semaphore chan struct{}

func newSemaphore(slots int) semaphore { return make(semaphore, slots) }

// TryAcquire takes a slot and returns true, or returns false if no slot is free.
func (s semaphore) TryAcquire() bool {
	select {
	case s <- struct{}{}:
		return true
	default:
		return false
	}
}

// Acquire waits for a free slot and takes it. It returns ctx.Err() if ctx ends first. It uses ctx only
// if it has to wait.
func (s semaphore) Acquire(ctx context.Context) error {
	if s.TryAcquire() { // never before a goroutine that waits, because Release gives it the slot
		return nil
	}
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Release frees a slot that TryAcquire or Acquire took.
func (s semaphore) Release() { <-s }

// InUse returns the number of slots that are taken.
func (s semaphore) InUse() int { return len(s) }
