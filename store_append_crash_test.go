package main

// A crash test of the store on a crashFS, which is a simulated disk. A run of random steps is
// repeated for each of its file operations. In that operation the disk fails or the process is
// killed, and later the machine crashes. No sample within retention is lost of a push that was
// acknowledged and that its sender does not keep. A scrape that the store lists as held or read was
// not lost. The store holds no sample that was never pushed.

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// storeKeeper makes random pushes to a store, runs its maintenance and moves its clock. Some pushes
// name a scrape of a spool. A consumer scrapes the store. The storeKeeper remembers the samples that
// it pushed, that the store acknowledged and that the consumer read.
type storeKeeper struct {
	*storeKit
	fs      *crashFS
	rng     *rand.Rand
	s       *Store
	acked   map[heldSample]float64 // acknowledged samples; the store must hold them within retention
	kept    map[heldSample]float64 // acknowledged samples that their sender keeps; the store must hold them within retention until the machine crashes
	ever    map[heldSample]float64 // all pushed samples that were within retention; the store may hold them
	read    map[heldSample]float64 // samples that the consumer has read
	last    *SampleList            // newest push that named a scrape, of site lastID
	lastID  string
	seq     map[string]uint64                  // site → number of the newest acknowledged batch
	scrapes map[string]map[uint64][]heldSample // site → number of a pushed scrape → its samples that the store accepted
}

func newStoreKeeper(t *testing.T, fsys *crashFS, seed uint64) *storeKeeper {
	k := &storeKeeper{
		storeKit: newStoreKit(t, fsys), fs: fsys, rng: rand.New(rand.NewPCG(seed, 1)),
		acked: map[heldSample]float64{}, kept: map[heldSample]float64{}, ever: map[heldSample]float64{}, read: map[heldSample]float64{},
		seq: map[string]uint64{}, scrapes: map[string]map[uint64][]heldSample{},
	}
	for n := range crashSites {
		k.scrapes[fmt.Sprint("c", n)] = map[uint64][]heldSample{}
	}
	k.cfg.LimitSeries = 5
	k.s = k.open()
	return k
}

const crashSites = 3

// randomPush returns a push of new, repeated and late samples. The value of a sample follows from
// its time, so that two samples of a series with the same time are duplicates, never a conflict.
func (k *storeKeeper) randomPush(id string) *SampleList {
	var points []point
	for range 1 + k.rng.IntN(4) {
		ago := k.rng.IntN(4)
		if k.rng.IntN(4) == 0 {
			ago = k.rng.IntN(7300)
		}
		at := k.clock.ms(ago) / 1000 * 1000
		points = append(points, point{"m", k.rng.IntN(7), at, float64(at % 1_000_000_000)})
	}
	return storePush(id, points...)
}

// push makes a random push. A quarter of the pushes must be synced. Half of the pushes name a scrape.
// Some of the others repeat the newest push that named a scrape, as a sender without a spool. If the store acknowledges the push, push checks
// the counts in the result. It checks that the store holds every pushed sample within retention,
// except for samples of new series that exceed the limit on series.
func (k *storeKeeper) push() {
	id := fmt.Sprint("c", k.rng.IntN(crashSites))
	p, names := k.randomPush(id), ScrapeNames{}
	number := uint64(len(k.scrapes[id]) + 1)
	if k.rng.IntN(2) == 0 {
		names = names1(number)
		k.scrapes[id][number] = nil
		k.last, k.lastID = p, id
	} else if k.last != nil && k.rng.IntN(3) == 0 {
		p, id = k.last, k.lastID
	}
	mustSync := k.rng.IntN(4) == 0
	before := heldOf(k.t, k.s, id)
	oldest := k.s.KeptSince()
	for _, smp := range p.Samples {
		if smp.T >= oldest {
			k.ever[heldSample{string(p.Line(smp)), smp.T}] = smp.V
		}
	}
	res, err := k.s.Append(context.Background(), id, p, names, mustSync)
	if err != nil {
		return
	}
	acked := k.acked
	if res.KeptBySender {
		if !k.s.RefreshSpoolStatus(id, 1).HasConsumers {
			k.t.Error("the store relies on the sender, which keeps nothing if no consumer is known")
		}
		acked = k.kept
	}
	after := heldOf(k.t, k.s, id)
	hadSeries, hasSeries := seriesSince(before, oldest), seriesSince(after, oldest)
	want := AppendResult{WriteTime: res.WriteTime, FirstOfSite: res.FirstOfSite, KeptBySender: res.KeptBySender && names.SpoolID != 0 && !mustSync}
	seen := map[heldSample]bool{}
	for _, smp := range p.Samples {
		key := heldSample{string(p.Line(smp)), smp.T}
		_, wasHeld := before[key]
		got, isHeld := after[key]
		switch {
		case smp.T < oldest:
			want.TooOld++
			continue
		case !isHeld:
			want.NoRoom++
			if hadSeries[key.line] || len(hasSeries) < k.cfg.LimitSeries {
				k.t.Errorf("%v is acknowledged but not held, although the site had its series or has only %d series", key, len(hasSeries))
			}
			continue
		case wasHeld || seen[key]:
			want.Duplicates++
		default:
			want.Accepted++
		}
		seen[key] = true
		acked[key] = smp.V
		if names.SpoolID != 0 {
			k.scrapes[id][number] = append(k.scrapes[id][number], key)
		}
		if got != smp.V {
			k.t.Errorf("%v has the value %v, want %v", key, got, smp.V)
		}
	}
	if res != want {
		k.t.Errorf("push of %d samples: got %+v, want %+v", len(p.Samples), res, want)
	}
	if c := k.s.sites[id]; c != nil {
		if c.data.Seq < k.seq[id] {
			k.t.Errorf("site %s: batch number %d follows %d", id, c.data.Seq, k.seq[id])
		}
		k.seq[id] = c.data.Seq
	}
}

