package main

// The wire format of gossip: packets and records of members, before they are sealed and after
// they are opened. A packet that decodes encodes to the same bytes. Every length has a limit,
// checked before anything is kept. Pure.

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Limits of what is said. A packet of MaxPacket bytes fits the MTU of a
// WireGuard tunnel over IPv6 (1280 − 20 − 8 and some to spare).
const (
	MaxPacket   = 1200 // bytes of UDP payload, sealed
	MaxName     = 64   // bytes of a member's name
	MaxAddr     = 128  // bytes of an address, and of a URL
	MaxAccusers = 4    // that a suspicion lists: more shorten it no further
	SlotLimit   = 4096 // slots are below this, and buckets at most this
	NoSlot      = 1<<16 - 1
)

// PacketKind says what a packet wants. Of each, the records that it may carry besides
// are news.
type PacketKind uint8

// The kinds. Ask and Answer are the packet's fields.
const (
	// PacketHello asks whoever is at an address (To may be empty) to answer and so
	// prove itself. It is answered whatever its sender's session.
	PacketHello PacketKind = 1 + iota
	PacketPing             // asks the member To to answer
	PacketAck              // answers; with Target, it passes on that Target answered
	PacketRelay            // asks To to ping Target and to pass its answer on
	PacketNack             // answers a Relay: Target did not answer
	PacketNews             // only news
	PacketSync             // a part of the sender's table, not news
	kindEnd
)

// A Packet is what one member says to one other.
type Packet struct {
	Kind    PacketKind
	Want    bool // send me your table
	Settled bool // the sender's table has not changed for two probe intervals
	To      string
	From    string
	Target  string // for Relay, Nack and an Ack that was passed on
	Session uint64 // of the sender
	Digest  uint64 // of the sender's table
	Ask     uint64 // random; not 0: answer with this
	Answer  uint64 // not 0: the Ask that this answers
	Buckets uint16 // most that the sender knows of; see Record.Slot
	Records []MemberRecord
}

// MemberState is what is thought of a member, in the order in which it is believed.
type MemberState uint8

// The states. Alive and Suspect members are live: they take part in the ring.
const (
	StateAlive MemberState = iota
	StateSuspect
	StateDead
	StateLeft
	stateEnd
)

func (s MemberState) String() string {
	return [...]string{"alive", "suspect", "dead", "left"}[s]
}

// IsLive tells whether a member in this state takes part.
func (s MemberState) IsLive() bool { return s <= StateSuspect }

// A MemberRecord is what is said of one member. Of two about one name the one with
// the higher (Session, Incarnation, State) is believed. Addr, URL and what
// follows them are the member's own words: they change only together with its
// incarnation.
type MemberRecord struct {
	Name        string
	Session     uint64 // grows whenever the member starts
	Incarnation uint32 // grows whenever it contradicts a suspicion or changes its words
	State       MemberState
	Accusers    []uint64 // NameHash of who suspects it; only while Suspect
	Age         uint32   // seconds since it died or left; only then

	Addr        string // host:port, UDP and TCP
	URL         string // of its internal listener, for /sd; may be empty
	Slot        uint16 // on the ring, or NoSlot
	Lamport     uint64 // number of its claim to the slot
	Provisional bool   // claimed while the seeds were out of reach
	Leaving     bool   // it keeps its slot, but wants no keys any more
	KeyID       uint32 // of the key it seals with
}

// NameHash is 64-bit FNV-1a.
func NameHash(name string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(name) {
		h = (h ^ uint64(name[i])) * 1099511628211
	}
	return h
}

// Errors of Decode.
var (
	errShortPacket = errors.New("packet ends early")
	errPacketField = errors.New("packet has a field that no member sends")
)

// CheckMemberName tells whether name may name a member; the error says the rule.
func CheckMemberName(name string) error {
	if !validWord(name, MaxName) || name == "" {
		return fmt.Errorf("not a member's name: want 1 to %d visible ASCII characters", MaxName)
	}
	return nil
}

// CheckMemberAddr does the same for an address or URL.
func CheckMemberAddr(addr string) error {
	if !validWord(addr, MaxAddr) || addr == "" {
		return fmt.Errorf("not an address to tell peers: want 1 to %d visible ASCII characters", MaxAddr)
	}
	return nil
}

func validWord(s string, max int) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return len(s) <= max
}

// flags of a packet and of a record
const (
	flagWant    = 1
	flagSettled = 2

	flagProvisional = 1
	flagLeaving     = 2
)

