package main

// This file resolves host names: the names of seeds, and the names that members announce instead of
// an IP address. It looks each name up again and again, because the addresses of a name may change.
// The number of names is bounded. Gossip.mu is never held during a lookup.

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"
)

const (
	lookupTimeout = 2 * time.Second  // longest time for the lookup of one host
	lookupEvery   = 30 * time.Second // longest wait between two rounds, each of which looks up all hosts; see runHostRefresh

	// unusedHostLife is how long a host that is no seed is looked up after the last packet to it. A
	// member contacts each dead member now and then, in a full table about once in this time.
	unusedHostLife = time.Hour

	lookupReportEvery = time.Hour // shortest time between two reports that the lookup of one host fails
)

// A lookedUpHost is what lookups have found for one host:port.
type lookedUpHost struct {
	isSeed   bool
	usedAt   time.Duration    // when a packet was last sent to it by its name
	addrs    []netip.AddrPort // of the last successful lookup
	err      error            // of the latest lookup; nil if that was successful or there was none
	reportAt time.Duration    // when lookupEvents may report err
}

// HostResolver is the part of a *net.Resolver that gossip needs.
type HostResolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// addrOrQueueLookup returns the UDP address of a destination. If the destination has only a host
// name, it returns the first address that the last successful lookup of the name found, or an
// invalid address if no lookup has succeeded yet. It queues a new name for lookup, unless g.hosts
// is full: g.hosts has at most MaxMembers entries plus one for each seed. The caller must hold
// g.mu. now is the present time.
func (g *Gossip) addrOrQueueLookup(now time.Duration, to PacketDestination) netip.AddrPort {
	if to.AddrPort.IsValid() {
		return to.AddrPort
	}
	h := g.hosts[to.Host]
	if h == nil {
		if len(g.hosts) >= MaxMembers+len(g.conf.Seeds) {
			return netip.AddrPort{}
		}
		h = &lookedUpHost{}
		g.hosts[to.Host] = h
		signalChan(g.lookup)
	}
	h.usedAt = now
	if len(h.addrs) == 0 {
		return netip.AddrPort{}
	}
	return h.addrs[0]
}

// lookupEvents returns the events that are due at the time now: one for each host of a member whose
// latest lookup has failed, at most once per lookupReportEvery, because a host that is gone for good
// is looked up for as long as its dead member is remembered. joinEvents reports seeds. The caller
// must hold g.mu.
func (g *Gossip) lookupEvents(now time.Duration) (events []GossipEvent) {
	for name, h := range g.hosts {
		if !h.isSeed && h.err != nil && now >= h.reportAt {
			h.reportAt = now + lookupReportEvery
			events = append(events, GossipEvent{What: EventLookupFails, Addr: name, Detail: h.err.Error()})
		}
	}
	return events
}

// runHostRefresh looks up the seeds and all queued hosts, again and again until ctx ends. It waits
// two intervals after the first round of lookups, and twice as long after each further round, up to
// lookupEvery. As soon as all lookups of a round have succeeded, it always waits lookupEvery. A
// newly queued host ends the wait.
func (g *Gossip) runHostRefresh(ctx context.Context) {
	wait := g.conf.Interval
	for {
		if wait = min(2*wait, lookupEvery); g.resolveAllHosts(ctx) {
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

// resolveAllHosts looks up all hosts in g.hosts, and passes the addresses of the seeds to the state
// machine. It returns false if a host cannot be resolved. Such a host keeps the addresses of its
// last successful lookup. resolveAllHosts first forgets the hosts that are not used any more.
func (g *Gossip) resolveAllHosts(ctx context.Context) (allResolved bool) {
	g.mu.Lock()
	now := time.Since(g.start)
	maps.DeleteFunc(g.hosts, func(_ string, h *lookedUpHost) bool { return !h.isSeed && now-h.usedAt > unusedHostLife })
	hosts := slices.Sorted(maps.Keys(g.hosts))
	g.mu.Unlock()
	allResolved = true
	for _, h := range hosts {
		addrs, err := g.resolve(ctx, h)
		if err != nil {
			allResolved = false
			g.mu.Lock()
			g.hosts[h].err = err
			g.mu.Unlock()
			continue
		}
		g.updateAndWakeRun(func() {
			g.hosts[h].addrs, g.hosts[h].err = addrs, nil
			var seeds []netip.AddrPort
			for _, s := range g.conf.Seeds {
				seeds = append(seeds, g.hosts[s].addrs...)
			}
			g.swim.SetSeeds(seeds)
		})
	}
	return allResolved
}

// resolve returns all addresses of hostport. It looks up a host name for at most lookupTimeout.
func (g *Gossip) resolve(ctx context.Context, hostport string) ([]netip.AddrPort, error) {
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

// AdvertisedAddr returns the host:port at which peers reach this member. If listener has a specific
// IP address, the result is listener itself. Otherwise listener is 0.0.0.0 or ::, and the result
// has listener's port and the local address from which this machine reaches a peer. That peer is
// the first of peers (each a host:port) that can be resolved and has a route. If there is none,
// AdvertisedAddr uses the default route, because an unknown name must not keep a server from
// starting. AdvertisedAddr may send DNS queries, but nothing else.
func AdvertisedAddr(listener netip.AddrPort, peers []string) (string, error) {
	if !listener.Addr().IsUnspecified() {
		return listener.String(), nil
	}
	var conn net.Conn
	var err error
	// The last resort, 192.0.2.1, is in TEST-NET-1 (RFC 5737). Normally only the default route
	// leads there.
	for _, peer := range append(slices.Clone(peers), "192.0.2.1:9") {
		if conn, err = net.DialTimeout("udp", peer, lookupTimeout); err == nil {
			break
		}
	}
	if err != nil {
		return "", fmt.Errorf("cannot determine the address at which peers reach this host (set it with --advertise): %w", err)
	}
	defer conn.Close()
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return "", err
	}
	return netip.AddrPortFrom(local.Addr().Unmap().WithZone(""), listener.Port()).String(), nil
}
