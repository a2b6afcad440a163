package main

// Tests of decoding that apply to all formats: content types, metadata labels, the callback, and
// bounds on memory for hostile bodies. A random test compares the results of Decoder and of
// expfmt's decoder. Fuzz targets cover the whole path from a body to the text that a scraper reads.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// ParseFormat accepts the content types of the three formats, an empty content type, and the
// content type that curl sends by default. It refuses all others with an error that lists the
// supported content types.
func TestParseFormat(t *testing.T) {
	for _, c := range []struct {
		contentType string
		want        Format // -1 if ParseFormat must return an error
	}{
		{"", FormatText},
		{"application/x-www-form-urlencoded", FormatText}, // curl --data-binary sends this type
		{"text/plain", FormatText},
		{"Text/Plain; charset=utf-8", FormatText},
		{"text/plain; version=0.0.4; charset=utf-8; escaping=underscores", FormatText},
		{"text/plain; version=1.0.0; escaping=allow-utf-8", FormatText},
		{"text/plain; version=1.0.0; charset=utf-8", FormatText},
		{"text/plain;version=1.0.0;charset=utf-8", FormatText},
		{"text/plain; version=0.0.4; charset=utf-8", FormatText},
		{"application/openmetrics-text", FormatOpenMetrics},
		{"application/openmetrics-text; version=0.0.1", FormatOpenMetrics},
		{"application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores", FormatOpenMetrics},
		{string(expfmt.FmtProtoDelim), FormatProto},
		{strings.ReplaceAll(string(expfmt.FmtProtoDelim), " ", ""), FormatProto},
		{"application/vnd.google.protobuf", FormatProto},
		{"text/plain; version=0.0.3", -1},
		{"application/openmetrics-text; version=2.0.0", -1},
		{string(expfmt.FmtProtoText), -1},
		{string(expfmt.FmtProtoCompact), -1},
		{"application/vnd.google.protobuf; proto=other; encoding=delimited", -1},
		{"application/x-protobuf", -1}, // Prometheus's remote write sends this type
		{"application/json", -1},
		{"text", -1},
		{";", -1},
		{"text/plain; version", -1},
		{strings.Repeat("x", 1<<20), -1},
	} {
		got, err := ParseFormat(c.contentType)
		if err != nil {
			got = -1
			if len(err.Error()) > 500 || !strings.Contains(err.Error(), supportedFormats) {
				t.Errorf("content type %.80q: the error is too long or does not list the formats: %.600v", c.contentType, err)
			}
		}
		if got != c.want {
			t.Errorf("content type %.80q: got format %v, want %v (%.200v)", c.contentType, got, c.want, err)
		}
	}
}

// decoded decodes a body and returns a text "line value time" for each sample. The time is "-" if
// the sample has no timestamp.
func decoded(body []byte, f Format) (samples []string, skipped UnsupportedParts, err error) {
	var d Decoder
	skipped, err = d.Decode(body, f, appendFormatted(&samples))
	return samples, skipped, err
}

// appendFormatted returns a function that takes decoded samples. It appends each to samples, as text
// with the line, the value and the time, or - without a time.
func appendFormatted(samples *[]string) func(r *RawSample) error {
	var p SampleList
	return func(r *RawSample) error {
		if err := p.Add(r); err != nil {
			return err
		}
		s := p.Samples[len(p.Samples)-1]
		at := "-"
		if r.HasT {
			at = fmt.Sprint(r.T)
		}
		*samples = append(*samples, fmt.Sprintf("%s %v %s", p.Line(s), s.V, at))
		return nil
	}
}

