package main

// Records of a log become the data of a site again. After damage, bytes that a site chose may
// look like a record, so that lines and numbers are checked as strictly as from outside. Pure.

import (
	"fmt"
	"math"
	"slices"
)

// Restore puts a line at its ID. It is checked as strictly as a line from
// outside: after damage, bytes that a site chose may have been taken for a
// record. All lines have to name one cluster, for which owner returns true.
func (d *SiteData) Restore(parser *SeriesParser, owner func(cluster string) bool, id uint32, line []byte) error {
	name, labels, err := parser.ParseRendered(line)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(labels, func(l Label) bool { return string(l.Name) == ClusterLabel })
	if i < 0 || string(labels[i].Value) != d.ID && (d.ID != "" || !owner(string(labels[i].Value))) {
		return fmt.Errorf("series %s is not of this cluster", Excerpt(line))
	}
	d.ID = string(labels[i].Value)
	if n := d.Table.Len(); int(id) < n || int(id) > n+maxGap {
		return fmt.Errorf("series ID %d after %d", id, n)
	}
	d.Table.Pad(id) // IDs that damage took
	_, hash, _ := d.Table.Find(line)
	d.Table.Insert(hash, line, !IsLegacy(name, labels))
	return nil
}

// Adopt takes a recovered batch. It returns how many of its samples are lost, because
// damage took their series; the others are held.
func (d *SiteData) Adopt(b *Batch) (lost int, err error) {
	if b.Seq <= d.Seq {
		return 0, fmt.Errorf("batch %d after %d", b.Seq, d.Seq)
	}
	d.Seq, d.Accepted = b.Seq, max(d.Accepted, b.Accepted)
	lost = len(b.V)
	b = b.Where(func(i int) bool { return int(b.IDs[i]) < d.Table.Len() && len(d.Table.Line(b.IDs[i])) > 0 })
	lost -= len(b.V)
	if len(b.V) > 0 || b.Names.ID != 0 {
		d.replace(b)
		d.Take(b)
	}
	return lost, nil
}

// Distrust drops batches whose number is above most, which no true batch has. After
// damage, bytes that a site chose may have been taken for a record; its number would raise
// the numbers of all clusters until none is left.
func (d *SiteData) Distrust(most uint64) {
	if d.Seq <= most {
		return
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.Seq > most })
	d.Seq = 0
	if n := len(d.Batches); n > 0 {
		d.Seq = d.Batches[n-1].Seq
	}
}

// replace drops what b has from earlier batches. They were evicted, and then b came; the
// log was not rewritten in between.
func (d *SiteData) replace(b *Batch) {
	type key struct {
		id uint32
		t  int64
	}
	again := map[key]bool{}
	first := int64(math.MaxInt64)
	for i, id := range b.IDs {
		if newest, _ := d.Table.Newest(id); b.Time(i) <= newest {
			again[key{id, b.Time(i)}] = true
			first = min(first, b.Time(i))
		}
	}
	if len(again) == 0 {
		return
	}
	for i, old := range d.Batches {
		if old.MaxT >= first && old.MinT <= b.MaxT {
			d.Batches[i] = old.Where(func(i int) bool { return !again[key{old.IDs[i], old.Time(i)}] })
		}
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(old *Batch) bool { return len(old.V) == 0 && old.Names.ID == 0 })
}

// RestoreSpools takes what a record kept of the spools, and the names in the batches. After
// damage to the log no scrape counts as held, because a batch may name a scrape of which
// another batch, which is lost, had a part.
func (d *SiteData) RestoreSpools(kept SiteSpools, damaged bool) {
	d.Spools = kept
	if !damaged {
		for _, b := range d.Batches {
			if !d.Spools.HasAll(b.Names) {
				d.Spools.AddHeld(b.Names, b.Seq)
			}
		}
		return
	}
	d.Spools.DropHeld()
	for i, b := range d.Batches {
		k := *b
		k.Names = ScrapeNames{}
		d.Batches[i] = &k
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return len(b.V) == 0 })
}
