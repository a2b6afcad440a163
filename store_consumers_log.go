package main

// This file saves the cursors to disk. If the file of cursors is lost, consumers are served samples
// twice, but no sample is lost. The cursor changes of all sites are written together in the
// background, so that a consumer's scrape does not wait for the disk, unless the list of consumers
// changed.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"time"
)

const (
	// ConsumersFile is the name of the file of cursors in the storage directory.
	ConsumersFile = "consumers" + LogSuffix
	recordCursors = 1

	saveScrapeEvery = time.Hour // how often to save a consumer's lastScrape if none of its cursors changes
	consumersSlack  = 64 << 10  // bytes of garbage in the file of cursors for which a rewrite is not worthwhile
)

// cursorRecord is one record of the file of cursors: changes to the cursors of one consumer.
type cursorRecord struct {
	key        uint64            // key of the consumer
	lastScrape time.Time         // stored with a precision of one second
	cursors    map[uint64]uint64 // site key → batch number; 0 means that the cursor is removed
}

func encodeCursors(r cursorRecord) []byte {
	b := binary.LittleEndian.AppendUint64(nil, r.key)
	b = binary.AppendVarint(b, r.lastScrape.Unix())
	for _, site := range slices.Sorted(maps.Keys(r.cursors)) {
		b = binary.AppendUvarint(binary.LittleEndian.AppendUint64(b, site), r.cursors[site])
	}
	return b
}

func decodeCursors(payload []byte) (cursorRecord, error) {
	r := NewWireReader(payload)
	rec := cursorRecord{key: r.Uint64(), lastScrape: time.Unix(r.Varint(math.MinInt64, math.MaxInt64), 0), cursors: map[uint64]uint64{}}
	for r.Len() > 0 {
		site := r.Uint64()
		// Half of MaxSeq leaves sequence numbers for later batches even if the cursor is damaged.
		rec.cursors[site] = r.Uvarint(MaxSeq / 2)
	}
	return rec, r.Done()
}

// OpenConsumers returns the consumers in meta, with their cursors from the file in dir. dir ""
// means memory-only mode. If the file is damaged, Damage is set and no consumer has a cursor,
// because a lost record may have changed or removed any cursor. If the file is missing although
// meta lists consumers, Damage is set too. The error is a failure to read the file.
func OpenConsumers(fsys FS, dir string, meta *StoreMeta, retention time.Duration, now time.Time) (*Consumers, error) {
	cs := &Consumers{lock: newIOLock(), byKey: map[uint64]*consumer{}, reported: map[uint64]map[uint64]time.Time{}, state: meta, retention: retention}
	for _, k := range meta.Consumers {
		cs.findOrAddConsumer(k, now)
	}
	if dir == "" {
		return cs, nil
	}
	cs.listChanges.Store(1) // so that the first Save writes the state file, which also has the block number of this start
	path := filepath.Join(dir, ConsumersFile)
	cs.log = NewLog(fsys, path, []byte("consumers"))
	log, rec, err := OpenLog(fsys, path, func(kind byte, payload []byte) error { return cs.restoreRecord(kind, payload, now) })
	if errors.Is(err, fs.ErrNotExist) {
		if len(cs.byKey) > 0 {
			cs.Damage = fmt.Errorf("%s is missing: every consumer will be served all held samples again", path)
		}
		return cs, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the cursors of consumers: %w", err)
	}
	if !rec.HeaderDamaged {
		cs.log = log
	}
	cs.TornBytes, cs.Damage = rec.TornBytes, rec.Err
	if rec.HeaderDamaged || rec.Damaged > 0 {
		for _, c := range cs.byKey {
			clear(c.cursors)
		}
		cs.TornBytes, cs.Damage = 0, fmt.Errorf("%s was damaged: every consumer will be served all held samples again%s", path, rec.KeptCopyNote())
	}
	return cs, nil
}

// restoreRecord applies one record of the file of cursors. If the consumer is not in the state
// file, it is added without a name.
func (cs *Consumers) restoreRecord(kind byte, payload []byte, now time.Time) error {
	if kind != recordCursors {
		return fmt.Errorf("unknown kind of record %d", kind)
	}
	rec, err := decodeCursors(payload)
	if err != nil {
		return fmt.Errorf("decoding cursor record: %w", err)
	}
	c := cs.findOrAddConsumer(KnownConsumer{Key: rec.key}, now)
	if c == nil {
		return ErrConsumers
	}
	if c.lastScrape = rec.lastScrape; c.lastScrape.After(now) {
		c.lastScrape = now // this server's clock was ahead when the record was written
	}
	c.savedScrape = c.lastScrape
	c.confirmed = c.confirmed || len(rec.cursors) > 0
	for site, seq := range rec.cursors {
		if seq == 0 {
			delete(c.cursors, site)
		} else {
			c.cursors[site] = seq
		}
	}
	return nil
}