// checkDecoded decodes a body. It fails the test unless the samples, formatted as by decoded, are
// want and the skipped parts are wantSkipped. If wantErr is not empty, decoding must fail instead,
// with an error of at most 2,000 bytes that contains each string of wantErr.
func checkDecoded(t *testing.T, body []byte, f Format, want []string, wantSkipped UnsupportedParts, wantErr []string) {
	t.Helper()
	got, skipped, err := decoded(body, f)
	if len(wantErr) > 0 {
		for _, w := range wantErr {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("body %.80q: got error %.300v, want one with %q", body, err, w)
			}
		}
		if err != nil && len(err.Error()) > 2000 {
			t.Errorf("body %.80q: the error has %d bytes, want at most 2,000", body, len(err.Error()))
		}
		return
	}
	if err != nil || !slices.Equal(got, want) || skipped != wantSkipped {
		t.Errorf("body %.200q:\n got %q, skipped %+v, %v\nwant %q, skipped %+v", body, got, skipped, err, want, wantSkipped)
	}
}

// In every format, the labels __type__ and __unit__ are removed and counted. A series with any
// other reserved label is refused.
func TestDecodeMetadataLabels(t *testing.T) {
	value := pbBytes(3, pbFloat(1, 1)) // the field of a Metric message with a counter of value 1
	kind, unit := pbLabel("__type__", "counter"), pbLabel("__unit__", "seconds")
	var full [][]byte
	for i := range MaxLabels {
		full = append(full, pbLabel(fmt.Sprint("l", i), "v"))
	}
	for _, c := range []struct {
		body    string
		f       Format
		want    []string
		skipped UnsupportedParts
		err     []string
	}{
		{"a{__type__=\"gauge\",b=\"c\",__unit__=\"s\"} 1\na{b=\"c\"} 2\n", FormatText, []string{`a{b="c"} 1 -`, `a{b="c"} 2 -`}, UnsupportedParts{Metadata: 2}, nil},
		{"a{\"__type__\"=\"gauge\"} 1 5\n{__unit__=\"\",\"a.b\"} 2\n", FormatText, []string{"a 1 5", `{"a.b"} 2 -`}, UnsupportedParts{Metadata: 2}, nil},
		{"a{__type__=\"x\",__type__=\"y\"} 1\n", FormatText, []string{"a 1 -"}, UnsupportedParts{Metadata: 2}, nil},
		{"a_total{__type__=\"counter\"} 1 2 # {x=\"y\"} 1\n# EOF\n", FormatOpenMetrics, []string{"a_total 1 2000"}, UnsupportedParts{Metadata: 1, Exemplars: 1}, nil},
		{"a{__type__=\"gauge\",__name__=\"b\"} 1\n", FormatText, nil, UnsupportedParts{}, []string{`"__name__" is reserved`}},
		{"a{__type=\"gauge\"} 1\n", FormatText, nil, UnsupportedParts{}, []string{`"__type" is reserved`}},
		{string(pbOne("a", 0, kind, pbLabel("b", "c"), unit, value)), FormatProto, []string{`a{b="c"} 1 -`}, UnsupportedParts{Metadata: 2}, nil},
		{string(pbOne("a", 4, kind, pbLabel("b", "c"), pbBytes(7, pbVarint(1, 5)))), FormatProto,
			[]string{`a_bucket{b="c",le="+Inf"} 5 -`, `a_sum{b="c"} 0 -`, `a_count{b="c"} 5 -`}, UnsupportedParts{Metadata: 1}, nil},
		{string(pbOne("a", 2, unit, pbBytes(4, pbVarint(1, 5)))), FormatProto, []string{"a_sum 0 -", "a_count 5 -"}, UnsupportedParts{Metadata: 1}, nil},
		{string(pbOne("a", 0, kind, pbLabel("__x__", ""), value)), FormatProto, nil, UnsupportedParts{}, []string{`"__x__" is reserved`}},
		{string(pbOne("a", 0, kind, pbBytes(1, []byte{1<<3 | 2, 9}), value)), FormatProto, nil, UnsupportedParts{}, []string{"malformed"}},
	} {
		checkDecoded(t, []byte(c.body), c.f, c.want, c.skipped, c.err)
	}
	for range 2 { // the removed labels __type__ must not count toward MaxLabels
		full = append(full, kind)
	}
	if got, skipped, err := decoded(pbOne("a", 0, append(full, value)...), FormatProto); err != nil || len(got) != 1 || skipped.Metadata != 2 {
		t.Errorf("two type labels beside %d other labels: %d samples, skipped %+v, %v", MaxLabels, len(got), skipped, err)
	}
}

