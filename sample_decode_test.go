package main

// Decoding of each form of a body, compared with expfmt's decoder on generated families. A
// hostile body costs no memory beyond the limits. Fuzz targets cover the whole path from a body
// to a scraper's answer.

import (
	"bytes"
	"encoding/binary"
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

func TestParseFormat(t *testing.T) {
	for _, c := range []struct {
		contentType string
		want        Format // -1 is refused
	}{
		{"", FormatText},
		{"application/x-www-form-urlencoded", FormatText}, // curl --data-binary
		{"text/plain", FormatText},
		{"Text/Plain; charset=utf-8", FormatText},
		{"text/plain; version=0.0.4; charset=utf-8; escaping=underscores", FormatText},
		{"text/plain; version=1.0.0; escaping=allow-utf-8", FormatText},
		{"application/openmetrics-text", FormatOpenMetrics},
		{"application/openmetrics-text; version=0.0.1", FormatOpenMetrics},
		{"application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores", FormatOpenMetrics},
		{string(expfmt.FmtProtoDelim), FormatProto},
		{"application/vnd.google.protobuf", FormatProto},
		{"text/plain; version=0.0.3", -1},
		{"application/openmetrics-text; version=2.0.0", -1},
		{string(expfmt.FmtProtoText), -1},
		{string(expfmt.FmtProtoCompact), -1},
		{"application/vnd.google.protobuf; proto=other; encoding=delimited", -1},
		{"application/x-protobuf", -1}, // remote write
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
				t.Errorf("%.80q: %.600v", c.contentType, err)
			}
		}
		if got != c.want {
			t.Errorf("%.80q: %v, want %v (%.200v)", c.contentType, got, c.want, err)
		}
	}
}

// decoded makes of a body "line value time" for each sample, time being - without.
func decoded(body []byte, f Format) (samples []string, skipped UnsupportedParts, err error) {
	var d Decoder
	var p SampleList
	skipped, err = d.Decode(body, f, func(r *RawSample) error {
		if err := p.Add(r); err != nil {
			return err
		}
		s := p.Samples[len(p.Samples)-1]
		at := "-"
		if r.HasT {
			at = fmt.Sprint(r.T)
		}
		samples = append(samples, fmt.Sprintf("%s %v %s", p.Line(s), s.V, at))
		return nil
	})
	return samples, skipped, err
}

// checkDecoded compares with want: the samples, or all that an error has to say.
func checkDecoded(t *testing.T, body []byte, f Format, want []string, wantSkipped UnsupportedParts, wantErr []string) {
	t.Helper()
	got, skipped, err := decoded(body, f)
	if len(wantErr) > 0 {
		for _, w := range wantErr {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%.80q: error %.300v, want it to say %s", body, err, w)
			}
		}
		if err != nil && len(err.Error()) > 2000 {
			t.Errorf("%.80q: an error of %d bytes", body, len(err.Error()))
		}
		return
	}
	if err != nil || !slices.Equal(got, want) || skipped != wantSkipped {
		t.Errorf("%.200q:\n got %q %+v %v\nwant %q %+v", body, got, skipped, err, want, wantSkipped)
	}
}

