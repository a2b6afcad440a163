package main

// Tests of the ring: its balance, the keys that a change moves, and its digest, for random
// histories of members and random orders of claims.

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func ringKeys(n int) []uint64 {
	keys := make([]uint64, n)
	for i := range keys {
		sum := sha256.Sum256(fmt.Appendf(nil, "site-%d", i))
		keys[i] = binary.BigEndian.Uint64(sum[:])
	}
	return keys
}

// ringOf returns a ring with at least the given number of buckets. Each slot in slots is held by a
// member of its own, whose name is m and the number of the slot.
func ringOf(buckets int, slots ...int) *Ring {
	var claims []Claim
	for _, s := range slots {
		claims = append(claims, Claim{Slot: s, Lamport: 1, Name: fmt.Sprintf("m%d", s)})
	}
	return NewRing(claims, buckets)
}

// everyNth returns n slots: 0, step, 2·step and so on.
func everyNth(n, step int) []int {
	slots := make([]int, n)
	for i := range slots {
		slots[i] = i * step
	}
	return slots
}

// owner returns the owner of key, or "" if there is none.
func owner(r *Ring, key uint64) string { name, _ := r.Owner(key); return name }

// jumpHash returns the published test vectors, and splitmix64 returns the first outputs of its
// generator for the seed 0. The argument of splitmix64 is the state of the generator before the
// output.
func TestRingHashes(t *testing.T) {
	for _, c := range []struct {
		key     uint64
		n, want int
	}{{1, 1, 0}, {42, 57, 43}, {0xDEAD10CC, 1, 0}, {0xDEAD10CC, 666, 361}, {256, 1024, 520}} {
		if got := jumpHash(c.key, c.n); got != c.want {
			t.Errorf("jumpHash(%#x, %d) = %d, want %d", c.key, c.n, got, c.want)
		}
	}
	const gamma = 0x9e3779b97f4a7c15
	state := uint64(0)
	for i, want := range []uint64{0xe220a8397b1dcdaf, 0x6e789e6aa1b965f4, 0x06c45d188009454f} {
		if got := splitmix64(state); got != want {
			t.Errorf("output %d of splitmix64 is %#x, want %#x", i, got, want)
		}
		state += gamma
	}
}

// All members own equal shares of the keys. Counts of the keys of each member differ only by the
// noise of counting, and with 16 members the largest count is at most 1.02 times the mean. Empty
// slots do not change this. The result of Shares agrees with the counts up to this noise.
func TestSweepRingBalance(t *testing.T) {
	sweep(t)
	t.Parallel()
	keys := ringKeys(1_000_000)
	for n := 1; n <= 64; n++ {
		for _, step := range []int{1, 2} { // step 1: every bucket is live; step 2: every second bucket
			keys := keys
			if full := n == 16 || step == 1 && (n == 3 || n == 64); !full {
				keys = keys[:50_000]
			}
			slots := everyNth(n, step)
			r := ringOf(n*step, slots...)
			count := make([]int, n)
			for _, k := range keys {
				count[r.liveSlotFor(k, maxJumpsPerBucket*n*step)/step]++
			}
			mean := float64(len(keys)) / float64(n)
			ratio := float64(slices.Max(count)) / mean
			bound := 1 + 5*math.Sqrt(float64(n-1)/float64(len(keys)))
			if n == 16 {
				bound = min(bound, 1.02)
			}
			if ratio > bound {
				t.Errorf("%d members in %d buckets: largest share is %.4f of the mean, want at most %.4f", n, n*step, ratio, bound)
			}
			if len(keys) == 1_000_000 {
				t.Logf("%2d members in %3d buckets: largest share / mean %.4f, smallest %.4f", n, n*step, ratio, float64(slices.Min(count))/mean)
			}
			total := 0.0
			shares := r.Shares()
			for i, s := range slots {
				share := shares[r.holders[s]]
				if got := float64(count[i]) / float64(len(keys)); math.Abs(got-share) > 6*math.Sqrt(share/float64(len(keys))) {
					t.Errorf("%d members: Shares gives slot %d %.4f of the keys, counted %.4f", n, s, share, got)
				}
				total += share
			}
			if math.Abs(total-1) > 1e-9 || len(shares) != n {
				t.Errorf("%d members: got %d shares with the sum %v, want the sum 1", n, len(shares), total)
			}
		}
	}
}

