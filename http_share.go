package main

// This file decides which connection a full listener closes to make room for a new one. An address
// from which a sender has authenticated is known, and all other addresses are strangers. Strangers
// lose connections first, and among equals the address with the highest load. So a flood of
// connections displaces itself. A connection is protected while the server handles an authenticated
// request on it. This file must not do I/O, and callers pass the current time.

import (
	"cmp"
	"container/heap"
	"container/list"
	"net/netip"
	"slices"
	"time"
)

const (
	addrsPerSender = 4             // addresses that a listener remembers of one sender: a site may have several, for example behind a NAT with a pool of addresses
	maxRemembered  = 100_000       // addresses that a listener remembers of all senders together
	knownFor       = 6 * time.Hour // how long a listener remembers an address from which the sender sends no more requests
)

// connTable has the open connections of one listener. Its owner must hold a lock during each call.
// With n open connections a call takes O(log n).
type connTable struct {
	max       int    // most connections that the listener may have open; only share uses it
	open      int    // connections in the table
	pushed    uint64 // number of connections that were ever appended to a waiting list
	peers     map[netip.Addr]*connPeer
	strangers connPeerHeap // peers that are not known and have a connection that may be closed
	known     connPeerHeap // peers that are known and have a connection that may be closed
	shares    int          // sum of connPeer.shares of all peers in known

	// remembered has a *senderAddr for each address of each sender. The address from which its
	// sender has sent no request for the longest time is first. senders has the elements of each
	// sender in the same order, at most addrsPerSender.
	remembered list.List
	senders    map[string][]*list.Element
}

// connPeer is an address that has open connections or is known.
type connPeer struct {
	addr    netip.Addr // see peerAddr
	open    int        // open connections from this address, including protected connections
	senders int        // senders of which this address is remembered; the address is known if the number is not 0
	shares  int        // value of senders that connTable.shares has; 0 if the peer is not in connTable.known

	// waiting has the connections that may be closed, the longest waiting first: those without an
	// authenticated request so far in waiting[0], and the others in waiting[1]. So behind a proxy,
	// where all connections have one address, a flood does not displace the connections of sites.
	waiting [2]list.List
	heap    *connPeerHeap // the heap that has this peer, or nil
	index   int           // index of this peer in heap
}

// connEntry is the part of a connection that a connTable uses. Only the table's methods access it.
type connEntry struct {
	conn          *trackedConn  // the connection itself; the table does not use it
	addr          netip.Addr    // see peerAddr
	peer          *connPeer     // nil if the connection is not in the table
	element       *list.Element // of this connection in one of the peer's waiting lists; nil while the connection is protected
	pushed        uint64        // order of the connections in all waiting lists
	authenticated bool          // whether the connection has carried an authenticated request
}

// senderAddr is an address from which a sender, such as a site, has authenticated.
type senderAddr struct {
	sender string
	peer   *connPeer
	at     time.Time // when the sender last authenticated from there
}

func newConnTable(max int) *connTable {
	return &connTable{max: max, peers: map[netip.Addr]*connPeer{}, senders: map[string][]*list.Element{}}
}

// add adds a connection that has just been opened. The connection waits.
func (t *connTable) add(c *connEntry) {
	t.open++
	p := t.peers[c.addr]
	if p == nil {
		p = &connPeer{addr: c.addr}
		t.peers[c.addr] = p
	}
	c.peer = p
	p.open++
	t.push(c)
}

// remove removes a connection. It does nothing if the connection is not in the table.
func (t *connTable) remove(c *connEntry) {
	p := c.peer
	if p == nil {
		return
	}
	t.unlink(c)
	c.peer = nil
	t.open--
	p.open--
	t.update(p)
}

// protect protects a connection from being closed, until unprotect is called. It remembers that
// sender has authenticated at the connection's address. If sender is empty, the address stands for
// the sender. Each sender makes only its newest addrsPerSender addresses known, so that a hostile
// site with many addresses cannot make all of them known. protect does nothing if the connection is
// not in the table.
func (t *connTable) protect(c *connEntry, sender string, now time.Time) {
	p := c.peer
	if p == nil {
		return
	}
	t.unlink(c)
	c.authenticated = true
	if sender == "" {
		sender = c.addr.String()
	}
	used := t.senders[sender]
	if i := slices.IndexFunc(used, func(e *list.Element) bool { return e.Value.(*senderAddr).peer == p }); i >= 0 {
		known := used[i]
		known.Value.(*senderAddr).at = now
		t.remembered.MoveToBack(known)
		copy(used[i:], used[i+1:])
		used[len(used)-1] = known
		t.update(p)
	} else {
		p.senders++ // before an old entry is forgotten, so that p is not forgotten in between
		t.update(p)
		if len(used) == addrsPerSender {
			t.forget(used[0])
		}
		t.senders[sender] = append(t.senders[sender], t.remembered.PushBack(&senderAddr{sender, p, now}))
	}
	for { // ends at the latest at the address of this request, whose time is now
		first := t.remembered.Front()
		if t.remembered.Len() <= maxRemembered && now.Sub(first.Value.(*senderAddr).at) <= knownFor {
			return
		}
		t.forget(first)
	}
}

