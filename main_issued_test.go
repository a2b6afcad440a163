package main

// Tests of the list of issued tokens at the command line: what --mode token records, prints and
// refuses, and how a server loads the list.

import (
	"context"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// mustKeygen creates keys in a new directory, and returns the path of the keys.
func mustKeygen(t *testing.T, args ...string) (keys string) {
	t.Helper()
	keys = filepath.Join(t.TempDir(), "keys")
	if status, _, stderr := runMode(t, append([]string{"--mode", "keygen", "--keys", keys}, args...)...); status != exitOK {
		t.Fatalf("keygen: exit status %d: %s", status, stderr)
	}
	return keys
}

// mustIssue creates a token with --mode token, and returns the token and the messages on stderr.
func mustIssue(t *testing.T, keys, id string, args ...string) (token, messages string) {
	t.Helper()
	status, token, messages := runMode(t, append([]string{"--mode", "token", "--keys", keys, "--id", id}, args...)...)
	if status != exitOK {
		t.Fatalf("token for %s: exit status %d: %s", id, status, messages)
	}
	return token, messages
}

// tokenIDOf returns the token ID in the text of a token.
func tokenIDOf(t *testing.T, text string) string {
	t.Helper()
	tok, err := ParseUnverifiedToken(text)
	if err != nil {
		t.Fatal(err)
	}
	return tok.ID
}

// --list prints one line for each token that was created with the keys, sorted by cluster ID, with
// the token ID that --inspect prints too.
func TestTokenList(t *testing.T) {
	keys := mustKeygen(t)
	list := func(args ...string) (lines [][]string, messages string) {
		t.Helper()
		status, stdout, stderr := runMode(t, append([]string{"--mode", "token", "--keys", keys, "--list"}, args...)...)
		if status != exitOK {
			t.Fatalf("--list: exit status %d: %s", status, stderr)
		}
		for line := range strings.Lines(stdout) {
			if line != strings.TrimRight(line, " \n")+"\n" {
				t.Errorf("--list prints white space at the end of the line %q", line)
			}
			lines = append(lines, strings.Fields(line))
		}
		return lines, stderr
	}
	if lines, messages := list(); len(lines) != 0 || !strings.Contains(messages, "lists no token") {
		t.Errorf("an empty list printed %v and %q", lines, messages)
	}

	text := func(text, _ string) string { return text }
	z, s7, ttl, old := text(mustIssue(t, keys, "z")), text(mustIssue(t, keys, "site-7", "--label", "region=eu", "--label", "a=b c")),
		text(mustIssue(t, keys, "b", "--ttl", "1ns")), text(mustIssue(t, keys, "old"))
	dir := filepath.Dir(keys)
	writeIn(t, dir, "revoked", "z\n")
	const header = "CLUSTER ID TOKEN ID ISSUED EXPIRES STATE LABELS"
	check := func(states []string, args ...string) {
		t.Helper()
		note := ""
		if len(args) == 0 {
			note = "--revoked-file was not given: revoked tokens are listed as valid\n"
		}
		lines, messages := list(args...)
		if len(lines) != 5 || strings.Join(lines[0], " ") != header || messages != note {
			t.Fatalf("%q: --list printed %q and %q", args, lines, messages)
		}
		for i, want := range []string{"b " + tokenIDOf(t, ttl), "old " + tokenIDOf(t, old), "site-7 " + tokenIDOf(t, s7), "z " + tokenIDOf(t, z)} {
			fields := lines[i+1]
			if got := strings.Join(fields[:2], " "); got != want || strings.Join(fields[4:], " ") != states[i] {
				t.Errorf("%q: line %d is %q, want %s and the state %s", args, i+1, fields, want, states[i])
			}
			issued, err := time.Parse(time.RFC3339, fields[2])
			if age := time.Since(issued); err != nil || age < 0 || age > time.Minute || (fields[3] == "never") != (i > 0) {
				t.Errorf("%q: line %d has the issue time %s and the expiry %s", args, i+1, fields[2], fields[3])
			}
		}
	}
	check([]string{"expired", "valid", `valid a="b c" region="eu"`, "valid"})
	check([]string{"expired", "valid", `valid a="b c" region="eu"`, "revoked"}, "--revoked-file", filepath.Join(dir, "revoked"))
	writeIn(t, keys, TokenKeyFile, keyLine(1)+"\n")
	check([]string{"expired", "no key", `no key a="b c" region="eu"`, "revoked"}, "--revoked-file", filepath.Join(dir, "revoked"))

	writeIn(t, dir, "token", s7)
	if _, stdout, _ := runMode(t, "--mode", "token", "--keys", keys, "--inspect", filepath.Join(dir, "token")); !strings.Contains(stdout, "token ID:   "+tokenIDOf(t, s7)+"\n") {
		t.Errorf("--inspect prints no token ID: %s", stdout)
	}
}

// Flags of the mode token that do not go together are reported with what to do, and the exit status
// is 2.
func TestTokenListConflicts(t *testing.T) {
	for args, want := range map[string]string{
		"--list --id a":                "--list can be combined only with --keys and --revoked-file: remove the other flags",
		"--list --to https://h":        "remove the other flags",
		"--list --inspect f":           "remove the other flags",
		"--list --ttl 1h":              "remove the other flags",
		"--list --label a=b":           "remove the other flags",
		"--id a --revoked-file f":      "--revoked-file can be combined only with --list: add --list",
		"--inspect f --revoked-file f": "--revoked-file can be combined only with --list: add --list",
		"":                             "use --inspect FILE or --list",
	} {
		status, stdout, stderr := runMode(t, append([]string{"--mode", "token"}, strings.Fields(args)...)...)
		if status != exitUsage || stdout != "" || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit status %d, %q and %q, want %d and %q", args, status, stdout, stderr, exitUsage, want)
		}
	}
}

