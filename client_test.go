package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// roundTrip is a network of one function, so that clients run in virtual time.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func respond(status int, header http.Header, body string) *http.Response {
	if header == nil {
		header = http.Header{}
	}
	return &http.Response{
		StatusCode: status, Status: fmt.Sprintf("%d %s", status, http.StatusText(status)), Header: header,
		Body: io.NopCloser(strings.NewReader(body)), ProtoMajor: 1, ProtoMinor: 1,
	}
}

// fakeHub is a server that writes down what it is sent.
type fakeHub struct {
	t         *testing.T
	mu        sync.Mutex // guards asked, asks, bodies, at, hosts and headers while a client runs
	asked     []time.Time
	bodies    []string
	at        []time.Time
	hosts     []string
	headers   []http.Header
	asks      []time.Time                          // questions of what is held
	expires   int                                  // seconds
	tellsTime bool                                 // the time, and its name
	answer    func(r *http.Request) *http.Response // nil to accept
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
			h.t.Errorf("authorize with %q for %q", got, r.URL.RawQuery)
		}
		return respond(200, nil, fmt.Sprintf(`{"version":1,"token":"upload-%d","expiresInSeconds":%d,"labels":{"_id":"site"}%s}`, len(h.asked), h.expires, h.clock(r))), nil
	case "/upload":
		if names, err := ParseScrapeNames(r.Header.Get(SpoolHeader)); err != nil || names.SpoolID == 0 || len(names.Numbers) == 0 && r.ContentLength != 0 {
			if r.Header.Get(SpoolHeader) != "" {
				h.t.Errorf("a push names %q, %v", r.Header.Get(SpoolHeader), err)
			}
		} else if len(names.Numbers) == 0 {
			h.asks = append(h.asks, time.Now())
			return respond(200, nil, `{"accepted":0,"duplicates":0,"dropped":{}`+h.clock(r)+`}`), nil
		}
		h.hosts = append(h.hosts, r.URL.Host)
		h.at = append(h.at, time.Now())
		h.headers = append(h.headers, r.Header)
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

// clock returns what an answer tells of the server's clock.
func (h *fakeHub) clock(r *http.Request) string {
	if !h.tellsTime {
		return ""
	}
	return fmt.Sprintf(`,"server":%q,"time":%d`, r.URL.Host, time.Now().UnixMilli())
}

// testBoot is a boot-time clock that started 1000 s before the epoch of a test.
func testBoot() func() (int64, string) {
	start := time.Now()
	return func() (int64, string) { return time.Since(start).Milliseconds() + 1_000_000, "boot-1" }
}

// newTestClient returns a client of an exporter with the given text, and its hub.
// Its spool is in memory.
func newTestClient(t *testing.T, text string, change func(*ClientConfig, *ClientReloadConfig)) (*Client, *fakeHub, *logBuffer) {
	t.Helper()
	return newSpoolClient(t, text, SpoolConfig{}, change)
}

// newSpoolClient returns a client with a spool of its own.
func newSpoolClient(t *testing.T, text string, spool SpoolConfig, change func(*ClientConfig, *ClientReloadConfig)) (*Client, *fakeHub, *logBuffer) {
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

func TestClientPhase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		c, hub, _ := newTestClient(t, "a 1\n", nil)
		runFor(t, c, 20*time.Minute)
		if len(hub.at) < 10 || len(hub.at) > 11 {
			t.Fatalf("%d pushes in 20 minutes at an interval of 2", len(hub.at))
		}
		if first := hub.at[0].Sub(start); first > time.Second {
			t.Errorf("the first push came after %v", first)
		}
		for i := 2; i < len(hub.at); i++ {
			if gap := hub.at[i].Sub(hub.at[i-1]); gap != 2*time.Minute {
				t.Errorf("push %d came %v after the one before", i, gap)
			}
		}
		other, hub2, _ := newTestClient(t, "a 1\n", func(c *ClientConfig, _ *ClientReloadConfig) { c.ClusterID = "other" })
		hub2.t = t
		phase := func(c *Client) time.Duration { return c.untilNextPhase(start, 2*time.Minute) }
		if phase(c) == phase(other) {
			t.Error("two cluster IDs have the same phase")
		}
	})
}

