package main

// Thousands of sites in virtual time, after a server joins, after the center (the central
// Prometheus) was away, or after all servers lost their disks. The run measures which scrapes are
// sent again, how long it takes until the center has read everything, and how long new scrapes wait
// meanwhile. Clients, servers, stores, consumers and the ring are real. A request is a function
// call to the site's owner, or without a ring to the server in the URL. The processors and the disk
// of a server are simulated by channels and pauses.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"text/tabwriter"
	"time"
)

var stampedeFlag = flag.Int("stampede", 0, "run TestStampede at full length, with this number of sites; 0: a short run")

// Each site pushes stampedeSeries series, each of which stands for stampedeScale series. So the
// costs of samples are multiplied by stampedeScale, and the servers' limits on samples are divided
// by it.
const (
	stampedeSeries   = 5
	stampedeScale    = 40
	stampedeInterval = 2 * time.Minute
	stampedeScrape   = 30 * time.Second

	// The costs, except stampedeSync, are CPU time of one core. BenchmarkUpload measured 0.5 ms for
	// a push of 230 samples, and BenchmarkFederate 0.43 µs for each scraped sample, both compressed
	// with gzip. The TLS handshake of a request takes about 0.3 ms.
	stampedeCores   = 2
	stampedeRequest = 300 * time.Microsecond // CPU time of a request without its samples
	stampedePushed  = 2200 * time.Nanosecond // CPU time of a pushed sample
	stampedeScraped = 430 * time.Nanosecond  // CPU time of a scraped sample
	stampedeSync    = 5 * time.Millisecond   // duration of a sync of a server's disk
	stampedeDisk    = 16                     // maximum number of pushes that a server's disk syncs at the same time
)

// stampede is one run of the test, with its sites, servers and center.
type stampede struct {
	t       testing.TB
	ctx     context.Context
	running sync.WaitGroup
	keys    Keys
	servers []*stampedeServer
	sites   []*stampedeSite
	alone   bool // no ring: each server stores the pushes that it receives

	mu    sync.Mutex // guards the fields below, and the changing fields of servers and sites
	ring  *Ring
	away  bool      // the center is away
	since time.Time // time of the last call of mark
	stampedeFigures
}

// stampedeFigures are the counts since the last call of mark.
type stampedeFigures struct {
	pushes, questions, exchanges int // requests: with scrapes, without scrapes, and exchanges of tokens
	limited, overloaded, failed  int // requests that were answered 429, answered 503, or not answered

	again, samplesAgain   int // pushes with a scrape that a server had stored before, and the samples of such scrapes
	firstAgain, lastAgain time.Time

	waits []time.Duration // for each scrape made since the last mark: time until a server stored it for the first time
	late  time.Duration   // for the scrapes made before the last mark: time from that mark until the last of them was stored
	most  int             // highest number of requests to one server in a second
	held  int64           // highest number of samples in the store of one server
}

// stampedeServer is a server of the run. A request occupies a slot of cpu while it uses CPU time,
// and a push occupies a slot of disk while it is synced.
type stampedeServer struct {
	run       *stampede
	name      string
	server    *Server
	store     *Store
	external  http.Handler
	internal  http.Handler
	stop      context.CancelFunc
	cpu, disk chan struct{}

	up       bool
	starts   int
	second   int64 // Unix time of the newest request, in s
	inSecond int   // number of requests in that second
}

// stampedeSite is a site with its client. Slices are indexed by the scrapes of the source, counted
// from 0.
type stampedeSite struct {
	run    *stampede
	id     string
	key    uint64
	client *Client

	first   uint64 // number in the spool of the site's first scrape
	scraped []time.Time
	stored  []bool // a server has stored the scrape
	read    []bool // the center has read the scrape
	unread  int    // the center has read all scrapes before this index
}