// AppendHeader appends all of p but its records, which follow by AppendMember
// up to the packet's end.
func AppendHeader(b []byte, p *Packet) []byte {
	var flags byte
	if p.Want {
		flags |= flagWant
	}
	if p.Settled {
		flags |= flagSettled
	}
	b = append(b, byte(p.Kind), flags)
	b = appendWord(b, p.To)
	b = appendWord(b, p.From)
	b = appendWord(b, p.Target)
	b = binary.BigEndian.AppendUint64(b, p.Session)
	b = binary.BigEndian.AppendUint64(b, p.Digest)
	b = binary.BigEndian.AppendUint64(b, p.Ask)
	b = binary.BigEndian.AppendUint64(b, p.Answer)
	return binary.BigEndian.AppendUint16(b, p.Buckets)
}

// AppendMember appends r, at most 384 bytes.
func AppendMember(b []byte, r *MemberRecord) []byte {
	var flags byte
	if r.Provisional {
		flags |= flagProvisional
	}
	if r.Leaving {
		flags |= flagLeaving
	}
	b = append(b, byte(r.State), flags)
	b = appendWord(b, r.Name)
	b = binary.BigEndian.AppendUint64(b, r.Session)
	b = binary.BigEndian.AppendUint32(b, r.Incarnation)
	switch r.State {
	case StateSuspect:
		b = append(b, byte(len(r.Accusers)))
		for _, a := range r.Accusers {
			b = binary.BigEndian.AppendUint64(b, a)
		}
	case StateDead, StateLeft:
		b = binary.BigEndian.AppendUint32(b, r.Age)
	}
	b = appendWord(b, r.Addr)
	b = appendWord(b, r.URL)
	b = binary.BigEndian.AppendUint16(b, r.Slot)
	b = binary.BigEndian.AppendUint64(b, r.Lamport)
	return binary.BigEndian.AppendUint32(b, r.KeyID)
}

func appendWord(b []byte, s string) []byte {
	return append(append(b, byte(len(s))), s...)
}

// DecodePacket reads an opened packet into p, whose Records it reuses. On an
// error p holds nothing to be used. b is not kept.
func DecodePacket(b []byte, p *Packet) error {
	d := decoder{b: b}
	kind, flags := PacketKind(d.byte()), d.byte()
	*p = Packet{
		Kind: kind, Want: flags&flagWant != 0, Settled: flags&flagSettled != 0,
		To: d.word(MaxName), From: d.word(MaxName), Target: d.word(MaxName),
		Session: d.uint64(), Digest: d.uint64(), Ask: d.uint64(), Answer: d.uint64(), Buckets: d.uint16(),
		Records: p.Records[:0],
	}
	d.must(kind > 0 && kind < kindEnd && flags <= flagWant|flagSettled)
	d.must(p.From != "" && (p.To != "" || kind == PacketHello) && p.Buckets <= SlotLimit)
	for d.err == nil && len(d.b) > 0 {
		p.Records = append(p.Records, d.record())
	}
	return d.err
}

func (d *decoder) record() MemberRecord {
	state, flags := MemberState(d.byte()), d.byte()
	r := MemberRecord{
		State: state, Provisional: flags&flagProvisional != 0, Leaving: flags&flagLeaving != 0,
		Name: d.word(MaxName), Session: d.uint64(), Incarnation: d.uint32(),
	}
	switch state {
	case StateSuspect:
		n := int(d.byte())
		d.must(n > 0 && n <= MaxAccusers)
		for ; n > 0 && d.err == nil; n-- {
			r.Accusers = append(r.Accusers, d.uint64())
		}
	case StateDead, StateLeft:
		r.Age = d.uint32()
	}
	r.Addr, r.URL = d.word(MaxAddr), d.word(MaxAddr)
	r.Slot, r.Lamport, r.KeyID = d.uint16(), d.uint64(), d.uint32()
	d.must(state < stateEnd && flags <= flagProvisional|flagLeaving && r.Name != "" && r.Addr != "")
	d.must(r.Slot < SlotLimit || r.Slot == NoSlot)
	return r
}

// A decoder takes fields from the front of b. After its first error it gives
// zeroes.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) must(ok bool) {
	if !ok && d.err == nil {
		d.err = errPacketField
	}
}

// take returns the next n bytes, or on an error zeroes; n is at most 255.
func (d *decoder) take(n int) []byte {
	if d.err == nil && len(d.b) < n {
		d.err = errShortPacket
	}
	if d.err != nil {
		return make([]byte, n)
	}
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

func (d *decoder) byte() byte     { return d.take(1)[0] }
func (d *decoder) uint16() uint16 { return binary.BigEndian.Uint16(d.take(2)) }
func (d *decoder) uint32() uint32 { return binary.BigEndian.Uint32(d.take(4)) }
func (d *decoder) uint64() uint64 { return binary.BigEndian.Uint64(d.take(8)) }

func (d *decoder) word(max int) string {
	s := string(d.take(int(d.byte())))
	if d.err == nil {
		d.must(validWord(s, max))
	}
	return s
}
