package main

// Consumers and their cursors. A cursor is, per consumer and site, the number of the newest
// batch that is known to have arrived. It moves only when the connection that was served asks
// again, and never past the samples that were served there. Consumers and connections are
// bounded. This file must not know of samples.

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

const (
	ConsumersFile = "consumers" + LogSuffix
	recordCursors = 2 // key, time of use, pairs of cluster and sequence number

	maxConsumerName  = 64 // bytes
	maxReadings      = 4  // of one consumer, whose place is remembered
	consumerIdle     = 24 * time.Hour
	consumerSave     = time.Hour // between notes of a use that moved nothing
	minConsumerLimit = 1000      // samples; where a limit that was halved ends
	unconfirmedFew   = 3         // scrapes in a row that may be an accident
	unconfirmedWarn  = time.Hour // between warnings of them
	consumersSlack   = 64 << 10  // bytes of garbage that are not worth a rewrite
	maxTold          = 100_000   // sites whose clients tell of consumers
)

// ErrConsumers: too many consumers are known to remember another.
var ErrConsumers = errors.New("too many consumers")

// Consumers holds the cursors. It is safe for concurrent use.
type Consumers struct {
	lock  chan struct{} // has room for one, who alone does I/O and touches log
	log   *Log          // of cursors; nil in memory-only mode
	state *StoreState   // has the consumers without their cursors
	Torn  int64         // bytes of an unfinished write that OpenConsumers cut
	stale atomic.Bool   // the consumers on disk are not those of byKey

	retention time.Duration

	mu       sync.Mutex // guards the rest; never held across I/O
	byKey    map[uint64]*consumer
	reported map[uint64]map[uint64]time.Time // site → consumer → its newest scrape of any server, as the site tells
}

type consumer struct {
	key           uint64
	name, address string
	used, saved   time.Time
	cursors       map[uint64]uint64 // cluster → newest batch confirmed
	dirty         map[uint64]uint64 // of these, what is not yet on disk; 0 removes
	conns         []*ScrapeSession  // least recently used first
	limit         int               // samples in one scrape; 0 = as many as may be
	unconfirmed   int               // scrapes in a row that served unread samples and were repeated
	warned        time.Time         // of these scrapes; zero: not yet
	proxied       bool              // has scraped through a proxy
}

// ScrapeSession is the place of one connection of one consumer. Requests of a connection
// come one after the other, and so must the calls of its Reading.
type ScrapeSession struct {
	Key    uint64 // names the consumer
	owner  *Consumers
	c      *consumer
	conn   any
	pos    map[uint64]Position // confirmed on this connection, or before it began
	sent   map[uint64]Position // served last
	served int                 // samples not had before in what was served last
	slow   bool                // that took longer than it may
	whole  bool                // that was written to its end, and was not slow
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

// PastCursor is a cursor that is past the end of its cluster's log.
type PastCursor struct {
	Cluster, Seq uint64
	Names        []string // of the consumers
}

// DropPast drops and returns the cursors that are past the end of their cluster's log, or
// whose cluster has no log. ends has the number of the last batch in each log. The
// consumers are served again all that such a log still holds.
func (cs *Consumers) DropPast(ends map[uint64]uint64) []PastCursor {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	past := map[uint64]*PastCursor{}
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		for cluster, at := range c.cursors {
			if at <= ends[cluster] {
				continue
			}
			p := past[cluster]
			if p == nil {
				p = &PastCursor{Cluster: cluster}
				past[cluster] = p
			}
			p.Seq, p.Names = max(p.Seq, at), append(p.Names, c.name)
			c.move(cluster, 0)
		}
	}
	var all []PastCursor
	for _, cluster := range slices.Sorted(maps.Keys(past)) {
		all = append(all, *past[cluster])
	}
	return all
}

// Highest returns the highest cursor of all.
func (cs *Consumers) Highest() (highest uint64) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.byKey {
		for _, at := range c.cursors {
			highest = max(highest, at)
		}
	}
	return highest
}

// move sets a cursor, or removes it if at is 0. cs.mu is held, or c is not shared yet.
func (c *consumer) move(cluster, at uint64) {
	if c.dirty[cluster] = at; at == 0 {
		delete(c.cursors, cluster)
	} else {
		c.cursors[cluster] = at
	}
}

func newConsumer(key uint64, name, address string) *consumer {
	return &consumer{key: key, name: name, address: address, cursors: map[uint64]uint64{}, dirty: map[uint64]uint64{}}
}

