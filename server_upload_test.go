package main

// Tests of pushes that the server accepts: the counts in its answer, the operator's rules for
// labels and series, timestamps that are too old or in the future, and the samples that it stores.

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// The server answers a valid push with 200 and counts in JSON. It accepts an upload token and a
// client token. The scheme "Bearer" in the Authorization header may be in lower case.
func TestUploadAccepted(t *testing.T) {
	r := newAnswerRig(t)
	withClientToken := r.uploadCase("client token and the content type of curl", 200, map[string]string{"Content-Type": "application/x-www-form-urlencoded"}, "ok2 1\n", `"accepted":1`)
	withClientToken.q.token, withClientToken.q.url = r.clientToken, "/upload?id=site-a"
	lowerCase := r.uploadCase("scheme in lower case", 200, map[string]string{"Authorization": "bearer " + r.uploadToken}, "ok3 1\n", `"accepted":1`)
	lowerCase.q.token = ""
	withUploadToken := r.uploadCase("upload token", 200, nil, "ok 1\n", `"accepted":1`)
	withUploadToken.header = map[string]string{"Content-Type": "application/json"}
	r.check(t, []answerCase{withUploadToken, withClientToken, lowerCase, r.uploadCase("empty body", 200, nil, "", `"accepted":0`)})
}

// The answer counts each sample of a push as accepted, duplicate or dropped. It also counts the
// parts that the server skips because it does not support them, such as exemplars. The server's
// metrics add up these counts over all pushes.
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
		t.Errorf("push with a duplicate and a conflicting value: %+v", got)
	}
	om := "# TYPE c counter\nc_total 1 # {t=\"x\"} 1\nc_created 1\n# EOF\n"
	if got := r.accepted(r.upload(r.token(KindUpload, "site-a"), []byte(om), "Content-Type", omType)); got.Accepted != 1 || !maps.Equal(got.Skipped, map[string]int{"exemplar": 1, "created": 1}) {
		t.Errorf("push in OpenMetrics: %+v", got)
	}
	one, inf := uint64(1), math.Inf(1)
	name, kind := "h", dto.MetricType_HISTOGRAM
	body := protoBody(t, &dto.MetricFamily{Name: &name, Type: &kind, Metric: []*dto.Metric{{Histogram: &dto.Histogram{
		SampleCount: &one, SampleSum: new(float64), Bucket: []*dto.Bucket{{CumulativeCount: &one, UpperBound: &inf}}}}}})
	if got := r.accepted(r.upload(r.token(KindClient, "site-a"), gzipped(body), "Content-Type", protoType, "Content-Encoding", "gzip")); got.Accepted != 3 {
		t.Errorf("push of a histogram in protobuf: %+v", got)
	}
	fams := r.parsed("")
	for _, name := range []string{"a", "b", "c_total", "h_bucket", "h_sum", "h_count"} {
		if n := len(fams[name].GetMetric()); n != 1 {
			t.Errorf("%s is served %d times, want once", name, n)
		}
	}
	text = metricsText(t, r.server.cfg.Metrics)
	for _, want := range []string{
		`telemeter_pushes_total{result="accepted"} 4`, "telemeter_samples_accepted_total 7", "telemeter_samples_duplicate_total 1",
		`telemeter_samples_dropped_total{reason="too_old"} 1`, `telemeter_parts_skipped_total{kind="exemplar"} 1`,
		"telemeter_store_samples 7", "telemeter_pushes_in_flight 0", `telemeter_http_requests_total{handler="upload",code="200"} 4`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("/metrics does not have the line %s", want)
		}
	}
}

