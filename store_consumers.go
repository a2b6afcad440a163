package main

// Consumers and their cursors. A cursor is, for each consumer and site, the number of the newest
// batch that is known to have arrived. Consumers are bounded, and those that clients report as
// well. This file must not know of samples.

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

const (
	maxConsumerName   = 64 // bytes
	consumerIdle      = 24 * time.Hour
	maxReportingSites = 100_000 // whose clients report consumers
)

// ErrConsumers: too many consumers are known to remember another.
var ErrConsumers = errors.New("too many consumers")

// Consumers holds the cursors. It is safe for concurrent use.
type Consumers struct {
	lock         ioLock      // its holder alone does I/O and touches log and state
	log          *Log        // of cursors; nil in memory-only mode
	state        *StoreMeta  // has the consumers without their cursors
	TornBytes    int64       // bytes of an unfinished write that OpenConsumers cut
	Damage       error       // what OpenConsumers found damaged; nil: nothing
	knownChanged atomic.Bool // the consumers on disk are not those of byKey

	retention time.Duration

	mu       sync.Mutex // guards the rest; never held across I/O
	byKey    map[uint64]*consumer
	reported map[uint64]map[uint64]time.Time // site → consumer → its newest scrape of any server, as the site's client says
}

// consumer is guarded by Consumers.mu.
type consumer struct {
	key           uint64
	name, address string
	lastScrape    time.Time
	savedScrape   time.Time          // lastScrape on disk
	cursors       map[uint64]uint64  // site → number of the newest batch confirmed
	unsaved       map[uint64]uint64  // changes of cursors that are not on disk; 0 removes
	sessions      []*ConsumerSession // at most maxSessions, least recently used first
	scrapeLimit   int                // samples in one scrape; 0: no limit of its own
	unconfirmed   int                // scrapes in a row that served unread samples and were repeated
	lastWarning   time.Time          // of these scrapes; zero: none yet
	proxied       bool               // has scraped through a proxy
}

// CheckConsumerName reports a name that no consumer can have.
func CheckConsumerName(name string) error {
	if len(name) == 0 || len(name) > maxConsumerName || !utf8.ValidString(name) || strings.ContainsRune(name, 0) {
		return fmt.Errorf("a name has 1 to %d bytes of text", maxConsumerName)
	}
	return nil
}

// ConsumerKey names a consumer: its name, where it is, and what it asks for.
func ConsumerKey(name, address, match string) uint64 {
	h := sha256.Sum256([]byte(name + "\x00" + address + "\x00" + match))
	return binary.BigEndian.Uint64(h[:])
}

// SiteCursorsPastEnd says that cursors are past the end of a site's log.
type SiteCursorsPastEnd struct {
	Site, Seq uint64
	Names     []string // of the consumers
}

// DropCursorsPastEnd drops and returns the cursors that are past the end of their site's log, or
// whose site has no log. logEnds has the number of the last batch in each log. The consumers are
// served again all that such a log still holds.
func (cs *Consumers) DropCursorsPastEnd(logEnds map[uint64]uint64) []SiteCursorsPastEnd {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	past := map[uint64]SiteCursorsPastEnd{}
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		for site, seq := range c.cursors {
			if seq > logEnds[site] {
				p := past[site]
				past[site] = SiteCursorsPastEnd{site, max(p.Seq, seq), append(p.Names, c.name)}
				c.setCursor(site, 0)
			}
		}
	}
	return slices.SortedFunc(maps.Values(past), func(a, b SiteCursorsPastEnd) int { return cmp.Compare(a.Site, b.Site) })
}

// HighestCursor returns the highest cursor of all.
func (cs *Consumers) HighestCursor() (highest uint64) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.byKey {
		for _, seq := range c.cursors {
			highest = max(highest, seq)
		}
	}
	return highest
}

// setCursor sets a cursor, or removes it if seq is 0.
func (c *consumer) setCursor(siteKey, seq uint64) {
	if c.unsaved[siteKey] = seq; seq == 0 {
		delete(c.cursors, siteKey)
	} else {
		c.cursors[siteKey] = seq
	}
}

// findOrAddConsumer returns the consumer, adding it if need be as if it had scraped now; nil if
// there are more than MaxConsumers. Recovery calls it as well as a scrape: a consumer of the files
// that is refused here would count as damage.
func (cs *Consumers) findOrAddConsumer(k KnownConsumer, now time.Time) *consumer {
	c := cs.byKey[k.Key]
	if c == nil && len(cs.byKey) < MaxConsumers {
		c = &consumer{key: k.Key, name: k.Name, address: k.Address, lastScrape: now, cursors: map[uint64]uint64{}, unsaved: map[uint64]uint64{}}
		cs.byKey[k.Key] = c
	}
	return c
}

// AddClientReportedConsumers adds the consumers that a site's client knows from other servers, or
// from this one before it lost its disk. They matter for that site alone.
func (cs *Consumers) AddClientReportedConsumers(siteKey uint64, consumers []ConsumerAge, now time.Time) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range consumers {
		if c.Age >= consumerIdle {
			continue
		}
		scrapes := cs.reported[siteKey]
		if scrapes == nil {
			if len(cs.reported) >= maxReportingSites {
				return
			}
			scrapes = map[uint64]time.Time{}
			cs.reported[siteKey] = scrapes
		}
		at := now.Add(-c.Age)
		if old, known := scrapes[c.Key]; at.After(old) && (known || len(scrapes) < MaxConsumers) {
			scrapes[c.Key] = at
		}
	}
}