// Whenever a client starts, and however long its first push takes, each later scrape is
// pushed at once.
func TestClientPushesAtOnce(t *testing.T) {
	for i := range 20 {
		synctest.Test(t, func(t *testing.T) {
			time.Sleep(time.Duration(i) * 6 * time.Second)
			var scraped []time.Time
			c, hub, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
				cfg.To = cfg.To[:1]
				cfg.FromClient = &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
					scraped = append(scraped, time.Now())
					return respond(200, nil, "a 1\n"), nil
				})}
			})
			n := 0
			hub.answer = func(*http.Request) *http.Response {
				if n++; n == 1 {
					return respond(503, http.Header{"Retry-After": {"5"}}, "busy")
				}
				return nil
			}
			runFor(t, c, 7*time.Minute)
			for k, at := range scraped[1:] {
				if !slices.ContainsFunc(hub.at, at.Equal) {
					t.Errorf("%v after the clients of before: no push with scrape %d; scrapes at %v, pushes at %v", time.Duration(i)*6*time.Second, k+1, scraped, hub.at)
					break
				}
			}
		})
	}
}

func TestClientRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		n := 0
		c, hub, log := newTestClient(t, "a 1\n", func(c *ClientConfig, _ *ClientReloadConfig) { c.To = c.To[:1] })
		hub.answer = func(*http.Request) *http.Response {
			if n++; n <= 4 {
				return respond(503, nil, "busy")
			}
			return nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if err := c.ScrapeOnceAndDrain(ctx); err != nil {
			t.Fatalf("%v\n%s", err, log)
		}
		want := minBackoff
		for i := 1; i < len(hub.at); i++ {
			if gap := hub.at[i].Sub(hub.at[i-1]); gap < want/2 || gap > want {
				t.Errorf("attempt %d came after %v, want %v to %v", i, gap, want/2, want)
			}
			want *= 2
		}
		// What the server asks for is honoured, and one that asks for longer than
		// there is time ends the cycle instead of the server's patience.
		n = 0
		hub.answer = func(*http.Request) *http.Response {
			if n++; n == 1 {
				return respond(429, http.Header{"Retry-After": {"37"}}, "slow down")
			}
			return nil
		}
		if err := c.ScrapeOnceAndDrain(ctx); err != nil {
			t.Fatal(err)
		}
		if gap := hub.at[len(hub.at)-1].Sub(hub.at[len(hub.at)-2]); gap < 37*time.Second {
			t.Errorf("asked to wait 37 s, it waited %v", gap)
		}
		hub.answer = func(*http.Request) *http.Response {
			return respond(503, http.Header{"Retry-After": {"3600"}}, "disk full")
		}
		if err := c.ScrapeOnceAndDrain(ctx); err == nil || !strings.Contains(err.Error(), "disk full") {
			t.Errorf("got %v, want the server's reason", err)
		}
		if time.Since(start) > 2*time.Minute {
			t.Error("waited beyond the next scrape")
		}
		if n := c.spool.Stats().Scrapes; n != 1 {
			t.Errorf("%d scrapes are kept, want the one not delivered", n)
		}
	})
}

func TestClientFailsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, log := newTestClient(t, "a 1\n", nil)
		hub.answer = func(r *http.Request) *http.Response {
			if r.URL.Host == "a.example" {
				return respond(502, nil, "")
			}
			return nil
		}
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(hub.hosts, []string{"a.example", "b.example"}) {
			t.Errorf("tried %v", hub.hosts)
		}
		if len(hub.asked) != 1 {
			t.Errorf("authorized %d times: an upload token is good at every server", len(hub.asked))
		}
		if !strings.Contains(log.String(), "trying the next") {
			t.Errorf("the log does not tell of it:\n%s", log)
		}
	})
}

