package main

// Tests of telemeter in processes of its own: the commands of a set-up, exit statuses, reloads at
// SIGHUP, the exit at SIGTERM, and servers and clients that are killed while they work. Each
// process is the test binary, which TestMain lets run as telemeter.

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Environment variables that the test binary reads in TestMain.
const (
	asTelemeter = "TELEMETER_TEST_AS_MAIN"     // if set, the test binary runs telemeter instead of the tests
	clockAhead  = "TELEMETER_TEST_CLOCK_AHEAD" // a duration, such as 2h, that is added to telemeter's wall clock
)

// TestMain runs telemeter if the environment variable asTelemeter is set, an attacker of TestHostile
// if asAttacker is set, a yardstick of TestSpeed if asYardstick is set, and the tests otherwise.
func TestMain(m *testing.M) {
	if os.Getenv(asAttacker) != "" {
		os.Exit(runAttacker(os.Stdin, os.Stdout))
	}
	if os.Getenv(asYardstick) != "" {
		os.Exit(runYardstick(os.Args[1:], os.Stdin, os.Stdout))
	}
	if os.Getenv(asTelemeter) != "" {
		ahead, _ := time.ParseDuration(os.Getenv(clockAhead))
		os.Exit(runProcess(func() time.Time { return time.Now().Add(ahead) }))
	}
	os.Exit(m.Run())
}

// writeIn writes text to the named file in dir, with the permissions 0600.
func writeIn(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func readIn(t *testing.T, dir, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// uploadStatus pushes body to /upload of the server at serverURL with the given token, and returns
// the status code of the answer.
func uploadStatus(t *testing.T, serverURL, token, body string) int {
	t.Helper()
	req, err := http.NewRequest("POST", serverURL+"/upload", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(token))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// setUp is a server and the client of site-7, which the four commands of the README have set up.
type setUp struct {
	dir            string // directory in which the commands ran, with keys and site-7.token
	token          string
	internal       string // base URL of the server's internal listener
	server, client *process
}

// startFourCommands runs the four commands of the README that set up a server and a client, with
// other addresses. It returns when the client has logged a push. The client scrapes the server's
// own /metrics.
func startFourCommands(t *testing.T) setUp {
	t.Helper()
	s := setUp{dir: t.TempDir()}
	mustTool(t, s.dir, "--mode", "keygen", "--keys", "keys", "--host", "hub.example")
	s.server = startServer(t, s.dir)
	s.internal = "http://" + s.server.await(internalAddr)
	s.token = mustTool(t, s.dir, "--mode", "token", "--keys", "keys", "--id", "site-7", "--to", "https://"+s.server.await(externalAddr))
	writeIn(t, s.dir, "site-7.token", s.token)
	// The host in the server's URL is not in the server's certificate. The client accepts the
	// certificate nevertheless, because the token contains the pin of the certificate's key.
	s.client = start(t, s.dir, "--mode", "client", "--from", s.internal+"/metrics", "--token-file", "site-7.token", "--listen", "127.0.0.1:0")
	s.client.await("msg=pushed")
	return s
}

// The four commands of the README set up a server and a client. The client pushes its samples to
// the server, which serves them at /federate. Both processes exit with 0 at SIGTERM.
func TestFourCommands(t *testing.T) {
	s := startFourCommands(t)
	if strings.Count(s.token, "\n") != 1 || !strings.HasPrefix(s.token, "tm1.") {
		t.Errorf("--mode token printed more than a token to stdout: %q", s.token)
	}
	body := get(t, s.internal+"/federate")
	for _, want := range []string{
		"# TYPE telemeter_build_info untyped\n", `telemeter_build_info{_id="site-7",`, `push_time_seconds{_id="site-7",instance="",job="",server="`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("the server's /federate has no %s:\n%s", want, body)
		}
	}
	own := "http://" + s.client.await(`msg=listening address=(\S+)`)
	sent := get(t, own+"/federate")
	if !strings.Contains(sent, "telemeter_build_info{") || strings.Contains(sent, "_id=") {
		t.Errorf("the client's /federate does not have the samples that it sent:\n%s", sent)
	}
	if status := getStatus(t, own+"/federate", "evil.example"); status != 421 {
		t.Errorf("the client's /federate for a foreign host was answered %d, want 421", status)
	}
	for name, p := range map[string]*process{"client": s.client, "server": s.server} {
		if code := p.end(syscall.SIGTERM); code != exitOK {
			t.Errorf("the %s exited with %d after SIGTERM, want %d", name, code, exitOK)
		}
	}
}

// telemeter --mode token --inspect prints the cluster ID of the token in a file, and whether a key
// in --keys verifies the token.
func TestInspectToken(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	writeIn(t, dir, "site-7.token", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "site-7"))
	out := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--inspect", "site-7.token")
	if !strings.Contains(out, "cluster ID: site-7") || !strings.Contains(out, "verifies:   yes") {
		t.Errorf("--inspect printed:\n%s", out)
	}
}

// A client does not push to a server whose certificate has another key than the one whose pin is in
// the client's token. It keeps the scrape in its spool.
func TestImpostor(t *testing.T) {
	s := startFourCommands(t)
	impostor := t.TempDir()
	mustTool(t, impostor, "--mode", "keygen", "--keys", "keys", "--host", "hub.example")
	other := startServer(t, impostor)
	stdout, stderr, code := tool(t, s.dir, "--mode", "client", "--from", s.internal+"/metrics", "--token-file", "site-7.token",
		"--to", "https://"+other.await(externalAddr), "--once", "--interval", "2s", "--spool-dir", "other-spool")
	if code != exitFailure || stdout != "" || !strings.Contains(stderr, "pin") || !strings.Contains(stderr, "scrapes kept in the spool: 1,") {
		t.Errorf("pushing to an impostor: exit %d, stdout %q, stderr:\n%s", code, stdout, stderr)
	}
}

// writeSelfSigned writes a self-signed client certificate to dir/site.crt and its key to
// dir/site.key. The certificate can also be used as the CA that verifies it.
func writeSelfSigned(t *testing.T, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "site"}, NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(crand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writeIn(t, dir, "site.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	writeIn(t, dir, "site.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})))
}

