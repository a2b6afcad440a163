package main

// Tests of outages with real processes, a real Prometheus, and proxies that cut the network. An
// outage of the uplink, of the server, of the client or of the central Prometheus must leave no gap
// and no duplicate in Prometheus. "make test-outage" runs these tests.

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var outageFlag = flag.String("outage", "", "run TestOutage and its like: full or short")

const outagePatience = 2 * time.Minute // limit for steps that take seconds on an idle machine

// outageRig is a source with a client, a server, and a central Prometheus. Proxies can interrupt
// the client's pushes and the central Prometheus's scrapes.
type outageRig struct {
	t              *testing.T
	dir            string
	source         *outageSource
	listen         string // the server's address for clients
	internal       string // the server's address for scrapers
	push, scrape   *outageProxy
	server, client *process
	prometheus     *outagePrometheus
	outage         time.Duration // length of an outage
	seenOutOfOrder int           // samples that Prometheus refused as out of order in earlier steps
}

// startServer starts the server and waits until it serves.
func (r *outageRig) startServer() {
	r.server = start(r.t, r.dir, "--mode", "server", "--keys", "keys", "--listen", r.listen, "--listen-internal", r.internal,
		"--storage-dir", "data", "--ratelimit", "0")
	r.server.await("msg=serving")
}

// startClient starts the client, which scrapes every second and pushes every two seconds.
func (r *outageRig) startClient() {
	r.client = start(r.t, r.dir, "--mode", "client", "--from", "http://"+r.source.addr+"/metrics", "--token-file", "token",
		"--scrape-interval", "1s", "--interval", "2s", "--spool-dir", "spool", "--listen", "")
}

