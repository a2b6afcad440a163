package main

// Recovery opens a store: it reads all logs and the cursors of consumers, rewrites damaged logs,
// and starts a new block of sequence numbers. A damaged file does not prevent recovery of the other
// files. Recovery reports every loss that it can detect. For a damaged log it reports the lost
// bytes and, if known, the numbers of lost pushes and samples. A log that ends early is not damage if
// its site's sender has a spool, because a power cut takes what was not flushed and the sender pushes
// it again. A log without any batch is damage, because nothing in it tells whether the sender has a
// spool. Samples that expired while no process ran are counted as expired.

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// recover reads the state, the cursors and all logs in the storage directory. It returns an error
// if it cannot read a file that may be intact, or cannot rename an unusable log.
func (s *Store) recover() error {
	var dirs []string
	if s.cfg.Dir != "" {
		var err error
		if _, dirs, err = ListLogs(s.cfg.FS, s.cfg.Dir); err != nil {
			return err
		}
	}
	state, err := s.recoverStateAndConsumers()
	if err != nil || s.cfg.Dir == "" {
		return err
	}
	losses := newLogLosses()
	if n := s.Consumers.TornBytes; n > 0 {
		s.cfg.OnWarning(fmt.Errorf("%s ended in %d bytes of an unfinished write, which were removed: consumers may be served some samples again", filepath.Join(s.cfg.Dir, ConsumersFile), n))
	}
	if err := s.recoverLogs(dirs, state, losses); err != nil {
		return err
	}
	if len(s.sites) > 0 && !state.found {
		s.cfg.OnError(fmt.Errorf("%s is missing: the server knows only the consumers in %s", filepath.Join(s.cfg.Dir, stateFile), ConsumersFile))
	}
	s.dropExpiredWhileDown()
	highest := max(s.Consumers.HighestCursor(), s.totals.NewestSeq.Load())
	s.lowerCursorsToLogEnds(losses)
	losses.warnOfTornLogs(s.cfg.OnWarning)
	s.damaged.Store(int64(len(losses.damaged)))
	s.torn.Store(int64(len(losses.torn)))
	s.startSeqBlock(state, highest)
	s.saveCursors() // also writes the state file, before any batch gets a number
	return nil
}

// recoverStateAndConsumers reads the state file and the cursors, and reports damage to them.
func (s *Store) recoverStateAndConsumers() (*StoreMeta, error) {
	state, err := OpenStoreMeta(s.cfg.FS, s.cfg.Dir)
	if err != nil {
		return nil, err
	}
	if state.Damage != nil {
		s.cfg.OnError(state.Damage)
	}
	s.Consumers, err = OpenConsumers(s.cfg.FS, s.cfg.Dir, state, s.cfg.Retention, s.cfg.Now())
	if err != nil {
		return nil, err
	}
	if len(s.cfg.Consumers) > 0 {
		if forgotten := s.Consumers.KeepOnly(s.cfg.Consumers); len(forgotten) > 0 {
			s.cfg.OnWarning(fmt.Errorf("the consumers %q are forgotten, because --consumer does not list them", forgotten))
		}
	}
	if s.Consumers.Damage != nil {
		s.cfg.OnError(s.Consumers.Damage)
	}
	return state, nil
}

// startSeqBlock makes all later batches get numbers from a new block above highestSeq.
func (s *Store) startSeqBlock(meta *StoreMeta, highestSeq uint64) {
	first := meta.TakeSeqBlock(highestSeq)
	for _, site := range s.sites {
		site.raiseSeq(first)
	}
	s.totals.RaiseNewest(first)
}

// dropExpiredWhileDown drops the expired samples of all sites. It counts only the samples that
// expired after the newest push of any site or the newest saved time of a scrape, whichever is
// later. An earlier process normally counted the others.
func (s *Store) dropExpiredWhileDown() {
	ran := s.Consumers.LastSavedScrape().UnixMilli()
	for _, site := range s.sites {
		site.View(func(data *SiteSamples) { ran = max(ran, data.LastPush) })
	}
	oldest := s.KeptSince()
	for _, site := range s.sites {
		site.DropExpiredUncounted(min(oldest, ran-s.cfg.Retention.Milliseconds()))
		site.DropExpired(oldest)
	}
}

