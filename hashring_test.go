package main

// Tests of the ring: balance, the keys that a change moves, and the agreement of members, for
// random histories of members and random orders in which claims are heard. Seeds are in the
// names of subtests and in messages.

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// ringKeys returns the keys of n cluster IDs.
func ringKeys(n int) []uint64 {
	keys := make([]uint64, n)
	for i := range keys {
		sum := sha256.Sum256(fmt.Appendf(nil, "site-%d", i))
		keys[i] = binary.BigEndian.Uint64(sum[:])
	}
	return keys
}

// ringOf returns a ring of members that hold the slots given.
func ringOf(buckets int, slots ...int) *Ring {
	var claims []Claim
	for _, s := range slots {
		claims = append(claims, Claim{Slot: s, Lamport: 1, Name: fmt.Sprintf("m%d", s)})
	}
	return NewRing(claims, buckets)
}

// everyNth returns n slots, one in every step.
func everyNth(n, step int) []int {
	slots := make([]int, n)
	for i := range slots {
		slots[i] = i * step
	}
	return slots
}

func owner(r *Ring, key uint64) string { name, _ := r.Owner(key); return name }

// Jump's published vectors, and splitmix64's first outputs for the seed 0 (each
// from the state of the one before).
func TestRingHashes(t *testing.T) {
	for _, c := range []struct {
		key     uint64
		n, want int
	}{{1, 1, 0}, {42, 57, 43}, {0xDEAD10CC, 1, 0}, {0xDEAD10CC, 666, 361}, {256, 1024, 520}} {
		if got := jumpHash(c.key, c.n); got != c.want {
			t.Errorf("jump(%#x, %d) = %d, want %d", c.key, c.n, got, c.want)
		}
	}
	const gamma = 0x9e3779b97f4a7c15
	state := uint64(0)
	for i, want := range []uint64{0xe220a8397b1dcdaf, 0x6e789e6aa1b965f4, 0x06c45d188009454f} {
		if got := splitmix64(state); got != want {
			t.Errorf("output %d is %#x, want %#x", i, got, want)
		}
		state += gamma
	}
}

// The largest share is at most what counting a million random keys explains, and
// at 16 members at most 1.02 of the mean. Holes cost nothing of it.
func TestSweepRingBalance(t *testing.T) {
	sweep(t)
	t.Parallel()
	keys := ringKeys(1_000_000)
	for n := 1; n <= 64; n++ {
		for _, step := range []int{1, 2} { // all buckets live; every other one
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
				t.Errorf("%d members of %d buckets: largest share is %.4f of the mean, want ≤ %.4f", n, n*step, ratio, bound)
			}
			if len(keys) == 1_000_000 {
				t.Logf("%2d members of %3d buckets: largest share / mean %.4f, smallest %.4f", n, n*step, ratio, float64(slices.Min(count))/mean)
			}
			total := 0.0
			shares := r.Shares()
			for i, s := range slots {
				share := shares[r.holders[s]]
				if got := float64(count[i]) / float64(len(keys)); math.Abs(got-share) > 6*math.Sqrt(share/float64(len(keys))) {
					t.Errorf("%d members: share of slot %d is %.4f, counted %.4f", n, s, share, got)
				}
				total += share
			}
			if math.Abs(total-1) > 1e-9 || len(shares) != n {
				t.Errorf("%d members: %d shares, of %v in all", n, len(shares), total)
			}
		}
	}
}

// Through any history of joins (into holes and by growth), losses and returns,
// each change moves keys to the newcomer only, or from the lost one only; about as
// many as there must be; whatever order the claims were heard in.
func TestRingChangeMovesOnlyItsOwn(t *testing.T) {
	keys := ringKeys(1000)
	changes, moved, least := 0, 0, 0.0
	for seed := range uint64(30) {
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
				if rng.IntN(3) > 0 || names[s] == "" { // else the member that had the slot returns
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
				t.Fatalf("seed %d, change %d: version stays", seed, step)
			}
			before = after
		}
	}
	t.Logf("%d changes moved %d keys, %.4f of the least possible", changes, moved, float64(moved)/least)
	if f := float64(moved) / least; f < 0.98 || f > 1.02 {
		t.Errorf("%d changes moved %.4f of the keys that they must", changes, f)
	}
}

