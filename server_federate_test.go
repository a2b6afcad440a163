package main

// /federate for a consumer, over HTTP: which requests are refused, which confirm the scrape before,
// and the samples that old scrapers get.

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// consumerRig is a server whose scrapers' connections are told apart.
type consumerRig struct {
	*srvRig
	url string

	during func(*http.Request) // called before the end of an answer is written, if not nil
}

func newConsumerRig(t testing.TB, change ...func(*StoreConfig, *ServerConfig)) *consumerRig {
	ln, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &consumerRig{srvRig: newSrvRig(t, change...), url: "http://" + ln.Addr().String()}
	internal := r.server.InternalHandler()
	web := HTTPServer{Name: "internal", Listener: ln, TrackConns: true, Log: slog.New(slog.DiscardHandler), Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if internal.ServeHTTP(w, req); r.during != nil {
			r.during(req)
		}
	})}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- web.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return r
}

// scraperOf returns a client with connections of its own, and so, as it asks for one
// thing after another, with one.
func scraperOf(t testing.TB) *http.Client {
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// get asks as agent, and with other headers, which are names and values.
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

// ups returns the values of the series up, in order.
func (r *consumerRig) ups(client *http.Client, query, agent string, headers ...string) (values string) {
	r.t.Helper()
	a := r.get(client, "GET", query, agent, headers...)
	if a.status != 200 {
		r.t.Fatalf("%s: %d %s", query, a.status, a.body)
	}
	return upsOf(a.body)
}

func upsOf(body string) (values string) {
	for line := range strings.Lines(body) {
		if _, rest, ok := strings.Cut(line, "} "); ok && strings.HasPrefix(line, "up{") {
			v, _, _ := strings.Cut(rest, " ")
			values += v + " "
		}
	}
	return values
}

// pushUps pushes values of the series up, a second apart, the last of now.
func (r *consumerRig) pushUps(values ...int) {
	r.t.Helper()
	var text strings.Builder
	for i, v := range values {
		fmt.Fprintf(&text, "up %d %d\n", v, r.now().UnixMilli()-int64(len(values)-1-i)*1000)
	}
	r.accepted(r.push("site-a", text.String()))
	r.clock.Add(int64(10 * time.Second))
}

// What confirms is the next GET of the same consumer on the same connection, and
// nothing else.
func TestFederateConfirms(t *testing.T) {
	r := newConsumerRig(t)
	a, b := scraperOf(t), scraperOf(t)
	r.pushUps(1, 2)
	for i, step := range []struct {
		client *http.Client
		query  string
		want   string
	}{
		{a, "consumer=x", "1 2 "},
		{b, "consumer=x", "1 2 "},
		{a, "consumer=y", "1 2 "}, // another consumer, on the same connection
		{b, "consumer=x&match[]=up", "1 2 "},
		{a, "", "2 "},
		{a, "consumer=x", "2 "}, // all had: the newest again
	} {
		if got := r.ups(step.client, step.query, ""); got != step.want {
			t.Errorf("step %d, %s: %q, want %q", i, step.query, got, step.want)
		}
	}
	r.pushUps(3, 4)
	if got := r.ups(a, "consumer=x", ""); got != "3 4 " {
		t.Errorf("got %q", got)
	}
	for _, query := range []string{"consumer=x", "consumer=", "consumer=new"} { // HEAD is of no consumer
		if got := r.get(a, "HEAD", query, ""); got.status != 200 || got.body != "" {
			t.Errorf("HEAD %s: %d %s", query, got.status, got.body)
		}
	}
	for _, query := range []string{"consumer=x&match[]=up{", "consumer=x&match[]=%zz"} { // nor is what is refused
		if got := r.get(a, "GET", query, ""); got.status != 400 {
			t.Errorf("%s: %d %s", query, got.status, got.body)
		}
	}
	if got := r.ups(scraperOf(t), "consumer=x", ""); got != "3 4 " {
		t.Errorf("on a new connection: %q", got)
	}
	if got := r.ups(a, "consumer=x", ""); got != "4 " {
		t.Errorf("confirmed: %q", got)
	}
	if n := len(cursorsOf(r.store.Consumers)); n != 2 {
		t.Errorf("%d names of consumers are known", n)
	}
}

// A request confirms no answer that was not written to its end when a part of the
// request came; the next request that waits for its answer confirms as ever.
func TestFederatePipelined(t *testing.T) {
	const get = "GET /federate?consumer=x HTTP/1.1\r\nHost: x\r\n\r\n"
	for _, test := range []struct {
		name   string
		first  string // sent at once
		during string // sent before the end of the first answer is written
		then   string // sent when that was read
		want   string // of the second answer
	}{
		{"after the answer", get, "", get, "3 "},
		{"both at once", get + get, "", "", "1 2 3 "},
		{"during the answer", get, get, "", "1 2 3 "},
		{"half at once", get + get[:30], "", get[30:], "1 2 3 "},
		{"a byte during the answer", get, "G", get[1:], "1 2 3 "},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newConsumerRig(t)
			conn := dialRaw(t, strings.TrimPrefix(r.url, "http://"))
			ups := func() string {
				t.Helper()
				resp, err := conn.readAnswer()
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(resp.Body)
				if err != nil {
					t.Fatal(err)
				}
				return upsOf(string(body))
			}
			first, finish := make(chan *http.Request, 1), make(chan struct{})
			r.during = func(req *http.Request) {
				select {
				case first <- req:
					<-finish
				default:
				}
			}
			r.pushUps(1, 2)
			conn.send(test.first)
			eventually(t, "first request", func() bool { return len(first) == 1 })
			r.pushUps(3)
			conn.send(test.during)
			c := (<-first).Context().Value(connTrackerKey{}).(*AnswerReadTracker)
			first <- nil // no other waits
			eventually(t, "read what was sent", func() bool {
				c.mu.Lock()
				defer c.mu.Unlock()
				return test.during == "" || c.seen.complete > 1 || c.seen.partial
			})
			close(finish)
			if got := ups(); got != "1 2 " {
				t.Fatalf("first: %q", got)
			}
			conn.send(test.then)
			if got := ups(); got != test.want {
				t.Errorf("second: %q, want %q", got, test.want)
			}
			conn.send(get)
			if got := ups(); got != "3 " {
				t.Errorf("third: %q", got)
			}
		})
	}
}

