package main

// How far the source's clock is off, by what servers answer, and by how much the times of
// a scrape are shifted for it. Invariants: one server whose clock is wrong moves nothing
// while others are heard; under a minute nothing is shifted; a shift stays until the error
// leaves it by more than half a minute. Pure: all times come in. This file must not know
// of requests or of the spool's files.

import (
	"bytes"
	"slices"
	"strconv"
	"sync"
)

const (
	maxServerClocks = 16
	sourceTrust     = 60_000  // ms; a source's clock that is less off is right
	shiftSlack      = 30_000  // ms; up to here a shift stays as it is
	maxServerTime   = 1 << 53 // ms; what is later is a mistake
)

// ServerClocks follows the clocks of the servers that answered. It is safe for concurrent
// use.
type ServerClocks struct {
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

// NewServerClocks returns clocks of no server. shift is the one that was in use before.
func NewServerClocks(shift int64) *ServerClocks { return &ServerClocks{shift: shift} }

// Hear takes in what a server's clock showed, in ms, when its answer arrived.
func (c *ServerClocks) Hear(name string, server int64, at Moment) {
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
func (c *ServerClocks) Error(at Moment, source int64) (ms int64, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.error(at, source)
}

func (c *ServerClocks) error(at Moment, source int64) (ms int64, known bool) {
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
func (c *ServerClocks) Shift(at Moment, source int64) (ms int64, known bool) {
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

// shiftText returns text exposition as Client.Text renders it with all times shifted. A line
// without a time stays as it is.
func shiftText(text []byte, ms int64) []byte {
	out := make([]byte, 0, len(text)+len(text)/16)
	for line := range bytes.Lines(text) {
		end := bytes.LastIndexByte(line, ' ')
		value := bytes.LastIndexByte(line[:max(0, end)], ' ')
		if value >= 0 {
			t, err := strconv.ParseInt(string(bytes.TrimSuffix(line[end+1:], []byte("\n"))), 10, 64)
			// Else the blank before is in a label's value.
			if _, bad := strconv.ParseFloat(string(line[value+1:end]), 64); err == nil && bad == nil {
				out = append(strconv.AppendInt(append(out, line[:end+1]...), t+ms, 10), '\n')
				continue
			}
		}
		out = append(out, line...)
	}
	return out
}
