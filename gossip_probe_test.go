package main

// Tests of probing: which members are suspected, when they are declared dead, and when a member
// doubts its own health instead.

import (
	"slices"
	"testing"
	"time"
)

// A member that cannot be reached directly is not suspected if other members can reach it.
func TestSwimRelays(t *testing.T) {
	s := joinedSim(t, 8, testSeed(t, 1))
	s.events = nil
	s.cut = func(from, to int) bool { return from+to == 1 } // no packet passes between nodes 0 and 1
	s.run(2 * time.Minute)
	if n := s.eventCount(EventSuspect); n > 0 {
		t.Errorf("got %d suspicions, want none; first event %v", n, s.events[0])
	}
	if m := s.nodes[0].swim.table.Get("node-001"); m.State != StateAlive {
		t.Errorf("node 0 considers node 1 %v, want alive", m.State)
	}
}

// A member whose own process has stalled concludes nothing from missing answers: it postpones the
// time at which it declares a suspect dead, cancels its probes, and suspects no member. Its own
// health becomes worse.
func TestSwimStallJudgesNobody(t *testing.T) {
	s := joinedSim(t, 3, testSeed(t, 1))
	a := s.nodes[0]
	s.deliver(0, s.nodes[2].addr, s.seal(2, Packet{Kind: PacketGossip, To: a.name, Records: []MemberRecord{s.suspicionOf(0, 1)}}))
	suspect, other := a.swim.table.Get("node-001"), a.swim.table.Get("node-002")
	if suspect.State != StateSuspect {
		t.Fatal("node 0 does not suspect node 1")
	}
	a.swim.probe(other)
	s.tick(0, a.swim.now)
	death, health := suspect.DeadAt, a.swim.Health
	if death <= a.swim.now || a.swim.requests.find(requestProbe, other.Name) == nil {
		t.Fatal("node 0 has no pending suspicion or no pending probe")
	}
	wake := death + s.interval
	s.tick(0, wake)
	if !hasEvent(a.swim, EventStalled) || hasEvent(a.swim, EventDown) || hasEvent(a.swim, EventSuspect) || a.swim.Health != health+1 {
		t.Errorf("after the stall: health %d, was %d; events %v", a.swim.Health, health, a.swim.Events)
	}
	if suspect.State != StateSuspect || suspect.DeadAt < wake+a.swim.intervalsToDuration(suspicionMin) {
		t.Errorf("after the stall the suspect is %v, and will be declared dead in %v", suspect.State, suspect.DeadAt-wake)
	}
	if a.swim.requests.find(requestProbe, other.Name) != nil {
		t.Error("a probe goes on although its answer may have been lost during the stall")
	}
}

// A call of Tick that comes less than stallAfter intervals too late does not count as a stall.
func TestSwimShortDelayIsNoStall(t *testing.T) {
	s := joinedSim(t, 3, testSeed(t, 1))
	a := s.nodes[0].swim
	s.tick(0, max(a.NextTickAt(), a.now)+a.intervalsToDuration(stallAfter/2))
	if hasEvent(a, EventStalled) {
		t.Error("a short delay counts as a stall")
	}
}

// If no other member answers a member, the health of that member becomes worse. If only one member
// of a ring dies, the health of the survivors is good when all know of the death.
func TestSwimHealthFalls(t *testing.T) {
	s := joinedSim(t, 6, testSeed(t, 1))
	s.kill(5)
	s.until(20*time.Second, "all know of the death", s.agree)
	for _, n := range s.nodes[:5] {
		if n.swim.Health > 0 {
			t.Errorf("health of %s after the death of another member: got %d, want 0", n.name, n.swim.Health)
		}
	}
	s.nodes[0].group = 1
	s.until(5*time.Second, "the health of a separated member is 2 or worse", func() bool { return s.nodes[0].swim.Health >= 2 })
}

// A member that receives a record in which it is suspected refutes the suspicion. Its own health
// becomes worse for a while.
func TestSwimSuspicionWorsensHealth(t *testing.T) {
	s := joinedSim(t, 3, testSeed(t, 1))
	a := s.nodes[0].swim
	incarnation := a.self.Incarnation
	s.deliver(0, s.nodes[2].addr, s.seal(2, Packet{Kind: PacketGossip, To: a.name, Records: []MemberRecord{s.suspicionOf(0, 0)}}))
	if a.Health != 1 || a.self.Incarnation <= incarnation || a.self.State != StateAlive {
		t.Errorf("suspected member: got health %d and record %+v, want health 1 and a new incarnation", a.Health, a.self.MemberRecord)
	}
	s.until(10*time.Second, "the health is good again", func() bool { return a.Health == 0 })
}

