package main

// Records come back as they were, foreign bytes cost nothing but
// an error, and a sample costs few bytes.

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

// sameBatch compares what a batch says; NaNs of equal bits are equal.
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

// randomBatch has runs of IDs and times near to each other, or extremes.
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

func TestBatchRoundTrip(t *testing.T) {
	for seed := range uint64(2000) {
		b := randomBatch(rand.New(rand.NewPCG(seed, 0)))
		payload := EncodeBatchPayload([]byte("before"), b)[len("before"):]
		if b.Size != len(payload) || len(payload) > 20*len(b.V)+80+20*len(b.Names.Numbers) {
			t.Fatalf("seed %d: %d bytes, said to be %d, for %d samples", seed, len(payload), b.Size, len(b.V))
		}
		got, err := DecodeBatch(payload)
		if err != nil || !sameBatch(b, got) || got.Size != b.Size {
			t.Fatalf("seed %d: %+v, %v\nwant %+v", seed, got, err, b)
		}
		if again := EncodeBatchPayload(nil, got); string(again) != string(payload) {
			t.Fatalf("seed %d: encoded again it differs", seed)
		}
	}
}

// A batch of the largest size fits one record, however it is made.
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
		t.Errorf("%d bytes a sample: %d samples would not fit", size/n, maxBatch)
	}
}

func TestBatchSetBounds(t *testing.T) {
	for _, test := range []struct {
		t0         int64
		dt         []int32
		t          []int64
		min, max   int64
		everywhere bool // all at one time, so that DT says nothing
	}{
		{100, nil, nil, 100, 100, true},
		{100, []int32{0, 0}, []int64{100, 100}, 100, 100, true},
		{100, []int32{-5, 7, 0}, []int64{95, 107, 100}, 95, 107, false},
		{100, []int32{1, 2}, []int64{101, 102}, 100, 102, false}, // T0 counts: a bound, not the least
		{-1 << 60, []int32{math.MinInt32}, []int64{-1<<60 + math.MinInt32}, -1<<60 + math.MinInt32, -1 << 60, false},
	} {
		b := &Batch{T0: test.t0, DT: test.dt, V: make([]float64, len(test.t)), IDs: make([]uint32, len(test.t))}
		b.ComputeTimeBounds()
		if b.MinT != test.min || b.MaxT != test.max || (b.DT == nil) != test.everywhere {
			t.Errorf("%+v: got %+v", test, b)
		}
		for i, want := range test.t {
			if b.Time(i) != want {
				t.Errorf("%+v: sample %d at %d", test, i, b.Time(i))
			}
		}
	}
}

func TestBatchFilter(t *testing.T) {
	for seed := range uint64(500) {
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
			t.Fatalf("seed %d: the batch changed", seed)
		}
		if len(got.V) != n || len(got.IDs) != n || n == len(keep) && got != b || got.Seq != b.Seq || got.AcceptedAt != b.AcceptedAt {
			t.Fatalf("seed %d: got %+v for %v", seed, got, keep)
		}
		at := 0
		for i := range keep {
			if !keep[i] {
				continue
			}
			if got.IDs[at] != b.IDs[i] || got.Time(at) != b.Time(i) || got.Time(at) < got.MinT || got.Time(at) > got.MaxT ||
				math.Float64bits(got.V[at]) != math.Float64bits(b.V[i]) {
				t.Fatalf("seed %d: sample %d differs", seed, i)
			}
			at++
		}
	}
}

