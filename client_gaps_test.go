package main

// Tests of the gaps that scrapes leave: against a model that keeps each missing millisecond, and of
// the record on disk.

import (
	"bytes"
	"maps"
	"math/rand/v2"
	"reflect"
	"testing"
)

// After a scrape, the spans without scrapes are gaps, up to one interval before the scrape.
func TestScrapeProgress(t *testing.T) {
	for _, c := range []struct {
		name   string
		before scrapeProgress
		now    int64
		behind int64 // time since the newest sample
		want   []gap
		// expired is how many ms of the gaps are older than most.
		expired int64
	}{
		{"first scrape", scrapeProgress{}, 1000, 0, nil, 0},
		{"next scrape", scrapeProgress{Last: 1000, Newest: 1000}, 1100, 0, nil, 0},
		{"late scrape", scrapeProgress{Last: 1000, Newest: 1000}, 1150, 0, nil, 0},
		{"one missing", scrapeProgress{Last: 1000, Newest: 1000}, 1200, 0, []gap{{900, 1100}}, 0},
		{"one missing, other source", scrapeProgress{Last: 1000, Newest: 1000, Source: 2}, 1200, 0, []gap{{1000, 1100}}, 0},
		{"other source after a standstill", scrapeProgress{Last: 1000, Newest: 700, Source: 2}, 1100, 0, []gap{{700, 1000}}, 0},
		{"standstill", scrapeProgress{Last: 1000, Newest: 700}, 1100, 0, nil, 0},
		{"second gap", scrapeProgress{Last: 1000, Newest: 1000, Gaps: []gap{{500, 700}}}, 1200, 0, []gap{{500, 700}, {900, 1100}}, 0},
		{"older than most", scrapeProgress{Last: 1000, Newest: 1000, Gaps: []gap{{500, 800}}}, 1700, 0, []gap{{700, 800}, {900, 1600}}, 200},
		{"long", scrapeProgress{Last: 1000, Newest: 1000}, 9000, 0, []gap{{8000, 8900}}, 7100},
		{"near the epoch", scrapeProgress{Last: 50, Newest: 50}, 300, 0, []gap{{0, 200}}, 0},
		{"clock set back", scrapeProgress{Last: 1000, Newest: 1000, Gaps: []gap{{500, 700}}}, 600, 0, []gap{{500, 600}}, 0},
		{"behind", scrapeProgress{Last: 1000, Newest: 950}, 1200, 30, []gap{{800, 1100}}, 0},
		{"far behind", scrapeProgress{Last: 1000, Newest: 1000}, 1200, 200, []gap{{900, 1100}}, 0},
	} {
		got, expired := c.before.scraped(c.now, c.now-c.behind, 0, gapRules{Interval: 100, Overlap: 100, MaxAge: 1000})
		if got.Last != c.now || !sameGaps(got.Gaps, c.want) || expired != c.expired {
			t.Errorf("%s: after a scrape at %d, the progress is %+v and %d ms expired, want the gaps %v and %d", c.name, c.now, got, expired, c.want, c.expired)
		}
	}
}

func sameGaps(a, b []gap) bool { return len(a) == 0 && len(b) == 0 || reflect.DeepEqual(a, b) }

// More gaps than maxGaps lose nothing: the nearest ones become one.
func TestManyGaps(t *testing.T) {
	var p scrapeProgress
	for i := range int64(3 * maxGaps) {
		p.Gaps = append(p.Gaps, gap{100 * i, 100*i + 10 + i%7})
	}
	all := p.Gaps
	p = p.without(gap{})
	if len(p.Gaps) != maxGaps {
		t.Errorf("there are %d gaps, want %d", len(p.Gaps), maxGaps)
	}
	for _, g := range all {
		covered := false
		for _, got := range p.Gaps {
			covered = covered || got.From <= g.From && g.To <= got.To
		}
		if !covered {
			t.Errorf("the gap %v is lost", g)
		}
	}
}

// The record on disk decodes to what was encoded, and a malformed one is an error.
func TestScrapeProgressRecord(t *testing.T) {
	for _, p := range []scrapeProgress{{}, {Last: 7, Newest: 3, Source: -5}, {Last: MaxMoment, Newest: MaxMoment, Gaps: []gap{{0, 1}, {3, MaxMoment}}}} {
		got, err := decodeScrapeProgress(appendScrapeProgress(nil, p))
		if err != nil || !reflect.DeepEqual(got, p) {
			t.Errorf("%+v is decoded as %+v, %v", p, got, err)
		}
	}
	for name, p := range map[string]scrapeProgress{
		"negative": {Last: 1, Newest: -1}, "newer than the scrape": {Last: 1, Newest: 2}, "late": {Last: MaxMoment + 1}, "empty gap": {Gaps: []gap{{1, 1}}}, "touching": {Gaps: []gap{{1, 2}, {2, 3}}},
		"out of order": {Gaps: []gap{{5, 6}, {1, 2}}}, "negative gap": {Gaps: []gap{{-5, 6}}},
	} {
		if got, err := decodeScrapeProgress(appendScrapeProgress(nil, p)); err == nil {
			t.Errorf("%s: %+v is decoded", name, got)
		}
	}
	if _, err := decodeScrapeProgress([]byte{1, 2, 3}); err == nil {
		t.Error("three bytes are decoded")
	}
}

// These are the gapRules of TestScrapeProgressAgainstModel.
const modelInterval, modelOverlap, modelMost = 10, 13, 20_000

// progressModel is what a scrapeProgress says, as a set of each missing ms.
type progressModel struct {
	last, newest, source int64
	missing              map[int64]bool
}

