package main

// The UDP driver of the membership: it gives the state machine its packets and its time, and sends
// the packets that it returns. One goroutine reads, ticks and sends. The mutex guards the state
// machine and the read deadline, and is held across no I/O. Time is monotonic since NewGossip.
// This file must not know the meaning of packets.

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// DefaultGossipInterval suits round trips up to 200 ms.
const DefaultGossipInterval = time.Second

// ErrNameTaken says that another member has our name and a higher session.
var ErrNameTaken = errors.New("another member of the ring has this name: give one of them another --name")

// UDPConn is the part of a *net.UDPConn that gossip needs.
type UDPConn interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	SetReadDeadline(t time.Time) error
}

// A GossipConfig says who a member is and where it finds others.
type GossipConfig struct {
	Name         string // unique in the ring; see CheckMemberName
	Addr         string // host:port where peers reach this member; see AdvertisedAddr
	URL          string // of the internal listener, for /sd; may be empty
	RingName     string // the ring's name; packets of another ring or under other keys are refused
	Keys         Keys
	Seeds        []string      // host:port; a name stands for all its addresses
	Interval     time.Duration // scales all timing
	RestartState RestartState  // of the last start
	Conn         UDPConn       // closed by the caller, after Run
	Resolver     HostResolver
	Notify       func(GossipEvent) // called from Run; must not block
}

// GossipStats counts since the start.
type GossipStats struct {
	Sent, SentBytes, SendErrors uint64 // datagrams and bytes of payload
	Received, ReceivedBytes     uint64
	Refused                     RefusedPackets
	Health                      int // 0 is good
}

// Gossip is one member of a ring. Its methods are safe for concurrent use.
type Gossip struct {
	conf    GossipConfig
	start   time.Time // its monotonic reading
	changed chan struct{}
	lookup  chan struct{} // receives when there is a new host to look up

	mu         sync.Mutex // guards the rest
	swim       *Swim
	version    uint64 // of the view that changed was signalled for
	stats      GossipStats
	hosts      map[string][]netip.AddrPort // by host:port, as looked up; bounded
	leaveUntil time.Duration               // 0 until Run's context ends
}

// NewGossip checks c. State must be stored before Run is called.
func NewGossip(c GossipConfig) (*Gossip, error) {
	if err := errors.Join(CheckMemberName(c.Name), CheckMemberAddrText(c.Addr)); err != nil {
		return nil, err
	}
	if c.URL != "" && CheckMemberAddrText(c.URL) != nil {
		return nil, fmt.Errorf("URL to tell peers: want at most %d visible ASCII characters", MaxMemberAddr)
	}
	for _, addr := range append(slices.Clone(c.Seeds), c.Addr) {
		if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
			return nil, fmt.Errorf("%q: want host:port", addr)
		}
	}
	if c.Interval <= 0 {
		return nil, errors.New("gossip needs an interval above 0")
	}
	sealer, err := NewPacketSealer(c.Keys, c.RingName, crand.Reader)
	if err != nil {
		return nil, err
	}
	var seed [32]byte
	crand.Read(seed[:]) // never fails since Go 1.24
	return &Gossip{
		conf: c, start: time.Now(), changed: make(chan struct{}, 1), lookup: make(chan struct{}, 1), hosts: map[string][]netip.AddrPort{},
		swim: NewSwim(SwimConfig{Name: c.Name, Addr: c.Addr, URL: c.URL, Interval: c.Interval,
			Random: rand.NewChaCha8(seed), Sealer: sealer, RestartState: c.RestartState}),
	}, nil
}

// Run takes part until ctx ends, and then leaves, which takes two intervals at
// most. Errors: ErrNameTaken, and what makes the socket unusable.
func (g *Gossip) Run(ctx context.Context) error {
	done := make(chan struct{})
	defer func() { <-done }()
	resolving, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		defer close(done)
		g.runHostRefresh(resolving)
	}()
	defer context.AfterFunc(ctx, g.interruptRead)()
	buf := make([]byte, MaxPacket+1) // a longer packet is seen to be longer, and is refused
	for {
		switch wait, err := g.leaveOrSetReadDeadline(ctx); {
		case errors.Is(err, errLeft):
			return nil
		case err != nil:
			return err
		case wait <= 0:
			g.stepAndSend(g.swim.Tick)
			continue
		}
		n, from, err := g.conf.Conn.ReadFromUDPAddrPort(buf)
		switch {
		case err == nil:
			from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
			g.stepAndSend(func(now time.Duration) []Datagram {
				g.stats.Received++
				g.stats.ReceivedBytes += uint64(n)
				return g.swim.Receive(now, from, buf[:n])
			})
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("reading gossip: %w", err)
		}
		// Any other error passes: the deadline, or an ICMP answer to a packet sent earlier.
	}
}

