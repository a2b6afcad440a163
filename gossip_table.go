package main

// The table of members: which of two records is the newer, the digest of all records, the news
// to pass on, how long dead members are remembered. Only a newer record replaces an older one
// of the same name. The table is bounded. Pure. This file must not know packets, probes or the
// timing of suspicions.

import (
	"cmp"
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
	// tombstoneLife is how long it is remembered that a member left. Through the
	// first half it is also told: so all have forgotten to tell it before the
	// first forgets it, and none can learn it again.
	tombstoneLife = 48 * time.Hour
	// retransmit times log10 of the members is how often one passes on a piece of
	// news (λ of the SWIM paper, 4.1).
	retransmit = 5
)

// A Member is what is believed of one member, oneself included. Times are those
// of the caller's monotonic clock.
type Member struct {
	MemberRecord
	Met       bool           // this session has answered a challenge; Window counts from that answer
	Window    ReplayWindow   //
	RTT       time.Duration  // smoothed; 0 is not known
	Suspected time.Duration  // since when; Deadline is when it is taken for dead
	Deadline  time.Duration  //
	Asked     int            // last questions before it is
	Died      time.Duration  // when it died or left; may be negative
	Exchanged time.Duration  // when it was last sent the table
	UDP       netip.AddrPort // what Addr says; not valid if that is a host name
	part      uint64         // of the digest
	KnowsUs   bool           // it has met our session, as far as we know
	passed    int            // times its record was passed on, since it was news
}

// A MemberTable holds all members, oneself included. It is not safe for concurrent
// use.
type MemberTable struct {
	All     []*Member // by time of arrival
	Digest  uint64
	Changed time.Duration // when the digest did
	Version uint64        // counts changes of the digest
	Live    int           // members that are Alive or Suspect
	byName  map[string]*Member
	news    []*Member // whose records are still to be passed on
}

// Get returns the member with that name, or nil.
func (t *MemberTable) Get(name string) *Member { return t.byName[name] }

// Merge believes r if it is newer than what is known of its name, and then
// returns the member.
func (t *MemberTable) Merge(now time.Duration, r MemberRecord) *Member {
	m := t.byName[r.Name]
	switch {
	case m == nil:
		if time.Duration(r.Age)*time.Second >= tombstoneLife/2 || !t.room() {
			return nil
		}
		if t.byName == nil {
			t.byName = map[string]*Member{}
		}
		m = &Member{MemberRecord: MemberRecord{Name: r.Name, State: StateDead}}
		t.byName[r.Name] = m
		t.All = append(t.All, m)
	case r.Session > m.Session:
		m.Met, m.KnowsUs = false, false
	case r.Session < m.Session || m.State == StateLeft:
		return nil // to leave is a session's last word
	case r.State == StateLeft || r.Incarnation > m.Incarnation:
	case r.Incarnation < m.Incarnation || r.State < m.State:
		return nil
	case r.State == StateSuspect && m.State == StateSuspect:
		known := len(m.Accusers)
		for _, a := range r.Accusers {
			if !slices.Contains(m.Accusers, a) && len(m.Accusers) < MaxAccusers {
				m.Accusers = append(m.Accusers, a)
			}
		}
		if len(m.Accusers) == known {
			return nil
		}
		r.Accusers = m.Accusers
	case r.State == m.State:
		return nil
	}
	t.Set(now, m, r)
	return m
}

// Set replaces what is believed of m by r, which has m's name.
func (t *MemberTable) Set(now time.Duration, m *Member, r MemberRecord) {
	if m.State.IsLive() {
		t.Live--
	}
	if r.State.IsLive() {
		t.Live++
	} else {
		m.Died = now - time.Duration(r.Age)*time.Second
	}
	m.MemberRecord = r
	m.UDP, _ = netip.ParseAddrPort(r.Addr)
	t.count(now, m, r.digest())
}

func (t *MemberTable) count(now time.Duration, m *Member, part uint64) {
	if part != m.part {
		t.Digest ^= m.part ^ part
		m.part = part
		t.Changed = now
		t.Version++
	}
}

// digest covers what lasts: not suspicions, which come and go, nor the
// incarnations that refute them.
func (r *MemberRecord) digest() uint64 {
	h := uint64(0)
	state := max(r.State, StateSuspect)
	claim := uint64(r.Slot)<<2 | r.flags()
	for _, v := range [...]uint64{NameHash(r.Name), r.Session, uint64(state), NameHash(r.Addr), NameHash(r.URL), claim, r.Lamport, uint64(r.KeyID)} {
		h = mix(h ^ v)
	}
	return h
}

func (r *MemberRecord) flags() (f uint64) {
	if r.Provisional {
		f |= 1
	}
	if r.Leaving {
		f |= 2
	}
	return f
}

// mix is splitmix64's step: every bit of x changes half of the result's.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Told tells whether m belongs into an exchange of tables.
func (m *Member) Told(now time.Duration) bool {
	return m.State.IsLive() || now-m.Died < tombstoneLife/2
}

