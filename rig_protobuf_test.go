package main

import (
	"bytes"
	"encoding/binary"
	"math"

	dto "github.com/prometheus/client_model/go"
)

// Helpers to write protobuf messages. The functions whose names begin with pb write the wire format
// byte by byte, for bodies that no encoder would write.

// pbVarint returns a varint field with the field number num and the value u.
func pbVarint(num int, u uint64) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(nil, uint64(num)<<3), u)
}

// pbFloat returns a fixed64 field with the field number num that holds the float64 v.
func pbFloat(num int, v float64) []byte {
	return binary.LittleEndian.AppendUint64(binary.AppendUvarint(nil, uint64(num)<<3|1), math.Float64bits(v))
}

// pbBytes returns a length-delimited field with the field number num. Its content is the
// concatenated parts.
func pbBytes(num int, parts ...[]byte) []byte {
	data := bytes.Join(parts, nil)
	b := binary.AppendUvarint(nil, uint64(num)<<3|2)
	return append(binary.AppendUvarint(b, uint64(len(data))), data...)
}

// pbLabel returns the field of a Metric message that holds a LabelPair.
func pbLabel(name, value string) []byte {
	return pbBytes(1, pbBytes(1, []byte(name)), pbBytes(2, []byte(value)))
}

// pbFrame returns a MetricFamily message, preceded by its length. parts are its encoded fields.
func pbFrame(parts ...[]byte) []byte {
	data := bytes.Join(parts, nil)
	return append(binary.AppendUvarint(nil, uint64(len(data))), data...)
}

// pbOne returns a MetricFamily message with one Metric, preceded by its length. kind is the
// family's MetricType. metric are the encoded fields of the Metric.
func pbOne(name string, kind uint64, metric ...[]byte) []byte {
	return pbFrame(pbBytes(1, []byte(name)), pbVarint(3, kind), pbBytes(4, metric...))
}

// zeroOf returns a new empty message of its argument's type. Tests use it for the timestamps in
// protobuf messages, because the type of these timestamps is in a module that this program may not
// import.
func zeroOf[T any](*T) *T { return new(T) }

func protoFamily(name string, kind dto.MetricType, metrics ...*dto.Metric) *dto.MetricFamily {
	return &dto.MetricFamily{Name: &name, Help: new("help"), Type: &kind, Metric: metrics}
}
