package main

// Tests of crashes: random operations use a log, while at each file operation in turn the process
// is killed or the operation fails. Records that an Append, a Create or a Rewrite has acknowledged
// survive a crash of the process. They survive a crash of the machine if they were synced.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
)

// logKeeper uses a log as a store does: it keeps the records in memory, appends records, drops the
// oldest records, and rewrites the log. Records are numbered in the order of their creation.
type logKeeper struct {
	t     *testing.T
	fs    *crashFS
	rng   *rand.Rand
	log   *Log
	next  uint32
	held  []uint32        // numbers of the acknowledged records that were not dropped
	sure  map[uint32]bool // numbers of the held records that were synced
	maybe map[uint32]bool // numbers of further records that recovery may find
}

// frame appends record n to buf. The kind and the payload of a record follow from its number.
func (k *logKeeper) frame(buf []byte, n uint32) []byte {
	p := binary.LittleEndian.AppendUint32(nil, n)
	return AppendRecord(buf, 1+byte(n), append(p, bytes.Repeat([]byte{byte(n)}, int(n*37)%97)...))
}

// synced records that all held records are durable.
func (k *logKeeper) synced() {
	clear(k.sure)
	for _, n := range k.held {
		k.sure[n] = true
	}
}

// append appends one to three records, with or without sync. A log that was never written is created
// with them. If that fails and the log must be rewritten, recovery may or may not find these records.
func (k *logKeeper) append() {
	var buf []byte
	var ids []uint32
	for range 1 + k.rng.IntN(3) {
		buf = k.frame(buf, k.next)
		ids = append(ids, k.next)
		k.next++
	}
	write, sync := k.log.Append, k.rng.IntN(2) == 0
	if k.log.Size() == 0 {
		write = k.log.Create
	}
	if err := write(buf, sync); err == nil {
		if k.held = append(k.held, ids...); sync {
			k.synced()
		}
	} else if k.log.MustBeRewritten() {
		for _, n := range ids {
			k.maybe[n] = true
		}
	}
}

