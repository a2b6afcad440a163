package main

// The series and batches of one site, in memory. No (series, time) is held twice. Within a
// batch and from batch to batch the new samples of a series ascend, late ones excepted. Pure:
// no I/O and no locks.

import (
	"errors"
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

// SiteData is what is held of one cluster. It is not safe for concurrent use; but
// a batch, once taken, never changes, nor does a line.
type SiteData struct {
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

// NewSiteData returns an empty one; for the seed see NewSeriesTable.
func NewSiteData(id string, seed maphash.Seed) SiteData {
	return SiteData{ID: id, Table: NewSeriesTable(seed, 0), oldest: math.MinInt64, minT: math.MaxInt64}
}

// Begin has the first batch's sequence number follow seq.
func (d *SiteData) Begin(seq uint64) { d.begin, d.Seq = seq, seq }

// Virgin reports that nothing was ever taken.
func (d *SiteData) Virgin() bool { return d.Seq == d.begin }

// Samples returns the number of samples held.
func (d *SiteData) Samples() int64 {
	n := 0
	for _, b := range d.Batches {
		n += len(b.V)
	}
	return int64(n)
}

// Bytes estimates the size of a log of just what is held, rather too high than
// too low.
func (d *SiteData) Bytes() int64 {
	const frame = 16 // of a record; of a line it is 3 at most
	n := 5*frame + len(d.ID) + 3*d.Table.Len() + d.Table.TextBytes()
	for _, b := range d.Batches {
		n += frame + b.Size
	}
	return int64(n)
}

// Take holds b, which is durable, and shows its samples.
func (d *SiteData) Take(b *Batch) {
	b.Pack()
	if n := len(d.Batches); n > 0 && slices.Equal(d.Batches[n-1].IDs, b.IDs) {
		b.IDs = d.Batches[n-1].IDs
	}
	d.Seq, d.Accepted = max(d.Seq, b.Seq), max(d.Accepted, b.Accepted) // Compact takes older ones
	d.Batches = append(d.Batches, b)
	d.Spools.AddHeld(b.Names, b.Seq)
	d.minT = min(d.minT, b.MinT)
	d.show(b)
}

func (d *SiteData) show(b *Batch) {
	for i, id := range b.IDs {
		d.Table.Show(id, b.Time(i), b.V[i])
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
func (d *SiteData) Compact(more []*Batch, oldest int64) SiteData {
	next := SiteData{ID: d.ID, Seq: d.Seq, Accepted: d.Accepted, oldest: d.oldest, minT: math.MaxInt64}
	oldest = max(oldest, d.oldest)
	var held []*Batch
	for _, b := range d.Batches {
		if b = b.Where(func(i int) bool { return b.Time(i) >= oldest }); len(b.V) > 0 || b.Names.ID != 0 && b.MaxT >= oldest {
			held = append(held, b)
		}
	}
	held = append(held, more...)
	used := make([]bool, d.Table.Len())
	for _, b := range held {
		for _, id := range b.IDs {
			used[id] = true
		}
	}
	var ids []uint32
	next.Table, ids = d.Table.Keep(used)
	for _, b := range held {
		n := *b
		n.IDs = make([]uint32, len(b.IDs))
		for i, id := range b.IDs {
			n.IDs[i] = ids[id]
		}
		next.Take(&n) // shares equal lists of IDs again
	}
	next.Spools = d.Spools.Clone()
	for _, b := range more {
		next.Spools.AddHeld(b.Names, b.Seq)
	}
	return next
}

// Records calls yield with framed records that make up the log of c.
func (d *SiteData) Records(yield func(frames []byte) bool) {
	if !yield(AppendSeriesRecords(nil, d.Table, 0)) {
		return
	}
	batches := d.Batches
	if n := len(batches); n == 0 || batches[n-1].Seq < d.Seq {
		// Sequence numbers never start again.
		batches = append(slices.Clip(batches), &Batch{Seq: d.Seq, Accepted: d.Accepted})
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
	for _, payload := range d.Spools.Records() {
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
func (d *SiteData) Expire(oldest int64, read func() uint64, owned bool) (expired, unread, freed int64) {
	from := d.oldest
	d.oldest = max(d.oldest, oldest)
	if d.minT >= oldest || from >= oldest {
		return 0, 0, 0
	}
	d.minT = math.MaxInt64
	gone := false
	for _, b := range d.Batches {
		if n := b.Between(from, oldest); n > 0 {
			expired += n
			if (owned || b.Names.ID == 0) && b.Seq > read() {
				unread += n
			}
		}
		if b.MaxT < oldest {
			freed, gone = freed+int64(len(b.V)), true
		} else {
			d.minT = min(d.minT, b.MinT)
		}
	}
	if gone {
		d.Batches = slices.DeleteFunc(slices.Clone(d.Batches), func(b *Batch) bool { return b.MaxT < oldest })
	}
	return expired, unread, freed
}

// Resume expires the samples older than oldest without counting them: the process that ran
// when they expired did.
func (d *SiteData) Resume(oldest int64) {
	d.oldest = max(d.oldest, oldest)
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.MaxT < d.oldest })
}

// Follow repeats in c, which is a compacted copy of old, what expired or was evicted in old
// since the copy was made.
func (d *SiteData) Follow(old *SiteData) {
	d.Resume(old.oldest)
	first := old.Seq + 1 // of what is still held, or came with the compaction
	if len(old.Batches) > 0 {
		first = old.Batches[0].Seq
	}
	d.Batches = slices.DeleteFunc(d.Batches, func(b *Batch) bool { return b.Seq < first })
}

// Head returns when the oldest batch was accepted, in ms, and math.MaxInt64 if
// none is held.
func (d *SiteData) Head() int64 {
	if len(d.Batches) == 0 {
		return math.MaxInt64
	}
	return d.Batches[0].Accepted
}

// Evictable reports whether there is an oldest batch that is not above read, up to which
// all is read, and of which no scrape that shows samples since shown shows any.
func (d *SiteData) Evictable(shown int64, read uint64) bool {
	if len(d.Batches) == 0 {
		return false
	}
	b := d.Batches[0]
	if b.Seq > read {
		return false
	}
	for i, id := range b.IDs {
		if t, _ := d.Table.Newest(id); t == b.Time(i) && t >= shown {
			return false
		}
	}
	return true
}

// Evict drops the oldest batch and returns the samples dropped. The batch's
// memory is free when Batches is next copied.
func (d *SiteData) Evict() int64 {
	n := int64(len(d.Batches[0].V))
	d.Batches = d.Batches[1:]
	return n
}
