package main

// The UDP driver of the membership: it gives the state machine its packets, its time and the
// addresses of its seeds, and sends the packets that it returns. One goroutine reads, ticks
// and sends. The mutex guards the state machine and the read deadline, and is held across no
// I/O. Time is monotonic since Run began. This file must not know the meaning of packets.

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// DefaultGossipInterval suits round trips up to 200 ms.
	DefaultGossipInterval = time.Second
	lookupTimeout         = 2 * time.Second
	lookupEvery           = 30 * time.Second
)

// ErrNameTaken: another member has our name and a higher session.
var ErrNameTaken = errors.New("another member of the cluster has this name: give one of them another --name")

// UDPConn is the part of a *net.UDPConn that gossip needs.
type UDPConn interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	SetReadDeadline(t time.Time) error
}

// HostResolver is the part of a *net.Resolver that gossip needs.
type HostResolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// A GossipConfig says who a member is and where it finds others.
type GossipConfig struct {
	Name     string // unique in the cluster; see CheckMemberName
	Addr     string // host:port that peers are told; see AdvertisedAddr
	URL      string // of the internal listener, for /sd; may be empty
	Cluster  string // whoever says another one, or has other keys, is not heard
	Keys     Keys
	Seeds    []string      // host:port; a name stands for all its addresses
	Interval time.Duration // scales all timing
	State    SwimState     // of the last start
	Conn     UDPConn       // closed by the caller, after Run
	Resolver HostResolver
	Notify   func(GossipEvent) // called from Run; must not block
}

// GossipStats counts since the start.
type GossipStats struct {
	Sent, SentBytes, SendErrors uint64 // datagrams and bytes of payload
	Received, ReceivedBytes     uint64
	Refused                     RefusedPackets
	Health                      int // 0 is good
}

// Gossip is one member of a cluster. Its methods are safe for concurrent use.
type Gossip struct {
	conf    GossipConfig
	start   time.Time // its monotonic reading
	changed chan struct{}
	lookup  chan struct{} // there is a new host to look up

	mu      sync.Mutex // guards the rest
	swim    *Swim
	version uint64
	stats   GossipStats
	hosts   map[string][]netip.AddrPort // by host:port, as looked up; bounded
}

// NewGossip checks c. State must be stored before Run is called.
func NewGossip(c GossipConfig) (*Gossip, error) {
	if err := errors.Join(CheckMemberName(c.Name), CheckMemberAddr(c.Addr)); err != nil {
		return nil, err
	}
	if c.URL != "" && CheckMemberAddr(c.URL) != nil {
		return nil, fmt.Errorf("URL to tell peers: want at most %d visible ASCII characters", MaxAddr)
	}
	for _, addr := range append(slices.Clone(c.Seeds), c.Addr) {
		if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
			return nil, fmt.Errorf("%q: want host:port", addr)
		}
	}
	if c.Interval <= 0 {
		return nil, errors.New("gossip needs an interval above 0")
	}
	sealer, err := NewSealer(c.Keys, c.Cluster, crand.Reader)
	if err != nil {
		return nil, err
	}
	var seed [32]byte
	crand.Read(seed[:]) // never fails since Go 1.24
	return &Gossip{
		conf: c, start: time.Now(), changed: make(chan struct{}, 1), lookup: make(chan struct{}, 1), hosts: map[string][]netip.AddrPort{},
		swim: NewSwim(SwimConfig{Name: c.Name, Addr: c.Addr, URL: c.URL, Interval: c.Interval,
			Random: rand.NewChaCha8(seed), Sealer: sealer, State: c.State}),
	}, nil
}

// Run takes part until ctx ends, and then leaves, which takes two intervals at
// most. Errors: ErrNameTaken, and what makes the socket unusable.
func (g *Gossip) Run(ctx context.Context) error {
	done := make(chan struct{})
	defer func() { <-done }()
	lookups, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		defer close(done)
		g.keepLookingUp(lookups)
	}()
	defer context.AfterFunc(ctx, func() { g.change(func() {}) })()
	buf := make([]byte, MaxPacket+1) // a longer one shows, and is refused
	var leaveUntil time.Duration
	for {
		now := time.Since(g.start)
		g.mu.Lock()
		if ctx.Err() != nil && leaveUntil == 0 {
			g.swim.Leave()
			leaveUntil = now + 2*g.conf.Interval
		}
		over := leaveUntil != 0 && (g.swim.Gone() || now > leaveUntil)
		wait, stood := g.swim.Next()-now, g.swim.Stood
		if leaveUntil != 0 {
			wait = min(wait, leaveUntil-now+1)
		}
		if !stood && !over && wait > 0 {
			// Under the mutex, so that change's deadline is never the one replaced. The
			// read will tell if this fails.
			g.conf.Conn.SetReadDeadline(time.Now().Add(wait))
		}
		g.mu.Unlock()
		switch {
		case stood:
			return ErrNameTaken
		case over:
			return nil
		case wait <= 0:
			g.step(func(now time.Duration) []Datagram { return g.swim.Tick(now) })
			continue
		}
		n, from, err := g.conf.Conn.ReadFromUDPAddrPort(buf)
		switch {
		case err == nil:
			from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
			g.step(func(now time.Duration) []Datagram {
				g.stats.Received++
				g.stats.ReceivedBytes += uint64(n)
				return g.swim.Receive(now, from, buf[:n])
			})
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("reading gossip: %w", err)
		}
		// Any other error passes: a deadline, or what a packet sent earlier met.
	}
}