// Decode calls emit with the right samples even if emit changes the samples that it gets. Decode
// does not change the body, and it stops at the first error of emit.
func TestDecodeEmit(t *testing.T) {
	text := []byte("a{b=\"\\n1\",c=\"2\"} 1 5\na{b=\"3\"} 2\n")
	proto := pbOne("a", 4, pbLabel("b", "1"), pbBytes(7, pbVarint(1, 5)))
	for _, c := range []struct {
		body []byte
		f    Format
		want string
	}{{text, FormatText, `a{b="\n1",c="2"}|a{b="3"}|`}, {proto, FormatProto, `a_bucket{b="1",le="+Inf"}|a_sum{b="1"}|a_count{b="1"}|`}} {
		var d Decoder
		got := ""
		before := string(c.body)
		_, err := d.Decode(c.body, c.f, func(r *RawSample) error {
			got += string(appendLine(nil, r.Name, r.Labels)) + "|"
			r.Labels = append(r.Labels[:1], Label{[]byte("x"), []byte("y")}, Label{[]byte("z"), nil}, Label{[]byte("w"), nil})
			r.Labels[0] = Label{}
			r.Name, r.V = []byte("other"), 9
			return nil
		})
		if err != nil || got != c.want || string(c.body) != before {
			t.Errorf("series passed to an emit that changes them: got %s, want %s; body unchanged %v; %v", got, c.want, string(c.body) == before, err)
		}
		stop := errors.New("stop")
		calls := 0
		_, err = d.Decode(c.body, c.f, func(*RawSample) error { calls++; return stop })
		if !errors.Is(err, stop) || calls != 1 || !strings.Contains(err.Error(), "1: series ") {
			t.Errorf("emit fails at the first call: Decode returned %v after %d calls", err, calls)
		}
	}
}

// randomFamilies returns random metric families that Decoder and expfmt decode to the same samples,
// from text and from protobuf.
func randomFamilies(rnd *rand.Rand) (fams []*dto.MetricFamily) {
	value := func() *float64 {
		return new([]float64{0, 1, -1.5, math.Inf(1), math.Inf(-1), math.NaN(), rnd.NormFloat64() * 1e9, float64(rnd.IntN(1e9)), 1e-300}[rnd.IntN(9)])
	}
	text := func() string {
		var b strings.Builder
		for range rnd.IntN(5) {
			b.WriteString([]string{"a", "B", "_", ".", "\"", "\\", "\n", "é", "世", " ", "{", "}", ",", "="}[rnd.IntN(14)])
		}
		return b.String()
	}
	for f := range 1 + rnd.IntN(6) {
		kind := dto.MetricType(rnd.IntN(5))
		fam := protoFamily(fmt.Sprintf("m%s%d", text(), f), kind)
		for i := range 1 + rnd.IntN(4) {
			m := &dto.Metric{Label: []*dto.LabelPair{{Name: new("n"), Value: new(fmt.Sprint(i))}}}
			for l := range rnd.IntN(4) {
				m.Label = append(m.Label, &dto.LabelPair{Name: new(fmt.Sprintf("%c%s", 'z'-l, text())), Value: new("v" + text())})
			}
			if rnd.IntN(2) == 0 {
				m.TimestampMs = new(rnd.Int64N(4e12) - 1e12)
			}
			count := uint64(rnd.IntN(1 << 30))
			switch kind {
			case dto.MetricType_COUNTER:
				m.Counter = &dto.Counter{Value: value()}
			case dto.MetricType_GAUGE:
				m.Gauge = &dto.Gauge{Value: value()}
			case dto.MetricType_UNTYPED:
				m.Untyped = &dto.Untyped{Value: value()}
			case dto.MetricType_SUMMARY:
				m.Summary = &dto.Summary{SampleCount: &count, SampleSum: value()}
				for q := range rnd.IntN(4) {
					m.Summary.Quantile = append(m.Summary.Quantile, &dto.Quantile{Quantile: new(float64(q) / 3), Value: value()})
				}
			case dto.MetricType_HISTOGRAM:
				m.Histogram = &dto.Histogram{SampleCount: &count, SampleSum: value()}
				floats := rnd.IntN(3) == 0
				if floats {
					m.Histogram.SampleCount, m.Histogram.SampleCountFloat = nil, new(1.25+float64(count))
				}
				bounds := []float64{-1e9, 0, 0.1, 2.5, 1e6, 1e21, math.Inf(1)}
				for b := range rnd.IntN(len(bounds) + 1) {
					bucket := &dto.Bucket{UpperBound: &bounds[b], CumulativeCount: new(uint64(b))}
					if floats {
						bucket.CumulativeCount, bucket.CumulativeCountFloat = nil, new(0.5+float64(b))
					}
					m.Histogram.Bucket = append(m.Histogram.Bucket, bucket)
				}
			}
			fam.Metric = append(fam.Metric, m)
		}
		fams = append(fams, fam)
	}
	return fams
}

