package main

// Sessions of other members: packets are opened, replays and strangers are kept out by
// challenges, and outgoing packets are sealed with the news there is room for. An answer
// counts only from the member that was asked. Questions in flight are bounded. Pure. This file
// must not know when to probe, or whom to suspect.

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

const (
	maxAsks    = 1024 // in flight; challenges above all, when many join
	maxAnswers = 2048 // to strangers, per interval
	maxChunks  = 32   // packets in one exchange of tables
	plainLimit = MaxPacket - SealOverhead
)

// RefusedPackets counts packets that were dropped, by reason.
type RefusedPackets [refusals]uint64

// Of RefusedStranger and RefusedSession those that ask who is there are answered
// nevertheless, and nothing that they say is believed; no other refused packet is.
const (
	RefusedUnsealed  = iota // not of this protocol
	RefusedKey              // sealed under a key not held
	RefusedForged           // does not open
	RefusedMalformed        // opens, and makes no sense
	RefusedMisrouted        // for another member, or said to be our own
	RefusedSession          // of an earlier session of its sender
	RefusedReplay           // seen before, or too old to tell
	RefusedStranger         // its sender had to be challenged first
	RefusedUnasked          // answers nothing that was asked of its sender
	refusals
)

// RefusedReasons names the counts of Refused.
func RefusedReasons() [refusals]string {
	return [...]string{"unsealed", "key", "forged", "malformed", "misrouted", "session", "replay", "stranger", "unasked"}
}

// A Datagram is to be sent to To, or if that is not valid to Host, a host:port.
type Datagram struct {
	To   netip.AddrPort
	Host string
	Data []byte
}

// An Question is a question under way: a random nonce that one member, or when Name
// is empty anyone, may answer; and what its asker wants to remember.
type Question struct {
	Nonce  uint64
	Why    QuestionPurpose
	Name   string  // of who may answer
	Member *Member // the same, where known
	Since  time.Duration
	Due    time.Duration // when to go on without an answer
	Tries  int
	Relays []string // asked to help; they may pass on the answer
	Heard  bool     // of any of them
	Origin *Member  // on whose behalf it is asked, under the nonce Theirs
	Theirs uint64
	To     Datagram // where Name is not in the table
	Rival  uint64   // session
}

// QuestionPurpose something is asked.
type QuestionPurpose uint8

// What the answer says.
const (
	ForProbe    QuestionPurpose = iota // it is alive, or to be suspected
	ForLost                            // who is dead or suspected is alive
	ForOther                           // the same, to another who wants to know
	ForProof                           // a stranger's packet was no replay
	ForSeed                            // who is there
	ForRival                           // who has our name is alive
	ForFarewell                        // it has heard that we leave
)

// A Sessions is a member's end of its talk with all others. The fields are its
// owner's to set and read, but for asks, which Ask and Drop change.
type Sessions struct {
	Refused  RefusedPackets
	Name     string
	Interval time.Duration
	Rand     *rand.Rand
	Sealer   *Sealer
	Table    MemberTable
	Self     *Member // of Table
	Buckets  uint16
	Now      time.Duration
	Newcomer bool // every packet asks for the table
	Asks     []*Question
	Learn    func(MemberRecord) *Member // believes a record if it is newer, and returns its member

	answers   int // to strangers, since
	since     time.Duration
	opened    uint32 // ID of the key of the packet that came last
	chunk     int    // of the table, where the next exchange begins
	in        Packet
	plain     []byte
	sealed    []byte
	datagrams []Datagram
}

// Begin forgets what Datagrams returned.
func (s *Sessions) Begin() { s.datagrams, s.sealed = s.datagrams[:0], s.sealed[:0] }

// Datagrams returns what was said since Begin. It is valid until the next Begin.
func (s *Sessions) Datagrams() []Datagram { return s.datagrams }

// Ask remembers a under a new nonce; nil if too much is in flight.
func (s *Sessions) Ask(a Question) *Question {
	if len(s.Asks) >= maxAsks {
		return nil
	}
	for a.Nonce == 0 {
		a.Nonce = s.Rand.Uint64()
	}
	a.Since = s.Now
	s.Asks = append(s.Asks, &a)
	return &a
}

// Drop forgets a.
func (s *Sessions) Drop(a *Question) {
	s.Asks = slices.DeleteFunc(s.Asks, func(o *Question) bool { return o == a })
}

