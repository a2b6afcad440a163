package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A scrape stays in the spool until it is delivered. After a crash the spool has the same scrapes,
// with the same times and sample counts. New scrapes follow them.
func TestSpoolRestart(t *testing.T) {
	r := newSpoolRig(t, nil)
	first := r.scrape(1, 3)
	r.mustAdd(1, 2, 3)
	r.expect("a push limited to one scrape", numbers(t, r.nextPush(PushLimits{1, 1, 1})), []int{1})
	r.spool.ApplyAnswer(SpoolAnswer{})
	r.expect("the next push", numbers(t, r.nextPush(noLimits)), []int{2, 3})
	r.fs.crash()
	r.open()
	r.mustAdd(4)
	got := r.nextPush(noLimits)
	r.expect("the push after a crash", numbers(t, got), []int{2, 3, 4})
	if got[0].At != first.At || got[0].SourceTime != first.SourceTime || got[0].Samples != 3 {
		t.Errorf("after a crash scrape 2 is %+v, want the clocks and counts of %+v", got[0], first)
	}
	r.spool.ApplyAnswer(SpoolAnswer{})
	r.expect("the files at the end", r.files(), []string{})
	if st := r.spool.Stats(); st != (SpoolStats{}) || len(r.errs) > 0 || r.dropCalls > 0 {
		t.Errorf("the empty spool has %+v; errors %v and drops %v, want none", st, r.errs, r.droppedSamples)
	}
}

// While the disk is full, Add returns the disk's error and keeps scrapes in memory. They are pushed
// in order with the scrapes on disk, and Close writes them when the disk works again.
func TestSpoolDiskFull(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1)
	r.fs.hook = failOn("write", "", 0, errFull)
	for _, n := range []int{2, 3} {
		if err := r.add(n); !errors.Is(err, errFull) {
			t.Errorf("adding scrape %d: got the error %v, want %v", n, err, errFull)
		}
	}
	r.fs.hook = nil
	if st := r.spool.Stats(); st.Scrapes != 3 || st.InMemory != 2 {
		t.Errorf("got %+v, want 3 scrapes, 2 of them in memory", st)
	}
	r.expect("the next push", numbers(t, r.nextPush(noLimits)), []int{1, 2, 3})
	r.spool.ReleaseInFlight()
	if err := r.spool.Close(); err != nil {
		t.Error(err)
	}
	r.fs.crash()
	r.open()
	r.expect("the pushes after Close and a crash", r.drain(noLimits), [][]int{{1, 2, 3}})
}

// While the disk is full, scrapes in memory occupy at most maxSpoolMemory. To stay below that, the
// spool drops the oldest scrapes in memory. Close returns the disk's error and reports the scrapes
// that it cannot write.
func TestSpoolMemoryBound(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1)
	r.fs.hook = failOn("open", spoolTemp, 0, errFull)
	big := r.scrape(0, 1)
	big.Gzip = append(big.Gzip, make([]byte, 3<<20)...) // 3 MiB more; the text is never decompressed in this test
	for range 8 {
		if err := r.spool.Add(big); !errors.Is(err, errFull) {
			t.Errorf("adding a scrape: got the error %v, want %v", err, errFull)
		}
	}
	fit := maxSpoolMemory / (len(big.Gzip) + entryOverhead)
	if st := r.spool.Stats(); st.InMemory != fit || st.Scrapes != 1+fit || r.droppedSamples[DropSpoolFull] != 8-fit {
		t.Errorf("got %+v and dropped %v, want %d scrapes in memory", st, r.droppedSamples, fit)
	}
	if err := r.spool.Close(); !errors.Is(err, errFull) || r.droppedSamples[DropSpoolClosed] != fit {
		t.Errorf("closing: got the error %v and dropped %v, want %v and %d samples", err, r.droppedSamples, errFull, fit)
	}
}

// addInMemory adds scrapes while the disk is full, so that they stay in memory.
func (r *spoolRig) addInMemory(ns ...int) {
	r.t.Helper()
	r.fs.hook = failOn("write", "", 0, errFull)
	for _, n := range ns {
		if err := r.add(n); !errors.Is(err, errFull) {
			r.t.Errorf("adding scrape %d: got the error %v, want %v", n, err, errFull)
		}
	}
	r.fs.hook = nil
}

