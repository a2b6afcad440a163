package main

// The series of one site: each line once, its ID, its newest sample, and the lines grouped by
// name as a scrape shows them. IDs are indexes and never move. Text only grows, so that a
// line stays valid. A series without a durable sample is not listed. Pure. This file must not
// know of batches, logs, limits or locks.

import (
	"bytes"
	"hash/maphash"
	"math"
)

const noSeries = math.MaxUint32 // no ID

// SeriesTable holds the series of one site. It is not safe for concurrent
// use. A series costs its line's bytes and about 110 more, of which allocation
// sizes are a third.
type SeriesTable struct {
	seed        maphash.Seed
	text        []byte
	series      []series
	index       map[uint32]uint32 // hash of a line → newest ID of that hash
	families    []seriesFamily
	familyIndex map[string]int // name → index in families
}

type series struct {
	off    uint32
	next   uint32 // next series of the same hash, or noSeries
	len    uint16
	quoted bool
	listed bool    // in its family
	lastT  int64   // ms, of the newest sample; NoTime: none
	lastV  float64 // at lastT
}

// seriesFamily has the listed series of one name.
type seriesFamily struct {
	name string
	ids  []uint32
}

// NewSeriesTable returns an empty table with room for capacity series. The seed keeps
// senders from making lines that collide.
func NewSeriesTable(seed maphash.Seed, capacity int) *SeriesTable {
	return &SeriesTable{
		seed: seed, series: make([]series, 0, capacity), index: make(map[uint32]uint32, capacity), familyIndex: map[string]int{},
	}
}

// Len returns the number of IDs given.
func (s *SeriesTable) Len() int { return len(s.series) }

// TextBytes returns the bytes of all lines.
func (s *SeriesTable) TextBytes() int { return len(s.text) }

// Line returns the line of id; empty if damage took it.
func (s *SeriesTable) Line(id uint32) []byte {
	sr := &s.series[id]
	end := sr.off + uint32(sr.len)
	return s.text[sr.off:end:end]
}

// Newest returns the time in ms and the value of the newest sample; the time is NoTime if there
// is none.
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

// HasTextRoom reports whether textBytes more bytes of text can be addressed.
func (s *SeriesTable) HasTextRoom(textBytes int) bool {
	return int64(len(s.text)+textBytes) <= math.MaxUint32
}

// Insert gives line, of at most MaxLine bytes and not in the table, the next ID.
func (s *SeriesTable) Insert(hash uint32, line []byte, quoted bool) uint32 {
	id := uint32(len(s.series))
	next, ok := s.index[hash]
	if !ok {
		next = noSeries
	}
	s.series = append(s.series, series{
		off: uint32(len(s.text)), len: uint16(len(line)), next: next, quoted: quoted, lastT: NoTime,
	})
	s.text = append(s.text, line...)
	s.index[hash] = id
	return id
}

// PadTo gives the IDs below firstID that are not yet given to series without a line, which damage
// took.
func (s *SeriesTable) PadTo(firstID uint32) {
	for uint32(len(s.series)) < firstID {
		s.series = append(s.series, series{next: noSeries, lastT: NoTime})
	}
}

// Truncate takes back the IDs from seriesCount on, none of which has a sample.
func (s *SeriesTable) Truncate(seriesCount int) {
	for id := len(s.series) - 1; id >= seriesCount; id-- {
		sr := s.series[id]
		if h := uint32(maphash.Bytes(s.seed, s.Line(uint32(id)))); sr.next == noSeries {
			delete(s.index, h)
		} else {
			s.index[h] = sr.next
		}
		s.text = s.text[:sr.off] // nobody was handed a line that is not listed
	}
	s.series = s.series[:seriesCount]
}

// SetNewestIfLater makes a durable sample the newest of its series if it is the newest, and lists
// the series.
func (s *SeriesTable) SetNewestIfLater(id uint32, t int64, v float64) {
	sr := &s.series[id]
	if t > sr.lastT {
		sr.lastT, sr.lastV = t, v
	}
	if sr.listed || sr.len == 0 {
		return
	}
	sr.listed = true
	name := LineName(s.Line(id))
	f, ok := s.familyIndex[string(name)]
	if !ok {
		f = len(s.families)
		s.familyIndex[string(name)] = f
		s.families = append(s.families, seriesFamily{name: string(name)})
	}
	s.families[f].ids = append(s.families[f].ids, id)
}

// ForEachNewestSince calls emit with the newest sample of every listed series if its time is at
// least minT, one name after the other.
func (s *SeriesTable) ForEachNewestSince(minT int64, emit func(id uint32, name string, l FamilySample)) {
	for _, f := range s.families {
		for _, id := range f.ids {
			if sr := &s.series[id]; sr.lastT >= minT {
				emit(id, f.name, FamilySample{Line: s.Line(id), T: sr.lastT, V: sr.lastV, Quoted: sr.quoted})
			}
		}
	}
}

// CountExpired returns how many series have no sample at or after keptSince.
func (s *SeriesTable) CountExpired(keptSince int64) int {
	n := 0
	for i := range s.series {
		if s.series[i].lastT < keptSince {
			n++
		}
	}
	return n
}

// Subset returns a table of the series for which used is true, in order, and the new ID of each
// old one. Newest samples are kept, but no series is listed yet.
func (s *SeriesTable) Subset(used []bool) (*SeriesTable, []uint32) {
	n, size := 0, 0
	for id, u := range used {
		if u {
			n++
			size += int(s.series[id].len)
		}
	}
	subset := NewSeriesTable(s.seed, n)
	subset.text = make([]byte, 0, size)
	newIDs := make([]uint32, len(used))
	for id, u := range used {
		if newIDs[id] = noSeries; u {
			line := s.Line(uint32(id))
			newIDs[id] = subset.Insert(uint32(maphash.Bytes(s.seed, line)), line, s.series[id].quoted)
			last := &subset.series[newIDs[id]]
			last.lastT, last.lastV = s.series[id].lastT, s.series[id].lastV
		}
	}
	return subset, newIDs
}
