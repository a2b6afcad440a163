package main

// What is held of one cluster, in memory: its series and batches, which samples
// of a push are new, what a rewritten log would hold. Invariants: no (series,
// time) is held twice; within a batch and from batch to batch the new samples of
// a series ascend, late ones excepted. No I/O and no locks: the store decides
// when, and what is durable. This file must not know of files or other clusters.

import (
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"time"
)

var (
	// ErrSeriesLimit: the push would make its cluster hold too many series, or too much
	// text of them.
	ErrSeriesLimit = errors.New("too many series")
	// ErrClock: this server's clock made a step, and a sample is within the limits of age by
	// the old time or by the new time, but not by both.
	ErrClock = errors.New("this server's clock was set, and its new time is still in doubt")
)

const (
	// maxAhead is how far a sample's time may be ahead of this server's clock.
	// Every site pays for a sample from the future: it moves the newest time of
	// the central Prometheus, and with it the window for late samples.
	maxAhead = time.Minute
	// recordBytes is about the most that one series record holds.
	recordBytes = 1 << 20
	// maxGap is the most IDs that damage can be believed to have taken at once.
	maxGap = 1 << 20
	// seriesBytes times the limit on series bounds the text of all of them, or one
	// site's long lines would take gigabytes; real lines have a quarter of it. The
	// other is what even a low limit leaves.
	seriesBytes  = 1 << 10
	minTextLimit = 1 << 20
	// maxBatch is the most samples that surely fit one record: in the worst case
	// each takes 5 bytes of ID, 5 of time and 8 of value.
	maxBatch = MaxRecord / 20
)

// Cluster is what is held of one cluster. It is not safe for concurrent use; but
// a batch, once taken, never changes, nor does a line.
type Cluster struct {
	ID       string
	Table    *SeriesTable
	Batches  []*Batch // by sequence number
	Seq      uint64   // of the newest batch ever
	Accepted int64    // ms; of the newest push
	Spools   SiteSpools
	begin    uint64 // Seq before the first batch
	oldest   int64  // ms; older samples have expired, even while their batch is still in memory
	minT     int64  // ms; no sample of Batches is older
}

// NewCluster returns an empty one; for the seed see NewSeriesTable.
func NewCluster(id string, seed maphash.Seed) Cluster {
	return Cluster{ID: id, Table: NewSeriesTable(seed, 0), oldest: math.MinInt64, minT: math.MaxInt64}
}

// Begin has the first batch's sequence number follow seq.
func (c *Cluster) Begin(seq uint64) { c.begin, c.Seq = seq, seq }

// Virgin reports that nothing was ever taken.
func (c *Cluster) Virgin() bool { return c.Seq == c.begin }

// Samples returns the number of samples held.
func (c *Cluster) Samples() int64 {
	n := 0
	for _, b := range c.Batches {
		n += len(b.V)
	}
	return int64(n)
}

// Bytes estimates the size of a log of just what is held, rather too high than
// too low.
func (c *Cluster) Bytes() int64 {
	const frame = 16 // of a record; of a line it is 3 at most
	n := 5*frame + len(c.ID) + 3*c.Table.Len() + c.Table.TextBytes()
	for _, b := range c.Batches {
		n += frame + b.Size
	}
	return int64(n)
}

// AppendResult says what became of a push's samples.
type AppendResult struct {
	Accepted, Duplicates      int
	Conflicts, TooOld, Future int           // dropped
	Write                     time.Duration // spent until the disk had it
}

// Untimely reports that samples were dropped for their time and none was taken or held.
func (r *AppendResult) Untimely() bool {
	return r.TooOld+r.Future > 0 && r.Accepted+r.Duplicates+r.Conflicts == 0
}

// entry is a sample of a push whose series is found.
type entry struct {
	id    uint32
	round uint32 // how many earlier samples of its series the push has
	t     int64
	v     float64
}

