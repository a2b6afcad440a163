package main

import (
	"bytes"
	"encoding/json"
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

// spoolRig is a spool on a crashFS, with clocks that a test sets and notes of what
// the spool told.
type spoolRig struct {
	t              *testing.T
	fs             *crashFS
	cfg            SpoolConfig
	spool          *Spool
	now            Moment
	errs           []error
	droppedSamples map[string]int // samples
	dropCalls      int            // occasions
}

func newSpoolRig(t *testing.T, change func(*SpoolConfig)) *spoolRig {
	r := &spoolRig{t: t, fs: newCrashFS(1, "/s"), now: Moment{Wall: 1, Boot: 5_000_000, BootID: "boot-1"}, droppedSamples: map[string]int{}}
	r.cfg = SpoolConfig{FS: r.fs, Dir: "/s", ClusterID: "site", Limit: 1 << 30, MaxAge: 2 * time.Hour}
	if change != nil {
		change(&r.cfg)
	}
	r.cfg.Now = func() Moment { return r.now }
	r.cfg.OnError = func(err error) { r.errs = append(r.errs, err) }
	r.cfg.OnDrop = func(reason string, _, samples int) { r.droppedSamples[reason] += samples; r.dropCalls++ }
	r.open()
	return r
}

func (r *spoolRig) open() {
	r.t.Helper()
	s, err := OpenSpool(r.cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.spool = s
}

func (r *spoolRig) later(d time.Duration) {
	r.now.Wall += d.Milliseconds()
	r.now.Boot += d.Milliseconds()
}

func (r *spoolRig) files() []string { return spoolFiles(r.fs) }

// spoolFiles returns the names of all files but the spool's record.
func spoolFiles(c *crashFS) []string {
	return slices.DeleteFunc(c.names(), func(name string) bool { return name == "/s/"+spoolMetaName })
}

// scrape returns one that says n, of lines samples.
func (r *spoolRig) scrape(n, lines int) Scrape {
	var text []byte
	for i := range lines {
		text = fmt.Appendf(text, "s{n=\"%d\",i=\"%d\"} 1 %d\n", n, i, r.now.Wall)
	}
	return Scrape{At: r.now, SourceTime: r.now.Wall + 77, Samples: lines, Size: len(text), Gzip: Gzip(text)}
}

func (r *spoolRig) add(n int) error { return r.spool.Add(r.scrape(n, 3)) }

func (r *spoolRig) mustAdd(ns ...int) {
	r.t.Helper()
	for _, n := range ns {
		if err := r.add(n); err != nil {
			r.t.Fatal(err)
		}
	}
}

var noLimits = PushLimits{Bytes: 1 << 40, Text: 1 << 40, Scrapes: 1 << 30}

// numbers tells which scrapes these are, by their text.
func numbers(t *testing.T, scrapes []Scrape) (ns []int) {
	t.Helper()
	for _, sc := range scrapes {
		var d Decompressor
		text, _, err := d.Decompress(sc.Gzip, "gzip", 1<<20)
		if err != nil || len(text) != sc.Size || bytes.Count(text, []byte("\n")) != sc.Samples {
			t.Errorf("a scrape of %d samples, %d bytes has the text %q, %v", sc.Samples, sc.Size, text, err)
		}
		n := -1
		fmt.Sscanf(string(text), "s{n=\"%d\"", &n)
		ns = append(ns, n)
	}
	return ns
}

// nextPush returns the scrapes of the next push; the spool can be read.
func (r *spoolRig) nextPush(l PushLimits) []Scrape {
	r.t.Helper()
	if step, _ := r.spool.NextStep(); step == StepAsk {
		r.spool.ApplyAnswer(SpoolAnswer{})
	}
	got, err := r.spool.BeginPush(l)
	if err != nil {
		r.t.Fatal(err)
	}
	return got
}

// drain returns all scrapes, one push after the other.
func (r *spoolRig) drain(l PushLimits) (pushes [][]int) {
	r.t.Helper()
	for {
		got := r.nextPush(l)
		if len(got) == 0 {
			return pushes
		}
		pushes = append(pushes, numbers(r.t, got))
		r.spool.ApplyAnswer(SpoolAnswer{})
	}
}

func (r *spoolRig) expect(what string, got any, want any) {
	r.t.Helper()
	g, _ := json.Marshal(got)
	w, _ := json.Marshal(want)
	if !bytes.Equal(g, w) {
		r.t.Errorf("%s: got %s, want %s", what, g, w)
	}
}

func TestSpoolRestart(t *testing.T) {
	r := newSpoolRig(t, nil)
	first := r.scrape(1, 3)
	r.mustAdd(1, 2, 3)
	r.expect("one by one", numbers(t, r.nextPush(PushLimits{1, 1, 1})), []int{1})
	r.spool.ApplyAnswer(SpoolAnswer{})
	r.expect("again until removed", numbers(t, r.nextPush(noLimits)), []int{2, 3})
	r.fs.crash()
	r.open()
	r.mustAdd(4)
	got := r.nextPush(noLimits)
	r.expect("after a crash", numbers(t, got), []int{2, 3, 4})
	if got[0].At != first.At || got[0].SourceTime != first.SourceTime || got[0].Samples != 3 {
		t.Errorf("clocks or counts changed: %+v", got[0])
	}
	r.spool.ApplyAnswer(SpoolAnswer{})
	r.expect("at the end", r.files(), []string{})
	if st := r.spool.Stats(); st != (SpoolStats{}) || len(r.errs) > 0 || r.dropCalls > 0 {
		t.Errorf("left: %+v, errors %v, drops %v", st, r.errs, r.droppedSamples)
	}
}

// Whatever operation fails, or the process is killed in, or the power goes in:
// what Add acknowledged and nobody removed is returned once by the spool that
// is opened next, whole and in order, and nothing else but what Add was given.
func TestSweepSpoolCrashes(t *testing.T) {
	sweep(t)
	synctest.Test(t, crashSpoolAnywhere)
}

func crashSpoolAnywhere(t *testing.T) {
	const steps = 12
	var made []Scrape // once: compressing is what takes time
	for r, n := newSpoolRig(t, nil), 0; n <= steps; n++ {
		made = append(made, r.scrape(n, 3))
		r.later(time.Minute)
	}
	for seed := range uint64(8) {
		for at, reached := 0, true; reached; at++ {
			for _, mode := range []string{"error", "kill", "power"} {
				// Each shift differs, and must not differ again for a scrape that was sent.
				shift := int64(0)
				r := newSpoolRig(t, func(c *SpoolConfig) {
					c.CorrectTimes = func(sc Scrape) Scrape {
						shift++
						sc.Corrected, sc.Shift = true, shift
						return sc
					}
				})
				sent := map[uint64]int64{}
				send := func(scrapes []Scrape) {
					for _, sc := range scrapes {
						if old, ok := sent[sc.Number]; ok && old != sc.Shift {
							t.Errorf("%d is sent with times shifted by %d, then by %d", sc.Number, old, sc.Shift)
						}
						if !r.fs.killed {
							sent[sc.Number] = sc.Shift
						}
					}
				}
				r.fs.rng = rand.New(rand.NewPCG(seed, uint64(at)))
				rnd := rand.New(rand.NewPCG(seed, 7))
				reached = false
				r.fs.hook = func(n int, _, _ string) fault {
					if n != at {
						return fault{}
					}
					reached = true
					return map[string]fault{"error": {Err: errFull}, "kill": {Kill: true}, "power": {Kill: true}}[mode]
				}
				id := r.spool.ID()
				acked, maybe, gone := map[int]bool{}, map[int]bool{}, map[int]bool{}
				n := 0
				for range steps {
					switch rnd.IntN(6) {
					case 5: // the server loses it
						got, _ := r.spool.BeginPush(PushLimits{1 << 30, 1 << 30, 3})
						send(got)
						r.spool.MarkPushFailed(false)
						r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true})
					case 0, 1, 2:
						n++
						maybe[n] = true
						if r.spool.Add(made[n]) == nil {
							acked[n] = true
						}
						r.later(time.Minute)
					case 3:
						got, _ := r.spool.BeginPush(PushLimits{1 << 30, 1 << 30, 2}) // a killed process reads nothing
						send(got)
						for _, k := range numbers(t, got) {
							gone[k] = true
						}
						// An answer with a list of consumers that changes: the record is written.
						var read Ranges
						for _, sc := range got {
							read = read.Add(sc.Number, sc.Number)
						}
						r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Read: read, Consumers: []ConsumerAge{{uint64(n), 0}}})
					case 4:
						if got, _ := r.spool.BeginPush(PushLimits{1, 1, 1}); len(got) > 0 {
							gone[numbers(t, got)[0]] = true
							r.spool.SetInFlightAside()
						}
					}
				}
				if mode == "error" {
					// A failed operation costs a running process nothing at all.
					if !reached {
						break
					}
					for _, k := range slices.Concat(r.drain(noLimits)...) {
						acked[k] = false
						if gone[k] {
							t.Errorf("%d is returned again", k)
						}
					}
					for k := range maybe {
						if acked[k] && !gone[k] {
							t.Errorf("%d is missing", k)
						}
					}
					if r.dropCalls > 0 {
						t.Errorf("%v counted as dropped", r.droppedSamples)
					}
				} else {
					r.fs.restart()
					if mode == "power" {
						r.fs.crash()
					}
					r.errs = nil
					r.open()
					for range 2 { // what survived once survives again
						r.fs.crash()
						r.open()
					}
					all := r.nextPush(noLimits)
					send(all)
					got := numbers(t, all)
					if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) {
						t.Errorf("out of order, or twice: %v", got)
					}
					for _, k := range got {
						if !maybe[k] {
							t.Errorf("%d was never added", k)
						}
						delete(acked, k)
					}
					for k := range acked {
						if !gone[k] {
							t.Errorf("%d is lost", k)
						}
					}
					if len(r.errs) > 0 || r.spool.ID() != id {
						t.Errorf("opening complains of %v, the ID is %x after %x", r.errs, r.spool.ID(), id)
					}
				}
				if r.fs.open != 0 {
					t.Errorf("%d files left open", r.fs.open)
				}
				if t.Failed() {
					t.Fatalf("seed %d, operation %d, mode %s", seed, at, mode)
				}
			}
		}
	}
}

