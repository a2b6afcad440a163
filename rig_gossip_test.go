package main

// This file simulates whole rings in one goroutine, in virtual time. Every packet and every timer
// is an event in one queue, and every random choice comes from one seed, so that a run can be
// repeated.

import (
	"container/heap"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A simEvent is a packet that arrives at a node, a timer of a node, or a function call.
type simEvent struct {
	at   time.Duration
	seq  uint64 // orders events with the same time
	node int
	run  uint64 // of a timer: the value of simNode.run when the timer was set; a timer of an earlier run is ignored
	from netip.AddrPort
	data []byte // the packet; nil for a timer
	do   func() // if not nil, the event is a call of do
}

// A simQueue is a heap of events, the earliest event first; see container/heap.
type simQueue []simEvent

func (q simQueue) Len() int { return len(q) }

func (q simQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}

func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }

func (q *simQueue) Push(x any) { *q = append(*q, x.(simEvent)) }

func (q *simQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = simEvent{}
	*q = old[:len(old)-1]
	return e
}

// A simNode is one simulated host, with the member that runs on it.
type simNode struct {
	name    string
	addr    netip.AddrPort
	swim    *Swim
	state   RestartState // stored state, with which the next member on this node starts
	up      bool
	run     uint64        // how often a member was started on this node
	timer   time.Duration // time of the timer event that calls the node's next Tick; -1 if there is none
	group   int           // packets of this node reach only nodes with the same group
	stalled time.Duration // the node handles no event before this time
	origin  time.Duration // time of the simulation at which the clock of the node shows 0
	waiting []simEvent    // packets that arrived during a stall, and wait until it ends
}

// A sim is a simulated network of nodes, with at most one member on each. A test may change the
// fields of a sim between the events.
type sim struct {
	tb       testing.TB
	rng      *rand.Rand
	now      time.Duration
	seq      uint64
	queue    simQueue
	nodes    []*simNode
	byAddr   map[netip.AddrPort]int
	keys     Keys
	interval time.Duration
	loss     float64       // share of the packets that are lost, 0 to 1
	double   float64       // share of the packets that arrive twice, 0 to 1
	min, max time.Duration // limits of a packet's random delay
	sent     int           // number of packets that all nodes have sent, lost packets included
	bytes    int           // number of bytes in these packets
	events   []simReport
	tap      func(from, to int, data []byte) // called for every packet that one node sends to another, even if it is lost; may be nil
	cut      func(from, to int) bool         // reports whether all packets from one node to another are lost; may be nil
}

// A simReport is an event that the member on a node reported, with the time of the simulation.
type simReport struct {
	GossipEvent
	at   time.Duration
	node int
}

const simInterval = time.Second

// newSim returns a network of n nodes, on which no member runs yet.
func newSim(tb testing.TB, n int, seed uint64) *sim {
	s := &sim{tb: tb, rng: rand.New(rand.NewPCG(seed, 0)), byAddr: map[netip.AddrPort]int{}, interval: simInterval,
		keys: testKeys(tb, 1), min: 50 * time.Microsecond, max: time.Millisecond}
	for i := range n {
		node := &simNode{name: fmt.Sprintf("node-%03d", i), addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 9006)}
		s.nodes = append(s.nodes, node)
		s.byAddr[node.addr] = i
	}
	return s
}

// joinedSim returns a ring of n running members that know each other, 5 s after they all did. By
// then they normally have no queued updates left.
func joinedSim(tb testing.TB, n int, seed uint64) *sim {
	s := newSim(tb, n, seed)
	s.startAll()
	s.until(10*time.Second, "all join", s.agree)
	s.run(5 * time.Second)
	return s
}

// start starts a member on node i, in place of a member that runs there. Its seeds are the nodes
// whose indexes the caller passes in seeds. If seeds is nil, its seed is node 0, and a member on
// node 0 has no seed.
func (s *sim) start(i int, seeds ...int) *Swim {
	n := s.nodes[i]
	var seed [32]byte
	for j := range 4 {
		binary.LittleEndian.PutUint64(seed[8*j:], s.rng.Uint64())
	}
	random := rand.NewChaCha8(seed)
	sealer, err := NewPacketSealer(s.keys, "sim", random)
	if err != nil {
		s.tb.Fatal(err)
	}
	n.swim = NewSwim(SwimConfig{Name: n.name, Addr: n.addr.String(), URL: "http://" + n.addr.Addr().String() + ":9004",
		Interval: s.interval, Random: random, Sealer: sealer, RestartState: n.state})
	n.state = n.swim.RestartState()
	n.up, n.origin = true, s.now-time.Duration(s.rng.Int64N(int64(time.Hour)))
	n.run++
	if seeds == nil && i != 0 {
		seeds = []int{0}
	}
	var addrs []netip.AddrPort
	for _, o := range seeds {
		addrs = append(addrs, s.nodes[o].addr)
	}
	n.swim.SetSeeds(addrs)
	n.timer = -1
	s.arm(i)
	return n.swim
}

