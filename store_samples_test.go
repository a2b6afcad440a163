package main

// Tests against a model: the samples of a push that are new, the order in which a site
// holds them, and the samples that compaction, expiry and eviction leave.

import (
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// testLimits are those of a push at now, with at most series of them; 0 does not bound.
func testLimits(now time.Time, series int) AppendLimits {
	return AppendLimits{Now: ExactTimeRange(now), Retention: 2 * time.Hour, Series: series}
}

// pushPoints prepares and commits points, at now. The batch is empty if they add nothing; no
// log keeps the time of such a push.
func pushPoints(c *SiteSamples, now time.Time, points ...point) (*Batch, AppendResult, error) {
	lastPush := c.LastPush
	prepared, err := c.StageNewSamples(storePush("a", points...), ScrapeNames{}, testLimits(now, 0))
	if prepared.Batch == nil {
		c.LastPush = lastPush
		return &Batch{}, prepared.Result, err
	}
	c.Commit(prepared.Batch)
	return prepared.Batch, prepared.Result, err
}

// allRead says that every batch is read.
func allRead() uint64 { return MaxSeq }

func TestSiteDataRepeats(t *testing.T) {
	clock := newStoreClock()
	at := clock.ms
	nan := math.NaN()
	type result = AppendResult
	tests := []struct {
		name   string
		pushes [][]point
		want   result // of the last push
	}{
		{"new", [][]point{{{"m", 1, at(5), 1}, {"m", 2, at(5), 2}}}, result{Accepted: 2}},
		{"repeated", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(5), 1}}}, result{Duplicates: 1}},
		{"other value", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(5), 2}}}, result{Conflicts: 1}},
		{"NaN again", [][]point{{{"m", 1, at(5), nan}}, {{"m", 1, at(5), nan}}}, result{Duplicates: 1}},
		{"minus zero is another value", [][]point{{{"m", 1, at(5), 0}}, {{"m", 1, at(5), math.Copysign(0, -1)}}}, result{Conflicts: 1}},
		{"repeated within a push", [][]point{{{"m", 1, at(5), 1}, {"m", 1, at(5), 1}, {"m", 1, at(5), 1}}}, result{Accepted: 1, Duplicates: 2}},
		{"other value within a push: the first wins", [][]point{{{"m", 1, at(5), 1}, {"m", 1, at(5), 2}}}, result{Accepted: 1, Conflicts: 1}},
		{"several times", [][]point{{{"m", 1, at(5), 1}, {"m", 1, at(9), 2}, {"m", 1, at(7), 3}}}, result{Accepted: 3}},
		{"late", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(9), 2}}}, result{Accepted: 1}},
		{"late again", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(9), 2}}, {{"m", 1, at(9), 2}}}, result{Duplicates: 1}},
		{"late with other value", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(9), 2}}, {{"m", 1, at(9), 3}}}, result{Conflicts: 1}},
		{"late within one push, repeated", [][]point{{{"m", 1, at(5), 1}}, {{"m", 1, at(9), 2}, {"m", 1, at(9), 2}}}, result{Accepted: 1, Duplicates: 1}},
		{"a later time is no repeat", [][]point{{{"m", 1, at(9), 1}}, {{"m", 1, at(5), 1}}}, result{Accepted: 1}},
		{"another series is no repeat", [][]point{{{"m", 1, at(5), 1}}, {{"m", 2, at(5), 1}}}, result{Accepted: 1}},
		{"a mixed push repeated", [][]point{
			{{"m", 1, at(5), 1}, {"m", 2, at(6), 2}, {"m", 1, at(9), 3}},
			{{"m", 1, at(9), 3}, {"m", 2, at(6), 2}, {"m", 1, at(5), 1}},
		}, result{Duplicates: 3}},
		{"future and past", [][]point{{
			{"m", 1, at(-60), 1}, {"m", 2, at(-60) + 1, 2}, {"m", 3, at(7200), 3}, {"m", 4, at(7200) - 1, 4},
			{"m", 5, math.MaxInt64, 5}, {"m", 6, math.MinInt64, 6},
		}}, result{Accepted: 2, Future: 2, TooOld: 2}},
		{"empty", [][]point{{}}, result{}},
	}
	for _, test := range tests {
		c := NewSiteSamples("a", maphash.MakeSeed())
		var res result
		for _, points := range test.pushes {
			var err error
			if _, res, err = pushPoints(&c, clock.Now(), points...); err != nil {
				t.Fatal(err)
			}
		}
		if res != test.want {
			t.Errorf("%s: %+v, want %+v", test.name, res, test.want)
		}
	}
}

