package main

// A batch is what one push added to a site: series IDs, times and values. A batch is immutable once
// it is committed. Pure: no I/O, no clock, no locks.

import (
	"slices"
)

// Kinds of record in a site's log.
const (
	RecordSeries byte = 1
	RecordBatch  byte = 2
	RecordSpool  byte = 3 // payload written by SiteSpools.EncodeRecords
)

// MaxSeriesID is the highest series ID that a record may contain. It also bounds the memory of a
// SeriesTable.
const MaxSeriesID = 1<<24 - 1

// MaxSeq is above the sequence number of every real batch. DecodeBatch refuses higher numbers, so
// that a damaged record cannot use up the numbers of later batches.
const MaxSeq = 1 << 62

// Batch is what one push added to a site. Sample i has the series IDs[i], the time Time(i) and the
// value V[i]. A batch is immutable once it is committed.
type Batch struct {
	Seq        uint64   // sequence number; increases with each batch of the site
	AcceptedAt int64    // ms; when this server accepted the push, by its own clock; the earlier of two times while the clock is in doubt
	T0         int64    // ms, base of DT
	MinT, MaxT int64    // ms; T0 and the times of all samples lie between MinT and MaxT, both inclusive
	IDs        []uint32 // may share memory with other batches
	// DT has the times in ms after T0: one per sample, or the distinct times if PackTimes filled
	// timeIndex. If DT is nil, all samples are at T0.
	DT        []int32
	timeIndex []uint8 // if not nil, the index in DT for each sample
	V         []float64
	Names     ScrapeNames // scrapes that become held when this batch is committed
	Size      int         // bytes of the payload of the batch's record; set by EncodeBatchPayload and DecodeBatch, too high after Filter
}

// ReadPosition is how far a reader has read the batches of a site. The reader has read all batches
// up to Seq, except for samples that expired before. If PartialSeq is not 0, the same holds for the
// first PartialRead of the PartialLen samples of batch PartialSeq. Compaction changes the series
// IDs in a batch, but keeps the order of its samples. If batch PartialSeq still has PartialLen
// samples, its first PartialRead samples are therefore still the samples that were read. If the
// batch is shorter, because compaction removed expired samples, the reader reads it again from its
// beginning.
type ReadPosition struct {
	Seq         uint64
	PartialSeq  uint64
	PartialRead int
	PartialLen  int
}

// PartialReadOf returns how many samples of b the reader has read. The sequence number of b must be
// above p.Seq.
func (p ReadPosition) PartialReadOf(b *Batch) int {
	if b.Seq != p.PartialSeq || len(b.V) != p.PartialLen {
		return 0
	}
	return p.PartialRead
}

// Time returns the time of sample i in ms.
func (b *Batch) Time(i int) int64 {
	if b.DT == nil {
		return b.T0
	}
	if b.timeIndex != nil {
		i = int(b.timeIndex[i])
	}
	return b.T0 + int64(b.DT[i])
}

// PackTimes makes b use less memory if its samples have at most 256 distinct times. It replaces the
// 4-byte time of each sample by a 1-byte index into the distinct times. A push usually has few
// distinct times: one for each target of the Prometheus that the client scrapes.
func (b *Batch) PackTimes() {
	if b.DT == nil || b.timeIndex != nil {
		return
	}
	var times []int32
	timeIndex := make([]uint8, len(b.DT))
	index := map[int32]uint8{}
	for i, dt := range b.DT {
		at, ok := index[dt]
		if !ok {
			if len(times) == 1<<8 {
				return
			}
			at = uint8(len(times))
			index[dt] = at
			times = append(times, dt)
		}
		timeIndex[i] = at
	}
	b.DT, b.timeIndex = slices.Clip(times), timeIndex
}

// ComputeTimeBounds sets MinT and MaxT. If all samples have the same time, it also sets T0 to that
// time and DT to nil.
func (b *Batch) ComputeTimeBounds() {
	b.MinT, b.MaxT = b.T0, b.T0
	for _, dt := range b.DT {
		b.MinT, b.MaxT = min(b.MinT, b.T0+int64(dt)), max(b.MaxT, b.T0+int64(dt))
	}
	if b.MinT == b.MaxT {
		b.T0, b.DT = b.MinT, nil
	}
}

// CountBetween returns the number of samples whose time t, in ms, satisfies from <= t < before.
func (b *Batch) CountBetween(from, before int64) (n int64) {
	if b.MinT >= from && b.MaxT < before {
		return int64(len(b.V))
	}
	if b.MinT >= before || b.MaxT < from {
		return 0
	}
	for i := range b.V {
		if t := b.Time(i); t >= from && t < before {
			n++
		}
	}
	return n
}

// Filter returns a batch with the samples for which keep returns true. It returns b itself if keep
// returns true for all samples.
func (b *Batch) Filter(keep func(i int) bool) *Batch {
	first := 0
	for first < len(b.V) && keep(first) {
		first++
	}
	if first == len(b.V) {
		return b
	}
	k := *b
	k.IDs, k.V, k.DT, k.timeIndex = nil, nil, nil, nil
	for i := range b.V {
		if i < first || i > first && keep(i) {
			k.IDs, k.V, k.DT = append(k.IDs, b.IDs[i]), append(k.V, b.V[i]), append(k.DT, int32(b.Time(i)-b.T0))
		}
	}
	k.ComputeTimeBounds()
	return &k
}
