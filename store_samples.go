package main

// The series and batches of one site, in memory. No series has two samples of one time. Within
// a batch and from batch to batch the samples of a series ascend, late ones excepted. Pure: no
// I/O and no locks.

import (
	"errors"
	"hash/maphash"
	"math"
	"slices"
)

var (
	// ErrSeriesLimit: with the push its site would hold too many series, or too much text of
	// them.
	ErrSeriesLimit = errors.New("too many series")
)

const (
	// seriesBytes times the limit on series bounds the text of all series of a site, or one
	// site's long lines would take gigabytes; real lines have a quarter of it. minTextLimit
	// is what even a low limit on series leaves.
	seriesBytes  = 1 << 10
	minTextLimit = 1 << 20
)

// SiteSamples is what a site's log holds, in memory. It is not safe for concurrent use; but a
// committed batch never changes, nor does a line.
type SiteSamples struct {
	ID            string // cluster ID
	Table         *SeriesTable
	Batches       []*Batch // by sequence number
	Seq           uint64   // of the newest batch ever
	LastPush      int64    // ms; of the newest push
	Spools        SiteSpools
	startSeq      uint64 // Seq before the first batch
	expiredBefore int64  // ms; older samples have expired, even while their batch is still in memory
	minT          int64  // ms; no sample of Batches is older
}

// NewSiteSamples returns the data of a site without samples; for the seed see NewSeriesTable.
func NewSiteSamples(id string, seed maphash.Seed) SiteSamples {
	return SiteSamples{ID: id, Table: NewSeriesTable(seed, 0), expiredBefore: math.MinInt64, minT: math.MaxInt64}
}

// StartSeqAfter has the number of the first batch follow seq.
func (d *SiteSamples) StartSeqAfter(seq uint64) { d.startSeq, d.Seq = seq, seq }

// IsNew reports whether no batch was ever committed.
func (d *SiteSamples) IsNew() bool { return d.Seq == d.startSeq }

// SampleCount returns the number of samples in memory.
func (d *SiteSamples) SampleCount() int64 {
	n := 0
	for _, b := range d.Batches {
		n += len(b.V)
	}
	return int64(n)
}

// EstimatedRewrittenLogSize estimates the size in bytes of a log of this data, rather too high than
// too low.
func (d *SiteSamples) EstimatedRewrittenLogSize() int64 {
	const frame = 16 // of a record; of a line it is 3 at most
	n := 5*frame + len(d.ID) + 3*d.Table.Len() + d.Table.TextBytes()
	for _, b := range d.Batches {
		n += frame + b.Size
	}
	return int64(n)
}

// Commit adds b, which is durable. From here on b is immutable and its samples are served.
func (d *SiteSamples) Commit(b *Batch) {
	b.PackTimes()
	if n := len(d.Batches); n > 0 && slices.Equal(d.Batches[n-1].IDs, b.IDs) {
		b.IDs = d.Batches[n-1].IDs
	}
	d.Seq, d.LastPush = max(d.Seq, b.Seq), max(d.LastPush, b.AcceptedAt) // CompactedCopy commits older batches
	d.Batches = append(d.Batches, b)
	d.Spools.AddHeldScrapes(b.Names, b.Seq)
	d.minT = min(d.minT, b.MinT)
	for i, id := range b.IDs {
		d.Table.SetNewestIfLater(id, b.Time(i), b.V[i])
	}
}

// CompactedCopy returns a copy of the data that has the samples since keptSince, and the batches of
// more. Series without a sample there are left out, which renames the others. d may be read
// meanwhile, and stays as it is.
func (d *SiteSamples) CompactedCopy(more []*Batch, keptSince int64) SiteSamples {
	kept := append(d.batchesWithoutExpiredSamples(max(keptSince, d.expiredBefore)), more...)
	table, newIDs := d.Table.Subset(usedSeries(kept, d.Table.Len()))
	copied := SiteSamples{ID: d.ID, Table: table, Seq: d.Seq, LastPush: d.LastPush, expiredBefore: d.expiredBefore, minT: math.MaxInt64}
	for _, b := range kept {
		renamed := *b
		renamed.IDs = make([]uint32, len(b.IDs))
		for i, id := range b.IDs {
			renamed.IDs[i] = newIDs[id]
		}
		copied.Commit(&renamed) // shares equal lists of IDs again
	}
	copied.Spools = d.Spools.Clone()
	for _, b := range more {
		copied.Spools.AddHeldScrapes(b.Names, b.Seq)
	}
	return copied
}

