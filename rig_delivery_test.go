package main

// A model of delivery from end to end, in virtual time: two sites, three servers and three
// consumers. A seed chooses the steps and the faults. The code under test is real: spoolIndex,
// spoolMeta, Store, Site, SiteSamples, SiteSpools, Consumers and AllSitesReader. The disks, the
// connections and the handlers of requests are simulated, so that one run takes about a
// millisecond. The model records which samples each consumer received, and checks the answers of
// servers against that record.

import (
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

var deliveryFlag = flag.Int("delivery", 8_000, "number of runs of TestSweepDelivery; run i, from 0, has the seed -seed plus i")

const (
	deliveryRetention = 2 * time.Hour
	deliverySlack     = 5 * time.Second // tolerance for the age of a consumer's last scrape, because requests carry ages in whole seconds

	modelSites, modelServers, modelConsumers = 2, 3, 3
)

// Under random faults of servers, disks and connections, a server lists a scrape as held only if it
// stored the scrape, and as read only if every consumer that must read the scrape received it (see
// counts). Samples that expired, were evicted or were refused by a server with a wrong clock are
// excepted. An answer removes a scrape from a spool only if it lists the scrape as read, or as held
// while the server knows no consumer. If all clocks are right, consumers 0 and 2 get the samples
// that are in the spools after the last fault, unless the samples expire, are evicted or are
// dropped by a limit of the spool.
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
				steps.Add(int64(m.steps & (allHere - 1)))
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
		t.Fatalf("run %d: %s\nto repeat this run: go test -run '^TestSweepDelivery$' . -args -delivery 1 -seed %d\n%s", f.run, f.why, f.seed, strings.Join(m.trace, "\n"))
	}
	t.Logf("%d runs with %d steps took %v", *deliveryFlag, steps.Load(), time.Since(begin).Round(time.Millisecond))
}

// deliveryFailure describes the first run that was found to fail.
type deliveryFailure struct {
	seed uint64
	why  string
	run  int64 // number of the run, counted from 1
}

// allHere is added to deliveryModel.steps in the last phase. steps is then so high that all
// consumers have begun to scrape and consumer 1 is dead.
const allHere = 1 << 20

// deliveryModel is one run. Times are in ms. Sites, servers and consumers are numbered from 0. The
// field lo of a site or server has a time for each consumer: the site or server knows that the
// consumer scraped at that time or later. No site and no server can know of a scrape of the
// consumer later than the time of the consumer in hi. A time of 0 means no scrape.
type deliveryModel struct {
	rng       *rand.Rand
	now       int64 // the right time; a server's clock may differ
	steps     int   // number of steps so far; plus allHere in the last phase
	sites     [modelSites]*modelSite
	servers   [modelServers]*modelServer
	consumers [modelConsumers]*modelReader
	owner     [modelSites]int       // by site: number of the server that owns the site
	samples   []modelSample         // by sample ID; the value of a sample is its ID
	skewed    bool                  // the clock of server 0 is wrong
	calm      bool                  // the run is in its last phase, which has no faults
	requests  int                   // maximum number of requests and waits in one call of drain
	loss      int                   // percent of requests and of answers that are lost
	hi        [modelConsumers]int64 // by consumer: latest time of a scrape that a site or server can know of
	tracing   bool
	trace     []string
}

// modelSample is a sample that a site's source produced.
type modelSample struct {
	site, series int
	t            int64
}

// modelFailure is the panic value of deliveryModel.fail.
type modelFailure string

// newDeliveryModel returns the model of one run. If tracing is true, the model records what
// happens, so that a failure message can show it.
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

// chance returns true with a probability of percent in 100.
func (m *deliveryModel) chance(percent int) bool { return m.rng.IntN(100) < percent }

// lost reports whether the network loses the next request or answer.
func (m *deliveryModel) lost() bool { return !m.calm && m.chance(m.loss) }

// timeAt returns the present time on a server's clock.
func (m *deliveryModel) timeAt(s *modelServer) time.Time { return time.UnixMilli(m.now + s.ahead) }

func (m *deliveryModel) say(format string, args ...any) {
	m.trace = append(m.trace, time.UnixMilli(m.now).UTC().Format("02 15:04:05 ")+fmt.Sprintf(format, args...))
}