// SaveIfConsumersChanged calls Save if the list of consumers has changes that are not on disk. It
// waits for a Save that is writing them. If it returns nil, the server still knows these consumers
// after a crash.
func (cs *Consumers) SaveIfConsumersChanged() error {
	if !cs.isListUnsaved() {
		return nil
	}
	return cs.Save()
}

func (cs *Consumers) isListUnsaved() bool { return cs.listSaved.Load() != cs.listChanges.Load() }

// Save writes all changes to disk: the list of consumers if it changed, and then the cursors of all
// sites in one write. After an error the next call of Save tries the changes of cursors and of the
// list again. In memory-only mode Save writes nothing.
func (cs *Consumers) Save() error {
	_ = cs.lock.Lock(context.Background(), nil)
	defer cs.lock.Unlock()
	listUnsaved, listChanges := cs.isListUnsaved(), cs.listChanges.Load() // a later change is left to the next Save
	changes := cs.takeChanges()
	if cs.log != nil {
		if err := cs.write(changes, listUnsaved); err != nil {
			cs.putBack(changes)
			return fmt.Errorf("saving the cursors of consumers: %w", err)
		}
	}
	cs.listSaved.Store(listChanges)
	return nil
}

// write appends the changes to the file of cursors. It rewrites the whole file instead if the list
// of consumers changed, if the file is damaged, or if the file would grow beyond consumersSlack
// plus four times fullSize. The caller holds cs.lock.
func (cs *Consumers) write(changes cursorChanges, listUnsaved bool) error {
	if len(changes.frames) == 0 && !listUnsaved && !cs.log.MustBeRewritten() {
		return nil
	}
	if listUnsaved {
		if err := cs.state.Write(cs.knownConsumers()); err != nil {
			return err
		}
	}
	if !listUnsaved && !cs.log.MustBeRewritten() && cs.log.Size()+int64(len(changes.frames)) <= consumersSlack+4*int64(changes.fullSize) {
		return cs.log.Append(changes.frames, true)
	}
	return cs.log.RewriteWith(cs.encodeAll())
}

// knownConsumers returns all consumers without their cursors, sorted by key.
func (cs *Consumers) knownConsumers() (all []KnownConsumer) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		all = append(all, KnownConsumer{key, c.name, c.address})
	}
	return all
}

// cursorChanges are the changes of cursors since the last save.
type cursorChanges struct {
	frames   []byte                       // framed records of the changes
	unsaved  map[uint64]map[uint64]uint64 // consumer key → changed cursors by site key
	fullSize int                          // estimated bytes of a file that has each present cursor once
}

// takeChanges returns the unsaved changes and marks them as saved. If writing them fails, the
// caller must call putBack.
func (cs *Consumers) takeChanges() cursorChanges {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	changes := cursorChanges{unsaved: map[uint64]map[uint64]uint64{}}
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		changes.fullSize += 100 + 12*len(c.cursors)
		if len(c.unsaved) == 0 && c.lastScrape.Sub(c.savedScrape) < saveScrapeEvery {
			continue
		}
		changes.unsaved[key] = c.unsaved
		changes.frames = c.appendCursorRecord(changes.frames, c.unsaved)
		c.savedScrape, c.unsaved = c.lastScrape, map[uint64]uint64{}
	}
	return changes
}

// putBack marks changes as unsaved again. It leaves out each cursor that has changed again since
// takeChanges.
func (cs *Consumers) putBack(changes cursorChanges) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for key, unsaved := range changes.unsaved {
		c := cs.byKey[key]
		if c == nil {
			continue
		}
		for site, seq := range unsaved {
			if _, newer := c.unsaved[site]; !newer {
				c.unsaved[site] = seq
			}
		}
	}
}

func (cs *Consumers) encodeAll() (frames []byte) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		frames = c.appendCursorRecord(frames, c.cursors)
	}
	return frames
}

func (c *consumer) appendCursorRecord(frames []byte, cursors map[uint64]uint64) []byte {
	return AppendRecord(frames, recordCursors, encodeCursors(cursorRecord{c.key, c.lastScrape, cursors}))
}
