package main

// The promises of a server to clients, scrapers and attackers: the table of answers, the meaning of
// a 200, that a refused push leaves nothing, and that one site cannot touch the samples of another.
// Requests go over a real listener on 127.0.0.1; the clock stands still unless a test moves it.

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

const (
	protoType = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
	omType    = "application/openmetrics-text; version=1.0.0; charset=utf-8"
)

// srvRig is a server with both its listeners.
type srvRig struct {
	t        testing.TB
	clock    atomic.Int64 // ns after testNow
	keys     Keys
	store    *Store
	server   *Server
	external *httptest.Server
	internal *httptest.Server
	log      *logBuffer
	secrets  []string // that no answer may hold
}

func (r *srvRig) now() time.Time { return testNow.Add(time.Duration(r.clock.Load())) }

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
	r.external, r.internal = httptest.NewServer(r.server.ExternalHandler()), httptest.NewServer(r.server.InternalHandler())
	t.Cleanup(r.external.Close)
	t.Cleanup(r.internal.Close)
	r.secrets = []string{keyLine(1), "secretdir", "goroutine ", ".go:"}
	return r
}

func (r *srvRig) reload(change func(*ReloadableServerConfig)) {
	st := ReloadableServerConfig{Keys: r.keys, Normalizer: &ServerNormalizer{}}
	change(&st)
	r.server.Reload(st)
}

// token signs a token for a cluster ID; its token ID is made of the cluster's.
func (r *srvRig) token(kind, cluster string, change ...func(*Token)) string {
	t := Token{Kind: kind, ClusterID: cluster, Issued: testNow.Unix(), ID: fmt.Sprintf("%032x", cluster)[:32]}
	for _, f := range change {
		f(&t)
	}
	return signToken(r.t, r.keys, t)
}

type srvRequest struct {
	method, url, token string
	header             map[string]string
	body               []byte
	chunked            bool
}

type srvAnswer struct {
	status int
	header http.Header
	body   string
}

// do sends a request and reads its answer; the token is among what no answer may
// repeat.
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

// harmless checks that an error says nothing it should not.
func (r *srvRig) harmless(q srvRequest, a srvAnswer) {
	r.t.Helper()
	all := a.body + fmt.Sprint(a.header)
	for _, secret := range append(r.secrets, q.token) {
		if secret != "" && strings.Contains(all, secret) {
			r.t.Errorf("%s %s: %d leaks %q: %s", q.method, q.url, a.status, secret, all)
		}
	}
	if len(all) > 8<<10 {
		r.t.Errorf("%s %s: an error of %d bytes: %.200s…", q.method, q.url, len(all), all)
	}
}

// push uploads text for a cluster with its upload token.
func (r *srvRig) push(cluster, text string) srvAnswer {
	r.t.Helper()
	return r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(KindUpload, cluster), body: []byte(text)})
}

// counts of an answer to an upload.
type srvCounts struct {
	Accepted, Duplicates int
	Dropped, Skipped     map[string]int
	Hint, Server         string
	Time                 int64
	Held, Read           *string
	Consumers            string
}

func (r *srvRig) accepted(a srvAnswer) (c srvCounts) {
	r.t.Helper()
	if a.status != 200 || a.header.Get("Content-Type") != "application/json" {
		r.t.Fatalf("push: %d %v %s", a.status, a.header, a.body)
	}
	dec := json.NewDecoder(strings.NewReader(a.body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil || c.Dropped == nil {
		r.t.Fatalf("push answered %s: %v", a.body, err)
	}
	return c
}

func (r *srvRig) federate(query, accept string) string {
	r.t.Helper()
	a := r.do(srvRequest{method: "GET", url: r.internal.URL + "/federate?" + query, header: map[string]string{"Accept": accept}})
	if a.status != 200 {
		r.t.Fatalf("federate %s: %d %s", query, a.status, a.body)
	}
	return a.body
}

const acceptUTF8 = "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.1"

// held returns the lines of /federate that carry a cluster's ID.
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

// parsed has expfmt read an answer of /federate, in every form it comes in, and
// checks that no series occurs twice.
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
			r.t.Fatalf("Accept %q: %v in:\n%s", c.accept, err, text)
		}
		seen := map[string]bool{}
		for name, f := range fams {
			if f.GetType() != dto.MetricType_UNTYPED {
				r.t.Errorf("Accept %q: %s has type %v", c.accept, name, f.GetType())
			}
			for _, m := range f.Metric {
				key := name
				for _, l := range m.Label {
					key += fmt.Sprintf("\xff%s\xff%s", l.GetName(), l.GetValue())
				}
				if seen[key] {
					r.t.Errorf("Accept %q: %q occurs twice in:\n%s", c.accept, key, text)
				}
				seen[key] = true
			}
		}
		out = fams
	}
	return out
}

