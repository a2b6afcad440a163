package main

// Rigs of the client's tests: servers that record what a client sends, a source, clients in virtual
// time, and a spool on a disk in memory.

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// roundTrip is an http.RoundTripper made of one function, so that clients run in virtual time
// without a network.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// respond returns an HTTP response. A nil header means an empty header.
func respond(status int, header http.Header, body string) *http.Response {
	if header == nil {
		header = http.Header{}
	}
	return &http.Response{
		StatusCode: status, Status: fmt.Sprintf("%d %s", status, http.StatusText(status)), Header: header,
		Body: io.NopCloser(strings.NewReader(body)), ProtoMajor: 1, ProtoMinor: 1,
	}
}

// fakeHub is a server that records the requests that it receives. It accepts every push unless the
// field answer decides otherwise. It does not support spools: its answers do not list the scrapes
// that it holds.
type fakeHub struct {
	t         testing.TB
	mu        sync.Mutex                           // guards asked, asks, bodies, at and hosts while a client runs
	asked     []time.Time                          // times of the requests for /authorize
	bodies    []string                             // decompressed bodies of the accepted pushes
	at        []time.Time                          // arrival times of all pushes
	hosts     []string                             // host to which each push was sent
	asks      []time.Time                          // arrival times of questions (pushes without scrapes)
	expires   int                                  // lifetime of the upload tokens that it issues, in seconds
	tellsTime bool                                 // answers state the server's time and name
	answer    func(r *http.Request) *http.Response // answers a push; a nil response accepts the push; the function may be nil
}

func (h *fakeHub) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch r.URL.Path {
	case "/authorize":
		h.asked = append(h.asked, time.Now())
		if got := r.Header.Get("Authorization"); got != "Bearer client-token" || r.URL.Query().Get("id") != "site" {
			h.t.Errorf("/authorize with Authorization %q and query %q", got, r.URL.RawQuery)
		}
		return respond(200, nil, fmt.Sprintf(`{"version":1,"token":"upload-%d","expiresInSeconds":%d,"labels":{"_id":"site"}%s}`, len(h.asked), h.expires, h.clock(r))), nil
	case "/upload":
		if names, err := ParseScrapeNames(r.Header.Get(SpoolHeader)); err != nil || names.SpoolID == 0 || len(names.Numbers) == 0 && r.ContentLength != 0 {
			if r.Header.Get(SpoolHeader) != "" {
				h.t.Errorf("a push has the scrape names %q: %v", r.Header.Get(SpoolHeader), err)
			}
		} else if len(names.Numbers) == 0 {
			h.asks = append(h.asks, time.Now())
			return respond(200, nil, `{"accepted":0,"duplicates":0,"dropped":{}`+h.clock(r)+`}`), nil
		}
		h.hosts = append(h.hosts, r.URL.Host)
		h.at = append(h.at, time.Now())
		if h.answer != nil {
			if resp := h.answer(r); resp != nil {
				return resp, nil
			}
		}
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(z)
		if err != nil {
			return nil, err
		}
		h.bodies = append(h.bodies, string(b))
		return respond(200, nil, `{"accepted":1,"duplicates":0,"dropped":{}`+h.clock(r)+`}`), nil
	}
	h.t.Errorf("unexpected request for %s", r.URL)
	return respond(404, nil, ""), nil
}

// clock returns the JSON fields of an answer that state the server's name and time. It returns ""
// if tellsTime is false.
func (h *fakeHub) clock(r *http.Request) string {
	if !h.tellsTime {
		return ""
	}
	return fmt.Sprintf(`,"server":%q,"time":%d`, r.URL.Host, time.Now().UnixMilli())
}

// testBoot returns a boot-time clock that shows 1000 s when testBoot is called. Its boot ID is
// boot-1.
func testBoot() func() (int64, string) {
	start := time.Now()
	return func() (int64, string) { return time.Since(start).Milliseconds() + 1_000_000, "boot-1" }
}

// newTestClient returns a client whose source is an exporter with this text, the hub that the
// client pushes to, and the client's log. The spool is in memory. change, which may be nil, changes
// the configuration first.
func newTestClient(t testing.TB, text string, change func(*ClientConfig, *ClientReloadConfig)) (*Client, *fakeHub, *logBuffer) {
	t.Helper()
	return newSpoolClient(t, text, SpoolConfig{}, change)
}

