package main

// SWIM with Lifeguard as a state machine: what a member announces, and what it does when time
// passes. Sources: Das, Gupta, Motivala, "SWIM" (2002); Dadgar, Phillips, Currey, "Lifeguard"
// (2017). All memory that a peer can make grow is bounded. Pure: time, randomness and packets come
// in, and packets go out.

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

const (
	gossipEvery  = 0.1 // intervals between sending updates, while there are any
	gossipFanout = 3   // members that get updates at once
	leaveTargets = 8   // members that have to confirm a leave
	maxTries     = 4   // of requestLeave and requestNameCheck
	maxSeeds     = 64
	sessionStep  = 1 << 32
	expireEvery  = time.Minute
)

// A RestartState is what a member keeps from one start to the next. The zero value is the state of
// a member that never started.
type RestartState struct {
	Session     uint64 // the last one used
	Slot        uint16 // the claim, if Lamport is not 0
	Lamport     uint64
	Provisional bool
	MaxLamport  uint64 // the highest Lamport number seen
	Buckets     uint16 // the most seen
}

// A GossipEvent is something that an operator may want to read of. Name is a member's name, and
// Addr an address of it.
type GossipEvent struct{ What, Name, Addr string }

// The values of What.
const (
	EventUp           = "member is up"
	EventDown         = "member is down"
	EventLeft         = "member has left"
	EventSuspect      = "member is suspected"
	EventSessionTaken = "session was known: took the next" // the state has to be stored
	EventNameConflict = "another member has our name"      // and a lower session: it stands down
	EventStoodDown    = "another member has our name and a higher session: standing down"
	EventStalled      = "stalled: judging nobody for a while"
	EventVersion      = "packet is refused" // its beginning; the versions follow
)

// A SwimConfig configures a Swim. All but URL is needed.
type SwimConfig struct {
	Name, Addr, URL string
	Interval        time.Duration // between probes; scales all timing but tombstones
	Random          rand.Source   // must be unpredictable to strangers
	Sealer          *PacketSealer // the Swim's own from then on
	RestartState    RestartState
}

// A Swim is one member's view of the ring. Times are those of one monotonic clock, from any
// origin; a time before an earlier one counts as that one. It is not safe for concurrent use.
// Results of its methods are valid until the next call of Receive or Tick.
type Swim struct {
	Events    []GossipEvent // of the last Receive or Tick
	Refused   RefusedPackets
	Health    int  // Lifeguard's local health: 0 is good; each point adds one to the patience with others
	StoodDown bool // another member has our name: sends and believes nothing more

	// Identity.
	name     string
	interval time.Duration
	rng      *rand.Rand
	sealer   *PacketSealer
	self     *Member // of table

	// Membership.
	now        time.Duration
	table      MemberTable
	requests   pendingRequests
	seeds      []seed
	maxLamport uint64        // the highest seen
	buckets    uint16        // the most seen
	wantTable  bool          // every packet asks for the receiver's table: none has come yet
	syncedAt   time.Duration // when the first table came; 0: not yet

	// Timers.
	probeOrder  ProbeOrder
	probeAt     time.Duration
	reconnectAt time.Duration
	joinBackoff time.Duration // between attempts to join
	resyncAt    time.Duration // when to ask for a table again; 0: not
	gossipAt    time.Duration
	expireAt    time.Duration
	wakeAt      time.Duration // when the next call is expected: a later one shows a stall

	// Limits.
	replies        int // to senders that have proven nothing, since repliesSince
	repliesSince   time.Duration
	versionEventAt time.Duration // when EventVersion may come next

	// Buffers.
	packet      Packet // opened last
	openedKeyID uint32 // of packet
	plain       []byte
	sealed      []byte // holds datagrams
	datagrams   []Datagram
	syncFrom    int // index in table.Members where sendTable goes on
}

type seed struct {
	addr netip.AddrPort
	name string // of the member that answered there last
}

// NewSwim returns a member that is alone. Its session is a new one: RestartState must be stored
// before the first packet is sent, so that the next start's session is higher.
func NewSwim(c SwimConfig) *Swim {
	s := &Swim{
		name: c.Name, interval: c.Interval, rng: rand.New(c.Random), sealer: c.Sealer,
		maxLamport: max(c.RestartState.MaxLamport, c.RestartState.Lamport), buckets: c.RestartState.Buckets, wantTable: true, joinBackoff: c.Interval / 2,
	}
	s.self = s.table.Merge(0, MemberRecord{
		Name: c.Name, Session: s.nextSession(c.RestartState.Session), Addr: c.Addr, URL: c.URL, Slot: NoSlot, KeyID: s.sealer.KeyIDs()[0],
	})
	if c.RestartState.Lamport > 0 {
		s.AnnounceClaim(c.RestartState.Slot, c.RestartState.Lamport, c.RestartState.Provisional)
	}
	return s
}

