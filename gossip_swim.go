package main

// SWIM with Lifeguard as a state machine: this file holds the announcements of this member and the
// actions that are due as time passes. Sources: Das, Gupta, Motivala, "SWIM" (2002); Dadgar,
// Phillips, Currey, "Lifeguard" (2017). All memory that a peer can make grow is bounded. Pure: no
// I/O and no clock. Time, randomness and packets come in as arguments, and packets go out as
// results.

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

const (
	gossipEvery  = 0.1         // intervals between two rounds of updates, while updates are queued
	gossipFanout = 3           // members that get updates in one round
	leaveTargets = 8           // members that are asked to confirm that this member leaves
	maxTries     = 4           // packets sent for one requestLeave or requestNameCheck
	maxSeeds     = 64          // seed addresses
	sessionStep  = 1 << 32     // see nextSession
	expireEvery  = time.Minute // between two calls of ForgetLeftMembers
)

// A RestartState is the state that a member keeps from one start to the next. The zero value is the
// state of a member that has never started.
type RestartState struct {
	Session     uint64 // the last session used
	Slot        uint16 // the claimed slot, if Lamport is not 0
	Lamport     uint64 // number of the claim; 0 = no claim
	Provisional bool   // the claim is provisional
	MaxLamport  uint64 // the highest Lamport number seen
	Buckets     uint16 // the most buckets seen
}

// A GossipEvent is something that the operator may want to find in the log. Name is a member's
// name, and Addr is an address of that member.
type GossipEvent struct{ What, Name, Addr string }

// The values of What.
const (
	EventUp           = "member is up"
	EventDown         = "member is down"
	EventLeft         = "member has left"
	EventSuspect      = "member is suspected"
	EventSessionTaken = "other members know a later session of this member: took a higher one" // RestartState has to be stored
	EventNameConflict = "another member has the same name and a lower session"                 // the other member stands down
	EventStoodDown    = "another member has the same name and a higher session: standing down"
	EventStalled      = "this process stalled: suspecting no member for a while"
	EventVersion      = "packet refused" // beginning of the text; the reason with the versions follows
)

// A SwimConfig configures a Swim. Every field except URL must be set; the RestartState of a member
// that never started is zero.
type SwimConfig struct {
	Name, Addr, URL string
	Interval        time.Duration // between probes; scales all other times except the life of tombstones
	Random          rand.Source   // must be unpredictable to attackers
	Sealer          *PacketSealer // only the Swim may use it after NewSwim
	RestartState    RestartState
}

// A Swim is one member of the ring, and its view of the others. Times are on one monotonic clock
// with any origin. If a call passes an earlier time than the previous call, the Swim uses the time
// of the previous call. A Swim is not safe for concurrent use. Results of its methods are valid
// until the next call of Receive or Tick.
type Swim struct {
	Events    []GossipEvent // of the last Receive or Tick
	Refused   RefusedPackets
	Health    int  // Lifeguard's local health: 0 is good; probes wait Health+1 times as long for answers
	StoodDown bool // another member has this member's name and a higher session; this member sends and believes nothing more

	// Identity.
	name     string
	interval time.Duration
	rng      *rand.Rand
	sealer   *PacketSealer
	self     *Member // this member in table

	// Membership.
	now        time.Duration // of the latest call of Receive or Tick
	table      MemberTable
	requests   pendingRequests
	seeds      []seed
	maxLamport uint64        // highest claim number seen
	buckets    uint16        // most buckets seen
	wantTable  bool          // every packet asks for the receiver's table, because no table has come yet
	syncedAt   time.Duration // when the first table came; 0 = no table has come yet

	// Timers.
	probeOrder  ProbeOrder
	probeAt     time.Duration // when to probe the next member
	reconnectAt time.Duration // when to contact a dead member or a seed
	joinBackoff time.Duration // time between attempts to join
	resyncAt    time.Duration // when to ask for a table again; 0 = never
	gossipAt    time.Duration // when to send the next round of updates
	expireAt    time.Duration // when to call ForgetLeftMembers
	wakeAt      time.Duration // when the next call of Receive or Tick is expected; a much later call shows a stall

	// Limits.
	replies        int // answers since repliesSince to sessions that have proven nothing
	repliesSince   time.Duration
	versionEventAt time.Duration // when the next EventVersion may be reported

	// Buffers.
	packet      Packet     // the packet opened last
	openedKeyID uint32     // ID of the key that sealed packet
	plain       []byte     // the opened packet, or the packet to seal
	sealed      []byte     // memory of datagrams
	datagrams   []Datagram // results of the current Receive or Tick
	syncFrom    int        // index in table.Members where sendTable goes on
}

// A seed is one address at which this member looks for others.
type seed struct {
	addr netip.AddrPort
	name string // of the member that last answered from addr
}

// NewSwim returns a member that knows no other member. Its session is new. The caller must store
// the result of RestartState before it sends the first packet, so that the session of the next
// start is higher.
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

// nextSession returns a session after afterSession. The upper 32 bits count up. The lower 32 bits
// are random, so that two members with the same name that both lost their state have different
// sessions.
func (s *Swim) nextSession(afterSession uint64) uint64 {
	return (afterSession/sessionStep+1)*sessionStep + s.rng.Uint64N(sessionStep)
}

