package main

// Numbers about the sites and consumers of a store, for metrics and /federate. They are copies,
// so that no reader holds up a push.

import (
	"time"
)

// SiteStats says what is held of one site.
type SiteStats struct {
	ID                string
	Series            int
	Samples, LastPush int64                 // LastPush: ms
	Backlogs          []ConsumerSiteBacklog // of every consumer
}

// ConsumerSiteBacklog is what one consumer has not read of a site.
type ConsumerSiteBacklog struct {
	Name, Address string
	UnreadSamples int
	LastScrape    time.Time // of its newest scrape
}

// StoreStats says what is held, and what happened since the store was opened.
type StoreStats struct {
	Sites                    []SiteStats // by ID
	LogBytes                 int64       // of all logs
	Evicted, Expired         int64       // samples
	ExpiredUnread            int64       // samples that expired before every consumer had read them
	DamagedLogs, Compactions int64       // logs, rewrites
	TornBytes                int64       // bytes of unfinished writes, cut when the store was opened
}

// Stats returns what is held now.
func (s *Store) Stats() StoreStats {
	st := StoreStats{
		LogBytes: s.totals.LogBytes.Load(), DamagedLogs: s.damaged.Load(), TornBytes: s.torn.Load(), Evicted: s.evicted.Load(),
		Expired: s.totals.Expired.Load(), ExpiredUnread: s.totals.ExpiredUnread.Load(), Compactions: s.totals.Compactions.Load(),
	}
	for _, site := range s.sitesByID() {
		site.View(func(data *SiteSamples) {
			if data.LastPush > 0 {
				st.Sites = append(st.Sites, SiteStats{
					ID: site.ID, Series: data.Table.Len(), Samples: data.SampleCount(), LastPush: data.LastPush,
					Backlogs: backlogsByConsumer(data, s.Consumers.Cursors(site.Key)),
				})
			}
		})
	}
	return st
}

// backlogsByConsumer returns the backlog of each consumer, by name and address. Of consumers that
// differ only in what they ask for, which are neighbours in cursors, it returns the largest.
func backlogsByConsumer(data *SiteSamples, cursors []SiteConsumerCursor) (all []ConsumerSiteBacklog) {
	for _, c := range cursors {
		b := ConsumerSiteBacklog{c.Name, c.Address, data.UnreadSampleCount(ReadPosition{Seq: c.Seq}), c.LastScrape}
		n := len(all)
		if n == 0 || all[n-1].Name != b.Name || all[n-1].Address != b.Address {
			all = append(all, b)
			continue
		}
		last := &all[n-1]
		last.UnreadSamples = max(last.UnreadSamples, b.UnreadSamples)
		if b.LastScrape.After(last.LastScrape) {
			last.LastScrape = b.LastScrape
		}
	}
	return all
}