// TestAnswers is the table of answers, row by row as somebody with curl would
// meet it. No row but those answered 200 may change anything.
func TestAnswers(t *testing.T) {
	r := newSrvRig(t)
	r.secrets = append(r.secrets, "site-b", "topsecret")
	other := testKeys(t, 7)
	revokedID := strings.Repeat("ab", 16)
	revoked, err := ParseRevokedIDs([]byte("gone\n" + revokedID + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	r.reload(func(st *ReloadableServerConfig) { st.Revoked = revoked })
	r.accepted(r.push("site-b", "topsecret{x=\"topsecret\"} 1\n"))
	before := r.held("site-b", "")

	upload, client := r.token(KindUpload, "site-a"), r.token(KindClient, "site-a")
	byID := func(tok *Token) { tok.ID = revokedID }
	forged := func(kind string) string {
		return signToken(t, other, Token{Kind: kind, ClusterID: "site-a", ID: strings.Repeat("0", 32)})
	}
	ttl := func(d time.Duration) func(*Token) {
		return func(tok *Token) { tok.Expires = testNow.Add(d).Unix() }
	}
	big := bytes.Repeat([]byte("# a comment is content too\n"), 200) // 5,400 bytes
	many := func(n int) (b []byte) {
		for i := range n {
			b = fmt.Appendf(b, "m{i=\"%d\"} 1\n", i)
		}
		return b
	}
	type h = map[string]string
	unauthorized := h{"WWW-Authenticate": `Bearer realm="telemeter", error="invalid_token", error_description=`}
	for _, c := range []struct {
		name    string
		q       srvRequest // url is a path
		status  int
		header  h        // that the answer's begin with
		reasons []string // that its body holds
	}{
		{"no token", srvRequest{method: "POST", url: "/upload"}, 401, unauthorized, []string{"Authorization: Bearer <token>"}},
		{"no token, authorize", srvRequest{method: "POST", url: "/authorize?id=site-a"}, 401, unauthorized, []string{"Bearer"}},
		{"another scheme", srvRequest{method: "POST", url: "/upload", header: h{"Authorization": "Basic eDp5"}}, 401, unauthorized, []string{"no bearer token"}},
		{"garbage", srvRequest{method: "POST", url: "/upload", token: "garbage"}, 401, unauthorized, []string{"malformed"}},
		{"a megabyte-like token", srvRequest{method: "POST", url: "/upload", token: strings.Repeat("x", 9<<10)}, 401, unauthorized, []string{"malformed"}},
		{"cut token", srvRequest{method: "POST", url: "/upload", token: upload[:len(upload)-3]}, 401, unauthorized, []string{"malformed"}},
		{"forged upload token", srvRequest{method: "POST", url: "/upload", token: forged(KindUpload)}, 401, unauthorized, []string{"not signed by a key of this server"}},
		{"forged client token", srvRequest{method: "POST", url: "/authorize", token: forged(KindClient)}, 401, unauthorized, []string{"not signed"}},
		{"tampered", srvRequest{method: "POST", url: "/upload", token: strings.Replace(upload, "tm1.e", "tm1.f", 1)}, 401, unauthorized, []string{"not signed"}},
		{"expired client", srvRequest{method: "POST", url: "/authorize", token: r.token(KindClient, "site-a", ttl(-time.Second))}, 401, unauthorized, []string{"expired"}},
		{"expired upload", srvRequest{method: "POST", url: "/upload", token: r.token(KindUpload, "site-a", ttl(0))}, 401, unauthorized, []string{"expired"}},
		{"revoked token ID", srvRequest{method: "POST", url: "/authorize", token: r.token(KindClient, "site-a", byID)}, 401, unauthorized, []string{"revoked"}},
		{"revoked token ID, upload token", srvRequest{method: "POST", url: "/upload", token: r.token(KindUpload, "site-a", byID)}, 401, unauthorized, []string{"revoked"}},
		{"revoked cluster ID", srvRequest{method: "POST", url: "/authorize", token: r.token(KindClient, "gone")}, 401, unauthorized, []string{"revoked"}},
		{"revoked cluster ID, upload token", srvRequest{method: "POST", url: "/upload", token: r.token(KindUpload, "gone")}, 401, unauthorized, []string{"revoked"}},
		{"upload token at authorize", srvRequest{method: "POST", url: "/authorize", token: upload}, 401, unauthorized, []string{"kind client, not upload"}},

		{"another cluster's ID", srvRequest{method: "POST", url: "/authorize?id=site-x", token: client}, 403, nil, []string{"the token is for another cluster ID"}},
		{"another cluster's ID at upload", srvRequest{method: "POST", url: "/upload?id=site-x", token: upload}, 403, nil, []string{"another cluster ID"}},

		{"GET upload", srvRequest{method: "GET", url: "/upload", token: upload}, 405, h{"Allow": "POST"}, []string{"Method Not Allowed"}},
		{"PUT upload", srvRequest{method: "PUT", url: "/upload", token: upload}, 405, h{"Allow": "POST"}, nil},
		{"GET authorize", srvRequest{method: "GET", url: "/authorize"}, 405, h{"Allow": "POST"}, nil},
		{"POST healthz", srvRequest{method: "POST", url: "/healthz"}, 405, h{"Allow": "GET, HEAD"}, nil},
		{"internal paths outside", srvRequest{method: "GET", url: "/federate"}, 404, nil, []string{"404"}},
		{"metrics outside", srvRequest{method: "GET", url: "/metrics"}, 404, nil, nil},
		{"pprof outside", srvRequest{method: "GET", url: "/debug/pprof/"}, 404, nil, nil},
		{"root", srvRequest{method: "GET", url: "/"}, 404, nil, nil},
		{"below upload", srvRequest{method: "POST", url: "/upload/", token: upload}, 404, nil, nil},

		{"JSON", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Type": "application/json"}, body: []byte("{}")}, 415, nil,
			[]string{`"application/json" is not supported`, "text/plain (version 0.0.4 or 1.0.0)", "application/openmetrics-text", "application/vnd.google.protobuf"}},
		{"unknown text version", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Type": "text/plain; version=9"}}, 415, nil, []string{"0.0.4 or 1.0.0"}},
		{"text protobuf", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Type": strings.Replace(protoType, "delimited", "text", 1)}}, 415, nil, []string{"encoding=delimited"}},
		{"brotli", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Encoding": "br"}, body: []byte("x 1\n")}, 415, nil, []string{`"br" is not supported`, "identity, gzip, snappy (framed)"}},
		{"twice gzip", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Encoding": "gzip, gzip"}, body: []byte("x 1\n")}, 415, nil, []string{"identity, gzip"}},

		{"large by its length", srvRequest{method: "POST", url: "/upload", token: upload, body: big}, 413, nil, []string{"4096 bytes", "--limit-bytes"}},
		{"large in chunks", srvRequest{method: "POST", url: "/upload", token: upload, body: big, chunked: true}, 413, nil, []string{"4096 bytes", "--limit-bytes"}},
		{"large in gzip", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Encoding": "gzip"}, body: append(gzipped([]byte("x 1\n")), make([]byte, 4096)...)}, 413, nil, []string{"--limit-bytes"}},
		{"bomb", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Encoding": "gzip"}, body: gzipped(make([]byte, 1<<20))}, 413, nil, []string{"32768 bytes", "--limit-bytes"}},
		{"too many samples", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Encoding": "gzip"}, body: gzipped([]byte(strings.Repeat("a 1\n", 2049)))}, 413, nil, []string{"2048 samples", "line 2049", "--limit-bytes"}},
		{"too many series", srvRequest{method: "POST", url: "/upload", token: upload, body: many(101)}, 413, nil, []string{"too many series", "100", "--limit-series"}},
		{"too many labels", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("m{" + strings.Repeat(`a="",`, 200) + "} 1\n")}, 413, nil, []string{"128 labels", "line 1"}},

		{"not exposition", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("x 1\n<html>\n")}, 400, nil, []string{"line 2", "<html>"}},
		{"no value", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("ok 1\n\nup{job=\"a\"}\n")}, 400, nil, []string{"line 3", `up{job=\"a\"}`, "no value"}},
		{"bad timestamp", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("up 1 soon\n")}, 400, nil, []string{"line 1", "soon", "milliseconds"}},
		{"a label twice", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("up{a=\"1\",a=\"2\"} 1\n")}, 400, nil, []string{"line 1", "up{a=", `"a" occurs twice`}},
		{"__name__", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("up{__name__=\"other\"} 1\n")}, 400, nil, []string{`"__name__" is reserved`}},
		{"not UTF-8", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("up{a=\"\xff\"} 1\n")}, 400, nil, []string{"not UTF-8"}},
		{"cut text", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("up 1\nup{a=\"b\"} 1")}, 400, nil, []string{"line 2", "truncated"}},
		{"OpenMetrics without EOF", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Type": omType}, body: []byte("up 1\n")}, 400, nil, []string{"# EOF"}},
		{"protobuf garbage", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Type": protoType}, body: []byte("\x04\xff\xff\xff\xff")}, 400, nil, []string{"family 1", "malformed protobuf"}},
		{"protobuf frame of 1 GiB", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Type": protoType}, body: []byte("\x80\x80\x80\x80\x04")}, 400, nil, []string{"family 1", "truncated"}},
		{"text as gzip", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Encoding": "gzip"}, body: []byte("up 1\n")}, 400, nil, []string{"gzip"}},
		{"cut gzip", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Encoding": "gzip"}, body: gzipped([]byte("up 1\n"))[:20]}, 400, nil, []string{"not whole gzip"}},
		{"gzip and more", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Encoding": "gzip"}, body: append(gzipped([]byte("up 1\n")), "more"...)}, 400, nil, []string{"gzip"}},
		{"snappy garbage", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Encoding": "snappy"}, body: []byte("up 1\n")}, 400, nil, []string{"snappy"}},
		{"the server's own names", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("push_time_seconds 9e9\n")}, 400, nil, []string{"line 1", `"push_time_seconds" is reserved`}},
		{"the server's own prefix", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("telemeter_cluster_x 9\n")}, 400, nil, []string{`"telemeter_cluster_x" is reserved`}},
		{"the server's own names, in UTF-8", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("{\"push.time.seconds\",a=\"b\"} 9e9\n")}, 400, nil, []string{"reserved"}},
		{"long lines", srvRequest{method: "POST", url: "/upload", token: upload, header: h{"Content-Encoding": "gzip"}, body: gzipped([]byte("up{a=\"" + strings.Repeat("\xff", 30_000) + "\"} 1\n"))}, 400, nil, []string{"line 1"}},

		{"health", srvRequest{method: "GET", url: "/healthz"}, 200, nil, []string{"ok"}},
		{"ready", srvRequest{method: "GET", url: "/healthz/ready"}, 200, nil, []string{"ready"}},
		{"text with an upload token", srvRequest{method: "POST", url: "/upload", token: upload, body: []byte("ok 1\n")}, 200, h{"Content-Type": "application/json"}, []string{`"accepted":1`}},
		{"text with a client token, as curl sends it", srvRequest{method: "POST", url: "/upload?id=site-a", token: client, header: h{"Content-Type": "application/x-www-form-urlencoded"}, body: []byte("ok2 1\n")}, 200, nil, []string{`"accepted":1`}},
		{"lower-case scheme", srvRequest{method: "POST", url: "/upload", header: h{"Authorization": "bearer " + upload}, body: []byte("ok3 1\n")}, 200, nil, []string{`"accepted":1`}},
		{"nothing", srvRequest{method: "POST", url: "/upload", token: upload}, 200, nil, []string{`"accepted":0`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := &srvRig{t: t, keys: r.keys, store: r.store, server: r.server, external: r.external, internal: r.internal, secrets: r.secrets}
			r.server.sites = NewSitePushLimiter(0)
			samples := r.store.totals.Samples.Load()
			q := c.q
			q.url = r.external.URL + q.url
			a := r.do(q)
			if a.status != c.status {
				t.Fatalf("status %d, not %d: %s", a.status, c.status, a.body)
			}
			for name, prefix := range c.header {
				if !strings.HasPrefix(a.header.Get(name), prefix) {
					t.Errorf("%s: %q does not begin with %q", name, a.header.Get(name), prefix)
				}
			}
			for _, reason := range c.reasons {
				if !strings.Contains(a.body, reason) {
					t.Errorf("%q is not in %q", reason, a.body)
				}
			}
			if a.status != 200 && r.store.totals.Samples.Load() != samples {
				t.Errorf("a push refused with %d left samples", a.status)
			}
			if got := r.held("site-b", ""); got != before {
				t.Errorf("site-b has changed:\n%s\nfrom:\n%s", got, before)
			}
		})
	}
	r.parsed("")
	if log := r.log.String(); strings.Contains(log, upload) || strings.Contains(log, client) || len(log) > 64<<10 {
		t.Errorf("the log of %d bytes holds a token, or is too long", len(log))
	}
}

// TestUploadCounts: the answer says what became of every sample.
func TestUploadCounts(t *testing.T) {
	r := newSrvRig(t)
	r.reload(func(st *ReloadableServerConfig) {
		allow, err := ParseSelectors([]string{`{__name__=~".+",__name__!="bad"}`})
		if err != nil {
			t.Fatal(err)
		}
		st.Normalizer = &ServerNormalizer{Allow: allow}
	})
	ms := testNow.UnixMilli()
	text := fmt.Sprintf("a 1 %d\na 2 %d\nold 1 %d\nnew 1 %d\nbad 1\nb 1\n", ms, ms+1, ms-3*3600_000, ms+120_000)
	if got := r.accepted(r.push("site-a", text)); got.Accepted != 3 || got.Duplicates != 0 ||
		!maps.Equal(got.Dropped, map[string]int{"not_allowed": 1, "too_old": 1, "future": 1}) || got.Skipped != nil {
		t.Errorf("first push: %+v", got)
	}
	if got := r.accepted(r.push("site-a", fmt.Sprintf("a 1 %d\na 3 %d\n", ms, ms+1))); got.Accepted != 0 || got.Duplicates != 1 ||
		!maps.Equal(got.Dropped, map[string]int{"conflicting_value": 1}) {
		t.Errorf("repeated push: %+v", got)
	}
	om := "# TYPE c counter\nc_total 1 # {t=\"x\"} 1\nc_created 1\n# EOF\n"
	a := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(KindUpload, "site-a"), header: map[string]string{"Content-Type": omType}, body: []byte(om)})
	if got := r.accepted(a); got.Accepted != 1 || !maps.Equal(got.Skipped, map[string]int{"exemplar": 1, "created": 1}) {
		t.Errorf("OpenMetrics: %+v", got)
	}
	one, inf := uint64(1), math.Inf(1)
	name, kind := "h", dto.MetricType_HISTOGRAM
	body := protoBody(t, &dto.MetricFamily{Name: &name, Type: &kind, Metric: []*dto.Metric{{Histogram: &dto.Histogram{
		SampleCount: &one, SampleSum: new(float64), Bucket: []*dto.Bucket{{CumulativeCount: &one, UpperBound: &inf}}}}}})
	a = r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(KindClient, "site-a"),
		header: map[string]string{"Content-Type": protoType, "Content-Encoding": "gzip"}, body: gzipped(body)})
	if got := r.accepted(a); got.Accepted != 3 {
		t.Errorf("histogram: %+v", got)
	}
	fams := r.parsed("")
	for _, name := range []string{"a", "b", "c_total", "h_bucket", "h_sum", "h_count"} {
		if len(fams[name].GetMetric()) != 1 {
			t.Errorf("%s is not served once", name)
		}
	}
	text = metricsText(t, r.server.cfg.Metrics)
	for _, want := range []string{
		`telemeter_pushes_total{result="accepted"} 4`, "telemeter_samples_accepted_total 7", "telemeter_samples_duplicate_total 1",
		`telemeter_samples_dropped_total{reason="too_old"} 1`, `telemeter_parts_skipped_total{kind="exemplar"} 1`,
		"telemeter_store_samples 7", "telemeter_pushes_in_flight 0", `telemeter_http_requests_total{handler="upload",code="200"} 4`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("/metrics lacks %s", want)
		}
	}
}

// TestUntimelyPush: a push of which no sample is of a time that is taken is answered
// 200, and is seen all the same: in its answer, in the log once, and as a failure.
func TestUntimelyPush(t *testing.T) {
	const (
		seconds = "the times look like seconds; they have to be milliseconds"
		old     = "all samples are older than --retention"
		future  = "all samples are ahead of the server's clock"
		both    = "all samples are older than --retention or ahead of the server's clock"
	)
	ms, day := testNow.UnixMilli(), int64(86400)
	for _, c := range []struct {
		name, text, hint string
		failed           bool
	}{
		{"in time", fmt.Sprintf("a 1 %d\n", ms), "", false},
		{"without a time", "a 1\n", "", false},
		{"nothing", "", "", false},
		{"old", fmt.Sprintf("a 1 %d\n", ms-3*3600_000), old, true},
		{"of the future", fmt.Sprintf("a 1 %d\n", ms+61_000), future, true},
		{"both", fmt.Sprintf("a 1 %d\nb 1 %d\n", ms+61_000, ms-3*3600_000), both, true},
		{"seconds", fmt.Sprintf("a 1 %d\nb 1 %d\n", ms/1000, ms/1000), seconds, true},
		{"seconds, some older", fmt.Sprintf("a 1 0\nb 1 %d\n", ms/1000-7200), seconds, true},
		{"seconds, a day ahead", fmt.Sprintf("a 1 %d\n", ms/1000+day), seconds, true},
		{"seconds, older", fmt.Sprintf("a 1 %d\n", ms/1000-7200-day-1), old, true},
		{"seconds, further ahead", fmt.Sprintf("a 1 %d\n", ms/1000+day+1), old, true},
		{"least and greatest", fmt.Sprintf("a 1 %d\nb 1 %d\n", int64(math.MinInt64), int64(math.MaxInt64)), both, true},
		{"microseconds", fmt.Sprintf("a 1 %d\n", ms*1000), future, true},
		{"one in time", fmt.Sprintf("a 1 %d\nb 1 %d\n", ms, ms/1000), "", false},
		{"one known", fmt.Sprintf("known 1 %d\nb 1 %d\n", ms, ms/1000), "", false},
		{"one in conflict", fmt.Sprintf("known 2 %d\nb 1 %d\n", ms, ms/1000), "", false},
		{"the others invalid", fmt.Sprintf("a{b=\"\x00\"} 1\nb 1 %d\n", ms/1000), seconds, true},
		{"all invalid", "a{b=\"\x00\"} 1\n", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newSrvRig(t)
			r.accepted(r.push("site-a", fmt.Sprintf("known 1 %d\n", ms)))
			a := r.push("site-a", c.text)
			if got := r.accepted(a).Hint; got != c.hint || strings.Contains(a.body, "hint") != (c.hint != "") {
				t.Errorf("answered %s, want the hint %q", a.body, c.hint)
			}
			if failed := strings.Contains(r.held("site-a", ""), PushFailureTimeName+"{"); failed != c.failed {
				t.Errorf("%s: %t", PushFailureTimeName, failed)
			}
			if log := r.log.String(); strings.Count(log, "level=WARN") != strings.Count(fmt.Sprint(c.failed), "true") ||
				c.failed && !(strings.Contains(log, "cluster_id=site-a") && strings.Contains(log, c.hint)) {
				t.Errorf("logged:\n%s", log)
			}
		})
	}
	r := newSrvRig(t)
	warnings := 0
	for i, c := range []struct {
		cluster string
		after   time.Duration
		bad     bool
		warned  bool
	}{
		{"a", 0, true, true}, {"a", time.Minute, true, false}, {"b", 0, true, true}, {"a", 58 * time.Minute, true, false},
		{"a", time.Minute, true, true}, {"a", time.Minute, false, false}, {"a", 0, true, false}, {"b", 0, true, true}, {"a", time.Minute, true, false},
	} {
		r.clock.Add(int64(c.after))
		text := "up 1\n"
		if c.bad {
			text = "up 1 5\n"
		}
		r.accepted(r.push(c.cluster, text))
		if c.warned {
			warnings++
		}
		if got := strings.Count(r.log.String(), "level=WARN"); got != warnings {
			t.Errorf("push %d: %d warnings, not %d", i, got, warnings)
			warnings = got
		}
	}
}

