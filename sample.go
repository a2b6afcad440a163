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
	// ClusterLabel is the label with the authenticated cluster ID, which every held line has.
	ClusterLabel = "_id"
)

// ErrTooLarge is wrapped by errors about content that is well-formed but larger
// than a limit.
var ErrTooLarge = errors.New("too large")

// ErrListTooLarge is the ErrTooLarge of a list as a whole: its MaxSamples or MaxBytes.
var ErrListTooLarge = fmt.Errorf("%w", ErrTooLarge)

// ErrNULValue is wrapped by Add's error about a NUL byte in a label's value, when no
// label has another fault: Prometheus accepts such a series.
var ErrNULValue = errors.New("has a NUL byte")

var errNoMetricName = errors.New("no metric name")

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

// Sample is one sample of a SampleList: its line is Arena[Off : Off+Len].
type Sample struct {
	Off, Len uint32
	T        int64 // ms since the epoch
	V        float64
}

// SampleList is a list of samples, each with its rendered line: a name, then sorted
// labels. It is not safe for concurrent use; Reset keeps its memory for reuse.
type SampleList struct {
	Arena   []byte // the lines
	Samples []Sample
	// MaxSamples and MaxBytes bound the samples and the Arena; 0 is no bound. They are
	// needed beside the limit on a body, because a small body can state a
	// histogram whose every bucket repeats long labels.
	MaxSamples, MaxBytes int
}

// Line returns the rendered name and labels of a sample of l.
func (l *SampleList) Line(s Sample) []byte { return l.Arena[s.Off : s.Off+s.Len] }

// Reset empties l and keeps its memory and limits.
func (l *SampleList) Reset() {
	l.Arena, l.Samples = l.Arena[:0], l.Samples[:0]
}

// Add sorts the labels of r, validates its series and appends the sample. Names have to be
// valid UTF-8, label names must not be reserved ("__…") nor occur twice, and no byte may be
// NUL. All NaNs become one: a stale marker (a NaN of a certain bit pattern) cannot be said in
// text and must not come in by protobuf. After an error l is unchanged.
func (l *SampleList) Add(r *RawSample) error {
	if err := checkMetricName(r.Name); err != nil {
		return err
	}
	if len(r.Labels) > MaxLabels {
		return fmt.Errorf("%w: %d labels; a series has at most %d", ErrTooLarge, len(r.Labels), MaxLabels)
	}
	slices.SortFunc(r.Labels, func(a, b Label) int { return bytes.Compare(a.Name, b.Name) })
	if err := checkSortedLabels(r.Labels); err != nil {
		return err
	}
	if l.MaxSamples > 0 && len(l.Samples) >= l.MaxSamples {
		return fmt.Errorf("%w: more than %d samples", ErrListTooLarge, l.MaxSamples)
	}
	off := len(l.Arena)
	if err := l.addLine(r.Name, r.Labels); err != nil {
		return err
	}
	v := r.V
	if v != v {
		v = math.NaN()
	}
	l.Samples = append(l.Samples, Sample{Off: uint32(off), Len: uint32(len(l.Arena) - off), T: r.T, V: v})
	return nil
}

// addLine appends the rendered series to the Arena, unless it or the Arena would be too
// long.
func (l *SampleList) addLine(name []byte, labels []Label) error {
	size := len(name)
	for _, label := range labels {
		size += len(label.Name) + len(label.Value)
	}
	if size > MaxLine { // rendered it is longer still; the Arena must not grow for it
		return lineTooLongError(size)
	}
	off := len(l.Arena)
	l.Arena = appendLine(l.Arena, name, labels)
	if size = len(l.Arena) - off; size > MaxLine {
		l.Arena = l.Arena[:off]
		return lineTooLongError(size)
	}
	if l.MaxBytes > 0 && len(l.Arena) > l.MaxBytes || int64(len(l.Arena)) > math.MaxUint32 {
		l.Arena = l.Arena[:off]
		return fmt.Errorf("%w: more than %d bytes of rendered series", ErrListTooLarge, l.MaxBytes)
	}
	return nil
}

func lineTooLongError(size int) error {
	return fmt.Errorf("%w: a series of %d bytes; at most %d", ErrTooLarge, size, MaxLine)
}

func checkMetricName(name []byte) error {
	if len(name) == 0 {
		return errNoMetricName
	}
	return checkName("metric name", name)
}

// checkSortedLabels reports the first fault of sorted labels. A NUL byte in a value is reported
// only if there is no other fault, see ErrNULValue.
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
