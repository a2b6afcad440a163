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
	// forgetAfter is how long a silent site without samples is still known, so that an alert
	// on its push time goes on.
	forgetAfter = 30 * 24 * time.Hour

	maintainEvery = 30 * time.Second
	saveEvery     = 2 * time.Second // cursors; a scrape on disk costs less than a second of pushes
	wakePause     = time.Second
	roomPause     = time.Second // between searches that found too little to evict
)

// StoreConfig configures a Store. Limits of 0 do not bound.
type StoreConfig struct {
	FS           FS
	Dir          string // "" holds in memory only
	Retention    time.Duration
	MaxSampleAge time.Duration // older samples are not shown again, and so may be evicted
	LimitSeries  int           // held of each site
	LimitSites   int           // sites known
	LimitSamples int           // held in all
	LimitStorage int64         // bytes of all logs
	Now          func() time.Time
	// Owned reports whether this server owns a site; nil: it owns all. Samples of another
	// server's site that expire unread are not counted as lost if their client has a spool.
	Owned func(hash uint64) bool
	// NowInterval returns what the present time may be; samples expire by it. nil: Now.
	NowInterval func() PresentTimeRange
	// OnError gets what failed in the background, or was found damaged at opening. OnWarning,
	// if not nil, gets unfinished writes, as a crash leaves them. They are called without
	// locks held.
	OnError, OnWarning func(error)
}

// Store holds samples. It is safe for concurrent use.
type Store struct {
	cfg        StoreConfig
	seed       maphash.Seed
	unlock     func() error  // the directory
	compactNow chan struct{} // wakes Run: the logs met LimitStorage

	totals           StoreTotals
	damaged, evicted atomic.Int64 // logs; samples
	torn             atomic.Int64 // bytes

	roomMu   sync.Mutex // its holder makes room; guards noRoomAt
	noRoomAt time.Time  // when eviction last freed too little

	closing chan struct{} // closed by Close

	// Consumers are those that scrape the store.
	Consumers *Consumers

	mu    sync.RWMutex // guards the rest, and the closing of closing
	sites map[string]*Site
}

