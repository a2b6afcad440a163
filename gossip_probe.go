package main

// Failure detection. This member probes the other members. A member that does not answer is
// suspected, then declared dead, and then contacted again and again for ever. This member suspects
// no member because of a stall of its own. While its own health is bad, it waits longer for answers
// (Lifeguard). Pure: no I/O and no clock.

import (
	"math"
	"slices"
	"time"
)

// Times, in gossip intervals.
const (
	indirectAfter    = 0.2  // from the first ping of a probe to a second ping and the indirect pings
	suspectAfter     = 0.4  // from the second ping of a probe to the suspicion
	suspicionMin     = 1.1  // duration of a suspicion that others confirm, in rings of up to ten members
	suspicionMax     = 5    // duration of a suspicion that no other member confirms, as a multiple of the confirmed one
	finalPingSpacing = 0.2  // between the final pings to a suspect, and from the last ping to its death
	pairPingSpacing  = 0.1  // between pings to a suspect while no third member is live
	reconnectEvery   = 3    // between attempts to reach a dead member or a seed
	joinBackoffMax   = 4    // longest backoff between attempts to join, before random jitter
	stallAfter       = 0.25 // a call of Receive or Tick that is this late shows a stall
)

const (
	indirectChecks = 4 // relays that are asked to ping a member that does not answer
	maxFinalPings  = 6 // pings to a suspect shortly before it is declared dead
	maxHealth      = 8 // highest value of Swim.Health (Lifeguard's S)
)

// Stages of a probe. pendingRequest.tries of a probe holds its stage.
const (
	probePinged    = iota // one ping was sent
	probeIndirect         // a second ping and indirect pings were sent
	probeSuspected        // the member is suspected; pings go on until the suspicion ends
)

// scaledByHealth returns the duration of a number of intervals, multiplied by Health+1, so that
// this member waits longer while its own health is bad (Lifeguard, LHA-Probe).
func (s *Swim) scaledByHealth(intervals float64) time.Duration {
	return s.intervalsToDuration(intervals * float64(s.Health+1))
}

// worsenOwnHealth adds a point to Health, up to maxHealth.
func (s *Swim) worsenOwnHealth() { s.Health = min(s.Health+1, maxHealth) }

// handleOwnStall makes allowance for a stall of this process, which lasted about lateBy. The
// answers that arrived during the stall wait in the socket, or the socket lost them. So silence
// says nothing about other members. handleOwnStall cancels all probes and postpones all deaths and
// the next probe.
func (s *Swim) handleOwnStall(lateBy time.Duration) {
	s.worsenOwnHealth()
	s.addEvent(EventStalled, s.self.Name, s.self.Addr)
	s.requests = slices.DeleteFunc(s.requests, func(r *pendingRequest) bool { return r.purpose == requestProbe })
	for _, m := range s.table.Members {
		m.DeadAt += lateBy + s.intervalsToDuration(suspicionMin)
	}
	s.probeAt = max(s.probeAt, s.now+s.interval/2)
}

// probeNext probes the next member of the probe order.
func (s *Swim) probeNext() {
	s.probeAt = s.now + s.scaledByHealth(1)
	m := s.probeOrder.Next(&s.table, s.rng, func(m *Member) bool { return m != s.self && s.requests.find(requestProbe, m.Name) == nil })
	if m != nil {
		s.probe(m)
	}
}

// probe starts a probe of m with a ping.
func (s *Swim) probe(m *Member) {
	s.ping(m, pendingRequest{purpose: requestProbe, dueAt: s.now + s.scaledByHealth(indirectAfter)})
}

// handleRequestTimeout handles r, which was not answered in time: it asks again, continues a probe,
// or gives the request up.
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
		// Nobody answered, so the higher session was this member's own, from before it lost its
		// state.
		s.requests.remove(r)
		if r.rivalSession > s.self.Session {
			s.renewSession(r.rivalSession)
		}
	default:
		s.requests.remove(r)
	}
}

// escalateProbe moves a probe that was not answered in time to its next stage. It ends the probe if
// the member is no longer live, or if the suspicion that the probe caused has ended.
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
		// A relay answers even if it cannot reach the member. If no relay answered, the fault may
		// be this member's own.
		if len(r.relays) > 0 && !r.relayNacked {
			s.worsenOwnHealth()
		}
		s.suspect(m)
	}
	r.tries, r.dueAt = probeSuspected, s.now+s.interval/3
	if s.table.Live <= 2 {
		r.dueAt = s.now + s.intervalsToDuration(pairPingSpacing)
	}
	// The ping carries the member's own record. So the member learns that it is suspected, and its
	// answer refutes the suspicion.
	s.sendTo(m, Packet{Kind: PacketPing, RequestID: r.id})
}

// probeIndirectly pings the member once more, and asks up to indirectChecks other members, the
// relays, to ping it too.
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

// suspect records that this member suspects m, and queues that as an update for all members.
func (s *Swim) suspect(m *Member) {
	r := m.MemberRecord
	r.State, r.Accusers, r.Age = StateSuspect, []uint64{accuserID(s.name)}, 0
	if s.mergeRecordIfNewer(r) != nil {
		s.table.QueueUpdate(m)
	}
}

// declareDead records that m, a suspect, is dead, and queues that as an update for all members.
func (s *Swim) declareDead(m *Member) {
	r := m.MemberRecord
	r.State, r.Accusers, r.Age = StateDead, nil, 0
	s.mergeRecordIfNewer(r)
	s.table.QueueUpdate(m)
}

// expireSuspicions declares suspects dead when their suspicion ends. Shortly before that, every
// member pings the suspect a few more times: all accusers may be wrong, and the refutation may be
// lost.
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

// nextPingOrDeathAt returns when m, a suspect, must next be pinged, or must be declared dead.
func (s *Swim) nextPingOrDeathAt(m *Member) time.Duration {
	return m.DeadAt - s.intervalsToDuration(finalPingSpacing*float64(maxFinalPings-m.FinalPings))
}

// suspicionEnd returns when m, a suspect, must be declared dead. The more members share the
// suspicion, the sooner it ends (Lifeguard, LHA-Suspicion). If no other member could share it, it
// ends after the shortest time.
func (s *Swim) suspicionEnd(m *Member) time.Duration {
	n := float64(s.table.Live)
	shortest := suspicionMin * max(1, (3+math.Log10(n))/4)
	longest := suspicionMax * shortest
	if n <= 2 {
		longest = shortest
	}
	others := min(max(n-2, 1), MaxAccusers-1) // members that could confirm the suspicion, at most as many as can shorten it
	shared := (longest - shortest) * math.Log(float64(len(m.Accusers))) / math.Log(others+1)
	return m.SuspectedAt + s.intervalsToDuration(max(shortest, longest-shared))
}

// contactDeadOrSeed contacts a random dead member, or a random seed at whose address no live member
// is known, because either may have come back. While this member is alone, it contacts all seeds.
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

// sendHelloToSeed asks the member at a seed's address, whatever its name, to answer.
func (s *Swim) sendHelloToSeed(sd seed) {
	to := PacketDestination{AddrPort: sd.addr}
	if r := s.addRequestIfRoom(pendingRequest{purpose: requestJoin, to: to, dueAt: s.now + s.scaledByHealth(1)}); r != nil {
		s.send(to, Packet{Kind: PacketHello, RequestID: r.id}, s.self)
	}
}
