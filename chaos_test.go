package main

// chaos_test.go: servers are restarted, killed, cut off from each other, filled up,
// added and taken away while sites push and consumers scrape: every sample that was
// answered 200 comes out, and is held by one server in the end. Run by make
// test-chaos, in a network namespace of its own.

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

var (
	chaosFlag     = flag.String("chaos", "", "run TestChaos: full or short")
	chaosSeedFlag = flag.Uint64("seed", 0, "of TestChaos, 0: another each time; and the first of TestHandoffModel")
)

// chaosForm is how much of it.
type chaosForm struct {
	servers, sites int
	every, scrape  time.Duration // between pushes of a site, and between scrapes
	lasts          time.Duration // the part in which things break
	interval       time.Duration // of gossip
	grow, shrink   int           // servers
	growSites      int
	growEvery      time.Duration
}

func TestChaos(t *testing.T) {
	form := chaosForm{servers: 5, sites: 200, every: time.Second, scrape: 2 * time.Second, lasts: time.Minute, interval: time.Second,
		grow: 6, shrink: 2, growSites: 2000, growEvery: 10 * time.Second}
	switch *chaosFlag {
	case "full":
	case "short":
		form = chaosForm{servers: 3, sites: 40, every: time.Second, scrape: time.Second, lasts: 12 * time.Second, interval: 300 * time.Millisecond,
			grow: 3, shrink: 2, growSites: 200, growEvery: 4 * time.Second}
	default:
		t.Skip("run by make test-chaos")
	}
	seed := *chaosSeedFlag
	if seed == 0 {
		seed = rand.Uint64N(1 << 32)
	}
	fmt.Printf("chaos: %d servers, %d sites of %d series that push every %v, SEED=%d\n", form.servers, form.sites, chaosSeries, form.every, seed)
	chaosNetwork(t, max(form.servers, form.grow))
	begin := func(t *testing.T, name string) *chaosRig {
		r := newChaosRig(t, name, form.servers, form.sites, form.interval, seed)
		for _, s := range r.servers {
			r.start(s)
		}
		r.settled()
		r.load(form.every, form.scrape)
		r.begin = time.Now()
		return r
	}
	t.Run("rolling", func(t *testing.T) { chaosRolling(begin(t, "rolling"), form) })
	t.Run("kills", func(t *testing.T) { chaosBreak(begin(t, "kills"), form.lasts, (*chaosRig).killOne) })
	t.Run("partitions", func(t *testing.T) { chaosBreak(begin(t, "partitions"), form.lasts, (*chaosRig).partSome) })
	t.Run("disks", func(t *testing.T) {
		chaosBreak(begin(t, "disks"), form.lasts, (*chaosRig).killOne, (*chaosRig).partSome, (*chaosRig).fillOne)
	})
	t.Run("growth", func(t *testing.T) { chaosGrowth(t, form, seed) })
}

// chaosRolling restarts all servers, one after the other, as soon as the one before is
// ready. The Prometheus has what was acknowledged, and nothing else.
func chaosRolling(r *chaosRig, form chaosForm) {
	t := r.t
	var targets []string
	for _, s := range r.servers {
		targets = append(targets, s.addr+":9004")
	}
	p := newOutagePrometheus(t, strings.Join(targets, "', '"), "central", outageWindow, 2*time.Second)
	p.start()
	r.wait("first scrapes", func() bool {
		got, _, err := p.query(`chaos_total{k="0"}`, "_id")
		return err == nil && len(got) == len(r.sites)
	})
	for _, s := range r.servers {
		r.stop(s)
		r.start(s)
		r.ready(s)
	}
	acked := r.finish(true)

	missing, strange, twice, samples := 0, 0, 0, 0
	compare := func() (whole bool) {
		missing, strange, twice, samples = 0, 0, 0, 0
		for k := range chaosSeries {
			got, n, err := p.query(fmt.Sprintf(`chaos_total{k="%d"}[3h]`, k), "_id")
			if err != nil {
				return false
			}
			twice += n
			for sample := range acked {
				if v, ok := got[fmt.Sprint("site-", sample.site)][sample.t]; !ok || v != float64(sample.t%1000003) {
					missing++
				}
			}
			for site := range r.sites {
				for at := range got[fmt.Sprint("site-", site)] {
					if samples++; !acked[chaosSample{site, at}] {
						strange++
					}
				}
			}
		}
		return missing+strange+twice == 0
	}
	for deadline := time.Now().Add(chaosPatience); !compare() && time.Now().Before(deadline); time.Sleep(time.Second) {
	}
	outOfOrder, bad := p.log()
	fmt.Printf("%-11s the Prometheus has %d samples: missing %d, duplicate %d, not the sites' %d, refused as out of order %d, bad lines in its log %d\n",
		"", samples, missing, twice, strange, outOfOrder, len(bad))
	if missing+strange+twice > 0 || len(bad) > 0 {
		t.Errorf("SEED=%d: Prometheus said %s", r.seed, strings.Join(bad, ""))
	}
}

// chaosBreak breaks one thing after the other for a while, and then nothing.
func chaosBreak(r *chaosRig, lasts time.Duration, breaks ...func(r *chaosRig)) {
	for i, begin := 0, time.Now(); time.Since(begin) < lasts; i++ {
		if breaks[i%len(breaks)](r); r.rnd.IntN(3) == 0 { // else the next comes on top
			r.pause(5 * time.Second)
		}
	}
	r.heal()
	for _, s := range r.servers {
		if s.full {
			r.fill(s, false)
		}
	}
	r.finish(false)
}

