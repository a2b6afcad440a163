package main

// Tests of the wire format: what is encoded decodes to the same, whatever decodes encodes to the
// same bytes, and the largest packets fit.

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

// longestPacket has every field as long as it may be.
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

func encodePacket(p Packet) []byte {
	b := AppendPacketHeader(nil, &p)
	for i := range p.Records {
		b = AppendMember(b, &p.Records[i])
	}
	return b
}

func TestPacket(t *testing.T) {
	for _, want := range []Packet{
		longestPacket(),
		{Kind: PacketHello, From: "a", Records: []MemberRecord{}},
		{Kind: PacketPing, To: "b", From: "a", Session: 1, RequestID: 2, Records: []MemberRecord{{Name: "a", Addr: "[::1]:9006", State: StateDead, Age: 3}}},
	} {
		b := encodePacket(want)
		var got Packet
		if err := DecodePacket(b, &got); err != nil || !reflect.DeepEqual(withoutEmptyRecords(got), withoutEmptyRecords(want)) {
			t.Errorf("got %+v, %v, want %+v", got, err, want)
		}
		for i := range b {
			if DecodePacket(b[:i], &got) == nil && i < len(AppendPacketHeader(nil, &want)) {
				t.Errorf("%+v: decodes from its first %d bytes", want, i)
			}
		}
	}
	p := longestPacket()
	if n := len(encodePacket(p)) + SealOverhead; n > MaxPacket {
		t.Errorf("two of the longest records make a packet of %d bytes", n)
	}
	if n := len(AppendMember(nil, &p.Records[0])); n != maxRecord {
		t.Errorf("the longest record has %d bytes", n)
	}
}

// withoutEmptyRecords makes equal what is equal to a receiver.
func withoutEmptyRecords(p Packet) Packet {
	if len(p.Records) == 0 {
		p.Records = nil
	}
	return p
}

func TestPacketRefused(t *testing.T) {
	good := func() Packet {
		return Packet{Kind: PacketPing, To: "b", From: "a", Records: []MemberRecord{{Name: "c", Addr: "d:1"}}}
	}
	for about, spoil := range map[string]func(p *Packet){
		"kind 0":              func(p *Packet) { p.Kind = 0 },
		"unknown kind":        func(p *Packet) { p.Kind = packetKindEnd },
		"no sender":           func(p *Packet) { p.From = "" },
		"no recipient":        func(p *Packet) { p.To = "" },
		"long name":           func(p *Packet) { p.From = strings.Repeat("x", MaxMemberName+1) },
		"line end in a name":  func(p *Packet) { p.From = "a\n" },
		"buckets":             func(p *Packet) { p.Buckets = MaxSlots + 1 },
		"slot":                func(p *Packet) { p.Records[0].Slot = MaxSlots },
		"unknown state":       func(p *Packet) { p.Records[0].State = memberStateEnd },
		"suspected by nobody": func(p *Packet) { p.Records[0].State = StateSuspect },
		"suspected by many": func(p *Packet) {
			p.Records[0].State, p.Records[0].Accusers = StateSuspect, make([]uint64, MaxAccusers+1)
		},
		"record without name":    func(p *Packet) { p.Records[0].Name = "" },
		"record without address": func(p *Packet) { p.Records[0].Addr = "" },
		"long address":           func(p *Packet) { p.Records[0].Addr = strings.Repeat("x", MaxMemberAddr+1) },
		"long URL":               func(p *Packet) { p.Records[0].URL = strings.Repeat("x", MaxMemberAddr+1) },
	} {
		p := good()
		spoil(&p)
		if err := DecodePacket(encodePacket(p), &Packet{}); err == nil {
			t.Errorf("%s: decodes", about)
		}
	}
	for _, at := range []int{1, len(AppendPacketHeader(nil, &Packet{To: "b", From: "a"})) + 1} { // flags
		b := encodePacket(good())
		b[at] = 0x80
		if DecodePacket(b, &Packet{}) == nil {
			t.Errorf("unknown flag at %d: decodes", at)
		}
	}
	for name, ok := range map[string]bool{"a": true, "site-7.example:9": true, "": false, "a b": false, "é": false,
		strings.Repeat("x", MaxMemberName): true, strings.Repeat("x", MaxMemberName+1): false} {
		if err := CheckMemberName(name); (err == nil) != ok {
			t.Errorf("CheckMemberName(%q) is %v", name, err)
		}
	}
	if CheckMemberAddrText("host:1") != nil || CheckMemberAddrText("") == nil || CheckMemberAddrText(strings.Repeat("x", MaxMemberAddr+1)) == nil {
		t.Error("CheckMemberAddr")
	}
}

func FuzzDecodePacket(f *testing.F) {
	f.Add(encodePacket(longestPacket()))
	f.Add(encodePacket(Packet{Kind: PacketHello, From: "a"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p Packet
		if DecodePacket(b, &p) != nil {
			return
		}
		if again := encodePacket(p); !bytes.Equal(again, b) {
			t.Errorf("%x decodes and encodes to %x", b, again)
		}
	})
}
