package main

// A start of a store whose files cannot be read, or were cut, removed or replaced by older copies.
// The store reports losses, and serves every new sample to every consumer. It uses no batch number
// twice, unless the state file and the file of the cursors are both lost or older copies.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// openedFiles are the files of a store with sites a and b and one consumer, and the samples and
// cursors in them.
type openedFiles struct {
	contents map[string]string // path → content
	dirs     []string
	logOfA   string
	held     map[heldSample]float64
	cursors  map[string]map[uint64]uint64
}

func newOpenedFiles(t *testing.T) *openedFiles {
	t.Helper()
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(60), 1})
	k.push(s, "b", point{"m", 1, k.clock.ms(60), 1})
	confirm(t, s.Consumers, "c", k.clock.Now(), map[uint64]uint64{s.sites["a"].Key: 1})
	saveConsumers(t, s.Consumers)
	f := &openedFiles{contents: fsys.contents(), logOfA: s.logPathOf("a"), held: allHeld(t, s), cursors: cursorsOf(s.Consumers)}
	f.dirs = []string{"/s", filepath.Dir(f.logOfA), filepath.Dir(s.logPathOf("b"))}
	return f
}

func (f *openedFiles) fs() *crashFS {
	fsys := newCrashFS(1, f.dirs...)
	for name, data := range f.contents {
		fsys.put(name, []byte(data))
	}
	return fsys
}

// wantUnchanged fails the test unless all files have their old content. Only the state file may
// differ, because each start changes it.
func (f *openedFiles) wantUnchanged(t *testing.T, name string, fsys *crashFS) {
	t.Helper()
	now := fsys.contents()
	for path, data := range f.contents {
		if path != statePath && now[path] != data {
			t.Errorf("%s: %s has changed; the files are %v", name, path, fsys.names())
		}
	}
	if len(now) != len(f.contents) {
		t.Errorf("%s: the files are %v, want %d files", name, fsys.names(), len(f.contents))
	}
}

// wantAll fails the test unless s has all samples and cursors of f and has found no damage.
func (f *openedFiles) wantAll(t *testing.T, name string, k *storeKit, s *Store) {
	t.Helper()
	wantHeld(t, name, allHeld(t, s), f.held)
	if got := cursorsOf(s.Consumers); !sameCursors(got, f.cursors) {
		t.Errorf("%s: got cursors %v, want %v", name, got, f.cursors)
	}
	if n := s.Stats().DamagedLogs; n != 0 {
		t.Errorf("%s: %d logs count as damaged", name, n)
	}
	k.wantNoErrors(name)
}

// If reads fail once or twice, OpenStore tries again and recovers everything. If reads keep
// failing, OpenStore returns the error and changes no file, so that a later start on a repaired
// disk recovers everything.
func TestOpenStoreReadFails(t *testing.T) {
	f := newOpenedFiles(t)
	for _, file := range []struct{ name, op, path string }{
		{"log", "read", f.logOfA},
		{"cursors", "read", consumersPath},
		{"state", "read", statePath},
		{"directory of logs", "readdir", filepath.Dir(f.logOfA)},
		{"storage directory", "readdir", "/s"},
	} {
		for _, rf := range readFaults {
			name := fmt.Sprintf("reading the %s fails %s with %v", file.name, rf.times(), rf.err)
			synctest.Test(t, func(t *testing.T) { // in virtual time, because OpenStore waits before it reads again
				fsys := f.fs()
				fsys.hook = rf.hook(file.op, file.path)
				k := newStoreKit(t, fsys)
				s, err := OpenStore(k.cfg)
				if rf.n > 0 && err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if rf.n == 0 {
					wantOpenError(t, name, err, rf.err)
					if !strings.Contains(fmt.Sprint(err), file.path+": ") {
						t.Errorf("%s: the error does not name %s: %v", name, file.path, err)
					}
					k.wantNoErrors(name)
					fsys.restart()
					s = k.open()
				}
				f.wantUnchanged(t, name, fsys)
				f.wantAll(t, name, k, s)
			})
		}
	}
}

// wantOpenError fails the test unless err wraps cause and has the text that OpenStore adds.
func wantOpenError(t *testing.T, name string, err, cause error) {
	t.Helper()
	if !errors.Is(err, cause) || !strings.HasPrefix(fmt.Sprint(err), "reading storage directory: ") {
		t.Errorf("%s: got error %v, want one of the storage directory with cause %v", name, err, cause)
	}
}

