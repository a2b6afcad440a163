package main

// This file writes samples as text exposition for consumers. Every family is untyped, as in
// Prometheus's own /federate, because the type of a family may differ between sites. Names outside
// the legacy charset, which is [a-zA-Z_:][a-zA-Z0-9_:]* for metrics, are quoted if the scraper asks
// for that in its Accept header. For all other scrapers these names are escaped.

import (
	"bytes"
	"io"
	"iter"
	"math"
	"mime"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unique"

	"github.com/prometheus/common/model"
)

// Escaping determines how names outside the legacy charset are written for a scraper. The scheme is
// one of Prometheus's schemes: underscores, dots or values, which escape names, or allow-utf-8,
// which quotes names.
type Escaping struct{ scheme model.EscapingScheme }

// NegotiateEscaping returns the first known escaping scheme that a scraper's Accept header names.
// Names are quoted only if that is escaping=allow-utf-8. If the header names no known scheme, the
// result is underscores.
func NegotiateEscaping(accept string) Escaping {
	for part := range strings.SplitSeq(accept, ",") {
		_, params, err := mime.ParseMediaType(part)
		if err != nil {
			continue
		}
		if scheme, err := model.ToEscapingScheme(params[model.EscapingKey]); err == nil {
			return Escaping{scheme}
		}
	}
	return Escaping{model.UnderscoreEscaping}
}

// ContentType returns the value of the Content-Type header for a response whose names are written
// with e.
func (e Escaping) ContentType() string {
	if e.scheme == model.NoEscaping {
		return "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"
	}
	return "text/plain; version=0.0.4; charset=utf-8; escaping=" + e.scheme.String()
}

// quotesNames reports whether e quotes names outside the legacy charset instead of escaping them.
func (e Escaping) quotesNames() bool { return e.scheme == model.NoEscaping }

// MetricName returns a metric's name escaped by e. It returns a name of the legacy charset
// unchanged, as Prometheus's package expfmt does, although the scheme "dots" as defined would
// double its underscores.
func (e Escaping) MetricName(name string) string {
	if isLegacyMetricName(name) {
		return name
	}
	return model.EscapeName(name, e.scheme)
}

// labelName returns a label's name escaped by e. It also replaces colons by underscores, because
// model.EscapeName keeps them. Only metric names may contain colons: a colon in a label name makes
// the whole scrape of an old Prometheus fail.
func (e Escaping) labelName(name []byte) []byte {
	if isLegacyLabelName(name) {
		return name
	}
	return bytes.ReplaceAll([]byte(model.EscapeName(string(name), e.scheme)), []byte(":"), []byte("_"))
}

// renderLine returns the line of a parsed series with its names escaped by e. ok is false if
// escaping made the names of two labels equal, made a label's name reserved, or made the line too
// long. Such a line must not be served: for example, Prometheus fails the whole scrape if a label
// occurs twice.
func (e Escaping) renderLine(name []byte, labels []Label) (line []byte, ok bool) {
	r := RawSample{Name: []byte(e.MetricName(string(name)))}
	for _, l := range labels {
		r.Labels = append(r.Labels, Label{e.labelName(l.Name), l.Value})
	}
	var l SampleList
	err := l.Add(&r)
	return l.Arena, err == nil
}

// FamilySample is one sample of a Family.
type FamilySample struct {
	Line   []byte // the rendered line of the sample's series
	T      int64  // ms since the epoch, or NoTime
	V      float64
	Quoted bool // whether the metric name or a label name is outside the legacy charset
}

// Family holds samples with one metric name. They may come from several sites.
type Family struct {
	Name    string
	Quoted  bool // false only if no sample is Quoted; see FamilyGrouper
	Samples iter.Seq[FamilySample]
}

// GroupByName returns the samples of l grouped into families, which are sorted by name. The result
// shares memory with l.
func GroupByName(l *SampleList) []Family {
	var g FamilyGrouper
	for _, s := range l.Samples {
		line := l.Line(s)
		g.Add(unique.Make(string(LineName(line))), s.Off, uint16(s.Len), !IsLegacyLine(line), s.T, s.V)
	}
	g.EndText(TextChunks(l.Arena), nil)
	return g.Families()
}

// WriteFamilies writes fams to w as text exposition. For each family it writes a TYPE line with the
// type untyped, as Prometheus's own /federate does, and then the samples. If escaping makes the
// names of two families equal, WriteFamilies merges the families. If escaping makes the line of a
// series invalid, or equal to the line of another series that is already written, WriteFamilies
// leaves out the samples of the escaped series.
//
// writtenSamples and hiddenSamples count the samples that were written and left out. WriteFamilies
// stops at the first error of w and returns it; writtenSamples is then only approximate.
func WriteFamilies(w io.Writer, e Escaping, fams []Family) (writtenSamples, hiddenSamples int, err error) {
	if !e.quotesNames() {
		fams, hiddenSamples = escapeFamilies(e, fams)
	}
	const chunk = 128 << 10 // bytes of a write, each of which costs three system calls
	buf := make([]byte, 0, chunk+4<<10)
	var times timeRenderer
	for _, f := range fams {
		buf = appendType(buf, []byte(f.Name))
		for l := range f.Samples {
			writtenSamples++
			buf = appendSample(buf, l.Line, times.render(l.T), l.V)
			if len(buf) >= chunk {
				// A goroutine that computes without a pause can leave nobody to poll the network for 10 to
				// 20 ms, because the runtime starts no other thread when the polling thread takes up this
				// goroutine (findRunnable in runtime/proc.go). Gosched starts one.
				runtime.Gosched()
				if _, err := w.Write(buf); err != nil {
					return writtenSamples, hiddenSamples, err
				}
				buf = buf[:0]
			}
		}
	}
	_, err = w.Write(buf)
	return writtenSamples, hiddenSamples, err
}

