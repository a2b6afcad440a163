package main

// A model of delivery from end to end: two sites, three servers and three consumers in virtual
// time, whose steps and faults a seed chooses. The rules are the real ones: the plan and the record
// of a spool, Store, Site, SiteSamples, SiteSpools, Consumers and AllSitesReader. Only the disk and
// what lies between the parties is the model's, so that one run costs some tens of microseconds.
// The model knows the truth, which is the samples that each consumer received, and checks each
// answer and each scrape that leaves a spool against it.

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var deliveryFlag = flag.Int("delivery", 8_000, "interleavings of TestSweepDelivery; run i has the seed of the first plus i")

const (
	deliveryRetention = 2 * time.Hour
	deliverySlack     = 5 * time.Second // ages are told in whole seconds

	modelSites, modelServers, modelConsumers = 2, 3, 3
)

func TestSweepDelivery(t *testing.T) {
	sweep(t)
	t.Parallel()
	var next, steps atomic.Int64
	var failed atomic.Pointer[deliveryFailure]
	begin := time.Now()
	var all sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for i := next.Add(1) - 1; i < int64(*deliveryFlag) && failed.Load() == nil; i = next.Add(1) - 1 {
				m := newDeliveryModel(*seedFlag+uint64(i), false)
				err := m.run()
				steps.Add(int64(m.steps & (1<<20 - 1)))
				if err != "" {
					failed.CompareAndSwap(nil, &deliveryFailure{*seedFlag + uint64(i), err, i + 1})
				}
			}
		})
	}
	all.Wait()
	if f := failed.Load(); f != nil {
		m := newDeliveryModel(f.seed, true)
		m.run()
		t.Fatalf("run %d: %s\nthe run alone: -args -delivery 1 -seed %d\n%s", f.run, f.why, f.seed, strings.Join(m.trace, "\n"))
	}
	t.Logf("%d interleavings, %d steps, %v", *deliveryFlag, steps.Load(), time.Since(begin).Round(time.Millisecond))
}

// deliveryFailure is the first run that failed.
type deliveryFailure struct {
	seed uint64
	why  string
	run  int64
}

// deliveryModel is one run.
type deliveryModel struct {
	rng       *rand.Rand
	now       int64 // ms
	steps     int
	sites     [modelSites]*modelSite
	servers   [modelServers]*modelServer
	consumers [modelConsumers]*modelReader
	owner     [modelSites]int
	samples   []modelSample
	skewed    bool // a server's clock is wrong
	calm      bool // no faults any more
	requests  int  // of one drain
	loss      int  // percent of requests and of answers that are lost
	hi        [modelConsumers]int64
	tracing   bool
	trace     []string
}

type modelSample struct {
	site, series int
	t            int64
}

// modelScrape is a scrape with its truth.
type modelScrape struct {
	number  uint64
	at      int64
	samples []int
	gone    bool // it left its spool
	excused bool // the disk lost it, or a limit dropped it
}

// modelSite is a client. lo has for each consumer the least that it knows of the time of its
// newest scrape.
type modelSite struct {
	at              int
	name            string
	ring            uint64
	lines           [2][]byte
	plan            spoolIndex
	meta, savedMeta spoolMeta
	next            uint64
	once            bool
	limit           int
	age             time.Duration
	boot            int64
	bootID          string
	scrapes         map[uint64]*modelScrape // of this spool ID
	last            *modelScrape
	lo              [modelConsumers]int64
	servers         serverFailover
	size            pushScrapeLimit
	failing         bool // the last attempt had no answer

	uncertain map[uint64]bool // sent or found, and no answer since
	listed    Ranges          // what the last answer had as held or read
	elsewhere int64           // when the last push of scrapes that are elsewhere was

	copy *modelSpoolCopy
}

type modelSpoolCopy struct {
	entries []spoolEntry
	saved   spoolMeta
	lo      [modelConsumers]int64
}

// modelRecord is a record of a log. samples are those of a batch; lo is the truth of a
// cursors' record.
type modelRecord struct {
	kind     byte
	payload  []byte
	samples  []int
	consumer int
	lo       int64
}

// modelDisk is what a server's disk has.
type modelDisk struct {
	logs    [modelSites][]modelRecord
	known   []KnownConsumer
	seen    [modelConsumers]int64 // newest scrape here of those known
	cursors []modelRecord
	block   uint64
	stored  []bool // by sample: it was stored, and not lost since
}

func (d *modelDisk) clone() *modelDisk {
	k := *d
	for i := range k.logs {
		k.logs[i] = slices.Clone(k.logs[i])
	}
	k.known, k.cursors, k.stored = slices.Clone(k.known), slices.Clone(k.cursors), slices.Clone(k.stored)
	return &k
}

