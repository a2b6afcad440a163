package main

// Waiting that ends with a context: for loops that do something now and then, and for reads
// that a disk may answer later.

import (
	"context"
	"errors"
	"io/fs"
	"time"
)

const (
	firstReadPause = 50 * time.Millisecond // between tries to read; it doubles
	lastReadPause  = 800 * time.Millisecond
)

// Sleep returns after d, or when wake receives, which may be nil. ctxAlive is false if ctx ended
// first; woken reports that wake received.
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

// RetryRead calls read until it returns no error, with pauses of about 1.5 s in all. A read
// error may pass, and says nothing about the content of a file. fs.ErrNotExist is returned
// at once.
func RetryRead[T any](read func() (T, error)) (T, error) {
	for pause := firstReadPause; ; pause *= 2 {
		got, err := read()
		if err == nil || errors.Is(err, fs.ErrNotExist) || pause > lastReadPause {
			return got, err
		}
		time.Sleep(pause)
	}
}
