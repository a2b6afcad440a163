package main

// One cluster of the store with what it takes to share and to keep it: who may write,
// its log, and the order of disk and memory. Invariants: what is held was durable
// first; there is one writer; no lock is held across I/O. This file must not know of
// the other clusters: limits over all of them come in as totals.

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

// ClusterHash names a cluster in paths, and routes it: SHA-256 of its ID.
func ClusterHash(id string) [sha256.Size]byte { return sha256.Sum256([]byte(id)) }

// RingKey is where a cluster ID stands on the ring, and what cursors know it by.
func RingKey(id string) uint64 {
	h := ClusterHash(id)
	return binary.BigEndian.Uint64(h[:8])
}

// Totals are what all sites of a store add up to. They are safe for concurrent use.
type Totals struct {
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
	totals *Totals
	// turn has room for one: its holder is the one writer. Only the holder does
	// I/O, touches log and Gone, and adds to held, taking mu for each change. A
	// channel and not a mutex, so that waiting for a slow disk ends with the
	// request.
	turn chan struct{}
	log  *Log // nil in memory-only mode
	Gone bool // no longer in the store

	mu   sync.Mutex // guards held; never held across I/O
	held Cluster
}

// NewSite returns the site of what is held, of which log is the log; nil: in memory
// only.
func NewSite(held Cluster, log *Log, totals *Totals) *Site {
	totals.Samples.Add(held.Samples())
	if log != nil {
		totals.Bytes.Add(log.Size())
	}
	totals.Raise(held.Seq)
	return &Site{ID: held.ID, Hash: RingKey(held.ID), totals: totals, turn: make(chan struct{}, 1), log: log, held: held}
}

// Look calls f with what is held, which f must neither keep nor give samples.
func (c *Site) Look(f func(held *Cluster)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.held)
}

// Take waits for c's turn. A turn that is free is taken even if ctx has ended:
// who gave up waiting for a new cluster can so leave its removal to the holder.
func (c *Site) Take(ctx context.Context) error {
	if c.TryTake() {
		return nil
	}
	select {
	case c.turn <- struct{}{}:
		return nil
	case <-c.totals.Closing: // Close keeps the turns
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("waiting for an earlier push: %w", ctx.Err())
	}
}

// TryTake takes c's turn if it is free.
func (c *Site) TryTake() bool {
	select {
	case c.turn <- struct{}{}:
		return true
	default:
		return false
	}
}

// Keep takes the turn for good.
func (c *Site) Keep() { c.turn <- struct{}{} }

// Free gives the turn back. All that follows is for who has it.
func (c *Site) Free() { <-c.turn }

// Forgotten notes that c is held no more. What an error may have left of its log is
// replaced by the cluster's next one.
func (c *Site) Forgotten() {
	c.Gone = true
	if c.log != nil {
		c.totals.Bytes.Add(-c.log.Size())
	}
}

// Append holds the samples of p when they are durable, as Store.Append says; room is asked
// for the samples that are new.
func (c *Site) Append(p *Push, names SpoolNames, now Span, retention time.Duration, limitSeries int, room func(n int) error) (AppendResult, error) {
	oldest := now.Early.Add(-retention).UnixMilli()
	b, known, res, err := c.prepare(p, names, now, retention, limitSeries)
	if errors.Is(err, ErrSeriesLimit) && c.held.Table.Dead(oldest) > 0 {
		if err := c.Rewrite(nil, oldest); err != nil {
			return AppendResult{}, err
		}
		b, known, res, err = c.prepare(p, names, now, retention, limitSeries)
	}
	if err != nil || b == nil {
		return res, err
	}
	begin := time.Now()
	if err = room(res.Accepted); err == nil {
		err = c.write(b, known, oldest)
	}
	if err != nil {
		c.mu.Lock()
		c.held.Table.Truncate(known)
		c.mu.Unlock()
		return AppendResult{}, err
	}
	res.Write = time.Since(begin)
	return res, nil
}

// prepare makes a batch of what is new in p: nil if there is nothing to write. Until it is
// held, Table.Truncate(known) undoes it; on an error nothing was inserted.
func (c *Site) prepare(p *Push, names SpoolNames, now Span, retention time.Duration, limitSeries int) (b *Batch, known int, res AppendResult, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held.Spools.Knows(names) { // the answer to an earlier push was lost; its samples may be evicted by now
		return nil, 0, AppendResult{Duplicates: len(p.Samples)}, nil
	}
	if b, known, res, err = c.held.Prepare(p, names, now, retention, limitSeries); err != nil {
		return nil, known, AppendResult{}, err
	}
	if len(b.V) == 0 && b.Names.ID == 0 {
		c.held.Table.Truncate(known)
		c.held.Accepted = max(c.held.Accepted, b.Accepted)
		return nil, known, res, nil
	}
	return b, known, res, nil
}

