package main

// This file decodes and normalizes the bodies of pushes, and shares the processors among sites.
// A site has at most one decoded push in memory: its next push waits. A push that decodes to many
// bytes, and a push of a site that has lately pushed a lot, takes a bulk slot, and there are fewer
// bulk slots than processors. So however much some sites push, the pushes of all other sites find a
// processor. Sites that wait for a slot get it in the order in which they began to wait. This file
// must not know of HTTP.

import (
	"context"
	"errors"
	"fmt"
	"maps"
)

// decodeSlots bounds how many pushes this server decodes at a time. Because each site waits with
// one push at most, and the channel of a semaphore serves waiting goroutines in their order, the
// sites that wait take turns.
type decodeSlots struct {
	express semaphore // for small pushes of sites that push little
	bulk    semaphore // for all other pushes; a push holds its slot until it is stored, because finding the series of its samples takes as long as decoding them
}

// newDecodeSlots returns the slots for a number of processors. The bulk slots leave one processor
// free, if there are several. There are more express slots than processors, because an express push
// takes a processor for milliseconds only.
func newDecodeSlots(processors int) decodeSlots {
	return decodeSlots{express: newSemaphore(max(4, 2*processors)), bulk: newSemaphore(max(1, processors-1))}
}

// errNoDecodeSlot means that a push got no slot before its time was over.
func errNoDecodeSlot() error { return errOverloaded("the server is too busy to decode the push") }

// decodeAndStorePush decodes a push, stores it on this server, and returns the answer. Before that,
// it waits until no other push of the site is being decoded or stored, and then for a slot.
func (s *Server) decodeAndStorePush(ctx context.Context, push *pushRequest, params pushParams, body []byte) (*pushResponse, error) {
	if int64(len(body)) > s.cfg.LimitBytes {
		return nil, s.errBodyTooLarge()
	}
	// While a push waits, it takes only the memory of its body as sent, which LimitBytes bounds.
	siteTurn := s.sites.DecodeTurn(push.ClusterID)
	if siteTurn.Acquire(ctx) != nil {
		return nil, errNoDecodeSlot()
	}
	defer siteTurn.Release()
	buf := s.buffers.Get().(*decodeBuffers)
	defer s.releaseBuffers(buf)
	slot, body, err := s.acquireSlotAndDecompress(ctx, buf, push, body)
	if err != nil {
		return nil, err
	}
	d, err := s.decodePush(buf, push, params.format, body)
	if slot == s.decoding.express {
		slot.Release()
	} else {
		defer slot.Release()
	}
	if err != nil {
		return nil, err
	}
	defer s.pending.Add(-d.memory)
	if s.pending.Add(d.memory) > maxPending {
		return nil, errOverloaded("too many pushes wait to be stored")
	}
	res, err := s.appendPush(ctx, push.ClusterID, params, &buf.samples)
	if err != nil {
		return nil, err
	}
	return s.countAndAnswerAccepted(push.ClusterID, params, &buf.samples, d, res)
}

// acquireSlotAndDecompress decompresses the body of a push and charges the site for its size. It
// returns the decompressed body, which is valid until buf is used again, and the slot that the push
// holds. The caller must release the slot. After an error the push holds no slot.
//
// The size of a body is known only once the body is decompressed. So a push of a site that pushes
// little begins in an express slot. If its body turns out to be large, it gives up the slot and the
// decompressed bytes, waits for a bulk slot and begins again: decompressing takes a tenth of the
// time of decoding, and pushes that wait keep no decompressed body in memory.
func (s *Server) acquireSlotAndDecompress(ctx context.Context, buf *decodeBuffers, push *pushRequest, sentBody []byte) (slot semaphore, body []byte, err error) {
	limit, tooLarge := int(s.cfg.LimitBytes), true
	if !s.sites.IsAheadOfPace(push.ClusterID, s.cfg.Now()) {
		if slot = s.decoding.express; slot.Acquire(ctx) != nil {
			return nil, nil, errNoDecodeSlot()
		}
		if body, tooLarge, err = buf.decompress(sentBody, push.Encoding, limit); err != nil || tooLarge {
			slot.Release()
		}
	}
	if err == nil && tooLarge {
		limit *= MaxDecodedFactor
		if slot = s.decoding.bulk; slot.Acquire(ctx) != nil {
			return nil, nil, errNoDecodeSlot()
		}
		if body, tooLarge, err = buf.decompress(sentBody, push.Encoding, limit); err != nil || tooLarge {
			slot.Release()
		}
	}
	switch {
	case err != nil:
		return nil, nil, errMalformed(err.Error())
	case tooLarge:
		s.sites.ChargeDecoded(push.ClusterID, limit, s.cfg.Now())
		return nil, nil, errPushTooLarge(fmt.Sprintf("the decompressed body is larger than %d bytes, which is %d times --limit-bytes; raise the server's --limit-bytes to accept larger bodies", limit, MaxDecodedFactor))
	}
	s.sites.ChargeDecoded(push.ClusterID, len(body), s.cfg.Now())
	return slot, body, nil
}

