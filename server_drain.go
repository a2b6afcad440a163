package main

// This file drains a stopping server: the server keeps serving scrapes until the consumers that
// scraped it lately have read all samples that it holds, but only for a bounded time. Then it logs
// how many samples are still unread. This file must not know of signals, listeners or members.

import (
	"context"
	"time"
)

const (
	drainTimeout      = 75 * time.Second // limit of the drain; less than the 90 s after which systemd kills a stopping service
	drainConsumerIdle = 3 * time.Minute  // the drain ignores a consumer whose last scrape is older than this when the drain begins, unless the consumer scrapes again
	drainPoll         = 250 * time.Millisecond
)

// WaitUntilRead returns when no push is in flight and the consumers have read all samples that this
// server holds. It waits only for consumers whose last recorded scrape of this server is at most
// drainConsumerIdle before the call. It also returns after drainTimeout, or when ctx ends.
func (s *Server) WaitUntilRead(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	since := s.cfg.Now().Add(-drainConsumerIdle)
	unread := s.consumerBacklogs(since)
	if len(unread) > 0 {
		s.cfg.Log.Info("waiting until consumers have read their samples, before stopping; a second signal ends the wait", "consumers", len(unread), "at_most", drainTimeout)
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

// LogUnreadSamples writes to the process log how many samples each consumer has not read. An
// operator checks this before removing the storage directory.
func (s *Server) LogUnreadSamples() {
	unread := s.consumerBacklogs(time.Time{})
	samples, consumers := int64(0), 0
	for _, site := range s.cfg.Store.Stats().Sites {
		samples, consumers = samples+site.Samples, max(consumers, len(site.Backlogs))
	}
	switch {
	case samples > 0 && consumers == 0:
		s.cfg.Log.Warn("no consumer is known, so no sample has been read", "samples", samples)
	case len(unread) == 0:
		s.cfg.Log.Info("no sample is unread")
	}
	outcome := "they will be served when this server starts again"
	if !s.cfg.Store.IsOnDisk() {
		outcome = "without a storage directory they are lost, except samples that a client still has in its spool"
	}
	for _, u := range unread {
		s.cfg.Log.Warn("samples are unread; "+outcome, "consumer", u.Name, "address", u.Address, "samples", u.UnreadSamples, "sites", u.sites)
	}
}

// consumerBacklog has the number of samples that one consumer has not read, and the number of sites
// that these samples belong to.
type consumerBacklog struct {
	ConsumerSiteBacklog
	sites int
}

// consumerBacklogs returns one entry for each consumer that has unread samples and whose last
// recorded scrape of this server is at or after scrapedSince. If scrapedSince is the zero time, the
// result also has the consumers without an address. Consumers with the same name and address share
// an entry.
func (s *Server) consumerBacklogs(scrapedSince time.Time) (all []consumerBacklog) {
	index := map[[2]string]int{}
	for _, site := range s.cfg.Store.Stats().Sites {
		for _, b := range site.Backlogs {
			// A consumer without an address is known only from the report of the site's client, or
			// from cursors on disk. It may never have scraped this server.
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