func TestSpoolDiskFull(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1)
	r.fs.hook = failOn("write", "", 0, errFull)
	for _, n := range []int{2, 3} {
		if err := r.add(n); !errors.Is(err, errFull) {
			t.Errorf("got %v, want that the disk is full", err)
		}
	}
	r.fs.hook = nil
	if st := r.spool.Stats(); st.Scrapes != 3 || st.InMemory != 2 {
		t.Errorf("got %+v", st)
	}
	r.expect("in order, from disk and memory", numbers(t, r.nextPush(noLimits)), []int{1, 2, 3})
	r.spool.ReleaseInFlight()
	if err := r.spool.Close(); err != nil {
		t.Error(err)
	}
	r.fs.crash()
	r.open()
	r.expect("Close wrote what was in memory", r.drain(noLimits), [][]int{{1, 2, 3}})

	// Memory is bounded while the disk is full: the oldest of it go.
	r = newSpoolRig(t, nil)
	r.mustAdd(1)
	r.fs.hook = failOn("open", spoolTemp, 0, errFull)
	big := r.scrape(0, 1)
	big.Gzip = append(big.Gzip, make([]byte, 3<<20)...) // nobody looks into it here
	for range 8 {
		if err := r.spool.Add(big); err == nil {
			t.Error("no error")
		}
	}
	fit := maxSpoolMemory / (len(big.Gzip) + entryOverhead)
	if st := r.spool.Stats(); st.InMemory != fit || st.Scrapes != 1+fit || r.droppedSamples[DropSpoolFull] != 8-fit {
		t.Errorf("got %+v, dropped %v, want %d in memory", st, r.droppedSamples, fit)
	}
	if err := r.spool.Close(); !errors.Is(err, errFull) || r.droppedSamples[DropSpoolClosed] != fit {
		t.Errorf("closing: %v, dropped %v", err, r.droppedSamples)
	}
}

