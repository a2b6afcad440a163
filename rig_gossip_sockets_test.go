package main

// This file starts members that gossip over real UDP sockets of this host. All members of a ring
// run in this process.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// A fakeDNS resolves the names in hosts, which a test may change while it holds mu.
type fakeDNS struct {
	mu    sync.Mutex // guards hosts
	hosts map[string][]netip.Addr
}

func (d *fakeDNS) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if addrs := d.hosts[host]; addrs != nil {
		return addrs, nil
	}
	return nil, errors.New("no such host")
}

// A gossiper is a running member of a ring, with its own UDP socket.
type gossiper struct {
	*Gossip
	addr netip.AddrPort
	stop func() error // makes the member leave the ring, and returns the result of Run
	kill func()       // ends the member without announcing a leave
}

// startGossip starts a member with a new socket at the address listen. It sets c.RingName and
// c.Conn, and gives Addr, Keys, Interval and Resolver defaults if they are not set. If c.Addr ends
// with a colon, it adds the port of the socket. The member ends at the end of the test.
func startGossip(tb testing.TB, c GossipConfig, listen string) *gossiper {
	tb.Helper()
	return startGossipOver(tb, c, listen, nil)
}

// startGossipOver starts a member in the same way as startGossip. If wrap is not nil, the member
// uses wrap(socket) instead of the new socket.
func startGossipOver(tb testing.TB, c GossipConfig, listen string, wrap func(UDPConn) UDPConn) *gossiper {
	tb.Helper()
	udp, err := net.ResolveUDPAddr("udp", listen)
	if err != nil {
		tb.Fatal(err)
	}
	conn, err := net.ListenUDP("udp", udp)
	if err != nil {
		tb.Fatal(err)
	}
	g := &gossiper{addr: conn.LocalAddr().(*net.UDPAddr).AddrPort()}
	if c.Addr == "" {
		c.Addr = g.addr.String()
	} else if c.Addr[len(c.Addr)-1] == ':' {
		c.Addr += fmt.Sprint(g.addr.Port())
	}
	c.RingName, c.Conn = "test", conn
	if wrap != nil {
		c.Conn = wrap(conn)
	}
	if len(c.Keys.IDs()) == 0 {
		c.Keys = testKeys(tb, 1)
	}
	if c.Interval == 0 {
		c.Interval = 200 * time.Millisecond
	}
	if c.Resolver == nil {
		c.Resolver = &fakeDNS{}
	}
	if g.Gossip, err = NewGossip(c); err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx) }()
	var once sync.Once
	var result error
	end := func(first func()) {
		once.Do(func() {
			first()
			result = <-ended
			cancel()
			conn.Close()
		})
	}
	g.stop = func() error { end(cancel); return result }
	g.kill = func() { end(func() { conn.Close() }) }
	tb.Cleanup(g.kill)
	return g
}

func (g *gossiper) states() map[string]MemberState {
	all := map[string]MemberState{}
	for _, m := range g.View().Members {
		all[m.Name] = m.State
	}
	return all
}

func (g *gossiper) live() int {
	n := 0
	for _, s := range g.states() {
		if s.IsLive() {
			n++
		}
	}
	return n
}

// allLive returns a function that reports whether each of the given members considers exactly n
// members live.
func allLive(all []*gossiper, n int) func() bool {
	return func() bool {
		for _, g := range all {
			if g.live() != n {
				return false
			}
		}
		return true
	}
}
