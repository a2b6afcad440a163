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
	"slices"
	"sync"
)

// decodeLanes bounds how many pushes this server decodes at a time. Because each site waits with
// one push at most, and the channel of a semaphore serves waiting goroutines in their order, the
// sites that wait take turns.
type decodeLanes struct {
	express decodeLane // for small pushes of sites that push little
	bulk    decodeLane // for all other pushes; a push holds its slot until it is stored, because finding the series of its samples takes as long as decoding them
}

// decodeLane has one slot for each push that may be decoded at a time.
type decodeLane struct {
	slots   semaphore
	buffers *sync.Pool // of *decodeBuffers: reusable memory for decoding pushes
}

// newDecodeLanes returns the lanes for a number of processors. The bulk slots leave one processor
// free, if there are several. There are more express slots than processors, because an express push
// takes a processor for milliseconds only.
func newDecodeLanes(processors int) decodeLanes {
	return decodeLanes{express: newDecodeLane(max(4, 2*processors)), bulk: newDecodeLane(max(1, processors-1))}
}

func newDecodeLane(slots int) decodeLane {
	return decodeLane{newSemaphore(slots), &sync.Pool{New: func() any { return &decodeBuffers{} }}}
}

// InUse returns the number of slots that are taken in all lanes.
func (l *decodeLanes) InUse() int { return l.express.slots.InUse() + l.bulk.slots.InUse() }

// acquire waits for a slot and returns buffers. The error means that ctx ended first.
func (l *decodeLane) acquire(ctx context.Context) (*decodeBuffers, error) {
	if l.slots.Acquire(ctx) != nil {
		return nil, errOverloaded("the server is too busy to decode the push")
	}
	return l.buffers.Get().(*decodeBuffers), nil
}

// decodeAndStorePush decodes a push, stores it on this server, and returns the answer. Before that,
// it waits until no other push of the site is being decoded or stored, and then for a slot.
func (s *Server) decodeAndStorePush(ctx context.Context, push *pushRequest, params pushParams, body []byte) (*pushResponse, error) {
	if int64(len(body)) > s.cfg.LimitBytes {
		return nil, s.errBodyTooLarge()
	}
	// While a push waits, it takes only the memory of its body as sent, which LimitBytes bounds.
	lock := s.sites.DecodeLock(push.ClusterID)
	if lock.Acquire(ctx) != nil {
		return nil, errOverloaded("the server is too busy to decode the push")
	}
	defer lock.Release()
	lock.series.isRetry = false
	resp, err := s.decodeAndStoreLocked(ctx, lock, push, params, body)
	if errors.Is(err, ErrDecodeAgain) {
		lock.series.decodeAgain(err)
		resp, err = s.decodeAndStoreLocked(ctx, lock, push, params, body)
	}
	return resp, err
}

// decodeAndStoreLocked does the work of decodeAndStorePush while the push holds the decode lock of its site.
// If the error is ErrDecodeAgain, the push is neither stored nor counted.
func (s *Server) decodeAndStoreLocked(ctx context.Context, lock *siteDecodeLock, push *pushRequest, params pushParams, body []byte) (*pushResponse, error) {
	// The size of a body is known only once the body is decompressed. So a push of a site that
	// pushes little begins in the express lane. If its body turns out to be large, it gives up the
	// slot and the decompressed bytes, and begins again in the bulk lane: decompressing takes a
	// tenth of the time of decoding, and pushes that wait keep no decompressed body in memory.
	if !s.sites.IsAheadOfPace(push.ClusterID, s.cfg.Now()) {
		resp, isLarge, err := s.storeExpressPush(ctx, lock, push, params, body)
		if !isLarge {
			return resp, err
		}
	}
	return s.storeBulkPush(ctx, lock, push, params, body)
}

// storeExpressPush decodes and stores a push that decompresses to at most LimitBytes. The push holds
// a slot only while it is decoded, so that pushes which wait for a disk that hangs take no slots
// from other pushes. isLarge is true if the push needs a bulk slot; it is then not stored.
func (s *Server) storeExpressPush(ctx context.Context, lock *siteDecodeLock, push *pushRequest, params pushParams, sentBody []byte) (resp *pushResponse, isLarge bool, err error) {
	buf, err := s.decoding.express.acquire(ctx)
	if err != nil {
		return nil, false, err
	}
	defer func() {
		if buf.decompressor.MemorySize()+buf.samples.MemorySize()+buf.known.MemorySize() <= maxPooledBuffers {
			s.decoding.express.buffers.Put(buf)
		}
	}()
	release := sync.OnceFunc(s.decoding.express.slots.Release)
	defer release() // if decoding panics, because net/http goes on after a panic
	d, isLarge, err := s.decompressAndDecode(buf, &lock.series, push, params.format, sentBody, int(s.cfg.LimitBytes))
	release()
	if isLarge || err != nil {
		return nil, isLarge, err
	}
	resp, err = s.storeDecodedPush(ctx, &lock.series, push, params, buf, d)
	return resp, false, err
}