// nextSession returns a session after the given one. The upper half counts, the lower half is
// random, so that two members of one name that both lost their state differ.
func (s *Swim) nextSession(afterSession uint64) uint64 {
	return (afterSession/sessionStep+1)*sessionStep + s.rng.Uint64N(sessionStep)
}

// RestartState returns what to keep.
func (s *Swim) RestartState() RestartState {
	st := RestartState{Session: s.self.Session, MaxLamport: s.maxLamport, Buckets: s.buckets}
	if r := s.self.MemberRecord; r.Lamport > 0 {
		st.Slot, st.Lamport, st.Provisional = r.Slot, r.Lamport, r.Provisional
	}
	return st
}

// ViewVersion is View's, without the cost.
func (s *Swim) ViewVersion() uint64 { return s.table.Version + uint64(s.buckets) }

// View returns a copy.
func (s *Swim) View() GossipView {
	return GossipView{Version: s.ViewVersion(), Self: s.name, Buckets: s.buckets, MaxLamport: s.maxLamport, Joined: s.syncedAt != 0, Members: s.table.Snapshots(s.now)}
}

// AnnounceClaim announces that this member claims a slot (or none: NoSlot).
func (s *Swim) AnnounceClaim(slot uint16, claimNumber uint64, provisional bool) {
	r := s.self.MemberRecord
	r.Slot, r.Lamport, r.Provisional = slot, claimNumber, provisional
	s.raiseLamportAndBuckets(&r)
	s.announceSelf(r)
}

// raiseLamportAndBuckets remembers the highest claim number and slot.
func (s *Swim) raiseLamportAndBuckets(r *MemberRecord) {
	s.maxLamport = max(s.maxLamport, r.Lamport)
	if r.Slot < MaxSlots {
		s.buckets = max(s.buckets, r.Slot+1)
	}
}

// AnnounceLeaving announces that this member is about to leave.
func (s *Swim) AnnounceLeaving() {
	r := s.self.MemberRecord
	r.Leaving = true
	s.announceSelf(r)
}

// SetKeys replaces the keys and announces which one this member seals with. After an error the
// old keys stay.
func (s *Swim) SetKeys(keys Keys) error {
	if err := s.sealer.SetKeys(keys); err != nil {
		return err
	}
	r := s.self.MemberRecord
	r.KeyID = s.sealer.KeyIDs()[0]
	s.announceSelf(r)
	return nil
}

// announceSelf makes r this member's record, in a new incarnation.
func (s *Swim) announceSelf(r MemberRecord) {
	r.Incarnation++
	s.table.SetRecord(s.now, s.self, r)
	s.table.QueueUpdate(s.self)
}

// SetSeeds replaces the addresses where members are looked for, now and for ever. Addresses
// beyond the first 64, and our own, are ignored.
func (s *Swim) SetSeeds(addrs []netip.AddrPort) {
	old := s.seeds
	s.seeds = nil
	for _, a := range addrs[:min(len(addrs), maxSeeds)] {
		if a == s.self.AddrPort {
			continue
		}
		i := slices.IndexFunc(old, func(o seed) bool { return o.addr == a })
		if i < 0 {
			s.reconnectAt = s.now // a new one is tried at once
			old = append(old, seed{addr: a})
			i = len(old) - 1
		}
		s.seeds = append(s.seeds, old[i])
	}
}

// Leave announces that this member leaves. HasLeft tells when that is known.
func (s *Swim) Leave() {
	if s.self.State == StateLeft {
		return
	}
	r := s.self.MemberRecord
	r.State = StateLeft
	s.table.SetRecord(s.now, s.self, r)
	s.table.QueueUpdate(s.self)
	s.requests = nil
	for range leaveTargets {
		if m := s.randomMember(func(m *Member) bool { return m.State == StateAlive && s.requests.find(requestLeave, m.Name) == nil }); m != nil {
			s.addRequestIfRoom(pendingRequest{purpose: requestLeave, name: m.Name, member: m})
		}
	}
}

// HasLeft tells, after Leave, whether all members that have to confirm it have done so or do not
// answer.
func (s *Swim) HasLeft() bool { return s.self.State == StateLeft && len(s.requests) == 0 }

