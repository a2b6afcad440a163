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

// MaxSlots bounds the slots, and so what one broken claim can cost everybody for
// ever: buckets never fall. A claim of a slot beyond counts as none.
const MaxSlots = 4096

// triesPerBucket bounds a key's walk. With one live slot left in B, a walk of
// 64·B landings misses it once in e^64.
const triesPerBucket = 64

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
