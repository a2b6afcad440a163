package main

// Tests of the driver: members on real sockets of this host, all in this process.

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

// fakeDNS answers from a table that tests change.
type fakeDNS struct {
	mu    sync.Mutex
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

// A gossiper is a member that runs.
type gossiper struct {
	*Gossip
	addr netip.AddrPort
	stop func() error // ends it; it leaves first
	kill func()       // ends it without leaving
}

// startGossip starts a member on a socket of its own.
func startGossip(tb testing.TB, c GossipConfig, listen string) *gossiper {
	tb.Helper()
	return startGossipOver(tb, c, listen, nil)
}

// startGossipOver puts something between a member and its socket.
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

// states returns what g thinks of the others.
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

// 50 members join through one, one dies, one leaves.
func TestGossipLoopback(t *testing.T) {
	const n = 50
	var all []*gossiper
	for i := range n {
		c := GossipConfig{Name: fmt.Sprint("n", i)}
		if i > 0 {
			c.Seeds = []string{all[0].addr.String()}
		}
		all = append(all, startGossip(t, c, "127.0.0.1:0"))
	}
	eventually(t, "all joined", allLive(all, n))
	all[7].AnnounceClaim(3, 9, true)
	eventually(t, "all know a claim", func() bool {
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
	if err := all[n-1].stop(); err != nil {
		t.Error(err)
	}
	all = all[:n-1]
	eventually(t, "all know who left", allLive(all, n-1))
	if s := all[0].states()[fmt.Sprint("n", n-1)]; s != StateLeft {
		t.Errorf("who left is %v", s)
	}
	all[n-2].kill()
	all = all[:n-2]
	eventually(t, "all know who died", allLive(all, n-2))
	st := all[0].Stats()
	if st.Sent == 0 || st.SentBytes == 0 || st.Received == 0 || st.ReceivedBytes == 0 {
		t.Errorf("stats are %+v", st)
	}
	<-all[0].Changed()
}

func TestGossipAddresses(t *testing.T) {
	dns := &fakeDNS{hosts: map[string][]netip.Addr{}}
	a := startGossip(t, GossipConfig{Name: "a"}, "[::1]:0")
	port := fmt.Sprint(a.addr.Port())
	// b looks for a by a name that at first there is not, and is itself known by one.
	b := startGossip(t, GossipConfig{Name: "b", Addr: "b.example:", Seeds: []string{"a.example:" + port}, Resolver: dns}, "[::1]:0")
	dns.mu.Lock()
	dns.hosts["a.example"] = []netip.Addr{netip.MustParseAddr("::1")}
	dns.mu.Unlock()
	eventually(t, "joined by a name", allLive([]*gossiper{a, b}, 2))
	both := &fakeDNS{hosts: map[string][]netip.Addr{"b.example": {netip.MustParseAddr("::1")}}}
	c := startGossip(t, GossipConfig{Name: "c", Seeds: []string{a.addr.String()}, Resolver: both}, "[::1]:0")
	eventually(t, "c reaches b by name", func() bool {
		for _, m := range c.View().Members {
			if m.Name == "b" && m.RTT > 0 && m.Addr == "b.example:"+fmt.Sprint(b.addr.Port()) {
				return true
			}
		}
		return false
	})
	// A socket for both families talks to IPv4.
	d := startGossip(t, GossipConfig{Name: "d", Addr: "127.0.0.1:"}, "[::]:0")
	e := startGossip(t, GossipConfig{Name: "e", Seeds: []string{fmt.Sprint("127.0.0.1:", d.addr.Port())}}, "127.0.0.1:0")
	eventually(t, "joined by IPv4", allLive([]*gossiper{d, e}, 2))
}

func TestGossipNameTaken(t *testing.T) {
	a := startGossip(t, GossipConfig{Name: "a"}, "127.0.0.1:0")
	seed := []string{a.addr.String()}
	var events sync.Map
	first := startGossip(t, GossipConfig{Name: "b", Seeds: seed, RestartState: RestartState{Session: 7 * sessionStep}, Notify: func(e GossipEvent) { events.Store(e.What, true) }}, "127.0.0.1:0")
	eventually(t, "joined", allLive([]*gossiper{a, first}, 2))
	second := startGossip(t, GossipConfig{Name: "b", Seeds: seed}, "127.0.0.1:0")
	eventually(t, "the lower session stands down", func() bool {
		second.mu.Lock()
		defer second.mu.Unlock()
		return second.swim.StoodDown
	})
	if err := second.stop(); err != ErrNameTaken {
		t.Errorf("it ends with %v", err)
	}
	eventually(t, "the other one says so", func() bool { _, ok := events.Load(EventNameConflict); return ok })
}

func TestNewGossip(t *testing.T) {
	good := GossipConfig{Name: "a", Addr: "a:1", RingName: "c", Keys: testKeys(t, 1), Interval: time.Second}
	if _, err := NewGossip(good); err != nil {
		t.Error(err)
	}
	for about, spoil := range map[string]func(c *GossipConfig){
		"no name":          func(c *GossipConfig) { c.Name = "" },
		"no address":       func(c *GossipConfig) { c.Addr = "" },
		"no port":          func(c *GossipConfig) { c.Addr = "a" },
		"URL with a space": func(c *GossipConfig) { c.URL = "http://a b" },
		"no seed's port":   func(c *GossipConfig) { c.Seeds = []string{"b"} },
		"no key":           func(c *GossipConfig) { c.Keys = Keys{} },
		"no interval":      func(c *GossipConfig) { c.Interval = 0 },
	} {
		c := good
		spoil(&c)
		if _, err := NewGossip(c); err == nil {
			t.Errorf("%s: no error", about)
		}
	}
}

func TestAdvertisedAddr(t *testing.T) {
	for listener, want := range map[string]string{"127.0.0.1:9006": "127.0.0.1:9006", "[::1]:1": "[::1]:1", "[::]:9006": "127.0.0.1:9006", "0.0.0.0:9": "127.0.0.1:9"} {
		for _, peers := range [][]string{{"127.0.0.1:1"}, {"127.0.0.1:no-such-service", "127.0.0.1:1"}} { // one cannot be looked up now
			if got, err := AdvertisedAddr(netip.MustParseAddrPort(listener), peers); got != want || err != nil {
				t.Errorf("%s: got %s, %v, want %s", listener, got, err, want)
			}
		}
	}
}
