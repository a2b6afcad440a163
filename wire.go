package main

// WireReader reads fields from bytes that this program did not necessarily write. All binary file
// and message formats are decoded with it. Its error is sticky, so that a decoder can read several
// fields and then check for an error once. It checks lengths before it allocates memory. Fixed-size
// integers are little endian. Pure: no I/O. This file must not know of any particular format.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

var (
	errWireShort = errors.New("the data ends early")
	errWireBound = errors.New("a field is out of bounds")
)

// WireReader reads fields one after the other from a byte slice. After its first error every read
// returns the zero value. It is not safe for concurrent use.
type WireReader struct {
	rest []byte
	err  error
}

// NewWireReader returns a reader of b. The reader does not copy b and never changes it.
func NewWireReader(b []byte) WireReader { return WireReader{rest: b} }

// Len returns the number of unread bytes.
func (r *WireReader) Len() int { return len(r.rest) }

// Err returns the first error.
func (r *WireReader) Err() error { return r.err }

// Done returns the first error. If no read failed but unread bytes are left, Done returns an error
// about the unread bytes.
func (r *WireReader) Done() error {
	if r.err == nil && len(r.rest) > 0 {
		r.fail(fmt.Errorf("%d bytes are left over", len(r.rest)))
	}
	return r.err
}

// Require makes the reader fail if ok is false. Decoders use it to check the value of a field.
func (r *WireReader) Require(ok bool) {
	if !ok {
		r.fail(errWireBound)
	}
}

// fail records the first error and discards the unread bytes.
func (r *WireReader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.rest = nil
}

// Uvarint reads an unsigned varint. If the value is above max, the reader fails.
func (r *WireReader) Uvarint(max uint64) uint64 {
	// Fast paths, because most varints have one byte or two.
	if b := r.rest; len(b) > 0 && b[0] < 0x80 && uint64(b[0]) <= max {
		r.rest = b[1:]
		return uint64(b[0])
	} else if len(b) > 1 && b[0] >= 0x80 && b[1] < 0x80 {
		if v := uint64(b[0]&0x7f) | uint64(b[1])<<7; v <= max {
			r.rest = b[2:]
			return v
		}
	}
	v, n := binary.Uvarint(r.rest)
	if n <= 0 || v > max {
		r.failVarint(n)
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

// Varint reads a signed varint. If the value is below min or above max, the reader fails.
func (r *WireReader) Varint(min, max int64) int64 {
	v, n := binary.Varint(r.rest)
	if n <= 0 || v < min || v > max {
		r.failVarint(n)
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

// failVarint makes the reader fail at a varint that is cut off or out of bounds. decodedLen is the
// length that encoding/binary returned: 0 means that the bytes end within the varint.
func (r *WireReader) failVarint(decodedLen int) {
	if decodedLen == 0 {
		r.fail(errWireShort)
	} else {
		r.fail(errWireBound)
	}
}

// Count reads the number of items that follow. The reader fails if that many items of minItemSize
// bytes each do not fit into the unread bytes. The caller may therefore allocate memory for the
// items without checking the number. minItemSize must be at least 1.
func (r *WireReader) Count(minItemSize int) int {
	n := r.Uvarint(1 << 62)
	if n > uint64(len(r.rest)/minItemSize) {
		r.fail(errWireShort)
		return 0
	}
	return int(n)
}

// Bytes reads n bytes. The result shares memory with the input. If fewer than n bytes are left, the
// reader fails and the result is nil.
func (r *WireReader) Bytes(n int) []byte {
	if n < 0 || n > len(r.rest) {
		r.fail(errWireShort)
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

// Rest reads all unread bytes.
func (r *WireReader) Rest() []byte { return r.Bytes(len(r.rest)) }

// ShortString reads a string that AppendShortString wrote: one byte with the length, then the
// bytes. If the length is above maxLen, the reader fails.
func (r *WireReader) ShortString(maxLen int) string {
	n := int(r.Byte())
	if n > maxLen {
		r.fail(errWireBound)
		return ""
	}
	return string(r.Bytes(n))
}

// AppendShortString appends one byte with the length of s, then s. s must have at most 255 bytes.
func AppendShortString(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) }

// Byte reads one byte.
func (r *WireReader) Byte() byte {
	if b := r.Bytes(1); b != nil {
		return b[0]
	}
	return 0
}

// Uint16 reads 2 bytes, little endian.
func (r *WireReader) Uint16() uint16 {
	if b := r.Bytes(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

// Uint32 reads 4 bytes, little endian.
func (r *WireReader) Uint32() uint32 {
	if b := r.Bytes(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

// Uint64 reads 8 bytes, little endian.
func (r *WireReader) Uint64() uint64 {
	if b := r.Bytes(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

// castagnoli is the table of CRC32C. It is never changed.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum returns the CRC32C (Castagnoli) of b.
func Checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }
