package main

// Samples are written as text exposition. Families are untyped, because types that differ
// between sites would fail a whole scrape. Names beyond the legacy charset are quoted for a
// scraper that asks for them, and escaped for all others.

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

// Escaping is how names beyond the legacy charset are shown to a scraper.
type Escaping struct{ scheme model.EscapingScheme }

// NegotiateEscaping returns the escaping that a scraper's Accept header asks for: names are
// quoted only if it says escaping=allow-utf-8. Without a known scheme it is underscores.
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

// ContentType returns the content type of a response that is written under e.
func (e Escaping) ContentType() string {
	if e.scheme == model.NoEscaping {
		return "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"
	}
	return "text/plain; version=0.0.4; charset=utf-8; escaping=" + e.scheme.String()
}

// quotesNames reports whether names are shown as they are, quoted where necessary.
func (e Escaping) quotesNames() bool { return e.scheme == model.NoEscaping }

// MetricName returns a metric's name as e shows it. A legacy name stays as it is under
// every scheme (dots alone would double its underscores), as in expfmt.
func (e Escaping) MetricName(name string) string {
	if isLegacyMetricName(name) {
		return name
	}
	return model.EscapeName(name, e.scheme)
}

// labelName returns a label's name as e shows it. model.EscapeName leaves colons,
// which only a metric's name may have: one fails the scrape of an old Prometheus.
func (e Escaping) labelName(name []byte) []byte {
	if isLegacyLabelName(name) {
		return name
	}
	return bytes.ReplaceAll([]byte(model.EscapeName(string(name), e.scheme)), []byte(":"), []byte("_"))
}

// renderLine renders a parsed series under e. It reports false if escaped labels have one
// name or became reserved: Prometheus fails a whole scrape over one label that
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
	Line   []byte // of its series
	T      int64  // ms since the epoch
	V      float64
	Quoted bool // has a name beyond the legacy charset
}

// Family is the samples of one metric name, over all sites.
type Family struct {
	Name    string
	Samples []FamilySample
}

// GroupByName returns the samples of l as families, sorted by name. They share l's memory.
func GroupByName(l *SampleList) []Family {
	var parser SeriesParser
	index := map[string]int{}
	var fams []Family
	for _, s := range l.Samples {
		name, labels, err := parser.ParseLine(l.Line(s))
		if err != nil {
			continue // Add renders only what parses
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

// WriteFamilies writes fams as text exposition: "# TYPE <name> untyped" once per
// name, as Prometheus's own /federate does, because types that differ between
// sites would fail the whole scrape; then the samples. Families are merged where
// escaping makes their names equal, and a sample whose line escaping makes equal
// to another series' is left out. It returns the numbers of samples written and left
// out, and the error of w, which ends it.
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

func appendType(b, name []byte) []byte {
	b = append(b, "# TYPE "...)
	if isLegacyMetricName(name) {
		b = append(b, name...)
	} else {
		b = appendQuoted(b, name)
	}
	return append(b, " untyped\n"...)
}

// AppendSample appends one sample of text exposition; line is of its series, and t is in ms, or
// NoTime.
func AppendSample(b, line []byte, t int64, v float64) []byte {
	b = append(append(b, line...), ' ')
	if i := int64(v); float64(i) == v && i > -1e15 && i < 1e15 && (i != 0 || !math.Signbit(v)) {
		b = strconv.AppendInt(b, i, 10) // most samples are whole numbers
	} else {
		b = strconv.AppendFloat(b, v, 'g', -1, 64)
	}
	if t != NoTime {
		b = strconv.AppendInt(append(b, ' '), t, 10)
	}
	return append(b, '\n')
}

// escapeFamilies returns fams with the names that e shows, and how many samples are left out
// because e shows their series as another's.
func escapeFamilies(e Escaping, fams []Family) (out []Family, hiddenSamples int) {
	if !slices.ContainsFunc(fams, func(f Family) bool {
		return slices.ContainsFunc(f.Samples, func(l FamilySample) bool { return l.Quoted })
	}) {
		return fams, 0
	}
	merged := map[string]*nameEscapedFamily{}
	// Lines that need no escaping come first, so that no escaped line takes the place of one.
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

// nameEscapedFamily is a family under the name that an Escaping shows.
type nameEscapedFamily struct {
	Family
	shownBy map[string]string // line → the series that it shows; nil until a line is escaped
}

// addEscaped adds a sample with the line that e shows. It reports false if there is no such
// line, or if it shows another series already: a series has one line, so that its samples
// ascend.
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
