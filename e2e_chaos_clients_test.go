package main

// The scenarios of TestChaos, and sites that run the real client with a spool. In some scenarios
// the servers' disks are removed, replaced by an old copy, damaged or swapped, or a power cut takes
// what was not flushed. At the
// end, the central Prometheus must have every sample that a source ever returned, and nothing else.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// chaosClient is a site with a client. It is also the source that the client scrapes, as the
// http.RoundTripper of the client's scrapes.
type chaosClient struct {
	n       int // number of the site, from 0; its cluster ID is "site-<n>"
	metrics *Metrics
	client  *Client
	log     logBuffer
	dry     atomic.Bool // set when the source must return no samples any more

	mu   sync.Mutex     // guards gave
	gave map[int64]bool // times in ms of the samples that the source returned
}

// RoundTrip answers a scrape as the source.
func (c *chaosClient) RoundTrip(req *http.Request) (*http.Response, error) {
	now := time.Now().UnixMilli()
	var body []byte
	if !c.dry.Load() {
		for k := range chaosSeries {
			body = fmt.Appendf(body, "chaos_total{k=\"%d\"} %d %d\n", k, now%1000003, now)
		}
		c.mu.Lock()
		c.gave[now] = true
		c.mu.Unlock()
	}
	return &http.Response{
		StatusCode: http.StatusOK, Status: "200 OK", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: req,
		Header: http.Header{"Content-Type": {"text/plain; version=0.0.4"}}, Body: io.NopCloser(bytes.NewReader(body)),
	}, nil
}

// keeps reports whether the client's spool has a scrape with samples.
func (c *chaosClient) keeps() bool {
	c.client.spool.mu.Lock()
	defer c.client.spool.mu.Unlock()
	return slices.ContainsFunc(c.client.spool.index.entries, func(e spoolEntry) bool { return e.Samples > 0 })
}

// clients starts a client for each site. The clients list the servers in different rotations, so
// that they do not all push to the same server first.
func (r *chaosRig) clients(every time.Duration) {
	ctx, cancel := context.WithCancel(r.haltCtx)
	r.push = cancel
	from, err := url.Parse("http://source.invalid/metrics")
	if err != nil {
		r.t.Fatal(err)
	}
	for n := range r.sites {
		c := &chaosClient{n: n, metrics: NewMetrics(), gave: map[int64]bool{}}
		var to []string
		for i := range r.servers {
			to = append(to, strings.TrimSuffix(r.servers[(n+i)%len(r.servers)].url(9003, ""), "/"))
		}
		c.client = NewClient(ClientConfig{
			From: from, FromClient: &http.Client{Transport: c}, To: to, ToClient: r.pushClient, ClusterID: fmt.Sprint("site-", n),
			Interval: every, ScrapeInterval: every, LimitBytes: 1 << 20, Metrics: c.metrics, Log: slog.New(slog.NewTextHandler(&c.log, nil)),
			Now: time.Now, Boot: NewBootClock(os.ReadFile).Now,
		})
		c.client.Reload(ClientReloadConfig{Token: r.sites[n].token, NewCleaner: func() *ClientCleaner { return &ClientCleaner{} }})
		if err := c.client.OpenSpool(SpoolConfig{FS: DiskFS{}, Dir: filepath.Join(r.dir, "spools", fmt.Sprint(n)), Limit: 64 << 20, MaxAge: 2 * time.Hour}); err != nil {
			r.t.Fatal(err)
		}
		r.clientele = append(r.clientele, c)
		r.pushing.Go(func() {
			c.client.Run(ctx) // always returns nil; the client counts and logs its failures
			c.client.Close()
		})
	}
}

// prometheus starts a central Prometheus that scrapes each server. The parameter every is the
// interval of its scrapes.
func (r *chaosRig) prometheus(every time.Duration) {
	var targets []string
	for _, s := range r.servers {
		targets = append(targets, s.addr+":9004")
	}
	r.central = newOutagePrometheus(r.t, strings.Join(targets, "', '"), "central", outageWindow, every)
	r.central.start()
}