// The loss of one member spreads its keys over all others alike.
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
				t.Errorf("loss of slot %d: %s of %d gets %d keys, mean %.0f", lost, name, len(got), n, mean)
			}
		}
	}
}

// When buckets grow by several at once and their members are heard of one by one,
// a key whose owner is in the end an old one has not moved on the way.
func TestRingGrowthHeardOutOfOrder(t *testing.T) {
	keys := ringKeys(2000)
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 4))
		old := []int{0, 2, 3, 5} // 1 and 4 are holes
		news := []int{1, 6, 7, 8, 9}
		first, last := ringOf(6, old...), ringOf(10, append(slices.Clone(old), news...)...)
		rng.Shuffle(len(news), func(i, j int) { news[i], news[j] = news[j], news[i] })
		for n := range news {
			mid := ringOf(0, append(slices.Clone(old), news[:n]...)...)
			for _, k := range keys {
				if is := owner(last, k); is == owner(first, k) && owner(mid, k) != is {
					t.Fatalf("seed %d: after %v key %#x is at %q, from and to %q", seed, news[:n], k, owner(mid, k), is)
				}
			}
		}
	}
}

// A key whose owner is lost gets the same next owner whichever order the members are lost in:
// members are lost one by one, down to the last, and each key has a live owner, which changes
// only when that owner is lost.
func TestRingDownToLast(t *testing.T) {
	slots := []int{1, 2, 5, 6, 9}
	for i, k := range ringKeys(500) {
		rng := rand.New(rand.NewPCG(uint64(i), 5))
		left := slices.Clone(slots)
		for own := owner(ringOf(12, left...), k); len(left) > 1; {
			lost := rng.IntN(len(left))
			name := fmt.Sprint("m", left[lost])
			left = slices.Delete(left, lost, lost+1)
			after := owner(ringOf(12, left...), k)
			if !slices.Contains(left, slotOfName(after)) || own != name && after != own {
				t.Fatalf("key %#x: owner %q, after the loss of %q %q", k, own, name, after)
			}
			own = after
		}
	}
}

// slotOfName returns the slot of a member of ringOf; -1 if it is none.
func slotOfName(name string) int {
	slot := -1
	fmt.Sscanf(name, "m%d", &slot)
	return slot
}

func TestRingEdges(t *testing.T) {
	for _, r := range []*Ring{NewRing(nil, 0), NewRing(nil, 7), NewRing([]Claim{{Name: "none"}}, -1)} {
		if name, ok := r.Owner(1); ok || name != "" {
			t.Errorf("nobody is live, yet %q owns", name)
		}
	}
	one := ringOf(9, 4)
	if name, ok := one.Owner(1); !ok || name != "m4" {
		t.Errorf("the only member does not own: %q", name)
	}
	// When all jumps miss, the lowest live slot.
	if got := ringOf(9, 3, 4, 8).liveSlotFor(1, 0); got != 3 {
		t.Errorf("without a jump: slot %d, want 3", got)
	}
	if far := ringOf(MaxSlots, MaxSlots-1); owner(far, 12345) != fmt.Sprint("m", MaxSlots-1) {
		t.Error("one live slot in all that there can be is not found")
	}
	// Claims beyond the slots there are count as none, and never raise the buckets.
	beyond := NewRing([]Claim{{Slot: MaxSlots, Lamport: 1, Name: "a"}, {Slot: -1, Lamport: 1, Name: "b"}, {Slot: 2, Lamport: 1, Name: "c"}}, 1<<40)
	if beyond.Buckets() != MaxSlots || len(beyond.liveSlots) != 1 || owner(beyond, 5) != "c" {
		t.Errorf("%d buckets, shares %v", beyond.Buckets(), beyond.Shares())
	}
	if got := ringOf(3, 0, 6).Buckets(); got != 7 {
		t.Errorf("%d buckets do not cover slot 6", got)
	}
	// Where two claim a slot one has it, and the other has nothing, not the slot it
	// will claim.
	two := NewRing([]Claim{{Slot: 0, Lamport: 3, Name: "a"}, {Slot: 0, Lamport: 2, Name: "b"}}, 2)
	if len(two.liveSlots) != 1 || owner(two, 1) != "b" {
		t.Errorf("of two with one slot, shares are %v", two.Shares())
	}
}

