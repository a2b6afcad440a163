package main

// Probes, and what becomes of members that do not answer: they are suspected, then declared
// dead, and looked for ever after. No member is suspected because of a stall of our own. A
// member whose own health is bad waits longer for others (Lifeguard). Pure.

import (
	"math"
	"slices"
	"time"
)

// Times, in units of the interval.
const (
	indirectAfter    = 0.2  // after the ping of a probe: another ping, and indirect ones
	suspectAfter     = 0.4  // after these: a suspicion
	suspicionMin     = 1.1  // a suspicion that others confirm, up to ten members
	suspicionMax     = 5    // one that others could confirm and none does, as a multiple of that
	finalPingSpacing = 0.2  // between the last pings, and from the last one until the death
	pairPingSpacing  = 0.1  // between pings to a suspect that no other member can ping
	reconnectEvery   = 3    // between attempts to reach dead members and seeds
	joinBackoffMax   = 4    // between attempts to join
	stallAfter       = 0.25 // lateness that counts as a stall
)

const (
	indirectChecks = 4 // members asked to ping one that does not answer
	maxFinalPings  = 6 // to a suspect before it is declared dead
	maxHealth      = 8 // Lifeguard's S
)

// The tries of a probe that have timed out.
const (
	probePinged    = iota // one ping
	probeIndirect         // a second ping, and indirect ones
	probeSuspected        // the member is suspected; pings go on until that ends
)

// scaledByHealth is a number of intervals, more while our own health is bad (Lifeguard, LHA-Probe).
func (s *Swim) scaledByHealth(intervals float64) time.Duration {
	return s.intervalsToDuration(intervals * float64(s.Health+1))
}

func (s *Swim) worsenOwnHealth() { s.Health = min(s.Health+1, maxHealth) }

// handleOwnStall allows for a stall of our own. Answers that came meanwhile wait in the socket or
// were lost with it, so silence says nothing about others.
func (s *Swim) handleOwnStall(lateBy time.Duration) {
	s.worsenOwnHealth()
	s.addEvent(EventStalled, s.self.Name, s.self.Addr)
	s.requests = slices.DeleteFunc(s.requests, func(r *pendingRequest) bool { return r.purpose == requestProbe })
	for _, m := range s.table.Members {
		m.DeadAt += lateBy + s.intervalsToDuration(suspicionMin)
	}
	s.probeAt = max(s.probeAt, s.now+s.interval/2)
}

// probeNext probes the next member.
func (s *Swim) probeNext() {
	s.probeAt = s.now + s.scaledByHealth(1)
	m := s.probeOrder.Next(&s.table, s.rng, func(m *Member) bool { return m != s.self && s.requests.find(requestProbe, m.Name) == nil })
	if m != nil {
		s.probe(m)
	}
}

func (s *Swim) probe(m *Member) {
	s.ping(m, pendingRequest{purpose: requestProbe, dueAt: s.now + s.scaledByHealth(indirectAfter)})
}

// handleRequestTimeout goes on with a request that was not answered in time.
func (s *Swim) handleRequestTimeout(r *pendingRequest) {
	switch {
	case r.purpose == requestProbe:
		s.escalateProbe(r)
	case r.purpose == requestIndirect:
		s.requests.remove(r)
		s.sendTo(r.origin, Packet{Kind: PacketNack, ReplyTo: r.originID, Target: r.name})
	case r.purpose == requestLeave && r.tries < maxTries:
		r.tries, r.dueAt = r.tries+1, s.now+s.interval/4
		s.send(r.member.PacketDestination(), Packet{Kind: PacketPing, To: r.name, RequestID: r.id}, s.self)
	case r.purpose == requestNameCheck && r.tries < maxTries:
		r.tries, r.dueAt = r.tries+1, s.now+s.interval/4
		s.send(r.to, Packet{Kind: PacketHello, To: s.name, RequestID: r.id}, s.self)
	case r.purpose == requestNameCheck:
		// The session was our own, from before the state was lost.
		s.requests.remove(r)
		if r.rivalSession > s.self.Session {
			s.renewSession(r.rivalSession)
		}
	default:
		s.requests.remove(r)
	}
}

// escalateProbe goes on with a probe that was not answered in time.
func (s *Swim) escalateProbe(r *pendingRequest) {
	m := r.member
	switch {
	case !m.State.IsLive() || r.tries == probeSuspected && m.State != StateSuspect:
		s.requests.remove(r)
		return
	case r.tries == probePinged:
		s.probeIndirectly(r)
		return
	case r.tries == probeIndirect:
		// Relays answer in any case: if none did, the fault may be ours.
		if len(r.relays) > 0 && !r.relayNacked {
			s.worsenOwnHealth()
		}
		s.suspect(m)
	}
	r.tries, r.dueAt = probeSuspected, s.now+s.interval/3
	if s.table.Live <= 2 {
		r.dueAt = s.now + s.intervalsToDuration(pairPingSpacing)
	}
	// The member learns from this that it is suspected, and its answer refutes that.
	s.sendTo(m, Packet{Kind: PacketPing, RequestID: r.id})
}