// pause lets things be for at most a while.
func (r *chaosRig) pause(most time.Duration) { time.Sleep(time.Duration(r.rnd.Int64N(int64(most)))) }

// killOne kills a server and starts it again, with what its disk has.
func (r *chaosRig) killOne() {
	s := r.servers[r.rnd.IntN(len(r.servers))]
	r.kill(s)
	r.pause(5 * time.Second)
	r.start(s)
	if !r.parted { // alone it waits for others
		r.ready(s)
	}
}

// partSome cuts the network into random parts, or makes it whole.
func (r *chaosRig) partSome() {
	if r.parted && r.rnd.IntN(3) == 0 {
		r.heal()
		return
	}
	parts := make([]int, len(r.servers))
	for i := range parts {
		parts[i] = r.rnd.IntN(1 + r.rnd.IntN(len(parts)))
	}
	r.part(parts)
	r.pause(8 * time.Second)
}

// fillOne fills a disk, or gives one room.
func (r *chaosRig) fillOne() {
	s := r.servers[r.rnd.IntN(len(r.servers))]
	r.fill(s, !s.full)
	r.pause(4 * time.Second)
}

// chaosGrowth adds servers one by one, and takes them away again.
func chaosGrowth(t *testing.T, form chaosForm, seed uint64) {
	r := newChaosRig(t, "growth", form.grow, form.growSites, form.interval, seed)
	r.start(r.servers[0])
	r.settled()
	r.load(form.growEvery, form.scrape)
	all := func(shown map[int][]string) bool { return len(shown) == len(r.sites) }
	r.wait("every site is shown", func() bool { return all(r.held().shown) })
	r.begin = time.Now()
	owners := r.held().shown
	handed := func() int { return int(r.sum("telemeter_handoff_bytes_total")) }
	before := handed() // by those that run
	step := func(change func() (left int), from, to int) {
		begin := time.Now()
		left := change() // by one that does not run any more
		r.settled()
		settle := time.Since(begin)
		var now map[int][]string
		r.wait("every site is shown", func() bool { now = r.held().shown; return all(now) })
		moved := 0
		for site, s := range now {
			if s[0] != owners[site][0] {
				moved++
			}
		}
		owners = now
		after := handed()
		fmt.Printf("%-11s from %d servers to %d: moved %4d of %d sites, %.3f; 1/%d is %.3f; settled after %4.1f s; handed over %.0f kB\n",
			"growth:", from, to, moved, len(now), float64(moved)/float64(len(now)), max(from, to), 1/float64(max(from, to)), settle.Seconds(), float64(left+after-before)/1e3)
		before = after
	}
	for n := 1; n < form.grow; n++ {
		step(func() int { r.start(r.servers[n]); r.ready(r.servers[n]); return 0 }, n, n+1)
	}
	for n := form.grow; n > form.shrink; n-- {
		step(func() int {
			earlier := handed()
			all := r.stop(r.servers[n-1])
			before = handed()
			return all - (earlier - before)
		}, n, n-1)
	}
	r.finish(true)
}

// finish ends the load, waits until all is at rest, and checks and prints what came out.
// calm says that no server was killed and no network cut. Then what is served again is
// what a server could not know to have arrived when it handed it over.
func (r *chaosRig) finish(calm bool) map[chaosSample]bool {
	t := r.t
	t.Helper()
	lasted := time.Since(r.begin)
	acked := r.acked()
	settle := r.settled()
	begin := time.Now()
	for deadline := begin.Add(chaosPatience); len(r.consumer.missing(acked)) > 0 && time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
	}
	whole := time.Since(begin)
	missing := r.consumer.missing(acked)
	held := r.held()
	lost, twice, exposed := 0, 0, 0
	for sample := range acked {
		switch n := len(held.holders[sample]); {
		case n == 0:
			lost++
		case n > 1:
			twice++
		}
	}
	for _, servers := range held.shown {
		if len(servers) > 1 {
			exposed++
		}
	}
	again, refused := 0, []string{}
	slowest := time.Duration(0)
	for _, site := range r.sites {
		again += site.again
		refused = append(refused, site.refused...)
		slowest = max(slowest, site.slowest)
	}
	c := r.consumer
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Printf("%-11s %3.0f s: samples acknowledged %d, missing %d, not held %d, held twice %d; sites shown by two servers %d; served again %d, late %d\n",
		r.name+":", lasted.Seconds(), len(acked)*chaosSeries, len(missing)*chaosSeries, lost*chaosSeries, twice*chaosSeries, exposed, c.again*chaosSeries, c.late*chaosSeries)
	fmt.Printf("%-11s pushes tried again %d, refused %d, the slowest took %.1f s; scrapes failed %d; settled after %.1f s, served whole after %.1f s more\n",
		"", again, len(refused), slowest.Seconds(), c.failed, settle.Seconds(), whole.Seconds())
	if len(acked) == 0 || len(missing) > 0 || lost > 0 || twice > 0 || exposed > 0 || len(refused) > 0 || len(c.wrong) > 0 || calm && 2*c.again > len(acked) {
		for _, s := range r.running() {
			t.Logf("%s said:\n%s", s.name, s.p.text())
		}
		slices.SortFunc(missing, func(a, b chaosSample) int { return int(a.t - b.t) })
		t.Errorf("%s (SEED=%d): missing %v, refused %v, wrong %v, shown twice %v", r.name, r.seed, missing[:min(5, len(missing))],
			refused[:min(3, len(refused))], c.wrong[:min(3, len(c.wrong))], maps.Collect(func(yield func(int, []string) bool) {
				for site, servers := range held.shown {
					if len(servers) > 1 && !yield(site, servers) {
						return
					}
				}
			}))
	}
	return acked
}
