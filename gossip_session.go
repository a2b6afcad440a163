package main

// Sessions of other members: how a packet is opened, and whether it may be believed. A session
// has to answer a challenge before anything is believed that it says, because its packets could
// be replays. Answers to senders that have proven nothing are bounded. Pure. This file must not
// know when to probe, or whom to suspect.

import (
	"errors"
	"net/netip"
	"slices"
	"time"
)

const (
	maxUnprovenReplies = 2048      // per interval
	versionEventEvery  = time.Hour // at most
)

// RefusedPackets counts packets that were dropped, by reason.
type RefusedPackets [refusedReasonCount]uint64

// The reasons. No refused packet is believed, but of one that answers no request
// (RefusedUnasked) only the answer is ignored. No refused packet is answered, but its sender may
// be challenged (RefusedStranger) or told of its later session (RefusedSession).
const (
	RefusedUnsealed  = iota // too short or too long for a packet
	RefusedVersion          // sealed by another version of telemeter
	RefusedKey              // sealed under a key not held
	RefusedForged           // does not open
	RefusedMalformed        // opens, but does not decode
	RefusedMisrouted        // for another member, or with our name as its sender
	RefusedSession          // of an earlier session of its sender
	RefusedReplay           // received before, or too old to tell
	RefusedStranger         // its sender had to be challenged first
	RefusedUnasked          // answers no request to its sender
	refusedReasonCount
)

// RefusedReasonNames returns the names of the reasons.
func RefusedReasonNames() [refusedReasonCount]string {
	return [...]string{"unsealed", "version", "key", "forged", "malformed", "misrouted", "session", "replay", "stranger", "unasked"}
}

// openPacket opens and decodes a packet, and returns it with its sender's counter. A packet that is
// refused is counted, and p is nil. p is valid until the next open.
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

// refusedReason returns the reason for an error of PacketSealer.Open.
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

// A packetSenderKind says in which session a packet was sent.
type packetSenderKind uint8

const (
	fromOwnName    packetSenderKind = iota // its sender has our name
	fromOldSession                         // an earlier session than the one known
	fromReplay                             // a proven session, but its counter was seen before
	fromProven                             // a proven session
	fromProving                            // a session not proven yet; the packet answers our request
	fromStranger                           // a session not proven yet
)

// classifyAndMarkSeen returns the origin of p, where answered is the request that p answers, or
// nil. The counter of a packet from a proven session is taken as seen.
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

// markSessionProven begins the session of p, which answers a request of ours, and returns its
// member. If the member's record of this session is not known, it has to be in p; otherwise the
// result is nil.
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

// answerOldSession tells the sender of p of its later session, if p asks or answers: it may have
// lost its state. (A replay gets one packet for one packet by this.)
func (s *Swim) answerOldSession(from netip.AddrPort, p *Packet, answered *pendingRequest) {
	if (p.Kind == PacketHello || answered != nil) && s.countUnprovenReply() {
		s.replyToUnproven(from, Packet{Kind: PacketAck, To: p.From, ReplyTo: p.RequestID}, s.self, s.table.Get(p.From))
	}
}

// challenge asks the sender of p to prove that p is no replay, and answers p if it asks for
// that, because the answer tells only of us.
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

// findOrAddChallenge returns the request ID that memberName has to answer with, and whether it is a
// new one: however often a packet is replayed, it leads to one request. It is 0 if too many
// requests are pending.
func (s *Swim) findOrAddChallenge(memberName string) (requestID uint64, isNew bool) {
	if r := s.requests.find(requestChallenge, memberName); r != nil {
		return r.id, false
	}
	if r := s.addRequestIfRoom(pendingRequest{purpose: requestChallenge, name: memberName, dueAt: s.now + s.interval}); r != nil {
		return r.id, true
	}
	return 0, false
}

// countUnprovenReply counts the answers to senders that have proven nothing, and tells whether one
// more is allowed in this interval.
func (s *Swim) countUnprovenReply() (allowed bool) {
	if s.now-s.repliesSince >= s.interval {
		s.repliesSince, s.replies = s.now, 0
	}
	s.replies++
	return s.replies <= maxUnprovenReplies
}
