package main

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// Up to MaxRanges ranges behave like a set of numbers, whatever ranges are added in whatever order.
// A set stays the same when it is formatted and parsed.
func TestRangesAreASet(t *testing.T) {
	for seed := range testSeeds(t, 300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var r Ranges
		set := map[uint64]bool{}
		for range 30 {
			from := 1 + rng.Uint64N(60)
			to := from + rng.Uint64N(5)
			r = r.Add(from, to)
			for n := from; n <= to; n++ {
				set[n] = true
			}
		}
		for n := range uint64(80) {
			if r.Has(n) != set[n] {
				t.Fatalf("seed %d: Has(%d) is %v, want %v; ranges %v", seed, n, r.Has(n), set[n], r)
			}
		}
		for n := range uint64(80) {
			end := uint64(0)
			for last := n; set[last]; last++ {
				end = last
			}
			if r.EndOfRangeWith(n) != end {
				t.Fatalf("seed %d: EndOfRangeWith(%d) is %d, want %d; ranges %v", seed, n, r.EndOfRangeWith(n), end, r)
			}
		}
		var o Ranges
		for range 10 {
			n := 1 + rng.Uint64N(70)
			o = o.Add(n, n+rng.Uint64N(3))
		}
		left, both := r.Without(o), slices.Clone(r).AddAll(o)
		for n := range uint64(90) {
			if left.Has(n) != (set[n] && !o.Has(n)) || both.Has(n) != (set[n] || o.Has(n)) {
				t.Fatalf("seed %d: %v without %v is %v, and their union is %v", seed, r, o, left, both)
			}
		}
		for i := 1; i < len(r); i++ {
			if r[i].From <= r[i-1].To+1 {
				t.Fatalf("seed %d: two ranges of %v touch or are out of order", seed, r)
			}
		}
		back, err := ParseRanges(r.String(), MaxRanges)
		if err != nil || !slices.Equal(back, r) {
			t.Fatalf("seed %d: %v was parsed as %v, with the error %v", seed, r, back, err)
		}
	}
}

// If a set would get more than MaxRanges ranges, Add removes its lowest ranges.
func TestRangesForgetTheLowest(t *testing.T) {
	var r Ranges
	for n := uint64(1); n <= 2*MaxRanges+2; n += 2 {
		r = r.Add(n, n)
	}
	if len(r) != MaxRanges || r.Has(1) || !r.Has(3) || !r.Has(2*MaxRanges+1) {
		t.Fatalf("got %d ranges from %v to %v, want %d without number 1", len(r), r[0], r[len(r)-1], MaxRanges)
	}
}
