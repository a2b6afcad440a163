package main

// The rig of the store tests: a clock that tests move, pushes, a store with the errors that it
// reported, the samples that a store or one site holds, and consumers that scrape a store.
// rig_disk_test.go has the disk.

import (
	"context"
	"fmt"
	"hash/maphash"
	"io/fs"
	"maps"
	"math"
	"strings"
	"sync"
	"testing"
	"time"
)

// storeClock is a clock that tests move. It is safe for concurrent use.
type storeClock struct {
	mu  sync.Mutex // guards now
	now time.Time
}

func newStoreClock() *storeClock { return &storeClock{now: time.UnixMilli(1_700_000_000_000)} }

func (c *storeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *storeClock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// ms returns a Unix time in ms: the time of the clock minus the number of seconds in ago.
func (c *storeClock) ms(ago int) int64 { return c.Now().UnixMilli() - int64(ago)*1000 }

// point is a sample of the series name{n="<n>"}, at the Unix time t in ms. storePush adds the other
// labels.
type point struct {
	name string
	n    int
	t    int64
	v    float64
}

// storePush returns a push of the points for site id, as Store.Append accepts it.
func storePush(id string, points ...point) *SampleList {
	p := &SampleList{}
	for _, pt := range points {
		err := p.Add(&RawSample{Name: []byte(pt.name), T: pt.t, V: pt.v, Labels: []Label{
			{[]byte(ClusterLabel), []byte(id)}, {Name: []byte("instance")}, {Name: []byte("job")}, {[]byte("n"), fmt.Append(nil, pt.n)},
		}})
		if err != nil {
			panic(err)
		}
	}
	return p
}

// storeKit has the configuration of a store, the clock that the store uses, and the errors that the
// store reported to OnError.
type storeKit struct {
	t      testing.TB
	clock  *storeClock
	cfg    StoreConfig
	mu     sync.Mutex // guards errors
	errors []error
}

// newStoreKit returns the configuration of a store in directory /s of fsys, with a retention of
// two hours and without limits.
func newStoreKit(t testing.TB, fsys FS) *storeKit {
	k := &storeKit{t: t, clock: newStoreClock()}
	k.cfg = StoreConfig{
		FS: fsys, Dir: "/s", Retention: 2 * time.Hour, MaxSampleAge: 10 * time.Minute, Now: k.clock.Now,
		OnError: func(err error) {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.errors = append(k.errors, err)
		},
	}
	return k
}

// open opens a store with the kit's configuration. The test fails if OpenStore returns an error.
func (k *storeKit) open() *Store {
	k.t.Helper()
	s, err := OpenStore(k.cfg)
	if err != nil {
		k.t.Fatalf("opening the store: %v", err)
	}
	return s
}

// series returns one sample at the present time for each of n series of a name.
func (k *storeKit) series(name string, n int) (points []point) {
	for i := range n {
		points = append(points, point{name, i, k.clock.ms(0), 1})
	}
	return points
}

// tryPush appends the points to site id of s, as a push that names no scrapes.
func (k *storeKit) tryPush(s *Store, id string, points ...point) (AppendResult, error) {
	return s.Append(context.Background(), id, storePush(id, points...), ScrapeNames{}, false)
}

// push appends the points to site id of s. The test fails unless s accepts all of them.
func (k *storeKit) push(s *Store, id string, points ...point) {
	k.t.Helper()
	if res, err := k.tryPush(s, id, points...); err != nil || res.Accepted != len(points) {
		k.t.Fatalf("push for site %s: %+v, %v; want %d samples accepted", id, res, err, len(points))
	}
}

// pushNamed appends the points to site id of s, as a push of the scrapes in names. The test fails
// if s refuses the push.
func (k *storeKit) pushNamed(s *Store, id string, names ScrapeNames, points ...point) AppendResult {
	k.t.Helper()
	res, err := s.Append(context.Background(), id, storePush(id, points...), names, false)
	if err != nil {
		k.t.Fatalf("push of scrapes %s for site %s: %v", names, id, err)
	}
	return res
}

// wantNoErrors fails the test if the store reported an error to OnError.
func (k *storeKit) wantNoErrors(when string) {
	k.t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.errors) > 0 {
		k.t.Errorf("%s: the store reported errors: %v", when, k.errors)
	}
}

