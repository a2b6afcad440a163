package main

// The table against a map, under insertion, undoing, compaction
// and equal hashes; and what it shows.

import (
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"testing"
)

// tableKeeper is a table and what it should hold.
type tableKeeper struct {
	t     *testing.T
	table *SeriesTable
	lines []string // by ID
	lastT []int64
	shown []bool
}

func (k *tableKeeper) insert(line string) {
	id, hash, ok := k.table.Find([]byte(line))
	if known := slices.Index(k.lines, line); ok != (known >= 0) || ok && int(id) != known {
		k.t.Errorf("%q found as %d, %t; want %d", line, id, ok, known)
	}
	if !ok {
		if id := k.table.Insert(hash, []byte(line), false); int(id) != len(k.lines) {
			k.t.Errorf("%q is inserted as %d, want %d", line, id, len(k.lines))
		}
		k.lines, k.lastT, k.shown = append(k.lines, line), append(k.lastT, NoTime), append(k.shown, false)
	}
}

func (k *tableKeeper) truncate(n int) {
	k.table.Truncate(n)
	k.lines, k.lastT, k.shown = k.lines[:n], k.lastT[:n], k.shown[:n]
}

func (k *tableKeeper) check() {
	if k.table.Len() != len(k.lines) {
		k.t.Fatalf("%d series, want %d", k.table.Len(), len(k.lines))
	}
	size := 0
	want := map[string]int64{}
	for i, line := range k.lines {
		size += len(line)
		id, _, ok := k.table.Find([]byte(line))
		last, _ := k.table.Newest(uint32(i))
		if string(k.table.Line(uint32(i))) != line || line != "" && (!ok || int(id) != i) || last != k.lastT[i] {
			k.t.Errorf("series %d is %q at %d, found as %d, %t; want %q at %d", i, k.table.Line(uint32(i)), last, id, ok, line, k.lastT[i])
		}
		if k.shown[i] && k.lastT[i] >= 50 {
			want[line] = k.lastT[i]
		}
	}
	if k.table.TextBytes() != size {
		k.t.Errorf("%d bytes of text, want %d", k.table.TextBytes(), size)
	}
	got := map[string]int64{}
	k.table.ForEachNewestSince(50, func(_ uint32, name string, l FamilySample) {
		if name != string(LineName(l.Line)) || l.V != float64(l.T) {
			k.t.Errorf("%q shown as %q, %g", l.Line, name, l.V)
		}
		if _, twice := got[string(l.Line)]; twice {
			k.t.Errorf("%q is shown twice", l.Line)
		}
		got[string(l.Line)] = l.T
	})
	if fmt.Sprint(got) != fmt.Sprint(want) {
		k.t.Errorf("shown %v\nwant  %v", got, want)
	}
	dead := 0
	for _, last := range k.lastT {
		if last < 50 {
			dead++
		}
	}
	if k.table.CountExpired(50) != dead {
		k.t.Errorf("%d dead, want %d", k.table.CountExpired(50), dead)
	}
}

func TestSeriesTable(t *testing.T) {
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 0))
		k := &tableKeeper{t: t, table: NewSeriesTable(maphash.MakeSeed(), 0)}
		for range 60 {
			durable := k.table.Len() // as a push: insert, then show or undo
			for range rng.IntN(8) {
				k.insert(fmt.Sprintf("m%d{n=\"%d\"}", rng.IntN(5), rng.IntN(40)))
			}
			switch rng.IntN(5) {
			case 0:
				k.truncate(durable)
			case 1:
				used := make([]bool, k.table.Len())
				kept := tableKeeper{t: t}
				for i := range used {
					if used[i] = k.shown[i] && rng.IntN(4) > 0; used[i] {
						kept.lines, kept.lastT, kept.shown = append(kept.lines, k.lines[i]), append(kept.lastT, k.lastT[i]), append(kept.shown, false)
					}
				}
				var ids []uint32
				kept.table, ids = k.table.Subset(used)
				for i, n := 0, uint32(0); i < len(used); i++ {
					if want := n; used[i] {
						if n++; ids[i] != want {
							t.Errorf("series %d becomes %d, want %d", i, ids[i], want)
						}
					} else if ids[i] != noSeries {
						t.Errorf("dropped series %d becomes %d", i, ids[i])
					}
				}
				k.check() // stays as it is
				k = &kept
			case 2:
				n := uint32(k.table.Len() + rng.IntN(3))
				k.table.PadTo(n)
				for len(k.lines) < int(n) {
					k.lines, k.lastT, k.shown = append(k.lines, ""), append(k.lastT, NoTime), append(k.shown, false)
				}
			}
			for id := range k.lines {
				if k.lines[id] != "" && (!k.shown[id] && k.lastT[id] == NoTime || rng.IntN(10) == 0) {
					at := rng.Int64N(100)
					k.table.SetNewestIfLater(uint32(id), at, float64(at))
					k.lastT[id], k.shown[id] = max(k.lastT[id], at), true
				}
			}
			if k.check(); t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		}
	}
}

// Among 200,000 lines some have equal 32-bit hashes; each is found nevertheless,
// and undone nevertheless.
func TestSeriesEqualHashes(t *testing.T) {
	const n = 200_000
	table := NewSeriesTable(maphash.MakeSeed(), 0)
	line := func(i int) []byte { return fmt.Appendf(nil, "m{n=\"%d\"}", i) }
	for i := range n {
		id, hash, ok := table.Find(line(i))
		if ok {
			t.Fatalf("line %d found as %d before it is there", i, id)
		}
		table.Insert(hash, line(i), false)
	}
	if len(table.index) == n {
		t.Log("no hashes are equal this time, which is rare")
	}
	table.Truncate(n / 2)
	for i := range n {
		if id, _, ok := table.Find(line(i)); ok != (i < n/2) || ok && int(id) != i {
			t.Fatalf("line %d found as %d, %t", i, id, ok)
		}
	}
}

func TestSeriesSetNewest(t *testing.T) {
	table := NewSeriesTable(maphash.MakeSeed(), 0)
	_, hash, _ := table.Find([]byte(`{"a.b",x="1"}`))
	id := table.Insert(hash, []byte(`{"a.b",x="1"}`), true)
	show := func() (got []FamilySample) {
		table.ForEachNewestSince(NoTime+1, func(_ uint32, name string, l FamilySample) {
			if name != "a.b" || !l.Quoted {
				t.Errorf("%q: %+v", name, l)
			}
			got = append(got, l)
		})
		return got
	}
	if len(show()) != 0 {
		t.Error("a series without a durable sample is shown")
	}
	for _, at := range []int64{100, 90, 100, 110} { // late and equal ones change nothing
		table.SetNewestIfLater(id, at, float64(at))
	}
	table.SetNewestIfLater(id, 110, 5)
	if got := show(); len(got) != 1 || got[0].T != 110 || got[0].V != 110 || cap(got[0].Line) != len(got[0].Line) {
		t.Errorf("shown %+v", got)
	}
}

func TestSeriesHasRoom(t *testing.T) {
	table := NewSeriesTable(maphash.MakeSeed(), 0)
	for n, want := range map[int]bool{0: true, MaxLine: true, 1<<32 - 1: true, 1 << 32: false} {
		if table.HasTextRoom(n) != want {
			t.Errorf("room for %d: %t", n, !want)
		}
	}
}
