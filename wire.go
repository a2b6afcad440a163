package main

// One cursor over foreign bytes. Invariant: its error is sticky, so that a decoder checks it
// once after several numbers, before it uses any of them or allocates by one. This file must
// not know of any format.

import "encoding/binary"

// WireReader reads numbers from the front of Rest. A number that is not there sets Bad, and
// it and all that follow are 0.
type WireReader struct {
	Rest []byte
	Bad  bool
}

func (r *WireReader) skip(n int) {
	if n <= 0 {
		r.Bad, r.Rest = true, nil
		return
	}
	r.Rest = r.Rest[n:]
}

// Uvarint reads an unsigned varint.
func (r *WireReader) Uvarint() uint64 {
	v, n := binary.Uvarint(r.Rest)
	if r.skip(n); r.Bad {
		return 0
	}
	return v
}

// Varint reads a signed varint.
func (r *WireReader) Varint() int64 {
	v, n := binary.Varint(r.Rest)
	if r.skip(n); r.Bad {
		return 0
	}
	return v
}

// Fixed64 reads 8 bytes, the least first.
func (r *WireReader) Fixed64() (v uint64) {
	if len(r.Rest) < 8 {
		r.skip(0)
		return 0
	}
	v = binary.LittleEndian.Uint64(r.Rest)
	r.skip(8)
	return v
}
