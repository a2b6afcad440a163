package main

// A consumer gets every sample once and in order, whatever happens to
// its connections, its limits, the store's files and the process; a model says what it
// must have had.

import (
	"context"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// modelConsumer is a scraper, and what it knows.
type modelConsumer struct {
	name  string
	conn  *AnswerReadTracker
	had   map[heldSample]bool // read to the end, and confirmed
	saved map[heldSample]bool // had when the cursors were last saved
	may   map[heldSample]bool // of had, may come again
	last  []heldSample        // of the last scrape, not confirmed
	part  []heldSample        // may come again, once what is served is confirmed
	place *ConsumerSession
	other map[heldSample]bool // had by its twin when its connection began

	drains bool // undisturbed
}

// again notes that batches that are had or served in part may come again from their
// beginning: what is had of them is known by the connection alone.
func (m *scrapeModel) again(c *modelConsumer) {
	if c.place == nil {
		return
	}
	for _, site := range m.store.sitesByID() {
		site.View(func(held *SiteSamples) {
			for _, at := range []ReadPosition{c.place.confirmed[site.Key], c.place.served[site.Key]} {
				for _, b := range held.Batches {
					if b.Seq > at.Seq {
						for i := range at.PartialReadOf(b) {
							c.part = append(c.part, heldSample{string(held.Table.Line(b.IDs[i])), b.Time(i)})
						}
					}
				}
			}
		})
	}
}

// lose ends the connection.
func (m *scrapeModel) lose(c *modelConsumer) {
	m.again(c)
	c.conn, c.place, c.last = nil, nil, nil
	c.settle()
}

// certain returns what was had and may not come again.
func (c *modelConsumer) certain() map[heldSample]bool {
	had := maps.Clone(c.had)
	maps.DeleteFunc(had, func(s heldSample, _ bool) bool { return c.may[s] })
	return had
}

func (c *modelConsumer) settle() {
	for _, s := range c.part {
		c.may[s] = true
	}
	c.part = nil
}

type scrapeModel struct {
	t         *testing.T
	rng       *rand.Rand
	fsys      *crashFS
	kit       *storeKit
	store     *Store
	accepted  map[heldSample]string // → site
	consumers []*modelConsumer
	values    float64
}

func (m *scrapeModel) push() { m.pushTo(fmt.Sprint("c", m.rng.IntN(4))) }

func (m *scrapeModel) pushTo(id string) {
	var points []point
	for range 1 + m.rng.IntN(12) {
		ago := m.rng.IntN(8)
		if m.rng.IntN(10) == 0 {
			ago = m.rng.IntN(3000) // late
		}
		m.values++
		points = append(points, point{[]string{"x", "y"}[m.rng.IntN(2)], m.rng.IntN(3), m.kit.clock.ms(ago), m.values})
	}
	p := storePush(id, points...)
	before := heldOf(m.t, m.store, id)
	if _, err := m.store.Append(context.Background(), id, p, ScrapeNames{}); err != nil {
		m.t.Fatal(err)
	}
	after := heldOf(m.t, m.store, id)
	for _, s := range p.Samples {
		line := string(p.Line(s))
		key := heldSample{line, s.T}
		_, was := before[key]
		if _, is := after[key]; is && !was && m.accepted[key] != "" { // what was evicted is not known any more
			for _, c := range m.consumers {
				c.may[key] = true
			}
		}
		m.accepted[heldSample{line, s.T}] = id // a repeat is the sample that is held
	}
}

// scrape is one scrape of a consumer; lost says that its answer does not arrive.
func (m *scrapeModel) scrape(c *modelConsumer, limit int, single, lost bool) (unread int, more bool) {
	t := m.t
	if c.conn == nil {
		c.conn = &AnswerReadTracker{}
	}
	r, _, err := m.store.Consumers.BeginScrape(ConsumerKey(c.name, "", ""), c.name, "", c.conn, m.kit.clock.Now())
	if err != nil {
		t.Fatal(err)
	}
	if r != c.place {
		if c.place != nil { // too many others came: the connection is not known any more
			m.again(c)
			c.last = nil
		}
		for _, twin := range m.consumers {
			if twin != c && twin.name == c.name {
				maps.Copy(c.other, twin.had)
			}
		}
	}
	for _, s := range c.last {
		c.had[s] = true
		delete(c.may, s)
	}
	c.last, c.place = nil, r
	c.settle()
	x := scraper(m.store, 10*time.Minute)
	x.start = m.rng.Float64()
	newest := m.newest()
	if !c.drains {
		x.Owned = m.meanwhile
	}
	fams, unread, more := x.ServeUnreadAndNewest(r, limit, single, nil)
	newer := m.newest()
	n, fresh := 0, 0
	for _, f := range fams {
		series := map[string]int64{}
		for _, l := range f.Samples {
			s := heldSample{string(l.Line), l.T}
			n++
			if _, ok := m.accepted[s]; !ok {
				t.Fatalf("%s is served %v, which nobody pushed", c.name, s)
			}
			if before, twice := series[s.line]; twice && (before >= s.t || single) {
				t.Fatalf("%s: %s at %d after %d in one scrape", c.name, s.line, s.t, before)
			}
			series[s.line] = s.t
			if !c.had[s] {
				if !c.other[s] {
					fresh++
				}
			} else if !c.may[s] && s.t != newest[s.line] && s.t != newer[s.line] {
				t.Fatalf("%s is served %v again, which is not the newest", c.name, s)
			}
			c.last = append(c.last, s)
		}
	}
	if n > limit || fresh > unread {
		t.Fatalf("%s: %d lines, %d of them new, %d unread, limit %d", c.name, n, fresh, unread, limit)
	}
	if lost {
		m.lose(c)
	}
	return unread, more
}

// newest returns the time of the newest sample known of each line.
func (m *scrapeModel) newest() map[string]int64 {
	all := map[string]int64{}
	m.store.ForEachSite(0, func(_ uint64, held *SiteSamples) bool {
		held.Table.ForEachNewestSince(math.MinInt64, func(_ uint32, _ string, l FamilySample) { all[string(l.Line)] = l.T })
		return true
	})
	return all
}

// meanwhile lets others be busy with a site while a scrape is at another.
func (m *scrapeModel) meanwhile(scraped uint64) bool {
	id := fmt.Sprint("c", m.rng.IntN(4))
	if SiteKey(id) == scraped || m.rng.IntN(4) > 0 {
		return true
	}
	switch m.rng.IntN(3) {
	case 0:
		m.pushTo(id)
	case 1:
		m.rewrite(id)
	default:
		m.evict(id)
	}
	return true
}

// rewrite compacts a log in the middle of whatever is going on.
func (m *scrapeModel) rewrite(id string) {
	m.store.mu.RLock()
	s := m.store.sites[id]
	m.store.mu.RUnlock()
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

// evict drops what may go for want of room: what one of the twins had, too.
func (m *scrapeModel) evict(id string) {
	m.store.mu.RLock()
	s := m.store.sites[id]
	m.store.mu.RUnlock()
	for ok := s != nil; ok; {
		var oldest []heldSample
		s.View(func(held *SiteSamples) {
			if len(held.Batches) > 0 {
				b := held.Batches[0]
				for i, n := range b.IDs {
					oldest = append(oldest, heldSample{string(held.Table.Line(n)), b.Time(i)})
				}
			}
		})
		if _, ok = s.TryEvictOldestBatch(m.kit.clock.ms(5)); ok {
			for _, c := range m.consumers {
				for _, key := range oldest {
					c.other[key] = c.other[key] || c.name == "twins"
				}
			}
		}
	}
}

func (m *scrapeModel) step() {
	c := m.consumers[m.rng.IntN(len(m.consumers))]
	switch k := m.rng.IntN(100); {
	case k < 35:
		m.push()
	case k < 75:
		m.scrape(c, []int{1, 3, 10, 1000}[m.rng.IntN(4)], m.rng.IntN(3) == 0, m.rng.IntN(6) == 0)
	case k < 80:
		m.kit.clock.Add(time.Duration(m.rng.IntN(20)) * time.Second)
	case k < 84:
		m.store.expireAndCompact(context.Background(), m.rng.IntN(2) == 0)
	case k < 90:
		m.rewrite(fmt.Sprint("c", m.rng.IntN(4)))
	case k < 92:
		m.evict(fmt.Sprint("c", m.rng.IntN(4)))
	case k < 96:
		if err := m.store.Consumers.Save(); err != nil {
			m.t.Fatal(err)
		}
		for _, c := range m.consumers {
			c.saved = c.certain()
			place := *c // on disk there is no half of a batch
			place.part = slices.Clone(c.part)
			m.again(&place)
			for _, s := range place.part {
				delete(c.saved, s)
			}
		}
	default:
		m.restart(m.rng.IntN(2) == 0)
	}
}

// restart ends the process, in good order or not.
func (m *scrapeModel) restart(crash bool) {
	for _, c := range m.consumers {
		m.lose(c)
	}
	if crash {
		m.fsys.crash()
		for _, c := range m.consumers {
			// Samples above the saved cursor may be served again, which is no fault.
			for s := range c.had {
				if !c.saved[s] {
					c.may[s] = true
				}
			}
		}
	} else if err := m.store.Close(); err != nil {
		m.t.Fatal(err)
	}
	m.fsys.restart()
	m.store = m.kit.open()
	for _, c := range m.consumers {
		c.saved = c.certain()
	}
}

// Every sample that was accepted comes to every consumer, and once confirmed does not
// come again but as the newest of its series. Two that look like one consumer each get
// what neither had confirmed when their connections began.
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
					name: name, had: map[heldSample]bool{}, saved: map[heldSample]bool{}, may: map[heldSample]bool{}, other: map[heldSample]bool{},
				})
			}
			// Every consumer scrapes once, because eviction spares samples only for
			// consumers that are known.
			for _, c := range m.consumers {
				m.scrape(c, 1, false, true)
			}
			if err := m.store.Consumers.Save(); err != nil {
				t.Fatal(err)
			}
			for range 300 {
				m.step()
			}
			for _, c := range m.consumers {
				c.drains = true
				for n := 0; ; n++ {
					_, more := m.scrape(c, 7, n%2 == 0, false)
					if !more {
						break
					}
					if n > 10_000 {
						t.Fatalf("%s never has it all", c.name)
					}
				}
				m.scrape(c, 1000, false, false)
				m.scrape(c, 1000, false, false)
				for s, id := range m.accepted {
					if !c.had[s] && !c.other[s] {
						t.Errorf("%s never had %v of %s", c.name, s, id)
					}
				}
			}
			if len(m.kit.errors) > 0 {
				t.Error(m.kit.errors)
			}
		})
	}
}

// With a limit, a site that has much does not keep the others waiting.
func TestUnreadIsFair(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	var flood []point
	for i := range 500 {
		flood = append(flood, point{"x", i % 10, k.clock.ms(3000) + int64(i), 1})
	}
	k.push(s, "flood", flood...)
	for i := range 9 {
		k.push(s, fmt.Sprint("small", i), point{"x", 1, k.clock.ms(1), 1}, point{"x", 2, k.clock.ms(1), 1})
	}
	r, _, err := s.Consumers.BeginScrape(1, "c", "", &AnswerReadTracker{}, k.clock.Now())
	if err != nil {
		t.Fatal(err)
	}
	fams, unread, more := scraper(s, time.Hour).ServeUnreadAndNewest(r, 100, false, nil)
	count := map[bool]int{}
	for _, f := range fams {
		for _, l := range f.Samples {
			count[strings.Contains(string(l.Line), "small")]++
		}
	}
	if count[true] != 18 || count[false] > 82 || count[false] < 70 || unread > 100 || !more {
		t.Errorf("of small sites %d, of the flood %d; unread %d, more %t", count[true], count[false], unread, more)
	}
}

// With a limit below the number of sites each has its turn, with what was not had
// as with the newest again.
func TestUnreadRotates(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	x := scraper(s, time.Hour)
	conn := &AnswerReadTracker{}
	push := func() {
		k.clock.Add(time.Second)
		for c := range 10 {
			k.push(s, fmt.Sprint("c", c), point{"x", 1, k.clock.ms(0), 1})
		}
	}
	scrape := func(limit int, seen map[string]int) {
		r, _, err := s.Consumers.BeginScrape(1, "c", "", conn, k.clock.Now())
		if err != nil {
			t.Fatal(err)
		}
		fams, _, _ := x.ServeUnreadAndNewest(r, limit, false, nil)
		for _, f := range fams {
			for _, l := range f.Samples {
				seen[string(l.Line)]++
			}
		}
	}
	unread, again := map[string]int{}, map[string]int{}
	for range 40 {
		push()
		scrape(3, unread)
	}
	for range 2 {
		scrape(0, map[string]int{})
	}
	for range 40 {
		scrape(3, again)
	}
	for what, seen := range map[string]map[string]int{"not had": unread, "the newest again": again} {
		if len(seen) != 10 || slices.Min(slices.Collect(maps.Values(seen))) < 5 {
			t.Errorf("%s: 40 scrapes showed %v", what, seen)
		}
	}
}

