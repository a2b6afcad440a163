package main

// This file handles received packets: it merges their records, answers their requests, and refutes
// wrong records about this member. A session is one run of a member, or a part of a run; see
// renewSession. This file believes a session's packets only after the session has answered a
// request of this member, because packets could be replays. Pure: no I/O and no clock.

import (
	"math"
	"net/netip"
	"time"
)

// Receive handles a packet that arrived from the given address, and returns the datagrams to send.
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

// handleOrChallengeUnproven handles p if the sender's session has proven itself and p is not a
// replay, or if p proves the session by answering a request of this member. Otherwise it counts p
// as refused and merges no record of p. It may then challenge a sender whose session is not proven,
// or send a sender with an old session the record of the sender's latest session. If the sender has
// this member's name, it calls handleNamesake.
func (s *Swim) handleOrChallengeUnproven(from netip.AddrPort, p *Packet, replayCounter uint64) {
	r := s.requests.answeredBy(p)
	switch s.classifyAndMarkSeen(p, replayCounter, r) {
	case fromProven:
		s.handlePacket(from, p, s.table.Get(p.From), r)
	case fromProving:
		var earlier Member
		if m := s.table.Get(p.From); m != nil && m.Session < p.Session {
			earlier = *m
		}
		if m := s.markSessionProven(p, replayCounter); m != nil {
			s.handlePacket(from, p, m, r)
			if earlier.Name != "" { // tell the sender that the ring knows its name; see noticeEarlierRun
				s.send(PacketDestination{AddrPort: from}, Packet{Kind: PacketGossip, To: p.From}, &earlier)
			}
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
		// Even a replay proves that the ring has known this member's name, if it has an earlier record.
		for _, r := range p.Records {
			if r.Name == s.name && r.Session < s.newSince {
				s.noticeEarlierRun(r.Session)
			}
		}
		s.challenge(from, p, replayCounter)
	case fromOwnName:
		s.Refused[RefusedMisrouted]++
		s.handleNamesake(from, p, r)
	}
}

// handlePacket merges the records of p and does what p asks for. The session of sender must have
// proven itself. answered is the request that p answers, or nil.
func (s *Swim) handlePacket(from netip.AddrPort, p *Packet, sender *Member, answered *pendingRequest) {
	if answered == nil && p.ReplyTo != 0 && p.Kind != PacketNack {
		s.Refused[RefusedUnasked]++ // p is most likely a late answer; its records are merged, because they may still be news
	}
	sender.HeardFrom, sender.HeardAt = from, s.now
	s.buckets = max(s.buckets, p.Buckets)
	if p.Kind == PacketSync && s.syncedAt == 0 {
		// p is the first sync of this member's session. Ask a member for its table again after an
		// interval: if many new members join at once, the sender of p soon knows more members than
		// it has sent in p.
		s.syncedAt, s.resyncAt, s.wantTable = s.now, s.now+s.interval, false
	}
	if p.Kind == PacketAck {
		sender.KnowsOurSession = p.RequestID == 0 // an answer with a RequestID is a challenge: sender does not know this member's session yet
	}
	refuted := s.mergeRecords(p, sender)
	if sender.Session != p.Session {
		return // p is outdated: one of its records shows that the sender has begun a later session
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
		// The tables of the sender and of this member differ, and neither digest has changed for
		// two intervals. So probably no update is under way that would make the tables equal.
		s.sendTable(sender, true)
	}
}

// answer answers the request in p, if there is one, unless p is a PacketPingReq, which is answered
// later. It also corrects the sender: it sends this member's record if p had a wrong record about
// this member (justRefuted). If this member considers the sender dead, it sends the sender's own
// record, unless p is a PacketAck without a request.
func (s *Swim) answer(from netip.AddrPort, p *Packet, sender *Member, justRefuted bool) {
	to := PacketDestination{AddrPort: from}
	switch {
	case p.RequestID != 0 && p.Kind == PacketPing && !justRefuted:
		s.send(to, Packet{Kind: PacketAck, To: sender.Name, ReplyTo: p.RequestID}) // without this member's record: a member pings only members whose record it has
	case p.RequestID != 0 && p.Kind != PacketPingReq:
		sender.KnowsOurSession = true // the answer proves this member's session to the sender if it arrives
		s.send(to, Packet{Kind: PacketAck, To: sender.Name, ReplyTo: p.RequestID}, s.self)
	case justRefuted:
		s.send(to, Packet{Kind: PacketGossip, To: sender.Name}, s.self)
	case sender.State == StateDead && p.Kind != PacketAck:
		s.sendTo(sender, Packet{Kind: PacketGossip})
	}
}

// completeAnsweredRequest removes r from the pending requests and does what the answer calls for. m
// is the sender of the answer: the member that was asked, or a relay that reports its answer.
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
		if sd := s.seedAt(r.to.AddrPort); sd != nil {
			sd.name = m.Name
		}
	}
	s.requests.remove(r)
}

