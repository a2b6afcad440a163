package main

// The state of each scrape in a spool, and what follows from it: whether to ask the server
// first, which scrapes make the next push, what an answer changes, and which scrapes go when a
// limit is met. A scrape leaves only when an answer says so or a limit asks for it. Pure: now
// is in ms of the boot-time clock.

import (
	"time"
)

const (
	elsewhereInterval = time.Second // between pushes of scrapes that a server held before
	declinedPause     = time.Minute // until a scrape that the server declined is sent again
	askInterval       = time.Minute // after an answer, until a server is asked though nothing is to be pushed
)

// DeliveryState is the place of a scrape among servers, as far as it is known.
type DeliveryState uint8

const (
	ScrapeUndelivered DeliveryState = iota // no server holds it
	ScrapeHeld                             // the server that answered last holds it
	ScrapeElsewhere                        // a server held it; the one that answered last does not
	numDeliveryStates
)

// String returns the state as metrics name it.
func (s DeliveryState) String() string {
	return [numDeliveryStates]string{"undelivered", "held", "elsewhere"}[s]
}

// DrainStep is what to do next.
type DrainStep uint8

const (
	StepDone DrainStep = iota // nothing now
	StepWait                  // nothing yet
	StepAsk                   // ask the server what it holds, by a push without scrapes
	StepPush                  // push what BeginPush returns
)

// PushLimits bound the scrapes of one push.
type PushLimits struct {
	Bytes, Text int64 // compressed, and not
	Scrapes     int
}

// SpoolAnswer is what a server answered to a push that named scrapes, or to a question.
type SpoolAnswer struct {
	Server       string
	KnowsSpools  bool   // if false, 200 is the end for the scrapes of the push
	Held, Read   Ranges // numbers that this server holds, and that every consumer has read
	DoneWhenHeld bool   // neither server nor site knows a consumer, so nobody will read
	Consumers    []ConsumerAge
}

// PushOutcome is what an answer means for the scrapes that were pushed.
type PushOutcome struct {
	Declined     Ranges // the server neither holds them nor lists them as read
	FirstDecline bool   // the push had one scrape, which was not declined alone before
}

// SpoolStats is what a spool holds.
type SpoolStats struct {
	Scrapes, InMemory int // InMemory: on no server, and on no disk
	Bytes             int64
	ByState           [numDeliveryStates]SpoolStateStats
}

// SpoolStateStats is what a spool holds in one state.
type SpoolStateStats struct {
	Scrapes   int
	Bytes     int64
	OldestAge time.Duration // 0 if there is none
}

// DeliveredScrapes returns how many scrapes servers hold, or held.
func (st *SpoolStats) DeliveredScrapes() int {
	return st.Scrapes - st.ByState[ScrapeUndelivered].Scrapes
}

// spoolEntry is a scrape in the spool. Its Gzip is nil unless the scrape is in memory; even then
// a file may exist, if writing it failed late.
type spoolEntry struct {
	Scrape
	gzipSize  int   // bytes
	footprint int64 // bytes of disk, or of memory
	inFlight  bool  // part of a push without an answer yet, and not to be dropped

	state     DeliveryState
	uncertain bool  // an attempt had no answer: the state is not known until the next answer
	heldSince int64 // ms; since when the server that answered last holds it
	retryAt   int64 // ms; it is not pushed before
	declined  bool  // a server declined it in a push of its own
}

func (e *spoolEntry) inMemory() bool   { return e.Gzip != nil }
func (e *spoolEntry) isInFlight() bool { return e.inFlight }

// certainStateOrUndelivered returns the state that can be relied on.
func (e *spoolEntry) certainStateOrUndelivered() DeliveryState {
	if e.uncertain {
		return ScrapeUndelivered
	}
	return e.state
}

// spoolIndex is the state of a spool without its files. It is not safe for concurrent use.
type spoolIndex struct {
	entries                []spoolEntry // by number
	diskBytes, memoryBytes int64        // the sums of the footprints
	server                 string       // the one that answered last
	failing                bool         // the last attempt failed
	lastRead               int64        // ms; when an answer last listed scrapes as read that were in the spool
	elsewhereAt            int64        // ms; no push of scrapes that are elsewhere before
	askAt                  int64        // ms; no question before, unless something is uncertain
}

