package main

// The wire format of gossip packets, before they are sealed and after they are opened. If a packet
// decodes, encoding it again gives the same bytes. Every length is checked against its limit before
// memory is allocated. Pure: no I/O and no clock.

import "encoding/binary"

// Limits of packets. A packet of MaxPacket bytes fits the MTU of a WireGuard tunnel over IPv6: 1280
// bytes, minus 20 for IP and 8 for UDP, with some bytes to spare.
const (
	MaxPacket     = 1200 // bytes of UDP payload, after sealing
	MaxMemberName = 64   // bytes
	MaxMemberAddr = 128  // bytes of an address or URL
	MaxAccusers   = 4    // accusers in one suspicion; more accusers would not shorten it further

	// MaxSlots limits slots and buckets. The number of buckets never falls, so that MaxSlots also
	// limits the permanent cost of one faulty claim to all members. A claim to a slot of MaxSlots
	// or above is invalid.
	MaxSlots = 4096
	NoSlot   = 1<<16 - 1 // value of MemberRecord.Slot if the member claims no slot
)

// A PacketKind is the purpose of a packet. A packet of any kind may carry member records.
type PacketKind uint8

// The kinds of packets.
const (
	// PacketHello asks the member at an address to answer, and so to prove its session. To may be
	// empty, because the sender may not know that member's name. The receiver answers whatever the
	// session of the sender is.
	PacketHello   PacketKind = 1 + iota
	PacketPing               // asks the receiver to answer
	PacketAck                // answers a request; if Target is set, relays the answer of Target
	PacketPingReq            // asks the receiver to ping Target and to relay its answer
	PacketNack               // answers a PacketPingReq to say that Target did not answer
	PacketGossip             // carries records, without a request or an answer
	PacketSync               // carries a part of the sender's table, and no queued updates
	packetKindEnd
)

// A Packet is one datagram from one member to another.
type Packet struct {
	Kind         PacketKind
	WantTable    bool   // the sender asks for the receiver's table
	TableSettled bool   // the sender's table has not changed for two intervals
	To           string // the receiver's name; may be empty in a PacketHello
	From         string // the sender's name
	Target       string // the member to ping; in PacketPingReq, PacketNack and a relayed PacketAck
	Session      uint64 // the sender's session
	Digest       uint64 // digest of the sender's table
	RequestID    uint64 // random; if not 0, the receiver answers, and repeats it in ReplyTo
	ReplyTo      uint64 // if not 0, the RequestID of the packet that this packet answers
	Buckets      uint16 // highest slot that the sender has ever heard of, plus one
	Records      []MemberRecord
}

// Flags in the second byte of a packet.
const (
	flagWantTable = 1
	flagSettled   = 2
)

// AppendPacketHeader appends the encoding of p, without p.Records, to b. The caller appends the
// records with AppendMember; they follow until the end of the packet.
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