// Prepare finds or inserts the series of p and makes a batch of the samples that
// are new: neither held, nor older than retention, nor of the future. The lines
// of p are those of Push.Add; names are of the scrapes in it. Until Take holds the batch,
// Table.Truncate(known) undoes it; on an error, ErrSeriesLimit, ErrTooLarge or ErrClock,
// nothing was inserted.
//
// The batch gets the names only if it vouches for the scrapes. If all samples of a scrape
// are dropped for their time, this server's clock may be the wrong one; and of several
// scrapes in a push nothing tells to which of them a sample belongs.
func (c *Cluster) Prepare(p *Push, names SpoolNames, now Span, retention time.Duration, limit int) (b *Batch, known int, res AppendResult, err error) {
	if len(p.Samples) > maxBatch {
		return nil, 0, res, fmt.Errorf("%w: a push of %d samples; at most %d", ErrTooLarge, len(p.Samples), maxBatch)
	}
	b = &Batch{Seq: c.Seq + 1, Accepted: now.Early.UnixMilli(), T0: now.Early.UnixMilli()}
	oldest, newest := now.Early.Add(-retention).UnixMilli(), now.Late.Add(maxAhead).UnixMilli()
	sureOldest, sureNewest := now.Late.Add(-retention).UnixMilli(), now.Early.Add(maxAhead).UnixMilli()
	entries := make([]entry, 0, len(p.Samples))
	known = c.Table.Len()
	for _, smp := range p.Samples {
		if smp.T < oldest {
			res.TooOld++
			continue
		}
		if smp.T > newest {
			res.Future++
			continue
		}
		if smp.T < sureOldest || smp.T > sureNewest {
			c.Table.Truncate(known)
			return nil, known, AppendResult{}, ErrClock
		}
		line := p.Line(smp)
		id, hash, ok := c.Table.Find(line)
		if !ok {
			if n := c.Table.Len(); limit > 0 && n >= limit || n > MaxSeriesID || !c.Table.HasRoom(len(line)) {
				c.Table.Truncate(known)
				return nil, known, res, fmt.Errorf("%w: more than the %d that may be held for a cluster", ErrSeriesLimit, limit)
			}
			if max := max(minTextLimit, seriesBytes*limit); limit > 0 && c.Table.TextBytes()+len(line) > max {
				c.Table.Truncate(known)
				return nil, known, res, fmt.Errorf("%w: names and labels of more than the %d bytes that may be held for a cluster", ErrSeriesLimit, max)
			}
			id = c.Table.Insert(hash, line, !LegacyLine(line))
		}
		entries = append(entries, entry{id: id, t: smp.T, v: smp.V})
	}
	entries = c.novel(entries, &res)
	res.Accepted = len(entries)
	if !res.Untimely() && (res.TooOld+res.Future == 0 || names.Single()) && len(names.Numbers) > 0 {
		b.Names = names
	}
	b.IDs, b.DT, b.V = make([]uint32, len(entries)), make([]int32, len(entries)), make([]float64, len(entries))
	if len(entries) > 0 {
		b.T0 = entries[0].t
	}
	for i, e := range entries {
		// Both times are within retention, so the difference fits.
		b.IDs[i], b.DT[i], b.V[i] = e.id, int32(e.t-b.T0), e.v
	}
	b.Bound()
	return b, known, res, nil
}