// If OpenStore cannot sync a directory, it returns the error. A later start on a repaired disk
// recovers everything.
func TestOpenStoreSyncDirFails(t *testing.T) {
	f := newOpenedFiles(t)
	fsys := f.fs()
	fsys.hook = failOn("syncdir", filepath.Dir(f.logOfA), 0, errDisk)
	k := newStoreKit(t, fsys)
	_, err := OpenStore(k.cfg)
	wantOpenError(t, "a directory cannot be synced", err, errDisk)
	k.wantNoErrors("a directory cannot be synced")
	fsys.restart()
	s := k.open()
	f.wantUnchanged(t, "after a restart", fsys)
	f.wantAll(t, "after a restart", k, s)
}

// If a log is unusable and OpenStore cannot set it aside, OpenStore returns the error and keeps the
// log. Otherwise the next push of the site would replace the log.
func TestOpenStoreSetAsideFails(t *testing.T) {
	f := newOpenedFiles(t)
	fsys := f.fs()
	fsys.put(f.logOfA, []byte("nonsense"))
	fsys.hook = failOn("rename", f.logOfA, 0, errDisk)
	k := newStoreKit(t, fsys)
	_, err := OpenStore(k.cfg)
	wantOpenError(t, "a log cannot be set aside", err, errDisk)
	k.wantNoErrors("a log cannot be set aside")
	if got := fsys.contents()[f.logOfA]; got != "nonsense" {
		t.Errorf("the log is %q, want it unchanged; the files are %v", got, fsys.names())
	}
}

// numbersRig is a store with site a and consumer central. highest is the highest batch number so
// far.
type numbersRig struct {
	*storeKit
	fsys    *crashFS
	s       *Store
	highest uint64
}

// pushFive makes five pushes for site a, and returns their samples. The test fails if a push gets a
// batch number that is not above all earlier batch numbers.
func (r *numbersRig) pushFive() map[heldSample]float64 {
	r.t.Helper()
	want := map[heldSample]float64{}
	for i := range 5 {
		r.clock.Add(time.Second)
		pt := point{"m", i % 2, r.clock.ms(0), float64(i)}
		r.push(r.s, "a", pt)
		maps.Copy(want, pushed("a", pt))
		seq := r.s.sites["a"].data.Seq
		if seq <= r.highest {
			r.t.Fatalf("batch number %d follows %d", seq, r.highest)
		}
		r.highest = seq
	}
	return want
}

// forget opens the store as a new process long after the last push of site a. The process forgets
// the site and ends.
func (r *numbersRig) forget() {
	r.t.Helper()
	r.clock.Add(forgetAfter + 3*time.Hour)
	s := r.open()
	s.expireAndCompact(context.Background(), false)
	if len(s.sites) != 0 {
		r.t.Errorf("%d sites are known, want site a forgotten", len(s.sites))
	}
	s.Close()
}

// The batch numbers of a site do not fall, and a consumer gets every new sample. Both hold after
// restarts and after the store has forgotten the site, whatever happens to the site's log and to
// the file of cursors in between. Batch numbers may fall if the state file is replaced by an older
// copy too, but the consumer still gets every new sample.
func TestBatchNumbersNeverFall(t *testing.T) {
	for _, test := range []struct {
		name  string
		spoil func(r *numbersRig, old map[string]string) // changes files while no process runs; old has the contents of all files after the first run, by path
		older bool                                       // spoil replaces the state file and the file of cursors by older copies, so that batch numbers may repeat
	}{
		{name: "nothing happens", spoil: func(*numbersRig, map[string]string) {}},
		{name: "log removed", spoil: func(r *numbersRig, _ map[string]string) { r.fsys.Remove(r.s.logPathOf("a")) }},
		{name: "log replaced by older copy", spoil: func(r *numbersRig, old map[string]string) {
			r.fsys.put(r.s.logPathOf("a"), []byte(old[r.s.logPathOf("a")]))
		}},
		{name: "log and cursors removed", spoil: func(r *numbersRig, _ map[string]string) {
			r.fsys.Remove(r.s.logPathOf("a"))
			r.fsys.Remove(consumersPath)
		}},
		{name: "killed soon after its start, then log and cursors removed", spoil: func(r *numbersRig, _ map[string]string) {
			r.open() // this start takes a new block of batch numbers
			r.fsys.restart()
			r.fsys.Remove(r.s.logPathOf("a"))
			r.fsys.Remove(consumersPath)
			if state := openStoreState(r.t, r.fsys); state.block != 3 {
				r.t.Errorf("the state has block %d after three starts", state.block)
			}
		}},
		{name: "log and state removed", spoil: func(r *numbersRig, _ map[string]string) {
			r.fsys.Remove(r.s.logPathOf("a"))
			r.fsys.Remove(statePath)
		}},
		{name: "site forgotten, cursors replaced by older copy", spoil: func(r *numbersRig, _ map[string]string) {
			cursors, _ := r.fsys.ReadFile(consumersPath)
			r.forget()
			r.fsys.put(consumersPath, cursors)
		}},
		{name: "site forgotten, state and cursors replaced by older copies", older: true, spoil: func(r *numbersRig, old map[string]string) {
			r.forget()
			r.fsys.put(consumersPath, []byte(old[consumersPath]))
			r.fsys.put(statePath, []byte(old[statePath]))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			fsys := newStoreFS(1)
			k := newStoreKit(t, fsys)
			r := &numbersRig{storeKit: k, fsys: fsys, s: k.open()}
			r.pushFive()
			drain(t, k, r.s, "central")
			r.s.Close()
			old := fsys.contents()
			r.s = k.open()
			r.pushFive()
			drain(t, k, r.s, "central")
			r.pushFive() // no consumer reads these samples
			r.s.Close()
			test.spoil(r, old)
			if r.s = k.open(); test.older {
				r.highest = 0 // repeated batch numbers do no harm, because the cursors are as old as the state file
			}
			want := r.pushFive()
			got := drain(t, k, r.s, "central")
			for key, v := range want {
				if got[key] != v {
					t.Errorf("%v is not served", key)
				}
			}
		})
	}
}

