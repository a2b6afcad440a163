package main

// This file decodes delimited protobuf. Every length in a body is checked against the bytes that
// are left in the body. A histogram or a summary is decoded to several samples, its components:
// buckets or quantiles, sum and count. Each component repeats the metric's labels. So the total
// size of these repetitions is limited in proportion to the body.

import (
	"fmt"
	"math"
	"slices"
	"strconv"
)

// Limits on the names and labels that the components of histograms and summaries repeat. All
// components of a body together may repeat 1 MiB plus maxRepeat bytes for each byte of the body. A
// real histogram with 30 buckets and 1,000 bytes of labels repeats 20 to 30 times its size.
const (
	maxRepeat     = 64 // bytes that the components may repeat for each byte of the body
	componentCost = 32 // bytes counted against this limit for each component, besides its name and labels
	labelCost     = 16 // bytes counted against this limit for each label, besides its name and value
)

// protoField is one field of a protobuf message in the wire format
// (protobuf.dev/programming-guides/encoding). This file walks over the fields instead of using
// generated code. Generated code allocates about fifty bytes for an empty message, which has two
// bytes in the body, and a hostile body can consist of empty messages.
type protoField struct {
	number uint64
	value  uint64 // value of a varint, fixed32 or fixed64 field
	data   []byte // content of a length-delimited field; nil for other fields
}

func (f protoField) float() float64 { return math.Float64frombits(f.value) }

// protoMessage iterates over the fields of a protobuf message.
type protoMessage struct{ WireReader }

// next reads the next field of the message into f. It returns false at the end of the message and
// after an error. The method err returns that error.
func (m *protoMessage) next(f *protoField) bool {
	if m.Len() == 0 {
		return false
	}
	tag := m.Uvarint(math.MaxUint64)
	*f = protoField{number: tag >> 3}
	m.Require(f.number > 0)
	switch tag & 7 {
	case 0:
		f.value = m.Uvarint(math.MaxUint64)
	case 1:
		f.value = m.Uint64()
	case 2:
		f.data = m.Bytes(int(m.Uvarint(math.MaxInt)))
	case 5:
		f.value = uint64(m.Uint32())
	default:
		m.Require(false) // fail: the schema has no groups (wire types 3 and 4), and protobuf has no wire types 6 and 7
	}
	return m.Err() == nil
}

// err returns the first error of next, or nil.
func (m *protoMessage) err() error {
	if err := m.Err(); err != nil {
		return fmt.Errorf("malformed protobuf: %w", err)
	}
	return nil
}

// decodeProto decodes a part of a body, which has whole delimited MetricFamily messages. The field
// numbers in this file are from io/prometheus/client/metrics.proto in the module client_model.
func (d *Decoder) decodeProto(body []byte, emit func(*RawSample) error) error {
	r := NewWireReader(body)
	for r.Len() > 0 {
		d.units++
		n, left := d.units, r.Len()
		family := r.Bytes(int(r.Uvarint(math.MaxInt)))
		if r.Err() != nil {
			return fmt.Errorf("family %d: truncated: its frame is longer than the %d bytes left", n, left)
		}
		if err := d.decodeFamily(family, emit); err != nil {
			return fmt.Errorf("family %d: %w", n, err)
		}
	}
	return nil
}

// decodeFamily decodes a MetricFamily message. It iterates over the fields twice, because the
// family's name and type may follow its metrics in the message.
func (d *Decoder) decodeFamily(b []byte, emit func(*RawSample) error) error {
	var name []byte
	var kind uint64 // value of the enum MetricType; the default is 0, a counter
	var f protoField
	m := protoMessage{NewWireReader(b)}
	for m.next(&f) {
		switch f.number {
		case 1:
			name = f.data
		case 3:
			kind = f.value
		}
	}
	if len(name) > MaxLine {
		return fmt.Errorf("%w: the name has %d bytes, limit %d", ErrTooLarge, len(name), MaxLine)
	}
	if err := m.err(); err != nil {
		return err
	}
	var nameHash formHash
	if d.known != nil {
		nameHash = d.known.known.hashName(name)
	}
	for m = (protoMessage{NewWireReader(b)}); m.next(&f); {
		if f.number == 4 {
			if err := d.decodeKnownMetric(f.data, name, nameHash, kind, emit); err != nil {
				return fmt.Errorf("series %s: %w", Excerpt(appendLine(nil, name, d.raw.Labels)), err)
			}
		}
	}
	return nil
}

