package main

// A site combines its samples in memory with its log on disk. It writes samples to the log before
// it adds them to memory, and flushes the log if the store says so. There is one writer at a time,
// and no sync.Mutex is held across I/O. Of its store, a site uses only the totals, the limit on
// storage, the owner check, the clock, the consumers and the channel that Close closes. This file
// must not know of other sites.

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
	// ErrFull means that there is no room for the push within the limits of the whole store, or on
	// the disk.
	ErrFull = errors.New("no room")
	// ErrClosed means that the store is shutting down.
	ErrClosed = errors.New("store is closed")
)

const compactSlack = 64 << 10 // bytes of garbage in a log for which a rewrite is not worthwhile

// ClusterIDHash returns the SHA-256 of a cluster ID. Its first 16 bytes name the site's log, its
// first 8 bytes are the SiteKey.
func ClusterIDHash(clusterID string) [sha256.Size]byte { return sha256.Sum256([]byte(clusterID)) }

// SiteKey returns the number by which the ring and the cursors identify a site: the first 8 bytes
// of ClusterIDHash.
func SiteKey(clusterID string) uint64 {
	h := ClusterIDHash(clusterID)
	return binary.BigEndian.Uint64(h[:8])
}

// StoreTotals are sums over all sites of a store. They are safe for concurrent use.
type StoreTotals struct {
	Samples       atomic.Int64  // in memory
	LogBytes      atomic.Int64  // bytes of all logs
	Expired       atomic.Int64  // samples that expired
	ExpiredUnread atomic.Int64  // samples that expired before every consumer had read them
	Compactions   atomic.Int64  // rewrites of logs, except for those that also store a new batch
	NewestSeq     atomic.Uint64 // highest sequence number of all batches of all sites; each start of the server raises it
}

// RaiseNewest sets NewestSeq to seq if seq is higher.
func (t *StoreTotals) RaiseNewest(seq uint64) {
	for old := t.NewestSeq.Load(); seq > old && !t.NewestSeq.CompareAndSwap(old, seq); old = t.NewestSeq.Load() {
	}
}

// Site is one site of a store. It is safe for concurrent use, apart from the methods that need its
// lock.
type Site struct {
	ID    string // cluster ID
	Key   uint64 // SiteKey(ID)
	store *Store
	// lock admits one writer at a time. Only its holder does I/O, accesses log and removed, and
	// adds samples to data. The holder takes mu for each change of data.
	lock    ioLock
	log     *Log // nil in memory-only mode
	removed bool // the site is no longer in the store

	mu   sync.Mutex // guards data; never held across I/O
	data SiteSamples
}

// NewSite returns a site of store with the given data and log. A nil log means memory-only mode.
// NewSite adds the data and the log to the store's totals; the caller adds the site to the store.
func NewSite(data SiteSamples, log *Log, store *Store) *Site {
	store.totals.Samples.Add(data.SampleCount())
	if log != nil {
		store.totals.LogBytes.Add(log.Size())
	}
	store.totals.RaiseNewest(data.Seq)
	return &Site{ID: data.ID, Key: SiteKey(data.ID), store: store, lock: newIOLock(), log: log, data: data}
}

// View calls f with the site's data while it holds mu. f must not keep data and must not add
// samples to it.
func (s *Site) View(f func(data *SiteSamples)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.data)
}

// isNew reports whether no batch of the site was ever committed.
func (s *Site) isNew() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.data.IsNew()
}

// hasSpools reports whether the site knows a client's spool.
func (s *Site) hasSpools() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.data.Spools.IsEmpty()
}

// Lock waits for the site's lock; Unlock releases it. The error is ErrClosed or the error of ctx.
// Lock acquires a free lock even if ctx has ended. Lock therefore fails only after it waited for a
// holder of the lock. If the site still has no batch then, that holder removes it, so that a
// request that gave up waiting leaves nothing behind.
func (s *Site) Lock(ctx context.Context) error { return s.lock.Lock(ctx, s.store.closing) }