// When the disk works again, what was held in memory meanwhile is written: some of it
// with each scrape, and never at the cost of what is newer. What a server gets in the
// middle of that is not left behind.
func TestSpoolWritesBack(t *testing.T) {
	r := newSpoolRig(t, nil)
	n := 0
	fail := func(scrapes int) {
		r.fs.hook = failOn("write", "", 0, errFull)
		for range scrapes {
			if n++; r.add(n) == nil {
				t.Error("no error")
			}
		}
		r.fs.hook = nil
	}
	inMemory := func(want int) {
		t.Helper()
		if st := r.spool.Stats(); st.InMemory != want || st.Scrapes != n {
			t.Errorf("%+v, want %d in memory of %d", st, want, n)
		}
	}
	fail(maxFlush + 2)
	inMemory(n)
	for _, left := range []int{2, 0} {
		n++
		r.mustAdd(n)
		inMemory(left)
	}
	var want []int
	for i := range n {
		want = append(want, i+1)
	}
	r.fs.crash()
	r.open()
	r.expect("after a crash", r.drain(noLimits), [][]int{want})
	if st := r.spool.Stats(); st.Bytes != 0 {
		t.Errorf("accounts: %+v", st)
	}

	r = newSpoolRig(t, func(c *SpoolConfig) { c.Limit = 2 * fileBlock })
	n = 0
	fail(2)
	n++
	r.mustAdd(n)
	inMemory(1) // no room on disk for another
	r.expect("all", r.drain(noLimits), [][]int{{1, 2, 3}})

	r = newSpoolRig(t, nil)
	n = 0
	fail(1)
	gone := 0
	r.fs.hook = func(_ int, op, path string) fault {
		if op == "rename" && strings.Contains(path, scrapeFileName(1)) && gone == 0 {
			r.nextPush(PushLimits{1, 1, 1})
			gone = len(r.spool.removeFromIndex((*spoolEntry).isInFlight)) // as Remove does, which has then removed no file
		}
		return fault{}
	}
	r.mustAdd(2)
	r.fs.hook = nil
	if gone != 1 {
		t.Fatal("nothing was written back")
	}
	r.fs.crash()
	r.open()
	r.expect("what went meanwhile does not come back", r.drain(noLimits), [][]int{{2}})
}

