package main

// This file watches the server's wall clock for steps. After a step, the server expires samples by
// the earlier of the old and the new time until the new time has lasted for five minutes, because
// the step may be a mistake that is soon corrected. The monotonic clock, which cannot be set,
// distinguishes a step from time that has passed. Pure: no I/O, and callers pass both clocks. This
// file must not know of samples.

import (
	"sync"
	"time"
)

const (
	stepTolerance = 10 * time.Second // a smaller difference between the wall clock and the expected time is not a step
	stepDoubtTime = 5 * time.Minute  // how long the new time must last before it is accepted
	slewDivisor   = 1000             // slewing is assumed to change a clock by at most 1/slewDivisor of the time that passes
)

// PresentTimeRange is a range that contains the present time. While a step of the wall clock is in
// doubt, one end is the time by the old setting of the clock and the other end is the time by the
// new setting. Otherwise both ends are the wall clock's time.
type PresentTimeRange struct{ Earliest, Latest time.Time }

// ExactTimeRange returns the range whose two ends are t, for a clock that is not in doubt.
func ExactTimeRange(t time.Time) PresentTimeRange { return PresentTimeRange{Earliest: t, Latest: t} }

// CheckedWallClock notices steps of this machine's wall clock, by comparing it with the monotonic
// clock. It is safe for concurrent use.
type CheckedWallClock struct {
	wall      func() time.Time
	monotonic func() time.Duration
	onStep    func(WallClockStepEvent)

	mu        sync.Mutex    // guards the fields below
	trusted   time.Time     // the expected time when the wall clock was last not in doubt; follows the wall clock as observe describes
	trustedAt time.Duration // the monotonic clock at the instant of trusted
	doubted   time.Duration // size of the step in doubt; 0 if there is none
	doubtedAt time.Duration // the monotonic clock when the step in doubt was noticed
}

// WallClockStepEvent reports that a step of the wall clock began, or that it ended in one of two
// ways. If another step follows while a step is in doubt, the first step has no event for its end.
type WallClockStepEvent struct {
	Size     time.Duration // difference between the new and the expected time; negative if the clock was set back
	Reverted bool          // the step ended because the clock was set to the old time again
	Accepted bool          // the step ended because the new time has lasted for stepDoubtTime; the new time is used from now on
}

// NewCheckedWallClock returns a CheckedWallClock that trusts the present time of wall. monotonic
// returns the time since some fixed instant. onStep is called without locks held when a step begins
// or ends.
func NewCheckedWallClock(wall func() time.Time, monotonic func() time.Duration, onStep func(WallClockStepEvent)) *CheckedWallClock {
	return &CheckedWallClock{wall: wall, monotonic: monotonic, onStep: onStep, trusted: wall().Round(0), trustedAt: monotonic()}
}

// NowInterval returns the range that contains the present time. A step is noticed by the first call
// after it.
func (c *CheckedWallClock) NowInterval() PresentTimeRange {
	c.mu.Lock()
	wall, now := c.wall().Round(0), c.monotonic() // Round(0) strips the monotonic reading, so that Sub compares wall clocks
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

// StepInDoubt returns the size of the step that is in doubt, or 0 if there is none.
func (c *CheckedWallClock) StepInDoubt() time.Duration {
	c.NowInterval()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.doubted
}

// observe compares the wall clock with the time that is expected from the monotonic clock. It
// returns the event if a step begins or ends, and the zero value otherwise. The caller must hold
// c.mu.
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
		// Let trusted follow the wall clock only as fast as slewing can change a clock. Many small
		// steps then add up to a difference that is noticed.
		diff = min(max(diff, -elapsed/slewDivisor), elapsed/slewDivisor)
	}
	c.trusted, c.trustedAt = expected.Add(diff), monotonic
	return step
}
