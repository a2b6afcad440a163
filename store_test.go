package main

// Tests of the store's promises: on a disk that tears, flips, fills, fails and forgets,
// at its limits, and under concurrent use. rig_disk_test.go defines
// crashFS, the disk.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// storeClock is a clock that tests move.
type storeClock struct {
	mu  sync.Mutex
	now time.Time
}

func newStoreClock() *storeClock { return &storeClock{now: time.UnixMilli(1_700_000_000_000)} }

func (c *storeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *storeClock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// ms is the clock's time less ago seconds.
func (c *storeClock) ms(ago int) int64 { return c.Now().UnixMilli() - int64(ago)*1000 }

// point is a sample of series name{n="<n>"}.
type point struct {
	name string
	n    int
	t    int64
	v    float64
}

func storePush(id string, points ...point) *SampleList {
	p := &SampleList{}
	for _, pt := range points {
		err := p.Add(&RawSample{Name: []byte(pt.name), T: pt.t, V: pt.v, Labels: []Label{
			{[]byte(ClusterLabel), []byte(id)}, {Name: []byte("instance")}, {Name: []byte("job")}, {[]byte("n"), fmt.Append(nil, pt.n)},
		}})
		if err != nil {
			panic(err)
		}
	}
	return p
}

// storeKit is what opening a store takes, and what it said.
type storeKit struct {
	t      testing.TB
	clock  *storeClock
	cfg    StoreConfig
	mu     sync.Mutex
	errors []error
}

func newStoreKit(t testing.TB, fsys FS) *storeKit {
	k := &storeKit{t: t, clock: newStoreClock()}
	k.cfg = StoreConfig{
		FS: fsys, Dir: "/s", Retention: 2 * time.Hour, MaxSampleAge: 10 * time.Minute, Now: k.clock.Now,
		OnError: func(err error) {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.errors = append(k.errors, err)
		},
	}
	return k
}

func (k *storeKit) open() *Store {
	k.t.Helper()
	s, err := OpenStore(k.cfg)
	if err != nil {
		k.t.Fatalf("opening store: %v", err)
	}
	return s
}

// push wants the points accepted, all of them.
func (k *storeKit) push(s *Store, id string, points ...point) {
	k.t.Helper()
	p := storePush(id, points...)
	if res, err := s.Append(context.Background(), id, p, ScrapeNames{}); err != nil || res.Accepted != len(p.Samples) {
		k.t.Fatalf("push for %s: %+v, %v; want %d accepted", id, res, err, len(p.Samples))
	}
}

// heldSample names a sample by its line and time.
type heldSample struct {
	line string
	t    int64
}

// heldOf returns what s holds of a site. It checks what has to be so whenever
// nothing is under way: accounts, no sample twice, ascending sequence numbers,
// lines of the site alone.
func heldOf(t testing.TB, s *Store, id string) map[heldSample]float64 {
	t.Helper()
	got := map[heldSample]float64{}
	c := s.sites[id]
	if c == nil {
		return got
	}
	seq := uint64(0)
	for _, b := range c.data.Batches {
		if b.Seq <= seq || b.Seq > c.data.Seq {
			t.Errorf("%s: batch %d after %d, newest %d", id, b.Seq, seq, c.data.Seq)
		}
		seq = b.Seq
		for i, sid := range b.IDs {
			line := string(c.data.Table.Line(sid))
			if !strings.Contains(line, fmt.Sprintf("%s=%q", ClusterLabel, id)) {
				t.Errorf("site %s holds %q", id, line)
			}
			key := heldSample{line, b.Time(i)}
			if _, twice := got[key]; twice {
				t.Errorf("%s: %v is held twice", id, key)
			}
			got[key] = b.V[i]
		}
	}
	return got
}

// allHeld returns what s holds of all sites, and checks the accounts.
func allHeld(t testing.TB, s *Store) map[heldSample]float64 {
	t.Helper()
	all := map[heldSample]float64{}
	samples, size := int64(0), int64(0)
	for id, c := range s.sites {
		maps.Copy(all, heldOf(t, s, id))
		samples += c.data.SampleCount()
		if c.log != nil {
			size += c.log.Size()
		}
	}
	if s.totals.Samples.Load() != samples || s.totals.LogBytes.Load() != size {
		t.Errorf("accounts say %d samples, %d bytes; there are %d, %d", s.totals.Samples.Load(), s.totals.LogBytes.Load(), samples, size)
	}
	return all
}

// pushed is what a store holds that took these points.
func pushed(id string, points ...point) map[heldSample]float64 {
	want := map[heldSample]float64{}
	p := storePush(id, points...)
	for _, s := range p.Samples {
		want[heldSample{string(p.Line(s)), s.T}] = s.V
	}
	return want
}

func wantHeld(t testing.TB, what string, got, want map[heldSample]float64) {
	t.Helper()
	for k, v := range want {
		if g, ok := got[k]; !ok || math.Float64bits(g) != math.Float64bits(v) {
			t.Errorf("%s: %v = %v is lost (%v, %t)", what, k, v, g, ok)
		}
	}
	for k, v := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: %v = %v should not be there", what, k, v)
		}
	}
}

// shown returns what a scrape shows.
func scraper(s *Store, maxAge time.Duration) *AllSitesReader {
	return &AllSitesReader{Store: s, MaxSampleAge: maxAge, Now: s.cfg.Now, Owned: func(uint64) bool { return true }}
}

func shown(s *Store, maxAge time.Duration) map[heldSample]float64 {
	got := map[heldSample]float64{}
	fams, _ := scraper(s, maxAge).NewestPerSeries(0, nil)
	for _, f := range fams {
		for _, l := range f.Samples {
			got[heldSample{string(l.Line), l.T}] = l.V
		}
	}
	return got
}

// newStoreFS is a crashFS with the store's directory.
func newStoreFS(seed uint64) *crashFS { return newCrashFS(seed, "/s") }

// putState has fsys have the state of a server that started once.
func putState(t testing.TB, fsys FS) {
	t.Helper()
	state := openStoreState(t, fsys)
	state.TakeSeqBlock(0)
	if err := state.Write(nil); err != nil {
		t.Fatal(err)
	}
}

// damageKit makes a log of several pushes for "a" beside an intact one for "b",
// and knows what each record of it holds.
type damageKit struct {
	path    string
	data    []byte // the log of "a"
	other   string
	intact  []byte // the log of "b"
	records []damageRecord
	points  []point // of "a"
}

type damageRecord struct {
	from, to int
	kind     byte
	lines    []string     // of a series record
	samples  []heldSample // of a batch
}

func newDamageKit(t *testing.T) *damageKit {
	t.Helper()
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	d := &damageKit{path: s.logPathOf("a"), other: s.logPathOf("b")}
	for i := range 4 {
		var points []point
		for n := range 2 + i { // each push brings a new series
			points = append(points, point{"m", n, k.clock.ms(60 * (4 - i)), float64(10*i + n)})
		}
		if i == 2 {
			points = append(points, point{"m", 0, k.clock.ms(7000), 5}) // several times in one batch
		}
		k.push(s, "a", points...)
		d.points = append(d.points, points...)
	}
	k.push(s, "b", point{"m", 1, k.clock.ms(60), 1})
	d.data, _ = fsys.ReadFile(d.path)
	d.intact, _ = fsys.ReadFile(d.other)
	var lines []string
	at := parseLogHeader(d.data).size
	for at < len(d.data) {
		r := damageRecord{from: at, to: at + 12 + int(binary.LittleEndian.Uint32(d.data[at:])), kind: d.data[at+12]}
		payload := d.data[at+13 : r.to]
		if r.kind == RecordSeries {
			DecodeSeries(payload, func(_ uint32, line []byte) error {
				r.lines = append(r.lines, string(line))
				return nil
			})
			lines = append(lines, r.lines...)
		} else {
			b, err := DecodeBatch(payload)
			if err != nil {
				t.Fatal(err)
			}
			for i, id := range b.IDs {
				r.samples = append(r.samples, heldSample{lines[id], b.Time(i)})
			}
		}
		d.records = append(d.records, r)
		at = r.to
	}
	if len(d.records) != 8 {
		t.Fatalf("%d records, want a series record and a batch for each of 4 pushes", len(d.records))
	}
	return d
}

// without is what is held when these records are lost.
func (d *damageKit) without(lost func(r damageRecord) bool) map[heldSample]float64 {
	all := pushed("a", d.points...)
	want := map[heldSample]float64{}
	known := map[string]bool{}
	for _, r := range d.records {
		if lost(r) {
			continue
		}
		for _, line := range r.lines {
			known[line] = true
		}
		for _, s := range r.samples {
			if known[s.line] {
				want[s] = all[s]
			}
		}
	}
	return want
}