// lossLog writes a log with lossPushes pushes. Each push has one sample of each of lossSeries
// series.
const lossPushes, lossSeries = 12, 20

// lossLog writes a log for site a, and has consumer central read all of it. If spool is true, each push
// names a scrape. It returns the path of
// the log. ends are the offsets at which the log header and each record end. The first record is a
// series record, and all others are batches.
func lossLog(t *testing.T, k *storeKit, fsys *crashFS, spool bool) (path string, ends []int) {
	t.Helper()
	s := k.open()
	path = s.logPathOf("a")
	for i := range lossPushes {
		k.clock.Add(time.Second)
		var points []point
		for n := range lossSeries {
			points = append(points, point{"m", n, k.clock.ms(0), float64(i)})
		}
		names := ScrapeNames{}
		if spool {
			names = names1(uint64(i + 1))
		}
		k.pushNamed(s, "a", names, points...)
		data, err := fsys.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			header := parseLogHeader(data).size
			size, _ := parseRecordHead(data[header:])
			ends = append(ends, header, header+size)
		}
		ends = append(ends, len(data))
	}
	drain(t, k, s, "central")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return path, ends
}

// A start reports the losses in a log, with the number of lost pushes or samples if it can tell
// that number. An unfinished write at the end of a log is only a warning, because a crash leaves
// such a write, unless a consumer has read batches that the log no longer has. A log without any
// batch is an error. The next start reports no error.
func TestRecoveryReportsLosses(t *testing.T) {
	type change = func(data []byte, ends []int) []byte
	for _, test := range []struct {
		name    string
		change  change // the change of the log; nil: the log is removed
		damaged bool   // the loss is reported as an error; otherwise as a warning
		torn    bool   // the log only ends in an unfinished write
		want    []string
	}{
		{"removed", nil, true, false, []string{`consumers ["central"] have read the log /s/`, "which is missing", "unknown number of pushes"}},
		{"emptied", func([]byte, []int) []byte { return []byte{} }, true, false, []string{"the log has neither a header nor a record", "which is missing or has no batch left"}},
		{"zeroed", func(data []byte, _ []int) []byte { return make([]byte, len(data)) }, true, false, []string{"the log has neither a header nor a record", "which is missing or has no batch left"}},
		{"cut in the header", func(data []byte, _ []int) []byte { return data[:9] }, true, false, []string{"the log has neither a header nor a record", "which is missing or has no batch left"}},
		{"cut after the header", func(data []byte, ends []int) []byte { return data[:ends[0]] }, true, false, []string{"the log has no batch", "which is missing"}},
		{"cut before the first batch", func(data []byte, ends []int) []byte { return data[:ends[1]+5] }, true, false, []string{"the log has no batch"}},
		{"overwritten", func(data []byte, _ []int) []byte { return bytes.Repeat([]byte("x"), len(data)) }, true, false, []string{"the log has neither a header nor a record", "which is missing or has no batch left"}},
		{"cut between records", func(data []byte, ends []int) []byte { return data[:ends[len(ends)-3]] }, true, false,
			[]string{"ends before the newest batch that consumers", `site "a"`, "2 or more pushes are lost"}},
		{"cut in a record", func(data []byte, ends []int) []byte { return data[:ends[len(ends)-2]-5] }, true, false,
			[]string{"ends before the newest batch that consumers", "2 or more pushes are lost"}},
		{"zeroed at the end", func(data []byte, ends []int) []byte {
			at := ends[len(ends)-4] + 20
			return slices.Concat(data[:at], make([]byte, len(data)-at))
		}, true, false, []string{"ends before the newest batch that consumers", "3 or more pushes are lost"}},
		{"two records in the middle zeroed", func(data []byte, ends []int) []byte {
			at, end := ends[len(ends)-5], ends[len(ends)-3]
			return slices.Concat(data[:at], make([]byte, end-at), data[end:])
		}, true, false, []string{"was damaged", "bytes are lost, 2 or more pushes; "}},
		{"series record zeroed", func(data []byte, ends []int) []byte {
			return slices.Concat(data[:ends[0]], make([]byte, ends[1]-ends[0]), data[ends[1]:])
		}, true, false, []string{fmt.Sprintf("bytes are lost, %d samples of series whose names are lost; ", lossPushes*lossSeries)}},
		{"unfinished push at the end", func(data []byte, ends []int) []byte {
			return append(bytes.Clone(data), data[ends[2]:ends[3]-9]...)
		}, false, true, []string{"unfinished writes of 184 bytes were removed"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			fsys := newStoreFS(1)
			k := newStoreKit(t, fsys)
			path, ends := lossLog(t, k, fsys, false)
			var change func(data []byte) []byte
			if test.change != nil {
				change = func(data []byte) []byte { return test.change(data, ends) }
			}
			changeFile(t, fsys, path, change)
			var warnings []error
			k.cfg.OnWarning = func(err error) { warnings = append(warnings, err) }
			s := k.open()
			if st := s.Stats(); (st.DamagedLogs == 1) != test.damaged || st.DamagedLogs > 1 || (st.TornLogs > 0) != test.torn {
				t.Errorf("%d logs count as damaged, %d as torn; want damaged %t, torn %t", st.DamagedLogs, st.TornLogs, test.damaged, test.torn)
			}
			reported := fmt.Sprint(k.errors)
			if !test.damaged {
				reported = fmt.Sprint(warnings)
				k.wantNoErrors("recovery")
			}
			for _, want := range test.want {
				if !strings.Contains(reported, want) {
					t.Errorf("reported: %s\nwant: %q", reported, want)
				}
			}
			if strings.Contains(reported, `kept as "."`) {
				t.Errorf("a report names no file for what is kept: %s", reported)
			}
			s.Close()
			k.errors, warnings = nil, nil
			if s = k.open(); len(k.errors)+len(warnings) > 0 {
				t.Errorf("the next start reports the loss again: %v %v", k.errors, warnings)
			}
			k.push(s, "a", point{"m", 1, k.clock.ms(0) + 1, 7})
			s.Close()
			if s = k.open(); s.Stats().DamagedLogs != 0 {
				t.Errorf("the next start finds %d damaged logs", s.Stats().DamagedLogs)
			}
			k.wantNoErrors("the next start")
		})
	}
}