// newSpoolClient is newTestClient with a spool that the caller configures, apart from its limits of
// size and age.
func newSpoolClient(t testing.TB, text string, spool SpoolConfig, change func(*ClientConfig, *ClientReloadConfig)) (*Client, *fakeHub, *logBuffer) {
	t.Helper()
	hub := &fakeHub{t: t, expires: 3600}
	var log logBuffer
	from, _ := url.Parse("http://source.example/metrics")
	all, err := ParseSelectors([]string{`{__name__=~".+"}`})
	if err != nil {
		t.Fatal(err)
	}
	cfg := ClientConfig{
		From: from, To: []string{"https://a.example", "https://b.example"}, ClusterID: "site", Interval: 2 * time.Minute,
		LimitBytes: 1 << 20, Metrics: NewMetrics(), Now: time.Now, Boot: testBoot(),
		Log:        slog.New(slog.NewTextHandler(&log, nil)),
		ToClient:   &http.Client{Transport: hub},
		FromClient: &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) { return respond(200, nil, text), nil })},
	}
	st := ClientReloadConfig{Token: "client-token", Match: all, NewCleaner: func() *ClientCleaner { return &ClientCleaner{} }}
	if change != nil {
		change(&cfg, &st)
	}
	if cfg.ScrapeInterval == 0 {
		cfg.ScrapeInterval = cfg.Interval
	}
	c := NewClient(cfg)
	c.Reload(st)
	spool.Limit, spool.MaxAge = 1<<30, 2*time.Hour
	if err := c.OpenSpool(spool); err != nil {
		t.Fatal(err)
	}
	return c, hub, &log
}

func runFor(t *testing.T, c *Client, d time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := c.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

// startClient runs the client c in the background. The returned function stops the client and waits
// until Run has returned.
func startClient(t *testing.T, c *Client) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// counting is a source with a single sample, of the metric n. The value of the sample is the number
// of scrapes that the source has answered so far. The source records the times of these scrapes.
type counting struct {
	hang  atomic.Bool   // scrapes hang until their context ends
	extra time.Duration // how far the time in the Date header is ahead of the true time
	date  bool          // answers have a Date header
	mu    sync.Mutex    // guards at while a client runs
	at    []time.Time   // when each scrape was answered
}

func (s *counting) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.at)
}

func (s *counting) RoundTrip(r *http.Request) (*http.Response, error) {
	if s.hang.Load() {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = append(s.at, time.Now())
	header := http.Header{}
	if s.date {
		header.Set("Date", time.Now().Add(s.extra).UTC().Format(http.TimeFormat))
	}
	return respond(200, header, fmt.Sprintf("n %d\n", len(s.at))), nil
}

// received returns the values of the samples of metric n in all accepted pushes, in the order of
// their arrival.
func (h *fakeHub) received() (ns []int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for line := range strings.Lines(strings.Join(h.bodies, "")) {
		f := strings.Fields(line)
		n, err := strconv.Atoi(f[1])
		if err != nil || f[0] != "n" {
			h.t.Errorf("received the line %q, want a sample of n", line)
		}
		ns = append(ns, n)
	}
	return ns
}

// pushes returns the number of accepted pushes.
func (h *fakeHub) pushes() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.bodies)
}

// upTo returns the numbers from 1 to n.
func upTo(n int) (ns []int) {
	for i := range n {
		ns = append(ns, i+1)
	}
	return ns
}

// diskSpool returns the configuration of a spool in the directory /s of a new crashFS, which is a
// disk in memory.
func diskSpool() SpoolConfig { return SpoolConfig{FS: newCrashFS(1, "/s"), Dir: "/s"} }

