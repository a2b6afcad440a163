package main

// transfer_test.go: what one server held arrives at another as it was, whatever it is
// cut into; and what no server would send is refused, and costs no memory.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"testing"
	"time"
)

// transferred is a batch as a receiver may know it.
type transferred struct {
	Samples []heldSample
	Bits    []uint64 // their values
	Handed  Handed
}

// randomCluster is a cluster after some pushes, of which a few samples are older than
// two hours.
func randomCluster(t *testing.T, rng *rand.Rand, clock *storeClock) *Cluster {
	c := NewCluster("x", maphash.MakeSeed())
	c.Begin(rng.Uint64N(1000))
	values := []float64{0, math.Copysign(0, -1), math.Inf(1), math.Inf(-1), math.NaN(), math.SmallestNonzeroFloat64, 1, 2.5}
	for range rng.IntN(12) {
		var points []point
		for range rng.IntN(30) {
			ago := rng.IntN(20)
			if rng.IntN(5) == 0 {
				ago = rng.IntN(9000)
			}
			points = append(points, point{fmt.Sprint("m", rng.IntN(3)), rng.IntN(20), clock.ms(ago), values[rng.IntN(len(values))]})
		}
		p := storePush("x", points...)
		if rng.IntN(2) == 0 {
			p.Clock = ScrapeClock{Known: true, Offset: rng.Int64N(100_000), Base: rng.Int64N(1000), Boot: 1 + rng.Uint64N(2)}
		}
		b, known, _, err := c.Prepare(p, nil, At(clock.Now()), 3*time.Hour, 0)
		if err != nil {
			t.Fatal(err)
		}
		if len(b.V) == 0 {
			c.Table.Truncate(known)
			c.Accepted = b.Accepted
		} else {
			for range rng.IntN(3) * rng.IntN(3) {
				b.Had = append(b.Had, rng.Uint64())
			}
			c.Take(b)
		}
		clock.Add(time.Duration(rng.IntN(20_000)) * time.Millisecond)
	}
	return &c
}