// came waits until the central Prometheus has a sample from every site.
func (r *chaosRig) came() {
	r.t.Helper()
	r.wait("Prometheus has a sample from every site", func() bool {
		got, _, err := r.central.query(`chaos_total{k="0"}`, "_id")
		return err == nil && len(got) == len(r.sites)
	})
}

func (r *chaosRig) clientSum(metric string) (sum float64) {
	for _, c := range r.clientele {
		var b bytes.Buffer
		c.metrics.WriteText(&b)
		sum += metricSum(b.Bytes(), metric)
	}
	return sum
}

// chaosResult compares the samples in the central Prometheus with the samples that the sources
// returned.
type chaosResult struct {
	samples int // number of samples in Prometheus
	missing int // number of samples of the sources that Prometheus lacks
	strange int // number of samples in Prometheus that no source returned
	twice   int // number of samples that Prometheus has twice
	site    int // number of a site with missing samples, if there is one
}

// compare compares the samples in the central Prometheus with the samples that it must have. The
// function given returns the times in ms of the samples that Prometheus must have from a site.
func (r *chaosRig) compare(given func(site int) map[int64]bool) (d chaosResult, err error) {
	for k := range chaosSeries {
		got, twice, err := r.central.query(fmt.Sprintf(`chaos_total{k="%d"}[3h]`, k), "_id")
		if err != nil {
			return d, err
		}
		d.twice += twice
		for site := range r.sites {
			have, want := got[fmt.Sprint("site-", site)], given(site)
			for at := range want {
				if v, ok := have[at]; !ok || v != float64(at%1000003) {
					d.missing++
					d.site = site
				}
			}
			for at := range have {
				if d.samples++; !want[at] {
					d.strange++
				}
			}
		}
	}
	return d, nil
}

// drained stops the sources, waits until the spools of all clients are empty, and compares the
// central Prometheus with the sources. A client's spool is empty once the client knows that every
// consumer has read all its samples. drained prints the result. It fails the test unless Prometheus
// has every sample exactly once and no client has dropped samples.
func (r *chaosRig) drained() {
	t := r.t
	t.Helper()
	lasted := time.Since(r.begin)
	for _, c := range r.clientele {
		c.dry.Store(true)
	}
	begin := time.Now()
	r.wait("every spool is empty", func() bool {
		for _, c := range r.clientele {
			if c.keeps() {
				return false
			}
		}
		return true
	})
	emptied := time.Since(begin)
	given := func(site int) map[int64]bool { return r.clientele[site].gave }
	d, err := r.compare(given)
	gave := 0
	for _, c := range r.clientele {
		gave += len(c.gave) * chaosSeries
	}
	accepted := r.sum("telemeter_samples_accepted_total")
	served := 0.0
	if got, _, err := r.central.query(`sum(sum_over_time(scrape_samples_scraped[3h]))`, "x"); err == nil {
		for _, series := range got {
			for _, v := range series {
				served += v
			}
		}
	}
	lost := r.clientSum("telemeter_samples_dropped_total")
	outOfOrder, bad := r.central.log()
	fmt.Printf("%-14s %3.0f s: samples of the sources %d, missing %d, duplicate %d, wrong %d; pushed %.0f, appended again %.0f, scraped %.0f; spools empty after %.1f s; refused by Prometheus as out of order %d\n",
		r.name+":", lasted.Seconds(), gave, d.missing, d.twice, d.strange, r.clientSum("telemeter_samples_pushed_total"), accepted-float64(gave), served, emptied.Seconds(), outOfOrder)
	if err != nil || gave == 0 || d.missing+d.strange+d.twice > 0 || lost > 0 || len(bad) > 0 {
		for _, s := range r.running() {
			text := s.p.text()
			t.Logf("end of the log of server %s:\n%s", s.name, text[max(0, len(text)-6000):])
		}
		log := r.clientele[d.site].log.String()
		t.Logf("end of the log of the client of site %d:\n%s", d.site, log[max(0, len(log)-6000):])
		t.Errorf("%s (SEED=%d): %+v, %v; samples dropped by clients %v; faults in the log of Prometheus: %s", r.name, r.seed, d, err, lost, strings.Join(bad, ""))
	}
}

