package main

// Tests of whole rings in the simulator: replayed packets, restarts, two members with one name,
// rotation of keys, stalls, clock jumps and the merging of rings.

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A member that left or died is never considered live again, even if all packets that were sent
// until its leave or death was known are replayed, at once and up to three days later.
func TestSweepNoGhosts(t *testing.T) {
	sweep(t)
	s := newSim(t, 5, testSeed(t, 1))
	s.interval = 10 * time.Second // a long interval, so that simulating days takes few events
	type packet struct {
		from, to int
		data     []byte
	}
	var all []packet
	s.tap = func(from, to int, data []byte) { all = append(all, packet{from, to, data}) }
	s.startAll()
	s.until(100*time.Second, "all join", s.agree)
	s.run(100 * time.Second)
	s.nodes[3].swim.Leave()
	s.arm(3)
	s.until(100*time.Second, "all know of the leave", func() bool { return s.knowGone(3) })
	s.kill(3)
	s.kill(4)
	s.until(200*time.Second, "all know of the deaths", s.agree)
	s.tap = nil
	s.restart(2) // from now on, node 2 knows nodes 3 and 4 only from records of other members
	s.until(200*time.Second, "node 2 joins again", s.agree)
	s.events = nil
	for _, wait := range []time.Duration{0, time.Minute, tombstoneLife / 2, tombstoneLife} {
		s.run(wait)
		for i, p := range all {
			for to := range 3 {
				s.push(simEvent{at: s.now + time.Duration(i)*time.Millisecond, node: to, from: s.nodes[p.from].addr, data: p.data})
			}
		}
		s.run(time.Duration(len(all))*time.Millisecond + 100*time.Second)
	}
	for _, e := range s.events {
		if e.What == EventUp {
			t.Errorf("at %v node %d considers %s up", e.at, e.node, e.Name)
		}
	}
	if !s.agree() {
		t.Error("the members do not agree about which members are live")
	}
}

// After a member restarts, in any of the ways listed, all members soon know its new session and
// address. The other members declare none of each other dead, and the session stored for the
// restarted member's next start is its new session.
func TestSwimRestarts(t *testing.T) {
	seed := testSeed(t, 1)
	forget := func(s *sim, i int) { s.nodes[i].state = RestartState{} }
	leave := func(s *sim, i int) { s.nodes[i].swim.Leave(); s.arm(i); s.run(5 * time.Second) }
	die := func(s *sim, i int) { s.kill(i); s.run(20 * time.Second) }
	for about, restart := range map[string]func(s *sim, i int){
		"restart":                   func(s *sim, i int) { s.restart(i) },
		"new address":               func(s *sim, i int) { s.move(i); s.restart(i) },
		"lost state":                func(s *sim, i int) { forget(s, i); s.restart(i) },
		"lost state, new address":   func(s *sim, i int) { forget(s, i); s.move(i); s.restart(i) },
		"after a death":             func(s *sim, i int) { die(s, i); s.restart(i) },
		"lost state, after a death": func(s *sim, i int) { die(s, i); forget(s, i); s.restart(i) },
		"after a leave":             func(s *sim, i int) { leave(s, i); s.restart(i) },
		"lost state, after a leave": func(s *sim, i int) { leave(s, i); forget(s, i); s.restart(i) },
		"two restarts":              func(s *sim, i int) { s.restart(i); s.run(300 * time.Millisecond); s.restart(i) },
		"no seeds":                  func(s *sim, i int) { s.restart(i, []int{}...) },
		"seed is the member itself": func(s *sim, i int) { s.restart(i, i, 0, 1, 2) },
	} {
		for _, i := range []int{0, 4} { // node 0 is the seed of all other members; node 4 is no seed
			t.Run(fmt.Sprintf("%s/node %d", about, i), func(t *testing.T) {
				s := joinedSim(t, 6, seed)
				session := s.nodes[i].state.Session
				restart(s, i)
				settled := func() bool { return s.agree() && s.allKnow(i, session) }
				s.until(20*time.Second, "all know the new session", settled)
				s.run(20 * time.Second)
				if !settled() {
					t.Error("20 s later, the members no longer agree")
				}
				if n := s.downs(0, func(e simReport) bool { return e.Name != s.nodes[i].name && e.node != i }); n > 0 {
					t.Errorf("got %d deaths of other members, want none", n)
				}
				if n := s.eventCount(EventStoodDown) + s.eventCount(EventNameConflict); n > 0 {
					t.Errorf("got %d name conflicts, want none", n)
				}
				if got, want := s.nodes[i].state.Session, s.nodes[i].swim.self.Session; got != want {
					t.Errorf("stored session is %x, want %x", got, want)
				}
			})
		}
	}
}

// allKnow reports whether all members have a record of node i with its current session and address,
// and whether that session is higher than old.
func (s *sim) allKnow(i int, old uint64) bool {
	for _, n := range s.nodes {
		m := n.swim.table.Get(s.nodes[i].name)
		if m == nil || m.Session != s.nodes[i].swim.self.Session || m.Session <= old || m.Addr != s.nodes[i].addr.String() {
			return false
		}
	}
	return true
}

