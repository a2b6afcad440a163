package main

// How soon a server acts on what gossip hears, in virtual time over a network in memory.

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// memNet carries datagrams between sockets in memory.
type memNet struct {
	mu   sync.Mutex // guards it all
	conn map[netip.AddrPort]*memConn
}

type memDatagram struct {
	data []byte
	from netip.AddrPort
}

type memConn struct {
	net    *memNet
	addr   netip.AddrPort
	wake   sync.Cond
	queue  []memDatagram
	until  time.Time
	timer  *time.Timer
	closed bool
}

func (n *memNet) listen(addr string) *memConn {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := &memConn{net: n, addr: netip.MustParseAddrPort(addr)}
	c.wake.L = &n.mu
	n.conn[c.addr] = c
	return c
}

func (c *memConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	for len(c.queue) == 0 {
		switch {
		case c.closed:
			return 0, netip.AddrPort{}, net.ErrClosed
		case !c.until.IsZero() && !c.until.After(time.Now()):
			return 0, netip.AddrPort{}, os.ErrDeadlineExceeded
		}
		c.wake.Wait()
	}
	d := c.queue[0]
	c.queue = c.queue[1:]
	return copy(b, d.data), d.from, nil
}

func (c *memConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if o := c.net.conn[to]; o != nil && !o.closed {
		o.queue = append(o.queue, memDatagram{append([]byte(nil), b...), c.addr})
		o.wake.Broadcast()
	}
	return len(b), nil
}

func (c *memConn) SetReadDeadline(t time.Time) error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
	}
	c.until, c.timer = t, time.AfterFunc(time.Until(t), c.wake.Broadcast)
	c.wake.Broadcast()
	return nil
}

func (c *memConn) close() {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.closed = true
	c.wake.Broadcast()
}

// memMember is a server's membership and ring.
type memMember struct {
	*RingKeeper
	gossip *Gossip
	conn   *memConn
	fs     *crashFS
	last   atomic.Pointer[RingView] // that OnView got
	errors atomic.Int64             // that OnError got
	kill   func()                   // without a word
}

const memInterval = time.Second

// add makes one that does nothing yet.
func (n *memNet) add(t *testing.T, name, addr string, fsys *crashFS, seeds ...string) *memMember {
	t.Helper()
	st, err := LoadRestartState(fsys, "/s")
	if err != nil {
		t.Fatal(err)
	}
	conn := n.listen(addr)
	g, err := NewGossip(GossipConfig{Name: name, Addr: addr, RingName: "test", Keys: testKeys(t, 1), Seeds: seeds,
		Interval: memInterval, RestartState: st, Conn: conn, Resolver: &fakeDNS{}})
	if err != nil {
		t.Fatal(err)
	}
	m := &memMember{gossip: g, conn: conn, fs: fsys}
	m.RingKeeper, err = NewRingKeeper(RingKeeperConfig{Name: name, Gossip: g, FS: fsys, Dir: "/s", HasSeeds: len(seeds) > 0,
		Interval: memInterval, Log: slog.New(slog.DiscardHandler),
		OnView: func(v *RingView) { m.last.Store(v) }, OnError: func(error) { m.errors.Add(1) }})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// start starts one, in a bubble of synctest's.
func (n *memNet) start(t *testing.T, name, addr string, fsys *crashFS, seeds ...string) *memMember {
	t.Helper()
	m := n.add(t, name, addr, fsys, seeds...)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { m.gossip.Run(ctx) })
	wg.Go(func() { m.Run(ctx) })
	m.kill = sync.OnceFunc(func() {
		m.conn.close()
		cancel()
		wg.Wait()
	})
	t.Cleanup(m.kill)
	return m
}

// slot returns what m claims.
func (m *memMember) slot() int {
	for _, mv := range m.gossip.View().Members {
		if mv.Name == m.cfg.Name && mv.Slot != NoSlot {
			return int(mv.Slot)
		}
	}
	return -1
}

// members returns how many the ring of m has.
func (m *memMember) members() int { return len(m.View().Ring.Shares()) }

// took lets time pass until ok, and returns how much.
func took(t *testing.T, about string, ok func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for synctest.Wait(); !ok(); synctest.Wait() {
		if time.Since(begin) > 10*time.Minute {
			t.Fatalf("never: %s", about)
		}
		time.Sleep(memInterval / 100)
	}
	return time.Since(begin)
}