func TestDecodeText(t *testing.T) {
	long := strings.Repeat("x", MaxLine)
	for _, c := range []struct {
		body string
		want []string
		err  []string
	}{
		{"", nil, nil},
		{"\n\n \t\n# a comment\n#\n# HELP x y\n# TYPE a what ever\n", nil, nil},
		{"a 1\n", []string{"a 1 -"}, nil},
		{"a 1 5\nb 2\nc 3 7\n", []string{"a 1 5", "b 2 -", "c 3 7"}, nil},
		{" \ta{ b = \"c\" , } \t1\t 5 \t\n", []string{`a{b="c"} 1 5`}, nil},
		{"a{b=\"c\"}1\n", []string{`a{b="c"} 1 -`}, nil},
		{"a:b{z=\"1\",y=\"2\"} 1\n", []string{`a:b{y="2",z="1"} 1 -`}, nil},
		{"{\"a.b\",x=\"y\"} 1\n", []string{`{"a.b",x="y"} 1 -`}, nil},
		{"{x=\"y\",\"a.b\",c=\"d\"} 1\n{x=\"y\",\"a\"} 2\n", []string{`{"a.b",c="d",x="y"} 1 -`, `a{x="y"} 2 -`}, nil},
		{"{\"a.b\"} 1\n{\"a\",\"c.d\"=\"e\"} 2\n", []string{`{"a.b"} 1 -`, `a{"c.d"="e"} 2 -`}, nil},
		{`a{x="\\\"\n\t\x\\n"} 1` + "\n", []string{`a{x="\\\"\n\\t\\x\\n"} 1 -`}, nil}, // only \\ \" \n are escapes
		{"a{x=\"\r\t,}{ # é\"} 1\n", []string{"a{x=\"\r\t,}{ # é\"} 1 -"}, nil},
		{"a +Inf\na -Inf\na inf\na Infinity\na NaN\na nan\n", []string{"a +Inf -", "a -Inf -", "a +Inf -", "a +Inf -", "a NaN -", "a NaN -"}, nil},
		{"a 1e3\na -0\na .5\na 5.\na +1\na 1E-3\na 1e-999\n", []string{"a 1000 -", "a -0 -", "a 0.5 -", "a 5 -", "a 1 -", "a 0.001 -", "a 0 -"}, nil},
		{"a 1 -5\na 1 0\na 1 9223372036854775807\na 1 -9223372036854775808\n",
			[]string{"a 1 -5", "a 1 0", "a 1 9223372036854775807", "a 1 -9223372036854775808"}, nil},
		{"# EOF\na 1\n", []string{"a 1 -"}, nil}, // a comment in this form
		{"# TYPE a counter\na_total 1\na_created 2\n", []string{"a_total 1 -", "a_created 2 -"}, nil},
		{"a_bucket{le=\"0.50\"} 1\n", []string{`a_bucket{le="0.50"} 1 -`}, nil}, // values stay as they are written

		{"a 1", nil, []string{"line 1", "truncated", "newline"}},
		{"a 1\nb 2", nil, []string{"line 2", "truncated"}},
		{"a 1\n# com", nil, []string{"line 2", "truncated"}},
		{"# EOF", nil, []string{"line 1", "truncated"}},
		{"a 1\r\n", nil, []string{"line 1", `series "a 1\r"`, `value "1\r"`}},
		{"\r\na 1\n", nil, []string{"line 1", "no valid metric name"}},
		{"a 1\n\n# x\nb\n", nil, []string{"line 4", `series "b"`, "no value"}},
		{"a 0x1p-2\n", nil, []string{"line 1", `value "0x1p-2" is not a float`}},
		{"a 0x10\n", nil, []string{"is not a float"}},
		{"a 1_000\n", nil, []string{"is not a float"}},
		{"a 1e999\n", nil, []string{"is not a float"}},
		{"a one\n", nil, []string{`"one" is not a float`}},
		{"a 1,5\n", nil, []string{"is not a float"}},
		{"a 1 1.5\n", nil, []string{"line 1", `timestamp "1.5" is not a whole number of milliseconds`}},
		{"a 1 1e3\n", nil, []string{"timestamp"}},
		{"a 1 9223372036854775808\n", nil, []string{"timestamp"}},
		{"a 1 0x5\n", nil, []string{"timestamp"}},
		{"a 1 5 6\n", nil, []string{`unexpected "6" after the sample`}},
		{"a 1 5 # {x=\"y\"} 1\n", nil, []string{"unexpected", "after the sample"}}, // exemplars are OpenMetrics
		{"a 1 # {x=\"y\"} 1\n", nil, []string{"after the sample"}},
		{"a{b=\"c\",b=\"d\"} 1\n", nil, []string{"line 1", `series "a{b=\"c\",b=\"d\"} 1"`, `label "b" occurs twice`}},
		{"a{__name__=\"c\"} 1\n", nil, []string{"reserved"}},
		{"a{\"\"=\"c\"} 1\n", nil, []string{"empty label name"}},
		{"a{b=\"\xff\"} 1\n", nil, []string{"line 1", "not UTF-8"}},
		{"{\"\xff\"} 1\n", nil, []string{"metric name", "not UTF-8"}},
		{"\xff 1\n", nil, []string{"no valid metric name"}},
		{"a{b=\"\x00\"} 1\n", nil, []string{"NUL"}},
		{"a\x00 1\n", nil, []string{"unexpected '\\x00'"}},
		{"a{b=\"c\n\"} 1\n", nil, []string{"line 1", "does not end"}},
		{"<html>\n", nil, []string{"line 1", `"<html>"`, "no valid metric name"}},
		{"a{x=\"" + long + "\"} 1\n", nil, []string{"line 1", "too large", "at most 65535"}},
		{"a{x=\"" + long + long + "\"} 1\n", nil, []string{"line 1", "too large"}},
		{"a " + long + "\n", nil, []string{"line 1", "is not a float"}},
		{"a 1 " + long + "\n", nil, []string{"timestamp"}},
		{"a 1 1 " + long + "\n", nil, []string{"after the sample"}},
		{"a{x=\"" + strings.Repeat("\xff", 60000) + "\"} 1\n", nil, []string{"not UTF-8"}},
		{"a{" + strings.Repeat("b=\"\",", 129) + "} 1\n", nil, []string{"too large", "128 labels"}},
	} {
		checkDecoded(t, []byte(c.body), FormatText, c.want, UnsupportedParts{}, c.err)
	}
}