// TestUntimelyPushOfAnother: the server that a site pushes to shows the failure, whoever
// owns the site.
func TestUntimelyPushOfAnother(t *testing.T) {
	ring := newRingServers(t, 2)
	a, b := ring[0], ring[1]
	id := ownedBy(t, a.node.Forwarder, "b")
	if got := a.accepted(a.push(id, "up 1 5\n")); got.Dropped["too_old"] != 1 || got.Hint == "" || got.Server != "b" {
		t.Errorf("answered %+v", got)
	}
	if got := a.held(id, ""); !strings.Contains(got, PushFailureTimeName+"{") {
		t.Errorf("the receiver shows:\n%s", got)
	}
	if got := b.held(id, ""); strings.Contains(got, PushFailureTimeName+"{") {
		t.Errorf("the owner shows:\n%s", got)
	}
	if log := b.log.String(); !strings.Contains(log, "every sample of a push was dropped for its time") {
		t.Errorf("the owner logs:\n%s", log)
	}
}

// TestShownOnceReady: a member of a ring that has just started does not know what it owns.
// Until it is ready it shows no newest samples, which the owner shows, and serves unread
// ones all the same. A server alone owns all.
func TestShownOnceReady(t *testing.T) {
	ring := newRingServers(t, 2)
	for name, c := range map[string]struct {
		rig   *srvRig
		id    string
		shown bool // when it is not ready
	}{
		"member": {ring[1].srvRig, ownedBy(t, ring[0].node.Forwarder, "b"), false},
		"alone":  {newSrvRig(t), "site-a", true},
	} {
		c.rig.accepted(c.rig.push(c.id, "up 1\n"))
		for _, ready := range []bool{true, false, true} {
			c.rig.server.SetReady(ready)
			if shown := strings.Contains(c.rig.held(c.id, ""), "up{"); shown != (ready || c.shown) {
				t.Errorf("%s, ready %t: the newest sample is shown: %t", name, ready, shown)
			}
			if !strings.Contains(c.rig.federate(fmt.Sprint("consumer=", ready), ""), "up{") {
				t.Errorf("%s, ready %t: an unread sample is not served", name, ready)
			}
		}
	}
}

// TestNULByte: a NUL byte in a label's value costs its series, and nothing else of the
// push; whatever else is wrong with a series costs the push.
func TestNULByte(t *testing.T) {
	ms := testNow.UnixMilli()
	proto := map[string]string{"Content-Type": protoType}
	for _, c := range []struct {
		name   string
		body   []byte
		header map[string]string
		want   string // of the answer
	}{
		{"text", []byte("a 1\nb{x=\"\x00\"} 1\nb{x=\"y\",z=\"a\x00b\"} 1\nb{x=\"y\"} 1\n"), nil, `200 {"accepted":2,"duplicates":0,"dropped":{"invalid":2},`},
		{"protobuf", protoBody(t, gaugeFamily("b", 1, &ms, "x", "\x00"), gaugeFamily("b", 1, &ms, "x", "y")), proto, `200 {"accepted":1,"duplicates":0,"dropped":{"invalid":1},`},
		{"nothing else", []byte("b{x=\"\x00\"} 1\n"), nil, `200 {"accepted":0,"duplicates":0,"dropped":{"invalid":1},`},
		{"in a label's name", []byte("a 1\nb{\"x\x00\"=\"y\"} 1\n"), nil, "400 line 2: series "},
		{"in the metric's name", []byte("a 1\n{\"b\x00\"} 1\n"), nil, "400 line 2: series "},
		{"not UTF-8 either", []byte("b{x=\"\x00\xff\"} 1\n"), nil, "400 line 1: series "},
		{"beside a reserved label", []byte("b{a=\"\x00\",__x=\"y\"} 1\n"), nil, "400 line 1: series "},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newSrvRig(t)
			a := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(KindUpload, "site-a"), header: c.header, body: c.body})
			if got := fmt.Sprint(a.status, " ", a.body); !strings.HasPrefix(got, c.want) {
				t.Errorf("answered %s\nnot %s", got, c.want)
			}
			if a.status == 200 {
				if n := r.accepted(a).Dropped["invalid"]; r.server.droppedTotal.Value("invalid") != float64(n) {
					t.Errorf("%v are counted of %d", r.server.droppedTotal.Value("invalid"), n)
				}
			} else if n := r.server.droppedTotal.Value("invalid"); n != 0 {
				t.Errorf("%v samples of a refused push are counted as dropped", n)
			}
			r.parsed("")
		})
	}
}

// TestOperatorRules: --label, --elide-label, --required-label, --allow and the
// token's labels.
func TestOperatorRules(t *testing.T) {
	r := newSrvRig(t)
	labels, err := ParseLabels([]string{"region=eu", "tier=gold"})
	if err != nil {
		t.Fatal(err)
	}
	allow, err := ParseSelectors([]string{`{__name__=~"up|a.b",region!=""}`})
	if err != nil {
		t.Fatal(err)
	}
	r.reload(func(st *ReloadableServerConfig) {
		st.Normalizer = &ServerNormalizer{Elide: []string{"pod"}, Labels: labels, Required: []Label{{[]byte("env"), nil}, {[]byte("tier"), []byte("silver")}}, Allow: allow}
	})
	token := r.token(KindUpload, "site-a", func(tok *Token) { tok.Labels = map[string]string{"tier": "silver", ClusterLabel: "site-b"} })
	a := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: token, body: []byte(
		"up{pod=\"p\",env=\"x\",region=\"us\",tier=\"none\"} 1\nup{pod=\"p\"} 1\ndown{env=\"x\"} 1\n{\"a.b\",env=\"y\",job=\"j\",instance=\"i\"} 2\n")})
	if got := r.accepted(a); got.Accepted != 2 || !maps.Equal(got.Dropped, map[string]int{"required_label": 1, "not_allowed": 1}) {
		t.Errorf("push: %+v", got)
	}
	ms := testNow.UnixMilli()
	want := fmt.Sprintf("up{_id=\"site-a\",env=\"x\",instance=\"\",job=\"\",region=\"eu\",tier=\"silver\"} 1 %d\n"+
		"{\"a.b\",_id=\"site-a\",env=\"y\",instance=\"i\",job=\"j\",region=\"eu\",tier=\"silver\"} 2 %d\n", ms, ms)
	got := r.held("site-a", acceptUTF8)
	got = got[strings.Index(got, "up{"):]
	if got != want {
		t.Errorf("served:\n%s\nwanted:\n%s", got, want)
	}
}

// TestAuthorize: the answer, its token, and how long that is valid.
func TestAuthorize(t *testing.T) {
	r := newSrvRig(t)
	authorize := func(token string) (a struct {
		Version, ExpiresInSeconds int
		Token, Server             string
		Time                      int64
		Labels                    map[string]string
	}) {
		t.Helper()
		got := r.do(srvRequest{method: "POST", url: r.external.URL + "/authorize?id=site-a", token: token})
		if err := json.Unmarshal([]byte(got.body), &a); err != nil || got.status != 200 || got.header.Get("Content-Type") != "application/json" {
			t.Fatalf("authorize: %d %s", got.status, got.body)
		}
		return a
	}
	client := r.token(KindClient, "site-a", func(tok *Token) { tok.Labels = map[string]string{"region": "eu", "_id": "site-b"} })
	a := authorize(client)
	if a.Version != 1 || a.ExpiresInSeconds != 3600 || !maps.Equal(a.Labels, map[string]string{"region": "eu", "_id": "site-a"}) {
		t.Errorf("authorize: %+v", a)
	}
	if a.Server != "s1" || a.Time != testNow.UnixMilli() {
		t.Errorf("authorize: server %q, time %d", a.Server, a.Time)
	}
	tok, err := r.keys.Verify(a.Token, r.now())
	if err != nil || tok.Kind != KindUpload || tok.ClusterID != "site-a" || tok.ID != fmt.Sprintf("%032x", "site-a") {
		t.Errorf("upload token %+v: %v", tok, err)
	}
	if n := r.accepted(r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: a.Token, body: []byte("up 1\n")})).Accepted; n != 1 {
		t.Errorf("%d samples accepted", n)
	}
	if !strings.Contains(r.held("site-a", ""), `up{_id="site-a",instance="",job="",region="eu"} 1`) {
		t.Errorf("not served as authorized:\n%s", r.held("site-a", ""))
	}
	// No upload token outlives its client token.
	short := r.token(KindClient, "site-a", func(tok *Token) { tok.Expires = testNow.Unix() + 90 })
	if b := authorize(short); b.ExpiresInSeconds != 90 {
		t.Errorf("upload token of a client token for 90 s is valid for %d s", b.ExpiresInSeconds)
	} else {
		r.clock.Store(int64(90 * time.Second))
		for _, token := range []string{b.Token, short} {
			if got := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: token, body: []byte("up 2\n")}); got.status != 401 {
				t.Errorf("after its expiry: %d", got.status)
			}
		}
	}
	// A new first key signs; tokens of the old one still work, until it is gone.
	r.keys = testKeys(t, 2, 1)
	r.reload(func(*ReloadableServerConfig) {})
	if got, err := ParseUnverifiedToken(authorize(client).Token); err != nil || got.KeyID != r.keys.IDs()[0] {
		t.Errorf("after a rotation key %s signs: %v", got.KeyID, err)
	}
	r.keys = testKeys(t, 2)
	r.reload(func(*ReloadableServerConfig) {})
	if got := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: a.Token}); got.status != 401 {
		t.Errorf("signed by a key that is gone: %d", got.status)
	}
}

