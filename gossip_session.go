package main

// This file opens (decrypts) packets and decides whether to believe their sender's session. A
// session is one run of a member, or a part of a run; see renewSession. It proves itself by
// answering a request of this member. Before that, its packets are not believed, because they could
// be replays. The number of answers to unproven sessions is bounded. Pure: no I/O and no clock.
// This file must not know when to probe, or which member to suspect.

import (
	"errors"
	"net/netip"
	"slices"
	"time"
)

const maxUnprovenReplies = 2048 // limit of each replyLimit: most answers in each period of one interval

// RefusedPackets counts refused packets by reason: the index is RefusedUnsealed, RefusedVersion and
// so on.
type RefusedPackets [refusedReasonCount]uint64

// The reasons to refuse a packet. A refused packet is not believed and not answered, with these
// exceptions. RefusedUnasked: this member handles the packet as if it were no answer, and merges
// its records. RefusedStranger: this member may challenge the sender. RefusedSession: this member
// may inform the sender of the sender's later session. RefusedMisrouted: this member may check
// whether the sender is another member with the same name.
const (
	RefusedUnsealed  = iota // too short or too long for a sealed packet
	RefusedVersion          // begins with another version than sealVersion, so probably sealed by another version of telemeter
	RefusedKey              // names a key that this member does not hold
	RefusedForged           // cannot be opened with the key that it names
	RefusedMalformed        // opens but does not decode
	RefusedMisrouted        // addressed to another member, or sent under this member's name
	RefusedSession          // from an earlier session of its sender
	RefusedReplay           // received before, or so old that the replay window cannot tell whether it was received before
	RefusedStranger         // from a session that has not proven itself
	RefusedUnasked          // answers a request that is not pending, or that this member did not send to the sender; a PacketNack does not count
	refusedReasonCount
)

// RefusedReasonNames returns the name of each reason to refuse a packet, for metrics and
// /debug/ring.
func RefusedReasonNames() [refusedReasonCount]string {
	return [...]string{"unsealed", "version", "key", "forged", "malformed", "misrouted", "session", "replay", "stranger", "unasked"}
}

// openPacket opens and decodes data, a packet that arrived from the given address. It returns the
// packet, and the counter in the packet's nonce, by which replays are recognized. If it refuses the
// packet, it counts the refusal and returns nil. p is valid until the next call of openPacket.
func (s *Swim) openPacket(from netip.AddrPort, data []byte) (p *Packet, counter uint64) {
	if len(data) > MaxPacket {
		s.Refused[RefusedUnsealed]++
		return nil, 0
	}
	plain, counter, err := s.sealer.Open(s.plain[:0], data)
	if err != nil {
		s.refuse(from, err)
		return nil, 0
	}
	p, s.plain, s.openedKeyID = &s.packet, plain, SealedKeyID(data)
	switch {
	case DecodePacket(plain, p) != nil:
		s.Refused[RefusedMalformed]++
		return nil, 0
	case p.To != s.name && p.To != "":
		s.Refused[RefusedMisrouted]++
		return nil, 0
	}
	return p, counter
}

// refusedReason returns the reason to refuse a packet for which PacketSealer.Open returned err.
func refusedReason(err error) int {
	switch {
	case errors.Is(err, ErrSealVersion):
		return RefusedVersion
	case errors.Is(err, ErrUnknownKey):
		return RefusedKey
	case errors.Is(err, ErrForged):
		return RefusedForged
	}
	return RefusedUnsealed
}

// A packetSenderKind classifies a packet by its sender and the session in which it was sent.
type packetSenderKind uint8

const (
	fromOwnName    packetSenderKind = iota // the sender has this member's name
	fromOldSession                         // the session is earlier than the latest known session of the sender
	fromReplay                             // the session is proven, but the packet is a replay, or too old to tell whether it is a replay
	fromProven                             // the session is proven, and the packet is not a replay
	fromProving                            // the session is not proven yet, but this packet proves it by answering a request of this member
	fromStranger                           // the session is not proven, and the packet does not prove it
)

// classifyAndMarkSeen returns the kind of p's sender. counter is p's packet counter. answered is
// the request that p answers, or nil. If p's session is proven, classifyAndMarkSeen marks counter
// as seen, so that a replay of p is recognized.
func (s *Swim) classifyAndMarkSeen(p *Packet, counter uint64, answered *pendingRequest) packetSenderKind {
	m := s.table.Get(p.From)
	switch {
	case p.From == s.name:
		return fromOwnName
	case m != nil && p.Session < m.Session:
		return fromOldSession
	case m != nil && p.Session == m.Session && m.Proven:
		if !m.Window.Accept(counter) {
			return fromReplay
		}
		return fromProven
	case answered != nil && p.Target == "":
		return fromProving
	}
	return fromStranger
}

