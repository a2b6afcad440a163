package main

// The file of the consumers' cursors. Damage of the file at most causes samples to be served twice,
// and the number of consumers is bounded.

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// putConsumers writes a state file with n consumers. Consumer i, from 1 to n, has the
// key i and the name "c<i>".
func putConsumers(t testing.TB, fsys FS, n int) {
	t.Helper()
	var known []KnownConsumer
	for i := 1; i <= n; i++ {
		known = append(known, KnownConsumer{uint64(i), fmt.Sprint("c", i), "::1"})
	}
	if err := openStoreState(t, fsys).Write(known); err != nil {
		t.Fatal(err)
	}
}

// cursorsFrame returns a framed record of a consumer with its last scrape, in Unix seconds, and its
// cursors. The i-th argument of cursors, from 0, is the cursor for site i. An argument of 0 removes
// the cursor.
func cursorsFrame(key uint64, lastScrape int64, cursors ...uint64) []byte {
	rec := cursorRecord{key, time.Unix(lastScrape, 0), map[uint64]uint64{}}
	for i, at := range cursors {
		rec.cursors[uint64(i)] = at
	}
	return AppendRecord(nil, recordCursors, encodeCursors(rec))
}

func cursorsFile(frames ...[]byte) []byte {
	return slices.Concat(append([][]byte{appendLogHeader(nil, []byte("consumers"))}, frames...)...)
}

// OpenConsumers restores the cursors of an undamaged file. If any record of the file is damaged, it
// keeps the consumers and drops all cursors, because the damaged record may have removed a cursor.
// Save repairs the file.
func TestConsumersRestore(t *testing.T) {
	record := func(kind byte, payload string) []byte { return AppendRecord(nil, kind, []byte(payload)) }
	now := consumersNow.Unix()
	type cursors = map[string]map[uint64]uint64
	for _, test := range []struct {
		name    string
		frames  [][]byte
		damaged bool
		want    cursors // by the consumer's name; the state file has consumer c1
	}{
		{"no record", nil, false, cursors{"c1": {}}},
		{"one record", [][]byte{cursorsFrame(1, now, 5, 6)}, false, cursors{"c1": {0: 5, 1: 6}}},
		{"a cursor moved, a cursor removed", [][]byte{cursorsFrame(1, now, 5, 6, 7), cursorsFrame(1, now, 9, 0)}, false, cursors{"c1": {0: 9, 2: 7}}},
		{"consumer without a name in the state", [][]byte{cursorsFrame(2, now, 5)}, false, cursors{"c1": {}, "#2": {0: 5}}},
		{"unknown kind", [][]byte{cursorsFrame(1, now, 5), record(9, "xyz")}, true, cursors{"c1": {}}},
		{"no time", [][]byte{cursorsFrame(1, now, 5), record(recordCursors, "\x01\x00\x00\x00\x00\x00\x00\x00")}, true, cursors{"c1": {}}},
		{"half a cursor", [][]byte{cursorsFrame(1, now, 5), record(recordCursors, "\x01\x00\x00\x00\x00\x00\x00\x00\x02abc")}, true, cursors{"c1": {}}},
		{"unknown kind in the middle", [][]byte{cursorsFrame(1, now, 5), record(9, "xyz"), cursorsFrame(1, now, 7)}, true, cursors{"c1": {}}},
		{"unknown kind, consumer without a name", [][]byte{cursorsFrame(2, now, 5), record(9, "xyz")}, true, cursors{"c1": {}, "#2": {}}},
		{"batch number above MaxSeq", [][]byte{cursorsFrame(1, now, math.MaxUint64)}, true, cursors{"c1": {}}},
		{"batch number MaxSeq, which no cursor can have", [][]byte{cursorsFrame(1, now, MaxSeq)}, true, cursors{"c1": {}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			fsys := newStoreFS(1)
			putConsumers(t, fsys, 1)
			fsys.put(consumersPath, cursorsFile(test.frames...))
			cs := openConsumers(t, fsys, consumersNow, test.damaged)
			if got := cursorsOf(cs); !sameCursors(got, test.want) {
				t.Errorf("got cursors %v, want %v", got, test.want)
			}
			saveConsumers(t, cs)
			if got := cursorsOf(openConsumers(t, fsys, consumersNow, false)); !sameCursors(got, test.want) {
				t.Errorf("after Save: got cursors %v, want %v", got, test.want)
			}
		})
	}
}