// unprotect ends the protection of a connection. The connection then counts as the one that has
// waited for the shortest time. A connection without protection also gets that place.
func (t *connTable) unprotect(c *connEntry) {
	if c.peer != nil {
		t.unlink(c)
		t.push(c)
	}
}

// victim returns the connection that should be closed to make room, or nil if every connection is
// protected. The victim is a connection of a stranger, if there is one. A known address whose load
// is more than a share counts as a stranger, so that no sender can keep strangers out. Among the
// addresses left, the one with the highest load loses its longest waiting connection. Connections of
// this address that have carried an authenticated request come last.
func (t *connTable) victim() *connEntry {
	p, known := t.strangers.first(), t.known.first()
	if p == nil || known != nil && known.load() > t.share() && known.load() > p.load() {
		p = known
	}
	if p == nil {
		return nil
	}
	return p.longestWaiting()
}

// share returns the load up to which a known address loses no connection while strangers have any.
// It is an equal share of max for each sender of each known address, and one more share for all
// strangers together.
func (t *connTable) share() float64 { return float64(t.max) / float64(t.shares+1) }

// load returns the number of open connections of p for each sender of which p is remembered. A
// stranger counts as one sender. So an address that many sites share, such as a NAT, may have many
// connections.
func (p *connPeer) load() float64 { return float64(p.open) / float64(max(1, p.senders)) }

// isStranger reports whether a connection in the table has carried no authenticated request and its
// address is not known.
func (t *connTable) isStranger(c *connEntry) bool { return !c.authenticated && c.peer.senders == 0 }

// push appends a connection to the waiting list in which it belongs.
func (t *connTable) push(c *connEntry) {
	t.pushed++
	c.pushed = t.pushed
	c.element = c.waitingList().PushBack(c)
	t.update(c.peer)
}

// unlink takes a connection out of its waiting list, if it is in one. The caller must call update.
func (t *connTable) unlink(c *connEntry) {
	if c.element != nil {
		c.waitingList().Remove(c.element)
		c.element = nil
	}
}

// forget forgets an element of t.remembered.
func (t *connTable) forget(e *list.Element) {
	s := t.remembered.Remove(e).(*senderAddr)
	t.senders[s.sender] = slices.DeleteFunc(t.senders[s.sender], func(o *list.Element) bool { return o == e })
	if len(t.senders[s.sender]) == 0 {
		delete(t.senders, s.sender)
	}
	s.peer.senders--
	t.update(s.peer)
}

// update moves a peer to the place in the heaps where it belongs after a change. It deletes the
// peer if it has no connections and is not known.
func (t *connTable) update(p *connPeer) {
	var want *connPeerHeap
	switch {
	case p.longestWaiting() == nil:
	case p.senders > 0:
		want = &t.known
	default:
		want = &t.strangers
	}
	t.shares -= p.shares
	if p.shares = 0; want == &t.known {
		p.shares = p.senders
	}
	t.shares += p.shares
	if p.heap != nil && p.heap != want {
		heap.Remove(p.heap, p.index)
		p.heap = nil
	}
	switch {
	case p.heap != nil:
		heap.Fix(p.heap, p.index)
	case want != nil:
		p.heap = want
		heap.Push(want, p)
	}
	if p.open == 0 && p.senders == 0 {
		delete(t.peers, p.addr)
	}
}

func (c *connEntry) waitingList() *list.List {
	if c.authenticated {
		return &c.peer.waiting[1]
	}
	return &c.peer.waiting[0]
}

// longestWaiting returns the connection that p loses first, or nil if p has none that may be
// closed.
func (p *connPeer) longestWaiting() *connEntry {
	for i := range p.waiting {
		if first := p.waiting[i].Front(); first != nil {
			return first.Value.(*connEntry)
		}
	}
	return nil
}

// connPeerHeap is a heap.Interface. Its first peer has the highest load. Among peers with an equal
// load, it is the peer whose connection waits longest. Every peer has a connection that may be
// closed.
type connPeerHeap []*connPeer

// first returns the first peer, or nil if the heap is empty.
func (h connPeerHeap) first() *connPeer {
	if len(h) == 0 {
		return nil
	}
	return h[0]
}

func (h connPeerHeap) Len() int { return len(h) }

func (h connPeerHeap) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(h[j].load(), h[i].load()), cmp.Compare(h[i].longestWaiting().pushed, h[j].longestWaiting().pushed)) < 0
}

func (h connPeerHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *connPeerHeap) Push(p any) {
	p.(*connPeer).index = len(*h)
	*h = append(*h, p.(*connPeer))
}

func (h *connPeerHeap) Pop() any {
	last := len(*h) - 1
	p := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return p
}
