package main

// SWIM with Lifeguard as a state machine: what a member does when time passes. Sources: Das,
// Gupta, Motivala, "SWIM" (2002); Dadgar, Phillips, Currey, "Lifeguard" (2017). Nobody is
// accused after a stall of one's own, and whatever a peer makes grow is bounded. Pure: no
// I/O, no goroutines, no clock and no randomness but those that come in.

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

// Times, in units of the interval T.
const (
	relayAfter   = 0.2  // after a ping: ping again, and ask others to
	verdictAfter = 0.4  // after that: suspect
	gossipEvery  = 0.1  // while there is news
	lostEvery    = 3    // between probes of the dead and the seeds
	backoffMax   = 4    // between attempts to join
	suspectMin   = 1.1  // of a suspicion that others confirm, up to ten members
	lastAsk      = 0.2  // before the verdict, and between the last questions
	suspectMax   = 5    // of one that nobody does but somebody could, as a multiple of that
	aloneAsk     = 0.1  // between questions to a suspect that nobody else can ask
	stallAfter   = 0.25 // late by this: judge nobody by what was not heard
)

const (
	lastAsks    = 6 // questions to a suspect before the verdict
	relays      = 4 // asked about a member that does not answer
	fanout      = 3 // members told the news at once
	leaveTo     = 8 // members that are told of a leave
	maxHealth   = 8 // Lifeguard's S
	maxSeeds    = 64
	attempts    = 4 // to reach whoever has our name, or to say goodbye
	sessionStep = 1 << 32
)

// A SwimState is what a member keeps from one start to the next. The zero value
// is that of a member without past.
type SwimState struct {
	Session     uint64 // the last one used
	Slot        uint16 // the claim, if Lamport is not 0
	Lamport     uint64
	Provisional bool
	Seen        uint64 // the highest Lamport number seen
	Buckets     uint16 // the most seen
}

// An GossipEvent is something that an operator may want to read of. Name is the
// member's, Addr its address.
type GossipEvent struct{ What, Name, Addr string }

// What happens.
const (
	EventUp       = "member is up"
	EventDown     = "member is down"
	EventLeft     = "member has left"
	EventSuspect  = "member is suspected"
	EventSession  = "session was known: took the next" // store the state
	EventConflict = "another member has our name"      // and a lower session: it stands down
	EventStood    = "another member has our name and a higher session: standing down"
	EventStall    = "stalled: judging nobody for a while"
)

// A SwimConfig says who a member is. All but URL is needed.
type SwimConfig struct {
	Name, Addr, URL string
	Interval        time.Duration // T: one probe each; scales all timing but tombstones
	Random          rand.Source   // must be unpredictable to strangers
	Sealer          *Sealer       // the Swim's own from then on
	State           SwimState
}

// A Swim is one member's view of the cluster. Times are those of one monotonic
// clock, from any origin; one that went back is taken to stand. It is not safe
// for concurrent use. What its methods return is valid until the next call of
// Receive or Tick.
type Swim struct {
	Sessions
	Events []GossipEvent // of the last Receive or Tick
	Health int           // 0 is good; each point adds once more to the patience with others
	Stood  bool          // stood down: sends and believes nothing more

	seen    uint64 // the highest Lamport number
	round   ProbeOrder
	seeds   []seed
	synced  time.Duration // when the first table came; 0: not yet
	again   time.Duration // when to ask for it again; 0: not
	backoff time.Duration // between attempts to join

	wake, probeAt, lostAt, gossipAt, expireAt time.Duration
}

type seed struct {
	addr netip.AddrPort
	name string // who answered there last
}

// NewSwim returns a member that is alone. Its session is a new one: State must
// be stored before the first packet is sent, so that the next start's is higher.
func NewSwim(c SwimConfig) *Swim {
	s := &Swim{
		Sessions: Sessions{Name: c.Name, Interval: c.Interval, Rand: rand.New(c.Random), Sealer: c.Sealer, Buckets: c.State.Buckets, Newcomer: true},
		seen:     max(c.State.Seen, c.State.Lamport), backoff: c.Interval / 2,
	}
	s.Learn = s.learn
	s.Self = s.Table.Merge(0, MemberRecord{
		Name: c.Name, Session: s.nextSession(c.State.Session), Addr: c.Addr, URL: c.URL, Slot: NoSlot, KeyID: s.Sealer.KeyIDs()[0],
	})
	if c.State.Lamport > 0 {
		s.SetClaim(c.State.Slot, c.State.Lamport, c.State.Provisional)
	}
	return s
}

// nextSession follows after: the upper half counts, the lower one is random, so
// that two of one name that both lost their state are told apart.
func (s *Swim) nextSession(after uint64) uint64 {
	return (after/sessionStep+1)*sessionStep + s.Rand.Uint64N(sessionStep)
}

