package main

// AllSitesReader selects the samples of one scrape from all sites: the newest sample of every
// series, or, for a consumer, first the samples that it has not read. Each name occurs once, the
// samples of a series ascend in time, and the number of samples is limited. If not all samples fit,
// the next scrape usually begins with a different site. The scraper's selectors may be slow, so they
// are applied only after the site's lock is released. This file must not know of HTTP or of how
// cursors are stored.

import (
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

// NewestPerSeries adds to g the newest sample of each series of the owned sites, unless that sample
// is older than MaxSampleAge or than retention. match, if not nil, selects lines. Sites are included
// or left out as a whole, by their number of series. At most limit samples are added, unless the
// first site that shows a sample has more; a limit of 0 means no limit. truncated reports that sites
// were left out.
func (s *AllSitesReader) NewestPerSeries(g *FamilyGrouper, limit int, match func(line []byte) bool) (truncated bool) {
	since := s.newestSampleCutoff()
	n := 0
	var chunks [][]byte // of the text of the present site
	s.Store.ForEachSite(s.scrapeStartFraction(), func(site *Site) bool {
		if !s.Owned(site.Key) {
			return true
		}
		site.View(func(data *SiteSamples) {
			if truncated = limit > 0 && n > 0 && n+data.Table.Len() > limit; truncated {
				return
			}
			n += data.Table.addNewestSince(g, since)
			chunks = data.Table.AppendChunks(chunks[:0])
		})
		g.EndText(chunks, match)
		return !truncated
	})
	if truncated {
		s.rotateFirstSite()
	}
	return truncated
}

// ServeUnreadAndNewest adds to g the next samples for the consumer of session and marks them as
// served. It gives unread samples priority, and among the unread samples of a site the samples of
// the oldest batches. A limit of 0 means no limit; session.UnreadLimit limits the unread samples,
// too. If not all unread samples fit, the sites get fair shares. If room is left, it also adds the
// newest samples, as NewestPerSeries does, of the owned sites without further unread samples. With
// onePerSeries it adds at most one sample of each series. match, if not nil, selects lines: the
// other samples are not added, but count toward limit, as served and in unreadServed. unreadServed
// is the number of unread samples served; moreUnread reports whether unread samples are left.
func (s *AllSitesReader) ServeUnreadAndNewest(g *FamilyGrouper, session *ConsumerSession, limit int, onePerSeries bool, match func(line []byte) bool) (unreadServed int, moreUnread bool) {
	if limit <= 0 {
		limit = math.MaxInt
	}
	limits := ReadLimits{OnePerSeries: onePerSeries, ServedSince: s.Store.ServedSince()}
	counts, total := s.countUnread(session)
	unreadLeft := min(limit, session.UnreadLimit())
	share := unreadLeft // maximum unread samples per site
	if total > unreadLeft {
		share = fairShare(counts, unreadLeft)
	}
	limits.NewestSince = s.newestSampleCutoff()
	left, repeatsLeft := limit, max(0, limit-total)
	var reader siteReader
	var chunks [][]byte // of the text of the present site
	leftOut := false
	s.Store.ForEachSite(s.scrapeStartFraction(), func(site *Site) bool {
		pos, owned := session.Position(site.Key), s.Owned(site.Key)
		var to ReadPosition
		unread, repeated := 0, 0
		site.View(func(data *SiteSamples) {
			// Count again, because pushes may have arrived since countUnread.
			limits.Unread = min(share, unreadLeft, left, data.UnreadSampleCount(pos))
			limits.Repeats = -1
			if owned {
				limits.Repeats = min(repeatsLeft, left-limits.Unread)
			}
			to, unread, repeated = reader.addUnreadAndNewest(g, data, pos, limits)
			chunks = data.Table.AppendChunks(chunks[:0])
			left, unreadLeft, repeatsLeft = left-unread-repeated, unreadLeft-unread, repeatsLeft-repeated
			moreUnread = moreUnread || data.UnreadSampleCount(to) > 0
			leftOut = leftOut || moreUnread || limits.Repeats >= 0 && repeatsLeft < data.Table.Len()
		})
		g.EndText(chunks, match)
		unreadServed += unread
		if to != pos {
			session.MarkServed(site.Key, to, unread)
		}
		return true
	})
	if leftOut {
		s.rotateFirstSite()
	}
	return unreadServed, moreUnread
}

// countUnread counts the samples that the session has not read. perSite has the number for each
// site with unread samples, total is their sum.
func (s *AllSitesReader) countUnread(session *ConsumerSession) (perSite []int, total int) {
	s.Store.ForEachSite(0, func(site *Site) bool {
		pos, n := session.Position(site.Key), 0
		site.View(func(data *SiteSamples) { n = data.UnreadSampleCount(pos) })
		if n > 0 {
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
