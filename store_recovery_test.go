package main

// A start with files that were damaged, cut short, removed or
// replaced by an older copy: no number is used twice, no unread sample is evicted, and
// every known loss is reported.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// drain has a consumer read all that is unread, over a connection of its own, and confirm
// it. It returns the samples.
func drain(t testing.TB, k *storeKit, s *Store, name string) map[heldSample]float64 {
	t.Helper()
	got := map[heldSample]float64{}
	conn := &AnswerReadTracker{}
	for unread := 1; unread > 0; {
		r, _, err := s.Consumers.BeginScrape(ConsumerKey(name, "::1", ""), name, "::1", conn, k.clock.Now())
		if err != nil {
			t.Fatal(err)
		}
		var fams []Family
		fams, unread, _ = scraper(s, -time.Second).ServeUnreadAndNewest(r, 1000, false, nil)
		for _, f := range fams {
			for _, l := range f.Samples {
				got[heldSample{string(l.Line), l.T}] = l.V
			}
		}
	}
	return got
}

// A sample is not served from the moment it outlives retention, though its batch has newer
// ones, and is counted then: once, however many consumers have not read it.
func TestNeverServedBeyondRetention(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	fresh := []point{{"m", 2, k.clock.ms(10), 2}, {"m", 1, k.clock.ms(5), 3}}
	k.push(s, "a", append(fresh, point{"m", 1, k.clock.ms(7190), 1}, point{"m", 3, k.clock.ms(7191), 1})...)
	k.push(s, "b", point{"m", 1, k.clock.ms(7199), 9})
	confirm(t, s.Consumers, "far", k.clock.Now(), map[uint64]uint64{SiteKey("a"): s.sites["a"].data.Seq})
	k.clock.Add(20 * time.Second)
	want := pushed("a", fresh...)
	for _, consumer := range []string{"one", "two", "one"} {
		if consumer == "one" && s.Stats().Expired > 0 {
			want = map[heldSample]float64{}
		}
		wantHeld(t, consumer, drain(t, k, s, consumer), want)
		want = pushed("a", fresh...)
		if st := s.Stats(); st.Expired != 3 || st.ExpiredUnread != 3 {
			t.Errorf("%s: %d samples expired, %d unread; want 3 and 3", consumer, st.Expired, st.ExpiredUnread)
		}
	}
	for _, b := range s.Stats().Sites[0].Backlogs {
		if b.UnreadSamples != 0 {
			t.Errorf("backlog %+v", b)
		}
	}
	s.expireAndCompact(context.Background(), false)
	if st := s.Stats(); st.Expired != 3 || st.ExpiredUnread != 3 {
		t.Errorf("%d samples expired, %d unread after maintenance", st.Expired, st.ExpiredUnread)
	}
}