func TestClientRefusedPush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newTestClient(t, "a 1\n", nil)
		hub.answer = func(*http.Request) *http.Response { return respond(400, nil, "line 1: no") }
		err := c.ScrapeOnceAndDrain(t.Context())
		if err == nil || !strings.Contains(err.Error(), "line 1: no") || len(hub.at) != 1 {
			t.Errorf("got %v after %d attempts; what is refused as invalid is not sent again", err, len(hub.at))
		}
		if got := c.dropped.Value(DropRefused); got != 1 || c.spool.Stats().Scrapes != 0 {
			t.Errorf("%v samples counted as refused, want 1; in the spool: %+v", got, c.spool.Stats())
		}
	})
}

func TestClientToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hub, _ := newTestClient(t, "a 1\n", nil)
		runFor(t, c, 3*time.Hour)
		for i := 1; i < len(hub.asked); i++ {
			if age := hub.asked[i].Sub(hub.asked[i-1]); age >= time.Hour || age < 40*time.Minute {
				t.Errorf("an upload token of an hour was replaced after %v", age)
			}
		}
		if len(hub.asked) < 3 {
			t.Errorf("authorized %d times in three hours", len(hub.asked))
		}
		// A 401 is answered by one new token; a second one is an error.
		asked, pushes := len(hub.asked), len(hub.at)
		refused := 0
		hub.answer = func(r *http.Request) *http.Response {
			if refused < 1 {
				refused++
				return respond(401, nil, "expired")
			}
			return nil
		}
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(hub.asked) != asked+1 || len(hub.at) != pushes+2 {
			t.Errorf("after a 401: authorized %d times, pushed %d times", len(hub.asked)-asked, len(hub.at)-pushes)
		}
		hub.answer = func(*http.Request) *http.Response { return respond(401, nil, "revoked") }
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := c.ScrapeOnceAndDrain(ctx); err == nil || !strings.Contains(err.Error(), "revoked") {
			t.Errorf("got %v", err)
		}
		if n := len(hub.asked) - asked; n > 16 { // two servers, pauses of 1, 2, 4 s
			t.Errorf("asked %d times in 10 s", n)
		}
	})
}

func TestClientTellsSourceFromDestination(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := false
		c, hub, log := newTestClient(t, "", func(c *ClientConfig, _ *ClientReloadConfig) {
			c.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
				if broken {
					return nil, errors.New("connection refused")
				}
				return respond(200, nil, "a 1\nb 2\n"), nil
			})
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		broken = true
		if err := c.ScrapeOnceAndDrain(ctx); err == nil || !strings.HasPrefix(err.Error(), "source: ") {
			t.Errorf("got %v", err)
		}
		if c.scrapes.Value("failed") != 1 || c.pusher.pushes.Value("failed") != 0 || !strings.Contains(log.String(), "source failed") {
			t.Errorf("scrapes failed %v, pushes failed %v, log:\n%s", c.scrapes.Value("failed"), c.pusher.pushes.Value("failed"), log)
		}
		broken = false
		log.Reset()
		hub.answer = func(*http.Request) *http.Response { return respond(500, nil, "") }
		if err := c.ScrapeOnceAndDrain(ctx); err == nil || !strings.HasPrefix(err.Error(), "destination: ") {
			t.Errorf("got %v", err)
		}
		if c.scrapes.Value("failed") != 1 || c.pusher.pushes.Value("failed") == 0 || !strings.Contains(log.String(), "destination failed") ||
			strings.Contains(log.String(), "source failed") {
			t.Errorf("scrapes failed %v, pushes failed %v, log:\n%s", c.scrapes.Value("failed"), c.pusher.pushes.Value("failed"), log)
		}
		if n := c.spool.Stats().Scrapes; n != 1 {
			t.Errorf("%d scrapes are kept, want 1", n)
		}
	})
}

