package main

// Numbers about the sites and consumers of a store, for metrics and /federate. They are copies,
// so that no reader holds up a push.

import (
	"time"
)

// SiteStats says what is held of one cluster.
type SiteStats struct {
	ID                string
	Series            int
	Samples, Accepted int64     // Accepted: ms, of the newest push
	Backlog           []Backlog // of every consumer
}

// Backlog is what one consumer has not had of a cluster.
type Backlog struct {
	Name, Address string
	Samples       int
	Used          time.Time // of its newest scrape
}

// StoreStats says what is held, and what happened since the store was opened.
type StoreStats struct {
	Sites                []SiteStats // by ID
	Bytes                int64       // of all logs
	Evicted, Expired     int64       // samples
	Unread               int64       // samples that expired before every consumer had them
	Damaged, Compactions int64       // logs, rewrites
	Torn                 int64       // bytes of unfinished writes, cut when the store was opened
}

// Stats returns what is held now.
func (s *Store) Stats() StoreStats {
	st := StoreStats{
		Bytes: s.totals.Bytes.Load(), Damaged: s.damaged.Load(), Torn: s.torn.Load(), Evicted: s.evicted.Load(),
		Expired: s.totals.Expired.Load(), Unread: s.totals.Unread.Load(), Compactions: s.totals.Compactions.Load(),
	}
	for _, c := range s.sorted() {
		c.View(func(held *SiteData) {
			if held.Accepted == 0 {
				return
			}
			cl := SiteStats{ID: c.ID, Series: held.Table.Len(), Samples: held.Samples(), Accepted: held.Accepted}
			for _, cur := range s.Consumers.Cursors(c.Hash) {
				b := Backlog{cur.Name, cur.Address, held.Unread(Position{Seq: cur.Seq}), cur.Used}
				// Those that differ in what they ask for look alike here.
				if n := len(cl.Backlog); n > 0 && cl.Backlog[n-1].Name == b.Name && cl.Backlog[n-1].Address == b.Address {
					last := &cl.Backlog[n-1]
					last.Samples = max(last.Samples, b.Samples)
					if b.Used.After(last.Used) {
						last.Used = b.Used
					}
				} else {
					cl.Backlog = append(cl.Backlog, b)
				}
			}
			st.Sites = append(st.Sites, cl)
		})
	}
	return st
}
