package main

// This file defines the events that a member reports for the process log. Other hosts can cause some
// events at any rate, and the file limits how often a member reports such an event. An event says
// what the operator should do, if a person must act. Pure: no I/O and no clock. This file must not
// decide when an event happens.

import (
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	limitedEventEvery = time.Minute // shortest time between two limited events with the same text; see addLimitedEvent
	maxEventSenders   = 4           // most senders that one limited event names
)

// A GossipEvent is an event that the operator may want to find in the process log.
type GossipEvent struct {
	What   string // one of the constants below
	Name   string // the member that the event is about; empty if there is none or it is not known
	Addr   string // the member's address, or the senders of packets
	Join   string // the value of --join that the event is about, or all values; empty for other events
	Detail string // what exactly is wrong, in English; may be empty
	Count  int    // number of times that a limited event has happened since it was last reported, this time included; otherwise 0
}

// The values of GossipEvent.What.
const (
	EventUp           = "member is up"
	EventDown         = "member is down: start it again, or repair the network between the servers"
	EventLeft         = "member has left"
	EventSuspect      = "member is suspected"
	EventSessionTaken = "other members know a later session of this member: took a higher one" // the caller must store RestartState() again
	EventStalled      = "this process stalled: suspecting no member for a while"
	EventJoined       = "--join has reached the ring" // a server was reached at each value of --join

	EventNameConflict = "another server has the name of this server and should stop now: give one of the two another --name"
	EventStoodDown    = "another server has the name of this server, so this server stops: give one of the two another --name"
	EventNewStorage   = "--storage-dir has no state of this server, but the ring knows the server's name from before: if --storage-dir has changed by mistake, stop this server and start it with the old directory; if the old directory is lost, nothing has to be done"
	EventJoinFails    = "--join reaches no server, so this server forms a ring of its own until it does"
	EventJoinPartly   = "a --join address reaches no server"
	EventLookupFails  = "the address of a member cannot be looked up: correct --advertise on this member, or the DNS of this host"
	EventAccused      = "another member gets no answer from this server: if this happens often, check that UDP and TCP reach this server at the address that it advertises"
	EventSameAddress  = "another member advertises the address of this server: correct --advertise on one of the two servers"
	EventUnreachable  = "member sends gossip, but does not answer at the address that it advertises: correct --advertise on this member, or open UDP and TCP to this address"
	EventOtherKey     = "gossip that is sealed with another key arrives: if a server of yours sends it, copy the same cluster.key to both servers; otherwise firewall the port of --listen-cluster"
	EventForged       = "gossip that is damaged or forged arrives: if a server of yours sends it, check the network between the servers; otherwise firewall the port of --listen-cluster"
	EventOtherVersion = "gossip of another version of telemeter arrives: if a server of yours sends it, run the same version on all servers; otherwise firewall the port of --listen-cluster"
)

// Level returns the level at which the event belongs in the process log: at least a warning if a
// person must act.
func (e GossipEvent) Level() slog.Level {
	switch e.What {
	case EventUp, EventLeft, EventSuspect, EventSessionTaken, EventStalled, EventJoined:
		return slog.LevelInfo
	case EventStoodDown:
		return slog.LevelError
	}
	return slog.LevelWarn
}

// An eventLimit counts the limited events with one text that were not reported yet.
type eventLimit struct {
	dueAt   time.Duration // when the next event may be reported
	count   int
	senders []netip.AddrPort // different senders, at most maxEventSenders
}

func (s *Swim) addEvent(what, name, addr string) {
	s.Events = append(s.Events, GossipEvent{What: what, Name: name, Addr: addr})
}

// addLimitedEvent reports the first event with the text what at once, and later events at most once
// per limitedEventEvery. So a flood of packets cannot fill the process log. An event names the
// first senders since the last report; an invalid sender is left out. name and detail are those of
// the event that is reported.
func (s *Swim) addLimitedEvent(what, name string, from netip.AddrPort, detail string) {
	if s.limits == nil {
		s.limits = map[string]*eventLimit{}
	}
	l := s.limits[what]
	if l == nil {
		l = &eventLimit{}
		s.limits[what] = l
	}
	l.count++
	if from.IsValid() && len(l.senders) < maxEventSenders && !slices.Contains(l.senders, from) {
		l.senders = append(l.senders, from)
	}
	if s.now < l.dueAt {
		return
	}
	var senders []string
	for _, a := range l.senders {
		senders = append(senders, a.String())
	}
	s.Events = append(s.Events, GossipEvent{What: what, Name: name, Addr: strings.Join(senders, ", "), Detail: detail, Count: l.count})
	*l = eventLimit{dueAt: s.now + limitedEventEvery, senders: l.senders[:0]}
}

// refuse counts a packet that cannot be opened, and reports it if a person must act. err is the
// error of PacketSealer.Open. If the packet has another key or version and comes from the address
// of a seed, refuse stores err in the seed.
func (s *Swim) refuse(from netip.AddrPort, err error) {
	reason := refusedReason(err)
	s.Refused[reason]++
	switch reason {
	case RefusedKey:
		s.addLimitedEvent(EventOtherKey, "", from, "")
	case RefusedVersion:
		s.addLimitedEvent(EventOtherVersion, "", from, err.Error())
	case RefusedForged:
		s.addLimitedEvent(EventForged, "", from, "")
		return
	default:
		return
	}
	if sd := s.seedAt(from); sd != nil {
		sd.refused = err
	}
}
