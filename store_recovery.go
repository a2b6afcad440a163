package main

// Recovery of a store: it reads all logs and the cursors of consumers, rewrites damaged logs,
// and takes new numbers for batches. A damaged file does not keep another from being read.
// Every known loss is reported, in pushes and samples where they are known and in bytes
// otherwise. Samples that expired while no process ran are counted once.

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"time"
)

// recover reads all that lies in the storage directory. The error is that of a file that may
// be good and cannot be read.
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
	damaged := damagedLogs{}
	if err := s.recoverLogs(dirs, state, damaged); err != nil {
		return err
	}
	if len(s.sites) > 0 && !state.found {
		s.cfg.OnError(fmt.Errorf("%s is missing: consumers that are not in the file of the cursors are not known", filepath.Join(s.cfg.Dir, stateFile)))
	}
	s.dropExpiredWhileDown()
	highest := max(s.Consumers.HighestCursor(), s.totals.NewestSeq.Load())
	s.dropCursorsPastEnd(damaged)
	s.damaged.Store(int64(len(damaged)))
	s.startSeqBlock(state, highest)
	s.saveCursors() // with the state, before a batch gets a number
	return nil
}

// recoverStateAndConsumers reads the server's state and the cursors.
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
	if s.Consumers.Damage != nil {
		s.cfg.OnError(s.Consumers.Damage)
	}
	if n := s.Consumers.TornBytes; n > 0 {
		s.torn.Add(n)
		s.cfg.OnWarning(fmt.Errorf("%s ended in %d bytes of an unfinished write, which are cut", filepath.Join(s.cfg.Dir, ConsumersFile), n))
	}
	return state, nil
}

// startSeqBlock has the numbers of all later batches be of a new block, above highestSeq.
func (s *Store) startSeqBlock(meta *StoreMeta, highestSeq uint64) {
	first := meta.TakeSeqBlock(highestSeq)
	for _, site := range s.sites {
		site.raiseSeq(first)
	}
	s.totals.RaiseNewest(first)
}

// dropExpiredWhileDown drops and counts the samples that expired while no process ran. The
// last process counted those that expired before its newest push or scrape.
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

// damagedLogs are the logs that lost something, by the key of their site, which their name
// begins with. Each is counted once, however much is reported of it.
type damagedLogs map[uint64]bool

func (d damagedLogs) add(path string) {
	name := filepath.Base(path)
	key, _ := strconv.ParseUint(name[:min(16, len(name))], 16, 64)
	d[key] = true
}

// dropCursorsPastEnd drops cursors that are past the end of their log, and reports each such log.
func (s *Store) dropCursorsPastEnd(damagedSoFar damagedLogs) {
	sites, ends := map[uint64]*Site{}, map[uint64]uint64{}
	for _, site := range s.sites {
		sites[site.Key] = site
		site.View(func(data *SiteSamples) { ends[site.Key] = data.Seq })
	}
	for _, past := range s.Consumers.DropCursorsPastEnd(ends) {
		s.cfg.OnError(s.cursorPastEndError(past, sites[past.Site], ends[past.Site], damagedSoFar[past.Site]))
		damagedSoFar[past.Site] = true
	}
}

// cursorPastEndError says whether a log that ends before a cursor was cut short, replaced by an
// older copy, unusable, or removed. site is nil if there is no log that can be used.
func (s *Store) cursorPastEndError(past SiteCursorsPastEnd, site *Site, logEnd uint64, damaged bool) error {
	lost := "an unknown number of pushes is lost"
	if IsSameSeqBlock(logEnd, past.Seq) {
		lost = fmt.Sprintf("%d pushes or more are lost, which these consumers have read", past.Seq-logEnd)
	}
	if site != nil {
		return fmt.Errorf("%s ends before what consumers %q have read of site %q: it was cut short, or is an older copy; %s; what it holds is served again",
			s.logPathOf(site.ID), past.Names, site.ID, lost)
	}
	name := hex.EncodeToString(binary.BigEndian.AppendUint64(nil, past.Site)) + "*" + LogSuffix
	path := filepath.Join(s.cfg.Dir, name[:2], name)
	if damaged {
		return fmt.Errorf("consumers %q have read the log %s, of which nothing is left; %s", past.Names, path, lost)
	}
	return fmt.Errorf("consumers %q have read the log %s, which was removed; %s", past.Names, path, lost)
}

func (s *Store) recoverLogs(dirs []string, meta *StoreMeta, damaged damagedLogs) error {
	for _, dir := range dirs {
		if len(filepath.Base(dir)) != 2 {
			continue
		}
		logs, _, err := ListLogs(s.cfg.FS, dir)
		if err != nil {
			return err
		}
		for _, path := range logs {
			if err := s.recoverLog(path, meta, damaged); err != nil {
				return err
			}
		}
	}
	s.noRoomAt = time.Time{}
	_ = s.makeRoom(nil, 0) // samples that are not read, or that scrapes show, stay even beyond the limit
	return nil
}