// spoolAll adds a scrape with each of these texts to the client's spool. It waits a minute after
// each Add.
func spoolAll(t *testing.T, c *Client, texts ...string) {
	t.Helper()
	for _, text := range texts {
		at := c.moment()
		if err := c.spool.Add(Scrape{At: at, SourceTime: at.Wall, Samples: strings.Count(text, "\n"), Size: len(text), Gzip: Gzip([]byte(text))}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
	}
}

// answerByText makes the hub answer a push by its decompressed text. If by returns nil, the hub
// accepts the push.
func (h *fakeHub) answerByText(by func(text string) *http.Response) {
	h.answer = func(r *http.Request) *http.Response {
		var b bytes.Buffer
		b.ReadFrom(r.Body)
		r.Body = respond(200, nil, b.String()).Body
		var d Decompressor
		text, _, err := d.Decompress(b.Bytes(), "gzip", 1<<20)
		if err != nil {
			return respond(400, nil, err.Error())
		}
		return by(string(text))
	}
}

// sizedHub makes the hub answer 413 to pushes whose text is longer than limit bytes, and 400 to
// pushes whose text contains "bad".
func sizedHub(hub *fakeHub, limit int) {
	hub.answerByText(func(text string) *http.Response {
		switch {
		case len(text) > limit:
			return respond(413, nil, "too long")
		case strings.Contains(text, "bad"):
			return respond(400, nil, "bad line")
		}
		return nil
	})
}

// queueServer is a server that supports spools. It holds the scrapes that an accepted push names.
// The method consume marks all held scrapes as read. The server records each request to /upload as
// an event: "ask" for a question, or the values of the pushed samples, such as "1 2".
type queueServer struct {
	t           *testing.T
	ahead       time.Duration      // how far the server's clock is ahead of the true time
	limit       int                // bytes of a push's text above which the server answers 413; 0 means no limit
	noSpools    bool               // the server does not support spools: its answers list no scrapes
	noConsumers bool               // the server knows no consumer: its answers list no read scrapes
	down        atomic.Bool        // the server cannot be reached
	lostAnswers int                // number of coming answers that are lost after the server has acted on the request
	declines    func(string) bool  // reports whether the server drops the samples of a scrape with this text; nil means never
	consumers   []ConsumerAge      // the consumers that the server's answers list
	unavailable int                // number of coming requests to /upload that the server answers with 503
	onRequest   func(event string) // called when a push or question has been processed, before the answer is sent; may be nil

	mu         sync.Mutex    // guards the fields below
	held, read Ranges        // numbers of the scrapes that the server holds, and of the scrapes that every consumer has read
	names      Ranges        // numbers of the scrapes that pushes have named, except pushes answered 413 or 503
	events     []string      // one for each request to /upload since the last call of expect
	at         []time.Time   // time of each event
	headers    []http.Header // HTTP header of each event's request
	texts      []string      // decompressed text of each event's push; "" for a question
}

func (q *queueServer) serve(r *http.Request) (*http.Response, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.down.Load() {
		return nil, errors.New("no route to host")
	}
	clock := fmt.Sprintf(`"server":%q,"time":%d`, r.URL.Host, time.Now().Add(q.ahead).UnixMilli())
	if r.URL.Path == "/authorize" {
		return respond(200, nil, `{"version":1,"token":"t","expiresInSeconds":600000,`+clock+`}`), nil
	}
	names, err := ParseScrapeNames(r.Header.Get(SpoolHeader))
	body, readErr := io.ReadAll(r.Body)
	if err != nil || readErr != nil {
		q.t.Errorf("reading a push: scrape names: %v; body: %v", err, readErr)
	}
	if len(body) == 0 && (len(names.Numbers) > 0 || names.SpoolID == 0 || r.Header.Get("Content-Encoding") != "") {
		q.t.Errorf("a question must name a spool without numbers and have no encoding; its header is %v", r.Header)
	}
	event, text := "ask", ""
	if len(body) > 0 {
		var unpack Decompressor
		b, _, err := unpack.Decompress(body, "gzip", 1<<20)
		if err != nil {
			q.t.Error(err)
		}
		text = string(b)
		var ns []string
		for line := range strings.Lines(text) {
			ns = append(ns, strings.Fields(line)[1])
		}
		event = strings.Join(ns, " ")
	}
	q.events, q.at = append(q.events, event), append(q.at, time.Now())
	q.headers, q.texts = append(q.headers, r.Header), append(q.texts, text)
	if q.limit > 0 && len(text) > q.limit {
		return respond(413, nil, "too large"), nil
	}
	if q.unavailable > 0 {
		q.unavailable--
		return respond(503, http.Header{"Retry-After": {"5"}}, "overloaded"), nil
	}
	lines := slices.Collect(strings.Lines(text))
	for _, a := range names.Numbers {
		q.names = q.names.Add(a.From, a.To)
		for n := a.From; n <= a.To; n++ {
			var line string
			if len(lines) > 0 {
				// Only the function declines uses this line. The tests that set declines push
				// scrapes of one sample each, so the line belongs to scrape n.
				line, lines = lines[0], lines[1:]
			}
			if !q.read.Has(n) && (q.declines == nil || !q.declines(line)) {
				q.held = q.held.Add(n, n)
			}
		}
	}
	if q.onRequest != nil {
		q.onRequest(event)
	}
	if q.lostAnswers > 0 {
		q.lostAnswers--
		return nil, errors.New("connection reset")
	}
	var b strings.Builder
	fmt.Fprintf(&b, `{"accepted":1,"duplicates":0,"dropped":{},%s`, clock)
	if !q.noSpools && names.SpoolID != 0 {
		fmt.Fprintf(&b, `,"held":%q`, q.held)
		if !q.noConsumers {
			fmt.Fprintf(&b, `,"read":%q,"consumers":%q`, q.read, FormatConsumers(q.consumers))
		}
	}
	return respond(200, nil, b.String()+"}"), nil
}

// consume marks every scrape that the server holds as read by every consumer. The server then no
// longer holds these scrapes.
func (q *queueServer) consume() {
	for _, a := range q.held {
		q.read = q.read.Add(a.From, a.To)
	}
	q.held = nil
}

// expect fails the test unless the events since the previous call of expect equal want. It then
// forgets the events. The parameter what names the situation in the failure message.
func (q *queueServer) expect(what string, want ...string) {
	q.t.Helper()
	if !slices.Equal(q.events, want) {
		q.t.Errorf("%s: got the requests %q, want %q", what, q.events, want)
	}
	q.events, q.at, q.headers, q.texts = nil, nil, nil, nil
}

// newQueueClient returns a client and its log. The client pushes to the given servers, whose URLs
// are https://a.example, https://b.example and so on, in this order.
func newQueueClient(t *testing.T, spool SpoolConfig, servers []*queueServer, change func(*ClientConfig)) (*Client, *logBuffer) {
	t.Helper()
	c, _, log := newSpoolClient(t, "", spool, func(cfg *ClientConfig, _ *ClientReloadConfig) {
		cfg.To = nil
		hosts := map[string]*queueServer{}
		for i, q := range servers {
			host := string(rune('a'+i)) + ".example"
			q.t, hosts[host] = t, q
			cfg.To = append(cfg.To, "https://"+host)
		}
		cfg.ToClient = &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) { return hosts[r.URL.Host].serve(r) })}
		if change != nil {
			change(cfg)
		}
	})
	return c, log
}

