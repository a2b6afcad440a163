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

// NegotiateEscaping reads a scraper's Accept header: quoted names only for one
// that says escaping=allow-utf-8, else the scheme it names, else underscores.
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

// ContentType is what a response written under e states.
func (e Escaping) ContentType() string {
	if e.scheme == model.NoEscaping {
		return "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"
	}
	return "text/plain; version=0.0.4; charset=utf-8; escaping=" + e.scheme.String()
}

// Quotes reports whether names are shown as they are, quoted where necessary.
func (e Escaping) Quotes() bool { return e.scheme == model.NoEscaping }

// Name returns a metric's name as e shows it. A legacy name stays as it is under
// every scheme (dots alone would double its underscores), as in expfmt.
func (e Escaping) Name(name string) string {
	if legacyPrefix([]byte(name), 4) == len(name) {
		return name
	}
	return model.EscapeName(name, e.scheme)
}

// label returns a label's name as e shows it. model.EscapeName leaves colons,
// which only a metric's name may have: one fails the scrape of an old Prometheus.
func (e Escaping) label(name []byte) []byte {
	if legacyPrefix(name, 0) == len(name) {
		return name
	}
	return bytes.ReplaceAll([]byte(model.EscapeName(string(name), e.scheme)), []byte(":"), []byte("_"))
}

// Line renders a parsed series under e. It reports false where the escaped
// labels cannot be told apart or became reserved: Prometheus fails a whole
// scrape over one label that occurs twice.
func (e Escaping) Line(name []byte, labels []Label) ([]byte, bool) {
	r := RawSample{Name: []byte(e.Name(string(name)))}
	for _, l := range labels {
		r.Labels = append(r.Labels, Label{e.label(l.Name), l.Value})
	}
	var p SampleList
	err := p.Add(&r)
	return p.Arena, err == nil
}

// FamilySample is one sample to write: a rendered series with its newest value.
type FamilySample struct {
	Line   []byte
	T      int64 // ms since the epoch
	V      float64
	Quoted bool // has a name beyond the legacy charset
}

// Family is the lines of one name, over all sites.
type Family struct {
	Name  string
	Lines []FamilySample
}

// GroupByName turns a Push into families, sorted by name. Lines share the
// Push's memory.
func GroupByName(p *SampleList) []Family {
	var parser SeriesParser
	index := map[string]int{}
	var fams []Family
	for _, s := range p.Samples {
		name, labels, err := parser.ParseLine(p.Line(s))
		if err != nil {
			continue // Add renders only what parses
		}
		i, ok := index[string(name)]
		if !ok {
			i = len(fams)
			index[string(name)] = i
			fams = append(fams, Family{Name: string(name)})
		}
		fams[i].Lines = append(fams[i].Lines, FamilySample{p.Line(s), s.T, s.V, !IsLegacy(name, labels)})
	}
	slices.SortFunc(fams, func(a, b Family) int { return strings.Compare(a.Name, b.Name) })
	return fams
}

// WriteFamilies writes fams as text exposition: "# TYPE <name> untyped" once per
// name, as Prometheus's own /federate does, because types that differ between
// sites would fail the whole scrape; then the lines. Names are merged where
// escaping makes them equal, and a line that escaping makes equal to another is
// left out; hidden counts those. A write error ends it and is returned.
func WriteFamilies(w io.Writer, e Escaping, fams []Family) (written, hidden int, err error) {
	if !e.Quotes() {
		fams, hidden = escapeFamilies(e, fams)
	}
	const chunk = 64 << 10
	buf := make([]byte, 0, chunk+4<<10)
	for _, f := range fams {
		buf = append(buf, "# TYPE "...)
		if name := []byte(f.Name); legacyPrefix(name, 4) == len(name) {
			buf = append(buf, name...)
		} else {
			buf = appendQuoted(buf, name)
		}
		buf = append(buf, " untyped\n"...)
		for _, l := range f.Lines {
			buf = AppendSample(buf, l.Line, l.T, l.V)
			if len(buf) >= chunk {
				if _, err := w.Write(buf); err != nil {
					return written, hidden, err
				}
				buf = buf[:0]
			}
		}
		written += len(f.Lines)
	}
	_, err = w.Write(buf)
	return written, hidden, err
}

// AppendSample appends one line of text exposition; t is in ms, or NoTime.
func AppendSample(b, series []byte, t int64, v float64) []byte {
	b = append(append(b, series...), ' ')
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

// escapeFamilies replaces names beyond the legacy charset.
func escapeFamilies(e Escaping, fams []Family) ([]Family, int) {
	if !slices.ContainsFunc(fams, func(f Family) bool {
		return slices.ContainsFunc(f.Lines, func(l FamilySample) bool { return l.Quoted })
	}) {
		return fams, 0
	}
	var parser SeriesParser
	merged := map[string]*Family{}
	family := func(name string) *Family {
		m := merged[name]
		if m == nil {
			m = &Family{Name: name}
			merged[name] = m
		}
		return m
	}
	for _, f := range fams { // lines that need no escaping come first: they keep their place
		m := family(e.Name(f.Name))
		for _, l := range f.Lines {
			if !l.Quoted {
				m.Lines = append(m.Lines, l)
			}
		}
	}
	hidden := 0
	shown := map[string]map[string]string{} // by name: line → the series that it shows
	for _, f := range fams {
		name := e.Name(f.Name)
		m := family(name)
		for _, l := range f.Lines {
			if !l.Quoted {
				continue
			}
			if shown[name] == nil {
				shown[name] = make(map[string]string, len(m.Lines))
				for _, l := range m.Lines {
					shown[name][string(l.Line)] = string(l.Line)
				}
			}
			n, labels, err := parser.ParseLine(l.Line)
			ok := err == nil
			series := string(l.Line)
			if ok {
				l.Line, ok = e.Line(n, labels)
			}
			// A series has one line, so that its samples ascend.
			if first, has := shown[name][string(l.Line)]; !ok || has && first != series {
				hidden++
				continue
			}
			shown[name][string(l.Line)] = series
			m.Lines = append(m.Lines, l)
		}
	}
	out := make([]Family, 0, len(merged))
	for _, name := range slices.Sorted(maps.Keys(merged)) {
		if len(merged[name].Lines) > 0 {
			out = append(out, *merged[name])
		}
	}
	return out, hidden
}