// An outage of the source is told when it begins, every ten minutes, and when it ends:
// not at every scrape.
func TestClientTellsOutageOfSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		broken := func() bool { at := time.Since(begin); return at > 5*time.Minute && at < 34*time.Minute }
		c, hub, log := newTestClient(t, "", func(c *ClientConfig, _ *ClientReloadConfig) {
			c.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
				if broken() {
					return nil, errors.New("connection refused")
				}
				return respond(200, nil, "a 1\n"), nil
			})
			c.Interval, c.ScrapeInterval = 10*time.Second, 10*time.Second
		})
		hub.t = t
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		c.Run(ctx)
		failed, back := strings.Count(log.String(), "source failed"), strings.Count(log.String(), "source works again")
		if failed != 3 || back != 1 {
			t.Errorf("of an outage of half an hour the log tells %d times, and %d times of its end", failed, back)
		}
		if n := c.scrapes.Value("failed"); n < 170 || !strings.Contains(log.String(), fmt.Sprintf(`"source works again" failed=%v`, n)) {
			t.Errorf("%v scrapes failed:\n%s", n, log)
		}
	})
}

func TestClientCleans(t *testing.T) {
	const text = `# TYPE up gauge
up{instance="10.1.2.3:9100",job="node"} 1 1700000000000
up{instance="10.1.2.4:9100",job="node"} 0 1700000000000
ALERTS{alertname="A"} 1
push_time_seconds 5
bad{__x="1"} 1
empty{a="",b="c"} 3
`
	salted := func(st *ClientReloadConfig) func() *ClientCleaner {
		return func() *ClientCleaner {
			c := &ClientCleaner{
				Rename: map[string]string{"ALERTS": "alerts"}, Anonymize: []string{"instance"},
				Labels: []Label{{[]byte("region"), []byte("north")}},
			}
			c.SetSalt([]byte("0123456789abcdef"))
			return c
		}
	}
	c, hub, _ := newTestClient(t, text, func(cfg *ClientConfig, st *ClientReloadConfig) {
		cfg.Now = func() time.Time { return time.UnixMilli(1700000001234) }
		st.NewCleaner = salted(st)
	})
	if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
		t.Fatal(err)
	}
	// printf %s 10.1.2.3:9100 | openssl dgst -sha256 -hmac 0123456789abcdef -binary |
	// head -c16 | base64 | tr +/ -_
	want := `up{instance="a5mQbxN11M-zwP-u2jRwGg",job="node",region="north"} 1 1700000000000
up{instance="iwegJ1u42NbOhCAeX1xOwg",job="node",region="north"} 0 1700000000000
alerts{alertname="A",region="north"} 1 1700000001234
empty{b="c",region="north"} 3 1700000001234
`
	if hub.bodies[0] != want {
		t.Errorf("pushed:\n%swant:\n%s", hub.bodies[0], want)
	}
	if got := c.dropped.Value(DropReserved) + 10*c.dropped.Value(DropInvalid); got != 11 {
		t.Errorf("drops are not counted: %v", got)
	}
	// What a dry run prints is what would be pushed.
	scraped, err := c.Scrape(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := string(scraped.AppendText(nil, scraped.List.Samples)); got != want {
		t.Errorf("a dry run prints:\n%s", got)
	}
	// The listener shows the last set sent, and is ready only after a success.
	rec := httptest.NewRecorder()
	c.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/federate", nil))
	for line := range strings.Lines(want) {
		if !strings.Contains(rec.Body.String(), line) {
			t.Errorf("/federate lacks %s", line)
		}
	}
}

