package main

// SiteSamples is compared with a model under random pushes, expiry, eviction, compaction and
// recovery. Further tests check its rules for eviction, compaction and batch numbers.

import (
	"fmt"
	"hash/maphash"
	"maps"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// samplesModel has a SiteSamples, c, and the samples that c must hold.
type samplesModel struct {
	t     *testing.T
	rng   *rand.Rand
	clock *storeClock
	c     SiteSamples
	want  map[heldSample]float64
	seq   uint64 // newest batch number so far
}

// oldest returns the time in ms before which samples have expired.
func (m *samplesModel) oldest() int64 { return m.clock.ms(7200) }

func (m *samplesModel) dropExpired() int {
	before := len(m.want)
	maps.DeleteFunc(m.want, func(k heldSample, _ float64) bool { return k.t < m.oldest() })
	return before - len(m.want)
}

func (m *samplesModel) expire() {
	inMemory := m.c.SampleCount()
	expired, unread, freed := m.c.DropExpired(m.oldest(), allRead, true)
	if want := m.dropExpired(); int(expired) != want || unread != 0 || freed != inMemory-m.c.SampleCount() {
		m.t.Errorf("%d samples expired, %d unread, %d freed; want %d, 0, %d", expired, unread, freed, want, inMemory-m.c.SampleCount())
	}
}

func (m *samplesModel) evict() {
	if !m.c.CanEvictOldestBatch(m.clock.ms(600), MaxSeq) {
		return
	}
	first := m.c.Batches[0]
	for i, id := range first.IDs {
		delete(m.want, heldSample{string(m.c.Table.Line(id)), first.Time(i)})
	}
	if n := m.c.EvictOldestBatch(); n != int64(len(first.V)) {
		m.t.Errorf("%d samples were evicted; the batch had %d", n, len(first.V))
	}
}

// compact replaces m.c by a compacted copy. Making the copy must not change m.c, and the copy must
// not have a series without a sample in retention.
func (m *samplesModel) compact() {
	before := contents(&m.c)
	next := m.c.CompactedCopy(nil, m.oldest())
	wantHeld(m.t, "the source of the compacted copy", contents(&m.c), before)
	m.c = next
	m.dropExpired()
	if n := m.c.Table.CountExpired(m.oldest()); n != 0 {
		m.t.Errorf("%d expired series are left after a compaction", n)
	}
}

// recover replaces m.c by the SiteSamples that recovery builds from the records of m.c.
func (m *samplesModel) recover() {
	if m.c.Seq == 0 { // a site without a batch has no log
		return
	}
	m.c.DropExpired(m.oldest(), allRead, true)
	m.want = contents(&m.c)
	got := recovered(m.t, &m.c)
	if len(m.c.Batches) > 0 && got.ID != "a" {
		m.t.Errorf("recovery found site %q, want a", got.ID)
	}
	got.ID = "a"
	got.DropExpiredUncounted(m.oldest())
	if got.Seq != m.c.Seq || got.LastPush != m.c.LastPush {
		m.t.Errorf("recovered: newest batch %d, last push %d; want %d, %d", got.Seq, got.LastPush, m.c.Seq, m.c.LastPush)
	}
	m.c = got
}

// push pushes samples with random times to m.c. Each sample has its own value, counted from
// firstValue.
func (m *samplesModel) push(firstValue int) {
	var points []point
	for i := range m.rng.IntN(6) {
		at := m.clock.ms(m.rng.IntN(8) * m.rng.IntN(1000))
		points = append(points, point{"m", m.rng.IntN(8), at, float64(firstValue + i)})
	}
	want := AppendResult{}
	p := storePush("a", points...)
	for _, s := range p.Samples {
		k := heldSample{string(p.Line(s)), s.T}
		if _, held := m.want[k]; held {
			want.Conflicts++ // no two samples have the same value, so that no sample counts as a duplicate
		} else if newest, _ := m.c.Table.Newest(mustFind(&m.c, k.line)); newest == s.T {
			want.Conflicts++ // the sample was evicted, but the table still has it as the newest sample of its series
		} else {
			want.Accepted++
			m.want[k] = s.V
		}
	}
	b, got, err := pushPoints(&m.c, m.clock.Now(), points...)
	if err != nil || got != want || len(b.V) != got.Accepted {
		m.t.Errorf("push: got %+v, %v, a batch of %d samples; want %+v", got, err, len(b.V), want)
	}
}

func (m *samplesModel) check(when string) {
	wantHeld(m.t, when, contents(&m.c), m.want)
	inBatches := int64(0)
	for i, b := range m.c.Batches {
		inBatches += int64(len(b.V))
		unread := 0
		for _, later := range m.c.Batches[i:] {
			unread += int(later.CountBetween(m.c.expiredBefore, math.MaxInt64))
		}
		if n := m.c.UnreadSampleCount(ReadPosition{Seq: b.Seq - 1}); n != unread {
			m.t.Errorf("%s: %d samples from batch %d on are unread, want %d", when, n, b.Seq, unread)
		}
	}
	if m.c.SampleCount() != inBatches {
		m.t.Errorf("%s: %d samples are counted, the batches have %d", when, m.c.SampleCount(), inBatches)
	}
	n := m.c.UnreadSampleCount(ReadPosition{})
	if n != len(m.want) || m.c.SampleCount() < int64(n) || m.c.Seq < m.seq {
		m.t.Errorf("%s: %d samples are unread to a new reader, want %d; %d are in memory; newest batch %d, before %d",
			when, n, len(m.want), m.c.SampleCount(), m.c.Seq, m.seq)
	}
	m.seq = m.c.Seq
}

// SiteSamples holds exactly the accepted samples that have neither expired nor been evicted, under
// random pushes, expiry, eviction, compaction and recovery.
func TestSiteSamplesModel(t *testing.T) {
	for seed := range testSeeds(t, 60) {
		m := &samplesModel{
			t: t, rng: rand.New(rand.NewPCG(seed, 0)), clock: newStoreClock(), c: NewSiteSamples("a", maphash.MakeSeed()), want: map[heldSample]float64{},
		}
		for step := range 80 {
			m.clock.Add(time.Duration(m.rng.IntN(200)) * time.Second)
			switch m.rng.IntN(8) {
			case 0:
				m.expire()
			case 1:
				m.evict()
			case 2:
				m.compact()
			case 3:
				m.recover()
			default:
				m.push(step * 10)
			}
			if m.check(fmt.Sprint("step ", step)); t.Failed() {
				t.Fatalf("seed %d, step %d", seed, step)
			}
		}
	}
}

// Consecutive batches with equal lists of IDs share one list in memory, also after a compaction.
func TestSiteSamplesShareIDs(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	for range 3 {
		pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0}, point{"m", 1, clock.ms(0), 0})
		clock.Add(time.Second)
	}
	for name, c := range map[string]SiteSamples{"pushed": c, "compacted": c.CompactedCopy(nil, 0)} {
		for _, b := range c.Batches[1:] {
			if &b.IDs[0] != &c.Batches[0].IDs[0] {
				t.Errorf("%s: batch %d has its own list of IDs", name, b.Seq)
			}
		}
	}
}