// newOutageRig starts the source, the server, the client and the central Prometheus, with proxies
// between them. outage is the length of each outage that the rig will cause.
func newOutageRig(t *testing.T, outage time.Duration) *outageRig {
	r := &outageRig{t: t, dir: t.TempDir(), listen: freeAddr(t), internal: freeAddr(t), outage: outage}
	r.source = newOutageSource(t, 50)
	r.push, r.scrape = newOutageProxy(t, r.listen), newOutageProxy(t, r.internal)
	mustTool(t, r.dir, "--mode", "keygen", "--keys", "keys")
	token := mustTool(t, r.dir, "--mode", "token", "--keys", "keys", "--id", "x", "--to", "http://"+r.push.addr())
	if err := os.WriteFile(filepath.Join(r.dir, "token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	r.startServer()
	r.prometheus = newOutagePrometheus(t, r.scrape.addr(), "central", outageWindow, outageTimeout)
	r.prometheus.start()
	r.startClient()
	return r
}

// settled waits until Prometheus p has all samples that the source returned before the call. It
// reports an error unless p has every sample exactly once, but p may lack the samples of two
// scrapes that a killed client may have lost. It prints the result of the comparison; name and
// begin are the name and the start of the current step of the test, for the printed line.
func (r *outageRig) settled(name string, p *outagePrometheus, begin time.Time) {
	t := r.t
	t.Helper()
	up := time.Now()
	said := r.source.all()
	var d outageDiff
	var err error
	for deadline := up.Add(outagePatience); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		var got map[string]map[int64]float64
		var twice int
		if got, twice, err = p.query(`outage_total{_id="x"}[3h]`, "k"); err != nil {
			continue
		}
		for _, series := range got { // leave out samples that the source returned after said was copied
			for at := range series {
				if at > said[len(said)-1].t {
					delete(series, at)
				}
			}
		}
		if d = compareOutage(said, r.source.series, got, twice); d.whole() {
			break
		}
	}
	outOfOrder, bad := p.log()
	fmt.Printf("%-46s %5.0f s, whole after %5.1f s: samples %6d, missing %d, duplicate %d, wrong %d, not sure %d, refused as out of order %d\n",
		name, up.Sub(begin).Seconds(), time.Since(up).Seconds(), d.samples, d.missing, d.twice, d.wrong, d.maybe, outOfOrder-r.seenOutOfOrder)
	r.seenOutOfOrder = outOfOrder
	if err != nil || !d.whole() || d.maybe > 2*r.source.series {
		t.Errorf("%s: Prometheus has %+v, %v", name, d, err)
	}
	if len(bad) > 0 {
		t.Errorf("%s: faults in the log of Prometheus:\n%s", name, strings.Join(bad, ""))
	}
}

// cuts resets three connections through the proxy p, one after another. up and down are the bytes
// after which a connection is reset, as in outageProxy.cut.
func (r *outageRig) cuts(p *outageProxy, up, down int) {
	for range 3 {
		before := p.cutsDone()
		p.cut(up, down)
		eventually(r.t, "a connection is reset", func() bool { return p.cutsDone() > before })
		time.Sleep(r.outage / 10)
	}
}

// linkDown interrupts the network between the client and the server. For the first half of the
// outage no data passes, but connections stay open. For the second half all connections are reset.
func (r *outageRig) linkDown() {
	r.push.set("hold")
	time.Sleep(r.outage / 2)
	r.push.set("refuse")
	time.Sleep(r.outage / 2)
	r.push.set("")
}

// pushCut, answerCut and scrapeCut reset connections in the middle of a push, of the answer to a
// push, and of the answer to a scrape.
func (r *outageRig) pushCut()   { r.cuts(r.push, 1, 0) }
func (r *outageRig) answerCut() { r.cuts(r.push, 0, 1) }
func (r *outageRig) scrapeCut() { r.cuts(r.scrape, 0, 1) }

// prometheusStop ends Prometheus with a signal and starts it again after the outage.
func (r *outageRig) prometheusStop(sig syscall.Signal) {
	r.prometheus.stop(sig)
	time.Sleep(r.outage)
	r.prometheus.start()
}

// serverKill kills the server and starts it again after the outage.
func (r *outageRig) serverKill() {
	r.server.end(syscall.SIGKILL)
	time.Sleep(r.outage)
	r.startServer()
}

// storageLost stops the given Prometheus processes for the time r.outage. In the middle of that
// time it kills the server, removes the server's storage directory and starts the server again.
func (r *outageRig) storageLost(all ...*outagePrometheus) {
	for _, p := range all {
		p.stop(syscall.SIGTERM)
	}
	time.Sleep(r.outage / 2)
	r.server.end(syscall.SIGKILL)
	if err := os.RemoveAll(filepath.Join(r.dir, "data")); err != nil {
		r.t.Fatal(err)
	}
	r.startServer()
	time.Sleep(r.outage / 2)
	for _, p := range all {
		p.start()
	}
}

// clientKill kills the client and starts it again after the outage. Scrapes of the last half second
// may be lost, because the client may not have written them to its spool.
func (r *outageRig) clientKill() {
	r.source.unsure(time.Now().Add(-500 * time.Millisecond))
	r.client.end(syscall.SIGKILL)
	time.Sleep(r.outage)
	r.startClient()
}

// scrapeSlow delays the answers to scrapes, so that scrapes time out during the outage.
func (r *outageRig) scrapeSlow() {
	r.scrape.set("delay")
	time.Sleep(r.outage)
	r.scrape.set("")
}

// outageForm reports whether the flag -outage asks for the full form of the tests or for the short
// one. It skips the test if the flag is not set.
func outageForm(t *testing.T) (full bool) {
	switch *outageFlag {
	case "full":
		return true
	case "short":
		return false
	}
	t.Skip("run by make test-outage")
	return false
}

// No outage leaves a gap or a duplicate in Prometheus, neither alone nor in a quick sequence. This
// also holds for a second Prometheus and for a server that loses its storage directory.
func TestOutage(t *testing.T) {
	outage := 4 * time.Second
	if outageForm(t) {
		outage = time.Minute
	}
	r := newOutageRig(t, outage)
	eventually(t, "the first scrapes", func() bool { return len(r.source.all()) > 3 })
	r.settled("no outage", r.prometheus, time.Now())
	r.outages()
	first := r.prometheus
	r.secondPrometheus()
	r.lostStorage(first)
}

// outages runs every outage alone, and then all of them, shorter, without waiting in between.
func (r *outageRig) outages() {
	r.t.Helper()
	steps := []struct {
		name string
		do   func()
	}{
		{"client and server cut off from each other", r.linkDown},
		{"cut in the middle of a push, three times", r.pushCut},
		{"answer to a push lost, three times", r.answerCut},
		{"cut in the middle of a scrape, three times", r.scrapeCut},
		{"scrapes time out", r.scrapeSlow},
		{"server SIGKILLed and gone", r.serverKill},
		{"Prometheus stopped", func() { r.prometheusStop(syscall.SIGTERM) }},
		{"Prometheus SIGKILLed", func() { r.prometheusStop(syscall.SIGKILL) }},
		{"client SIGKILLed and gone", r.clientKill},
	}
	for _, step := range steps {
		begin := time.Now()
		step.do()
		r.settled(step.name, r.prometheus, begin)
	}
	begin := time.Now()
	r.outage /= 4
	for _, step := range steps {
		step.do()
	}
	r.settled("all of it, one after another", r.prometheus, begin)
	r.outage *= 4
}

// secondPrometheus starts a second Prometheus, which becomes r.prometheus. It must get all samples
// that the server holds. Then the second one is stopped for a while, which must not affect the
// first.
func (r *outageRig) secondPrometheus() {
	r.t.Helper()
	begin := time.Now()
	first := r.prometheus
	r.prometheus = newOutagePrometheus(r.t, r.internal, "central-b", outageWindow, outageTimeout)
	r.seenOutOfOrder = 0
	r.prometheus.start()
	r.settled("a second Prometheus", r.prometheus, begin)
	begin = time.Now()
	r.prometheusStop(syscall.SIGTERM)
	r.settled("of two Prometheus, one is stopped", r.prometheus, begin)
	r.seenOutOfOrder, _ = first.log()
	r.settled("of two Prometheus, the other", first, begin)
}

// lostStorage removes the server's storage directory twice: while both Prometheus are stopped, and
// while only the second Prometheus is stopped. It must be the last step of the test. The server
// does not hold old samples afterwards, so a new Prometheus would not get them.
func (r *outageRig) lostStorage(first *outagePrometheus) {
	r.t.Helper()
	begin := time.Now()
	r.storageLost(first, r.prometheus)
	r.seenOutOfOrder, _ = first.log()
	r.settled("storage directory removed while both are away", first, begin)
	r.seenOutOfOrder, _ = r.prometheus.log()
	r.settled("storage directory removed, the other", r.prometheus, begin)
	begin = time.Now()
	r.storageLost(r.prometheus)
	r.seenOutOfOrder, _ = r.prometheus.log()
	r.settled("storage directory removed while one is away", r.prometheus, begin)
}

// outagePusher pushes text exposition for any cluster ID, without a client.
type outagePusher struct {
	t    *testing.T
	url  string
	keys Keys // keys to sign the tokens with
}

// push pushes text for the site with cluster ID id. It returns the numbers of dropped samples by
// reason, and reports an error unless the answer is 200.
func (p *outagePusher) push(id string, text []byte) (dropped map[string]int) {
	token, err := p.keys.Sign(Token{Kind: KindClient, ClusterID: id, ID: NewTokenID()})
	if err != nil {
		p.t.Error(err)
		return nil
	}
	req, err := http.NewRequest(http.MethodPost, p.url+"/upload", bytes.NewReader(gzipped(text)))
	if err != nil {
		p.t.Error(err)
		return nil
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "text/plain")
	req.Header.Set("Content-Encoding", "gzip")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		p.t.Error(err)
		return nil
	}
	defer resp.Body.Close()
	var answer struct{ Dropped map[string]int }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || resp.StatusCode != http.StatusOK {
		p.t.Errorf("push for site %s: got %s, %v; want 200", id, resp.Status, err)
	}
	return answer.Dropped
}

