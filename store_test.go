package main

// The store as a whole: its directory lock, its maintenance, its limit on sites, concurrent
// use, and the memory that samples take.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// OpenStore refuses a retention that is zero, negative or above MaxRetention.
func TestOpenStoreRetention(t *testing.T) {
	for _, retention := range []time.Duration{0, -1, MaxRetention + 1} {
		k := newStoreKit(t, newStoreFS(1))
		k.cfg.Retention = retention
		if _, err := OpenStore(k.cfg); err == nil {
			t.Errorf("a retention of %v is accepted", retention)
		}
	}
}

// An open store locks its directory, so that OpenStore fails for the same directory. Close unlocks
// the directory.
func TestStoreLocksDirectory(t *testing.T) {
	k := newStoreKit(t, DiskFS{})
	k.cfg.Dir = filepath.Join(t.TempDir(), "new", "dir")
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
	if _, err := OpenStore(k.cfg); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("opening the directory twice: got %v, want that it is in use by another process", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = k.open()
	wantHeld(t, "after Close and open", allHeld(t, s), pushed("a", point{"m", 1, k.clock.ms(0), 1}))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// A store that fails to open unlocks its directory.
func TestOpenStoreFailureUnlocks(t *testing.T) {
	k := newStoreKit(t, DiskFS{})
	k.cfg.Dir = t.TempDir()
	sub := filepath.Join(k.cfg.Dir, "ab")
	notAFile := filepath.Join(sub, "x"+LogSuffix)
	if err := os.MkdirAll(notAFile, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenStore(k.cfg); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Fatalf("a directory with the name of a log: got %v, want that it is not a regular file", err)
	}
	if err := os.Remove(notAFile); err != nil {
		t.Fatal(err)
	}
	s := k.open()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	k.wantNoErrors("after the directory was removed")
}

// Run expires samples, rewrites logs so that pushes are accepted again after they reached the
// storage limit, forgets silent sites, and returns when its context ends.
func TestStoreRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newStoreKit(t, newStoreFS(1))
		k.cfg.Now = time.Now
		k.cfg.LimitStorage = 2000
		s := k.open()
		push := func() error {
			_, err := k.tryPush(s, "a", point{"m", 1, time.Now().UnixMilli(), 1})
			if err != nil && !errors.Is(err, ErrFull) {
				t.Fatal(err)
			}
			return err
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()

		for push() == nil { // push until the storage limit is reached
			time.Sleep(time.Minute)
		}
		synctest.Wait()
		if st := s.Stats(); st.Compactions != 0 || st.Expired != 0 {
			t.Errorf("%d rewrites and %d expired samples before any sample has expired", st.Compactions, st.Expired)
		}

		time.Sleep(time.Hour)
		push()
		synctest.Wait()
		time.Sleep(time.Hour)
		accepted := false
		for range 2 { // the first push may be refused; then Run wakes up and makes room for the second push
			if accepted = push() == nil; accepted {
				break
			}
			synctest.Wait()
		}
		if !accepted {
			t.Errorf("no push is accepted after samples expired: %+v", s.Stats())
		}

		// No Run is active during the 30 days of silence, because a Run that wakes up again and
		// again would make the test take seconds.
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		time.Sleep(forgetAfter)
		ctx, cancel = context.WithCancel(context.Background())
		go func() { done <- s.Run(ctx) }()
		time.Sleep(time.Hour)
		if st := s.Stats(); len(st.Sites) != 0 || st.LogBytes != 0 {
			t.Errorf("%d sites and %d bytes of logs are left after %v of silence", len(st.Sites), st.LogBytes, forgetAfter)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// concurrentRig is a store that many goroutines use at once.
type concurrentRig struct {
	*storeKit
	s *Store
}

// pushRandomly makes pushes for random sites. The context of every fifth push has ended.
func (r *concurrentRig) pushRandomly(ctx context.Context, seed, writer uint64, pushes int) {
	rng := rand.New(rand.NewPCG(seed, writer))
	for i := range pushes {
		id := fmt.Sprint("c", rng.IntN(5))
		var points []point
		for range 4 {
			points = append(points, point{"m", rng.IntN(60), r.clock.ms(rng.IntN(3)), 1})
		}
		wait, stop := context.WithCancel(ctx)
		if i%5 == 0 {
			stop()
		}
		_, err := r.s.Append(wait, id, storePush(id, points...), ScrapeNames{}, false)
		stop()
		if err != nil && !errors.Is(err, ErrFull) && !errors.Is(err, context.Canceled) {
			r.t.Errorf("push: %v", err)
		}
		r.clock.Add(400 * time.Millisecond)
	}
}

// rewriteLogs runs maintenance and rewrites all logs in a loop until ctx ends.
func (r *concurrentRig) rewriteLogs(ctx context.Context) {
	for n := 0; ctx.Err() == nil; n++ {
		r.s.expireAndCompact(ctx, n%2 == 0)
		for _, c := range r.s.sitesByID() {
			if c.Lock(ctx) != nil {
				continue
			}
			if !c.removed {
				if err := c.RewriteLog(nil, r.s.KeptSince()); err != nil {
					r.t.Errorf("rewrite: %v", err)
				}
			}
			c.Unlock()
		}
	}
}

// scrape reads the newest samples in a loop until ctx ends.
func (r *concurrentRig) scrape(ctx context.Context) {
	for ctx.Err() == nil {
		fams, _ := scraper(r.s, time.Minute).NewestPerSeries(100, nil)
		for _, f := range fams {
			for l := range f.Samples {
				if !bytes.HasPrefix(l.Line, []byte("m{_id=")) || l.Line[len(l.Line)-1] != '}' {
					r.t.Errorf("a scrape got the line %q", l.Line)
				}
			}
		}
		r.s.Stats()
	}
}

// Pushes, scrapes, maintenance, evictions and rewrites run at the same time without an error or,
// under the race detector, a race. A Close during pushes loses nothing: after a restart, a store on
// disk has every sample that it held when it was closed.
func TestStoreConcurrent(t *testing.T) {
	seed := testSeed(t, 1)
	const writers, limit = 8, 800
	for _, dir := range []string{filepath.Join(t.TempDir(), "disk"), ""} {
		k := newStoreKit(t, DiskFS{})
		k.cfg.Dir, k.cfg.LimitSamples, k.cfg.LimitSeries, k.cfg.MaxSampleAge = dir, limit, 40, time.Second
		s := k.open()
		r := &concurrentRig{k, s}
		ctx, cancel := context.WithCancel(context.Background())
		var work, background sync.WaitGroup
		for w := range uint64(writers) {
			work.Go(func() { r.pushRandomly(ctx, seed, w, 120) })
		}
		background.Go(func() { r.rewriteLogs(ctx) })
		background.Go(func() { r.scrape(ctx) })
		background.Go(func() {
			if err := s.Run(ctx); err != nil {
				t.Errorf("Run: %v", err)
			}
		})
		work.Wait()
		cancel()
		background.Wait()
		// Each writer may exceed the limit by one push, because makeRoom does not reserve the room
		// that it has made.
		if held := allHeld(t, s); len(held) > limit+4*writers || s.Stats().Evicted == 0 {
			t.Errorf("%d samples are held with a limit of %d; %d were evicted", len(held), limit, s.Stats().Evicted)
		}
		push := func() error {
			_, err := k.tryPush(s, "c1", point{"m", 1, k.clock.ms(0), 1})
			return err
		}
		for range 3 { // each push is refused or durable
			work.Go(func() { push() })
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		work.Wait()
		if err := push(); !errors.Is(err, ErrClosed) {
			t.Errorf("a push after Close: got %v, want ErrClosed", err)
		}
		k.wantNoErrors("concurrent use")
		if dir == "" {
			continue
		}
		held := allHeld(t, s)
		k.cfg.LimitSamples = 0
		s = k.open()
		got := allHeld(t, s)
		for key := range held {
			if _, ok := got[key]; !ok {
				t.Errorf("%v is lost after a restart", key)
			}
		}
		if n := s.Stats().DamagedLogs; n > 0 {
			t.Errorf("%d logs are damaged after a restart: %v", n, k.errors)
		}
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
}

// At the limit on sites, the first push of another site is refused while all known sites have
// samples. A site whose first push stores nothing does not count towards the limit. Recovery reads
// all sites, even above the limit.
func TestStoreSiteLimit(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSites = 2
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
	for i := range 3 {
		if res, err := k.tryPush(s, fmt.Sprint("x", i), point{"m", 1, k.clock.ms(9999), 1}); err != nil || res.TooOld != 1 {
			t.Fatalf("a push of an expired sample: %+v, %v", res, err)
		}
	}
	k.push(s, "b", point{"m", 1, k.clock.ms(0), 1})
	if _, err := k.tryPush(s, "c", point{"m", 1, k.clock.ms(0), 1}); !errors.Is(err, ErrFull) {
		t.Errorf("the first push of a third site: got %v, want ErrFull", err)
	}
	k.clock.Add(time.Second)
	k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
	k.cfg.LimitSites = 1
	if s = k.open(); len(s.sites) != 2 {
		t.Errorf("%d sites after recovery with a limit of 1, want 2", len(s.sites))
	}
}

// At the limit on sites, a new site replaces the site without samples that has been silent longest.
// A site with samples is not replaced.
func TestStoreSiteLimitForgetsSilentSite(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	k.cfg.LimitSites = 3
	s := k.open()
	wantSites := func(when, want string) {
		t.Helper()
		if got := strings.Join(slices.Sorted(maps.Keys(s.sites)), " "); got != want {
			t.Errorf("%s: sites %s are known, want %s", when, got, want)
		}
	}
	push := func(id string) error {
		_, err := k.tryPush(s, id, point{"m", 1, k.clock.ms(0), 1})
		return err
	}
	for _, id := range []string{"b", "a", "c"} {
		k.push(s, id, point{"m", 1, k.clock.ms(0), 1})
		k.clock.Add(time.Minute)
	}
	if err := push("d"); !errors.Is(err, ErrFull) {
		t.Errorf("a fourth site while all have samples: got %v, want ErrFull", err)
	}
	k.clock.Add(2*time.Hour - time.Minute)
	k.push(s, "c", point{"m", 1, k.clock.ms(0), 1})
	s.expireAndCompact(context.Background(), false)
	k.push(s, "d", point{"m", 1, k.clock.ms(0), 1})
	wantSites("after a push of d", "a c d")
	s.Close()
	s = k.open()
	wantSites("after a restart", "a c d")
	k.wantNoErrors("after a restart")
	k.push(s, "e", point{"m", 1, k.clock.ms(0), 1})
	if err := push("f"); !errors.Is(err, ErrFull) {
		t.Errorf("a sixth site while all have samples: got %v, want ErrFull", err)
	}
	wantSites("at the end", "c d e")
}

// A site without a push for 30 days is forgotten, and its log is removed. If the removal fails,
// maintenance tries again. A later push of the site creates it anew.
func TestSilentSiteIsForgotten(t *testing.T) {
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
		t.Fatalf("%d sites are known before the 30 days are over, want 2", n)
	}
	k.push(s, "b", point{"m", 1, k.clock.ms(0), 2})
	k.clock.Add(time.Minute)
	fsys.hook = failOn("syncdir", "", 1, errDisk)
	s.expireAndCompact(context.Background(), false)
	if len(k.errors) != 1 || len(s.sites) != 2 {
		t.Errorf("after the removal failed: errors %v, %d sites; want 1 error and 2 sites", k.errors, len(s.sites))
	}
	s.expireAndCompact(context.Background(), false)
	if st := s.Stats().Sites; len(st) != 1 || st[0].ID != "b" {
		t.Errorf("after the second attempt: sites %+v; want b", st)
	}
	allHeld(t, s)
	if path := s.logPathOf("a"); fsys.entries[path] != nil || fsys.durable[path] != nil {
		t.Errorf("the log of site a is still there: %v", fsys.names())
	}
	fsys.crash()
	s = k.open()
	if len(s.sites) != 1 || len(k.errors) != 1 {
		t.Errorf("after a crash: %d sites, errors %v; want 1 site and 1 error", len(s.sites), k.errors)
	}
	k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
}

// BenchmarkMemory reports the bytes of memory that each series takes with its first sample, and the
// bytes of memory and of disk that each further sample takes.
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
				if _, err := s.Append(context.Background(), id, p, ScrapeNames{}, false); err != nil {
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

// The store flushes a push before Append returns, unless its sender keeps it: a push that names scrapes
// and need not be synced, while a consumer is known. A push that adds nothing is flushed too if the log has bytes that are not
// flushed. Close flushes every log that has such bytes.
func TestStoreFlushes(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	k.cfg.Retention = 48 * time.Hour
	s := k.open()
	at, syncs := k.clock.ms(0), 0
	fsys.hook = func(_ int, op, name string) fault {
		if op == "sync" && filepath.Dir(name) != "/s" {
			syncs++
		}
		return fault{}
	}
	for i, step := range []struct {
		site     string // "": a consumer scrapes
		names    ScrapeNames
		n        int // the push has one sample of series n
		mustSync bool
		kept     bool
		syncs    int
		idle     bool // before the push, no consumer scrapes for so long that the store forgets the consumer
	}{
		{"curl", ScrapeNames{}, 1, false, false, 1, false},
		{"curl", ScrapeNames{}, 1, false, false, 0, false}, // everything is flushed already
		{"client", names1(1), 1, false, false, 1, false},   // no consumer is known yet
		{"client", names1(1), 1, false, false, 0, false},
		{}, // a consumer scrapes
		{"client", names1(2), 2, false, true, 0, false},
		{"client", names1(2), 2, false, true, 0, false},
		{"client", ScrapeNames{}, 2, false, false, 1, false}, // repeats a sample that is not flushed
		{"client", ScrapeNames{}, 2, false, false, 0, false},
		{"client", names1(3), 3, false, true, 0, false},
		{"client", ScrapeNames{1, nil}, 4, false, false, 1, false},
		{"new", names1(1), 1, false, true, 0, false},
		{"new", names1(2), 2, false, true, 0, false},
		{"curl", names1(1), 2, false, false, 1, false}, // the first spool of this log
		{"curl", names1(2), 3, false, true, 0, false},
		{"client", names1(4), 5, true, false, 1, false},
		{"client", names1(5), 6, false, true, 0, false},
		{"client", names1(5), 6, true, false, 1, false}, // repeats a push that is not flushed
		{"client", names1(6), 7, false, true, 0, false},
		{"client", names1(6), 7, false, false, 1, true}, // repeats a push that is not flushed
		{"client", names1(6), 7, false, false, 0, false},
	} {
		if step.site == "" {
			drain(t, k, s, "central")
			continue
		}
		if step.idle {
			k.clock.Add(consumerIdle + time.Minute)
			s.Consumers.DropIdle(k.clock.Now())
		}
		syncs = 0
		res, err := s.Append(context.Background(), step.site, storePush(step.site, point{"m", step.n, at, 1}), step.names, step.mustSync)
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if res.KeptBySender != step.kept || syncs != step.syncs {
			t.Errorf("step %d: kept by the sender: %t, %d syncs; want %t, %d", i, res.KeptBySender, syncs, step.kept, step.syncs)
		}
	}
	held := allHeld(t, s)
	syncs = 0
	if err := s.Close(); err != nil || syncs != 2 {
		t.Errorf("Close: %v, %d syncs, want 2: the log of site client is flushed", err, syncs)
	}
	fsys.crash()
	wantHeld(t, "after Close and a crash", allHeld(t, k.open()), held)
	k.wantNoErrors("after Close and a crash")
}

// If a log cannot be flushed, Append refuses a push that needs it, even if the push adds nothing. The
// log is then rewritten from memory. Close reports a log that it cannot flush.
func TestStoreFlushFails(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	drain(t, k, s, "central")
	pt := point{"m", 1, k.clock.ms(0), 1}
	k.pushNamed(s, "a", names1(1), pt)
	fsys.hook = failOn("sync", LogSuffix, 1, errDisk)
	if _, err := k.tryPush(s, "a", pt); !errors.Is(err, errDisk) {
		t.Fatalf("a repeated push whose flush fails: got error %v, want %v", err, errDisk)
	}
	if res, err := k.tryPush(s, "a", pt); err != nil || res.Duplicates != 1 {
		t.Fatalf("the push again: %+v, %v", res, err)
	}
	fsys.hook = failOn("sync", "", 1, errDisk)
	k.pushNamed(s, "a", names1(2), point{"m", 2, k.clock.ms(0), 1})
	if s.Close(); len(k.errors) != 1 || !errors.Is(k.errors[0], errDisk) {
		t.Errorf("Close with a log that cannot be flushed: reported %v, want one error", k.errors)
	}
	fsys.crash()
	if got := allHeld(t, k.open()); len(got) == 0 {
		t.Error("the sample of the acknowledged push is lost")
	}
}
