package main

// This file holds the state machine of SWIM with Lifeguard: its announcements and the actions that
// become due as time passes. Sources: Das, Gupta, Motivala, "SWIM" (2002); Dadgar, Phillips,
// Currey, "Lifeguard" (2017). All memory that another member can make grow is bounded. Pure: no I/O
// and no clock. Time, randomness and received packets are arguments, and packets to send are
// results.

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

const (
	gossipEvery  = 0.1         // time between two rounds in which queued updates are sent, in gossip intervals
	gossipFanout = 3           // most members to which one round sends updates
	leaveTargets = 8           // most members that are asked to confirm that this member leaves
	maxTries     = 4           // most packets sent for one requestLeave or requestNameCheck
	maxSeeds     = 64          // most seed addresses that SetSeeds considers
	sessionStep  = 1 << 32     // the upper 32 bits of a session number count sessions, and the lower 32 bits are random; see nextSession
	expireEvery  = time.Minute // time between two calls of ForgetLeftMembers
)

// A RestartState is the state that a member keeps from one start to the next. The zero value is the
// state of a member that has never started.
type RestartState struct {
	Session     uint64 // the last session that the member used
	Slot        uint16 // the slot that the member claims, or NoSlot; valid only if Lamport is not 0
	Lamport     uint64 // number of the member's claim; 0 = no claim
	Provisional bool   // the member's claim is provisional; see MemberRecord.Provisional
	MaxLamport  uint64 // the highest claim number (Lamport) seen in any record
	Buckets     uint16 // the highest slot ever seen claimed, plus one
}

// A SwimConfig configures a Swim. Every field except URL must be set; the RestartState of a member
// that never started is zero.
type SwimConfig struct {
	Name, Addr, URL string
	Interval        time.Duration // time between two probes; the other times of the protocol are multiples of it, except tombstoneLife, expireEvery and limitedEventEvery
	Random          rand.Source   // source of all random numbers, session numbers and request IDs included; must be unpredictable to attackers
	Sealer          *PacketSealer // seals and opens packets; only the Swim may use it after NewSwim
	RestartState    RestartState
}

// A Swim is one member of the ring, and its view of the other members. Times are on one monotonic
// clock with any origin. If a call passes an earlier time than the previous call, the Swim uses the
// time of the previous call. A Swim is not safe for concurrent use. The datagrams and events that
// Receive and Tick produce are valid until the next call of Receive or Tick.
type Swim struct {
	Events    []GossipEvent // events of the last call of Receive or Tick
	Refused   RefusedPackets
	Health    int  // Lifeguard's local health, 0 (good) to maxHealth (worst); probes wait Health+1 times as long for answers
	StoodDown bool // another member has this member's name and a higher session; this member sends and believes nothing more

	// NewSwim sets these five fields, and they are never assigned again.
	name     string
	interval time.Duration
	rng      *rand.Rand
	sealer   *PacketSealer
	self     *Member // the entry of this member in table

	// The other members that this member knows, and the requests that it has sent.
	now        time.Duration // time of the latest call of Receive or Tick
	table      MemberTable
	requests   pendingRequests
	seeds      []seed
	maxLamport uint64        // highest claim number seen
	buckets    uint16        // highest slot ever seen claimed, plus one
	wantTable  bool          // every packet, but only the first of a sync, asks for the receiver's table, because this member has accepted no table in this session
	syncedAt   time.Duration // when another member first sent its table in this session; 0 = not yet

	// Timers: when this member must probe, reconnect, gossip and so on.
	probeOrder  ProbeOrder
	probeAt     time.Duration
	reconnectAt time.Duration // when to contact a dead member or a seed
	joinBackoff time.Duration // time between attempts to reach the seeds while this member is alone
	resyncAt    time.Duration // when to ask another member for its table again; 0 = never
	gossipAt    time.Duration // when to send the next round of updates
	expireAt    time.Duration // when to call ForgetLeftMembers
	wakeAt      time.Duration // when the next call of Receive or Tick is expected; a much later call shows a stall

	// Limits on answers to unproven sessions and on events.
	challenging replyLimit             // answers to further requests of a sender whose challenge is pending
	informing   replyLimit             // answers to earlier sessions, and to senders with this member's name
	limits      map[string]*eventLimit // by the text of the limited event, so the number of texts bounds it

	// newSince is the number of this member's first session, if the member started without a stored
	// state and EventNewStorage was not reported yet. Otherwise it is 0.
	newSince uint64

	// Memory that is reused by each Receive and Tick, and the place where the next sync begins.
	packet      Packet     // the packet that openPacket decoded last
	openedKeyID uint32     // ID of the key with which that packet was sealed
	plain       []byte     // bytes of the opened packet, or of the packet to seal
	sealed      []byte     // bytes of all sealed packets in datagrams
	datagrams   []Datagram // datagrams that the current Receive or Tick will return
	syncFrom    int        // index in table.Members of the first record of the next sync
}