// Asking tells whether name is being asked for that reason.
func (s *Sessions) Asking(why QuestionPurpose, name string) bool {
	return slices.ContainsFunc(s.Asks, func(a *Question) bool { return a.Why == why && a.Name == name })
}

// Open lets a packet pass, together with its sender and what it answers, if
// anything. p is nil if it is refused. m is nil if it says to come from our own
// name: then it proves nothing but that it is no answer when a is nil. p is valid
// until the next Open.
func (s *Sessions) Open(from netip.AddrPort, data []byte) (p *Packet, m *Member, a *Question) {
	if len(data) > MaxPacket {
		return s.refuse(RefusedUnsealed)
	}
	plain, count, err := s.Sealer.Open(s.plain[:0], data)
	switch err {
	case nil:
	case ErrUnknownKey:
		return s.refuse(RefusedKey)
	case ErrForged:
		return s.refuse(RefusedForged)
	default:
		return s.refuse(RefusedUnsealed)
	}
	p, s.plain, s.opened = &s.in, plain, s.Sealer.KeyID(data)
	if DecodePacket(plain, p) != nil {
		return s.refuse(RefusedMalformed)
	}
	if p.To != s.Name && p.To != "" {
		return s.refuse(RefusedMisrouted)
	}
	m, a = s.Table.Get(p.From), s.asked(p)
	switch {
	case p.From == s.Name:
		s.refuse(RefusedMisrouted)
		return p, nil, a
	case m != nil && p.Session < m.Session:
		// Its sender may have lost its state; then it must learn of its past, be it
		// that it asks or that it was asked and answers. What a replay gains by this is
		// one packet, sealed, per packet.
		if (p.Kind == PacketHello || a != nil) && s.MayAnswer() {
			s.Reply(from, Packet{Kind: PacketAck, To: p.From, Answer: p.Ask}, s.Self, m)
		}
		return s.refuse(RefusedSession)
	case m != nil && p.Session == m.Session && m.Met:
		if !m.Window.Accept(count) {
			return s.refuse(RefusedReplay)
		}
	case a != nil && p.Target == "":
		if m = s.meet(p); m == nil {
			return s.refuse(RefusedStranger)
		}
		m.Window.StartAfter(count)
	default:
		s.challenge(from, p)
		return s.refuse(RefusedStranger)
	}
	if a == nil && p.Answer != 0 && p.Kind != PacketNack {
		s.Refused[RefusedUnasked]++ // late, most likely; the rest of it may still be news
	}
	return p, m, a
}

func (s *Sessions) refuse(reason int) (*Packet, *Member, *Question) {
	s.Refused[reason]++
	return nil, nil, nil
}

// asked finds what p answers: asked of its sender, or of the relay that it is.
func (s *Sessions) asked(p *Packet) *Question {
	if p.Answer == 0 || p.Kind != PacketAck && p.Kind != PacketNack {
		return nil
	}
	for _, a := range s.Asks {
		if a.Nonce != p.Answer {
			continue
		}
		if p.Target != "" && a.Name == p.Target && slices.Contains(a.Relays, p.From) ||
			p.Target == "" && p.Kind == PacketAck && (a.Name == p.From || a.Name == "") {
			return a
		}
	}
	return nil
}

// meet believes that the session of p, which answered a challenge, is its
// sender's; what is not known of it must stand in p.
func (s *Sessions) meet(p *Packet) *Member {
	m := s.Table.Get(p.From)
	if m == nil || m.Session != p.Session {
		i := slices.IndexFunc(p.Records, func(r MemberRecord) bool { return r.Name == p.From && r.Session == p.Session })
		if i < 0 {
			return nil
		}
		if m = s.Learn(p.Records[i]); m == nil {
			return nil
		}
		s.Table.Spread(m)
	}
	m.Met = true
	return m
}

// MayAnswer counts the answers to those who have proven nothing.
func (s *Sessions) MayAnswer() bool {
	if s.Now-s.since >= s.Interval {
		s.since, s.answers = s.Now, 0
	}
	s.answers++
	return s.answers <= maxAnswers
}

// challenge asks the sender of p to prove that it is no replay. What it asked is
// answered: that tells only of us.
func (s *Sessions) challenge(from netip.AddrPort, p *Packet) {
	if !s.MayAnswer() {
		return
	}
	q := Packet{Kind: PacketHello, To: p.From}
	if p.Ask != 0 && p.Kind != PacketRelay {
		q.Kind, q.Answer = PacketAck, p.Ask
	}
	nonce, fresh := s.Proof(p.From)
	if q.Kind == PacketHello && !fresh {
		return // already asked
	}
	q.Ask = nonce
	s.Reply(from, q, s.Self)
}