// errLeft ends Run without an error.
var errLeft = errors.New("this member has left")

// leaveOrSetReadDeadline returns how long Run may wait for a packet, and sets the read deadline to
// that. It begins to leave when ctx has ended. Errors: errLeft, ErrNameTaken.
func (g *Gossip) leaveOrSetReadDeadline(ctx context.Context) (maxWait time.Duration, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Since(g.start)
	if ctx.Err() != nil && g.leaveUntil == 0 {
		g.swim.Leave()
		g.leaveUntil = now + 2*g.conf.Interval
	}
	wait := g.swim.NextTickAt() - now
	switch {
	case g.swim.StoodDown:
		return 0, ErrNameTaken
	case g.leaveUntil == 0:
	case g.swim.HasLeft() || now > g.leaveUntil:
		return 0, errLeft
	default:
		wait = min(wait, g.leaveUntil-now+1)
	}
	if wait > 0 {
		// The mutex is held, so that this deadline never replaces interruptRead's. If it cannot
		// be set, reading fails too.
		g.conf.Conn.SetReadDeadline(time.Now().Add(wait))
	}
	return wait, nil
}

// stepAndSend has the state machine do one step, and sends and reports what comes of it.
func (g *Gossip) stepAndSend(step func(now time.Duration) []Datagram) {
	g.mu.Lock()
	out := step(time.Since(g.start))
	events := g.swim.Events // both are Run's until the next step
	to := make([]netip.AddrPort, len(out))
	for i, d := range out {
		to[i] = g.addrOrQueueLookup(d.To)
	}
	g.mu.Unlock()
	sent := g.send(out, to)
	g.mu.Lock()
	g.stats.Sent += sent.Sent
	g.stats.SentBytes += sent.SentBytes
	g.stats.SendErrors += sent.SendErrors
	g.signalIfViewChanged()
	g.mu.Unlock()
	for _, e := range events {
		if g.conf.Notify != nil {
			g.conf.Notify(e)
		}
	}
}

// send sends each datagram to its address, if that is valid, and returns the counts. A datagram
// that cannot be sent is as good as lost on the way.
func (g *Gossip) send(datagrams []Datagram, to []netip.AddrPort) (sent GossipStats) {
	for i, d := range datagrams {
		if !to[i].IsValid() {
			continue
		}
		if _, err := g.conf.Conn.WriteToUDPAddrPort(d.Data, to[i]); err != nil {
			sent.SendErrors++
		}
		sent.Sent++
		sent.SentBytes += uint64(len(d.Data))
	}
	return sent
}

// signalIfViewChanged has Changed receive if there is something new in View. g.mu is held.
func (g *Gossip) signalIfViewChanged() {
	if v := g.swim.ViewVersion(); v != g.version {
		g.version = v
		signalChan(g.changed)
	}
}

// signalChan has c, which has room for one, receive. It does not block.
func signalChan(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// View returns the ring as this member sees it.
func (g *Gossip) View() GossipView {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.swim.View()
}

// Changed receives after View().Version or State has changed.
func (g *Gossip) Changed() <-chan struct{} { return g.changed }

// RestartState returns what to keep for the next start.
func (g *Gossip) RestartState() RestartState {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.swim.RestartState()
}

// Stats returns the counts.
func (g *Gossip) Stats() GossipStats {
	g.mu.Lock()
	defer g.mu.Unlock()
	st := g.stats
	st.Refused, st.Health = g.swim.Refused, g.swim.Health
	return st
}

// AnnounceClaim announces that this member claims a slot; see Swim.AnnounceClaim.
func (g *Gossip) AnnounceClaim(slot uint16, claimNumber uint64, provisional bool) {
	g.updateAndWakeRun(func() { g.swim.AnnounceClaim(slot, claimNumber, provisional) })
}

// AnnounceLeaving announces that this member is about to leave.
func (g *Gossip) AnnounceLeaving() { g.updateAndWakeRun(g.swim.AnnounceLeaving) }

// SetKeys replaces the keys. After an error the old keys stay.
func (g *Gossip) SetKeys(keys Keys) (err error) {
	g.updateAndWakeRun(func() { err = g.swim.SetKeys(keys) })
	return err
}

// updateAndWakeRun changes the state machine, and wakes Run: it may have something to send, or
// another time to wake up at.
func (g *Gossip) updateAndWakeRun(change func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change()
	g.signalIfViewChanged()
	g.conf.Conn.SetReadDeadline(g.start) // in the past
}

// interruptRead wakes Run.
func (g *Gossip) interruptRead() { g.updateAndWakeRun(func() {}) }
