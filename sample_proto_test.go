package main

// Tests of decoding protobuf. Some messages are encoded with client_model's types. Others are
// written byte by byte, because no encoder would write them.

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
)

// Each type of metric is decoded to its samples; for histograms and summaries these are buckets or
// quantiles, sum and count. Exemplars, created timestamps and native histograms are skipped and
// counted.
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
		want    []string // the samples, in the form that the function decoded returns
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

// counterOf1 is the field of a Metric message that holds a counter of value 1. oneCounter is a body
// with one such counter, named a.
var (
	counterOf1 = pbBytes(3, pbFloat(1, 1))
	oneCounter = pbOne("a", 0, counterOf1)
)

// manyProtoLabels returns n label fields of a Metric message, with different names and empty
// values.
func manyProtoLabels(n int) (b []byte) {
	for i := range n {
		b = append(b, pbLabel(fmt.Sprint("l", i), "")...)
	}
	return b
}

// Valid messages that no encoder writes are decoded: messages with fields in any order, unknown
// fields, missing values, or counts as floats.
func TestDecodeUnusualProto(t *testing.T) {
	unknown := bytes.Join([][]byte{pbVarint(1000, 1<<63), pbFloat(99, 1), pbBytes(98, []byte("x")), {97<<3&0x7f | 0x80 | 5, 6, 1, 2, 3, 4}}, nil)
	for _, c := range []struct {
		body []byte
		want []string // the samples, in the form that the function decoded returns
	}{
		{nil, nil},
		{[]byte{0, 0}, nil}, // two empty families
		{oneCounter, []string{"a 1 -"}},
		{pbFrame(pbBytes(4, counterOf1), pbBytes(1, []byte("a"))), []string{"a 1 -"}}, // the metric is before the name, because fields can have any order
		{pbFrame(unknown, pbBytes(1, []byte("a")), unknown, pbBytes(4, unknown, counterOf1, unknown), unknown), []string{"a 1 -"}},
		{pbOne("a", 0, pbBytes(3)), []string{"a 0 -"}},
		{pbOne("a", 4, pbBytes(7, pbFloat(4, 0), pbVarint(1, 5), pbBytes(3, pbFloat(4, -1), pbVarint(1, 3), pbFloat(2, 1)))),
			[]string{`a_bucket{le="1"} 3 -`, `a_bucket{le="+Inf"} 5 -`, "a_sum 0 -", "a_count 5 -"}}, // a count as a float is used only if it is above 0
		{pbOne("a", 4, pbBytes(7, pbFloat(4, 2.5), pbVarint(1, 5))), []string{`a_bucket{le="+Inf"} 2.5 -`, "a_sum 0 -", "a_count 2.5 -"}},
		{pbOne("a", 0, pbBytes(2, pbFloat(1, 9)), counterOf1), []string{"a 1 -"}}, // the gauge is ignored, because the family has counters
	} {
		checkDecoded(t, c.body, FormatProto, c.want, UnsupportedParts{}, nil)
	}
	if got, _, err := decoded(pbOne("a", 0, manyProtoLabels(MaxLabels), counterOf1), FormatProto); err != nil || len(got) != 1 {
		t.Errorf("metric with %d labels: %d samples, %v", MaxLabels, len(got), err)
	}
}

