package main

// The rig of TestOutageBackfill and its like: an exporter whose values are functions of time, sources
// that scrape the exporter, sites with a client, and a comparison of all samples of the sources with
// all samples of the central Prometheus. A test checks the comparison.

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// backfillExporter is a scrape target. All values are the time in whole seconds since the epoch, except
// those of backfill_special. /metrics has the current values without timestamps. /ago?s=N has the values of N
// seconds ago with timestamps of whole seconds.
type backfillExporter struct {
	addr string

	mu     sync.Mutex // guards the fields below
	phase  string     // label of a series that ends when phase changes
	frozen string     // path that fails; "" = none
}

func newBackfillExporter(t *testing.T) *backfillExporter {
	e := &backfillExporter{phase: "begin"}
	s := httptest.NewServer(e)
	t.Cleanup(s.Close)
	e.addr = s.Listener.Addr().String()
	return e
}

// freeze makes scrapes of a path with its query fail. "" ends this.
func (e *backfillExporter) freeze(path string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.frozen = path
}

func (e *backfillExporter) setPhase(phase string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.phase = phase
}

// ServeHTTP answers a scrape.
func (e *backfillExporter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	phase, frozen := e.phase, e.frozen
	e.mu.Unlock()
	if r.URL.RequestURI() == frozen {
		http.Error(w, "frozen", http.StatusServiceUnavailable)
		return
	}
	at, stamp := time.Now().UnixMilli(), ""
	if r.URL.Path == "/ago" {
		ago, _ := strconv.ParseInt(r.URL.Query().Get("s"), 10, 64)
		at = (at/1000 - ago) * 1000
		stamp = fmt.Sprint(" ", at)
	}
	now := float64(at / 1000) // VictoriaMetrics does not keep all digits of other numbers
	add := func(b []byte, series string, v float64) []byte {
		return append(append(append(append(b, series...), ' '), strconv.FormatFloat(v, 'f', -1, 64)...), stamp+"\n"...)
	}
	var b []byte
	for k := range 10 {
		b = add(b, fmt.Sprintf("backfill_total{k=\"%d\"}", k), now)
	}
	b = add(b, `backfill_own{site="own",dc="own"}`, now) // labels of the same names as external labels
	for _, le := range []string{"0.1", "1", "+Inf"} {
		b = add(b, `backfill_seconds_bucket{le="`+le+`"}`, now)
	}
	b = add(add(b, "backfill_seconds_sum", now), "backfill_seconds_count", now)
	changing := math.NaN()
	if at/1000%2 == 0 {
		changing = now
	}
	for kind, v := range map[string]float64{"nan": math.NaN(), "inf": math.Inf(1), "-inf": math.Inf(-1), "changing": changing} {
		b = add(b, `backfill_special{kind="`+kind+`"}`, v)
	}
	if stamp == "" { // Prometheus writes no stale marker for series with timestamps
		b = add(b, `backfill_phase{phase="`+phase+`"}`, now)
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	w.Write(b)
}

// backfillSource is a process that scrapes the exporter and serves /federate and /api/v1/query.
type backfillSource struct {
	addr     string
	external map[string]string // labels that /federate adds
	start    func()
	stop     func(syscall.Signal)
	every    time.Duration // between its scrapes
	noNaN    bool          // all NaN of the query API are stale markers
}

// backfillConfig is the configuration of a source that scrapes path of the exporter.
func backfillConfig(e *backfillExporter, path string, every time.Duration, external map[string]string) string {
	labels, _ := json.Marshal(external) // JSON is YAML
	page, query, _ := strings.Cut(path, "?s=")
	params := ""
	if query != "" {
		params = "\n  params: {s: ['" + query + "']}"
	}
	return fmt.Sprintf(`global: {scrape_interval: %v, scrape_timeout: 1s, external_labels: %s}
scrape_configs:
- job_name: exporter
  metrics_path: %s%s
  static_configs: [{targets: ['%s']}]
`, every, labels, page, params, e.addr)
}

// newBackfillPrometheus starts a Prometheus as source. program "" is the one that outageProgram finds.
func newBackfillPrometheus(t *testing.T, e *backfillExporter, program, path string, every time.Duration, external map[string]string) *backfillSource {
	p := newConfiguredPrometheus(t, "source", backfillConfig(e, path, every, external))
	if program != "" {
		p.program = program
	}
	p.start()
	return &backfillSource{addr: p.addr, external: external, start: p.start, stop: p.stop, every: every}
}

// newBackfillVictoria starts a VictoriaMetrics as source. It stores external labels with the samples.
// The only NaN that it stores are stale markers. Its query API returns them, its /federate does not.
func newBackfillVictoria(t *testing.T, e *backfillExporter, program string, every time.Duration, external map[string]string) *backfillSource {
	dir := t.TempDir()
	config := filepath.Join(dir, "scrape.yml")
	if err := os.WriteFile(config, []byte(backfillConfig(e, "/metrics", every, external)), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &backfillSource{addr: freeAddr(t), every: every, noNaN: true}
	var p *process
	s.start = func() {
		p = startCommand(t, exec.Command(program, "-promscrape.config="+config, "-storageDataPath="+filepath.Join(dir, "data"), "-httpListenAddr="+s.addr))
	}
	s.stop = func(sig syscall.Signal) { p.end(sig) }
	s.start()
	return s
}

// backfillSeries has samples by series and by time in ms since the epoch. A series is the text of its
// sorted labels.
type backfillSeries map[string]map[int64]float64

// seriesText returns the key of a series in backfillSeries.
func seriesText(labels map[string]string) string {
	var b []byte
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		if labels[name] != "" {
			b = fmt.Appendf(b, "%s=%q,", name, labels[name])
		}
	}
	return string(b)
}

// readSeries returns the samples of a range selector. The function relabel changes the labels of each
// series. twice counts the additional samples with the same series and time.
func readSeries(addr, selector string, relabel func(map[string]string)) (got backfillSeries, twice int, err error) {
	results, err := queryPrometheus(addr, selector)
	if err != nil {
		return nil, 0, err
	}
	got = backfillSeries{}
	for _, r := range results {
		relabel(r.Metric)
		key := seriesText(r.Metric)
		if got[key] == nil {
			got[key] = map[int64]float64{}
		}
		for _, v := range r.Values {
			seconds, _ := v[0].(float64)
			text, _ := v[1].(string)
			value, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return nil, 0, err
			}
			ms := int64(math.Round(seconds * 1000))
			if _, has := got[key][ms]; has {
				twice++
			}
			got[key][ms] = value
		}
	}
	return got, twice, nil
}

