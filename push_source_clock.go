package main

// This file estimates how far the clock of a client's source is off, from the times that servers
// state in their answers. It also chooses by how many ms the times of a scrape are shifted to
// correct that error. The median of the servers is used, so that one server with a wrong clock has
// little effect if at least two others answer. An error below one minute starts no shift. A shift
// stays the same until the error differs from the shift by more than half a minute. Pure: no I/O,
// and callers pass all times.

import (
	"slices"
	"sync"
	"time"
)

const (
	MaxMoment = 1 << 50 // ms; highest valid reading of a clock in a Moment; about 35,000 years
	MaxBootID = 64      // most bytes of a boot ID

	MinClockShift = 60_000 // ms; a client shifts no timestamps for a smaller error of its source's clock

	maxServersObserved = 16      // a SourceClockTracker keeps this many servers: the servers that answered last
	maxServerTime      = 1 << 53 // ms; later times in answers of servers are ignored
	shiftTolerance     = 30_000  // ms; a shift stays the same while the error differs from it by at most this
)

// Moment is an instant by the client's two clocks, in ms. Wall is the wall clock. Boot counts since
// the machine booted, or since this process started (see BootClock); two Boot values can be
// compared only if their boot IDs are the same.
type Moment struct {
	Wall, Boot int64
	BootID     string
}

// Since returns the time that passed from an earlier moment, then, to m. It is never negative. The
// time is measured with the boot-time clock. It is measured with the wall clock only if the two
// boot IDs differ, or if the boot-time clock went back under the same boot ID, as in a restarted
// container.
func (m Moment) Since(then Moment) time.Duration {
	ms := m.Wall - then.Wall
	if m.BootID == then.BootID && m.Boot >= then.Boot {
		ms = m.Boot - then.Boot
	}
	return time.Duration(max(0, ms)) * time.Millisecond
}

// IsValid reports whether both clocks of m are between 0 and MaxMoment and its boot ID is
// well-formed.
func (m Moment) IsValid() bool {
	return min(m.Wall, m.Boot) >= 0 && max(m.Wall, m.Boot) <= MaxMoment && IsBootID(m.BootID)
}

// IsBootID reports whether s is a well-formed boot ID: 1 to MaxBootID visible ASCII characters.
func IsBootID(s string) bool {
	for _, b := range []byte(s) {
		if b <= ' ' || b > '~' {
			return false
		}
	}
	return len(s) > 0 && len(s) <= MaxBootID
}

// SourceClockTracker estimates by how much the clock of a source is off, from the times in the
// answers of servers. It is safe for concurrent use.
type SourceClockTracker struct {
	mu      sync.Mutex          // guards the fields below
	bootID  string              // ID of the boot in which all observations in servers were made
	servers []serverClockOffset // in the order of their last answers, newest last
	shift   int64               // ms; the shift that NextShift chose last, or the last shift of the previous process
}

// serverClockOffset has the ms by which a server's clock was ahead of the client's two clocks when
// the server last answered.
type serverClockOffset struct {
	name        string
	aheadOfBoot int64
	aheadOfWall int64
}

// NewSourceClockTracker returns a SourceClockTracker without observations. lastShiftMs is the last
// shift that the previous process of the client used, or 0 if unknown.
func NewSourceClockTracker(lastShiftMs int64) *SourceClockTracker {
	return &SourceClockTracker{shift: lastShiftMs}
}

// Observe records the time, in ms since the epoch, that a server stated in an answer, which arrived
// at the moment at. A time that is not positive or is above maxServerTime is ignored. Only the last
// maxServersObserved servers are kept. A new boot ID discards all earlier observations.
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

// Offset returns by how many ms the source's clock was behind the servers' clocks when the source's
// clock showed sourceMs. at is the same instant by the client's clocks. The result is the median
// over the observed servers; known is false if no server was observed. The servers' times at this
// instant are computed with the boot-time clock, because that clock cannot be set. The wall clock
// is used only if at has another boot ID than the observations.
func (c *SourceClockTracker) Offset(at Moment, sourceMs int64) (behindMs int64, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.offset(at, sourceMs)
}

// offset does the work of Offset. The caller must hold c.mu.
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
	// For an even number of servers, use the one of the two middle offsets that is nearer to 0.
	a, b := offsets[(len(offsets)-1)/2], offsets[len(offsets)/2]
	if max(a, -a) <= max(b, -b) {
		return a, true
	}
	return b, true
}

// NextShift returns the ms to add to the times of a scrape. known is false if no server was
// observed. While the error stays close to the previous shift, the result is the previous shift, so
// that the times of successive scrapes do not jump. Callers should therefore pass the scrapes in
// their order.
func (c *SourceClockTracker) NextShift(at Moment, sourceMs int64) (shiftMs int64, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	off, known := c.offset(at, sourceMs)
	if !known {
		return 0, false
	}
	if change := off - c.shift; c.shift == 0 || max(change, -change) > shiftTolerance {
		if c.shift = off; max(off, -off) < MinClockShift {
			c.shift = 0
		}
	}
	return c.shift, true
}