// TryLock acquires the lock if it is free, and reports whether it did.
func (s *Site) TryLock() bool { return s.lock.TryLock() }

// Unlock releases the lock.
func (s *Site) Unlock() { s.lock.Unlock() }

// LockForever waits for the lock and never releases it, so that no later write can begin.
func (s *Site) LockForever() { _ = s.lock.Lock(context.Background(), nil) }

// The caller of each method of Site below must hold the site's lock, except for seqReadByAll and
// TryEvictOldestBatch. Recovery needs no lock, because nothing else uses the store then.

// markRemoved records that the site is no longer in the store, and subtracts its log from the
// totals. If a log file was not removed because of an error, the next log of the same site replaces
// the file.
func (s *Site) markRemoved() {
	s.removed = true
	if s.log != nil {
		s.store.totals.LogBytes.Add(-s.log.Size())
	}
}

// StageNewSamples returns a batch of the new samples in p; see SiteSamples.StageNewSamples. If the
// limit on series leaves no room for some samples and the site has series without an unexpired
// sample, it rewrites the log without these series and stages the push again.
func (s *Site) StageNewSamples(p *SampleList, names ScrapeNames, limits AppendLimits) (StagedBatch, error) {
	for compacted := false; ; compacted = true {
		s.mu.Lock()
		staged, err := s.data.StageNewSamples(p, names, limits)
		s.mu.Unlock()
		if err != nil || compacted || staged.Result.NoRoom == 0 {
			return staged, err
		}
		// The series that staging inserted have no sample yet, so they count as expired too.
		inserted := s.data.Table.Len() - staged.newSeries
		if s.data.Table.CountExpired(limits.timeBounds().keptSince) == inserted {
			return staged, nil
		}
		s.Rollback(staged)
		if err := s.RewriteLog(nil, limits.timeBounds().keptSince); err != nil {
			return StagedBatch{}, err
		}
	}
}

// Rollback removes the series that StageNewSamples inserted.
func (s *Site) Rollback(staged StagedBatch) {
	s.View(func(data *SiteSamples) { data.Rollback(staged) })
}