func TestFairShare(t *testing.T) {
	for _, test := range []struct {
		wants       []int
		limit, want int
	}{
		{[]int{10, 10}, 10, 5},
		{[]int{1, 100, 100}, 21, 10},
		{[]int{100}, 7, 7},
		{[]int{5, 5, 5}, 2, 1},
	} {
		if got := fairShare(slices.Clone(test.wants), test.limit); got != test.want {
			t.Errorf("%v, %d: %d, want %d", test.wants, test.limit, got, test.want)
		}
	}
}

// Two that look like one consumer each go on where they were; who comes anew goes on
// where the others have been.
func TestConsumerConnections(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	conns := [3]*AnswerReadTracker{{}, {}, {}}
	n := 0
	scrape := func(conn int) (got string, repeated bool) {
		t.Helper()
		r, repeated, err := s.Consumers.BeginScrape(1, "c", "", conns[conn], k.clock.Now())
		if err != nil {
			t.Fatal(err)
		}
		x := scraper(s, 0) // without the newest again
		fams, _, _ := x.ServeUnreadAndNewest(r, 0, false, nil)
		for _, f := range fams {
			for _, l := range f.Samples {
				got += fmt.Sprint(l.V, " ")
			}
		}
		return got, repeated
	}
	push := func() {
		n++
		k.push(s, "a", point{"x", 1, k.clock.ms(100 - n), float64(n)})
	}
	push()
	for i, step := range []struct {
		conn     int
		want     string
		repeated bool
	}{
		{0, "1 ", false},
		{1, "1 2 ", true}, // not yet confirmed by the first
		{0, "2 3 ", false},
		{1, "3 4 ", false},
		{0, "4 5 ", false},
		{2, "4 5 6 ", true}, // 3 was confirmed when the first came again
		{0, "6 7 ", false},
		{2, "7 8 ", false},
	} {
		got, repeated := scrape(step.conn)
		if got != step.want || repeated != step.repeated {
			t.Errorf("step %d: got %q, repeated %t; want %q, %t", i, got, repeated, step.want, step.repeated)
		}
		push()
	}
	// A site that appears now is new to each.
	for range 4 {
		for conn := range conns {
			scrape(conn)
		}
	}
	k.push(s, "b", point{"x", 1, k.clock.ms(1), -1})
	for conn := range conns {
		if got, _ := scrape(conn); got != "-1 " {
			t.Errorf("connection %d gets %q of the new site", conn, got)
		}
		scrape(conn)
	}
}