// Versions are equal for equal live slots, holders and buckets, and only then.
func TestRingVersion(t *testing.T) {
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
			t.Errorf("%v has the version of %s", c, was)
		}
		seen[v] = fmt.Sprint(c)
		again := slices.Clone(c.claims)
		slices.Reverse(again)
		for i := range again {
			again[i].Lamport += 5 // a claim made anew
		}
		if NewRing(again, c.buckets).Digest() != v {
			t.Errorf("%v: version depends on order or number", c)
		}
	}
}

func TestResolve(t *testing.T) {
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
		provisional    bool // of "me"
		live, reserved claims
		highest        uint64
		want           Claim
	}{
		{"the first of all", false, nil, nil, 0, c("me", 0, 1)},
		{"the first of all, with seeds that are silent", true, nil, nil, 0, prov("me", 0, 1)},
		{"a newcomer takes the lowest free slot, numbered after all", false, claims{c("a", 0, 4), c("b", 2, 9)}, nil, 3, c("me", 1, 10)},
		{"the highest number may be of one long gone", false, claims{c("a", 0, 4)}, nil, 70, c("me", 1, 71)},
		{"reserved slots are not taken", false, claims{c("a", 0, 1)}, claims{c("b", 1, 2), c("d", 2, 3)}, 0, c("me", 3, 4)},
		{"claims of nothing and beyond the slots reserve nothing", false, claims{c("a", 0, 1)}, claims{c("b", 1, 0), c("d", MaxSlots, 2), c("e", -1, 2)}, 0, c("me", 1, 3)},
		{"who holds its slot stays", false, claims{c("a", 0, 1), c("me", 5, 2)}, claims{c("b", 1, 3)}, 0, c("me", 5, 2)},
		{"also on a slot reserved meanwhile", false, claims{c("me", 1, 4)}, claims{c("b", 1, 3)}, 0, c("me", 1, 4)},
		{"the lower number wins", false, claims{c("a", 0, 3), c("me", 0, 2)}, nil, 0, c("me", 0, 2)},
		{"the higher loses, and is made anew", false, claims{c("a", 0, 2), c("me", 0, 3)}, nil, 0, c("me", 1, 4)},
		{"then the name", false, claims{c("a", 0, 2), c("me", 0, 2)}, nil, 0, c("me", 1, 3)},
		{"then the name, won", false, claims{c("z", 0, 2), c("me", 0, 2)}, nil, 0, c("me", 0, 2)},
		{"provisional loses to any other", false, claims{c("z", 0, 9), prov("me", 0, 2)}, nil, 0, c("me", 1, 10)},
		{"of two provisional the number decides", true, claims{prov("z", 0, 3), prov("me", 0, 2)}, nil, 0, prov("me", 0, 2)},
		{"a loser that still reached no seed", true, claims{prov("a", 0, 2), prov("me", 0, 2)}, nil, 0, prov("me", 1, 3)},
		{"provisional becomes firm, but late", false, claims{prov("me", 0, 2), c("a", 1, 7)}, nil, 0, c("me", 0, 8)},
		{"firm stays firm when seeds go silent", true, claims{c("me", 0, 2)}, nil, 0, c("me", 0, 2)},
		{"the i-th loser takes the i-th free slot", false, claims{c("a", 0, 1), c("b", 0, 2), c("d", 0, 3), c("me", 0, 4), c("e", 2, 9)}, nil, 0, c("me", 4, 10)},
		{"losers of any slot, firm ones first", false, claims{c("a", 0, 1), c("b", 1, 1), prov("d", 0, 2), c("me", 1, 8)}, nil, 0, c("me", 2, 9)},
		{"newcomers come after losers, by name", false, claims{c("a", 0, 1), c("z", 0, 2), {Name: "b"}, {Name: "n"}}, nil, 0, c("me", 3, 3)},
		{"a slot refused is no slot", false, claims{c("me", MaxSlots, 1), c("a", 0, 2)}, nil, 0, c("me", 1, 3)},
		{"a start with the stored claim", false, claims{c("a", 0, 1)}, claims{c("me", 7, 2)}, 0, c("me", 7, 2)},
		{"a stored provisional claim, seeds reached", false, claims{c("a", 0, 1)}, claims{prov("me", 7, 2)}, 0, c("me", 7, 3)},
		{"what others reserve for its name and what it stored: the later", false, nil, claims{c("me", 7, 2), c("me", 3, 5)}, 0, c("me", 3, 5)},
		{"who returns after its slot was given away puts nobody out", false, claims{c("a", 0, 6)}, claims{c("me", 0, 1)}, 0, c("me", 1, 7)},
		{"what another returning member will take is not free", false, claims{{Name: "b"}}, claims{c("b", 0, 1)}, 0, c("me", 1, 2)},
		{"two return to one slot", false, claims{{Name: "b"}}, claims{c("b", 0, 1), c("me", 0, 2)}, 0, c("me", 1, 3)},
		{"no reservation for who is back elsewhere", false, claims{c("b", 4, 3)}, claims{c("b", 0, 1)}, 0, c("me", 0, 4)},
		{"no slot is free", false, full, nil, 0, Claim{Name: "me"}},
		{"the numbers have ended", false, claims{c("a", 0, math.MaxUint64)}, nil, 0, c("me", 1, math.MaxUint64)},
	} {
		announced := Claim{}
		for _, c := range tt.live {
			if c.Name == "me" && c.isValid() {
				announced = c
			}
		}
		got, changed := ChooseClaim("me", tt.provisional, tt.live, tt.reserved, tt.highest)
		if got != tt.want || changed != (got != announced && got.Lamport > 0) {
			t.Errorf("%s: %+v, changed %v; want %+v", tt.name, got, changed, tt.want)
		}
	}
	if got, changed := ChooseClaim("me", false, append(slices.Clone(full), c("me", 0, 2)), nil, 0); got.Lamport != 0 || !changed {
		t.Errorf("a loser without a free slot: %+v, changed %v", got, changed)
	}
}

