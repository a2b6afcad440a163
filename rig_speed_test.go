package main

// The rig of TestSpeed: servers and yardsticks as processes of their own, which are driven over TCP
// by the load generator, and the table of figures. CPU time is what a process says about itself.

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// speedSize has the numbers of a run of TestSpeed.
type speedSize struct {
	runs          int // measurements of each figure, of which the median counts
	series        int // series of a site, unless a row says otherwise
	sites, pushes int // of each measured run of pushes
	newSites      int // sites that push for the first time, in each run
	scrapeSamples int // samples of a scrape
	scrapeSites   []int
	memorySites   int
	startSites    int
	idle          time.Duration // how long an idle server is measured
	latency       time.Duration // how long the latency of pushes is measured, in each run
	latencySites  int
	latencyPushes int // pushes a second while the latency is measured
	clientSeries  int
}

// speedRow is one row of the table.
type speedRow struct{ what, yardstick, telemeter, ratio, goal string }

// speedRig measures figures.
type speedRig struct {
	*testing.T
	speedSize
	dir     string // has the directory keys
	program string // path of telemeter; empty: the test binary runs as telemeter
	rows    []speedRow
}

// speedProcess is a server or a yardstick.
type speedProcess struct {
	*process
	external, internal string // URLs of the listeners
}

// newSpeedRig makes keys. With -speed, it also builds telemeter as make does, because the test binary
// is larger and so needs more memory.
func newSpeedRig(t *testing.T, size speedSize) *speedRig {
	t.Helper()
	r := &speedRig{T: t, speedSize: size, dir: t.TempDir()}
	mustTool(t, r.dir, "--mode", "keygen", "--keys", "keys")
	if *speedFlag != "" {
		r.program = filepath.Join(r.dir, "telemeter")
		build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", r.program, ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("building telemeter: %v\n%s", err, out)
		}
	}
	return r
}

// command returns a command that runs telemeter in the directory of the rig.
func (r *speedRig) command(args ...string) *exec.Cmd {
	r.Helper()
	cmd := telemeterCommand(r.T, r.dir, args...)
	if r.program != "" {
		cmd.Path = r.program
	}
	return cmd
}

// startSpeedServer starts a server without limits that the rig could reach. storage is the storage
// directory.
func (r *speedRig) startSpeedServer(storage string, args ...string) *speedProcess {
	r.Helper()
	p := startCommand(r.T, r.command(append([]string{"--mode", "server", "--keys", "keys", "--listen", "127.0.0.1:0", "--listen-internal", "127.0.0.1:0", "--storage-dir", storage,
		"--ratelimit", "0", "--limit-clusters", "1000000", "--limit-samples", "1000000000"}, args...)...))
	return await(p)
}

// startEmptyServer starts a server without data, and adds a consumer.
func (r *speedRig) startEmptyServer(args ...string) *speedProcess {
	r.Helper()
	p := r.startSpeedServer(r.TempDir(), args...)
	r.addConsumer(p)
	return p
}

// addConsumer scrapes a server as a consumer. A server that knows no consumer syncs every push.
func (r *speedRig) addConsumer(p *speedProcess) {
	r.Helper()
	eventually(r.T, "a scrape succeeds", func() bool { return readsAnswer(http.DefaultClient, p.internal+"/federate?consumer=speed") })
}

// startYardstick starts a yardstick that keeps its files in a directory of its own, or serves the
// answer in the file arg.
func (r *speedRig) startYardstick(kind, arg string) *speedProcess {
	r.Helper()
	if arg == "" {
		arg = r.TempDir()
	}
	self, err := os.Executable()
	if err != nil {
		r.Fatal(err)
	}
	cmd := exec.Command(self, kind, arg)
	cmd.Env = append(os.Environ(), asYardstick+"=1", "GORACE=atexit_sleep_ms=0")
	if _, err := cmd.StdinPipe(); err != nil { // the yardstick ends when this process does
		r.Fatal(err)
	}
	return await(startCommand(r.T, cmd))
}

// await waits until p serves, and returns its addresses. A server first reads what it has stored.
func await(p *process) *speedProcess {
	p.t.Helper()
	return &speedProcess{p, "http://" + p.awaitWithin(10*time.Minute, externalAddr), "http://" + p.await(internalAddr)}
}

// metric returns the value of a metric without labels of p. It returns 0 if p has no such metric.
func (p *speedProcess) metric(name string) float64 {
	p.t.Helper()
	m := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindStringSubmatch(get(p.t, p.internal+"/metrics"))
	if m == nil {
		return 0
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		p.t.Fatal(err)
	}
	return v
}

// cpuSeconds returns the CPU time, user and system, that p has used while do ran.
func (p *speedProcess) cpuSeconds(do func()) float64 {
	p.t.Helper()
	before := p.metric("process_cpu_seconds_total")
	do()
	return p.metric("process_cpu_seconds_total") - before
}

