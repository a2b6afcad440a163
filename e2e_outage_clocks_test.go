package main

// A test with sites whose clocks are wrong, are set, and lose their time at a reboot, while the
// owners of sites change and answers are lost. The central Prometheus must have each scrape once,
// at the time at which it was made. The clients run in this process, where the test can set their
// clocks. The servers and Prometheus are real. "make test-outage" runs the test.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	clockSeries = 5                // number of series of each site
	clockExact  = 3 * time.Second  // allowed error of a corrected time, because Date headers have whole seconds
	clockQuiet  = time.Second / 4  // least time between a scrape and setting a clock
	clockUptime = 10 * time.Second // uptime of a machine when its client starts
)

// clockSite is a site whose source has a wrong clock. Its client runs in this process. The site is
// also the source, as the http.RoundTripper of the client's scrapes.
type clockSite struct {
	t    *testing.T
	id   string // cluster ID
	dir  string // directory of the spool
	cfg  ClientConfig
	st   ClientReloadConfig
	log  logBuffer
	host bool // source and client share one clock; otherwise the source sends its clock as Date

	client *Client
	end    func() // stops the client and waits until it has ended

	mu     sync.Mutex    // guards the fields below
	off    time.Duration // how far the source's clock is ahead; negative if it is behind
	booted time.Time     // when the client's machine was booted
	boots  int           // number of boots of that machine so far
	dry    bool          // the source returns no samples any more
	said   []time.Time   // true time of each scrape that was answered with samples; the samples of scrape i have the value i+1
}

// RoundTrip answers a scrape as the source.
func (s *clockSite) RoundTrip(req *http.Request) (*http.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	clock := now.Add(s.off)
	header := http.Header{"Content-Type": {"text/plain; version=0.0.4"}}
	if !s.host {
		header.Set("Date", clock.UTC().Format(http.TimeFormat))
	}
	var body []byte
	if !s.dry {
		s.said = append(s.said, now)
		for k := range clockSeries {
			body = fmt.Appendf(body, "clock_total{k=\"%d\"} %d %d\n", k, len(s.said), clock.UnixMilli())
		}
	}
	return &http.Response{
		StatusCode: http.StatusOK, Status: "200 OK", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: req,
		Header: header, Body: io.NopCloser(bytes.NewReader(body)),
	}, nil
}

// now returns the time of the client's wall clock.
func (s *clockSite) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.host {
		return time.Now().Add(s.off)
	}
	return time.Now()
}

// boot returns the time since boot of the client's machine, and the ID of the boot.
func (s *clockSite) boot() (ms int64, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return (time.Since(s.booted) + clockUptime).Milliseconds(), fmt.Sprint("boot-", s.boots)
}

// all returns the true times of all scrapes that the source has answered so far.
func (s *clockSite) all() []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.said)
}

// step sets the source's clock ahead by a duration (back if negative), at a moment between two
// scrapes. A step during a scrape would make a client that shares the clock measure a wrong
// duration of the scrape, because the faked time has no monotonic clock.
func (s *clockSite) step(by time.Duration) {
	for deadline := time.Now().Add(outagePatience); ; time.Sleep(10 * time.Millisecond) {
		s.mu.Lock()
		passed := time.Since(s.said[len(s.said)-1])
		quiet := passed > clockQuiet && passed < time.Second-clockQuiet
		if quiet {
			s.off += by
		}
		s.mu.Unlock()
		if quiet {
			return
		}
		if time.Now().After(deadline) {
			s.t.Errorf("site %s: no moment without a scrape within %v", s.id, outagePatience)
			return
		}
	}
}