// Members that have heard the same, in whatever order, agree on what each is to
// claim: no two on one slot, nobody moves that need not, and when all have done
// so, nobody is to change again.
func TestResolveAgrees(t *testing.T) {
	for seed := range uint64(150) {
		rng := rand.New(rand.NewPCG(seed, 5))
		var live, reserved []Claim
		for i := range rng.IntN(12) + 1 {
			c := Claim{Slot: rng.IntN(6), Lamport: rng.Uint64N(4), Name: fmt.Sprintf("m%02d", i), Provisional: rng.IntN(3) == 0}
			switch rng.IntN(4) {
			case 0:
				reserved = append(reserved, c)
				c.Lamport = 0
				if rng.IntN(2) == 0 { // it is starting
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
					t.Fatalf("seed %d: %s is to claim %+v or %+v, as claims were heard", seed, m.Name, was, got)
				}
				settled[m.Name] = got
			}
		}
		if len(slices.Compact(rings)) != 1 {
			t.Fatalf("seed %d: the ring depends on the order", seed)
		}
		held := map[int]string{}
		for name, c := range settled {
			if was := held[c.Slot]; was != "" || !c.isValid() {
				t.Fatalf("seed %d: %s is to claim %+v, as %q", seed, name, c, was)
			}
			held[c.Slot] = name
		}
		winners := NewRing(live, 0)
		for slot, name := range winners.holders {
			if name != "" && held[slot] != name {
				t.Fatalf("seed %d: %s won slot %d and is to leave it", seed, name, slot)
			}
		}
		after := slices.Collect(maps.Values(settled))
		for _, c := range after {
			if again, changed := ChooseClaim(c.Name, false, after, reserved, 0); changed {
				t.Fatalf("seed %d: %s settled on %+v and is to change to %+v", seed, c.Name, c, again)
			}
		}
	}
}

