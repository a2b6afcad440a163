package main

// Recovery of a store: it reads all logs and the cursors of consumers, mends damaged logs, and
// takes new numbers for batches. A damaged file does not keep another from being read. Every
// known loss is reported, in pushes and samples where they are known and in bytes otherwise.
// Samples that expired while no process ran are counted once.

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// recover reads all that lies in the storage directory.
func (s *Store) recover() error {
	var dirs []string
	if s.cfg.Dir != "" {
		var err error
		if _, dirs, err = ListLogs(s.cfg.FS, s.cfg.Dir); err != nil {
			return err
		}
	}
	state, err := OpenStoreState(s.cfg.FS, s.cfg.Dir)
	if state == nil {
		return err
	} else if err != nil {
		s.cfg.OnError(err)
	}
	if s.Consumers, err = OpenConsumers(s.cfg.FS, s.cfg.Dir, state, s.cfg.Retention, s.cfg.Now()); s.Consumers == nil {
		return err
	} else if err != nil {
		s.cfg.OnError(err)
	}
	if s.cfg.Dir == "" {
		return nil
	}
	if n := s.Consumers.Torn; n > 0 {
		s.torn.Add(n)
		s.cfg.OnWarning(fmt.Errorf("%s ended in %d bytes of an unfinished write, which are cut", filepath.Join(s.cfg.Dir, ConsumersFile), n))
	}
	damaged := damagedLogs{}
	if err := s.recoverLogs(dirs, state, damaged); err != nil {
		return err
	}
	if len(s.sites) > 0 && !state.Found() {
		s.cfg.OnError(fmt.Errorf("%s is missing: consumers that are not in the file of the cursors are not known", filepath.Join(s.cfg.Dir, stateFile)))
	}
	s.countOutlived()
	highest := max(s.Consumers.Highest(), s.totals.Newest.Load())
	s.dropPastCursors(damaged)
	first := state.NewBlock(highest)
	for _, c := range s.sites {
		c.Raise(first)
	}
	s.totals.Raise(first)
	s.saveConsumers() // with the state, before a batch gets a number
	return nil
}

// damagedLogs are the logs that lost something, by the beginning of their name. Each is
// counted once, however much is reported of it.
type damagedLogs map[uint64]bool

func (d damagedLogs) add(path string) {
	b, _ := hex.DecodeString(filepath.Base(path)[:min(16, len(filepath.Base(path)))])
	d[binary.BigEndian.Uint64(append(b, make([]byte, 8)...))] = true
}

// dropPastCursors drops cursors that are past the end of their log, and reports each such
// log as cut short, replaced by an older copy, unusable, or removed.
func (s *Store) dropPastCursors(damaged damagedLogs) {
	sites, ends := map[uint64]*Site{}, map[uint64]uint64{}
	for _, c := range s.sites {
		sites[c.Hash] = c
		c.View(func(held *SiteData) { ends[c.Hash] = held.Seq })
	}
	for _, past := range s.Consumers.DropPast(ends) {
		name := hex.EncodeToString(binary.BigEndian.AppendUint64(nil, past.Cluster)) + "*" + LogSuffix
		path := filepath.Join(s.cfg.Dir, name[:2], name)
		lost := "an unknown number of pushes is lost"
		if end := ends[past.Cluster]; SameBlock(end, past.Seq) {
			lost = fmt.Sprintf("%d pushes or more are lost, which these consumers have read", past.Seq-end)
		}
		switch c := sites[past.Cluster]; {
		case c != nil:
			s.cfg.OnError(fmt.Errorf("%s ends before what consumers %q have read of cluster %q: it was cut short, or is an older copy; %s; what it holds is served again",
				s.path(c.ID), past.Names, c.ID, lost))
		case damaged[past.Cluster]:
			s.cfg.OnError(fmt.Errorf("consumers %q have read the log %s, of which nothing is left; %s", past.Names, path, lost))
		default:
			s.cfg.OnError(fmt.Errorf("consumers %q have read the log %s, which was removed; %s", past.Names, path, lost))
		}
		damaged[past.Cluster] = true
	}
	s.damaged.Store(int64(len(damaged)))
}

// countOutlived drops and counts the samples that expired while no process ran. The last
// process counted those that expired before its newest push or scrape.
func (s *Store) countOutlived() {
	ran := s.Consumers.LastScrape().UnixMilli()
	for _, c := range s.sites {
		c.View(func(held *SiteData) { ran = max(ran, held.Accepted) })
	}
	oldest := s.Oldest()
	for _, c := range s.sites {
		c.Resume(min(oldest, ran-s.cfg.Retention.Milliseconds()))
		c.Expire(oldest)
	}
}