// resize does something to the log, and accounts for its size.
func (c *Site) resize(do func() error) error {
	before := c.log.Size()
	err := do()
	c.totals.Bytes.Add(c.log.Size() - before)
	if DiskFull(err) {
		return fmt.Errorf("%w: the disk is full: %w", ErrFull, err)
	}
	return err
}

// write makes b, and the series from ID known on, durable, and then holds them.
func (c *Site) write(b *Batch, known int, oldest int64) error {
	if c.log != nil {
		frames := AppendRecord(AppendSeriesRecords(nil, c.held.Table, known), RecordBatch, EncodeBatch(nil, b))
		if limit := c.totals.LimitStorage; limit > 0 && c.totals.Bytes.Load()+int64(len(frames)) > limit {
			c.totals.Full()
			return fmt.Errorf("%w: the logs reached the storage limit of %d bytes", ErrFull, limit)
		}
		if c.log.Broken() {
			return c.Rewrite([]*Batch{b}, oldest)
		}
		if err := c.resize(func() error { return c.log.Append(frames) }); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.totals.Raise(b.Seq)
	c.held.Take(b)
	c.totals.Samples.Add(int64(len(b.V)))
	return nil
}

// Raise notes a sequence number as used.
func (t *Totals) Raise(seq uint64) {
	for old := t.Newest.Load(); seq > old && !t.Newest.CompareAndSwap(old, seq); old = t.Newest.Load() {
	}
}

// Raise has the next batch's sequence number be above seq: damage may have taken the
// newest, which a consumer had.
func (c *Site) Raise(seq uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held.Seq = max(c.held.Seq, seq)
}

// Rewrite puts a new log, of what is held since oldest and of more batches, in the
// place of c's; memory follows when the new file is durable.
func (c *Site) Rewrite(more []*Batch, oldest int64) error {
	c.Expire(oldest)
	read := c.read()
	c.mu.Lock()
	// The new log does not have the batches that left memory, by which this is known.
	if len(c.held.Batches) > 0 {
		read = min(read, c.held.Batches[0].Seq-1)
	}
	if read < MaxSeq {
		c.held.Spools.Settle(read)
	}
	held := c.held
	held.Spools = c.held.Spools.Clone() // answers settle c's
	c.mu.Unlock()
	// Others may expire or evict batches of c.held now, but change nothing that held has.
	next := held.Compact(more, oldest)
	if c.log != nil {
		fill := func(w io.Writer) error {
			for frames := range next.Records {
				if _, err := w.Write(frames); err != nil {
					return err
				}
			}
			return nil
		}
		if err := c.resize(func() error { return c.log.Rewrite(fill) }); err != nil {
			return err
		}
	}
	if len(more) == 0 {
		c.totals.Compactions.Add(1)
	}
	c.totals.Raise(next.Seq)
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.held.Samples()
	next.Follow(&c.held)
	c.held = next
	c.totals.Samples.Add(next.Samples() - before)
	return nil
}

// Mend rewrites a log that recovery found damaged.
func (c *Site) Mend(oldest int64) error {
	if c.log == nil || !c.log.Broken() {
		return nil
	}
	return c.Rewrite(nil, oldest)
}

// Expire drops what outlived retention.
func (c *Site) Expire(oldest int64) {
	owned := c.totals.Owned(c.Hash)
	c.mu.Lock()
	expired, unread, freed := c.held.Expire(oldest, sync.OnceValue(c.read), owned)
	c.mu.Unlock()
	c.totals.Samples.Add(-freed)
	c.totals.Expired.Add(expired)
	c.totals.Unread.Add(unread)
}

// Resume expires the samples older than oldest without counting them.
func (c *Site) Resume(oldest int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.held.Samples()
	c.held.Resume(oldest)
	c.totals.Samples.Add(c.held.Samples() - before)
}

func (c *Site) read() uint64 { return c.totals.Read(c.Hash) }

// Evict drops the oldest batch, if every consumer has had it and no scrape that shows
// samples since shown shows it. It returns the samples dropped, and whether that is so.
func (c *Site) Evict(shown int64) (n int64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.held.Evictable(shown, c.read()) {
		return 0, false
	}
	n = c.held.Evict()
	c.totals.Samples.Add(-n)
	return n, true
}

// Remove removes the log of a cluster of which nothing is held.
func (c *Site) Remove() error {
	if c.log == nil {
		return nil
	}
	return c.resize(c.log.Remove)
}

// Compact rewrites a log of which half is garbage, or an eighth when the storage is
// full.
func (c *Site) Compact(oldest int64, full bool) error {
	part, slack := int64(2), int64(compactSlack)
	if full {
		part, slack = 8, 0
	}
	c.mu.Lock()
	live := c.held.Bytes()
	dead := int64(c.held.Table.Dead(oldest))*part > int64(c.held.Table.Len())
	c.mu.Unlock()
	if !dead && c.log != nil {
		garbage := c.log.Size() - live
		dead = c.log.Broken() || garbage > slack && garbage*part > c.log.Size()
	}
	if dead {
		return c.Rewrite(nil, oldest)
	}
	return nil
}