func TestSpoolInMemory(t *testing.T) {
	r := newSpoolRig(t, func(c *SpoolConfig) { c.Dir = ""; c.Limit = 750 })
	r.mustAdd(1, 2, 3, 4)
	if len(r.files()) > 0 || r.droppedSamples[DropSpoolFull] != 6 {
		t.Errorf("files %v, dropped %v", r.files(), r.droppedSamples)
	}
	r.nextPush(PushLimits{1, 1, 1})
	r.spool.SetInFlightAside()
	r.expect("kept", r.drain(noLimits), [][]int{{4}})
}

func TestSpoolLimit(t *testing.T) {
	r := newSpoolRig(t, func(c *SpoolConfig) { c.Limit = 3*fileBlock + 100 })
	r.mustAdd(1, 2, 3)
	r.nextPush(PushLimits{1, 1, 1}) // the first is on its way: it is not dropped
	r.mustAdd(4, 5)
	if r.droppedSamples[DropSpoolFull] != 6 || r.dropCalls != 2 {
		t.Errorf("dropped %v in %d calls", r.droppedSamples, r.dropCalls)
	}
	r.spool.ReleaseInFlight()
	if st := r.spool.Stats(); st.Scrapes != 3 || st.Bytes != 3*fileBlock || len(r.files()) != 3 {
		t.Errorf("%+v, files %v", st, r.files())
	}
	r.expect("kept", r.drain(noLimits), [][]int{{1, 4, 5}})
	r.cfg.Limit = fileBlock - 1
	r.open()
	r.mustAdd(6)
	if r.droppedSamples[DropSpoolFull] != 9 || r.spool.Stats().Scrapes != 0 {
		t.Errorf("what can never fit: dropped %v", r.droppedSamples)
	}
}