// outageServer starts a server without a client. It returns the server's directory, its address for
// scrapers, a pusher and the process.
func outageServer(t *testing.T, args ...string) (dir, internal string, p *outagePusher, server *process) {
	dir = t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	server = startServer(t, dir, append([]string{"--ratelimit", "0"}, args...)...)
	keys, err := readKeyFile(filepath.Join(dir, "keys"), TokenKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	return dir, server.await(internalAddr), &outagePusher{t, "http://" + server.await(externalAddr), keys}, server
}

// outageMemory returns the resident memory of a process in bytes, or 0 if the system is not Linux.
func outageMemory(t *testing.T, server *process) int64 { return statusBytes(server, "VmRSS") }

// statusBytes returns a field of the file status in /proc of a process in bytes, or 0 if the system is
// not Linux.
func statusBytes(p *process, field string) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10
		}
	}
	return 0
}

// drainLoad is the load of TestOutageDrain: sites whose samples are spread over 50 minutes.
type drainLoad struct{ sites, series, pushes int }

func (l drainLoad) samples() int { return l.sites * l.series * l.pushes }

// sum returns the sum of the values of all samples.
func (l drainLoad) sum() int {
	return l.sites * (1000*l.series*l.pushes*(l.pushes-1)/2 + l.pushes*l.series*(l.series-1)/2)
}