// newStampede returns a run with four servers, and a center that scrapes the servers that are up.
// The first three servers are up; if ring is true, they form the ring. The sites do not run yet.
func newStampede(t testing.TB, ctx context.Context, sites int, ring bool) *stampede {
	s := &stampede{t: t, ctx: ctx, keys: testKeys(t, 1), alone: !ring, since: time.Now()}
	for i := range 4 {
		v := &stampedeServer{run: s, name: fmt.Sprint("s", i), cpu: make(chan struct{}, stampedeCores), disk: make(chan struct{}, stampedeDisk)}
		s.servers = append(s.servers, v)
		s.running.Go(func() { v.scrapes(stampedeScrape * time.Duration(i) / 4) })
	}
	s.each(3, (*stampedeServer).start)
	s.join(3)
	for i := range sites {
		s.sites = append(s.sites, newStampedeSite(s, i))
	}
	s.running.Go(s.watch)
	return s
}

func (s *stampede) each(n int, do func(v *stampedeServer)) {
	for _, v := range s.servers[:n] {
		do(v)
	}
}

// join makes the first n servers the members of the ring.
func (s *stampede) join(n int) {
	var claims []Claim
	for i, v := range s.servers[:n] {
		claims = append(claims, Claim{Slot: i, Lamport: uint64(i + 1), Name: v.name})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ring = NewRing(claims, n)
}

// start starts a server with an empty disk.
func (v *stampedeServer) start() {
	s := v.run
	store, err := OpenStore(StoreConfig{
		Retention: 2 * time.Hour, MaxSampleAge: 10 * time.Minute, LimitSeries: 20_000, LimitSites: 10_000,
		LimitSamples: 50_000_000 / stampedeScale, Now: time.Now, OnError: func(err error) { s.t.Error(err) },
	})
	if err != nil {
		s.t.Fatal(err)
	}
	v.server = NewServer(ServerConfig{
		Name: v.name, Store: store, Metrics: NewMetrics(), Log: slog.New(slog.DiscardHandler), Now: time.Now, MaxSampleAge: 10 * time.Minute,
		LimitBytes: 1 << 20, LimitScrape: 500_000 / stampedeScale, RateInterval: time.Second,
	})
	v.server.Reload(ReloadableServerConfig{Keys: s.keys, Normalizer: &ServerNormalizer{}})
	v.server.SetReady(true)
	v.server.federate.scraper.Owned = func(hash uint64) bool { return s.alone || s.owner(hash) == v }
	ctx, stop := context.WithCancel(s.ctx)
	s.running.Go(func() { store.Run(ctx) })
	s.mu.Lock()
	defer s.mu.Unlock()
	v.store, v.external, v.internal, v.stop, v.up = store, v.server.ExternalHandler(), v.server.InternalHandler(false), stop, true
	v.starts++
}

// kill stops a server. Its disk is lost.
func (v *stampedeServer) kill() {
	v.run.mu.Lock()
	defer v.run.mu.Unlock()
	v.stop()
	v.up = false
}

// owner returns the server that owns the site with the given key.
func (s *stampede) owner(hash uint64) *stampedeServer {
	s.mu.Lock()
	defer s.mu.Unlock()
	name, _ := s.ring.Owner(hash)
	i, _ := strconv.Atoi(name[1:])
	return s.servers[i]
}

// work uses one of the server's cores for the time d, after it has waited for a free core.
func (v *stampedeServer) work(d time.Duration) {
	v.cpu <- struct{}{}
	time.Sleep(d)
	<-v.cpu
}

// newStampedeSite returns site i, whose client pushes to three servers.
func newStampedeSite(s *stampede, i int) *stampedeSite {
	c := &stampedeSite{run: s, id: fmt.Sprintf("site-%05d", i)}
	c.key = SiteKey(c.id)
	from, _ := url.Parse("http://source.example/metrics")
	all, err := ParseSelectors([]string{`{__name__=~".+"}`})
	if err != nil {
		s.t.Fatal(err)
	}
	var to []string
	for j := range 3 {
		to = append(to, "https://"+s.servers[(i+j)%3].name)
	}
	c.client = NewClient(ClientConfig{
		From: from, To: to, ClusterID: c.id, Interval: stampedeInterval, ScrapeInterval: stampedeInterval, LimitBytes: 1 << 20,
		Metrics: NewMetrics(), Now: time.Now, Boot: testBoot(), Log: slog.New(slog.DiscardHandler),
		ToClient:   &http.Client{Transport: roundTrip(c.send), Timeout: attemptTimeout},
		FromClient: &http.Client{Transport: roundTrip(c.source)},
	})
	token := signToken(s.t, s.keys, Token{Kind: KindClient, ClusterID: c.id, ID: NewTokenID()})
	c.client.Reload(ClientReloadConfig{Token: token, Match: all, NewCleaner: func() *ClientCleaner { return &ClientCleaner{} }})
	if err := c.client.OpenSpool(SpoolConfig{Limit: 1 << 20, MaxAge: 2 * time.Hour}); err != nil {
		s.t.Fatal(err)
	}
	c.first = c.client.spool.nextNumber
	return c
}

// source answers as the site's Prometheus when the client scrapes it. The value of each sample is
// the index of the scrape.
func (c *stampedeSite) source(*http.Request) (*http.Response, error) {
	c.run.mu.Lock()
	n := len(c.scraped)
	c.scraped, c.stored, c.read = append(c.scraped, time.Now()), append(c.stored, false), append(c.read, false)
	c.run.mu.Unlock()
	var text bytes.Buffer
	for i := range stampedeSeries {
		fmt.Fprintf(&text, "s%d %d\n", i, n)
	}
	return respond(200, nil, text.String()), nil
}

// costlyBody is a request body that calls cost once, before Read returns the end of the body. The
// server then spends the cost while it counts the request among its requests in flight.
type costlyBody struct {
	io.ReadCloser
	cost func()
}

func (b *costlyBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && b.cost != nil {
		b.cost()
		b.cost = nil
	}
	return n, err
}

// stampedeAnswer is an http.ResponseWriter that records the answer.
type stampedeAnswer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (a *stampedeAnswer) Header() http.Header         { return a.header }
func (a *stampedeAnswer) Write(p []byte) (int, error) { return a.body.Write(p) }
func (a *stampedeAnswer) WriteHeader(code int)        { a.code = code }

var errStampede = errors.New("connection refused")

// send passes a request of the client to the site's owner, or without a ring to the server in the
// URL, and returns the answer. It counts the request and simulates its cost.
func (c *stampedeSite) send(r *http.Request) (*http.Response, error) {
	s := c.run
	v := s.owner(c.key)
	if s.alone {
		v = s.servers[int(r.URL.Host[1]-'0')]
	}
	names, _ := ParseScrapeNames(r.Header.Get(SpoolHeader))
	scrapes := 0
	for _, a := range names.Numbers {
		scrapes += int(a.To - a.From + 1)
	}
	s.mu.Lock()
	handler, starts := v.external, v.starts
	if !v.up {
		s.failed++
		s.mu.Unlock()
		return nil, errStampede
	}
	if now := time.Now().Unix(); now != v.second {
		v.second, v.inSecond = now, 0
	}
	v.inSecond++
	s.most = max(s.most, v.inSecond)
	switch {
	case r.URL.Path == "/authorize":
		s.exchanges++
	case scrapes == 0:
		s.questions++
	default:
		s.pushes++
	}
	s.mu.Unlock()
	in := r.Clone(r.Context())
	in.RemoteAddr = "192.0.2.1:1"
	if in.Body == nil {
		in.Body = http.NoBody
	}
	in.Body = &costlyBody{in.Body, func() {
		if scrapes > 0 {
			v.work(time.Duration(scrapes*stampedeSeries*stampedeScale) * stampedePushed)
			v.disk <- struct{}{}
			time.Sleep(stampedeSync)
			<-v.disk
		}
	}}
	v.work(stampedeRequest)
	a := &stampedeAnswer{header: http.Header{}, code: 200}
	handler.ServeHTTP(a, in)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !v.up || v.starts != starts {
		s.failed++
		return nil, errStampede
	}
	switch {
	case a.code == http.StatusTooManyRequests:
		s.limited++
	case a.code == http.StatusServiceUnavailable:
		s.overloaded++
	case a.code == 200 && scrapes > 0:
		c.stores(names.Numbers, a.body.Bytes())
	case a.code != 200:
		s.t.Errorf("a request for %s is answered %d: %s", r.URL.Path, a.code, a.body.Bytes())
	}
	return respond(a.code, a.header, a.body.String()), nil
}

// stores records which of the pushed scrapes a server has stored, according to the answer to the
// push. The caller holds the run's mu.
func (c *stampedeSite) stores(numbers Ranges, body []byte) {
	s := c.run
	var answer PushAnswer
	err := json.Unmarshal(body, &answer)
	var held, read Ranges
	if err == nil && answer.Held != nil {
		held, err = ParseRanges(*answer.Held, MaxRanges)
	}
	if err == nil && answer.Read != nil {
		read, err = ParseRanges(*answer.Read, MaxRanges)
	}
	if err != nil {
		s.t.Errorf("the answer %s to a push cannot be parsed: %v", body, err)
		return
	}
	now, again := time.Now(), 0
	for _, a := range numbers {
		for n := a.From; n <= a.To; n++ {
			i := int(n - c.first)
			switch {
			case c.stored[i]:
				again++
			case held.Has(n) || read.Has(n):
				c.stored[i] = true
				if c.scraped[i].Before(s.since) {
					s.late = max(s.late, now.Sub(s.since))
				} else {
					s.waits = append(s.waits, now.Sub(c.scraped[i]))
				}
			}
		}
	}
	if again > 0 {
		s.again++
		s.samplesAgain += again * stampedeSeries * stampedeScale
		if s.firstAgain.IsZero() {
			s.firstAgain = now
		}
		s.lastAgain = now
	}
}

// scrapes is the loop in which the center scrapes one server. The first scrape is due after wait.
// When the server is up for the first time, the loop skips one scrape, because the center has not
// discovered the server yet.
func (v *stampedeServer) scrapes(wait time.Duration) {
	s := v.run
	conn, starts, known := (*AnswerReadTracker)(nil), 0, false
	for {
		if _, ok := Sleep(s.ctx, wait, nil); !ok {
			break
		}
		wait = stampedeScrape
		s.mu.Lock()
		handler, present := v.internal, v.up && !s.away && known
		known = known || v.up
		if !present {
			conn = nil
		} else if conn == nil || starts != v.starts {
			conn, starts = &AnswerReadTracker{sequential: true}, v.starts
		}
		s.mu.Unlock()
		if !present {
			continue
		}
		r, _ := http.NewRequestWithContext(context.WithValue(s.ctx, connTrackerKey{}, conn), "GET", "http://x/federate?consumer=central", nil)
		r.RemoteAddr = "192.0.2.2:1"
		r.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", "10")
		w := &stampedeReader{v: v, header: http.Header{}}
		begin := time.Now()
		handler.ServeHTTP(w, r)
		v.work(w.cost)
		wait = stampedeScrape - time.Since(begin)
	}
}

// stampedeReader is an http.ResponseWriter that records which scrapes the center reads.
type stampedeReader struct {
	v      *stampedeServer
	header http.Header
	rest   []byte        // last line of the answer so far, while the line is incomplete
	cost   time.Duration // CPU time of the answer that work has not spent yet
}

func (w *stampedeReader) Header() http.Header { return w.header }
func (w *stampedeReader) WriteHeader(code int) {
	if code != 200 {
		w.v.run.t.Errorf("a scrape is answered %d", code)
	}
}

func (w *stampedeReader) Write(p []byte) (int, error) {
	w.rest = append(w.rest, p...)
	s := w.v.run
	s.mu.Lock()
	for {
		line, rest, ok := bytes.Cut(w.rest, []byte("\n"))
		if !ok {
			break
		}
		w.rest = rest
		w.cost += stampedeScraped
		if len(line) < 3 || line[0] != 's' || line[2] != '{' {
			continue
		}
		w.cost += (stampedeScale - 1) * stampedeScraped
		if line[1] != '0' {
			continue
		}
		_, id, _ := bytes.Cut(line, []byte(`_id="site-`))
		_, value, _ := bytes.Cut(line, []byte("} "))
		value, _, _ = bytes.Cut(value, []byte(" "))
		i, err := strconv.Atoi(string(id[:5]))
		n, err2 := strconv.Atoi(string(value))
		if err = errors.Join(err, err2); err != nil {
			s.t.Errorf("the line %q of a scrape cannot be parsed: %v", line, err)
			continue
		}
		s.sites[i].read[n] = true
	}
	s.mu.Unlock()
	if w.cost > 5*time.Millisecond {
		w.v.work(w.cost)
		w.cost = 0
	}
	return len(p), nil
}

// watch looks at the number of samples in each store every 5 seconds, and records the highest in
// held.
func (s *stampede) watch() {
	for {
		if _, ok := Sleep(s.ctx, 5*time.Second, nil); !ok {
			break
		}
		s.mu.Lock()
		for _, v := range s.servers {
			if v.up {
				s.held = max(s.held, v.store.totals.Samples.Load()*stampedeScale)
			}
		}
		s.mu.Unlock()
	}
}

// setAway makes the center stop all its scrapes, or resume them.
func (s *stampede) setAway(away bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = away
}

// begin starts the clients of all sites at once.
func (s *stampede) begin() {
	for _, c := range s.sites {
		s.running.Go(func() { c.client.Run(s.ctx) })
	}
}

// mark returns the counts since the last call, and starts counting anew.
func (s *stampede) mark() stampedeFigures {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.stampedeFigures
	s.stampedeFigures = stampedeFigures{}
	slices.Sort(f.waits)
	s.since = time.Now()
	return f
}

// settle waits until no spool has a scrape from before the call of settle. The test fails if this
// takes longer than limit. empty is the time that this took. read is the time until the center had
// read all scrapes that were made before the call, but not before the time from. settle checks both
// every 15 s.
func (s *stampede) settle(from time.Time, limit time.Duration) (empty, read time.Duration) {
	begin := time.Now()
	for time.Since(begin) < limit {
		time.Sleep(15 * time.Second)
		left := 0
		for _, c := range s.sites {
			c.client.spool.mu.Lock()
			if e := c.client.spool.index.entries; len(e) > 0 && e[0].At.Wall < begin.UnixMilli() {
				left++
			}
			c.client.spool.mu.Unlock()
		}
		if n := s.gaps(from, begin); n > 0 {
			read = time.Since(begin)
		}
		if left == 0 {
			return time.Since(begin), read
		}
	}
	s.t.Errorf("after %v a spool still has scrapes from before the call of settle", limit)
	return limit, read
}

// gaps counts the scrapes that were made in the interval [from, before), and that the center has
// not read.
func (s *stampede) gaps(from, before time.Time) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.sites {
		for c.unread < len(c.read) && c.read[c.unread] {
			c.unread++
		}
		for i := c.unread; i < len(c.read) && c.scraped[i].Before(before); i++ {
			if !c.read[i] && !c.scraped[i].Before(from) {
				n++
			}
		}
	}
	return n
}

