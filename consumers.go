package main

// Who scrapes, and what each has had: a cursor per consumer and cluster, which is
// the sequence number of the newest batch that is known to have arrived. Invariants:
// a cursor moves only when the connection that was served asks again, and never past
// what was served there; what is lost of their file costs a repetition, never a
// sample; consumers and connections are bounded. This file must not know of samples.

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"path/filepath"
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
	turn  chan struct{} // has room for one, who alone does I/O and touches log
	log   *Log          // of cursors; nil in memory-only mode
	state *StoreState   // has the consumers without their cursors
	Torn  int64         // bytes of an unfinished write that OpenConsumers cut
	stale atomic.Bool   // the consumers on disk are not those of byKey

	retention time.Duration

	mu    sync.Mutex // guards the rest; never held across I/O
	byKey map[uint64]*consumer
	told  map[uint64]map[uint64]time.Time // site → consumer → its newest scrape of any server, as the site tells
}

type consumer struct {
	key           uint64
	name, address string
	used, saved   time.Time
	cursors       map[uint64]uint64 // cluster → newest batch confirmed
	dirty         map[uint64]uint64 // of these, what is not yet on disk; 0 removes
	conns         []*Reading        // least recently used first
	limit         int               // samples in one scrape; 0 = as many as may be
	unconfirmed   int               // scrapes in a row that served unread samples and were repeated
	warned        time.Time         // of these scrapes; zero: not yet
	proxied       bool              // has scraped through a proxy
}

