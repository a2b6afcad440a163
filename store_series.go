package main

// SeriesTable stores each series of one site once: its line, its ID, its name and its newest sample.
// The name is stored because the answer to a scrape groups samples by name. An ID is an index and
// never changes within a table. The text of a listed series is never overwritten, so that its line
// stays valid while other goroutines read it. A series is listed for scrapes only after it has a
// committed sample. Pure: no I/O, no clock, no locks. This file must not know of batches, logs,
// limits or locks.

import (
	"bytes"
	"hash/maphash"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"unique"
)

const noSeries = math.MaxUint32 // never an ID

// SeriesTable holds the series of one site. It is not safe for concurrent use. A series uses about
// 50 bytes besides its line.
type SeriesTable struct {
	seed       maphash.Seed
	generation uint64
	text       [][]byte                // all lines, one after the other, in chunks; see TextChunk
	textBytes  int                     // bytes of all lines
	expected   int                     // bytes of further lines for which Reserve was called, if above 0
	series     []series                // by ID
	slots      []uint32                // hash table with linear probing: ID+1 of a series with a line, or 0; at most 3/4 are taken
	families   []unique.Handle[string] // names of the listed series; the tables of all sites share the memory of equal names
	byName     []uint32                // indices of families, sorted by name
	lastFamily uint32                  // index in families of the name that was looked up last
	oldest     int64                   // ms; no series has a newest sample before this time
}

// series is one series of a SeriesTable.
type series struct {
	lastT  int64   // ms, time of the newest sample; NoTime if there is none
	lastV  float64 // value at lastT
	hash   uint32  // of the line
	off    uint32  // where the line begins: the index of its chunk, and the position in the chunk in TextChunkBits bits
	family uint32  // index of the name in families; 0 unless the series is listed
	len    uint16  // bytes of the line; 0 if damage to the log destroyed the line
	quoted bool    // the line has a metric or label name beyond the legacy character set
	listed bool    // scrapes may show the series
}

// NewSeriesTable returns an empty table. Lines are hashed with the seed, which must be secret from
// senders, so that a sender cannot construct lines with equal hashes.
func NewSeriesTable(seed maphash.Seed) *SeriesTable {
	return &SeriesTable{seed: seed, generation: rand.Uint64(), oldest: math.MaxInt64}
}

// Reserve prepares the table for the given number of further series, whose lines have textBytes
// bytes together, so that it allocates as much memory as they need.
func (s *SeriesTable) Reserve(seriesCount, textBytes int) {
	s.series = slices.Grow(s.series, seriesCount)
	if n := slotsFor(len(s.series) + seriesCount); n > len(s.slots) {
		s.resizeSlots(n)
	}
	s.expected = textBytes
}

// Generation returns a random number that identifies the table: an ID of a series means the same
// series only in tables of one generation.
func (s *SeriesTable) Generation() uint64 { return s.generation }

// Len returns the number of series, which is also the next ID.
func (s *SeriesTable) Len() int { return len(s.series) }

// TextBytes returns the number of bytes of all lines.
func (s *SeriesTable) TextBytes() int { return s.textBytes }

// Line returns the line of the series id. It is empty if damage to the log destroyed the line.
func (s *SeriesTable) Line(id uint32) []byte {
	sr := &s.series[id]
	if sr.len == 0 {
		return nil
	}
	begin := sr.off & (TextChunk - 1)
	end := begin + uint32(sr.len)
	return s.text[sr.off>>TextChunkBits][begin:end:end]
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
	if len(s.slots) == 0 {
		return 0, hash, false
	}
	for i := s.firstSlot(hash); s.slots[i] != 0; i = s.slotAfter(i) {
		id = s.slots[i] - 1
		if s.series[id].hash == hash && bytes.Equal(s.Line(id), line) {
			return id, hash, true
		}
	}
	return 0, hash, false
}

// firstSlot returns the index of the slot at which the search for a series with this hash begins.
func (s *SeriesTable) firstSlot(hash uint32) int {
	return int(uint64(hash) * uint64(len(s.slots)) >> 32)
}

