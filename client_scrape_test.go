package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// If the path of the source ends in /federate, the client sends its selectors as match[], and the
// source selects the series. For any other source the client selects the series itself.
func TestClientSelectsSeries(t *testing.T) {
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
					t.Errorf("the scrape has Authorization %q, want the source's token", r.Header.Get("Authorization"))
				}
				return respond(200, nil, "up 1 5\nx{job=\"ab\"} 2 5\ny{job=\"b\"} 3 5\n"), nil
			})
			st.Match = sel
			st.FromAuthorization = "Bearer from-token"
		})
		if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := asked.URL.Query()["match[]"]; !slices.Equal(got, wantQuery) {
			t.Errorf("%s: the scrape has match[] %q, want %q", path, got, wantQuery)
		}
		want := "up 1 5\nx{job=\"ab\"} 2 5\n"
		if wantQuery != nil {
			want += "y{job=\"b\"} 3 5\n" // the client keeps all series that a /federate source returns
		}
		if hub.bodies[0] != want {
			t.Errorf("%s: pushed %q, want %q", path, hub.bodies[0], want)
		}
	}
}

// The client decodes delimited protobuf, and pushes a histogram as its component series.
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

// The metadata labels __type__ and __unit__ are removed and counted, and the samples are stored.
// That holds for a scrape by the client and for a push of the same body without a client.
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
				t.Errorf("the server answered %+v, want 2 accepted, 1 duplicate and 4 skipped metadata labels", got)
			}
			for _, id := range []string{"site", "direct"} {
				held := r.held(id, "")
				for _, want := range []string{
					fmt.Sprintf("up{_id=%q,i=\"1\",instance=\"\",job=\"\"} 1 %d\n", id, ms), fmt.Sprintf("size{_id=%q,instance=\"\",job=\"\"} 2 %d\n", id, ms),
				} {
					if strings.Count(held, want) != 1 || strings.Contains(held, "__") {
						t.Errorf("site %s: want the line %s once and no metadata label in:\n%s", id, want, held)
					}
				}
			}
			for side, counted := range map[string]float64{"client": c.skipped.Value("metadata_label"), "server": r.server.skippedTotal.Value("metadata_label")} {
				if counted != 4 {
					t.Errorf("the %s counts %v skipped metadata labels, want 4", side, counted)
				}
			}
			if n := c.dropped.Value(DropInvalid) + c.dropped.Value(DropRefused); n > 0 || strings.Contains(log.String(), "dropped samples") {
				t.Errorf("the client dropped %v samples, want 0; log:\n%s", n, log)
			}
		})
	}
}

// Metric names reach the server unescaped in every format that the source may choose. So the
// metrics a.b and a_b stay two series.
func TestClientRequestsUnescapedNames(t *testing.T) {
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

// A scrape that exceeds the size limits of a push is pushed in pieces. Together, the pieces have
// all samples of the scrape in their order.
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
		t.Errorf("%d pushes with %d bytes differ from the scrape of %d bytes", len(hub.bodies), len(got), text.Len())
	}
	for _, b := range hub.bodies {
		if len(b) > MaxDecodedFactor*16<<10 {
			t.Errorf("a push has %d bytes, want at most %d", len(b), MaxDecodedFactor*16<<10)
		}
	}
}

// A series that alone exceeds the size limits of a push is dropped and logged. The other series of
// the scrape are pushed.
func TestClientDropsTooLargeSeries(t *testing.T) {
	long := fmt.Sprintf("a 1 1\nlong{label=%q} 2 1\nz 3 1\n", strings.Repeat("x", 2000))
	c, hub, log := newTestClient(t, long, func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.LimitBytes = 100 })
	if err := c.ScrapeOnceAndDrain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(hub.bodies, ""); got != "a 1 1\nz 3 1\n" || c.dropped.Value(DropInvalid) != 1 || !strings.Contains(log.String(), "--limit-bytes") {
		t.Errorf("pushed %q and dropped %v series as invalid, want the two short series pushed and one dropped; log:\n%s", got, c.dropped.Value(DropInvalid), log)
	}
}

// A scrape fails if the source's answer has a bad status, content type or content encoding, or is
// truncated. The error states the fault, and the client pushes nothing.
func TestClientBadSource(t *testing.T) {
	tests := []struct {
		name, want string
		resp       *http.Response
	}{
		{"status", `500 Internal Server Error: "oops"`, respond(500, nil, "oops\n")},
		{"redirect", "redirects to another host, http://elsewhere.example/: if that is the source, pass it as --from", respond(302, http.Header{"Location": {"http://elsewhere.example/"}}, "")},
		{"type", "content type \"application/json\" is not supported", respond(200, http.Header{"Content-Type": {"application/json"}}, "{}")},
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
			t.Errorf("%s: got the error %v, want %q", tt.name, err, tt.want)
		}
		if len(hub.at) > 0 {
			t.Errorf("%s: the client pushed samples of a failed scrape", tt.name)
		}
	}
}

