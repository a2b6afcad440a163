package main

// Decoding of delimited protobuf. Every length that a body states is checked
// against the bytes that are there. Histograms and summaries become their component
// lines; how often they may repeat their labels is bounded.

import (
	"fmt"
	"math"
	"slices"
	"strconv"
)

// Bounds on how often components of histograms and summaries repeat, for each byte of
// a body; a real one with 30 buckets and 1,000 bytes of labels repeats them 20
// times. The costs are of what is not text, in bytes.
const (
	maxRepeat     = 64
	componentCost = 32
	labelCost     = 16
)

// protoField is one field of a protobuf message, as the wire format has it
// (protobuf.dev/programming-guides/encoding). A walk over the bytes replaces
// generated code here because unmarshalling allocates some fifty bytes for each
// two of an empty message, which a hostile body can consist of.
type protoField struct {
	number uint64
	value  uint64 // varint, fixed32 or fixed64
	data   []byte // of a length-delimited field, else nil
}

func (f protoField) float() float64 { return math.Float64frombits(f.value) }

// protoMessage walks over the fields of a message.
type protoMessage struct{ WireReader }

// next reads the next field; false says that there is none, or that err has an error.
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
		m.Require(false) // groups are not in the schema
	}
	return m.Err() == nil
}

func (m *protoMessage) err() error {
	if err := m.Err(); err != nil {
		return fmt.Errorf("malformed protobuf: %w", err)
	}
	return nil
}

// decodeProto decodes a body. The numbers of fields here and below are of client_model's
// io/prometheus/client/metrics.proto.
func (d *Decoder) decodeProto(body []byte, emit func(*RawSample) error) error {
	r := NewWireReader(body)
	for n := 1; r.Len() > 0; n++ {
		left := r.Len()
		family := r.Bytes(int(r.Uvarint(math.MaxInt)))
		if r.Err() != nil {
			return fmt.Errorf("family %d: truncated: %d bytes left of a longer frame", n, left)
		}
		if err := d.decodeFamily(family, emit); err != nil {
			return fmt.Errorf("family %d: %w", n, err)
		}
	}
	return nil
}

// decodeFamily decodes a MetricFamily. Its name and type may come behind its metrics.
func (d *Decoder) decodeFamily(b []byte, emit func(*RawSample) error) error {
	var name []byte
	var kind uint64 // counter, unless stated
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
		return fmt.Errorf("%w: a name of %d bytes; at most %d", ErrTooLarge, len(name), MaxLine)
	}
	if err := m.err(); err != nil {
		return err
	}
	for m = (protoMessage{NewWireReader(b)}); m.next(&f); {
		if f.number == 4 {
			if err := d.decodeMetric(f.data, name, kind, emit); err != nil {
				return fmt.Errorf("series %s: %w", Excerpt(appendLine(nil, name, d.raw.Labels)), err)
			}
		}
	}
	return nil
}

// Values of MetricType.
const (
	protoCounter, protoSummary = 0, 2
	protoHistogram             = 4
	protoGaugeHistogram        = 5
)

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

// decodeMetricFields decodes a Metric: its labels and time into d.raw, and the message with
// the value of its type, which it returns.
func (d *Decoder) decodeMetricFields(b []byte, kind uint64) (value []byte, err error) {
	r := &d.raw
	r.Labels, r.HasT = r.Labels[:0], false
	// Fields by MetricType: counter 3, gauge 2, summary 4, untyped 5, both histograms 7.
	valueFields := [...]uint64{3, 2, 4, 5, 7, 7}
	if kind >= uint64(len(valueFields)) {
		return nil, fmt.Errorf("unknown metric type %d", kind)
	}
	var f protoField
	labelBytes := 0
	m := protoMessage{NewWireReader(b)}
	for m.next(&f) {
		switch f.number {
		case 1:
			// SampleList.Add bounds a series more strictly, but not labels that are dropped before it.
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

// decodeLabel appends a LabelPair to d.raw.Labels unless it is metadata. labelBytes is how many
// bytes the labels before it have; the sum is returned, and bounded by 2*MaxLine.
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

// componentEmitter makes the component samples of one histogram or summary. It does not hold emit,
// which would then escape to the heap, with all that it captures.
type componentEmitter struct {
	d          *Decoder
	name       []byte
	labels     []Label // of the metric: emit may change d.raw's, so that each component starts from these
	boundLabel []byte  // le or quantile
}

func (d *Decoder) newComponentEmitter(name []byte, boundLabel string) componentEmitter {
	return componentEmitter{d, name, slices.Clone(d.raw.Labels), []byte(boundLabel)}
}

// emitBound emits a bucket or quantile: a sample with one more label, whose value is the bound.
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

// emitSumOrCount emits the sum or the count.
func (c *componentEmitter) emitSumOrCount(suffix string, v float64, emit func(*RawSample) error) error {
	if err := c.beginComponent(suffix); err != nil {
		return err
	}
	c.d.raw.V = v
	return emit(&c.d.raw)
}

// beginComponent makes d.raw the series of the metric with a suffix to its name. Each component
// costs its user the whole name and labels, also one that is dropped, while a bucket may be two
// bytes of the body.
func (c *componentEmitter) beginComponent(suffix string) error {
	d := c.d
	d.repeatable -= componentCost + len(c.name)
	for _, l := range c.labels {
		d.repeatable -= labelCost + len(l.Name) + len(l.Value)
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

func (d *Decoder) decodeHistogram(b, name []byte, emit func(*RawSample) error) error {
	parts := d.newComponentEmitter(name, "le")
	var count, countFloat, sum float64 // a float count replaces the count where it is above 0
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
		case 5, 6, 7, 8, 9, 12: // schema, zero bucket, negative and positive spans
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

func (d *Decoder) decodeBucket(b []byte) (bound, v float64, err error) {
	var float float64 // replaces the count where it is above 0
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
