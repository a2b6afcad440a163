package main

// Tests of the mode load on real servers, with the report and the exit status that an operator sees.

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// startLoadServer starts a server on free ports of the loopback address, and returns the directory
// of its keys, and the URLs of its listeners.
func startLoadServer(t *testing.T, args ...string) (keys, external, internal string) {
	t.Helper()
	dir := t.TempDir()
	keys = filepath.Join(dir, "keys")
	if status, _, stderr := runMode(t, "--mode", "keygen", "--keys", keys, "--host", "127.0.0.1"); status != exitOK {
		t.Fatal(stderr)
	}
	log := startMode(t, append([]string{"--mode", "server", "--keys", keys, "--listen", "127.0.0.1:0", "--listen-internal", "127.0.0.1:0", "--storage-dir", filepath.Join(dir, "data")}, args...)...)
	return keys, "https://" + awaitLog(t, log, externalAddr), "http://" + awaitLog(t, log, internalAddr)
}

// Every format and encoding is accepted by a server. Its series are served with the sites' cluster
// IDs. The report is on stdout, and stderr warns where the samples go.
func TestLoad(t *testing.T) {
	keys, external, internal := startLoadServer(t)
	for i, args := range []string{"", "--format protobuf", "--encoding snappy --spool=false", "--format protobuf --encoding identity --reconnect"} {
		prefix := []string{"p", "q", "r", "s"}[i]
		status, stdout, stderr := runMode(t, append([]string{"--mode", "load", "--keys", keys, "--to", external, "--sites", "3", "--series", "20", "--pushes", "2", "--prefix", prefix}, strings.Fields(args)...)...)
		if status != exitOK || !strings.Contains(stdout, "samples   120 accepted") || !strings.Contains(stdout, "answer 200 6 pushes\n") || strings.Contains(stdout, "held already") {
			t.Errorf("%s: exit status %d: %s\n%s", args, status, stderr, stdout)
		}
		if want := "the sites " + prefix + "-000001 to " + prefix + "-000003 stay in alerts"; !strings.Contains(stderr, want) || strings.Contains(stderr, "a second") {
			t.Errorf("%s: stderr lacks the warning %q, or has the progress although it is no terminal: %s", args, want, stderr)
		}
		if n := strings.Count(get(t, internal+"/federate"), `_id="`+prefix+`-000003",container=`); n != 20 {
			t.Errorf("%s: the server serves %d series of the last site, want 20", args, n)
		}
	}
}

// With the token of one site, the mode pushes as this site to the servers of the token.
func TestLoadWithToken(t *testing.T) {
	keys, external, internal := startLoadServer(t)
	file := filepath.Join(t.TempDir(), "token")
	_, token, _ := runMode(t, "--mode", "token", "--keys", keys, "--id", "site-7", "--to", external)
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	status, stdout, stderr := runMode(t, "--mode", "load", "--token-file", file, "--pushes", "1", "--series", "9")
	if status != exitOK || !strings.Contains(stdout, "samples   9 accepted") || !strings.Contains(stderr, "the site site-7 stays in alerts") {
		t.Errorf("exit status %d: %s\n%s", status, stderr, stdout)
	}
	if !strings.Contains(get(t, internal+"/federate"), `_id="site-7",container=`) {
		t.Error("the server does not serve the series of the site")
	}
}

// A push that is not answered with 200, and a sample that a server drops, make the exit status 1. The
// report says what to do.
func TestLoadFails(t *testing.T) {
	keys, external, _ := startLoadServer(t, "--ratelimit", "1h", "--limit-series", "10")
	base := []string{"--mode", "load", "--keys", keys, "--to", external, "--sites", "1"}
	for _, c := range []struct{ args, stdout, stderr string }{
		{"--series 12 --pushes 1", "samples   2 dropped by the servers: series_limit", "servers dropped samples of the pushes"},
		{"--series 9 --pushes 70", "start the servers with --ratelimit 0", "pushes failed"},
	} {
		status, stdout, stderr := runMode(t, append(base, strings.Fields(c.args)...)...)
		if status != exitFailure || !strings.Contains(stdout, c.stdout) || !strings.Contains(stderr, c.stderr) {
			t.Errorf("%s: exit status %d, want %d, %q and %q:\n%s%s", c.args, status, exitFailure, c.stdout, c.stderr, stdout, stderr)
		}
	}
}

