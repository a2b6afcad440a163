package main

// The samples of a scrape over all sites: the newest of every series, or those that a consumer
// has not read. Each name comes once, a series' samples ascend, and a scrape has at most as many
// samples as it may. When not all fit, the sites take turns. This file must not know of HTTP, or
// of how cursors are kept.

import (
	"maps"
	"math"
	"slices"
	"sync"
	"time"
)

// AllSitesReader answers scrapes of a store. It is safe for concurrent use.
type AllSitesReader struct {
	Store        *Store
	MaxSampleAge time.Duration // how long the newest sample of a series is shown
	Now          func() time.Time
	// Owned reports whether this server owns a site. Of other sites it neither repeats samples
	// that a consumer has read, nor shows samples to a scraper that gives no name.
	Owned func(hash uint64) bool

	mu    sync.Mutex // guards start
	start float64    // where among the sites a scrape begins: 0 to 1
}

// familyGrouper groups samples by name.
type familyGrouper struct {
	match    func(line []byte) bool // nil: all
	families map[string]*Family
	last     *Family
}

func newFamilyGrouper(match func(line []byte) bool) *familyGrouper {
	return &familyGrouper{match: match, families: map[string]*Family{}}
}

func (c *familyGrouper) addIfMatches(name string, l FamilySample) {
	if c.match != nil && !c.match(l.Line) {
		return
	}
	if c.last == nil || c.last.Name != name {
		if c.last = c.families[name]; c.last == nil {
			c.last = &Family{Name: name}
			c.families[name] = c.last
		}
	}
	c.last.Samples = append(c.last.Samples, l)
}

// sorted returns the families by name.
func (c *familyGrouper) sorted() []Family {
	all := make([]Family, 0, len(c.families))
	for _, name := range slices.Sorted(maps.Keys(c.families)) {
		all = append(all, *c.families[name])
	}
	return all
}

// scrapeStartFraction returns where among the sites a scrape begins.
func (s *AllSitesReader) scrapeStartFraction() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.start
}

// rotateFirstSite moves the start of the next scrape by the golden ratio. If it began where this
// one ended, each of several scrapers that alternate would always get the same sites first.
func (s *AllSitesReader) rotateFirstSite() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, s.start = math.Modf(s.start + math.Phi)
}

// newestSampleCutoff returns the time in ms before which the newest sample of a series is not shown.
func (s *AllSitesReader) newestSampleCutoff() int64 {
	return max(s.Now().Add(-s.MaxSampleAge).UnixMilli(), s.Store.ServedSince())
}

// NewestPerSeries returns the newest sample of each series that is at most MaxSampleAge old, one
// family a name, sorted. match, if not nil, chooses lines. At most limit samples are returned, of
// whole sites and of at least one; truncated says that some were left out. Lines stay valid for
// ever.
func (s *AllSitesReader) NewestPerSeries(limit int, match func(line []byte) bool) (families []Family, truncated bool) {
	since := s.newestSampleCutoff()
	collected := newFamilyGrouper(match)
	n := 0
	s.Store.ForEachSite(s.scrapeStartFraction(), func(hash uint64, data *SiteSamples) bool {
		if !s.Owned(hash) {
			return true
		}
		if limit > 0 && n > 0 && n+data.Table.Len() > limit {
			truncated = true
			return false
		}
		data.Table.ForEachNewestSince(since, func(_ uint32, name string, l FamilySample) {
			collected.addIfMatches(name, l)
			n++
		})
		return true
	})
	if truncated {
		s.rotateFirstSite()
	}
	return collected.sorted(), truncated
}

// ServeUnreadAndNewest returns samples that the session has not read, oldest first within each
// site and in fair shares; of sites without more of them, and as far as there is room left, also
// the newest samples as NewestPerSeries does. It marks them as served. With onePerSeries there is
// at most one unread sample of each series. It returns how many of the samples were unread, and
// whether there are more unread samples.
func (s *AllSitesReader) ServeUnreadAndNewest(session *ConsumerSession, limit int, onePerSeries bool, match func(line []byte) bool) (families []Family, unreadServed int, moreUnread bool) {
	if limit <= 0 {
		limit = math.MaxInt
	}
	limits := ReadLimits{OnePerSeries: onePerSeries, ServedSince: s.Store.ServedSince()}
	counts, total := s.countUnread(session)
	share := limit // of unread samples, for each site
	if total > limit {
		share = fairShare(counts, limit)
	}
	limits.NewestSince = s.newestSampleCutoff()
	left, repeatsLeft := limit, max(0, limit-total)
	collected := newFamilyGrouper(match)
	leftOut := false
	s.Store.ForEachSite(s.scrapeStartFraction(), func(hash uint64, data *SiteSamples) bool {
		pos := session.Position(hash)
		limits.Unread = min(share, left, data.UnreadSampleCount(pos)) // more than was counted, if pushes came
		limits.Repeats = -1
		if s.Owned(hash) {
			limits.Repeats = min(repeatsLeft, left-limits.Unread)
		}
		served := 0
		to, n := data.EmitUnreadAndNewest(pos, limits, func(name string, l FamilySample) {
			collected.addIfMatches(name, l)
			served++
		})
		left -= served
		repeatsLeft -= served - n
		unreadServed += n
		if to != pos {
			session.MarkServed(hash, to, n)
		}
		moreUnread = moreUnread || data.UnreadSampleCount(to) > 0
		leftOut = leftOut || moreUnread || limits.Repeats >= 0 && repeatsLeft < data.Table.Len()
		return true
	})
	if leftOut {
		s.rotateFirstSite()
	}
	return collected.sorted(), unreadServed, moreUnread
}

// countUnread returns how many samples the session has not read of each site that has some, and
// in all.
func (s *AllSitesReader) countUnread(session *ConsumerSession) (perSite []int, total int) {
	s.Store.ForEachSite(0, func(hash uint64, data *SiteSamples) bool {
		if n := data.UnreadSampleCount(session.Position(hash)); n > 0 {
			perSite = append(perSite, n)
			total += n
		}
		return true
	})
	return perSite, total
}

// fairShare returns the most that each site may have so that all together have at most limit:
// what a site with less leaves over is shared by the others. It is at least 1, and sorts perSite.
func fairShare(perSite []int, limit int) int {
	slices.Sort(perSite)
	for i, n := range perSite {
		if share := limit / (len(perSite) - i); n > share {
			return max(1, share)
		}
		limit -= n
	}
	return max(1, limit)
}