// check opens a store over data as the log of "a" and compares; damaged is what
// the store has to count. Then the store has to work on, and to open without
// damage.
func (d *damageKit) check(t *testing.T, what string, data []byte, want map[heldSample]float64, damaged int64) {
	t.Helper()
	fsys := newCrashFS(1, "/s", filepath.Dir(d.path), filepath.Dir(d.other))
	fsys.put(d.path, data)
	fsys.put(d.other, d.intact)
	putState(t, fsys)
	k := newStoreKit(t, fsys)
	s := k.open()
	allHeld(t, s)
	wantHeld(t, what, heldOf(t, s, "a"), want)
	if n := len(heldOf(t, s, "b")); n != 1 {
		t.Errorf("%s: the other site has %d samples", what, n)
	}
	if got := s.Stats().DamagedLogs; got != damaged || damaged > 0 != (len(k.errors) > 0) {
		t.Errorf("%s: %d damaged logs counted, %d errors %v; want %d", what, got, len(k.errors), k.errors, damaged)
	}
	if damaged > 0 {
		kept := slices.ContainsFunc(fsys.names(), func(name string) bool {
			aside, _ := fsys.ReadFile(name)
			// Of a file with no batch at all a torn tail is cut first.
			return name != d.path && strings.HasPrefix(name, d.path) && len(aside)+12 >= len(data)-d.records[1].to && bytes.HasPrefix(data, aside)
		})
		if !kept {
			t.Errorf("%s: the damaged file is not kept: %v", what, fsys.names())
		}
	}
	more := point{"m", 99, k.clock.ms(1), 42}
	k.push(s, "a", more)
	maps.Copy(want, pushed("a", more))
	fsys.crash()
	again := newStoreKit(t, fsys)
	s = again.open()
	allHeld(t, s)
	wantHeld(t, what+", again", heldOf(t, s, "a"), want)
	if s.Stats().DamagedLogs != 0 || len(again.errors) > 0 {
		t.Errorf("%s: opened again, damage is found again: %v", what, again.errors)
	}
	if t.Failed() {
		t.FailNow()
	}
}

// A log cut anywhere yields every record that was whole.
func TestSweepStoreTruncations(t *testing.T) {
	sweep(t)
	d := newDamageKit(t)
	for cut := range len(d.data) + 1 {
		damaged := int64(0)
		if cut < d.records[1].to { // not even the first batch: no crash leaves that
			damaged = 1
		}
		want := d.without(func(r damageRecord) bool { return r.to > cut })
		d.check(t, fmt.Sprintf("cut at %d", cut), d.data[:cut], want, damaged)
	}
}

// A flipped byte costs the record it lies in, and of later ones the samples whose
// series it gave.
func TestSweepStoreFlips(t *testing.T) {
	sweep(t)
	d := newDamageKit(t)
	for at := range d.data {
		for _, mask := range []byte{0x01, 0x80, 0xff} {
			data := bytes.Clone(d.data)
			data[at] ^= mask
			want := d.without(func(r damageRecord) bool { return r.from <= at && at < r.to })
			d.check(t, fmt.Sprintf("byte %d ^ %#x", at, mask), data, want, 1)
		}
	}
}

// seriesFrames frames a record that gives line the ID. A site cannot hide one in a
// label's value as it is, because the length in its head has a zero byte, but a
// disk may put anything anywhere.
func seriesFrames(id uint32, line string) []byte {
	return AppendRecord(nil, RecordSeries, EncodeSeriesPayload(nil, id, func(yield func([]byte) bool) { yield([]byte(line)) }))
}

// What lies in a log is shown as the site's whose name the file has, or not
// at all.
func TestStoreForeignRecords(t *testing.T) {
	clock := newStoreClock()
	victim := storePush("victim", point{"up", 1, clock.ms(5), 666})
	batch := AppendRecord(nil, RecordBatch, EncodeBatchPayload(nil, &Batch{Seq: 9, AcceptedAt: clock.ms(0), T0: clock.ms(5), IDs: []uint32{7}, V: []float64{666}}))
	foreign := seriesFrames(7, string(victim.Line(victim.Samples[0])))

	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "evil", point{"m", 1, k.clock.ms(60), 1})
	path := s.logPathOf("evil")
	data, _ := fsys.ReadFile(path)
	header := parseLogHeader(data).size
	own := heldOf(t, s, "evil")
	badHeader := bytes.Clone(data)
	badHeader[3] ^= 1
	badHead := bytes.Clone(data)
	badHead[header] ^= 1

	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	tests := []struct {
		name string
		path string
		data []byte
		want map[heldSample]float64
	}{
		{"another's series behind its own", path, cat(data, foreign, batch), own},
		{"another's series before its own", path, cat(data[:header], foreign, data[header:]), own},
		{"another's series, header damaged", path, cat(badHeader, foreign, batch), own},
		{"another's series first, header damaged", path, cat(badHeader[:header], foreign, data[header:]), own},
		{"found behind a damaged head", path, cat(data[:header], []byte("garbage"), foreign, data[header:]), own},
		{"behind its own damaged head", path, cat(badHead, foreign, batch), nil},
		{"nothing but another's", path, cat(data[:header], foreign, batch), nil},
		{"under the other's name", s.logPathOf("victim"), data, nil},
		{"under the other's name, header damaged", s.logPathOf("victim"), badHeader, nil},
		{"under no site's name", "/s/ab/x.log", data, nil},
		{"unknown kind of record", path, cat(data, AppendRecord(nil, 77, []byte("x"))), own},
		{"a line that is not in normal form", path, cat(data, seriesFrames(1, `up{n="1",_id="evil"}`)), own},
		{"a line without site", path, cat(data, seriesFrames(1, `up`)), own},
		{"series given twice", path, cat(data, data[header:]), own},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			fsys := newCrashFS(1, "/s", filepath.Dir(test.path))
			fsys.put(test.path, test.data)
			k := newStoreKit(t, fsys)
			s := k.open()
			got := allHeld(t, s)
			for key := range got {
				if !strings.Contains(key.line, `_id="evil"`) {
					t.Errorf("%v is held", key)
				}
			}
			wantHeld(t, "held", got, test.want)
			for key := range shown(s, time.Hour) {
				if _, ok := got[key]; !ok {
					t.Errorf("%v is shown, not held", key)
				}
			}
			if s.Stats().DamagedLogs != 1 {
				t.Errorf("%d damaged logs counted", s.Stats().DamagedLogs)
			}
			k.push(s, "victim", point{"up", 1, k.clock.ms(1), 7})
			again := newStoreKit(t, fsys)
			s = again.open()
			wantHeld(t, "victim", heldOf(t, s, "victim"), pushed("victim", point{"up", 1, k.clock.ms(1), 7}))
			if s.Stats().DamagedLogs != 0 {
				t.Errorf("opened again, damage is found again: %v", again.errors)
			}
		})
	}
}

// A store whose reads fail for a moment opens whole. A file that cannot be read, or cannot
// be set aside, stops the opening, because the next push would replace it. All files stay
// as they were, so that a start on a mended disk has everything.
func TestStoreOpenFails(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(60), 1})
	k.push(s, "b", point{"m", 1, k.clock.ms(60), 1})
	held := allHeld(t, s)
	confirm(t, s.Consumers, "c", k.clock.Now(), map[uint64]uint64{s.sites["a"].Key: 1})
	saveConsumers(t, s.Consumers)
	cursors := cursorsOf(s.Consumers)
	before := fsys.contents()
	path := s.logPathOf("a")
	type openFault struct {
		name, op, path string
		readFault
	}
	tests := []openFault{
		{"a directory that cannot be synced", "syncdir", filepath.Dir(path), readFault{0, errDisk}},
		{"a log of nobody that cannot be set aside", "rename", path, readFault{0, errDisk}},
	}
	for _, f := range readFaults {
		tests = append(tests,
			openFault{"a log", "read", path, f}, openFault{"cursors", "read", consumersPath, f}, openFault{"the state", "read", statePath, f},
			openFault{"a directory", "readdir", filepath.Dir(path), f}, openFault{"the directory", "readdir", "/s", f})
	}
	for _, test := range tests {
		synctest.Test(t, func(t *testing.T) {
			fsys := newCrashFS(1, "/s", filepath.Dir(path), filepath.Dir(s.logPathOf("b")))
			for name, data := range before {
				fsys.put(name, []byte(data))
			}
			if test.op == "rename" {
				fsys.put(path, []byte("nonsense"))
			}
			contents := fsys.contents()
			fsys.hook = test.hook(test.op, test.path)
			k := newStoreKit(t, fsys)
			s, err := OpenStore(k.cfg)
			if test.n == 0 {
				if !errors.Is(err, test.err) || !strings.HasPrefix(fmt.Sprint(err), "reading storage directory: ") || len(k.errors) > 0 {
					t.Errorf("%s, %v: %v; said %v", test.name, test.err, err, k.errors)
				}
				if strings.HasPrefix(test.op, "read") && !strings.Contains(fmt.Sprint(err), test.path+": ") {
					t.Errorf("%s, %v: it does not say which: %v", test.name, test.err, err)
				}
				if fsys.restart(); test.op != "rename" {
					s = k.open()
				}
			} else if err != nil {
				t.Fatalf("%s, %v: %v", test.name, test.err, err)
			}
			delete(contents, statePath) // says that there was another start
			maps.DeleteFunc(contents, func(name, _ string) bool { return test.op == "rename" && name != path })
			for name, data := range contents {
				if fsys.contents()[name] != data {
					t.Errorf("%s, %v: %s is not what it was: %v", test.name, test.err, name, fsys.names())
				}
			}
			if test.op == "rename" {
				return
			}
			wantHeld(t, test.name, allHeld(t, s), held)
			if got := cursorsOf(s.Consumers); !sameCursors(got, cursors) {
				t.Errorf("%s, %v: cursors %v, want %v", test.name, test.err, got, cursors)
			}
			if len(fsys.names()) != len(before) || s.Stats().DamagedLogs != 0 || len(k.errors) > 0 {
				t.Errorf("%s, %v: taken for damage: %v, said %v", test.name, test.err, fsys.names(), k.errors)
			}
		})
	}
	for _, retention := range []time.Duration{0, -1, MaxRetention + 1} {
		k := newStoreKit(t, newStoreFS(1))
		k.cfg.Retention = retention
		if _, err := OpenStore(k.cfg); err == nil {
			t.Errorf("a retention of %v is taken", retention)
		}
	}
}