// start boots the client's machine and starts the client.
func (s *clockSite) start() {
	s.mu.Lock()
	s.boots++
	s.booted = time.Now()
	s.mu.Unlock()
	s.cfg.Metrics = NewMetrics()
	s.client = NewClient(s.cfg)
	s.client.Reload(s.st)
	if err := s.client.OpenSpool(SpoolConfig{FS: DiskFS{}, Dir: s.dir, Limit: 64 << 20, MaxAge: 2 * time.Hour}); err != nil {
		s.t.Error(err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.client.Run(ctx) // always returns nil; the client counts and logs its failures
		s.client.Close()
	}()
	s.end = sync.OnceFunc(func() { cancel(); <-ended })
}

// clockRig has some sites, two servers that can join and leave, and a central Prometheus.
type clockRig struct {
	t          *testing.T
	dir        string
	sites      []*clockSite
	servers    []*clockServer
	prometheus *outagePrometheus
	scrapes    int // a step of the test waits until each site has made this many more scrapes
	outOfOrder int // samples that Prometheus refused as out of order in earlier phases
}

// clockServer is a server, with a proxy between it and the clients.
type clockServer struct {
	name     string
	listen   string // address on which the server accepts pushes, which come through the proxy
	internal string // address for scrapers
	ring     string // address for gossip and forwarding
	push     *outageProxy
	p        *process // nil until the server is first started
}

// start starts a server. It joins the servers that were started before.
func (r *clockRig) start(s *clockServer) {
	args := []string{"--mode", "server", "--name", s.name, "--keys", "keys", "--storage-dir", s.name, "--ratelimit", "0",
		"--listen", s.listen, "--listen-internal", s.internal, "--listen-cluster", s.ring, "--gossip-interval", "300ms"}
	for _, other := range r.servers {
		if other.p != nil && other != s {
			args = append(args, "--join", other.ring)
		}
	}
	s.p = start(r.t, r.dir, args...)
}

// agree waits until each of these servers has a ring with len(servers) members.
func (r *clockRig) agree(servers ...*clockServer) {
	r.t.Helper()
	eventually(r.t, "the servers agree on the ring", func() bool {
		for _, s := range servers {
			resp, err := http.Get("http://" + s.internal + "/debug/ring")
			if err != nil {
				return false
			}
			var d debugRing
			err = json.NewDecoder(resp.Body).Decode(&d)
			if resp.Body.Close(); err != nil || len(d.slots()) != len(servers) {
				return false
			}
		}
		return true
	})
}

// each calls do for all sites concurrently, because do may wait for a scrape.
func (r *clockRig) each(do func(s *clockSite)) {
	var all sync.WaitGroup
	for _, s := range r.sites {
		all.Go(func() { do(s) })
	}
	all.Wait()
}

// more waits until every source has been scraped n more times.
func (r *clockRig) more(n int) {
	r.t.Helper()
	r.each(func(s *clockSite) {
		want := len(s.all()) + n
		deadline := time.Now().Add(outagePatience)
		for len(s.all()) < want && time.Now().Before(deadline) {
			time.Sleep(10 * time.Millisecond)
		}
		if len(s.all()) < want {
			r.t.Errorf("site %s: not %d more scrapes within %v", s.id, n, outagePatience)
		}
	})
}

// clockDiff compares the samples in Prometheus with the scrapes of the sources.
type clockDiff struct {
	samples   int // number of samples that belong to a scrape
	missing   int // number of scrapes without a sample
	duplicate int // number of additional samples of scrapes that already have a sample
	wrong     int // number of samples that belong to no scrape or whose time is not the time of their scrape
}

// whole reports whether Prometheus has every scrape exactly once, at the right time.
func (d clockDiff) whole() bool { return d.samples > 0 && d.missing+d.duplicate+d.wrong == 0 }

// compareClocks compares the samples of one series with the true times of the scrapes. The value of
// a sample is the number of its scrape; the first scrape has number 1.
func compareClocks(said []time.Time, got map[int64]float64) (d clockDiff) {
	times := make([]int, len(said))
	for ms, v := range got {
		n := int(v)
		if n > len(said) { // the sample belongs to a scrape that was made after said was copied
			continue
		}
		if n < 1 || time.UnixMilli(ms).Sub(said[n-1]).Abs() > clockExact {
			d.wrong++
			if n < 1 {
				continue
			}
		}
		d.samples++
		times[n-1]++
	}
	for _, n := range times {
		if n == 0 {
			d.missing++
		} else {
			d.duplicate += n - 1
		}
	}
	return d
}

// compare compares the samples of all series in Prometheus with said, which has the true times of
// the scrapes of each site.
func (r *clockRig) compare(said map[string][]time.Time) (d clockDiff, err error) {
	for k := range clockSeries {
		got, twice, err := r.prometheus.query(fmt.Sprintf("clock_total{k=\"%d\"}[3h]", k), "_id")
		if err != nil {
			return d, err
		}
		d.duplicate += twice
		for id, times := range said {
			one := compareClocks(times, got[id])
			d = clockDiff{d.samples + one.samples, d.missing + one.missing, d.duplicate + one.duplicate, d.wrong + one.wrong}
		}
	}
	return d, nil
}

// settled waits until Prometheus has all scrapes that were made before the call. It reports an
// error unless Prometheus has every scrape exactly once. It prints the result of the comparison;
// name and begin are the name and the start of the current phase of the test, for the printed line.
func (r *clockRig) settled(name string, begin time.Time) {
	t := r.t
	t.Helper()
	up := time.Now()
	said := map[string][]time.Time{}
	for _, s := range r.sites {
		said[s.id] = s.all()
	}
	var d clockDiff
	var err error
	for deadline := up.Add(outagePatience); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if d, err = r.compare(said); err == nil && d.whole() {
			break
		}
	}
	outOfOrder, bad := r.prometheus.log()
	fmt.Printf("clocks: %-52s %4.0f s, whole after %5.1f s: samples %6d, missing %d, duplicate %d, wrong %d, refused as out of order %d\n",
		name+",", up.Sub(begin).Seconds(), time.Since(up).Seconds(), d.samples, d.missing, d.duplicate, d.wrong, outOfOrder-r.outOfOrder)
	r.outOfOrder = outOfOrder
	if err != nil || !d.whole() {
		t.Errorf("%s: Prometheus has %+v, %v", name, d, err)
	}
	if len(bad) > 0 {
		t.Errorf("%s: faults in the log of Prometheus:\n%s", name, strings.Join(bad, ""))
	}
}

