package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
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

// The test binary is telemeter itself when this is set, so that processes can be
// started, signalled and killed without building anything.
const (
	asTelemeter = "TELEMETER_TEST_AS_MAIN"
	clockAhead  = "TELEMETER_TEST_CLOCK_AHEAD" // a duration
)

func TestMain(m *testing.M) {
	if os.Getenv(asTelemeter) != "" {
		ahead, _ := time.ParseDuration(os.Getenv(clockAhead))
		os.Exit(runProcess(func() time.Time { return time.Now().Add(ahead) }))
	}
	os.Exit(m.Run())
}

// The four commands of a set-up, as the README has them but for the addresses.
func TestFourCommands(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "hub.example")
	server := startServer(t, dir)
	url := "https://" + server.await(externalAddr)
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "site-7", "--to", url)
	if strings.Count(token, "\n") != 1 || !strings.HasPrefix(token, "tm1.") {
		t.Errorf("on stdout there is more than a token: %q", token)
	}
	if err := os.WriteFile(filepath.Join(dir, "site-7.token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	internal := "http://" + server.await(internalAddr)
	// The host is not in the certificate, and needs not be: its key is pinned.
	client := start(t, dir, "--mode", "client", "--from", internal+"/metrics", "--token-file", "site-7.token", "--listen", "127.0.0.1:0")
	client.await("msg=pushed")
	body := get(t, internal+"/federate")
	for _, want := range []string{
		"# TYPE telemeter_build_info untyped\n", `telemeter_build_info{_id="site-7",`, `push_time_seconds{_id="site-7",instance="",job="",server="`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("/federate lacks %s:\n%s", want, body)
		}
	}
	own := get(t, "http://"+client.await(`msg=listening address=(\S+)`)+"/federate")
	if !strings.Contains(own, "telemeter_build_info{") || strings.Contains(own, "_id=") {
		t.Errorf("the client's /federate is not what it sent:\n%s", own)
	}
	if out := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--inspect", "site-7.token"); !strings.Contains(out, "cluster ID: site-7") || !strings.Contains(out, "verifies:   yes") {
		t.Errorf("--inspect says:\n%s", out)
	}
	// Another server cannot pass for this one.
	impostor := t.TempDir()
	mustTool(t, impostor, "--mode", "keygen", "--keys", "keys", "--host", "hub.example")
	other := startServer(t, impostor)
	stdout, stderr, code := tool(t, dir, "--mode", "client", "--from", internal+"/metrics", "--token-file", "site-7.token",
		"--to", "https://"+other.await(externalAddr), "--once", "--interval", "2s", "--spool-dir", "other-spool")
	if code != exitFailure || stdout != "" || !strings.Contains(stderr, "pin") || !strings.Contains(stderr, "scrapes kept in the spool: 1,") {
		t.Errorf("pushing to an impostor: exit %d\n%s", code, stderr)
	}
	for name, p := range map[string]*process{"client": client, "server": server} {
		if code := p.end(syscall.SIGTERM); code != exitOK {
			t.Errorf("%s: exit %d at SIGTERM", name, code)
		}
	}
}

// With --tls-client-ca a token alone is not enough.
func TestClientCertificates(t *testing.T) {
	dir := t.TempDir()
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
	for name, block := range map[string]*pem.Block{
		"site.crt": {Type: "CERTIFICATE", Bytes: der}, "site.key": {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "hub.example")
	server := startServer(t, dir, "--tls-client-ca", "site.crt")
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", "https://"+server.await(externalAddr))
	if err := os.WriteFile(filepath.Join(dir, "a.token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	push := []string{"--mode", "client", "--from", "http://" + server.await(internalAddr) + "/metrics", "--token-file", "a.token", "--once", "--interval", "2s"}
	if _, stderr, code := tool(t, dir, push...); code != exitFailure || !strings.Contains(stderr, "certificate") {
		t.Errorf("without a certificate: exit %d\n%s", code, stderr)
	}
	mustTool(t, dir, append(push, "--to-crt", "site.crt", "--to-key", "site.key")...)
}

func TestDryRunPushesNothing(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	server := startServer(t, dir)
	from := "http://" + server.await(internalAddr) + "/metrics"
	out := mustTool(t, dir, "--mode", "client", "--from", from, "--dry-run", "--match", `{__name__=~"telemeter_build_info|go_goroutines"}`)
	if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 2 || !regexp.MustCompile(`go_goroutines \d+ \d{13}`).MatchString(out) {
		t.Errorf("a dry run printed:\n%s", out)
	}
	if body := get(t, strings.TrimSuffix(from, "/metrics")+"/federate"); body != "" {
		t.Errorf("something was pushed:\n%s", body)
	}
	if _, err := os.Stat(filepath.Join(dir, "telemeter-spool")); err == nil {
		t.Error("a dry run left a spool")
	}
}

// Who chooses by the URL does not get all the rest as well.
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
			t.Errorf("%s with %v: asked for %q, want %q", tt.query, tt.match, got, tt.want)
		}
	}
}