// names1 returns the name of scrape n of spool 1.
func names1(n uint64) ScrapeNames { return ScrapeNames{1, Ranges{{n, n}}} }

// rewriteLog rewrites the log of a site without its expired samples, as maintenance does.
func rewriteLog(t testing.TB, s *Store, id string) {
	t.Helper()
	site := s.sites[id]
	if err := site.Lock(context.Background()); err != nil {
		t.Fatal(err)
	}
	defer site.Unlock()
	if err := site.RewriteLog(nil, s.KeptSince()); err != nil {
		t.Fatalf("rewriting the log of site %s: %v", id, err)
	}
}

// evictOldest evicts the oldest batch of a site, whether or not scrapes still show its samples. The
// test fails if the batch may not be evicted, for example because a consumer has not read it.
func evictOldest(t testing.TB, s *Store, id string) {
	t.Helper()
	if _, evicted := s.sites[id].TryEvictOldestBatch(math.MaxInt64); !evicted {
		t.Fatalf("the oldest batch of site %s cannot be evicted", id)
	}
}

// heldSample identifies a sample by its line and its time in ms.
type heldSample struct {
	line string
	t    int64
}

// heldOf returns the samples of a site that are in the memory of s. No call of s may be in
// progress. heldOf also checks that batch numbers ascend, that no sample is held twice, and
// that every line carries the site's cluster ID.
func heldOf(t testing.TB, s *Store, id string) map[heldSample]float64 {
	t.Helper()
	got := map[heldSample]float64{}
	c := s.sites[id]
	if c == nil {
		return got
	}
	seq, samples := uint64(0), int64(0)
	for _, b := range c.data.Batches {
		samples += int64(len(b.V))
		if b.Seq <= seq || b.Seq > c.data.Seq {
			t.Errorf("site %s: batch %d follows batch %d; the newest is %d", id, b.Seq, seq, c.data.Seq)
		}
		seq = b.Seq
		for i, sid := range b.IDs {
			line := string(c.data.Table.Line(sid))
			if !strings.Contains(line, fmt.Sprintf("%s=%q", ClusterLabel, id)) {
				t.Errorf("site %s holds a sample of %q", id, line)
			}
			key := heldSample{line, b.Time(i)}
			if _, twice := got[key]; twice {
				t.Errorf("site %s holds %v twice", id, key)
			}
			got[key] = b.V[i]
		}
	}
	if n := c.data.SampleCount(); n != samples {
		t.Errorf("site %s counts %d samples, its batches have %d", id, n, samples)
	}
	return got
}

// allHeld returns the samples of all sites that are in the memory of s. It checks each site as
// heldOf does, and checks the store's totals of samples and of log bytes.
func allHeld(t testing.TB, s *Store) map[heldSample]float64 {
	t.Helper()
	all := map[heldSample]float64{}
	samples, size := int64(0), int64(0)
	for id, c := range s.sites {
		maps.Copy(all, heldOf(t, s, id))
		samples += c.data.SampleCount()
		if c.log != nil {
			size += c.log.Size()
		}
	}
	if s.totals.Samples.Load() != samples || s.totals.LogBytes.Load() != size {
		t.Errorf("the totals are %d samples and %d log bytes; the sites have %d and %d", s.totals.Samples.Load(), s.totals.LogBytes.Load(), samples, size)
	}
	return all
}

// contents returns the samples of the site c that have not expired.
func contents(c *SiteSamples) map[heldSample]float64 {
	got := map[heldSample]float64{}
	for _, b := range c.Batches {
		for i, id := range b.IDs {
			if b.Time(i) >= c.expiredBefore {
				got[heldSample{string(c.Table.Line(id)), b.Time(i)}] = b.V[i]
			}
		}
	}
	return got
}