// TestAuthorizeURL: another service says who may push.
func TestAuthorizeURL(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.Error("a redirect was followed, with the token")
	}))
	defer elsewhere.Close()
	hang := make(chan struct{})
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "POST" || r.URL.Path != "/auth" || r.URL.Query().Get("tenant") != "7" || r.Header.Get("Authorization") != "Bearer opaque~token" {
			t.Errorf("asked %s %s %v", r.Method, r.URL, r.Header)
		}
		switch id := r.URL.Query().Get("id"); id {
		case "labels":
			fmt.Fprint(w, `{"labels":{"region":"eu","_id":"site-b"},"more":[1]}`)
		case "text":
			fmt.Fprint(w, "fine")
		case "empty":
			w.WriteHeader(204)
		case "redirect":
			http.Redirect(w, r, elsewhere.URL, http.StatusFound)
		case "hang":
			<-hang
		case "huge":
			fmt.Fprintf(w, `{"labels":{"region":"eu"},"pad":%q}`, strings.Repeat("x", 1<<20))
		case "cut":
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, `{"labels":{"reg`)
		case "mistyped":
			fmt.Fprint(w, `{"labels":{"region":7}}`)
		case "reserved":
			fmt.Fprint(w, `{"labels":{"__name__":"up"}}`)
		default:
			code, _ := strconv.Atoi(strings.TrimPrefix(id, "code-"))
			http.Error(w, "internal detail", code)
		}
	}))
	defer service.Close()
	defer close(hang)
	r := newSrvRig(t, func(_ *StoreConfig, c *ServerConfig) {
		u, err := url.Parse(service.URL + "/auth?tenant=7&id=forged")
		if err != nil {
			t.Fatal(err)
		}
		c.ExternalAuthorizer = NewExternalAuthorizer(u, NewHTTPClient(nil, 300*time.Millisecond, 10*time.Second))
	})
	r.secrets = append(r.secrets, "internal detail", service.Listener.Addr().String(), elsewhere.URL)
	revoked, err := ParseRevokedIDs([]byte("gone\n"))
	if err != nil {
		t.Fatal(err)
	}
	r.reload(func(st *ReloadableServerConfig) { st.Revoked = revoked })
	ask := func(id string) srvAnswer {
		t.Helper()
		return r.do(srvRequest{method: "POST", url: r.external.URL + "/authorize?id=" + url.QueryEscape(id), token: "opaque~token"})
	}
	for id, labels := range map[string]map[string]string{
		"labels": {"_id": "labels", "region": "eu"}, "text": {"_id": "text"}, "empty": {"_id": "empty"},
	} {
		got := ask(id)
		var a struct {
			Token            string
			Server           string
			ExpiresInSeconds int
			Time             int64
			Labels           map[string]string
		}
		if err := json.Unmarshal([]byte(got.body), &a); err != nil || got.status != 200 || a.ExpiresInSeconds != 3600 || a.Server != "s1" || a.Time != testNow.UnixMilli() || !maps.Equal(a.Labels, labels) {
			t.Fatalf("%s: %d %s", id, got.status, got.body)
		}
		if n := r.accepted(r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: a.Token, body: []byte("up 1\n")})).Accepted; n != 1 {
			t.Errorf("%s: %d samples accepted", id, n)
		}
	}
	for id, want := range map[string]int{
		"code-401": 401, "code-403": 403, "code-404": 503, "code-500": 503, "redirect": 503, "hang": 503,
		// Labels that cannot be read might be those that keep tenants apart.
		"huge": 503, "cut": 503, "mistyped": 503, "reserved": 503,
		"": 400, "a b": 400, "\x00": 400, "gone": 401,
	} {
		got := ask(id)
		if got.status != want {
			t.Errorf("%q: %d, not %d: %s", id, got.status, want, got.body)
		}
		if want == 503 && got.header.Get("Retry-After") == "" || want == 401 && got.header.Get("WWW-Authenticate") == "" {
			t.Errorf("%q: %v", id, got.header)
		}
	}
	if got := r.do(srvRequest{method: "POST", url: r.external.URL + "/authorize?id=labels"}); got.status != 401 {
		t.Errorf("without a token: %d", got.status)
	}
	// Who can mint client tokens is not who decides here.
	for _, token := range []string{"opaque~token", r.token(KindClient, "labels")} {
		if got := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: token, body: []byte("up 1\n")}); got.status != 401 {
			t.Errorf("client token at /upload: %d", got.status)
		}
	}
}

// TestRateLimit: bursts of 60, one a second after; each ID by itself.
func TestRateLimit(t *testing.T) {
	r := newSrvRig(t)
	for i := range 60 {
		if got := r.push("site-a", "up 1\n"); got.status != 200 {
			t.Fatalf("push %d: %d %s", i, got.status, got.body)
		}
	}
	limited := func() {
		t.Helper()
		got := r.push("site-a", "up 1\n")
		if wait, _ := strconv.Atoi(got.header.Get("Retry-After")); got.status != 429 || wait != 1 || !strings.Contains(got.body, "1s") || !strings.Contains(got.body, "60") {
			t.Fatalf("%d %v %s", got.status, got.header, got.body)
		}
	}
	limited()
	r.accepted(r.push("site-b", "up 1\n"))
	// A client token is of the same ID, and so is another upload token.
	if got := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(KindClient, "site-a")}); got.status != 429 {
		t.Errorf("with the client token: %d", got.status)
	}
	r.clock.Store(int64(time.Second)) // just after what Retry-After said
	r.accepted(r.push("site-a", "up 1\n"))
	limited()
	r.clock.Store(int64(time.Minute + time.Second))
	for range 60 {
		r.accepted(r.push("site-a", "up 1\n"))
	}
	limited()
	if n := strings.Count(r.log.String(), "\n"); n > 5 {
		t.Errorf("pushes over the limit fill the log: %d lines", n)
	}
}

// TestTrackedSites: their number is bounded, and forgetting one makes it no faster.
func TestTrackedSites(t *testing.T) {
	s := NewSitePushLimiter(time.Second)
	for i := range maxTrackedSites {
		id := strconv.Itoa(i)
		if _, err := s.AcquirePush(id, testNow); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			s.ReleasePush(id)
		}
	}
	if wait, err := s.AcquirePush("one more", testNow); err == nil || wait <= 0 {
		t.Errorf("one more than the limit: %v, %v", wait, err)
	}
	s.SetPushFailed("one more", testNow)
	s.SetTokenExpiry("one more", 7, testNow)
	later := testNow.Add(siteIdle + time.Second)
	if _, err := s.AcquirePush("one more", later); err != nil {
		t.Error(err)
	}
	if len(s.sites) != 2 { // and the one in flight
		t.Errorf("%d sites are tracked", len(s.sites))
	}
	s.ReleasePush("0")
}

// TestNoRoom: what the server cannot take is refused with a time to come again,
// without a path, and costs nothing that was accepted.
func TestNoRoom(t *testing.T) {
	disk := newCrashFS(1, "/secretdir")
	for _, c := range []struct {
		name   string
		config func(*StoreConfig, *ServerConfig)
		spoil  func(*srvRig)
		reason string
	}{
		{"not ready", nil, func(r *srvRig) { r.server.SetReady(false) }, "not ready"},
		{"samples", func(s *StoreConfig, _ *ServerConfig) { s.LimitSamples = 2 }, nil, "no room"},
		{"clusters", func(s *StoreConfig, _ *ServerConfig) { s.LimitSites = 1 }, nil, "no room"},
		{"storage", func(s *StoreConfig, _ *ServerConfig) { s.LimitStorage = 160 }, nil, "no room"},
		{"disk fails", func(s *StoreConfig, _ *ServerConfig) { s.FS = disk }, func(*srvRig) {
			disk.hook = func(int, string, string) fault { return fault{Err: errDisk} }
		}, "could not store"},
		{"disk is full", func(s *StoreConfig, _ *ServerConfig) { s.FS = disk }, func(*srvRig) {
			disk.hook = func(int, string, string) fault { return fault{Err: errFull} }
		}, "no room"},
		{"closed", nil, func(r *srvRig) {
			r.store.Close()
			for _, c := range r.store.sitesByID() {
				<-c.lock // Close comes a second time
			}
		}, "too busy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk.restart()
			var change []func(*StoreConfig, *ServerConfig)
			if c.config != nil {
				change = append(change, c.config)
			}
			r := newSrvRig(t, change...)
			r.accepted(r.push("site-a", "up 1\nup2 1\n"))
			before := r.held("site-a", "")
			if c.spoil != nil {
				c.spoil(r)
			}
			r.secrets = append(r.secrets, "site-a", "input/output", "no space")
			got := r.push("site-c", "up 1\nup2 2\n")
			if after, _ := strconv.Atoi(got.header.Get("Retry-After")); got.status != 503 || after < 1 || !strings.Contains(got.body, c.reason) {
				t.Errorf("%d %v %s", got.status, got.header, got.body)
			}
			if after := r.held("site-a", ""); after != before {
				t.Errorf("what was accepted has changed:\n%s\nfrom:\n%s", after, before)
			}
			// A server that is not ready is no fault of the site.
			if got := r.held("site-c", ""); strings.Contains(got, PushFailureTimeName+"{") == (c.name == "not ready") || strings.Count(got, "\n") > 1 {
				t.Errorf("left by the refused push:\n%s", got)
			}
			disk.restart()
		})
	}
}

// TestRefusedLeavesNothing: a first push that fails half way through leaves
// neither series nor cluster, and the next is taken whole.
func TestRefusedLeavesNothing(t *testing.T) {
	r := newSrvRig(t)
	for _, body := range []string{"a 1\nb{ 1\n", "a 1\nb 1", "a 1\npush_time_seconds 1\n"} {
		if got := r.push("site-a", body); got.status != 400 {
			t.Errorf("%q: %d", body, got.status)
		}
	}
	if st := r.store.Stats(); len(st.Sites) != 0 || st.LogBytes != 0 || r.store.totals.Samples.Load() != 0 {
		t.Errorf("left: %+v", st)
	}
	if got := r.accepted(r.push("site-a", "a 1\nb 1\n")); got.Accepted != 2 {
		t.Errorf("accepted %+v", got)
	}
}

// TestVanishingClient: whoever hangs up in the middle of a body leaves nothing.
func TestVanishingClient(t *testing.T) {
	r := newSrvRig(t)
	for _, length := range []string{"Content-Length: 1000\r\n", "Transfer-Encoding: chunked\r\n"} {
		c := dialRaw(t, r.external.Listener.Addr().String())
		fmt.Fprintf(c, "POST /upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n%s\r\n5\r\nup 1\n\r\n", r.token(KindUpload, "site-a"), length)
		eventually(t, "the push is in flight", func() bool { return r.server.inFlight.findOrAddSeries(nil).load() == 1 })
		c.Close()
		eventually(t, "the push has ended", func() bool { return r.server.inFlight.findOrAddSeries(nil).load() == 0 })
	}
	eventually(t, "nothing is left", func() bool {
		r.server.sites.mu.Lock()
		defer r.server.sites.mu.Unlock()
		return len(r.server.uploads) == 0 && len(r.server.decoding) == 0 && r.server.sites.sites["site-a"].inFlight == 0
	})
	if st := r.store.Stats(); len(st.Sites) != 0 {
		t.Errorf("left: %+v", st)
	}
	// A client that says what it will send, and then waits to be asked for it, is
	// not asked if its token is no good.
	c := dialRaw(t, r.external.Listener.Addr().String())
	c.send("POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n")
	if line, err := c.answers.ReadString('\n'); err != nil || !strings.Contains(line, "401") {
		t.Errorf("answered %q: %v", line, err)
	}
}

// TestConcurrentUploads: one ID has at most four pushes in flight, and that
// stops no other.
func TestConcurrentUploads(t *testing.T) {
	r := newSrvRig(t)
	var wg sync.WaitGroup
	var bodies []*io.PipeWriter
	for i := range maxPushesPerSite {
		body, w := io.Pipe()
		bodies = append(bodies, w)
		req, err := http.NewRequest("POST", r.external.URL+"/upload", body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+r.token(KindUpload, "site-a"))
		wg.Go(func() {
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("push %d: %v %v", i, resp, err)
				return
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		})
	}
	eventually(t, "all are in flight", func() bool { return r.server.inFlight.findOrAddSeries(nil).load() == maxPushesPerSite })
	got := r.push("site-a", "up 1\n")
	if got.status != 429 || got.header.Get("Retry-After") != "1" || !strings.Contains(got.body, "4 pushes of this cluster ID") {
		t.Errorf("a fifth: %d %v %s", got.status, got.header, got.body)
	}
	r.accepted(r.push("site-b", "up 1\n"))
	for i, w := range bodies {
		fmt.Fprintf(w, "up{i=\"%d\"} 1\n", i)
		w.Close()
	}
	wg.Wait()
	r.accepted(r.push("site-a", "up 1\n"))
	if n := len(r.parsed("")["up"].Metric); n != maxPushesPerSite+2 {
		t.Errorf("%d series are served", n)
	}
}

