package main

// Tests of sessions: a member refuses packets that it must not believe, and challenges a session
// that has not proven itself.

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A member refuses a packet that is a replay, is damaged, has another version, key or ring, is
// addressed to another member, comes from an old session without being a PacketHello, or answers no
// request. It counts the refusal and does not answer. It believes no record of such a packet,
// except for a packet whose only fault is that it answers no request.
func TestSwimRefuses(t *testing.T) {
	s := newSim(t, 3, testSeed(t, 1))
	var ping []byte
	s.lastTo(0, 1, PacketPing, &ping)
	s.startAll()
	s.until(10*time.Second, "all join", s.agree)
	s.until(10*time.Second, "node 0 pings node 1", func() bool { return ping != nil })
	s.run(time.Second)
	a, b := s.nodes[0], s.nodes[1]
	foreign := testSealer(t, 9, "sim", 7)
	elsewhere := testSealer(t, 9, "not sim", 1)
	dead := s.deathOf(2)
	body := encodePacket(Packet{Kind: PacketPing, To: b.name, From: a.name, Session: a.swim.self.Session, RequestID: 5, Records: []MemberRecord{dead}})
	asked := b.swim.addRequestIfRoom(pendingRequest{purpose: requestReconnect, name: dead.Name, dueAt: s.now - b.origin + time.Hour}).id
	for _, c := range []struct {
		about  string
		packet []byte
		want   int // index in RefusedPackets of the count that rises by 1
	}{
		{"replay of a ping", ping, RefusedReplay},
		{"packet without its last byte", ping[:len(ping)-1], RefusedForged},
		{"packet of 10 bytes", ping[:10], RefusedUnsealed},
		{"packet longer than MaxPacket", a.swim.sealer.Seal(nil, make([]byte, MaxPacket), 0), RefusedUnsealed},
		{"another version", otherVersion(ping, sealVersion+1), RefusedVersion},
		{"another version, one byte", []byte{sealVersion + 1}, RefusedVersion},
		{"another key", foreign.Seal(nil, body, 0), RefusedKey},
		{"another ring", elsewhere.Seal(nil, body, 0), RefusedForged},
		{"not a packet", a.swim.sealer.Seal(nil, []byte("nonsense"), 0), RefusedMalformed},
		{"addressed to another member", s.seal(0, Packet{Kind: PacketPing, To: dead.Name, RequestID: 5, Records: []MemberRecord{dead}}), RefusedMisrouted},
		{"old session", s.seal(0, Packet{Kind: PacketPing, To: b.name, Session: a.swim.self.Session - 1, RequestID: 5, Records: []MemberRecord{dead}}), RefusedSession},
		{"session below those of both members", s.seal(0, Packet{Kind: PacketGossip, To: b.name, Session: min(a.swim.self.Session, b.swim.self.Session) - 1, Records: []MemberRecord{dead}}), RefusedSession},
		{"name and session of the receiver", s.seal(0, Packet{Kind: PacketGossip, To: b.name, From: b.name, Session: b.swim.self.Session, Records: []MemberRecord{dead}}), RefusedMisrouted},
		{"answer to a request to another member", s.seal(0, Packet{Kind: PacketAck, To: b.name, ReplyTo: asked}), RefusedUnasked},
		{"answer to no request", s.seal(0, Packet{Kind: PacketAck, To: b.name, ReplyTo: 12345}), RefusedUnasked},
		{"relayed answer of a member that is no relay", s.seal(0, Packet{Kind: PacketAck, To: b.name, Target: dead.Name, ReplyTo: asked}), RefusedUnasked},
	} {
		want := b.swim.Refused
		want[c.want]++
		out := s.deliver(1, strangerAddr, c.packet)
		if b.swim.Refused != want || len(out) > 0 {
			t.Errorf("%s: got counts %v and %d answers, want counts %v and no answer", c.about, b.swim.Refused, len(out), want)
		}
		if c.want != RefusedUnasked && b.swim.table.Get(dead.Name).State != StateAlive {
			t.Errorf("%s: the receiver believes the packet's record", c.about)
		}
	}
	if b.swim.requests.find(requestReconnect, dead.Name) == nil {
		t.Error("a request counts as answered, although the asked member did not answer")
	}
}

// strangerAddr is an address that no node of a simulation uses.
var strangerAddr = netip.MustParseAddrPort("192.0.2.7:1")

// deathOf returns a record with a high incarnation that declares node i dead.
func (s *sim) deathOf(i int) MemberRecord {
	return MemberRecord{Name: s.nodes[i].name, Session: s.nodes[i].swim.self.Session, Incarnation: 99, State: StateDead, Addr: "x:1", Slot: NoSlot}
}