// Values of the enum MetricType.
const (
	protoCounter, protoGauge   = 0, 1
	protoSummary, protoUntyped = 2, 3
	protoHistogram             = 4
	protoGaugeHistogram        = 5
)

// decodeKnownMetric decodes a Metric message, quickly if the series is known.
func (d *Decoder) decodeKnownMetric(b, name []byte, nameHash formHash, kind uint64, emit func(*RawSample) error) error {
	var m plainMetric
	if d.known == nil || kind != protoCounter && kind != protoGauge && kind != protoUntyped || !m.split(b, byte(valueFields[kind]<<3|2)) {
		return d.decodeMetric(b, name, kind, emit)
	}
	if !m.hasT {
		m.t = d.known.arrival
	}
	h := d.known.known.hashForm(nameHash, m.labels)
	if known, err := d.known.addIfKnown(h, m.t, m.v); known {
		return err
	}
	return d.learn(h, func() error { return d.decodeMetric(b, name, kind, emit) })
}

// valueFields[kind] is the number of the field that holds the value of a metric of this MetricType.
// The types are counter, gauge, summary, untyped, histogram and gauge histogram.
var valueFields = [...]uint64{3, 2, 4, 5, 7, 7}

// decodeMetric decodes a Metric message and emits its samples. name and kind are the name and the
// MetricType of its family.
func (d *Decoder) decodeMetric(b, name []byte, kind uint64, emit func(*RawSample) error) error {
	value, err := d.decodeMetricFields(b, kind)
	if err != nil {
		return err
	}
	switch kind {
	case protoSummary:
		return d.decodeSummary(value, name, emit)
	case protoHistogram, protoGaugeHistogram:
		return d.decodeHistogram(value, name, emit)
	}
	d.raw.Name, d.raw.V = name, 0
	var f protoField
	m := protoMessage{NewWireReader(value)}
	for m.next(&f) {
		switch {
		case f.number == 1:
			d.raw.V = f.float()
		case kind == protoCounter && f.number == 2:
			d.skipped.Exemplars++
		case kind == protoCounter && f.number == 3:
			d.skipped.Created++
		}
	}
	if err := m.err(); err != nil {
		return err
	}
	return emit(&d.raw)
}

// decodeMetricFields decodes the labels and the timestamp of a Metric message into d.raw. It
// returns the undecoded message that holds the metric's value, such as a Counter or a Histogram.
func (d *Decoder) decodeMetricFields(b []byte, kind uint64) (value []byte, err error) {
	r := &d.raw
	r.Labels, r.HasT = r.Labels[:0], false
	if kind >= uint64(len(valueFields)) {
		return nil, fmt.Errorf("unknown metric type %d", kind)
	}
	var f protoField
	labelBytes := 0
	m := protoMessage{NewWireReader(b)}
	for m.next(&f) {
		switch f.number {
		case 1:
			// decodeLabel allows more bytes of labels than SampleList.Add does, because emit may
			// remove labels before it calls Add.
			if labelBytes, err = d.decodeLabel(f.data, labelBytes); err != nil {
				return nil, err
			}
		case 6:
			r.T, r.HasT = int64(f.value), true
		case valueFields[kind]:
			value = f.data
			m.Require(value != nil)
		}
	}
	if err := m.err(); err != nil {
		return nil, err
	}
	if value == nil {
		return nil, fmt.Errorf("no value of metric type %d", kind)
	}
	return value, nil
}

