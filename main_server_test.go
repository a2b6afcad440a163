package main

// Tests of the mode server, which run the server in the test process: conflicts on its command
// line, failures to start, --help, and which files a reload reads anew.

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// runMode runs telemeter with args in the test process, and returns its exit status and output. The
// test fails if telemeter is still running after 20 s.
func runMode(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var out, errs logBuffer
	status = run(ctx, time.Now, args, &out, &errs)
	if ctx.Err() != nil {
		t.Errorf("%q did not end by itself: %s", args, errs.String())
	}
	return status, out.String(), errs.String()
}

// startMode runs telemeter with args in the test process until the end of the test, and returns its
// log.
func startMode(t *testing.T, args ...string) *logBuffer {
	t.Helper()
	log := &logBuffer{}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan int, 1)
	go func() { ended <- run(ctx, time.Now, args, io.Discard, log) }()
	t.Cleanup(func() {
		cancel()
		<-ended
		if t.Failed() {
			t.Logf("%q said:\n%s", args, log)
		}
	})
	return log
}

// The server reports the problems of its flags in one message, and exits with 2. It creates no
// file.
func TestServerConflicts(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args string
		want []string // texts that the message must contain
	}{
		{"", []string{"--keys DIR is missing", "keygen"}},
		{"--keys k --listen 9003", []string{"--listen: ", "9003"}},
		{"--keys k --listen-internal localhost", []string{"--listen-internal: "}},
		{"--keys k --listen-internal :9004", []string{"--listen-internal :9004 can be reached from other hosts", "--federate-token-file", "--internal-open"}},
		{"--keys k --listen-internal 0.0.0.0:1", []string{"can be reached"}},
		{"--keys k --internal-open --federate-token-file f", []string{"exclude each other"}},
		{"--keys k --consumer central --consumer=", []string{"--consumer: a consumer name must have 1 to 64 bytes"}},
		{"--keys k --label a --label __x=1", []string{`"a" is not NAME=VALUE`}},
		{"--keys k --name süd", []string{"--name: ", "visible ASCII"}},
		{"--keys k --join a:9006", []string{"--join and --advertise need --listen-cluster"}},
		{"--keys k --label _id=x", []string{`--label: label name "_id" is reserved`}},
		{"--keys k --elide-label _id", []string{`--elide-label: label name "_id" is reserved`}},
		{"--keys k --elide-label a.b", []string{"--elide-label"}},
		{"--keys k --required-label =x", []string{"--required-label"}},
		{"--keys k --allow {} --authorize ftp://x", []string{"--allow: selector", `--authorize: "ftp://x" has the scheme ftp`}},
		{"--keys k --authorize https://", []string{"--authorize"}},
		{"--retention 0s --max-sample-age -1s --ratelimit -1s --limit-bytes 1 --limit-series 0 --limit-clusters 0 --limit-samples -1 --limit-scrape 0 more",
			[]string{"--keys", "--retention", "--max-sample-age", "--ratelimit", "--limit-bytes", "--limit-series", "--limit-clusters", "--limit-samples", "--limit-scrape", `"more"`}},
		{"--retention 1000h", []string{"--retention must be above 0 and at most 480h"}},
		{"--limit-bytes 65MiB --keys k", []string{"--limit-bytes must be from 1KiB to 64MiB"}},
		{"--limit-bytes 1MB", []string{"limit-bytes", "not a number of bytes, such as 1048576 or 1MiB"}},
		{"--limit-storage -1", []string{"limit-storage"}},
		{"--log-level loud", []string{"log-level"}},
		{"--retention soon", []string{"retention"}},
		{"--no-such-flag", []string{"no-such-flag"}},
		{"--key k --lisen=:1 --listen-internal :9004 more ---x --internal-open=maybe --retention 2x",
			[]string{"--key: did you mean --keys?", "--lisen: did you mean --listen?", `"more"`, "---x", `"maybe"`, `"2x"`}},
		{"--key k --listen-internal :9004 more --limit-bytes 1", []string{"--key: did you mean --keys?\n", "--federate-token-file", `"more"`, "--limit-bytes must be from"}},
		{"--keys k --mode client", []string{"--mode server and --mode client cannot be combined"}},
	} {
		args := append([]string{"--mode", "server", "--storage-dir", filepath.Join(dir, "storage")}, strings.Fields(c.args)...)
		status, stdout, stderr := runMode(t, args...)
		if status != exitUsage || stdout != "" {
			t.Errorf("%s: exit status %d, want %d; stdout %q, stderr %q", c.args, status, exitUsage, stdout, stderr)
		}
		for _, want := range append(c.want, "telemeter --mode server --help") {
			if !strings.Contains(stderr, want) {
				t.Errorf("%s: the message has no %q:\n%s", c.args, want, stderr)
			}
		}
		if strings.Contains(stderr, `argument "k"`) {
			t.Errorf("%s: the value of an unknown flag is reported as an unexpected argument:\n%s", c.args, stderr)
		}
		if strings.Count(stderr, "invalid command line") != 1 {
			t.Errorf("%s: want one message, got:\n%s", c.args, stderr)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("conflicts left files: %v (%v)", left, err)
	}
}

