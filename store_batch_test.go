package main

// The payloads of batch and series records. Decoding returns what was encoded, malformed
// payloads are errors, and a batch of the largest size fits one record.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
)

// sameBatch reports whether two batches have the same batch number, times, series, scrapes and
// values. Values are compared by their bits, so that a NaN equals itself.
func sameBatch(a, b *Batch) bool {
	if a.Names.SpoolID != b.Names.SpoolID || !slices.Equal(a.Names.Numbers, b.Names.Numbers) {
		return false
	}
	if a.Seq != b.Seq || a.AcceptedAt != b.AcceptedAt || a.MinT != b.MinT || a.MaxT != b.MaxT || !slices.Equal(a.IDs, b.IDs) ||
		!slices.EqualFunc(a.V, b.V, func(x, y float64) bool { return math.Float64bits(x) == math.Float64bits(y) }) {
		return false
	}
	for i := range a.V {
		if a.Time(i) != b.Time(i) {
			return false
		}
	}
	return true
}

// randomBatch returns a batch of up to 39 samples. In half of the calls, IDs and times span the
// whole range. Otherwise most IDs follow each other, and the times are close to each other.
func randomBatch(rng *rand.Rand) *Batch {
	n := rng.IntN(40)
	b := &Batch{Seq: rng.Uint64N(MaxSeq), AcceptedAt: rng.Int64() - rng.Int64(), T0: rng.Int64N(1<<61) - 1<<60}
	b.IDs, b.V, b.DT = make([]uint32, n), make([]float64, n), make([]int32, n)
	if rng.IntN(2) == 0 {
		b.Names.SpoolID = 1 + rng.Uint64N(math.MaxUint64)
		for range rng.IntN(5) {
			from := 1 + rng.Uint64N(MaxScrapeNumber-10)
			b.Names.Numbers = b.Names.Numbers.Add(from, from+rng.Uint64N(10))
		}
	}
	wild := rng.IntN(2) == 0
	spread := []int32{1, 2, 1000}[rng.IntN(3)]
	id := uint32(rng.IntN(100))
	for i := range n {
		if id++; wild || rng.IntN(10) == 0 {
			id = uint32(rng.IntN(MaxSeriesID + 1))
		}
		b.IDs[i] = id
		if b.DT[i] = rng.Int32N(spread); wild {
			b.DT[i] = int32(rng.Uint32())
		}
		b.V[i] = math.Float64frombits(rng.Uint64())
	}
	b.ComputeTimeBounds()
	return b
}

// DecodeBatch returns the batch that EncodeBatchPayload encoded, and Size is the length of the
// payload. The payload takes at most 20 bytes for each sample and each range of scrapes, plus 80
// bytes.
func TestBatchRoundTrip(t *testing.T) {
	for seed := range testSeeds(t, 2000) {
		b := randomBatch(rand.New(rand.NewPCG(seed, 0)))
		payload := EncodeBatchPayload([]byte("before"), b)[len("before"):]
		if b.Size != len(payload) || len(payload) > 20*len(b.V)+80+20*len(b.Names.Numbers) {
			t.Fatalf("seed %d: the payload of %d samples has %d bytes, and Size is %d", seed, len(b.V), len(payload), b.Size)
		}
		got, err := DecodeBatch(payload)
		if err != nil || !sameBatch(b, got) || got.Size != b.Size {
			t.Fatalf("seed %d: got %+v, %v\nwant %+v", seed, got, err, b)
		}
		if again := EncodeBatchPayload(nil, got); string(again) != string(payload) {
			t.Fatalf("seed %d: the decoded batch encodes to another payload", seed)
		}
	}
}

// A batch of maxBatch samples fits one record, even with the IDs and times that take the most
// bytes.
func TestBatchFitsRecord(t *testing.T) {
	const n = 10_000
	b := &Batch{Seq: MaxSeq, AcceptedAt: math.MinInt64, T0: 1 << 60, IDs: make([]uint32, n), DT: make([]int32, n), V: make([]float64, n)}
	for i := range n {
		b.IDs[i], b.DT[i] = uint32(i%2*MaxSeriesID), math.MinInt32
		if i%2 == 0 {
			b.DT[i] = math.MaxInt32
		}
	}
	if size := len(EncodeBatchPayload(nil, b)); size/n*maxBatch > MaxRecord*9/10 {
		t.Errorf("a sample takes %d bytes, so that %d samples do not fit one record", size/n, maxBatch)
	}
}