func TestClientChoosesSeries(t *testing.T) {
	sel, err := ParseSelectors([]string{`up`, `{job=~"a.*"}`})
	if err != nil {
		t.Fatal(err)
	}
	for path, wantQuery := range map[string][]string{
		"http://source.example/federate":      {`up`, `{job=~"a.*"}`},
		"http://source.example/prom/federate": {`up`, `{job=~"a.*"}`},
		"http://source.example/metrics":       nil,
	} {
		var asked *http.Request
		c, hub, _ := newTestClient(t, "", func(cfg *ClientConfig, st *ClientReloadConfig) {
			cfg.From, _ = url.Parse(path)
			cfg.FromClient.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
				asked = r
				if r.Header.Get("Authorization") != "Bearer from-token" {
					t.Errorf("asked with %q", r.Header.Get("Authorization"))
				}
				return respond(200, nil, "up 1 5\nx{job=\"ab\"} 2 5\ny{job=\"b\"} 3 5\n"), nil
			})
			st.Match = sel
			st.FromToken = "from-token"
		})
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := asked.URL.Query()["match[]"]; !slices.Equal(got, wantQuery) {
			t.Errorf("%s: asked for %q", path, got)
		}
		want := "up 1 5\nx{job=\"ab\"} 2 5\n"
		if wantQuery != nil {
			want += "y{job=\"b\"} 3 5\n" // the source chose
		}
		if hub.bodies[0] != want {
			t.Errorf("%s: pushed %q, want %q", path, hub.bodies[0], want)
		}
	}
}

func TestClientReadsProtobuf(t *testing.T) {
	text := "# TYPE h histogram\nh_bucket{le=\"1\"} 1 7\nh_bucket{le=\"+Inf\"} 2 7\nh_sum 1.5 7\nh_count 2 7\n"
	parser := expfmt.NewTextParser(model.UTF8Validation)
	fams, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	enc := expfmt.NewEncoder(&b, expfmt.NewFormat(expfmt.TypeProtoDelim))
	for _, f := range []*dto.MetricFamily{fams["h"]} {
		if err := enc.Encode(f); err != nil {
			t.Fatal(err)
		}
	}
	c, hub, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
		cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
			return respond(200, http.Header{"Content-Type": {string(expfmt.NewFormat(expfmt.TypeProtoDelim))}}, b.String()), nil
		})
	})
	if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := "h_bucket{le=\"1\"} 1 7\nh_bucket{le=\"+Inf\"} 2 7\nh_sum 1.5 7\nh_count 2 7\n"
	if hub.bodies[0] != want {
		t.Errorf("pushed %q, want %q", hub.bodies[0], want)
	}
}

// A Prometheus that puts labels of type and unit on every series is carried like any
// other, whether a client scrapes it or pushes what it has itself.
func TestMetadataLabelsEndToEnd(t *testing.T) {
	ms := testNow.UnixMilli()
	text := fmt.Appendf(nil, "up{__type__=\"gauge\",i=\"1\"} 1 %d\nup{__type__=\"unknown\",i=\"1\"} 1 %d\nsize{__type__=\"gauge\",__unit__=\"bytes\"} 2 %d\n", ms, ms, ms)
	proto := protoBody(t, gaugeFamily("up", 1, &ms, "__type__", "gauge", "i", "1"), gaugeFamily("up", 1, &ms, "__type__", "unknown", "i", "1"),
		gaugeFamily("size", 2, &ms, "__type__", "gauge", "__unit__", "bytes"))
	for _, tt := range []struct {
		name, contentType string
		body              []byte
	}{{"text", "text/plain; version=0.0.4", text}, {"protobuf", protoType, proto}} {
		t.Run(tt.name, func(t *testing.T) {
			r := newSrvRig(t)
			c, _, log := newTestClient(t, "", func(cfg *ClientConfig, st *ClientReloadConfig) {
				cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
					return respond(200, http.Header{"Content-Type": {tt.contentType}}, string(tt.body)), nil
				})
				cfg.To, cfg.ToClient, cfg.Now = []string{r.external.URL}, http.DefaultClient, r.now
				st.Token = r.token(KindClient, "site")
			})
			if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
				t.Fatal(err)
			}
			got := r.accepted(r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(KindUpload, "direct"),
				header: map[string]string{"Content-Type": tt.contentType}, body: tt.body}))
			if got.Accepted != 2 || got.Duplicates != 1 || len(got.Dropped) > 0 || !maps.Equal(got.Skipped, map[string]int{"metadata_label": 4}) {
				t.Errorf("the server answered %+v", got)
			}
			for _, id := range []string{"site", "direct"} {
				held := r.held(id, "")
				for _, want := range []string{
					fmt.Sprintf("up{_id=%q,i=\"1\",instance=\"\",job=\"\"} 1 %d\n", id, ms), fmt.Sprintf("size{_id=%q,instance=\"\",job=\"\"} 2 %d\n", id, ms),
				} {
					if strings.Count(held, want) != 1 || strings.Contains(held, "__") {
						t.Errorf("%s lacks %s in:\n%s", id, want, held)
					}
				}
			}
			for side, counted := range map[string]float64{"client": c.skipped.Value("metadata_label"), "server": r.server.skippedTotal.Value("metadata_label")} {
				if counted != 4 {
					t.Errorf("the %s counts %v labels", side, counted)
				}
			}
			if n := c.dropped.Value(DropInvalid) + c.dropped.Value(DropRefused); n > 0 || strings.Contains(log.String(), "dropped samples") {
				t.Errorf("%v samples are dropped:\n%s", n, log)
			}
		})
	}
}

