package main

// The end of a server: it goes on serving scrapes until its consumers have read all samples,
// and logs the samples that stay unread. The end is bounded in time. This file must not know
// of signals, listeners or members.

import (
	"context"
	"time"
)

const (
	leaveWithin = 75 * time.Second // less than the 90 s that systemd waits before it kills
	leaveFor    = 3 * time.Minute  // a consumer that has not scraped for so long is not waited for
	leavePoll   = 250 * time.Millisecond
)

// Drain returns when no push is being handled, and every consumer that scraped within the
// last three minutes has read all that is held; after 75 seconds; or when ctx ends.
func (s *Server) Drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, leaveWithin)
	defer cancel()
	tick := time.NewTicker(leavePoll)
	defer tick.Stop()
	since := s.cfg.Now().Add(-leaveFor)
	unread := s.unread(since)
	if len(unread) > 0 {
		s.cfg.Log.Info("serving consumers what they have not read, before the end", "consumers", len(unread), "at_most", leaveWithin)
	}
	for len(unread) > 0 || len(s.uploads) > 0 {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		unread = s.unread(since)
	}
}

// LogUnread logs what each consumer has not read. Its message is what an operator looks for
// before the storage directory is removed.
func (s *Server) LogUnread() {
	unread := s.unread(time.Time{})
	samples, consumers := int64(0), 0
	for _, c := range s.cfg.Store.Stats().Sites {
		samples, consumers = samples+c.Samples, max(consumers, len(c.Backlog))
	}
	switch {
	case samples > 0 && consumers == 0:
		s.cfg.Log.Warn("no consumer is known, so that nothing is read", "samples", samples)
	case len(unread) == 0:
		s.cfg.Log.Info("nothing unread")
	}
	keeps := "they are served when this server starts again"
	if !s.cfg.Store.OnDisk() {
		keeps = "they are lost, but for those of clients with a spool, because there is no storage directory"
	}
	for _, u := range unread {
		s.cfg.Log.Warn("samples are unread; "+keeps, "consumer", u.Name, "address", u.Address, "samples", u.Samples, "clusters", u.clusters)
	}
}

// unreadBy is what one consumer has not read of all sites.
type unreadBy struct {
	Backlog
	clusters int
}

// unread returns what the consumers that scraped at or after since have not read.
func (s *Server) unread(since time.Time) (all []unreadBy) {
	index := map[[2]string]int{}
	for _, c := range s.cfg.Store.Stats().Sites {
		for _, b := range c.Backlog {
			// A consumer without an address has never scraped this server.
			if b.Samples == 0 || b.Used.Before(since) || b.Address == "" && !since.IsZero() {
				continue
			}
			who := [2]string{b.Name, b.Address}
			i, ok := index[who]
			if !ok {
				i = len(all)
				index[who] = i
				all = append(all, unreadBy{Backlog: Backlog{Name: b.Name, Address: b.Address}})
			}
			all[i].Samples += b.Samples
			all[i].clusters++
		}
	}
	return all
}
