package main

// This file renders the cleaned samples of a scrape and compresses them, in one piece or in several if
// one would exceed the limits of a push. Text goes to the compressor at once, so that only compressed
// pieces are kept. Pure: no I/O, no clock.

import (
	"bytes"
	"compress/gzip"
	"fmt"
)

// textBuffer is how many bytes of text a pieceWriter collects for the compressor.
const textBuffer = 32 << 10

// pieceWriter makes the pieces of one scrape. It is not safe for concurrent use.
type pieceWriter struct {
	piece  Scrape // the piece that is being made; Gzip is nil
	limit  int64  // most bytes of the gzip of a piece; its text may have MaxDecodedFactor times as many
	text   []byte // rendered samples of the piece that the compressor does not have yet
	z      bytes.Buffer
	gzip   *gzip.Writer // compresses into z
	pieces []Scrape     // the pieces that are done
	err    error        // of the last piece that could not be halved or read again

	// A series that alone exceeds the limits is dropped.
	tooLarge       int    // number of such series
	tooLargeSize   int    // bytes of the sample of the last one
	tooLargeSeries string // excerpt of that sample
}

// newPieceWriter returns a pieceWriter. Each piece has the fields of piece but those about its text,
// and Shift is added to the time of each sample.
func newPieceWriter(piece Scrape, limit int64) *pieceWriter {
	w := &pieceWriter{piece: piece, limit: limit}
	w.gzip, _ = gzip.NewWriterLevel(&w.z, GzipLevel) // cannot fail, because the level is valid
	return w
}

// add adds a sample. The line is the rendered line of its series, and t is by the source's clock.
func (w *pieceWriter) add(line []byte, t int64, v float64) {
	from := len(w.text)
	w.text = AppendSample(w.text, line, t+w.piece.Shift, v)
	size := len(w.text) - from
	// The compressor keeps up to some tens of KB of output back. With the usual limits, a piece that
	// ends at seven eighths of the limit is therefore rarely too large.
	if isFull := int64(w.piece.Size+size) > MaxDecodedFactor*w.limit || int64(w.z.Len()) > w.limit*7/8; isFull && w.piece.Samples > 0 {
		w.compress(w.text[:from])
		w.endPiece()
		w.text = w.text[:copy(w.text, w.text[from:])]
	}
	w.piece.Samples, w.piece.Size = w.piece.Samples+1, w.piece.Size+size
	if len(w.text) >= textBuffer {
		w.compress(w.text)
		w.text = w.text[:0]
	}
}

// finish ends the last piece and returns all pieces. A scrape without samples, or of which no sample
// is within the limits, has one empty piece, so that servers see that the site is there.
func (w *pieceWriter) finish() ([]Scrape, error) {
	w.compress(w.text)
	if w.piece.Samples > 0 {
		w.endPiece()
	}
	if len(w.pieces) == 0 {
		w.endPiece()
	}
	return w.pieces, w.err
}

// compress gives text to the compressor. It cannot fail, because a bytes.Buffer accepts everything.
func (w *pieceWriter) compress(text []byte) { w.gzip.Write(text) }

// endPiece ends the current piece, of which the compressor has all text, and begins the next one.
func (w *pieceWriter) endPiece() {
	w.gzip.Close()
	done := w.piece
	done.Gzip = bytes.Clone(w.z.Bytes())
	w.keep(done)
	w.piece.Samples, w.piece.Size = 0, 0
	w.z.Reset()
	w.gzip.Reset(&w.z)
}

// keep keeps a piece that is within the limits. It halves a larger piece, and drops one of a single
// sample.
func (w *pieceWriter) keep(sc Scrape) {
	if int64(sc.Size) <= MaxDecodedFactor*w.limit && int64(len(sc.Gzip)) <= w.limit || sc.Samples == 0 {
		w.pieces = append(w.pieces, sc)
		return
	}
	if sc.Samples > 1 {
		first, second, err := halveScrape(sc)
		if err != nil {
			w.err = fmt.Errorf("halving a piece of the scrape: %w", err)
			return
		}
		w.keep(first)
		w.keep(second)
		return
	}
	text, err := sc.Text()
	if err != nil {
		w.err = fmt.Errorf("reading a piece of the scrape: %w", err)
		return
	}
	w.tooLarge, w.tooLargeSize, w.tooLargeSeries = w.tooLarge+1, len(text), Excerpt(text)
}