// novel leaves out what is held already, by series and time, and orders the
// rest for a batch: the first sample of every series by ID, then the second …
func (c *Cluster) novel(entries []entry, res *AppendResult) []entry {
	byTime := func(a, b entry) int { return cmp.Or(cmp.Compare(a.id, b.id), cmp.Compare(a.t, b.t)) }
	if !slices.IsSortedFunc(entries, byTime) {
		slices.SortStableFunc(entries, byTime)
	}
	repeat := func(e entry, v float64) {
		if math.Float64bits(e.v) == math.Float64bits(v) {
			res.Duplicates++
		} else {
			res.Conflicts++
		}
	}
	type key struct {
		id uint32
		t  int64
	}
	late := map[key]float64{} // may be held: older than the newest of their series
	times := map[int64]bool{} // of those
	out := entries[:0]
	for _, e := range entries {
		if n := len(out); n > 0 && out[n-1].id == e.id && out[n-1].t == e.t {
			repeat(e, out[n-1].v)
			continue
		}
		lastT, lastV := c.Table.Newest(e.id)
		if e.t == lastT {
			repeat(e, lastV)
			continue
		}
		if e.t < lastT {
			late[key{e.id, e.t}], times[e.t] = e.v, true
		}
		out = append(out, e)
	}
	if len(late) > 0 {
		held := map[key]bool{}
		for _, old := range c.Batches {
			if old.DT == nil && !times[old.T0] {
				continue
			}
			for i, id := range old.IDs {
				k := key{id, old.Time(i)}
				if !times[k.t] {
					continue
				}
				if v, ok := late[k]; ok && !held[k] {
					held[k] = true
					repeat(entry{v: v}, old.V[i])
				}
			}
		}
		out = slices.DeleteFunc(out, func(e entry) bool { return held[key{e.id, e.t}] })
	}
	several := false
	for i := 1; i < len(out); i++ {
		if out[i].id == out[i-1].id {
			out[i].round = out[i-1].round + 1
			several = true
		}
	}
	if several {
		slices.SortStableFunc(out, func(a, b entry) int { return cmp.Compare(a.round, b.round) })
	}
	return out
}

// Restore puts a line at its ID. It is checked as strictly as a line from
// outside: after damage, bytes that a site chose may have been taken for a
// record. All lines have to name one cluster, for which owner returns true.
func (c *Cluster) Restore(parser *Parser, owner func(cluster string) bool, id uint32, line []byte) error {
	name, labels, err := parser.Check(line)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(labels, func(l Label) bool { return string(l.Name) == ClusterLabel })
	if i < 0 || string(labels[i].Value) != c.ID && (c.ID != "" || !owner(string(labels[i].Value))) {
		return fmt.Errorf("series %s is not of this cluster", Excerpt(line))
	}
	c.ID = string(labels[i].Value)
	if n := c.Table.Len(); int(id) < n || int(id) > n+maxGap {
		return fmt.Errorf("series ID %d after %d", id, n)
	}
	c.Table.Pad(id) // IDs that damage took
	_, hash, _ := c.Table.Find(line)
	c.Table.Insert(hash, line, !Legacy(name, labels))
	return nil
}

// Adopt takes a recovered batch. It returns how many of its samples are lost, because
// damage took their series; the others are held.
func (c *Cluster) Adopt(b *Batch) (lost int, err error) {
	if b.Seq <= c.Seq {
		return 0, fmt.Errorf("batch %d after %d", b.Seq, c.Seq)
	}
	c.Seq, c.Accepted = b.Seq, max(c.Accepted, b.Accepted)
	lost = len(b.V)
	b = b.Where(func(i int) bool { return int(b.IDs[i]) < c.Table.Len() && len(c.Table.Line(b.IDs[i])) > 0 })
	lost -= len(b.V)
	if len(b.V) > 0 || b.Names.ID != 0 {
		c.replace(b)
		c.Take(b)
	}
	return lost, nil
}

// Distrust drops batches whose number is above most, which no true batch has. After
// damage, bytes that a site chose may have been taken for a record; its number would raise
// the numbers of all clusters until none is left.
func (c *Cluster) Distrust(most uint64) {
	if c.Seq <= most {
		return
	}
	c.Batches = slices.DeleteFunc(c.Batches, func(b *Batch) bool { return b.Seq > most })
	c.Seq = 0
	if n := len(c.Batches); n > 0 {
		c.Seq = c.Batches[n-1].Seq
	}
}

