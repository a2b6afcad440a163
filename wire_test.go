package main

// This file tests WireReader: the values of its fields, the bounds of fields that have any, and
// data that is cut off or too long.

import (
	"encoding/binary"
	"math"
	"strings"
	"testing"
)

// WireReader returns each field as it was written. It reports an error for a field that is cut off
// or out of its bounds, and for bytes that are left over. At the end of the data and after an
// error, the fields that the test reads next are zero.
func TestWireReader(t *testing.T) {
	le := binary.LittleEndian
	for _, c := range []struct {
		name string
		b    []byte
		read func(r *WireReader) bool // reads the field, and reports whether it is as expected
		err  string                   // part of the error; "": no error
	}{
		{"byte", []byte{7}, func(r *WireReader) bool { return r.Byte() == 7 }, ""},
		{"uint16", le.AppendUint16(nil, 0x1234), func(r *WireReader) bool { return r.Uint16() == 0x1234 }, ""},
		{"uint32", le.AppendUint32(nil, 0x12345678), func(r *WireReader) bool { return r.Uint32() == 0x12345678 }, ""},
		{"uint64", le.AppendUint64(nil, math.MaxUint64), func(r *WireReader) bool { return r.Uint64() == math.MaxUint64 }, ""},
		{"uvarint", binary.AppendUvarint(nil, 300), func(r *WireReader) bool { return r.Uvarint(300) == 300 }, ""},
		{"varint", binary.AppendVarint(nil, -300), func(r *WireReader) bool { return r.Varint(-300, 0) == -300 }, ""},
		{"short string", AppendShortString(nil, "abc"), func(r *WireReader) bool { return r.ShortString(3) == "abc" }, ""},
		{"count and bytes", []byte{2, 'a', 'b'}, func(r *WireReader) bool { return string(r.Bytes(r.Count(1))) == "ab" }, ""},
		{"rest", []byte("abc"), func(r *WireReader) bool { r.Bytes(1); return string(r.Rest()) == "bc" }, ""},
		{"require", []byte{3}, func(r *WireReader) bool { r.Require(r.Byte() == 3); return true }, ""},

		{"uvarint above the bound", binary.AppendUvarint(nil, 301), func(r *WireReader) bool { return r.Uvarint(300) == 0 }, "out of bounds"},
		{"uvarint beyond 64 bits", []byte(strings.Repeat("\xff", 11)), func(r *WireReader) bool { return r.Uvarint(math.MaxUint64) == 0 }, "out of bounds"},
		{"varint below the bound", binary.AppendVarint(nil, -301), func(r *WireReader) bool { return r.Varint(-300, 0) == 0 }, "out of bounds"},
		{"short string above the bound", AppendShortString(nil, "abcd"), func(r *WireReader) bool { return r.ShortString(3) == "" }, "out of bounds"},
		{"more items than bytes", []byte{2, 0, 0, 0}, func(r *WireReader) bool { return r.Count(2) == 0 }, "ends early"},
		{"require a condition that fails", []byte{4}, func(r *WireReader) bool { r.Require(r.Byte() == 3); return true }, "out of bounds"},
		{"bytes left over", []byte{1, 2, 3}, func(r *WireReader) bool { return r.Byte() == 1 }, "2 bytes are left over"},
	} {
		r := NewWireReader(c.b)
		if !c.read(&r) {
			t.Errorf("%s: the field is not as expected", c.name)
		}
		if err := r.Done(); c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: got error %v, want %q", c.name, err, c.err)
		}
		if r.Byte() != 0 || r.Uint64() != 0 || r.Uvarint(9) != 0 || r.Bytes(1) != nil || r.ShortString(9) != "" || r.Err() == nil {
			t.Errorf("%s: a field after the end is not zero, or there is no error", c.name)
		}
		for n := range c.b {
			if c.err != "" || c.name == "rest" && n > 0 {
				break
			}
			r := NewWireReader(c.b[:n])
			if c.read(&r); r.Done() == nil {
				t.Errorf("%s: no error when only the first %d bytes are read", c.name, n)
			}
		}
	}
}
