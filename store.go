package main

// The store keeps the samples of all sites in memory and in one log on disk per site. Append
// returns nil only when the samples that it accepted are in the log, or in memory if the store has no
// directory. It flushes the log first, unless the sender keeps the samples until every consumer has
// read them: after a power cut the store does not know what the log lost, and the sender pushes it
// again. An accepted sample leaves memory only when it expires (retention) or is evicted (the
// limit on samples). Damage to one site's log does not affect another site. While the store knows
// several sites, pushes of one of them alone cannot use up the limit on samples. This family must
// not know of tokens, HTTP or the program's own metrics.

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
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// MaxRetention is the longest retention that OpenStore accepts. With this limit, the difference
	// of any two times within a batch, in ms, fits into an int32.
	MaxRetention = 20 * 24 * time.Hour
	// forgetAfter is how long after its last push the store remembers a site without samples, so
	// that an alert on the age of the site's last push can fire. The store forgets such a site
	// earlier if LimitSites leaves no room for a new site.
	forgetAfter = 30 * 24 * time.Hour

	maintainEvery = 30 * time.Second // interval at which Run expires samples and compacts logs
	// saveEvery is the interval at which Run saves cursors. Usually a save is one append to one
	// file.
	saveEvery = 2 * time.Second
	// wakePause is the shortest pause between two calls of a background job, even if pushes wake
	// the job.
	wakePause = time.Second
	// maxFlushes is the maximum number of logs that Close flushes at the same time. A file system
	// flushes several files in about the time of one.
	maxFlushes = 64
	// roomPause is the shortest pause between a search that found too few batches to evict and the
	// next search.
	roomPause = time.Second
)

// StoreConfig configures a Store. A limit of 0 means no limit.
type StoreConfig struct {
	FS        FS
	Dir       string // storage directory; "" means memory-only mode
	Retention time.Duration
	// MaxSampleAge is the age of a series' newest sample, by the sample's own time, up to which the
	// sample keeps its batch from eviction. It must equal the MaxSampleAge of AllSitesReader,
	// because scrapes show the newest sample up to that age.
	MaxSampleAge time.Duration
	LimitSeries  int   // maximum number of series per site
	LimitSites   int   // maximum number of known sites
	LimitSamples int   // maximum number of samples held, over all sites
	LimitStorage int64 // maximum bytes of all logs together
	Now          func() time.Time
	// Owned reports whether this server owns the site with this SiteKey. nil means that it owns all
	// sites. If another server owns a site, samples that expire here unread are not counted as lost
	// if their batch names scrapes of a client's spool.
	Owned func(hash uint64) bool
	// NowInterval returns the range that the present time lies in. A sample expires when it is
	// older than Retention at the earliest time of the range. nil means that Now is exact.
	NowInterval func() PresentTimeRange
	// Consumers has the names of the only consumers that may scrape; empty: all may. OpenStore
	// forgets the consumers with other names.
	Consumers []string
	// OnError is called with every failure of a background job and with all damage that OpenStore
	// finds. OnWarning, if not nil, is called once if undamaged logs end early or are
	// missing, as after a power cut, once if the undamaged file of cursors ends early, and once if
	// OpenStore forgets consumers because of their names. Several goroutines may call OnError at the same time.
	// OnError must not call the store, because a site's lock may be held.
	OnError, OnWarning func(error)
}

// Store holds the samples of all sites. It is safe for concurrent use.
type Store struct {
	cfg        StoreConfig
	seed       maphash.Seed
	unlock     func() error  // releases the lock of the storage directory
	compactNow chan struct{} // wakes Run when the logs have reached LimitStorage

	totals        StoreTotals
	damaged, torn atomic.Int64 // numbers of logs that recovery found damaged, and that it found ending early
	evicted       atomic.Int64 // number of evicted samples

	roomMu   sync.Mutex // lets one caller at a time evict batches; guards noRoomAt
	noRoomAt time.Time  // when an eviction last freed too few samples

	records sync.Pool     // of *recordBuffers
	closing chan struct{} // closed by Close

	// Consumers are the scrapers that read from this store, with their cursors.
	Consumers *Consumers

	mu    sync.RWMutex     // guards sites; startClosing also holds it while it closes the channel closing
	sites map[string]*Site // by cluster ID
	// sorted has the sites sorted by cluster ID, or nil after a change of sites. Its elements never
	// change. It is set with mu held for reading, and to nil with mu held for writing.
	sorted atomic.Pointer[[]*Site]
}