// A member that joins takes keys, but no key moves between other members. A lost member loses its
// keys, and no other key moves. Members join in empty slots and in new buckets, return and are lost
// in a random order. The number of keys that move is within 2 % of the least number that must move.
// The ring does not depend on the order of the claims.
func TestRingChangeMovesOnlyItsOwn(t *testing.T) {
	keys := ringKeys(1000)
	changes, moved, least := 0, 0, 0.0
	first := testSeed(t, 1)
	for seed := first; seed < first+30; seed++ {
		rng := rand.New(rand.NewPCG(seed, 3))
		live, names, buckets, next := map[int]string{}, map[int]string{}, 0, 0
		ring := func() *Ring {
			var claims []Claim
			for s, name := range live {
				claims = append(claims, Claim{Slot: s, Lamport: rng.Uint64N(9) + 1, Name: name})
			}
			rng.Shuffle(len(claims), func(i, j int) { claims[i], claims[j] = claims[j], claims[i] })
			return NewRing(claims, buckets)
		}
		before := ring()
		for step := range 60 {
			var holes []int
			for s := range buckets {
				if live[s] == "" {
					holes = append(holes, s)
				}
			}
			var newcomer, lost string
			join := func(s int) {
				if rng.IntN(3) > 0 || names[s] == "" { // otherwise the member that last had slot s returns
					names[s] = fmt.Sprintf("m%d", next)
					next++
				}
				newcomer, live[s], buckets = names[s], names[s], max(buckets, s+1)
			}
			switch op := rng.IntN(8); {
			case op < 3 && len(live) > 0:
				slots := slices.Sorted(maps.Keys(live))
				s := slots[rng.IntN(len(slots))]
				lost = live[s]
				delete(live, s)
			case op < 6 && len(holes) > 0:
				join(holes[rng.IntN(len(holes))])
			default:
				join(buckets)
			}
			after := ring()
			n := 0
			for _, k := range keys {
				was, is := owner(before, k), owner(after, k)
				if is != was && is != newcomer && was != lost || is == lost && lost != "" {
					t.Fatalf("seed %d, change %d (newcomer %q, lost %q): key %#x moves from %q to %q", seed, step, newcomer, lost, k, was, is)
				}
				if is != was {
					n++
				}
			}
			changes++
			moved += n
			least += float64(len(keys)) / float64(max(len(before.liveSlots), len(after.liveSlots)))
			if before.Digest() == after.Digest() {
				t.Fatalf("seed %d, change %d: the digest did not change", seed, step)
			}
			before = after
		}
	}
	t.Logf("%d changes moved %d keys, %.4f of the least possible number", changes, moved, float64(moved)/least)
	if f := float64(moved) / least; f < 0.98 || f > 1.02 {
		t.Errorf("%d changes moved %.4f of the least possible number of keys, want 0.98 to 1.02", changes, f)
	}
}

// The keys of a lost member move to all other members in about equal shares.
func TestRingLossSpreads(t *testing.T) {
	keys := ringKeys(50_000)
	all := everyNth(16, 1)
	before := ringOf(16, all...)
	for _, lost := range []int{0, 7, 15} {
		after := ringOf(16, slices.Delete(slices.Clone(all), lost, lost+1)...)
		got, total := map[string]int{}, 0
		for _, k := range keys {
			if owner(before, k) == fmt.Sprint("m", lost) {
				got[owner(after, k)]++
				total++
			}
		}
		mean := float64(total) / 15
		for name, n := range got {
			if len(got) != 15 || math.Abs(float64(n)-mean) > 5*math.Sqrt(mean) {
				t.Errorf("loss of slot %d: %s, one of %d members, gets %d keys, want about %.0f", lost, name, len(got), n, mean)
			}
		}
	}
}

