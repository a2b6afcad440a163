package main

// This file holds the table of members. The table decides which of two records is newer, computes a
// digest of its records, queues updates to pass on, and forgets members some time after they left.
// Merge replaces a record only with a newer one, or adds accusers to a suspicion. The size of the
// table is bounded. Pure: no I/O and no clock. This file must not know of packets, probes or the
// timing of suspicions.

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"hash/fnv"
	"io"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	// MaxMembers is the highest number of members in the table, members that died or left included.
	MaxMembers = 1024
	// tombstoneLife is how long the table keeps the record of a member that has left (a tombstone),
	// unless makeRoom evicts it. Syncs contain a tombstone only during the first half of that time.
	// So when a member forgets a tombstone at the end of that time, no other member still sends it
	// in syncs, and the member does not learn it again.
	tombstoneLife = 48 * time.Hour
	// A member passes on an update retransmitMult·log10(live members + 1) times, rounded up.
	// retransmitMult is λ of the SWIM paper, section 4.1.
	retransmitMult = 5
)

// A Member is what this member knows of one member of the ring, which may be this member itself.
// Times are on the caller's monotonic clock.
type Member struct {
	MemberRecord
	Proven          bool           // the session in the record has proven itself: it has answered a request of this member
	Window          ReplayWindow   // packet counters received from the proven session, to recognize replays
	KnowsOurSession bool           // this member's session has proven itself to that member, as far as this member knows
	AddrPort        netip.AddrPort // Addr parsed; not valid if Addr has a host name
	RTT             time.Duration  // smoothed round-trip time; 0 = unknown
	SuspectedAt     time.Duration  // if suspect: when the suspicion began
	DeadAt          time.Duration  // if suspect: when the member will be declared dead
	FinalPings      int            // if suspect: pings sent shortly before DeadAt
	DiedAt          time.Duration  // when the member died or left; negative if that was before the clock's origin
	HeardFrom       netip.AddrPort // where the latest packet of the proven session came from
	HeardAt         time.Duration  // when that packet arrived
	LastSync        time.Duration  // when this member last sent its table to the member; 0 = never
	digestPart      uint64         // stableDigest of the record if MemberTable.Digest includes the record, otherwise 0
	transmits       int            // how often AppendUpdates has counted the record as passed on since it was last queued as an update
}

// PacketDestination returns the address to which packets for m are sent.
func (m *Member) PacketDestination() PacketDestination { return PacketDestination{m.AddrPort, m.Addr} }

// A MemberTable holds all known members, this member included. It is not safe for concurrent use.
type MemberTable struct {
	Members   []*Member     // all known members, in the order in which they became known
	Live      int           // number of members that are alive or suspect, this member included
	Digest    uint64        // XOR of the digestPart of all members
	ChangedAt time.Duration // when Digest last changed
	Version   uint64        // number of changes of Digest
	byName    map[string]*Member
	updates   []*Member // members whose records are queued as updates
}

// Get returns the member named name, or nil if the table does not have it.
func (t *MemberTable) Get(name string) *Member { return t.byName[name] }

// Merge makes r the record of the member named r.Name if r supersedes the member's record in the
// table, and returns the member. It adds a member that the table does not have. If both records are
// suspicions of the same incarnation, the record gets accusers of both, up to MaxAccusers. Merge
// returns nil if it has changed nothing: r is not newer and adds no accuser, or addNameOnly cannot
// add the member.
func (t *MemberTable) Merge(now time.Duration, r MemberRecord) (changed *Member) {
	m := t.byName[r.Name]
	switch {
	case m == nil:
		if m = t.addNameOnly(&r); m == nil {
			return nil
		}
	case r.isSameSuspicion(&m.MemberRecord):
		accusers := mergeAccusers(m.Accusers, r.Accusers)
		if len(accusers) == len(m.Accusers) {
			return nil
		}
		r.Accusers = accusers
	case !r.supersedes(&m.MemberRecord):
		return nil
	case r.Session > m.Session:
		m.Proven, m.KnowsOurSession = false, false
	}
	t.SetRecord(now, m, r)
	return m
}

// addNameOnly adds a member with r's name, and returns it. The caller must then set the member's
// record. addNameOnly returns nil if the table is full of live members. It also returns nil if the
// member of r died or left at least half of tombstoneLife ago, because syncs then no longer contain
// r.
func (t *MemberTable) addNameOnly(r *MemberRecord) *Member {
	if time.Duration(r.Age)*time.Second >= tombstoneLife/2 || !t.makeRoom() {
		return nil
	}
	if t.byName == nil {
		t.byName = map[string]*Member{}
	}
	m := &Member{MemberRecord: MemberRecord{Name: r.Name, State: StateDead}}
	t.byName[r.Name] = m
	t.Members = append(t.Members, m)
	return m
}