// oracleNow is the time that oracle and decodedAsOracle give to samples without a timestamp.
const oracleNow = model.Time(1e12)

// oracle decodes a body with expfmt's decoder. It returns the samples, formatted by expoShow and
// sorted.
func oracle(body []byte, f expfmt.Format) (list []string, err error) {
	dec := &expfmt.SampleDecoder{Dec: expfmt.NewDecoder(bytes.NewReader(body), f.WithEscapingScheme(model.NoEscaping)), Opts: &expfmt.DecodeOptions{Timestamp: oracleNow}}
	for {
		var v model.Vector
		if err := dec.Decode(&v); err != nil {
			slices.Sort(list)
			if err == io.EOF {
				err = nil
			}
			return list, err
		}
		for _, s := range v {
			r := RawSample{Name: []byte(s.Metric[model.MetricNameLabel])}
			for name, value := range s.Metric {
				if name != model.MetricNameLabel {
					r.Labels = append(r.Labels, Label{[]byte(name), []byte(value)})
				}
			}
			var p SampleList
			if err := p.Add(&r); err != nil {
				return nil, err
			}
			list = append(list, expoShow(string(p.Arena), int64(s.Timestamp), float64(s.Value)))
		}
	}
}

// decodedAsOracle decodes a body with Decoder. It returns the samples in the same form as oracle.
func decodedAsOracle(body []byte, f Format) (list []string, err error) {
	var d Decoder
	_, err = d.Decode(body, f, func(r *RawSample) error {
		var p SampleList
		if !r.HasT {
			r.T = int64(oracleNow)
		}
		err := p.Add(r)
		list = append(list, expoShow(string(p.Arena), r.T, r.V))
		return err
	})
	slices.Sort(list)
	return list, err
}