// unstored counts the scrapes made before the given time that no server has stored.
func (s *stampede) unstored(before time.Time) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.sites {
		for i, stored := range c.stored {
			if !stored && c.scraped[i].Before(before) {
				n++
			}
		}
	}
	return n
}

// stampedeWait returns the quantile q of the waits, which must be sorted.
func stampedeWait(waits []time.Duration, q float64) time.Duration {
	if len(waits) == 0 {
		return 0
	}
	return waits[min(len(waits)-1, int(q*float64(len(waits))))].Round(time.Millisecond)
}

// stampedeTable prints the figures of a run, with one row for each phase.
type stampedeTable struct{ *tabwriter.Writer }

func newStampedeTable() stampedeTable {
	return stampedeTable{tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)}
}

func (w stampedeTable) head() {
	fmt.Fprintln(w, "\tpushes\tquestions\texchanges\t429\t503\tfailed\tsent again\tsamples\tover\twait p50\tp99\tmax\tolder\tmost a second\tmost held\t")
}

func (w stampedeTable) row(phase string, f stampedeFigures, remark string) {
	fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%v\t%v\t%v\t%v\t%v\t%d\t%d\t%s\n", phase, f.pushes, f.questions, f.exchanges, f.limited, f.overloaded,
		f.failed, f.again, f.samplesAgain, f.lastAgain.Sub(f.firstAgain).Round(time.Second), stampedeWait(f.waits, .5), stampedeWait(f.waits, .99),
		stampedeWait(f.waits, 1), f.late.Round(time.Millisecond), f.most, f.held, remark)
}