// ringMember is a member in a simulation of claims alone: what it has heard, and
// how often its slot has changed since its first.
type ringMember struct {
	name    string
	heard   map[string]Claim
	highest uint64
	slot    int
	changes int
	quiet   int // exchanges since it last heard something new
	dirty   bool
}

func (m *ringMember) hear(c Claim) {
	m.highest = max(m.highest, c.Lamport)
	if was, had := m.heard[c.Name]; c.Name != m.name && (!had || c.Lamport > was.Lamport) {
		m.heard[c.Name] = c
		m.quiet, m.dirty = 0, true
	}
}

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

// settleRing lets members tell one another all they have heard, in random pairs,
// until all have heard the same and each holds a slot of its own. Each resolves
// once it has heard nothing new in quiet exchanges. It returns exchanges per member.
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

// A hundred that start at once, whatever each claimed before it heard another,
// come to hold the hundred lowest slots. When each waits for three exchanges
// without news before it acts, hardly any slot changes more often than it must;
// when none waits, they settle all the same.
func TestRingManyStartAtOnce(t *testing.T) {
	t.Parallel()
	const n = 100
	for _, start := range []struct {
		name    string
		claim   Claim
		quiet   int
		mean    float64 // changes of slot per member, at most
		highest int     // of one member
	}{
		{"no claim, waiting", Claim{}, 3, 0.1, 2},
		{"all claim slot 0, waiting", Claim{Lamport: 1}, 3, 1.1, 3},
		{"all claim slot 0 provisionally, waiting", Claim{Lamport: 1, Provisional: true}, 3, 1.1, 3},
		{"all claim slot 0, at once", Claim{Lamport: 1}, 0, 4, 20},
	} {
		for seed := range uint64(2) {
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
				t.Logf("%d exchanges per member, %.2f changes of slot per member, %d at most", rounds, float64(changes)/n, most)
				r := NewRing(slices.Collect(maps.Values(members[0].heard)), 0)
				if rounds < 0 || len(slots) != n || r.Buckets() != n || len(r.liveSlots) != n {
					t.Errorf("rounds %d, slots %d, buckets %d, members on the ring %d", rounds, len(slots), r.Buckets(), len(r.liveSlots))
				}
				if float64(changes)/n > start.mean || most > start.highest {
					t.Errorf("%.2f changes of slot per member, %d at most; want ≤ %v and ≤ %d", float64(changes)/n, most, start.mean, start.highest)
				}
			})
		}
	}
}

