package main

// Every sample that SampleList.Add accepts is written so that expfmt's parser, which shares no
// code with this program, reads back the same, under every escaping. expoCheck is that
// property; the fuzz targets of sample_decode_test.go use it too.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// expoRaw makes a sample of alternating label names and values.
func expoRaw(name string, t int64, v float64, pairs ...string) *RawSample {
	r := &RawSample{Name: []byte(name), T: t, HasT: true, V: v}
	for i := 0; i < len(pairs); i += 2 {
		r.Labels = append(r.Labels, Label{[]byte(pairs[i]), []byte(pairs[i+1])})
	}
	return r
}

func expoPush(t testing.TB, samples ...*RawSample) *SampleList {
	t.Helper()
	p := &SampleList{}
	for _, r := range samples {
		if err := p.Add(r); err != nil {
			t.Fatalf("adding %s: %v", r.Name, err)
		}
	}
	return p
}

func TestPushAdd(t *testing.T) {
	many := func(n int) (pairs []string) {
		for i := range n {
			pairs = append(pairs, fmt.Sprintf("l%03d", n-i), "v")
		}
		return pairs
	}
	long := strings.Repeat("x", MaxLine-len(`a{b=""}`))
	for _, c := range []struct {
		name  string
		pairs []string
		want  string // the line, or what the error says after "error: "
	}{
		{"up", nil, `up`},
		{"a:b", []string{"c", "d"}, `a:b{c="d"}`},
		{"up", []string{"b", "2", "a", "1", "B", "3", "_", ""}, `up{B="3",_="",a="1",b="2"}`},
		{"a.b", nil, `{"a.b"}`},
		{"a.b", []string{"x", "y"}, `{"a.b",x="y"}`},
		{"9", []string{"9", "y", "a:b", "z"}, `{"9","9"="y","a:b"="z"}`},
		{"a", []string{"x", "\"\\\n\r\t{},=#"}, "a{x=\"\\\"\\\\\\n\r\t{},=#\"}"},
		{"\"\\\n", []string{"\"\\\n", "y"}, `{"\"\\\n","\"\\\n"="y"}`},
		{"é", []string{"世", "界"}, `{"é","世"="界"}`},
		{"", nil, "error: no metric name"},
		{"a", []string{"", "x"}, "error: empty label name"},
		{"a", []string{"b", "1", "c", "3", "b", "2"}, `error: label "b" occurs twice`},
		{"a", []string{"__name__", "x"}, `error: label name "__name__" is reserved`},
		{"a", []string{"__", ""}, `error: label name "__" is reserved`},
		{"\xff", nil, `error: metric name "\xff" is not UTF-8`},
		{"a", []string{"\xff", "x"}, `error: label name "\xff" is not UTF-8`},
		{"a", []string{"x", "a\xffb"}, `error: label value "a\xffb" is not UTF-8`},
		{"a", []string{"x", "\xed\xa0\x80"}, `is not UTF-8`}, // a surrogate
		{"a\x00", nil, `error: metric name "a\x00" has a NUL byte`},
		{"a", []string{"\x00", ""}, `error: label name "\x00" has a NUL byte`},
		{"a", []string{"x", "\x00"}, `error: label value "\x00" has a NUL byte`},
		{"a", []string{"b", long}, `a{b="` + long + `"}`},
		{"a", []string{"b", long + "x"}, "error: too large: a series of 65536 bytes; at most 65535"},
		{"a", []string{"b", strings.Repeat("x", 1<<20)}, "error: too large: a series of 1048578 bytes; at most 65535"},
		{"a", many(MaxLabels + 1), "error: too large: 129 labels; a series has at most 128"},
		{"a", []string{strings.Repeat("x", 300), "", strings.Repeat("x", 300), ""}, "occurs twice"},
	} {
		var p SampleList
		err := p.Add(expoRaw(c.name, 1, 2, c.pairs...))
		got := string(p.Arena)
		if err != nil {
			got = "error: " + err.Error()
			if len(p.Arena) > 0 || len(p.Samples) > 0 {
				t.Errorf("%.40q %.40q: refused, but it left something", c.name, c.pairs)
			}
			if cap(p.Arena) > 2*MaxLine {
				t.Errorf("%.40q %.40q: refused, but it took %d bytes", c.name, c.pairs, cap(p.Arena))
			}
			if len(got) > 500 {
				t.Errorf("%.40q %.40q: an error of %d bytes", c.name, c.pairs, len(got))
			}
			if nul := strings.HasPrefix(c.want, "error: label value") && strings.Contains(c.want, "NUL"); errors.Is(err, ErrNULValue) != nul {
				t.Errorf("%.40q %.40q: %v: wraps ErrNULValue or not, wrongly", c.name, c.pairs, err)
			}
			if errors.Is(err, ErrTooLarge) != strings.HasPrefix(c.want, "error: too large") {
				t.Errorf("%.40q %.40q: %v: wraps ErrTooLarge or not, wrongly", c.name, c.pairs, err)
			}
		}
		if got != c.want && (err == nil || !strings.Contains(got, c.want)) {
			t.Errorf("%.40q %.40q:\n got %.200s\nwant %.200s", c.name, c.pairs, got, c.want)
		}
	}
	p := expoPush(t, expoRaw("a", 1, 2, many(MaxLabels)...)) // in falling order
	if _, _, err := new(SeriesParser).ParseCanonicalLine(p.Arena); err != nil {
		t.Error(err)
	}
}

