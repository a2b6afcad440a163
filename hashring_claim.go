package main

// Claims to the slots of the ring, and the choice of one. Members that have heard the same
// claims choose different slots at once. Work and memory are bounded by MaxSlots. Pure.

import (
	"cmp"
	"slices"
	"strings"
)

// Claim is one member's announcement that it holds a slot. A member's later claims have higher
// numbers, so of two claims of one member the one with the higher number counts.
type Claim struct {
	Slot        int
	Lamport     uint64 // 0: nothing is claimed, whatever Slot says
	Name        string
	Provisional bool // made while seeds were configured and none was reached
}

func (c Claim) isValid() bool {
	return c.Name != "" && c.Lamport > 0 && c.Slot >= 0 && c.Slot < MaxSlots
}

// compare orders claims to one slot; the first keeps it. A claim that was made without having
// heard the others gives way; otherwise the earlier claim stays.
func (c Claim) compare(d Claim) int {
	if c.Provisional != d.Provisional {
		if d.Provisional {
			return -1
		}
		return 1
	}
	return cmp.Or(cmp.Compare(c.Lamport, d.Lamport), strings.Compare(c.Name, d.Name), cmp.Compare(c.Slot, d.Slot))
}

// latestClaims returns the valid claim with the highest number of each member; the zero Claim
// for a member that has none.
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

// ChooseClaim returns what self is to claim, and whether that differs from what it
// has in live; then it must be stored before it is announced.
//
// live are the claims of all live members, self included (in live without a valid
// claim: a member that has yet to claim). reserved are those of members gone for
// less than a day and, while self starts, its own stored one. maxLamport is the
// highest Lamport number ever heard or used. provisional says that seeds are
// configured and none has yet sent its table.
//
// The winner of a slot keeps it. A member that starts gets back what is reserved in
// its name, even when it brings nothing of its own, unless a live member holds it.
// All others, losers in order and then newcomers by name, take one free slot each,
// the first the lowest. Because every member ranks all of them, and not only itself,
// members that have heard the same choose differently at once. New claims have number
// maxLamport+1. A provisional claim that stands once seeds are reached is made anew: late,
// so that it still gives way to what was claimed before. Without a free slot the claim
// is one of nothing.
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

// nextLamport returns the number of a new claim. After the last number it is the last number
// again; then only names decide.
func nextLamport(maxLamport uint64, live, reserved []Claim) uint64 {
	for _, c := range slices.Concat(live, reserved) {
		maxLamport = max(maxLamport, c.Lamport)
	}
	return max(maxLamport, maxLamport+1)
}

// rankMemberClaims returns one claim for each member, in the order in which slots are given: first
// announced claims, then reserved claims of members that announce none, then members without
// any, whose claim is not valid.
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

// assignSlots gives each slot to the first valid claim to it, and returns these claims, and the
// members that got no slot, in order.
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

// nthFreeSlot returns the free slot that has n free slots below it; false if there is none.
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
