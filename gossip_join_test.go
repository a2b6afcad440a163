package main

// Tests of what a member reports about --join and about addresses, in virtual time.

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A failingConn is a socket that cannot send to one address.
type failingConn struct {
	*memConn
	to netip.AddrPort
}

func (c *failingConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	if to == c.to {
		return 0, errors.New("network is unreachable")
	}
	return c.memConn.WriteToUDPAddrPort(b, to)
}

// A reporter is a running member of a ring that collects its events.
type reporter struct {
	*Gossip
	end func() // ends the member without announcing a leave

	mu     sync.Mutex // guards events
	events []GossipEvent
}

// startReporter starts a member with a socket at listen. It sets the fields of c that every member
// needs, unless they are set.
func (n *memNet) startReporter(t *testing.T, listen string, c GossipConfig) *reporter {
	t.Helper()
	r := &reporter{}
	conn := n.listen(listen)
	if c.Addr == "" {
		c.Addr = listen
	}
	if len(c.Keys.IDs()) == 0 {
		c.Keys = testKeys(t, 1)
	}
	if c.Resolver == nil {
		c.Resolver = &fakeDNS{}
	}
	c.RingName, c.Interval, c.Notify = "test", memInterval, func(e GossipEvent) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.events = append(r.events, e)
	}
	c.Conn = &failingConn{conn, netip.MustParseAddrPort("10.0.0.99:1")}
	var err error
	if r.Gossip, err = NewGossip(c); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); r.Run(context.Background()) }()
	r.end = func() { conn.close(); <-ended }
	return r
}

// take waits until the member is idle, and returns the events whose text is one of what since the
// last call of take. It forgets all events.
func (r *reporter) take(what ...string) (events []GossipEvent) {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if slices.Contains(what, e.What) {
			events = append(events, e)
		}
	}
	r.events = nil
	return events
}

// A member that reaches nobody through --join reports this within a few seconds, and then once a
// minute. When a server starts at the address, it reports once that --join has reached the ring.
func TestJoinReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		b := n.startReporter(t, "10.0.0.2:1", GossipConfig{Name: "b", Seeds: []string{"10.0.0.1:1"}})
		defer b.end()
		var got []GossipEvent
		if got := took(t, "the first report", func() bool { got = b.take(EventJoinFails); return len(got) > 0 }); got < joinAnswerIntervals*memInterval || got > 8*memInterval {
			t.Errorf("first report after %v, want 5 s to 8 s", got)
		}
		time.Sleep(3*joinReportEvery + 10*time.Second)
		got = append(got, b.take(EventJoinFails)...)
		if len(got) != 4 || got[0].Join != "10.0.0.1:1" || !strings.HasPrefix(got[0].Detail, "no answer from 10.0.0.1:1: ") {
			t.Errorf("in three minutes got the reports %+v, want four that 10.0.0.1:1 does not answer", got)
		}
		a := n.startReporter(t, "10.0.0.1:1", GossipConfig{Name: "a"})
		defer a.end()
		time.Sleep(10 * time.Minute)
		if got := b.take(EventJoined, EventJoinFails, EventJoinPartly); len(got) != 1 || got[0] != (GossipEvent{What: EventJoined, Join: "10.0.0.1:1"}) {
			t.Errorf("after a start of the server got the reports %+v, want one that --join has reached the ring", got)
		}
		if got := b.JoinTargets(); got[0].Problem != "" {
			t.Errorf("got %+v, want no problem", got)
		}
	})
}

// While only a part of --join reaches a server, a member reports the other part once a minute. A
// value that is the member's own address is no problem then.
func TestJoinPartly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		a := n.startReporter(t, "10.0.0.1:1", GossipConfig{Name: "a"})
		defer a.end()
		b := n.startReporter(t, "10.0.0.2:1", GossipConfig{Name: "b", Seeds: []string{"10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"}})
		defer b.end()
		time.Sleep(joinReportEvery / 2)
		if got := b.take(EventJoinPartly); len(got) != 0 {
			t.Errorf("in half a minute got the reports %+v, want none", got)
		}
		time.Sleep(2 * joinReportEvery)
		if got := b.take(EventJoinPartly); len(got) != 2 || got[0].Join != "10.0.0.3:1" {
			t.Errorf("in two more minutes got the reports %+v, want two about 10.0.0.3:1", got)
		}
	})
}

