package main

// Cursors on disk. The loss of their file costs a repetition, never a sample. Changes are
// written together for all sites, beside the scrapes, so that no scrape waits for the disk.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"time"
)

// OpenConsumers reads the cursors in dir of the consumers in state; dir "" is memory-only
// mode. If the file is damaged, it returns an error and the consumers without any cursor: a
// record that was lost may have moved or removed each of them. If the file cannot be read,
// the result is nil.
func OpenConsumers(fsys FS, dir string, state *StoreState, retention time.Duration, now time.Time) (*Consumers, error) {
	cs := &Consumers{lock: make(chan struct{}, 1), byKey: map[uint64]*consumer{}, reported: map[uint64]map[uint64]time.Time{}, state: state, retention: retention}
	for _, k := range state.Consumers {
		cs.know(k, now)
	}
	if dir == "" {
		return cs, nil
	}
	cs.stale.Store(true)
	path := filepath.Join(dir, ConsumersFile)
	cs.log = NewLog(fsys, path, []byte("consumers"))
	log, rec, err := OpenLog(fsys, path, func(kind byte, payload []byte) error { return cs.restore(kind, payload, now) })
	switch {
	case errors.Is(err, fs.ErrNotExist) && len(cs.byKey) > 0:
		return cs, fmt.Errorf("%s is missing: every consumer is served again all that is held", path)
	case errors.Is(err, fs.ErrNotExist):
		return cs, nil
	case err != nil:
		return nil, fmt.Errorf("reading the cursors of consumers: %w", err)
	case !rec.HeaderDamaged:
		cs.log = log
	}
	if rec.HeaderDamaged || rec.Damaged > 0 {
		for _, c := range cs.byKey {
			clear(c.cursors)
		}
		return cs, fmt.Errorf("%s was damaged: every consumer is served again all that is held%s", path, rec.KeptAs())
	}
	cs.Torn = rec.TornBytes
	return cs, rec.Err
}

// know returns the consumer, adding it if need be as if it had scraped now; nil if there are
// too many.
func (cs *Consumers) know(k KnownConsumer, now time.Time) *consumer {
	c := cs.byKey[k.Key]
	if c == nil && len(cs.byKey) < MaxConsumers {
		c = newConsumer(k.Key, k.Name, k.Address)
		c.used = now
		cs.byKey[k.Key] = c
	}
	return c
}

func (cs *Consumers) restore(kind byte, b []byte, now time.Time) error {
	if kind != recordCursors {
		return fmt.Errorf("unknown kind of record %d", kind)
	}
	if len(b) < 8 {
		return errRecordConsumer
	}
	key, b := binary.LittleEndian.Uint64(b), b[8:]
	used, n := binary.Varint(b)
	c := cs.know(KnownConsumer{Key: key}, now) // its name was lost if state does not have it
	if c == nil || n <= 0 {
		return errRecordConsumer
	}
	if c.used = time.Unix(used, 0); c.used.After(now) {
		c.used = now // the clock was wrong then
	}
	c.saved = c.used
	for b = b[n:]; len(b) > 0; b = b[n:] {
		if len(b) < 9 {
			return errRecordConsumer
		}
		cluster := binary.LittleEndian.Uint64(b)
		b = b[8:]
		var at uint64
		if at, n = binary.Uvarint(b); n <= 0 || at > MaxSeq/2 { // batches yet to come are beyond it
			return errRecordConsumer
		}
		if at == 0 {
			delete(c.cursors, cluster)
		} else {
			c.cursors[cluster] = at
		}
	}
	return nil
}

var errRecordConsumer = errors.New("malformed record of a consumer")

// SaveKnown writes the consumers to disk if they changed, so that a crash does not make this
// server forget one that it has served.
func (cs *Consumers) SaveKnown() error {
	if !cs.stale.Load() {
		return nil
	}
	return cs.Save()
}

// Save writes all changes to disk: first the consumers, if they changed, then the cursors in
// one write for all clusters.
func (cs *Consumers) Save() error {
	cs.lock <- struct{}{}
	defer func() { <-cs.lock }()
	stale := cs.stale.Swap(false) // before all is gathered
	if cs.log == nil {
		cs.frames() // forgets what it would be
		return nil
	}
	frames, whole, changed := cs.frames()
	if len(frames) == 0 && !stale && !cs.log.Broken() {
		return nil
	}
	var err error
	if stale {
		err = cs.state.Write(cs.known())
	}
	switch {
	case err != nil:
	case stale || cs.log.Broken() || cs.log.Size()+int64(len(frames)) > consumersSlack+4*int64(whole):
		all := cs.all()
		err = cs.log.Rewrite(func(w io.Writer) error {
			_, err := w.Write(all)
			return err
		})
	default:
		err = cs.log.Append(frames)
	}
	if err != nil {
		if stale {
			cs.stale.Store(true)
		}
		cs.mu.Lock() // to be written again; what has changed meanwhile is newer
		for _, old := range changed {
			if c := cs.byKey[old.key]; c != nil {
				for cluster, at := range old.dirty {
					if _, newer := c.dirty[cluster]; !newer {
						c.dirty[cluster] = at
					}
				}
			}
		}
		cs.mu.Unlock()
		return fmt.Errorf("keeping the cursors of consumers: %w", err)
	}
	return nil
}

// known returns the consumers.
func (cs *Consumers) known() (all []KnownConsumer) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		all = append(all, KnownConsumer{key, c.name, c.address})
	}
	return all
}

// frames returns records of what has changed, how many bytes all records would take,
// and what to restore if they cannot be written.
func (cs *Consumers) frames() (frames []byte, whole int, changed []consumer) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		whole += 100 + 12*len(c.cursors)
		if len(c.dirty) == 0 && c.used.Sub(c.saved) < consumerSave {
			continue
		}
		changed = append(changed, consumer{key: key, dirty: c.dirty})
		frames = c.note(frames, c.dirty)
		c.saved, c.dirty = c.used, map[uint64]uint64{}
	}
	return frames, whole, changed
}

// all returns records of all that is known.
func (cs *Consumers) all() (frames []byte) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(cs.byKey)) {
		c := cs.byKey[key]
		frames = c.note(frames, c.cursors)
	}
	return frames
}

func (c *consumer) note(frames []byte, cursors map[uint64]uint64) []byte {
	b := binary.LittleEndian.AppendUint64(nil, c.key)
	b = binary.AppendVarint(b, c.used.Unix())
	for _, cluster := range slices.Sorted(maps.Keys(cursors)) {
		b = binary.AppendUvarint(binary.LittleEndian.AppendUint64(b, cluster), cursors[cluster])
	}
	return AppendRecord(frames, recordCursors, b)
}
