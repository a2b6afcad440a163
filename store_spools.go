package main

// SiteSpools records which scrapes of a site's client spools the store has. A scrape is held once a
// batch that names it is committed. It becomes read when the store notices that every consumer has
// read this batch. A read scrape stays read even if its batch leaves the store. The number of
// spools and of scrape numbers is bounded. If the store forgets a scrape because of these bounds,
// the client only sends the scrape again. Pure: no I/O, no clock, no locks.

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// maxSpools is the maximum number of spools remembered per site. A client uses a new spool ID only
// when its spool directory is new.
const maxSpools = 4

// SiteSpools are the known spools of one site. The zero value is empty. It is not safe for
// concurrent use.
type SiteSpools struct{ spools []siteSpool } // the spool that a stored batch named most recently is last

// siteSpool is one spool, with the numbers of its held and read scrapes.
type siteSpool struct {
	id          uint64
	read        Ranges
	held        []heldScrapes // ascending by seq
	heldNumbers Ranges        // union of the numbers of held, at most MaxRanges ranges; kept because each push asks for it
}

// heldScrapes are scrapes whose accepted samples are all in batches up to seq.
type heldScrapes struct {
	seq     uint64
	numbers Ranges
}

// index returns the index of a spool in spools, or -1 if the spool is not known.
func (s *SiteSpools) index(spoolID uint64) int {
	return slices.IndexFunc(s.spools, func(p siteSpool) bool { return p.id == spoolID })
}

// find returns a spool, or nil if the spool is not known.
func (s *SiteSpools) find(spoolID uint64) *siteSpool {
	if i := s.index(spoolID); i >= 0 {
		return &s.spools[i]
	}
	return nil
}

// IsEmpty reports whether no spool is known.
func (s *SiteSpools) IsEmpty() bool { return len(s.spools) == 0 }

// HasOther reports whether a spool other than this one is known.
func (s *SiteSpools) HasOther(spoolID uint64) bool {
	return slices.ContainsFunc(s.spools, func(p siteSpool) bool { return p.id != spoolID })
}

// findOrAdd returns the spool with this ID, adding the spool if it is not known. It moves the spool
// to the end of spools. If maxSpools spools are known, a new spool replaces the first one, whose
// last use is the longest ago.
func (s *SiteSpools) findOrAdd(spoolID uint64) *siteSpool {
	p := siteSpool{id: spoolID}
	if i := s.index(spoolID); i >= 0 {
		p = s.spools[i]
		s.spools = slices.Delete(s.spools, i, i+1)
	} else if len(s.spools) == maxSpools {
		s.spools = slices.Delete(s.spools, 0, 1)
	}
	s.spools = append(s.spools, p)
	return &s.spools[len(s.spools)-1]
}

// AddHeldScrapes records scrapes as held. All accepted samples of these scrapes are in batches up
// to upToSeq. upToSeq must not be lower than in an earlier call. If the spool then has more than
// MaxRanges ranges of held numbers, AddHeldScrapes merges pairs of held entries. If that does not
// suffice, it forgets the oldest held entries.
func (s *SiteSpools) AddHeldScrapes(names ScrapeNames, upToSeq uint64) {
	if names.SpoolID == 0 || len(names.Numbers) == 0 {
		return
	}
	p := s.findOrAdd(names.SpoolID)
	p.held = append(p.held, heldScrapes{upToSeq, names.Numbers})
	p.heldNumbers = p.heldNumbers.AddAll(names.Numbers)
	if p.heldRangeCount() > MaxRanges {
		p.mergeHeldInPairs()
	}
	for p.heldRangeCount() > MaxRanges && len(p.held) > 1 {
		p.forgetOldestHeld(1)
	}
}

// forgetOldestHeld removes the first n entries of held.
func (p *siteSpool) forgetOldestHeld(n int) {
	if n == 0 {
		return
	}
	p.held = slices.Delete(p.held, 0, n)
	p.heldNumbers = p.heldNumbers[:0]
	for _, h := range p.held {
		p.heldNumbers = p.heldNumbers.AddAll(h.numbers)
	}
}

func (p *siteSpool) heldRangeCount() (n int) {
	for _, h := range p.held {
		n += len(h.numbers)
	}
	return n
}

