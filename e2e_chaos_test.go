package main

// Servers are restarted, killed, cut off from each other, filled up, added and taken away, and their
// disks are lost, restored and damaged, while sites push and a Prometheus scrapes. Run by make
// test-chaos, in a network namespace of its own.

import (
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"
)

var (
	chaosFlag = flag.String("chaos", "", "run TestChaos: full or short")
)

// chaosForm is how much of it.
type chaosForm struct {
	servers, sites int
	every, scrape  time.Duration // between pushes of a site, and between scrapes
	lasts          time.Duration // the part in which things break
	away           time.Duration // that the central Prometheus is away
	copyAge        time.Duration // of a storage directory that is restored
	interval       time.Duration // of gossip
	grow, shrink   int           // servers
}

func TestChaos(t *testing.T) {
	form := chaosForm{servers: 3, sites: 200, every: time.Second, scrape: 2 * time.Second, lasts: 40 * time.Second, away: 30 * time.Second,
		copyAge: time.Minute, interval: time.Second, grow: 6, shrink: 2}
	without := []string{"rolling", "kills", "partitions", "lose one away", "lose all away", "old copy away", "damage away", "swap"}
	switch *chaosFlag {
	case "full":
	case "short":
		form = chaosForm{servers: 3, sites: 40, every: time.Second, scrape: time.Second, lasts: 8 * time.Second, away: 5 * time.Second,
			copyAge: 4 * time.Second, interval: 300 * time.Millisecond, grow: 3, shrink: 2}
		without = []string{"kills", "lose all away", "damage away"}
	default:
		t.Skip("run by make test-chaos")
	}
	seed := testSeed(t, 0)
	fmt.Printf("chaos: %d servers, %d sites of %d series that push every %v, scrapes every %v, SEED=%d\n", form.servers, form.sites, chaosSeries, form.every, form.scrape, seed)
	chaosNetwork(t, max(form.servers, form.grow))
	for _, row := range chaosRows() {
		if row.long && *chaosFlag == "short" {
			continue // another row does as much
		}
		t.Run(strings.ReplaceAll(row.name, " ", "-"), func(t *testing.T) { chaosWithClients(t, form, row, seed) })
	}
	for _, row := range chaosRows() {
		for _, name := range without {
			if name == row.name {
				t.Run("without-client-"+strings.ReplaceAll(row.name, " ", "-"), func(t *testing.T) { chaosWithoutClients(t, form, row, seed) })
			}
		}
	}
}

// chaosWithoutClients does one row to servers whose sites push as curl does. A sample that
// was answered 200 is on one server's disk: what becomes of that disk becomes of the sample.
// A lost disk is not noticed by anyone; what damage took is logged.
func chaosWithoutClients(t *testing.T, form chaosForm, row chaosRow, seed uint64) {
	r := row.run(t, form, seed, (*chaosRig).load)
	lasted := time.Since(r.begin)
	r.acked()
	acked, refused := 0, []string{}
	for _, site := range r.sites {
		acked += len(site.acked) * chaosSeries
		refused = append(refused, site.refused...)
	}
	loses := strings.HasPrefix(row.name, "lose") || strings.HasPrefix(row.name, "old copy") || strings.HasPrefix(row.name, "damage")
	var d chaosResult
	var err error
	before := chaosResult{samples: -1}
	for begin, same := time.Now(), 0; time.Since(begin) < chaosPatience && same < 3; time.Sleep(form.scrape) {
		d, err = r.compare(func(site int) map[int64]bool { return r.sites[site].acked })
		if err == nil && d == before {
			same++
		} else {
			same = 0
		}
		if before = d; err == nil && d.missing == 0 {
			break
		}
	}
	said := 0
	for _, s := range r.running() {
		said += strings.Count(s.p.text(), "level=ERROR")
	}
	_, bad := r.central.log()
	fmt.Printf("%-14s %3.0f s without clients: samples answered 200 %d, missing %d, duplicate %d, never answered 200 %d; errors that servers logged %d\n",
		row.name+":", lasted.Seconds(), acked, d.missing, d.twice, d.strange, said)
	// A sample may be held whose answer was lost; it comes, though the site tries again.
	if err != nil || acked == 0 || d.twice > 0 || !loses && d.missing > 0 || len(refused) > 0 || len(bad) > 0 || strings.HasPrefix(row.name, "damage") && d.missing > 0 && said == 0 {
		for _, s := range r.running() {
			text := s.p.text()
			t.Logf("%s said:\n%s", s.name, text[max(0, len(text)-6000):])
		}
		t.Errorf("%s without clients (SEED=%d): %+v, %v, refused %v; Prometheus said %s", row.name, seed, d, err, refused[:min(3, len(refused))], strings.Join(bad, ""))
	}
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