// recoverLog reads the log at path, rewrites it if it is damaged, and adds its site. Samples
// that had expired at the site's newest push are not counted: the last process did that.
func (s *Store) recoverLog(path string, meta *StoreMeta, damaged damagedLogs) error {
	r, err := s.openSiteLog(path, meta)
	if err != nil {
		return err // the log may be good
	}
	if r.found.IsDamaged() {
		damaged.add(path)
	}
	if err := r.checkUsable(); err != nil {
		damaged.add(path)
		return s.setLogAside(path, err)
	}
	oldest := s.KeptSince()
	r.data.RestoreSpools(r.spools, r.found.IsDamaged())
	r.data.DropExpiredUncounted(min(oldest, r.data.LastPush-s.cfg.Retention.Milliseconds()))
	site := NewSite(r.data, r.log, s)
	s.sites[site.ID] = site
	s.reportDamage(r)
	if err := site.RewriteLogIfBroken(oldest); err != nil {
		s.cfg.OnError(fmt.Errorf("mending %s: %w", path, err))
	}
	_ = s.makeRoom(nil, 0) // after each log: memory is bounded during recovery as well
	return nil
}

// recoveredLog is one log, and the data that its records give.
type recoveredLog struct {
	store       *Store
	path        string
	log         *Log
	found       LogRecovery
	data        SiteSamples
	spools      SiteSpools
	parser      SeriesParser
	skipped     bool   // damaged bytes were skipped since the newest batch
	lostPushes  uint64 // between two batches that were read
	lostSamples int    // because damage took their series
}

// openSiteLog reads the log at path. The cluster ID is that of the header, or, if the header is
// damaged, that of the records.
func (s *Store) openSiteLog(path string, meta *StoreMeta) (*recoveredLog, error) {
	r := &recoveredLog{store: s, path: path, data: NewSiteSamples("", s.seed)}
	var err error
	if r.log, r.found, err = OpenLogWithGaps(s.cfg.FS, path, r.decodeRecord, func() { r.skipped = true }); err != nil {
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

// checkUsable reports why the log cannot be used.
func (r *recoveredLog) checkUsable() error {
	switch {
	case r.found.HeaderDamaged && r.found.Records == 0:
		return errors.New("it has neither a header nor a record that can be read")
	case r.store.logPathOf(r.data.ID) != r.path:
		return errors.New("its name and its header are not of one site")
	case r.data.Seq == 0:
		return errors.New("it has no batch") // no log was ever written so
	}
	return nil
}

// decodeRecord adds a record to the data. An error says that the record is damaged.
func (r *recoveredLog) decodeRecord(kind byte, payload []byte) error {
	switch kind {
	case RecordSeries:
		isSite := func(id string) bool { return r.store.logPathOf(id) == r.path }
		return DecodeSeries(payload, func(id uint32, line []byte) error { return r.data.RestoreSeries(&r.parser, isSite, id, line) })
	case RecordBatch:
		return r.decodeAndRestoreBatch(payload)
	case RecordSpool:
		return r.spools.DecodeRecord(payload)
	}
	return fmt.Errorf("unknown kind of record %d", kind)
}

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
		return fmt.Errorf("batch %d has %d samples of unknown series", b.Seq, lost)
	}
	return nil
}

// setLogAside renames a log that cannot be used, so that it is out of the way of a new one.
func (s *Store) setLogAside(path string, reason error) error {
	name, err := SetAside(s.cfg.FS, path, "unreadable")
	if err != nil {
		return errors.Join(reason, err)
	}
	s.cfg.OnError(fmt.Errorf("recovering %s: %w; it is set aside as %s", path, reason, name))
	return nil
}

// reportDamage reports the damage to a log that is used, or its torn end.
func (s *Store) reportDamage(r *recoveredLog) {
	s.torn.Add(r.found.TornBytes)
	switch {
	case r.found.IsDamaged():
		s.cfg.OnError(fmt.Errorf("%s was damaged: %d bytes are lost%s; %d records are kept%s",
			r.path, r.found.LostBytes+r.found.TornBytes, r.describeLosses(), r.found.Records, r.found.KeptCopyNote()))
	case r.found.TornBytes > 0:
		s.cfg.OnWarning(fmt.Errorf("%s ended in %d bytes of an unfinished write, which are cut: of a push that was not answered, unless the disk lost more", r.path, r.found.TornBytes))
	}
	if r.found.Err != nil {
		s.cfg.OnError(fmt.Errorf("recovering %s: %w", r.path, r.found.Err))
	}
}

// describeLosses says which pushes and samples are known to be lost.
func (r *recoveredLog) describeLosses() (text string) {
	if r.lostPushes > 0 {
		text += fmt.Sprintf(", at least %d pushes", r.lostPushes)
	}
	if r.lostSamples > 0 {
		text += fmt.Sprintf(", %d samples of series whose names are lost", r.lostSamples)
	}
	return text
}
