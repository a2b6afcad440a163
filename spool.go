package main

// The client's spool: scrapes wait here, on disk and oldest first, until a server
// has them. Invariants: what Add put on disk survives a crash at any moment and
// is handed out until it is removed, set aside or counted as dropped; no other scrape
// waits for one that is damaged or cannot be read; a failing disk costs durability,
// not scrapes, as long as memory allows. It must not know of HTTP, servers or scraping.

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A scrape, or a piece of one, is a file of its own: a log of one record whose
// kind is the version. Its name is a sequence number, its identity the cluster
// ID. Beside <number>.log may lie <number>.log.refused (a server will not have
// it) and <number>.log.damaged; neither is ever sent, and renaming one back makes
// the next OpenSpool take it again.
const (
	// MaxPiece and MaxPieceText bound one scrape in the spool: the bytes of its
	// gzip and of its text.
	MaxPiece     = 32 << 20
	MaxPieceText = 8 * MaxPiece

	spoolKind     = 1
	spoolDigits   = 16 // of a name
	spoolRefused  = ".refused"
	spoolDamaged  = ".damaged"
	spoolTemp     = ".tmp"
	maxSpoolAside = 16              // files of both kinds kept
	spoolBlock    = 4096            // a file takes a multiple of it
	spoolMemory   = 16 << 20        // bytes kept in memory while the disk fails
	maxWriteBack  = 8               // of these scrapes, put on disk with each that follows
	maxUnread     = 2               // files in vain in one Next, since each takes long
	spoolOnlyMem  = 64 << 20        // bytes kept in memory without a directory
	spoolPerEntry = 256             // bytes of memory beside the gzip
	spoolFrame    = 64              // bytes at most of a file beside its payload and identity
	spoolHead     = 3*8 + 2*4 + 1   // bytes of a payload before the boot ID
	maxSpoolTime  = 1 << 50         // ms; some 35,000 years
	maxSpoolID    = 64              // bytes of a boot ID
	sameClock     = 2 * time.Second // by which the source's clock may seem to move within one push
	shortestLine  = 4               // "a 0\n"
)

// Reasons for which a spool drops scrapes.
const (
	DropSpoolFull    = "spool_full"
	DropSpoolOld     = "spool_old"
	DropSpoolDamaged = "spool_damaged"
	DropSpoolClosed  = "spool_closed" // held in memory only when the process ended
)

// Moment is an instant by the client's clocks, in ms. Boot counts since boot,
// and is comparable only where the boot ID is the same.
type Moment struct {
	Wall, Boot int64
	BootID     string
}

// Since returns the time from an earlier moment: by the boot-time clock, and by
// the wall clock only if the machine was booted in between (or its boot-time clock
// contradicts its ID, as in a container that was started again). It is never
// negative.
func (m Moment) Since(then Moment) time.Duration {
	ms := m.Wall - then.Wall
	if m.BootID == then.BootID && m.Boot >= then.Boot {
		ms = m.Boot - then.Boot
	}
	return time.Duration(max(0, ms)) * time.Millisecond
}

// Scrape is a cleaned scrape, or a piece of one.
type Scrape struct {
	At      Moment // when the source answered
	Source  int64  // what the source's clock showed then, in ms since the epoch
	Samples int
	Size    int    // bytes of the text exposition of the samples
	Gzip    []byte // the text, compressed; immutable
}

// offset is how far the source's clock is from the boot-time clock.
func (sc *Scrape) offset() int64 { return sc.Source - sc.At.Boot }

// ErrSpoolRead: the spool has scrapes and none of them can be read.
var ErrSpoolRead = errors.New("reading spool")
var errBadScrape = errors.New("not a spooled scrape")

// isLost reports an error that says that a scrape's file is gone or damaged. After another
// error the file may be good.
func isLost(err error) bool { return errors.Is(err, errBadScrape) || errors.Is(err, fs.ErrNotExist) }

// appendScrape appends the payload of the scrape's record:
//
//	int64 source, boot, wall; uint32 samples, size; byte length of the boot ID; boot ID; gzip
func appendScrape(b []byte, sc *Scrape) []byte {
	for _, ms := range []int64{sc.Source, sc.At.Boot, sc.At.Wall} {
		b = binary.LittleEndian.AppendUint64(b, uint64(ms))
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(sc.Samples))
	b = binary.LittleEndian.AppendUint32(b, uint32(sc.Size))
	b = append(append(b, byte(len(sc.At.BootID))), sc.At.BootID...)
	return append(b, sc.Gzip...)
}

