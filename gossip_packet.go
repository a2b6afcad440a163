package main

// The wire format of gossip: packets and records of members, before they are sealed and after
// they are opened. A packet that decodes encodes to the same bytes. Every length has a limit,
// which is checked before anything is kept. Pure.

import (
	"encoding/binary"
	"fmt"
)

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

// MemberState is the state of a member as another sees it. Of two states in one incarnation the
// higher one is believed.
type MemberState uint8

// The states. Alive and suspect members are live: they take part in the ring.
const (
	StateAlive MemberState = iota
	StateSuspect
	StateDead
	StateLeft
	memberStateEnd
)

func (s MemberState) String() string {
	return [...]string{"alive", "suspect", "dead", "left"}[s]
}

// IsLive tells whether a member in this state takes part in the ring.
func (s MemberState) IsLive() bool { return s <= StateSuspect }

// A MemberRecord is the state of one member as it is passed on. Of two records of one member the
// one with the higher (Session, Incarnation, State) is believed; see supersedes. Addr, URL and
// the fields below them come from the member itself: they change only together with its
// incarnation. A record has no version of its own: whoever adds a field raises sealVersion, and
// members of different versions then refuse each other in words.
type MemberRecord struct {
	Name        string
	Session     uint64 // grows whenever the member starts
	Incarnation uint32 // grows whenever the member refutes a suspicion or changes its record
	State       MemberState
	Accusers    []uint64 // hashes of the names of the members that suspect it; only if suspect
	Age         uint32   // seconds since it died or left; only if dead or left

	Addr        string // host:port, UDP and TCP
	URL         string // of its internal listener, for /sd; may be empty
	Slot        uint16 // on the ring, or NoSlot
	Lamport     uint64 // number of its claim to the slot
	Provisional bool   // the slot was claimed while the seeds were out of reach
	Leaving     bool   // it keeps its slot, but wants no keys any more
	KeyID       uint32 // of the key it seals with
}

// CheckMemberName tells whether name may name a member; the error says the rule.
func CheckMemberName(name string) error {
	if !isVisibleASCII(name) || name == "" || len(name) > MaxMemberName {
		return fmt.Errorf("not a member's name: want 1 to %d visible ASCII characters", MaxMemberName)
	}
	return nil
}

// CheckMemberAddr does the same for an address or URL.
func CheckMemberAddr(addr string) error {
	if !isVisibleASCII(addr) || addr == "" || len(addr) > MaxMemberAddr {
		return fmt.Errorf("not an address to tell peers: want 1 to %d visible ASCII characters", MaxMemberAddr)
	}
	return nil
}

func isVisibleASCII(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// Flags of a packet and of a record.
const (
	flagWantTable = 1
	flagSettled   = 2

	flagProvisional = 1
	flagLeaving     = 2
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

// AppendMember appends m, at most maxRecord bytes.
func AppendMember(b []byte, m *MemberRecord) []byte {
	var flags byte
	if m.Provisional {
		flags |= flagProvisional
	}
	if m.Leaving {
		flags |= flagLeaving
	}
	b = append(b, byte(m.State), flags)
	b = AppendShortString(b, m.Name)
	b = binary.LittleEndian.AppendUint64(b, m.Session)
	b = binary.LittleEndian.AppendUint32(b, m.Incarnation)
	switch m.State {
	case StateSuspect:
		b = append(b, byte(len(m.Accusers)))
		for _, a := range m.Accusers {
			b = binary.LittleEndian.AppendUint64(b, a)
		}
	case StateDead, StateLeft:
		b = binary.LittleEndian.AppendUint32(b, m.Age)
	}
	b = AppendShortString(b, m.Addr)
	b = AppendShortString(b, m.URL)
	b = binary.LittleEndian.AppendUint16(b, m.Slot)
	b = binary.LittleEndian.AppendUint64(b, m.Lamport)
	return binary.LittleEndian.AppendUint32(b, m.KeyID)
}

// maxRecord is the size of the longest record: two bytes, five fields of fixed size, three
// strings and the accusers, each behind its length.
const maxRecord = 2 + (8 + 4 + 2 + 8 + 4) + (1 + MaxMemberName) + 2*(1+MaxMemberAddr) + (1 + 8*MaxAccusers)

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

// readMember reads what AppendMember appended.
func readMember(r *WireReader) MemberRecord {
	state, flags := MemberState(r.Byte()), r.Byte()
	m := MemberRecord{
		State: state, Provisional: flags&flagProvisional != 0, Leaving: flags&flagLeaving != 0,
		Name: readVisibleASCII(r, MaxMemberName), Session: r.Uint64(), Incarnation: r.Uint32(),
	}
	switch state {
	case StateSuspect:
		n := int(r.Byte())
		r.Require(n > 0 && n <= MaxAccusers)
		for i := 0; i < n && r.Err() == nil; i++ {
			m.Accusers = append(m.Accusers, r.Uint64())
		}
	case StateDead, StateLeft:
		m.Age = r.Uint32()
	}
	m.Addr, m.URL = readVisibleASCII(r, MaxMemberAddr), readVisibleASCII(r, MaxMemberAddr)
	m.Slot, m.Lamport, m.KeyID = r.Uint16(), r.Uint64(), r.Uint32()
	r.Require(state < memberStateEnd && flags <= flagProvisional|flagLeaving && m.Name != "" && m.Addr != "")
	r.Require(m.Slot < MaxSlots || m.Slot == NoSlot)
	return m
}

// readVisibleASCII reads a string of at most maxLen bytes, which has to be of visible ASCII.
func readVisibleASCII(r *WireReader, maxLen int) string {
	s := r.ShortString(maxLen)
	r.Require(isVisibleASCII(s))
	return s
}
