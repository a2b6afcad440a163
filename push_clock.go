package main

// The server's wall clock. A step of it makes no sample expire until the new time has held for
// five minutes, because the step may be a mistake that somebody is about to correct. The
// monotonic clock, which cannot be set, tells a step from time that has passed. This file must
// not know of samples.

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

// SpanAt is the span of a clock that is not in doubt.
func SpanAt(t time.Time) Span { return Span{Early: t, Late: t} }

// WallClock compares this machine's wall clock with its monotonic one. It is safe for
// concurrent use.
type WallClock struct {
	wall      func() time.Time
	monotonic func() time.Duration
	onChange  func(WallClockStep)

	mu    sync.Mutex    // guards the rest
	trust time.Time     // the last time of the wall clock that was not in doubt
	at    time.Duration // the monotonic clock at that time
	step  time.Duration // the size of the step in doubt; 0: none
	since time.Duration // the monotonic clock when the step was noticed
}

// WallClockStep is the beginning of a step of the wall clock, or one of its two ends.
type WallClockStep struct {
	Step     time.Duration // its size; negative if the clock was set back
	Returned bool          // the clock was set to the old time again
	Believed bool          // the new time has held and is used from here on
}

// NewWallClock returns a Clock that starts from the present time of wall. monotonic returns the
// time since some fixed instant. onChange is called, without locks held, when a step begins
// or ends.
func NewWallClock(wall func() time.Time, monotonic func() time.Duration, onChange func(WallClockStep)) *WallClock {
	return &WallClock{wall: wall, monotonic: monotonic, onChange: onChange, trust: wall().Round(0), at: monotonic()}
}

// Span returns what the present time may be. A step is noticed at the next call.
func (c *WallClock) Span() Span {
	c.mu.Lock()
	span, change := c.observe(c.wall().Round(0), c.monotonic()) // Round: Sub has to compare wall clocks
	c.mu.Unlock()
	if change != (WallClockStep{}) {
		c.onChange(change)
	}
	return span
}

// StepInDoubt returns the size of the step that is in doubt; 0 if there is none.
func (c *WallClock) StepInDoubt() time.Duration {
	c.Span()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.step
}

// observe compares the two clocks. The caller holds c.mu.
func (c *WallClock) observe(wall time.Time, monotonic time.Duration) (Span, WallClockStep) {
	elapsed := monotonic - c.at
	expected := c.trust.Add(elapsed)
	diff := wall.Sub(expected)
	var change WallClockStep
	switch {
	case diff.Abs() <= stepSlack+elapsed/slewRate:
		if c.step != 0 {
			change = WallClockStep{Step: c.step, Returned: true}
		}
		c.step = 0
	case c.step == 0 || (diff-c.step).Abs() > stepSlack:
		change = WallClockStep{Step: diff}
		c.step, c.since = diff, monotonic
	case monotonic-c.since >= stepHold:
		change = WallClockStep{Step: c.step, Believed: true}
		c.step = 0
	}
	if c.step == 0 {
		// Many small steps are noticed as one: only slewing is followed.
		slewed := min(max(diff, -elapsed/slewRate), elapsed/slewRate)
		if change.Believed || change.Returned {
			slewed = diff
		}
		c.trust, c.at = expected.Add(slewed), monotonic
		return SpanAt(wall), change
	}
	if diff < 0 {
		return Span{Early: wall, Late: expected}, change
	}
	return Span{Early: expected, Late: wall}, change
}
