package main

// The state of each scrape in a spool, and what follows from it: whether to ask the server
// first, which scrapes make the next push, what an answer changes, and which scrapes go when a
// limit is met. A scrape leaves only when an answer says so or a limit asks for it. Pure: now
// is in ms of the boot-time clock.

import (
	"time"
)

const (
	elsewherePause = time.Second // between pushes of scrapes that a server held before
	notTakenPause  = time.Minute // until a scrape that the server did not take is sent again
	askPause       = time.Minute // after an answer, until a server is asked though nothing is to be pushed
)

// SpoolState is what is known of where a scrape is.
type SpoolState uint8

const (
	ScrapeUndelivered SpoolState = iota // no server holds it
	ScrapeHeld                          // the server that answered last holds it
	ScrapeElsewhere                     // a server held it; the one that answered last does not
	spoolStates
)

// String returns the state as metrics name it.
func (s SpoolState) String() string {
	return [spoolStates]string{"undelivered", "held", "elsewhere"}[s]
}

// SpoolStep is what to do next.
type SpoolStep uint8

const (
	StepEnd  SpoolStep = iota // nothing now
	StepWait                  // nothing yet
	StepAsk                   // ask the server what it holds, by a push without scrapes
	StepPush                  // push what Next hands out
)

// PushLimits bound what Next hands out at a time. Headers bound the ranges of numbers.
type PushLimits struct {
	Bytes, Text int64 // compressed, and not
	Scrapes     int
}

// SpoolAnswer is what a server answered to a push that named scrapes, or to a question.
type SpoolAnswer struct {
	To         string // the server
	Known      bool   // it knows what a spool is; else 200 is the end for what was pushed
	Held, Read Ranges
	End        bool // nobody knows a consumer: 200 is the end for what was pushed
	Consumers  []ConsumerAge
}

// SpoolOutcome is what an answer means for the scrapes that were pushed.
type SpoolOutcome struct {
	NotTaken Ranges // the server neither holds them nor lists them as read
	Tell     bool   // this is news of the one scrape pushed
}

// SpoolStats is what a spool holds.
type SpoolStats struct {
	Scrapes, InMemory int // InMemory: on no server, and on no disk
	Bytes             int64
	By                [spoolStates]SpoolPart // by SpoolState
}

// SpoolPart is what a spool holds in one state.
type SpoolPart struct {
	Scrapes int
	Bytes   int64
	Oldest  time.Duration // age; 0 if there is none
}

// Unread returns how many scrapes servers hold, or held.
func (st *SpoolStats) Unread() int { return st.Scrapes - st.By[ScrapeUndelivered].Scrapes }

// spoolEntry is what is known of a scrape without reading it. Gzip is nil unless
// the scrape is in memory; a file may lie there even so, if writing it failed
// late.
type spoolEntry struct {
	Scrape
	packed int   // bytes of the gzip
	cost   int64 // bytes of disk, or of memory
	taken  bool  // handed out, and not to be dropped

	state    SpoolState
	unsure   bool  // an attempt had no answer: nothing is known until the next answer
	since    int64 // ms; since when the server that answered last holds it
	wait     int64 // ms; it is not handed out before
	notTaken bool  // a server did not take it, alone; told by SpoolOutcome.Tell
}

func (e *spoolEntry) inMemory() bool { return e.Gzip != nil }
func (e *spoolEntry) isTaken() bool  { return e.taken }

// known returns the state that can be relied on.
func (e *spoolEntry) known() SpoolState {
	if e.unsure {
		return ScrapeUndelivered
	}
	return e.state
}

// spoolPlan is the state of a spool without its files. It is not safe for concurrent use.
type spoolPlan struct {
	entries      []spoolEntry // by number
	disk, memory int64        // bytes, the sums of the costs
	to           string       // the server that answered last
	failing      bool         // the last attempt failed
	read         int64        // ms; when an answer last listed scrapes as read that were in the spool
	next         int64        // ms; no push of scrapes that are elsewhere before
	ask          int64        // ms; no question before, unless something is unsure
}

// step returns what to do at now, and for how long to wait first if that is StepWait. With
// nothing to push a server is asked now and then about what was held, since it may have
// lost it, or everybody may have read it.
func (p *spoolPlan) step(now int64) (SpoolStep, time.Duration) {
	var push, elsewhere, held bool
	for i := range p.entries {
		e := &p.entries[i]
		if e.unsure {
			return StepAsk, 0
		}
		held = held || e.state != ScrapeUndelivered
		if now >= e.wait {
			push = push || e.state == ScrapeUndelivered
			elsewhere = elsewhere || e.state == ScrapeElsewhere
		}
	}
	switch {
	case push:
		return StepPush, 0
	case elsewhere && p.failing, held && !elsewhere && now >= p.ask:
		return StepAsk, 0
	case elsewhere && now < p.next:
		return StepWait, time.Duration(p.next-now) * time.Millisecond
	case elsewhere:
		return StepPush, 0
	}
	return StepEnd, 0
}