func TestSpoolAge(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1, 2)
	r.later(time.Hour)
	r.mustAdd(3)
	r.later(time.Hour)
	if got := r.spool.Stats().ByState[ScrapeUndelivered].OldestAge; got != 2*time.Hour {
		t.Errorf("the oldest is %v old", got)
	}
	// A wall clock that is stepped says nothing about age.
	r.now.Wall += 1e12
	r.expect("at the limit", numbers(t, r.nextPush(noLimits)), []int{1, 2, 3})
	r.now.Wall -= 1e12
	r.spool.ReleaseInFlight()
	r.later(time.Second)
	r.mustAdd(4)
	if r.droppedSamples[DropSpoolOld] != 6 || r.dropCalls != 1 || len(r.files()) != 2 {
		t.Errorf("dropped %v in %d calls, files %v", r.droppedSamples, r.dropCalls, r.files())
	}
	// After a reboot age is the wall clock's.
	r.now.BootID, r.now.Boot, r.now.Wall = "boot-2", 10, r.now.Wall+90*60_000
	r.open()
	r.expect("after a reboot", r.drain(noLimits), [][]int{{4}})
}

func TestMomentSince(t *testing.T) {
	then := Moment{Wall: 1000_000, Boot: 500_000, BootID: "a"}
	for _, tt := range []struct {
		now  Moment
		want time.Duration
	}{
		{Moment{1060_000, 560_000, "a"}, time.Minute},
		{Moment{9999_000, 560_000, "a"}, time.Minute},
		{Moment{0, 560_000, "a"}, time.Minute},
		{Moment{1090_000, 560_000, "b"}, 90 * time.Second},
		{Moment{900_000, 560_000, "b"}, 0},
		{Moment{1090_000, 5, "a"}, 90 * time.Second}, // the clock began anew, whatever its ID says
	} {
		if got := tt.now.Since(then); got != tt.want {
			t.Errorf("%+v: %v, want %v", tt.now, got, tt.want)
		}
	}
}

// One push takes the scrapes that are within the limits, whatever the clocks did.
func TestSpoolGroups(t *testing.T) {
	r := newSpoolRig(t, nil)
	one := r.scrape(0, 3)
	for _, tt := range []struct {
		name   string
		limits PushLimits
		change func(i int, sc *Scrape)
		want   [][]int
	}{
		{"all", noLimits, nil, [][]int{{0, 1, 2, 3, 4, 5}}},
		{"scrapes", PushLimits{1 << 30, 1 << 30, 4}, nil, [][]int{{0, 1, 2, 3}, {4, 5}}},
		{"compressed", PushLimits{int64(2*len(one.Gzip) + 9), 1 << 30, 99}, nil, [][]int{{0, 1}, {2, 3}, {4, 5}}},
		{"text", PushLimits{1 << 30, int64(3 * one.Size), 99}, nil, [][]int{{0, 1, 2}, {3, 4, 5}}},
		{"one at least", PushLimits{1, 1, 0}, nil, [][]int{{0}, {1}, {2}, {3}, {4}, {5}}},
		{"reboots, and clocks that are stepped", noLimits, func(i int, sc *Scrape) {
			sc.At.BootID = fmt.Sprint("boot-", i)
			sc.SourceTime += int64(i%2) * 1e9
			sc.At.Wall += int64(i) * 1e6
		}, [][]int{{0, 1, 2, 3, 4, 5}}},
	} {
		for i := range 6 {
			sc := r.scrape(i, 3)
			if tt.change != nil {
				tt.change(i, &sc)
			}
			if err := r.spool.Add(sc); err != nil {
				t.Fatal(err)
			}
		}
		r.expect(tt.name, r.drain(tt.limits), tt.want)
	}
}

