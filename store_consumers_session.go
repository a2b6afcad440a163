package main

// ConsumerSession tracks the scrapes that one consumer makes over one TCP connection. The samples
// of an answer count as read when the next request arrives on the same connection, because the
// consumer must have read the answer before. Before this request arrives, a scrape over another
// connection is served the same samples again. The number of sessions is bounded for each consumer.

import (
	"fmt"
	"math"
	"slices"
	"time"
)

const (
	maxSessions      = 4         // sessions per consumer
	minConsumerLimit = 1000      // samples; a consumer's own scrape limit is never lower
	firstUnread      = 50_000    // unread samples that a scrape may serve a consumer that has not yet confirmed more
	unconfirmedFew   = 3         // fewer consecutive unconfirmed scrapes than this may be an accident
	unconfirmedWarn  = time.Hour // shortest time between warnings about a consumer's unconfirmed scrapes, unless a scrape is confirmed in between, and between warnings about its proxy
)

// ConsumerSession is the read position of one consumer on one connection. The requests of a
// connection come one after the other, and a session must not be used for two requests at once.
// Consumers.mu guards its fields.
type ConsumerSession struct {
	Key           uint64 // key of the consumer
	consumers     *Consumers
	consumer      *consumer
	conn          any                     // identifies the connection
	confirmed     map[uint64]ReadPosition // by site key; how far the consumer has read, on this connection or before the session began
	served        map[uint64]ReadPosition // by site key; position after the samples that the last scrape served
	servedUnread  int                     // number of unread samples that the last scrape served
	writtenInTime bool                    // the last answer was written completely, and the scrape ended in time
}

// BeginScrape begins a scrape of a consumer over the connection conn and returns the connection's
// session. It adds the consumer if it is not known. If MaxConsumers are known, it forgets the
// longest unused consumer that never confirmed a scrape; the error is ErrConsumers if there is none.
// conn must be comparable and must differ from every other connection, past or future.
// BeginScrape counts the samples of the previous scrape on conn as read, because a consumer sends
// its next request only after it has read the answer. repeats is true if conn is new and a scrape
// of this consumer on another connection served unread samples but is not confirmed yet. Those
// samples are then served again. repeats is true only once for each such scrape.
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
	clear(session.served)
	session.servedUnread, session.writtenInTime = 0, false
	return session, repeats, nil
}

// noteScrape returns the consumer that scrapes now, and adds it if it is not known. It sets the
// time of the consumer's last scrape. The caller holds cs.mu.
func (cs *Consumers) noteScrape(k KnownConsumer, now time.Time) (*consumer, error) {
	known := cs.byKey[k.Key] != nil
	if !known && len(cs.byKey) >= MaxConsumers {
		cs.forgetUnconfirmed()
	}
	c := cs.findOrAddConsumer(k, now)
	if c == nil {
		return nil, fmt.Errorf("%w: %d that received samples are known; a consumer is forgotten after %v without a scrape", ErrConsumers, MaxConsumers, consumerIdle)
	}
	if !known || c.name != k.Name { // recovery adds a consumer without its name if only its cursors are left on disk
		c.name, c.address = k.Name, k.Address
		cs.listChanges.Add(1)
	}
	c.lastScrape = now
	return c, nil
}

// newSession returns a session that begins at the consumer's cursors. Afterwards each session of a
// consumer advances independently of the others.
func (c *consumer) newSession(cs *Consumers, conn any) *ConsumerSession {
	r := &ConsumerSession{Key: c.key, consumers: cs, consumer: c, conn: conn, served: map[uint64]ReadPosition{}, confirmed: make(map[uint64]ReadPosition, len(c.cursors))}
	for site, seq := range c.cursors {
		r.confirmed[site] = ReadPosition{Seq: seq}
	}
	return r
}

// countUnconfirmedAndLowerLimit looks for sessions on other connections whose last scrape served
// unread samples, is not confirmed and was not found by an earlier call. If there are any, it
// returns true and counts them as one unconfirmed scrape. It also lowers the consumer's scrape
// limit to half as many samples as the unconfirmed scrape served unread, because that scrape may
// have failed for being too long. After unconfirmedFew consecutive unconfirmed scrapes, an
// unconfirmed answer that was written completely and in time no longer lowers the limit, because
// its length is then not the cause.
func (c *consumer) countUnconfirmedAndLowerLimit() (found bool) {
	for _, other := range c.sessions {
		if other.servedUnread == 0 {
			continue
		}
		found = true
		if !other.writtenInTime || c.unconfirmed < unconfirmedFew {
			c.lowerScrapeLimitTo(other.servedUnread / 2)
		}
		other.servedUnread = 0 // so that the unconfirmed scrape lowers the limit only once
	}
	if found {
		c.unconfirmed++
	}
	return found
}

