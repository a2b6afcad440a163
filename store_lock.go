package main

// A lock for one writer at a time, who waits for the disk. It is no sync.Mutex, because waiting
// for a slow disk has to end with the request that waits, or when the store is closed.

import (
	"context"
	"fmt"
)

// ioLock is held across I/O. Its one slot is full while it is held.
type ioLock chan struct{}

func newIOLock() ioLock { return make(ioLock, 1) }

// Lock waits for the lock. It returns ErrClosed when closing is closed first, and the error of
// ctx when that ends first. A lock that is free is taken in either case.
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

// TryLock takes the lock if it is free.
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
