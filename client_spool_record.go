package main

// This file encodes and decodes the record of one scrape in the spool. A scrape is sent from a record
// that an earlier process wrote only if its text decompresses to the bytes and lines that the record
// states. The checksum of the record suffices for this process's own records. The sizes in
// a record are checked against limits before the text is decompressed. Pure: no I/O, no clock.

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
)

const (
	// MaxPiece and MaxPieceText bound one scrape in the spool: MaxPiece the bytes of its gzip,
	// MaxPieceText the bytes of its text.
	MaxPiece     = 32 << 20
	MaxPieceText = 8 * MaxPiece

	scrapeKind   = 3 // kind of the record, which is also the version of its payload
	shortestLine = 4 // bytes of the shortest line, "a 0\n"
)

// Scrape is a cleaned scrape, or a piece of one.
type Scrape struct {
	Number     uint64 // identifies the scrape to servers; the spool assigns it
	At         Moment // when the answer of the source arrived
	SourceTime int64  // time of the source's clock at At, in ms since the epoch
	Corrected  bool   // the sample times in the text are corrected to the servers' clock and must not change again
	Shift      int64  // ms by which the sample times were shifted; 0 unless Corrected
	Samples    int    // number of lines in the text
	Size       int    // bytes of the text, in the text exposition format
	Gzip       []byte // the compressed text; immutable
}

// appendScrapePayload appends the payload of a record of scrapeKind:
//
//	byte corrected; int64 shift, source time; moment; uint32 samples, size; gzip
func appendScrapePayload(b []byte, sc *Scrape) []byte {
	corrected := byte(0)
	if sc.Corrected {
		corrected = 1
	}
	b = append(b, corrected)
	b = binary.LittleEndian.AppendUint64(b, uint64(sc.Shift))
	b = binary.LittleEndian.AppendUint64(b, uint64(sc.SourceTime))
	b = appendMoment(b, sc.At)
	b = binary.LittleEndian.AppendUint32(b, uint32(sc.Samples))
	b = binary.LittleEndian.AppendUint32(b, uint32(sc.Size))
	return append(b, sc.Gzip...)
}

// decodeScrape decodes a payload strictly, because a damaged log may contain bytes that only look
// like a record. If checkText is true, it also decompresses the text and checks its numbers of
// bytes and lines. The Gzip of the result shares memory with payload.
func decodeScrape(payload []byte, checkText bool) (sc Scrape, err error) {
	r := NewWireReader(payload)
	corrected := r.Byte()
	sc.Corrected = corrected == 1
	sc.Shift, sc.SourceTime = int64(r.Uint64()), int64(r.Uint64())
	sc.At = readMoment(&r)
	sc.Samples, sc.Size = int(r.Uint32()), int(r.Uint32())
	sc.Gzip = r.Rest()
	r.Require(corrected <= 1)
	if err := r.Done(); err != nil {
		return sc, fmt.Errorf("malformed scrape: %w", err)
	}
	if err := sc.checkFields(); err != nil || !checkText {
		return sc, err
	}
	return sc, sc.checkTextCounts()
}

// appendMoment appends the wall time and the boot time as int64, one byte with the length of the
// boot ID, and the boot ID.
func appendMoment(b []byte, m Moment) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(m.Wall))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.Boot))
	return AppendShortString(b, m.BootID)
}

// readMoment reads a moment that appendMoment wrote. The reader fails if the moment is not valid.
func readMoment(r *WireReader) (m Moment) {
	m.Wall, m.Boot = int64(r.Uint64()), int64(r.Uint64())
	m.BootID = r.ShortString(MaxBootID)
	r.Require(m.IsValid())
	return m
}

// checkFields checks the clocks, the shift, the sizes and the first bytes of the gzip. It does not
// decompress the text.
func (sc *Scrape) checkFields() error {
	switch {
	case !sc.At.IsValid() || sc.SourceTime < 0 || sc.SourceTime > MaxMoment:
		return fmt.Errorf("malformed scrape: clocks at %+v, the source's clock at %d ms", sc.At, sc.SourceTime)
	case sc.Shift < -MaxMoment || sc.Shift > MaxMoment || sc.Shift != 0 && !sc.Corrected:
		return fmt.Errorf("malformed scrape: shifted by %d ms", sc.Shift)
	case min(sc.Samples, sc.Size) < 0 || sc.Size > MaxPieceText || sc.Samples > sc.Size/shortestLine || sc.Samples == 0 && sc.Size > 0:
		return fmt.Errorf("malformed scrape: %d samples in %d bytes of text", sc.Samples, sc.Size)
	case len(sc.Gzip) > MaxPiece || !bytes.HasPrefix(sc.Gzip, []byte{0x1f, 0x8b, 8}):
		return fmt.Errorf("malformed scrape: %d bytes that are not gzip", len(sc.Gzip))
	}
	return nil
}

// Text decompresses and returns the samples in the text exposition format.
func (sc *Scrape) Text() ([]byte, error) {
	text, _, err := new(Decompressor).Decompress(sc.Gzip, "gzip", sc.Size)
	return text, err
}

// eachSample decompresses and decodes the text and calls emit for each sample, until emit returns an
// error.
func (sc *Scrape) eachSample(emit func(*RawSample) error) error {
	z, err := gzip.NewReader(bytes.NewReader(sc.Gzip))
	if err != nil {
		return fmt.Errorf("decompressing scrape: %w", err)
	}
	if _, err := new(Decoder).DecodeFrom(io.LimitReader(z, int64(sc.Size)+1), sc.Size+1, FormatText, emit); err != nil {
		return fmt.Errorf("decoding scrape: %w", err)
	}
	return nil
}

// checkTextCounts decompresses the text and checks that it has Samples lines and Size bytes.
func (sc *Scrape) checkTextCounts() error {
	z, err := gzip.NewReader(bytes.NewReader(sc.Gzip))
	if err != nil {
		return fmt.Errorf("malformed scrape: %w", err)
	}
	var c lineCountSink
	if _, err := io.Copy(&c, io.LimitReader(z, int64(sc.Size)+1)); err != nil {
		return fmt.Errorf("malformed scrape: %w", err)
	}
	if c.bytes != sc.Size || c.lines != sc.Samples || c.bytes > 0 && c.last != '\n' {
		return fmt.Errorf("malformed scrape: its text has %d lines in %d bytes, want %d lines in %d bytes", c.lines, c.bytes, sc.Samples, sc.Size)
	}
	return nil
}

// lineCountSink counts the bytes and lines written to it.
type lineCountSink struct {
	bytes, lines int
	last         byte
}

func (c *lineCountSink) Write(p []byte) (int, error) {
	if len(p) > 0 {
		c.bytes += len(p)
		c.lines += bytes.Count(p, []byte{'\n'})
		c.last = p[len(p)-1]
	}
	return len(p), nil
}