func (s *sim) startAll() {
	for i := range s.nodes {
		s.start(i)
	}
}

// kill ends the member on node i without announcing a leave.
func (s *sim) kill(i int) { s.nodes[i].up = false }

// restart kills the member on node i, and starts it again from its stored state. For seeds see
// start.
func (s *sim) restart(i int, seeds ...int) {
	s.kill(i)
	s.start(i, seeds...)
}

// move gives node i a new address, which is an IPv6 address. Packets to its old address still reach
// the node.
func (s *sim) move(i int) {
	n := s.nodes[i]
	n.addr = netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprint("fd00::", i+1)), 9006)
	s.byAddr[n.addr] = i
}

// push adds e to the queue, after all events with the same time.
func (s *sim) push(e simEvent) {
	s.seq++
	e.seq = s.seq
	heap.Push(&s.queue, e)
}

// The method at adds an event to the queue: a call of do at the given time of the simulation.
func (s *sim) at(at time.Duration, do func()) { s.push(simEvent{at: at, do: do}) }

// arm adds a timer event for the next Tick of the member on node i, unless n.timer is the same time
// or earlier. It adds none if the member has stood down.
func (s *sim) arm(i int) {
	n := s.nodes[i]
	if n.swim.StoodDown { // Gossip.Run would have returned, and Tick does nothing
		return
	}
	at := max(n.swim.NextTickAt()+n.origin, s.now)
	if n.timer < 0 || at < n.timer {
		n.timer = at
		s.push(simEvent{at: at, node: i, run: n.run})
	}
}

func (s *sim) step() {
	e := heap.Pop(&s.queue).(simEvent)
	s.now = max(s.now, e.at)
	if e.do != nil {
		e.do()
		return
	}
	n := s.nodes[e.node]
	if !n.up || e.run != n.run && e.data == nil {
		return
	}
	if n.stalled > s.now {
		// Packets that arrive during a stall wait in the node's socket buffer, which holds 300
		// packets. Further packets are lost.
		if e.data == nil || len(n.waiting) < 300 {
			if e.data != nil {
				n.waiting = append(n.waiting, e)
			}
			e.at = n.stalled
			s.push(e)
		}
		return
	}
	n.waiting = nil
	var out []Datagram
	if e.data != nil {
		out = n.swim.Receive(s.now-n.origin, e.from, e.data)
	} else {
		if e.at < n.timer { // this timer event is outdated, because the node's next Tick is due later
			return
		}
		n.timer = -1
		out = n.swim.Tick(s.now - n.origin)
	}
	for _, ev := range n.swim.Events {
		s.events = append(s.events, simReport{ev, s.now, e.node})
		if ev.What == EventSessionTaken {
			n.state = n.swim.RestartState()
		}
	}
	for _, d := range out {
		s.send(e.node, d)
	}
	s.arm(e.node)
}

// send takes a datagram of the member on the node with the index from. It makes the datagram arrive
// after a random delay, or twice, unless the datagram is lost or no node has its destination
// address. It fails the test if the datagram is longer than MaxPacket.
func (s *sim) send(from int, d Datagram) {
	if len(d.Data) > MaxPacket {
		s.tb.Errorf("node %d sends a packet of %d bytes, more than %d", from, len(d.Data), MaxPacket)
	}
	s.sent++
	s.bytes += len(d.Data)
	to, ok := s.byAddr[d.To.AddrPort]
	if !ok {
		return
	}
	data := slices.Clone(d.Data)
	if s.tap != nil {
		s.tap(from, to, data)
	}
	if s.nodes[from].group != s.nodes[to].group || s.rng.Float64() < s.loss || s.cut != nil && s.cut(from, to) {
		return
	}
	for range 1 + map[bool]int{true: 1}[s.rng.Float64() < s.double] {
		s.push(simEvent{at: s.now + s.min + time.Duration(s.rng.Int64N(int64(s.max-s.min))), node: to, from: s.nodes[from].addr, data: data})
	}
}

// run lets the duration d of virtual time pass, and handles all events in that time.
func (s *sim) run(d time.Duration) {
	end := s.now + d
	for len(s.queue) > 0 && s.queue[0].at <= end {
		s.step()
	}
	s.now = end
}

