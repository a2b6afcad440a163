package main

// The server's wall clock. A step of it makes no sample expire until the new time has held for
// five minutes, because the step may be a mistake that somebody is about to correct. The
// monotonic clock, which cannot be set, tells a step from time that has passed. Pure: both
// clocks come in. This file must not know of samples.

import (
	"sync"
	"time"
)

const (
	stepTolerance = 10 * time.Second // smaller changes of the wall clock are not a step
	stepDoubtTime = 5 * time.Minute  // until the new time is accepted
	slewDivisor   = 1000             // slewing changes a clock by at most 1/slewDivisor of the time that passes
)

// TimeInterval is the range that the present time lies in. While a step of the wall clock is in doubt,
// one end is the time by the old setting of the clock and the other by the new one. Otherwise
// both ends are the wall clock's time.
type TimeInterval struct{ Earliest, Latest time.Time }

// IntervalAt returns the range of a clock that is not in doubt.
func IntervalAt(t time.Time) TimeInterval { return TimeInterval{Earliest: t, Latest: t} }

// WallClock compares this machine's wall clock with its monotonic one. It is safe for
// concurrent use.
type WallClock struct {
	wall      func() time.Time
	monotonic func() time.Duration
	onStep    func(WallClockStep)

	mu        sync.Mutex    // guards the rest
	trusted   time.Time     // the last time of the wall clock that was not in doubt
	trustedAt time.Duration // the monotonic clock at that time
	doubted   time.Duration // the size of the step in doubt; 0 if there is none
	doubtedAt time.Duration // the monotonic clock when that step was noticed
}

// WallClockStep is the beginning of a step of the wall clock, or one of its two ends.
type WallClockStep struct {
	Size     time.Duration // its size; negative if the clock was set back
	Reverted bool          // the end: the clock was set to the old time again
	Accepted bool          // the end: the new time has held and is used from here on
}

// NewWallClock returns a WallClock that starts from the present time of wall. monotonic returns
// the time since some fixed instant. onStep is called, without locks held, when a step begins
// or ends.
func NewWallClock(wall func() time.Time, monotonic func() time.Duration, onStep func(WallClockStep)) *WallClock {
	return &WallClock{wall: wall, monotonic: monotonic, onStep: onStep, trusted: wall().Round(0), trustedAt: monotonic()}
}

// NowInterval returns the range that the present time lies in. A step is noticed by the first call
// after it.
func (c *WallClock) NowInterval() TimeInterval {
	c.mu.Lock()
	wall, now := c.wall().Round(0), c.monotonic() // Round(0), so that Sub compares wall clocks
	expected := c.trusted.Add(now - c.trustedAt)
	step := c.observe(wall, expected, now)
	inDoubt := c.doubted != 0
	c.mu.Unlock()
	if step != (WallClockStep{}) {
		c.onStep(step)
	}
	switch {
	case !inDoubt:
		return IntervalAt(wall)
	case wall.Before(expected):
		return TimeInterval{Earliest: wall, Latest: expected}
	}
	return TimeInterval{Earliest: expected, Latest: wall}
}

// StepInDoubt returns the size of the step that is in doubt; 0 if there is none.
func (c *WallClock) StepInDoubt() time.Duration {
	c.NowInterval()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.doubted
}

// observe compares the wall clock with the time that is expected of it, and returns the step
// that begins or ends; the zero value if none does. The caller holds c.mu.
func (c *WallClock) observe(wall, expected time.Time, monotonic time.Duration) (step WallClockStep) {
	elapsed := monotonic - c.trustedAt
	diff := wall.Sub(expected)
	switch {
	case diff.Abs() <= stepTolerance+elapsed/slewDivisor:
		if c.doubted != 0 {
			step = WallClockStep{Size: c.doubted, Reverted: true}
		}
	case c.doubted == 0 || (diff-c.doubted).Abs() > stepTolerance:
		c.doubted, c.doubtedAt = diff, monotonic
		return WallClockStep{Size: diff}
	case monotonic-c.doubtedAt < stepDoubtTime:
		return WallClockStep{}
	default:
		step = WallClockStep{Size: c.doubted, Accepted: true}
	}
	c.doubted = 0
	if step == (WallClockStep{}) {
		// Only slewing is followed, so that many small steps add up to one that is noticed.
		diff = min(max(diff, -elapsed/slewDivisor), elapsed/slewDivisor)
	}
	c.trusted, c.trustedAt = expected.Add(diff), monotonic
	return step
}