// A member without seeds that lost its state ends up with a higher session than before: it learns
// its earlier session from the members that look for it. The first server of a ring is such a
// member if it keeps its state only in memory.
func TestSwimRestartsLostWithoutSeeds(t *testing.T) {
	first := testSeed(t, 1)
	// The session after the restart is random. With about half of the simulation's random seeds it
	// is higher than the earlier session even before the member learns of the earlier session.
	for seed := first; seed < first+8; seed++ {
		s := joinedSim(t, 4, seed)
		session := s.nodes[0].state.Session
		s.kill(0)
		s.until(20*time.Second, "all know of the death", s.agree)
		s.nodes[0].state = RestartState{}
		s.start(0)
		s.until(20*time.Second, "all agree again", s.agree)
		if got := s.nodes[0].state.Session; got <= session {
			t.Errorf("seed %d: got session %x after %x, want a higher one", seed, got, session)
		}
	}
}

// Of two members with the same name that can reach each other, the member with the lower session
// stands down, whichever of the two joined first. All other members have the record of the member
// with the higher session.
func TestSwimNameTaken(t *testing.T) {
	seed := testSeed(t, 1)
	for _, higher := range []bool{false, true} {
		s := newSim(t, 5, seed)
		s.nodes[4].name = "node-003"
		s.nodes[3].state.Session = 5 * sessionStep
		if higher {
			s.nodes[4].state.Session = 9 * sessionStep
		}
		for i := range 4 {
			s.start(i)
		}
		s.run(10 * time.Second)
		s.start(4)
		winner, loser := 3, 4
		if higher {
			winner, loser = 4, 3
		}
		s.until(20*time.Second, "the member with the lower session stands down", func() bool { return s.nodes[loser].swim.StoodDown })
		s.kill(loser)
		s.run(20 * time.Second)
		for _, i := range []int{0, 1, 2} {
			if m := s.nodes[i].swim.table.Get("node-003"); m == nil || m.State != StateAlive || m.Session != s.nodes[winner].swim.self.Session {
				t.Errorf("second member has the higher session: %v; node %d has the record %+v", higher, i, m)
			}
		}
		if s.nodes[winner].swim.StoodDown || s.eventCount(EventNameConflict) == 0 || s.eventCount(EventStoodDown) != 1 {
			t.Errorf("second member has the higher session: %v; got events %v", higher, s.events)
		}
	}
}

// No member is declared dead while the members add a new key one after another, and then delete the
// old key one after another. A member whose first key is the new key can join while some other
// members have only the old key.
func TestSwimRotation(t *testing.T) {
	s := joinedSim(t, 6, testSeed(t, 1))
	steps := []Keys{testKeys(t, 2, 1), testKeys(t, 2)}
	for _, keys := range steps {
		for i, n := range s.nodes {
			if err := n.swim.SetKeys(keys); err != nil {
				t.Fatal(err)
			}
			s.arm(i)
			s.run(3 * time.Second)
			if keys.IDs()[0] == steps[0].IDs()[0] && i == 2 {
				s.keys = steps[0] // node 5 starts with both keys, while nodes 3 and 4 have only the old key
				s.restart(5)
				s.until(20*time.Second, "node 5 joins with the new key first", s.agree)
			}
		}
		s.run(10 * time.Second)
		want := s.nodes[0].swim.sealer.KeyIDs()[0]
		for _, m := range s.nodes[3].swim.View().Members {
			if m.KeyID != want {
				t.Errorf("key ID of %s: got %08x, want %08x", m.Name, m.KeyID, want)
			}
		}
	}
	if n := s.downs(0, nil); n > 0 || !s.agree() {
		t.Errorf("got %d deaths, want none and agreement of all members", n)
	}
}

// A member that was away during a rotation of keys joins again if it has any key in common with the
// other members. The reason is that each member seals a packet to a member that is not live with a
// key that it chooses at random among its own keys.
func TestSwimRotationAway(t *testing.T) {
	seed := testSeed(t, 1)
	for about, c := range map[string]struct {
		keys  Keys
		seeds []int
	}{
		"only the new key":                 {testKeys(t, 2), []int{0}},
		"only the new key, no seeds":       {testKeys(t, 2), []int{}},
		"only the old key":                 {testKeys(t, 1), []int{0}},
		"a third key first, one seed dead": {testKeys(t, 3, 2), []int{0, 3}},
	} {
		s := joinedSim(t, 4, seed)
		s.kill(2)
		s.kill(3)
		s.until(20*time.Second, "all know of two deaths", s.agree)
		for i := range 2 {
			if err := s.nodes[i].swim.SetKeys(testKeys(t, 2, 1)); err != nil {
				t.Fatal(err)
			}
			s.arm(i)
		}
		s.run(5 * time.Second)
		s.keys = c.keys
		s.start(2, c.seeds...)
		s.until(30*time.Second, "node 2 joins again with "+about, s.agree)
	}
}