// RestartState returns the state to store for the next start.
func (s *Swim) RestartState() RestartState {
	st := RestartState{Session: s.self.Session, MaxLamport: s.maxLamport, Buckets: s.buckets}
	if r := s.self.MemberRecord; r.Lamport > 0 {
		st.Slot, st.Lamport, st.Provisional = r.Slot, r.Lamport, r.Provisional
	}
	return st
}

// ViewVersion returns View().Version without the cost of View.
func (s *Swim) ViewVersion() uint64 { return s.table.Version + uint64(s.buckets) }

// View returns a copy of what this member knows of the ring.
func (s *Swim) View() GossipView {
	return GossipView{Version: s.ViewVersion(), Self: s.name, Buckets: s.buckets, MaxLamport: s.maxLamport, Joined: s.syncedAt != 0, Members: s.table.Snapshots(s.now)}
}

// AnnounceClaim announces that this member claims slot, with the number claimNumber. If slot is
// NoSlot, it announces that this member claims no slot.
func (s *Swim) AnnounceClaim(slot uint16, claimNumber uint64, provisional bool) {
	r := s.self.MemberRecord
	r.Slot, r.Lamport, r.Provisional = slot, claimNumber, provisional
	s.raiseLamportAndBuckets(&r)
	s.announceSelf(r)
}

// raiseLamportAndBuckets raises maxLamport and buckets to cover the claim in r.
func (s *Swim) raiseLamportAndBuckets(r *MemberRecord) {
	s.maxLamport = max(s.maxLamport, r.Lamport)
	if r.Slot < MaxSlots {
		s.buckets = max(s.buckets, r.Slot+1)
	}
}

// AnnounceLeaving announces that this member is about to leave. It stays a live member and keeps
// its slot, but must own no sites; see MemberRecord.Leaving.
func (s *Swim) AnnounceLeaving() {
	r := s.self.MemberRecord
	r.Leaving = true
	s.announceSelf(r)
}

// SetKeys replaces the cluster keys, and announces the key that this member now seals with. After
// an error the old keys stay in use.
func (s *Swim) SetKeys(keys Keys) error {
	if err := s.sealer.SetKeys(keys); err != nil {
		return err
	}
	r := s.self.MemberRecord
	r.KeyID = s.sealer.KeyIDs()[0]
	s.announceSelf(r)
	return nil
}

// announceSelf makes r this member's record, with a new incarnation, and queues it as an update.
func (s *Swim) announceSelf(r MemberRecord) {
	r.Incarnation++
	s.table.SetRecord(s.now, s.self, r)
	s.table.QueueUpdate(s.self)
}

// SetSeeds replaces the addresses at which this member looks for others, as long as it runs. It
// ignores this member's own address, and all addresses after the first 64.
func (s *Swim) SetSeeds(addrs []netip.AddrPort) {
	old := s.seeds
	s.seeds = nil
	for _, a := range addrs[:min(len(addrs), maxSeeds)] {
		if a == s.self.AddrPort {
			continue
		}
		i := slices.IndexFunc(old, func(o seed) bool { return o.addr == a })
		if i < 0 {
			s.reconnectAt = s.now // try a new seed at once
			old = append(old, seed{addr: a})
			i = len(old) - 1
		}
		s.seeds = append(s.seeds, old[i])
	}
}

// Leave announces that this member leaves, and asks a few members to confirm that they know.
// HasLeft reports when they have confirmed.
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

// HasLeft reports, after Leave, whether every member that was asked to confirm has done so or has
// failed to answer.
func (s *Swim) HasLeft() bool { return s.self.State == StateLeft && len(s.requests) == 0 }

// NextTickAt returns the time at which Tick should be called next.
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

// Tick does everything that is due at now, and returns the datagrams to send.
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
		if len(s.table.Members) > 1 { // the first other member in the table
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

// gossipUpdates sends updates to at most gossipFanout live members. It goes through the table once,
// from a random place, and skips members at random.
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

// beginReceiveOrTick starts a Receive or Tick at now: it discards the results of the call before,
// and handles a stall if the call comes much too late.
func (s *Swim) beginReceiveOrTick(now time.Duration) {
	s.datagrams, s.sealed, s.Events = s.datagrams[:0], s.sealed[:0], s.Events[:0]
	s.now = max(s.now, now)
	if s.probeAt == 0 { // this is the first call
		s.probeAt = s.now + 1 + time.Duration(s.rng.Int64N(int64(s.interval)))
		s.expireAt = s.now + expireEvery
		s.wakeAt, s.table.ChangedAt = s.now, s.now
	}
	if late := s.now - s.wakeAt; late >= s.intervalsToDuration(stallAfter) {
		s.handleOwnStall(late)
	}
}

// endStep ends a Receive or Tick, and returns the datagrams to send.
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

// addRequestIfRoom adds r to the pending requests, and returns it with its ID. It returns nil if
// too many requests are pending.
func (s *Swim) addRequestIfRoom(r pendingRequest) *pendingRequest {
	return s.requests.addIfRoom(s.now, s.rng, r)
}

// ping sends a ping to m, and adds r to the pending requests. If too many requests are pending, it
// does nothing.
func (s *Swim) ping(m *Member, r pendingRequest) {
	r.name, r.member = m.Name, m
	if r := s.addRequestIfRoom(r); r != nil {
		s.sendTo(m, Packet{Kind: PacketPing, RequestID: r.id})
	}
}
