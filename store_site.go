package main

// One site of the store: its lock, its log, and the order of disk and memory. Samples are
// durable before they are in memory. There is one writer, and no mutex is held across I/O. Of
// its store a site uses the totals, the limit on storage and the consumers; it must not know
// of other sites.

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

var (
	// ErrFull: a limit of the whole store, or the disk, has no room for the push.
	ErrFull = errors.New("no room")
	// ErrClosed: the store is shutting down.
	ErrClosed = errors.New("store is closed")
)

const compactSlack = 64 << 10 // bytes of garbage that are not worth a rewrite

// ClusterIDHash is the SHA-256 of a cluster ID. It names the site in paths, and routes it.
func ClusterIDHash(clusterID string) [sha256.Size]byte { return sha256.Sum256([]byte(clusterID)) }

// SiteKey is where a site stands on the ring, and what cursors know it by.
func SiteKey(clusterID string) uint64 {
	h := ClusterIDHash(clusterID)
	return binary.BigEndian.Uint64(h[:8])
}

// StoreTotals are sums over all sites of a store. They are safe for concurrent use.
type StoreTotals struct {
	Samples, LogBytes      atomic.Int64  // held; of all logs
	Expired, ExpiredUnread atomic.Int64  // samples
	Compactions            atomic.Int64  // rewrites of logs
	NewestSeq              atomic.Uint64 // the highest number that a batch ever had
}

// RaiseNewest makes seq the newest sequence number if it is higher.
func (t *StoreTotals) RaiseNewest(seq uint64) {
	for old := t.NewestSeq.Load(); seq > old && !t.NewestSeq.CompareAndSwap(old, seq); old = t.NewestSeq.Load() {
	}
}

// Site is one site of a store.
type Site struct {
	ID    string // cluster ID
	Key   uint64 // of ID, for the ring and for cursors
	store *Store
	// The holder of lock is the one writer. Only the holder does I/O, touches log and removed,
	// and adds to data, taking mu for each change.
	lock    ioLock
	log     *Log // nil in memory-only mode
	removed bool // no longer in the store

	mu   sync.Mutex // guards data; never held across I/O
	data SiteSamples
}

// NewSite returns a site of store with data, and with its log; log nil is memory-only mode.
// It adds both to the totals. The caller adds the site to the store.
func NewSite(data SiteSamples, log *Log, store *Store) *Site {
	store.totals.Samples.Add(data.SampleCount())
	if log != nil {
		store.totals.LogBytes.Add(log.Size())
	}
	store.totals.RaiseNewest(data.Seq)
	return &Site{ID: data.ID, Key: SiteKey(data.ID), store: store, lock: newIOLock(), log: log, data: data}
}

// View calls f with the site's data, under mu. f must not keep data, nor add samples to it.
func (s *Site) View(f func(data *SiteSamples)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.data)
}

// Lock waits for the lock, which Unlock releases. The error is ErrClosed or that of ctx. A lock
// that is free is taken even if ctx has ended, so that a request that gave up can leave the
// removal of a new site to the next holder.
func (s *Site) Lock(ctx context.Context) error { return s.lock.Lock(ctx, s.store.closing) }

// TryLock takes the lock if it is free.
func (s *Site) TryLock() bool { return s.lock.TryLock() }

// Unlock releases the lock.
func (s *Site) Unlock() { s.lock.Unlock() }

// LockForever waits for the lock and keeps it, so that nobody writes any more.
func (s *Site) LockForever() { _ = s.lock.Lock(context.Background(), nil) }

// All that follows, except for DropExpired and TryEvictOldestBatch, is for the holder of the lock.

// markRemoved notes that the site is no longer in the store. If removing its log has failed,
// the next log of the site replaces it.
func (s *Site) markRemoved() {
	s.removed = true
	if s.log != nil {
		s.store.totals.LogBytes.Add(-s.log.Size())
	}
}

// StageNewSamples makes a batch of what is new in p, as SiteSamples.StageNewSamples says. If there
// are too many series, those without a sample in retention make room.
func (s *Site) StageNewSamples(p *SampleList, names ScrapeNames, limits AppendLimits) (StagedBatch, error) {
	for compacted := false; ; compacted = true {
		s.mu.Lock()
		prepared, err := s.data.StageNewSamples(p, names, limits)
		s.mu.Unlock()
		if compacted || !errors.Is(err, ErrSeriesLimit) || s.data.Table.CountExpired(limits.timeBounds().keptSince) == 0 {
			return prepared, err
		}
		if err := s.RewriteLog(nil, limits.timeBounds().keptSince); err != nil {
			return StagedBatch{}, err
		}
	}
}

// Rollback takes back what StageNewSamples inserted.
func (s *Site) Rollback(staged StagedBatch) {
	s.View(func(data *SiteSamples) { data.Rollback(staged) })
}

