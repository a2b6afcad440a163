package main

// This file pushes a scrape in pieces if the scrape is too large for the servers. Only the last
// piece names the scrape, because a server has the whole scrape only after the last piece.

import (
	"bytes"
	"context"
	"fmt"
)

// splitPush is the state of pushing one scrape in pieces.
type splitPush struct {
	*spoolDrain
	firstServer int         // the server that accepted the first piece; -1 if none did yet
	scattered   bool        // a second server accepted a piece, so no server has the whole scrape
	outcome     PushOutcome // outcome of the newest attempt to push a piece
	rejected    int         // number of samples in pieces that were refused for good
	cause       error       // why samples were rejected, or why the scrape is split
}

// pushInPieces pushes the scrape in flight, which is too large for the servers, in pieces and acts
// on the result. cause is the refusal of the whole scrape. An error ends the drain.
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
		d.cfg.Spool.MarkPushFailed(false) // the whole scrape is pushed again, first to the server that accepted the last piece
	default:
		d.adjustServerAndPushSize([]Scrape{sc}, s.outcome)
	}
	return nil
}

// pushHalves pushes the two halves of a scrape, splitting them further down to single lines if need
// be. If nameScrape is true, the last piece names the scrape. A piece whose push fails is retried
// alone. The whole scrape is not pushed again then, because a scrape with more pieces than the rate
// limit of the servers allows would never be delivered. An error ends the drain.
func (s *splitPush) pushHalves(ctx context.Context, sc Scrape, nameScrape bool) (endsDrain error) {
	if sc.Samples < 2 {
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

// pushPiece pushes a piece, retrying it until a server accepts or finally refuses it. A piece that
// is too large is split again. An error ends the drain.
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
	case failureReasonOf(err) == pushTooLarge:
		s.cause = err
		return s.pushHalves(ctx, piece, nameScrape)
	}
	s.noteRejectedPiece(piece, err)
	return nil
}

// tryPiece makes one attempt to push a piece.
func (s *splitPush) tryPiece(ctx context.Context, piece Scrape, nameScrape bool) (err error) {
	s.servers.chooseServer(s.cfg.Now())
	scattered := s.scattered || s.firstServer >= 0 && s.firstServer != s.servers.current
	// Do not name the scrape if a piece was rejected, because the scrape will be set aside, or if
	// two servers have pieces, because then no server has the whole scrape.
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

// halveScrape cuts a scrape of at least two samples into two scrapes, between two lines of its
// text.
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