// decodeScrape is strict, since it may be given what only looks like a record.
// With text it also decompresses, which says whether a server could read it. The
// result's gzip is part of payload.
func decodeScrape(payload []byte, text bool) (sc Scrape, err error) {
	if len(payload) < spoolHead {
		return sc, fmt.Errorf("%w: %d bytes", errBadScrape, len(payload))
	}
	for i, ms := range []*int64{&sc.Source, &sc.At.Boot, &sc.At.Wall} {
		*ms = int64(binary.LittleEndian.Uint64(payload[8*i:]))
	}
	samples, size := binary.LittleEndian.Uint32(payload[24:]), binary.LittleEndian.Uint32(payload[28:])
	id, rest := int(payload[32]), payload[spoolHead:]
	if id > len(rest) {
		return sc, fmt.Errorf("%w: a boot ID of %d bytes in %d", errBadScrape, id, len(rest))
	}
	sc.Samples, sc.Size = int(samples), int(min(size, MaxPieceText+1))
	sc.At.BootID, sc.Gzip = string(rest[:id]), rest[id:]
	if err := sc.check(); err != nil || !text {
		return sc, err
	}
	return sc, sc.checkText()
}

// check looks at all but the text.
func (sc *Scrape) check() error {
	for _, ms := range []int64{sc.Source, sc.At.Boot, sc.At.Wall} {
		if ms < 0 || ms > maxSpoolTime {
			return fmt.Errorf("%w: a clock at %d ms", errBadScrape, ms)
		}
	}
	for _, b := range []byte(sc.At.BootID) {
		if b <= ' ' || b > '~' {
			return fmt.Errorf("%w: boot ID %q", errBadScrape, sc.At.BootID)
		}
	}
	switch {
	case len(sc.At.BootID) == 0 || len(sc.At.BootID) > maxSpoolID:
		return fmt.Errorf("%w: a boot ID of %d bytes", errBadScrape, len(sc.At.BootID))
	case sc.Size > MaxPieceText || sc.Samples > sc.Size/shortestLine || sc.Samples == 0 && sc.Size > 0:
		return fmt.Errorf("%w: %d samples in %d bytes of text", errBadScrape, sc.Samples, sc.Size)
	case len(sc.Gzip) > MaxPiece || !bytes.HasPrefix(sc.Gzip, []byte{0x1f, 0x8b, 8}):
		return fmt.Errorf("%w: %d bytes that are not gzip", errBadScrape, len(sc.Gzip))
	}
	return nil
}

// checkText decompresses, and compares with what is stated of the text.
func (sc *Scrape) checkText() error {
	z, err := gzip.NewReader(bytes.NewReader(sc.Gzip))
	if err != nil {
		return fmt.Errorf("%w: %w", errBadScrape, err)
	}
	var c lineCounter
	if _, err := io.Copy(&c, io.LimitReader(z, int64(sc.Size)+1)); err != nil {
		return fmt.Errorf("%w: %w", errBadScrape, err)
	}
	if c.bytes != sc.Size || c.lines != sc.Samples || c.bytes > 0 && c.last != '\n' {
		return fmt.Errorf("%w: %d lines in %d bytes, instead of %d in %d", errBadScrape, c.lines, c.bytes, sc.Samples, sc.Size)
	}
	return nil
}

type lineCounter struct {
	bytes, lines int
	last         byte
}

func (c *lineCounter) Write(p []byte) (int, error) {
	if len(p) > 0 {
		c.bytes += len(p)
		c.lines += bytes.Count(p, []byte{'\n'})
		c.last = p[len(p)-1]
	}
	return len(p), nil
}

// SpoolConfig configures a Spool.
type SpoolConfig struct {
	FS      FS
	Dir     string // "" holds scrapes in memory only
	Cluster string // the cluster ID whose scrapes are held
	Limit   int64  // bytes on disk
	MaxAge  time.Duration
	Now     func() Moment
	// OnError is told what failed, or was found damaged; OnDrop, which scrapes
	// were given up, once for each occasion. Both are called without locks held,
	// by whoever calls the spool.
	OnError func(error)
	OnDrop  func(reason string, scrapes, samples int)
}