// slotAfter returns the index of the slot at which a search continues after slot i.
func (s *SeriesTable) slotAfter(i int) int {
	if i++; i == len(s.slots) {
		return 0
	}
	return i
}

// slotsFor returns the number of slots that a table with seriesCount series needs.
func slotsFor(seriesCount int) int { return seriesCount + seriesCount/3 + 1 }

// takeSlot puts a series into the first free slot for its hash.
func (s *SeriesTable) takeSlot(id uint32) {
	i := s.firstSlot(s.series[id].hash)
	for s.slots[i] != 0 {
		i = s.slotAfter(i)
	}
	s.slots[i] = id + 1
}

// resizeSlots gives the table n slots. Series take slots in the order of their IDs, so that
// Truncate can free them.
func (s *SeriesTable) resizeSlots(n int) {
	s.slots = make([]uint32, n)
	for id := range s.series {
		if s.series[id].len > 0 {
			s.takeSlot(uint32(id))
		}
	}
}

// HasTextRoom reports whether one more line fits into the table. Offsets have 32 bits.
func (s *SeriesTable) HasTextRoom() bool { return len(s.text) < 1<<(32-TextChunkBits) }

// Insert adds a series and returns its ID, the next free ID. The line must not be in the table and
// must have 1 to MaxLine bytes. hash is the hash that Find returned for it.
func (s *SeriesTable) Insert(hash uint32, line []byte, quoted bool) uint32 {
	id := uint32(len(s.series))
	s.series = append(s.series, series{hash: hash, off: s.appendText(line), len: uint16(len(line)), quoted: quoted, lastT: NoTime})
	s.oldest = NoTime
	if slotsFor(len(s.series)) > len(s.slots) {
		s.resizeSlots(slotsFor(len(s.series) + len(s.series)/2))
	} else {
		s.takeSlot(id)
	}
	return id
}

// appendText adds a line to the last chunk, or to a new chunk if it does not fit. It returns where
// the line begins.
func (s *SeriesTable) appendText(line []byte) (off uint32) {
	last := len(s.text) - 1
	if last < 0 || len(s.text[last])+len(line) > TextChunk {
		s.text = append(s.text, make([]byte, 0, max(len(line), min(s.expected, TextChunk))))
		last++
	}
	chunk := s.text[last]
	if need := len(chunk) + len(line); need > cap(chunk) {
		chunk = append(make([]byte, 0, max(need, min(2*cap(chunk), TextChunk))), chunk...)
	}
	off = uint32(last<<TextChunkBits + len(chunk))
	s.text[last] = append(chunk, line...)
	s.textBytes, s.expected = s.textBytes+len(line), s.expected-len(line)
	return off
}

// PadTo adds series without a line until firstID is the next free ID. Recovery calls it when damage
// to a log has destroyed the lines of these IDs.
func (s *SeriesTable) PadTo(firstID uint32) {
	for uint32(len(s.series)) < firstID {
		s.series = append(s.series, series{lastT: NoTime})
		s.oldest = NoTime
	}
}

// Truncate removes the series with IDs of seriesCount and above. None of them may have a sample.
func (s *SeriesTable) Truncate(seriesCount int) {
	for id := len(s.series) - 1; id >= seriesCount; id-- {
		sr := s.series[id]
		if sr.len == 0 {
			continue
		}
		// No series took a slot after this one, so no search has to pass its slot.
		i := s.firstSlot(sr.hash)
		for s.slots[i] != uint32(id)+1 {
			i = s.slotAfter(i)
		}
		s.slots[i] = 0
		// The bytes may be overwritten later: no reader ever gets the line of an unlisted series.
		chunk, begin := sr.off>>TextChunkBits, sr.off&(TextChunk-1)
		if s.text[chunk] = s.text[chunk][:begin]; begin == 0 {
			s.text[chunk] = nil
			s.text = s.text[:chunk]
		}
		s.textBytes -= int(sr.len)
	}
	s.series = s.series[:seriesCount]
}