// NextTickAt returns when Tick wants to be called.
func (s *Swim) NextTickAt() time.Duration {
	next := s.expireAt
	if s.table.HasUpdates() && s.table.Live > 1 {
		next = min(next, s.gossipAt)
	}
	if s.resyncAt != 0 {
		next = min(next, s.resyncAt)
	}
	for _, r := range s.requests {
		next = min(next, r.dueAt)
	}
	if s.self.State == StateLeft {
		return next
	}
	for _, m := range s.table.Members {
		if m.State == StateSuspect {
			next = min(next, s.nextPingOrDeathAt(m))
		}
	}
	return min(next, s.probeAt, s.reconnectAt)
}

// Tick does what is due, and returns what to send.
func (s *Swim) Tick(now time.Duration) []Datagram {
	s.beginReceiveOrTick(now)
	if s.StoodDown {
		return nil
	}
	for _, r := range slices.Clone(s.requests) {
		if r.dueAt <= s.now {
			s.handleRequestTimeout(r)
		}
	}
	if s.self.State != StateLeft {
		s.expireSuspicions()
		if s.probeAt <= s.now {
			s.probeNext()
		}
		if s.reconnectAt <= s.now {
			s.contactDeadOrSeed()
		}
	}
	if s.resyncAt != 0 && s.resyncAt <= s.now {
		s.resyncAt = 0
		if len(s.table.Members) > 1 { // the first one that it met
			s.sendTo(s.table.Members[1], Packet{Kind: PacketGossip, WantTable: true})
		}
	}
	if s.expireAt <= s.now {
		s.expireAt = s.now + expireEvery
		s.table.ForgetLeftMembers(s.now)
	}
	if s.gossipAt <= s.now && s.table.HasUpdates() {
		s.gossipUpdates()
	}
	return s.endStep()
}

// gossipUpdates sends updates to a few live members, from a random place in the table on, none
// twice.
func (s *Swim) gossipUpdates() {
	s.gossipAt = s.now + s.intervalsToDuration(gossipEvery)
	members := s.table.Members
	first := s.rng.IntN(len(members))
	for i, left := 0, gossipFanout; i < len(members) && left > 0; i++ {
		m := members[(first+i)%len(members)]
		if m != s.self && m.State.IsLive() && s.table.HasUpdates() && s.rng.IntN(s.table.Live) < 2*gossipFanout {
			s.sendTo(m, Packet{Kind: PacketGossip})
			left--
		}
	}
}

// beginReceiveOrTick starts a Receive or Tick.
func (s *Swim) beginReceiveOrTick(now time.Duration) {
	s.datagrams, s.sealed, s.Events = s.datagrams[:0], s.sealed[:0], s.Events[:0]
	s.now = max(s.now, now)
	if s.probeAt == 0 { // the first call
		s.probeAt = s.now + 1 + time.Duration(s.rng.Int64N(int64(s.interval)))
		s.expireAt = s.now + expireEvery
		s.wakeAt, s.table.ChangedAt = s.now, s.now
	}
	if late := s.now - s.wakeAt; late >= s.intervalsToDuration(stallAfter) {
		s.handleOwnStall(late)
	}
}

// endStep ends a Receive or Tick.
func (s *Swim) endStep() []Datagram {
	s.wakeAt = max(s.NextTickAt(), s.now)
	return s.datagrams
}

func (s *Swim) intervalsToDuration(intervals float64) time.Duration {
	return time.Duration(intervals * float64(s.interval))
}

func (s *Swim) addEvent(what, name, addr string) {
	s.Events = append(s.Events, GossipEvent{What: what, Name: name, Addr: addr})
}

func (s *Swim) randomMember(isEligible func(*Member) bool) *Member {
	return s.table.RandomMember(s.rng, s.self, isEligible)
}

// addRequestIfRoom adds r to the pending requests, and returns it with its ID; nil if too many are
// pending.
func (s *Swim) addRequestIfRoom(r pendingRequest) *pendingRequest {
	return s.requests.addIfRoom(s.now, s.rng, r)
}

// ping sends m a ping, and adds r to the pending requests. If too many are pending, it does
// nothing.
func (s *Swim) ping(m *Member, r pendingRequest) {
	r.name, r.member = m.Name, m
	if r := s.addRequestIfRoom(r); r != nil {
		s.sendTo(m, Packet{Kind: PacketPing, RequestID: r.id})
	}
}
