package main

// The client's spool keeps scrapes on disk, in the order in which they were added, until a server's
// answer says that they are no longer needed. Normally this means that every consumer has read
// them. A scrape that Add has put on disk survives a crash at any moment. It stays until an answer
// removes it, or until it is set aside, or dropped and counted. A damaged scrape does not hold up
// the other scrapes. If the disk fails, scrapes are kept in memory, up to a limit.

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
	maxSpoolMemory  = 16 << 20 // most bytes of scrapes kept in memory while the disk fails
	maxMemoryOnly   = 64 << 20 // most bytes of scrapes kept in memory if the spool has no directory
	entryOverhead   = 256      // estimate of the bytes of memory that a scrape needs besides its gzip
	maxFlush        = 8        // most scrapes that one Add moves from memory to disk
	maxReadFailures = 2        // after this many failed reads, one BeginPush reads no more files, because each failing read is slow
)

// Reasons for which a spool drops scrapes, as values of the label reason in metrics.
const (
	DropSpoolFull    = "spool_full"    // SpoolConfig.Limit or the limit on memory is reached
	DropSpoolOld     = "spool_old"     // the scrape is older than MaxAge
	DropSpoolDamaged = "spool_damaged" // the file is damaged or missing, or the scrape is malformed
	DropSpoolClosed  = "spool_closed"  // the scrape was in memory when the spool was closed, and could not be written to disk
	DropSpoolHeld    = "held"          // a server holds or held the scrape, so it does not count as lost
)

// ErrSpoolRead is wrapped by the errors of BeginPush. Errors about damaged or missing files that
// BeginPush reports to OnError wrap it too.
var ErrSpoolRead = errors.New("reading spool")

// SpoolConfig configures a Spool.
type SpoolConfig struct {
	FS        FS            // the disk
	Dir       string        // directory of the files; "" keeps scrapes in memory only
	ClusterID string        // names the site whose scrapes the spool has
	Limit     int64         // most bytes of scrapes on disk, or in memory if Dir is ""; scrapes in flight are not dropped and may exceed it
	MaxAge    time.Duration // older scrapes are dropped, unless they are in flight
	Now       func() Moment // reads the wall clock and the boot-time clock
	// CorrectTimes is called with a scrape whose field Corrected is false. It returns the scrape
	// with its sample times corrected and Corrected set. If CorrectTimes is nil, sample times never
	// change.
	CorrectTimes func(Scrape) Scrape
	// OnError is called with an error for each damaged file, and with failures that no method
	// returns. OnDrop is called each time scrapes are dropped, with the reason and the numbers of
	// scrapes and samples. Both are called without locks held, in the goroutine that calls the
	// spool.
	OnError func(error)
	OnDrop  func(reason string, scrapes, samples int)
}

// Spool keeps scrapes until a server's answer says that they are no longer needed. One goroutine
// may call Add while another calls the other methods. Stats is safe for concurrent use. OpenSpool
// and Close must not run at the same time as any method.
type Spool struct {
	cfg    SpoolConfig
	unlock func() error
	isNew  bool // the directory had no record and no scrape when the spool was opened

	// The next fields are used only by Add's goroutine.
	nextNumber      uint64         // number of the next scrape
	progress        scrapeProgress // what was scraped
	progressSaved   Moment         // when the record of progress was last written
	progressUnsaved bool           // the record on disk is older than progress
	progressFailing bool           // the last write of the record failed

	// The fields from asideFiles to metaUnsaved are used only by the goroutine that calls
	// BeginPush.
	asideFiles      []string  // names of the files set aside; if there are too many, the first is deleted
	readFrom        uint64    // BeginPush reads only the files of scrapes with this number or a higher number, because a file with a lower number could not be read
	meta, savedMeta spoolMeta // the spool's record, as it is now and as it is on disk
	metaUnsaved     bool      // the last write of the record failed

	mu    sync.Mutex // guards index; never held across I/O
	index spoolIndex
}

// initIDAndNumber chooses the number of the next scrape, and a new spool ID if the spool has none
// or if the clock was set back. Servers identify a scrape by spool ID and number. So a number must
// not be used twice under one spool ID, even if the spool is empty or its directory was restored
// from an old copy.
//
// Numbers start at the wall clock's milliseconds. Unless the clock was set back, that is above all
// numbers used before, because the spool adds fewer scrapes than milliseconds pass. If the wall
// clock is behind the time in the spool's record, the clock was set back, and its milliseconds may
// have been used as numbers. The spool then gets a new ID, under which no scrape was sent yet.
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
		rand.Read(id[:]) // never returns an error
		s.meta.ID, s.meta.At = binary.LittleEndian.Uint64(id[:]), now
	}
}

