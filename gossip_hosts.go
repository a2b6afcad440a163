package main

// The addresses of hosts: seeds, and members that gave a name for an address, are looked up again
// and again, because their addresses may change. The number of hosts is bounded. No lookup holds
// the mutex.

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
	lookupTimeout = 2 * time.Second
	lookupEvery   = 30 * time.Second
)

// HostResolver is the part of a *net.Resolver that gossip needs.
type HostResolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// addrOrQueueLookup returns the address of an endpoint; not a valid one while its host is not
// looked up. g.mu is held.
func (g *Gossip) addrOrQueueLookup(to PacketDestination) netip.AddrPort {
	if to.AddrPort.IsValid() {
		return to.AddrPort
	}
	addrs, known := g.hosts[to.Host]
	if !known && len(g.hosts) < MaxMembers+len(g.conf.Seeds) {
		g.hosts[to.Host] = nil
		signalChan(g.lookup)
	}
	if len(addrs) == 0 {
		return netip.AddrPort{}
	}
	return addrs[0]
}

// runHostRefresh looks up seeds, and members that gave a name for an address, until ctx ends: the
// addresses of either may change.
func (g *Gossip) runHostRefresh(ctx context.Context) {
	g.mu.Lock()
	for _, s := range g.conf.Seeds {
		g.hosts[s] = nil
	}
	g.mu.Unlock()
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

// resolveAllHosts looks up all hosts. It returns false if one cannot be looked up; its addresses
// stay as they were.
func (g *Gossip) resolveAllHosts(ctx context.Context) (allResolved bool) {
	g.mu.Lock()
	hosts := slices.Sorted(maps.Keys(g.hosts))
	g.mu.Unlock()
	allResolved = true
	for _, h := range hosts {
		addrs, err := g.resolve(ctx, h)
		if err != nil {
			allResolved = false
			continue
		}
		g.updateAndWakeRun(func() {
			g.hosts[h] = addrs
			var seeds []netip.AddrPort
			for _, s := range g.conf.Seeds {
				seeds = append(seeds, g.hosts[s]...)
			}
			g.swim.SetSeeds(seeds)
		})
	}
	return allResolved
}

// resolve returns all addresses of a host:port.
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

// AdvertisedAddr returns the host:port where peers reach this member. It is the address of the
// listener if that is of one host. Otherwise its host is the one from which this machine reaches
// the first of peers (each a host:port) that can be looked up; or if there is none, from which
// it reaches any other host: a name that is not known yet must not keep a server from starting.
// Nothing is sent for that but questions for names.
func AdvertisedAddr(listener netip.AddrPort, peers []string) (string, error) {
	if !listener.Addr().IsUnspecified() {
		return listener.String(), nil
	}
	var conn net.Conn
	var err error
	for _, peer := range append(slices.Clone(peers), "192.0.2.1:9") { // of TEST-NET-1 (RFC 5737): only a default route leads there
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
