package main

// The sample model: one series is one rendered line (name, then sorted labels)
// whatever form it came in. Lines are validated and rendered once into a Push,
// parsed back where labels are asked for, and written as text exposition.
// Invariant: whatever Push.Add takes can be written so that no reader of the
// exposition format fails over it. This file must not know of sites, tokens,
// HTTP or disks, and decides no policy: which samples are wanted is sanitize's.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"mime"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/prometheus/common/model"
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

// ErrPushSize is the ErrTooLarge of a push as a whole, which a limit of the push raises.
var ErrPushSize = fmt.Errorf("%w", ErrTooLarge)

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

// Push is a list of samples, each with its rendered line: a name, then sorted
// labels. It is not safe for concurrent use; Reset keeps its memory for reuse.
type Push struct {
	Arena   []byte
	Samples []Sample
	// MaxSamples and MaxBytes bound what Add takes; 0 is no bound. They are
	// needed beside the limit on a body, because a small body can state a
	// histogram whose every bucket repeats long labels.
	MaxSamples, MaxBytes int
}

// Line returns the rendered name and labels of a sample of p.
func (p *Push) Line(s Sample) []byte { return p.Arena[s.Off : s.Off+s.Len] }

// Reset empties p and keeps its memory and limits.
func (p *Push) Reset() {
	p.Arena, p.Samples = p.Arena[:0], p.Samples[:0]
}

// Add validates r, sorts its labels and appends it. Names have to be valid
// UTF-8, label names must not be reserved ("__…") nor occur twice, and no byte
// may be NUL. NaNs are made equal: a stale marker (a NaN of a certain bit
// pattern) cannot be said in text and must not come in by protobuf.
func (p *Push) Add(r *RawSample) error {
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
		return fmt.Errorf("%w: more than %d samples", ErrPushSize, p.MaxSamples)
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
		return fmt.Errorf("%w: more than %d bytes of rendered series", ErrPushSize, p.MaxBytes)
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

// legacyByte says where a byte may stand in a name of the legacy charset:
// 1 a metric's or label's first byte, 2 a later one, 4 a metric's only (':').
var legacyByte = func() (t [256]byte) {
	for c := range t {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c == '_':
			t[c] = 1 | 2
		case c >= '0' && c <= '9':
			t[c] = 2
		case c == ':':
			t[c] = 4
		}
	}
	return t
}()

// legacyPrefix returns how many leading bytes of b form a legacy name; colon is
// 4 for a metric's name and 0 for a label's.
func legacyPrefix(b []byte, colon byte) int {
	if len(b) == 0 || legacyByte[b[0]]&(1|colon) == 0 {
		return 0
	}
	i := 1
	for i < len(b) && legacyByte[b[i]]&(2|colon) != 0 {
		i++
	}
	return i
}

// AppendSeries appends the line of a series whose labels are sorted.
func AppendSeries(b, name []byte, labels []Label) []byte {
	legacy := legacyPrefix(name, 4) == len(name)
	if legacy {
		b = append(b, name...)
		if len(labels) == 0 {
			return b
		}
		b = append(b, '{')
	} else {
		b = append(b, '{')
		b = appendQuoted(b, name)
	}
	for i, l := range labels {
		if i > 0 || !legacy {
			b = append(b, ',')
		}
		if legacyPrefix(l.Name, 0) == len(l.Name) {
			b = append(b, l.Name...)
		} else {
			b = appendQuoted(b, l.Name)
		}
		b = append(b, '=')
		b = appendQuoted(b, l.Value)
	}
	return append(b, '}')
}

func appendQuoted(b, s []byte) []byte {
	b = append(b, '"')
	from := 0
	for i, c := range s {
		var esc byte
		switch c {
		case '\\', '"':
			esc = c
		case '\n':
			esc = 'n'
		default:
			continue
		}
		b = append(append(b, s[from:i]...), '\\', esc)
		from = i + 1
	}
	return append(append(b, s[from:]...), '"')
}

// Excerpt is the beginning of a line as an error may show it: the series is the
// sender's own, but a hostile one must not fill a log.
func Excerpt(line []byte) string {
	if len(line) > 200 {
		line = append(bytes.Clone(line[:200]), "…"...)
	}
	return strconv.QuoteToGraphic(string(bytes.ToValidUTF8(line, []byte("\ufffd"))))
}

