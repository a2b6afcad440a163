package main

// TestSilentMistakes makes mistakes that once went unnoticed, and checks that each shows itself: in
// a log or an answer, in a metric, and in an alert. Its table is the list of these mistakes.
// Servers and clients run in the test process. Other tests, with clocks of their own, check how
// often a message is repeated: gossip_join_test.go for a --join that fails, which is every minute,
// and TestFailureLog for a client, which is every ten minutes. TestPusherLogsProgress checks that
// the drain of a long backlog logs done, left, rate and time to go.

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"
)

// A silentRow is one place where a mistake shows itself. text and metric are regular expressions.
type silentRow struct {
	where   string // the output that has text: the log of the server, the client or the other server, or an HTTP answer
	text    string
	once    bool   // text is in the output exactly once, also after the metric has counted more events
	metric  string // a line of /metrics or /federate, as metricsOf says; "" if no metric shows the mistake
	alert   string // name of the alert that covers the mistake, or ""
	follows string // a metric that the mistake changes too, if the alert is about that metric instead; not measured here
}

// metricsOf returns which process shows the metric of a row.
func (r silentRow) metricsOf() string {
	if r.where == "client" || r.where == "other server" {
		return r.where
	}
	return "server"
}

// silentStage is where one mistake is made. Its maps have functions that read the present outputs
// and metrics.
type silentStage struct {
	*testing.T
	outputs, metrics map[string]func() string
	status           int // exit status of the command; stillRuns if the process goes on
}

const stillRuns = -1

// server starts a server with args. Its metrics are those of /metrics and of /federate.
func (g *silentStage) server(args ...string) *modeServer {
	g.Helper()
	s := newModeServer(g.T)
	s.args = args
	s.start()
	g.showServer(s)
	return s
}

func (g *silentStage) showServer(s *modeServer) {
	page := func(path string) string {
		_, text := s.mustRequest(http.DefaultClient, "GET", "http://"+s.internal+path, "first", "")
		return text
	}
	g.outputs["server"] = s.log.String
	g.outputs["/federate"] = func() string { return page("/federate") }
	g.metrics["server"] = func() string { return page("/metrics") + page("/federate") }
}

// client starts a client that scrapes from, and pushes to s with the given token.
func (g *silentStage) client(s *modeServer, token, from string, args ...string) {
	g.Helper()
	writeIn(g.T, s.dir, "token", token)
	log := startMode(g.T, append([]string{"--mode", "client", "--from", from, "--token-file", s.path("token"), "--to", "https://" + s.external,
		"--spool-dir", s.path("spool"), "--interval", "1s", "--listen", "127.0.0.1:0"}, args...)...)
	g.outputs["client"] = log.String
	g.metrics["client"] = func() string { return get(g.T, "http://"+awaitLog(g.T, log, `msg=listening address=(\S+)`)+"/metrics") }
}

// member starts a member of a ring, and shows it under the name where.
func (g *silentStage) member(where, dir, name string, args ...string) (ringAddr string) {
	g.Helper()
	log, internal, ringAddr := runMember(g.T, dir, name, args...)
	g.outputs[where] = log.String
	g.outputs["/debug/ring of the "+where] = func() string { return get(g.T, internal+"/debug/ring") }
	g.metrics[where] = func() string { return get(g.T, internal+"/metrics") }
	return ringAddr
}

// command runs telemeter until it ends. Its output is shown under the name where.
func (g *silentStage) command(where string, args ...string) {
	g.Helper()
	status, _, stderr := runMode(g.T, args...)
	g.status = status
	g.outputs[where] = func() string { return stderr }
}

// answer requests path of the internal listener of s. The answer, with its status, is an output.
func (g *silentStage) answer(s *modeServer, path string) {
	g.Helper()
	status, text := s.mustRequest(http.DefaultClient, "GET", "http://"+s.internal+path, "first", "")
	g.outputs[path] = func() string { return fmt.Sprint(status, " ", text) }
}

// source starts a source, and returns the URL of its samples.
func (g *silentStage) source(handler http.HandlerFunc) string {
	source := httptest.NewServer(handler)
	g.Cleanup(source.Close)
	return source.URL + "/metrics"
}

func (g *silentStage) textSource(text string) string {
	return g.source(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) })
}

