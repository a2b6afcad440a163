package main

// This file holds the sample model. A series is kept as one rendered line: its metric name and its
// sorted labels. The line does not depend on the format in which the series was received.
// SampleList.Add rejects a series if a reader of the exposition format could not read its line. The
// sample family must not know of sites, tokens, HTTP or disks. It does not select samples: the
// sanitize family does.

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"unicode/utf8"
)

const (
	// MaxLine is the largest size of a rendered line in bytes. With this limit the length of a line
	// fits in 16 bits.
	MaxLine = 64<<10 - 1
	// MaxLabels is the largest number of labels of one series. The limit is low because labels are
	// searched one by one.
	MaxLabels = 128
	// NoTime is the time to pass to AppendSample for a sample without a timestamp.
	NoTime = math.MinInt64
	// ClusterLabel is the name of the label that holds a site's authenticated cluster ID. Every
	// line that a server holds has this label.
	ClusterLabel = "_id"
)

// ErrTooLarge is wrapped by errors about samples, bodies and selectors that exceed a limit.
var ErrTooLarge = errors.New("too large")

// ErrListTooLarge is wrapped by the error of SampleList.Add if the list is full: the sample would
// exceed the list's MaxSamples or MaxBytes, or 4 GiB of lines. It wraps ErrTooLarge.
var ErrListTooLarge = fmt.Errorf("%w", ErrTooLarge)

// ErrNULValue is wrapped by the error of SampleList.Add if a label value has a NUL byte and the
// metric name and the labels are otherwise valid. This case has its own error because Prometheus
// accepts such a series, so that callers may treat it in another way than malformed labels.
var ErrNULValue = errors.New("has a NUL byte")

var errNoMetricName = errors.New("no metric name")

// Label is one label of a series: its name and its unescaped value.
type Label struct{ Name, Value []byte }

// RawSample is one sample as a decoder found it in a body. A decoder passes it to a callback. Its
// slices are valid only until the callback returns. The callback may change, add and remove Labels.
type RawSample struct {
	Name   []byte
	Labels []Label
	T      int64 // ms since the epoch; meaningless if HasT is false
	HasT   bool
	V      float64
	// DropCode is set by the callback if it drops the sample, and would drop every sample with this
	// name and these labels: to a number of its choice from 1 to MaxDropCode.
	DropCode uint8
}

// Sample is one sample of a SampleList. The rendered line of its series is Arena[Off : Off+Len] of
// that list. If Len is 0, the series is known and has no line; see KnownID.
type Sample struct {
	Off, Len uint32
	T        int64 // ms since the epoch
	V        float64
}

// NoSeriesID is not the ID of any series.
const NoSeriesID = math.MaxUint32

// KnownID returns the ID of the series in the store, if s is a sample of a known series.
func (s Sample) KnownID() (id uint32, ok bool) { return s.Off, s.Len == 0 }

// SampleList is a list of samples with their rendered lines. It is not safe for concurrent use.
// Reset keeps its memory for reuse.
type SampleList struct {
	Arena   []byte // the rendered lines, one after another
	Samples []Sample
	// MaxSamples limits the number of samples. MaxBytes limits the bytes of Arena. 0 means no
	// limit. The limit on a body's size does not suffice, because a small body can contain a
	// histogram with long labels, which are repeated in the line of every bucket.
	MaxSamples, MaxBytes int

	// The server and the store use the following three fields. The server sets Generation, the
	// generation of the series table that has the IDs of the known series, and WantSeriesIDs. If
	// WantSeriesIDs is true and the store returns no error, the store sets SeriesIDs to the ID of
	// each sample's series, or NoSeriesID if the series has none.
	Generation    uint64
	WantSeriesIDs bool
	SeriesIDs     []uint32

	KnownSamples int      // samples of known series
	lastKnown    []uint32 // by ID: index in Samples, plus 1, of the last sample of a known series; 0 = none

	// index finds the samples that AddUnlessRepeated added, by the hash of their line and time. If
	// samples have equal hashes, the next free number above the hash is the key of a later one.
	index map[uint64]uint32
	seed  maphash.Seed // secret from senders, who could otherwise make hashes collide; set together with index
}

// Line returns the rendered line of s, which must be a sample of l. It returns nil if s is a sample
// of a known series: Off is then no offset.
func (l *SampleList) Line(s Sample) []byte {
	if s.Len == 0 {
		return nil
	}
	return l.Arena[s.Off : s.Off+s.Len]
}