// A server at rest looks at nothing for a minute, and yet acts at once on who comes,
// goes or claims its slot.
func TestMemberAtRestActsOnChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &memNet{conn: map[netip.AddrPort]*memConn{}}
		limit := func(about string, got, most time.Duration) {
			t.Helper()
			if got > most {
				t.Errorf("%s after %v, want %v at most", about, got, most)
			}
		}
		rest := func() { time.Sleep(90*time.Second + 7*time.Millisecond) }

		a := n.start(t, "a", "10.0.0.1:1", newStoreFS(1))
		limit("the first of all claims", took(t, "a claims", func() bool { return a.slot() == 0 && a.members() == 1 }), memInterval)
		rest()
		b := n.start(t, "b", "10.0.0.2:1", newStoreFS(2), "10.0.0.1:1")
		// It chooses when nobody came for quietIntervals intervals: not before.
		wait := took(t, "b claims", func() bool { return b.slot() == 1 })
		limit("the second claims", wait, (quietIntervals+2)*memInterval)
		if wait < quietIntervals*memInterval {
			t.Errorf("the second claims after %v, without having waited for others", wait)
		}
		limit("its claim is on the ring", took(t, "a has b on its ring", func() bool { return a.members() == 2 }), memInterval)
		rest()

		// An idle member saves a claim's number too.
		b.gossip.AnnounceClaim(1, 70, false)
		limit("a claim's number is kept", took(t, "a keeps it", func() bool {
			st, err := LoadRestartState(a.fs, "/s")
			return err == nil && st.MaxLamport == 70
		}), memInterval)
		rest()

		// A slot that is lost to an older claim is given up, and another taken.
		a.gossip.AnnounceClaim(0, 90, false)
		took(t, "b hears of it", func() bool { return b.gossip.View().MaxLamport == 90 })
		rest()
		b.gossip.AnnounceClaim(0, 80, false)
		limit("a slot that was lost is replaced", took(t, "a has another", func() bool { return a.slot() == 1 && a.members() == 2 && b.members() == 2 }), memInterval)
		rest()

		b.gossip.AnnounceLeaving()
		limit("who is about to leave is off the ring", took(t, "a is alone on its ring", func() bool { return a.members() == 1 }), memInterval)
		rest()
		b.kill()
		limit("a death is acted on", took(t, "a has no peers", func() bool { return len(a.View().Members) == 1 }), 10*memInterval)
		if last := a.last.Load(); last != a.View() {
			t.Errorf("OnView got %+v last, not the newest view", last)
		}
		a.kill()
	})
}

// A member retries a failed save within an interval, even when idle, and it claims
// nothing that it has not saved.
func TestMemberKeepsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &memNet{conn: map[netip.AddrPort]*memConn{}}
		a := n.start(t, "a", "10.0.0.1:1", newStoreFS(1))
		took(t, "a claims", func() bool { return a.slot() == 0 })
		time.Sleep(90 * time.Second)
		synctest.Wait()
		a.fs.hook = failOn("write", "", 0, syscall.ENOSPC)
		a.gossip.AnnounceClaim(0, 9, false)
		time.Sleep(90 * time.Second)
		synctest.Wait()
		if a.errors.Load() == 0 {
			t.Error("OnError got nothing")
		}
		a.fs.hook = nil
		if got := took(t, "it is kept", func() bool {
			st, err := LoadRestartState(a.fs, "/s")
			return err == nil && st.Lamport == 9
		}); got > memInterval {
			t.Errorf("kept %v after there was room", got)
		}
		a.kill()
	})
}

// A member that reaches no seed makes a provisional claim after settleIntervals, and a firm
// claim once it has heard another member.
func TestMemberReachesNoSeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &memNet{conn: map[netip.AddrPort]*memConn{}}
		a := n.start(t, "a", "10.0.0.1:1", newStoreFS(1), "10.0.0.2:1")
		if got := took(t, "a claims", func() bool { return a.slot() == 0 }); got < settleIntervals*memInterval || got > (settleIntervals+1)*memInterval {
			t.Errorf("claimed after %v, want %v", got, settleIntervals*memInterval)
		}
		if !a.gossip.RestartState().Provisional {
			t.Error("a claim made alone is firm")
		}
		b := n.start(t, "b", "10.0.0.2:1", newStoreFS(2))
		took(t, "the claim is firm", func() bool { return !a.gossip.RestartState().Provisional && a.slot() != b.slot() })
		a.kill()
		b.kill()
	})
}

// The slot of one that is gone is not given away for a day.
func TestMemberReservesSlots(t *testing.T) {
	for age, want := range map[time.Duration]int{0: 1, slotReserved - time.Second: 1, slotReserved: 0} {
		n := &memNet{conn: map[netip.AddrPort]*memConn{}}
		a := n.add(t, "a", "10.0.0.1:1", newStoreFS(1), "10.0.0.2:1")
		v := a.gossip.View()
		v.Members = append(v.Members, MemberSnapshot{MemberRecord: MemberRecord{Name: "gone", State: StateDead, Session: 1, Slot: 0, Lamport: 1, Age: uint32(age / time.Second)}})
		a.claimSlot(v)
		if got := a.slot(); got != want {
			t.Errorf("%v after the other's end: slot %d, want %d", age, got, want)
		}
	}
}
