package main

// Requests that wait for an answer. A request has a random ID, and counts as answered only when
// the member that it was sent to, or one of its relays, repeats that ID. Their number is
// bounded. Pure. This file must not know what an answer leads to.

import (
	"math/rand/v2"
	"slices"
	"time"
)

const maxPendingRequests = 1024 // challenges above all, when many members join

// A pendingRequest is one that is not answered yet.
type pendingRequest struct {
	id      uint64 // the packet's RequestID
	purpose requestPurpose
	name    string  // of the member that may answer; "": any may
	member  *Member // with that name; nil if it is not in the table
	sentAt  time.Duration
	dueAt   time.Duration // when to go on without an answer
	tries   int           // that timed out; of a probe: probePinged and so on

	relays       []string          // of a probe: members asked to ping as well
	relayNacked  bool              // of a probe: one of them answered that it had no answer
	origin       *Member           // of requestIndirect: the member that asked for it
	originID     uint64            // of requestIndirect: the RequestID under which it did
	to           PacketDestination // of requestJoin and requestNameCheck
	rivalSession uint64            // of requestNameCheck
}

// requestPurpose is what an answer shows.
type requestPurpose uint8

const (
	requestProbe     requestPurpose = iota // the member is alive, and not to be suspected
	requestIndirect                        // the same, to the member that asked for a ping
	requestReconnect                       // a member that is dead or suspected is alive
	requestChallenge                       // the member's packet was no replay
	requestJoin                            // which member is at the address of a seed
	requestNameCheck                       // a member of our name and a higher session is alive
	requestLeave                           // the member has heard that we leave
)

// pendingRequests are in the order in which they were sent, at most maxPendingRequests.
type pendingRequests []*pendingRequest

// addIfRoom gives r an ID and remembers it; nil if there are too many.
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

// remove forgets r.
func (p *pendingRequests) remove(r *pendingRequest) {
	*p = slices.DeleteFunc(*p, func(o *pendingRequest) bool { return o == r })
}

// find returns the request to the named member with that purpose, or nil.
func (p pendingRequests) find(purpose requestPurpose, name string) *pendingRequest {
	for _, r := range p {
		if r.purpose == purpose && r.name == name {
			return r
		}
	}
	return nil
}

// answeredBy returns the request that pkt answers, or nil: its sender has to be the member that
// was asked, or one of the relays, which name the member as the target.
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
