package main

// This file encodes gossip packets before they are sealed (encrypted), and decodes them after they
// are opened. If bytes decode to a packet, encoding that packet gives the same bytes. Every length
// is checked against its limit before memory is allocated. Pure: no I/O and no clock.

import "encoding/binary"

// Limits of packets. A packet of MaxPacket bytes fits an MTU of 1280 bytes, the smallest MTU that
// IPv6 allows (RFC 8200) and the MTU of some WireGuard tunnels. The IPv6 header takes 40 of the
// 1280 bytes, and the UDP header takes 8.
const (
	MaxPacket     = 1200 // bytes of UDP payload, after sealing
	MaxMemberName = 64   // bytes of a member's name
	MaxMemberAddr = 128  // bytes of a member's address or URL
	MaxAccusers   = 4    // members named as accusers in one suspicion; more would not shorten the suspicion further

	// MaxSlots is one more than the highest valid slot, and the highest number of buckets of the
	// jump hash. The number of buckets is the highest slot ever claimed plus one, and never falls.
	// So one faulty claim to a high slot costs all members memory and time for ever, and MaxSlots
	// limits this cost.
	MaxSlots = 4096
	NoSlot   = 1<<16 - 1 // value of MemberRecord.Slot if the member claims no slot
)

// A PacketKind is the purpose of a packet. A packet of any kind may carry member records.
type PacketKind uint8

// The kinds of packets.
const (
	// PacketHello asks the member at an address to answer. The answer repeats the random RequestID,
	// which proves that the answer is not a replay. Packet.To may be empty, because the sender may
	// not know that member's name. A receiver that does not know the sender's session, or that
	// knows a later session of the sender, answers too, up to maxUnprovenReplies.
	PacketHello   PacketKind = 1 + iota
	PacketPing               // asks the receiver to answer
	PacketAck                // answers a request; if Target is set, reports that the member Target has answered
	PacketPingReq            // asks the receiver to ping the member Target and to relay the answer
	PacketNack               // answers a PacketPingReq to report that the member Target did not answer in time
	PacketGossip             // carries member records; it has neither RequestID nor ReplyTo
	PacketSync               // carries the sender's member table or a part of it; queued updates are not added to it
	packetKindEnd
)

// A Packet is one datagram from one member to another.
type Packet struct {
	Kind         PacketKind
	WantTable    bool   // the sender asks for the receiver's member table
	TableSettled bool   // Digest has not changed for two intervals
	To           string // the receiver's name; may be empty in a PacketHello
	From         string
	Target       string // name of the member that a relay pings; only in PacketPingReq, PacketNack and a relayed PacketAck
	Session      uint64 // number of the sender's session; see MemberRecord.Session
	Digest       uint64 // digest of the sender's member table
	RequestID    uint64 // random; if not 0, the receiver is asked to answer, with this ID in ReplyTo
	ReplyTo      uint64 // if not 0, the RequestID of the packet that this packet answers
	Buckets      uint16 // highest slot that the sender has ever seen claimed, plus one
	Records      []MemberRecord
}

// Flags in the second byte of a packet.
const (
	flagWantTable = 1
	flagSettled   = 2
)

// AppendPacketHeader appends the encoding of p, without p.Records, to b. The caller then appends
// each record with AppendMember. The records fill the rest of the packet.
func AppendPacketHeader(b []byte, p *Packet) []byte {
	var flags byte
	if p.WantTable {
		flags |= flagWantTable
	}
	if p.TableSettled {
		flags |= flagSettled
	}
	b = append(b, byte(p.Kind), flags)
	b = AppendShortString(b, p.To)
	b = AppendShortString(b, p.From)
	b = AppendShortString(b, p.Target)
	b = binary.LittleEndian.AppendUint64(b, p.Session)
	b = binary.LittleEndian.AppendUint64(b, p.Digest)
	b = binary.LittleEndian.AppendUint64(b, p.RequestID)
	b = binary.LittleEndian.AppendUint64(b, p.ReplyTo)
	return binary.LittleEndian.AppendUint16(b, p.Buckets)
}

// DecodePacket decodes the opened packet b into p, and reuses the memory of p.Records. After an
// error the content of p must not be used. p does not refer to the memory of b.
func DecodePacket(b []byte, p *Packet) error {
	r := NewWireReader(b)
	kind, flags := PacketKind(r.Byte()), r.Byte()
	*p = Packet{
		Kind: kind, WantTable: flags&flagWantTable != 0, TableSettled: flags&flagSettled != 0,
		To: readVisibleASCII(&r, MaxMemberName), From: readVisibleASCII(&r, MaxMemberName), Target: readVisibleASCII(&r, MaxMemberName),
		Session: r.Uint64(), Digest: r.Uint64(), RequestID: r.Uint64(), ReplyTo: r.Uint64(), Buckets: r.Uint16(),
		Records: p.Records[:0],
	}
	r.Require(kind > 0 && kind < packetKindEnd && flags <= flagWantTable|flagSettled)
	r.Require(p.From != "" && (p.To != "" || kind == PacketHello) && p.Buckets <= MaxSlots)
	for r.Len() > 0 {
		p.Records = append(p.Records, readMember(&r))
	}
	return r.Err()
}
