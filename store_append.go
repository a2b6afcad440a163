package main

// A push becomes a batch: its samples find their series, duplicates and samples outside of
// retention are dropped, the rest is ordered. Pure.

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
	Write                     time.Duration // spent until the disk had it
}

// Untimely reports that samples were dropped for their time and none was taken or held.
func (r *AppendResult) Untimely() bool {
	return r.TooOld+r.Future > 0 && r.Accepted+r.Duplicates+r.Conflicts == 0
}

// entry is a sample of a push whose series is found.
type entry struct {
	id    uint32
	round uint32 // how many earlier samples of its series the push has
	t     int64
	v     float64
}

// Prepare finds or inserts the series of p and makes a batch of the samples that
// are new: neither held, nor older than retention, nor of the future. The lines
// of p are those of Push.Add; names are of the scrapes in it. Until Take holds the batch,
// Table.Truncate(known) undoes it; on an error, ErrSeriesLimit, ErrTooLarge or ErrClock,
// nothing was inserted.
//
// The batch gets the names only if it vouches for the scrapes. If all samples of a scrape
// are dropped for their time, this server's clock may be the wrong one; and of several
// scrapes in a push nothing tells to which of them a sample belongs.
func (d *SiteData) Prepare(p *SampleList, names ScrapeNames, now Span, retention time.Duration, limit int) (b *Batch, known int, res AppendResult, err error) {
	if len(p.Samples) > maxBatch {
		return nil, 0, res, fmt.Errorf("%w: a push of %d samples; at most %d", ErrTooLarge, len(p.Samples), maxBatch)
	}
	b = &Batch{Seq: d.Seq + 1, Accepted: now.Early.UnixMilli(), T0: now.Early.UnixMilli()}
	oldest, newest := now.Early.Add(-retention).UnixMilli(), now.Late.Add(maxAhead).UnixMilli()
	sureOldest, sureNewest := now.Late.Add(-retention).UnixMilli(), now.Early.Add(maxAhead).UnixMilli()
	entries := make([]entry, 0, len(p.Samples))
	known = d.Table.Len()
	for _, smp := range p.Samples {
		if smp.T < oldest {
			res.TooOld++
			continue
		}
		if smp.T > newest {
			res.Future++
			continue
		}
		if smp.T < sureOldest || smp.T > sureNewest {
			d.Table.Truncate(known)
			return nil, known, AppendResult{}, ErrClock
		}
		line := p.Line(smp)
		id, hash, ok := d.Table.Find(line)
		if !ok {
			if n := d.Table.Len(); limit > 0 && n >= limit || n > MaxSeriesID || !d.Table.HasRoom(len(line)) {
				d.Table.Truncate(known)
				return nil, known, res, fmt.Errorf("%w: more than the %d that may be held for a cluster", ErrSeriesLimit, limit)
			}
			if max := max(minTextLimit, seriesBytes*limit); limit > 0 && d.Table.TextBytes()+len(line) > max {
				d.Table.Truncate(known)
				return nil, known, res, fmt.Errorf("%w: names and labels of more than the %d bytes that may be held for a cluster", ErrSeriesLimit, max)
			}
			id = d.Table.Insert(hash, line, !IsLegacyLine(line))
		}
		entries = append(entries, entry{id: id, t: smp.T, v: smp.V})
	}
	entries = d.novel(entries, &res)
	res.Accepted = len(entries)
	if !res.Untimely() && (res.TooOld+res.Future == 0 || names.IsSingle()) && len(names.Numbers) > 0 {
		b.Names = names
	}
	b.IDs, b.DT, b.V = make([]uint32, len(entries)), make([]int32, len(entries)), make([]float64, len(entries))
	if len(entries) > 0 {
		b.T0 = entries[0].t
	}
	for i, e := range entries {
		// Both times are within retention, so the difference fits.
		b.IDs[i], b.DT[i], b.V[i] = e.id, int32(e.t-b.T0), e.v
	}
	b.Bound()
	return b, known, res, nil
}

// novel leaves out what is held already, by series and time, and orders the
// rest for a batch: the first sample of every series by ID, then the second …
func (d *SiteData) novel(entries []entry, res *AppendResult) []entry {
	byTime := func(a, b entry) int { return cmp.Or(cmp.Compare(a.id, b.id), cmp.Compare(a.t, b.t)) }
	if !slices.IsSortedFunc(entries, byTime) {
		slices.SortStableFunc(entries, byTime)
	}
	repeat := func(e entry, v float64) {
		if math.Float64bits(e.v) == math.Float64bits(v) {
			res.Duplicates++
		} else {
			res.Conflicts++
		}
	}
	type key struct {
		id uint32
		t  int64
	}
	late := map[key]float64{} // may be held: older than the newest of their series
	times := map[int64]bool{} // of those
	out := entries[:0]
	for _, e := range entries {
		if n := len(out); n > 0 && out[n-1].id == e.id && out[n-1].t == e.t {
			repeat(e, out[n-1].v)
			continue
		}
		lastT, lastV := d.Table.Newest(e.id)
		if e.t == lastT {
			repeat(e, lastV)
			continue
		}
		if e.t < lastT {
			late[key{e.id, e.t}], times[e.t] = e.v, true
		}
		out = append(out, e)
	}
	if len(late) > 0 {
		held := map[key]bool{}
		for _, old := range d.Batches {
			if old.DT == nil && !times[old.T0] {
				continue
			}
			for i, id := range old.IDs {
				k := key{id, old.Time(i)}
				if !times[k.t] {
					continue
				}
				if v, ok := late[k]; ok && !held[k] {
					held[k] = true
					repeat(entry{v: v}, old.V[i])
				}
			}
		}
		out = slices.DeleteFunc(out, func(e entry) bool { return held[key{e.id, e.t}] })
	}
	several := false
	for i := 1; i < len(out); i++ {
		if out[i].id == out[i-1].id {
			out[i].round = out[i-1].round + 1
			several = true
		}
	}
	if several {
		slices.SortStableFunc(out, func(a, b entry) int { return cmp.Compare(a.round, b.round) })
	}
	return out
}
