package main

// Tests of claims. Members that have heard the same claims choose different slots. If many members
// start at once, or two rings become one, the members settle on different slots.

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// ChooseClaim follows each of the rules in its documentation, and reports whether the returned
// claim differs from the claim that the member has announced.
func TestChooseClaim(t *testing.T) {
	c := func(name string, slot int, lamport uint64) Claim {
		return Claim{Slot: slot, Lamport: lamport, Name: name}
	}
	prov := func(name string, slot int, lamport uint64) Claim {
		return Claim{Slot: slot, Lamport: lamport, Name: name, Provisional: true}
	}
	type claims = []Claim
	full := make(claims, MaxSlots)
	for i := range full {
		full[i] = c(fmt.Sprint("f", i), i, 1)
	}
	for _, tt := range []struct {
		name           string
		provisional    bool // argument of ChooseClaim for member "me"
		live, reserved claims
		highest        uint64
		want           Claim
	}{
		{"no other member", false, nil, nil, 0, c("me", 0, 1)},
		{"no other member, and no seed answers", true, nil, nil, 0, prov("me", 0, 1)},
		{"a new member claims the lowest free slot with the next number", false, claims{c("a", 0, 4), c("b", 2, 9)}, nil, 3, c("me", 1, 10)},
		{"the highest number is of a forgotten member", false, claims{c("a", 0, 4)}, nil, 70, c("me", 1, 71)},
		{"reserved slots are not claimed", false, claims{c("a", 0, 1)}, claims{c("b", 1, 2), c("d", 2, 3)}, 0, c("me", 3, 4)},
		{"invalid claims reserve no slot", false, claims{c("a", 0, 1)}, claims{c("b", 1, 0), c("d", MaxSlots, 2), c("e", -1, 2)}, 0, c("me", 1, 3)},
		{"the holder of a slot keeps it", false, claims{c("a", 0, 1), c("me", 5, 2)}, claims{c("b", 1, 3)}, 0, c("me", 5, 2)},
		{"the holder keeps its slot although the slot is reserved too", false, claims{c("me", 1, 4)}, claims{c("b", 1, 3)}, 0, c("me", 1, 4)},
		{"the lower number wins", false, claims{c("a", 0, 3), c("me", 0, 2)}, nil, 0, c("me", 0, 2)},
		{"the higher number loses, and its member claims a free slot", false, claims{c("a", 0, 2), c("me", 0, 3)}, nil, 0, c("me", 1, 4)},
		{"equal numbers: the higher name loses", false, claims{c("a", 0, 2), c("me", 0, 2)}, nil, 0, c("me", 1, 3)},
		{"equal numbers: the lower name wins", false, claims{c("z", 0, 2), c("me", 0, 2)}, nil, 0, c("me", 0, 2)},
		{"a provisional claim loses to any other", false, claims{c("z", 0, 9), prov("me", 0, 2)}, nil, 0, c("me", 1, 10)},
		{"two provisional claims: the lower number wins", true, claims{prov("z", 0, 3), prov("me", 0, 2)}, nil, 0, prov("me", 0, 2)},
		{"a loser that has reached no seed claims provisionally again", true, claims{prov("a", 0, 2), prov("me", 0, 2)}, nil, 0, prov("me", 1, 3)},
		{"a provisional claim becomes firm with a new number", false, claims{prov("me", 0, 2), c("a", 1, 7)}, nil, 0, c("me", 0, 8)},
		{"a firm claim stays firm when seeds stop answering", true, claims{c("me", 0, 2)}, nil, 0, c("me", 0, 2)},
		{"the third loser claims the third free slot", false, claims{c("a", 0, 1), c("b", 0, 2), c("d", 0, 3), c("me", 0, 4), c("e", 2, 9)}, nil, 0, c("me", 4, 10)},
		{"losers of all slots are ranked together, provisional claims last", false, claims{c("a", 0, 1), c("b", 1, 1), prov("d", 0, 2), c("me", 1, 8)}, nil, 0, c("me", 2, 9)},
		{"new members are ranked after losers, by name", false, claims{c("a", 0, 1), c("z", 0, 2), {Name: "b"}, {Name: "n"}}, nil, 0, c("me", 3, 3)},
		{"a claim to a slot of MaxSlots or above is no claim", false, claims{c("me", MaxSlots, 1), c("a", 0, 2)}, nil, 0, c("me", 1, 3)},
		{"a member that starts gets its stored claim back", false, claims{c("a", 0, 1)}, claims{c("me", 7, 2)}, 0, c("me", 7, 2)},
		{"a stored provisional claim becomes firm when a seed is reached", false, claims{c("a", 0, 1)}, claims{prov("me", 7, 2)}, 0, c("me", 7, 3)},
		{"two reserved claims of one name: the later claim counts", false, nil, claims{c("me", 7, 2), c("me", 3, 5)}, 0, c("me", 3, 5)},
		{"a member that returns does not displace the new holder of its slot", false, claims{c("a", 0, 6)}, claims{c("me", 0, 1)}, 0, c("me", 1, 7)},
		{"the slot of another returning member is not free", false, claims{{Name: "b"}}, claims{c("b", 0, 1)}, 0, c("me", 1, 2)},
		{"two members return to one slot: the lower number wins", false, claims{{Name: "b"}}, claims{c("b", 0, 1), c("me", 0, 2)}, 0, c("me", 1, 3)},
		{"a live member has no reservation for its old slot", false, claims{c("b", 4, 3)}, claims{c("b", 0, 1)}, 0, c("me", 0, 4)},
		{"no slot is free", false, full, nil, 0, Claim{Name: "me"}},
		{"the highest number is used again", false, claims{c("a", 0, math.MaxUint64)}, nil, 0, c("me", 1, math.MaxUint64)},
	} {
		announced := Claim{}
		for _, c := range tt.live {
			if c.Name == "me" && c.isValid() {
				announced = c
			}
		}
		got, changed := ChooseClaim("me", tt.provisional, tt.live, tt.reserved, tt.highest)
		if got != tt.want || changed != (got != announced && got.Lamport > 0) {
			t.Errorf("%s: got %+v, changed %v; want %+v", tt.name, got, changed, tt.want)
		}
	}
	if got, changed := ChooseClaim("me", false, append(slices.Clone(full), c("me", 0, 2)), nil, 0); got.Lamport != 0 || !changed {
		t.Errorf("a loser when no slot is free: got %+v, changed %v; want no claim, changed", got, changed)
	}
}

