package main

// The client's spool: scrapes wait here, on disk and oldest first, until every consumer has
// read them. A scrape that Add put on disk survives a crash at any moment and stays until it
// is read, set aside or counted as dropped. No other scrape waits for one that is damaged. A
// failing disk costs durability, not scrapes, as long as memory allows.

import (
	"bytes"
	"cmp"
	"crypto/rand"
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
// kind is the version. Its name is its number, its identity the cluster
// ID. Beside <number>.log may lie <number>.log.refused (a server will not have
// it) and <number>.log.damaged; neither is ever sent, and renaming one back makes
// the next OpenSpool take it again. spoolLogName has its own file, see spoolLog.
const (
	spoolDigits   = 16 // of a name
	spoolRefused  = ".refused"
	spoolDamaged  = ".damaged"
	spoolTemp     = ".tmp"
	maxSpoolAside = 16       // files of both kinds kept
	spoolBlock    = 4096     // a file takes a multiple of it
	spoolMemory   = 16 << 20 // bytes kept in memory while the disk fails
	maxWriteBack  = 8        // of these scrapes, put on disk with each that follows
	maxUnread     = 2        // files in vain in one Next, since each takes long
	spoolOnlyMem  = 64 << 20 // bytes kept in memory without a directory
	spoolPerEntry = 256      // bytes of memory beside the gzip
	spoolFrame    = 64       // bytes at most of a file beside its payload and identity
)

// Reasons for which a spool drops scrapes.
const (
	DropSpoolFull    = "spool_full"
	DropSpoolOld     = "spool_old"
	DropSpoolDamaged = "spool_damaged"
	DropSpoolClosed  = "spool_closed" // held in memory only when the process ended
	DropSpoolHeld    = "held"         // a server holds it, or did: no loss
)

// SpoolConfig configures a Spool.
type SpoolConfig struct {
	FS      FS
	Dir     string // "" holds scrapes in memory only
	Cluster string // the cluster ID whose scrapes are held
	Limit   int64  // bytes on disk
	MaxAge  time.Duration
	Now     func() Moment
	// Final returns a scrape with its final times; nil takes all times as they are.
	Final func(Scrape) Scrape
	// OnError is told what failed, or was found damaged; OnDrop, which scrapes
	// were given up, once for each occasion. Both are called without locks held,
	// by whoever calls the spool.
	OnError func(error)
	OnDrop  func(reason string, scrapes, samples int)
}

// Spool holds scrapes. One goroutine may call Add while another calls the rest; Stats may
// be called by any. Open and Close are called alone.
type Spool struct {
	cfg    SpoolConfig
	unlock func() error
	next   uint64 // number of the next scrape; Add's alone
	// Of Next's goroutine alone: the names of files set aside, oldest first; the number
	// from which on Next reads files, because those before it failed; and the spool's
	// record, as it is and as it was written last.
	aside      []string
	from       uint64
	log, saved spoolLog
	unsaved    bool // writing it failed

	mu   sync.Mutex // guards plan; never held across I/O
	plan spoolPlan
}

// number chooses the next number, and an ID if there is none. Servers know scrapes by
// them, so a number must not come twice under one ID, not even if the spool is empty or its
// directory was restored from an old copy. Numbers follow the wall clock in ms, which is
// ahead of all numbers as long as there are fewer scrapes than milliseconds. A clock that is
// behind the spool's record was reset and says nothing of the numbers used: then the spool
// gets a new ID, under which nothing was sent yet.
func (s *Spool) number() {
	now := s.cfg.Now()
	if ms := uint64(max(0, now.Wall)); ms < MaxSpoolNumber {
		s.next = max(s.next, ms)
	}
	if now.Wall < s.log.At.Wall {
		s.log = s.log.merge(now, nil)
		s.log.ID = 0
	}
	for s.log.ID == 0 {
		var id [8]byte
		rand.Read(id[:]) // does not fail
		s.log.ID, s.log.At = binary.LittleEndian.Uint64(id[:]), now
	}
}

// saveLog writes the spool's record if there is news. A write that fails is told once, and
// tried again at the next answer.
func (s *Spool) saveLog() {
	if s.cfg.Dir == "" || !s.log.news(&s.saved) {
		return
	}
	frame := AppendRecord(nil, spoolLogKind, appendSpoolLog(nil, &s.log))
	err := NewLog(s.cfg.FS, s.path(spoolLogName), []byte(s.cfg.Cluster)).Rewrite(func(w io.Writer) error {
		_, err := w.Write(frame)
		return err
	})
	switch {
	case err == nil:
		s.saved = s.log
	case !s.unsaved:
		s.cfg.OnError(fmt.Errorf("writing the spool's record: %w", err))
	}
	s.unsaved = err != nil
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
		sc, err := decodeScrape(kind, payload, text)
		if err != nil || n > 1 {
			return cmp.Or(err, errBadScrape)
		}
		sc.Number = seq
		e = spoolEntry{Scrape: sc, packed: len(sc.Gzip)}
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
	sc.Number = s.next
	s.next++
	e := spoolEntry{Scrape: sc, packed: len(sc.Gzip)}
	var err error
	if s.cfg.Dir != "" {
		payload := appendScrape(nil, &sc)
		if !s.makeRoom(s.fileBytes(payload), false) {
			s.cfg.OnDrop(DropSpoolFull, 1, sc.Samples)
			return nil
		}
		if e.cost, err = s.write(e.Number, payload); err == nil {
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
	s.plan.add(e)
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
		i := slices.IndexFunc(s.plan.entries, func(e spoolEntry) bool { return e.inMemory() })
		if i < 0 {
			s.mu.Unlock()
			return
		}
		e, room := s.plan.entries[i], s.cfg.Limit-s.plan.disk
		s.mu.Unlock()
		payload := appendScrape(nil, &e.Scrape)
		if s.fileBytes(payload) > room { // what is newer is not dropped for it
			return
		}
		cost, err := s.write(e.Number, payload)
		if err != nil {
			return // the next Add tells of it
		}
		s.mu.Lock()
		now := s.plan.find(e.Number)
		if now != nil && now.Final == e.Final { // else what is in memory has become final meanwhile
			s.plan.count(now, -1)
			now.Gzip, now.cost = nil, cost
			s.plan.count(now, 1)
		}
		s.mu.Unlock()
		if now == nil { // it went meanwhile
			s.remove([]spoolEntry{e})
			return
		}
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

// makeRoom drops scrapes until cost more fits into memory, or on disk, and
// tells whether it can fit at all.
func (s *Spool) makeRoom(cost int64, memory bool) bool {
	limit, used := s.cfg.Limit, &s.plan.disk
	if memory {
		limit, used = spoolMemory, &s.plan.memory
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

// drop gives up what pick chooses, see spoolPlan. Only what no server holds goes for this
// reason; the rest is no loss.
func (s *Spool) drop(reason string, pick func(*spoolEntry) bool) {
	s.mu.Lock()
	held, lost := s.plan.drop(pick)
	s.mu.Unlock()
	s.tellDrop(DropSpoolHeld, held)
	s.tellDrop(reason, lost)
	s.remove(append(held, lost...))
}

func (s *Spool) tellDrop(reason string, gone []spoolEntry) {
	samples := 0
	for _, e := range gone {
		samples += e.Samples
	}
	if len(gone) > 0 {
		s.cfg.OnDrop(reason, len(gone), samples)
	}
}

// remove deletes the files of entries. What stays behind, or comes back after a
// crash, is sent again and recognized by the server.
func (s *Spool) remove(gone []spoolEntry) {
	if s.cfg.Dir == "" || len(gone) == 0 {
		return
	}
	var errs []error
	for _, e := range gone {
		if err := s.cfg.FS.Remove(s.path(spoolName(e.Number))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, s.cfg.FS.SyncDir(s.cfg.Dir))
	if err := errors.Join(errs...); err != nil {
		s.cfg.OnError(fmt.Errorf("removing from spool: %w", err))
	}
}

// Step returns what to do next, and for how long to wait first if that is StepWait.
func (s *Spool) Step() (SpoolStep, time.Duration) {
	s.dropOld()
	now := s.cfg.Now().Boot
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plan.step(now)
}

// Next hands out what makes the next push: within limits, but at least one scrape, with
// final times. It returns none if nothing is to be pushed now, or with ErrSpoolRead, if
// there is none that can be read: then each stays for a later Next. They are the
// caller's until Answer, Failed, SetAside, Release or the next Next.
func (s *Spool) Next(l PushLimits) ([]Scrape, error) {
	s.Release()
	s.dropOld()
	var failed error // of the first file that was passed over
	for tries := maxUnread; ; {
		now := s.cfg.Now().Boot
		s.mu.Lock()
		picked := s.plan.pick(now, l, func(e *spoolEntry) bool { return e.inMemory() || tries > 0 && e.Number >= s.from })
		s.mu.Unlock()
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
				got, _, err = s.read(e.Number, true)
			}
			lost := isLost(err)
			if err == nil {
				err = s.finish(&got)
			}
			if err == nil {
				out = append(out, got.Scrape)
				continue
			}
			err = fmt.Errorf("%w: %w", ErrSpoolRead, err)
			if lost {
				s.cfg.OnError(err)
				s.cfg.OnDrop(DropSpoolDamaged, 1, e.Samples)
				s.setAside(e.Number, spoolDamaged)
				s.take(func(o *spoolEntry) bool { return o.Number == e.Number })
				continue
			}
			s.release(e.Number)
			if len(out) == 0 { // else the next Next finds it first
				failed, s.from, tries = cmp.Or(failed, err), e.Number+1, tries-1
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

// finish makes the times of a scrape final, durably: whenever it is sent again, after a
// crash too, it has the same times. If the disk fails, it is held in memory; if there is
// no room for that, it has to wait.
func (s *Spool) finish(e *spoolEntry) error {
	if e.Final || s.cfg.Final == nil {
		return nil
	}
	number := e.Number
	e.Scrape = s.cfg.Final(e.Scrape)
	e.Number, e.packed = number, len(e.Gzip)
	s.mu.Lock()
	old := s.plan.find(number)
	memory := old == nil || old.inMemory()
	s.mu.Unlock()
	var failed error
	kept := *e
	kept.cost = int64(len(e.Gzip)) + spoolPerEntry
	if !memory {
		// Nobody else writes this file: writeBack writes what is in memory.
		cost, err := s.write(number, appendScrape(nil, &e.Scrape))
		if failed = err; err == nil {
			kept.Gzip, kept.cost = nil, cost
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if failed != nil && s.plan.memory+kept.cost > spoolMemory {
		return failed
	}
	if old = s.plan.find(number); old != nil {
		s.plan.count(old, -1)
		old.Scrape, old.packed, old.cost = kept.Scrape, kept.packed, kept.cost
		s.plan.count(old, 1)
	}
	return nil
}

// take takes out what pick chooses, which is asked in order and with s.mu held.
func (s *Spool) take(pick func(*spoolEntry) bool) (gone []spoolEntry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plan.take(pick)
}

// Answer takes in what a server answered to a push of what Next handed out, or to a
// question, and removes what is done.
func (s *Spool) Answer(a SpoolAnswer) SpoolOutcome {
	now := s.cfg.Now()
	s.mu.Lock()
	gone, out := s.plan.answer(now.Boot, a)
	s.mu.Unlock()
	s.remove(gone)
	if a.Known {
		s.log = s.log.merge(now, a.Consumers)
		s.saveLog()
	}
	return out
}

// Again has scrapes that a server did not take handed out without a pause.
func (s *Spool) Again(numbers Ranges) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.plan.entries {
		if e := &s.plan.entries[i]; numbers.Has(e.Number) {
			e.wait = 0
		}
	}
}

// Failed notes an attempt that failed. Unless the server refused it for now, nothing is
// known of what Next handed out until a server says it.
func (s *Spool) Failed(refused bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.plan.failed(refused)
}

// ID returns the name of the spool, which is not 0.
func (s *Spool) ID() uint64 { return s.log.ID }

// Consumers returns the consumers that are known, with their ages now.
func (s *Spool) Consumers() []ConsumerAge {
	l := s.log.merge(s.cfg.Now(), nil)
	return l.Consumers
}

// HeldFor returns for how long the server that answered last holds what it holds longest.
func (s *Spool) HeldFor() time.Duration {
	now := s.cfg.Now().Boot
	s.mu.Lock()
	defer s.mu.Unlock()
	since, ok := s.plan.heldSince()
	if !ok {
		return 0
	}
	return time.Duration(now-since) * time.Millisecond
}

// NewestShift returns by how much the times of the newest final scrape are shifted.
func (s *Spool) NewestShift() (shift int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.plan.entries {
		if e := &s.plan.entries[i]; e.Final {
			shift = e.Shift
		}
	}
	return shift
}

// SetAside takes what Next handed out, one scrape, out of the spool for good,
// since no server will have it. Its file is kept under another name, among the
// newest of such.
func (s *Spool) SetAside() {
	e := s.take((*spoolEntry).isTaken)[0]
	if s.cfg.Dir != "" && !e.inMemory() {
		s.setAside(e.Number, spoolRefused)
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
	s.plan.release(from)
}

// Stats returns what the spool holds.
func (s *Spool) Stats() (st SpoolStats) {
	now := s.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Scrapes, st.Bytes = len(s.plan.entries), s.plan.disk+s.plan.memory
	for i := range s.plan.entries {
		e := &s.plan.entries[i]
		if e.inMemory() && e.known() == ScrapeUndelivered {
			st.InMemory++
		}
		part := &st.By[e.known()]
		part.Scrapes++
		part.Bytes += e.cost
		part.Oldest = max(part.Oldest, now.Since(e.At))
	}
	return st
}

// Close writes what is in memory to the disk, if that works again, and lets go of
// the directory. OnDrop is told of the scrapes that go; those that no server holds are lost.
func (s *Spool) Close() error {
	s.Release()
	var errs []error
	var gone [spoolStates][]spoolEntry
	for _, e := range s.plan.entries {
		if !e.inMemory() {
			continue
		}
		if s.cfg.Dir != "" {
			_, err := s.write(e.Number, appendScrape(nil, &e.Scrape))
			if err == nil {
				continue
			}
			errs = append(errs, err)
		}
		gone[e.known()] = append(gone[e.known()], e)
	}
	s.tellDrop(DropSpoolHeld, append(gone[ScrapeHeld], gone[ScrapeElsewhere]...))
	s.tellDrop(DropSpoolClosed, gone[ScrapeUndelivered])
	return errors.Join(append(errs, s.unlock())...)
}
