package main

// Cursors on disk. The loss of their file costs a repetition, never a sample. Changes are
// written together for all sites, beside the scrapes, so that no scrape waits for the disk.

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
	ConsumersFile = "consumers" + LogSuffix
	recordCursors = 1

	saveScrapeEvery = time.Hour // of a consumer whose scrapes move no cursor
	consumersSlack  = 64 << 10  // bytes of garbage that are not worth a rewrite
)

// cursorRecord is a record of the file: changes of the cursors of one consumer.
type cursorRecord struct {
	key        uint64
	lastScrape time.Time         // in seconds
	cursors    map[uint64]uint64 // site → number of a batch; 0 removes
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
		rec.cursors[site] = r.Uvarint(MaxSeq / 2) // batches yet to come are beyond it
	}
	return rec, r.Done()
}

// OpenConsumers reads the cursors in dir of the consumers in state; dir "" is memory-only mode.
// If the file is damaged, no consumer has a cursor, and Damage says so: a record that was lost
// may have moved or removed each of them. The error is that of reading the file.
func OpenConsumers(fsys FS, dir string, meta *StoreMeta, retention time.Duration, now time.Time) (*Consumers, error) {
	cs := &Consumers{lock: newIOLock(), byKey: map[uint64]*consumer{}, reported: map[uint64]map[uint64]time.Time{}, state: meta, retention: retention}
	for _, k := range meta.Consumers {
		cs.findOrAddConsumer(k, now)
	}
	if dir == "" {
		return cs, nil
	}
	cs.knownChanged.Store(true)
	path := filepath.Join(dir, ConsumersFile)
	cs.log = NewLog(fsys, path, []byte("consumers"))
	log, rec, err := OpenLog(fsys, path, func(kind byte, payload []byte) error { return cs.restoreRecord(kind, payload, now) })
	if errors.Is(err, fs.ErrNotExist) {
		if len(cs.byKey) > 0 {
			cs.Damage = fmt.Errorf("%s is missing: every consumer is served again all that is held", path)
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
		cs.TornBytes, cs.Damage = 0, fmt.Errorf("%s was damaged: every consumer is served again all that is held%s", path, rec.KeptCopyNote())
	}
	return cs, nil
}

// restoreRecord applies a record. A consumer that state does not have has lost its name.
func (cs *Consumers) restoreRecord(kind byte, payload []byte, now time.Time) error {
	if kind != recordCursors {
		return fmt.Errorf("unknown kind of record %d", kind)
	}
	rec, err := decodeCursors(payload)
	if err != nil {
		return fmt.Errorf("record of cursors: %w", err)
	}
	c := cs.findOrAddConsumer(KnownConsumer{Key: rec.key}, now)
	if c == nil {
		return ErrConsumers
	}
	if c.lastScrape = rec.lastScrape; c.lastScrape.After(now) {
		c.lastScrape = now // the clock was wrong then
	}
	c.savedScrape = c.lastScrape
	for site, seq := range rec.cursors {
		if seq == 0 {
			delete(c.cursors, site)
		} else {
			c.cursors[site] = seq
		}
	}
	return nil
}

// SaveIfConsumersChanged writes the consumers to disk if they changed, so that a crash does not
// make this server forget one that it has served.
func (cs *Consumers) SaveIfConsumersChanged() error {
	if !cs.knownChanged.Load() {
		return nil
	}
	return cs.Save()
}

// Save writes all changes to disk: first the consumers, if they changed, then the cursors of
// all sites in one write. After an error the next call writes the changes.
func (cs *Consumers) Save() error {
	_ = cs.lock.Lock(context.Background(), nil)
	defer cs.lock.Unlock()
	knownChanged := cs.knownChanged.Swap(false) // before the changes are taken
	changes := cs.takeChanges()
	if cs.log == nil {
		return nil
	}
	if err := cs.write(changes, knownChanged); err != nil {
		if knownChanged {
			cs.knownChanged.Store(true)
		}
		cs.putBack(changes)
		return fmt.Errorf("saving the cursors of consumers: %w", err)
	}
	return nil
}

func (cs *Consumers) write(changes cursorChanges, knownChanged bool) error {
	if len(changes.frames) == 0 && !knownChanged && !cs.log.MustBeRewritten() {
		return nil
	}
	if knownChanged {
		if err := cs.state.Write(cs.knownConsumers()); err != nil {
			return err
		}
	}
	if !knownChanged && !cs.log.MustBeRewritten() && cs.log.Size()+int64(len(changes.frames)) <= consumersSlack+4*int64(changes.fullSize) {
		return cs.log.Append(changes.frames)
	}
	return cs.log.RewriteWith(cs.encodeAll())
}

// knownConsumers returns the consumers without their cursors.
func (cs *Consumers) knownConsumers() (all []KnownConsumer) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		all = append(all, KnownConsumer{key, c.name, c.address})
	}
	return all
}

// cursorChanges are what has changed since the last save.
type cursorChanges struct {
	frames   []byte                       // records of it
	unsaved  map[uint64]map[uint64]uint64 // by consumer: the changes of cursors
	fullSize int                          // about what records of all cursors would take
}

// takeChanges returns the changes and counts them as saved.
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

// putBack undoes takeChanges, except where newer changes were made since.
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

// encodeAll returns records of all cursors.
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
