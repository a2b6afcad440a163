package main

// This file fills, seals and queues packets to send. A packet carries the sender's state, records,
// and as many updates as there is room for. It is sealed with a key that the receiver holds. Pure:
// no I/O and no clock. This file must not know why a packet is sent.

import "net/netip"

const (
	maxPlainPacket = MaxPacket - SealOverhead // bytes
	maxSyncPackets = 32                       // packets of one sync of a table
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

// sendTo sends p to m, at the address in m's record.
func (s *Swim) sendTo(m *Member, p Packet) {
	p.To = m.Name
	s.send(m.PacketDestination(), p)
}

// send seals and queues p with the records of recordsOf, at most two members, and with as many
// updates as fit. If the receiver may not know this member, recordsOf must be self.
func (s *Swim) send(to PacketDestination, p Packet, recordsOf ...*Member) {
	m := s.table.Get(p.To)
	b := s.encodeWithRecords(&p, recordsOf)
	s.plain = s.table.AppendUpdates(b, s.now, maxPlainPacket, p.To, m != nil && m.KnowsOurSession)
	s.sealAndQueue(to, s.keyIDFor(m))
}

// replyToUnproven sends p to a sender whose session has proven nothing. It seals p with the key of
// the packet that was opened last: the sender holds this key, whatever its record says. It adds no
// updates, because a replay would otherwise make updates count as passed on, and would get an
// answer much larger than the replayed packet.
func (s *Swim) replyToUnproven(to netip.AddrPort, p Packet, recordsOf ...*Member) {
	s.plain = s.encodeWithRecords(&p, recordsOf)
	s.sealAndQueue(PacketDestination{AddrPort: to}, s.openedKeyID)
}

// encodeWithRecords returns the encoding of p with the records of recordsOf. If the receiver is
// suspect, dead or left, it adds the receiver's own record, so that the receiver can refute it.
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

// fillHeader sets the fields of p that describe its sender. Every packet has them.
func (s *Swim) fillHeader(p *Packet) {
	p.From, p.Session, p.Digest, p.Buckets = s.name, s.self.Session, s.table.Digest, s.buckets
	p.TableSettled = s.isTableSettled()
	p.WantTable = p.WantTable || s.wantTable
}

// isTableSettled reports whether the table has not changed for two intervals.
func (s *Swim) isTableSettled() bool { return s.now-s.table.ChangedAt >= 2*s.interval }

// keyIDFor returns the ID of a key that m holds. For a live member that is the key in its record. A
// member that is not live may not have this member's newest key yet, or may no longer have the key
// in its record. For such a member, or for nil, keyIDFor chooses one of this member's keys at
// random. (With two seeds, taking turns would seal for one seed with the same key every time.)
func (s *Swim) keyIDFor(m *Member) uint32 {
	if m != nil && m.State.IsLive() {
		return m.KeyID
	}
	ids := s.sealer.KeyIDs()
	return ids[s.rng.IntN(len(ids))]
}

// sealAndQueue seals s.plain and queues the datagram.
func (s *Swim) sealAndQueue(to PacketDestination, keyID uint32) {
	from := len(s.sealed)
	s.sealed = s.sealer.Seal(s.sealed, s.plain, keyID)
	s.datagrams = append(s.datagrams, Datagram{To: to, Data: s.sealed[from:len(s.sealed):len(s.sealed)]})
}

// sendTable sends the table to m in full packets, at most once per interval. If wantTheirs, it also
// asks for m's table. It sends at most maxSyncPackets packets; the next call, for any member,
// continues with the rest of a larger table.
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