// spoolOnes adds one scrape to the client's spool for each number in ns. The scrape has a single
// sample of metric n with that number as its value. spoolOnes waits a minute after each scrape.
func spoolOnes(t *testing.T, c *Client, ns ...int) {
	t.Helper()
	for _, n := range ns {
		spoolAll(t, c, fmt.Sprintf("n %d\n", n))
	}
}

func mustDrain(t *testing.T, c *Client) {
	t.Helper()
	if err := c.pusher.DrainSpool(t.Context()); err != nil {
		t.Error(err)
	}
}

// expectSpool fails the test unless the spool has these numbers of scrapes in the states
// undelivered, held and elsewhere.
func expectSpool(t *testing.T, what string, c *Client, undelivered, held, elsewhere int) {
	t.Helper()
	st := c.spool.Stats()
	if got, want := [...]int{st.ByState[0].Scrapes, st.ByState[1].Scrapes, st.ByState[2].Scrapes}, [...]int{undelivered, held, elsewhere}; got != want {
		t.Errorf("%s: the spool has %v undelivered, held and elsewhere scrapes, want %v", what, got, want)
	}
}

// spoolRig is a spool on a crashFS, a disk in memory. The test sets the spool's clocks in the field
// now. The rig records the errors and drops that the spool reports.
type spoolRig struct {
	t              *testing.T
	fs             *crashFS
	cfg            SpoolConfig
	spool          *Spool
	now            Moment         // the moment that the spool's clocks show
	errs           []error        // errors that the spool reported to OnError
	droppedSamples map[string]int // number of samples that the spool reported to OnDrop, by reason
	dropCalls      int            // number of calls of OnDrop
}

// newSpoolRig returns a rig with an open spool. change, which may be nil, changes the configuration
// first.
func newSpoolRig(t *testing.T, change func(*SpoolConfig)) *spoolRig {
	r := &spoolRig{t: t, fs: newCrashFS(1, "/s"), now: Moment{Wall: 1, Boot: 5_000_000, BootID: "boot-1"}, droppedSamples: map[string]int{}}
	r.cfg = SpoolConfig{FS: r.fs, Dir: "/s", ClusterID: "site", Limit: 1 << 30, MaxAge: 2 * time.Hour}
	if change != nil {
		change(&r.cfg)
	}
	r.cfg.Now = func() Moment { return r.now }
	r.cfg.OnError = func(err error) { r.errs = append(r.errs, err) }
	r.cfg.OnDrop = func(reason string, _, samples int) { r.droppedSamples[reason] += samples; r.dropCalls++ }
	r.open()
	return r
}