// Acknowledged means durable: the push before the crash and the one after, the
// first of a site and a later one.
func TestStoreAppendIsDurable(t *testing.T) {
	for seed := range uint64(20) {
		fsys := newStoreFS(seed)
		k := newStoreKit(t, fsys)
		want := map[heldSample]float64{}
		for i := range 6 {
			s := k.open()
			id := fmt.Sprint(i % 3)
			pt := point{"m", i, k.clock.ms(6 - i), float64(i)}
			k.push(s, id, pt)
			maps.Copy(want, pushed(id, pt))
			fsys.crash()
		}
		s := k.open()
		wantHeld(t, fmt.Sprint("seed ", seed), allHeld(t, s), want)
		if len(k.errors) > 0 {
			t.Errorf("seed %d: %v", seed, k.errors)
		}
	}
}

// A write, sync, rename or sync of a directory that fails has its push refused;
// the next is taken, and nothing acknowledged is lost, whatever a crash leaves.
func TestStoreDiskFails(t *testing.T) {
	for _, op := range []string{"open", "write", "sync", "truncate", "rename", "syncdir", "mkdir"} {
		for _, fail := range []error{errDisk, errFull} {
			for _, first := range []bool{true, false} { // the site's first push?
				for seed := range uint64(4) {
					what := fmt.Sprintf("%s %v first=%t seed %d", op, fail, first, seed)
					fsys := newStoreFS(seed)
					k := newStoreKit(t, fsys)
					s := k.open()
					want := map[heldSample]float64{}
					if !first {
						k.push(s, "a", point{"m", 1, k.clock.ms(60), 1})
						want = pushed("a", point{"m", 1, k.clock.ms(60), 1})
					}
					failed := false
					fsys.hook = func(_ int, o, _ string) fault {
						if o == op || op == "truncate" && o == "write" {
							failed = true
							return fault{Err: fail}
						}
						return fault{}
					}
					_, err := s.Append(context.Background(), "a", storePush("a", point{"m", 2, k.clock.ms(50), 2}), ScrapeNames{})
					if failed != (err != nil) || failed && errors.Is(err, ErrFull) != (fail == errFull) {
						t.Fatalf("%s: failed %t, said %v", what, failed, err)
					}
					if err == nil {
						maps.Copy(want, pushed("a", point{"m", 2, k.clock.ms(50), 2}))
					}
					wantHeld(t, what, allHeld(t, s), want)
					if first && err != nil && len(s.sites) > 0 {
						t.Errorf("%s: a first push that failed leaves a site", what)
					}
					fsys.restart()
					if seed%2 == 0 { // the same push again, after the disk is well
						k.push(s, "a", point{"m", 3, k.clock.ms(40), 3})
						maps.Copy(want, pushed("a", point{"m", 3, k.clock.ms(40), 3}))
						wantHeld(t, what+", next push", allHeld(t, s), want)
					}
					fsys.crash()
					s = k.open()
					got := allHeld(t, s)
					if err != nil { // refused, but it may have reached the disk
						maps.Copy(want, pushed("a", point{"m", 2, k.clock.ms(50), 2}))
						for key, v := range want {
							if _, ok := got[key]; !ok && v == 2 && strings.Contains(key.line, `n="2"`) {
								delete(want, key)
							}
						}
					}
					wantHeld(t, what+", crash", got, want)
					if t.Failed() {
						t.FailNow()
					}
				}
			}
		}
	}
}

// A log that an error left unfit is written anew by maintenance, too.
func TestStoreMaintainMends(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(60), 1})
	fsys.hook = failOn("sync", ".log", 1, errDisk)
	if _, err := s.Append(context.Background(), "a", storePush("a", point{"m", 1, k.clock.ms(50), 2}), ScrapeNames{}); !errors.Is(err, errDisk) {
		t.Fatalf("got %v", err)
	}
	fsys.restart()
	s.expireAndCompact(context.Background(), false)
	if s.sites["a"].log.MustBeRewritten() || len(k.errors) > 0 {
		t.Errorf("broken still: %v", k.errors)
	}
	fsys.crash()
	wantHeld(t, "mended", allHeld(t, k.open()), pushed("a", point{"m", 1, k.clock.ms(60), 1}))
}

// Retention is by the sample's time.
func TestStoreRetention(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	// Series 1 is old within a batch that has something new.
	k.push(s, "a", point{"m", 1, k.clock.ms(7100), 1}, point{"m", 2, k.clock.ms(10), 2})
	k.push(s, "a", point{"m", 3, k.clock.ms(7000), 3})
	k.push(s, "b", point{"m", 4, k.clock.ms(7000), 4})
	k.clock.Add(300 * time.Second)
	s.expireAndCompact(context.Background(), false)
	if got := s.Stats(); got.Expired != 3 || s.totals.Samples.Load() != 1 {
		t.Errorf("%d samples expired, want 3; %d take memory", got.Expired, s.totals.Samples.Load())
	}
	got := allHeld(t, s)
	if len(got) != 1 || s.sites["a"].data.Table.Len() != 1 {
		t.Errorf("held %v, %d series", got, s.sites["a"].data.Table.Len())
	}
	seq := s.sites["b"].data.Seq
	k.clock.Add(2 * time.Hour)
	s.expireAndCompact(context.Background(), false)
	if len(allHeld(t, s)) != 0 {
		t.Errorf("held beyond retention: %v", allHeld(t, s))
	}
	if got := s.sites["b"].data.Table.Len(); got != 0 {
		t.Errorf("%d series without samples", got)
	}
	// Its push time is known still, also to a new process, and numbers never fall.
	fsys.crash()
	s = k.open()
	st := s.Stats().Sites
	if len(st) != 2 || st[1].ID != "b" || st[1].LastPush == 0 || s.sites["b"].data.Seq <= seq {
		t.Errorf("after a restart: %+v", st)
	}
	k.push(s, "b", point{"m", 4, k.clock.ms(1), 4})
}

// A log that retention made garbage of is compacted; the figure is its size.
func TestStoreCompacts(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	for i := range 4000 {
		k.push(s, "a", point{"m", 1, k.clock.ms(0), float64(i)}, point{"n", 1, k.clock.ms(0), float64(i)})
		k.clock.Add(15 * time.Second)
		if i%20 == 0 {
			s.expireAndCompact(context.Background(), false)
		}
	}
	s.expireAndCompact(context.Background(), false)
	live, size := s.sites["a"].data.EstimatedRewrittenLogSize(), s.Stats().LogBytes
	data, _ := fsys.ReadFile(s.logPathOf("a"))
	if size != int64(len(data)) || size > 2*live+compactSlack+4096 {
		t.Errorf("log of %d bytes (%d accounted) for %d of content", len(data), size, live)
	}
	if n := s.Stats().Compactions; n < 2 || n > 20 {
		t.Errorf("%d compactions", n)
	}
	want := allHeld(t, s)
	if len(want) < 2*480 {
		t.Errorf("only %d samples of two hours", len(want))
	}
	if n := s.Stats().Expired; n != 8000-int64(len(want)) {
		t.Errorf("%d samples expired, %d held of 8000", n, len(want))
	}
	wantHeld(t, "reopened", allHeld(t, k.open()), want)
}

// Samples that expire unread are lost, but for those of a client with a spool on a server
// that does not own their site: the client has pushed them to the owner too.
func TestStoreCountsCopies(t *testing.T) {
	for _, test := range []struct {
		owned bool
		names ScrapeNames
		lost  int64
	}{{true, ScrapeNames{}, 1}, {true, names1(1), 1}, {false, ScrapeNames{}, 1}, {false, names1(1), 0}} {
		k := newStoreKit(t, newStoreFS(1))
		k.cfg.Owned = func(hash uint64) bool { return test.owned && hash == SiteKey("a") }
		s := k.open()
		if _, err := s.Append(t.Context(), "a", storePush("a", point{"m", 1, k.clock.ms(0), 1}), test.names); err != nil {
			t.Fatal(err)
		}
		s.Consumers.BeginScrape(1, "c", "", "conn", k.clock.Now())
		k.clock.Add(3 * time.Hour)
		s.sites["a"].DropExpired(s.KeptSince())
		if st := s.Stats(); st.Expired != 1 || st.ExpiredUnread != test.lost {
			t.Errorf("owned %t, names %v: %d expired, %d lost", test.owned, test.names, st.Expired, st.ExpiredUnread)
		}
	}
}

// Whatever drops what outlived retention counts it, and apart what a consumer has not
// had.
func TestStoreCountsExpired(t *testing.T) {
	for _, test := range []struct {
		name string
		drop func(s *Store, c *Site) error
	}{
		{"expiry", func(s *Store, c *Site) error { c.DropExpired(s.KeptSince()); return nil }},
		{"compaction", func(s *Store, c *Site) error { return c.RewriteLog(nil, s.KeptSince()) }},
		{"both", func(s *Store, c *Site) error {
			c.DropExpired(s.KeptSince())
			return c.RewriteLog(nil, s.KeptSince())
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			k := newStoreKit(t, newStoreFS(1))
			s := k.open()
			for i := range 4 { // the consumer has had the first
				k.push(s, "a", point{"m", 1, k.clock.ms(7000 - i), 1}, point{"m", 2, k.clock.ms(10 - i), 2})
				if i == 0 {
					confirm(t, s.Consumers, "c", k.clock.Now(), map[uint64]uint64{SiteKey("a"): s.sites["a"].data.Seq})
				}
			}
			k.push(s, "a", point{"m", 1, k.clock.ms(7050), 1}) // wholly old
			k.clock.Add(5 * time.Minute)
			c := s.sites["a"]
			if err := c.Lock(context.Background()); err != nil {
				t.Fatal(err)
			}
			err := test.drop(s, c)
			c.Unlock()
			if st := s.Stats(); err != nil || st.Expired != 5 || st.ExpiredUnread != 4 {
				t.Errorf("expired %d, unread %d, want 5, 4; %v", st.Expired, st.ExpiredUnread, err)
			}
		})
	}
}