// The log of a site with a spool that ends before a cursor is torn, not damaged, because the client sends
// again what the log lost. Recovery lowers the cursor to the end of the log. The consumer is served
// later batches, and no batch that is left.
func TestRecoveryOfShortLogWithSpool(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	path, ends := lossLog(t, k, fsys, true)
	changeFile(t, fsys, path, func(data []byte) []byte { return data[:ends[len(ends)-3]] })
	var warnings []error
	k.cfg.OnWarning = func(err error) { warnings = append(warnings, err) }
	s := k.open()
	k.wantNoErrors("recovery")
	if st := s.Stats(); st.DamagedLogs != 0 || st.TornLogs != 1 || len(warnings) != 1 {
		t.Errorf("%d logs count as damaged and %d as torn, with the warnings %v; want 0, 1 and one warning", st.DamagedLogs, st.TornLogs, warnings)
	}
	left := s.sites["a"].data.Batches
	if got, want := cursorsOf(s.Consumers)["central"][SiteKey("a")], left[len(left)-1].Seq; got != want || len(left) != lossPushes-2 {
		t.Errorf("%d batches are left, and the cursor is %d; want %d and the last batch %d", len(left), got, lossPushes-2, want)
	}
	if held := s.RefreshSpoolStatus("a", 1); held.Held.Has(lossPushes) || held.Read.Has(lossPushes) {
		t.Errorf("the lost scrape is listed: %+v", held)
	}
	k.pushNamed(s, "a", names1(lossPushes), point{"m", 0, k.clock.ms(0), 7})
	if got := drain(t, k, s, "central"); len(got) != 1 {
		t.Errorf("served %d samples, want only the one that was pushed again", len(got))
	}
}

