package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// In each run, one disk operation fails, or the process is killed or the power fails during it. The
// next process has each scrape that Add acknowledged and that was not removed. It has the scrapes
// once, in order, and has no scrape that was never added. A failed operation costs a running
// process no acknowledged scrape. A scrape that was sent has the same times whenever it is sent
// again.
func TestSweepSpoolCrashes(t *testing.T) {
	sweep(t)
	synctest.Test(t, func(t *testing.T) {
		var scrapes []Scrape // made once for all runs, because compressing takes most of the time
		for r, n := newSpoolRig(t, nil), 0; n <= spoolCrashSteps; n++ {
			scrapes = append(scrapes, r.scrape(n, 3))
			r.later(time.Minute)
		}
		for seed := range testSeeds(t, 8) {
			for at, reached := 0, true; reached; at++ {
				for _, mode := range []string{"error", "kill", "power"} {
					c := newSpoolCrash(t, seed, at, mode)
					rnd := rand.New(rand.NewPCG(seed, 7))
					for range spoolCrashSteps {
						c.step(rnd, scrapes)
					}
					if reached = c.reached; !reached {
						break // the steps have no operation with the number at, so all operations have been tried
					}
					if mode == "error" {
						c.checkRunning()
					} else {
						c.checkNextProcess()
					}
					if c.fs.open != 0 {
						t.Errorf("%d files were left open", c.fs.open)
					}
					if t.Failed() {
						t.Fatalf("at operation %d, mode %s", at, mode)
					}
				}
			}
		}
	})
}

const spoolCrashSteps = 12

// spoolCrash is a spool in which one disk operation goes wrong. It records which scrapes were
// added, sent and removed.
type spoolCrash struct {
	*spoolRig
	mode    string           // how the operation goes wrong: "error", "kill" or "power"; see newSpoolCrash
	reached bool             // the operation that goes wrong has taken place
	id      uint64           // ID of the spool
	shift   int64            // ms; shift of the last corrected scrape; each correction uses a new shift
	sent    map[uint64]int64 // shift in ms of each scrape that was sent, by the scrape's number

	// The keys of the maps below are the values of n that spoolRig.scrape was called with. added is
	// the last n that was added.
	added              int
	acked, maybe, gone map[int]bool // scrapes that Add acknowledged, scrapes given to Add, and scrapes removed from the spool
}

// newSpoolCrash returns a spool whose disk operation number at goes wrong. In mode "error" the
// operation fails. In mode "kill" the process is killed during it. Mode "power" is like "kill", but
// checkNextProcess then also discards everything that was not synced.
func newSpoolCrash(t *testing.T, seed uint64, at int, mode string) *spoolCrash {
	c := &spoolCrash{mode: mode, sent: map[uint64]int64{}, acked: map[int]bool{}, maybe: map[int]bool{}, gone: map[int]bool{}}
	c.spoolRig = newSpoolRig(t, func(cfg *SpoolConfig) {
		cfg.CorrectTimes = func(sc Scrape) Scrape {
			c.shift++
			sc.Corrected, sc.Shift = true, c.shift
			return sc
		}
	})
	c.id = c.spool.ID()
	c.fs.rng = rand.New(rand.NewPCG(seed, uint64(at)))
	c.fs.hook = func(n int, _, _ string) fault {
		if n != at {
			return fault{}
		}
		c.reached = true
		if mode == "error" {
			return fault{Err: errFull}
		}
		return fault{Kill: true}
	}
	return c
}

// noteSent records that scrapes were sent, and checks that a scrape sent before has the same times.
func (c *spoolCrash) noteSent(scrapes []Scrape) {
	for _, sc := range scrapes {
		if old, ok := c.sent[sc.Number]; ok && old != sc.Shift {
			c.t.Errorf("scrape %d was sent with times shifted by %d ms, and then by %d ms", sc.Number, old, sc.Shift)
		}
		if !c.fs.killed {
			c.sent[sc.Number] = sc.Shift
		}
	}
}

