package main

// The series and batches of one site, in memory. No series has two samples of one time. Within
// a batch and from batch to batch the samples of a series ascend, late ones excepted. Pure: no
// I/O and no locks.

import (
	"errors"
	"hash/maphash"
	"math"
	"slices"
	"time"
)

var (
	// ErrSeriesLimit: with the push its site would hold too many series, or too much text of
	// them.
	ErrSeriesLimit = errors.New("too many series")
	// ErrClockInDoubt: this server's clock made a step, and a sample is within the limits of age by
	// the old time or by the new time, but not by both.
	ErrClockInDoubt = errors.New("this server's clock was set, and its new time is still in doubt")
)

const (
	// maxAhead is how far a sample's time may be ahead of this server's clock. Every site pays
	// for a sample from the future: it moves the newest time of the central Prometheus, and
	// with it the window for late samples.
	maxAhead = time.Minute
	// seriesBytes times the limit on series bounds the text of all series of a site, or one
	// site's long lines would take gigabytes; real lines have a quarter of it. minTextLimit
	// is what even a low limit on series leaves.
	seriesBytes  = 1 << 10
	minTextLimit = 1 << 20
)

// SiteData is what a site's log holds, in memory. It is not safe for concurrent use; but a
// committed batch never changes, nor does a line.
type SiteData struct {
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

// NewSiteData returns the data of a site without samples; for the seed see NewSeriesTable.
func NewSiteData(id string, seed maphash.Seed) SiteData {
	return SiteData{ID: id, Table: NewSeriesTable(seed, 0), expiredBefore: math.MinInt64, minT: math.MaxInt64}
}

// StartAfter has the number of the first batch follow seq.
func (d *SiteData) StartAfter(seq uint64) { d.startSeq, d.Seq = seq, seq }

// IsNew reports whether no batch was ever committed.
func (d *SiteData) IsNew() bool { return d.Seq == d.startSeq }

// SampleCount returns the number of samples in memory.
func (d *SiteData) SampleCount() int64 {
	n := 0
	for _, b := range d.Batches {
		n += len(b.V)
	}
	return int64(n)
}

// EstimatedLogSize estimates the size in bytes of a log of this data, rather too high than too
// low.
func (d *SiteData) EstimatedLogSize() int64 {
	const frame = 16 // of a record; of a line it is 3 at most
	n := 5*frame + len(d.ID) + 3*d.Table.Len() + d.Table.TextBytes()
	for _, b := range d.Batches {
		n += frame + b.Size
	}
	return int64(n)
}

// Commit adds b, which is durable. From here on b is immutable and its samples are served.
func (d *SiteData) Commit(b *Batch) {
	b.PackTimes()
	if n := len(d.Batches); n > 0 && slices.Equal(d.Batches[n-1].IDs, b.IDs) {
		b.IDs = d.Batches[n-1].IDs
	}
	d.Seq, d.LastPush = max(d.Seq, b.Seq), max(d.LastPush, b.AcceptedAt) // Compact commits older batches
	d.Batches = append(d.Batches, b)
	d.Spools.AddHeld(b.Names, b.Seq)
	d.minT = min(d.minT, b.MinT)
	for i, id := range b.IDs {
		d.Table.SetNewest(id, b.Time(i), b.V[i])
	}
}

// Compact returns a copy of the data that has the samples since oldest, and the batches of more.
// Series without a sample there are left out, which renames the others. d may be read meanwhile,
// and stays as it is.
func (d *SiteData) Compact(more []*Batch, oldest int64) SiteData {
	kept := append(d.batchesSince(max(oldest, d.expiredBefore)), more...)
	table, newIDs := d.Table.Subset(usedSeries(kept, d.Table.Len()))
	copied := SiteData{ID: d.ID, Table: table, Seq: d.Seq, LastPush: d.LastPush, expiredBefore: d.expiredBefore, minT: math.MaxInt64}
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
		copied.Spools.AddHeld(b.Names, b.Seq)
	}
	return copied
}