// If a token cannot be recorded or printed, or the list cannot be read, the exit status is 1. No
// token is printed, and the message says what to do.
func TestTokenNotRecorded(t *testing.T) {
	keys := mustKeygen(t)
	var messages logBuffer
	r, stdoutClosed := io.Pipe()
	r.Close()
	if status := run(t.Context(), time.Now, []string{"--mode", "token", "--keys", keys, "--id", "a"}, stdoutClosed, &messages); status != exitFailure || !strings.Contains(messages.String(), "nobody has this token: run the command again") {
		t.Errorf("a token that cannot be printed: exit status %d, %q", status, messages.String())
	}
	if err := os.Remove(filepath.Join(keys, IssuedFile)); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(keys, IssuedFile), 0o700); err != nil {
		t.Fatal(err)
	}
	status, stdout, stderr := runMode(t, "--mode", "token", "--keys", keys, "--id", "a")
	if status != exitFailure || stdout != "" || !strings.Contains(stderr, "no token was printed") || !strings.Contains(stderr, "let this user write that file") {
		t.Errorf("a list that cannot be written: exit status %d, %q and %q", status, stdout, stderr)
	}
	if err := os.Remove(filepath.Join(keys, IssuedFile)); err != nil {
		t.Fatal(err)
	}
	writeIn(t, keys, IssuedFile, "\nx\n")
	for name, c := range map[string]struct{ keys, want string }{
		"faulty line": {keys, "line 2 is not the record of a token: correct or delete the line"},
		"no keys":     {keys + "2", "correct --keys; for the first server only, create the keys with telemeter --mode keygen"},
	} {
		status, stdout, stderr := runMode(t, "--mode", "token", "--keys", c.keys, "--list")
		if status != exitFailure || stdout != "" || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit status %d, %q and %q, want %q", name, status, stdout, stderr, c.want)
		}
	}
}

