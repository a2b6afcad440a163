package main

// Consumers holds the consumers of a store and their cursors. For each consumer and site, the
// cursor is the sequence number of the newest batch that the consumer has confirmed. Both the
// number of consumers and the number of consumers that clients report are bounded. Anyone who
// reaches /federate can invent consumers, so those that confirmed nothing make room for others. This
// file must not know of samples.

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

const (
	maxConsumerName   = 64             // maximum bytes of a consumer's name
	consumerIdle      = 24 * time.Hour // a consumer without a scrape for this long is forgotten
	maxReportingSites = 100_000        // maximum number of sites for which the consumers reported by clients are kept
)

var (
	// ErrConsumers means that no further consumer can be added, because MaxConsumers are known that
	// confirmed a scrape.
	ErrConsumers = errors.New("too many consumers")
	// ErrConsumerNotAllowed means that the operator did not name the consumer.
	ErrConsumerNotAllowed = errors.New("only the names that --consumer lists may scrape this server")
)

// Consumers holds the consumers and their cursors. It is safe for concurrent use.
type Consumers struct {
	lock      ioLock     // after recovery, only its holder does I/O and accesses log and state
	log       *Log       // file of the cursors; nil in memory-only mode
	state     *StoreMeta // file of the consumers without their cursors
	TornBytes int64      // bytes of an unfinished write at the end of the cursors file; OpenConsumers removed them, unless Damage says that it could not
	Damage    error      // damage that OpenConsumers found in the cursors file, or nil
	// listChanges counts the changes of the list of consumers, from 1 on, because the state file
	// must be written once after each start. listSaved is the number of these changes that the state
	// file has.
	listChanges, listSaved atomic.Uint64

	// allowed has the names of the only consumers that may scrape; empty: all may. It does not
	// change after recovery.
	allowed []string

	// retention is the time without a scrape after which SeqReadByAll ignores a consumer, as long
	// as another consumer has scraped within that time.
	retention time.Duration

	mu    sync.Mutex           // guards the fields below; never held across I/O
	byKey map[uint64]*consumer // consumers that have scraped this server
	// The map reported has, by site and consumer key, the time of the consumer's newest scrape of
	// any server, as far as the site's client has reported it.
	reported map[uint64]map[uint64]time.Time
}

// consumer is one consumer of this server. Consumers.mu guards its fields.
type consumer struct {
	key              uint64
	name, address    string
	lastScrape       time.Time
	savedScrape      time.Time          // value of lastScrape in the cursors file
	cursors          map[uint64]uint64  // site key → number of the newest confirmed batch
	unsaved          map[uint64]uint64  // changes of cursors that are not yet on disk, by site key; 0 means removed
	sessions         []*ConsumerSession // at most maxSessions; the least recently used is first
	scrapeLimit      int                // this consumer's own limit on the samples of one scrape; 0 means none
	largestConfirmed int                // most unread samples of a confirmed scrape that ended in time
	unconfirmed      int                // number of consecutive scrapes that served unread samples and were not confirmed
	lastWarning      time.Time          // last warning about unconfirmed scrapes, or zero
	lastProxyWarning time.Time          // last warning that a scrape came through a proxy, or zero
	confirmed        bool               // at least one scrape was confirmed, as far as the server remembers
}

// CheckConsumerName returns an error if name is empty, is longer than maxConsumerName bytes, is not
// valid UTF-8 or contains a NUL byte.
func CheckConsumerName(name string) error {
	if len(name) == 0 || len(name) > maxConsumerName || !utf8.ValidString(name) || strings.ContainsRune(name, 0) {
		return fmt.Errorf("a consumer name must have 1 to %d bytes of text in UTF-8 without NUL", maxConsumerName)
	}
	return nil
}