// pushed returns the points of site id as heldOf returns them from a store that accepted them.
func pushed(id string, points ...point) map[heldSample]float64 {
	want := map[heldSample]float64{}
	p := storePush(id, points...)
	for _, s := range p.Samples {
		want[heldSample{string(p.Line(s)), s.T}] = s.V
	}
	return want
}

// wantHeld fails the test for every sample of want that is missing in got or has a value with other
// bits in got, and for every sample of got that is not in want.
func wantHeld(t testing.TB, when string, got, want map[heldSample]float64) {
	t.Helper()
	for k, v := range want {
		if g, ok := got[k]; !ok {
			t.Errorf("%s: %v = %v is missing", when, k, v)
		} else if math.Float64bits(g) != math.Float64bits(v) {
			t.Errorf("%s: %v is %v, want %v", when, k, g, v)
		}
	}
	for k, v := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: %v = %v is unexpected", when, k, v)
		}
	}
}

// scraper returns a reader for scrapes of s, on a server that owns all sites. The reader shows
// newest samples up to maxAge old. With a negative maxAge it repeats no sample that the consumer
// has read, unless the sample is from the future.
func scraper(s *Store, maxAge time.Duration) storeScraper {
	return storeScraper{&AllSitesReader{Store: s, MaxSampleAge: maxAge, Now: s.cfg.Now, Owned: func(uint64) bool { return true }}}
}

// storeScraper is an AllSitesReader whose methods return families. Each scrape has its own memory.
type storeScraper struct{ *AllSitesReader }

func (s storeScraper) NewestPerSeries(limit int, match func(line []byte) bool) (families []Family, truncated bool) {
	var g FamilyGrouper
	truncated = s.AllSitesReader.NewestPerSeries(&g, limit, match)
	return g.Families(), truncated
}

func (s storeScraper) ServeUnreadAndNewest(session *ConsumerSession, limit int, onePerSeries bool, match func(line []byte) bool) (families []Family, unreadServed int, moreUnread bool) {
	var g FamilyGrouper
	unreadServed, moreUnread = s.AllSitesReader.ServeUnreadAndNewest(&g, session, limit, onePerSeries, match)
	return g.Families(), unreadServed, moreUnread
}

// newestSince returns the newest samples of the listed series of a table as families.
func newestSince(s *SeriesTable, minT int64) []Family {
	var g FamilyGrouper
	s.addNewestSince(&g, minT)
	g.EndText(s.AppendChunks(nil), nil)
	return g.Families()
}

// shown returns the samples that s serves to a scrape without a consumer's name.
func shown(s *Store, maxAge time.Duration) map[heldSample]float64 {
	fams, _ := scraper(s, maxAge).NewestPerSeries(0, nil)
	return samplesIn(fams)
}

func samplesIn(fams []Family) map[heldSample]float64 {
	got := map[heldSample]float64{}
	for _, f := range fams {
		for l := range f.Samples {
			got[heldSample{string(l.Line), l.T}] = l.V
		}
	}
	return got
}

// sampleCount returns the number of samples of f.
func sampleCount(f Family) (n int) {
	for range f.Samples {
		n++
	}
	return n
}

// valuesIn returns the values of a scrape's samples in the order of the answer, each with a
// space after it.
func valuesIn(fams []Family) (values string) {
	for _, f := range fams {
		for l := range f.Samples {
			values += fmt.Sprint(l.V, " ")
		}
	}
	return values
}

// newStoreFS returns a crashFS that has the store's directory.
func newStoreFS(seed uint64) *crashFS { return newCrashFS(seed, "/s") }

const (
	statePath     = "/s/" + stateFile
	consumersPath = "/s/" + ConsumersFile
)

// putState writes the state file that a server writes at its first start.
func putState(t testing.TB, fsys FS) {
	t.Helper()
	state := openStoreState(t, fsys)
	state.TakeSeqBlock(0)
	if err := state.Write(nil); err != nil {
		t.Fatal(err)
	}
}

