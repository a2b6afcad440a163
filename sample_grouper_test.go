package main

// The grouper returns the samples that were added and selected, family by family, in the order in
// which they were added. It does so again after Reset.

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unique"
)

// grouperModel adds random samples to a grouper, and to a list for each family.
type grouperModel struct {
	rng    *rand.Rand
	g      FamilyGrouper
	want   map[string][]string // by family: its samples, as shown by showFamilySample
	quoted map[string]bool     // families with a quoted sample
}

func showFamilySample(line []byte, t int64, v float64, quoted bool) string {
	return fmt.Sprintf("%s %g %d %t", line, v, t, quoted)
}

// addText adds the samples of one text. Its families are the same in most texts.
func (m *grouperModel) addText(n int) {
	var text []byte
	var match func(line []byte) bool
	if m.rng.IntN(3) == 0 {
		match = func(line []byte) bool { return !bytes.Contains(line, []byte("3")) }
	}
	for f := range 1 + m.rng.IntN(5) {
		if m.rng.IntN(8) == 0 {
			f = m.rng.IntN(20)
		}
		name := fmt.Sprintf("m%c", 'a'+f)
		for range m.rng.IntN(n) {
			line := fmt.Appendf(nil, "%s{n=\"%d\"}", name, m.rng.IntN(100))
			quoted := m.rng.IntN(50) == 0
			for at := range int64(1 + m.rng.IntN(2)) {
				v := float64(m.rng.IntN(1000))
				m.g.Add(unique.Make(name), uint32(len(text)), uint16(len(line)), quoted, at, v)
				if match == nil || match(line) {
					m.want[name] = append(m.want[name], showFamilySample(line, at, v, quoted))
					m.quoted[name] = m.quoted[name] || quoted
				}
			}
			text = append(text, line...)
		}
	}
	m.g.EndText(TextChunks(text), match)
}

// addSeries adds a sample of a series of the server's own.
func (m *grouperModel) addSeries() {
	name, v := fmt.Sprintf("own%d", m.rng.IntN(3)), m.rng.Float64()
	labels := []Label{{[]byte("l"), []byte(strings.Repeat("x", m.rng.IntN(60_000)))}}
	m.g.AddSeries(unique.Make(name), labels, v)
	m.want[name] = append(m.want[name], showFamilySample(appendLine(nil, []byte(name), labels), NoTime, v, false))
}

// The grouper returns what was added and selected, under random texts, selectors and series of its own.
func TestFamilyGrouperModel(t *testing.T) {
	for seed := range testSeeds(t, 20) {
		m := &grouperModel{rng: rand.New(rand.NewPCG(seed, 3))}
		for use := range 3 {
			m.want, m.quoted = map[string][]string{}, map[string]bool{}
			for range m.rng.IntN(300) {
				m.addText([]int{2, 4, 70}[use])
			}
			for range m.rng.IntN(60) { // more than one text holds
				m.addSeries()
			}
			m.g.EndSeries()
			n := 0
			var names []string
			for _, f := range m.g.Families() {
				var got []string
				for l := range f.Samples {
					got = append(got, showFamilySample(l.Line, l.T, l.V, l.Quoted))
				}
				n += len(got)
				names = append(names, f.Name)
				// A family may count as quoted because of a sample that was not selected.
				if !slices.Equal(got, m.want[f.Name]) || m.quoted[f.Name] && !f.Quoted {
					t.Fatalf("seed %d, use %d, family %s, quoted %t: got %.3000q\nwant %.3000q", seed, use, f.Name, f.Quoted, got, m.want[f.Name])
				}
				for range f.Samples { // ends early without harm
					break
				}
			}
			if want := slices.Sorted(maps.Keys(m.want)); !slices.Equal(names, want) || m.g.Len() != n {
				t.Fatalf("seed %d, use %d: got families %q and counted %d samples, want %q and %d", seed, use, names, m.g.Len(), want, n)
			}
			m.g.Reset()
			if m.g.Len() != 0 || len(m.g.Families()) != 0 {
				t.Fatalf("seed %d: after Reset there are samples", seed)
			}
		}
	}
}

// A grouper that has grown needs no memory for each sample or for each text.
func TestFamilyGrouperAllocations(t *testing.T) {
	var g FamilyGrouper
	name, chunks := unique.Make("m"), TextChunks([]byte("m"))
	allocs := testing.AllocsPerRun(5, func() {
		for range 1000 {
			g.Add(name, 0, 1, false, 1, 1)
			g.EndText(chunks, nil)
		}
		for f := range slices.Values(g.Families()) {
			for range f.Samples {
			}
		}
		g.Reset()
	})
	if allocs > 20 {
		t.Errorf("1000 samples need %v allocations, want at most 20", allocs)
	}
}
