package main

// The report of TestHostile: what was seen of each attack, the table of all attacks, and the faults.
// The functions that decide whether something is a fault have no access to the rig, and have tests
// of their own here.

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"
)

// attackRow is what was seen of one attack. Maps without another explanation have the names of
// servers as keys.
type attackRow struct {
	name               string
	control            bool      // no attack, but the load to which attacks are compared
	from, until        time.Time // the period of the row, without its end: from the beginning of the attack to the next period
	quiet, attack, end time.Time // when the quiet phase and the attack began, and when the attack ended
	restarted          string    // the server that is restarted in both phases, or ""
	result             attackResult
	calmly, during     []time.Duration       // durations of the measured site's pushes in the quiet phase and during the attack
	refused            map[string]int        // number of refused pushes of well-behaved sites in the period, by status
	failed             []error               // errors of the pushes of well-behaved sites in the period that got no answer
	reconnected        int                   // how often the measured site had to open the connection that it keeps, during the attack
	before, peak       map[string]int64      // resident memory in bytes: before the attack, and its peak until the next attack
	lines              map[string]int        // lines logged during the attack
	up                 map[string][]float64  // values of the metric up in the period, by time
	samples            map[string]outageDiff // samples in the period, by well-behaved site
}

// period returns a PromQL expression for all samples of selector in the period of a row.
func (row *attackRow) period(selector string) string {
	return fmt.Sprintf("%s[%dms] @ %.3f", selector, row.until.Sub(row.from).Milliseconds()+1, float64(row.until.UnixMilli())/1000)
}

// addFailures records the pushes that were refused or failed.
func (row *attackRow) addFailures(pushes []attackPush) {
	row.refused, row.failed = map[string]int{}, nil
	for _, p := range pushes {
		switch {
		case p.err != nil:
			row.failed = append(row.failed, p.err)
		case p.refused != "":
			row.refused[p.refused]++
		}
	}
}

func tookOf(pushes []attackPush) (all []time.Duration) {
	for _, p := range pushes {
		all = append(all, p.took)
	}
	return all
}

// windowOf returns the scrapes of a period, without its end.
func windowOf(said []outageScrape, from, until time.Time) (within []outageScrape) {
	for _, s := range said {
		if s.t >= from.UnixMilli() && s.t < until.UnixMilli() {
			within = append(within, s)
		}
	}
	return within
}

// samplesWithin returns the samples of a period, without its end.
func samplesWithin(got map[string]map[int64]float64, from, until time.Time) map[string]map[int64]float64 {
	within := map[string]map[int64]float64{}
	for series, samples := range got {
		within[series] = maps.Clone(samples)
		maps.DeleteFunc(within[series], func(t int64, _ float64) bool { return t < from.UnixMilli() || t >= until.UnixMilli() })
	}
	return within
}

// slowest returns the quantile q of durations, or 0 if there are none.
func slowest(all []time.Duration, q float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	return quantile(all, q)
}

// faults returns what must not have happened in a row.
func (row *attackRow) faults() (faults []string) {
	add := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if row.result.Tries == 0 && !row.control {
		add("the attacker did nothing")
	}
	for answer, n := range row.result.Answers {
		if len(answer) != 3 && answer != attackNoAnswer {
			add("the attacker counts %d times %q", n, answer)
		}
	}
	if len(row.calmly) == 0 || len(row.during) == 0 {
		add("the well-behaved site made %d pushes in the quiet phase and %d during the attack, want some in both", len(row.calmly), len(row.during))
	}
	if len(row.refused) > 0 {
		add("pushes of well-behaved sites were refused: %v", row.refused)
	}
	if len(row.failed) > 0 {
		add("%d pushes of well-behaved sites got no answer, the first: %v", len(row.failed), row.failed[0])
	}
	for _, server := range slices.Sorted(maps.Keys(row.peak)) {
		if row.peak[server] == 0 || row.peak[server] > attackMemory {
			add("server %s: peak memory of %d MiB, and %d MiB before the attack, want at most %d MiB", server, row.peak[server]>>20, row.before[server]>>20, attackMemory>>20)
		}
		if limit := attackLogLines + int(attackLogRate*row.end.Sub(row.attack).Seconds()); row.lines[server] > limit {
			add("server %s: %d lines logged during the attack, want at most %d", server, row.lines[server], limit)
		}
		down := 0
		for _, v := range row.up[server] {
			if v != 1 {
				down++
			}
		}
		if n := len(row.up[server]); n == 0 || down > 0 && server != row.restarted {
			add("server %s: %d of %d scrapes failed", server, down, n)
		}
	}
	for _, site := range slices.Sorted(maps.Keys(row.samples)) {
		if d := row.samples[site]; !d.whole() {
			add("Prometheus does not have every sample of site %s exactly once: %+v", site, d)
		}
	}
	return faults
}

// perServer joins a text for each server of a row.
func (row *attackRow) perServer(text func(server string) string) string {
	var all []string
	for _, server := range slices.Sorted(maps.Keys(row.peak)) {
		all = append(all, text(server))
	}
	return strings.Join(all, ", ")
}

