package main

// FamilyGrouper groups the samples of many texts into families. It keeps 24 bytes of each sample,
// which is found in its text by an offset, and 16 bytes of each run: samples of one name that follow
// each other in one text. A text is not copied, and its bytes must not change until Reset. Reset
// keeps the memory for reuse. This file must not know where texts come from.

import (
	"cmp"
	"iter"
	"slices"
	"unique"
)

const (
	// TextChunk is the size in bytes of the chunks of a text. A text is a list of chunks, and no line
	// is in two of them. The offset of a line has its position in the chunk in the lower
	// TextChunkBits bits, and the index of the chunk in the others. TextChunk is the largest size
	// that Go allocates without rounding up to whole pages, which would cost a small site a tenth of
	// its memory. The last line of a chunk may end beyond it.
	TextChunk     = 1 << TextChunkBits
	TextChunkBits = 15
)

// FamilyGrouper collects samples and groups them into families. Its zero value is ready for use. It
// is not safe for concurrent use.
type FamilyGrouper struct {
	texts    [][]byte // chunks of all texts
	samples  []groupedSample
	runs     []sampleRun // of the texts before the present text, in the order of their samples
	sorted   []sampleRun // by family; set by Families
	pending  []pendingRun
	families []groupedFamily // in the order of their first runs
	index    map[unique.Handle[string]]uint32
	own      [][]byte // chunks that AddSeries fills, also those of earlier uses
	ownUsed  int      // number of chunks of own that have lines
	loaded   byte     // result of loadLines, without which the compiler would leave out the reads
}

// groupedSample is a sample. Its line begins at off in the text of its run.
type groupedSample struct {
	t      int64 // ms, or NoTime
	v      float64
	off    uint32
	len    uint16
	quoted bool
}

// sampleRun stands for samples[begin:end], which have one name and one text.
type sampleRun struct {
	begin, end uint32
	text       uint32 // index in texts of the first chunk
	family     uint32 // index in families
}

const (
	cacheLine = 64 // bytes that the processor loads at a time
	readAhead = 32 // samples whose lines are loaded together
)

// pendingRun is a run of the present text.
type pendingRun struct {
	name   unique.Handle[string]
	end    uint32
	quoted bool // one of its samples is quoted
}

type groupedFamily struct {
	name   unique.Handle[string]
	quoted bool // one of its samples is quoted
	runs   int
}

// Reset removes all samples. It keeps the memory, but not the texts.
func (g *FamilyGrouper) Reset() {
	clear(g.texts)
	clear(g.families)
	clear(g.index)
	clear(g.pending[:cap(g.pending)])
	g.texts, g.samples, g.runs, g.pending, g.families, g.ownUsed = g.texts[:0], g.samples[:0], g.runs[:0], g.pending[:0], g.families[:0], 0
}

// Len returns the number of samples. It must be called between EndText and the next Add.
func (g *FamilyGrouper) Len() int { return len(g.samples) }

// Add adds a sample with a metric name. Its line is line bytes long and begins at off in the text
// that the next EndText gets; see TextChunk. quoted is true if the line has a name outside the
// legacy charset. The samples of one series must be added in ascending order of time. Add is fast,
// because a lock is held.
func (g *FamilyGrouper) Add(name unique.Handle[string], off uint32, line uint16, quoted bool, t int64, v float64) {
	n := len(g.pending)
	if n == 0 || g.pending[n-1].name != name {
		g.pending = append(g.pending, pendingRun{name: name})
		n++
	}
	g.samples = append(g.samples, groupedSample{t: t, v: v, off: off, len: line, quoted: quoted})
	run := &g.pending[n-1]
	run.end, run.quoted = uint32(len(g.samples)), run.quoted || quoted
}

// EndText ends the samples of one text, which has these chunks. It leaves out the samples whose lines
// match does not select. If match is nil, all are selected. match is called once for samples of one
// series that follow each other. EndText copies the list of chunks, but not their bytes.
func (g *FamilyGrouper) EndText(chunks [][]byte, match func(line []byte) bool) {
	if len(g.pending) == 0 {
		return
	}
	begin := uint32(0)
	if n := len(g.runs); n > 0 {
		begin = g.runs[n-1].end
	}
	kept := begin // samples[begin:kept] are selected
	guess := uint32(0)
	for _, p := range g.pending {
		first := kept
		if match == nil {
			kept = p.end
		} else {
			for samples, lastOff, ok := g.samples[begin:p.end], int64(-1), false; len(samples) > 0; samples = samples[1:] {
				s := samples[0]
				if int64(s.off) != lastOff {
					lastOff, ok = int64(s.off), match(s.line(chunks))
				}
				if ok {
					g.samples[kept] = s
					kept++
				}
			}
			begin = p.end
		}
		if kept > first {
			guess = g.addRun(p, sampleRun{begin: first, end: kept, text: uint32(len(g.texts))}, guess) + 1
		}
	}
	g.samples, g.pending = g.samples[:kept], g.pending[:0]
	g.texts = append(g.texts, chunks...)
}