// Spool holds scrapes. One goroutine may call Add while another calls Next,
// Remove, SetAside and Release; Stats may be called by any. Open and Close are
// called alone.
type Spool struct {
	cfg    SpoolConfig
	unlock func() error
	next   uint64 // sequence number of the next scrape; Add's alone
	// Of Next's goroutine alone: the names of files set aside, oldest first, and the number
	// from which on Next reads files, because those before it failed.
	aside []string
	from  uint64

	mu      sync.Mutex   // guards the rest; never held across I/O
	entries []spoolEntry // oldest first
	disk    int64        // bytes
	memory  int64        // bytes
}

// spoolEntry is what is known of a scrape without reading it. Gzip is nil unless
// the scrape is in memory; a file may lie there even so, if writing it failed
// late.
type spoolEntry struct {
	Scrape
	seq    uint64
	packed int   // bytes of the gzip
	cost   int64 // bytes of disk, or of memory
	taken  bool  // handed out by Next, and not to be dropped
}

func (e *spoolEntry) inMemory() bool { return e.Gzip != nil }
func (e *spoolEntry) isTaken() bool  { return e.taken }

// OpenSpool opens the spool in cfg.Dir, and makes the directory if need be.
// A damaged file is set aside and told to OnError. A file that cannot be read is an error,
// and so are scrapes of another cluster ID: they must not be sent under this one.
func OpenSpool(cfg SpoolConfig) (*Spool, error) {
	s := &Spool{cfg: cfg, next: 1, unlock: func() error { return nil }}
	if cfg.Dir == "" {
		return s, nil
	}
	if _, real := cfg.FS.(DiskFS); real {
		unlock, err := LockDir(cfg.Dir)
		if err != nil {
			return nil, fmt.Errorf("opening spool: %w", err)
		}
		s.unlock = unlock
	}
	if err := s.recover(); err != nil {
		return nil, errors.Join(fmt.Errorf("opening spool: %w", err), s.unlock())
	}
	return s, nil
}

func (s *Spool) recover() error {
	// Syncs the directory too: what a killed process renamed is durable from here on.
	if _, _, err := ListLogs(s.cfg.FS, s.cfg.Dir); err != nil {
		return err
	}
	list, err := ReadAgain(func() ([]fs.DirEntry, error) { return s.cfg.FS.ReadDir(s.cfg.Dir) })
	if err != nil {
		return err
	}
	var seqs []uint64
	for _, e := range list {
		name := e.Name()
		seq, rest, ok := parseSpoolName(name)
		if !ok || !e.Type().IsRegular() {
			continue
		}
		s.next = max(s.next, seq+1)
		switch {
		case rest == "":
			seqs = append(seqs, seq)
		case strings.HasSuffix(rest, spoolTemp): // a crash cut its writing short
			if err := s.cfg.FS.Remove(s.path(name)); err != nil {
				s.cfg.OnError(fmt.Errorf("removing leftover: %w", err))
			}
		case strings.HasPrefix(rest, spoolRefused), strings.HasPrefix(rest, spoolDamaged):
			s.aside = append(s.aside, name)
		}
	}
	slices.Sort(s.aside)
	slices.Sort(seqs)
	for _, seq := range seqs {
		e, identity, err := s.read(seq, false)
		if err == nil && identity != s.cfg.Cluster {
			return fmt.Errorf("%s holds scrapes of cluster ID %q, not of %q: give each its own --spool-dir, or move the scrapes away",
				s.cfg.Dir, identity, s.cfg.Cluster)
		}
		if isLost(err) {
			s.cfg.OnError(err)
			s.setAside(seq, spoolDamaged)
			continue
		}
		if err != nil {
			return err
		}
		e.Gzip = nil
		s.entries = append(s.entries, e)
		s.disk += e.cost
	}
	return nil
}

func spoolName(seq uint64) string { return fmt.Sprintf("%0*d%s", spoolDigits, seq, LogSuffix) }

// parseSpoolName returns the number of a name and what follows LogSuffix.
func parseSpoolName(name string) (seq uint64, rest string, ok bool) {
	digits, rest, found := strings.Cut(name, LogSuffix)
	seq, err := strconv.ParseUint(digits, 10, 64)
	return seq, rest, found && err == nil && len(digits) == spoolDigits
}