// The client reads answers of a source that are not encoded or are compressed with gzip, whatever it
// asked for. It asks a source on loopback for answers that are not compressed.
func TestClientEncodings(t *testing.T) {
	for _, tt := range []struct {
		from, encoding string
		body           []byte
		status         int
		asks           string // the header Accept-Encoding of the scrape
		samples        int
		err            string
	}{
		{"http://localhost:9090/metrics", "", []byte("a 1\n"), 200, "identity", 1, ""},
		{"http://127.0.0.1:9090/metrics", "gzip", Gzip([]byte("a 1\n")), 200, "identity", 1, ""},
		{"http://source.example/metrics", "", []byte("a 1\n"), 200, "gzip", 1, ""},
		{"http://source.example/metrics", "Identity", []byte("a 1\n"), 200, "gzip", 1, ""},
		{"http://source.example/metrics", "gzip", Gzip([]byte("a 1\nb 2\n")), 200, "gzip", 2, ""},
		{"http://source.example/metrics", "GZIP", nil, 200, "gzip", 0, ""},
		{"http://source.example/metrics", "gzip", Gzip([]byte("a 1\n"))[:20], 200, "gzip", 0, "reading the answer: unexpected EOF"},
		{"http://source.example/metrics", "gzip", []byte("a 1\nb 2\nc 3\n"), 200, "gzip", 0, "reading the answer: gzip: invalid header"},
		{"http://source.example/metrics", "gzip", []byte("who are you?\n"), 401, "gzip", 0, "the source answered 401"},
		{"http://source.example/metrics", "gzip", []byte{0x1f}, 503, "gzip", 0, "the source answered 503"},
		{"http://source.example/metrics", "gzip", Gzip([]byte("who are you?"))[:20], 401, "gzip", 0, "the source answered 401"},
		{"http://source.example/metrics", "gzip", Gzip([]byte("who are you?")), 401, "gzip", 0, "who are you?"},
		{"http://source.example/metrics", "gzip", Gzip([]byte("<html><title>Log in</title>")), 200, "gzip", 0, `with a web page titled "Log in"`},
	} {
		c, _, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.From, _ = url.Parse(tt.from)
			cfg.FromClient.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
				if got := r.Header.Get("Accept-Encoding"); got != tt.asks {
					t.Errorf("%s: the client asks for the encoding %q, want %q", tt.from, got, tt.asks)
				}
				header := http.Header{}
				if tt.encoding != "" {
					header.Set("Content-Encoding", tt.encoding)
				}
				return respond(tt.status, header, string(tt.body)), nil
			})
		})
		got, err := c.Scrape(t.Context())
		switch {
		case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("content encoding %q: got the error %v, want %q", tt.encoding, err, tt.err)
		case tt.err == "" && (err != nil || got.Samples != tt.samples):
			t.Errorf("content encoding %q: got the error %v, want %d samples", tt.encoding, err, tt.samples)
		}
	}
}

// The skew is how far the source's clock is ahead of this machine's clock. In a first scrape, it
// counts as 0 if the source's Date header is missing, malformed or before 1970, or differs from
// this machine's clock by at most skewTolerance.
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
			t.Errorf("Date %q: got a skew of %d ms, want %d", date, got, want)
		}
	}
}

// If the source's clock runs as fast as this machine's clock, the measured skew changes at most
// once, at whatever fraction of a second the source answers. A step of the source's clock changes
// the skew.
func TestSourceSkewIsStable(t *testing.T) {
	const wall = 1_700_000_000_500 // Tue, 14 Nov 2023 22:13:20.5 GMT
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
				t.Errorf("a source %d ms ahead: got a skew of %d ms, want at most 3 s difference", offset, skew)
			}
		}
		if changes > 1 {
			t.Errorf("a source %d ms ahead: the skew changed %d times, want at most once", offset, changes)
		}
		if got := skewByDateOrZero(time.UnixMilli(wall+offset+60_000).UTC().Format(http.TimeFormat), wall, skew); got < offset+59_000 {
			t.Errorf("a source %d ms ahead: after a step of a minute got a skew of %d ms", offset, got)
		}
	}
}

