package main

// Tests of /federate, most of them without a consumer's name in the query: the newest sample of
// each series, match[], escaping, limits, and the series that the server itself makes for each
// site. The last tests also compare the answers of several servers of a ring.

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// newFederateRig returns a server with samples of two sites. site-a has pushed two samples of the
// series up, a sample that is older than --max-sample-age, and a series with UTF-8 names. site-b
// has pushed with a client token that expires in 1,000 s, and the server has refused a second push
// of site-b.
func newFederateRig(t *testing.T) *srvRig {
	r := newSrvRig(t)
	ms := testNow.UnixMilli()
	r.accepted(r.push("site-a", fmt.Sprintf("up 1 %d\nup 2 %d\nold 1 %d\n{\"a.b\",\"c.d\"=\"e\"} 3\n", ms-1000, ms, ms-11*60_000)))
	client := r.token(KindClient, "site-b", func(tok *Token) { tok.Expires = testNow.Unix() + 1000 })
	r.accepted(r.upload(client, []byte("up{job=\"node\"} NaN\n")))
	r.push("site-b", "broken")
	return r
}

// A scrape without a consumer's name gets the newest sample of each series, unless the sample is
// older than --max-sample-age. It also gets the server's own series about each site. The metric
// families are sorted by name.
func TestFederate(t *testing.T) {
	r := newFederateRig(t)
	ms := testNow.UnixMilli()
	s := strconv.FormatInt(ms/1000, 10)
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
		t.Errorf("served:\n%s\nwant:\n%s", got, want)
	}
	r.parsed("")
}

// A scrape without a consumer's name is logged with the remedy, at most once an hour for each peer. A
// HEAD request and a scrape of a consumer are not.
func TestFederateLogsMissingConsumer(t *testing.T) {
	r := newSrvRig(t)
	logged := func() int {
		const line = `level=INFO msg="a scrape without consumer gets only the newest sample of each series: add params: {consumer: [NAME]} to the scrape configuration" remote=127.0.0.1:`
		return strings.Count(r.log.String(), line)
	}
	r.do(srvRequest{method: "HEAD", url: r.internal.URL + "/federate"})
	r.federate("consumer=central", "")
	if n := logged(); n != 0 {
		t.Errorf("the advice was logged %d times before a scrape without a consumer", n)
	}
	for range 2 {
		r.federate("", "")
	}
	if n := logged(); n != 1 {
		t.Errorf("the advice was logged %d times, want once:\n%s", n, r.log)
	}
}

// A match[] selects series by their unescaped names and labels. If a query has several match[], a
// series is served if one of them selects it.
func TestFederateMatch(t *testing.T) {
	r := newFederateRig(t)
	for _, c := range []struct {
		query, accept string
		// names has the metric names of the lines served, sorted. For a line with a UTF-8 metric
		// name it has the text between the braces.
		names string
	}{
		{"match[]=up", "", "up up"},
		{`match[]=up{_id="site-b"}`, "", "up"},
		{`match[]=up{job=""}&match[]={__name__=~"push_time.*",_id="site-a"}`, "", "push_time_seconds up"},
		{`match[]={"a.b"}`, acceptUTF8, `"a.b",_id="site-a","c.d"="e",instance="",job=""`},
		{`match[]=none`, "", ""},
		{"", "text/plain;escaping=values", "U__a_2e_b push_failure_time_seconds push_time_seconds push_time_seconds telemeter_cluster_samples telemeter_cluster_samples telemeter_cluster_series telemeter_cluster_series telemeter_cluster_token_expiry_seconds up up"},
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
			t.Errorf("%s: served %q, want %q", c.query, got, c.names)
		}
	}
}

// The server answers 400 with the reason if the query of a scrape is malformed, has an invalid
// match[], or has too many match[].
func TestFederateBadQuery(t *testing.T) {
	r := newSrvRig(t)
	for query, reason := range map[string]string{
		"match[]=up{": "match[]", "match[]={}": "empty string", "match[]=": "match[]", `match[]={a=~"("}`: "pattern", "match[]=%zz": "query", "a;b": "query",
		strings.Repeat("match[]=a&", 1001): "at most 1000",
		"cosumer=central":                  `unknown parameter "cosumer": known are match[], consumer`,
		"consumer=central&match=up":        `unknown parameter "match": known are match[], consumer`,
		"=":                                `unknown parameter ""`,
		"consumer=a&consumer=b":            "the parameter consumer is given 2 times: give one name",
		"consumer":                         "the parameter consumer is empty: a consumer name must have 1 to 64 bytes",
	} {
		got := r.do(srvRequest{method: "GET", url: r.internal.URL + "/federate?" + strings.ReplaceAll(query, `"`, "%22")})
		if got.status != 400 || !strings.Contains(got.body, reason) {
			t.Errorf("%.50s was answered %d %s, want 400 and %q", query, got.status, got.body, reason)
		}
		if log := r.log.String(); !strings.Contains(log, `level=WARN msg="scrape refused: correct the scrape configuration" remote=127.0.0.1:`) || strings.Count(log, "\n") != 1 {
			t.Errorf("the log does not have exactly one warning for this peer:\n%s", log)
		}
	}
	if got := r.do(srvRequest{method: "HEAD", url: r.internal.URL + "/federate?cosumer=x"}); got.status != 400 {
		t.Errorf("HEAD with an unknown parameter was answered %d, want 400", got.status)
	}
}

