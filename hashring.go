package main

// The ring maps each site to the member that owns it. The ring depends only on the claims of live
// members and on the number of buckets, and not on the order of claims, on clocks or on suspicions.
// So members that know the same live claims and the same number of buckets agree on every owner.
// Rings are immutable. Pure: no I/O and no clock. The hashring family must not know how claims
// travel. The code of this file treats a site key only as a number.

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
)

// maxJumpsPerBucket limits the search for a slot that a live member holds. If only one of B slots
// has a live holder, the probability that 64·B jumps do not find this slot is below e^-64.
const maxJumpsPerBucket = 64

// A Ring maps site keys to the members that own them. It depends only on which live member holds
// which slot, and on the number of buckets. A site key is the first 8 bytes of the SHA-256 of a
// cluster ID, big endian.
//
// Owner maps a key to a bucket by jump consistent hash; bucket i is slot i. If no live member holds
// that slot, Owner rehashes the key and maps it again. So the sequence of slots that a key visits
// does not depend on which members are live. This has two consequences:
//
//   - A member that joins, in an empty slot or in a new bucket, takes about the same share of keys
//     from each other member. No key moves between two other members.
//   - When a member is lost, only its keys move, and each other member gets about the same share of
//     them.
//
// There is one exception. The number of buckets can grow before the members of all new slots have
// been heard of. Until then, keys also move between other members, but only keys that the members
// of the new slots will own.
type Ring struct {
	holders   []string // member names by slot; "" if no live member holds the slot
	liveSlots []int    // slots with a holder, ascending
	digest    uint64   // hash of the number of buckets and of holders; Digest returns it
}

// NewRing returns the ring of live, the claims of all live members. minBuckets is the highest slot
// known to have ever been claimed, plus one. NewRing raises minBuckets to cover the claims in live,
// and limits minBuckets to MaxSlots. If several members claim one slot, the first claim by
// Claim.compare wins, as in ChooseClaim. A member whose claim loses owns nothing in this ring.
func NewRing(live []Claim, minBuckets int) *Ring {
	claims := slices.DeleteFunc(slices.Collect(maps.Values(latestClaims(live))), func(c Claim) bool { return !c.isValid() })
	slices.SortFunc(claims, Claim.compare)
	minBuckets = max(0, min(minBuckets, MaxSlots))
	for _, c := range claims {
		minBuckets = max(minBuckets, c.Slot+1)
	}
	r := &Ring{holders: make([]string, minBuckets)}
	for _, c := range claims {
		if r.holders[c.Slot] == "" {
			r.holders[c.Slot] = c.Name
		}
	}
	sum := binary.AppendUvarint(nil, uint64(minBuckets))
	for slot, name := range r.holders {
		if name != "" {
			r.liveSlots = append(r.liveSlots, slot)
			sum = binary.AppendUvarint(binary.AppendUvarint(sum, uint64(slot)), uint64(len(name)))
			sum = append(sum, name...)
		}
	}
	digest := sha256.Sum256(sum)
	r.digest = binary.BigEndian.Uint64(digest[:])
	return r
}

// Owner returns the member that owns siteKey. It returns false if no live member holds a slot.
func (r *Ring) Owner(siteKey uint64) (string, bool) {
	slot := r.liveSlotFor(siteKey, maxJumpsPerBucket*len(r.holders))
	if slot < 0 {
		return "", false
	}
	return r.holders[slot], true
}

// liveSlotFor returns the first live slot in the sequence that siteKey visits. If the first
// maxJumps slots of the sequence are not live, it returns the lowest live slot. It returns -1 if no
// slot is live.
func (r *Ring) liveSlotFor(siteKey uint64, maxJumps int) int {
	if len(r.liveSlots) == 0 {
		return -1
	}
	for range maxJumps {
		if slot := jumpHash(siteKey, len(r.holders)); r.holders[slot] != "" {
			return slot
		}
		siteKey = splitmix64(siteKey)
	}
	return r.liveSlots[0]
}

// Shares returns the share of all keys that each member with a slot owns. The shares are computed
// and not counted: keys map uniformly to the buckets, and so to the live slots among them. (Shares
// counted from a sample of keys would contain noise that looks like imbalance.)
func (r *Ring) Shares() map[string]float64 {
	shares := make(map[string]float64, len(r.liveSlots))
	for _, slot := range r.liveSlots {
		shares[r.holders[slot]] = 1 / float64(len(r.liveSlots))
	}
	return shares
}

// Buckets returns the number of buckets. Later rings must not have fewer buckets, because keys
// would then move between members.
func (r *Ring) Buckets() int { return len(r.holders) }

// Digest returns a hash of the number of buckets and the holder of each slot. Members whose rings
// have equal digests agree on the owner of every key.
func (r *Ring) Digest() uint64 { return r.digest }

// jumpHash maps key to a bucket from 0 to buckets-1, by jump consistent hash (Lamping & Veach 2014,
// arXiv:1406.2294). When the number of buckets grows from n to n+1, a key either stays in its
// bucket or moves to bucket n. buckets must be at least 1.
func jumpHash(key uint64, buckets int) int {
	b, j := int64(-1), int64(0)
	for j < int64(buckets) {
		b = j
		key = key*2862933555777941757 + 1
		j = int64(float64(b+1) * (float64(1<<31) / float64(key>>33+1)))
	}
	return int(b)
}

// splitmix64 is one step of the generator of Steele, Lea & Flood (OOPSLA 2014). liveSlotFor
// rehashes a key with it if the key's slot has no live member. A step of the generator that
// jumpHash uses would not spread such keys evenly. For example, if only the lower 16 of 32 slots
// are live, one member would own 1.4 times the mean. With splitmix64 it owns at most 1.02 times the
// mean.
func splitmix64(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
