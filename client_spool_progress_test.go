package main

// Tests of the record of what was scraped: it survives a restart and a crash, damage costs only what
// it says, and it is written no more often than needed.

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"
)

const progressPath = "/s/" + progressName

// progressAt returns the progress of a client that has scraped at a time in ms, with the given gaps.
func progressAt(last int64, gaps ...gap) scrapeProgress {
	return scrapeProgress{Last: last, Newest: last - 5, Gaps: gaps}
}

// expectProgress opens the spool again, as after a restart, and fails the test unless it knows want and
// has reported as many errors as wantErrs.
func (r *spoolRig) expectProgress(what string, want scrapeProgress, wantErrs int) {
	r.t.Helper()
	r.errs = nil
	r.open()
	if got := r.spool.Progress(); !reflect.DeepEqual(got, want) || len(r.errs) != wantErrs {
		r.t.Errorf("%s: the spool knows %+v and reported %v; want %+v and %d errors", what, got, r.errs, want, wantErrs)
	}
}

// The next process knows what was saved. The scrapes of the spool are not affected.
func TestSpoolProgress(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1)
	r.expectProgress("before the first scrape", scrapeProgress{}, 0)
	for _, p := range []scrapeProgress{progressAt(10_000), progressAt(20_000, gap{10_000, 15_000}), progressAt(30_000, gap{1, 2}, gap{10_000, 15_000}), {Last: 40_000}} {
		r.spool.SaveProgress(p)
		if got := r.spool.Progress(); !reflect.DeepEqual(got, p) {
			t.Errorf("after saving %+v, the progress is %+v", p, got)
		}
		r.expectProgress("after a restart", p, 0)
	}
	r.expect("the pushes", r.drain(noLimits), [][]int{{1}})
}

// If a process is killed, or the power fails, at any operation of a write, the next process knows the
// old or the new progress. The file of an unfinished write does not prevent the next write.
func TestSpoolProgressCrash(t *testing.T) {
	before, after, last := progressAt(10_000, gap{1, 2}), progressAt(20_000, gap{1, 2}, gap{10_000, 15_000}), progressAt(30_000, gap{7, 8})
	seen := map[string]int{}
	for seed := range testSeeds(t, 30) {
		for at, reached := 0, true; reached; at++ {
			for _, power := range []bool{false, true} {
				r := newSpoolRig(t, nil)
				r.spool.SaveProgress(before)
				r.fs.rng = rand.New(rand.NewPCG(seed, uint64(at)))
				reached = false
				r.fs.hook = func(n int, _, _ string) fault {
					reached = reached || n == at
					return fault{Kill: n == at}
				}
				r.spool.SaveProgress(after)
				if !reached {
					break
				}
				r.fs.restart()
				if power {
					r.fs.crash()
				}
				r.errs = nil
				r.open()
				got := r.spool.Progress()
				if isOld := reflect.DeepEqual(got, before); !isOld && !reflect.DeepEqual(got, after) || len(r.errs) > 0 {
					t.Fatalf("killed at operation %d, power failure %v: the next process knows %+v and reported %v", at, power, got, r.errs)
				} else {
					seen[fmt.Sprint("old: ", isOld)]++
				}
				r.fs.crash()
				r.expectProgress("after another power failure", got, 0)
				r.spool.SaveProgress(last)
				r.fs.crash()
				r.expectProgress("after the next write", last, 0)
			}
		}
	}
	if len(seen) != 2 {
		t.Errorf("the crashes left %v, want old and new records", seen)
	}
}

// A record that is damaged, empty or malformed is reported once. Nothing is then known, the scrapes stay
// in the spool, and the next write replaces the record. A record of another cluster ID is ignored.
func TestSpoolProgressDamage(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1)
	saved := progressAt(20_000, gap{10_000, 15_000})
	r.spool.SaveProgress(saved)
	good := r.fs.entries[progressPath].data
	file := func(clusterID string, kind byte, payload []byte) []byte {
		return AppendRecord(appendLogHeader(nil, []byte(clusterID)), kind, payload)
	}
	damaged := map[string][]byte{
		"twice":     AppendRecord(bytes.Clone(good), progressKind, appendScrapeProgress(nil, saved)),
		"malformed": file("site", progressKind, appendScrapeProgress(nil, progressAt(20_000, gap{2, 1}))),
		"too short": file("site", progressKind, []byte{1, 2, 3}),
		"no record": appendLogHeader(nil, []byte("site")),
		"garbage":   []byte("<html>"),
	}
	for i := range good {
		damaged[fmt.Sprint("cut at ", i)] = good[:i]
		flipped := bytes.Clone(good)
		flipped[i] ^= 0x40
		damaged[fmt.Sprint("flipped at ", i)] = flipped
	}
	for what, data := range damaged {
		r.fs.put(progressPath, data)
		r.expectProgress(what, scrapeProgress{}, 1)
		if len(r.errs) == 1 && !strings.Contains(r.errs[0].Error(), progressPath) {
			t.Errorf("%s: the error %v does not name the file", what, r.errs[0])
		}
		r.spool.SaveProgress(saved)
		r.expectProgress(what+", after the next write", saved, 0)
	}
	r.fs.put(progressPath, file("other", progressKind, appendScrapeProgress(nil, saved)))
	r.expectProgress("of another cluster ID", scrapeProgress{}, 0)
	r.fs.put(progressPath, file("site", progressKind, appendScrapeProgress(nil, saved)))
	r.expectProgress("of this cluster ID", saved, 0)
	r.expect("the pushes", r.drain(noLimits), [][]int{{1}})
}

