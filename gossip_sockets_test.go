package main

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

// lossyConn loses datagrams at random, and all to or from the other side while
// there is a partition.
type lossyConn struct {
	UDPConn
	loss  float64
	apart func(to netip.AddrPort) bool
}

func (c *lossyConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	if rand.Float64() < c.loss || c.apart != nil && c.apart(to) {
		return len(b), nil
	}
	return c.UDPConn.WriteToUDPAddrPort(b, to)
}

// joined starts n members at the default interval and waits until all know all.
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

// BenchmarkGossipSockets measures what a peer's table has, on its scenarios: all
// members in one process, on loopback, for seven minutes. The pauses are what is
// measured: members at rest, under loss, apart. It asserts nothing about time.
func BenchmarkGossipSockets(t *testing.B) {
	row := func(times []time.Duration) string {
		slices.Sort(times)
		return fmt.Sprintf("%.2f/%.2f", times[len(times)/2].Seconds(), times[len(times)-1].Seconds())
	}
	t.Log("members | all join | sudden death known | graceful leave known | packets/s, bytes/s per member at rest | CPU s per member-minute")
	for _, size := range []struct{ n, runs int }{{3, 7}, {10, 7}, {50, 5}, {100, 5}} {
		var join, death, leave []time.Duration
		var packets, bytes, cpu float64
		for run := range size.runs {
			all, took := joinedSockets(t, size.n, nil, nil)
			join = append(join, took)
			time.Sleep(5 * time.Second) // to rest
			if run == 0 {
				before, c0 := make([]GossipStats, size.n), processCPU(t)
				for i, g := range all {
					before[i] = g.Stats()
				}
				const rest = 20
				time.Sleep(rest * time.Second)
				cpu = (processCPU(t) - c0).Seconds() * 60 / rest / float64(size.n)
				for i, g := range all {
					st := g.Stats()
					packets += float64(st.Sent-before[i].Sent) / rest / float64(size.n)
					bytes += float64(st.SentBytes-before[i].SentBytes) / rest / float64(size.n)
				}
			}
			begin := time.Now()
			all[size.n-1].kill()
			all = all[:size.n-1]
			eventually(t, "death known", allLive(all, size.n-1))
			death = append(death, time.Since(begin))
			begin = time.Now()
			go all[size.n-2].stop()
			all = all[:size.n-2]
			eventually(t, "leave known", allLive(all, size.n-2))
			leave = append(leave, time.Since(begin))
			for _, g := range all {
				g.kill()
			}
		}
		t.Logf("%d | %s | %s | %s | %.1f, %.0f | %.3f", size.n, row(join), row(death), row(leave), packets, bytes, cpu)
	}

	// 20 % of all datagrams are lost for a minute, in all runs at the same time.
	var wg sync.WaitGroup
	var mu sync.Mutex
	var lines []string
	for _, size := range []struct{ n, runs int }{{10, 5}, {50, 4}} {
		for range size.runs {
			var lossy atomic.Bool
			var deaths atomic.Int64
			all, _ := joinedSockets(t, size.n, func(_ int, u UDPConn) UDPConn {
				return &lossyConn{UDPConn: u, apart: func(netip.AddrPort) bool { return lossy.Load() && rand.Float64() < .2 }}
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

	for _, cut := range []time.Duration{20 * time.Second, time.Minute} {
		var apart atomic.Bool
		side := sync.Map{} // address → 0 or 1
		all, _ := joinedSockets(t, 10, func(i int, u UDPConn) UDPConn {
			return &lossyConn{UDPConn: u, apart: func(to netip.AddrPort) bool {
				s, ok := side.Load(to)
				return apart.Load() && ok && s != i%2
			}}
		}, nil)
		for i, g := range all {
			side.Store(g.addr, i%2)
		}
		apart.Store(true)
		time.Sleep(cut)
		apartLive := all[0].live()
		apart.Store(false)
		begin := time.Now()
		eventually(t, "merged", allLive(all, 10))
		t.Logf("10 members apart for %v (each side saw %d): merged after %.1f s", cut, apartLive, time.Since(begin).Seconds())
		for _, g := range all {
			g.kill()
		}
	}
}