// Members that have heard the same claims, in any order, agree on the claim that each member has to
// make. No two members claim one slot, and the winner of a slot keeps it. Once all have made these
// claims, no claim changes.
func TestChooseClaimAgrees(t *testing.T) {
	first := testSeed(t, 1)
	for seed := first; seed < first+150; seed++ {
		rng := rand.New(rand.NewPCG(seed, 5))
		var live, reserved []Claim
		for i := range rng.IntN(12) + 1 {
			c := Claim{Slot: rng.IntN(6), Lamport: rng.Uint64N(4), Name: fmt.Sprintf("m%02d", i), Provisional: rng.IntN(3) == 0}
			switch rng.IntN(4) {
			case 0:
				reserved = append(reserved, c)
				c.Lamport = 0
				if rng.IntN(2) == 0 { // the member has started again and has not announced a claim yet
					live = append(live, c)
				}
			default:
				live = append(live, c)
			}
		}
		var rings []uint64
		settled := map[string]Claim{}
		for range 10 {
			rng.Shuffle(len(live), func(i, j int) { live[i], live[j] = live[j], live[i] })
			rng.Shuffle(len(reserved), func(i, j int) { reserved[i], reserved[j] = reserved[j], reserved[i] })
			rings = append(rings, NewRing(live, 0).Digest())
			for _, m := range live {
				got, _ := ChooseClaim(m.Name, false, live, reserved, 0)
				if was, had := settled[m.Name]; had && got != was {
					t.Fatalf("seed %d: claim of %s: got %+v or %+v, depending on the order of claims", seed, m.Name, was, got)
				}
				settled[m.Name] = got
			}
		}
		if len(slices.Compact(rings)) != 1 {
			t.Fatalf("seed %d: the ring depends on the order of claims", seed)
		}
		held := map[int]string{}
		for name, c := range settled {
			if was := held[c.Slot]; was != "" || !c.isValid() {
				t.Fatalf("seed %d: %s must claim %+v, which is invalid or also claimed by %q", seed, name, c, was)
			}
			held[c.Slot] = name
		}
		winners := NewRing(live, 0)
		for slot, name := range winners.holders {
			if name != "" && held[slot] != name {
				t.Fatalf("seed %d: %s holds slot %d, but must give it up", seed, name, slot)
			}
		}
		after := slices.Collect(maps.Values(settled))
		for _, c := range after {
			if again, changed := ChooseClaim(c.Name, false, after, reserved, 0); changed {
				t.Fatalf("seed %d: %s claimed %+v, but must change to %+v", seed, c.Name, c, again)
			}
		}
	}
}