func TestBatchMalformed(t *testing.T) {
	good := EncodeBatchPayload(nil, &Batch{Seq: 3, AcceptedAt: 4, T0: 5, IDs: []uint32{7, 8, 2}, DT: []int32{0, 1, 2}, V: []float64{1, 2, 3}})
	if _, err := DecodeBatch(good); err != nil {
		t.Fatal(err)
	}
	uv := func(values ...int64) (b []byte) { // zigzag where a varint stands: written by hand
		for _, v := range values {
			b = binary.AppendUvarint(b, uint64(v))
		}
		return b
	}
	eight := func(b []byte, n int) []byte { return append(b, make([]byte, 8*n)...) }
	tests := map[string][]byte{
		"empty":                       {},
		"one byte more":               append(slices.Clone(good), 0),
		"one byte less":               good[:len(good)-1],
		"overlong number":             slices.Repeat([]byte{0xff}, 11),
		"more samples than bytes":     uv(1, 0, 0, 1<<40),
		"count that overflows":        eight(append(uv(1, 0, 0), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1), 1),
		"sequence number":             eight(uv(MaxSeq+1, 0, 0, 8, 0, 1), 1),
		"time out of range":           eight(uv(1, 0, 1<<62, 8, 0, 1), 1),
		"negative ID":                 eight(uv(1, 0, 0, 4, 1, 1), 1),
		"ID too large":                eight(uv(1, 0, 0, 4, 2*(MaxSeriesID+1), 1), 1),
		"run beyond the largest ID":   eight(uv(1, 0, 0, 8, 2*MaxSeriesID, 2), 2),
		"empty run":                   eight(uv(1, 0, 0, 4, 0, 0), 1),
		"run longer than the batch":   eight(uv(1, 0, 0, 4, 0, 2), 2),
		"time difference too large":   eight(uv(1, 0, 0, 5, 0, 1, 1<<40), 1),
		"time differences too large":  eight(uv(1, 0, 0, 9, 0, 2, 2*math.MaxInt32, 2), 2),
		"no values where they should": uv(1, 0, 0, 4, 0, 1),
	}
	for name, payload := range tests {
		if b, err := DecodeBatch(payload); err == nil {
			t.Errorf("%s: %+v, %v", name, b, err)
		}
	}
	for n := range good {
		if b, err := DecodeBatch(good[:n]); err == nil {
			t.Errorf("cut at %d: %+v", n, b)
		}
	}
}

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
				t.Errorf("ID %d", id)
			}
			got = append(got, string(line))
			return nil
		})
		return got, err
	}
	if got, err := decode(payload); err != nil || !slices.Equal(got, lines) {
		t.Errorf("got %q, %v", got, err)
	}
	failed := errors.New("no")
	if err := DecodeSeries(payload, func(uint32, []byte) error { return failed }); err != failed {
		t.Errorf("got %v", err)
	}
	for name, payload := range map[string][]byte{
		"empty":               {},
		"line longer than it": append(binary.AppendUvarint(binary.AppendUvarint(nil, 1), 1<<40), 'x'),
		"ID too large":        append(binary.AppendUvarint(nil, MaxSeriesID+1), 0),
		"overlong number":     slices.Repeat([]byte{0xff}, 11),
		"length cut":          append(binary.AppendUvarint(nil, 1), 0x80),
	} {
		if err := DecodeSeries(payload, func(uint32, []byte) error { return nil }); err == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Foreign bytes are a batch that comes back the same, or an error, and cost no
// more memory than their size warrants.
func FuzzBatchRecord(f *testing.F) {
	for seed := range uint64(8) {
		f.Add(EncodeBatchPayload(nil, randomBatch(rand.New(rand.NewPCG(seed, 0)))))
	}
	f.Add(binary.AppendUvarint(nil, 1<<63))
	f.Fuzz(func(t *testing.T, payload []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		b, err := DecodeBatch(payload)
		runtime.ReadMemStats(&after)
		if cost := after.TotalAlloc - before.TotalAlloc; cost > uint64(8*len(payload)+64<<10) {
			t.Errorf("%d bytes allocated for %d", cost, len(payload))
		}
		if err == nil {
			if len(b.IDs) != len(b.V) || b.DT != nil && len(b.DT) != len(b.V) {
				t.Fatalf("%d IDs, %d times, %d values", len(b.IDs), len(b.DT), len(b.V))
			}
			for i, id := range b.IDs {
				if id > MaxSeriesID || b.Time(i) < b.MinT || b.Time(i) > b.MaxT {
					t.Fatalf("sample %d of series %d at %d, outside of %d to %d", i, id, b.Time(i), b.MinT, b.MaxT)
				}
			}
			again, err := DecodeBatch(EncodeBatchPayload(nil, b))
			if err != nil || !sameBatch(b, again) {
				t.Fatalf("%+v, %v\nwas %+v", again, err, b)
			}
		}
		next, size := uint32(0), 0
		var lines [][]byte
		err = DecodeSeries(payload, func(id uint32, line []byte) error {
			if size += len(line); len(lines) > 0 && id != next || id > MaxSeriesID || size > len(payload) {
				t.Fatalf("series %d after %d, %d bytes of %d", id, next, size, len(payload))
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
				t.Fatalf("%q, %v; was %q", got, err, lines)
			}
		}
	})
}