// ComputeTimeBounds sets MinT and MaxT to the bounds of T0 and all samples. It drops DT if all
// samples have the time T0.
func TestBatchTimeBounds(t *testing.T) {
	for _, test := range []struct {
		t0       int64
		dt       []int32
		t        []int64
		min, max int64
		oneTime  bool // DT is dropped
	}{
		{100, nil, nil, 100, 100, true},
		{100, []int32{0, 0}, []int64{100, 100}, 100, 100, true},
		{100, []int32{-5, 7, 0}, []int64{95, 107, 100}, 95, 107, false},
		{100, []int32{1, 2}, []int64{101, 102}, 100, 102, false}, // T0 counts towards the bounds although no sample has the time T0
		{-1 << 60, []int32{math.MinInt32}, []int64{-1<<60 + math.MinInt32}, -1<<60 + math.MinInt32, -1 << 60, false},
	} {
		b := &Batch{T0: test.t0, DT: test.dt, V: make([]float64, len(test.t)), IDs: make([]uint32, len(test.t))}
		b.ComputeTimeBounds()
		if b.MinT != test.min || b.MaxT != test.max || (b.DT == nil) != test.oneTime {
			t.Errorf("T0 %d, DT %v: got %d to %d, DT dropped %t; want %d to %d, %t", test.t0, test.dt, b.MinT, b.MaxT, b.DT == nil, test.min, test.max, test.oneTime)
		}
		for i, want := range test.t {
			if b.Time(i) != want {
				t.Errorf("T0 %d, DT %v: sample %d is at %d, want %d", test.t0, test.dt, i, b.Time(i), want)
			}
		}
	}
}

// Filter returns a batch of the chosen samples in the same order, and leaves the source unchanged.
// If all samples are chosen, it returns the batch itself.
func TestBatchFilter(t *testing.T) {
	for seed := range testSeeds(t, 500) {
		rng := rand.New(rand.NewPCG(seed, 0))
		b := randomBatch(rng)
		before := *b
		before.IDs, before.V, before.DT = slices.Clone(b.IDs), slices.Clone(b.V), slices.Clone(b.DT)
		keep := make([]bool, len(b.V))
		n := 0
		for i := range keep {
			if keep[i] = rng.IntN(8) > 0; keep[i] {
				n++
			}
		}
		if rng.IntN(2) == 0 {
			b.PackTimes()
		}
		got := b.Filter(func(i int) bool { return keep[i] })
		if !sameBatch(b, &before) {
			t.Fatalf("seed %d: Filter changed its source", seed)
		}
		if len(got.V) != n || len(got.IDs) != n || n == len(keep) && got != b || got.Seq != b.Seq || got.AcceptedAt != b.AcceptedAt {
			t.Fatalf("seed %d: got %+v with samples chosen by %v", seed, got, keep)
		}
		at := 0
		for i := range keep {
			if !keep[i] {
				continue
			}
			if got.IDs[at] != b.IDs[i] || got.Time(at) != b.Time(i) || got.Time(at) < got.MinT || got.Time(at) > got.MaxT ||
				math.Float64bits(got.V[at]) != math.Float64bits(b.V[i]) {
				t.Fatalf("seed %d: sample %d of the source differs in the result", seed, i)
			}
			at++
		}
	}
}

// DecodeBatch returns an error for malformed payloads, and for a payload that is cut at any byte.
func TestBatchMalformed(t *testing.T) {
	good := EncodeBatchPayload(nil, &Batch{Seq: 3, AcceptedAt: 4, T0: 5, IDs: []uint32{7, 8, 2}, DT: []int32{0, 1, 2}, V: []float64{1, 2, 3}})
	if _, err := DecodeBatch(good); err != nil {
		t.Fatal(err)
	}
	uv := func(values ...int64) (b []byte) { // encodes values as varints; the caller gives signed fields in zigzag form
		for _, v := range values {
			b = binary.AppendUvarint(b, uint64(v))
		}
		return b
	}
	eight := func(b []byte, n int) []byte { return append(b, make([]byte, 8*n)...) }
	tests := map[string][]byte{
		"empty":                      {},
		"one byte too many":          append(slices.Clone(good), 0),
		"one byte too few":           good[:len(good)-1],
		"varint of 11 bytes":         slices.Repeat([]byte{0xff}, 11),
		"more samples than bytes":    uv(1, 0, 0, 1<<40),
		"count that overflows":       eight(append(uv(1, 0, 0), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1), 1),
		"batch number above MaxSeq":  eight(uv(MaxSeq+1, 0, 0, 8, 0, 1), 1),
		"time out of range":          eight(uv(1, 0, 1<<62, 8, 0, 1), 1),
		"negative ID":                eight(uv(1, 0, 0, 4, 1, 1), 1),
		"ID too large":               eight(uv(1, 0, 0, 4, 2*(MaxSeriesID+1), 1), 1),
		"run beyond the largest ID":  eight(uv(1, 0, 0, 8, 2*MaxSeriesID, 2), 2),
		"empty run":                  eight(uv(1, 0, 0, 4, 0, 0), 1),
		"run longer than the batch":  eight(uv(1, 0, 0, 4, 0, 2), 2),
		"time difference too large":  eight(uv(1, 0, 0, 5, 0, 1, 1<<40), 1),
		"time differences too large": eight(uv(1, 0, 0, 9, 0, 2, 2*math.MaxInt32, 2), 2),
		"no values":                  uv(1, 0, 0, 4, 0, 1),
	}
	for name, payload := range tests {
		if b, err := DecodeBatch(payload); err == nil {
			t.Errorf("%s: decoded as %+v, want an error", name, b)
		}
	}
	for n := range good {
		if b, err := DecodeBatch(good[:n]); err == nil {
			t.Errorf("cut at %d: decoded as %+v, want an error", n, b)
		}
	}
}