// logLosses are the logs that lost something. A log is damaged or torn, not both. logLosses is safe for
// concurrent use.
type logLosses struct {
	mu        sync.Mutex        // guards the fields below
	damaged   map[uint64]bool   // keys of the sites whose logs are damaged or missing
	torn      map[uint64]string // paths of the logs that end early, as after a power cut, by site key
	tornBytes int64             // bytes of unfinished writes in these logs
}

func newLogLosses() *logLosses {
	return &logLosses{damaged: map[uint64]bool{}, torn: map[uint64]string{}}
}

// siteKeyOf returns the site key of the log at path: the first half of the file name, in hex.
func siteKeyOf(path string) uint64 {
	name := filepath.Base(path)
	key, _ := strconv.ParseUint(name[:min(16, len(name))], 16, 64)
	return key
}

// addDamaged records a damaged log. A log counts once, even if several losses are found in it.
func (l *logLosses) addDamaged(path string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := siteKeyOf(path)
	delete(l.torn, key)
	l.damaged[key] = true
}

// addTorn records a log that ends early, unless the log is damaged too.
func (l *logLosses) addTorn(path string, unfinished int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if key := siteKeyOf(path); !l.damaged[key] {
		l.torn[key] = path
		l.tornBytes += unfinished
	}
}

// warnOfTornLogs calls warn once for all torn logs, because a power cut can tear every log.
func (l *logLosses) warnOfTornLogs(warn func(error)) {
	if len(l.torn) == 0 {
		return
	}
	example := slices.Min(slices.Collect(maps.Values(l.torn)))
	warn(fmt.Errorf("site logs that end early, as after a power cut: %d, for example %s; unfinished writes of %d bytes were removed; the lost pushes were not acknowledged, or clients push them again from their spools, unless the disk lost data that it had confirmed",
		len(l.torn), example, l.tornBytes))
}

// lowerCursorsToLogEnds lowers the cursors that are higher than the number of the last batch in their
// site's log to that number, and removes the cursors of sites without a usable log. The consumers
// have read all batches that are left. It reports each such log: as torn if its site has a spool, and
// otherwise as damaged.
func (s *Store) lowerCursorsToLogEnds(losses *logLosses) {
	sites, ends := map[uint64]*Site{}, map[uint64]uint64{}
	for _, site := range s.sites {
		sites[site.Key] = site
		site.View(func(data *SiteSamples) { ends[site.Key] = data.Seq })
	}
	for _, past := range s.Consumers.LowerCursorsTo(ends) {
		site := sites[past.Site]
		if site != nil && site.hasSpools() {
			losses.addTorn(s.logPathOf(site.ID), 0)
			continue
		}
		lost := "an unknown number of pushes is lost"
		if end := ends[past.Site]; IsSameSeqBlock(end, past.Seq) {
			lost = fmt.Sprintf("%d or more pushes are lost (these consumers have read them)", past.Seq-end)
		}
		if site != nil {
			path := s.logPathOf(site.ID)
			losses.addDamaged(path)
			s.cfg.OnError(fmt.Errorf("%s ends before the newest batch that consumers %q have read of site %q: the log was cut short or is an older copy; %s",
				path, past.Names, site.ID, lost))
			continue
		}
		name := hex.EncodeToString(binary.BigEndian.AppendUint64(nil, past.Site)) + "*" + LogSuffix
		path := filepath.Join(s.cfg.Dir, name[:2], name)
		losses.addDamaged(path)
		s.cfg.OnError(fmt.Errorf("consumers %q have read the log %s, which is missing or has no batch left; %s%s", past.Names, path, lost, youngLogHint))
	}
}

