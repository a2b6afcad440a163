package main

// Benchmarks of gossip over real UDP sockets. All members are in this process, on loopback. The
// benchmarks sleep while they observe members that are at rest, lose packets or are separated. They
// log the measured times, and do not compare them with limits.

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A lossyConn is a UDPConn that loses each datagram for whose destination lost returns true.
type lossyConn struct {
	UDPConn
	lost func(to netip.AddrPort) bool
}

func (c *lossyConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	if c.lost(to) {
		return len(b), nil
	}
	return c.UDPConn.WriteToUDPAddrPort(b, to)
}

// joinedSockets starts n members at the default interval, waits until all know each other, and
// returns the members and how long this took. If conn is not nil, member i uses conn(i, c)
// instead of its socket c. Each member passes its events to notify.
func joinedSockets(t testing.TB, n int, conn func(i int, c UDPConn) UDPConn, notify func(GossipEvent)) ([]*gossiper, time.Duration) {
	t.Helper()
	begin := time.Now()
	var all []*gossiper
	for i := range n {
		c := GossipConfig{Name: fmt.Sprint("n", i), Interval: DefaultGossipInterval, Notify: notify}
		if i > 0 {
			c.Seeds = []string{all[0].addr.String()}
		}
		all = append(all, startGossipOver(t, c, "127.0.0.1:0", func(u UDPConn) UDPConn {
			if conn == nil {
				return u
			}
			return conn(i, u)
		}))
	}
	eventually(t, fmt.Sprint(n, " joined"), allLive(all, n))
	return all, time.Since(begin)
}

// medianAndWorst returns a text with the median and the longest of times, in seconds.
func medianAndWorst(times []time.Duration) string {
	slices.Sort(times)
	return fmt.Sprintf("%.2f/%.2f", times[len(times)/2].Seconds(), times[len(times)-1].Seconds())
}

// BenchmarkGossipSockets logs measurements of rings on real sockets: of members at rest, of joins,
// leaves and deaths, with packet loss, and after a partition. It takes about seven minutes.
func BenchmarkGossipSockets(t *testing.B) {
	measureSockets(t)
	measureSocketsLoss(t)
	measureSocketsPartition(t)
}

// measureSockets measures how long all members need to learn of joins, a death and a leave, and how
// many packets a member sends while nothing changes.
func measureSockets(t *testing.B) {
	t.Log("members | all join | sudden death known | graceful leave known | packets/s, bytes/s per member at rest | CPU s per member-minute")
	for _, size := range []struct{ n, runs int }{{3, 7}, {10, 7}, {50, 5}, {100, 5}} {
		var join, death, leave []time.Duration
		var packets, bytes, cpu float64
		for run := range size.runs {
			all, took := joinedSockets(t, size.n, nil, nil)
			join = append(join, took)
			time.Sleep(5 * time.Second) // until the members have nothing left to gossip
			if run == 0 {
				packets, bytes, cpu = socketsAtRest(t, all)
			}
			begin := time.Now()
			all[size.n-1].kill()
			all = all[:size.n-1]
			eventually(t, "all know of the death", allLive(all, size.n-1))
			death = append(death, time.Since(begin))
			begin = time.Now()
			go all[size.n-2].stop()
			all = all[:size.n-2]
			eventually(t, "all know of the leave", allLive(all, size.n-2))
			leave = append(leave, time.Since(begin))
			for _, g := range all {
				g.kill()
			}
		}
		t.Logf("%d | %s | %s | %s | %.1f, %.0f | %.3f", size.n, medianAndWorst(join), medianAndWorst(death), medianAndWorst(leave), packets, bytes, cpu)
	}
}

// socketsAtRest returns the packets and bytes that a member sends per second, and the CPU seconds
// that a member uses per minute, measured over 20 s.
func socketsAtRest(t *testing.B, all []*gossiper) (packets, bytes, cpu float64) {
	const rest = 20
	n := float64(len(all))
	before, c0 := make([]GossipStats, len(all)), processCPU(t)
	for i, g := range all {
		before[i] = g.Stats()
	}
	time.Sleep(rest * time.Second)
	cpu = (processCPU(t) - c0).Seconds() * 60 / rest / n
	for i, g := range all {
		st := g.Stats()
		packets += float64(st.Sent-before[i].Sent) / rest / n
		bytes += float64(st.SentBytes-before[i].SentBytes) / rest / n
	}
	return packets, bytes, cpu
}

// measureSocketsLoss counts how often a member declares a running member dead in rings that lose
// 20 % of all datagrams for a minute. Several rings run at the same time.
func measureSocketsLoss(t *testing.B) {
	var wg sync.WaitGroup
	var mu sync.Mutex // guards lines
	var lines []string
	for _, size := range []struct{ n, runs int }{{10, 5}, {50, 4}} {
		for range size.runs {
			var lossy atomic.Bool
			var deaths atomic.Int64
			all, _ := joinedSockets(t, size.n, func(_ int, u UDPConn) UDPConn {
				return &lossyConn{UDPConn: u, lost: func(netip.AddrPort) bool { return lossy.Load() && rand.Float64() < .2 }}
			}, func(e GossipEvent) {
				if e.What == EventDown {
					deaths.Add(1)
				}
			})
			wg.Go(func() {
				lossy.Store(true)
				time.Sleep(time.Minute)
				n := deaths.Load()
				for _, g := range all {
					g.kill()
				}
				mu.Lock()
				lines = append(lines, fmt.Sprintf("%d: %d", size.n, n))
				mu.Unlock()
			})
		}
	}
	wg.Wait()
	t.Log("false deaths in 60 s of 20 % loss, by members: ", strings.Join(lines, ", "))
}

// measureSocketsPartition measures how long ten members need to consider each other live again
// after a partition into two halves.
func measureSocketsPartition(t *testing.B) {
	for _, lasts := range []time.Duration{20 * time.Second, time.Minute} {
		var apart atomic.Bool
		side := sync.Map{} // half of the ring, 0 or 1, by the address of a member
		all, _ := joinedSockets(t, 10, func(i int, u UDPConn) UDPConn {
			return &lossyConn{UDPConn: u, lost: func(to netip.AddrPort) bool {
				s, ok := side.Load(to)
				return apart.Load() && ok && s != i%2
			}}
		}, nil)
		for i, g := range all {
			side.Store(g.addr, i%2)
		}
		apart.Store(true)
		time.Sleep(lasts)
		apartLive := all[0].live()
		apart.Store(false)
		begin := time.Now()
		eventually(t, "the halves have merged", allLive(all, 10))
		t.Logf("10 members, partition of %v (each half saw %d live members): merged after %.1f s", lasts, apartLive, time.Since(begin).Seconds())
		for _, g := range all {
			g.kill()
		}
	}
}
