package main

// The scrapes of a site's spools that a store has. A scrape is held when the batch of its push
// is held, and read when every consumer that counts has read that batch. A number that was read
// stays read, whatever becomes of its batch. Spools and numbers are bounded; a number that is
// forgotten is only sent again. Pure.

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// maxSpools bounds the spools that are remembered of a site. A client takes a new spool ID
// only when its spool directory is new.
const maxSpools = 4

// SiteSpools is what is known of one site's spools. The zero value knows nothing. It is not
// safe for concurrent use.
type SiteSpools struct{ spools []siteSpool } // most recently named last

type siteSpool struct {
	id   uint64
	read Ranges
	held []heldScrapes // ascending by seq
}

// heldScrapes are scrapes of which all samples are in batches up to seq.
type heldScrapes struct {
	seq     uint64
	numbers Ranges
}

func (s *SiteSpools) index(spoolID uint64) int {
	return slices.IndexFunc(s.spools, func(p siteSpool) bool { return p.id == spoolID })
}

// find returns the spool; nil if it is not known.
func (s *SiteSpools) find(spoolID uint64) *siteSpool {
	if i := s.index(spoolID); i >= 0 {
		return &s.spools[i]
	}
	return nil
}

// findOrAdd returns the spool, which counts as named now. If there are too many it forgets the
// one that was named longest ago.
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

// AddHeldScrapes adds scrapes all of whose samples are in batches up to seq, which is not below
// that of an earlier call.
func (s *SiteSpools) AddHeldScrapes(names ScrapeNames, upToSeq uint64) {
	if names.SpoolID == 0 || len(names.Numbers) == 0 {
		return
	}
	p := s.findOrAdd(names.SpoolID)
	p.held = append(p.held, heldScrapes{upToSeq, names.Numbers})
	if p.heldRangeCount() > MaxRanges {
		p.mergeHeldInPairs()
	}
	for p.heldRangeCount() > MaxRanges && len(p.held) > 1 {
		p.held = slices.Delete(p.held, 0, 1)
	}
}

// heldRangeCount returns how many ranges the held numbers have.
func (p *siteSpool) heldRangeCount() (n int) {
	for _, h := range p.held {
		n += len(h.numbers)
	}
	return n
}

// mergeHeldInPairs joins neighbours, whose numbers often make one range. The older one then counts
// as read only with the newer one.
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

// HasAll reports whether every named scrape is held or read.
func (s *SiteSpools) HasAll(names ScrapeNames) bool {
	p := s.find(names.SpoolID)
	if p == nil || len(names.Numbers) == 0 {
		return false
	}
	known := p.heldNumbers().AddAll(p.read)
	return !slices.ContainsFunc(names.Numbers, func(r Range) bool { return !known.Covers(r) })
}

func (p *siteSpool) heldNumbers() (held Ranges) {
	for _, h := range p.held {
		held = held.AddAll(h.numbers)
	}
	return held
}

// MarkReadUpTo notes that every consumer that counts has read all batches up to seq.
func (s *SiteSpools) MarkReadUpTo(seq uint64) {
	for i := range s.spools {
		p := &s.spools[i]
		n := 0
		for n < len(p.held) && p.held[n].seq <= seq {
			p.read = p.read.AddAll(p.held[n].numbers)
			n++
		}
		p.held = slices.Delete(p.held, 0, n)
	}
}

// HeldAndRead returns the numbers of a spool that are held and not read, and those that are read.
func (s *SiteSpools) HeldAndRead(spoolID uint64) (held, read Ranges) {
	p := s.find(spoolID)
	if p == nil {
		return nil, nil
	}
	return p.heldNumbers().Without(p.read), slices.Clone(p.read)
}

// Clone returns a copy that shares nothing that changes.
func (s *SiteSpools) Clone() (k SiteSpools) {
	for _, p := range s.spools {
		k.spools = append(k.spools, siteSpool{p.id, slices.Clone(p.read), slices.Clone(p.held)})
	}
	return k
}

// EncodeRecords returns the payloads of records of s, one for each spool: its ID, then the
// numbers that are read, behind a 0, and those that are held, behind the number of their batch.
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

// DecodeRecord adds the spool of one payload of EncodeRecords.
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
		return fmt.Errorf("record of a spool: %w", err)
	}
	*s.findOrAdd(id) = *p
	return nil
}

// ForgetHeldScrapes forgets the numbers that are not read: after damage to the log their batches may
// be lost.
func (s *SiteSpools) ForgetHeldScrapes() {
	for i := range s.spools {
		s.spools[i].held = nil
	}
}
