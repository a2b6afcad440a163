package main

// Retention: which samples a store accepts, keeps and serves, by the samples' own time. A sample
// that is too old to be accepted is the same as one that has expired; otherwise a push that comes
// again could bring back an expired sample, and consumers would get it twice. Samples that have
// expired stay in memory until their whole batch has: store_samples.go and store_read.go leave
// them out, and store_series.go counts the series that have no other sample.

import (
	"errors"
	"math"
	"slices"
	"sync"
	"time"
)

// ErrClockInDoubt: this server's clock made a step, and a sample is within the limits of age by
// the old time or by the new time, but not by both.
var ErrClockInDoubt = errors.New("this server's clock was set, and its new time is still in doubt")

// maxAhead is how far a sample's time may be ahead of this server's clock. Every site pays for a
// sample from the future: it moves the newest time of the central Prometheus, and with it the
// window for late samples.
const maxAhead = time.Minute

// sampleTimeBounds bound the times of samples, in ms. While the clock is in doubt there are two
// ranges. Outside of the wider one, from keptSince to acceptedUntil, either setting of the clock
// refuses a sample. Within the narrower one, from servedSince to surelyUntil, both accept it.
type sampleTimeBounds struct{ keptSince, servedSince, surelyUntil, acceptedUntil int64 }

func newSampleTimeBounds(now PresentTimeRange, retention time.Duration) sampleTimeBounds {
	return sampleTimeBounds{
		keptSince: now.Earliest.Add(-retention).UnixMilli(), servedSince: now.Latest.Add(-retention).UnixMilli(),
		surelyUntil: now.Earliest.Add(maxAhead).UnixMilli(), acceptedUntil: now.Latest.Add(maxAhead).UnixMilli(),
	}
}

// timeBounds returns the bounds of the samples of a push.
func (l *AppendLimits) timeBounds() sampleTimeBounds { return newSampleTimeBounds(l.Now, l.Retention) }

// acceptOrCount reports whether a sample of time t is accepted, and counts it otherwise.
// ErrClockInDoubt says that it depends on the setting of the clock.
func (r *sampleTimeBounds) acceptOrCount(t int64, res *AppendResult) (accepted bool, err error) {
	switch {
	case t < r.keptSince:
		res.TooOld++
		return false, nil
	case t > r.acceptedUntil:
		res.Future++
		return false, nil
	case t < r.servedSince || t > r.surelyUntil:
		return false, ErrClockInDoubt
	}
	return true, nil
}

// KeptSince returns the time in ms before which samples have expired, and are not accepted.
func (s *Store) KeptSince() int64 {
	return newSampleTimeBounds(s.cfg.NowInterval(), s.cfg.Retention).keptSince
}

// ServedSince returns the time in ms before which samples are not served. A consumer may fail a
// whole scrape for one sample that is older than retention. ServedSince is later than KeptSince
// only while the clock is in doubt.
func (s *Store) ServedSince() int64 {
	return newSampleTimeBounds(s.cfg.NowInterval(), s.cfg.Retention).servedSince
}

// DropExpired drops and counts the samples older than keptSince.
func (s *Site) DropExpired(keptSince int64) {
	owned := s.store.owns(s.Key)
	s.mu.Lock()
	expired, unread, freed := s.data.DropExpired(keptSince, sync.OnceValue(s.seqReadByAll), owned)
	s.mu.Unlock()
	s.store.totals.Samples.Add(-freed)
	s.store.totals.Expired.Add(expired)
	s.store.totals.ExpiredUnread.Add(unread)
}

// DropExpiredUncounted drops the samples older than oldest without counting them as expired.
func (s *Site) DropExpiredUncounted(oldest int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.data.SampleCount()
	s.data.DropExpiredUncounted(oldest)
	s.store.totals.Samples.Add(s.data.SampleCount() - before)
}

// DropExpired has the samples older than keptSince expire. A batch leaves memory when all of its
// samples have expired. It returns how many samples expired now, how many of them are lost because
// not every consumer has read them, and how many left memory. seqReadByAll returns the number of
// the newest batch that every consumer has read. owned is false if another server owns the site:
// then a client with a spool has pushed to that server what was not read here, and nothing of it is
// lost.
func (d *SiteSamples) DropExpired(keptSince int64, seqReadByAll func() uint64, owned bool) (samplesExpired, expiredUnread, samplesFreed int64) {
	from := d.expiredBefore
	d.expiredBefore = max(d.expiredBefore, keptSince)
	if d.minT >= keptSince || from >= keptSince {
		return 0, 0, 0
	}
	d.minT = math.MaxInt64
	gone := false
	for _, b := range d.Batches {
		if n := b.CountBetween(from, keptSince); n > 0 {
			samplesExpired += n
			if (owned || b.Names.SpoolID == 0) && b.Seq > seqReadByAll() {
				expiredUnread += n
			}
		}
		if b.MaxT < keptSince {
			samplesFreed, gone = samplesFreed+int64(len(b.V)), true
		} else {
			d.minT = min(d.minT, b.MinT)
		}
	}
	if gone {
		d.Batches = slices.DeleteFunc(slices.Clone(d.Batches), func(b *Batch) bool { return b.MaxT < keptSince })
	}
	return samplesExpired, expiredUnread, samplesFreed
}

// DropExpiredUncounted has the samples older than oldest expire, of which an earlier process
// has counted those that were not read.
func (d *SiteSamples) DropExpiredUncounted(oldest int64) {
	d.expiredBefore = max(d.expiredBefore, oldest)
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.MaxT < d.expiredBefore })
}
