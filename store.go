package main

// The sites of a server and their samples, in memory as on disk. Append returns nil only when
// its samples are durable. Accepted samples leave by retention or by the sample limit alone.
// Damage or flood of one site never touches another. This family must not know of tokens, HTTP
// or own metrics: it returns counts and errors.

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// MaxRetention keeps time differences within a batch in 31 bits of ms.
	MaxRetention = 20 * 24 * time.Hour
	// forgetAfter is how long a silent cluster with nothing held is still known,
	// so that an alert on its push time goes on.
	forgetAfter = 30 * 24 * time.Hour

	maintainEvery = 30 * time.Second
	saveEvery     = 2 * time.Second // cursors; a scrape on disk costs less than a second of pushes
	kickPause     = time.Second
	roomPause     = time.Second
)

// StoreConfig configures a Store. Limits of 0 do not bound.
type StoreConfig struct {
	FS            FS
	Dir           string // "" holds in memory only
	Retention     time.Duration
	MaxSampleAge  time.Duration // older samples are shown no more, and so may be evicted
	LimitSeries   int           // held per cluster
	LimitClusters int           // known at all
	LimitSamples  int           // held in all
	LimitStorage  int64         // bytes of all logs
	Now           func() time.Time
	// Owned reports whether this server owns a site; nil: it owns all. Samples of another
	// server's site that expire unread are not counted as lost if their client has a spool.
	Owned func(hash uint64) bool
	// Span returns what the present time may be; samples expire by it. nil: Now.
	Span func() Span
	// OnError is told what failed in the background, or was found damaged at
	// opening. OnWarning, if not nil, is told of unfinished writes, as a crash leaves
	// them. They are called without locks held.
	OnError, OnWarning func(error)
}

// Store holds samples. It is safe for concurrent use.
type Store struct {
	cfg    StoreConfig
	seed   maphash.Seed
	unlock func() error
	kick   chan struct{} // asks Run to make room now

	totals           StoreTotals
	damaged, evicted atomic.Int64 // logs; samples
	torn             atomic.Int64 // bytes

	room sync.Mutex // its holder makes room; guards full
	full time.Time  // when there was last too little that could go

	closing chan struct{} // closed by Close

	// Consumers are those that scrape what is held.
	Consumers *Consumers

	mu    sync.RWMutex // guards the rest, and the closing of closing
	sites map[string]*Site
}

func (s *Store) newSite(id string) *Site {
	held := NewSiteData(id, s.seed)
	// Above all that was, so that no cursor from before this cluster was last
	// forgotten is past what is yet to come.
	held.Begin(s.totals.Newest.Load())
	return NewSite(held, s.newLog(id), &s.totals)
}

// newLog returns the log of a cluster, not yet on disk; nil in memory-only mode.
func (s *Store) newLog(id string) *Log {
	if s.cfg.Dir == "" {
		return nil
	}
	return NewLog(s.cfg.FS, s.path(id), []byte(id))
}

func (s *Store) path(id string) string {
	h := ClusterIDHash(id)
	name := hex.EncodeToString(h[:16])
	return filepath.Join(s.cfg.Dir, name[:2], name+LogSuffix)
}

// OnDisk reports whether what is held outlives this process.
func (s *Store) OnDisk() bool { return s.cfg.Dir != "" }

// Oldest returns before what time, in ms, samples are not held.
func (s *Store) Oldest() int64 { return s.cfg.Span().Early.Add(-s.cfg.Retention).UnixMilli() }

// OldestServed returns before what time, in ms, samples are not served. A consumer may
// fail a whole scrape for one sample that is older than retention. OldestServed is later
// than Oldest only while the clock is in doubt.
func (s *Store) OldestServed() int64 { return s.cfg.Span().Late.Add(-s.cfg.Retention).UnixMilli() }

// OpenStore opens or creates the store in cfg.Dir, locks it against other
// processes and recovers every log. A log without any usable record is set aside and
// reported. A file that cannot be read, or cannot be set aside, is an error, because the
// next push of its cluster would replace it.
func OpenStore(cfg StoreConfig) (*Store, error) {
	s := &Store{
		cfg: cfg, seed: maphash.MakeSeed(), sites: map[string]*Site{},
		kick: make(chan struct{}, 1), closing: make(chan struct{}), unlock: func() error { return nil },
	}
	s.totals.LimitStorage, s.totals.Closing = cfg.LimitStorage, s.closing
	s.totals.Read = func(hash uint64) uint64 {
		seq, _ := s.Consumers.ReadBy(hash, s.cfg.Span().Early)
		return seq
	}
	s.totals.Full = func() {
		select {
		case s.kick <- struct{}{}:
		default:
		}
	}
	if s.totals.Owned = cfg.Owned; cfg.Owned == nil {
		s.totals.Owned = func(uint64) bool { return true }
	}
	if cfg.Span == nil {
		s.cfg.Span = func() Span { return SpanAt(cfg.Now()) }
	}
	if cfg.OnWarning == nil {
		s.cfg.OnWarning = func(error) {}
	}
	if cfg.Retention <= 0 || cfg.Retention > MaxRetention {
		return nil, fmt.Errorf("retention %v is not above 0 and at most %v", cfg.Retention, MaxRetention)
	}
	if _, real := cfg.FS.(DiskFS); real && cfg.Dir != "" {
		unlock, err := LockDir(cfg.Dir)
		if err != nil {
			return nil, err
		}
		s.unlock = unlock
	}
	if err := s.recover(); err != nil {
		return nil, errors.Join(fmt.Errorf("reading storage directory: %w", err), s.unlock())
	}
	return s, nil
}