// confirmLastScrape moves the consumer's cursors forward to the newest batches that the session's
// last scrape served completely. If that scrape served unread samples in time, it also doubles the
// consumer's scrape limit, if there is one, and raises its UnreadLimit.
func (s *ConsumerSession) confirmLastScrape() {
	c := s.consumer
	if len(s.served) > 0 {
		c.unconfirmed, c.lastWarning, c.confirmed = 0, time.Time{}, true
	}
	for site, to := range s.served {
		s.confirmed[site] = to
		if to.Seq > c.cursors[site] {
			c.setCursor(site, to.Seq)
		}
	}
	if !s.writtenInTime {
		return
	}
	c.largestConfirmed = max(c.largestConfirmed, s.servedUnread)
	if s.servedUnread > 0 && c.scrapeLimit > 0 && c.scrapeLimit < math.MaxInt/2 {
		c.scrapeLimit *= 2
	}
}

// Position returns how far the samples of a site are read on this connection. A new session starts
// at the consumer's cursor.
func (s *ConsumerSession) Position(siteKey uint64) ReadPosition {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	return s.confirmed[siteKey]
}

// MarkServed records that the present scrape serves servedUnread unread samples of a site. The
// parameter to is the position after these samples.
func (s *ConsumerSession) MarkServed(siteKey uint64, to ReadPosition, servedUnread int) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	s.served[siteKey] = to
	s.servedUnread += servedUnread
}

// SampleLimit returns the maximum number of samples for this scrape. The result is the parameter
// configured, or a lower number if the consumer's last scrapes failed or were late. 0 means no
// limit.
func (s *ConsumerSession) SampleLimit(configured int) int {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	if own := s.consumer.scrapeLimit; own > 0 && (configured == 0 || own < configured) {
		return own
	}
	s.consumer.scrapeLimit = 0
	return configured
}

// UnreadLimit returns the maximum number of unread samples for this scrape: twice as many as in the
// largest scrape that the consumer has confirmed and that took at most half of its timeout. A scrape
// with twice as many samples takes at most its timeout. Without this limit, the first scrape after a
// few sites have pushed a lot would be so large that it fails, and with it the samples of all sites.
func (s *ConsumerSession) UnreadLimit() int {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	return max(firstUnread, 2*s.consumer.largestConfirmed)
}

// EndScrapeAndLimitNext ends a scrape. The scrape took the time took. err is not nil if the samples
// were not written; the next scrape then confirms nothing, even if it comes on the same connection.
// If the scrape served unread samples and the time exceeds allowed, the limit of the next scrape is
// lowered in proportion, but not below minConsumerLimit.
func (s *ConsumerSession) EndScrapeAndLimitNext(took, allowed time.Duration, err error) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	late := took > allowed
	s.writtenInTime = !late && err == nil
	if err != nil {
		clear(s.served)
	}
	if late && s.servedUnread > 0 {
		s.consumer.lowerScrapeLimitTo(int(float64(s.servedUnread) * float64(allowed) / float64(took)))
	}
}

// TakeProxyWarning reports whether the caller must log a warning that the consumer scrapes through a
// proxy. The next warning is then due after unconfirmedWarn.
func (s *ConsumerSession) TakeProxyWarning(now time.Time) (warn bool) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	if warn = now.Sub(s.consumer.lastProxyWarning) >= unconfirmedWarn; warn {
		s.consumer.lastProxyWarning = now
	}
	return warn
}

// TakeUnconfirmedWarning returns the number of the consumer's consecutive scrapes that served
// unread samples and were not confirmed. If warn is true, the caller must log a warning; the next
// warning is then due after unconfirmedWarn, or earlier if a scrape is confirmed before.
func (s *ConsumerSession) TakeUnconfirmedWarning(now time.Time) (unconfirmedScrapes int, warn bool) {
	s.consumers.mu.Lock()
	defer s.consumers.mu.Unlock()
	if warn = s.consumer.unconfirmed >= unconfirmedFew && now.Sub(s.consumer.lastWarning) >= unconfirmedWarn; warn {
		s.consumer.lastWarning = now
	}
	return s.consumer.unconfirmed, warn
}

// lowerScrapeLimitTo lowers the consumer's scrape limit to the given number of samples, but not
// below minConsumerLimit. It never raises the limit.
func (c *consumer) lowerScrapeLimitTo(samples int) {
	if samples = max(minConsumerLimit, samples); c.scrapeLimit == 0 || samples < c.scrapeLimit {
		c.scrapeLimit = samples
	}
}