// decodeBuffers has the memory for decoding one push. Server.buffers keeps it for reuse by later
// pushes. A push keeps its buffers while it waits to be stored. Server.pending then counts only the
// bytes that the push fills, not the capacity of the buffers. To keep the difference small, buffers
// that have grown beyond maxPooledBuffers are not reused.
type decodeBuffers struct {
	decompressor Decompressor
	decoder      Decoder
	samples      SampleList
	bodySize     int // capacity in bytes of the largest decompressed body so far
}

func (b *decodeBuffers) decompress(sentBody []byte, encoding string, limit int) (body []byte, tooLarge bool, err error) {
	body, tooLarge, err = b.decompressor.Decompress(sentBody, encoding, limit)
	b.bodySize = max(b.bodySize, cap(body))
	return body, tooLarge, err
}

// releaseBuffers returns buf to the pool s.buffers, unless buf has grown beyond maxPooledBuffers.
func (s *Server) releaseBuffers(buf *decodeBuffers) {
	if buf.bodySize+buf.samples.MemorySize() <= maxPooledBuffers {
		s.buffers.Put(buf)
	}
}

// pushDropCounts counts what was dropped from a push when it was decoded and normalized. It also
// has the memory that the decoded push takes.
type pushDropCounts struct {
	repeated int            // samples dropped because the push has their series, time and value before
	dropped  map[string]int // samples dropped, by reason
	skipped  map[string]int // unsupported parts of samples that were dropped, such as exemplars, by kind
	memory   int64          // bytes of its buffers that the decoded push fills
}

// decodePush decodes and normalizes the decompressed body of a push into buf.samples. A sample
// without a timestamp gets the arrival time of the push.
func (s *Server) decodePush(buf *decodeBuffers, push *pushRequest, format Format, body []byte) (counts pushDropCounts, err error) {
	limit := MaxDecodedFactor * int(s.cfg.LimitBytes)
	buf.samples.Reset()
	buf.samples.MaxBytes = 4 * limit
	buf.samples.MaxSamples = limit / 16
	n := s.newPushNormalizer(&buf.samples, push)
	skipped, err := buf.decoder.Decode(body, format, n.normalizeAndAdd)
	switch {
	case errors.Is(err, ErrListTooLarge):
		return counts, errPushTooLarge(err.Error() + "; raise the server's --limit-bytes to accept more")
	case errors.Is(err, ErrTooLarge):
		return counts, errPushTooLarge(err.Error())
	case err != nil:
		return counts, errMalformed(err.Error())
	}
	s.samplesTotal.Add(float64(n.received))
	return pushDropCounts{
		repeated: n.repeated, dropped: n.dropped, skipped: deleteZeros(skipped.ByKind()), memory: int64(len(body) + buf.samples.MemorySize()),
	}, nil
}

// pushNormalizer applies the operator's rules to the samples of one push: which labels to set,
// remove or require, and which series to accept. It adds one sample of each series and time to
// list: the first in the push. The others are dropped here, before the store sorts the samples,
// because a body of a few kilobytes can repeat one line half a million times.
type pushNormalizer struct {
	rules    *ServerNormalizer
	forced   []Label
	arrival  int64 // ms since the Unix epoch; the timestamp for samples that have none
	list     *SampleList
	received int
	repeated int            // samples dropped because the push has their series, time and value before
	dropped  map[string]int // samples dropped, by reason
}

func (s *Server) newPushNormalizer(list *SampleList, push *pushRequest) *pushNormalizer {
	rules := s.state.Load().Normalizer
	return &pushNormalizer{
		rules: rules, forced: rules.ForcedLabels(push.ClusterID, push.Labels), arrival: push.Arrival, list: list, dropped: map[string]int{},
	}
}

// normalizeAndAdd normalizes a sample and adds it to n.list. If the sample must be dropped, it
// counts the reason instead. If it returns an error, the whole push must be refused.
func (n *pushNormalizer) normalizeAndAdd(r *RawSample) error {
	n.received++
	reason, err := n.rules.Normalize(r, n.forced)
	if err != nil {
		return err
	}
	if reason != "" {
		n.dropped[reason]++
		return nil
	}
	if !r.HasT {
		r.T = n.arrival
	}
	switch repeat, err := n.list.AddUnlessRepeated(r); {
	case errors.Is(err, ErrNULValue):
		n.dropped[DropInvalid]++
	case err != nil:
		return err
	case repeat == RepeatsSample:
		n.repeated++
	case repeat == RepeatsTime:
		n.dropped[dropConflict]++
	}
	return nil
}

// deleteZeros removes the entries of counts whose value is 0. It returns nil if no entry is left.
func deleteZeros(counts map[string]int) map[string]int {
	maps.DeleteFunc(counts, func(_ string, n int) bool { return n == 0 })
	if len(counts) == 0 {
		return nil
	}
	return counts
}