// Reset removes all samples from l. It keeps the memory and the limits.
func (l *SampleList) Reset() {
	l.Arena, l.Samples = l.Arena[:0], l.Samples[:0]
	l.Generation, l.KnownSamples, l.WantSeriesIDs, l.SeriesIDs, l.lastKnown = 0, 0, false, l.SeriesIDs[:0], l.lastKnown[:0]
	if len(l.index) > 0 {
		clear(l.index)
	}
}

// MemorySize returns the bytes of memory that the samples of l fill, about.
func (l *SampleList) MemorySize() int {
	// sampleBytes is the size of one Sample with its element of SeriesIDs. indexBytes is the size of
	// one entry of index, with the part of the map that is free.
	const sampleBytes, indexBytes, lastBytes = 28, 24, 4
	return len(l.Arena) + len(l.Samples)*sampleBytes + len(l.index)*indexBytes + len(l.lastKnown)*lastBytes
}

// Add sorts the labels of r, validates the series and appends the sample to l. Names and label
// values must be valid UTF-8 without NUL bytes. Label names must not be reserved ("__…") and must
// not occur twice. The series must not exceed MaxLabels or MaxLine, and l must not be full. After
// an error, l is unchanged.
//
// Add stores every NaN with the same bit pattern, so that no sample is a stale marker. A stale
// marker is a NaN with a certain bit pattern. Text exposition cannot express it, so protobuf must
// not introduce it either.
func (l *SampleList) Add(r *RawSample) error {
	s, err := l.appendLineOf(r)
	if err != nil {
		return err
	}
	return l.appendIfRoom(s)
}

// Repetition says how a sample repeats an earlier sample of a SampleList.
type Repetition uint8

const (
	RepeatsNothing Repetition = iota // no earlier sample has this series and time
	RepeatsSample                    // an earlier sample has this series, time and value
	RepeatsTime                      // an earlier sample has this series and time, but another value
)

// AddUnlessRepeated adds a sample as Add does, unless an earlier sample has the same series and
// time. Then l is unchanged, whether l is full or not. Each sample of l that has a line must have
// been added by AddUnlessRepeated. Samples of known series are not compared: the store finds out
// whether a known series also has a line.
func (l *SampleList) AddUnlessRepeated(r *RawSample) (Repetition, error) {
	s, err := l.appendLineOf(r)
	if err != nil {
		return RepeatsNothing, err
	}
	if l.index == nil {
		l.index, l.seed = map[uint64]uint32{}, maphash.MakeSeed()
	}
	key := maphash.Comparable(l.seed, s.T) ^ maphash.Bytes(l.seed, l.Line(s))
	for ; ; key++ {
		i, used := l.index[key]
		if !used {
			break
		}
		if first := l.Samples[i]; first.T == s.T && bytes.Equal(l.Line(first), l.Line(s)) {
			l.Arena = l.Arena[:s.Off]
			if math.Float64bits(first.V) == math.Float64bits(s.V) {
				return RepeatsSample, nil
			}
			return RepeatsTime, nil
		}
	}
	if err := l.appendIfRoom(s); err != nil {
		return RepeatsNothing, err
	}
	l.index[key] = uint32(len(l.Samples) - 1)
	return RepeatsNothing, nil
}

// addKnown adds a sample of a known series as AddUnlessRepeated does. The error is ErrDecodeAgain if
// l is full, or if the sample is earlier than the last sample of its series: only a search of all
// samples could tell whether it repeats one.
func (l *SampleList) addKnown(id uint32, t int64, v float64) (Repetition, error) {
	if v != v {
		v = math.NaN()
	}
	if int(id) >= len(l.lastKnown) {
		l.growLastKnown(int(id) + 1)
	}
	if i := l.lastKnown[id]; i > 0 {
		switch last := &l.Samples[i-1]; {
		case t < last.T:
			return RepeatsNothing, ErrDecodeAgain
		case t == last.T && math.Float64bits(v) == math.Float64bits(last.V):
			return RepeatsSample, nil
		case t == last.T:
			return RepeatsTime, nil
		}
	}
	if l.MaxSamples > 0 && len(l.Samples) >= l.MaxSamples {
		return RepeatsNothing, ErrDecodeAgain
	}
	l.Samples = append(l.Samples, Sample{Off: id, T: t, V: v})
	l.lastKnown[id] = uint32(len(l.Samples))
	l.KnownSamples++
	return RepeatsNothing, nil
}