// markSessionProven marks the session of p as proven, because p answers a request of this member,
// and returns the sender. If the table has no record of the sender with this session, it merges the
// sender's record in p. It returns nil if p has no such record either, or if the table does not
// accept the record, for example because it is full.
func (s *Swim) markSessionProven(p *Packet, counter uint64) *Member {
	m := s.table.Get(p.From)
	if m == nil || m.Session != p.Session {
		i := slices.IndexFunc(p.Records, func(r MemberRecord) bool { return r.Name == p.From && r.Session == p.Session })
		if i < 0 {
			return nil
		}
		if m = s.mergeRecordIfNewer(p.Records[i]); m == nil {
			return nil
		}
		s.table.QueueUpdate(m)
	}
	m.Proven = true
	m.Window.StartAfter(counter)
	return m
}

// answerOldSession handles p, a packet from an earlier session of its sender. The sender may have
// lost its state and begun a session with a lower number. So answerOldSession sends it the record
// of its latest known session, if p is a PacketHello or answers a request. A replay of such a
// packet is answered too. The limit is s.informing.
func (s *Swim) answerOldSession(from netip.AddrPort, p *Packet, answered *pendingRequest) {
	if (p.Kind == PacketHello || answered != nil) && s.informing.allow(s.now, s.interval) {
		s.replyToUnproven(from, Packet{Kind: PacketAck, To: p.From, ReplyTo: p.RequestID}, s.self, s.table.Get(p.From))
	}
}

// challenge asks the sender of p to prove its session, because p may be a replay. counter is p's
// packet counter. If p is a request other than a PacketPingReq, the challenge also answers p,
// because the answer reveals only this member's record. challenge does nothing if no further
// challenge can be pending.
//
// A flood of replays must not keep this member from answering live members:
//
//   - The first packet of a sender is always answered. The number of challenges bounds these answers.
//   - While that challenge is pending, challenge answers only requests, and only a request that is
//     newer than all packets that it has answered with this challenge. A packet that a live member
//     has just sent is newer than every replay. s.challenging limits these answers.
//   - If the table has a record of the session, the first challenge also goes to the address in the
//     record, because a replay can come from any address. So a replay makes a live member prove its
//     session. From then on all replays of its packets are recognized.
func (s *Swim) challenge(from netip.AddrPort, p *Packet, counter uint64) {
	isRequest := p.RequestID != 0 && p.Kind != PacketPingReq
	r, isNew := s.findOrAddChallenge(p.From)
	switch {
	case r == nil:
		return
	case isNew:
		m := s.table.Get(p.From)
		known := m != nil && m.Session == p.Session
		if known && m.AddrPort != from {
			s.send(m.PacketDestination(), Packet{Kind: PacketHello, To: m.Name, RequestID: r.id}, s.self)
		}
		if !isRequest && (!known || m.AddrPort == from) {
			s.replyToUnproven(from, Packet{Kind: PacketHello, To: p.From, RequestID: r.id}, s.self)
		}
	case !isRequest || !r.isOlderThan(p.Session, counter) || !s.challenging.allow(s.now, s.interval):
		return
	}
	r.answeredSession, r.answeredCounter = p.Session, counter
	if isRequest {
		s.replyToUnproven(from, Packet{Kind: PacketAck, To: p.From, ReplyTo: p.RequestID, RequestID: r.id}, s.self)
	}
}

// findOrAddChallenge returns the challenge that is pending for the member memberName, or a new one.
// Each name has at most one pending challenge, however often a packet is replayed. It returns nil
// if maxPendingChallenges requests are pending.
func (s *Swim) findOrAddChallenge(memberName string) (r *pendingRequest, isNew bool) {
	if r := s.requests.find(requestChallenge, memberName); r != nil {
		return r, false
	}
	return s.addRequestIfRoom(pendingRequest{purpose: requestChallenge, name: memberName, dueAt: s.now + s.interval}), true
}

// A replyLimit limits answers to packets that could be replays, in each period of one interval. Each
// kind of answer has its own limit, so that a flood that uses up one limit prevents no other
// answers.
type replyLimit struct {
	since   time.Duration // when the current period began
	replies int           // number of answers asked for in the current period
}

// allow counts one more answer, and returns whether it is within maxUnprovenReplies.
func (l *replyLimit) allow(now, interval time.Duration) bool {
	if now-l.since >= interval {
		l.since, l.replies = now, 0
	}
	l.replies++
	return l.replies <= maxUnprovenReplies
}