// fail ends the run with the formatted text as its failure. It does not return.
func (m *deliveryModel) fail(format string, args ...any) {
	panic(modelFailure(fmt.Sprintf(format, args...)))
}

// run makes 25 to 74 random steps and then the last phase. It returns the text of the failure, or
// "" if the run succeeded.
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

// pass lets some time pass: mostly up to a minute, seldom up to 26 hours.
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

// step does something at random: for example, a site scrapes its source and pushes, a consumer
// scrapes servers, a server stops or starts, or a spool is lost. Sometimes it does nothing.
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
				m.say("the disk of %s is copied", s.name)
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

// modelReader is a consumer of the model.
type modelReader struct {
	at       int // number of the consumer
	name     string
	key      uint64
	comes    int                // number of the step from which on the consumer scrapes
	dies     int                // number of the step from which on the consumer no longer scrapes
	conns    [modelServers]*int // by server: identity of the consumer's connection; a new pointer is a new connection
	received []bool             // by sample ID: the consumer received the sample
}

// scrape has consumer x scrape server s once, unless s is down or x does not scrape at this step.
// It returns true if the answer moved the session's read position at some site. Another scrape on
// the same connection then confirms that position.
func (m *deliveryModel) scrape(x *modelReader, s *modelServer) (served bool) {
	if !s.up || m.steps < x.comes || m.steps >= x.dies {
		return false
	}
	r, _, err := s.store.Consumers.BeginScrape(x.key, x.name, "127.0.0.1", x.conns[s.at], m.timeAt(s))
	if err != nil {
		m.fail("%v", err)
	}
	s.lo[x.at], m.hi[x.at] = m.now, m.now
	if s.store.Consumers.isListUnsaved() {
		m.saveConsumers(s)
	}
	limit := 0
	if !m.calm && m.chance(30) {
		limit = 1 + m.rng.IntN(3)
	}
	fams, _, _ := storeScraper{s.scraper}.ServeUnreadAndNewest(r, limit, !m.calm && m.chance(10), nil)
	lost := m.lost()
	var got []int
	for _, f := range fams {
		for l := range f.Samples {
			got = append(got, int(l.V))
			x.received[int(l.V)] = x.received[int(l.V)] || !lost
		}
	}
	if m.tracing {
		m.say("%s scrapes %s: samples %v, answer lost %t", x.name, s.name, got, lost)
	}
	if lost || !m.calm && m.chance(10) {
		x.conns[s.at] = new(int)
	}
	return len(r.served) > 0
}

// end is the last phase, without faults. If all clocks are right, it checks that consumers 0 and 2
// receive the samples of the scrapes in the spools, and that these scrapes then leave the spools.
// Samples that expire, are evicted or are dropped by a limit of the spool are excepted. Consumer 1
// is dead.
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
	m.steps |= allHere
	// The first call of rounds takes less than 30 minutes. So samples that are not older than
	// oldest do not expire during the call.
	oldest := m.now - (deliveryRetention - 30*time.Minute).Milliseconds()
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
	// Consumer 1 does not scrape the servers for the retention time, so that it no longer counts.
	// Then each client with scrapes in its spool scrapes its source once more. Consumers 0 and 2
	// read the new batches, so that their cursors move past batches that expired unread.
	m.now += deliveryRetention.Milliseconds() + 60_000
	m.requests = 10
	for _, c := range m.sites {
		if len(c.plan.entries) > 0 {
			c.last = nil // so that the new scrape repeats no samples of an earlier scrape
			m.scrapeSource(c)
		}
	}
	m.rounds()
	for _, c := range m.sites {
		for _, e := range c.plan.entries {
			if !m.skewed && slices.ContainsFunc(c.scrapes[e.Number].samples, func(id int) bool { return m.samples[id].t >= oldest }) {
				m.fail("scrape %d stays in the spool of %s although all consumers could read it", e.Number, c.name)
			}
		}
	}
}

// rounds lets three push intervals pass, or fewer if the spools become empty before. In each
// interval the sites push, consumers 0 and 2 scrape all servers, and the sites ask which scrapes
// were read.
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