// pick marks what makes the next push as handed out, and returns it: what no server holds,
// oldest first; if there is none, what is elsewhere; at last, and apart, what a server did
// not take when it was asked before, which would hold up the rest. may chooses what can be
// part of it.
func (p *spoolPlan) pick(now int64, l PushLimits, may func(*spoolEntry) bool) (picked []spoolEntry) {
	for _, notTaken := range []bool{false, true} {
		if picked = p.pickState(now, ScrapeUndelivered, notTaken, l, may); len(picked) > 0 {
			break
		}
		if p.failing || now < p.next {
			continue
		}
		if picked = p.pickState(now, ScrapeElsewhere, notTaken, l, may); len(picked) > 0 {
			p.next = now + elsewherePause.Milliseconds()
			break
		}
	}
	return picked
}

func (p *spoolPlan) pickState(now int64, state SpoolState, notTaken bool, l PushLimits, may func(*spoolEntry) bool) (picked []spoolEntry) {
	var packed, text int64
	ranges := 0
	for i := range p.entries {
		e := &p.entries[i]
		if e.unsure || e.state != state || e.notTaken != notTaken || now < e.wait || !may(e) {
			continue
		}
		packed, text = packed+int64(e.packed), text+int64(e.Size)
		if n := len(picked); n == 0 || picked[n-1].Number+1 != e.Number {
			ranges++
		}
		if len(picked) > 0 && (len(picked) >= l.Scrapes || packed > l.Bytes || text > l.Text || ranges > MaxPushRanges) {
			break
		}
		e.taken = true
		picked = append(picked, *e)
	}
	return picked
}

// answer takes in what a server said to the push of what is handed out, or to a question
// if nothing is. It takes out, and returns, what is done.
func (p *spoolPlan) answer(now int64, a SpoolAnswer) (gone []spoolEntry, out SpoolOutcome) {
	alone := 0
	for i := range p.entries {
		if p.entries[i].taken {
			alone++
		}
	}
	gone = p.take(func(e *spoolEntry) bool {
		return a.Read.Has(e.Number) || e.taken && (!a.Known || a.End && a.Held.Has(e.Number))
	})
	if len(gone) > 0 {
		p.read = now
	}
	for i := range p.entries {
		e := &p.entries[i]
		switch {
		case a.Held.Has(e.Number):
			if e.state != ScrapeHeld || a.To != p.to {
				e.since = now
			}
			e.state, e.wait = ScrapeHeld, 0
		case e.taken:
			out.NotTaken = out.NotTaken.Add(e.Number, e.Number)
			if alone == 1 {
				e.wait = now + notTakenPause.Milliseconds()
				out.Tell, e.notTaken = !e.notTaken, true
			}
		case e.state == ScrapeHeld:
			e.state = ScrapeElsewhere
		}
		e.unsure, e.taken = false, false
	}
	p.to, p.failing, p.ask = a.To, false, now+askPause.Milliseconds()
	return gone, out
}

// failed notes an attempt that failed. Unless the server refused it for now, the server may
// hold what was handed out, or not.
func (p *spoolPlan) failed(refused bool) {
	p.failing = true
	for i := range p.entries {
		e := &p.entries[i]
		e.unsure, e.taken = e.unsure || e.taken && !refused, false
	}
}

// heldSince returns since when nothing that the server that answered last holds was read; ok
// is false if it holds nothing.
func (p *spoolPlan) heldSince() (since int64, ok bool) {
	for i := range p.entries {
		if e := &p.entries[i]; e.known() == ScrapeHeld && (!ok || e.since < since) {
			since, ok = e.since, true
		}
	}
	return max(since, p.read), ok
}

// drop takes out what pick chooses: first what a server holds or held, then the rest, each
// oldest first. Scrapes that are handed out stay, because a server may have them already.
func (p *spoolPlan) drop(pick func(*spoolEntry) bool) (held, lost []spoolEntry) {
	held = p.take(func(e *spoolEntry) bool { return !e.taken && e.known() != ScrapeUndelivered && pick(e) })
	lost = p.take(func(e *spoolEntry) bool { return !e.taken && e.known() == ScrapeUndelivered && pick(e) })
	return held, lost
}

// take takes out what pick chooses, which is asked in order.
func (p *spoolPlan) take(pick func(*spoolEntry) bool) (gone []spoolEntry) {
	kept := p.entries[:0]
	for _, e := range p.entries {
		if pick(&e) {
			p.count(&e, -1)
			gone = append(gone, e)
		} else {
			kept = append(kept, e)
		}
	}
	clear(p.entries[len(kept):])
	p.entries = kept
	return gone
}

// add adds the entry of the highest number.
func (p *spoolPlan) add(e spoolEntry) {
	p.entries = append(p.entries, e)
	p.count(&e, 1)
}

// count adds an entry's cost to the sums, or takes it off.
func (p *spoolPlan) count(e *spoolEntry, sign int64) {
	if e.inMemory() {
		p.memory += sign * e.cost
	} else {
		p.disk += sign * e.cost
	}
}

// find returns the entry of a number, or nil.
func (p *spoolPlan) find(number uint64) *spoolEntry {
	for i := range p.entries {
		if p.entries[i].Number == number {
			return &p.entries[i]
		}
	}
	return nil
}

// release gives back what has this number, or a higher one: nothing is known anew of it.
func (p *spoolPlan) release(from uint64) {
	for i := range p.entries {
		e := &p.entries[i]
		e.taken = e.taken && e.Number < from
	}
}
