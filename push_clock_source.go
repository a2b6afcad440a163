package main

// How far the clock of a client's source is off, by the times that servers answer with, and by
// how much the times of a scrape are shifted for it. One server whose clock is wrong moves
// nothing while others are heard. Below one minute nothing is shifted. A shift stays until the
// error leaves it by more than half a minute. Pure: all times come in.

import (
	"slices"
	"sync"
	"time"
)

// Moment is an instant by the client's clocks, in ms. Boot counts since boot,
// and is comparable only where the boot ID is the same.
type Moment struct {
	Wall, Boot int64
	BootID     string
}

// Since returns the time from an earlier moment: by the boot-time clock, and by
// the wall clock only if the machine was booted in between (or its boot-time clock
// contradicts its ID, as in a container that was started again). It is never
// negative.
func (m Moment) Since(then Moment) time.Duration {
	ms := m.Wall - then.Wall
	if m.BootID == then.BootID && m.Boot >= then.Boot {
		ms = m.Boot - then.Boot
	}
	return time.Duration(max(0, ms)) * time.Millisecond
}

// IsValid reports whether clocks can show m.
func (m Moment) IsValid() bool {
	for _, b := range []byte(m.BootID) {
		if b <= ' ' || b > '~' {
			return false
		}
	}
	return min(m.Wall, m.Boot) >= 0 && max(m.Wall, m.Boot) <= MaxMoment && len(m.BootID) > 0 && len(m.BootID) <= MaxBootID
}

const (
	MaxMoment = 1 << 50 // ms; some 35,000 years
	MaxBootID = 64      // bytes

	maxServerClocks = 16
	sourceTrust     = 60_000  // ms; a source's clock that is less off is right
	shiftSlack      = 30_000  // ms; up to here a shift stays as it is
	maxServerTime   = 1 << 53 // ms; what is later is a mistake
)

// SourceClock follows the clocks of the servers that answered. It is safe for concurrent
// use.
type SourceClock struct {
	mu     sync.Mutex // guards the rest
	bootID string
	heard  []heardClock // least recently heard first
	shift  int64        // ms; the one in use
}

// heardClock is by how many ms a server's clock was ahead of the client's clocks when it
// was heard last.
type heardClock struct {
	name       string
	boot, wall int64
}

// NewSourceClock returns clocks of no server. shift is the one that was in use before.
func NewSourceClock(shift int64) *SourceClock { return &SourceClock{shift: shift} }

// Hear takes in what a server's clock showed, in ms, when its answer arrived.
func (c *SourceClock) Hear(name string, server int64, at Moment) {
	if server <= 0 || server > maxServerTime {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if at.BootID != c.bootID {
		c.bootID, c.heard = at.BootID, nil
	}
	c.heard = slices.DeleteFunc(c.heard, func(s heardClock) bool { return s.name == name })
	c.heard = append(c.heard, heardClock{name, server - at.Boot, server - at.Wall})
	c.heard = c.heard[max(0, len(c.heard)-maxServerClocks):]
}

// Error returns by how many ms the source's clock was behind when it showed source, and
// whether any server was heard. The median of the servers counts. The boot-time clock
// counts, as nobody sets it; the wall clock only if the machine was booted since.
func (c *SourceClock) Error(at Moment, source int64) (ms int64, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.error(at, source)
}

func (c *SourceClock) error(at Moment, source int64) (ms int64, known bool) {
	if len(c.heard) == 0 {
		return 0, false
	}
	errs := make([]int64, 0, maxServerClocks)
	for _, s := range c.heard {
		if at.BootID == c.bootID {
			errs = append(errs, s.boot+at.Boot-source)
		} else {
			errs = append(errs, s.wall+at.Wall-source)
		}
	}
	slices.Sort(errs)
	a, b := errs[(len(errs)-1)/2], errs[len(errs)/2]
	if max(a, -a) <= max(b, -b) {
		return a, true
	}
	return b, true
}

// Shift returns by how many ms the times of a scrape are to be shifted, and whether any
// server was heard. It is asked once for each scrape, in their order.
func (c *SourceClock) Shift(at Moment, source int64) (ms int64, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	off, known := c.error(at, source)
	if !known {
		return 0, false
	}
	if change := off - c.shift; c.shift == 0 || max(change, -change) > shiftSlack {
		if c.shift = off; max(off, -off) < sourceTrust {
			c.shift = 0
		}
	}
	return c.shift, true
}