// A consumer in the middle of a batch goes on there when the log is compacted, and
// begins again only with a batch that retention made shorter.
func TestConsumerInMiddleOfBatch(t *testing.T) {
	for _, test := range []struct {
		older int // samples that retention drops
		want  []string
	}{
		{0, []string{"0 1 2 3 ", "4 5 6 7 ", "8 9 "}},
		{2, []string{"2 3 4 5 ", "2 3 4 5 ", "6 7 8 9 "}},
	} {
		k := newStoreKit(t, newStoreFS(1))
		s := k.open()
		points := []point{{"x", 100, k.clock.ms(7100), 100}} // of no batch below: IDs change
		k.push(s, "a", points...)
		s.sites["a"].TryEvictOldestBatch(math.MaxInt64)
		points = points[:0]
		for i := range 10 {
			ago := 10
			if i < test.older {
				ago = 7190
			}
			points = append(points, point{"x", i, k.clock.ms(ago), float64(i)})
		}
		k.push(s, "a", points...)
		k.clock.Add(20 * time.Second)
		conn := &AnswerReadTracker{}
		for i, want := range test.want {
			r, _, err := s.Consumers.BeginScrape(1, "c", "", conn, k.clock.Now())
			if err != nil {
				t.Fatal(err)
			}
			fams, _, _ := scraper(s, -time.Second).ServeUnreadAndNewest(r, 4, false, nil)
			got := ""
			for _, f := range fams {
				for _, l := range f.Samples {
					got += fmt.Sprint(l.V, " ")
				}
			}
			if got != want {
				t.Errorf("%d samples dropped, scrape %d: got %q, want %q", test.older, i, got, want)
			}
			site := s.sites["a"]
			if err := site.Lock(context.Background()); err != nil {
				t.Fatal(err)
			}
			if err := site.RewriteLog(nil, s.KeptSince()); err != nil {
				t.Fatal(err)
			}
			site.Unlock()
		}
	}
}