// denied starts a server and a client that pushes with a token that the server refuses. refuse
// returns the token and the client's further arguments. Two more requests with the token precede.
func denied(refuse func(s *modeServer) (token string, args []string), query string) func(*silentStage) {
	return func(g *silentStage) {
		s := newModeServer(g.T)
		token, args := refuse(s)
		s.start()
		g.showServer(s)
		for range 2 {
			s.mustRequest(s.client, "POST", "https://"+s.external+"/upload"+query, token, "up 1\n")
		}
		g.client(s, token, g.textSource("up 1\n"), args...)
	}
}

// relativeTo returns dir as a path that is relative to the working directory of the test.
func relativeTo(t *testing.T, dir string) string {
	t.Helper()
	here, err := filepath.Abs(".")
	if err == nil {
		dir, err = filepath.Rel(here, dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// alertExpressions returns the expressions of the alerts in testdata/alerts.yml, by alert.
func alertExpressions(t *testing.T) map[string]string {
	t.Helper()
	exprs := map[string]string{}
	for _, m := range regexp.MustCompile(`(?s)- alert: (\w+)\n\s+expr: (.*?)\n\s+(?:for|labels):`).FindAllStringSubmatch(readIn(t, "testdata", "alerts.yml"), -1) {
		exprs[m[1]] = m[2]
	}
	return exprs
}

// silentMistakes is the table of TestSilentMistakes. All rows of a mistake are checked at once,
// after the function has made the mistake.
var silentMistakes = []struct {
	mistake string
	status  int
	make    func(*silentStage)
	rows    []silentRow
}{
	{"a server alone, asked for /sd by another name, with the recommended flags", stillRuns, func(g *silentStage) {
		s := g.server("--listen-internal", "0.0.0.0:0")
		_, port, _ := strings.Cut(s.internal, "]:")
		req, err := http.NewRequest("GET", "https://127.0.0.1:"+port+"/sd", nil)
		if err != nil {
			g.Fatal(err)
		}
		req.Host = "hub.example:9004"
		req.Header.Set("Authorization", "Bearer first")
		resp, err := s.client.Do(req)
		if err != nil {
			g.Fatal(err)
		}
		defer resp.Body.Close()
		var text strings.Builder
		if err := resp.Write(&text); err != nil {
			g.Fatal(err)
		}
		g.outputs["/sd"] = text.String
	}, []silentRow{
		{where: "/sd", text: `\[{"targets":\["hub\.example:9004"\],"labels":{"__scheme__":"https"}}\]`, alert: "TelemeterNotScraped", follows: "up"},
	}},

	{"--join names a host that is not there", stillRuns, func(g *silentStage) {
		dir := g.TempDir()
		keygenIn(g.T, dir)
		g.member("server", dir, "a", "--join", freeAddr(g.T))
	}, []silentRow{
		{where: "server", text: `level=WARN msg="` + regexp.QuoteMeta(EventJoinFails) + `" join=\S+ problem="no answer from \S+: is the server running with --listen-cluster, is its UDP port open in both directions, .*"`, once: true,
			metric: `telemeter_ring_join_unreached 1`, alert: "TelemeterJoinFails"},
	}},
	{"--join with another cluster.key", stillRuns, func(g *silentStage) {
		dir, other := g.TempDir(), g.TempDir()
		keygenIn(g.T, dir)
		keygenIn(g.T, other)
		g.member("server", dir, "a", "--join", g.member("other server", other, "b"))
	}, []silentRow{
		{where: "server", text: `level=WARN msg="` + regexp.QuoteMeta(EventJoinFails) + `" join=\S+ problem=".*do both servers have the same cluster\.key\?"`,
			metric: `telemeter_ring_join_unreached 1`, alert: "TelemeterJoinFails"},
		{where: "other server", text: `level=WARN msg="` + regexp.QuoteMeta(EventOtherKey) + `" address=127\S+ count=\d+`, once: true,
			metric: `telemeter_gossip_refused_packets_total{reason="key"} ([2-9]|\d\d+)`, alert: "TelemeterJoinFails", follows: "telemeter_ring_join_unreached"},
		{where: "/debug/ring of the server", text: `"join":\[{"address":"\S+","reached":false,"problem":"no answer from [^"]*"}\].*"members":\[{"name":"a"[^{}]*}\]`},
		{where: "/debug/ring of the other server", text: `"members":\[{"name":"b"[^{}]*}\]`},
	}},

	{"flags of the client match nothing", stillRuns, func(g *silentStage) {
		s := g.server()
		writeIn(g.T, s.dir, "salt", cleanerSalt)
		g.client(s, s.token, g.textSource("up{instance=\"i\"} 1\n"), "--match", "up", "--match", "upp", "--rename", "uup=x", "--anonymize-labels", "instnce", "--anonymize-salt-file", s.path("salt"))
	}, []silentRow{
		{where: "client", text: `level=WARN msg="no series has the label instnce: --anonymize-labels instnce hashes nothing" advice="did you mean instance\? .*"`, once: true, metric: `telemeter_source_unmatched_flags{flag="anonymize-labels"} 1`, alert: "TelemeterFlagMatchesNothing"},
		{where: "client", text: `level=WARN msg="no series matches --match upp" advice=".*"`, once: true, metric: `telemeter_source_unmatched_flags{flag="match"} 1`, alert: "TelemeterFlagMatchesNothing"},
		{where: "client", text: `level=WARN msg="no series has the name uup: --rename uup=x renames nothing" advice="did you mean up\? .*"`, once: true, metric: `telemeter_source_unmatched_flags{flag="rename"} 1`, alert: "TelemeterFlagMatchesNothing"},
	}},
	{"the same, with --dry-run", exitOK, func(g *silentStage) {
		g.command("client", "--mode", "client", "--from", g.textSource("up 1\n"), "--dry-run", "--match", "up", "--match", "upp")
	}, []silentRow{
		{where: "client", text: `(?s)^dry run: nothing was pushed; of 1 scraped series, 1 would leave the site\n.*  size .*\n\S+ level=WARN msg="no series matches --match upp".*$`},
	}},
	{"flags of the server match nothing", stillRuns, func(g *silentStage) {
		s := g.server("--elide-label", "instnce", "--allow", "upp")
		for range 2 {
			s.push(s.token, "up 1\n")
		}
	}, []silentRow{
		{where: "server", text: `level=WARN msg="no pushed sample matches this rule: if it is not for a site that has yet to push, correct its spelling, or remove it" flag=--elide-label value=instnce`, once: true, metric: `telemeter_unmatched_flags{flag="elide-label"} 1`, alert: "TelemeterFlagMatchesNothing"},
		{where: "server", text: `level=WARN msg="no pushed sample matches this rule: if it is not for a site that has yet to push, correct its spelling, or remove it" flag="--allow or --allow-file" value=upp`, once: true, metric: `telemeter_unmatched_flags{flag="allow"} 1`, alert: "TelemeterFlagMatchesNothing"},
	}},

	{"a client with a relative --spool-dir is started elsewhere", stillRuns, func(g *silentStage) {
		s := g.server()
		writeIn(g.T, s.dir, "token", s.token)
		from := g.textSource("up 1\n")
		if status, _, stderr := runMode(g.T, "--mode", "client", "--from", from, "--token-file", s.path("token"), "--to", "https://"+s.external, "--once", "--spool-dir", s.path("first")); status != exitOK || strings.Contains(stderr, "WARN") {
			g.Errorf("the first start exits with %d and warns:\n%s", status, stderr)
		}
		g.client(s, s.token, from, "--spool-dir", relativeTo(g.T, s.path("second")))
	}, []silentRow{
		{where: "client", text: `level=INFO msg="spool opened" dir=/\S+/second `, once: true},
		{where: "client", text: `level=WARN msg="the spool is new, but this site pushed from another spool before: .*restart with --spool-dir and the old directory; if another client runs with this token, stop one of the two" dir=/\S+/second`, once: true},
	}},
	{"a server with a relative --storage-dir is started elsewhere", stillRuns, func(g *silentStage) {
		dir := g.TempDir()
		keygenIn(g.T, dir)
		ringAddr := g.member("other server", dir, "a")
		g.Run("first start", func(t *testing.T) {
			b, _, _ := runMember(t, dir, "b", "--join", ringAddr)
			awaitLog(t, b, `msg="ready: .* members=2`)
			if strings.Contains(b.String(), EventNewStorage) {
				t.Error("the first start of a server reports that the ring knows its name")
			}
		})
		eventually(g.T, "b has left", func() bool { return strings.Contains(g.outputs["other server"](), `msg="member has left" member=b`) })
		g.member("server", dir, "b", "--join", ringAddr, "--storage-dir", relativeTo(g.T, filepath.Join(dir, "elsewhere")))
	}, []silentRow{
		{where: "server", text: `level=INFO msg=serving .* storage=/\S+/elsewhere `, once: true},
		{where: "server", text: `level=WARN msg="` + regexp.QuoteMeta(EventNewStorage) + `" member=b .*storage_dir=/\S+/elsewhere`, once: true},
	}},

	{"the parameter consumer of a scrape is misspelled", stillRuns, func(g *silentStage) {
		s := g.server()
		g.answer(s, "/federate?cosumer=x")
		g.answer(s, "/federate?cosumer=x")
	}, []silentRow{
		{where: "/federate?cosumer=x", text: `^400 unknown parameter "cosumer": known are match\[\], consumer\n$`, metric: `telemeter_http_requests_total{handler="federate",code="400"} 2`, alert: "TelemeterServerDown", follows: "up"},
		{where: "server", text: `level=WARN msg="scrape refused: correct the scrape configuration" remote=127\S+ .*cosumer.*`, once: true, metric: `telemeter_http_requests_total{handler="federate",code="400"} 2`, alert: "TelemeterServerDown", follows: "up"},
	}},

	{"the token is revoked", stillRuns, denied(func(s *modeServer) (string, []string) {
		writeIn(s.t, s.dir, "revoked", tokenIDOf(s.t, s.token)+"\n")
		return s.token, nil
	}, ""), deniedRows("revoked", `remove its cluster ID from --revoked-file .*, and make a new token on the hub with telemeter --mode token`, `token refused: the file of --revoked-file lists it or its cluster ID; `)},
	{"the token has expired", stillRuns, denied(func(s *modeServer) (string, []string) { return s.newToken("site-7", "--ttl", "1ns"), nil }, ""),
		deniedRows("expired", `make a new token on the hub with telemeter --mode token`, `token refused: it has expired; create a new token`)},
	{"the token is for another ID", stillRuns, denied(func(s *modeServer) (string, []string) { return s.token, []string{"--id", "other"} }, "?id=other"),
		deniedRows("other_cluster", `this client pushes as cluster ID other, .*: correct --id, or make a new token`, `token refused: the request names another cluster ID than the token; leave out --id`)},
	{"the token has the pin of another hub", stillRuns, func(g *silentStage) {
		s := g.server()
		s.mustRun("--mode", "keygen", "--keys", s.path("other"), "--host", "127.0.0.1")
		writeIn(g.T, s.path("other"), TokenKeyFile, readIn(g.T, s.path("keys"), TokenKeyFile))
		s.request(&http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{}}}, "GET", "https://"+s.external+"/", "", "")
		g.client(s, s.mustRun("--mode", "token", "--keys", s.path("other"), "--id", "site-7", "--to", "https://127.0.0.1:1"), g.textSource("up 1\n"))
	}, []silentRow{
		{where: "client", text: `level=ERROR msg="destination failed.*the certificate of the hub does not match the token's pin: either someone intercepts the connection, or the hub has new keys; if it has, make a new token`, once: true,
			metric: `telemeter_destination_pushes_total{result="denied"} [1-9]`, alert: "TelemeterSiteSilent", follows: "push_time_seconds"},
		{where: "server", text: `level=WARN msg="TLS handshake failed: the client does not trust this server's certificate; create a new token.*"`, once: true,
			metric: `telemeter_tls_handshake_failures_total{cause="certificate_refused"} [2-9]`, alert: "TelemeterSiteSilent", follows: "push_time_seconds"},
	}},

	{"garbage as --token-file", exitUsage, func(g *silentStage) {
		dir := g.TempDir()
		writeIn(g.T, dir, "token", "Z2FyYmFnZQ\n")
		g.command("client", "--mode", "client", "--token-file", filepath.Join(dir, "token"))
	}, []silentRow{{where: "client", text: `--token-file \S+ contains no token of telemeter .*: make a token on the hub with telemeter --mode token --id SITE --to https://HUB:9003 > site\.token, and copy this file to the site`}}},
	{"an HTML page as --token-file", exitFailure, func(g *silentStage) {
		dir := g.TempDir()
		writeIn(g.T, dir, "token", "<html>login</html>\n")
		g.command("client", "--mode", "client", "--token-file", filepath.Join(dir, "token"))
	}, []silentRow{{where: "client", text: `--token-file \S+ is an HTML page, such as the error page of a download, not a token: make a token on the hub`}}},
	{"a token without --to is made", exitOK, func(g *silentStage) {
		g.command("token", "--mode", "token", "--keys", mustKeygen(g.T), "--id", "a")
	}, []silentRow{{where: "token", text: `no server in the token: the client that uses it needs --to URL; a script needs none\n`}}},
	{"a token without --to is used", exitUsage, func(g *silentStage) {
		dir := g.TempDir()
		token, _ := mustIssue(g.T, mustKeygen(g.T), "a")
		writeIn(g.T, dir, "token", token)
		g.command("client", "--mode", "client", "--token-file", filepath.Join(dir, "token"))
	}, []silentRow{{where: "client", text: `the token names no server: pass --to https://HUB:9003, or make a token with --to`}}},
	{"a token is made with keys without tls.crt", exitOK, func(g *silentStage) {
		g.command("token", "--mode", "token", "--keys", mustKeygen(g.T), "--id", "a", "--to", "https://hub.example:9003")
	}, []silentRow{{where: "token", text: `no pin: \S+keys/tls\.crt is missing: .*copy tls\.crt from a server to \S+keys and create the token again`}}},
	{"a server starts with keys without tls.crt", stillRuns, func(g *silentStage) {
		dir := g.TempDir()
		log := startMode(g.T, "--mode", "server", "--keys", mustKeygen(g.T), "--listen", "0.0.0.0:0", "--listen-internal", "127.0.0.1:0", "--storage-dir", filepath.Join(dir, "data"))
		g.outputs["server"] = log.String
	}, []silentRow{{where: "server", text: `level=WARN msg="clients connect over plain HTTP, because --keys has no tls\.crt: .*create a certificate with telemeter --mode keygen --host NAME"`, once: true}}},

	{"the clock of a site is ten minutes ahead", stillRuns, func(g *silentStage) {
		s := g.server()
		g.client(s, s.token, g.source(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Date", time.Now().Add(10*time.Minute).UTC().Format(http.TimeFormat))
			fmt.Fprintln(w, "up 1")
		}))
	}, []silentRow{
		{where: "client", text: `level=WARN msg="the source's clock is off; sample times are shifted to the servers' clocks" off="(10m0s|9m5\ds) ahead" advice="set the clock of the source's host, .*"`, once: true,
			metric: `telemeter_source_clock_offset_seconds -(600|59\d)`, alert: "TelemeterSiteClockOff", follows: "telemeter_cluster_clock_offset_seconds"},
		{where: "server", text: `level=INFO msg="first push of site" cluster_id=site-7`, once: true, metric: `telemeter_cluster_clock_offset_seconds{_id="site-7".*} -(600|59\d)`, alert: "TelemeterSiteClockOff"},
	}},
	{"a new site pushes, perhaps by mistake", stillRuns, func(g *silentStage) {
		s := g.server()
		for range 2 {
			s.push(s.token, "up 1\n")
		}
	}, []silentRow{{where: "server", text: `level=INFO msg="first push of site" cluster_id=site-7 remote=127\S+ samples=1 labels=map\[region:eu\]`, once: true, metric: `telemeter_pushes_total{result="accepted"} 2`}}},
	{"a token is damaged", stillRuns, func(g *silentStage) {
		s := g.server()
		for range 2 {
			s.push("garbage", "up 1\n")
		}
	}, []silentRow{{where: "server", text: `level=WARN msg="token refused: it is malformed; copy the whole token file to the client again" remote=127\S+`, once: true,
		metric: `telemeter_unauthorized_total{reason="malformed"} 2`, alert: "TelemeterSiteSilent", follows: "push_time_seconds"}}},
	{"a client uses http:// where the server has TLS", stillRuns, func(g *silentStage) {
		s := g.server()
		for range 2 {
			s.request(http.DefaultClient, "GET", "http://"+s.external+"/", "", "")
		}
	}, []silentRow{{where: "server", text: `level=WARN msg="TLS handshake failed: the client sends plain HTTP; use https:// in its URL" listener=external remote=127\S+`, once: true,
		metric: `telemeter_tls_handshake_failures_total{cause="plain_http"} 2`, alert: "TelemeterSiteSilent", follows: "push_time_seconds"}}},

	{"the source fails, and then fails otherwise", stillRuns, func(g *silentStage) {
		var scrapes atomic.Int32
		s := g.server()
		g.client(s, s.token, g.source(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(map[bool]int{true: 503, false: 404}[scrapes.Add(1) == 1])
		}))
	}, []silentRow{
		{where: "client", text: `level=ERROR msg="source failed" .*the source answered 503.*`, once: true, metric: `telemeter_source_scrapes_total{result="failed"} ([3-9]|\d\d)`, alert: "TelemeterSiteSilent", follows: "push_time_seconds"},
		{where: "client", text: `level=ERROR msg="source failed" .*the source answered 404.*`, once: true, metric: `telemeter_source_scrapes_total{result="failed"} ([3-9]|\d\d)`, alert: "TelemeterSiteSilent", follows: "push_time_seconds"},
	}},

	{"a site has more series than --limit-series", stillRuns, func(g *silentStage) {
		s := g.server("--limit-series", "2")
		g.client(s, s.token, g.textSource("a 1\nb 1\nc 1\n"))
		eventually(g.T, "the client has pushed twice", func() bool { return strings.Count(g.outputs["client"](), "msg=pushed") >= 2 })
		status, text := s.push(s.token, "a 1\nb 1\nd 1\n")
		g.outputs["/upload"] = func() string { return fmt.Sprint(status, " ", text) }
	}, []silentRow{
		{where: "/upload", text: `^200 {.*"dropped":{"series_limit":1}.*"hint":"the site has as many series as the server's --limit-series allows: .*`, metric: `telemeter_samples_dropped_total{reason="series_limit"} ([3-9]|\d\d)`, alert: "TelemeterSamplesDropped"},
		{where: "/federate", text: `(?s)a{_id="site-7".*\nb{_id="site-7"`, metric: `telemeter_samples_accepted_total ([4-9]|\d\d)`},
		{where: "server", text: `level=WARN msg="samples of new series were dropped, because the site has as many series as --limit-series allows" cluster_id=site-7 dropped=1 .*`, once: true, metric: `telemeter_samples_dropped_total{reason="series_limit"} ([3-9]|\d\d)`, alert: "TelemeterSamplesDropped"},
		{where: "client", text: `level=WARN msg="the server dropped samples" reason=series_limit samples=1 hint=".*raise --limit-series on every server"`, once: true, metric: `telemeter_samples_dropped_total{reason="by_server"} ([2-9]|\d\d)`, alert: "TelemeterSamplesDropped"},
		{where: "client", text: `msg=pushed samples=3 scrapes=1 pushes=1 `, metric: `telemeter_destination_pushes_total{result="failed"} 0`},
	}},

	{"--once, but no server runs", exitFailure, func(g *silentStage) {
		s := newModeServer(g.T)
		writeIn(g.T, s.dir, "token", s.token)
		begin := time.Now()
		g.command("client", "--mode", "client", "--from", g.textSource("up 1\n"), "--token-file", s.path("token"), "--to", "https://"+refusingAddr(g.T), "--spool-dir", s.path("spool"), "--once", "--interval", "2s")
		if took := time.Since(begin); took > 4*time.Second {
			g.Errorf("the client ended after %v, want at most 2s", took)
		}
	}, []silentRow{
		{where: "client", text: `level=INFO msg="no server has accepted the scrapes yet; trying again until the time is over" up_to=2s`, once: true},
		{where: "client", text: `level=WARN msg="destination failed; .*connection refused: check the address in --to or in the token, that something listens there, and that no firewall is in the way"`, once: true},
		{where: "client", text: `telemeter: destination: failed after .*\(scrapes kept in the spool: 1, in memory only: 0\)`, once: true},
	}},
	{"a token is issued, but its site never pushes", stillRuns, func(g *silentStage) { g.server() }, []silentRow{
		{where: "/federate", text: `push_time_seconds{_id="site-7".*} 0\n`, metric: `push_time_seconds{_id="site-7".*} 0`, alert: "TelemeterSiteSilent"},
	}},
}