// If the server cannot use a file that a flag names, it exits with 1 and reports the cause. The
// message does not contain the secret in the file, and the server creates no storage directory.
func TestServerStartFails(t *testing.T) {
	dir := t.TempDir()
	keys, storage := filepath.Join(dir, "keys"), filepath.Join(dir, "storage")
	if status, _, stderr := runMode(t, "--mode", "keygen", "--keys", keys, "--host", "127.0.0.1"); status != exitOK {
		t.Fatal(stderr)
	}
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	half, bad := filepath.Join(dir, "half"), filepath.Join(dir, "bad")
	for _, d := range []string{half, bad} {
		if status, _, stderr := runMode(t, "--mode", "keygen", "--keys", d, "--host", "127.0.0.1"); status != exitOK {
			t.Fatal(stderr)
		}
	}
	if err := os.Remove(filepath.Join(half, TLSCertFile)); err != nil {
		t.Fatal(err)
	}
	const secret = "bm90IGEga2V5IGJ1dCBzdGlsbCBzZWNyZXQ="
	file("bad/"+TokenKeyFile, secret+"\n")
	for _, c := range []struct{ args, want string }{
		{"--keys " + filepath.Join(dir, "none"), "keygen --keys"},
		{"--keys " + bad, "line 1"},
		{"--keys " + half, "tls.crt"}, // tls.crt is missing beside tls.key; the server must not serve plain HTTP instead
		{"--keys " + keys + " --revoked-file " + filepath.Join(dir, "none"), "--revoked-file"},
		{"--keys " + keys + " --revoked-file " + file("revoked", "ok\nno such id\n"), "line 2"},
		{"--keys " + keys + " --allow-file " + file("allow", "# nothing\n"), "contains no selector"},
		{"--keys " + keys + " --federate-token-file " + file("empty", "\n"), "is empty"},
		{"--keys " + keys + " --federate-token-file " + file("two", "a\nb\n"), "more than a token"},
		{"--keys " + keys + " --tls-client-ca " + file("ca", "no PEM"), "no PEM certificate"},
	} {
		status, _, stderr := runMode(t, append([]string{"--mode", "server", "--storage-dir", storage}, strings.Fields(c.args)...)...)
		if status != exitFailure || !strings.Contains(stderr, c.want) || strings.Contains(stderr, secret) {
			t.Errorf("%s: exit status %d, want %d and %q without the secret:\n%s", c.args, status, exitFailure, c.want, stderr)
		}
	}
	if _, err := os.Stat(storage); !os.IsNotExist(err) {
		t.Errorf("a failed start created the storage directory: %v", err)
	}
}

