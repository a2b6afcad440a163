package main

// Helpers to make samples and to check text exposition. expoCheck checks the central property of
// the sample model: under every escaping, expfmt's parser can read the text that WriteFamilies
// writes for samples that SampleList.Add accepts. That parser is independent of this program's own
// parser. Fuzz targets use expoCheck too.

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// expoRaw returns a sample with this metric name, timestamp and value. pairs alternates the names
// and the values of its labels.
func expoRaw(name string, t int64, v float64, pairs ...string) *RawSample {
	r := &RawSample{Name: []byte(name), T: t, HasT: true, V: v}
	for i := 0; i < len(pairs); i += 2 {
		r.Labels = append(r.Labels, Label{[]byte(pairs[i]), []byte(pairs[i+1])})
	}
	return r
}

// expoPush returns a SampleList with the samples. It fails the test if Add refuses one of them.
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

// expoSchemes returns every escaping that a scraper can ask for: allow-utf-8, underscores, dots and
// values, in this order.
func expoSchemes() (list []Escaping) {
	for _, name := range []string{model.AllowUTF8, model.EscapeUnderscores, model.EscapeDots, model.EscapeValues} {
		list = append(list, NegotiateEscaping("text/plain;escaping="+name))
	}
	return list
}

// expoCheck fails the test unless expfmt's parser can read the text that WriteFamilies writes for
// p, under every escaping. If the escaping quotes names, the parser must read back exactly the
// samples of p. Under the other escapings, the text must use the legacy charset only, must contain
// no series and no TYPE line twice, and must contain every series that needs no escaping. No two
// samples of p may have the same line.
func expoCheck(t testing.TB, p *SampleList) {
	t.Helper()
	var parser SeriesParser
	want := map[string][]string{}
	for _, s := range p.Samples {
		line := p.Line(s)
		name, labels, err := parser.ParseCanonicalLine(line)
		if err != nil {
			t.Fatalf("Add rendered a line that is not in normal form: %v", err)
		}
		if IsLegacyLine(line) != IsLegacy(name, labels) {
			t.Fatalf("IsLegacyLine(%q): got %v, want %v", line, IsLegacyLine(line), IsLegacy(name, labels))
		}
		if got := LineName(line); !bytes.Equal(got, name) {
			t.Fatalf("LineName(%q): got %q, want %q", line, got, name)
		}
		want[string(name)] = append(want[string(name)], expoShow(string(line), s.T, s.V))
	}
	fams := GroupByName(p)
	for _, e := range expoSchemes() {
		var out bytes.Buffer
		written, hidden, err := WriteFamilies(&out, e, fams)
		if err != nil || written+hidden != len(p.Samples) {
			t.Fatalf("WriteFamilies of %d samples: %d written, %d hidden, %v", len(p.Samples), written, hidden, err)
		}
		got := expoRead(t, e, out.Bytes())
		if e.quotesNames() {
			if hidden != 0 || len(got) != len(want) {
				t.Fatalf("with quoted names: %d samples hidden, want 0; %d metric names read back, want %d", hidden, len(got), len(want))
			}
			for name := range want {
				if !slices.Equal(got[name], want[name]) {
					t.Fatalf("samples of %q read back:\n got %q\nwant %q\n%s", name, got[name], want[name], &out)
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
					t.Fatalf("under %s: line %q is not in the legacy charset: %v", e.ContentType(), line, err)
				}
				for _, l := range labels {
					if bytes.HasPrefix(l.Name, []byte("__")) {
						t.Fatalf("under %s: line %q has a reserved label", e.ContentType(), line)
					}
				}
				key = line[:len(line)-len(rest)]
			}
			if seen[key] {
				t.Fatalf("under %s: %q occurs twice", e.ContentType(), key)
			}
			seen[key] = true
		}
		if lines != written {
			t.Fatalf("under %s: the text has %d samples, WriteFamilies reported %d", e.ContentType(), lines, written)
		}
		// A series that needs no escaping must never be hidden by a series that needs escaping.
		for _, s := range p.Samples {
			if line := p.Line(s); IsLegacyLine(line) && !seen[string(line)] && !seen[string(line)+" "] {
				t.Fatalf("under %s: series %q is hidden", e.ContentType(), line)
			}
		}
	}
}

// expoShow formats a sample as text: its line, the bits of its value, and its time. Two decoders
// return the same sample if the texts are equal.
func expoShow(line string, t int64, v float64) string {
	return fmt.Sprintf("%s %x %d", line, math.Float64bits(v), t)
}

// expoRead parses text with expfmt's parser. It returns the samples by metric name, in the order of
// the text, each formatted by expoShow.
func expoRead(t testing.TB, e Escaping, text []byte) map[string][]string {
	t.Helper()
	scheme := model.LegacyValidation
	if e.quotesNames() {
		scheme = model.UTF8Validation
	}
	parser := expfmt.NewTextParser(scheme)
	fams, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatalf("under %s: expfmt cannot parse the text: %v\n%.2000q", e.ContentType(), err, text)
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

// expoRandom returns a random sample. Its names are chosen so that escaping often makes names of
// several samples equal.
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

// expoUnique removes each sample of p whose line equals the line of an earlier sample, because
// expoCheck needs unique lines.
func expoUnique(p *SampleList) {
	seen := map[string]bool{}
	p.Samples = slices.DeleteFunc(p.Samples, func(s Sample) bool {
		line := string(p.Line(s))
		defer func() { seen[line] = true }()
		return seen[line]
	})
}