// The method until lets virtual time pass until the function ok returns true, and returns how much
// time has passed. It calls ok every 10 ms of virtual time. When more than limit has passed, it
// fails the test. The text about describes the condition.
func (s *sim) until(limit time.Duration, about string, ok func() bool) time.Duration {
	s.tb.Helper()
	from := s.now
	for !ok() {
		if s.now-from > limit {
			s.tb.Errorf("ring of %d members: not within %v: %s", len(s.nodes), limit, about)
			return limit
		}
		s.run(10 * time.Millisecond)
	}
	return s.now - from
}

// agree reports whether every running member considers exactly the running members live.
func (s *sim) agree() bool {
	live := 0
	for _, n := range s.nodes {
		if n.up {
			live++
		}
	}
	for _, n := range s.nodes {
		if n.up && n.swim.table.Live != live {
			return false
		}
	}
	for _, n := range s.nodes {
		for _, o := range s.nodes {
			if n.up {
				m := n.swim.table.Get(o.name)
				if live := m != nil && m.State.IsLive(); live != o.up {
					return false
				}
			}
		}
	}
	return true
}

// knowGone reports whether no other running member considers the member on node i live.
func (s *sim) knowGone(i int) bool {
	for _, n := range s.nodes {
		if n.up && n != s.nodes[i] {
			if m := n.swim.table.Get(s.nodes[i].name); m != nil && m.State.IsLive() {
				return false
			}
		}
	}
	return true
}

// downs returns the number of EventDown reports at or after the time since: how often a member
// began to consider another member dead. If count is not nil, it counts only reports for which
// count returns true.
func (s *sim) downs(since time.Duration, count func(e simReport) bool) (n int) {
	for _, e := range s.events {
		if e.at >= since && e.What == EventDown && (count == nil || count(e)) {
			n++
		}
	}
	return n
}

func (s *sim) eventCount(what string) (n int) {
	for _, e := range s.events {
		if e.What == what {
			n++
		}
	}
	return n
}

// hasEvent reports whether the latest call of Receive or Tick of s reported an event with the given
// text.
func hasEvent(s *Swim, what string) bool {
	return slices.ContainsFunc(s.Events, func(e GossipEvent) bool { return e.What == what })
}

// lastTo makes the simulation store in *last each packet of the given kind that one node sends to
// another. from and to are the indexes of the two nodes. So *last is the latest such packet, until
// s.tap is replaced. Kind 0 stands for every kind.
func (s *sim) lastTo(from, to int, kind PacketKind, last *[]byte) {
	next := s.tap
	s.tap = func(f, t int, data []byte) {
		if next != nil {
			next(f, t, data)
		}
		if f == from && t == to && (kind == 0 || s.decode(f, data).Kind == kind) {
			*last = data
		}
	}
}

// decode opens the sealed packet data with the keys of node i, and decodes it. It fails the test if
// that is not possible.
func (s *sim) decode(i int, data []byte) (p Packet) {
	plain, _, err := s.nodes[i].swim.sealer.Open(nil, data)
	if err == nil {
		err = DecodePacket(plain, &p)
	}
	if err != nil {
		s.tb.Fatal(err)
	}
	return p
}

// seal returns p, sealed with the first key of the member on the node with the index from. If p has
// no sender name or no session, seal first sets the name or the session of that member.
func (s *sim) seal(from int, p Packet) []byte {
	sw := s.nodes[from].swim
	if p.Session == 0 {
		p.Session = sw.self.Session
	}
	if p.From == "" {
		p.From = sw.name
	}
	return sw.sealer.Seal(nil, encodePacket(p), 0)
}

// deliver makes the member on node i receive the packet data at once; from is the packet's sender
// address. deliver returns the member's answers without sending them.
func (s *sim) deliver(i int, from netip.AddrPort, data []byte) []Datagram {
	n := s.nodes[i]
	return n.swim.Receive(s.now-n.origin, from, data)
}

// tick calls Tick of the member on node i. at is the time on the node's clock. tick handles no
// event of the queue. It returns the packets of the member without sending them.
func (s *sim) tick(i int, at time.Duration) []Datagram {
	n := s.nodes[i]
	s.now = max(s.now, at+n.origin)
	return n.swim.Tick(at)
}

// suspicionOf returns node i's record of node o, changed so that node 2 suspects node o in it.
func (s *sim) suspicionOf(i, o int) MemberRecord {
	r := s.nodes[i].swim.table.Get(s.nodes[o].name).MemberRecord
	r.State, r.Accusers = StateSuspect, []uint64{accuserID(s.nodes[2].name)}
	return r
}
