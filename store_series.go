package main

// The series of one site: each line once, its ID, its newest sample, and the lines grouped by
// name as a scrape shows them. IDs are positions and never move. Text only grows, so that a
// line stays valid. A series without a durable sample is not shown. Pure. This file must not
// know of batches, logs, limits or locks.

import (
	"bytes"
	"hash/maphash"
	"math"
)

const noSeries = math.MaxUint32

// SeriesTable holds the series of one cluster. It is not safe for concurrent
// use. A series costs its line's bytes and about 110 more, of which allocation
// sizes are a third.
type SeriesTable struct {
	seed     maphash.Seed
	text     []byte
	series   []series
	index    map[uint32]uint32 // hash of a line → newest ID of that hash
	families []nameGroup
	named    map[string]int // name → index in families
}

type series struct {
	off   uint32
	next  uint32 // next series of the same hash, or noSeries
	len   uint16
	utf8  bool
	shown bool    // listed in its family
	lastT int64   // ms; NoTime until a sample was shown
	lastV float64 // at lastT
}

type nameGroup struct {
	name string
	ids  []uint32
}

// NewSeriesTable returns an empty table with room for n series. The seed keeps
// senders from making lines that collide.
func NewSeriesTable(seed maphash.Seed, n int) *SeriesTable {
	return &SeriesTable{
		seed: seed, series: make([]series, 0, n), index: make(map[uint32]uint32, n), named: map[string]int{},
	}
}

// Len returns the number of IDs given.
func (s *SeriesTable) Len() int { return len(s.series) }

// TextBytes returns the bytes of all lines.
func (s *SeriesTable) TextBytes() int { return len(s.text) }

// Line returns the line of id, empty for one that was never known.
func (s *SeriesTable) Line(id uint32) []byte {
	sr := &s.series[id]
	end := sr.off + uint32(sr.len)
	return s.text[sr.off:end:end]
}

// Newest returns the time in ms and value of the newest sample shown, with a
// time below every other when there is none.
func (s *SeriesTable) Newest(id uint32) (t int64, v float64) {
	return s.series[id].lastT, s.series[id].lastV
}

// Find returns the ID of line, and what Insert needs where there is none.
func (s *SeriesTable) Find(line []byte) (id, hash uint32, ok bool) {
	hash = uint32(maphash.Bytes(s.seed, line))
	id, ok = s.index[hash]
	for ; ok && id != noSeries; id = s.series[id].next {
		if bytes.Equal(s.Line(id), line) {
			return id, hash, true
		}
	}
	return 0, hash, false
}

// HasRoom reports whether n more bytes of text can be addressed.
func (s *SeriesTable) HasRoom(n int) bool { return int64(len(s.text)+n) <= math.MaxUint32 }

// Insert gives line, of at most MaxLine bytes and not in the table, the next ID.
func (s *SeriesTable) Insert(hash uint32, line []byte, utf8 bool) uint32 {
	id := uint32(len(s.series))
	next, ok := s.index[hash]
	if !ok {
		next = noSeries
	}
	s.series = append(s.series, series{
		off: uint32(len(s.text)), len: uint16(len(line)), next: next, utf8: utf8, lastT: NoTime,
	})
	s.text = append(s.text, line...)
	s.index[hash] = id
	return id
}

// Pad gives IDs below id that are not yet given to series that are unknown.
func (s *SeriesTable) Pad(id uint32) {
	for uint32(len(s.series)) < id {
		s.series = append(s.series, series{next: noSeries, lastT: NoTime})
	}
}

// Truncate takes back the IDs from n on, none of which was shown.
func (s *SeriesTable) Truncate(n int) {
	for id := len(s.series) - 1; id >= n; id-- {
		sr := s.series[id]
		if h := uint32(maphash.Bytes(s.seed, s.Line(uint32(id)))); sr.next == noSeries {
			delete(s.index, h)
		} else {
			s.index[h] = sr.next
		}
		s.text = s.text[:sr.off] // nobody was handed a line that was not shown
	}
	s.series = s.series[:n]
}

// Show makes a durable sample the newest of its series if it is.
func (s *SeriesTable) Show(id uint32, t int64, v float64) {
	sr := &s.series[id]
	if t > sr.lastT {
		sr.lastT, sr.lastV = t, v
	}
	if sr.shown || sr.len == 0 {
		return
	}
	sr.shown = true
	name := LineName(s.Line(id))
	f, ok := s.named[string(name)]
	if !ok {
		f = len(s.families)
		s.named[string(name)] = f
		s.families = append(s.families, nameGroup{name: string(name)})
	}
	s.families[f].ids = append(s.families[f].ids, id)
}

// Each calls emit with the newest sample of every shown series whose time is
// at least minT, one name after the other.
func (s *SeriesTable) Each(minT int64, emit func(id uint32, name string, l FamilySample)) {
	for _, f := range s.families {
		for _, id := range f.ids {
			if sr := &s.series[id]; sr.lastT >= minT {
				emit(id, f.name, FamilySample{Line: s.Line(id), T: sr.lastT, V: sr.lastV, Quoted: sr.utf8})
			}
		}
	}
}

// Dead returns how many series have no sample at or after oldest.
func (s *SeriesTable) Dead(oldest int64) int {
	n := 0
	for i := range s.series {
		if s.series[i].lastT < oldest {
			n++
		}
	}
	return n
}

// Keep returns a table of the series for which used is true, in order, and the
// new ID of each old one. Newest samples are kept, but none is shown yet.
func (s *SeriesTable) Keep(used []bool) (*SeriesTable, []uint32) {
	n, size := 0, 0
	for id, u := range used {
		if u {
			n++
			size += int(s.series[id].len)
		}
	}
	k := NewSeriesTable(s.seed, n)
	k.text = make([]byte, 0, size)
	ids := make([]uint32, len(used))
	for id, u := range used {
		if ids[id] = noSeries; u {
			line := s.Line(uint32(id))
			ids[id] = k.Insert(uint32(maphash.Bytes(s.seed, line)), line, s.series[id].utf8)
			last := &k.series[ids[id]]
			last.lastT, last.lastV = s.series[id].lastT, s.series[id].lastV
		}
	}
	return k, ids
}