// storeBulkPush decodes and stores a push of any size up to the limit. The buffers of the bulk lane
// are reused whatever their size, because there are only as many as bulk slots, and because
// allocating them for each push would keep the garbage collector busy.
func (s *Server) storeBulkPush(ctx context.Context, lock *siteDecodeLock, push *pushRequest, params pushParams, sentBody []byte) (*pushResponse, error) {
	buf, err := s.decoding.bulk.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer s.decoding.bulk.slots.Release()
	defer s.decoding.bulk.buffers.Put(buf)
	limit := MaxDecodedFactor * int(s.cfg.LimitBytes)
	d, isLarge, err := s.decompressAndDecode(buf, &lock.series, push, params.format, sentBody, limit)
	if err != nil {
		return nil, err
	}
	if isLarge {
		return nil, errPushTooLarge(fmt.Sprintf("the decompressed body is larger than %d bytes, which is %d times --limit-bytes; raise the server's --limit-bytes to accept larger bodies", limit, MaxDecodedFactor))
	}
	return s.storeDecodedPush(ctx, &lock.series, push, params, buf, d)
}

// storeDecodedPush stores the samples in buf, which d describes, and returns the answer.
func (s *Server) storeDecodedPush(ctx context.Context, known *knownSiteSeries, push *pushRequest, params pushParams, buf *decodeBuffers, d pushDropCounts) (*pushResponse, error) {
	defer s.pending.Add(-d.memory)
	var res AppendResult
	var err error
	if s.pending.Add(d.memory) > maxPending {
		err = errOverloaded("too many pushes wait to be stored")
	} else {
		res, err = s.appendPush(ctx, push.ClusterID, params, &buf.samples)
	}
	if errors.Is(err, ErrDecodeAgain) {
		return nil, err
	}
	s.samplesTotal.Add(float64(d.received))
	s.ruleWatch.finishPush(known.rules, known.use, d.received)
	if err != nil {
		return nil, err
	}
	known.finish(&buf.known, res)
	return s.countAndAnswerAccepted(push, params, &buf.samples, d, res), nil
}

// decodeBuffers has the memory for decoding one push. A push keeps its buffers while it waits to be
// stored. Server.pending then counts only the bytes that the push fills, not the capacity of the
// buffers. To keep the difference small, buffers of the express lane that have grown beyond
// maxPooledBuffers are not reused.
type decodeBuffers struct {
	decompressor Decompressor
	decoder      Decoder
	samples      SampleList
	known        KnownPush
}

// pushDropCounts counts what was dropped from a push when it was decoded and normalized. It also
// has the memory that the decoded push takes.
type pushDropCounts struct {
	received int              // samples in the push
	repeated int              // samples dropped because the push has their series, time and value before
	dropped  dropCounts       // samples dropped, by reason
	skipped  UnsupportedParts // parts of samples that were dropped, such as exemplars
	memory   int64            // bytes of its buffers that the decoded push fills
}

// skippedByKind returns the counts of skipped parts that are not 0. It returns nil if there are none.
func (c *pushDropCounts) skippedByKind() map[string]int {
	if c.skipped == (UnsupportedParts{}) {
		return nil
	}
	counts := c.skipped.ByKind()
	maps.DeleteFunc(counts, func(_ string, n int) bool { return n == 0 })
	return counts
}

// decompressAndDecode decompresses, decodes and normalizes the body of a push into buf.samples. A
// sample without a timestamp gets the arrival time of the push. If the decompressed body has more
// than limit bytes, isLarge is true. The site is charged for the decompressed bytes: for limit bytes
// if the body is large, or malformed as a compressed body. A push that is decoded again is not
// charged again.
func (s *Server) decompressAndDecode(buf *decodeBuffers, known *knownSiteSeries, push *pushRequest, format Format, sentBody []byte, limit int) (counts pushDropCounts, isLarge bool, err error) {
	body, isLarge, err := buf.decompressor.Decompress(sentBody, push.Encoding, limit)
	charged := len(body)
	if err != nil || isLarge {
		charged = limit
	}
	if !known.isRetry {
		s.sites.ChargeDecoded(push.ClusterID, charged, s.cfg.Now())
	}
	if err != nil || isLarge {
		if err != nil {
			err = errMalformed(err.Error())
		}
		return counts, isLarge, err
	}
	counts, err = s.decodePush(buf, known, push, format, body)
	return counts, false, err
}

