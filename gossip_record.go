package main

// The record of a member, which packets carry: its fields, and their form on the wire. A record
// that decodes encodes to the same bytes. A new field is set where a member makes its own record
// (NewSwim, announceSelf), and shown by server_ring.go. Pure.

import (
	"encoding/binary"
	"fmt"
)

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

// CheckMemberAddrText does the same for an address or URL.
func CheckMemberAddrText(addr string) error {
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

// Flags of a record.
const (
	flagProvisional = 1
	flagLeaving     = 2
)

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
