package main

// Sites whose clocks are wrong, are set and start anew with their machines, while the owner of each
// site changes and answers are lost. The central Prometheus has each scrape once, at the time at
// which it was made. The clients run in this process, where their clocks can be set, against real
// servers and a real Prometheus; run by make test-outage.

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
	clockSeries = 5                // of a site
	clockExact  = 3 * time.Second  // by which a time may be off: Date has whole seconds
	clockQuiet  = time.Second / 4  // after a scrape, and before the next, in which a clock may be set
	clockUptime = 10 * time.Second // of a machine when its client starts
)

// clockSite is a site whose source's clock is off. Its client runs in this process.
type clockSite struct {
	t    *testing.T
	id   string
	dir  string // of the spool
	cfg  ClientConfig
	st   ClientReloadConfig
	log  process // takes the client's log
	host bool    // the source is on the client's machine; else it tells of a clock of its own

	client *Client
	end    func() // of the client

	mu     sync.Mutex    // guards the rest
	off    time.Duration // of the source's clock
	booted time.Time
	boots  int
	dry    bool        // the source gives no samples any more
	said   []time.Time // when each scrape was made; its values are 1, 2, …
}

// RoundTrip answers a scrape, as the source.
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

// now is the client's wall clock.
func (s *clockSite) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.host {
		return time.Now().Add(s.off)
	}
	return time.Now()
}

// boot is the client's boot-time clock.
func (s *clockSite) boot() (ms int64, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return (time.Since(s.booted) + clockUptime).Milliseconds(), fmt.Sprint("boot-", s.boots)
}

func (s *clockSite) all() []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.said)
}

// step sets the source's clock. The client's own, if that is the same, must not be set in
// the middle of a scrape: a Time that is made up cannot tell the client that the time which
// passed is another one.
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
			s.t.Errorf("%s: no time without a scrape", s.id)
			return
		}
	}
}

// start starts the client, on a machine that was just booted.
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
		s.client.Run(ctx) // an error is the spool's, and is in its metrics
		s.client.Close()
	}()
	s.end = sync.OnceFunc(func() { cancel(); <-ended })
}

// clockRig is some sites, two servers that may come and go, and a Prometheus.
type clockRig struct {
	t          *testing.T
	dir        string
	sites      []*clockSite
	servers    []*clockServer
	prometheus *outagePrometheus
	outOfOrder int // samples that were refused as such before this row
}

// clockServer is a server, and the network between it and the clients.
type clockServer struct {
	name, listen, internal, ring string
	push                         *outageProxy
	p                            *process
}

// start starts a server that joins those that were started before.
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

