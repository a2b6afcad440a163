package main

// The kinds of record in a cluster's log: series, written once each, batches, one for
// each push, and the spools of which scrapes are known. Each stands alone: none
// needs the record before it to be read, so that damage to one costs no other. (IDs are
// runs and times are differences within the batch; repeating what the batch before said
// would save about two bytes a sample and lose every later batch with one.) This file
// must not know of files, clusters or limits.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
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
	Names      SpoolNames // of the scrapes whose samples are held up to this batch
	Size       int        // bytes of the record's payload; set by EncodeBatch and DecodeBatch
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

// EncodeSeries appends the payload of a series record that gives the lines the
// IDs first, first+1, …
func EncodeSeries(buf []byte, first uint32, lines func(yield func([]byte) bool)) []byte {
	buf = binary.AppendUvarint(buf, uint64(first))
	for line := range lines {
		buf = append(binary.AppendUvarint(buf, uint64(len(line))), line...)
	}
	return buf
}

var errRecord = errors.New("malformed record")

// DecodeSeries calls each for the lines of a series record; they share memory
// with payload.
func DecodeSeries(payload []byte, each func(id uint32, line []byte) error) error {
	id, n := binary.Uvarint(payload)
	if n <= 0 {
		return errRecord
	}
	for payload = payload[n:]; len(payload) > 0; id++ {
		size, n := binary.Uvarint(payload)
		if n <= 0 || size > uint64(len(payload)-n) || id > MaxSeriesID {
			return errRecord
		}
		if err := each(uint32(id), payload[n:n+int(size)]); err != nil {
			return err
		}
		payload = payload[n+int(size):]
	}
	return nil
}

// What a batch's record has beside its samples, in the low bits of their number.
const (
	withTimes = 1 << iota
	withNames
	countShift = iota
)

// EncodeBatch appends the payload of b's record: sequence number, times and
// count; the names of scrapes, if there are any; runs of consecutive IDs as
// (start less the end of the run before, length); when times differ, each less the
// one before; values as they are.
func EncodeBatch(buf []byte, b *Batch) []byte {
	start := len(buf)
	buf = binary.AppendUvarint(buf, b.Seq)
	buf = binary.AppendVarint(buf, b.Accepted)
	buf = binary.AppendVarint(buf, b.T0)
	n := uint64(len(b.V)) << countShift
	if b.DT != nil {
		n |= withTimes
	}
	if b.Names.ID != 0 {
		n |= withNames
	}
	buf = binary.AppendUvarint(buf, n)
	if b.Names.ID != 0 {
		buf = AppendRanges(binary.LittleEndian.AppendUint64(buf, b.Names.ID), b.Names.Numbers)
	}
	end := int64(0)
	for i := 0; i < len(b.IDs); {
		j := i + 1
		for j < len(b.IDs) && b.IDs[j] == b.IDs[j-1]+1 {
			j++
		}
		buf = binary.AppendVarint(buf, int64(b.IDs[i])-end)
		buf = binary.AppendUvarint(buf, uint64(j-i))
		end = int64(b.IDs[j-1]) + 1
		i = j
	}
	if b.DT != nil {
		prev := b.T0
		for i := range b.V {
			buf = binary.AppendVarint(buf, b.Time(i)-prev)
			prev = b.Time(i)
		}
	}
	for _, v := range b.V {
		buf = binary.LittleEndian.AppendUint64(buf, math.Float64bits(v))
	}
	b.Size = len(buf) - start
	return buf
}

// DecodeBatch reads the payload of a batch record. It allocates no more than
// twice the payload's size.
func DecodeBatch(payload []byte) (*Batch, error) {
	b := &Batch{Size: len(payload)}
	r := WireReader{Rest: payload}
	b.Seq, b.Accepted, b.T0 = r.Uvarint(), r.Varint(), r.Varint()
	count := r.Uvarint()
	n := int(count >> countShift)
	if r.Bad || count>>countShift > uint64(len(r.Rest)/8) || b.Seq > MaxSeq || b.T0 < -1<<60 || b.T0 > 1<<60 {
		return nil, errRecord
	}
	if count&withNames != 0 {
		b.Names = SpoolNames{r.Fixed64(), ReadRanges(&r)}
		if r.Bad || b.Names.ID == 0 {
			return nil, errRecord
		}
	}
	b.IDs = make([]uint32, 0, n)
	for end := int64(0); len(b.IDs) < n; {
		step := r.Varint()
		length := r.Uvarint()
		if r.Bad || length == 0 || length > uint64(n-len(b.IDs)) || step < -MaxSeriesID-1 || step > MaxSeriesID {
			return nil, errRecord
		}
		first := end + step
		end = first + int64(length)
		if first < 0 || end-1 > MaxSeriesID {
			return nil, errRecord
		}
		for id := first; id < end; id++ {
			b.IDs = append(b.IDs, uint32(id))
		}
	}
	if count&withTimes != 0 {
		b.DT = make([]int32, n)
		dt := int64(0)
		for i := range b.DT {
			step := r.Varint()
			if r.Bad || step < math.MinInt32*2 || step > math.MaxInt32*2 {
				return nil, errRecord
			}
			dt += step
			if dt < math.MinInt32 || dt > math.MaxInt32 {
				return nil, errRecord
			}
			b.DT[i] = int32(dt)
		}
	}
	if len(r.Rest) != 8*n {
		return nil, fmt.Errorf("%w: %d bytes for %d values", errRecord, len(r.Rest), n)
	}
	b.V = make([]float64, n)
	for i := range b.V {
		b.V[i] = math.Float64frombits(binary.LittleEndian.Uint64(r.Rest[8*i:]))
	}
	b.Bound()
	return b, nil
}