// Whichever format the source chooses, names keep the characters that they have: a.b
// and a_b are two series.
func TestClientAsksForNamesAsTheyAre(t *testing.T) {
	text := "a_b 1 7\n{\"a.b\"} 2 7\n"
	parser := expfmt.NewTextParser(model.UTF8Validation)
	fams, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range []expfmt.FormatType{expfmt.TypeProtoDelim, expfmt.TypeTextPlain, expfmt.TypeOpenMetrics} {
		c, hub, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.FromClient.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
				chosen := expfmt.NegotiateAccept(r.Header, expfmt.NewFormat(format))
				var b bytes.Buffer
				enc := expfmt.NewEncoder(&b, chosen)
				for _, name := range []string{"a_b", "a.b"} {
					if err := enc.Encode(fams[name]); err != nil {
						t.Error(err)
					}
				}
				if err := enc.(expfmt.Closer).Close(); err != nil {
					t.Error(err)
				}
				return respond(200, http.Header{"Content-Type": {string(chosen)}}, b.String()), nil
			})
		})
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := hub.bodies[0]; got != text {
			t.Errorf("format %v: pushed %q, want %q", format, got, text)
		}
	}
}

func TestClientSplitsLargeScrapes(t *testing.T) {
	var text strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&text, "metric_%d{label=\"%x\"} %d 1\n", i, ClusterIDHash(fmt.Sprint(i)), i)
	}
	c, hub, _ := newTestClient(t, text.String(), func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.LimitBytes = 16 << 10 })
	if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(hub.bodies, ""); got != text.String() {
		t.Errorf("%d bytes in %d pushes differ from the scrape's %d", len(got), len(hub.bodies), text.Len())
	}
	for _, b := range hub.bodies {
		if len(b) > MaxDecodedFactor*16<<10 {
			t.Errorf("a push of %d bytes", len(b))
		}
	}
	// One series that cannot fit is dropped alone, without an endless split.
	long := fmt.Sprintf("a 1 1\nlong{label=%q} 2 1\nz 3 1\n", strings.Repeat("x", 2000))
	c, hub, log := newTestClient(t, long, func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.LimitBytes = 100 })
	if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(hub.bodies, ""); got != "a 1 1\nz 3 1\n" || c.dropped.Value(DropInvalid) != 1 || !strings.Contains(log.String(), "--limit-bytes") {
		t.Errorf("pushed %q, dropped %v, log:\n%s", got, c.dropped.Value(DropInvalid), log)
	}
}

func TestClientWarnsOfExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, log := newTestClient(t, "a 1\n", func(cfg *ClientConfig, st *ClientReloadConfig) {
			cfg.Interval = time.Hour
			st.TokenExpires = time.Now().Add(29 * 24 * time.Hour).Unix()
		})
		runFor(t, c, 60*time.Hour)
		if n := strings.Count(log.String(), "the token expires soon"); n != 3 {
			t.Errorf("warned %d times in 60 hours, want 3", n)
		}
	})
}