// If one of the files beside the logs is lost or damaged, no unread sample is evicted:
// pushes are refused until the consumer has read, and then it has everything.
func TestNothingUnreadIsEvicted(t *testing.T) {
	flip := func(at int) func(data []byte) []byte {
		return func(data []byte) []byte {
			data = bytes.Clone(data)
			data[(at+len(data))%len(data)] ^= 4
			return data
		}
	}
	remove := func([]byte) []byte { return nil }
	type spoilt struct {
		name, path string
		change     func(data []byte) []byte
	}
	tests := []spoilt{{"nothing", consumersPath, slices.Clone[[]byte]}}
	for _, path := range []string{consumersPath, statePath} {
		tests = append(tests, spoilt{"removed", path, remove}, spoilt{"emptied", path, func([]byte) []byte { return []byte{} }})
		for _, at := range []int{0, 10, 30, 45, -1} {
			tests = append(tests, spoilt{fmt.Sprint("flipped at ", at), path, flip(at)})
		}
	}
	for _, test := range tests {
		t.Run(test.path+" "+test.name, func(t *testing.T) {
			fsys := newStoreFS(1)
			k := newStoreKit(t, fsys)
			k.cfg.LimitSamples = 95 // the first goes, and is not enough
			s := k.open()
			k.push(s, "a", point{"m", 0, k.clock.ms(0), -1})
			drain(t, k, s, "central")
			k.clock.Add(20 * time.Minute) // so that nothing is shown
			want := map[heldSample]float64{}
			push := func(s *Store, n int) error {
				k.clock.Add(time.Second)
				var points []point
				for i := range 10 {
					points = append(points, point{"m", i, k.clock.ms(0), float64(n)})
				}
				_, err := s.Append(context.Background(), "a", storePush("a", points...), ScrapeNames{})
				if err == nil {
					maps.Copy(want, pushed("a", points...))
				}
				return err
			}
			for i := range 9 {
				if err := push(s, i); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			data, err := fsys.ReadFile(test.path)
			if err != nil {
				t.Fatal(err)
			}
			if data = test.change(data); data == nil {
				if err := fsys.Remove(test.path); err != nil {
					t.Fatal(err)
				}
			} else {
				fsys.put(test.path, data)
			}
			k.clock.Add(20 * time.Minute)
			s = k.open()
			for i := range 3 {
				if err := push(s, 20+i); !errors.Is(err, ErrFull) {
					t.Errorf("a push beyond the limit: %v", err)
				}
				k.clock.Add(roomPause)
			}
			got := drain(t, k, s, "central")
			delete(got, heldSample{`m{_id="a",instance="",job="",n="0"}`, time.UnixMilli(1_700_000_000_000).UnixMilli()}) // read before
			wantHeld(t, "read", got, want)
			k.clock.Add(roomPause)
			if err := push(s, 30); err != nil {
				t.Errorf("a push when all is read: %v", err)
			}
			if st := s.Stats(); st.Evicted == 0 || st.ExpiredUnread > 0 {
				t.Errorf("%d evicted, %d of them unread", st.Evicted, st.ExpiredUnread)
			}
		})
	}
	t.Run("there never was a consumer", func(t *testing.T) {
		k := newStoreKit(t, newStoreFS(1))
		k.cfg.LimitSamples = 100
		s := k.open()
		for i := range 30 {
			k.push(s, "a", point{"m", 1, k.clock.ms(0), float64(i)}, point{"m", 2, k.clock.ms(0), float64(i)}, point{"n", i, k.clock.ms(0), 1})
			k.clock.Add(time.Minute)
			if i == 15 {
				s.Close()
				s = k.open()
			}
		}
		k.cfg.LimitSamples = 50
		s.Close()
		s = k.open()
		if st := s.Stats(); st.Evicted != 90-s.totals.Samples.Load() || st.Evicted < 40 {
			t.Errorf("%d evicted, %d held of 90", st.Evicted, s.totals.Samples.Load())
		}
		for n, v := range map[int]float64{1: 29, 2: 29} {
			if newest, value := s.sites["a"].data.Table.Newest(mustFind(&s.sites["a"].data, fmt.Sprintf(`m{_id="a",instance="",job="",n="%d"}`, n))); newest != k.clock.ms(60) || value != v {
				t.Errorf("the newest of series %d is %v of %d", n, value, newest)
			}
		}
	})
}

// The numbers of a site's batches never fall and no consumer is kept from reading what is
// new: over restarts, over forgetting the site, and whatever became of its log and of the
// cursors in between.
func TestNumbersNeverFall(t *testing.T) {
	for _, test := range []struct {
		name  string
		spoil func(k *storeKit, fsys *crashFS, s *Store, old map[string]string)
	}{
		{"nothing", func(*storeKit, *crashFS, *Store, map[string]string) {}},
		{"log removed", func(k *storeKit, fsys *crashFS, s *Store, _ map[string]string) { fsys.Remove(s.logPathOf("a")) }},
		{"older log", func(k *storeKit, fsys *crashFS, s *Store, old map[string]string) {
			fsys.put(s.logPathOf("a"), []byte(old[s.logPathOf("a")]))
		}},
		{"log and cursors removed", func(k *storeKit, fsys *crashFS, s *Store, _ map[string]string) {
			fsys.Remove(s.logPathOf("a"))
			fsys.Remove(consumersPath)
		}},
		{"killed soon after its start, log and cursors removed", func(k *storeKit, fsys *crashFS, s *Store, _ map[string]string) {
			k.open() // takes a block, and is killed
			fsys.restart()
			fsys.Remove(s.logPathOf("a"))
			fsys.Remove(consumersPath)
			if state := openStoreState(k.t, fsys); state.block != 3 {
				k.t.Errorf("the state has block %d after three starts", state.block)
			}
		}},
		{"log and state removed", func(k *storeKit, fsys *crashFS, s *Store, _ map[string]string) {
			fsys.Remove(s.logPathOf("a"))
			fsys.Remove(statePath)
		}},
		{"forgotten, and older cursors", func(k *storeKit, fsys *crashFS, s *Store, _ map[string]string) {
			cursors, _ := fsys.ReadFile(consumersPath)
			k.clock.Add(forgetAfter + 3*time.Hour)
			live := k.open()
			live.expireAndCompact(context.Background(), false)
			if len(live.sites) != 0 {
				k.t.Errorf("%d sites are known", len(live.sites))
			}
			live.Close()
			fsys.put(consumersPath, cursors)
		}},
		{"forgotten, and all else older", func(k *storeKit, fsys *crashFS, s *Store, old map[string]string) {
			k.clock.Add(forgetAfter + 3*time.Hour)
			live := k.open()
			live.expireAndCompact(context.Background(), false)
			live.Close()
			fsys.put(consumersPath, []byte(old[consumersPath]))
			fsys.put(statePath, []byte(old[statePath]))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			fsys := newStoreFS(1)
			k := newStoreKit(t, fsys)
			s := k.open()
			var highest uint64
			push := func() map[heldSample]float64 {
				t.Helper()
				want := map[heldSample]float64{}
				for i := range 5 {
					k.clock.Add(time.Second)
					pt := point{"m", i % 2, k.clock.ms(0), float64(i)}
					k.push(s, "a", pt)
					maps.Copy(want, pushed("a", pt))
					seq := s.sites["a"].data.Seq
					if seq <= highest {
						t.Fatalf("number %d after %d", seq, highest)
					}
					highest = seq
				}
				return want
			}
			push()
			drain(t, k, s, "central")
			s.Close()
			old := fsys.contents()
			s = k.open()
			push()
			drain(t, k, s, "central")
			push() // not read
			s.Close()
			test.spoil(k, fsys, s, old)
			if s = k.open(); test.name == "forgotten, and all else older" {
				highest = 0 // as when the whole directory is an older copy: the cursors are too
			}
			want := push()
			got := drain(t, k, s, "central")
			for key, v := range want {
				if got[key] != v {
					t.Errorf("%v is not served", key)
				}
			}
		})
	}
}

// A start reports every known loss: pushes and samples where they are known, bytes
// otherwise. An unfinished write, as a crash leaves it, is a warning.
func TestRecoverySaysWhatIsLost(t *testing.T) {
	const pushes, series = 12, 20
	for _, test := range []struct {
		name          string
		change        func(data []byte, ends []int) []byte // ends: of the records
		damaged, torn int64
		says          []string // in an error, or in a warning if nothing is damaged
	}{
		{"removed", func([]byte, []int) []byte { return nil }, 1, 0, []string{`consumers ["central"] have read the log /s/`, "which was removed", "unknown number of pushes"}},
		{"emptied", func([]byte, []int) []byte { return []byte{} }, 1, 0, []string{"neither a header nor a record", "no usable part of it is left", "unknown number of pushes"}},
		{"zeroed", func(data []byte, _ []int) []byte { return make([]byte, len(data)) }, 1, 0, []string{"neither a header nor a record", "no usable part of it is left"}},
		{"cut between records", func(data []byte, ends []int) []byte { return data[:ends[len(ends)-3]] }, 1, 0,
			[]string{"ends before the newest batch that consumers", `site "a"`, "2 pushes or more are lost"}},
		{"cut in a record", func(data []byte, ends []int) []byte { return data[:ends[len(ends)-2]-5] }, 1, -1,
			[]string{"ends before the newest batch that consumers", "2 pushes or more are lost"}},
		{"zeroed at the end", func(data []byte, ends []int) []byte {
			at := ends[len(ends)-4] + 20
			return slices.Concat(data[:at], make([]byte, len(data)-at))
		}, 1, -1, []string{"was damaged", "bytes are lost;", "3 pushes or more are lost"}},
		{"a record zeroed in the middle", func(data []byte, ends []int) []byte {
			at, end := ends[len(ends)-5], ends[len(ends)-3]
			return slices.Concat(data[:at], make([]byte, end-at), data[end:])
		}, 1, 0, []string{"was damaged", "bytes are lost, at least 2 pushes; "}},
		{"the series zeroed", func(data []byte, ends []int) []byte {
			return slices.Concat(data[:ends[0]], make([]byte, ends[1]-ends[0]), data[ends[1]:])
		}, 1, 0, []string{fmt.Sprintf("bytes are lost, %d samples of series whose names are lost; ", pushes*series)}},
		{"an unfinished push", func(data []byte, ends []int) []byte { return append(bytes.Clone(data), data[ends[2]:ends[3]-9]...) }, 0, -1,
			[]string{"bytes of an unfinished write"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			fsys := newStoreFS(1)
			k := newStoreKit(t, fsys)
			s := k.open()
			path := s.logPathOf("a")
			var ends []int
			mark := func() {
				data, err := fsys.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				ends = append(ends, len(data))
			}
			for i := range pushes {
				k.clock.Add(time.Second)
				var points []point
				for n := range series {
					points = append(points, point{"m", n, k.clock.ms(0), float64(i)})
				}
				k.push(s, "a", points...)
				if i == 0 { // header, series, batch
					data, _ := fsys.ReadFile(path)
					header := parseLogHeader(data).size
					size, _ := parseRecordHead(data[header:])
					ends = append(ends, header, header+size)
				}
				mark()
			}
			drain(t, k, s, "central")
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			data, err := fsys.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if data = test.change(data, ends); data == nil {
				fsys.Remove(path)
			} else {
				fsys.put(path, data)
			}
			var warnings []error
			k.cfg.OnWarning = func(err error) { warnings = append(warnings, err) }
			s = k.open()
			st := s.Stats()
			if st.DamagedLogs != test.damaged || (st.TornBytes > 0) != (test.torn != 0) {
				t.Errorf("%d damaged logs counted, want %d; %d torn bytes", st.DamagedLogs, test.damaged, st.TornBytes)
			}
			said := fmt.Sprint(k.errors)
			if test.damaged == 0 {
				said = fmt.Sprint(warnings)
				if len(k.errors) > 0 {
					t.Errorf("said %v", k.errors)
				}
			}
			for _, want := range test.says {
				if !strings.Contains(said, want) {
					t.Errorf("said %s, want %q", said, want)
				}
			}
			if strings.Contains(said, `kept as "."`) {
				t.Errorf("said %s", said)
			}
			// It is said once, and the site goes on.
			k.push(s, "a", point{"m", 1, k.clock.ms(0) + 1, 7})
			s.Close()
			k.errors = nil
			if s = k.open(); s.Stats().DamagedLogs != 0 || len(k.errors) > 0 {
				t.Errorf("said again: %v", k.errors)
			}
		})
	}
}

// A consumer is on disk before it is served, and a file beside the logs that is missing is
// reported.
func TestConsumerIsKnownBeforeItIsServed(t *testing.T) {
	r := newConsumerRig(t)
	r.pushUps(1)
	if got := r.ups(scraperOf(t), "consumer=new", ""); got != "1 " {
		t.Errorf("served %q", got)
	}
	fsys := r.store.cfg.FS.(*crashFS)
	state, err := OpenStoreMeta(fsys, "/secretdir")
	if err != nil || state.Damage != nil || len(state.Consumers) != 1 || state.Consumers[0].Name != "new" {
		t.Errorf("on disk: %+v, %v", state, err)
	}
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
			t.Errorf("without %s: said %v", missing, k.errors)
		}
	}
}

