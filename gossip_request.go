package main

// This file holds the pending requests: the requests of this member that wait for an answer. A
// request has a random ID. It counts as answered only when the member that was asked, or a relay
// that was asked to ping that member, repeats the ID. A request to an address where the member's
// name is not known may be answered by any member. The number of pending requests is bounded. Pure:
// no I/O and no clock. This file must not know what an answer leads to.

import (
	"math/rand/v2"
	"slices"
	"time"
)

const (
	maxPendingRequests   = 1024 // limit of pending requests
	maxPendingChallenges = 768  // limit of pending requests beyond which no challenge is added, so that probes still have room when many members join at once
)

// A pendingRequest is a request that has not been answered yet.
type pendingRequest struct {
	id      uint64 // RequestID of the packets that carry the request
	purpose requestPurpose
	name    string  // name of the member that may answer; "" if any member may answer
	member  *Member // the member called name, if ping or Leave added the request; otherwise nil
	sentAt  time.Duration
	dueAt   time.Duration // when handleRequestTimeout must be called if there is no answer
	tries   int           // of a probe: its stage (probePinged and so on); of requestLeave and requestNameCheck: number of packets sent

	relays       []string          // of a probe: names of the members that were asked to ping the probed member too
	relayNacked  bool              // of a probe: a relay has reported that it got no answer from the probed member
	origin       *Member           // of requestIndirect: the member whose PacketPingReq asked for the ping
	originID     uint64            // of requestIndirect: the RequestID of origin's PacketPingReq
	to           PacketDestination // of requestJoin and requestNameCheck: the address that the request is sent to
	rivalSession uint64            // of requestNameCheck: session, higher than this member's, in a received record or packet with this member's name

	answeredSession, answeredCounter uint64 // of requestChallenge: session and packet counter of the newest packet of the member that was answered with this challenge
}

// isOlderThan reports whether r, a challenge, has answered only packets that are older than the
// packet with the given session and packet counter.
func (r *pendingRequest) isOlderThan(session, counter uint64) bool {
	return session > r.answeredSession || session == r.answeredSession && counter > r.answeredCounter
}

// A requestPurpose is the purpose of a request: what this member learns from the answer.
type requestPurpose uint8

const (
	requestProbe     requestPurpose = iota // an answer shows that the probed member is alive, so that it must not be suspected
	requestIndirect                        // an answer shows that the pinged member is alive; this is reported to origin
	requestReconnect                       // an answer shows that a member recorded as dead or suspect is alive
	requestChallenge                       // an answer proves that the challenged session is running, so that its packets may be believed
	requestJoin                            // an answer shows which member uses the address of a seed
	requestNameCheck                       // an answer shows that another live member has this member's name
	requestLeave                           // an answer shows that the asked member knows that this member leaves
)

// pendingRequests holds at most maxPendingRequests requests, in the order in which they were added.
type pendingRequests []*pendingRequest

// addIfRoom gives r a random ID, adds r to p, and returns it. It returns nil and adds nothing if
// maxPendingRequests requests are pending, or maxPendingChallenges if r is a challenge.
func (p *pendingRequests) addIfRoom(now time.Duration, rng *rand.Rand, r pendingRequest) *pendingRequest {
	limit := maxPendingRequests
	if r.purpose == requestChallenge {
		limit = maxPendingChallenges
	}
	if len(*p) >= limit {
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

// find returns the first pending request that has this purpose and this member name, or nil.
func (p pendingRequests) find(purpose requestPurpose, name string) *pendingRequest {
	for _, r := range p {
		if r.purpose == purpose && r.name == name {
			return r
		}
	}
	return nil
}

// answeredBy returns the pending request that pkt answers, or nil. Only the member that was asked
// (any member if the request names none), or one of the request's relays, can answer. A relay's
// packet must name the asked member as its Target.
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
