package main

// This file decompresses the bodies of pushes and scrapes: gzip and framed snappy. The caller's
// limit bounds the output and the memory used. A size that the input states is checked against the
// limit before memory is allocated. Gzip that is cut off within a member is an error, and so is
// snappy that is cut off within a chunk, unless the output exceeds the limit before. This file must
// not know of HTTP or of the content of a body.

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
)

// A decompressed body may have at most MaxDecodedFactor times --limit-bytes, which is the limit on
// the compressed body.
const MaxDecodedFactor = 8

// SupportedEncodings lists the supported content encodings for error messages.
const SupportedEncodings = "identity, gzip, snappy (framed)"

// SupportsEncoding reports whether Decompress supports a value of the header Content-Encoding. The
// value must be in lower case. An empty value means identity.
func SupportsEncoding(encoding string) bool {
	return slices.Contains([]string{"", "identity", "gzip", "snappy", "x-snappy-framed"}, encoding)
}

var errDecodedTooLarge = errors.New("larger than the limit")

// Decompressor decompresses bodies. It keeps scratch memory between calls, so it is not safe for
// concurrent use. The zero value is ready for use.
type Decompressor struct {
	gzip gzip.Reader
	buf  []byte
}

// MemorySize returns the bytes of scratch memory that d keeps for decompressed bodies.
func (d *Decompressor) MemorySize() int { return cap(d.buf) }

// Decompress returns the decompressed body. encoding must be a value that SupportsEncoding accepts.
// tooLarge is true if the decompressed body exceeds limit bytes; decoded must then not be used. The
// result is valid until the next call. With the encoding identity, the result is body itself.
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

// ReadAllInto reads r to its end and returns the bytes read. It overwrites buf and reuses its
// memory. It allocates more memory only as bytes arrive. If r fails, ReadAllInto returns the bytes
// read so far and r's error.
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
	maxSnappyChunk = 64 << 10 // bytes of uncompressed data in one chunk; the framing format sets this limit
)

// decodeFramedSnappy appends the decoded input to out. The input is in snappy's framing format
// (framing_format.txt in google/snappy). decodeFramedSnappy returns errDecodedTooLarge if the
// output exceeds limit bytes.
//
// The format has no end marker. Input that is cut off between two chunks is therefore a valid
// shorter stream. Only a decoder of the content can detect the loss.
func decodeFramedSnappy(out, in []byte, limit int) ([]byte, error) {
	if !bytes.HasPrefix(in, []byte("\xff\x06\x00\x00"+snappyMagic)) {
		return nil, errors.New("no stream identifier")
	}
	for r := NewWireReader(in); r.Len() > 0; {
		head := r.Uint32() // lowest byte: the kind of the chunk; upper three bytes: its size
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
		default: // skip repeated stream identifiers, padding and chunks of the types that the format calls skippable
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// decodeSnappyChunk appends the data of one chunk to out. It verifies the data with the checksum at
// the beginning of the chunk.
func decodeSnappyChunk(out, chunk []byte, compressed bool, limit int) ([]byte, error) {
	r := NewWireReader(chunk)
	sum := r.Uint32()
	if r.Err() != nil {
		return nil, errors.New("truncated chunk")
	}
	n := uint64(r.Len())
	if compressed {
		if n = r.Uvarint(math.MaxUint64); r.Err() != nil {
			return nil, errors.New("malformed length of a block")
		}
	}
	from := len(out)
	if n > maxSnappyChunk {
		return nil, fmt.Errorf("a chunk has %d bytes uncompressed, limit %d", n, maxSnappyChunk)
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
		return nil, errors.New("malformed block")
	}
	crc := Checksum(out[from:])
	if (crc>>15|crc<<17)+0xa282ead8 != sum { // the framing format masks checksums by this rotation and addition
		return nil, errors.New("wrong checksum")
	}
	return out, nil
}

// decodeSnappyBlock appends the decoded elements of one block (literals and copies) to out. r must
// be positioned after the block's length (format_description.txt in google/snappy). ok is false if
// the elements are malformed or do not decode to exactly size bytes.
func decodeSnappyBlock(out []byte, r WireReader, size int) (_ []byte, ok bool) {
	from, end := len(out), len(out)+size
	for r.Len() > 0 {
		tag := r.Byte()
		length, offset := 1+int(tag>>2), 0
		switch tag & 3 {
		case 0: // a literal: bytes that are not compressed
			if extra := length - 60; extra > 0 { // the literal's length minus 1 follows in 1 to 4 bytes
				length = 1
				for i, b := range r.Bytes(extra) {
					length += int(b) << (8 * i)
				}
			}
			if length <= 0 || length > end-len(out) { // length wraps below 1 if an int has 32 bits
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
		if r.Err() != nil || offset <= 0 || offset > len(out)-from || length > end-len(out) {
			return out, false
		}
		// If source and destination overlap, the copy repeats the bytes from the offset on. So each
		// append can copy all of these bytes that are there already.
		for source := len(out) - offset; length > 0; {
			n := min(length, len(out)-source)
			out = append(out, out[source:source+n]...)
			length -= n
		}
	}
	return out, r.Err() == nil && len(out) == end
}

// GzipLevel is the level at which texts of samples are compressed. Level 5 makes them 2 % larger than
// the default, level 6, and takes 30 % less time. Level 3 makes them 15 % larger and takes 60 % less
// time; links of sites can be thin.
const GzipLevel = 5

// Gzip returns text compressed with gzip.
func Gzip(text []byte) []byte {
	var z bytes.Buffer
	w, _ := gzip.NewWriterLevel(&z, GzipLevel) // cannot fail, because the level is valid
	w.Write(text)                              // cannot fail, because a bytes.Buffer accepts everything
	w.Close()
	return z.Bytes()
}