// backfillDiff compares the samples at the center with those of the source. Only the first faults of
// each kind are in examples.
type backfillDiff struct {
	samples, missing, twice, wrong int
	examples                       []string
}

// whole reports whether the center has what it must have, once, and nothing else.
func (d *backfillDiff) whole() bool { return d.samples > 0 && d.missing+d.twice+d.wrong == 0 }

func (d *backfillDiff) fault(n *int, format string, args ...any) {
	if *n++; *n <= 4 {
		d.examples = append(d.examples, fmt.Sprintf(format, args...))
	}
}

// backfillLimits says what compareBackfill tolerates. All times are in ms.
type backfillLimits struct {
	from, to        int64    // samples outside of this span may be missing
	interval, every int64    // time between scrapes of the client, and of the source
	copies          []string // names of labels that tell copies of a series apart
}

// compareBackfill compares the samples that the source has (want, with the labels that they must have
// at the center) with those at the center (got). The samples of a span are missing if the span between
// two neighbouring samples at the center is longer than 1.5 intervals of the client and one of the
// source. A span without samples of the source, such as an outage of the source, does not count.
func compareBackfill(want, got backfillSeries, limits backfillLimits) (d backfillDiff) {
	for key, series := range got {
		known := want[key] != nil
		for at, v := range series {
			w, has := want[key][at]
			switch {
			case !known && isCopy(key, want, got, limits.copies):
				d.fault(&d.twice, "duplicate: %s %d", key, at)
			case !has || w != v && !(math.IsNaN(w) && math.IsNaN(v)):
				d.fault(&d.wrong, "wrong: %s %v at %d, want %v %t", key, v, at, w, has)
			case !plausible(key, at, v):
				d.fault(&d.wrong, "wrong: %s %v at %d, which the exporter did not say", key, v, at)
			default:
				d.samples++
			}
		}
	}
	for key, series := range want {
		times := slices.Sorted(maps.Keys(series))
		first, counted := int64(-1), false // time of the first sample that the center lacks, and whether this span was counted
		for i, at := range times {
			if _, has := got[key][at]; has || at < limits.from || at >= limits.to {
				first, counted = -1, false
				continue
			}
			if first < 0 {
				first = at
			}
			end, last := at+limits.every, true // how long a scrape gives this sample
			if i+1 < len(times) && times[i+1]-at <= 2*limits.every {
				end, last = times[i+1], false
			}
			if end = min(end, limits.to); !counted && 2*(end-first) > 3*limits.interval+2*backfillSlack {
				counted = true
				d.fault(&d.missing, "missing: %s from %d until %d at least, %.1f s before the end", key, first, end, float64(limits.to-end)/1000)
			}
			if last {
				first, counted = -1, false
			}
		}
	}
	return d
}

