package main

// handoff_test.go: clusters find their owner, whatever comes in between: a model of
// two and three servers, with the real store, cursors and handoff in virtual time,
// pushes and scrapes at any moment, clusters in one piece or many, messages and answers
// lost, crashes, also between two pieces, and views of the ring that differ for a while.

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

var handoffFlag = flag.Int("handoff", 0, "how many interleavings TestHandoffModel tries; 0: a few")

// handNode is one server of the model.
type handNode struct {
	m       *handModel
	name    string
	slot    int
	session uint64
	fsys    *crashFS
	kit     *storeKit
	store   *Store
	handoff *Handoff
	view    *View
	up      bool
	leaving bool
	conns   map[string]*Conn // of consumers
}

type handModel struct {
	t       *testing.T
	rng     *rand.Rand
	clock   *storeClock
	nodes   []*handNode
	calm    bool // nothing is lost, nobody crashes
	resting bool // nothing more happens
	acked   map[heldSample]bool
	// served counts, by consumer, how often a sample was read to the end.
	served map[string]map[heldSample]int
	value  float64
	trace  []string
}

var errLost = errors.New("lost on the way")

func (m *handModel) lost() bool { return !m.calm && m.rng.IntN(8) == 0 }

func (n *handNode) start() {
	n.m.note("%s starts", n.name)
	n.fsys.restart()
	n.session++
	n.store = n.kit.open()
	n.up, n.leaving, n.conns = true, false, map[string]*Conn{}
	n.view = &View{Ring: NewRing(nil, 0), Peers: map[string]Peer{}}
	n.handoff = NewHandoff(HandoffConfig{
		Name: n.name, Store: n.store, View: func() *View { return n.view }, Now: n.m.clock.Now, Interval: time.Second,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Metrics: NewMetrics(),
		Send: func(ctx context.Context, to Peer, msg HandoffMessage) error { return n.m.send(n, to, msg) },
	})
	n.handoff.atOnce = 1                    // one seed, one interleaving
	n.handoff.chunk = 1 << n.m.rng.IntN(12) // from a batch in each message to all in one
}

func (n *handNode) crash() {
	n.m.note("%s crashes", n.name)
	n.fsys.crash()
	n.up = false
}

func (m *handModel) send(from *handNode, to Peer, msg HandoffMessage) error {
	for _, n := range m.nodes {
		if n.name != to.Name {
			continue
		}
		if !from.up || !n.up || n.leaving || n.session != to.Session || m.lost() {
			return errLost
		}
		m.meanwhile(from, n)
		err := n.handoff.Take(context.Background(), from.name, msg)
		m.note("%s to %s: %q on %x: %v", from.name, to.Name, msg.Cluster, msg.Ring, err)
		m.meanwhile(from, n)
		if m.lost() {
			switch m.rng.IntN(4) { // or it is the answer alone that is lost
			case 0:
				n.crash()
			case 1:
				from.crash()
			}
			return errLost
		}
		if err != nil && !errors.Is(err, ErrNotOwner) {
			return &RefusedByOwner{err}
		}
		return err
	}
	return errLost
}

// meanwhile is what may happen at both ends while a message is on its way.
func (m *handModel) meanwhile(nodes ...*handNode) {
	if m.resting {
		return
	}
	for _, n := range nodes {
		switch m.rng.IntN(12) {
		case 0:
			m.push(n)
		case 1:
			m.scrape(n, fmt.Sprint("p", m.rng.IntN(2)))
		case 2:
			n.store.maintain(context.Background(), true)
		case 3:
			m.see(n)
		}
	}
}

func (m *handModel) note(format string, args ...any) {
	m.trace = append(m.trace, fmt.Sprintf(format, args...))
}

// see has a server see who is there now.
func (m *handModel) see(n *handNode) {
	v := &View{Peers: map[string]Peer{}}
	var claims []Claim
	for _, o := range m.nodes {
		if o.up {
			v.Peers[o.name] = Peer{Name: o.name, Session: o.session}
			if !o.leaving {
				claims = append(claims, Claim{Slot: o.slot, Lamport: uint64(o.slot + 1), Name: o.name})
			}
		}
	}
	v.Ring = NewRing(claims, len(m.nodes))
	n.view = v
	n.handoff.Hidden("x") // as a scrape would, soon
	m.note("%s sees %x", n.name, v.Ring.Version())
}

