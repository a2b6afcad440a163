package main

// ioLock is a lock that a writer holds while it waits for the disk, so that a site or a file has
// only one writer at a time. It is not a sync.Mutex, because waiting for the lock must end when the
// waiting request ends or the store is closed.

import (
	"context"
	"fmt"
)

// ioLock is a lock that may be held across I/O. It is a channel of capacity 1: locked while the
// channel is full.
type ioLock chan struct{}

func newIOLock() ioLock { return make(ioLock, 1) }

// Lock waits until it has the lock. It returns ErrClosed if the channel closing is closed first,
// and an error that wraps the error of ctx if ctx ends first. If the lock is free, Lock acquires it
// even if ctx has ended or the channel is closed.
func (l ioLock) Lock(ctx context.Context, closing <-chan struct{}) error {
	if l.TryLock() {
		return nil
	}
	select {
	case l <- struct{}{}:
		return nil
	case <-closing:
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("waiting for an earlier write: %w", ctx.Err())
	}
}

// TryLock acquires the lock if it is free, and reports whether it did.
func (l ioLock) TryLock() bool {
	select {
	case l <- struct{}{}:
		return true
	default:
		return false
	}
}

// Unlock releases the lock.
func (l ioLock) Unlock() { <-l }