// Several members join in empty slots and in new buckets, and are heard of one by one, in any
// order. A key that has the same owner before the first join and after the last join also has that
// owner in between.
func TestRingGrowthHeardOutOfOrder(t *testing.T) {
	keys := ringKeys(2000)
	seed0 := testSeed(t, 1)
	for seed := seed0; seed < seed0+20; seed++ {
		rng := rand.New(rand.NewPCG(seed, 4))
		old := []int{0, 2, 3, 5} // slots 1 and 4 are empty
		news := []int{1, 6, 7, 8, 9}
		first, last := ringOf(6, old...), ringOf(10, append(slices.Clone(old), news...)...)
		rng.Shuffle(len(news), func(i, j int) { news[i], news[j] = news[j], news[i] })
		for n := range news {
			mid := ringOf(0, append(slices.Clone(old), news[:n]...)...)
			for _, k := range keys {
				if is := owner(last, k); is == owner(first, k) && owner(mid, k) != is {
					t.Fatalf("seed %d: after slots %v joined, key %#x is owned by %q; before and at the end by %q", seed, news[:n], k, owner(mid, k), is)
				}
			}
		}
	}
}

// While members are lost one by one, in any order, each key has a live owner, and its owner changes
// only when the owner is lost.
func TestRingDownToLast(t *testing.T) {
	slots := []int{1, 2, 5, 6, 9}
	first := testSeed(t, 1)
	for i, k := range ringKeys(500) {
		rng := rand.New(rand.NewPCG(first+uint64(i), 5))
		left := slices.Clone(slots)
		for own := owner(ringOf(12, left...), k); len(left) > 1; {
			lost := rng.IntN(len(left))
			name := fmt.Sprint("m", left[lost])
			left = slices.Delete(left, lost, lost+1)
			after := owner(ringOf(12, left...), k)
			if !slices.Contains(left, slotOfName(after)) || own != name && after != own {
				t.Fatalf("key %#x: owner %q becomes %q after the loss of %q", k, own, after, name)
			}
			own = after
		}
	}
}

// slotOfName returns the slot of a member of ringOf, and -1 for an empty name.
func slotOfName(name string) int {
	slot := -1
	fmt.Sscanf(name, "m%d", &slot)
	return slot
}

// A ring without a valid claim has no owner for any key.
func TestRingWithoutMembers(t *testing.T) {
	for _, r := range []*Ring{NewRing(nil, 0), NewRing(nil, 7), NewRing([]Claim{{Name: "none"}}, -1)} {
		if name, ok := r.Owner(1); ok || name != "" {
			t.Errorf("ring without live members: got owner %q, want none", name)
		}
	}
}

// Owner finds the only live slot, even among MaxSlots buckets. If no jump finds a live slot, the
// owner is the member that holds the lowest live slot.
func TestRingFindsLiveSlot(t *testing.T) {
	if name, ok := ringOf(9, 4).Owner(1); !ok || name != "m4" {
		t.Errorf("one member in 9 buckets: got owner %q, want m4", name)
	}
	if far := ringOf(MaxSlots, MaxSlots-1); owner(far, 12345) != fmt.Sprint("m", MaxSlots-1) {
		t.Errorf("one member in %d buckets: got owner %q, want the member", MaxSlots, owner(far, 12345))
	}
	if got := ringOf(9, 3, 4, 8).liveSlotFor(1, 0); got != 3 {
		t.Errorf("no jump allowed: got slot %d, want the lowest live slot 3", got)
	}
}