// The mode token says on stderr if the client needs more than the token: if the token names no
// server, if a server's URL has no port, or if a server has an https URL but the token has no pin of its certificate.
func TestTokenNotes(t *testing.T) {
	withCert, without := mustKeygen(t, "--host", "127.0.0.1"), mustKeygen(t)
	for name, c := range map[string]struct {
		keys string
		args []string
		note string // "" means that stderr has only the token ID
	}{
		"no server":              {withCert, nil, "no server in the token: the client that uses it needs --to URL; a script needs none\n"},
		"https without a port":   {withCert, []string{"--to", "https://h"}, "--to https://h has no port, so the client connects to port 443; servers listen on port 9003 by default\n"},
		"http without a port":    {withCert, []string{"--to", "http://h"}, "--to http://h has no port, so the client connects to port 80; servers listen on port 9003 by default\n"},
		"https with certificate": {withCert, []string{"--to", "https://h:1"}, ""},
		"https without":          {without, []string{"--to", "http://h:1", "--to", "https://h:1"}, "no pin: " + filepath.Join(without, TLSCertFile) + " is missing: "},
		"http without":           {without, []string{"--to", "http://h:1"}, ""},
	} {
		token, messages := mustIssue(t, c.keys, "a", c.args...)
		first := "token " + tokenIDOf(t, token) + " for cluster ID a\n"
		note, ok := strings.CutPrefix(messages, first)
		if !ok || !strings.HasPrefix(note, c.note) || (note == "") != (c.note == "") {
			t.Errorf("%s: stderr has %q, want %q and then %q", name, messages, first, c.note)
		}
	}
}

// A server serves the push time 0 for a site that has a valid token and has never pushed. At SIGHUP
// it uses the present revocations and the present list. If the list cannot be read, the server logs
// and counts that, and serves the same sites as before.
func TestServerIssuedSites(t *testing.T) {
	s := newModeServer(t)
	revoked := s.newToken("stolen")
	s.newToken("late", "--ttl", "1ns")
	s.start()
	check := func(when string, want ...string) {
		t.Helper()
		_, text := s.federate("first")
		var got []string
		for line := range strings.Lines(text) {
			if rest, ok := strings.CutPrefix(line, `push_time_seconds{_id="`); ok && strings.HasSuffix(line, " 0\n") {
				id, _, _ := strings.Cut(rest, `"`)
				got = append(got, id)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: the server serves the push time 0 for %q, want %q", when, got, want)
		}
	}
	eventually(t, "the list is loaded", func() bool {
		return strings.Contains(s.log.String(), `level=INFO msg="loaded the list of issued tokens" file=`+s.path("keys/"+IssuedFile)+" tokens=3 sites_with_valid_token=2\n")
	})
	check("at first", "site-7", "stolen")
	if status, answer := s.push(s.token, "up 1\n"); status != 200 {
		t.Fatalf("the push got %d %s", status, answer)
	}
	check("after a push of site-7", "stolen")
	writeIn(t, s.dir, "revoked", tokenIDOf(t, revoked)+"\n")
	s.newToken("new")
	s.reload("msg=reloaded")
	check("after a reload", "new")
	list := readIn(t, s.path("keys"), IssuedFile)
	writeIn(t, s.path("keys"), IssuedFile, "x\n"+list)
	s.reload("msg=reloaded")
	check("with a faulty list", "new")
	if !strings.Contains(s.log.String(), `level=ERROR msg="the list of issued tokens cannot be read; the list read before stays in use: correct the file`) || !strings.Contains(s.log.String(), "line 1 is not the record") {
		t.Errorf("the log does not say that the list is faulty:\n%s", s.log.String())
	}
	_, metrics := s.mustRequest(s.client, "GET", "http://"+s.internal+"/metrics", "first", "")
	for _, want := range []string{"telemeter_issued_errors_total 1\n", "telemeter_issued_tokens 4\n"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("/metrics has no %s:\n%s", want, metrics)
		}
	}
	if err := os.Remove(s.path("keys/" + IssuedFile)); err != nil {
		t.Fatal(err)
	}
	s.reload("msg=reloaded")
	check("without a list")
	if want := `level=WARN msg="no list of issued tokens: sites that have never pushed are not known; copy the list from the host on which tokens are created" file=` + s.path("keys/"+IssuedFile); !strings.Contains(s.log.String(), want) {
		t.Errorf("the log has no %s:\n%s", want, s.log.String())
	}
}