// decodeLabel decodes a LabelPair message and appends it to d.raw.Labels. It skips and counts a
// label with the type or unit of the metric. labelBytes is the size of the LabelPair messages of
// this metric so far. decodeLabel returns the size including this message. It fails if the size
// exceeds 2*MaxLine or the metric has more than MaxLabels labels.
func (d *Decoder) decodeLabel(b []byte, labelBytes int) (int, error) {
	var l Label
	var f protoField
	m := protoMessage{NewWireReader(b)}
	for m.next(&f) {
		switch f.number {
		case 1:
			l.Name = f.data
		case 2:
			l.Value = f.data
		}
	}
	if err := m.err(); err != nil {
		return labelBytes, err
	}
	if isTypeOrUnitLabel(l.Name) {
		d.skipped.Metadata++
		return labelBytes, nil
	}
	if len(d.raw.Labels) >= MaxLabels {
		return labelBytes, fmt.Errorf("%w: more than %d labels", ErrTooLarge, MaxLabels)
	}
	if labelBytes += len(b); labelBytes > 2*MaxLine {
		return labelBytes, fmt.Errorf("%w: labels of more than %d bytes", ErrTooLarge, 2*MaxLine)
	}
	d.raw.Labels = append(d.raw.Labels, l)
	return labelBytes, nil
}

// componentEmitter emits the component samples of one histogram or summary. Its methods have the
// function emit as a parameter. If emit were a field, emit and everything that it captures would
// escape to the heap.
type componentEmitter struct {
	d          *Decoder
	name       []byte
	labels     []Label // copy of the metric's labels, because emit may change d.raw.Labels
	boundLabel []byte  // name of the label that emitBound adds: le for buckets, quantile for quantiles
}

// newComponentEmitter returns a componentEmitter for the metric whose labels are in d.raw.
func (d *Decoder) newComponentEmitter(name []byte, boundLabel string) componentEmitter {
	return componentEmitter{d, name, slices.Clone(d.raw.Labels), []byte(boundLabel)}
}

// emitBound emits the sample of a bucket or a quantile, with the value v. The sample has an extra
// label, le or quantile, whose value is bound.
func (c *componentEmitter) emitBound(suffix string, bound, v float64, emit func(*RawSample) error) error {
	if err := c.beginComponent(suffix); err != nil {
		return err
	}
	d := c.d
	if len(d.raw.Labels) >= MaxLabels {
		return fmt.Errorf("%w: more than %d labels", ErrTooLarge, MaxLabels)
	}
	d.bound = strconv.AppendFloat(d.bound[:0], bound, 'g', -1, 64)
	d.raw.Labels = append(d.raw.Labels, Label{c.boundLabel, d.bound})
	d.raw.V = v
	return emit(&d.raw)
}

// emitSumOrCount emits the sample of the sum or the count of a histogram or summary, with the value
// v. The sample has no extra label.
func (c *componentEmitter) emitSumOrCount(suffix string, v float64, emit func(*RawSample) error) error {
	if err := c.beginComponent(suffix); err != nil {
		return err
	}
	c.d.raw.V = v
	return emit(&c.d.raw)
}

// beginComponent prepares d.raw for the next component: it sets the name to the metric's name plus
// suffix, and restores the metric's labels. It fails if the components of the body together repeat
// too many bytes. The limit is needed because a bucket can be two bytes of the body, but emit has
// to process its full name and labels, even to drop the sample.
func (c *componentEmitter) beginComponent(suffix string) error {
	d := c.d
	d.repeatable -= int64(componentCost + len(c.name))
	for _, l := range c.labels {
		d.repeatable -= int64(labelCost + len(l.Name) + len(l.Value))
	}
	if d.repeatable < 0 {
		return fmt.Errorf("%w: histograms and summaries repeat their labels to more than %d times the body", ErrTooLarge, maxRepeat)
	}
	d.name = append(append(d.name[:0], c.name...), suffix...)
	d.raw.Name = d.name
	d.raw.Labels = append(d.raw.Labels[:0], c.labels...)
	return nil
}

