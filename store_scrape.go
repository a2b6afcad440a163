package main

// AllSitesReader selects the samples of one scrape from all sites: the newest sample of every
// series, or, for a consumer, first the samples that it has not read. Each name occurs once, the
// samples of a series ascend in time, and the number of samples is limited. If not all samples fit,
// the next scrape usually begins with a different site. This file must not know of HTTP or of how
// cursors are stored.

import (
	"maps"
	"math"
	"slices"
	"sync"
	"time"
)

// AllSitesReader selects samples for scrapes of a store. It is safe for concurrent use.
type AllSitesReader struct {
	Store        *Store
	MaxSampleAge time.Duration // the newest sample of a series is not shown if it is older, unless the consumer has not read it
	Now          func() time.Time
	// Owned reports whether this server owns the site with this key. For a site that it does not
	// own, the server does not repeat samples that a consumer has read, and shows no samples to a
	// scraper without a consumer name.
	Owned func(hash uint64) bool

	mu    sync.Mutex // guards start
	start float64    // position from 0 to 1 among the sorted sites where the next scrape begins
}

// familyGrouper collects samples into families by name.
type familyGrouper struct {
	match    func(line []byte) bool // selects lines; nil selects all
	families map[string]*Family
	last     *Family // family of the last added sample, to avoid a map lookup
}

func newFamilyGrouper(match func(line []byte) bool) *familyGrouper {
	return &familyGrouper{match: match, families: map[string]*Family{}}
}

// addIfMatches adds the sample to the family called name if match selects its line.
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

func (c *familyGrouper) sorted() []Family {
	all := make([]Family, 0, len(c.families))
	for _, name := range slices.Sorted(maps.Keys(c.families)) {
		all = append(all, *c.families[name])
	}
	return all
}

// scrapeStartFraction returns the position, from 0 to 1, among the sorted sites at which a scrape
// begins.
func (s *AllSitesReader) scrapeStartFraction() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.start
}

// rotateFirstSite moves the start of the next scrape by the golden ratio. The start is not where
// the last scrape ended, because then several scrapers that alternate could each get the same sites
// first every time.
func (s *AllSitesReader) rotateFirstSite() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, s.start = math.Modf(s.start + math.Phi)
}

// newestSampleCutoff returns a time in ms. A scrape does not show the newest sample of a series if
// that sample is older than this time. The time does not apply to samples that the consumer has not
// read; ServedSince limits the age of these.
func (s *AllSitesReader) newestSampleCutoff() int64 {
	return max(s.Now().Add(-s.MaxSampleAge).UnixMilli(), s.Store.ServedSince())
}

// NewestPerSeries returns the newest sample of each series of the owned sites, unless that sample is
// older than MaxSampleAge or than retention. The families are sorted by name, one per name. match,
// if not nil, selects lines. Sites are included or left out as a whole, by their number of series.
// The result has at most limit samples, unless the first site that shows a sample has more; a limit
// of 0 means no limit. truncated reports that sites
// were left out. The lines remain valid for ever.
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

// ServeUnreadAndNewest returns the next samples for the consumer of session and marks them as
// served. It gives unread samples priority, and among the unread samples of a site those of the
// oldest batches. A limit of 0 means no limit. If not all unread samples fit, the sites get fair
// shares. If room is left, it also returns the newest samples, as NewestPerSeries does, of the
// owned sites without further unread samples. With onePerSeries it returns at most one sample of
// each series. match, if not nil, selects lines: the other samples are left out of the result, but
// count toward limit, as served and in unreadServed. unreadServed is the number of unread samples
// served; moreUnread reports whether unread samples are left.
func (s *AllSitesReader) ServeUnreadAndNewest(session *ConsumerSession, limit int, onePerSeries bool, match func(line []byte) bool) (families []Family, unreadServed int, moreUnread bool) {
	if limit <= 0 {
		limit = math.MaxInt
	}
	limits := ReadLimits{OnePerSeries: onePerSeries, ServedSince: s.Store.ServedSince()}
	counts, total := s.countUnread(session)
	share := limit // maximum unread samples per site
	if total > limit {
		share = fairShare(counts, limit)
	}
	limits.NewestSince = s.newestSampleCutoff()
	left, repeatsLeft := limit, max(0, limit-total)
	collected := newFamilyGrouper(match)
	leftOut := false
	s.Store.ForEachSite(s.scrapeStartFraction(), func(hash uint64, data *SiteSamples) bool {
		pos := session.Position(hash)
		// Count again, because pushes may have arrived since countUnread.
		limits.Unread = min(share, left, data.UnreadSampleCount(pos))
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

// countUnread counts the samples that the session has not read. perSite has the number for each
// site with unread samples, total is their sum.
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

// fairShare returns the maximum number of samples per site so that all sites together have at most
// limit samples. The result is at least 1, even if that makes more than limit samples. A site with
// fewer samples leaves the rest of its share to the other sites. perSite has the number of samples
// of each site; fairShare sorts it.
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
