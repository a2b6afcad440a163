package main

// The rig of the tests TestOutage, TestOutageDrain and so on: a source that remembers its answers,
// a TCP proxy that can interrupt connections, and a central Prometheus whose samples can be
// queried. Two tests check the rig itself.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// outageSource is a scrape target. Each scrape returns all series with a new value and a new time.
type outageSource struct {
	*http.Server
	addr   string
	series int

	mu   sync.Mutex // guards the fields below
	n    int        // number of scrapes so far
	said []outageScrape
}

// newOutageSource starts a source with this many series on a free port. It ends with the test.
func newOutageSource(t *testing.T, series int) *outageSource {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &outageSource{addr: ln.Addr().String(), series: series}
	s.Server = &http.Server{Handler: s}
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
	return s
}

// outageScrape is one scrape that a source answered. All its samples have the same time and value.
type outageScrape struct {
	t int64 // ms since the epoch
	v float64
	// maybe means that Prometheus may lack the samples: the client was killed shortly after the
	// scrape and may not have written the scrape to its spool.
	maybe bool
}

// ServeHTTP answers a scrape. It remembers the scrape if the answer was written completely.
func (s *outageSource) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.n++
	scrape := outageScrape{t: time.Now().UnixMilli(), v: float64(s.n)}
	s.mu.Unlock()
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	var b bytes.Buffer
	for i := range s.series {
		fmt.Fprintf(&b, "outage_total{k=\"%d\"} %v %d\n", i, scrape.v, scrape.t)
	}
	if _, err := w.Write(b.Bytes()); err == nil {
		s.mu.Lock()
		s.said = append(s.said, scrape)
		s.mu.Unlock()
	}
}

// unsure marks all scrapes since a time as scrapes whose samples may be lost.
func (s *outageSource) unsure(since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.said {
		if s.said[i].t >= since.UnixMilli() {
			s.said[i].maybe = true
		}
	}
}

// all returns the scrapes that the source has answered.
func (s *outageSource) all() []outageScrape {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.said)
}

// outageProxy is a TCP proxy between two processes that simulates a faulty network.
type outageProxy struct {
	ln  net.Listener
	to  string     // the address to which connections are forwarded
	mu  sync.Mutex // guards the fields below
	ok  *sync.Cond // signals a change of the field how
	how string     // how the network behaves; the method set explains the values
	// If cutUp is positive, the next connection on which the client has sent that many bytes is
	// reset, and cutUp becomes 0. cutDown does the same for bytes that the server has sent.
	cutUp, cutDown int
	cuts           int // number of connections that were reset because of cutUp or cutDown
	conns          map[net.Conn]bool
}

// newOutageProxy starts a proxy that forwards to an address. The proxy ends with the test.
func newOutageProxy(t *testing.T, to string) *outageProxy {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &outageProxy{ln: ln, to: to, conns: map[net.Conn]bool{}}
	p.ok = sync.NewCond(&p.mu)
	t.Cleanup(func() { ln.Close(); p.set("refuse") })
	go serveConns(ln, p.serve)
	return p
}

func (p *outageProxy) addr() string { return p.ln.Addr().String() }

// set changes the behavior of the network. "" forwards everything. "refuse" resets all connections,
// also new ones. "hold" forwards nothing but keeps connections open. "delay" forwards every piece
// of data later than the timeout of a scrape.
func (p *outageProxy) set(how string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.how = how
	if how == "refuse" {
		for c := range p.conns {
			outageReset(c)
		}
	}
	p.ok.Broadcast()
}

// cut sets two limits. The proxy resets the next connection on which the client has sent a number of
// bytes (up), and the next connection on which the server has sent a number of bytes (down). Both
// can be the same connection. A number of 0 resets no connection.
func (p *outageProxy) cut(up, down int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cutUp, p.cutDown = up, down
}

// cutsDone returns how many connections the proxy has reset so far because of cut.
func (p *outageProxy) cutsDone() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cuts
}

// outageReset closes a connection with a TCP reset.
func outageReset(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	c.Close()
}

