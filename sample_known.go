package main

// This file lets the decoders recognize series of a site by their undecoded form, so that most
// samples of a push need no parsing, normalizing and rendering. The full decoder stays the
// reference: a series becomes known only by decoding it, and a sample whose form is not the plain
// one is decoded. A known series has the ID that the store gave it, or the reason for which the
// callback of the decoder drops its samples. This file must not know of rules or of stores.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/bits"
	"slices"
)

// ErrDecodeAgain is returned if samples of known series cannot be counted exactly: for example,
// because a series may occur twice at one time. The caller must decode the body again without a
// KnownPush.
var ErrDecodeAgain = errors.New("the body must be decoded again without known series")

// ErrStaleSeriesIDs is returned if the IDs of known series are those of another series table than
// the store has now. It wraps ErrDecodeAgain. The known series must be forgotten.
var ErrStaleSeriesIDs = fmt.Errorf("%w: the series table has changed", ErrDecodeAgain)

// MaxDropCode is the highest value of RawSample.DropCode.
const MaxDropCode = 15

// A knownRef says what becomes of the samples of a series. The lower bits have the ID of the series
// or the drop code. refSample is used only within a push: the lower bits then have the index of the
// sample whose line is that of the series.
type knownRef uint32

const (
	refDropped knownRef = 1 << 31
	refSample  knownRef = 1 << 30
	refBits             = refSample - 1
)

// knownEntry is the entry of one series in its undecoded form. A series that is sent in several
// forms, such as different orders of its labels, has several entries.
type knownEntry struct {
	hash  uint64 // hash and check are the formHash
	check uint32
	ref   knownRef
}

func (s *knownEntry) is(h formHash) bool { return s.hash == h.hash && s.check == h.check }

func (s *knownEntry) form() formHash { return formHash{s.hash, s.check} }

// formHash is the hash of the undecoded form of a series, of 96 bits. A site has its own seeds and
// series, so a collision could only exchange two series of the site that sends them.
// The seeds are secret, and among a million series an accidental collision has a probability below
// 2^-57.
type formHash struct {
	hash  uint64
	check uint32
}

// KnownSeries has the series of one site that its pushes have sent. The zero value has none and is
// ready for use. A KnownSeries is valid for one set of rules and for one series table of the store.
// It is not safe for concurrent use.
type KnownSeries struct {
	seeds  [4]maphash.Seed // two for names and two for labels
	series []knownEntry    // in the order of the push that last added a series; then the others
	next   int             // index in series at which the next sample is expected
}

// Len returns the number of entries, each of which takes 16 bytes.
func (k *KnownSeries) Len() int { return len(k.series) }

// Forget forgets all series.
func (k *KnownSeries) Forget() { k.series, k.next = nil, 0 }

// hashName returns the hash of a metric name, which hashForm combines with the labels.
func (k *KnownSeries) hashName(name []byte) formHash {
	return formHash{maphash.Bytes(k.seeds[0], name), uint32(maphash.Bytes(k.seeds[1], name))}
}

// hashForm returns the hash of a series: of the bytes of its labels, and of its name. In formats
// where these bytes contain the name, name is the zero formHash.
func (k *KnownSeries) hashForm(name formHash, labels []byte) formHash {
	return formHash{maphash.Bytes(k.seeds[2], labels) ^ name.hash, uint32(maphash.Bytes(k.seeds[3], labels)) ^ name.check}
}

// KnownPush is the use of the known series of a site for one body. Decoder.DecodeKnown adds the
// samples of known series to List and counts them here. For all other samples it calls its
// callback, which adds them to the same list. Learn then makes their series known. A KnownPush is
// not safe for concurrent use. Reset keeps its memory for reuse.
type KnownPush struct {
	Received    int                  // samples of known series
	Dropped     [MaxDropCode + 1]int // samples of known series that were dropped, by drop code
	Repetitions [RepeatsTime + 1]int // samples of known series that were not dropped, by how they repeat another sample

	known   *KnownSeries
	list    *SampleList
	arrival int64        // ms since the epoch; the time of samples without a timestamp
	seen    []knownEntry // the series of the body that are known or can be learned, in order
	misses  int          // series in seen that were not known
	index   knownIndex   // of known.series; empty until it is needed
}