// A file with more consumers than MaxConsumers counts as damaged, and the consumers beyond the
// limit are dropped. The known consumers can scrape, a new consumer cannot.
func TestConsumersFileOverLimit(t *testing.T) {
	fsys := newStoreFS(1)
	putConsumers(t, fsys, 10)
	var frames [][]byte
	for i := range uint64(MaxConsumers + 10) {
		frames = append(frames, cursorsFrame(1+i, consumersNow.Unix(), 5))
	}
	fsys.put(consumersPath, cursorsFile(frames...))
	cs := openConsumers(t, fsys, consumersNow, true)
	if n := len(cs.byKey); n != MaxConsumers {
		t.Errorf("%d consumers are known, want %d", n, MaxConsumers)
	}
	if _, _, err := cs.BeginScrape(ConsumerKey("new", "", ""), "new", "", &AnswerReadTracker{}, consumersNow); err == nil {
		t.Error("a new consumer can scrape")
	}
	if _, _, err := cs.BeginScrape(3, "c3", "::1", &AnswerReadTracker{}, consumersNow); err != nil {
		t.Errorf("a known consumer cannot scrape: %v", err)
	}
	saveConsumers(t, cs)
	if n := len(openConsumers(t, fsys, consumersNow, false).byKey); n != MaxConsumers {
		t.Errorf("%d consumers are known after Save, want %d", n, MaxConsumers)
	}
}

// A last scrape that is recorded in the far future, by a clock that was wrong, does not keep a
// consumer known for ever.
func TestConsumersLastScrapeInFuture(t *testing.T) {
	for _, lastScrape := range []int64{consumersNow.Add(1000 * time.Hour).Unix(), math.MaxInt64, math.MinInt64} {
		fsys := newStoreFS(1)
		fsys.put(consumersPath, cursorsFile(cursorsFrame(1, lastScrape, 5)))
		cs := openConsumers(t, fsys, consumersNow, false)
		cs.DropIdle(consumersNow.Add(consumerIdle + time.Second))
		if len(cs.byKey) != 0 {
			t.Errorf("last scrape at %d: the consumer is still known after more than %v", lastScrape, consumerIdle)
		}
	}
}

// A consumer that Consumers has forgotten stays forgotten after a restart, even if a save failed in
// between. The state file no longer has the consumer either.
func TestConsumersForgottenOnDisk(t *testing.T) {
	fsys := newStoreFS(1)
	cs := openConsumers(t, fsys, consumersNow, false)
	for _, name := range []string{"gone", "stays"} {
		confirm(t, cs, name, consumersNow, map[uint64]uint64{1: 5, 2: 6})
	}
	saveConsumers(t, cs)
	later := consumersNow.Add(consumerIdle + time.Minute)
	confirm(t, cs, "stays", later.Add(-time.Hour), nil)
	cs.DropIdle(later)
	fsys.hook = func(int, string, string) fault { return fault{Err: errDisk} }
	if err := cs.Save(); err == nil {
		t.Fatal("Save succeeds on a disk that fails")
	}
	fsys.hook = nil
	saveConsumers(t, cs)
	want := map[string]map[uint64]uint64{"stays": {1: 5, 2: 6}}
	if got := cursorsOf(openConsumers(t, fsys, later, false)); !sameCursors(got, want) {
		t.Errorf("after a restart: got cursors %v, want %v", got, want)
	}
	if data, err := fsys.ReadFile(statePath); err != nil || strings.Contains(string(data), "gone") {
		t.Errorf("the state file still has the forgotten consumer, or cannot be read: %v", err)
	}
}

// A consumer that is forgotten, and scrapes again before its removal is saved, does not get its old
// cursors back after a restart.
func TestConsumersForgottenAndBack(t *testing.T) {
	fsys := newStoreFS(1)
	cs := openConsumers(t, fsys, consumersNow, false)
	confirm(t, cs, "back", consumersNow, map[uint64]uint64{1: 5, 2: 6})
	saveConsumers(t, cs)
	later := consumersNow.Add(consumerIdle + time.Minute)
	cs.DropIdle(later)
	confirm(t, cs, "back", later, map[uint64]uint64{1: 7})
	saveConsumers(t, cs)
	want := map[string]map[uint64]uint64{"back": {1: 7}}
	if got := cursorsOf(openConsumers(t, fsys, later, false)); !sameCursors(got, want) {
		t.Errorf("after a restart: got cursors %v, want %v", got, want)
	}
}