// On random valid bodies, Decoder and expfmt's decoder return the same samples. The random bodies
// leave out the cases in which the two decoders differ on purpose; other tests of the formats cover
// these cases. Decoder is stricter about reserved labels, duplicate labels, truncation, groups and
// metrics without a value. It is as lax as Prometheus about unknown escapes. It drops exemplars,
// created timestamps and native histograms of protobuf.
func TestDecodeAgreesWithExpfmt(t *testing.T) {
	rnd := rand.New(rand.NewPCG(testSeed(t, 0), 0))
	for n := range 300 {
		fams := randomFamilies(rnd)
		var text bytes.Buffer
		for _, f := range fams {
			if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range []struct {
			body []byte
			ours Format
			its  expfmt.Format
		}{{text.Bytes(), FormatText, expfmt.FmtText}, {protoBody(t, fams...), FormatProto, expfmt.FmtProtoDelim}} {
			want, err := oracle(c.body, c.its)
			if err != nil {
				t.Fatalf("round %d, %s: expfmt refuses its own body: %v\n%s", n, c.its, err, &text)
			}
			got, err := decodedAsOracle(c.body, c.ours)
			if err != nil || !slices.Equal(got, want) {
				t.Fatalf("round %d, %s: %v\n got %q\nwant %q\n%s", n, c.its, err, got, want, &text)
			}
		}
	}
}

// allocated returns the number of bytes that are allocated while f runs, including bytes that are
// freed again.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// hostileBody is a body that could cost a decoder much memory. It has at most about hostileSize
// bytes.
type hostileBody struct {
	name string
	body []byte
	f    Format
	want string // part of the error that Decode must return if emit accepts every sample; "" if there must be no error
}

const hostileSize = 8 << 20 // size in bytes of the largest decompressed body that the default --limit-bytes allows

// hostileBodies returns bodies of all formats, each with many repetitions, or one very long
// instance, of a construct that could cost a decoder much memory.
func hostileBodies() []hostileBody {
	const size = hostileSize
	repeat := func(s string) []byte { return bytes.Repeat([]byte(s), size/len(s)) }
	fill := func(frame func(n int) []byte) []byte { return frame(size - 64) }
	var labels []byte // 100 labels, together nearly 64 KiB
	for i := range 100 {
		labels = append(labels, pbLabel(fmt.Sprintf("label%d", i), strings.Repeat("x", 600))...)
	}
	histogram := func(n int, labels []byte) []byte {
		return pbOne("a", 4, labels, pbBytes(7, bytes.Repeat(pbBytes(3), n)))
	}
	return []hostileBody{
		{"empty families", repeat("\x00"), FormatProto, ""},
		{"empty metrics", fill(func(n int) []byte { return pbFrame(bytes.Repeat([]byte{4<<3 | 2, 0}, n/2)) }), FormatProto, "no value"},
		{"empty counters", fill(func(n int) []byte {
			return pbFrame(pbBytes(1, []byte("a")), bytes.Repeat([]byte{4<<3 | 2, 2, 3<<3 | 2, 0}, n/4))
		}), FormatProto, ""},
		{"empty labels", fill(func(n int) []byte { return pbOne("a", 0, bytes.Repeat([]byte{1<<3 | 2, 0}, n/2)) }), FormatProto, "128 labels"},
		{"empty unknown fields", fill(func(n int) []byte { return pbFrame(bytes.Repeat([]byte{9<<3 | 2, 0}, n/2)) }), FormatProto, ""},
		{"100,000 buckets of long labels", histogram(100_000, labels), FormatProto, "too large"},
		{"as many buckets as fit", histogram(size/2-40_000, labels), FormatProto, "too large"},
		{"as many buckets as fit, without labels", histogram(size/2-64, nil), FormatProto, ""},
		{"a label that fills the body", fill(func(n int) []byte { return pbOne("a", 0, pbLabel("b", strings.Repeat("\"", n)), pbBytes(3)) }), FormatProto, "too large"},
		{"a name that fills the body", fill(func(n int) []byte { return pbOne(strings.Repeat("\n", n), 4, pbBytes(7)) }), FormatProto, "too large"},
		{"a line without a newline", repeat("x"), FormatText, "truncated"},
		{"a line with a newline", append(repeat("x"), '\n'), FormatText, "too large"},
		{"a comment", append(repeat("#"), '\n'), FormatText, ""},
		{"braces", append(repeat("{"), '\n'), FormatText, "too large"},
		{"lines of braces", repeat("{\n"), FormatText, "do not end"},
		{"quotes", append(append([]byte("a{b="), repeat("\"")...), '\n'), FormatText, "too large"},
		{"escapes", append([]byte(`a{b="`+strings.Repeat(`\"`, 65_000)+`"} 1`), '\n'), FormatText, ""},
		{"newlines", repeat("\n"), FormatText, ""},
		{"short lines", repeat("a 1\n"), FormatText, ""},
		{"TYPE lines", append(repeat("# TYPE a counter\n"), "# EOF\n"...), FormatOpenMetrics, ""},
		{"a TYPE line", append(append([]byte("# TYPE \""), repeat("x")...), "\" counter\n# EOF\n"...), FormatOpenMetrics, ""},
	}
}

// Decoding a hostile body of up to 8 MiB allocates at most 2 MiB. If the samples are also added to
// a list with limits, decoding and adding together allocate at most 8 MiB.
func TestSweepHostileBodies(t *testing.T) {
	sweep(t)
	for _, c := range hostileBodies() {
		var err error
		used := allocated(func() {
			var d Decoder
			_, err = d.Decode(c.body, c.f, func(*RawSample) error { return nil })
		})
		if (err == nil) != (c.want == "") || err != nil && (!strings.Contains(err.Error(), c.want) || len(err.Error()) > 2000) {
			t.Errorf("%s: got error %.500v, want one with %q", c.name, err, c.want)
		}
		if used > 2<<20 {
			t.Errorf("%s: decoding allocated %d bytes, want at most 2 MiB", c.name, used)
		}
		p := SampleList{MaxBytes: 1 << 20, MaxSamples: 10_000}
		used = allocated(func() {
			var d Decoder
			_, err = d.Decode(c.body, c.f, p.Add)
		})
		if used > hostileSize || cap(p.Arena) > 4<<20 || len(p.Samples) > p.MaxSamples {
			t.Errorf("%s, with a limited list: %d bytes allocated, %d of them for the arena; %d samples (%.200v)", c.name, used, cap(p.Arena), len(p.Samples), err)
		}
	}
}

// A Decoder that has decoded a body with 50 samples before makes at most five allocations when it
// decodes that body again.
func TestDecodeAllocatesNothing(t *testing.T) {
	var d Decoder
	var text bytes.Buffer
	var fams []*dto.MetricFamily
	for i := range 50 {
		f := protoFamily(fmt.Sprint("a", i), dto.MetricType_COUNTER, &dto.Metric{Label: []*dto.LabelPair{{Name: new("b"), Value: new("c\n")}}, Counter: &dto.Counter{Value: new(1.5)}})
		fams = append(fams, f)
		if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
			t.Fatal(err)
		}
	}
	for f, body := range map[Format][]byte{FormatText: text.Bytes(), FormatProto: protoBody(t, fams...)} {
		var p SampleList
		n := testing.AllocsPerRun(20, func() {
			p.Reset()
			if _, err := d.Decode(body, f, p.Add); err != nil || len(p.Samples) != 50 {
				t.Fatal(err)
			}
		})
		if n > 5 {
			t.Errorf("format %d: %v allocations for 50 samples, want at most 5", f, n)
		}
	}
}