// openStoreState reads the state file in fsys, which must not be damaged.
func openStoreState(t testing.TB, fsys FS) *StoreMeta {
	t.Helper()
	state, err := OpenStoreMeta(fsys, "/s")
	if err != nil || state.Damage != nil {
		t.Fatalf("reading the state: %v, damage %v", err, state.Damage)
	}
	return state
}

// consumersNow is the present time in tests of Consumers without a store.
var consumersNow = time.UnixMilli(1_700_000_000_000)

// openConsumers opens the consumers in fsys with a retention of one hour. The test fails if the
// file of their cursors is damaged and wantDamage is false, or the reverse.
func openConsumers(t testing.TB, fsys FS, now time.Time, wantDamage bool) *Consumers {
	t.Helper()
	cs, err := OpenConsumers(fsys, "/s", openStoreState(t, fsys), time.Hour, now)
	if err != nil || (cs.Damage != nil) != wantDamage {
		t.Fatalf("opening the consumers: %v, damage %v; want damage: %t", err, cs.Damage, wantDamage)
	}
	return cs
}

// beginScrape begins a scrape of the consumer with the given name, at address ::1, on a connection.
func beginScrape(t testing.TB, cs *Consumers, name string, conn *AnswerReadTracker, now time.Time) *ConsumerSession {
	t.Helper()
	r, _, err := cs.BeginScrape(ConsumerKey(name, "::1", ""), name, "::1", conn, now)
	if err != nil {
		t.Fatalf("scrape of consumer %s: %v", name, err)
	}
	return r
}

// confirm makes two scrapes of the consumer with the given name, on a new connection. The first
// scrape serves the batches of each site up to the number in seqBySite. The second scrape confirms
// them.
func confirm(t testing.TB, cs *Consumers, name string, now time.Time, seqBySite map[uint64]uint64) {
	t.Helper()
	conn := &AnswerReadTracker{}
	for range 2 {
		r := beginScrape(t, cs, name, conn, now)
		for site, seq := range seqBySite {
			r.MarkServed(site, ReadPosition{Seq: seq}, 1)
		}
	}
}

func saveConsumers(t testing.TB, cs *Consumers) {
	t.Helper()
	if err := cs.Save(); err != nil {
		t.Fatalf("saving the consumers: %v", err)
	}
}

// cursorsOf returns the cursors of each consumer by the consumer's name. A consumer whose name is
// lost has "#" and its key as its name.
func cursorsOf(cs *Consumers) map[string]map[uint64]uint64 {
	all := map[string]map[uint64]uint64{}
	for _, c := range cs.byKey {
		name := c.name
		if name == "" {
			name = fmt.Sprint("#", c.key)
		}
		all[name] = maps.Clone(c.cursors)
	}
	return all
}

func sameCursors(a, b map[string]map[uint64]uint64) bool { return maps.EqualFunc(a, b, maps.Equal) }

// drain returns the samples that s serves to the named consumer as unread. The consumer scrapes on
// a new connection until a scrape serves no unread sample, so that every returned sample is
// confirmed.
func drain(t testing.TB, k *storeKit, s *Store, name string) map[heldSample]float64 {
	t.Helper()
	got := map[heldSample]float64{}
	conn := &AnswerReadTracker{}
	for unread := 1; unread > 0; {
		var fams []Family
		fams, unread, _ = scraper(s, -time.Second).ServeUnreadAndNewest(beginScrape(t, s.Consumers, name, conn, k.clock.Now()), 1000, false, nil)
		maps.Copy(got, samplesIn(fams))
	}
	return got
}

// testLimits returns the limits for a push at the time now: a retention of two hours, and the
// site's limit on series. If series is 0, there is no limit on series.
func testLimits(now time.Time, series int) AppendLimits {
	return AppendLimits{Now: ExactTimeRange(now), Retention: 2 * time.Hour, Series: series}
}