// Proof returns the nonce that name has to answer with, and whether it is a new one:
// however often a packet comes again, it is one question. 0: too much is in flight.
func (s *Sessions) Proof(name string) (nonce uint64, fresh bool) {
	i := slices.IndexFunc(s.Asks, func(a *Question) bool { return a.Why == ForProof && a.Name == name })
	if i >= 0 {
		return s.Asks[i].Nonce, false
	}
	if a := s.Ask(Question{Why: ForProof, Name: name, Due: s.Now + s.Interval}); a != nil {
		return a.Nonce, true
	}
	return 0, false
}

// Tell says p to m, at the address that it gave.
func (s *Sessions) Tell(m *Member, p Packet) {
	p.To = m.Name
	s.Say(Datagram{To: m.UDP, Host: m.Addr}, p)
}

// Say seals p, with the records of about, two at most, and what news there is
// room for. To whom we may be unknown it must be about Self.
func (s *Sessions) Say(d Datagram, p Packet, about ...*Member) {
	b, m := s.begin(p, about)
	var key uint32
	if m != nil && m.State.IsLive() {
		key = m.KeyID
	} else {
		// Who is there may not have our newest key yet, and who was away no longer
		// its own last one. In turn would give one of two seeds always the same.
		ids := s.Sealer.KeyIDs()
		key = ids[s.Rand.IntN(len(ids))]
	}
	s.plain = s.Table.AppendNews(b, s.Now, plainLimit, p.To, m != nil && m.KnowsUs)
	s.seal(d, key)
}

// Reply answers who has proven nothing: under the key that the last packet opened
// with, which its sender holds whatever is known of it; and without news, which a
// replay would make count as told, and make much of little.
func (s *Sessions) Reply(to netip.AddrPort, p Packet, about ...*Member) {
	s.plain, _ = s.begin(p, about)
	s.seal(Datagram{To: to}, s.opened)
}

// begin returns a packet of what p says and the records of about, two at most, and
// to whom it is, where known.
func (s *Sessions) begin(p Packet, about []*Member) ([]byte, *Member) {
	s.sign(&p)
	b := AppendHeader(s.plain[:0], &p)
	for _, m := range about {
		b = m.Append(b, s.Now)
	}
	m := s.Table.Get(p.To)
	// Who is thought ill of is the first to be told, so that it can object.
	if m != nil && m != s.Self && m.State != StateAlive && len(about) < 2 {
		b = m.Append(b, s.Now)
	}
	return b, m
}

// sign sets what every packet says of its sender.
func (s *Sessions) sign(p *Packet) {
	p.From, p.Session, p.Digest, p.Buckets = s.Name, s.Self.Session, s.Table.Digest, s.Buckets
	p.Settled = s.Settled()
	p.Want = p.Want || s.Newcomer
}

func (s *Sessions) seal(d Datagram, key uint32) {
	from := len(s.sealed)
	s.sealed = s.Sealer.Seal(s.sealed, s.plain, key)
	d.Data = s.sealed[from:len(s.sealed):len(s.sealed)]
	s.datagrams = append(s.datagrams, d)
}

// Settled tells whether the table has not changed for two intervals.
func (s *Sessions) Settled() bool { return s.Now-s.Table.Changed >= 2*s.Interval }

// Exchange sends m the table, in packets of their own size, and may want its own
// in return; at most once per interval.
func (s *Sessions) Exchange(m *Member, want bool) {
	if m.Exchanged != 0 && s.Now-m.Exchanged < s.Interval {
		return
	}
	m.Exchanged = s.Now
	p := Packet{Kind: PacketSync, To: m.Name, Want: want}
	s.sign(&p)
	all := s.Table.All
	first := s.chunk
	for i, sent := 0, 0; i < len(all) && sent < maxChunks; sent++ {
		b := AppendHeader(s.plain[:0], &p)
		for ; i < len(all); i++ {
			o := all[(first+i)%len(all)]
			if !o.Told(s.Now) {
				continue
			}
			longer := o.Append(b, s.Now)
			if len(longer) > plainLimit {
				break
			}
			b = longer
		}
		s.plain = b
		s.seal(Datagram{To: m.UDP, Host: m.Addr}, m.KeyID)
		p.Want = false
		s.chunk = (first + i) % len(all) // the next exchange begins where this ends
	}
}