func (s *Store) closed() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// acquire returns the cluster of id with its turn, which release gives back.
func (s *Store) acquire(ctx context.Context, id string) (*Site, error) {
	for displaced := false; ; {
		s.mu.Lock()
		c, closed := s.sites[id], s.closed()
		if c == nil && !closed && (s.cfg.LimitClusters == 0 || len(s.sites) < s.cfg.LimitClusters) {
			c = s.newSite(id)
			s.sites[id] = c
		}
		s.mu.Unlock()
		if closed {
			return nil, ErrClosed
		}
		if c == nil && !displaced {
			displaced = true
			if err := s.displace(); err != nil {
				return nil, err
			}
			continue
		}
		if c == nil {
			return nil, fmt.Errorf("%w: %d clusters are known, which is the limit", ErrFull, s.cfg.LimitClusters)
		}
		if err := c.Lock(ctx); err != nil {
			return nil, err
		}
		if !c.Removed {
			return c, nil
		}
		c.Unlock()
	}
}

// release gives the turn back, and forgets a cluster of which nothing was ever
// accepted: a first push that fails leaves nothing behind.
func (s *Store) release(c *Site) {
	virgin := false
	c.View(func(held *SiteData) { virgin = held.Virgin() })
	if virgin {
		s.forget(c)
	}
	c.Unlock()
}

// displace forgets the cluster that has been silent longest, of those without samples.
// Such a cluster is known only for the alert on its silence.
func (s *Store) displace() error {
	var silent *Site
	least := int64(math.MaxInt64)
	for _, c := range s.sorted() {
		c.View(func(held *SiteData) {
			if len(held.Batches) == 0 && !held.Virgin() && held.Accepted < least {
				silent, least = c, held.Accepted
			}
		})
	}
	if silent == nil || !silent.TryLock() {
		return nil
	}
	defer silent.Unlock()
	empty := false
	silent.View(func(held *SiteData) { empty = len(held.Batches) == 0 })
	if silent.Removed || !empty {
		return nil
	}
	return s.remove(silent)
}

// remove forgets a cluster without samples, and removes its log. Its cursors are removed
// first, because after a crash in between a cursor without a log is reported as a loss.
func (s *Store) remove(c *Site) error {
	s.Consumers.Forget(c.Hash)
	if err := s.Consumers.Save(); err != nil {
		return err
	}
	if err := c.Remove(); err != nil {
		return fmt.Errorf("removing the log of cluster %q: %w", c.ID, err)
	}
	s.forget(c)
	return nil
}

// forget drops a cluster of which nothing is held.
func (s *Store) forget(c *Site) {
	c.Forgotten()
	s.mu.Lock()
	delete(s.sites, c.ID)
	s.mu.Unlock()
	s.Consumers.Forget(c.Hash)
}

// Append holds the samples of p for cluster id. When it returns nil, what it
// counts as accepted is on disk; when not, nothing was taken. Lines have to be
// those of Push.Add and carry id's ClusterLabel; names are of the scrapes in p. If all of
// them are known already, nothing is stored. Waiting for an earlier push of
// the cluster ends with ctx. Errors: ErrSeriesLimit, ErrTooLarge, ErrFull,
// ErrClock, ErrClosed, ctx's, or those of the disk.
func (s *Store) Append(ctx context.Context, id string, p *SampleList, names ScrapeNames) (AppendResult, error) {
	c, err := s.acquire(ctx, id)
	if err != nil {
		return AppendResult{}, err
	}
	defer s.release(c)
	return c.Append(p, names, s.cfg.Span(), s.cfg.Retention, s.cfg.LimitSeries, func(n int) error { return s.makeRoom(c, n) })
}

// SpoolStatus is what a server says of one spool of a site.
type SpoolStatus struct {
	Held, Read Ranges // of scrapes: not read by every consumer, and read by every consumer
	Consumers  []ConsumerAge
	// Settled reports that a consumer is known, without which nothing counts as read.
	Settled bool
}

