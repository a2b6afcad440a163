package main

// Handling of packets: a member merges the records, answers requests, and refutes what is
// wrong about itself. It believes nothing that a session says before the session has answered a
// challenge. Pure.

import (
	"math"
	"net/netip"
	"time"
)

// Receive takes a packet that came from an address, and returns what to send.
func (s *Swim) Receive(now time.Duration, from netip.AddrPort, data []byte) []Datagram {
	s.beginReceiveOrTick(now)
	if s.StoodDown {
		return nil
	}
	if p, counter := s.openPacket(from, data); p != nil {
		s.handleOrChallengeUnproven(from, p, counter)
	}
	return s.endStep()
}

// handleOrChallengeUnproven handles p if its session has proven itself, or does so by p. It refuses
// p otherwise, and makes the session prove itself.
func (s *Swim) handleOrChallengeUnproven(from netip.AddrPort, p *Packet, replayCounter uint64) {
	r := s.requests.answeredBy(p)
	switch s.classifyAndMarkSeen(p, replayCounter, r) {
	case fromProven:
		s.handlePacket(from, p, s.table.Get(p.From), r)
	case fromProving:
		if m := s.markSessionProven(p, replayCounter); m != nil {
			s.handlePacket(from, p, m, r)
		} else {
			s.Refused[RefusedStranger]++
		}
	case fromReplay:
		s.Refused[RefusedReplay]++
	case fromOldSession:
		s.Refused[RefusedSession]++
		s.answerOldSession(from, p, r)
	case fromStranger:
		s.Refused[RefusedStranger]++
		s.challenge(from, p)
	case fromOwnName:
		s.Refused[RefusedMisrouted]++
		s.handleNamesake(from, p, r)
	}
}

// handlePacket does what p asks for. The session of sender has proven itself. answered is the
// request that p answers, or nil.
func (s *Swim) handlePacket(from netip.AddrPort, p *Packet, sender *Member, answered *pendingRequest) {
	if answered == nil && p.ReplyTo != 0 && p.Kind != PacketNack {
		s.Refused[RefusedUnasked]++ // most likely it is late; the rest of it may still be news
	}
	s.buckets = max(s.buckets, p.Buckets)
	if p.Kind == PacketSync && s.syncedAt == 0 {
		// A member that answers many newcomers at once soon knows more than it sent.
		s.syncedAt, s.resyncAt, s.wantTable = s.now, s.now+s.interval, false
	}
	if p.Kind == PacketAck {
		sender.KnowsOurSession = p.RequestID == 0 // otherwise it challenges us
	}
	refuted := s.mergeRecords(p, sender)
	if sender.Session != p.Session {
		return // a record in p says that a later session has begun
	}
	switch {
	case p.Kind == PacketAck && answered != nil:
		s.completeAnsweredRequest(sender, answered)
	case p.Kind == PacketNack && answered != nil:
		answered.relayNacked = true
	case p.Kind == PacketPingReq:
		s.pingOnBehalf(p, sender)
	}
	s.answer(from, p, sender, refuted)
	if p.WantTable {
		s.sendTable(sender, false)
	} else if p.Digest != s.table.Digest && p.TableSettled && s.isTableSettled() {
		// Neither table has changed for two intervals: no update is under way that would make
		// them equal.
		s.sendTable(sender, true)
	}
}

// answer answers p if it has a request, and tells its sender what is wrong about its view: that
// of us, which was just refuted, or that it is taken for dead.
func (s *Swim) answer(from netip.AddrPort, p *Packet, sender *Member, justRefuted bool) {
	to := PacketDestination{AddrPort: from}
	switch {
	case p.RequestID != 0 && p.Kind == PacketPing && !justRefuted:
		s.send(to, Packet{Kind: PacketAck, To: sender.Name, ReplyTo: p.RequestID}) // it knows us
	case p.RequestID != 0 && p.Kind != PacketPingReq:
		sender.KnowsOurSession = true // by this proof
		s.send(to, Packet{Kind: PacketAck, To: sender.Name, ReplyTo: p.RequestID}, s.self)
	case justRefuted:
		s.send(to, Packet{Kind: PacketGossip, To: sender.Name}, s.self)
	case sender.State == StateDead && p.Kind != PacketAck:
		s.sendTo(sender, Packet{Kind: PacketGossip})
	}
}