// random returns a server that is up.
func (m *handModel) random() *handNode {
	var up []*handNode
	for _, n := range m.nodes {
		if n.up {
			up = append(up, n)
		}
	}
	if len(up) == 0 {
		return nil
	}
	return up[m.rng.IntN(len(up))]
}

// push is one push to a server, which forwards it or holds it.
func (m *handModel) push(n *handNode) {
	if n.leaving {
		return
	}
	id := fmt.Sprint("c", m.rng.IntN(5))
	m.value++
	p := storePush(id, point{"x", m.rng.IntN(2), m.clock.ms(0) + int64(m.value), m.value}, point{"y", 0, m.clock.ms(0) + int64(m.value), m.value})
	at := n
	if name, ok := n.view.Ring.Owner(RingKey(id)); ok && name != n.name {
		for _, o := range m.nodes {
			if o.name == name && o.up && !o.leaving && !m.lost() {
				at = o
			}
		}
	}
	if _, err := at.store.Append(context.Background(), id, p); err != nil {
		m.t.Fatal(err)
	}
	m.note("%s pushed to %s, stored at %s: %v", id, n.name, at.name, m.value)
	if at != n && m.lost() { // stored, but the answer does not come: a hint as well
		if _, err := n.store.Append(context.Background(), id, p); err != nil {
			m.t.Fatal(err)
		}
		m.note("… and at %s", n.name)
	}
	for _, s := range p.Samples {
		m.acked[heldSample{string(p.Line(s)), s.T}] = true
	}
}

// scrape is one scrape of a consumer, which it has read when this returns, unless it
// was lost.
func (m *handModel) scrape(n *handNode, consumer string) (unread int) {
	if n.leaving {
		return 0
	}
	if n.conns[consumer] == nil {
		n.conns[consumer] = &Conn{}
	}
	begin := func() *Reading {
		r, _, err := n.store.Consumers.Begin(ConsumerKey(consumer, "", ""), consumer, "", n.conns[consumer], m.clock.Now())
		if err != nil {
			m.t.Fatal(err)
		}
		return r
	}
	x := &Scraper{Store: n.store, MaxAge: -time.Second, Now: m.clock.Now, Hidden: n.handoff.HiddenFrom} // without the newest again
	fams, unread, _ := x.Unread(begin(), 0, false, nil)
	series := map[string]int64{}
	for _, f := range fams {
		for _, l := range f.Lines {
			s := heldSample{string(l.Text), l.T}
			if before, twice := series[s.line]; twice && before >= s.t {
				m.fail("%s at %d after %d in one scrape", s.line, s.t, before)
			}
			series[s.line] = s.t
			m.served[consumer][s]++
			if n := m.served[consumer][s]; n > 1 && m.calm {
				m.fail("%v is served %d times to %s", s, n, consumer)
			}
		}
	}
	if unread > 0 {
		m.note("%s scrapes %s: %d", consumer, n.name, unread)
	}
	if m.lost() {
		for _, f := range fams {
			for _, l := range f.Lines {
				m.served[consumer][heldSample{string(l.Text), l.T}]--
			}
		}
		delete(n.conns, consumer)
		return unread
	}
	begin()
	return unread
}

func (m *handModel) fail(format string, args ...any) {
	m.t.Fatalf(format+"\n%s", append(args, strings.Join(m.trace, "\n"))...)
}

func (m *handModel) passes(n *handNode) {
	view, due := n.handoff.due()
	for owner, held := range due {
		n.handoff.Pass(context.Background(), view, owner, held)
	}
}

func (m *handModel) stop(n *handNode) {
	if err := n.store.Close(); err != nil {
		m.t.Fatal(err)
	}
	n.up = false
	m.note("%s has left", n.name)
}