// Within a batch the first samples of all series come first, by ID, so that the
// IDs form runs, then the second ones …; times ascend for each series.
func TestSiteDataOrder(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(100), 0}, point{"m", 1, clock.ms(100), 0}, point{"m", 2, clock.ms(100), 0})
	b, _, _ := pushPoints(&c, clock.Now(),
		point{"m", 2, clock.ms(7), 1}, point{"m", 0, clock.ms(8), 2}, point{"m", 1, clock.ms(9), 3}, point{"m", 0, clock.ms(9), 4}, point{"m", 2, clock.ms(5), 5},
		point{"m", 0, clock.ms(6), 6})
	if want := []uint32{0, 1, 2, 0, 2, 0}; !slices.Equal(b.IDs, want) {
		t.Errorf("IDs %v, want %v", b.IDs, want)
	}
	if want := []float64{4, 3, 1, 2, 5, 6}; !slices.Equal(b.V, want) {
		t.Errorf("values %v, want %v", b.V, want)
	}
	last := map[uint32]int64{}
	for i, id := range b.IDs {
		if b.Time(i) <= last[id] {
			t.Errorf("series %d descends", id)
		}
		last[id] = b.Time(i)
	}
}

// Equal lists of IDs are held once.
func TestSiteDataSharesIDs(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	for range 3 {
		pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0}, point{"m", 1, clock.ms(0), 0})
		clock.Add(time.Second)
	}
	for _, c := range []SiteSamples{c, c.CompactedCopy(nil, 0)} {
		for _, b := range c.Batches[1:] {
			if &b.IDs[0] != &c.Batches[0].IDs[0] {
				t.Error("equal lists are held twice")
			}
		}
	}
}

func TestSiteDataRefuses(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0})
	prepared, err := c.StageNewSamples(storePush("a", point{"m", 1, clock.ms(0), 1}, point{"m", 2, clock.ms(0), 1}), ScrapeNames{}, testLimits(clock.Now(), 2))
	if prepared.Batch != nil || !errors.Is(err, ErrSeriesLimit) || c.Table.Len() != 1 {
		t.Errorf("%+v, %v; %d series", prepared, err, c.Table.Len())
	}
	// Long lines count for several.
	const limit = 2000
	long := func(n int) (StagedBatch, error) {
		return c.StageNewSamples(storePush("a", point{strings.Repeat("m", 60_000), n, clock.ms(0), 1}), ScrapeNames{}, testLimits(clock.Now(), limit))
	}
	for n := range seriesBytes * limit / 60_100 {
		prepared, err := long(n)
		if err != nil {
			t.Fatalf("long line %d: %v", n, err)
		}
		c.Commit(prepared.Batch)
	}
	n := c.Table.Len()
	if prepared, err := long(n); prepared.Batch != nil || !errors.Is(err, ErrSeriesLimit) || c.Table.Len() != n {
		t.Errorf("text beyond the limit: %+v, %v; %d series of %d", prepared, err, c.Table.Len(), n)
	}
	c = NewSiteSamples("a", maphash.MakeSeed())
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0})
	many := &SampleList{Samples: make([]Sample, maxBatch+1)}
	if _, err := c.StageNewSamples(many, ScrapeNames{}, testLimits(clock.Now(), 0)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a push that fits no record: %v", err)
	}
	// A staged batch that is not committed can be rolled back, its series included.
	prepared, err = c.StageNewSamples(storePush("a", point{"m", 3, clock.ms(0), 1}), ScrapeNames{}, testLimits(clock.Now(), 2))
	if err != nil || len(prepared.Batch.V) != 1 || c.Table.Len() != 2 || len(c.Batches) != 1 || c.Seq != 1 {
		t.Errorf("%+v, %v", prepared, err)
	}
	c.Rollback(prepared)
	if _, _, ok := c.Table.Find([]byte(storePush("a", point{"m", 3, 0, 0}).Arena)); ok || c.Table.Len() != 1 {
		t.Error("not rolled back")
	}
}