func skipBlank(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	return b
}

// Parser parses series. It keeps scratch memory between calls and is not safe
// for concurrent use. The zero value is ready.
type Parser struct {
	labels []Label
	unesc  []byte // unescaped text of the current line
	check  Push
}

// Series parses the name and labels that line begins with and returns what
// follows them. The results share memory with line, which stays as it is, and
// with p; they are valid until p's next use.
func (p *Parser) Series(line []byte) (name []byte, labels []Label, rest []byte, err error) {
	fail := func(format string, args ...any) ([]byte, []Label, []byte, error) {
		return nil, nil, nil, fmt.Errorf(format, args...)
	}
	if len(line) > 2*MaxLine { // room for blanks; Add judges what is left of it
		return fail("%w: a line of %d bytes", ErrTooLarge, len(line))
	}
	// Unescaped values of one line share this buffer; with room for the whole
	// line it never moves, so that earlier values stay valid.
	p.unesc = slices.Grow(p.unesc[:0], len(line))
	p.labels = slices.Grow(p.labels[:0], 32) // room for labels that are added later
	n := legacyPrefix(line, 4)
	name = line[:n]
	b := skipBlank(line[n:])
	if len(b) == 0 || b[0] != '{' {
		if n == 0 {
			return fail("no valid metric name")
		}
		if len(b) > 0 && len(b) == len(line)-n {
			return fail("unexpected %q in the metric name", b[0])
		}
		return name, nil, b, nil
	}
	b = skipBlank(b[1:])
	for {
		if len(b) == 0 {
			return fail("the labels do not end in }")
		}
		if b[0] == '}' {
			break
		}
		var label []byte
		quoted := b[0] == '"'
		if quoted {
			if label, b, err = p.quoted(b); err != nil {
				return fail("%w", err)
			}
		} else {
			n := legacyPrefix(b, 0)
			if n == 0 {
				return fail("unexpected %q where a label name should begin", b[0])
			}
			label, b = b[:n], b[n:]
		}
		b = skipBlank(b)
		if len(b) > 0 && b[0] == '=' {
			b = skipBlank(b[1:])
			if len(b) == 0 || b[0] != '"' {
				return fail("the value of label %.100q is not quoted", label)
			}
			var value []byte
			if value, b, err = p.quoted(b); err != nil {
				return fail("%w", err)
			}
			if len(p.labels) >= MaxLabels {
				return fail("%w: more than %d labels", ErrTooLarge, MaxLabels)
			}
			p.labels = append(p.labels, Label{label, value})
		} else if quoted && len(name) == 0 {
			if name = label; len(name) == 0 { // {"a.name",…} or {…,"a.name"}
				return fail("no metric name")
			}
		} else {
			return fail("label %.100q has no value", label)
		}
		b = skipBlank(b)
		if len(b) > 0 && b[0] == ',' {
			b = skipBlank(b[1:])
		} else if len(b) > 0 && b[0] != '}' {
			return fail("unexpected %q after label %.100q", b[0], label)
		}
	}
	if len(name) == 0 {
		return fail("no metric name")
	}
	return name, p.labels, b[1:], nil
}

// quoted parses the quoted string that b begins with. As in Prometheus's parser
// a backslash before any other byte stands for itself.
func (p *Parser) quoted(b []byte) (s, rest []byte, err error) {
	from := len(p.unesc)
	for i := 1; i < len(b); i++ {
		switch b[i] {
		case '"':
			if len(p.unesc) == from {
				return b[1:i], b[i+1:], nil
			}
			return p.unesc[from:], b[i+1:], nil
		case '\\':
			if len(p.unesc) == from {
				p.unesc = append(p.unesc, b[1:i]...)
			}
			i++
			if i == len(b) {
				continue
			}
			switch b[i] {
			case '\\', '"':
				p.unesc = append(p.unesc, b[i])
			case 'n':
				p.unesc = append(p.unesc, '\n')
			default:
				p.unesc = append(p.unesc, '\\', b[i])
			}
		default:
			if len(p.unesc) > from {
				p.unesc = append(p.unesc, b[i])
			}
		}
	}
	return nil, nil, errors.New("a quoted string does not end")
}

