package main

// This file decodes a body while it is read, in parts that end where a line of text or a family of
// protobuf ends. So a decoder needs memory for one part instead of the whole body. Samples, errors
// and counts do not depend on how the body is cut. This file must not know where a body comes from.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

const (
	minStreamBuffer = 128 << 10 // bytes of the buffer of DecodeFrom, unless a line or a family is longer
	maxTextLine     = 1 << 20   // most bytes of a line of text with its newline; allows long comments
)

// DecodeFrom decodes a body as Decode does, while it reads the body from r. It stops at the first
// error of r, which it returns as it is; r must limit the size of the body to limit bytes. Samples
// that come before an error have been emitted then. A line of text must not exceed maxTextLine, which
// also bounds the memory for text. Memory for protobuf is bounded by three times the largest family,
// and grows only as bytes arrive. The components of histograms and summaries may repeat as much as in
// a body of limit bytes.
func (d *Decoder) DecodeFrom(r io.Reader, limit int, f Format, emit func(*RawSample) error) (UnsupportedParts, error) {
	d.begin(limit)
	buf := make([]byte, 0, minStreamBuffer)
	for {
		if len(buf) == cap(buf) {
			if f != FormatProto && len(buf) >= maxTextLine { // buf is the beginning of one line
				return d.skipped, fmt.Errorf("line %d: %w: a line has more than %d bytes", d.units+1, ErrTooLarge, maxTextLine)
			}
			buf = append(make([]byte, 0, 2*cap(buf)), buf...)
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		isLast := err == io.EOF
		if err != nil && !isLast {
			return d.skipped, err
		}
		part := len(buf)
		if !isLast {
			if part = wholeUnits(buf, n, f); part == 0 {
				continue
			}
		}
		if err := d.decodePart(buf[:part], f, isLast, emit); err != nil || isLast {
			return d.skipped, err
		}
		buf = buf[:copy(buf, buf[part:])]
	}
}

// wholeUnits returns the size of the whole lines or families with which buf begins. Without the last
// added bytes, buf must not have a whole one.
func wholeUnits(buf []byte, added int, f Format) int {
	if f != FormatProto {
		old := len(buf) - added
		if i := bytes.LastIndexByte(buf[old:], '\n'); i >= 0 {
			return old + i + 1
		}
		return 0
	}
	whole := 0
	for whole < len(buf) {
		size, head := binary.Uvarint(buf[whole:])
		if head <= 0 || size > uint64(len(buf)-whole-head) { // not whole, or malformed, which the decoder finds at the end of the body
			break
		}
		whole += head + int(size)
	}
	return whole
}