func TestDecodeOpenMetrics(t *testing.T) {
	for _, c := range []struct {
		body    string
		want    []string
		skipped UnsupportedParts
		err     []string
	}{
		{"# EOF\n", nil, UnsupportedParts{}, nil},
		{"# EOF", nil, UnsupportedParts{}, nil}, // the newline is optional by its ABNF's last rule
		{"a 1\n# EOF", []string{"a 1 -"}, UnsupportedParts{}, nil},
		{"# TYPE a gauge\n# UNIT a_s s\n# HELP a b\na 1 1520879607.789\n# EOF\n", []string{"a 1 1520879607789"}, UnsupportedParts{}, nil},
		{"a 1 1.0005\na 1 -1.5\na 1 0\na 1 1e3\na 1 1e12\n# EOF\n", []string{"a 1 1001", "a 1 -1500", "a 1 0", "a 1 1000000", "a 1 1000000000000000"}, UnsupportedParts{}, nil},
		{"a_total 1 # {trace_id=\"x\"} 0.5\na_total{b=\"#\"} 2 3 # {} 1 2\n# EOF\n", []string{"a_total 1 -", `a_total{b="#"} 2 3000`}, UnsupportedParts{Exemplars: 2}, nil},
		{"# TYPE a counter\na_total 1\na_created 2\na_created{b=\"c\"} 2\n# TYPE b histogram\nb_created 1\n# TYPE c summary\nc_created 1\n# EOF\n",
			[]string{"a_total 1 -"}, UnsupportedParts{Created: 4}, nil},
		{"# TYPE a gauge\na_created 2\nb_created 3\n# TYPE c counter\nb_created 4\n# EOF\n",
			[]string{"a_created 2 -", "b_created 3 -", "b_created 4 -"}, UnsupportedParts{}, nil}, // somebody's gauges
		{"# TYPE a counter\na_created 1\n# TYPE b gauge\na_created 1\n# EOF\n", []string{"a_created 1 -"}, UnsupportedParts{Created: 1}, nil},
		{"# TYPE \"a.b c\" counter\n{\"a.b c_total\"} 1\n{\"a.b c_created\"} 2\n# EOF\n", []string{`{"a.b c_total"} 1 -`}, UnsupportedParts{Created: 1}, nil},
		{"# TYPE \"a\\\n# TYPE \" counter\n# TYPE counter\n# TYPE a\na 1\n# EOF\n", []string{"a 1 -"}, UnsupportedParts{}, nil},

		{"", nil, UnsupportedParts{}, []string{"truncated", "# EOF"}},
		{"a 1\n", nil, UnsupportedParts{}, []string{"truncated", "# EOF"}},
		{"a 1\n# EOF\r\n", nil, UnsupportedParts{}, []string{"truncated", "# EOF"}},
		{"a 1\n# EO", nil, UnsupportedParts{}, []string{"line 2", "truncated"}},
		{"a 1\n#EOF\n", nil, UnsupportedParts{}, []string{"truncated"}},
		{"a 1\n# EOF\na 2\n", nil, UnsupportedParts{}, []string{"line 3", "content after # EOF"}},
		{"# EOF\n\n", nil, UnsupportedParts{}, []string{"line 2", "content after # EOF"}},
		{"# EOF\n# EOF\n", nil, UnsupportedParts{}, []string{"content after # EOF"}},
		{"a 1\nb 1", nil, UnsupportedParts{}, []string{"line 2", "truncated"}},
		{"a 1 NaN\n# EOF\n", nil, UnsupportedParts{}, []string{"line 1", `timestamp "NaN" is not a number of seconds`}},
		{"a 1 Inf\n# EOF\n", nil, UnsupportedParts{}, []string{"timestamp"}},
		{"a 1 1e13\n# EOF\n", nil, UnsupportedParts{}, []string{"timestamp"}},
		{"a 1 -1e300\n# EOF\n", nil, UnsupportedParts{}, []string{"timestamp"}},
		{"a 1 now\n# EOF\n", nil, UnsupportedParts{}, []string{"timestamp"}},
		{"a 1 2 3\n# EOF\n", nil, UnsupportedParts{}, []string{"after the sample"}},
		{"a\n# EOF\n", nil, UnsupportedParts{}, []string{"no value"}},
		{"a # {} 1\n# EOF\n", nil, UnsupportedParts{}, []string{"is not a float"}},
	} {
		checkDecoded(t, []byte(c.body), FormatOpenMetrics, c.want, c.skipped, c.err)
	}
}

// Protobuf by hand, for what no encoder writes.
func pbVarint(num int, u uint64) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(nil, uint64(num)<<3), u)
}

func pbFloat(num int, v float64) []byte {
	return binary.LittleEndian.AppendUint64(binary.AppendUvarint(nil, uint64(num)<<3|1), math.Float64bits(v))
}

