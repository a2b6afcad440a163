package main

// Tests of probing: which members are suspected, when they are declared dead, and what worsens
// a member's own health instead.

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// tick lets time pass for node i alone, until a time of its own clock.
func (s *sim) tick(i int, at time.Duration) []Datagram {
	n := s.nodes[i]
	s.now = max(s.now, at+n.origin)
	return n.swim.Tick(at)
}

// suspicionOf returns what node i is told to have others suspect o.
func (s *sim) suspicionOf(i, o int) MemberRecord {
	r := s.nodes[i].swim.table.Get(s.nodes[o].name).MemberRecord
	r.State, r.Accusers = StateSuspect, []uint64{accuserID(s.nodes[2].name)}
	return r
}

func hasEvent(s *Swim, what string) bool {
	return slices.ContainsFunc(s.Events, func(e GossipEvent) bool { return e.What == what })
}

// A member that cannot be reached directly, but by others, is not suspected.
func TestSwimRelays(t *testing.T) {
	s := joinedSim(t, 8, 1)
	s.events = nil
	s.cut = func(from, to int) bool { return from+to == 1 } // 0 and 1
	s.run(2 * time.Minute)
	if n := s.eventCount(EventSuspect); n > 0 {
		t.Errorf("%d suspicions: %v", n, s.events[0])
	}
	if m := s.nodes[0].swim.table.Get("node-001"); m.State != StateAlive {
		t.Errorf("it is %v", m.State)
	}
}

// After a stall of its own a member does not count silence: no suspect is declared dead before
// its answer could have come, and no probe goes on.
func TestSwimStallJudgesNobody(t *testing.T) {
	s := joinedSim(t, 3, 1)
	a := s.nodes[0]
	s.deliver(0, s.nodes[2].addr, s.seal(2, Packet{Kind: PacketGossip, To: a.name, Records: []MemberRecord{s.suspicionOf(0, 1)}}))
	suspect, other := a.swim.table.Get("node-001"), a.swim.table.Get("node-002")
	if suspect.State != StateSuspect {
		t.Fatal("not suspected")
	}
	a.swim.probe(other)
	s.tick(0, a.swim.now)
	before, health := suspect.DeadAt, a.swim.Health
	if before <= a.swim.now || a.swim.requests.find(requestProbe, other.Name) == nil {
		t.Fatal("there is nothing to judge")
	}
	wake := before + s.interval
	s.tick(0, wake)
	if !hasEvent(a.swim, EventStalled) || hasEvent(a.swim, EventDown) || hasEvent(a.swim, EventSuspect) || a.swim.Health != health+1 {
		t.Errorf("health %d after %d, events %v", a.swim.Health, health, a.swim.Events)
	}
	if suspect.State != StateSuspect || suspect.DeadAt < wake+a.swim.intervalsToDuration(suspicionMin) {
		t.Errorf("the suspect is %v, and has %v left", suspect.State, suspect.DeadAt-wake)
	}
	if a.swim.requests.find(requestProbe, other.Name) != nil {
		t.Error("a probe goes on of which the answer may be lost")
	}
	// To be a little late is no stall.
	s.tick(0, max(a.swim.NextTickAt(), wake)+a.swim.intervalsToDuration(stallAfter/2))
	if hasEvent(a.swim, EventStalled) {
		t.Error("a little late counts as a stall")
	}
}

// The health of a member falls that no other member answers, and stays if one member died.
func TestSwimHealthFalls(t *testing.T) {
	s := joinedSim(t, 6, 1)
	s.kill(5)
	s.until(20*time.Second, "a death is known", s.agree)
	for _, n := range s.nodes[:5] {
		if n.swim.Health > 0 {
			t.Errorf("%s: health %d because another died", n.name, n.swim.Health)
		}
	}
	s.nodes[0].group = 1
	s.until(5*time.Second, "doubts itself", func() bool { return s.nodes[0].swim.Health >= 2 })

	s = joinedSim(t, 3, 1)
	a := s.nodes[0].swim
	incarnation := a.self.Incarnation
	s.deliver(0, s.nodes[2].addr, s.seal(2, Packet{Kind: PacketGossip, To: a.name, Records: []MemberRecord{s.suspicionOf(0, 0)}}))
	if a.Health != 1 || a.self.Incarnation <= incarnation || a.self.State != StateAlive {
		t.Errorf("suspected itself: health %d, %+v", a.Health, a.self.MemberRecord)
	}
	s.until(10*time.Second, "its health is back", func() bool { return a.Health == 0 })
}

