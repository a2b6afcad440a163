package main

// Tests of floods: somebody without a key sends recorded packets again, thousands per interval. Most
// of these tests run in the simulator. The test on real sockets compares no time with an absolute
// limit.

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"
)

// A flood replays the packets that the nodes of a simulation have sent each other.
type flood struct {
	packets []simPacket // packets to replay, in the order in which they were sent
	next    int         // index in packets of the next packet
}

// A simPacket is a packet that one node has sent to another; from and to are their indexes.
type simPacket struct {
	from, to int
	data     []byte
}

// record makes the simulation add to f each packet that is sent from now on and for which keep
// returns true.
func (f *flood) record(s *sim, keep func(p simPacket) bool) {
	s.tap = func(from, to int, data []byte) {
		if p := (simPacket{from, to, data}); keep(p) {
			f.packets = append(f.packets, p)
		}
	}
}

// keepTo removes from f all packets that were not sent to the given node.
func (f *flood) keepTo(node int) {
	f.packets = slices.DeleteFunc(f.packets, func(p simPacket) bool { return p.to != node })
}

// start replays perInterval packets in every interval until the given time of the simulation. A
// replayed packet arrives at the node to which it was sent, from the address that source returns.
// start begins with the oldest packet, and begins again when it has replayed all.
func (f *flood) start(s *sim, perInterval int, until time.Duration, source func(p simPacket) netip.AddrPort) {
	const perRound = 50
	if s.now >= until {
		return
	}
	for range perRound {
		p := f.packets[f.next%len(f.packets)]
		f.next++
		s.push(simEvent{at: s.now, node: p.to, from: source(p), data: p.data})
	}
	s.at(s.now+s.interval*perRound/time.Duration(perInterval), func() { f.start(s, perInterval, until, source) })
}

// A flood of packets that are replayed to a restarted member makes no member suspect another live
// member, and leaves the health of all members good. The restarted member joins as soon as it does
// without a flood. During the flood a new member joins through it in the usual time, and a death
// becomes known within four times the usual time.
func TestSwimReplayFlood(t *testing.T) {
	const n = 10
	seed := testSeed(t, 1)
	stranger := func(simPacket) netip.AddrPort { return strangerAddr }
	for _, restarted := range []int{0, 4} { // node 0 has no seed and must wait until other members contact it
		for about, onlyHellos := range map[string]bool{"all packets": false, "hellos": true} {
			for addr, fromMembers := range map[string]bool{"an unknown address": false, "the members' addresses": true} {
				t.Run(fmt.Sprintf("node %d/%s from %s", restarted, about, addr), func(t *testing.T) {
					s := newSim(t, n+1, seed)
					var f flood
					f.record(s, func(p simPacket) bool { return !onlyHellos || s.decode(p.from, p.data).Kind == PacketHello })
					for i := range n {
						s.start(i, 0, 1)
					}
					s.until(10*time.Second, "all join", s.agree)
					for i := range n { // so that the flood has packets of earlier sessions too
						s.restart(i, 0, 1)
						s.run(2 * time.Second)
					}
					s.until(10*time.Second, "all join again", s.agree)
					s.run(5 * time.Second)
					s.events = nil
					source := stranger
					if fromMembers {
						source = func(p simPacket) netip.AddrPort { return s.nodes[p.from].addr }
					}
					f.keepTo(restarted)
					f.start(s, 5000, s.now+30*time.Second, source)
					if restarted == 0 {
						s.restart(0, []int{}...)
					} else {
						s.restart(restarted)
					}
					s.until(4*time.Second, "the restarted member joins", s.agree)
					s.run(2 * time.Second)
					s.start(n, restarted)
					s.until(3*time.Second, "a new member joins", s.agree)
					s.run(2 * time.Second)
					if k := s.eventCount(EventSuspect); k > 0 {
						t.Errorf("got %d suspicions of live members, want none", k)
					}
					for _, m := range s.nodes {
						if m.swim.Health > 0 {
							t.Errorf("health of %s during the flood: got %d, want 0", m.name, m.swim.Health)
						}
					}
					s.kill(2)
					s.until(10*time.Second, "all know of a death", s.agree)
				})
			}
		}
	}
}