func pbBytes(num int, parts ...[]byte) []byte {
	data := bytes.Join(parts, nil)
	b := binary.AppendUvarint(nil, uint64(num)<<3|2)
	return append(binary.AppendUvarint(b, uint64(len(data))), data...)
}

func pbLabel(name, value string) []byte {
	return pbBytes(1, pbBytes(1, []byte(name)), pbBytes(2, []byte(value)))
}

// pbFrame is a family with its length before it.
func pbFrame(parts ...[]byte) []byte {
	data := bytes.Join(parts, nil)
	return append(binary.AppendUvarint(nil, uint64(len(data))), data...)
}

// pbOne is a family of one metric.
func pbOne(name string, kind uint64, metric ...[]byte) []byte {
	return pbFrame(pbBytes(1, []byte(name)), pbVarint(3, kind), pbBytes(4, metric...))
}

// zeroOf makes a message of p's type; some types cannot be named here.
func zeroOf[T any](*T) *T { return new(T) }

func protoFamily(name string, kind dto.MetricType, metrics ...*dto.Metric) *dto.MetricFamily {
	return &dto.MetricFamily{Name: &name, Help: new("help"), Type: &kind, Metric: metrics}
}

func TestDecodeProto(t *testing.T) {
	labels := []*dto.LabelPair{{Name: new("z"), Value: new("1")}, {Name: new("a"), Value: new("\"2\n")}}
	exemplar := &dto.Exemplar{Value: new(1.0), Label: labels}
	counter := &dto.Counter{Value: new(3.0), Exemplar: exemplar}
	counter.CreatedTimestamp = zeroOf(counter.CreatedTimestamp)
	summary := &dto.Summary{SampleCount: new(uint64(4)), SampleSum: new(math.Inf(-1)),
		Quantile: []*dto.Quantile{{Quantile: new(0.5), Value: new(math.NaN())}, {Quantile: new(1.0), Value: new(7.5)}}}
	summary.CreatedTimestamp = zeroOf(summary.CreatedTimestamp)
	histogram := &dto.Histogram{SampleCount: new(uint64(9)), SampleSum: new(2.5), Bucket: []*dto.Bucket{
		{CumulativeCount: new(uint64(1)), UpperBound: new(0.1), Exemplar: exemplar}, {CumulativeCount: new(uint64(8)), UpperBound: new(1e6)}}}
	histogram.CreatedTimestamp = zeroOf(histogram.CreatedTimestamp)
	whole := &dto.Histogram{SampleCount: new(uint64(9)), Bucket: []*dto.Bucket{{CumulativeCount: new(uint64(9)), UpperBound: new(math.Inf(1))}}}
	float := &dto.Histogram{SampleCountFloat: new(1.5), SampleSum: new(2.0), Bucket: []*dto.Bucket{{CumulativeCountFloat: new(0.5), UpperBound: new(-1.0)}}}
	native := &dto.Histogram{SampleCount: new(uint64(2)), SampleSum: new(3.0), Schema: new(int32(3)), ZeroThreshold: new(1e-9),
		PositiveSpan: []*dto.BucketSpan{{Offset: new(int32(0)), Length: new(uint32(1))}}, PositiveDelta: []int64{2}, Exemplars: []*dto.Exemplar{exemplar, exemplar}}
	both := &dto.Histogram{SampleCount: new(uint64(2)), SampleSum: new(3.0), Schema: new(int32(3)), ZeroThreshold: new(1e-9),
		Bucket: []*dto.Bucket{{CumulativeCount: new(uint64(1)), UpperBound: new(1.0)}}}
	for _, c := range []struct {
		fam     *dto.MetricFamily
		want    []string
		skipped UnsupportedParts
	}{
		{protoFamily("a", dto.MetricType_COUNTER, &dto.Metric{Label: labels, Counter: counter, TimestampMs: new(int64(-5))}),
			[]string{`a{a="\"2\n",z="1"} 3 -5`}, UnsupportedParts{Exemplars: 1, Created: 1}},
		{protoFamily("a.b", dto.MetricType_GAUGE, &dto.Metric{Gauge: &dto.Gauge{Value: new(math.Inf(1))}}, &dto.Metric{Gauge: &dto.Gauge{}, TimestampMs: new(int64(math.MaxInt64))}),
			[]string{`{"a.b"} +Inf -`, `{"a.b"} 0 9223372036854775807`}, UnsupportedParts{}},
		{protoFamily("a", dto.MetricType_UNTYPED, &dto.Metric{Untyped: &dto.Untyped{Value: new(math.NaN())}}), []string{"a NaN -"}, UnsupportedParts{}},
		{&dto.MetricFamily{Name: new("a"), Metric: []*dto.Metric{{Counter: &dto.Counter{Value: new(1.0)}}}}, []string{"a 1 -"}, UnsupportedParts{}},
		{protoFamily("a", dto.MetricType_SUMMARY, &dto.Metric{Label: labels[:1], Summary: summary, TimestampMs: new(int64(5))}),
			[]string{`a{quantile="0.5",z="1"} NaN 5`, `a{quantile="1",z="1"} 7.5 5`, `a_sum{z="1"} -Inf 5`, `a_count{z="1"} 4 5`}, UnsupportedParts{Created: 1}},
		{protoFamily("a", dto.MetricType_HISTOGRAM, &dto.Metric{Label: labels[:1], Histogram: histogram}),
			[]string{`a_bucket{le="0.1",z="1"} 1 -`, `a_bucket{le="1e+06",z="1"} 8 -`, `a_bucket{le="+Inf",z="1"} 9 -`, `a_sum{z="1"} 2.5 -`, `a_count{z="1"} 9 -`},
			UnsupportedParts{Exemplars: 1, Created: 1}},
		{protoFamily("a.b", dto.MetricType_HISTOGRAM, &dto.Metric{Histogram: whole}),
			[]string{`{"a.b_bucket",le="+Inf"} 9 -`, `{"a.b_sum"} 0 -`, `{"a.b_count"} 9 -`}, UnsupportedParts{}},
		{protoFamily("a", dto.MetricType_GAUGE_HISTOGRAM, &dto.Metric{Histogram: float}),
			[]string{`a_bucket{le="-1"} 0.5 -`, `a_bucket{le="+Inf"} 1.5 -`, `a_sum 2 -`, `a_count 1.5 -`}, UnsupportedParts{}},
		{protoFamily("a", dto.MetricType_HISTOGRAM, &dto.Metric{Histogram: native}), nil, UnsupportedParts{Exemplars: 2, NativeHistograms: 1}},
		{protoFamily("a", dto.MetricType_HISTOGRAM, &dto.Metric{Histogram: both}),
			[]string{`a_bucket{le="1"} 1 -`, `a_bucket{le="+Inf"} 2 -`, `a_sum 3 -`, `a_count 2 -`}, UnsupportedParts{NativeHistograms: 1}},
	} {
		checkDecoded(t, protoBody(t, c.fam), FormatProto, c.want, c.skipped, nil)
	}
}

