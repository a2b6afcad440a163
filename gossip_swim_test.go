package main

// Tests of the state machine under virtual time: what a member refuses, and how a ring gets over
// what happens to its members. The figures are in rig_gossip_test.go.

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// lastTo records the last packet of a kind, or of any kind (0), between two nodes.
func (s *sim) lastTo(from, to int, kind PacketKind, last *[]byte) {
	next := s.tap
	s.tap = func(f, t int, data []byte) {
		if next != nil {
			next(f, t, data)
		}
		if f == from && t == to && (kind == 0 || s.decode(f, data).Kind == kind) {
			*last = data
		}
	}
}

// decode opens a packet of node i.
func (s *sim) decode(i int, data []byte) (p Packet) {
	plain, _, err := s.nodes[i].swim.sealer.Open(nil, data)
	if err == nil {
		err = DecodePacket(plain, &p)
	}
	if err != nil {
		s.tb.Fatal(err)
	}
	return p
}

// seal makes a packet of node from's as its Swim would.
func (s *sim) seal(from int, p Packet) []byte {
	sw := s.nodes[from].swim
	if p.Session == 0 {
		p.Session = sw.self.Session
	}
	if p.From == "" {
		p.From = sw.name
	}
	return sw.sealer.Seal(nil, encodePacket(p), 0)
}

// deliver hands node i a packet, and returns what it says to it.
func (s *sim) deliver(i int, from netip.AddrPort, data []byte) []Datagram {
	n := s.nodes[i]
	return n.swim.Receive(s.now-n.origin, from, data)
}