// rewrite drops the oldest records, as many as drop says, and rewrites the log with the others.
// Unless the rewrite succeeds, recovery may still find the dropped records.
func (k *logKeeper) rewrite(drop int) {
	for _, n := range k.held[:drop] {
		k.maybe[n] = true
		delete(k.sure, n)
	}
	k.held = slices.Clone(k.held[drop:])
	err := k.log.Rewrite(func(w io.Writer) error {
		for _, n := range k.held {
			if _, err := w.Write(k.frame(nil, n)); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		clear(k.maybe)
		k.synced()
	}
}

// reopen reads the log as a new process does. machine says that the machine crashed. reopen checks
// that recovery finds every record that must have survived, that it finds no record that is neither
// in held nor in maybe, and that the records are in order. It returns an error if ListLogs or OpenLog
// failed. A missing log is not an error.
func (k *logKeeper) reopen(machine bool) error {
	for _, dir := range []string{"/", "/d"} {
		if _, _, err := ListLogs(k.fs, dir); err != nil && (dir == "/" || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	var got []uint32
	l, r, err := OpenLog(k.fs, logPath, func(kind byte, p []byte) error {
		n := binary.LittleEndian.Uint32(p)
		if !bytes.Equal(k.frame(nil, n), AppendRecord(nil, kind, p)) {
			k.t.Errorf("record %d has another content than when it was written", n)
		}
		got = append(got, n)
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) {
		k.t.Errorf("records are out of order: %v", got)
	}
	for _, n := range k.held {
		if (!machine || k.sure[n]) && !slices.Contains(got, n) {
			k.t.Errorf("record %d is lost: got %v, %+v", n, got, r)
		}
	}
	for _, n := range got {
		if !slices.Contains(k.held, n) && !k.maybe[n] {
			k.t.Errorf("record %d was dropped or never appended: got %v, %+v", n, got, r)
		}
	}
	if r.HeaderDamaged && len(k.sure) > 0 {
		k.t.Errorf("the crash damaged the header: %+v", r)
	}
	// A record of maybe is durable or not: it is in maybe until the next sync.
	for _, n := range append(got, k.held...) {
		if !k.sure[n] {
			k.maybe[n] = true
		}
	}
	if k.held = got; err != nil || r.HeaderDamaged {
		k.log = NewLog(k.fs, logPath, []byte("me"))
	} else {
		k.log = l
	}
	if r.IsDamaged() || k.log.MustBeRewritten() && len(got) > 0 {
		k.rewrite(0)
	}
	return nil
}

// step does one random thing: append, sync, rewrite or reopen. If the log must be rewritten, step
// rewrites it instead.
func (k *logKeeper) step() {
	switch {
	case k.log.MustBeRewritten() && k.log.Size() > 0:
		k.rewrite(0)
	case k.rng.IntN(6) == 0:
		k.rewrite(k.rng.IntN(len(k.held) + 1))
	case k.rng.IntN(8) == 0:
		_ = k.reopen(false) // an error can be ignored, because the log is opened again after the last step
	case k.rng.IntN(8) == 0:
		if k.log.Sync() == nil {
			k.synced()
		}
	default:
		k.append()
	}
}

// Recovery finds every synced record that was not dropped. After a restart of the process alone it
// also finds every acknowledged record. It finds no record that a successful Rewrite dropped, or that
// was never appended. The process is killed at any file operation, or the operation fails. The machine crashes afterwards, in some runs only after the process was
// restarted and continued. In half of the runs, a temporary file of an earlier crash exists.
func TestSweepLogCrashes(t *testing.T) {
	sweep(t)
	synctest.Test(t, crashLogAnywhere)
}

// crashLogAnywhere tries four modes for each seed and each file operation. In mode 0, the file
// operation fails, and the machine crashes after further steps. In modes 1 to 3, the process is
// killed during the file operation. In mode 1, the machine crashes with the process. In mode 2, the
// process is restarted before the machine crashes. In mode 3, the process is restarted and takes
// another step before the machine crashes.
func crashLogAnywhere(t *testing.T) {
	const seeds, steps = 12, 14
	for seed := range testSeeds(t, seeds) {
		for at, reached := 0, true; reached; at++ {
			for mode := range 4 {
				var dirs []string
				if seed%2 == 1 {
					dirs = append(dirs, "/d")
				}
				k := &logKeeper{t: t, fs: newCrashFS(seed<<32|uint64(at)<<2|uint64(mode), dirs...), sure: map[uint32]bool{}, maybe: map[uint32]bool{},
					rng: rand.New(rand.NewPCG(seed, 1)), next: 1}
				if len(dirs) > 0 { // an earlier crash left a temporary file; its record must never be found
					k.fs.put(logPath+logTempSuffix, k.frame(appendLogHeader(nil, []byte("me")), 1<<30))
				}
				k.log = NewLog(k.fs, logPath, []byte("me"))
				reached = false
				k.fs.hook = func(n int, op, _ string) fault {
					if n != at {
						return fault{}
					}
					reached = true
					if mode == 0 {
						return fault{Err: errFull}
					}
					return fault{Kill: true}
				}
				for range steps {
					k.step()
				}
				if mode >= 2 { // restart the process without a crash of the machine
					k.fs.restart()
					if err := k.reopen(false); err != nil {
						t.Errorf("opening the log after a restart: %v", err)
					}
					for range mode - 2 {
						k.step()
					}
				}
				for range 2 { // records that survived one crash must survive the next
					k.fs.crash()
					if err := k.reopen(true); err != nil {
						t.Errorf("opening the log after a crash: %v", err)
					}
				}
				if k.fs.open != 0 {
					t.Errorf("%d files are still open", k.fs.open)
				}
				if t.Failed() {
					t.Fatalf("the faults are in operation %d of seed %d, mode %d", at, seed, mode)
				}
			}
		}
	}
}