// supersedes reports whether r is newer than old, another record of the same member, so that r is
// believed. Within one session, a record with StateLeft is newer than every record with another
// state.
func (r *MemberRecord) supersedes(old *MemberRecord) bool {
	switch {
	case r.Session != old.Session:
		return r.Session > old.Session
	case old.State == StateLeft || r.State == StateLeft:
		return old.State != StateLeft
	case r.Incarnation != old.Incarnation:
		return r.Incarnation > old.Incarnation
	}
	return r.State > old.State
}

// isSameSuspicion reports whether r and old, two records of one member, both suspect the same
// session and incarnation.
func (r *MemberRecord) isSameSuspicion(old *MemberRecord) bool {
	return r.State == StateSuspect && old.State == StateSuspect && r.Session == old.Session && r.Incarnation == old.Incarnation
}

// mergeAccusers appends to accusers each element of more that accusers does not contain yet, as
// long as accusers has less than MaxAccusers elements. It returns the result.
func mergeAccusers(accusers, more []uint64) []uint64 {
	for _, a := range more {
		if !slices.Contains(accusers, a) && len(accusers) < MaxAccusers {
			accusers = append(accusers, a)
		}
	}
	return accusers
}

// accuserID returns a hash of a member's name. The hash stands for the member in
// MemberRecord.Accusers.
func accuserID(name string) uint64 {
	h := fnv.New64a()
	io.WriteString(h, name)
	return h.Sum64()
}

// SetRecord makes r the record of m, even if r is older, and updates Live and Digest. r.Name must
// be the name of m.
func (t *MemberTable) SetRecord(now time.Duration, m *Member, r MemberRecord) {
	if m.State.IsLive() {
		t.Live--
	}
	if r.State.IsLive() {
		t.Live++
	} else {
		m.DiedAt = now - time.Duration(r.Age)*time.Second
	}
	m.MemberRecord = r
	m.AddrPort, _ = netip.ParseAddrPort(r.Addr)
	t.setDigestPart(now, m, r.stableDigest())
}

// setDigestPart replaces m's part of Digest. part is the stableDigest of m's record, or 0 if Digest
// must not include the record. If Digest changes, it sets ChangedAt to now and raises Version.
func (t *MemberTable) setDigestPart(now time.Duration, m *Member, part uint64) {
	if part != m.digestPart {
		t.Digest ^= m.digestPart ^ part
		m.digestPart = part
		t.ChangedAt = now
		t.Version++
	}
}

// stableDigest returns 64 bits of the SHA-256 of r's encoding. It leaves out the parts of r that
// change often without effect on the ring: suspicions, the incarnation, which rises when the member
// refutes a suspicion, and the age.
func (r *MemberRecord) stableDigest() uint64 {
	lasting := *r
	lasting.Incarnation, lasting.Accusers, lasting.Age = 0, nil, 0
	if r.State == StateSuspect {
		lasting.State = StateAlive
	}
	var buf [maxRecord]byte
	sum := sha256.Sum256(AppendMember(buf[:0], &lasting))
	return binary.LittleEndian.Uint64(sum[:])
}

// IsSentInSync reports whether syncs contain the record of m. They do if m is live, or died or left
// less than half of tombstoneLife ago.
func (m *Member) IsSentInSync(now time.Duration) bool {
	return m.State.IsLive() || now-m.DiedAt < tombstoneLife/2
}

// ForgetLeftMembers removes from the table each member that left at least tombstoneLife ago. It
// also removes from the digest the record of each member that left or died at least half of
// tombstoneLife ago. A member that died stays in the table while there is room, because it may be
// behind a partition that ends some day.
func (t *MemberTable) ForgetLeftMembers(now time.Duration) {
	t.Members = slices.DeleteFunc(t.Members, func(m *Member) bool {
		if !m.IsSentInSync(now) {
			t.setDigestPart(now, m, 0)
		}
		expired := m.State == StateLeft && now-m.DiedAt >= tombstoneLife
		if expired {
			t.unindexMember(m)
		}
		return expired
	})
}

// unindexMember removes m from byName and updates, but not from Members.
func (t *MemberTable) unindexMember(m *Member) {
	delete(t.byName, m.Name)
	t.updates = slices.DeleteFunc(t.updates, func(o *Member) bool { return o == m })
}

// makeRoom makes room in the table for one more member. If the table is full, it evicts the member
// that died or left the longest time ago. It returns false if the table is full of live members.
func (t *MemberTable) makeRoom() bool {
	if len(t.Members) < MaxMembers {
		return true
	}
	oldest := -1
	for i, m := range t.Members {
		if !m.State.IsLive() && (oldest < 0 || m.DiedAt < t.Members[oldest].DiedAt) {
			oldest = i
		}
	}
	if oldest < 0 {
		return false
	}
	m := t.Members[oldest]
	t.setDigestPart(t.ChangedAt, m, 0)
	t.unindexMember(m)
	t.Members = slices.Delete(t.Members, oldest, oldest+1)
	return true
}

// QueueUpdate queues m's record as an update, which AppendUpdates adds to packets. If the record is
// queued already, the count of its transmissions starts again at 0.
func (t *MemberTable) QueueUpdate(m *Member) {
	m.transmits = 0
	if !slices.Contains(t.updates, m) {
		t.updates = append(t.updates, m)
	}
}

