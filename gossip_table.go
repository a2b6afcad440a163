package main

// The table of members. It decides which of two records is newer, computes a digest of all records,
// queues updates to pass on, and remembers dead members for a limited time. Only a newer record
// replaces a record of the same name. The table is bounded. Pure: no I/O and no clock. This file
// must not know of packets, probes or the timing of suspicions.

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
	// MaxMembers limits the table, dead members included.
	MaxMembers = 1024
	// tombstoneLife is how long the table remembers that a member has left. Syncs contain this
	// tombstone only during the first half of that time. So when the first member forgets the
	// tombstone, no member sends it in a sync any more, and no member can learn it again.
	tombstoneLife = 48 * time.Hour
	// A member passes on an update retransmitMult·log10(live members + 1) times (retransmitMult is
	// λ of the SWIM paper, section 4.1).
	retransmitMult = 5
)

// A Member is what this member knows of one member of the ring. Times are on the caller's monotonic
// clock.
type Member struct {
	MemberRecord
	Proven          bool           // the session in the record has answered a challenge
	Window          ReplayWindow   // packet counters of the proven session
	KnowsOurSession bool           // as far as this member knows, its own session has proven itself to the other
	AddrPort        netip.AddrPort // Addr parsed; not valid if Addr has a host name
	RTT             time.Duration  // smoothed round-trip time; 0 = unknown
	SuspectedAt     time.Duration  // if suspect: when the suspicion began
	DeadAt          time.Duration  // if suspect: when the member will be declared dead
	FinalPings      int            // if suspect: pings sent shortly before DeadAt
	DiedAt          time.Duration  // when the member died or left; may be negative
	LastSync        time.Duration  // when the table was last sent to the member; 0 = never
	digestPart      uint64         // contribution to the table's Digest; 0 = none
	transmits       int            // how often the record was passed on as an update
}

// PacketDestination returns the address at which m is reached.
func (m *Member) PacketDestination() PacketDestination { return PacketDestination{m.AddrPort, m.Addr} }

// A MemberTable holds all known members, this member included. It is not safe for concurrent use.
type MemberTable struct {
	Members   []*Member     // in the order in which they became known
	Live      int           // members that are alive or suspect
	Digest    uint64        // XOR of the digests of all records that syncs contain
	ChangedAt time.Duration // when Digest last changed
	Version   uint64        // number of changes of Digest
	byName    map[string]*Member
	updates   []*Member // members whose records are queued as updates
}

// Get returns the member with that name, or nil.
func (t *MemberTable) Get(name string) *Member { return t.byName[name] }

// Merge makes r the record of the member r.Name if r is newer than its record, and then returns the
// member. It adds an unknown member. If r and the record suspect the same incarnation, it merges
// their accusers. It returns nil if it has changed nothing: r is not newer, adds no accuser, or
// finds no room in the table.
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

// addNameOnly adds a member with r's name but without a record. It returns nil if the table has no
// room, or if the other members have begun to forget the member.
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

// supersedes reports whether r is believed rather than old, a record of the same name. StateLeft is
// final for its session.
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

// isSameSuspicion reports whether r and old are suspicions of the same incarnation.
func (r *MemberRecord) isSameSuspicion(old *MemberRecord) bool {
	return r.State == StateSuspect && old.State == StateSuspect && r.Session == old.Session && r.Incarnation == old.Incarnation
}

// mergeAccusers appends to accusers all of more that are not in accusers yet. It stops at
// MaxAccusers.
func mergeAccusers(accusers, more []uint64) []uint64 {
	for _, a := range more {
		if !slices.Contains(accusers, a) && len(accusers) < MaxAccusers {
			accusers = append(accusers, a)
		}
	}
	return accusers
}

// accuserID returns a hash of a member's name, which identifies the member in
// MemberRecord.Accusers.
func accuserID(name string) uint64 {
	h := fnv.New64a()
	io.WriteString(h, name)
	return h.Sum64()
}