// The worse its health, the longer a member waits for others.
func TestSwimHealthIsPatience(t *testing.T) {
	for _, health := range []int{0, 4} {
		s := joinedSim(t, 2, 1) // no relay tells anything
		s.events = nil
		a := s.nodes[0].swim
		a.Health = health
		s.kill(1)
		took := s.until(20*time.Second, "a suspicion", func() bool { return s.eventCount(EventSuspect) > 0 })
		least := a.intervalsToDuration((indirectAfter + suspectAfter) * float64(health+1))
		if took < least || took > least+a.intervalsToDuration(1.5) {
			t.Errorf("health %d: suspected after %v, want %v and up to 1.5 intervals more", health, took, least)
		}
	}
}

// Of two members no third can share a suspicion: the survivor knows of a death as soon
// as with more members.
func TestSwimTwoMembers(t *testing.T) {
	var death figures
	for seed := range uint64(100) {
		simKill(joinedSim(t, 2, seed), &death)
	}
	if death.worst() > 3*simInterval {
		t.Errorf("a death is known after %v, more than three intervals", &death)
	}
}

// A suspicion lasts the longer, the larger the ring is, and the less, the more members share it,
// if any can.
func TestSwimSuspicionEnd(t *testing.T) {
	a := newSim(t, 1, 1).start(0)
	left := func(live, accusers int) time.Duration {
		a.table.Live = live
		m := &Member{SuspectedAt: time.Hour, MemberRecord: MemberRecord{Accusers: make([]uint64, accusers)}}
		return (a.suspicionEnd(m) - m.SuspectedAt).Round(time.Millisecond)
	}
	for _, c := range []struct {
		live        int
		least, most float64 // intervals
	}{{2, 1.1, 1.1}, {3, 1.1, 5.5}, {10, 1.1, 5.5}, {100, 1.375, 6.875}, {1000, 1.65, 8.25}} {
		if got := left(c.live, 1); got != a.intervalsToDuration(c.most).Round(time.Millisecond) {
			t.Errorf("%d members, one accuser: %v, want %v intervals", c.live, got, c.most)
		}
		if got := left(c.live, MaxAccusers); got != a.intervalsToDuration(c.least).Round(time.Millisecond) {
			t.Errorf("%d members, all accuse: %v, want %v intervals", c.live, got, c.least)
		}
		if one, two := left(c.live, 1), left(c.live, 2); two > one || two == one && c.most > c.least {
			t.Errorf("%d members: %v with two accusers, %v with one", c.live, two, one)
		}
	}
}

// A member that begins to suspect another tells it at once, so that it can refute that.
func TestSwimSuspectIsTold(t *testing.T) {
	s := joinedSim(t, 4, 1)
	a := s.nodes[0].swim
	suspect := a.table.Get("node-001")
	a.probe(suspect)
	told := false
	for i := 0; suspect.State != StateSuspect; i++ {
		if i > 1000 {
			t.Fatal("it is never suspected")
		}
		for _, d := range s.tick(0, max(a.NextTickAt(), a.now)) {
			p := s.decode(0, d.Data)
			told = told || p.Kind == PacketPing && p.To == suspect.Name && p.RequestID != 0 &&
				slices.ContainsFunc(p.Records, func(r MemberRecord) bool { return r.Name == suspect.Name && r.State == StateSuspect })
		}
	}
	if !told {
		t.Error("it is not told")
	}
}

// A member has left when the members that it told have confirmed it, or do not answer.
func TestSwimLeaveIsConfirmed(t *testing.T) {
	for _, reached := range []bool{true, false} {
		s := joinedSim(t, 4, 1)
		a := s.nodes[3].swim
		if !reached {
			s.nodes[3].group = 1
		}
		a.Leave()
		s.arm(3)
		if a.HasLeft() {
			t.Error("gone before anybody was told")
		}
		s.run(s.interval / 2)
		if a.HasLeft() != reached {
			t.Errorf("gone after half an interval: %v; are others reached: %v", a.HasLeft(), reached)
		}
		s.run(s.interval)
		if !a.HasLeft() {
			t.Error("it waits for ever for who does not answer")
		}
	}
}

// However many strangers ask, the number of pending requests is bounded.
func TestSwimBoundedRequests(t *testing.T) {
	s := newSim(t, 2, 1)
	s.start(0)
	s.start(1)
	s.until(10*time.Second, "join", s.agree)
	for i := range maxUnprovenReplies {
		s.deliver(0, s.nodes[1].addr, s.seal(1, Packet{Kind: PacketHello, From: fmt.Sprint("x", i), Session: 1, RequestID: 5}))
	}
	if n := len(s.nodes[0].swim.requests); n > maxPendingRequests {
		t.Errorf("%d pending requests", n)
	}
}
