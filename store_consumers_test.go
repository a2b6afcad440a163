package main

// Tests of the consumers' cursors, in memory and in their file: a damaged file costs at
// most samples that are served twice, and the number of cursors is bounded.

import (
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
)

const consumersPath = "/s/" + ConsumersFile

var consumersNow = time.UnixMilli(1_700_000_000_000)

// openConsumers opens what is kept in fsys; damage is to say whether that was damaged.
func openConsumers(t testing.TB, fsys FS, now time.Time, damage bool) *Consumers {
	t.Helper()
	cs, err := OpenConsumers(fsys, "/s", openStoreState(t, fsys), time.Hour, now)
	if err != nil || (cs.Damage != nil) != damage {
		t.Fatalf("opening: %v, %v; damage %t", err, cs.Damage, damage)
	}
	return cs
}

// openStoreState reads the state that is kept in fsys.
func openStoreState(t testing.TB, fsys FS) *StoreMeta {
	t.Helper()
	state, err := OpenStoreMeta(fsys, "/s")
	if err != nil || state.Damage != nil {
		t.Fatal(err, state.Damage)
	}
	return state
}

// confirm has a consumer serve and confirm places, on a connection of its own.
func confirm(t testing.TB, cs *Consumers, name string, now time.Time, places map[uint64]uint64) {
	t.Helper()
	conn := &AnswerReadTracker{}
	for range 2 {
		r, _, err := cs.BeginScrape(ConsumerKey(name, "::1", ""), name, "::1", conn, now)
		if err != nil {
			t.Fatal(err)
		}
		for site, seq := range places {
			r.MarkServed(site, ReadPosition{Seq: seq}, 1)
		}
	}
}

func saveConsumers(t testing.TB, cs *Consumers) {
	t.Helper()
	if err := cs.Save(); err != nil {
		t.Fatal(err)
	}
}

// cursorsOf returns the cursors by the consumers' names, or keys where the name is lost.
func cursorsOf(cs *Consumers) map[string]map[uint64]uint64 {
	all := map[string]map[uint64]uint64{}
	for _, c := range cs.byKey {
		name := c.name
		if name == "" {
			name = fmt.Sprint("#", c.key)
		}
		all[name] = maps.Clone(c.cursors)
	}
	return all
}

func sameCursors(a, b map[string]map[uint64]uint64) bool { return maps.EqualFunc(a, b, maps.Equal) }

// putConsumers has the state in fsys know consumers "c1" …, with the keys 1 ….
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

// usedFrame is a record of kind recordCursors.
func usedFrame(key uint64, used int64, cursors ...uint64) []byte {
	rec := cursorRecord{key, time.Unix(used, 0), map[uint64]uint64{}}
	for i, at := range cursors {
		rec.cursors[uint64(i)] = at
	}
	return AppendRecord(nil, recordCursors, encodeCursors(rec))
}