// SetRecord makes r the record of m. r.Name must be the name of m.
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

// setDigestPart makes part the contribution of m to Digest. If that changes Digest, it also updates
// ChangedAt and Version.
func (t *MemberTable) setDigestPart(now time.Duration, m *Member, part uint64) {
	if part != m.digestPart {
		t.Digest ^= m.digestPart ^ part
		m.digestPart = part
		t.ChangedAt = now
		t.Version++
	}
}

// stableDigest returns 64 bits of the SHA-256 of r's encoding. It leaves out the parts that change
// often without effect on the ring: suspicions, the incarnations that refute them, and ages.
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

// IsSentInSync reports whether the table's digest and syncs contain the record of m. They do if m
// is live, or has been dead for less than half of tombstoneLife.
func (m *Member) IsSentInSync(now time.Duration) bool {
	return m.State.IsLive() || now-m.DiedAt < tombstoneLife/2
}

// ForgetLeftMembers takes the records of members that left or died at least half of tombstoneLife
// ago out of the digest. It removes members that left at least tombstoneLife ago. A member that
// died stays in the table while there is room, because it may be behind a partition that ends some
// day.
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

// makeRoom makes room for one more member. If the table is full, it evicts the member that has been
// dead for longest. It returns false if the table is full of live members.
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

// QueueUpdate queues m's record to be passed on as an update.
func (t *MemberTable) QueueUpdate(m *Member) {
	m.transmits = 0
	if !slices.Contains(t.updates, m) {
		t.updates = append(t.updates, m)
	}
}

// HasUpdates reports whether any update is queued.
func (t *MemberTable) HasUpdates() bool { return len(t.updates) > 0 }

// AppendUpdates appends queued updates to b, a packet to receiver, while b stays within maxLen
// bytes. Updates that were passed on least often come first. It omits receiver's own record, which
// receiver knows. The updates count as passed on only if markSent is true; markSent must be false
// if receiver is not going to believe them.
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

// Append appends m's record, with its current age, to a packet.
func (m *Member) Append(b []byte, now time.Duration) []byte {
	r := m.MemberRecord
	r.Age = m.secondsDead(now)
	return AppendMember(b, &r)
}

// secondsDead returns the number of seconds since m died or left, and 0 if m is live.
func (m *Member) secondsDead(now time.Duration) uint32 {
	if m.State.IsLive() {
		return 0
	}
	return uint32(max(0, now-m.DiedAt) / time.Second)
}

// A GossipView is the ring as one member sees it.
type GossipView struct {
	Version    uint64           // changes with the records in Members and with Buckets, but not with suspicions, incarnations or ages
	Self       string           // name of the member whose view it is
	Buckets    uint16           // most buckets that any member ever saw
	MaxLamport uint64           // highest claim number seen
	Joined     bool             // another member's table has come since this session began
	Members    []MemberSnapshot // sorted by name
}

// A MemberSnapshot is one member in a GossipView.
type MemberSnapshot struct {
	MemberRecord               // Age is at the time of the snapshot
	RTT          time.Duration // smoothed round-trip time; 0 = unknown
}

// Snapshots returns copies of all records, sorted by name.
func (t *MemberTable) Snapshots(now time.Duration) []MemberSnapshot {
	snapshots := make([]MemberSnapshot, len(t.Members))
	for i, m := range t.Members {
		r := m.MemberRecord
		r.Accusers = slices.Clone(r.Accusers)
		r.Age = m.secondsDead(now)
		snapshots[i] = MemberSnapshot{MemberRecord: r, RTT: m.RTT}
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
// order. So each member is probed within two rounds at the latest (SWIM, section 4.3).
type ProbeOrder struct {
	round []*Member
	next  int // index in round of the next member
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

// Insert puts m, a new member, at a random place in the rest of the round.
func (o *ProbeOrder) Insert(m *Member, rng *rand.Rand) {
	o.round = slices.Insert(o.round, o.next+rng.IntN(len(o.round)-o.next+1), m)
}
