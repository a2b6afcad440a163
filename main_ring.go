package main

// A server with --listen-cluster: the wiring of a member of the ring. The number of a new
// session is durable before the first packet. UDP and TCP have one port. Gossip ends after
// HTTP and before the store is closed.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// ringName is authenticated with all that members send each other.
const ringName = "telemeter"

// forwardDial is short: gossip needs some three seconds to tell who is dead.
const forwardDial = 2 * time.Second

// RingFlags are the flags of --mode server that make it a member.
type RingFlags struct {
	listen, advertise, name *string
	join                    *ListFlag
	interval                *time.Duration
}

// Define adds the flags to c.
func (f *RingFlags) Define(c *Command) {
	c.Group("Cluster of servers", func() {
		f.listen = c.String("listen-cluster", "", "`ADDRESS` for other servers, UDP and TCP, usually :9006; empty: this server is alone")
		f.join = c.List("join", "`ADDRESS` of a server to join at, tried for ever; a name stands for all its addresses")
		f.advertise = c.String("advertise", "", "`ADDRESS` by which other servers and /sd reach this one; empty: found out")
		hostname, _ := os.Hostname() // without one, Check asks for --name
		f.name = c.String("name", hostname, "`NAME` of this server, unique among them")
		f.interval = c.Duration("gossip-interval", DefaultGossipInterval, "`TIME` that scales all timing among servers; more for slow links")
		c.Lookup("name").DefValue = "this host's"
	})
}

// Wanted reports whether the server is to be a member.
func (f *RingFlags) Wanted() bool { return *f.listen != "" }

// Check collects what contradicts itself.
func (f *RingFlags) Check(c *Command) {
	c.Require(f.Wanted() || len(*f.join) == 0 && *f.advertise == "", "--join and --advertise need --listen-cluster, usually :9006")
	if !f.Wanted() {
		return
	}
	_, _, err := net.SplitHostPort(*f.listen)
	c.Require(err == nil, "--listen-cluster: %v", err)
	err = CheckMemberName(*f.name)
	c.Require(err == nil, "--name: %v", err)
	if *f.advertise != "" {
		_, _, err := net.SplitHostPort(*f.advertise)
		c.Require(err == nil, "--advertise: %v", err)
	}
	for _, addr := range *f.join {
		_, _, err := net.SplitHostPort(addr)
		c.Require(err == nil, "--join: %v", err)
	}
	c.Require(*f.interval >= 100*time.Millisecond, "--gossip-interval is at least 100ms")
}

// RingNode is the part of a server that makes it a member.
type RingNode struct {
	gossip  *Gossip
	Forward *Forwarder
	Member  *RingMember
	box     *Box
	Web     HTTPServer
	tcp     net.Listener
	udp     *net.UDPConn
	stop    context.CancelFunc
	ended   sync.WaitGroup // of those that run
	failed  chan error     // what each ended with
}

// NewRingNode opens the cluster port. server is called only once serving.
func NewRingNode(f *RingFlags, keysDir, internal, dir string, metrics *Metrics, log *slog.Logger, server func() *Server) (n *RingNode, err error) {
	keys, err := ReadKeys(keysDir, ClusterKeyFile)
	if err != nil {
		return nil, err
	}
	state, err := LoadMemberState(DiskFS{}, dir)
	if err != nil {
		return nil, err
	}
	n = &RingNode{failed: make(chan error, 2)}
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	if n.tcp, err = Listen(*f.listen); err != nil {
		return n, err
	}
	addr := n.tcp.Addr().(*net.TCPAddr)
	if n.udp, err = net.ListenUDP("udp", &net.UDPAddr{IP: addr.IP, Port: addr.Port, Zone: addr.Zone}); err != nil {
		return n, fmt.Errorf("listening: %w", err)
	}
	advertise := *f.advertise
	if advertise == "" {
		if advertise, err = AdvertisedAddr(netip.AddrPortFrom(addr.AddrPort().Addr().Unmap(), uint16(addr.Port)), *f.join); err != nil {
			return n, err
		}
	}
	// What /sd tells of the internal listener: its own address if it has one.
	if host, port, _ := net.SplitHostPort(internal); host == "" || net.ParseIP(host).IsUnspecified() {
		reachable, _, _ := net.SplitHostPort(advertise)
		internal = net.JoinHostPort(reachable, port)
	} else if peers, _, _ := net.SplitHostPort(advertise); IsLoopback(host) && !IsLoopback(peers) {
		log.Warn("the internal listener is on loopback, and so is what /sd tells of it: give --listen-internal an address that the Prometheus reaches", "address", internal)
	}
	if n.gossip, err = NewGossip(GossipConfig{
		Name: *f.name, Addr: advertise, URL: internal, Cluster: ringName, Keys: keys, Seeds: *f.join, Interval: *f.interval,
		State: state, Conn: n.udp, Resolver: net.DefaultResolver,
		Notify: func(e GossipEvent) { log.Info(e.What, "member", e.Name, "address", e.Addr) },
	}); err != nil {
		return n, fmt.Errorf("starting gossip: %w", err)
	}
	if n.box, err = NewBox(keys, ringName); err != nil {
		return n, err
	}
	n.Forward = NewForwarder(ForwarderConfig{
		Name: *f.name, Box: n.box, Client: NewHTTPClient(nil, time.Minute, forwardDial), Log: log, Metrics: metrics,
		Take: func(ctx context.Context, up *ForwardedPush, body []byte) (*PushResult, error) {
			return server().Forwarded(ctx, up, body)
		},
	})
	if n.Member, err = NewRingMember(RingMemberConfig{
		Name: *f.name, Gossip: n.gossip, Forward: n.Forward, FS: DiskFS{}, Dir: dir, Seeds: len(*f.join) > 0,
		Interval: *f.interval, Log: log, Metrics: metrics,
	}); err != nil {
		return n, err
	}
	n.Web = HTTPServer{Name: "cluster", Listener: n.tcp, Handler: n.Forward.Handler(), Log: log}
	log.Info("member", "name", *f.name, "cluster", n.tcp.Addr(), "advertise", advertise, "join", *f.join)
	return n, nil
}

// Start begins to take part.
func (n *RingNode) Start() {
	ctx, stop := context.WithCancel(context.Background())
	n.stop = stop
	for _, run := range []func(context.Context) error{n.gossip.Run, n.Member.Run} {
		n.ended.Go(func() { n.failed <- run(ctx) })
	}
}

// Watch returns a part that calls ready when there is a ring, and ends with the
// first error of what Start began.
func (n *RingNode) Watch(ready func()) func(context.Context) error {
	return func(ctx context.Context) error {
		settled := n.Member.Settled()
		for {
			select {
			case <-settled:
				ready()
				settled = nil
			case err := <-n.failed:
				if err != nil {
					return err
				}
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// Announce tells the others that this server is about to leave: the ring is then made
// without it.
func (n *RingNode) Announce() { n.gossip.SetLeaving() }

// Leave ends what Start began, and returns the errors that Watch has not.
func (n *RingNode) Leave() error {
	n.Announce()
	n.stop()
	n.ended.Wait()
	close(n.failed)
	var errs []error
	for err := range n.failed {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Reload takes new cluster keys, live.
func (n *RingNode) Reload(keys Keys) error {
	return errors.Join(n.gossip.SetKeys(keys), n.box.SetKeys(keys))
}

// Close closes the cluster port.
func (n *RingNode) Close() {
	if n.tcp != nil {
		n.tcp.Close()
	}
	if n.udp != nil {
		n.udp.Close()
	}
}