// KeepOnly makes names the only consumers that may scrape, and forgets the others. It returns the
// names of the forgotten consumers. A consumer whose name was lost with the state file stays until
// it is idle. KeepOnly must be called before the first scrape.
func (cs *Consumers) KeepOnly(names []string) (forgotten []string) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.allowed = names
	maps.DeleteFunc(cs.byKey, func(_ uint64, c *consumer) bool {
		drop := c.name != "" && !slices.Contains(names, c.name)
		if drop {
			forgotten = append(forgotten, c.name)
			cs.listChanges.Add(1)
		}
		return drop
	})
	slices.Sort(forgotten)
	return slices.Compact(forgotten)
}

// CheckMayScrape returns an error if name is invalid, or if the operator listed the consumers that
// may scrape and name is not among them.
func (cs *Consumers) CheckMayScrape(name string) error {
	if err := CheckConsumerName(name); err != nil {
		return err
	}
	if len(cs.allowed) > 0 && !slices.Contains(cs.allowed, name) {
		return ErrConsumerNotAllowed
	}
	return nil
}

// ConsumerKey returns the key of a consumer: a hash of its name, its IP address and its match[]
// selectors.
func ConsumerKey(name, address, match string) uint64 {
	h := sha256.Sum256([]byte(name + "\x00" + address + "\x00" + match))
	return binary.BigEndian.Uint64(h[:])
}

// SiteCursorsPastEnd reports that cursors of one site are higher than the number of the last batch
// in the site's log.
type SiteCursorsPastEnd struct {
	Site, Seq uint64   // site key; the highest of these cursors
	Names     []string // names of the consumers with these cursors
}

// LowerCursorsTo lowers the cursors that are higher than the number of the last batch in their site's
// log to that number, and removes the cursors of sites without a log. It returns the cursors before
// the change, by site. logEnds has the number of the last batch for each site key. A lowered cursor
// still counts every batch in the log as read. The next batch of the site must get a number above all
// cursors that there ever were.
func (cs *Consumers) LowerCursorsTo(logEnds map[uint64]uint64) []SiteCursorsPastEnd {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	past := map[uint64]SiteCursorsPastEnd{}
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		for site, seq := range c.cursors {
			if seq > logEnds[site] {
				p := past[site]
				past[site] = SiteCursorsPastEnd{site, max(p.Seq, seq), append(p.Names, c.name)}
				c.setCursor(site, logEnds[site])
			}
		}
	}
	return slices.SortedFunc(maps.Values(past), func(a, b SiteCursorsPastEnd) int { return cmp.Compare(a.Site, b.Site) })
}

// HighestCursor returns the highest cursor of all consumers and sites.
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

// setCursor sets the cursor of c for a site, and records the change as unsaved. If seq is 0, it
// removes the cursor. The caller holds Consumers.mu.
func (c *consumer) setCursor(siteKey, seq uint64) {
	if c.unsaved[siteKey] = seq; seq == 0 {
		delete(c.cursors, siteKey)
	} else {
		c.cursors[siteKey] = seq
	}
}

// findOrAddConsumer returns the consumer with k.Key. If it is not known, it is added with now as
// the time of its last scrape. The result is nil if MaxConsumers are known already. Recovery uses
// this function too, and treats a cursor record as damaged if the result for its consumer is nil.
// The caller holds cs.mu, or is the only user of cs.
func (cs *Consumers) findOrAddConsumer(k KnownConsumer, now time.Time) *consumer {
	c := cs.byKey[k.Key]
	if c == nil && len(cs.byKey) < MaxConsumers {
		c = &consumer{key: k.Key, name: k.Name, address: k.Address, lastScrape: now, cursors: map[uint64]uint64{}, unsaved: map[uint64]uint64{}}
		cs.byKey[k.Key] = c
	}
	return c
}

// forgetUnconfirmed forgets the consumer that has not scraped for the longest time among those that
// never confirmed a scrape. It does nothing if there is none. The caller holds cs.mu.
func (cs *Consumers) forgetUnconfirmed() {
	var longest *consumer
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		if c := cs.byKey[key]; !c.confirmed && (longest == nil || c.lastScrape.Before(longest.lastScrape)) {
			longest = c
		}
	}
	if longest != nil {
		delete(cs.byKey, longest.key)
		cs.listChanges.Add(1)
	}
}