// Two that each started alone, or two clusters of several, join: those with the
// better claims keep their slots, the others move, twice at most.
func TestRingHalvesJoin(t *testing.T) {
	for _, tt := range []struct {
		name string
		a, b []Claim // one side's, the other's
		keep string
	}{
		{"lower number", []Claim{{Lamport: 2, Name: "a"}}, []Claim{{Lamport: 1, Name: "b"}}, "b"},
		{"lower name", []Claim{{Lamport: 1, Name: "a"}}, []Claim{{Lamport: 1, Name: "b"}}, "a"},
		{"not provisional", []Claim{{Lamport: 1, Name: "a", Provisional: true}}, []Claim{{Lamport: 5, Name: "b"}}, "b"},
		{"both provisional", []Claim{{Lamport: 2, Name: "a", Provisional: true}}, []Claim{{Lamport: 1, Name: "b", Provisional: true}}, "b"},
		{"several", []Claim{{Lamport: 1, Name: "a"}, {Lamport: 2, Name: "c", Slot: 1}}, []Claim{{Lamport: 1, Name: "b"}, {Lamport: 3, Name: "d", Slot: 1}}, "a c"},
	} {
		for seed := range uint64(5) {
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
				t.Fatalf("%s, seed %d: does not settle", tt.name, seed)
			}
			slots := map[int]bool{}
			for _, m := range members {
				slots[m.slot] = true
				if kept := slices.Contains(strings.Fields(tt.keep), m.name); kept != (m.changes == 0) || m.changes > 2 {
					t.Errorf("%s, seed %d: %s changed %d times", tt.name, seed, m.name, m.changes)
				}
			}
			if len(slots) != len(members) {
				t.Errorf("%s, seed %d: %d slots for %d members", tt.name, seed, len(slots), len(members))
			}
		}
	}
}

func TestRingOwnerAllocatesNothing(t *testing.T) {
	r := ringOf(64, everyNth(32, 2)...)
	key := uint64(0)
	if n := testing.AllocsPerRun(100, func() { key++; r.Owner(key) }); n != 0 {
		t.Errorf("%v allocations per lookup", n)
	}
}

// Whatever is claimed, rings and claims stay within the slots, and members that
// apply what ChooseClaim says are done.
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
			t.Fatalf("%d buckets, %d of %d claims", r.Buckets(), len(r.liveSlots), len(live))
		}
		own, ok := r.Owner(uint64(buckets))
		if ok != (len(r.liveSlots) > 0) || ok && !slices.Contains(r.holders, own) {
			t.Fatalf("owner %q of %d", own, len(r.liveSlots))
		}
		var after []Claim
		for name := range latestClaims(live) {
			c, _ := ChooseClaim(name, false, live, reserved, 0)
			if !c.isValid() {
				t.Fatalf("%s is to claim %+v", name, c)
			}
			after = append(after, c)
		}
		if last {
			return // without numbers to come, later claims are not told from earlier ones
		}
		for _, c := range after {
			if again, changed := ChooseClaim(c.Name, false, after, reserved, 0); changed {
				t.Fatalf("settled on %+v, then %+v", c, again)
			}
		}
	})
}

func BenchmarkRingOwner(b *testing.B) {
	for _, c := range []struct{ members, step int }{{3, 1}, {16, 1}, {64, 1}, {3, 2}, {16, 2}, {64, 2}, {3, 21}} {
		b.Run(fmt.Sprintf("%d of %d", c.members, c.members*c.step), func(b *testing.B) {
			r := ringOf(c.members*c.step, everyNth(c.members, c.step)...)
			b.ReportAllocs()
			for key := uint64(0); b.Loop(); key++ {
				r.Owner(splitmix64(key)) // a short list of keys is learnt by the branch predictor
			}
		})
	}
}

func BenchmarkResolve(b *testing.B) {
	var live []Claim
	for i := range 100 {
		live = append(live, Claim{Slot: i / 2, Lamport: uint64(i), Name: fmt.Sprintf("m%03d", i)})
	}
	for b.Loop() {
		ChooseClaim("m099", false, live, nil, 0)
	}
}

func BenchmarkNewRing(b *testing.B) {
	var live []Claim
	for i := range 100 {
		live = append(live, Claim{Slot: i, Lamport: uint64(i + 1), Name: fmt.Sprintf("m%03d", i)})
	}
	for b.Loop() {
		NewRing(live, 100)
	}
}