// A ringMember is a member in a simulation of claims without gossip.
type ringMember struct {
	name    string
	heard   map[string]Claim // by name: the latest claim heard of each other member, and the own claim
	highest uint64           // highest Lamport number heard or used
	slot    int              // claimed slot; -1 before the first claim
	changes int              // changes of slot after the first claim
	quiet   int              // exchanges of this member since it last heard a new claim
	dirty   bool             // a new claim was heard since the last resolve, or resolve was never called
}

// hear records c, a claim of another member, if c is newer than the latest claim of that member
// that m has heard. It ignores claims of m itself.
func (m *ringMember) hear(c Claim) {
	m.highest = max(m.highest, c.Lamport)
	if was, had := m.heard[c.Name]; c.Name != m.name && (!had || c.Lamport > was.Lamport) {
		m.heard[c.Name] = c
		m.quiet, m.dirty = 0, true
	}
}

// resolve makes the claim that ChooseClaim returns.
func (m *ringMember) resolve() {
	m.dirty = false
	provisional := m.heard[m.name].Provisional && len(m.heard) == 1
	c, changed := ChooseClaim(m.name, provisional, slices.Collect(maps.Values(m.heard)), nil, m.highest)
	if changed {
		if m.slot >= 0 && c.Slot != m.slot {
			m.changes++
		}
		m.slot, m.heard[m.name], m.highest = c.Slot, c, max(m.highest, c.Lamport)
	}
}

// settleRing simulates gossip: in each exchange one random member hears all claims that a second
// random member has heard. It ends when all members have heard the same claims and no claim
// changes. A member that has heard a new claim calls resolve after some of its exchanges have
// brought no further new claim; the parameter quiet is the number of these exchanges. settleRing
// returns the number of exchanges per member, or -1 if the members do not settle within 1000
// exchanges per member.
func settleRing(rng *rand.Rand, members []*ringMember, quiet int) int {
	n := len(members)
	for round := 1; round <= 1000; round++ {
		for range n {
			to, from := members[rng.IntN(n)], members[rng.IntN(n)]
			to.quiet++
			for _, c := range from.heard {
				to.hear(c)
			}
			if to.dirty && to.quiet >= quiet {
				to.resolve()
			}
		}
		if !slices.ContainsFunc(members, func(m *ringMember) bool { return m.dirty || !maps.Equal(m.heard, members[0].heard) }) {
			return round
		}
	}
	return -1
}

