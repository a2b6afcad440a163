package main

// Tests of the ring keeper: how soon a server acts on changes that gossip reports, in virtual time.

import (
	"context"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A member that is alone and has no seeds claims a slot within a gossip interval. A second member
// claims its slot only after quietIntervals intervals in which no member joined or left. The first
// member then has the second member on its ring within an interval.
func TestKeeperClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		a := n.start(t, "a", "10.0.0.1:1", newStoreFS(1))
		checkWithin(t, "the claim of the first member", took(t, "a claims slot 0", func() bool { return a.slot() == 0 && a.members() == 1 }), memInterval)
		restLong()
		b := n.start(t, "b", "10.0.0.2:1", newStoreFS(2), "10.0.0.1:1")
		wait := took(t, "b claims slot 1", func() bool { return b.slot() == 1 })
		checkWithin(t, "the claim of the second member", wait, (quietIntervals+2)*memInterval)
		if wait < quietIntervals*memInterval {
			t.Errorf("the second member claims after %v, want at least %v", wait, quietIntervals*memInterval)
		}
		checkWithin(t, "the first member's new ring", took(t, "a has b on its ring", func() bool { return a.members() == 2 }), memInterval)
		a.kill()
		b.kill()
	})
}

// The channel of Settled is closed only after View has the first ring. So a server that waits for
// this channel knows the owners.
func TestKeeperSettledHasRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemNet().add(t, "a", "10.0.0.1:1", newStoreFS(1))
		views := 0
		m.cfg.OnView = func(*RingView) {
			if views++; views == 1 && m.hasFirstRing() {
				t.Error("Settled is closed before the first view is published")
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- m.Run(ctx) }()
		<-m.Settled()
		if n := m.members(); n != 1 {
			t.Errorf("the ring has %d members when Settled is closed, want 1", n)
		}
		cancel()
		if err := <-ended; err != nil || views == 0 {
			t.Errorf("Run returned %v after %d views", err, views)
		}
		m.conn.close()
	})
}

// When nothing has changed for long, a member's keeper wakes up only once per idleCheck.
// Nevertheless, when another member announces a claim, the keeper saves the claim's number within
// an interval.
func TestKeeperAtRestSavesClaimNumber(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := startPair(t)
		b.gossip.AnnounceClaim(1, 70, false)
		checkWithin(t, "saving a claim number", took(t, "a saves the number", func() bool {
			st, err := LoadRestartState(a.fs, "/s")
			return err == nil && st.MaxLamport == 70
		}), memInterval)
		a.kill()
		b.kill()
	})
}

// When nothing has changed for long, a member's keeper wakes up only once per idleCheck.
// Nevertheless, if the member loses its slot to an earlier claim, it claims another slot within an
// interval.
func TestKeeperAtRestReplacesLostSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := startPair(t)
		a.gossip.AnnounceClaim(0, 90, false)
		took(t, "b hears the claim", func() bool { return b.gossip.View().MaxLamport == 90 })
		restLong()
		b.gossip.AnnounceClaim(0, 80, false)
		checkWithin(t, "replacing a lost slot", took(t, "a claims slot 1", func() bool { return a.slot() == 1 && a.members() == 2 && b.members() == 2 }), memInterval)
		a.kill()
		b.kill()
	})
}

// When nothing has changed for long, a member's keeper wakes up only once per idleCheck.
// Nevertheless it takes another member off its ring within an interval after that member announces
// that it is about to leave, and removes a dead member from its view within ten intervals. OnView
// receives the newest view.
func TestKeeperAtRestActsOnLeaveAndDeath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := startPair(t)
		b.gossip.AnnounceLeaving()
		checkWithin(t, "taking a leaving member off the ring", took(t, "a is alone on its ring", func() bool { return a.members() == 1 }), memInterval)
		restLong()
		b.kill()
		checkWithin(t, "acting on a death", took(t, "a has no other member in its view", func() bool { return len(a.View().Members) == 1 }), 10*memInterval)
		if last := a.last.Load(); last != a.View() {
			t.Errorf("OnView received %+v last, which is not the newest view", last)
		}
		a.kill()
	})
}

