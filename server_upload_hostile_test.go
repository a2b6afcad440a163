package main

// Tests of a hostile site, which has valid tokens and pushes whatever it likes. It cannot change or
// forge the samples of another site, and it cannot make a scrape of /federate fail.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"net/url"
	"strconv"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
)

// hostilePush is the body of a push by a hostile site, with the headers of the push.
type hostilePush struct {
	body   []byte
	header map[string]string
}

func hostileText(s string) hostilePush { return hostilePush{body: []byte(s)} }

func hostileProto(body []byte) hostilePush {
	return hostilePush{body, map[string]string{"Content-Type": protoType}}
}

func hostileOpenMetrics(s string) hostilePush {
	return hostilePush{[]byte(s), map[string]string{"Content-Type": omType}}
}

// hostileGroup is a list of hostile pushes that try the same kind of attack.
type hostileGroup struct {
	name   string
	pushes []hostilePush
}

// staleNaN is the bit pattern with which Prometheus marks a series as stale.
const staleNaN = 0x7ff0000000000002

// hostileGroups returns the pushes of the hostile site-a. ms is the server's current time. No
// honest sample has the value 666 or 667, so checkHonest recognizes a forged sample of site-b by
// these values.
func hostileGroups(t *testing.T, ms int64) []hostileGroup {
	name := func(s string) *dto.MetricFamily { return gaugeFamily(s, 666, &ms) }
	uint := func(n uint64) *uint64 { return &n }
	str := func(s string) *string { return &s }
	float := func(v float64) *float64 { return &v }
	text := hostileText
	proto := func(fams ...*dto.MetricFamily) hostilePush { return hostileProto(protoBody(t, fams...)) }
	times := hostileGroup{name: "timestamps"}
	for _, at := range []int64{0, 1, -1, 86400_000, 4102444800_000, math.MinInt64, math.MaxInt64, math.MinInt64 + 1, ms - 2*3600_000, ms + 60_000, ms + 60_001} {
		times.pushes = append(times.pushes, text(fmt.Sprintf("up{job=\"node\",instance=\"i:1\"} 666 %d\n", at)), proto(gaugeFamily("http_total", 666, &at, "code", "200")),
			hostileOpenMetrics(fmt.Sprintf("up{job=\"node\",instance=\"i:1\"} 667 %d\n# EOF\n", at)))
	}
	times.pushes = append(times.pushes, text("up 1 99999999999999999999\n"), hostileOpenMetrics("up 1 NaN\n# EOF\n"), hostileOpenMetrics("up 1 1e300\n# EOF\n"))
	return []hostileGroup{
		{"cluster ID of the other site", []hostilePush{
			text(`up{_id="site-b",job="node",instance="i:1"} 666` + fmt.Sprintf(" %d\n", ms+1)),
			text(`up{_id="site-a",_id="site-b",job="node",instance="i:1"} 666` + "\n"),
			text(`up{"_id"="site-b",job="node",instance="i:1"} 666` + "\n"),
			text("{\"up\",_id=\"site-b\"} 666\n"),
			proto(gaugeFamily("up", 666, &ms, "_id", "site-b", "_id", "site-b", "job", "node", "instance", "i:1")),
		}},
		{"escapes from values, names and lines", []hostilePush{
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
		}},
		{"conflicting and reserved labels", []hostilePush{
			text("up{__name__=\"http_total\"} 1\n"), text("up{__address__=\"x\"} 1\n"), text("up{job=\"\",instance=\"\"} 1\n"),
			text("up{job=\"node\",job=\"node\"} 1\n"), text("up{\"j.b\"=\"1\",j_b=\"2\"} 1\n"), text("up{\"j.b\"=\"1\",\"j-b\"=\"2\"} 1\n"),
			text("up{\".id\"=\"site-b\"} 666\n"), text("up{\".id\"=\"site-b\",\"-id\"=\"site-b\"} 666\n"), text("up{\"..name..\"=\"x\"} 1\n"), text("up{le=\"x\",quantile=\"y\"} 1\n"),
			proto(gaugeFamily("up", 1, &ms, "", "x")), proto(gaugeFamily("up", 1, &ms, "a", "\xc3\x28")), proto(gaugeFamily("up", 1, &ms, "\xc3\x28", "a")), proto(gaugeFamily("up", 1, &ms, "a", "\x00")),
		}},
		{"other types for the same names", []hostilePush{
			text("# TYPE up counter\n# TYPE up histogram\nup_bucket{le=\"1\"} 1\nup_total 1\nup_count 1\n# TYPE h gauge\nh 1\n# TYPE http_total summary\nhttp_total 1\n"),
			text("# HELP up \\x\n# UNIT up s\n# TYPE up\n# TYPE\n#\nup 1\n"),
			proto(&dto.MetricFamily{Name: str("up"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{{TimestampMs: &ms, Histogram: &dto.Histogram{
				SampleCount: uint(math.MaxUint64), SampleSum: float(math.NaN()), Bucket: []*dto.Bucket{{UpperBound: float(math.NaN()), CumulativeCount: uint(1)}, {UpperBound: float(math.Inf(-1))}, {UpperBound: float(math.NaN())}}}}}}),
			proto(&dto.MetricFamily{Name: str("h_bucket"), Type: dto.MetricType_SUMMARY.Enum(), Metric: []*dto.Metric{{Summary: &dto.Summary{Quantile: []*dto.Quantile{{Quantile: float(0.5)}, {Quantile: float(0.5)}}}}}}),
			proto(&dto.MetricFamily{Name: str("up"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{{Histogram: &dto.Histogram{Schema: new(int32), ZeroCount: uint(1)}}}}),
		}},
		{"names that escaping makes equal", []hostilePush{
			proto(name("http.total")), proto(name("http-total")), proto(name("utf8_name")), proto(name("utf8-name")), proto(name("U__utf8_2e_name")), proto(name("U__utf8_2e_name"), name("utf8.name")),
			proto(gaugeFamily("utf8.name", 666, &ms, "l_l", "v")), proto(gaugeFamily("utf8.name", 666, &ms, "l.l", "v", "l-l", "v")),
		}},
		{"the server's own series", []hostilePush{
			text("push_time_seconds 9e9\n"), text("push_failure_time_seconds 0\n"), text("telemeter_cluster_token_expiry_seconds{_id=\"site-b\"} 0\n"),
			proto(name("push.time.seconds")), proto(gaugeFamily("push-time.seconds", 9e9, &ms, "x", "y")), proto(name("telemeter.cluster.token.expiry.seconds")), proto(name("U__push_5f_time_5f_seconds")),
		}},
		{"special values", []hostilePush{
			proto(gaugeFamily("http_total", math.Float64frombits(staleNaN), &ms, "code", "200")), proto(gaugeFamily("up", math.Float64frombits(0x7ff8000000000666), &ms)),
			text("up NaN\nup{a=\"1\"} +Inf\nup{a=\"2\"} -Inf\nup{a=\"3\"} -0\nup{a=\"4\"} 1e308\nup{a=\"5\"} 5e-324\n"), text("up 0x1p-2\n"), text("up 1_0\n"), text("up nan\n"), text("up stale\n"),
		}},
		times,
		{"invalid protobuf", []hostilePush{hostileProto(binary.AppendUvarint(nil, math.MaxUint64)), hostileProto(bytes.Repeat([]byte{0}, 1000))}},
		{"very long text", []hostilePush{
			{gzipped(bytes.Repeat([]byte("up 1\n"), 100_000)), map[string]string{"Content-Encoding": "gzip"}},
			text(strings.Repeat("x{", 20_000)), text("x{a=\"" + strings.Repeat("\\", 60_001) + "\"} 1\n"), text("x" + strings.Repeat("y", 60_000) + " 1\n"), text(strings.Repeat("\n", 60_000)),
			proto(gaugeFamily("x", 1, &ms, "a", strings.Repeat("\xff", 60_000))), proto(gaugeFamily(strings.Repeat("\xff", 60_000), 1, &ms)),
			proto(gaugeFamily("x", 1, &ms, strings.Repeat("\x80", 60_000), "v")), proto(gaugeFamily("x", 1, &ms, "__"+strings.Repeat("a", 60_000), "v")),
			text("x{" + strings.Repeat("a", 30_000) + "=\"1\"," + strings.Repeat("a", 30_000) + "=\"1\"} 1\n"), text("x{\"" + strings.Repeat("a", 60_000) + "\"} 1\n"),
			text("x{" + strings.Repeat("a=\"b\",", 128) + "} 1\n"),
		}},
	}
}

// hostileRig is a server to which the honest site-b and the hostile site-a have pushed the same
// series. site-a has not yet sent a hostile push.
type hostileRig struct {
	*srvRig
	accepts []string // Accept headers of scrapes; each asks for another escaping of names
	honest  []string // lines of site-b in /federate before the attacks, one text for each header in accepts
}

func newHostileRig(t *testing.T) *hostileRig {
	r := &hostileRig{accepts: []string{"", acceptUTF8, "text/plain;escaping=values"}}
	r.srvRig = newSrvRig(t, func(s *StoreConfig, c *ServerConfig) { c.RateInterval, c.LimitBytes = 0, 64<<10 })
	// newSrvRig also forbids "goroutine " and ".go:" in error answers. This rig allows them, because
	// an error answer may quote any text of a hostile push.
	r.secrets = []string{keyLine(1), "secretdir"}
	ms := testNow.UnixMilli()
	honest := fmt.Sprintf("# TYPE up gauge\nup{job=\"node\",instance=\"i:1\"} 1 %d\n# TYPE http_total counter\nhttp_total{code=\"200\"} 7 %d\n"+
		"# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n{\"utf8.name\",\"l.l\"=\"v\"} 5 %d\n", ms, ms, ms)
	r.accepted(r.push("site-b", honest))
	r.accepted(r.push("site-a", honest))
	for _, accept := range r.accepts {
		r.honest = append(r.honest, r.held("site-b", accept))
	}
	if strings.Count(r.honest[0], "\n") != 9 { // 6 samples of site-b, and 3 series that the server makes for it
		t.Fatalf("site-b at the beginning:\n%s", r.honest[0])
	}
	return r
}

// checkHonest checks that the server still serves exactly the lines of site-b from before the
// attacks, and that expfmt can parse every scrape. It also checks that no sample has a forged
// cluster ID or is a stale marker.
func (r *hostileRig) checkHonest(t *testing.T) {
	t.Helper()
	for i, accept := range r.accepts {
		if got := r.held("site-b", accept); got != r.honest[i] {
			t.Errorf("Accept %q: site-b has changed to:\n%s\nfrom:\n%s", accept, got, r.honest[i])
		}
		if n := strings.Count(r.held("site-a", accept), "\n"+PushTimeName+"{"); n > 1 {
			t.Errorf("Accept %q: site-a has %d push times, want at most the server's own", accept, n)
		}
	}
	for name, f := range r.parsed("") {
		for _, m := range f.Metric {
			id := ""
			for _, l := range m.Label {
				if l.GetName() == ClusterLabel {
					id = l.GetValue()
				}
			}
			if v := m.Untyped.GetValue(); id != "site-a" && id != "site-b" || id == "site-b" && (v == 666 || v == 667) {
				t.Errorf("the forged sample %s %v is served", name, m)
			}
			if math.Float64bits(m.Untyped.GetValue()) == staleNaN {
				t.Errorf("a stale marker is served for %s", name)
			}
		}
	}
}

// The server stores the samples of a hostile site only under that site's own cluster ID. The
// samples of another site do not change by a byte, every scrape can still be parsed, and the
// process log grows by at most 2 KiB for each push.
func TestHostileSite(t *testing.T) {
	r := newHostileRig(t)
	accepted, sent := 0, 0
	for _, group := range hostileGroups(t, testNow.UnixMilli()) {
		t.Run(group.name, func(t *testing.T) {
			for i, p := range group.pushes {
				for _, kind := range []string{KindUpload, KindClient} {
					a := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(kind, "site-a"), header: p.header, body: p.body})
					sent++
					switch a.status {
					case 200:
						accepted++
					case 400, 413:
					default:
						t.Errorf("push %d %.100q was answered %d %s", i, p.body, a.status, a.body)
					}
				}
			}
			r.checkHonest(t)
		})
	}
	if accepted < 40 {
		t.Errorf("%d of %d pushes were accepted; with fewer than 40 the test shows too little", accepted, sent)
	}
	if log := r.log.String(); strings.Contains(log, "panic") || len(log) > sent*2<<10 {
		t.Errorf("the log has a panic, or has grown to %d bytes", len(log))
	}
}

// The server answers 403 to a push whose query names another cluster ID than the token, even if the
// two differ only in case, or by a space or a NUL byte.
func TestHostileSiteNamesAnother(t *testing.T) {
	r := newHostileRig(t)
	for _, id := range []string{"site-b", "SITE-A", "site-a ", "site-a\x00"} {
		a := r.do(srvRequest{method: "POST", url: r.external.URL + "/upload?id=" + url.QueryEscape(id), token: r.token(KindUpload, "site-a"), body: []byte("up 666\n")})
		if a.status != 403 {
			t.Errorf("id=%q was answered %d, want 403", id, a.status)
		}
	}
	r.checkHonest(t)
}

// The server drops the samples of a site that exceed its limit on series. Such a push leaves the
// samples of another site unchanged, and the other site can still push.
func TestHostileSiteFloods(t *testing.T) {
	r := newHostileRig(t)
	if a := r.accepted(r.push("site-a", manySeries(201))); a.Accepted > 100 || a.Accepted+a.Dropped[dropSeriesLimit] != 201 {
		t.Errorf("a push over the series limit was answered %+v", a)
	}
	r.checkHonest(t)
	r.accepted(r.push("site-b", "late 1\n"))
}
