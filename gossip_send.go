package main

// How a member sends: packets are filled with the sender's state, with records and with the
// updates there is room for, and sealed under a key that the receiver holds. Pure. This file
// must not know why something is sent.

import "net/netip"

const (
	maxPlainPacket = MaxPacket - SealOverhead
	maxSyncPackets = 32 // of one table
)

// An PacketDestination is where a packet goes: AddrPort, or if that is not valid Host, a host:port.
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

// send sends p with the records of recordsOf, two members at most, and as many updates as fit. If
// the receiver may not know us, recordsOf has to be self.
func (s *Swim) send(to PacketDestination, p Packet, recordsOf ...*Member) {
	m := s.table.Get(p.To)
	b := s.encodeWithRecords(&p, recordsOf)
	s.plain = s.table.AppendUpdates(b, s.now, maxPlainPacket, p.To, m != nil && m.KnowsOurSession)
	s.sealAndQueue(to, s.keyIDFor(m))
}

// replyToUnproven answers a sender that has proven nothing. It seals with the key of the packet
// that was opened last, which that sender holds whatever its record says. It sends no updates: a
// replay would make them count as passed on, and the answer much larger than the packet.
func (s *Swim) replyToUnproven(to netip.AddrPort, p Packet, recordsOf ...*Member) {
	s.plain = s.encodeWithRecords(&p, recordsOf)
	s.sealAndQueue(PacketDestination{AddrPort: to}, s.openedKeyID)
}

// encodeWithRecords returns p with the records of recordsOf. If the receiver is suspected or dead,
// its own record is added, so that it can refute that.
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

// fillHeader sets what every packet says of its sender.
func (s *Swim) fillHeader(p *Packet) {
	p.From, p.Session, p.Digest, p.Buckets = s.name, s.self.Session, s.table.Digest, s.buckets
	p.TableSettled = s.isTableSettled()
	p.WantTable = p.WantTable || s.wantTable
}

// isTableSettled tells whether the table has not changed for two intervals.
func (s *Swim) isTableSettled() bool { return s.now-s.table.ChangedAt >= 2*s.interval }

// keyIDFor returns the ID of a key that m holds. A member that is not live may not have our newest
// key yet, or no longer its own last one, so it gets any of our keys. (In turn would give one of
// two seeds the same key every time.)
func (s *Swim) keyIDFor(m *Member) uint32 {
	if m != nil && m.State.IsLive() {
		return m.KeyID
	}
	ids := s.sealer.KeyIDs()
	return ids[s.rng.IntN(len(ids))]
}

// sealAndQueue seals s.plain and queues it.
func (s *Swim) sealAndQueue(to PacketDestination, keyID uint32) {
	from := len(s.sealed)
	s.sealed = s.sealer.Seal(s.sealed, s.plain, keyID)
	s.datagrams = append(s.datagrams, Datagram{To: to, Data: s.sealed[from:len(s.sealed):len(s.sealed)]})
}

// sendTable sends the table to m, as full packets, and asks for m's table if wantTheirs; at most
// once per interval. A table that needs more than maxSyncPackets is continued by the next call.
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