// Expire takes old tombstones out of the digest, and at last forgets who left.
// Who died without a word is remembered while there is room: it may be behind a
// partition that ends some day.
func (t *MemberTable) Expire(now time.Duration) {
	t.All = slices.DeleteFunc(t.All, func(m *Member) bool {
		if !m.Told(now) {
			t.count(now, m, 0)
		}
		forget := m.State == StateLeft && now-m.Died >= tombstoneLife
		if forget {
			t.forget(m)
		}
		return forget
	})
}

func (t *MemberTable) forget(m *Member) {
	delete(t.byName, m.Name)
	t.news = slices.DeleteFunc(t.news, func(o *Member) bool { return o == m })
}

// room makes room for one member more, at the cost of the longest dead.
func (t *MemberTable) room() bool {
	if len(t.All) < MaxMembers {
		return true
	}
	oldest := -1
	for i, m := range t.All {
		if !m.State.IsLive() && (oldest < 0 || m.Died < t.All[oldest].Died) {
			oldest = i
		}
	}
	if oldest < 0 {
		return false
	}
	m := t.All[oldest]
	t.count(t.Changed, m, 0)
	t.forget(m)
	t.All = slices.Delete(t.All, oldest, oldest+1)
	return true
}

// Spread has m's record passed on, as news.
func (t *MemberTable) Spread(m *Member) {
	m.passed = 0
	if !slices.Contains(t.news, m) {
		t.news = append(t.news, m)
	}
}

// HasNews tells whether there is anything to pass on.
func (t *MemberTable) HasNews() bool { return len(t.news) > 0 }

// AppendNews appends to a packet to a member the records that were passed on
// least, while b stays within max bytes; not its own, which it knows. It counts
// only if the member is going to believe it.
func (t *MemberTable) AppendNews(b []byte, now time.Duration, max int, to string, counts bool) []byte {
	if len(t.news) == 0 {
		return b
	}
	slices.SortStableFunc(t.news, func(a, b *Member) int { return cmp.Compare(a.passed, b.passed) })
	limit := int(math.Ceil(retransmit * math.Log10(float64(t.Live)+1)))
	for _, m := range t.news {
		if m.Name != to {
			longer := m.Append(b, now)
			if len(longer) > max {
				break
			}
			b = longer
		}
		if counts {
			m.passed++
		}
	}
	t.news = slices.DeleteFunc(t.news, func(m *Member) bool { return m.passed >= limit })
	return b
}

// Append appends m's record to a packet.
func (m *Member) Append(b []byte, now time.Duration) []byte {
	r := m.MemberRecord
	r.Age = m.age(now)
	return AppendMember(b, &r)
}

// age returns the seconds since m died or left.
func (m *Member) age(now time.Duration) uint32 {
	if m.State.IsLive() {
		return 0
	}
	return uint32(max(0, now-m.Died) / time.Second)
}

// A GossipView is the cluster as one member sees it.
type GossipView struct {
	Version uint64 // changes with live members, claims and Buckets; not with suspicions
	Self    string
	Buckets uint16           // the most that anybody ever saw
	Lamport uint64           // the highest claim number seen
	Joined  bool             // has ever had another's table
	Members []MemberSnapshot // by name
}

// A MemberSnapshot is one member in a GossipView.
type MemberSnapshot struct {
	MemberRecord               // Age is that of its death
	RTT          time.Duration // 0 is not known
}

// Views returns copies of all records.
func (t *MemberTable) Views(now time.Duration) []MemberSnapshot {
	views := make([]MemberSnapshot, len(t.All))
	for i, m := range t.All {
		r := m.MemberRecord
		r.Accusers = slices.Clone(r.Accusers)
		r.Age = m.age(now)
		views[i] = MemberSnapshot{MemberRecord: r, RTT: m.RTT}
	}
	slices.SortFunc(views, func(a, b MemberSnapshot) int { return strings.Compare(a.Name, b.Name) })
	return views
}

// Pick returns a random member but self with a property, or nil.
func (t *MemberTable) Pick(rng *rand.Rand, self *Member, ok func(*Member) bool) (chosen *Member) {
	n := 0
	for _, m := range t.All {
		if m != self && ok(m) {
			if n++; rng.IntN(n) == 0 {
				chosen = m
			}
		}
	}
	return chosen
}

// A ProbeOrder goes through all live members in random order, then again in another:
// so each is probed within two rounds at the latest (SWIM, 4.3).
type ProbeOrder struct {
	order []*Member
	turn  int
}

// Next returns the next live member that is ok, or nil.
func (r *ProbeOrder) Next(t *MemberTable, rng *rand.Rand, ok func(*Member) bool) *Member {
	for range 2 {
		for r.turn < len(r.order) {
			m := r.order[r.turn]
			r.turn++
			if m.State.IsLive() && t.Get(m.Name) == m && ok(m) {
				return m
			}
		}
		r.order, r.turn = append(r.order[:0], t.All...), 0
		rng.Shuffle(len(r.order), func(i, j int) { r.order[i], r.order[j] = r.order[j], r.order[i] })
	}
	return nil
}

// Insert gives m, which is new, a random place in what is left of the round.
func (r *ProbeOrder) Insert(m *Member, rng *rand.Rand) {
	r.order = slices.Insert(r.order, r.turn+rng.IntN(len(r.order)-r.turn+1), m)
}
