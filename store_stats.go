package main

// StoreStats are numbers about the sites and consumers of a store, for metrics and /federate. They
// are copies, so that reading them does not delay a push.

import (
	"time"
)

// SiteStats has the numbers of one site.
type SiteStats struct {
	ID                string
	Series            int
	Samples, LastPush int64                 // samples in memory; time of the newest push in ms
	Backlogs          []ConsumerSiteBacklog // one for each name and address of a consumer, sorted
}

// ConsumerSiteBacklog is the number of samples of a site that one consumer has not read. All
// samples of a batch that it has read only in part are included.
type ConsumerSiteBacklog struct {
	Name, Address string
	UnreadSamples int
	LastScrape    time.Time
}

// StoreStats has the present numbers of a store, and counts of events since the store was opened.
type StoreStats struct {
	Sites            []SiteStats // sorted by cluster ID
	LogBytes         int64       // bytes of all logs
	Evicted, Expired int64       // numbers of samples
	ExpiredUnread    int64       // samples that expired before every consumer had read them
	DamagedLogs      int64       // logs that OpenStore found damaged or missing, or too short although no sender keeps what they lost
	TornLogs         int64       // logs that OpenStore found ending early, as after a power cut
	Compactions      int64       // rewrites of logs, except for those that also store a new batch
}

// Stats returns the present numbers of the store. It leaves out sites that never had a push.
func (s *Store) Stats() StoreStats {
	st := StoreStats{
		LogBytes: s.totals.LogBytes.Load(), DamagedLogs: s.damaged.Load(), TornLogs: s.torn.Load(), Evicted: s.evicted.Load(),
		Expired: s.totals.Expired.Load(), ExpiredUnread: s.totals.ExpiredUnread.Load(), Compactions: s.totals.Compactions.Load(),
	}
	sites, consumers := s.sitesByID(), s.Consumers.sortedConsumers()
	st.Sites = make([]SiteStats, 0, len(sites))
	backlogs := make([]ConsumerSiteBacklog, 0, len(sites)*len(consumers)) // of all sites, because one slice for each site takes much longer
	var cursors []SiteConsumerCursor
	for _, site := range sites {
		first := len(backlogs)
		cursors = s.Consumers.appendCursors(cursors[:0], consumers, site.Key)
		site.View(func(data *SiteSamples) {
			if data.LastPush > 0 {
				backlogs = appendBacklogs(backlogs, data, cursors)
				st.Sites = append(st.Sites, SiteStats{
					ID: site.ID, Series: data.Table.Len(), Samples: data.SampleCount(), LastPush: data.LastPush,
					Backlogs: backlogs[first:len(backlogs):len(backlogs)],
				})
			}
		})
	}
	return st
}

// appendBacklogs appends to backlogs the backlog of each consumer, sorted by name and address.
// Several consumers with the same name and address, but different match[] selectors, become one
// entry with the largest backlog and the newest scrape. cursors must be sorted by name and address.
func appendBacklogs(backlogs []ConsumerSiteBacklog, data *SiteSamples, cursors []SiteConsumerCursor) []ConsumerSiteBacklog {
	for i, c := range cursors {
		b := ConsumerSiteBacklog{c.Name, c.Address, data.UnreadSampleCount(ReadPosition{Seq: c.Seq}), c.LastScrape}
		if i == 0 || c.compareName(cursors[i-1]) != 0 {
			backlogs = append(backlogs, b)
			continue
		}
		last := &backlogs[len(backlogs)-1]
		last.UnreadSamples = max(last.UnreadSamples, b.UnreadSamples)
		if b.LastScrape.After(last.LastScrape) {
			last.LastScrape = b.LastScrape
		}
	}
	return backlogs
}

// StoreLimits are the limits of a store. 0 means no limit.
type StoreLimits struct {
	Series         int   // of one site
	Sites, Samples int   // of all sites
	Storage        int64 // bytes of all logs together
}

// Limits returns the limits of the store.
func (s *Store) Limits() StoreLimits {
	return StoreLimits{Series: s.cfg.LimitSeries, Sites: s.cfg.LimitSites, Samples: s.cfg.LimitSamples, Storage: s.cfg.LimitStorage}
}

// SiteFamilies returns the number of a site's series for each metric name. It returns nil if the
// store does not know the site.
func (s *Store) SiteFamilies(clusterID string) (byName map[string]int) {
	s.mu.RLock()
	site := s.sites[clusterID]
	s.mu.RUnlock()
	if site != nil {
		site.View(func(data *SiteSamples) { byName = data.Table.SeriesOfFamilies() })
	}
	return byName
}
