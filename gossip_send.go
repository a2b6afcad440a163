package main

// This file fills, seals (encrypts) and queues packets to send. A packet to a live member is sealed
// with the key in that member's record, if this member holds it. The room left in a packet is
// filled with queued updates, except in syncs and in answers to sessions that have not proven
// themselves. Pure: no I/O and no clock. This file must not know why a packet is sent.

import "net/netip"

const (
	maxPlainPacket = MaxPacket - SealOverhead // bytes of the longest packet before it is sealed
	maxSyncPackets = 32                       // most packets in which one sync sends the table
)

// A PacketDestination is the address to which a packet is sent: AddrPort, or Host (a host:port) if
// AddrPort is not valid.
type PacketDestination struct {
	AddrPort netip.AddrPort
	Host     string
}

// A Datagram is a sealed packet to send.
type Datagram struct {
	To   PacketDestination
	Data []byte
}

// sendTo queues p for m, at the address in m's record.
func (s *Swim) sendTo(m *Member, p Packet) {
	p.To = m.Name
	s.send(m.PacketDestination(), p)
}

// send seals and queues p with the records of recordsOf, which holds at most two members, and with
// queued updates up to the first that does not fit. If the receiver may not know this member,
// recordsOf must hold s.self, so that the receiver gets this member's record.
func (s *Swim) send(to PacketDestination, p Packet, recordsOf ...*Member) {
	m := s.table.Get(p.To)
	b := s.encodeWithRecords(&p, recordsOf)
	s.plain = s.table.AppendUpdates(b, s.now, maxPlainPacket, p.To, m != nil && m.KnowsOurSession)
	s.sealAndQueue(to, s.keyIDFor(m))
}

// replyToUnproven queues p, an answer to the packet that was opened last, whose sender's session
// has not proven itself. It seals p with the key of that packet: the sender holds this key, even if
// its record names another key. It adds no updates to p. Otherwise a replayed packet could make
// updates count as passed on, and could get an answer much longer than itself.
func (s *Swim) replyToUnproven(to netip.AddrPort, p Packet, recordsOf ...*Member) {
	s.plain = s.encodeWithRecords(&p, recordsOf)
	s.sealAndQueue(PacketDestination{AddrPort: to}, s.openedKeyID)
}

// encodeWithRecords returns the encoding of p with the records of recordsOf. If this member
// considers the receiver suspect, dead or left, it adds the receiver's own record, so that the
// receiver can refute it. It adds no record if recordsOf already holds two members.
func (s *Swim) encodeWithRecords(p *Packet, recordsOf []*Member) []byte {
	s.fillHeader(p)
	b := AppendPacketHeader(s.plain[:0], p)
	for _, m := range recordsOf {
		b = m.Append(b, s.now)
	}
	if m := s.table.Get(p.To); m != nil && m != s.self && m.State != StateAlive && len(recordsOf) < 2 {
		b = m.Append(b, s.now)
	}
	return b
}

// fillHeader sets the fields of p that describe its sender, this member. Every packet has these
// fields.
func (s *Swim) fillHeader(p *Packet) {
	p.From, p.Session, p.Digest, p.Buckets = s.name, s.self.Session, s.table.Digest, s.buckets
	p.TableSettled = s.isTableSettled()
	p.WantTable = p.WantTable || s.wantTable
}

func (s *Swim) isTableSettled() bool { return s.now-s.table.ChangedAt >= 2*s.interval }

// keyIDFor returns the ID of the key with which to seal a packet to m. For a live member that is
// the key in its record. A member that is not live may not have this member's newest key yet, or
// may no longer have the key in its record. For such a member, or if m is nil, keyIDFor chooses one
// of this member's keys at random. It does not use the keys in turn: with two keys and two seeds
// that are contacted in turn, each seed would get the same key every time.
func (s *Swim) keyIDFor(m *Member) uint32 {
	if m != nil && m.State.IsLive() {
		return m.KeyID
	}
	ids := s.sealer.KeyIDs()
	return ids[s.rng.IntN(len(ids))]
}

// sealAndQueue seals s.plain with the key keyID, and queues the result as a datagram to the given
// address.
func (s *Swim) sealAndQueue(to PacketDestination, keyID uint32) {
	from := len(s.sealed)
	s.sealed = s.sealer.Seal(s.sealed, s.plain, keyID)
	s.datagrams = append(s.datagrams, Datagram{To: to, Data: s.sealed[from:len(s.sealed):len(s.sealed)]})
}

// sendTable queues a sync: packets to m that carry the records of the table for which IsSentInSync
// is true. It does nothing if m was sent a sync less than one interval ago. If wantTheirs or
// Swim.wantTable is true, the first packet also asks for m's table. A sync has at most
// maxSyncPackets packets. If the table does not fit, the next call of sendTable, for any member,
// continues with the rest.
func (s *Swim) sendTable(m *Member, wantTheirs bool) {
	if m.LastSync != 0 && s.now-m.LastSync < s.interval {
		return
	}
	m.LastSync = s.now
	p := Packet{Kind: PacketSync, To: m.Name, WantTable: wantTheirs}
	s.fillHeader(&p)
	all, first := s.table.Members, s.syncFrom
	for i, sent := 0, 0; i < len(all) && sent < maxSyncPackets; sent++ {
		b := AppendPacketHeader(s.plain[:0], &p)
		for ; i < len(all); i++ {
			o := all[(first+i)%len(all)]
			if !o.IsSentInSync(s.now) {
				continue
			}
			longer := o.Append(b, s.now)
			if len(longer) > maxPlainPacket {
				break
			}
			b = longer
		}
		s.plain = b
		s.sealAndQueue(m.PacketDestination(), m.KeyID)
		p.WantTable = false
		s.syncFrom = (first + i) % len(all)
	}
}
