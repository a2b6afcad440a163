package main

// The server's command line as an operator meets it: conflicts in one message, help that lists
// everything, and one server from keygen to SIGTERM with all that SIGHUP rereads in between.

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"flag"
	"io"
	"maps"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// runMode runs telemeter in this process until it ends.
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

func TestServerConflicts(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args string
		want []string // all in one message
	}{
		{"", []string{"--keys DIR is missing", "keygen"}},
		{"--keys k --listen 9003", []string{"--listen: ", "9003"}},
		{"--keys k --listen-internal localhost", []string{"--listen-internal: "}},
		{"--keys k --listen-internal :9004", []string{"--listen-internal :9004 can be reached from other hosts", "--federate-token-file", "--internal-open"}},
		{"--keys k --listen-internal 0.0.0.0:1", []string{"can be reached"}},
		{"--keys k --internal-open --federate-token-file f", []string{"contradict"}},
		{"--keys k --label a --label __x=1", []string{`"a" is not NAME=VALUE`}},
		{"--keys k --label _id=x", []string{`--label: label name "_id" is reserved`}},
		{"--keys k --elide-label _id", []string{`--elide-label: label name "_id" is reserved`}},
		{"--keys k --elide-label a.b", []string{"--elide-label"}},
		{"--keys k --required-label =x", []string{"--required-label"}},
		{"--keys k --allow {} --authorize ftp://x", []string{"--allow: selector", "--authorize: ftp://x"}},
		{"--keys k --authorize https://", []string{"--authorize"}},
		{"--retention 0s --max-sample-age -1s --ratelimit -1s --limit-bytes 1 --limit-series 0 --limit-clusters 0 --limit-samples -1 --limit-scrape 0 more",
			[]string{"--keys", "--retention", "--max-sample-age", "--ratelimit", "--limit-bytes", "--limit-series", "--limit-clusters", "--limit-samples", "--limit-scrape", `"more"`}},
		{"--retention 1000h", []string{"--retention is above 0 and at most 480h"}},
		{"--limit-bytes 65MiB --keys k", []string{"--limit-bytes is from 1KiB to 64MiB"}},
		{"--limit-bytes 1MB", []string{"limit-bytes", "not a number of bytes, such as 1048576 or 1MiB"}},
		{"--limit-storage -1", []string{"limit-storage"}},
		{"--log-level loud", []string{"log-level"}},
		{"--retention soon", []string{"retention"}},
		{"--no-such-flag", []string{"no-such-flag"}},
		{"--key k --lisen=:1 --listen-internal :9004 more ---x --internal-open=maybe --retention 2d",
			[]string{"-key\n", "-lisen\n", `"more"`, "---x", `"maybe"`, `"2d"`}},
		{"--key k --listen-internal :9004 more --limit-bytes 1", []string{"-key\n", "--keys DIR is missing", "--federate-token-file", `"more"`, "--limit-bytes is from"}},
		{"--keys k --mode client", []string{"--mode server and --mode client are two"}},
	} {
		args := append([]string{"--mode", "server", "--storage-dir", filepath.Join(dir, "storage")}, strings.Fields(c.args)...)
		status, stdout, stderr := runMode(t, args...)
		if status != exitUsage || stdout != "" {
			t.Errorf("%s: exit status %d, stdout %q, stderr %q", c.args, status, stdout, stderr)
		}
		for _, want := range append(c.want, "telemeter --mode server --help") {
			if !strings.Contains(stderr, want) {
				t.Errorf("%s: %q is not in:\n%s", c.args, want, stderr)
			}
		}
		if strings.Contains(stderr, `argument "k"`) {
			t.Errorf("%s: the value of a flag that is not known is told as well:\n%s", c.args, stderr)
		}
		if strings.Count(stderr, "needs a change") != 1 {
			t.Errorf("%s: not one message:\n%s", c.args, stderr)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("a conflict left %v %v", left, err)
	}
}

