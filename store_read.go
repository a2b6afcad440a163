package main

// Samples of one site that a consumer has not read, and the newest of each series. Samples of
// one series ascend, and none comes twice in one scrape. Pure.

import (
	"cmp"
	"math"
	"slices"
)

// since returns the batches of which a reader has not had all.
func (d *SiteData) since(after Position) []*Batch {
	i, had := slices.BinarySearchFunc(d.Batches, after.Seq, func(b *Batch, seq uint64) int { return cmp.Compare(b.Seq, seq) })
	if had {
		i++
	}
	return d.Batches[i:]
}

// Unread returns how many samples a reader has not had.
func (d *SiteData) Unread(after Position) int {
	n := 0
	for _, b := range d.since(after) {
		had := after.In(b)
		if b.MinT >= d.oldest {
			n += len(b.V) - had
			continue
		}
		for i := had; i < len(b.V); i++ {
			if b.Time(i) >= d.oldest {
				n++
			}
		}
	}
	return n
}

// Read calls emit with samples that a reader has not had, by name, and those of a
// series in the order of time: at most most samples, oldest batches first, and with
// single one of a series. It stops at a sample that is older than oldest and has not
// expired, which is one of a clock in doubt. If
// none is left after that it also calls it with the newest of each series since minT
// that was had before, if spare allows them all. It returns how far the reader is with
// that, and how many it had not had.
func (d *SiteData) Read(after Position, most, spare int, single bool, oldest, minT int64, emit func(name string, l FamilySample)) (to Position, n int) {
	entries, to, whole := d.unread(after, most, single, oldest)
	n = len(entries)
	again := whole && d.Table.Len() <= spare
	if n == 0 && !again {
		return to, 0
	}
	byTime := func(a, b entry) int { return cmp.Or(cmp.Compare(a.id, b.id), cmp.Compare(a.t, b.t)) }
	if !slices.IsSortedFunc(entries, byTime) {
		slices.SortFunc(entries, byTime)
	}
	first := make([]uint32, d.Table.Len()+1) // where the entries of each ID begin
	for _, e := range entries {
		first[e.id+1]++
	}
	for id := range d.Table.Len() {
		first[id+1] += first[id]
	}
	d.Table.Each(math.MinInt64, func(id uint32, name string, l FamilySample) {
		newest, value := l.T, l.V
		own := entries[first[id]:first[id+1]]
		for _, e := range own {
			l.T, l.V = e.t, e.v
			emit(name, l)
		}
		if k := len(own); again && newest >= minT && (k == 0 || !single && own[k-1].t < newest) {
			l.T, l.V = newest, value
			emit(name, l)
		}
	})
	return to, n
}

// unread returns samples that a reader has not had, and whether that is all of them.
func (d *SiteData) unread(after Position, most int, single bool, oldest int64) (entries []entry, to Position, whole bool) {
	to = after
	var seen map[uint32]bool
	if single {
		seen = map[uint32]bool{}
	}
	for _, b := range d.since(after) {
		for i := after.In(b); i < len(b.V); i++ {
			t := b.Time(i)
			if t < d.oldest {
				continue
			}
			// The samples of a batch come in rounds of one for each series: a series
			// that comes again begins the next.
			if len(entries) == most || single && seen[b.IDs[i]] || t < oldest {
				return entries, Position{Seq: to.Seq, Part: b.Seq, N: i, Of: len(b.V)}, false
			}
			if single {
				seen[b.IDs[i]] = true
			}
			entries = append(entries, entry{id: b.IDs[i], t: t, v: b.V[i]})
		}
		to = Position{Seq: b.Seq}
	}
	return entries, to, true
}
