package main

// Decoding of delimited protobuf. No length that a body states is believed before it is
// checked against the bytes that are there. Histograms and summaries become their component
// lines; how often they may repeat their labels is bounded.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
)

// What the components of histograms and summaries may repeat, for each byte of
// a body; a real one with 30 buckets and 1,000 bytes of labels repeats them 20
// times. The costs are of what is not text, in bytes.
const (
	maxRepeat     = 64
	componentCost = 32
	labelCost     = 16
)

// field is one field of a protobuf message, as the wire format has it
// (protobuf.dev/programming-guides/encoding). A walk over the bytes replaces
// generated code here because unmarshalling allocates some fifty bytes for each
// two of an empty message, which a hostile body can consist of.
type field struct {
	num  uint64
	u    uint64 // varint, fixed32 or fixed64
	data []byte // of a length-delimited field, else nil
}

var errProto = errors.New("malformed protobuf")

func nextField(b []byte) (f field, rest []byte, err error) {
	tag, n := binary.Uvarint(b)
	if n <= 0 || tag>>3 == 0 {
		return f, nil, errProto
	}
	b = b[n:]
	f.num = tag >> 3
	switch tag & 7 {
	case 0:
		if f.u, n = binary.Uvarint(b); n <= 0 {
			return f, nil, errProto
		}
		return f, b[n:], nil
	case 1:
		if len(b) < 8 {
			return f, nil, errProto
		}
		f.u = binary.LittleEndian.Uint64(b)
		return f, b[8:], nil
	case 2:
		size, n := binary.Uvarint(b)
		if n <= 0 || size > uint64(len(b)-n) {
			return f, nil, errProto
		}
		f.data = b[n : n+int(size) : n+int(size)]
		return f, b[n+int(size):], nil
	case 5:
		if len(b) < 4 {
			return f, nil, errProto
		}
		f.u = uint64(binary.LittleEndian.Uint32(b))
		return f, b[4:], nil
	}
	return f, nil, errProto // groups are not in the schema
}

// fields calls f for every field of message b.
func fields(b []byte, f func(field) error) error {
	for len(b) > 0 {
		fd, rest, err := nextField(b)
		if err != nil {
			return err
		}
		if err := f(fd); err != nil {
			return err
		}
		b = rest
	}
	return nil
}

// The numbers below are of client_model's io/prometheus/client/metrics.proto.
func (d *Decoder) proto(body []byte, emit func(*RawSample) error) error {
	for n := 1; len(body) > 0; n++ {
		size, k := binary.Uvarint(body)
		if k <= 0 || size > uint64(len(body)-k) {
			return fmt.Errorf("family %d: truncated: %d bytes left of a longer frame", n, len(body))
		}
		frame := body[k : k+int(size)]
		body = body[k+int(size):]
		var name []byte
		var kind uint64 // counter, unless stated
		err := fields(frame, func(f field) error {
			switch f.num {
			case 1:
				name = f.data
			case 3:
				kind = f.u
			}
			return nil
		})
		if len(name) > MaxLine {
			err = fmt.Errorf("%w: a name of %d bytes; at most %d", ErrTooLarge, len(name), MaxLine)
		}
		if err == nil {
			err = fields(frame, func(f field) error {
				if f.num != 4 {
					return nil
				}
				if err := d.metric(f.data, name, kind, emit); err != nil {
					return fmt.Errorf("series %s: %w", Excerpt(AppendSeries(nil, name, d.raw.Labels)), err)
				}
				return nil
			})
		}
		if err != nil {
			return fmt.Errorf("family %d: %w", n, err)
		}
	}
	return nil
}