// If a push has valid samples, and all of them are too old or in the future, the server answers 200
// with a hint at the cause. The push counts as failed in push_failure_time_seconds. The server logs
// a warning with the hint, unless it logged one for the same site within the last hour.
func TestUntimelyPush(t *testing.T) {
	const (
		seconds = "the timestamps look like seconds, but must be milliseconds"
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
		{"no timestamp", "a 1\n", "", false},
		{"no sample", "", "", false},
		{"too old", fmt.Sprintf("a 1 %d\n", ms-3*3600_000), old, true},
		{"in the future", fmt.Sprintf("a 1 %d\n", ms+61_000), future, true},
		{"too old and in the future", fmt.Sprintf("a 1 %d\nb 1 %d\n", ms+61_000, ms-3*3600_000), both, true},
		{"seconds", fmt.Sprintf("a 1 %d\nb 1 %d\n", ms/1000, ms/1000), seconds, true},
		{"seconds, and an older sample", fmt.Sprintf("a 1 0\nb 1 %d\n", ms/1000-7200), seconds, true},
		{"seconds, a day ahead", fmt.Sprintf("a 1 %d\n", ms/1000+day), seconds, true},
		{"seconds, more than a day too old", fmt.Sprintf("a 1 %d\n", ms/1000-7200-day-1), old, true},
		{"seconds, more than a day ahead", fmt.Sprintf("a 1 %d\n", ms/1000+day+1), old, true},
		{"lowest and highest timestamp", fmt.Sprintf("a 1 %d\nb 1 %d\n", int64(math.MinInt64), int64(math.MaxInt64)), both, true},
		{"microseconds", fmt.Sprintf("a 1 %d\n", ms*1000), future, true},
		{"one sample in time", fmt.Sprintf("a 1 %d\nb 1 %d\n", ms, ms/1000), "", false},
		{"one duplicate", fmt.Sprintf("known 1 %d\nb 1 %d\n", ms, ms/1000), "", false},
		{"one conflicting value", fmt.Sprintf("known 2 %d\nb 1 %d\n", ms, ms/1000), "", false},
		{"the other sample invalid", fmt.Sprintf("a{b=\"\x00\"} 1\nb 1 %d\n", ms/1000), seconds, true},
		{"all samples invalid", "a{b=\"\x00\"} 1\n", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newSrvRig(t)
			r.accepted(r.push("site-a", fmt.Sprintf("known 1 %d\n", ms)))
			a := r.push("site-a", c.text)
			if got := r.accepted(a).Hint; got != c.hint || strings.Contains(a.body, "hint") != (c.hint != "") {
				t.Errorf("answered %s, want the hint %q", a.body, c.hint)
			}
			if failed := strings.Contains(r.held("site-a", ""), PushFailureTimeName+"{"); failed != c.failed {
				t.Errorf("%s is shown: %t, want %t", PushFailureTimeName, failed, c.failed)
			}
			log := r.log.String()
			if n := strings.Count(log, "level=WARN"); n != map[bool]int{true: 1}[c.failed] {
				t.Errorf("%d warnings, and the push has failed: %t:\n%s", n, c.failed, log)
			}
			if c.failed && !(strings.Contains(log, "cluster_id=site-a") && strings.Contains(log, c.hint)) {
				t.Errorf("the log does not have the cluster ID and the hint:\n%s", log)
			}
		})
	}
}

// The server logs the warning about untimely samples at most once an hour for each site.
func TestUntimelyWarnings(t *testing.T) {
	r := newSrvRig(t)
	warnings := 0
	for i, c := range []struct {
		cluster          string
		after            time.Duration // time since the previous push in this table
		untimely, warned bool
	}{
		{"a", 0, true, true}, {"a", time.Minute, true, false}, {"b", 0, true, true}, {"a", 58 * time.Minute, true, false},
		{"a", time.Minute, true, true}, {"a", time.Minute, false, false}, {"a", 0, true, false}, {"b", 0, true, true}, {"a", time.Minute, true, false},
	} {
		r.clock.Add(int64(c.after))
		text := "up 1\n"
		if c.untimely {
			text = "up 1 5\n"
		}
		r.accepted(r.push(c.cluster, text))
		if c.warned {
			warnings++
		}
		if got := strings.Count(r.log.String(), "level=WARN"); got != warnings {
			t.Errorf("push %d: %d warnings so far, want %d", i, got, warnings)
			warnings = got
		}
	}
}

