package main

// Tests of connTable, which chooses the connection that a full listener closes: a table of choices,
// a comparison with a simple model, and the bound on what a listener remembers.

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// shareRig is a connTable with connections that have names.
type shareRig struct {
	*connTable
	conns map[string]*connEntry
	now   time.Time
}

func newShareRig(max int) *shareRig {
	return &shareRig{newConnTable(max), map[string]*connEntry{}, time.Unix(1e9, 0)}
}

// opens opens connections. The part of a name before the slash is the number of its address.
func (r *shareRig) opens(names ...string) {
	for _, name := range names {
		var host byte
		fmt.Sscanf(name, "%d/", &host)
		r.conns[name] = &connEntry{addr: netip.AddrFrom4([4]byte{10, 0, 0, host})}
		r.add(r.conns[name])
	}
}

// closeVictims closes the victim until there is none, and returns the names of the victims in order.
func (r *shareRig) closeVictims() (names []string) {
	for c := r.victim(); c != nil; c = r.victim() {
		for name := range r.conns {
			if r.conns[name] == c {
				names = append(names, name)
			}
		}
		r.remove(c)
	}
	return names
}

// A full listener closes the connections of strangers first. It closes the longest waiting
// connection of the address with the most connections for each of its senders, and never a protected
// connection. A known address with more than its share counts as a stranger.
func TestVictim(t *testing.T) {
	for _, c := range []struct {
		name string
		max  int
		do   func(r *shareRig)
		want []string
	}{
		{"nothing is open", 9, func(r *shareRig) {}, nil},
		{"one address: the longest waiting first", 9, func(r *shareRig) {
			r.opens("1/a", "1/b", "1/c")
			r.unprotect(r.conns["1/b"])
		}, []string{"1/a", "1/c", "1/b"}},
		{"the address with the most connections first, then the longest waiting", 9, func(r *shareRig) {
			r.opens("1/a", "2/a", "2/b", "3/a")
		}, []string{"2/a", "1/a", "2/b", "3/a"}},
		{"strangers before a known address", 9, func(r *shareRig) {
			r.opens("1/a", "1/b", "2/a")
			r.protect(r.conns["1/a"], "site", r.now)
			r.unprotect(r.conns["1/a"])
		}, []string{"2/a", "1/b", "1/a"}},
		{"protected connections are not closed, but count", 9, func(r *shareRig) {
			r.opens("1/a", "1/b", "1/c", "2/a", "2/b")
			r.protect(r.conns["1/a"], "site-1", r.now)
			r.protect(r.conns["2/b"], "site-2", r.now)
		}, []string{"1/b", "1/c", "2/a"}},
		{"a known address with more than its share counts as a stranger", 4, func(r *shareRig) {
			r.opens("1/a", "1/b", "1/c", "2/a")
			r.protect(r.conns["1/b"], "site", r.now)
			r.unprotect(r.conns["1/b"])
		}, []string{"1/a", "2/a", "1/c", "1/b"}},
		{"a known address with more than its share has fewer than a stranger", 4, func(r *shareRig) {
			r.opens("1/a", "1/b", "1/c", "2/a", "2/b", "2/c", "2/d")
			r.protect(r.conns["1/b"], "site", r.now)
			r.unprotect(r.conns["1/b"])
		}, []string{"2/a", "2/b", "1/a", "2/c", "2/d", "1/c", "1/b"}},
		{"the share of an address grows with its senders", 6, func(r *shareRig) {
			r.opens("1/a", "1/b", "1/c", "2/a", "3/a", "4/a")
			for _, name := range []string{"1/a", "1/b", "1/c", "2/a"} {
				r.protect(r.conns[name], "site-"+name, r.now)
				r.unprotect(r.conns[name])
			}
		}, []string{"3/a", "4/a", "1/a", "2/a", "1/b", "1/c"}},
		{"one address for all: authenticated connections last", 2, func(r *shareRig) {
			r.opens("1/site", "1/a", "1/b")
			r.protect(r.conns["1/site"], "site", r.now)
			r.unprotect(r.conns["1/site"])
		}, []string{"1/a", "1/b", "1/site"}},
		{"a new connection from a known address", 9, func(r *shareRig) {
			r.opens("1/old")
			r.protect(r.conns["1/old"], "site", r.now)
			r.remove(r.conns["1/old"])
			r.opens("1/new", "2/a")
		}, []string{"2/a", "1/new"}},
		{"only the newest addresses of a sender are known", 99, func(r *shareRig) {
			r.opens("1/a", "2/a", "3/a", "4/a", "5/a", "6/a")
			for _, name := range []string{"1/a", "2/a", "3/a", "1/a", "4/a", "5/a"} {
				r.protect(r.conns[name], "site", r.now)
				r.unprotect(r.conns[name])
			}
		}, []string{"6/a", "2/a", "3/a", "1/a", "4/a", "5/a"}},
		{"an address is not known once all its senders are forgotten", 9, func(r *shareRig) {
			r.opens("1/a", "1/b", "2/a", "3/a", "3/b")
			r.protect(r.conns["1/a"], "site-1", r.now)
			r.protect(r.conns["1/b"], "site-2", r.now)
			r.protect(r.conns["2/a"], "site-2", r.now.Add(knownFor+1))
			for _, name := range []string{"1/a", "1/b", "2/a"} {
				r.unprotect(r.conns[name])
			}
		}, []string{"3/a", "1/a", "3/b", "1/b", "2/a"}},
		{"an address is known as long as one of its senders is remembered", 9, func(r *shareRig) {
			r.opens("1/a", "1/b", "2/a", "3/a", "3/b")
			r.protect(r.conns["1/a"], "site-1", r.now)
			r.protect(r.conns["1/b"], "site-2", r.now.Add(1))
			r.protect(r.conns["2/a"], "site-1", r.now.Add(knownFor+1))
			for _, name := range []string{"1/a", "1/b", "2/a"} {
				r.unprotect(r.conns[name])
			}
		}, []string{"3/a", "3/b", "1/a", "1/b", "2/a"}},
		{"a sender without requests is forgotten", 9, func(r *shareRig) {
			r.opens("1/a", "2/a")
			r.protect(r.conns["1/a"], "", r.now)
			r.unprotect(r.conns["1/a"])
			r.protect(r.conns["2/a"], "", r.now.Add(knownFor+1))
			r.unprotect(r.conns["2/a"])
		}, []string{"1/a", "2/a"}},
		{"calls for closed connections do nothing", 9, func(r *shareRig) {
			r.opens("1/a", "1/b")
			r.remove(r.conns["1/a"])
			r.remove(r.conns["1/a"])
			r.protect(r.conns["1/a"], "site", r.now)
			r.unprotect(r.conns["1/a"])
		}, []string{"1/b"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newShareRig(c.max)
			c.do(r)
			if got := r.closeVictims(); !slices.Equal(got, c.want) {
				t.Errorf("closed %v, want %v", got, c.want)
			}
		})
	}
}

