package main

// Retention decides by a sample's own time whether the store accepts, keeps and serves the sample.
// A sample is too old to be accepted exactly when it would count as expired. Otherwise a repeated
// push could bring back an expired sample, and consumers would get it twice. An expired sample
// stays in memory until its whole batch has expired or is evicted, or the site's log is rewritten.
// Meanwhile it is not served.

import (
	"errors"
	"math"
	"slices"
	"sync"
	"time"
)

// ErrClockInDoubt means that this server's wall clock was set, and that a sample of the push is
// within the accepted times by only one of the old and the new clock setting.
var ErrClockInDoubt = errors.New("this server's clock was set, and it is not yet known whether the new time is right")

// maxAhead is how far the time of a sample may be ahead of this server's clock. A sample from the
// future would harm all sites: it moves the newest time of the central Prometheus, and with it the
// window for late samples.
const maxAhead = time.Minute

// sampleTimeBounds bound the times of samples, in ms. While the clock is in doubt, the old and the
// new clock setting give different bounds. Samples outside keptSince to acceptedUntil are refused
// by both settings. Samples within servedSince to surelyUntil are accepted by both settings.
type sampleTimeBounds struct{ keptSince, servedSince, surelyUntil, acceptedUntil int64 }

// newSampleTimeBounds returns the bounds for samples when the present time is in the range now.
func newSampleTimeBounds(now PresentTimeRange, retention time.Duration) sampleTimeBounds {
	return sampleTimeBounds{
		keptSince: now.Earliest.Add(-retention).UnixMilli(), servedSince: now.Latest.Add(-retention).UnixMilli(),
		surelyUntil: now.Earliest.Add(maxAhead).UnixMilli(), acceptedUntil: now.Latest.Add(maxAhead).UnixMilli(),
	}
}

// timeBounds returns the bounds for the samples of a push.
func (l *AppendLimits) timeBounds() sampleTimeBounds { return newSampleTimeBounds(l.Now, l.Retention) }

// acceptOrCount reports whether a sample with time t, in ms, is accepted. If not, it counts the
// sample in res as too old or as from the future. It returns ErrClockInDoubt if the old and the new
// clock setting disagree.
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

// KeptSince returns a time in ms. Samples older than this time have expired and are not accepted.
func (s *Store) KeptSince() int64 {
	return newSampleTimeBounds(s.cfg.NowInterval(), s.cfg.Retention).keptSince
}

// ServedSince returns a time in ms. Samples older than this time are not served, because one sample
// older than retention can make a consumer fail the whole scrape. ServedSince differs from
// KeptSince, and is then later, only while the clock is in doubt.
func (s *Store) ServedSince() int64 {
	return newSampleTimeBounds(s.cfg.NowInterval(), s.cfg.Retention).servedSince
}

// DropExpired drops the samples older than keptSince, in ms, and counts them as expired. The caller
// need not hold the site's lock.
func (s *Site) DropExpired(keptSince int64) {
	s.mu.Lock()
	nothing := s.data.minT >= keptSince
	if nothing { // the usual case, at every scrape
		s.data.expiredBefore = max(s.data.expiredBefore, keptSince)
	}
	s.mu.Unlock()
	if nothing {
		return
	}
	owned := s.store.owns(s.Key)
	s.mu.Lock()
	expired, unread, freed := s.data.DropExpired(keptSince, sync.OnceValue(s.seqReadByAll), owned)
	s.mu.Unlock()
	s.store.totals.Samples.Add(-freed)
	s.store.totals.Expired.Add(expired)
	s.store.totals.ExpiredUnread.Add(unread)
}

// DropExpiredUncounted drops the samples older than the time oldest, in ms, without counting them
// as expired.
func (s *Site) DropExpiredUncounted(oldest int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.data.SampleCount()
	s.data.DropExpiredUncounted(oldest)
	s.store.totals.Samples.Add(s.data.SampleCount() - before)
}

// DropExpired marks the samples older than keptSince, in ms, as expired. A batch leaves memory when
// all of its samples have expired. The results are the number of samples that expired in this call,
// the number among them that are lost because not every consumer has read them, and the number that
// left memory.
//
// seqReadByAll returns the number of the newest batch that every consumer has read. owned is false
// if another server owns the site. Then an unread sample does not count as lost if its batch names
// scrapes of a client's spool, because the client normally pushes these scrapes to the owner.
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
		d.samples -= samplesFreed
	}
	return samplesExpired, expiredUnread, samplesFreed
}

// DropExpiredUncounted marks the samples older than the time oldest, in ms, as expired, and drops
// the batches whose samples have all expired. It does not count the samples, because an earlier
// process normally counted them, or they were counted in the data that d is a copy of.
func (d *SiteSamples) DropExpiredUncounted(oldest int64) {
	d.expiredBefore = max(d.expiredBefore, oldest)
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.MaxT < d.expiredBefore })
	d.recount()
}
