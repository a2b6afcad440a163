package main

// This file turns a push into a batch. Samples outside the accepted time range, and samples with
// the series and time of an earlier sample, are dropped and counted. Each sample with an accepted
// time finds its series in the table or inserts a new series. The samples of new series that do not
// fit within the limit on series are dropped and counted. The remaining samples are sorted for the
// log. A staged batch adds no sample to the site before Commit, and Rollback removes the series
// that staging inserted. Pure: no I/O, no clock, no locks.

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// AppendResult counts what happened to the samples of a push.
type AppendResult struct {
	Accepted   int           // stored
	Duplicates int           // not stored again: same series, time and value as a stored sample or another sample of the push; or all samples, if the store has all named scrapes
	Conflicts  int           // dropped: same series and time as a stored sample or another sample of the push, but another value
	TooOld     int           // dropped: older than retention
	Future     int           // dropped: too far ahead of this server's clock
	NoRoom     int           // dropped: the series is new, and the site has as many series as its limit allows
	WriteTime  time.Duration // time spent to make room and to write the log

	FirstOfSite  bool // the push is stored, and the store had no batch of the site before
	KeptBySender bool // the log is not flushed: the sender must keep the scrapes of the push until every consumer has read them

	// Generation is the generation of the series table that has the IDs in SeriesIDs of the push, and
	// TableLen is the number of its series. Both are 0 if SeriesIDs has no IDs that stay valid.
	Generation uint64
	TableLen   int
}

// IsAllUntimely reports whether the push had samples and every one of them was dropped because of
// its time.
func (r *AppendResult) IsAllUntimely() bool {
	return r.TooOld+r.Future > 0 && r.Accepted+r.Duplicates+r.Conflicts+r.NoRoom == 0
}

// countRepeat counts a sample whose series and time are those of a sample that arrived before. v is
// the value of the counted sample, and first is the value of the sample that arrived before. Equal
// values count as a duplicate, different values as a conflict.
func (r *AppendResult) countRepeat(v, first float64) {
	if math.Float64bits(v) == math.Float64bits(first) {
		r.Duplicates++
	} else {
		r.Conflicts++
	}
}

// AppendLimits are the limits that a push is checked against.
type AppendLimits struct {
	Now       PresentTimeRange // range that the present time lies in
	Retention time.Duration
	Series    int // maximum number of series of the site; 0 means no limit
}

// StagedBatch is a batch that is prepared but not committed, with the counts of its push.
type StagedBatch struct {
	Batch     *Batch // nil if the push adds nothing that must be written
	Result    AppendResult
	newSeries int // length of the series table before the push, and so the lowest ID of a series that the push inserted

	generation uint64 // generation of the series table with the IDs in Batch and in SeriesIDs of the push
}

// seriesSample is a sample that names its series by ID.
type seriesSample struct {
	id    uint32
	round uint32 // number of samples in this push of the same series with a lower time
	t     int64  // ms
	v     float64
}

func compareSeriesTime(a, b seriesSample) int {
	return cmp.Or(cmp.Compare(a.id, b.id), cmp.Compare(a.t, b.t))
}

// StageNewSamples returns a batch of the samples of p that are new: not yet stored, not older than
// retention, and not more than maxAhead in the future. It inserts the series of these samples into
// the table, in the order of the push and as many as fit; Rollback removes them. The lines of p must
// come from SampleList.Add. names are the names of the scrapes in p. The error is ErrTooLarge,
// ErrClockInDoubt or ErrDecodeAgain; after an error no series stays inserted.
func (d *SiteSamples) StageNewSamples(p *SampleList, names ScrapeNames, limits AppendLimits) (StagedBatch, error) {
	p.SeriesIDs = p.SeriesIDs[:0]
	if err := d.checkKnownSeries(p); err != nil {
		return StagedBatch{}, err
	}
	// If the store already has all scrapes of the push, the push is a repeat, for example because
	// the client missed the answer. All samples count as duplicates. The search for duplicates
	// below cannot replace this check, because it does not find samples that were evicted.
	if d.Spools.HasAll(names) {
		return StagedBatch{Result: AppendResult{Duplicates: len(p.Samples)}, newSeries: d.Table.Len()}, nil
	}
	if len(p.Samples) > maxBatch {
		return StagedBatch{}, fmt.Errorf("%w: the push has %d samples, the limit is %d", ErrTooLarge, len(p.Samples), maxBatch)
	}
	staged := StagedBatch{newSeries: d.Table.Len(), generation: d.Table.Generation()}
	res := &staged.Result
	if staged.Batch = d.newAscendingBatch(p, limits); staged.Batch != nil {
		if res.Accepted = len(p.Samples); canMarkScrapesHeld(names, res) {
			staged.Batch.Names = names
		}
		return staged, nil
	}
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

// newAscendingBatch returns the batch of p in the usual case, in which it has no need to compare
// samples with each other: all series are known, their IDs ascend, and each sample has an accepted
// time and is later than the newest sample of its series. Otherwise it returns nil.
func (d *SiteSamples) newAscendingBatch(p *SampleList, limits AppendLimits) *Batch {
	n := len(p.Samples)
	if n == 0 || p.KnownSamples < n || p.WantSeriesIDs {
		return nil
	}
	times := limits.timeBounds()
	t0 := p.Samples[0].T
	b := &Batch{Seq: d.Seq + 1, AcceptedAt: limits.Now.Earliest.UnixMilli(), T0: t0, MinT: t0, MaxT: t0, V: make([]float64, n)}
	if k := len(d.Batches); k > 0 && len(d.Batches[k-1].IDs) == n {
		b.IDs = d.Batches[k-1].IDs // usually the same IDs, which the batches then share
	}
	shared := b.IDs != nil
	for i, s := range p.Samples {
		id, _ := s.KnownID()
		newest, _ := d.Table.Newest(id)
		if s.T <= newest || s.T < times.servedSince || s.T > times.surelyUntil || i > 0 && id <= b.IDs[i-1] {
			return nil
		}
		if !shared || b.IDs[i] != id {
			if shared || i == 0 {
				b.IDs, shared = append(make([]uint32, 0, n), b.IDs[:i]...), false
			}
			b.IDs = append(b.IDs, id)
		}
		if s.T != t0 && b.DT == nil {
			b.DT = make([]int32, n)
		}
		if b.DT != nil {
			b.DT[i] = int32(s.T - t0)
			b.MinT, b.MaxT = min(b.MinT, s.T), max(b.MaxT, s.T)
		}
		b.V[i] = s.V
	}
	return b
}

// checkKnownSeries returns ErrStaleSeriesIDs if the IDs of known series in p are those of another
// table, and ErrDecodeAgain if p has a known series also with its line. Samples of such a series may repeat each other,
// which only SampleList.AddUnlessRepeated counts.
func (d *SiteSamples) checkKnownSeries(p *SampleList) error {
	if p.KnownSamples == 0 {
		return nil
	}
	if p.Generation != d.Table.Generation() {
		return ErrStaleSeriesIDs
	}
	if p.KnownSamples == len(p.Samples) {
		return nil
	}
	for _, smp := range p.Samples {
		if _, known := smp.KnownID(); known {
			continue
		}
		if id, _, ok := d.Table.Find(p.Line(smp)); ok && p.HasKnown(id) {
			return ErrDecodeAgain
		}
	}
	return nil
}

// Rollback removes the series that StageNewSamples inserted for staged.
func (d *SiteSamples) Rollback(staged StagedBatch) { d.Table.Truncate(staged.newSeries) }

// canMarkScrapesHeld reports whether the scrapes that a push names become held with its batch. They
// do not if all samples were dropped because of their times: this server's clock may be wrong. They
// do not either if some samples were dropped because of their times and the push has several
// scrapes: a sample does not tell to which scrape it belongs.
func canMarkScrapesHeld(names ScrapeNames, res *AppendResult) bool {
	return len(names.Numbers) > 0 && !res.IsAllUntimely() && (res.TooOld+res.Future == 0 || names.IsSingle())
}

// insertAcceptedSeries returns the samples of p whose time and series are accepted, with their
// series IDs. It inserts the series that are new and that fit within the limits, and counts the
// samples that are not accepted. A sample of a series that the site has is never dropped because of
// a limit. The error is ErrClockInDoubt.
func (d *SiteSamples) insertAcceptedSeries(p *SampleList, limits AppendLimits, res *AppendResult) ([]seriesSample, error) {
	times := limits.timeBounds()
	samples := make([]seriesSample, 0, len(p.Samples))
	if d.Table.Len() == 0 {
		d.Table.Reserve(len(p.Samples), len(p.Arena)) // a first push usually has one sample of each series
		defer d.Table.Clip()
	}
	if p.WantSeriesIDs {
		p.SeriesIDs = slices.Grow(p.SeriesIDs, len(p.Samples))[:len(p.Samples)]
		for i := range p.SeriesIDs {
			p.SeriesIDs[i] = NoSeriesID
		}
	}
	for i, smp := range p.Samples {
		if ok, err := times.acceptOrCount(smp.T, res); err != nil {
			return nil, err
		} else if !ok {
			continue
		}
		id, ok := smp.KnownID()
		if !ok {
			if id, ok = d.findOrInsertSeries(p.Line(smp), limits.Series); !ok {
				res.NoRoom++
				continue
			}
		}
		if p.WantSeriesIDs {
			p.SeriesIDs[i] = id
		}
		samples = append(samples, seriesSample{id: id, t: smp.T, v: smp.V})
	}
	return samples, nil
}

// findOrInsertSeries returns the ID of the series with this line. It inserts a new series, unless it
// does not fit within the limits; then ok is false.
func (d *SiteSamples) findOrInsertSeries(line []byte, maxSeries int) (id uint32, ok bool) {
	id, hash, ok := d.Table.Find(line)
	if ok {
		return id, true
	}
	if !d.fitsNewSeries(len(line), maxSeries) {
		return 0, false
	}
	return d.Table.Insert(hash, line, !IsLegacyLine(line)), true
}

// fitsNewSeries reports whether one more series with a line of lineSize bytes exceeds neither
// maxSeries, nor the text limit that follows from maxSeries, nor the capacity of a table. A
// maxSeries of 0 means that only the capacity limits the series.
func (d *SiteSamples) fitsNewSeries(lineSize, maxSeries int) bool {
	if d.Table.Len() > MaxSeriesID || !d.Table.HasTextRoom() {
		return false
	}
	textLimit := max(minTextLimit, seriesBytes*maxSeries)
	return maxSeries == 0 || d.Table.Len() < maxSeries && d.Table.TextBytes()+lineSize <= textLimit
}

// dropRepeatsOfNewest drops and counts each sample that has the same time as the newest stored
// sample of its series. If a push is repeated, this usually drops all of its samples.
func (d *SiteSamples) dropRepeatsOfNewest(samples []seriesSample, res *AppendResult) []seriesSample {
	return slices.DeleteFunc(samples, func(s seriesSample) bool {
		t, v := d.Table.Newest(s.id)
		if s.t == t {
			res.countRepeat(s.v, v)
		}
		return s.t == t
	})
}

// dedupeInPush sorts samples by series and time. If several samples have the same series and time,
// it keeps the sample that comes first in the push and counts the others.
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

// sampleKey identifies a sample of a site.
type sampleKey struct {
	id uint32 // series ID
	t  int64  // ms
}

// dropLateDuplicates drops and counts the samples that an earlier batch already contains. Only
// samples older than the newest sample of their series can be such duplicates. The batches are
// therefore searched only if the push has such late samples.
func (d *SiteSamples) dropLateDuplicates(samples []seriesSample, res *AppendResult) []seriesSample {
	isLate := func(s seriesSample) bool {
		t, _ := d.Table.Newest(s.id)
		return s.t < t
	}
	if !slices.ContainsFunc(samples, isLate) {
		return samples
	}
	late, times := map[sampleKey]float64{}, map[int64]bool{}
	for _, s := range samples {
		if isLate(s) {
			late[sampleKey{s.id, s.t}], times[s.t] = s.v, true
		}
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

// orderForBatch orders samples for a batch. The input must be sorted by series and time. The output
// has rounds: the first sample of every series, sorted by ID, then the second sample of every
// series, and so on. Within a round the IDs form runs, which take few bytes in the log.
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

// newBatch returns a batch with the given samples. The difference of any two sample times, in ms,
// must fit into an int32; the limit MaxRetention ensures this.
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