// HasUpdates reports whether any update is queued.
func (t *MemberTable) HasUpdates() bool { return len(t.updates) > 0 }

// AppendUpdates appends queued updates to b, a packet to the member receiver, while b stays within
// maxLen bytes. Updates that were passed on least often come first. AppendUpdates omits receiver's
// own record, but counts it as passed on. Updates count as passed on only if markSent is true. The
// caller should pass false unless it knows that receiver believes this member's packets.
func (t *MemberTable) AppendUpdates(b []byte, now time.Duration, maxLen int, receiver string, markSent bool) []byte {
	if len(t.updates) == 0 {
		return b
	}
	slices.SortStableFunc(t.updates, func(a, b *Member) int { return cmp.Compare(a.transmits, b.transmits) })
	limit := int(math.Ceil(retransmitMult * math.Log10(float64(t.Live)+1)))
	for _, m := range t.updates {
		if m.Name != receiver {
			longer := m.Append(b, now)
			if len(longer) > maxLen {
				break
			}
			b = longer
		}
		if markSent {
			m.transmits++
		}
	}
	t.updates = slices.DeleteFunc(t.updates, func(m *Member) bool { return m.transmits >= limit })
	return b
}

// Append appends m's record, with its age at the time now, to the packet b.
func (m *Member) Append(b []byte, now time.Duration) []byte {
	r := m.MemberRecord
	r.Age = m.secondsDead(now)
	return AppendMember(b, &r)
}

// secondsDead returns the number of whole seconds from m's death or leave to now, and 0 if m is
// live.
func (m *Member) secondsDead(now time.Duration) uint32 {
	if m.State.IsLive() {
		return 0
	}
	return uint32(max(0, now-m.DiedAt) / time.Second)
}

// A GossipView is the ring as one member sees it at one time.
type GossipView struct {
	Version    uint64           // rises when Buckets or a record in Members changes; suspicions, incarnations and ages do not count as changes
	Self       string           // name of the member whose view this is
	Buckets    uint16           // highest slot ever claimed, plus one, as far as this member knows
	MaxLamport uint64           // highest claim number seen in any record
	Joined     bool             // this member has received another member's table since its session began
	Members    []MemberSnapshot // all known members, sorted by name
}

// A MemberSnapshot is one member in a GossipView.
type MemberSnapshot struct {
	MemberRecord               // Age is the age at the time of the snapshot
	RTT          time.Duration // smoothed round-trip time; 0 = unknown
	Heard        time.Duration // time since a packet of the member's proven session last arrived; negative if none has
}

// Snapshots returns a copy of each member's record, sorted by name. Ages are at the time now.
func (t *MemberTable) Snapshots(now time.Duration) []MemberSnapshot {
	snapshots := make([]MemberSnapshot, len(t.Members))
	for i, m := range t.Members {
		r := m.MemberRecord
		r.Accusers = slices.Clone(r.Accusers)
		r.Age = m.secondsDead(now)
		snapshots[i] = MemberSnapshot{MemberRecord: r, RTT: m.RTT, Heard: -1}
		if m.HeardFrom.IsValid() {
			snapshots[i].Heard = now - m.HeardAt
		}
	}
	slices.SortFunc(snapshots, func(a, b MemberSnapshot) int { return strings.Compare(a.Name, b.Name) })
	return snapshots
}

// RandomMember returns a random member, other than self, for which isEligible is true. It returns
// nil if there is no such member.
func (t *MemberTable) RandomMember(rng *rand.Rand, self *Member, isEligible func(*Member) bool) (chosen *Member) {
	n := 0
	for _, m := range t.Members {
		if m != self && isEligible(m) {
			if n++; rng.IntN(n) == 0 {
				chosen = m
			}
		}
	}
	return chosen
}

// A ProbeOrder goes through all live members in random order, and then again in another random
// order. So a live member waits less than two rounds for its turn (SWIM, section 4.3).
type ProbeOrder struct {
	round []*Member
	next  int // index in round of the member to consider next
}

// Next returns the next live member for which isEligible is true, or nil if there is none.
func (o *ProbeOrder) Next(t *MemberTable, rng *rand.Rand, isEligible func(*Member) bool) *Member {
	for range 2 {
		for o.next < len(o.round) {
			m := o.round[o.next]
			o.next++
			if m.State.IsLive() && t.Get(m.Name) == m && isEligible(m) {
				return m
			}
		}
		o.round, o.next = append(o.round[:0], t.Members...), 0
		rng.Shuffle(len(o.round), func(i, j int) { o.round[i], o.round[j] = o.round[j], o.round[i] })
	}
	return nil
}

// Insert puts m, a member that has just become live, at a random place among the members that the
// present round has not reached yet.
func (o *ProbeOrder) Insert(m *Member, rng *rand.Rand) {
	o.round = slices.Insert(o.round, o.next+rng.IntN(len(o.round)-o.next+1), m)
}