func TestExitStatus(t *testing.T) {
	dir := t.TempDir()
	tests := []struct {
		args []string
		code int
		want []string // in stdout if the code is 0, else in stderr
	}{
		{nil, exitUsage, []string{"--mode is missing", "Usage:"}},
		{[]string{"--help"}, exitOK, []string{"Modes:", "Set-up in four commands"}},
		{[]string{"--mode", "nope"}, exitUsage, []string{`no mode "nope"`, "client, keygen, server, token, version"}},
		{[]string{"--mode=version"}, exitOK, []string{"telemeter "}},
		{[]string{"--mode", "server", "--help"}, exitOK, []string{"--listen ADDRESS", "(default :9003)", "Example:"}},
		{[]string{"--mode", "server", "--nope"}, exitUsage, []string{"-nope", "--help lists the flags"}},
		{[]string{"--mode", "server", "--listen-internal", ":9004", "--limit-bytes", "1"}, exitUsage,
			[]string{"--keys DIR is missing", "--federate-token-file", "--limit-bytes is from"}},
		{[]string{"--mode", "client", "--anonymize-labels", "instance", "--to-crt", "x", "extra"}, exitUsage,
			[]string{"--token-file FILE is missing", "--anonymize-salt-file", "--to-key", `"extra"`}},
		{[]string{"--mode", "client", "--token-file", "missing", "--listen", "9002"}, exitUsage, []string{"--listen: "}},
		{[]string{"--mode", "client", "--interval", "2s", "--scrape-interval", "3s", "--spool-age", "1s", "--spool-limit", "1KiB"}, exitUsage,
			[]string{"--scrape-interval is at least", "--spool-limit is at least", "--spool-age is at least"}},
		{[]string{"--mode", "client", "--token-file", "missing"}, exitFailure, []string{"missing"}},
		{[]string{"--mode", "server", "--keys", "missing"}, exitFailure, []string{"token.key", "keygen"}},
		{[]string{"--mode", "token", "--id", "a b"}, exitUsage, []string{"--id"}},
		{[]string{"--mode", "keygen", "--rotate", "tls"}, exitUsage, []string{"cluster or token"}},
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
				t.Errorf("%v: no %q in:\n%s", tt.args, want, text)
			}
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("a failed start left %v behind (%v)", entries, err)
	}
}

