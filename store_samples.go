package main

// SiteSamples has the series and batches of one site in memory. A series never has two samples with
// the same time. The samples of a series ascend in time within a batch and from batch to batch,
// except for samples that arrive late. Pure: no I/O, no clock, no locks.

import (
	"hash/maphash"
	"math"
	"slices"
)

const (
	// The lines of all series of a site may together have at most seriesBytes bytes for each series
	// that the limit on series allows. Without this bound, one site with long lines could use
	// gigabytes; a line of a real series typically has a quarter of seriesBytes. minTextLimit is
	// the lowest bound, even if the limit on series is low.
	seriesBytes  = 1 << 10
	minTextLimit = 1 << 20
)

// SiteSamples is the in-memory form of a site's log. It is not safe for concurrent use. A committed
// batch and the line of a series with a committed sample never change, so that they may be read
// without a lock.
type SiteSamples struct {
	ID            string // cluster ID
	Table         *SeriesTable
	Batches       []*Batch // in order of sequence number
	Seq           uint64   // number of the newest batch, even if it has left memory; each start of the server raises it
	LastPush      int64    // ms; when the newest push was accepted, not counting questions and pushes whose named scrapes were all stored before
	Spools        SiteSpools
	startSeq      uint64 // value of Seq before the first batch
	expiredBefore int64  // ms; older samples have expired, even if their batch is still in memory
	minT          int64  // ms; no sample in Batches is older
	samples       int64  // number of samples in Batches
}

// NewSiteSamples returns the data of a site without samples. The documentation of NewSeriesTable
// describes the seed.
func NewSiteSamples(id string, seed maphash.Seed) SiteSamples {
	return SiteSamples{ID: id, Table: NewSeriesTable(seed), expiredBefore: math.MinInt64, minT: math.MaxInt64}
}

// StartSeqAfter makes the first batch get a sequence number above seq.
func (d *SiteSamples) StartSeqAfter(seq uint64) { d.startSeq, d.Seq = seq, seq }

// IsNew reports whether no batch of the site was ever committed.
func (d *SiteSamples) IsNew() bool { return d.Seq == d.startSeq }

// SampleCount returns the number of samples in memory.
func (d *SiteSamples) SampleCount() int64 { return d.samples }

// recount sets the number of samples after a change of Batches.
func (d *SiteSamples) recount() {
	d.samples = 0
	for _, b := range d.Batches {
		d.samples += int64(len(b.V))
	}
}

// EstimatedRewrittenLogSize returns an estimate of the bytes that a rewritten log of this data
// would have. The estimate ignores the spool records. Apart from them it is too high rather than
// too low.
func (d *SiteSamples) EstimatedRewrittenLogSize() int64 {
	const frame = 16 // bytes of framing per record; the length before a line takes at most 3 bytes
	n := 5*frame + len(d.ID) + 3*d.Table.Len() + d.Table.TextBytes()
	for _, b := range d.Batches {
		n += frame + b.Size
	}
	return int64(n)
}

// Commit adds b. From now on b is immutable. If the site has a log, b must be in the log before other
// goroutines can read d, because the samples of b are served from then on.
func (d *SiteSamples) Commit(b *Batch) {
	b.PackTimes()
	if n := len(d.Batches); n > 0 && slices.Equal(d.Batches[n-1].IDs, b.IDs) {
		b.IDs = d.Batches[n-1].IDs
	}
	// The maximum is needed because CompactedCopy may commit batches that are older than Seq and
	// LastPush.
	d.Seq, d.LastPush = max(d.Seq, b.Seq), max(d.LastPush, b.AcceptedAt)
	d.Batches = append(d.Batches, b)
	d.samples += int64(len(b.V))
	d.Spools.AddHeldScrapes(b.Names, b.Seq)
	d.minT = min(d.minT, b.MinT)
	listed := false
	for i, id := range b.IDs {
		listed = d.Table.SetNewestIfLater(id, b.Time(i), b.V[i]) || listed
	}
	if !listed {
		d.Table.Clip() // the site probably has all of its series now
	}
}