// State returns what to keep.
func (s *Swim) State() SwimState {
	st := SwimState{Session: s.Self.Session, Seen: s.seen, Buckets: s.Buckets}
	if r := s.Self.MemberRecord; r.Lamport > 0 {
		st.Slot, st.Lamport, st.Provisional = r.Slot, r.Lamport, r.Provisional
	}
	return st
}

// SetClaim tells all that this member claims a slot (or none: NoSlot).
func (s *Swim) SetClaim(slot uint16, lamport uint64, provisional bool) {
	r := s.Self.MemberRecord
	r.Slot, r.Lamport, r.Provisional = slot, lamport, provisional
	s.seen = max(s.seen, lamport)
	if slot < SlotLimit {
		s.Buckets = max(s.Buckets, slot+1)
	}
	s.announce(r)
}

// SetLeaving tells all that this member is about to leave.
func (s *Swim) SetLeaving() {
	r := s.Self.MemberRecord
	r.Leaving = true
	s.announce(r)
}

// SetKeys replaces the keys and tells all which one this member seals with.
func (s *Swim) SetKeys(keys Keys) error {
	if err := s.Sealer.SetKeys(keys); err != nil {
		return err
	}
	r := s.Self.MemberRecord
	r.KeyID = s.Sealer.KeyIDs()[0]
	s.announce(r)
	return nil
}

// announce says something new of oneself.
func (s *Swim) announce(r MemberRecord) {
	r.Incarnation++
	s.Table.Set(s.Now, s.Self, r)
	s.Table.Spread(s.Self)
}

// SetSeeds replaces the addresses where members are looked for, now and for
// ever. The first 64 count, and of these not our own address.
func (s *Swim) SetSeeds(addrs []netip.AddrPort) {
	old := s.seeds
	s.seeds = nil
	for _, a := range addrs[:min(len(addrs), maxSeeds)] {
		if a == s.Self.UDP {
			continue
		}
		i := slices.IndexFunc(old, func(o seed) bool { return o.addr == a })
		if i < 0 {
			s.lostAt = s.Now // a new one is tried at once
			old = append(old, seed{addr: a})
			i = len(old) - 1
		}
		s.seeds = append(s.seeds, old[i])
	}
}

// Leave has the members told. Gone tells when enough of them know.
func (s *Swim) Leave() {
	if s.Self.State == StateLeft {
		return
	}
	r := s.Self.MemberRecord
	r.State = StateLeft
	s.Table.Set(s.Now, s.Self, r)
	s.Table.Spread(s.Self)
	s.Asks = nil
	for range leaveTo {
		if m := s.Table.Pick(s.Rand, s.Self, func(m *Member) bool { return m.State == StateAlive && !s.Asking(ForFarewell, m.Name) }); m != nil {
			s.Ask(Question{Why: ForFarewell, Name: m.Name, Member: m})
		}
	}
}

// Gone tells, after Leave, that all who were told have confirmed it or do not
// answer.
func (s *Swim) Gone() bool { return s.Self.State == StateLeft && len(s.Asks) == 0 }

// Next returns when Tick wants to be called.
func (s *Swim) Next() time.Duration {
	next := s.expireAt
	if s.Table.HasNews() && s.Table.Live > 1 {
		next = min(next, s.gossipAt)
	}
	if s.again != 0 {
		next = min(next, s.again)
	}
	for _, a := range s.Asks {
		next = min(next, a.Due)
	}
	if s.Self.State == StateLeft {
		return next
	}
	for _, m := range s.Table.All {
		if m.State == StateSuspect {
			next = min(next, s.lastWord(m))
		}
	}
	return min(next, s.probeAt, s.lostAt)
}

func (s *Swim) begin(now time.Duration) {
	s.Begin()
	s.Events = s.Events[:0]
	s.Now = max(s.Now, now)
	if s.probeAt == 0 { // the first call
		s.probeAt = s.Now + 1 + time.Duration(s.Rand.Int64N(int64(s.Interval)))
		s.expireAt = s.Now + time.Minute
		s.wake, s.Table.Changed = s.Now, s.Now
	}
	late := s.Now - s.wake
	if late < s.units(stallAfter) {
		return
	}
	// Answers that came meanwhile wait in the socket or were lost with it: what
	// was not heard says nothing about others.
	s.Health = min(s.Health+1, maxHealth)
	s.event(EventStall, s.Self.Name, s.Self.Addr)
	s.Asks = slices.DeleteFunc(s.Asks, func(a *Question) bool { return a.Why == ForProbe })
	for _, m := range s.Table.All {
		m.Deadline += late + s.units(suspectMin)
	}
	s.probeAt = max(s.probeAt, s.Now+s.Interval/2)
}

func (s *Swim) end() []Datagram {
	s.wake = max(s.Next(), s.Now)
	return s.Datagrams()
}

