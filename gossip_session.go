package main

// This file opens packets and decides whether their sender's session may be believed. A session
// must answer a challenge before any of its packets is believed, because the packets could be
// replays. The number of answers to sessions that have proven nothing is bounded. Pure: no I/O and
// no clock. This file must not know when to probe, or whom to suspect.

import (
	"errors"
	"net/netip"
	"slices"
	"time"
)

const (
	maxUnprovenReplies = 2048      // answers to unproven sessions per interval
	versionEventEvery  = time.Hour // shortest time between two events EventVersion
)

// RefusedPackets counts refused packets, by reason.
type RefusedPackets [refusedReasonCount]uint64

// The reasons to refuse a packet. A refused packet is not believed and not answered, with these
// exceptions. If a packet answers no pending request (RefusedUnasked), only the answer is ignored,
// and the rest is believed. A sender may be challenged (RefusedStranger), be informed of its later
// session (RefusedSession), or be checked for having this member's name (RefusedMisrouted).
const (
	RefusedUnsealed  = iota // too short or too long for a sealed packet
	RefusedVersion          // sealed by another version of telemeter
	RefusedKey              // sealed with a key that this member does not hold
	RefusedForged           // cannot be opened with the key that it names
	RefusedMalformed        // opens but does not decode
	RefusedMisrouted        // addressed to another member, or sent under this member's name
	RefusedSession          // from an earlier session of its sender
	RefusedReplay           // received before, or too old to know
	RefusedStranger         // from a session that has not proven itself
	RefusedUnasked          // answers no pending request to its sender
	refusedReasonCount
)

// RefusedReasonNames returns the names of the reasons, for metrics and /debug/ring.
func RefusedReasonNames() [refusedReasonCount]string {
	return [...]string{"unsealed", "version", "key", "forged", "malformed", "misrouted", "session", "replay", "stranger", "unasked"}
}

// openPacket opens and decodes a packet, and returns it with its sender's packet counter. If it
// refuses the packet, it counts the refusal and returns nil. p is valid until the next call of
// openPacket.
func (s *Swim) openPacket(from netip.AddrPort, data []byte) (p *Packet, counter uint64) {
	if len(data) > MaxPacket {
		s.Refused[RefusedUnsealed]++
		return nil, 0
	}
	plain, counter, err := s.sealer.Open(s.plain[:0], data)
	if err != nil {
		s.Refused[refusedReason(err)]++
		if errors.Is(err, ErrSealVersion) && s.now >= s.versionEventAt {
			s.versionEventAt = s.now + versionEventEvery
			s.addEvent(EventVersion+": "+err.Error(), "", from.String())
		}
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

// A packetSenderKind classifies the session in which a packet was sent.
type packetSenderKind uint8

const (
	fromOwnName    packetSenderKind = iota // the sender has this member's name
	fromOldSession                         // earlier than the latest known session of the sender
	fromReplay                             // proven, but the packet counter was seen before
	fromProven                             // proven
	fromProving                            // not proven yet, but the packet answers a request of this member
	fromStranger                           // not proven yet
)

// classifyAndMarkSeen returns the kind of p's sender. answered is the request that p answers, or
// nil. If the session is proven, classifyAndMarkSeen marks counter, p's packet counter, as seen.
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
// and returns the sender. If the table has no record of this session, it takes the record from p.
// It returns nil if p has no such record either, or if the table has no room.
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

// answerOldSession informs the sender of p, which used an earlier session, of its latest known
// session. It does so only if p is a PacketHello or answers a request: the sender may have lost its
// state. (A replay of such a packet gets one packet in return.)
func (s *Swim) answerOldSession(from netip.AddrPort, p *Packet, answered *pendingRequest) {
	if (p.Kind == PacketHello || answered != nil) && s.countUnprovenReply() {
		s.replyToUnproven(from, Packet{Kind: PacketAck, To: p.From, ReplyTo: p.RequestID}, s.self, s.table.Get(p.From))
	}
}

// challenge asks the sender of p to prove that p is not a replay. If p has a request of its own,
// challenge also answers it, because the answer reveals only this member's record.
func (s *Swim) challenge(from netip.AddrPort, p *Packet) {
	if !s.countUnprovenReply() {
		return
	}
	id, isNew := s.findOrAddChallenge(p.From)
	if p.RequestID != 0 && p.Kind != PacketPingReq {
		s.replyToUnproven(from, Packet{Kind: PacketAck, To: p.From, ReplyTo: p.RequestID, RequestID: id}, s.self)
	} else if isNew {
		s.replyToUnproven(from, Packet{Kind: PacketHello, To: p.From, RequestID: id}, s.self)
	}
}

// findOrAddChallenge returns the request ID with which memberName has to answer, and whether that
// ID is new. Each name has at most one pending challenge, however often a packet is replayed. The
// ID is 0 if too many requests are pending.
func (s *Swim) findOrAddChallenge(memberName string) (requestID uint64, isNew bool) {
	if r := s.requests.find(requestChallenge, memberName); r != nil {
		return r.id, false
	}
	if r := s.addRequestIfRoom(pendingRequest{purpose: requestChallenge, name: memberName, dueAt: s.now + s.interval}); r != nil {
		return r.id, true
	}
	return 0, false
}

// countUnprovenReply counts an answer to a session that has proven nothing. It returns whether this
// interval still allows the answer.
func (s *Swim) countUnprovenReply() (allowed bool) {
	if s.now-s.repliesSince >= s.interval {
		s.repliesSince, s.replies = s.now, 0
	}
	s.replies++
	return s.replies <= maxUnprovenReplies
}
