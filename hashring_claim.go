package main

// Claims to the slots of the ring, and the choice of one. Members that have heard the same
// claims choose different slots at once. Work and memory are bounded by MaxSlots. Pure.

import (
	"cmp"
	"slices"
	"strings"
)

// Claim is one member's word that it holds a slot. A member's later claims have
// higher numbers, so of two claims of one name the higher is the one in force.
type Claim struct {
	Slot        int
	Lamport     uint64 // 0: nothing is claimed, whatever Slot says
	Name        string
	Provisional bool // made while seeds were configured and none was reached
}

func (c Claim) valid() bool {
	return c.Name != "" && c.Lamport > 0 && c.Slot >= 0 && c.Slot < MaxSlots
}

// compare orders claims of one slot, the one that keeps it first. Who claimed
// without having heard the others gives way; else who came first stays.
func (c Claim) compare(d Claim) int {
	if c.Provisional != d.Provisional {
		if d.Provisional {
			return -1
		}
		return 1
	}
	return cmp.Or(cmp.Compare(c.Lamport, d.Lamport), strings.Compare(c.Name, d.Name), cmp.Compare(c.Slot, d.Slot))
}

// inForce returns the valid claim in force for each name; the zero Claim for a
// name that has none.
func inForce(claims []Claim) map[string]Claim {
	m := make(map[string]Claim, len(claims))
	for _, c := range claims {
		switch d, had := m[c.Name]; {
		case c.Name == "":
		case !c.valid():
			m[c.Name] = d
		case !had || c.Lamport > d.Lamport || c.Lamport == d.Lamport && c.compare(d) < 0:
			m[c.Name] = c
		}
	}
	return m
}

// ResolveClaim returns what self is to claim, and whether that differs from what it
// has in live; then it must be stored before it is announced.
//
// live are the claims of all live members, self included (in live without a valid
// claim: a member that has yet to claim). reserved are those of members gone for
// less than a day and, while self starts, its own stored one. highest is the
// highest Lamport number ever heard or used. provisional says that seeds are
// configured and none has yet told all that it has heard.
//
// Who wins its slot keeps it. A member that starts gets back what is reserved in
// its name, even when it brings nothing of its own, unless a live member holds it.
// All others, losers in order and then newcomers by name, take one free slot each,
// the first the lowest: ranking everybody and not only self, members that have
// heard the same choose differently at once. New claims have number highest+1. A
// provisional claim that stands once seeds are reached is made anew: late, so that
// it still gives way to what was claimed before. Without a free slot the claim is
// one of nothing.
func ResolveClaim(self string, provisional bool, live, reserved []Claim, highest uint64) (Claim, bool) {
	for _, c := range slices.Concat(live, reserved) {
		highest = max(highest, c.Lamport)
	}
	next := highest + 1
	if next == 0 {
		next = highest // the end of the numbers; names still decide
	}
	members, gone := inForce(live), inForce(reserved)
	announced := members[self]
	members[self] = announced

	// Claims in force stand in order, then those that return, then who has none.
	var stand, back, none []Claim
	for name, c := range members {
		if c.valid() {
			stand = append(stand, c)
		} else if c = gone[name]; c.valid() {
			back = append(back, c)
		} else {
			none = append(none, Claim{Name: name})
		}
	}
	slices.SortFunc(stand, Claim.compare)
	slices.SortFunc(back, Claim.compare)
	slices.SortFunc(none, Claim.compare)

	var taken [MaxSlots]bool
	var homeless []string
	for _, c := range slices.Concat(stand, back, none) {
		switch {
		case !c.valid() || taken[c.Slot]:
			homeless = append(homeless, c.Name)
			continue
		case c.Name == self && c.Provisional && !provisional:
			c.Lamport, c.Provisional = next, false
		}
		taken[c.Slot] = true
		if c.Name == self {
			return c, c != announced
		}
	}
	for name, c := range gone {
		if _, isLive := members[name]; !isLive && c.valid() {
			taken[c.Slot] = true
		}
	}
	slot := 0
	for _, name := range homeless {
		for slot < MaxSlots && taken[slot] {
			slot++
		}
		if name == self {
			break
		}
		slot++
	}
	if slot >= MaxSlots {
		return Claim{Name: self}, announced.valid()
	}
	return Claim{Slot: slot, Lamport: next, Name: self, Provisional: provisional}, true
}
