package main

// This file runs members of a ring, each with its ring keeper, in virtual time over a network in
// memory. They run in a bubble of testing/synctest.

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A memNet carries datagrams between sockets in memory.
type memNet struct {
	mu   sync.Mutex // guards conn and all memConns
	conn map[netip.AddrPort]*memConn
}

type memDatagram struct {
	data []byte
	from netip.AddrPort
}

// A memConn is a socket of a memNet.
type memConn struct {
	net    *memNet
	addr   netip.AddrPort
	wake   sync.Cond // wakes readers when a datagram arrives, until or closed changes, or the deadline passes
	queue  []memDatagram
	until  time.Time   // read deadline
	timer  *time.Timer // wakes readers at the deadline
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

func (c *memConn) SetReadBuffer(int) error { return nil } // the queue has no limit

// close closes the socket, so that datagrams to it are lost. Reads fail once the queue is empty.
func (c *memConn) close() {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.closed = true
	c.wake.Broadcast()
}

// A memMember is the gossip and the ring keeper of one server.
type memMember struct {
	*RingKeeper
	gossip *Gossip
	conn   *memConn
	fs     *crashFS
	last   atomic.Pointer[RingView] // latest view that RingKeeperConfig.OnView received
	errors atomic.Int64             // number of errors that RingKeeperConfig.OnError received
	kill   func()                   // ends the member without announcing a leave
}

const memInterval = time.Second

// add returns a new member that does not run yet. The member keeps its restart state in fsys.
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

// start returns a new member, and runs it until the end of the test or until its kill is called.
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

// slot returns the slot that m claims, or -1.
func (m *memMember) slot() int {
	for _, mv := range m.gossip.View().Members {
		if mv.Name == m.cfg.Name && mv.Slot != NoSlot {
			return int(mv.Slot)
		}
	}
	return -1
}

// members returns the number of members that have a share of the ring, as m sees the ring.
func (m *memMember) members() int { return len(m.View().Ring.Shares()) }

// took lets virtual time pass until ok returns true, and returns how much time has passed. If ok
// has not returned true within 10 minutes of virtual time, the test fails; the text in about names
// the condition.
func took(t *testing.T, about string, ok func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for synctest.Wait(); !ok(); synctest.Wait() {
		if time.Since(begin) > 10*time.Minute {
			t.Fatalf("not within 10 minutes: %s", about)
		}
		time.Sleep(memInterval / 100)
	}
	return time.Since(begin)
}

// startPair starts member a, and then member b with a as its seed. It waits until both have claimed
// a slot, and then until their keepers wake up only once per idleCheck.
func startPair(t *testing.T) (a, b *memMember) {
	t.Helper()
	n := newMemNet()
	a = n.start(t, "a", "10.0.0.1:1", newStoreFS(1))
	took(t, "a claims slot 0", func() bool { return a.slot() == 0 && a.members() == 1 })
	b = n.start(t, "b", "10.0.0.2:1", newStoreFS(2), "10.0.0.1:1")
	took(t, "b claims slot 1", func() bool { return b.slot() == 1 && a.members() == 2 && b.members() == 2 })
	restLong()
	return a, b
}

func newMemNet() *memNet { return &memNet{conn: map[netip.AddrPort]*memConn{}} }

// restLong sleeps for longer than idleCheck. After that, ring keepers without changes wake up only
// once per idleCheck, which is a minute.
func restLong() { time.Sleep(90*time.Second + 7*time.Millisecond) }

// checkWithin fails the test if the time got is longer than the limit most. The text in about names
// what took this time.
func checkWithin(t *testing.T, about string, got, most time.Duration) {
	t.Helper()
	if got > most {
		t.Errorf("%s took %v, want at most %v", about, got, most)
	}
}
