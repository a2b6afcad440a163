package main

// The sites of the delivery model. Each site has a simulated spool directory, and pushes with the
// real client's spool index and choice of server. The checks: a site pushes no scrape while it must
// first ask whether a server holds the scrape. Apart from faults of the disk, a scrape leaves the
// spool only if an answer of a server or a limit of the spool allows it.

import (
	"fmt"
	"slices"
	"time"
)

// modelScrape is one scrape that a site's client made of its source (the site's Prometheus), and
// what became of the scrape.
type modelScrape struct {
	number  uint64
	at      int64
	samples []int // IDs of the scrape's samples
	gone    bool  // the scrape has left the site's spool
	excused bool  // the scrape need not be delivered, because the site's disk lost it or a limit of the spool dropped it
}

// modelSite is a site with its client.
type modelSite struct {
	at              int // number of the site
	name            string
	ring            uint64    // key of the site (SiteKey), from which the ring computes the site's owner
	lines           [2][]byte // rendered lines of the site's two series
	plan            spoolIndex
	meta, savedMeta spoolMeta     // metadata of the spool: in memory, and as saved on disk
	next            uint64        // number of the site's next scrape
	once            bool          // the client runs with --once, so that it restarts before each scrape
	limit           int           // maximum number of scrapes in the spool
	age             time.Duration // maximum age of a scrape in the spool
	boot            int64         // right time in ms (deliveryModel.now) of the last boot of the site's machine
	bootID          string
	scrapes         map[uint64]*modelScrape // by number: all scrapes that were made under the present spool ID
	last            *modelScrape            // newest scrape of the source
	lo              [modelConsumers]int64
	servers         serverFailover
	size            pushScrapeLimit
	failing         bool // the last request of the site got no answer

	uncertain map[uint64]bool // scrapes that a server may hold: their push got no answer, or a restart found them on disk, and no answer has come since
	listed    Ranges          // numbers of the scrapes that the last answer listed as held or read
	elsewhere int64           // ms; time of the last push with a scrape in state ScrapeElsewhere (a server held it, but not the server that answered last)

	copy *modelSpoolCopy // earlier copy of the spool; nil: there is no copy
}

// modelSpoolCopy is a copy of a spool's directory.
type modelSpoolCopy struct {
	entries []spoolEntry
	saved   spoolMeta
	lo      [modelConsumers]int64
}

// moment returns the present time on the site's wall clock and boot clock.
func (m *deliveryModel) moment(c *modelSite) Moment {
	return Moment{Wall: m.now, Boot: m.now - c.boot, BootID: c.bootID}
}

// newSpool gives a site an empty spool with a new ID.
func (m *deliveryModel) newSpool(c *modelSite) {
	c.plan, c.meta = spoolIndex{}, spoolMeta{ID: m.rng.Uint64() | 1, At: m.moment(c)}
	c.savedMeta, c.next, c.lo = c.meta, 1, [modelConsumers]int64{}
	c.scrapes, c.uncertain, c.listed, c.last = map[uint64]*modelScrape{}, map[uint64]bool{}, nil, nil
	c.copy = nil
	m.number(c)
}

// number sets the number of the site's next scrape, as a client does when it opens its spool.
func (m *deliveryModel) number(c *modelSite) {
	spool := Spool{cfg: SpoolConfig{Now: func() Moment { return m.moment(c) }}, nextNumber: c.next, meta: c.meta}
	spool.initIDAndNumber()
	c.next = spool.nextNumber
}

// restartSite starts a new client process on the spool that the site has on disk.
func (m *deliveryModel) restartSite(c *modelSite) {
	if m.tracing {
		m.say("restart %s", c.name)
	}
	m.reopen(c, slices.Clone(c.plan.entries), c.savedMeta)
	for i := range c.lo {
		// The metadata on disk may have times of the consumers' scrapes that are up to consumerLag
		// older than the times that the last process had in memory.
		c.lo[i] = max(0, c.lo[i]-consumerLag.Milliseconds())
	}
}

