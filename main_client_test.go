package main

// Tests of the mode client, in which telemeter scrapes a Prometheus and pushes to a server. The
// client and the server run as processes of their own.

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// On SIGHUP a client reads its client certificate and the file of CA certificates for its server
// again. If one of the two files is bad, the client logs that the reload failed. After a reload
// with the right CA certificate, it pushes.
func TestClientRereadsCertificates(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "127.0.0.1")
	mustTool(t, dir, "--mode", "keygen", "--keys", "others", "--host", "127.0.0.1")
	server := startServer(t, dir)
	writeIn(t, dir, "token", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", "https://"+server.await(externalAddr)))
	writeIn(t, dir, "ca", readIn(t, dir, "others/"+TLSCertFile))
	writeIn(t, dir, "crt", readIn(t, dir, "keys/"+TLSCertFile))
	writeIn(t, dir, "key", readIn(t, dir, "keys/"+TLSKeyFile))
	client := start(t, dir, "--mode", "client", "--token-file", "token", "--from", "http://"+server.await(internalAddr)+"/metrics",
		"--to-ca-file", "ca", "--to-crt", "crt", "--to-key", "key", "--interval", "1s", "--listen", "127.0.0.1:0")
	client.await("destination failed.*certificate")
	for i, bad := range []string{"ca", "crt"} {
		good := readIn(t, dir, bad)
		writeIn(t, dir, bad, "nonsense")
		client.cmd.Process.Signal(syscall.SIGHUP)
		eventually(t, "the client reports the bad file "+bad, func() bool { return strings.Count(client.text(), "reload failed") == i+1 })
		writeIn(t, dir, bad, good)
	}
	if strings.Contains(client.text(), "msg=pushed") {
		t.Error("the client pushed to a server whose certificate no CA of --to-ca-file had signed")
	}
	writeIn(t, dir, "ca", readIn(t, dir, "keys/"+TLSCertFile))
	client.cmd.Process.Signal(syscall.SIGHUP)
	client.await("msg=pushed")
}

// At start and at a reload, a client warns of each file with a secret that every user may read.
func TestClientWarnsOfReadableSecrets(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "127.0.0.1")
	writeIn(t, dir, "token", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", "https://127.0.0.1:1"))
	writeIn(t, dir, "from-token", "secret")
	writeIn(t, dir, "salt", "0123456789abcdef")
	writeIn(t, dir, "key", readIn(t, dir, "keys/"+TLSKeyFile))
	writeIn(t, dir, "proxy-user", "me:secret")
	want := map[string]string{"token": "0644", "from-token": "0604", "salt": "0444", "key": "0664", "proxy-user": "0644"}
	for file, mode := range want {
		bits, err := strconv.ParseUint(mode, 8, 32)
		if err != nil {
			t.Fatal(err)
		}
		mustChmod(t, filepath.Join(dir, file), os.FileMode(bits))
	}
	client := start(t, dir, "--mode", "client", "--token-file", "token", "--from", "http://127.0.0.1:1", "--from-token-file", "from-token",
		"--anonymize-labels", "instance", "--anonymize-salt-file", "salt", "--to-crt", "keys/"+TLSCertFile, "--to-key", "key",
		"--to-proxy", "http://127.0.0.1:1", "--to-proxy-user-file", "proxy-user", "--interval", "1s", "--listen", "")
	client.await("source failed") // from now on the client handles SIGHUP
	checkSecretWarnings(t, client.text(), want)
	for file := range want {
		mustChmod(t, filepath.Join(dir, file), 0o640)
	}
	mustChmod(t, filepath.Join(dir, "salt"), 0o644)
	client.Reset()
	client.cmd.Process.Signal(syscall.SIGHUP)
	client.await("msg=reloaded")
	checkSecretWarnings(t, client.text(), map[string]string{"salt": "0644"})
}