func TestStoreSeriesLimit(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSeries = 3
	s := k.open()
	over := func(points ...point) {
		t.Helper()
		size := s.Stats().LogBytes
		before := allHeld(t, s)
		if _, err := s.Append(context.Background(), "a", storePush("a", points...), ScrapeNames{}); !errors.Is(err, ErrSeriesLimit) {
			t.Errorf("got %v", err)
		}
		wantHeld(t, "refused", allHeld(t, s), before)
		if s.Stats().LogBytes != size {
			t.Errorf("%d bytes, before %d", s.Stats().LogBytes, size)
		}
	}
	at := func(n int) point { return point{"m", n, k.clock.ms(0), float64(n)} }
	over(at(1), at(2), at(3), at(4)) // a first push
	if len(s.sites) != 0 {
		t.Error("a refused first push leaves a site")
	}
	k.push(s, "a", at(1), at(2))
	k.clock.Add(time.Second)
	over(at(3), at(4))
	k.push(s, "a", at(1), at(3)) // the refused push took no room
	k.push(s, "b", at(1), at(2), at(3))
	over(at(4))
	if n := s.Stats().Compactions; n != 0 {
		t.Errorf("%d compactions that could free nothing", n)
	}
	k.clock.Add(2 * time.Hour) // series 2 is dead
	k.push(s, "a", at(4))
	k.clock.Add(time.Second) // 1 and 3
	k.push(s, "a", at(5), at(6))
	over(at(7))
	if n := s.Stats().Compactions; n != 2 {
		t.Errorf("%d compactions, want 2", n)
	}
}

// A dead series makes room even if its sample came with one that still lives.
func TestStoreDeadSeriesBesideLiving(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSeries = 2
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(7199), 1}, point{"m", 2, k.clock.ms(0), 2})
	k.clock.Add(2 * time.Second)
	k.push(s, "a", point{"m", 3, k.clock.ms(0), 3})
	if n := s.Stats().Compactions; n != 1 {
		t.Errorf("%d compactions, want 1", n)
	}
	if got := allHeld(t, s); len(got) != 2 {
		t.Errorf("held %v", got)
	}
}

func TestStoreSiteLimit(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSites = 2
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
	// Refused pushes take no place.
	for i := range 3 {
		p := storePush(fmt.Sprint("x", i), point{"m", 1, k.clock.ms(9999), 1})
		if res, err := s.Append(context.Background(), fmt.Sprint("x", i), p, ScrapeNames{}); err != nil || res.TooOld != 1 {
			t.Fatalf("%+v, %v", res, err)
		}
	}
	k.push(s, "b", point{"m", 1, k.clock.ms(0), 1})
	if _, err := s.Append(context.Background(), "c", storePush("c", point{"m", 1, k.clock.ms(0), 1}), ScrapeNames{}); !errors.Is(err, ErrFull) {
		t.Errorf("got %v", err)
	}
	k.clock.Add(time.Second)
	k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
	// What is on disk is taken in whatever the limit.
	k.cfg.LimitSites = 1
	if s = k.open(); len(s.sites) != 2 {
		t.Errorf("%d sites recovered", len(s.sites))
	}
}

// Under the sample limit the oldest batches go that no scrape shows; when all are
// shown, pushes are refused, of which one too large for the limit costs nothing.
func TestStoreSampleLimit(t *testing.T) {
	for _, dir := range []string{"/s", ""} {
		k := newStoreKit(t, newStoreFS(1))
		k.cfg.Dir, k.cfg.LimitSamples = dir, 64
		s := k.open()
		for i := range 100 {
			for _, id := range []string{"a", "b"} {
				k.push(s, id, point{"m", 1, k.clock.ms(0), float64(i)}, point{"m", 2, k.clock.ms(0), float64(i)})
			}
			k.clock.Add(15 * time.Second)
			if n := s.totals.Samples.Load(); n > 64 {
				t.Fatalf("%d samples held", n)
			}
		}
		held := allHeld(t, s)
		if len(held) < 64-64/8 { // both have their share, and leave no more than that to others
			t.Errorf("%d samples held", len(held))
		}
		for _, id := range []string{"a", "b"} { // oldest first: all are of the last quarter of an hour
			for key := range heldOf(t, s, id) {
				if key.t < k.clock.ms(15*17) {
					t.Errorf("%v was to go first", key)
				}
			}
		}
		if got := s.Stats().Evicted; got != 400-int64(len(held)) {
			t.Errorf("%d evicted, %d held of 400", got, len(held))
		}
		var large []point
		for i := range 65 {
			large = append(large, point{"large", i, k.clock.ms(0), 1})
		}
		if _, err := s.Append(context.Background(), "c", storePush("c", large...), ScrapeNames{}); !errors.Is(err, ErrFull) {
			t.Errorf("got %v", err)
		}
		wantHeld(t, "a push over the limit", allHeld(t, s), held)
		// 40 series shown leave room for 24 and no more.
		k.push(s, "c", large[:40]...)
		_, err := s.Append(context.Background(), "d", storePush("d", large[:30]...), ScrapeNames{})
		if !errors.Is(err, ErrFull) {
			t.Errorf("got %v", err)
		}
		for key, v := range pushed("c", large[:40]...) {
			if got := shown(s, time.Hour); got[key] != v {
				t.Fatalf("%v is shown no more", key)
			}
		}
		for _, key := range []string{"a", "b"} {
			if len(heldOf(t, s, key)) == 0 {
				t.Errorf("site %s lost what is shown", key)
			}
		}
		k.clock.Add(11 * time.Minute) // nothing is shown: all may go
		k.push(s, "d", point{"m", 1, k.clock.ms(0), 1})
		if dir == "" {
			continue
		}
		// In recovery the limit holds too, with what has gone in memory only.
		if s = k.open(); s.totals.Samples.Load() > 64 {
			t.Errorf("recovery holds %d samples", s.totals.Samples.Load())
		}
		allHeld(t, s)
	}
}

// To make room goes what every consumer has had, oldest first over all sites; what
// one has not had stays, and the push is refused.
func TestStoreMakesRoom(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.Dir, k.cfg.LimitSamples = "", 1000
	s := k.open()
	had := map[string]uint64{} // by the slower of two consumers
	for i := range 50 {
		for c := range 20 {
			id := fmt.Sprint("c", (c*7+i)%20)
			k.push(s, id, point{"m", 1, k.clock.ms(0), float64(i)})
			k.clock.Add(time.Second)
			if i < 25 {
				had[id] = s.sites[id].data.Seq
			}
		}
	}
	k.clock.Add(k.cfg.MaxSampleAge)
	for name, all := range map[string]bool{"fast": true, "slow": false} {
		places := map[uint64]uint64{}
		for id, seq := range had {
			if places[SiteKey(id)] = seq; all {
				places[SiteKey(id)] = s.sites[id].data.Seq
			}
		}
		confirm(t, s.Consumers, name, k.clock.Now(), places)
	}
	for s.totals.Samples.Load() > 600 {
		before := allHeld(t, s)
		if err := s.makeRoom(nil, 100); err != nil {
			t.Fatal(err)
		}
		after := allHeld(t, s)
		oldest := int64(math.MaxInt64)
		for key := range after {
			oldest = min(oldest, key.t)
		}
		for key := range before {
			if _, stays := after[key]; !stays && key.t >= oldest {
				t.Fatalf("%v goes before what is of %d", key, oldest)
			}
		}
		s.cfg.LimitSamples = int(s.totals.Samples.Load())
	}
	if err := s.makeRoom(nil, 400); !errors.Is(err, ErrFull) {
		t.Errorf("what is wanted goes: %v", err)
	}
	if n := len(allHeld(t, s)); n != 500 {
		t.Errorf("%d samples are held of 500 that are wanted", n)
	}
	// That is not tried again at every push, but is when it may have changed.
	confirm(t, s.Consumers, "slow", k.clock.Now(), map[uint64]uint64{SiteKey("c1"): s.sites["c1"].data.Seq})
	s.cfg.LimitSamples = 500
	if err := s.makeRoom(nil, 1); !errors.Is(err, ErrFull) {
		t.Errorf("tried again at once: %v", err)
	}
	k.clock.Add(roomPause)
	if err := s.makeRoom(nil, 1); err != nil || s.totals.Samples.Load() >= 500 {
		t.Errorf("%d samples are held, %v", s.totals.Samples.Load(), err)
	}
}

// What outlives retention while no process runs is counted at the next start: what was
// not had by every consumer too, and neither what was counted before nor what another
// server has.
func TestStoreCountsWhatOutlivedMeanwhile(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	points := func(n int) (all []point) {
		for i := range n {
			all = append(all, point{"m", i, k.clock.ms(0), 1})
		}
		return all
	}
	stats := func(what string, expired, unread int64) {
		t.Helper()
		if st := s.Stats(); st.Expired != expired || st.ExpiredUnread != unread {
			t.Errorf("%s: expired %d, unread %d, want %d, %d", what, st.Expired, st.ExpiredUnread, expired, unread)
		}
	}
	k.push(s, "a", points(16)...) // counted while the process runs
	k.push(s, "b", points(16)...)
	k.clock.Add(100 * time.Minute)
	k.push(s, "a", points(3)...)
	confirm(t, s.Consumers, "c", k.clock.Now(), map[uint64]uint64{SiteKey("a"): s.sites["a"].data.Seq})
	k.clock.Add(time.Second)
	k.push(s, "a", append(points(5), point{"old", 1, k.clock.ms(100 * 60), 1})...) // of which one is counted while the process runs
	k.push(s, "b", points(7)...)
	k.clock.Add(time.Second)
	k.push(s, "b", points(9)...)
	k.clock.Add(30 * time.Minute)
	for _, id := range []string{"a", "b"} {
		s.sites[id].DropExpired(s.KeptSince())
	}
	stats("running", 16+1+16, 1+16)
	confirm(t, s.Consumers, "c", k.clock.Now(), nil)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = k.open()
	stats("started again", 0, 0)
	s.Close()
	k.clock.Add(3 * time.Hour)
	s = k.open()
	stats("started late", 3+5+7+9, 5+7+9)
	// So it is when the file of the cursors is lost, and with it what was read.
	k.push(s, "a", points(4)...)
	confirm(t, s.Consumers, "c", k.clock.Now(), map[uint64]uint64{SiteKey("a"): s.sites["a"].data.Seq})
	s.Close()
	fsys.Remove(consumersPath)
	k.clock.Add(3 * time.Hour)
	s = k.open()
	stats("started late without cursors", 4, 4)
}