// agree waits until so many servers have one ring.
func (r *clockRig) agree(servers ...*clockServer) {
	r.t.Helper()
	eventually(r.t, "servers agree", func() bool {
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

// each does something to every site at once, as the time that it takes is that of a scrape.
func (r *clockRig) each(do func(s *clockSite)) {
	var all sync.WaitGroup
	for _, s := range r.sites {
		all.Go(func() { do(s) })
	}
	all.Wait()
}

// more waits until every source has been scraped some more times.
func (r *clockRig) more(n int) {
	r.t.Helper()
	r.each(func(s *clockSite) {
		want := len(s.all()) + n
		deadline := time.Now().Add(outagePatience)
		for len(s.all()) < want && time.Now().Before(deadline) {
			time.Sleep(10 * time.Millisecond)
		}
		if len(s.all()) < want {
			r.t.Errorf("%s: not %d more scrapes within %v", s.id, n, outagePatience)
		}
	})
}

// clockDiff is what the central Prometheus has of what the sources said. duplicate counts
// samples of a scrape that are there at another time as well, wrong those that are not of
// the time of their scrape.
type clockDiff struct{ samples, missing, duplicate, wrong int }

func (d clockDiff) whole() bool { return d.samples > 0 && d.missing+d.duplicate+d.wrong == 0 }

// compareClocks compares the samples of one series with the times of the scrapes.
func compareClocks(said []time.Time, got map[int64]float64) (d clockDiff) {
	times := make([]int, len(said))
	for ms, v := range got {
		n := int(v)
		if n > len(said) { // said since
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

// compare compares all series with the times of the scrapes by site.
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

// settled waits until the central Prometheus has all that was said so far, and says how it
// was.
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
		t.Errorf("%s: %+v %v", name, d, err)
	}
	if len(bad) > 0 {
		t.Errorf("%s: Prometheus said\n%s", name, strings.Join(bad, ""))
	}
}

// newClockRig makes sites of both kinds, of which each server owns half once both are
// there. Nothing runs yet.
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
		if text := r.sites[0].log.text(); t.Failed() {
			t.Logf("the client of %s said at the end:\n%s", r.sites[0].id, text[max(0, len(text)-4000):])
		}
	})
	r.prometheus = newOutagePrometheus(t, r.servers[0].internal+"', '"+r.servers[1].internal, "central", outageWindow, outageTimeout)
	return r
}

// Clocks of sources and clients that are wrong, are set, and start anew move no sample and
// make none come twice, though servers come, go and lose answers meanwhile.
func TestOutageClocks(t *testing.T) {
	sites, scrapes := 8, 3
	if outageForm(t) {
		sites, scrapes = 16, 20
	}
	r := newClockRig(t, sites)
	a, b := r.servers[0], r.servers[1]
	loseAnswers := func() {
		for range 2 {
			for _, s := range []*clockServer{a, b} {
				s.push.cut(0, 1)
			}
			r.more(scrapes)
		}
	}
	r.start(a)
	r.agree(a)
	r.prometheus.start()
	a.push.set("refuse")
	begin := time.Now()
	r.each((*clockSite).start)
	r.more(scrapes)
	a.push.set("")
	r.settled("ten minutes behind, scraped before a server is heard", begin)

	begin = time.Now()
	r.start(b)
	r.agree(a, b)
	r.each(func(s *clockSite) { s.step(-7 * time.Minute) })
	loseAnswers()
	b.p.end(syscall.SIGTERM)
	r.more(scrapes)
	r.settled("set back by 7 minutes, a server joins and leaves", begin)

	begin = time.Now()
	r.start(b)
	loseAnswers()
	r.each(func(s *clockSite) { s.step(25 * time.Minute) })
	r.agree(a, b)
	loseAnswers()
	r.settled("set forward by 25 minutes, a server joins", begin)

	// At the first boot the clock has lost its time. Nobody hears a server until the second.
	begin = time.Now()
	r.prometheus.stop(syscall.SIGTERM)
	loseAnswers()
	for _, s := range r.servers {
		s.push.set("refuse")
	}
	r.more(scrapes)
	r.each(func(s *clockSite) {
		s.end()
		s.mu.Lock()
		s.off -= 28 * time.Minute
		s.mu.Unlock()
		s.start()
	})
	r.more(scrapes)
	a.p.end(syscall.SIGKILL)
	r.each(func(s *clockSite) { s.end(); s.start() })
	b.push.set("")
	r.more(scrapes)
	r.start(a)
	a.push.set("")
	r.prometheus.start()
	r.more(scrapes)
	r.settled("booted twice while cut off, a server and Prometheus gone", begin)

	begin = time.Now()
	r.each(func(s *clockSite) {
		s.mu.Lock()
		s.dry = true
		s.mu.Unlock()
	})
	for _, s := range r.sites {
		eventually(t, "the spool of "+s.id+" is empty", func() bool {
			s.client.spool.mu.Lock()
			defer s.client.spool.mu.Unlock()
			return !slices.ContainsFunc(s.client.spool.index.entries, func(e spoolEntry) bool { return e.Samples > 0 })
		})
	}
	r.settled("every spool is empty", begin)
	for _, s := range r.sites {
		var m bytes.Buffer
		s.cfg.Metrics.WriteText(&m)
		dropped, off := metricSum(m.Bytes(), "telemeter_samples_dropped_total"), metricSum(m.Bytes(), "telemeter_source_clock_offset_seconds")
		if want := -s.off.Seconds(); dropped > 0 || off < want-clockExact.Seconds() || off > want+clockExact.Seconds() {
			t.Errorf("%s: %v samples were dropped; the source's clock is said to be behind by %v s, want %v", s.id, dropped, off, want)
		}
	}
	for _, s := range r.servers {
		if n := metricSum([]byte(get(t, "http://"+s.internal+"/metrics")), "telemeter_samples_accepted_total"); n == 0 {
			t.Errorf("server %s took no samples", s.name)
		}
	}
}

// The comparison sees what is missing, what is there at two times, and what is at a wrong one.
func TestOutageClocksComparison(t *testing.T) {
	begin := time.UnixMilli(1_700_000_000_000)
	said := []time.Time{begin, begin.Add(time.Second), begin.Add(2 * time.Second)}
	at := func(d time.Duration) int64 { return begin.Add(d).UnixMilli() }
	for name, test := range map[string]struct {
		got  map[int64]float64
		want clockDiff
	}{
		"whole":       {map[int64]float64{at(0): 1, at(time.Second): 2, at(2 * time.Second): 3}, clockDiff{samples: 3}},
		"said since":  {map[int64]float64{at(0): 1, at(time.Second): 2, at(2 * time.Second): 3, at(3 * time.Second): 4}, clockDiff{samples: 3}},
		"missing":     {map[int64]float64{at(0): 1, at(2 * time.Second): 3}, clockDiff{samples: 2, missing: 1}},
		"no series":   {nil, clockDiff{missing: 3}},
		"two times":   {map[int64]float64{at(0): 1, at(time.Millisecond): 1, at(time.Second): 2, at(2 * time.Second): 3}, clockDiff{samples: 4, duplicate: 1}},
		"wrong time":  {map[int64]float64{at(0): 1, at(time.Second): 2, at(2*time.Second - 10*time.Minute): 3}, clockDiff{samples: 3, wrong: 1}},
		"wrong value": {map[int64]float64{at(0): 1, at(time.Second): 2, at(2 * time.Second): 3, at(3 * time.Second): 0}, clockDiff{samples: 3, wrong: 1}},
	} {
		if d := compareClocks(said, test.got); d != test.want || d.whole() != (d.missing+d.duplicate+d.wrong == 0) {
			t.Errorf("%s: %+v, want %+v", name, d, test.want)
		}
	}
}