// A request that came through a proxy confirms nothing and is not confirmed: that the
// proxy has read an answer says nothing of who asked it.
func TestFederateProxied(t *testing.T) {
	for _, header := range [][]string{{"Via", "1.1 proxy"}, {"Forwarded", "for=10.0.0.1"}, {"X-Forwarded-For", "10.0.0.1"}, {"x-forwarded-for", ""}} {
		r := newConsumerRig(t)
		client := scraperOf(t)
		r.pushUps(1, 2)
		for i, step := range []struct {
			headers []string
			want    string
		}{
			{header, "1 2 "}, {header, "1 2 "}, {nil, "1 2 "}, {header, "1 2 "}, {nil, "2 "},
		} {
			if got := r.ups(client, "consumer=x", "", step.headers...); got != step.want {
				t.Errorf("%v, step %d: %q, want %q", header, i, got, step.want)
			}
		}
		r.ups(client, "consumer=y", "", header...)
		if n := strings.Count(r.log.String(), "has to scrape this server directly"); n != 2 {
			t.Errorf("%d warnings, not one a consumer:\n%s", n, r.log)
		}
	}
}

// Scrapes that nothing confirms, as through a proxy that makes a connection for each,
// are told by the log and by a gauge, until one confirms.
func TestFederateUnconfirmed(t *testing.T) {
	r := newConsumerRig(t)
	warnings := func() int { return strings.Count(r.log.String(), "level=WARN") }
	gauge := func(want ...string) {
		t.Helper()
		var got []string
		for line := range strings.Lines(metricsText(t, r.server.cfg.Metrics)) {
			if rest, ok := strings.CutPrefix(line, "telemeter_consumer_unconfirmed_scrapes{consumer="); ok {
				got = append(got, strings.TrimSpace(strings.Replace(rest, `,address="127.0.0.1"}`, "", 1)))
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("gauge: %q, want %q", got, want)
		}
	}
	gauge()
	r.pushUps(1)
	for i := range 4 {
		if n := warnings(); n != 0 {
			t.Fatalf("%d warnings after %d scrapes", n, i)
		}
		r.ups(scraperOf(t), "consumer=x", "")
	}
	if n := warnings(); n != 1 {
		t.Errorf("%d warnings", n)
	}
	gauge(`"x" 3`)
	for range 7 {
		r.clock.Add(int64(10 * time.Minute))
		r.pushUps(2)
		r.ups(scraperOf(t), "consumer=x", "")
	}
	if n := warnings(); n != 2 {
		t.Errorf("%d warnings in 70 minutes more", n)
	}
	// Consumers that differ only in match[] share one series, with their maximum.
	r.ups(scraperOf(t), "consumer=x&match[]=up", "")
	r.ups(scraperOf(t), "consumer=y", "")
	r.ups(scraperOf(t), "consumer=y", "")
	gauge(`"x" 10`, `"y" 1`)
	client := scraperOf(t)
	r.ups(client, "consumer=x", "")
	gauge(`"x" 11`, `"y" 1`)
	r.ups(client, "consumer=x", "") // which confirms
	gauge(`"x" 0`, `"y" 1`)
	for range 5 {
		r.pushUps(1)
		r.ups(scraperOf(t), "consumer=x", "") // and once more
	}
	if n := warnings(); n != 3 {
		t.Errorf("%d warnings at the second time", n)
	}
	r.clock.Add(int64(consumerIdle + time.Minute))
	r.store.Consumers.DropIdle(r.now())
	gauge()
}

func TestFederateRefuses(t *testing.T) {
	r := newConsumerRig(t)
	client := scraperOf(t)
	for query, reason := range map[string]string{
		"consumer=": "1 to 64 bytes", "consumer=" + strings.Repeat("x", maxConsumerName+1): "1 to 64 bytes",
		"consumer=%ff": "of text", "consumer=a%00b": "of text",
		"consumer=x&match[]=up{": "match[]", "consumer=x&match[]={}": "empty string", "consumer=x&match[]=": "match[]",
	} {
		if got := r.get(client, "GET", query, ""); got.status != 400 || !strings.Contains(got.body, reason) {
			t.Errorf("%.40s: %d %s", query, got.status, got.body)
		}
	}
	if n := len(r.store.Consumers.byKey); n != 0 {
		t.Errorf("%d consumers that were refused are known", n)
	}
	for i := range MaxConsumers {
		if got := r.get(client, "GET", fmt.Sprint("consumer=", i), ""); got.status != 200 {
			t.Fatalf("consumer %d: %d %s", i, got.status, got.body)
		}
	}
	for _, query := range []string{"consumer=more", "consumer=0&match[]=up"} {
		got := r.get(client, "GET", query, "")
		if got.status != 503 || got.header.Get("Retry-After") != "60" || !strings.Contains(got.body, "too many consumers") {
			t.Errorf("%s: %d %v %s", query, got.status, got.header, got.body)
		}
	}
	if got := r.get(client, "GET", "consumer=0", ""); got.status != 200 {
		t.Errorf("one that is known: %d", got.status)
	}
	r.clock.Add(int64(consumerIdle + time.Second))
	r.store.Consumers.DropIdle(r.now())
	if got := r.get(client, "GET", "consumer=more", ""); got.status != 200 {
		t.Errorf("a day later: %d", got.status)
	}
}

// Versions of Prometheus that keep only the first of several samples of a series get
// one a scrape, and so all of them; and so do scrapers that would mark series stale.
func TestFederateOldScrapers(t *testing.T) {
	for agent, single := range map[string]bool{
		"Prometheus/2.42.0": false, "Prometheus/2.51.2": false,
		"Prometheus/2.52.0": true, "Prometheus/2.52.1+ds1-1": true, "Prometheus/2.53.0": true, "Prometheus/2.53.2": true,
		"Prometheus/2.53.3": false, "Prometheus/2.53.10": false, "Prometheus/2.54.0": true, "Prometheus/2.54.0-rc.1": true,
		"vm_promscrape": true, "vm_promscrape/v1.93.0": true, "vm_promscraper": false, "x vm_promscrape": false,
		"Prometheus/2.54.1": false, "Prometheus/2.540.0": false, "Prometheus/3.10.0": false, "Prometheus/3.2.52.0": false, "": false, "x Prometheus/2.52.0": false,
	} {
		r := newConsumerRig(t)
		client := scraperOf(t)
		r.pushUps(1, 2, 3)
		want := []string{"1 2 3 ", "3 ", "3 "}
		if single {
			want = []string{"1 ", "2 ", "3 ", "3 "}
		}
		for i, want := range want {
			if got := r.ups(client, "consumer=x", agent); got != want {
				t.Errorf("%s, scrape %d: %q, want %q", agent, i, got, want)
			}
		}
	}
}

// How long a scraper waits is taken from it only if it can be.
func TestScrapeTime(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"": 0, "x": 0, "10": 10 * time.Second, "0.5": time.Second / 2, "1e1": 10 * time.Second, "3600": time.Hour,
		"NaN": 0, "nan": 0, "Inf": 0, "+Inf": 0, "-Inf": 0, "infinity": 0, "-1": 0, "0": 0, "-0": 0, "3601": 0, "1e300": 0, "1e999": 0, "1e-300": 0, "10 ": 0,
	} {
		if got := scraperTimeout(http.Header{"X-Prometheus-Scrape-Timeout-Seconds": {text}}); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

// A consumer whose selectors choose little of what is held gets all of that, though
// the limit counts what it does not get, and answers may be empty meanwhile.
func TestFederateSelective(t *testing.T) {
	r := newConsumerRig(t, func(_ *StoreConfig, c *ServerConfig) { c.LimitScrape = 7 })
	client := scraperOf(t)
	want := ""
	for i := range 20 {
		var text strings.Builder
		for k := range 10 {
			fmt.Fprintf(&text, "other{k=\"%d\"} %d\n", k, i)
		}
		fmt.Fprintf(&text, "up %d\n", i)
		r.accepted(r.push("site-a", text.String()))
		r.clock.Add(int64(time.Second))
		want += fmt.Sprint(i, " ")
	}
	got := ""
	for n := 0; !strings.HasSuffix(got, " 19 "); n++ {
		if n > 40 {
			t.Fatalf("after %d scrapes: %s", n, got)
		}
		got += r.ups(client, "consumer=x&match[]=up", "")
	}
	if got != want {
		t.Errorf("got %s", got)
	}
}

// failingWriter is the ResponseWriter of a connection that has ended.
type failingWriter struct{ http.ResponseWriter }

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// An answer that its connection cut short is counted.
func TestFederateCut(t *testing.T) {
	r := newConsumerRig(t)
	r.pushUps(1)
	r.server.federate.ServeHTTP(failingWriter{httptest.NewRecorder()}, httptest.NewRequest("GET", "/federate", nil))
	if n := r.server.federate.endedEarly.Value(); n != 1 {
		t.Errorf("%v counted", n)
	}
	for query, answer := range map[string]http.ResponseWriter{"cut": failingWriter{httptest.NewRecorder()}, "whole": httptest.NewRecorder()} {
		r.server.federate.ServeHTTP(answer, httptest.NewRequest("GET", "/federate?consumer="+query, nil))
		for _, c := range r.store.Consumers.byKey {
			if c.name == query && c.sessions[0].writtenInTime != (query == "whole") {
				t.Errorf("%s: whole %t", query, c.sessions[0].writtenInTime)
			}
		}
	}
}

// A site that is revoked is silent on purpose: its push time, its failures and its token's
// expiry are shown no more, and those of others are.
func TestFederateRevoked(t *testing.T) {
	r := newConsumerRig(t)
	for _, id := range []string{"gone", "stays"} {
		r.accepted(r.push(id, "up 1\n"))
		if got := r.push(id, "not a sample\n"); got.status != 400 {
			t.Fatal(got)
		}
	}
	revoked, err := ParseRevokedIDs([]byte("gone\n"))
	if err != nil {
		t.Fatal(err)
	}
	lines := func() (n int) {
		for line := range strings.Lines(r.get(scraperOf(t), "GET", "", "").body) {
			if strings.HasPrefix(line, "push_") && strings.Contains(line, `_id="gone"`) {
				n++
			}
		}
		return n
	}
	if n := lines(); n != 2 {
		t.Errorf("%d series of pushes before it is revoked", n)
	}
	r.reload(func(st *ReloadableServerConfig) { st.Revoked = revoked })
	body := r.get(scraperOf(t), "GET", "", "").body
	if n := lines(); n != 0 || !strings.Contains(body, `push_time_seconds{_id="stays"`) || !strings.Contains(body, `up{_id="gone"`) {
		t.Errorf("%d series of pushes when it is revoked:\n%s", n, body)
	}
}

// scrapeOn asks for /federate on a connection whose earlier answers were all read.
func (r *srvRig) scrapeOn(conn *AnswerReadTracker, query string) string {
	r.t.Helper()
	conn.sequential = true
	req := httptest.NewRequest("GET", "/federate?"+query, nil)
	req.RemoteAddr = "192.0.2.1:9"
	rec := httptest.NewRecorder()
	r.server.InternalHandler().ServeHTTP(rec, req.WithContext(context.WithValue(req.Context(), connTrackerKey{}, conn)))
	if rec.Code != http.StatusOK {
		r.t.Fatalf("%s: %d %s", query, rec.Code, rec.Body)
	}
	return rec.Body.String()
}

// Each server shows what it saw of a site itself, with its name, whoever owns the site. The
// owner alone shows the newest samples again, and every server serves the unread samples that
// it holds.
func TestFederateOfEachServer(t *testing.T) {
	ring := newRingServers(t, 2)
	a, b := ring[0], ring[1]
	id := ownedBy(t, a.node.Forwarder, "b")
	token := a.token(KindClient, id, func(tok *Token) { tok.Expires = testNow.Unix() + 1000 })
	push := func(text string) srvAnswer {
		t.Helper()
		return a.do(srvRequest{method: "POST", url: a.external.URL + "/upload", token: token, header: map[string]string{ClockOffsetHeader: "-1500"}, body: []byte(text)})
	}
	now := func() string { return strconv.FormatInt(a.now().Unix(), 10) + "\n" }
	shown := func(r *ringServer, want ...string) {
		t.Helper()
		r.parsed("")
		var got []string
		for line := range strings.Lines(r.federate("", "")) {
			if line[0] != '#' {
				got = append(got, strings.Replace(line, `_id="`+id+`",instance="",job=""`, "", 1))
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s shows:\n%s\nwant:\n%s", r.server.cfg.Name, strings.Join(got, ""), strings.Join(want, ""))
		}
	}
	at := func(ms int64) string { return " " + strconv.FormatInt(ms, 10) + "\n" }
	first := testNow.UnixMilli()

	// A push that the owner took, and one that it refused.
	a.accepted(push("up 1\n"))
	if got := push("up{ 1\n"); got.status != 400 {
		t.Fatal(got)
	}
	seen := []string{
		`telemeter_cluster_token_expiry_seconds{,server="a"} ` + strconv.FormatInt(testNow.Unix()+1000, 10) + "\n",
		`telemeter_cluster_clock_offset_seconds{,server="a"} -1.5` + "\n",
		`push_failure_time_seconds{,server="a"} ` + now(),
	}
	shown(a, seen...)
	held := []string{
		`push_time_seconds{,server="b"} ` + now(), `telemeter_cluster_samples{,server="b"} 1` + "\n", `telemeter_cluster_series{,server="b"} 1` + "\n",
		"up{} 1" + at(first),
	}
	shown(b, held...)

	// A push that the receiver keeps.
	for _, r := range ring {
		r.clock.Store(int64(10 * time.Second))
	}
	b.node.down.Store(true)
	a.accepted(push("up 2\n"))
	seen = append(seen, `push_time_seconds{,server="a"} `+now(), `telemeter_cluster_samples{,server="a"} 1`+"\n", `telemeter_cluster_series{,server="a"} 1`+"\n")
	shown(a, seen...)
	shown(b, held...)

	// A consumer reads both, and then gets the newest sample of the owner alone.
	for _, c := range []struct {
		*ringServer
		unread, newest string
	}{{a, "2 ", ""}, {b, "1 ", "1 "}} {
		conn := &AnswerReadTracker{}
		backlog := func(want int) {
			t.Helper()
			line := fmt.Sprintf(`telemeter_cluster_backlog_samples{_id="%s",address="192.0.2.1",consumer="x",instance="",job="",server="%s"} %d`, id, c.server.cfg.Name, want)
			if got := c.federate("", ""); !strings.Contains(got, line+"\n") {
				t.Errorf("%s shows no %s:\n%s", c.server.cfg.Name, line, got)
			}
		}
		if got := upsOf(c.scrapeOn(conn, "consumer=x")); got != c.unread {
			t.Errorf("%s serves %q, want %q", c.server.cfg.Name, got, c.unread)
		}
		backlog(1)
		if got := upsOf(c.scrapeOn(conn, "consumer=x")); got != c.newest {
			t.Errorf("%s serves again %q, want %q", c.server.cfg.Name, got, c.newest)
		}
		backlog(0)
	}
}