// BeginScrape begins a scrape of a consumer, over conn, which has to be comparable and
// unlike that of any other connection ever. What was served there before has
// arrived, since who asks again has read the answer. repeated reports that what was
// served last to this consumer is not known to have arrived, and comes again; the
// scrape after that is half as long, in case it was the length that failed it. An answer
// that was written whole and in time halves only the first few in a row: more of them
// are not a matter of length.
func (cs *Consumers) BeginScrape(key uint64, name, address string, conn any, now time.Time) (r *ScrapeSession, repeated bool, err error) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c := cs.byKey[key]
	if c == nil {
		if len(cs.byKey) >= MaxConsumers {
			return nil, false, fmt.Errorf("%w: %d are known; one is forgotten when it has not scraped for %v", ErrConsumers, MaxConsumers, consumerIdle)
		}
		c = cs.know(KnownConsumer{key, name, address}, now)
		cs.stale.Store(true)
	}
	c.used = now
	if c.name != name { // it was lost
		c.name, c.address = name, address
		cs.stale.Store(true)
	}
	i := slices.IndexFunc(c.conns, func(r *ScrapeSession) bool { return r.conn == conn })
	if i < 0 {
		r = &ScrapeSession{Key: key, owner: cs, c: c, conn: conn, pos: make(map[uint64]Position, len(c.cursors))}
		// Its own from here on: who else is served by this name must not move it.
		for cluster, at := range c.cursors {
			r.pos[cluster] = Position{Seq: at}
		}
		for _, other := range c.conns {
			if other.served > 0 {
				repeated = true
				if !other.whole || c.unconfirmed < unconfirmedFew {
					c.lower(other.served / 2)
				}
				other.served = 0 // halves once
			}
		}
		if repeated {
			c.unconfirmed++
		}
		if len(c.conns) == maxReadings {
			c.conns = slices.Delete(c.conns, 0, 1)
		}
	} else {
		r = c.conns[i]
		c.conns = slices.Delete(c.conns, i, i+1)
		if len(r.sent) > 0 {
			c.unconfirmed, c.warned = 0, time.Time{}
		}
		for cluster, at := range r.sent {
			r.pos[cluster] = at
			if at.Seq > c.cursors[cluster] {
				c.move(cluster, at.Seq)
			}
		}
		if r.served > 0 && !r.slow && c.limit > 0 && c.limit < math.MaxInt/2 {
			c.limit *= 2
		}
	}
	c.conns = append(c.conns, r)
	r.sent, r.served, r.slow, r.whole = map[uint64]Position{}, 0, false, false
	return r, repeated, nil
}

// Position returns what the connection had of a cluster, which begins where the consumer's
// others had been when it came.
func (s *ScrapeSession) Position(cluster uint64) Position {
	s.owner.mu.Lock()
	defer s.owner.mu.Unlock()
	return s.pos[cluster]
}

// MarkServed notes that n samples up to a place are being served.
func (s *ScrapeSession) MarkServed(cluster uint64, to Position, n int) {
	s.owner.mu.Lock()
	defer s.owner.mu.Unlock()
	s.sent[cluster] = to
	s.served += n
}

// Limit returns how many samples this scrape may have, max at most.
func (s *ScrapeSession) Limit(max int) int {
	s.owner.mu.Lock()
	defer s.owner.mu.Unlock()
	if l := s.c.limit; l > 0 && (max == 0 || l < max) {
		return l
	}
	s.c.limit = 0
	return max
}

// Finish says how long it took to write the answer, and whether that failed: if it took
// more than it may, the next one is shorter.
func (s *ScrapeSession) Finish(took, most time.Duration, err error) {
	s.owner.mu.Lock()
	defer s.owner.mu.Unlock()
	late := took > most && most > 0
	s.whole = !late && err == nil
	if late && s.served > 0 {
		s.slow = true
		s.c.lower(int(float64(s.served) * float64(most) / float64(took)))
	}
}

// MarkProxied notes that the scrape came through a proxy, and reports whether it is the
// consumer's first that did.
func (s *ScrapeSession) MarkProxied() (first bool) {
	s.owner.mu.Lock()
	defer s.owner.mu.Unlock()
	first = !s.c.proxied
	s.c.proxied = true
	return first
}

// UnconfirmedScrapes returns how many scrapes in a row served the consumer samples that it
// had not had, and were confirmed by nothing; warn reports that it is time for a warning.
func (s *ScrapeSession) UnconfirmedScrapes(now time.Time) (scrapes int, warn bool) {
	s.owner.mu.Lock()
	defer s.owner.mu.Unlock()
	if warn = s.c.unconfirmed >= unconfirmedFew && now.Sub(s.c.warned) >= unconfirmedWarn; warn {
		s.c.warned = now
	}
	return s.c.unconfirmed, warn
}

// lower has the limit be at most n, and no less than all may have. The owner's mu is
// held.
func (c *consumer) lower(n int) {
	if n = max(minConsumerLimit, n); c.limit == 0 || n < c.limit {
		c.limit = n
	}
}

// AddReported takes in which consumers a site's client knows from other servers, or from this one
// before it lost its disk. They matter for that site alone.
func (cs *Consumers) AddReported(site uint64, all []ConsumerAge, now time.Time) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range all {
		if c.Age >= consumerIdle {
			continue
		}
		told := cs.reported[site]
		if told == nil && len(cs.reported) >= maxTold {
			return
		}
		if told == nil {
			told = map[uint64]time.Time{}
			cs.reported[site] = told
		}
		at := now.Add(-c.Age)
		if old, known := told[c.Key]; at.After(old) && (known || len(told) < MaxConsumers) {
			told[c.Key] = at
		}
	}
}