// A plain-HTTP token to another host has to be asked for.
func TestPlainHTTP(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", "http://192.0.2.1:9003")
	if err := os.WriteFile(filepath.Join(dir, "a.token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	_, stderr, code := tool(t, dir, "--mode", "client", "--token-file", "a.token", "--once")
	if code != exitUsage || !strings.Contains(stderr, "--plain-http") {
		t.Errorf("exit %d:\n%s", code, stderr)
	}
}

func TestReload(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	if err := os.WriteFile(filepath.Join(dir, "revoked"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	server := startServer(t, dir, "--revoked-file", "revoked")
	url := "http://" + server.await(externalAddr)
	push := func(token string) int {
		req, err := http.NewRequest("POST", url+"/upload", strings.NewReader("a 1\n"))
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
	old := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a")
	gone := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "b")
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--rotate", "token")
	fresh := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a")
	if got := []int{push(old), push(gone), push(fresh)}; got[0] != 200 || got[1] != 200 || got[2] != 401 {
		t.Fatalf("before the reload: %v, want 200 200 401", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "revoked"), []byte("b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	server.cmd.Process.Signal(syscall.SIGHUP)
	server.await("msg=reloaded")
	if got := []int{push(old), push(gone), push(fresh)}; got[0] != 200 || got[1] != 401 || got[2] != 200 {
		t.Errorf("after the reload: %v, want 200 401 200", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "keys", "token.key"), []byte("nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	server.cmd.Process.Signal(syscall.SIGHUP)
	server.await("reload failed")
	if got := []int{push(old), push(gone), push(fresh)}; got[0] != 200 || got[1] != 401 || got[2] != 200 {
		t.Errorf("after a reload that failed: %v, want 200 401 200", got)
	}
	if strings.Contains(server.text(), "nonsense") {
		t.Error("the log shows what is in a key file")
	}
	if body := get(t, "http://"+server.await(internalAddr)+"/metrics"); !strings.Contains(body, `telemeter_reloads_total{result="failed"} 1`) {
		t.Error("the failed reload is not counted")
	}
}

// A first certificate takes a restart, which is said; all else is reloaded.
func TestReloadFirstCertificate(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	server := startServer(t, dir)
	get(t, "http://"+server.await(internalAddr)+"/healthz") // it listens to signals from then on
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "localhost")
	server.cmd.Process.Signal(syscall.SIGHUP)
	server.await("msg=reloaded")
	if text := server.text(); !strings.Contains(text, "until this server is restarted") || strings.Contains(text, "reload failed") {
		t.Errorf("it says:\n%s", text)
	}
}

var update = flag.Bool("update", false, "write the README's lists of flags anew")

// The README's lists of flags are what --help prints, but for its example.
func TestREADMEFlags(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	readme := string(text)
	for _, mode := range []string{"server", "client", "keygen", "token"} {
		var out, stderr bytes.Buffer
		if code := run(t.Context(), time.Now, []string{"--mode", mode, "--help"}, &out, &stderr); code != exitOK {
			t.Fatalf("--mode %s --help: exit %d: %s", mode, code, &stderr)
		}
		want, _, _ := strings.Cut(out.String(), "\nExample:")
		want = "```\n" + want + "```\n"
		have := regexp.MustCompile("(?s)```\ntelemeter --mode " + mode + ": .*?```\n").FindString(readme)
		if have != want {
			t.Errorf("the README's flags of --mode %s are not those of --help; write them by: go test -run README -update", mode)
		}
		readme = strings.Replace(readme, have, want, 1)
	}
	if *update {
		if err := os.WriteFile("README.md", []byte(readme), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// A request in flight at SIGTERM is answered.
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
	if _, err := io.WriteString(w, "a 1\n"); err != nil { // returns when the request is under way
		t.Fatal(err)
	}
	internal := "http://" + server.await(internalAddr)
	deadline := time.Now().Add(30 * time.Second)
	for !strings.Contains(get(t, internal+"/metrics"), "telemeter_pushes_in_flight 1") {
		if time.Now().After(deadline) {
			t.Fatal("the push did not begin")
		}
	}
	server.cmd.Process.Signal(syscall.SIGTERM)
	server.await("msg=stopping")
	w.Close()
	if got := <-status; got != "200 OK" {
		t.Errorf("the push in flight got %s", got)
	}
	if code := server.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("exit %d", code)
	}
}

// Fifty times a server is killed while four sites push: every sample that was
// acknowledged is on disk at the end.
func TestKilledUnderLoad(t *testing.T) {
	const kills, sites = 50, 4
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	tokens := make([]string, sites)
	for i := range tokens {
		tokens[i] = strings.TrimSpace(mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", fmt.Sprint("site", i)))
	}
	begin := time.Now().UnixMilli()
	acked := make([][]int64, sites) // the times of the samples acknowledged, by site
	next := make([]int64, sites)
	total := 0
	for kill := range kills {
		server := startServer(t, dir, "--ratelimit", "0", "--limit-series", "100000")
		url := "http://" + server.await(externalAddr) + "/upload"
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var count atomic.Int64
		for i := range sites {
			wg.Go(func() {
				for ctx.Err() == nil {
					next[i]++
					at := begin - 60_000 + next[i]
					// A new series now and then, so that series records are cut too.
					body := fmt.Sprintf("steady{n=\"1\"} %d %d\nchurn{n=\"%d\"} %d %d\n", next[i], at, next[i]/3, next[i], at)
					req, err := http.NewRequestWithContext(ctx, "POST", url, strings.NewReader(body))
					if err != nil {
						t.Error(err)
						return
					}
					req.Header.Set("Authorization", "Bearer "+tokens[i])
					resp, err := http.DefaultClient.Do(req)
					if err != nil {
						return // killed
					}
					if resp.StatusCode == http.StatusOK {
						acked[i] = append(acked[i], at)
						count.Add(1)
					}
					resp.Body.Close()
				}
			})
		}
		// Killed after so many answers, not after a time: on a slow machine as well.
		want := int64(1 + rnd.IntN(40))
		deadline := time.Now().Add(30 * time.Second)
		for count.Load() < want && time.Now().Before(deadline) {
			time.Sleep(100 * time.Microsecond)
		}
		server.end(syscall.SIGKILL)
		cancel()
		wg.Wait()
		http.DefaultClient.CloseIdleConnections()
		if count.Load() < want {
			t.Fatalf("run %d: %d pushes accepted in 30 s:\n%s", kill, count.Load(), server.text())
		}
		total += int(count.Load())
	}
	var complaints []error
	store, err := OpenStore(StoreConfig{
		FS: DiskFS{}, Dir: filepath.Join(dir, "data"), Retention: 2 * time.Hour, MaxSampleAge: time.Hour, Now: time.Now,
		OnError: func(err error) { complaints = append(complaints, err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	for _, err := range complaints {
		t.Errorf("a kill left damage: %v", err)
	}
	for i := range sites {
		held := map[int64]int{} // samples by time
		for _, b := range store.sites[fmt.Sprint("site", i)].data.Batches {
			for k := range b.V {
				held[b.Time(k)]++
			}
		}
		for _, at := range acked[i] {
			if held[at] != 2 {
				t.Errorf("site %d: %d of 2 samples held that were acknowledged at %d", i, held[at], at)
			}
		}
	}
	t.Logf("%d pushes acknowledged in %d runs", total, kills)
}

// A client is killed again and again while its server is away: whatever its spool
// held at any of these moments is with the server in the end.
func TestClientKilledInOutage(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
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
		http.Error(w, "away", http.StatusBadGateway)
	}))
	defer front.Close()
	var scrapes atomic.Int64
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "n %d\n", scrapes.Add(1))
	}))
	defer source.Close()
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", front.URL)
	if err := os.WriteFile(filepath.Join(dir, "a.token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"--mode", "client", "--from", source.URL + "/metrics", "--token-file", "a.token",
		"--listen", "", "--interval", "1s", "--spool-dir", "spool"}
	spooled, backlog := map[float64]bool{}, 0
	for kill := 0; kill < 6 || len(spooled) < 3; kill++ {
		if kill == 60 {
			t.Fatalf("only %d scrapes were spooled in %d runs", len(spooled), kill)
		}
		client := start(t, dir, args...)
		before := scrapes.Load()
		want := before + 1 + int64(rnd.IntN(2))
		for deadline := time.Now().Add(30 * time.Second); scrapes.Load() < want; {
			if time.Now().After(deadline) {
				t.Fatalf("run %d: no scrape in 30 s:\n%s", kill, client.text())
			}
			time.Sleep(time.Millisecond)
		}
		if kill%2 == 0 { // to be anywhere in what follows a scrape
			time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
		} else {
			client.await("(scrapes are kept)")
		}
		client.end(syscall.SIGKILL)
		spool, err := OpenSpool(SpoolConfig{
			FS: DiskFS{}, Dir: filepath.Join(dir, "spool"), ClusterID: "a", Limit: 1 << 30, MaxAge: time.Hour, Now: func() Moment { return Moment{BootID: "test"} },
			OnError: func(err error) { t.Errorf("a kill left damage: %v", err) },
		})
		if err != nil {
			t.Fatal(err)
		}
		spool.ApplyAnswer(SpoolAnswer{}) // no server has any
		kept, err := spool.BeginPush(PushLimits{Bytes: 1 << 30, Text: 1 << 30, Scrapes: 1000})
		if err != nil {
			t.Fatal(err)
		}
		backlog = len(kept)
		for _, sc := range kept {
			var d Decompressor
			text, _, err := d.Decompress(sc.Gzip, "gzip", 1000)
			n := 0.0
			if _, e := fmt.Sscanf(string(text), "n %g ", &n); err != nil || e != nil {
				t.Fatalf("%q: %v, %v", text, err, e)
			}
			spooled[n] = true
		}
		if err := spool.Close(); err != nil {
			t.Fatal(err)
		}
	}
	up.Store(true)
	client := start(t, dir, args...)
	// Scrapes of this run may come while the backlog is on its way, each with a push of its
	// own at most.
	scraped, pushes := 0, 0
	said := client.await(`msg=pushed samples=\d+ (scrapes=\d+ pushes=\d+) `)
	if _, err := fmt.Sscanf(said, "scrapes=%d pushes=%d", &scraped, &pushes); err != nil || scraped-(pushes-1) < backlog {
		t.Errorf("the backlog of %d did not travel in one push: %s, %v", backlog, said, err)
	}
	client.end(syscall.SIGTERM)
	server.end(syscall.SIGTERM)
	store, err := OpenStore(StoreConfig{
		FS: DiskFS{}, Dir: filepath.Join(dir, "data"), Retention: 2 * time.Hour, MaxSampleAge: time.Hour, Now: time.Now,
		OnError: func(err error) { t.Error(err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	held := map[float64]bool{}
	for _, b := range store.sites["a"].data.Batches {
		for _, v := range b.V {
			held[v] = true
		}
	}
	for n := range spooled {
		if !held[n] {
			t.Errorf("scrape %v was spooled, and is nowhere", n)
		}
	}
	t.Logf("%d of %d scrapes were spooled, %d are held", len(spooled), scrapes.Load(), len(held))
}
