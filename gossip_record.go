package main

// This file defines the record that packets carry about a member, and its wire format. If bytes
// decode to a record, encoding that record gives the same bytes. A new field must be set where a
// member makes its own record (NewSwim and the callers of announceSelf), and must be shown by
// server_ring.go. Pure: no I/O and no clock.

import (
	"encoding/binary"
	"fmt"
)

// A MemberState is the state of a member in another member's view. Of two records with the same
// session and incarnation of a member, the record with the higher state is believed.
type MemberState uint8

// The states of a member. Alive and suspect members are live: they take part in the ring.
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

// IsLive reports whether a member in this state takes part in the ring.
func (s MemberState) IsLive() bool { return s <= StateSuspect }

// A MemberRecord is what members send each other about one member. Of two records of a member, the
// record with the higher session is believed, then the record with the higher incarnation, then the
// record with the higher state; supersedes has an exception for StateLeft. Only the member itself
// sets Addr, URL and the fields below them. It raises its incarnation when it changes them.
//
// A record has no version of its own. Anyone who adds a field must raise sealVersion. Then members
// of different versions refuse each other's packets and log the reason.
type MemberRecord struct {
	Name        string
	Session     uint64 // number of the member's session; higher after each start, unless the member has lost its RestartState
	Incarnation uint32 // raised by the member when it changes Addr, URL or a field below, or must replace a wrong record; may start again in a new session
	State       MemberState
	Accusers    []uint64 // accuserIDs of up to MaxAccusers members that suspect this one; only if State is StateSuspect
	Age         uint32   // seconds since the member died or left; only if State is StateDead or StateLeft

	Addr        string // host:port at which the member is reached, for both UDP and TCP
	URL         string // host:port of the member's internal listener, which /sd lists, after https:// if the listener uses TLS; may be empty
	Slot        uint16 // slot of the ring that the member claims, or NoSlot
	Lamport     uint64 // number of the claim to the slot; see Claim
	Provisional bool   // the member has seeds, but made the claim before it received a table from another member
	Leaving     bool   // the member is about to leave: it keeps its slot, but must own no sites
	KeyID       uint32 // ID of the member's first cluster key; other members seal with it for the member, if they hold it
}

// CheckMemberName returns an error if name is not a valid member name. The error text states which
// names are valid.
func CheckMemberName(name string) error {
	if !isVisibleASCII(name) || name == "" || len(name) > MaxMemberName {
		return fmt.Errorf("not a valid member name: want 1 to %d visible ASCII characters", MaxMemberName)
	}
	return nil
}

// CheckMemberAddrText returns an error if addr has the wrong characters or length for the address
// or URL of a member. It does not parse addr. The error text states which texts are valid.
func CheckMemberAddrText(addr string) error {
	if !isVisibleASCII(addr) || addr == "" || len(addr) > MaxMemberAddr {
		return fmt.Errorf("not a valid member address: want 1 to %d visible ASCII characters", MaxMemberAddr)
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

// Flags in the second byte of a record.
const (
	flagProvisional = 1
	flagLeaving     = 2
)

// AppendMember appends the encoding of m to b. The encoding of a valid record has at most maxRecord
// bytes.
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

// maxRecord is the size of the longest record, in bytes: state and flags, five fields of fixed
// size, three strings with a length byte each, and the accusers with a length byte.
const maxRecord = 2 + (8 + 4 + 2 + 8 + 4) + (1 + MaxMemberName) + 2*(1+MaxMemberAddr) + (1 + 8*MaxAccusers)

// readMember reads a record that AppendMember encoded. If the record is invalid, r.Err() is an
// error afterwards.
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

// readVisibleASCII reads a string of at most maxLen bytes. If the string is longer, or if a byte is
// not visible ASCII, r.Err() is an error afterwards.
func readVisibleASCII(r *WireReader, maxLen int) string {
	s := r.ShortString(maxLen)
	r.Require(isVisibleASCII(s))
	return s
}