// Clip frees the memory that the table has reserved for further series, if that is more than a
// sixteenth of what it uses. Lines that were read before stay valid.
func (s *SeriesTable) Clip() {
	const part = 16
	if n := len(s.series); cap(s.series)-n > n/part {
		s.series = append(make([]series, 0, n), s.series...)
	}
	if last := len(s.text) - 1; last >= 0 {
		if n := len(s.text[last]); cap(s.text[last])-n > n/part {
			s.text[last] = append(make([]byte, 0, n), s.text[last]...)
		}
	}
	if n := slotsFor(len(s.series)); len(s.slots)-n > n/part {
		s.resizeSlots(n)
	}
}

// SetNewestIfLater records a committed sample of a series. If the sample is later than the newest
// sample of the series, it becomes the newest. The series is listed from now on, unless damage
// destroyed its line; newlyListed reports that it was not listed before.
func (s *SeriesTable) SetNewestIfLater(id uint32, t int64, v float64) (newlyListed bool) {
	sr := &s.series[id]
	if t > sr.lastT {
		sr.lastT, sr.lastV = t, v
	}
	if sr.listed || sr.len == 0 {
		return false
	}
	sr.listed = true
	sr.family = s.familyOf(LineName(s.Line(id)))
	return true
}

// familyOf returns the index in families of a metric name, which it adds if needed. It looks at the
// name of the previous call first, because the series of one name arrive together.
func (s *SeriesTable) familyOf(name []byte) uint32 {
	if n := len(s.families); n > 0 && s.families[s.lastFamily].Value() == string(name) {
		return s.lastFamily
	}
	i, found := slices.BinarySearchFunc(s.byName, string(name), func(family uint32, name string) int {
		return strings.Compare(s.families[family].Value(), name)
	})
	if !found {
		s.byName = slices.Insert(s.byName, i, uint32(len(s.families)))
		s.families = append(s.families, unique.Make(string(name)))
	}
	s.lastFamily = s.byName[i]
	return s.lastFamily
}

// addNewestSince adds to g the newest sample of each listed series whose newest sample has a time
// of at least minT, in ms. It returns the number of added samples.
func (s *SeriesTable) addNewestSince(g *FamilyGrouper, minT int64) (added int) {
	for i := range s.series {
		if sr := &s.series[i]; sr.listed && sr.lastT >= minT {
			s.add(g, sr, sr.lastT, sr.lastV)
			added++
		}
	}
	return added
}

// add adds to g a sample of a listed series.
func (s *SeriesTable) add(g *FamilyGrouper, sr *series, t int64, v float64) {
	g.Add(s.families[sr.family], sr.off, sr.len, sr.quoted, t, v)
}

// SeriesOfFamilies returns the number of listed series for each metric name.
func (s *SeriesTable) SeriesOfFamilies() map[string]int {
	counts := make([]int, len(s.families))
	for i := range s.series {
		if sr := &s.series[i]; sr.listed {
			counts[sr.family]++
		}
	}
	byName := make(map[string]int, len(counts))
	for i, n := range counts {
		byName[s.families[i].Value()] = n
	}
	return byName
}

// AppendChunks appends the chunks of text to chunks. The bytes of each chunk stay valid without the
// lock, but the table may replace its own chunks.
func (s *SeriesTable) AppendChunks(chunks [][]byte) [][]byte { return append(chunks, s.text...) }

// CountExpired returns the number of series whose newest sample is older than keptSince, in ms.
// Series without a sample are included. It searches the series only if keptSince is later than the
// oldest of the newest samples that the previous search found.
func (s *SeriesTable) CountExpired(keptSince int64) int {
	if s.oldest >= keptSince {
		return 0
	}
	n := 0
	s.oldest = math.MaxInt64
	for i := range s.series {
		t := s.series[i].lastT
		if s.oldest = min(s.oldest, t); t < keptSince {
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
	subset := NewSeriesTable(s.seed)
	subset.Reserve(n, size)
	newIDs := make([]uint32, len(used))
	for id, u := range used {
		if newIDs[id] = noSeries; u {
			newIDs[id] = subset.Insert(s.series[id].hash, s.Line(uint32(id)), s.series[id].quoted)
			last := &subset.series[newIDs[id]]
			last.lastT, last.lastV = s.series[id].lastT, s.series[id].lastV
		}
	}
	return subset, newIDs
}