// Each change of the gaps is written at once, and other progress after progressSaveEvery. In memory
// only, the progress is kept until the spool is closed, and nothing is written.
func TestSpoolProgressWrites(t *testing.T) {
	r := newSpoolRig(t, nil)
	writes := 0
	r.fs.hook = func(_ int, op, name string) fault {
		if op == "rename" && strings.Contains(name, progressName) {
			writes++
		}
		return fault{}
	}
	g, h := gap{10, 20}, gap{30, 40}
	for i, tt := range []struct {
		later time.Duration // time that passes before the progress is saved
		gaps  []gap
		want  int // number of writes
	}{
		{0, nil, 1}, // the first of this process
		{0, nil, 0},
		{progressSaveEvery - time.Millisecond, nil, 0},
		{time.Millisecond, nil, 1},
		{time.Second, []gap{g}, 1},
		{time.Second, []gap{g}, 0},
		{time.Second, []gap{g, h}, 1},
		{time.Second, []gap{{11, 20}, h}, 1},
		{time.Second, []gap{h}, 1},
		{progressSaveEvery - time.Second, []gap{h}, 0}, // a write because of a gap begins the time anew
		{time.Second, []gap{h}, 1},
		{time.Second, nil, 1},
		{time.Hour, nil, 1},
	} {
		writes = 0
		r.later(tt.later)
		p := progressAt(1000+int64(i), tt.gaps...)
		if r.spool.SaveProgress(p); writes != tt.want {
			t.Errorf("save %d, %+v: %d writes", i, tt, writes)
		}
		if got := r.spool.Progress(); !reflect.DeepEqual(got, p) {
			t.Errorf("save %d: the progress is %+v, want %+v", i, got, p)
		}
	}

	m := newSpoolRig(t, func(cfg *SpoolConfig) { cfg.Dir = "" })
	m.spool.SaveProgress(progressAt(1000, g))
	if got := m.spool.Progress(); !reflect.DeepEqual(got, progressAt(1000, g)) || len(m.fs.names()) > 0 || len(m.errs) > 0 {
		t.Errorf("in memory only: the progress is %+v, the files are %q, reported %v; want the progress alone", got, m.fs.names(), m.errs)
	}
}

// While the disk fails, each call tries to write, and the first failure in a row is reported. The spool
// knows the progress meanwhile.
func TestSpoolProgressDiskFails(t *testing.T) {
	for _, op := range []string{"open", "write", "sync", "rename", "syncdir"} {
		r := newSpoolRig(t, nil)
		for round := range 2 {
			path := progressName
			if op == "syncdir" {
				path = "/s"
			}
			tries := 0
			fail := failOn(op, "", 0, errFull)
			r.fs.hook = func(n int, o, name string) fault {
				if !strings.Contains(name, path) {
					return fault{}
				}
				f := fail(n, o, name)
				if f.Err != nil {
					tries++
				}
				return f
			}
			r.errs = nil
			for i := range int64(3) {
				r.spool.SaveProgress(progressAt(1000 + i))
				r.later(progressSaveEvery)
			}
			if len(r.errs) != 1 || !strings.Contains(r.errs[0].Error(), "writing the record of the last scrape: ") || tries < 3 {
				t.Errorf("%s, round %d: %d operations failed, and the spool reported %v; want 3 failures and one report", op, round, tries, r.errs)
			}
			r.fs.hook = nil
			p := progressAt(2000+int64(round), gap{1, 2})
			r.spool.SaveProgress(p) // the gap is the same as before in the second round, but the write is due
			if got := r.spool.Progress(); !reflect.DeepEqual(got, p) || len(r.errs) != 1 {
				t.Errorf("%s, round %d: the progress is %+v, reported %v", op, round, got, r.errs)
			}
			old := r.spool
			r.expectProgress(op+": after the disk works again", p, 0)
			r.spool = old
			r.later(progressSaveEvery)
		}
	}
}

// After a failed write, the next call writes at once, although no gap has changed.
func TestSpoolProgressRetries(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.spool.SaveProgress(progressAt(1000))
	r.fs.hook = failOn("sync", "", 0, errDisk)
	r.spool.SaveProgress(progressAt(2000, gap{1, 2}))
	r.fs.hook = nil
	p := progressAt(3000, gap{1, 2})
	r.spool.SaveProgress(p)
	r.expectProgress("after a failed write and another one", p, 0)
}
