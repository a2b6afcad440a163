package main

// A model of consumers that scrape a store at random, while connections break, logs are rewritten,
// samples are evicted and the process crashes. Every consumer gets every accepted sample, except
// for the samples in modelConsumer.excused. A sample that a consumer confirmed comes again only as
// the newest sample of its series, or if it is in modelConsumer.repeats.

import (
	"context"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// modelConsumer is a scraper, and the samples that it received. Two scrapers have the name "twins".
// The store takes them for one consumer.
type modelConsumer struct {
	name    string
	conn    *AnswerReadTracker  // nil: the next scrape opens a new connection
	session *ConsumerSession    // session of conn
	read    map[heldSample]bool // samples that the scraper received, and confirmed by a later scrape
	repeats map[heldSample]bool // samples that the store may serve again although the scraper has read them
	saved   map[heldSample]bool // samples in read that the cursors on disk cover
	last    []heldSample        // samples of the last scrape, which no later scrape has confirmed
	partly  []heldSample        // samples of batches that the scraper has read in part; settle moves them to repeats
	excused map[heldSample]bool // samples that need not arrive at a twin: the other twin read them before this scraper's session began, or they were evicted
	drains  bool                // set while the scraper reads all samples undisturbed: nothing else happens during its scrapes
}

// noteRepeats looks at the batches that the session has served in part, and adds their served
// samples to c.partly. A new session serves these samples again, because it begins such a batch
// anew.
func (m *scrapeModel) noteRepeats(c *modelConsumer) {
	if c.session == nil {
		return
	}
	for _, site := range m.store.sitesByID() {
		site.View(func(held *SiteSamples) {
			for _, at := range []ReadPosition{c.session.confirmed[site.Key], c.session.served[site.Key]} {
				for _, b := range held.Batches {
					if b.Seq > at.Seq {
						for i := range at.PartialReadOf(b) {
							c.partly = append(c.partly, heldSample{string(held.Table.Line(b.IDs[i])), b.Time(i)})
						}
					}
				}
			}
		})
	}
}

// disconnect ends the consumer's connection. Received samples that the consumer has not confirmed
// no longer count as received.
func (m *scrapeModel) disconnect(c *modelConsumer) {
	m.noteRepeats(c)
	c.conn, c.session, c.last = nil, nil, nil
	c.settle()
}

// settle allows the store to serve the samples of c.partly again.
func (c *modelConsumer) settle() {
	for _, s := range c.partly {
		c.repeats[s] = true
	}
	c.partly = nil
}

// readForGood returns the samples that the consumer has read and that the store may not serve
// again.
func (c *modelConsumer) readForGood() map[heldSample]bool {
	read := maps.Clone(c.read)
	maps.DeleteFunc(read, func(s heldSample, _ bool) bool { return c.repeats[s] })
	return read
}

// scrapeModel is one run of the model: a store, its consumers, and the samples that the store
// accepted.
type scrapeModel struct {
	t         *testing.T
	rng       *rand.Rand
	fsys      *crashFS
	kit       *storeKit
	store     *Store
	accepted  map[heldSample]string // pushed sample → site
	consumers []*modelConsumer
	values    float64 // value of the newest sample; each sample has its own value
}

func (m *scrapeModel) randomSite() string { return fmt.Sprint("c", m.rng.IntN(4)) }

// push pushes new and late samples for a site.
func (m *scrapeModel) push(id string) {
	var points []point
	for range 1 + m.rng.IntN(12) {
		ago := m.rng.IntN(8)
		if m.rng.IntN(10) == 0 {
			ago = m.rng.IntN(3000)
		}
		m.values++
		points = append(points, point{[]string{"x", "y"}[m.rng.IntN(2)], m.rng.IntN(3), m.kit.clock.ms(ago), m.values})
	}
	p := storePush(id, points...)
	before := heldOf(m.t, m.store, id)
	if _, err := m.store.Append(context.Background(), id, p, ScrapeNames{}, false); err != nil {
		m.t.Fatal(err)
	}
	after := heldOf(m.t, m.store, id)
	for _, s := range p.Samples {
		key := heldSample{string(p.Line(s)), s.T}
		_, was := before[key]
		if _, is := after[key]; is && !was && m.accepted[key] != "" {
			// The sample had been evicted. So the store accepts it as new, and serves it again.
			for _, c := range m.consumers {
				c.repeats[key] = true
			}
		}
		m.accepted[key] = id // a conflicting sample has the same key; the store holds the first value
	}
}

// scrape makes one scrape of a consumer and checks the answer. If lost is true, the consumer does
// not receive the answer. scrape returns how many unread samples the store served, and whether the
// store has more.
func (m *scrapeModel) scrape(c *modelConsumer, limit int, onePerSeries, lost bool) (unread int, more bool) {
	if c.conn == nil {
		c.conn = &AnswerReadTracker{}
	}
	r, _, err := m.store.Consumers.BeginScrape(ConsumerKey(c.name, "", ""), c.name, "", c.conn, m.kit.clock.Now())
	if err != nil {
		m.t.Fatal(err)
	}
	m.confirmLast(c, r)
	x := scraper(m.store, 10*time.Minute)
	x.start = m.rng.Float64()
	newestBefore := m.newest()
	if !c.drains {
		x.Owned = m.meanwhile
	}
	fams, unread, more := x.ServeUnreadAndNewest(r, limit, onePerSeries, nil)
	newestAfter := m.newest()
	isNewest := func(s heldSample) bool { return s.t == newestBefore[s.line] || s.t == newestAfter[s.line] }
	m.checkScrape(c, fams, limit, unread, onePerSeries, isNewest)
	if lost {
		m.disconnect(c)
	}
	return unread, more
}

// confirmLast records that the scrape of session r confirms the samples of the previous scrape on
// the same connection.
func (m *scrapeModel) confirmLast(c *modelConsumer, r *ConsumerSession) {
	if r != c.session {
		if c.session != nil { // the store forgot the old session, because the consumer had too many connections
			m.noteRepeats(c)
			c.last = nil
		}
		for _, twin := range m.consumers {
			if twin != c && twin.name == c.name {
				maps.Copy(c.excused, twin.read)
			}
		}
	}
	for _, s := range c.last {
		c.read[s] = true
		delete(c.repeats, s)
	}
	c.last, c.session = nil, r
	c.settle()
}

// checkScrape checks the samples of an answer, and makes them c.last. Each sample must have been
// pushed. The samples of a series must ascend in time. The answer may have a sample that the
// consumer has read only if the sample is in c.repeats or is the newest of its series.
func (m *scrapeModel) checkScrape(c *modelConsumer, fams []Family, limit, unread int, onePerSeries bool, isNewest func(heldSample) bool) {
	n, fresh := 0, 0
	for _, f := range fams {
		last := map[string]int64{} // time of the last sample of each line
		for l := range f.Samples {
			s := heldSample{string(l.Line), l.T}
			n++
			if _, ok := m.accepted[s]; !ok {
				m.t.Fatalf("consumer %s is served %v, which was never pushed", c.name, s)
			}
			if before, twice := last[s.line]; twice && (before >= s.t || onePerSeries) {
				m.t.Fatalf("consumer %s: %s at %d follows %d in one scrape", c.name, s.line, s.t, before)
			}
			last[s.line] = s.t
			if !c.read[s] {
				if !c.excused[s] {
					fresh++
				}
			} else if !c.repeats[s] && !isNewest(s) {
				m.t.Fatalf("consumer %s is served %v again, which is not the newest of its series", c.name, s)
			}
			c.last = append(c.last, s)
		}
	}
	if n > limit || fresh > unread {
		m.t.Fatalf("consumer %s: %d samples with a limit of %d; %d are new to it, and the store counts %d as unread", c.name, n, limit, fresh, unread)
	}
}

// newest returns the time of the newest sample of each line, by line.
func (m *scrapeModel) newest() map[string]int64 {
	all := map[string]int64{}
	m.store.ForEachSite(0, func(site *Site) bool {
		site.View(func(held *SiteSamples) {
			for s := range samplesIn(newestSince(held.Table, math.MinInt64)) {
				all[s.line] = s.t
			}
		})
		return true
	})
	return all
}

// meanwhile sometimes changes a site during a scrape: it pushes to the site, rewrites its log or
// evicts its batches. AllSitesReader calls meanwhile as its Owned function. So it always returns
// true.
func (m *scrapeModel) meanwhile(uint64) bool {
	id := m.randomSite()
	if m.rng.IntN(4) > 0 {
		return true
	}
	switch m.rng.IntN(3) {
	case 0:
		m.push(id)
	case 1:
		m.rewrite(id)
	default:
		m.evict(id)
	}
	return true
}

func (m *scrapeModel) find(id string) *Site {
	m.store.mu.RLock()
	defer m.store.mu.RUnlock()
	return m.store.sites[id]
}

// rewrite rewrites the log of a site without its expired samples.
func (m *scrapeModel) rewrite(id string) {
	s := m.find(id)
	if s == nil {
		return
	}
	if err := s.Lock(context.Background()); err != nil {
		m.t.Fatal(err)
	}
	defer s.Unlock()
	if err := s.RewriteLog(nil, m.store.KeptSince()); err != nil {
		m.t.Fatal(err)
	}
}

// evict evicts batches of a site until the store refuses to. The batches may have samples that only
// one of the twins has read, because the store takes the twins for one consumer.
func (m *scrapeModel) evict(id string) {
	s := m.find(id)
	for evicted := s != nil; evicted; {
		var oldest []heldSample
		s.View(func(held *SiteSamples) {
			if len(held.Batches) > 0 {
				b := held.Batches[0]
				for i, n := range b.IDs {
					oldest = append(oldest, heldSample{string(held.Table.Line(n)), b.Time(i)})
				}
			}
		})
		if _, evicted = s.TryEvictOldestBatch(m.kit.clock.ms(5)); evicted {
			for _, c := range m.consumers {
				for _, key := range oldest {
					c.excused[key] = c.excused[key] || c.name == "twins"
				}
			}
		}
	}
}

// step makes one random event happen, such as a push, a scrape or a restart.
func (m *scrapeModel) step() {
	c := m.consumers[m.rng.IntN(len(m.consumers))]
	switch k := m.rng.IntN(100); {
	case k < 35:
		m.push(m.randomSite())
	case k < 75:
		m.scrape(c, []int{1, 3, 10, 1000}[m.rng.IntN(4)], m.rng.IntN(3) == 0, m.rng.IntN(6) == 0)
	case k < 80:
		m.kit.clock.Add(time.Duration(m.rng.IntN(20)) * time.Second)
	case k < 84:
		m.store.expireAndCompact(context.Background(), m.rng.IntN(2) == 0)
	case k < 90:
		m.rewrite(m.randomSite())
	case k < 92:
		m.evict(m.randomSite())
	case k < 96:
		m.saveCursors()
	default:
		m.restart(m.rng.IntN(2) == 0)
	}
}

// saveCursors saves the cursors of all consumers. A cursor on disk covers whole batches only.
func (m *scrapeModel) saveCursors() {
	saveConsumers(m.t, m.store.Consumers)
	for _, c := range m.consumers {
		c.saved = c.readForGood()
		onDisk := *c
		onDisk.partly = slices.Clone(c.partly)
		m.noteRepeats(&onDisk)
		for _, s := range onDisk.partly {
			delete(c.saved, s)
		}
	}
}

// restart ends the process, by a crash of the machine or by Close, and opens the store as a new
// process.
func (m *scrapeModel) restart(crash bool) {
	for _, c := range m.consumers {
		m.disconnect(c)
	}
	if crash {
		m.fsys.crash()
		for _, c := range m.consumers {
			for s := range c.read {
				if !c.saved[s] { // the sample is past the cursor on disk
					c.repeats[s] = true
				}
			}
		}
	} else if err := m.store.Close(); err != nil {
		m.t.Fatal(err)
	}
	m.fsys.restart()
	m.store = m.kit.open()
	for _, c := range m.consumers {
		c.saved = c.readForGood()
	}
}

// drain has a consumer scrape, while nothing else happens, until the store has no more unread
// samples. Then the consumer must have every accepted sample, except for the excused samples.
func (m *scrapeModel) drain(c *modelConsumer) {
	c.drains = true
	for n := 0; ; n++ {
		_, more := m.scrape(c, 7, n%2 == 0, false)
		if !more {
			break
		}
		if n > 10_000 {
			m.t.Fatalf("consumer %s does not get all samples in %d scrapes", c.name, n)
		}
	}
	m.scrape(c, 1000, false, false)
	m.scrape(c, 1000, false, false)
	for s, id := range m.accepted {
		if !c.read[s] && !c.excused[s] {
			m.t.Errorf("consumer %s never got %v of site %s", c.name, s, id)
		}
	}
}

// Every consumer gets every accepted sample. A sample that a consumer confirmed comes again only as
// the newest sample of its series, or if it is in modelConsumer.repeats, for example after a crash.
// Two scrapers that share a consumer's name each get the samples that neither scraper had confirmed
// when their connections began, except for evicted samples.
func TestSweepConsumers(t *testing.T) {
	sweep(t)
	for seed := range testSeeds(t, 60) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			fsys := newStoreFS(seed)
			m := &scrapeModel{
				t: t, rng: rand.New(rand.NewPCG(seed, 7)), fsys: fsys, kit: newStoreKit(t, fsys),
				accepted: map[heldSample]string{},
			}
			m.store = m.kit.open()
			for _, name := range []string{"p0", "p1", "twins", "twins"} {
				m.consumers = append(m.consumers, &modelConsumer{
					name: name, read: map[heldSample]bool{}, saved: map[heldSample]bool{}, repeats: map[heldSample]bool{}, excused: map[heldSample]bool{},
				})
			}
			// Every consumer scrapes once before the steps, because eviction spares unread samples
			// only for consumers that the store knows.
			for _, c := range m.consumers {
				m.scrape(c, 1, false, true)
			}
			saveConsumers(t, m.store.Consumers)
			for range 300 {
				m.step()
			}
			for _, c := range m.consumers {
				m.drain(c)
			}
			m.kit.wantNoErrors("at the end")
		})
	}
}