func (d *Decoder) metric(b, name []byte, kind uint64, emit func(*RawSample) error) error {
	r := &d.raw
	r.Labels, r.HasT = r.Labels[:0], false
	// By field number: gauge 2, counter 3, summary 4, untyped 5, histogram 7.
	var value field
	want := [...]uint64{3, 2, 4, 5, 7, 7} // by MetricType
	if kind >= uint64(len(want)) {
		return fmt.Errorf("unknown metric type %d", kind)
	}
	size := 0 // of the labels, in bytes
	err := fields(b, func(f field) error {
		switch f.num {
		case 1:
			var l Label
			if err := fields(f.data, func(f field) error {
				switch f.num {
				case 1:
					l.Name = f.data
				case 2:
					l.Value = f.data
				}
				return nil
			}); err != nil {
				return err
			}
			if metadataLabel(l.Name) {
				d.skipped.Metadata++
				return nil
			}
			if len(r.Labels) >= MaxLabels {
				return fmt.Errorf("%w: more than %d labels", ErrTooLarge, MaxLabels)
			}
			if size += len(f.data); size > 2*MaxLine { // Add judges more strictly, but not of what is dropped before it
				return fmt.Errorf("%w: labels of more than %d bytes", ErrTooLarge, 2*MaxLine)
			}
			r.Labels = append(r.Labels, l)
		case 6:
			r.T, r.HasT = int64(f.u), true
		case want[kind]:
			if f.data == nil {
				return errProto
			}
			value = f
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case value.data == nil:
		return fmt.Errorf("no value of metric type %d", kind)
	case kind == 2:
		return d.summary(value.data, name, emit)
	case kind >= 4:
		return d.histogram(value.data, name, emit)
	}
	r.Name, r.V = name, 0
	if err := fields(value.data, func(f field) error {
		switch {
		case f.num == 1:
			r.V = math.Float64frombits(f.u)
		case kind == 0 && f.num == 2:
			d.skipped.Exemplars++
		case kind == 0 && f.num == 3:
			d.skipped.Created++
		}
		return nil
	}); err != nil {
		return err
	}
	return emit(r)
}

// component emits one line of a histogram or summary: its name with suffix, and
// one more label where label is not nil. emit may change labels, so each
// component starts from the metric's own.
func (d *Decoder) component(own []Label, name []byte, suffix string, label []byte, bound, v float64, emit func(*RawSample) error) error {
	// Each component costs its user the whole name and labels, also one that is
	// dropped, while a bucket may be two bytes of the body.
	d.room -= componentCost + len(name)
	for _, l := range own {
		d.room -= labelCost + len(l.Name) + len(l.Value)
	}
	if d.room < 0 {
		return fmt.Errorf("%w: histograms and summaries repeat their labels to more than %d times the body", ErrTooLarge, maxRepeat)
	}
	d.name = append(append(d.name[:0], name...), suffix...)
	d.raw.Name, d.raw.V = d.name, v
	d.raw.Labels = append(d.raw.Labels[:0], own...)
	if label != nil {
		if len(d.raw.Labels) >= MaxLabels {
			return fmt.Errorf("%w: more than %d labels", ErrTooLarge, MaxLabels)
		}
		d.value = strconv.AppendFloat(d.value[:0], bound, 'g', -1, 64)
		d.raw.Labels = append(d.raw.Labels, Label{label, d.value})
	}
	return emit(&d.raw)
}

func (d *Decoder) summary(b, name []byte, emit func(*RawSample) error) error {
	own := slices.Clone(d.raw.Labels)
	quantile := []byte("quantile")
	var count, sum float64
	err := fields(b, func(f field) error {
		switch f.num {
		case 1:
			count = float64(f.u)
		case 2:
			sum = math.Float64frombits(f.u)
		case 3:
			var q, v float64
			if err := fields(f.data, func(f field) error {
				switch f.num {
				case 1:
					q = math.Float64frombits(f.u)
				case 2:
					v = math.Float64frombits(f.u)
				}
				return nil
			}); err != nil {
				return err
			}
			return d.component(own, name, "", quantile, q, v, emit)
		case 4:
			d.skipped.Created++
		}
		return nil
	})
	if err == nil {
		err = d.component(own, name, "_sum", nil, 0, sum, emit)
	}
	if err == nil {
		err = d.component(own, name, "_count", nil, 0, count, emit)
	}
	return err
}

func (d *Decoder) histogram(b, name []byte, emit func(*RawSample) error) error {
	own := slices.Clone(d.raw.Labels)
	le := []byte("le")
	var count, countFloat, sum float64 // the float counts where it is above zero
	var native, classic, inf bool
	err := fields(b, func(f field) error {
		switch f.num {
		case 1:
			count = float64(f.u)
		case 2:
			sum = math.Float64frombits(f.u)
		case 4:
			countFloat = math.Float64frombits(f.u)
		case 5, 6, 7, 8, 9, 12: // schema, zero bucket, negative and positive spans
			native = true
		case 15:
			d.skipped.Created++
		case 16:
			d.skipped.Exemplars++
		case 3:
			classic = true
			var v, float, bound float64
			if err := fields(f.data, func(f field) error {
				switch f.num {
				case 1:
					v = float64(f.u)
				case 2:
					bound = math.Float64frombits(f.u)
				case 3:
					d.skipped.Exemplars++
				case 4:
					float = math.Float64frombits(f.u)
				}
				return nil
			}); err != nil {
				return err
			}
			if float > 0 {
				v = float
			}
			inf = inf || math.IsInf(bound, +1)
			return d.component(own, name, "_bucket", le, bound, v, emit)
		}
		return nil
	})
	if countFloat > 0 {
		count = countFloat
	}
	if native {
		d.skipped.NativeHistograms++
		if !classic {
			return err
		}
	}
	if err == nil && !inf {
		err = d.component(own, name, "_bucket", le, math.Inf(+1), count, emit)
	}
	if err == nil {
		err = d.component(own, name, "_sum", nil, 0, sum, emit)
	}
	if err == nil {
		err = d.component(own, name, "_count", nil, 0, count, emit)
	}
	return err
}