// seriesSince returns the lines of the series with a held sample whose time is oldest or later.
func seriesSince(held map[heldSample]float64, oldest int64) map[string]bool {
	lines := map[string]bool{}
	for key := range held {
		if key.t >= oldest {
			lines[key.line] = true
		}
	}
	return lines
}

// check fails the test if a held sample was never pushed, if an acknowledged sample within
// retention is not held, if the batch numbers of a site went down, or if the store lists a scrape as
// held or read that was lost. machine says that the machine crashed, so that samples that their
// senders keep may be lost.
func (k *storeKeeper) check(machine bool) {
	got := allHeld(k.t, k.s)
	oldest := k.s.KeptSince()
	for key, v := range k.acked {
		if g, ok := got[key]; key.t >= oldest && (!ok || g != v) {
			k.t.Errorf("the acknowledged sample %v is lost", key)
		}
	}
	for key, v := range k.kept {
		if g, ok := got[key]; key.t >= oldest && !machine && (!ok || g != v) {
			k.t.Errorf("the sample %v is lost, although the machine did not crash", key)
		} else if !ok {
			delete(k.kept, key)
		}
	}
	for key, v := range got {
		if w, ok := k.ever[key]; !ok || v != w {
			k.t.Errorf("%v = %v is held but was never pushed", key, v)
		}
	}
	for id, seq := range k.seq {
		if c := k.s.sites[id]; c != nil && c.data.Seq < seq {
			k.t.Errorf("site %s: its newest batch number fell below %d: %+v", id, seq, c)
		}
	}
	for id := range k.scrapes {
		st := k.s.RefreshSpoolStatus(id, 1)
		for n, samples := range k.scrapes[id] {
			for _, key := range samples {
				_, held := got[key]
				_, read := k.read[key]
				if key.t >= oldest && (st.Held.Has(n) && !held || st.Read.Has(n) && !read) {
					k.t.Errorf("scrape %d of site %s is listed as held %v, read %v; its sample %v is held %t, read %t", n, id, st.Held, st.Read, key, held, read)
				}
			}
		}
	}
}

// reopen opens the store as a new process, and calls check. If files reach the disk in order, no
// crash damages a log, and OpenStore reports no error, except that a log may have no batch. reopen also
// checks the total of log bytes.
func (k *storeKeeper) reopen(machine bool) {
	k.errors = nil
	k.s = k.open()
	k.check(machine)
	if k.fs.inOrder {
		k.errors = slices.DeleteFunc(k.errors, func(err error) bool { return strings.Contains(err.Error(), youngLogHint) })
		k.wantNoErrors("reopening")
	}
	size := int64(0)
	for _, name := range k.fs.names() {
		if data, err := k.fs.ReadFile(name); err == nil && strings.HasSuffix(name, LogSuffix) && filepath.Dir(name) != "/s" {
			size += int64(len(data))
		}
	}
	if got := k.s.Stats().LogBytes; got != size {
		k.t.Errorf("the store counts %d bytes of logs; the disk has %d", got, size)
	}
}

