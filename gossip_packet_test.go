package main

// Tests of the wire format of gossip packets: decoding the encoding of a packet gives the same
// packet, encoding a decoded packet gives the same bytes, and a packet with two long records fits
// MaxPacket.

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

// longestPacket returns a packet with the longest names and two records: the longest record, and a
// record without a URL.
func longestPacket() Packet {
	name, addr := strings.Repeat("n", MaxMemberName), strings.Repeat("a", MaxMemberAddr)
	return Packet{
		Kind: PacketPingReq, WantTable: true, TableSettled: true, To: name, From: name, Target: name,
		Session: 1 << 63, Digest: 2, RequestID: 3, ReplyTo: 4, Buckets: MaxSlots,
		Records: []MemberRecord{
			{Name: name, Session: 1 << 62, Incarnation: 1 << 31, State: StateSuspect, Accusers: []uint64{1, 2, 3, 4},
				Addr: addr, URL: addr, Slot: MaxSlots - 1, Lamport: 1 << 61, Provisional: true, Leaving: true, KeyID: 1 << 30},
			{Name: name, State: StateLeft, Age: 1 << 31, Addr: addr, Slot: NoSlot},
		},
	}
}

// encodePacket returns the encoding of p with its records, not sealed.
func encodePacket(p Packet) []byte {
	b := AppendPacketHeader(nil, &p)
	for i := range p.Records {
		b = AppendMember(b, &p.Records[i])
	}
	return b
}

// Decoding the encoding of a packet gives the same packet. Bytes that end within the packet's
// header do not decode.
func TestPacket(t *testing.T) {
	for _, want := range []Packet{
		longestPacket(),
		{Kind: PacketHello, From: "a", Records: []MemberRecord{}},
		{Kind: PacketPing, To: "b", From: "a", Session: 1, RequestID: 2, Records: []MemberRecord{{Name: "a", Addr: "[::1]:9006", State: StateDead, Age: 3}}},
	} {
		b := encodePacket(want)
		var got Packet
		if err := DecodePacket(b, &got); err != nil || !reflect.DeepEqual(withoutEmptyRecords(got), withoutEmptyRecords(want)) {
			t.Errorf("got %+v and error %v, want %+v", got, err, want)
		}
		for i := range b {
			if DecodePacket(b[:i], &got) == nil && i < len(AppendPacketHeader(nil, &want)) {
				t.Errorf("packet %+v decodes from its first %d bytes", want, i)
			}
		}
	}
}

// A sealed packet with the longest record and the record of a left member without a URL fits
// MaxPacket. The longest record has maxRecord bytes.
func TestPacketSizes(t *testing.T) {
	p := longestPacket()
	if n := len(encodePacket(p)) + SealOverhead; n > MaxPacket {
		t.Errorf("packet with two of the longest records: got %d bytes, want at most %d", n, MaxPacket)
	}
	if n := len(AppendMember(nil, &p.Records[0])); n != maxRecord {
		t.Errorf("longest record: got %d bytes, want %d", n, maxRecord)
	}
}

// withoutEmptyRecords returns p with nil records instead of an empty slice of records, because
// reflect.DeepEqual distinguishes the two.
func withoutEmptyRecords(p Packet) Packet {
	if len(p.Records) == 0 {
		p.Records = nil
	}
	return p
}

// DecodePacket refuses each of the packets listed below, and a packet with the unknown flag 0x80.
func TestPacketRefused(t *testing.T) {
	good := func() Packet {
		return Packet{Kind: PacketPing, To: "b", From: "a", Records: []MemberRecord{{Name: "c", Addr: "d:1"}}}
	}
	for about, spoil := range map[string]func(p *Packet){
		"kind 0":                        func(p *Packet) { p.Kind = 0 },
		"unknown kind":                  func(p *Packet) { p.Kind = packetKindEnd },
		"no sender":                     func(p *Packet) { p.From = "" },
		"no receiver":                   func(p *Packet) { p.To = "" },
		"sender's name too long":        func(p *Packet) { p.From = strings.Repeat("x", MaxMemberName+1) },
		"line end in the sender's name": func(p *Packet) { p.From = "a\n" },
		"too many buckets":              func(p *Packet) { p.Buckets = MaxSlots + 1 },
		"slot too high":                 func(p *Packet) { p.Records[0].Slot = MaxSlots },
		"unknown state":                 func(p *Packet) { p.Records[0].State = memberStateEnd },
		"suspicion without an accuser":  func(p *Packet) { p.Records[0].State = StateSuspect },
		"suspicion with too many accusers": func(p *Packet) {
			p.Records[0].State, p.Records[0].Accusers = StateSuspect, make([]uint64, MaxAccusers+1)
		},
		"record without a name":     func(p *Packet) { p.Records[0].Name = "" },
		"record without an address": func(p *Packet) { p.Records[0].Addr = "" },
		"address too long":          func(p *Packet) { p.Records[0].Addr = strings.Repeat("x", MaxMemberAddr+1) },
		"URL too long":              func(p *Packet) { p.Records[0].URL = strings.Repeat("x", MaxMemberAddr+1) },
	} {
		p := good()
		spoil(&p)
		if err := DecodePacket(encodePacket(p), &Packet{}); err == nil {
			t.Errorf("%s: the packet decodes", about)
		}
	}
	// The two places are the flags of the packet and the flags of its record.
	for _, at := range []int{1, len(AppendPacketHeader(nil, &Packet{To: "b", From: "a"})) + 1} {
		b := encodePacket(good())
		b[at] = 0x80
		if DecodePacket(b, &Packet{}) == nil {
			t.Errorf("the packet decodes with an unknown flag in byte %d", at)
		}
	}
}

// If bytes decode to a packet, encoding that packet gives the same bytes.
func FuzzDecodePacket(f *testing.F) {
	f.Add(encodePacket(longestPacket()))
	f.Add(encodePacket(Packet{Kind: PacketHello, From: "a"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p Packet
		if DecodePacket(b, &p) != nil {
			return
		}
		if again := encodePacket(p); !bytes.Equal(again, b) {
			t.Errorf("%x decodes, but encodes to %x", b, again)
		}
	})
}
