package main

// The table of members: which of two records is the newer, the digest of all records, the
// updates to pass on, how long dead members are remembered. Only a newer record replaces an
// older one of the same name. The table is bounded. Pure. This file must not know packets,
// probes or the timing of suspicions.

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
	// MaxMembers bounds the table, the dead included.
	MaxMembers = 1024
	// tombstoneLife is how long it is remembered that a member left. The tombstone is synced
	// through the first half of it: so no member syncs it any more when the first one forgets
	// it, and none can learn it again.
	tombstoneLife = 48 * time.Hour
	// retransmitMult times log10 of the members is how often a member passes on an update
	// (λ of the SWIM paper, 4.1).
	retransmitMult = 5
)

// A Member is what this member knows of one member. Times are those of the caller's monotonic
// clock.
type Member struct {
	MemberRecord
	Proven          bool           // this session has answered a challenge
	Window          ReplayWindow   // of this session's packets since then
	KnowsOurSession bool           // our session has proven itself to it, as far as we know
	AddrPort        netip.AddrPort // of Addr; not valid if that is a host name
	RTT             time.Duration  // smoothed; 0 is not known
	SuspectedAt     time.Duration  // if suspect: since when
	DeadAt          time.Duration  // if suspect: when it is declared dead
	FinalPings      int            // sent before it is declared dead
	DiedAt          time.Duration  // when it died or left; may be negative
	LastSync        time.Duration  // when the table was last sent to it
	digestPart      uint64         // of the table's digest
	transmits       int            // of its record as an update
}

// PacketDestination returns where m is reached.
func (m *Member) PacketDestination() PacketDestination { return PacketDestination{m.AddrPort, m.Addr} }

// A MemberTable holds all members, this one included. It is not safe for concurrent use.
type MemberTable struct {
	Members   []*Member     // by time of arrival
	Live      int           // members that are alive or suspect
	Digest    uint64        // XOR of the digests of the records that are synced
	ChangedAt time.Duration // when the digest last changed
	Version   uint64        // counts changes of the digest
	byName    map[string]*Member
	updates   []*Member // whose records are still to be passed on
}

// Get returns the member with that name, or nil.
func (t *MemberTable) Get(name string) *Member { return t.byName[name] }

// Merge believes r if it is newer than the record of its name, and then returns the member;
// nil if r is not newer or there is no room.
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

// addNameOnly makes a member of r's name without a record; nil if there is no room, or if the
// others have begun to forget it.
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

// supersedes tells whether r is to be believed rather than old, which is of the same name.
// StateLeft is final in its session.
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

// isSameSuspicion tells whether r and old suspect the same incarnation.
func (r *MemberRecord) isSameSuspicion(old *MemberRecord) bool {
	return r.State == StateSuspect && old.State == StateSuspect && r.Session == old.Session && r.Incarnation == old.Incarnation
}

// mergeAccusers appends what is in more and not in accusers, up to MaxAccusers.
func mergeAccusers(accusers, more []uint64) []uint64 {
	for _, a := range more {
		if !slices.Contains(accusers, a) && len(accusers) < MaxAccusers {
			accusers = append(accusers, a)
		}
	}
	return accusers
}

// accuserID returns what stands for the name of a member among accusers.
func accuserID(name string) uint64 {
	h := fnv.New64a()
	io.WriteString(h, name)
	return h.Sum64()
}

// SetRecord replaces the record of m by r, which has m's name.
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

func (t *MemberTable) setDigestPart(now time.Duration, m *Member, part uint64) {
	if part != m.digestPart {
		t.Digest ^= m.digestPart ^ part
		m.digestPart = part
		t.ChangedAt = now
		t.Version++
	}
}

// stableDigest returns 64 bits of the SHA-256 of r's encoding, without what comes and goes:
// suspicions, the incarnations that refute them, and ages.
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

// IsSentInSync tells whether m belongs into the digest and into what is sent of the table: if it
// is live, or has not been dead for long.
func (m *Member) IsSentInSync(now time.Duration) bool {
	return m.State.IsLive() || now-m.DiedAt < tombstoneLife/2
}

// ForgetLeftMembers takes old tombstones out of the digest, and at last forgets members that left.
// Dead members are remembered while there is room: they may be behind a partition that ends
// some day.
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

// unindexMember removes all of m but its place in Members.
func (t *MemberTable) unindexMember(m *Member) {
	delete(t.byName, m.Name)
	t.updates = slices.DeleteFunc(t.updates, func(o *Member) bool { return o == m })
}

// makeRoom makes room for one member more: it evicts the member that has been dead for longest.
// It returns false if the table is full of live members.
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

// QueueUpdate has m's record passed on, as an update.
func (t *MemberTable) QueueUpdate(m *Member) {
	m.transmits = 0
	if !slices.Contains(t.updates, m) {
		t.updates = append(t.updates, m)
	}
}

// HasUpdates tells whether there is anything to pass on.
func (t *MemberTable) HasUpdates() bool { return len(t.updates) > 0 }

// AppendUpdates appends to b, a packet to receiver, the updates that were passed on least, while b
// stays within maxLen bytes; not receiver's own record, which it knows. They count as passed on
// only if markSent, that is if receiver is going to believe them.
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

// Append appends m's record to a packet.
func (m *Member) Append(b []byte, now time.Duration) []byte {
	r := m.MemberRecord
	r.Age = m.secondsDead(now)
	return AppendMember(b, &r)
}

// secondsDead returns the seconds since m died or left.
func (m *Member) secondsDead(now time.Duration) uint32 {
	if m.State.IsLive() {
		return 0
	}
	return uint32(max(0, now-m.DiedAt) / time.Second)
}

// A GossipView is the ring as one member sees it.
type GossipView struct {
	Version    uint64 // changes with live members, claims and Buckets; not with suspicions
	Self       string
	Buckets    uint16           // the most that any member ever saw
	MaxLamport uint64           // the highest claim number seen
	Joined     bool             // has ever received another member's table
	Members    []MemberSnapshot // by name
}

// A MemberSnapshot is one member in a GossipView.
type MemberSnapshot struct {
	MemberRecord               // Age is now
	RTT          time.Duration // 0 is not known
}

// Snapshots returns copies of all records.
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

// RandomMember returns a random member for which isEligible holds, but not self; nil if there is
// none.
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

// A ProbeOrder goes through all live members in random order, then again in another: so each is
// probed within two rounds at the latest (SWIM, 4.3).
type ProbeOrder struct {
	round []*Member
	next  int // index in round
}

// Next returns the next live member for which isEligible holds, or nil.
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

// Insert gives m, which is new, a random place in what is left of the round.
func (o *ProbeOrder) Insert(m *Member, rng *rand.Rand) {
	o.round = slices.Insert(o.round, o.next+rng.IntN(len(o.round)-o.next+1), m)
}