// replace drops what b has from earlier batches. They were evicted, and then b came; the
// log was not rewritten in between.
func (c *Cluster) replace(b *Batch) {
	type key struct {
		id uint32
		t  int64
	}
	again := map[key]bool{}
	first := int64(math.MaxInt64)
	for i, id := range b.IDs {
		if newest, _ := c.Table.Newest(id); b.Time(i) <= newest {
			again[key{id, b.Time(i)}] = true
			first = min(first, b.Time(i))
		}
	}
	if len(again) == 0 {
		return
	}
	for i, old := range c.Batches {
		if old.MaxT >= first && old.MinT <= b.MaxT {
			c.Batches[i] = old.Where(func(i int) bool { return !again[key{old.IDs[i], old.Time(i)}] })
		}
	}
	c.Batches = slices.DeleteFunc(c.Batches, func(old *Batch) bool { return len(old.V) == 0 && old.Names.ID == 0 })
}

// Take holds b, which is durable, and shows its samples.
func (c *Cluster) Take(b *Batch) {
	b.Pack()
	if n := len(c.Batches); n > 0 && slices.Equal(c.Batches[n-1].IDs, b.IDs) {
		b.IDs = c.Batches[n-1].IDs
	}
	c.Seq, c.Accepted = max(c.Seq, b.Seq), max(c.Accepted, b.Accepted) // Compact takes older ones
	c.Batches = append(c.Batches, b)
	c.Spools.Add(b.Names, b.Seq)
	c.minT = min(c.minT, b.MinT)
	c.show(b)
}

func (c *Cluster) show(b *Batch) {
	for i, id := range b.IDs {
		c.Table.Show(id, b.Time(i), b.V[i])
	}
}

// AppendSeriesRecords frames the series of t from ID from on.
func AppendSeriesRecords(frames []byte, t *SeriesTable, from int) []byte {
	for from < t.Len() {
		next, size := from, 0
		payload := EncodeSeries(nil, uint32(from), func(yield func([]byte) bool) {
			for next < t.Len() && size < recordBytes {
				line := t.Line(uint32(next))
				next, size = next+1, size+len(line)
				if !yield(line) {
					return
				}
			}
		})
		frames = AppendRecord(frames, RecordSeries, payload)
		from = next
	}
	return frames
}

// Compact returns what is held since oldest, and more, without the series that have
// no sample left, which renumbers the others. c may be read meanwhile, and stays as
// it is.
func (c *Cluster) Compact(more []*Batch, oldest int64) Cluster {
	next := Cluster{ID: c.ID, Seq: c.Seq, Accepted: c.Accepted, oldest: c.oldest, minT: math.MaxInt64}
	oldest = max(oldest, c.oldest)
	var held []*Batch
	for _, b := range c.Batches {
		if b = b.Where(func(i int) bool { return b.Time(i) >= oldest }); len(b.V) > 0 || b.Names.ID != 0 && b.MaxT >= oldest {
			held = append(held, b)
		}
	}
	held = append(held, more...)
	used := make([]bool, c.Table.Len())
	for _, b := range held {
		for _, id := range b.IDs {
			used[id] = true
		}
	}
	var ids []uint32
	next.Table, ids = c.Table.Keep(used)
	for _, b := range held {
		n := *b
		n.IDs = make([]uint32, len(b.IDs))
		for i, id := range b.IDs {
			n.IDs[i] = ids[id]
		}
		next.Take(&n) // shares equal lists of IDs again
	}
	next.Spools = c.Spools.Clone()
	for _, b := range more {
		next.Spools.Add(b.Names, b.Seq)
	}
	return next
}