// The content of a file, and what is known after it was read. The state has one consumer,
// "c1".
func TestConsumersRestore(t *testing.T) {
	record := func(kind byte, payload string) []byte { return AppendRecord(nil, kind, []byte(payload)) }
	now := consumersNow.Unix()
	type cursors = map[string]map[uint64]uint64
	for _, test := range []struct {
		name    string
		frames  [][]byte
		damaged bool
		want    cursors
	}{
		{"nothing", nil, false, cursors{"c1": {}}},
		{"one", [][]byte{usedFrame(1, now, 5, 6)}, false, cursors{"c1": {0: 5, 1: 6}}},
		{"moved and removed", [][]byte{usedFrame(1, now, 5, 6, 7), usedFrame(1, now, 9, 0)}, false, cursors{"c1": {0: 9, 2: 7}}},
		{"a consumer whose name is lost", [][]byte{usedFrame(2, now, 5)}, false, cursors{"c1": {}, "#2": {0: 5}}},
		// All cursors are forgotten: what was lost may have removed one.
		{"unknown kind", [][]byte{usedFrame(1, now, 5), record(9, "xyz")}, true, cursors{"c1": {}}},
		{"no time", [][]byte{usedFrame(1, now, 5), record(recordCursors, "\x01\x00\x00\x00\x00\x00\x00\x00")}, true, cursors{"c1": {}}},
		{"half a cursor", [][]byte{usedFrame(1, now, 5), record(recordCursors, "\x01\x00\x00\x00\x00\x00\x00\x00\x02abc")}, true, cursors{"c1": {}}},
		{"a record in the middle", [][]byte{usedFrame(1, now, 5), record(9, "xyz"), usedFrame(1, now, 7)}, true, cursors{"c1": {}}},
		{"also of one whose name is lost", [][]byte{usedFrame(2, now, 5), record(9, "xyz")}, true, cursors{"c1": {}, "#2": {}}},
		{"a number beyond all batches", [][]byte{usedFrame(1, now, math.MaxUint64)}, true, cursors{"c1": {}}},
		{"the highest number that a log takes", [][]byte{usedFrame(1, now, MaxSeq)}, true, cursors{"c1": {}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			fsys := newStoreFS(1)
			putConsumers(t, fsys, 1)
			fsys.put(consumersPath, slices.Concat(append([][]byte{appendLogHeader(nil, []byte("consumers"))}, test.frames...)...))
			cs := openConsumers(t, fsys, consumersNow, test.damaged)
			if got := cursorsOf(cs); !sameCursors(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
			saveConsumers(t, cs)
			if got := cursorsOf(openConsumers(t, fsys, consumersNow, false)); !sameCursors(got, test.want) {
				t.Errorf("mended: %v, want %v", got, test.want)
			}
		})
	}
}

// More consumers than may be known are not kept, and those that are go on.
func TestConsumersTooMany(t *testing.T) {
	fsys := newStoreFS(1)
	putConsumers(t, fsys, 10)
	file := appendLogHeader(nil, []byte("consumers"))
	for i := range uint64(MaxConsumers + 10) {
		file = append(file, usedFrame(1+i, consumersNow.Unix(), 5)...)
	}
	fsys.put(consumersPath, file)
	cs := openConsumers(t, fsys, consumersNow, true)
	if n := len(cs.byKey); n != MaxConsumers {
		t.Errorf("%d consumers", n)
	}
	if _, _, err := cs.BeginScrape(ConsumerKey("new", "", ""), "new", "", &AnswerReadTracker{}, consumersNow); err == nil {
		t.Error("another is taken")
	}
	if _, _, err := cs.BeginScrape(3, "c3", "::1", &AnswerReadTracker{}, consumersNow); err != nil {
		t.Error(err)
	}
	saveConsumers(t, cs)
	if n := len(openConsumers(t, fsys, consumersNow, false).byKey); n != MaxConsumers {
		t.Errorf("mended: %d consumers", n)
	}
}

// A use that is noted in the future, by a clock that was wrong, keeps none for ever.
func TestConsumersUsedInFuture(t *testing.T) {
	for _, used := range []int64{consumersNow.Add(1000 * time.Hour).Unix(), math.MaxInt64, math.MinInt64} {
		fsys := newStoreFS(1)
		fsys.put(consumersPath, slices.Concat(appendLogHeader(nil, []byte("consumers")), usedFrame(1, used, 5)))
		cs := openConsumers(t, fsys, consumersNow, false)
		cs.DropIdle(consumersNow.Add(consumerIdle + time.Second))
		if len(cs.byKey) != 0 {
			t.Errorf("used at %d: still known a day later", used)
		}
	}
}

// A consumer that was forgotten stays so over a restart, in part and as a whole.
func TestConsumersExpire(t *testing.T) {
	fsys := newStoreFS(1)
	cs := openConsumers(t, fsys, consumersNow, false)
	for _, name := range []string{"gone", "back", "stays"} {
		confirm(t, cs, name, consumersNow, map[uint64]uint64{1: 5, 2: 6})
	}
	saveConsumers(t, cs)
	later := consumersNow.Add(consumerIdle + time.Minute)
	confirm(t, cs, "stays", later.Add(-time.Hour), nil)
	cs.DropIdle(later)
	fail := true
	fsys.hook = func(int, string, string) fault {
		if fail {
			return fault{Err: errDisk}
		}
		return fault{}
	}
	if err := cs.Save(); err == nil {
		t.Fatal("saved, on a disk that fails")
	}
	fail = false
	saveConsumers(t, cs)
	want := map[string]map[uint64]uint64{"stays": {1: 5, 2: 6}}
	if got := cursorsOf(openConsumers(t, fsys, later, false)); !sameCursors(got, want) {
		t.Errorf("after a restart: %v, want %v", got, want)
	}
	if data, err := fsys.ReadFile(statePath); err != nil || strings.Contains(string(data), "gone") {
		t.Errorf("the state still names who is gone: %v", err)
	}
	// A consumer that returns before its removal is on disk starts anew too.
	confirm(t, cs, "back", consumersNow, map[uint64]uint64{1: 5, 2: 6})
	saveConsumers(t, cs)
	cs.DropIdle(later)
	confirm(t, cs, "back", later, map[uint64]uint64{1: 7})
	saveConsumers(t, cs)
	want["back"] = map[uint64]uint64{1: 7}
	if got := cursorsOf(openConsumers(t, fsys, later, false)); !sameCursors(got, want) {
		t.Errorf("after a restart: %v, want %v", got, want)
	}
}

// consumersHistory returns the file as several saves leave it, the state and the cursors
// then.
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

// Wherever the file is cut or damaged, no cursor is past what was confirmed, all consumers
// are known whose records can be read, and the file is good again once it is saved.
func TestConsumersDamage(t *testing.T) {
	data, state, final := consumersHistory(t)
	check := func(what string, data []byte) {
		t.Helper()
		fsys := newStoreFS(1)
		fsys.put(consumersPath, data)
		fsys.put(statePath, state)
		cs, _ := OpenConsumers(fsys, "/s", openStoreState(t, fsys), time.Hour, consumersNow)
		got := cursorsOf(cs)
		if len(got) != len(final) {
			t.Fatalf("%s: consumers %v are known, of %v", what, got, final)
		}
		for name, cursors := range got {
			for site, at := range cursors {
				// A lost record may have removed the cursor of 1001; the numbers of that
				// site's next batches are above it all the same.
				if at > final[name][site] && site != 1001 {
					t.Fatalf("%s: %s is at %d of site %d, and confirmed %d", what, name, at, site, final[name][site])
				}
			}
		}
		saveConsumers(t, cs)
		if again := cursorsOf(openConsumers(t, fsys, consumersNow, false)); !sameCursors(got, again) {
			t.Fatalf("%s: %v, and mended %v", what, got, again)
		}
	}
	for n := range len(data) {
		check(fmt.Sprint("cut at ", n), data[:n])
		damaged := slices.Clone(data)
		damaged[n] ^= 0x40
		check(fmt.Sprint("flipped at ", n), damaged)
		check(fmt.Sprint("a sector of zeros at ", n), slices.Concat(data[:n], make([]byte, min(16, len(data)-n)), data[min(n+16, len(data)):]))
	}
}

// No content of the file makes reading panic or exceed the bound on cursors, and the next
// save repairs the file.
func FuzzConsumers(f *testing.F) {
	data, _, _ := consumersHistory(f)
	header := len(appendLogHeader(nil, []byte("consumers")))
	f.Add(data[header:], false)
	f.Add(data[header:], true)
	f.Add(usedFrame(2, 1<<40, 1, 0, MaxSeq/4), false)
	f.Add([]byte{recordCursors, 9, 1, 2, 3, 4, 5, 6, 7, 8, 0}, true)
	f.Fuzz(func(t *testing.T, b []byte, framed bool) {
		file := appendLogHeader(nil, []byte("consumers"))
		if framed { // each payload by its kind and length, so that none is stopped by its CRC
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
			t.Fatalf("%d consumers", len(cs.byKey))
		}
		for _, c := range cs.byKey {
			if c.lastScrape.After(consumersNow) {
				t.Fatalf("consumer %d, used at %v", c.key, c.lastScrape)
			}
		}
		if highest := cs.HighestCursor(); highest > MaxSeq/2 {
			t.Fatalf("a cursor at %d", highest)
		}
		got := cursorsOf(cs)
		saveConsumers(t, cs)
		if again := cursorsOf(openConsumers(t, fsys, consumersNow, false)); !sameCursors(got, again) {
			t.Fatalf("%v, and saved %v", got, again)
		}
	})
}

// In memory only, nothing is gathered for a file that is not written; nor is anything
// for sites that are held no more, or for connections without end.
func TestConsumersMemoryOnly(t *testing.T) {
	cs, err := OpenConsumers(nil, "", &StoreMeta{}, time.Hour, consumersNow)
	if err != nil {
		t.Fatal(err)
	}
	for site := range uint64(100) {
		confirm(t, cs, "c", consumersNow, map[uint64]uint64{site: 1})
		cs.DropSiteCursors(site)
		saveConsumers(t, cs)
	}
	for _, c := range cs.byKey {
		n := len(c.unsaved) + len(c.cursors)
		for _, r := range c.sessions {
			n += len(r.confirmed) + len(r.served)
		}
		if n > 0 {
			t.Errorf("%d cursors and places of sites that are held no more", n)
		}
		if len(c.sessions) > maxSessions {
			t.Errorf("%d connections are remembered", len(c.sessions))
		}
	}
}

// A scrape that is slow, or lost, makes the next ones shorter; that it arrived is no
// reason to make them longer again, but that a quick one did is.
func TestConsumersLimit(t *testing.T) {
	const most = time.Second
	const cut = time.Duration(-1) // its connection ended
	type step struct {
		served int
		took   time.Duration
		lost   bool
		want   int // limit of the next scrape
	}
	for _, test := range []struct {
		name  string
		steps []step
	}{
		{"quick", []step{{8000, most, false, 100_000}}},
		{"slow", []step{{8000, 2 * most, false, 4000}, {4000, most, false, 8000}, {8000, most, false, 16_000}}},
		{"slow and slow again", []step{{8000, 2 * most, false, 4000}, {4000, 2 * most, false, 2000}, {2000, 5 * most, false, 1000}}},
		{"never less than so many", []step{{8000, 100 * most, false, 1000}, {500, 100 * most, false, 1000}}},
		{"lost", []step{{8000, 0, true, 4000}, {4000, 0, false, 8000}}},
		{"slow and lost", []step{{8000, 4 * most, true, 2000}, {2000, 0, true, 1000}}},
		{"nothing new in it", []step{{8000, 2 * most, false, 4000}, {0, 2 * most, false, 4000}, {0, 0, true, 4000}}},
		{"all again", []step{{8000, 2 * most, false, 4000}, {80_000, 0, false, 8000}, {8000, 0, false, 16_000}, {1, 0, false, 32_000}, {1, 0, false, 64_000}, {1, 0, false, 100_000}, {1, 0, false, 100_000}}},
		// A proxy may lose every answer: they get no smaller for that.
		{"lost for ever", []step{{64_000, 0, true, 32_000}, {32_000, 0, true, 16_000}, {16_000, 0, true, 8000}, {8000, 0, true, 8000}, {8000, 0, true, 8000}, {8000, 0, false, 16_000}, {8000, 0, true, 4000}}},
		{"lost and cut", []step{{64_000, 0, true, 32_000}, {32_000, 0, true, 16_000}, {16_000, 0, true, 8000}, {8000, cut, true, 4000}, {4000, cut, true, 2000}}},
		{"lost and slow", []step{{64_000, 0, true, 32_000}, {32_000, 0, true, 16_000}, {16_000, 0, true, 8000}, {8000, 2 * most, true, 4000}, {4000, 2 * most, true, 2000}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			cs, err := OpenConsumers(nil, "", &StoreMeta{}, time.Hour, consumersNow)
			if err != nil {
				t.Fatal(err)
			}
			conn := &AnswerReadTracker{}
			begin := func() *ConsumerSession {
				r, _, err := cs.BeginScrape(1, "c", "", conn, consumersNow)
				if err != nil {
					t.Fatal(err)
				}
				return r
			}
			r := begin()
			if got := r.SampleLimit(100_000); got != 100_000 {
				t.Fatalf("the first limit is %d", got)
			}
			for i, s := range test.steps {
				r.MarkServed(1, ReadPosition{Seq: uint64(i + 1)}, s.served)
				if s.took == cut {
					r.EndScrapeAndLimitNext(0, most, io.ErrClosedPipe)
				} else {
					r.EndScrapeAndLimitNext(s.took, most, nil)
				}
				if s.lost {
					conn = &AnswerReadTracker{}
				}
				r = begin()
				if got := r.SampleLimit(100_000); got != s.want {
					t.Fatalf("after step %d: %d, want %d", i, got, s.want)
				}
			}
		})
	}
}

// The next call of Save retries a cursor whose save failed, and it does not overwrite a
// newer cursor.
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
			return fault{} // what was half written is undone: the file is appended to again
		}
		failed++
		confirm(t, cs, "a", consumersNow, map[uint64]uint64{1: 7})
		return fault{Err: errDisk}
	}
	if err := cs.Save(); err == nil || failed != 1 || cs.log.MustBeRewritten() {
		t.Fatalf("saved, on a disk that fails: %v, %d writes", err, failed)
	}
	fsys.hook = nil
	saveConsumers(t, cs)
	fsys.crash()
	want := map[string]map[uint64]uint64{"a": {1: 7, 2: 6}, "b": {1: 9}}
	if got := cursorsOf(openConsumers(t, fsys, consumersNow, false)); !sameCursors(got, want) {
		t.Errorf("after a restart: %v, want %v", got, want)
	}
}

