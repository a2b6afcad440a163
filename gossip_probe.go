package main

// This file detects failures: this member probes the other members with pings. It suspects a member
// that does not answer, and declares it dead unless the member refutes the suspicion. It contacts
// dead members again from time to time, as long as the table has them. After a stall of its own
// process, this member cancels its probes. While its own health is bad, it waits longer for answers
// (Lifeguard). Pure: no I/O and no clock.

import (
	"math"
	"slices"
	"time"
)

// Times, as multiples of the gossip interval. Times that scaledByHealth scales are longer while
// this member's health is bad.
const (
	indirectAfter    = 0.2  // intervals from the first ping of a probe to a second ping and the indirect pings
	suspectAfter     = 0.4  // intervals from the second ping of a probe to the suspicion
	suspicionMin     = 1.1  // shortest duration of a suspicion, in intervals, in rings of up to ten members; see suspicionEnd
	suspicionMax     = 5    // longest duration of a suspicion, as a multiple of the shortest duration; see suspicionEnd
	finalPingSpacing = 0.2  // intervals between the final pings to a suspect, and from the last of them until it is declared dead
	pairPingSpacing  = 0.1  // intervals between pings to a suspect while no third member is live
	reconnectEvery   = 3    // intervals between attempts to reach a dead member or a seed; while this member is alone, joinBackoffMax applies
	joinBackoffMax   = 4    // most intervals between attempts to reach the seeds while this member is alone, before random jitter
	stallAfter       = 0.25 // a call of Receive or Tick that comes at least this many intervals too late counts as a stall of this process
)

const (
	indirectChecks = 4 // most members that one probe asks, as relays, to ping a member that does not answer
	maxFinalPings  = 6 // most pings that this member sends to a suspect shortly before it declares the suspect dead
	maxHealth      = 8 // highest, and worst, value of Swim.Health (Lifeguard's S)
)

// Stages of a probe. The field tries of the probe's pendingRequest holds its stage.
const (
	probePinged    = iota // one ping was sent
	probeIndirect         // a second ping and indirect pings were sent
	probeSuspected        // the member is suspected; pings go on until the suspicion ends
)

// scaledByHealth returns the duration of a number of intervals, multiplied by Swim.Health+1. A
// higher Health is worse. So this member waits longer for answers while its own health is bad
// (Lifeguard, LHA-Probe).
func (s *Swim) scaledByHealth(intervals float64) time.Duration {
	return s.intervalsToDuration(intervals * float64(s.Health+1))
}

// worsenOwnHealth adds 1 to Swim.Health, up to maxHealth. A higher Health is worse.
func (s *Swim) worsenOwnHealth() { s.Health = min(s.Health+1, maxHealth) }

// handleOwnStall adjusts this member after a stall of its own process, which lasted about lateBy.
// Answers that arrived during the stall still wait in the socket, or the socket has dropped them.
// So a missing answer does not show that another member is dead. handleOwnStall cancels all probes,
// delays the next probe until at least half an interval from now, postpones the time at which each
// suspect is declared dead, and makes this member's health worse.
func (s *Swim) handleOwnStall(lateBy time.Duration) {
	s.worsenOwnHealth()
	s.addEvent(EventStalled, s.self.Name, s.self.Addr)
	s.requests = slices.DeleteFunc(s.requests, func(r *pendingRequest) bool { return r.purpose == requestProbe })
	for _, m := range s.table.Members {
		m.DeadAt += lateBy + s.intervalsToDuration(suspicionMin)
	}
	s.probeAt = max(s.probeAt, s.now+s.interval/2)
}

// probeNext probes the next member in probeOrder that has no probe pending, and schedules the next
// probe. Unlike in Lifeguard, the time until then does not depend on Health, because only answered
// probes make Health better again. If a member with a bad health probed less often, a short flood
// that makes its socket lose packets would slow its judgement for minutes.
func (s *Swim) probeNext() {
	s.probeAt = s.now + s.interval
	m := s.probeOrder.Next(&s.table, s.rng, func(m *Member) bool { return m != s.self && s.requests.find(requestProbe, m.Name) == nil })
	if m != nil {
		s.probe(m)
	}
}

func (s *Swim) probe(m *Member) {
	s.ping(m, pendingRequest{purpose: requestProbe, dueAt: s.now + s.scaledByHealth(indirectAfter)})
}

