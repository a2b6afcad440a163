package main

// Tests of the table of members: which of two records it keeps, its limits, and how it forgets
// members that left.

import (
	"fmt"
	"testing"
	"time"
)

// A full table makes room for a new member by evicting the member that has been dead longest. It
// refuses a new member if all of its members are live.
func TestTableBounded(t *testing.T) {
	var table MemberTable
	for i := range MaxMembers {
		if table.Merge(0, MemberRecord{Name: fmt.Sprint(i), Addr: "a:1", State: []MemberState{StateAlive, StateDead}[i/(MaxMembers-2)], Age: uint32(i)}) == nil {
			t.Fatalf("the table refuses member %d", i)
		}
	}
	if table.Merge(0, MemberRecord{Name: "x", Addr: "a:1"}) == nil || table.Get(fmt.Sprint(MaxMembers-1)) != nil || len(table.Members) != MaxMembers {
		t.Error("the table did not evict the member that has been dead longest")
	}
	if table.Merge(0, MemberRecord{Name: "y", Addr: "a:1"}) == nil || table.Merge(0, MemberRecord{Name: "z", Addr: "a:1"}) != nil {
		t.Error("the table did not evict its last dead member, or holds more than MaxMembers")
	}
	var digest uint64
	for _, m := range table.Members {
		digest ^= m.stableDigest()
	}
	if digest != table.Digest {
		t.Error("the digest is not the XOR of the digests of all records")
	}
}

// A table refuses the record of an unknown member that left at least half of tombstoneLife ago,
// because syncs no longer contain such a record.
func TestTableRefusesOldTombstone(t *testing.T) {
	var table MemberTable
	if table.Merge(0, MemberRecord{Name: "a", State: StateLeft, Age: uint32(tombstoneLife / 2 / time.Second)}) != nil {
		t.Error("the table accepts an old tombstone of a member that it does not know")
	}
}

// A table accepts the newer of two records of a member and ignores the older one.
func TestTableOrder(t *testing.T) {
	at := func(session uint64, incarnation uint32, state MemberState) MemberRecord {
		r := MemberRecord{Name: "a", Addr: "a:1", Session: session, Incarnation: incarnation, State: state}
		if state == StateSuspect {
			r.Accusers = []uint64{session}
		}
		return r
	}
	for _, c := range []struct {
		known, received MemberRecord
		want            bool
	}{
		{at(1, 1, StateAlive), at(1, 1, StateAlive), false},
		{at(1, 1, StateAlive), at(1, 2, StateAlive), true},
		{at(1, 2, StateAlive), at(1, 1, StateDead), false},
		{at(1, 1, StateAlive), at(1, 1, StateSuspect), true},
		{at(1, 1, StateSuspect), at(1, 1, StateAlive), false},
		{at(1, 1, StateSuspect), at(1, 1, StateSuspect), false},
		{at(1, 1, StateSuspect), at(1, 2, StateAlive), true},
		{at(1, 1, StateSuspect), at(1, 1, StateDead), true},
		{at(1, 1, StateDead), at(1, 1, StateSuspect), false},
		{at(1, 1, StateDead), at(1, 2, StateAlive), true},
		{at(1, 5, StateAlive), at(1, 1, StateLeft), true},
		{at(1, 1, StateLeft), at(1, 9, StateAlive), false},
		{at(1, 1, StateLeft), at(2, 0, StateAlive), true},
		{at(2, 0, StateAlive), at(1, 9, StateLeft), false},
		{at(1, 9, StateAlive), at(2, 0, StateDead), true},
	} {
		var table MemberTable
		table.Merge(0, c.known)
		if got := table.Merge(0, c.received) != nil; got != c.want {
			t.Errorf("record %v after %v: merged %v, want %v", c.received, c.known, got, c.want)
		}
	}
}

// If a table merges several records with the same suspicion, the member's record gets their
// accusers, up to MaxAccusers, in the order in which the table received them.
func TestTableMergesAccusers(t *testing.T) {
	suspicion := func(accusers ...uint64) MemberRecord {
		return MemberRecord{Name: "a", Addr: "a:1", Session: 1, Incarnation: 1, State: StateSuspect, Accusers: accusers}
	}
	var table MemberTable
	table.Merge(0, suspicion(1))
	for i := range uint64(9) {
		table.Merge(0, suspicion(i, 1))
	}
	if got := table.Get("a").Accusers; len(got) != MaxAccusers || got[0] != 1 || got[1] != 0 {
		t.Errorf("got accusers %v, want %d that begin with 1 and 0", got, MaxAccusers)
	}
}

// A tombstone is the record of a member that left. When half of tombstoneLife has passed since the
// leave, all members take the tombstone out of their digests and syncs, even if they learned of the
// leave at different times. When tombstoneLife has passed, they forget the member. They do not
// forget a member that died.
func TestSwimTombstones(t *testing.T) {
	s := newSim(t, 4, testSeed(t, 1))
	s.interval = time.Minute // a long interval, so that simulating days takes few events
	s.startAll()
	s.until(10*time.Minute, "all join", s.agree)
	s.nodes[3].swim.Leave()
	s.arm(3)
	s.run(5 * time.Minute)
	s.kill(3)
	s.kill(2)
	s.run(tombstoneLife/2 - 2*time.Hour)
	s.restart(1) // node 1 learns of the leave again, now from a tombstone almost half of tombstoneLife old
	s.run(time.Hour)
	known := func(i int) *Member { return s.nodes[i].swim.table.Get("node-003") }
	if known(0) == nil || known(1) == nil || known(1).State != StateLeft {
		t.Fatal("a member that restarts does not learn of the tombstone")
	}
	s.run(2 * time.Hour)
	sent := s.sent
	s.run(time.Hour)
	if known(0) == nil || s.nodes[0].swim.table.Digest != s.nodes[1].swim.table.Digest || s.sent-sent > 60*2*4 {
		t.Errorf("after half of the tombstone's life the digests differ, or %d packets in an hour are too many", s.sent-sent)
	}
	s.restart(1)
	s.run(time.Hour)
	if known(1) != nil || s.nodes[0].swim.table.Digest != s.nodes[1].swim.table.Digest {
		t.Error("a member that restarts learns of a tombstone that is past half of its life")
	}
	s.run(tombstoneLife / 2)
	if known(0) != nil {
		t.Error("the tombstone is not forgotten at the end of its life")
	}
	if m := s.nodes[0].swim.table.Get("node-002"); m == nil || m.State != StateDead {
		t.Error("a dead member is forgotten, so that no member tries to reach it")
	}
}
