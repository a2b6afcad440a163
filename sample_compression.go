package main

// Bounded decompression of bodies: gzip and framed snappy, which clients and Prometheus send.
// No more is written than the limit allows, whatever sizes the input states, and incomplete
// input is an error. This file must not know of HTTP or of the content of a body.

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// MaxDecodedFactor times the limit on a body bounds it decompressed.
const MaxDecodedFactor = 8

// SupportedEncodings says to people what Decompressor.Supports.
const SupportedEncodings = "identity, gzip, snappy (framed)"

var errSnappy = errors.New("malformed framed snappy")

var errDecodedTooLarge = errors.New("larger than the limit")

// Decompressor decompresses bodies. It keeps scratch memory between calls and is
// not safe for concurrent use. The zero value is ready.
type Decompressor struct {
	gzip gzip.Reader
	buf  []byte
}

// Supports reports whether a content encoding, in lower case, is known.
func (d *Decompressor) Supports(encoding string) bool {
	return slices.Contains([]string{"", "identity", "gzip", "snappy", "x-snappy-framed"}, encoding)
}

// Decompress returns body decompressed; over reports that it is longer than
// limit. The result is valid until the next call, and may be body itself.
func (d *Decompressor) Decompress(body []byte, encoding string, limit int) (decoded []byte, over bool, err error) {
	switch encoding {
	case "", "identity":
		return body, len(body) > limit, nil
	case "gzip":
		if err = d.gzip.Reset(bytes.NewReader(body)); err == nil {
			d.buf, err = ReadInto(d.buf, io.LimitReader(&d.gzip, int64(limit)+1))
		}
		if err != nil {
			return nil, false, fmt.Errorf("the body is not whole gzip: %w", err)
		}
		return d.buf, len(d.buf) > limit, nil
	}
	d.buf, err = appendSnappy(d.buf[:0], body, limit)
	if errors.Is(err, errDecodedTooLarge) {
		return nil, true, nil
	}
	return d.buf, false, err
}

// ReadInto reads all of r into buf's memory, which grows as the bytes arrive.
func ReadInto(buf []byte, r io.Reader) ([]byte, error) {
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

// maxSnappyChunk is what a chunk may hold, in bytes uncompressed.
const maxSnappyChunk = 64 << 10

// appendSnappy decodes the framing format of snappy 1.1 (framing_format.txt). The
// format has no end: input cut off between two chunks is a shorter stream, which
// only its content can tell.
func appendSnappy(out, in []byte, limit int) ([]byte, error) {
	if !bytes.HasPrefix(in, []byte("\xff\x06\x00\x00sNaPpY")) {
		return nil, fmt.Errorf("%w: no stream identifier", errSnappy)
	}
	for len(in) > 0 {
		if len(in) < 4 {
			return nil, fmt.Errorf("%w: truncated", errSnappy)
		}
		kind, size := in[0], int(in[1])|int(in[2])<<8|int(in[3])<<16
		if size > len(in)-4 {
			return nil, fmt.Errorf("%w: truncated", errSnappy)
		}
		chunk := in[4 : 4+size]
		in = in[4+size:]
		switch {
		case kind == 0xff:
			if string(chunk) != "sNaPpY" {
				return nil, fmt.Errorf("%w: bad stream identifier", errSnappy)
			}
		case kind >= 0x80: // padding and skippable chunks
		case kind > 1:
			return nil, fmt.Errorf("%w: unknown chunk type %d", errSnappy, kind)
		default:
			if len(chunk) < 4 {
				return nil, fmt.Errorf("%w: truncated chunk", errSnappy)
			}
			sum, data := binary.LittleEndian.Uint32(chunk), chunk[4:]
			from := len(out)
			n := uint64(len(data))
			if kind == 0 {
				var head int
				if n, head = binary.Uvarint(data); head <= 0 {
					return nil, fmt.Errorf("%w: no length", errSnappy)
				}
				data = data[head:]
			}
			if n > maxSnappyChunk {
				return nil, fmt.Errorf("%w: a chunk of %d bytes", errSnappy, n)
			}
			if n > uint64(limit-from) {
				return nil, errDecodedTooLarge
			}
			ok := true
			if kind == 1 {
				out = append(out, data...)
			} else {
				out, ok = appendSnappyBlock(out, data, int(n))
			}
			if !ok {
				return nil, fmt.Errorf("%w: bad block", errSnappy)
			}
			crc := Checksum(out[from:])
			if (crc>>15|crc<<17)+0xa282ead8 != sum { // masked, as the format says
				return nil, fmt.Errorf("%w: wrong checksum", errSnappy)
			}
		}
	}
	return out, nil
}

// appendSnappyBlock decodes the elements of one block (format_description.txt),
// which have to make n bytes.
func appendSnappyBlock(out, in []byte, n int) (_ []byte, ok bool) {
	from, end := len(out), len(out)+n
	for len(in) > 0 {
		tag := in[0]
		var length, offset, head int
		switch tag & 3 {
		case 0:
			length, head = int(tag>>2)+1, 1
			if extra := int(tag>>2) - 59; extra > 0 { // its length follows in 1 to 4 bytes
				head += extra
				if len(in) < head {
					return out, false
				}
				length = 0
				for i := extra; i > 0; i-- {
					length = length<<8 | int(in[i])
				}
				length++
			}
			if length <= 0 || length > len(in)-head || length > end-len(out) {
				return out, false
			}
			out = append(out, in[head:head+length]...)
			in = in[head+length:]
			continue
		case 1:
			head = 2
			if len(in) >= head {
				length, offset = 4+int(tag>>2&7), int(tag>>5)<<8|int(in[1])
			}
		case 2:
			head = 3
			if len(in) >= head {
				length, offset = 1+int(tag>>2), int(binary.LittleEndian.Uint16(in[1:]))
			}
		case 3:
			head = 5
			if len(in) >= head {
				length, offset = 1+int(tag>>2), int(binary.LittleEndian.Uint32(in[1:]))
			}
		}
		if len(in) < head || offset <= 0 || offset > len(out)-from || length > end-len(out) {
			return out, false
		}
		for range length { // byte by byte: a copy may overlap what it writes
			out = append(out, out[len(out)-offset])
		}
		in = in[head:]
	}
	return out, len(out) == end
}

// Gzip returns text compressed.
func Gzip(text []byte) []byte {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write(text) // to memory: does not fail
	w.Close()
	return z.Bytes()
}
