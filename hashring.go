package main

// The ring says which member owns a site. It is a function of the claims that a member has
// heard and of nothing else, not of their order, of clocks or of suspicion, so that members
// that have heard the same agree. Rings are immutable. Pure. This family must not know how
// claims travel, or what a key stands for.

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
)

// maxJumpsPerBucket bounds the search for a live slot. With one live slot among B buckets,
// 64·B jumps miss it once in e^64.
const maxJumpsPerBucket = 64

// Ring says which member owns a key. It depends on nothing but which member holds which slot,
// and on the number of buckets. A key is the first 8 bytes of the SHA-256 of a cluster ID, big
// endian. A key is mapped to a slot by jump consistent hash. While no live member holds that
// slot, the key is hashed and mapped again. So the sequence of slots that a key visits does not
// depend on who is live. A member that joins, in a hole or in the next bucket, takes keys from
// all others alike and moves none between them; the loss of a member moves only its own keys,
// to all others alike. (Buckets that grow past slots whose members have not been heard of yet
// also move keys between others, but only keys that those members will own.)
type Ring struct {
	holders   []string // by slot; "" if no live member holds the slot
	liveSlots []int    // slots with a holder, ascending
	digest    uint64
}

// NewRing makes the ring of the claims of all live members. Buckets is the highest slot that
// any member ever claimed, plus one; it is raised to cover the claims given and cut at
// MaxSlots. Of several claims to a slot one wins, as in ChooseClaim. A member whose claim loses
// owns nothing until it has claimed another slot.
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

// Owner returns the member that owns siteKey; false if there is no live member.
func (r *Ring) Owner(siteKey uint64) (string, bool) {
	slot := r.liveSlotFor(siteKey, maxJumpsPerBucket*len(r.holders))
	if slot < 0 {
		return "", false
	}
	return r.holders[slot], true
}

// liveSlotFor returns the first live slot that siteKey is mapped to; the lowest live slot if
// maxJumps find none; -1 if there is none.
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

// Shares returns the share of all keys that each member owns. It is exact: keys are mapped
// uniformly to the buckets, and so to the live slots among them. (A sample would show its own
// noise as imbalance.)
func (r *Ring) Shares() map[string]float64 {
	shares := make(map[string]float64, len(r.liveSlots))
	for _, slot := range r.liveSlots {
		shares[r.holders[slot]] = 1 / float64(len(r.liveSlots))
	}
	return shares
}

// Buckets returns the number of buckets. The next ring must not have fewer.
func (r *Ring) Buckets() int { return len(r.holders) }

// Digest is a digest of who holds which slot and of the number of buckets.
// Members of equal versions agree on the owner of every key.
func (r *Ring) Digest() uint64 { return r.digest }

// jumpHash is jump consistent hash (Lamping & Veach 2014, arXiv:1406.2294). From n to
// n+1 buckets, a key either stays or goes to bucket n. There has to be a bucket.
func jumpHash(key uint64, buckets int) int {
	b, j := int64(-1), int64(0)
	for j < int64(buckets) {
		b = j
		key = key*2862933555777941757 + 1
		j = int64(float64(b+1) * (float64(1<<31) / float64(key>>33+1)))
	}
	return int(b)
}

// splitmix64 is the step of the generator of Steele, Lea & Flood (OOPSLA 2014). Keys are hashed
// again by it and not by jump's own generator, because that one's next states lead to buckets
// that depend too much on the ones before.
func splitmix64(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
