package main

// A batch is what one push added to a site: series IDs, times and values. It is immutable once
// it is held. Pure.

import (
	"slices"
)

// Kinds of record in a site's log.
const (
	RecordSeries byte = 1
	RecordBatch  byte = 2
	RecordSpool  byte = 3 // as SiteSpools.EncodeRecords makes them
)

// MaxSeriesID bounds the IDs that a record may name, and so what a table of
// them can take.
const MaxSeriesID = 1<<24 - 1

// MaxSeq is beyond the number of any batch, so that a number that comes from damage cannot use
// up the numbers of later batches.
const MaxSeq = 1 << 62

// Batch is what one push added to a site: sample i is value V[i] of series IDs[i] at Time(i). It
// is immutable once it is committed.
type Batch struct {
	Seq        uint64   // sequence number: ascends with each batch of the site
	AcceptedAt int64    // ms, this server's clock
	T0         int64    // ms
	MinT, MaxT int64    // ms; no sample is outside, nor is T0
	IDs        []uint32 // may be shared with other batches
	DT         []int32  // ms after T0, one for each sample or as PackTimes makes them; nil: all are at T0
	timeIndex  []uint8  // nil, or for each sample the index of its time in DT
	V          []float64
	Names      ScrapeNames // of the scrapes whose samples are held up to this batch
	Size       int         // bytes of the record's payload; set by EncodeBatchPayload and DecodeBatch
}

// ReadPosition is how far a reader is in a site's batches: past all of them up to Seq, and past the
// first PartialRead of the PartialLen samples of batch PartialSeq, unless that is 0. Compaction
// renames series but keeps the order of samples, so that a batch of as many samples is the
// same; a batch that retention made shorter is read again from its beginning.
type ReadPosition struct {
	Seq         uint64
	PartialSeq  uint64
	PartialRead int
	PartialLen  int
}

// PartialReadOf returns how many samples of b, a batch after Seq, the reader is past.
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

// PackTimes has b take less memory if its samples have few distinct times, as those of a push
// have, one for each target of its source. An index takes one byte where a time takes four.
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

// ComputeTimeBounds sets MinT and MaxT, and drops DT if all samples have one time.
func (b *Batch) ComputeTimeBounds() {
	b.MinT, b.MaxT = b.T0, b.T0
	for _, dt := range b.DT {
		b.MinT, b.MaxT = min(b.MinT, b.T0+int64(dt)), max(b.MaxT, b.T0+int64(dt))
	}
	if b.MinT == b.MaxT {
		b.T0, b.DT = b.MinT, nil
	}
}

// CountBetween returns how many samples have a time t, in ms, with from <= t < before.
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

// Filter returns a batch of the samples for which keep is true: b itself if that is all.
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