// A server with --tls-client-ca refuses a client that has a valid token but no client certificate,
// and accepts the client with a certificate of that CA.
func TestClientCertificates(t *testing.T) {
	dir := t.TempDir()
	writeSelfSigned(t, dir)
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "hub.example")
	server := startServer(t, dir, "--tls-client-ca", "site.crt")
	writeIn(t, dir, "a.token", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", "https://"+server.await(externalAddr)))
	push := []string{"--mode", "client", "--from", "http://" + server.await(internalAddr) + "/metrics", "--token-file", "a.token", "--once", "--interval", "2s"}
	if _, stderr, code := tool(t, dir, push...); code != exitFailure || !strings.Contains(stderr, "certificate") {
		t.Errorf("pushing without a client certificate: exit %d\n%s", code, stderr)
	}
	mustTool(t, dir, append(push, "--to-crt", "site.crt", "--to-key", "site.key")...)
}

// telemeter --mode client --dry-run prints the samples that --match selects, pushes nothing, and
// creates no spool directory.
func TestDryRunPushesNothing(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	server := startServer(t, dir)
	internal := "http://" + server.await(internalAddr)
	out := mustTool(t, dir, "--mode", "client", "--from", internal+"/metrics", "--dry-run", "--match", `{__name__=~"telemeter_build_info|go_goroutines"}`)
	if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 2 || !regexp.MustCompile(`go_goroutines \d+ \d{13}`).MatchString(out) {
		t.Errorf("--dry-run printed:\n%s", out)
	}
	if body := get(t, internal+"/federate"); body != "" {
		t.Errorf("--dry-run pushed samples:\n%s", body)
	}
	if _, err := os.Stat(filepath.Join(dir, "telemeter-spool")); err == nil {
		t.Error("--dry-run created a spool directory")
	}
}