// A member whose health is worst has a good health again within ten intervals after the cause has
// ended, because it probes as often as a healthy member.
func TestSwimHealthRecovers(t *testing.T) {
	for _, n := range []int{2, 3, 10} {
		s := joinedSim(t, n, testSeed(t, 1))
		a := s.nodes[0].swim
		a.Health = maxHealth
		s.until(10*s.interval, "the health is 2 or better", func() bool { return a.Health <= 2 })
	}
}

// A member that loses 80 % of the packets sent to it, as when its socket overflows, is not declared
// dead and declares no other member dead. Its health is 2 or better within ten intervals after the
// losses have ended.
func TestSwimOverflow(t *testing.T) {
	first := testSeed(t, 1)
	for seed := first; seed < first+5; seed++ {
		s := joinedSim(t, 5, seed)
		s.cut = func(_, to int) bool { return to == 4 && s.rng.Float64() < .8 }
		s.run(20 * time.Second)
		s.cut = nil
		s.until(10*s.interval, "the health is 2 or better", func() bool { return s.nodes[4].swim.Health <= 2 })
		if k := s.downs(0, nil); k > 0 {
			t.Errorf("seed %d: %d live members were declared dead", seed, k)
		}
	}
}

// A recordingConn is a UDPConn that records the datagrams sent to each address.
type recordingConn struct {
	UDPConn
	sent *sentDatagrams
}

type sentDatagrams struct {
	mu sync.Mutex // guards to
	to map[netip.AddrPort][][]byte
}

func (c *recordingConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	c.sent.mu.Lock()
	c.sent.to[to] = append(c.sent.to[to], slices.Clone(b))
	c.sent.mu.Unlock()
	return c.UDPConn.WriteToUDPAddrPort(b, to)
}

// While somebody replays datagrams to a restarted member as fast as this machine allows, no live
// member is declared dead, and a death becomes known within ten times the usual time. The health of
// all members is 2 or better within 20 intervals after the flood.
func TestGossipReplayFlood(t *testing.T) {
	if testing.Short() {
		t.Skip("takes several seconds")
	}
	const interval = 500 * time.Millisecond
	sent := &sentDatagrams{to: map[netip.AddrPort][][]byte{}}
	var downs sync.Map // names of members that some member has declared dead
	var all []*gossiper
	start := func(name, listen string, last RestartState) *gossiper {
		c := GossipConfig{Name: name, Interval: interval, RestartState: last, Notify: func(e GossipEvent) {
			if e.What == EventDown {
				downs.Store(e.Name, true)
			}
		}}
		if len(all) > 0 {
			c.Seeds = []string{all[0].addr.String()}
		}
		return startGossipOver(t, c, listen, func(u UDPConn) UDPConn { return &recordingConn{u, sent} })
	}
	for i := range 6 {
		all = append(all, start(fmt.Sprint("n", i), "127.0.0.1:0", RestartState{}))
	}
	eventually(t, "all members have joined", allLive(all, 6))
	timeOfDeath := func(limit time.Duration) time.Duration { // ends the last member
		begin, n := time.Now(), len(all)-1
		all[n].kill()
		all = all[:n]
		eventuallyWithin(t, limit, 2*time.Millisecond, "all know of a death", allLive(all, n))
		return time.Since(begin)
	}
	usual := max(timeOfDeath(time.Minute), 2*interval)

	restarted := all[1]
	last := restarted.RestartState()
	restarted.kill()
	flooding, end := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		conn, err := net.ListenUDP("udp", nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		for flooding.Err() == nil {
			sent.mu.Lock()
			datagrams := slices.Clone(sent.to[restarted.addr])
			sent.mu.Unlock()
			for _, d := range datagrams {
				conn.WriteToUDPAddrPort(d, restarted.addr)
			}
		}
	})
	defer wg.Wait()
	defer end()
	all[1] = start("n1", restarted.addr.String(), last)
	eventually(t, "the restarted member has joined", allLive(all, 5))
	timeOfDeath(10 * usual)
	end()
	wg.Wait()
	eventuallyWithin(t, 20*interval, 2*time.Millisecond, "the health of all members is 2 or better", func() bool {
		return !slices.ContainsFunc(all, func(g *gossiper) bool { return g.Stats().Health > 2 })
	})
	for _, name := range []string{"n0", "n1", "n2", "n3"} {
		if _, down := downs.Load(name); down {
			t.Errorf("%s was declared dead", name)
		}
	}
	if all[1].Stats().Refused == (RefusedPackets{}) {
		t.Error("the restarted member has refused no packet, so there was no flood")
	}
}
