package main

// TestHostile attacks a running ring, and checks what a well-behaved site, a real client and a real
// Prometheus see meanwhile. Each attack follows a quiet phase, to which it is compared. At the end
// the test prints a table. "make test-hostile" runs the test.

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var hostileFlag = flag.String("hostile", "", "run TestHostile: full or short, and after a colon the beginning of the names of the attacks to run")

const (
	// attackMemory is the highest peak of the resident memory of a server. With default limits a
	// server must be able to run on a host with 1 GiB of memory, of which the system needs a part.
	attackMemory = 700 << 20
	// A server may log attackLogLines in an attack, for a restart, and attackLogRate in each second.
	// At this rate an attack of a day writes about 200 MB, which a usual rotation of logs can hold.
	attackLogLines, attackLogRate = 20, 10
	// A push should take at most attackSlower times as long during an attack as in a quiet phase, at
	// the 99th percentile. The test prints the ratio but does not check it, because it depends on
	// the processors of the machine, which all servers, sites and attackers of the test share.
	attackSlower = 2
)

// attackForm has the durations of a form of TestHostile.
type attackForm struct {
	calm          time.Duration // pause before a quiet phase
	quiet, attack time.Duration // durations of the two phases
	arrive        time.Duration // how long samples may need until they are in Prometheus, at the end
}

// No attack makes a server refuse or lose a push of a well-behaved site, or lose a sample, or makes
// a scrape of Prometheus fail. No attack makes a server panic, use more than attackMemory, or log
// more than attackLogLines.
func TestHostile(t *testing.T) {
	var form attackForm
	name, only, _ := strings.Cut(*hostileFlag, ":")
	switch name {
	case "full":
		form = attackForm{calm: 10 * time.Second, quiet: 30 * time.Second, attack: 30 * time.Second, arrive: 2 * time.Minute}
	case "short":
		form = attackForm{calm: 200 * time.Millisecond, quiet: time.Second, attack: 4 * time.Second, arrive: 20 * time.Second}
	default:
		t.Skip("run by make test-hostile")
	}
	begin := time.Now()
	r := newAttackRig(t)
	fmt.Printf("hostile: all servers and sites run after %.1f s\n", time.Since(begin).Seconds())
	var rows []*attackRow
	last := &attackRow{peak: map[string]int64{}}
	for _, kind := range attackKinds() {
		if !strings.HasPrefix(kind.name, only) && !kind.control {
			continue
		}
		row := r.attacked(kind, form, last)
		if len(rows) == 0 {
			row.from = begin
		}
		last.until = row.from
		last = row
		rows = append(rows, row)
		fmt.Println("hostile:", row)
	}
	if len(rows) == 0 {
		t.Fatalf("no attack has a name that begins with %q", only)
	}
	r.stop()
	last.until = time.Now()
	r.readPeaks(last)
	r.compareAll(rows, time.Now().Add(form.arrive))
	printAttacks(os.Stdout, rows)
	for _, row := range rows {
		for _, fault := range row.faults() {
			t.Errorf("%s: %s", row.name, fault)
		}
	}
	for _, s := range r.servers() {
		r.checkLog(s)
		if attackPeak(s.p) == 0 {
			t.Errorf("server %s has ended", s.name)
		}
	}
	if _, bad := r.prometheus.log(); len(bad) > 0 {
		t.Errorf("faults in the log of Prometheus:\n%s", strings.Join(bad[:min(len(bad), 10)], ""))
	}
}