// OpenStore opens or creates the store in cfg.Dir, locks the directory against other processes and
// recovers every log. A log that cannot be used, for example because none of its records is intact,
// is renamed out of the way and reported to OnError. A log that cannot be read, or cannot be
// renamed, is an error, because the next push of its site would overwrite it.
func OpenStore(cfg StoreConfig) (*Store, error) {
	if cfg.Retention <= 0 || cfg.Retention > MaxRetention {
		return nil, fmt.Errorf("retention is %v: it must be above 0 and at most %v", cfg.Retention, MaxRetention)
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
	s.records.New = func() any { return &recordBuffers{} }
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

// newSite returns a site without samples. Its first batch gets a sequence number above the numbers
// of all batches that the store has committed so far. If the store knew the site earlier and forgot
// it, a cursor from that time is therefore never ahead of the site's new batches.
func (s *Store) newSite(clusterID string) *Site {
	data := NewSiteSamples(clusterID, s.seed)
	data.StartSeqAfter(s.totals.NewestSeq.Load())
	return NewSite(data, s.newLog(clusterID), s)
}

// newLog returns an object for the log of a site, without creating the file. In memory-only mode it
// returns nil.
func (s *Store) newLog(clusterID string) *Log {
	if s.cfg.Dir == "" {
		return nil
	}
	return NewLog(s.cfg.FS, s.logPathOf(clusterID), []byte(clusterID))
}

func (s *Store) logPathOf(clusterID string) string {
	h := ClusterIDHash(clusterID)
	name := hex.EncodeToString(h[:16])
	return filepath.Join(s.cfg.Dir, name[:2], name+LogSuffix)
}

// IsOnDisk reports whether the samples outlive this process. It is false in memory-only mode.
func (s *Store) IsOnDisk() bool { return s.cfg.Dir != "" }

// owns reports whether this server owns the site with this key.
func (s *Store) owns(siteKey uint64) bool { return s.cfg.Owned == nil || s.cfg.Owned(siteKey) }

// checkStorageLimit returns ErrFull if the logs would exceed LimitStorage after they grow by the
// given number of bytes. In that case it also wakes Run to compact the logs.
func (s *Store) checkStorageLimit(growth int) error {
	limit := s.cfg.LimitStorage
	if limit == 0 || s.totals.LogBytes.Load()+int64(growth) <= limit {
		return nil
	}
	select {
	case s.compactNow <- struct{}{}:
	default: // a wake-up is already pending
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

// acquireSite returns the site of clusterID with its lock held. It adds the site if the store does
// not know it. The caller must release the lock with releaseAndDropIfNew. If LimitSites leaves no
// room for a new site, acquireSite first tries to forget a site without samples. The error is
// ErrClosed, ErrFull, the error of ctx, or a failure to save cursors or to remove the log of the
// forgotten site.
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

// findOrAddSite returns the site of clusterID. It adds a new site if the store does not know the ID
// and LimitSites allows another site. The error is ErrClosed or ErrFull.
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
		return nil, fmt.Errorf("%w: the limit of %d sites is reached", ErrFull, s.cfg.LimitSites)
	}
	site = s.newSite(clusterID)
	s.sites[clusterID] = site
	s.sorted.Store(nil)
	return site, nil
}

// releaseAndDropIfNew releases the lock of a site. If the site never had a batch, it first removes
// the site from the store, so that a failed first push leaves nothing behind.
func (s *Store) releaseAndDropIfNew(site *Site) {
	if site.isNew() {
		s.dropEmptySite(site)
	}
	site.Unlock()
}

// forgetSilentSite removes a site without samples: the one whose last push is oldest. The store
// remembers a site without samples only so that an alert on the age of the site's last push can
// fire. forgetSilentSite does nothing if there is no such site, if another goroutine holds the
// site's lock, or if the site has got samples meanwhile.
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

// removeSiteAndLog removes a site without samples, together with its log. It first removes the
// site's cursors from memory and from disk. Otherwise a crash between the removal of the log and
// the removal of the cursors would leave cursors without a log, and recovery would report them as
// data loss. The caller holds the site's lock.
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

// dropEmptySite removes a site without samples from memory, with its cursors. The caller holds the
// site's lock.
func (s *Store) dropEmptySite(site *Site) {
	site.markRemoved()
	s.mu.Lock()
	delete(s.sites, site.ID)
	s.sorted.Store(nil)
	s.mu.Unlock()
	s.Consumers.DropSiteCursors(site.Key)
}

// Append stores the samples of p for the site of clusterID. If Append returns nil, all samples of
// the push that the store has accepted now or before survive a crash of the process, and also a power
// cut unless KeptBySender in the result is true (in memory-only mode they are in memory). If it
// returns an error, no sample was accepted. The lines of p must come from SampleList.Add and carry
// clusterID in the label ClusterLabel. names are the names of the scrapes in p. If the store already
// has all named scrapes, it stores nothing. mustSync says that the sender may not keep the scrapes, so
// that KeptBySender is false. Append waits for an earlier push of the same site until
// ctx ends. The error is ErrTooLarge, ErrFull, ErrClockInDoubt, ErrClosed, ErrDecodeAgain, the error of
// ctx, or an error of the disk.
func (s *Store) Append(ctx context.Context, clusterID string, p *SampleList, names ScrapeNames, mustSync bool) (AppendResult, error) {
	site, err := s.acquireSite(ctx, clusterID)
	if err != nil {
		return AppendResult{}, err
	}
	defer s.releaseAndDropIfNew(site)
	limits := AppendLimits{Now: s.cfg.NowInterval(), Retention: s.cfg.Retention, Series: s.cfg.LimitSeries}
	isNew, hasSpools := site.isNew(), site.hasSpools()
	staged, err := site.StageNewSamples(p, names, limits)
	if err != nil {
		return AppendResult{}, err
	}
	keptSince := limits.timeBounds().keptSince
	if staged.Batch == nil {
		staged.Result.KeptBySender = !mustSync && s.isKeptBySender(site, names)
		if !staged.Result.KeptBySender {
			if err := site.FlushLog(keptSince); err != nil {
				return AppendResult{}, err
			}
		}
		site.noteSeriesIDs(&staged, p)
		return staged.Result, nil
	}
	// The first batch of a spool in an existing log is flushed. If a log knows no spool, everything in
	// it is therefore durable, and recovery can tell a loss from a power cut.
	keep := !mustSync && s.isKeptBySender(site, staged.Batch.Names) && (isNew || hasSpools)
	begin := time.Now()
	if err = s.makeRoom(site, staged.Result.Accepted); err == nil {
		err = site.Commit(staged, keptSince, !keep)
	}
	if err != nil {
		site.Rollback(staged)
		return AppendResult{}, err
	}
	staged.Result.WriteTime, staged.Result.FirstOfSite, staged.Result.KeptBySender = time.Since(begin), isNew, keep
	site.noteSeriesIDs(&staged, p)
	return staged.Result, nil
}

// isKeptBySender reports whether the sender of a push keeps its scrapes until every consumer has read
// them. A sender that names no scrapes keeps nothing. If no consumer is known, the client removes a
// scrape when it is held.
func (s *Store) isKeptBySender(site *Site, names ScrapeNames) bool {
	if len(names.Numbers) == 0 {
		return false
	}
	_, hasConsumers := s.Consumers.SeqReadByAll(site.Key, s.cfg.NowInterval().Earliest)
	return hasConsumers
}

// SpoolStatus is what this server reports to a site's client about one spool of the site.
type SpoolStatus struct {
	// Held has the scrapes that are stored but not yet read by every consumer. Read has the
	// scrapes that every consumer has read.
	Held, Read   Ranges
	Consumers    []ConsumerAge
	HasConsumers bool  // whether any consumer is known; if not, RefreshSpoolStatus marks no scrape as read
	OtherTime    int64 // ms; when the newest batch that names another spool of the site was accepted; 0 if the store has none
}

// RefreshSpoolStatus returns the status of one spool of the site of clusterID. Before that it marks
// as read the site's scrapes that every consumer has read by now, unless no consumer is known.
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
		if !data.Spools.HasOther(spoolID) {
			return
		}
		for _, b := range slices.Backward(data.Batches) {
			if b.Names.SpoolID != 0 && b.Names.SpoolID != spoolID {
				st.OtherTime = b.AcceptedAt
				return
			}
		}
	})
	return st
}

