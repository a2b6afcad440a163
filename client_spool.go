package main

// The client's spool: scrapes wait here, on disk and oldest first, until every consumer has
// read them. A scrape that Add put on disk survives a crash at any moment and stays until it
// is read, set aside or counted as dropped. No other scrape waits for one that is damaged. A
// failing disk costs durability, not scrapes, as long as memory allows.

import (
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

const (
	maxSpoolMemory  = 16 << 20 // bytes kept in memory while the disk fails
	maxMemoryOnly   = 64 << 20 // bytes kept in memory without a directory
	entryOverhead   = 256      // bytes of memory of a scrape beside its gzip
	maxFlush        = 8        // scrapes in memory that are written with each that follows
	maxReadFailures = 2        // files that fail in one BeginPush, because each takes long
)

// Reasons for which a spool drops scrapes.
const (
	DropSpoolFull    = "spool_full"
	DropSpoolOld     = "spool_old"
	DropSpoolDamaged = "spool_damaged"
	DropSpoolClosed  = "spool_closed" // in memory only when the process ended
	DropSpoolHeld    = "held"         // a server holds it, or did: no loss
)

// ErrSpoolRead is returned if the spool has scrapes and none of them can be read.
var ErrSpoolRead = errors.New("reading spool")

// SpoolConfig configures a Spool.
type SpoolConfig struct {
	FS        FS
	Dir       string // "" holds scrapes in memory only
	ClusterID string // the cluster ID whose scrapes are held
	Limit     int64  // bytes on disk
	MaxAge    time.Duration
	Now       func() Moment
	// CorrectTimes returns a scrape, which was spooled as not Corrected, with corrected times;
	// nil leaves all times as they are.
	CorrectTimes func(Scrape) Scrape
	// OnError is called with what failed, or was found damaged; OnDrop with the scrapes that
	// were dropped, once for each occasion. Both are called without locks held, by whoever
	// calls the spool.
	OnError func(error)
	OnDrop  func(reason string, scrapes, samples int)
}

// Spool holds scrapes. One goroutine may call Add while another calls the rest; Stats may
// be called by any. OpenSpool and Close are called alone.
type Spool struct {
	cfg        SpoolConfig
	unlock     func() error
	nextNumber uint64 // of the next scrape; for Add's goroutine

	// For BeginPush's goroutine.
	asideFiles      []string  // names of files set aside, oldest first
	readFrom        uint64    // BeginPush reads no file of a lower number, because reading it failed
	meta, savedMeta spoolMeta // the spool's record, now and on disk
	metaUnsaved     bool      // the last write of it failed

	mu    sync.Mutex // guards index; never held across I/O
	index spoolIndex
}

// initIDAndNumber chooses the next number, and an ID if there is none. Servers know scrapes by
// them, so a number must not come twice under one ID, not even if the spool is empty or its
// directory was restored from an old copy. Numbers follow the wall clock in ms, which is
// ahead of all numbers as long as there are fewer scrapes than milliseconds. A clock that is
// behind the spool's record was reset and says nothing of the numbers used: then the spool
// gets a new ID, under which nothing was sent yet.
func (s *Spool) initIDAndNumber() {
	now := s.cfg.Now()
	if ms := uint64(max(0, now.Wall)); ms < MaxScrapeNumber {
		s.nextNumber = max(s.nextNumber, ms)
	}
	if now.Wall < s.meta.At.Wall {
		s.meta = s.meta.mergedWith(now, nil)
		s.meta.ID = 0
	}
	for s.meta.ID == 0 {
		var id [8]byte
		rand.Read(id[:]) // does not fail
		s.meta.ID, s.meta.At = binary.LittleEndian.Uint64(id[:]), now
	}
}

// Add holds a scrape. Unless it returns an error the scrape is durable. After an error of the
// disk the scrape is held in memory until the disk works again. The oldest scrapes are dropped
// as the limits require.
func (s *Spool) Add(sc Scrape) error {
	if err := sc.checkFields(); err != nil {
		s.cfg.OnDrop(DropSpoolDamaged, 1, sc.Samples)
		return fmt.Errorf("spooling: %w", err)
	}
	s.dropExpired()
	sc.Number = s.nextNumber
	s.nextNumber++
	e := spoolEntry{Scrape: sc, gzipSize: len(sc.Gzip)}
	var err error
	if s.cfg.Dir != "" {
		if !s.makeRoom(s.maxFileSize(&sc), false) {
			s.cfg.OnDrop(DropSpoolFull, 1, sc.Samples)
			return nil
		}
		if e.footprint, err = s.storeScrape(&sc); err == nil {
			e.Gzip = nil
		}
	}
	if e.inMemory() {
		e.footprint = memoryFootprint(&sc)
		if !s.makeRoom(e.footprint, true) {
			s.cfg.OnDrop(DropSpoolFull, 1, sc.Samples)
			return err
		}
	}
	s.mu.Lock()
	s.index.add(e)
	s.mu.Unlock()
	if !e.inMemory() {
		s.flushMemory()
	}
	return err
}

func memoryFootprint(sc *Scrape) int64 { return int64(len(sc.Gzip)) + entryOverhead }

// flushMemory writes the scrapes that are in memory because the disk failed, oldest first, but
// at most maxFlush, so that a scrape does not wait for all. A scrape that cannot be written
// stays in memory.
func (s *Spool) flushMemory() {
	for range maxFlush {
		s.mu.Lock()
		i := slices.IndexFunc(s.index.entries, func(e spoolEntry) bool { return e.inMemory() })
		if i < 0 {
			s.mu.Unlock()
			return
		}
		e, room := s.index.entries[i], s.cfg.Limit-s.index.diskBytes
		s.mu.Unlock()
		if s.maxFileSize(&e.Scrape) > room { // nothing newer is dropped for it
			return
		}
		footprint, err := s.storeScrape(&e.Scrape)
		if err != nil {
			return // the next Add returns the error
		}
		stored := e
		stored.Gzip, stored.footprint = nil, footprint
		s.mu.Lock()
		now := s.index.find(e.Number)
		if now != nil && now.Corrected == e.Corrected { // else its times were corrected meanwhile
			s.index.replaceScrape(&stored)
		}
		s.mu.Unlock()
		if now == nil { // it was removed meanwhile
			s.removeFiles([]spoolEntry{e})
			return
		}
	}
}

// makeRoom drops scrapes until size more bytes fit into memory, or on disk, and reports whether
// they can fit at all.
func (s *Spool) makeRoom(size int64, inMemory bool) bool {
	limit, used := s.cfg.Limit, &s.index.diskBytes
	if inMemory {
		limit, used = maxSpoolMemory, &s.index.memoryBytes
		if s.cfg.Dir == "" {
			limit = min(s.cfg.Limit, maxMemoryOnly)
		}
	}
	if size > limit {
		return false
	}
	s.drop(DropSpoolFull, func(e *spoolEntry) bool { return *used+size > limit && e.inMemory() == inMemory })
	return true
}

// dropExpired drops scrapes older than MaxAge.
func (s *Spool) dropExpired() {
	now := s.cfg.Now()
	s.drop(DropSpoolOld, func(e *spoolEntry) bool { return now.Since(e.At) > s.cfg.MaxAge })
}

// drop drops the scrapes that match, see spoolIndex.drop. Only those that no server holds are
// reported under this reason; the rest is no loss.
func (s *Spool) drop(reason string, match func(*spoolEntry) bool) {
	s.mu.Lock()
	held, lost := s.index.drop(match)
	s.mu.Unlock()
	s.reportDrop(DropSpoolHeld, held)
	s.reportDrop(reason, lost)
	s.removeFiles(append(held, lost...))
}

func (s *Spool) reportDrop(reason string, dropped []spoolEntry) {
	samples := 0
	for _, e := range dropped {
		samples += e.Samples
	}
	if len(dropped) > 0 {
		s.cfg.OnDrop(reason, len(dropped), samples)
	}
}

// NextStep returns what to do next, and for how long to wait first if that is StepWait.
func (s *Spool) NextStep() (step DrainStep, wait time.Duration) {
	s.dropExpired()
	now := s.cfg.Now().Boot
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index.nextStep(now)
}

// BeginPush returns the scrapes of the next push: within limits, but at least one, with corrected
// times. It returns none if nothing is to be pushed now. The error is ErrSpoolRead if there are
// scrapes to push and none of them can be read; they stay for a later call. The scrapes are in
// flight until ApplyAnswer, MarkPushFailed, SetInFlightAside, ReleaseInFlight or the next call of
// this method.
func (s *Spool) BeginPush(l PushLimits) ([]Scrape, error) {
	s.ReleaseInFlight()
	s.dropExpired()
	var firstErr error
	for failures := 0; ; {
		now := s.cfg.Now().Boot
		s.mu.Lock()
		picked := s.index.beginPush(now, l, func(e *spoolEntry) bool {
			return e.inMemory() || failures < maxReadFailures && e.Number >= s.readFrom
		})
		s.mu.Unlock()
		if len(picked) == 0 {
			if firstErr != nil || s.readFrom == 0 {
				return nil, firstErr
			}
			s.readFrom = 0 // nothing is left but what could not be read
			continue
		}
		scrapes, err := s.loadPicked(picked)
		switch {
		case len(scrapes) > 0: // the next call meets err again
			if firstErr != nil {
				s.cfg.OnError(firstErr)
			}
			return scrapes, nil
		case err != nil:
			firstErr, failures = cmp.Or(firstErr, err), failures+1
		}
	}
}

// loadPicked reads the picked scrapes. A scrape that is lost is dropped, and is no error. At the
// first other error it returns the scrapes before it, and releases the rest. If there are none
// before it, later reads begin behind it.
func (s *Spool) loadPicked(picked []spoolEntry) (scrapes []Scrape, err error) {
	for _, e := range picked {
		lost := false
		if !e.inMemory() {
			var loaded spoolEntry
			if loaded, _, err = s.loadScrape(e.Number, true); err == nil {
				e.Scrape = loaded.Scrape
			}
			lost = isScrapeLost(err)
		}
		if err == nil {
			err = s.correctTimesAndStore(&e)
		}
		switch {
		case err == nil:
			scrapes = append(scrapes, e.Scrape)
		case lost:
			s.cfg.OnError(fmt.Errorf("%w: %w", ErrSpoolRead, err))
			s.dropDamaged(e.Number)
			err = nil
		default:
			s.releaseInFlightFrom(e.Number)
			if len(scrapes) == 0 {
				s.readFrom = e.Number + 1
			}
			return scrapes, fmt.Errorf("%w: %w", ErrSpoolRead, err)
		}
	}
	return scrapes, nil
}

// dropDamaged drops the scrape of a file that is damaged or gone.
func (s *Spool) dropDamaged(number uint64) {
	s.setFileAside(number, spoolDamaged)
	s.reportDrop(DropSpoolDamaged, s.removeFromIndex(func(e *spoolEntry) bool { return e.Number == number }))
}

// correctTimesAndStore corrects the times of a scrape that was loaded, durably: whenever it is sent
// again, after a crash too, it has the same times. If the disk fails, the scrape is held in
// memory; if there is no room for that, the error is the disk's and the scrape has to wait.
func (s *Spool) correctTimesAndStore(e *spoolEntry) error {
	if e.Corrected || s.cfg.CorrectTimes == nil {
		return nil
	}
	e.Scrape = s.cfg.CorrectTimes(e.Scrape)
	e.gzipSize, e.footprint = len(e.Gzip), memoryFootprint(&e.Scrape)
	kept := *e
	s.mu.Lock()
	old := s.index.find(e.Number)
	onDisk := old != nil && !old.inMemory()
	s.mu.Unlock()
	var err error
	if onDisk {
		// Nobody else writes this file: flushMemory writes what is in memory.
		var footprint int64
		if footprint, err = s.storeScrape(&e.Scrape); err == nil {
			kept.Gzip, kept.footprint = nil, footprint
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && s.index.memoryBytes+kept.footprint > maxSpoolMemory {
		return err
	}
	s.index.replaceScrape(&kept)
	return nil
}

// removeFromIndex removes the scrapes that match, and returns them. match is called with s.mu held.
func (s *Spool) removeFromIndex(match func(*spoolEntry) bool) (removed []spoolEntry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index.removeIf(match)
}

// ApplyAnswer notes what a server answered to the push in flight, or to a question, and removes the
// scrapes that are done.
func (s *Spool) ApplyAnswer(a SpoolAnswer) PushOutcome {
	now := s.cfg.Now()
	s.mu.Lock()
	done, out := s.index.applyAnswer(now.Boot, a)
	s.mu.Unlock()
	s.removeFiles(done)
	if a.KnowsSpools {
		s.meta = s.meta.mergedWith(now, a.Consumers)
		s.saveMetaIfChanged()
	}
	return out
}

// ClearRetryPause ends the pause after which scrapes that a server declined are pushed again.
func (s *Spool) ClearRetryPause(numbers Ranges) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.index.entries {
		if e := &s.index.entries[i]; numbers.Has(e.Number) {
			e.retryAt = 0
		}
	}
}

// MarkPushFailed notes an attempt that failed. Unless knownNotStored, the server may have stored the
// scrapes in flight; they are not pushed again until a server says what it holds.
func (s *Spool) MarkPushFailed(knownNotStored bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index.markPushFailed(knownNotStored)
}

// SetInFlightAside removes the scrape in flight, one, because no server accepts it. Its file
// is set aside.
func (s *Spool) SetInFlightAside() {
	e := s.removeFromIndex((*spoolEntry).isInFlight)[0]
	if s.cfg.Dir != "" && !e.inMemory() {
		s.setFileAside(e.Number, spoolRefused)
	}
}

// ReleaseInFlight ends a push that was not sent: its scrapes stay as they were.
func (s *Spool) ReleaseInFlight() { s.releaseInFlightFrom(0) }

// releaseInFlightFrom releases the scrapes of this number and above.
func (s *Spool) releaseInFlightFrom(number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index.releaseInFlightFrom(number)
}

// ID returns the ID by which servers know the spool, which is not 0.
func (s *Spool) ID() uint64 { return s.meta.ID }

// Consumers returns the consumers that are known, with their ages now.
func (s *Spool) Consumers() []ConsumerAge {
	m := s.meta.mergedWith(s.cfg.Now(), nil)
	return m.Consumers
}

// NoReadProgressFor returns for how long nothing was read of what the server that answered last
// holds; 0 if it holds nothing.
func (s *Spool) NoReadProgressFor() time.Duration {
	now := s.cfg.Now().Boot
	s.mu.Lock()
	defer s.mu.Unlock()
	since, ok := s.index.noReadProgressSince()
	if !ok {
		return 0
	}
	return time.Duration(now-since) * time.Millisecond
}

// LastTimeShift returns by how many ms the times of the newest corrected scrape were shifted.
func (s *Spool) LastTimeShift() (ms int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.index.entries {
		if e := &s.index.entries[i]; e.Corrected {
			ms = e.Shift
		}
	}
	return ms
}

// Stats returns what the spool holds.
func (s *Spool) Stats() (st SpoolStats) {
	now := s.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Scrapes, st.Bytes = len(s.index.entries), s.index.diskBytes+s.index.memoryBytes
	for i := range s.index.entries {
		e := &s.index.entries[i]
		if e.inMemory() && e.certainStateOrUndelivered() == ScrapeUndelivered {
			st.InMemory++
		}
		part := &st.ByState[e.certainStateOrUndelivered()]
		part.Scrapes++
		part.Bytes += e.footprint
		part.OldestAge = max(part.OldestAge, now.Since(e.At))
	}
	return st
}

// Close writes the scrapes in memory to the disk, if that works again, and unlocks the directory.
// It reports the scrapes that go to OnDrop; those that no server holds are lost.
func (s *Spool) Close() error {
	s.ReleaseInFlight()
	var errs []error
	var held, lost []spoolEntry
	for _, e := range s.index.entries {
		if !e.inMemory() {
			continue
		}
		if s.cfg.Dir != "" {
			_, err := s.storeScrape(&e.Scrape)
			if err == nil {
				continue
			}
			errs = append(errs, err)
		}
		if e.certainStateOrUndelivered() == ScrapeUndelivered {
			lost = append(lost, e)
		} else {
			held = append(held, e)
		}
	}
	s.reportDrop(DropSpoolHeld, held)
	s.reportDrop(DropSpoolClosed, lost)
	return errors.Join(append(errs, s.unlock())...)
}
