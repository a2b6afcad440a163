package main

// The wire format of gossip: packets, before they are sealed and after they are opened. A packet
// that decodes encodes to the same bytes. Every length has a limit, which is checked before
// anything is kept. Pure.

import "encoding/binary"

// Limits of packets. A packet of MaxPacket bytes fits the MTU of a WireGuard tunnel over IPv6
// (1280 − 20 − 8 and some to spare).
const (
	MaxPacket     = 1200 // bytes of UDP payload, sealed
	MaxMemberName = 64   // bytes
	MaxMemberAddr = 128  // bytes of an address, and of a URL
	MaxAccusers   = 4    // that a suspicion lists: more shorten it no further

	// MaxSlots bounds the slots and the buckets, and with them what one broken claim can cost
	// all members for ever, because buckets never fall. A claim to a slot beyond is no claim.
	MaxSlots = 4096
	NoSlot   = 1<<16 - 1
)

// PacketKind says what the sender of a packet wants. A packet of any kind may carry records.
type PacketKind uint8

// The kinds of packets.
const (
	// PacketHello asks whoever is at an address (To may be empty) to answer and so to prove
	// its session. It is answered whatever its sender's session.
	PacketHello   PacketKind = 1 + iota
	PacketPing               // asks the member To to answer
	PacketAck                // answers; with Target, the sender passes on that Target answered
	PacketPingReq            // asks To to ping Target and to pass its answer on
	PacketNack               // answers a PacketPingReq: Target did not answer
	PacketGossip             // only carries records
	PacketSync               // carries a part of the sender's table, and no updates
	packetKindEnd
)

// A Packet is one datagram from one member to another.
type Packet struct {
	Kind         PacketKind
	WantTable    bool   // the sender asks for the receiver's table
	TableSettled bool   // the sender's table has not changed for two intervals
	To           string // the receiver's name
	From         string // the sender's name
	Target       string // of PacketPingReq, PacketNack, and a PacketAck that is passed on
	Session      uint64 // the sender's
	Digest       uint64 // of the sender's table
	RequestID    uint64 // random; if not 0, the receiver answers with it in ReplyTo
	ReplyTo      uint64 // if not 0, the RequestID that this answers
	Buckets      uint16 // the most that the sender has heard of; see MemberRecord.Slot
	Records      []MemberRecord
}

// Flags of a packet.
const (
	flagWantTable = 1
	flagSettled   = 2
)

// AppendPacketHeader appends all of p but its records. They follow by AppendMember, up to the
// packet's end.
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

// DecodePacket reads an opened packet into p, and reuses p.Records. After an error p holds
// nothing to be used. b is not kept.
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
