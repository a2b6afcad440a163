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
	i, found := slices.BinarySearchFunc(d.Batches, pos.Seq, func(b *Batch, seq uint64) int { return cmp.Compare(b.Seq, seq) })
	if found {
		i++
	}
	return d.Batches[i:]
}

// UnreadSampleCount returns the number of unexpired samples that a reader at pos has not read.
func (d *SiteSamples) UnreadSampleCount(pos ReadPosition) int {
	n := 0
	for _, b := range d.batchesAfter(pos) {
		read := pos.PartialReadOf(b)
		if b.MinT >= d.expiredBefore {
			n += len(b.V) - read
			continue
		}
		for i := read; i < len(b.V); i++ {
			if b.Time(i) >= d.expiredBefore {
				n++
			}
		}
	}
	return n
}

// EmitUnreadAndNewest calls emit with samples that a reader at pos has not read. If the limits do
// not admit all of them, it takes the samples of the oldest batches. If the limits admit all of
// them, it also emits, for each series, the newest sample if the reader has read it; with
// limits.OnePerSeries only for a series without an unread sample. limits.Repeats and
// limits.NewestSince bound these repeated samples. All samples of one name follow each other, and
// the samples of a series ascend in time. The results are the reader's new position and the number
// of emitted unread samples.
func (d *SiteSamples) EmitUnreadAndNewest(pos ReadPosition, limits ReadLimits, emit func(name string, l FamilySample)) (to ReadPosition, emittedUnread int) {
	samples, to, all := d.unreadSamples(pos, limits)
	repeat := all && d.Table.Len() <= limits.Repeats
	if len(samples) == 0 && !repeat {
		return to, 0
	}
	if !slices.IsSortedFunc(samples, compareSeriesTime) {
		slices.SortFunc(samples, compareSeriesTime)
	}
	start := startOfEachSeries(samples, d.Table.Len())
	d.Table.ForEachNewestSince(math.MinInt64, func(id uint32, name string, l FamilySample) {
		newestT, newestV := l.T, l.V
		own := samples[start[id]:start[id+1]]
		for _, s := range own {
			l.T, l.V = s.t, s.v
			emit(name, l)
		}
		if repeat && newestT >= limits.NewestSince && (len(own) == 0 || !limits.OnePerSeries && own[len(own)-1].t < newestT) {
			l.T, l.V = newestT, newestV
			emit(name, l)
		}
	})
	return to, len(samples)
}

// unreadSamples returns samples that a reader at pos has not read, in the order of the batches and
// within limits. The result to is the reader's position after these samples; complete reports
// whether they are all unread and unexpired samples of the site.
func (d *SiteSamples) unreadSamples(pos ReadPosition, limits ReadLimits) (samples []seriesSample, to ReadPosition, complete bool) {
	to = pos
	batches := d.batchesAfter(pos)
	n := 0
	for _, b := range batches {
		n += len(b.V)
	}
	n = min(n, limits.Unread)
	var seen map[uint32]bool
	if limits.OnePerSeries {
		n = min(n, d.Table.Len())
		seen = make(map[uint32]bool, n)
	}
	samples = make([]seriesSample, 0, n)
	for _, b := range batches {
		for i := pos.PartialReadOf(b); i < len(b.V); i++ {
			id, t := b.IDs[i], b.Time(i)
			if t < d.expiredBefore {
				continue
			}
			// With OnePerSeries, stop at the first series that occurs again. Within a batch, a
			// series occurs again only in a later round, because a round has at most one sample
			// per series.
			if len(samples) == limits.Unread || limits.OnePerSeries && seen[id] || t < limits.ServedSince {
				return samples, ReadPosition{Seq: to.Seq, PartialSeq: b.Seq, PartialRead: i, PartialLen: len(b.V)}, false
			}
			if limits.OnePerSeries {
				seen[id] = true
			}
			samples = append(samples, seriesSample{id: id, t: t, v: b.V[i]})
		}
		to = ReadPosition{Seq: b.Seq}
	}
	return samples, to, true
}

// startOfEachSeries expects samples that are sorted by series. It returns, for each series ID, the
// index of the series' first sample. The last element of the result is the number of samples, so
// that the samples of series id are samples[start[id]:start[id+1]].
func startOfEachSeries(samples []seriesSample, seriesCount int) []uint32 {
	start := make([]uint32, seriesCount+1)
	for _, s := range samples {
		start[s.id+1]++
	}
	for id := range seriesCount {
		start[id+1] += start[id]
	}
	return start
}