// reopen starts a client process on a spool directory with the given scrapes and metadata. In 20%
// of the calls the site's machine has rebooted before.
func (m *deliveryModel) reopen(c *modelSite, entries []spoolEntry, saved spoolMeta) {
	if m.chance(20) {
		c.boot, c.bootID = m.now, fmt.Sprint("boot", m.now)
	}
	c.plan, c.meta, c.savedMeta, c.next, c.listed = spoolIndex{}, saved, saved, 1, nil
	c.servers, c.size, c.elsewhere, c.failing = serverFailover{servers: modelServers}, pushScrapeLimit{max: maxPushScrapes}, 0, false
	c.uncertain = map[uint64]bool{}
	for _, e := range entries {
		c.plan.add(spoolEntry{Scrape: e.Scrape, gzipSize: e.gzipSize, footprint: e.footprint, uncertain: true})
		c.next, c.uncertain[e.Number] = e.Number+1, true
	}
	m.number(c)
}

// spoolFault copies the site's spool, replaces the spool by its copy, loses the spool, or does
// nothing, at random.
func (m *deliveryModel) spoolFault(c *modelSite) {
	switch n := m.rng.IntN(10); {
	case n < 5:
		c.copy = &modelSpoolCopy{slices.Clone(c.plan.entries), c.savedMeta, c.lo}
		if m.tracing {
			m.say("the spool of %s is copied", c.name)
		}
	case n < 8 && c.copy != nil:
		if m.tracing {
			m.say("the spool of %s is replaced by its copy", c.name)
		}
		kept := map[uint64]bool{}
		for _, e := range c.copy.entries {
			kept[e.Number] = true
		}
		for i := range c.plan.entries {
			if e := &c.plan.entries[i]; !kept[e.Number] {
				c.scrapes[e.Number].excused = true
			}
		}
		m.reopen(c, c.copy.entries, c.copy.saved)
		for _, e := range c.plan.entries {
			c.scrapes[e.Number].gone = false
		}
		for i := range c.lo {
			c.lo[i] = max(0, c.copy.lo[i]-consumerLag.Milliseconds())
		}
	case n == 9:
		if m.tracing {
			m.say("the spool of %s is lost", c.name)
		}
		for _, sc := range c.scrapes {
			sc.excused = true
		}
		m.newSpool(c)
		m.reopen(c, nil, c.savedMeta)
	}
}

// scrapeSource scrapes the site's source and adds the scrape to the spool. The new scrape has new
// samples, or the samples of the previous scrape again, or one repeated and one new sample. Scrapes
// over the spool's limits on age and number leave the spool.
func (m *deliveryModel) scrapeSource(c *modelSite) {
	m.dropOld(c)
	sc := &modelScrape{number: c.next, at: m.now}
	add := func(series int) {
		sc.samples = append(sc.samples, len(m.samples))
		m.samples = append(m.samples, modelSample{c.at, series, m.now})
		for _, x := range m.consumers {
			x.received = append(x.received, false)
		}
		for _, s := range m.servers {
			s.disk.stored = append(s.disk.stored, false)
		}
	}
	switch n := m.rng.IntN(10); {
	case n < 2 && c.last != nil:
		sc.samples = c.last.samples
	case n < 4 && c.last != nil:
		sc.samples = append(sc.samples, c.last.samples[0])
		add(1)
	case n < 6:
		add(0)
		add(1)
	default:
		add(0)
	}
	c.next++
	c.last, c.scrapes[sc.number] = sc, sc
	for c.plan.diskBytes+1 > int64(c.limit) {
		before := len(c.plan.entries)
		held, lost := c.plan.drop(func(e *spoolEntry) bool { return c.plan.diskBytes+1 > int64(c.limit) })
		if len(lost) > 0 && slices.ContainsFunc(c.plan.entries, func(e spoolEntry) bool { return e.certainStateOrUndelivered() != ScrapeUndelivered }) {
			m.fail("%s drops a scrape that no server holds, and keeps a scrape that a server holds", c.name)
		}
		m.dropped(c, append(held, lost...))
		if len(c.plan.entries) == before {
			break
		}
	}
	c.plan.add(spoolEntry{Scrape: Scrape{Number: sc.number, At: m.moment(c), Samples: len(sc.samples), Size: 10, Corrected: true}, gzipSize: 10, footprint: 1})
	if m.tracing {
		m.say("%s scrapes its source: scrape %d, samples %v", c.name, sc.number, sc.samples)
	}
}

