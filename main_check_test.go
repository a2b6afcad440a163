package main

// Tests of --check: what it prints for good and for faulty files, sources and servers, that it
// agrees with a start, and that it changes nothing.

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// filesBelow returns the paths of all files and directories below dir, with their modification
// times.
func filesBelow(t *testing.T, dir string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		files = append(files, fmt.Sprint(path, " ", info.ModTime()))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// checkLines runs telemeter with args and --check, and fails the test unless the exit status is
// status, stdout contains each of want, and no file below dir has changed.
func checkLines(t *testing.T, dir string, args []string, status int, want ...string) {
	t.Helper()
	before := filesBelow(t, dir)
	got, stdout, stderr := runMode(t, append(slices.Clip(args), "--check")...)
	if got != status {
		t.Errorf("%q --check: exit status %d, want %d:\n%s%s", args, got, status, stdout, stderr)
	}
	for _, text := range want {
		if !strings.Contains("\n"+stdout, "\n"+text) && !strings.Contains(stdout, text) {
			t.Errorf("%q --check prints no %q:\n%s%s", args, text, stdout, stderr)
		}
	}
	for line := range strings.Lines(stdout) {
		if !strings.HasPrefix(line, "ok   ") && !strings.HasPrefix(line, "WARN ") && !strings.HasPrefix(line, "FAIL ") {
			t.Errorf("%q --check prints the line %q", args, line)
		}
	}
	if failed := strings.Contains("\n"+stdout, "\nFAIL "); failed != (got == exitFailure) || failed != strings.Contains(stderr, "checks failed") {
		t.Errorf("%q --check: exit status %d, but stdout is\n%sand stderr %q", args, got, stdout, stderr)
	}
	if after := filesBelow(t, dir); !slices.Equal(before, after) {
		t.Errorf("%q --check changed files:\nbefore %q\nafter  %q", args, before, after)
	}
}

// --check of a server prints what the files say. It works before the first start and beside a
// running server, which it does not disturb.
func TestCheckServer(t *testing.T) {
	s := newModeServer(t)
	args := []string{"--mode", "server", "--keys", s.path("keys"), "--storage-dir", s.path("storage"), "--revoked-file", s.path("revoked"),
		"--allow-file", s.path("allow"), "--federate-token-file", s.path("federate-token"), "--listen-cluster", ":21599", "--limit-storage", "1000000GiB"}
	lines := []string{
		"ok   flags\n", "ok   " + s.path("keys/token.key") + ": key IDs ", "ok   " + s.path("keys/cluster.key") + ": key IDs ",
		"ok   " + s.path("keys/tls.crt") + ": fits tls.key; for 127.0.0.1; expires ", "; pin sha256/", "ok   --revoked-file " + s.path("revoked") + ": valid\n",
		"ok   --federate-token-file ", "ok   --allow-file " + s.path("allow") + ": selectors with those of --allow: 1\n", "ok   storage directory " + s.path("storage") + ": writable by user ID ",
		"but --limit-storage is 1000000GiB: make room, or lower the limit",
	}
	checkLines(t, s.dir, args, exitOK, append(lines, "does not exist yet, a start creates it; ")...)
	stop := s.start()
	checkLines(t, s.dir, append(slices.Clip(args), "--listen", s.external), exitOK, append(lines, "in use by a running process; ")...)
	if status, answer := s.push(s.token, "up 1\n"); status != 200 {
		t.Errorf("after --check, a push to the running server got %d %s", status, answer)
	}
	stop()
	checkLines(t, s.dir, args, exitOK, append(lines, ": writable by user ID ", "not in use; ", "ok   "+s.path("keys/issued.jsonl")+": tokens: 1\n")...)
	writeIn(t, s.dir, "keys/issued.jsonl", "x\n")
	s.mustRun("--mode", "keygen", "--keys", s.path("plain"))
	checkLines(t, s.dir, args, exitOK, "WARN the list of issued tokens cannot be read", "line 1 is not the record of a token")
	checkLines(t, s.dir, []string{"--mode", "server", "--keys", s.path("plain"), "--storage-dir", s.path("storage"), "--listen-internal", ":9004", "--internal-open"}, exitOK,
		"ok   "+s.path("plain/tls.crt")+": none\n", "WARN clients connect over plain HTTP, because --keys has no tls.crt", "WARN scrapers connect over plain HTTP, because --keys has no tls.crt")
	mustChmod(t, s.path("keys/tls.key"), 0o644)
	crt, key, err := SelfSignedCert([]string{"127.0.0.1"}, time.Now().AddDate(-20, 0, 10))
	if err != nil {
		t.Fatal(err)
	}
	writeIn(t, s.dir, "keys/tls.crt", string(crt))
	writeIn(t, s.dir, "keys/tls.key", string(key))
	checkLines(t, s.dir, append(slices.Clip(args), "--storage-dir="), exitOK, "WARN the mode of a secret file lets every user read it: run chmod o-r",
		"tls.crt expires in 240h0m0s: renew it", "WARN --storage-dir is empty: samples are kept in memory only")
	if status, _, stderr := runMode(t, append(args, "--check", "--nonsense")...); status != exitUsage || !strings.Contains(stderr, "nonsense") {
		t.Errorf("--check with an unknown flag: exit status %d, want %d: %s", status, exitUsage, stderr)
	}
}

// If --check of a server prints FAIL, then a start fails with the same error.
func TestCheckServerAgreesWithStart(t *testing.T) {
	s := newModeServer(t)
	for _, name := range []string{"half", "bad"} {
		s.mustRun("--mode", "keygen", "--keys", s.path(name), "--host", "127.0.0.1")
	}
	os.Remove(s.path("half/" + TLSKeyFile))
	writeIn(t, s.dir, "bad/"+TokenKeyFile, "nonsense\n")
	writeIn(t, s.dir, "file", "no such id\n")
	if err := os.Mkdir(s.path("open"), 0o700); err != nil {
		t.Fatal(err)
	}
	mustChmod(t, s.path("open"), 0o777)
	keys := []string{"--keys", s.path("keys")}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--keys", s.path("none")}, "telemeter --mode keygen --keys"},
		{[]string{"--keys", s.path("bad")}, "line 1: not a key"},
		{[]string{"--keys", s.path("half")}, "reading tls.crt and tls.key: open " + s.path("half/tls.key")},
		{append(keys, "--revoked-file", s.path("file")), "line 1: neither a token ID"},
		{append(keys, "--revoked-file", s.path("none")), "no such file or directory: correct the path"},
		{append(keys, "--allow-file", s.path("file")), "selector"},
		{append(keys, "--federate-token-file", s.path("file")), "more than a token"},
		{append(keys, "--tls-client-ca", s.path("file")), "no PEM certificate"},
		{append(keys, "--storage-dir", s.path("open")), "every user can write to the directory " + s.path("open")},
		{append(keys, "--storage-dir", s.path("file")), "not a directory"},
		{append(keys, "--storage-dir", s.path("file/below")), "not a directory"},
	} {
		args := append([]string{"--mode", "server", "--storage-dir", s.path("storage"), "--listen", "127.0.0.1:0", "--listen-internal", "127.0.0.1:0"}, tt.args...)
		checkLines(t, s.dir, args, exitFailure, "FAIL ", tt.want)
		if status, _, stderr := runMode(t, args...); status != exitFailure || !strings.Contains(stderr, tt.want) {
			t.Errorf("%q: a start exits with %d, want %d and %q: %s", args, status, exitFailure, tt.want, stderr)
		}
	}
}

