package main

// Recovery hands the records of a log to SiteSamples one by one. SiteSamples refuses series whose
// line or ID, and batches whose number, no undamaged log can contain.

import (
	"hash/maphash"
	"testing"
)

// CheckSeriesLine refuses a line of another site and a line that is not in normal form. RestoreSeries
// refuses a line that is empty or too long, and an ID that is not above the earlier IDs or is too far
// above them.
func TestRestoreSeries(t *testing.T) {
	var parser SeriesParser
	isSite := func(id string) bool { return id == "a" }
	type record struct {
		id   uint32
		line string
		ok   bool
	}
	for _, test := range []struct {
		name    string
		records []record
	}{
		{"IDs ascend", []record{
			{0, `m{_id="a"}`, true}, {1, `n{_id="a"}`, true}, {1, `o{_id="a"}`, false}, {5, `p{_id="a"}`, true}, {4, `q{_id="a"}`, false},
		}},
		{"another site", []record{{0, `m{_id="b"}`, false}, {0, `m{_id="a"}`, true}}},
		{"malformed lines", []record{
			{0, `m{x="a"}`, false}, {0, `m`, false}, {0, ``, false}, {0, `m{_id="a"} 1`, false},
			{0, `m{_id="a",_id="b"}`, false}, {0, "m{_id=\"a\",x=\"\xff\"}", false},
		}},
		{"gap between IDs", []record{{maxGap + 1, `m{_id="a"}`, false}, {maxGap, `m{_id="a"}`, true}}},
	} {
		c := NewSiteSamples("", maphash.MakeSeed())
		for _, size := range []int{0, MaxLine + 1} {
			if err := c.RestoreSeries(0, make([]byte, size)); err == nil {
				t.Errorf("%s: a line of %d bytes is accepted", test.name, size)
			}
		}
		for _, r := range test.records {
			err := c.CheckSeriesLine(&parser, isSite, []byte(r.line))
			if err == nil {
				err = c.RestoreSeries(r.id, []byte(r.line))
			}
			if (err == nil) != r.ok {
				t.Errorf("%s: series %d %q: got %v, want accepted %t", test.name, r.id, r.line, err, r.ok)
			}
		}
	}
}

// RestoreBatch refuses a batch whose number is not above the numbers of all earlier batches. It
// drops and counts samples of unknown series.
func TestRestoreBatch(t *testing.T) {
	c := NewSiteSamples("a", maphash.MakeSeed())
	if err := c.RestoreSeries(1, []byte(`m{_id="a"}`)); err != nil { // ID 0 stays without a line, so that series 0 is unknown
		t.Fatal(err)
	}
	batch := func(seq uint64, t0 int64, ids ...uint32) *Batch {
		b := &Batch{Seq: seq, AcceptedAt: 7, T0: t0, IDs: ids, V: make([]float64, len(ids))}
		b.ComputeTimeBounds()
		return b
	}
	for _, test := range []struct {
		name    string
		b       *Batch
		ok      bool
		seq     uint64 // number of the site's newest batch after RestoreBatch
		samples int64  // number of the site's samples in memory after RestoreBatch
		lost    int
	}{
		{"known series", batch(3, 100, 1), true, 3, 1, 0},
		{"same number again", batch(3, 101, 1), false, 3, 1, 0},
		{"a padded, a known and an unknown series", batch(4, 102, 0, 1, 2), true, 4, 2, 2},
		{"no samples", batch(6, 0), true, 6, 2, 0},
		{"unknown series only", batch(9, 103, 8), true, 9, 2, 1},
	} {
		lost, err := c.RestoreBatch(test.b)
		if (err == nil) != test.ok || lost != test.lost || c.Seq != test.seq || c.SampleCount() != test.samples {
			t.Errorf("%s: got %v, %d samples lost, newest batch %d, %d samples in memory; want accepted %t, %d, %d, %d",
				test.name, err, lost, c.Seq, c.SampleCount(), test.ok, test.lost, test.seq, test.samples)
		}
	}
}
