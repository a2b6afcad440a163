package main

// The sample model: one series is one rendered line, which is its name and its sorted labels,
// whatever form it came in. Every list of samples can be written so that no reader of the
// exposition format fails. This family must not know of sites, tokens, HTTP or disks, and it
// does not choose samples: that is the task of sanitize.

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"unicode/utf8"
)

const (
	// MaxLine bounds a rendered series in bytes; a series' length fits 16 bits.
	MaxLine = 64<<10 - 1
	// MaxLabels bounds the labels of one series, which are searched one by one.
	MaxLabels = 128
	// NoTime as a sample's time has it written without one.
	NoTime = math.MinInt64
	// ClusterLabel carries the authenticated cluster ID on every line held.
	ClusterLabel = "_id"
)

// ErrTooLarge is wrapped by errors about content that is well-formed but larger
// than a limit.
var ErrTooLarge = errors.New("too large")

// ErrListSize is the ErrTooLarge of a push as a whole, which a limit of the push raises.
var ErrListSize = fmt.Errorf("%w", ErrTooLarge)

// ErrNULValue is wrapped by Add's error about a NUL byte in a label's value, when no
// label has another fault: Prometheus takes such a series.
var ErrNULValue = errors.New("has a NUL byte")

// Label is a name and its unescaped value.
type Label struct{ Name, Value []byte }

// RawSample is one sample as a decoder found it. Its slices are valid only
// until the decoder goes on. Labels may be changed, also in number.
type RawSample struct {
	Name   []byte
	Labels []Label
	T      int64 // ms since the epoch; meaningless unless HasT
	HasT   bool
	V      float64
}

// Sample is one sample of a Push: its line is Arena[Off : Off+Len].
type Sample struct {
	Off, Len uint32
	T        int64 // ms since the epoch
	V        float64
}

// SampleList is a list of samples, each with its rendered line: a name, then sorted
// labels. It is not safe for concurrent use; Reset keeps its memory for reuse.
type SampleList struct {
	Arena   []byte
	Samples []Sample
	// MaxSamples and MaxBytes bound what Add takes; 0 is no bound. They are
	// needed beside the limit on a body, because a small body can state a
	// histogram whose every bucket repeats long labels.
	MaxSamples, MaxBytes int
}

// Line returns the rendered name and labels of a sample of p.
func (l *SampleList) Line(s Sample) []byte { return l.Arena[s.Off : s.Off+s.Len] }

// Reset empties p and keeps its memory and limits.
func (l *SampleList) Reset() {
	l.Arena, l.Samples = l.Arena[:0], l.Samples[:0]
}

// Add validates r, sorts its labels and appends it. Names have to be valid
// UTF-8, label names must not be reserved ("__…") nor occur twice, and no byte
// may be NUL. NaNs are made equal: a stale marker (a NaN of a certain bit
// pattern) cannot be said in text and must not come in by protobuf.
func (p *SampleList) Add(r *RawSample) error {
	if err := checkName("metric name", r.Name); err != nil {
		return err
	}
	if len(r.Name) == 0 {
		return errors.New("no metric name")
	}
	if len(r.Labels) > MaxLabels {
		return fmt.Errorf("%w: %d labels; a series has at most %d", ErrTooLarge, len(r.Labels), MaxLabels)
	}
	slices.SortFunc(r.Labels, func(a, b Label) int { return bytes.Compare(a.Name, b.Name) })
	size := len(r.Name)
	var nul error
	for i, l := range r.Labels {
		size += len(l.Name) + len(l.Value)
		switch {
		case len(l.Name) == 0:
			return errors.New("empty label name")
		case i > 0 && bytes.Equal(l.Name, r.Labels[i-1].Name):
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
	if nul != nil {
		return nul
	}
	if p.MaxSamples > 0 && len(p.Samples) >= p.MaxSamples {
		return fmt.Errorf("%w: more than %d samples", ErrListSize, p.MaxSamples)
	}
	tooLong := func(n int) error {
		return fmt.Errorf("%w: a series of %d bytes; at most %d", ErrTooLarge, n, MaxLine)
	}
	if size > MaxLine { // rendered it is longer still; do not let it grow the arena first
		return tooLong(size)
	}
	off := len(p.Arena)
	p.Arena = AppendSeries(p.Arena, r.Name, r.Labels)
	n := len(p.Arena) - off
	if n > MaxLine || p.MaxBytes > 0 && len(p.Arena) > p.MaxBytes || int64(len(p.Arena)) > math.MaxUint32 {
		p.Arena = p.Arena[:off]
		if n > MaxLine {
			return tooLong(n)
		}
		return fmt.Errorf("%w: more than %d bytes of rendered series", ErrListSize, p.MaxBytes)
	}
	v := r.V
	if v != v {
		v = math.NaN()
	}
	p.Samples = append(p.Samples, Sample{Off: uint32(off), Len: uint32(n), T: r.T, V: v})
	return nil
}

func checkUTF8(what string, b []byte) error {
	if !utf8.Valid(b) {
		return fmt.Errorf("%s %.100q is not UTF-8", what, b)
	}
	return nil
}

func checkName(what string, b []byte) error {
	if err := checkUTF8(what, b); err != nil {
		return err
	}
	if bytes.IndexByte(b, 0) >= 0 {
		return fmt.Errorf("%s %.100q has a NUL byte", what, b)
	}
	return nil
}