func (s *Swim) units(n float64) time.Duration { return time.Duration(n * float64(s.Interval)) }

// patience is n intervals, longer while this member is itself in trouble
// (Lifeguard, LHA-Probe).
func (s *Swim) patience(n float64) time.Duration { return s.units(n * float64(s.Health+1)) }

func (s *Swim) event(what, name, addr string) {
	s.Events = append(s.Events, GossipEvent{What: what, Name: name, Addr: addr})
}

// Tick does what is due.
func (s *Swim) Tick(now time.Duration) []Datagram {
	s.begin(now)
	if s.Stood {
		return nil
	}
	for _, a := range slices.Clone(s.Asks) {
		if a.Due <= s.Now {
			s.overdue(a)
		}
	}
	if s.Self.State != StateLeft {
		for _, m := range s.Table.All {
			if m.State == StateSuspect {
				s.judge(m)
			}
		}
		if s.probeAt <= s.Now {
			s.probeAt = s.Now + s.patience(1)
			s.probe(s.round.Next(&s.Table, s.Rand, func(m *Member) bool { return m != s.Self && !s.Asking(ForProbe, m.Name) }))
		}
		if s.lostAt <= s.Now {
			s.lookForLost()
		}
	}
	if s.again != 0 && s.again <= s.Now {
		s.again = 0
		if len(s.Table.All) > 1 { // the first it met
			s.Tell(s.Table.All[1], Packet{Kind: PacketNews, Want: true})
		}
	}
	if s.expireAt <= s.Now {
		s.expireAt = s.Now + time.Minute
		s.Table.Expire(s.Now)
	}
	if s.gossipAt <= s.Now && s.Table.HasNews() {
		s.gossipAt = s.Now + s.units(gossipEvery)
		first := s.Rand.IntN(len(s.Table.All))
		for i, left := 0, fanout; i < len(s.Table.All) && left > 0; i++ {
			// From a random place on, some of them: never one twice.
			m := s.Table.All[(first+i)%len(s.Table.All)]
			if m != s.Self && m.State.IsLive() && s.Table.HasNews() && s.Rand.IntN(s.Table.Live) < 2*fanout {
				s.Tell(m, Packet{Kind: PacketNews})
				left--
			}
		}
	}
	return s.end()
}

func (s *Swim) probe(m *Member) {
	if m == nil {
		return
	}
	if a := s.Ask(Question{Why: ForProbe, Name: m.Name, Member: m, Due: s.Now + s.patience(relayAfter)}); a != nil {
		s.Tell(m, Packet{Kind: PacketPing, Ask: a.Nonce})
	}
}

// overdue goes on with a question that was not answered in time.
func (s *Swim) overdue(a *Question) {
	switch {
	case a.Why == ForProbe && a.Tries == 0 && a.Member.State.IsLive():
		a.Tries, a.Due = 1, s.Now+s.patience(verdictAfter)
		s.Tell(a.Member, Packet{Kind: PacketPing, Ask: a.Nonce})
		for range relays {
			r := s.Table.Pick(s.Rand, s.Self, func(m *Member) bool {
				return m != a.Member && m.State == StateAlive && m.Met && !slices.Contains(a.Relays, m.Name)
			})
			if r == nil {
				break
			}
			a.Relays = append(a.Relays, r.Name)
			s.Tell(r, Packet{Kind: PacketRelay, Ask: a.Nonce, Target: a.Name})
		}
	case a.Why == ForProbe && a.Member.State.IsLive():
		if a.Tries == 1 {
			// Relays answer in any case: if none did, the fault may be here.
			if len(a.Relays) > 0 && !a.Heard {
				s.Health = min(s.Health+1, maxHealth)
			}
			s.accuse(a.Member)
		} else if a.Member.State != StateSuspect {
			s.Drop(a)
			return
		}
		a.Tries, a.Due = 2, s.Now+s.Interval/3
		if s.Table.Live <= 2 {
			a.Due = s.Now + s.units(aloneAsk)
		}
		// It learns from this that it is suspected, and its answer is its defence.
		s.Tell(a.Member, Packet{Kind: PacketPing, Ask: a.Nonce})
	case a.Why == ForOther:
		s.Drop(a)
		s.Tell(a.Origin, Packet{Kind: PacketNack, Answer: a.Theirs, Target: a.Name})
	case a.Why == ForFarewell && a.Tries < attempts:
		a.Tries, a.Due = a.Tries+1, s.Now+s.Interval/4
		s.Say(Datagram{To: a.Member.UDP, Host: a.Member.Addr}, Packet{Kind: PacketPing, To: a.Name, Ask: a.Nonce}, s.Self)
	case a.Why == ForRival && a.Tries < attempts:
		a.Tries, a.Due = a.Tries+1, s.Now+s.Interval/4
		s.Say(a.To, Packet{Kind: PacketHello, To: s.Name, Ask: a.Nonce}, s.Self)
	case a.Why == ForRival:
		// Silence: an earlier life of ours, from before the state was lost.
		s.Drop(a)
		if a.Rival > s.Self.Session {
			s.adopt(a.Rival)
		}
	default:
		s.Drop(a)
	}
}