// A file cut off or changed anywhere stops nothing, is kept beside, and is counted.
func TestSpoolDamage(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1, 2, 3)
	path := r.files()[1]
	good := r.fs.entries[path].data
	damage := func(what string, data []byte) {
		r.errs = nil
		for _, name := range r.files() {
			if strings.Contains(name, spoolDamaged) {
				r.fs.Remove(name)
			}
		}
		r.fs.put(path, data)
		r.open()
		r.expect(what, numbers(t, r.nextPush(noLimits)), []int{1, 3})
		kept := false
		for _, name := range r.files() {
			if strings.HasPrefix(name, path+"."+spoolDamaged) {
				kept = kept || bytes.Equal(r.fs.entries[name].data, data)
			}
			if name == path {
				t.Errorf("%s: the file is still there", what)
			}
		}
		if len(r.errs) != 1 || !kept && len(data) > 0 && !strings.HasPrefix(what, "cut") {
			t.Errorf("%s: errors %v, kept %v", what, r.errs, kept)
		}
	}
	for i := range good {
		damage(fmt.Sprint("cut at ", i), good[:i])
		flipped := bytes.Clone(good)
		flipped[i] ^= 0x40
		damage(fmt.Sprint("flipped at ", i), flipped)
	}
	// Well-formed, but not what it says.
	sc := r.scrape(2, 3)
	for what, change := range map[string]func(){
		"samples": func() { sc.Samples = 2 }, "size": func() { sc.Size-- }, "gzip": func() { sc.Gzip = sc.Gzip[:len(sc.Gzip)-1] },
	} {
		sc = r.scrape(2, 3)
		change()
		r.errs = nil
		r.fs.put(path, AppendRecord(appendLogHeader(nil, []byte("site")), scrapeKind, appendScrapePayload(nil, &sc)))
		before := r.droppedSamples[DropSpoolDamaged]
		r.open()
		r.expect(what, numbers(t, r.nextPush(noLimits)), []int{1, 3})
		if len(r.errs) != 1 || r.droppedSamples[DropSpoolDamaged] != before+sc.Samples {
			t.Errorf("%s: errors %v, dropped %v", what, r.errs, r.droppedSamples)
		}
	}
}

// A spool whose reads fail for a moment opens whole. A read that fails for good stops the
// opening, and all files stay as they were.
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
						t.Errorf("%v, %v: got %v", tt, f, err)
					}
					r.fs.hook = nil
				}
				r.open()
				if !maps.Equal(r.fs.contents(), before) || len(r.errs) > 0 || r.dropCalls > 0 {
					t.Errorf("%v, %v: files %q; errors %v, dropped %v", tt, f, r.files(), r.errs, r.droppedSamples)
				}
				r.expect("all", r.drain(noLimits), [][]int{{1, 2, 3}})
			})
		}
	}
}

// A scrape that cannot be read stays until it can be. The others do not wait for it.
func TestSpoolNextFails(t *testing.T) {
	file := func(n int) string { return fmt.Sprintf("/s/%016d.log", n) }
	for _, tt := range []struct {
		name   string
		unread []string
		memory bool    // a fifth scrape is in memory
		first  [][]int // pushes until none is left but what cannot be read
		told   int     // errors
		waits  int     // errors returned meanwhile
		then   [][]int // when all can be read
	}{
		{"the first", []string{file(1)}, false, [][]int{{2, 3, 4}}, 1, 0, [][]int{{1}}},
		{"one between", []string{file(2)}, false, [][]int{{1}, {3, 4}}, 1, 0, [][]int{{2}}},
		{"the last", []string{file(4)}, false, [][]int{{1, 2, 3}}, 0, 0, [][]int{{4}}},
		{"several", []string{file(1), file(2), file(3)}, false, [][]int{{4}}, 1, 1, [][]int{{1, 2, 3}}},
		{"all but what is in memory", []string{".log"}, true, [][]int{{5}}, 1, 0, [][]int{{1, 2, 3, 4}}},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newSpoolRig(t, nil)
			r.mustAdd(1, 2, 3, 4)
			if tt.memory {
				r.fs.hook = failOn("write", "", 0, errFull)
				r.add(5)
			}
			r.fs.hook = func(_ int, op, name string) fault {
				if op == "read" && slices.ContainsFunc(tt.unread, func(u string) bool { return strings.HasSuffix(name, u) }) {
					return fault{Err: errDisk}
				}
				return fault{}
			}
			var pushes [][]int
			waits := 0
			for range 10 {
				got, err := r.spool.BeginPush(noLimits)
				if len(got) > 0 && err == nil {
					pushes = append(pushes, numbers(t, got))
					r.spool.ApplyAnswer(SpoolAnswer{})
					continue
				}
				if len(got) > 0 || !errors.Is(err, errDisk) || !errors.Is(err, ErrSpoolRead) || !strings.Contains(err.Error(), "/s/00") {
					t.Fatalf("%s: %d scrapes, and %v", tt.name, len(got), err)
				}
				if r.spool.Stats().Scrapes == len(slices.Concat(tt.then...)) {
					break
				}
				waits++
			}
			r.expect(tt.name, pushes, tt.first)
			if len(r.errs) != tt.told || waits != tt.waits || r.dropCalls > 0 {
				t.Errorf("%s: told %v, waited %d times, dropped %v", tt.name, r.errs, waits, r.droppedSamples)
			}
			r.expect(tt.name+": files", len(r.files()), len(slices.Concat(tt.then...)))
			r.fs.hook = nil
			got := r.drain(noLimits)
			slices.SortFunc(got, slices.Compare)
			r.expect(tt.name+": then", [][]int{slices.Concat(got...)}, tt.then)
		})
	}
	// The scrape of a file that has vanished is lost.
	r := newSpoolRig(t, nil)
	r.mustAdd(1, 2, 3)
	r.fs.Remove(file(2))
	r.expect("one has vanished", r.drain(noLimits), [][]int{{1, 3}})
	r.expect("dropped", r.droppedSamples, map[string]int{DropSpoolDamaged: 3})
}

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
		t.Errorf("files %v", names)
	}
	// By another name it is sent again, before what came later.
	if err := r.fs.Rename(names[3], strings.TrimSuffix(names[3], "."+spoolRefused)); err != nil {
		t.Fatal(err)
	}
	r.open()
	r.expect("renamed back", r.drain(noLimits), [][]int{{7, 20}})
	r.mustAdd(21)
	if names := r.files(); names[len(names)-1] != "/s/0000000000000022.log" {
		t.Errorf("files %v", names)
	}
}

