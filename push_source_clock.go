package main

// How far the clock of a client's source is off, by the times that servers answer with, and by
// how much the times of a scrape are shifted for it. One server whose clock is wrong moves
// nothing while others answer. Below one minute nothing is shifted. A shift stays until the
// error leaves it by more than half a minute. Pure: all times come in.

import (
	"slices"
	"sync"
	"time"
)

const (
	MaxMoment = 1 << 50 // ms; some 35,000 years
	MaxBootID = 64      // bytes

	maxServersObserved = 16
	maxServerTime      = 1 << 53 // ms; a server that shows a later time is ignored
	minShift           = 60_000  // ms; a source's clock that is off by less is right
	shiftTolerance     = 30_000  // ms; a shift stays while the error is this close to it
)

// Moment is an instant by the client's clocks, in ms. Boot counts since the machine was booted;
// two of them can be compared only if their boot IDs are the same.
type Moment struct {
	Wall, Boot int64
	BootID     string
}

// Since returns the time that passed since an earlier moment; it is never negative. The
// boot-time clock counts. The wall clock counts only if the machine was booted in between, or
// if the boot-time clock went back under the same ID, as in a container that was restarted.
func (m Moment) Since(then Moment) time.Duration {
	ms := m.Wall - then.Wall
	if m.BootID == then.BootID && m.Boot >= then.Boot {
		ms = m.Boot - then.Boot
	}
	return time.Duration(max(0, ms)) * time.Millisecond
}

// IsValid reports whether clocks can show m.
func (m Moment) IsValid() bool {
	return min(m.Wall, m.Boot) >= 0 && max(m.Wall, m.Boot) <= MaxMoment && IsBootID(m.BootID)
}

// IsBootID reports whether s can name a boot: 1 to MaxBootID visible ASCII characters.
func IsBootID(s string) bool {
	for _, b := range []byte(s) {
		if b <= ' ' || b > '~' {
			return false
		}
	}
	return len(s) > 0 && len(s) <= MaxBootID
}

// SourceClockTracker tells by how much the clock of a source is off, from the times of the servers
// that answered. It is safe for concurrent use.
type SourceClockTracker struct {
	mu      sync.Mutex // guards the rest
	bootID  string
	servers []serverClockOffset // the newest last; all of the boot bootID
	shift   int64               // ms; the newest result of NextShift
}

// serverClockOffset is by how many ms a server's clock was ahead of the client's two clocks when
// the server answered last.
type serverClockOffset struct {
	name        string
	aheadOfBoot int64
	aheadOfWall int64
}

// NewSourceClockTracker returns a SourceClockTracker that has observed no server. lastShiftMs is
// the shift in use before, 0 if there was none.
func NewSourceClockTracker(lastShiftMs int64) *SourceClockTracker {
	return &SourceClockTracker{shift: lastShiftMs}
}

// Observe notes the time, in ms since the epoch, that a server stated in an answer, which
// arrived at the moment at. A time that no clock can show is ignored. The readings of the
// maxServersObserved servers that answered last are kept.
func (c *SourceClockTracker) Observe(server string, serverMs int64, at Moment) {
	if serverMs <= 0 || serverMs > maxServerTime {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if at.BootID != c.bootID {
		c.bootID, c.servers = at.BootID, nil
	}
	c.servers = slices.DeleteFunc(c.servers, func(r serverClockOffset) bool { return r.name == server })
	c.servers = append(c.servers, serverClockOffset{server, serverMs - at.Boot, serverMs - at.Wall})
	c.servers = c.servers[max(0, len(c.servers)-maxServersObserved):]
}

// Offset returns by how many ms the source's clock was behind when it showed sourceMs, by the
// median of the servers. known is false if no server was observed. The boot-time clock
// connects the two times, because nobody sets it; the wall clock does only if the machine was
// booted in between.
func (c *SourceClockTracker) Offset(at Moment, sourceMs int64) (behindMs int64, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.offset(at, sourceMs)
}

// offset is Offset for a caller that holds c.mu.
func (c *SourceClockTracker) offset(at Moment, sourceMs int64) (behindMs int64, known bool) {
	if len(c.servers) == 0 {
		return 0, false
	}
	offsets := make([]int64, 0, maxServersObserved)
	for _, r := range c.servers {
		serverTime := r.aheadOfBoot + at.Boot
		if at.BootID != c.bootID {
			serverTime = r.aheadOfWall + at.Wall
		}
		offsets = append(offsets, serverTime-sourceMs)
	}
	slices.Sort(offsets)
	// Of an even number of servers, the one of the middle two that is nearer to 0.
	a, b := offsets[(len(offsets)-1)/2], offsets[len(offsets)/2]
	if max(a, -a) <= max(b, -b) {
		return a, true
	}
	return b, true
}

// NextShift returns by how many ms the times of a scrape are to be shifted. known is false if no
// server was observed. A result depends on the one before: the caller asks once for each
// scrape, in their order.
func (c *SourceClockTracker) NextShift(at Moment, sourceMs int64) (shiftMs int64, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	off, known := c.offset(at, sourceMs)
	if !known {
		return 0, false
	}
	if change := off - c.shift; c.shift == 0 || max(change, -change) > shiftTolerance {
		if c.shift = off; max(off, -off) < minShift {
			c.shift = 0
		}
	}
	return c.shift, true
}