// expectStats checks how many scrapes the spool has, and how many of these are in memory only.
func (r *spoolRig) expectStats(scrapes, inMemory int) {
	r.t.Helper()
	if st := r.spool.Stats(); st.Scrapes != scrapes || st.InMemory != inMemory {
		r.t.Errorf("got %+v, want %d scrapes, %d of them in memory", st, scrapes, inMemory)
	}
}

// When the disk works again, each Add writes up to maxFlush scrapes from memory to disk.
func TestSpoolWritesMemoryToDisk(t *testing.T) {
	r := newSpoolRig(t, nil)
	const failed = maxFlush + 2
	r.addInMemory(upTo(failed)...)
	r.expectStats(failed, failed)
	r.mustAdd(failed + 1)
	r.expectStats(failed+1, 2)
	r.mustAdd(failed + 2)
	r.expectStats(failed+2, 0)
	r.fs.crash()
	r.open()
	r.expect("the pushes after a crash", r.drain(noLimits), [][]int{upTo(failed + 2)})
	if st := r.spool.Stats(); st.Bytes != 0 {
		t.Errorf("the empty spool accounts for %d bytes, want 0", st.Bytes)
	}
}

// A scrape that is in memory because the disk failed stays there if writing it would exceed the
// spool's limit on disk. The spool does not drop newer scrapes on disk to make room for it.
func TestSpoolWritesMemoryIfItFits(t *testing.T) {
	r := newSpoolRig(t, func(c *SpoolConfig) { c.Limit = 2 * fileBlock })
	r.addInMemory(1, 2)
	r.mustAdd(3)
	r.expectStats(3, 1)
	r.expect("the pushes", r.drain(noLimits), [][]int{{1, 2, 3}})
}

// If a scrape is delivered while the spool writes it from memory to disk, no file of the scrape is
// left.
func TestSpoolDeliveredDuringWrite(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.addInMemory(1)
	removed := 0
	r.fs.hook = func(_ int, op, path string) fault {
		if op == "rename" && strings.Contains(path, scrapeFileName(1)) && removed == 0 {
			r.nextPush(PushLimits{1, 1, 1})
			// Remove the scrape from the index, as ApplyAnswer does. Its file does not exist yet.
			removed = len(r.spool.removeFromIndex((*spoolEntry).isInFlight))
		}
		return fault{}
	}
	r.mustAdd(2)
	r.fs.hook = nil
	if removed != 1 {
		t.Fatal("scrape 1 was not written to disk")
	}
	r.fs.crash()
	r.open()
	r.expect("the pushes after a crash", r.drain(noLimits), [][]int{{2}})
}

// Without a directory the spool keeps scrapes in memory, up to its limit, and writes no files.
func TestSpoolInMemory(t *testing.T) {
	r := newSpoolRig(t, func(c *SpoolConfig) { c.Dir = ""; c.Limit = 750 })
	r.mustAdd(1, 2, 3, 4)
	if len(r.files()) > 0 || r.droppedSamples[DropSpoolFull] != 6 {
		t.Errorf("files %v, dropped %v, want no file and 6 samples", r.files(), r.droppedSamples)
	}
	r.nextPush(PushLimits{1, 1, 1})
	r.spool.SetInFlightAside()
	r.expect("the pushes", r.drain(noLimits), [][]int{{4}})
}