// A client asks its source for the series of the match[] selectors in the URL of --from and of the
// selectors of --match. If neither has a selector, it asks for all series.
func TestMatchOfURL(t *testing.T) {
	dir := t.TempDir()
	asked := make(chan []string, 1)
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.Query()["match[]"]
		fmt.Fprintln(w, "up 1")
	}))
	defer source.Close()
	const all = `{__name__=~".+"}`
	for _, tt := range []struct {
		query string
		match []string
		want  []string
	}{
		{"", nil, []string{all}},
		{"", []string{"--match", "up"}, []string{"up"}},
		{"?a=b", nil, []string{all}},
		{"?match[]=up&match[]=down", nil, []string{"up", "down"}},
		{"?match[]=up", []string{"--match", "down"}, []string{"up", "down"}},
	} {
		mustTool(t, dir, append([]string{"--mode", "client", "--dry-run", "--from", source.URL + "/federate" + tt.query}, tt.match...)...)
		if got := <-asked; !slices.Equal(got, tt.want) {
			t.Errorf("--from …/federate%s %q: the client asked for %q, want %q", tt.query, tt.match, got, tt.want)
		}
	}
}

// telemeter exits with 0 on success, with 1 on a failure, and with 2 on a faulty command line. A
// mode that fails to start leaves no file behind.
func TestExitStatus(t *testing.T) {
	dir := t.TempDir()
	tests := []struct {
		args []string
		code int
		want []string // texts that stdout (if code is 0) or stderr (otherwise) must contain
	}{
		{nil, exitUsage, []string{"--mode is missing", "Usage:"}},
		{[]string{"--help"}, exitOK, []string{"Modes:", "Set-up in four commands"}},
		{[]string{"--mode", "nope"}, exitUsage, []string{`unknown mode "nope"`, "client, keygen, load, server, show, status, token, version"}},
		{[]string{"--mode=version"}, exitOK, []string{"telemeter "}},
		{[]string{"--mode", "server", "--help"}, exitOK, []string{"--listen ADDRESS", "(default :9003)", "Example:"}},
		{[]string{"--mode", "server", "--nope"}, exitUsage, []string{"-nope", "--help lists the flags"}},
		{[]string{"--mode", "server", "--listen-internal", ":9004", "--limit-bytes", "1"}, exitUsage,
			[]string{"--keys DIR is missing", "--federate-token-file", "--limit-bytes must be from"}},
		{[]string{"--mode", "client", "--anonymize-labels", "instance", "--to-crt", "x", "extra"}, exitUsage,
			[]string{"--token-file FILE is missing", "--anonymize-salt-file", "--to-key", `"extra"`}},
		{[]string{"--mode", "client", "--token-file", "missing", "--listen", "9002"}, exitUsage, []string{"--listen: "}},
		{[]string{"--mode", "client", "--interval", "2s", "--scrape-interval", "3s", "--spool-age", "1s", "--spool-limit", "1KiB"}, exitUsage,
			[]string{"--scrape-interval must be at least", "--spool-limit must be at least", "--spool-age must be at least"}},
		{[]string{"--mode", "client", "--token-file", "missing"}, exitFailure, []string{"missing"}},
		{[]string{"--mode", "server", "--keys", "missing"}, exitFailure, []string{"token.key", "keygen"}},
		{[]string{"--mode", "token", "--id", "a b"}, exitUsage, []string{"--id"}},
		{[]string{"--mode", "keygen", "--rotate", "salt"}, exitUsage, []string{"cluster, token or tls"}},
	}
	for _, tt := range tests {
		stdout, stderr, code := tool(t, dir, tt.args...)
		text := stderr
		if tt.code == exitOK {
			text = stdout
		}
		if code != tt.code {
			t.Errorf("%v: exit %d, want %d\n%s", tt.args, code, tt.code, stderr)
		}
		for _, want := range tt.want {
			if !strings.Contains(text, want) {
				t.Errorf("%v: the output has no %q:\n%s", tt.args, want, text)
			}
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("failed starts left files: %v (%v)", entries, err)
	}
}

// A client without --plain-http refuses to send its token to another host over plain HTTP. It exits
// with 2 and names the flag.
func TestPlainHTTP(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	writeIn(t, dir, "a.token", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", "http://192.0.2.1:9003"))
	_, stderr, code := tool(t, dir, "--mode", "client", "--token-file", "a.token", "--once")
	if code != exitUsage || !strings.Contains(stderr, "--plain-http") {
		t.Errorf("exit %d, want %d and a hint at --plain-http:\n%s", code, exitUsage, stderr)
	}
}

// On SIGHUP a server uses the new token keys and revocations. If token.key is bad, the old keys
// stay in use, the reload is counted as failed, and the content of the bad file does not get into
// the process log.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	writeIn(t, dir, "revoked", "")
	server := startServer(t, dir, "--revoked-file", "revoked")
	url := "http://" + server.await(externalAddr)
	oldKey := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a")
	revoked := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "b")
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--rotate", "token")
	newKey := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a")
	check := func(when string, want ...int) {
		t.Helper()
		var got []int
		for _, token := range []string{oldKey, revoked, newKey} {
			got = append(got, uploadStatus(t, url, token, "a 1\n"))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: pushes with a token of the old key, of a revoked site and of the new key got %v, want %v", when, got, want)
		}
	}
	check("before the reload", 200, 200, 401)
	writeIn(t, dir, "revoked", "b\n")
	server.cmd.Process.Signal(syscall.SIGHUP)
	server.await("msg=reloaded")
	check("after the reload", 200, 401, 200)
	writeIn(t, dir, "keys/token.key", "nonsense\n")
	server.cmd.Process.Signal(syscall.SIGHUP)
	server.await("reload failed")
	check("after the failed reload", 200, 401, 200)
	if strings.Contains(server.text(), "nonsense") {
		t.Error("the log contains the contents of a key file")
	}
	if body := get(t, "http://"+server.await(internalAddr)+"/metrics"); !strings.Contains(body, `telemeter_reloads_total{result="failed"} 1`) {
		t.Error("telemeter_reloads_total does not count the failed reload")
	}
}