// The answer to a scrape uses the escaping of names that the Accept header asks for. It is
// compressed with gzip if the scraper accepts gzip.
func TestFederateNegotiation(t *testing.T) {
	r := newFederateRig(t)
	for _, c := range []struct{ accept, contentType string }{
		{"", "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"},
		{acceptUTF8, "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"},
		{"text/html", "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"},
	} {
		a := r.do(srvRequest{method: "GET", url: r.internal.URL + "/federate", header: map[string]string{"Accept": c.accept, "Accept-Encoding": "gzip"}})
		text := gunzipped(t, []byte(a.body))
		if a.header.Get("Content-Type") != c.contentType || a.header.Get("Content-Encoding") != "gzip" || string(text) != r.federate("", c.accept) {
			t.Errorf("Accept %q with gzip was answered with the headers %v", c.accept, a.header)
		}
	}
}

// A scrape without a consumer's name no longer gets a sample that is older than --max-sample-age.
// It still gets push_time_seconds of the site, so that alerts can find a site that no longer
// pushes.
func TestFederateMaxSampleAge(t *testing.T) {
	r := newFederateRig(t)
	r.clock.Store(int64(11 * time.Minute))
	if got := r.federate("match[]=up", ""); got != "" {
		t.Errorf("old samples are served:\n%s", got)
	}
	if got := r.federate("match[]=push_time_seconds", ""); strings.Count(got, "\n") != 3 {
		t.Errorf("the push times of two sites should be served, not:\n%s", got)
	}
}

// A scrape without a consumer's name gets the samples of whole sites: together at most
// --limit-scrape samples, unless one site alone has more. If sites are left out, the next scrape
// begins with other sites, so that each site gets its share of the scrapes. Each scrape that leaves
// out samples is counted as truncated.
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
	served := map[string]int{}
	const scrapes = 12
	for range scrapes {
		got := r.federate("match[]=up", "")
		for _, id := range sites {
			served[id] += strings.Count(got, `_id="`+id+`"`)
		}
	}
	for _, id := range sites {
		if served[id] < 40*scrapes/3/2 {
			t.Errorf("%d scrapes with room for one site each served too few samples of %s: %v", scrapes, id, served)
		}
	}
	if n := r.server.federate.truncated.Value(); n != scrapes {
		t.Errorf("%v scrapes are counted as truncated, want %d", n, scrapes)
	}
}

// The server shows no push_time_seconds and no push_failure_time_seconds of a revoked site, because
// a revoked site is silent on purpose. It still serves the samples of the revoked site and the
// series of other sites.
func TestFederateRevoked(t *testing.T) {
	r := newConsumerRig(t)
	for _, id := range []string{"gone", "stays"} {
		r.accepted(r.push(id, "up 1\n"))
		if got := r.push(id, "not a sample\n"); got.status != 400 {
			t.Fatalf("a malformed push was answered %v", got)
		}
	}
	revoked, err := ParseRevokedIDs([]byte("gone\n"))
	if err != nil {
		t.Fatal(err)
	}
	pushSeries := func() (n int) {
		for line := range strings.Lines(r.get(scraperOf(t), "GET", "", "").body) {
			if strings.HasPrefix(line, "push_") && strings.Contains(line, `_id="gone"`) {
				n++
			}
		}
		return n
	}
	if n := pushSeries(); n != 2 {
		t.Errorf("before the revocation there are %d series of push times, want 2", n)
	}
	r.reload(func(st *ReloadableServerConfig) { st.Revoked = revoked })
	body := r.get(scraperOf(t), "GET", "", "").body
	if n := pushSeries(); n != 0 || !strings.Contains(body, `push_time_seconds{_id="stays"`) || !strings.Contains(body, `up{_id="gone"`) {
		t.Errorf("after the revocation there are %d series of push times, want 0:\n%s", n, body)
	}
}