// A number that a site forged in a value, found behind damage to its own log, costs
// other sites nothing.
func TestStoreForgedNumber(t *testing.T) {
	for _, number := range []uint64{MaxSeq, maxBlock << blockBits, 3<<blockBits + 1} {
		fsys := newStoreFS(1)
		k := newStoreKit(t, fsys)
		s := k.open()
		points := []point{{"m", 0, k.clock.ms(0), 1}}
		k.push(s, "a", points...)
		path := s.logPathOf("a")
		data, err := fsys.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		forged := &Batch{Seq: number, AcceptedAt: k.clock.ms(0), T0: k.clock.ms(1), IDs: []uint32{0}, V: []float64{2}}
		fsys.put(path, AppendRecord(append(data, bytes.Repeat([]byte{7}, 20)...), RecordBatch, EncodeBatchPayload(nil, forged)))
		k.clock.Add(time.Second)
		s = k.open()
		k.push(s, "b", points...)
		k.clock.Add(time.Second)
		k.push(s, "a", point{"m", 0, k.clock.ms(0), 3})
		if n := s.totals.NewestSeq.Load(); n > 3<<blockBits {
			t.Errorf("%d: numbers go on from %d", number, n)
		}
		want := pushed("a", points[0], point{"m", 0, k.clock.ms(0), 3})
		maps.Copy(want, pushed("b", points...))
		wantHeld(t, "pushed", allHeld(t, s), want)
		wantHeld(t, "opened again", allHeld(t, k.open()), want)
	}
}

// One site that has more than its share leaves the others an eighth of the limit, of
// which each may have its share.
func TestStoreSharesRoom(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSamples = 800
	s := k.open()
	for i := range 9 {
		k.push(s, fmt.Sprint("small-", i), point{"m", 1, k.clock.ms(0), 1})
	}
	flood := func(id string) (taken int) {
		for i := range 1000 {
			res, err := s.Append(context.Background(), id, storePush(id, point{"m", i, k.clock.ms(0), 1}), ScrapeNames{})
			if taken += res.Accepted; err != nil {
				if !errors.Is(err, ErrFull) {
					t.Fatal(err)
				}
				break
			}
		}
		return taken
	}
	if n := flood("large"); n != 700-9 {
		t.Errorf("one site got %d of 800", n)
	}
	if n := flood("small-0"); n != 80-1 { // its share
		t.Errorf("another got %d more", n)
	}
	if n := flood("large"); n != 0 {
		t.Errorf("and the first %d more", n)
	}
	if n := flood("new"); n != 800-700-79 {
		t.Errorf("a new one got %d", n)
	}
	allHeld(t, s)
}