// If a server that started without a certificate finds a certificate at a reload, the reload
// succeeds and logs that clients connect over plain HTTP until a restart.
func TestReloadFirstCertificate(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	server := startServer(t, dir)
	get(t, "http://"+server.await(internalAddr)+"/healthz") // when the server answers, it already handles SIGHUP
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "localhost")
	server.cmd.Process.Signal(syscall.SIGHUP)
	server.await("msg=reloaded")
	if text := server.text(); !strings.Contains(text, "until this server is restarted") || strings.Contains(text, "reload failed") {
		t.Errorf("the log does not ask for a restart:\n%s", text)
	}
}

// At SIGTERM a server still answers a push that is in flight. Then it exits with 0.
func TestGracefulStop(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "localhost")
	server := startServer(t, dir)
	url := "https://" + server.await(externalAddr)
	token := strings.TrimSpace(mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a"))
	body, w := io.Pipe()
	req, err := http.NewRequest("POST", url+"/upload", body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	status := make(chan string, 1)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	go func() {
		resp, err := client.Do(req)
		if err != nil {
			status <- err.Error()
			return
		}
		resp.Body.Close()
		status <- resp.Status
	}()
	if _, err := io.WriteString(w, "a 1\n"); err != nil { // WriteString returns when the HTTP client has read the text for the body
		t.Fatal(err)
	}
	internal := "http://" + server.await(internalAddr)
	eventually(t, "the push is in flight", func() bool {
		return strings.Contains(get(t, internal+"/metrics"), "telemeter_pushes_in_flight 1")
	})
	server.cmd.Process.Signal(syscall.SIGTERM)
	server.await("msg=stopping")
	w.Close()
	if got := <-status; got != "200 OK" {
		t.Errorf("the push in flight got %s, want 200 OK", got)
	}
	if code := server.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("the server exited with %d, want %d", code, exitOK)
	}
}

// loadedSite is a site that pushes to a server until the server is killed, and records which pushes
// the server acknowledged.
type loadedSite struct {
	token string
	next  int64   // number of the last push; pushes are numbered from 1
	acked []int64 // timestamps, in ms, of the pushes that the server answered with 200
}