// Commit makes a prepared batch and its new series durable, and then holds them. A log that is
// broken is rewritten with them, without the samples older than keptSince. On an error the
// caller rolls back.
func (s *Site) Commit(p StagedBatch, keptSince int64) error {
	if s.log != nil {
		frames := AppendRecord(AppendSeriesRecords(nil, s.data.Table, p.newSeries), RecordBatch, EncodeBatchPayload(nil, p.Batch))
		if err := s.store.checkStorageLimit(len(frames)); err != nil {
			return err
		}
		if s.log.MustBeRewritten() {
			return s.RewriteLog([]*Batch{p.Batch}, keptSince)
		}
		if err := s.changeLogAndTotals(func() error { return s.log.Append(frames) }); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.store.totals.RaiseNewest(p.Batch.Seq)
	s.data.Commit(p.Batch)
	s.store.totals.Samples.Add(int64(len(p.Batch.V)))
	return nil
}

// changeLogAndTotals calls change, which writes or removes the log, and accounts for the log's size.
func (s *Site) changeLogAndTotals(changeLog func() error) error {
	before := s.log.Size()
	err := changeLog()
	s.store.totals.LogBytes.Add(s.log.Size() - before)
	if IsDiskFull(err) {
		return fmt.Errorf("%w: the disk is full: %w", ErrFull, err)
	}
	return err
}

// raiseSeq has the number of the next batch be above seq: damage may have taken the newest
// batch, which a consumer had.
func (s *Site) raiseSeq(seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.data.Seq = max(s.data.Seq, seq)
}

// RewriteLog replaces the log by one of the samples since keptSince and of more batches. The data in
// memory follows when the new file is durable.
func (s *Site) RewriteLog(more []*Batch, keptSince int64) error {
	s.DropExpired(keptSince)
	old := s.noteReadScrapesAndCopy()
	// Others may drop batches of s.data meanwhile, but they change nothing that old has.
	compacted := old.CompactedCopy(more, keptSince)
	if s.log != nil {
		err := s.changeLogAndTotals(func() error {
			return s.log.Rewrite(func(w io.Writer) error { return writeAll(w, compacted.Records) })
		})
		if err != nil {
			return err
		}
	}
	if len(more) == 0 {
		s.store.totals.Compactions.Add(1)
	}
	s.store.totals.RaiseNewest(compacted.Seq)
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.data.SampleCount()
	compacted.DropEvictedAndExpiredIn(&s.data)
	s.data = compacted
	s.store.totals.Samples.Add(s.data.SampleCount() - before)
	return nil
}

// noteReadScrapesAndCopy returns a copy of the data that can be read without mu. It first notes
// which scrapes are read: those in batches that every consumer has read, and those in batches that
// left memory, which the new log will not have.
func (s *Site) noteReadScrapesAndCopy() SiteSamples {
	read := s.seqReadByAll()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.data.Batches) > 0 {
		read = min(read, s.data.Batches[0].Seq-1)
	}
	if read < MaxSeq {
		s.data.Spools.MarkReadUpTo(read)
	}
	old := s.data
	old.Spools = s.data.Spools.Clone() // answers to clients mark those of s.data as read
	return old
}

// writeAll writes the chunks one after the other.
func writeAll(w io.Writer, chunks func(yield func([]byte) bool)) error {
	for chunk := range chunks {
		if _, err := w.Write(chunk); err != nil {
			return err
		}
	}
	return nil
}

// RewriteLogIfBroken rewrites a log that recovery found damaged.
func (s *Site) RewriteLogIfBroken(keptSince int64) error {
	if s.log == nil || !s.log.MustBeRewritten() {
		return nil
	}
	return s.RewriteLog(nil, keptSince)
}

// seqReadByAll returns the number of the newest batch that every consumer has read; MaxSeq if there
// is no consumer.
func (s *Site) seqReadByAll() uint64 {
	seq, _ := s.store.Consumers.SeqReadByAll(s.Key, s.store.cfg.NowInterval().Earliest)
	return seq
}

// TryEvictOldestBatch drops the oldest batch, if every consumer has read it and no scrape that
// shows newest samples since newestSampleCutoff shows one of it. evicted is false otherwise; samples
// is the number of samples dropped.
func (s *Site) TryEvictOldestBatch(newestSampleCutoff int64) (samples int64, evicted bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.data.CanEvictOldestBatch(newestSampleCutoff, s.seqReadByAll()) {
		return 0, false
	}
	samples = s.data.EvictOldestBatch()
	s.store.totals.Samples.Add(-samples)
	return samples, true
}

// RemoveLog removes the log of a site of which nothing is held.
func (s *Site) RemoveLog() error {
	if s.log == nil {
		return nil
	}
	return s.changeLogAndTotals(s.log.Remove)
}

// CompactIfWorthwhile rewrites a log of which half is garbage, or an eighth when the storage is
// full.
func (s *Site) CompactIfWorthwhile(keptSince int64, storageFull bool) error {
	part, slack := int64(2), int64(compactSlack)
	if storageFull {
		part, slack = 8, 0
	}
	s.mu.Lock()
	live := s.data.EstimatedRewrittenLogSize()
	worth := int64(s.data.Table.CountExpired(keptSince))*part > int64(s.data.Table.Len())
	s.mu.Unlock()
	if !worth && s.log != nil {
		garbage := s.log.Size() - live
		worth = s.log.MustBeRewritten() || garbage > slack && garbage*part > s.log.Size()
	}
	if worth {
		return s.RewriteLog(nil, keptSince)
	}
	return nil
}