// nextStep returns the step to take at nowMs, and for how long to wait first if that is StepWait.
// With nothing to push a server is asked now and then, since it may have lost scrapes that it
// held, or every consumer may have read them.
func (p *spoolIndex) nextStep(nowMs int64) (step DrainStep, wait time.Duration) {
	var undelivered, elsewhere, held bool
	for i := range p.entries {
		e := &p.entries[i]
		if e.uncertain {
			return StepAsk, 0
		}
		held = held || e.state != ScrapeUndelivered
		if nowMs >= e.retryAt {
			undelivered = undelivered || e.state == ScrapeUndelivered
			elsewhere = elsewhere || e.state == ScrapeElsewhere
		}
	}
	switch {
	case undelivered:
		return StepPush, 0
	case elsewhere && p.failing, held && !elsewhere && nowMs >= p.askAt:
		return StepAsk, 0
	case elsewhere && nowMs < p.elsewhereAt:
		return StepWait, time.Duration(p.elsewhereAt-nowMs) * time.Millisecond
	case elsewhere:
		return StepPush, 0
	}
	return StepDone, 0
}

// beginPush marks the scrapes of the next push as in flight, of those that allowed allows, and
// returns them. It picks scrapes that no server holds, oldest first; if there are none, scrapes
// that are elsewhere. Scrapes that a server declined come last and in pushes of their own, because
// they would hold up the rest.
func (p *spoolIndex) beginPush(now int64, l PushLimits, allowed func(*spoolEntry) bool) (picked []spoolEntry) {
	for _, declined := range []bool{false, true} {
		if picked = p.markInFlight(now, ScrapeUndelivered, declined, l, allowed); len(picked) > 0 {
			break
		}
		if p.failing || now < p.elsewhereAt {
			continue
		}
		if picked = p.markInFlight(now, ScrapeElsewhere, declined, l, allowed); len(picked) > 0 {
			p.elsewhereAt = now + elsewhereInterval.Milliseconds()
			break
		}
	}
	return picked
}

// markInFlight is beginPush for one kind of scrapes. It picks at least one, whatever the limits; the
// header that names them bounds the ranges of their numbers.
func (p *spoolIndex) markInFlight(now int64, state DeliveryState, declined bool, l PushLimits, allowed func(*spoolEntry) bool) (picked []spoolEntry) {
	var gzipBytes, textBytes int64
	ranges := 0
	for i := range p.entries {
		e := &p.entries[i]
		if e.uncertain || e.state != state || e.declined != declined || now < e.retryAt || !allowed(e) {
			continue
		}
		gzipBytes, textBytes = gzipBytes+int64(e.gzipSize), textBytes+int64(e.Size)
		if n := len(picked); n == 0 || picked[n-1].Number+1 != e.Number {
			ranges++
		}
		if len(picked) > 0 && (len(picked) >= l.Scrapes || gzipBytes > l.Bytes || textBytes > l.Text || ranges > MaxPushRanges) {
			break
		}
		e.inFlight = true
		picked = append(picked, *e)
	}
	return picked
}

// applyAnswer notes what a server answered to the push in flight, or to a question if there is
// none. It removes and returns the scrapes that are done.
func (p *spoolIndex) applyAnswer(now int64, a SpoolAnswer) (done []spoolEntry, out PushOutcome) {
	inFlight := 0
	for i := range p.entries {
		if p.entries[i].inFlight {
			inFlight++
		}
	}
	done = p.removeIf(func(e *spoolEntry) bool {
		return a.Read.Has(e.Number) || e.inFlight && (!a.KnowsSpools || a.DoneWhenHeld && a.Held.Has(e.Number))
	})
	if len(done) > 0 {
		p.lastRead = now
	}
	for i := range p.entries {
		e := &p.entries[i]
		switch {
		case a.Held.Has(e.Number):
			if e.state != ScrapeHeld || a.Server != p.server {
				e.heldSince = now
			}
			e.state, e.retryAt = ScrapeHeld, 0
		case e.inFlight:
			out.Declined = out.Declined.Add(e.Number, e.Number)
			if inFlight == 1 {
				e.retryAt = now + declinedPause.Milliseconds()
				out.FirstDecline, e.declined = !e.declined, true
			}
		case e.state == ScrapeHeld:
			e.state = ScrapeElsewhere
		}
		e.uncertain, e.inFlight = false, false
	}
	p.server, p.failing, p.askAt = a.Server, false, now+askInterval.Milliseconds()
	return done, out
}

