package main

// The limit on samples. The store evicts the oldest batches that every consumer has read and
// no scrape shows; if that is not enough, it refuses the push. One site cannot take the room
// of all sites.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"testing"
	"time"
)

// filledStore returns a store with a limit of 64 samples, after 400 samples were pushed to sites
// a and b. No consumer is known. dir "" is memory-only mode.
func filledStore(t *testing.T, dir string) (*storeKit, *Store) {
	t.Helper()
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.Dir, k.cfg.LimitSamples = dir, 64
	s := k.open()
	for i := range 100 {
		for _, id := range []string{"a", "b"} {
			k.push(s, id, point{"m", 1, k.clock.ms(0), float64(i)}, point{"m", 2, k.clock.ms(0), float64(i)})
		}
		k.clock.Add(15 * time.Second)
		if n := s.totals.Samples.Load(); n > 64 {
			t.Fatalf("%d samples are held; the limit is 64", n)
		}
	}
	return k, s
}

// storeDirs are the directories with which tests run: one for a store on disk, and "" for
// memory-only mode.
var storeDirs = []string{"/s", ""}

// At the limit, the store evicts the oldest batches of all sites, and counts their samples.
func TestStoreSampleLimitEvictsOldest(t *testing.T) {
	for _, dir := range storeDirs {
		k, s := filledStore(t, dir)
		held := allHeld(t, s)
		if len(held) < 64-64/8 { // an eighth of the limit may stay free for other sites
			t.Errorf("directory %q: only %d samples are held", dir, len(held))
		}
		for key := range held {
			if key.t < k.clock.ms(15*17) { // filledStore pushes 4 samples every 15 s, so that the limit of 64 has room for the newest 16 rounds
				t.Errorf("directory %q: %v is held although newer samples were evicted", dir, key)
			}
		}
		if got := s.Stats().Evicted; got != 400-int64(len(held)) {
			t.Errorf("directory %q: %d samples of 400 are held, and %d were evicted", dir, len(held), got)
		}
	}
}

// A push that is larger than the limit is refused and evicts nothing.
func TestStoreSampleLimitRefusesLargePush(t *testing.T) {
	for _, dir := range storeDirs {
		k, s := filledStore(t, dir)
		held := allHeld(t, s)
		if _, err := k.tryPush(s, "c", k.series("large", 65)...); !errors.Is(err, ErrFull) {
			t.Errorf("directory %q: got %v, want ErrFull", dir, err)
		}
		wantHeld(t, "after the refused push", allHeld(t, s), held)
	}
}

// The store evicts no sample that a scrape still shows. It refuses a push instead, and accepts
// pushes once the samples are too old to be shown.
func TestStoreSampleLimitKeepsShownSamples(t *testing.T) {
	for _, dir := range storeDirs {
		k, s := filledStore(t, dir)
		k.push(s, "c", k.series("large", 40)...) // scrapes show these 40 samples, so that at most the other 24 of 64 samples can be evicted
		if _, err := k.tryPush(s, "d", k.series("large", 30)...); !errors.Is(err, ErrFull) {
			t.Errorf("directory %q: got %v, want ErrFull", dir, err)
		}
		for key, v := range pushed("c", k.series("large", 40)...) {
			if got := shown(s, time.Hour); got[key] != v {
				t.Fatalf("directory %q: %v is no longer shown", dir, key)
			}
		}
		for _, id := range []string{"a", "b"} {
			if len(heldOf(t, s, id)) == 0 {
				t.Errorf("directory %q: site %s lost samples that scrapes show", dir, id)
			}
		}
		k.clock.Add(11 * time.Minute) // MaxSampleAge is 10 minutes
		k.push(s, "d", point{"m", 1, k.clock.ms(0), 1})
	}
}

// Recovery evicts samples too. It then holds no more samples than the limit, if enough batches are
// read and no longer shown.
func TestStoreSampleLimitInRecovery(t *testing.T) {
	k, s := filledStore(t, "/s")
	k.push(s, "c", k.series("large", 40)...)
	k.clock.Add(11 * time.Minute)
	k.push(s, "d", point{"m", 1, k.clock.ms(0), 1})
	if s = k.open(); s.totals.Samples.Load() > 64 {
		t.Errorf("%d samples are held after recovery; the limit is 64", s.totals.Samples.Load())
	}
	allHeld(t, s)
}