// The worse the health of a member is, the longer the member waits before it suspects another
// member.
func TestSwimHealthIsPatience(t *testing.T) {
	seed := testSeed(t, 1)
	for _, health := range []int{0, 4} {
		s := joinedSim(t, 2, seed) // in a ring of two, no third member can relay a ping
		s.events = nil
		a := s.nodes[0].swim
		a.Health = health
		s.kill(1)
		took := s.until(20*time.Second, "a suspicion", func() bool { return s.eventCount(EventSuspect) > 0 })
		least := a.intervalsToDuration((indirectAfter + suspectAfter) * float64(health+1))
		if took < least || took > least+a.intervalsToDuration(1.5) {
			t.Errorf("health %d: suspicion after %v, want %v or up to 1.5 intervals more", health, took, least)
		}
	}
}

// The survivor of a ring of two members learns of the other's death within three intervals,
// although no third member can confirm it.
func TestSwimTwoMembers(t *testing.T) {
	var death figures
	first := testSeed(t, 1)
	for seed := first; seed < first+100; seed++ {
		simKill(joinedSim(t, 2, seed), &death)
	}
	if death.worst() > 3*simInterval {
		t.Errorf("median and worst time until the death is known: %v, want at most three intervals", &death)
	}
}

// A suspicion lasts longer in rings of more than ten members, and shorter if more members share it.
// In a ring of two members it has its shortest duration.
func TestSwimSuspicionEnd(t *testing.T) {
	a := newSim(t, 1, testSeed(t, 1)).start(0)
	left := func(live, accusers int) time.Duration {
		a.table.Live = live
		m := &Member{SuspectedAt: time.Hour, MemberRecord: MemberRecord{Accusers: make([]uint64, accusers)}}
		return (a.suspicionEnd(m) - m.SuspectedAt).Round(time.Millisecond)
	}
	for _, c := range []struct {
		live        int
		least, most float64 // duration of a suspicion in intervals: least with MaxAccusers accusers, most with one accuser
	}{{2, 1.1, 1.1}, {3, 1.1, 5.5}, {10, 1.1, 5.5}, {100, 1.375, 6.875}, {1000, 1.65, 8.25}} {
		if got := left(c.live, 1); got != a.intervalsToDuration(c.most).Round(time.Millisecond) {
			t.Errorf("%d members, one accuser: suspicion lasts %v, want %v intervals", c.live, got, c.most)
		}
		if got := left(c.live, MaxAccusers); got != a.intervalsToDuration(c.least).Round(time.Millisecond) {
			t.Errorf("%d members, most accusers: suspicion lasts %v, want %v intervals", c.live, got, c.least)
		}
		if one, two := left(c.live, 1), left(c.live, 2); two > one || two == one && c.most > c.least {
			t.Errorf("%d members: suspicion lasts %v with two accusers and %v with one", c.live, two, one)
		}
	}
}

// A member that begins to suspect another member pings the suspect, and the ping carries the
// suspicion, so that the suspect can refute it.
func TestSwimInformsSuspect(t *testing.T) {
	s := joinedSim(t, 4, testSeed(t, 1))
	a := s.nodes[0].swim
	suspect := a.table.Get("node-001")
	a.probe(suspect)
	informed := false
	for i := 0; suspect.State != StateSuspect; i++ {
		if i > 1000 {
			t.Fatal("the probed member is never suspected")
		}
		for _, d := range s.tick(0, max(a.NextTickAt(), a.now)) {
			p := s.decode(0, d.Data)
			informed = informed || p.Kind == PacketPing && p.To == suspect.Name && p.RequestID != 0 &&
				slices.ContainsFunc(p.Records, func(r MemberRecord) bool { return r.Name == suspect.Name && r.State == StateSuspect })
		}
	}
	if !informed {
		t.Error("no ping to the suspect carries the suspicion")
	}
}

// HasLeft becomes true when the members that were asked to confirm the leave have done so. It
// becomes true after one and a half intervals at the latest if they do not answer.
func TestSwimLeaveIsConfirmed(t *testing.T) {
	seed := testSeed(t, 1)
	for _, reached := range []bool{true, false} {
		s := joinedSim(t, 4, seed)
		a := s.nodes[3].swim
		if !reached {
			s.nodes[3].group = 1
		}
		a.Leave()
		s.arm(3)
		if a.HasLeft() {
			t.Error("the member has left before any other member knows")
		}
		s.run(s.interval / 2)
		if a.HasLeft() != reached {
			t.Errorf("after half an interval: left %v, want %v", a.HasLeft(), reached)
		}
		s.run(s.interval)
		if !a.HasLeft() {
			t.Error("after one and a half intervals the member still waits for confirmations")
		}
	}
}