// RestoreSpools takes what a record kept of the spools, and the names in the batches. After
// damage to the log no scrape counts as held, because a batch may name a scrape of which
// another batch, which is lost, had a part.
func (c *Cluster) RestoreSpools(kept SiteSpools, damaged bool) {
	c.Spools = kept
	if !damaged {
		for _, b := range c.Batches {
			if !c.Spools.Knows(b.Names) {
				c.Spools.Add(b.Names, b.Seq)
			}
		}
		return
	}
	c.Spools.DropHeld()
	for i, b := range c.Batches {
		k := *b
		k.Names = SpoolNames{}
		c.Batches[i] = &k
	}
	c.Batches = slices.DeleteFunc(c.Batches, func(b *Batch) bool { return len(b.V) == 0 })
}

// Records calls yield with framed records that make up the log of c.
func (c *Cluster) Records(yield func(frames []byte) bool) {
	if !yield(AppendSeriesRecords(nil, c.Table, 0)) {
		return
	}
	batches := c.Batches
	if n := len(batches); n == 0 || batches[n-1].Seq < c.Seq {
		// Sequence numbers never start again.
		batches = append(slices.Clip(batches), &Batch{Seq: c.Seq, Accepted: c.Accepted})
	}
	var frames, payload []byte
	for _, b := range batches {
		payload = EncodeBatch(payload[:0], b)
		frames = AppendRecord(frames[:0], RecordBatch, payload)
		if !yield(frames) {
			return
		}
	}
	// Behind the batches: a log that is cut short must not claim scrapes that it lost.
	for _, payload := range c.Spools.Records() {
		if !yield(AppendRecord(nil, RecordSpool, payload)) {
			return
		}
	}
}

// Expire expires the samples older than oldest. It returns how many these are, how many of
// them are lost because they were not read, and how many samples left memory. read returns
// up to which batch all is read. owned is false if another server owns the site: then a
// client with a spool has pushed to that server what was not read here, and nothing of it is
// lost. A batch leaves memory when all of its samples have expired.
func (c *Cluster) Expire(oldest int64, read func() uint64, owned bool) (expired, unread, freed int64) {
	from := c.oldest
	c.oldest = max(c.oldest, oldest)
	if c.minT >= oldest || from >= oldest {
		return 0, 0, 0
	}
	c.minT = math.MaxInt64
	gone := false
	for _, b := range c.Batches {
		if n := b.Between(from, oldest); n > 0 {
			expired += n
			if (owned || b.Names.ID == 0) && b.Seq > read() {
				unread += n
			}
		}
		if b.MaxT < oldest {
			freed, gone = freed+int64(len(b.V)), true
		} else {
			c.minT = min(c.minT, b.MinT)
		}
	}
	if gone {
		c.Batches = slices.DeleteFunc(slices.Clone(c.Batches), func(b *Batch) bool { return b.MaxT < oldest })
	}
	return expired, unread, freed
}

// Resume expires the samples older than oldest without counting them: the process that ran
// when they expired did.
func (c *Cluster) Resume(oldest int64) {
	c.oldest = max(c.oldest, oldest)
	c.Batches = slices.DeleteFunc(c.Batches, func(b *Batch) bool { return b.MaxT < c.oldest })
}

// Follow repeats in c, which is a compacted copy of old, what expired or was evicted in old
// since the copy was made.
func (c *Cluster) Follow(old *Cluster) {
	c.Resume(old.oldest)
	first := old.Seq + 1 // of what is still held, or came with the compaction
	if len(old.Batches) > 0 {
		first = old.Batches[0].Seq
	}
	c.Batches = slices.DeleteFunc(c.Batches, func(b *Batch) bool { return b.Seq < first })
}

// since returns the batches of which a reader has not had all.
func (c *Cluster) since(after Position) []*Batch {
	i, had := slices.BinarySearchFunc(c.Batches, after.Seq, func(b *Batch, seq uint64) int { return cmp.Compare(b.Seq, seq) })
	if had {
		i++
	}
	return c.Batches[i:]
}