// deniedRows returns the rows of a token that servers refuse. reason is the label reason of the
// server's counter. advice and warning are in the messages of the client and of the server.
func deniedRows(reason, advice, warning string) []silentRow {
	return []silentRow{
		{where: "client", text: `level=ERROR msg="destination failed.*` + advice + `.*`, once: true,
			metric: `telemeter_destination_pushes_total{result="denied"} [1-9]`, alert: "TelemeterSiteSilent", follows: "push_time_seconds"},
		{where: "server", text: `level=WARN msg="` + warning + `.*`, once: true,
			metric: `telemeter_unauthorized_total{reason="` + reason + `"} ([3-9]|\d\d)`, alert: "TelemeterSiteSilent", follows: "push_time_seconds"},
	}
}

// Each mistake shows itself where its rows say. A row that has an alert is covered by that alert of
// testdata/alerts.yml. go test -v prints the table with the texts and metrics as they were.
func TestSilentMistakes(t *testing.T) {
	alerts := alertExpressions(t)
	shown := make([][]string, len(silentMistakes))
	t.Run("mistakes", func(t *testing.T) {
		for i, m := range silentMistakes {
			t.Run(m.mistake, func(t *testing.T) {
				t.Parallel()
				g := &silentStage{T: t, outputs: map[string]func() string{}, metrics: map[string]func() string{}, status: stillRuns}
				m.make(g)
				if g.status != m.status {
					t.Errorf("exit status %d, want %d", g.status, m.status)
				}
				for _, row := range m.rows {
					shown[i] = append(shown[i], row.check(g, alerts))
				}
			})
		}
	})
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for i, m := range silentMistakes {
		if len(shown[i]) == 0 { // -run did not select it, or it failed
			continue
		}
		exit := fmt.Sprint("exit ", m.status)
		if m.status == stillRuns {
			exit = "goes on"
		}
		fmt.Fprintf(w, "\n%s (%s)\n", m.mistake, exit)
		for _, line := range shown[i] {
			fmt.Fprint(w, line)
		}
	}
	w.Flush()
	t.Log(table.String())
}