// At the limit on series, the server accepts the samples of the series that the site has and of as
// many new series as fit. It counts the others as dropped, and says what to do, in its answer and at
// most once an hour in its log. The scrapes of such a push are held.
func TestSeriesLimit(t *testing.T) {
	r := newSrvRig(t, func(sc *StoreConfig, _ *ServerConfig) { sc.LimitSeries = 2 })
	for i, c := range []struct {
		text              string
		accepted, dropped int
	}{
		{"a 1\nb 1\nc 1\nd 1\n", 2, 2}, {"d 2\nc 2\nb 2\na 2\n", 2, 2}, {"c 3\n", 0, 1}, {"a 3\n", 1, 0},
	} {
		r.clock.Add(int64(time.Second))
		a := r.accepted(r.pushSpool("site-a", c.text, SpoolHeader, fmt.Sprintf("00000000000000ab %d", i+1)))
		if a.Accepted != c.accepted || a.Dropped[dropSeriesLimit] != c.dropped || (a.Hint == seriesLimitHint) != (c.dropped > 0) || a.Held == nil || *a.Held != fmt.Sprint("1-", i+1) && i > 0 {
			t.Errorf("push %d: answered %+v, want %d accepted, %d dropped, and all scrapes held", i, a, c.accepted, c.dropped)
		}
	}
	if got := r.server.droppedTotal.Value(dropSeriesLimit); got != 5 {
		t.Errorf("%v samples are counted as dropped, want 5", got)
	}
	want := `level=WARN msg="samples of new series were dropped, because the site has as many series as --limit-series allows" cluster_id=site-a dropped=2`
	if log := r.log.String(); strings.Count(log, want) != 1 || strings.Count(log, "level=WARN") != 1 {
		t.Errorf("the log does not have exactly one warning:\n%s", log)
	}
	r.clock.Add(int64(siteLogEvery))
	r.accepted(r.push("site-a", "z 1\n"))
	if log := r.log.String(); !strings.Contains(log, "dropped=1") || !strings.Contains(log, "suppressed=2") {
		t.Errorf("the warning is not repeated after an hour:\n%s", log)
	}
}

// The server logs the first push of a site whose samples it stores, with the labels of the token and
// the address of the client. It logs no later push.
func TestFirstPushLogged(t *testing.T) {
	r := newSrvRig(t)
	token := r.token(KindUpload, "a", func(tok *Token) { tok.Labels = map[string]string{"env": "prod"} })
	for i, c := range []struct {
		text   string
		logged bool
	}{{"malformed\n", false}, {"up 1 5\n", false}, {"", false}, {"up 1\nx 1\n", true}, {"up 2\n", false}} {
		r.logged()
		r.clock.Add(int64(time.Second))
		r.upload(token, []byte(c.text))
		got := r.logged()
		if strings.Contains(got, "first push") != c.logged || c.logged && !strings.HasPrefix(got, `INFO msg="first push of site" cluster_id=a remote=127.0.0.1:`) || c.logged && !strings.HasSuffix(got, " samples=2 labels=map[env:prod]\n") {
			t.Errorf("push %d: the log is\n%s\nwant the first push in it: %t", i, got, c.logged)
		}
	}
}

// The server drops a sample whose label value has a NUL byte, and stores the rest of the push. If a
// series has another fault, such as a NUL byte in a name, the server refuses the whole push and
// does not count its samples as dropped.
func TestNULByte(t *testing.T) {
	ms := testNow.UnixMilli()
	for _, c := range []struct {
		name   string
		body   []byte
		header []string
		want   string // status of the answer, a space, and the beginning of its body
	}{
		{"text", []byte("a 1\nb{x=\"\x00\"} 1\nb{x=\"y\",z=\"a\x00b\"} 1\nb{x=\"y\"} 1\n"), nil, `200 {"accepted":2,"duplicates":0,"dropped":{"invalid":2},`},
		{"protobuf", protoBody(t, gaugeFamily("b", 1, &ms, "x", "\x00"), gaugeFamily("b", 1, &ms, "x", "y")), []string{"Content-Type", protoType}, `200 {"accepted":1,"duplicates":0,"dropped":{"invalid":1},`},
		{"no other sample", []byte("b{x=\"\x00\"} 1\n"), nil, `200 {"accepted":0,"duplicates":0,"dropped":{"invalid":1},`},
		{"in a label name", []byte("a 1\nb{\"x\x00\"=\"y\"} 1\n"), nil, "400 line 2: series "},
		{"in the metric name", []byte("a 1\n{\"b\x00\"} 1\n"), nil, "400 line 2: series "},
		{"in a value that is not UTF-8", []byte("b{x=\"\x00\xff\"} 1\n"), nil, "400 line 1: series "},
		{"beside a reserved label", []byte("b{a=\"\x00\",__x=\"y\"} 1\n"), nil, "400 line 1: series "},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newSrvRig(t)
			a := r.upload(r.token(KindUpload, "site-a"), c.body, c.header...)
			if got := fmt.Sprint(a.status, " ", a.body); !strings.HasPrefix(got, c.want) {
				t.Errorf("answered %s\nwant %s", got, c.want)
			}
			want := 0
			if a.status == 200 {
				want = r.accepted(a).Dropped["invalid"]
			}
			if n := r.server.droppedTotal.Value("invalid"); n != float64(want) {
				t.Errorf("%v samples are counted as dropped, want %d", n, want)
			}
			r.parsed("")
		})
	}
}