// pushTimes returns the lines of push_time_seconds that s serves, sorted: for each the cluster ID and
// the value.
func pushTimes(s *srvRig, query string) (lines []string) {
	for line := range strings.Lines(s.federate(query, "")) {
		if rest, ok := strings.CutPrefix(line, PushTimeName+`{_id="`); ok {
			id, rest, _ := strings.Cut(rest, `"`)
			lines = append(lines, id+rest[strings.LastIndexByte(rest, ' '):len(rest)-1])
		}
	}
	slices.Sort(lines)
	return lines
}

// issuedFor returns a list of issued tokens with one valid token for each of the sites.
func issuedFor(sites ...string) (l IssuedTokens) {
	for i, id := range sites {
		l.tokens = append(l.tokens, Token{ClusterID: id, ID: fmt.Sprintf("%032x", i)})
	}
	return l
}

// The server shows the push time 0 for a site that has a valid token and whose pushes the store does
// not know, also to a consumer, and if match[] selects it. It makes no other series for the site.
// The store knows the last push of a site for 30 days, even if the samples expired long ago.
func TestFederateNeverPushed(t *testing.T) {
	r := newSrvRig(t)
	r.accepted(r.push("pushed", "up 1\n"))
	revoked, err := ParseRevokedIDs([]byte("revoked"))
	if err != nil {
		t.Fatal(err)
	}
	r.reload(func(st *ReloadableServerConfig) { st.Revoked = revoked })
	r.server.SetIssuedTokens(issuedFor("a", "pushed", "revoked", "z"))
	pushed := fmt.Sprint("pushed ", testNow.Unix())
	for query, want := range map[string][]string{
		"":                                  {"a 0", pushed, "z 0"},
		"consumer=x":                        {"a 0", pushed, "z 0"},
		`match[]={_id=%22z%22}`:             {"z 0"},
		`match[]=push_time_seconds`:         {"a 0", pushed, "z 0"},
		`match[]=up`:                        nil,
		`match[]=telemeter_cluster_samples`: nil,
	} {
		if got := pushTimes(r, query); !slices.Equal(got, want) {
			t.Errorf("%s: the push times are %q, want %q", query, got, want)
		}
	}
	if text := r.federate(`match[]={_id=~%22a|z%22}`, ""); strings.Count(text, "_id=") != 2 {
		t.Errorf("the server makes more than one series for a site that never pushed:\n%s", text)
	}
	r.parsed("")

	for _, c := range []struct {
		days time.Duration
		want string
	}{{1, pushed}, {29, pushed}, {31, "pushed 0"}} {
		r.clock.Store(int64(c.days * 24 * time.Hour))
		r.store.expireAndCompact(t.Context(), false)
		if got := pushTimes(r, "match[]={_id=%22pushed%22}"); !slices.Equal(got, []string{c.want}) || r.samples("pushed") != 0 {
			t.Errorf("%d days after the last push the push time is %q, want %q; %d samples are held", c.days, got, c.want, r.samples("pushed"))
		}
	}
}

// In a ring, only the owner of a site that never pushed shows the push time 0, and only when it is
// ready. When the site has pushed, no server shows 0.
func TestFederateNeverPushedOwner(t *testing.T) {
	r := newPushedToOther(t)
	check := func(when string, a, b []string) {
		t.Helper()
		for s, want := range map[*ringServer][]string{r.a: a, r.b: b} {
			if got := pushTimes(s.srvRig, ""); !slices.Equal(got, want) {
				t.Errorf("%s, %s shows the push times %q, want %q", when, s.server.cfg.Name, got, want)
			}
		}
	}
	for _, s := range []*ringServer{r.a, r.b} {
		s.server.SetIssuedTokens(issuedFor(r.id))
	}
	check("before the first push", nil, []string{r.id + " 0"})
	r.b.server.SetReady(false)
	check("while the owner is not ready", nil, nil)
	r.b.server.SetReady(true)
	r.a.accepted(r.push("up 1\n"))
	check("after the first push", nil, []string{fmt.Sprint(r.id, " ", testNow.Unix())})
}