// Commit writes a staged batch and its new series to the log and then adds the batch to memory. If
// flush is true, the whole log is durable after Commit. If the log must be rewritten, Commit rewrites
// it with the batch and without the samples older than keptSince. After an error the caller must call
// Rollback.
func (s *Site) Commit(p StagedBatch, keptSince int64, flush bool) error {
	if s.log != nil {
		buf := s.store.records.Get().(*recordBuffers)
		defer s.store.records.Put(buf)
		frames := buf.framesOf(s.data.Table, p)
		if err := s.store.checkStorageLimit(len(frames)); err != nil {
			return err
		}
		write := s.log.Append
		if s.data.IsNew() {
			write = s.log.Create
		} else if s.log.MustBeRewritten() {
			return s.RewriteLog([]*Batch{p.Batch}, keptSince)
		}
		if err := s.changeLogAndTotals(func() error { return write(frames, flush) }); err != nil {
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

// FlushLog makes the log durable. If the log must be rewritten, FlushLog rewrites it without the
// samples older than keptSince. A site that never had a batch has no log.
func (s *Site) FlushLog(keptSince int64) error {
	if s.log == nil || s.isNew() {
		return nil
	}
	if s.log.MustBeRewritten() {
		return s.RewriteLog(nil, keptSince)
	}
	return s.changeLogAndTotals(s.log.Sync)
}

// recordBuffers has the memory for the records of one push.
type recordBuffers struct{ frames, payload []byte }

// framesOf returns framed records of the batch p and its new series. They are valid until the next
// call.
func (b *recordBuffers) framesOf(t *SeriesTable, p StagedBatch) []byte {
	const maxKept = 64 << 10 // bytes; larger buffers, as for new series, are not reused
	if cap(b.frames)+cap(b.payload) > maxKept {
		*b = recordBuffers{}
	}
	b.payload = EncodeBatchPayload(b.payload[:0], p.Batch)
	b.frames = AppendRecord(AppendSeriesRecords(b.frames[:0], t, p.newSeries), RecordBatch, b.payload)
	return b.frames
}

// noteSeriesIDs completes the SeriesIDs of p after its batch is committed, or if it has none. IDs of
// series that were removed again are removed. If the table was compacted after the push was staged,
// no ID is valid.
func (s *Site) noteSeriesIDs(staged *StagedBatch, p *SampleList) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(p.SeriesIDs) == 0 || s.data.Table.Generation() != staged.generation {
		return
	}
	staged.Result.Generation, staged.Result.TableLen = staged.generation, s.data.Table.Len()
	for i, id := range p.SeriesIDs {
		if int(id) >= staged.Result.TableLen {
			p.SeriesIDs[i] = NoSeriesID
		}
	}
}

// changeLogAndTotals calls changeLog, which writes or removes the log, and adds the change of the
// log's size to the totals. If the disk is full, the error wraps ErrFull.
func (s *Site) changeLogAndTotals(changeLog func() error) error {
	before := s.log.Size()
	err := changeLog()
	s.store.totals.LogBytes.Add(s.log.Size() - before)
	if IsDiskFull(err) {
		return fmt.Errorf("%w: the disk is full: %w", ErrFull, err)
	}
	return err
}

// raiseSeq makes the next batch get a sequence number above seq. Recovery calls it because damage
// may have destroyed the newest batch, and a consumer may have read that batch under its number.
func (s *Site) raiseSeq(seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.data.Seq = max(s.data.Seq, seq)
}

// RewriteLog replaces the log by a new file with the samples since keptSince and the additional
// batches that the parameter more has. It replaces the data in memory after the new file is
// durable. In memory-only mode it only replaces the data.
func (s *Site) RewriteLog(more []*Batch, keptSince int64) error {
	s.DropExpired(keptSince)
	old := s.noteReadScrapesAndCopy()
	// Meanwhile other goroutines may drop batches from s.data, but they change nothing that old
	// refers to.
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

// noteReadScrapesAndCopy returns a copy of the data that can be read without mu. Before that it
// marks scrapes as read if their batch has left memory and every consumer has read that batch. The
// new log will not contain such a batch. Its spool records must therefore list the scrapes of the
// batch as read.
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
	old.Spools = s.data.Spools.Clone() // RefreshSpoolStatus may change s.data.Spools meanwhile
	return old
}

func writeAll(w io.Writer, chunks func(yield func([]byte) bool)) error {
	for chunk := range chunks {
		if _, err := w.Write(chunk); err != nil {
			return err
		}
	}
	return nil
}

// RewriteLogIfBroken rewrites the log if recovery found it damaged.
func (s *Site) RewriteLogIfBroken(keptSince int64) error {
	if s.log == nil || !s.log.MustBeRewritten() {
		return nil
	}
	return s.RewriteLog(nil, keptSince)
}

// seqReadByAll returns the number of the newest batch that every consumer has read. It returns
// MaxSeq if no consumer is known.
func (s *Site) seqReadByAll() uint64 {
	seq, _ := s.store.Consumers.SeqReadByAll(s.Key, s.store.cfg.NowInterval().Earliest)
	return seq
}

// TryEvictOldestBatch drops the oldest batch from memory and returns the number of its samples. It
// drops the batch only if every consumer has read it and none of its samples is the newest of its
// series with a time at or after newestSampleCutoff, because scrapes still show such a sample.
// Otherwise evicted is false.
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

// RemoveLog removes the log of a site that has no samples.
func (s *Site) RemoveLog() error {
	if s.log == nil {
		return nil
	}
	return s.changeLogAndTotals(s.log.Remove)
}

// CompactIfWorthwhile rewrites the log if it must be rewritten, if more than half of the log is
// garbage, or if more than half of the series have expired. If storageFull is true, more than an
// eighth is enough in both cases. A rewrite for garbage also needs more than compactSlack bytes of
// garbage, unless storageFull is true.
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
