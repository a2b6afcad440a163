package main

// How far the clock of a cluster's source is from this server's, and by how much its
// samples are shifted for it. Invariants: under a minute nothing is shifted; a shift
// changes only by more than five seconds; a push that was slow moves nothing. Pure:
// all times come in. This file must not know of samples or stores.

import "slices"

const (
	clockWindow = 8      // measurements of which the least counts
	clockStep   = 30_000 // ms; more is a step of the source's clock, not drift
	clockTrust  = 60_000 // ms; up to here a clock that was never wrong is right
	clockChange = 5_000  // ms; up to here a shift stays as it is
)

// MaxClockTime bounds what a clock can say, in ms since the epoch: later is a mistake.
const MaxClockTime = 1 << 53

// Headers by which a push tells of the clock of what was scraped, all in ms but the
// last: the source's clock and the boot-time clock beside it at the newest scrape in
// the push, the scrape's age when the push was sent, and a name of the boot.
const (
	SourceClockHeader = "Telemeter-Source-Clock"
	BootClockHeader   = "Telemeter-Boot-Clock"
	ScrapeAgeHeader   = "Telemeter-Scrape-Age"
	BootIDHeader      = "Telemeter-Boot-Id"
)

// ScrapeClock is what a push tells of the newest scrape in it. All scrapes of one
// push are of one clock that made no step between them.
type ScrapeClock struct {
	Known  bool
	Offset int64  // ms: arrival less the scrape's age less the source's clock then
	Base   int64  // ms: the source's clock less the boot-time clock, both at the scrape
	Boot   uint64 // names the boot of which that is; 0 if not known
}

// NewScrapeClock makes one of the source's clock and the boot-time clock at the
// scrape, the boot's name, the scrape's age when the push was sent, and when its
// head arrived, all in ms. It reports false for what no clock can say.
func NewScrapeClock(source, bootTime int64, boot uint64, age, arrival int64) (ScrapeClock, bool) {
	for _, t := range []int64{source, bootTime, age} {
		if t < 0 || t > MaxClockTime {
			return ScrapeClock{}, false
		}
	}
	return ScrapeClock{Known: true, Offset: arrival - age - source, Base: source - bootTime, Boot: boot}, true
}

// Same reports whether the source's clock made no step between two scrapes: then
// equal timestamps are of one sample.
func (a ScrapeClock) Same(b ScrapeClock) bool {
	return a.Known && b.Known && a.Boot == b.Boot && near(a.Base, b.Base, clockStep)
}

func near(a, b, within int64) bool { return a-b <= within && b-a <= within }

// SourceClock follows the clock of one cluster's source. The zero value knows
// nothing. It is not safe for concurrent use.
type SourceClock struct {
	last    ScrapeClock
	offsets []int64 // the last clockWindow since the last step
	shift   int64   // ms; 0 until the clock was wrong, and never 0 again
}

// Observe takes in what a push tells, and returns by how many ms its samples are to
// be shifted. A push's way only adds to what it measures, so the least of the last
// measurements is the nearest. Whether the clock made a step is told by the boot-time
// clock beside it, which a slow push does not change; only when a reboot took that
// away must a jump of the measurement stand for it. Who tells nothing is not
// shifted, and nothing is learned of it.
func (c *SourceClock) Observe(s ScrapeClock) (shift int64) {
	if !s.Known {
		return 0
	}
	if len(c.offsets) > 0 && !s.Same(c.last) {
		rebooted := s.Boot == 0 || s.Boot != c.last.Boot
		if !rebooted || !near(s.Offset, slices.Min(c.offsets), clockStep) {
			c.offsets = nil
		}
	}
	c.last = s
	// A new slice: copies of c may be read meanwhile.
	c.offsets = append(slices.Clone(c.offsets[max(0, len(c.offsets)-clockWindow+1):]), s.Offset)
	least := slices.Min(c.offsets)
	switch {
	case c.shift == 0 && near(least, 0, clockTrust-1):
	case c.shift == 0 || !near(least, c.shift, clockChange):
		if c.shift = least; least == 0 {
			c.shift = 1 // a clock that was wrong stays under watch
		}
	}
	return c.shift
}

// Resume goes on after a restart from what the newest batch was stored with.
func (c *SourceClock) Resume(s ScrapeClock, shift int64) {
	if s.Known {
		*c = SourceClock{last: s, offsets: []int64{s.Offset}, shift: shift}
	}
}

// Learn is Resume of what another server followed. What is measured here is
// better, but a clock that was wrong there stays under watch.
func (c *SourceClock) Learn(s ScrapeClock, shift int64) {
	if len(c.offsets) == 0 || c.shift == 0 && shift != 0 {
		c.Resume(s, shift)
	}
}

// State returns what Resume goes on from.
func (c *SourceClock) State() (ScrapeClock, int64) {
	s := c.last
	if s.Known {
		s.Offset = slices.Min(c.offsets)
	}
	return s, c.shift
}

// Offset returns how far the source's clock is behind this server's, in ms, and
// whether that is known.
func (c *SourceClock) Offset() (ms int64, known bool) {
	if len(c.offsets) == 0 {
		return 0, false
	}
	return slices.Min(c.offsets), true
}