// A member whose clock jumps back or ahead by an hour suspects no other member. No other member
// suspects a member whose clock jumps ahead.
func TestSwimClocks(t *testing.T) {
	seed := testSeed(t, 1)
	for _, jump := range []time.Duration{-time.Hour, time.Hour} {
		s := joinedSim(t, 5, seed)
		s.events = nil
		for range 5 {
			s.nodes[1].origin -= jump
			s.nodes[1].timer = -1
			s.arm(1)
			s.run(7 * time.Second)
		}
		if jump > 0 && (s.eventCount(EventSuspect) > 0 || !s.agree()) {
			t.Errorf("clock jump of %v: got events %v, want no suspicion and agreement", jump, s.events)
		}
		for _, e := range s.events {
			if e.node == 1 && (e.What == EventSuspect || e.What == EventDown) {
				t.Errorf("clock jump of %v: the member reports %v", jump, e)
			}
		}
	}
}

// A member that stalls for 20 s is declared dead. After the stall it suspects no other member and
// soon is live again.
func TestSwimStall(t *testing.T) {
	s := joinedSim(t, 10, testSeed(t, 1))
	s.events = nil
	s.nodes[4].stalled = s.now + 20*time.Second
	s.run(20 * time.Second)
	if n := s.downs(0, nil); n != 9 {
		t.Errorf("%d members declare the stalled member dead, want 9", n)
	}
	s.until(10*time.Second, "the stalled member is live again", s.agree)
	s.run(20 * time.Second)
	for _, e := range s.events {
		if e.node == 4 && (e.What == EventSuspect || e.What == EventDown) {
			t.Errorf("after its stall the member reports %+v", e)
		}
	}
}

// Two separate rings with the same ring name and keys become one ring soon after a member of one
// ring gets a seed in the other ring. Every member then knows all members and all claims.
func TestSwimTwoRings(t *testing.T) {
	s := newSim(t, 20, testSeed(t, 1))
	for i := range s.nodes {
		sw := s.start(i, i%2)
		sw.AnnounceClaim(uint16(i), uint64(i+1), false)
	}
	s.run(20 * time.Second)
	if s.nodes[0].swim.table.Live != 10 {
		t.Fatal("the two rings have met too early")
	}
	s.nodes[5].swim.SetSeeds([]netip.AddrPort{s.nodes[8].addr})
	s.until(10*time.Second, "the rings have become one", s.agree)
	s.run(5 * time.Second)
	for _, n := range s.nodes {
		v := n.swim.View()
		if v.Buckets != 20 || v.MaxLamport != 20 || !v.Joined || !slices.IsSortedFunc(v.Members, func(a, b MemberSnapshot) int { return int(a.Slot) - int(b.Slot) }) {
			t.Errorf("%s has the view %+v, want 20 members in the order of their slots", n.name, v)
		}
	}
	if n := s.downs(0, nil); n > 0 {
		t.Errorf("got %d deaths, want none", n)
	}
}

// No packet of a sender that holds the key makes a member panic, or send a packet longer than
// MaxPacket. The member answers with at most four packets plus one for each record in the packet.
func FuzzSwim(f *testing.F) {
	for _, p := range []Packet{longestPacket(), {Kind: PacketHello, From: "x", RequestID: 1}, {Kind: PacketPingReq, To: "node-001", Target: "node-002", RequestID: 1},
		{Kind: PacketSync, WantTable: true, TableSettled: true, To: "node-001", Records: []MemberRecord{{Name: "node-001", Incarnation: 1<<32 - 1, State: StateDead, Addr: "x"}}},
		{Kind: PacketGossip, Records: []MemberRecord{{Name: "node-000", State: StateLeft, Addr: "x"}}}} {
		if p.From == "" {
			p.From = "node-000"
		}
		if p.To != "" {
			p.To = "node-001"
		}
		f.Add(encodePacket(p), true)
		f.Add(encodePacket(p), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, known bool) {
		s := newSim(t, 3, 1)
		s.startAll()
		s.run(200 * time.Millisecond)
		var p Packet
		if len(b) > maxPlainPacket || DecodePacket(b, &p) != nil {
			return
		}
		p.To = s.nodes[1].name
		if known {
			p.From, p.Session = s.nodes[0].name, s.nodes[0].swim.self.Session
		}
		if b = encodePacket(p); len(b) > maxPlainPacket {
			return
		}
		if out := s.deliver(1, s.nodes[0].addr, s.nodes[0].swim.sealer.Seal(nil, b, 0)); len(out) > 4+len(p.Records) {
			t.Errorf("got %d packets in answer to one packet with %d records", len(out), len(p.Records))
		}
		s.arm(1)
		s.run(10 * time.Second)
	})
}
