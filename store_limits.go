package main

// Room under the limit on samples. Batches that every consumer has read and no scrape shows
// any more are evicted, oldest first; if they are not enough, the push is refused. A site with
// more than its share leaves an eighth of the room to the others.

import (
	"container/heap"
	"fmt"
	"slices"
)

// oldestFirst is a heap of clusters by when they got their oldest batch.
type oldestFirst []siteHead

type siteHead struct {
	site *Site
	at   int64 // ms
}

func (h oldestFirst) Len() int           { return len(h) }
func (h oldestFirst) Less(i, j int) bool { return h[i].at < h[j].at }
func (h oldestFirst) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *oldestFirst) Push(x any)        { *h = append(*h, x.(siteHead)) }
func (h *oldestFirst) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

func headOf(c *Site) (at int64) {
	c.View(func(held *SiteData) { at = held.Head() })
	return at
}

// most returns how many samples may be held in all when c, if not nil, is to take n
// more: one that would have more than its share leaves an eighth to the others, whom it
// could else keep out for as long as retention.
func (s *Store) most(c *Site, n int) int64 {
	limit := int64(s.cfg.LimitSamples)
	spare := limit / 8
	if c == nil || s.totals.Samples.Load()+int64(n) <= limit-spare {
		return limit
	}
	s.mu.RLock()
	clusters := int64(len(s.sites))
	s.mu.RUnlock()
	held := int64(n)
	c.View(func(h *SiteData) { held += h.Samples() })
	if clusters > 1 && held > limit/clusters {
		limit -= spare
	}
	return limit
}

// makeRoom makes room under the limit for n samples of c, or for none. It evicts
// batches, oldest first, that every consumer has had and no scrape shows any more; if
// that is not enough, it is ErrFull.
func (s *Store) makeRoom(c *Site, n int) error {
	if s.cfg.LimitSamples == 0 {
		return nil
	}
	if n > s.cfg.LimitSamples { // which no eviction would help
		return fmt.Errorf("%w: a push of %d samples, the limit is %d", ErrFull, n, s.cfg.LimitSamples)
	}
	most := s.most(c, n)
	fits := func() bool { return s.totals.Samples.Load()+int64(n) <= most }
	if fits() {
		return nil
	}
	s.room.Lock()
	defer s.room.Unlock()
	now := s.cfg.Now()
	// What could not go a moment ago is not looked through again for every push.
	if since := now.Sub(s.full); !fits() && (since < 0 || since >= roomPause) {
		s.evict(most - int64(n) - most/64) // some more, so that not every push has to
		if !fits() {
			s.full = now
		}
	}
	if !fits() {
		return fmt.Errorf("%w: %d samples are held; the limit is %d, and %d for a cluster ID that has more than its share",
			ErrFull, s.totals.Samples.Load(), s.cfg.LimitSamples, s.cfg.LimitSamples-s.cfg.LimitSamples/8)
	}
	return nil
}

// evict evicts until no more than goal samples are held, if so many may go.
func (s *Store) evict(goal int64) {
	shown := s.cfg.Span().Early.Add(-s.cfg.MaxSampleAge).UnixMilli()
	var heads oldestFirst
	s.mu.RLock()
	for _, c := range s.sites {
		heads = append(heads, siteHead{site: c})
	}
	s.mu.RUnlock()
	for i := range heads {
		heads[i].at = headOf(heads[i].site)
	}
	heap.Init(&heads)
	touched := map[*Site]bool{}
	for len(heads) > 0 && s.totals.Samples.Load() > goal {
		c := heads[0].site
		if n, ok := c.Evict(shown); ok {
			s.evicted.Add(n)
			touched[c] = true
			heads[0].at = headOf(c)
			heap.Fix(&heads, 0)
		} else {
			heap.Pop(&heads)
		}
	}
	for c := range touched {
		c.View(func(held *SiteData) { held.Batches = slices.Clone(held.Batches) }) // lets go of the evicted
	}
}