// attackColumns are the columns of the table of attacks. Those after "log lines" are known only at
// the end of the test.
var attackColumns = []string{"attack", "tries", "pushes", "p50 ms", "p99 ms", "p99 ratio", "worst ms", "refused", "failed", "reconnects",
	"peak MiB a, b, c", "log lines a, b, c", "min up a, b, c", "scrapes a, b, c", "samples", "missing", "doubled", "wrong"}

// p99Ratio returns the 99th percentile of the durations of pushes during the attack, divided by that
// of the quiet phase.
func (row *attackRow) p99Ratio() float64 {
	return float64(slowest(row.during, .99)) / float64(max(1, slowest(row.calmly, .99)))
}

// cells returns the text of each column for a row.
func (row *attackRow) cells() []string {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/float64(time.Millisecond)) }
	both := func(q float64) string { return ms(slowest(row.calmly, q)) + " / " + ms(slowest(row.during, q)) }
	refused := "0"
	if len(row.refused) > 0 {
		refused = strings.TrimPrefix(fmt.Sprint(row.refused), "map")
	}
	var sum outageDiff
	for _, d := range row.samples {
		sum.samples, sum.missing, sum.twice, sum.wrong = sum.samples+d.samples, sum.missing+d.missing, sum.twice+d.twice, sum.wrong+d.wrong
	}
	return []string{
		row.name, fmt.Sprint(row.result.Tries), fmt.Sprintf("%d / %d", len(row.calmly), len(row.during)), both(.5), both(.99), fmt.Sprintf("%.1f", row.p99Ratio()), both(1),
		refused, fmt.Sprint(len(row.failed)), fmt.Sprint(row.reconnected),
		row.perServer(func(s string) string { return fmt.Sprintf("%d / %d", row.before[s]>>20, row.peak[s]>>20) }),
		row.perServer(func(s string) string { return fmt.Sprint(row.lines[s]) }),
		row.perServer(func(s string) string {
			if len(row.up[s]) == 0 {
				return "?"
			}
			return fmt.Sprint(slices.Min(row.up[s]))
		}),
		row.perServer(func(s string) string { return fmt.Sprint(len(row.up[s])) }),
		fmt.Sprint(sum.samples), fmt.Sprint(sum.missing), fmt.Sprint(sum.twice), fmt.Sprint(sum.wrong),
	}
}

// String returns the columns of a row that are known at the end of its attack.
func (row *attackRow) String() string {
	cells := row.cells()
	text := cells[0] + ":"
	for i := range slices.Index(attackColumns, "min up a, b, c") - 1 {
		text += fmt.Sprintf(" %s %s;", attackColumns[i+1], cells[i+1])
	}
	return fmt.Sprintf("%s answers %s", text, strings.TrimPrefix(fmt.Sprint(row.result.Answers), "map"))
}

// printAttacks prints the table of attacks. Cells with a slash have the values of the quiet phase
// and of the attack.
func printAttacks(w io.Writer, rows []*attackRow) {
	table := tabwriter.NewWriter(w, 0, 0, 1, ' ', tabwriter.Debug)
	fmt.Fprintln(table, strings.Join(attackColumns, "\t"))
	var slow []string
	for _, row := range rows {
		fmt.Fprintln(table, strings.Join(row.cells(), "\t"))
		if row.p99Ratio() > attackSlower {
			slow = append(slow, fmt.Sprintf("%s (%.1f)", row.name, row.p99Ratio()))
		}
	}
	table.Flush()
	fmt.Fprintf(w, "goal: a p99 ratio of at most %d; more: %s\n", attackSlower, cmp.Or(strings.Join(slow, ", "), "none"))
}

// goodAttackRow returns a row without faults. Its figures are at their limits.
func goodAttackRow() *attackRow {
	at := time.UnixMilli(1_000_000)
	row := &attackRow{
		name: "x", from: at, quiet: at, attack: at.Add(2 * time.Second), end: at.Add(4 * time.Second), until: at.Add(5 * time.Second),
		result: attackResult{Tries: 1, Answers: map[string]int{"401": 1, attackNoAnswer: 1}}, refused: map[string]int{},
		calmly: []time.Duration{time.Millisecond}, during: []time.Duration{7 * time.Millisecond},
		peak: map[string]int64{"a": 1 << 20, "b": attackMemory}, lines: map[string]int{"a": 0, "b": attackLogLines + 2*attackLogRate},
		up: map[string][]float64{"a": {1, 1}, "b": {1}}, samples: map[string]outageDiff{"good": {samples: 5}, "client": {samples: 1}},
	}
	return row
}