// Add puts a scrape into the spool. If the limits require it, Add drops other scrapes: first those
// that a server holds or held, then the others, both oldest first. If Add returns nil, the scrape
// is durable, with two exceptions: if Dir is "", the scrape is in memory only, and a scrape that
// alone exceeds the limit is dropped and reported to OnDrop. If the disk fails, Add returns the
// error and keeps the scrape in memory, up to maxSpoolMemory, until the disk works again. A
// malformed scrape is dropped and reported to OnDrop, and Add returns an error.
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

// flushMemory writes scrapes that are in memory because the disk failed, oldest first. It writes at
// most maxFlush scrapes, so that one Add does not take long. A scrape that cannot be written stays
// in memory.
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
		if s.maxFileSize(&e.Scrape) > room { // do not drop newer scrapes from the disk to make room for this older scrape
			return
		}
		footprint, err := s.storeScrape(&e.Scrape)
		if err != nil {
			return // the error can be ignored, because while the disk fails, the next Add fails too and returns its error
		}
		stored := e
		stored.Gzip, stored.footprint = nil, footprint
		s.mu.Lock()
		now := s.index.find(e.Number)
		if now != nil && now.Corrected == e.Corrected { // if Corrected differs, BeginPush has corrected the times meanwhile, and the file has the old times
			s.index.replaceScrape(&stored)
		}
		s.mu.Unlock()
		if now == nil { // the scrape left the spool meanwhile, so its new file must be removed
			s.removeFiles([]spoolEntry{e})
			return
		}
	}
}

// makeRoom drops scrapes until size more bytes fit into memory (if inMemory) or onto the disk
// (otherwise). Scrapes in flight are not dropped, so the limit may be exceeded while a push runs.
// It returns false, and drops nothing, if size alone exceeds the limit.
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

// dropExpired drops scrapes older than MaxAge that are not in flight.
func (s *Spool) dropExpired() {
	now := s.cfg.Now()
	s.drop(DropSpoolOld, func(e *spoolEntry) bool { return now.Since(e.At) > s.cfg.MaxAge })
}

// drop drops the scrapes that match, in the order of spoolIndex.drop. Scrapes that a server holds
// or held do not count as lost, so they are reported as DropSpoolHeld. The others are reported
// under reason.
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

// Dir returns the directory of the spool, or "" if the spool is in memory.
func (s *Spool) Dir() string { return s.cfg.Dir }

// Limit returns the most bytes of scrapes that the spool keeps.
func (s *Spool) Limit() int64 { return s.cfg.Limit }

// IsNew reports whether the spool has a directory that had no spool when OpenSpool opened it.
func (s *Spool) IsNew() bool { return s.isNew }

// NextStep drops expired scrapes and returns what DrainSpool must do next. If that step is
// StepWait, wait is how long to wait.
func (s *Spool) NextStep() (step DrainStep, wait time.Duration) {
	s.dropExpired()
	now := s.cfg.Now().Boot
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index.nextStep(now)
}

// BeginPush returns the scrapes of the next push, with corrected times. It returns at most as many
// as l allows, except that a single scrape may exceed l. It returns none if nothing is to be pushed
// now. A scrape whose file is damaged or missing is dropped. If every other scrape that it tries to
// load fails, the error wraps ErrSpoolRead, and these scrapes stay for a later call. The returned
// scrapes are in flight until ApplyAnswer, MarkPushFailed, SetInFlightAside, ReleaseInFlight or the
// next BeginPush.
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
			s.readFrom = 0 // scrapes that are left, if any, could not be read before; try them again
			continue
		}
		scrapes, err := s.loadPicked(picked)
		switch {
		case len(scrapes) > 0: // err need not be reported here, because a later call meets it again
			if firstErr != nil {
				s.cfg.OnError(firstErr)
			}
			return scrapes, nil
		case err != nil:
			firstErr, failures = cmp.Or(firstErr, err), failures+1
		}
	}
}

// loadPicked reads the picked scrapes and corrects their times. A scrape whose file is damaged or
// missing is dropped and reported to OnError. At the first other error, loadPicked stops and
// returns the scrapes that it has already read. The scrapes that it has not read are no longer in
// flight. If it has read no scrape, it sets readFrom, so that BeginPush skips the failed file until
// nothing else is left to push.
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