// The server removes the labels of --elide-label, adds the operator's labels and the token's
// labels, and drops samples that lack a required label or that --allow does not select. If the
// operator and the token set the same label, the token's value wins.
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
	a := r.upload(token, []byte("up{pod=\"p\",env=\"x\",region=\"us\",tier=\"none\"} 1\nup{pod=\"p\"} 1\ndown{env=\"x\"} 1\n{\"a.b\",env=\"y\",job=\"j\",instance=\"i\"} 2\n"))
	if got := r.accepted(a); got.Accepted != 2 || !maps.Equal(got.Dropped, map[string]int{"required_label": 1, "not_allowed": 1}) {
		t.Errorf("answered %+v", got)
	}
	ms := testNow.UnixMilli()
	want := fmt.Sprintf("up{_id=\"site-a\",env=\"x\",instance=\"\",job=\"\",region=\"eu\",tier=\"silver\"} 1 %d\n"+
		"{\"a.b\",_id=\"site-a\",env=\"y\",instance=\"i\",job=\"j\",region=\"eu\",tier=\"silver\"} 2 %d\n", ms, ms)
	got := r.held("site-a", acceptUTF8)
	got = got[strings.Index(got, "up{"):]
	if got != want {
		t.Errorf("served:\n%s\nwant:\n%s", got, want)
	}
}

// The server shows the clock offset that a client reports until --max-sample-age has passed since
// the last report. The offset changes no timestamp of a sample. If the reported value is not a
// number of milliseconds within limits, the server ignores it and still stores the push.
func TestClockOffset(t *testing.T) {
	r := newSrvRig(t)
	for _, c := range []struct{ value, want string }{
		{"1500", "1.5"}, {"-90000", "-90"}, {"", "-90"}, {"0", "0"}, {"x", "0"}, {"1.5", "0"}, {"NaN", "0"}, {"9223372036855", "0"}, {"-9223372036855", "0"}, {"9007199254740992", "0"},
		{"99999999999999999999", "0"}, {"60000", "60"},
	} {
		a := r.accepted(r.pushSpool("site-a", "up 1\n", ClockOffsetHeader, c.value))
		if a.Accepted+a.Duplicates != 1 {
			t.Errorf("offset %q: answered %+v", c.value, a)
		}
		shown := "none"
		for line := range strings.Lines(r.held("site-a", "")) {
			if rest, ok := strings.CutPrefix(line, `telemeter_cluster_clock_offset_seconds{_id="site-a",instance="",job="",server="s1"} `); ok {
				shown = strings.TrimSpace(rest)
			}
		}
		if shown != c.want {
			t.Errorf("offset %q: %s is shown, want %s", c.value, shown, c.want)
		}
	}
	if times := r.times("site-a"); !slices.Equal(times, []int64{0}) {
		t.Errorf("the samples have the times %v ms, want 0", times)
	}
	const warning = `level=WARN msg="the clock of the site's source is off, and the client corrects the timestamps by the offset: synchronize the clock of that host (NTP)" cluster_id=site-a behind=-1m30s`
	if log := r.log.String(); !strings.Contains(log, warning) || strings.Count(log, "level=WARN") != 1 {
		t.Errorf("the log does not have exactly one warning of the clock:\n%s", log)
	}
	for after, want := range map[time.Duration]bool{10 * time.Minute: true, 10*time.Minute + time.Second: false} {
		r.clock.Store(int64(after))
		if got := r.held("site-a", ""); strings.Contains(got, "clock_offset_seconds") != want {
			t.Errorf("the clock offset is shown %v after the push: %t, want %t", after, !want, want)
		}
	}
}

// After a step of its wall clock, the server may not know yet whether the time before or after the
// step is right. Until it knows, it answers 503 with Retry-After to a push that is timely by only
// one of the two times. When the doubt is resolved, it accepts the push if the push is timely by
// the right time.
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
		t.Errorf("answered %d %v %s", got.status, got.header, got.body)
	}
	doubt = 0
	r.accepted(r.push("site-a", "up 2\n"))
}

// If several sites push series with the same names concurrently, each stored sample keeps the
// cluster ID and the value of its own push.
func TestConcurrentSites(t *testing.T) {
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
					t.Errorf("site-%d was answered %d %s", site, a.status, a.body)
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
		t.Errorf("%d series are served, want 80", n)
	}
}

