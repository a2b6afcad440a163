package main

// A scrape that is too large for the servers is pushed in pieces. The last piece names the
// scrape, because only then all of it is with the server.

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
)

// splitting is a scrape that is pushed in pieces.
type splitting struct {
	round   *round
	outcome SpoolOutcome
	at      int  // the server that took the first piece; -1 if none did
	apart   bool // another took a piece: no server has all
	refused int  // samples that no server will have, and why
	why     *pushError
	alone   int // lines that were refused though nothing was with them
}

// split pushes the halves of a scrape that is too large for the servers, which
// may be stricter than LimitBytes, and so on down to single lines. A piece that
// fails is tried again by itself: with the whole scrape anew, one of more pieces
// than the servers' pace allows would never end. When many lines were refused
// alone it is the number of series that is too large, and no piece is small
// enough: then pieces are no longer split. If named, the last piece names the scrape,
// since only then all of it is with the server. The error is why it had to end.
func (p *Pusher) split(ctx context.Context, sc Scrape, named bool, s *splitting) error {
	halves, err := halve(sc)
	if err == nil && len(halves) == 0 {
		s.alone++
		err = fmt.Errorf("one series alone is too large: %w", s.why)
	}
	if err != nil {
		s.refused, s.why = s.refused+max(1, sc.Samples), &pushError{err: err}
		return nil
	}
	for i, half := range halves {
		last := named && i == len(halves)-1
		var e *pushError
		var apart bool
		for {
			p.choose(s.round)
			apart = s.apart || s.at >= 0 && s.at != s.round.at
			// A scrape that is set aside in the end is not named.
			s.outcome, e = p.push(ctx, s.round, []Scrape{half}, last && s.refused == 0 && !apart)
			if e == nil || e.final {
				break
			}
			if err := p.again(ctx, e, s.round); err != nil {
				return err
			}
		}
		s.round.backoff = minBackoff
		switch {
		case e == nil:
			s.apart = apart
			if s.at < 0 {
				s.at = s.round.at
			}
		case e.large && s.alone < maxAlone:
			s.why = e
			if err := p.split(ctx, half, last, s); err != nil {
				return err
			}
		default:
			s.refused, s.why = s.refused+half.Samples, e
		}
	}
	return nil
}

// halve cuts a scrape in two between lines; into none if it has only one.
func halve(sc Scrape) ([]Scrape, error) {
	z, err := gzip.NewReader(bytes.NewReader(sc.Gzip))
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(z)
	if err != nil {
		return nil, err
	}
	if sc.Samples < 2 {
		return nil, nil
	}
	at := 0
	for range sc.Samples / 2 {
		at += bytes.IndexByte(text[at:], '\n') + 1
	}
	first, second := sc, sc
	first.Samples, first.Size, first.Gzip = sc.Samples/2, at, Gzip(text[:at])
	second.Samples, second.Size, second.Gzip = sc.Samples-sc.Samples/2, len(text)-at, Gzip(text[at:])
	return []Scrape{first, second}, nil
}