func TestPushLimits(t *testing.T) {
	p := &SampleList{MaxSamples: 2}
	for i := range 4 {
		err := p.Add(expoRaw("a", int64(i), 0))
		if (err == nil) != (i < 2) || err != nil && !errors.Is(err, ErrTooLarge) {
			t.Errorf("sample %d of 2: %v", i+1, err)
		}
	}
	p.Reset()
	p.MaxSamples, p.MaxBytes = 0, 10
	for i := range 4 {
		err := p.Add(expoRaw("abcd", int64(i), 0))
		if (err == nil) != (i < 2) || err != nil && !errors.Is(err, ErrTooLarge) {
			t.Errorf("line %d of 4 bytes, within 10 bytes: %v", i+1, err)
		}
	}
	if len(p.Samples) != 2 || string(p.Line(p.Samples[1])) != "abcd" {
		t.Errorf("a refusal changed what was taken: %q %v", p.Arena, p.Samples)
	}
	if p.Reset(); len(p.Samples) != 0 || p.MaxBytes != 10 {
		t.Error("Reset keeps samples, or forgets limits")
	}
}

// A stale marker is a NaN of its own bits; text says only NaN, so none must come in.
func TestPushMakesNaNsEqual(t *testing.T) {
	p := expoPush(t, expoRaw("a", 1, math.Float64frombits(0x7ff0000000000002)))
	if got := math.Float64bits(p.Samples[0].V); got != math.Float64bits(math.NaN()) {
		t.Errorf("NaN of bits %x", got)
	}
}