func TestSiteDataCanEvictOldest(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	if c.CanEvictOldestBatch(0, MaxSeq) || c.OldestAcceptedAt() != math.MaxInt64 {
		t.Error("of nothing something goes")
	}
	start := clock.ms(0)
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0}, point{"m", 1, clock.ms(0), 0})
	if c.CanEvictOldestBatch(clock.ms(10), MaxSeq) || !c.CanEvictOldestBatch(clock.ms(-1), MaxSeq) || c.OldestAcceptedAt() != start {
		t.Error("what is shown must stay, what is shown no more may go")
	}
	clock.Add(time.Second)
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0})
	if c.CanEvictOldestBatch(clock.ms(10), MaxSeq) {
		t.Error("series 1 is shown from the oldest batch")
	}
	clock.Add(time.Second)
	pushPoints(&c, clock.Now(), point{"m", 1, clock.ms(0), 0})
	if !c.CanEvictOldestBatch(clock.ms(10), MaxSeq) {
		t.Error("newer samples of both series are held")
	}
	if n := c.EvictOldestBatch(); n != 2 || len(c.Batches) != 2 || c.SampleCount() != 2 || c.CanEvictOldestBatch(clock.ms(10), MaxSeq) {
		t.Errorf("%d evicted, %d batches left", n, len(c.Batches))
	}
}

// contents is what a site holds, by line and time.
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

// recovered is c read back from what Records yields.
func recovered(t *testing.T, c *SiteSamples) SiteSamples {
	t.Helper()
	got := NewSiteSamples("", maphash.MakeSeed())
	var parser SeriesParser
	owner := func(id string) bool { return id == c.ID }
	var data []byte
	for frames := range c.Records {
		data = append(data, frames...)
	}
	if int64(len(data)) > c.EstimatedRewrittenLogSize() || int64(len(data)) < c.EstimatedRewrittenLogSize()*2/3-200 {
		t.Errorf("%d bytes, estimated as %d", len(data), c.EstimatedRewrittenLogSize())
	}
	fsys := newCrashFS(1, "/d")
	fsys.put(logPath, append(appendLogHeader(nil, []byte(c.ID)), data...))
	_, rec, err := OpenLog(fsys, logPath, func(kind byte, payload []byte) error {
		if kind == RecordSeries {
			return DecodeSeries(payload, func(id uint32, line []byte) error { return got.RestoreSeries(&parser, owner, id, line) })
		}
		b, err := DecodeBatch(payload)
		if err != nil {
			return err
		}
		lost, err := got.RestoreBatch(b)
		if lost > 0 {
			t.Errorf("%d samples lost", lost)
		}
		return err
	})
	if err != nil || rec.Damaged > 0 || rec.LostBytes > 0 || rec.TornBytes > 0 {
		t.Errorf("recovery: %+v", rec)
	}
	return got
}

