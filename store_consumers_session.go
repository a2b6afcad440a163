package main

// Scrapes of one connection of a consumer. What was served on a connection counts as read when
// the connection asks again, because the answer is then known to have arrived. On another
// connection it is served again. Sessions are bounded for each consumer.

import (
	"fmt"
	"math"
	"slices"
	"time"
)

const (
	maxSessions      = 4         // of one consumer
	minConsumerLimit = 1000      // samples; where a limit that was halved ends
	unconfirmedFew   = 3         // scrapes in a row that may be an accident
	unconfirmedWarn  = time.Hour // between warnings of unconfirmed scrapes
)

// ScrapeSession is how far one connection of one consumer has read. Requests of a connection
// come one after the other, and so must the calls of its methods. Consumers.mu guards its fields.
type ScrapeSession struct {
	Key           uint64 // names the consumer
	consumers     *Consumers
	consumer      *consumer
	conn          any
	confirmed     map[uint64]Position // by site; on this connection, or before it began
	served        map[uint64]Position // by site; in the last scrape
	servedUnread  int                 // samples of the last scrape that were unread
	late          bool                // the last scrape took longer than it may
	writtenInTime bool                // the last scrape was written to its end, and was not slow
}

// BeginScrape begins a scrape of a consumer, over conn, which has to be comparable and
// unlike that of any other connection ever. What was served on conn before has arrived, because
// a consumer asks again only when it has read the answer. repeated reports that what was served
// last to this consumer, on another connection, is not known to have arrived, and comes again.
func (cs *Consumers) BeginScrape(key uint64, name, address string, conn any, now time.Time) (r *ScrapeSession, repeated bool, err error) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c, err := cs.noteScrape(KnownConsumer{key, name, address}, now)
	if err != nil {
		return nil, false, err
	}
	i := slices.IndexFunc(c.sessions, func(r *ScrapeSession) bool { return r.conn == conn })
	if i >= 0 {
		r = c.sessions[i]
		c.sessions = slices.Delete(c.sessions, i, i+1)
		r.confirm()
	} else {
		r = c.newSession(cs, conn)
		repeated = c.countUnconfirmed()
		if len(c.sessions) == maxSessions {
			c.sessions = slices.Delete(c.sessions, 0, 1)
		}
	}
	c.sessions = append(c.sessions, r)
	r.served, r.servedUnread, r.late, r.writtenInTime = map[uint64]Position{}, 0, false, false
	return r, repeated, nil
}

// noteScrape returns the consumer of a scrape, which it adds if need be.
func (cs *Consumers) noteScrape(k KnownConsumer, now time.Time) (*consumer, error) {
	known := cs.byKey[k.Key] != nil
	c := cs.addKnown(k, now)
	if c == nil {
		return nil, fmt.Errorf("%w: %d are known; one is forgotten when it has not scraped for %v", ErrConsumers, MaxConsumers, consumerIdle)
	}
	if !known || c.name != k.Name { // the name was lost
		c.name, c.address = k.Name, k.Address
		cs.knownChanged.Store(true)
	}
	c.lastScrape = now
	return c, nil
}

// newSession returns a session that begins at the consumer's cursors. Later, sessions of the
// same consumer move on without each other.
func (c *consumer) newSession(cs *Consumers, conn any) *ScrapeSession {
	r := &ScrapeSession{Key: c.key, consumers: cs, consumer: c, conn: conn, confirmed: make(map[uint64]Position, len(c.cursors))}
	for site, seq := range c.cursors {
		r.confirmed[site] = Position{Seq: seq}
	}
	return r
}

// countUnconfirmed reports whether the consumer left connections whose last scrape served
// unread samples, and counts them as one scrape. The next scrape is half as long, in case it
// was the length that failed. A scrape that was written whole and in time halves the limit
// only among the first few in a row: more of them are not a matter of length.
func (c *consumer) countUnconfirmed() (repeated bool) {
	for _, other := range c.sessions {
		if other.servedUnread == 0 {
			continue
		}
		repeated = true
		if !other.writtenInTime || c.unconfirmed < unconfirmedFew {
			c.lowerLimit(other.servedUnread / 2)
		}
		other.servedUnread = 0 // halves once
	}
	if repeated {
		c.unconfirmed++
	}
	return repeated
}

// confirm moves the cursors to what the session's last scrape served, and doubles the
// consumer's limit if that scrape was in time.
func (s *ScrapeSession) confirm() {
	c := s.consumer
	if len(s.served) > 0 {
		c.unconfirmed, c.lastWarning = 0, time.Time{}
	}
	for site, to := range s.served {
		s.confirmed[site] = to
		if to.Seq > c.cursors[site] {
			c.setCursor(site, to.Seq)
		}
	}
	if s.servedUnread > 0 && !s.late && c.scrapeLimit > 0 && c.scrapeLimit < math.MaxInt/2 {
		c.scrapeLimit *= 2
	}
}

// Position returns how far the connection has read a site. It begins at the consumer's cursor.
func (s *ScrapeSession) Position(site uint64) Position {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	return s.confirmed[site]
}

// MarkServed notes that unread more samples of a site, up to a position, are being served.
func (s *ScrapeSession) MarkServed(site uint64, to Position, unread int) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	s.served[site] = to
	s.servedUnread += unread
}

// SampleLimit returns how many samples this scrape may have: limit, or less if the consumer's last
// scrapes failed. 0 does not bound.
func (s *ScrapeSession) SampleLimit(limit int) int {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	if own := s.consumer.scrapeLimit; own > 0 && (limit == 0 || own < limit) {
		return own
	}
	s.consumer.scrapeLimit = 0
	return limit
}

// Finish ends a scrape whose answer took some time to write, or failed with err. If it took
// longer than allowed, the next scrape is shorter; allowed 0 does not bound.
func (s *ScrapeSession) Finish(took, allowed time.Duration, err error) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	late := took > allowed && allowed > 0
	s.writtenInTime = !late && err == nil
	if late && s.servedUnread > 0 {
		s.late = true
		s.consumer.lowerLimit(int(float64(s.servedUnread) * float64(allowed) / float64(took)))
	}
}

// MarkProxied notes that the scrape came through a proxy, and reports whether it is the
// consumer's first that did.
func (s *ScrapeSession) MarkProxied() (first bool) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	first = !s.consumer.proxied
	s.consumer.proxied = true
	return first
}

// UnconfirmedScrapes returns how many scrapes in a row served unread samples and were not
// confirmed. warn reports that it is time for a warning, which counts as given.
func (s *ScrapeSession) UnconfirmedScrapes(now time.Time) (scrapes int, warn bool) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	if warn = s.consumer.unconfirmed >= unconfirmedFew && now.Sub(s.consumer.lastWarning) >= unconfirmedWarn; warn {
		s.consumer.lastWarning = now
	}
	return s.consumer.unconfirmed, warn
}

// lowerLimit lowers the limit to n, but not below minConsumerLimit.
func (c *consumer) lowerLimit(n int) {
	if n = max(minConsumerLimit, n); c.scrapeLimit == 0 || n < c.scrapeLimit {
		c.scrapeLimit = n
	}
}