// completeAnsweredRequest does what the answer of m to r calls for.
func (s *Swim) completeAnsweredRequest(m *Member, r *pendingRequest) {
	switch r.purpose {
	case requestProbe:
		if r.tries == probePinged {
			rtt := s.now - r.sentAt
			if m.RTT > 0 {
				rtt = (7*m.RTT + rtt) / 8
			}
			m.RTT = max(rtt, 1)
		}
		if r.tries != probeSuspected {
			s.Health = max(s.Health-1, 0)
		}
	case requestIndirect:
		s.sendTo(r.origin, Packet{Kind: PacketAck, ReplyTo: r.originID, Target: r.name})
	case requestJoin:
		for i := range s.seeds {
			if s.seeds[i].addr == r.to.AddrPort {
				s.seeds[i].name = m.Name
			}
		}
	}
	s.requests.remove(r)
}

// pingOnBehalf pings the target of p, a PacketPingReq of requester.
func (s *Swim) pingOnBehalf(p *Packet, requester *Member) {
	target := s.table.Get(p.Target)
	if target != nil && target != s.self && p.RequestID != 0 {
		s.ping(target, pendingRequest{purpose: requestIndirect, origin: requester, originID: p.RequestID, dueAt: s.now + s.intervalsToDuration(indirectAfter)})
	}
}

// mergeRecords merges the records of p, a packet of sender, and tells whether one of them is wrong
// about this member.
func (s *Swim) mergeRecords(p *Packet, sender *Member) (refuted bool) {
	for _, r := range p.Records {
		if r.Name == s.name {
			refuted = s.refuteIfWrong(r) || refuted
		} else {
			s.mergeRecordFrom(sender, r, p.Kind == PacketSync)
		}
	}
	return refuted
}

// mergeRecordFrom merges what sender says of another member, as an update or in a sync of its table.
func (s *Swim) mergeRecordFrom(sender *Member, r MemberRecord, isSync bool) {
	known := s.table.Get(r.Name)
	// When the halves of a ring meet, each takes the other for dead. A member can refute only
	// what it hears of, so in a sync the dead are suspects.
	if isSync && r.State == StateDead && known != nil && known.State.IsLive() && r.Session == known.Session {
		r.State, r.Accusers, r.Age = StateSuspect, []uint64{accuserID(sender.Name)}, 0
	}
	merged := s.mergeRecordIfNewer(r)
	// A member that has just joined need not pass on what all others know.
	isNews := !isSync || known != nil || s.now-s.syncedAt > s.interval
	if merged != nil && isNews {
		s.table.QueueUpdate(merged)
	}
}

// mergeRecordIfNewer believes r, which is not about this member, if it is newer than what is known,
// and then returns the member.
func (s *Swim) mergeRecordIfNewer(r MemberRecord) *Member {
	old := MemberRecord{State: StateDead}
	if m := s.table.Get(r.Name); m != nil {
		old = m.MemberRecord
	}
	m := s.table.Merge(s.now, r)
	if m == nil {
		return nil
	}
	s.raiseLamportAndBuckets(&r)
	switch {
	case m.State == StateLeft && old.State != StateLeft:
		s.addEvent(EventLeft, m.Name, m.Addr)
	case m.State == StateDead && old.State.IsLive():
		s.addEvent(EventDown, m.Name, m.Addr)
	case m.State.IsLive() && !old.State.IsLive():
		s.addEvent(EventUp, m.Name, m.Addr)
		s.probeOrder.Insert(m, s.rng)
	}
	if m.State == StateSuspect {
		if old.State != StateSuspect || old.Session != m.Session || old.Incarnation != m.Incarnation {
			s.onNewSuspicion(m)
		}
		m.DeadAt = s.suspicionEnd(m)
	}
	return m
}

