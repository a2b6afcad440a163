package main

// Tests of the events that a member reports about packets and records of other hosts.

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// takeEvents returns the events with the text what that the latest call of Receive or Tick of s has
// reported.
func takeEvents(s *Swim, what string) (events []GossipEvent) {
	for _, e := range s.Events {
		if e.What == what {
			events = append(events, e)
		}
	}
	return events
}

// A member reports packets that it cannot open at once, and then at most once a minute for each
// reason. A report counts the packets since the report before, and names at most four senders.
func TestSwimReportsUnopened(t *testing.T) {
	foreign := testSealer(t, 9, "sim", 7).Seal(nil, []byte("x"), 0)
	for what, packet := range map[string]func(s *sim) []byte{
		EventOtherKey: func(*sim) []byte { return foreign },
		EventForged: func(s *sim) []byte {
			p := s.seal(1, Packet{Kind: PacketGossip, To: s.nodes[0].name})
			return p[:len(p)-1]
		},
	} {
		s := joinedSim(t, 2, testSeed(t, 1))
		a := s.nodes[0].swim
		sender := func(i int) netip.AddrPort { return netip.AddrPortFrom(strangerAddr.Addr(), uint16(i)) }
		s.deliver(0, sender(1), packet(s))
		if got := takeEvents(a, what); len(got) != 1 || got[0] != (GossipEvent{What: what, Addr: sender(1).String(), Count: 1}) {
			t.Errorf("the first packet is reported as %+v", got)
		}
		for i := range 1000 {
			s.deliver(0, sender(1+i%100), packet(s))
			if got := takeEvents(a, what); len(got) > 0 {
				t.Fatalf("packet %d within a minute is reported: %+v", i, got)
			}
		}
		s.now += limitedEventEvery
		s.deliver(0, sender(1), packet(s))
		want := fmt.Sprintf("%v, %v, %v, %v", sender(1), sender(2), sender(3), sender(4))
		if got := takeEvents(a, what); len(got) != 1 || got[0].Count != 1001 || got[0].Addr != want {
			t.Errorf("after a minute got the reports %+v, want one of 1001 packets from %s", got, want)
		}
	}
}

// A member that starts without a stored state reports once that the ring knows its name, if an
// earlier run of it was a member, whether that run has ended or left. It does not report this at its
// very first start, nor after a restart with its state.
func TestSwimReportsNewStorage(t *testing.T) {
	for _, lost := range []struct {
		node int // node 0 has no seeds: other members find it
		end  string
	}{{0, "killed"}, {0, "left"}, {1, "killed"}, {1, "left"}} {
		for seed := range uint64(20) { // the new session has a lower number than the old one with some seeds, and a higher with others
			s := newSim(t, 3, seed)
			s.startAll()
			s.until(10*time.Second, "all join", s.agree)
			s.restart(2)
			s.until(10*time.Second, "node 2 joins again", s.agree)
			s.run(3 * time.Second)
			if n := s.eventCount(EventNewStorage); n > 0 {
				t.Fatalf("%d reports although no state is lost", n)
			}
			n := s.nodes[lost.node]
			if lost.end == "left" {
				n.swim.Leave()
				n.timer = -1
				s.arm(lost.node)
			} else {
				s.kill(lost.node)
			}
			s.run(time.Duration(seed%4) * time.Second) // the other members may still consider the node live
			n.state = RestartState{}
			s.restart(lost.node)
			s.until(20*time.Second, "the node joins again", s.agree)
			s.run(10 * time.Second)
			for _, e := range s.events {
				if e.What == EventNewStorage && (e.node != lost.node || e.Name != n.name) {
					t.Errorf("node %d reports %+v", e.node, e)
				}
			}
			if got := s.eventCount(EventNewStorage); got != 1 {
				t.Errorf("seed %d, node %d %s: %d reports, want 1", seed, lost.node, lost.end, got)
			}
		}
	}
}

// A member reports another live member that advertises its address, and not a dead one.
func TestSwimReportsSameAddress(t *testing.T) {
	s := joinedSim(t, 2, testSeed(t, 1))
	a := s.nodes[0].swim
	for i, c := range []struct {
		addr  string
		state MemberState
		want  int
	}{{a.self.Addr, StateDead, 0}, {"10.9.9.9:1", StateAlive, 0}, {a.self.Addr, StateAlive, 1}} {
		r := MemberRecord{Name: fmt.Sprint("x", i), Session: 1, Addr: c.addr, Slot: NoSlot, State: c.state}
		s.deliver(0, s.nodes[1].addr, s.seal(1, Packet{Kind: PacketGossip, To: a.name, Records: []MemberRecord{r}}))
		if got := takeEvents(a, EventSameAddress); len(got) != c.want || a.table.Get(r.Name) == nil {
			t.Errorf("%v at %s: got the reports %+v, want %d", c.state, c.addr, got, c.want)
		}
	}
}

// A member that leaves while a ping to it is not answered is not reported as unreachable, even if it
// sends from another address than it advertises. One that stays is reported.
func TestSwimLeaveIsNotUnreachable(t *testing.T) {
	for _, leaves := range []bool{true, false} {
		s := joinedSim(t, 2, testSeed(t, 1))
		a, b := s.nodes[0], s.nodes[1]
		s.move(1)
		s.cut = func(from, to int) bool { return from == 0 }
		s.until(5*time.Second, "a probe begins", func() bool { return a.swim.requests.find(requestProbe, b.name) != nil })
		if leaves {
			b.swim.Leave()
			b.timer = -1
			s.arm(1)
		}
		s.run(10 * time.Second)
		if got := s.eventCount(EventUnreachable); (got == 0) != leaves {
			t.Errorf("leaves: %t: %d reports that the member is unreachable", leaves, got)
		}
	}
}

// An event is at least a warning if its text tells the operator what to do.
func TestGossipEventLevel(t *testing.T) {
	for _, c := range []struct {
		what string
		want slog.Level
	}{
		{EventUp, slog.LevelInfo}, {EventLeft, slog.LevelInfo}, {EventJoined, slog.LevelInfo}, {EventDown, slog.LevelWarn},
		{EventJoinFails, slog.LevelWarn}, {EventJoinPartly, slog.LevelWarn}, {EventOtherKey, slog.LevelWarn}, {EventStoodDown, slog.LevelError},
	} {
		if got := (GossipEvent{What: c.what}).Level(); got != c.want {
			t.Errorf("%s: got level %v, want %v", c.what, got, c.want)
		}
	}
	if !strings.Contains(EventStoodDown, "--name") {
		t.Error("the report of a name that is taken does not name --name")
	}
}