// allRead stands for the seqReadByAll function of a site. It says that every batch is read.
func allRead() uint64 { return MaxSeq }

// The oldest batch cannot be evicted while scrapes still show one of its samples as the newest of
// its series.
func TestCanEvictOldestBatch(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	want := func(when string, cutoff int64, want bool) {
		t.Helper()
		if got := c.CanEvictOldestBatch(cutoff, MaxSeq); got != want {
			t.Errorf("%s: got %t, want %t", when, got, want)
		}
	}
	want("without a batch", 0, false)
	if got := c.OldestAcceptedAt(); got != math.MaxInt64 {
		t.Errorf("without a batch: OldestAcceptedAt is %d, want %d", got, int64(math.MaxInt64))
	}
	start := clock.ms(0)
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0}, point{"m", 1, clock.ms(0), 0})
	want("scrapes show the samples", clock.ms(10), false)
	want("the samples are too old for scrapes", clock.ms(-1), true)
	if got := c.OldestAcceptedAt(); got != start {
		t.Errorf("OldestAcceptedAt is %d, want %d", got, start)
	}
	clock.Add(time.Second)
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0})
	want("series 1 has no newer sample", clock.ms(10), false)
	clock.Add(time.Second)
	pushPoints(&c, clock.Now(), point{"m", 1, clock.ms(0), 0})
	want("both series have newer samples", clock.ms(10), true)
	if n := c.EvictOldestBatch(); n != 2 || len(c.Batches) != 2 || c.SampleCount() != 2 {
		t.Errorf("%d samples were evicted; %d batches with %d samples are left; want 2, 2, 2", n, len(c.Batches), c.SampleCount())
	}
	want("after the eviction, scrapes show the next batch", clock.ms(10), false)
}

// The batch number of a site does not fall when a compaction drops the newest batch. A compaction
// drops that batch if it has only late samples and they have expired.
func TestCompactionKeepsBatchNumber(t *testing.T) {
	clock := newStoreClock()
	c := NewSiteSamples("a", maphash.MakeSeed())
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(0), 0})
	pushPoints(&c, clock.Now(), point{"m", 0, clock.ms(7000), 0})
	next := c.CompactedCopy(nil, clock.ms(3600))
	got := recovered(t, &next)
	if next.Seq != 2 || got.Seq != 2 || len(got.Batches) != 1 {
		t.Errorf("newest batch %d, and %d after recovery with %d batches; want 2, 2, 1", next.Seq, got.Seq, len(got.Batches))
	}
}

// A batch that lost its newer samples to damage is dropped by a compaction once its remaining
// samples have expired.
func TestCompactionOfDamagedBatch(t *testing.T) {
	c := NewSiteSamples("a", maphash.MakeSeed())
	_, hash, _ := c.Table.Find([]byte(`m{_id="a"}`))
	c.Table.Insert(hash, []byte(`m{_id="a"}`), false)
	b := &Batch{Seq: 1, T0: 200, IDs: []uint32{7, 0}, DT: []int32{0, -150}, V: []float64{1, 2}} // series 7 is unknown
	b.ComputeTimeBounds()
	if lost, err := c.RestoreBatch(b); err != nil || lost != 1 || c.SampleCount() != 1 {
		t.Errorf("restored: %d samples are held, %d lost, %v; want 1 and 1", c.SampleCount(), lost, err)
	}
	if next := c.CompactedCopy(nil, 100); len(next.Batches) != 0 || next.Table.Len() != 0 || next.Seq != 1 {
		t.Errorf("compacted: %d batches, %d series, newest batch %d; want 0, 0, 1", len(next.Batches), next.Table.Len(), next.Seq)
	}
}