// OpenStore opens or creates the store in cfg.Dir, locks it against other processes and
// recovers every log. A log without any usable record is set aside and reported. A file that
// cannot be read, or cannot be set aside, is an error, because the next push of its site would
// replace it.
func OpenStore(cfg StoreConfig) (*Store, error) {
	if cfg.Retention <= 0 || cfg.Retention > MaxRetention {
		return nil, fmt.Errorf("retention %v is not above 0 and at most %v", cfg.Retention, MaxRetention)
	}
	if cfg.NowInterval == nil {
		cfg.NowInterval = func() PresentTimeRange { return ExactTimeRange(cfg.Now()) }
	}
	if cfg.OnWarning == nil {
		cfg.OnWarning = func(error) {}
	}
	s := &Store{
		cfg: cfg, seed: maphash.MakeSeed(), sites: map[string]*Site{}, unlock: func() error { return nil },
		compactNow: make(chan struct{}, 1), closing: make(chan struct{}),
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

// newSite returns a site without samples. Its first batch has a number above all numbers used
// so far: no cursor from before the site was last forgotten is past it.
func (s *Store) newSite(clusterID string) *Site {
	data := NewSiteSamples(clusterID, s.seed)
	data.StartSeqAfter(s.totals.NewestSeq.Load())
	return NewSite(data, s.newLog(clusterID), s)
}

// newLog returns the log of a site, not yet on disk; nil in memory-only mode.
func (s *Store) newLog(clusterID string) *Log {
	if s.cfg.Dir == "" {
		return nil
	}
	return NewLog(s.cfg.FS, s.logPathOf(clusterID), []byte(clusterID))
}

// logPathOf returns where the log of a site lies.
func (s *Store) logPathOf(clusterID string) string {
	h := ClusterIDHash(clusterID)
	name := hex.EncodeToString(h[:16])
	return filepath.Join(s.cfg.Dir, name[:2], name+LogSuffix)
}

// IsOnDisk reports whether the samples outlive this process.
func (s *Store) IsOnDisk() bool { return s.cfg.Dir != "" }

// owns reports whether this server owns a site.
func (s *Store) owns(siteKey uint64) bool { return s.cfg.Owned == nil || s.cfg.Owned(siteKey) }

// checkStorageLimit returns ErrFull if the logs cannot grow by growth bytes. It then has Run
// compact them.
func (s *Store) checkStorageLimit(growth int) error {
	limit := s.cfg.LimitStorage
	if limit == 0 || s.totals.LogBytes.Load()+int64(growth) <= limit {
		return nil
	}
	select {
	case s.compactNow <- struct{}{}:
	default: // Run is to wake already
	}
	return fmt.Errorf("%w: the logs reached the storage limit of %d bytes", ErrFull, limit)
}

func (s *Store) isClosing() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// acquireSite returns the site of clusterID with its lock, which releaseAndDropIfNew releases. It
// adds the site if need be. The error is ErrClosed, ErrFull, that of ctx, or that of removing
// another site's log.
func (s *Store) acquireSite(ctx context.Context, clusterID string) (*Site, error) {
	for {
		site, err := s.findOrAddSite(clusterID)
		if errors.Is(err, ErrFull) {
			if err := s.forgetSilentSite(); err != nil {
				return nil, err
			}
			site, err = s.findOrAddSite(clusterID)
		}
		if err != nil {
			return nil, err
		}
		if err := site.Lock(ctx); err != nil {
			return nil, err
		}
		if !site.removed {
			return site, nil
		}
		site.Unlock()
	}
}

// findOrAddSite returns the site of clusterID, which is new if none is known and LimitSites allows
// one. The error is ErrClosed or ErrFull.
func (s *Store) findOrAddSite(clusterID string) (*Site, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosing() {
		return nil, ErrClosed
	}
	site := s.sites[clusterID]
	if site != nil {
		return site, nil
	}
	if s.cfg.LimitSites > 0 && len(s.sites) >= s.cfg.LimitSites {
		return nil, fmt.Errorf("%w: %d sites are known, which is the limit", ErrFull, s.cfg.LimitSites)
	}
	site = s.newSite(clusterID)
	s.sites[clusterID] = site
	return site, nil
}

// releaseAndDropIfNew releases the lock of a site. It drops a site that never had a batch, so that a
// first push that fails leaves nothing behind.
func (s *Store) releaseAndDropIfNew(site *Site) {
	isNew := false
	site.View(func(data *SiteSamples) { isNew = data.IsNew() })
	if isNew {
		s.dropEmptySite(site)
	}
	site.Unlock()
}

// forgetSilentSite removes the site that has been silent longest, of those without samples.
// Such a site is known only for the alert on its silence. If it is in use, or there is none,
// nothing happens.
func (s *Store) forgetSilentSite() error {
	var silent *Site
	least := int64(math.MaxInt64)
	for _, site := range s.sitesByID() {
		site.View(func(data *SiteSamples) {
			if len(data.Batches) == 0 && !data.IsNew() && data.LastPush < least {
				silent, least = site, data.LastPush
			}
		})
	}
	if silent == nil || !silent.TryLock() {
		return nil
	}
	defer silent.Unlock()
	empty := false
	silent.View(func(data *SiteSamples) { empty = len(data.Batches) == 0 })
	if silent.removed || !empty {
		return nil
	}
	return s.removeSiteAndLog(silent)
}

// removeSiteAndLog removes a site without samples, and its log. Its cursors are removed first,
// because after a crash in between a cursor without a log is reported as a loss. The caller
// holds the site's lock.
func (s *Store) removeSiteAndLog(site *Site) error {
	s.Consumers.DropSiteCursors(site.Key)
	if err := s.Consumers.Save(); err != nil {
		return err
	}
	if err := site.RemoveLog(); err != nil {
		return fmt.Errorf("removing the log of site %q: %w", site.ID, err)
	}
	s.dropEmptySite(site)
	return nil
}

// dropEmptySite drops a site without samples from memory. The caller holds its lock.
func (s *Store) dropEmptySite(site *Site) {
	site.markRemoved()
	s.mu.Lock()
	delete(s.sites, site.ID)
	s.mu.Unlock()
	s.Consumers.DropSiteCursors(site.Key)
}

// Append holds the samples of p for the site of clusterID. When it returns nil, what it counts as
// accepted is on disk; when not, nothing was accepted. Lines have to be those of SampleList.Add and
// carry clusterID's ClusterLabel; names are of the scrapes in p. If all of them are held already,
// nothing is stored. Waiting for an earlier push of the site ends with ctx. Errors: ErrSeriesLimit,
// ErrTooLarge, ErrFull, ErrClockInDoubt, ErrClosed, ctx's, or those of the disk.
func (s *Store) Append(ctx context.Context, clusterID string, p *SampleList, names ScrapeNames) (AppendResult, error) {
	site, err := s.acquireSite(ctx, clusterID)
	if err != nil {
		return AppendResult{}, err
	}
	defer s.releaseAndDropIfNew(site)
	limits := AppendLimits{Now: s.cfg.NowInterval(), Retention: s.cfg.Retention, Series: s.cfg.LimitSeries}
	staged, err := site.StageNewSamples(p, names, limits)
	if err != nil || staged.Batch == nil {
		return staged.Result, err
	}
	begin := time.Now()
	if err = s.makeRoom(site, staged.Result.Accepted); err == nil {
		err = site.Commit(staged, limits.timeBounds().keptSince)
	}
	if err != nil {
		site.Rollback(staged)
		return AppendResult{}, err
	}
	staged.Result.WriteTime = time.Since(begin)
	return staged.Result, nil
}

// SpoolStatus is what a server says of one spool of a site.
type SpoolStatus struct {
	Held, Read   Ranges // of scrapes: not read by every consumer, and read by every consumer
	Consumers    []ConsumerAge
	HasConsumers bool // a consumer is known; otherwise nothing counts as read
}

// RefreshSpoolStatus returns the status of a spool of the site of clusterID. It first marks the
// scrapes that every consumer has read by now.
func (s *Store) RefreshSpoolStatus(clusterID string, spoolID uint64) (st SpoolStatus) {
	hash, now := SiteKey(clusterID), s.cfg.NowInterval().Earliest
	st.Consumers = s.Consumers.LastScrapeAges(hash, now)
	seq, known := s.Consumers.SeqReadByAll(hash, now)
	st.HasConsumers = known
	s.ViewSite(clusterID, func(data *SiteSamples) {
		if known {
			data.Spools.MarkReadUpTo(seq)
		}
		st.Held, st.Read = data.Spools.HeldAndRead(spoolID)
	})
	return st
}

// Run drops what outlived retention, compacts logs and saves cursors, until ctx ends.
func (s *Store) Run(ctx context.Context) error {
	var saving sync.WaitGroup
	defer saving.Wait()
	// Cursors are saved beside the rest, which may take long. A cursor that a crash takes
	// costs a repetition.
	saving.Go(func() { runEvery(ctx, saveEvery, nil, func(bool) { s.saveCursors() }) })
	runEvery(ctx, maintainEvery, s.compactNow, func(storageFull bool) {
		s.expireAndCompact(ctx, storageFull)
		s.Consumers.DropIdle(s.cfg.NowInterval().Earliest)
	})
	return nil
}

// runEvery calls do at intervals, and when wake receives, until ctx ends. do is told whether
// wake received. Refused pushes wake as often as they come, so that there is a pause after
// each call.
func runEvery(ctx context.Context, interval time.Duration, wake <-chan struct{}, do func(woken bool)) {
	for {
		if _, ok := Sleep(ctx, wakePause, nil); !ok {
			return
		}
		woken, ok := Sleep(ctx, interval-wakePause, wake)
		if !ok {
			return
		}
		do(woken)
	}
}

// SaveConsumers writes the consumers to disk if they changed. It returns when that is done
// or has failed.
func (s *Store) SaveConsumers() {
	if err := s.Consumers.SaveIfConsumersChanged(); err != nil {
		s.cfg.OnError(err)
	}
}

func (s *Store) saveCursors() {
	if err := s.Consumers.Save(); err != nil {
		s.cfg.OnError(err)
	}
}

// expireAndCompact drops the expired samples of every site, compacts its log, and removes sites that
// have been silent for long.
func (s *Store) expireAndCompact(ctx context.Context, storageFull bool) {
	for _, site := range s.sitesByID() {
		if site.Lock(ctx) != nil {
			return
		}
		if !site.removed {
			if err := s.expireAndCompactSite(site, storageFull); err != nil {
				s.cfg.OnError(fmt.Errorf("compacting the log of site %q: %w", site.ID, err))
			}
		}
		site.Unlock()
	}
}

func (s *Store) expireAndCompactSite(site *Site, storageFull bool) error {
	oldest := s.KeptSince()
	site.DropExpired(oldest)
	silent := false
	site.View(func(data *SiteSamples) {
		silent = len(data.Batches) == 0 && s.cfg.NowInterval().Earliest.UnixMilli()-data.LastPush > forgetAfter.Milliseconds()
	})
	if silent {
		return s.removeSiteAndLog(site)
	}
	return site.CompactIfWorthwhile(oldest, storageFull)
}

// sitesByID returns the sites by ID.
func (s *Store) sitesByID() []*Site {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.SortedFunc(maps.Values(s.sites), func(a, b *Site) int { return cmp.Compare(a.ID, b.ID) })
}

// ForEachSite calls f with the data of every site, by ID, until f returns false. It begins at
// startFraction, from 0 to 1, of the sites, and goes on from the first after the last. It
// drops the site's expired samples before it calls f. f must neither keep data nor call the
// store.
func (s *Store) ForEachSite(startFraction float64, f func(hash uint64, data *SiteSamples) bool) {
	sites, oldest := s.sitesByID(), s.KeptSince()
	for i := range sites {
		site := sites[(int(startFraction*float64(len(sites)))+i)%len(sites)]
		site.DropExpired(oldest)
		more := true
		site.View(func(data *SiteSamples) { more = f(site.Key, data) })
		if !more {
			return
		}
	}
}

// ViewSite calls f with the data of the site of clusterID, and reports whether there is
// one. f must neither keep data nor call the store.
func (s *Store) ViewSite(clusterID string, f func(data *SiteSamples)) bool {
	s.mu.RLock()
	site := s.sites[clusterID]
	s.mu.RUnlock()
	if site != nil {
		site.View(f)
	}
	return site != nil
}

// Close waits for writes under way, refuses later and waiting ones and unlocks the directory.
// Everything accepted is on disk already. A second call does nothing.
func (s *Store) Close() error {
	if !s.startClosing() {
		return nil
	}
	for _, site := range s.sitesByID() {
		site.LockForever()
	}
	s.saveCursors()
	return s.unlock()
}

// startClosing has all later writes refused. It reports false if an earlier call did.
func (s *Store) startClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosing() {
		return false
	}
	close(s.closing)
	return true
}