// dropDamaged drops the scrape with this number, whose file is damaged or missing, and sets the
// file aside.
func (s *Spool) dropDamaged(number uint64) {
	s.setFileAside(number, spoolDamaged)
	s.reportDrop(DropSpoolDamaged, s.removeFromIndex(func(e *spoolEntry) bool { return e.Number == number }))
}

// correctTimesAndStore corrects the times of a loaded scrape, unless they are corrected already. It
// stores the result on disk if the scrape is on disk, and otherwise in memory. A scrape on disk
// then has the same times whenever it is sent again, even after a crash. If the disk fails, the
// corrected scrape is kept in memory. If memory has no room for it, the disk's error is returned.
// The spool then keeps the uncorrected scrape for a later push.
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
		// Add's goroutine does not write this file, because flushMemory writes only scrapes that
		// are in memory.
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

// removeFromIndex removes the scrapes that match and returns them. It calls match with s.mu held.
func (s *Spool) removeFromIndex(match func(*spoolEntry) bool) (removed []spoolEntry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index.removeIf(match)
}

// ApplyAnswer applies a server's answer to the push in flight or to a question. It removes the
// scrapes that are done (see spoolIndex.applyAnswer) and, if the server knows spools, merges the
// server's list of consumers into the spool's record.
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

// ClearRetryPause lets scrapes that a server declined be pushed again at once, instead of after
// declinedPause.
func (s *Spool) ClearRetryPause(numbers Ranges) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.index.entries {
		if e := &s.index.entries[i]; numbers.Has(e.Number) {
			e.retryAt = 0
		}
	}
}

// MarkPushFailed records a failed attempt. If knownNotStored is false, the server may have stored
// the scrapes in flight. These scrapes are then not pushed again until a server has listed the
// scrapes that it holds.
func (s *Spool) MarkPushFailed(knownNotStored bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index.markPushFailed(knownNotStored)
}

// SetInFlightAside removes the one scrape in flight from the spool, because a server refused it for
// good. If the scrape is on disk, its file is set aside.
func (s *Spool) SetInFlightAside() {
	e := s.removeFromIndex((*spoolEntry).isInFlight)[0]
	if s.cfg.Dir != "" && !e.inMemory() {
		s.setFileAside(e.Number, spoolRefused)
	}
}

// ReleaseInFlight ends a push of which no server stored anything, because it was not sent or was
// refused. The delivery state of its scrapes does not change.
func (s *Spool) ReleaseInFlight() { s.releaseInFlightFrom(0) }

// releaseInFlightFrom takes the scrapes with this number or a higher number out of the push in
// flight. Their delivery state does not change.
func (s *Spool) releaseInFlightFrom(number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index.releaseInFlightFrom(number)
}

// ID returns the ID under which servers know the spool. It is never 0.
func (s *Spool) ID() uint64 { return s.meta.ID }

// Consumers returns the known consumers, each with the time since it last scraped a server, as far
// as the client knows.
func (s *Spool) Consumers() []ConsumerAge {
	m := s.meta.mergedWith(s.cfg.Now(), nil)
	return m.Consumers
}

// NoReadProgressFor returns how long the last answering server has held scrapes while no answer
// removed a scrape from the spool. In this time no scrape was read by every consumer, as far as the
// client knows. It returns 0 if that server holds no scrape of this spool.
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

// LastTimeShift returns the Shift, in ms, of the newest scrape in the spool whose times are
// corrected. It returns 0 if there is none.
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

// MayLoseInFlight reports whether a scrape in flight is in memory only.
func (s *Spool) MayLoseInFlight() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.index.entries, func(e spoolEntry) bool { return e.isInFlight() && e.inMemory() })
}

// HasRoom reports whether more than half of the limit is free, and no scrape is in memory only because
// the disk failed.
func (s *Spool) HasRoom() bool {
	st := s.Stats()
	if s.cfg.Dir == "" {
		return st.Bytes <= min(s.cfg.Limit, maxMemoryOnly)/2
	}
	return st.Bytes <= s.cfg.Limit/2 && st.InMemory == 0
}

// Stats returns the number and the bytes of the scrapes in the spool and the age of the oldest one,
// by delivery state. A scrape whose state is uncertain counts as undelivered.
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

// Close writes the scrapes in memory and the record of the last scrape to disk, and unlocks the directory. It reports to OnDrop the
// scrapes that cannot be written. Such a scrape counts as lost unless a server holds or held it.
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
	s.writeProgress()
	return errors.Join(append(errs, s.unlock())...)
}