// A seed is one address at which this member looks for other members of the ring.
type seed struct {
	addr    netip.AddrPort
	name    string // name of the member that last answered from addr; empty until a member has answered
	refused error  // why the latest packet from addr that has another key or version could not be opened; nil until there is such a packet
}

// NewSwim returns a member that knows no other member. Its session is higher than the session in
// c.RestartState. The caller should store the result of RestartState before it sends the first
// packet, so that the session of the next start is higher again.
func NewSwim(c SwimConfig) *Swim {
	s := &Swim{
		name: c.Name, interval: c.Interval, rng: rand.New(c.Random), sealer: c.Sealer,
		maxLamport: max(c.RestartState.MaxLamport, c.RestartState.Lamport), buckets: c.RestartState.Buckets, wantTable: true, joinBackoff: c.Interval / 2,
	}
	s.self = s.table.Merge(0, MemberRecord{
		Name: c.Name, Session: s.nextSession(c.RestartState.Session), Addr: c.Addr, URL: c.URL, Slot: NoSlot, KeyID: s.sealer.KeyIDs()[0],
	})
	if c.RestartState.Session == 0 {
		s.newSince = s.self.Session
	}
	if c.RestartState.Lamport > 0 {
		s.AnnounceClaim(c.RestartState.Slot, c.RestartState.Lamport, c.RestartState.Provisional)
	}
	return s
}

// nextSession returns a session number that is higher than afterSession. Its upper 32 bits are the
// upper 32 bits of afterSession, plus one. Its lower 32 bits are random, so that two members with
// the same name that both lost their state almost certainly have different sessions.
func (s *Swim) nextSession(afterSession uint64) uint64 {
	return (afterSession/sessionStep+1)*sessionStep + s.rng.Uint64N(sessionStep)
}

// RestartState returns the state that the caller must store for this member's next start.
func (s *Swim) RestartState() RestartState {
	st := RestartState{Session: s.self.Session, MaxLamport: s.maxLamport, Buckets: s.buckets}
	if r := s.self.MemberRecord; r.Lamport > 0 {
		st.Slot, st.Lamport, st.Provisional = r.Slot, r.Lamport, r.Provisional
	}
	return st
}

// ViewVersion returns the same number as View().Version, without copying the view.
func (s *Swim) ViewVersion() uint64 { return s.table.Version + uint64(s.buckets) }

// View returns a copy of what this member knows of the ring.
func (s *Swim) View() GossipView {
	return GossipView{Version: s.ViewVersion(), Self: s.name, Buckets: s.buckets, MaxLamport: s.maxLamport, Joined: s.syncedAt != 0, Members: s.table.Snapshots(s.now)}
}

// AnnounceClaim announces that this member claims slot, and that its claim has the number
// claimNumber. If slot is NoSlot, it announces that this member claims no slot.
func (s *Swim) AnnounceClaim(slot uint16, claimNumber uint64, provisional bool) {
	r := s.self.MemberRecord
	r.Slot, r.Lamport, r.Provisional = slot, claimNumber, provisional
	s.raiseLamportAndBuckets(&r)
	s.announceSelf(r)
}

// raiseLamportAndBuckets raises maxLamport to the claim number in r, and buckets to r's slot plus
// one, if they are lower.
func (s *Swim) raiseLamportAndBuckets(r *MemberRecord) {
	s.maxLamport = max(s.maxLamport, r.Lamport)
	if r.Slot < MaxSlots {
		s.buckets = max(s.buckets, r.Slot+1)
	}
}

// AnnounceLeaving announces that this member is about to leave. This member stays live and keeps
// its slot, but must own no sites; see MemberRecord.Leaving.
func (s *Swim) AnnounceLeaving() {
	r := s.self.MemberRecord
	r.Leaving = true
	s.announceSelf(r)
}

// SetKeys replaces the cluster keys, and announces the ID of the first key, with which other
// members then seal packets to this member. After an error the old keys stay in use.
func (s *Swim) SetKeys(keys Keys) error {
	if err := s.sealer.SetKeys(keys); err != nil {
		return err
	}
	r := s.self.MemberRecord
	r.KeyID = s.sealer.KeyIDs()[0]
	s.announceSelf(r)
	return nil
}