// dropped marks scrapes that a limit of the spool has removed as gone and excused.
func (m *deliveryModel) dropped(c *modelSite, gone []spoolEntry) {
	for _, e := range gone {
		sc := c.scrapes[e.Number]
		sc.gone, sc.excused = true, true
		if m.tracing {
			m.say("%s drops scrape %d", c.name, e.Number)
		}
	}
}

// dropOld drops the scrapes that are older than the spool's limit on age.
func (m *deliveryModel) dropOld(c *modelSite) {
	now := m.moment(c)
	if len(c.plan.entries) == 0 || now.Since(c.plan.entries[0].At) <= c.age {
		return
	}
	held, lost := c.plan.drop(func(e *spoolEntry) bool { return now.Since(e.At) > c.age })
	m.dropped(c, append(held, lost...))
}

// named returns the site's scrape with number n. The run fails if the present spool never had that
// scrape.
func (m *deliveryModel) named(c *modelSite, n uint64) *modelScrape {
	sc := c.scrapes[n]
	if sc == nil {
		m.fail("a server names scrape %d, which %s never had", n, c.name)
	}
	return sc
}

// drain lets the site push scrapes and ask servers which scrapes are held and read, as
// Pusher.DrainSpool does. It ends when nothing is left to do, when all servers have failed in a
// row, or after m.requests requests and waits. It checks each push and each answer.
func (m *deliveryModel) drain(c *modelSite) {
	now := func() int64 { return m.moment(c).Boot }
	unreadFor := time.Duration(0)
	if since, ok := c.plan.noReadProgressSince(); ok {
		unreadFor = time.Duration(now()-since) * time.Millisecond
	}
	c.servers.beginDrain(time.UnixMilli(m.now), unreadFor)
	m.dropOld(c)
	for range m.requests {
		step, wait := c.plan.nextStep(now())
		var names ScrapeNames
		var push []*modelScrape
		c.servers.chooseServer(time.UnixMilli(m.now))
		front := m.servers[c.servers.current]
		switch step {
		case StepDone:
			return
		case StepWait:
			m.now += wait.Milliseconds()
			continue
		case StepAsk:
			if len(c.uncertain) == 0 && len(c.plan.entries) == 0 {
				m.fail("%s asks a server although its spool is empty", c.name)
			}
		case StepPush:
			push, names.Numbers = m.pickPush(c, now())
		}
		names.SpoolID = c.meta.ID
		a, ok := m.request(c, front, names, push)
		if !ok {
			for _, sc := range push {
				c.uncertain[sc.number] = true
			}
			c.plan.markPushFailed(false)
			c.failing = true
			if !c.servers.advanceAfterFailure(0, false) {
				return
			}
			continue
		}
		if len(push) > 0 {
			c.servers.stayAfterAnswer(time.UnixMilli(m.now), time.Minute)
		}
		c.servers.last, c.failing = front.at, false
		m.applyAnswer(c, now(), a, names, push)
	}
}

// pickPush begins a push, and returns its scrapes and their numbers. It checks that no scrape of
// the push is in c.uncertain or was listed by the last answer. It also checks scrapes in state
// ScrapeElsewhere, which a server held, but not the server that answered last. They must come after
// the scrapes that no server holds and that may be pushed now. They may be in at most one push per
// elsewhereInterval, and not in the next push after a request that got no answer.
func (m *deliveryModel) pickPush(c *modelSite, now int64) (push []*modelScrape, numbers Ranges) {
	undelivered := false
	for i := range c.plan.entries {
		e := &c.plan.entries[i]
		undelivered = undelivered || e.state == ScrapeUndelivered && !e.uncertain && !e.declined && now >= e.retryAt
	}
	picked := c.plan.beginPush(now, PushLimits{1 << 20, 1 << 20, min(c.size.max, 1+m.rng.IntN(8))}, func(*spoolEntry) bool { return true })
	for i := range picked {
		e := &picked[i]
		numbers = numbers.Add(e.Number, e.Number)
		push = append(push, c.scrapes[e.Number])
		switch {
		case c.uncertain[e.Number]:
			m.fail("%s sends scrape %d although a server may hold it", c.name, e.Number)
		case c.listed.Has(e.Number):
			m.fail("%s sends scrape %d, which the server that answered last has", c.name, e.Number)
		case e.state == ScrapeElsewhere && undelivered:
			m.fail("%s sends scrape %d, which another server holds, before a scrape that no server holds", c.name, e.Number)
		case e.state == ScrapeElsewhere && i == 0 && m.now < c.elsewhere+elsewhereInterval.Milliseconds():
			m.fail("%s sends scrape %d, which another server holds, too soon after another such scrape", c.name, e.Number)
		}
		if e.state == ScrapeElsewhere && c.failing {
			m.fail("%s sends scrape %d, which another server holds, after an attempt that failed", c.name, e.Number)
		}
		if e.state == ScrapeElsewhere {
			c.elsewhere = m.now
		}
	}
	if len(push) == 0 {
		m.fail("the next step of %s is a push, and it has nothing to push", c.name)
	}
	return push, numbers
}

