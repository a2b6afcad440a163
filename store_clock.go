package main

// The time that a store judges samples by. Invariant: a step of this machine's wall
// clock, which may be a mistake that somebody is about to correct, makes nothing expire
// until the new time has held for some minutes; the monotonic clock, which nobody sets,
// tells a step from time that has passed. This file must not know of samples.

import (
	"sync"
	"time"
)

const (
	stepSlack = 10 * time.Second // a wall clock that is slewed, or set by less, made no step
	stepHold  = 5 * time.Minute  // after that the new time is believed
)

// Span is the time that it may be: one instant, or, while a step of the wall clock is
// not believed yet, the earlier and the later of the time before and after the step.
type Span struct{ Early, Late time.Time }

// At is the span of a clock that nobody doubts.
func At(t time.Time) Span { return Span{Early: t, Late: t} }

// Clock compares this machine's wall clock with its monotonic one. It is safe for
// concurrent use.
type Clock struct {
	wall      func() time.Time
	monotonic func() time.Duration
	onChange  func(ClockChange)

	mu    sync.Mutex // guards the rest
	trust time.Time  // the wall clock's time when it was last believed, and
	at    time.Duration
	step  time.Duration // of the wall clock, which is not believed yet; 0: none
	since time.Duration // when that step was noticed, by the monotonic clock
}

// ClockChange is what Clock noticed.
type ClockChange struct {
	Step     time.Duration // by which the wall clock differs from the time that was believed
	Returned bool          // the wall clock is right again by the monotonic one
	Believed bool          // the new time has held, and counts from now on
}

// NewClock returns a Clock that trusts wall as it is now. monotonic returns the time since
// some instant. onChange is called without locks held when a step is noticed and when it
// ends.
func NewClock(wall func() time.Time, monotonic func() time.Duration, onChange func(ClockChange)) *Clock {
	return &Clock{wall: wall, monotonic: monotonic, onChange: onChange, trust: wall().Round(0), at: monotonic()}
}

// Span returns the time that it may be. Steps are noticed by this call, so it has to be
// made every now and then.
func (c *Clock) Span() Span {
	c.mu.Lock()
	span, change := c.observe(c.wall().Round(0), c.monotonic()) // Round: Sub has to compare wall clocks
	c.mu.Unlock()
	if change != (ClockChange{}) {
		c.onChange(change)
	}
	return span
}

// Step returns by how much the wall clock differs from the time that is believed; 0
// unless it made a step.
func (c *Clock) Step() time.Duration {
	c.Span()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.step
}

// observe compares the two clocks. c.mu is held.
func (c *Clock) observe(wall time.Time, monotonic time.Duration) (Span, ClockChange) {
	expected := c.trust.Add(monotonic - c.at)
	diff := wall.Sub(expected)
	var change ClockChange
	switch {
	case diff.Abs() <= stepSlack:
		if c.step != 0 {
			change = ClockChange{Step: c.step, Returned: true}
		}
		c.step = 0
	case c.step == 0 || (diff-c.step).Abs() > stepSlack:
		change = ClockChange{Step: diff}
		c.step, c.since = diff, monotonic
	case monotonic-c.since >= stepHold:
		change = ClockChange{Step: c.step, Believed: true}
		c.step = 0
	}
	if c.step == 0 {
		c.trust, c.at = wall, monotonic
		return At(wall), change
	}
	if diff < 0 {
		return Span{Early: wall, Late: expected}, change
	}
	return Span{Early: expected, Late: wall}, change
}
