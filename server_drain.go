package main

// The end of a server: it goes on serving scrapes until its consumers have read all samples,
// and logs the samples that stay unread. The end is bounded in time. This file must not know
// of signals, listeners or members.

import (
	"context"
	"time"
)

const (
	drainTimeout      = 75 * time.Second // less than the 90 s that systemd waits before it kills
	drainConsumerIdle = 3 * time.Minute  // without a scrape, after which a consumer is not waited for
	drainPoll         = 250 * time.Millisecond
)

// WaitUntilRead returns when no push is being handled, and every consumer that scraped within the
// last three minutes has read all that is held; after 75 seconds; or when ctx ends.
func (s *Server) WaitUntilRead(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	since := s.cfg.Now().Add(-drainConsumerIdle)
	unread := s.consumerBacklogs(since)
	if len(unread) > 0 {
		s.cfg.Log.Info("serving consumers what they have not read, before the end", "consumers", len(unread), "at_most", drainTimeout)
	}
	for len(unread) > 0 || s.uploads.InUse() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		unread = s.consumerBacklogs(since)
	}
}

// LogUnreadSamples logs how much each consumer has not read. An operator looks for that before the
// storage directory is removed.
func (s *Server) LogUnreadSamples() {
	unread := s.consumerBacklogs(time.Time{})
	samples, consumers := int64(0), 0
	for _, site := range s.cfg.Store.Stats().Sites {
		samples, consumers = samples+site.Samples, max(consumers, len(site.Backlogs))
	}
	switch {
	case samples > 0 && consumers == 0:
		s.cfg.Log.Warn("no consumer is known, so that nothing is read", "samples", samples)
	case len(unread) == 0:
		s.cfg.Log.Info("nothing unread")
	}
	outcome := "they are served when this server starts again"
	if !s.cfg.Store.IsOnDisk() {
		outcome = "they are lost, but for those of clients with a spool, because there is no storage directory"
	}
	for _, u := range unread {
		s.cfg.Log.Warn("samples are unread; "+outcome, "consumer", u.Name, "address", u.Address, "samples", u.UnreadSamples, "sites", u.sites)
	}
}

// consumerBacklog has the samples of all sites that one consumer has not read.
type consumerBacklog struct {
	ConsumerSiteBacklog
	sites int
}

// consumerBacklogs returns the consumers that scraped at or after scrapedSince and have not read
// all.
func (s *Server) consumerBacklogs(scrapedSince time.Time) (all []consumerBacklog) {
	index := map[[2]string]int{}
	for _, site := range s.cfg.Store.Stats().Sites {
		for _, b := range site.Backlogs {
			// A consumer without an address has never scraped this server.
			if b.UnreadSamples == 0 || b.LastScrape.Before(scrapedSince) || b.Address == "" && !scrapedSince.IsZero() {
				continue
			}
			consumer := [2]string{b.Name, b.Address}
			i, ok := index[consumer]
			if !ok {
				i = len(all)
				index[consumer] = i
				all = append(all, consumerBacklog{ConsumerSiteBacklog: ConsumerSiteBacklog{Name: b.Name, Address: b.Address}})
			}
			all[i].UnreadSamples += b.UnreadSamples
			all[i].sites++
		}
	}
	return all
}