// appendType appends to b the "# TYPE" line of an untyped family with this name.
func appendType(b, name []byte) []byte {
	b = append(b, "# TYPE "...)
	if isLegacyMetricName(name) {
		b = append(b, name...)
	} else {
		b = appendQuoted(b, name)
	}
	return append(b, " untyped\n"...)
}

// AppendSample appends one sample to b as a line of text exposition. line is the rendered line of
// the sample's series. t is in ms since the epoch. If t is NoTime, the timestamp is omitted.
func AppendSample(b, line []byte, t int64, v float64) []byte {
	var times timeRenderer
	return appendSample(b, line, times.render(t), v)
}

// timeRenderer renders timestamps. It renders a time only once if it occurs several times in a row,
// because most samples of a scrape have the time of the sample before. Its zero value is ready for
// use.
type timeRenderer struct {
	t    int64 // ms
	text []byte
	buf  [24]byte // memory of text
}

// render returns the text of t, with a blank before it. It returns nil if t is NoTime. The text is
// valid until the next call.
func (r *timeRenderer) render(t int64) []byte {
	if t == NoTime {
		return nil
	}
	if t != r.t || r.text == nil {
		r.t, r.text = t, strconv.AppendInt(append(r.buf[:0], ' '), t, 10)
	}
	return r.text
}

// appendSample is AppendSample with a time that a timeRenderer has rendered.
func appendSample(b, line, timeText []byte, v float64) []byte {
	b = append(append(b, line...), ' ')
	if i := int64(v); float64(i) == v && i > -1e15 && i < 1e15 && (i != 0 || !math.Signbit(v)) {
		b = strconv.AppendInt(b, i, 10) // AppendInt is faster than AppendFloat, and most values are whole numbers
	} else {
		b = strconv.AppendFloat(b, v, 'g', -1, 64)
	}
	return append(append(b, timeText...), '\n')
}

// escapeFamilies returns fams with all names escaped by e. Families whose escaped names are equal
// are merged, and the result is sorted by name. hiddenSamples counts the samples that are left out
// because their escaped line cannot be served or is already used by another series. Only the samples
// of families that share an escaped name with a quoted sample are copied.
func escapeFamilies(e Escaping, fams []Family) (out []Family, hiddenSamples int) {
	merged := map[string]*nameEscapedFamily{}
	for _, f := range fams {
		if name := e.MetricName(f.Name); f.Quoted && merged[name] == nil {
			merged[name] = &nameEscapedFamily{}
		}
	}
	if len(merged) == 0 {
		return fams, 0
	}
	// First add the lines that need no escaping, so that an escaped line that equals one of them
	// does not take its place.
	for _, f := range fams {
		m := merged[e.MetricName(f.Name)]
		if m == nil {
			out = append(out, f)
			continue
		}
		for l := range f.Samples {
			if !l.Quoted {
				m.samples = append(m.samples, l)
			}
		}
	}
	var parser SeriesParser
	for _, f := range fams {
		if !f.Quoted {
			continue
		}
		m := merged[e.MetricName(f.Name)]
		for l := range f.Samples {
			if l.Quoted && !m.addEscaped(e, &parser, l) {
				hiddenSamples++
			}
		}
	}
	for name, m := range merged {
		if len(m.samples) > 0 {
			out = append(out, Family{Name: name, Samples: slices.Values(m.samples)})
		}
	}
	slices.SortFunc(out, func(a, b Family) int { return strings.Compare(a.Name, b.Name) })
	return out, hiddenSamples
}

// nameEscapedFamily is a family with an escaped name. It collects the samples of all families whose
// names are equal after escaping.
type nameEscapedFamily struct {
	samples []FamilySample
	shownBy map[string]string // line as written → line of the same series before escaping; nil until addEscaped needs it
}

// addEscaped adds the sample l to f, with its line escaped by e. It returns false and adds nothing
// if the escaped line cannot be served, or if another series already uses the escaped line. Two
// series must not share a line, because the samples with one line must be in ascending order of
// time.
func (f *nameEscapedFamily) addEscaped(e Escaping, parser *SeriesParser, l FamilySample) bool {
	if f.shownBy == nil {
		f.shownBy = make(map[string]string, len(f.samples))
		for _, l := range f.samples {
			f.shownBy[string(l.Line)] = string(l.Line)
		}
	}
	series := string(l.Line)
	name, labels, err := parser.ParseLine(l.Line)
	if err != nil {
		return false
	}
	line, ok := e.renderLine(name, labels)
	if !ok {
		return false
	}
	if first, taken := f.shownBy[string(line)]; taken && first != series {
		return false
	}
	f.shownBy[string(line)] = series
	l.Line = line
	f.samples = append(f.samples, l)
	return true
}
