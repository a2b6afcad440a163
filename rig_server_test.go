package main

// The rig of server tests: a server whose two listeners are real HTTP listeners on 127.0.0.1, and
// helpers that push, scrape and check answers. The clock of the server stands still unless a test
// moves it. newVirtualRig makes a server without listeners whose clock is time.Now.

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

const (
	protoType  = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
	omType     = "application/openmetrics-text; version=1.0.0; charset=utf-8"
	acceptUTF8 = "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.1"
)

// srvRig is a server with its store and, unless newVirtualRig made it, its two listeners. The
// server is named s1 unless a test changes that.
type srvRig struct {
	t        testing.TB
	clock    atomic.Int64 // the server's current time, in ns after testNow
	keys     Keys
	store    *Store
	server   *Server
	external *httptest.Server
	internal *httptest.Server
	log      *logBuffer
	logRead  int      // bytes of log that the method logged has returned
	secrets  []string // texts that no error answer of the server may contain
}

func (r *srvRig) now() time.Time { return testNow.Add(time.Duration(r.clock.Load())) }

// newSrvRig returns a server that is ready. By default it has small limits and a store on a
// simulated disk in memory. Each function in change edits the configuration before the store is
// opened. At the end of the test the store and the listeners are closed.
func newSrvRig(t testing.TB, change ...func(*StoreConfig, *ServerConfig)) *srvRig {
	t.Helper()
	r := &srvRig{t: t, keys: testKeys(t, 1), log: &logBuffer{}}
	sc := StoreConfig{
		FS: newCrashFS(1, "/secretdir"), Dir: "/secretdir", Retention: 2 * time.Hour, MaxSampleAge: 10 * time.Minute,
		LimitSeries: 100, LimitSites: 10, LimitSamples: 100_000, Now: r.now,
		OnError: func(err error) { fmt.Fprintln(r.log, err) },
	}
	cfg := ServerConfig{
		Name: "s1", Metrics: NewMetrics(), Now: r.now, MaxSampleAge: 10 * time.Minute,
		Log:        slog.New(slog.NewTextHandler(r.log, nil)),
		LimitBytes: 4 << 10, LimitScrape: 1000, RateInterval: time.Second,
	}
	for _, f := range change {
		f(&sc, &cfg)
	}
	store, err := OpenStore(sc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	cfg.Store, r.store = store, store
	r.server = NewServer(cfg)
	r.server.Reload(ReloadableServerConfig{Keys: r.keys, Normalizer: &ServerNormalizer{}})
	r.server.SetReady(true)
	r.external, r.internal = httptest.NewServer(r.server.ExternalHandler()), httptest.NewServer(r.server.InternalHandler(false))
	t.Cleanup(r.external.Close)
	t.Cleanup(r.internal.Close)
	r.secrets = []string{keyLine(1), "secretdir", "goroutine ", ".go:"}
	return r
}

// newVirtualRig returns a server without listeners, for tests in virtual time. Its clock is
// time.Now, and its store keeps samples in memory only.
func newVirtualRig(t *testing.T) *srvRig {
	r := &srvRig{t: t, log: &logBuffer{}}
	store, err := OpenStore(StoreConfig{Retention: 2 * time.Hour, MaxSampleAge: time.Hour, Now: time.Now, OnError: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	r.store = store
	r.server = NewServer(ServerConfig{
		Name: "s1", Store: store, Metrics: NewMetrics(), Log: slog.New(slog.NewTextHandler(r.log, nil)), Now: time.Now,
		MaxSampleAge: time.Hour, LimitBytes: 1 << 20, LimitScrape: 1000,
	})
	r.server.SetReady(true)
	return r
}

// reload reloads the server with the rig's token keys and no rules. change can edit this
// configuration before the reload.
func (r *srvRig) reload(change func(*ReloadableServerConfig)) {
	st := ReloadableServerConfig{Keys: r.keys, Normalizer: &ServerNormalizer{}}
	change(&st)
	r.server.Reload(st)
}

// token returns a token for the cluster ID cluster, signed with the first of the rig's keys. Its
// token ID is derived from the cluster ID. The functions in change edit the token before it is
// signed.
func (r *srvRig) token(kind, cluster string, change ...func(*Token)) string {
	t := Token{Kind: kind, ClusterID: cluster, Issued: testNow.Unix(), ID: fmt.Sprintf("%032x", cluster)[:32]}
	for _, f := range change {
		f(&t)
	}
	return signToken(r.t, r.keys, t)
}

// srvRequest is an HTTP request to a server under test. An empty token adds no Authorization
// header.
type srvRequest struct {
	method, url, token string
	header             map[string]string
	body               []byte
	chunked            bool // whether to send the body in chunks, without a Content-Length
}

type srvAnswer struct {
	status int
	header http.Header
	body   string
}

// do sends a request and returns the answer. If the status is 300 or higher, it checks the answer
// with harmless.
func (r *srvRig) do(q srvRequest) srvAnswer {
	r.t.Helper()
	var body io.Reader = bytes.NewReader(q.body)
	if q.chunked {
		body = struct{ io.Reader }{body}
	}
	req, err := http.NewRequest(q.method, q.url, body)
	if err != nil {
		r.t.Fatal(err)
	}
	if q.token != "" {
		req.Header.Set("Authorization", "Bearer "+q.token)
	}
	for k, v := range q.header {
		if k == "Host" {
			req.Host = v
		}
		req.Header.Set(k, v)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		r.t.Fatalf("%s %s: %v", q.method, q.url, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatalf("%s %s: %v", q.method, q.url, err)
	}
	a := srvAnswer{resp.StatusCode, resp.Header, string(b)}
	if a.status >= 300 {
		r.harmless(q, a)
	}
	return a
}

// harmless checks that an error answer contains none of r.secrets, does not repeat the token of the
// request, and has at most 8 KiB.
func (r *srvRig) harmless(q srvRequest, a srvAnswer) {
	r.t.Helper()
	all := a.body + fmt.Sprint(a.header)
	for _, secret := range append(r.secrets, q.token) {
		if secret != "" && strings.Contains(all, secret) {
			r.t.Errorf("%s %s: answer %d leaks %q: %s", q.method, q.url, a.status, secret, all)
		}
	}
	if len(all) > 8<<10 {
		r.t.Errorf("%s %s: the error answer has %d bytes: %.200s…", q.method, q.url, len(all), all)
	}
}

// upload pushes body to /upload with the given token. The elements of headers are names of headers,
// each followed by its value.
func (r *srvRig) upload(token string, body []byte, headers ...string) srvAnswer {
	r.t.Helper()
	h := map[string]string{}
	for i := 0; i < len(headers); i += 2 {
		h[headers[i]] = headers[i+1]
	}
	return r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: token, header: h, body: body})
}

// push pushes text to /upload with an upload token for the cluster ID cluster.
func (r *srvRig) push(cluster, text string) srvAnswer {
	r.t.Helper()
	return r.upload(r.token(KindUpload, cluster), []byte(text))
}

// pushSpool does the same as push, but adds headers, such as Telemeter-Spool, to the request. The
// elements of headers are names of headers, each followed by its value.
func (r *srvRig) pushSpool(cluster, text string, headers ...string) srvAnswer {
	r.t.Helper()
	return r.upload(r.token(KindUpload, cluster), []byte(text), headers...)
}

// hold stores text as a push of the site id in the server's store, without an HTTP request.
func (r *srvRig) hold(id, text string) {
	r.t.Helper()
	push := &pushRequest{ClusterID: id, Arrival: time.Now().UnixMilli()}
	if a, err := r.server.storeForwarded(r.t.Context(), push, []byte(text)); err != nil || a.Status != 200 {
		r.t.Fatal(a, err)
	}
}

// srvCounts is the decoded JSON body of the answer to an accepted push.
type srvCounts struct {
	Accepted, Duplicates int
	Dropped, Skipped     map[string]int
	Hint, Server         string
	Time                 int64
	Held, Read           *string
	Consumers            string
	OtherSpoolTime       int64
}

// accepted decodes the answer to a push. The test fails at once if the status is not 200.
func (r *srvRig) accepted(a srvAnswer) (c srvCounts) {
	r.t.Helper()
	if a.status != 200 || a.header.Get("Content-Type") != "application/json" {
		r.t.Fatalf("the push was answered %d %v %s", a.status, a.header, a.body)
	}
	dec := json.NewDecoder(strings.NewReader(a.body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil || c.Dropped == nil {
		r.t.Fatalf("decoding the answer %s: %v", a.body, err)
	}
	return c
}

// lists returns the scrape numbers that the answer to a push lists as held and as read, in the form
// "held|read". A list that the answer does not have is shown as "-".
func (c srvCounts) lists() string {
	text := func(s *string) string {
		if s == nil {
			return "-"
		}
		return *s
	}
	return text(c.Held) + "|" + text(c.Read)
}

// federate scrapes /federate with a query and an Accept header, and returns the body of the answer.
// The test fails at once if the status is not 200.
func (r *srvRig) federate(query, accept string) string {
	r.t.Helper()
	a := r.do(srvRequest{method: "GET", url: r.internal.URL + "/federate?" + query, header: map[string]string{"Accept": accept}})
	if a.status != 200 {
		r.t.Fatalf("/federate?%s was answered %d %s", query, a.status, a.body)
	}
	return a.body
}

// held scrapes /federate without a consumer's name, and returns the sorted lines whose label _id is
// the given cluster ID.
func (r *srvRig) held(cluster, accept string) string {
	r.t.Helper()
	var lines []string
	for line := range strings.Lines(r.federate("", accept)) {
		if strings.Contains(line, `{_id="`+cluster+`"`) || strings.Contains(line, `,_id="`+cluster+`"`) {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// parsed scrapes /federate with the default escaping, and once with each escaping that a scraper
// can ask for. It parses each answer with expfmt. It checks that every metric family is untyped and
// that no series occurs twice. It returns the families of the scrape that allows UTF-8 names.
func (r *srvRig) parsed(query string) map[string]*dto.MetricFamily {
	r.t.Helper()
	var out map[string]*dto.MetricFamily
	for _, c := range []struct {
		accept string
		scheme model.ValidationScheme
	}{
		{"", model.LegacyValidation},
		{"text/plain;version=0.0.4;escaping=underscores", model.LegacyValidation},
		{"text/plain;version=0.0.4;escaping=values", model.LegacyValidation},
		{"text/plain;version=0.0.4;escaping=dots", model.LegacyValidation},
		{acceptUTF8, model.UTF8Validation},
	} {
		text := r.federate(query, c.accept)
		parser := expfmt.NewTextParser(c.scheme)
		fams, err := parser.TextToMetricFamilies(strings.NewReader(text))
		if err != nil {
			r.t.Fatalf("Accept %q: parsing /federate: %v in:\n%s", c.accept, err, text)
		}
		seen := map[string]bool{}
		for name, f := range fams {
			if f.GetType() != dto.MetricType_UNTYPED {
				r.t.Errorf("Accept %q: %s has type %v, want untyped", c.accept, name, f.GetType())
			}
			for _, m := range f.Metric {
				key := name
				for _, l := range m.Label {
					key += fmt.Sprintf("\xff%s\xff%s", l.GetName(), l.GetValue())
				}
				if seen[key] {
					r.t.Errorf("Accept %q: series %q occurs twice in:\n%s", c.accept, key, text)
				}
				seen[key] = true
			}
		}
		out = fams
	}
	return out
}

// scrapeOn scrapes /federate from 192.0.2.1 on the connection that conn stands for, and returns the
// body of the answer. The scrape confirms the previous scrape of the same consumer on this
// connection, as if the consumer had read the previous answer before it sent this request.
func (r *srvRig) scrapeOn(conn *AnswerReadTracker, query string) string {
	r.t.Helper()
	conn.sequential = true
	req := httptest.NewRequest("GET", "/federate?"+query, nil)
	req.RemoteAddr = "192.0.2.1:9"
	rec := httptest.NewRecorder()
	r.server.InternalHandler(false).ServeHTTP(rec, req.WithContext(context.WithValue(req.Context(), connTrackerKey{}, conn)))
	if rec.Code != http.StatusOK {
		r.t.Fatalf("/federate?%s was answered %d %s", query, rec.Code, rec.Body)
	}
	return rec.Body.String()
}

func (r *srvRig) samples(id string) int {
	for _, c := range r.store.Stats().Sites {
		if c.ID == id {
			return int(c.Samples)
		}
	}
	return 0
}

// times returns the timestamps of all samples of the site id that the server stores, in ms after
// testNow.
func (r *srvRig) times(id string) (times []int64) {
	r.store.ViewSite(id, func(held *SiteSamples) {
		for _, b := range held.Batches {
			for i := range b.V {
				times = append(times, b.Time(i)-testNow.UnixMilli())
			}
		}
	})
	return times
}

func (r *srvRig) pushesInFlight() float64 { return r.server.inFlight.findOrAddSeries(nil).load() }

// upsOf returns the values of the lines of the metric up in an exposition, in order, each followed
// by a space.
func upsOf(body string) (values string) {
	for line := range strings.Lines(body) {
		if _, rest, ok := strings.Cut(line, "} "); ok && strings.HasPrefix(line, "up{") {
			v, _, _ := strings.Cut(rest, " ")
			values += v + " "
		}
	}
	return values
}

// answerRig is a server that stores samples of site-b. The requests that the tests of this rig
// send, mostly as site-a, must not change the samples of site-b.
type answerRig struct {
	*srvRig
	uploadToken, clientToken string // upload token and client token of site-a
	siteB                    string // lines of site-b in /federate before the requests of the test
}

func newAnswerRig(t testing.TB) *answerRig {
	r := &answerRig{srvRig: newSrvRig(t)}
	r.secrets = append(r.secrets, "site-b", "topsecret")
	r.accepted(r.push("site-b", "topsecret{x=\"topsecret\"} 1\n"))
	r.siteB = r.held("site-b", "")
	r.uploadToken, r.clientToken = r.token(KindUpload, "site-a"), r.token(KindClient, "site-a")
	return r
}

// answerCase is a request to the external listener and the answer that the server must give.
type answerCase struct {
	name    string
	q       srvRequest // the request; its url has only the path and query
	status  int
	header  map[string]string // headers that the answer must have; each value is a prefix of the header's value
	reasons []string          // texts that the body of the answer must contain
}

// uploadCase returns an answerCase in which site-a pushes body with an upload token. reasons has
// the texts that the body of the answer must contain, separated by |.
func (r *answerRig) uploadCase(name string, status int, header map[string]string, body, reasons string) answerCase {
	q := srvRequest{method: "POST", url: "/upload", token: r.uploadToken, header: header, body: []byte(body)}
	return answerCase{name: name, q: q, status: status, reasons: strings.Split(reasons, "|")}
}

// check sends the request of each case and compares the answer. A request that is not answered 200
// must leave no sample in the store. No request may change the samples of site-b, make a scrape of
// /federate fail, or get uploadToken or clientToken of the rig into the process log.
func (r *answerRig) check(t *testing.T, cases []answerCase) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r := &srvRig{t: t, keys: r.keys, store: r.store, server: r.server, external: r.external, internal: r.internal, secrets: r.secrets}
			r.server.sites = NewSitePushLimiter(0, 1<<20)
			samples := r.store.totals.Samples.Load()
			q := c.q
			q.url = r.external.URL + q.url
			a := r.do(q)
			if a.status != c.status {
				t.Fatalf("status %d, want %d: %s", a.status, c.status, a.body)
			}
			for name, prefix := range c.header {
				if !strings.HasPrefix(a.header.Get(name), prefix) {
					t.Errorf("header %s is %q, want the prefix %q", name, a.header.Get(name), prefix)
				}
			}
			for _, reason := range c.reasons {
				if !strings.Contains(a.body, reason) {
					t.Errorf("the body %q does not contain %q", a.body, reason)
				}
			}
			if a.status != 200 && r.store.totals.Samples.Load() != samples {
				t.Errorf("the push was refused with %d, but left samples", a.status)
			}
		})
		if got := r.held("site-b", ""); got != r.siteB {
			t.Errorf("%s: site-b has changed to:\n%s\nfrom:\n%s", c.name, got, r.siteB)
		}
	}
	r.parsed("")
	if log := r.log.String(); strings.Contains(log, r.uploadToken) || strings.Contains(log, r.clientToken) || len(log) > 64<<10 {
		t.Errorf("the log of %d bytes contains a token or is too long", len(log))
	}
}

// scraperOf returns an HTTP client with a connection pool of its own. Requests of this client that
// follow each other use the same connection to a server, unless the server closes it.
func scraperOf(t testing.TB) *http.Client {
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// consumerRig is a server with one more internal listener. This listener tracks whether a peer had
// read the previous answer before it sent its request, as the listener of a real server does.
type consumerRig struct {
	*srvRig
	url    string              // base URL of the internal listener that tracks connections
	during func(*http.Request) // called for each request before the end of its answer is written; nil: nothing is called
}

func newConsumerRig(t testing.TB, change ...func(*StoreConfig, *ServerConfig)) *consumerRig {
	r := &consumerRig{srvRig: newSrvRig(t, change...)}
	r.url = "http://" + r.listen(nil)
	return r
}

// listen opens an internal listener that tracks connections, with TLS unless config is nil, and
// returns its address.
func (r *consumerRig) listen(config *tls.Config) (addr string) {
	internal := r.server.InternalHandler(false)
	return serveHTTP(r.t, HTTPServer{TrackConns: true, TLS: config, Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if internal.ServeHTTP(w, req); r.during != nil {
			r.during(req)
		}
	})})
}

// get sends a request to /federate with the given method, query and User-Agent. The elements of
// headers are names of further headers, each followed by its value.
func (r *consumerRig) get(client *http.Client, method, query, agent string, headers ...string) srvAnswer {
	r.t.Helper()
	req, err := http.NewRequest(method, r.url+"/federate?"+strings.ReplaceAll(query, `"`, "%22"), nil)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("User-Agent", agent)
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return srvAnswer{resp.StatusCode, resp.Header, string(b)}
}

// ups scrapes /federate and returns the values of the metric up in the answer, each followed by a
// space. The test fails at once if the status is not 200.
func (r *consumerRig) ups(client *http.Client, query, agent string, headers ...string) (values string) {
	r.t.Helper()
	a := r.get(client, "GET", query, agent, headers...)
	if a.status != 200 {
		r.t.Fatalf("/federate?%s was answered %d %s", query, a.status, a.body)
	}
	return upsOf(a.body)
}

// pushUps pushes one sample of the series up of site-a for each of values. The timestamps are one
// second apart, and the last timestamp is the server's current time. Then pushUps advances the
// server's clock by 10 s.
func (r *consumerRig) pushUps(values ...int) {
	r.t.Helper()
	var text strings.Builder
	for i, v := range values {
		fmt.Fprintf(&text, "up %d %d\n", v, r.now().UnixMilli()-int64(len(values)-1-i)*1000)
	}
	r.accepted(r.push("site-a", text.String()))
	r.clock.Add(int64(10 * time.Second))
}

// benchBody returns the body of a push of 230 samples in 24 metric families, like the body of a
// client's push. All samples have the timestamp ms. With proto true the format is protobuf, else
// text.
func benchBody(b *testing.B, proto bool, ms int64) []byte {
	var out bytes.Buffer
	var fams []*dto.MetricFamily
	for i := range 230 {
		name := fmt.Sprintf("node_subsystem_%d_seconds_total", i/10)
		if i >= 220 {
			name = fmt.Sprintf("node_rare_%d_bytes", i%2)
		}
		labels := []string{"instance", "10.1.2.3:9100", "job", "node-exporter", "namespace", "monitoring", "device", fmt.Sprintf("eth%d", i), "mode", "idle"}
		fams = append(fams, gaugeFamily(name, float64(i)*1.5+float64(ms%1000), &ms, labels...))
		fmt.Fprintf(&out, "%s{", name)
		for j := 0; j < len(labels); j += 2 {
			fmt.Fprintf(&out, "%s=%q,", labels[j], labels[j+1])
		}
		fmt.Fprintf(&out, "} %v %d\n", float64(i)*1.5+float64(ms%1000), ms)
	}
	if !proto {
		return out.Bytes()
	}
	merged := map[string]*dto.MetricFamily{}
	var list []*dto.MetricFamily
	for _, f := range fams {
		if m := merged[f.GetName()]; m != nil {
			m.Metric = append(m.Metric, f.Metric...)
		} else {
			merged[f.GetName()] = f
			list = append(list, f)
		}
	}
	return protoBody(b, list...)
}

// benchRig returns a server with its store on the real disk. Its limits are so high that benchmarks
// do not reach them.
func benchRig(b *testing.B) *srvRig {
	return newSrvRig(b, func(s *StoreConfig, c *ServerConfig) {
		s.FS, s.Dir, s.LimitSeries, s.LimitSamples, s.LimitSites = DiskFS{}, b.TempDir(), 20_000, 500_000_000, 1000
		s.Retention = 10 * 24 * time.Hour
		c.LimitBytes, c.LimitScrape, c.RateInterval = 1<<20, 500_000, 0
	})
}