// A client whose token file is not a token, or does not fit the flags, ends at start and says what
// the file is and what to do. It creates no spool directory.
func TestClientTokenFiles(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "127.0.0.1")
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a")
	const opaque = "SGVsbG8sIHdvcmxkISBIZWxsbywgd29ybGQhIDEyMzQ=" // 32 bytes in base64, as a key, and as a token of another service can be
	for _, tt := range []struct {
		name, content string
		args          []string
		code          int
		want          string
	}{
		{"missing", "", nil, exitFailure, "make a token on the hub with telemeter --mode token"},
		{"empty", "\n", nil, exitFailure, "is empty: make a token"},
		{"large", strings.Repeat("x", MaxToken+10), nil, exitFailure, "make a token"},
		{"html", "<!DOCTYPE html>\n<p>Not found</p>\n", nil, exitFailure, "is an HTML page"},
		{"html with flags", "<html>", []string{"--id", "a", "--to", "https://127.0.0.1:1"}, exitFailure, "is an HTML page"},
		{"certificate", readIn(t, dir, "keys/"+TLSCertFile), nil, exitFailure, "is a PEM file"},
		{"private key", readIn(t, dir, "keys/"+TLSKeyFile), nil, exitFailure, "is a PEM file"},
		{"key file", readIn(t, dir, "keys/"+TokenKeyFile), nil, exitFailure, "must not leave the hub"},
		{"key file in one line", opaque, nil, exitFailure, "must not leave the hub"},
		{"two tokens", token + token, nil, exitFailure, "has several tokens"},
		{"comment", "# site a\n" + token, nil, exitFailure, "has other text besides the token"},
		{"cut", token[:len(token)/2], nil, exitFailure, "has other text besides the token, or a damaged token"},
		{"words", "two words", nil, exitFailure, "has spaces"},
		{"password", "hunter2", nil, exitUsage, "--authorize"},
		{"no server", token, nil, exitUsage, "the token names no server: pass --to https://HUB:9003, or make a token with --to"},
		{"opaque token with flags", opaque, []string{"--id", "a", "--to", "https://127.0.0.1:1"}, exitFailure, "connection refused"},
		{"no pin", token, []string{"--to", "https://127.0.0.1:1"}, exitFailure, "a CA of this system must have signed the servers' certificate"},
	} {
		if tt.content != "" {
			writeIn(t, dir, "token", tt.content)
		}
		spool := "spool of " + tt.name
		_, stderr, code := tool(t, dir, append([]string{"--mode", "client", "--from", "http://127.0.0.1:1", "--token-file", "token", "--once", "--interval", "1s", "--spool-dir", spool}, tt.args...)...)
		if tt.want == "connection refused" || tt.name == "no pin" {
			spool = "" // this token is accepted at start, so the spool is opened
		}
		if code != tt.code || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: exit %d, want %d and %q:\n%s", tt.name, code, tt.code, tt.want, stderr)
		}
		if strings.Contains(stderr, strings.TrimSpace(token)) || strings.Contains(stderr, opaque) {
			t.Errorf("%s: the error quotes the secret:\n%s", tt.name, stderr)
		}
		if _, err := os.Stat(filepath.Join(dir, spool)); spool != "" && err == nil {
			t.Errorf("%s: the failed start left a spool directory", tt.name)
		}
	}
}

