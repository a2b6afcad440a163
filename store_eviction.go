package main

// Room under the limit on samples. Batches that every consumer has read and no scrape shows
// any more are evicted, oldest first; if they are not enough, the push is refused. A site with
// more than its share leaves an eighth of the room to the others.

import (
	"container/heap"
	"fmt"
)

// oldestBatchHeap is a heap of the oldest batches of all sites, by when they were accepted.
type oldestBatchHeap []siteOldestBatch

type siteOldestBatch struct {
	site       *Site
	acceptedAt int64 // ms; math.MaxInt64 if the site has no batch
}

func (h oldestBatchHeap) Len() int           { return len(h) }
func (h oldestBatchHeap) Less(i, j int) bool { return h[i].acceptedAt < h[j].acceptedAt }
func (h oldestBatchHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *oldestBatchHeap) Push(x any)        { *h = append(*h, x.(siteOldestBatch)) }
func (h *oldestBatchHeap) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

func (o *siteOldestBatch) reload() {
	o.site.View(func(data *SiteSamples) { o.acceptedAt = data.OldestAcceptedAt() })
}

// totalSampleLimit returns how many samples may be held in all when site, if not nil, is to get
// added more. A site with more than its share leaves an eighth to the others, whom it could else
// keep out for as long as retention.
func (s *Store) totalSampleLimit(site *Site, added int) int64 {
	limit := int64(s.cfg.LimitSamples)
	reserve := limit / 8
	if site == nil || s.totals.Samples.Load()+int64(added) <= limit-reserve {
		return limit
	}
	s.mu.RLock()
	sites := int64(len(s.sites))
	s.mu.RUnlock()
	held := int64(added)
	site.View(func(data *SiteSamples) { held += data.SampleCount() })
	if sites > 1 && held > limit/sites {
		limit -= reserve
	}
	return limit
}

// makeRoom makes room under the limit for so many samples of site, or for none. It evicts batches,
// oldest first, that every consumer has read and no scrape shows any more. The error is ErrFull
// if that is not enough.
func (s *Store) makeRoom(site *Site, samples int) error {
	if s.cfg.LimitSamples == 0 {
		return nil
	}
	if samples > s.cfg.LimitSamples { // which no eviction would help
		return fmt.Errorf("%w: a push of %d samples, the limit is %d", ErrFull, samples, s.cfg.LimitSamples)
	}
	limit := s.totalSampleLimit(site, samples)
	fits := func() bool { return s.totals.Samples.Load()+int64(samples) <= limit }
	if fits() {
		return nil
	}
	s.roomMu.Lock()
	defer s.roomMu.Unlock()
	now := s.cfg.Now()
	// After a search that found too little, not every push searches again.
	if since := now.Sub(s.noRoomAt); !fits() && (since < 0 || since >= roomPause) {
		s.evictDownTo(limit - int64(samples) - limit/64) // a little more, so that not every push has to evict
		if !fits() {
			s.noRoomAt = now
		}
	}
	if !fits() {
		return fmt.Errorf("%w: %d samples are held; the limit is %d, and %d for a cluster ID that has more than its share",
			ErrFull, s.totals.Samples.Load(), s.cfg.LimitSamples, s.cfg.LimitSamples-s.cfg.LimitSamples/8)
	}
	return nil
}

// evictDownTo evicts batches until no more than maxSamples samples are held, or nothing else can be
// evicted.
func (s *Store) evictDownTo(maxSamples int64) {
	shownSince := s.cfg.NowInterval().Earliest.Add(-s.cfg.MaxSampleAge).UnixMilli()
	var oldest oldestBatchHeap
	s.mu.RLock()
	for _, site := range s.sites {
		oldest = append(oldest, siteOldestBatch{site: site})
	}
	s.mu.RUnlock()
	for i := range oldest {
		oldest[i].reload()
	}
	heap.Init(&oldest)
	evictedFrom := map[*Site]bool{}
	for len(oldest) > 0 && s.totals.Samples.Load() > maxSamples {
		site := oldest[0].site
		n, ok := site.TryEvictOldestBatch(shownSince)
		if !ok {
			heap.Pop(&oldest)
			continue
		}
		s.evicted.Add(n)
		evictedFrom[site] = true
		oldest[0].reload()
		heap.Fix(&oldest, 0)
	}
	for site := range evictedFrom {
		site.View(func(data *SiteSamples) { data.ReleaseEvictedBatches() })
	}
}
