package main

// The cursor over foreign bytes: its bounds, and that its first error stays.

import (
	"encoding/binary"
	"math"
	"strings"
	"testing"
)

// TestWireReader reads fields of every kind, whole, cut short at each length, and out of bounds.
func TestWireReader(t *testing.T) {
	le := binary.LittleEndian
	for _, c := range []struct {
		name string
		b    []byte
		read func(r *WireReader) bool // whether the field is as written
		err  string                   // of all bytes
	}{
		{"byte", []byte{7}, func(r *WireReader) bool { return r.Byte() == 7 }, ""},
		{"uint16", le.AppendUint16(nil, 0x1234), func(r *WireReader) bool { return r.Uint16() == 0x1234 }, ""},
		{"uint32", le.AppendUint32(nil, 0x12345678), func(r *WireReader) bool { return r.Uint32() == 0x12345678 }, ""},
		{"uint64", le.AppendUint64(nil, math.MaxUint64), func(r *WireReader) bool { return r.Uint64() == math.MaxUint64 }, ""},
		{"uvarint", binary.AppendUvarint(nil, 300), func(r *WireReader) bool { return r.Uvarint(300) == 300 }, ""},
		{"varint", binary.AppendVarint(nil, -300), func(r *WireReader) bool { return r.Varint(-300, 0) == -300 }, ""},
		{"short", AppendShortString(nil, "abc"), func(r *WireReader) bool { return r.ShortString(3) == "abc" }, ""},
		{"count and bytes", []byte{2, 'a', 'b'}, func(r *WireReader) bool { return string(r.Bytes(r.Count(1))) == "ab" }, ""},
		{"rest", []byte("abc"), func(r *WireReader) bool { r.Bytes(1); return string(r.Rest()) == "bc" }, ""},
		{"require", []byte{3}, func(r *WireReader) bool { r.Require(r.Byte() == 3); return true }, ""},

		{"uvarint above its bound", binary.AppendUvarint(nil, 301), func(r *WireReader) bool { return r.Uvarint(300) == 0 }, "out of bounds"},
		{"uvarint beyond 64 bits", []byte(strings.Repeat("\xff", 11)), func(r *WireReader) bool { return r.Uvarint(math.MaxUint64) == 0 }, "out of bounds"},
		{"varint below its bound", binary.AppendVarint(nil, -301), func(r *WireReader) bool { return r.Varint(-300, 0) == 0 }, "out of bounds"},
		{"short above its bound", AppendShortString(nil, "abcd"), func(r *WireReader) bool { return r.ShortString(3) == "" }, "out of bounds"},
		{"more items than bytes", []byte{2, 0, 0, 0}, func(r *WireReader) bool { return r.Count(2) == 0 }, "ends early"},
		{"required in vain", []byte{4}, func(r *WireReader) bool { r.Require(r.Byte() == 3); return true }, "out of bounds"},
		{"left over", []byte{1, 2, 3}, func(r *WireReader) bool { return r.Byte() == 1 }, "2 bytes are left over"},
	} {
		r := NewWireReader(c.b)
		if !c.read(&r) {
			t.Errorf("%s: not as written", c.name)
		}
		if err := r.Done(); c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.err)
		}
		if r.Byte() != 0 || r.Uint64() != 0 || r.Uvarint(9) != 0 || r.Bytes(1) != nil || r.ShortString(9) != "" || r.Err() == nil {
			t.Errorf("%s: fields after the end", c.name)
		}
		for n := range c.b {
			if c.err != "" || c.name == "rest" && n > 0 {
				break
			}
			r := NewWireReader(c.b[:n])
			if c.read(&r); r.Done() == nil {
				t.Errorf("%s: the first %d bytes are taken for all", c.name, n)
			}
		}
	}
}
