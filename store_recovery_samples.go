package main

// The records of a log become the data of a site again. After damage, bytes that a site chose
// may look like a record, so that lines and numbers are checked as strictly as from outside.
// Pure.

import (
	"fmt"
	"math"
	"slices"
)

// maxGap is the most IDs that damage can be believed to have taken at once.
const maxGap = 1 << 20

// RestoreSeries puts a line at its ID. It is checked as strictly as a line from outside: after
// damage, bytes that a site chose may have been taken for a record. All lines have to name the
// same cluster ID, for which isThisSite returns true.
func (d *SiteSamples) RestoreSeries(parser *SeriesParser, isThisSite func(id string) bool, seriesID uint32, line []byte) error {
	name, labels, err := parser.ParseCanonicalLine(line)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(labels, func(l Label) bool { return string(l.Name) == ClusterLabel })
	if i < 0 {
		return fmt.Errorf("series %s has no cluster ID", Excerpt(line))
	}
	if site := string(labels[i].Value); d.ID == "" && isThisSite(site) {
		d.ID = site
	} else if site != d.ID {
		return fmt.Errorf("series %s is of another site", Excerpt(line))
	}
	if n := d.Table.Len(); int(seriesID) < n || int(seriesID) > n+maxGap {
		return fmt.Errorf("series ID %d after %d", seriesID, n)
	}
	d.Table.PadTo(seriesID)
	_, hash, _ := d.Table.Find(line)
	d.Table.Insert(hash, line, !IsLegacy(name, labels))
	return nil
}

// RestoreBatch commits a batch of the log. It returns how many of its samples are lost because
// damage took their series; the others are committed.
func (d *SiteSamples) RestoreBatch(b *Batch) (lostSamples int, err error) {
	if b.Seq <= d.Seq {
		return 0, fmt.Errorf("batch %d after %d", b.Seq, d.Seq)
	}
	d.Seq, d.LastPush = b.Seq, max(d.LastPush, b.AcceptedAt)
	total := len(b.V)
	b = b.Filter(func(i int) bool { return int(b.IDs[i]) < d.Table.Len() && len(d.Table.Line(b.IDs[i])) > 0 })
	if len(b.V) > 0 || b.Names.SpoolID != 0 {
		d.dropSamplesRepeatedBy(b)
		d.Commit(b)
	}
	return total - len(b.V), nil
}

// DropBatchesAbove drops batches whose number is above maxSeq, which no true batch has. After
// damage, bytes that a site chose may have been taken for a record; its number would raise
// the numbers of all sites until none is left.
func (d *SiteSamples) DropBatchesAbove(maxSeq uint64) {
	if d.Seq <= maxSeq {
		return
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.Seq > maxSeq })
	d.Seq = 0
	if n := len(d.Batches); n > 0 {
		d.Seq = d.Batches[n-1].Seq
	}
}

// dropSamplesRepeatedBy drops the samples of earlier batches that b has as well. They were evicted,
// and then pushed again; the log was not rewritten in between.
func (d *SiteSamples) dropSamplesRepeatedBy(b *Batch) {
	repeated := map[sampleKey]bool{}
	first := int64(math.MaxInt64)
	for i, id := range b.IDs {
		if newest, _ := d.Table.Newest(id); b.Time(i) <= newest {
			repeated[sampleKey{id, b.Time(i)}] = true
			first = min(first, b.Time(i))
		}
	}
	if len(repeated) == 0 {
		return
	}
	for i, old := range d.Batches {
		if old.MaxT >= first && old.MinT <= b.MaxT {
			d.Batches[i] = old.Filter(func(i int) bool { return !repeated[sampleKey{old.IDs[i], old.Time(i)}] })
		}
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(old *Batch) bool { return len(old.V) == 0 && old.Names.SpoolID == 0 })
}

// RestoreSpools sets the spools: those of the log's own records, and the names in the batches.
// After damage to the log no scrape counts as held, because a batch may name a scrape of which
// another batch, which is lost, had a part.
func (d *SiteSamples) RestoreSpools(spools SiteSpools, forgetHeld bool) {
	d.Spools = spools
	if !forgetHeld {
		for _, b := range d.Batches {
			if !d.Spools.HasAll(b.Names) {
				d.Spools.AddHeldScrapes(b.Names, b.Seq)
			}
		}
		return
	}
	d.Spools.ForgetHeldScrapes()
	for i, b := range d.Batches {
		unnamed := *b
		unnamed.Names = ScrapeNames{}
		d.Batches[i] = &unnamed
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return len(b.V) == 0 })
}