// Reset prepares p for a body whose samples go into list. known has the series of the site. If it is
// nil, no series is known and none will be learned. arrival is the time for samples without a
// timestamp, in ms since the epoch.
func (p *KnownPush) Reset(known *KnownSeries, list *SampleList, arrival int64) {
	if known != nil && known.seeds == [4]maphash.Seed{} {
		known.seeds = [4]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed(), maphash.MakeSeed(), maphash.MakeSeed()}
	}
	*p = KnownPush{known: known, list: list, arrival: arrival, seen: p.seen[:0], index: p.index[:0]}
}

// MemorySize returns the bytes of memory that p fills, about.
func (p *KnownPush) MemorySize() int {
	const entryBytes, indexBytes = 16, 4
	return len(p.seen)*entryBytes + len(p.index)*indexBytes
}

// CanLearn reports whether Learn would make series known.
func (p *KnownPush) CanLearn() bool { return p.known != nil && p.misses > 0 }

// addIfKnown adds a sample of the series with this hash to p.list, or counts it as dropped. It returns
// false if the series is not known. The error is ErrDecodeAgain.
func (p *KnownPush) addIfKnown(h formHash, t int64, v float64) (known bool, err error) {
	series, k := p.known.series, p.known.next
	if k >= len(series) || !series[k].is(h) {
		if k = p.find(h); k < 0 {
			return false, nil
		}
	}
	p.known.next = k + 1
	p.seen = append(p.seen, series[k])
	p.Received++
	ref := series[k].ref
	if ref&refDropped != 0 {
		p.Dropped[ref&^refDropped]++
		return true, nil
	}
	repeat, err := p.list.addKnown(uint32(ref), t, v)
	p.Repetitions[repeat]++
	return true, err
}

// find returns the index of the series with this hash, or -1. A site usually sends its series in the
// order of the push before, or continues with the first after the last. find builds the index only
// if this is not so.
func (p *KnownPush) find(h formHash) int {
	series := p.known.series
	switch {
	case len(series) == 0:
		return -1
	case series[0].is(h):
		return 0
	case len(p.index) == 0:
		p.index = p.index.build(series)
	}
	return p.index.find(series, h)
}

// knownIndex finds entries by their hash. It is a hash table with linear probing, at most half full,
// of indices into a list of entries plus 1. 0 is a free place.
type knownIndex []uint32

// build returns an index of series that reuses the memory of x. If series has several entries with
// one hash, the index has the first.
func (x knownIndex) build(series []knownEntry) knownIndex {
	size := 1 << bits.Len(uint(2*len(series)))
	x = slices.Grow(x[:0], size)[:size]
	clear(x)
	for i := range series {
		if at := x.place(series, series[i].form()); x[at] == 0 {
			x[at] = uint32(i + 1)
		}
	}
	return x
}

// find returns the index in series of the first entry with this hash, or -1.
func (x knownIndex) find(series []knownEntry, h formHash) int { return int(x[x.place(series, h)]) - 1 }

// place returns the place in x of the entry with this hash, or the free place for it.
func (x knownIndex) place(series []knownEntry, h formHash) int {
	at := int(h.hash) & (len(x) - 1)
	for x[at] != 0 && !series[x[at]-1].is(h) {
		at = (at + 1) & (len(x) - 1)
	}
	return at
}

// noteDecoded records what became of a sample that was decoded because its series was not known: the
// callback gave it a drop code, or added it to the list, which had samplesBefore samples before. A
// sample that repeats another one is neither, and its series stays unknown.
func (p *KnownPush) noteDecoded(h formHash, dropCode uint8, samplesBefore int) {
	ref := refSample | knownRef(samplesBefore)
	switch {
	case dropCode > 0:
		ref = refDropped | knownRef(dropCode)
	case len(p.list.Samples) != samplesBefore+1 || samplesBefore > int(refBits):
		return
	}
	p.misses++
	p.seen = append(p.seen, knownEntry{h.hash, h.check, ref})
}