// --check of a client scrapes the source and exchanges the token at each server, but pushes nothing
// and creates no spool. It warns of clocks that differ.
func TestCheckClient(t *testing.T) {
	s := newModeServer(t)
	s.start()
	writeIn(t, s.dir, "token", s.token)
	writeIn(t, s.dir, "salt", "0123456789abcdef")
	ahead := func(w http.ResponseWriter) {
		w.Header().Set("Date", time.Now().Add(2*time.Hour).UTC().Format(http.TimeFormat))
	}
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ahead(w)
		fmt.Fprintln(w, "up 1\ndown 0")
	}))
	defer source.Close()
	hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"version":1,"token":"t","expiresInSeconds":600,"time":%d}`, time.Now().Add(-3*time.Minute-30*time.Second).UnixMilli())
	}))
	defer hub.Close()
	server, from := "https://"+s.external, source.URL+"/metrics"
	args := []string{"--mode", "client", "--from", from, "--token-file", s.path("token"), "--spool-dir", s.path("spool"), "--to", server, "--spool-limit", "1000000GiB",
		"--anonymize-labels", "a", "--anonymize-salt-file", s.path("salt")}
	lines := []string{
		"ok   flags\n", "ok   --token-file " + s.path("token") + ": cluster ID site-7, token ID ", ", pins sha256/", ", servers " + server, "WARN the token expires in ",
		"ok   --anonymize-salt-file " + s.path("salt") + ": 16 bytes\n", "ok   spool directory " + s.path("spool") + ": writable by user ID ",
		"but --spool-limit is 1000000GiB", "ok   source " + from + ": 2 series in ", "ok   server " + server + ": accepts the token; certificate has the token's pin; ",
		"ok   clock of the server " + server + ": differs by ",
	}
	checkLines(t, s.dir, args, exitOK, append(lines, "does not exist yet", "WARN the clock of the source is ", "ahead of the clock of this host: set both (NTP)")...)
	checkLines(t, s.dir, append(slices.Clip(args), "--to", hub.URL, "--match", "other"), exitOK, "ok   server "+hub.URL+": accepts the token; plain HTTP; ",
		"WARN the clock of the server "+hub.URL+" is 3m", "behind the clock of this host: set both (NTP)", "WARN no series leaves the site from=")
	if _, text := s.federate("first"); strings.Contains(text, "up{") {
		t.Errorf("--check pushed samples:\n%s", text)
	}

	// A spool with scrapes, which a running client uses.
	if status, _, stderr := runMode(t, append(slices.Clip(args), "--to", "http://"+refusingAddr(t), "--once", "--interval", "1s")...); !strings.Contains(stderr, "msg=pushed") {
		t.Fatalf("exit status %d: %s", status, stderr)
	}
	release, err := LockDir(s.path("spool"))
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	checkLines(t, s.dir, args, exitOK, append(lines, "in use by a running process", "ok   spool of cluster ID site-7: readable\n")...)
}

// --check tries each replica and its queries. It warns of an external label that differs, unless
// --elide-label names the label.
func TestCheckReplicas(t *testing.T) {
	args := []string{"--mode", "client", "--token-file", filepath.Join(t.TempDir(), "none"), "--spool-dir", t.TempDir()}
	for _, external := range []map[string]string{{"site": "west", "replica": "a"}, {"site": "west", "replica": "b"}, {"site": "west"}} {
		p := newFakePrometheus(t, fakeSeries{labels: map[string]string{"__name__": "up", "job": "a"}, step: time.Second, begin: -time.Hour})
		p.external = external
		if len(external) == 1 {
			p.api = func(*http.Request) *http.Response {
				return respond(403, http.Header{"Content-Type": {"text/html"}}, "no")
			}
		}
		source := httptest.NewServer(p)
		defer source.Close()
		args = append(args, "--from", source.URL)
	}
	warning := "WARN the replicas differ in the external label replica, so that consumers would see each series once for each replica: add --elide-label replica\n"
	checkLines(t, t.TempDir(), args, exitFailure, "answered; external labels: replica, site\n", "WARN the samples of missing scrapes cannot be fetched from ", "403 Forbidden", warning)
	_, stdout, _ := runMode(t, append(args, "--elide-label", "replica", "--check")...)
	if strings.Contains(stdout, "the replicas differ") || strings.Count(stdout, "ok   source ") != 3 {
		t.Errorf("with --elide-label, --check prints\n%s", stdout)
	}
}

// --check of a client reports each fault with what to do. A faulty source does not hide a faulty
// server. Faults of files are the same as at a start.
func TestCheckClientFaults(t *testing.T) {
	s := newModeServer(t)
	writeIn(t, s.dir, "revoked", "revoked-site\n")
	s.start()
	server, nobody := "https://"+s.external, refusingAddr(t)
	writeIn(t, s.dir, "token", s.token)
	writeIn(t, s.dir, "other", s.newToken("other"))
	writeIn(t, s.dir, "revoked-token", s.newToken("revoked-site"))
	writeIn(t, s.dir, "salt", "short")
	writeIn(t, s.dir, "selectors", "{\n")
	writeIn(t, s.dir, "file", "me:secret\nmore\n")
	impostor := httptest.NewUnstartedServer(http.NotFoundHandler())
	impostor.Config.ErrorLog = log.New(io.Discard, "", 0)
	impostor.StartTLS()
	defer impostor.Close()
	source := startTextSource(t)
	base := []string{"--mode", "client", "--from", source, "--token-file", s.path("token"), "--to", server, "--spool-dir", s.path("spool"), "--interval", "1s"}
	// This start leaves a scrape of site-7 in the spool.
	runMode(t, append(slices.Clip(base), "--to-proxy", "http://"+nobody, "--once")...)
	for _, tt := range []struct {
		name  string
		args  []string
		start bool // a start fails with the same text
		want  []string
	}{
		{"other spool", []string{"--token-file", s.path("other")}, true, []string{`has scrapes of cluster ID "site-7", not of "other": give each cluster ID its own --spool-dir`}},
		{"salt", []string{"--anonymize-labels", "a", "--anonymize-salt-file", s.path("salt")}, true, []string{"has 5 bytes, fewer than 16", "WARN the source was not tried: first correct the files for it\n"}},
		{"token missing", []string{"--token-file", s.path("none")}, true, []string{"--token-file " + s.path("none") + ": open ", "ok   source " + source, "WARN no server was tried: first correct the files for the servers\n"}},
		{"selectors", []string{"--match-file", s.path("selectors")}, true, []string{"FAIL --match-file"}},
		{"source user", []string{"--from-user-file", s.path("file")}, true, []string{"exactly one line of the form USER:PASSWORD", "ok   server " + server}},
		{"proxy user", []string{"--to-proxy", "http://" + nobody, "--to-proxy-user-file", s.path("file")}, true, []string{"exactly one line of the form USER:PASSWORD", "ok   source " + source}},
		{"client certificate", []string{"--to-crt", s.path("file"), "--to-key", s.path("file")}, true, []string{"name PEM files with a certificate"}},
		{"spool is a file", []string{"--spool-dir", s.path("file")}, true, []string{"is not a directory"}},
		{"source and server", []string{"--from", "http://" + nobody + "/metrics", "--to-proxy", "http://" + nobody}, false, []string{
			"ok   source " + source, "FAIL source http://" + nobody + "/metrics: ", "nothing listens there: start the source", "FAIL server " + server + ": ", "the proxy http://" + nobody + " cannot be reached", "the URL in --to-proxy"}},
		{"nobody there", []string{"--to", "http://" + nobody}, false, []string{"FAIL server http://" + nobody + ": ", ": connect: connection refused: check the address in --to or in the token, that something listens there, and that no firewall is in the way\n", "ok   server " + server}},
		{"impostor", []string{"--to", impostor.URL}, false, []string{"FAIL server " + impostor.URL + ": ", "pin"}},
		{"revoked", []string{"--token-file", s.path("revoked-token"), "--spool-dir", s.path("none")}, false, []string{"FAIL server " + server + ": ", "401 Unauthorized", "revoked"}},
	} {
		args := append(slices.Clip(base), tt.args...)
		checkLines(t, s.dir, args, exitFailure, append(tt.want, "FAIL ")...)
		if !tt.start {
			continue
		}
		if status, _, stderr := runMode(t, append(args, "--once")...); status != exitFailure {
			t.Errorf("%s: a start exits with %d, want %d: %s", tt.name, status, exitFailure, stderr)
		}
	}
	if status, _, stderr := runMode(t, append(base, "--check", "--once")...); status != exitUsage || !strings.Contains(stderr, "--check cannot be combined with --once or --dry-run") {
		t.Errorf("--check with --once: exit status %d, want %d: %s", status, exitUsage, stderr)
	}
}