// If the server's certificate cannot be trusted, the error says what to do about it, and the client
// does not go on trying until the end of --once. A token with the pin of the new certificate works
// after SIGHUP.
func TestClientDistrust(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "127.0.0.1")
	mustTool(t, dir, "--mode", "keygen", "--keys", "others", "--host", "127.0.0.1")
	server := startServer(t, dir)
	source, addr := "http://"+server.await(internalAddr)+"/metrics", server.await(externalAddr)
	url, otherName := "https://"+addr, "https://localhost"+strings.TrimPrefix(addr, "127.0.0.1")
	writeIn(t, dir, "no-pin", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a"))
	writeIn(t, dir, "token", mustTool(t, dir, "--mode", "token", "--keys", "others", "--id", "a", "--to", url))
	for _, tt := range []struct {
		name string
		args []string
		want string
	}{
		{"no pin", []string{"--token-file", "no-pin", "--to", url}, "restart with --to-ca-file"},
		{"other CA", []string{"--token-file", "no-pin", "--to-ca-file", "others/" + TLSCertFile, "--to", url}, "no CA in --to-ca-file others/tls.crt has signed"},
		{"other name", []string{"--token-file", "no-pin", "--to-ca-file", "keys/" + TLSCertFile, "--to", otherName}, "--mode keygen --host"},
		{"other pin", []string{"--token-file", "token"}, "either someone intercepts the connection, or the hub has new keys"},
	} {
		begin := time.Now()
		_, stderr, code := tool(t, dir, append([]string{"--mode", "client", "--from", source, "--once", "--interval", "5m", "--spool-age", "10m"}, tt.args...)...)
		if code != exitFailure || strings.Count(stderr, tt.want) != 2 || time.Since(begin) > time.Minute {
			t.Errorf("%s: exit %d after %v, want %d soon and %q in the log and in the error:\n%s", tt.name, code, time.Since(begin), exitFailure, tt.want, stderr)
		}
	}
	client := start(t, dir, "--mode", "client", "--from", source, "--token-file", "token", "--interval", "2s", "--listen", "")
	client.await("level=ERROR .*either someone intercepts")
	writeIn(t, dir, "token", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", url))
	client.cmd.Process.Signal(syscall.SIGHUP)
	client.await("msg=pushed")
}

// White space around the token in --token-file does not matter, such as the blank line of an editor
// or the line ends of Windows.
func TestTokenFileWhiteSpace(t *testing.T) {
	dir := t.TempDir()
	writeIn(t, dir, "token", "\r\n "+signToken(t, testKeys(t, 1), Token{Kind: KindClient, ClusterID: "a", ID: NewTokenID()})+"\r\n\n")
	status, _, stderr := runMode(t, "--mode", "client", "--from", startTextSource(t), "--token-file", filepath.Join(dir, "token"), "--to", startPlainHub(t),
		"--once", "--interval", "1s", "--spool-dir", filepath.Join(dir, "spool"))
	if status != exitOK || !strings.Contains(stderr, "msg=pushed") {
		t.Errorf("exit status %d, want %d and a push:\n%s", status, exitOK, stderr)
	}
}

// The values of --from replace its default, and a URL without a path is that of a Prometheus. The flag
// --backfill has a default, takes 0, and takes no negative value. It counts for --dry-run only if it is
// given.
func TestClientSourceFlags(t *testing.T) {
	for _, tt := range []struct {
		args, sources        string
		backfill, ofDryRun   time.Duration
		problem, isNoProblem string // texts that the problems have, and do not have
	}{
		{"", "[http://localhost:9090/federate]", 2 * time.Hour, 0, "", "--from"},
		{"--from http://a", "[http://a/federate]", 2 * time.Hour, 0, "", "--from"},
		{"--from http://b/ --from https://a/x/federate --from http://c/prometheus/federate?x=y", "[http://b/federate https://a/x/federate http://c/prometheus/federate?x=y]", 2 * time.Hour, 0, "", "--from"},
		{"--from http://a/federate?match[]=up --from http://b/federate?match[]=up", "[http://a/federate?match[]=up http://b/federate?match[]=up]", 2 * time.Hour, 0, "", "--from"},
		{"--from http://a/federate?match[]=up --from http://b", "[http://a/federate?match[]=up http://b/federate]", 2 * time.Hour, 0, "--from: the URL of b has other match[] parameters", "--backfill"},
		{"--from http://a --from http://b?match[]=up", "[http://a/federate http://b/federate?match[]=up]", 2 * time.Hour, 0, "--from: the URL of b has other match[] parameters", "--backfill"},
		{"--backfill 0", "[http://localhost:9090/federate]", 0, 0, "", "--backfill"},
		{"--backfill 1d --spool-age 1d --dry-run", "[http://localhost:9090/federate]", 24 * time.Hour, 24 * time.Hour, "", "--backfill"},
		{"--backfill 3h", "[http://localhost:9090/federate]", 3 * time.Hour, 0, "--backfill must be at most --spool-age", "--from"},
		{"--backfill 5m --once", "[http://localhost:9090/federate]", 0, 0, "--backfill has no effect with --once", "--from"},
		{"--once", "[http://localhost:9090/federate]", 0, 0, "", "--backfill"},
		{"--backfill 0 --dry-run", "[http://localhost:9090/federate]", 0, 0, "", "--backfill"},
		{"--dry-run", "[http://localhost:9090/federate]", 2 * time.Hour, 0, "", "--backfill"},
		{"--backfill -1s", "[http://localhost:9090/federate]", -time.Second, 0, "--backfill must be 0 or more", "--from"},
		{"--from http://a --from https://b --from-crt c --from-key k", "[http://a/federate https://b/federate]", 2 * time.Hour, 0, "", "--from-crt has no effect"},
		{"--from http://a --from http://b --from-crt c --from-key k", "[http://a/federate http://b/federate]", 2 * time.Hour, 0, "--from-crt has no effect", "--backfill"},
	} {
		c := newCommand("client", strings.Fields(tt.args), io.Discard, io.Discard)
		var f clientFlags
		f.define(c)
		if err := c.parseArgs(); err != nil {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		f.fillAndCheck(c)
		problems := strings.Join(c.problems, "; ")
		if got := fmt.Sprint(f.sources); got != tt.sources || f.from != f.sources[0] || f.backfill != tt.backfill || f.dryBackfill != tt.ofDryRun {
			t.Errorf("%s: the sources are %s, first %v, and --backfill is %v, for --dry-run %v; want %s, %v and %v", tt.args, got, f.from, f.backfill, f.dryBackfill, tt.sources, tt.backfill, tt.ofDryRun)
		}
		if !strings.Contains(problems, tt.problem) || strings.Contains(problems, tt.isNoProblem) {
			t.Errorf("%s: the problems are %q; want %q, and not %q", tt.args, problems, tt.problem, tt.isNoProblem)
		}
	}
}
