package main

// A simulation of whole rings in one goroutine under virtual time: every packet
// and every timer is an event in one queue, every random choice comes from one
// seed. TestSweepGossip holds the figures of a few runs to their limits;
// TestSimulationTable, with -sim, prints all that the README shows.

import (
	"cmp"
	"container/heap"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"
	"text/tabwriter"
	"time"
)

var simFlag = flag.Bool("sim", false, "simulate gossip at length and print the table of figures")

type simEvent struct {
	at   time.Duration
	seq  uint64 // events of one time happen in the order in which they were made
	node int
	run  uint64 // of the node; what was for an earlier one is lost
	from netip.AddrPort
	data []byte // nil: a timer
	do   func()
}

type simQueue []simEvent

func (q simQueue) Len() int { return len(q) }
func (q simQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *simQueue) Push(x any)   { *q = append(*q, x.(simEvent)) }
func (q *simQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = simEvent{}
	*q = old[:len(old)-1]
	return e
}

type simNode struct {
	name    string
	addr    netip.AddrPort
	swim    *Swim
	state   RestartState
	up      bool
	run     uint64
	timer   time.Duration // when the earliest timer event comes
	group   int           // packets pass within one
	stalled time.Duration // until then; what comes waits
	origin  time.Duration // of its clock
	waiting []simEvent
}

// A sim is a network of members. Its fields may be changed as it runs.
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
	loss     float64
	double   float64 // part of the packets that come twice
	min, max time.Duration
	sent     int // packets
	bytes    int
	events   []simReport
	tap      func(from, to int, data []byte)
	cut      func(from, to int) bool // what is lost for certain; may be nil
}

type simReport struct {
	GossipEvent
	at   time.Duration
	node int
}

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

const simInterval = time.Second

// start starts node i, anew if need be. Its seed is node 0 or what is given.
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

func (s *sim) kill(i int) { s.nodes[i].up = false }

func (s *sim) push(e simEvent) {
	s.seq++
	e.seq = s.seq
	heap.Push(&s.queue, e)
}

// at has do called at a time.
func (s *sim) at(at time.Duration, do func()) { s.push(simEvent{at: at, do: do}) }

