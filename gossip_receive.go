package main

// What a member does with a packet: it merges the records, answers questions, and objects to
// wrong claims about itself. It believes nothing of a session that has not answered a
// challenge. Pure.

import (
	"math"
	"net/netip"
	"time"
)

// Receive takes a datagram that came from an address.
func (s *Swim) Receive(now time.Duration, from netip.AddrPort, data []byte) []Datagram {
	s.begin(now)
	if s.Stood {
		return nil
	}
	switch p, m, a := s.Open(from, data); {
	case m != nil:
		s.heed(from, p, m, a)
	case p != nil:
		s.namesake(from, p, a)
	}
	return s.end()
}

// heed believes a packet of a session that is met.
func (s *Swim) heed(from netip.AddrPort, p *Packet, m *Member, a *Question) {
	s.Buckets = max(s.Buckets, p.Buckets)
	if p.Kind == PacketSync && s.synced == 0 {
		// Who answers many newcomers at once soon knows more than it said.
		s.synced, s.again, s.Newcomer = s.Now, s.Now+s.Interval, false
	}
	if p.Kind == PacketAck {
		m.KnowsUs = p.Ask == 0 // else it challenges us
	}
	objected := false
	for _, r := range p.Records {
		if r.Name == s.Name {
			objected = s.hearOfSelf(r) || objected
		} else {
			s.hear(r, m, p.Kind == PacketSync)
		}
	}
	if m.Session != p.Session {
		return // the packet itself said that a newer one has begun
	}
	switch {
	case p.Kind == PacketAck && a != nil:
		s.answered(m, a)
	case p.Kind == PacketNack && a != nil:
		a.Heard = true
	case p.Kind == PacketRelay:
		s.relay(p, m)
	}
	switch {
	case p.Ask != 0 && p.Kind != PacketRelay:
		q := Packet{Kind: PacketAck, To: m.Name, Answer: p.Ask}
		if p.Kind == PacketPing && !objected {
			s.Say(Datagram{To: from}, q) // it knows us
		} else {
			m.KnowsUs = true // by this proof
			s.Say(Datagram{To: from}, q, s.Self)
		}
	case objected:
		s.Say(Datagram{To: from}, Packet{Kind: PacketNews, To: m.Name}, s.Self)
	case m.State == StateDead && p.Kind != PacketAck:
		s.Tell(m, Packet{Kind: PacketNews}) // it does not know what is thought of it
	}
	if p.Want {
		s.Exchange(m, false)
	} else if p.Digest != s.Table.Digest && p.Settled && s.Settled() {
		// Neither table has changed for two intervals: no news is under way that
		// would make them equal.
		s.Exchange(m, true)
	}
}

// answered goes on with a question to which the answer has come, by m.
func (s *Swim) answered(m *Member, a *Question) {
	switch a.Why {
	case ForProbe:
		if a.Tries == 0 {
			rtt := s.Now - a.Since
			if m.RTT > 0 {
				rtt = (7*m.RTT + rtt) / 8
			}
			m.RTT = max(rtt, 1)
		}
		if a.Tries < 2 {
			s.Health = max(s.Health-1, 0)
		}
	case ForOther:
		s.Tell(a.Origin, Packet{Kind: PacketAck, Answer: a.Theirs, Target: a.Name})
	case ForSeed:
		for i := range s.seeds {
			if s.seeds[i].addr == a.To.To {
				s.seeds[i].name = m.Name
			}
		}
	}
	s.Drop(a)
}

func (s *Swim) relay(p *Packet, m *Member) {
	t := s.Table.Get(p.Target)
	if t == nil || t == s.Self || p.Ask == 0 {
		return
	}
	if a := s.Ask(Question{Why: ForOther, Name: t.Name, Origin: m, Theirs: p.Ask, Due: s.Now + s.units(relayAfter)}); a != nil {
		s.Tell(t, Packet{Kind: PacketPing, Ask: a.Nonce})
	}
}