// fuzzPath decodes a body as format f, normalizes its samples, adds them to a list, and checks the
// list with expoCheck. It fails the test if too much memory is allocated, if an error is too long,
// or if an accepted sample lacks the cluster ID or has a reserved name.
func fuzzPath(t *testing.T, body []byte, f Format) {
	n := ServerNormalizer{Elide: []string{"elide"}, Labels: []Label{{[]byte("operator"), []byte("o")}}}
	forced, use := n.ForcedLabels("site", map[string]string{"token": "t"}), n.NewUse()
	p := SampleList{MaxBytes: 64<<10 + 16*len(body), MaxSamples: 1000}
	var err error
	used := allocated(func() {
		var d Decoder
		_, err = d.Decode(body, f, func(r *RawSample) error {
			if drop, err := n.Normalize(r, forced, &use); err != nil || drop != "" {
				return err
			}
			if !r.HasT {
				r.T = 5
			}
			_, err := p.AddUnlessRepeated(r)
			return err
		})
	})
	// The list p grows in steps, so that the allocations are a few times its limits. If a length in
	// the body were not checked before allocation, it could cost 4 GiB.
	if used > uint64(2<<20+64*len(body)) {
		t.Fatalf("%d bytes allocated for a body of %d bytes", used, len(body))
	}
	if err != nil && len(err.Error()) > 4000 {
		t.Fatalf("the error has %d bytes, want at most 4,000", len(err.Error()))
	}
	var parser SeriesParser
	for _, s := range p.Samples {
		name, labels, err := parser.ParseLine(p.Line(s))
		if err != nil || isReservedMetricName(name) || string(labelValue(labels, ClusterLabel)) != "site" {
			t.Fatalf("line %q is accepted with a reserved name or without the cluster ID: %v", p.Line(s), err)
		}
	}
	expoUnique(&p)
	expoCheck(t, &p)
	checkKnown(t, body, f)
}

