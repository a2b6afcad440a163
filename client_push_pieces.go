package main

// A scrape that is too large for the servers is pushed in pieces. The last piece names the
// scrape, because only then a server has all of it.

import (
	"bytes"
	"context"
	"fmt"
)

// maxOversizedLines is how many single lines of a scrape may be too large before no more of it is
// split: then the number of series is too large, and no piece is small enough.
const maxOversizedLines = 8

// splitPush is the delivery of one scrape in pieces.
type splitPush struct {
	*spoolDrain
	firstServer int  // the one that accepted the first piece; -1 if none did
	scattered   bool // another server accepted a piece, so none has the whole scrape
	outcome     PushOutcome
	oversized   int   // single lines that were too large
	rejected    int   // samples that no server accepts
	cause       error // why they were rejected, or why the scrape is split
}

// pushInPieces pushes a scrape in flight that is too large for the servers, and acts on the
// result. cause is the refusal. An error ends the drain.
func (d *spoolDrain) pushInPieces(ctx context.Context, sc Scrape, cause error) (endsDrain error) {
	s := splitPush{spoolDrain: d, firstServer: -1, cause: cause}
	err := s.pushHalves(ctx, sc, true)
	switch {
	case err != nil:
		d.cfg.Spool.MarkPushFailed(false)
		return err
	case s.rejected > 0:
		d.setScrapeAside(s.rejected, s.cause)
	case s.scattered:
		d.cfg.Spool.MarkPushFailed(false) // all pieces are pushed again, where the last one went
	default:
		d.adjustServerAndPushSize([]Scrape{sc}, s.outcome)
	}
	return nil
}

// pushHalves pushes the halves of a scrape, and so on down to single lines. If nameScrape, the last
// piece names the scrape. A piece that fails is tried again by itself: with the whole scrape
// anew, one of more pieces than the servers' rate limit allows would never arrive. An error ends
// the drain.
func (s *splitPush) pushHalves(ctx context.Context, sc Scrape, nameScrape bool) (endsDrain error) {
	if sc.Samples < 2 {
		s.oversized++
		s.noteRejectedPiece(sc, fmt.Errorf("one series alone is too large: %w", s.cause))
		return nil
	}
	first, second, err := halveScrape(sc)
	if err != nil {
		s.noteRejectedPiece(sc, err)
		return nil
	}
	if err := s.pushPiece(ctx, first, false); err != nil {
		return err
	}
	return s.pushPiece(ctx, second, nameScrape)
}

// pushPiece pushes a piece, and its halves if it is too large, too. An error ends the drain.
func (s *splitPush) pushPiece(ctx context.Context, piece Scrape, nameScrape bool) (endsDrain error) {
	err := s.tryPiece(ctx, piece, nameScrape)
	for err != nil && !isFinalRefusal(err) {
		if err := s.nextServerOrPause(ctx, err); err != nil {
			return err
		}
		err = s.tryPiece(ctx, piece, nameScrape)
	}
	s.backoff.reset()
	switch {
	case err == nil:
		return nil
	case failureReasonOf(err) == pushTooLarge && s.oversized < maxOversizedLines:
		s.cause = err
		return s.pushHalves(ctx, piece, nameScrape)
	}
	s.noteRejectedPiece(piece, err)
	return nil
}

// tryPiece is one attempt to push a piece.
func (s *splitPush) tryPiece(ctx context.Context, piece Scrape, nameScrape bool) (err error) {
	s.servers.chooseServer(s.cfg.Now())
	scattered := s.scattered || s.firstServer >= 0 && s.firstServer != s.servers.current
	// A scrape that is set aside in the end, or that no server has whole, is not named.
	s.outcome, err = s.push(ctx, []Scrape{piece}, nameScrape && s.rejected == 0 && !scattered)
	if err == nil {
		s.scattered = scattered
		if s.firstServer < 0 {
			s.firstServer = s.servers.current
		}
	}
	return err
}

func (s *splitPush) noteRejectedPiece(piece Scrape, why error) {
	s.rejected, s.cause = s.rejected+max(1, piece.Samples), why
}

// halveScrape cuts a scrape of at least two samples in two, between lines.
func halveScrape(sc Scrape) (first, second Scrape, err error) {
	text, err := sc.Text()
	if err != nil {
		return first, second, err
	}
	at := 0
	for range sc.Samples / 2 {
		at += bytes.IndexByte(text[at:], '\n') + 1
	}
	first, second = sc, sc
	first.Samples, first.Size, first.Gzip = sc.Samples/2, at, Gzip(text[:at])
	second.Samples, second.Size, second.Gzip = sc.Samples-sc.Samples/2, len(text)-at, Gzip(text[at:])
	return first, second, nil
}