// batchesWithoutExpiredSamples returns the batches without their samples older than keptSince. A
// batch without samples stays if it names scrapes and is not older itself.
func (d *SiteSamples) batchesWithoutExpiredSamples(keptSince int64) (kept []*Batch) {
	for _, b := range d.Batches {
		b = b.Filter(func(i int) bool { return b.Time(i) >= keptSince })
		if len(b.V) > 0 || b.Names.SpoolID != 0 && b.MaxT >= keptSince {
			kept = append(kept, b)
		}
	}
	return kept
}

// usedSeries returns for each of seriesCount series whether it has a sample in batches.
func usedSeries(batches []*Batch, seriesCount int) []bool {
	used := make([]bool, seriesCount)
	for _, b := range batches {
		for _, id := range b.IDs {
			used[id] = true
		}
	}
	return used
}

// Records calls yield with framed records that make up the log of d.
func (d *SiteSamples) Records(yield func(frames []byte) bool) {
	if !yield(AppendSeriesRecords(nil, d.Table, 0)) {
		return
	}
	batches := d.Batches
	if n := len(batches); n == 0 || batches[n-1].Seq < d.Seq {
		// Sequence numbers never start again.
		batches = append(slices.Clip(batches), &Batch{Seq: d.Seq, AcceptedAt: d.LastPush})
	}
	var frames, payload []byte
	for _, b := range batches {
		payload = EncodeBatchPayload(payload[:0], b)
		frames = AppendRecord(frames[:0], RecordBatch, payload)
		if !yield(frames) {
			return
		}
	}
	// Behind the batches: a log that is cut short must not claim scrapes that it lost.
	for _, payload := range d.Spools.EncodeRecords() {
		if !yield(AppendRecord(nil, RecordSpool, payload)) {
			return
		}
	}
}

// DropEvictedAndExpiredIn drops from d, which is a compacted copy of source, what expired or was
// evicted in source since the copy was made.
func (d *SiteSamples) DropEvictedAndExpiredIn(source *SiteSamples) {
	d.DropExpiredUncounted(source.expiredBefore)
	first := source.Seq + 1 // if source has no batch left, only those that came with the compaction stay
	if len(source.Batches) > 0 {
		first = source.Batches[0].Seq
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.Seq < first })
}

// OldestAcceptedAt returns when the oldest batch was accepted, in ms; math.MaxInt64 if there is
// no batch.
func (d *SiteSamples) OldestAcceptedAt() int64 {
	if len(d.Batches) == 0 {
		return math.MaxInt64
	}
	return d.Batches[0].AcceptedAt
}

// CanEvictOldestBatch reports whether there is an oldest batch, every consumer has read it, and no
// scrape shows one of its samples. seqReadByAll is the number of the newest batch that every
// consumer has read; scrapes show the newest sample of each series since newestSampleCutoff.
func (d *SiteSamples) CanEvictOldestBatch(newestSampleCutoff int64, seqReadByAll uint64) bool {
	if len(d.Batches) == 0 || d.Batches[0].Seq > seqReadByAll {
		return false
	}
	b := d.Batches[0]
	for i, id := range b.IDs {
		if t, _ := d.Table.Newest(id); t == b.Time(i) && t >= newestSampleCutoff {
			return false
		}
	}
	return true
}

// EvictOldestBatch drops the oldest batch and returns the number of its samples. The batch's memory
// is free when ReleaseEvictedBatches is called.
func (d *SiteSamples) EvictOldestBatch() int64 {
	n := int64(len(d.Batches[0].V))
	d.Batches = d.Batches[1:]
	return n
}

// ReleaseEvictedBatches frees the memory of the batches that EvictOldestBatch dropped.
func (d *SiteSamples) ReleaseEvictedBatches() { d.Batches = slices.Clone(d.Batches) }