// A cursor that a crash brings back is not past what came meanwhile: neither of a
// site that was forgotten, nor of one whose newest batch is damaged.
func TestConsumersStaleCursor(t *testing.T) {
	for _, forgotten := range []bool{true, false} {
		fsys := newStoreFS(1)
		k := newStoreKit(t, fsys)
		s := k.open()
		had := map[float64]bool{}
		scrape := func() {
			conn := &AnswerReadTracker{}
			for range 2 { // the second confirms the first
				r, _, err := s.Consumers.BeginScrape(1, "c", "", conn, k.clock.Now())
				if err != nil {
					t.Fatal(err)
				}
				fams, _, _ := scraper(s, -time.Second).ServeUnreadAndNewest(r, 0, false, nil)
				for _, f := range fams {
					for _, l := range f.Samples {
						had[l.V] = true
					}
				}
			}
		}
		for i := range 3 {
			k.push(s, "a", point{"x", 1, k.clock.ms(100 - i), float64(i)})
		}
		path := s.logPathOf("a")
		scrape()
		if err := s.Consumers.Save(); err != nil {
			t.Fatal(err)
		}
		if forgotten {
			k.clock.Add(forgetAfter + time.Hour)
			s.expireAndCompact(context.Background(), false)
			if len(s.sites) > 0 {
				t.Fatal("not forgotten")
			}
		}
		fsys.crash() // before the cursors are saved again
		fsys.restart()
		if data, err := fsys.ReadFile(path); !forgotten && err == nil {
			data = slices.Clone(data)
			data[len(data)-1] ^= 1
			fsys.put(path, data)
		}
		for i := range 2 {
			s = k.open()
			k.push(s, "a", point{"x", 1, k.clock.ms(50 - i), float64(10 + i)})
			fsys.crash()
			fsys.restart()
		}
		s = k.open()
		scrape()
		if !had[10] || !had[11] {
			t.Errorf("forgotten %t: had %v", forgotten, had)
		}
	}
}

