package main

// This file has two helpers for waiting. Sleep is for loops that run periodically and end with a
// context. RetryRead repeats reads of files that fail temporarily.

import (
	"context"
	"errors"
	"io/fs"
	"time"
)

const (
	firstReadPause = 50 * time.Millisecond  // pause before the first retry; each later pause is twice the previous one
	lastReadPause  = 800 * time.Millisecond // pause before the last retry
)

// Sleep returns after d, when a value is received from wake, or when ctx ends. woken reports that a
// value was received. ctxAlive is false if Sleep returned because ctx ended. wake may be nil.
func Sleep(ctx context.Context, d time.Duration, wake <-chan struct{}) (woken, ctxAlive bool) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false, false
	case <-wake:
		return true, true
	case <-timer.C:
		return false, true
	}
}

// RetryRead calls read until it succeeds, and returns its result. If the first call and five
// retries fail, with pauses of about 1.5 s in total, RetryRead returns the last error. It retries
// because a read error may be temporary and does not prove that the file is damaged. fs.ErrNotExist
// is returned without a retry.
func RetryRead[T any](read func() (T, error)) (T, error) {
	for pause := firstReadPause; ; pause *= 2 {
		got, err := read()
		if err == nil || errors.Is(err, fs.ErrNotExist) || pause > lastReadPause {
			return got, err
		}
		time.Sleep(pause)
	}
}