func (s *Spool) path(name string) string { return filepath.Join(s.cfg.Dir, name) }

// read reads a file; with text it vouches for all of it, and the entry has the
// gzip. isLost tells two kinds of its errors apart.
func (s *Spool) read(seq uint64, text bool) (e spoolEntry, identity string, err error) {
	path := s.path(spoolName(seq))
	n := 0
	log, rec, err := OpenLog(s.cfg.FS, path, func(kind byte, payload []byte) error {
		n++
		if kind != spoolKind || n > 1 {
			return errBadScrape
		}
		sc, err := decodeScrape(payload, text)
		if err != nil {
			return err
		}
		e = spoolEntry{Scrape: sc, seq: seq, packed: len(sc.Gzip)}
		e.Gzip = bytes.Clone(sc.Gzip)
		return nil
	})
	if err != nil {
		return e, "", err
	}
	// It is written whole or not at all, so anything else than one good record is
	// no work of Add.
	if rec.Records != 1 || rec.Damaged > 0 || rec.HeaderDamaged || rec.TornBytes > 0 {
		return e, "", fmt.Errorf("%w: %s is damaged (%d bytes lost)", errBadScrape, path, rec.LostBytes+rec.TornBytes)
	}
	if rec.Err != nil {
		s.cfg.OnError(rec.Err) // it can be read, and so be sent
	}
	e.cost = blocks(log.Size())
	return e, string(log.Identity()), nil
}

func blocks(size int64) int64 { return (size + spoolBlock - 1) / spoolBlock * spoolBlock }

// Add holds a scrape: durably, unless it returns an error, which is that of the
// disk; then it is held in memory, until the disk works again. The oldest scrapes are
// dropped as the limits ask for it.
func (s *Spool) Add(sc Scrape) error {
	if err := sc.check(); err != nil {
		s.cfg.OnDrop(DropSpoolDamaged, 1, sc.Samples)
		return fmt.Errorf("spooling: %w", err)
	}
	s.dropOld()
	e := spoolEntry{Scrape: sc, seq: s.next, packed: len(sc.Gzip)}
	s.next++
	var err error
	if s.cfg.Dir != "" {
		payload := appendScrape(nil, &sc)
		if !s.makeRoom(s.fileBytes(payload), false) {
			s.cfg.OnDrop(DropSpoolFull, 1, sc.Samples)
			return nil
		}
		if e.cost, err = s.write(e.seq, payload); err == nil {
			e.Gzip = nil
		}
	}
	if e.inMemory() {
		e.cost = int64(len(sc.Gzip)) + spoolPerEntry
		if !s.makeRoom(e.cost, true) {
			s.cfg.OnDrop(DropSpoolFull, 1, sc.Samples)
			return err
		}
	}
	s.mu.Lock()
	s.entries = append(s.entries, e)
	s.count(&e, 1)
	s.mu.Unlock()
	if !e.inMemory() {
		s.writeBack()
	}
	return err
}

// writeBack puts on disk what is in memory since the disk failed, oldest first: some of
// it, so that a scrape does not wait for all. What cannot be written stays in memory.
func (s *Spool) writeBack() {
	for range maxWriteBack {
		s.mu.Lock()
		i := slices.IndexFunc(s.entries, func(e spoolEntry) bool { return e.inMemory() })
		if i < 0 {
			s.mu.Unlock()
			return
		}
		e, room := s.entries[i], s.cfg.Limit-s.disk
		s.mu.Unlock()
		payload := appendScrape(nil, &e.Scrape)
		if s.fileBytes(payload) > room { // what is newer is not dropped for it
			return
		}
		cost, err := s.write(e.seq, payload)
		if err != nil {
			return // the next Add tells of it
		}
		s.mu.Lock()
		i = slices.IndexFunc(s.entries, func(o spoolEntry) bool { return o.seq == e.seq })
		if i >= 0 {
			s.count(&s.entries[i], -1)
			s.entries[i].Gzip, s.entries[i].cost = nil, cost
			s.count(&s.entries[i], 1)
		}
		s.mu.Unlock()
		if i < 0 { // it went meanwhile
			s.remove([]spoolEntry{e})
			return
		}
	}
}

// count adds an entry's cost to the sums, or takes it off. s.mu is held.
func (s *Spool) count(e *spoolEntry, sign int64) {
	if e.inMemory() {
		s.memory += sign * e.cost
	} else {
		s.disk += sign * e.cost
	}
}