// adopt begins the session after one that others know of.
func (s *Swim) adopt(after uint64) {
	r := s.Self.MemberRecord
	r.Session = s.nextSession(after)
	s.announce(r)
	s.event(EventSession, s.Self.Name, s.Self.Addr)
	s.lostAt, s.synced, s.Newcomer = s.Now, 0, true
	for _, m := range s.Table.All {
		m.KnowsUs = false
	}
}

func (s *Swim) accuse(m *Member) {
	r := m.MemberRecord
	r.State, r.Accusers, r.Age = StateSuspect, []uint64{NameHash(s.Name)}, 0
	if s.learn(r) != nil {
		s.Table.Spread(m)
	}
}

// judge takes a suspect for dead when its time is over. Shortly before, it is
// asked once more by everybody: all who suspect it may have been wrong, and its
// defence lost on the way here.
func (s *Swim) judge(m *Member) {
	if m.Deadline <= s.Now {
		r := m.MemberRecord
		r.State, r.Accusers, r.Age = StateDead, nil, 0
		s.Table.Spread(s.learn(r))
	} else if s.lastWord(m) <= s.Now {
		m.Asked++
		if a := s.Ask(Question{Why: ForLost, Name: m.Name, Member: m, Due: s.Now + s.Interval}); a != nil {
			s.Tell(m, Packet{Kind: PacketPing, Ask: a.Nonce})
		}
	}
}

// lastWord returns when m, a suspect, is to be asked or judged next.
func (s *Swim) lastWord(m *Member) time.Duration {
	return m.Deadline - s.units(lastAsk*float64(lastAsks-m.Asked))
}

// deadline says when a suspicion is taken for the truth: the sooner, the more
// members share it (Lifeguard, LHA-Suspicion); as soon as can be, if nobody else could.
func (s *Swim) deadline(m *Member) time.Duration {
	n := float64(s.Table.Live)
	least := suspectMin * max(1, (3+math.Log10(n))/4)
	most := suspectMax * least
	if n <= 2 {
		most = least
	}
	need := math.Log(min(max(n-2, 1), MaxAccusers-1) + 1)
	return m.Suspected + s.units(max(least, most-(most-least)*math.Log(float64(len(m.Accusers)))/need))
}

// lookForLost asks whether one of the dead, or of the seeds where nobody known
// is, has come back; and while alone all the seeds.
func (s *Swim) lookForLost() {
	s.lostAt = s.Now + s.units(lostEvery)
	if s.Table.Live == 1 && len(s.seeds) > 0 {
		for _, sd := range s.seeds {
			s.hello(sd)
		}
		s.lostAt = s.Now + s.backoff*3/4 + time.Duration(s.Rand.Int64N(int64(s.backoff)/2+1))
		s.backoff = min(2*s.backoff, backoffMax*s.Interval)
	} else {
		s.backoff = s.Interval / 2
	}
	var away []seed
	for _, sd := range s.seeds {
		if m := s.Table.Get(sd.name); m == nil || !m.State.IsLive() {
			away = append(away, sd)
		}
	}
	m := s.Table.Pick(s.Rand, s.Self, func(m *Member) bool { return m.State == StateDead })
	if len(away) > 0 && s.Table.Live > 1 && (m == nil || s.Rand.IntN(2) == 0) {
		s.hello(away[s.Rand.IntN(len(away))])
	} else if m != nil && !s.Asking(ForLost, m.Name) {
		if a := s.Ask(Question{Why: ForLost, Name: m.Name, Due: s.Now + s.patience(1)}); a != nil {
			s.Tell(m, Packet{Kind: PacketPing, Ask: a.Nonce})
		}
	}
}

func (s *Swim) hello(sd seed) {
	if a := s.Ask(Question{Why: ForSeed, To: Datagram{To: sd.addr}, Due: s.Now + s.patience(1)}); a != nil {
		s.Say(Datagram{To: sd.addr}, Packet{Kind: PacketHello, Ask: a.Nonce}, s.Self)
	}
}

// Version is that of View, without the cost.
func (s *Swim) Version() uint64 { return s.Table.Version + uint64(s.Buckets) }

// View returns a copy.
func (s *Swim) View() GossipView {
	return GossipView{Version: s.Version(), Self: s.Name, Buckets: s.Buckets, Lamport: s.seen, Joined: s.synced != 0, Members: s.Table.Views(s.Now)}
}