// step makes one random step: it adds a scrape, pushes scrapes that consumers then read or that the
// server loses, or sets a scrape aside. After the process is killed, no scrape can be read from
// disk, so no acknowledged scrape is removed any more.
func (c *spoolCrash) step(rnd *rand.Rand, scrapes []Scrape) {
	switch rnd.IntN(6) {
	case 0, 1, 2:
		c.added++
		c.maybe[c.added] = true
		if c.spool.Add(scrapes[c.added]) == nil {
			c.acked[c.added] = true
		}
		c.later(time.Minute)
	case 3: // push scrapes, all of which every consumer then reads
		got, _ := c.spool.BeginPush(PushLimits{1 << 30, 1 << 30, 2})
		c.noteSent(got)
		for _, k := range numbers(c.t, got) {
			c.gone[k] = true
		}
		var read Ranges
		for _, sc := range got {
			read = read.Add(sc.Number, sc.Number)
		}
		// The answer lists changing consumers, so that ApplyAnswer also writes the spool's record.
		c.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Read: read, Consumers: []ConsumerAge{{uint64(c.added), 0}}})
	case 4:
		if got, _ := c.spool.BeginPush(PushLimits{1, 1, 1}); len(got) > 0 {
			c.gone[numbers(c.t, got)[0]] = true
			c.spool.SetInFlightAside()
		}
	case 5: // push scrapes, which the server loses
		got, _ := c.spool.BeginPush(PushLimits{1 << 30, 1 << 30, 3})
		c.noteSent(got)
		c.spool.MarkPushFailed(false)
		c.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true})
	}
}

// checkRunning checks a process that runs on after a failed disk operation. Its spool must have
// each scrape that Add acknowledged and that was not removed, must have no removed scrape, and must
// not have dropped any scrape.
func (c *spoolCrash) checkRunning() {
	for _, k := range slices.Concat(c.drain(noLimits)...) {
		c.acked[k] = false
		if c.gone[k] {
			c.t.Errorf("scrape %d was removed, but is returned again", k)
		}
	}
	for k := range c.maybe {
		if c.acked[k] && !c.gone[k] {
			c.t.Errorf("scrape %d is missing", k)
		}
	}
	if c.dropCalls > 0 {
		c.t.Errorf("dropped %v, want nothing", c.droppedSamples)
	}
}

// checkNextProcess starts the next process and checks which scrapes its spool has. It starts three
// processes one after another, with a power failure before each of the last two, because scrapes
// that survived once must survive again.
func (c *spoolCrash) checkNextProcess() {
	c.fs.restart()
	if c.mode == "power" {
		c.fs.crash()
	}
	c.errs = nil
	c.open()
	for range 2 {
		c.fs.crash()
		c.open()
	}
	all := c.nextPush(noLimits)
	c.noteSent(all)
	got := numbers(c.t, all)
	if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) {
		c.t.Errorf("the scrapes %v are out of order, or one is returned twice", got)
	}
	for _, k := range got {
		if !c.maybe[k] {
			c.t.Errorf("scrape %d was never added", k)
		}
		delete(c.acked, k)
	}
	for k := range c.acked {
		if !c.gone[k] {
			c.t.Errorf("scrape %d is lost", k)
		}
	}
	if len(c.errs) > 0 || c.spool.ID() != c.id {
		c.t.Errorf("opening reported %v, and the ID is %x; want no error and the ID %x", c.errs, c.spool.ID(), c.id)
	}
}

// OpenSpool succeeds even if a scrape file is damaged. At whatever byte the file is cut off or
// changed, it is set aside, reported to OnError and never sent. Because nobody knows how many
// samples it had, it is counted as one dropped sample. The other scrapes are sent.
func TestSpoolDamage(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1, 2, 3)
	path := r.files()[1]
	good := r.fs.entries[path].data
	damage := func(what string, data []byte, wantCopy bool) {
		r.errs, r.droppedSamples = nil, map[string]int{}
		for _, name := range r.files() {
			if strings.Contains(name, spoolDamaged) {
				r.fs.Remove(name)
			}
		}
		r.fs.put(path, data)
		r.open()
		r.expect(what+": the next push", numbers(t, r.nextPush(noLimits)), []int{1, 3})
		hasCopy := false
		for _, name := range r.files() {
			if strings.HasPrefix(name, path+"."+spoolDamaged) {
				hasCopy = hasCopy || bytes.Equal(r.fs.entries[name].data, data)
			}
			if name == path {
				t.Errorf("%s: the file is still in its place", what)
			}
		}
		if len(r.errs) != 1 || wantCopy && !hasCopy {
			t.Errorf("%s: reported %v, want one error; file set aside: %v", what, r.errs, hasCopy)
		}
		r.expect(what+": dropped samples", r.droppedSamples, map[string]int{DropSpoolDamaged: 1})
	}
	for i := range good {
		damage(fmt.Sprint("cut at ", i), good[:i], false) // the file that is set aside may be shorter than the cut file, so an exact copy is not required
		flipped := bytes.Clone(good)
		flipped[i] ^= 0x40
		damage(fmt.Sprint("flipped at ", i), flipped, true)
	}
}