// Learn makes the series of the body known that were not. It needs the IDs in p.list.SeriesIDs. The
// order of the known series becomes that of the body; then follow the others, as far as there are
// not more than limit altogether.
func (p *KnownPush) Learn(limit int) {
	if !p.CanLearn() {
		return
	}
	ids, all := p.list.SeriesIDs, len(p.seen)
	p.seen = slices.DeleteFunc(p.seen, func(s knownEntry) bool {
		i := int(s.ref & refBits)
		return s.ref&refSample != 0 && (i >= len(ids) || ids[i] == NoSeriesID)
	})
	if all-len(p.seen) == p.misses { // each series that was not known has samples without an ID, for example samples that are too old
		return
	}
	for i, s := range p.seen {
		if s.ref&refSample != 0 {
			p.seen[i].ref = knownRef(ids[s.ref&refBits])
		}
	}
	inBody := len(p.seen)
	p.seen = append(p.seen, p.known.series...)
	p.index = p.index.build(p.seen)
	series := make([]knownEntry, 0, min(limit, len(p.seen)))
	p.known.next = 0
	for i, s := range p.seen {
		if i == inBody {
			p.known.next = len(series)
		}
		if len(series) < limit && p.index.find(p.seen, s.form()) == i {
			series = append(series, s)
		}
	}
	p.known.series = slices.Clip(series)
}

// plainMetric is a Metric message in the form in which most encoders write a counter, a gauge or an
// untyped metric: its labels, then a value that has nothing but a number, then a timestamp or
// nothing.
type plainMetric struct {
	labels []byte // the LabelPair messages, with their tags and lengths
	t      int64  // ms since the epoch; meaningless if hasT is false
	hasT   bool
	v      float64
}

// split splits the Metric message b. valueTag is the tag of the field with the metric's value. It
// returns false if the message does not have the plain form; it may then be malformed.
func (m *plainMetric) split(b []byte, valueTag byte) bool {
	const labelTag, numberTag, timeTag = 1<<3 | 2, 1<<3 | 1, 6 << 3
	i := 0
	for i+1 < len(b) && b[i] == labelTag {
		n, size := int(b[i+1]), 1
		if n >= 0x80 {
			u, k := binary.Uvarint(b[i+1:])
			if k <= 0 || u > uint64(len(b)) {
				return false
			}
			n, size = int(u), k
		}
		i += 1 + size + n
	}
	const valueSize = 11 // tag, length of the message, tag of the number, number
	if len(b)-i < valueSize || b[i] != valueTag || b[i+1] != 9 || b[i+2] != numberTag {
		return false
	}
	m.labels, m.v = b[:i], math.Float64frombits(binary.LittleEndian.Uint64(b[i+3:]))
	b = b[i+valueSize:]
	if m.hasT = len(b) > 0; !m.hasT {
		return true
	}
	t, n := binary.Uvarint(b[1:])
	m.t = int64(t)
	return b[0] == timeTag && n > 0 && n == len(b)-1
}

// plainLine is a line of text exposition in the form in which most programs write it: a series, a
// blank, a value, and a blank and a timestamp or nothing.
type plainLine struct {
	series []byte // up to the last } or, if there is none, the metric name
	t      int64  // ms since the epoch; meaningless if hasT is false
	hasT   bool
	v      float64
}

// split splits line. It returns false if the line does not have the plain form; it may then be
// malformed. A } in a line that decodes without an error belongs to the series, because values and
// timestamps have none.
func (l *plainLine) split(line []byte) bool {
	end := bytes.LastIndexByte(line, '}') + 1
	if end == 0 {
		end = LegacyMetricPrefix(line)
	}
	if len(line) > 2*MaxLine || end == 0 || end == len(line) || line[end] != ' ' {
		return false
	}
	l.series = line[:end]
	value, timestamp, hasT := bytes.Cut(line[end+1:], []byte(" "))
	var err error
	if l.v, err = parseFloat(value); err != nil {
		return false
	}
	if l.hasT = hasT; hasT {
		l.t, err = parseTimestamp(timestamp, false)
	}
	return err == nil
}
