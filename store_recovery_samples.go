package main

// This file rebuilds the data of a site from the records of its log. After damage, recovery may
// mistake bytes that a site chose, such as label values, for a record. Lines and numbers are
// therefore checked as strictly as input from outside. Pure: no I/O, no clock, no locks.

import (
	"fmt"
	"math"
	"slices"
)

// maxGap is the maximum number of consecutive series IDs that damage is believed to have destroyed.
// A series record with a larger gap before its ID is refused.
const maxGap = 1 << 20

// CheckSeriesLine checks a line from a damaged log as strictly as a line from outside, because recovery
// may mistake bytes that a site chose for a record. All lines must carry the same cluster ID. If d.ID
// is not set yet, isThisSite decides whether the line's cluster ID belongs to this log.
func (d *SiteSamples) CheckSeriesLine(parser *SeriesParser, isThisSite func(id string) bool, line []byte) error {
	_, labels, err := parser.ParseCanonicalLine(line)
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
		return fmt.Errorf("series %s belongs to another site", Excerpt(line))
	}
	return nil
}

// RestoreSeries adds a line from the log under its ID. The line must be one that this program wrote,
// because its record follows no damage, or one that CheckSeriesLine accepts.
func (d *SiteSamples) RestoreSeries(seriesID uint32, line []byte) error {
	if len(line) == 0 || len(line) > MaxLine {
		return fmt.Errorf("series %d has a line of %d bytes", seriesID, len(line))
	}
	if n := d.Table.Len(); int(seriesID) < n || int(seriesID) > n+maxGap {
		return fmt.Errorf("series ID %d is out of order: the next ID is %d", seriesID, n)
	}
	d.Table.PadTo(seriesID)
	_, hash, _ := d.Table.Find(line)
	d.Table.Insert(hash, line, !IsLegacyLine(line))
	return nil
}

// RestoreBatch commits a batch from the log. It leaves out the samples whose series damage has
// destroyed and returns their number. Of a batch without samples and names it keeps only the
// sequence number and the time. It returns an error if the sequence number is not above the number
// of the previous batch.
func (d *SiteSamples) RestoreBatch(b *Batch) (lostSamples int, err error) {
	if b.Seq <= d.Seq {
		return 0, fmt.Errorf("batch %d is out of order: it follows batch %d", b.Seq, d.Seq)
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

// DropBatchesAbove drops the batches with numbers above maxSeq, which no real batch has. After
// damage, recovery may mistake bytes that a site chose for a batch record. The high number of such
// a batch could otherwise use up the sequence numbers of all sites.
func (d *SiteSamples) DropBatchesAbove(maxSeq uint64) {
	if d.Seq <= maxSeq {
		return
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.Seq > maxSeq })
	d.recount()
	d.Seq = 0
	if n := len(d.Batches); n > 0 {
		d.Seq = d.Batches[n-1].Seq
	}
}

// dropSamplesRepeatedBy drops, from earlier batches, the samples that b contains as well. Such
// samples occur if a batch was evicted from memory and then pushed again before the log was
// rewritten.
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
	d.recount()
}

// RestoreSpools sets the spools of the site. They come from the log's spool records and from the
// names in its batches. forgetHeld must be true if the log was damaged. Then no scrape counts as
// held, because a batch may name a scrape that was partly in another, lost batch.
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
