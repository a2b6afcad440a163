package main

// A batch is what one push added to a site: series IDs, times and values. It is immutable once
// it is held. Pure.

import (
	"slices"
)

// Kinds of record.
const (
	RecordSeries byte = 1
	RecordBatch  byte = 4 // kinds 2 and 3 had other forms once
	RecordSpool  byte = 5 // as SiteSpools.Records makes them
)

// MaxSeriesID bounds the IDs that a record may name, and so what a table of
// them can take.
const MaxSeriesID = 1<<24 - 1

// MaxSeq is beyond any number of batches, so that a sequence number that comes
// from damage cannot make the next ones begin again.
const MaxSeq = 1 << 62

// Batch is what one push added to a cluster: sample i is value V[i] of series
// IDs[i] at Time(i). It is immutable once it is held.
type Batch struct {
	Seq        uint64   // grows by one with each batch of its cluster
	Accepted   int64    // ms, this server's clock
	T0         int64    // ms
	MinT, MaxT int64    // ms; no sample is outside, nor is T0
	IDs        []uint32 // may be shared with other batches
	DT         []int32  // ms after T0; nil when all are at T0; see Pack
	which      []uint8  // of a packed batch, for each sample the index of its time in DT
	V          []float64
	Names      ScrapeNames // of the scrapes whose samples are held up to this batch
	Size       int         // bytes of the record's payload; set by EncodeBatch and DecodeBatch
}

// Position is how far a reader of a cluster's batches is: past all up to Seq, and
// past N of the Of samples of batch Part, if that is not 0. Compaction renames series
// but keeps the order of samples, so that a batch of as many samples is the same; one
// that retention made shorter is read again from its beginning.
type Position struct {
	Seq  uint64
	Part uint64
	N    int
	Of   int
}

// In returns how many samples of b, which is not wholly read, a reader is past.
func (p Position) In(b *Batch) int {
	if b.Seq != p.Part || len(b.V) != p.Of {
		return 0
	}
	return p.N
}

// Time returns the time of sample i in ms.
func (b *Batch) Time(i int) int64 {
	if b.DT == nil {
		return b.T0
	}
	if b.which != nil {
		i = int(b.which[i])
	}
	return b.T0 + int64(b.DT[i])
}

// Pack makes b smaller: a push has few times, one for each target of its source, and
// naming them takes a byte a sample where the difference takes four.
func (b *Batch) Pack() {
	if b.DT == nil || b.which != nil {
		return
	}
	var times []int32
	which := make([]uint8, len(b.DT))
	index := map[int32]uint8{}
	for i, dt := range b.DT {
		w, ok := index[dt]
		if !ok {
			if len(times) == 1<<8 {
				return
			}
			w = uint8(len(times))
			index[dt] = w
			times = append(times, dt)
		}
		which[i] = w
	}
	b.DT, b.which = slices.Clip(times), which
}

// Bound sets MinT and MaxT and drops DT where it says nothing.
func (b *Batch) Bound() {
	b.MinT, b.MaxT = b.T0, b.T0
	for _, dt := range b.DT {
		b.MinT, b.MaxT = min(b.MinT, b.T0+int64(dt)), max(b.MaxT, b.T0+int64(dt))
	}
	if b.MinT == b.MaxT {
		b.T0, b.DT = b.MinT, nil
	}
}

// Between returns how many samples have a time from first on and before end, in ms.
func (b *Batch) Between(first, end int64) (n int64) {
	if b.MinT >= first && b.MaxT < end {
		return int64(len(b.V))
	}
	if b.MinT >= end || b.MaxT < first {
		return 0
	}
	for i := range b.V {
		if t := b.Time(i); t >= first && t < end {
			n++
		}
	}
	return n
}

// Where returns the samples of b that keep wants: b itself if that is all.
func (b *Batch) Where(keep func(i int) bool) *Batch {
	first := 0
	for first < len(b.V) && keep(first) {
		first++
	}
	if first == len(b.V) {
		return b
	}
	k := *b
	k.IDs, k.V, k.DT, k.which = nil, nil, nil, nil
	for i := range b.V {
		if i < first || i > first && keep(i) {
			k.IDs, k.V, k.DT = append(k.IDs, b.IDs[i]), append(k.V, b.V[i]), append(k.DT, int32(b.Time(i)-b.T0))
		}
	}
	k.Bound()
	return &k
}