// JoinTargets tells what is wrong with each value of --join.
func TestJoinProblems(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		for _, c := range []struct{ join, want string }{
			{"10.0.0.9:1", "no answer from 10.0.0.9:1: is the server running with --listen-cluster, is its UDP port open in both directions, and do both servers have the same cluster.key?"},
			{"gone.example:1", "lookup failed: no such host: check the name, or give an IP address"},
			{"two.example:1", "no answer from 10.0.0.8:1, 10.0.0.9:1: is"},
			{"10.0.0.2:1", "this is the address of this server itself: name another server, or correct --advertise"},
			{"own.example:1", "this is the address of this server itself: name another server, or correct --advertise"},
			{"10.0.0.99:1", "sending to 10.0.0.99:1 fails: network is unreachable: check the route and the firewall of this host"},
			{"10.0.0.3:1", "gossip of 10.0.0.3:1 is sealed with another key: copy the same cluster.key to both servers"},
		} {
			b := n.startReporter(t, "10.0.0.2:1", GossipConfig{Name: "b", Seeds: []string{c.join}, Resolver: &fakeDNS{hosts: map[string][]netip.Addr{
				"two.example": {netip.MustParseAddr("10.0.0.8"), netip.MustParseAddr("10.0.0.9")}, "own.example": {netip.MustParseAddr("10.0.0.2")},
			}}})
			if got := b.JoinTargets()[0].Problem; got == "" {
				t.Errorf("%s: no problem before the first lookup", c.join)
			}
			other := n.startReporter(t, "10.0.0.3:1", GossipConfig{Name: "c", Keys: testKeys(t, 2), Seeds: []string{"10.0.0.2:1"}})
			time.Sleep(8 * memInterval)
			got := b.take(EventJoinFails)
			if len(got) != 1 || got[0].Join != c.join || !strings.HasPrefix(got[0].Detail, c.want) {
				t.Errorf("%s: got the reports %+v, want one: %s", c.join, got, c.want)
			}
			if got := b.JoinTargets(); len(got) != 1 || got[0].Address != c.join || got[0].Problem == "" {
				t.Errorf("%s: JoinTargets is %+v", c.join, got)
			}
			b.end()
			other.end()
		}
	})
}

// A value of --join whose packets come back, because it is this member's own address under another
// name, is reported as the member's own address.
func TestJoinOwnAddressReflected(t *testing.T) {
	s := newSim(t, 2, testSeed(t, 1))
	a := s.start(0, 1)
	var hello []byte
	s.lastTo(0, 1, PacketHello, &hello)
	s.run(2 * time.Second)
	s.deliver(0, s.nodes[1].addr, hello)
	if !a.isOwnAddress(s.nodes[1].addr) {
		t.Error("the address from which an own packet came back does not count as the own address")
	}
}

// A packet that comes back from a seed does not keep this member from a server that starts at the
// seed later: anybody on the path to a seed can send a packet back.
func TestJoinAfterReflection(t *testing.T) {
	s := newSim(t, 3, testSeed(t, 1))
	var hello []byte
	s.lastTo(0, 2, PacketHello, &hello)
	s.start(0, 2)
	s.start(1)
	s.run(5 * time.Second)
	s.until(time.Minute, "a hello to the seed", func() bool {
		hello = nil
		s.run(time.Second)
		return hello != nil
	})
	s.deliver(0, s.nodes[2].addr, hello)
	if !s.nodes[0].swim.isOwnAddress(s.nodes[2].addr) {
		t.Fatal("the packet that came back does not mark the seed")
	}
	s.start(2, []int{}...) // without seeds of its own
	s.until(time.Minute, "all members of the ring know each other", s.agree)
}

// A member that advertises an address at which it cannot be reached is reported on both sides,
// again and again, but at most once a minute.
func TestGossipUnreachableAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		a := n.startReporter(t, "10.0.0.1:1", GossipConfig{Name: "a"})
		defer a.end()
		b := n.startReporter(t, "10.0.0.2:1", GossipConfig{Name: "b", Addr: "127.0.0.1:1", Seeds: []string{"10.0.0.1:1"}})
		defer b.end()
		time.Sleep(5*time.Minute + time.Second)
		want := GossipEvent{What: EventUnreachable, Name: "b", Addr: "10.0.0.2:1", Detail: "it advertises 127.0.0.1:1"}
		got := a.take(EventUnreachable)
		for i := range got {
			got[i].Count = 0
		}
		if len(got) < 2 || len(got) > 6 || got[0] != want {
			t.Errorf("got the reports %+v, want 2 to 6 times %+v", got, want)
		}
		if got := b.take(EventAccused); len(got) < 2 || len(got) > 6 {
			t.Errorf("the member itself reports %+v, want 2 to 6 reports", got)
		}
	})
}

// A member whose advertised host name cannot be looked up is reported at once, and then once an hour,
// even if another name was reported shortly before. A name is forgotten once it was not used for
// unusedHostLife.
func TestGossipHostLookupFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newMemNet()
		a := n.startReporter(t, "10.0.0.1:1", GossipConfig{Name: "a"})
		defer a.end()
		b := n.startReporter(t, "10.0.0.2:1", GossipConfig{Name: "b", Addr: "gone.example:1", Seeds: []string{"10.0.0.1:1"}})
		time.Sleep(10 * time.Second)
		c := n.startReporter(t, "10.0.0.3:1", GossipConfig{Name: "c", Addr: "lost.example:1", Seeds: []string{"10.0.0.1:1"}})
		time.Sleep(80 * time.Second)
		check := func(want ...string) {
			t.Helper()
			var got []string
			for _, e := range a.take(EventLookupFails) {
				got = append(got, e.Addr+" "+e.Detail)
			}
			if slices.Sort(got); !slices.Equal(got, want) {
				t.Errorf("got the reports %q, want %q", got, want)
			}
		}
		check("gone.example:1 no such host", "lost.example:1 no such host")
		b.end()
		c.end()
		a.updateAndWakeRun(func() {
			a.hosts["unused.example:1"] = &lookedUpHost{}
			a.hosts["used.example:1"] = &lookedUpHost{usedAt: time.Hour}
		})
		time.Sleep(unusedHostLife)
		check("gone.example:1 no such host", "lost.example:1 no such host", "unused.example:1 no such host", "used.example:1 no such host")
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.hosts["unused.example:1"] != nil || a.hosts["used.example:1"] == nil {
			t.Errorf("the hosts are %v, want no unused.example:1", a.hosts)
		}
	})
}