// When a new scrape would exceed the spool's limit, the spool drops its oldest scrapes, but no
// scrapes in flight (in a push that has no answer yet). A scrape that alone exceeds the limit is
// dropped.
func TestSpoolLimit(t *testing.T) {
	r := newSpoolRig(t, func(c *SpoolConfig) { c.Limit = 3*fileBlock + 100 })
	r.mustAdd(1, 2, 3)
	r.nextPush(PushLimits{1, 1, 1}) // scrape 1 is in flight
	r.mustAdd(4, 5)
	if r.droppedSamples[DropSpoolFull] != 6 || r.dropCalls != 2 {
		t.Errorf("dropped %v in %d calls, want 6 samples in 2 calls", r.droppedSamples, r.dropCalls)
	}
	r.spool.ReleaseInFlight()
	if st := r.spool.Stats(); st.Scrapes != 3 || st.Bytes != 3*fileBlock || len(r.files()) != 3 {
		t.Errorf("got %+v and the files %v, want 3 scrapes in 3 files", st, r.files())
	}
	r.expect("the pushes", r.drain(noLimits), [][]int{{1, 4, 5}})
	r.cfg.Limit = fileBlock - 1
	r.open()
	r.mustAdd(6)
	if r.droppedSamples[DropSpoolFull] != 9 || r.spool.Stats().Scrapes != 0 {
		t.Errorf("a scrape above the limit: dropped %v, want 9 samples and an empty spool", r.droppedSamples)
	}
}

// Scrapes older than MaxAge are dropped. A step of the wall clock does not change their age.
func TestSpoolAge(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1, 2)
	r.later(time.Hour)
	r.mustAdd(3)
	r.later(time.Hour)
	if got := r.spool.Stats().ByState[ScrapeUndelivered].OldestAge; got != 2*time.Hour {
		t.Errorf("the age of the oldest scrape is %v, want 2 h", got)
	}
	r.now.Wall += 1e12
	r.expect("the next push at MaxAge, after a step of the wall clock", numbers(t, r.nextPush(noLimits)), []int{1, 2, 3})
	r.now.Wall -= 1e12
	r.spool.ReleaseInFlight()
	r.later(time.Second)
	r.mustAdd(4)
	if r.droppedSamples[DropSpoolOld] != 6 || r.dropCalls != 1 || len(r.files()) != 2 {
		t.Errorf("dropped %v in %d calls and kept the files %v, want 6 samples in 1 call and 2 files", r.droppedSamples, r.dropCalls, r.files())
	}
}

// After a reboot the age of a scrape is measured with the wall clock.
func TestSpoolAgeAfterReboot(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(3)
	r.later(time.Hour + time.Second)
	r.mustAdd(4)
	r.now.BootID, r.now.Boot, r.now.Wall = "boot-2", 10, r.now.Wall+90*60_000
	r.open()
	r.expect("the pushes after a reboot", r.drain(noLimits), [][]int{{4}})
}

// When the spool is full, it drops scrapes that a server holds before scrapes that no server holds,
// each oldest first. A held scrape that is dropped does not count as lost.
func TestSpoolDropsHeldFirst(t *testing.T) {
	r := newSpoolRig(t, func(c *SpoolConfig) { c.Limit = 4 * fileBlock })
	r.mustAdd(1, 2, 3, 4)
	r.nextPush(noLimits)
	r.spool.MarkPushFailed(false)
	r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Held: Ranges{{3, 3}}})
	r.mustAdd(5)
	r.expect("the samples dropped by the limit", r.droppedSamples, map[string]int{DropSpoolHeld: 3})
	r.mustAdd(6)
	r.expect("the samples dropped by the limit, with no held scrape left", r.droppedSamples, map[string]int{DropSpoolHeld: 3, DropSpoolFull: 3})
	r.expect("the pushes", r.drain(noLimits), [][]int{{2, 4, 5, 6}})
	r.mustAdd(7)
	r.nextPush(noLimits)
	r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Held: Ranges{{7, 7}}})
	r.later(3 * time.Hour)
	r.mustAdd(8)
	r.expect("the samples dropped by age", r.droppedSamples, map[string]int{DropSpoolHeld: 6, DropSpoolFull: 3})
}