func TestSpoolOfAnotherCluster(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1)
	r.cfg.ClusterID = "other"
	if _, err := OpenSpool(r.cfg); err == nil || !strings.Contains(err.Error(), `"site"`) || !strings.Contains(err.Error(), "--spool-dir") {
		t.Errorf("got %v", err)
	}
	r.cfg.ClusterID = "site"
	r.open()
	r.drain(noLimits)
	r.cfg.ClusterID = "other"
	r.open() // an empty one is anybody's
}

func TestSpoolOnDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "spool")
	r := newSpoolRig(t, func(c *SpoolConfig) { c.FS, c.Dir = DiskFS{}, dir })
	r.mustAdd(1, 2)
	if _, err := OpenSpool(r.cfg); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("opened twice: %v", err)
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
	r.expect("opened again", r.drain(noLimits), [][]int{{1, 2}})
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	r.expect("only what is not the spool's is left", names, []string{"1.log", "lock", "notes.txt", "spool.log", "x.log.tmp"})
	if err := r.spool.Close(); err != nil || len(r.errs) > 0 {
		t.Errorf("%v, %v", err, r.errs)
	}
}

// Whatever is decoded with its text can be spooled, and is then the same; what
// the header alone says is bounded.
func FuzzDecodeScrape(f *testing.F) {
	r := spoolRig{now: Moment{1_700_000_000_000, 5, "boot-1"}}
	for _, lines := range []int{0, 1, 20} {
		sc := r.scrape(1, lines)
		f.Add(appendScrapePayload(nil, &sc))
		sc.Corrected, sc.Shift = true, -77
		f.Add(appendScrapePayload(nil, &sc))
		sc.Samples++
		f.Add(appendScrapePayload(nil, &sc))
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		head, headErr := decodeScrape(data, false)
		sc, err := decodeScrape(data, true)
		if err == nil && headErr != nil {
			t.Fatalf("good with its text, but without: %v", headErr)
		}
		if err != nil {
			return
		}
		if head.Samples > head.Size/shortestLine || head.Size > MaxPieceText || len(head.At.BootID) > MaxBootID {
			t.Fatalf("%+v", head)
		}
		if again := appendScrapePayload(nil, &sc); !bytes.Equal(again, data) {
			t.Fatalf("%q, then %q", data, again)
		}
	})
}
