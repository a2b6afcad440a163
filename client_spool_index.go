package main

// The index has the delivery state of each scrape in a spool. It decides whether to ask a server
// which scrapes the server holds, which scrapes make up the next push, what an answer changes, and
// which scrapes are dropped when a limit is reached. A scrape leaves the index only because of an
// answer, a limit, or a damaged or missing file. Pure: no I/O, and callers pass the time, in ms of
// the boot-time clock.

import (
	"time"
)

const (
	elsewhereInterval = time.Second // least time between pushes of scrapes in state ScrapeElsewhere
	declinedPause     = time.Minute // how long a scrape that was declined in a push of its own is not pushed again, unless ClearRetryPause is called
	askInterval       = time.Minute // least time between an answer and the next question, if nothing is to be pushed and no delivery state is uncertain
)

// DeliveryState states whether a server holds a scrape, as far as the client knows.
type DeliveryState uint8

const (
	ScrapeUndelivered DeliveryState = iota // no server holds the scrape
	ScrapeHeld                             // the server that answered last holds the scrape
	ScrapeElsewhere                        // a server held the scrape, but the server that answered last does not
	numDeliveryStates
)

// String returns the state as a value of the label state in metrics.
func (s DeliveryState) String() string {
	return [numDeliveryStates]string{"undelivered", "held", "elsewhere"}[s]
}

// DrainStep is what DrainSpool does next.
type DrainStep uint8

const (
	StepDone DrainStep = iota // nothing to do now
	StepWait                  // wait, then ask for the next step again
	StepAsk                   // ask the server which scrapes it holds, by a push without scrapes
	StepPush                  // push the scrapes that BeginPush returns
)

// PushLimits are the most bytes and scrapes that a push may have. A push has at least one scrape,
// even if that scrape exceeds the limits.
type PushLimits struct {
	Bytes, Text int64 // bytes of the compressed texts, and of the uncompressed texts
	Scrapes     int
}

// SpoolAnswer is a server's answer to a push that names scrapes, or to a question. A question is a
// push without scrapes, which asks the server which scrapes it holds.
type SpoolAnswer struct {
	Server       string        // URL of the server
	KnowsSpools  bool          // if false, the answer lists neither held nor read scrapes, and the spool removes the scrapes of a push that the server accepted
	Held, Read   Ranges        // numbers of the scrapes that this server holds, and of the scrapes that every consumer has read
	DoneWhenHeld bool          // neither the server nor the site knows a consumer, so the spool removes scrapes of the push that are in Held
	Consumers    []ConsumerAge // the consumers that the server knows
}

// PushOutcome is what an answer means for the scrapes of the push.
type PushOutcome struct {
	Declined     Ranges // scrapes that the server neither holds nor lists as read
	FirstDecline bool   // the push had a single scrape, and no push of this scrape alone was declined before
}

// SpoolStats describes the scrapes in a spool.
type SpoolStats struct {
	Scrapes, InMemory int   // InMemory counts scrapes that a crash may lose: they are in memory, and no server is known to hold them or to have held them
	Bytes             int64 // on disk and in memory
	ByState           [numDeliveryStates]SpoolStateStats
}

// SpoolStateStats describes the scrapes of one delivery state.
type SpoolStateStats struct {
	Scrapes   int
	Bytes     int64
	OldestAge time.Duration // age of the oldest scrape; 0 if there is no scrape
}

// DeliveredScrapes returns the number of scrapes that a server is known to hold or to have held.
func (st *SpoolStats) DeliveredScrapes() int {
	return st.Scrapes - st.ByState[ScrapeUndelivered].Scrapes
}

// spoolEntry is a scrape in the spool. Gzip is nil unless the scrape is in memory. A scrape in
// memory may have a file too, in two cases. If the directory could not be synced, a power failure
// may remove the file. If the times were corrected in memory only, the file has uncorrected times.
type spoolEntry struct {
	Scrape
	gzipSize  int   // bytes of the compressed text
	footprint int64 // bytes that the scrape occupies on disk, or in memory if it is in memory
	inFlight  bool  // part of a push that has no answer yet; must not be dropped

	state     DeliveryState
	uncertain bool  // the scrape was read from disk at start, or an attempt had no answer; the state is unknown until the next answer
	heldSince int64 // ms; since when the server that answered last is known to hold the scrape
	retryAt   int64 // ms; the scrape is not pushed before this time
	declined  bool  // a server declined the scrape in a push that had no other scrape
}

func (e *spoolEntry) inMemory() bool   { return e.Gzip != nil }
func (e *spoolEntry) isInFlight() bool { return e.inFlight }

// certainStateOrUndelivered returns the state, or ScrapeUndelivered if the state is uncertain.
func (e *spoolEntry) certainStateOrUndelivered() DeliveryState {
	if e.uncertain {
		return ScrapeUndelivered
	}
	return e.state
}