func TestAppendSampleFloats(t *testing.T) {
	values := []float64{0, math.Copysign(0, -1), 1, -1, 0.1, 1e15, 1e15 - 1, 1e15 + 1, 1e15 + 2, -1e15, 1 - 1e15, -1 - 1e15,
		1e15 - 0.5, 999999999999999.9, 1 << 53, 1<<53 + 2, 1 << 62, 1 << 63, -1 << 63, 1 << 64, math.Inf(1), math.Inf(-1), math.NaN(),
		math.MaxFloat64, -math.MaxFloat64, math.SmallestNonzeroFloat64, 5e-324, 1e-320, 1e21, 123456.789, math.Pi}
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 20000 {
		values = append(values, math.Float64frombits(rnd.Uint64()), float64(int64(rnd.Uint64()>>rnd.IntN(64))), float64(rnd.IntN(2e6)-1e6)/1000)
	}
	for _, v := range values {
		if v != v {
			v = math.NaN() // as Add makes it
		}
		line := string(AppendSample(nil, []byte("a"), NoTime, v))
		text, ok := strings.CutPrefix(line, "a ")
		got, err := strconv.ParseFloat(strings.TrimSuffix(text, "\n"), 64)
		if !ok || err != nil || math.Float64bits(got) != math.Float64bits(v) {
			t.Errorf("%x is written as %q (seed %d)", math.Float64bits(v), line, seed)
		}
	}
	for _, c := range []struct {
		t    int64
		v    float64
		want string
	}{
		{NoTime, 1, "a 1\n"}, {0, 1, "a 1 0\n"}, {-5, math.Copysign(0, -1), "a -0 -5\n"},
		{math.MaxInt64, math.Inf(1), "a +Inf 9223372036854775807\n"}, {NoTime + 1, 1e15, "a 1e+15 -9223372036854775807\n"},
		{1, math.NaN(), "a NaN 1\n"}, {1, 0.5, "a 0.5 1\n"}, {1, 999999999999999, "a 999999999999999 1\n"},
	} {
		if got := string(AppendSample(nil, []byte("a"), c.t, c.v)); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestParserSeries(t *testing.T) {
	show := func(name []byte, labels []Label, rest []byte) string {
		var b strings.Builder
		fmt.Fprintf(&b, "%q", name)
		for _, l := range labels {
			fmt.Fprintf(&b, " %q=%q", l.Name, l.Value)
		}
		fmt.Fprintf(&b, "|%s", rest)
		return b.String()
	}
	var p SeriesParser
	for _, c := range []struct{ line, want string }{
		{`a 1`, `"a"|1`},
		{`a`, `"a"|`},
		{`a{} 1`, `"a"| 1`},
		{`a{}1`, `"a"|1`},
		{"a \t{ x = \"y\" , z\t=\"\" , } 1", `"a" "x"="y" "z"=""| 1`},
		{`a{x="y",x="z"}`, `"a" "x"="y" "x"="z"|`}, // Add's to judge
		{`{"a.b"}`, `"a.b"|`},
		{`{ "a.b" , x="y" } 1`, `"a.b" "x"="y"| 1`},
		{`{"a","b.c"="d"}`, `"a" "b.c"="d"|`},
		{`{x="y","a.b"} 1`, `"a.b" "x"="y"| 1`},
		{`{x="y" , "a\"b" , "c.d"="e",} 1`, `"a\"b" "x"="y" "c.d"="e"| 1`},
		{`{"a\"b\\c\nd\e"}`, `"a\"b\\c\nd\\e"|`},
		{`a{x="\"\\\n\e\\n\""}`, `"a" "x"="\"\\\n\\e\\n\""|`}, // a backslash before e stands for itself
		{`a{x="\n",y="\\",z="plain"}`, `"a" "x"="\n" "y"="\\" "z"="plain"|`},
		{`a{x="}{,\\"} 1`, `"a" "x"="}{,\\"| 1`},
		{`:a{x="y"}`, `":a" "x"="y"|`},
		{``, "no valid metric name"},
		{`1a 1`, "no valid metric name"},
		{"\ufeffa 1", "no valid metric name"},
		{`a.b 1`, `unexpected '.' in the metric name`},
		{`{} 1`, "no metric name"},
		{`{x="y"} 1`, "no metric name"},
		{`{""} 1`, "no metric name"},
		{`a{"b"} 1`, `label "b" has no value`},
		{`{"a","b"} 1`, `label "b" has no value`},
		{`{"a",x="y","b"} 1`, `label "b" has no value`},
		{`{x="y","a","b"} 1`, `label "b" has no value`},
		{`{"","b"} 1`, `no metric name`},
		{`a{x="y","b"} 1`, `label "b" has no value`},
		{`{a} 1`, `label "a" has no value`},
		{`a{,} 1`, `unexpected ',' where a label name`},
		{`a{x="y",,} 1`, `unexpected ',' where a label name`},
		{`a{x="y" z="w"} 1`, `unexpected 'z' after label "x"`},
		{`a{x=y} 1`, `the value of label "x" is not quoted`},
		{`a{x=`, `the value of label "x" is not quoted`},
		{`a{x="y`, "a quoted string does not end"},
		{`a{x="y\`, "a quoted string does not end"},
		{`a{x="y\"`, "a quoted string does not end"},
		{`a{x="y"`, "the labels do not end in }"},
		{`a{x="y",`, "the labels do not end in }"},
		{`a{`, "the labels do not end in }"},
		{`a{x`, `label "x" has no value`},
		{`a{a:b="c"}`, `label "a" has no value`},
		{`a{1b="c"}`, `unexpected '1' where`},
		{"a{x='y'}", "is not quoted"},
		{`a{` + strings.Repeat("x", 5000), "has no value"},
		{`a{` + strings.Repeat(`x="",`, MaxLabels+1) + `}`, "too large: more than 128 labels"},
		{strings.Repeat("x", 2*MaxLine+1), "too large: a line of 131071 bytes"},
	} {
		before := c.line
		line := []byte(c.line)
		name, labels, rest, err := p.parsePrefix(line)
		got := show(name, labels, rest)
		if err != nil {
			got = err.Error()
			if len(got) > 500 {
				t.Errorf("%.40q: an error of %d bytes", c.line, len(got))
			}
		}
		if err == nil && got != c.want || err != nil && !strings.Contains(got, c.want) {
			t.Errorf("%.60q:\n got %.200s\nwant %s", c.line, got, c.want)
		}
		if string(line) != before {
			t.Errorf("%.60q: the line was changed", c.line)
		}
	}
	if _, _, err := p.ParseLine([]byte("a 1")); err == nil || !strings.Contains(err.Error(), `series "a 1"`) {
		t.Errorf("Line takes a value behind the series: %v", err)
	}
}

func TestParserCheckRefusesOtherForms(t *testing.T) {
	var p SeriesParser
	for _, line := range []string{
		`a{}`, `a{b="1",a="2"}`, `a{a="1",}`, `a{a="1", b="2"}`, `a {a="1"}`, ` a`, `a `, `a{a="1"} `, `a{a="1"}1`, `a 1`,
		`{"a"}`, `{"a",b="c"}`, `{"a.b","c"="d"}`, `{"a.b",}`, `a{"b"="c"}`, `a{b="\e"}`, "a{b=\"\n\"}", `a{b="1",b="1"}`,
		`a{__b="1"}`, "a{b=\"\x00\"}", "a{b=\"\xff\"}", `a.b`, ``, `a{b="1"`, `{x="y","a.b"}`,
	} {
		if _, _, err := p.ParseCanonicalLine([]byte(line)); err == nil {
			t.Errorf("%q is taken for a rendered line", line)
		}
	}
	// Every single byte changed, dropped or doubled gives another line's normal form or none.
	for _, line := range []string{`a{b="c",d="\\e\n"}`, `{"a.b","c.d"="e",f=""}`} {
		if _, _, err := p.ParseCanonicalLine([]byte(line)); err != nil {
			t.Error(err)
		}
		for i := range line {
			for _, other := range []string{line[:i] + line[i+1:], line[:i] + " " + line[i:], line[:i] + line[i:i+1] + line[i:], line[:i] + "\"" + line[i+1:]} {
				name, labels, err := p.ParseCanonicalLine([]byte(other))
				if err == nil && string(appendLine(nil, name, labels)) != other {
					t.Errorf("%q is taken, and rendered otherwise", other)
				}
			}
		}
	}
}

func TestExcerptBounded(t *testing.T) {
	for _, line := range []string{"a", "", "a\nb", "\xff\x00\x1b[31m", strings.Repeat("é", 1000), strings.Repeat("\x01", 1<<20)} {
		got := Excerpt([]byte(line))
		if len(got) > 1000 || strings.ContainsAny(got, "\x00\n\x1b") {
			t.Errorf("excerpt of %.20q: %d bytes, %.40q", line, len(got), got)
		}
	}
	line := []byte(strings.Repeat("x", 300))
	Excerpt(line[:250])
	if line[200] != 'x' {
		t.Error("the excerpt was written into the line")
	}
}

func TestNegotiateEscaping(t *testing.T) {
	const (
		prom242 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
		prom3   = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
		legacy  = "text/plain; version=0.0.4; charset=utf-8; escaping="
		quoted  = "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"
	)
	for _, c := range []struct{ accept, want string }{
		{prom242, legacy + "underscores"},
		{prom3, quoted},
		{strings.ReplaceAll(prom3, "allow-utf-8", "values"), legacy + "values"},
		{strings.ReplaceAll(prom3, "allow-utf-8", "dots"), legacy + "dots"},
		{strings.ReplaceAll(prom3, "allow-utf-8", "underscores"), legacy + "underscores"},
		{"", legacy + "underscores"},
		{"*/*", legacy + "underscores"},
		{"text/html, ;;;=, text/plain; escaping=\"allow-utf-8\"", quoted},
		{"text/plain; escaping=ALLOW-UTF-8", legacy + "underscores"},
		{"text/plain; escaping=what, text/plain; ESCAPING=allow-utf-8", quoted},
		{"allow-utf-8", legacy + "underscores"},
		{strings.Repeat(",;", 10000), legacy + "underscores"},
	} {
		e := NegotiateEscaping(c.accept)
		if got := e.ContentType(); got != c.want || e.quotesNames() != (c.want == quoted) {
			t.Errorf("%.80s:\n got %s\nwant %s", c.accept, got, c.want)
		}
	}
}

// expoSchemes are all that a scraper can ask for.
func expoSchemes() (list []Escaping) {
	for _, name := range []string{model.AllowUTF8, model.EscapeUnderscores, model.EscapeDots, model.EscapeValues} {
		list = append(list, NegotiateEscaping("text/plain;escaping="+name))
	}
	return list
}

func TestEscapedNames(t *testing.T) {
	under, dots, values := expoSchemes()[1], expoSchemes()[2], expoSchemes()[3]
	for _, c := range []struct {
		e    Escaping
		r    *RawSample
		want string // "" is hidden
	}{
		{under, expoRaw("a.b", 0, 0, "c.d", "e"), `a_b{c_d="e"}`},
		{under, expoRaw("1a", 0, 0, "1b", "e", "_id", "x"), `_a{_b="e",_id="x"}`},
		{under, expoRaw("a.b", 0, 0, "z.", "1", "y", "2"), `a_b{y="2",z_="1"}`},
		{under, expoRaw("é世", 0, 0), `__`},
		{under, expoRaw("a", 0, 0, "c:d", "e"), `a{c_d="e"}`}, // only a metric's name may have colons
		{under, expoRaw("a.b", 0, 0, "c.d", "e", "c_d", "f"), ``},
		{under, expoRaw("a.b", 0, 0, ".id", "forged", "_id", "x"), ``},
		{under, expoRaw("a.b", 0, 0, "..", "e"), ``}, // __ is reserved
		{under, expoRaw("a.b", 0, 0, "._name__", "e"), ``},
		{dots, expoRaw("a.b", 0, 0, "c.d", "e", "_id", "x"), `a_dot_b{_id="x",c_dot_d="e"}`},
		{dots, expoRaw("a_b", 0, 0, "c.d", "e", "c_d", "f"), `a_b{c_d="f",c_dot_d="e"}`},
		{dots, expoRaw("a", 0, 0, "c:d", "e"), `a{c_d="e"}`},
		{values, expoRaw("a.b", 0, 0, "c.d", "e", "_id", "x"), `U__a_2e_b{U__c_2e_d="e",_id="x"}`},
		{values, expoRaw("a", 0, 0, "c:d.", "e"), `a{U__c_d_2e_="e"}`},
		{values, expoRaw(strings.Repeat("é", 20000), 0, 0), ``}, // longer than a line may be
	} {
		line, ok := c.e.renderLine(c.r.Name, c.r.Labels)
		if !ok {
			line = nil
		}
		if string(line) != c.want {
			t.Errorf("%.60s under %s: got %.80q, want %q", appendLine(nil, c.r.Name, c.r.Labels), c.e.ContentType(), line, c.want)
		}
	}
	for _, e := range expoSchemes() {
		if got := e.MetricName("a_b:c__d"); got != "a_b:c__d" {
			t.Errorf("a legacy name is shown as %q under %s", got, e.ContentType())
		}
	}
}

func TestWriteFamilies(t *testing.T) {
	p := expoPush(t,
		expoRaw("b", 1, 1, "x", "1"),
		expoRaw("a.b", 2, 2, "x", "1"),
		expoRaw("a_b", 3, 3, "x", "1"), // the one that keeps its place
		expoRaw("a-b", 4, 4, "x", "1"),
		expoRaw("a.b", 5, 5, "x", "2"),
		expoRaw("a-b", NoTime, 6, "x.", "2"),
		expoRaw("b", 7, 7, "y.", "1", "y_", "2"),
	)
	for i, want := range []string{
		`# TYPE "a-b" untyped
{"a-b",x="1"} 4 4
{"a-b","x."="2"} 6
# TYPE "a.b" untyped
{"a.b",x="1"} 2 2
{"a.b",x="2"} 5 5
# TYPE a_b untyped
a_b{x="1"} 3 3
# TYPE b untyped
b{x="1"} 1 1
b{"y."="1",y_="2"} 7 7
`, `# TYPE a_b untyped
a_b{x="1"} 3 3
a_b{x_="2"} 6
a_b{x="2"} 5 5
# TYPE b untyped
b{x="1"} 1 1
`} {
		var out bytes.Buffer
		written, hidden, err := WriteFamilies(&out, expoSchemes()[i], GroupByName(p))
		if err != nil || out.String() != want || written+hidden != 7 || hidden != 3*i {
			t.Errorf("%d written, %d hidden, %v:\n%s\nwant:\n%s", written, hidden, err, &out, want)
		}
		expoCheck(t, p)
	}
	if n, h, err := WriteFamilies(io.Discard, Escaping{}, nil); n != 0 || h != 0 || err != nil {
		t.Errorf("no families: %d %d %v", n, h, err)
	}
}

type expoFailing struct{ left int }

func (w *expoFailing) Write(p []byte) (int, error) {
	if w.left--; w.left < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(p), nil
}

func TestWriteFamiliesStopsAtError(t *testing.T) {
	p := &SampleList{}
	for i := range 5000 {
		if err := p.Add(expoRaw(fmt.Sprintf("name_%d", i), 1, 1, "label", strings.Repeat("v", 30))); err != nil {
			t.Fatal(err)
		}
	}
	for writes := range 4 {
		w := &expoFailing{left: writes}
		if _, _, err := WriteFamilies(w, Escaping{}, GroupByName(p)); !errors.Is(err, io.ErrClosedPipe) || w.left != -1 {
			t.Errorf("after %d writes: %v, %d further writes", writes, err, -1-w.left)
		}
	}
}

// expoCheck fails unless all that p holds is written so that it is read back: as it
// is where names may be quoted, else with no series, label or TYPE line twice and
// nothing that a parser of the legacy charset refuses. Lines must be unique.
func expoCheck(t testing.TB, p *SampleList) {
	t.Helper()
	var parser SeriesParser
	want := map[string][]string{}
	for _, s := range p.Samples {
		line := p.Line(s)
		name, labels, err := parser.ParseCanonicalLine(line)
		if err != nil {
			t.Fatalf("what Add rendered is not in normal form: %v", err)
		}
		if IsLegacyLine(line) != IsLegacy(name, labels) {
			t.Fatalf("%q: LegacyLine says %v", line, IsLegacyLine(line))
		}
		if got := LineName(line); !bytes.Equal(got, name) {
			t.Fatalf("%q: LineName says %q", line, got)
		}
		want[string(name)] = append(want[string(name)], expoShow(string(line), s.T, s.V))
	}
	fams := GroupByName(p)
	for _, e := range expoSchemes() {
		var out bytes.Buffer
		written, hidden, err := WriteFamilies(&out, e, fams)
		if err != nil || written+hidden != len(p.Samples) {
			t.Fatalf("%d written and %d hidden of %d: %v", written, hidden, len(p.Samples), err)
		}
		got := expoRead(t, e, out.Bytes())
		if e.quotesNames() {
			if hidden != 0 || len(got) != len(want) {
				t.Fatalf("%d hidden; %d names of %d", hidden, len(got), len(want))
			}
			for name := range want {
				if !slices.Equal(got[name], want[name]) {
					t.Fatalf("%q is read back otherwise:\n got %q\nwant %q\n%s", name, got[name], want[name], &out)
				}
			}
			continue
		}
		seen := map[string]bool{}
		lines := 0
		for line := range strings.Lines(out.String()) {
			key := line
			if line[0] != '#' {
				lines++
				name, labels, rest, err := parser.parsePrefix([]byte(line))
				if err != nil || !IsLegacy(name, labels) {
					t.Fatalf("under %s: %q: %v", e.ContentType(), line, err)
				}
				for _, l := range labels {
					if bytes.HasPrefix(l.Name, []byte("__")) {
						t.Fatalf("under %s: %q has a reserved label", e.ContentType(), line)
					}
				}
				key = line[:len(line)-len(rest)]
			}
			if seen[key] {
				t.Fatalf("under %s %q occurs twice", e.ContentType(), key)
			}
			seen[key] = true
		}
		if lines != written {
			t.Fatalf("under %s %d lines, said to be %d", e.ContentType(), lines, written)
		}
		// What needs no escaping is never hidden by what does.
		for _, s := range p.Samples {
			if line := p.Line(s); IsLegacyLine(line) && !seen[string(line)] && !seen[string(line)+" "] {
				t.Fatalf("under %s %q is hidden", e.ContentType(), line)
			}
		}
	}
}

func expoShow(line string, t int64, v float64) string {
	return fmt.Sprintf("%s %x %d", line, math.Float64bits(v), t)
}

// expoRead reads text with expfmt's parser: by name, in its order, what expoShow
// makes of each sample.
func expoRead(t testing.TB, e Escaping, text []byte) map[string][]string {
	t.Helper()
	scheme := model.LegacyValidation
	if e.quotesNames() {
		scheme = model.UTF8Validation
	}
	parser := expfmt.NewTextParser(scheme)
	fams, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatalf("under %s the output cannot be read: %v\n%.2000q", e.ContentType(), err, text)
	}
	got := map[string][]string{}
	for name, f := range fams {
		for _, m := range f.Metric {
			var labels []Label
			for _, l := range m.Label {
				labels = append(labels, Label{[]byte(l.GetName()), []byte(l.GetValue())})
			}
			at := int64(NoTime)
			if m.TimestampMs != nil {
				at = *m.TimestampMs
			}
			got[name] = append(got[name], expoShow(string(appendLine(nil, []byte(name), labels)), at, m.GetUntyped().GetValue()))
		}
	}
	return got
}

// expoRandom makes a sample whose names come from so few that they collide.
func expoRandom(rnd *rand.Rand) *RawSample {
	pick := func(from ...string) string { return from[rnd.IntN(len(from))] }
	word := func() string {
		if rnd.IntN(2) == 0 {
			return pick("a", "a_b", "a.b", "a-b", "a:b", "_", "__", "U__a_2e_b", "a_dot_b", "_id", ".id", "x_count", "x_sum", "x_bucket", "x", "le", "1", "1a", "quantile")
		}
		var b strings.Builder
		for range 1 + rnd.IntN(4) {
			b.WriteString(pick("a", "b", "_", ".", ":", "0", "\"", "\\", "\n", "n", " ", "\t", "\r", "{", "}", ",", "=", "#", "é", "世", "\U0010ffff", "\x01", "'", "\u2028"))
		}
		return b.String()
	}
	values := []float64{0, math.Copysign(0, -1), 1, 0.1, math.Inf(1), math.Inf(-1), math.NaN(), 1e15, rnd.NormFloat64(), float64(rnd.Int64())}
	r := expoRaw(word(), rnd.Int64()-rnd.Int64(), values[rnd.IntN(len(values))])
	if rnd.IntN(5) == 0 {
		r.T = NoTime
	}
	for range rnd.IntN(4) {
		r.Labels = append(r.Labels, Label{[]byte(word()), []byte(pick("", word(), "1"))})
	}
	return r
}

// expoUnique keeps the first sample of each line, as a store does of its newest.
func expoUnique(p *SampleList) {
	seen := map[string]bool{}
	p.Samples = slices.DeleteFunc(p.Samples, func(s Sample) bool {
		line := string(p.Line(s))
		defer func() { seen[line] = true }()
		return seen[line]
	})
}

func TestWhatIsAcceptedCanBeRead(t *testing.T) {
	seed := rand.Uint64()
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	rnd := rand.New(rand.NewPCG(seed, 0))
	added := 0
	for range 300 {
		p := &SampleList{}
		for range 40 {
			if p.Add(expoRandom(rnd)) == nil {
				added++
			}
		}
		expoUnique(p)
		expoCheck(t, p)
	}
	if added < 3000 {
		t.Errorf("only %d samples were good enough to test anything", added)
	}
}

func BenchmarkPushAdd(b *testing.B) {
	r := expoRaw("http_requests_total", 1, 2, "_id", "site-7", "code", "200", "handler", "/api/v1/query", "instance", "localhost:9090", "job", "prometheus")
	var p SampleList
	b.ReportAllocs()
	for b.Loop() {
		p.Reset()
		if err := p.Add(r); err != nil {
			b.Fatal(err)
		}
	}
}