// Any body, decoded as text exposition, passes the checks of fuzzPath. If Decoder and expfmt's
// decoder both accept the body, they return the same samples. Bodies with comments or overflowing
// timestamps are not compared.
func FuzzDecodeText(f *testing.F) {
	for _, s := range []string{"a{b=\"c\"} 1 5\n", "{\"a.b\",\"c.d\"=\"e\\n\"} NaN\na_b{c_d=\"e\\n\"} 2\n", "# TYPE a counter\na 1\na 1 2\n", "{\"a:.\",\"c:d\"=\"\"} -0 -1\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		fuzzPath(t, body, FormatText)
		// Bodies with comments are not compared, because expfmt's decoder interprets HELP and TYPE
		// lines and Decoder does not.
		if got, err := decodedAsOracle(body, FormatText); err == nil && !bytes.Contains(body, []byte("# ")) && !bytes.Contains(body, []byte("#\t")) {
			want, err := oracle(body, expfmt.FmtText)
			if err == nil && !slices.Equal(got, want) && !overflowingTimestamp(body) {
				t.Fatalf("got %q\nwant %q", got, want)
			}
		}
	})
}

// overflowingTimestamp reports whether the body has a timestamp that expfmt's decoder decodes to a
// wrong value. That decoder multiplies timestamps by a million, which can overflow.
func overflowingTimestamp(body []byte) bool {
	over := false
	new(Decoder).Decode(body, FormatText, func(r *RawSample) error {
		over = over || r.HasT && (r.T > math.MaxInt64/1_000_000 || r.T < math.MinInt64/1_000_000)
		return nil
	})
	return over
}

// Any body, decoded as OpenMetrics, passes the checks of fuzzPath on memory, errors and accepted
// samples.
func FuzzDecodeOpenMetrics(f *testing.F) {
	for _, s := range []string{"# TYPE a counter\na_total 1 2.5 # {x=\"y\"} 1\na_created 2\n# EOF\n", "# TYPE \"a.b\" counter\n{\"a.b_created\"} 2\n# EOF", "a 1 -1e5\n# EOF\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) { fuzzPath(t, body, FormatOpenMetrics) })
}

// Any body, decoded as protobuf, passes the checks of fuzzPath on memory, errors and accepted
// samples.
func FuzzDecodeProto(f *testing.F) {
	f.Add(pbOne("a.b", 0, pbLabel("c.d", "e"), pbBytes(3, pbFloat(1, 1)), pbVarint(6, 5)))
	f.Add(pbOne("a", 4, pbLabel("b", "c"), pbBytes(7, pbVarint(1, 5), pbBytes(3, pbFloat(2, 1)), pbVarint(5, 1))))
	f.Add(pbOne("a", 2, pbBytes(4, pbVarint(1, 5), pbBytes(3, pbFloat(1, 0.5)))))
	f.Add([]byte{0x80, 0x80, 0x80, 0x80, 0x04})
	f.Fuzz(func(t *testing.T, body []byte) { fuzzPath(t, body, FormatProto) })
}