// growLastKnown gives l.lastKnown at least size elements, with room for more, because the IDs of a
// push often ascend one by one.
func (l *SampleList) growLastKnown(size int) {
	n := len(l.lastKnown)
	size = max(size, 2*n, 256)
	l.lastKnown = slices.Grow(l.lastKnown, size-n)[:size]
	clear(l.lastKnown[n:])
}

// HasKnown reports whether l has a sample of the known series with this ID.
func (l *SampleList) HasKnown(id uint32) bool {
	return int(id) < len(l.lastKnown) && l.lastKnown[id] > 0
}

// appendLineOf validates the series of r and appends its line to l.Arena. It returns the sample,
// which is not in l.Samples yet. After an error, l is unchanged.
func (l *SampleList) appendLineOf(r *RawSample) (Sample, error) {
	if err := checkMetricName(r.Name); err != nil {
		return Sample{}, err
	}
	if len(r.Labels) > MaxLabels {
		return Sample{}, fmt.Errorf("%w: the series has %d labels, limit %d", ErrTooLarge, len(r.Labels), MaxLabels)
	}
	slices.SortFunc(r.Labels, func(a, b Label) int { return bytes.Compare(a.Name, b.Name) })
	if err := checkSortedLabels(r.Labels); err != nil {
		return Sample{}, err
	}
	size := len(r.Name)
	for _, label := range r.Labels {
		size += len(label.Name) + len(label.Value)
	}
	// The line is at least as long as its names and values. Check their size before rendering, so
	// that a line that is too long does not make the Arena grow.
	if size > MaxLine {
		return Sample{}, lineTooLongError(size)
	}
	off := len(l.Arena)
	l.Arena = appendLine(l.Arena, r.Name, r.Labels)
	if size = len(l.Arena) - off; size > MaxLine {
		l.Arena = l.Arena[:off]
		return Sample{}, lineTooLongError(size)
	}
	v := r.V
	if v != v {
		v = math.NaN()
	}
	return Sample{Off: uint32(off), Len: uint32(size), T: r.T, V: v}, nil
}

// appendIfRoom appends s, whose line must be the last in l.Arena, to l.Samples. If l is full, it
// removes the line and returns an error that wraps ErrListTooLarge.
func (l *SampleList) appendIfRoom(s Sample) (err error) {
	switch {
	case l.MaxSamples > 0 && len(l.Samples) >= l.MaxSamples:
		err = fmt.Errorf("%w: more than %d samples", ErrListTooLarge, l.MaxSamples)
	case l.MaxBytes > 0 && len(l.Arena) > l.MaxBytes || int64(len(l.Arena)) > math.MaxUint32:
		err = fmt.Errorf("%w: more than %d bytes of rendered series", ErrListTooLarge, l.MaxBytes)
	default:
		l.Samples = append(l.Samples, s)
		return nil
	}
	l.Arena = l.Arena[:s.Off]
	return err
}

func lineTooLongError(size int) error {
	return fmt.Errorf("%w: the series has %d bytes, limit %d", ErrTooLarge, size, MaxLine)
}

func checkMetricName(name []byte) error {
	if len(name) == 0 {
		return errNoMetricName
	}
	return checkName("metric name", name)
}

// checkSortedLabels returns an error for the first invalid label, or nil. The labels must be sorted
// by name. A NUL byte in a value is reported only if the labels have no other fault; see
// ErrNULValue.
func checkSortedLabels(labels []Label) error {
	var nul error
	for i, l := range labels {
		switch {
		case len(l.Name) == 0:
			return errors.New("empty label name")
		case i > 0 && bytes.Equal(l.Name, labels[i-1].Name):
			return fmt.Errorf("label %.100q occurs twice", l.Name)
		case bytes.HasPrefix(l.Name, []byte("__")):
			return fmt.Errorf("label name %.100q is reserved", l.Name)
		}
		if err := checkName("label name", l.Name); err != nil {
			return err
		}
		if err := checkUTF8("label value", l.Value); err != nil {
			return err
		}
		if bytes.IndexByte(l.Value, 0) >= 0 {
			nul = fmt.Errorf("label value %.100q %w", l.Value, ErrNULValue)
		}
	}
	return nul
}

func checkName(what string, name []byte) error {
	if err := checkUTF8(what, name); err != nil {
		return err
	}
	if bytes.IndexByte(name, 0) >= 0 {
		return fmt.Errorf("%s %.100q has a NUL byte", what, name)
	}
	return nil
}

func checkUTF8(what string, text []byte) error {
	if !utf8.Valid(text) {
		return fmt.Errorf("%s %.100q is not UTF-8", what, text)
	}
	return nil
}