// A server does not start with a storage directory that every user can write to, and a client does
// not start with such a spool directory. The error names the directory, its mode and the remedy.
func TestDirectoryOfEveryUser(t *testing.T) {
	s := newModeServer(t)
	writeIn(t, s.dir, "token", s.token)
	open := s.path("open")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o777)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--mode", "server", "--keys", s.path("keys"), "--storage-dir", open, "--listen", "127.0.0.1:0", "--listen-internal", "127.0.0.1:0"},
		{"--mode", "client", "--token-file", s.path("token"), "--spool-dir", open, "--once", "--interval", "1s"},
	} {
		status, _, stderr := runMode(t, args...)
		if status != exitFailure || !strings.Contains(stderr, open+" (mode 0777)") || !strings.Contains(stderr, "chmod -R o-w "+open) {
			t.Errorf("%q: exit status %d, want %d and an error about %s:\n%s", args, status, exitFailure, open, stderr)
		}
	}
	if files, err := os.ReadDir(open); err != nil || len(files) > 0 {
		t.Errorf("the directory has the files %v, %v", files, err)
	}
}

// --help of the mode server lists each flag of the server, default values, and an example. No line
// has more than 110 columns.
func TestServerHelp(t *testing.T) {
	for _, args := range [][]string{{"--mode", "server", "--help"}, {"-h", "--mode=server"}} {
		status, help, stderr := runMode(t, args...)
		if status != exitOK || stderr != "" {
			t.Errorf("%q: exit status %d: %s", args, status, stderr)
		}
		c := newCommand("server", []string{"--help"}, io.Discard, io.Discard)
		if err := serverMode(t.Context(), c); err != flag.ErrHelp {
			t.Fatal(err)
		}
		usual, _, _ := strings.Cut(help, "\nRarely needed\n")
		if n := strings.Count(usual, "\n  --"); n != len(c.usual) || n == 0 || !strings.Contains(usual, "Usual flags:\n  --keys DIR") || strings.Contains(help, "Storage:\n  --storage-dir") {
			t.Errorf("%q: want the %d usual flags first and only there:\n%s", args, len(c.usual), help)
		}
		n := 0
		c.VisitAll(func(f *flag.Flag) {
			if f.Name == "mode" {
				return
			}
			if n++; !regexp.MustCompile(`(?m)^  --` + f.Name + `\b`).MatchString(help) {
				t.Errorf("--help does not list --%s", f.Name)
			}
		})
		if n < 24 {
			t.Errorf("the server has %d flags, want at least 24", n)
		}
		text := strings.Join(strings.Fields(help), " ")
		for _, want := range []string{
			"(default :9003)", "(default localhost:9004)", "(default telemeter-data)", "(default 2h)", "(default 10m)", "(default 1s)", "(default 1MiB)",
			"(default 20000)", "(default 500000)", "(default INFO)", "Example: telemeter --mode server",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("--help has no %s", want)
			}
		}
		for line := range strings.Lines(help) {
			if len(strings.TrimRight(line, "\n")) > 110 {
				t.Errorf("--help has a line of %d columns, want at most 110: %s", len(line), line)
			}
		}
	}
}

// modeServer is a server that runs in the test process. Its flags name these files, which a reload
// reads: keys, certificate, revocations, selectors and the federate token.
type modeServer struct {
	t      *testing.T
	dir    string // directory with keys, revoked, allow and federate-token; the server creates storage in it
	token  string // client token of site-7, with the label region="eu"
	log    logBuffer
	starts int      // how often the server was started
	args   []string // further arguments of the server

	secrets []string // texts that the process log must not contain at the end of the test

	external, internal string       // host:port of the server's two listeners
	client             *http.Client // trusts only the key of the certificate that the server started with
}