// backfillSlack in ms is for the jitter of the scrapes of Prometheus.
const backfillSlack = 50

// isCopy reports whether another series at the center, which the source has, has the same labels but those
// named in copies.
func isCopy(key string, want, got backfillSeries, copies []string) bool {
	for other := range got {
		if want[other] != nil && withoutLabels(other, copies) == withoutLabels(key, copies) {
			return true
		}
	}
	return false
}

// withoutLabels returns the key of a series without the named labels.
func withoutLabels(key string, names []string) string {
	var kept []string
	for _, pair := range strings.Split(key, ",") { // no label of the rig has a comma in its value
		if name, _, _ := strings.Cut(pair, "="); !slices.Contains(names, name) {
			kept = append(kept, pair)
		}
	}
	return strings.Join(kept, ",")
}

// plausible reports whether the exporter gave a value at about the time ms. It returns true for other
// series, and for special values.
func plausible(key string, ms int64, v float64) bool {
	if !strings.Contains(key, `__name__="backfill_`) || strings.Contains(key, "backfill_special") {
		return true
	}
	return math.Abs(v-float64(ms)/1000) <= 5
}

// compareBackfill notices spans that are missing, also at both ends and of a complete series, wrong
// samples and duplicates, and nothing else.
func TestBackfillComparison(t *testing.T) {
	const a, b = `__name__="backfill_total",_id="x",`, `__name__="up",_id="x",`
	series := func(begin, end, step int64) map[int64]float64 {
		s := map[int64]float64{}
		for at := begin; at <= end; at += step {
			s[at] = float64(at) / 1000
		}
		return s
	}
	remove := func(got backfillSeries, key string, from, to int64) {
		maps.DeleteFunc(got[key], func(at int64, _ float64) bool { return at >= from && at <= to })
	}
	for name, c := range map[string]struct {
		change                func(want, got backfillSeries)
		missing, twice, wrong int
	}{
		"all samples":          {func(_, got backfillSeries) {}, 0, 0, 0},
		"one in three":         {func(_, got backfillSeries) { got[a] = series(0, 60000, 3000) }, 0, 0, 0},
		"one in five":          {func(_, got backfillSeries) { got[a] = series(0, 60000, 5000) }, 12, 0, 0},
		"a span":               {func(_, got backfillSeries) { remove(got, b, 20000, 23000) }, 1, 0, 0},
		"a short span":         {func(_, got backfillSeries) { remove(got, b, 20000, 22000) }, 0, 0, 0},
		"begin":                {func(_, got backfillSeries) { remove(got, b, 0, 14000) }, 1, 0, 0},
		"before the begin":     {func(_, got backfillSeries) { remove(got, b, 0, 11000) }, 0, 0, 0},
		"end":                  {func(_, got backfillSeries) { remove(got, b, 46000, 60000) }, 1, 0, 0},
		"after the end":        {func(_, got backfillSeries) { remove(got, b, 48000, 60000) }, 0, 0, 0},
		"a series":             {func(_, got backfillSeries) { delete(got, b) }, 1, 0, 0},
		"end of a series":      {func(want, got backfillSeries) { remove(want, b, 30000, 60000); remove(got, b, 26000, 60000) }, 1, 0, 0},
		"outage of the source": {func(want, got backfillSeries) { remove(want, b, 20000, 40000); remove(got, b, 18000, 42000) }, 0, 0, 0},
		"span before an outage": {func(want, got backfillSeries) {
			remove(want, b, 20000, 40000)
			remove(got, b, 16000, 40000)
		}, 1, 0, 0},
		"other value":      {func(_, got backfillSeries) { got[b][20000] = 7 }, 0, 0, 1},
		"NaN":              {func(_, got backfillSeries) { got[b][20000] = math.NaN() }, 0, 0, 1},
		"NaN of both":      {func(want, got backfillSeries) { got[b][20000], want[b][20000] = math.NaN(), math.NaN() }, 0, 0, 0},
		"not exported":     {func(want, got backfillSeries) { got[a][20000], want[a][20000] = math.NaN(), math.NaN() }, 0, 0, 1},
		"other time":       {func(_, got backfillSeries) { got[b][20001] = 20 }, 0, 0, 1},
		"other series":     {func(_, got backfillSeries) { got["x"] = series(0, 2000, 1000) }, 0, 0, 3},
		"doubled series":   {func(_, got backfillSeries) { got[b+`replica="b",`] = series(0, 2000, 1000) }, 0, 3, 0},
		"relabeled series": {func(_, got backfillSeries) { got[b+`replica="b",`] = got[b]; delete(got, b) }, 1, 0, 61},
	} {
		want := backfillSeries{a: series(0, 60000, 1000), b: series(0, 60000, 1000)}
		got := backfillSeries{a: series(0, 60000, 1000), b: series(0, 60000, 1000)}
		c.change(want, got)
		d := compareBackfill(want, got, backfillLimits{10000, 50000, 2000, 1000, []string{"replica"}})
		if d.missing != min(c.missing, d.missing) || d.missing < min(1, c.missing) || d.twice != c.twice || d.wrong != c.wrong || d.whole() != (c.missing+c.twice+c.wrong == 0) {
			t.Errorf("%s: got %+v, whole %t; want missing %d, duplicate %d, wrong %d", name, d, d.whole(), c.missing, c.twice, c.wrong)
		}
	}
}