// What is handed over piece by piece is what was held and not expired, in order; and
// the receiver knows when the site pushed last.
func TestTransferRoundTrip(t *testing.T) {
	pieces, most := 0, 0
	for seed := range uint64(1000) {
		rng := rand.New(rand.NewPCG(seed, 7))
		clock := newStoreClock()
		c := randomCluster(t, rng, clock)
		oldest := clock.ms(7200)
		had := func(b *Batch) []uint64 { return b.Had }
		var want, got []transferred
		for _, b := range c.Batches {
			w := transferred{Handed: Handed{Accepted: b.Accepted, Clock: b.Clock, Shift: b.Shift, Had: b.Had}}
			for i, id := range b.IDs {
				if b.Time(i) >= oldest {
					w.Samples = append(w.Samples, heldSample{string(c.Table.Line(id)), b.Time(i)})
					w.Bits = append(w.Bits, math.Float64bits(b.V[i]))
				}
			}
			if len(w.Samples) > 0 {
				want = append(want, w)
			}
		}
		accepted, seq, to := c.Accepted, c.Seq, NewCluster("x", maphash.MakeSeed())
		for n := 0; ; n++ {
			chunk, upTo, samples := AppendBatches([]byte("before"), c, oldest, 1<<rng.IntN(13), had)
			pushes, err := DecodeBatches(chunk[len("before"):], "x")
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			for _, p := range pushes {
				g := transferred{Handed: *p.Handed}
				for _, s := range p.Push.Samples {
					g.Samples = append(g.Samples, heldSample{string(p.Push.Line(s)), s.T})
					g.Bits = append(g.Bits, math.Float64bits(s.V))
				}
				samples -= len(g.Samples)
				if len(g.Samples) > 0 {
					got = append(got, g)
				}
				b, _, _, err := to.Prepare(p.Push, p.Handed, At(clock.Now()), 2*time.Hour, 0)
				if err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				to.Take(b)
			}
			if samples != 0 {
				t.Fatalf("seed %d: %d more samples are said to be sent than are", seed, samples)
			}
			most = max(most, n+1)
			pieces++
			c.Drop(upTo)
			if upTo == seq {
				break
			}
			if len(c.Batches) == 0 || n > 20 {
				t.Fatalf("seed %d: up to %d of %d, and nothing is left", seed, upTo, seq)
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("seed %d: got %+v\nwant %+v", seed, got, want)
		}
		if to.Accepted != accepted {
			t.Fatalf("seed %d: the last push was at %d, handed over as %d", seed, accepted, to.Accepted)
		}
	}
	t.Logf("%d pieces, %d of one cluster at most", pieces, most)
}

// However many series a cluster has, its lines do not go with every batch; and no piece
// is much larger than it may be.
func TestTransferSize(t *testing.T) {
	const most = 4 << 10
	for _, series := range []int{1, 10, 100, 300, 1000} {
		clock := newStoreClock()
		c := NewCluster("x", maphash.MakeSeed())
		for range 100 {
			points := make([]point, series)
			for i := range points {
				points[i] = point{"m", i, clock.ms(0), 1}
			}
			b, _, _, err := c.Prepare(storePush("x", points...), nil, At(clock.Now()), time.Hour, 0)
			if err != nil {
				t.Fatal(err)
			}
			EncodeBatch(nil, b)
			c.Take(b)
			clock.Add(time.Second)
		}
		held, batch := c.Bytes(), int64(c.Batches[0].Size)
		sent, largest := int64(0), int64(0)
		for len(c.Batches) > 0 {
			chunk, upTo, _ := AppendBatches(nil, &c, 0, most, func(*Batch) []uint64 { return nil })
			sent += int64(len(chunk))
			largest = max(largest, int64(len(chunk)))
			c.Drop(upTo)
		}
		// Lines that are more than half of what a piece may be leave no room for many batches.
		text := int64(c.Table.TextBytes())
		if text <= maxPiece/2*most && sent > 3*held || largest > max(maxPiece*most, text)+batch+int64(series)*3 {
			t.Errorf("%d series: %d bytes are held, %d are sent, %d of them in one piece", series, held, sent, largest)
		}
	}
}

// transferParts frames what AppendBatches would: a series record and batches.
func transferParts(lines []string, batches ...*Batch) (b []byte) {
	parts := [][]byte{EncodeSeries(nil, 0, func(yield func([]byte) bool) {
		for _, l := range lines {
			if !yield([]byte(l)) {
				return
			}
		}
	})}
	for _, batch := range batches {
		parts = append(parts, EncodeBatch(nil, batch))
	}
	for _, p := range parts {
		b = append(binary.AppendUvarint(b, uint64(len(p))), p...)
	}
	return b
}

func transferLine(id string, n int) string {
	p := storePush(id, point{"m", n, 0, 0})
	return string(p.Line(p.Samples[0]))
}

func TestTransferMalformed(t *testing.T) {
	a, b := transferLine("x", 1), transferLine("x", 2)
	batch := func(ids ...uint32) *Batch {
		return &Batch{Seq: 1, Accepted: 5, T0: 7, IDs: ids, V: make([]float64, len(ids))}
	}
	accepted := func(at int64) *Batch {
		b := batch(0)
		b.Accepted = at
		return b
	}
	good := transferParts([]string{a, b}, batch(0, 1), &Batch{Seq: 2, T0: 8, IDs: []uint32{1}, V: []float64{1}})
	if _, err := DecodeBatches(good, "x"); err != nil {
		t.Fatal(err)
	}
	if got, err := DecodeBatches(transferParts(nil, batch()), "x"); err != nil || len(got) != 1 || got[0].Handed.Accepted != 5 {
		t.Fatalf("%+v, %v", got, err)
	}
	tests := map[string][]byte{
		"nothing":                          {},
		"a length beyond the end":          binary.AppendUvarint(nil, 1<<40),
		"an overlong length":               slices.Repeat([]byte{0xff}, 11),
		"series that are none":             {1, 0x80},
		"series from 1 on":                 append([]byte{byte(2 + len(a))}, EncodeSeries(nil, 1, slices.Values([][]byte{[]byte(a)}))...),
		"a line that is none":              transferParts([]string{"m{"}, batch(0)),
		"a line of no normal form":         transferParts([]string{`m{_id="x",instance="",job="", n="1"}`}, batch(0)),
		"a line of another cluster":        transferParts([]string{a, transferLine("y", 1)}, batch(0)),
		"a line of no cluster":             transferParts([]string{`m{instance="",job=""}`}, batch(0)),
		"a line twice":                     transferParts([]string{a, a}, batch(0), &Batch{Seq: 2, T0: 7, IDs: []uint32{1}, V: []float64{1}}),
		"an unknown series":                transferParts([]string{a}, batch(1)),
		"a sample twice in a batch":        transferParts([]string{a}, batch(0, 0)),
		"a sample twice in two":            transferParts([]string{a}, batch(0), batch(0)),
		"a batch that is none":             append(transferParts([]string{a}), 3, 1, 2, 3),
		"more samples than bytes":          append(transferParts([]string{a}), 5, 1, 0, 0, 0x80, 0x40),
		"a batch of nothing beside others": transferParts([]string{a}, batch(), batch(0)),
		"accepted before the epoch":        transferParts([]string{a}, accepted(-1)),
		"accepted when no clock says":      transferParts([]string{a}, accepted(math.MaxInt64)),
		"a shift beyond any clock": transferParts([]string{a}, &Batch{T0: 7, IDs: []uint32{0}, V: []float64{1},
			Clock: ScrapeClock{Known: true}, Shift: math.MaxInt64}),
	}
	for name, in := range tests {
		if got, err := DecodeBatches(in, "x"); !errors.Is(err, errTransfer) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for n := range good {
		// What is cut between two batches is whole.
		if got, err := DecodeBatches(good[:n], "x"); err == nil && len(got) > 1 {
			t.Errorf("cut at %d: %+v", n, got)
		}
	}
}

// Foreign bytes are batches that are held as they are, or an error, and cost no more
// memory than their size warrants.
func FuzzDecodeBatches(f *testing.F) {
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 7))
		c := NewCluster("x", maphash.MakeSeed())
		for i := range 3 {
			b, _, _, err := c.Prepare(storePush("x", point{"m", rng.IntN(3), int64(i), math.NaN()}, point{"m", 5, int64(i), 1}), nil, At(time.UnixMilli(1000)), time.Hour, 0)
			if err != nil {
				f.Fatal(err)
			}
			c.Take(b)
		}
		chunk, _, _ := AppendBatches(nil, &c, 0, 1<<rng.IntN(8), func(*Batch) []uint64 { return []uint64{seed} })
		f.Add(chunk)
	}
	f.Add(transferParts(nil, &Batch{Accepted: 5}))
	f.Add(slices.Repeat(transferParts(nil), 100))
	f.Add(append(transferParts(nil), slices.Repeat([]byte{4, 0, 0, 0, 0}, 1000)...))
	f.Fuzz(func(t *testing.T, in []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		pushes, err := DecodeBatches(in, "x")
		runtime.ReadMemStats(&after)
		if cost := after.TotalAlloc - before.TotalAlloc; cost > uint64(64*len(in)+64<<10) {
			t.Errorf("%d bytes allocated for %d", cost, len(in))
		}
		if err != nil {
			return
		}
		seen := map[heldSample]bool{}
		c := NewCluster("x", maphash.MakeSeed())
		for _, p := range pushes {
			for _, s := range p.Push.Samples {
				k := heldSample{string(p.Push.Line(s)), s.T}
				if seen[k] {
					t.Fatalf("%v is there twice", k)
				}
				seen[k] = true
			}
			b, _, res, err := c.Prepare(p.Push, p.Handed, At(time.UnixMilli(0)), MaxRetention, 0)
			if err != nil || res.Duplicates+res.Conflicts > 0 {
				t.Fatalf("%+v, %v", res, err)
			}
			c.Take(b)
		}
		if len(pushes) == 0 {
			return
		}
		chunk, _, _ := AppendBatches(nil, &c, math.MinInt64, math.MaxInt, func(b *Batch) []uint64 { return b.Had })
		if _, err := DecodeBatches(chunk, "x"); err != nil {
			t.Fatalf("does not read back: %v", err)
		}
	})
}
