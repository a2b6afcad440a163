package main

// This file logs when the client begins to shift the times of the source's samples, when the shift
// changes, and when it ends. SourceClockTracker chooses the shift. A clock that is off is a fault
// that only a person can mend, although the samples arrive with the right times.

import "time"

// loggedShift is the shift of the source's times that was logged last. ms is 0 if no shift was
// logged yet, or if the log says that times are not shifted any more.
type loggedShift struct {
	ms int64
	at time.Time // when a shift that is not 0 was logged last
}

// nextShift returns SourceClockTracker.NextShift, and logs a new shift, but at most once in
// failureLogInterval. It knows no shift if no spool was opened, because nothing is pushed then. The
// goroutine that scrapes and the goroutine that pushes may call it at the same time.
func (c *Client) nextShift(at Moment, sourceMs int64) (shiftMs int64, known bool) {
	if c.sourceClock == nil {
		return 0, false
	}
	shiftMs, known = c.sourceClock.NextShift(at, sourceMs)
	if !known {
		return shiftMs, known
	}
	now := c.cfg.Now()
	c.mu.Lock()
	logged := c.loggedShift
	isNew := shiftMs != logged.ms && (shiftMs == 0 || logged.at.IsZero() || now.Sub(logged.at) >= failureLogInterval)
	if isNew && shiftMs != 0 {
		c.loggedShift.at = now
	}
	if isNew {
		c.loggedShift.ms = shiftMs
	}
	c.mu.Unlock()
	switch {
	case isNew && shiftMs == 0:
		c.cfg.Log.Info("the source's clock agrees with the servers' clocks again; sample times are not shifted")
	case isNew:
		c.cfg.Log.Warn("the source's clock is off; sample times are shifted to the servers' clocks", "off", describeShift(shiftMs),
			"advice", "set the clock of the source's host, such as by NTP; if many sites log this, check the clocks of the servers")
	}
	return shiftMs, known
}

// describeShift describes the error of a clock whose times need a shift by ms: "10m0s behind" for
// example.
func describeShift(ms int64) string {
	side := " behind"
	if ms < 0 {
		ms, side = -ms, " ahead"
	}
	return (time.Duration(ms) * time.Millisecond).Round(time.Second).String() + side
}