// A hundred members that start at once come to hold the hundred lowest slots, whether no member has
// claimed a slot before or all have claimed slot 0. If each member waits for three exchanges
// without a new claim before it changes its slot, hardly any member changes its slot more often
// than it must. The members settle even if no member waits.
func TestRingManyStartAtOnce(t *testing.T) {
	t.Parallel()
	const n = 100
	first := testSeed(t, 1)
	for _, start := range []struct {
		name    string
		claim   Claim
		quiet   int
		mean    float64 // limit of the mean number of changes of slot per member
		highest int     // limit of the number of changes of slot of one member
	}{
		{"no claim, waiting", Claim{}, 3, 0.1, 2},
		{"all claim slot 0, waiting", Claim{Lamport: 1}, 3, 1.1, 3},
		{"all claim slot 0 provisionally, waiting", Claim{Lamport: 1, Provisional: true}, 3, 1.1, 3},
		{"all claim slot 0, at once", Claim{Lamport: 1}, 0, 4, 20},
	} {
		for seed := first; seed < first+2; seed++ {
			t.Run(fmt.Sprintf("%s/seed %d", start.name, seed), func(t *testing.T) {
				rng := rand.New(rand.NewPCG(seed, 6))
				members := make([]*ringMember, n)
				for i := range members {
					c := start.claim
					c.Name = fmt.Sprintf("m%03d", i)
					members[i] = &ringMember{name: c.Name, heard: map[string]Claim{c.Name: c}, highest: c.Lamport, slot: -1, dirty: true}
					if c.isValid() {
						members[i].slot = c.Slot
					}
				}
				rounds := settleRing(rng, members, start.quiet)
				changes, most, slots := 0, 0, map[int]bool{}
				for _, m := range members {
					changes, most = changes+m.changes, max(most, m.changes)
					slots[m.slot] = true
				}
				t.Logf("%d exchanges and %.2f changes of slot per member, at most %d changes", rounds, float64(changes)/n, most)
				r := NewRing(slices.Collect(maps.Values(members[0].heard)), 0)
				if rounds < 0 || len(slots) != n || r.Buckets() != n || len(r.liveSlots) != n {
					t.Errorf("got %d slots, %d buckets and %d members on the ring after %d exchanges, want %d each", len(slots), r.Buckets(), len(r.liveSlots), rounds, n)
				}
				if float64(changes)/n > start.mean || most > start.highest {
					t.Errorf("got %.2f changes of slot per member and %d of one member, want at most %v and %d", float64(changes)/n, most, start.mean, start.highest)
				}
			})
		}
	}
}

// When two rings become one, each slot stays with the member whose claim to it comes first by
// Claim.compare. Each other member changes its slot once or twice. In the end all members hold
// different slots.
func TestRingHalvesJoin(t *testing.T) {
	first := testSeed(t, 1)
	for _, tt := range []struct {
		name string
		a, b []Claim // claims of the members of the first ring, and of the second ring
		keep string  // names of the members that keep their slots
	}{
		{"lower number", []Claim{{Lamport: 2, Name: "a"}}, []Claim{{Lamport: 1, Name: "b"}}, "b"},
		{"lower name", []Claim{{Lamport: 1, Name: "a"}}, []Claim{{Lamport: 1, Name: "b"}}, "a"},
		{"one claim provisional", []Claim{{Lamport: 1, Name: "a", Provisional: true}}, []Claim{{Lamport: 5, Name: "b"}}, "b"},
		{"both claims provisional", []Claim{{Lamport: 2, Name: "a", Provisional: true}}, []Claim{{Lamport: 1, Name: "b", Provisional: true}}, "b"},
		{"two members in each ring", []Claim{{Lamport: 1, Name: "a"}, {Lamport: 2, Name: "c", Slot: 1}}, []Claim{{Lamport: 1, Name: "b"}, {Lamport: 3, Name: "d", Slot: 1}}, "a c"},
	} {
		for seed := first; seed < first+5; seed++ {
			var members []*ringMember
			for _, side := range [][]Claim{tt.a, tt.b} {
				for _, c := range side {
					m := &ringMember{name: c.Name, heard: map[string]Claim{}, slot: c.Slot, dirty: true}
					for _, c := range side {
						m.heard[c.Name], m.highest = c, max(m.highest, c.Lamport)
					}
					members = append(members, m)
				}
			}
			rng := rand.New(rand.NewPCG(seed, 7))
			rng.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
			if settleRing(rng, members, 0) < 0 {
				t.Fatalf("%s, seed %d: the members do not settle", tt.name, seed)
			}
			slots := map[int]bool{}
			for _, m := range members {
				slots[m.slot] = true
				if kept := slices.Contains(strings.Fields(tt.keep), m.name); kept != (m.changes == 0) || m.changes > 2 {
					t.Errorf("%s, seed %d: %s changed its slot %d times, keeps it: %v", tt.name, seed, m.name, m.changes, kept)
				}
			}
			if len(slots) != len(members) {
				t.Errorf("%s, seed %d: got %d different slots for %d members", tt.name, seed, len(slots), len(members))
			}
		}
	}
}