// roomRig returns a store of 1000 samples in 20 sites. The store is at its limit and knows two
// consumers. Consumer fast has read all batches. Consumer slow has read the first half of each
// site's batches. The samples are too old for scrapes to show them as newest samples.
func roomRig(t *testing.T) (*storeKit, *Store) {
	t.Helper()
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.Dir, k.cfg.LimitSamples = "", 1000
	s := k.open()
	readBySlow, readByFast := map[uint64]uint64{}, map[uint64]uint64{}
	for i := range 50 {
		for c := range 20 {
			id := fmt.Sprint("c", (c*7+i)%20)
			k.push(s, id, point{"m", 1, k.clock.ms(0), float64(i)})
			k.clock.Add(time.Second)
			if readByFast[SiteKey(id)] = s.sites[id].data.Seq; i < 25 {
				readBySlow[SiteKey(id)] = s.sites[id].data.Seq
			}
		}
	}
	k.clock.Add(k.cfg.MaxSampleAge)
	confirm(t, s.Consumers, "fast", k.clock.Now(), readByFast)
	confirm(t, s.Consumers, "slow", k.clock.Now(), readBySlow)
	return k, s
}

// makeRoom evicts batches in the order in which the store accepted them, over all sites.
func TestMakeRoomEvictsOldestOfAllSites(t *testing.T) {
	_, s := roomRig(t)
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
				t.Fatalf("%v was evicted, and a sample of time %d was kept", key, oldest)
			}
		}
		s.cfg.LimitSamples = int(s.totals.Samples.Load())
	}
}

// makeRoom evicts no batch that a consumer has not read. It returns ErrFull instead.
func TestMakeRoomKeepsUnread(t *testing.T) {
	_, s := roomRig(t)
	if err := s.makeRoom(nil, 800); !errors.Is(err, ErrFull) {
		t.Errorf("got %v, want ErrFull", err)
	}
	if n := len(allHeld(t, s)); n != 500 {
		t.Errorf("%d samples are held; consumer slow has not read 500", n)
	}
}

// If makeRoom found too little to evict, it searches for batches to evict again only after
// roomPause.
func TestMakeRoomPauses(t *testing.T) {
	k, s := roomRig(t)
	if err := s.makeRoom(nil, 800); !errors.Is(err, ErrFull) {
		t.Fatalf("got %v, want ErrFull", err)
	}
	confirm(t, s.Consumers, "slow", k.clock.Now(), map[uint64]uint64{SiteKey("c1"): s.sites["c1"].data.Seq})
	s.cfg.LimitSamples = 500
	if err := s.makeRoom(nil, 1); !errors.Is(err, ErrFull) {
		t.Errorf("a second search at once: got %v, want ErrFull", err)
	}
	k.clock.Add(roomPause)
	if err := s.makeRoom(nil, 1); err != nil || s.totals.Samples.Load() >= 500 {
		t.Errorf("after the pause: %v, %d samples are held", err, s.totals.Samples.Load())
	}
}

// If there are several sites, a site that would hold more than its share of the limit on samples
// cannot use the last eighth of the limit. The other sites can.
func TestStoreSampleLimitIsShared(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSamples = 800
	s := k.open()
	for i := range 9 {
		k.push(s, fmt.Sprint("small-", i), point{"m", 1, k.clock.ms(0), 1})
	}
	for i, step := range []struct {
		site string
		want int // accepted samples until the first ErrFull
	}{
		{"large", 700 - 9},
		{"small-0", 80 - 1}, // the site's share is a tenth of the limit, and the site already has one sample
		{"large", 0},
		{"new", 800 - 700 - 79},
	} {
		accepted := 0
		for n := range 1000 {
			res, err := k.tryPush(s, step.site, point{"m", n, k.clock.ms(0), 1})
			if accepted += res.Accepted; err == nil {
				continue
			}
			if !errors.Is(err, ErrFull) {
				t.Fatal(err)
			}
			break
		}
		if accepted != step.want {
			t.Errorf("step %d: site %s got %d samples accepted, want %d", i, step.site, accepted, step.want)
		}
	}
	allHeld(t, s)
}