// CompactedCopy returns a copy of the data with the samples since keptSince and with the additional
// batches that the parameter more has. The copy leaves out series without a sample in these
// batches, so that the other series get new IDs. CompactedCopy does not change d, and other
// goroutines may read d during the call.
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
		copied.Commit(&renamed) // Commit also shares memory between equal ID lists
	}
	copied.Spools = d.Spools.Clone()
	for _, b := range more {
		copied.Spools.AddHeldScrapes(b.Names, b.Seq)
	}
	return copied
}

// batchesWithoutExpiredSamples returns the batches without their samples older than keptSince. It
// leaves out batches that have no samples left, except for a batch that names scrapes and whose
// MaxT is not older than keptSince.
func (d *SiteSamples) batchesWithoutExpiredSamples(keptSince int64) (kept []*Batch) {
	for _, b := range d.Batches {
		b = b.Filter(func(i int) bool { return b.Time(i) >= keptSince })
		if len(b.V) > 0 || b.Names.SpoolID != 0 && b.MaxT >= keptSince {
			kept = append(kept, b)
		}
	}
	return kept
}

// usedSeries reports for each of the seriesCount series whether it has a sample in batches.
func usedSeries(batches []*Batch, seriesCount int) []bool {
	used := make([]bool, seriesCount)
	for _, b := range batches {
		for _, id := range b.IDs {
			used[id] = true
		}
	}
	return used
}

// Records calls yield with chunks of framed records. Together the chunks are the records of a log
// with the data of d.
func (d *SiteSamples) Records(yield func(frames []byte) bool) {
	if !yield(AppendSeriesRecords(nil, d.Table, 0)) {
		return
	}
	batches := d.Batches
	if n := len(batches); n == 0 || batches[n-1].Seq < d.Seq {
		// An empty batch keeps the newest sequence number in the log, because no number may be used
		// again.
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
	// The spool records follow the batches. A log that was cut short therefore does not list
	// scrapes whose batches it lost.
	for _, payload := range d.Spools.EncodeRecords() {
		if !yield(AppendRecord(nil, RecordSpool, payload)) {
			return
		}
	}
}

// DropEvictedAndExpiredIn is called on a compacted copy of source. It drops the batches and samples
// that were evicted from source, or expired in source, after the copy was made.
func (d *SiteSamples) DropEvictedAndExpiredIn(source *SiteSamples) {
	d.DropExpiredUncounted(source.expiredBefore)
	// If source has no batches left, only batches that were added by the compaction stay.
	first := source.Seq + 1
	if len(source.Batches) > 0 {
		first = source.Batches[0].Seq
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.Seq < first })
	d.recount()
}

// OldestAcceptedAt returns the time in ms at which the oldest batch was accepted. It returns
// math.MaxInt64 if there is no batch.
func (d *SiteSamples) OldestAcceptedAt() int64 {
	if len(d.Batches) == 0 {
		return math.MaxInt64
	}
	return d.Batches[0].AcceptedAt
}

// CanEvictOldestBatch reports whether the oldest batch may leave memory. There must be a batch,
// every consumer must have read it, and no scrape may still show one of its samples. Scrapes show
// the newest sample of each series if its time is at or after newestSampleCutoff. seqReadByAll is
// the number of the newest batch that every consumer has read.
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

// EvictOldestBatch drops the oldest batch and returns the number of its samples. The memory of the
// batch may become free only when ReleaseEvictedBatches is called.
func (d *SiteSamples) EvictOldestBatch() int64 {
	n := int64(len(d.Batches[0].V))
	d.Batches = d.Batches[1:]
	d.samples -= n
	return n
}

// ReleaseEvictedBatches makes the memory of evicted batches free for garbage collection.
func (d *SiteSamples) ReleaseEvictedBatches() { d.Batches = slices.Clone(d.Batches) }