// The clock of the server steps three hours ahead for 45 seconds: nothing expires, is
// dropped or is served wrongly, and all is served when it is right again. A step that stays
// counts after five minutes.
func TestClockStep(t *testing.T) {
	for _, stays := range []bool{false, true} {
		fsys := newStoreFS(1)
		k := newStoreKit(t, fsys)
		monotonic := k.clock.Now() // steps are of the wall clock alone
		pass := func(d time.Duration) { k.clock.Add(d); monotonic = monotonic.Add(d) }
		var changes []WallClockStepEvent
		start := monotonic
		clock := NewCheckedWallClock(k.clock.Now, func() time.Duration { return monotonic.Sub(start) }, func(c WallClockStepEvent) { changes = append(changes, c) })
		k.cfg.NowInterval = clock.NowInterval
		s := k.open()
		points := []point{{"m", 1, k.clock.ms(7000), 1}, {"m", 1, k.clock.ms(3600), 2}, {"m", 1, k.clock.ms(0), 3}}
		k.push(s, "a", points...)
		confirm(t, s.Consumers, "central", k.clock.Now(), nil)
		right := k.clock.ms(0)
		k.clock.Add(3 * time.Hour)
		for range 45 {
			pass(time.Second)
			s.expireAndCompact(context.Background(), false)
			s.Consumers.DropIdle(s.cfg.NowInterval().Earliest)
		}
		for name, at := range map[string]int64{"right by the old time": right + 1000, "right by the new time": k.clock.ms(0)} {
			if _, err := s.Append(context.Background(), "a", storePush("a", point{"m", 5, at, 1}), ScrapeNames{}); !errors.Is(err, ErrClockInDoubt) {
				t.Errorf("a sample that is %s: %v", name, err)
			}
		}
		if res, err := s.Append(context.Background(), "a", storePush("a", point{"m", 5, right - 1000*3600*5, 1}), ScrapeNames{}); err != nil || res.TooOld != 1 {
			t.Errorf("a sample that is too old by both times: %+v, %v", res, err)
		}
		if got := drain(t, k, s, "central"); len(got) != 0 || len(allHeld(t, s)) != 3 || s.Stats().Expired != 0 {
			t.Errorf("served %v, held %v, %d expired", got, allHeld(t, s), s.Stats().Expired)
		}
		if !stays {
			k.clock.Add(-3 * time.Hour)
			wantHeld(t, "the clock is right again", drain(t, k, s, "central"), pushed("a", points...))
			k.push(s, "a", point{"m", 5, k.clock.ms(0), 1})
			if len(changes) != 2 || changes[0].Size != 3*time.Hour || !changes[1].Reverted {
				t.Errorf("noticed %+v", changes)
			}
			continue
		}
		pass(5 * time.Minute)
		k.push(s, "a", point{"m", 5, k.clock.ms(0), 1})
		s.expireAndCompact(context.Background(), false)
		if st := s.Stats(); st.Expired != 3 || st.ExpiredUnread != 3 {
			t.Errorf("%d expired, %d unread", st.Expired, st.ExpiredUnread)
		}
		if len(changes) != 2 || !changes[1].Accepted {
			t.Errorf("noticed %+v", changes)
		}
	}
}

