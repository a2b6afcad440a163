package main

// One site of the store: its lock, its log, and the order of disk and memory. Samples are
// durable before they are in memory. There is one writer, and no mutex is held across I/O.
// This file must not know of other sites: limits over all sites come in as totals.

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

var (
	// ErrFull: a limit of the whole store, or the disk, has no room for the push.
	ErrFull = errors.New("no room")
	// ErrClosed: the store is shutting down.
	ErrClosed = errors.New("store is closed")
)

const compactSlack = 64 << 10 // bytes of garbage that are not worth a rewrite

// ClusterIDHash names a cluster in paths, and routes it: SHA-256 of its ID.
func ClusterIDHash(id string) [sha256.Size]byte { return sha256.Sum256([]byte(id)) }

// SiteKey is where a cluster ID stands on the ring, and what cursors know it by.
func SiteKey(id string) uint64 {
	h := ClusterIDHash(id)
	return binary.BigEndian.Uint64(h[:8])
}

// StoreTotals are what all sites of a store add up to. They are safe for concurrent use.
type StoreTotals struct {
	Samples, Bytes  atomic.Int64 // held; of all logs
	Expired, Unread atomic.Int64 // samples
	Compactions     atomic.Int64
	Newest          atomic.Uint64 // sequence number ever
	LimitStorage    int64         // of Bytes; 0 does not bound
	Full            func()        // called when LimitStorage is met
	Closing         <-chan struct{}
	Read            func(hash uint64) uint64 // up to which batch of a site every consumer that counts has read
	Owned           func(hash uint64) bool   // whether this server owns a site
}

// Site is a cluster of a store.
type Site struct {
	ID     string
	Hash   uint64 // of ID, for the ring and for cursors
	totals *StoreTotals
	// turn has room for one: its holder is the one writer. Only the holder does
	// I/O, touches log and Gone, and adds to held, taking mu for each change. A
	// channel and not a mutex, so that waiting for a slow disk ends with the
	// request.
	lock    chan struct{}
	log     *Log // nil in memory-only mode
	Removed bool // no longer in the store

	mu   sync.Mutex // guards held; never held across I/O
	data SiteData
}

// NewSite returns the site of what is held, of which log is the log; nil: in memory
// only.
func NewSite(held SiteData, log *Log, totals *StoreTotals) *Site {
	totals.Samples.Add(held.Samples())
	if log != nil {
		totals.Bytes.Add(log.Size())
	}
	totals.Raise(held.Seq)
	return &Site{ID: held.ID, Hash: SiteKey(held.ID), totals: totals, lock: make(chan struct{}, 1), log: log, data: held}
}

// View calls f with what is held, which f must neither keep nor give samples.
func (s *Site) View(f func(held *SiteData)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.data)
}

// Lock waits for c's turn. A turn that is free is taken even if ctx has ended:
// who gave up waiting for a new cluster can so leave its removal to the holder.
func (s *Site) Lock(ctx context.Context) error {
	if s.TryLock() {
		return nil
	}
	select {
	case s.lock <- struct{}{}:
		return nil
	case <-s.totals.Closing: // Close keeps the turns
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("waiting for an earlier push: %w", ctx.Err())
	}
}

// TryLock takes c's turn if it is free.
func (s *Site) TryLock() bool {
	select {
	case s.lock <- struct{}{}:
		return true
	default:
		return false
	}
}

// LockForever takes the turn for good.
func (s *Site) LockForever() { s.lock <- struct{}{} }

// Unlock gives the turn back. All that follows is for who has it.
func (s *Site) Unlock() { <-s.lock }

// Forgotten notes that c is held no more. What an error may have left of its log is
// replaced by the cluster's next one.
func (s *Site) Forgotten() {
	s.Removed = true
	if s.log != nil {
		s.totals.Bytes.Add(-s.log.Size())
	}
}

// Append holds the samples of p when they are durable, as Store.Append says; room is asked
// for the samples that are new.
func (s *Site) Append(p *SampleList, names ScrapeNames, now Span, retention time.Duration, limitSeries int, room func(n int) error) (AppendResult, error) {
	oldest := now.Early.Add(-retention).UnixMilli()
	b, known, res, err := s.prepare(p, names, now, retention, limitSeries)
	if errors.Is(err, ErrSeriesLimit) && s.data.Table.Dead(oldest) > 0 {
		if err := s.Rewrite(nil, oldest); err != nil {
			return AppendResult{}, err
		}
		b, known, res, err = s.prepare(p, names, now, retention, limitSeries)
	}
	if err != nil || b == nil {
		return res, err
	}
	begin := time.Now()
	if err = room(res.Accepted); err == nil {
		err = s.write(b, known, oldest)
	}
	if err != nil {
		s.mu.Lock()
		s.data.Table.Truncate(known)
		s.mu.Unlock()
		return AppendResult{}, err
	}
	res.Write = time.Since(begin)
	return res, nil
}

// prepare makes a batch of what is new in p: nil if there is nothing to write. Until it is
// held, Table.Truncate(known) undoes it; on an error nothing was inserted.
func (s *Site) prepare(p *SampleList, names ScrapeNames, now Span, retention time.Duration, limitSeries int) (b *Batch, known int, res AppendResult, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.data.Spools.HasAll(names) { // the answer to an earlier push was lost; its samples may be evicted by now
		return nil, 0, AppendResult{Duplicates: len(p.Samples)}, nil
	}
	if b, known, res, err = s.data.Prepare(p, names, now, retention, limitSeries); err != nil {
		return nil, known, AppendResult{}, err
	}
	if len(b.V) == 0 && b.Names.ID == 0 {
		s.data.Table.Truncate(known)
		s.data.Accepted = max(s.data.Accepted, b.Accepted)
		return nil, known, res, nil
	}
	return b, known, res, nil
}

