package main

// The samples held for each cluster, in memory as on disk: each accepted push is
// a batch with a sequence number, and a batch in memory is a record in the
// cluster's log. Invariants: Append returns nil only when its samples are
// durable; what was accepted leaves by retention or by the sample limit alone;
// one cluster's damage or flood never touches another. This file must not know
// of tokens, HTTP or metrics: it returns counts and errors.

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

var (
	// ErrFull: a limit of the whole store, or the disk, has no room for the push.
	ErrFull = errors.New("no room")
	// ErrClosed: the store is shutting down.
	ErrClosed = errors.New("store is closed")
)

const (
	// MaxRetention keeps time differences within a batch in 31 bits of ms.
	MaxRetention = 20 * 24 * time.Hour
	// forgetAfter is how long a silent cluster with nothing held is still known,
	// so that an alert on its push time goes on.
	forgetAfter = 24 * time.Hour

	maintainEvery = 30 * time.Second
	kickPause     = time.Second
	compactSlack  = 64 << 10 // bytes of garbage that are not worth a rewrite
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
	// OnError is told what failed in the background, or was found damaged at
	// opening. It is called without locks held.
	OnError func(error)
}

// Store holds samples. It is safe for concurrent use.
type Store struct {
	cfg    StoreConfig
	seed   maphash.Seed
	unlock func() error
	kick   chan struct{} // asks Run to make room now

	samples, size                          atomic.Int64
	damaged, evicted, expired, compactions atomic.Int64

	closing chan struct{} // closed by Close

	mu       sync.RWMutex // guards the rest, and the closing of closing
	clusters map[string]*site
	start    float64 // where among the clusters a scrape begins: 0 to 1
}

// site is a cluster with what it takes to share and to keep it.
type site struct {
	id string
	// turn has room for one: its holder is the one writer. Only the holder does
	// I/O, touches log and gone, and adds to held, taking mu for each change. A
	// channel and not a mutex, so that waiting for a slow disk ends with the
	// request.
	turn chan struct{}
	log  *Log // nil in memory-only mode
	gone bool // no longer in the store

	mu   sync.Mutex // guards held; never held across I/O
	held Cluster
}

func (s *Store) newSite(id string) *site {
	c := &site{id: id, turn: make(chan struct{}, 1), held: NewCluster(id, s.seed)}
	if s.cfg.Dir != "" {
		c.log = NewLog(s.cfg.FS, s.path(id), []byte(id))
	}
	return c
}

// ClusterHash names a cluster in paths, and routes it: SHA-256 of its ID.
func ClusterHash(id string) [sha256.Size]byte { return sha256.Sum256([]byte(id)) }

func (s *Store) path(id string) string {
	h := ClusterHash(id)
	name := hex.EncodeToString(h[:16])
	return filepath.Join(s.cfg.Dir, name[:2], name+LogSuffix)
}

func (s *Store) oldest() int64 { return s.cfg.Now().Add(-s.cfg.Retention).UnixMilli() }