// In any order of connections that arrive, authenticate and end, connTable chooses the connection
// that a plain search chooses. In particular, a known address with at most an equal share for each
// of its senders never loses a connection while a stranger has one that may be closed. At the end
// the table is empty.
func TestVictimAgainstModel(t *testing.T) {
	type modelConn struct {
		entry                    *connEntry
		host                     int
		since                    int
		protected, authenticated bool
	}
	for seed := range testSeeds(t, 200) {
		rng := rand.New(rand.NewPCG(seed, 0))
		limit := 1 + rng.IntN(20)
		hosts := 1 + rng.IntN(12)
		table := newConnTable(limit)
		var conns []*modelConn
		known := map[string][]int{} // newest hosts of each sender, the newest last
		open := func(host int) (n int) {
			for _, c := range conns {
				if c.host == host {
					n++
				}
			}
			return n
		}
		senders := func(host int) (n int) {
			for _, hosts := range known {
				if slices.Contains(hosts, host) {
					n++
				}
			}
			return n
		}
		isKnown := func(host int) bool { return senders(host) > 0 }
		load := func(host int) float64 { return float64(open(host)) / float64(max(1, senders(host))) }
		closeConn := func(c *modelConn) {
			table.remove(c.entry)
			conns = slices.DeleteFunc(conns, func(o *modelConn) bool { return o == c })
		}
		for step := range 400 {
			now := time.Unix(int64(step), 0)
			var c *modelConn
			if len(conns) > 0 {
				c = conns[rng.IntN(len(conns))]
			}
			switch op := rng.IntN(10); {
			case op < 5 || c == nil:
				c = &modelConn{host: rng.IntN(hosts), since: step}
				c.entry = &connEntry{addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(c.host)})}
				conns = append(conns, c)
				table.add(c.entry)
			case op < 7:
				sender := fmt.Sprint("site-", rng.IntN(1+hosts/4))
				c.protected, c.authenticated = true, true
				others := slices.DeleteFunc(known[sender], func(h int) bool { return h == c.host })
				known[sender] = append(others[max(0, len(others)-addrsPerSender+1):], c.host)
				table.protect(c.entry, sender, now)
			case op < 9:
				c.protected, c.since = false, step
				table.unprotect(c.entry)
			default:
				closeConn(c)
			}
			if len(conns) <= limit {
				continue
			}
			may := slices.DeleteFunc(slices.Clone(conns), func(c *modelConn) bool { return c.protected })
			counted, shares := map[int]bool{}, 1 // hosts with a connection that may be closed; their senders and the strangers
			for _, c := range may {
				if !counted[c.host] {
					counted[c.host] = true
					shares += senders(c.host)
				}
			}
			// A sort puts the victim first. bool01 makes false sort before true.
			bool01 := func(b bool) int { return map[bool]int{true: 1}[b] }
			waits := func(c *modelConn) int { // since when the connection waits that the host loses first
				first := slices.MinFunc(slices.DeleteFunc(slices.Clone(may), func(o *modelConn) bool { return o.host != c.host }), func(a, b *modelConn) int {
					return cmp.Or(cmp.Compare(bool01(a.authenticated), bool01(b.authenticated)), cmp.Compare(a.since, b.since))
				})
				return first.since
			}
			favoured := func(c *modelConn) bool {
				return isKnown(c.host) && load(c.host) <= float64(limit)/float64(shares)
			}
			var want *connEntry
			if len(may) > 0 {
				want = slices.MinFunc(may, func(a, b *modelConn) int {
					return cmp.Or(cmp.Compare(bool01(favoured(a)), bool01(favoured(b))), cmp.Compare(load(b.host), load(a.host)),
						cmp.Compare(bool01(isKnown(a.host)), bool01(isKnown(b.host))), cmp.Compare(waits(a), waits(b)),
						cmp.Compare(bool01(a.authenticated), bool01(b.authenticated)), cmp.Compare(a.since, b.since))
				}).entry
			}
			got := table.victim()
			if got != want {
				t.Fatalf("seed %d, step %d: the victim is %+v, want %+v", seed, step, got, want)
			}
			if i := slices.IndexFunc(conns, func(c *modelConn) bool { return c.entry == got }); i >= 0 {
				closeConn(conns[i])
			}
		}
		for len(conns) > 0 {
			closeConn(conns[0])
		}
		if table.open != 0 || len(table.strangers)+len(table.known) != 0 || len(table.peers) > table.remembered.Len() {
			t.Fatalf("seed %d: after all connections are closed, %d are open, and %d addresses are left, %d of them remembered", seed, table.open, len(table.peers), table.remembered.Len())
		}
	}
}

