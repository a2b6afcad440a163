package main

import (
	"testing"
	"time"
)

// A step of the wall clock is noticed at once, is in doubt for five minutes, and is then accepted.
// If the clock is set to its old time again within the five minutes, the step is not accepted.
// Slewing and small changes are not steps, unless many small changes add up to one.
func TestWallClock(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	type step struct {
		pass, set   time.Duration      // time that passes, and how far the wall clock is then set ahead (back if negative)
		early, late time.Duration      // wanted ends of the range that NowInterval returns, as times since start
		change      WallClockStepEvent // wanted event; zero if none is reported
	}
	const hour, minute, second = time.Hour, time.Minute, time.Second
	for name, steps := range map[string][]step{
		"time passes": {{hour, 0, hour, hour, WallClockStepEvent{}}, {24 * hour, 0, 25 * hour, 25 * hour, WallClockStepEvent{}}},
		"slewed": {
			{hour, 3 * second, hour + 3*second, hour + 3*second, WallClockStepEvent{}},
			{hour, 3 * second, 2*hour + 6*second, 2*hour + 6*second, WallClockStepEvent{}},
			{4 * hour, 12 * second, 6*hour + 18*second, 6*hour + 18*second, WallClockStepEvent{}},
			{hour, -3 * second, 7*hour + 15*second, 7*hour + 15*second, WallClockStepEvent{}},
		},
		"many small steps": {
			{second, 8 * second, 9 * second, 9 * second, WallClockStepEvent{}},
			{second, 8 * second, 2*second + second/1000, 18 * second, WallClockStepEvent{Size: 16*second - second/1000}},
			{second, 8 * second, 3*second + second/1000, 27 * second, WallClockStepEvent{}},
		},
		"a step ahead, reverted after 45 seconds": {
			{minute, 3 * hour, minute, 3*hour + minute, WallClockStepEvent{Size: 3 * hour}},
			{45 * second, 0, 105 * second, 3*hour + 105*second, WallClockStepEvent{}},
			{0, -3 * hour, 105 * second, 105 * second, WallClockStepEvent{Size: 3 * hour, Reverted: true}},
			{10 * minute, 0, 705 * second, 705 * second, WallClockStepEvent{}},
		},
		"a step ahead, accepted": {
			{0, 3 * hour, 0, 3 * hour, WallClockStepEvent{Size: 3 * hour}},
			{4 * minute, second, 4 * minute, 3*hour + 4*minute + second, WallClockStepEvent{}},
			{minute, 0, 3*hour + 5*minute + second, 3*hour + 5*minute + second, WallClockStepEvent{Size: 3 * hour, Accepted: true}},
			{minute, 0, 3*hour + 6*minute + second, 3*hour + 6*minute + second, WallClockStepEvent{}},
		},
		"a step back, accepted": {
			{hour, -time.Minute, hour - minute, hour, WallClockStepEvent{Size: -minute}},
			{5 * minute, 0, hour + 4*minute, hour + 4*minute, WallClockStepEvent{Size: -minute, Accepted: true}},
		},
		"a second step begins a new doubt": {
			{0, 3 * hour, 0, 3 * hour, WallClockStepEvent{Size: 3 * hour}},
			{4 * minute, hour, 4 * minute, 4*hour + 4*minute, WallClockStepEvent{Size: 4 * hour}},
			{2 * minute, 0, 6 * minute, 4*hour + 6*minute, WallClockStepEvent{}},
			{3 * minute, 0, 4*hour + 9*minute, 4*hour + 9*minute, WallClockStepEvent{Size: 4 * hour, Accepted: true}},
		},
		"steps back and ahead, reverted": {
			{0, -hour, -hour, 0, WallClockStepEvent{Size: -hour}},
			{minute, 2 * hour, minute, hour + minute, WallClockStepEvent{Size: hour}},
			{minute, -hour, 2 * minute, 2 * minute, WallClockStepEvent{Size: hour, Reverted: true}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			wall, monotonic := start, time.Duration(0)
			var got WallClockStepEvent
			c := NewCheckedWallClock(func() time.Time { return wall }, func() time.Duration { return monotonic }, func(ch WallClockStepEvent) { got = ch })
			for i, s := range steps {
				got = WallClockStepEvent{}
				monotonic += s.pass
				wall = wall.Add(s.pass + s.set)
				span := c.NowInterval()
				if want := (PresentTimeRange{start.Add(s.early), start.Add(s.late)}); span != want || got != s.change {
					t.Errorf("row %d: got the range %v to %v and the event %+v, want %v to %v and %+v", i, span.Earliest.Sub(start), span.Latest.Sub(start), got, s.early, s.late, s.change)
				}
			}
		})
	}
}