func TestSwimRefuses(t *testing.T) {
	s := newSim(t, 3, 1)
	var ping []byte
	s.lastTo(0, 1, PacketPing, &ping)
	s.startAll()
	s.until(10*time.Second, "join", s.agree)
	s.until(10*time.Second, "a ping", func() bool { return ping != nil })
	s.run(time.Second)
	a, b := s.nodes[0], s.nodes[1]
	stranger := netip.MustParseAddrPort("192.0.2.7:1")
	foreign := testSealer(t, 9, "sim", 7)
	elsewhere := testSealer(t, 9, "not sim", 1)
	dead := MemberRecord{Name: "node-002", Session: s.nodes[2].swim.self.Session, Incarnation: 99, State: StateDead, Addr: "x:1", Slot: NoSlot}
	body := encodePacket(Packet{Kind: PacketPing, To: b.name, From: a.name, Session: a.swim.self.Session, RequestID: 5, Records: []MemberRecord{dead}})
	nonce := b.swim.addRequestIfRoom(pendingRequest{purpose: requestReconnect, name: "node-002", dueAt: s.now - b.origin + time.Hour}).id
	for _, c := range []struct {
		about  string
		packet []byte
		want   int // which count goes up
	}{
		{"replayed", ping, RefusedReplay},
		{"truncated", ping[:len(ping)-1], RefusedForged},
		{"cut to nothing", ping[:10], RefusedUnsealed},
		{"longer than a packet may be", a.swim.sealer.Seal(nil, make([]byte, MaxPacket), 0), RefusedUnsealed},
		{"of another version", otherVersion(ping, sealVersion+1), RefusedVersion},
		{"of another version, of any length", []byte{sealVersion + 1}, RefusedVersion},
		{"foreign key", foreign.Seal(nil, body, 0), RefusedKey},
		{"another ring", elsewhere.Seal(nil, body, 0), RefusedForged},
		{"nonsense", a.swim.sealer.Seal(nil, []byte("nonsense"), 0), RefusedMalformed},
		{"redirected to another member", s.seal(0, Packet{Kind: PacketPing, To: "node-002", RequestID: 5, Records: []MemberRecord{dead}}), RefusedMisrouted},
		{"old session", s.seal(0, Packet{Kind: PacketPing, To: b.name, Session: a.swim.self.Session - 1, RequestID: 5, Records: []MemberRecord{dead}}), RefusedSession},
		{"another member's session", s.seal(0, Packet{Kind: PacketGossip, To: b.name, Session: min(a.swim.self.Session, b.swim.self.Session) - 1, Records: []MemberRecord{dead}}), RefusedSession},
		{"our own session", s.seal(0, Packet{Kind: PacketGossip, To: b.name, From: b.name, Session: b.swim.self.Session, Records: []MemberRecord{dead}}), RefusedMisrouted},
		{"answers what another was asked", s.seal(0, Packet{Kind: PacketAck, To: b.name, ReplyTo: nonce}), RefusedUnasked},
		{"answers what nobody asked", s.seal(0, Packet{Kind: PacketAck, To: b.name, ReplyTo: 12345}), RefusedUnasked},
		{"passes on an answer though not asked to", s.seal(0, Packet{Kind: PacketAck, To: b.name, Target: "node-002", ReplyTo: nonce}), RefusedUnasked},
	} {
		before := b.swim.Refused
		out := s.deliver(1, stranger, c.packet)
		before[c.want]++
		if b.swim.Refused != before || len(out) > 0 {
			t.Errorf("%s: counts are %v, want %v; %d answers", c.about, b.swim.Refused, before, len(out))
		}
		if c.want != RefusedUnasked && b.swim.table.Get("node-002").State != StateAlive {
			t.Errorf("%s: believed", c.about)
		}
	}
	if b.swim.requests.find(requestReconnect, "node-002") == nil {
		t.Error("a request counts as answered by another")
	}
	// A session not known yet, or known from others alone, is asked for proof, and not
	// believed until it gives it.
	s.deliver(1, stranger, s.seal(0, Packet{Kind: PacketGossip, To: b.name, Records: []MemberRecord{{Name: "rumour", Session: 1, Addr: "x:1", Slot: NoSlot}}}))
	for _, p := range []Packet{
		{Kind: PacketPing, To: b.name, From: "rumour", Session: 1, RequestID: 5, Records: []MemberRecord{dead}},
		{Kind: PacketPing, To: b.name, Session: a.swim.self.Session + sessionStep, RequestID: 5, Records: []MemberRecord{dead}},
		{Kind: PacketPing, To: b.name, From: "new", Session: 1, RequestID: 5, Records: []MemberRecord{dead, {Name: "new", Session: 1, Addr: "x:1", Slot: NoSlot}}},
	} {
		refused := b.swim.Refused[RefusedStranger]
		out := s.deliver(1, stranger, s.seal(0, p))
		if len(out) != 1 || b.swim.Refused[RefusedStranger] != refused+1 || b.swim.table.Get("node-002").State != StateAlive || b.swim.table.Get("new") != nil {
			t.Errorf("%+v is believed, or not challenged: %d answers", p, len(out))
		} else if q := s.decode(1, out[0].Data); q.RequestID == 0 || q.ReplyTo != 5 || out[0].To.AddrPort != stranger {
			t.Errorf("the challenge is %+v", q)
		}
		if p.From == "new" { // the proof must come under its name, and the window starts there
			proof := s.seal(0, Packet{Kind: PacketAck, To: b.name, From: "new", Session: 1, ReplyTo: s.decode(1, out[0].Data).RequestID, Records: p.Records[1:]})
			s.deliver(1, stranger, proof)
			if m := b.swim.table.Get("new"); m == nil || !m.Proven {
				t.Error("a proof is not accepted")
			}
			replays := b.swim.Refused[RefusedReplay]
			if out := s.deliver(1, stranger, proof); len(out) > 0 || !b.swim.table.Get("new").Proven || b.swim.Refused[RefusedReplay] != replays+1 {
				t.Error("a proof is accepted twice")
			}
		}
	}
}

// Packets of another version are counted, and reported in words, but not each of them.
func TestSwimReportsVersion(t *testing.T) {
	s := joinedSim(t, 2, 1)
	a, from := s.nodes[0].swim, s.nodes[1].addr
	packet := otherVersion(s.seal(1, Packet{Kind: PacketGossip, To: a.name}), 9)
	const want = EventVersion + ": sealed by another version of telemeter: it has version 9; this program knows version 2"
	for _, c := range []struct {
		after time.Duration
		event bool
	}{{0, true}, {0, false}, {versionEventEvery - 2*time.Second, false}, {2 * time.Second, true}, {0, false}} {
		s.now += c.after
		refused := a.Refused[RefusedVersion]
		out := s.deliver(0, from, packet)
		got := slices.Contains(a.Events, GossipEvent{What: want, Addr: from.String()})
		if got != c.event || a.Refused[RefusedVersion] != refused+1 || len(out) > 0 {
			t.Errorf("%v later: events %v, %d answers, %d refused after %d", c.after, a.Events, len(out), a.Refused[RefusedVersion], refused)
		}
	}
	if names := RefusedReasonNames(); names[RefusedVersion] != "version" || names[RefusedUnasked] != "unasked" {
		t.Errorf("the reasons are %v", names)
	}
}

