package main

// A push becomes a batch. Its samples find or insert their series; duplicates and samples
// outside of retention are dropped; the rest is ordered. Nothing is held before the batch is
// committed, and until then all can be rolled back. Pure.

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// AppendResult says what became of a push's samples.
type AppendResult struct {
	Accepted, Duplicates      int
	Conflicts, TooOld, Future int           // dropped
	WriteTime                 time.Duration // spent until the disk had it
}

// IsAllUntimely reports that samples were dropped for their time and none was accepted or held.
func (r *AppendResult) IsAllUntimely() bool {
	return r.TooOld+r.Future > 0 && r.Accepted+r.Duplicates+r.Conflicts == 0
}

// countRepeat counts a sample of value v that has the series and the time of a sample of value
// first.
func (r *AppendResult) countRepeat(v, first float64) {
	if math.Float64bits(v) == math.Float64bits(first) {
		r.Duplicates++
	} else {
		r.Conflicts++
	}
}

// AppendLimits are what a push is checked against.
type AppendLimits struct {
	Now       PresentTimeRange // what the present time may be
	Retention time.Duration
	Series    int // held of the site; 0 does not bound
}

// StagedBatch is a batch that is not committed, and what became of the push's samples.
type StagedBatch struct {
	Batch     *Batch // nil if the push adds nothing that has to be written
	Result    AppendResult
	newSeries int // the first ID that the push inserted
}

// seriesSample is a sample by the ID of its series.
type seriesSample struct {
	id    uint32
	round uint32 // how many earlier samples of its series the push has
	t     int64
	v     float64
}

func compareSeriesTime(a, b seriesSample) int {
	return cmp.Or(cmp.Compare(a.id, b.id), cmp.Compare(a.t, b.t))
}

// StageNewSamples makes a batch of the samples of p that are neither held, nor older than retention,
// nor of the future. It inserts their series, which Rollback takes back. The lines of p are
// those of SampleList.Add; names are of the scrapes in p. On an error, which is ErrSeriesLimit,
// ErrTooLarge or ErrClockInDoubt, nothing was inserted.
func (d *SiteSamples) StageNewSamples(p *SampleList, names ScrapeNames, limits AppendLimits) (StagedBatch, error) {
	if d.Spools.HasAll(names) { // the answer to an earlier push was lost; its samples may be evicted by now
		return StagedBatch{Result: AppendResult{Duplicates: len(p.Samples)}, newSeries: d.Table.Len()}, nil
	}
	if len(p.Samples) > maxBatch {
		return StagedBatch{}, fmt.Errorf("%w: a push of %d samples; at most %d", ErrTooLarge, len(p.Samples), maxBatch)
	}
	staged := StagedBatch{newSeries: d.Table.Len()}
	res := &staged.Result
	samples, err := d.insertAcceptedSeries(p, limits, res)
	if err != nil {
		d.Rollback(staged)
		return StagedBatch{}, err
	}
	samples = d.dropRepeatsOfNewest(samples, res)
	samples = dedupeInPush(samples, res)
	samples = d.dropLateDuplicates(samples, res)
	orderForBatch(samples)
	res.Accepted = len(samples)
	if !canMarkScrapesHeld(names, res) {
		names = ScrapeNames{}
	}
	now := limits.Now.Earliest.UnixMilli()
	if len(samples) == 0 && names.SpoolID == 0 {
		d.Rollback(staged)
		d.LastPush = max(d.LastPush, now)
		return staged, nil
	}
	staged.Batch = newBatch(d.Seq+1, now, samples)
	staged.Batch.Names = names
	return staged, nil
}

// Rollback takes back what StageNewSamples inserted.
func (d *SiteSamples) Rollback(staged StagedBatch) { d.Table.Truncate(staged.newSeries) }

// canMarkScrapesHeld reports whether the batch of a push counts as its scrapes. If all samples
// of a scrape are dropped for their time, this server's clock may be the wrong one; and of
// several scrapes in a push nothing tells to which of them a sample belongs.
func canMarkScrapesHeld(names ScrapeNames, res *AppendResult) bool {
	return len(names.Numbers) > 0 && !res.IsAllUntimely() && (res.TooOld+res.Future == 0 || names.IsSingle())
}

// insertAcceptedSeries returns the samples of p whose time is accepted, with the IDs of their
// series, which it inserts under the limits. It counts the others.
func (d *SiteSamples) insertAcceptedSeries(p *SampleList, limits AppendLimits, res *AppendResult) ([]seriesSample, error) {
	times := limits.timeBounds()
	samples := make([]seriesSample, 0, len(p.Samples))
	for _, smp := range p.Samples {
		if ok, err := times.acceptOrCount(smp.T, res); err != nil {
			return nil, err
		} else if !ok {
			continue
		}
		line := p.Line(smp)
		id, hash, ok := d.Table.Find(line)
		if !ok {
			if err := d.checkNewSeriesFits(len(line), limits.Series); err != nil {
				return nil, err
			}
			id = d.Table.Insert(hash, line, !IsLegacyLine(line))
		}
		samples = append(samples, seriesSample{id: id, t: smp.T, v: smp.V})
	}
	return samples, nil
}

