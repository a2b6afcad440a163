package main

// Tests of writing text exposition: values and timestamps, the choice of an escaping, escaped
// names, and families that are merged because their escaped names are equal.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
)

// AppendSample writes every value that SampleList.Add stores in a form that strconv.ParseFloat
// parses to the same bits.
func TestAppendSampleFloats(t *testing.T) {
	values := []float64{0, math.Copysign(0, -1), 1, -1, 0.1, 1e15, 1e15 - 1, 1e15 + 1, 1e15 + 2, -1e15, 1 - 1e15, -1 - 1e15,
		1e15 - 0.5, 999999999999999.9, 1 << 53, 1<<53 + 2, 1 << 62, 1 << 63, -1 << 63, 1 << 64, math.Inf(1), math.Inf(-1), math.NaN(),
		math.MaxFloat64, -math.MaxFloat64, math.SmallestNonzeroFloat64, 5e-324, 1e-320, 1e21, 123456.789, math.Pi}
	rnd := rand.New(rand.NewPCG(testSeed(t, 0), 0))
	for range 20000 {
		values = append(values, math.Float64frombits(rnd.Uint64()), float64(int64(rnd.Uint64()>>rnd.IntN(64))), float64(rnd.IntN(2e6)-1e6)/1000)
	}
	for _, v := range values {
		if v != v {
			v = math.NaN() // the bits of the only NaN that SampleList.Add stores
		}
		line := string(AppendSample(nil, []byte("a"), NoTime, v))
		text, ok := strings.CutPrefix(line, "a ")
		got, err := strconv.ParseFloat(strings.TrimSuffix(text, "\n"), 64)
		if !ok || err != nil || math.Float64bits(got) != math.Float64bits(v) {
			t.Errorf("float with the bits %x is written as %q", math.Float64bits(v), line)
		}
	}
}

// AppendSample writes whole numbers between -1e15 and 1e15 as integers, without an exponent. It
// writes the timestamp unless the timestamp is NoTime.
func TestAppendSample(t *testing.T) {
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
			t.Errorf("sample of value %v at %d: got %q, want %q", c.v, c.t, got, c.want)
		}
	}
}

// Names are quoted only if the first known scheme in the Accept header is escaping=allow-utf-8. A
// header without a known scheme means underscores. The first two headers are those of Prometheus
// 2.42 and Prometheus 3.
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
			t.Errorf("content type for Accept: %.80s:\n got %s\nwant %s", c.accept, got, c.want)
		}
	}
}

// Under each escaping scheme, renderLine escapes the metric name and the label names. It returns
// false for a series whose escaped line cannot be served. A metric name of the legacy charset is
// never changed.
func TestEscapedNames(t *testing.T) {
	under, dots, values := expoSchemes()[1], expoSchemes()[2], expoSchemes()[3]
	for _, c := range []struct {
		e    Escaping
		r    *RawSample
		want string // the escaped line; "" if it cannot be served
	}{
		{under, expoRaw("a.b", 0, 0, "c.d", "e"), `a_b{c_d="e"}`},
		{under, expoRaw("1a", 0, 0, "1b", "e", "_id", "x"), `_a{_b="e",_id="x"}`},
		{under, expoRaw("a.b", 0, 0, "z.", "1", "y", "2"), `a_b{y="2",z_="1"}`},
		{under, expoRaw("é世", 0, 0), `__`},
		{under, expoRaw("a", 0, 0, "c:d", "e"), `a{c_d="e"}`}, // only metric names may contain colons
		{under, expoRaw("a.b", 0, 0, "c.d", "e", "c_d", "f"), ``},
		{under, expoRaw("a.b", 0, 0, ".id", "forged", "_id", "x"), ``},
		{under, expoRaw("a.b", 0, 0, "..", "e"), ``}, // the escaped label name __ is reserved
		{under, expoRaw("a.b", 0, 0, "._name__", "e"), ``},
		{dots, expoRaw("a.b", 0, 0, "c.d", "e", "_id", "x"), `a_dot_b{_id="x",c_dot_d="e"}`},
		{dots, expoRaw("a_b", 0, 0, "c.d", "e", "c_d", "f"), `a_b{c_d="f",c_dot_d="e"}`},
		{dots, expoRaw("a", 0, 0, "c:d", "e"), `a{c_d="e"}`},
		{values, expoRaw("a.b", 0, 0, "c.d", "e", "_id", "x"), `U__a_2e_b{U__c_2e_d="e",_id="x"}`},
		{values, expoRaw("a", 0, 0, "c:d.", "e"), `a{U__c_d_2e_="e"}`},
		{values, expoRaw(strings.Repeat("é", 20000), 0, 0), ``}, // the escaped line exceeds MaxLine
	} {
		line, ok := c.e.renderLine(c.r.Name, c.r.Labels)
		if !ok {
			line = nil
		}
		if string(line) != c.want {
			t.Errorf("series %.60s under %s: got %.80q, want %q", appendLine(nil, c.r.Name, c.r.Labels), c.e.ContentType(), line, c.want)
		}
	}
	for _, e := range expoSchemes() {
		if got := e.MetricName("a_b:c__d"); got != "a_b:c__d" {
			t.Errorf("legacy name a_b:c__d under %s: got %q", e.ContentType(), got)
		}
	}
}