// HasConfirmed reports whether the consumer with this key is known and has confirmed a scrape. After
// a restart, it has if the file of cursors has or had a cursor of it.
func (cs *Consumers) HasConfirmed(key uint64) bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c := cs.byKey[key]
	return c != nil && c.confirmed
}

// AddClientReportedConsumers records the consumers that the client of a site reports. The client
// knows them from answers of servers. A consumer may be unknown here, because it scraped only other
// servers, or because this server lost its disk. SeqReadByAll, LastScrapeAges and appendCursors include a
// reported consumer for this site only. Consumers whose last scrape is older than consumerIdle,
// consumers beyond MaxConsumers for a site, and sites beyond maxReportingSites are ignored.
func (cs *Consumers) AddClientReportedConsumers(siteKey uint64, consumers []ConsumerAge, now time.Time) {
	if len(consumers) == 0 {
		return
	}
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

// LastScrapeAges returns the consumers that scraped this server or that the site's client reported,
// if they have scraped within consumerIdle. Each has the time since its newest scrape. The result
// is sorted by key. If there are more than MaxConsumers, it returns the consumers with the newest
// scrapes.
func (cs *Consumers) LastScrapeAges(siteKey uint64, now time.Time) (all []ConsumerAge) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for key, at := range cs.lastScrapes(siteKey, now) {
		all = append(all, ConsumerAge{key, max(0, now.Sub(at))})
	}
	if len(all) > MaxConsumers {
		slices.SortFunc(all, func(a, b ConsumerAge) int { return cmp.Or(cmp.Compare(a.Age, b.Age), cmp.Compare(a.Key, b.Key)) })
		all = all[:MaxConsumers]
	}
	slices.SortFunc(all, func(a, b ConsumerAge) int { return cmp.Compare(a.Key, b.Key) })
	return all
}

// lastScrapes yields the key of each consumer and the time of its newest scrape of any server. The
// consumers are those that scraped this server and those that the site's client reported. Consumers
// without a scrape within consumerIdle are left out. The caller holds cs.mu.
func (cs *Consumers) lastScrapes(siteKey uint64, now time.Time) iter.Seq2[uint64, time.Time] {
	reported := cs.reported[siteKey]
	return func(yield func(uint64, time.Time) bool) {
		for key, c := range cs.byKey {
			at := c.lastScrape
			if elsewhere := reported[key]; elsewhere.After(at) {
				at = elsewhere
			}
			if now.Sub(at) < consumerIdle && !yield(key, at) {
				return
			}
		}
		for key, at := range reported {
			if cs.byKey[key] == nil && now.Sub(at) < consumerIdle && !yield(key, at) {
				return
			}
		}
	}
}

// SeqReadByAll returns the number of the newest batch of a site that every consumer has read. It
// ignores consumers that have not scraped within retention, unless no consumer has. A consumer that
// is known only because the site's client reported it has read nothing on this server. If there is
// no consumer, hasConsumers is false and seq is MaxSeq, because no batch has to wait for a
// consumer.
func (cs *Consumers) SeqReadByAll(siteKey uint64, now time.Time) (seq uint64, hasConsumers bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	byRecent, byAll := uint64(MaxSeq), uint64(MaxSeq)
	for key, at := range cs.lastScrapes(siteKey, now) {
		hasConsumers = true
		cursor := uint64(0)
		if c := cs.byKey[key]; c != nil {
			cursor = c.cursors[siteKey]
		}
		byAll = min(byAll, cursor)
		if now.Sub(at) <= cs.retention {
			byRecent = min(byRecent, cursor)
		}
	}
	if byRecent == MaxSeq { // no consumer has scraped within retention
		return byAll, hasConsumers
	}
	return byRecent, true
}

