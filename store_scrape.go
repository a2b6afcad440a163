package main

// Samples of a scrape over all sites: the newest of every series, or those that a consumer has
// not read. Each name comes once, a series' samples ascend, and a scrape has at most as many
// samples as it may. When not all fit, every site has its turn. This file must not know of
// HTTP, or of how cursors are kept.

import (
	"maps"
	"math"
	"slices"
	"sync"
	"time"
)

// Scraper answers scrapes of a store. It is safe for concurrent use.
type Scraper struct {
	Store  *Store
	MaxAge time.Duration // how long the newest sample of a series is shown
	Now    func() time.Time
	// Owned reports the sites that this server owns: of these alone it shows samples again
	// that a consumer has read, or shows samples to a scraper that gives no name.
	Owned func(hash uint64) bool

	mu    sync.Mutex // guards start
	start float64    // where among the clusters a scrape begins: 0 to 1
}

// shownFamilies gathers lines by name.
type shownFamilies struct {
	match func(line []byte) bool
	index map[string]*Family
	last  *Family
}

func (s *shownFamilies) add(name string, l FamilySample) {
	if s.match != nil && !s.match(l.Line) {
		return
	}
	if s.last == nil || s.last.Name != name {
		if s.last = s.index[name]; s.last == nil {
			s.last = &Family{Name: name}
			s.index[name] = s.last
		}
	}
	s.last.Lines = append(s.last.Lines, l)
}

func (s *shownFamilies) sorted() []Family {
	fams := make([]Family, 0, len(s.index))
	for _, name := range slices.Sorted(maps.Keys(s.index)) {
		fams = append(fams, *s.index[name])
	}
	return fams
}

// firstSite returns where among the clusters a scrape begins.
func (x *Scraper) firstSite() float64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.start
}

// rotateStart has the next scrape begin at another cluster, a golden section further, so that
// each cluster has its turn with every one of several scrapers that take turns, which
// where this one ended would not give.
func (x *Scraper) rotateStart() {
	x.mu.Lock()
	defer x.mu.Unlock()
	_, x.start = math.Modf(x.start + math.Phi)
}

func (x *Scraper) minT() int64 {
	return max(x.Now().Add(-x.MaxAge).UnixMilli(), x.Store.OldestServed())
}

// Newest returns the newest sample of each series that is at most MaxAge old, one
// family a name, sorted. match, if not nil, chooses lines. At most limit samples are
// returned, of whole clusters and of at least one; truncated says that some were left
// out. Lines stay valid for ever.
func (x *Scraper) Newest(limit int, match func(line []byte) bool) (fams []Family, truncated bool) {
	minT := x.minT()
	shown := shownFamilies{match: match, index: map[string]*Family{}}
	n := 0
	x.Store.ForEachSite(x.firstSite(), func(hash uint64, held *SiteData) bool {
		if !x.Owned(hash) {
			return true
		}
		if limit > 0 && n > 0 && n+held.Table.Len() > limit {
			truncated = true
			return false
		}
		held.Table.Each(minT, func(_ uint32, name string, l FamilySample) {
			shown.add(name, l)
			n++
		})
		return true
	})
	if truncated {
		x.rotateStart()
	}
	return shown.sorted(), truncated
}

// Unread returns what r has not had, oldest first within each cluster and in equal
// shares for those that have more; of clusters of which that is all, and as far as there
// is room left, also the newest samples as Newest does. With single there is at most one
// sample of each series. It returns how many of the samples were not had before, and
// whether there are more.
func (x *Scraper) Unread(r *ScrapeSession, limit int, single bool, match func(line []byte) bool) (fams []Family, unread int, more bool) {
	if limit <= 0 {
		limit = math.MaxInt
	}
	oldest := x.Store.OldestServed()
	var counts []int
	all := 0
	x.Store.ForEachSite(0, func(hash uint64, held *SiteData) bool {
		if n := held.Unread(r.Position(hash)); n > 0 {
			counts = append(counts, n)
			all += n
		}
		return true
	})
	share, spare := limit, max(0, limit-all) // of a cluster; for what was had before
	if all > limit {
		share = fairShare(counts, limit)
	}
	minT := x.minT()
	shown := shownFamilies{match: match, index: map[string]*Family{}}
	left := limit
	cut := false // something was left out
	x.Store.ForEachSite(x.firstSite(), func(hash uint64, held *SiteData) bool {
		at := r.Position(hash)
		lines := 0
		most := min(share, left, held.Unread(at)) // more than was counted, if pushes came
		again := -1                               // samples that may be shown again
		if x.Owned(hash) {
			again = min(spare, left-most)
		}
		to, n := held.Read(at, most, again, single, oldest, minT, func(name string, l FamilySample) {
			shown.add(name, l)
			lines++
		})
		left -= lines
		spare -= lines - n
		unread += n
		if to != at {
			r.MarkServed(hash, to, n)
		}
		more = more || held.Unread(to) > 0
		cut = cut || more || again >= 0 && spare < held.Table.Len()
		return true
	})
	if cut {
		x.rotateStart()
	}
	return shown.sorted(), unread, more
}

// fairShare returns the most that each may have of what has to be shared, so that who
// wants less leaves the rest to the others; at least 1.
func fairShare(wants []int, limit int) int {
	slices.Sort(wants)
	for i, n := range wants {
		if share := limit / (len(wants) - i); n > share {
			return max(1, share)
		}
		limit -= n
	}
	return max(1, limit)
}