// batchesSince returns the batches without their samples older than oldest. A batch without
// samples stays if it names scrapes and is not older itself.
func (d *SiteData) batchesSince(oldest int64) (kept []*Batch) {
	for _, b := range d.Batches {
		b = b.Filter(func(i int) bool { return b.Time(i) >= oldest })
		if len(b.V) > 0 || b.Names.ID != 0 && b.MaxT >= oldest {
			kept = append(kept, b)
		}
	}
	return kept
}

// usedSeries returns for each of n series whether it has a sample in batches.
func usedSeries(batches []*Batch, n int) []bool {
	used := make([]bool, n)
	for _, b := range batches {
		for _, id := range b.IDs {
			used[id] = true
		}
	}
	return used
}

// Records calls yield with framed records that make up the log of d.
func (d *SiteData) Records(yield func(frames []byte) bool) {
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
		payload = EncodeBatch(payload[:0], b)
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

// DropExpired has the samples older than oldest expire. A batch leaves memory when all of its
// samples have expired. It returns how many samples expired now, how many of them are lost
// because not every consumer has read them, and how many left memory. readSeq returns the number
// of the newest batch that every consumer has read. owned is false if another server owns the
// site: then a client with a spool has pushed to that server what was not read here, and nothing
// of it is lost.
func (d *SiteData) DropExpired(oldest int64, readSeq func() uint64, owned bool) (expired, unread, freed int64) {
	from := d.expiredBefore
	d.expiredBefore = max(d.expiredBefore, oldest)
	if d.minT >= oldest || from >= oldest {
		return 0, 0, 0
	}
	d.minT = math.MaxInt64
	gone := false
	for _, b := range d.Batches {
		if n := b.CountBetween(from, oldest); n > 0 {
			expired += n
			if (owned || b.Names.ID == 0) && b.Seq > readSeq() {
				unread += n
			}
		}
		if b.MaxT < oldest {
			freed, gone = freed+int64(len(b.V)), true
		} else {
			d.minT = min(d.minT, b.MinT)
		}
	}
	if gone {
		d.Batches = slices.DeleteFunc(slices.Clone(d.Batches), func(b *Batch) bool { return b.MaxT < oldest })
	}
	return expired, unread, freed
}

// DropExpiredUncounted has the samples older than oldest expire, of which an earlier process
// has counted those that were not read.
func (d *SiteData) DropExpiredUncounted(oldest int64) {
	d.expiredBefore = max(d.expiredBefore, oldest)
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.MaxT < d.expiredBefore })
}

// CatchUpWith drops from d, which is a compacted copy of source, what expired or was evicted in
// source since the copy was made.
func (d *SiteData) CatchUpWith(source *SiteData) {
	d.DropExpiredUncounted(source.expiredBefore)
	first := source.Seq + 1 // if source has no batch left, only those that came with the compaction stay
	if len(source.Batches) > 0 {
		first = source.Batches[0].Seq
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.Seq < first })
}

// OldestAcceptedAt returns when the oldest batch was accepted, in ms; math.MaxInt64 if there is
// no batch.
func (d *SiteData) OldestAcceptedAt() int64 {
	if len(d.Batches) == 0 {
		return math.MaxInt64
	}
	return d.Batches[0].AcceptedAt
}

// CanEvictOldest reports whether there is an oldest batch, every consumer has read it, and no
// scrape shows one of its samples. readSeq is the number of the newest batch that every consumer
// has read; scrapes show the newest sample of each series since shownSince.
func (d *SiteData) CanEvictOldest(shownSince int64, readSeq uint64) bool {
	if len(d.Batches) == 0 || d.Batches[0].Seq > readSeq {
		return false
	}
	b := d.Batches[0]
	for i, id := range b.IDs {
		if t, _ := d.Table.Newest(id); t == b.Time(i) && t >= shownSince {
			return false
		}
	}
	return true
}

// EvictOldest drops the oldest batch and returns the number of its samples. The batch's memory
// is free when ReleaseEvicted is called.
func (d *SiteData) EvictOldest() int64 {
	n := int64(len(d.Batches[0].V))
	d.Batches = d.Batches[1:]
	return n
}

// ReleaseEvicted frees the memory of the batches that EvictOldest dropped.
func (d *SiteData) ReleaseEvicted() { d.Batches = slices.Clone(d.Batches) }