// A push has as many scrapes as the limits allow, but at least one. Scrapes before and after a
// reboot or a step of a clock can be in one push.
func TestSpoolPushLimits(t *testing.T) {
	r := newSpoolRig(t, nil)
	one := r.scrape(0, 3)
	for _, tt := range []struct {
		name   string
		limits PushLimits
		change func(i int, sc *Scrape)
		want   [][]int
	}{
		{"no limits", noLimits, nil, [][]int{{0, 1, 2, 3, 4, 5}}},
		{"number of scrapes", PushLimits{1 << 30, 1 << 30, 4}, nil, [][]int{{0, 1, 2, 3}, {4, 5}}},
		{"compressed bytes", PushLimits{int64(2*len(one.Gzip) + 9), 1 << 30, 99}, nil, [][]int{{0, 1}, {2, 3}, {4, 5}}},
		{"uncompressed bytes", PushLimits{1 << 30, int64(3 * one.Size), 99}, nil, [][]int{{0, 1, 2}, {3, 4, 5}}},
		{"limits below one scrape", PushLimits{1, 1, 0}, nil, [][]int{{0}, {1}, {2}, {3}, {4}, {5}}},
		{"reboots and steps of the clocks", noLimits, func(i int, sc *Scrape) {
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

// A scrape whose file cannot be read stays in the spool until the file can be read. The other
// scrapes do not wait for it. If no scrape can be read, BeginPush returns an error.
func TestSpoolReadFails(t *testing.T) {
	file := func(n int) string { return fmt.Sprintf("/s/%016d.log", n) }
	for _, tt := range []struct {
		name   string
		unread []string // ends of the names of the files that cannot be read
		memory bool     // whether a fifth scrape is in memory
		first  [][]int  // wanted pushes until only scrapes are left that cannot be read
		told   int      // wanted number of errors reported to OnError
		waits  int      // wanted number of errors of BeginPush while scrapes that can be read are left
		then   [][]int  // scrapes that must be pushed when all files can be read again
	}{
		{"the first file", []string{file(1)}, false, [][]int{{2, 3, 4}}, 1, 0, [][]int{{1}}},
		{"a file in the middle", []string{file(2)}, false, [][]int{{1}, {3, 4}}, 1, 0, [][]int{{2}}},
		{"the last file", []string{file(4)}, false, [][]int{{1, 2, 3}}, 0, 0, [][]int{{4}}},
		{"several files", []string{file(1), file(2), file(3)}, false, [][]int{{4}}, 1, 1, [][]int{{1, 2, 3}}},
		{"all files, and one scrape in memory", []string{".log"}, true, [][]int{{5}}, 1, 0, [][]int{{1, 2, 3, 4}}},
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
					t.Fatalf("%s: got %d scrapes and the error %v, want an error that names the file", tt.name, len(got), err)
				}
				if r.spool.Stats().Scrapes == len(slices.Concat(tt.then...)) {
					break
				}
				waits++
			}
			r.expect(tt.name+": the pushes", pushes, tt.first)
			if len(r.errs) != tt.told || waits != tt.waits || r.dropCalls > 0 {
				t.Errorf("%s: reported %v, BeginPush failed %d times, dropped %v", tt.name, r.errs, waits, r.droppedSamples)
			}
			r.expect(tt.name+": the number of files", len(r.files()), len(slices.Concat(tt.then...)))
			r.fs.hook = nil
			got := r.drain(noLimits)
			slices.SortFunc(got, slices.Compare)
			r.expect(tt.name+": the pushes when all files can be read", [][]int{slices.Concat(got...)}, tt.then)
		})
	}
}

// If the file of a scrape has vanished, the scrape is dropped and counted as damaged.
func TestSpoolVanishedFile(t *testing.T) {
	r := newSpoolRig(t, nil)
	r.mustAdd(1, 2, 3)
	r.fs.Remove("/s/" + scrapeFileName(2))
	r.expect("the pushes", r.drain(noLimits), [][]int{{1, 3}})
	r.expect("the dropped samples", r.droppedSamples, map[string]int{DropSpoolDamaged: 3})
}

