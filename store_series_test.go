package main

// The table of series is compared with a model under insertion, rollback and compaction, and with
// lines of equal hashes. Further tests check the newest samples that the table lists.

import (
	"bytes"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"testing"
)

// tableModel has a table, and the series that the table must have.
type tableModel struct {
	t      *testing.T
	table  *SeriesTable
	lines  []string // by series ID; "" is a padded series, which has no line
	lastT  []int64  // by series ID: time of the newest sample
	listed []bool   // by series ID: the series has a committed sample
}

// A series counts as expired, and is not listed, if its newest sample is older than tableCutoff.
const tableCutoff = 50

func (m *tableModel) add(line string) {
	m.lines, m.lastT, m.listed = append(m.lines, line), append(m.lastT, NoTime), append(m.listed, false)
}

// insert finds a line in the table, or inserts it, and checks the returned ID.
func (m *tableModel) insert(line string) {
	id, hash, ok := m.table.Find([]byte(line))
	if known := slices.Index(m.lines, line); ok != (known >= 0) || ok && int(id) != known {
		m.t.Errorf("%q is found as series %d, found %t; want %d", line, id, ok, known)
	}
	if !ok {
		if id := m.table.Insert(hash, []byte(line), false); int(id) != len(m.lines) {
			m.t.Errorf("%q is inserted as series %d, want %d", line, id, len(m.lines))
		}
		m.add(line)
	}
}

func (m *tableModel) truncate(n int) {
	m.table.Truncate(n)
	m.lines, m.lastT, m.listed = m.lines[:n], m.lastT[:n], m.listed[:n]
}

func (m *tableModel) padTo(n int) {
	m.table.PadTo(uint32(n))
	for len(m.lines) < n {
		m.add("")
	}
}

// subset returns the model of a smaller table. It has the listed series for which keep returns
// true, in the same order and with new IDs without gaps. m stays unchanged.
func (m *tableModel) subset(keep func() bool) *tableModel {
	used := make([]bool, m.table.Len())
	kept := &tableModel{t: m.t}
	for i := range used {
		if used[i] = m.listed[i] && keep(); used[i] {
			kept.add(m.lines[i])
			kept.lastT[len(kept.lastT)-1] = m.lastT[i]
		}
	}
	var ids []uint32
	kept.table, ids = m.table.Subset(used)
	for i, n := 0, uint32(0); i < len(used); i++ {
		if want := n; used[i] {
			if n++; ids[i] != want {
				m.t.Errorf("series %d gets the new ID %d, want %d", i, ids[i], want)
			}
		} else if ids[i] != noSeries {
			m.t.Errorf("the dropped series %d gets the new ID %d, want noSeries", i, ids[i])
		}
	}
	m.check()
	return kept
}

// setNewest sets the newest sample of a series to a sample at the given time, if that is later. The
// value of each sample is its time.
func (m *tableModel) setNewest(id int, at int64) {
	m.table.SetNewestIfLater(uint32(id), at, float64(at))
	m.lastT[id], m.listed[id] = max(m.lastT[id], at), true
}