func TestDecodeProtoByHand(t *testing.T) {
	value := pbBytes(3, pbFloat(1, 1)) // a counter of 1
	unknown := bytes.Join([][]byte{pbVarint(1000, 1<<63), pbFloat(99, 1), pbBytes(98, []byte("x")), {97<<3&0x7f | 0x80 | 5, 6, 1, 2, 3, 4}}, nil)
	many := func(n int) (b []byte) {
		for i := range n {
			b = append(b, pbLabel(fmt.Sprint("l", i), "")...)
		}
		return b
	}
	long := strings.Repeat("x", MaxLine)
	ok := pbOne("a", 0, value)
	for _, c := range []struct {
		body []byte
		want []string
		err  []string
	}{
		{nil, nil, nil},
		{[]byte{0, 0}, nil, nil}, // empty families
		{ok, []string{"a 1 -"}, nil},
		{pbFrame(pbBytes(4, value), pbBytes(1, []byte("a"))), []string{"a 1 -"}, nil}, // fields in any order
		{pbFrame(unknown, pbBytes(1, []byte("a")), unknown, pbBytes(4, unknown, value, unknown), unknown), []string{"a 1 -"}, nil},
		{pbOne("a", 0, pbBytes(3)), []string{"a 0 -"}, nil},
		{pbOne("a", 4, pbBytes(7, pbFloat(4, 0), pbVarint(1, 5), pbBytes(3, pbFloat(4, -1), pbVarint(1, 3), pbFloat(2, 1)))),
			[]string{`a_bucket{le="1"} 3 -`, `a_bucket{le="+Inf"} 5 -`, "a_sum 0 -", "a_count 5 -"}, nil}, // a float counts only above zero
		{pbOne("a", 4, pbBytes(7, pbFloat(4, 2.5), pbVarint(1, 5))), []string{`a_bucket{le="+Inf"} 2.5 -`, "a_sum 0 -", "a_count 2.5 -"}, nil},
		{pbOne("a", 0, pbBytes(2, pbFloat(1, 9)), value), []string{"a 1 -"}, nil}, // another type's value is none

		{[]byte{0x80, 0x80, 0x80, 0x80, 0x04}, nil, []string{"family 1", "truncated"}}, // five bytes that state 1 GiB
		{append(slices.Clip(ok), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01), nil, []string{"family 2", "truncated"}},
		{bytes.Repeat([]byte{0xff}, 11), nil, []string{"family 1", "truncated"}},
		{pbFrame([]byte{4<<3 | 2, 0x80, 0x80, 0x80, 0x80, 0x04}), nil, []string{"family 1", "malformed"}},
		{pbFrame([]byte{0}), nil, []string{"family 1", "malformed"}},      // field 0
		{pbFrame([]byte{1<<3 | 3, 1<<3 | 4}), nil, []string{"malformed"}}, // a group
		{pbFrame([]byte{50<<3&0x7f | 3}), nil, []string{"malformed"}},     // a group without end
		{pbFrame([]byte{1<<3 | 6}), nil, []string{"malformed"}},           // wire types that are none
		{pbFrame([]byte{1<<3 | 7}), nil, []string{"malformed"}},           //
		{pbFrame([]byte{3 << 3}), nil, []string{"malformed"}},             // no varint
		{pbFrame([]byte{9<<3 | 1, 1, 2, 3}), nil, []string{"malformed"}},  // short fixed64
		{pbFrame([]byte{9<<3 | 5, 1, 2, 3}), nil, []string{"malformed"}},  // short fixed32
		{pbOne("a", 0), nil, []string{"family 1", `series "a"`, "no value of metric type 0"}},
		{pbOne("a", 1, value), nil, []string{"no value of metric type 1"}},
		{pbOne("a", 6, value), nil, []string{"family 1", `series "a"`, "unknown metric type 6"}},
		{pbOne("a", 1<<63, value), nil, []string{"unknown metric type"}},
		{pbOne("a", 0, pbVarint(3, 1)), nil, []string{"malformed"}}, // a counter that is a number
		{pbOne("a", 0, pbLabel("b", "c"), value[:3]), nil, []string{"family 1", `series "a{b=\"c\"}"`, "malformed"}},
		{pbOne("a", 0, pbBytes(1, []byte{1<<3 | 2, 9}), value), nil, []string{"malformed"}},
		{pbOne("a", 2, pbBytes(4, pbBytes(3, []byte{9}))), nil, []string{"malformed"}},
		{pbOne("a", 4, pbBytes(7, pbBytes(3, []byte{9}))), nil, []string{"malformed"}},
		{pbOne("", 0, value), nil, []string{"family 1", "no metric name"}},
		{pbFrame(pbVarint(1, 5), pbBytes(4, value)), nil, []string{"no metric name"}},
		{pbOne("a\xff", 0, value), nil, []string{"family 1", "not UTF-8"}},
		{pbOne("a\x00", 0, value), nil, []string{"NUL"}},
		{pbOne("a", 0, pbLabel("b", "c"), pbLabel("b", "d"), value), nil, []string{"family 1", `series "a{b=\"c\",b=\"d\"}"`, `label "b" occurs twice`}},
		{pbOne("a", 4, pbLabel("le", "1"), pbBytes(7)), nil, []string{`label "le" occurs twice`}},
		{pbOne("a", 0, pbLabel("__name__", "c"), value), nil, []string{"reserved"}},
		{pbOne("a", 0, pbLabel("", "c"), value), nil, []string{"empty label name"}},
		{pbOne("a", 0, pbBytes(1), value), nil, []string{"empty label name"}},
		{pbOne("a", 0, pbLabel("b", "\xff"), value), nil, []string{"not UTF-8"}},
		{pbOne("a", 0, pbLabel("\xff", ""), value), nil, []string{"not UTF-8"}},
		{pbOne("a", 0, pbLabel("b", "\x00"), value), nil, []string{"NUL"}},
		{pbOne("a", 0, many(129), value), nil, []string{"family 1", "too large", "128 labels"}},
		{pbOne("a", 4, many(128), pbBytes(7)), nil, []string{"too large", "128 labels"}}, // and le
		{pbOne("a", 0, pbLabel("b", long), value), nil, []string{"too large", "65535"}},
		{pbOne(long+"x", 0, value), nil, []string{"too large", "65535"}},
		{append(slices.Clip(ok), pbOne("a", 0, pbLabel("b", strings.Repeat("\xff", 60000)), value)...), nil, []string{"family 2", "not UTF-8"}},
	} {
		checkDecoded(t, c.body, FormatProto, c.want, UnsupportedParts{}, c.err)
	}
	if got, _, err := decoded(pbOne("a", 0, many(128), value), FormatProto); err != nil || len(got) != 1 {
		t.Errorf("128 labels: %v", err)
	}
	// Truncated anywhere it is an error, but for the border between two families.
	body := append(slices.Clip(ok), pbOne("b", 4, pbLabel("c", "d"), pbBytes(7, pbVarint(1, 5), pbBytes(3, pbFloat(2, 1))))...)
	for i := range body {
		if _, _, err := decoded(body[:i], FormatProto); (err == nil) != (i == 0 || i == len(ok)) {
			t.Errorf("%d of %d bytes: %v", i, len(body), err)
		}
	}
}