// A packet that a member sent and gets back says nothing of where its seeds are, and leads to one
// request at most, however often it comes back.
func TestSwimReflected(t *testing.T) {
	s := newSim(t, 2, 1)
	var hello []byte
	s.tap = func(from, to int, data []byte) { hello = data }
	s.start(1) // the seed is not there yet
	s.until(time.Second, "asks the seed", func() bool { return hello != nil })
	if out := s.deliver(1, s.nodes[0].addr, hello); len(out) > 0 {
		t.Errorf("%d answers to what it said itself", len(out))
	}
	s.tap = nil
	s.run(10 * time.Second)
	s.start(0, 0)
	s.until(10*time.Second, "joins a seed that was reflected", s.agree)
	s.restart(1)
	pending := len(s.nodes[1].swim.requests)
	for range maxPendingRequests {
		s.deliver(1, s.nodes[0].addr, hello) // of an earlier session
	}
	if n := len(s.nodes[1].swim.requests); n > pending+1 {
		t.Errorf("%d requests because of one packet", n)
	}
}

// All that ever went over the wire is sent again after a member left, and after
// another died, at once and for long: nobody comes back.
func TestSweepNoGhosts(t *testing.T) {
	sweep(t)
	s := newSim(t, 5, 1)
	s.interval = 10 * time.Second // it is a matter of days
	type packet struct {
		from, to int
		data     []byte
	}
	var all []packet
	s.tap = func(from, to int, data []byte) { all = append(all, packet{from, to, data}) }
	s.startAll()
	s.until(100*time.Second, "join", s.agree)
	s.run(100 * time.Second)
	s.nodes[3].swim.Leave()
	s.arm(3)
	s.until(100*time.Second, "leave", func() bool { return s.knowGone(3) })
	s.kill(3)
	s.kill(4)
	s.until(200*time.Second, "death", s.agree)
	s.tap = nil
	s.restart(2) // it has never met who is gone
	s.until(200*time.Second, "restart", s.agree)
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
			t.Errorf("after %v node %d thinks that %s is up", e.at, e.node, e.Name)
		}
	}
	if !s.agree() {
		t.Error("not all agree")
	}
}

// restart ends node i, which does not leave, and starts it again from its state.
func (s *sim) restart(i int, seeds ...int) {
	s.kill(i)
	s.start(i, seeds...)
}

func (s *sim) move(i int) {
	n := s.nodes[i]
	n.addr = netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprint("fd00::", i+1)), 9006)
	s.byAddr[n.addr] = i
}

func (s *sim) eventCount(what string) (n int) {
	for _, e := range s.events {
		if e.What == what {
			n++
		}
	}
	return n
}