type modelServer struct {
	at       int
	name     string
	up       bool
	ahead    int64 // ms, of its clock
	untimely bool  // no sample of the last push was of its time, by that clock
	store    *Store
	scraper  *AllSitesReader
	disk     *modelDisk
	copy     *modelDisk
	lo       [modelConsumers]int64              // newest scrape here that it knows of
	told     [modelSites][modelConsumers]int64  // newest scrape of any server, as the site told since the start
	read     [modelSites]map[[2]uint64]struct{} // spool ID and number: listed as read since it was stored
	taken    [modelSites]ScrapeNames            // held or read by the last answer, and not lost since
	evicted  map[int]bool                       // samples that left memory once, while nobody who counted lacked them
}

type modelReader struct {
	at       int
	name     string
	key      uint64
	comes    int // step
	dies     int // step
	conns    [modelServers]*int
	received []bool // by sample
}

type modelFailure string

func newDeliveryModel(seed uint64, tracing bool) *deliveryModel {
	m := &deliveryModel{rng: rand.New(rand.NewPCG(seed, 1)), now: 1_700_000_000_000, requests: 6, tracing: tracing}
	m.skewed = m.chance(20)
	m.loss = []int{0, 5, 15, 40}[m.rng.IntN(4)]
	for i := range m.consumers {
		c := &modelReader{at: i, name: string(rune('x' + i)), dies: 1 << 30}
		c.key = ConsumerKey(c.name, "127.0.0.1", "")
		for s := range c.conns {
			c.conns[s] = new(int)
		}
		m.consumers[i] = c
	}
	m.consumers[0].comes = m.rng.IntN(3) * m.rng.IntN(15)
	m.consumers[1].dies = m.rng.IntN(50)
	m.consumers[2].comes = 5 + m.rng.IntN(40)
	for i := range m.sites {
		c := &modelSite{at: i, name: string(rune('a' + i)), servers: serverFailover{servers: modelServers}, size: pushScrapeLimit{max: maxPushScrapes}, age: []time.Duration{30 * time.Minute, 2 * time.Hour, 2 * time.Hour, 4 * time.Hour}[m.rng.IntN(4)]}
		c.ring = SiteKey(c.name)
		for k := range c.lines {
			c.lines[k] = fmt.Appendf(nil, `s%d{_id="%s",instance="",job=""}`, k, c.name)
		}
		c.once, c.limit = m.chance(20), 1<<30
		if m.chance(20) {
			c.limit = 3 + m.rng.IntN(6)
		}
		m.sites[i] = c
		m.newSpool(c)
		m.owner[i] = m.rng.IntN(modelServers)
	}
	for i := range m.servers {
		s := &modelServer{at: i, name: string(rune('A' + i)), disk: &modelDisk{}, evicted: map[int]bool{}}
		for i := range s.read {
			s.read[i] = map[[2]uint64]struct{}{}
		}
		if m.skewed && i == 0 {
			s.ahead = (30 + m.rng.Int64N(180)) * 60_000
		}
		m.servers[i] = s
		m.open(s, [modelSites]bool{})
	}
	return m
}

func (m *deliveryModel) chance(percent int) bool { return m.rng.IntN(100) < percent }
func (m *deliveryModel) lost() bool              { return !m.calm && m.chance(m.loss) }

// timeAt is the time by a server's clock.
func (m *deliveryModel) timeAt(s *modelServer) time.Time { return time.UnixMilli(m.now + s.ahead) }

func (m *deliveryModel) say(format string, args ...any) {
	m.trace = append(m.trace, time.UnixMilli(m.now).UTC().Format("02 15:04:05 ")+fmt.Sprintf(format, args...))
}

func (m *deliveryModel) fail(format string, args ...any) {
	panic(modelFailure(fmt.Sprintf(format, args...)))
}

// run returns what failed, or "".
func (m *deliveryModel) run() (why string) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case modelFailure:
			why = string(r)
		default:
			if m.tracing {
				panic(r)
			}
			why = fmt.Sprint(r)
		}
		if m.tracing {
			m.say("%s", why)
		}
	}()
	for n := 25 + m.rng.IntN(50); m.steps < n; m.steps++ {
		m.pass()
		m.step()
	}
	m.end()
	return ""
}

// pass lets time pass.
func (m *deliveryModel) pass() {
	switch n := m.rng.IntN(1000); {
	case n < 700:
		m.now += 1 + m.rng.Int64N(60_000)
	case n < 920:
		m.now += 1 + m.rng.Int64N(10*60_000)
	case n < 995:
		m.now += 1 + m.rng.Int64N(90*60_000)
	default:
		m.now += 1 + m.rng.Int64N(26*3600_000)
	}
}