func (c *componentEmitter) emitSumAndCount(sum, count float64, emit func(*RawSample) error) error {
	if err := c.emitSumOrCount("_sum", sum, emit); err != nil {
		return err
	}
	return c.emitSumOrCount("_count", count, emit)
}

// decodeSummary decodes a Summary message and emits the samples of its quantiles, its sum and its
// count.
func (d *Decoder) decodeSummary(b, name []byte, emit func(*RawSample) error) error {
	parts := d.newComponentEmitter(name, "quantile")
	var count, sum float64
	var f protoField
	m := protoMessage{NewWireReader(b)}
	for m.next(&f) {
		switch f.number {
		case 1:
			count = float64(f.value)
		case 2:
			sum = f.float()
		case 3:
			q, v, err := decodeQuantile(f.data)
			if err == nil {
				err = parts.emitBound("", q, v, emit)
			}
			if err != nil {
				return err
			}
		case 4:
			d.skipped.Created++
		}
	}
	if err := m.err(); err != nil {
		return err
	}
	return parts.emitSumAndCount(sum, count, emit)
}

// decodeQuantile decodes a Quantile message of a summary. It returns the quantile, such as 0.99,
// and its value v.
func decodeQuantile(b []byte) (quantile, v float64, err error) {
	var f protoField
	m := protoMessage{NewWireReader(b)}
	for m.next(&f) {
		switch f.number {
		case 1:
			quantile = f.float()
		case 2:
			v = f.float()
		}
	}
	return quantile, v, m.err()
}

// decodeHistogram decodes a Histogram message and emits the samples of its classic buckets, its sum
// and its count. It adds the +Inf bucket if the message has none. It skips and counts a native
// histogram. If the message has only a native histogram, without classic buckets, nothing is
// emitted.
func (d *Decoder) decodeHistogram(b, name []byte, emit func(*RawSample) error) error {
	parts := d.newComponentEmitter(name, "le")
	var count, countFloat, sum float64 // countFloat, the count as a float, replaces count if it is above 0
	var native, classic, hasInf bool
	var f protoField
	m := protoMessage{NewWireReader(b)}
	for m.next(&f) {
		switch f.number {
		case 1:
			count = float64(f.value)
		case 2:
			sum = f.float()
		case 3:
			classic = true
			bound, v, err := d.decodeBucket(f.data)
			if err == nil {
				err = parts.emitBound("_bucket", bound, v, emit)
			}
			if err != nil {
				return err
			}
			hasInf = hasInf || math.IsInf(bound, +1)
		case 4:
			countFloat = f.float()
		case 5, 6, 7, 8, 9, 12: // fields of native histograms: schema, zero bucket, negative spans and positive spans
			native = true
		case 15:
			d.skipped.Created++
		case 16:
			d.skipped.Exemplars++
		}
	}
	if native {
		d.skipped.NativeHistograms++
	}
	if err := m.err(); err != nil || native && !classic {
		return err
	}
	if countFloat > 0 {
		count = countFloat
	}
	if !hasInf {
		if err := parts.emitBound("_bucket", math.Inf(+1), count, emit); err != nil {
			return err
		}
	}
	return parts.emitSumAndCount(sum, count, emit)
}

// decodeBucket decodes a Bucket message of a histogram. It returns the bucket's upper bound and its
// cumulative count v. It skips and counts an exemplar.
func (d *Decoder) decodeBucket(b []byte) (bound, v float64, err error) {
	var float float64 // the bucket's count as a float; it replaces the integer count if it is above 0
	var f protoField
	m := protoMessage{NewWireReader(b)}
	for m.next(&f) {
		switch f.number {
		case 1:
			v = float64(f.value)
		case 2:
			bound = f.float()
		case 3:
			d.skipped.Exemplars++
		case 4:
			float = f.float()
		}
	}
	if float > 0 {
		v = float
	}
	return bound, v, m.err()
}