// Every way to start again ends with all agreeing, soon, with nobody else taken
// for dead on the way.
func TestSwimRestarts(t *testing.T) {
	for about, again := range map[string]func(s *sim, i int){
		"same":        func(s *sim, i int) { s.restart(i) },
		"new address": func(s *sim, i int) { s.move(i); s.restart(i) },
		"state lost":  func(s *sim, i int) { s.nodes[i].state = RestartState{}; s.restart(i) },
		"lost, moved": func(s *sim, i int) { s.nodes[i].state = RestartState{}; s.move(i); s.restart(i) },
		"after death": func(s *sim, i int) { s.kill(i); s.run(20 * time.Second); s.restart(i) },
		"lost, dead": func(s *sim, i int) {
			s.kill(i)
			s.run(20 * time.Second)
			s.nodes[i].state = RestartState{}
			s.restart(i)
		},
		"after leave": func(s *sim, i int) { s.nodes[i].swim.Leave(); s.arm(i); s.run(5 * time.Second); s.restart(i) },
		"lost, left": func(s *sim, i int) {
			s.nodes[i].swim.Leave()
			s.arm(i)
			s.run(5 * time.Second)
			s.nodes[i].state = RestartState{}
			s.restart(i)
		},
		"twice":        func(s *sim, i int) { s.restart(i); s.run(300 * time.Millisecond); s.restart(i) },
		"no seeds":     func(s *sim, i int) { s.restart(i, []int{}...) },
		"seed is self": func(s *sim, i int) { s.restart(i, i, 0, 1, 2) },
	} {
		for _, i := range []int{0, 4} { // the seed of all, and another
			s := joinedSim(t, 6, 1)
			session := s.nodes[i].state.Session
			again(s, i)
			settled := func() bool {
				for _, n := range s.nodes {
					m := n.swim.table.Get(s.nodes[i].name)
					if m == nil || m.Session != s.nodes[i].swim.self.Session || m.Session <= session || m.Addr != s.nodes[i].addr.String() {
						return false
					}
				}
				return s.agree()
			}
			took := s.until(20*time.Second, about, settled)
			s.run(20 * time.Second)
			others := s.downs(0, func(e simReport) bool { return e.Name != s.nodes[i].name && e.node != i })
			if others > 0 || !settled() || s.eventCount(EventStoodDown)+s.eventCount(EventNameConflict) > 0 {
				t.Errorf("%s, node %d: settled after %v, later %v; %d others were taken for dead", about, i, took, settled(), others)
			}
			if st := s.nodes[i].state; st.Session != s.nodes[i].swim.self.Session {
				t.Errorf("%s: session %x is not reported to be stored, %x", about, s.nodes[i].swim.self.Session, st.Session)
			}
		}
	}
}

// A member without seeds that lost its state (such as the first server of a ring, with memory
// only) learns of its earlier session from the members that look for it.
func TestSwimRestartsLostWithoutSeeds(t *testing.T) {
	for seed := range uint64(8) { // the new session is as often the higher as the lower
		s := joinedSim(t, 4, seed)
		session := s.nodes[0].state.Session
		s.kill(0)
		s.until(20*time.Second, "it is down", s.agree)
		s.nodes[0].state = RestartState{}
		s.start(0)
		s.until(20*time.Second, "it is back", s.agree)
		if got := s.nodes[0].state.Session; got <= session {
			t.Errorf("session %x after %x", got, session)
		}
	}
}

// Of two with one name the lower session stands down, whoever came first, and
// the ring stays as it was for all others.
func TestSwimNameTaken(t *testing.T) {
	for _, higher := range []bool{false, true} {
		s := newSim(t, 5, 1)
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
		s.until(20*time.Second, "one stands down", func() bool { return s.nodes[loser].swim.StoodDown })
		s.kill(loser)
		s.run(20 * time.Second)
		for _, i := range []int{0, 1, 2} {
			if m := s.nodes[i].swim.table.Get("node-003"); m == nil || m.State != StateAlive || m.Session != s.nodes[winner].swim.self.Session {
				t.Errorf("higher %v: node %d thinks %+v", higher, i, m)
			}
		}
		if s.nodes[winner].swim.StoodDown || s.eventCount(EventNameConflict) == 0 || s.eventCount(EventStoodDown) != 1 {
			t.Errorf("higher %v: events %v", higher, s.events)
		}
	}
}

// Keys rotate one member after another, at any pace and in any order, and the
// old ones are deleted, without anybody being taken for dead.
func TestSwimRotation(t *testing.T) {
	s := joinedSim(t, 6, 1)
	steps := []Keys{testKeys(t, 2, 1), testKeys(t, 2)}
	for _, keys := range steps {
		for i, n := range s.nodes {
			if err := n.swim.SetKeys(keys); err != nil {
				t.Fatal(err)
			}
			s.arm(i)
			s.run(3 * time.Second)
			if keys.IDs()[0] == steps[0].IDs()[0] && i == 2 {
				s.keys = steps[0] // one that starts with the new key amid old ones
				s.restart(5)
				s.until(20*time.Second, "joins with the new key first", s.agree)
			}
		}
		s.run(10 * time.Second)
		want := s.nodes[0].swim.sealer.KeyIDs()[0]
		for _, m := range s.nodes[3].swim.View().Members {
			if m.KeyID != want {
				t.Errorf("%s is said to seal with %08x, not %08x", m.Name, m.KeyID, want)
			}
		}
	}
	if n := s.downs(0, nil); n > 0 || !s.agree() {
		t.Errorf("%d taken for dead", n)
	}
}

