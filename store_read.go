package main

// The samples of one site that a consumer has not read, and the newest of each series. In one
// scrape the samples of a series ascend, and none comes twice. Pure.

import (
	"cmp"
	"math"
	"slices"
)

// ReadLimits bound what one scrape gets of a site.
type ReadLimits struct {
	Unread       int   // samples that are not read yet
	Repeats      int   // newest samples that are read already: if the site has more series, none
	OnePerSeries bool  // of the unread samples
	ServedSince  int64 // ms; older samples end the unread ones, while the clock is in doubt
	NewestSince  int64 // ms; older newest samples are not repeated
}

// batchesAfter returns the batches that a reader has not read to their end.
func (d *SiteSamples) batchesAfter(pos ReadPosition) []*Batch {
	i, found := slices.BinarySearchFunc(d.Batches, pos.Seq, func(b *Batch, seq uint64) int { return cmp.Compare(b.Seq, seq) })
	if found {
		i++
	}
	return d.Batches[i:]
}

// UnreadSampleCount returns how many samples a reader has not read.
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

// EmitUnreadAndNewest calls emit with samples that a reader at pos has not read, oldest batches
// first chosen, and if those are all, with the newest sample of each series that it has read.
// Samples come by name, and those of a series in the order of time. It returns how far the reader
// is with them, and how many were unread.
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

// unreadSamples returns samples that a reader at pos has not read, in the order of the batches,
// how far the reader is with them, and whether they are complete.
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
			// The samples of a batch come in rounds of one for each series: a series that comes
			// again begins the next round.
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

// startOfEachSeries returns the index of the first sample of each of seriesCount series in samples,
// which are sorted by series, and behind them the number of samples.
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