// LastScrapeAges returns the consumers of the last day that matter for a site, by key: at most
// MaxConsumers, the ones that scraped last.
func (cs *Consumers) LastScrapeAges(siteKey uint64, now time.Time) (all []ConsumerAge) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for key, at := range cs.lastScrapes(siteKey, now) {
		all = append(all, ConsumerAge{key, max(0, now.Sub(at))})
	}
	slices.SortFunc(all, func(a, b ConsumerAge) int { return cmp.Or(cmp.Compare(a.Age, b.Age), cmp.Compare(a.Key, b.Key)) })
	all = all[:min(len(all), MaxConsumers)]
	slices.SortFunc(all, func(a, b ConsumerAge) int { return cmp.Compare(a.Key, b.Key) })
	return all
}

// lastScrapes returns the newest scrape, of any server, of each consumer of the last day that
// matters for a site. cs.mu is held.
func (cs *Consumers) lastScrapes(siteKey uint64, now time.Time) map[uint64]time.Time {
	all := make(map[uint64]time.Time, len(cs.byKey))
	for key, at := range cs.reported[siteKey] {
		if now.Sub(at) < consumerIdle {
			all[key] = at
		}
	}
	for key, c := range cs.byKey {
		if at := c.lastScrape; now.Sub(at) < consumerIdle && at.After(all[key]) {
			all[key] = at
		}
	}
	return all
}

// SeqReadByAll returns up to which batch of a site every consumer that counts has read. A consumer
// that has not scraped for retention does not count, as long as another one has. A consumer that
// only the site's client reported has read nothing here. If there is no consumer, hasConsumers is
// false, and the result is MaxSeq because nothing waits for a consumer.
func (cs *Consumers) SeqReadByAll(siteKey uint64, now time.Time) (seq uint64, hasConsumers bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	scrapes := cs.lastScrapes(siteKey, now)
	byRecent, byAll := uint64(MaxSeq), uint64(MaxSeq)
	for key, at := range scrapes {
		cursor := uint64(0)
		if c := cs.byKey[key]; c != nil {
			cursor = c.cursors[siteKey]
		}
		byAll = min(byAll, cursor)
		if now.Sub(at) <= cs.retention {
			byRecent = min(byRecent, cursor)
		}
	}
	if byRecent == MaxSeq { // none is recent
		return byAll, len(scrapes) > 0
	}
	return byRecent, true
}

// LastSavedScrape returns the newest time of a scrape that is saved; zero if none is.
func (cs *Consumers) LastSavedScrape() (at time.Time) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.byKey {
		if c.savedScrape.After(at) {
			at = c.savedScrape
		}
	}
	return at
}

// SiteConsumerCursor is one consumer's cursor.
type SiteConsumerCursor struct {
	Key           uint64
	Name, Address string
	Seq           uint64
	LastScrape    time.Time // of its newest scrape
}

// Cursors returns the cursors of all consumers that matter for a site, by name and address. A
// consumer that only the site's client reported has its key for a name, no address, and has
// read nothing.
func (cs *Consumers) Cursors(siteKey uint64) []SiteConsumerCursor {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	var all []SiteConsumerCursor
	for _, c := range cs.byKey {
		all = append(all, SiteConsumerCursor{c.key, c.name, c.address, c.cursors[siteKey], c.lastScrape})
	}
	for key, at := range cs.reported[siteKey] {
		if cs.byKey[key] == nil {
			all = append(all, SiteConsumerCursor{Key: key, Name: fmt.Sprintf("%016x", key), LastScrape: at})
		}
	}
	slices.SortFunc(all, func(a, b SiteConsumerCursor) int {
		return strings.Compare(a.Name+"\x00"+a.Address, b.Name+"\x00"+b.Address)
	})
	return all
}

// ForEachUnconfirmedCount calls f with the number of unconfirmed scrapes in a row of each consumer;
// of consumers that differ only in what they ask for, with the highest.
func (cs *Consumers) ForEachUnconfirmedCount(f func(name, address string, scrapes int)) {
	highest := map[[2]string]int{}
	cs.mu.Lock()
	for _, c := range cs.byKey {
		id := [2]string{c.name, c.address}
		highest[id] = max(highest[id], c.unconfirmed)
	}
	cs.mu.Unlock()
	for id, scrapes := range highest {
		f(id[0], id[1], scrapes)
	}
}

// DropSiteCursors drops all that is known of the reading of a site, which left the store.
func (cs *Consumers) DropSiteCursors(siteKey uint64) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.byKey {
		if c.cursors[siteKey] > 0 {
			c.setCursor(siteKey, 0)
		}
		for _, r := range c.sessions {
			delete(r.confirmed, siteKey)
			delete(r.served, siteKey)
		}
	}
}

// DropIdle forgets consumers that have not scraped for a day.
func (cs *Consumers) DropIdle(now time.Time) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	maps.DeleteFunc(cs.byKey, func(_ uint64, c *consumer) bool {
		idle := now.Sub(c.lastScrape) > consumerIdle
		if idle {
			cs.knownChanged.Store(true)
		}
		return idle
	})
	for site, scrapes := range cs.reported {
		maps.DeleteFunc(scrapes, func(_ uint64, at time.Time) bool { return now.Sub(at) > consumerIdle })
		if len(scrapes) == 0 {
			delete(cs.reported, site)
		}
	}
}