// failingWriter is the ResponseWriter of an answer whose connection has failed. Each Write returns
// an error.
type failingWriter struct{ http.ResponseWriter }

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// If the connection fails while the server writes the answer to a scrape, the server counts the
// answer as cut off. The consumer's session then does not record the answer as written in time.
func TestFederateCut(t *testing.T) {
	r := newConsumerRig(t)
	r.pushUps(1)
	r.server.federate.ServeHTTP(failingWriter{httptest.NewRecorder()}, httptest.NewRequest("GET", "/federate", nil))
	if n := r.server.federate.endedEarly.Value(); n != 1 {
		t.Errorf("%v answers are counted as cut off, want 1", n)
	}
	for query, answer := range map[string]http.ResponseWriter{"cut": failingWriter{httptest.NewRecorder()}, "whole": httptest.NewRecorder()} {
		r.server.federate.ServeHTTP(answer, httptest.NewRequest("GET", "/federate?consumer="+query, nil))
		for _, c := range r.store.Consumers.byKey {
			if c.name == query && c.sessions[0].writtenInTime != (query == "whole") {
				t.Errorf("the answer to consumer %s counts as written in time: %t", query, c.sessions[0].writtenInTime)
			}
		}
	}
}

// A scrape has the timeout in the header X-Prometheus-Scrape-Timeout-Seconds, but at most a minute.
// If the header has no positive number, the timeout is 30 s.
func TestScrapeTime(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"": 30 * time.Second, "x": 30 * time.Second, "10": 10 * time.Second, "0.5": time.Second / 2, "1e1": 10 * time.Second, "60": time.Minute,
		"61": time.Minute, "3600": time.Minute, "1e300": time.Minute, "Inf": time.Minute, "+Inf": time.Minute, "infinity": time.Minute, "1e-300": 0,
		"NaN": 30 * time.Second, "nan": 30 * time.Second, "-Inf": 30 * time.Second, "-1": 30 * time.Second, "0": 30 * time.Second, "-0": 30 * time.Second,
		"1e999": 30 * time.Second, "10 ": 30 * time.Second,
	} {
		if got := scrapeTime(http.Header{"X-Prometheus-Scrape-Timeout-Seconds": {text}}); got != want {
			t.Errorf("timeout of %q: %v, want %v", text, got, want)
		}
	}
}

// A server that belongs to a ring and is not ready serves no samples of sites to scrapes without a
// consumer's name, because it does not know yet which sites it owns. It still serves unread samples
// to consumers. A server without a ring serves the newest samples even if it is not ready.
func TestShownOnceReady(t *testing.T) {
	ring := newRingServers(t, 2)
	for name, c := range map[string]struct {
		rig   *srvRig
		id    string
		shown bool // whether the newest sample is shown while the server is not ready
	}{
		"member":       {ring[1].srvRig, ownedBy(t, ring[0].node.Forwarder, "b"), false},
		"without ring": {newSrvRig(t), "site-a", true},
	} {
		c.rig.accepted(c.rig.push(c.id, "up 1\n"))
		for _, ready := range []bool{true, false, true} {
			c.rig.server.SetReady(ready)
			want := ready || c.shown
			if shown := strings.Contains(c.rig.held(c.id, ""), "up{"); shown != want {
				t.Errorf("%s, ready %t: the newest sample is shown: %t, want %t", name, ready, shown, want)
			}
			if !strings.Contains(c.rig.federate(fmt.Sprint("consumer=", ready), ""), "up{") {
				t.Errorf("%s, ready %t: the unread sample is not served", name, ready)
			}
		}
	}
}

// pushedToOther is a ring of the servers a and b, and a site with the cluster ID id that b owns.
// The site's client pushes to a, not to the owner b.
type pushedToOther struct {
	t    *testing.T
	a, b *ringServer
	id   string
}

func newPushedToOther(t *testing.T) *pushedToOther {
	ring := newRingServers(t, 2)
	return &pushedToOther{t, ring[0], ring[1], ownedBy(t, ring[0].node.Forwarder, "b")}
}

// push sends text to a as a push of the site. The push reports a clock offset of -1.5 s, and its
// client token expires in 1,000 s.
func (r *pushedToOther) push(text string) srvAnswer {
	r.t.Helper()
	token := r.a.token(KindClient, r.id, func(tok *Token) { tok.Expires = testNow.Unix() + 1000 })
	return r.a.upload(token, []byte(text), ClockOffsetHeader, "-1500")
}

// pushKept sets both servers' clocks to 10 s after testNow and makes b unreachable. It then pushes
// text to a, which has to store the push itself.
func (r *pushedToOther) pushKept(text string) {
	r.t.Helper()
	r.a.clock.Store(int64(10 * time.Second))
	r.b.clock.Store(int64(10 * time.Second))
	r.b.node.down.Store(true)
	r.a.accepted(r.push(text))
}