// shiftTimes shifts the times of all lines that have one, and leaves other lines unchanged, even if
// their label values look like times.
func TestShiftTimes(t *testing.T) {
	for text, want := range map[string]string{
		"":                                "",
		"a 1 5\n":                         "a 1 1005\n",
		"a 1 -5\n":                        "a 1 995\n",
		"a 1\n":                           "a 1\n",
		"a 1000 5\nb NaN 6\nc -Inf 7\n":   "a 1000 1005\nb NaN 1006\nc -Inf 1007\n",
		"a{x=\"b 3\"} 4\n":                "a{x=\"b 3\"} 4\n",
		"a{x=\"1 2 3\"} 4 5\n":            "a{x=\"1 2 3\"} 4 1005\n",
		"{\"a 1\",x=\"} 1\"} 4.5e+10 5\n": "{\"a 1\",x=\"} 1\"} 4.5e+10 1005\n",
		"{\"a 1\"} 4\n":                   "{\"a 1\"} 4\n",
	} {
		if got := string(shiftTimes([]byte(text), 1000)); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

// A source's answer is read to its limit and no further, and an answer that is small only while it is
// compressed needs little memory.
func TestClientScrapeSizeLimit(t *testing.T) {
	endless := endlessReader("a 1\n")
	body := sourceBody{r: &endless, limit: 10}
	if n, err := io.ReadFull(&body, make([]byte, 10)); n != 10 || err != nil {
		t.Errorf("got %d bytes and the error %v, want 10 bytes", n, err)
	}
	if _, err := body.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "more than 10 bytes") {
		t.Errorf("byte 11: got the error %v, want: more than 10 bytes", err)
	}
	for _, tt := range []struct{ repeated, err string }{
		{strings.Repeat("\x00", 1<<20), "a line has more than 1048576 bytes"},
		{"# " + strings.Repeat("x", 1<<20-3) + "\n", "the answer is too large: more than 268435456 bytes"},
	} {
		var bomb bytes.Buffer
		z := gzip.NewWriter(&bomb)
		for range 257 {
			io.WriteString(z, tt.repeated)
		}
		z.Close()
		c, _, _ := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
				return respond(200, http.Header{"Content-Encoding": {"gzip"}}, bomb.String()), nil
			})
		})
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := c.Scrape(t.Context())
		runtime.ReadMemStats(&after)
		if err == nil || !strings.Contains(err.Error(), tt.err) {
			t.Errorf("got the error %v, want %q", err, tt.err)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 12<<20 {
			t.Errorf("%s: the scrape allocated %d bytes, want at most 12 MiB", tt.err, used)
		}
	}
}

// The spool accepts each piece of a scrape, also if --limit-bytes exceeds what a piece in the spool may
// have.
func TestClientPiecesFitSpool(t *testing.T) {
	if testing.Short() {
		t.Skip("compresses 50 MB")
	}
	rng := rand.New(rand.NewPCG(1, 1))
	var body []byte
	for i := range 800 {
		body = fmt.Appendf(body, "m%d{l=\"", i)
		for range 60_000 {
			body = append(body, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[rng.IntN(64)])
		}
		body = append(body, "\"} 1\n"...)
	}
	c := newFamilyClient(t, FormatText, func() io.Reader { return bytes.NewReader(body) }, nil)
	c.cfg.LimitBytes = 2 * MaxPiece
	got, err := c.Scrape(t.Context())
	if err != nil || got.Samples != 800 || len(got.Pieces) != 2 {
		t.Fatalf("got %+v and the error %v, want 800 samples in two pieces", got, err)
	}
	for i, sc := range got.Pieces {
		if err := sc.checkFields(); err != nil {
			t.Errorf("piece %d: %v", i, err)
		}
	}
}

// A scrape that fails counts no sample as dropped, because none of its samples counts as scraped.
func TestClientFailedScrapeDropsNothing(t *testing.T) {
	const dropped = "up{_id=\"\xff\"} 1\npush_time_seconds 1\nlong{l=\"0123456789012345678901234567890123456789\"} 1\n"
	for _, tt := range []struct {
		end  string
		want bool
	}{{"", true}, {"b{ 2\n", false}} {
		c, _, _ := newTestClient(t, "a 1\n"+dropped+tt.end, nil)
		c.cfg.LimitBytes = 40
		_, err := c.Scrape(t.Context())
		text := metricsText(t, c.cfg.Metrics)
		counts := regexp.MustCompile(`(?m)^telemeter_samples_dropped_total\{.*\} [1-9]`).FindAllString(text, -1)
		if (err == nil) != tt.want || (len(counts) > 0) != tt.want {
			t.Errorf("a scrape that ends with %q: got the error %v and the counts %q, want success and counts: %v", tt.end, err, counts, tt.want)
		}
	}
}
