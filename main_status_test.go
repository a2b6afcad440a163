package main

// Tests of the mode status: what it prints of a server and of a client, its exit statuses, and what
// it does with the answers of processes that are no telemeter.

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
)

// startStatus starts a server that answers /api/status with status and body, and any other path with
// 404. It returns the URL of the server.
func startStatus(t *testing.T, status int, body string) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/status" {
			http.NotFound(w, r)
			return
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}))
	t.Cleanup(server.Close)
	return server.URL
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// checkRun runs telemeter with args. It reports another exit status than want, and texts that are
// missing in the output. It returns the standard output.
func checkRun(t *testing.T, args []string, want int, inStdout, inStderr []string) string {
	t.Helper()
	status, stdout, stderr := runMode(t, args...)
	if status != want {
		t.Errorf("%q: exit status %d, want %d", args, status, want)
	}
	for _, text := range inStdout {
		if !strings.Contains(stdout, text) {
			t.Errorf("%q: stdout has no %q:\n%s", args, text, stdout)
		}
	}
	for _, text := range inStderr {
		if !strings.Contains(stderr, text) {
			t.Errorf("%q: stderr has no %q:\n%s", args, text, stderr)
		}
	}
	if (want == exitOK) != (stderr == "") {
		t.Errorf("%q: exit status %d with stderr %q", args, status, stderr)
	}
	return stdout
}

// The mode status shows a real server and its sites, and needs the server's federate token.
func TestStatusOfServer(t *testing.T) {
	s := newModeServer(t)
	s.start()
	if status, answer := s.push(s.token, "up 1\n"); status != 200 {
		t.Fatalf("the push got %d %s", status, answer)
	}
	from := []string{"--mode", "status", "--from", "http://" + s.internal}
	checkRun(t, from, exitFailure, nil, []string{"401", "--federate-token-file"})
	from = append(from, "--federate-token-file", s.path("federate-token"))

	checkRun(t, from, exitFailure, []string{
		"\nSites\n", "CLUSTER ID", "site-7", "needs attention: 1 of 1 sites need attention: site-7", "\nLast hour\n", "Pushes per minute", "\nLimits\n",
	}, []string{"telemeter: server ", " needs attention: "}) // the token of site-7 expires in an hour
	checkRun(t, append(from, "--site", "site-7"), exitFailure, []string{"\nSite site-7\n", "METRIC NAME", "up "}, []string{"site site-7 needs attention: its token expires in "})
	checkRun(t, append(from, "--site", "site-8"), exitFailure, nil, []string{"404", "knows no site"})
}

// The mode status shows a real client. A client has no other sites.
func TestStatusOfClient(t *testing.T) {
	dir := t.TempDir()
	writeIn(t, dir, "token", signToken(t, testKeys(t, 1), Token{Kind: KindClient, ClusterID: "site-7", ID: NewTokenID()}))
	log := startMode(t, "--mode", "client", "--from", startTextSource(t), "--token-file", dir+"/token", "--to", startPlainHub(t), "--interval", "1s",
		"--spool-dir", dir+"/spool", "--listen", "127.0.0.1:0")
	eventually(t, "the client pushes", func() bool { return strings.Contains(log.String(), "msg=pushed") })
	address := regexp.MustCompile(`msg=listening address=(\S+)`).FindStringSubmatch(log.String())
	if address == nil {
		t.Fatal("the client does not listen")
	}
	from := []string{"--mode", "status", "--from", "http://" + address[1] + "/"}
	checkRun(t, from, exitOK, []string{"client site-7, version ", "nothing needs attention\n", "\nSource\n", "\nDestination\n", "\nSpool\n"}, nil)
	checkRun(t, append(from, "--site", "site-7"), exitFailure, nil, []string{"is a client, which knows only its own site"})
}

// healthyServer returns the status of a server with three sites. The site c is revoked.
func healthyServer() *ServerStatus {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	push := now.Add(-time.Minute)
	st := &ServerStatus{ProcessStatus: ProcessStatus{Kind: KindServerStatus, Name: "s1", Version: "1", Now: now, Started: now.Add(-time.Hour)}}
	st.Sites = SitesStatus{Total: 3, Matched: 3, Page: 1, Pages: 1, Sites: []SiteStatus{
		{ID: "a", Owner: "s1", Series: 1500, LastPush: &push}, {ID: "b", Owner: "s1", LastPush: &push}, {ID: "c", Revoked: true},
	}}
	st.History = HistoryStatus{End: now, StepSeconds: 60, Pushes: []int{0, 0, 1, 2, 4, 8}}
	return st
}