// stampedeCase is a disturbance of the run: the center or the servers are away, or a server joins.
type stampedeCase struct {
	name string
	away time.Duration // how long the center is away; 0: it is not away
	lost time.Duration // how long all servers are then down, with their disks lost, while the center is still away; 0: they stay up
	join bool          // a fourth server joins, after the other disturbances of the case, if it has any
	ring bool
	long bool // the case needs a run at full length
}

// After a server joins, or after the center or all servers were away, the servers store every
// scrape, and the center reads every scrape within retention. A new scrape waits at most maxBackoff
// and a second until it is stored. With a ring, at most as many pushes repeat a stored scrape as
// there are sites. A short run has 100 sites, and the center and the servers are away for a tenth
// of the time.
func TestStampede(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(200)) // fewer garbage collections, because each site has a large gzip.Writer
	sites, long := 100, *stampedeFlag > 0
	if long {
		sites = *stampedeFlag
	}
	table := newStampedeTable()
	for _, c := range []stampedeCase{
		{name: "a server joins", ring: true, join: true},
		{name: "center away for 2h", ring: true, away: 2 * time.Hour, long: true},
		{name: "center away for 30m, disks lost", ring: true, away: 30 * time.Minute, lost: 5 * time.Minute},
		{name: "center away for 40m, no ring", away: 40 * time.Minute, long: true},
	} {
		if c.long && !long {
			continue
		}
		if !long {
			c.away, c.lost = c.away/10, c.lost/10
		}
		t.Run(c.name, func(t *testing.T) {
			begin := time.Now()
			table.head()
			synctest.Test(t, func(t *testing.T) { c.run(t, table, sites) })
			if long {
				fmt.Fprintf(table, "took %v\n", time.Since(begin).Round(time.Second))
			}
			if long || testing.Verbose() {
				table.Flush()
			}
		})
	}
}

