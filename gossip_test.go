package main

// Tests of gossip over UDP: members on real sockets of this host, all in this process.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// startRing starts n members on 127.0.0.1, named n0, n1 and so on, and waits until all know each
// other.
func startRing(t *testing.T, n int) []*gossiper {
	t.Helper()
	var all []*gossiper
	for i := range n {
		c := GossipConfig{Name: fmt.Sprint("n", i)}
		if i > 0 {
			c.Seeds = []string{all[0].addr.String()}
		}
		all = append(all, startGossip(t, c, "127.0.0.1:0"))
	}
	eventually(t, "all members have joined", allLive(all, n))
	return all
}

// In a ring of 50 members on one host, all members learn of a leave and of a death.
func TestGossipLoopback(t *testing.T) {
	const n = 50
	all := startRing(t, n)
	if err := all[n-1].stop(); err != nil {
		t.Errorf("leaving: %v", err)
	}
	all = all[:n-1]
	eventually(t, "all know of the leave", allLive(all, n-1))
	if s := all[0].states()[fmt.Sprint("n", n-1)]; s != StateLeft {
		t.Errorf("state of the member that left: got %v, want %v", s, StateLeft)
	}
	all[n-2].kill()
	all = all[:n-2]
	eventually(t, "all know of the death", allLive(all, n-2))
	st := all[0].Stats()
	if st.Sent == 0 || st.SentBytes == 0 || st.Received == 0 || st.ReceivedBytes == 0 {
		t.Errorf("a counter is 0: %+v", st)
	}
}

// All members learn of a claim. Their views then contain the claim, and their restart states
// contain its number. The channel that Changed returns gets a signal.
func TestGossipClaim(t *testing.T) {
	all := startRing(t, 50)
	for _, g := range all { // receive the signals that the joins have left in the channels
		select {
		case <-g.Changed():
		default:
		}
	}
	all[7].AnnounceClaim(3, 9, true)
	eventually(t, "all know the claim", func() bool {
		for _, g := range all {
			v := g.View()
			ok := v.Buckets == 4 && v.MaxLamport == 9 && g.RestartState().MaxLamport == 9
			for _, m := range v.Members {
				ok = ok && (m.Name != "n7" || m.Slot == 3 && m.Lamport == 9 && m.Provisional)
			}
			if !ok {
				return false
			}
		}
		return true
	})
	<-all[0].Changed()
}

// Members reach seeds and other members by host name. If a name does not resolve at first, they
// look it up again.
func TestGossipHostNames(t *testing.T) {
	dns := &fakeDNS{hosts: map[string][]netip.Addr{}}
	a := startGossip(t, GossipConfig{Name: "a"}, "[::1]:0")
	port := fmt.Sprint(a.addr.Port())
	b := startGossip(t, GossipConfig{Name: "b", Addr: "b.example:", Seeds: []string{"a.example:" + port}, Resolver: dns}, "[::1]:0")
	dns.mu.Lock()
	dns.hosts["a.example"] = []netip.Addr{netip.MustParseAddr("::1")}
	dns.mu.Unlock()
	eventually(t, "b joins through a seed with a host name", allLive([]*gossiper{a, b}, 2))
	onlyB := &fakeDNS{hosts: map[string][]netip.Addr{"b.example": {netip.MustParseAddr("::1")}}}
	c := startGossip(t, GossipConfig{Name: "c", Seeds: []string{a.addr.String()}, Resolver: onlyB}, "[::1]:0")
	eventually(t, "c reaches b by its host name", func() bool {
		for _, m := range c.View().Members {
			if m.Name == "b" && m.RTT > 0 && m.Addr == "b.example:"+fmt.Sprint(b.addr.Port()) {
				return true
			}
		}
		return false
	})
}

// A member with a socket for both IPv4 and IPv6 gossips with a member whose socket has only IPv4.
func TestGossipDualStack(t *testing.T) {
	a := startGossip(t, GossipConfig{Name: "a", Addr: "127.0.0.1:"}, "[::]:0")
	b := startGossip(t, GossipConfig{Name: "b", Seeds: []string{fmt.Sprint("127.0.0.1:", a.addr.Port())}}, "127.0.0.1:0")
	eventually(t, "both members have joined", allLive([]*gossiper{a, b}, 2))
}