// Spool returns what is known of a spool of cluster id.
func (s *Store) Spool(id string, spool uint64) (st SpoolStatus) {
	hash, now := SiteKey(id), s.cfg.Span().Early
	st.Consumers = s.Consumers.ConsumerAges(hash, now)
	seq, known := s.Consumers.ReadBy(hash, now)
	st.Settled = known
	s.ViewSite(id, func(held *SiteData) {
		if known {
			held.Spools.MarkRead(seq)
		}
		st.Held, st.Read = held.Spools.HeldAndRead(spool)
	})
	return st
}

// Run drops what outlived retention, compacts logs and keeps cursors, until ctx ends.
func (s *Store) Run(ctx context.Context) error {
	var saving sync.WaitGroup
	defer saving.Wait()
	// Beside the rest, which may take long. A cursor that a crash takes costs a
	// repetition.
	saving.Go(func() { s.every(ctx, saveEvery, nil, func(bool) { s.saveConsumers() }) })
	s.every(ctx, maintainEvery, s.kick, func(full bool) {
		s.maintain(ctx, full)
		s.Consumers.Expire(s.cfg.Span().Early)
	})
	return nil
}

// every calls do at intervals, and when kicked, until ctx ends.
func (s *Store) every(ctx context.Context, interval time.Duration, kick <-chan struct{}, do func(kicked bool)) {
	for {
		if _, ok := Sleep(ctx, kickPause, nil); !ok { // refused pushes kick as often as they come
			return
		}
		kicked, ok := Sleep(ctx, interval-kickPause, kick)
		if !ok {
			return
		}
		do(kicked)
	}
}

// SaveConsumers writes the consumers to disk if they changed. It returns when that is done
// or has failed.
func (s *Store) SaveConsumers() {
	if err := s.Consumers.SaveKnown(); err != nil {
		s.cfg.OnError(err)
	}
}

func (s *Store) saveConsumers() {
	if err := s.Consumers.Save(); err != nil {
		s.cfg.OnError(err)
	}
}

// maintainCluster drops what outlived retention, compacts the log, and forgets a
// cluster silent for long.
func (s *Store) maintainCluster(c *Site, full bool) error {
	oldest := s.Oldest()
	c.Expire(oldest)
	forget := false
	c.View(func(held *SiteData) {
		forget = len(held.Batches) == 0 && s.cfg.Span().Early.UnixMilli()-held.Accepted > forgetAfter.Milliseconds()
	})
	if forget {
		return s.remove(c)
	}
	return c.Compact(oldest, full)
}

// maintain goes once over all clusters.
func (s *Store) maintain(ctx context.Context, full bool) {
	for _, c := range s.sorted() {
		if c.Lock(ctx) != nil {
			return
		}
		if !c.Removed {
			if err := s.maintainCluster(c, full); err != nil {
				s.cfg.OnError(fmt.Errorf("compacting the log of cluster %q: %w", c.ID, err))
			}
		}
		c.Unlock()
	}
}

// sorted returns the clusters by ID.
func (s *Store) sorted() []*Site {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.SortedFunc(maps.Values(s.sites), func(a, b *Site) int { return cmp.Compare(a.ID, b.ID) })
}

// ForEachSite calls f for what is held of each cluster by ID, from that on which stands at
// start, 0 to 1, of all and round, until f returns false. It expires samples before it
// calls f. f must neither keep held nor call the store.
func (s *Store) ForEachSite(start float64, f func(hash uint64, held *SiteData) bool) {
	sites, oldest := s.sorted(), s.Oldest()
	for i := range sites {
		c := sites[(int(start*float64(len(sites)))+i)%len(sites)]
		c.Expire(oldest)
		goOn := true
		c.View(func(held *SiteData) { goOn = f(c.Hash, held) })
		if !goOn {
			return
		}
	}
}

// ViewSite calls f with what is held of a cluster, as Each does; it reports false if
// nothing is known of it.
func (s *Store) ViewSite(id string, f func(held *SiteData)) bool {
	s.mu.RLock()
	c := s.sites[id]
	s.mu.RUnlock()
	if c != nil {
		c.View(f)
	}
	return c != nil
}

// Close waits for writes under way, refuses later and waiting ones and unlocks
// the directory. Everything accepted is on disk already. Again it does nothing.
func (s *Store) Close() error {
	s.mu.Lock()
	select {
	case <-s.closing:
		s.mu.Unlock()
		return nil
	default:
	}
	close(s.closing)
	s.mu.Unlock()
	for _, c := range s.sorted() {
		c.LockForever() // nobody writes any more
	}
	s.saveConsumers()
	return s.unlock()
}
