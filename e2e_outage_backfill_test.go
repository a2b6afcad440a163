package main

// Tests of filling gaps with real processes: after an outage of clients or of their sources, the central
// Prometheus has the samples that the missing scrapes would have given, each exactly once. The sources
// are real Prometheus and VictoriaMetrics. "make test-outage" runs these tests.

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"math/rand/v2"
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

// outage causes an outage. A series of the exporter ends and another one begins and ends in it.
func (r *backfillRig) outage(length time.Duration, down, up func(*backfillSite)) {
	for _, s := range r.sites {
		down(s)
	}
	for _, phase := range []string{"during", "after"} {
		time.Sleep(length / 3)
		r.exporter.setPhase(phase + time.Now().Format(" 15:04:05"))
	}
	time.Sleep(length - 2*(length/3))
	for _, s := range r.sites {
		up(s)
	}
}

// settled does the same as the method of a site, for all sites. A site with a fault takes no part in
// later steps, because its samples stay missing.
func (r *backfillRig) settled(name string, begin time.Time) {
	r.t.Helper()
	r.sites = slices.DeleteFunc(r.sites, func(s *backfillSite) bool { return !s.settled(name, begin) })
	if len(r.sites) == 0 {
		r.t.FailNow()
	}
}

// addOptionalSites adds the sites whose sources are programs that need not be installed. A skipped
// subtest names each program that is missing.
func (r *backfillRig) addOptionalSites(t *testing.T) {
	t.Run("victoria-metrics", func(sub *testing.T) {
		program, err := exec.LookPath("victoria-metrics")
		if err != nil {
			sub.Skip("left out: the source VictoriaMetrics: victoria-metrics is not in $PATH")
		}
		source := newBackfillVictoria(t, r.exporter, program, time.Second, map[string]string{"site": "victoria"})
		r.addSite(&backfillSite{id: "victoria", sources: []*backfillSource{source}}, r.server)
	})
	t.Run("prometheus 3", func(sub *testing.T) {
		program := os.Getenv("PROMETHEUS3")
		if program == "" {
			sub.Skip("left out: the source Prometheus 3: $PROMETHEUS3 does not name it")
		}
		source := newBackfillPrometheus(t, r.exporter, program, "/metrics", 5*time.Second, map[string]string{"site": "three", "dc": "third"})
		r.addSite(&backfillSite{id: "three", sources: []*backfillSource{source}}, r.server)
	})
}

// killClients kills clients at random moments, also while they start or fill gaps, and starts them
// again at once or later.
func (r *backfillRig) killClients(kills int) {
	rnd := rand.New(rand.NewPCG(testSeed(r.t, 0), 1))
	moment := func(most time.Duration) time.Duration { return time.Duration(rnd.Int64N(int64(most))) }
	for i := range kills {
		s := r.sites[i%min(2, len(r.sites))]
		if rnd.IntN(2) == 0 {
			time.Sleep(moment(500 * time.Millisecond))
		} else {
			time.Sleep(moment(4 * time.Second))
		}
		s.client.end(syscall.SIGKILL)
		if rnd.IntN(3) > 0 {
			time.Sleep(moment(8 * time.Second))
		}
		s.start()
	}
}

// An outage of the client, of its source, or between both leaves no gap, no duplicate and no wrong
// sample at the center.
func TestOutageBackfill(t *testing.T) {
	outage, kills := 20*time.Second, 6
	if outageForm(t) {
		outage, kills = 10*time.Minute, 30
	}
	t.Parallel()
	r := newBackfillRig(t)
	west := map[string]string{"site": "west", "replica": "a"}
	east := map[string]string{"site": "east", "dc": "first"}
	r.addSite(&backfillSite{id: "west", sources: []*backfillSource{newBackfillPrometheus(t, r.exporter, "", "/metrics", time.Second, west)}}, r.server)
	r.addSite(&backfillSite{id: "east", sources: []*backfillSource{newBackfillPrometheus(t, r.exporter, "", "/metrics", 5*time.Second, east)}}, r.server)
	r.addOptionalSites(t)
	for _, s := range r.sites {
		s.start()
	}
	for _, s := range r.sites {
		s.ready()
	}
	r.settled("no outage", time.Now())

	begin := time.Now()
	signals := map[string]syscall.Signal{"west": syscall.SIGTERM}
	r.outage(outage, func(s *backfillSite) {
		sig, term := signals[s.id]
		if !term {
			sig = syscall.SIGKILL
		}
		s.client.end(sig)
	}, (*backfillSite).start)
	r.settled("client gone", begin)

	begin = time.Now()
	killed := func(s *backfillSite) bool { return s.id == "west" || s.id == "three" }
	r.outage(outage, func(s *backfillSite) {
		if killed(s) {
			s.samples() // keeps them
			s.sources[0].stop(syscall.SIGKILL)
		} else {
			s.links[0].set("refuse")
		}
	}, func(s *backfillSite) {
		if killed(s) {
			s.sources[0].start()
		} else {
			s.links[0].set("")
		}
	})
	r.settled("source SIGKILLed, or not reachable", begin)

	begin = time.Now()
	r.killClients(kills)
	r.settled("client SIGKILLed at random", begin)
}