// backfillRig is an exporter, a server, and a central Prometheus. Sites can be added.
type backfillRig struct {
	t        *testing.T
	dir      string
	exporter *backfillExporter
	server   string // address for pushes
	internal string
	central  *outagePrometheus
	sites    []*backfillSite
}

// newBackfillRig starts the parts of a rig. args are more flags of the server.
func newBackfillRig(t *testing.T, args ...string) *backfillRig {
	r := &backfillRig{t: t, dir: t.TempDir(), exporter: newBackfillExporter(t)}
	mustTool(t, r.dir, "--mode", "keygen", "--keys", "keys")
	server := startServer(t, r.dir, append([]string{"--ratelimit", "0"}, args...)...)
	r.server, r.internal = server.await(externalAddr), server.await(internalAddr)
	r.central = newOutagePrometheus(t, r.internal, "central", outageWindow, outageTimeout)
	r.central.start()
	return r
}

// backfillSite is a client with one or several sources.
type backfillSite struct {
	r        *backfillRig
	id       string
	sources  []*backfillSource
	links    []*outageProxy // between the client and each source
	match    string         // name of metrics that the client pushes, as a regular expression
	elide    string         // label to remove; "" = none
	args     []string       // more flags of the client
	client   *process
	interval time.Duration                      // between scrapes of the client
	from     int64                              // the center must have the samples since this time, in ms
	kept     map[*backfillSource]backfillSeries // their samples when they were last read
}

// addSite adds a site, and makes its token for a server at the address to. Its client is not started.
func (r *backfillRig) addSite(s *backfillSite, to string) *backfillSite {
	r.t.Helper()
	s.r, s.interval, s.kept = r, 2*time.Second, map[*backfillSource]backfillSeries{}
	if s.match == "" {
		s.match = ".+"
	}
	for _, source := range s.sources {
		s.links = append(s.links, newOutageProxy(r.t, source.addr))
		eventually(r.t, "the source answers", func() bool {
			c, err := net.Dial("tcp", source.addr)
			if err != nil {
				return false
			}
			return c.Close() == nil
		})
	}
	token := mustTool(r.t, r.dir, "--mode", "token", "--keys", "keys", "--id", s.id, "--to", "http://"+to)
	if err := os.WriteFile(filepath.Join(r.dir, "token-"+s.id), []byte(token), 0o600); err != nil {
		r.t.Fatal(err)
	}
	r.sites = append(r.sites, s)
	return s
}