// newClockRig returns a rig in which nothing runs yet. In half of the sites, the client and the
// source share one clock. When both servers run, each owns half of the sites.
func newClockRig(t *testing.T, sites int) *clockRig {
	r := &clockRig{t: t, dir: t.TempDir()}
	mustTool(t, r.dir, "--mode", "keygen", "--keys", "keys")
	keys, err := readKeyFile(filepath.Join(r.dir, "keys"), TokenKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	var to []string
	for _, name := range []string{"a", "b"} {
		s := &clockServer{name: name, listen: freeAddr(t), internal: freeAddr(t), ring: freeAddr(t)}
		s.push = newOutageProxy(t, s.listen)
		to = append(to, "http://"+s.push.addr())
		r.servers = append(r.servers, s)
	}
	from, err := url.Parse("http://source.invalid/metrics")
	if err != nil {
		t.Fatal(err)
	}
	both := NewRing([]Claim{{Slot: 0, Lamport: 1, Name: "a"}, {Slot: 1, Lamport: 2, Name: "b"}}, 2)
	for n, i := 0, 0; n < sites; i++ {
		id := fmt.Sprint("site-", i)
		if owner, _ := both.Owner(SiteKey(id)); owner != r.servers[n%2].name {
			continue
		}
		token, err := keys.Sign(Token{Kind: KindClient, ClusterID: id, ID: NewTokenID()})
		if err != nil {
			t.Fatal(err)
		}
		s := &clockSite{t: t, id: id, dir: filepath.Join(r.dir, "spools", id), host: n/2%2 == 0, off: -10 * time.Minute, end: func() {}}
		s.st = ClientReloadConfig{Token: token, NewCleaner: func() *ClientCleaner { return &ClientCleaner{} }}
		s.cfg = ClientConfig{
			From: from, FromClient: &http.Client{Transport: s}, To: []string{to[n/4%2], to[1-n/4%2]}, ToClient: NewHTTPClient(nil, 15*time.Second, time.Minute),
			ClusterID: id, Interval: 2 * time.Second, ScrapeInterval: time.Second, LimitBytes: 1 << 20,
			Log: slog.New(slog.NewTextHandler(&s.log, nil)), Now: s.now, Boot: s.boot,
		}
		r.sites = append(r.sites, s)
		n++
	}
	t.Cleanup(func() {
		r.each(func(s *clockSite) { s.end() })
		if text := r.sites[0].log.String(); t.Failed() {
			t.Logf("end of the log of the client of %s:\n%s", r.sites[0].id, text[max(0, len(text)-4000):])
		}
	})
	r.prometheus = newOutagePrometheus(t, r.servers[0].internal+"', '"+r.servers[1].internal, "central", outageWindow, outageTimeout)
	return r
}

// loseAnswers makes the proxy of each server reset the next connection on which the server answers
// a client, so that the answer is lost. It does so twice, and waits for more scrapes each time.
func (r *clockRig) loseAnswers() {
	r.t.Helper()
	for range 2 {
		for _, s := range r.servers {
			s.push.cut(0, 1)
		}
		r.more(r.scrapes)
	}
}

// scrapedBeforeServer starts the sites, whose clocks are ten minutes behind, while no push reaches
// the first server. So the clients make scrapes before they know the time of a server.
func (r *clockRig) scrapedBeforeServer() {
	r.t.Helper()
	a := r.servers[0]
	r.start(a)
	r.agree(a)
	r.prometheus.start()
	a.push.set("refuse")
	begin := time.Now()
	r.each((*clockSite).start)
	r.more(r.scrapes)
	a.push.set("")
	r.settled("ten minutes behind, scraped before a server is heard", begin)
}

// setBack sets the clocks of all sources back after the second server has joined and before it
// leaves.
func (r *clockRig) setBack() {
	r.t.Helper()
	a, b := r.servers[0], r.servers[1]
	begin := time.Now()
	r.start(b)
	r.agree(a, b)
	r.each(func(s *clockSite) { s.step(-7 * time.Minute) })
	r.loseAnswers()
	b.p.end(syscall.SIGTERM)
	r.more(r.scrapes)
	r.settled("set back by 7 minutes, a server joins and leaves", begin)
}

// setForward sets the clocks of all sources forward while the second server joins.
func (r *clockRig) setForward() {
	r.t.Helper()
	a, b := r.servers[0], r.servers[1]
	begin := time.Now()
	r.start(b)
	r.loseAnswers()
	r.each(func(s *clockSite) { s.step(25 * time.Minute) })
	r.agree(a, b)
	r.loseAnswers()
	r.settled("set forward by 25 minutes, a server joins", begin)
}

// bootTwice boots the machine of every client twice while no server can be reached. At the first
// boot the clocks are set back by 28 minutes. The clients reach a server only after the second
// boot, and learn only then how wrong the times of their earlier scrapes are. Meanwhile Prometheus
// is stopped and the first server is killed.
func (r *clockRig) bootTwice() {
	r.t.Helper()
	a, b := r.servers[0], r.servers[1]
	begin := time.Now()
	r.prometheus.stop(syscall.SIGTERM)
	r.loseAnswers()
	for _, s := range r.servers {
		s.push.set("refuse")
	}
	r.more(r.scrapes)
	r.each(func(s *clockSite) {
		s.end()
		s.mu.Lock()
		s.off -= 28 * time.Minute
		s.mu.Unlock()
		s.start()
	})
	r.more(r.scrapes)
	a.p.end(syscall.SIGKILL)
	r.each(func(s *clockSite) { s.end(); s.start() })
	b.push.set("")
	r.more(r.scrapes)
	r.start(a)
	a.push.set("")
	r.prometheus.start()
	r.more(r.scrapes)
	r.settled("booted twice while cut off, a server and Prometheus gone", begin)
}

// drained stops the sources and waits until every spool is empty.
func (r *clockRig) drained() {
	r.t.Helper()
	begin := time.Now()
	r.each(func(s *clockSite) {
		s.mu.Lock()
		s.dry = true
		s.mu.Unlock()
	})
	for _, s := range r.sites {
		eventually(r.t, "the spool of "+s.id+" is empty", func() bool {
			s.client.spool.mu.Lock()
			defer s.client.spool.mu.Unlock()
			return !slices.ContainsFunc(s.client.spool.index.entries, func(e spoolEntry) bool { return e.Samples > 0 })
		})
	}
	r.settled("every spool is empty", begin)
}

// checkMetrics reports an error if a client dropped samples, if a client's metric of the source
// clock's error is wrong, or if a server stored no samples.
func (r *clockRig) checkMetrics() {
	t := r.t
	t.Helper()
	for _, s := range r.sites {
		var m bytes.Buffer
		s.cfg.Metrics.WriteText(&m)
		dropped, off := metricSum(m.Bytes(), "telemeter_samples_dropped_total"), metricSum(m.Bytes(), "telemeter_source_clock_offset_seconds")
		if want := -s.off.Seconds(); dropped > 0 || off < want-clockExact.Seconds() || off > want+clockExact.Seconds() {
			t.Errorf("site %s: %v samples were dropped, want 0; the client measures that the source's clock is behind by %v s, want %v s", s.id, dropped, off, want)
		}
	}
	for _, s := range r.servers {
		if n := metricSum([]byte(get(t, "http://"+s.internal+"/metrics")), "telemeter_samples_accepted_total"); n == 0 {
			t.Errorf("server %s stored no samples", s.name)
		}
	}
}

// Prometheus has each sample once, within 3 s of its true time, even if the clocks of sources and
// clients are wrong, are set, or lose their time at a reboot. Meanwhile servers join and leave, and
// answers of servers are lost.
func TestOutageClocks(t *testing.T) {
	sites, scrapes := 8, 3
	if outageForm(t) {
		sites, scrapes = 16, 20
	}
	r := newClockRig(t, sites)
	r.scrapes = scrapes
	r.scrapedBeforeServer()
	r.setBack()
	r.setForward()
	r.bootTwice()
	r.drained()
	r.checkMetrics()
}

// compareClocks counts scrapes that are missing, scrapes that Prometheus has at two times, and
// samples that have a wrong time. It ignores the samples of scrapes that were made later.
func TestOutageClocksComparison(t *testing.T) {
	begin := time.UnixMilli(1_700_000_000_000)
	said := []time.Time{begin, begin.Add(time.Second), begin.Add(2 * time.Second)}
	at := func(d time.Duration) int64 { return begin.Add(d).UnixMilli() }
	for name, test := range map[string]struct {
		got  map[int64]float64
		want clockDiff
	}{
		"whole":        {map[int64]float64{at(0): 1, at(time.Second): 2, at(2 * time.Second): 3}, clockDiff{samples: 3}},
		"later scrape": {map[int64]float64{at(0): 1, at(time.Second): 2, at(2 * time.Second): 3, at(3 * time.Second): 4}, clockDiff{samples: 3}},
		"missing":      {map[int64]float64{at(0): 1, at(2 * time.Second): 3}, clockDiff{samples: 2, missing: 1}},
		"no samples":   {nil, clockDiff{missing: 3}},
		"two times":    {map[int64]float64{at(0): 1, at(time.Millisecond): 1, at(time.Second): 2, at(2 * time.Second): 3}, clockDiff{samples: 4, duplicate: 1}},
		"wrong time":   {map[int64]float64{at(0): 1, at(time.Second): 2, at(2*time.Second - 10*time.Minute): 3}, clockDiff{samples: 3, wrong: 1}},
		"wrong value":  {map[int64]float64{at(0): 1, at(time.Second): 2, at(2 * time.Second): 3, at(3 * time.Second): 0}, clockDiff{samples: 3, wrong: 1}},
	} {
		if d := compareClocks(said, test.got); d != test.want || d.whole() != (d.missing+d.duplicate+d.wrong == 0) {
			t.Errorf("%s: got %+v, whole %v; want %+v", name, d, d.whole(), test.want)
		}
	}
}