// handleRequestTimeout handles r, a request that was not answered in time or has yet to be sent.
// Depending on the purpose of r, it sends the request, continues the probe, or gives up. If r was
// an indirect ping, it reports to the member that asked for the ping that there was no answer.
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
		// No other member with this name has answered. So r.rivalSession is probably a session of
		// this member itself, from an earlier run whose state is lost.
		s.requests.remove(r)
		s.noticeEarlierRun(r.rivalSession)
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
		// The member has answered no ping of this probe. If it has sent other packets meanwhile, from
		// another address than it advertises, pings do not reach it there. The packets of a leave show
		// nothing, because the member may have ended before the ping arrived.
		if m.State != StateLeft && m.HeardAt > r.sentAt && m.AddrPort.IsValid() && m.HeardFrom != m.AddrPort {
			s.addLimitedEvent(EventUnreachable, m.Name, m.HeardFrom, "it advertises "+m.Addr)
		}
		s.requests.remove(r)
		return
	case r.tries == probePinged:
		s.probeIndirectly(r)
		return
	case r.tries == probeIndirect:
		// A relay that knows the probed member answers even if it cannot reach that member. If no
		// relay has answered, this member itself may be disconnected or slow.
		if len(r.relays) > 0 && !r.relayNacked {
			s.worsenOwnHealth()
		}
		s.suspect(m)
	}
	r.tries, r.dueAt = probeSuspected, s.now+s.interval/3
	if s.table.Live <= 2 {
		r.dueAt = s.now + s.intervalsToDuration(pairPingSpacing)
	}
	// This ping carries the record of m, in which m is suspected. So m learns of the suspicion, and
	// its answer refutes the suspicion.
	s.sendTo(m, Packet{Kind: PacketPing, RequestID: r.id})
}

// probeIndirectly sends a second ping to the member that r probes, and asks up to indirectChecks
// other members, the relays, to ping that member too.
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

// suspect records that this member suspects m. If that changes the record of m, it queues the
// record as an update.
func (s *Swim) suspect(m *Member) {
	r := m.MemberRecord
	r.State, r.Accusers, r.Age = StateSuspect, []uint64{accuserID(s.name)}, 0
	if s.mergeRecordIfNewer(r) != nil {
		s.table.QueueUpdate(m)
	}
}

// declareDead records that m, a suspect, is dead, and queues the new record as an update.
func (s *Swim) declareDead(m *Member) {
	r := m.MemberRecord
	r.State, r.Accusers, r.Age = StateDead, nil, 0
	s.mergeRecordIfNewer(r)
	s.table.QueueUpdate(m)
}

// expireSuspicions declares each suspect dead whose suspicion has ended. Shortly before the end it
// pings the suspect a few more times, and so does every other member that knows of the suspicion.
// The reason is that all accusers may be wrong, and the packets in which the suspect refuted the
// suspicion may be lost.
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

// nextPingOrDeathAt returns the time at which m, a suspect, must get its next final ping. After
// maxFinalPings pings it returns the time at which m must be declared dead.
func (s *Swim) nextPingOrDeathAt(m *Member) time.Duration {
	return m.DeadAt - s.intervalsToDuration(finalPingSpacing*float64(maxFinalPings-m.FinalPings))
}

// suspicionEnd returns the time at which m, a suspect, must be declared dead. The more members
// suspect m, up to MaxAccusers, the sooner the suspicion ends (Lifeguard, LHA-Suspicion). It has
// its longest duration while only one member suspects m. If the ring has no third member that could
// suspect m too, it has its shortest duration.
func (s *Swim) suspicionEnd(m *Member) time.Duration {
	n := float64(s.table.Live)
	shortest := suspicionMin * max(1, (3+math.Log10(n))/4)
	longest := suspicionMax * shortest
	if n <= 2 {
		longest = shortest
	}
	others := min(max(n-2, 1), MaxAccusers-1) // members, besides the first accuser, that could share the suspicion; more than MaxAccusers-1 do not shorten it further
	shared := (longest - shortest) * math.Log(float64(len(m.Accusers))) / math.Log(others+1)
	return m.SuspectedAt + s.intervalsToDuration(max(shortest, longest-shared))
}

// contactDeadOrSeed contacts a random dead member, because it may be alive again, or a random seed
// address at which this member knows no other live member, because a member may have started there. While
// this member knows no other live member, it also contacts all seeds each time, and the time
// between the attempts grows up to joinBackoffMax.
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
		// A seed that seems to be this member itself counts as away: an attacker can send packets back.
		if m := s.table.Get(sd.name); m == nil || m == s.self || !m.State.IsLive() {
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

// sendHelloToSeed asks the member at the address of sd to answer, whatever that member's name is.
// It does nothing if maxPendingRequests requests are pending.
func (s *Swim) sendHelloToSeed(sd seed) {
	to := PacketDestination{AddrPort: sd.addr}
	if r := s.addRequestIfRoom(pendingRequest{purpose: requestJoin, to: to, dueAt: s.now + s.scaledByHealth(1)}); r != nil {
		s.send(to, Packet{Kind: PacketHello, RequestID: r.id}, s.self)
	}
}