// recoverLogs recovers the logs in the given directories, several at a time and in any order. It then
// evicts batches if the store exceeds the limit on samples. Directories of logs have names of two
// characters; recoverLogs ignores other directories.
func (s *Store) recoverLogs(dirs []string, meta *StoreMeta, losses *logLosses) error {
	var paths []string
	for _, dir := range dirs {
		if len(filepath.Base(dir)) != 2 {
			continue
		}
		logs, _, err := ListLogs(s.cfg.FS, dir)
		if err != nil {
			return err
		}
		paths = append(paths, logs...)
	}
	var workers sync.WaitGroup
	var next atomic.Int64 // number of logs that workers have begun to recover
	errs := make([]error, runtime.GOMAXPROCS(0))
	for w := range errs {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(paths)); i = next.Add(1) - 1 {
				if errs[w] = s.recoverLog(paths[i], meta, losses); errs[w] != nil {
					next.Store(int64(len(paths))) // OpenStore fails, so the workers need not recover the other logs
				}
			}
		})
	}
	workers.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// Reset noRoomAt, so that makeRoom searches at once. The error of makeRoom is ignored, because
	// samples that are unread, or that scrapes still show, stay even if the store exceeds its
	// limit.
	s.noRoomAt = time.Time{}
	_ = s.makeRoom(nil, 0)
	return nil
}

// recoverLog reads the log at path, rewrites the log if it is damaged, and adds its site to the
// store. It renames a log that cannot be used. It does not count samples that were already expired
// at the site's newest push, because an earlier process normally counted them.
func (s *Store) recoverLog(path string, meta *StoreMeta, losses *logLosses) error {
	r, err := s.openSiteLog(path, meta)
	if err != nil {
		return err // the log could not be read, but its content may be intact
	}
	err = r.checkUsable()
	if r.found.IsDamaged() || err != nil {
		losses.addDamaged(path)
	} else if r.found.TornBytes > 0 {
		losses.addTorn(path, r.found.TornBytes)
	}
	if err != nil {
		return s.setLogAside(path, err)
	}
	oldest := s.KeptSince()
	r.data.RestoreSpools(r.spools, r.found.IsDamaged())
	r.data.DropExpiredUncounted(min(oldest, r.data.LastPush-s.cfg.Retention.Milliseconds()))
	site := NewSite(r.data, r.log, s)
	s.mu.Lock()
	s.sites[site.ID] = site
	s.sorted.Store(nil)
	s.mu.Unlock()
	s.reportDamage(r)
	if err := site.RewriteLogIfBroken(oldest); err != nil {
		s.cfg.OnError(fmt.Errorf("rewriting the damaged log %s: %w", path, err))
	}
	_ = s.makeRoom(nil, 0) // evict after each log, so that recovery needs less memory
	return nil
}

// recoveredLog is one log and the data from its records.
type recoveredLog struct {
	store       *Store
	path        string
	log         *Log
	found       LogRecovery
	data        SiteSamples
	spools      SiteSpools // from the log's own spool records
	parser      SeriesParser
	hasGap      bool   // damaged bytes were skipped, so that a record may be forged
	skipped     bool   // damaged bytes were skipped after the last decoded batch
	lostPushes  uint64 // batches missing between two decoded batches
	lostSamples int    // samples whose series were destroyed by damage
}

// openSiteLog reads the log at path and decodes its records. The cluster ID comes from the header
// of the log, or from its records if the header is damaged.
func (s *Store) openSiteLog(path string, meta *StoreMeta) (*recoveredLog, error) {
	r := &recoveredLog{store: s, path: path, data: NewSiteSamples("", s.seed)}
	var err error
	if r.log, r.found, err = OpenLogWithGaps(s.cfg.FS, path, r.decodeRecord, func() { r.hasGap, r.skipped = true, true }); err != nil {
		return nil, err
	}
	if r.found.IsDamaged() {
		r.data.DropBatchesAbove(meta.UsedSeqBound(s.Consumers.HighestCursor()))
	}
	if r.found.HeaderDamaged {
		r.log = s.newLog(r.data.ID)
	} else {
		r.data.ID = string(r.found.Identity)
	}
	return r, nil
}