// After a Save that failed, the next Save writes the same cursors again. It does not overwrite a
// cursor that moved meanwhile.
func TestConsumersSaveFails(t *testing.T) {
	fsys := newStoreFS(1)
	cs := openConsumers(t, fsys, consumersNow, false)
	confirm(t, cs, "a", consumersNow, map[uint64]uint64{1: 5, 2: 5, 3: 5})
	saveConsumers(t, cs)
	confirm(t, cs, "a", consumersNow, map[uint64]uint64{1: 6, 2: 6})
	confirm(t, cs, "b", consumersNow, map[uint64]uint64{1: 9})
	cs.DropSiteCursors(3)
	failed := 0
	fsys.hook = func(_ int, op, _ string) fault {
		if op != "write" {
			return fault{} // only writes fail, so that Save can cut the half-written record off the log
		}
		failed++
		confirm(t, cs, "a", consumersNow, map[uint64]uint64{1: 7})
		return fault{Err: errDisk}
	}
	if err := cs.Save(); err == nil || failed != 1 || cs.log.MustBeRewritten() {
		t.Fatalf("Save on a disk that fails: %v after %d writes; the log must be rewritten: %t", err, failed, cs.log.MustBeRewritten())
	}
	fsys.hook = nil
	saveConsumers(t, cs)
	fsys.crash()
	want := map[string]map[uint64]uint64{"a": {1: 7, 2: 6}, "b": {1: 9}}
	if got := cursorsOf(openConsumers(t, fsys, consumersNow, false)); !sameCursors(got, want) {
		t.Errorf("after a crash: got cursors %v, want %v", got, want)
	}
}

// consumersHistory saves consumers several times. It returns the contents of the file of cursors
// and of the state file, and the cursors at the end.
func consumersHistory(t testing.TB) (data, state []byte, final map[string]map[uint64]uint64) {
	fsys := newStoreFS(1)
	cs := openConsumers(t, fsys, consumersNow, false)
	for i := range uint64(6) {
		confirm(t, cs, "first", consumersNow, map[uint64]uint64{i % 3: 10 + i, 1000 + i: 7})
		if i > 1 {
			confirm(t, cs, "second", consumersNow, map[uint64]uint64{i % 2: 20 + i})
		}
		if i == 4 {
			cs.DropSiteCursors(1001)
		}
		saveConsumers(t, cs)
	}
	data, err := fsys.ReadFile(consumersPath)
	if err != nil {
		t.Fatal(err)
	}
	if state, err = fsys.ReadFile(statePath); err != nil {
		t.Fatal(err)
	}
	return data, state, cursorsOf(cs)
}

// The file of the cursors can be cut, flipped or zeroed at any byte. No restored cursor is past the
// batch that its consumer confirmed, except for a site that left the store. All consumers of the
// state file stay known. Save repairs the file.
func TestConsumersDamage(t *testing.T) {
	data, state, final := consumersHistory(t)
	check := func(name string, data []byte) {
		t.Helper()
		fsys := newStoreFS(1)
		fsys.put(consumersPath, data)
		fsys.put(statePath, state)
		cs, _ := OpenConsumers(fsys, "/s", openStoreState(t, fsys), time.Hour, consumersNow)
		got := cursorsOf(cs)
		if len(got) != len(final) {
			t.Fatalf("%s: consumers %v are known, want %v", name, got, final)
		}
		for consumer, cursors := range got {
			for site, at := range cursors {
				// Site 1001 left the store, and a record removed its cursor. If damage loses that
				// record, the old cursor is back. It does no harm, because later batches of the
				// site get higher numbers than the cursor.
				if at > final[consumer][site] && site != 1001 {
					t.Fatalf("%s: the cursor of consumer %s for site %d is %d, and batch %d was confirmed", name, consumer, site, at, final[consumer][site])
				}
			}
		}
		saveConsumers(t, cs)
		if again := cursorsOf(openConsumers(t, fsys, consumersNow, false)); !sameCursors(got, again) {
			t.Fatalf("%s: got cursors %v, and %v after Save", name, got, again)
		}
	}
	for n := range len(data) {
		check(fmt.Sprint("cut at ", n), data[:n])
		flipped := slices.Clone(data)
		flipped[n] ^= 0x40
		check(fmt.Sprint("flipped at ", n), flipped)
		check(fmt.Sprint("16 zeros at ", n), slices.Concat(data[:n], make([]byte, min(16, len(data)-n)), data[min(n+16, len(data)):]))
	}
}