// pingOnBehalf pings the target of p, a PacketPingReq that requester sent, if the table has the
// target. Later requester gets a PacketAck if the target has answered in time, and a PacketNack
// otherwise.
func (s *Swim) pingOnBehalf(p *Packet, requester *Member) {
	target := s.table.Get(p.Target)
	if target != nil && target != s.self && p.RequestID != 0 {
		s.ping(target, pendingRequest{purpose: requestIndirect, origin: requester, originID: p.RequestID, dueAt: s.now + s.intervalsToDuration(indirectAfter)})
	}
}

// mergeRecords merges the records of p, a packet from sender, into the table. It returns whether p
// had a wrong record about this member; see refuteIfWrong.
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

// mergeRecordFrom merges r, a record about another member, which sender sent. isSync is true if r
// was part of a sync of sender's table, and false if r was an update.
func (s *Swim) mergeRecordFrom(sender *Member, r MemberRecord, isSync bool) {
	known := s.table.Get(r.Name)
	// When a partition ends, each side may consider the members of the other side dead. A member
	// can refute only a record that it receives. So if a sync lists as dead a member that this
	// member considers live, this member suspects it instead. The suspect then learns of the
	// suspicion and can refute it.
	if isSync && r.State == StateDead && known != nil && known.State.IsLive() && r.Session == known.Session {
		r.State, r.Accusers, r.Age = StateSuspect, []uint64{accuserID(sender.Name)}, 0
	}
	merged := s.mergeRecordIfNewer(r)
	// For one interval after its first sync, this member does not pass on the members that it
	// learns from syncs. Most likely they are new only to this member.
	isNews := !isSync || known != nil || s.now-s.syncedAt > s.interval
	if merged != nil && isNews {
		s.table.QueueUpdate(merged)
	}
}

// mergeRecordIfNewer merges r, a record about another member, into the table. It returns that
// member if r has changed the table's record of it, and nil otherwise. It adds an event if the
// member has come up, gone down or left, or if a suspicion of it begins. If the member is
// suspected, it also sets the time at which the suspicion ends.
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
	if m.State.IsLive() && m.Addr == s.self.Addr && (!old.State.IsLive() || old.Addr != m.Addr) {
		s.addLimitedEvent(EventSameAddress, m.Name, netip.AddrPort{}, "both advertise "+m.Addr)
	}
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

// onNewSuspicion records that a suspicion of m begins now, and adds an event. It decides at random
// whether this member probes m at once, unless it probes m already or has left. On average at most
// 2*MaxAccusers members of the ring do so, and thus soon find out themselves whether m is alive.
func (s *Swim) onNewSuspicion(m *Member) {
	m.SuspectedAt, m.FinalPings = s.now, 0
	s.addEvent(EventSuspect, m.Name, m.Addr)
	if s.rng.IntN(s.table.Live) < 2*MaxAccusers && s.requests.find(requestProbe, m.Name) == nil && s.self.State != StateLeft {
		s.probe(m)
	}
}