// Of two members with the same name, the member with the lower session stops: its Run returns
// ErrNameTaken. The other member passes an event about the conflict to Notify.
func TestGossipNameTaken(t *testing.T) {
	a := startGossip(t, GossipConfig{Name: "a"}, "127.0.0.1:0")
	seed := []string{a.addr.String()}
	var events sync.Map
	first := startGossip(t, GossipConfig{Name: "b", Seeds: seed, RestartState: RestartState{Session: 7 * sessionStep}, Notify: func(e GossipEvent) { events.Store(e.What, true) }}, "127.0.0.1:0")
	eventually(t, "the first member has joined", allLive([]*gossiper{a, first}, 2))
	second := startGossip(t, GossipConfig{Name: "b", Seeds: seed}, "127.0.0.1:0")
	eventually(t, "the member with the lower session stands down", func() bool {
		second.mu.Lock()
		defer second.mu.Unlock()
		return second.swim.StoodDown
	})
	if err := second.stop(); err != ErrNameTaken {
		t.Errorf("Run of the member with the lower session: got error %v, want %v", err, ErrNameTaken)
	}
	eventually(t, "the other member reports the conflict", func() bool { _, ok := events.Load(EventNameConflict); return ok })
}

// A brokenConn is a socket whose every read fails. After many reads it claims to be closed, so that
// a test of a reader without pauses ends.
type brokenConn struct {
	*memConn
	reads atomic.Int64
}

func (c *brokenConn) ReadFromUDPAddrPort([]byte) (int, netip.AddrPort, error) {
	if c.reads.Add(1) > 100_000 {
		return 0, netip.AddrPort{}, net.ErrClosed
	}
	return 0, netip.AddrPort{}, errors.New("input/output error")
}

// If all reads from the socket fail, Run waits readErrorPause between two reads. It goes on to call
// Tick, and ends with its context.
func TestGossipReadErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := &brokenConn{memConn: newMemNet().listen("10.0.0.1:1")}
		g, err := NewGossip(GossipConfig{Name: "a", Addr: "10.0.0.1:1", RingName: "test", Keys: testKeys(t, 1), Seeds: []string{"10.0.0.2:1"},
			Interval: memInterval, Conn: conn, Resolver: &fakeDNS{}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*memInterval)
		defer cancel()
		if err := g.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
		if n := conn.reads.Load(); n > int64(12*memInterval/readErrorPause) || g.Stats().Sent == 0 {
			t.Errorf("in ten intervals got %d reads and %d packets sent, want one read per %v and some packets", n, g.Stats().Sent, readErrorPause)
		}
	})
}

// NewGossip refuses a configuration if one of the fields listed below is missing or invalid.
func TestNewGossip(t *testing.T) {
	good := GossipConfig{Name: "a", Addr: "a:1", RingName: "c", Keys: testKeys(t, 1), Interval: time.Second}
	if _, err := NewGossip(good); err != nil {
		t.Errorf("valid configuration: %v", err)
	}
	for about, spoil := range map[string]func(c *GossipConfig){
		"no name":                func(c *GossipConfig) { c.Name = "" },
		"no address":             func(c *GossipConfig) { c.Addr = "" },
		"no port in the address": func(c *GossipConfig) { c.Addr = "a" },
		"URL with a space":       func(c *GossipConfig) { c.URL = "http://a b" },
		"no port in a seed":      func(c *GossipConfig) { c.Seeds = []string{"b"} },
		"no key":                 func(c *GossipConfig) { c.Keys = Keys{} },
		"no interval":            func(c *GossipConfig) { c.Interval = 0 },
	} {
		c := good
		spoil(&c)
		if _, err := NewGossip(c); err == nil {
			t.Errorf("%s: got no error", about)
		}
	}
}

// AdvertisedAddr returns the listener's own address. If that address is 0.0.0.0 or ::, it returns
// the local address from which the first peer that can be resolved is reached.
func TestAdvertisedAddr(t *testing.T) {
	for listener, want := range map[string]string{"127.0.0.1:9006": "127.0.0.1:9006", "[::1]:1": "[::1]:1", "[::]:9006": "127.0.0.1:9006", "0.0.0.0:9": "127.0.0.1:9"} {
		// The first peer of the second list cannot be resolved, because its port has an unknown
		// name.
		for _, peers := range [][]string{{"127.0.0.1:1"}, {"127.0.0.1:no-such-service", "127.0.0.1:1"}} {
			if got, err := AdvertisedAddr(netip.MustParseAddrPort(listener), peers); got != want || err != nil {
				t.Errorf("listener %s: got %s and error %v, want %s", listener, got, err, want)
			}
		}
	}
}
