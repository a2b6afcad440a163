package main

// Scrapes of one connection of a consumer. Samples served on a connection count as read when
// the connection asks again, because the answer is then known to have arrived. On another
// connection they are served again. Sessions are bounded for each consumer.

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

// ConsumerSession is how far one connection of one consumer has read. Requests of a connection
// come one after the other, and so must the calls of its methods. Consumers.mu guards its fields.
type ConsumerSession struct {
	Key           uint64 // names the consumer
	consumers     *Consumers
	consumer      *consumer
	conn          any
	confirmed     map[uint64]ReadPosition // by site; on this connection, or before it began
	served        map[uint64]ReadPosition // by site; in the last scrape
	servedUnread  int                     // samples of the last scrape that were unread
	late          bool                    // the last scrape took longer than it may
	writtenInTime bool                    // the last scrape was written to its end, and was not slow
}

// BeginScrape begins a scrape of a consumer, over conn, which has to be comparable and
// unlike that of any other connection ever. Samples served on conn before have arrived, because
// a consumer asks again only when it has read the answer. repeats reports that what was served
// last to this consumer, on another connection, is not known to have arrived, and comes again.
func (cs *Consumers) BeginScrape(consumerKey uint64, name, address string, conn any, now time.Time) (session *ConsumerSession, repeats bool, err error) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c, err := cs.noteScrape(KnownConsumer{consumerKey, name, address}, now)
	if err != nil {
		return nil, false, err
	}
	i := slices.IndexFunc(c.sessions, func(r *ConsumerSession) bool { return r.conn == conn })
	if i >= 0 {
		session = c.sessions[i]
		c.sessions = slices.Delete(c.sessions, i, i+1)
		session.confirmLastScrape()
	} else {
		session = c.newSession(cs, conn)
		repeats = c.countUnconfirmedAndLowerLimit()
		if len(c.sessions) == maxSessions {
			c.sessions = slices.Delete(c.sessions, 0, 1)
		}
	}
	c.sessions = append(c.sessions, session)
	session.served, session.servedUnread, session.late, session.writtenInTime = map[uint64]ReadPosition{}, 0, false, false
	return session, repeats, nil
}

// noteScrape returns the consumer of a scrape, which it adds if need be.
func (cs *Consumers) noteScrape(k KnownConsumer, now time.Time) (*consumer, error) {
	known := cs.byKey[k.Key] != nil
	c := cs.findOrAddConsumer(k, now)
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
func (c *consumer) newSession(cs *Consumers, conn any) *ConsumerSession {
	r := &ConsumerSession{Key: c.key, consumers: cs, consumer: c, conn: conn, confirmed: make(map[uint64]ReadPosition, len(c.cursors))}
	for site, seq := range c.cursors {
		r.confirmed[site] = ReadPosition{Seq: seq}
	}
	return r
}

// countUnconfirmedAndLowerLimit reports whether the consumer left connections whose last scrape
// served unread samples, and counts them as one scrape. The next scrape is half as long, in case it
// was the length that failed. A scrape that was written whole and in time halves the limit only
// among the first few in a row: more of them are not a matter of length.
func (c *consumer) countUnconfirmedAndLowerLimit() (found bool) {
	for _, other := range c.sessions {
		if other.servedUnread == 0 {
			continue
		}
		found = true
		if !other.writtenInTime || c.unconfirmed < unconfirmedFew {
			c.lowerScrapeLimitTo(other.servedUnread / 2)
		}
		other.servedUnread = 0 // halves once
	}
	if found {
		c.unconfirmed++
	}
	return found
}

// confirmLastScrape moves the cursors to what the session's last scrape served, and doubles the
// consumer's limit if that scrape was in time.
func (s *ConsumerSession) confirmLastScrape() {
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
func (s *ConsumerSession) Position(siteKey uint64) ReadPosition {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	return s.confirmed[siteKey]
}

// MarkServed notes that servedUnread more samples of a site, up to a position, are being served.
func (s *ConsumerSession) MarkServed(siteKey uint64, to ReadPosition, servedUnread int) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	s.served[siteKey] = to
	s.servedUnread += servedUnread
}

// SampleLimit returns how many samples this scrape may have: configured, or less if the consumer's
// last scrapes failed. 0 does not bound.
func (s *ConsumerSession) SampleLimit(configured int) int {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	if own := s.consumer.scrapeLimit; own > 0 && (configured == 0 || own < configured) {
		return own
	}
	s.consumer.scrapeLimit = 0
	return configured
}

// EndScrapeAndLimitNext ends a scrape whose answer took some time to write, or failed with
// writeErr. If it took longer than allowed, the next scrape is shorter; allowed 0 does not bound.
func (s *ConsumerSession) EndScrapeAndLimitNext(took, allowed time.Duration, writeErr error) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	late := took > allowed && allowed > 0
	s.writtenInTime = !late && writeErr == nil
	if late && s.servedUnread > 0 {
		s.late = true
		s.consumer.lowerScrapeLimitTo(int(float64(s.servedUnread) * float64(allowed) / float64(took)))
	}
}

// MarkConsumerProxied notes that the scrape came through a proxy, and reports whether it is the
// consumer's first that did.
func (s *ConsumerSession) MarkConsumerProxied() (first bool) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	first = !s.consumer.proxied
	s.consumer.proxied = true
	return first
}

// TakeUnconfirmedWarning returns how many scrapes in a row served unread samples and were not
// confirmed. warn reports that it is time for a warning, which counts as given.
func (s *ConsumerSession) TakeUnconfirmedWarning(now time.Time) (unconfirmedScrapes int, warn bool) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	if warn = s.consumer.unconfirmed >= unconfirmedFew && now.Sub(s.consumer.lastWarning) >= unconfirmedWarn; warn {
		s.consumer.lastWarning = now
	}
	return s.consumer.unconfirmed, warn
}

// lowerScrapeLimitTo lowers the limit to samples, but not below minConsumerLimit.
func (c *consumer) lowerScrapeLimitTo(samples int) {
	if samples = max(minConsumerLimit, samples); c.scrapeLimit == 0 || samples < c.scrapeLimit {
		c.scrapeLimit = samples
	}
}