// run lets the sites push for some minutes, makes the disturbance of the case, waits until all
// sites and the center have caught up, and checks the figures.
func (c stampedeCase) run(t *testing.T, table stampedeTable, sites int) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := newStampede(t, ctx, sites, c.ring)
	s.begin()
	time.Sleep(3 * time.Second)
	table.row("first 3 s", s.mark(), "")
	time.Sleep(time.Minute)
	table.row("next minute", s.mark(), "")
	time.Sleep(3*stampedeInterval + 10*time.Second)
	table.row("steady state", s.mark(), "")
	if c.away > 0 {
		s.setAway(true)
		time.Sleep(c.away)
		table.row("center away", s.mark(), "")
	}
	if c.lost > 0 {
		s.each(3, (*stampedeServer).kill)
		time.Sleep(c.lost)
		table.row("servers down", s.mark(), "")
		s.each(3, (*stampedeServer).start)
	}
	if c.join {
		s.servers[3].start()
		s.join(4)
	}
	s.setAway(false)
	at := time.Now()
	// Scrapes that were made before the time oldest may expire before the center scrapes again.
	oldest := at.Add(-2*time.Hour + 2*stampedeInterval)
	empty, read := s.settle(oldest, 3*time.Hour)
	f := s.mark()
	table.row(c.name, f, fmt.Sprintf("spools empty after %v, all read after %v, too old for the center: %d", empty, read, s.gaps(time.Time{}, oldest)))
	if n := s.unstored(at); n > 0 {
		t.Errorf("no server has stored %d scrapes", n)
	}
	if n := s.gaps(oldest, at); n > 0 {
		t.Errorf("the center has not read %d scrapes", n)
	}
	if c.ring && (f.again > sites || f.questions > 2*sites) {
		t.Errorf("%d sites made %d pushes of scrapes that were stored before, and asked %d questions", sites, f.again, f.questions)
	}
	if wait := stampedeWait(f.waits, 1); wait > maxBackoff+time.Second {
		t.Errorf("a new scrape waited %v until a server stored it", wait)
	}
	cancel()
	s.running.Wait()
}