// serve forwards one connection until it ends.
func (p *outageProxy) serve(c net.Conn) {
	p.mu.Lock()
	refused := p.how == "refuse"
	p.mu.Unlock()
	d, err := net.Dial("tcp", p.to)
	if refused || err != nil {
		outageReset(c)
		if err == nil {
			d.Close()
		}
		return
	}
	p.mu.Lock()
	p.conns[c], p.conns[d] = true, true
	p.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { p.pump(d, c, &p.cutUp) })
	both.Go(func() { p.pump(c, d, &p.cutDown) })
	both.Wait()
	p.mu.Lock()
	delete(p.conns, c)
	delete(p.conns, d)
	p.mu.Unlock()
}

// pump forwards the data of one direction of a connection until the connection ends, and then
// closes both ends. cut points to p.cutUp or p.cutDown, whichever counts the bytes of this
// direction.
func (p *outageProxy) pump(to, from net.Conn, cut *int) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 4<<10)
	for total := 0; ; {
		n, err := from.Read(buf)
		p.mu.Lock()
		for p.how == "hold" {
			p.ok.Wait()
		}
		delayed := p.how == "delay"
		total += n
		over := *cut > 0 && total >= *cut
		if over {
			*cut = 0
			p.cuts++
		}
		p.mu.Unlock()
		if over { // forward only half of the data, so that the reset comes in the middle of it
			to.Write(buf[:n/2])
			outageReset(from)
			outageReset(to)
			return
		}
		if delayed { // wait longer than the timeout of a scrape
			time.Sleep(outageTimeout + outageTimeout/2)
		}
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

const (
	outageTimeout = 2 * time.Second // interval and timeout of the central Prometheus's scrapes
	outageWindow  = "3h"            // out_of_order_time_window that the README recommends
)

// outagePrometheus is a process of Prometheus that scrapes telemeter servers.
type outagePrometheus struct {
	t        *testing.T
	dir      string
	program  string
	addr     string // address of the HTTP API
	consumer string // value of the parameter consumer in the scrapes of telemeter servers
	logs     *os.File
	cmd      *exec.Cmd     // nil while Prometheus does not run
	ended    chan struct{} // closed when cmd has ended
}

// outageProgram returns the path of Prometheus: $PROMETHEUS, or prometheus in $PATH.
func outageProgram(t *testing.T) string {
	program := os.Getenv("PROMETHEUS")
	if program == "" {
		program = "prometheus"
	}
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatalf("Prometheus is missing: install it, or set PROMETHEUS to its path: %v", err)
	}
	return path
}

// newOutagePrometheus writes the configuration of a Prometheus that scrapes target with the
// parameter consumer. The method start starts this Prometheus. timeout is both the interval and the
// timeout of its scrapes. window is its out_of_order_time_window; "" means none. jobs are further
// scrape_configs, each on one line.
func newOutagePrometheus(t *testing.T, target, consumer, window string, timeout time.Duration, jobs ...string) *outagePrometheus {
	t.Helper()
	storage := ""
	if window != "" {
		storage = "storage: {tsdb: {out_of_order_time_window: " + window + "}}\n"
	}
	return newConfiguredPrometheus(t, consumer, fmt.Sprintf(`global: {scrape_interval: %v, scrape_timeout: %v}
%sscrape_configs:
- job_name: federate
  metrics_path: /federate
  honor_labels: true
  params: {consumer: [%s]}
  static_configs: [{targets: ['%s']}]
%s
`, timeout, timeout, storage, consumer, target, strings.Join(jobs, "\n")))
}

// newConfiguredPrometheus does the same for a Prometheus with any configuration. The name consumer
// tells it apart in the log of the test.
func newConfiguredPrometheus(t *testing.T, consumer, config string) *outagePrometheus {
	t.Helper()
	p := &outagePrometheus{t: t, dir: t.TempDir(), program: outageProgram(t), addr: freeAddr(t), consumer: consumer}
	if err := os.WriteFile(filepath.Join(p.dir, "prometheus.yml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if p.logs, err = os.Create(filepath.Join(p.dir, "log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.stop(syscall.SIGKILL)
		p.logs.Close()
		if b, _ := os.ReadFile(p.logs.Name()); t.Failed() {
			t.Logf("end of the log of Prometheus %s:\n%s", consumer, b[max(0, len(b)-4000):])
		}
	})
	return p
}

