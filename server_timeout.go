package main

// A lazyTimeout is a context with a timeout that costs almost nothing until someone waits for it.
// Most pushes find every lock and slot free, so that starting and stopping a timer for each push
// would be in vain.

import (
	"context"
	"sync"
	"time"
)

// lazyTimeout ends when its parent ends, when its deadline has passed, or when stop is called. It
// starts its timer when one of Deadline, Done and Err is first called. It is safe for concurrent use.
type lazyTimeout struct {
	context.Context // the parent
	deadline        time.Time

	start  sync.Once // guards the fields below, which stay nil if stop is called first
	timed  context.Context
	cancel context.CancelFunc
}

// newLazyTimeout returns a context that ends timeout from now. The caller must call stop when it no
// longer needs the context.
func newLazyTimeout(parent context.Context, timeout time.Duration) *lazyTimeout {
	return &lazyTimeout{Context: parent, deadline: time.Now().Add(timeout)}
}

// started returns the context with the timer. If stop was called before the timer started, it
// returns the parent.
func (c *lazyTimeout) started() context.Context {
	c.start.Do(func() { c.timed, c.cancel = context.WithDeadline(c.Context, c.deadline) })
	if c.timed == nil {
		return c.Context
	}
	return c.timed
}

func (c *lazyTimeout) Deadline() (time.Time, bool) { return c.started().Deadline() }
func (c *lazyTimeout) Done() <-chan struct{}       { return c.started().Done() }
func (c *lazyTimeout) Err() error                  { return c.started().Err() }

// stop ends the context if its timer has started. Otherwise the timer never starts, and the context
// ends with its parent.
func (c *lazyTimeout) stop() {
	if c.start.Do(func() {}); c.cancel != nil {
		c.cancel()
	}
}