// LastSavedScrape returns the newest time of a scrape in the file of cursors, for any consumer. It
// returns the zero time if the file has none.
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

// SiteConsumerCursor is the cursor of one consumer for one site.
type SiteConsumerCursor struct {
	Key           uint64
	Name, Address string
	Seq           uint64
	LastScrape    time.Time
}

// listedConsumer is a consumer as it was when sortedConsumers was called, without a cursor.
type listedConsumer struct {
	SiteConsumerCursor
	consumer *consumer
}

// sortedConsumers returns the consumers of this server, sorted by name and address.
func (cs *Consumers) sortedConsumers() []listedConsumer {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	all := make([]listedConsumer, 0, len(cs.byKey))
	for _, c := range cs.byKey {
		all = append(all, listedConsumer{SiteConsumerCursor{c.key, c.name, c.address, 0, c.lastScrape}, c})
	}
	slices.SortFunc(all, func(a, b listedConsumer) int { return a.compareName(b.SiteConsumerCursor) })
	return all
}

func (c SiteConsumerCursor) compareName(other SiteConsumerCursor) int {
	return cmp.Or(strings.Compare(c.Name, other.Name), strings.Compare(c.Address, other.Address))
}

// appendCursors appends to cursors the cursors of consumers for one site, and of the consumers that
// only the site's client reported. Each of the latter has its key in hex as the name, no address, and
// the cursor 0. The appended cursors are sorted by name and address if consumers is.
func (cs *Consumers) appendCursors(cursors []SiteConsumerCursor, consumers []listedConsumer, siteKey uint64) []SiteConsumerCursor {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	first := len(cursors)
	for _, c := range consumers {
		c.Seq = c.consumer.cursors[siteKey]
		cursors = append(cursors, c.SiteConsumerCursor)
	}
	known := len(cursors)
	for key, at := range cs.reported[siteKey] {
		if cs.byKey[key] == nil {
			cursors = append(cursors, SiteConsumerCursor{Key: key, Name: fmt.Sprintf("%016x", key), LastScrape: at})
		}
	}
	if len(cursors) > known {
		slices.SortFunc(cursors[first:], SiteConsumerCursor.compareName)
	}
	return cursors
}

// Len returns the number of consumers that have scraped this server, of at most MaxConsumers.
// Consumers that differ only in their match[] selectors count each.
func (cs *Consumers) Len() int {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return len(cs.byKey)
}

// ConsumerSummary has the numbers of the consumers with one name and address. They may differ in
// their match[] selectors: then it has the newest scrape and the highest count.
type ConsumerSummary struct {
	Name, Address string
	LastScrape    time.Time
	Unconfirmed   int // consecutive scrapes that served unread samples and were not confirmed
}

// Summaries returns the consumers that have scraped this server, sorted by name and address.
func (cs *Consumers) Summaries() (all []ConsumerSummary) {
	consumers := cs.sortedConsumers()
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for i, c := range consumers {
		if i == 0 || c.compareName(consumers[i-1].SiteConsumerCursor) != 0 {
			all = append(all, ConsumerSummary{Name: c.Name, Address: c.Address})
		}
		last := &all[len(all)-1]
		last.Unconfirmed = max(last.Unconfirmed, c.consumer.unconfirmed)
		if c.LastScrape.After(last.LastScrape) {
			last.LastScrape = c.LastScrape
		}
	}
	return all
}

// DropSiteCursors removes all cursors and read positions of a site that leaves the store.
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

// DropIdle forgets the consumers that have not scraped for consumerIdle: consumers of this server
// as well as consumers that clients reported.
func (cs *Consumers) DropIdle(now time.Time) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	maps.DeleteFunc(cs.byKey, func(_ uint64, c *consumer) bool {
		idle := now.Sub(c.lastScrape) > consumerIdle
		if idle {
			cs.listChanges.Add(1)
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