// Making room, where every batch can be evicted and where none can, because a consumer that goes
// on scraping has read none of them. Finding that out takes time in proportion to the sites.
func BenchmarkMakeRoom(b *testing.B) {
	for _, sites := range []int{1000, 4000} {
		for _, unread := range []bool{true, false} {
			b.Run(fmt.Sprint(sites, " sites, unread ", unread), func(b *testing.B) {
				k := newStoreKit(b, nil)
				k.cfg.Dir = ""
				s := k.open()
				for b.Loop() {
					b.StopTimer()
					s.cfg.LimitSamples = 0
					for i := range sites {
						k.push(s, fmt.Sprint(i), point{"m", 1, k.clock.ms(0), 1})
					}
					k.clock.Add(2 * k.cfg.MaxSampleAge)
					for _, site := range s.sitesByID() {
						site.DropExpired(s.KeptSince())
					}
					if unread {
						confirm(b, s.Consumers, "c", k.clock.Now(), nil)
					}
					s.cfg.LimitSamples = max(1, int(s.totals.Samples.Load())-sites/2)
					b.StartTimer()
					if err := s.makeRoom(nil, 1); errors.Is(err, ErrFull) != unread || err != nil && !unread {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// Eviction that frees nothing of the pushing site's own must not cost what
// others could still show, and evicted samples stay gone through compaction.
func TestStoreEvictionAndCompaction(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSamples = 10
	s := k.open()
	for i := range 12 {
		k.push(s, "a", point{"m", i, k.clock.ms(0), float64(i)})
		k.clock.Add(time.Hour / 6)
	}
	held := allHeld(t, s)
	s.expireAndCompact(context.Background(), true)
	c := s.sites["a"]
	c.lock <- struct{}{}
	if err := c.RewriteLog(nil, s.KeptSince()); err != nil {
		t.Fatal(err)
	}
	<-c.lock
	got := allHeld(t, s)
	wantHeld(t, "compacted", got, held)
	wantHeld(t, "reopened", allHeld(t, k.open()), held)
}

// Samples that expire while a log is rewritten are counted once, and not held again.
func TestStoreExpiryAndCompaction(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(10), 1})
	k.push(s, "a", point{"m", 2, k.clock.ms(7190), 2}, point{"m", 3, k.clock.ms(5), 3})
	k.push(s, "a", point{"m", 4, k.clock.ms(7190), 4})
	c := s.sites["a"]
	before := s.KeptSince()
	expired := false
	fsys.hook = func(int, string, string) fault {
		if !expired { // a scrape in the middle of the rewrite
			expired = true
			k.clock.Add(20 * time.Second)
			c.DropExpired(s.KeptSince())
		}
		return fault{}
	}
	if err := c.Lock(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := c.RewriteLog(nil, before); err != nil || !expired {
		t.Fatal(err, expired)
	}
	c.Unlock()
	want := pushed("a", point{"m", 1, k.clock.ms(30), 1}, point{"m", 3, k.clock.ms(25), 3})
	wantHeld(t, "rewritten", contents(&c.data), want)
	c.DropExpired(s.KeptSince())
	if st := s.Stats(); st.Expired != 2 || s.totals.Samples.Load() != 3 {
		t.Errorf("%d samples expired, want 2; %d take memory, want 3", st.Expired, s.totals.Samples.Load())
	}
	wantHeld(t, "served", drain(t, k, s, "central"), want)
}

// With the storage limit met pushes are refused until retention lets Run make
// room; then they are taken again with no other help.
func TestStoreStorageLimit(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	k.cfg.LimitStorage = 64 << 10
	s := k.open()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	// As Run does, at once where it waits for its ticker.
	maintain := func() {
		select {
		case <-s.compactNow:
			s.expireAndCompact(ctx, true)
		default:
			s.expireAndCompact(ctx, false)
		}
	}
	var points []point
	for n := range 100 {
		points = append(points, point{"m", n, 0, 1})
	}
	taken, refused, longest, run := 0, 0, 0, 0
	for range 1500 {
		for i := range points {
			points[i].t = k.clock.ms(0)
		}
		_, err := s.Append(ctx, "a", storePush("a", points...), ScrapeNames{})
		if errors.Is(err, ErrFull) {
			refused++
			run++
			longest = max(longest, run)
		} else if err != nil {
			t.Fatal(err)
		} else {
			taken++
			run = 0
		}
		if s.Stats().LogBytes > k.cfg.LimitStorage {
			t.Fatalf("%d bytes", s.Stats().LogBytes)
		}
		maintain()
		k.clock.Add(30 * time.Second)
	}
	allHeld(t, s)
	if refused == 0 || taken == 0 {
		t.Fatalf("%d taken, %d refused: tests nothing", taken, refused)
	}
	// 64 KiB hold about 70 pushes of 100 samples; retention spans 240.
	if held := s.totals.Samples.Load(); held < 50*100 || taken < 350 {
		t.Errorf("%d samples held in the end, %d pushes taken, %d refused, %d one after the other", held, taken, refused, longest)
	}
}

// A full disk refuses pushes, loses nothing and needs no help when it has room.
func TestStoreDiskFull(t *testing.T) {
	fsys := newStoreFS(3)
	k := newStoreKit(t, fsys)
	s := k.open()
	want := map[heldSample]float64{}
	for i := range 30 {
		full := i%10 >= 5
		fsys.mu.Lock()
		fsys.hook = nil
		if full {
			fsys.hook = failOn("write", "", 0, errFull)
		}
		fsys.mu.Unlock()
		id, pt := fmt.Sprint(i%2), point{"m", i, k.clock.ms(0), 1}
		_, err := s.Append(context.Background(), id, storePush(id, pt), ScrapeNames{})
		if full != errors.Is(err, ErrFull) || !full && err != nil {
			t.Fatalf("push %d: %v", i, err)
		}
		if !full {
			maps.Copy(want, pushed(id, pt))
		}
		wantHeld(t, "full", allHeld(t, s), want)
		k.clock.Add(time.Second)
	}
	fsys.crash()
	wantHeld(t, "crash", allHeld(t, k.open()), want)
}

// A site silent for a day is forgotten, its log's directory entry with it.
func TestStoreForgets(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
	k.push(s, "b", point{"m", 1, k.clock.ms(0), 1})
	drain(t, k, s, "central")
	saveConsumers(t, s.Consumers)
	for range 30 {
		k.clock.Add(24*time.Hour - time.Second)
		s.expireAndCompact(context.Background(), false)
		s = k.open()
	}
	if n := len(s.Stats().Sites); n != 2 {
		t.Fatalf("%d sites before the 30 days are over", n)
	}
	k.push(s, "b", point{"m", 1, k.clock.ms(0), 2})
	k.clock.Add(time.Minute)
	fsys.hook = failOn("syncdir", "", 1, errDisk)
	s.expireAndCompact(context.Background(), false) // fails, and is tried again
	if len(k.errors) != 1 || len(s.sites) != 2 {
		t.Errorf("errors %v, %d sites", k.errors, len(s.sites))
	}
	s.expireAndCompact(context.Background(), false)
	if st := s.Stats().Sites; len(st) != 1 || st[0].ID != "b" {
		t.Errorf("known: %+v", st)
	}
	allHeld(t, s)
	if fsys.entries[s.logPathOf("a")] != nil || fsys.durable[s.logPathOf("a")] != nil {
		t.Errorf("files %v", fsys.names())
	}
	fsys.crash()
	s = k.open()
	if len(s.sites) != 1 || len(k.errors) != 1 {
		t.Errorf("%d sites after a crash; %v", len(s.sites), k.errors)
	}
	k.push(s, "a", point{"m", 1, k.clock.ms(0), 1}) // begins anew
}

// The newest sample of each series, not older than asked, one family per name.
func TestStoreNewest(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	k.push(s, "a", point{"x", 1, k.clock.ms(20), 1}, point{"y", 1, k.clock.ms(700), 2})
	k.push(s, "a", point{"x", 1, k.clock.ms(10), 3}, point{"x", 2, k.clock.ms(30), 4})
	k.push(s, "a", point{"x", 1, k.clock.ms(25), 5}) // late: held, not shown
	k.push(s, "b", point{"x", 1, k.clock.ms(5), 6}, point{"a.b", 1, k.clock.ms(5), math.NaN()})
	fams, truncated := scraper(s, 10*time.Minute).NewestPerSeries(0, nil)
	var got []string
	for _, f := range fams {
		for _, l := range f.Samples {
			got = append(got, fmt.Sprintf("%s: %s %g %d %t", f.Name, l.Line, l.V, (k.clock.ms(0)-l.T)/1000, l.Quoted))
		}
	}
	want := []string{
		`a.b: {"a.b",_id="b",instance="",job="",n="1"} NaN 5 true`,
		`x: x{_id="a",instance="",job="",n="1"} 3 10 false`,
		`x: x{_id="a",instance="",job="",n="2"} 4 30 false`,
		`x: x{_id="b",instance="",job="",n="1"} 6 5 false`,
	}
	if truncated || !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	fams, _ = scraper(s, 10*time.Minute).NewestPerSeries(0, func(line []byte) bool { return bytes.Contains(line, []byte(`n="2"`)) })
	if len(fams) != 1 || len(fams[0].Samples) != 1 || fams[0].Samples[0].V != 4 {
		t.Errorf("chosen: %v", fams)
	}
	// Age beyond retention shows nothing that retention dropped, compacted or not.
	k.clock.Add(2*time.Hour - 20*time.Second)
	before := shown(s, 24*time.Hour)
	s.expireAndCompact(context.Background(), true)
	wantHeld(t, "older than retention", before, shown(s, 24*time.Hour))
	if len(before) != 3 {
		t.Errorf("shown: %v", before)
	}
}

// Lines handed out stay as they are, whatever comes after.
func TestStoreNewestStays(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSeries = 50
	s := k.open()
	k.push(s, "a", point{"x", 1, k.clock.ms(0), 1})
	fams, _ := scraper(s, time.Hour).NewestPerSeries(0, nil)
	line := fams[0].Samples[0].Line
	want := string(line)
	for i := range 90 {
		for _, p := range []*SampleList{ // of the first kind 49 fit, of the second none
			storePush("a", point{"x", 2 + i, k.clock.ms(0), 1}),
			storePush("a", func() (many []point) {
				for n := range 51 {
					many = append(many, point{"z", n, k.clock.ms(0), 1})
				}
				return many
			}()...),
		} {
			if _, err := s.Append(context.Background(), "a", p, ScrapeNames{}); err != nil && !errors.Is(err, ErrSeriesLimit) {
				t.Fatal(err)
			}
		}
	}
	if string(line) != want || cap(line) != len(line) {
		t.Errorf("line changed to %q, capacity %d", line, cap(line))
	}
}

// Scrapes that meet the limit give every site its turn, with each of several
// scrapers that take turns.
func TestStoreNewestRotates(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	for c := range 10 {
		var points []point
		for n := range 1 + c {
			points = append(points, point{"x", n, k.clock.ms(0), 1})
		}
		k.push(s, fmt.Sprint("c", c), points...)
	}
	for _, limit := range []int{1, 10, 23, 54, 55, 100} {
		for scrapers := 1; scrapers <= 4; scrapers++ {
			x := scraper(s, time.Hour)
			seen := map[string]int{}
			for scrape := range 40 * scrapers {
				fams, truncated := x.NewestPerSeries(limit, nil)
				n := 0
				ids := map[string]bool{}
				for _, f := range fams {
					n += len(f.Samples)
					for _, l := range f.Samples {
						_, labels, _ := (&SeriesParser{}).ParseLine(l.Line)
						ids[string(labels[0].Value)] = true
					}
				}
				if n > max(limit, 10) || truncated != (len(ids) < 10) {
					t.Errorf("limit %d, scrape %d: %d samples of %d sites, truncated %t", limit, scrape, n, len(ids), truncated)
				}
				for id := range ids {
					if scrape%scrapers == 0 {
						seen[id]++
					}
				}
			}
			// Each is the first about every tenth time, and shown whatever its size.
			if len(seen) != 10 || slices.Min(slices.Collect(maps.Values(seen))) < 3 {
				t.Errorf("limit %d, %d scrapers: 40 scrapes of one showed %v", limit, scrapers, seen)
			}
		}
	}
}

// One directory, one process.
func TestStoreLocked(t *testing.T) {
	k := newStoreKit(t, DiskFS{})
	k.cfg.Dir = filepath.Join(t.TempDir(), "new", "dir")
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
	if _, err := OpenStore(k.cfg); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("opened twice: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = k.open()
	wantHeld(t, "reopened", allHeld(t, s), pushed("a", point{"m", 1, k.clock.ms(0), 1}))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// A failed opening gives the lock back.
	hash := filepath.Join(k.cfg.Dir, "ab")
	if err := errors.Join(os.Mkdir(hash, 0o700), os.Mkdir(filepath.Join(hash, "x"+LogSuffix), 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenStore(k.cfg); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Fatalf("a directory with a log's name: %v", err)
	}
	if err := os.Remove(filepath.Join(hash, "x"+LogSuffix)); err != nil {
		t.Fatal(err)
	}
	s = k.open()
	if err := s.Close(); err != nil || len(k.errors) > 0 {
		t.Fatal(err, k.errors)
	}
}

// EDQUOT is a full disk as well.
func TestStoreQuota(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	fsys.hook = failOn("write", "", 0, syscall.EDQUOT)
	if _, err := s.Append(context.Background(), "a", storePush("a", point{"m", 1, k.clock.ms(0), 1}), ScrapeNames{}); !errors.Is(err, ErrFull) {
		t.Errorf("got %v", err)
	}
}

// storeKeeper uses a store at random and knows what it acknowledged.
type storeKeeper struct {
	*storeKit
	fs    *crashFS
	rng   *rand.Rand
	s     *Store
	acked map[heldSample]float64 // must be held while within retention
	ever  map[heldSample]float64 // may be held: all that was pushed
	seq   map[string]uint64      // newest acknowledged
}

func newStoreKeeper(t *testing.T, fsys *crashFS, seed uint64) *storeKeeper {
	k := &storeKeeper{
		storeKit: newStoreKit(t, fsys), fs: fsys, rng: rand.New(rand.NewPCG(seed, 1)),
		acked: map[heldSample]float64{}, ever: map[heldSample]float64{}, seq: map[string]uint64{},
	}
	k.cfg.LimitSeries = 5
	k.s = k.open()
	return k
}

// randomPush makes a push of new, repeated and late samples. A sample's value
// follows from its time, so that repeats are repeats.
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

func (k *storeKeeper) push() {
	id := fmt.Sprint("c", k.rng.IntN(3))
	p := k.randomPush(id)
	before := heldOf(k.t, k.s, id)
	within, known := 0, 0
	oldest := k.s.KeptSince()
	keys := map[heldSample]float64{}
	for _, smp := range p.Samples {
		key := heldSample{string(p.Line(smp)), smp.T}
		if _, twice := keys[key]; twice {
			known++
		} else if _, held := before[key]; held && smp.T >= oldest {
			known++
		}
		if smp.T >= oldest {
			within++
			keys[key] = smp.V
		}
	}
	maps.Copy(k.ever, keys)
	res, err := k.s.Append(context.Background(), id, p, ScrapeNames{})
	if err != nil {
		return
	}
	maps.Copy(k.acked, keys)
	if res.Accepted != within-known || res.Duplicates != known || res.Conflicts != 0 || res.TooOld != len(p.Samples)-within {
		k.t.Errorf("%d samples, %d within retention, of which %d are known: %+v", len(p.Samples), within, known, res)
	}
	after := heldOf(k.t, k.s, id)
	for key, v := range keys {
		if got, ok := after[key]; !ok || got != v {
			k.t.Errorf("%v is acknowledged and not held", key)
		}
	}
	if c := k.s.sites[id]; c != nil {
		if c.data.Seq < k.seq[id] {
			k.t.Errorf("%s: sequence number %d after %d", id, c.data.Seq, k.seq[id])
		}
		k.seq[id] = c.data.Seq
	}
}

// check compares what is held with what was acknowledged.
func (k *storeKeeper) check() {
	got := allHeld(k.t, k.s)
	oldest := k.s.KeptSince()
	for key, v := range k.acked {
		if g, ok := got[key]; key.t >= oldest && (!ok || g != v) {
			k.t.Errorf("acknowledged %v is lost", key)
		}
	}
	for key, v := range got {
		if w, ok := k.ever[key]; !ok || v != w {
			k.t.Errorf("%v = %v was never pushed", key, v)
		}
	}
	for id, seq := range k.seq {
		if c := k.s.sites[id]; c == nil || c.data.Seq < seq {
			k.t.Errorf("%s: sequence number fell below %d: %+v", id, seq, c)
		}
	}
}

// reopen is a new process. A crash is no damage.
func (k *storeKeeper) reopen() {
	k.s = k.open()
	k.check()
	for _, err := range k.errors {
		// A last record whose sectors were written out of order cannot be told from
		// a damaged one.
		if strings.Contains(err.Error(), "recovering") || strings.Contains(err.Error(), "damaged: header true") {
			k.t.Error(err)
		}
	}
	size := int64(0)
	for _, name := range k.fs.names() {
		if data, err := k.fs.ReadFile(name); err == nil && strings.HasSuffix(name, LogSuffix) && filepath.Dir(name) != "/s" {
			size += int64(len(data))
		}
	}
	if got := k.s.Stats().LogBytes; got != size {
		k.t.Errorf("%d bytes accounted, %d on disk", got, size)
	}
}

func (k *storeKeeper) step() {
	switch n := k.rng.IntN(12); {
	case n < 7:
		k.push()
	case n < 9:
		k.clock.Add(time.Duration(k.rng.IntN(3000)) * time.Second)
	default:
		k.s.expireAndCompact(context.Background(), n == 9)
	}
	k.clock.Add(time.Duration(k.rng.IntN(3000)) * time.Millisecond)
}

// A store is used at random, and at each of its file operations in turn the
// process is killed or the operation fails. Then the process is restarted, or the
// machine crashes, or one and later the other.
func TestSweepStoreCrashes(t *testing.T) {
	sweep(t)
	const seeds, steps = 8, 24
	ops := map[string]int{}
	for seed := range uint64(seeds) {
		for at, reached := 0, true; reached; at++ {
			for mode := range 4 {
				fsys := newStoreFS(seed<<32 | uint64(at)<<2 | uint64(mode))
				k := newStoreKeeper(t, fsys, seed)
				reached = false
				seen := 0
				fsys.hook = func(_ int, op, name string) fault {
					if seen++; seen-1 != at {
						return fault{}
					}
					reached = true
					ops[op+filepath.Ext(name)]++
					if mode == 0 {
						return fault{Err: []error{errDisk, errFull}[at%2]}
					}
					return fault{Kill: true}
				}
				for range steps {
					k.step()
				}
				if mode >= 2 { // restart on the live system, go on, then crash
					fsys.restart()
					k.reopen()
					for range mode - 2 {
						k.step()
					}
				}
				for range 2 { // what survived once survives again
					fsys.crash()
					k.reopen()
				}
				k.push()
				fsys.crash()
				k.reopen()
				if fsys.open != 0 {
					t.Errorf("%d files left open", fsys.open)
				}
				if t.Failed() {
					t.Fatalf("seed %d, operation %d, mode %d; said %v", seed, at, mode, k.errors)
				}
			}
		}
	}
	for _, op := range []string{"write.log", "sync.log", "write.tmp", "sync.tmp", "rename.tmp", "mkdir", "syncdir"} {
		found := false
		for reached := range ops {
			found = found || strings.HasPrefix(reached, op)
		}
		if !found {
			t.Errorf("no fault in %s: %v", op, ops)
		}
	}
}

// All at once, under the race detector: pushes, scrapes, maintenance, eviction
// that meets rewrites, cancelled waiting, and Close in the middle of it.
func TestStoreConcurrent(t *testing.T) {
	for _, dir := range []string{"disk", ""} {
		k := newStoreKit(t, DiskFS{})
		if k.cfg.Dir = ""; dir != "" {
			k.cfg.Dir = filepath.Join(t.TempDir(), dir)
		}
		k.cfg.LimitSamples, k.cfg.LimitSeries, k.cfg.MaxSampleAge = 800, 40, time.Second
		s := k.open()
		ctx, cancel := context.WithCancel(context.Background())
		const writers, pushes = 8, 120
		var work, background sync.WaitGroup
		for w := range writers {
			work.Go(func() {
				rng := rand.New(rand.NewPCG(1, uint64(w)))
				for i := range pushes {
					id := fmt.Sprint("c", rng.IntN(5))
					var points []point
					for range 4 {
						points = append(points, point{"m", rng.IntN(60), k.clock.ms(rng.IntN(3)), 1})
					}
					wait, stop := context.WithCancel(ctx)
					if i%5 == 0 {
						stop()
					}
					_, err := s.Append(wait, id, storePush(id, points...), ScrapeNames{})
					stop()
					if err != nil && !errors.Is(err, ErrSeriesLimit) && !errors.Is(err, ErrFull) && !errors.Is(err, context.Canceled) {
						t.Errorf("push: %v", err)
					}
					k.clock.Add(400 * time.Millisecond)
				}
			})
		}
		background.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				s.expireAndCompact(ctx, n%2 == 0)
				for _, c := range s.sitesByID() { // rewrites that meet evictions
					if c.Lock(ctx) == nil {
						if !c.removed {
							if err := c.RewriteLog(nil, s.KeptSince()); err != nil {
								t.Errorf("rewrite: %v", err)
							}
						}
						<-c.lock
					}
				}
			}
		})
		background.Go(func() {
			for ctx.Err() == nil {
				fams, _ := scraper(s, time.Minute).NewestPerSeries(100, nil)
				for _, f := range fams {
					for _, l := range f.Samples {
						if !bytes.HasPrefix(l.Line, []byte("m{_id=")) || l.Line[len(l.Line)-1] != '}' {
							t.Errorf("shown: %q", l.Line)
						}
					}
				}
				s.Stats()
			}
		})
		background.Go(func() {
			if err := s.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		work.Wait()
		cancel()
		background.Wait()
		held := allHeld(t, s)
		if len(held) > 800+4*writers || s.Stats().Evicted == 0 {
			t.Errorf("%d samples held, %d evicted", len(held), s.Stats().Evicted)
		}
		for range 3 { // pushes while it closes are refused or durable
			work.Go(func() {
				s.Append(context.Background(), "c1", storePush("c1", point{"m", 1, k.clock.ms(0), 1}), ScrapeNames{})
			})
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		work.Wait()
		if _, err := s.Append(context.Background(), "c1", storePush("c1", point{"m", 1, k.clock.ms(0), 1}), ScrapeNames{}); !errors.Is(err, ErrClosed) {
			t.Errorf("closed: %v", err)
		}
		if len(k.errors) > 0 {
			t.Errorf("said %v", k.errors)
		}
		if dir == "" {
			continue
		}
		held = allHeld(t, s)
		k.cfg.LimitSamples = 0
		s = k.open()
		got := allHeld(t, s)
		for key := range held {
			if _, ok := got[key]; !ok {
				t.Errorf("%v is lost", key)
			}
		}
		if s.Stats().DamagedLogs > 0 || s.Close() != nil {
			t.Errorf("damaged: %v", k.errors)
		}
	}
}

// Waiting for a turn ends with the request or the store, and leaves nothing.
func TestStoreWaiting(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	push := func(ctx context.Context) error {
		_, err := s.Append(ctx, "a", storePush("a", point{"m", 1, k.clock.ms(0), 1}), ScrapeNames{})
		return err
	}
	c, err := s.acquireSite(context.Background(), "a") // a first push, under way
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := push(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	waiting := make(chan error, 2)
	for range 2 {
		go func() { waiting <- push(context.Background()) }()
	}
	s.releaseAndDropIfNew(c) // it failed: those who wait begin anew
	for range 2 {
		if err := <-waiting; err != nil {
			t.Errorf("waiting: %v", err)
		}
	}
	for i := range 50 { // a context that has ended leaves no site behind
		id := fmt.Sprint("x", i)
		if _, err := s.Append(ctx, id, storePush(id, point{"m", 1, k.clock.ms(9999), 1}), ScrapeNames{}); err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	if len(s.sites) != 1 {
		t.Errorf("%d sites", len(s.sites))
	}
	if c, err = s.acquireSite(context.Background(), "a"); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error)
	go func() { waiting <- push(context.Background()) }()
	go func() { closed <- s.Close() }()
	if err := <-waiting; !errors.Is(err, ErrClosed) { // even while another's push goes on
		t.Errorf("closing: %v", err)
	}
	select {
	case <-closed:
		t.Error("closed during a push")
	default:
	}
	s.releaseAndDropIfNew(c)
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// Run maintains every half minute, at once when the storage is full, and ends
// with its context.
func TestStoreRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newStoreKit(t, newStoreFS(1))
		k.cfg.Now = time.Now
		k.cfg.LimitStorage = 2000
		s := k.open()
		at := func() point { return point{"m", 1, time.Now().UnixMilli(), 1} }
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		taken := 0
		for {
			if _, err := s.Append(ctx, "a", storePush("a", at()), ScrapeNames{}); errors.Is(err, ErrFull) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			taken++
			time.Sleep(time.Minute)
		}
		synctest.Wait()
		if s.Stats().Compactions != 0 || s.Stats().Expired != 0 {
			t.Errorf("nothing is garbage yet: %+v", s.Stats())
		}
		time.Sleep(time.Hour)
		if _, err := s.Append(ctx, "a", storePush("a", at()), ScrapeNames{}); err != nil && !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
		synctest.Wait()
		time.Sleep(time.Hour)
		for range 2 { // the first says that there is no room, and so makes it
			if _, err := s.Append(ctx, "a", storePush("a", at()), ScrapeNames{}); err == nil {
				taken = 0
				break
			}
			synctest.Wait()
		}
		if taken != 0 {
			t.Errorf("no push is taken after retention: %+v", s.Stats())
		}
		time.Sleep(forgetAfter + time.Hour)
		if n := len(s.Stats().Sites); n != 0 || s.Stats().LogBytes != 0 {
			t.Errorf("%d sites known, %d bytes", n, s.Stats().LogBytes)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Whatever lies in a directory of logs, the store opens, shows no line but of the
// site whose file it is, works on, and opens again without damage.
func FuzzStoreLog(f *testing.F) {
	line := func(s string) []byte { return []byte(s) }
	series := func(id uint32, lines ...string) []byte {
		return EncodeSeriesPayload(nil, id, func(yield func([]byte) bool) {
			for _, l := range lines {
				yield(line(l))
			}
		})
	}
	now := newStoreClock().ms(0)
	batch := EncodeBatchPayload(nil, &Batch{Seq: 1, AcceptedAt: now, T0: now, IDs: []uint32{0, 1}, V: []float64{1, 2}})
	f.Add([]byte{}, true)
	f.Add(bytes.Join([][]byte{
		AppendRecord(nil, RecordSeries, series(0, `m{_id="a"}`, `n{_id="a"}`)), AppendRecord(nil, RecordBatch, batch),
	}, nil), true)
	f.Add(bytes.Join([][]byte{
		AppendRecord(nil, RecordSeries, series(1<<20, `m{_id="a"}`)), AppendRecord(nil, RecordBatch, batch),
		AppendRecord(nil, RecordSeries, series(0, `m{_id="b"}`)), []byte("garbage"), AppendRecord(nil, RecordBatch, batch),
	}, nil), false)
	f.Fuzz(func(t *testing.T, records []byte, header bool) {
		// Checksums are no match for the fuzzer: besides the bytes as they are, they
		// stand for payloads, each with its kind and length first.
		framed := bytes.Clone(records[:0])
		for rest := records; len(rest) > 2; {
			n := min(int(rest[1]), len(rest)-2)
			framed = AppendRecord(framed, 1+rest[0]%2, rest[2:2+n])
			rest = rest[2+n:]
		}
		for _, data := range [][]byte{records, framed} {
			if header {
				data = append(appendLogHeader(nil, []byte("a")), data...)
			}
			path := (&Store{cfg: StoreConfig{Dir: "/s"}}).logPathOf("a")
			fsys := newCrashFS(1, "/s", filepath.Dir(path))
			fsys.put(path, data)
			k := newStoreKit(t, fsys)
			s := k.open()
			allHeld(t, s)
			check := func() {
				for id := range s.sites {
					if id != "a" {
						t.Errorf("site %q", id)
					}
				}
				var parser SeriesParser
				fams, _ := scraper(s, time.Hour).NewestPerSeries(0, nil)
				for _, f := range fams {
					for _, l := range f.Samples {
						_, labels, err := parser.ParseCanonicalLine(l.Line)
						i := slices.IndexFunc(labels, func(l Label) bool { return string(l.Name) == ClusterLabel })
						if err != nil || i < 0 || string(labels[i].Value) != "a" {
							t.Errorf("shown: %q, %v", l.Line, err)
						}
					}
				}
			}
			check()
			before := heldOf(t, s, "a")
			if res, err := s.Append(context.Background(), "a", storePush("a", point{"fuzz", 1, k.clock.ms(1), 3}), ScrapeNames{}); err != nil || res.Accepted+res.Duplicates+res.Conflicts != 1 {
				t.Fatalf("%+v, %v", res, err)
			}
			after := allHeld(t, s)
			for key := range before {
				if _, ok := after[key]; !ok {
					t.Errorf("%v is lost", key)
				}
			}
			s = k.open()
			check()
			wantHeld(t, "reopened", allHeld(t, s), after)
			if s.Stats().DamagedLogs > 0 {
				t.Errorf("damaged again: %v", k.errors)
			}
		}
	})
}

// sitePush is a push as a site makes it: 230 series of 25 names with 6 labels;
// set gives it its times, which differ as targets do, and values.
func sitePush(id string) (p *SampleList, set func(at int64)) {
	p = &SampleList{}
	for i := range 230 {
		err := p.Add(&RawSample{Name: fmt.Appendf(nil, "node_metric_family_%d_total", i/10), Labels: []Label{
			{[]byte(ClusterLabel), []byte(id)}, {[]byte("instance"), fmt.Appendf(nil, "10.0.0.%d:9100", i%5)}, {[]byte("job"), []byte("node-exporter")},
			{[]byte("namespace"), []byte("monitoring")}, {[]byte("device"), fmt.Appendf(nil, "eth%d", i%10)}, {[]byte("zone"), []byte("eu-central-1a")},
		}})
		if err != nil {
			panic(err)
		}
	}
	return p, func(at int64) {
		for i := range p.Samples {
			p.Samples[i].T, p.Samples[i].V = at-int64(i%5)*1700, float64(at%1000)+float64(i)/7
		}
	}
}

func BenchmarkStoreAppend(b *testing.B) {
	k := newStoreKit(b, DiskFS{})
	k.cfg.Dir = b.TempDir()
	s := k.open()
	defer s.Close()
	p, set := sitePush("site-7")
	b.ReportAllocs()
	before := processCPU(b)
	for b.Loop() {
		k.clock.Add(15 * time.Second)
		set(k.clock.ms(0))
		if res, err := s.Append(context.Background(), "site-7", p, ScrapeNames{}); err != nil || res.Accepted != len(p.Samples) {
			b.Fatalf("%+v, %v", res, err)
		}
		if b.N%100 == 0 {
			s.expireAndCompact(context.Background(), false)
		}
	}
	b.ReportMetric(float64(b.N*len(p.Samples))/(processCPU(b)-before).Seconds(), "samples/cpu-s")
}

func BenchmarkNewest(b *testing.B) {
	k := newStoreKit(b, nil)
	k.cfg.Dir = ""
	s := k.open()
	n := 0
	for c := range 1000 {
		id := fmt.Sprint("site-", c)
		p, set := sitePush(id)
		set(k.clock.ms(c % 60))
		if _, err := s.Append(context.Background(), id, p, ScrapeNames{}); err != nil {
			b.Fatal(err)
		}
		n += len(p.Samples)
	}
	e := NegotiateEscaping("")
	for _, part := range []string{"collect", "render"} {
		b.Run(part, func(b *testing.B) {
			b.ReportAllocs()
			before := processCPU(b)
			for b.Loop() {
				fams, _ := scraper(s, 10*time.Minute).NewestPerSeries(0, nil)
				if part == "render" {
					if written, _, err := WriteFamilies(io.Discard, e, fams); err != nil || written != n {
						b.Fatal(written, err)
					}
				}
			}
			b.ReportMetric(float64(b.N*n)/(processCPU(b)-before).Seconds(), "samples/cpu-s")
		})
	}
}

// BenchmarkMemory says what a series, and a sample beyond its series' first,
// costs in memory and on disk.
func BenchmarkMemory(b *testing.B) {
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	const sites, pushes = 200, 60
	for b.Loop() {
		fsys := newStoreFS(1)
		k := newStoreKit(b, nullFS{fsys})
		s := k.open()
		start, text := heap(), 0
		var first, disk int64
		var after uint64
		for i := range pushes {
			for c := range sites {
				id := fmt.Sprint("site-", c)
				p, set := sitePush(id)
				set(k.clock.ms(0))
				if _, err := s.Append(context.Background(), id, p, ScrapeNames{}); err != nil {
					b.Fatal(err)
				}
				if i == 0 {
					text += len(p.Arena)
				}
			}
			k.clock.Add(15 * time.Second)
			if i == 0 {
				after, first = heap(), s.Stats().LogBytes
			}
		}
		end := heap()
		disk = s.Stats().LogBytes
		const series = sites * 230
		const samples = series * (pushes - 1)
		b.ReportMetric(float64(after-start)/series, "B/series")
		b.ReportMetric(float64(text)/series, "text-B/series")
		b.ReportMetric(float64(end-after)/samples, "B/sample")
		b.ReportMetric(float64(disk-first)/samples, "disk-B/sample")
		b.ReportMetric(0, "ns/op")
		runtime.KeepAlive(s)
	}
}

// nullFS keeps no bytes, so that a benchmark measures the store's memory.
type nullFS struct{ *crashFS }

type nullFile struct{}

func (nullFS) OpenFile(string, int, fs.FileMode) (File, error) { return nullFile{}, nil }
func (nullFS) Rename(string, string) error                     { return nil }
func (nullFS) SyncDir(string) error                            { return nil }

func (nullFile) Write(p []byte) (int, error) { return len(p), nil }
func (nullFile) Sync() error                 { return nil }
func (nullFile) Truncate(int64) error        { return nil }
func (nullFile) Close() error                { return nil }