// A member that was away while keys rotated rejoins with any keys that share one with the
// others, because the others try each of their keys on a member that is not live.
func TestSwimRotationAway(t *testing.T) {
	for about, c := range map[string]struct {
		keys  Keys
		seeds []int
	}{
		"the new one alone":              {testKeys(t, 2), []int{0}},
		"the new one, and is sought":     {testKeys(t, 2), []int{}},
		"the old one alone":              {testKeys(t, 1), []int{0}},
		"a newer one first, a seed down": {testKeys(t, 3, 2), []int{0, 3}},
	} {
		s := joinedSim(t, 4, 1)
		s.kill(2)
		s.kill(3)
		s.until(20*time.Second, "two are down", s.agree)
		for i := range 2 {
			if err := s.nodes[i].swim.SetKeys(testKeys(t, 2, 1)); err != nil {
				t.Fatal(err)
			}
			s.arm(i)
		}
		s.run(5 * time.Second)
		s.keys = c.keys
		s.start(2, c.seeds...)
		s.until(30*time.Second, "comes back with "+about, s.agree)
	}
}

// An answer to a replayed packet does not count as a transmission of an update.
func TestSwimUpdatesSurviveReplays(t *testing.T) {
	s := newSim(t, 3, 1)
	var hello []byte
	s.lastTo(2, 0, PacketHello, &hello)
	s.startAll()
	s.until(10*time.Second, "join", s.agree)
	s.restart(2)
	s.tap = nil
	s.until(10*time.Second, "restart", s.agree)
	s.run(5 * time.Second)
	a := s.nodes[0].swim
	a.AnnounceClaim(1, 1, false)
	for range 100 {
		if out := s.deliver(0, netip.MustParseAddrPort("192.0.2.7:1"), hello); len(out) != 1 || len(out[0].Data) > 2*len(hello) {
			t.Fatalf("%d answers, the first of %d bytes to %d", len(out), len(out[0].Data), len(hello))
		}
	}
	if !a.table.HasUpdates() {
		t.Error("an update counts as passed on")
	}
}

// A clock that goes back stands; one that jumps ahead looks like a stall: neither
// makes a member accuse another.
func TestSwimClocks(t *testing.T) {
	for _, jump := range []time.Duration{-time.Hour, time.Hour} {
		s := joinedSim(t, 5, 1)
		s.events = nil
		for range 5 {
			s.nodes[1].origin -= jump
			s.nodes[1].timer = -1
			s.arm(1)
			s.run(7 * time.Second)
		}
		if jump > 0 && (s.eventCount(EventSuspect) > 0 || !s.agree()) {
			t.Errorf("a jump of %v: events %v", jump, s.events)
		}
		for _, e := range s.events {
			if e.node == 1 && (e.What == EventSuspect || e.What == EventDown) {
				t.Errorf("a jump of %v: %v", jump, e)
			}
		}
	}
}

// A member that stalls is declared dead, suspects no other afterwards, and is back at once.
func TestSwimStall(t *testing.T) {
	s := joinedSim(t, 10, 1)
	s.events = nil
	s.nodes[4].stalled = s.now + 20*time.Second
	s.run(20 * time.Second)
	if n := s.downs(0, nil); n != 9 {
		t.Errorf("%d take the stalled one for dead", n)
	}
	s.until(10*time.Second, "it is back", s.agree)
	s.run(20 * time.Second)
	for _, e := range s.events {
		if e.node == 4 && (e.What == EventSuspect || e.What == EventDown) {
			t.Errorf("after the stall: %+v", e)
		}
	}
}