// probeIndirectly pings once more, and asks other members to ping.
func (s *Swim) probeIndirectly(r *pendingRequest) {
	r.tries, r.dueAt = probeIndirect, s.now+s.scaledByHealth(suspectAfter)
	s.sendTo(r.member, Packet{Kind: PacketPing, RequestID: r.id})
	for range indirectChecks {
		relay := s.randomMember(func(m *Member) bool {
			return m != r.member && m.State == StateAlive && m.Proven && !slices.Contains(r.relays, m.Name)
		})
		if relay == nil {
			break
		}
		r.relays = append(r.relays, relay.Name)
		s.sendTo(relay, Packet{Kind: PacketPingReq, RequestID: r.id, Target: r.name})
	}
}

// suspect tells all that m is suspected.
func (s *Swim) suspect(m *Member) {
	r := m.MemberRecord
	r.State, r.Accusers, r.Age = StateSuspect, []uint64{accuserID(s.name)}, 0
	if s.mergeRecordIfNewer(r) != nil {
		s.table.QueueUpdate(m)
	}
}

// declareDead tells all that m, a suspect, is dead.
func (s *Swim) declareDead(m *Member) {
	r := m.MemberRecord
	r.State, r.Accusers, r.Age = StateDead, nil, 0
	s.mergeRecordIfNewer(r)
	s.table.QueueUpdate(m)
}

// expireSuspicions declares suspects dead when their time is over. Shortly before, every member
// pings them a few times more: all who suspect one may be wrong, and its refutation lost.
func (s *Swim) expireSuspicions() {
	for _, m := range s.table.Members {
		switch {
		case m.State != StateSuspect:
		case m.DeadAt <= s.now:
			s.declareDead(m)
		case s.nextPingOrDeathAt(m) <= s.now:
			m.FinalPings++
			s.ping(m, pendingRequest{purpose: requestReconnect, dueAt: s.now + s.interval})
		}
	}
}

// nextPingOrDeathAt returns when m, a suspect, is to be pinged or declared dead next.
func (s *Swim) nextPingOrDeathAt(m *Member) time.Duration {
	return m.DeadAt - s.intervalsToDuration(finalPingSpacing*float64(maxFinalPings-m.FinalPings))
}

// suspicionEnd returns when m, a suspect, is to be declared dead: the sooner, the more members
// share the suspicion (Lifeguard, LHA-Suspicion); as soon as can be, if no other member could.
func (s *Swim) suspicionEnd(m *Member) time.Duration {
	n := float64(s.table.Live)
	shortest := suspicionMin * max(1, (3+math.Log10(n))/4)
	longest := suspicionMax * shortest
	if n <= 2 {
		longest = shortest
	}
	others := min(max(n-2, 1), MaxAccusers-1) // that can confirm it
	shared := (longest - shortest) * math.Log(float64(len(m.Accusers))) / math.Log(others+1)
	return m.SuspectedAt + s.intervalsToDuration(max(shortest, longest-shared))
}

// contactDeadOrSeed asks whether a member that is dead, or one at a seed where no known member is,
// has come back. While this member is alone, it asks all seeds.
func (s *Swim) contactDeadOrSeed() {
	s.reconnectAt = s.now + s.intervalsToDuration(reconnectEvery)
	if s.table.Live == 1 && len(s.seeds) > 0 {
		for _, sd := range s.seeds {
			s.sendHelloToSeed(sd)
		}
		s.reconnectAt = s.now + s.joinBackoff*3/4 + time.Duration(s.rng.Int64N(int64(s.joinBackoff)/2+1))
		s.joinBackoff = min(2*s.joinBackoff, joinBackoffMax*s.interval)
	} else {
		s.joinBackoff = s.interval / 2
	}
	var away []seed
	for _, sd := range s.seeds {
		if m := s.table.Get(sd.name); m == nil || !m.State.IsLive() {
			away = append(away, sd)
		}
	}
	dead := s.randomMember(func(m *Member) bool { return m.State == StateDead })
	if len(away) > 0 && s.table.Live > 1 && (dead == nil || s.rng.IntN(2) == 0) {
		s.sendHelloToSeed(away[s.rng.IntN(len(away))])
	} else if dead != nil && s.requests.find(requestReconnect, dead.Name) == nil {
		s.ping(dead, pendingRequest{purpose: requestReconnect, dueAt: s.now + s.scaledByHealth(1)})
	}
}

// sendHelloToSeed asks whoever is at a seed's address to answer.
func (s *Swim) sendHelloToSeed(sd seed) {
	to := PacketDestination{AddrPort: sd.addr}
	if r := s.addRequestIfRoom(pendingRequest{purpose: requestJoin, to: to, dueAt: s.now + s.scaledByHealth(1)}); r != nil {
		s.send(to, Packet{Kind: PacketHello, RequestID: r.id}, s.self)
	}
}
