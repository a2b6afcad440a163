package main

// One cursor over foreign bytes, which all formats of files and messages are read with. Its
// error is sticky, so that a decoder checks it once, after several fields. Bounds are checked
// before memory is taken. Numbers of fixed size are little endian. Pure. This file must not
// know of any format.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

var (
	errWireShort = errors.New("it ends early")
	errWireBound = errors.New("a field is out of bounds")
)

// WireReader reads fields from the front of bytes. After its first error every field is zero.
type WireReader struct {
	rest []byte
	err  error
}

// NewWireReader returns a reader of b, which it neither copies nor changes.
func NewWireReader(b []byte) WireReader { return WireReader{rest: b} }

// Len returns the number of bytes that are left.
func (r *WireReader) Len() int { return len(r.rest) }

// Err returns the first error.
func (r *WireReader) Err() error { return r.err }

// Done returns the first error, which is that bytes are left if nothing else failed.
func (r *WireReader) Done() error {
	if r.err == nil && len(r.rest) > 0 {
		r.fail(fmt.Errorf("%d bytes are left over", len(r.rest)))
	}
	return r.err
}

// Require fails the reader unless ok.
func (r *WireReader) Require(ok bool) {
	if !ok {
		r.fail(errWireBound)
	}
}

func (r *WireReader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.rest = nil
}

// Uvarint reads an unsigned varint of at most max.
func (r *WireReader) Uvarint(max uint64) uint64 {
	if len(r.rest) > 0 && r.rest[0] < 0x80 && uint64(r.rest[0]) <= max { // most have one byte
		v := r.rest[0]
		r.rest = r.rest[1:]
		return uint64(v)
	}
	v, n := binary.Uvarint(r.rest)
	if n <= 0 || v > max {
		r.failVarint(n)
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

// Varint reads a signed varint from min to max.
func (r *WireReader) Varint(min, max int64) int64 {
	v, n := binary.Varint(r.rest)
	if n <= 0 || v < min || v > max {
		r.failVarint(n)
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

func (r *WireReader) failVarint(decodedLen int) {
	if decodedLen == 0 {
		r.fail(errWireShort)
	} else {
		r.fail(errWireBound)
	}
}

// Count reads the number of items that follow, each of at least minItemSize bytes: there cannot be
// more than the bytes that are left hold. minItemSize is at least 1.
func (r *WireReader) Count(minItemSize int) int {
	n := r.Uvarint(1 << 62)
	if n > uint64(len(r.rest)/minItemSize) {
		r.fail(errWireShort)
		return 0
	}
	return int(n)
}

// Bytes reads n bytes, which are part of the bytes that are read; nil if there are fewer.
func (r *WireReader) Bytes(n int) []byte {
	if n < 0 || n > len(r.rest) {
		r.fail(errWireShort)
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

// Rest reads all bytes that are left.
func (r *WireReader) Rest() []byte { return r.Bytes(len(r.rest)) }

// ShortString reads a string of at most maxLen bytes behind a byte with its length, as
// AppendShortString wrote it.
func (r *WireReader) ShortString(maxLen int) string {
	n := int(r.Byte())
	if n > maxLen {
		r.fail(errWireBound)
		return ""
	}
	return string(r.Bytes(n))
}

// AppendShortString appends the length of s, at most 255, in a byte, and s.
func AppendShortString(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) }

// Byte reads one byte.
func (r *WireReader) Byte() byte {
	if b := r.Bytes(1); b != nil {
		return b[0]
	}
	return 0
}

// Uint16 reads 2 bytes.
func (r *WireReader) Uint16() uint16 {
	if b := r.Bytes(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

// Uint32 reads 4 bytes.
func (r *WireReader) Uint32() uint32 {
	if b := r.Bytes(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

// Uint64 reads 8 bytes.
func (r *WireReader) Uint64() uint64 {
	if b := r.Bytes(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

// castagnoli is read-only.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum returns the CRC32C of b.
func Checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }
