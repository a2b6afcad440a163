package main

// A server with --listen-cluster: the wiring of a member of the ring. The number of a new session
// is durable before the first packet. UDP and TCP have one port. Gossip ends after HTTP and
// before the store is closed.

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
)

// ringName is authenticated with all messages between members.
const ringName = "telemeter"

// forwardDialTimeout is short: gossip needs some three seconds to find a dead member.
const forwardDialTimeout = 2 * time.Second

// ringFlags are the flags of --mode server that make it a member of a ring.
type ringFlags struct {
	listen, advertise, name string
	join                    []string
	interval                time.Duration
}

func (f *ringFlags) define(c *command) {
	c.defineGroup("Cluster of servers", func() {
		c.optionalAddressFlag(&f.listen, "listen-cluster", "", "`ADDRESS` for other servers, UDP and TCP, usually :9006; empty: this server is alone")
		c.addressesFlag(&f.join, "join", "`ADDRESS` of a server to join at, tried for ever; a name stands for all its addresses")
		c.optionalAddressFlag(&f.advertise, "advertise", "", "`ADDRESS` by which other servers and /sd reach this one; empty: found out")
		hostname, _ := os.Hostname() // without one, check asks for --name
		c.StringVar(&f.name, "name", hostname, "`NAME` of this server, unique among them")
		c.durationFlag(&f.interval, "gossip-interval", DefaultGossipInterval, 100*time.Millisecond, 0, "`TIME` that scales all timing among servers; more for slow links")
		c.Lookup("name").DefValue = "this host's"
	})
}

// enabled reports whether the server is to be a member of a ring.
func (f *ringFlags) enabled() bool { return f.listen != "" }

// check collects conflicts.
func (f *ringFlags) check(c *command) {
	if !f.enabled() {
		c.addProblemUnless(len(f.join) == 0 && f.advertise == "", "--join and --advertise need --listen-cluster, usually :9006")
		return
	}
	err := CheckMemberName(f.name)
	c.addProblemUnless(err == nil, "--name: %v", err)
}

// ringNode is the part of a server that makes it a member of a ring.
type ringNode struct {
	gossip *Gossip
	member *RingKeeper
	tcp    net.Listener
	udp    *net.UDPConn
}

// openRingNode opens the port for other members, and makes a member that goes on from the state
// that its last start left. The forwarder gets every view of the ring.
func (p *serverProcess) openRingNode(ringKeys Keys) (n *ringNode, err error) {
	f := &p.ring
	state, err := LoadRestartState(DiskFS{}, p.storageDir)
	if err != nil {
		return nil, err
	}
	n = &ringNode{}
	defer func() {
		if err != nil {
			n.closeSockets()
		}
	}()
	if err := n.listenTCPAndUDP(f.listen); err != nil {
		return n, err
	}
	addr := n.tcp.Addr().(*net.TCPAddr).AddrPort()
	advertise := f.advertise
	if advertise == "" {
		if advertise, err = AdvertisedAddr(netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()), f.join); err != nil {
			return n, err
		}
	}
	sd, reachable := sdAddress(p.internalAddr, advertise)
	if !reachable {
		p.log.Warn("the internal listener is on loopback, and so is what /sd tells of it: give --listen-internal an address that the Prometheus reaches", "address", sd)
	}
	if n.gossip, err = NewGossip(GossipConfig{
		Name: f.name, Addr: advertise, URL: sd, RingName: ringName, Keys: ringKeys, Seeds: f.join, Interval: f.interval,
		RestartState: state, Conn: n.udp, Resolver: net.DefaultResolver,
		Notify: func(e GossipEvent) { p.log.Info(e.What, "member", e.Name, "address", e.Addr) },
	}); err != nil {
		return n, fmt.Errorf("starting gossip: %w", err)
	}
	failures := p.metrics.Counter("telemeter_member_state_errors_total", "Failures to keep the state of this member, logged.")
	if n.member, err = NewRingKeeper(RingKeeperConfig{
		Name: f.name, Gossip: n.gossip, FS: DiskFS{}, Dir: p.storageDir, HasSeeds: len(f.join) > 0, Interval: f.interval, Log: p.log,
		OnView: p.forwarder.SetView, OnError: func(error) { failures.Inc() },
	}); err != nil {
		return n, err
	}
	p.log.Info("member", "name", f.name, "listen", n.tcp.Addr(), "advertise", advertise, "join", f.join)
	return n, nil
}

// listenTCPAndUDP opens TCP and UDP on one port.
func (n *ringNode) listenTCPAndUDP(addr string) (err error) {
	if n.tcp, err = Listen(addr); err != nil {
		return err
	}
	tcp := n.tcp.Addr().(*net.TCPAddr)
	if n.udp, err = net.ListenUDP("udp", &net.UDPAddr{IP: tcp.IP, Port: tcp.Port, Zone: tcp.Zone}); err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	return nil
}

// sdAddress returns the address of the internal listener that /sd shows: its own, with the
// advertised host if it has none of its own. reachable is false if it is on loopback and the
// advertised address is not.
func sdAddress(internal, advertise string) (addr string, reachable bool) {
	host, port, _ := net.SplitHostPort(internal)
	advertised, _, _ := net.SplitHostPort(advertise)
	if host == "" || net.ParseIP(host).IsUnspecified() {
		return net.JoinHostPort(advertised, port), true
	}
	return internal, !isLoopback(host) || isLoopback(advertised)
}

// run takes part in the ring until ctx ends, and leaves it then. It returns when that is done.
func (n *ringNode) run(ctx context.Context) error {
	return runUntilOneEnds(ctx, n.gossip.Run, n.member.Run)
}

// closeSockets closes the port, the TCP listener once more if it has served.
func (n *ringNode) closeSockets() {
	if n.tcp != nil {
		n.tcp.Close()
	}
	if n.udp != nil {
		n.udp.Close()
	}
}
