package main

// TestSpeed measures how much a server and a client take, and prints the figures as a table. Each
// figure that depends on the machine stands beside that of a yardstick, measured in turns on the
// same machine. Without the flag -speed, TestSpeed only checks at a tiny size that the rig works. No
// test compares a figure with a limit.

import (
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var speedFlag = flag.String("speed", "", "run TestSpeed: full or short; or TestSpeedScale: scale, and after a colon the number of sites")

// speedSizes has the sizes of TestSpeed by the value of -speed.
var speedSizes = map[string]speedSize{
	"": {
		runs: 1, series: 20, sites: 4, pushes: 2, newSites: 3, scrapeSamples: 60, scrapeSites: []int{3}, memorySites: 2, startSites: 3,
		idle: 10 * time.Millisecond, latency: 100 * time.Millisecond, latencySites: 5, latencyPushes: 100, clientSeries: 100,
	},
	"short": {
		runs: 3, series: 225, sites: 200, pushes: 3, newSites: 100, scrapeSamples: 50_000, scrapeSites: []int{1000}, memorySites: 300, startSites: 500,
		idle: 3 * time.Second, latency: 2 * time.Second, latencySites: 200, latencyPushes: 100, clientSeries: 20_000,
	},
	"full": {
		runs: 5, series: 225, sites: 300, pushes: 6, newSites: 300, scrapeSamples: 232_000, scrapeSites: []int{1000, 10_000}, memorySites: 2000, startSites: 10_000,
		idle: time.Minute, latency: 5 * time.Second, latencySites: 300, latencyPushes: 200, clientSeries: 100_000,
	},
}

// parseSpeed parses a value of -speed. kind is empty, full or short, or scale with a number of sites.
func parseSpeed(value string) (kind string, sites int, err error) {
	if _, ok := speedSizes[value]; ok {
		return value, 0, nil
	}
	kind, number, hasNumber := strings.Cut(value, ":")
	if !hasNumber {
		number = "20000"
	}
	if sites, err = strconv.Atoi(number); kind != "scale" || err != nil || sites < 1 {
		return "", 0, fmt.Errorf("-speed %q is unknown: use full, short, scale or scale:SITES", value)
	}
	return kind, sites, nil
}

// A value of -speed that no test knows is an error, so that no run measures something else or nothing.
func TestParseSpeed(t *testing.T) {
	for value, want := range map[string]string{
		"": " 0", "full": "full 0", "short": "short 0", "scale": "scale 20000", "scale:7": "scale 7",
		"shrt": "", "scale:": "", "scale:abc": "", "scale:0": "", "scale:-1": "", "short:7": "", "scales": "",
	} {
		kind, sites, err := parseSpeed(value)
		if got := fmt.Sprint(kind, " ", sites); (err == nil) != (want != "") || err == nil && got != want {
			t.Errorf("%q: got %q and the error %v, want %q", value, got, err, want)
		}
	}
}

// The rig measures every figure, and no push or scrape fails. With -speed, the table is printed.
func TestSpeed(t *testing.T) {
	if _, _, err := parseSpeed(*speedFlag); err != nil {
		t.Fatal(err)
	}
	size, ok := speedSizes[*speedFlag]
	if !ok {
		t.Skip("-speed " + *speedFlag + " is another test")
	}
	r := newSpeedRig(t, size)
	machine := describeMachine()
	r.measurePushes()
	r.measureNewSites()
	for _, sites := range r.scrapeSites {
		r.measureScrapes(sites)
	}
	r.measureMemory()
	r.measureStartAndIdle()
	r.measureClient()
	if want := 22 + 8*len(r.scrapeSites); len(r.rows) < want { // one row more where there is /proc
		t.Errorf("the table has %d rows, want at least %d", len(r.rows), want)
	}
	for _, row := range r.rows {
		if strings.Contains(fmt.Sprint(row), "NaN") || strings.Contains(fmt.Sprint(row), "Inf") {
			t.Errorf("a figure is missing: %+v", row)
		}
	}
	if *speedFlag != "" {
		fmt.Printf("%s at the beginning, %s at the end\n\n%s", machine, loadAverage(), r.table())
	}
}

// speedPushes has the kinds of pushes that TestSpeed measures.
var speedPushes = []struct {
	what      string
	yardstick string
	flushed   bool // the pushes do not name their scrapes, so the server syncs each to disk
	format    string
	encoding  string
	goal      string
}{
	{"protobuf", yardstickWrite, false, LoadProtobuf, LoadIdentity, "≥ 0.5"},
	{"protobuf, snappy", yardstickWrite, false, LoadProtobuf, LoadSnappy, "≥ 0.5"},
	{"protobuf, gzip", yardstickWrite, false, LoadProtobuf, LoadGzip, "≥ 0.6"},
	{"text", yardstickWrite, false, LoadText, LoadIdentity, "≥ 0.5"},
	{"text, gzip, as clients push", yardstickWrite, false, LoadText, LoadGzip, "≥ 0.6"},
	{"protobuf, synced to disk", yardstickSync, true, LoadProtobuf, LoadIdentity, "≥ 0.7"},
}

// measurePushes measures pushes of series that the server knows.
func (r *speedRig) measurePushes() {
	var proto, text []float64
	for _, inFlight := range []int{64, 4} {
		for i, c := range speedPushes {
			server, yardstick := r.startEmptyServer(), r.startYardstick(c.yardstick, "")
			configure := func(p *speedProcess) LoadConfig {
				cfg := r.load("known", r.sites, p)
				cfg.Format, cfg.Encoding, cfg.InFlight, cfg.Pushes = c.format, c.encoding, inFlight, r.pushes
				if c.flushed {
					cfg.FirstSpoolID = 0
				}
				return cfg
			}
			both := [2]*speedProcess{yardstick, server}
			cfgs := [2]LoadConfig{configure(yardstick), configure(server)}
			var figures [2][]float64
			for run := range r.runs + 1 {
				for _, j := range inTurn(run) {
					p := both[j]
					var report LoadReport
					cpu := p.cpuSeconds(func() { report = r.mustPush(cfgs[j]) })
					if run > 0 { // the first run makes the series known
						figures[j] = append(figures[j], float64(report.Samples)/cpu)
					}
				}
			}
			r.stop(both[:]...)
			r.add(fmt.Sprintf("samples per CPU second: %s, %d in flight", c.what, inFlight), figures[0], figures[1], formatCount, c.goal)
			if i == 0 {
				proto = figures[1]
			}
			if c.format == LoadText && c.encoding == LoadIdentity {
				text = figures[1]
			}
		}
		r.add(fmt.Sprintf("samples per CPU second: text, compared with protobuf, %d in flight", inFlight), proto, text, formatCount, "≥ 0.8")
	}
}

// measureNewSites measures the first push of sites.
func (r *speedRig) measureNewSites() {
	server, yardstick := r.startEmptyServer(), r.startYardstick(yardstickWrite, "")
	var figures [2][]float64
	for run := range r.runs {
		for _, j := range inTurn(run) {
			p := []*speedProcess{yardstick, server}[j]
			cfg := r.load(fmt.Sprint("new", run), r.newSites, p)
			var report LoadReport
			cpu := p.cpuSeconds(func() { report = r.mustPush(cfg) })
			figures[j] = append(figures[j], float64(report.Samples)/cpu)
		}
	}
	r.stop(server, yardstick)
	r.add("samples per CPU second: first push of a site, protobuf, 64 in flight", figures[0], figures[1], formatCount, "320,000 samples")
}

// measureScrapes measures scrapes of the given number of sites, and then pushes that arrive while
// the server is scraped.
func (r *speedRig) measureScrapes(sites int) {
	server := r.startEmptyServer()
	cfg := r.load("scraped", sites, server)
	cfg.Series = r.scrapeSamples / sites
	r.mustPush(cfg)
	scraper := r.newScraper()
	// A consumer gets the unread samples in its first scrapes, and then the newest samples again.
	r.measureScrapesOf(server, scraper, sites, cfg.Series, "", "without a consumer")
	stored := r.measureScrapesOf(server, scraper, sites, cfg.Series, "?consumer=speed", "by a consumer")
	r.measureLatency(server, stored, sites)
	r.stop(server)
}

// measureScrapesOf measures scrapes of a server that has the given number of sites and of samples for
// each, and of a yardstick that has the server's answer. It returns the name of the file with that answer.
func (r *speedRig) measureScrapesOf(server *speedProcess, scraper *http.Client, sites, samples int, query, who string) (stored string) {
	var answer []byte
	lines := 0
	for scrapes := 0; lines < sites*samples; scrapes++ { // the first scrapes of a consumer do not carry all unread samples
		if scrapes == 20 {
			r.Fatalf("the scrape %s has %d lines, fewer than the %d samples", who, lines, sites*samples)
		}
		answer, lines, _, _ = r.scrape(scraper, server, query, true)
	}
	stored = filepath.Join(r.TempDir(), "answer")
	if err := os.WriteFile(stored, answer, 0o600); err != nil {
		r.Fatal(err)
	}
	answer = nil
	yardstick := r.startYardstick(yardstickServe, stored)
	var cpu, whole, first [2][]float64
	for run := range r.runs + 1 {
		var got [2]int // lines
		for _, j := range inTurn(run) {
			p := []*speedProcess{yardstick, server}[j]
			var firstByte, lastByte time.Duration
			used := p.cpuSeconds(func() { _, got[j], firstByte, lastByte = r.scrape(scraper, p, query, false) })
			if run > 0 {
				cpu[j], whole[j], first[j] = append(cpu[j], used), append(whole[j], lastByte.Seconds()), append(first[j], firstByte.Seconds())
			}
		}
		if got[0] != lines || got[1] < sites*samples {
			r.Fatalf("scrapes %s: the yardstick has %d of %d lines, and the server %d", who, got[0], lines, got[1])
		}
	}
	r.stop(yardstick)
	what := fmt.Sprintf("scrape %s of %s samples of %s sites", who, formatCount(float64(sites*samples)), formatCount(float64(sites)))
	r.add(what+": CPU time", cpu[0], cpu[1], formatMilliseconds, "≤ 1.6")
	r.add(what+": time", whole[0], whole[1], formatMilliseconds, "≤ 1.6")
	r.add(what+": time to the first byte", first[0], first[1], formatMilliseconds, "≤ 3")
	return stored
}

// inTurn returns in which order run measures the yardstick, 0, and the server, 1. The order changes
// from run to run, so that neither always has the machine as the other left it.
func inTurn(run int) [2]int { return [2]int{run % 2, 1 - run%2} }

// measureLatency measures pushes to a server, without scrapes and with scrapes of a consumer that
// follow each other without a pause. It also measures pushes to the upload yardstick while the scrape
// yardstick, which has the answer in the file stored, is scraped in this way. These processes do less, but
// share the processors in the same way.
func (r *speedRig) measureLatency(server *speedProcess, stored string, sites int) {
	loop, upload, scraped := r.startYardstick(loopScraper, ""), r.startYardstick(yardstickWrite, ""), r.startYardstick(yardstickServe, stored)
	defer r.stop(loop, upload, scraped)
	var p99 [3][]float64
	scrapes := 0
	for range r.runs {
		for j, c := range []struct{ pushed, scraped *speedProcess }{{server, nil}, {server, server}, {upload, scraped}} {
			cfg := r.load("timed", r.latencySites, c.pushed)
			cfg.Pushes, cfg.Duration = 0, r.latency
			cfg.Interval = time.Duration(r.latencySites) * time.Second / time.Duration(r.latencyPushes)
			var n int
			var err error
			var scraping sync.WaitGroup
			if c.scraped != nil {
				scraping.Go(func() { n, err = r.scrapeInLoop(loop, c.scraped) })
			}
			report := r.mustPush(cfg)
			if scraping.Wait(); err != nil {
				r.Fatal(err)
			}
			if j == 1 {
				scrapes += n
			}
			p99[j] = append(p99[j], report.Latency.Quantile(0.99).Seconds())
		}
	}
	what := fmt.Sprintf("p99 of %d pushes a second while %s sites are scraped (%d times)", r.latencyPushes, formatCount(float64(sites+r.latencySites)), scrapes)
	r.add(what+", compared with that without scrapes", p99[0], p99[1], formatMilliseconds, "≤ 2")
	r.add(what+", compared with that of the yardsticks", p99[2], p99[1], formatMilliseconds, "")
}

// readsAnswer reads an answer of url to its end, and reports whether it succeeded.
func readsAnswer(client *http.Client, url string) bool {
	resp, err := client.Get(url)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err == nil && resp.StatusCode == http.StatusOK
}

// measureMemory measures the resident memory of a server for each series that it holds.
func (r *speedRig) measureMemory() {
	server := r.startEmptyServer()
	cfg := r.load("memory", r.memorySites, server)
	pushed := 0
	for _, c := range []struct {
		pushes int
		goal   string
	}{{3, "≤ 450"}, {13, "≤ 550"}} {
		cfg.Pushes = c.pushes - pushed
		pushed = c.pushes
		r.mustPush(cfg)
		r.add(fmt.Sprintf("bytes of memory for a held series of %s sites, after %d pushes", formatCount(float64(r.memorySites)), c.pushes),
			nil, []float64{server.metric("process_resident_memory_bytes") / float64(r.memorySites*r.series)}, formatCount, c.goal)
	}
	r.stop(server)
}

// measureStartAndIdle measures the start of a server that holds three pushes of each site, and what it
// uses when nothing is asked of it.
func (r *speedRig) measureStartAndIdle() {
	storage := r.TempDir()
	server := r.startSpeedServer(storage)
	r.addConsumer(server)
	cfg := r.load("kept", r.startSites, server)
	cfg.Pushes = 3
	r.mustPush(cfg)
	r.stop(server)
	begin := time.Now()
	server = r.startSpeedServer(storage)
	eventuallyWithin(r.T, 5*time.Minute, 5*time.Millisecond, "the server is ready", func() bool {
		return readsAnswer(http.DefaultClient, server.external+"/healthz/ready")
	})
	took, cpu := time.Since(begin), server.metric("process_cpu_seconds_total")
	what := fmt.Sprintf("%s sites with %d series each: ", formatCount(float64(r.startSites)), r.series)
	r.add(what+"CPU time of a start", nil, []float64{cpu}, formatSeconds, "≤ 4 s")
	r.add(what+"time of a start", nil, []float64{took.Seconds()}, formatSeconds, "")
	r.add(what+"bytes of memory for a held series after the start", nil, []float64{server.metric("process_resident_memory_bytes") / float64(r.startSites*r.series)}, formatCount, "≤ 450")
	r.scrape(r.newScraper(), server, "?consumer=speed", false) // the server then has the cursors of a consumer to keep
	idle := server.cpuSeconds(func() { Sleep(r.Context(), r.idle, nil) })
	r.add(what+"part of a core that an idle server uses", nil, []float64{idle / r.idle.Seconds()}, func(v float64) string { return fmt.Sprintf("%.2f %%", v*100) }, "≤ 0.5 %")
	r.stop(server)
}

// measureClient measures a client that scrapes a large source once, and pushes the scrape.
func (r *speedRig) measureClient() {
	server := r.startEmptyServer("--limit-series", "1000000")
	bodies := newLoadBodies(r.clientSeries, LoadText, LoadIdentity)
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		w.Write(bodies.next(time.Now().UnixMilli()))
	}))
	defer source.Close()
	writeIn(r.T, r.dir, "client.token", mustTool(r.T, r.dir, "--mode", "token", "--keys", "keys", "--id", "client", "--to", server.external))
	var cpu, memory []float64
	for run := range r.runs {
		p := startCommand(r.T, r.command("--mode", "client", "--from", source.URL+"/metrics", "--token-file", "client.token", "--spool-dir", fmt.Sprint("spool", run), "--listen", "127.0.0.1:0"))
		client := &speedProcess{process: p, internal: "http://" + p.await(`msg=listening address=(\S+)`)}
		p.awaitWithin(5*time.Minute, "msg=pushed")
		cpu = append(cpu, client.metric("process_cpu_seconds_total"))
		if mib := peakMemory(p.cmd.Process.Pid); mib > 0 {
			memory = append(memory, mib)
		}
		r.stop(client)
	}
	what := fmt.Sprintf("a client scrapes and pushes %s series: ", formatCount(float64(r.clientSeries)))
	r.add(what+"CPU time", nil, cpu, formatSeconds, "≤ 0.8 s")
	if len(memory) > 0 {
		r.add(what+"peak memory in MiB", nil, memory, formatCount, "≤ 95")
	}
	r.stop(server)
}