// An unfinished write at the end of the file of cursors is only a warning of its own. It does not count
// as a torn log.
func TestRecoveryOfTornCursors(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
	drain(t, k, s, "central")
	s.Close()
	changeFile(t, fsys, "/s/"+ConsumersFile, func(data []byte) []byte {
		return append(bytes.Clone(data), AppendRecord(nil, 1, make([]byte, 9))[:7]...)
	})
	var warnings []string
	k.cfg.OnWarning = func(err error) { warnings = append(warnings, err.Error()) }
	s = k.open()
	k.wantNoErrors("recovery")
	if want := "/s/" + ConsumersFile + " ended in 7 bytes of an unfinished write, which were removed: consumers may be served some samples again"; !slices.Equal(warnings, []string{want}) || s.Stats().TornLogs != 0 {
		t.Errorf("%d torn logs and the warnings %q; want none, and %q", s.Stats().TornLogs, warnings, want)
	}
}

// A new consumer is in the state file when its first scrape has been answered.
func TestConsumerIsSavedBeforeItIsServed(t *testing.T) {
	r := newConsumerRig(t)
	r.pushUps(1)
	if got := r.ups(scraperOf(t), "consumer=new", ""); got != "1 " {
		t.Errorf("served %q, want the sample of value 1", got)
	}
	state, err := OpenStoreMeta(r.store.cfg.FS.(*crashFS), "/secretdir")
	if err != nil || state.Damage != nil || len(state.Consumers) != 1 || state.Consumers[0].Name != "new" {
		t.Errorf("the state file has %+v, %v; want consumer new", state, err)
	}
}

// A start reports that the state file or the file of the cursors is missing, if the store has
// sites.
func TestRecoveryReportsMissingFiles(t *testing.T) {
	for _, missing := range []string{stateFile, ConsumersFile} {
		fsys := newStoreFS(1)
		k := newStoreKit(t, fsys)
		s := k.open()
		k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
		drain(t, k, s, "central")
		s.Close()
		fsys.Remove("/s/" + missing)
		k.open()
		if len(k.errors) != 1 || !strings.Contains(k.errors[0].Error(), "/s/"+missing+" is missing") {
			t.Errorf("without %s: reported %v, want that it is missing", missing, k.errors)
		}
	}
}

// A cursor can be above all batch numbers in its site's log, for example because the newest batch
// was damaged. Such a cursor hides no later samples of the site. No old cursor hides them either if
// the store forgot the site before a crash.
func TestStaleCursorHidesNothing(t *testing.T) {
	for _, forgotten := range []bool{true, false} {
		fsys := newStoreFS(1)
		k := newStoreKit(t, fsys)
		s := k.open()
		for i := range 3 {
			k.push(s, "a", point{"x", 1, k.clock.ms(100 - i), float64(i)})
		}
		path := s.logPathOf("a")
		drain(t, k, s, "c")
		saveConsumers(t, s.Consumers)
		if forgotten {
			k.clock.Add(forgetAfter + time.Hour)
			s.expireAndCompact(context.Background(), false)
			if len(s.sites) > 0 {
				t.Fatal("site a is not forgotten")
			}
		}
		fsys.crash()
		if data, err := fsys.ReadFile(path); !forgotten && err == nil {
			data = slices.Clone(data)
			data[len(data)-1] ^= 1
			fsys.put(path, data)
		}
		want := map[heldSample]float64{}
		for i := range 2 {
			s = k.open()
			pt := point{"x", 1, k.clock.ms(50 - i), float64(10 + i)}
			k.push(s, "a", pt)
			maps.Copy(want, pushed("a", pt))
			fsys.crash()
		}
		got := drain(t, k, k.open(), "c")
		for key := range want {
			if _, served := got[key]; !served {
				t.Errorf("forgotten %t: %v is not served; served: %v", forgotten, key, got)
			}
		}
	}
}