// push pushes all samples of all sites. The sample of series i in push k of a site has the value
// 1000k+i. The oldest samples are 55 minutes old.
func (l drainLoad) push(pusher *outagePusher) {
	begin := time.Now().Add(-55 * time.Minute)
	ids := make(chan int)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for c := range ids {
				for k := range l.pushes {
					at := begin.Add(time.Duration(k) * 50 * time.Minute / time.Duration(l.pushes)).UnixMilli()
					var b []byte
					for i := range l.series {
						b = fmt.Appendf(b, "drain_metric_%d_total{n=\"%d\",instance=\"10.0.0.%d:9100\",job=\"node-exporter\"} %d %d\n", i/10, i, i%5, k*1000+i, at-int64(i%5))
					}
					pusher.push(fmt.Sprint("site-", c), b)
				}
			}
		})
	}
	for c := range l.sites {
		ids <- c
	}
	close(ids)
	workers.Wait()
}

// logBytes returns the total size in bytes of all site logs in a directory.
func logBytes(dir string) (size int64) {
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, LogSuffix) {
			info, _ := d.Info()
			size += info.Size()
		}
		return err
	})
	return size
}

// A Prometheus that starts late reads all samples that the server holds, with the default scrape
// timeout of 10 s. The test also prints how many bytes of disk and memory the server needs for a
// sample.
func TestOutageDrain(t *testing.T) {
	load := drainLoad{sites: 50, series: 50, pushes: 10}
	if outageForm(t) {
		load = drainLoad{sites: 1000, series: 230, pushes: 30}
	}
	dir, internal, pusher, server := outageServer(t)
	before := outageMemory(t, server)
	load.push(pusher)
	samples := load.samples()
	disk := logBytes(filepath.Join(dir, "data"))
	memory := outageMemory(t, server) - before

	proxy := newOutageProxy(t, internal)
	p := newOutagePrometheus(t, proxy.addr(), "central", outageWindow, 10*time.Second)
	start := time.Now()
	p.start()
	// The function one runs a query and returns the only value in the result, or 0 if there is
	// none.
	one := func(promql string) (v float64) {
		answer, _, _ := p.query(promql, "")
		for _, v = range answer[""] {
		}
		return v
	}
	got := 0.0
	for deadline := start.Add(10 * time.Minute); got < float64(samples) && time.Now().Before(deadline); time.Sleep(time.Second) {
		got = one(`sum(count_over_time({__name__=~"drain_.*"}[3h]))`)
	}
	took := time.Since(start)
	missing, twice, wrong := max(0, samples-int(got)), max(0, int(got)-samples), 0
	sum, want := one(`sum(sum_over_time({__name__=~"drain_.*"}[3h]))`), load.sum()
	if sum != float64(want) { // a wrong sum means that at least one sample is missing, duplicate or has a wrong value
		wrong = 1
	}
	largest := outageLargest(get(t, "http://"+internal+"/metrics"))
	outOfOrder, bad := p.log()
	fmt.Printf("drain: %d sites x %d series x %d pushes: samples %.0f, missing %d, duplicate %d, wrong %d, whole after %.0f s; scrapes of at most %s bytes before compression, refused as out of order %d\n",
		load.sites, load.series, load.pushes, got, missing, twice, wrong, took.Seconds(), largest, outOfOrder)
	fmt.Printf("drain: %.1f bytes a sample on disk and %.1f of resident memory, including the memory of series and freed memory\n", float64(disk)/float64(samples), float64(memory)/float64(samples))
	if missing+twice+wrong > 0 || len(bad) > 0 {
		t.Errorf("Prometheus has %v of %d samples with the sum %v, want %d; faults in its log: %s", got, samples, sum, want, strings.Join(bad, ""))
	}
}

