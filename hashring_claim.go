package main

// This file chooses which slot of the ring a member claims. Members that know the same members and
// claims choose different slots, without asking each other. MaxSlots bounds work and memory. Pure:
// no I/O and no clock.

import (
	"cmp"
	"slices"
	"strings"
)

// A Claim is one member's announcement that it holds a slot. A member gives a new claim a Lamport
// number above all numbers that it knows; see nextLamport. Of two claims of one member, only the
// claim with the higher number counts.
type Claim struct {
	Slot        int
	Lamport     uint64 // number of the claim; 0 = no slot is claimed, and Slot is ignored
	Name        string
	Provisional bool // made while seeds were configured, but no other member had sent its table yet
}

// isValid reports whether c names a member and claims a slot below MaxSlots.
func (c Claim) isValid() bool {
	return c.Name != "" && c.Lamport > 0 && c.Slot >= 0 && c.Slot < MaxSlots
}

// compare orders claims to one slot; the first claim in this order wins the slot. A provisional
// claim comes after every claim that is not provisional, because its member may not have heard the
// other members' claims. Otherwise the earlier claim comes first: the lower Lamport number, then
// the lower name.
func (c Claim) compare(d Claim) int {
	if c.Provisional != d.Provisional {
		if d.Provisional {
			return -1
		}
		return 1
	}
	return cmp.Or(cmp.Compare(c.Lamport, d.Lamport), strings.Compare(c.Name, d.Name), cmp.Compare(c.Slot, d.Slot))
}

// latestClaims returns, for each member, its valid claim with the highest Lamport number. It
// returns the zero Claim for a member without a valid claim.
func latestClaims(claims []Claim) map[string]Claim {
	latest := make(map[string]Claim, len(claims))
	for _, c := range claims {
		switch d, known := latest[c.Name]; {
		case c.Name == "":
		case !c.isValid():
			latest[c.Name] = d
		case !known || c.Lamport > d.Lamport || c.Lamport == d.Lamport && c.compare(d) < 0:
			latest[c.Name] = c
		}
	}
	return latest
}

// ChooseClaim returns the claim that self has to make, and whether that claim differs from self's
// claim in live. The caller must store a changed claim on disk before it announces the claim.
//
// live holds the claims of all live members, self included. A member whose claim in live is not
// valid has announced no slot. reserved holds the claims of members that left or died less than
// a day ago. It may also hold self's own stored claim while self starts. maxLamport is the highest
// Lamport number ever heard or used. provisional means that seeds are configured, but no other
// member has sent its table yet.
//
// The rules are:
//
//   - The winner of a slot keeps the slot.
//   - A live member that announces no claim gets back the slot that is reserved in its name, unless
//     another member wins that slot.
//   - All other members wait for a free slot: first the members whose claims lost, then the members
//     whose reserved slots are held by others, then new members by name. The first waiting member
//     takes the lowest free slot, the second member the next free slot, and so on. Every member
//     ranks all waiting members, and not only itself. So members that know the same members and
//     claims choose different slots at once.
//   - A new claim has the number that nextLamport returns.
//   - Once another member has sent its table, self renews a provisional claim that still wins its
//     slot. The renewed claim is not provisional, but its number is new. So it still loses to
//     earlier claims that are not provisional.
//   - If no free slot is left for self, the returned claim has Lamport 0 and claims no slot.
func ChooseClaim(self string, provisional bool, live, reserved []Claim, maxLamport uint64) (claim Claim, changed bool) {
	next := nextLamport(maxLamport, live, reserved)
	members, gone := latestClaims(live), latestClaims(reserved)
	announced := members[self]
	members[self] = announced

	holders, waiting := assignSlots(rankMemberClaims(members, gone))
	for _, c := range holders {
		if c.Name != self {
			continue
		}
		if c.Provisional && !provisional {
			c.Lamport, c.Provisional = next, false
		}
		return c, c != announced
	}

	var taken [MaxSlots]bool
	for _, c := range holders {
		taken[c.Slot] = true
	}
	for name, c := range gone {
		if _, isLive := members[name]; !isLive && c.isValid() {
			taken[c.Slot] = true
		}
	}
	slot, ok := nthFreeSlot(&taken, slices.Index(waiting, self))
	if !ok {
		return Claim{Name: self}, announced.isValid()
	}
	return Claim{Slot: slot, Lamport: next, Name: self, Provisional: provisional}, true
}

// nextLamport returns the number of a new claim, which is one above the highest known number. The
// highest uint64 has no successor, so it is used again. Then compare decides by name.
func nextLamport(maxLamport uint64, live, reserved []Claim) uint64 {
	for _, c := range slices.Concat(live, reserved) {
		maxLamport = max(maxLamport, c.Lamport)
	}
	return max(maxLamport, maxLamport+1)
}

// rankMemberClaims returns one claim per member, in the order in which members get slots. Members
// with an announced claim come first. Then come members that announce no claim but have a reserved
// claim. Members with neither come last, each with an invalid claim that only has its name.
func rankMemberClaims(members, reservedClaims map[string]Claim) []Claim {
	var announced, reserved, none []Claim
	for name, c := range members {
		if c.isValid() {
			announced = append(announced, c)
		} else if c = reservedClaims[name]; c.isValid() {
			reserved = append(reserved, c)
		} else {
			none = append(none, Claim{Name: name})
		}
	}
	for _, claims := range [][]Claim{announced, reserved, none} {
		slices.SortFunc(claims, Claim.compare)
	}
	return slices.Concat(announced, reserved, none)
}

// assignSlots gives each slot to the first valid claim to it in ranked. It returns the claims that
// got their slot, and the names of the members that got no slot, both in the order of ranked.
func assignSlots(ranked []Claim) (holders []Claim, waiting []string) {
	var taken [MaxSlots]bool
	for _, c := range ranked {
		if c.isValid() && !taken[c.Slot] {
			taken[c.Slot] = true
			holders = append(holders, c)
		} else {
			waiting = append(waiting, c.Name)
		}
	}
	return holders, waiting
}

// nthFreeSlot returns the free slot that has exactly n free slots below it. It returns false if
// there is no such slot.
func nthFreeSlot(taken *[MaxSlots]bool, n int) (int, bool) {
	for slot := range taken {
		if taken[slot] {
			continue
		}
		if n == 0 {
			return slot, true
		}
		n--
	}
	return 0, false
}