// A member challenges the sender of a packet if it does not know the sender's session, or knows the
// session only from records of other members. In the second case, it also sends a challenge to the
// address in the record. It believes no record of the packet.
func TestSwimChallenges(t *testing.T) {
	s := joinedSim(t, 3, testSeed(t, 1))
	a, b, dead := s.nodes[0], s.nodes[1], s.deathOf(2)
	rumour := MemberRecord{Name: "rumour", Session: 1, Addr: "x:1", Slot: NoSlot}
	s.deliver(1, strangerAddr, s.seal(0, Packet{Kind: PacketGossip, To: b.name, Records: []MemberRecord{rumour}}))
	for _, c := range []struct {
		about  string
		packet Packet
		record bool // the table has a record of the session
	}{
		{"member known from others", Packet{From: "rumour", Session: 1, Records: []MemberRecord{dead}}, true},
		{"later session of a known member", Packet{Session: a.swim.self.Session + sessionStep, Records: []MemberRecord{dead}}, false},
		{"unknown member", Packet{From: "new", Session: 1, Records: []MemberRecord{dead, {Name: "new", Session: 1, Addr: "x:1", Slot: NoSlot}}}, false},
	} {
		c.packet.Kind, c.packet.To, c.packet.RequestID = PacketPing, b.name, 5
		want := b.swim.Refused[RefusedStranger] + 1
		out := s.deliver(1, strangerAddr, s.seal(0, c.packet))
		if c.record { // the session is known, so the challenge also goes to the address in the record
			if p := s.decode(1, out[0].Data); p.Kind != PacketHello || p.RequestID == 0 || out[0].To.Host != rumour.Addr {
				t.Errorf("%s: got %+v to %v, want a challenge to %s", c.about, p, out[0].To, rumour.Addr)
			}
			out = out[1:]
		}
		if len(out) != 1 || b.swim.Refused[RefusedStranger] != want || b.swim.table.Get(dead.Name).State != StateAlive || b.swim.table.Get("new") != nil {
			t.Errorf("%s: the packet is believed or not challenged; got %d answers", c.about, len(out))
		} else if p := s.decode(1, out[0].Data); p.RequestID == 0 || p.ReplyTo != 5 || out[0].To.AddrPort != strangerAddr {
			t.Errorf("%s: got the answer %+v, want a challenge that answers request 5", c.about, p)
		}
	}
}

// A member accepts the answer to its challenge as proof of the sender's session. It accepts that
// answer only once, because the session's replay window starts at the answer's packet counter.
func TestSwimAcceptsProof(t *testing.T) {
	s := joinedSim(t, 3, testSeed(t, 1))
	b := s.nodes[1].swim
	record := MemberRecord{Name: "new", Session: 1, Addr: "x:1", Slot: NoSlot}
	ping := Packet{Kind: PacketPing, To: b.name, From: "new", Session: 1, RequestID: 5, Records: []MemberRecord{record}}
	out := s.deliver(1, strangerAddr, s.seal(0, ping))
	if len(out) != 1 {
		t.Fatalf("got %d answers to a ping, want a challenge", len(out))
	}
	proof := s.seal(0, Packet{Kind: PacketAck, To: b.name, From: "new", Session: 1, ReplyTo: s.decode(1, out[0].Data).RequestID, Records: []MemberRecord{record}})
	s.deliver(1, strangerAddr, proof)
	if m := b.table.Get("new"); m == nil || !m.Proven {
		t.Fatal("the answer to the challenge is not accepted as proof")
	}
	replays := b.Refused[RefusedReplay]
	if out := s.deliver(1, strangerAddr, proof); len(out) > 0 || !b.table.Get("new").Proven || b.Refused[RefusedReplay] != replays+1 {
		t.Errorf("repeated proof: got %d answers and %d refused replays after %d, want one replay more", len(out), b.Refused[RefusedReplay], replays)
	}
}

// A member counts every packet that another version of telemeter has sealed. It adds an event for
// the first such packet, and then for at most one per minute.
func TestSwimReportsVersion(t *testing.T) {
	s := joinedSim(t, 2, testSeed(t, 1))
	a, from := s.nodes[0].swim, s.nodes[1].addr
	packet := otherVersion(s.seal(1, Packet{Kind: PacketGossip, To: a.name}), 9)
	const detail = "sealed by another version of telemeter: it has version 9; this program knows version 2"
	for _, c := range []struct {
		after time.Duration
		count int // Count of the event; 0 = no event
	}{{0, 1}, {0, 0}, {limitedEventEvery - 2*time.Second, 0}, {2 * time.Second, 3}, {0, 0}} {
		s.now += c.after
		refused := a.Refused[RefusedVersion]
		out := s.deliver(0, from, packet)
		want := GossipEvent{What: EventOtherVersion, Addr: from.String(), Detail: detail, Count: c.count}
		if got := slices.Contains(a.Events, want); got != (c.count > 0) || a.Refused[RefusedVersion] != refused+1 || len(out) > 0 {
			t.Errorf("%v later: got events %v, %d answers and %d refused packets after %d; want the event %d times", c.after, a.Events, len(out), a.Refused[RefusedVersion], refused, c.count)
		}
	}
	if names := RefusedReasonNames(); names[RefusedVersion] != "version" || names[RefusedUnasked] != "unasked" {
		t.Errorf("the names of the reasons are out of order: %v", names)
	}
}

