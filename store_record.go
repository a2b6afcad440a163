package main

// This file encodes the series and batch records of a site's log. Each record can be decoded
// without the records before it. Damage to one record therefore destroys no other record, except
// that samples are lost if the record with the line of their series is lost. IDs are stored as
// runs, and times as differences within the batch. Differences to the previous batch would save
// about two bytes per sample, but the loss of one batch would then destroy all later batches. Pure:
// no I/O.

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

const (
	// maxBatchTime bounds the base time of a batch, in ms, before and after 1970.
	maxBatchTime = 1 << 60
	// maxBatch is the maximum number of samples in a batch. A batch of this size always fits into
	// one record: a sample takes at most 5 bytes for its ID, 5 for its time and 8 for its value.
	maxBatch = MaxRecord / 20
	// seriesRecordSize is the size in bytes at which a series record is full. The next series goes
	// into a new record.
	seriesRecordSize = 1 << 20
)

// EncodeSeriesPayload appends the payload of a series record to buf. The record gives the lines the
// IDs firstID, firstID+1 and so on.
func EncodeSeriesPayload(buf []byte, firstID uint32, lines func(yield func([]byte) bool)) []byte {
	buf = binary.AppendUvarint(buf, uint64(firstID))
	for line := range lines {
		buf = append(binary.AppendUvarint(buf, uint64(len(line))), line...)
	}
	return buf
}

// DecodeSeries calls emit with each line of a series record and its ID. The lines share memory with
// payload. DecodeSeries stops at the first error of emit and returns it.
func DecodeSeries(payload []byte, emit func(id uint32, line []byte) error) error {
	r := NewWireReader(payload)
	for id := r.Uvarint(MaxSeriesID); r.Len() > 0; id++ {
		line := r.Bytes(r.Count(1))
		if r.Require(id <= MaxSeriesID); r.Err() != nil {
			break
		}
		if err := emit(uint32(id), line); err != nil {
			return err
		}
	}
	if err := r.Done(); err != nil {
		return fmt.Errorf("decoding series record: %w", err)
	}
	return nil
}

// AppendSeriesRecords appends framed records of the series of t with IDs of firstID and above.
func AppendSeriesRecords(frames []byte, t *SeriesTable, firstID int) []byte {
	for firstID < t.Len() {
		next, size := firstID, 0
		payload := EncodeSeriesPayload(nil, uint32(firstID), func(yield func([]byte) bool) {
			for next < t.Len() && size < seriesRecordSize {
				line := t.Line(uint32(next))
				next, size = next+1, size+len(line)
				if !yield(line) {
					return
				}
			}
		})
		frames = AppendRecord(frames, RecordSeries, payload)
		firstID = next
	}
	return frames
}

// A batch record has one field for its number of samples and for these bits, which say which
// optional parts the record has. The bits are the lowest of the field; the number is above them.
const (
	withTimes = 1 << iota
	withNames
	countShift = iota
)

// EncodeBatchPayload appends the payload of the record of b to buf. The payload has these fields:
// sequence number; acceptance time; base time; number of samples, with bits for the optional parts;
// names of scrapes (optional); series IDs; times (optional, only if they differ); values. It sets
// b.Size.
func EncodeBatchPayload(buf []byte, b *Batch) []byte {
	start := len(buf)
	buf = binary.AppendUvarint(buf, b.Seq)
	buf = binary.AppendVarint(buf, b.AcceptedAt)
	buf = binary.AppendVarint(buf, b.T0)
	n := uint64(len(b.V)) << countShift
	if b.DT != nil {
		n |= withTimes
	}
	if b.Names.SpoolID != 0 {
		n |= withNames
	}
	buf = binary.AppendUvarint(buf, n)
	if b.Names.SpoolID != 0 {
		buf = AppendRanges(binary.LittleEndian.AppendUint64(buf, b.Names.SpoolID), b.Names.Numbers)
	}
	buf = appendIDs(buf, b.IDs)
	if b.DT != nil {
		buf = appendTimes(buf, b)
	}
	buf = slices.Grow(buf, 8*len(b.V))
	for _, v := range b.V {
		buf = binary.LittleEndian.AppendUint64(buf, math.Float64bits(v))
	}
	b.Size = len(buf) - start
	return buf
}