// The store evicts no batch that its only consumer has not read, even if the state file or the file
// of the cursors is lost or damaged. It refuses pushes over the limit until the consumer has read
// the samples.
func TestNothingUnreadIsEvicted(t *testing.T) {
	flip := func(at int) func(data []byte) []byte {
		return func(data []byte) []byte {
			data = bytes.Clone(data)
			data[(at+len(data))%len(data)] ^= 4
			return data
		}
	}
	type damage struct {
		name, path string
		change     func(data []byte) []byte // nil: the file is removed
	}
	tests := []damage{{"unchanged", consumersPath, slices.Clone[[]byte]}}
	for _, path := range []string{consumersPath, statePath} {
		tests = append(tests, damage{"removed", path, nil}, damage{"emptied", path, func([]byte) []byte { return []byte{} }})
		for _, at := range []int{0, 10, 30, 45, -1} {
			tests = append(tests, damage{fmt.Sprint("flipped at ", at), path, flip(at)})
		}
	}
	for _, test := range tests {
		t.Run(test.path+" "+test.name, func(t *testing.T) {
			fsys := newStoreFS(1)
			k := newStoreKit(t, fsys)
			// 91 samples will be held. Only one of them is read, so that eviction cannot make room
			// for a push of 10 samples.
			k.cfg.LimitSamples = 95
			s := k.open()
			begin := k.clock.ms(0)
			k.push(s, "a", point{"m", 0, begin, -1})
			drain(t, k, s, "central")
			k.clock.Add(20 * time.Minute) // no scrape shows the sample any more
			want := map[heldSample]float64{}
			push := func(s *Store, value int) error {
				k.clock.Add(time.Second)
				var points []point
				for n := range 10 {
					points = append(points, point{"m", n, k.clock.ms(0), float64(value)})
				}
				_, err := k.tryPush(s, "a", points...)
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
			changeFile(t, fsys, test.path, test.change)
			k.clock.Add(20 * time.Minute)
			s = k.open()
			for i := range 3 {
				if err := push(s, 20+i); !errors.Is(err, ErrFull) {
					t.Errorf("push %d over the limit: got %v, want ErrFull", i, err)
				}
				k.clock.Add(roomPause)
			}
			got := drain(t, k, s, "central")
			for key := range pushed("a", point{"m", 0, begin, -1}) {
				delete(got, key) // consumer central read this sample before the damage; after some kinds of damage the store serves it again
			}
			wantHeld(t, "read after the damage", got, want)
			k.clock.Add(roomPause)
			if err := push(s, 30); err != nil {
				t.Errorf("a push after all samples were read: %v", err)
			}
			if st := s.Stats(); st.Evicted == 0 || st.ExpiredUnread > 0 {
				t.Errorf("%d samples were evicted, and %d expired unread", st.Evicted, st.ExpiredUnread)
			}
		})
	}
}

// changeFile replaces the content of a file by the result of change. If change is nil, it removes
// the file.
func changeFile(t *testing.T, fsys *crashFS, path string, change func(data []byte) []byte) {
	t.Helper()
	data, err := fsys.ReadFile(path)
	if err == nil && change == nil {
		err = fsys.Remove(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		fsys.put(path, change(data))
	}
}

// If no consumer was ever known, recovery under a lowered limit evicts old batches. A series that
// was pushed until the end keeps its newest sample.
func TestEvictionWithoutConsumers(t *testing.T) {
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
		t.Errorf("%d samples were evicted, and %d of 90 are held", st.Evicted, s.totals.Samples.Load())
	}
	data := &s.sites["a"].data
	for n := 1; n <= 2; n++ {
		line := fmt.Sprintf(`m{_id="a",instance="",job="",n="%d"}`, n)
		if newest, value := data.Table.Newest(mustFind(data, line)); newest != k.clock.ms(60) || value != 29 {
			t.Errorf("the newest sample of %s is %v at %d, want 29 at %d", line, value, newest, k.clock.ms(60))
		}
	}
}

// Evicted samples do not come back when the log is rewritten, nor at a restart after that rewrite.
func TestEvictedSamplesStayGone(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSamples = 10
	s := k.open()
	for i := range 12 {
		k.push(s, "a", point{"m", i, k.clock.ms(0), float64(i)})
		k.clock.Add(time.Hour / 6)
	}
	held := allHeld(t, s)
	s.expireAndCompact(context.Background(), true)
	rewriteLog(t, s, "a")
	wantHeld(t, "after the rewrite", allHeld(t, s), held)
	wantHeld(t, "after a restart", allHeld(t, k.open()), held)
}

// BenchmarkMakeRoom measures makeRoom when it can evict every batch, and when it can evict none
// because a consumer has read none. In the second case makeRoom looks at every site.
func BenchmarkMakeRoom(b *testing.B) {
	for _, sites := range []int{1000, 4000} {
		for _, unread := range []bool{true, false} {
			b.Run(fmt.Sprintf("%d sites, unread %t", sites, unread), func(b *testing.B) {
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