// Run expires samples, compacts logs, forgets idle consumers and saves cursors at intervals until
// ctx ends. It always returns nil.
func (s *Store) Run(ctx context.Context) error {
	var saving sync.WaitGroup
	defer saving.Wait()
	// A separate goroutine saves the cursors, because the other jobs may take long. If a crash
	// loses the newest change of a cursor, the consumer is only served some samples twice.
	saving.Go(func() { runEvery(ctx, saveEvery, nil, func(bool) { s.saveCursors() }) })
	runEvery(ctx, maintainEvery, s.compactNow, func(storageFull bool) {
		s.expireAndCompact(ctx, storageFull)
		s.Consumers.DropIdle(s.cfg.NowInterval().Earliest)
	})
	return nil
}

// runEvery calls the function do once per interval until ctx ends. It calls the function earlier if
// a value arrives on the channel wake; the argument of the function reports whether such a value
// caused the call. Before runEvery receives from the channel again, it pauses for wakePause,
// because every push that is refused for the storage limit may send to the channel.
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

// SaveConsumers writes the consumers and their cursors to disk if the list of consumers changed and
// no other save has already begun to write it. A failure goes to OnError.
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

// expireAndCompact goes through the sites until ctx ends or the store closes. It drops the expired
// samples of each site, compacts its log if that is worthwhile, and removes a site that has no
// samples and has sent no push for forgetAfter. storageFull means that the logs have reached
// LimitStorage.
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