// scraped makes a scrape in the model, and returns what p becomes by the same scrape.
func (m *progressModel) scraped(p scrapeProgress, now, newest, source int64) scrapeProgress {
	from, isGap := m.last, 2*(now-m.last) > 3*modelInterval
	if m.source != source {
		from, isGap = m.newest, isGap || 2*(min(now, newest)-m.newest) > 3*modelInterval
	}
	for m.source == source && from > m.newest-modelOverlap {
		from -= modelInterval
	}
	if m.last > 0 && isGap {
		for ms := max(0, from, now-modelMost) + 1; ms <= now-modelInterval; ms++ {
			m.missing[ms] = true
		}
	}
	m.last, m.newest, m.source = now, min(newest, now), source
	maps.DeleteFunc(m.missing, func(ms int64, _ bool) bool { return ms <= now-modelMost || ms > now })
	next, _ := p.scraped(now, newest, source, gapRules{Interval: modelInterval, Overlap: modelOverlap, MaxAge: modelMost})
	return next
}

// shifted shifts the clock in the model, and returns what p becomes by the same shift.
func (m *progressModel) shifted(p scrapeProgress, ms int64) scrapeProgress {
	shifted := map[int64]bool{}
	for at := range m.missing {
		shifted[at+ms] = true
	}
	m.missing = shifted
	if m.last > 0 {
		m.last, m.newest = m.last+ms, m.newest+ms
	}
	return p.shifted(ms)
}

// without fills a slice in the model, and returns what p becomes when it is filled.
func (m *progressModel) without(p scrapeProgress, slice gap) scrapeProgress {
	for ms := slice.From + 1; ms <= slice.To; ms++ {
		delete(m.missing, ms)
	}
	return p.without(slice)
}

// A scrapeProgress loses no missing ms, whatever is scraped, filled and shifted, and however the clock
// and the age of the samples jump. It has no other ms unless it has as many gaps as it may have. It is
// valid as a record.
func TestScrapeProgressAgainstModel(t *testing.T) {
	full := 0
	for seed := range testSeeds(t, 6) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		m := progressModel{missing: map[int64]bool{}}
		var p scrapeProgress
		now := int64(1_000_000)
		fills := seed%2 == 0 // without fills, there are more gaps than are remembered
		for step := range 1000 {
			switch n := rnd.IntN(100); {
			case n < 70 || !fills && n < 98:
				now += 9 + rnd.Int64N(20)
				if rnd.IntN(100) == 0 {
					now += rnd.Int64N(4000) - 1000
				}
				newest := now
				if rnd.IntN(4) == 0 {
					newest += 10 - rnd.Int64N(60)
				}
				p = m.scraped(p, now, newest, rnd.Int64N(20)/19)
			case n < 98:
				slice, _ := p.firstSlice(1 + rnd.Int64N(60))
				if rnd.IntN(4) == 0 {
					slice.From = now - rnd.Int64N(modelMost)
					slice.To = slice.From + rnd.Int64N(300)
				}
				p = m.without(p, slice)
			default:
				ms := rnd.Int64N(2000) - 1000
				p, now = m.shifted(p, ms), now+ms
			}
			got := map[int64]bool{}
			for _, g := range p.Gaps {
				for ms := g.From + 1; ms <= g.To; ms++ {
					got[ms] = true
				}
			}
			for ms := range m.missing {
				if !got[ms] {
					t.Fatalf("step %d: %d is missing, but not in the gaps %v", step, ms, p.Gaps)
				}
			}
			if len(p.Gaps) == maxGaps {
				full++
				m.missing = got // gaps may have become one, with the time between them
			}
			if len(got) != len(m.missing) || p.pending() != int64(len(got)) || p.Last != m.last || p.Newest != m.newest || p.Source != m.source {
				t.Fatalf("step %d: the progress is %+v, want %d ms missing, the last scrape at %d and its newest sample at %d", step, p, len(m.missing), m.last, m.newest)
			}
			if again, err := decodeScrapeProgress(appendScrapeProgress(nil, p)); err != nil || again.Last != p.Last || again.Newest != p.Newest || !sameGaps(again.Gaps, p.Gaps) {
				t.Fatalf("step %d: the progress %+v is decoded as %+v, %v", step, p, again, err)
			}
		}
	}
	if full == 0 {
		t.Error("there were never as many gaps as are remembered")
	}
}

// If decodeScrapeProgress accepts a payload, encoding the result gives the same bytes. Its gaps are
// ones that can be filled.
func FuzzDecodeScrapeProgress(f *testing.F) {
	f.Add([]byte{})
	for _, p := range []scrapeProgress{{}, {Last: 7, Newest: 3}, {Last: MaxMoment, Newest: 1, Gaps: []gap{{0, 1}, {3, MaxMoment}}}, {Last: 9, Newest: 9, Gaps: []gap{{1, 1}}}} {
		f.Add(appendScrapeProgress(nil, p))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := decodeScrapeProgress(data)
		if err != nil {
			return
		}
		if again := appendScrapeProgress(nil, p); !bytes.Equal(again, data) {
			t.Fatalf("the payload %q encodes to %q after decoding", data, again)
		}
		if same := p.without(gap{}); !sameGaps(same.Gaps, p.Gaps) || p.Newest < 0 || p.Newest > p.Last || p.Last > MaxMoment || len(p.Gaps) > maxGaps {
			t.Fatalf("decoded %+v, which is not valid; its gaps in order are %v", p, same.Gaps)
		}
		for n := 0; len(p.Gaps) > 0; n++ {
			slice, ok := p.firstSlice(1 << 50)
			if p = p.without(slice); !ok || n > maxGaps {
				t.Fatalf("after %d slices there are still the gaps %v", n, p.Gaps)
			}
		}
	})
}
