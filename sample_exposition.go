package main

// This file writes samples as text exposition. Every family is untyped, because types that differ
// between sites would make the whole scrape fail. Names outside the legacy charset, which is
// [a-zA-Z_:][a-zA-Z0-9_:]* for metrics, are quoted if the scraper asks for that in its Accept
// header. For all other scrapers they are escaped.

import (
	"bytes"
	"io"
	"maps"
	"math"
	"mime"
	"slices"
	"strconv"
	"strings"

	"github.com/prometheus/common/model"
)

// Escaping is the way in which names outside the legacy charset are written for a scraper. The
// scheme is one of Prometheus's: underscores, dots, values, or allow-utf-8, which quotes names
// instead of escaping them.
type Escaping struct{ scheme model.EscapingScheme }

// NegotiateEscaping returns the escaping that a scraper's Accept header asks for. Names are quoted
// only if the header contains escaping=allow-utf-8. If the header names no known scheme, the result
// is underscores.
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

// ContentType returns the Content-Type header of a response that is written with e.
func (e Escaping) ContentType() string {
	if e.scheme == model.NoEscaping {
		return "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"
	}
	return "text/plain; version=0.0.4; charset=utf-8; escaping=" + e.scheme.String()
}

// quotesNames reports whether e leaves names unescaped and quotes them where necessary.
func (e Escaping) quotesNames() bool { return e.scheme == model.NoEscaping }

// MetricName returns a metric's name escaped by e. A name of the legacy charset is never changed,
// as in expfmt, although the scheme "dots" would double its underscores.
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
// escaping made two labels' names equal, made a label's name reserved, or made the line too long.
// Such a line must not be served: Prometheus fails the whole scrape if a label occurs twice.
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
	T      int64  // ms since the epoch
	V      float64
	Quoted bool // the line has a name outside the legacy charset
}

// Family holds the samples of one metric name, across all sites.
type Family struct {
	Name    string
	Samples []FamilySample
}

// GroupByName returns the samples of l grouped into families, sorted by name. The result shares
// memory with l.
func GroupByName(l *SampleList) []Family {
	var parser SeriesParser
	index := map[string]int{}
	var fams []Family
	for _, s := range l.Samples {
		name, labels, err := parser.ParseLine(l.Line(s))
		if err != nil {
			continue // cannot happen: every line that Add renders can be parsed
		}
		i, ok := index[string(name)]
		if !ok {
			i = len(fams)
			index[string(name)] = i
			fams = append(fams, Family{Name: string(name)})
		}
		fams[i].Samples = append(fams[i].Samples, FamilySample{l.Line(s), s.T, s.V, !IsLegacy(name, labels)})
	}
	slices.SortFunc(fams, func(a, b Family) int { return strings.Compare(a.Name, b.Name) })
	return fams
}

// WriteFamilies writes fams to w as text exposition. For each family it writes the line
// "# TYPE <name> untyped", as Prometheus's own /federate does, and then the samples. If escaping
// makes the names of two families equal, the families are merged. If escaping makes a series' line
// invalid or equal to another series' line, the samples of the series are left out.
//
// writtenSamples and hiddenSamples count the samples that were written and left out. WriteFamilies
// stops at the first error of w and returns it.
func WriteFamilies(w io.Writer, e Escaping, fams []Family) (writtenSamples, hiddenSamples int, err error) {
	if !e.quotesNames() {
		fams, hiddenSamples = escapeFamilies(e, fams)
	}
	const chunk = 64 << 10
	buf := make([]byte, 0, chunk+4<<10)
	for _, f := range fams {
		buf = appendType(buf, []byte(f.Name))
		for _, l := range f.Samples {
			buf = AppendSample(buf, l.Line, l.T, l.V)
			if len(buf) >= chunk {
				if _, err := w.Write(buf); err != nil {
					return writtenSamples, hiddenSamples, err
				}
				buf = buf[:0]
			}
		}
		writtenSamples += len(f.Samples)
	}
	_, err = w.Write(buf)
	return writtenSamples, hiddenSamples, err
}

// appendType appends the TYPE line of an untyped family to b.
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
	b = append(append(b, line...), ' ')
	if i := int64(v); float64(i) == v && i > -1e15 && i < 1e15 && (i != 0 || !math.Signbit(v)) {
		b = strconv.AppendInt(b, i, 10) // faster than AppendFloat, and most values are whole numbers
	} else {
		b = strconv.AppendFloat(b, v, 'g', -1, 64)
	}
	if t != NoTime {
		b = strconv.AppendInt(append(b, ' '), t, 10)
	}
	return append(b, '\n')
}

// escapeFamilies returns fams with all names escaped by e, merged and sorted by name.
// hiddenSamples counts the samples that are left out because their escaped line cannot be served or
// is already used by another series.
func escapeFamilies(e Escaping, fams []Family) (out []Family, hiddenSamples int) {
	if !slices.ContainsFunc(fams, func(f Family) bool {
		return slices.ContainsFunc(f.Samples, func(l FamilySample) bool { return l.Quoted })
	}) {
		return fams, 0
	}
	merged := map[string]*nameEscapedFamily{}
	// Add the lines that need no escaping first, so that an escaped line never displaces them.
	for _, f := range fams {
		name := e.MetricName(f.Name)
		if merged[name] == nil {
			merged[name] = &nameEscapedFamily{Family: Family{Name: name}}
		}
		for _, l := range f.Samples {
			if !l.Quoted {
				merged[name].Samples = append(merged[name].Samples, l)
			}
		}
	}
	var parser SeriesParser
	for _, f := range fams {
		m := merged[e.MetricName(f.Name)]
		for _, l := range f.Samples {
			if l.Quoted && !m.addEscaped(e, &parser, l) {
				hiddenSamples++
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(merged)) {
		if len(merged[name].Samples) > 0 {
			out = append(out, merged[name].Family)
		}
	}
	return out, hiddenSamples
}

// nameEscapedFamily is a family with an escaped name. It collects the samples of all families
// that have this name after escaping.
type nameEscapedFamily struct {
	Family
	shownBy map[string]string // line as written → line of its series before escaping; nil until needed
}

// addEscaped adds a sample with its line escaped by e. It returns false and adds nothing if the
// escaped line cannot be served, or if another series already uses this line. Only one series may
// use a line, because the samples of a line must be in ascending order of time.
func (f *nameEscapedFamily) addEscaped(e Escaping, parser *SeriesParser, l FamilySample) bool {
	if f.shownBy == nil {
		f.shownBy = make(map[string]string, len(f.Samples))
		for _, l := range f.Samples {
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
	f.Samples = append(f.Samples, l)
	return true
}
