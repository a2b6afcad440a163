package main

// Sites that run the real client, with a spool each, while the servers' disks are removed, replaced
// by an old copy, cut short, damaged or swapped. In the end the central Prometheus has every
// sample that a source ever gave, and nothing else.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
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

// chaosClient is a site with a client, and the source that it scrapes.
type chaosClient struct {
	n       int
	metrics *Metrics
	client  *Client
	dry     atomic.Bool // the source gives no samples any more

	mu   sync.Mutex // guards the rest
	gave map[int64]bool
	log  bytes.Buffer
}

// Write takes the client's log.
func (c *chaosClient) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.log.Write(b)
}

// RoundTrip answers a scrape, as the source.
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

// keeps reports whether the spool has a sample.
func (c *chaosClient) keeps() bool {
	c.client.spool.mu.Lock()
	defer c.client.spool.mu.Unlock()
	return slices.ContainsFunc(c.client.spool.index.entries, func(e spoolEntry) bool { return e.Samples > 0 })
}

// clients makes a client for each site and runs it. Each tries the servers from another one
// on.
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
			Interval: every, ScrapeInterval: every, LimitBytes: 1 << 20, Metrics: c.metrics, Log: slog.New(slog.NewTextHandler(c, nil)),
			Now: time.Now, Boot: NewBootClock(os.ReadFile).Now,
		})
		c.client.Reload(ClientReloadConfig{Token: r.sites[n].token, NewCleaner: func() *ClientCleaner { return &ClientCleaner{} }})
		if err := c.client.OpenSpool(SpoolConfig{FS: DiskFS{}, Dir: filepath.Join(r.dir, "spools", fmt.Sprint(n)), Limit: 64 << 20, MaxAge: 2 * time.Hour}); err != nil {
			r.t.Fatal(err)
		}
		r.clientele = append(r.clientele, c)
		r.pushing.Go(func() {
			c.client.Run(ctx) // an error is the spool's, and is in its metrics
			c.client.Close()
		})
	}
}

// prometheus starts a central Prometheus that scrapes every server.
func (r *chaosRig) prometheus(every time.Duration) {
	var targets []string
	for _, s := range r.servers {
		targets = append(targets, s.addr+":9004")
	}
	r.central = newOutagePrometheus(r.t, strings.Join(targets, "', '"), "central", outageWindow, every)
	r.central.start()
}

// came waits until the central Prometheus has a sample of every site.
func (r *chaosRig) came() {
	r.t.Helper()
	r.wait("first scrapes", func() bool {
		got, _, err := r.central.query(`chaos_total{k="0"}`, "_id")
		return err == nil && len(got) == len(r.sites)
	})
}

// clientSum adds up a metric of all clients.
func (r *chaosRig) clientSum(metric string) (sum float64) {
	for _, c := range r.clientele {
		var b bytes.Buffer
		c.metrics.WriteText(&b)
		sum += metricSum(b.Bytes(), metric)
	}
	return sum
}

// chaosResult is what the central Prometheus has of what the sources gave.
type chaosResult struct {
	samples, missing, strange, twice int
	site                             int // one with missing samples
}

// compare asks the central Prometheus for everything. given has the times at which each
// site's source gave samples.
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

// drained ends the sources, waits until no spool has a sample, which is when the clients
// know that every consumer has read everything, and compares what the central Prometheus has.
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
			t.Logf("%s said:\n%s", s.name, text[max(0, len(text)-6000):])
		}
		log := r.clientele[d.site].log.Bytes()
		t.Logf("the client of site %d said:\n%s", d.site, log[max(0, len(log)-6000):])
		t.Errorf("%s (SEED=%d): %+v, %v; clients dropped %v; Prometheus said %s", r.name, r.seed, d, err, lost, strings.Join(bad, ""))
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

// each kills servers, does something to the disk of each, and starts them again.
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

// restore replaces a server's storage directory by a copy that was taken a while ago.
func (r *chaosRig) restore(s *chaosServer, age time.Duration) {
	copied := filepath.Join(r.dir, "copy")
	if err := os.CopyFS(copied, liveFS{os.DirFS(filepath.Join(s.dir, "data"))}); err != nil {
		r.failf("copying: %v", err)
	}
	r.sleep(age)
	r.each([]*chaosServer{s}, func(s *chaosServer) {
		if err := os.RemoveAll(filepath.Join(s.dir, "data")); err != nil {
			r.failf("%v", err)
		}
		if err := os.CopyFS(filepath.Join(s.dir, "data"), os.DirFS(copied)); err != nil {
			r.failf("restoring: %v", err)
		}
	})
	os.RemoveAll(copied)
}

// liveFS is a directory that a process writes to. A file that goes while it is read is left
// out, as a copy of a live directory leaves it out.
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

// hurt cuts every other log of a server short at a random place, and zeroes a page of the
// others.
func (r *chaosRig) hurt(s *chaosServer) {
	logs, err := filepath.Glob(filepath.Join(s.dir, "data", "??", "*"+LogSuffix))
	if err != nil || len(logs) == 0 {
		r.failf("%s has no logs: %v", s.name, err)
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

// swap exchanges the storage directories of two servers.
func (r *chaosRig) swap(a, b *chaosServer) {
	moved := false
	r.each([]*chaosServer{a, b}, func(*chaosServer) {
		if moved {
			return
		}
		moved = true
		dirs := []string{filepath.Join(a.dir, "data"), filepath.Join(b.dir, "data")}
		for i, dir := range dirs { // on different disks, so copied
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

// sleep lets the load go on for a while.
func (r *chaosRig) sleep(d time.Duration) { time.Sleep(d) }

// away runs while the central Prometheus is away, and backlogs grow.
func (r *chaosRig) away(d time.Duration, while func()) {
	r.central.stop(syscall.SIGTERM)
	r.sleep(d)
	while()
	r.central.start()
}

// chaosRow is one thing that is done to servers while sites push.
type chaosRow struct {
	name    string
	servers int  // that run at first; 0: all
	long    bool // for the full form alone
	do      func(r *chaosRig, form chaosForm)
}

func chaosRows() []chaosRow {
	repeat := func(breaks ...func(r *chaosRig)) func(r *chaosRig, form chaosForm) {
		return func(r *chaosRig, form chaosForm) {
			for i, begin := 0, time.Now(); time.Since(begin) < form.lasts; i++ {
				if breaks[i%len(breaks)](r); r.rnd.IntN(3) == 0 { // else the next comes on top
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

// run does the row to servers while load pushes to them and a Prometheus scrapes them.
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

// chaosWithClients does one row to servers whose sites run the real client.
func chaosWithClients(t *testing.T, form chaosForm, row chaosRow, seed uint64) {
	row.run(t, form, seed, (*chaosRig).clients).drained()
}