// youngLogHint ends a message about a log without any batch. This program writes at least one batch to
// every log.
const youngLogHint = "; a kill or a power cut during or soon after the first push of a site can cause this, and a client then pushes again"

// checkUsable returns an error with the reason if the log cannot be used.
func (r *recoveredLog) checkUsable() error {
	switch {
	case r.found.HeaderDamaged && r.found.Records == 0:
		return errors.New("the log has neither a header nor a record that can be read" + youngLogHint)
	case r.store.logPathOf(r.data.ID) != r.path:
		return errors.New("the file name does not match the cluster ID in the log")
	case r.data.Seq == 0:
		return errors.New("the log has no batch" + youngLogHint)
	}
	return nil
}

// decodeRecord adds one record to the data. After an error, the record counts as damaged.
func (r *recoveredLog) decodeRecord(kind byte, payload []byte) error {
	switch kind {
	case RecordSeries:
		return DecodeSeries(payload, r.restoreSeries)
	case RecordBatch:
		return r.decodeAndRestoreBatch(payload)
	case RecordSpool:
		return r.spools.DecodeRecord(payload)
	}
	return fmt.Errorf("unknown kind of record %d", kind)
}

// restoreSeries adds one line to the data. After damaged bytes the record may be forged from bytes that
// the site chose, so that the line is checked as strictly as a line from outside.
func (r *recoveredLog) restoreSeries(id uint32, line []byte) error {
	if r.hasGap {
		isSite := func(id string) bool { return r.store.logPathOf(id) == r.path }
		if err := r.data.CheckSeriesLine(&r.parser, isSite, line); err != nil {
			return err
		}
	}
	return r.data.RestoreSeries(id, line)
}

// decodeAndRestoreBatch adds the batch of one record to the data, and counts the pushes and samples
// that damage destroyed. It returns an error if the record is damaged or samples of it are lost.
func (r *recoveredLog) decodeAndRestoreBatch(payload []byte) error {
	b, err := DecodeBatch(payload)
	if err != nil {
		return err
	}
	before := r.data.Seq
	lost, err := r.data.RestoreBatch(b)
	if err != nil {
		return err
	}
	if r.skipped && before > 0 && IsSameSeqBlock(before, b.Seq) {
		r.lostPushes += b.Seq - before - 1
	}
	r.skipped = false
	r.lostSamples += lost
	if lost > 0 {
		return fmt.Errorf("batch %d has %d samples whose series are not in the log", b.Seq, lost)
	}
	return nil
}

// setLogAside renames a log that cannot be used, so that a new log of the same site does not
// overwrite it. It reports reason and the new name to OnError.
func (s *Store) setLogAside(path string, reason error) error {
	name, err := SetAside(s.cfg.FS, path, "unreadable")
	if err != nil {
		return errors.Join(reason, err)
	}
	s.cfg.OnError(fmt.Errorf("recovering %s: %w; the file was renamed to %s", path, reason, name))
	return nil
}

// reportDamage reports the damage to a log that is still used.
func (s *Store) reportDamage(r *recoveredLog) {
	if r.found.IsDamaged() {
		s.cfg.OnError(fmt.Errorf("%s of site %q was damaged: %d bytes are lost%s; %d records are kept%s",
			r.path, r.data.ID, r.found.LostBytes+r.found.TornBytes, r.describeLosses(), r.found.Records, r.found.KeptCopyNote()))
	}
	if r.found.Err != nil {
		s.cfg.OnError(fmt.Errorf("recovering %s: %w", r.path, r.found.Err))
	}
}

// describeLosses returns text about the pushes and samples that are known to be lost, or "" if
// there are none.
func (r *recoveredLog) describeLosses() (text string) {
	if r.lostPushes > 0 {
		text += fmt.Sprintf(", %d or more pushes", r.lostPushes)
	}
	if r.lostSamples > 0 {
		text += fmt.Sprintf(", %d samples of series whose names are lost", r.lostSamples)
	}
	return text
}
