package main

// Which member owns a key (Ring), and which slot of the ring each member claims
// (Resolve). Both are functions of what a member has heard and of nothing else:
// not of the order it came in, of clocks or of suspicion, so that members that
// have heard the same agree. Values here are immutable and safe for concurrent
// use; work and memory are bounded by the claims given and MaxSlots. This file
// must not know how claims travel, who is live, or what a key stands for.

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"strings"
)

// MaxSlots bounds the slots, and so what one broken claim can cost everybody for
// ever: buckets never fall. A claim of a slot beyond counts as none.
const MaxSlots = 4096

// triesPerBucket bounds a key's walk. With one live slot left in B, a walk of
// 64·B landings misses it once in e^64.
const triesPerBucket = 64

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

// Resolve returns what self is to claim, and whether that differs from what it
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
func Resolve(self string, provisional bool, live, reserved []Claim, highest uint64) (Claim, bool) {
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

// Ring says who owns a key: a function of which member holds which slot and of
// the number of buckets. A key is the first 8 bytes of the SHA-256 of a cluster
// ID, big-endian. It lands on a slot by jump consistent hash; while nobody live
// holds that, it is hashed and lands again. So each landing is one of its own
// sequence, whoever is live: a member that joins in a hole or in the next bucket
// takes keys from all and moves none between others, and of one that is lost, only
// its own move, to all others alike. (Buckets that grow past slots whose members
// have not been heard of yet also move keys between others, but only such as those
// members will own.)
type Ring struct {
	owners  []string // by slot; "" where nobody live is
	live    []int    // slots held, ascending
	version uint64
}

// NewRing makes the ring of the claims of all live members. Buckets is the
// highest slot ever claimed by anybody, plus one; it is raised to cover the claims
// given and cut at MaxSlots. Of several claims of a slot one wins, as in Resolve;
// the losers own nothing until they have claimed another.
func NewRing(live []Claim, buckets int) *Ring {
	claims := slices.DeleteFunc(slices.Collect(maps.Values(inForce(live))), func(c Claim) bool { return !c.valid() })
	slices.SortFunc(claims, Claim.compare)
	buckets = max(0, min(buckets, MaxSlots))
	for _, c := range claims {
		buckets = max(buckets, c.Slot+1)
	}
	r := &Ring{owners: make([]string, buckets)}
	for _, c := range claims {
		if r.owners[c.Slot] == "" {
			r.owners[c.Slot] = c.Name
		}
	}
	sum := binary.AppendUvarint(nil, uint64(buckets))
	for slot, name := range r.owners {
		if name != "" {
			r.live = append(r.live, slot)
			sum = binary.AppendUvarint(binary.AppendUvarint(sum, uint64(slot)), uint64(len(name)))
			sum = append(sum, name...)
		}
	}
	digest := sha256.Sum256(sum)
	r.version = binary.BigEndian.Uint64(digest[:])
	return r
}

// Owner returns the member that owns key; false when there is none.
func (r *Ring) Owner(key uint64) (string, bool) {
	slot := r.land(key, triesPerBucket*len(r.owners), -1)
	if slot < 0 {
		return "", false
	}
	return r.owners[slot], true
}

// Successor returns the member that would own key if its owner were lost; false
// when there is none.
func (r *Ring) Successor(key uint64) (string, bool) {
	tries := triesPerBucket * len(r.owners)
	slot := r.land(key, tries, r.land(key, tries, -1))
	if slot < 0 {
		return "", false
	}
	return r.owners[slot], true
}

// land returns the first of key's landings, tries at most, on a live slot other
// than not; the lowest such slot if all miss; -1 if there is none.
func (r *Ring) land(key uint64, tries, not int) int {
	if len(r.live) > 1 || len(r.live) == 1 && r.live[0] != not {
		for range tries {
			if slot := jump(key, len(r.owners)); r.owners[slot] != "" && slot != not {
				return slot
			}
			key = splitmix64(key)
		}
	}
	for _, slot := range r.live {
		if slot != not {
			return slot
		}
	}
	return -1
}

// Shares returns the share of all keys that each member owns. It is exact, not a
// sample, which would show its own noise as imbalance: landings are uniform over
// the buckets, and so over the live slots among them.
func (r *Ring) Shares() map[string]float64 {
	shares := make(map[string]float64, len(r.live))
	for _, slot := range r.live {
		shares[r.owners[slot]] = 1 / float64(len(r.live))
	}
	return shares
}

// Buckets returns the number of buckets, which the caller must never let fall.
func (r *Ring) Buckets() int { return len(r.owners) }

// Version is a digest of who holds which slot and of the number of buckets.
// Members of equal versions agree on the owner of every key.
func (r *Ring) Version() uint64 { return r.version }

// jump is jump consistent hash (Lamping & Veach 2014, arXiv:1406.2294). From n to
// n+1 buckets, a key either stays or goes to bucket n. n must be positive.
func jump(key uint64, n int) int {
	b, j := int64(-1), int64(0)
	for j < int64(n) {
		b = j
		key = key*2862933555777941757 + 1
		j = int64(float64(b+1) * (float64(1<<31) / float64(key>>33+1)))
	}
	return int(b)
}

// splitmix64 is the step of Steele, Lea & Flood's generator (OOPSLA 2014). The
// rehash needs another family than jump's own: its generator's next states land
// too much like the ones before.
func splitmix64(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
