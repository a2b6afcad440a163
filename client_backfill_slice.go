package main

// This file fetches one slice of a gap. A range selector of the query API returns the raw samples of a
// span with their times; the newest sample of each series in each scrape interval is kept. The samples
// get the external labels and pass the same cleaning as those of a scrape.

import (
	"context"
	"fmt"
	"slices"
)

// fetch returns the samples of a slice, cleaned as those of a scrape. Their times are corrected like
// those of the newest scrape, because the clock of this host may be set between two scrapes. Where the
// source in use was down, the samples of another replica are returned.
func (b *backfiller) fetch(ctx context.Context, slice gap) (filledSlice, error) {
	api := b.c.newSourceAPI()
	b.mu.Lock()
	clock := b.clock
	b.mu.Unlock()
	// Pieces of one scrape have the same At, so these pieces are not from the same ms as the scrape.
	piece := Scrape{At: clock.At, SourceTime: clock.SourceTime - 1, Shift: clock.Shift, Corrected: clock.Corrected}
	piece.At.Wall, piece.At.Boot = max(0, piece.At.Wall-1), max(0, piece.At.Boot-1)
	w := newPieceWriter(piece, min(b.c.cfg.LimitBytes, MaxPiece))
	step := b.c.cfg.ScrapeInterval.Milliseconds()
	f := sliceWriter{w: w, cleaner: api.st.NewCleaner(), step: step, skew: api.src.skew.Load(), hasSamples: make([]bool, (slice.To-slice.From+step-1)/step)}
	if err := b.fetchFrom(ctx, api, slice, &f); err != nil {
		return filledSlice{}, err
	}
	b.perMs = float64(f.raw) / float64(slice.To-slice.From)
	if len(b.c.sources.all) > 1 {
		holes := f.holes(slice)
		f.hasSamples = nil
		for _, hole := range holes {
			b.fetchHole(ctx, api, hole, &f)
		}
	}
	got := &CleanedScrape{At: piece.At, SourceTime: piece.SourceTime}
	var err error
	if got.Pieces, err = w.finish(); err != nil {
		return filledSlice{}, err
	}
	b.c.dropped.Add(float64(w.tooLarge), DropInvalid)
	for _, p := range got.Pieces {
		got.Samples += p.Samples
	}
	return filledSlice{slice, api.src, got, make(chan bool, 1)}, nil
}

// fetchFrom writes the samples of a span that a source has. The span is by the clock of the source in
// use.
func (b *backfiller) fetchFrom(ctx context.Context, api sourceAPI, span gap, f *sliceWriter) error {
	selectors, err := api.selectors()
	if err != nil {
		return err
	}
	if b.external[api.src] == nil {
		external, err := api.externalLabels(ctx, selectors, b.c.moment().Wall+api.src.skew.Load())
		if err != nil {
			return err
		}
		b.external[api.src] = external
	}
	f.span, f.external = span, labelList(b.external[api.src])
	f.ahead = api.src.skew.Load() - f.skew
	for i, m := range selectors {
		f.before = selectors[:i]
		if err := api.query(ctx, fmt.Sprintf("%s[%dms]", m, span.To-span.From), span.To+f.ahead, f.add); err != nil {
			return err
		}
	}
	return nil
}

// fetchHole writes the samples of a span in which the source in use has none, from the first other
// source that has some. Failures are only counted, because a replica may be down for long.
func (b *backfiller) fetchHole(ctx context.Context, inUse sourceAPI, hole gap, f *sliceWriter) {
	for _, src := range b.c.sources.all {
		if src == inUse.src {
			continue
		}
		raw := f.raw
		if b.fetchFrom(ctx, sourceAPI{b.c, src, inUse.st}, hole, f) != nil {
			b.requests.Inc("failed")
		}
		if f.raw > raw {
			return
		}
	}
}

// sliceWriter writes the samples of a slice that missing scrapes would have given.
type sliceWriter struct {
	w        *pieceWriter
	cleaner  *ClientCleaner
	before   Selectors // of the requests that came before; the series that they match were written
	span     gap       // only samples in it are written
	step     int64     // ms of a scrape interval
	external []Label   // labels that /federate adds
	skew     int64     // of the source in use, by whose clock spans are
	ahead    int64     // ms by which the clock of the source of the span is ahead of that of the source in use
	one      SampleList
	raw      int // samples of the source in the spans

	hasSamples []bool // by number of the interval in the slice, which is the first span; nil for later spans
}

// add writes the newest sample of a series in each interval of the span. As in /federate, a series
// ends with its last sample before a stale marker; the query API returns no stale markers.
func (f *sliceWriter) add(s *apiSeries) error {
	r := RawSample{Name: []byte(s.Labels[metricNameLabel]), Labels: labelList(s.Labels)}
	if len(f.before) > 0 && f.before.MatchOrEmpty(r.Name, r.Labels) {
		return nil
	}
	newest := s.Values[:0]
	for _, v := range s.Values {
		v.T -= f.ahead
		if v.T <= f.span.From || v.T > f.span.To { // Prometheus 2 includes the begin of the range, Prometheus 3 does not
			continue
		}
		f.raw++
		if n := f.interval(v.T); n < int64(len(f.hasSamples)) {
			f.hasSamples[n] = true
		}
		if last := len(newest) - 1; last >= 0 && f.interval(newest[last].T) == f.interval(v.T) {
			newest[last] = v
		} else {
			newest = append(newest, v)
		}
	}
	for _, l := range f.external {
		if _, has := s.Labels[string(l.Name)]; !has {
			r.Labels = append(r.Labels, l)
		}
	}
	if len(newest) == 0 || f.cleaner.Clean(&r) != "" {
		return nil
	}
	f.one.Reset()
	if f.one.Add(&r) != nil {
		return nil // the scrapes log and count invalid series
	}
	line := f.one.Line(f.one.Samples[0])
	for _, v := range newest {
		f.w.add(line, v.T, v.V)
	}
	return nil
}

// labelList returns the labels but the metric name, in any order.
func labelList(labels map[string]string) []Label {
	var list []Label
	for name, value := range labels {
		if name != metricNameLabel {
			list = append(list, Label{[]byte(name), []byte(value)})
		}
	}
	return list
}

// interval returns the number of the interval in the span that has the time t.
func (f *sliceWriter) interval(t int64) int64 { return (t - f.span.From - 1) / f.step }

// holes returns the spans of the slice in which the source has no samples, although it has them more
// often elsewhere in the slice, so that it was probably down.
func (f *sliceWriter) holes(slice gap) (holes []gap) {
	with := []int{-1} // numbers of intervals with samples, between two limits
	for n, has := range f.hasSamples {
		if has {
			with = append(with, n)
		}
	}
	with = append(with, len(f.hasSamples))
	var distances []int
	for i := range with[1:] {
		distances = append(distances, with[i+1]-with[i])
	}
	usual := 1
	if len(distances) > 2 {
		// Of samples that are a little rarer than the intervals, some distances are longer than the median.
		usual = slices.Sorted(slices.Values(distances))[max(len(distances)/2, len(distances)*9/10-1)]
	}
	for i, d := range distances {
		if d > usual {
			holes = append(holes, gap{slice.From + int64(with[i]+1)*f.step, min(slice.To, slice.From+int64(with[i+1])*f.step)})
		}
	}
	return holes
}