// resize does something to the log, and accounts for its size.
func (s *Site) resize(do func() error) error {
	before := s.log.Size()
	err := do()
	s.totals.Bytes.Add(s.log.Size() - before)
	if DiskFull(err) {
		return fmt.Errorf("%w: the disk is full: %w", ErrFull, err)
	}
	return err
}

// write makes b, and the series from ID known on, durable, and then holds them.
func (s *Site) write(b *Batch, known int, oldest int64) error {
	if s.log != nil {
		frames := AppendRecord(AppendSeriesRecords(nil, s.data.Table, known), RecordBatch, EncodeBatch(nil, b))
		if limit := s.totals.LimitStorage; limit > 0 && s.totals.Bytes.Load()+int64(len(frames)) > limit {
			s.totals.Full()
			return fmt.Errorf("%w: the logs reached the storage limit of %d bytes", ErrFull, limit)
		}
		if s.log.Broken() {
			return s.Rewrite([]*Batch{b}, oldest)
		}
		if err := s.resize(func() error { return s.log.Append(frames) }); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.totals.Raise(b.Seq)
	s.data.Take(b)
	s.totals.Samples.Add(int64(len(b.V)))
	return nil
}

// Raise notes a sequence number as used.
func (t *StoreTotals) Raise(seq uint64) {
	for old := t.Newest.Load(); seq > old && !t.Newest.CompareAndSwap(old, seq); old = t.Newest.Load() {
	}
}

// Raise has the next batch's sequence number be above seq: damage may have taken the
// newest, which a consumer had.
func (s *Site) Raise(seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.data.Seq = max(s.data.Seq, seq)
}

// Rewrite puts a new log, of what is held since oldest and of more batches, in the
// place of c's; memory follows when the new file is durable.
func (s *Site) Rewrite(more []*Batch, oldest int64) error {
	s.Expire(oldest)
	read := s.read()
	s.mu.Lock()
	// The new log does not have the batches that left memory, by which this is known.
	if len(s.data.Batches) > 0 {
		read = min(read, s.data.Batches[0].Seq-1)
	}
	if read < MaxSeq {
		s.data.Spools.MarkRead(read)
	}
	held := s.data
	held.Spools = s.data.Spools.Clone() // answers settle c's
	s.mu.Unlock()
	// Others may expire or evict batches of c.held now, but change nothing that held has.
	next := held.Compact(more, oldest)
	if s.log != nil {
		fill := func(w io.Writer) error {
			for frames := range next.Records {
				if _, err := w.Write(frames); err != nil {
					return err
				}
			}
			return nil
		}
		if err := s.resize(func() error { return s.log.Rewrite(fill) }); err != nil {
			return err
		}
	}
	if len(more) == 0 {
		s.totals.Compactions.Add(1)
	}
	s.totals.Raise(next.Seq)
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.data.Samples()
	next.Follow(&s.data)
	s.data = next
	s.totals.Samples.Add(next.Samples() - before)
	return nil
}

// Mend rewrites a log that recovery found damaged.
func (s *Site) Mend(oldest int64) error {
	if s.log == nil || !s.log.Broken() {
		return nil
	}
	return s.Rewrite(nil, oldest)
}

// Expire drops what outlived retention.
func (s *Site) Expire(oldest int64) {
	owned := s.totals.Owned(s.Hash)
	s.mu.Lock()
	expired, unread, freed := s.data.Expire(oldest, sync.OnceValue(s.read), owned)
	s.mu.Unlock()
	s.totals.Samples.Add(-freed)
	s.totals.Expired.Add(expired)
	s.totals.Unread.Add(unread)
}

// Resume expires the samples older than oldest without counting them.
func (s *Site) Resume(oldest int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.data.Samples()
	s.data.Resume(oldest)
	s.totals.Samples.Add(s.data.Samples() - before)
}

func (s *Site) read() uint64 { return s.totals.Read(s.Hash) }

// Evict drops the oldest batch, if every consumer has had it and no scrape that shows
// samples since shown shows it. It returns the samples dropped, and whether that is so.
func (s *Site) Evict(shown int64) (n int64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.data.Evictable(shown, s.read()) {
		return 0, false
	}
	n = s.data.Evict()
	s.totals.Samples.Add(-n)
	return n, true
}

// Remove removes the log of a cluster of which nothing is held.
func (s *Site) Remove() error {
	if s.log == nil {
		return nil
	}
	return s.resize(s.log.Remove)
}

// Compact rewrites a log of which half is garbage, or an eighth when the storage is
// full.
func (s *Site) Compact(oldest int64, full bool) error {
	part, slack := int64(2), int64(compactSlack)
	if full {
		part, slack = 8, 0
	}
	s.mu.Lock()
	live := s.data.Bytes()
	dead := int64(s.data.Table.Dead(oldest))*part > int64(s.data.Table.Len())
	s.mu.Unlock()
	if !dead && s.log != nil {
		garbage := s.log.Size() - live
		dead = s.log.Broken() || garbage > slack && garbage*part > s.log.Size()
	}
	if dead {
		return s.Rewrite(nil, oldest)
	}
	return nil
}