// The consumers that this server has seen, and those that the site has told of, decide which
// of its batches count as read.
func TestConsumersRead(t *testing.T) {
	const site, other = 1, 2
	key := func(name string) uint64 { return ConsumerKey(name, "::1", "") }
	type told struct {
		site uint64
		all  []ConsumerAge
	}
	for _, test := range []struct {
		name  string
		reads map[string]uint64        // by consumer
		ago   map[string]time.Duration // since its scrape
		told  []told
		seq   uint64
		known bool
	}{
		{"nobody", nil, nil, nil, MaxSeq, false},
		{"one", map[string]uint64{"a": 5}, nil, nil, 5, true},
		{"the slower of two", map[string]uint64{"a": 5, "b": 3}, nil, nil, 3, true},
		{"one that is new", map[string]uint64{"a": 5, "b": 0}, nil, nil, 0, true},
		{"one that is dead beside one that is not", map[string]uint64{"a": 5, "b": 3}, map[string]time.Duration{"b": time.Hour + time.Second}, nil, 5, true},
		{"one that is late", map[string]uint64{"a": 5, "b": 3}, map[string]time.Duration{"b": time.Hour}, nil, 3, true},
		{"dead ones alone", map[string]uint64{"a": 5, "b": 3}, map[string]time.Duration{"a": time.Hour + time.Second, "b": 2 * time.Hour}, nil, 3, true},
		{"one forgotten", map[string]uint64{"a": 5}, map[string]time.Duration{"a": 25 * time.Hour}, nil, MaxSeq, false},
		{"one that the site knows", map[string]uint64{"a": 5}, nil, []told{{site, []ConsumerAge{{key("c"), 0}}}}, 0, true},
		{"one that the site knows alone", nil, nil, []told{{site, []ConsumerAge{{key("c"), 0}}}}, 0, true},
		{"one that another site knows", map[string]uint64{"a": 5}, nil, []told{{other, []ConsumerAge{{key("c"), 0}}}}, 5, true},
		{"one that the site knew", map[string]uint64{"a": 5}, nil, []told{{site, []ConsumerAge{{key("c"), 24 * time.Hour}}}}, 5, true},
		{"one that the site knows as dead", map[string]uint64{"a": 5}, nil, []told{{site, []ConsumerAge{{key("c"), 2 * time.Hour}}}}, 5, true},
		{"told again as older", map[string]uint64{"a": 5}, nil, []told{{site, []ConsumerAge{{key("c"), 0}}}, {site, []ConsumerAge{{key("c"), 2 * time.Hour}}}}, 0, true},
		{"one that scrapes elsewhere", map[string]uint64{"a": 5, "b": 3}, map[string]time.Duration{"b": 2 * time.Hour}, []told{{site, []ConsumerAge{{key("b"), time.Minute}}}}, 3, true},
	} {
		cs := openConsumers(t, newStoreFS(1), consumersNow, false)
		for name, seq := range test.reads {
			confirm(t, cs, name, consumersNow.Add(-test.ago[name]), map[uint64]uint64{site: seq})
		}
		for _, told := range test.told {
			cs.AddClientReportedConsumers(told.site, told.all, consumersNow)
		}
		if seq, known := cs.SeqReadByAll(site, consumersNow); seq != test.seq || known != test.known {
			t.Errorf("%s: read up to %d, %t; want %d, %t", test.name, seq, known, test.seq, test.known)
		}
	}
}

