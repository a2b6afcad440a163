package main

// The lock of a site. A push that waits for the lock gives up when its request ends or the
// store closes.

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
)

// waitingPush pushes one sample for site a. The push waits while another caller holds the site's
// lock.
func waitingPush(ctx context.Context, k *storeKit, s *Store) error {
	_, err := s.Append(ctx, "a", storePush("a", point{"m", 1, k.clock.ms(0), 1}), ScrapeNames{}, false)
	return err
}

// A push whose context has ended does not wait for a site's lock.
func TestSiteLockEndsWithContext(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	if _, err := s.acquireSite(context.Background(), "a"); err != nil { // hold the site's lock, as a push in progress does
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := waitingPush(ctx, k, s); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

// Pushes that wait while the first push of their site fails succeed, although the failed push drops
// the site.
func TestSiteLockAfterFailedFirstPush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newStoreKit(t, newStoreFS(1))
		s := k.open()
		c, err := s.acquireSite(context.Background(), "a")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 2)
		for range 2 {
			go func() { done <- waitingPush(context.Background(), k, s) }()
		}
		synctest.Wait() // both pushes wait for the lock
		s.releaseAndDropIfNew(c)
		for range 2 {
			if err := <-done; err != nil {
				t.Errorf("a push that waited: %v", err)
			}
		}
		if n := len(allHeld(t, s)); n != 1 {
			t.Errorf("%d samples are held, want 1", n)
		}
	})
}

// A first push that stores nothing leaves no site behind, even if its context has ended.
func TestSiteLockWithEndedContextLeavesNoSite(t *testing.T) {
	k := newStoreKit(t, newStoreFS(1))
	s := k.open()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for i := range 50 {
		id := fmt.Sprint("x", i)
		_, err := s.Append(ctx, id, storePush(id, point{"m", 1, k.clock.ms(9999), 1}), ScrapeNames{}, false)
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	if len(s.sites) != 0 {
		t.Errorf("%d sites are known, want 0", len(s.sites))
	}
}

// When the store closes, a push that waits for a site's lock gets ErrClosed. Close returns only
// after the push that holds the lock has ended.
func TestSiteLockEndsWithStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newStoreKit(t, newStoreFS(1))
		s := k.open()
		c, err := s.acquireSite(context.Background(), "a")
		if err != nil {
			t.Fatal(err)
		}
		waiting, closed := make(chan error, 1), make(chan error, 1)
		go func() { waiting <- waitingPush(context.Background(), k, s) }()
		synctest.Wait()
		go func() { closed <- s.Close() }()
		synctest.Wait()
		if err := <-waiting; !errors.Is(err, ErrClosed) {
			t.Errorf("the waiting push: got %v, want ErrClosed", err)
		}
		select {
		case <-closed:
			t.Error("Close returned while a push held a lock")
		default:
		}
		s.releaseAndDropIfNew(c)
		if err := <-closed; err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}