func (m *tableModel) check() {
	if m.table.Len() != len(m.lines) {
		m.t.Fatalf("the table has %d series, want %d", m.table.Len(), len(m.lines))
	}
	size, expired := 0, 0
	want := map[string]int64{}
	for i, line := range m.lines {
		size += len(line)
		id, _, ok := m.table.Find([]byte(line))
		last, _ := m.table.Newest(uint32(i))
		if string(m.table.Line(uint32(i))) != line || line != "" && (!ok || int(id) != i) || last != m.lastT[i] {
			m.t.Errorf("series %d is %q with its newest sample at %d, found as %d, %t; want %q at %d",
				i, m.table.Line(uint32(i)), last, id, ok, line, m.lastT[i])
		}
		if m.listed[i] && m.lastT[i] >= tableCutoff {
			want[line] = m.lastT[i]
		}
		if m.lastT[i] < tableCutoff {
			expired++
		}
	}
	if m.table.TextBytes() != size {
		m.t.Errorf("the table counts %d bytes of text, want %d", m.table.TextBytes(), size)
	}
	if got := m.table.CountExpired(tableCutoff); got != expired {
		m.t.Errorf("the table counts %d expired series, want %d", got, expired)
	}
	got := map[string]int64{}
	for _, f := range newestSince(m.table, tableCutoff) {
		for l := range f.Samples {
			if f.Name != string(LineName(l.Line)) || l.V != float64(l.T) {
				m.t.Errorf("%q is listed with the name %q and the value %g, at %d", l.Line, f.Name, l.V, l.T)
			}
			if _, twice := got[string(l.Line)]; twice {
				m.t.Errorf("%q is listed twice", l.Line)
			}
			got[string(l.Line)] = l.T
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		m.t.Errorf("listed %v\nwant   %v", got, want)
	}
}

// The table finds every inserted series and counts text and expired series, under random
// insertions, truncations, paddings and subsets. It lists the newest sample of each series, unless
// that sample is older than the cutoff.
func TestSeriesTableModel(t *testing.T) {
	for seed := range testSeeds(t, 40) {
		rng := rand.New(rand.NewPCG(seed, 0))
		m := &tableModel{t: t, table: NewSeriesTable(maphash.MakeSeed())}
		for range 60 {
			committed := m.table.Len()
			for range rng.IntN(8) {
				m.insert(fmt.Sprintf("m%d{n=\"%d\"}", rng.IntN(5), rng.IntN(40)))
			}
			switch rng.IntN(5) {
			case 0: // as the rollback of a push does
				m.truncate(committed)
			case 1: // as a compaction does
				m = m.subset(func() bool { return rng.IntN(4) > 0 })
			case 2: // as recovery from a log with a gap in the IDs does
				m.padTo(m.table.Len() + rng.IntN(3))
			}
			for id := range m.lines { // as the commit of a push does
				if m.lines[id] != "" && (!m.listed[id] && m.lastT[id] == NoTime || rng.IntN(10) == 0) {
					m.setNewest(id, rng.Int64N(100))
				}
			}
			if m.check(); t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		}
	}
}

// The table keeps series apart whose lines have equal 32-bit hashes, which nearly always occur
// among 200,000 lines. After Truncate it finds exactly the lines that are left.
func TestSeriesTableEqualHashes(t *testing.T) {
	const n = 200_000
	table := NewSeriesTable(maphash.MakeSeed())
	line := func(i int) []byte { return fmt.Appendf(nil, "m{n=\"%d\"}", i) }
	for i := range n {
		id, hash, ok := table.Find(line(i))
		if ok {
			t.Fatalf("line %d is found as series %d before it is inserted", i, id)
		}
		table.Insert(hash, line(i), false)
	}
	hashes := map[uint32]bool{}
	for _, sr := range table.series {
		hashes[sr.hash] = true
	}
	if len(hashes) == n {
		t.Log("no hashes are equal in this run, which is rare")
	}
	table.Truncate(n / 2)
	for i := range n {
		if id, _, ok := table.Find(line(i)); ok != (i < n/2) || ok && int(id) != i {
			t.Fatalf("line %d is found as series %d, found %t", i, id, ok)
		}
	}
}

// A series is listed once it has a sample. A sample of an earlier or the same time does not
// replace the newest sample.
func TestSetNewestIfLater(t *testing.T) {
	table := NewSeriesTable(maphash.MakeSeed())
	_, hash, _ := table.Find([]byte(`{"a.b",x="1"}`))
	id := table.Insert(hash, []byte(`{"a.b",x="1"}`), true)
	list := func() (got []FamilySample) {
		for _, f := range newestSince(table, NoTime+1) {
			for l := range f.Samples {
				if f.Name != "a.b" || !f.Quoted || !l.Quoted {
					t.Errorf("listed with the name %q, quoted %t, %t; want a.b, true, true", f.Name, f.Quoted, l.Quoted)
				}
				got = append(got, l)
			}
		}
		return got
	}
	if got := list(); len(got) != 0 {
		t.Errorf("a series without a sample is listed: %+v", got)
	}
	for _, at := range []int64{100, 90, 100, 110} {
		table.SetNewestIfLater(id, at, float64(at))
	}
	table.SetNewestIfLater(id, 110, 5)
	if got := list(); len(got) != 1 || got[0].T != 110 || got[0].V != 110 || cap(got[0].Line) != len(got[0].Line) {
		t.Errorf("listed %+v, want one sample of value 110 at 110", got)
	}
}

// A table has room for a line as long as it has less than 4 GiB of text, in chunks of TextChunk
// bytes.
func TestSeriesTableTextRoom(t *testing.T) {
	table := NewSeriesTable(maphash.MakeSeed())
	for chunks, want := range map[int]bool{0: true, 1<<32/TextChunk - 1: true, 1 << 32 / TextChunk: false} {
		table.text = make([][]byte, chunks)
		if got := table.HasTextRoom(); got != want {
			t.Errorf("with %d chunks: room for a line: got %t, want %t", chunks, got, want)
		}
	}
}

// Lines of any length keep their text through growth, rollback, clipping and compaction, also lines
// that were read before. Clip leaves at most a sixteenth of the memory unused.
func TestSeriesTableText(t *testing.T) {
	for seed := range testSeeds(t, 40) {
		rng := rand.New(rand.NewPCG(seed, 0))
		table := NewSeriesTable(maphash.MakeSeed())
		if rng.IntN(2) == 0 {
			table.Reserve(rng.IntN(100), rng.IntN(3*TextChunk))
		}
		var want []string
		var read [][]byte // by ID: what Line returned when the series was committed
		for range 20 {
			for range rng.IntN(30) {
				size := []int{10, 300, 5000, TextChunk - 1, TextChunk, TextChunk + 1, MaxLine}[min(rng.IntN(40), rng.IntN(7))]
				line := fmt.Appendf(nil, "m{n=\"%d\"}", len(want))
				line = append(line, bytes.Repeat([]byte{'x'}, size-len(line)%size)...)[:max(size, len(line))]
				_, hash, _ := table.Find(line)
				table.Insert(hash, line, false)
				want = append(want, string(line))
			}
			if rng.IntN(3) == 0 { // as a rollback does
				table.Truncate(len(read))
				want = want[:len(read)]
			}
			for id := len(read); id < len(want); id++ {
				if !table.SetNewestIfLater(uint32(id), 1, 1) || table.SetNewestIfLater(uint32(id), 1, 1) {
					t.Fatalf("seed %d: series %d is not newly listed by its first sample only", seed, id)
				}
				read = append(read, table.Line(uint32(id)))
			}
			switch rng.IntN(4) {
			case 0:
				table.Clip()
				if last := len(table.text) - 1; last >= 0 && cap(table.text[last]) > len(table.text[last])*17/16 {
					t.Errorf("seed %d: the last chunk has %d bytes for %d", seed, cap(table.text[last]), len(table.text[last]))
				}
				if n := table.Len(); cap(table.series) > n*17/16 || len(table.slots) > slotsFor(n)*17/16 {
					t.Errorf("seed %d: room for %d series and %d slots for %d series", seed, cap(table.series), len(table.slots), n)
				}
			case 1:
				table, _ = table.Subset(slices.Repeat([]bool{true}, len(want)))
				for id := range want {
					table.SetNewestIfLater(uint32(id), 1, 1)
				}
			}
			for id, line := range want {
				if found, _, ok := table.Find([]byte(line)); string(table.Line(uint32(id))) != line || string(read[id]) != line || !ok || int(found) != id {
					t.Fatalf("seed %d: series %d of %d bytes is found as %d, %t, and has or had another line", seed, id, len(line), found, ok)
				}
			}
		}
	}
}
