package main

// This file handles received packets: it merges their records, answers their requests, and refutes
// wrong records about this member. It believes nothing that a session sends before the session has
// answered a challenge. Pure: no I/O and no clock.

import (
	"math"
	"net/netip"
	"time"
)

// Receive handles a packet that arrived from an address, and returns the datagrams to send.
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

// handleOrChallengeUnproven handles p if the sender's session has proven itself, or proves itself
// with p. Otherwise it refuses p, and challenges the sender where that makes sense.
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

// handlePacket merges the records of p and does what p asks for. The session of sender must have
// proven itself. answered is the request that p answers, or nil.
func (s *Swim) handlePacket(from netip.AddrPort, p *Packet, sender *Member, answered *pendingRequest) {
	if answered == nil && p.ReplyTo != 0 && p.Kind != PacketNack {
		s.Refused[RefusedUnasked]++ // most likely a late answer; its records may still be news
	}
	s.buckets = max(s.buckets, p.Buckets)
	if p.Kind == PacketSync && s.syncedAt == 0 {
		// Ask for a table again after an interval: a member that many new members contact at once
		// soon knows more than it has just sent.
		s.syncedAt, s.resyncAt, s.wantTable = s.now, s.now+s.interval, false
	}
	if p.Kind == PacketAck {
		sender.KnowsOurSession = p.RequestID == 0 // an answer with a RequestID challenges this member's session
	}
	refuted := s.mergeRecords(p, sender)
	if sender.Session != p.Session {
		return // a record in p shows that the sender has begun a later session
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
		// Neither table has changed for two intervals, so no update is under way that would make
		// them equal.
		s.sendTable(sender, true)
	}
}

// answer answers the request in p, if there is one, and corrects the sender's view if it is wrong.
// It sends this member's record if a record in p about this member was just refuted. It sends the
// sender's own record if this member considers the sender dead.
func (s *Swim) answer(from netip.AddrPort, p *Packet, sender *Member, justRefuted bool) {
	to := PacketDestination{AddrPort: from}
	switch {
	case p.RequestID != 0 && p.Kind == PacketPing && !justRefuted:
		s.send(to, Packet{Kind: PacketAck, To: sender.Name, ReplyTo: p.RequestID}) // the sender knows this member's record
	case p.RequestID != 0 && p.Kind != PacketPingReq:
		sender.KnowsOurSession = true // the answer proves this member's session
		s.send(to, Packet{Kind: PacketAck, To: sender.Name, ReplyTo: p.RequestID}, s.self)
	case justRefuted:
		s.send(to, Packet{Kind: PacketGossip, To: sender.Name}, s.self)
	case sender.State == StateDead && p.Kind != PacketAck:
		s.sendTo(sender, Packet{Kind: PacketGossip})
	}
}

// completeAnsweredRequest handles the answer of m to r, and removes r from the pending requests.
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

// pingOnBehalf pings the target of p, a PacketPingReq that requester sent.
func (s *Swim) pingOnBehalf(p *Packet, requester *Member) {
	target := s.table.Get(p.Target)
	if target != nil && target != s.self && p.RequestID != 0 {
		s.ping(target, pendingRequest{purpose: requestIndirect, origin: requester, originID: p.RequestID, dueAt: s.now + s.intervalsToDuration(indirectAfter)})
	}
}

// mergeRecords merges the records of p, a packet from sender. It returns whether a record about
// this member was wrong; see refuteIfWrong.
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

// mergeRecordFrom merges r, a record about another member that sender sent. isSync means that r
// came in a sync of sender's table, and not as an update.
func (s *Swim) mergeRecordFrom(sender *Member, r MemberRecord, isSync bool) {
	known := s.table.Get(r.Name)
	// When a partition ends, each side considers the other side dead. A member can only refute a
	// record that it hears of. So a sync makes a live member that sender considers dead a suspect,
	// and the suspect hears of the suspicion.
	if isSync && r.State == StateDead && known != nil && known.State.IsLive() && r.Session == known.Session {
		r.State, r.Accusers, r.Age = StateSuspect, []uint64{accuserID(sender.Name)}, 0
	}
	merged := s.mergeRecordIfNewer(r)
	// A member that has just joined need not pass on the new members in its first sync, because all
	// other members know them.
	isNews := !isSync || known != nil || s.now-s.syncedAt > s.interval
	if merged != nil && isNews {
		s.table.QueueUpdate(merged)
	}
}

// mergeRecordIfNewer merges r, which is about another member, into the table. It returns the member
// if r changed its record, and nil otherwise. It reports events, and begins a suspicion if r is
// one.
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

// onNewSuspicion begins a suspicion of m. A few random members probe m themselves at once, so that
// they soon know the truth.
func (s *Swim) onNewSuspicion(m *Member) {
	m.SuspectedAt, m.FinalPings = s.now, 0
	s.addEvent(EventSuspect, m.Name, m.Addr)
	if s.rng.IntN(s.table.Live) < 2*MaxAccusers && s.requests.find(requestProbe, m.Name) == nil && s.self.State != StateLeft {
		s.probe(m)
	}
}

// refuteIfWrong returns whether r, a received record about this member, is wrong. If other members
// would believe a wrong r, it announces a new incarnation or a new session. If r has a higher
// session, it first checks whether another member uses this name, and returns false.
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
	case r.State == StateLeft || r.Incarnation == math.MaxUint32: // no correct member sends such a record
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
			s.worsenOwnHealth() // this member may have been too slow to answer
		}
	}
	return true
}

// startNameCheck asks the member at the address to whether it has this member's name and a higher
// session, rivalSession.
func (s *Swim) startNameCheck(to PacketDestination, rivalSession uint64) {
	if s.requests.find(requestNameCheck, s.name) == nil && s.self.State != StateLeft {
		s.addRequestIfRoom(pendingRequest{purpose: requestNameCheck, name: s.name, rivalSession: rivalSession, to: to, dueAt: s.now})
	}
}

// renewSession begins the session after afterSession, a session of this member's name that others
// know. It then joins the ring again.
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

// handleNamesake handles p, whose sender has this member's name. p may be a packet of this member
// that came back, a packet of an earlier session of this member, or a packet of another member with
// the same name. p proves nothing unless it answers a request.
func (s *Swim) handleNamesake(from netip.AddrPort, p *Packet, answered *pendingRequest) {
	answer := Packet{Kind: PacketAck, To: s.name, ReplyTo: p.RequestID}
	switch {
	case p.Session == s.self.Session:
		// p is from this member's current session. It came back because a seed is this member
		// itself, or because an attacker who saw p sent it back. Ignore it.
	case answered == nil && p.Kind == PacketHello && s.countUnprovenReply():
		if p.Session > s.self.Session {
			s.startNameCheck(PacketDestination{AddrPort: from}, p.Session)
		} else {
			answer.RequestID, _ = s.findOrAddChallenge(s.name) // challenge the sender, because p may be a replay
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
