package main

// Batches of a cluster as one server hands them to another: the lines once, then the
// batches as records of a log, with the consumers that have had each. Invariants: what
// decodes is as strict as what comes from outside; no sample is there twice. This file
// must not know who owns what, or how it travels.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
)

var errTransfer = errors.New("malformed batches")

// maxPiece bounds a piece, lines included, in what was asked for as its most.
const maxPiece = 8

// AppendBatches appends the oldest batches of held, as many as have about most bytes
// but at least one, without what is older than oldest. Of a cluster with many series it
// is as many as have as many bytes as their lines, or the lines would go with each
// batch; but no more than maxPiece times most. had says who has had one. It
// returns up to which sequence number that is all, and how many samples. Where that is
// the end, and no batch says when the site pushed last, one without samples does.
func AppendBatches(b []byte, held *Cluster, oldest int64, most int, had func(*Batch) []uint64) (out []byte, upTo uint64, n int) {
	ids := map[uint32]uint32{} // as held → as sent
	var lines [][]byte
	var batches [][]byte
	size, text := 0, 0
	newest := int64(-1) // when what is sent was accepted
	upTo = held.Seq
	for i, batch := range held.Batches {
		sent := *batch.Where(func(i int) bool { return batch.Time(i) >= oldest })
		sent.IDs = slices.Clone(sent.IDs)
		for i, id := range sent.IDs {
			local, ok := ids[id]
			if !ok {
				local = uint32(len(lines))
				ids[id] = local
				line := held.Table.Line(id)
				lines = append(lines, line)
				text += len(line)
			}
			sent.IDs[i] = local
		}
		if sent.Had = had(batch); len(sent.V) > 0 {
			batches = append(batches, EncodeBatch(nil, &sent))
			size += sent.Size
			n += len(sent.V)
			newest = max(newest, sent.Accepted)
		}
		if whole := size >= most && size >= text || size+text >= maxPiece*most; whole && i+1 < len(held.Batches) {
			upTo = batch.Seq
			break
		}
	}
	if upTo == held.Seq && newest < held.Accepted || len(batches) == 0 {
		last := &Batch{Seq: held.Seq, Accepted: held.Accepted}
		last.Clock, last.Shift = held.Clock.State()
		batches = append(batches, EncodeBatch(nil, last))
	}
	series := EncodeSeries(nil, 0, slices.Values(lines))
	for _, part := range append([][]byte{series}, batches...) {
		b = append(binary.AppendUvarint(b, uint64(len(part))), part...)
	}
	return b, upTo, n
}

// DecodeBatches reads what AppendBatches wrote of a cluster. Every line has to be in
// normal form and of the cluster, and no sample may be there twice.
func DecodeBatches(b []byte, cluster string) ([]Appending, error) {
	series, b, err := cutPart(b)
	if err != nil {
		return nil, err
	}
	var parser Parser
	var arena []byte
	var lines []Sample // as in a Push
	known := map[string]bool{}
	err = DecodeSeries(series, func(id uint32, line []byte) error {
		if err := parser.CheckOf(line, cluster); err != nil {
			return err
		}
		if int(id) != len(lines) || known[string(line)] || int64(len(arena)+len(line)) > math.MaxUint32 {
			return errTransfer
		}
		known[string(line)] = true
		lines = append(lines, Sample{Off: uint32(len(arena)), Len: uint32(len(line))})
		arena = append(arena, line...)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errTransfer, err)
	}
	type key struct {
		id uint32
		t  int64
	}
	seen := map[key]bool{}
	var pushes []Appending
	for len(b) > 0 {
		var part []byte
		if part, b, err = cutPart(b); err != nil {
			return nil, err
		}
		batch, err := DecodeBatch(part)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errTransfer, err)
		}
		// One that has no samples costs much more memory than bytes.
		if batch.Accepted < 0 || batch.Accepted > MaxClockTime || len(batch.V) == 0 && len(b) > 0 {
			return nil, errTransfer
		}
		p := &Push{Arena: arena, Samples: make([]Sample, len(batch.V))}
		for i, id := range batch.IDs {
			k := key{id, batch.Time(i)}
			if int(id) >= len(lines) || seen[k] {
				return nil, errTransfer
			}
			seen[k] = true
			s := lines[id]
			if s.T, s.V = k.t, batch.V[i]; s.V != s.V {
				s.V = math.NaN()
			}
			p.Samples[i] = s
		}
		pushes = append(pushes, Appending{Push: p, Handed: &Handed{
			Accepted: batch.Accepted, Clock: batch.Clock, Shift: batch.Shift, Had: batch.Had,
		}})
	}
	return pushes, nil
}

func cutPart(b []byte) (part, rest []byte, err error) {
	n, k := binary.Uvarint(b)
	if k <= 0 || n > uint64(len(b)-k) {
		return nil, nil, errTransfer
	}
	return b[k : k+int(n)], b[k+int(n):], nil
}