// markPushFailed notes an attempt that failed. Unless knownNotStored, the server may have stored
// what was in flight.
func (p *spoolIndex) markPushFailed(knownNotStored bool) {
	p.failing = true
	for i := range p.entries {
		e := &p.entries[i]
		e.uncertain, e.inFlight = e.uncertain || e.inFlight && !knownNotStored, false
	}
}

// noReadProgressSince returns since when nothing was read of what the server that answered last
// holds; ok is false if it holds nothing.
func (p *spoolIndex) noReadProgressSince() (sinceMs int64, ok bool) {
	for i := range p.entries {
		if e := &p.entries[i]; e.certainStateOrUndelivered() == ScrapeHeld && (!ok || e.heldSince < sinceMs) {
			sinceMs, ok = e.heldSince, true
		}
	}
	return max(sinceMs, p.lastRead), ok
}

// drop removes the scrapes that match: first what a server holds or held, then the rest, each
// oldest first. Scrapes in flight stay, because a server may have them already.
func (p *spoolIndex) drop(match func(*spoolEntry) bool) (held, lost []spoolEntry) {
	held = p.removeIf(func(e *spoolEntry) bool {
		return !e.inFlight && e.certainStateOrUndelivered() != ScrapeUndelivered && match(e)
	})
	lost = p.removeIf(func(e *spoolEntry) bool {
		return !e.inFlight && e.certainStateOrUndelivered() == ScrapeUndelivered && match(e)
	})
	return held, lost
}

// removeIf removes the scrapes that match, and returns them. match is called in the order of
// numbers.
func (p *spoolIndex) removeIf(match func(*spoolEntry) bool) (removed []spoolEntry) {
	kept := p.entries[:0]
	for _, e := range p.entries {
		if match(&e) {
			p.addFootprint(&e, -1)
			removed = append(removed, e)
		} else {
			kept = append(kept, e)
		}
	}
	clear(p.entries[len(kept):])
	p.entries = kept
	return removed
}

// add adds the scrape of the highest number.
func (p *spoolIndex) add(e spoolEntry) {
	p.entries = append(p.entries, e)
	p.addFootprint(&e, 1)
}

// addFootprint adds an entry's footprint to the sums, or subtracts it if sign is -1.
func (p *spoolIndex) addFootprint(e *spoolEntry, sign int64) {
	if e.inMemory() {
		p.memoryBytes += sign * e.footprint
	} else {
		p.diskBytes += sign * e.footprint
	}
}

// replaceScrape replaces the content of the entry of e's number, if there is one, and keeps its
// state.
func (p *spoolIndex) replaceScrape(e *spoolEntry) {
	old := p.find(e.Number)
	if old == nil {
		return
	}
	p.addFootprint(old, -1)
	old.Scrape, old.gzipSize, old.footprint = e.Scrape, e.gzipSize, e.footprint
	p.addFootprint(old, 1)
}

// find returns the entry of a number, or nil.
func (p *spoolIndex) find(number uint64) *spoolEntry {
	for i := range p.entries {
		if p.entries[i].Number == number {
			return &p.entries[i]
		}
	}
	return nil
}

// releaseInFlightFrom marks scrapes of this number and above as not in flight, and keeps their
// state.
func (p *spoolIndex) releaseInFlightFrom(number uint64) {
	for i := range p.entries {
		e := &p.entries[i]
		e.inFlight = e.inFlight && e.Number < number
	}
}