// attacked runs one attack: a pause, a quiet phase and the phase with the attack. The pause and the
// quiet phase still belong to the period of the row last. In the returned row, the period is not
// complete, and what only Prometheus knows is missing.
func (r *attackRig) attacked(kind attackKind, form attackForm, last *attackRow) *attackRow {
	r.t.Helper()
	row := &attackRow{name: kind.name, control: kind.control, before: map[string]int64{}, peak: map[string]int64{}, lines: map[string]int{}}
	groups := kind.groups(r)
	site := r.good
	var pushing sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if kind.authorized {
		site = r.authorized
		pushing.Go(func() { site.run(ctx) })
	}
	time.Sleep(form.calm)
	row.quiet = time.Now()
	r.phase(kind, form.quiet)
	r.readPeaks(last)
	for _, s := range r.servers() {
		row.before[s.name] = r.resetPeak(s)
		row.lines[s.name] = -s.lines()
	}
	kept := site.connections()
	row.attack = time.Now()
	p := startAttack(r.t, groups, kind.control)
	r.phase(kind, form.attack)
	row.result = p.end()
	row.end = time.Now()
	r.good.awaitBegun(r.t) // a push that an attack has delayed counts with its whole duration
	cancel()
	pushing.Wait()
	row.reconnected = site.connections() - kept
	r.readPeaks(row)
	for _, s := range r.servers() {
		row.lines[s.name] += s.lines()
	}
	row.from, row.until = row.attack, time.Now()
	if kind.restarts {
		row.restarted, row.from = r.b.name, row.quiet // the quiet phase has a restart, too
	}
	row.calmly, row.during = tookOf(site.between(row.quiet, row.attack)), tookOf(site.between(row.attack, row.end))
	r.addFailures(row)
	return row
}

// readPeaks records the peak memory of the servers since the last call of resetPeak.
func (r *attackRig) readPeaks(row *attackRow) {
	for _, s := range r.servers() {
		row.peak[s.name] = max(row.peak[s.name], s.peak, attackPeak(s.p))
	}
}

// addFailures records the pushes of well-behaved sites that were refused or failed in the period of
// a row.
func (r *attackRig) addFailures(row *attackRow) {
	row.addFailures(append(r.good.between(row.from, row.until), r.authorized.between(row.from, row.until)...))
}

// phase waits for a duration. If the attack needs it, it restarts server b meanwhile, and waits at
// least until the ring is whole again.
func (r *attackRig) phase(kind attackKind, lasts time.Duration) {
	r.t.Helper()
	end := time.After(lasts)
	if kind.restarts {
		r.restart(r.b)
		r.whole()
	}
	<-end
}

// compareAll fills in what is known when the periods of the rows are complete. It waits until
// Prometheus has every sample exactly once, but not longer than until deadline.
func (r *attackRig) compareAll(rows []*attackRow, deadline time.Time) {
	for ; ; time.Sleep(500 * time.Millisecond) {
		whole := true
		for _, row := range rows {
			good := r.compare(row, "hostile_total", r.good.id, attackSeries, r.good.all())
			client := r.compare(row, "outage_total", r.clientID, r.source.series, r.source.all())
			authorized := r.compare(row, "hostile_total", r.authorized.id, attackSeries, r.authorized.all())
			row.samples = map[string]outageDiff{"good": good, "client": client}
			if len(windowOf(r.authorized.all(), row.from, row.until)) > 0 {
				row.samples["authorized"] = authorized
			}
			for _, d := range row.samples {
				whole = whole && d.whole()
			}
		}
		if whole || time.Now().After(deadline) {
			break
		}
	}
	for _, row := range rows {
		r.addFailures(row)
		up, _, err := r.prometheus.query(row.period(`up{job="federate",_id=""}`), "instance")
		if err != nil {
			r.t.Errorf("%s: %v", row.name, err)
		}
		row.up = map[string][]float64{}
		for _, s := range r.servers() {
			for _, at := range slices.Sorted(maps.Keys(up[s.internal])) {
				row.up[s.name] = append(row.up[s.name], up[s.internal][at])
			}
		}
	}
}

// compare compares the samples of a site in the period of a row, which Prometheus has, with the
// samples that it must have.
func (r *attackRig) compare(row *attackRow, metric, id string, series int, said []outageScrape) outageDiff {
	got, twice, err := r.prometheus.query(row.period(fmt.Sprintf(`%s{_id="%s"}`, metric, id)), "k")
	if err != nil {
		r.t.Logf("%s: %v", row.name, err)
	}
	return compareOutage(windowOf(said, row.from, row.until), series, samplesWithin(got, row.from, row.until), twice)
}