// onNewSuspicion begins a suspicion of m. Some members probe it themselves, so that the truth is
// soon known.
func (s *Swim) onNewSuspicion(m *Member) {
	m.SuspectedAt, m.FinalPings = s.now, 0
	s.addEvent(EventSuspect, m.Name, m.Addr)
	if s.rng.IntN(s.table.Live) < 2*MaxAccusers && s.requests.find(requestProbe, m.Name) == nil && s.self.State != StateLeft {
		s.probe(m)
	}
}

// refuteIfWrong tells whether r, a record of this member, is wrong, and announces a new incarnation
// if others would believe it.
func (s *Swim) refuteIfWrong(r MemberRecord) (wrong bool) {
	switch {
	case r.Session > s.self.Session:
		addr, _ := netip.ParseAddrPort(r.Addr)
		s.startNameCheck(PacketDestination{addr, r.Addr}, r.Session)
		return false
	case r.Session < s.self.Session:
		return true
	case s.self.State == StateLeft:
		return false
	case r.State == StateLeft || r.Incarnation == math.MaxUint32: // no member in good order says so
		s.renewSession(r.Session)
		return true
	case r.State == StateAlive && r.Incarnation <= s.self.Incarnation:
		return false
	}
	if r.Incarnation >= s.self.Incarnation {
		own := s.self.MemberRecord
		own.Incarnation = r.Incarnation
		s.announceSelf(own)
		if r.State == StateSuspect {
			s.worsenOwnHealth() // we may have been too slow to answer
		}
	}
	return true
}

// startNameCheck asks whether a member of our name and a higher session is alive.
func (s *Swim) startNameCheck(to PacketDestination, rivalSession uint64) {
	if s.requests.find(requestNameCheck, s.name) == nil && s.self.State != StateLeft {
		s.addRequestIfRoom(pendingRequest{purpose: requestNameCheck, name: s.name, rivalSession: rivalSession, to: to, dueAt: s.now})
	}
}

// renewSession begins the session after one that others know of, and joins again.
func (s *Swim) renewSession(afterSession uint64) {
	r := s.self.MemberRecord
	r.Session = s.nextSession(afterSession)
	s.announceSelf(r)
	s.addEvent(EventSessionTaken, s.self.Name, s.self.Addr)
	s.reconnectAt, s.syncedAt, s.wantTable = s.now, 0, true
	for _, m := range s.table.Members {
		m.KnowsOurSession = false
	}
}

// handleNamesake takes a packet whose sender has our name: one of our own that came back, or one
// of an earlier session of ours, or of another member with our name. It proves nothing unless it
// answers a request.
func (s *Swim) handleNamesake(from netip.AddrPort, p *Packet, answered *pendingRequest) {
	answer := Packet{Kind: PacketAck, To: s.name, ReplyTo: p.RequestID}
	switch {
	case p.Session == s.self.Session:
		// A seed may be this member itself, but whoever saw the packet can send it back.
	case answered == nil && p.Kind == PacketHello && s.countUnprovenReply():
		if p.Session > s.self.Session {
			s.startNameCheck(PacketDestination{AddrPort: from}, p.Session)
		} else {
			answer.RequestID, _ = s.findOrAddChallenge(s.name) // it may be a replay
		}
		s.replyToUnproven(from, answer)
	case answered == nil:
	case p.Session < s.self.Session:
		s.requests.remove(answered)
		s.addEvent(EventNameConflict, s.name, from.String())
	default:
		if p.RequestID != 0 {
			s.replyToUnproven(from, answer)
		}
		s.addEvent(EventStoodDown, s.name, from.String())
		s.StoodDown = true
	}
}