// TestAnswerWithoutBody: what is answered without the body does not wait for it, and
// ends the connection; a push that is taken, and a token, keep it.
func TestAnswerWithoutBody(t *testing.T) {
	r := newSrvRig(t)
	for range rateBurst {
		if _, err := r.server.sites.AcquirePush("fast", r.now()); err != nil {
			t.Fatal(err)
		}
		r.server.sites.ReleasePush("fast")
	}
	for _, c := range []struct {
		path, token, header, body string
		status                    int
		keeps                     bool
	}{
		{"/upload", "", "Content-Length: 4000", "u", 401, false},
		{"/upload?id=other", r.token(KindUpload, "a"), "Content-Length: 4000", "u", 403, false},
		{"/upload", r.token(KindUpload, "a"), "Content-Length: 4000\r\nContent-Type: image/png", "u", 415, false},
		{"/upload", r.token(KindUpload, "a"), "Transfer-Encoding: chunked\r\nContent-Encoding: br", "1\r\nu\r\n", 415, false},
		{"/upload", r.token(KindUpload, "fast"), "Content-Length: 4000", "u", 429, false},
		{"/authorize", r.token(KindClient, "a"), "Content-Length: 4000", "u", 200, false},
		{"/authorize", r.token(KindClient, "a"), "Transfer-Encoding: chunked", "1\r\nu\r\n", 200, false},
		{"/authorize", r.token(KindClient, "a"), "Content-Length: 0", "", 200, true},
		{"/upload", r.token(KindUpload, "a"), "Content-Length: 5", "up 1\n", 200, true},
		{"/upload", r.token(KindUpload, "a"), "Transfer-Encoding: chunked", "5\r\nup 1\n\r\n0\r\n\r\n", 200, true},
		{"/upload", r.token(KindUpload, "a"), "Content-Length: 3", "up\n", 400, false},
	} {
		conn := dialRaw(t, r.external.Listener.Addr().String())
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n%s\r\n\r\n%s", c.path, c.token, c.header, c.body)
		resp, err := conn.readAnswer()
		if err != nil {
			t.Errorf("%s %s: no answer: %v", c.path, c.header, err)
		} else if resp.StatusCode != c.status || resp.Close == c.keeps {
			t.Errorf("%s %s: %s, closes %t", c.path, c.header, resp.Status, resp.Close)
		}
		conn.Close()
	}
}

// TestSlowBody: a body may take as long to come as the listener lets it; only
// then does the time run in which it has to be stored.
func TestSlowBody(t *testing.T) {
	for range 8 { // a choice between two cases that are both ready is random
		synctest.Test(t, func(t *testing.T) {
			store, err := OpenStore(StoreConfig{Retention: time.Hour, Now: time.Now})
			if err != nil {
				t.Fatal(err)
			}
			s := NewServer(ServerConfig{Store: store, Metrics: NewMetrics(), Log: slog.New(slog.DiscardHandler), Now: time.Now, LimitBytes: 1 << 20})
			keys := testKeys(t, 1)
			s.Reload(ReloadableServerConfig{Keys: keys, Normalizer: &ServerNormalizer{}})
			s.SetReady(true)
			body, w := io.Pipe()
			go func() {
				time.Sleep(storeTimeout + 20*time.Second)
				io.WriteString(w, "up 1\n")
				w.Close()
			}()
			req := httptest.NewRequest("POST", "/upload", body)
			req.Header.Set("Authorization", "Bearer "+signToken(t, keys, Token{Kind: KindUpload, ClusterID: "far-away", ID: strings.Repeat("0", 32)}))
			rec := httptest.NewRecorder()
			s.ExternalHandler().ServeHTTP(rec, req)
			if rec.Code != 200 {
				t.Errorf("%d %s", rec.Code, rec.Body)
			}
		})
	}
}

// TestFederate: what a scrape gets.
func TestFederate(t *testing.T) {
	r := newSrvRig(t)
	ms := testNow.UnixMilli()
	r.accepted(r.push("site-a", fmt.Sprintf("up 1 %d\nup 2 %d\nold 1 %d\n{\"a.b\",\"c.d\"=\"e\"} 3\n", ms-1000, ms, ms-11*60_000)))
	client := r.token(KindClient, "site-b", func(tok *Token) { tok.Expires = testNow.Unix() + 1000 })
	r.accepted(r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: client, body: []byte("up{job=\"node\"} NaN\n")}))
	r.push("site-b", "broken")
	s := strconv.FormatInt(ms/1000, 10)
	if ms < 1e12 || s == "" {
		t.Fatal("the clock is wrong")
	}
	own := func(id string) string { return `{_id="` + id + `",instance="",job="",server="s1"} ` }
	at := fmt.Sprintf(" %d\n", ms)
	want := "# TYPE a_b untyped\na_b{_id=\"site-a\",c_d=\"e\",instance=\"\",job=\"\"} 3" + at +
		"# TYPE push_failure_time_seconds untyped\npush_failure_time_seconds" + own("site-b") + s + "\n" +
		"# TYPE push_time_seconds untyped\npush_time_seconds" + own("site-a") + s + "\npush_time_seconds" + own("site-b") + s + "\n" +
		"# TYPE telemeter_cluster_samples untyped\ntelemeter_cluster_samples" + own("site-a") + "4\ntelemeter_cluster_samples" + own("site-b") + "1\n" +
		"# TYPE telemeter_cluster_series untyped\ntelemeter_cluster_series" + own("site-a") + "3\ntelemeter_cluster_series" + own("site-b") + "1\n" +
		"# TYPE telemeter_cluster_token_expiry_seconds untyped\ntelemeter_cluster_token_expiry_seconds" + own("site-b") + strconv.FormatInt(ms/1000+1000, 10) + "\n" +
		"# TYPE up untyped\nup{_id=\"site-a\",instance=\"\",job=\"\"} 2" + at + "up{_id=\"site-b\",instance=\"\",job=\"node\"} NaN" + at
	if got := r.federate("", ""); got != want {
		t.Errorf("served:\n%s\nwanted:\n%s", got, want)
	}
	r.parsed("")
	for _, c := range []struct {
		query, accept string
		names         string // of the lines
	}{
		{"match[]=up", "", "up up"},
		{`match[]=up{_id="site-b"}`, "", "up"},
		{`match[]=up{job=""}&match[]={__name__=~"push_time.*",_id="site-a"}`, "", "push_time_seconds up"},
		{`match[]={"a.b"}`, acceptUTF8, `"a.b",_id="site-a","c.d"="e",instance="",job=""`},
		{`match[]=none`, "", ""},
		{"other=1", "text/plain;escaping=values", "U__a_2e_b push_failure_time_seconds push_time_seconds push_time_seconds telemeter_cluster_samples telemeter_cluster_samples telemeter_cluster_series telemeter_cluster_series telemeter_cluster_token_expiry_seconds up up"},
	} {
		var names []string
		for line := range strings.Lines(r.federate(strings.ReplaceAll(c.query, `"`, "%22"), c.accept)) {
			if name, rest, _ := strings.Cut(line, "{"); line[0] != '#' {
				if name == "" {
					name, _, _ = strings.Cut(rest, "}")
				}
				names = append(names, name)
			}
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); got != c.names {
			t.Errorf("%s: %q, not %q", c.query, got, c.names)
		}
	}
	for query, reason := range map[string]string{
		"match[]=up{": "match[]", "match[]={}": "empty string", "match[]=": "match[]", `match[]={a=~"("}`: "pattern", "match[]=%zz": "query", "a;b": "query",
		strings.Repeat("match[]=a&", 1001): "at most 1000",
	} {
		got := r.do(srvRequest{method: "GET", url: r.internal.URL + "/federate?" + strings.ReplaceAll(query, `"`, "%22")})
		if got.status != 400 || !strings.Contains(got.body, reason) {
			t.Errorf("%.50s: %d %s", query, got.status, got.body)
		}
	}
	for _, c := range []struct{ accept, contentType string }{
		{"", "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"},
		{acceptUTF8, "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"},
		{"text/html", "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"},
	} {
		a := r.do(srvRequest{method: "GET", url: r.internal.URL + "/federate", header: map[string]string{"Accept": c.accept, "Accept-Encoding": "gzip"}})
		text := gunzipped(t, []byte(a.body))
		if a.header.Get("Content-Type") != c.contentType || a.header.Get("Content-Encoding") != "gzip" || string(text) != r.federate("", c.accept) {
			t.Errorf("Accept %q with gzip: %v", c.accept, a.header)
		}
	}
	// What has not been pushed for --max-sample-age is shown no more, but for what
	// tells that it is so.
	r.clock.Store(int64(11 * time.Minute))
	if got := r.federate("match[]=up", ""); got != "" {
		t.Errorf("still served:\n%s", got)
	}
	if got := r.federate("match[]=push_time_seconds", ""); strings.Count(got, "\n") != 3 {
		t.Errorf("push times of silent sites:\n%s", got)
	}
}

// TestScrapeLimit: an answer at its limit says so, and others begin elsewhere, so
// that no site is left out for long.
func TestScrapeLimit(t *testing.T) {
	r := newSrvRig(t, func(_ *StoreConfig, c *ServerConfig) { c.LimitScrape = 50 })
	var text strings.Builder
	for i := range 40 {
		fmt.Fprintf(&text, "up{i=\"%d\"} 1\n", i)
	}
	sites := []string{"a", "b", "c"}
	for _, id := range sites {
		r.accepted(r.push(id, text.String()))
	}
	seen := map[string]int{}
	const scrapes = 12
	for range scrapes {
		got := r.federate("match[]=up", "")
		for _, id := range sites {
			seen[id] += strings.Count(got, `_id="`+id+`"`)
		}
	}
	for _, id := range sites {
		if seen[id] < 40*scrapes/3/2 {
			t.Errorf("in %d scrapes, of which each has room for one site: %v", scrapes, seen)
		}
	}
	if n := r.server.federate.truncated.Value(); n != scrapes {
		t.Errorf("%v scrapes are counted as truncated, want %d", n, scrapes)
	}
}

// TestInternal: who may read, and what else the internal listener has.
func TestInternal(t *testing.T) {
	r := newSrvRig(t)
	get := func(path, token string) srvAnswer {
		t.Helper()
		return r.do(srvRequest{method: "GET", url: r.internal.URL + path, token: token})
	}
	if got := get("/", ""); got.status != 200 || !strings.Contains(got.body, `"/federate"`) {
		t.Errorf("/: %d %s", got.status, got.body)
	}
	if got := get("/metrics", ""); got.status != 200 || !strings.Contains(got.body, "telemeter_pushes_total") {
		t.Errorf("/metrics: %d %.100s", got.status, got.body)
	}
	for _, path := range []string{"/upload", "/authorize", "/nothing", "/federate/"} {
		if got := get(path, ""); got.status != 404 {
			t.Errorf("%s: %d", path, got.status)
		}
	}
	if got := r.do(srvRequest{method: "POST", url: r.internal.URL + "/federate"}); got.status != 405 || got.header.Get("Allow") != "GET, HEAD" {
		t.Errorf("POST: %d %v", got.status, got.header)
	}
	if got := r.do(srvRequest{method: "HEAD", url: r.internal.URL + "/federate"}); got.status != 200 || got.body != "" {
		t.Errorf("HEAD: %d %s", got.status, got.body)
	}
	const secret = "s3cr3t-of-the-scraper"
	r.secrets = append(r.secrets, secret)
	r.reload(func(st *ReloadableServerConfig) { st.FederateToken = secret })
	for _, path := range []string{"/", "/federate", "/federate?match[]=up", "/metrics", "/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/cmdline"} {
		for _, token := range []string{"", "xyzzy", secret + "x", secret[1:], r.token(KindUpload, "site-a"), r.token(KindClient, "site-a")} {
			if got := get(path, token); got.status != 401 || !strings.HasPrefix(got.header.Get("WWW-Authenticate"), "Bearer ") || !strings.Contains(got.body, "--federate-token-file") {
				t.Errorf("%s with %.10q: %d %v %s", path, token, got.status, got.header, got.body)
			}
		}
		if got := get(path, secret); got.status != 200 {
			t.Errorf("%s with the token: %d", path, got.status)
		}
	}
	for _, path := range []string{"/healthz", "/healthz/ready"} { // what a load balancer asks
		if got := get(path, ""); got.status != 200 {
			t.Errorf("%s: %d", path, got.status)
		}
	}
	r.server.SetReady(false)
	if got := get("/healthz/ready", ""); got.status != 503 || got.header.Get("Retry-After") == "" {
		t.Errorf("not ready: %d %v", got.status, got.header)
	}
	if got := get("/healthz", ""); got.status != 200 {
		t.Errorf("alive: %d", got.status)
	}
	// A scraper's token does not let push.
	if got := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: secret}); got.status != 401 {
		t.Errorf("federate token at /upload: %d", got.status)
	}
	for remote, want := range map[string]int{
		"127.0.0.1:9": 200, "127.9.9.9:9": 200, "[::1]:9": 200, "[::ffff:127.0.0.1]:9": 200,
		"10.0.0.1:9": 403, "[2001:db8::1]:9": 403, "[fe80::1%lo]:9": 403, "": 403, "@": 403,
	} {
		req := httptest.NewRequest("GET", "/debug/pprof/cmdline", nil)
		req.RemoteAddr = remote
		req.Header.Set("Authorization", "Bearer "+secret)
		req.Header.Set("X-Forwarded-For", "127.0.0.1")
		rec := httptest.NewRecorder()
		r.server.InternalHandler().ServeHTTP(rec, req)
		if rec.Code != want {
			t.Errorf("profiles for %q: %d", remote, rec.Code)
		}
	}
}