// outageLargest returns the bound of the lowest bucket of telemeter_scrape_size_bytes that counts
// all scrapes. The size of every scrape was at most this bound.
func outageLargest(metrics string) string {
	all, bound := "", "?"
	for line := range strings.Lines(metrics) {
		if rest, ok := strings.CutPrefix(line, "telemeter_scrape_size_bytes_count "); ok {
			all = strings.TrimSpace(rest)
		}
	}
	for line := range strings.Lines(metrics) {
		if rest, ok := strings.CutPrefix(line, `telemeter_scrape_size_bytes_bucket{le="`); ok && bound == "?" {
			if le, n, _ := strings.Cut(rest, `"} `); strings.TrimSpace(n) == all {
				bound = le
			}
		}
	}
	return bound
}

// With the recommended configuration, Prometheus accepts samples that arrive 110 minutes late.
// Without an out-of-order window it accepts samples that arrive 50 minutes late. The server refuses
// and counts samples that are older than its --retention.
func TestOutageLate(t *testing.T) {
	outageForm(t)
	_, internal, pusher, _ := outageServer(t)
	with := newOutagePrometheus(t, internal, "with", outageWindow, outageTimeout)
	without := newOutagePrometheus(t, internal, "without", "", outageTimeout)
	with.start()
	without.start()
	now := time.Now()
	at := func(ago time.Duration) int64 { return now.Add(-ago).UnixMilli() }
	d := outageDiff{}
	// The function had waits until Prometheus p has the pushed sample of the metric with this name,
	// and no other sample of its series.
	had := func(p *outagePrometheus, name string, ago time.Duration) {
		var one outageDiff
		for deadline := time.Now().Add(outagePatience); !one.whole() && time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
			if got, twice, err := p.query(name+`{_id="late"}[3h]`, "k"); err == nil {
				one = compareOutage([]outageScrape{{t: at(ago), v: 1}}, 1, got, twice)
			}
		}
		d.samples, d.missing, d.twice, d.wrong = d.samples+one.samples, d.missing+one.missing, d.twice+one.twice, d.wrong+one.wrong
		if !one.whole() {
			t.Errorf("sample %s in Prometheus %s: got %+v", name, p.consumer, one)
		}
	}
	push := func(name string, ago time.Duration) (dropped map[string]int) {
		return pusher.push("late", fmt.Appendf(nil, "%s{k=\"0\"} 1 %d\n", name, at(ago)))
	}
	push("late_now", 0)
	had(with, "late_now", 0)
	had(without, "late_now", 0)
	push("late_50m", 50*time.Minute)
	push("late_110m", 110*time.Minute)
	dropped := push("late_121m", 121*time.Minute)
	had(with, "late_50m", 50*time.Minute)
	had(with, "late_110m", 110*time.Minute)
	had(without, "late_50m", 50*time.Minute)
	lost := get(t, "http://"+internal+"/metrics")
	if dropped[dropTooOld] != 1 || !strings.Contains(lost, `telemeter_samples_dropped_total{reason="too_old"} 1`) {
		t.Errorf("a sample older than --retention: the answer counts %v, want 1 too_old; metrics:\n%s", dropped, lost)
	}
	got, _, err := without.query(`late_110m{_id="late"}[3h]`, "k")
	fmt.Printf("late: 50 and 110 minutes with the window, 50 without it: samples %d, missing %d, duplicate %d, wrong %d; without it 110 are kept: %t; 121 are refused and counted\n",
		d.samples, d.missing, d.twice, d.wrong, err == nil && len(got) > 0)
}