// Each kind of fault in a row is reported, and a row without faults has none.
func TestHostileFaults(t *testing.T) {
	for name, test := range map[string]struct {
		change func(row *attackRow)
		want   string // part of the only fault, or "" for no fault
	}{
		"nothing":           {func(row *attackRow) {}, ""},
		"restarted":         {func(row *attackRow) { row.restarted, row.up["b"] = "b", []float64{1, 0, 1} }, ""},
		"other restarted":   {func(row *attackRow) { row.restarted, row.up["b"] = "a", []float64{1, 0, 1} }, "server b: 1 of 3 scrapes failed"},
		"never up":          {func(row *attackRow) { row.restarted, row.up["b"] = "b", nil }, "server b: 0 of 0 scrapes"},
		"one scrape failed": {func(row *attackRow) { row.up["a"] = []float64{1, 0, 1} }, "server a: 1 of 3 scrapes failed"},
		"idle attacker":     {func(row *attackRow) { row.result.Tries = 0 }, "the attacker did nothing"},
		"let in":            {func(row *attackRow) { row.result.Answers[attackLetIn] = 1 }, "let in"},
		"no pushes":         {func(row *attackRow) { row.during = nil }, "1 pushes in the quiet phase and 0"},
		"no quiet pushes":   {func(row *attackRow) { row.calmly, row.during = nil, row.during[:0] }, "0 pushes in the quiet phase and 0"},
		"refused":           {func(row *attackRow) { row.addFailures([]attackPush{{}, {refused: "503"}}) }, "refused: map[503:1]"},
		"failed":            {func(row *attackRow) { row.addFailures([]attackPush{{}, {err: io.EOF}}) }, "1 pushes of well-behaved sites got no answer, the first: EOF"},
		"accepted":          {func(row *attackRow) { row.addFailures([]attackPush{{took: time.Second}}) }, ""},
		"memory":            {func(row *attackRow) { row.peak["b"]++ }, "server b: peak memory"},
		"ended":             {func(row *attackRow) { row.peak["b"] = 0 }, "server b: peak memory"},
		"lines":             {func(row *attackRow) { row.lines["b"]++ }, "server b: 41 lines"},
		"missing":           {func(row *attackRow) { row.samples["client"] = outageDiff{samples: 4, missing: 1} }, "site client"},
		"doubled":           {func(row *attackRow) { row.samples["good"] = outageDiff{samples: 4, twice: 1} }, "site good"},
		"wrong":             {func(row *attackRow) { row.samples["good"] = outageDiff{samples: 4, wrong: 1} }, "site good"},
		"no samples":        {func(row *attackRow) { row.samples["good"] = outageDiff{} }, "site good"},
	} {
		row := goodAttackRow()
		test.change(row)
		got := row.faults()
		if test.want == "" && len(got) > 0 || test.want != "" && (len(got) != 1 || !strings.Contains(got[0], test.want)) {
			t.Errorf("%s: got faults %q, want one with %q", name, got, test.want)
		}
	}
}

// The samples and scrapes of a period include its begin and exclude its end, so that each belongs to
// the period of exactly one row.
func TestHostilePeriods(t *testing.T) {
	at := func(ms int64) time.Time { return time.UnixMilli(ms) }
	said := []outageScrape{{t: 9}, {t: 10}, {t: 19}, {t: 20}}
	if got := windowOf(said, at(10), at(20)); len(got) != 2 || got[0].t != 10 || got[1].t != 19 {
		t.Errorf("windowOf: got %v, want the times 10 and 19", got)
	}
	all := map[string]map[int64]float64{"0": {9: 1, 10: 2, 19: 3, 20: 4}, "1": {20: 5}}
	if got := fmt.Sprint(samplesWithin(all, at(10), at(20))); got != "map[0:map[10:2 19:3] 1:map[]]" {
		t.Errorf("samplesWithin: got %s", got)
	}
	row := &attackRow{from: at(1_000), until: at(2_500)}
	if got, want := row.period("x"), "x[1501ms] @ 2.500"; got != want {
		t.Errorf("period: got %q, want %q", got, want)
	}
}

// parsePeak reads the peak memory of a process, and slowest finds the slow pushes.
func TestHostileFigures(t *testing.T) {
	if got := parsePeak("Name:\tx\nVmPeak:\t  9 kB\nVmHWM:\t    12 kB\nVmRSS:\t 3 kB\n"); got != 12<<10 {
		t.Errorf("parsePeak: got %d, want %d", got, 12<<10)
	}
	if got := parsePeak("Name:\tx\nState:\tZ (zombie)\n"); got != 0 {
		t.Errorf("parsePeak of a process that has ended: got %d, want 0", got)
	}
	var all []time.Duration
	for i := range 1000 {
		all = append(all, time.Duration(1000-i))
	}
	if p50, p99, worst := slowest(all, .5), slowest(all, .99), slowest(all, 1); p50 != 501 || p99 != 990 || worst != 1000 {
		t.Errorf("slowest of 1 to 1000: got %d, %d and %d, want 501, 990 and 1000", p50, p99, worst)
	}
	if got := slowest(all[:30], .99); got != 1000 {
		t.Errorf("99th percentile of few durations: got %d, want the worst, 1000", got)
	}
	if got := slowest(nil, .99); got != 0 {
		t.Errorf("slowest of nothing: got %d, want 0", got)
	}
	row := &attackRow{}
	row.addFailures([]attackPush{{err: errors.New("x")}, {refused: "503"}, {refused: "503"}, {refused: "429"}, {}})
	if got := fmt.Sprint(row.refused, row.failed); got != "map[429:1 503:2] [x]" {
		t.Errorf("addFailures: got %s", got)
	}
}