// step lets the state machine do one thing, and then does what it wants.
func (g *Gossip) step(do func(now time.Duration) []Datagram) {
	g.mu.Lock()
	out := do(time.Since(g.start))
	events := g.swim.Events // both are Run's until the next step
	var to [][]netip.AddrPort
	for _, d := range out {
		to = append(to, g.addrs(d))
	}
	g.mu.Unlock()
	sent, bytes, failed := 0, 0, 0
	for i, d := range out {
		for _, addr := range to[i] {
			if _, err := g.conf.Conn.WriteToUDPAddrPort(d.Data, addr); err != nil {
				failed++ // as good as lost on the way
			}
			sent++
			bytes += len(d.Data)
		}
	}
	g.mu.Lock()
	g.stats.Sent += uint64(sent)
	g.stats.SentBytes += uint64(bytes)
	g.stats.SendErrors += uint64(failed)
	g.tell()
	g.mu.Unlock()
	for _, e := range events {
		if g.conf.Notify != nil {
			g.conf.Notify(e)
		}
	}
}

// tell has Changed receive if there is something new in View. g.mu is held.
func (g *Gossip) tell() {
	if v := g.swim.Version(); v != g.version {
		g.version = v
		poke(g.changed)
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// addrs returns where d goes. What is not looked up yet is lost.
func (g *Gossip) addrs(d Datagram) []netip.AddrPort {
	if d.To.IsValid() {
		return []netip.AddrPort{d.To}
	}
	addrs, known := g.hosts[d.Host]
	if !known && len(g.hosts) < MaxMembers+len(g.conf.Seeds) {
		g.hosts[d.Host] = nil
		poke(g.lookup)
	}
	return addrs[:min(len(addrs), 1)]
}

// keepLookingUp looks up seeds and members that gave a name for an address, for
// ever: either may move.
func (g *Gossip) keepLookingUp(ctx context.Context) {
	g.mu.Lock()
	for _, s := range g.conf.Seeds {
		g.hosts[s] = nil
	}
	g.mu.Unlock()
	wait := g.conf.Interval
	for {
		g.mu.Lock()
		hosts := make([]string, 0, len(g.hosts))
		for h := range g.hosts {
			hosts = append(hosts, h)
		}
		g.mu.Unlock()
		slices.SortFunc(hosts, func(a, b string) int { return strings.Compare(a, b) })
		failed := false
		for _, h := range hosts {
			addrs, err := g.lookUp(ctx, h)
			if err != nil {
				failed = true // what it was before stands
				continue
			}
			g.change(func() {
				g.hosts[h] = addrs
				var seeds []netip.AddrPort
				for _, s := range g.conf.Seeds {
					seeds = append(seeds, g.hosts[s]...)
				}
				g.swim.SetSeeds(seeds)
			})
		}
		if wait = min(2*wait, lookupEvery); !failed {
			wait = lookupEvery
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-g.lookup:
			timer.Stop()
		case <-timer.C:
		}
	}
}

func (g *Gossip) lookUp(ctx context.Context, hostport string) ([]netip.AddrPort, error) {
	if addr, err := netip.ParseAddrPort(hostport); err == nil {
		return []netip.AddrPort{addr}, nil
	}
	host, service, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	port, err := net.LookupPort("udp", service)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	ips, err := g.conf.Resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	addrs := make([]netip.AddrPort, len(ips))
	for i, ip := range ips {
		addrs[i] = netip.AddrPortFrom(ip.Unmap(), uint16(port))
	}
	return addrs, nil
}

// View returns the cluster as this member sees it.
func (g *Gossip) View() GossipView {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.swim.View()
}

// Changed receives after View().Version or State has changed.
func (g *Gossip) Changed() <-chan struct{} { return g.changed }

// State returns what to keep for the next start.
func (g *Gossip) State() SwimState {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.swim.State()
}

// Stats returns the counts.
func (g *Gossip) Stats() GossipStats {
	g.mu.Lock()
	defer g.mu.Unlock()
	st := g.stats
	st.Refused, st.Health = g.swim.Refused, g.swim.Health
	return st
}

// SetClaim tells all that this member claims a slot; see Swim.SetClaim.
func (g *Gossip) SetClaim(slot uint16, lamport uint64, provisional bool) {
	g.change(func() { g.swim.SetClaim(slot, lamport, provisional) })
}

// SetLeaving tells all that this member is about to leave.
func (g *Gossip) SetLeaving() { g.change(g.swim.SetLeaving) }

// SetKeys replaces the keys, live.
func (g *Gossip) SetKeys(keys Keys) (err error) {
	g.change(func() { err = g.swim.SetKeys(keys) })
	return err
}

// change changes the state machine and wakes Run, which has something to send or
// another time to wake up at.
func (g *Gossip) change(do func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	do()
	g.tell()
	g.conf.Conn.SetReadDeadline(g.start) // past
}

// AdvertisedAddr guesses the address to tell peers from that of the listener: it
// stands if it is of one host, else the one this machine would reach peers from (each
// a host:port), the first of them that can be told, or else any other host: that a
// name is not known yet must not keep a server from starting. Nothing is sent for that
// but questions for names.
func AdvertisedAddr(listener netip.AddrPort, peers []string) (string, error) {
	if !listener.Addr().IsUnspecified() {
		return listener.String(), nil
	}
	var conn net.Conn
	var err error
	for _, peer := range append(slices.Clone(peers), "192.0.2.1:9") { // of TEST-NET-1 (RFC 5737), which only a default route leads to
		if conn, err = net.DialTimeout("udp", peer, lookupTimeout); err == nil {
			break
		}
	}
	if err != nil {
		return "", fmt.Errorf("cannot tell which address peers reach this host at (--advertise says it): %w", err)
	}
	defer conn.Close()
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return "", err
	}
	return netip.AddrPortFrom(local.Addr().Unmap().WithZone(""), listener.Port()).String(), nil
}