// A member that could not save its state because the disk was full saves it within an interval
// after the disk has room again, even if nothing else changes.
func TestKeeperSavesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		a := n.start(t, "a", "10.0.0.1:1", newStoreFS(1))
		took(t, "a claims slot 0", func() bool { return a.slot() == 0 })
		time.Sleep(90 * time.Second)
		synctest.Wait()
		a.fs.hook = failOn("write", "", 0, syscall.ENOSPC)
		a.gossip.AnnounceClaim(0, 9, false)
		time.Sleep(90 * time.Second)
		synctest.Wait()
		if a.errors.Load() == 0 {
			t.Error("OnError received no error")
		}
		a.fs.hook = nil
		if got := took(t, "the state is saved", func() bool {
			st, err := LoadRestartState(a.fs, "/s")
			return err == nil && st.Lamport == 9
		}); got > memInterval {
			t.Errorf("state saved %v after the disk had room, want at most %v", got, memInterval)
		}
		a.kill()
	})
}

// If a member cannot save a claim because the disk is full, it claims the slot within an interval
// after the disk has room again, even if nothing else changes.
func TestKeeperClaimsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := startPair(t)
		a.gossip.AnnounceClaim(0, 90, false)
		took(t, "b hears the claim", func() bool { return b.gossip.View().MaxLamport == 90 })
		restLong()
		a.fs.hook = failOn("write", "", 0, syscall.ENOSPC)
		b.gossip.AnnounceClaim(0, 80, false)
		restLong()
		synctest.Wait()
		if a.errors.Load() == 0 || a.slot() != 0 {
			t.Errorf("got %d errors and slot %d, want some errors and the lost slot 0", a.errors.Load(), a.slot())
		}
		a.fs.hook = nil
		checkWithin(t, "the claim once the disk has room", took(t, "a claims slot 1", func() bool { return a.slot() == 1 }), memInterval)
		a.kill()
		b.kill()
	})
}

// A member that reaches no seed makes a provisional claim after settleIntervals. The claim is no
// longer provisional once the member has received another member's table.
func TestKeeperReachesNoSeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		a := n.start(t, "a", "10.0.0.1:1", newStoreFS(1), "10.0.0.2:1")
		if got := took(t, "a claims slot 0", func() bool { return a.slot() == 0 }); got < settleIntervals*memInterval || got > (settleIntervals+1)*memInterval {
			t.Errorf("claimed after %v, want %v", got, settleIntervals*memInterval)
		}
		if !a.gossip.RestartState().Provisional {
			t.Error("the claim is firm, although no seed was reached")
		}
		b := n.start(t, "b", "10.0.0.2:1", newStoreFS(2))
		took(t, "the claim of a becomes firm", func() bool { return !a.gossip.RestartState().Provisional && a.slot() != b.slot() })
		a.kill()
		b.kill()
	})
}

// No other member claims the slot of a dead member until slotReserved has passed since the death.
func TestKeeperReservesSlots(t *testing.T) {
	for age, want := range map[time.Duration]int{0: 1, slotReserved - time.Second: 1, slotReserved: 0} {
		n := newMemNet()
		a := n.add(t, "a", "10.0.0.1:1", newStoreFS(1), "10.0.0.2:1")
		v := a.gossip.View()
		v.Members = append(v.Members, MemberSnapshot{MemberRecord: MemberRecord{Name: "gone", State: StateDead, Session: 1, Slot: 0, Lamport: 1, Age: uint32(age / time.Second)}})
		a.claimSlot(v)
		if got := a.slot(); got != want {
			t.Errorf("%v after the death of the holder of slot 0: got slot %d, want %d", age, got, want)
		}
	}
}