// decodePush decodes and normalizes the decompressed body of a push into buf.samples.
func (s *Server) decodePush(buf *decodeBuffers, known *knownSiteSeries, push *pushRequest, format Format, body []byte) (counts pushDropCounts, err error) {
	limit := MaxDecodedFactor * int(s.cfg.LimitBytes)
	buf.samples.Reset()
	buf.samples.MaxBytes = 4 * limit
	buf.samples.MaxSamples = limit / 16
	rules := s.state.Load().Normalizer
	known.prepare(rules, push)
	if !s.ruleWatch.beginPush(rules, known.use) {
		known.forget()
	}
	buf.known.Reset(known.begin(), &buf.samples, push.Arrival)
	n := pushNormalizer{
		rules: rules, use: known.use.Clone(), forced: known.forced, arrival: push.Arrival, list: &buf.samples,
	}
	skipped, err := buf.decoder.DecodeKnown(body, format, &buf.known, n.normalizeAndAdd)
	switch {
	case errors.Is(err, ErrDecodeAgain), errors.Is(err, ErrListTooLarge) && buf.known.Received > 0:
		return counts, ErrDecodeAgain // in the second case a sample may repeat one of a known series, and need no room
	case errors.Is(err, ErrListTooLarge):
		return counts, errPushTooLarge(err.Error() + "; raise the server's --limit-bytes to accept more")
	case errors.Is(err, ErrTooLarge):
		return counts, errPushTooLarge(err.Error())
	case err != nil:
		return counts, errMalformed(err.Error())
	}
	known.use = n.use
	buf.samples.Generation, buf.samples.WantSeriesIDs = known.generation, buf.known.CanLearn()
	n.addKnown(&buf.known)
	return pushDropCounts{
		received: n.received, repeated: n.repeated, dropped: n.dropped, skipped: skipped,
		memory: int64(len(body) + buf.samples.MemorySize() + buf.known.MemorySize()),
	}, nil
}

// pushNormalizer applies the operator's rules to the samples of one push: which labels to set,
// remove or require, and which series to accept. It adds one sample of each series and time to
// list: the first in the push. The others are dropped here, before the store sorts the samples,
// because a body of a few kilobytes can repeat one line half a million times.
type pushNormalizer struct {
	rules    *ServerNormalizer
	use      NormalizerUse // rules that matched a sample of this push, or of the known series of the site
	forced   []Label
	arrival  int64 // ms since the Unix epoch; the timestamp for samples that have none
	list     *SampleList
	received int
	repeated int        // samples dropped because the push has their series, time and value before
	dropped  dropCounts // samples dropped, by reason
}

// addKnown adds the counts of the samples whose series were known.
func (n *pushNormalizer) addKnown(known *KnownPush) {
	n.received += known.Received
	n.repeated += known.Repetitions[RepeatsSample]
	n.dropped.add(dropConflict, known.Repetitions[RepeatsTime])
	for i := range n.dropped {
		n.dropped[i] += known.Dropped[1+i]
	}
}

// drop counts a sample that is dropped for a reason that does not depend on its time and value.
func (n *pushNormalizer) drop(r *RawSample, reason string) {
	i := slices.Index(serverDropReasons[:], reason)
	n.dropped[i]++
	r.DropCode = uint8(1 + i)
}

// normalizeAndAdd normalizes a sample and adds it to n.list. If the sample must be dropped, it
// counts the reason instead. If it returns an error, the whole push must be refused.
func (n *pushNormalizer) normalizeAndAdd(r *RawSample) error {
	n.received++
	reason, err := n.rules.Normalize(r, n.forced, &n.use)
	if err != nil {
		return err
	}
	if reason != "" {
		n.drop(r, reason)
		return nil
	}
	if !r.HasT {
		r.T = n.arrival
	}
	switch repeat, err := n.list.AddUnlessRepeated(r); {
	case errors.Is(err, ErrNULValue):
		n.drop(r, DropInvalid)
	case err != nil:
		return err
	case repeat == RepeatsSample:
		n.repeated++
	case repeat == RepeatsTime:
		n.dropped.add(dropConflict, 1)
	}
	return nil
}