// pushRecorder forwards pushes to a server, and counts the samples of accepted pushes that are older
// than a sample of the same series before.
type pushRecorder struct {
	t    *testing.T
	to   string
	addr string

	mu        sync.Mutex       // guards the fields below
	newest    map[string]int64 // by series
	samples   int
	backwards int
	example   string
}

func newPushRecorder(t *testing.T, to string) *pushRecorder {
	p := &pushRecorder{t: t, to: to, newest: map[string]int64{}}
	s := httptest.NewServer(p)
	t.Cleanup(s.Close)
	p.addr = s.Listener.Addr().String()
	return p
}

// ServeHTTP forwards a request.
func (p *pushRecorder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client is gone
	}
	req, err := http.NewRequest(r.Method, "http://"+p.to+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		p.t.Error(err)
		return
	}
	req.Header = r.Header
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for name, values := range resp.Header {
		w.Header()[name] = values
	}
	w.WriteHeader(resp.StatusCode)
	io.Copy(w, resp.Body)
	if resp.StatusCode != http.StatusOK || len(body) == 0 {
		return
	}
	z, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		p.t.Errorf("a push is not compressed: %v", err)
		return
	}
	text, err := io.ReadAll(z)
	if err != nil {
		p.t.Error(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line) // no label of the rig has a blank in its value
		if len(fields) != 3 {
			continue
		}
		at, err := strconv.ParseInt(fields[2], 10, 64)
		if err != nil {
			p.t.Errorf("line %q of a push: %v", line, err)
		}
		p.samples++
		if at < p.newest[fields[0]] {
			p.backwards++
			p.example = fmt.Sprintf("%s at %d after %d", fields[0], at, p.newest[fields[0]])
		}
		p.newest[fields[0]] = max(at, p.newest[fields[0]])
	}
}

// check prints and checks what the recorder counted.
func (p *pushRecorder) check(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Printf("backfill: %-44s samples %6d, older than one before %d\n", name+", pushes without filling", p.samples, p.backwards)
	if p.backwards > 0 || p.samples == 0 {
		p.t.Errorf("%s: of %d samples %d are older than one of the same series before: %s", name, p.samples, p.backwards, p.example)
	}
}

// A client with two replicas as sources goes on with the other one when one fails, although the other
// one is 30 s behind, and back. No series is doubled, and nothing is missing that one of them has.
// Without filling, the times of a series never run backwards.
func TestOutageBackfillReplicas(t *testing.T) {
	outage := 40 * time.Second
	if outageForm(t) {
		outage = 5 * time.Minute
	}
	t.Parallel()
	const behind = "/ago?s=30"
	r := newBackfillRig(t)
	a := newBackfillPrometheus(t, r.exporter, "", "/ago?s=0", time.Second, map[string]string{"site": "pair", "replica": "a"})
	b := newBackfillPrometheus(t, r.exporter, "", behind, time.Second, map[string]string{"site": "pair", "replica": "b"})
	pushes := newPushRecorder(t, r.server)
	pair := r.addSite(&backfillSite{id: "pair", sources: []*backfillSource{a, b}, match: "backfill_.+", elide: "replica"}, r.server)
	live := r.addSite(&backfillSite{id: "live", sources: []*backfillSource{a, b}, match: "backfill_.+", elide: "replica", args: []string{"--backfill", "0"}}, pushes.addr)
	for _, s := range r.sites {
		s.start()
	}
	for _, s := range r.sites {
		s.ready()
	}
	pair.settled("replicas", time.Now())

	// The function keep reads the samples of both replicas, before one of them ends.
	keep := func() {
		for _, s := range r.sites {
			s.samples()
		}
	}
	begin := time.Now()
	keep()
	a.stop(syscall.SIGKILL)
	time.Sleep(outage)
	r.exporter.freeze(behind)
	eventually(t, "B scrapes no more samples", func() bool {
		got, _, err := readSeries(b.addr, "up[90s]", func(map[string]string) {})
		for _, series := range got {
			newest := int64(0)
			for at := range series {
				newest = max(newest, at)
			}
			if err == nil && series[newest] == 0 {
				return true
			}
		}
		return false
	})
	pair.settled("replica A SIGKILLed, B is 30 s behind", begin)

	begin = time.Now()
	keep()
	b.stop(syscall.SIGKILL)
	a.start()
	time.Sleep(outage / 3)
	pair.settled("replica B SIGKILLed, A is back", begin)
	pushes.check("replicas")
	d, err := live.compare(live.from) // samples of the changes are missing without filling
	if err != nil || !d.whole() {
		t.Errorf("without filling: the center has %d samples, duplicate %d, wrong %d, %v:\n%s", d.samples, d.twice, d.wrong, err, strings.Join(d.examples, "\n"))
	}
}