// For any 40 claims, the ring has at most MaxSlots buckets, and ChooseClaim returns valid claims.
// Once all members have made these claims, no claim changes, unless the highest Lamport number is
// in use already.
func FuzzRing(f *testing.F) {
	f.Add([]byte("\x00\x00\x01a\x00\x00\x01b"), 3)
	f.Add([]byte("\x10\x00\x01a\x00\x00\xffb\x40\x02\x01a\x80\x01\x02c"), -1)
	f.Fuzz(func(t *testing.T, data []byte, buckets int) {
		var live, reserved []Claim
		last := false
		for ; len(data) >= 4 && len(live)+len(reserved) < 40; data = data[4:] {
			c := Claim{Slot: int(int16(binary.BigEndian.Uint16(data)) & ^0x7000), Lamport: uint64(data[2] & 15), Name: strings.Trim(string(data[3:4]), "\x00"), Provisional: data[2]&16 != 0}
			if data[2]&32 != 0 {
				c.Slot &= 7
			}
			if data[2]&0xc0 == 0xc0 {
				c.Lamport, last = math.MaxUint64, true
			}
			if data[0]&0x40 != 0 {
				reserved = append(reserved, c)
			} else {
				live = append(live, c)
			}
		}
		r := NewRing(live, buckets)
		if r.Buckets() > MaxSlots || len(r.liveSlots) > len(live) {
			t.Fatalf("got %d buckets and %d live slots of %d claims", r.Buckets(), len(r.liveSlots), len(live))
		}
		own, ok := r.Owner(uint64(buckets))
		if ok != (len(r.liveSlots) > 0) || ok && !slices.Contains(r.holders, own) {
			t.Fatalf("got owner %q, %v, with %d live slots", own, ok, len(r.liveSlots))
		}
		var after []Claim
		for name := range latestClaims(live) {
			c, _ := ChooseClaim(name, false, live, reserved, 0)
			if !c.isValid() {
				t.Fatalf("%s must claim %+v, which is invalid", name, c)
			}
			after = append(after, c)
		}
		if last {
			return // no higher number is left, so later claims cannot be distinguished from earlier claims
		}
		for _, c := range after {
			if again, changed := ChooseClaim(c.Name, false, after, reserved, 0); changed {
				t.Fatalf("claimed %+v, but must change to %+v", c, again)
			}
		}
	})
}

// BenchmarkChooseClaim chooses a claim among 100 members. Two members claim each slot.
func BenchmarkChooseClaim(b *testing.B) {
	var live []Claim
	for i := range 100 {
		live = append(live, Claim{Slot: i / 2, Lamport: uint64(i + 1), Name: fmt.Sprintf("m%03d", i)})
	}
	for b.Loop() {
		ChooseClaim("m099", false, live, nil, 0)
	}
}
