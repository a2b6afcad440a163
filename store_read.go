package main

// This file selects the samples of one site for a scrape: the samples that a consumer has not read,
// and the newest sample of each series. Within one scrape the samples of a series ascend in time,
// and no sample occurs twice. Pure: no I/O, no clock, no locks.

import (
	"cmp"
	"math"
	"slices"
)

// ReadLimits bound the samples of one site in one scrape.
type ReadLimits struct {
	Unread       int   // maximum number of unread samples
	Repeats      int   // newest samples that the reader has read are emitted again only if the site has at most this many series
	OnePerSeries bool  // emit at most one unread sample of each series
	ServedSince  int64 // ms; emitting unread samples stops before the first sample that is older
	NewestSince  int64 // ms; a newest sample that the reader has read is not emitted again if it is older
}

// batchesAfter returns the batches that a reader at pos has not read completely.
func (d *SiteSamples) batchesAfter(pos ReadPosition) []*Batch {
	// Decide the usual cases without a look at many batches, because each may cost a wait for memory.
	if pos.Seq >= d.Seq || len(d.Batches) == 0 {
		return nil
	}
	if pos.Seq < d.Batches[0].Seq {
		return d.Batches
	}
	i, found := slices.BinarySearchFunc(d.Batches, pos.Seq, func(b *Batch, seq uint64) int { return cmp.Compare(b.Seq, seq) })
	if found {
		i++
	}
	return d.Batches[i:]
}

// UnreadSampleCount returns the number of unexpired samples that a reader at pos has not read.
func (d *SiteSamples) UnreadSampleCount(pos ReadPosition) int {
	batches := d.batchesAfter(pos)
	if len(batches) == 0 {
		return 0
	}
	partialRead := pos.PartialReadOf(batches[0])
	if read := d.Batches[:len(d.Batches)-len(batches)]; d.minT >= d.expiredBefore && len(read) < len(batches) {
		n := int(d.samples) - partialRead // no sample has expired, and there are fewer batches to subtract than to add
		for _, b := range read {
			n -= len(b.V)
		}
		return n
	}
	n := 0
	for i, b := range batches {
		first := 0
		if i == 0 {
			first = partialRead
		}
		if b.MinT >= d.expiredBefore {
			n += len(b.V) - first
			continue
		}
		for i := first; i < len(b.V); i++ {
			if b.Time(i) >= d.expiredBefore {
				n++
			}
		}
	}
	return n
}

// siteReader selects samples of sites, one site after the other. It reuses its memory, and is not
// safe for concurrent use.
type siteReader struct {
	samples, unsorted []seriesSample // of the present site
	start             []uint32       // see sortBySeries
	seen              map[uint32]bool
}

// addUnreadAndNewest adds to g samples of d that a reader at pos has not read. If the limits do not
// admit all of them, it takes the samples of the oldest batches. If the limits admit all of them, it
// also adds, for each series, the newest sample if the reader has read it; with limits.OnePerSeries
// only for a series without an unread sample. limits.Repeats and limits.NewestSince bound these
// repeated samples. The samples of a series follow each other and ascend in time. The results are
// the reader's new position and the numbers of added unread and repeated samples.
func (r *siteReader) addUnreadAndNewest(g *FamilyGrouper, d *SiteSamples, pos ReadPosition, limits ReadLimits) (to ReadPosition, unread, repeated int) {
	to, all := r.loadUnread(d, pos, limits)
	repeat := all && d.Table.Len() <= limits.Repeats
	unread = len(r.samples)
	if unread == 0 && !repeat {
		return to, 0, 0
	}
	if !slices.IsSortedFunc(r.samples, compareSeriesTime) {
		r.sortBySeries(d.Table.Len())
	}
	left := r.samples
	for id := range d.Table.series {
		sr := &d.Table.series[id]
		last := int64(math.MinInt64) // time of the newest unread sample of the series
		for ; len(left) > 0 && left[0].id == uint32(id); left = left[1:] {
			if last = left[0].t; sr.listed {
				d.Table.add(g, sr, last, left[0].v)
			}
		}
		if !repeat {
			if len(left) == 0 {
				break
			}
			continue
		}
		if sr.listed && sr.lastT >= limits.NewestSince && (last == math.MinInt64 || !limits.OnePerSeries && last < sr.lastT) {
			d.Table.add(g, sr, sr.lastT, sr.lastV)
			repeated++
		}
	}
	return to, unread, repeated
}

// loadUnread sets r.samples to samples of d that a reader at pos has not read, in the order of the
// batches and within limits. The result to is the reader's position after these samples; complete
// reports whether they are all unread and unexpired samples of the site.
func (r *siteReader) loadUnread(d *SiteSamples, pos ReadPosition, limits ReadLimits) (to ReadPosition, complete bool) {
	to, r.samples = pos, r.samples[:0]
	if limits.OnePerSeries {
		if r.seen == nil {
			r.seen = map[uint32]bool{}
		}
		clear(r.seen)
	}
	for _, b := range d.batchesAfter(pos) {
		for i := pos.PartialReadOf(b); i < len(b.V); i++ {
			id, t := b.IDs[i], b.Time(i)
			if t < d.expiredBefore {
				continue
			}
			// With OnePerSeries, stop at the first series that occurs again. Within a batch, a
			// series occurs again only in a later round, because a round has at most one sample
			// per series.
			if len(r.samples) == limits.Unread || limits.OnePerSeries && r.seen[id] || t < limits.ServedSince {
				return ReadPosition{Seq: to.Seq, PartialSeq: b.Seq, PartialRead: i, PartialLen: len(b.V)}, false
			}
			if limits.OnePerSeries {
				r.seen[id] = true
			}
			r.samples = append(r.samples, seriesSample{id: id, t: t, v: b.V[i]})
		}
		to = ReadPosition{Seq: b.Seq}
	}
	return to, true
}

// sortBySeries sorts r.samples by series and then by time. Their order before is that of batches.
func (r *siteReader) sortBySeries(seriesCount int) {
	// This is a counting sort by series, because a backlog may have many batches. It is stable, so
	// that only the samples of series with late samples are then not yet sorted by time.
	start := slices.Grow(r.start[:0], seriesCount+1)[:seriesCount+1]
	clear(start)
	for _, s := range r.samples {
		start[s.id+1]++
	}
	for id := range seriesCount {
		start[id+1] += start[id]
	}
	r.unsorted, r.samples = r.samples, slices.Grow(r.unsorted[:0], len(r.samples))[:len(r.samples)]
	for _, s := range r.unsorted {
		r.samples[start[s.id]] = s
		start[s.id]++
	}
	r.start = start
	for i := 1; i < len(r.samples); i++ {
		if compareSeriesTime(r.samples[i-1], r.samples[i]) > 0 {
			slices.SortFunc(r.samples, compareSeriesTime)
			return
		}
	}
}