// OpenStore opens or creates the store in cfg.Dir, locks it against other
// processes and recovers every log. A file that cannot be read is set aside and
// reported, and stops nothing; but what can be neither read nor set aside is an
// error, because the next push of its cluster would replace it.
func OpenStore(cfg StoreConfig) (*Store, error) {
	s := &Store{
		cfg: cfg, seed: maphash.MakeSeed(), clusters: map[string]*site{},
		kick: make(chan struct{}, 1), closing: make(chan struct{}), unlock: func() error { return nil },
	}
	if cfg.Retention <= 0 || cfg.Retention > MaxRetention {
		return nil, fmt.Errorf("retention %v is not above 0 and at most %v", cfg.Retention, MaxRetention)
	}
	if cfg.Dir == "" {
		return s, nil
	}
	if _, real := cfg.FS.(DiskFS); real {
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

func (s *Store) recover() error {
	_, dirs, err := ListLogs(s.cfg.FS, s.cfg.Dir)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if len(filepath.Base(dir)) != 2 {
			continue
		}
		logs, _, err := ListLogs(s.cfg.FS, dir)
		if err != nil {
			return err
		}
		for _, path := range logs {
			if err := s.recoverLog(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// recoverLog takes in what a log holds, and mends it where it was damaged.
func (s *Store) recoverLog(path string) error {
	held := NewCluster("", s.seed)
	oldest := s.oldest()
	var parser Parser
	owner := func(id string) bool { return s.path(id) == path }
	log, rec, err := OpenLog(s.cfg.FS, path, func(kind byte, payload []byte) error {
		switch kind {
		case RecordSeries:
			return DecodeSeries(payload, func(id uint32, line []byte) error { return held.Restore(&parser, owner, id, line) })
		case RecordBatch:
			b, err := DecodeBatch(payload)
			if err == nil {
				err = held.Adopt(b, oldest)
			}
			return err
		}
		return fmt.Errorf("unknown kind of record %d", kind)
	})
	if err == nil {
		id := string(rec.Identity)
		if rec.HeaderDamaged {
			id = held.ID
		}
		switch {
		case s.path(id) != path:
			err = errors.New("its name and its header are not of one cluster")
		case held.Seq == 0:
			err = errors.New("it has no batch") // no log was ever written so
		}
		held.ID = id
	}
	if err != nil {
		// Out of the way of a new log, but never deleted.
		aside := fmt.Sprintf("%s.unreadable-%d", path, s.cfg.Now().UnixNano())
		if rerr := s.cfg.FS.Rename(path, aside); rerr != nil {
			return errors.Join(err, fmt.Errorf("setting unreadable log aside: %w", rerr))
		}
		s.damaged.Add(1)
		s.cfg.OnError(fmt.Errorf("recovering %s: %w; it is set aside as %s", path, err, filepath.Base(aside)))
		return nil
	}
	c := s.newSite(held.ID)
	c.held = held
	if !rec.HeaderDamaged {
		c.log = log
	}
	s.clusters[c.id] = c
	s.size.Add(c.log.Size())
	s.samples.Add(held.Samples())
	if rec.HeaderDamaged || rec.Damaged > 0 {
		s.damaged.Add(1)
		s.cfg.OnError(fmt.Errorf("%s was damaged: header %t, %d other places, %d bytes lost, %d records kept; the damaged file is kept as %q",
			path, rec.HeaderDamaged, rec.Damaged, rec.LostBytes, rec.Records, filepath.Base(rec.SetAside)))
	}
	if rec.Err != nil {
		s.cfg.OnError(fmt.Errorf("recovering %s: %w", path, rec.Err))
	}
	if c.log.Broken() {
		if err := s.rewrite(c, nil); err != nil {
			s.cfg.OnError(fmt.Errorf("mending %s: %w", path, err))
		}
	}
	_ = s.makeRoom(0) // what is still shown stays, even beyond the limit
	return nil
}

// take waits for c's turn. A turn that is free is taken even if ctx has ended:
// who gave up waiting for a new cluster can so leave its removal to the holder.
func (s *Store) take(ctx context.Context, c *site) error {
	select {
	case c.turn <- struct{}{}:
		return nil
	default:
	}
	select {
	case c.turn <- struct{}{}:
		return nil
	case <-s.closing: // Close keeps the turns
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("waiting for an earlier push: %w", ctx.Err())
	}
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
func (s *Store) acquire(ctx context.Context, id string) (*site, error) {
	for {
		s.mu.Lock()
		c, closed := s.clusters[id], s.closed()
		if c == nil && !closed && (s.cfg.LimitClusters == 0 || len(s.clusters) < s.cfg.LimitClusters) {
			c = s.newSite(id)
			s.clusters[id] = c
		}
		s.mu.Unlock()
		if closed {
			return nil, ErrClosed
		}
		if c == nil {
			return nil, fmt.Errorf("%w: %d clusters are known, which is the limit", ErrFull, s.cfg.LimitClusters)
		}
		if err := s.take(ctx, c); err != nil {
			return nil, err
		}
		if !c.gone {
			return c, nil
		}
		<-c.turn
	}
}

// release gives the turn back, and forgets a cluster of which nothing was ever
// accepted: a first push that fails leaves nothing behind.
func (s *Store) release(c *site) {
	if c.held.Seq == 0 {
		s.forget(c)
	}
	<-c.turn
}

// forget drops a cluster of which nothing is held. What an error may have left
// of its log is replaced by the cluster's next one.
func (s *Store) forget(c *site) {
	c.gone = true
	s.mu.Lock()
	delete(s.clusters, c.id)
	s.mu.Unlock()
	if c.log != nil {
		s.size.Add(-c.log.Size())
	}
}

// resize does something to the log of c, and accounts for its size.
func (s *Store) resize(c *site, do func() error) error {
	before := c.log.Size()
	err := do()
	s.size.Add(c.log.Size() - before)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: the disk is full: %w", ErrFull, err)
	}
	return err
}

// Append holds the samples of p for cluster id. When it returns nil, what it
// counts as accepted is on disk; when not, nothing was taken. Lines have to be
// those of Push.Add and carry id's ClusterLabel. Waiting for an earlier push of
// the cluster ends with ctx. Errors: ErrSeriesLimit, ErrTooLarge, ErrFull,
// ErrClosed, ctx's, or those of the disk.
func (s *Store) Append(ctx context.Context, id string, p *Push) (AppendResult, error) {
	c, err := s.acquire(ctx, id)
	if err != nil {
		return AppendResult{}, err
	}
	defer s.release(c)
	prepare := func() (*Batch, int, AppendResult, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.held.Prepare(p, s.cfg.Now(), s.cfg.Retention, s.cfg.LimitSeries)
	}
	b, known, res, err := prepare()
	if errors.Is(err, ErrSeriesLimit) && c.held.Table.Dead(s.oldest()) > 0 {
		if err := s.rewrite(c, nil); err != nil {
			return AppendResult{}, err
		}
		b, known, res, err = prepare()
	}
	if err != nil {
		return AppendResult{}, err
	}
	if len(b.V) == 0 { // all known or unwanted: nothing to write
		c.mu.Lock()
		c.held.Accepted = max(c.held.Accepted, b.Accepted)
		c.held.Table.Truncate(known)
		c.mu.Unlock()
		return res, nil
	}
	begin := time.Now()
	if err = s.makeRoom(len(b.V)); err == nil {
		err = s.write(c, b, known)
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

// write makes b, and the series from ID known on, durable, and then holds them.
func (s *Store) write(c *site, b *Batch, known int) error {
	if c.log != nil {
		frames := AppendSeriesRecords(nil, c.held.Table, known)
		frames = AppendRecord(frames, RecordBatch, EncodeBatch(nil, b))
		if s.cfg.LimitStorage > 0 && s.size.Load()+int64(len(frames)) > s.cfg.LimitStorage {
			select {
			case s.kick <- struct{}{}:
			default:
			}
			return fmt.Errorf("%w: the logs reached the storage limit of %d bytes", ErrFull, s.cfg.LimitStorage)
		}
		if c.log.Broken() {
			return s.rewrite(c, b)
		}
		if err := s.resize(c, func() error { return c.log.Append(frames) }); err != nil {
			return err
		}
	}
	c.mu.Lock()
	c.held.Take(b)
	c.mu.Unlock()
	s.samples.Add(int64(len(b.V)))
	return nil
}

// rewrite puts a new log, of what is held and of b, in the place of c's; memory
// follows when the new file is durable. The turn is held.
func (s *Store) rewrite(c *site, b *Batch) error {
	c.mu.Lock()
	held := c.held
	c.mu.Unlock()
	// Others may evict batches of c.held now, but change nothing that held has.
	next := held.Compact(b, s.oldest())
	if c.log != nil {
		fill := func(w io.Writer) error {
			for frames := range next.Records {
				if _, err := w.Write(frames); err != nil {
					return err
				}
			}
			return nil
		}
		if err := s.resize(c, func() error { return c.log.Rewrite(fill) }); err != nil {
			return err
		}
	}
	if b == nil {
		s.compactions.Add(1)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.held.Samples()
	first := next.Seq // of what is still held, or of b
	if len(c.held.Batches) > 0 {
		first = c.held.Batches[0].Seq
	} else if b == nil {
		first++
	}
	for len(next.Batches) > 0 && next.Batches[0].Seq < first {
		next.Evict()
	}
	c.held = next
	s.samples.Add(next.Samples() - before)
	return nil
}

// makeRoom makes room for n samples under the limit. It evicts batches, oldest
// first, that no scrape shows any more; if that is not enough, it is ErrFull.
func (s *Store) makeRoom(n int) error {
	limit := int64(s.cfg.LimitSamples)
	if limit == 0 || s.samples.Load()+int64(n) <= limit {
		return nil
	}
	if int64(n) > limit { // which no eviction would help
		return fmt.Errorf("%w: a push of %d samples, the limit is %d", ErrFull, n, limit)
	}
	shown := s.cfg.Now().Add(-s.cfg.MaxSampleAge).UnixMilli()
	goal := limit - int64(n) - limit/64 // some more, so that not every push has to
	s.mu.RLock()
	clusters := slices.Collect(maps.Values(s.clusters))
	s.mu.RUnlock()
	// heads[i] is when clusters[i] got its oldest batch. Others may evict it
	// meanwhile, which costs the order, no more.
	heads := make([]int64, len(clusters))
	for i, c := range clusters {
		c.mu.Lock()
		heads[i] = c.held.Head()
		c.mu.Unlock()
	}
	touched := map[*site]bool{}
	for s.samples.Load() > goal {
		i := slices.Index(heads, slices.Min(heads))
		if heads[i] == math.MaxInt64 {
			break
		}
		c := clusters[i]
		c.mu.Lock()
		if c.held.Evictable(shown) {
			n := c.held.Evict()
			s.samples.Add(-n)
			s.evicted.Add(n)
			heads[i], touched[c] = c.held.Head(), true
		} else {
			heads[i] = math.MaxInt64
		}
		c.mu.Unlock()
	}
	for c := range touched {
		c.mu.Lock()
		c.held.Batches = slices.Clone(c.held.Batches) // lets go of the evicted
		c.mu.Unlock()
	}
	if s.samples.Load()+int64(n) > limit {
		return fmt.Errorf("%w: %d samples are held, the limit is %d", ErrFull, s.samples.Load(), limit)
	}
	return nil
}

// Run drops what outlived retention, and compacts logs, until ctx ends.
func (s *Store) Run(ctx context.Context) error {
	tick := time.NewTicker(maintainEvery)
	defer tick.Stop()
	for {
		full := false
		select {
		case <-ctx.Done():
			return nil
		case <-s.kick:
			full = true
		case <-tick.C:
		}
		s.maintain(ctx, full)
		select { // refused pushes kick as often as they come
		case <-ctx.Done():
			return nil
		case <-time.After(kickPause):
		}
	}
}

// maintain goes once over all clusters.
func (s *Store) maintain(ctx context.Context, full bool) {
	for _, c := range s.sorted() {
		if s.take(ctx, c) != nil {
			return
		}
		if !c.gone {
			if err := s.maintainCluster(c, full); err != nil {
				s.cfg.OnError(fmt.Errorf("compacting the log of cluster %q: %w", c.id, err))
			}
		}
		<-c.turn
	}
}

// maintainCluster drops what outlived retention, rewrites a log of which half
// is garbage, or an eighth when the storage is full, and forgets a cluster
// silent for long.
func (s *Store) maintainCluster(c *site, full bool) error {
	part, slack := int64(2), int64(compactSlack)
	if full {
		part, slack = 8, 0
	}
	oldest := s.oldest()
	c.mu.Lock()
	dropped := c.held.Expire(oldest)
	live := c.held.Bytes()
	dead := int64(c.held.Table.Dead(oldest))*part > int64(c.held.Table.Len())
	forget := len(c.held.Batches) == 0 && s.cfg.Now().UnixMilli()-c.held.Accepted > forgetAfter.Milliseconds()
	c.mu.Unlock()
	s.samples.Add(-dropped)
	s.expired.Add(dropped)
	if forget {
		if c.log != nil {
			if err := s.resize(c, c.log.Remove); err != nil {
				return err
			}
		}
		s.forget(c)
		return nil
	}
	if !dead && c.log != nil {
		garbage := c.log.Size() - live
		dead = c.log.Broken() || garbage > slack && garbage*part > c.log.Size()
	}
	if dead {
		return s.rewrite(c, nil)
	}
	return nil
}

// sorted returns the clusters by ID.
func (s *Store) sorted() []*site {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.SortedFunc(maps.Values(s.clusters), func(a, b *site) int { return cmp.Compare(a.id, b.id) })
}

// Newest returns the newest sample of each series that is at most maxAge and the
// retention old, one family a name, sorted. match, if not nil, chooses lines. At
// most limit samples are returned, of whole clusters and of at least one;
// truncated says that some were left out. Then the next call begins at another
// cluster, a golden section further, so that each cluster has its turn with every
// one of several scrapers that take turns, which where this one ended would not
// give. Lines stay valid for ever.
func (s *Store) Newest(maxAge time.Duration, limit int, match func(line []byte) bool) (fams []Family, truncated bool) {
	minT := s.cfg.Now().Add(-min(maxAge, s.cfg.Retention)).UnixMilli()
	index := map[string]*Family{}
	clusters := s.sorted()
	s.mu.RLock()
	start := s.start
	s.mu.RUnlock()
	n := 0
	for i := range clusters {
		c := clusters[(int(start*float64(len(clusters)))+i)%len(clusters)]
		c.mu.Lock()
		if limit > 0 && n > 0 && n+c.held.Table.Len() > limit {
			c.mu.Unlock()
			truncated = true
			break
		}
		var f *Family
		c.held.Table.Each(minT, func(name string, l Line) {
			if match != nil && !match(l.Text) {
				return
			}
			if f == nil || f.Name != name {
				if f = index[name]; f == nil {
					f = &Family{Name: name}
					index[name] = f
				}
			}
			f.Lines = append(f.Lines, l)
			n++
		})
		c.mu.Unlock()
	}
	if truncated {
		s.mu.Lock()
		_, s.start = math.Modf(s.start + math.Phi)
		s.mu.Unlock()
	}
	fams = make([]Family, 0, len(index))
	for _, name := range slices.Sorted(maps.Keys(index)) {
		fams = append(fams, *index[name])
	}
	return fams, truncated
}

// ClusterStats says what is held of one cluster.
type ClusterStats struct {
	ID                string
	Series            int
	Samples, Accepted int64 // Accepted: ms, of the newest push
}

// StoreStats says what is held, and what happened since the store was opened.
type StoreStats struct {
	Clusters                               []ClusterStats // by ID
	Bytes                                  int64          // of all logs
	Damaged, Evicted, Expired, Compactions int64          // logs, samples, samples, rewrites
}

// Stats returns what is held now.
func (s *Store) Stats() StoreStats {
	st := StoreStats{
		Bytes: s.size.Load(), Damaged: s.damaged.Load(), Evicted: s.evicted.Load(),
		Expired: s.expired.Load(), Compactions: s.compactions.Load(),
	}
	for _, c := range s.sorted() {
		c.mu.Lock()
		if c.held.Accepted > 0 {
			st.Clusters = append(st.Clusters, ClusterStats{c.id, c.held.Table.Len(), c.held.Samples(), c.held.Accepted})
		}
		c.mu.Unlock()
	}
	return st
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
		c.turn <- struct{}{} // kept: nobody writes any more
	}
	return s.unlock()
}
