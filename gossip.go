package main

// Gossip drives the SWIM state machine over UDP: it passes received packets and the time to the
// state machine, and sends the packets that the state machine returns. One goroutine, Run, reads,
// ticks and sends. The mutex guards the state machine and the read deadline, and is never held
// across I/O. Time is monotonic and counts from NewGossip. This file must not know the meaning of
// packets.

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

// DefaultGossipInterval is long enough for round trips of up to 200 ms.
const DefaultGossipInterval = time.Second

// ErrNameTaken is returned by Run if another member has this member's name and a higher session.
var ErrNameTaken = errors.New("another member of the ring has the same name: give one of the two another --name")

// UDPConn is the part of a *net.UDPConn that gossip needs.
type UDPConn interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	SetReadDeadline(t time.Time) error
}

// A GossipConfig configures a Gossip.
type GossipConfig struct {
	Name         string            // unique in the ring; see CheckMemberName
	Addr         string            // host:port where peers reach this member; see AdvertisedAddr
	URL          string            // of the internal listener, for /sd; may be empty
	RingName     string            // packets of another ring, or sealed with unknown keys, are refused
	Keys         Keys              // cluster keys
	Seeds        []string          // host:port; a host name stands for all its addresses
	Interval     time.Duration     // between probes; scales all other times
	RestartState RestartState      // saved by the previous run; zero at the first start
	Conn         UDPConn           // the caller closes it after Run
	Resolver     HostResolver      // for seeds and members with a host name
	Notify       func(GossipEvent) // called from Run; must not block
}

// GossipStats holds counters, which start at 0 in NewGossip, and the current local health.
type GossipStats struct {
	Sent          uint64 // datagrams, failed sends included
	SentBytes     uint64 // of UDP payload, failed sends included
	SendErrors    uint64 // failed sends
	Received      uint64 // datagrams
	ReceivedBytes uint64 // of UDP payload
	Refused       RefusedPackets
	Health        int // Lifeguard's local health: 0 is good
}

// Gossip is one member of a ring. Its methods are safe for concurrent use.
type Gossip struct {
	conf    GossipConfig
	start   time.Time     // when NewGossip ran; only its monotonic reading is used
	changed chan struct{} // see Changed; has a buffer of 1
	lookup  chan struct{} // receives when hosts has a new host to look up; has a buffer of 1

	mu         sync.Mutex // guards the fields below
	swim       *Swim
	version    uint64 // of the view when changed was last signalled
	stats      GossipStats
	hosts      map[string][]netip.AddrPort // resolved addresses by host:port; its size is bounded
	leaveUntil time.Duration               // when Run stops waiting for confirmations; 0 until Run's context ends
}

// NewGossip checks c and returns a member that does not send or receive yet. The caller must store
// RestartState() before it calls Run, so that the next start uses a higher session.
func NewGossip(c GossipConfig) (*Gossip, error) {
	if err := errors.Join(CheckMemberName(c.Name), CheckMemberAddrText(c.Addr)); err != nil {
		return nil, err
	}
	if c.URL != "" && CheckMemberAddrText(c.URL) != nil {
		return nil, fmt.Errorf("URL announced to peers: want at most %d visible ASCII characters", MaxMemberAddr)
	}
	for _, addr := range append(slices.Clone(c.Seeds), c.Addr) {
		if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
			return nil, fmt.Errorf("bad address %q: want host:port", addr)
		}
	}
	if c.Interval <= 0 {
		return nil, errors.New("gossip interval must be above 0")
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

// Run takes part in gossip until ctx ends. It then announces that this member leaves, which takes
// at most two intervals, and returns nil. The errors are ErrNameTaken, and net.ErrClosed, wrapped,
// if the socket is closed.
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
	buf := make([]byte, MaxPacket+1) // one byte more, so that an overlong packet is recognized and refused
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
		// Ignore any other error. Either the read deadline has passed, or an ICMP message has
		// answered a packet sent earlier.
	}
}

// errLeft makes Run return nil; leaveOrSetReadDeadline returns it.
var errLeft = errors.New("this member has left")

// leaveOrSetReadDeadline returns how long Run may wait for a packet, and sets the read deadline to
// match. If ctx has ended, it makes this member leave. It returns errLeft when leaving is complete
// or has taken too long. It returns ErrNameTaken if this member has stood down; see Swim.StoodDown.
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
		// Set the deadline while holding the mutex, so that it never replaces a deadline that
		// interruptRead has set meanwhile. An error needs no handling, because reading then fails
		// too.
		g.conf.Conn.SetReadDeadline(time.Now().Add(wait))
	}
	return wait, nil
}

// stepAndSend makes the state machine do one step. It sends the datagrams that the step returns,
// and passes the events of the step to Notify.
func (g *Gossip) stepAndSend(step func(now time.Duration) []Datagram) {
	g.mu.Lock()
	out := step(time.Since(g.start))
	events := g.swim.Events // out and events stay valid until the next step, which only Run makes
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

// send sends each datagram to its address in to, skipping invalid addresses, and returns the
// counts. A failed send is treated like a packet that is lost on the way.
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

// signalIfViewChanged makes Changed receive if View has changed since the last signal. The caller
// must hold g.mu.
func (g *Gossip) signalIfViewChanged() {
	if v := g.swim.ViewVersion(); v != g.version {
		g.version = v
		signalChan(g.changed)
	}
}

// signalChan sends to c, which has a buffer of 1. If the buffer is full, signalChan does nothing.
func signalChan(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// View returns the ring as this member sees it now.
func (g *Gossip) View() GossipView {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.swim.View()
}

// Changed returns a channel that receives after View().Version or the result of RestartState has
// changed.
func (g *Gossip) Changed() <-chan struct{} { return g.changed }

// RestartState returns the state to store for the next start.
func (g *Gossip) RestartState() RestartState {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.swim.RestartState()
}

// Stats returns the current counters.
func (g *Gossip) Stats() GossipStats {
	g.mu.Lock()
	defer g.mu.Unlock()
	st := g.stats
	st.Refused, st.Health = g.swim.Refused, g.swim.Health
	return st
}

// AnnounceClaim announces that this member claims slot; see Swim.AnnounceClaim.
func (g *Gossip) AnnounceClaim(slot uint16, claimNumber uint64, provisional bool) {
	g.updateAndWakeRun(func() { g.swim.AnnounceClaim(slot, claimNumber, provisional) })
}

// AnnounceLeaving announces that this member is about to leave; see Swim.AnnounceLeaving.
func (g *Gossip) AnnounceLeaving() { g.updateAndWakeRun(g.swim.AnnounceLeaving) }

// SetKeys replaces the cluster keys. After an error the old keys stay in use.
func (g *Gossip) SetKeys(keys Keys) (err error) {
	g.updateAndWakeRun(func() { err = g.swim.SetKeys(keys) })
	return err
}

// updateAndWakeRun calls change, which changes the state machine, and wakes Run. After a change,
// Run may have something to send, or may have to tick at another time.
func (g *Gossip) updateAndWakeRun(change func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change()
	g.signalIfViewChanged()
	g.conf.Conn.SetReadDeadline(g.start) // a deadline in the past interrupts a read
}

// interruptRead makes a read of Run return.
func (g *Gossip) interruptRead() { g.updateAndWakeRun(func() {}) }
