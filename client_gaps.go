package main

// This file remembers which scrapes of the source are missing. After the client was down, or could
// not reach its source, the spans of these scrapes are gaps. Pure: no I/O, no clock. All times are by the
// source's clock, in ms since the epoch.

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"
)

const (
	maxGaps       = 64  // most gaps that are remembered; the two that are nearest to each other become one
	gapTolerance  = 1.5 // a scrape that follows the previous one after more than this many intervals leaves a gap
	progressKind  = 1   // kind of the record of a scrapeProgress, which is also the version of its payload
	gapRecordSize = 2 * 8
)

// gap is a span without scrapes: it has the samples after From, up to and including To.
type gap struct{ From, To int64 }

func (g gap) length() time.Duration { return time.Duration(g.To-g.From) * time.Millisecond }

// scrapeProgress says what was scraped. The zero value says that nothing is known.
type scrapeProgress struct {
	Last   int64 // time of the newest successful scrape; 0 if there was none
	Newest int64 // time of the newest sample of that scrape
	Source int64 // identifies the source of that scrape among the sources of a client; see sourceID
	Gaps   []gap // in ascending order; they do not overlap
}

// gapRules say which scrapes leave gaps. All are in ms.
type gapRules struct {
	Interval int64 // between two scrapes
	Overlap  int64 // a gap begins that long before the newest sample of the last scrape
	MaxAge   int64 // older parts of gaps are cut off
}

// scraped returns the progress after a successful scrape of a source at the time now, whose newest
// sample has the time newest. If the scrapes of more than one interval are missing since the last
// scrape, the span between both is a new gap. It ends at the time of the last missing scrape; the scrape
// itself has given the newest samples of the last interval. expired is how many ms of the gaps were cut off because of their age.
//
// The gap begins before the newest sample of the last scrape, because the samples of some series, such
// as those of rules, arrive at the source later than others. Servers drop samples that they have
// already. The gap begins a whole number of intervals before the last scrape, so that each interval in
// it ends when a scrape would have been made: a border at the times of samples would put two samples
// into one interval if one is some ms late. Samples of another replica differ, so after a change of the
// source the gap begins at the newest sample.
func (p scrapeProgress) scraped(now, newest, source int64, rules gapRules) (next scrapeProgress, expired int64) {
	next = scrapeProgress{Last: now, Newest: min(newest, now), Source: source, Gaps: slices.Clone(p.Gaps)}
	intervals := (p.Last - p.Newest + rules.Overlap + rules.Interval - 1) / rules.Interval
	from, elapsed := p.Last-intervals*rules.Interval, now-p.Last
	if p.Source != source { // the samples of the last source may have stopped long before its scrapes failed
		from, elapsed = p.Newest, max(elapsed, next.Newest-p.Newest)
	}
	if p.Last > 0 && float64(elapsed) > gapTolerance*float64(rules.Interval) {
		next.Gaps = append(next.Gaps, gap{max(0, from), now - rules.Interval})
	}
	for i := range next.Gaps {
		g := &next.Gaps[i]
		oldest := now - rules.MaxAge
		expired += max(0, min(g.To, oldest)-g.From)
		// The source's clock may have been set back, so that gaps can be after now.
		g.From, g.To = max(g.From, oldest), min(g.To, now)
	}
	next.normalize()
	return next, expired
}

// without returns the progress after the span of done was filled.
func (p scrapeProgress) without(done gap) scrapeProgress {
	next := p
	next.Gaps = nil
	for _, g := range p.Gaps {
		next.Gaps = append(next.Gaps, gap{g.From, min(g.To, done.From)}, gap{max(g.From, done.To), g.To})
	}
	next.normalize()
	return next
}

// shifted returns the progress by another clock, which is ahead by ms.
func (p scrapeProgress) shifted(ms int64) scrapeProgress {
	next := p
	next.Gaps = slices.Clone(p.Gaps)
	if p.Last > 0 {
		next.Last, next.Newest = max(1, p.Last+ms), max(1, p.Newest+ms)
	}
	for i := range next.Gaps {
		next.Gaps[i].From, next.Gaps[i].To = next.Gaps[i].From+ms, next.Gaps[i].To+ms
	}
	next.normalize()
	return next
}

// normalize sorts the gaps, joins those that overlap or touch, removes empty ones, and keeps at most
// maxGaps. Joining gaps that do not touch only causes samples to be fetched again.
func (p *scrapeProgress) normalize() {
	slices.SortFunc(p.Gaps, func(a, b gap) int { return int(min(1, max(-1, a.From-b.From))) })
	kept := p.Gaps[:0]
	for _, g := range p.Gaps {
		switch last := len(kept) - 1; {
		case g.From < 0 || g.To <= g.From:
		case last >= 0 && g.From <= kept[last].To:
			kept[last].To = max(kept[last].To, g.To)
		default:
			kept = append(kept, g)
		}
	}
	for len(kept) > maxGaps {
		nearest := 0
		for i := range kept[:len(kept)-1] {
			if kept[i+1].From-kept[i].To < kept[nearest+1].From-kept[nearest].To {
				nearest = i
			}
		}
		kept[nearest].To = kept[nearest+1].To
		kept = slices.Delete(kept, nearest+1, nearest+2)
	}
	p.Gaps = kept
}

// firstSlice returns the oldest part of the gaps that is at most most long. ok is false if there is
// no gap.
func (p scrapeProgress) firstSlice(most int64) (slice gap, ok bool) {
	if len(p.Gaps) == 0 {
		return gap{}, false
	}
	g := p.Gaps[0]
	return gap{g.From, min(g.To, g.From+most)}, true
}

// pending returns the ms in all gaps.
func (p scrapeProgress) pending() (ms int64) {
	for _, g := range p.Gaps {
		ms += g.To - g.From
	}
	return ms
}

// appendScrapeProgress appends the payload of a record of progressKind:
//
//	int64 last, newest, source; then for each gap int64 from, int64 to
func appendScrapeProgress(b []byte, p scrapeProgress) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(p.Last))
	b = binary.LittleEndian.AppendUint64(b, uint64(p.Newest))
	b = binary.LittleEndian.AppendUint64(b, uint64(p.Source))
	for _, g := range p.Gaps {
		b = binary.LittleEndian.AppendUint64(b, uint64(g.From))
		b = binary.LittleEndian.AppendUint64(b, uint64(g.To))
	}
	return b
}

// decodeScrapeProgress decodes a payload strictly: every payload that it accepts is one that
// appendScrapeProgress can write.
func decodeScrapeProgress(payload []byte) (p scrapeProgress, err error) {
	r := NewWireReader(payload)
	p.Last, p.Newest, p.Source = int64(r.Uint64()), int64(r.Uint64()), int64(r.Uint64())
	r.Require(p.Newest >= 0 && p.Newest <= p.Last && p.Last <= MaxMoment && r.Len() <= maxGaps*gapRecordSize)
	before := int64(-1)
	for r.Len() > 0 {
		g := gap{int64(r.Uint64()), int64(r.Uint64())}
		r.Require(g.From > before && g.To > g.From && g.To <= MaxMoment)
		p.Gaps, before = append(p.Gaps, g), g.To
	}
	if err := r.Done(); err != nil {
		return scrapeProgress{}, fmt.Errorf("malformed record of the last scrape: %w", err)
	}
	return p, nil
}