// Truncated, malformed and oversized messages are refused. The error names the family by its
// number, the series if it is known, and the fault.
func TestDecodeProtoRefuses(t *testing.T) {
	long := strings.Repeat("x", MaxLine)
	for _, c := range []struct {
		body []byte
		want []string // texts that the error must contain
	}{
		{[]byte{0x80, 0x80, 0x80, 0x80, 0x04}, []string{"family 1", "truncated"}}, // the five bytes state a length of 1 GiB
		{append(slices.Clip(oneCounter), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01), []string{"family 2", "truncated"}},
		{bytes.Repeat([]byte{0xff}, 11), []string{"family 1", "truncated"}},
		{pbFrame([]byte{4<<3 | 2, 0x80, 0x80, 0x80, 0x80, 0x04}), []string{"family 1", "malformed"}},
		{pbFrame([]byte{0}), []string{"family 1", "malformed"}},      // field number 0 is invalid
		{pbFrame([]byte{1<<3 | 3, 1<<3 | 4}), []string{"malformed"}}, // a group; the schema has no groups
		{pbFrame([]byte{50<<3&0x7f | 3}), []string{"malformed"}},     // the beginning of a group
		{pbFrame([]byte{1<<3 | 6}), []string{"malformed"}},           // wire type 6 does not exist
		{pbFrame([]byte{1<<3 | 7}), []string{"malformed"}},           // wire type 7 does not exist
		{pbFrame([]byte{3 << 3}), []string{"malformed"}},             // a varint field without a value
		{pbFrame([]byte{9<<3 | 1, 1, 2, 3}), []string{"malformed"}},  // a truncated fixed64
		{pbFrame([]byte{9<<3 | 5, 1, 2, 3}), []string{"malformed"}},  // a truncated fixed32
		{pbOne("a", 0), []string{"family 1", `series "a"`, "no value of metric type 0"}},
		{pbOne("a", 1, counterOf1), []string{"no value of metric type 1"}},
		{pbOne("a", 6, counterOf1), []string{"family 1", `series "a"`, "unknown metric type 6"}},
		{pbOne("a", 1<<63, counterOf1), []string{"unknown metric type"}},
		{pbOne("a", 0, pbVarint(3, 1)), []string{"malformed"}}, // the field for the counter is a varint instead of a message
		{pbOne("a", 0, pbLabel("b", "c"), counterOf1[:3]), []string{"family 1", `series "a{b=\"c\"}"`, "malformed"}},
		{pbOne("a", 0, pbBytes(1, []byte{1<<3 | 2, 9}), counterOf1), []string{"malformed"}},
		{pbOne("a", 2, pbBytes(4, pbBytes(3, []byte{9}))), []string{"malformed"}},
		{pbOne("a", 4, pbBytes(7, pbBytes(3, []byte{9}))), []string{"malformed"}},
		{pbOne("", 0, counterOf1), []string{"family 1", "no metric name"}},
		{pbFrame(pbVarint(1, 5), pbBytes(4, counterOf1)), []string{"no metric name"}},
		{pbOne("a\xff", 0, counterOf1), []string{"family 1", "not UTF-8"}},
		{pbOne("a\x00", 0, counterOf1), []string{"NUL"}},
		{pbOne("a", 0, pbLabel("b", "c"), pbLabel("b", "d"), counterOf1), []string{"family 1", `series "a{b=\"c\",b=\"d\"}"`, `label "b" occurs twice`}},
		{pbOne("a", 4, pbLabel("le", "1"), pbBytes(7)), []string{`label "le" occurs twice`}},
		{pbOne("a", 0, pbLabel("__name__", "c"), counterOf1), []string{"reserved"}},
		{pbOne("a", 0, pbLabel("", "c"), counterOf1), []string{"empty label name"}},
		{pbOne("a", 0, pbBytes(1), counterOf1), []string{"empty label name"}},
		{pbOne("a", 0, pbLabel("b", "\xff"), counterOf1), []string{"not UTF-8"}},
		{pbOne("a", 0, pbLabel("\xff", ""), counterOf1), []string{"not UTF-8"}},
		{pbOne("a", 0, pbLabel("b", "\x00"), counterOf1), []string{"NUL"}},
		{pbOne("a", 0, manyProtoLabels(129), counterOf1), []string{"family 1", "too large", "128 labels"}},
		{pbOne("a", 4, manyProtoLabels(128), pbBytes(7)), []string{"too large", "128 labels"}}, // with the label le there are 129 labels
		{pbOne("a", 0, pbLabel("b", long), counterOf1), []string{"too large", "65535"}},
		{pbOne(long+"x", 0, counterOf1), []string{"too large", "65535"}},
		{append(slices.Clip(oneCounter), pbOne("a", 0, pbLabel("b", strings.Repeat("\xff", 60000)), counterOf1)...), []string{"family 2", "not UTF-8"}},
	} {
		checkDecoded(t, c.body, FormatProto, nil, UnsupportedParts{}, c.want)
	}
}

// A protobuf body that is cut off within a family is an error. A body that is cut off between two
// families is valid, because the format has no end marker.
func TestDecodeProtoTruncatedAnywhere(t *testing.T) {
	body := append(slices.Clip(oneCounter), pbOne("b", 4, pbLabel("c", "d"), pbBytes(7, pbVarint(1, 5), pbBytes(3, pbFloat(2, 1))))...)
	for i := range body {
		if _, _, err := decoded(body[:i], FormatProto); (err == nil) != (i == 0 || i == len(oneCounter)) {
			t.Errorf("first %d of %d bytes: got error %v", i, len(body), err)
		}
	}
}

// BenchmarkDecodeProto decodes a body of 100 counters, and a body with a histogram of 30 buckets.
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