// pushUntilKilled sends pushes to url, one after the other, until ctx ends or a push gets no
// answer. Each push has two samples with the same timestamp, which no other push of the site has:
// begin - 60 s, in ms, plus the number of the push. count counts the pushes that were answered 200,
// of all sites together.
func (s *loadedSite) pushUntilKilled(ctx context.Context, t *testing.T, url string, begin int64, count *atomic.Int64) {
	for ctx.Err() == nil {
		s.next++
		at := begin - 60_000 + s.next
		// Every third push has a new series, so that a kill can also cut off the record of a series
		// in the site log.
		body := fmt.Sprintf("steady{n=\"1\"} %d %d\nchurn{n=\"%d\"} %d %d\n", s.next, at, s.next/3, s.next, at)
		req, err := http.NewRequestWithContext(ctx, "POST", url, strings.NewReader(body))
		if err != nil {
			t.Error(err)
			return
		}
		req.Header.Set("Authorization", "Bearer "+s.token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return // the server was killed
		}
		if resp.StatusCode == http.StatusOK {
			s.acked = append(s.acked, at)
			count.Add(1)
		}
		resp.Body.Close()
	}
}

// openServerStore opens the store that a server process with --storage-dir data left in dir. The
// test fails if the store reports an error.
func openServerStore(t *testing.T, dir string) *Store {
	t.Helper()
	store, err := OpenStore(StoreConfig{
		FS: DiskFS{}, Dir: filepath.Join(dir, "data"), Retention: 2 * time.Hour, MaxSampleAge: time.Hour, Now: time.Now,
		OnError: func(err error) { t.Errorf("the store reported: %v", err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

// A server is killed 50 times while four sites push to it, and started again after each kill except
// the last. At the end all samples of acknowledged pushes are in the store on disk, and opening the
// store reports no error.
func TestKilledUnderLoad(t *testing.T) {
	const kills = 50
	rnd := rand.New(rand.NewPCG(testSeed(t, 0), 0))
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	sites := map[string]*loadedSite{}
	for i := range 4 {
		id := fmt.Sprint("site", i)
		sites[id] = &loadedSite{token: strings.TrimSpace(mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", id))}
	}
	begin := time.Now().UnixMilli()
	total := int64(0)
	for kill := range kills {
		server := startServer(t, dir, "--ratelimit", "0", "--limit-series", "100000")
		url := "http://" + server.await(externalAddr) + "/upload"
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var count atomic.Int64
		for _, site := range sites {
			wg.Go(func() { site.pushUntilKilled(ctx, t, url, begin, &count) })
		}
		// The test kills the server after a random number of acknowledged pushes instead of a
		// random time, so that the test does not depend on the speed of the machine.
		want := int64(1 + rnd.IntN(40))
		eventuallyWithin(t, 30*time.Second, 100*time.Microsecond, fmt.Sprintf("run %d: %d pushes are acknowledged", kill, want), func() bool {
			return count.Load() >= want
		})
		server.end(syscall.SIGKILL)
		cancel()
		wg.Wait()
		http.DefaultClient.CloseIdleConnections()
		total += count.Load()
	}
	store := openServerStore(t, dir)
	for id, site := range sites {
		held := map[int64]int{} // number of stored samples of the site by timestamp in ms
		for _, b := range store.sites[id].data.Batches {
			for k := range b.V {
				held[b.Time(k)]++
			}
		}
		for _, at := range site.acked {
			if held[at] != 2 {
				t.Errorf("%s: the store has %d of the 2 samples that were acknowledged at %d", id, held[at], at)
			}
		}
	}
	t.Logf("%d pushes were acknowledged in %d runs", total, kills)
}

// spooledScrapes opens the spool that a killed client left in dir, and returns the value of the
// only sample of each spooled scrape. The test fails if the spool reports damage.
func spooledScrapes(t *testing.T, dir string) (values []float64) {
	t.Helper()
	spool, err := OpenSpool(SpoolConfig{
		FS: DiskFS{}, Dir: filepath.Join(dir, "spool"), ClusterID: "a", Limit: 1 << 30, MaxAge: time.Hour, Now: func() Moment { return Moment{BootID: "test"} },
		OnError: func(err error) { t.Errorf("a kill damaged the spool: %v", err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	// This is the answer of a server that holds no scrape. After it, BeginPush returns all spooled
	// scrapes.
	spool.ApplyAnswer(SpoolAnswer{})
	scrapes, err := spool.BeginPush(PushLimits{Bytes: 1 << 30, Text: 1 << 30, Scrapes: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for _, sc := range scrapes {
		var d Decompressor
		text, _, err := d.Decompress(sc.Gzip, "gzip", 1000)
		n := 0.0
		if _, e := fmt.Sscanf(string(text), "n %g ", &n); err != nil || e != nil {
			t.Fatalf("spooled scrape %q: %v, %v", text, err, e)
		}
		values = append(values, n)
	}
	if err := spool.Close(); err != nil {
		t.Fatal(err)
	}
	return values
}

// A client is killed several times while it cannot reach its server. When the server can be reached
// again, the next start of the client pushes all spooled scrapes in its first push. Every scrape
// that was in the spool at any kill arrives at the server.
func TestClientKilledInOutage(t *testing.T) {
	rnd := rand.New(rand.NewPCG(testSeed(t, 0), 0))
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	server := startServer(t, dir)
	target, err := url.Parse("http://" + server.await(externalAddr))
	if err != nil {
		t.Fatal(err)
	}
	var up atomic.Bool
	proxy := httputil.NewSingleHostReverseProxy(target)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if up.Load() {
			proxy.ServeHTTP(w, r)
			return
		}
		http.Error(w, "the server is down", http.StatusBadGateway)
	}))
	defer front.Close()
	var scrapes atomic.Int64
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "n %d\n", scrapes.Add(1))
	}))
	defer source.Close()
	writeIn(t, dir, "a.token", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", front.URL))
	args := []string{"--mode", "client", "--from", source.URL + "/metrics", "--token-file", "a.token",
		"--listen", "", "--interval", "1s", "--spool-dir", "spool"}

	spooled := map[float64]bool{} // values of the scrapes that were in the spool after any of the kills
	backlog := 0                  // number of scrapes in the spool after the last kill
	for kill := 0; kill < 6 || len(spooled) < 3; kill++ {
		if kill == 60 {
			t.Fatalf("only %d scrapes were spooled in %d runs", len(spooled), kill)
		}
		client := start(t, dir, args...)
		want := scrapes.Load() + 1 + int64(rnd.IntN(2))
		eventuallyWithin(t, 30*time.Second, time.Millisecond, fmt.Sprintf("run %d: the client scrapes", kill), func() bool { return scrapes.Load() >= want })
		if kill%2 == 0 { // in every second run, kill the client up to 20 ms after its scrape
			time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
		} else {
			client.await("(scrapes are kept)")
		}
		client.end(syscall.SIGKILL)
		values := spooledScrapes(t, dir)
		backlog = len(values)
		for _, n := range values {
			spooled[n] = true
		}
	}

	up.Store(true)
	client := start(t, dir, args...)
	// The first push must contain all spooled scrapes. The log line may also count later pushes.
	// Each later push has at least one new scrape, so the first push had at most sent-(pushes-1)
	// scrapes.
	sent, pushes := 0, 0
	line := client.await(`msg=pushed samples=\d+ (scrapes=\d+ pushes=\d+) `)
	if _, err := fmt.Sscanf(line, "scrapes=%d pushes=%d", &sent, &pushes); err != nil || sent-(pushes-1) < backlog {
		t.Errorf("the backlog of %d scrapes was not sent in one push: %s, %v", backlog, line, err)
	}
	client.end(syscall.SIGTERM)
	server.end(syscall.SIGTERM)
	held := map[float64]bool{}
	for _, b := range openServerStore(t, dir).sites["a"].data.Batches {
		for _, v := range b.V {
			held[v] = true
		}
	}
	for n := range spooled {
		if !held[n] {
			t.Errorf("scrape %v was in the spool at a kill, but the server does not have it", n)
		}
	}
	t.Logf("%d of %d scrapes were spooled, the server has %d", len(spooled), scrapes.Load(), len(held))
}