func (s *Store) recoverLogs(dirs []string, state *StoreState, damaged damagedLogs) error {
	for _, dir := range dirs {
		if len(filepath.Base(dir)) != 2 {
			continue
		}
		logs, _, err := ListLogs(s.cfg.FS, dir)
		if err != nil {
			return err
		}
		for _, path := range logs {
			if err := s.recoverLog(path, state, damaged); err != nil {
				return err
			}
		}
	}
	s.full = time.Time{}
	_ = s.makeRoom(nil, 0) // what is wanted or shown stays, even beyond the limit
	return nil
}

// recoveredLog takes the records of one log.
type recoveredLog struct {
	store   *Store
	path    string
	held    SiteData
	spools  SiteSpools
	parser  SeriesParser
	skipped bool   // damaged bytes were skipped since the newest batch
	pushes  uint64 // lost between two batches that were read
	samples int    // lost because damage took their series
}

func (r *recoveredLog) take(kind byte, payload []byte) error {
	switch kind {
	case RecordSeries:
		owner := func(id string) bool { return r.store.path(id) == r.path }
		return DecodeSeries(payload, func(id uint32, line []byte) error { return r.held.Restore(&r.parser, owner, id, line) })
	case RecordBatch:
		b, err := DecodeBatch(payload)
		if err != nil {
			return err
		}
		before := r.held.Seq
		lost, err := r.held.Adopt(b)
		if err != nil {
			return err
		}
		if r.skipped && before > 0 && SameBlock(before, b.Seq) {
			r.pushes += b.Seq - before - 1
		}
		r.skipped = false
		r.samples += lost
		if lost > 0 {
			return fmt.Errorf("batch %d has %d samples of unknown series", b.Seq, lost)
		}
		return nil
	case RecordSpool:
		return r.spools.Restore(payload)
	}
	return fmt.Errorf("unknown kind of record %d", kind)
}

// lost says which pushes and samples are known to be lost.
func (r *recoveredLog) lost() (text string) {
	if r.pushes > 0 {
		text += fmt.Sprintf(", at least %d pushes", r.pushes)
	}
	if r.samples > 0 {
		text += fmt.Sprintf(", %d samples of series whose names are lost", r.samples)
	}
	return text
}

// recoverLog reads the log at path, mends it if it is damaged, and adds its site. Samples
// that had expired at the site's newest push are not counted: the last process did that.
func (s *Store) recoverLog(path string, state *StoreState, damaged damagedLogs) error {
	r := recoveredLog{store: s, path: path, held: NewSiteData("", s.seed)}
	log, rec, err := OpenLogWithGaps(s.cfg.FS, path, r.take, func() { r.skipped = true })
	if err != nil {
		return err // the log may be good
	}
	hurt := rec.HeaderDamaged || rec.Damaged > 0
	if hurt {
		damaged.add(path)
		r.held.Distrust(state.Beyond(s.Consumers.Highest()))
	}
	if rec.HeaderDamaged {
		log = s.newLog(r.held.ID)
	} else {
		r.held.ID = string(rec.Identity)
	}
	switch {
	case rec.HeaderDamaged && rec.Records == 0:
		err = errors.New("it has neither a header nor a record that can be read")
	case s.path(r.held.ID) != path:
		err = errors.New("its name and its header are not of one cluster")
	case r.held.Seq == 0:
		err = errors.New("it has no batch") // no log was ever written so
	}
	if err != nil {
		// Out of the way of a new log, but never deleted.
		aside, failed := SetAside(s.cfg.FS, path, "unreadable")
		if failed != nil {
			return errors.Join(err, failed)
		}
		damaged.add(path)
		s.cfg.OnError(fmt.Errorf("recovering %s: %w; it is set aside as %s", path, err, aside))
		return nil
	}
	r.held.RestoreSpools(r.spools, hurt)
	oldest := s.Oldest()
	r.held.Resume(min(oldest, r.held.Accepted-s.cfg.Retention.Milliseconds()))
	c := NewSite(r.held, log, &s.totals)
	s.sites[c.ID] = c
	s.torn.Add(rec.TornBytes)
	switch {
	case hurt:
		s.cfg.OnError(fmt.Errorf("%s was damaged: %d bytes are lost%s; %d records are kept%s",
			path, rec.LostBytes+rec.TornBytes, r.lost(), rec.Records, rec.KeptAs()))
	case rec.TornBytes > 0:
		s.cfg.OnWarning(fmt.Errorf("%s ended in %d bytes of an unfinished write, which are cut: of a push that was not answered, unless the disk lost more", path, rec.TornBytes))
	}
	if rec.Err != nil {
		s.cfg.OnError(fmt.Errorf("recovering %s: %w", path, rec.Err))
	}
	if err := c.Mend(oldest); err != nil {
		s.cfg.OnError(fmt.Errorf("mending %s: %w", path, err))
	}
	_ = s.makeRoom(nil, 0) // not only when all is read
	return nil
}