// checkNewSeriesFits reports that one more series, with a line of lineSize bytes, is beyond
// maxSeries or what a table can take.
func (d *SiteSamples) checkNewSeriesFits(lineSize, maxSeries int) error {
	if n := d.Table.Len(); maxSeries > 0 && n >= maxSeries || n > MaxSeriesID || !d.Table.HasTextRoom(lineSize) {
		return fmt.Errorf("%w: more than the %d that may be held for a site", ErrSeriesLimit, maxSeries)
	}
	if textLimit := max(minTextLimit, seriesBytes*maxSeries); maxSeries > 0 && d.Table.TextBytes()+lineSize > textLimit {
		return fmt.Errorf("%w: names and labels of more than the %d bytes that may be held for a site", ErrSeriesLimit, textLimit)
	}
	return nil
}

// dropRepeatsOfNewest drops and counts the samples that have the time of the newest sample of
// their series, as a push that comes again has.
func (d *SiteSamples) dropRepeatsOfNewest(samples []seriesSample, res *AppendResult) []seriesSample {
	return slices.DeleteFunc(samples, func(s seriesSample) bool {
		t, v := d.Table.Newest(s.id)
		if s.t == t {
			res.countRepeat(s.v, v)
		}
		return s.t == t
	})
}

// dedupeInPush sorts samples by series and time. Of several samples of one series and time it
// keeps the first in the push, and counts the others.
func dedupeInPush(samples []seriesSample, res *AppendResult) []seriesSample {
	if !slices.IsSortedFunc(samples, compareSeriesTime) {
		slices.SortStableFunc(samples, compareSeriesTime)
	}
	kept := samples[:0]
	for _, s := range samples {
		if n := len(kept); n > 0 && kept[n-1].id == s.id && kept[n-1].t == s.t {
			res.countRepeat(s.v, kept[n-1].v)
			continue
		}
		kept = append(kept, s)
	}
	return kept
}

// sampleKey names a sample of a site.
type sampleKey struct {
	id uint32
	t  int64
}

// dropLateDuplicates drops and counts the samples that are older than the newest of their series and
// that an earlier batch has. Only for late samples are the batches searched.
func (d *SiteSamples) dropLateDuplicates(samples []seriesSample, res *AppendResult) []seriesSample {
	late, times := map[sampleKey]float64{}, map[int64]bool{}
	for _, s := range samples {
		if t, _ := d.Table.Newest(s.id); s.t < t {
			late[sampleKey{s.id, s.t}], times[s.t] = s.v, true
		}
	}
	if len(late) == 0 {
		return samples
	}
	held := map[sampleKey]bool{}
	for _, b := range d.Batches {
		if b.DT == nil && !times[b.T0] {
			continue
		}
		for i, id := range b.IDs {
			k := sampleKey{id, b.Time(i)}
			if !times[k.t] {
				continue
			}
			if v, ok := late[k]; ok && !held[k] {
				held[k] = true
				res.countRepeat(v, b.V[i])
			}
		}
	}
	return slices.DeleteFunc(samples, func(s seriesSample) bool { return held[sampleKey{s.id, s.t}] })
}

// orderForBatch orders samples, which are sorted by series and time, for a batch: the first
// sample of every series by ID, then the second of every series, and so on. The IDs of each
// round then are runs, which take few bytes.
func orderForBatch(samples []seriesSample) {
	several := false
	for i := 1; i < len(samples); i++ {
		if samples[i].id == samples[i-1].id {
			samples[i].round = samples[i-1].round + 1
			several = true
		}
	}
	if several {
		slices.SortStableFunc(samples, func(a, b seriesSample) int { return cmp.Compare(a.round, b.round) })
	}
}

// newBatch returns a batch of samples, all of which are within MaxRetention.
func newBatch(seq uint64, acceptedAt int64, samples []seriesSample) *Batch {
	b := &Batch{Seq: seq, AcceptedAt: acceptedAt, T0: acceptedAt}
	b.IDs, b.DT, b.V = make([]uint32, len(samples)), make([]int32, len(samples)), make([]float64, len(samples))
	if len(samples) > 0 {
		b.T0 = samples[0].t
	}
	for i, s := range samples {
		b.IDs[i], b.DT[i], b.V[i] = s.id, int32(s.t-b.T0), s.v
	}
	b.ComputeTimeBounds()
	return b
}