// Labels that say a metric's type and unit are no part of a series; other reserved
// labels are refused, whether these are there or not.
func TestDecodeMetadataLabels(t *testing.T) {
	value := pbBytes(3, pbFloat(1, 1)) // a counter of 1
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
	for range 2 { // beside as many labels as a series may have
		full = append(full, kind)
	}
	if got, skipped, err := decoded(pbOne("a", 0, append(full, value)...), FormatProto); err != nil || len(got) != 1 || skipped.Metadata != 2 {
		t.Errorf("beside %d labels: %d samples, %+v, %v", MaxLabels, len(got), skipped, err)
	}
}

// What emit changes of a sample must not show in the next one, nor may its error
// be lost.
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
			t.Errorf("got %s, want %s; %v", got, c.want, err)
		}
		stop := errors.New("stop")
		calls := 0
		_, err = d.Decode(c.body, c.f, func(*RawSample) error { calls++; return stop })
		if !errors.Is(err, stop) || calls != 1 || !strings.Contains(err.Error(), "1: series ") {
			t.Errorf("error of emit: %v after %d calls", err, calls)
		}
	}
}

// randomFamilies makes what every encoder and decoder agrees on.
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

const oracleNow = model.Time(1e12)

// oracle is what expfmt decodes body to, in order of its own showing.
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