// The server forgets no consumer by a clock in doubt.
func TestClockInDoubtForgetsNoConsumer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newStoreKit(t, newStoreFS(1))
		k.cfg.Now = func() time.Time { return time.Now().Add(25 * time.Hour) }
		k.cfg.NowInterval = func() PresentTimeRange { return PresentTimeRange{time.Now(), k.cfg.Now()} }
		s := k.open()
		confirm(t, s.Consumers, "central", time.Now(), nil)
		ctx, cancel := context.WithTimeout(t.Context(), 5*maintainEvery)
		defer cancel()
		if err := s.Run(ctx); err != nil || len(cursorsOf(s.Consumers)) != 1 {
			t.Errorf("consumers %v, %v", cursorsOf(s.Consumers), err)
		}
	})
}

// When as many sites are known as may be, the one that is silent longest gives its place
// to a new one, if nothing of it is held.
func TestSilentSiteGivesPlace(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	k.cfg.LimitSites = 3
	s := k.open()
	ids := func() string { return strings.Join(slices.Sorted(maps.Keys(s.sites)), " ") }
	for _, id := range []string{"b", "a", "c"} {
		k.push(s, id, point{"m", 1, k.clock.ms(0), 1})
		k.clock.Add(time.Minute)
	}
	if _, err := s.Append(context.Background(), "d", storePush("d", point{"m", 1, k.clock.ms(0), 1}), ScrapeNames{}); !errors.Is(err, ErrFull) {
		t.Errorf("a fourth: %v", err)
	}
	k.clock.Add(2*time.Hour - time.Minute)
	k.push(s, "c", point{"m", 1, k.clock.ms(0), 1})
	s.expireAndCompact(context.Background(), false)
	k.push(s, "d", point{"m", 1, k.clock.ms(0), 1})
	if ids() != "a c d" {
		t.Errorf("known: %s", ids())
	}
	s.Close()
	s = k.open()
	if ids() != "a c d" || len(k.errors) > 0 {
		t.Errorf("known after a restart: %s; %v", ids(), k.errors)
	}
	k.push(s, "e", point{"m", 1, k.clock.ms(0), 1})
	if _, err := s.Append(context.Background(), "f", storePush("f", point{"m", 1, k.clock.ms(0), 1}), ScrapeNames{}); !errors.Is(err, ErrFull) || ids() != "c d e" {
		t.Errorf("one too many: %v; known: %s", err, ids())
	}
}
