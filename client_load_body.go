package main

// This file renders the bodies that the load generator pushes: made-up series in families of nine,
// with at least 250 bytes of text each. Every body has other values and a later time than the body
// before. The text of a series does not change, so that a server recognizes the series. Nothing here
// reads a clock or sends anything.

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

// Formats and encodings of the bodies of RunLoad. The client pushes text with gzip.
const (
	LoadText     = "text"
	LoadProtobuf = "protobuf"
	LoadIdentity = "identity"
	LoadGzip     = "gzip"
	LoadSnappy   = "snappy"
)

const loadFamilySize = 9 // series in one metric family

// loadSeries is one made-up series.
type loadSeries struct {
	line   []byte // rendered name and labels
	labels []byte // the labels as fields of a protobuf Metric
	value  float64
}

// loadBodies renders bodies. It is not safe for concurrent use, but the bodies that it returns are.
type loadBodies struct {
	format, encoding string
	families         []string
	series           []loadSeries // in the order of families
	rendered         int          // number of bodies rendered so far
	plain            []byte       // scratch memory for a body without compression
	metric           []byte       // scratch memory for one protobuf Metric
}

// newLoadBodies returns a loadBodies for n series.
func newLoadBodies(n int, format, encoding string) *loadBodies {
	b := &loadBodies{format: format, encoding: encoding}
	apps := [loadFamilySize]string{"api", "web", "database", "queue", "cache", "auth", "billing", "search", "ingest"}
	kinds := []string{"requests", "latency_seconds", "errors", "received_bytes", "threads"}
	for i := range n {
		family, app := i/loadFamilySize, apps[i%loadFamilySize]
		if i%loadFamilySize == 0 {
			b.families = append(b.families, fmt.Sprintf("load_component_%s_%05d_total", kinds[family%len(kinds)], family))
		}
		labels := []string{
			"container", app + "-container", "endpoint", "https-metrics", "instance", fmt.Sprintf("10.%d.%d.%d:8443", family>>8&255, family&255, i%loadFamilySize+1),
			"job", app + "-metrics-service", "namespace", "production-" + app + "-services-in-europe-west", "pod", fmt.Sprintf("%s-deployment-%08x-%05d", app, uint32(i)*2654435761, i), "service", app + "-metrics-endpoint",
		}
		b.series = append(b.series, newLoadSeries(b.families[family], labels, float64(i)*1000+float64(i%4)/4))
	}
	return b
}

// newLoadSeries returns the series of a family. labels has names of labels, each followed by its
// value, sorted by name.
func newLoadSeries(family string, labels []string, value float64) loadSeries {
	s := loadSeries{line: []byte(family), value: value}
	open := byte('{')
	for i := 0; i < len(labels); i += 2 {
		s.line = fmt.Appendf(append(s.line, open), "%s=%q", labels[i], labels[i+1])
		open = ','
		pair := appendProtoBytes(appendProtoBytes(nil, 1, labels[i]), 2, labels[i+1])
		s.labels = appendProtoBytes(s.labels, 1, pair)
	}
	s.line = append(s.line, '}')
	return s
}

// next returns a new body whose samples have the time ms, in ms since the epoch.
func (b *loadBodies) next(ms int64) []byte {
	b.rendered++
	if b.plain = b.plain[:0]; b.format == LoadProtobuf {
		b.appendProto(ms)
	} else {
		for _, s := range b.series {
			b.plain = AppendSample(b.plain, s.line, ms, s.value+float64(b.rendered))
		}
	}
	switch b.encoding {
	case LoadGzip:
		return Gzip(b.plain)
	case LoadSnappy:
		return frameSnappy(b.plain)
	}
	return slices.Clone(b.plain)
}

// appendProto appends the series to b.plain as delimited MetricFamily messages of counters.
func (b *loadBodies) appendProto(ms int64) {
	var family []byte
	for i, s := range b.series {
		if i%loadFamilySize == 0 {
			name := b.families[i/loadFamilySize]
			family = appendProtoBytes(family[:0], 1, name)
			family = appendProtoBytes(family, 2, "A made-up counter.")
			family = append(family, 3<<3, 0) // type COUNTER
		}
		b.metric = append(append(b.metric[:0], s.labels...), 3<<3|2, 9, 1<<3|1) // a Counter of 9 bytes: a tag and a double
		b.metric = binary.LittleEndian.AppendUint64(b.metric, math.Float64bits(s.value+float64(b.rendered)))
		b.metric = binary.AppendUvarint(append(b.metric, 6<<3), uint64(ms))
		family = appendProtoBytes(family, 4, b.metric)
		if i%loadFamilySize == loadFamilySize-1 || i == len(b.series)-1 {
			b.plain = append(binary.AppendUvarint(b.plain, uint64(len(family))), family...)
		}
	}
}

// appendProtoBytes appends a protobuf field that has a length: a string, bytes or a message. field
// must be below 16.
func appendProtoBytes[T string | []byte](b []byte, field byte, value T) []byte {
	b = binary.AppendUvarint(append(b, field<<3|2), uint64(len(value)))
	return append(b, value...)
}

// frameSnappy compresses in with snappy, in its framing format. A chunk has at most 64 KiB of input.
func frameSnappy(in []byte) []byte {
	out := []byte("\xff\x06\x00\x00sNaPpY")
	for chunk := range slices.Chunk(in, maxSnappyInput) {
		begin := len(out)
		crc := Checksum(chunk)
		out = binary.LittleEndian.AppendUint32(append(out, 0, 0, 0, 0), (crc>>15|crc<<17)+0xa282ead8)
		out = appendSnappyBlock(out, chunk)
		binary.LittleEndian.PutUint32(out[begin:], uint32(len(out)-begin-4)<<8) // kind 0: a compressed chunk
	}
	return out
}

const maxSnappyInput = 64 << 10 // bytes; offsets in a chunk then have 16 bits

// appendSnappyBlock appends the snappy block of in, which has at most maxSnappyInput bytes. It finds
// repetitions of at least four bytes through a table of the positions that it has seen.
func appendSnappyBlock(out, in []byte) []byte {
	out = binary.AppendUvarint(out, uint64(len(in)))
	var seen [1 << 14]uint16 // hash of four bytes → their last position
	literal := 0             // begin of the bytes that no element covers yet
	for i := 1; i+4 <= len(in); {
		four := binary.LittleEndian.Uint32(in[i:])
		h := four * 0x1e35a7bd >> 18
		from := int(seen[h])
		seen[h] = uint16(i)
		if binary.LittleEndian.Uint32(in[from:]) != four {
			i++
			continue
		}
		n := 4
		for i+n < len(in) && in[from+n] == in[i+n] {
			n++
		}
		out = appendSnappyLiteral(out, in[literal:i])
		for rest := n; rest > 0; rest -= 64 {
			out = binary.LittleEndian.AppendUint16(append(out, byte(min(rest, 64)-1)<<2|2), uint16(i-from))
		}
		i += n
		literal = i
	}
	return appendSnappyLiteral(out, in[literal:])
}

// appendSnappyLiteral appends an element with the bytes of s, or nothing if s is empty.
func appendSnappyLiteral(out, s []byte) []byte {
	switch n := len(s) - 1; {
	case n < 0:
		return out
	case n < 60:
		out = append(out, byte(n)<<2)
	default: // two bytes after the tag have the length
		out = binary.LittleEndian.AppendUint16(append(out, 61<<2), uint16(n))
	}
	return append(out, s...)
}
