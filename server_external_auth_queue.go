package main

// This file bounds the requests to the authorization service: how many are in flight and how many
// wait, in total and for each sender. A sender is a client address or a credential. A request that
// finds no free slot waits for a bounded time. Waiting requests get slots in the order of arrival,
// which is fair over senders, because each sender takes part with only a few requests at a time.

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

const (
	maxAuthorizing          = 16               // requests of one queue in flight; together the two queues of an ExternalAuthorizer have 32
	maxAuthorizingPerSender = 4                // requests of one sender in flight or next in the order of arrival
	maxQueued               = 1024             // requests of one queue, in flight and waiting; both queues together leave half of the connections of the listener free
	maxQueuedPerStranger    = 16               // requests of one sender in the queue of strangers, in flight and waiting
	maxQueuedPerKnown       = 64               // requests of one sender in the queue of known senders
	maxAuthorizeWait        = 10 * time.Second // together with the timeout of the request to the service less than the 40 s that a client waits
)

var errAuthorizeWait = fmt.Errorf("no request to the service could be sent within %v", maxAuthorizeWait)

// errAuthorizeBusy returns the error of a request that gets no place or no slot.
func errAuthorizeBusy(detail error) *authorizeError {
	return &authorizeError{
		status: http.StatusServiceUnavailable, reason: "overloaded", retryAfter: authorizeRetryAfter,
		text: "too many requests wait for the authorization service", detail: detail,
	}
}

// authorizeQueue bounds the requests of one class of senders. It is safe for concurrent use.
type authorizeQueue struct {
	perSender int       // requests of one sender, in flight and waiting
	slots     semaphore // one slot for each request in flight; Acquire is first come, first served

	mu      sync.Mutex                     // guards the fields below
	queued  int                            // requests in senders
	senders map[authorizeKey]*queuedSender // the senders that have requests in the queue
}

// queuedSender has the requests of one sender, in flight and waiting.
type queuedSender struct {
	queued int
	slots  semaphore
}

func newAuthorizeQueue(perSender int) *authorizeQueue {
	return &authorizeQueue{perSender: perSender, slots: newSemaphore(maxAuthorizing), senders: map[authorizeKey]*queuedSender{}}
}

// enter takes a place in the queue for a request, and returns the slots of its sender. The caller
// must call leave at the end of the request. The error is an authorizeError: there is no place for
// another request of this sender, or for any request.
func (q *authorizeQueue) enter(sender authorizeKey) (place semaphore, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.senders[sender]
	switch {
	case s != nil && s.queued >= q.perSender:
		return nil, errAuthorizeBusy(fmt.Errorf("%d requests of this sender are waiting or in flight", s.queued))
	case q.queued >= maxQueued:
		return nil, errAuthorizeBusy(fmt.Errorf("%d requests are waiting or in flight", q.queued))
	case s == nil:
		s = &queuedSender{slots: newSemaphore(maxAuthorizingPerSender)}
		q.senders[sender] = s
	}
	q.queued++
	s.queued++
	return s.slots, nil
}

// leave gives back a place that enter took.
func (q *authorizeQueue) leave(sender authorizeKey) {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.senders[sender]
	q.queued--
	if s.queued--; s.queued == 0 {
		delete(q.senders, sender)
	}
}

// acquireSlot waits for one of the sender's slots and then for a slot of the queue. If ctx ends
// first, it returns the cause. Otherwise the caller must call releaseSlot.
func (q *authorizeQueue) acquireSlot(ctx context.Context, place semaphore) error {
	if place.Acquire(ctx) != nil {
		return context.Cause(ctx)
	}
	if q.slots.Acquire(ctx) != nil {
		place.Release()
		return context.Cause(ctx)
	}
	return nil
}

func (q *authorizeQueue) releaseSlot(place semaphore) {
	q.slots.Release()
	place.Release()
}

// addressKey returns the key of the client at remoteAddr, which is host:port. All clients in an
// IPv6 /64 have the same key, because one host can use every address of it.
func addressKey(remoteAddr string) authorizeKey {
	remote, _ := netip.ParseAddrPort(remoteAddr) // after an error, all such clients share one key
	addr := remote.Addr().Unmap()
	network, _ := addr.Prefix(min(addr.BitLen(), 64))
	return newAuthorizeKey("address", network.String())
}