// On valid input expfmt's decoder and this one agree sample by sample. They are
// meant to differ only where this one is stricter (reserved labels, duplicates,
// truncation, groups, metrics without a value) or as lax as Prometheus (unknown
// escapes), all of which the tables above hold, and in what of protobuf is dropped.
func TestDecodeAgreesWithExpfmt(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
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
				t.Fatalf("seed %d, round %d: the oracle refuses: %v\n%s", seed, n, err, &text)
			}
			got, err := decodedAsOracle(c.body, c.ours)
			if err != nil || !slices.Equal(got, want) {
				t.Fatalf("seed %d, round %d, %s: %v\n got %q\nwant %q\n%s", seed, n, c.its, err, got, want, &text)
			}
		}
	}
}

// allocated is how many bytes f allocates, freed or not.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func TestSweepHostileBodies(t *testing.T) {
	sweep(t)
	const size = 8 << 20 // the most that --limit-bytes lets through, unless raised
	repeat := func(s string) []byte { return bytes.Repeat([]byte(s), size/len(s)) }
	fill := func(frame func(n int) []byte) []byte { return frame(size - 64) }
	var labels []byte // nearly 64 KiB of them
	for i := range 100 {
		labels = append(labels, pbLabel(fmt.Sprintf("label%d", i), strings.Repeat("x", 600))...)
	}
	histogram := func(n int, labels []byte) []byte {
		return pbOne("a", 4, labels, pbBytes(7, bytes.Repeat(pbBytes(3), n)))
	}
	for _, c := range []struct {
		name string
		body []byte
		f    Format
		want string // of the error where every sample is dropped, "" if none
	}{
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
		{"a line", repeat("x"), FormatText, "truncated"},
		{"a line that ends", append(repeat("x"), '\n'), FormatText, "too large"},
		{"a comment", append(repeat("#"), '\n'), FormatText, ""},
		{"braces", append(repeat("{"), '\n'), FormatText, "too large"},
		{"lines of braces", repeat("{\n"), FormatText, "do not end"},
		{"quotes", append(append([]byte("a{b="), repeat("\"")...), '\n'), FormatText, "too large"},
		{"escapes", append([]byte(`a{b="`+strings.Repeat(`\"`, 65_000)+`"} 1`), '\n'), FormatText, ""},
		{"newlines", repeat("\n"), FormatText, ""},
		{"short lines", repeat("a 1\n"), FormatText, ""},
		{"TYPE lines", append(repeat("# TYPE a counter\n"), "# EOF\n"...), FormatOpenMetrics, ""},
		{"a TYPE line", append(append([]byte("# TYPE \""), repeat("x")...), "\" counter\n# EOF\n"...), FormatOpenMetrics, ""},
	} {
		var err error
		used := allocated(func() {
			var d Decoder
			_, err = d.Decode(c.body, c.f, func(*RawSample) error { return nil })
		})
		if (err == nil) != (c.want == "") || err != nil && (!strings.Contains(err.Error(), c.want) || len(err.Error()) > 2000) {
			t.Errorf("%s: %.500v", c.name, err)
		}
		if used > 2<<20 {
			t.Errorf("%s: decoding allocated %d bytes", c.name, used)
		}
		p := SampleList{MaxBytes: 1 << 20, MaxSamples: 10_000}
		used = allocated(func() {
			var d Decoder
			_, err = d.Decode(c.body, c.f, p.Add)
		})
		if used > size || cap(p.Arena) > 4<<20 || len(p.Samples) > p.MaxSamples {
			t.Errorf("%s: %d bytes allocated, of which the arena has %d; %d samples (%.200v)", c.name, used, cap(p.Arena), len(p.Samples), err)
		}
	}
}

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
			t.Errorf("format %d: %v allocations for 50 samples", f, n)
		}
	}
}