// A member ignores one of its own packets that comes back from the address of a seed. It still
// joins the ring later through the seed at that address.
func TestSwimReflected(t *testing.T) {
	s := newSim(t, 2, testSeed(t, 1))
	var hello []byte
	s.tap = func(from, to int, data []byte) { hello = data }
	s.start(1) // the seed, node 0, does not run yet
	s.until(time.Second, "node 1 contacts the seed", func() bool { return hello != nil })
	if out := s.deliver(1, s.nodes[0].addr, hello); len(out) > 0 {
		t.Errorf("got %d answers to a packet of its own, want none", len(out))
	}
	s.tap = nil
	s.run(10 * time.Second)
	s.start(0, 0)
	s.until(10*time.Second, "node 1 joins through the seed that reflected a packet", s.agree)
}

// If a member receives a packet that it sent itself in an earlier session, this leads to at most
// one pending request, however often the packet comes back.
func TestSwimReflectedOften(t *testing.T) {
	s := newSim(t, 2, testSeed(t, 1))
	var hello []byte
	s.lastTo(1, 0, PacketHello, &hello)
	s.startAll()
	s.until(10*time.Second, "all join", func() bool { return hello != nil && s.agree() })
	s.tap = nil
	s.restart(1)
	pending := len(s.nodes[1].swim.requests)
	for range maxPendingRequests {
		s.deliver(1, s.nodes[0].addr, hello)
	}
	if n := len(s.nodes[1].swim.requests); n > pending+1 {
		t.Errorf("one packet, repeated, led to %d requests, want at most 1", n-pending)
	}
}

// A member sends at most maxUnprovenReplies answers per interval, besides the first, to an unknown
// sender, and as many to earlier sessions. It answers no packet of an unknown sender that is not
// newer than the packets of this sender that it has answered. Neither flood keeps it from answering
// another unknown sender.
func TestSwimBoundedAnswers(t *testing.T) {
	s := joinedSim(t, 2, testSeed(t, 1))
	hello := Packet{Kind: PacketHello, From: "x", Session: 2, RequestID: 5}
	earlier := s.seal(1, hello)
	oldSession := s.seal(1, Packet{Kind: PacketHello, Session: s.nodes[1].swim.self.Session - 1, RequestID: 5})
	var answers, replays, informed int
	for range maxUnprovenReplies + 100 {
		answers += len(s.deliver(0, strangerAddr, s.seal(1, hello)))
		replays += len(s.deliver(0, strangerAddr, earlier))
		informed += len(s.deliver(0, strangerAddr, oldSession))
	}
	if answers != maxUnprovenReplies+1 || replays != 0 || informed != maxUnprovenReplies {
		t.Errorf("in one interval got %d answers to an unknown sender, %d to a replay of an earlier packet and %d to an earlier session, want %d, 0 and %d",
			answers, replays, informed, maxUnprovenReplies+1, maxUnprovenReplies)
	}
	hello.From = "y"
	if out := s.deliver(0, strangerAddr, s.seal(1, hello)); len(out) != 1 || s.decode(0, out[0].Data).RequestID == 0 {
		t.Errorf("got %d answers to another unknown sender, want a challenge", len(out))
	}
}

// The number of challenges stays bounded, however many unknown members send packets. A member that
// can challenge no further sender does not answer it: an answer without a challenge would mean that
// the sender's session is proven. It still has room to probe.
func TestSwimBoundedRequests(t *testing.T) {
	s := joinedSim(t, 2, testSeed(t, 1))
	a := s.nodes[0].swim
	for i := range maxPendingRequests {
		for _, d := range s.deliver(0, s.nodes[1].addr, s.seal(1, Packet{Kind: PacketHello, From: fmt.Sprint("x", i), Session: 1, RequestID: 5})) {
			if s.decode(0, d.Data).RequestID == 0 {
				t.Fatalf("unknown sender %d: got an answer without a challenge", i)
			}
		}
	}
	if n := len(a.requests); n != maxPendingChallenges {
		t.Errorf("got %d pending requests, want %d", n, maxPendingChallenges)
	}
	a.requests = slices.DeleteFunc(a.requests, func(r *pendingRequest) bool { return r.purpose == requestProbe })
	if a.probe(a.table.Get(s.nodes[1].name)); a.requests.find(requestProbe, s.nodes[1].name) == nil {
		t.Error("there is no room for a probe")
	}
}
