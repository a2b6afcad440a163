package main

// Gossip drives the SWIM state machine (Swim) over UDP: it passes received packets and the time to
// the state machine, and sends the packets that the state machine returns. One goroutine, Run,
// reads packets, calls Tick and sends. Gossip.mu guards the state machine and the read deadline,
// and is not held while Run reads or sends. The state machine's time is the monotonic time since
// NewGossip. This file must not know the meaning of packets.

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

// DefaultGossipInterval is the default time between two probes. While this member's health is good,
// a probed member has 200 ms to answer (indirectAfter) before other members are asked to ping it
// too. So the interval suits networks with round trips of up to 200 ms.
const DefaultGossipInterval = time.Second

// ErrNameTaken is returned by Run when this member has stood down, because another member has the
// same name and a higher session number (MemberRecord.Session).
var ErrNameTaken = errors.New("another member of the ring has the same name: give one of the two another --name")

// UDPConn is the part of a *net.UDPConn that gossip needs.
type UDPConn interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	SetReadDeadline(t time.Time) error
	SetReadBuffer(bytes int) error
}

// readBuffer is the size, in bytes, that Run asks for as the receive buffer of the socket. The
// system may give less. In a flood of packets, real packets are lost while the buffer is full. To
// refuse a packet takes less time than the system call that reads it, so that no cheaper check in
// this program would save much. But the buffer must hold the packets of the few milliseconds in
// which the system, or the Go scheduler, lets other work run first. A much larger buffer would delay
// acknowledgements by a part of an interval when Run cannot keep up with a flood.
const readBuffer = 1 << 20

// readErrorPause is how long Run waits after a failed read, unless the read deadline has passed.
// Otherwise an error that stays would use up a processor.
const readErrorPause = 10 * time.Millisecond

// A GossipConfig configures a Gossip.
type GossipConfig struct {
	Name         string            // unique in the ring; see CheckMemberName
	Addr         string            // host:port at which other members reach this member; see AdvertisedAddr
	URL          string            // address of this server's internal listener; see MemberRecord.URL
	RingName     string            // name of the ring; packets of a ring with another name are refused
	Keys         Keys              // cluster keys, which seal packets; packets sealed with other keys are refused
	Seeds        []string          // host:port of each seed; a host name stands for all its IP addresses; SetSeeds limits the number of addresses
	Interval     time.Duration     // time between two probes; the timeouts of the protocol are multiples of it
	RestartState RestartState      // state saved by this member's previous run; zero at the first start
	Conn         UDPConn           // this member's socket; the caller closes it after Run has returned
	Resolver     HostResolver      // looks up the host names of seeds and members
	Notify       func(GossipEvent) // receives every event; called from Run, so it must not block; may be nil
}

// GossipStats holds counts since NewGossip, and the current local health.
type GossipStats struct {
	Sent          uint64 // datagrams sent, failed sends included
	SentBytes     uint64 // bytes of UDP payload sent, failed sends included
	SendErrors    uint64
	Received      uint64 // datagrams received
	ReceivedBytes uint64 // bytes of UDP payload received
	Refused       RefusedPackets
	Health        int // Lifeguard's local health: 0 is good, and maxHealth is worst
}

// Gossip is one member of a ring. Its methods are safe for concurrent use, but Run may be called
// only once.
type Gossip struct {
	conf    GossipConfig
	start   time.Time     // when NewGossip ran; only its monotonic reading is used
	changed chan struct{} // the channel that Changed returns; has a buffer of 1
	lookup  chan struct{} // signals runHostRefresh that hosts has a new host to look up; has a buffer of 1

	mu      sync.Mutex // guards the fields below
	swim    *Swim
	version uint64 // View().Version at the last signal on changed
	stats   GossipStats
	hosts   map[string]*lookedUpHost // by host:port; addrOrQueueLookup bounds its size
	join    joinState

	checkAt    time.Duration // when dueEvents looks for events again
	leaveUntil time.Duration // when Run stops waiting for confirmations of the leave; 0 until Run's context ends
}

// NewGossip checks c and returns a member that does not send or receive yet. The caller should
// store RestartState() before it calls Run, so that the next start uses a higher session than this
// run.
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
	crand.Read(seed[:]) // returns no error since Go 1.24
	hosts := map[string]*lookedUpHost{}
	for _, s := range c.Seeds {
		hosts[s] = &lookedUpHost{isSeed: true}
	}
	return &Gossip{
		conf: c, start: time.Now(), changed: make(chan struct{}, 1), lookup: make(chan struct{}, 1), hosts: hosts,
		join: joinState{reached: map[string]bool{}, sendErrors: map[netip.AddrPort]error{}, reportAt: joinAnswerIntervals * c.Interval},
		swim: NewSwim(SwimConfig{Name: c.Name, Addr: c.Addr, URL: c.URL, Interval: c.Interval,
			Random: rand.NewChaCha8(seed), Sealer: sealer, RestartState: c.RestartState}),
	}, nil
}