// sitesByID returns all sites, sorted by cluster ID. The caller must not change the result. The sites
// are sorted only if a site came or went since the last call, because every scrape calls sitesByID.
func (s *Store) sitesByID() []*Site {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if sorted := s.sorted.Load(); sorted != nil {
		return *sorted
	}
	sorted := slices.SortedFunc(maps.Values(s.sites), func(a, b *Site) int { return cmp.Compare(a.ID, b.ID) })
	s.sorted.Store(&sorted)
	return sorted
}

// ForEachSite visits the sites until f returns false. For each site it drops the expired samples
// and then calls f, without holding a lock. The sites are sorted by ID. The first site is the one at
// startFraction, from 0 to 1, of the sorted list; after the last site ForEachSite continues with the
// first of the list.
func (s *Store) ForEachSite(startFraction float64, f func(site *Site) bool) {
	sites, oldest := s.sitesByID(), s.KeptSince()
	for i := range sites {
		if i%64 == 63 {
			runtime.Gosched() // so that pushes do not wait; see WriteFamilies
		}
		site := sites[(int(startFraction*float64(len(sites)))+i)%len(sites)]
		site.DropExpired(oldest)
		if !f(site) {
			return
		}
	}
}

// ViewSite calls f with the data of the site of clusterID. It returns false, without calling f, if
// the store does not know the site. f must not keep data and must not call the store.
func (s *Store) ViewSite(clusterID string, f func(data *SiteSamples)) bool {
	s.mu.RLock()
	site := s.sites[clusterID]
	s.mu.RUnlock()
	if site != nil {
		site.View(f)
	}
	return site != nil
}

// Close makes the store refuse later pushes, waits for the writes in progress, flushes the logs, saves
// the cursors and unlocks the directory. A push that still waits for an earlier write is stored or
// refused with ErrClosed. A failure to flush a log goes to OnError. A second call does nothing.
func (s *Store) Close() error {
	if !s.startClosing() {
		return nil
	}
	var flushing sync.WaitGroup
	slots := make(chan struct{}, maxFlushes)
	for _, site := range s.sitesByID() {
		site.LockForever()
		slots <- struct{}{}
		flushing.Go(func() {
			if err := site.FlushLog(s.KeptSince()); err != nil {
				s.cfg.OnError(fmt.Errorf("flushing the log of site %q: %w", site.ID, err))
			}
			<-slots
		})
	}
	flushing.Wait()
	s.saveCursors()
	return s.unlock()
}

// startClosing makes the store refuse all later pushes. It returns false if the store is already
// closing.
func (s *Store) startClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosing() {
		return false
	}
	close(s.closing)
	return true
}