// Two rings that never met become one as soon as one member of one has a
// seed in the other; each learns all that the other claims.
func TestSwimTwoRings(t *testing.T) {
	s := newSim(t, 20, 1)
	for i := range s.nodes {
		sw := s.start(i, i%2)
		sw.AnnounceClaim(uint16(i), uint64(i+1), false)
	}
	s.run(20 * time.Second)
	if s.nodes[0].swim.table.Live != 10 {
		t.Fatal("they have met")
	}
	s.nodes[5].swim.SetSeeds([]netip.AddrPort{s.nodes[8].addr})
	s.until(10*time.Second, "all are one", s.agree)
	s.run(5 * time.Second)
	for _, n := range s.nodes {
		v := n.swim.View()
		if v.Buckets != 20 || v.MaxLamport != 20 || !v.Joined || !slices.IsSortedFunc(v.Members, func(a, b MemberSnapshot) int { return int(a.Slot) - int(b.Slot) }) {
			t.Errorf("%s sees %+v", n.name, v)
		}
	}
	if n := s.downs(0, nil); n > 0 {
		t.Errorf("%d taken for dead", n)
	}
}

// One tombstone leaves the digest and the syncs at half of its life, everywhere at
// once, though members learned of it at different times.
func TestSwimTombstones(t *testing.T) {
	s := newSim(t, 4, 1)
	s.interval = time.Minute // it is a matter of days
	s.startAll()
	s.until(10*time.Minute, "join", s.agree)
	s.nodes[3].swim.Leave()
	s.arm(3)
	s.run(5 * time.Minute)
	s.kill(3)
	s.kill(2)
	s.run(tombstoneLife/2 - 2*time.Hour)
	s.restart(1) // learns of it late
	s.run(time.Hour)
	known := func(i int) *Member { return s.nodes[i].swim.table.Get("node-003") }
	if known(0) == nil || known(1) == nil || known(1).State != StateLeft {
		t.Fatal("the tombstone is not passed on")
	}
	s.run(2 * time.Hour)
	sent := s.sent
	s.run(time.Hour)
	if known(0) == nil || s.nodes[0].swim.table.Digest != s.nodes[1].swim.table.Digest || s.sent-sent > 60*2*4 {
		t.Errorf("past half of its life: digests differ, or %d packets in an hour", s.sent-sent)
	}
	s.restart(1)
	s.run(time.Hour)
	if known(1) != nil || s.nodes[0].swim.table.Digest != s.nodes[1].swim.table.Digest {
		t.Error("an old tombstone is passed on")
	}
	s.run(tombstoneLife / 2)
	if known(0) != nil {
		t.Error("who left is not forgotten")
	}
	if m := s.nodes[0].swim.table.Get("node-002"); m == nil || m.State != StateDead {
		t.Error("who died is forgotten, and so never looked for")
	}
}

// However many ask, and however large the table is, what is sent for it is bounded, and
// in the end the whole table is sent.
func TestSwimBoundedAnswers(t *testing.T) {
	s := newSim(t, 2, 1)
	s.start(0)
	s.start(1)
	s.until(10*time.Second, "join", s.agree)
	a, b := s.nodes[0], s.nodes[1]
	answers := 0
	hello := s.seal(1, Packet{Kind: PacketHello, From: "x", Session: 1, RequestID: 5})
	for range maxUnprovenReplies + 100 {
		answers += len(s.deliver(0, b.addr, hello))
	}
	if answers == 0 || answers > maxUnprovenReplies {
		t.Errorf("%d answers to strangers at once", answers)
	}
	long := strings.Repeat("x", MaxMemberAddr)
	for i := range MaxMembers - 2 {
		if a.swim.table.Merge(a.swim.now, MemberRecord{Name: fmt.Sprintf("%060d", i), Session: 1, Addr: long, URL: long, Slot: NoSlot}) == nil {
			t.Fatalf("refused %d", i)
		}
	}
	sent := map[string]bool{}
	for range 2 * MaxMembers * 400 / maxSyncPackets / maxPlainPacket {
		s.now += s.interval
		out := s.deliver(0, b.addr, s.seal(1, Packet{Kind: PacketGossip, To: a.name, WantTable: true}))
		if len(out) > maxSyncPackets {
			t.Fatalf("%d packets in one sync", len(out))
		}
		for _, d := range out {
			for _, r := range s.decode(0, d.Data).Records {
				sent[r.Name] = true
			}
		}
		if out := s.deliver(0, b.addr, s.seal(1, Packet{Kind: PacketGossip, To: a.name, WantTable: true})); len(out) > 0 {
			t.Fatalf("%d packets in a second sync at once", len(out))
		}
	}
	if len(sent) != MaxMembers {
		t.Errorf("%d of %d members are sent", len(sent), MaxMembers)
	}
	var table MemberTable
	if table.Merge(0, MemberRecord{Name: "a", State: StateLeft, Age: uint32(tombstoneLife / 2 / time.Second)}) != nil {
		t.Error("a tombstone that is synced no more is believed by one who did not know it")
	}
}