// DecodeSeries yields the lines that EncodeSeriesPayload encoded, with ascending IDs. It returns
// the error of its callback, and an error for a malformed payload.
func TestSeriesRecord(t *testing.T) {
	lines := []string{"", "a", "b{x=\"y\"}", string(make([]byte, 300))}
	payload := EncodeSeriesPayload(nil, 41, func(yield func([]byte) bool) {
		for _, l := range lines {
			yield([]byte(l))
		}
	})
	decode := func(payload []byte) (got []string, err error) {
		err = DecodeSeries(payload, func(id uint32, line []byte) error {
			if int(id) != 41+len(got) {
				t.Errorf("got ID %d, want %d", id, 41+len(got))
			}
			got = append(got, string(line))
			return nil
		})
		return got, err
	}
	if got, err := decode(payload); err != nil || !slices.Equal(got, lines) {
		t.Errorf("got %q, %v; want %q", got, err, lines)
	}
	failed := errors.New("failed")
	if err := DecodeSeries(payload, func(uint32, []byte) error { return failed }); err != failed {
		t.Errorf("got error %v, want the error of the callback", err)
	}
	for name, payload := range map[string][]byte{
		"empty":                    {},
		"line longer than payload": append(binary.AppendUvarint(binary.AppendUvarint(nil, 1), 1<<40), 'x'),
		"ID too large":             append(binary.AppendUvarint(nil, MaxSeriesID+1), 0),
		"varint of 11 bytes":       slices.Repeat([]byte{0xff}, 11),
		"length cut":               append(binary.AppendUvarint(nil, 1), 0x80),
	} {
		if err := DecodeSeries(payload, func(uint32, []byte) error { return nil }); err == nil {
			t.Errorf("%s: decoded, want an error", name)
		}
	}
}

// DecodeBatch returns an error or a batch for any bytes. The batch stays the same when it is
// encoded and decoded again. Decoding allocates at most 64 KiB, plus 8 bytes for each byte of the
// payload.
func FuzzBatchRecord(f *testing.F) {
	for seed := range uint64(8) {
		f.Add(EncodeBatchPayload(nil, randomBatch(rand.New(rand.NewPCG(seed, 0)))))
	}
	f.Add(binary.AppendUvarint(nil, 1<<63))
	var numbers Ranges
	for n := range uint64(MaxRanges) {
		numbers = append(numbers, Range{2*n + 1, 2*n + 1})
	}
	f.Add(EncodeBatchPayload(nil, &Batch{Seq: 1, Names: ScrapeNames{1, numbers}}))
	f.Fuzz(func(t *testing.T, payload []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		b, err := DecodeBatch(payload)
		runtime.ReadMemStats(&after)
		if cost := after.TotalAlloc - before.TotalAlloc; cost > uint64(8*len(payload)+64<<10) {
			t.Errorf("decoding %d bytes allocated %d bytes", len(payload), cost)
		}
		if err == nil {
			if len(b.IDs) != len(b.V) || b.DT != nil && len(b.DT) != len(b.V) {
				t.Fatalf("the batch has %d IDs, %d times and %d values", len(b.IDs), len(b.DT), len(b.V))
			}
			for i, id := range b.IDs {
				if id > MaxSeriesID || b.Time(i) < b.MinT || b.Time(i) > b.MaxT {
					t.Fatalf("sample %d of series %d is at %d; the bounds are %d to %d", i, id, b.Time(i), b.MinT, b.MaxT)
				}
			}
			again, err := DecodeBatch(EncodeBatchPayload(nil, b))
			if err != nil || !sameBatch(b, again) {
				t.Fatalf("encoded and decoded: %+v, %v\nwant %+v", again, err, b)
			}
		}
		next, size := uint32(0), 0
		var lines [][]byte
		err = DecodeSeries(payload, func(id uint32, line []byte) error {
			if size += len(line); len(lines) > 0 && id != next || id > MaxSeriesID || size > len(payload) {
				t.Fatalf("got series %d, want %d; the lines have %d bytes and the payload has %d", id, next, size, len(payload))
			}
			lines, next = append(lines, line), id+1
			return nil
		})
		if err == nil && len(lines) > 0 {
			var got [][]byte
			again := EncodeSeriesPayload(nil, next-uint32(len(lines)), slices.Values(lines))
			err := DecodeSeries(again, func(_ uint32, line []byte) error {
				got = append(got, line)
				return nil
			})
			if err != nil || fmt.Sprintf("%q", got) != fmt.Sprintf("%q", lines) {
				t.Fatalf("encoded and decoded: %q, %v; want %q", got, err, lines)
			}
		}
	})
}