// The consumers that sites tell of are bounded, for each site and in all, and forgotten
// after a day.
func TestConsumersReportedIsBounded(t *testing.T) {
	cs := openConsumers(t, newStoreFS(1), consumersNow, false)
	for i := range uint64(3 * MaxConsumers) {
		cs.AddClientReportedConsumers(7, []ConsumerAge{{i + 1, time.Duration(i) * time.Second}}, consumersNow)
	}
	if n := len(cs.LastScrapeAges(7, consumersNow)); n != MaxConsumers {
		t.Errorf("%d consumers are known for a site", n)
	}
	for i := range uint64(maxReportingSites + 10) {
		cs.AddClientReportedConsumers(i, []ConsumerAge{{1, 0}}, consumersNow)
	}
	if n := len(cs.reported); n != maxReportingSites {
		t.Errorf("%d sites tell of consumers", n)
	}
	cs.DropSiteCursors(7) // as after a first push of which nothing was taken
	if len(cs.LastScrapeAges(7, consumersNow)) == 0 {
		t.Error("a site that is not held tells nothing")
	}
	cs.DropIdle(consumersNow.Add(consumerIdle + time.Hour))
	if n := len(cs.reported); n != 0 {
		t.Errorf("%d sites tell of consumers after a day", n)
	}
}

// Client and server tell each other the same consumer for ever; its age grows all the same.
func TestConsumersAgeThroughEchoes(t *testing.T) {
	cs := openConsumers(t, newStoreFS(1), consumersNow, false)
	cs.AddClientReportedConsumers(1, []ConsumerAge{{9, 0}}, consumersNow)
	now := consumersNow
	for range 4000 { // more than an hour
		now = now.Add(999 * time.Millisecond)
		all, err := ParseConsumers(FormatConsumers(cs.LastScrapeAges(1, now)))
		if err != nil {
			t.Fatal(err)
		}
		cs.AddClientReportedConsumers(1, all, now)
	}
	if age := cs.LastScrapeAges(1, now)[0].Age; age < now.Sub(consumersNow) {
		t.Errorf("after %v a consumer is %v old", now.Sub(consumersNow), age)
	}
}