// fileBytes is what a file takes, at most.
func (s *Spool) fileBytes(payload []byte) int64 {
	return blocks(int64(len(payload) + len(s.cfg.Cluster) + spoolFrame))
}

func (s *Spool) write(seq uint64, payload []byte) (cost int64, err error) {
	log := NewLog(s.cfg.FS, s.path(spoolName(seq)), []byte(s.cfg.Cluster))
	frame := AppendRecord(nil, spoolKind, payload)
	err = log.Rewrite(func(w io.Writer) error {
		_, err := w.Write(frame)
		return err
	})
	return blocks(log.Size()), err
}

// makeRoom drops the oldest until cost more fits into memory, or on disk, and
// tells whether it can fit at all.
func (s *Spool) makeRoom(cost int64, memory bool) bool {
	limit, used := s.cfg.Limit, &s.disk
	if memory {
		limit, used = spoolMemory, &s.memory
		if s.cfg.Dir == "" {
			limit = min(s.cfg.Limit, spoolOnlyMem)
		}
	}
	if cost > limit {
		return false
	}
	s.drop(DropSpoolFull, func(e *spoolEntry) bool { return *used+cost > limit && e.inMemory() == memory })
	return true
}

func (s *Spool) dropOld() {
	now := s.cfg.Now()
	s.drop(DropSpoolOld, func(e *spoolEntry) bool { return now.Since(e.At) > s.cfg.MaxAge })
}

// drop gives up what pick chooses, which is asked in order and with s.mu held.
// What is handed out is not asked for: it may be with a server already.
func (s *Spool) drop(reason string, pick func(*spoolEntry) bool) {
	gone := s.take(func(e *spoolEntry) bool { return !e.taken && pick(e) })
	if len(gone) == 0 {
		return
	}
	samples := 0
	for _, e := range gone {
		samples += e.Samples
	}
	s.cfg.OnDrop(reason, len(gone), samples)
	s.remove(gone)
}

