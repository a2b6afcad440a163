package main

// Tests of pending requests: which packets answer a request, and that their number is bounded.

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// A request is answered only by a packet that repeats the request's ID. The packet must be a
// PacketAck of the asked member, or an answer of a relay that names the asked member as its target.
// A PacketAck of any member answers a request that names no member.
func TestAnsweredBy(t *testing.T) {
	var p pendingRequests
	rng := rand.New(rand.NewPCG(1, 0))
	direct := p.addIfRoom(1, rng, pendingRequest{purpose: requestProbe, name: "b", relays: []string{"c"}})
	anyone := p.addIfRoom(2, rng, pendingRequest{purpose: requestJoin})
	for about, c := range map[string]struct {
		packet Packet
		want   *pendingRequest
	}{
		"ack of the asked member":                  {Packet{Kind: PacketAck, From: "b", ReplyTo: direct.id}, direct},
		"ack of another member":                    {Packet{Kind: PacketAck, From: "c", ReplyTo: direct.id}, nil},
		"ack of a relay":                           {Packet{Kind: PacketAck, From: "c", Target: "b", ReplyTo: direct.id}, direct},
		"ack of a relay for another member":        {Packet{Kind: PacketAck, From: "c", Target: "d", ReplyTo: direct.id}, nil},
		"relayed ack of a member that is no relay": {Packet{Kind: PacketAck, From: "d", Target: "b", ReplyTo: direct.id}, nil},
		"nack of a relay":                          {Packet{Kind: PacketNack, From: "c", Target: "b", ReplyTo: direct.id}, direct},
		"nack of the asked member":                 {Packet{Kind: PacketNack, From: "b", ReplyTo: direct.id}, nil},
		"ping of the asked member":                 {Packet{Kind: PacketPing, From: "b", ReplyTo: direct.id}, nil},
		"gossip of a relay":                        {Packet{Kind: PacketGossip, From: "c", Target: "b", ReplyTo: direct.id}, nil},
		"ack to a request that any may answer":     {Packet{Kind: PacketAck, From: "x", ReplyTo: anyone.id}, anyone},
		"relayed ack to that request":              {Packet{Kind: PacketAck, From: "c", Target: "b", ReplyTo: anyone.id}, nil},
		"ack without an ID":                        {Packet{Kind: PacketAck, From: "b"}, nil},
		"ack with an unknown ID":                   {Packet{Kind: PacketAck, From: "b", ReplyTo: direct.id + 1}, nil},
	} {
		if got := p.answeredBy(&c.packet); got != c.want {
			t.Errorf("%s: answers %+v, want %+v", about, got, c.want)
		}
	}
}

// A pending request is found by its purpose and its member name until it is removed.
func TestPendingRequests(t *testing.T) {
	var p pendingRequests
	rng := rand.New(rand.NewPCG(1, 0))
	r := p.addIfRoom(1, rng, pendingRequest{purpose: requestProbe, name: "b"})
	p.addIfRoom(2, rng, pendingRequest{purpose: requestJoin})
	if p.find(requestProbe, "b") != r || p.find(requestIndirect, "b") != nil || p.find(requestProbe, "c") != nil {
		t.Error("find does not return exactly the request with the purpose and the name")
	}
	p.remove(r)
	if p.find(requestProbe, "b") != nil || p.answeredBy(&Packet{Kind: PacketAck, From: "b", ReplyTo: r.id}) != nil || len(p) != 1 {
		t.Error("a removed request is still pending, or another request was removed")
	}
}

// Each pending request has its own ID, which is not 0. No challenge is added when
// maxPendingChallenges requests are pending, and no other request when maxPendingRequests are.
func TestPendingRequestsBounded(t *testing.T) {
	var p pendingRequests
	rng := rand.New(rand.NewPCG(1, 0))
	ids := map[uint64]bool{0: true}
	for i := range maxPendingRequests {
		purpose := requestChallenge
		if i >= maxPendingChallenges {
			if p.addIfRoom(3, rng, pendingRequest{purpose: requestChallenge}) != nil {
				t.Fatalf("a challenge is added to %d pending requests", i)
			}
			purpose = requestProbe
		}
		r := p.addIfRoom(3, rng, pendingRequest{purpose: purpose, name: fmt.Sprint(i)})
		if r == nil || r.sentAt != 3 || ids[r.id] {
			t.Fatalf("request %d is %+v, want a new ID and sentAt 3", i, r)
		}
		ids[r.id] = true
	}
	if p.addIfRoom(3, rng, pendingRequest{}) != nil || len(p) != maxPendingRequests {
		t.Errorf("got %d pending requests, want at most %d", len(p), maxPendingRequests)
	}
}