// Line parses a rendered line, wholly.
func (p *Parser) Line(line []byte) (name []byte, labels []Label, err error) {
	name, labels, rest, err := p.Series(line)
	if err == nil && len(rest) > 0 {
		err = errors.New("bytes after the series")
	}
	if err != nil {
		return nil, nil, fmt.Errorf("series %s: %w", Excerpt(line), err)
	}
	return name, labels, nil
}

// Check reports a line that Push.Add did not render, byte for byte: what
// recovery found on a damaged disk, and will serve as it is, is checked so.
func (p *Parser) Check(line []byte) (name []byte, labels []Label, err error) {
	if name, labels, err = p.Line(line); err != nil {
		return nil, nil, err
	}
	p.check.Reset()
	if err := p.check.Add(&RawSample{Name: name, Labels: labels}); err != nil {
		return nil, nil, err
	}
	if !bytes.Equal(p.check.Arena, line) {
		return nil, nil, fmt.Errorf("series %s is not in normal form", Excerpt(line))
	}
	return name, labels, nil
}

// CheckOf is Check for a line that has to be of a cluster.
func (p *Parser) CheckOf(line []byte, cluster string) error {
	_, labels, err := p.Check(line)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(labels, func(l Label) bool { return string(l.Name) == ClusterLabel && string(l.Value) == cluster }) {
		return fmt.Errorf("series %s is not of cluster %q", Excerpt(line), cluster)
	}
	return nil
}

// LegacyLine is Legacy for a rendered line.
func LegacyLine(line []byte) bool {
	// Only a name that is quoted puts a quote behind a brace or comma that is
	// outside of a value; most lines have neither sequence.
	if len(line) > 0 && line[0] != '{' && !bytes.Contains(line, []byte(`{"`)) && !bytes.Contains(line, []byte(`,"`)) {
		return true
	}
	var p Parser
	name, labels, err := p.Line(line)
	return err == nil && Legacy(name, labels)
}

// Legacy reports whether all names of a parsed series are of the charset that
// every Prometheus reads unquoted.
func Legacy(name []byte, labels []Label) bool {
	return legacyPrefix(name, 4) == len(name) &&
		!slices.ContainsFunc(labels, func(l Label) bool { return legacyPrefix(l.Name, 0) != len(l.Name) })
}

// LineName returns the metric name of a rendered line.
func LineName(line []byte) []byte {
	if len(line) > 0 && line[0] == '{' {
		var p Parser
		name, _, _ := p.Line(line)
		return name
	}
	return line[:legacyPrefix(line, 4)]
}

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
	var p Push
	err := p.Add(&r)
	return p.Arena, err == nil
}

// Line is one sample to write: a rendered series with its newest value.
type Line struct {
	Text []byte
	T    int64 // ms since the epoch
	V    float64
	UTF8 bool // has a name beyond the legacy charset
}

// Family is the lines of one name, over all sites.
type Family struct {
	Name  string
	Lines []Line
}

// GroupByName turns a Push into families, sorted by name. Lines share the
// Push's memory.
func GroupByName(p *Push) []Family {
	var parser Parser
	index := map[string]int{}
	var fams []Family
	for _, s := range p.Samples {
		name, labels, err := parser.Line(p.Line(s))
		if err != nil {
			continue // Add renders only what parses
		}
		i, ok := index[string(name)]
		if !ok {
			i = len(fams)
			index[string(name)] = i
			fams = append(fams, Family{Name: string(name)})
		}
		fams[i].Lines = append(fams[i].Lines, Line{p.Line(s), s.T, s.V, !Legacy(name, labels)})
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
			buf = AppendSample(buf, l.Text, l.T, l.V)
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
		return slices.ContainsFunc(f.Lines, func(l Line) bool { return l.UTF8 })
	}) {
		return fams, 0
	}
	var parser Parser
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
			if !l.UTF8 {
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
			if !l.UTF8 {
				continue
			}
			if shown[name] == nil {
				shown[name] = make(map[string]string, len(m.Lines))
				for _, l := range m.Lines {
					shown[name][string(l.Text)] = string(l.Text)
				}
			}
			n, labels, err := parser.Line(l.Text)
			ok := err == nil
			series := string(l.Text)
			if ok {
				l.Text, ok = e.Line(n, labels)
			}
			// A series has one line, so that its samples ascend.
			if first, has := shown[name][string(l.Text)]; !ok || has && first != series {
				hidden++
				continue
			}
			shown[name][string(l.Text)] = series
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