// A site is used at random beside a model. Samples are numbered by their
// values, so that nothing can take another's place.
func TestSiteDataModel(t *testing.T) {
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 0))
		clock := newStoreClock()
		c := NewSiteSamples("a", maphash.MakeSeed())
		model := map[heldSample]float64{}
		seq := uint64(0)
		for step := range 80 {
			clock.Add(time.Duration(rng.IntN(200)) * time.Second)
			oldest := clock.ms(7200)
			switch rng.IntN(8) {
			case 0:
				held := c.SampleCount()
				n, unread, freed := c.DropExpired(oldest, allRead, true)
				before := len(model)
				maps.DeleteFunc(model, func(k heldSample, _ float64) bool { return k.t < oldest })
				if int(n) != before-len(model) || unread != 0 || freed != held-c.SampleCount() {
					t.Errorf("%d samples expired, want %d; %d unread; %d freed of %d, %d left", n, before-len(model), unread, freed, held, c.SampleCount())
				}
			case 1:
				if !c.CanEvictOldestBatch(clock.ms(600), MaxSeq) {
					continue
				}
				first := c.Batches[0]
				for i, id := range first.IDs {
					delete(model, heldSample{string(c.Table.Line(id)), first.Time(i)})
				}
				if n := c.EvictOldestBatch(); n != int64(len(first.V)) {
					t.Errorf("%d evicted of %d", n, len(first.V))
				}
			case 2:
				before := contents(&c)
				next := c.CompactedCopy(nil, oldest)
				wantHeld(t, "compaction's source", contents(&c), before)
				c = next
				maps.DeleteFunc(model, func(k heldSample, _ float64) bool { return k.t < oldest })
				if c.Table.CountExpired(oldest) != 0 {
					t.Errorf("%d dead series after a compaction", c.Table.CountExpired(oldest))
				}
			case 3:
				if c.Seq == 0 { // has no log
					continue
				}
				c.DropExpired(oldest, allRead, true)
				model = contents(&c)
				got := recovered(t, &c)
				if len(c.Batches) > 0 && got.ID != "a" {
					t.Errorf("recovered site %q", got.ID)
				}
				got.ID = "a"
				got.DropExpiredUncounted(oldest)
				if got.Seq != c.Seq || got.LastPush != c.LastPush {
					t.Errorf("recovered number %d of %d, %d of %d", got.Seq, c.Seq, got.LastPush, c.LastPush)
				}
				c = got
			default:
				var points []point
				for i := range rng.IntN(6) {
					at := clock.ms(rng.IntN(8) * rng.IntN(1000))
					points = append(points, point{"m", rng.IntN(8), at, float64(step*10 + i)})
				}
				want := AppendResult{}
				p := storePush("a", points...)
				for _, s := range p.Samples {
					k := heldSample{string(p.Line(s)), s.T}
					if _, held := model[k]; held {
						want.Conflicts++ // values never repeat
					} else if last, _ := c.Table.Newest(mustFind(&c, k.line)); last == s.T {
						want.Conflicts++ // evicted, and the newest known still
					} else {
						want.Accepted++
						model[k] = s.V
					}
				}
				b, res, err := pushPoints(&c, clock.Now(), points...)
				if err != nil || res != want || len(b.V) != res.Accepted {
					t.Errorf("%+v, %v; want %+v", res, err, want)
				}
			}
			wantHeld(t, fmt.Sprint("step ", step), contents(&c), model)
			if n := c.UnreadSampleCount(ReadPosition{}); n != len(model) || c.SampleCount() < int64(n) || c.Seq < seq {
				t.Errorf("%d samples of %d, %d in memory, number %d after %d", n, len(model), c.SampleCount(), c.Seq, seq)
			}
			if seq = c.Seq; t.Failed() {
				t.Fatalf("seed %d, step %d", seed, step)
			}
		}
	}
}

// mustFind returns the ID of a line, which it gives one if need be.
func mustFind(c *SiteSamples, line string) uint32 {
	id, hash, ok := c.Table.Find([]byte(line))
	if !ok {
		id = c.Table.Insert(hash, []byte(line), false)
	}
	return id
}

