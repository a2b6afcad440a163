package main

// Tests of requests that wait for an answer: which packets answer one, and that their number is
// bounded.

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

func TestPendingRequests(t *testing.T) {
	var p pendingRequests
	rng := rand.New(rand.NewPCG(1, 0))
	direct := p.addIfRoom(1, rng, pendingRequest{purpose: requestProbe, name: "b", relays: []string{"c"}})
	anyone := p.addIfRoom(2, rng, pendingRequest{purpose: requestJoin})
	for about, c := range map[string]struct {
		packet Packet
		want   *pendingRequest
	}{
		"the member that was asked":     {Packet{Kind: PacketAck, From: "b", ReplyTo: direct.id}, direct},
		"another member":                {Packet{Kind: PacketAck, From: "c", ReplyTo: direct.id}, nil},
		"a relay":                       {Packet{Kind: PacketAck, From: "c", Target: "b", ReplyTo: direct.id}, direct},
		"a relay, for another target":   {Packet{Kind: PacketAck, From: "c", Target: "d", ReplyTo: direct.id}, nil},
		"a member that is no relay":     {Packet{Kind: PacketAck, From: "d", Target: "b", ReplyTo: direct.id}, nil},
		"a relay without an answer":     {Packet{Kind: PacketNack, From: "c", Target: "b", ReplyTo: direct.id}, direct},
		"a nack of the member itself":   {Packet{Kind: PacketNack, From: "b", ReplyTo: direct.id}, nil},
		"not an answer":                 {Packet{Kind: PacketPing, From: "b", ReplyTo: direct.id}, nil},
		"not an answer, of a relay":     {Packet{Kind: PacketGossip, From: "c", Target: "b", ReplyTo: direct.id}, nil},
		"any member, if any was asked":  {Packet{Kind: PacketAck, From: "x", ReplyTo: anyone.id}, anyone},
		"a relay, though any was asked": {Packet{Kind: PacketAck, From: "c", Target: "b", ReplyTo: anyone.id}, nil},
		"nothing":                       {Packet{Kind: PacketAck, From: "b"}, nil},
		"an ID that was never given":    {Packet{Kind: PacketAck, From: "b", ReplyTo: direct.id + 1}, nil},
	} {
		if got := p.answeredBy(&c.packet); got != c.want {
			t.Errorf("%s: answers %+v, want %+v", about, got, c.want)
		}
	}
	if p.find(requestProbe, "b") != direct || p.find(requestIndirect, "b") != nil || p.find(requestProbe, "c") != nil {
		t.Error("a request is not found by its purpose and name, or another one is")
	}
	p.remove(direct)
	if p.find(requestProbe, "b") != nil || p.answeredBy(&Packet{Kind: PacketAck, From: "b", ReplyTo: direct.id}) != nil || len(p) != 1 {
		t.Error("a request that was removed is pending")
	}
	ids := map[uint64]bool{0: true, anyone.id: true}
	for i := range maxPendingRequests - 1 {
		r := p.addIfRoom(3, rng, pendingRequest{purpose: requestChallenge, name: fmt.Sprint(i)})
		if r == nil || r.sentAt != 3 || ids[r.id] {
			t.Fatalf("request %d is %+v", i, r)
		}
		ids[r.id] = true
	}
	if p.addIfRoom(3, rng, pendingRequest{}) != nil || len(p) != maxPendingRequests {
		t.Error("more requests than there may be")
	}
}
