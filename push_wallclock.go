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

// PresentTimeRange is the range that the present time lies in. While a step of the wall clock is in
// doubt, one end is the time by the old setting of the clock and the other by the new one.
// Otherwise both ends are the wall clock's time.
type PresentTimeRange struct{ Earliest, Latest time.Time }

// ExactTimeRange returns the range of a clock that is not in doubt.
func ExactTimeRange(t time.Time) PresentTimeRange { return PresentTimeRange{Earliest: t, Latest: t} }

// CheckedWallClock compares this machine's wall clock with its monotonic one. It is safe for
// concurrent use.
type CheckedWallClock struct {
	wall      func() time.Time
	monotonic func() time.Duration
	onStep    func(WallClockStepEvent)

	mu        sync.Mutex    // guards the rest
	trusted   time.Time     // the last time of the wall clock that was not in doubt
	trustedAt time.Duration // the monotonic clock at that time
	doubted   time.Duration // the size of the step in doubt; 0 if there is none
	doubtedAt time.Duration // the monotonic clock when that step was noticed
}

// WallClockStepEvent is the beginning of a step of the wall clock, or one of its two ends.
type WallClockStepEvent struct {
	Size     time.Duration // its size; negative if the clock was set back
	Reverted bool          // the end: the clock was set to the old time again
	Accepted bool          // the end: the new time has held and is used from here on
}

// NewCheckedWallClock returns a CheckedWallClock that starts from the present time of wall.
// monotonic returns the time since some fixed instant. onStep is called, without locks held, when a
// step begins or ends.
func NewCheckedWallClock(wall func() time.Time, monotonic func() time.Duration, onStep func(WallClockStepEvent)) *CheckedWallClock {
	return &CheckedWallClock{wall: wall, monotonic: monotonic, onStep: onStep, trusted: wall().Round(0), trustedAt: monotonic()}
}

// NowInterval returns the range that the present time lies in. A step is noticed by the first call
// after it.
func (c *CheckedWallClock) NowInterval() PresentTimeRange {
	c.mu.Lock()
	wall, now := c.wall().Round(0), c.monotonic() // Round(0), so that Sub compares wall clocks
	expected := c.trusted.Add(now - c.trustedAt)
	step := c.observe(wall, expected, now)
	inDoubt := c.doubted != 0
	c.mu.Unlock()
	if step != (WallClockStepEvent{}) {
		c.onStep(step)
	}
	switch {
	case !inDoubt:
		return ExactTimeRange(wall)
	case wall.Before(expected):
		return PresentTimeRange{Earliest: wall, Latest: expected}
	}
	return PresentTimeRange{Earliest: expected, Latest: wall}
}

// StepInDoubt returns the size of the step that is in doubt; 0 if there is none.
func (c *CheckedWallClock) StepInDoubt() time.Duration {
	c.NowInterval()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.doubted
}

// observe compares the wall clock with the time that is expected of it, and returns the step
// that begins or ends; the zero value if none does. The caller holds c.mu.
func (c *CheckedWallClock) observe(wall, expected time.Time, monotonic time.Duration) (step WallClockStepEvent) {
	elapsed := monotonic - c.trustedAt
	diff := wall.Sub(expected)
	switch {
	case diff.Abs() <= stepTolerance+elapsed/slewDivisor:
		if c.doubted != 0 {
			step = WallClockStepEvent{Size: c.doubted, Reverted: true}
		}
	case c.doubted == 0 || (diff-c.doubted).Abs() > stepTolerance:
		c.doubted, c.doubtedAt = diff, monotonic
		return WallClockStepEvent{Size: diff}
	case monotonic-c.doubtedAt < stepDoubtTime:
		return WallClockStepEvent{}
	default:
		step = WallClockStepEvent{Size: c.doubted, Accepted: true}
	}
	c.doubted = 0
	if step == (WallClockStepEvent{}) {
		// Only slewing is followed, so that many small steps add up to one that is noticed.
		diff = min(max(diff, -elapsed/slewDivisor), elapsed/slewDivisor)
	}
	c.trusted, c.trustedAt = expected.Add(diff), monotonic
	return step
}