// wipe kills servers, removes their storage directories, and starts them again.
func (r *chaosRig) wipe(servers ...*chaosServer) {
	r.each(servers, func(s *chaosServer) {
		if err := os.RemoveAll(filepath.Join(s.dir, "data")); err != nil {
			r.failf("%v", err)
		}
	})
}

// each kills the servers, calls do for each of them, starts them again and waits until they are
// ready.
func (r *chaosRig) each(servers []*chaosServer, do func(s *chaosServer)) {
	for _, s := range servers {
		r.kill(s)
	}
	for _, s := range servers {
		do(s)
	}
	for _, s := range servers {
		r.start(s)
	}
	for _, s := range servers {
		r.ready(s)
	}
}

// restore copies a server's storage directory, lets the server run on for the time age, and kills
// it. It then replaces the directory by the copy and starts the server again.
func (r *chaosRig) restore(s *chaosServer, age time.Duration) {
	copied := filepath.Join(r.dir, "copy")
	if err := os.CopyFS(copied, liveFS{os.DirFS(filepath.Join(s.dir, "data"))}); err != nil {
		r.failf("copying the storage directory of %s: %v", s.name, err)
	}
	r.sleep(age)
	r.each([]*chaosServer{s}, func(s *chaosServer) {
		if err := os.RemoveAll(filepath.Join(s.dir, "data")); err != nil {
			r.failf("%v", err)
		}
		if err := os.CopyFS(filepath.Join(s.dir, "data"), os.DirFS(copied)); err != nil {
			r.failf("restoring the storage directory of %s: %v", s.name, err)
		}
	})
	os.RemoveAll(copied)
}

// liveFS is a directory that is copied while a server writes to it. ReadDir leaves out temporary
// files, because they can disappear before they are read.
type liveFS struct{ fs.FS }

func (l liveFS) ReadDir(name string) ([]fs.DirEntry, error) {
	list, err := fs.ReadDir(l.FS, name)
	var there []fs.DirEntry
	for _, e := range list {
		if !strings.HasSuffix(e.Name(), ".tmp") {
			there = append(there, e)
		}
	}
	return there, err
}

// hurt damages every log of a server. It cuts every second log at a random byte, and zeroes a
// random page of 4 KiB in each of the others.
func (r *chaosRig) hurt(s *chaosServer) {
	logs, err := filepath.Glob(filepath.Join(s.dir, "data", "??", "*"+LogSuffix))
	if err != nil || len(logs) == 0 {
		r.failf("server %s has no logs to damage: %v", s.name, err)
	}
	for i, path := range logs {
		b, err := os.ReadFile(path)
		if err != nil {
			r.failf("%v", err)
		}
		if at := r.rnd.IntN(len(b)); i%2 == 0 {
			b = b[:at]
		} else {
			at &^= 4095
			clear(b[at:min(at+4096, len(b))])
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			r.failf("%v", err)
		}
	}
}

// logSizes returns the sizes of the logs of the given servers, by path.
func (r *chaosRig) logSizes(servers []*chaosServer) map[string]int {
	sizes := map[string]int{}
	for _, s := range servers {
		for path, data := range r.readLogs(s) {
			sizes[path] = len(data)
		}
	}
	return sizes
}

// readLogs returns the contents of a server's logs by path.
func (r *chaosRig) readLogs(s *chaosServer) map[string][]byte {
	logs := map[string][]byte{}
	paths, err := filepath.Glob(filepath.Join(s.dir, "data", "??", "*"+LogSuffix))
	for _, path := range paths {
		if err == nil {
			logs[path], err = os.ReadFile(path)
		}
	}
	if err != nil || len(logs) == 0 {
		r.failf("reading the logs of server %s: %v, %d logs", s.name, err, len(logs))
	}
	return logs
}