// TestHostileSite: two sites with the same series; one turns hostile. Nothing
// that the other pushed changes by a byte, nor can be read or written as the
// other, and every scrape still parses.
func TestHostileSite(t *testing.T) {
	r := newSrvRig(t, func(s *StoreConfig, c *ServerConfig) { c.RateInterval, c.LimitBytes = 0, 64<<10 })
	ms := testNow.UnixMilli()
	honest := fmt.Sprintf("# TYPE up gauge\nup{job=\"node\",instance=\"i:1\"} 1 %d\n# TYPE http_total counter\nhttp_total{code=\"200\"} 7 %d\n"+
		"# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n{\"utf8.name\",\"l.l\"=\"v\"} 5 %d\n", ms, ms, ms)
	r.accepted(r.push("site-b", honest))
	r.accepted(r.push("site-a", honest))
	accepts := []string{"", acceptUTF8, "text/plain;escaping=values"}
	var before []string
	for _, accept := range accepts {
		before = append(before, r.held("site-b", accept))
	}
	if strings.Count(before[0], "\n") != 9 { // and its push time, series and samples
		t.Fatalf("site-b before:\n%s", before[0])
	}
	stale := math.Float64frombits(0x7ff0000000000002)
	name := func(s string) *dto.MetricFamily { return gaugeFamily(s, 666, &ms) }
	uint := func(n uint64) *uint64 { return &n }
	str := func(s string) *string { return &s }
	float := func(v float64) *float64 { return &v }
	type push struct {
		body   []byte
		header map[string]string
	}
	text := func(s string) push { return push{body: []byte(s)} }
	proto := func(fams ...*dto.MetricFamily) push {
		return push{protoBody(t, fams...), map[string]string{"Content-Type": protoType}}
	}
	pushes := []push{
		// As the other.
		text(`up{_id="site-b",job="node",instance="i:1"} 666` + fmt.Sprintf(" %d\n", ms+1)),
		text(`up{_id="site-a",_id="site-b",job="node",instance="i:1"} 666` + "\n"),
		text(`up{"_id"="site-b",job="node",instance="i:1"} 666` + "\n"),
		text("{\"up\",_id=\"site-b\"} 666\n"),
		proto(gaugeFamily("up", 666, &ms, "_id", "site-b", "_id", "site-b", "job", "node", "instance", "i:1")),
		// Out of a label value, name or line.
		text("x{a=\"\\\"} 1\\nup{_id=\\\"site-b\\\"} 666\"} 1\n"),
		text("x{a=\"\\\\\",b=\"\\n\"} 1\n"),
		proto(gaugeFamily("x", 1, &ms, "a", "\"} 1\nup{_id=\"site-b\",instance=\"i:1\",job=\"node\"} 666 "+strconv.FormatInt(ms+1, 10)+"\n#")),
		proto(gaugeFamily("x", 1, &ms, "a=\"\",_id=\"site-b\"} 666\n#", "v")),
		proto(gaugeFamily("x", 1, &ms, "a", "\r\nup{_id=\"site-b\"} 666\r\n")),
		proto(name("up{_id=\"site-b\",instance=\"i:1\",job=\"node\"}")),
		proto(name("up{_id=\"site-b\",instance=\"i:1\",job=\"node\"} 666\n")),
		proto(name("x\n# TYPE up counter\nup")), proto(name("# EOF")), proto(name("#")), proto(name(" ")), proto(name("")), proto(name("\n")),
		proto(name("up ")), proto(name("\tup")), proto(name("\"up\"")), proto(name("{\"up\"}")), proto(name("9up")), proto(name("\u2028")), proto(name("\\")),
		proto(name("u\u0440")), proto(name("up\u200b")), proto(name("\xffup")), proto(name("up\x00")), proto(name("__name__")), proto(name("U__75_p")), proto(name("U___")),
		// Labels that clash, or mean something.
		text("up{__name__=\"http_total\"} 1\n"), text("up{__address__=\"x\"} 1\n"), text("up{job=\"\",instance=\"\"} 1\n"),
		text("up{job=\"node\",job=\"node\"} 1\n"), text("up{\"j.b\"=\"1\",j_b=\"2\"} 1\n"), text("up{\"j.b\"=\"1\",\"j-b\"=\"2\"} 1\n"),
		text("up{\".id\"=\"site-b\"} 666\n"), text("up{\".id\"=\"site-b\",\"-id\"=\"site-b\"} 666\n"), text("up{\"..name..\"=\"x\"} 1\n"), text("up{le=\"x\",quantile=\"y\"} 1\n"),
		proto(gaugeFamily("up", 1, &ms, "", "x")), proto(gaugeFamily("up", 1, &ms, "a", "\xc3\x28")), proto(gaugeFamily("up", 1, &ms, "\xc3\x28", "a")), proto(gaugeFamily("up", 1, &ms, "a", "\x00")),
		// The other's names with other types, and components of them.
		text("# TYPE up counter\n# TYPE up histogram\nup_bucket{le=\"1\"} 1\nup_total 1\nup_count 1\n# TYPE h gauge\nh 1\n# TYPE http_total summary\nhttp_total 1\n"),
		text("# HELP up \\x\n# UNIT up s\n# TYPE up\n# TYPE\n#\nup 1\n"),
		proto(&dto.MetricFamily{Name: str("up"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{{TimestampMs: &ms, Histogram: &dto.Histogram{
			SampleCount: uint(math.MaxUint64), SampleSum: float(math.NaN()), Bucket: []*dto.Bucket{{UpperBound: float(math.NaN()), CumulativeCount: uint(1)}, {UpperBound: float(math.Inf(-1))}, {UpperBound: float(math.NaN())}}}}}}),
		proto(&dto.MetricFamily{Name: str("h_bucket"), Type: dto.MetricType_SUMMARY.Enum(), Metric: []*dto.Metric{{Summary: &dto.Summary{Quantile: []*dto.Quantile{{Quantile: float(0.5)}, {Quantile: float(0.5)}}}}}}),
		proto(&dto.MetricFamily{Name: str("up"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{{Histogram: &dto.Histogram{Schema: new(int32), ZeroCount: uint(1)}}}}),
		// Names that escaping makes into others'.
		proto(name("http.total")), proto(name("http-total")), proto(name("utf8_name")), proto(name("utf8-name")), proto(name("U__utf8_2e_name")), proto(name("U__utf8_2e_name"), name("utf8.name")),
		proto(gaugeFamily("utf8.name", 666, &ms, "l_l", "v")), proto(gaugeFamily("utf8.name", 666, &ms, "l.l", "v", "l-l", "v")),
		// The server's own.
		text("push_time_seconds 9e9\n"), text("push_failure_time_seconds 0\n"), text("telemeter_cluster_token_expiry_seconds{_id=\"site-b\"} 0\n"),
		proto(name("push.time.seconds")), proto(gaugeFamily("push-time.seconds", 9e9, &ms, "x", "y")), proto(name("telemeter.cluster.token.expiry.seconds")), proto(name("U__push_5f_time_5f_seconds")),
		// Values.
		proto(gaugeFamily("http_total", stale, &ms, "code", "200")), proto(gaugeFamily("up", math.Float64frombits(0x7ff8000000000666), &ms)),
		text("up NaN\nup{a=\"1\"} +Inf\nup{a=\"2\"} -Inf\nup{a=\"3\"} -0\nup{a=\"4\"} 1e308\nup{a=\"5\"} 5e-324\n"), text("up 0x1p-2\n"), text("up 1_0\n"), text("up nan\n"), text("up stale\n"),
	}
	for _, at := range []int64{0, 1, -1, 86400_000, 4102444800_000, math.MinInt64, math.MaxInt64, math.MinInt64 + 1, ms - 2*3600_000, ms + 60_000, ms + 60_001} {
		pushes = append(pushes, text(fmt.Sprintf("up{job=\"node\",instance=\"i:1\"} 666 %d\n", at)), proto(gaugeFamily("http_total", 666, &at, "code", "200")),
			push{fmt.Appendf(nil, "up{job=\"node\",instance=\"i:1\"} 667 %d\n# EOF\n", at), map[string]string{"Content-Type": omType}})
	}
	pushes = append(pushes,
		text("up 1 99999999999999999999\n"), push{[]byte("up 1 NaN\n# EOF\n"), map[string]string{"Content-Type": omType}}, push{[]byte("up 1 1e300\n# EOF\n"), map[string]string{"Content-Type": omType}},
		push{binary.AppendUvarint(nil, math.MaxUint64), map[string]string{"Content-Type": protoType}},
		push{bytes.Repeat([]byte{0}, 1000), map[string]string{"Content-Type": protoType}},
		push{gzipped(bytes.Repeat([]byte("up 1\n"), 100_000)), map[string]string{"Content-Encoding": "gzip"}},
		text(strings.Repeat("x{", 20_000)), text("x{a=\""+strings.Repeat("\\", 60_001)+"\"} 1\n"), text("x"+strings.Repeat("y", 60_000)+" 1\n"), text(strings.Repeat("\n", 60_000)),
		proto(gaugeFamily("x", 1, &ms, "a", strings.Repeat("\xff", 60_000))), proto(gaugeFamily(strings.Repeat("\xff", 60_000), 1, &ms)),
		proto(gaugeFamily("x", 1, &ms, strings.Repeat("\x80", 60_000), "v")), proto(gaugeFamily("x", 1, &ms, "__"+strings.Repeat("a", 60_000), "v")),
		text("x{"+strings.Repeat("a", 30_000)+"=\"1\","+strings.Repeat("a", 30_000)+"=\"1\"} 1\n"), text("x{\""+strings.Repeat("a", 60_000)+"\"} 1\n"),
		text("x{"+strings.Repeat("a=\"b\",", 128)+"} 1\n"),
	)
	taken := 0
	for i, p := range pushes {
		for _, kind := range []string{KindUpload, KindClient} {
			r.secrets = []string{keyLine(1), "secretdir"}
			a := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(kind, "site-a"), header: p.header, body: p.body})
			switch a.status {
			case 200:
				taken++
			case 400, 413:
			default:
				t.Errorf("push %d %.100q: %d %s", i, p.body, a.status, a.body)
			}
		}
	}
	for _, id := range []string{"site-b", "SITE-B", "site-b ", "site-b\x00"} { // a valid token for one ID is none for another
		a := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload?id=" + url.QueryEscape(id), token: r.token(KindUpload, "site-a"), body: []byte("up 666\n")})
		if a.status != 403 {
			t.Errorf("id=%q: %d", id, a.status)
		}
	}
	for i, accept := range accepts {
		if got := r.held("site-b", accept); got != before[i] {
			t.Errorf("Accept %q: site-b has become:\n%s\nfrom:\n%s", accept, got, before[i])
		}
	}
	fams := r.parsed("")
	for name, f := range fams {
		for _, m := range f.Metric {
			id := ""
			for _, l := range m.Label {
				if l.GetName() == ClusterLabel {
					id = l.GetValue()
				}
			}
			if v := m.Untyped.GetValue(); id != "site-a" && id != "site-b" || id == "site-b" && (v == 666 || v == 667) {
				t.Errorf("%s %v is served", name, m)
			}
			if math.Float64bits(m.Untyped.GetValue()) == math.Float64bits(stale) {
				t.Errorf("a stale marker is served: %s", name)
			}
		}
	}
	// Names that say of a site what only the server may say.
	for _, accept := range accepts {
		if n := strings.Count(r.held("site-a", accept), "\n"+PushTimeName+"{"); n > 1 {
			t.Errorf("Accept %q: site-a has %d push times", accept, n)
		}
	}
	if taken < 40 {
		t.Errorf("only %d of %d pushes were taken: the list does not test what it should", taken, 2*len(pushes))
	}
	if log := r.log.String(); strings.Contains(log, "panic") || len(log) > 2*len(pushes)*2<<10 {
		t.Errorf("the log has grown to %d bytes", len(log))
	}
	// And the hostile one's own flood fills nothing of the other's.
	var flood strings.Builder
	for i := range 101 {
		fmt.Fprintf(&flood, "f{i=\"%d\"} 1\n", i)
	}
	if a := r.push("site-a", flood.String()); a.status != 413 {
		t.Errorf("over the series limit: %d", a.status)
	}
	r.accepted(r.push("site-b", "late 1\n"))
}