// newModeServer creates the files of a server, but does not start it. The server drops samples of
// the metric "secret" and requires the federate token "first". The test fails if the process log
// contains one of s.secrets at the end.
func newModeServer(t *testing.T) *modeServer {
	t.Helper()
	s := &modeServer{t: t, dir: t.TempDir()}
	s.mustRun("--mode", "keygen", "--keys", s.path("keys"), "--host", "127.0.0.1")
	s.token = s.newToken("site-7", "--ttl", "1h", "--label", "region=eu")
	writeIn(t, s.dir, "revoked", "")
	writeIn(t, s.dir, "allow", `{__name__!="secret",__name__!=""}`)
	writeIn(t, s.dir, "federate-token", "first\n")
	s.secrets = []string{s.token, "first", "second"}
	t.Cleanup(func() {
		log := strings.ReplaceAll(s.log.String(), "first push of site", "") // the secret "first" is a word of this message
		for _, secret := range s.secrets {
			if strings.Contains(log, secret) {
				t.Errorf("the log contains the secret %q:\n%s", secret, s.log.String())
			}
		}
	})
	return s
}

func (s *modeServer) path(name string) string { return filepath.Join(s.dir, name) }

// mustRun runs telemeter with args, such as --mode keygen, and returns its output without white
// space at the ends. The test fails at once if the exit status is not 0.
func (s *modeServer) mustRun(args ...string) string {
	s.t.Helper()
	status, out, stderr := runMode(s.t, args...)
	if status != exitOK {
		s.t.Fatalf("%q: exit status %d: %s", args, status, stderr)
	}
	return strings.TrimSpace(out)
}

// newToken returns a client token for the cluster ID id, signed with the first key in the server's
// key file.
func (s *modeServer) newToken(id string, args ...string) string {
	s.t.Helper()
	return s.mustRun(append([]string{"--mode", "token", "--keys", s.path("keys"), "--id", id, "--to", "https://127.0.0.1:1"}, args...)...)
}

// start starts the server and waits until it has opened its listeners. Requests sent from then on
// are answered. The function stop stops the server; the test fails if the exit status is not 0.
func (s *modeServer) start() (stop func()) {
	s.t.Helper()
	// The test process catches SIGHUP here, because a SIGHUP that arrives before the server handles
	// the signal would end the test process.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, time.Now, append([]string{
			"--mode", "server", "--keys", s.path("keys"), "--listen", "127.0.0.1:0", "--listen-internal", "127.0.0.1:0", "--storage-dir", s.path("storage"),
			"--revoked-file", s.path("revoked"), "--allow-file", s.path("allow"), "--federate-token-file", s.path("federate-token"), "--label", "hub=h1",
		}, s.args...), io.Discard, &s.log)
	}()
	s.starts++
	serving := regexp.MustCompile(`msg=serving .*external=(\S+) tls=\w+ internal=(\S+) storage=/\S+`)
	var lines [][]string
	eventually(s.t, "the server serves", func() bool {
		lines = serving.FindAllStringSubmatch(s.log.String(), -1)
		return len(lines) == s.starts
	})
	s.external, s.internal = lines[s.starts-1][1], lines[s.starts-1][2]
	if _, err := os.Stat(s.path("keys/" + TLSCertFile)); err == nil {
		s.client = s.pinnedClient()
	}
	stopped := false
	stop = func() {
		s.t.Helper()
		if stopped {
			return
		}
		stopped = true
		cancel()
		if status := <-ended; status != exitOK {
			s.t.Errorf("the server exited with %d, want %d:\n%s", status, exitOK, s.log.String())
		}
		signal.Stop(hup)
	}
	s.t.Cleanup(stop)
	return stop
}

// pinnedClient returns an HTTP client that trusts only the key of the certificate that is now in
// the server's directory keys.
func (s *modeServer) pinnedClient() *http.Client {
	s.t.Helper()
	pin, err := PinFromPEM([]byte(readIn(s.t, s.path("keys"), TLSCertFile)))
	if err != nil {
		s.t.Fatal(err)
	}
	config, err := PinnedTLS(pin)
	if err != nil {
		s.t.Fatal(err)
	}
	return NewHTTPClient(config, 10*time.Second, 10*time.Second)
}