// peakMemory returns the most resident memory, in MiB, that a process has had. It returns 0 where
// there is no /proc. It does not use getrusage, which counts the memory of the parent before exec.
func peakMemory(pid int) (mib float64) {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if m := regexp.MustCompile(`(?m)^VmHWM:\s*(\d+) kB$`).FindSubmatch(text); m != nil {
		kib, _ := strconv.ParseFloat(string(m[1]), 64)
		mib = kib / 1024
	}
	return mib
}

// stop ends processes, so that they do not disturb the next figures.
func (r *speedRig) stop(processes ...*speedProcess) {
	r.Helper()
	for _, p := range processes {
		p.cmd.Process.Signal(syscall.SIGINT)
		p.cmd.Wait() // a yardstick has no orderly end
	}
}

// The yardstick of scrapes writes the answer that it has stored, with all its lines.
func TestStoredAnswer(t *testing.T) {
	for _, text := range []string{
		"", "# TYPE a counter\n", "a{} 1\n",
		"# HELP a x} 1 2\n# TYPE a counter\na{b=\"} 1 2\"} 1.5 1700000000000\na{b=\"c\"} 7 1700000000001\n\n# TYPE up gauge\nup{_id=\"s\"} 1\nup{_id=\"t\"} NaN 5\nup{_id=\"u\"} -3 6\nlast 1\n",
	} {
		w := httptest.NewRecorder()
		newStoredAnswer(text).ServeHTTP(w, nil)
		if got := w.Body.String(); got != text {
			t.Errorf("got %q, want %q", got, text)
		}
	}
}