func (m *deliveryModel) step() {
	c, s := m.sites[m.rng.IntN(modelSites)], m.servers[m.rng.IntN(modelServers)]
	switch n := m.rng.IntN(100); {
	case n < 36:
		if c.once {
			m.restartSite(c)
		}
		m.scrapeSource(c)
		m.drain(c)
	case n < 40:
		m.drain(c)
	case n < 70:
		x := m.consumers[m.rng.IntN(modelConsumers)]
		if m.chance(50) {
			m.scrape(x, s)
			break
		}
		for _, s := range m.servers {
			m.scrape(x, s)
		}
	case n < 76:
		if s.up {
			m.down(s)
		} else {
			m.up(s)
		}
	case n < 78:
		if !s.up {
			m.up(s)
		}
	case n < 82:
		m.owner[c.at] = m.rng.IntN(modelServers)
		if m.tracing {
			m.say("%s is owned by %s", c.name, m.servers[m.owner[c.at]].name)
		}
	case n < 85:
		if s.up {
			s.copy = s.disk.clone()
			if m.tracing {
				m.say("copy of %s", s.name)
			}
		}
	case n < 88:
		m.restartSite(c)
	case n < 90:
		m.spoolFault(c)
	case n < 94:
		if s.up {
			m.maintain(s)
		}
	case n < 97:
		if s.up {
			m.evict(s, c)
		}
	default:
		if s.up {
			m.saveConsumers(s)
		}
	}
}

// The client.

func (m *deliveryModel) moment(c *modelSite) Moment {
	return Moment{Wall: m.now, Boot: m.now - c.boot, BootID: c.bootID}
}

// newSpool gives a site a spool without scrapes and without a record.
func (m *deliveryModel) newSpool(c *modelSite) {
	c.plan, c.meta = spoolIndex{}, spoolMeta{ID: m.rng.Uint64() | 1, At: m.moment(c)}
	c.savedMeta, c.next, c.lo = c.meta, 1, [modelConsumers]int64{}
	c.scrapes, c.uncertain, c.listed, c.last = map[uint64]*modelScrape{}, map[uint64]bool{}, nil, nil
	c.copy = nil
	m.number(c)
}

func (m *deliveryModel) number(c *modelSite) {
	spool := Spool{cfg: SpoolConfig{Now: func() Moment { return m.moment(c) }}, nextNumber: c.next, meta: c.meta}
	spool.initIDAndNumber()
	c.next = spool.nextNumber
}

// restartSite has a new process, perhaps after a reboot, take what is on the disk.
func (m *deliveryModel) restartSite(c *modelSite) {
	if m.tracing {
		m.say("restart %s", c.name)
	}
	m.reopen(c, slices.Clone(c.plan.entries), c.savedMeta)
	for i := range c.lo {
		// The list on disk may lag by that much.
		c.lo[i] = max(0, c.lo[i]-consumerLag.Milliseconds())
	}
}

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

// spoolFault copies the spool's directory, restores the copy, or loses it.
func (m *deliveryModel) spoolFault(c *modelSite) {
	switch n := m.rng.IntN(10); {
	case n < 5:
		c.copy = &modelSpoolCopy{slices.Clone(c.plan.entries), c.savedMeta, c.lo}
		if m.tracing {
			m.say("copy of the spool of %s", c.name)
		}
	case n < 8 && c.copy != nil:
		if m.tracing {
			m.say("the spool of %s is restored", c.name)
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

// scrapeSource adds a scrape to the spool: one of a new sample, one that repeats the samples
// before, or one with both.
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
			m.fail("%s drops a scrape that no server holds, and keeps one that a server holds", c.name)
		}
		m.dropped(c, append(held, lost...))
		if len(c.plan.entries) == before {
			break
		}
	}
	c.plan.add(spoolEntry{Scrape: Scrape{Number: sc.number, At: m.moment(c), Samples: len(sc.samples), Size: 10, Corrected: true}, gzipSize: 10, footprint: 1})
	if m.tracing {
		m.say("%s takes scrape %d of samples %v", c.name, sc.number, sc.samples)
	}
}

func (m *deliveryModel) dropped(c *modelSite, gone []spoolEntry) {
	for _, e := range gone {
		sc := c.scrapes[e.Number]
		sc.gone, sc.excused = true, true
		if m.tracing {
			m.say("%s drops %d", c.name, e.Number)
		}
	}
}

func (m *deliveryModel) dropOld(c *modelSite) {
	now := m.moment(c)
	if len(c.plan.entries) == 0 || now.Since(c.plan.entries[0].At) <= c.age {
		return
	}
	held, lost := c.plan.drop(func(e *spoolEntry) bool { return now.Since(e.At) > c.age })
	m.dropped(c, append(held, lost...))
}

