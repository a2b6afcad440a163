package main

// Rewrites of a site's log: when they happen, which samples they keep, and how they make room at
// the limit on storage. Samples can be evicted during a rewrite, and a site can be forgotten while
// a caller waits for its lock.

import (
	"context"
	"errors"
	"maps"
	"testing"
	"testing/synctest"
	"time"
)

// Maintenance rewrites a log that cannot be appended to because a sync failed.
func TestStoreMaintenanceRewritesBrokenLog(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	k.push(s, "a", point{"m", 1, k.clock.ms(60), 1})
	fsys.hook = failOn("sync", ".log", 1, errDisk)
	if _, err := k.tryPush(s, "a", point{"m", 1, k.clock.ms(50), 2}); !errors.Is(err, errDisk) {
		t.Fatalf("push while the sync fails: got %v, want %v", err, errDisk)
	}
	fsys.restart()
	s.expireAndCompact(context.Background(), false)
	if s.sites["a"].log.MustBeRewritten() {
		t.Error("after maintenance the log still has to be rewritten")
	}
	k.wantNoErrors("maintenance")
	fsys.crash()
	wantHeld(t, "after a crash", allHeld(t, k.open()), pushed("a", point{"m", 1, k.clock.ms(60), 1}))
}

// Maintenance rewrites a log once about half of its bytes are of expired samples. The rewrite loses
// no sample within retention, and LogBytes is the size of the new file.
func TestStoreMaintenanceCompactsLog(t *testing.T) {
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
		t.Errorf("the log has %d bytes, the store counts %d, and a rewritten log would have %d", len(data), size, live)
	}
	if n := s.Stats().Compactions; n < 2 || n > 20 {
		t.Errorf("%d rewrites, want 2 to 20", n)
	}
	want := allHeld(t, s)
	if len(want) < 2*480 {
		t.Errorf("%d samples are held; two hours have %d", len(want), 2*480)
	}
	if n := s.Stats().Expired; n != 8000-int64(len(want)) {
		t.Errorf("%d samples of 8000 are held, and %d are counted as expired", len(want), n)
	}
	wantHeld(t, "after a restart", allHeld(t, k.open()), want)
}

// At the limit on storage, pushes are refused with ErrFull and the logs stay within the limit. Once
// samples expire, rewrites make room and pushes are accepted again.
func TestStoreStorageLimit(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	k.cfg.LimitStorage = 64 << 10
	s := k.open()
	maintain := func() { // does what Run does at its intervals
		select {
		case <-s.compactNow:
			s.expireAndCompact(t.Context(), true)
		default:
			s.expireAndCompact(t.Context(), false)
		}
	}
	accepted, refused := 0, 0
	for range 1500 {
		var points []point
		for n := range 100 {
			points = append(points, point{"m", n, k.clock.ms(0), 1})
		}
		switch _, err := k.tryPush(s, "a", points...); {
		case err == nil:
			accepted++
		case errors.Is(err, ErrFull):
			refused++
		default:
			t.Fatal(err)
		}
		if n := s.Stats().LogBytes; n > k.cfg.LimitStorage {
			t.Fatalf("the logs have %d bytes; the limit is %d", n, k.cfg.LimitStorage)
		}
		maintain()
		k.clock.Add(30 * time.Second)
	}
	allHeld(t, s)
	// The limit of 64 KiB has room for about 70 pushes of 100 samples. Samples of 240 pushes are
	// within retention.
	if held := s.totals.Samples.Load(); refused == 0 || accepted < 350 || held < 50*100 {
		t.Errorf("%d pushes were accepted and %d refused; %d samples are held in the end", accepted, refused, held)
	}
}

// An evicted sample can be pushed again, and is then in the log twice until a rewrite. Recovery
// holds the sample once.
func TestEvictedSampleComesBack(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	at := k.clock.ms(0)
	k.push(s, "x", point{"m", 1, at, 1}, point{"m", 2, at, 2})
	k.push(s, "x", point{"m", 1, at + 1, 3})
	evictOldest(t, s, "x")
	k.push(s, "x", point{"m", 1, at, 1}, point{"m", 1, at + 2, 4})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = k.open()
	defer s.Close()
	want := pushed("x", point{"m", 1, at, 1}, point{"m", 2, at, 2}, point{"m", 1, at + 1, 3}, point{"m", 1, at + 2, 4})
	got := map[heldSample]float64{}
	n := 0
	s.ViewSite("x", func(held *SiteSamples) {
		for _, b := range held.Batches {
			for i, id := range b.IDs {
				got[heldSample{string(held.Table.Line(id)), b.Time(i)}] = b.V[i]
				n++
			}
		}
	})
	if !maps.Equal(got, want) || n != len(want) {
		t.Errorf("after recovery %d samples are held: %v; want %v", n, got, want)
	}
}

// Samples that are evicted during a rewrite of the log are not in memory after the rewrite.
func TestEvictionDuringRewrite(t *testing.T) {
	fsys := newStoreFS(1)
	k := newStoreKit(t, fsys)
	s := k.open()
	var points []point
	for i := range 3 {
		points = append(points, point{"m", 1, k.clock.ms(100 - i), float64(i)})
		k.push(s, "a", points[i])
	}
	evicted := int64(0)
	fsys.hook = func(_ int, op, _ string) fault {
		if op == "rename" {
			n, _ := s.sites["a"].TryEvictOldestBatch(k.clock.ms(0))
			evicted += n
		}
		return fault{}
	}
	rewriteLog(t, s, "a")
	if evicted != 1 {
		t.Fatalf("%d samples were evicted during the rewrite, want 1", evicted)
	}
	wantHeld(t, "after the rewrite", allHeld(t, s), pushed("a", points[1:]...))
}

// While a caller waits for a site's lock, the site can be forgotten, and created again by a push.
// The caller then leaves the old site alone, and the log of the new site loses nothing.
func TestForgottenWhileWaiting(t *testing.T) {
	for name, do := range map[string]func(k *storeKit, s *Store) error{
		"maintenance": func(_ *storeKit, s *Store) error { s.expireAndCompact(context.Background(), true); return nil },
		"push": func(k *storeKit, s *Store) error {
			_, err := k.tryPush(s, "a", point{"m", 2, s.cfg.Now().UnixMilli(), 2})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fsys := newStoreFS(1)
				k := newStoreKit(t, fsys)
				s := k.open()
				k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
				k.clock.Add(forgetAfter + time.Hour)
				c, err := s.acquireSite(t.Context(), "a")
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan error)
				go func() { done <- do(k, s) }()
				synctest.Wait() // the goroutine waits for the site's lock in do
				c.DropExpired(s.KeptSince())
				if err := c.RemoveLog(); err != nil {
					t.Fatal(err)
				}
				s.dropEmptySite(c)
				k.push(s, "a", point{"m", 1, k.clock.ms(0), 1})
				c.Unlock()
				if err := <-done; err != nil {
					t.Error(err)
				}
				want := pushed("a", point{"m", 1, k.clock.ms(0), 1})
				if name == "push" {
					maps.Copy(want, pushed("a", point{"m", 2, k.clock.ms(0), 2}))
				}
				wantHeld(t, "after the wait", allHeld(t, s), want)
				fsys.crash()
				wantHeld(t, "after a crash", allHeld(t, k.open()), want)
			})
		})
	}
}
