package main

// This file wires the parts that make a server with --listen-cluster a member of the ring. Gossip
// (UDP) and forwarding (TCP) use the same port number. The number of a new gossip session is saved
// before the first packet is sent, unless the disk is full or there is no storage directory. Gossip
// ends after the HTTP listeners and before the store.

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
)

// ringName is the name of the ring. Members authenticate it with every message to each other, and
// refuse messages of a ring with another name.
const ringName = "telemeter"

// forwardDialTimeout bounds connecting to the owner of a site. It is short because gossip needs
// about three seconds to detect a dead member. Until then, this server still tries to forward
// pushes to the dead member, and each of these pushes may have to wait for this timeout.
const forwardDialTimeout = 2 * time.Second

// ringFlags has the values of the flags of --mode server that make a server a member of a ring.
type ringFlags struct {
	listen, advertise, name string
	join                    []string
	interval                time.Duration
}

func (f *ringFlags) define(c *command) {
	c.defineGroup("Ring of servers", func() {
		c.optionalAddressFlag(&f.listen, "listen-cluster", "", "`ADDRESS` address for other servers, for UDP and TCP, usually :9006; empty: run without a ring")
		c.addressesFlag(&f.join, "join", "`ADDRESS` address of a server of the ring to join, retried forever; a host name stands for all its IP addresses")
		c.optionalAddressFlag(&f.advertise, "advertise", "", "`ADDRESS` address where other servers reach this server; /sd uses its host; empty: detected automatically")
		hostname, _ := os.Hostname() // if this fails, the default is empty, and check reports an invalid --name unless --name is set
		c.StringVar(&f.name, "name", hostname, "`NAME` name of this server, unique in the ring")
		c.durationFlag(&f.interval, "gossip-interval", DefaultGossipInterval, 100*time.Millisecond, 0, "`TIME` interval of gossip, with which all its timeouts scale; raise it for slow links")
		c.Lookup("name").DefValue = "the host name"
	})
}

// enabled reports whether the flags make the server a member of a ring.
func (f *ringFlags) enabled() bool { return f.listen != "" }

// check adds each conflict among the flags of the ring to the problems of c.
func (f *ringFlags) check(c *command) {
	err := CheckMemberName(f.name) // the name is a label value of /federate without a ring, too
	c.addProblemUnless(err == nil, "--name: %v", err)
	err = CheckMemberAddrText(f.advertise)
	c.addProblemUnless(f.advertise == "" || err == nil, "--advertise: %v", err)
	c.addProblemUnless(f.enabled() || len(f.join) == 0 && f.advertise == "", "--join and --advertise need --listen-cluster ADDRESS, usually :9006")
}

// ringNode has the parts of a server that make it a member of a ring, and its sockets.
type ringNode struct {
	gossip *Gossip
	member *RingKeeper
	tcp    net.Listener
	udp    *net.UDPConn
}