// spoolIndex is the state of a spool without its files. It is not safe for concurrent use.
type spoolIndex struct {
	entries                []spoolEntry // in ascending order of their numbers
	diskBytes, memoryBytes int64        // sums of the footprints on disk and in memory
	server                 string       // URL of the server that answered last
	failing                bool         // the last attempt failed, be it a push, a question or the exchange of tokens
	lastRemoved            int64        // ms; when an answer last removed scrapes from the spool, whether or not consumers had read them
	elsewhereAt            int64        // ms; scrapes in state ScrapeElsewhere are not pushed before this time
	askAt                  int64        // ms; while the delivery state of all scrapes is certain and nothing is to be pushed, no server is asked before this time which scrapes it holds
}

// nextStep returns the step to take at nowMs. If that step is StepWait, wait is how long to wait.
// If nothing is to be pushed but a server holds or held scrapes, the step is still StepAsk every
// askInterval, because the server may have lost scrapes, or every consumer may have read them.
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

// beginPush marks the scrapes of the next push as in flight and returns them. It picks only scrapes
// for which allowed returns true. It picks scrapes that no server holds, oldest first. If there are
// none, it picks scrapes in state ScrapeElsewhere, unless the last attempt failed or a push of such
// scrapes began less than elsewhereInterval ago. Scrapes that a server declined in a push of their
// own come last and in separate pushes, because they would hold up the others.
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

// markInFlight does the work of beginPush for the scrapes in one state. It picks only scrapes whose
// field declined has the given value. If any scrape qualifies, it picks at least one, even if that
// scrape exceeds the limits. MaxPushRanges limits the ranges of scrape numbers, because the header
// of a push names the scrapes.
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

// applyAnswer applies a server's answer to the push in flight, or to a question if no push is in
// flight. It removes and returns the scrapes that are done. A scrape is done if every consumer has
// read it. A scrape in flight is also done if no consumer is known and the server holds it, or if
// the server does not know spools.
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
		p.lastRemoved = now
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

// markPushFailed records a failed attempt. If knownNotStored is false, the server may have stored
// the scrapes in flight, so their state becomes uncertain.
func (p *spoolIndex) markPushFailed(knownNotStored bool) {
	p.failing = true
	for i := range p.entries {
		e := &p.entries[i]
		e.uncertain, e.inFlight = e.uncertain || e.inFlight && !knownNotStored, false
	}
}

// noReadProgressSince returns the time, in ms, since which the last answering server has held
// scrapes while no answer removed a scrape. ok is false if that server holds no scrape.
func (p *spoolIndex) noReadProgressSince() (sinceMs int64, ok bool) {
	for i := range p.entries {
		if e := &p.entries[i]; e.certainStateOrUndelivered() == ScrapeHeld && (!ok || e.heldSince < sinceMs) {
			sinceMs, ok = e.heldSince, true
		}
	}
	return max(sinceMs, p.lastRemoved), ok
}

// drop removes the scrapes that match: first the scrapes that a server holds or held, then the
// others, both oldest first. It keeps scrapes in flight, because a server may already have stored
// them.
func (p *spoolIndex) drop(match func(*spoolEntry) bool) (held, lost []spoolEntry) {
	held = p.removeIf(func(e *spoolEntry) bool {
		return !e.inFlight && e.certainStateOrUndelivered() != ScrapeUndelivered && match(e)
	})
	lost = p.removeIf(func(e *spoolEntry) bool {
		return !e.inFlight && e.certainStateOrUndelivered() == ScrapeUndelivered && match(e)
	})
	return held, lost
}

// removeIf removes the scrapes that match and returns them. It calls match once for each scrape, in
// ascending order of the numbers.
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

// add adds a scrape, whose number must be higher than the numbers of all scrapes in the index.
func (p *spoolIndex) add(e spoolEntry) {
	p.entries = append(p.entries, e)
	p.addFootprint(&e, 1)
}

// addFootprint adds an entry's footprint to the sums if sign is 1, or subtracts it if sign is -1.
func (p *spoolIndex) addFootprint(e *spoolEntry, sign int64) {
	if e.inMemory() {
		p.memoryBytes += sign * e.footprint
	} else {
		p.diskBytes += sign * e.footprint
	}
}

// replaceScrape replaces the scrape that has the number of e with the scrape of e, and keeps its
// delivery state. It does nothing if there is no such scrape.
func (p *spoolIndex) replaceScrape(e *spoolEntry) {
	old := p.find(e.Number)
	if old == nil {
		return
	}
	p.addFootprint(old, -1)
	old.Scrape, old.gzipSize, old.footprint = e.Scrape, e.gzipSize, e.footprint
	p.addFootprint(old, 1)
}

// find returns the entry with this number, or nil.
func (p *spoolIndex) find(number uint64) *spoolEntry {
	for i := range p.entries {
		if p.entries[i].Number == number {
			return &p.entries[i]
		}
	}
	return nil
}

// releaseInFlightFrom marks the scrapes with this number or a higher number as not in flight. Their
// delivery state does not change.
func (p *spoolIndex) releaseInFlightFrom(number uint64) {
	for i := range p.entries {
		e := &p.entries[i]
		e.inFlight = e.inFlight && e.Number < number
	}
}