// start starts the client.
func (s *backfillSite) start() {
	args := []string{"--mode", "client", "--token-file", "token-" + s.id, "--scrape-interval", s.interval.String(), "--interval", s.interval.String(),
		"--spool-dir", "spool-" + s.id, "--listen", "", "--match", `{__name__=~"` + s.match + `"}`}
	for _, link := range s.links {
		args = append(args, "--from", "http://"+link.addr())
	}
	if s.elide != "" {
		args = append(args, "--elide-label", s.elide)
	}
	s.client = start(s.r.t, s.r.dir, append(args, s.args...)...)
}

// atCenter returns the samples of the site at the center. The metrics of the server about the site, which
// have the label server, are not among them.
func (s *backfillSite) atCenter() (got backfillSeries, twice int, err error) {
	return readSeries(s.r.central.addr, `{_id="`+s.id+`",server=""}[3h]`, func(map[string]string) {})
}

// ready waits until the center has samples of the site. From then on the samples must not be missing.
func (s *backfillSite) ready() {
	s.r.t.Helper()
	eventuallyWithin(s.r.t, outagePatience, 200*time.Millisecond, "the center has samples of "+s.id, func() bool {
		got, _, err := s.atCenter()
		exported := 0
		for key, series := range got {
			if strings.Contains(key, "backfill_total") {
				exported++
			}
			s.from = max(s.from, slices.Min(slices.Collect(maps.Keys(series))))
		}
		return err == nil && exported > 0
	})
}

// samples returns the samples of the sources, with the labels that they must have at the center. A
// source that does not run has the samples that it had when it was last read.
func (s *backfillSite) samples() backfillSeries {
	all := backfillSeries{}
	for _, source := range s.sources {
		got, _, err := readSeries(source.addr, `{__name__=~"`+s.match+`"}[3h]`, func(labels map[string]string) {
			for name, value := range source.external {
				if labels[name] == "" {
					labels[name] = value
				}
			}
			labels["_id"] = s.id
			delete(labels, s.elide)
		})
		if err == nil {
			s.kept[source] = got
		}
		for key, series := range s.kept[source] {
			if source.noNaN {
				maps.DeleteFunc(series, func(_ int64, v float64) bool { return math.IsNaN(v) })
			}
			if all[key] == nil {
				all[key] = map[int64]float64{}
			}
			maps.Copy(all[key], series)
		}
	}
	return all
}

// compare compares the samples at the center with those of the sources. to is the time in ms until
// which samples must not be missing.
func (s *backfillSite) compare(to int64) (d backfillDiff, err error) {
	got, twice, err := s.atCenter()
	if err != nil {
		return d, err
	}
	limits := backfillLimits{s.from, to, s.interval.Milliseconds(), 0, nil}
	for _, source := range s.sources {
		limits.every = max(limits.every, source.every.Milliseconds())
		limits.copies = slices.AppendSeq(limits.copies, maps.Keys(source.external))
	}
	d = compareBackfill(s.samples(), got, limits)
	d.twice += twice
	return d, nil
}

// settled waits until the center has all samples that the sources had before the call, and prints the
// result of the comparison. It reports an error, and returns false, unless the center has what it must
// have.
func (s *backfillSite) settled(name string, begin time.Time) (ok bool) {
	t := s.r.t
	t.Helper()
	up := time.Now()
	var d backfillDiff
	var err error
	for deadline := up.Add(outagePatience); time.Now().Before(deadline); time.Sleep(300 * time.Millisecond) {
		if d, err = s.compare(up.UnixMilli()); err == nil && (d.whole() || d.wrong+d.twice > 0) {
			break
		}
	}
	fmt.Printf("backfill: %-44s %4.0f s, whole after %5.1f s: samples %6d, missing %d, duplicate %d, wrong %d\n",
		name+", "+s.id, up.Sub(begin).Seconds(), time.Since(up).Seconds(), d.samples, d.missing, d.twice, d.wrong)
	if ok = err == nil && d.whole(); !ok {
		t.Errorf("%s, site %s: the center has %d samples, missing %d, duplicate %d, wrong %d, %v:\n%s", name, s.id, d.samples, d.missing, d.twice, d.wrong, err, strings.Join(d.examples, "\n"))
	}
	return ok
}
