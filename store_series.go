package main

// SeriesTable stores each series of one site once: its line, its ID and its newest sample. It also
// groups the series by name, because the answer to a consumer's scrape does. An ID is an index and
// never changes within a table. The text of a listed series is never overwritten, so that its line
// stays valid while other goroutines read it. A series is listed for scrapes only after it has a
// committed sample. Pure: no I/O, no clock, no locks. This file must not know of batches, logs,
// limits or locks.

import (
	"bytes"
	"hash/maphash"
	"math"
)

const noSeries = math.MaxUint32 // ends a chain of series with the same hash; never an ID

// SeriesTable holds the series of one site. It is not safe for concurrent use. A series uses about
// 110 bytes besides its line; about a third of that is unused capacity of slices and maps.
type SeriesTable struct {
	seed        maphash.Seed
	text        []byte            // all lines, one after the other
	series      []series          // by ID
	index       map[uint32]uint32 // hash of a line → newest ID with that hash
	families    []seriesFamily
	familyIndex map[string]int // name → index in families
}

// series is one series of a SeriesTable.
type series struct {
	off    uint32  // where the line begins in text
	next   uint32  // next series with the same hash, or noSeries
	len    uint16  // bytes of the line
	quoted bool    // the line has a metric or label name beyond the legacy character set
	listed bool    // the series is in its seriesFamily
	lastT  int64   // ms, time of the newest sample; NoTime if there is none
	lastV  float64 // value at lastT
}

// seriesFamily has the IDs of the listed series with one name.
type seriesFamily struct {
	name string
	ids  []uint32
}

// NewSeriesTable returns an empty table with room for capacity series. Lines are hashed with the
// seed, which must be secret from senders, so that a sender cannot construct lines with equal
// hashes.
func NewSeriesTable(seed maphash.Seed, capacity int) *SeriesTable {
	return &SeriesTable{
		seed: seed, series: make([]series, 0, capacity), index: make(map[uint32]uint32, capacity), familyIndex: map[string]int{},
	}
}

// Len returns the number of series, which is also the next ID.
func (s *SeriesTable) Len() int { return len(s.series) }

// TextBytes returns the number of bytes of all lines.
func (s *SeriesTable) TextBytes() int { return len(s.text) }

// Line returns the line of the series id. It is empty if damage to the log destroyed the line.
func (s *SeriesTable) Line(id uint32) []byte {
	sr := &s.series[id]
	end := sr.off + uint32(sr.len)
	return s.text[sr.off:end:end]
}

// Newest returns the time in ms and the value of the newest sample of a series. The time is NoTime
// if the series has no sample.
func (s *SeriesTable) Newest(id uint32) (t int64, v float64) {
	return s.series[id].lastT, s.series[id].lastV
}

// Find returns the ID of the series with this line. If there is none, ok is false. In both cases it
// returns the hash of the line, which Insert needs.
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

// HasTextRoom reports whether textBytes more bytes of lines fit into the table. Offsets have 32
// bits.
func (s *SeriesTable) HasTextRoom(textBytes int) bool {
	return int64(len(s.text)+textBytes) <= math.MaxUint32
}

// Insert adds a series and returns its ID, the next free ID. The line must not be in the table and
// must have at most MaxLine bytes. hash is the hash that Find returned for it.
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

// PadTo adds series without a line until firstID is the next free ID. Recovery calls it when damage
// to a log has destroyed the lines of these IDs.
func (s *SeriesTable) PadTo(firstID uint32) {
	for uint32(len(s.series)) < firstID {
		s.series = append(s.series, series{next: noSeries, lastT: NoTime})
	}
}

// Truncate removes the series with IDs of seriesCount and above. None of them may have a sample.
func (s *SeriesTable) Truncate(seriesCount int) {
	for id := len(s.series) - 1; id >= seriesCount; id-- {
		sr := s.series[id]
		if h := uint32(maphash.Bytes(s.seed, s.Line(uint32(id)))); sr.next == noSeries {
			delete(s.index, h)
		} else {
			s.index[h] = sr.next
		}
		s.text = s.text[:sr.off] // the bytes may be overwritten later: no reader ever gets the line of an unlisted series
	}
	s.series = s.series[:seriesCount]
}

// SetNewestIfLater records a committed sample of a series. If the sample is later than the newest
// sample of the series, it becomes the newest. The series is listed from now on, unless damage
// destroyed its line.
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

// ForEachNewestSince calls emit with the newest sample of each listed series whose newest sample
// has a time of at least minT, in ms. All series of one name follow each other.
func (s *SeriesTable) ForEachNewestSince(minT int64, emit func(id uint32, name string, l FamilySample)) {
	for _, f := range s.families {
		for _, id := range f.ids {
			if sr := &s.series[id]; sr.lastT >= minT {
				emit(id, f.name, FamilySample{Line: s.Line(id), T: sr.lastT, V: sr.lastV, Quoted: sr.quoted})
			}
		}
	}
}

// CountExpired returns the number of series whose newest sample is older than keptSince, in ms.
// Series without a sample are included.
func (s *SeriesTable) CountExpired(keptSince int64) int {
	n := 0
	for i := range s.series {
		if s.series[i].lastT < keptSince {
			n++
		}
	}
	return n
}

// Subset returns a new table with only the series for which used is true, in the same order. newIDs
// has the new ID for each old ID, or noSeries if the series is left out. The new table keeps the
// newest samples, but its series are not listed until SetNewestIfLater is called.
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