// load returns a configuration of the load generator for n sites. The pushes are protobuf that is
// not compressed, and name their scrapes.
func (r *speedRig) load(prefix string, n int, p *speedProcess) LoadConfig {
	r.Helper()
	f := loadFlags{keys: filepath.Join(r.dir, "keys"), sites: n, prefix: prefix, inFlight: 64, duration: time.Hour}
	tokens, err1 := f.makeTokens(time.Now())
	client, err2 := f.httpClient(nil)
	if err := cmp.Or(err1, err2); err != nil {
		r.Fatal(err)
	}
	r.Cleanup(client.CloseIdleConnections)
	return LoadConfig{
		To: []string{p.external}, ToClient: client, Tokens: tokens, Series: r.series, Format: LoadProtobuf, Encoding: LoadIdentity,
		FirstSpoolID: 1 << 32, InFlight: 64, Duration: time.Hour, Pushes: 1,
	}
}

// mustPush runs the load generator. The test fails if a push fails, or a sample is dropped.
func (r *speedRig) mustPush(cfg LoadConfig) LoadReport {
	r.Helper()
	report := RunLoad(r.Context(), cfg)
	if err := report.Err(); err != nil || report.Duplicates > 0 {
		r.Fatalf("%v:\n%s", err, &report)
	}
	return report
}

// scrape requests /federate of p over client, and returns the answer if keep is set. It also returns
// the time until the first byte of the answer, and until its last byte.
func (r *speedRig) scrape(client *http.Client, p *speedProcess, query string, keep bool) (answer []byte, lines int, first, last time.Duration) {
	r.Helper()
	begin := time.Now()
	resp, err := client.Get(p.internal + "/federate" + query)
	if err != nil {
		r.Fatal(err)
	}
	defer resp.Body.Close()
	body := bufio.NewReaderSize(resp.Body, 64<<10)
	body.Peek(1) // the loop below reports an error
	first = time.Since(begin)
	buf := make([]byte, 64<<10)
	for err == nil {
		var n int
		n, err = body.Read(buf)
		if keep {
			answer = append(answer, buf[:n]...)
		}
		for _, b := range buf[:n] {
			if b == '\n' {
				lines++
			}
		}
	}
	if !errors.Is(err, io.EOF) || resp.StatusCode != http.StatusOK {
		r.Fatalf("/federate: %s %v", resp.Status, err)
	}
	return answer, lines, first, time.Since(begin)
}

// scrapeInLoop has loop, a process of the kind loopScraper, scrape p for the time r.latency. It returns
// the number of scrapes.
func (r *speedRig) scrapeInLoop(loop, p *speedProcess) (scrapes int, err error) {
	resp, err := http.PostForm(loop.internal+"/scrape", url.Values{"url": {p.internal + "/federate?consumer=speed"}, "for": {r.latency.String()}})
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if _, err := fmt.Fscan(resp.Body, &scrapes); err != nil {
		return 0, fmt.Errorf("scraping in a loop: %s: %w", resp.Status, err)
	}
	return scrapes, nil
}

// newScraper returns an HTTP client that asks for no compression.
func (r *speedRig) newScraper() *http.Client {
	transport := &http.Transport{DisableCompression: true}
	r.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// add adds a row to the table. yardstick and telemeter have a figure for each run; yardstick may be
// empty. format formats a figure. The ratio is the median of the runs' ratios.
func (r *speedRig) add(what string, yardstick, telemeter []float64, format func(float64) string, goal string) {
	row := speedRow{what: what, telemeter: format(median(telemeter)), goal: goal}
	if len(yardstick) > 0 {
		var ratios []float64
		for i, y := range yardstick {
			ratios = append(ratios, telemeter[i]/y)
		}
		row.yardstick, row.ratio = format(median(yardstick)), fmt.Sprintf("%.2f", median(ratios))
	}
	r.rows = append(r.rows, row)
	r.Logf("%+v", row)
}

// table returns the rows as Markdown.
func (r *speedRig) table() string {
	var b strings.Builder
	b.WriteString("| what | yardstick | telemeter | ratio | goal |\n|---|---|---|---|---|\n")
	for _, row := range r.rows {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", row.what, row.yardstick, row.telemeter, row.ratio, row.goal)
	}
	return b.String()
}

// median returns the median of figures, which must not be empty.
func median(figures []float64) float64 {
	sorted := slices.Sorted(slices.Values(figures))
	return sorted[len(sorted)/2]
}

// formatCount formats a figure as a whole number, with commas.
func formatCount(v float64) string {
	digits := strconv.FormatFloat(v, 'f', 0, 64)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

func formatMilliseconds(seconds float64) string { return fmt.Sprintf("%.1f ms", seconds*1000) }
func formatSeconds(seconds float64) string      { return fmt.Sprintf("%.2f s", seconds) }

// describeMachine returns the processors, the system, the version of Go and the load average.
func describeMachine() string {
	model := "unknown processor"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if m := regexp.MustCompile(`(?m)^model name\s*: (.*)$`).FindSubmatch(text); m != nil {
			model = string(m[1])
		}
	}
	return fmt.Sprintf("%d × %s, %s/%s, %s, load average %s", runtime.NumCPU(), model, runtime.GOOS, runtime.GOARCH, runtime.Version(), loadAverage())
}

// loadAverage returns the load of the machine over the last minute.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if average, _, ok := strings.Cut(string(text), " "); err == nil && ok {
		return average
	}
	return "unknown"
}