// TestServerStartFails: what only files can tell is an exit status of 1, names
// what was wrong, and leaves no storage directory.
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
		{"--keys " + half, "tls.crt"}, // and not plain HTTP
		{"--keys " + keys + " --revoked-file " + filepath.Join(dir, "none"), "revocations"},
		{"--keys " + keys + " --revoked-file " + file("revoked", "ok\nno such id\n"), "line 2"},
		{"--keys " + keys + " --allow-file " + file("allow", "# nothing\n"), "holds no selector"},
		{"--keys " + keys + " --federate-token-file " + file("empty", "\n"), "is empty"},
		{"--keys " + keys + " --federate-token-file " + file("two", "a\nb\n"), "more than a token"},
		{"--keys " + keys + " --tls-client-ca " + file("ca", "no PEM"), "no PEM certificate"},
	} {
		status, _, stderr := runMode(t, append([]string{"--mode", "server", "--storage-dir", storage}, strings.Fields(c.args)...)...)
		if status != exitFailure || !strings.Contains(stderr, c.want) || strings.Contains(stderr, secret) {
			t.Errorf("%s: exit status %d:\n%s", c.args, status, stderr)
		}
	}
	if _, err := os.Stat(storage); !os.IsNotExist(err) {
		t.Errorf("a start that failed left a storage directory: %v", err)
	}
}

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
		n := 0
		c.VisitAll(func(f *flag.Flag) {
			if f.Name == "mode" {
				return
			}
			if n++; !regexp.MustCompile(`(?m)^  --` + f.Name + `\b`).MatchString(help) {
				t.Errorf("help does not list --%s", f.Name)
			}
		})
		if n < 24 {
			t.Errorf("%d flags", n)
		}
		text := strings.Join(strings.Fields(help), " ")
		for _, want := range []string{
			"(default :9003)", "(default localhost:9004)", "(default telemeter-data)", "(default 2h)", "(default 10m)", "(default 1s)", "(default 1MiB)",
			"(default 20000)", "(default 500000)", "(default INFO)", "Example: telemeter --mode server",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("help does not say %s", want)
			}
		}
		for line := range strings.Lines(help) {
			if len(strings.TrimRight(line, "\n")) > 110 {
				t.Errorf("a line of %d columns: %s", len(line), line)
			}
		}
	}
}