// appendIDs appends series IDs as runs of consecutive IDs. For each run it writes two numbers: the
// distance from the end of the previous run, which is the ID after its last ID, to the first ID of
// the run; and the length of the run.
func appendIDs(buf []byte, ids []uint32) []byte {
	end := int64(0)
	for i := 0; i < len(ids); {
		j := i + 1
		for j < len(ids) && ids[j] == ids[j-1]+1 {
			j++
		}
		buf = binary.AppendVarint(buf, int64(ids[i])-end)
		buf = binary.AppendUvarint(buf, uint64(j-i))
		end = int64(ids[j-1]) + 1
		i = j
	}
	return buf
}

// appendTimes appends the times of the samples of b, each as the difference to the previous time.
// The first difference is to T0.
func appendTimes(buf []byte, b *Batch) []byte {
	prev := b.T0
	for i := range b.V {
		buf = binary.AppendVarint(buf, b.Time(i)-prev)
		prev = b.Time(i)
	}
	return buf
}

// DecodeBatch decodes the payload of a batch record. For the samples it allocates at most twice the
// size of the payload.
func DecodeBatch(payload []byte) (*Batch, error) {
	r := NewWireReader(payload)
	b := &Batch{Size: len(payload)}
	b.Seq, b.AcceptedAt, b.T0 = r.Uvarint(MaxSeq), r.Varint(math.MinInt64, math.MaxInt64), r.Varint(-maxBatchTime, maxBatchTime)
	parts := r.Uvarint(math.MaxInt64)
	if r.Require(parts>>countShift <= uint64(r.Len()/8)); r.Err() != nil {
		return nil, fmt.Errorf("decoding batch record: %w", r.Err())
	}
	n := int(parts >> countShift)
	if parts&withNames != 0 {
		b.Names = ScrapeNames{r.Uint64(), ReadRanges(&r)}
		r.Require(b.Names.SpoolID != 0)
	}
	b.IDs = readIDs(&r, n)
	if parts&withTimes != 0 {
		b.DT = readTimes(&r, n)
	}
	b.V = readValues(&r, n)
	if err := r.Done(); err != nil {
		return nil, fmt.Errorf("decoding batch record: %w", err)
	}
	b.ComputeTimeBounds()
	return b, nil
}

func readIDs(r *WireReader, n int) []uint32 {
	ids := make([]uint32, 0, n)
	for end := int64(0); len(ids) < n; {
		first := end + r.Varint(-MaxSeriesID-1, MaxSeriesID)
		end = first + int64(r.Uvarint(uint64(n-len(ids))))
		if r.Require(first >= 0 && first < end && end-1 <= MaxSeriesID); r.Err() != nil {
			return nil
		}
		for id := first; id < end; id++ {
			ids = append(ids, uint32(id))
		}
	}
	return ids
}

// readTimes reads n times that appendTimes wrote. The results are in ms after T0.
func readTimes(r *WireReader, n int) []int32 {
	times := make([]int32, n)
	t := int64(0)
	for i := range times {
		t += r.Varint(2*math.MinInt32, 2*math.MaxInt32)
		if r.Require(t >= math.MinInt32 && t <= math.MaxInt32); r.Err() != nil {
			return nil
		}
		times[i] = int32(t)
	}
	return times
}

func readValues(r *WireReader, n int) []float64 {
	b := r.Bytes(8 * n)
	if b == nil {
		return nil
	}
	values := make([]float64, n)
	for i := range values {
		values[i] = math.Float64frombits(binary.LittleEndian.Uint64(b[8*i:]))
	}
	return values
}
