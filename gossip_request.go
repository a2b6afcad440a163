package main

// Pending requests: the requests of this member that wait for an answer. A request has a random ID.
// It counts as answered only when the member that it was sent to, or one of its relays, repeats
// that ID. The number of pending requests is bounded. Pure: no I/O and no clock. This file must not
// know what an answer leads to.

import (
	"math/rand/v2"
	"slices"
	"time"
)

const maxPendingRequests = 1024 // most of them challenges, when many members join at once

// A pendingRequest is a request that has not been answered yet.
type pendingRequest struct {
	id      uint64 // the packet's RequestID
	purpose requestPurpose
	name    string  // of the member that may answer; "" if any member may answer
	member  *Member // the member called name; nil if it is not in the table
	sentAt  time.Duration
	dueAt   time.Duration // when to act if there is no answer
	tries   int           // of a probe: its stage, probePinged and so on; of requestLeave and requestNameCheck: packets sent

	relays       []string          // of a probe: members that were asked to ping too
	relayNacked  bool              // of a probe: a relay reported that it got no answer
	origin       *Member           // of requestIndirect: the member that asked for the ping
	originID     uint64            // of requestIndirect: the RequestID of origin's PacketPingReq
	to           PacketDestination // of requestJoin and requestNameCheck: where the request was sent
	rivalSession uint64            // of requestNameCheck: the higher session with this member's name
}

// A requestPurpose is the purpose of a request. The comments state what an answer shows.
type requestPurpose uint8

const (
	requestProbe     requestPurpose = iota // the member is alive, so that it must not be suspected
	requestIndirect                        // the member is alive, which origin wants to know
	requestReconnect                       // a member that is dead or suspected is alive
	requestChallenge                       // the member's packet was not a replay
	requestJoin                            // which member uses the address of a seed
	requestNameCheck                       // another member with this member's name and a higher session is alive
	requestLeave                           // the member knows that this member leaves
)

// pendingRequests are in the order in which they were added. There are at most maxPendingRequests.
type pendingRequests []*pendingRequest

// addIfRoom gives r a random ID, adds it, and returns it. It returns nil if maxPendingRequests are
// pending.
func (p *pendingRequests) addIfRoom(now time.Duration, rng *rand.Rand, r pendingRequest) *pendingRequest {
	if len(*p) >= maxPendingRequests {
		return nil
	}
	for r.id == 0 {
		r.id = rng.Uint64()
	}
	r.sentAt = now
	*p = append(*p, &r)
	return &r
}

// remove removes r. It does nothing if r is not pending.
func (p *pendingRequests) remove(r *pendingRequest) {
	*p = slices.DeleteFunc(*p, func(o *pendingRequest) bool { return o == r })
}

// find returns a pending request to the named member with that purpose, or nil.
func (p pendingRequests) find(purpose requestPurpose, name string) *pendingRequest {
	for _, r := range p {
		if r.purpose == purpose && r.name == name {
			return r
		}
	}
	return nil
}

// answeredBy returns the request that pkt answers, or nil. The sender of pkt must be the member
// that was asked, or one of the relays. A relay's packet names the asked member as its Target.
func (p pendingRequests) answeredBy(pkt *Packet) *pendingRequest {
	if pkt.ReplyTo == 0 {
		return nil
	}
	for _, r := range p {
		if r.id != pkt.ReplyTo {
			continue
		}
		direct := pkt.Kind == PacketAck && pkt.Target == "" && (r.name == pkt.From || r.name == "")
		relayed := (pkt.Kind == PacketAck || pkt.Kind == PacketNack) && pkt.Target != "" && pkt.Target == r.name && slices.Contains(r.relays, pkt.From)
		if direct || relayed {
			return r
		}
	}
	return nil
}