// ConsumerAges returns the consumers of the last day that matter for a site, by key: at most
// MaxConsumers, the ones that scraped last.
func (cs *Consumers) ConsumerAges(site uint64, now time.Time) (all []ConsumerAge) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for key, at := range cs.scrapes(site, now) {
		all = append(all, ConsumerAge{key, max(0, now.Sub(at))})
	}
	slices.SortFunc(all, func(a, b ConsumerAge) int { return cmp.Or(cmp.Compare(a.Age, b.Age), cmp.Compare(a.Key, b.Key)) })
	all = all[:min(len(all), MaxConsumers)]
	slices.SortFunc(all, func(a, b ConsumerAge) int { return cmp.Compare(a.Key, b.Key) })
	return all
}

// scrapes returns the newest scrape, of any server, of each consumer of the last day that
// matters for a site. cs.mu is held.
func (cs *Consumers) scrapes(site uint64, now time.Time) map[uint64]time.Time {
	all := make(map[uint64]time.Time, len(cs.byKey))
	for key, at := range cs.reported[site] {
		if now.Sub(at) < consumerIdle {
			all[key] = at
		}
	}
	for key, c := range cs.byKey {
		if at := c.used; now.Sub(at) < consumerIdle && at.After(all[key]) {
			all[key] = at
		}
	}
	return all
}

// ReadBy returns up to which batch of a site every consumer that counts has read. A consumer
// that has not scraped for retention does not count, as long as another one has. A consumer
// that only the site has told of has read nothing here. If there is no consumer, known is
// false, and seq is above all batches because none of them is waited for.
func (cs *Consumers) ReadBy(site uint64, now time.Time) (seq uint64, known bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	all := cs.scrapes(site, now)
	recent, least := uint64(MaxSeq), uint64(MaxSeq)
	for key, at := range all {
		seq := uint64(0)
		if c := cs.byKey[key]; c != nil {
			seq = c.cursors[site]
		}
		least = min(least, seq)
		if now.Sub(at) <= cs.retention {
			recent = min(recent, seq)
		}
	}
	if recent == MaxSeq { // none is recent
		recent = least
	}
	return recent, len(all) > 0
}

// LastScrape returns the newest time of a scrape that is saved; zero if none is.
func (cs *Consumers) LastScrape() (at time.Time) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.byKey {
		if c.saved.After(at) {
			at = c.saved
		}
	}
	return at
}

// ConsumerCursor is one consumer's cursor.
type ConsumerCursor struct {
	Key           uint64
	Name, Address string
	Seq           uint64
	Used          time.Time // of its newest scrape
}

// Cursors returns the cursors of all consumers that matter for a cluster, by name and
// address. A consumer that only the site has told of has its key for a name, no address, and
// has read nothing.
func (cs *Consumers) Cursors(cluster uint64) []ConsumerCursor {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	var all []ConsumerCursor
	for _, c := range cs.byKey {
		all = append(all, ConsumerCursor{c.key, c.name, c.address, c.cursors[cluster], c.used})
	}
	for key, at := range cs.reported[cluster] {
		if cs.byKey[key] == nil {
			all = append(all, ConsumerCursor{Key: key, Name: fmt.Sprintf("%016x", key), Used: at})
		}
	}
	slices.SortFunc(all, func(a, b ConsumerCursor) int {
		return strings.Compare(a.Name+"\x00"+a.Address, b.Name+"\x00"+b.Address)
	})
	return all
}

// ForEachUnconfirmed calls f with what Reading.Unconfirmed returns for each consumer; of those
// that differ only in what they ask for, with the highest.
func (cs *Consumers) ForEachUnconfirmed(f func(name, address string, scrapes int)) {
	highest := map[[2]string]int{}
	cs.mu.Lock()
	for _, c := range cs.byKey {
		who := [2]string{c.name, c.address}
		highest[who] = max(highest[who], c.unconfirmed)
	}
	cs.mu.Unlock()
	for who, scrapes := range highest {
		f(who[0], who[1], scrapes)
	}
}

// Forget drops the cursors of a cluster that is held no more.
func (cs *Consumers) Forget(cluster uint64) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.byKey {
		if c.cursors[cluster] > 0 {
			c.move(cluster, 0)
		}
		for _, r := range c.conns {
			delete(r.pos, cluster)
			delete(r.sent, cluster)
		}
	}
}

// Expire forgets consumers that have not scraped for a day.
func (cs *Consumers) Expire(now time.Time) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	maps.DeleteFunc(cs.byKey, func(_ uint64, c *consumer) bool {
		idle := now.Sub(c.used) > consumerIdle
		if idle {
			cs.stale.Store(true)
		}
		return idle
	})
	for site, told := range cs.reported {
		maps.DeleteFunc(told, func(_ uint64, at time.Time) bool { return now.Sub(at) > consumerIdle })
		if len(told) == 0 {
			delete(cs.reported, site)
		}
	}
}