// After a crash the server still serves every sample of a push that it answered with 200. Failed
// fsyncs and refused pushes between these pushes do not change that.
func TestAcceptedSurvivesCrash(t *testing.T) {
	disk := newCrashFS(3, "/secretdir")
	r := newSrvRig(t, func(s *StoreConfig, _ *ServerConfig) { s.FS = disk })
	accepted := 0
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
			accepted++
		} else if a.status != 503 {
			t.Errorf("push %d was answered %d %s", i, a.status, a.body)
		}
	}
	before := r.federate("match[]=m", "")
	if strings.Count(before, "\nm{") != accepted || accepted < 8 || accepted == 20 {
		t.Fatalf("%d pushes were accepted, and served are:\n%s", accepted, before)
	}
	disk.crash()
	again := newSrvRig(t, func(s *StoreConfig, _ *ServerConfig) { s.FS = disk })
	if got := again.federate("match[]=m", ""); got != before {
		t.Errorf("after the crash:\n%s\nbefore the crash:\n%s", got, before)
	}
}

// BenchmarkUpload measures how long the server takes to handle and store a push, on a real disk
// with fsync. It calls the HTTP handler directly, without a network. The bodies are made
// beforehand, so that the work of a client is not measured.
func BenchmarkUpload(b *testing.B) {
	for _, c := range []struct {
		name        string
		proto, gzip bool
	}{{"text/identity", false, false}, {"text/gzip", false, true}, {"proto/identity", true, false}, {"proto/gzip", true, true}} {
		b.Run(c.name, func(b *testing.B) {
			r := benchRig(b)
			handler, token := r.server.ExternalHandler(), r.token(KindUpload, "site-a")
			bodies := make([][]byte, 256)
			const step = 15_000 // time between the timestamps of two bodies, in ms
			for i := range bodies {
				bodies[i] = benchBody(b, c.proto, testNow.UnixMilli()+int64(i)*step)
				if c.gzip {
					bodies[i] = gzipped(bodies[i])
				}
			}
			run := func(i int) {
				// The server's clock follows the timestamps of the bodies. When all bodies have
				// been pushed, they are pushed again for another site, so that every sample is new.
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
					b.Fatalf("push %d was answered %d %s", i, rec.Code, rec.Body)
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

// BenchmarkUploadOverhead measures what a push costs apart from net/http, the disk and the number of
// its samples: a push of one sample, by a client with a spool, to a server that keeps samples in
// memory. 200 sites take turns.
func BenchmarkUploadOverhead(b *testing.B) {
	r := newSrvRig(b, func(s *StoreConfig, c *ServerConfig) {
		s.Dir, s.LimitSamples, s.LimitSites = "", 500_000_000, 1000
		c.LimitBytes, c.RateInterval = 1<<20, 0
	})
	handler := r.server.ExternalHandler()
	body := bytes.NewReader(protoBody(b, gaugeFamily("up", 1, nil, "job", "j", "instance", "i")))
	requests := make([]*http.Request, 200)
	for i := range requests {
		req := httptest.NewRequest("POST", "/upload", io.NopCloser(body))
		req.ContentLength = body.Size()
		req.Header.Set("Authorization", "Bearer "+r.token(KindUpload, fmt.Sprint("site-", i)))
		req.Header.Set("Content-Type", protoType)
		requests[i] = req
	}
	var rec answerRecorder
	b.ReportAllocs()
	before, n := processCPU(b), 0
	for b.Loop() {
		r.clock.Store(int64(n) * 1e6)
		body.Seek(0, io.SeekStart)
		req := *requests[n%len(requests)]
		req.Header.Set(SpoolHeader, fmt.Sprintf("%016x %d", 1, 1+n/len(requests)))
		rec.reset()
		handler.ServeHTTP(&rec, &req)
		if rec.status != 200 || !bytes.Contains(rec.body, []byte(`"accepted":1,`)) {
			b.Fatalf("push %d was answered %d %s", n, rec.status, rec.body)
		}
		n++
	}
	b.ReportMetric(float64((processCPU(b)-before).Nanoseconds())/float64(n), "cpu-ns/op")
}

// answerRecorder is an http.ResponseWriter that allocates no memory for most answers.
type answerRecorder struct {
	status int
	header http.Header
	body   []byte
}

func (r *answerRecorder) reset() {
	r.status, r.body = 200, r.body[:0]
	if r.header == nil {
		r.header = http.Header{}
	}
	clear(r.header)
}

func (r *answerRecorder) Header() http.Header    { return r.header }
func (r *answerRecorder) WriteHeader(status int) { r.status = status }
func (r *answerRecorder) Write(p []byte) (int, error) {
	r.body = append(r.body, p...)
	return len(p), nil
}