// If a scrape was added before the client knew any server's time, BeginPush corrects the times of
// the scrape before it is sent. The corrected scrape is stored on disk. If the disk fails, the
// corrected scrape is kept in memory.
func TestSpoolCorrectsTimes(t *testing.T) {
	for _, fails := range []bool{false, true} {
		shift := int64(1000)
		r := newSpoolRig(t, func(c *SpoolConfig) {
			c.CorrectTimes = func(sc Scrape) Scrape {
				text := shiftTimes(gunzipped(t, sc.Gzip), shift)
				sc.Corrected, sc.Shift, sc.Size, sc.Gzip = true, shift, len(text), Gzip(text)
				return sc
			}
		})
		r.mustAdd(1, 2)
		if fails {
			r.fs.hook = failOn("write", "", 0, errFull)
		}
		first := r.nextPush(noLimits)
		if want := fmt.Sprintf("s{n=\"1\",i=\"0\"} 1 %d\n", 1001); !bytes.HasPrefix(gunzipped(t, first[0].Gzip), []byte(want)) {
			t.Errorf("the corrected text is %q, want it to begin with %q", gunzipped(t, first[0].Gzip), want)
		}
		r.fs.hook = nil
		shift = 5000
		r.spool.ReleaseInFlight()
		if fails {
			r.expect("the scrapes in memory", r.spool.Stats().InMemory, 2)
			r.mustAdd(3) // also writes the scrapes in memory to disk
		}
		r.expect("the scrapes in memory when the disk works", r.spool.Stats().InMemory, 0)
		r.fs.crash()
		r.open()
		again := r.nextPush(noLimits)
		for i := range first {
			if !bytes.Equal(gunzipped(t, again[i].Gzip), gunzipped(t, first[i].Gzip)) || !again[i].Corrected {
				t.Errorf("disk fails %v: after a crash the corrected text changed from %q to %q", fails, gunzipped(t, first[i].Gzip), gunzipped(t, again[i].Gzip))
			}
		}
		r.expect("the last shift", r.spool.LastTimeShift(), map[bool]int{false: 1000, true: 5000}[fails])
	}
}

// The first scrape of a process gets the wall clock's milliseconds as its number, if that is above
// all numbers used before and below MaxScrapeNumber. Otherwise it gets the next unused number.
func TestSpoolNumbers(t *testing.T) {
	r := newSpoolRig(t, nil)
	for _, tt := range []struct {
		wall int64 // the wall clock in ms
		want uint64
	}{
		{1000, 1000}, {0, 1001}, {1_700_000_000, 1_700_000_000}, {1, 1_700_000_001}, {MaxScrapeNumber, 1_700_000_002}, {1_700_000_003, 1_700_000_003},
	} {
		r.now.Wall = tt.wall
		r.open()
		r.now.Wall = 0
		r.mustAdd(1)
		names := r.files()
		if got := names[len(names)-1]; got != "/s/"+scrapeFileName(tt.want) {
			t.Errorf("at %d ms: the newest file is %s, want number %d", tt.wall, got, tt.want)
		}
	}
}

// The next process uses no scrape number of the previous process under the same spool ID, even if
// the spool is empty. If the wall clock is behind the time in the spool's record, the spool gets a
// new ID.
func TestSpoolNumberOfNextProcess(t *testing.T) {
	for _, tt := range []struct {
		name   string
		later  time.Duration // wall-clock time that passes before the next process starts
		wantID bool          // whether the next process must have the same spool ID
	}{
		{"the next process starts in the same second", 5 * time.Millisecond, true},
		{"the next process starts an hour later", time.Hour, true},
		{"the clock is set back", -time.Minute, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newSpoolRig(t, nil)
			r.later(time.Hour)
			r.open()
			// The answer lists a new consumer, so that the spool writes its record.
			r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Consumers: []ConsumerAge{{Key: 7, Age: time.Minute}}})
			r.mustAdd(1)
			first, id := r.nextPush(noLimits)[0].Number, r.spool.ID()
			r.spool.ApplyAnswer(SpoolAnswer{KnowsSpools: true, Read: Ranges{{first, first}}})
			r.now.BootID = "boot-2"
			r.now.Wall += tt.later.Milliseconds()
			r.open()
			r.mustAdd(2)
			second := r.nextPush(noLimits)[0].Number
			if same := r.spool.ID() == id; same != tt.wantID || same && second <= first {
				t.Errorf("got number %d and then %d, the same ID: %v; want a higher number or a new ID", first, second, same)
			}
			if all := r.spool.Consumers(); len(all) != 1 || all[0].Key != 7 || all[0].Age < time.Minute {
				t.Errorf("the next process knows the consumers %v, want consumer 7", all)
			}
		})
	}
}