// If the checksum of a scrape file is valid, but its sample count, size or gzip is wrong, the
// scrape is dropped and counted as damaged.
func TestSpoolInconsistentFile(t *testing.T) {
	for what, change := range map[string]func(sc *Scrape){
		"wrong number of samples": func(sc *Scrape) { sc.Samples = 2 },
		"wrong size":              func(sc *Scrape) { sc.Size-- },
		"truncated gzip":          func(sc *Scrape) { sc.Gzip = sc.Gzip[:len(sc.Gzip)-1] },
	} {
		r := newSpoolRig(t, nil)
		r.mustAdd(1, 2, 3)
		sc := r.scrape(2, 3)
		change(&sc)
		r.fs.put(r.files()[1], AppendRecord(appendLogHeader(nil, []byte("site")), scrapeKind, appendScrapePayload(nil, &sc)))
		r.open()
		r.expect(what+": the next push", numbers(t, r.nextPush(noLimits)), []int{1, 3})
		if len(r.errs) != 1 || r.droppedSamples[DropSpoolDamaged] != sc.Samples {
			t.Errorf("%s: reported %v and dropped %v, want one error and %d samples", what, r.errs, r.droppedSamples, sc.Samples)
		}
	}
}

// OpenSpool retries a read that fails for a moment. The spool then has all scrapes. If a read keeps
// failing, OpenSpool returns an error that names the file, and all files stay unchanged.
func TestSpoolOpenFails(t *testing.T) {
	for _, tt := range []struct{ op, path string }{{"read", "/s/0000000000000002.log"}, {"readdir", "/s"}} {
		for _, f := range readFaults {
			synctest.Test(t, func(t *testing.T) {
				r := newSpoolRig(t, nil)
				r.mustAdd(1, 2, 3)
				before := r.fs.contents()
				r.fs.hook = f.hook(tt.op, tt.path)
				if f.n == 0 {
					_, err := OpenSpool(r.cfg)
					if text := fmt.Sprint(err); !errors.Is(err, f.err) || !strings.HasPrefix(text, "opening spool: ") || !strings.Contains(text, tt.path+": ") {
						t.Errorf("%v, %v: got the error %v, want %v and the path", tt, f, err, f.err)
					}
					r.fs.hook = nil
				}
				r.open()
				if !maps.Equal(r.fs.contents(), before) || len(r.errs) > 0 || r.dropCalls > 0 {
					t.Errorf("%v, %v: the files changed to %q, or errors %v or drops %v were reported", tt, f, r.files(), r.errs, r.droppedSamples)
				}
				r.expect("the pushes", r.drain(noLimits), [][]int{{1, 2, 3}})
			})
		}
	}
}

// The file of a scrape that servers refuse is set aside, and only the newest maxAsideFiles such
// files are kept. If an operator gives such a file its old name back, the next process sends its
// scrape before newer scrapes. The number of the file is not used for another scrape.
func TestSpoolSetsAside(t *testing.T) {
	r := newSpoolRig(t, nil)
	for n := range 20 {
		r.mustAdd(n)
		r.nextPush(noLimits)
		r.spool.SetInFlightAside()
	}
	r.mustAdd(20)
	names := r.files()
	if len(names) != maxAsideFiles+1 || names[0] != "/s/0000000000000005.log.refused" || r.spool.Stats().Scrapes != 1 {
		t.Errorf("got the files %v, want the newest %d set aside and one scrape", names, maxAsideFiles)
	}
	if err := r.fs.Rename(names[3], strings.TrimSuffix(names[3], "."+spoolRefused)); err != nil {
		t.Fatal(err)
	}
	r.open()
	r.expect("the pushes after a file is renamed back", r.drain(noLimits), [][]int{{7, 20}})
	r.mustAdd(21)
	if names := r.files(); names[len(names)-1] != "/s/0000000000000022.log" {
		t.Errorf("got the files %v, want number 22 last", names)
	}
}