// openRingNode opens the sockets for other members and builds this server's ring node. The node
// continues from the restart state in the storage directory. It passes every new view of the ring
// to p.forwarder. After an error the sockets are closed. Otherwise the caller must run the node,
// and close its sockets at the end.
func (p *serverProcess) openRingNode(ringKeys Keys) (n *ringNode, err error) {
	f := &p.ring
	state, err := LoadRestartState(DiskFS{}, p.storageDir)
	if err != nil {
		return nil, flagError("storage-dir", p.storageDir, err)
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
	p.warnIfLoopbackAdvertised(advertise)
	sd, reachable := sdAddress(p.internalAddr, advertise)
	if !reachable {
		p.log.Warn("/sd lists a loopback address for this server, because the internal listener is on loopback: set --listen-internal to an address that Prometheus can reach", "address", sd)
	}
	if n.gossip, err = NewGossip(GossipConfig{
		Name: f.name, Addr: advertise, URL: p.sdScheme() + sd, RingName: ringName, Keys: ringKeys, Seeds: f.join, Interval: f.interval,
		RestartState: state, Conn: n.udp, Resolver: net.DefaultResolver,
		Notify: p.logGossipEvent,
	}); err != nil {
		return n, fmt.Errorf("starting gossip: %w", err)
	}
	failures := p.metrics.Counter("telemeter_member_state_errors_total", "Failures to save the restart state of this ring member; each is logged.")
	if n.member, err = NewRingKeeper(RingKeeperConfig{
		Name: f.name, Gossip: n.gossip, FS: DiskFS{}, Dir: p.storageDir, HasSeeds: len(f.join) > 0, Interval: f.interval, Log: p.log,
		OnView: p.forwarder.SetView, OnError: func(error) { failures.Inc() },
	}); err != nil {
		return n, flagError("storage-dir", p.storageDir, err)
	}
	p.log.Info("started as member of the ring", "name", f.name, "listen", n.tcp.Addr(), "advertise", advertise, "join", f.join)
	return n, nil
}

// logGossipEvent writes e to the process log. It leaves out EventNewStorage if there is no storage
// directory, because every start then is without a stored state.
func (p *serverProcess) logGossipEvent(e GossipEvent) {
	if e.What == EventNewStorage && p.storageDir == "" {
		return
	}
	var args []any
	for _, a := range [][2]string{{"member", e.Name}, {"address", e.Addr}, {"join", e.Join}, {"problem", e.Detail}} {
		if a[1] != "" {
			args = append(args, a[0], a[1])
		}
	}
	if e.Count > 0 {
		args = append(args, "count", e.Count)
	}
	if e.What == EventNewStorage {
		args = append(args, "storage_dir", p.storageDir)
	}
	p.log.Log(context.Background(), e.Level(), e.What, args...)
}

// warnIfLoopbackAdvertised warns if this server advertises a loopback address, although a value of
// --join names another host. Members on other hosts could not reach this server.
func (p *serverProcess) warnIfLoopbackAdvertised(advertise string) {
	host, _, _ := net.SplitHostPort(advertise)
	for _, other := range p.ring.join {
		if peer, _, _ := net.SplitHostPort(other); IsLoopbackHost(host) && !IsLoopbackHost(peer) {
			p.log.Warn("this server advertises a loopback address, which servers on other hosts cannot reach: set --advertise, or a --listen-cluster that other hosts can reach", "advertise", advertise, "join", other)
			return
		}
	}
}

// listenTCPAndUDP listens on addr for TCP, and for UDP on the same IP address and port.
func (n *ringNode) listenTCPAndUDP(addr string) (err error) {
	if n.tcp, err = listenFlag("listen-cluster", addr); err != nil {
		return err
	}
	tcp := n.tcp.Addr().(*net.TCPAddr)
	if n.udp, err = net.ListenUDP("udp", &net.UDPAddr{IP: tcp.IP, Port: tcp.Port, Zone: tcp.Zone}); err != nil {
		return fmt.Errorf("%w; gossip uses UDP on this port", listenError("listen-cluster", tcp.String(), err))
	}
	return nil
}

// sdAddress returns the address that /sd lists for this server. internal is the address of the
// internal listener. If internal has no host, or an unspecified one such as 0.0.0.0, the result has
// the host of advertise in its place. reachable is false if the result is a loopback address and
// advertise is not.
func sdAddress(internal, advertise string) (addr string, reachable bool) {
	host, port, _ := net.SplitHostPort(internal)
	advertised, _, _ := net.SplitHostPort(advertise)
	if host == "" || net.ParseIP(host).IsUnspecified() {
		return net.JoinHostPort(advertised, port), true
	}
	return internal, !IsLoopbackHost(host) || IsLoopbackHost(advertised)
}

// run takes part in the ring until ctx ends or gossip fails. At the end of ctx it leaves the ring
// before it returns.
func (n *ringNode) run(ctx context.Context) error {
	return runUntilOneEnds(ctx, n.gossip.Run, n.member.Run)
}

// closeSockets closes the sockets that were opened. The TCP listener may be closed already by its
// HTTPServer, which is harmless.
func (n *ringNode) closeSockets() {
	if n.tcp != nil {
		n.tcp.Close()
	}
	if n.udp != nil {
		n.udp.Close()
	}
}