// start starts Prometheus with the data of its earlier runs. Prometheus runs at log level debug,
// because otherwise it does not log that a scrape failed because of its content.
func (p *outagePrometheus) start() {
	p.t.Helper()
	p.cmd = exec.Command(p.program, "--config.file="+filepath.Join(p.dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(p.dir, "data"),
		"--web.listen-address="+p.addr, "--log.level=debug")
	p.cmd.Stdout, p.cmd.Stderr = p.logs, p.logs
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) { cmd.Wait(); close(ended) }(p.cmd, p.ended)
}

// stop ends Prometheus with a signal, and kills it if it does not end within a minute. It does
// nothing if Prometheus does not run.
func (p *outagePrometheus) stop(sig syscall.Signal) {
	if p.cmd == nil {
		return
	}
	p.cmd.Process.Signal(sig)
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		p.cmd.Process.Kill()
		<-p.ended
	}
	p.cmd = nil
}

// promResult is one series of an answer of the query API. Values are of a range selector, Value is of
// an instant selector; each is a time in seconds and the text of a value.
type promResult struct {
	Metric map[string]string
	Values [][2]any
	Value  [2]any
}

// queryPrometheus runs a PromQL query a minute ahead of now, so that no sample is too new for it. It
// decodes the answer without the code of the client, which the tests check.
func queryPrometheus(addr, promql string) ([]promResult, error) {
	at := strconv.FormatInt(time.Now().Add(time.Minute).Unix(), 10)
	resp, err := http.Get("http://" + addr + "/api/v1/query?time=" + at + "&query=" + url.QueryEscape(promql))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Status string
		Data   struct{ Result []promResult }
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Status != "success" {
		return nil, fmt.Errorf("query %s: status %s, %v", promql, resp.Status, err)
	}
	return answer.Data.Result, nil
}

// query runs a PromQL query. got maps the value of the label, and then the time in ms since the
// epoch, to the value of the sample. twice is the number of additional samples that have the same
// label value and time as another sample.
func (p *outagePrometheus) query(promql, label string) (got map[string]map[int64]float64, twice int, err error) {
	results, err := queryPrometheus(p.addr, promql)
	if err != nil {
		return nil, 0, err
	}
	got = map[string]map[int64]float64{}
	for _, r := range results {
		series := got[r.Metric[label]]
		if series == nil {
			series = map[int64]float64{}
			got[r.Metric[label]] = series
		}
		values := r.Values
		if values == nil {
			values = [][2]any{r.Value}
		}
		for _, v := range values {
			at, _ := v[0].(float64)
			text, _ := v[1].(string)
			value, _ := strconv.ParseFloat(text, 64)
			ms := int64(at*1000 + .5)
			if _, has := series[ms]; has {
				twice++
			}
			series[ms] = value
		}
	}
	return got, twice, nil
}

// outageDiff compares the samples in one Prometheus with the answers of the source.
type outageDiff struct {
	samples int // number of samples of the source that Prometheus has
	missing int // number of samples of the source that Prometheus lacks, except those counted in maybe
	wrong   int // number of samples in Prometheus with a time or value that the source did not return
	twice   int // number of samples that Prometheus has twice
	maybe   int // number of samples that Prometheus lacks, of scrapes whose samples may be lost
}

// whole reports whether Prometheus has all samples exactly once and no wrong samples. Samples that
// may be lost can be missing.
func (d outageDiff) whole() bool {
	return d.missing == 0 && d.wrong == 0 && d.twice == 0 && d.samples > 0
}

// compareOutage compares the samples that Prometheus must have with the samples that it has. The
// list said has the scrapes that the source answered, each with a sample of every series. series is
// the number of series of the source. got and twice are results of the method query.
func compareOutage(said []outageScrape, series int, got map[string]map[int64]float64, twice int) outageDiff {
	d := outageDiff{twice: twice}
	want := map[int64]outageScrape{}
	for _, s := range said {
		want[s.t] = s
	}
	for i := range series {
		have := got[strconv.Itoa(i)]
		for _, s := range said {
			if v, ok := have[s.t]; ok && v == s.v {
				d.samples++
			} else if s.maybe {
				d.maybe++
			} else {
				d.missing++
			}
		}
		for t, v := range have {
			if s, ok := want[t]; !ok || s.v != v {
				d.wrong++
			}
		}
	}
	return d
}