// Run takes part in gossip until ctx ends. It then announces that this member leaves, which takes
// about two intervals at most, and returns nil. Run returns ErrNameTaken if this member has stood
// down (Swim.StoodDown), and an error that wraps net.ErrClosed if the socket is closed.
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
	g.conf.Conn.SetReadBuffer(readBuffer) // after an error the buffer keeps its size, which suffices without a flood
	buf := make([]byte, MaxPacket+1)      // one byte more than the longest packet, so that a longer packet is recognized and refused
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
		case !errors.Is(err, os.ErrDeadlineExceeded): // for example, an ICMP message has answered a packet sent earlier
			time.Sleep(readErrorPause)
		}
	}
}

// errLeft is returned by leaveOrSetReadDeadline when leaving has ended. Run then returns nil.
var errLeft = errors.New("this member has left")

// leaveOrSetReadDeadline returns how long Run may wait for a packet before it must call Tick. If
// that is more than 0, it sets the read deadline to match. If ctx has ended, it makes this member
// leave. It returns errLeft when leaving is complete or has taken two intervals. It returns
// ErrNameTaken if this member has stood down; see Swim.StoodDown.
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
		// Set the deadline while still holding g.mu. Otherwise updateAndWakeRun could change the
		// state machine and set a deadline in the past after wait was computed, and this call would
		// replace that deadline. The only expected error of SetReadDeadline is that the socket is
		// closed, and the next read then fails too.
		g.conf.Conn.SetReadDeadline(time.Now().Add(wait))
	}
	return wait, nil
}

// stepAndSend calls step, which is one Receive or Tick of the state machine. It sends the datagrams
// that step returns, except those whose address is not known yet. It passes the state machine's
// events and the events of dueEvents to Notify, if there is one.
func (g *Gossip) stepAndSend(step func(now time.Duration) []Datagram) {
	g.mu.Lock()
	now := time.Since(g.start)
	out := step(now)
	events := g.swim.Events // out and events stay valid until the next Receive or Tick, which only Run's goroutine calls
	to := make([]netip.AddrPort, len(out))
	for i, d := range out {
		to[i] = g.addrOrQueueLookup(now, d.To)
	}
	g.mu.Unlock()
	sent, failed := g.send(out, to)
	g.mu.Lock()
	g.stats.Sent += sent.Sent
	g.stats.SentBytes += sent.SentBytes
	g.stats.SendErrors += sent.SendErrors
	g.noteSendErrors(failed)
	events = slices.Concat(events, g.dueEvents(now))
	g.signalIfViewChanged()
	g.mu.Unlock()
	for _, e := range events {
		if g.conf.Notify != nil {
			g.conf.Notify(e)
		}
	}
}

// dueEvents returns the events of joinEvents and lookupEvents. It looks for them four times per
// interval, and not while this member leaves. The caller must hold g.mu.
func (g *Gossip) dueEvents(now time.Duration) []GossipEvent {
	if now < g.checkAt || g.leaveUntil != 0 {
		return nil
	}
	g.checkAt = now + g.conf.Interval/4
	return append(g.joinEvents(now), g.lookupEvents(now)...)
}

// send sends datagrams[i] to the address to[i], for every i. It skips a datagram whose address is
// not valid. It does not repeat a failed send: the datagram is lost, as if the network had lost it.
// It returns the counts of datagrams, bytes and errors, and the errors by address. A failed send
// counts as sent and as an error.
func (g *Gossip) send(datagrams []Datagram, to []netip.AddrPort) (sent GossipStats, failed map[netip.AddrPort]error) {
	for i, d := range datagrams {
		if !to[i].IsValid() {
			continue
		}
		if _, err := g.conf.Conn.WriteToUDPAddrPort(d.Data, to[i]); err != nil {
			sent.SendErrors++
			if failed == nil {
				failed = map[netip.AddrPort]error{}
			}
			failed[to[i]] = err
		}
		sent.Sent++
		sent.SentBytes += uint64(len(d.Data))
	}
	return sent, failed
}

// signalIfViewChanged sends a signal on g.changed if View().Version has changed since the last
// signal. The caller must hold g.mu.
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

// Changed returns a channel that gets a signal after View().Version or the result of RestartState
// has changed. One signal may stand for several changes.
func (g *Gossip) Changed() <-chan struct{} { return g.changed }

// RestartState returns the state that the caller must store for this member's next start.
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

// updateAndWakeRun calls change, which changes the state machine, while it holds g.mu. It then
// makes Run's read return at once, because after the change Run may have packets to send, or may
// have to call Tick earlier.
func (g *Gossip) updateAndWakeRun(change func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change()
	g.signalIfViewChanged()
	g.conf.Conn.SetReadDeadline(g.start) // a deadline in the past interrupts a read
}

// interruptRead makes Run's read return at once, so that Run notices that its context has ended.
func (g *Gossip) interruptRead() { g.updateAndWakeRun(func() {}) }