// OpenSpool refuses a directory with scrapes of another cluster ID. The error has that cluster ID
// and advises another --spool-dir. OpenSpool accepts a directory that has no scrapes any more.
func TestSpoolOfAnotherCluster(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1)
	r.cfg.ClusterID = "other"
	if _, err := OpenSpool(r.cfg); err == nil || !strings.Contains(err.Error(), `"site"`) || !strings.Contains(err.Error(), "--spool-dir") {
		t.Errorf("got the error %v, want one with the cluster ID and --spool-dir", err)
	}
	r.cfg.ClusterID = "site"
	r.open()
	r.drain(noLimits)
	r.cfg.ClusterID = "other"
	r.open() // fails the test if the empty directory is refused
}

// A file of another version makes OpenSpool fail with both versions in the error. All files stay
// unchanged.
func TestSpoolOfAnotherVersion(t *testing.T) {
	for name, want := range map[string]string{
		scrapeFileName(1): "/s/" + scrapeFileName(1) + " has a record of version 9; this program knows version 3",
		spoolMetaName:     "/s/" + spoolMetaName + " has a record of version 9; this program knows version 1",
	} {
		r := newSpoolRig(t, nil)
		r.mustAdd(1)
		r.fs.put("/s/"+name, AppendRecord(appendLogHeader(nil, []byte("site")), 9, []byte("a payload of version 9")))
		before := r.fs.contents()
		if _, err := OpenSpool(r.cfg); err == nil || !strings.HasPrefix(err.Error(), "opening spool: "+want) {
			t.Errorf("%s: got the error %v, want it to begin with %q", name, err, "opening spool: "+want)
		}
		if !maps.Equal(r.fs.contents(), before) || len(r.errs) > 0 || r.dropCalls > 0 {
			t.Errorf("%s: the files changed to %q, or errors %v or drops %v were reported", name, r.fs.names(), r.errs, r.droppedSamples)
		}
	}
}

// A spool on a real disk makes its directory, locks it, keeps its scrapes across a restart, and
// removes its own unfinished writes but no other files.
func TestSpoolOnDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "spool")
	r := newSpoolRig(t, func(c *SpoolConfig) { c.FS, c.Dir = DiskFS{}, dir })
	r.mustAdd(1, 2)
	if _, err := OpenSpool(r.cfg); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("opening the spool a second time: got the error %v, want that it is in use", err)
	}
	if err := r.spool.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"0000000000000009.log.tmp", "0000000000000002.log.damaged.tmp", "notes.txt", "1.log", "x.log.tmp"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.open()
	r.expect("the pushes after a restart", r.drain(noLimits), [][]int{{1, 2}})
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	r.expect("the files that are left", names, []string{"1.log", "lock", "notes.txt", "spool.log", "x.log.tmp"})
	if err := r.spool.Close(); err != nil || len(r.errs) > 0 {
		t.Errorf("closing: got the error %v; reported %v", err, r.errs)
	}
}

// spoolWithRecord returns a rig whose spool has scrape 1 and one consumer, and the ID of the spool.
func spoolWithRecord(t *testing.T) (r *spoolRig, id uint64) {
	r = newSpoolRig(t, nil)
	r.mustAdd(1)
	r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Consumers: []ConsumerAge{{7, time.Minute}}})
	return r, r.spool.ID()
}

// The spool keeps its ID and its consumers across a restart. Other files whose names begin with the
// name of the record's file are ignored.
func TestSpoolRecord(t *testing.T) {
	r, id := spoolWithRecord(t)
	for _, name := range []string{"spool.log.tmp", "spool.log.damaged", "spool.log.damaged-2", "spool.log.refused"} {
		r.fs.put("/s/"+name, []byte("x"))
	}
	r.open()
	if r.spool.ID() != id || id == 0 || len(r.spool.Consumers()) != 1 || len(r.errs) > 0 {
		t.Errorf("got the ID %x and the consumers %v; reported %v; want the ID %x, one consumer and no error", r.spool.ID(), r.spool.Consumers(), r.errs, id)
	}
}