func TestClientBadSource(t *testing.T) {
	tests := []struct {
		name, want string
		resp       *http.Response
	}{
		{"status", `500 Internal Server Error: "oops"`, respond(500, nil, "oops\n")},
		{"redirect", "redirects are not followed", respond(302, http.Header{"Location": {"http://elsewhere.example/"}}, "")},
		{"type", "not supported", respond(200, http.Header{"Content-Type": {"text/html"}}, "<html>")},
		{"truncated", "truncated", respond(200, nil, "a 1\nb 2")},
		{"encoding", `content encoding "zstd" is not supported; supported: identity, gzip`, respond(200, http.Header{"Content-Encoding": {"zstd"}}, "a 1\n")},
		{"encodings", `content encoding "br, gzip" is not supported`, respond(200, http.Header{"Content-Encoding": {"br", "gzip"}}, "a 1\n")},
	}
	for _, tt := range tests {
		c, hub, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.FromClient = NewHTTPClient(nil, time.Minute, 10*time.Second)
			cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) { return tt.resp, nil })
		})
		if err := c.ScrapeOnceAndDrain(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
		if len(hub.at) > 0 {
			t.Errorf("%s: something was pushed", tt.name)
		}
	}
}

// Content that is not encoded, or by what was asked for, is read.
func TestClientEncodings(t *testing.T) {
	for _, encoding := range []string{"", "identity", "Identity", "gzip"} {
		source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body := []byte("a 1\n")
			if encoding == "gzip" {
				body = Gzip(body)
			}
			if encoding != "" {
				w.Header().Set("Content-Encoding", encoding)
			}
			w.Write(body)
		}))
		defer source.Close()
		c, _, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.From, _ = url.Parse(source.URL + "/metrics")
			cfg.FromClient = NewHTTPClient(nil, time.Minute, 10*time.Second)
		})
		if got, err := c.Scrape(t.Context()); err != nil || len(got.List.Samples) != 1 {
			t.Errorf("%q: %v", encoding, err)
		}
	}
}

func TestSourceSkew(t *testing.T) {
	const wall = 1_700_000_000_500 // Tue, 14 Nov 2023 22:13:20.5 GMT
	for date, want := range map[string]int64{
		"":                              0,
		"yesterday":                     0,
		"Thu, 01 Jan 1960 00:00:00 GMT": 0,
		"Tue, 14 Nov 2023 22:13:20 GMT": 0,
		"Tue, 14 Nov 2023 22:13:19 GMT": 0,
		"Tue, 14 Nov 2023 22:13:22 GMT": 0,
		"Tue, 14 Nov 2023 22:13:18 GMT": -2500,
		"Tue, 14 Nov 2023 22:13:23 GMT": 2500,
		"Tue, 14 Nov 2023 23:13:20 GMT": 3599_500,
	} {
		if got := skewByDateOrZero(date, wall, 0); got != want {
			t.Errorf("%q: %d ms, want %d", date, got, want)
		}
	}
	// Of a clock that goes alike it stays as it is, wherever in its second the source
	// answers; what makes a step is followed.
	for _, offset := range []int64{0, 1999, 2000, 2500, -1500, 3600_000, -3600_000} {
		skew, changes := int64(0), 0
		for i := range int64(100) {
			now := wall + i*1037
			date := time.UnixMilli(now + offset).UTC().Format(http.TimeFormat)
			got := skewByDateOrZero(date, now, skew)
			if got != skew {
				changes++
			}
			if skew = got; skew < offset-3000 || skew > offset+3000 {
				t.Errorf("%d ms ahead: taken for %d", offset, skew)
			}
		}
		if changes > 1 {
			t.Errorf("%d ms ahead: changed %d times", offset, changes)
		}
		if got := skewByDateOrZero(time.UnixMilli(wall+offset+60_000).UTC().Format(http.TimeFormat), wall, skew); got < offset+59_000 {
			t.Errorf("%d ms ahead: a step of a minute is taken for %d", offset, got)
		}
	}
}