// TestTwoSitesAtOnce: what two sites push at the same time under the same names
// stays apart, sample by sample.
func TestTwoSitesAtOnce(t *testing.T) {
	r := newSrvRig(t, func(_ *StoreConfig, c *ServerConfig) { c.RateInterval = 0 })
	var wg sync.WaitGroup
	for site := range 4 {
		wg.Go(func() {
			for n := range 10 {
				var text strings.Builder
				for i := range 20 {
					fmt.Fprintf(&text, "m{i=\"%d\",v=\"%d\"} %d %d\n", i, site, site*1000+i, testNow.UnixMilli()+int64(n))
				}
				if a := r.push(fmt.Sprintf("site-%d", site), text.String()); a.status != 200 {
					t.Errorf("%d %s", a.status, a.body)
				}
				r.federate("", "")
			}
		})
	}
	wg.Wait()
	n := 0
	for _, m := range r.parsed("match[]=m")["m"].Metric {
		l := map[string]string{}
		for _, p := range m.Label {
			l[p.GetName()] = p.GetValue()
		}
		i, _ := strconv.Atoi(l["i"])
		site, _ := strconv.Atoi(l["v"])
		if l[ClusterLabel] != "site-"+l["v"] || m.Untyped.GetValue() != float64(site*1000+i) || m.GetTimestampMs() != testNow.UnixMilli()+9 {
			t.Errorf("served: %v", m)
		}
		n++
	}
	if n != 80 {
		t.Errorf("%d series are served", n)
	}
}

// TestAcceptedSurvives: whatever was answered 200 is there after the process is
// killed, refusals in between or not.
func TestAcceptedSurvives(t *testing.T) {
	disk := newCrashFS(3, "/secretdir")
	r := newSrvRig(t, func(s *StoreConfig, _ *ServerConfig) { s.FS = disk })
	want := 0
	for i := range 20 {
		switch i % 5 {
		case 1:
			disk.mu.Lock()
			disk.hook = failOn("sync", LogSuffix, 0, errDisk)
			disk.mu.Unlock()
		case 3:
			disk.restart()
			r.push("site-a", "broken{\n")
		}
		if a := r.push("site-a", fmt.Sprintf("m{i=\"%d\"} %d\n", i, i)); a.status == 200 {
			want++
		} else if a.status != 503 {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	before := r.federate("match[]=m", "")
	if strings.Count(before, "\nm{") != want || want < 8 || want == 20 {
		t.Fatalf("%d pushes were accepted, served:\n%s", want, before)
	}
	disk.crash()
	again := newSrvRig(t, func(s *StoreConfig, _ *ServerConfig) { s.FS = disk })
	if got := again.federate("match[]=m", ""); got != before {
		t.Errorf("after a crash:\n%s\nbefore:\n%s", got, before)
	}
}

// benchBody is a push of 230 samples in 25 families at ms, in the client's form.
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

func benchRig(b *testing.B) *srvRig {
	return newSrvRig(b, func(s *StoreConfig, c *ServerConfig) {
		s.FS, s.Dir, s.LimitSeries, s.LimitSamples, s.LimitSites = DiskFS{}, b.TempDir(), 20_000, 500_000_000, 1000
		s.Retention = 10 * 24 * time.Hour
		c.LimitBytes, c.LimitScrape, c.RateInterval = 1<<20, 500_000, 0
	})
}

// BenchmarkUpload: the whole way of a push over a connection that is kept, to a
// real disk with fsync. The client's work is not in the figure but for sending:
// bodies are made before.
func BenchmarkUpload(b *testing.B) {
	for _, c := range []struct {
		name        string
		proto, gzip bool
	}{{"text/identity", false, false}, {"text/gzip", false, true}, {"proto/identity", true, false}, {"proto/gzip", true, true}} {
		b.Run(c.name, func(b *testing.B) {
			r := benchRig(b)
			handler, token := r.server.ExternalHandler(), r.token(KindUpload, "site-a")
			bodies := make([][]byte, 256)
			const step = 15_000
			for i := range bodies {
				bodies[i] = benchBody(b, c.proto, testNow.UnixMilli()+int64(i)*step)
				if c.gzip {
					bodies[i] = gzipped(bodies[i])
				}
			}
			run := func(i int) {
				// The clock goes on with the bodies; a round of them later they come
				// from another site, so that all are new.
				r.clock.Store(int64(i%len(bodies)) * step * 1e6)
				if i%len(bodies) == 0 {
					token = r.token(KindUpload, fmt.Sprintf("site-%d", i))
				}
				req := httptest.NewRequest("POST", "/upload", bytes.NewReader(bodies[i%len(bodies)]))
				req.Header.Set("Authorization", "Bearer "+token)
				if c.proto {
					req.Header.Set("Content-Type", protoType)
				}
				if c.gzip {
					req.Header.Set("Content-Encoding", "gzip")
				}
				rec := httptest.NewRecorder()
				handler.ServeHTTP(rec, req)
				if rec.Code != 200 || !bytes.Contains(rec.Body.Bytes(), []byte(`"accepted":230`)) {
					b.Fatalf("%d %s", rec.Code, rec.Body)
				}
			}
			b.ReportAllocs()
			b.SetBytes(int64(len(bodies[0])))
			before, n := processCPU(b).Seconds(), 0
			for b.Loop() {
				run(n)
				n++
			}
			b.ReportMetric(float64(n)*230/(processCPU(b).Seconds()-before), "samples/cpu-s")
		})
	}
}

// BenchmarkFederate: a scrape of 100 sites with 230 series each.
func BenchmarkFederate(b *testing.B) {
	r := benchRig(b)
	body := benchBody(b, false, testNow.UnixMilli())
	for i := range 100 {
		a := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(KindUpload, fmt.Sprintf("site-%d", i)), body: body})
		if got := r.accepted(a); got.Accepted != 230 {
			b.Fatal(a)
		}
	}
	handler := r.server.InternalHandler()
	for _, c := range []struct{ name, query, encoding string }{
		{"identity", "", ""}, {"gzip", "", "gzip"}, {"match", `?match[]={__name__=~"node_.*",job!=""}`, ""},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			before, n := processCPU(b).Seconds(), 0
			for b.Loop() {
				req := httptest.NewRequest("GET", "/federate"+c.query, nil)
				req.Header.Set("Accept", acceptUTF8)
				req.Header.Set("Accept-Encoding", c.encoding)
				w := &discardResponse{header: http.Header{}}
				handler.ServeHTTP(w, req)
				if w.n < 50_000 {
					b.Fatalf("%d bytes", w.n)
				}
				n++
			}
			b.ReportMetric(float64(n)*23_000/(processCPU(b).Seconds()-before), "samples/cpu-s")
		})
	}
}

type discardResponse struct {
	header http.Header
	n      int
}

func (w *discardResponse) Header() http.Header         { return w.header }
func (w *discardResponse) WriteHeader(int)             {}
func (w *discardResponse) Write(p []byte) (int, error) { w.n += len(p); return len(p), nil }

// A token that does not expire takes the place of one that does, and with it its alert.
func TestExpiryEnds(t *testing.T) {
	r := newSrvRig(t)
	push := func(change ...func(*Token)) {
		token := r.token(KindClient, "site-a", change...)
		r.accepted(r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: token, body: []byte("up 1\n")}))
	}
	push(func(tok *Token) { tok.Expires = testNow.Unix() + 1000 })
	if got := r.federate("", ""); !strings.Contains(got, "token_expiry_seconds{") {
		t.Errorf("the expiry is not told:\n%s", got)
	}
	push()
	if got := r.federate("", ""); strings.Contains(got, "token_expiry_seconds{") {
		t.Errorf("the old token's expiry is still told:\n%s", got)
	}
}

// While a step of the server's clock is in doubt, a push that only one of the two times
// takes is to be sent again; its client is not blamed, and others are taken.
func TestUploadWhileClockIsInDoubt(t *testing.T) {
	doubt := time.Duration(0)
	r := newSrvRig(t, func(sc *StoreConfig, _ *ServerConfig) {
		now := sc.Now
		sc.NowInterval = func() PresentTimeRange { return PresentTimeRange{now(), now().Add(doubt)} }
	})
	r.accepted(r.push("site-a", "up 1\n"))
	doubt = 3 * time.Hour
	r.clock.Add(int64(time.Second))
	got := r.push("site-a", "up 2\n")
	if got.status != 503 || got.header.Get("Retry-After") == "" || !strings.Contains(got.body, "clock was set") {
		t.Errorf("%d %v %s", got.status, got.header, got.body)
	}
	doubt = 0
	r.accepted(r.push("site-a", "up 2\n"))
}

// pushSpool pushes a text with headers, which are names and values.
func (r *srvRig) pushSpool(cluster, text string, headers ...string) srvAnswer {
	r.t.Helper()
	h := map[string]string{}
	for i := 0; i < len(headers); i += 2 {
		h[headers[i]] = headers[i+1]
	}
	return r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(KindUpload, cluster), header: h, body: []byte(text)})
}

// lists returns what an answer says of the spool: held, a bar, and read. No list is "-".
func (c srvCounts) lists() string {
	text := func(s *string) string {
		if s == nil {
			return "-"
		}
		return *s
	}
	return text(c.Held) + "|" + text(c.Read)
}