// open opens the spool. If the rig already has a spool, the new Spool replaces it, as after a
// restart of the client.
func (r *spoolRig) open() {
	r.t.Helper()
	s, err := OpenSpool(r.cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.spool = s
}

// later moves the spool's wall clock and boot-time clock ahead by d.
func (r *spoolRig) later(d time.Duration) {
	r.now.Wall += d.Milliseconds()
	r.now.Boot += d.Milliseconds()
}

// files returns the names of all files of the spool except its record.
func (r *spoolRig) files() []string { return spoolFiles(r.fs) }

// spoolFiles returns the names of all files on a disk except the record of the spool in /s.
func spoolFiles(c *crashFS) []string {
	return slices.DeleteFunc(c.names(), func(name string) bool { return name == "/s/"+spoolMetaName })
}

// scrape returns a scrape with the given number of lines, each of which is a sample. The label n of
// each sample has the value n, by which tests recognize the scrape.
func (r *spoolRig) scrape(n, lines int) Scrape {
	var text []byte
	for i := range lines {
		text = fmt.Appendf(text, "s{n=\"%d\",i=\"%d\"} 1 %d\n", n, i, r.now.Wall)
	}
	return Scrape{At: r.now, SourceTime: r.now.Wall + 77, Samples: lines, Size: len(text), Gzip: Gzip(text)}
}

// add adds a scrape to the spool. The scrape has three samples, whose label n has the value n.
func (r *spoolRig) add(n int) error { return r.spool.Add(r.scrape(n, 3)) }

// mustAdd adds a scrape for each of these values of the label n, as add does. It fails the test if
// the spool returns an error.
func (r *spoolRig) mustAdd(ns ...int) {
	r.t.Helper()
	for _, n := range ns {
		if err := r.add(n); err != nil {
			r.t.Fatal(err)
		}
	}
}

// noLimits lets a push have all scrapes of a spool.
var noLimits = PushLimits{Bytes: 1 << 40, Text: 1 << 40, Scrapes: 1 << 30}

// numbers returns the value of the label n of each scrape. It fails the test unless the text of
// each scrape fits the scrape's fields Samples and Size.
func numbers(t *testing.T, scrapes []Scrape) (ns []int) {
	t.Helper()
	for _, sc := range scrapes {
		text := gunzipped(t, sc.Gzip)
		if len(text) != sc.Size || bytes.Count(text, []byte("\n")) != sc.Samples {
			t.Errorf("a scrape of %d samples and %d bytes has the text %q", sc.Samples, sc.Size, text)
		}
		n := -1
		fmt.Sscanf(string(text), "s{n=\"%d\"", &n)
		ns = append(ns, n)
	}
	return ns
}

// nextPush begins the next push and returns its scrapes. If the next step of the spool is to ask
// the server, nextPush first applies the answer of a server that does not support spools. It fails
// the test if BeginPush returns an error.
func (r *spoolRig) nextPush(l PushLimits) []Scrape {
	r.t.Helper()
	if step, _ := r.spool.NextStep(); step == StepAsk {
		r.spool.ApplyAnswer(SpoolAnswer{})
	}
	got, err := r.spool.BeginPush(l)
	if err != nil {
		r.t.Fatal(err)
	}
	return got
}

// drain pushes all scrapes in the spool and returns the values of the label n in each push. The
// simulated server answers 200 and does not support spools, so each push removes its scrapes from
// the spool.
func (r *spoolRig) drain(l PushLimits) (pushes [][]int) {
	r.t.Helper()
	for {
		got := r.nextPush(l)
		if len(got) == 0 {
			return pushes
		}
		pushes = append(pushes, numbers(r.t, got))
		r.spool.ApplyAnswer(SpoolAnswer{})
	}
}

// expect fails the test unless got and want have the same JSON encoding. The parameter what names
// the value in the failure message.
func (r *spoolRig) expect(what string, got any, want any) {
	r.t.Helper()
	g, _ := json.Marshal(got)
	w, _ := json.Marshal(want)
	if !bytes.Equal(g, w) {
		r.t.Errorf("%s: got %s, want %s", what, g, w)
	}
}