// A listener remembers at most maxRemembered addresses, and forgets the address whose sender has not
// used it for the longest time. It remembers addrsPerSender addresses of a sender.
func TestRememberedAddressesBounded(t *testing.T) {
	table := newConnTable(1)
	authenticate := func(i int, sender string) {
		c := &connEntry{addr: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})}
		table.add(c)
		table.protect(c, sender, time.Unix(1e9, 0))
		table.remove(c)
	}
	check := func(peers, senders int) {
		t.Helper()
		if len(table.peers) != peers || table.remembered.Len() != peers || len(table.senders) != senders {
			t.Errorf("%d addresses of %d senders are remembered, want %d of %d", len(table.peers), len(table.senders), peers, senders)
		}
	}
	for i := range 1000 {
		authenticate(i, "one site")
	}
	check(addrsPerSender, 1)
	for i := range maxRemembered + 9 {
		authenticate(i, "")
	}
	check(maxRemembered, maxRemembered)
	if table.senders["one site"] != nil || table.senders["10.0.0.8"] != nil || table.senders["10.0.0.9"] == nil {
		t.Error("other addresses than the first were forgotten")
	}
}

// Connections are counted by IPv4 address, also if it is written as an IPv6 address, or by the /64
// network of an IPv6 address.
func TestPeerAddr(t *testing.T) {
	for _, c := range []struct {
		addr net.Addr
		want string
	}{
		{&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 80}, "192.0.2.1"},
		{&net.TCPAddr{IP: net.ParseIP("::ffff:192.0.2.1")}, "192.0.2.1"},
		{&net.TCPAddr{IP: net.ParseIP("2001:db8:1:2:3:4:5:6")}, "2001:db8:1:2::"},
		{&net.TCPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0"}, "fe80::"},
		{&net.UnixAddr{Name: "x"}, "invalid IP"},
	} {
		if got := peerAddr(c.addr).String(); got != c.want {
			t.Errorf("peerAddr(%v) = %s, want %s", c.addr, got, c.want)
		}
	}
}

// BenchmarkVictim measures what a full listener with maxConnections connections spends on the
// choice of a victim for each new connection, if each connection has its own address and if few
// addresses have all connections.
func BenchmarkVictim(b *testing.B) {
	for _, hosts := range []int{1, 200, 1 << 16} {
		b.Run(fmt.Sprintf("addresses=%d", hosts), func(b *testing.B) {
			table := newConnTable(maxConnections)
			for i := 0; b.Loop(); i++ {
				if table.open >= maxConnections {
					table.remove(table.victim())
				}
				h := i % hosts
				table.add(&connEntry{addr: netip.AddrFrom4([4]byte{10, byte(h >> 16), byte(h >> 8), byte(h)})})
			}
		})
	}
}

// A listener forgets an address knownFor after the newest request of its sender, not after the first.
func TestRememberedAddressRenewed(t *testing.T) {
	table := newConnTable(1)
	begin := time.Unix(1e9, 0)
	authenticate := func(host byte, after time.Duration) {
		c := &connEntry{addr: netip.AddrFrom4([4]byte{10, 0, 0, host})}
		table.add(c)
		table.protect(c, fmt.Sprint("site-", host), begin.Add(after))
		table.remove(c)
	}
	authenticate(1, 0)
	authenticate(2, time.Hour)
	authenticate(1, 2*time.Hour)
	authenticate(3, knownFor+90*time.Minute)
	if table.senders["site-1"] == nil || table.senders["site-2"] != nil || table.senders["site-3"] == nil || len(table.peers) != 2 {
		t.Errorf("remembered: %v, want site-1, which came again, and site-3", slices.Sorted(maps.Keys(table.senders)))
	}
}