const (
	hourFamilies = 100  // families of metrics of TestOutageBackfillHour
	hourSeries   = 1000 // series of each family
)

// writeHour writes an OpenMetrics file with a sample of every series each minute. The samples are from
// before an hour ago until some minutes ahead, so that a Prometheus with this data has new samples.
func writeHour(t *testing.T, path string, first time.Time) {
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := bufio.NewWriterSize(f, 1<<20)
	for family := range hourFamilies {
		for n := range hourSeries {
			for minute := range 85 {
				at := first.Unix() + int64(minute)*60
				fmt.Fprintf(w, "hour_metric_%d{family=\"%d\",n=\"%d\",instance=\"10.0.0.1:9100\",job=\"node\"} %d %d\n", family, family, n, at+int64(n), at)
			}
		}
	}
	fmt.Fprintln(w, "# EOF")
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// outageCPU returns the CPU time that a process has used, or 0 if the system is not Linux.
func outageCPU(pid int) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// After an hour without scrapes, a client fills the gap of a source with 100,000 series. The test prints
// the client's peak memory, the time, and the CPU time of the source.
func TestOutageBackfillHour(t *testing.T) {
	if !outageForm(t) {
		t.Skip("left out: an hour of 100,000 series is in the full form only")
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("left out: promtool, which makes the data, is not in $PATH")
	}
	r := newBackfillRig(t, "--limit-series", strconv.Itoa(2*hourFamilies*hourSeries))
	prometheus := newConfiguredPrometheus(t, "source", "global: {external_labels: {site: hour}}\n")
	now := time.Now()
	text := filepath.Join(r.dir, "hour.txt")
	writeHour(t, text, now.Add(-65*time.Minute))
	if out, err := exec.Command(promtool, "tsdb", "create-blocks-from", "openmetrics", text, filepath.Join(prometheus.dir, "data")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out[max(0, len(out)-2000):])
	}
	prometheus.start()
	source := &backfillSource{addr: prometheus.addr, external: map[string]string{"site": "hour"}, every: time.Minute}
	s := r.addSite(&backfillSite{id: "hour", sources: []*backfillSource{source}}, r.server)
	s.interval = time.Minute
	spool, err := OpenSpool(SpoolConfig{
		FS: DiskFS{}, Dir: filepath.Join(r.dir, "spool-hour"), ClusterID: "hour", Limit: 1 << 30, MaxAge: 2 * time.Hour, Now: func() Moment { return Moment{Wall: now.UnixMilli(), BootID: "test"} },
		OnError: func(err error) { t.Error(err) }, OnDrop: func(string, int, int) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	hourAgo := time.Now().Add(-time.Hour).UnixMilli()
	spool.SaveProgress(scrapeProgress{Last: hourAgo, Newest: hourAgo})
	if err := spool.Close(); err != nil || spool.Progress().Last != hourAgo {
		t.Fatal(spool.Progress(), err)
	}
	if _, err := os.Stat(filepath.Join(r.dir, "spool-hour", progressName)); err != nil {
		t.Fatal(err)
	}
	const selector = `{_id="hour",server=""}`
	sourceCPU, begin := outageCPU(prometheus.cmd.Process.Pid), time.Now()
	s.start()
	said := s.client.awaitWithin(9*time.Minute, `the samples of missing scrapes are fetched" (samples=\d+ took=\S+)`)
	filled := time.Since(begin)
	peak, clientCPU := statusBytes(s.client, "VmHWM"), outageCPU(s.client.cmd.Process.Pid)
	sourceCPU = outageCPU(prometheus.cmd.Process.Pid) - sourceCPU
	// The first interval after hourAgo, and those of the scrapes at the end, may have one sample or two.
	const fewest = 58
	var whole float64
	var wholeErr error
	for deadline := time.Now().Add(5 * time.Minute); whole < hourFamilies*hourSeries && time.Now().Before(deadline); time.Sleep(3 * time.Second) {
		var got map[string]map[int64]float64
		got, _, wholeErr = r.central.query(fmt.Sprintf(`count(count_over_time(%s[%ds]) >= %d)`, selector, (time.Now().Unix()-hourAgo/1000)+60, fewest), "")
		for _, v := range got[""] {
			whole = v
		}
	}
	_, bad := r.central.log()
	fmt.Printf("backfill: an hour of %d series: filled after %.0f s (%s), client: peak memory %d MiB, CPU %.0f s; source: CPU %.0f s; series at the center with at least %d samples %.0f, after %.0f s\n",
		hourFamilies*hourSeries, filled.Seconds(), said, peak>>20, clientCPU.Seconds(), sourceCPU.Seconds(), fewest, whole, time.Since(begin).Seconds())
	if whole != hourFamilies*hourSeries || len(bad) > 0 {
		t.Errorf("series with at least %d samples: got %v, %v, want %d; faults in the log of Prometheus: %s", fewest, whole, wholeErr, hourFamilies*hourSeries, strings.Join(bad, ""))
	}
}