// outageDropped matches a line in the log of Prometheus about samples that Prometheus dropped as
// out of order. outageFatal matches other log lines about samples that Prometheus refused, which
// are faults in most tests.
var (
	outageDropped = regexp.MustCompile(`(?i)out.of.order samples.*num_dropped=(\d+)`)
	outageFatal   = regexp.MustCompile(`(?i)append failed|parse error|same timestamp|commit failed|too old or are too far|duplicate sample`)
)

// log returns the number of samples that Prometheus refused as out of order, and the other lines of
// its log that match outageFatal.
func (p *outagePrometheus) log() (outOfOrder int, bad []string) {
	f, err := os.Open(p.logs.Name())
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if m := outageDropped.FindStringSubmatch(line); m != nil {
			n, _ := strconv.Atoi(m[1])
			outOfOrder += n
		} else if outageFatal.MatchString(line) {
			bad = append(bad, line)
		}
	}
	return outOfOrder, bad
}

// The README and testdata/prometheus.yml recommend the out_of_order_time_window that the outage
// tests use. This window is at least an hour longer than the default --retention.
func TestOutageWindow(t *testing.T) {
	window := regexp.MustCompile(`(?m)^ *out_of_order_time_window: (.*)$`)
	for _, file := range []string{"README.md", filepath.Join("testdata", "prometheus.yml")} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if m := window.FindAllStringSubmatch(string(b), -1); len(m) != 1 || m[0][1] != outageWindow {
			t.Errorf("out_of_order_time_window in %s: got %v, want %s once", file, m, outageWindow)
		}
	}
	reference, err := os.ReadFile(referencePage)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`--retention TIME[^(]*\(default ([^)]*)\)`).FindSubmatch(reference)
	if m == nil {
		t.Fatal(referencePage + " does not list the default of --retention")
	}
	retention, err := time.ParseDuration(string(m[1]))
	longest, err2 := time.ParseDuration(outageWindow)
	if err != nil || err2 != nil || longest < retention+time.Hour {
		t.Errorf("out_of_order_time_window: got %v, want at least an hour more than the --retention of %v (%v, %v)", longest, retention, err, err2)
	}
}

// compareOutage counts the missing samples, the wrong samples and the duplicates. It counts the
// missing samples of scrapes that may be lost separately.
func TestOutageComparison(t *testing.T) {
	said := []outageScrape{{t: 1, v: 1}, {t: 2, v: 2}, {t: 3, v: 3, maybe: true}}
	whole := func() map[string]map[int64]float64 {
		return map[string]map[int64]float64{"0": {1: 1, 2: 2, 3: 3}, "1": {1: 1, 2: 2}}
	}
	for name, test := range map[string]struct {
		change func(got map[string]map[int64]float64)
		twice  int
		want   outageDiff
	}{
		"whole":                  {func(map[string]map[int64]float64) {}, 0, outageDiff{samples: 5, maybe: 1}},
		"missing":                {func(got map[string]map[int64]float64) { delete(got["1"], 2) }, 0, outageDiff{samples: 4, missing: 1, maybe: 1}},
		"no samples of a series": {func(got map[string]map[int64]float64) { delete(got, "1") }, 0, outageDiff{samples: 3, missing: 2, maybe: 1}},
		"other value":            {func(got map[string]map[int64]float64) { got["0"][1] = 7 }, 0, outageDiff{samples: 4, missing: 1, wrong: 1, maybe: 1}},
		"wrong":                  {func(got map[string]map[int64]float64) { got["0"][9] = 9 }, 0, outageDiff{samples: 5, wrong: 1, maybe: 1}},
		"twice":                  {func(map[string]map[int64]float64) {}, 1, outageDiff{samples: 5, maybe: 1, twice: 1}},
	} {
		got := whole()
		test.change(got)
		if d := compareOutage(said, 2, got, test.twice); d != test.want || d.whole() != (name == "whole") {
			t.Errorf("%s: got %+v, whole %v; want %+v", name, d, d.whole(), test.want)
		}
	}
}