// request sends a request on a new connection, and returns the status code and the body of the
// answer.
func (s *modeServer) request(c *http.Client, method, url, token, body string) (status int, answer string, err error) {
	s.t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Close = true
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// mustRequest does the same as request, but the test fails at once if there is no answer.
func (s *modeServer) mustRequest(c *http.Client, method, url, token, body string) (status int, answer string) {
	s.t.Helper()
	status, answer, err := s.request(c, method, url, token, body)
	if err != nil {
		s.t.Fatal(err)
	}
	return status, answer
}

// push pushes samples, a text exposition, to /upload. It returns the status code and the body of
// the answer.
func (s *modeServer) push(token, samples string) (status int, answer string) {
	s.t.Helper()
	return s.mustRequest(s.client, "POST", "https://"+s.external+"/upload", token, samples)
}

// federate scrapes /federate with a federate token, and returns the status code and the body of the
// answer.
func (s *modeServer) federate(token string) (status int, answer string) {
	s.t.Helper()
	return s.mustRequest(http.DefaultClient, "GET", "http://"+s.internal+"/federate", token, "")
}

// reload makes the server reload its files with SIGHUP, and waits until the server has logged
// message once more than before.
func (s *modeServer) reload(message string) {
	s.t.Helper()
	n := strings.Count(s.log.String(), message)
	syscall.Kill(os.Getpid(), syscall.SIGHUP)
	eventually(s.t, "the server logs "+message, func() bool { return strings.Count(s.log.String(), message) == n+1 })
}

// mustCountReloads checks how many successful and how many failed reloads the metric
// telemeter_reloads_total counts.
func (s *modeServer) mustCountReloads(federateToken, ok, failed string) {
	s.t.Helper()
	_, text := s.mustRequest(http.DefaultClient, "GET", "http://"+s.internal+"/metrics", federateToken, "")
	for _, want := range []string{`telemeter_reloads_total{result="ok"} ` + ok + "\n", `telemeter_reloads_total{result="failed"} ` + failed + "\n"} {
		if !strings.Contains(text, want) {
			s.t.Errorf("/metrics has no %s:\n%s", want, text)
		}
	}
}

// The server drops the samples of a push that --allow-file does not select, and adds the labels of
// --label and of the token to the others. It serves them to a scraper that sends the federate
// token, and answers 401 to another token.
func TestServerServesPush(t *testing.T) {
	s := newModeServer(t)
	s.start()
	if status, answer := s.push(s.token, "up 1\nsecret 1\n"); status != 200 || !strings.Contains(answer, `"dropped":{"not_allowed":1}`) {
		t.Fatalf("the push got %d %s", status, answer)
	}
	const line = `up{_id="site-7",hub="h1",instance="",job="",region="eu"} 1 `
	if status, text := s.federate("first"); status != 200 || !strings.Contains(text, line) || !strings.Contains(text, "telemeter_cluster_token_expiry_seconds{") {
		t.Errorf("/federate answered %d, want 200 and %s and the token's expiry:\n%s", status, line, text)
	}
	if status, _ := s.federate("second"); status != 401 {
		t.Errorf("/federate with a wrong token answered %d, want 401", status)
	}
}

// checkSecretWarnings checks that log, a process log, has exactly one warning of a readable secret
// for each path in want, with the mode of the file and the remedy. The modes in want are octal.
func checkSecretWarnings(t *testing.T, log string, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	for _, m := range regexp.MustCompile(`level=WARN msg="[^"]*secret[^"]*chmod o-r[^"]*" file=(\S+) mode=(\S+)\n`).FindAllStringSubmatch(log, -1) {
		if got[m[1]] != "" {
			t.Errorf("two warnings of %s", m[1])
		}
		got[m[1]] = m[2]
	}
	if !maps.Equal(got, want) {
		t.Errorf("got warnings of %v, want %v, in the log:\n%s", got, want, log)
	}
}

// mustChmod sets the mode of the file at path.
func mustChmod(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// At start and at a reload, a server warns of each file with a secret that every user may read. It
// does not warn of a file that only the group may read, nor of a certificate, which is public.
func TestServerWarnsOfReadableSecrets(t *testing.T) {
	s := newModeServer(t)
	mustChmod(t, s.path("federate-token"), 0o604)
	mustChmod(t, s.path("keys/"+ClusterKeyFile), 0o640)
	mustChmod(t, s.path("keys/"+TLSKeyFile), 0o644)
	tokenKey := s.path("keys/" + TokenKeyFile)
	if err := errors.Join(os.Rename(tokenKey, s.path("target")), os.Symlink(s.path("target"), tokenKey)); err != nil {
		t.Fatal(err)
	}
	mustChmod(t, s.path("target"), 0o600) // a link itself has mode 0777
	s.start()
	s.federate("first") // after the answer, the server handles SIGHUP
	checkSecretWarnings(t, s.log.String(), map[string]string{s.path("federate-token"): "0604", s.path("keys/" + TLSKeyFile): "0644"})
	mustChmod(t, s.path("federate-token"), 0o600)
	mustChmod(t, s.path("keys/"+TLSKeyFile), 0o400)
	mustChmod(t, s.path("keys/"+ClusterKeyFile), 0o664)
	mustChmod(t, s.path("target"), 0o444)
	s.log.Reset()
	s.reload("msg=reloaded")
	checkSecretWarnings(t, s.log.String(), map[string]string{s.path("keys/" + ClusterKeyFile): "0664", tokenKey: "0444"})
}

// The internal listener answers 421 to requests for a foreign host if it is bound to a loopback
// address. If it is bound to all addresses, it answers requests for any host.
func TestInternalListenerHosts(t *testing.T) {
	for _, c := range []struct {
		listen, host string
		want         int
	}{
		{"127.0.0.1:0", "", 200}, {"127.0.0.1:0", "evil.example", 421},
		{"0.0.0.0:0", "", 200}, {"0.0.0.0:0", "hub.example:9004", 200},
	} {
		s := newModeServer(t)
		for _, name := range []string{TLSCertFile, TLSKeyFile} { // so that both listeners are plain HTTP
			if err := os.Remove(s.path("keys/" + name)); err != nil {
				t.Fatal(err)
			}
		}
		s.args = []string{"--listen-internal", c.listen}
		stop := s.start()
		if status := getStatus(t, "http://"+s.internal+"/healthz", c.host); status != c.want {
			t.Errorf("bound to %s, Host %q: answered %d, want %d", c.listen, c.host, status, c.want)
		}
		if warned := strings.Contains(s.log.String(), "scrapers connect over plain HTTP"); warned == strings.HasPrefix(c.listen, "127.") {
			t.Errorf("bound to %s: warned of plain HTTP: %t", c.listen, warned)
		}
		stop()
	}
}

// An internal listener that is bound to all addresses uses TLS, with the certificate of the external
// listener, but needs no client certificates. It answers plain HTTP with 400 and a hint. The
// second scrape on a connection confirms the first, so that the server does not serve the samples
// again. A reload replaces the certificate.
func TestInternalListenerTLS(t *testing.T) {
	s := newModeServer(t)
	s.args = []string{"--listen-internal", "0.0.0.0:0"}
	stop := s.start()
	if status, answer := s.push(s.token, "up 1 "+fmt.Sprint(time.Now().UnixMilli()-1000)+"\nup 2\n"); status != 200 {
		t.Fatalf("the push got %d %s", status, answer)
	}
	for i, want := range []string{"1 2 ", "2 "} {
		req, err := http.NewRequest("GET", "https://"+s.internal+"/federate?consumer=central", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer first")
		resp, err := s.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if got := upsOf(string(body)); err != nil || got != want {
			t.Errorf("scrape %d: got %q, %v; want %q", i+1, got, err, want)
		}
	}
	if status, answer := s.mustRequest(http.DefaultClient, "GET", "http://"+s.internal+"/healthz", "", ""); status != 400 || !strings.Contains(answer, "use https://") {
		t.Errorf("plain HTTP was answered %d %s", status, answer)
	}
	s.mustRun("--mode", "keygen", "--keys", s.path("other"), "--host", "127.0.0.1")
	for _, name := range []string{TLSCertFile, TLSKeyFile} {
		writeIn(t, s.dir, "keys/"+name, readIn(t, s.dir, "other/"+name))
	}
	s.reload("msg=reloaded")
	s.client.CloseIdleConnections()
	if _, _, err := s.request(s.client, "GET", "https://"+s.internal+"/healthz", "", ""); err == nil {
		t.Error("after the reload, the internal listener still has the old certificate")
	}
	s.mustRequest(s.pinnedClient(), "GET", "https://"+s.internal+"/healthz", "", "")
	stop()
	s.args = append(s.args, "--tls-client-ca", s.path("keys/"+TLSCertFile))
	s.start()
	if status, _ := s.mustRequest(s.client, "GET", "https://"+s.internal+"/healthz", "", ""); status != 200 {
		t.Errorf("without a client certificate, /healthz was answered %d", status)
	}
}

// getStatus sends a GET request with the given Host header, and returns the status of the answer.
// An empty host means the host in the URL.
func getStatus(t *testing.T, url, host string) int {
	t.Helper()
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = host
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// If one of the files that a reload reads is bad, the reload fails. The server still accepts the
// old tokens of its client and of scrapers, and presents the old certificate, even if the file with
// the federate token has a new and good content.
func TestReloadWithBadFile(t *testing.T) {
	s := newModeServer(t)
	s.start()
	for _, bad := range []struct{ file, text string }{
		{"keys/" + TokenKeyFile, "garbage\n"},
		{"keys/" + TLSCertFile, "garbage"},
		{"keys/" + TLSKeyFile, ""},
		{"revoked", "a b c\n"},
		{"allow", "{"},
		{"federate-token", ""},
	} {
		good := readIn(t, s.dir, bad.file)
		// The file of the federate token changes too, and is valid. The server must not use the new
		// federate token, because another file is bad.
		if bad.file != "federate-token" {
			writeIn(t, s.dir, "federate-token", "second")
		}
		writeIn(t, s.dir, bad.file, bad.text)
		s.reload("reload failed")
		if status, answer := s.push(s.token, "up 2\n"); status != 200 {
			t.Errorf("after a reload with a bad %s: a push got %d %s, want 200", bad.file, status, answer)
		}
		if status, _ := s.federate("first"); status != 200 {
			t.Errorf("after a reload with a bad %s: /federate with the old token answered %d, want 200", bad.file, status)
		}
		writeIn(t, s.dir, bad.file, good)
		writeIn(t, s.dir, "federate-token", "first")
	}
	s.mustCountReloads("first", "0", "6")
}

// After a reload the server uses the new certificate, revocations, selectors of --allow-file and
// federate token. It still accepts a token that was signed with the old key.
func TestReloadReplacesAll(t *testing.T) {
	s := newModeServer(t)
	s.start()
	s.mustRun("--mode", "keygen", "--keys", s.path("keys"), "--rotate", "token")
	revoked := s.newToken("site-8")
	s.secrets = append(s.secrets, revoked)
	writeIn(t, s.dir, "revoked", "site-8\n")
	writeIn(t, s.dir, "allow", `{__name__!=""}`)
	writeIn(t, s.dir, "federate-token", "second")
	for _, name := range []string{TLSCertFile, TLSKeyFile} {
		if err := os.Remove(filepath.Join(s.path("keys"), name)); err != nil {
			t.Fatal(err)
		}
	}
	s.mustRun("--mode", "keygen", "--keys", s.path("keys"), "--host", "127.0.0.1")
	s.reload("msg=reloaded")

	if _, _, err := s.request(s.client, "POST", "https://"+s.external+"/upload", s.token, ""); err == nil {
		t.Error("the server still presents the old certificate")
	}
	s.client = s.pinnedClient()
	if status, answer := s.push(s.token, "secret 1\n"); status != 200 || !strings.Contains(answer, `"accepted":1`) {
		t.Errorf("a push with a token of the old key, of a series that is allowed now, got %d %s, want 200", status, answer)
	}
	if status, _ := s.push(revoked, "up 1\n"); status != 401 {
		t.Errorf("a push of a revoked cluster ID got %d, want 401", status)
	}
	if status, _ := s.federate("first"); status != 401 {
		t.Errorf("/federate with the old token answered %d, want 401", status)
	}
	if status, text := s.federate("second"); status != 200 || !strings.Contains(text, "secret{") {
		t.Errorf("/federate with the new token answered %d, want 200 and the series secret:\n%s", status, text)
	}
	s.mustCountReloads("second", "1", "0")
}

// After the token key was rotated and the server has reloaded, the server signs upload tokens with
// the new key.
func TestReloadSigningKey(t *testing.T) {
	s := newModeServer(t)
	s.start()
	s.mustRun("--mode", "keygen", "--keys", s.path("keys"), "--rotate", "token")
	s.reload("msg=reloaded")
	status, answer := s.mustRequest(s.client, "POST", "https://"+s.external+"/authorize?id=site-7", s.token, "")
	var a struct{ Token string }
	if err := json.Unmarshal([]byte(answer), &a); status != 200 || err != nil {
		t.Fatalf("/authorize answered %d %s: %v", status, answer, err)
	}
	s.secrets = append(s.secrets, a.Token)
	old, err := ParseUnverifiedToken(s.token)
	if err != nil {
		t.Fatal(err)
	}
	if upload, err := ParseUnverifiedToken(a.Token); err != nil || upload.KeyID == old.KeyID {
		t.Errorf("the upload token is signed with key %s, want another key than the old %s: %v", upload.KeyID, old.KeyID, err)
	}
}

// A second server with the storage directory of a running server exits with 1 and reports that the
// directory is in use.
func TestStorageInUse(t *testing.T) {
	s := newModeServer(t)
	s.start()
	status, _, stderr := runMode(t, "--mode", "server", "--keys", s.path("keys"), "--storage-dir", s.path("storage"), "--listen", "127.0.0.1:0", "--listen-internal", "127.0.0.1:0")
	if status != exitFailure || !strings.Contains(stderr, "in use") {
		t.Errorf("a second server with the same storage directory: exit status %d, want %d: %s", status, exitFailure, stderr)
	}
}

// A stopped server no longer listens. After a restart the server serves the samples that it
// accepted before.
func TestServerRestart(t *testing.T) {
	s := newModeServer(t)
	stop := s.start()
	if status, answer := s.push(s.token, "up 1\nother 1\n"); status != 200 {
		t.Fatalf("the push got %d %s", status, answer)
	}
	stop()
	if _, err := tls.Dial("tcp", s.external, &tls.Config{InsecureSkipVerify: true}); err == nil {
		t.Error("the stopped server still listens")
	}
	s.start()
	if status, text := s.federate("first"); status != 200 || !strings.Contains(text, `up{_id="site-7",`) || !strings.Contains(text, "other{") {
		t.Errorf("after a restart /federate answered %d, want 200 and the samples pushed before:\n%s", status, text)
	}
}