// powerCut cuts the power of all servers at once. Each log loses a random part of what it has beyond
// the size in flushed: the file ends earlier, or ends in zeros from a sector on. A log without a size
// in flushed may be missing too. After the restart no log with a size in flushed counts as damaged.
func (r *chaosRig) powerCut(flushed map[string]int) {
	young := 0 // number of logs without a size in flushed
	r.each(r.servers, func(s *chaosServer) {
		logs := r.readLogs(s)
		for _, path := range slices.Sorted(maps.Keys(logs)) {
			data, size := logs[path], flushed[path]
			if size == 0 {
				young++
			}
			cut := size + r.rnd.IntN(max(0, len(data)-size)+1)
			var err error
			switch n := r.rnd.IntN(4); {
			case n == 0 && size == 0:
				err = os.Remove(path)
			case n == 1:
				clear(data[min(len(data), (cut+diskSector-1)/diskSector*diskSector):])
				err = os.WriteFile(path, data, 0o600)
			default:
				err = os.Truncate(path, int64(min(cut, len(data))))
			}
			if err != nil {
				r.failf("cutting a log of server %s: %v", s.name, err)
			}
		}
	})
	if damaged, torn := r.sum("telemeter_store_logs_damaged_total"), r.sum("telemeter_store_logs_torn_total"); damaged > float64(young) || torn == 0 {
		r.failf("after a power cut, %v logs count as damaged and %v as torn; %d logs had nothing flushed", damaged, torn, young)
	}
}

// swap exchanges the storage directories of two servers.
func (r *chaosRig) swap(a, b *chaosServer) {
	moved := false
	r.each([]*chaosServer{a, b}, func(*chaosServer) {
		if moved {
			return
		}
		moved = true
		dirs := []string{filepath.Join(a.dir, "data"), filepath.Join(b.dir, "data")}
		for i, dir := range dirs { // copy, because a rename cannot move files between disks
			if err := os.CopyFS(filepath.Join(r.dir, fmt.Sprint("swap", 1-i)), os.DirFS(dir)); err != nil {
				r.failf("%v", err)
			}
		}
		for i, dir := range dirs {
			copied := filepath.Join(r.dir, fmt.Sprint("swap", i))
			if err := errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(copied)), os.RemoveAll(copied)); err != nil {
				r.failf("%v", err)
			}
		}
	})
}

func (r *chaosRig) sleep(d time.Duration) { time.Sleep(d) }

// away stops the central Prometheus and waits for d, so that backlogs of unread samples grow. It
// then calls the function while, and starts Prometheus again.
func (r *chaosRig) away(d time.Duration, while func()) {
	r.central.stop(syscall.SIGTERM)
	r.sleep(d)
	while()
	r.central.start()
}

// chaosRow is one scenario: faults that happen while sites push.
type chaosRow struct {
	name    string
	servers int  // number of servers that run at the beginning; 0 means all, and -n means all but n
	long    bool // left out of the short form of TestChaos; another scenario of that form has similar faults
	do      func(r *chaosRig, form chaosForm)
}

