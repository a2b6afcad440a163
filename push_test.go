package main

// Ranges of scrape numbers against a map, and the headers of a push, well-formed and not.

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// Ranges behave as a set of numbers, whatever is added in what order.
func TestRangesAreASet(t *testing.T) {
	for seed := range uint64(300) {
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
				t.Fatalf("seed %d: Has(%d) is %v, in %v", seed, n, r.Has(n), r)
			}
		}
		from := 1 + rng.Uint64N(60)
		a := Range{from, from + rng.Uint64N(4)}
		all := true
		for n := a.From; n <= a.To; n++ {
			all = all && set[n]
		}
		if r.Covers(a) != all {
			t.Fatalf("seed %d: Covers(%v) is %v, in %v", seed, a, !all, r)
		}
		var o Ranges
		for range 10 {
			n := 1 + rng.Uint64N(70)
			o = o.Add(n, n+rng.Uint64N(3))
		}
		left, both := r.Without(o), slices.Clone(r).AddAll(o)
		for n := range uint64(90) {
			if left.Has(n) != (set[n] && !o.Has(n)) || both.Has(n) != (set[n] || o.Has(n)) {
				t.Fatalf("seed %d: %v without %v is %v, with it %v", seed, r, o, left, both)
			}
		}
		for i := 1; i < len(r); i++ {
			if r[i].From <= r[i-1].To+1 {
				t.Fatalf("seed %d: %v is not merged", seed, r)
			}
		}
		back, err := ParseRanges(r.String(), MaxRanges)
		if err != nil || !slices.Equal(back, r) {
			t.Fatalf("seed %d: %v came back as %v, %v", seed, r, back, err)
		}
	}
}

func TestRangesForgetTheLowest(t *testing.T) {
	var r Ranges
	for n := uint64(1); n <= 2*MaxRanges+2; n += 2 {
		r = r.Add(n, n)
	}
	if len(r) != MaxRanges || r.Has(1) || !r.Has(3) || !r.Has(2*MaxRanges+1) {
		t.Fatalf("%d ranges, from %v to %v", len(r), r[0], r[len(r)-1])
	}
}

func TestPushHeaders(t *testing.T) {
	long := strings.Repeat("7,", MaxPushRanges) + "9"
	for _, bad := range []string{
		"x", "0123456789abcdef0 1", "0123456789abcdeg 1", "0000000000000000 1", "0123456789abcdef 0", "0123456789abcdef 2-1", "0123456789abcdef 1,1",
		"0123456789abcdef 3,2", "0123456789abcdef 1-", "0123456789abcdef -1", "0123456789abcdef 1,,3", "0123456789abcdef 9007199254740993",
		"0123456789abcdef " + long, "0123456789abcdef  1",
	} {
		if n, err := ParseScrapeNames(bad); err == nil {
			t.Errorf("%q was taken as %v", bad, n)
		}
	}
	names := ScrapeNames{SpoolID: 0x1f, Numbers: Ranges{{118, 121}, {130, 130}}}
	if got := names.String(); got != "000000000000001f 118-121,130" {
		t.Errorf("names are written as %q", got)
	}
	if got, err := ParseScrapeNames(names.String()); err != nil || got.SpoolID != names.SpoolID || !slices.Equal(got.Numbers, names.Numbers) {
		t.Errorf("names came back as %v, %v", got, err)
	}
	if got, err := ParseScrapeNames("000000000000001f "); err != nil || got.SpoolID != 0x1f || len(got.Numbers) != 0 {
		t.Errorf("a question came back as %v, %v", got, err)
	}
	consumers := []ConsumerAge{{1, 0}, {1 << 63, 90 * time.Minute}}
	if got, err := ParseConsumers(FormatConsumers(consumers)); err != nil || !slices.Equal(got, consumers) {
		t.Errorf("consumers came back as %v, %v", got, err)
	}
	many := strings.TrimSuffix(strings.Repeat("0123456789abcdef:1,", MaxConsumers+1), ",")
	for _, bad := range []string{"1:1", "0123456789abcdef", "0123456789abcdef:-1", "0123456789abcdef:99999999999999999999", many} {
		if got, err := ParseConsumers(bad); err == nil {
			t.Errorf("%q was taken as %v", bad, got)
		}
	}
}

// FuzzPushHeaders: what a stranger sends costs no more memory than it takes, and what is
// read comes back as it was.
func FuzzPushHeaders(f *testing.F) {
	f.Add("0123456789abcdef 118-121,130", "0123456789abcdef:7")
	f.Fuzz(func(t *testing.T, spool, consumers string) {
		if n, err := ParseScrapeNames(spool); err == nil && n.SpoolID != 0 {
			if again, err := ParseScrapeNames(n.String()); err != nil || !slices.Equal(again.Numbers, n.Numbers) {
				t.Fatalf("%q: %v came back as %v, %v", spool, n, again, err)
			}
		}
		if all, err := ParseConsumers(consumers); err == nil {
			if again, err := ParseConsumers(FormatConsumers(all)); err != nil || !slices.Equal(again, all) {
				t.Fatalf("%q: %v came back as %v, %v", consumers, all, again, err)
			}
		}
	})
}