// fuzzPath takes a body from its form to what a scraper reads.
func fuzzPath(t *testing.T, body []byte, f Format) {
	n := ServerNormalizer{Elide: []string{"elide"}, Labels: []Label{{[]byte("operator"), []byte("o")}}}
	forced := n.ForcedLabels("site", map[string]string{"token": "t"})
	p := SampleList{MaxBytes: 64<<10 + 16*len(body), MaxSamples: 1000}
	var err error
	used := allocated(func() {
		var d Decoder
		_, err = d.Decode(body, f, func(r *RawSample) error {
			if drop, err := n.Normalize(r, forced); err != nil || drop != "" {
				return err
			}
			if !r.HasT {
				r.T = 5
			}
			return p.Add(r)
		})
	})
	// The limits of p, several times as it grows; a frame's length alone could say 4 GiB.
	if used > uint64(2<<20+64*len(body)) {
		t.Fatalf("%d bytes allocated for %d", used, len(body))
	}
	if err != nil && len(err.Error()) > 4000 {
		t.Fatalf("an error of %d bytes", len(err.Error()))
	}
	var parser SeriesParser
	for _, s := range p.Samples {
		name, labels, err := parser.ParseLine(p.Line(s))
		if err != nil || isReservedMetricName(name) || string(labelValue(labels, ClusterLabel)) != "site" {
			t.Fatalf("accepted %q: %v", p.Line(s), err)
		}
	}
	expoUnique(&p)
	expoCheck(t, &p)
}

func FuzzDecodeText(f *testing.F) {
	for _, s := range []string{"a{b=\"c\"} 1 5\n", "{\"a.b\",\"c.d\"=\"e\\n\"} NaN\na_b{c_d=\"e\\n\"} 2\n", "# TYPE a counter\na 1\na 1 2\n", "{\"a:.\",\"c:d\"=\"\"} -0 -1\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		fuzzPath(t, body, FormatText)
		// Where both take a body, they take the same of it.
		if got, err := decodedAsOracle(body, FormatText); err == nil && !bytes.Contains(body, []byte("# ")) && !bytes.Contains(body, []byte("#\t")) {
			want, err := oracle(body, expfmt.FmtText)
			if err == nil && !slices.Equal(got, want) && !overflowingTimestamp(body) {
				t.Fatalf("got %q\nwant %q", got, want)
			}
		}
	})
}

// overflowingTimestamp says that expfmt, which multiplies timestamps by a million,
// gets one wrong.
func overflowingTimestamp(body []byte) bool {
	over := false
	new(Decoder).Decode(body, FormatText, func(r *RawSample) error {
		over = over || r.HasT && (r.T > math.MaxInt64/1_000_000 || r.T < math.MinInt64/1_000_000)
		return nil
	})
	return over
}

func FuzzDecodeOpenMetrics(f *testing.F) {
	for _, s := range []string{"# TYPE a counter\na_total 1 2.5 # {x=\"y\"} 1\na_created 2\n# EOF\n", "# TYPE \"a.b\" counter\n{\"a.b_created\"} 2\n# EOF", "a 1 -1e5\n# EOF\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) { fuzzPath(t, body, FormatOpenMetrics) })
}

func FuzzDecodeProto(f *testing.F) {
	f.Add(pbOne("a.b", 0, pbLabel("c.d", "e"), pbBytes(3, pbFloat(1, 1)), pbVarint(6, 5)))
	f.Add(pbOne("a", 4, pbLabel("b", "c"), pbBytes(7, pbVarint(1, 5), pbBytes(3, pbFloat(2, 1)), pbVarint(5, 1))))
	f.Add(pbOne("a", 2, pbBytes(4, pbVarint(1, 5), pbBytes(3, pbFloat(1, 0.5)))))
	f.Add([]byte{0x80, 0x80, 0x80, 0x80, 0x04})
	f.Fuzz(func(t *testing.T, body []byte) { fuzzPath(t, body, FormatProto) })
}

func BenchmarkDecodeProto(b *testing.B) {
	var counters, buckets [][]byte
	for i := range 100 {
		counters = append(counters, pbOne("a_total", 0, pbLabel("job", "x"), pbLabel("instance", "localhost:9090"), pbLabel("code", fmt.Sprint(i)), pbLabel("method", "get"), pbBytes(3, pbFloat(1, 5))))
		if i < 30 {
			buckets = append(buckets, pbBytes(3, pbVarint(1, 5), pbFloat(2, float64(i))))
		}
	}
	for _, c := range []struct {
		name string
		body []byte
	}{
		{"counters", slices.Concat(counters...)},
		{"histogram", pbOne("a_seconds", 4, pbLabel("job", "x"), pbLabel("instance", "localhost:9090"), pbBytes(7, buckets...))},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			var d Decoder
			for b.Loop() {
				if _, err := d.Decode(c.body, FormatProto, func(*RawSample) error { return nil }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