// arm makes a timer event for when node i wants to be called next.
func (s *sim) arm(i int) {
	n := s.nodes[i]
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
		// What comes while it stalls waits in its socket's buffer, as far as that goes.
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
		if e.at < n.timer { // an older one
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

func (s *sim) send(from int, d Datagram) {
	if len(d.Data) > MaxPacket {
		s.tb.Errorf("a packet of %d bytes", len(d.Data))
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

// run lets time pass.
func (s *sim) run(d time.Duration) {
	end := s.now + d
	for len(s.queue) > 0 && s.queue[0].at <= end {
		s.step()
	}
	s.now = end
}

// until lets time pass until ok holds, which is looked at every 10 ms, and
// returns how long that took. After limit it fails the test.
func (s *sim) until(limit time.Duration, about string, ok func() bool) time.Duration {
	s.tb.Helper()
	from := s.now
	for !ok() {
		if s.now-from > limit {
			s.tb.Errorf("%d members: %s: not within %v", len(s.nodes), about, limit)
			return limit
		}
		s.run(10 * time.Millisecond)
	}
	return s.now - from
}

// agree tells whether every member that is up, of those given or of all, thinks
// that exactly these are live.
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

// knowGone tells whether nobody thinks that node i is live.
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

// downs counts, since a time, how often a member took another for dead.
func (s *sim) downs(since time.Duration, count func(e simReport) bool) (n int) {
	for _, e := range s.events {
		if e.at >= since && e.What == EventDown && (count == nil || count(e)) {
			n++
		}
	}
	return n
}

// joinedSim returns a ring of n members at rest.
func joinedSim(tb testing.TB, n int, seed uint64) *sim {
	s := newSim(tb, n, seed)
	s.startAll()
	s.until(10*time.Second, "all join", s.agree)
	s.run(5 * time.Second)
	return s
}

// figures of one scenario, over several runs
type figures struct {
	times []time.Duration
	sent  []int // packets per member
}

func (f *figures) add(s *sim, t time.Duration, packets int) {
	f.times = append(f.times, t)
	f.sent = append(f.sent, packets/len(s.nodes))
}

func (f *figures) median() time.Duration { return quantile(f.times, .5) }
func (f *figures) worst() time.Duration  { return slices.Max(f.times) }

func (f *figures) String() string {
	return fmt.Sprintf("%.2f / %.2f s, %d packets", f.median().Seconds(), f.worst().Seconds(), quantile(f.sent, .5))
}

func quantile[T cmp.Ordered](all []T, q float64) T {
	all = slices.Sorted(slices.Values(all))
	return all[int(q*float64(len(all)-1)+.5)]
}

func simJoin(tb testing.TB, n int, seed uint64, f *figures) *sim {
	s := newSim(tb, n, seed)
	s.startAll()
	f.add(s, s.until(20*time.Second, "all join", s.agree), s.sent)
	return s
}

func simKill(s *sim, f *figures) {
	victim := len(s.nodes) - 1
	sent := s.sent
	s.run(time.Duration(s.rng.Int64N(int64(s.interval))))
	s.kill(victim)
	f.add(s, s.until(60*time.Second, "a death is known", s.agree), s.sent-sent)
}

func simLeave(s *sim, f *figures) {
	leaver := len(s.nodes) / 2
	sent := s.sent
	s.nodes[leaver].swim.Leave()
	s.arm(leaver)
	f.add(s, s.until(60*time.Second, "a leave is known", func() bool { return s.knowGone(leaver) }), s.sent-sent)
	s.until(5*time.Second, "the leaver is gone", func() bool { return s.nodes[leaver].swim.HasLeft() })
	s.kill(leaver)
}

func simPartition(s *sim, lasts time.Duration, f *figures) {
	for i, n := range s.nodes {
		n.group = i % 2
	}
	s.run(lasts)
	for _, n := range s.nodes {
		n.group = 0
	}
	sent := s.sent
	f.add(s, s.until(60*time.Second, fmt.Sprintf("a partition of %v heals", lasts), s.agree), s.sent-sent)
}

// simFalse returns how often, in a time, a member that ran took another that
// ran for dead; stalled ones are neither.
func simFalse(s *sim, lasts time.Duration, loss, stalled float64) int {
	s.loss = loss
	since := s.now
	ran := make([]time.Duration, len(s.nodes)) // since when it runs undisturbed
	if stalled > 0 {
		var next func()
		next = func() {
			if s.now >= since+lasts {
				return
			}
			for range max(1, int(stalled*float64(len(s.nodes)))) {
				i := s.rng.IntN(len(s.nodes))
				s.nodes[i].stalled = s.now + 10*time.Second
				ran[i] = s.now + 11*time.Second
			}
			s.at(s.now+10*time.Second, next)
		}
		next()
	}
	wrong := 0
	for end := s.now + lasts; s.now < end; {
		s.run(100 * time.Millisecond)
		wrong += s.downs(since, func(e simReport) bool {
			var victim int
			fmt.Sscanf(e.Name, "node-%d", &victim)
			return ran[victim] <= e.at && s.nodes[victim].up
		})
		s.events = s.events[:0]
	}
	return wrong
}

func simRest(s *sim, lasts time.Duration) (packets, bytes float64) {
	sent, size := s.sent, s.bytes
	s.run(lasts)
	per := lasts.Seconds() * float64(len(s.nodes))
	return float64(s.sent-sent) / per, float64(s.bytes-size) / per
}

func TestSimulationTable(t *testing.T) {
	if !*simFlag {
		return // the figures that matter are TestSweepGossip's
	}
	w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
	defer w.Flush()
	fmt.Fprintln(w, "members\tall join\tsudden death\tleave\tpartition 20 s\tpartition 1 h\tat rest: packets/s\tbytes/s\tfalse deaths in 1 h: 10 % loss\t30 % loss\t5 % stalled")
	for _, n := range []int{2, 3, 10, 100, 300} {
		began := time.Now()
		var join, kill, leave, short, long figures
		var packets, bytes float64
		for seed := range uint64(5) {
			s := simJoin(t, n, seed, &join)
			s.run(30 * time.Second)
			packets, bytes = simRest(s, time.Minute)
			simKill(s, &kill)
			s.run(30 * time.Second)
			if n == 2 { // nobody else could be told of a leave
				s.start(1)
				s.run(30 * time.Second)
			}
			simLeave(s, &leave)
			if n == 300 && seed > 1 {
				continue
			}
			s = joinedSim(t, n, seed+100)
			simPartition(s, 20*time.Second, &short)
			if n == 300 {
				continue
			}
			s.run(time.Minute)
			simPartition(s, time.Hour, &long)
		}
		fmt.Fprintf(w, "%d\t%v\t%v\t%v\t%v\t", n, &join, &kill, &leave, &short)
		if n == 300 {
			fmt.Fprintf(w, "\t%.2f\t%.0f\n", packets, bytes)
		} else {
			fmt.Fprintf(w, "%v\t%.2f\t%.0f\t%d\t%d\t%d\n", &long, packets, bytes,
				simFalse(joinedSim(t, n, 1), time.Hour, .1, 0), simFalse(joinedSim(t, n, 2), time.Hour, .3, 0), simFalse(joinedSim(t, n, 3), time.Hour, 0, .05))
		}
		t.Logf("%d members: %v", n, time.Since(began))
	}
}

// The goals of the design, and a little more, in a few runs each.
func TestSweepGossip(t *testing.T) {
	sweep(t)
	limit := func(about string, got, most time.Duration) {
		t.Helper()
		if got > most {
			t.Errorf("%s takes %v, more than %v", about, got, most)
		}
	}
	for _, c := range []struct {
		n, runs int
		death   time.Duration
		heal    bool
	}{
		{3, 5, 4 * time.Second, true},
		{10, 7, 3 * time.Second, true},
		{100, 2, 4 * time.Second, false},
	} {
		var join, kill, leave, heal figures
		for seed := range uint64(c.runs) {
			s := simJoin(t, c.n, seed, &join)
			s.run(10 * time.Second)
			if packets, bytes := simRest(s, 10*time.Second); packets > 3 || bytes > 400 {
				t.Errorf("%d members at rest send %.2f packets/s, %.0f bytes/s each", c.n, packets, bytes)
			}
			simKill(s, &kill)
			s.run(5 * time.Second)
			simLeave(s, &leave)
			if c.heal {
				simPartition(joinedSim(t, c.n, seed+100), 20*time.Second, &heal)
			}
		}
		about := fmt.Sprintf("%d members: ", c.n)
		limit(about+"to join, median", join.median(), 2*time.Second)
		limit(about+"to join, worst", join.worst(), 5*time.Second)
		limit(about+"a death, median", kill.median(), c.death)
		limit(about+"a leave, median", leave.median(), time.Second)
		if c.heal {
			limit(about+"a partition", heal.worst(), 10*time.Second)
		}
	}
	var long figures
	simPartition(joinedSim(t, 10, 7), time.Hour, &long)
	limit("a partition of an hour", long.worst(), 10*time.Second)
}

// Loss, delay, duplicates and stalls of others cost nobody its life.
func TestSweepFalseDeaths(t *testing.T) {
	sweep(t)
	for _, c := range []struct {
		n, runs              int
		loss, stalled, twice float64
		delay, lasts         time.Duration
	}{
		{10, 5, .2, 0, 0, time.Millisecond, time.Minute},
		{50, 4, .2, 0, 0, time.Millisecond, time.Minute},
		{10, 2, .1, 0, .2, 300 * time.Millisecond, time.Minute},
		{2, 4, .2, 0, 0, time.Millisecond, time.Hour},
		{2, 20, .35, 0, 0, time.Millisecond, 10 * time.Minute},
		{20, 2, 0, .05, 0, time.Millisecond, 2 * time.Minute},
	} {
		for seed := range uint64(c.runs) {
			s := joinedSim(t, c.n, seed)
			s.double, s.max = c.twice, c.delay
			if n := simFalse(s, c.lasts, c.loss, c.stalled); n > 0 {
				t.Errorf("%+v, seed %d: %d false deaths", c, seed, n)
			}
			s.loss = 0
			s.until(15*time.Second, "all are back", s.agree)
		}
	}
}

// The same seed gives the same run, to the last packet.
func TestSimulationRepeats(t *testing.T) {
	run := func() (int, int, int) {
		s := joinedSim(t, 20, 5)
		simFalse(s, 20*time.Second, .2, .1)
		return s.sent, s.bytes, s.rng.IntN(1 << 30)
	}
	a, b, c := run()
	if d, e, f := run(); a != d || b != e || c != f {
		t.Errorf("%d packets of %d bytes, then %d of %d", a, b, d, e)
	}
}
