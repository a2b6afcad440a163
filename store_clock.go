package main

// The clock by which samples expire. Invariant: a step of the wall clock makes no sample
// expire until the new time has held for five minutes, because the step may be a mistake
// that somebody is about to correct. The monotonic clock, which cannot be set, tells a step
// from time that has passed. This file must not know of samples.

import (
	"sync"
	"time"
)

const (
	stepSlack = 10 * time.Second // smaller changes of the wall clock are not a step
	stepHold  = 5 * time.Minute  // until the new time is accepted
	slewRate  = 1000             // a clock that is slewed gains or loses at most this part of the time that passes
)

// Span is the range of what the present time may be. While a step of the wall clock is in
// doubt, one end is the time by the old setting of the clock and the other by the new one.
// Otherwise both ends are the wall clock's time.
type Span struct{ Early, Late time.Time }

// At is the span of a clock that is not in doubt.
func At(t time.Time) Span { return Span{Early: t, Late: t} }

// Clock compares this machine's wall clock with its monotonic one. It is safe for
// concurrent use.
type Clock struct {
	wall      func() time.Time
	monotonic func() time.Duration
	onChange  func(ClockChange)

	mu    sync.Mutex    // guards the rest
	trust time.Time     // the last time of the wall clock that was not in doubt
	at    time.Duration // the monotonic clock at that time
	step  time.Duration // the size of the step in doubt; 0: none
	since time.Duration // the monotonic clock when the step was noticed
}

// ClockChange is the beginning of a step of the wall clock, or one of its two ends.
type ClockChange struct {
	Step     time.Duration // its size; negative if the clock was set back
	Returned bool          // the clock was set to the old time again
	Believed bool          // the new time has held and is used from here on
}

// NewClock returns a Clock that starts from the present time of wall. monotonic returns the
// time since some fixed instant. onChange is called, without locks held, when a step begins
// or ends.
func NewClock(wall func() time.Time, monotonic func() time.Duration, onChange func(ClockChange)) *Clock {
	return &Clock{wall: wall, monotonic: monotonic, onChange: onChange, trust: wall().Round(0), at: monotonic()}
}

// Span returns what the present time may be. A step is noticed at the next call.
func (c *Clock) Span() Span {
	c.mu.Lock()
	span, change := c.observe(c.wall().Round(0), c.monotonic()) // Round: Sub has to compare wall clocks
	c.mu.Unlock()
	if change != (ClockChange{}) {
		c.onChange(change)
	}
	return span
}

// Step returns the size of the step that is in doubt; 0 if there is none.
func (c *Clock) Step() time.Duration {
	c.Span()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.step
}

// observe compares the two clocks. The caller holds c.mu.
func (c *Clock) observe(wall time.Time, monotonic time.Duration) (Span, ClockChange) {
	elapsed := monotonic - c.at
	expected := c.trust.Add(elapsed)
	diff := wall.Sub(expected)
	var change ClockChange
	switch {
	case diff.Abs() <= stepSlack+elapsed/slewRate:
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
		// Many small steps are noticed as one: only slewing is followed.
		slewed := min(max(diff, -elapsed/slewRate), elapsed/slewRate)
		if change.Believed || change.Returned {
			slewed = diff
		}
		c.trust, c.at = expected.Add(slewed), monotonic
		return At(wall), change
	}
	if diff < 0 {
		return Span{Early: wall, Late: expected}, change
	}
	return Span{Early: expected, Late: wall}, change
}