// SaveIfConsumersChanged returns only when the list of consumers is on disk, even if another Save is
// already writing it, or has failed to.
func TestSaveIfConsumersChangedWaits(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault fault // of the write that the first Save makes
	}{{"another Save writes the list", fault{}}, {"another Save fails", fault{Err: errDisk}}} {
		synctest.Test(t, func(t *testing.T) {
			fsys := newStoreFS(1)
			cs := openConsumers(t, fsys, consumersNow, false)
			saveConsumers(t, cs)
			beginScrape(t, cs, "a", &AnswerReadTracker{}, consumersNow)
			blocked, goOn := false, make(chan struct{})
			fsys.hook = func(int, string, string) (f fault) {
				if !blocked {
					blocked, f = true, c.fault
					<-goOn
				}
				return f
			}
			first := make(chan error, 1)
			go func() { first <- cs.Save() }()
			synctest.Wait()
			var returned atomic.Bool
			second := make(chan error, 1)
			go func() {
				second <- cs.SaveIfConsumersChanged()
				returned.Store(true)
			}()
			synctest.Wait()
			if !blocked || returned.Load() {
				t.Errorf("%s: blocked %t; SaveIfConsumersChanged returns while the list is not on disk", c.name, blocked)
			}
			close(goOn)
			if err := <-first; (err != nil) != (c.fault.Err != nil) {
				t.Errorf("%s: the first Save returned %v", c.name, err)
			}
			if err := <-second; err != nil {
				t.Errorf("%s: SaveIfConsumersChanged: %v", c.name, err)
			}
			if again := openConsumers(t, fsys, consumersNow, false); len(again.byKey) != 1 {
				t.Errorf("%s: %d consumers are on disk, want 1", c.name, len(again.byKey))
			}
		})
	}
}

// OpenConsumers does not panic on any bytes after the header of the file of cursors, and keeps to
// the limits on consumers and cursors. Save repairs the file.
func FuzzConsumers(f *testing.F) {
	data, _, _ := consumersHistory(f)
	header := len(appendLogHeader(nil, []byte("consumers")))
	f.Add(data[header:], false)
	f.Add(data[header:], true)
	f.Add(cursorsFrame(2, 1<<40, 1, 0, MaxSeq/4), false)
	f.Add([]byte{recordCursors, 9, 1, 2, 3, 4, 5, 6, 7, 8, 0}, true)
	f.Fuzz(func(t *testing.T, b []byte, framed bool) {
		file := appendLogHeader(nil, []byte("consumers"))
		// If framed is true, b is a list of kinds, lengths and payloads. Each payload becomes a
		// record with a valid checksum.
		if framed {
			for len(b) > 2 {
				n := min(int(b[1]), len(b)-2)
				file = AppendRecord(file, max(1, b[0]), b[2:2+n])
				b = b[2+n:]
			}
		} else {
			file = append(file, b...)
		}
		fsys := newStoreFS(1)
		fsys.put(consumersPath, file)
		cs, _ := OpenConsumers(fsys, "/s", openStoreState(t, fsys), time.Hour, consumersNow)
		if len(cs.byKey) > MaxConsumers {
			t.Fatalf("%d consumers are known; the limit is %d", len(cs.byKey), MaxConsumers)
		}
		for _, c := range cs.byKey {
			if c.lastScrape.After(consumersNow) {
				t.Fatalf("consumer %d has its last scrape in the future, at %v", c.key, c.lastScrape)
			}
		}
		if highest := cs.HighestCursor(); highest > MaxSeq/2 {
			t.Fatalf("a cursor has number %d; the highest allowed is %d", highest, uint64(MaxSeq/2))
		}
		got := cursorsOf(cs)
		saveConsumers(t, cs)
		if again := cursorsOf(openConsumers(t, fsys, consumersNow, false)); !sameCursors(got, again) {
			t.Fatalf("got cursors %v, and %v after Save", got, again)
		}
	})
}