// check waits until the output and the metrics of g are as the row says, and checks the row's
// alert. It returns the row as lines of the printed table.
func (r silentRow) check(g *silentStage, alerts map[string]string) string {
	g.Helper()
	wait := func(output func() string, pattern string) (found []string) {
		g.Helper()
		re := regexp.MustCompile("(?m)" + strings.NewReplacer("{", `\{`, "}", `\}`).Replace(pattern))
		eventuallyWithin(g.T, 20*time.Second, 5*time.Millisecond, fmt.Sprintf("the row of %s has %s", r.where, pattern), func() bool { found = re.FindAllString(output(), -1); return len(found) > 0 })
		return found
	}
	metric := "none"
	if r.metric != "" {
		metric = wait(g.metrics[r.metricsOf()], "^"+r.metric)[0]
	}
	texts := wait(g.outputs[r.where], r.text)
	if r.once && len(texts) > 1 {
		g.Errorf("the %s says %d times, want once: %s", r.where, len(texts), texts[0])
	}
	alert := "none"
	if r.alert != "" {
		name := regexp.MustCompile(`^\w+`).FindString(r.metric)
		if r.follows != "" {
			name = r.follows
		}
		if name == "" || !regexp.MustCompile(`\b`+name+`\b`).MatchString(alerts[r.alert]) {
			g.Errorf("the expression of the alert %s does not name the metric %q: %q", r.alert, name, alerts[r.alert])
		}
		alert = r.alert
		if r.follows != "" {
			alert += " by " + r.follows
		}
	}
	return fmt.Sprintf("  %s\tmetric %s\talert %s\n    %s\n", r.where, metric, alert, strings.ReplaceAll(strings.TrimSpace(texts[0]), "\n", "\n    "))
}