// If names are quoted, WriteFamilies writes every sample. If names are escaped with underscores, it
// merges families whose escaped names are equal. It then hides a series if its escaped line is
// already used by another series, or cannot be served.
func TestWriteFamilies(t *testing.T) {
	p := expoPush(t,
		expoRaw("b", 1, 1, "x", "1"),
		expoRaw("a.b", 2, 2, "x", "1"),
		expoRaw("a_b", 3, 3, "x", "1"), // needs no escaping, so it hides the series that are escaped to the same line
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
			t.Errorf("%d samples written, %d hidden (want %d), %v:\n%s\nwant:\n%s", written, hidden, 3*i, err, &out, want)
		}
		expoCheck(t, p)
	}
	if n, h, err := WriteFamilies(io.Discard, Escaping{}, nil); n != 0 || h != 0 || err != nil {
		t.Errorf("without families: %d samples written, %d hidden, %v", n, h, err)
	}
}

// expoFailing is a writer. The field left is the number of writes that succeed; later writes fail.
type expoFailing struct{ left int }

func (w *expoFailing) Write(p []byte) (int, error) {
	if w.left--; w.left < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(p), nil
}

// WriteFamilies stops at the first write that fails, and returns its error.
func TestWriteFamiliesStopsAtError(t *testing.T) {
	p := &SampleList{}
	for i := range 10_000 {
		if err := p.Add(expoRaw(fmt.Sprintf("name_%d", i), 1, 1, "label", strings.Repeat("v", 30))); err != nil {
			t.Fatal(err)
		}
	}
	for writes := range 4 {
		w := &expoFailing{left: writes}
		if _, _, err := WriteFamilies(w, Escaping{}, GroupByName(p)); !errors.Is(err, io.ErrClosedPipe) || w.left != -1 {
			t.Errorf("a write fails after %d successful ones: error %v, then %d further writes", writes, err, -1-w.left)
		}
	}
}

// turnsWriter counts the full chunks that are written, and those before which another goroutine ran.
type turnsWriter struct {
	turns          *atomic.Int64
	last           int64
	chunks, yields int
}

func (w *turnsWriter) Write(p []byte) (int, error) {
	if len(p) >= 128<<10 {
		w.chunks++
		if now := w.turns.Load(); now != w.last {
			w.last, w.yields = now, w.yields+1
		}
	}
	return len(p), nil
}

// WriteFamilies lets other goroutines run before it writes a full chunk, so that the network is polled. The
// scheduler is free to go on with the goroutine that yields; under the race detector it often does.
func TestWriteFamiliesYields(t *testing.T) {
	p := &SampleList{}
	for i := range 120 {
		if err := p.Add(expoRaw("name", NoTime, float64(i), "label", strings.Repeat("v", 40_000)+strconv.Itoa(i))); err != nil {
			t.Fatal(err)
		}
	}
	fams := GroupByName(p)
	w := &turnsWriter{turns: countTurns(t)}
	if _, _, err := WriteFamilies(w, Escaping{}, fams); err != nil || w.chunks != 30 || w.yields < 3 {
		t.Errorf("other goroutines ran before %d of %d full chunks, want 3 or more of 30; %v", w.yields, w.chunks, err)
	}
}