// mergeHeldInPairs merges pairs of adjacent entries, because their numbers often form one range. A
// merged entry has the higher seq of the two. The scrapes of the older entry therefore count as
// read only when the scrapes of the newer entry do.
func (p *siteSpool) mergeHeldInPairs() {
	merged := p.held[:0:0]
	for pair := range slices.Chunk(p.held, 2) {
		last := pair[len(pair)-1]
		if len(pair) == 2 {
			last.numbers = slices.Clone(pair[0].numbers).AddAll(last.numbers)
		}
		merged = append(merged, last)
	}
	p.held = merged
}

// HasAll reports whether every named scrape is held or read. It returns false if names is empty.
func (s *SiteSpools) HasAll(names ScrapeNames) bool {
	p := s.find(names.SpoolID)
	if p == nil || len(names.Numbers) == 0 {
		return false
	}
	for _, r := range names.Numbers {
		for from := r.From; from <= r.To; from++ {
			end := max(p.heldNumbers.EndOfRangeWith(from), p.read.EndOfRangeWith(from))
			if end == 0 {
				return false
			}
			from = end
		}
	}
	return true
}

// MarkReadUpTo marks as read all held scrapes whose accepted samples are all in batches up to seq.
// Every consumer must have read these batches.
func (s *SiteSpools) MarkReadUpTo(seq uint64) {
	for i := range s.spools {
		p := &s.spools[i]
		n := 0
		for n < len(p.held) && p.held[n].seq <= seq {
			p.read = p.read.AddAll(p.held[n].numbers)
			n++
		}
		p.forgetOldestHeld(n)
	}
}

// HeldAndRead returns the numbers of a spool that are held but not read, and the numbers that are
// read.
func (s *SiteSpools) HeldAndRead(spoolID uint64) (held, read Ranges) {
	p := s.find(spoolID)
	if p == nil {
		return nil, nil
	}
	return p.heldNumbers.Without(p.read), slices.Clone(p.read)
}

// Clone returns a copy that stays unchanged when s changes.
func (s *SiteSpools) Clone() (k SiteSpools) {
	for _, p := range s.spools {
		k.spools = append(k.spools, siteSpool{p.id, slices.Clone(p.read), slices.Clone(p.held), slices.Clone(p.heldNumbers)})
	}
	return k
}

// EncodeRecords returns the payloads of the log records for s, one per spool. A payload has the
// spool ID, then a 0 followed by the read numbers (if there are any), then for each held entry its
// seq followed by its numbers.
func (s *SiteSpools) EncodeRecords() (payloads [][]byte) {
	for _, p := range s.spools {
		b := binary.LittleEndian.AppendUint64(nil, p.id)
		if len(p.read) > 0 {
			b = AppendRanges(binary.AppendUvarint(b, 0), p.read)
		}
		for _, h := range p.held {
			b = AppendRanges(binary.AppendUvarint(b, h.seq), h.numbers)
		}
		payloads = append(payloads, b)
	}
	return payloads
}

// DecodeRecord adds the spool in one payload that EncodeRecords returned. A known spool with the
// same ID is replaced.
func (s *SiteSpools) DecodeRecord(payload []byte) error {
	r := NewWireReader(payload)
	decoded := SiteSpools{}
	id := r.Uint64()
	r.Require(id != 0)
	p := decoded.findOrAdd(id)
	for r.Len() > 0 {
		if seq, numbers := r.Uvarint(MaxSeq), ReadRanges(&r); seq == 0 {
			p.read = p.read.AddAll(numbers)
		} else {
			decoded.AddHeldScrapes(ScrapeNames{id, numbers}, seq)
			p = decoded.find(id)
		}
	}
	if err := r.Done(); err != nil {
		return fmt.Errorf("decoding spool record: %w", err)
	}
	*s.findOrAdd(id) = *p
	return nil
}

// ForgetHeldScrapes forgets all scrapes that are held but not read. Recovery calls it after damage
// to the log, because the batches of these scrapes may be lost.
func (s *SiteSpools) ForgetHeldScrapes() {
	for i := range s.spools {
		s.spools[i].held, s.spools[i].heldNumbers = nil, nil
	}
}