// drain is Pusher.DrainSpool, for one round of servers that fail.
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
				m.fail("%s asks for nothing", c.name)
			}
		case StepPush:
			undelivered := false
			for i := range c.plan.entries {
				e := &c.plan.entries[i]
				undelivered = undelivered || e.state == ScrapeUndelivered && !e.uncertain && !e.declined && now() >= e.retryAt
			}
			picked := c.plan.beginPush(now(), PushLimits{1 << 20, 1 << 20, min(c.size.max, 1+m.rng.IntN(8))}, func(*spoolEntry) bool { return true })
			for i := range picked {
				e := &picked[i]
				sc := c.scrapes[e.Number]
				names.Numbers = names.Numbers.Add(e.Number, e.Number)
				push = append(push, sc)
				switch {
				case c.uncertain[e.Number]:
					m.fail("%s sends %d, of which nothing is known", c.name, e.Number)
				case c.listed.Has(e.Number):
					m.fail("%s sends %d, which the server that answered last has", c.name, e.Number)
				case e.state == ScrapeElsewhere && undelivered:
					m.fail("%s sends %d, which a server holds, before what none holds", c.name, e.Number)
				case e.state == ScrapeElsewhere && i == 0 && m.now < c.elsewhere+elsewhereInterval.Milliseconds():
					m.fail("%s sends %d, which a server holds, too soon after another", c.name, e.Number)
				}
				if e.state == ScrapeElsewhere && c.failing {
					m.fail("%s sends %d, which a server holds, after a push that failed", c.name, e.Number)
				}
				if e.state == ScrapeElsewhere {
					c.elsewhere = m.now
				}
			}
			if len(push) == 0 {
				m.fail("%s has nothing to push, and is to push", c.name)
			}
		}
		names.SpoolID = c.meta.ID
		a, ok := m.request(c, front, names, push)
		if !ok {
			for _, sc := range push {
				c.uncertain[sc.number] = true
			}
			c.plan.markPushFailed(false)
			c.failing = true
			if !c.servers.advanceAfterFailure(0) {
				return
			}
			continue
		}
		if len(push) > 0 {
			c.servers.stayAfterAnswer(time.UnixMilli(m.now), time.Minute)
		}
		c.servers.last, c.failing = front.at, false
		gone, out := c.plan.applyAnswer(now(), a)
		for _, e := range gone {
			sc := c.scrapes[e.Number]
			sc.gone = true
			if m.tracing {
				m.say("%d leaves the spool of %s", e.Number, c.name)
			}
			if !a.Read.Has(e.Number) && !a.DoneWhenHeld {
				m.fail("%d leaves the spool of %s unread", e.Number, c.name)
			}
			if a.DoneWhenHeld && !(names.Numbers.Has(e.Number) && a.Held.Has(e.Number)) {
				m.fail("%d leaves the spool of %s, and no server holds it", e.Number, c.name)
			}
		}
		for _, sc := range push {
			if !sc.gone && !a.Held.Has(sc.number) && !out.Declined.Has(sc.number) {
				m.fail("%d of %s was not taken, and is not reported", sc.number, c.name)
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
}

// request is one push or question, by way of front to the owner.
func (m *deliveryModel) request(c *modelSite, front *modelServer, names ScrapeNames, push []*modelScrape) (a SpoolAnswer, ok bool) {
	if !front.up || m.lost() {
		if m.tracing {
			m.say("%s does not reach %s", c.name, front.name)
		}
		return a, false
	}
	told := FormatConsumers(c.meta.mergedWith(m.moment(c), nil).Consumers)
	at := front
	if owner := m.servers[m.owner[c.at]]; owner != front && owner.up && !m.lost() {
		a = m.handle(owner, c, names, push, told)
		if at = owner; m.lost() || owner.untimely { // the receiver has no answer, or one of a wrong clock
			a = m.handle(front, c, names, push, told)
			at = front
		}
	} else {
		a = m.handle(front, c, names, push, told)
	}
	if m.lost() {
		if m.tracing {
			m.say("the answer to %s is lost", c.name)
		}
		return a, false
	}
	a.Server = front.name
	for i := range c.lo {
		c.lo[i] = max(c.lo[i], at.lo[i], at.told[c.at][i])
	}
	return a, true
}

// The server.

// handle is Server.keep, and Pusher.read of its answer.
func (m *deliveryModel) handle(s *modelServer, c *modelSite, names ScrapeNames, push []*modelScrape, told string) (a SpoolAnswer) {
	got, err := ParseScrapeNames(names.String())
	consumers, cerr := ParseConsumers(told)
	if err != nil || cerr != nil {
		m.fail("%v %v", err, cerr)
	}
	s.store.Consumers.AddClientReportedConsumers(c.ring, consumers, m.timeAt(s))
	for i, at := range c.lo {
		s.told[c.at][i] = max(s.told[c.at][i], at)
	}
	s.untimely = false
	if len(push) > 0 {
		p := &SampleList{}
		for _, sc := range push {
			for _, id := range sc.samples {
				line := c.lines[m.samples[id].series]
				p.Samples = append(p.Samples, Sample{Off: uint32(len(p.Arena)), Len: uint32(len(line)), T: m.samples[id].t, V: float64(id)})
				p.Arena = append(p.Arena, line...)
			}
		}
		m.append(s, c, p, got)
	}
	st := s.store.RefreshSpoolStatus(c.name, names.SpoolID)
	if m.tracing {
		m.say("%s to %s: %s, consumers %q; held %v, read %v, settled %v", c.name, s.name, names, told, st.Held, st.Read, st.HasConsumers)
	}
	m.check(s, c, names.SpoolID, &st)
	a = SpoolAnswer{KnowsSpools: true, DoneWhenHeld: !st.HasConsumers}
	a.Held, err = ParseRanges(st.Held.String(), MaxRanges)
	if st.HasConsumers && err == nil {
		a.Read, err = ParseRanges(st.Read.String(), MaxRanges)
	}
	if err == nil {
		a.Consumers, err = ParseConsumers(FormatConsumers(st.Consumers))
	}
	if err != nil {
		m.fail("%v", err)
	}
	return a
}

// append stores a push, and checks that what it adds is new. That it
// had a sample that is evicted a server knows only by the numbers of the scrapes in a push.
func (m *deliveryModel) append(s *modelServer, c *modelSite, p *SampleList, names ScrapeNames) {
	series, seq := 0, uint64(0)
	var known Ranges
	if s.taken[c.at].SpoolID == names.SpoolID {
		known = s.taken[c.at].Numbers
	}
	look := func(f func(held *SiteSamples)) { s.store.ViewSite(c.name, f) }
	look(func(held *SiteSamples) {
		series = held.Table.Len()
		if n := len(held.Batches); n > 0 {
			seq = held.Batches[n-1].Seq
		}
	})
	res, err := s.store.Append(context.Background(), c.name, p, names)
	if err != nil {
		m.fail("%v", err)
	}
	s.untimely = res.IsAllUntimely() && s.ahead > 0
	look(func(held *SiteSamples) {
		n := len(held.Batches)
		if n == 0 || held.Batches[n-1].Seq == seq {
			return
		}
		b := held.Batches[n-1]
		if held.Table.Len() > series {
			payload := EncodeSeriesPayload(nil, uint32(series), func(yield func([]byte) bool) {
				for id := series; id < held.Table.Len() && yield(held.Table.Line(uint32(id))); id++ {
				}
			})
			s.disk.logs[c.at] = append(s.disk.logs[c.at], modelRecord{kind: RecordSeries, payload: payload})
		}
		r := modelRecord{kind: RecordBatch, payload: EncodeBatchPayload(nil, b), samples: samplesOf(b)}
		s.disk.logs[c.at] = append(s.disk.logs[c.at], r)
		for _, part := range names.Numbers {
			for n := part.From; n <= part.To; n++ {
				if slices.ContainsFunc(m.named(c, n).samples, func(id int) bool { return slices.Contains(r.samples, id) }) {
					delete(s.read[c.at], [2]uint64{names.SpoolID, n})
				}
			}
		}
		for _, id := range r.samples {
			if s.disk.stored[id] && (!s.evicted[id] || len(names.Numbers.Without(known)) == 0) {
				m.fail("%s stores sample %d again", s.name, id)
			}
			s.disk.stored[id] = true
		}
	})
}

func samplesOf(b *Batch) (ids []int) {
	for _, v := range b.V {
		ids = append(ids, int(v))
	}
	return ids
}

// counts returns the consumers that have to have read what s calls read now. c, if not nil,
// is the site that is answered. Where it depends on a few seconds or on what a restart
// forgot, it returns none.
func (m *deliveryModel) counts(s *modelServer, c *modelSite) (all [modelConsumers]bool, any bool) {
	recent, maybe := false, false
	retention, slack := deliveryRetention.Milliseconds(), deliverySlack.Milliseconds()
	var lo [modelConsumers]int64
	for i := range lo {
		lo[i] = s.lo[i]
		if c != nil {
			lo[i] = max(lo[i], s.told[c.at][i])
		}
		recent = recent || lo[i] > 0 && m.now-lo[i] <= retention-slack
		maybe = maybe || m.hi[i] > 0 && m.now-m.hi[i] <= retention+slack
	}
	for i := range lo {
		switch {
		case lo[i] == 0:
		case recent:
			all[i] = m.now-lo[i] <= retention-slack
		case !maybe:
			all[i] = m.now-lo[i] < consumerIdle.Milliseconds()-slack
		}
		any = any || lo[i] > 0 && m.now-lo[i] < consumerIdle.Milliseconds()-slack
	}
	return all, any
}

// check checks what s says of a spool.
func (m *deliveryModel) check(s *modelServer, c *modelSite, spool uint64, st *SpoolStatus) {
	all, any := m.counts(s, c)
	if any && !st.HasConsumers {
		m.fail("%s says that nobody reads, and a consumer is known", s.name)
	}
	if st.HasConsumers && !slices.ContainsFunc(m.hi[:], func(at int64) bool { return at > 0 && m.now-at <= (consumerIdle+deliverySlack).Milliseconds() }) {
		m.fail("%s says that somebody reads, and nobody does", s.name)
	}
	lists := slices.Clone(st.Held).AddAll(st.Read)
	if old := s.taken[c.at]; old.SpoolID == spool && len(old.Numbers.Without(lists)) > 0 {
		m.fail("%s no longer knows %v of %s", s.name, old.Numbers.Without(lists), c.name)
	}
	s.taken[c.at] = ScrapeNames{spool, lists}
	for _, r := range st.Held {
		for n := r.From; n <= r.To; n++ {
			ids := m.named(c, n).samples
			// By a wrong clock some samples of a scrape may be too old, but not all.
			partly := s.ahead > 0 && slices.ContainsFunc(ids, func(id int) bool { return s.disk.stored[id] })
			for _, id := range ids {
				if !s.disk.stored[id] && !partly && m.samples[id].t >= m.now-deliveryRetention.Milliseconds() {
					m.fail("%s says that it holds %d of %s, and does not have sample %d", s.name, n, c.name, id)
				}
			}
		}
	}
	if !st.HasConsumers {
		return
	}
	for _, r := range st.Read {
		for n := r.From; n <= r.To; n++ {
			key := [2]uint64{spool, n}
			if _, old := s.read[c.at][key]; old {
				continue
			}
			s.read[c.at][key] = struct{}{}
			for _, id := range m.named(c, n).samples {
				for x, counts := range all {
					if counts && !m.consumers[x].received[id] && !s.evicted[id] && m.samples[id].t >= m.now+s.ahead-deliveryRetention.Milliseconds() {
						m.fail("%s says that %d of %s is read, and %s has not received sample %d", s.name, n, c.name, m.consumers[x].name, id)
					}
				}
			}
		}
	}
}

func (m *deliveryModel) named(c *modelSite, n uint64) *modelScrape {
	sc := c.scrapes[n]
	if sc == nil {
		m.fail("%s never had scrape %d", c.name, n)
	}
	return sc
}

// saveConsumers is Consumers.Save with the model's disk.
func (m *deliveryModel) saveConsumers(s *modelServer) {
	cs := s.store.Consumers
	stale := cs.knownChanged.Swap(false)
	frames := cs.takeChanges().frames
	if stale {
		s.disk.known, s.disk.seen, s.disk.cursors, frames = cs.knownConsumers(), s.lo, nil, cs.encodeAll()
	}
	for len(frames) > 0 {
		end := recordHead + int(binary.LittleEndian.Uint32(frames))
		r := modelRecord{kind: frames[recordHead], payload: frames[recordHead+1 : end]}
		for _, x := range m.consumers {
			if x.key == binary.LittleEndian.Uint64(r.payload) {
				r.consumer, r.lo = x.at, s.lo[x.at]
			}
		}
		s.disk.cursors, frames = append(s.disk.cursors, r), frames[end:]
	}
}

// open is Store.recover with the model's disk. hurt has the logs in which damage was found.
func (m *deliveryModel) open(s *modelServer, hurt [modelSites]bool) {
	cfg := StoreConfig{Retention: deliveryRetention, MaxSampleAge: 10 * time.Minute, Now: func() time.Time { return m.timeAt(s) }, OnError: func(error) {}}
	st, err := OpenStore(cfg)
	if err != nil {
		m.fail("%v", err)
	}
	state := &StoreMeta{Consumers: s.disk.known, block: s.disk.block}
	st.Consumers, _ = OpenConsumers(nil, "", state, deliveryRetention, m.timeAt(s))
	s.lo, s.told = [modelConsumers]int64{}, [modelSites][modelConsumers]int64{}
	for _, k := range s.disk.known {
		for _, x := range m.consumers {
			if x.key == k.Key {
				s.lo[x.at] = s.disk.seen[x.at]
			}
		}
	}
	var recorded [modelConsumers]bool
	for _, r := range s.disk.cursors {
		if err := st.Consumers.restoreRecord(r.kind, r.payload, m.timeAt(s)); err != nil {
			m.fail("%v", err)
		}
		s.lo[r.consumer], recorded[r.consumer] = r.lo, true
	}
	for i := range s.lo {
		if s.lo[i] > 0 && !recorded[i] {
			m.hi[i] = m.now // it is known as if it had scraped now
		}
	}
	for i, c := range m.sites {
		if len(s.disk.logs[i]) == 0 {
			continue
		}
		r := recoveredLog{store: st, path: st.logPathOf(c.name), data: NewSiteSamples("", st.seed)}
		if hurt[i] {
			r.decodeRecord(0, nil)
		}
		for _, rec := range s.disk.logs[i] {
			err := r.decodeRecord(rec.kind, rec.payload)
			if err != nil && !hurt[i] {
				m.fail("%v", err)
			}
		}
		if r.data.Seq == 0 {
			s.disk.logs[i] = nil
			continue
		}
		r.data.ID = c.name
		r.data.RestoreSpools(r.spools, hurt[i])
		r.data.DropExpiredUncounted(min(st.KeptSince(), r.data.LastPush-deliveryRetention.Milliseconds()))
		st.sites[c.name] = NewSite(r.data, nil, st)
	}
	st.dropExpiredWhileDown()
	highest := max(st.Consumers.HighestCursor(), st.totals.NewestSeq.Load())
	st.dropCursorsPastEnd(damagedLogs{})
	first := state.TakeSeqBlock(highest)
	for _, c := range st.sitesByID() {
		c.raiseSeq(first)
	}
	st.totals.RaiseNewest(first)
	s.disk.block = state.block
	s.store, s.up = st, true
	s.scraper = &AllSitesReader{Store: st, MaxSampleAge: 10 * time.Minute, Now: cfg.Now, Owned: func(hash uint64) bool {
		return m.sites[0].ring == hash && m.owner[0] == s.at || m.sites[1].ring == hash && m.owner[1] == s.at
	}}
	st.Consumers.knownChanged.Store(true)
	m.saveConsumers(s)
	for i, c := range m.sites {
		if hurt[i] {
			m.mended(s, c)
		}
	}
}

// mended rewrites a log that was damaged. Of a sample that expired nothing is known any more.
func (m *deliveryModel) mended(s *modelServer, c *modelSite) {
	kept := map[int]bool{}
	s.store.ViewSite(c.name, func(held *SiteSamples) {
		for _, b := range held.Batches {
			for _, id := range samplesOf(b) {
				kept[id] = true
			}
		}
	})
	for id := range s.disk.stored {
		if m.samples[id].site == c.at && !kept[id] {
			s.disk.stored[id] = false
		}
	}
	m.rewrite(s, c)
}

func (m *deliveryModel) rewrite(s *modelServer, c *modelSite) {
	site := s.store.sites[c.name]
	if site == nil {
		return
	}
	if err := site.RewriteLog(nil, s.store.KeptSince()); err != nil {
		m.fail("%v", err)
	}
	var log []modelRecord
	site.View(func(held *SiteSamples) {
		for frames := range held.Records {
			for len(frames) > 0 {
				end := recordHead + int(binary.LittleEndian.Uint32(frames))
				r := modelRecord{kind: frames[recordHead], payload: slices.Clone(frames[recordHead+1 : end])}
				if r.kind == RecordBatch {
					b, err := DecodeBatch(r.payload)
					if err != nil {
						m.fail("%v", err)
					}
					r.samples = samplesOf(b)
				}
				log, frames = append(log, r), frames[end:]
			}
		}
	})
	s.disk.logs[c.at] = log
}

// down ends a server, and does to its disk what a fault does.
func (m *deliveryModel) down(s *modelServer) {
	var hurt [modelSites]bool
	s.up = false
	what := "killed"
	d := s.disk
	switch n := m.rng.IntN(20); {
	case n < 3:
		what = "stopped"
		m.saveConsumers(s)
	case n < 8:
	case n < 11:
		what = "cut"
		for i := range d.logs {
			m.lose(d, i, max(0, len(d.logs[i])-m.rng.IntN(4)), len(d.logs[i]))
		}
		d.cursors = d.cursors[:max(0, len(d.cursors)-m.rng.IntN(3))]
	case n < 13:
		what = "damaged"
		for i := range d.logs {
			if n := len(d.logs[i]); n > 1 {
				at := m.rng.IntN(n - 1)
				m.lose(d, i, at, min(n-1, at+1+m.rng.IntN(2)))
				hurt[i] = true
			}
		}
	case n < 14:
		what = "without its disk"
		s.disk = &modelDisk{stored: make([]bool, len(m.samples))}
	case n < 15:
		what = "without its cursors"
		d.cursors = nil
	case n < 16:
		what = "without a log"
		i := m.rng.IntN(modelSites)
		m.lose(d, i, 0, len(d.logs[i]))
	default:
		if s.copy == nil {
			break
		}
		old := s.copy.clone()
		old.stored = append(old.stored, make([]bool, len(m.samples)-len(old.stored))...)
		switch m.rng.IntN(3) {
		case 0:
			what = "an old copy"
		case 1:
			what = "an old copy without cursors"
			old.cursors = nil
		case 2:
			what = "old logs with newer cursors"
			old.known, old.seen, old.cursors, old.block = d.known, d.seen, d.cursors, d.block
		}
		s.disk = old
	}
	if m.tracing {
		m.say("%s is down: %s", s.name, what)
	}
	if what != "killed" && what != "stopped" && what != "without its cursors" {
		s.taken = [modelSites]ScrapeNames{}
	}
	for _, x := range m.consumers {
		x.conns[s.at] = new(int)
	}
	if slices.Contains(hurt[:], true) || m.chance(40) {
		m.reopenServer(s, hurt)
	}
}

func (m *deliveryModel) up(s *modelServer) { m.reopenServer(s, [modelSites]bool{}) }

func (m *deliveryModel) reopenServer(s *modelServer, hurt [modelSites]bool) {
	m.open(s, hurt)
	if m.tracing {
		m.say("%s is up, hurt %v", s.name, hurt)
	}
}

// lose takes records out of a log.
func (m *deliveryModel) lose(d *modelDisk, site, from, to int) {
	for _, r := range d.logs[site][from:to] {
		for _, id := range r.samples {
			d.stored[id] = false
		}
	}
	d.logs[site] = slices.Delete(slices.Clone(d.logs[site]), from, to)
	for _, r := range d.logs[site] {
		for _, id := range r.samples {
			d.stored[id] = true
		}
	}
}

// maintain is Store.maintain, with logs that are always rewritten.
func (m *deliveryModel) maintain(s *modelServer) {
	if m.tracing {
		m.say("%s compacts", s.name)
	}
	for _, c := range m.sites {
		m.rewrite(s, c)
	}
	s.store.Consumers.DropIdle(m.timeAt(s))
}

// evict evicts what every consumer has read.
func (m *deliveryModel) evict(s *modelServer, c *modelSite) {
	site := s.store.sites[c.name]
	if site == nil {
		return
	}
	shown := m.now + s.ahead - (10 * time.Minute).Milliseconds()
	all, _ := m.counts(s, nil)
	for {
		var ids []int
		site.View(func(held *SiteSamples) {
			if len(held.Batches) > 0 {
				ids = samplesOf(held.Batches[0])
			}
		})
		if _, ok := site.TryEvictOldestBatch(shown); !ok {
			return
		}
		if m.tracing {
			m.say("%s evicts %v of %s", s.name, ids, c.name)
		}
		for _, id := range ids {
			if s.evicted[id] { // a restart brought it back, and cursors are past it
				continue
			}
			s.evicted[id] = true
			for x, counts := range all {
				if counts && !m.consumers[x].received[id] && m.samples[id].t >= m.now+s.ahead-deliveryRetention.Milliseconds() {
					m.fail("%s evicts sample %d, which %s has not received", s.name, id, m.consumers[x].name)
				}
			}
		}
	}
}

// The consumer.

// scrape is one scrape. It reports whether it served what the next scrape confirms.
func (m *deliveryModel) scrape(x *modelReader, s *modelServer) (served bool) {
	if !s.up || m.steps < x.comes || m.steps >= x.dies {
		return false
	}
	r, _, err := s.store.Consumers.BeginScrape(x.key, x.name, "127.0.0.1", x.conns[s.at], m.timeAt(s))
	if err != nil {
		m.fail("%v", err)
	}
	s.lo[x.at], m.hi[x.at] = m.now, m.now
	if s.store.Consumers.knownChanged.Load() {
		m.saveConsumers(s)
	}
	limit := 0
	if !m.calm && m.chance(30) {
		limit = 1 + m.rng.IntN(3)
	}
	fams, _, _ := s.scraper.ServeUnreadAndNewest(r, limit, !m.calm && m.chance(10), nil)
	lost := m.lost()
	var got []int
	for _, f := range fams {
		for _, l := range f.Samples {
			got = append(got, int(l.V))
			x.received[int(l.V)] = x.received[int(l.V)] || !lost
		}
	}
	if m.tracing {
		m.say("%s scrapes %s: %v, lost %v", x.name, s.name, got, lost)
	}
	if lost || !m.calm && m.chance(10) {
		x.conns[s.at] = new(int)
	}
	return len(r.served) > 0
}

// end ends all faults, and checks that all that is to be delivered is.
func (m *deliveryModel) end() {
	m.calm = true
	if m.tracing {
		m.say("no faults from here on")
	}
	for _, s := range m.servers {
		if !s.up {
			m.up(s)
		}
	}
	m.steps |= 1 << 20                                                    // who comes later is here
	oldest := m.now - (deliveryRetention - 30*time.Minute).Milliseconds() // younger samples are delivered in time
	var due []*modelScrape
	for _, c := range m.sites {
		m.dropOld(c)
		for _, e := range c.plan.entries {
			due = append(due, c.scrapes[e.Number])
		}
	}
	m.requests = 60
	m.rounds()
	for _, sc := range due {
		for _, id := range sc.samples {
			for _, x := range []*modelReader{m.consumers[0], m.consumers[2]} {
				evicted := slices.ContainsFunc(m.servers[:], func(s *modelServer) bool { return s.evicted[id] })
				if !x.received[id] && !sc.excused && !evicted && !m.skewed && m.samples[id].t >= oldest {
					m.fail("%s does not receive sample %d of scrape %d of %s, which was in the spool", x.name, id, sc.number, m.sites[m.samples[id].site].name)
				}
			}
		}
	}
	// Now nobody waits for the dead. A batch that expired unread is passed with the next one.
	m.now += deliveryRetention.Milliseconds() + 60_000
	m.requests = 10
	for _, c := range m.sites {
		if len(c.plan.entries) > 0 {
			c.last = nil // nothing to repeat
			m.scrapeSource(c)
		}
	}
	m.rounds()
	for _, c := range m.sites {
		for _, e := range c.plan.entries {
			if !m.skewed && slices.ContainsFunc(c.scrapes[e.Number].samples, func(id int) bool { return m.samples[id].t >= oldest }) {
				m.fail("scrape %d does not leave the spool of %s", e.Number, c.name)
			}
		}
	}
}

// rounds lets three intervals pass without faults, or fewer if they empty the spools.
func (m *deliveryModel) rounds() {
	for n := 0; n < 3 && len(m.sites[0].plan.entries)+len(m.sites[1].plan.entries) > 0; n++ {
		m.now += 2 * 60_000
		for _, c := range m.sites {
			m.drain(c)
		}
		for _, x := range []*modelReader{m.consumers[0], m.consumers[2]} {
			for _, s := range m.servers {
				if m.scrape(x, s) {
					m.scrape(x, s)
				}
			}
		}
		for _, c := range m.sites {
			m.now += askInterval.Milliseconds()
			m.drain(c)
		}
	}
}
