package main

// Bounded decompression of bodies: gzip and framed snappy, which clients and Prometheus send.
// No more is written than the limit allows, whatever sizes the input states, and incomplete
// input is an error. This file must not know of HTTP or of the content of a body.

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
)

// MaxDecodedFactor times the limit on a body bounds it decompressed.
const MaxDecodedFactor = 8

// SupportedEncodings names for people what SupportsEncoding.
const SupportedEncodings = "identity, gzip, snappy (framed)"

// SupportsEncoding reports whether Decompress knows a content encoding, in lower case.
func SupportsEncoding(encoding string) bool {
	return slices.Contains([]string{"", "identity", "gzip", "snappy", "x-snappy-framed"}, encoding)
}

var errDecodedTooLarge = errors.New("larger than the limit")

// Decompressor decompresses bodies. It keeps scratch memory between calls and is
// not safe for concurrent use. The zero value is ready.
type Decompressor struct {
	gzip gzip.Reader
	buf  []byte
}

// Decompress returns body decompressed; tooLarge reports that it is longer than
// limit. The result is valid until the next call, and may be body itself.
func (d *Decompressor) Decompress(body []byte, encoding string, limit int) (decoded []byte, tooLarge bool, err error) {
	switch encoding {
	case "", "identity":
		return body, len(body) > limit, nil
	case "gzip":
		if err = d.gzip.Reset(bytes.NewReader(body)); err == nil {
			d.buf, err = ReadAllInto(d.buf, io.LimitReader(&d.gzip, int64(limit)+1))
		}
		if err != nil {
			return nil, false, fmt.Errorf("the body is not whole gzip: %w", err)
		}
		return d.buf, len(d.buf) > limit, nil
	}
	d.buf, err = decodeFramedSnappy(d.buf[:0], body, limit)
	if errors.Is(err, errDecodedTooLarge) {
		return nil, true, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("malformed framed snappy: %w", err)
	}
	return d.buf, false, nil
}

// ReadAllInto reads all of r into buf's memory, which grows as the bytes arrive.
func ReadAllInto(buf []byte, r io.Reader) ([]byte, error) {
	buf = buf[:0]
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err == io.EOF {
			return buf, nil
		}
		if err != nil {
			return buf, err
		}
	}
}

const (
	snappyMagic    = "sNaPpY"
	maxSnappyChunk = 64 << 10 // bytes of a chunk uncompressed
)

// decodeFramedSnappy decodes the framing format of snappy 1.1 (framing_format.txt). The
// format has no end: input cut off between two chunks is a shorter stream, which
// only its content can tell.
func decodeFramedSnappy(out, in []byte, limit int) ([]byte, error) {
	if !bytes.HasPrefix(in, []byte("\xff\x06\x00\x00"+snappyMagic)) {
		return nil, errors.New("no stream identifier")
	}
	for r := NewWireReader(in); r.Len() > 0; {
		head := r.Uint32() // a byte of kind, three of size
		chunk := r.Bytes(int(head >> 8))
		if r.Err() != nil {
			return nil, errors.New("truncated")
		}
		var err error
		switch kind := byte(head); {
		case kind <= 1:
			out, err = decodeSnappyChunk(out, chunk, kind == 0, limit)
		case kind == 0xff && string(chunk) != snappyMagic:
			err = errors.New("bad stream identifier")
		case kind < 0x80:
			err = fmt.Errorf("unknown chunk type %d", kind)
		default: // a stream identifier, padding and skippable chunks
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// decodeSnappyChunk decodes a chunk of data, which begins with its checksum.
func decodeSnappyChunk(out, chunk []byte, compressed bool, limit int) ([]byte, error) {
	r := NewWireReader(chunk)
	sum := r.Uint32()
	if r.Err() != nil {
		return nil, errors.New("truncated chunk")
	}
	n := uint64(r.Len())
	if compressed {
		if n = r.Uvarint(math.MaxUint64); r.Err() != nil {
			return nil, errors.New("no length")
		}
	}
	from := len(out)
	if n > maxSnappyChunk {
		return nil, fmt.Errorf("a chunk of %d bytes", n)
	}
	if n > uint64(limit-from) {
		return nil, errDecodedTooLarge
	}
	ok := true
	if compressed {
		out, ok = decodeSnappyBlock(out, r, int(n))
	} else {
		out = append(out, r.Rest()...)
	}
	if !ok {
		return nil, errors.New("bad block")
	}
	crc := Checksum(out[from:])
	if (crc>>15|crc<<17)+0xa282ead8 != sum { // masked, as the format says
		return nil, errors.New("wrong checksum")
	}
	return out, nil
}

// decodeSnappyBlock decodes the elements of one block (format_description.txt),
// which have to make size bytes.
func decodeSnappyBlock(out []byte, r WireReader, size int) (_ []byte, ok bool) {
	from, end := len(out), len(out)+size
	for r.Len() > 0 {
		tag := r.Byte()
		length, offset := 1+int(tag>>2), 0
		switch tag & 3 {
		case 0: // a literal
			if extra := length - 60; extra > 0 { // its length less 1 follows in 1 to 4 bytes
				length = 1
				for i, b := range r.Bytes(extra) {
					length += int(b) << (8 * i)
				}
			}
			if length > end-len(out) {
				return out, false
			}
			out = append(out, r.Bytes(length)...)
			continue
		case 1:
			length, offset = 4+int(tag>>2&7), int(tag>>5)<<8|int(r.Byte())
		case 2:
			offset = int(r.Uint16())
		case 3:
			offset = int(r.Uint32())
		}
		if r.Err() != nil || offset == 0 || offset > len(out)-from || length > end-len(out) {
			return out, false
		}
		for range length { // byte by byte: a copy may overlap what it writes
			out = append(out, out[len(out)-offset])
		}
	}
	return out, r.Err() == nil && len(out) == end
}

// Gzip returns text compressed.
func Gzip(text []byte) []byte {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write(text) // to memory: does not fail
	w.Close()
	return z.Bytes()
}