// The exit status is 1 if something needs attention, and stderr says what. With --site, only the site
// counts. --json prints the answer as it is.
func TestStatusExit(t *testing.T) {
	healthy := mustJSON(t, healthyServer())
	changed := func(change func(*ServerStatus)) string {
		st := healthyServer()
		change(st)
		return mustJSON(t, st)
	}
	for _, tt := range []struct {
		name, answer string
		args         []string
		want         int
		stdout       []string
		stderr       string
	}{
		{"healthy", healthy, nil, exitOK, []string{
			"server s1, version 1, up for 1h, ready\nnothing needs attention\n", "1,500", "revoked", "Pushes per minute       ▂█  now 8, highest 8",
		}, ""},
		{"one problem", changed(func(st *ServerStatus) { st.Problems = []string{"the disk is full"} }), nil, exitFailure, []string{"needs attention: the disk is full\n"},
			"telemeter: server s1 needs attention: the disk is full\n"},
		{"two problems", changed(func(st *ServerStatus) { st.Problems = []string{"one", "two"}; st.NotReady = "it starts" }), nil, exitFailure,
			[]string{"not ready", "needs attention: one\nneeds attention: two\n"}, "telemeter: server s1 needs attention: 2 problems\n"},
		{"good site", changed(func(st *ServerStatus) {
			st.Problems = []string{"other"}
			st.Site = &SiteDetail{SiteStatus: st.Sites.Sites[0]}
		}), []string{"--site", "a"}, exitOK,
			[]string{"\nSite a\n", "  State "}, ""},
		{"bad site", changed(func(st *ServerStatus) { st.Site = &SiteDetail{SiteStatus: SiteStatus{ID: "a", Problem: "no push yet"}} }), []string{"--site", "a"}, exitFailure,
			[]string{"\nSite a\n", "no push yet"}, "telemeter: site a needs attention: no push yet\n"},
		{"many sites", changed(func(st *ServerStatus) {
			st.Sites.Sites = slices.Repeat(st.Sites.Sites, 10)
			st.Sites.Matched = 5000
		}), nil, exitOK, []string{"\n  and 4,985 more\n"}, ""},
		{"infinite rates", changed(func(st *ServerStatus) { st.History.StepSeconds = 0 }), nil, exitOK, []string{"now 0, highest 0"}, ""},
		{"unknown kind", `{"kind":"toaster"}`, nil, exitFailure, nil, `unknown kind "toaster"`},
		{"no kind", `{}`, nil, exitFailure, nil, `unknown kind ""`},
		{"a list", `[]`, nil, exitFailure, nil, "reading the status"},
		{"HTML", "<!DOCTYPE html>\n", nil, exitFailure, nil, "reading the status"},
		{"cut", healthy[:40], nil, exitFailure, nil, "reading the status"},
		{"wrong type", `{"kind":"server","sites":7}`, nil, exitFailure, nil, "reading the status"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			args := append([]string{"--mode", "status", "--from", startStatus(t, 200, tt.answer)}, tt.args...)
			checkRun(t, args, tt.want, tt.stdout, []string{tt.stderr})
			if tt.stdout != nil {
				if got := checkRun(t, append(args, "--json"), tt.want, nil, []string{tt.stderr}); got != tt.answer {
					t.Errorf("--json printed\n%s\nwant\n%s", got, tt.answer)
				}
			}
		})
	}
}

// If the process at --from is no telemeter, or does not answer, stderr says what to do.
func TestStatusOfOthers(t *testing.T) {
	large := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		block := []byte(strings.Repeat(" ", 1<<20))
		for range 100 {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}))
	defer large.Close()
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	refused := "http://" + refusingAddr(t)
	for _, tt := range []struct {
		name string
		args []string
		want int
		text string
	}{
		{"not found", []string{"--from", startStatus(t, 404, "no such page")}, exitFailure, "it is no listener of this version of telemeter that has a status"},
		{"wrong path", []string{"--from", startStatus(t, 200, "{}") + "/metrics"}, exitFailure, "it is no listener of this version"},
		{"failure", []string{"--from", startStatus(t, 500, "<b>oops</b>\n\n more")}, exitFailure, "answered 500 Internal Server Error: <b>oops</b> more\n"},
		{"long failure", []string{"--from", startStatus(t, 500, strings.Repeat("ü", 5000))}, exitFailure, "500 Internal Server Error: " + strings.Repeat("ü", maxStatusText-1) + "…\n"},
		{"redirect", []string{"--from", startStatus(t, 302, "")}, exitFailure, "answered 302 Found"},
		{"large", []string{"--from", large.URL}, exitFailure, "with more than 64 MiB, so it is no status of telemeter"},
		{"plain HTTP", []string{"--from", strings.Replace(large.URL, "http:", "https:", 1)}, exitFailure, "the listener uses plain HTTP: write http:// in --from\n"},
		{"TLS", []string{"--from", strings.Replace(secure.URL, "https:", "http:", 1)}, exitFailure, "the listener uses TLS: write https:// in --from\n"},
		{"unknown CA", []string{"--from", secure.URL}, exitFailure, "name the file with the server's tls.crt with --from-ca-file\n"},
		{"refused", []string{"--from", refused}, exitFailure, "connection refused: name the internal listener of a running server, or the listener of a running client, with --from"},
		{"token file", []string{"--from", refused, "--federate-token-file", t.TempDir() + "/none"}, exitFailure, "--federate-token-file"},
		{"CA file", []string{"--from", refused, "--from-ca-file", "go.mod"}, exitFailure, "--from-ca-file"},
		{"scheme", []string{"--from", "ftp://localhost"}, exitUsage, "--from"},
		{"password", []string{"--from", "http://a:secret@localhost"}, exitUsage, "credentials"},
		{"site", []string{"--from", refused, "--site", "a b"}, exitUsage, "--site"},
		{"argument", []string{"--from", refused, "more"}, exitUsage, "more"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if stdout := checkRun(t, append([]string{"--mode", "status"}, tt.args...), tt.want, nil, []string{tt.text}); stdout != "" {
				t.Errorf("stdout is %q", stdout)
			}
		})
	}
}