// pushPoints stages the points as a push at the time now, and commits them. If the push adds
// nothing, the returned batch is empty, and LastPush stays unchanged because no log records such a
// push.
func pushPoints(c *SiteSamples, now time.Time, points ...point) (*Batch, AppendResult, error) {
	lastPush := c.LastPush
	staged, err := c.StageNewSamples(storePush("a", points...), ScrapeNames{}, testLimits(now, 0))
	if staged.Batch == nil {
		c.LastPush = lastPush
		return &Batch{}, staged.Result, err
	}
	c.Commit(staged.Batch)
	return staged.Batch, staged.Result, err
}

// recovered returns the site that recovery builds from the records of c. It also checks the
// estimated size of the log.
func recovered(t *testing.T, c *SiteSamples) SiteSamples {
	t.Helper()
	got := NewSiteSamples(c.ID, maphash.MakeSeed())
	var data []byte
	for frames := range c.Records {
		data = append(data, frames...)
	}
	if int64(len(data)) > c.EstimatedRewrittenLogSize() || int64(len(data)) < c.EstimatedRewrittenLogSize()*2/3-200 {
		t.Errorf("the log has %d bytes, and %d were estimated", len(data), c.EstimatedRewrittenLogSize())
	}
	fsys := newCrashFS(1, "/d")
	fsys.put(logPath, append(appendLogHeader(nil, []byte(c.ID)), data...))
	_, rec, err := OpenLog(fsys, logPath, func(kind byte, payload []byte) error {
		if kind == RecordSeries {
			return DecodeSeries(payload, got.RestoreSeries)
		}
		b, err := DecodeBatch(payload)
		if err != nil {
			return err
		}
		lost, err := got.RestoreBatch(b)
		if lost > 0 {
			t.Errorf("batch %d lost %d samples", b.Seq, lost)
		}
		return err
	})
	if err != nil || rec.Damaged > 0 || rec.LostBytes > 0 || rec.TornBytes > 0 {
		t.Errorf("recovery: %+v, %v", rec, err)
	}
	return got
}

// mustFind returns the ID of a line in the table of series of c. It inserts the line if the table
// does not have it.
func mustFind(c *SiteSamples, line string) uint32 {
	id, hash, ok := c.Table.Find([]byte(line))
	if !ok {
		id = c.Table.Insert(hash, []byte(line), false)
	}
	return id
}

// sitePush returns a push of realistic size: 230 series of 23 names with 6 labels each. set gives
// the samples new values and times. The times are up to 6.8 s before the argument of set, because a
// Prometheus scrapes its targets at different times.
func sitePush(id string) (p *SampleList, set func(at int64)) {
	p = &SampleList{}
	for i := range 230 {
		err := p.Add(&RawSample{Name: fmt.Appendf(nil, "node_metric_family_%d_total", i/10), Labels: []Label{
			{[]byte(ClusterLabel), []byte(id)}, {[]byte("instance"), fmt.Appendf(nil, "10.0.0.%d:9100", i%5)}, {[]byte("job"), []byte("node-exporter")},
			{[]byte("namespace"), []byte("monitoring")}, {[]byte("device"), fmt.Appendf(nil, "eth%d", i%10)}, {[]byte("zone"), []byte("eu-central-1a")},
		}})
		if err != nil {
			panic(err)
		}
	}
	return p, func(at int64) {
		for i := range p.Samples {
			p.Samples[i].T, p.Samples[i].V = at-int64(i%5)*1700, float64(at%1000)+float64(i)/7
		}
	}
}

// nullFS is a crashFS whose files discard what is written, so that a benchmark measures the
// store's memory alone.
type nullFS struct{ *crashFS }

type nullFile struct{}

func (nullFS) OpenFile(string, int, fs.FileMode) (File, error) { return nullFile{}, nil }
func (nullFS) Rename(string, string) error                     { return nil }
func (nullFS) SyncDir(string) error                            { return nil }

func (nullFile) Write(p []byte) (int, error) { return len(p), nil }
func (nullFile) Sync() error                 { return nil }
func (nullFile) Truncate(int64) error        { return nil }
func (nullFile) Close() error                { return nil }