// scrape has the consumer read everything, and sometimes saves its cursors. A killed process answers
// no scrape.
func (k *storeKeeper) scrape() {
	if k.fs.killed {
		return
	}
	maps.Copy(k.read, drain(k.t, k.storeKit, k.s, "central"))
	if k.rng.IntN(2) == 0 {
		k.s.saveCursors()
	}
}

func (k *storeKeeper) step() {
	if k.rng.IntN(40) == 0 {
		k.clock.Add(25 * time.Hour) // the store forgets the consumer
	}
	switch n := k.rng.IntN(14); {
	case n < 7:
		k.push()
	case n >= 12:
		k.scrape()
	case n < 9:
		k.clock.Add(time.Duration(k.rng.IntN(3000)) * time.Second)
	default:
		k.s.expireAndCompact(context.Background(), n == 9)
	}
	k.clock.Add(time.Duration(k.rng.IntN(3000)) * time.Millisecond)
}

// diskTrouble is a fault in one file operation, and the events after it. At the end the machine
// always crashes.
type diskTrouble struct {
	name      string
	kill      bool // the process is killed in the operation; otherwise the operation fails
	restart   bool // a new process opens the store before the machine crashes
	moreSteps int  // steps that the new process makes before the crash
}

// A store that is killed, or whose disk fails, at any one of its file operations loses no
// acknowledged sample within retention. This holds whether the process restarts, the machine
// crashes, or both. Only a crash of the machine loses samples that their sender keeps, and the store
// then does not list their scrape. With every second seed, files reach the disk in order, and such a
// crash damages only logs without any batch.
func TestSweepStoreCrashes(t *testing.T) {
	sweep(t)
	troubles := []diskTrouble{
		{name: "operation fails"},
		{name: "killed, then crash", kill: true},
		{name: "killed, restarted, then crash", kill: true, restart: true},
		{name: "killed, restarted, used, then crash", kill: true, restart: true, moreSteps: 1},
	}
	ops := map[string]int{}
	for seed := range testSeeds(t, 8) {
		for at, reached := uint64(0), true; reached; at++ {
			for i, trouble := range troubles {
				reached = crashAt(t, seed, at, uint64(i), trouble, ops)
				if t.Failed() {
					t.Fatalf("seed %d, file operation %d, %s", seed, at, trouble.name)
				}
			}
		}
	}
	for _, op := range []string{"write.log", "sync.log", "remove.tmp", "open.tmp", "write.tmp", "sync.tmp", "rename.tmp", "mkdir", "syncdir"} {
		found := false
		for reached := range ops {
			found = found || strings.HasPrefix(reached, op)
		}
		if !found {
			t.Errorf("no trouble happened in operation %s; it happened in %v", op, ops)
		}
	}
}

// crashAt makes random steps with a store. The argument at is the number, from 0, of the file
// operation at which the trouble happens. Then the machine crashes several times, and the store is
// opened after each crash. crashAt counts the operation in ops. It reports whether the steps
// reached the operation.
func crashAt(t *testing.T, seed, at, variant uint64, trouble diskTrouble, ops map[string]int) (reached bool) {
	t.Helper()
	fsys := newStoreFS(seed<<32 | at<<2 | variant)
	fsys.inOrder = seed%2 == 0
	k := newStoreKeeper(t, fsys, seed)
	seen := uint64(0)
	fsys.hook = func(_ int, op, name string) fault {
		if seen++; seen-1 != at {
			return fault{}
		}
		reached = true
		ops[op+filepath.Ext(name)]++
		if trouble.kill {
			return fault{Kill: true}
		}
		return fault{Err: []error{errDisk, errFull}[at%2]}
	}
	for range 24 {
		k.step()
	}
	if trouble.restart {
		fsys.restart()
		k.reopen(false)
		for range trouble.moreSteps {
			k.step()
		}
	}
	for range 2 { // a second crash must not lose samples that survived the first
		fsys.crash()
		k.reopen(true)
	}
	k.push()
	fsys.crash()
	k.reopen(true)
	if fsys.open != 0 {
		t.Errorf("%d files are still open", fsys.open)
	}
	if t.Failed() {
		t.Logf("the store reported errors: %v", k.errors)
	}
	return reached
}
