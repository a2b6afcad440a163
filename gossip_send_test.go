package main

// Tests of sending: syncs of a large table, and which answers do not count updates as passed on.

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// A sync of a large table has at most maxSyncPackets packets, and a member sends at most one sync
// per interval to another member. Repeated syncs together send every record of the table.
func TestSwimSyncsLargeTable(t *testing.T) {
	s := joinedSim(t, 2, testSeed(t, 1))
	a, b := s.nodes[0], s.nodes[1]
	long := strings.Repeat("x", MaxMemberAddr)
	for i := range MaxMembers - 2 {
		if a.swim.table.Merge(a.swim.now, MemberRecord{Name: fmt.Sprintf("%060d", i), Session: 1, Addr: long, URL: long, Slot: NoSlot}) == nil {
			t.Fatalf("the table refuses member %d", i)
		}
	}
	askForTable := func() []Datagram {
		return s.deliver(0, b.addr, s.seal(1, Packet{Kind: PacketGossip, To: a.name, WantTable: true}))
	}
	sent := map[string]bool{}
	for range 2 * MaxMembers * 400 / maxSyncPackets / maxPlainPacket {
		s.now += s.interval
		out := askForTable()
		if len(out) > maxSyncPackets {
			t.Fatalf("got %d packets in one sync, want at most %d", len(out), maxSyncPackets)
		}
		for _, d := range out {
			for _, r := range s.decode(0, d.Data).Records {
				sent[r.Name] = true
			}
		}
		if out := askForTable(); len(out) > 0 {
			t.Fatalf("got %d packets in a second sync in the same interval, want none", len(out))
		}
	}
	if len(sent) != MaxMembers {
		t.Errorf("the syncs contained %d members, want %d", len(sent), MaxMembers)
	}
}

// When a member answers a replayed PacketHello of an earlier session, no queued update counts as
// passed on. The answer is at most twice as long as the replayed packet.
func TestSwimUpdatesSurviveReplays(t *testing.T) {
	s := newSim(t, 3, testSeed(t, 1))
	var hello []byte
	s.lastTo(2, 0, PacketHello, &hello)
	s.startAll()
	s.until(10*time.Second, "all join", s.agree)
	s.restart(2)
	s.tap = nil
	s.until(10*time.Second, "node 2 joins again", s.agree)
	s.run(5 * time.Second)
	a := s.nodes[0].swim
	a.AnnounceClaim(1, 1, false)
	for range 100 {
		if out := s.deliver(0, strangerAddr, hello); len(out) != 1 || len(out[0].Data) > 2*len(hello) {
			t.Fatalf("got %d answers to a packet of %d bytes, want one of at most twice that length", len(out), len(hello))
		}
	}
	if !a.table.HasUpdates() {
		t.Error("the update is no longer queued, because answers to replays counted as transmissions")
	}
}