// Unread returns how many samples a reader has not had.
func (c *Cluster) Unread(after Position) int {
	n := 0
	for _, b := range c.since(after) {
		had := after.In(b)
		if b.MinT >= c.oldest {
			n += len(b.V) - had
			continue
		}
		for i := had; i < len(b.V); i++ {
			if b.Time(i) >= c.oldest {
				n++
			}
		}
	}
	return n
}

// Read calls emit with samples that a reader has not had, by name, and those of a
// series in the order of time: at most most samples, oldest batches first, and with
// single one of a series. It stops at a sample that is older than oldest and has not
// expired, which is one of a clock in doubt. If
// none is left after that it also calls it with the newest of each series since minT
// that was had before, if spare allows them all. It returns how far the reader is with
// that, and how many it had not had.
func (c *Cluster) Read(after Position, most, spare int, single bool, oldest, minT int64, emit func(name string, l Line)) (to Position, n int) {
	entries, to, whole := c.unread(after, most, single, oldest)
	n = len(entries)
	again := whole && c.Table.Len() <= spare
	if n == 0 && !again {
		return to, 0
	}
	byTime := func(a, b entry) int { return cmp.Or(cmp.Compare(a.id, b.id), cmp.Compare(a.t, b.t)) }
	if !slices.IsSortedFunc(entries, byTime) {
		slices.SortFunc(entries, byTime)
	}
	first := make([]uint32, c.Table.Len()+1) // where the entries of each ID begin
	for _, e := range entries {
		first[e.id+1]++
	}
	for id := range c.Table.Len() {
		first[id+1] += first[id]
	}
	c.Table.Each(math.MinInt64, func(id uint32, name string, l Line) {
		newest, value := l.T, l.V
		own := entries[first[id]:first[id+1]]
		for _, e := range own {
			l.T, l.V = e.t, e.v
			emit(name, l)
		}
		if k := len(own); again && newest >= minT && (k == 0 || !single && own[k-1].t < newest) {
			l.T, l.V = newest, value
			emit(name, l)
		}
	})
	return to, n
}

// unread returns samples that a reader has not had, and whether that is all of them.
func (c *Cluster) unread(after Position, most int, single bool, oldest int64) (entries []entry, to Position, whole bool) {
	to = after
	var seen map[uint32]bool
	if single {
		seen = map[uint32]bool{}
	}
	for _, b := range c.since(after) {
		for i := after.In(b); i < len(b.V); i++ {
			t := b.Time(i)
			if t < c.oldest {
				continue
			}
			// The samples of a batch come in rounds of one for each series: a series
			// that comes again begins the next.
			if len(entries) == most || single && seen[b.IDs[i]] || t < oldest {
				return entries, Position{Seq: to.Seq, Part: b.Seq, N: i, Of: len(b.V)}, false
			}
			if single {
				seen[b.IDs[i]] = true
			}
			entries = append(entries, entry{id: b.IDs[i], t: t, v: b.V[i]})
		}
		to = Position{Seq: b.Seq}
	}
	return entries, to, true
}

// Head returns when the oldest batch was accepted, in ms, and math.MaxInt64 if
// none is held.
func (c *Cluster) Head() int64 {
	if len(c.Batches) == 0 {
		return math.MaxInt64
	}
	return c.Batches[0].Accepted
}

// Evictable reports whether there is an oldest batch that is not above read, up to which
// all is read, and of which no scrape that shows samples since shown shows any.
func (c *Cluster) Evictable(shown int64, read uint64) bool {
	if len(c.Batches) == 0 {
		return false
	}
	b := c.Batches[0]
	if b.Seq > read {
		return false
	}
	for i, id := range b.IDs {
		if t, _ := c.Table.Newest(id); t == b.Time(i) && t >= shown {
			return false
		}
	}
	return true
}

// Evict drops the oldest batch and returns the samples dropped. The batch's
// memory is free when Batches is next copied.
func (c *Cluster) Evict() int64 {
	n := int64(len(c.Batches[0].V))
	c.Batches = c.Batches[1:]
	return n
}