// A run that cannot work ends at the first push, although --duration is long. The reason and what to
// do are on stderr, and there is no report.
func TestLoadStopsAtOnce(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	revoked := filepath.Join(dir, "revoked")
	if err := os.WriteFile(revoked, []byte("gone-000001\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	keys, external, internal := startLoadServer(t, "--revoked-file", revoked)
	_, token, _ := runMode(t, "--mode", "token", "--keys", keys, "--id", "site-7", "--to", external)
	other := filepath.Join(dir, "other")
	runMode(t, "--mode", "keygen", "--keys", other, "--host", "127.0.0.1")
	_, otherToken, _ := runMode(t, "--mode", "token", "--keys", other, "--id", "site-7", "--to", external)
	for name, text := range map[string]string{"token": token, "other.token": otherToken} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	withKeys := "--keys " + keys + " "
	for _, c := range []struct{ args, want string }{
		{withKeys + "--to https://127.0.0.1:1", "connection refused: check the address in --to"},
		{withKeys + "--to https://none.invalid:1", "no such host: check the address in --to"},
		{withKeys + "--sites 2 --to " + external + " --to https://127.0.0.1:1", "the first push to https://127.0.0.1:1 failed"},
		{withKeys + "--to " + strings.Replace(external, "https", "http", 1), "write https:// instead of http://"},
		{withKeys + "--to " + strings.Replace(internal, "http", "https", 1), "write http:// instead of https://"},
		{withKeys + "--to " + internal, "--to must be the address of --listen"},
		{withKeys + "--series 20000 --encoding identity --to " + external, "use fewer --series"},
		{withKeys + "--prefix gone --to " + external, "use another --prefix"},
		{"--keys other --to " + external, "does not match --keys other's pin: either someone intercepts the connection, or the hub has new keys; if it has, pass the keys directory of these servers as --keys"},
		{"--keys other --to-ca-file " + keys + "/tls.crt --to " + external, "make sure that --keys are the keys of these servers"},
		{"--keys " + keys + " --to-ca-file other/tls.crt --to " + external, "replace the file with the server's certificate or its CA, and start the run again"},
		{"--token-file other.token", "if it has, make a new token on the hub"},
		{"--token-file other.token --to-ca-file " + keys + "/tls.crt", "make a new token on the hub"},
	} {
		status, stdout, stderr := runMode(t, append([]string{"--mode", "load", "--duration", "1h"}, strings.Fields(c.args)...)...)
		if status != exitFailure || stdout != "" || !strings.Contains(stderr, c.want) || strings.Contains(stderr, "SIGHUP") {
			t.Errorf("%s: exit status %d, want %d without a report, and %q:\n%s%s", c.args, status, exitFailure, c.want, stdout, stderr)
		}
	}
	// The token itself works, and a number of pushes can bound the run in place of --duration.
	if status, stdout, stderr := runMode(t, "--mode", "load", "--token-file", "token", "--duration", "0", "--pushes", "2"); status != exitOK || !strings.Contains(stdout, "answer 200 2 pushes\n") {
		t.Errorf("exit status %d: %s%s", status, stdout, stderr)
	}
}

// A single site has a warning in the singular.
func TestLoadWarning(t *testing.T) {
	f := loadFlags{keys: "keys", prefix: "x"}
	if got := f.describeSites(LoadConfig{Tokens: make([]string, 1)}); got != "the site x-000001 stays" {
		t.Error(got)
	}
}

// The tokens of load sites are upload tokens that expire an hour after the run.
func TestLoadTokens(t *testing.T) {
	dir := t.TempDir()
	keygenIn(t, dir)
	f := loadFlags{keys: filepath.Join(dir, "keys"), sites: 2, prefix: "x", duration: time.Minute}
	tokens, err := f.makeTokens(testNow)
	if err != nil || len(tokens) != 2 {
		t.Fatal(tokens, err)
	}
	keys, err := readKeyFile(f.keys, TokenKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	got, err := keys.Verify(tokens[1], testNow)
	if err != nil || got.ClusterID != "x-000002" || got.Kind != KindUpload || got.Expires != testNow.Add(time.Hour+time.Minute).Unix() {
		t.Errorf("the second token is %+v, %v", got, err)
	}
}

// A file and a buffer are no terminals.
func TestIsTerminal(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if isTerminal(file) || isTerminal(io.Discard) {
		t.Error("a file or a writer that is no file is a terminal")
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if !isTerminal(null) {
		t.Errorf("%s is a character device", os.DevNull)
	}
}
