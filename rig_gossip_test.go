package main

// A simulation of whole rings in one goroutine under virtual time. Every packet and every timer is
// an event in one queue, and every random choice comes from one seed, so that a run can be
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
	run  uint64 // of the node; a timer of an earlier run is ignored
	from netip.AddrPort
	data []byte // of a packet; nil for a timer
	do   func() // not nil: the event is a call of do
}

// A simQueue is a heap of events, by time; see container/heap.
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

// A simNode is one host of a sim, with the member that runs on it.
type simNode struct {
	name    string
	addr    netip.AddrPort
	swim    *Swim
	state   RestartState // that the next start uses
	up      bool
	run     uint64        // number of starts
	timer   time.Duration // time of the earliest timer event; -1 if there is none
	group   int           // packets reach only nodes of the same group
	stalled time.Duration // the node handles no event before this time
	origin  time.Duration // time of the sim at which the clock of the node shows 0
	waiting []simEvent    // packets that wait until the stall ends
}

// A sim is a network of members. A test may change its fields while it runs.
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
	loss     float64       // share of the packets that are lost
	double   float64       // share of the packets that arrive twice
	min, max time.Duration // delay of a packet
	sent     int           // packets
	bytes    int           // of the packets sent
	events   []simReport
	tap      func(from, to int, data []byte) // is called for every packet sent; may be nil
	cut      func(from, to int) bool         // reports packets that are always lost; may be nil
}

// A simReport is an event that node reported at a time of the sim.
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

// joinedSim returns a ring of n members that know each other and have nothing left to gossip.
func joinedSim(tb testing.TB, n int, seed uint64) *sim {
	s := newSim(tb, n, seed)
	s.startAll()
	s.until(10*time.Second, "all join", s.agree)
	s.run(5 * time.Second)
	return s
}

// start starts a member on node i, and ends the member that runs there. The seeds of the member are
// the nodes seeds, or node 0 if seeds is nil.
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

// startAll starts a member on every node.
func (s *sim) startAll() {
	for i := range s.nodes {
		s.start(i)
	}
}

// kill ends the member on node i without a leave.
func (s *sim) kill(i int) { s.nodes[i].up = false }

// restart kills the member on node i and starts a member from its saved state.
func (s *sim) restart(i int, seeds ...int) {
	s.kill(i)
	s.start(i, seeds...)
}

// move gives node i another address, an IPv6 address.
func (s *sim) move(i int) {
	n := s.nodes[i]
	n.addr = netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprint("fd00::", i+1)), 9006)
	s.byAddr[n.addr] = i
}

// push adds e to the queue.
func (s *sim) push(e simEvent) {
	s.seq++
	e.seq = s.seq
	heap.Push(&s.queue, e)
}

// at makes the sim call do at a time.
func (s *sim) at(at time.Duration, do func()) { s.push(simEvent{at: at, do: do}) }

// arm adds a timer event for the next tick of node i, unless an earlier one is queued.
func (s *sim) arm(i int) {
	n := s.nodes[i]
	if n.swim.StoodDown { // Gossip.Run ends, and Tick does nothing
		return
	}
	at := max(n.swim.NextTickAt()+n.origin, s.now)
	if n.timer < 0 || at < n.timer {
		n.timer = at
		s.push(simEvent{at: at, node: i, run: n.run})
	}
}

// step handles the next event of the queue.
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
		// Packets that arrive during a stall wait in the socket's buffer, which holds 300.
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
		if e.at < n.timer { // an outdated timer: the next tick of the node is later
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

// send sends d from node from, unless it is lost.
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

// run lets d of virtual time pass.
func (s *sim) run(d time.Duration) {
	end := s.now + d
	for len(s.queue) > 0 && s.queue[0].at <= end {
		s.step()
	}
	s.now = end
}

// until lets time pass until ok returns true, and returns how much time has passed. It calls ok
// every 10 ms. After limit it fails the test.
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

// knowGone reports whether no other running member considers node i live.
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

// downs returns how often a member has declared another member dead since a time. If count is not
// nil, it counts only reports for which count returns true.
func (s *sim) downs(since time.Duration, count func(e simReport) bool) (n int) {
	for _, e := range s.events {
		if e.at >= since && e.What == EventDown && (count == nil || count(e)) {
			n++
		}
	}
	return n
}

// eventCount returns how many events have the text what.
func (s *sim) eventCount(what string) (n int) {
	for _, e := range s.events {
		if e.What == what {
			n++
		}
	}
	return n
}

// hasEvent reports whether the latest call of Receive or Tick reported the event what.
func hasEvent(s *Swim, what string) bool {
	return slices.ContainsFunc(s.Events, func(e GossipEvent) bool { return e.What == what })
}

// lastTo stores each packet of a kind from one node to another in last, so that last is the latest
// of them. Kind 0 stands for every kind.
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

// decode opens and decodes a packet with the keys of node i.
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

// seal seals p as the member of node from would. It fills in the name and session of that member
// unless p has others.
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

// deliver makes node i receive data from an address now, and returns its answers without sending
// them.
func (s *sim) deliver(i int, from netip.AddrPort, data []byte) []Datagram {
	n := s.nodes[i]
	return n.swim.Receive(s.now-n.origin, from, data)
}

// tick calls Tick of node i at a time of the node's clock, without handling any event. It returns
// the packets without sending them.
func (s *sim) tick(i int, at time.Duration) []Datagram {
	n := s.nodes[i]
	s.now = max(s.now, at+n.origin)
	return n.swim.Tick(at)
}

// suspicionOf returns a record in which node 2 suspects node o, from the record of o that node i
// has.
func (s *sim) suspicionOf(i, o int) MemberRecord {
	r := s.nodes[i].swim.table.Get(s.nodes[o].name).MemberRecord
	r.State, r.Accusers = StateSuspect, []uint64{accuserID(s.nodes[2].name)}
	return r
}
