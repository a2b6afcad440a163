package main

// Eviction makes room under the limit on samples. It drops a site's oldest batch from memory if
// every consumer has read the batch and no scrape shows its samples any more. If that does not free
// enough room, the push is refused. If there are several sites, a site that holds more than its
// share, which is the limit divided by the number of sites, may not use the last eighth of the
// limit.

import (
	"container/heap"
	"fmt"
)

// oldestBatchHeap is a heap of sites, ordered by the time at which their oldest batch was accepted.
// It implements heap.Interface.
type oldestBatchHeap []siteOldestBatch

// siteOldestBatch is a site with the acceptance time of its oldest batch.
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

// totalSampleLimit returns the limit on samples of the whole store that applies when site adds more
// samples. If there are several sites and this site would then hold more than its share, which is
// the limit divided by the number of sites, the result is lower by an eighth. Otherwise this site
// could keep all other sites out for as long as retention. A nil site gets the full limit.
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

// makeRoom makes room for new samples of site under the limit on samples. It evicts batches that
// every consumer has read and whose samples no scrape shows any more, oldest first. It returns
// ErrFull if eviction does not free enough room. With a nil site and 0 samples it only tries to
// bring the store within the limit.
func (s *Store) makeRoom(site *Site, samples int) error {
	if s.cfg.LimitSamples == 0 {
		return nil
	}
	if samples > s.cfg.LimitSamples { // the push would not fit into an empty store either
		return fmt.Errorf("%w: the push has %d samples, the store's limit is %d", ErrFull, samples, s.cfg.LimitSamples)
	}
	limit := s.totalSampleLimit(site, samples)
	fits := func() bool { return s.totals.Samples.Load()+int64(samples) <= limit }
	if fits() {
		return nil
	}
	s.roomMu.Lock()
	defer s.roomMu.Unlock()
	now := s.cfg.Now()
	// A search that freed too little is not repeated for roomPause, unless the clock was set back.
	// Otherwise every refused push would search all sites.
	if since := now.Sub(s.noRoomAt); !fits() && (since < 0 || since >= roomPause) {
		// Free 1/64 of the limit more than needed, so that not every push has to evict.
		s.evictDownTo(limit - int64(samples) - limit/64)
		if !fits() {
			s.noRoomAt = now
		}
	}
	if !fits() {
		return fmt.Errorf("%w: the store holds %d samples; the limit is %d, or %d for a site that has more than its share",
			ErrFull, s.totals.Samples.Load(), s.cfg.LimitSamples, s.cfg.LimitSamples-s.cfg.LimitSamples/8)
	}
	return nil
}

// evictDownTo evicts batches, oldest first, until the store holds at most maxSamples samples or no
// site's oldest batch can be evicted. A batch is not evicted before the older batches of its site.
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