// A spool whose record is damaged gets a new ID, which it keeps from then on, and forgets its
// consumers. The scrapes stay in the spool.
func TestSpoolDamagedRecord(t *testing.T) {
	r, id := spoolWithRecord(t)
	good := r.fs.entries["/s/"+spoolMetaName].data
	for i := range good {
		for what, data := range map[string][]byte{"cut": good[:i], "flipped": bytes.Clone(good)} {
			if what == "flipped" {
				data[i] ^= 0x40
			}
			r.fs.put("/s/"+spoolMetaName, data)
			r.errs = nil
			r.open()
			if r.spool.ID() == id || r.spool.ID() == 0 || len(r.spool.Consumers()) > 0 || len(r.errs) == 0 {
				t.Errorf("%s at %d: got the ID %x and the consumers %v; reported %v; want a new ID, no consumer and an error", what, i, r.spool.ID(), r.spool.Consumers(), r.errs)
			}
			again := r.spool.ID()
			if r.open(); r.spool.ID() != again {
				t.Errorf("%s at %d: the new ID %x was replaced by %x at the next start", what, i, again, r.spool.ID())
			}
		}
	}
	r.expect("the pushes", r.drain(noLimits), [][]int{{1}})
}

// A spool whose record is missing gets a new ID. OpenSpool reports the missing record only if the
// spool has scrapes.
func TestSpoolMissingRecord(t *testing.T) {
	for _, empty := range []bool{false, true} {
		r, id := spoolWithRecord(t)
		if empty {
			r.drain(noLimits)
		}
		r.fs.Remove("/s/" + spoolMetaName)
		if r.open(); r.spool.ID() == id || (len(r.errs) == 0) != empty {
			t.Errorf("empty spool %v: got the ID %x after %x; reported %v", empty, r.spool.ID(), id, r.errs)
		}
	}
}

// An empty spool can be used for another cluster ID. The spool then gets a new spool ID and does
// not use the consumers in the old record.
func TestSpoolRecordOfAnotherCluster(t *testing.T) {
	r, id := spoolWithRecord(t)
	r.drain(noLimits)
	r.cfg.ClusterID = "other"
	if r.open(); r.spool.ID() == id || len(r.spool.Consumers()) > 0 || len(r.errs) > 0 {
		t.Errorf("got the ID %x after %x and the consumers %v; reported %v; want a new ID, no consumer and no error", r.spool.ID(), id, r.spool.Consumers(), r.errs)
	}
}

// The spool writes its record when its ID or the set of its consumers changes. It also writes the
// record when the time of a consumer's newest scrape has moved by more than consumerLag since the
// last write.
func TestSpoolRecordWrites(t *testing.T) {
	r := newSpoolRig(t, nil)
	writes := 0
	r.fs.hook = func(_ int, op, name string) fault {
		if op == "rename" && strings.Contains(name, spoolMetaName) {
			writes++
		}
		return fault{}
	}
	for _, tt := range []struct {
		later time.Duration // time that passes before the server's answer
		told  []ConsumerAge // the consumers that the answer lists
		want  int           // wanted number of writes of the record
	}{
		{0, nil, 0},
		{0, []ConsumerAge{{1, 0}}, 1},
		{time.Minute, []ConsumerAge{{1, 0}}, 0},
		{58 * time.Minute, []ConsumerAge{{1, 0}}, 0},
		{2 * time.Minute, []ConsumerAge{{1, 0}}, 1},
		{3 * time.Hour, nil, 0}, // the answer reports no newer scrape of consumer 1, so there is nothing to write
		{0, []ConsumerAge{{1, 3 * time.Hour}, {2, 0}}, 1},
		{25 * time.Hour, nil, 1},
	} {
		writes = 0
		r.later(tt.later)
		r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Consumers: tt.told})
		if writes != tt.want {
			t.Errorf("%+v: the record was written %d times", tt, writes)
		}
	}
}