// Reading is the place of one connection of one consumer. Requests of a connection
// come one after the other, and so must the calls of its Reading.
type Reading struct {
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

// ValidConsumer reports a name that no consumer can have.
func ValidConsumer(name string) error {
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

// OpenConsumers reads the cursors in dir of the consumers in state; dir "" is memory-only
// mode. If the file is damaged, it returns an error and the consumers without any cursor: a
// record that was lost may have moved or removed each of them. If the file cannot be read,
// the result is nil.
func OpenConsumers(fsys FS, dir string, state *StoreState, retention time.Duration, now time.Time) (*Consumers, error) {
	cs := &Consumers{turn: make(chan struct{}, 1), byKey: map[uint64]*consumer{}, told: map[uint64]map[uint64]time.Time{}, state: state, retention: retention}
	for _, k := range state.Consumers {
		cs.know(k, now)
	}
	if dir == "" {
		return cs, nil
	}
	cs.stale.Store(true)
	path := filepath.Join(dir, ConsumersFile)
	cs.log = NewLog(fsys, path, []byte("consumers"))
	log, rec, err := OpenLog(fsys, path, func(kind byte, payload []byte) error { return cs.restore(kind, payload, now) })
	switch {
	case errors.Is(err, fs.ErrNotExist) && len(cs.byKey) > 0:
		return cs, fmt.Errorf("%s is missing: every consumer is served again all that is held", path)
	case errors.Is(err, fs.ErrNotExist):
		return cs, nil
	case err != nil:
		return nil, fmt.Errorf("reading the cursors of consumers: %w", err)
	case !rec.HeaderDamaged:
		cs.log = log
	}
	if rec.HeaderDamaged || rec.Damaged > 0 {
		for _, c := range cs.byKey {
			clear(c.cursors)
		}
		return cs, fmt.Errorf("%s was damaged: every consumer is served again all that is held%s", path, rec.KeptAs())
	}
	cs.Torn = rec.TornBytes
	return cs, rec.Err
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

// know returns the consumer, adding it if need be as if it had scraped now; nil if there are
// too many.
func (cs *Consumers) know(k KnownConsumer, now time.Time) *consumer {
	c := cs.byKey[k.Key]
	if c == nil && len(cs.byKey) < MaxConsumers {
		c = newConsumer(k.Key, k.Name, k.Address)
		c.used = now
		cs.byKey[k.Key] = c
	}
	return c
}

func (cs *Consumers) restore(kind byte, b []byte, now time.Time) error {
	if kind != recordCursors {
		return fmt.Errorf("unknown kind of record %d", kind)
	}
	if len(b) < 8 {
		return errRecordConsumer
	}
	key, b := binary.LittleEndian.Uint64(b), b[8:]
	used, n := binary.Varint(b)
	c := cs.know(KnownConsumer{Key: key}, now) // its name was lost if state does not have it
	if c == nil || n <= 0 {
		return errRecordConsumer
	}
	if c.used = time.Unix(used, 0); c.used.After(now) {
		c.used = now // the clock was wrong then
	}
	c.saved = c.used
	for b = b[n:]; len(b) > 0; b = b[n:] {
		if len(b) < 9 {
			return errRecordConsumer
		}
		cluster := binary.LittleEndian.Uint64(b)
		b = b[8:]
		var at uint64
		if at, n = binary.Uvarint(b); n <= 0 || at > MaxSeq/2 { // batches yet to come are beyond it
			return errRecordConsumer
		}
		if at == 0 {
			delete(c.cursors, cluster)
		} else {
			c.cursors[cluster] = at
		}
	}
	return nil
}

var errRecordConsumer = errors.New("malformed record of a consumer")

// Begin begins a scrape of a consumer, over conn, which has to be comparable and
// unlike that of any other connection ever. What was served there before has
// arrived, since who asks again has read the answer. repeated reports that what was
// served last to this consumer is not known to have arrived, and comes again; the
// scrape after that is half as long, in case it was the length that failed it. An answer
// that was written whole and in time halves only the first few in a row: more of them
// are not a matter of length.
func (cs *Consumers) Begin(key uint64, name, address string, conn any, now time.Time) (r *Reading, repeated bool, err error) {
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
	i := slices.IndexFunc(c.conns, func(r *Reading) bool { return r.conn == conn })
	if i < 0 {
		r = &Reading{Key: key, owner: cs, c: c, conn: conn, pos: make(map[uint64]Position, len(c.cursors))}
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

// At returns what the connection had of a cluster, which begins where the consumer's
// others had been when it came.
func (r *Reading) At(cluster uint64) Position {
	r.owner.mu.Lock()
	defer r.owner.mu.Unlock()
	return r.pos[cluster]
}

// Serve notes that n samples up to a place are being served.
func (r *Reading) Serve(cluster uint64, to Position, n int) {
	r.owner.mu.Lock()
	defer r.owner.mu.Unlock()
	r.sent[cluster] = to
	r.served += n
}

// Limit returns how many samples this scrape may have, max at most.
func (r *Reading) Limit(max int) int {
	r.owner.mu.Lock()
	defer r.owner.mu.Unlock()
	if l := r.c.limit; l > 0 && (max == 0 || l < max) {
		return l
	}
	r.c.limit = 0
	return max
}

// Took says how long it took to write the answer, and whether that failed: if it took
// more than it may, the next one is shorter.
func (r *Reading) Took(took, most time.Duration, err error) {
	r.owner.mu.Lock()
	defer r.owner.mu.Unlock()
	late := took > most && most > 0
	r.whole = !late && err == nil
	if late && r.served > 0 {
		r.slow = true
		r.c.lower(int(float64(r.served) * float64(most) / float64(took)))
	}
}

// Proxied notes that the scrape came through a proxy, and reports whether it is the
// consumer's first that did.
func (r *Reading) Proxied() (first bool) {
	r.owner.mu.Lock()
	defer r.owner.mu.Unlock()
	first = !r.c.proxied
	r.c.proxied = true
	return first
}

// Unconfirmed returns how many scrapes in a row served the consumer samples that it
// had not had, and were confirmed by nothing; warn reports that it is time for a warning.
func (r *Reading) Unconfirmed(now time.Time) (scrapes int, warn bool) {
	r.owner.mu.Lock()
	defer r.owner.mu.Unlock()
	if warn = r.c.unconfirmed >= unconfirmedFew && now.Sub(r.c.warned) >= unconfirmedWarn; warn {
		r.c.warned = now
	}
	return r.c.unconfirmed, warn
}

// lower has the limit be at most n, and no less than all may have. The owner's mu is
// held.
func (c *consumer) lower(n int) {
	if n = max(minConsumerLimit, n); c.limit == 0 || n < c.limit {
		c.limit = n
	}
}

// Tell takes in which consumers a site's client knows from other servers, or from this one
// before it lost its disk. They matter for that site alone.
func (cs *Consumers) Tell(site uint64, all []ConsumerAge, now time.Time) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range all {
		if c.Age >= consumerIdle {
			continue
		}
		told := cs.told[site]
		if told == nil && len(cs.told) >= maxTold {
			return
		}
		if told == nil {
			told = map[uint64]time.Time{}
			cs.told[site] = told
		}
		at := now.Add(-c.Age)
		if old, known := told[c.Key]; at.After(old) && (known || len(told) < MaxConsumers) {
			told[c.Key] = at
		}
	}
}

// Known returns the consumers of the last day that matter for a site, by key: at most
// MaxConsumers, the ones that scraped last.
func (cs *Consumers) Known(site uint64, now time.Time) (all []ConsumerAge) {
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
	for key, at := range cs.told[site] {
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

// Read returns up to which batch of a site every consumer that counts has read. A consumer
// that has not scraped for retention does not count, as long as another one has. A consumer
// that only the site has told of has read nothing here. If there is no consumer, known is
// false, and seq is above all batches because none of them is waited for.
func (cs *Consumers) Read(site uint64, now time.Time) (seq uint64, known bool) {
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

// Used returns the newest time of a scrape that is saved; zero if none is.
func (cs *Consumers) Used() (at time.Time) {
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
	for key, at := range cs.told[cluster] {
		if cs.byKey[key] == nil {
			all = append(all, ConsumerCursor{Key: key, Name: fmt.Sprintf("%016x", key), Used: at})
		}
	}
	slices.SortFunc(all, func(a, b ConsumerCursor) int {
		return strings.Compare(a.Name+"\x00"+a.Address, b.Name+"\x00"+b.Address)
	})
	return all
}

// Unconfirmed calls f with what Reading.Unconfirmed returns for each consumer; of those
// that differ only in what they ask for, with the highest.
func (cs *Consumers) Unconfirmed(f func(name, address string, scrapes int)) {
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
	for site, told := range cs.told {
		maps.DeleteFunc(told, func(_ uint64, at time.Time) bool { return now.Sub(at) > consumerIdle })
		if len(told) == 0 {
			delete(cs.told, site)
		}
	}
}

// SaveKnown writes the consumers to disk if they changed, so that a crash does not make this
// server forget one that it has served.
func (cs *Consumers) SaveKnown() error {
	if !cs.stale.Load() {
		return nil
	}
	return cs.Save()
}

// Save writes all changes to disk: first the consumers, if they changed, then the cursors in
// one write for all clusters.
func (cs *Consumers) Save() error {
	cs.turn <- struct{}{}
	defer func() { <-cs.turn }()
	stale := cs.stale.Swap(false) // before all is gathered
	if cs.log == nil {
		cs.frames() // forgets what it would be
		return nil
	}
	frames, whole, changed := cs.frames()
	if len(frames) == 0 && !stale && !cs.log.Broken() {
		return nil
	}
	var err error
	if stale {
		err = cs.state.Write(cs.known())
	}
	switch {
	case err != nil:
	case stale || cs.log.Broken() || cs.log.Size()+int64(len(frames)) > consumersSlack+4*int64(whole):
		all := cs.all()
		err = cs.log.Rewrite(func(w io.Writer) error {
			_, err := w.Write(all)
			return err
		})
	default:
		err = cs.log.Append(frames)
	}
	if err != nil {
		if stale {
			cs.stale.Store(true)
		}
		cs.mu.Lock() // to be written again; what has changed meanwhile is newer
		for _, old := range changed {
			if c := cs.byKey[old.key]; c != nil {
				for cluster, at := range old.dirty {
					if _, newer := c.dirty[cluster]; !newer {
						c.dirty[cluster] = at
					}
				}
			}
		}
		cs.mu.Unlock()
		return fmt.Errorf("keeping the cursors of consumers: %w", err)
	}
	return nil
}

// known returns the consumers.
func (cs *Consumers) known() (all []KnownConsumer) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		all = append(all, KnownConsumer{key, c.name, c.address})
	}
	return all
}

// frames returns records of what has changed, how many bytes all records would take,
// and what to restore if they cannot be written.
func (cs *Consumers) frames() (frames []byte, whole int, changed []consumer) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		whole += 100 + 12*len(c.cursors)
		if len(c.dirty) == 0 && c.used.Sub(c.saved) < consumerSave {
			continue
		}
		changed = append(changed, consumer{key: key, dirty: c.dirty})
		frames = c.note(frames, c.dirty)
		c.saved, c.dirty = c.used, map[uint64]uint64{}
	}
	return frames, whole, changed
}

// all returns records of all that is known.
func (cs *Consumers) all() (frames []byte) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		frames = c.note(frames, c.cursors)
	}
	return frames
}

func (c *consumer) note(frames []byte, cursors map[uint64]uint64) []byte {
	b := binary.LittleEndian.AppendUint64(nil, c.key)
	b = binary.AppendVarint(b, c.used.Unix())
	for _, cluster := range slices.Sorted(maps.Keys(cursors)) {
		b = binary.AppendUvarint(binary.LittleEndian.AppendUint64(b, cluster), cursors[cluster])
	}
	return AppendRecord(frames, recordCursors, b)
}