// Claims to slots outside 0 to MaxSlots-1 are ignored and do not raise the number of buckets. The
// ring has a bucket for the slot of each valid claim, and at most MaxSlots buckets.
func TestRingBuckets(t *testing.T) {
	beyond := NewRing([]Claim{{Slot: MaxSlots, Lamport: 1, Name: "a"}, {Slot: -1, Lamport: 1, Name: "b"}, {Slot: 2, Lamport: 1, Name: "c"}}, math.MaxInt)
	if beyond.Buckets() != MaxSlots || len(beyond.liveSlots) != 1 || owner(beyond, 5) != "c" {
		t.Errorf("invalid claims: got %d buckets and shares %v, want %d buckets and member c only", beyond.Buckets(), beyond.Shares(), MaxSlots)
	}
	if got := ringOf(3, 0, 6).Buckets(); got != 7 {
		t.Errorf("claim to slot 6: got %d buckets, want 7", got)
	}
}

// If two members claim one slot, and neither claim is provisional, the earlier claim wins and the
// other member owns nothing.
func TestRingTwoClaimsToOneSlot(t *testing.T) {
	two := NewRing([]Claim{{Slot: 0, Lamport: 3, Name: "a"}, {Slot: 0, Lamport: 2, Name: "b"}}, 2)
	if len(two.liveSlots) != 1 || owner(two, 1) != "b" {
		t.Errorf("two claims to slot 0: got shares %v, want member b only", two.Shares())
	}
}

// Rings with the same number of buckets and the same holder of each slot have equal digests. Rings
// that differ in either have different digests, unless the hash collides.
func TestRingDigest(t *testing.T) {
	claims := func(names ...string) (c []Claim) {
		for i, name := range names {
			if name != "" {
				c = append(c, Claim{Slot: i, Lamport: 1, Name: name})
			}
		}
		return c
	}
	seen := map[uint64]string{}
	for _, c := range []struct {
		claims  []Claim
		buckets int
	}{
		{nil, 0}, {nil, 1}, {claims("a", "b"), 2}, {claims("b", "a"), 2}, {claims("a", "b"), 3}, {claims("a", "", "b"), 3},
		{claims("ab", ""), 2}, {claims("a", "", "", "b"), 4}, {claims("a\x03b"), 4}, {claims("a", "b\x03\x01c"), 4}, {claims("a", "b", "", "c"), 4},
	} {
		v := NewRing(c.claims, c.buckets).Digest()
		if was := seen[v]; was != "" {
			t.Errorf("ring %v has the digest of ring %s", c, was)
		}
		seen[v] = fmt.Sprint(c)
		again := slices.Clone(c.claims)
		slices.Reverse(again)
		for i := range again {
			again[i].Lamport += 5 // the same claim to the same slot, but with a higher number
		}
		if NewRing(again, c.buckets).Digest() != v {
			t.Errorf("ring %v: the digest depends on the order or the numbers of the claims", c)
		}
	}
}

// Owner allocates no memory.
func TestRingOwnerAllocatesNothing(t *testing.T) {
	r := ringOf(64, everyNth(32, 2)...)
	key := uint64(0)
	if n := testing.AllocsPerRun(100, func() { key++; r.Owner(key) }); n != 0 {
		t.Errorf("got %v allocations per call of Owner, want 0", n)
	}
}

// BenchmarkRingOwner finds owners of different keys, in rings with and without empty slots.
func BenchmarkRingOwner(b *testing.B) {
	for _, c := range []struct{ members, step int }{{3, 1}, {16, 1}, {64, 1}, {3, 2}, {16, 2}, {64, 2}, {3, 21}} {
		b.Run(fmt.Sprintf("%d members in %d buckets", c.members, c.members*c.step), func(b *testing.B) {
			r := ringOf(c.members*c.step, everyNth(c.members, c.step)...)
			b.ReportAllocs()
			for key := uint64(0); b.Loop(); key++ {
				r.Owner(splitmix64(key)) // a new key each time, because the branch predictor would learn a short list of keys
			}
		})
	}
}

// BenchmarkNewRing makes a ring of 100 members.
func BenchmarkNewRing(b *testing.B) {
	var live []Claim
	for i := range 100 {
		live = append(live, Claim{Slot: i, Lamport: uint64(i + 1), Name: fmt.Sprintf("m%03d", i)})
	}
	for b.Loop() {
		NewRing(live, 100)
	}
}