// addRun adds a run to its family and returns the index of the family. guess is the index that the
// family probably has, because most sites have the same families in the same order.
func (g *FamilyGrouper) addRun(p pendingRun, run sampleRun, guess uint32) (family uint32) {
	family = guess
	if int(guess) >= len(g.families) || g.families[guess].name != p.name {
		var known bool
		if family, known = g.index[p.name]; !known {
			if g.index == nil {
				g.index = map[unique.Handle[string]]uint32{}
			}
			family = uint32(len(g.families))
			g.index[p.name] = family
			g.families = append(g.families, groupedFamily{name: p.name})
		}
	}
	run.family = family
	g.runs = append(g.runs, run)
	f := &g.families[family]
	f.runs, f.quoted = f.runs+1, f.quoted || p.quoted
	return family
}

// AddSeries adds a sample without a time of the series with this name and these labels. All text
// that Add has used must be ended. The labels must be sorted and valid, and the line must have at
// most MaxLine bytes.
func (g *FamilyGrouper) AddSeries(name unique.Handle[string], labels []Label, v float64) {
	if g.ownUsed == 0 || len(g.own[g.ownUsed-1]) >= TextChunk {
		g.EndSeries()
		if g.ownUsed == len(g.own) {
			g.own = append(g.own, make([]byte, 0, TextChunk))
		}
		g.own[g.ownUsed] = g.own[g.ownUsed][:0]
		g.ownUsed++
	}
	text := &g.own[g.ownUsed-1]
	off := len(*text)
	*text = appendLine(*text, []byte(name.Value()), labels)
	g.Add(name, uint32(off), uint16(len(*text)-off), false, NoTime, v)
}

// EndSeries ends the text of AddSeries. It must be called after the last AddSeries.
func (g *FamilyGrouper) EndSeries() {
	if g.ownUsed > 0 {
		g.EndText(g.own[g.ownUsed-1:g.ownUsed], nil)
	}
}

// Families returns the families, sorted by name. The samples of a family are in the order in which
// they were added. The families are valid until Reset, or until a sample is added.
func (g *FamilyGrouper) Families() []Family {
	g.sorted = slices.Grow(g.sorted[:0], len(g.runs))[:len(g.runs)]
	ends := make([]int, len(g.families)) // index in sorted after the last run so far of each family
	all := make([]Family, 0, len(g.families))
	begin := 0
	for i, f := range g.families {
		ends[i] = begin
		all = append(all, Family{Name: f.name.Value(), Quoted: f.quoted, Samples: g.samplesOf(g.sorted[begin : begin+f.runs])})
		begin += f.runs
	}
	for _, r := range g.runs {
		g.sorted[ends[r.family]] = r
		ends[r.family]++
	}
	slices.SortFunc(all, func(a, b Family) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// samplesOf returns the samples of runs.
func (g *FamilyGrouper) samplesOf(runs []sampleRun) iter.Seq[FamilySample] {
	return func(yield func(FamilySample) bool) {
		var ahead [readAhead]FamilySample
		n, first := 0, 0 // number of samples in ahead; number of them that begin a run
		flush := func() bool {
			if first > len(ahead)/4 {
				g.loadLines(ahead[:n])
			}
			for i := range ahead[:n] {
				if !yield(ahead[i]) {
					return false
				}
			}
			n, first = 0, 0
			return true
		}
		for _, r := range runs {
			chunks := g.texts[r.text:]
			first++
			for i := r.begin; i < r.end; i++ {
				if n == len(ahead) && !flush() {
					return
				}
				s := &g.samples[i]
				ahead[n] = FamilySample{s.line(chunks), s.t, s.v, s.quoted}
				n++
			}
		}
		flush()
	}
}

// loadLines reads a byte of each cache line of the lines of samples. If most runs are short, the
// lines of one family are far apart in memory. The processor waits for many of them at the same time
// if nothing else is done between the reads. That saves a third of the time of a scrape of 10,000 sites.
func (g *FamilyGrouper) loadLines(samples []FamilySample) {
	var sum byte
	for i := range samples {
		line := samples[i].Line
		for j := 0; j < len(line); j += cacheLine {
			sum += line[j]
		}
	}
	g.loaded = sum
}

// TextChunks returns the chunks of a text that is in one piece. They share its memory.
func TextChunks(text []byte) (chunks [][]byte) {
	for i := 0; i < len(text); i += TextChunk {
		chunks = append(chunks, text[i:])
	}
	return chunks
}

// line returns the line of s in the text with these chunks.
func (s *groupedSample) line(chunks [][]byte) []byte {
	begin := s.off & (TextChunk - 1)
	end := begin + uint32(s.len)
	return chunks[s.off>>TextChunkBits][begin:end:end]
}