// Sequence numbers do not fall when compaction drops the newest batch, which may
// hold nothing but late samples.
func TestSiteDataSeqNeverFalls(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0})
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(7000), 0})
	next := c.CompactedCopy(nil, clock.ms(3600))
	got := recovered(t, &next)
	if next.Seq != 2 || got.Seq != 2 || len(got.Batches) != 1 {
		t.Errorf("number %d, recovered %d, %d batches", next.Seq, got.Seq, len(got.Batches))
	}
}

// SiteSamples checks every record that recovery hands it.
func TestSiteDataRestores(t *testing.T) {
	var parser SeriesParser
	owner := func(id string) bool { return id == "a" }
	type given struct {
		id   uint32
		line string
		ok   bool
	}
	for _, test := range [][]given{
		{{0, `m{_id="a"}`, true}, {1, `n{_id="a"}`, true}, {1, `o{_id="a"}`, false}, {5, `p{_id="a"}`, true}, {4, `q{_id="a"}`, false}},
		{{0, `m{_id="b"}`, false}, {0, `m{_id="a"}`, true}},
		{{0, `m{x="a"}`, false}, {0, `m`, false}, {0, ``, false}, {0, `m{_id="a"} 1`, false}, {0, `m{_id="a",_id="b"}`, false}, {0, "m{_id=\"a\",x=\"\xff\"}", false}},
		{{maxGap + 1, `m{_id="a"}`, false}, {maxGap, `m{_id="a"}`, true}},
	} {
		c := NewSiteSamples("", maphash.MakeSeed())
		for _, g := range test {
			if err := c.RestoreSeries(&parser, owner, g.id, []byte(g.line)); (err == nil) != g.ok {
				t.Errorf("%v: series %d %q: %v", test, g.id, g.line, err)
			}
		}
	}
	c := NewSiteSamples("a", maphash.MakeSeed())
	if err := c.RestoreSeries(&parser, owner, 1, []byte(`m{_id="a"}`)); err != nil {
		t.Fatal(err)
	}
	batch := func(seq uint64, t0 int64, ids ...uint32) *Batch {
		b := &Batch{Seq: seq, AcceptedAt: 7, T0: t0, IDs: ids, V: make([]float64, len(ids))}
		b.ComputeTimeBounds()
		return b
	}
	for _, test := range []struct {
		name    string
		b       *Batch
		ok      bool
		seq     uint64
		samples int64
		lost    int
	}{
		{"known", batch(3, 100, 1), true, 3, 1, 0},
		{"number again", batch(3, 101, 1), false, 3, 1, 0},
		{"a padded and an unknown series", batch(4, 102, 0, 1, 2), true, 4, 2, 2},
		{"empty", batch(6, 0), true, 6, 2, 0},
		{"only unknown series", batch(9, 103, 8), true, 9, 2, 1},
	} {
		if lost, err := c.RestoreBatch(test.b); (err == nil) != test.ok || lost != test.lost || c.Seq != test.seq || c.SampleCount() != test.samples {
			t.Errorf("%s: %v, %d lost, number %d, %d samples", test.name, err, lost, c.Seq, c.SampleCount())
		}
	}
}

// A batch of which damage left only its older samples goes with those.
func TestSiteDataCompactsRemains(t *testing.T) {
	c := NewSiteSamples("a", maphash.MakeSeed())
	_, hash, _ := c.Table.Find([]byte(`m{_id="a"}`))
	c.Table.Insert(hash, []byte(`m{_id="a"}`), false)
	b := &Batch{Seq: 1, T0: 200, IDs: []uint32{7, 0}, DT: []int32{0, -150}, V: []float64{1, 2}}
	b.ComputeTimeBounds()
	if lost, err := c.RestoreBatch(b); err != nil || lost != 1 || c.SampleCount() != 1 {
		t.Errorf("%d samples, %d lost, %v", c.SampleCount(), lost, err)
	}
	if next := c.CompactedCopy(nil, 100); len(next.Batches) != 0 || next.Table.Len() != 0 || next.Seq != 1 {
		t.Errorf("%d batches, %d series, number %d", len(next.Batches), next.Table.Len(), next.Seq)
	}
}