func (m *handModel) step() {
	n := m.random()
	if n == nil {
		n = m.nodes[m.rng.IntN(len(m.nodes))]
		n.start()
		m.see(n)
	}
	switch k := m.rng.IntN(100); {
	case k < 30:
		m.push(n)
	case k < 55:
		m.scrape(n, fmt.Sprint("p", m.rng.IntN(2)))
	case k < 70:
		m.passes(n)
	case k < 80:
		m.clock.Add(time.Duration(m.rng.IntN(4000)) * time.Millisecond)
	case k < 88:
		m.see(n)
	case k < 90:
		if n.leaving {
			if st := n.handoff.Status(); st.Left == 0 {
				m.stop(n)
			}
		} else if m.rng.IntN(2) == 0 {
			m.note("%s begins to leave", n.name)
			n.leaving = true
			n.handoff.SetLeaving()
			m.see(n)
		}
	case k < 92:
		if !m.calm && m.rng.IntN(2) == 0 {
			n.crash()
		}
	case k < 95:
		for _, o := range m.nodes {
			if !o.up {
				o.start()
				m.see(o)
				break
			}
		}
	case k < 97:
		n.store.maintain(context.Background(), true)
	default:
		if err := n.store.Consumers.Save(); err != nil {
			m.t.Fatal(err)
		}
	}
}

// rest ends the troubles, and waits until all is where it belongs.
func (m *handModel) rest() {
	calm := m.calm
	for _, n := range m.nodes {
		if n.up && n.leaving {
			m.stop(n)
		}
		if !n.up {
			n.start()
		}
	}
	for _, n := range m.nodes {
		m.see(n)
	}
	m.calm, m.resting = true, true // for the messages
	for range 60 {
		m.clock.Add(time.Second)
		for _, n := range m.nodes {
			m.passes(n)
		}
	}
	m.calm = calm // what was lost before may be served again now
	m.rng = rand.New(alwaysLast{})
	for range 3 {
		for _, n := range m.nodes {
			m.scrape(n, "p0")
			m.scrape(n, "p1")
		}
	}
	for _, n := range m.nodes {
		if st := n.handoff.Status(); st.Left > 0 || st.HeldBack {
			m.fail("%s is not at rest: %+v", n.name, st)
		}
	}
	for s := range m.acked {
		for _, consumer := range []string{"p0", "p1"} {
			if m.served[consumer][s] < 1 {
				m.fail("%s never had %v", consumer, s)
			}
		}
	}
	shownBy := map[string]string{}
	for _, n := range m.nodes {
		x := &Scraper{Store: n.store, MaxAge: time.Hour, Now: m.clock.Now, Hidden: n.handoff.HiddenFrom}
		fams, _ := x.Newest(0, nil)
		for _, f := range fams {
			for _, l := range f.Lines {
				if other, both := shownBy[string(l.Text)]; both {
					m.fail("%s is shown by %s and %s", l.Text, other, n.name)
				}
				shownBy[string(l.Text)] = n.name
			}
		}
	}
}

// alwaysLast is randomness by which nothing is lost.
type alwaysLast struct{}

func (alwaysLast) Uint64() uint64 { return 1<<64 - 1 }

// No acknowledged sample is lost; and while nothing is lost on the way and nobody
// crashes, none is served twice to one consumer.
func TestHandoffModel(t *testing.T) {
	seeds := 60
	if *handoffFlag > 0 {
		seeds = *handoffFlag
	}
	repeats := 0
	for seed := *chaosSeedFlag; seed < *chaosSeedFlag+uint64(seeds); seed++ {
		rng := rand.New(rand.NewPCG(seed, 5))
		m := &handModel{t: t, rng: rng, clock: newStoreClock(), calm: seed%2 == 0, acked: map[heldSample]bool{},
			served: map[string]map[heldSample]int{"p0": {}, "p1": {}}}
		m.note("seed %d", seed)
		for i := range 2 + int(seed/2%2) {
			n := &handNode{m: m, name: fmt.Sprint("n", i), slot: i, fsys: newStoreFS(seed*10 + uint64(i))}
			n.kit = newStoreKit(t, n.fsys)
			n.kit.clock = m.clock
			n.kit.cfg.Now = m.clock.Now
			m.nodes = append(m.nodes, n)
			n.start()
		}
		for _, n := range m.nodes {
			m.see(n)
		}
		for range 250 {
			m.step()
		}
		m.rest()
		for _, served := range m.served {
			for _, n := range served {
				repeats += max(0, n-1)
			}
		}
	}
	t.Logf("%d interleavings of 250 steps; after losses and crashes %d samples were served again", seeds, repeats)
}