// checkPrintable reports a character in text that could control a terminal.
func checkPrintable(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if i := strings.IndexFunc(strings.TrimSuffix(line, "\n"), func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
			t.Errorf("the output has the character %+q in the line %q", line[i:i+1], line)
			return
		}
	}
}

// The mode status prints no character that controls a terminal, even if the answer is full of them.
func TestStatusIsPrintable(t *testing.T) {
	const hostile = "\x1b[31m\a\b\r\n\t\v\x7f\u009b\u202e\u2066\u2028\ufeff "
	server, client := &ServerStatus{}, &ClientStatus{}
	fillFields(server, hostile)
	fillFields(client, hostile)
	server.Kind, client.Kind = KindServerStatus, KindClientStatus
	withoutSite := *server
	withoutSite.Site = nil
	for name, from := range map[string]string{
		"server": startStatus(t, 200, mustJSON(t, withoutSite)), "site": startStatus(t, 200, mustJSON(t, server)), "client": startStatus(t, 200, mustJSON(t, client)),
		"kind": startStatus(t, 200, mustJSON(t, ProcessStatus{Kind: hostile})), "error": startStatus(t, 500, hostile), "no JSON": startStatus(t, 200, hostile),
		"JSON": startStatus(t, 200, `{"kind":"server","now":"`+"\u009b\u202e"+`"}`),
	} {
		_, stdout, stderr := runMode(t, "--mode", "status", "--from", from)
		checkPrintable(t, stdout)
		checkPrintable(t, stderr)
		if n := strings.Count(stdout, "[31m"); (name == "server" || name == "client") && n < 10 {
			t.Errorf("%s: only %d of the filled texts are printed:\n%s", name, n, stdout)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go serveConns(listener, func(c net.Conn) {
		defer c.Close()
		c.Read(make([]byte, 4096))
		fmt.Fprint(c, "HTTP/1.1 404 \x1b[31mred\a\r\nContent-Length: 0\r\n\r\n")
	})
	_, _, stderr := runMode(t, "--mode", "status", "--from", "http://"+listener.Addr().String())
	if checkPrintable(t, stderr); !strings.Contains(stderr, "red") {
		t.Errorf("stderr does not have the status of the answer: %q", stderr)
	}
}

// On a terminal, what needs attention is red. Apart from the colors, the text is the same.
func TestStatusColors(t *testing.T) {
	st := healthyServer()
	st.Problems, st.NotReady, st.Sites.Sites[1].Problem = []string{"a disk is full"}, "it starts", "no push for 11m"
	text := func(inColor bool) string {
		p := &statusPrinter{inColor: inColor}
		p.view(ServerView(st, StatusQuery{Sort: SiteOrders()[0], Page: 1}))
		return p.text.String()
	}
	plain, colored := text(false), text(true)
	checkPrintable(t, plain)
	if got := strings.NewReplacer(colorRed, "", colorGreen, "", colorBold, "", colorOff, "").Replace(colored); got != plain {
		t.Errorf("without colors, the text is\n%s\nwant\n%s", got, plain)
	}
	for _, want := range []string{
		"server " + colorBold + "s1" + colorOff, colorRed + "not ready" + colorOff + "\n", colorRed + "needs attention: a disk is full" + colorOff + "\n", "\n" + colorBold + "Sites" + colorOff + "\n",
	} {
		if !strings.Contains(colored, want) {
			t.Errorf("the colored text has no %q:\n%q", want, colored)
		}
	}
	for site, isRed := range map[string]bool{"a": false, "b": true, "c": false} {
		if got := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(colorRed) + `  ` + site + ` .*` + regexp.QuoteMeta(colorOff) + `$`).MatchString(colored); got != isRed {
			t.Errorf("the row of site %s is red: %t, want %t:\n%q", site, got, isRed, colored)
		}
	}
}

func TestSparkline(t *testing.T) {
	for _, tt := range []struct {
		heights []float64
		want    string
	}{
		{nil, ""}, {[]float64{0, 0}, " "}, {[]float64{0, 1}, "█"}, {[]float64{1e-9, 0, 0.5, 0.25, 0.99, 0}, "▁▄█"}, {[]float64{0.125, 0, 0.126}, "▁▂"},
	} {
		if got := sparkline(tt.heights); got != tt.want {
			t.Errorf("sparkline(%v) = %q, want %q", tt.heights, got, tt.want)
		}
	}
}