// refuteIfWrong returns whether r, a received record about this member, is wrong. If r is wrong and
// other members would believe it, refuteIfWrong announces a new incarnation or a new session of
// this member. If r has a higher session than this member, refuteIfWrong returns false, and starts
// to check whether another member uses this member's name. After this member has left, it returns
// false for every record of the present session.
func (s *Swim) refuteIfWrong(r MemberRecord) (wrong bool) {
	switch {
	case r.Session > s.self.Session:
		addr, _ := netip.ParseAddrPort(r.Addr)
		s.startNameCheck(PacketDestination{addr, r.Addr}, r.Session)
		return false
	case r.Session < s.self.Session:
		s.noticeEarlierRun(r.Session)
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
		if r.State != StateAlive {
			s.addLimitedEvent(EventAccused, s.name, netip.AddrPort{}, "this server advertises "+s.self.Addr)
		}
		if r.State == StateSuspect {
			s.worsenOwnHealth() // this member is suspected, perhaps because it was too slow to answer
		}
	}
	return true
}

// noticeEarlierRun reports once that the ring knows this member's name from an earlier run, if this
// member started without a stored state. session is a session of this member's name. A session
// between the first and the present session of this run is no earlier run.
func (s *Swim) noticeEarlierRun(session uint64) {
	if s.newSince != 0 && (session < s.newSince || session > s.self.Session) {
		s.newSince = 0
		s.addEvent(EventNewStorage, s.name, s.self.Addr)
	}
}

// startNameCheck begins to find out whether another member, at the given address, has this member's
// name. rivalSession is that member's session, and is higher than this member's session.
// startNameCheck adds a pending request, which the next Tick sends. It does nothing if such a check
// is pending, if maxPendingRequests requests are pending, or if this member has left.
func (s *Swim) startNameCheck(to PacketDestination, rivalSession uint64) {
	if s.requests.find(requestNameCheck, s.name) == nil && s.self.State != StateLeft {
		s.addRequestIfRoom(pendingRequest{purpose: requestNameCheck, name: s.name, rivalSession: rivalSession, to: to, dueAt: s.now})
	}
}

// renewSession begins a new session of this member, with a higher number than afterSession, because
// another member has a record of this member with the session afterSession. The next Tick then
// calls contactDeadOrSeed, and this member asks for a table again, as after a start.
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
// that was sent back, a replayed packet of an earlier session of this member, or a packet of
// another member with the same name. Only a packet that answers a request of this member proves
// that another member has the name.
func (s *Swim) handleNamesake(from netip.AddrPort, p *Packet, answered *pendingRequest) {
	answer := Packet{Kind: PacketAck, To: s.name, ReplyTo: p.RequestID}
	switch {
	case p.Session == s.self.Session:
		// This member itself sent p in its current session. p has come back, for example because
		// the address of a seed is this member's own, or because an attacker has sent p back.
		// Ignore p, except to tell the operator which seed is this member.
		for _, r := range s.requests {
			if sd := s.seedAt(r.to.AddrPort); sd != nil && r.purpose == requestJoin && r.id == p.RequestID {
				sd.name = s.name
			}
		}
	case answered == nil && p.Kind == PacketHello && s.informing.allow(s.now, s.interval):
		if p.Session > s.self.Session {
			s.startNameCheck(PacketDestination{AddrPort: from}, p.Session)
		} else if r, _ := s.findOrAddChallenge(s.name); r != nil {
			answer.RequestID = r.id // challenge the sender, because p may be a replay
		}
		s.replyToUnproven(from, answer)
	case answered == nil:
	case p.Session < s.self.Session:
		s.requests.remove(answered)
		s.addLimitedEvent(EventNameConflict, s.name, from, "")
	default:
		if p.RequestID != 0 {
			s.replyToUnproven(from, answer)
		}
		s.addEvent(EventStoodDown, s.name, from.String())
		s.StoodDown = true
	}
}