// TestServerLife: from keygen to SIGTERM, with everything that SIGHUP rereads.
func TestServerLife(t *testing.T) {
	// What is sent before the server listens for it must not end the tests.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)

	dir := t.TempDir()
	keys := filepath.Join(dir, "keys")
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	must := func(args ...string) string {
		t.Helper()
		status, out, stderr := runMode(t, args...)
		if status != exitOK {
			t.Fatalf("%q: %d %s", args, status, stderr)
		}
		return strings.TrimSpace(out)
	}
	must("--mode", "keygen", "--keys", keys, "--host", "127.0.0.1")
	token := must("--mode", "token", "--keys", keys, "--id", "site-7", "--ttl", "1h", "--label", "region=eu", "--to", "https://127.0.0.1:1")
	write(path("revoked"), "")
	write(path("allow"), `{__name__!="secret",__name__!=""}`)
	write(path("federate-token"), "first\n")

	var stderr logBuffer
	start := func() (stop func()) {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan int, 1)
		go func() {
			ended <- run(ctx, time.Now, []string{"--mode", "server", "--keys", keys, "--listen", "127.0.0.1:0", "--listen-internal", "127.0.0.1:0", "--storage-dir", path("storage"),
				"--revoked-file", path("revoked"), "--allow-file", path("allow"), "--federate-token-file", path("federate-token"), "--label", "hub=h1"}, io.Discard, &stderr)
		}()
		return func() {
			t.Helper()
			cancel()
			if status := <-ended; status != exitOK {
				t.Errorf("exit status %d:\n%s", status, stderr.String())
			}
		}
	}
	serving := regexp.MustCompile(`msg=serving .*external=(\S+) tls=true internal=(\S+) storage=(/\S+)`)
	addresses := func(n int) []string {
		t.Helper()
		eventually(t, "the server serves", func() bool { return len(serving.FindAllString(stderr.String(), -1)) == n })
		return serving.FindAllStringSubmatch(stderr.String(), -1)[n-1]
	}
	stop := start()
	at := addresses(1)
	client := func() *http.Client {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(keys, TLSCertFile))
		if err != nil {
			t.Fatal(err)
		}
		pin, err := PinFromPEM(b)
		if err != nil {
			t.Fatal(err)
		}
		config, err := PinnedTLS(pin)
		if err != nil {
			t.Fatal(err)
		}
		return NewHTTPClient(config, 10*time.Second, 10*time.Second)
	}
	do := func(c *http.Client, method, url, token, body string) (int, string, error) {
		req, err := http.NewRequest(method, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
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
	push := func(c *http.Client, token, body string) (int, string) {
		t.Helper()
		status, answer, err := do(c, "POST", "https://"+at[1]+"/upload", token, body)
		if err != nil {
			t.Fatal(err)
		}
		return status, answer
	}
	federate := func(token string) (int, string) {
		t.Helper()
		status, answer, err := do(http.DefaultClient, "GET", "http://"+at[2]+"/federate", token, "")
		if err != nil {
			t.Fatal(err)
		}
		return status, answer
	}
	reload := func(message string) {
		t.Helper()
		n := strings.Count(stderr.String(), message)
		syscall.Kill(os.Getpid(), syscall.SIGHUP)
		eventually(t, message, func() bool { return strings.Count(stderr.String(), message) == n+1 })
	}

	c := client()
	if status, answer := push(c, token, "up 1\nsecret 1\n"); status != 200 || !strings.Contains(answer, `"dropped":{"not_allowed":1}`) {
		t.Fatalf("%d %s", status, answer)
	}
	const line = `up{_id="site-7",hub="h1",instance="",job="",region="eu"} 1 `
	if status, text := federate("first"); status != 200 || !strings.Contains(text, line) || !strings.Contains(text, "telemeter_cluster_token_expiry_seconds{") {
		t.Fatalf("%d %s", status, text)
	}
	if status, _ := federate("second"); status != 401 {
		t.Errorf("another federate token: %d", status)
	}

	// Each file that is broken keeps all that was loaded before.
	broken := map[string]string{
		filepath.Join(keys, TokenKeyFile): "garbage\n", path("revoked"): "a b c\n", path("allow"): "{", path("federate-token"): "",
		filepath.Join(keys, TLSCertFile): "garbage", filepath.Join(keys, TLSKeyFile): "",
	}
	for _, file := range slices.Sorted(maps.Keys(broken)) {
		good, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		// A good change beside the bad one is not taken either.
		if file != path("federate-token") {
			write(path("federate-token"), "second")
		}
		write(file, broken[file])
		reload("reload failed")
		if status, answer := push(c, token, "up 2\n"); status != 200 {
			t.Errorf("after a bad %s: %d %s", filepath.Base(file), status, answer)
		}
		if status, _ := federate("first"); status != 200 {
			t.Errorf("after a bad %s: federate %d", filepath.Base(file), status)
		}
		write(file, string(good))
		write(path("federate-token"), "first")
	}

	// Everything changes.
	must("--mode", "keygen", "--keys", keys, "--rotate", "token")
	gone := must("--mode", "token", "--keys", keys, "--id", "site-8", "--to", "https://127.0.0.1:1")
	write(path("revoked"), "site-8\n")
	write(path("allow"), "{__name__!=\"\"}")
	write(path("federate-token"), "second")
	for _, name := range []string{TLSCertFile, TLSKeyFile} {
		if err := os.Remove(filepath.Join(keys, name)); err != nil {
			t.Fatal(err)
		}
	}
	must("--mode", "keygen", "--keys", keys, "--host", "127.0.0.1")
	reload("msg=reloaded")
	if _, _, err := do(c, "POST", "https://"+at[1]+"/upload", token, ""); err == nil {
		t.Error("the old certificate is still shown")
	}
	c = client()
	if status, answer := push(c, token, "secret 1\n"); status != 200 || !strings.Contains(answer, `"accepted":1`) {
		t.Errorf("a token of the old key: %d %s", status, answer)
	}
	if status, _ := push(c, gone, "up 1\n"); status != 401 {
		t.Errorf("a revoked cluster: %d", status)
	}
	if status, _ := federate("first"); status != 401 {
		t.Errorf("the old federate token: %d", status)
	}
	if status, text := federate("second"); status != 200 || !strings.Contains(text, "secret{") {
		t.Errorf("the new federate token: %d %s", status, text)
	}
	// An upload token is signed by the new key.
	status, answer, err := do(c, "POST", "https://"+at[1]+"/authorize?id=site-7", token, "")
	var a struct{ Token string }
	if err != nil || status != 200 || json.Unmarshal([]byte(answer), &a) != nil {
		t.Fatalf("%d %s %v", status, answer, err)
	}
	old, _ := ParseUnverifiedToken(token)
	if now, err := ParseUnverifiedToken(a.Token); err != nil || now.KeyID == old.KeyID {
		t.Errorf("after the rotation key %s signs: %v", now.KeyID, err)
	}
	if _, text, _ := do(http.DefaultClient, "GET", "http://"+at[2]+"/metrics", "second", ""); !strings.Contains(text, `telemeter_reloads_total{result="failed"} 6`) || !strings.Contains(text, `telemeter_reloads_total{result="ok"} 1`) {
		t.Errorf("reloads are not counted:\n%s", text)
	}

	// A second server may not have the same storage.
	if status, _, errs := runMode(t, "--mode", "server", "--keys", keys, "--storage-dir", path("storage"), "--listen", "127.0.0.1:0", "--listen-internal", "127.0.0.1:0"); status != exitFailure || !strings.Contains(errs, "in use") {
		t.Errorf("a second server on the same storage: %d %s", status, errs)
	}
	stop()
	if _, err := tls.Dial("tcp", at[1], &tls.Config{InsecureSkipVerify: true}); err == nil {
		t.Error("still listening")
	}
	// What was accepted is there after a restart.
	stop = start()
	at = addresses(2)
	if status, text := federate("second"); status != 200 || !strings.Contains(text, `up{_id="site-7",`) || !strings.Contains(text, "secret{") {
		t.Errorf("after a restart: %d %s", status, text)
	}
	stop()
	for _, secret := range []string{token, gone, a.Token, "first", "second"} {
		if strings.Contains(stderr.String(), secret) {
			t.Errorf("the log holds %q", secret)
		}
	}
}
