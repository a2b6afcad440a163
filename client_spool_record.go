package main

// The record of one spooled scrape. A record that decodes with its text can be sent. The sizes
// that a record states are bounded before the text is looked at. Pure.

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
)

const (
	// MaxPiece and MaxPieceText bound one scrape in the spool: the bytes of its
	// gzip and of its text.
	MaxPiece     = 32 << 20
	MaxPieceText = 8 * MaxPiece

	spoolKind    = 2             // of the record, and the version of its payload
	spoolKindOld = 1             // without what spoolKind has in front: not final
	spoolFinal   = 1 + 8         // bytes of that
	spoolHead    = 3*8 + 2*4 + 1 // bytes of the rest before the boot ID
	shortestLine = 4             // "a 0\n"
)

// Scrape is a cleaned scrape, or a piece of one.
type Scrape struct {
	Number  uint64 // names it to servers; the spool's to give
	At      Moment // when the source answered
	Source  int64  // what the source's clock showed then, in ms since the epoch
	Final   bool   // the times in the text are corrected, and never change again
	Shift   int64  // ms by which they are shifted; 0 unless Final
	Samples int
	Size    int    // bytes of the text exposition of the samples
	Gzip    []byte // the text, compressed; immutable
}

// ErrSpoolRead: the spool has scrapes and none of them can be read.
var ErrSpoolRead = errors.New("reading spool")
var errBadScrape = errors.New("not a spooled scrape")

// isLost reports an error that says that a scrape's file is gone or damaged. After another
// error the file may be good.
func isLost(err error) bool { return errors.Is(err, errBadScrape) || errors.Is(err, fs.ErrNotExist) }

// appendScrape appends the payload of the scrape's record, which is of spoolKind:
//
//	byte final; int64 shift, source, boot, wall; uint32 samples, size; byte length of the boot ID; boot ID; gzip
func appendScrape(b []byte, sc *Scrape) []byte {
	final := byte(0)
	if sc.Final {
		final = 1
	}
	b = append(b, final)
	for _, ms := range []int64{sc.Shift, sc.Source, sc.At.Boot, sc.At.Wall} {
		b = binary.LittleEndian.AppendUint64(b, uint64(ms))
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(sc.Samples))
	b = binary.LittleEndian.AppendUint32(b, uint32(sc.Size))
	b = append(append(b, byte(len(sc.At.BootID))), sc.At.BootID...)
	return append(b, sc.Gzip...)
}

// decodeScrape is strict, since it may be given what only looks like a record.
// With text it also decompresses, which says whether a server could read it. The
// result's gzip is part of payload.
func decodeScrape(kind byte, payload []byte, text bool) (sc Scrape, err error) {
	switch {
	case kind == spoolKind && len(payload) >= spoolFinal && payload[0] <= 1:
		sc.Final, sc.Shift = payload[0] == 1, int64(binary.LittleEndian.Uint64(payload[1:]))
		payload = payload[spoolFinal:]
	case kind != spoolKindOld:
		return sc, fmt.Errorf("%w: a record of kind %d with %d bytes", errBadScrape, kind, len(payload))
	}
	if len(payload) < spoolHead {
		return sc, fmt.Errorf("%w: %d bytes", errBadScrape, len(payload))
	}
	for i, ms := range []*int64{&sc.Source, &sc.At.Boot, &sc.At.Wall} {
		*ms = int64(binary.LittleEndian.Uint64(payload[8*i:]))
	}
	samples, size := binary.LittleEndian.Uint32(payload[24:]), binary.LittleEndian.Uint32(payload[28:])
	id, rest := int(payload[32]), payload[spoolHead:]
	if id > len(rest) {
		return sc, fmt.Errorf("%w: a boot ID of %d bytes in %d", errBadScrape, id, len(rest))
	}
	sc.Samples, sc.Size = int(samples), int(min(size, MaxPieceText+1))
	sc.At.BootID, sc.Gzip = string(rest[:id]), rest[id:]
	if err := sc.check(); err != nil || !text {
		return sc, err
	}
	return sc, sc.checkText()
}

// check looks at all but the text.
func (sc *Scrape) check() error {
	switch {
	case !sc.At.IsValid() || sc.Source < 0 || sc.Source > MaxMoment:
		return fmt.Errorf("%w: clocks at %+v, the source's at %d ms", errBadScrape, sc.At, sc.Source)
	case max(sc.Shift, -sc.Shift) > MaxMoment || sc.Shift < -MaxMoment || sc.Shift != 0 && !sc.Final:
		return fmt.Errorf("%w: shifted by %d ms", errBadScrape, sc.Shift)
	case sc.Size > MaxPieceText || sc.Samples > sc.Size/shortestLine || sc.Samples == 0 && sc.Size > 0:
		return fmt.Errorf("%w: %d samples in %d bytes of text", errBadScrape, sc.Samples, sc.Size)
	case len(sc.Gzip) > MaxPiece || !bytes.HasPrefix(sc.Gzip, []byte{0x1f, 0x8b, 8}):
		return fmt.Errorf("%w: %d bytes that are not gzip", errBadScrape, len(sc.Gzip))
	}
	return nil
}

// checkText decompresses, and compares with what is stated of the text.
func (sc *Scrape) checkText() error {
	z, err := gzip.NewReader(bytes.NewReader(sc.Gzip))
	if err != nil {
		return fmt.Errorf("%w: %w", errBadScrape, err)
	}
	var c lineCounter
	if _, err := io.Copy(&c, io.LimitReader(z, int64(sc.Size)+1)); err != nil {
		return fmt.Errorf("%w: %w", errBadScrape, err)
	}
	if c.bytes != sc.Size || c.lines != sc.Samples || c.bytes > 0 && c.last != '\n' {
		return fmt.Errorf("%w: %d lines in %d bytes, instead of %d in %d", errBadScrape, c.lines, c.bytes, sc.Samples, sc.Size)
	}
	return nil
}

type lineCounter struct {
	bytes, lines int
	last         byte
}

func (c *lineCounter) Write(p []byte) (int, error) {
	if len(p) > 0 {
		c.bytes += len(p)
		c.lines += bytes.Count(p, []byte{'\n'})
		c.last = p[len(p)-1]
	}
	return len(p), nil
}