// The table stays bounded, and makes room by forgetting the longest dead.
func TestTableBounded(t *testing.T) {
	var table MemberTable
	for i := range MaxMembers {
		if table.Merge(0, MemberRecord{Name: fmt.Sprint(i), Addr: "a:1", State: []MemberState{StateAlive, StateDead}[i/(MaxMembers-2)], Age: uint32(i)}) == nil {
			t.Fatalf("refused %d", i)
		}
	}
	if table.Merge(0, MemberRecord{Name: "x", Addr: "a:1"}) == nil || table.Get(fmt.Sprint(MaxMembers-1)) != nil || len(table.Members) != MaxMembers {
		t.Error("the longest dead is not forgotten")
	}
	if table.Merge(0, MemberRecord{Name: "y", Addr: "a:1"}) == nil || table.Merge(0, MemberRecord{Name: "z", Addr: "a:1"}) != nil {
		t.Error("more members than MaxMembers")
	}
	var digest uint64
	for _, m := range table.Members {
		digest ^= m.stableDigest()
	}
	if digest != table.Digest {
		t.Error("the digest is not that of the records")
	}
}

// A table takes the newer of two records of a member and ignores the older one.
func TestTableOrder(t *testing.T) {
	at := func(session uint64, incarnation uint32, state MemberState) MemberRecord {
		r := MemberRecord{Name: "a", Addr: "a:1", Session: session, Incarnation: incarnation, State: state}
		if state == StateSuspect {
			r.Accusers = []uint64{session}
		}
		return r
	}
	for _, c := range []struct {
		known, said MemberRecord
		want        bool
	}{
		{at(1, 1, StateAlive), at(1, 1, StateAlive), false},
		{at(1, 1, StateAlive), at(1, 2, StateAlive), true},
		{at(1, 2, StateAlive), at(1, 1, StateDead), false},
		{at(1, 1, StateAlive), at(1, 1, StateSuspect), true},
		{at(1, 1, StateSuspect), at(1, 1, StateAlive), false},
		{at(1, 1, StateSuspect), at(1, 1, StateSuspect), false},
		{at(1, 1, StateSuspect), at(1, 2, StateAlive), true},
		{at(1, 1, StateSuspect), at(1, 1, StateDead), true},
		{at(1, 1, StateDead), at(1, 1, StateSuspect), false},
		{at(1, 1, StateDead), at(1, 2, StateAlive), true},
		{at(1, 5, StateAlive), at(1, 1, StateLeft), true},
		{at(1, 1, StateLeft), at(1, 9, StateAlive), false},
		{at(1, 1, StateLeft), at(2, 0, StateAlive), true},
		{at(2, 0, StateAlive), at(1, 9, StateLeft), false},
		{at(1, 9, StateAlive), at(2, 0, StateDead), true},
	} {
		var table MemberTable
		table.Merge(0, c.known)
		if got := table.Merge(0, c.said) != nil; got != c.want {
			t.Errorf("%v after %v: believed %v", c.said, c.known, got)
		}
	}
	var table MemberTable
	table.Merge(0, at(1, 1, StateSuspect))
	for i := range uint64(9) {
		r := at(1, 1, StateSuspect)
		r.Accusers = []uint64{i, 1}
		table.Merge(0, r)
	}
	if got := table.Get("a").Accusers; len(got) != MaxAccusers || got[0] != 1 || got[1] != 0 {
		t.Errorf("accusers are %v", got)
	}
}

// No packet of a sender that has the key makes a member panic, answer with many packets,
// or keep more than its bounds.
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
			t.Errorf("%d packets in answer to one", len(out))
		}
		s.arm(1)
		s.run(10 * time.Second)
	})
}