// A server warns, at the start and at SIGHUP, of lines of --revoked-file that no issued token matches,
// and names at most five of them. --check prints the same warning. Without a list, or with
// --authorize, there is no warning.
func TestUnknownRevoked(t *testing.T) {
	s := newModeServer(t)
	writeIn(t, s.dir, "revoked", "site-7\n"+strings.ToUpper(tokenIDOf(t, s.token))+" # stolen\n")
	s.start()
	const warning = "a line of --revoked-file is no token ID and no cluster ID in the list of issued tokens: it may be misspelled"
	if strings.Contains(s.log.String(), warning) {
		t.Errorf("the server warns of IDs in the list:\n%s", s.log.String())
	}
	writeIn(t, s.dir, "revoked", "site-7\ng\nf\ne\nd\nc\nSite-7\n")
	s.reload("msg=reloaded")
	if got := s.log.String(); strings.Count(got, warning) != 1 || !strings.Contains(got, ` lines=6 ids="Site-7 c d e f"`+"\n") {
		t.Errorf("the server does not warn once of six IDs:\n%s", got)
	}
	for _, c := range []struct {
		about string
		args  []string
		warns bool
	}{{"list", nil, true}, {"--authorize", []string{"--authorize", "http://127.0.0.1:1"}, false}, {"no list", nil, false}} {
		if c.about == "no list" {
			if err := os.Remove(s.path("keys/" + IssuedFile)); err != nil {
				t.Fatal(err)
			}
		}
		status, stdout, _ := runMode(t, append([]string{"--mode", "server", "--check", "--keys", s.path("keys"), "--storage-dir", s.path("other"), "--revoked-file", s.path("revoked")}, c.args...)...)
		if status != exitOK || strings.Contains(stdout, "WARN "+warning) != c.warns {
			t.Errorf("%s: --check printed this, and a warning is wanted: %v:\n%s", c.about, c.warns, stdout)
		}
	}
}

// A server loads a changed list within issuedPollInterval. After a failure it tries again, even if
// the list has not changed. It does not load the same list twice.
func TestIssuedPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newVirtualRig(t)
		dir := t.TempDir()
		l := newIssuedLoader(dir, r.server, r.server.cfg.Log, r.server.cfg.Metrics)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- l.run(ctx) }()
		a, b := issuedLine(t, "a", 1), issuedLine(t, "b", 2)
		synctest.Wait()
		if !strings.Contains(r.log.String(), `level=INFO msg="no list of issued tokens`) {
			t.Errorf("the server does not say that it has no list: %s", r.log.String())
		}
		for _, step := range []struct {
			file     string // new content of the list; "" means that the list does not change
			reload   bool   // SIGHUP makes the server load the list before the poll
			want     string // sites that the server knows after issuedPollInterval
			logged   int    // messages of the loader in this step
			failures float64
		}{
			{"", false, "", 1, 0}, // the message at the start
			{a, false, "a", 1, 0},
			{"", false, "a", 0, 0},
			{a + b, false, "a b", 1, 0},
			{a + "x\n", false, "a b", 1, 1},
			{"", false, "a b", 1, 2},
			{b + a[:30], false, "b", 1, 2},
			{a + b, true, "a b", 1, 2},
			{"", true, "a b", 1, 2},
			{a + "x\n", true, "a b", 2, 4},
		} {
			if step.file != "" {
				writeIn(t, dir, IssuedFile, step.file)
			}
			if step.reload {
				l.load()
			}
			time.Sleep(issuedPollInterval)
			synctest.Wait()
			if got := strings.Join(slices.Sorted(maps.Keys(maps.Collect(r.server.IssuedSites()))), " "); got != step.want {
				t.Errorf("%q: the server knows the sites %q, want %q", step.file, got, step.want)
			}
			if n := strings.Count(r.log.String(), "list of issued tokens"); n != step.logged || l.failures.Value() != step.failures {
				t.Errorf("%q: %d messages and %v failures, want %d and %v:\n%s", step.file, n, l.failures.Value(), step.logged, step.failures, r.log.String())
			}
			r.log.Reset()
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