// announceSelf makes r this member's record, with r's incarnation raised by one, and queues the
// record as an update.
func (s *Swim) announceSelf(r MemberRecord) {
	r.Incarnation++
	s.table.SetRecord(s.now, s.self, r)
	s.table.QueueUpdate(s.self)
}

// SetSeeds replaces the seeds, which are the addresses at which this member looks for other members
// as long as it runs. If there is a new seed, the next Tick calls contactDeadOrSeed. SetSeeds
// ignores this member's own address, and all addresses after the first maxSeeds.
func (s *Swim) SetSeeds(addrs []netip.AddrPort) {
	old := s.seeds
	s.seeds = nil
	for _, a := range addrs[:min(len(addrs), maxSeeds)] {
		if a == s.self.AddrPort {
			continue
		}
		i := slices.IndexFunc(old, func(o seed) bool { return o.addr == a })
		if i < 0 {
			s.reconnectAt = s.now // call contactDeadOrSeed in the next Tick
			old = append(old, seed{addr: a})
			i = len(old) - 1
		}
		s.seeds = append(s.seeds, old[i])
	}
}

// seedAt returns the seed with the given address, or nil.
func (s *Swim) seedAt(addr netip.AddrPort) *seed {
	for i := range s.seeds {
		if s.seeds[i].addr == addr {
			return &s.seeds[i]
		}
	}
	return nil
}

// isOwnAddress reports whether addr is this member's own address: it announces this address, or a
// packet that it sent there has come back.
func (s *Swim) isOwnAddress(addr netip.AddrPort) bool {
	sd := s.seedAt(addr)
	return addr == s.self.AddrPort || sd != nil && sd.name == s.name
}

// Leave announces that this member leaves, and asks up to leaveTargets members to confirm that they
// know of the leave. HasLeft reports whether that is done.
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

// HasLeft reports whether Leave was called and no request is pending. Then every member that was
// asked to confirm the leave has confirmed it, or has not answered maxTries packets.
func (s *Swim) HasLeft() bool { return s.self.State == StateLeft && len(s.requests) == 0 }

// NextTickAt returns the time at which Tick should be called next. A call of any other method of
// the Swim may change this time.
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

// Tick takes all actions that are due at the time now, and returns the datagrams to send.
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
		if len(s.table.Members) > 1 { // Members[0] is this member; ask the member that became known first after it
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

// gossipUpdates sends queued updates to at most gossipFanout live members. To choose them, it goes
// through the table once, from a random place, and skips some members at random.
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

// beginReceiveOrTick must be called first in each Receive and Tick. It discards the results of the
// previous call. If the present call comes at least stallAfter intervals too late, it handles a
// stall of this process.
func (s *Swim) beginReceiveOrTick(now time.Duration) {
	s.datagrams, s.sealed, s.Events = s.datagrams[:0], s.sealed[:0], s.Events[:0]
	s.now = max(s.now, now)
	if s.probeAt == 0 { // this is the first Receive or Tick
		s.probeAt = s.now + 1 + time.Duration(s.rng.Int64N(int64(s.interval)))
		s.expireAt = s.now + expireEvery
		s.wakeAt, s.table.ChangedAt = s.now, s.now
	}
	if late := s.now - s.wakeAt; late >= s.intervalsToDuration(stallAfter) {
		s.handleOwnStall(late)
	}
}

// endStep must be called last in each Receive and Tick. It notes when the next call is expected,
// and returns the datagrams to send.
func (s *Swim) endStep() []Datagram {
	s.wakeAt = max(s.NextTickAt(), s.now)
	return s.datagrams
}

func (s *Swim) intervalsToDuration(intervals float64) time.Duration {
	return time.Duration(intervals * float64(s.interval))
}

func (s *Swim) randomMember(isEligible func(*Member) bool) *Member {
	return s.table.RandomMember(s.rng, s.self, isEligible)
}

// addRequestIfRoom gives r an ID, adds it to the pending requests, and returns it. It returns nil
// if there is no room; see addIfRoom.
func (s *Swim) addRequestIfRoom(r pendingRequest) *pendingRequest {
	return s.requests.addIfRoom(s.now, s.rng, r)
}

// ping sends a ping to m, and adds r, the request for the answer, to the pending requests. It does
// nothing if maxPendingRequests requests are pending.
func (s *Swim) ping(m *Member, r pendingRequest) {
	r.name, r.member = m.Name, m
	if r := s.addRequestIfRoom(r); r != nil {
		s.sendTo(m, Packet{Kind: PacketPing, RequestID: r.id})
	}
}
