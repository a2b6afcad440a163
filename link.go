// link.go: who is speaking. It opens what comes, lets through what is fresh and of
// a session that has proven itself, challenges strangers, and seals what goes out,
// with the news there is room for.
//
// Invariants: nothing passes that could be a replay, or that was meant for another;
// an answer counts only from whom it was asked; what is in flight is bounded. It
// must not know when to probe, or whom to suspect.
package main

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

// Refused counts packets that were dropped, by reason.
type Refused [refusals]uint64

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

// An Ask is a question under way: a random nonce that one member, or when Name
// is empty anyone, may answer; and what its asker wants to remember.
type Ask struct {
	Nonce  uint64
	Why    Why
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

// Why something is asked.
type Why uint8

// What the answer says.
const (
	ForProbe    Why = iota // it is alive, or to be suspected
	ForLost                // who is dead or suspected is alive
	ForOther               // the same, to another who wants to know
	ForProof               // a stranger's packet was no replay
	ForSeed                // who is there
	ForRival               // who has our name is alive
	ForFarewell            // it has heard that we leave
)

// A Link is a member's end of its talk with all others. The fields are its
// owner's to set and read, but for asks, which Ask and Drop change.
type Link struct {
	Refused  Refused
	Name     string
	Interval time.Duration
	Rand     *rand.Rand
	Sealer   *Sealer
	Table    Table
	Self     *Member // of Table
	Buckets  uint16
	Now      time.Duration
	Newcomer bool // every packet asks for the table
	Asks     []*Ask
	Learn    func(Record) *Member // believes a record if it is newer, and returns its member

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
func (l *Link) Begin() { l.datagrams, l.sealed = l.datagrams[:0], l.sealed[:0] }

// Datagrams returns what was said since Begin. It is valid until the next Begin.
func (l *Link) Datagrams() []Datagram { return l.datagrams }

// Ask remembers a under a new nonce; nil if too much is in flight.
func (l *Link) Ask(a Ask) *Ask {
	if len(l.Asks) >= maxAsks {
		return nil
	}
	for a.Nonce == 0 {
		a.Nonce = l.Rand.Uint64()
	}
	a.Since = l.Now
	l.Asks = append(l.Asks, &a)
	return &a
}

// Drop forgets a.
func (l *Link) Drop(a *Ask) {
	l.Asks = slices.DeleteFunc(l.Asks, func(o *Ask) bool { return o == a })
}

// Asking tells whether name is being asked for that reason.
func (l *Link) Asking(why Why, name string) bool {
	return slices.ContainsFunc(l.Asks, func(a *Ask) bool { return a.Why == why && a.Name == name })
}

// Open lets a packet pass, together with its sender and what it answers, if
// anything. p is nil if it is refused. m is nil if it says to come from our own
// name: then it proves nothing but that it is no answer when a is nil. p is valid
// until the next Open.
func (l *Link) Open(from netip.AddrPort, data []byte) (p *Packet, m *Member, a *Ask) {
	plain, count, err := l.Sealer.Open(l.plain[:0], data)
	switch err {
	case nil:
	case ErrUnknownKey:
		return l.refuse(RefusedKey)
	case ErrForged:
		return l.refuse(RefusedForged)
	default:
		return l.refuse(RefusedUnsealed)
	}
	p, l.plain, l.opened = &l.in, plain, l.Sealer.KeyID(data)
	if DecodePacket(plain, p) != nil {
		return l.refuse(RefusedMalformed)
	}
	if p.To != l.Name && p.To != "" {
		return l.refuse(RefusedMisrouted)
	}
	m, a = l.Table.Get(p.From), l.asked(p)
	switch {
	case p.From == l.Name:
		l.refuse(RefusedMisrouted)
		return p, nil, a
	case m != nil && p.Session < m.Session:
		// Its sender may have lost its state; then it must learn of its past, be it
		// that it asks or that it was asked and answers. What a replay gains by this is
		// one packet, sealed, per packet.
		if (p.Kind == Hello || a != nil) && l.MayAnswer() {
			l.Reply(from, Packet{Kind: Ack, To: p.From, Answer: p.Ask}, l.Self, m)
		}
		return l.refuse(RefusedSession)
	case m != nil && p.Session == m.Session && m.Met:
		if !m.Window.Take(count) {
			return l.refuse(RefusedReplay)
		}
	case a != nil && p.Target == "":
		if m = l.meet(p); m == nil {
			return l.refuse(RefusedStranger)
		}
		m.Window.Start(count)
	default:
		l.challenge(from, p)
		return l.refuse(RefusedStranger)
	}
	if a == nil && p.Answer != 0 && p.Kind != Nack {
		l.Refused[RefusedUnasked]++ // late, most likely; the rest of it may still be news
	}
	return p, m, a
}

func (l *Link) refuse(reason int) (*Packet, *Member, *Ask) {
	l.Refused[reason]++
	return nil, nil, nil
}

// asked finds what p answers: asked of its sender, or of the relay that it is.
func (l *Link) asked(p *Packet) *Ask {
	if p.Answer == 0 || p.Kind != Ack && p.Kind != Nack {
		return nil
	}
	for _, a := range l.Asks {
		if a.Nonce != p.Answer {
			continue
		}
		if p.Target != "" && a.Name == p.Target && slices.Contains(a.Relays, p.From) ||
			p.Target == "" && p.Kind == Ack && (a.Name == p.From || a.Name == "") {
			return a
		}
	}
	return nil
}

// meet believes that the session of p, which answered a challenge, is its
// sender's; what is not known of it must stand in p.
func (l *Link) meet(p *Packet) *Member {
	m := l.Table.Get(p.From)
	if m == nil || m.Session != p.Session {
		i := slices.IndexFunc(p.Records, func(r Record) bool { return r.Name == p.From && r.Session == p.Session })
		if i < 0 {
			return nil
		}
		if m = l.Learn(p.Records[i]); m == nil {
			return nil
		}
		l.Table.Spread(m)
	}
	m.Met = true
	return m
}

// MayAnswer counts the answers to those who have proven nothing.
func (l *Link) MayAnswer() bool {
	if l.Now-l.since >= l.Interval {
		l.since, l.answers = l.Now, 0
	}
	l.answers++
	return l.answers <= maxAnswers
}

// challenge asks the sender of p to prove that it is no replay. What it asked is
// answered: that tells only of us.
func (l *Link) challenge(from netip.AddrPort, p *Packet) {
	if !l.MayAnswer() {
		return
	}
	q := Packet{Kind: Hello, To: p.From}
	if p.Ask != 0 && p.Kind != Relay {
		q.Kind, q.Answer = Ack, p.Ask
	}
	nonce, fresh := l.Proof(p.From)
	if q.Kind == Hello && !fresh {
		return // already asked
	}
	q.Ask = nonce
	l.Reply(from, q, l.Self)
}

// Proof returns the nonce that name has to answer with, and whether it is a new one:
// however often a packet comes again, it is one question. 0: too much is in flight.
func (l *Link) Proof(name string) (nonce uint64, fresh bool) {
	i := slices.IndexFunc(l.Asks, func(a *Ask) bool { return a.Why == ForProof && a.Name == name })
	if i >= 0 {
		return l.Asks[i].Nonce, false
	}
	if a := l.Ask(Ask{Why: ForProof, Name: name, Due: l.Now + l.Interval}); a != nil {
		return a.Nonce, true
	}
	return 0, false
}

// Tell says p to m, at the address that it gave.
func (l *Link) Tell(m *Member, p Packet) {
	p.To = m.Name
	l.Say(Datagram{To: m.UDP, Host: m.Addr}, p)
}

// Say seals p, with the records of about, two at most, and what news there is
// room for. To whom we may be unknown it must be about Self.
func (l *Link) Say(d Datagram, p Packet, about ...*Member) {
	b, m := l.begin(p, about)
	var key uint32
	if m != nil && m.State.Live() {
		key = m.KeyID
	} else {
		// Who is there may not have our newest key yet, and who was away no longer
		// its own last one. In turn would give one of two seeds always the same.
		ids := l.Sealer.KeyIDs()
		key = ids[l.Rand.IntN(len(ids))]
	}
	l.plain = l.Table.AppendNews(b, l.Now, plainLimit, p.To, m != nil && m.KnowsUs)
	l.seal(d, key)
}

// Reply answers who has proven nothing: under the key that the last packet opened
// with, which its sender holds whatever is known of it; and without news, which a
// replay would make count as told, and make much of little.
func (l *Link) Reply(to netip.AddrPort, p Packet, about ...*Member) {
	l.plain, _ = l.begin(p, about)
	l.seal(Datagram{To: to}, l.opened)
}

// begin returns a packet of what p says and the records of about, two at most, and
// to whom it is, where known.
func (l *Link) begin(p Packet, about []*Member) ([]byte, *Member) {
	l.sign(&p)
	b := AppendHeader(l.plain[:0], &p)
	for _, m := range about {
		b = m.Append(b, l.Now)
	}
	m := l.Table.Get(p.To)
	// Who is thought ill of is the first to be told, so that it can object.
	if m != nil && m != l.Self && m.State != Alive && len(about) < 2 {
		b = m.Append(b, l.Now)
	}
	return b, m
}

// sign sets what every packet says of its sender.
func (l *Link) sign(p *Packet) {
	p.From, p.Session, p.Digest, p.Buckets = l.Name, l.Self.Session, l.Table.Digest, l.Buckets
	p.Settled = l.Settled()
	p.Want = p.Want || l.Newcomer
}

func (l *Link) seal(d Datagram, key uint32) {
	from := len(l.sealed)
	l.sealed = l.Sealer.Seal(l.sealed, l.plain, key)
	d.Data = l.sealed[from:len(l.sealed):len(l.sealed)]
	l.datagrams = append(l.datagrams, d)
}

// Settled tells whether the table has not changed for two intervals.
func (l *Link) Settled() bool { return l.Now-l.Table.Changed >= 2*l.Interval }

// Exchange sends m the table, in packets of their own size, and may want its own
// in return; at most once per interval.
func (l *Link) Exchange(m *Member, want bool) {
	if m.Exchanged != 0 && l.Now-m.Exchanged < l.Interval {
		return
	}
	m.Exchanged = l.Now
	p := Packet{Kind: Sync, To: m.Name, Want: want}
	l.sign(&p)
	all := l.Table.All
	first := l.chunk
	for i, sent := 0, 0; i < len(all) && sent < maxChunks; sent++ {
		b := AppendHeader(l.plain[:0], &p)
		for ; i < len(all); i++ {
			o := all[(first+i)%len(all)]
			if !o.Told(l.Now) {
				continue
			}
			longer := o.Append(b, l.Now)
			if len(longer) > plainLimit {
				break
			}
			b = longer
		}
		l.plain = b
		l.seal(Datagram{To: m.UDP, Host: m.Addr}, m.KeyID)
		p.Want = false
		l.chunk = (first + i) % len(all) // the next exchange begins where this ends
	}
}