// The newest samples that were had before come from spare room alone: they never keep
// what was not had waiting, wherever a scrape begins.
func TestUnreadBeforeNewest(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	points := func(n int) (all []point) {
		for i := range n {
			all = append(all, point{"x", i, k.clock.ms(0), 1})
		}
		return all
	}
	const limit = 100
	for i := range 4 {
		k.push(s, fmt.Sprint("had", i), points(40)...)
	}
	for start := range 10 {
		for _, unread := range []int{0, 1, 60, 99, 100, 101, 400} {
			k.clock.Add(time.Minute / 2)
			conn := &AnswerReadTracker{}
			begin := func() *ConsumerSession {
				r, _, err := s.Consumers.BeginScrape(1, "c", "", conn, k.clock.Now())
				if err != nil {
					t.Fatal(err)
				}
				return r
			}
			scraper(s, time.Hour).ServeUnreadAndNewest(begin(), 0, false, nil)
			if unread > 0 {
				k.push(s, "new0", points((unread+1)/2)...)
			}
			if unread > 1 {
				k.push(s, "new1", points(unread/2)...)
			}
			x := scraper(s, time.Hour)
			x.start = float64(start) / 10
			fams, n, more := x.ServeUnreadAndNewest(begin(), limit, false, nil)
			lines := 0
			for _, f := range fams {
				lines += len(f.Samples)
			}
			if n != min(unread, limit) || more != (unread > limit) || lines > limit {
				t.Errorf("start %d, %d not had: got %d of them, more %t, %d in all", start, unread, n, more, lines)
			}
			if unread == 0 && lines < limit/2 {
				t.Errorf("start %d: %d of what was had, with room for %d", start, lines, limit)
			}
			scraper(s, time.Hour).ServeUnreadAndNewest(begin(), 0, false, nil)
			scraper(s, time.Hour).ServeUnreadAndNewest(begin(), 0, false, nil)
		}
	}
}

// BenchmarkUnread: a scrape of 200 sites with 230 series each by a consumer that has not
// had the newest batch of each, has had all, or has an hour to catch up with.
func BenchmarkUnread(b *testing.B) {
	k := newStoreKit(b, nil)
	k.cfg.Dir = ""
	s := k.open()
	const sites, batches = 200, 240
	for range batches {
		k.clock.Add(15 * time.Second)
		for c := range sites {
			id := fmt.Sprint("site-", c)
			p, set := sitePush(id)
			set(k.clock.ms(0))
			if _, err := s.Append(context.Background(), id, p, ScrapeNames{}); err != nil {
				b.Fatal(err)
			}
		}
	}
	places := func(behind uint64) map[uint64]uint64 {
		at := map[uint64]uint64{}
		s.ForEachSite(0, func(hash uint64, held *SiteSamples) bool {
			at[hash] = held.Seq - behind
			return true
		})
		return at
	}
	for _, test := range []struct {
		name   string
		behind uint64
		limit  int
		unread int
	}{
		{"new", 1, 0, sites * 230},
		{"again", 0, 0, 0},
		{"backlog", batches - 1, 100_000, 100_000},
	} {
		b.Run(test.name, func(b *testing.B) {
			confirm(b, s.Consumers, test.name, k.clock.Now(), places(test.behind))
			samples := 0
			b.ReportAllocs()
			before := processCPU(b)
			for b.Loop() {
				r, _, err := s.Consumers.BeginScrape(ConsumerKey(test.name, "::1", ""), test.name, "::1", &AnswerReadTracker{}, k.clock.Now())
				if err != nil {
					b.Fatal(err)
				}
				fams, unread, more := scraper(s, 10*time.Minute).ServeUnreadAndNewest(r, test.limit, false, nil)
				if unread != test.unread || more != (test.limit > 0) {
					b.Fatalf("%d samples, more %t", unread, more)
				}
				for _, f := range fams {
					samples += len(f.Samples)
				}
			}
			b.ReportMetric(float64(samples)/(processCPU(b)-before).Seconds(), "samples/cpu-s")
		})
	}
}