// TestSpoolAnswers: which scrapes of a spool an answer says that the server holds, and which
// that every consumer has read.
func TestSpoolAnswers(t *testing.T) {
	const (
		spool = "00000000000000ab"
		other = "00000000000000cd"
	)
	r := newSrvRig(t)
	conn := &AnswerReadTracker{}
	ms := func(n int) int64 { return testNow.UnixMilli() + int64(n) }
	in, old := func(name string, n int) string { return fmt.Sprintf("%s %d %d\n", name, n, ms(n)) }, "old 1 5\n"
	key := ConsumerKey("x", "192.0.2.1", "")
	consumer := func(age int) string { return fmt.Sprintf("%016x:%d", key, age) }
	for i, c := range []struct {
		do                   string // "push", "scrape" or "wait"
		site, spool, text    string
		accepted, duplicates int
		lists, consumers     string
	}{
		// While no consumer is known there is no list of what is read.
		{"push", "site-a", spool + " 1", in("m", 1), 1, 0, "1|-", ""},
		{"push", "site-a", spool + " 2-3", in("m", 2) + in("m", 3), 2, 0, "1-3|-", ""},
		{"push", "site-a", spool, "", 0, 0, "1-3|-", ""},
		{"push", "site-a", other, "", 0, 0, "|-", ""},
		{"push", "site-a", "", in("m", 4), 1, 0, "-|-", ""},
		{"push", "site-a", spool + " 1,3", in("m", 1) + in("m", 3), 0, 2, "1-3|-", ""}, // was answered before
		// Samples that a consumer was served are read when it asks again.
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "1-3|", consumer(0)},
		{"push", "site-a", "", "", 0, 0, "-|-", ""},
		{"wait", "", "", "", 0, 0, "", ""},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "|1-3", consumer(0)},
		{"wait", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool + " 2", in("m", 2), 0, 1, "|1-3", consumer(10)},
		// A scrape of known samples only.
		{"push", "site-a", spool + " 4", in("m", 4), 0, 1, "4|1-3", consumer(10)},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "4|1-3", consumer(0)},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "|1-4", consumer(0)},
		// The clock may be wrong that finds all samples of a scrape untimely.
		{"push", "site-a", spool + " 5", old, 0, 0, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 5-6", old + old, 0, 0, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 7-8", in("m", 7) + old, 1, 0, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 7,9", in("m", 7) + old, 0, 1, "|1-4", consumer(0)},
		{"push", "site-a", spool + " 9", in("m", 9) + old, 1, 0, "9|1-4", consumer(0)},
		{"push", "site-a", spool + " 10-11", in("m", 10) + "bad{a=\"\x00\"} 1\n", 1, 0, "9-11|1-4", consumer(0)},
		// A scrape without samples.
		{"push", "site-a", spool + " 12", "", 0, 0, "9-12|1-4", consumer(0)},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"scrape", "", "", "", 0, 0, "", ""},
		{"push", "site-a", spool, "", 0, 0, "|1-4,9-12", consumer(0)},
		// Another site has its own numbers, though the spool has the same ID.
		{"push", "site-b", spool, "", 0, 0, "|", consumer(0)},
		{"push", "site-b", spool + " 1", in("m", 1), 1, 0, "1|", consumer(0)},
	} {
		switch c.do {
		case "scrape":
			r.scrapeOn(conn, "consumer=x")
		case "wait":
			r.clock.Add(int64(10 * time.Second))
		case "push":
			var headers []string
			if c.spool != "" {
				headers = []string{SpoolHeader, c.spool}
			}
			a := r.pushSpool(c.site, c.text, headers...)
			got := r.accepted(a)
			if got.Accepted != c.accepted || got.Duplicates != c.duplicates || got.lists() != c.lists || got.Consumers != c.consumers {
				t.Errorf("step %d, %q: answered %s, want %d accepted, %d duplicates, the lists %s and the consumers %s", i, c.spool, a.body, c.accepted, c.duplicates, c.lists, c.consumers)
			}
			if got.Server != "s1" || got.Time != r.now().UnixMilli() {
				t.Errorf("step %d: server %q, time %d", i, got.Server, got.Time)
			}
			if c.spool == "" && (strings.Contains(a.body, `"held"`) || strings.Contains(a.body, `"read"`) || strings.Contains(a.body, `"consumers"`)) {
				t.Errorf("step %d: a push that names no spool is answered %s", i, a.body)
			}
		}
	}
}

// TestSpoolQuestion: a question is no push: nothing is stored, and it does not count as the
// site's last push.
func TestSpoolQuestion(t *testing.T) {
	const spool = "00000000000000ab"
	r := newSrvRig(t)
	r.scrapeOn(&AnswerReadTracker{}, "consumer=x")
	if got := r.accepted(r.pushSpool("new", "", SpoolHeader, spool)); got.lists() != "|" {
		t.Errorf("answered %+v", got)
	}
	if n := len(r.store.sites); n != 0 {
		t.Errorf("%d sites are known after a question", n)
	}
	r.accepted(r.pushSpool("site-a", "up 1\n", SpoolHeader, spool+" 1"))
	before, bytes := r.held("site-a", ""), r.store.Stats().LogBytes
	r.clock.Add(int64(time.Minute))
	for range 3 {
		if got := r.accepted(r.pushSpool("site-a", "", SpoolHeader, spool)); got.lists() != "1|" {
			t.Errorf("answered %+v", got)
		}
	}
	if got := r.held("site-a", ""); got != before || r.store.Stats().LogBytes != bytes {
		t.Errorf("after questions, %d bytes and\n%s\nbefore, %d bytes and\n%s", r.store.Stats().LogBytes, got, bytes, before)
	}
	r.accepted(r.pushSpool("site-a", "", SpoolHeader, spool+" 2"))
	if got := r.held("site-a", ""); got == before {
		t.Error("a scrape without samples does not count as a push")
	}
}

// TestSpoolToldConsumers: scrapes count as read only when the consumers have read them that
// the site's client tells of, for that site alone.
func TestSpoolToldConsumers(t *testing.T) {
	const spool = "00000000000000ab"
	r := newSrvRig(t)
	conn := &AnswerReadTracker{}
	var told string
	site := func(id, numbers, text, want string) {
		t.Helper()
		a := r.pushSpool(id, text, SpoolHeader, strings.TrimSpace(spool+" "+numbers), ConsumersHeader, map[string]string{"site-a": told}[id])
		if got := r.accepted(a).lists(); got != want {
			t.Errorf("%s is answered %s, want the lists %s", id, a.body, want)
		}
	}
	read := func() {
		r.scrapeOn(conn, "consumer=x")
		r.scrapeOn(conn, "consumer=x")
	}
	// Nobody has scraped here: the client tells of one that did elsewhere.
	told = "0000000000000001:86400"
	site("site-a", "1", "up 1\n", "1|-") // a day ago
	told = "0000000000000001:86399"
	site("site-a", "", "", "1|")
	site("site-b", "1", "up 1\n", "1|-")
	told = ""
	read()
	site("site-b", "", "", "|1")
	site("site-a", "", "", "|1") // the other has not scraped for --retention

	told = "0000000000000001:10"
	r.clock.Add(int64(time.Minute))
	site("site-a", "2", "up 2\n", "2|1")
	site("site-b", "2", "up 2\n", "2|1")
	read()
	told = "" // it remembers
	site("site-a", "", "", "2|1")
	site("site-b", "", "", "|1-2")
	want := "0000000000000001:10," + fmt.Sprintf("%016x:0", ConsumerKey("x", "192.0.2.1", ""))
	if got := r.accepted(r.pushSpool("site-a", "", SpoolHeader, spool)).Consumers; got != want {
		t.Errorf("consumers of site-a: %s, want %s", got, want)
	}
	if got := r.accepted(r.pushSpool("site-b", "", SpoolHeader, spool)).Consumers; strings.Contains(got, "0000000000000001") {
		t.Errorf("consumers of site-b: %s", got)
	}
	// The other scrapes here, and has then read it too.
	key, err := strconv.ParseUint("1", 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	seq, _ := r.store.Consumers.SeqReadByAll(SiteKey("site-b"), r.now())
	for range 2 {
		reading, _, err := r.store.Consumers.BeginScrape(key, "y", "192.0.2.2", conn, r.now())
		if err != nil {
			t.Fatal(err)
		}
		reading.MarkServed(SiteKey("site-a"), ReadPosition{Seq: seq}, 1)
		reading.MarkServed(SiteKey("site-b"), ReadPosition{Seq: seq}, 1)
	}
	site("site-a", "", "", "|1-2")
}

// TestUploadHeaders: what is malformed in the headers of a push is answered 400 with the
// reason, and stores nothing; their lists are bounded.
func TestUploadHeaders(t *testing.T) {
	const spool = "00000000000000ab "
	ranges := func(n int) string {
		var parts []string
		for i := range n {
			parts = append(parts, strconv.Itoa(3*i+1))
		}
		return strings.Join(parts, ",")
	}
	consumers := func(n int) string { return strings.TrimSuffix(strings.Repeat("00000000000000cd:1,", n), ",") }
	for _, c := range []struct{ header, value, reason string }{
		{SpoolHeader, "", ""},
		{SpoolHeader, spool + "1-4,6,9007199254740992", ""},
		{SpoolHeader, spool + ranges(MaxPushRanges), ""},
		{SpoolHeader, spool + ranges(MaxPushRanges+1), "more than 32 ranges"},
		{SpoolHeader, spool + strings.Repeat(",", 5000), "more than 32 ranges"},
		{SpoolHeader, "ab 1", "malformed Telemeter-Spool"},
		{SpoolHeader, "0000000000000000 1", "malformed Telemeter-Spool"},
		{SpoolHeader, "00000000000000ag 1", "malformed Telemeter-Spool"},
		{SpoolHeader, "-0000000000000ab 1", "malformed Telemeter-Spool"},
		{SpoolHeader, spool + "0", `malformed range of numbers "0"`},
		{SpoolHeader, spool + "9007199254740993", "malformed range of numbers"},
		{SpoolHeader, spool + "1-9007199254740993", "malformed range of numbers"},
		{SpoolHeader, spool + "4-3", `malformed range of numbers "4-3"`},
		{SpoolHeader, spool + "3,2", `malformed range of numbers "2"`},
		{SpoolHeader, spool + "1-3,3", `malformed range of numbers "3"`},
		{SpoolHeader, spool + "1-", `malformed range of numbers "1-"`},
		{SpoolHeader, spool + "1,,2", "malformed range of numbers"},
		{SpoolHeader, spool + "1 2", "malformed range of numbers"},
		{SpoolHeader, spool + strings.Repeat("9", 8000), "malformed range of numbers"},
		{ConsumersHeader, consumers(MaxConsumers), ""},
		{ConsumersHeader, consumers(MaxConsumers + 1), "more than 64 consumers"},
		{ConsumersHeader, "cd:1", `malformed consumer "cd:1"`},
		{ConsumersHeader, "00000000000000cd", "malformed consumer"},
		{ConsumersHeader, "00000000000000cd:-1", "malformed consumer"},
		{ConsumersHeader, "00000000000000cd:1.5", "malformed consumer"},
		{ConsumersHeader, "00000000000000cd:18446744073709551615", "malformed consumer"},
		{ConsumersHeader, "00000000000000cd:1,", "malformed consumer"},
		{ConsumersHeader, "000000000000000g:1", "malformed consumer"},
	} {
		t.Run(c.header+" "+c.value[:min(len(c.value), 40)], func(t *testing.T) {
			r := newSrvRig(t)
			headers := []string{SpoolHeader, spool + "1", c.header, c.value}
			a := r.pushSpool("site-a", "up 1\n", headers...)
			if c.reason == "" {
				if n := r.accepted(a).Accepted; n != 1 {
					t.Errorf("%d accepted", n)
				}
				return
			}
			if a.status != 400 || !strings.Contains(a.body, c.reason) {
				t.Errorf("%d %s", a.status, a.body)
			}
			if st := r.store.Stats(); len(st.Sites) > 0 || r.server.pushesTotal.Value(resultMalformed) != 1 {
				t.Errorf("it left %+v, and %v are counted", st, r.server.pushesTotal.Value(resultMalformed))
			}
			if all := r.store.Consumers.LastScrapeAges(SiteKey("site-a"), r.now()); len(all) > 0 {
				t.Errorf("it told of %d consumers", len(all))
			}
		})
	}
}

// TestClockOffset: what a client says of its source's clock is shown, and changes nothing. A
// value that is no number of milliseconds is ignored, because the samples matter more.
func TestClockOffset(t *testing.T) {
	r := newSrvRig(t)
	shown := "none"
	for _, c := range []struct{ value, want string }{
		{"1500", "1.5"}, {"-90000", "-90"}, {"", "-90"}, {"0", "0"}, {"x", "0"}, {"1.5", "0"}, {"NaN", "0"}, {"9007199254740993", "0"}, {"-9007199254740993", "0"},
		{"99999999999999999999", "0"}, {"60000", "60"},
	} {
		a := r.accepted(r.pushSpool("site-a", "up 1\n", ClockOffsetHeader, c.value))
		if a.Accepted+a.Duplicates != 1 {
			t.Errorf("%q: %+v", c.value, a)
		}
		shown = "none"
		for line := range strings.Lines(r.held("site-a", "")) {
			if rest, ok := strings.CutPrefix(line, `telemeter_cluster_clock_offset_seconds{_id="site-a",instance="",job="",server="s1"} `); ok {
				shown = strings.TrimSpace(rest)
			}
		}
		if shown != c.want {
			t.Errorf("%q: %s is shown, want %s", c.value, shown, c.want)
		}
	}
	if times := r.times("site-a"); !slices.Equal(times, []int64{0}) {
		t.Errorf("samples of %v ms", times)
	}
	// A site may push to another server from then on, which shows it then.
	for after, want := range map[time.Duration]bool{10 * time.Minute: true, 10*time.Minute + time.Second: false} {
		r.clock.Store(int64(after))
		if got := r.held("site-a", ""); strings.Contains(got, "clock_offset_seconds") != want {
			t.Errorf("%v after it was told, the clock's offset is shown: %t", after, !want)
		}
	}
}