// applyAnswer applies an answer to the site's spool, to its choice of server and to its limit on
// scrapes per push. It checks that a scrape leaves the spool only if the answer allows it. It also
// checks that a pushed scrape counts as declined if it stays in the spool and the answer does not
// list it as held.
func (m *deliveryModel) applyAnswer(c *modelSite, now int64, a SpoolAnswer, names ScrapeNames, push []*modelScrape) {
	gone, out := c.plan.applyAnswer(now, a)
	for _, e := range gone {
		c.scrapes[e.Number].gone = true
		if m.tracing {
			m.say("scrape %d leaves the spool of %s", e.Number, c.name)
		}
		if !a.Read.Has(e.Number) && !a.DoneWhenHeld {
			m.fail("scrape %d leaves the spool of %s unread", e.Number, c.name)
		}
		if a.DoneWhenHeld && !(names.Numbers.Has(e.Number) && a.Held.Has(e.Number)) {
			m.fail("scrape %d leaves the spool of %s although the server does not hold it", e.Number, c.name)
		}
	}
	for _, sc := range push {
		if !sc.gone && !a.Held.Has(sc.number) && !out.Declined.Has(sc.number) {
			m.fail("the server did not take scrape %d of %s, and it does not count as declined", sc.number, c.name)
		}
	}
	clear(c.uncertain)
	c.listed = slices.Clone(a.Held).AddAll(a.Read)
	c.meta = c.meta.mergedWith(m.moment(c), a.Consumers)
	if c.meta.needsSaving(&c.savedMeta) {
		c.savedMeta = c.meta
	}
	switch n := len(out.Declined); {
	case len(push) == 0:
	case n > 0 && len(push) > 1:
		c.servers.declined = 0
		c.size.limitToOne(len(push))
	case n > 0 && c.servers.advanceAfterDecline(time.UnixMilli(m.now), time.Minute):
		for i := range c.plan.entries {
			if e := &c.plan.entries[i]; out.Declined.Has(e.Number) {
				e.retryAt = 0
			}
		}
	default:
		c.servers.declined = 0
		c.size.growAfter(len(push))
	}
}

// request sends a push or a question of the site to the server front. If another server owns the
// site, front forwards the request to the owner. If front is the owner or cannot reach the owner,
// it handles the request itself. ok is false if the site gets no answer.
func (m *deliveryModel) request(c *modelSite, front *modelServer, names ScrapeNames, push []*modelScrape) (a SpoolAnswer, ok bool) {
	if !front.up || m.lost() {
		if m.tracing {
			m.say("the request of %s does not reach %s", c.name, front.name)
		}
		return a, false
	}
	reported := FormatConsumers(c.meta.mergedWith(m.moment(c), nil).Consumers)
	at := front
	if owner := m.servers[m.owner[c.at]]; owner != front && owner.up && !m.lost() {
		a = m.handle(owner, c, names, push, reported)
		// front also handles the request itself if the owner's answer is lost, or if the owner
		// dropped all samples of the push because the owner's clock is wrong.
		if at = owner; m.lost() || owner.untimely {
			a = m.handle(front, c, names, push, reported)
			at = front
		}
	} else {
		a = m.handle(front, c, names, push, reported)
	}
	if m.lost() {
		if m.tracing {
			m.say("the answer to %s is lost", c.name)
		}
		return a, false
	}
	a.Server = front.name
	for i := range c.lo {
		c.lo[i] = max(c.lo[i], at.lo[i], at.reported[c.at][i])
	}
	return a, true
}