// chaosRows returns all scenarios of TestChaos.
func chaosRows() []chaosRow {
	// repeat returns a scenario that causes the faults in breaks one after another, again and
	// again, for the time form.lasts. The scenario then heals the network and frees all disks.
	repeat := func(breaks ...func(r *chaosRig)) func(r *chaosRig, form chaosForm) {
		return func(r *chaosRig, form chaosForm) {
			for i, begin := 0, time.Now(); time.Since(begin) < form.lasts; i++ {
				if breaks[i%len(breaks)](r); r.rnd.IntN(3) == 0 { // otherwise the next fault follows without a further pause
					r.pause(5 * time.Second)
				}
			}
			r.heal()
			for _, s := range r.servers {
				if s.full {
					r.fill(s, false)
				}
			}
		}
	}
	return []chaosRow{
		{"rolling", 0, false, func(r *chaosRig, form chaosForm) {
			for _, s := range r.servers {
				r.stop(s)
				r.start(s)
				r.ready(s)
			}
		}},
		{"kills", 0, false, repeat((*chaosRig).killOne)},
		{"partitions", 0, true, repeat((*chaosRig).partSome)},
		{"disks", 0, false, repeat((*chaosRig).killOne, (*chaosRig).partSome, (*chaosRig).fillOne)},
		{"lose one", 0, true, func(r *chaosRig, form chaosForm) { r.wipe(r.servers[r.rnd.IntN(len(r.servers))]) }},
		{"lose two", 0, true, func(r *chaosRig, form chaosForm) { r.wipe(r.servers[0], r.servers[2]) }},
		{"lose all", 0, true, func(r *chaosRig, form chaosForm) { r.wipe(r.servers...) }},
		{"lose one away", 0, true, func(r *chaosRig, form chaosForm) { r.away(form.away, func() { r.wipe(r.servers[0]) }) }},
		{"lose all away", 0, false, func(r *chaosRig, form chaosForm) {
			r.away(form.away, func() {
				r.wipe(r.servers...)
				r.sleep(form.away / 4)
			})
		}},
		{"old copy", 0, true, func(r *chaosRig, form chaosForm) { r.restore(r.servers[r.rnd.IntN(len(r.servers))], form.copyAge) }},
		{"old copy away", 0, false, func(r *chaosRig, form chaosForm) { r.away(0, func() { r.restore(r.servers[0], form.away) }) }},
		{"damage", 0, true, func(r *chaosRig, form chaosForm) { r.each(r.servers[:2], r.hurt) }},
		{"damage away", 0, false, func(r *chaosRig, form chaosForm) { r.away(form.away, func() { r.each(r.servers, r.hurt) }) }},
		{"power cut", 0, false, func(r *chaosRig, form chaosForm) {
			r.wait("every client knows a consumer", func() bool {
				return !slices.ContainsFunc(r.clientele, func(c *chaosClient) bool { return len(c.client.spool.Consumers()) == 0 })
			})
			r.wipe(r.servers[0]) // its logs are then created by clients that know a consumer, so that no part of them is flushed
			flushed := r.logSizes(r.servers[1:])
			r.away(form.away, func() { r.powerCut(flushed) })
		}},
		{"swap", 0, false, func(r *chaosRig, form chaosForm) { r.away(form.away/2, func() { r.swap(r.servers[0], r.servers[1]) }) }},
		{"wrong clock", -1, false, func(r *chaosRig, form chaosForm) {
			r.away(form.away, func() {
				last := r.servers[len(r.servers)-1]
				last.ahead = 3 * time.Hour
				r.start(last)
				r.ready(last)
			})
			r.sleep(form.away / 2)
		}},
		{"growth", 1, false, func(r *chaosRig, form chaosForm) {
			for n := 1; n < len(r.servers); n++ {
				r.start(r.servers[n])
				r.ready(r.servers[n])
				r.settled()
				r.sleep(2 * form.scrape)
			}
			for n := len(r.servers); n > form.shrink; n-- {
				r.stop(r.servers[n-1])
				r.settled()
			}
		}},
	}
}

// run starts the servers with which the scenario begins, calls load to start the sites, starts the
// central Prometheus, and then runs the scenario. It returns the rig. The sites, Prometheus and the
// servers that the scenario has not stopped still run.
func (row chaosRow) run(t *testing.T, form chaosForm, seed uint64, load func(r *chaosRig, every time.Duration)) *chaosRig {
	servers := form.servers
	if row.name == "growth" {
		servers = form.grow
	}
	r := newChaosRig(t, row.name, servers, form.sites, form.interval, seed)
	first := row.servers
	if first <= 0 {
		first += servers
	}
	for _, s := range r.servers[:first] {
		r.start(s)
	}
	r.settled()
	load(r, form.every)
	r.prometheus(form.scrape)
	r.came()
	r.begin = time.Now()
	row.do(r, form)
	r.sleep(form.scrape)
	return r
}

// chaosWithClients runs one scenario with sites that run the real client. It fails the test unless
// Prometheus has all samples in the end.
func chaosWithClients(t *testing.T, form chaosForm, row chaosRow, seed uint64) {
	row.run(t, form, seed, (*chaosRig).clients).drained()
}