// checkShown checks that the server s shows exactly the lines in want. Lines in want leave out the
// labels _id, instance and job.
func (r *pushedToOther) checkShown(s *ringServer, want ...string) {
	r.t.Helper()
	s.parsed("")
	var got []string
	for line := range strings.Lines(s.federate("", "")) {
		if line[0] != '#' {
			got = append(got, strings.TrimSpace(strings.Replace(line, `_id="`+r.id+`",instance="",job=""`, "", 1)))
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		r.t.Errorf("%s shows:\n%s\nwant:\n%s", s.server.cfg.Name, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// Each server shows only its own observations of a site, with its own name in the label server. The
// server that the client pushed to shows the token expiry, the clock offset and the time of the
// last failure. The server that stores a push shows the push time and the numbers of samples and
// series. Only the owner of the site shows the newest samples.
func TestFederateOfEachServer(t *testing.T) {
	r := newPushedToOther(t)
	r.a.accepted(r.push("up 1\n"))
	if got := r.push("up{ 1\n"); got.status != 400 {
		t.Fatalf("a malformed push was answered %v", got)
	}
	now := testNow.Unix()
	received := []string{
		fmt.Sprintf(`telemeter_cluster_token_expiry_seconds{,server="a"} %d`, now+1000),
		`telemeter_cluster_clock_offset_seconds{,server="a"} -1.5`,
		fmt.Sprintf(`push_failure_time_seconds{,server="a"} %d`, now),
	}
	r.checkShown(r.a, received...)
	stored := []string{
		fmt.Sprintf(`push_time_seconds{,server="b"} %d`, now), `telemeter_cluster_samples{,server="b"} 1`, `telemeter_cluster_series{,server="b"} 1`,
		fmt.Sprintf("up{} 1 %d", testNow.UnixMilli()),
	}
	r.checkShown(r.b, stored...)

	r.pushKept("up 2\n")
	r.checkShown(r.a, append(received, fmt.Sprintf(`push_time_seconds{,server="a"} %d`, now+10),
		`telemeter_cluster_samples{,server="a"} 1`, `telemeter_cluster_series{,server="a"} 1`)...)
	r.checkShown(r.b, stored...)
}

// Every server serves a consumer the unread samples that this server holds, and shows how many
// samples the consumer has not read. When the consumer has read them, only the owner of the site
// still serves the newest sample.
func TestFederateUnreadOfEachServer(t *testing.T) {
	r := newPushedToOther(t)
	r.a.accepted(r.push("up 1\n"))
	r.pushKept("up 2\n")
	for _, c := range []struct {
		*ringServer
		unread, newest string
	}{{r.a, "2 ", ""}, {r.b, "1 ", "1 "}} {
		name := c.server.cfg.Name
		conn := &AnswerReadTracker{}
		checkBacklog := func(want int) {
			t.Helper()
			line := fmt.Sprintf(`telemeter_cluster_backlog_samples{_id="%s",address="192.0.2.1",consumer="x",instance="",job="",server="%s"} %d`, r.id, name, want)
			if got := c.federate("", ""); !strings.Contains(got, line+"\n") {
				t.Errorf("%s does not show %s:\n%s", name, line, got)
			}
		}
		if got := upsOf(c.scrapeOn(conn, "consumer=x")); got != c.unread {
			t.Errorf("%s serves %q at first, want %q", name, got, c.unread)
		}
		checkBacklog(1)
		if got := upsOf(c.scrapeOn(conn, "consumer=x")); got != c.newest {
			t.Errorf("%s serves %q after the unread samples, want %q", name, got, c.newest)
		}
		checkBacklog(0)
	}
}

// discardResponse is a ResponseWriter that only counts the bytes of the body.
type discardResponse struct {
	header http.Header
	n      int
}

func (w *discardResponse) Header() http.Header         { return w.header }
func (w *discardResponse) WriteHeader(int)             {}
func (w *discardResponse) Write(p []byte) (int, error) { w.n += len(p); return len(p), nil }

// BenchmarkFederate measures a scrape of 100 sites with 230 series each. It reports the samples
// served for each second of CPU time.
func BenchmarkFederate(b *testing.B) {
	r := benchRig(b)
	body := benchBody(b, false, testNow.UnixMilli())
	for i := range 100 {
		a := r.upload(r.token(KindUpload, fmt.Sprintf("site-%d", i)), body)
		if got := r.accepted(a); got.Accepted != 230 {
			b.Fatalf("push %d was answered %v", i, a)
		}
	}
	handler := r.server.InternalHandler(false)
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
					b.Fatalf("the answer has only %d bytes", w.n)
				}
				n++
			}
			b.ReportMetric(float64(n)*23_000/(processCPU(b).Seconds()-before), "samples/cpu-s")
		})
	}
}