// hear judges what m said of another.
func (s *Swim) hear(r MemberRecord, m *Member, exchange bool) {
	o := s.Table.Get(r.Name)
	// When two halves of a cluster meet, each has the other for dead. Only who is
	// told itself can object; so in an exchange the dead are suspects.
	if exchange && r.State == StateDead && o != nil && o.State.IsLive() && r.Session == o.Session {
		r.State, r.Accusers, r.Age = StateSuspect, []uint64{NameHash(m.Name)}, 0
	}
	if m := s.learn(r); m != nil && (!exchange || o != nil || s.Now-s.synced > s.Interval) {
		s.Table.Spread(m) // but a newcomer need not tell all what all but it knew
	}
}

// learn believes r if it is newer than what is known, and does what follows.
func (s *Swim) learn(r MemberRecord) *Member {
	old := MemberRecord{State: StateDead}
	if m := s.Table.Get(r.Name); m != nil {
		old = m.MemberRecord
	}
	m := s.Table.Merge(s.Now, r)
	if m == nil {
		return nil
	}
	s.seen = max(s.seen, r.Lamport)
	if m.Slot < SlotLimit {
		s.Buckets = max(s.Buckets, m.Slot+1)
	}
	switch {
	case m.State == StateLeft && old.State != StateLeft:
		s.event(EventLeft, m.Name, m.Addr)
	case m.State == StateDead && old.State.IsLive():
		s.event(EventDown, m.Name, m.Addr)
	case m.State.IsLive() && !old.State.IsLive():
		s.event(EventUp, m.Name, m.Addr)
		s.round.Insert(m, s.Rand)
	}
	if m.State == StateSuspect {
		if old.State != StateSuspect || old.Session != m.Session || old.Incarnation != m.Incarnation {
			m.Suspected, m.Asked = s.Now, 0
			s.event(EventSuspect, m.Name, m.Addr)
			// Some look for themselves, so that the truth is soon known.
			if s.Rand.IntN(s.Table.Live) < 2*MaxAccusers && !s.Asking(ForProbe, m.Name) && s.Self.State != StateLeft {
				s.probe(m)
			}
		}
		m.Deadline = s.deadline(m)
	}
	return m
}

// hearOfSelf objects if others are wrong, and tells whether they are.
func (s *Swim) hearOfSelf(r MemberRecord) bool {
	switch {
	case r.Session > s.Self.Session:
		addr, _ := netip.ParseAddrPort(r.Addr)
		s.suspectRival(Datagram{To: addr, Host: r.Addr}, r.Session)
		return false
	case r.Session < s.Self.Session:
		return true
	case s.Self.State == StateLeft:
		return false
	case r.State == StateLeft || r.Incarnation == math.MaxUint32: // said by nobody who means well
		s.adopt(r.Session)
		return true
	case r.State == StateAlive && r.Incarnation <= s.Self.Incarnation:
		return false
	}
	if r.Incarnation >= s.Self.Incarnation {
		own := s.Self.MemberRecord
		own.Incarnation = r.Incarnation
		s.announce(own)
		if r.State == StateSuspect {
			s.Health = min(s.Health+1, maxHealth) // were we too slow to answer?
		}
	}
	return true
}

// suspectRival asks whether a member of our name and a higher session lives.
func (s *Swim) suspectRival(to Datagram, session uint64) {
	if !s.Asking(ForRival, s.Name) && s.Self.State != StateLeft {
		s.Ask(Question{Why: ForRival, Name: s.Name, Rival: session, To: to, Due: s.Now})
	}
}

// namesake takes a packet that says to come from us: our own that came back, from
// an earlier life, or from another member of our name.
func (s *Swim) namesake(from netip.AddrPort, p *Packet, a *Question) {
	if p.Session == s.Self.Session {
		return // a seed may be ourselves, but whoever saw it can send it back
	}
	q := Packet{Kind: PacketAck, To: s.Name, Answer: p.Ask}
	switch {
	case a == nil && p.Kind == PacketHello && s.MayAnswer():
		if p.Session > s.Self.Session {
			s.suspectRival(Datagram{To: from}, p.Session)
		} else {
			q.Ask, _ = s.Proof(s.Name) // is it a replay?
		}
		s.Reply(from, q)
	case a == nil:
	case p.Session < s.Self.Session:
		s.Drop(a)
		s.event(EventConflict, s.Name, from.String())
	default:
		if p.Ask != 0 {
			s.Reply(from, q)
		}
		s.event(EventStood, s.Name, from.String())
		s.Stood = true
	}
}