// remove deletes the files of entries. What stays behind, or comes back after a
// crash, is sent again and recognized by the server.
func (s *Spool) remove(gone []spoolEntry) {
	if s.cfg.Dir == "" || len(gone) == 0 {
		return
	}
	var errs []error
	for _, e := range gone {
		if err := s.cfg.FS.Remove(s.path(spoolName(e.seq))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, s.cfg.FS.SyncDir(s.cfg.Dir))
	if err := errors.Join(errs...); err != nil {
		s.cfg.OnError(fmt.Errorf("removing from spool: %w", err))
	}
}

// PushLimits bound what Next hands out at a time.
type PushLimits struct {
	Bytes, Text int64 // compressed, and not
	Scrapes     int
}

// Next hands out the oldest scrapes, as many as may travel in one push: within
// limits (but at least one), of one boot, and of a source whose clock was not
// stepped in between. It returns none if the spool is empty, or with ErrSpoolRead, if
// there is none that can be read: then each stays for a later Next. They are the
// caller's until Remove, SetAside, Release or the next Next.
func (s *Spool) Next(l PushLimits) ([]Scrape, error) {
	s.Release()
	s.dropOld()
	var failed error // of the first file that was passed over
	for tries := maxUnread; ; {
		picked := s.pick(l, func(e *spoolEntry) bool { return e.inMemory() || tries > 0 && e.seq >= s.from })
		if len(picked) == 0 {
			if failed != nil || s.from == 0 {
				return nil, failed
			}
			s.from = 0 // nothing is left but what could not be read
			continue
		}
		var out []Scrape
		for _, e := range picked {
			got, err := e, error(nil)
			if !e.inMemory() {
				got, _, err = s.read(e.seq, true)
			}
			if err == nil {
				out = append(out, got.Scrape)
				continue
			}
			err = fmt.Errorf("%w: %w", ErrSpoolRead, err)
			if isLost(err) {
				s.cfg.OnError(err)
				s.cfg.OnDrop(DropSpoolDamaged, 1, e.Samples)
				s.setAside(e.seq, spoolDamaged)
				s.take(func(o *spoolEntry) bool { return o.seq == e.seq })
				continue
			}
			s.release(e.seq)
			if len(out) == 0 { // else the next Next finds it first
				failed, s.from, tries = cmp.Or(failed, err), e.seq+1, tries-1
			}
			break
		}
		if len(out) > 0 {
			if failed != nil {
				s.cfg.OnError(failed)
			}
			return out, nil
		}
	}
}

// pick marks what makes the next push as handed out, and returns it. may chooses what
// can be part of it, and is called with s.mu held.
func (s *Spool) pick(l PushLimits, may func(*spoolEntry) bool) (picked []spoolEntry) {
	var packed, text int64
	var low, high int64
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.entries {
		e := &s.entries[i]
		if !may(e) {
			continue
		}
		packed, text = packed+int64(e.packed), text+int64(e.Size)
		if len(picked) == 0 {
			low, high = e.offset(), e.offset()
		}
		low, high = min(low, e.offset()), max(high, e.offset())
		if len(picked) > 0 && (len(picked) >= l.Scrapes || packed > l.Bytes || text > l.Text ||
			e.At.BootID != picked[0].At.BootID || high-low > sameClock.Milliseconds()) {
			break
		}
		e.taken = true
		picked = append(picked, *e)
	}
	return picked
}

// take takes out what pick chooses, which is asked in order and with s.mu held.
func (s *Spool) take(pick func(*spoolEntry) bool) (gone []spoolEntry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	kept := s.entries[:0]
	for _, e := range s.entries {
		if pick(&e) {
			s.count(&e, -1)
			gone = append(gone, e)
		} else {
			kept = append(kept, e)
		}
	}
	clear(s.entries[len(kept):])
	s.entries = kept
	return gone
}

// Remove removes all that Next handed out: a server has it.
func (s *Spool) Remove() { s.remove(s.take((*spoolEntry).isTaken)) }

// SetAside takes what Next handed out, one scrape, out of the spool for good,
// since no server will have it. Its file is kept under another name, among the
// newest of such.
func (s *Spool) SetAside() {
	e := s.take((*spoolEntry).isTaken)[0]
	if s.cfg.Dir != "" && !e.inMemory() {
		s.setAside(e.seq, spoolRefused)
	}
}

func (s *Spool) setAside(seq uint64, suffix string) {
	name := spoolName(seq)
	err := s.cfg.FS.Rename(s.path(name), s.path(name+suffix))
	if err == nil {
		s.aside = append(s.aside, name+suffix)
	}
	for len(s.aside) > maxSpoolAside {
		err = errors.Join(err, s.cfg.FS.Remove(s.path(s.aside[0])))
		s.aside = s.aside[1:]
	}
	if err = errors.Join(err, s.cfg.FS.SyncDir(s.cfg.Dir)); err != nil {
		s.cfg.OnError(fmt.Errorf("setting aside: %w", err))
	}
}

// Release gives back what Next handed out: it stays in the spool.
func (s *Spool) Release() { s.release(0) }

// release gives back what has this number, or a higher one.
func (s *Spool) release(from uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.entries {
		e := &s.entries[i]
		e.taken = e.taken && e.seq < from
	}
}

// SpoolStats is what a spool holds.
type SpoolStats struct {
	Scrapes, InMemory int
	Bytes             int64
	Oldest            time.Duration // age; 0 if the spool is empty
}

// Stats returns what the spool holds.
func (s *Spool) Stats() (st SpoolStats) {
	now := s.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Scrapes, st.Bytes = len(s.entries), s.disk+s.memory
	for i := range s.entries {
		if s.entries[i].inMemory() {
			st.InMemory++
		}
		st.Oldest = max(st.Oldest, now.Since(s.entries[i].At))
	}
	return st
}

// Close writes what is in memory to the disk, if that works again, and lets go of
// the directory. What is lost is told to OnDrop.
func (s *Spool) Close() error {
	s.Release()
	var errs []error
	lost, samples := 0, 0
	for i := range s.entries {
		e := &s.entries[i]
		if !e.inMemory() {
			continue
		}
		if s.cfg.Dir != "" {
			_, err := s.write(e.seq, appendScrape(nil, &e.Scrape))
			if err == nil {
				continue
			}
			errs = append(errs, err)
		}
		lost, samples = lost+1, samples+e.Samples
	}
	if lost > 0 {
		s.cfg.OnDrop(DropSpoolClosed, lost, samples)
	}
	return errors.Join(append(errs, s.unlock())...)
}
