package main

// Tests of the spare TLS key at the command line: what keygen prints about it, which flags exclude
// each other, and that clients with old tokens follow a rotation of the TLS key.

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// A client with a token from before a rotation of the TLS key pushes to servers with the new key. A
// token from after the rotation accepts the key of the next rotation, which the old token does not.
func TestSpareKeyStory(t *testing.T) {
	dir := t.TempDir()
	keygen := func(args ...string) string {
		t.Helper()
		_, stderr, code := tool(t, dir, append([]string{"--mode", "keygen", "--keys", "keys"}, args...)...)
		if code != exitOK {
			t.Fatalf("keygen %q: exit %d: %s", args, code, stderr)
		}
		return stderr
	}
	said := keygen("--host", "localhost")
	for _, want := range []string{"created keys-spare/tls-spare.key", "created keys/tls-spare.crt", "move this directory to a safe place", "--rotate tls --spare DIR"} {
		if !strings.Contains(said, want) {
			t.Errorf("keygen did not print %q:\n%s", want, said)
		}
	}
	server := startServer(t, dir)
	to, source := "https://"+server.await(externalAddr), "http://"+server.await(internalAddr)+"/metrics"
	token := func(name string) {
		t.Helper()
		writeIn(t, dir, name, mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "site-7", "--to", to))
	}
	push := func(when, token string, want int) {
		t.Helper()
		_, stderr, code := tool(t, dir, "--mode", "client", "--from", source, "--token-file", token, "--once", "--interval", "2s", "--spool-dir", "spool-"+token)
		if code != want || want != exitOK && !strings.Contains(stderr, " or sha256/") {
			t.Errorf("%s: pushing with %s: exit %d, want %d:\n%s", when, token, code, want, stderr)
		}
	}
	reloads := 0
	rotate := func() {
		t.Helper()
		said := keygen("--rotate", "tls")
		for _, want := range []string{"copy keys/tls.crt, keys/tls.key and keys/tls-spare.crt to every server", "SIGHUP", "make a new token for each site", "move keys-spare to a safe place"} {
			if !strings.Contains(said, want) {
				t.Errorf("keygen --rotate tls did not print %q:\n%s", want, said)
			}
		}
		server.cmd.Process.Signal(syscall.SIGHUP)
		reloads++
		eventually(t, "the server reloads", func() bool { return strings.Count(server.text(), "msg=reloaded") == reloads })
	}
	token("old.token")
	push("before the rotation", "old.token", exitOK)
	rotate()
	push("after the rotation", "old.token", exitOK)
	token("new.token")
	out := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--inspect", "new.token")
	for _, file := range []string{TLSCertFile, SpareCertFile} {
		pin, err := PinFromPEM([]byte(readIn(t, dir, "keys/"+file)))
		if err != nil || !strings.Contains(out, pin+"\n") {
			t.Errorf("--inspect does not print the pin %s of %s (%v):\n%s", pin, file, err, out)
		}
	}
	// A client that runs takes a token with other pins at a reload.
	writeIn(t, dir, "site-7.token", readIn(t, dir, "old.token"))
	client := start(t, dir, "--mode", "client", "--from", source, "--token-file", "site-7.token", "--listen", "127.0.0.1:0", "--interval", "1s")
	client.await("msg=pushed")
	writeIn(t, dir, "site-7.token", readIn(t, dir, "new.token"))
	client.cmd.Process.Signal(syscall.SIGHUP)
	client.await("msg=reloaded")
	rotate()
	push("after the second rotation", "new.token", exitOK)
	push("after the second rotation", "old.token", exitFailure)
}

// keygen makes a spare key for a TLS key from before there were spare keys, and says that old tokens
// do not accept it. keygen --rotate tls takes the spare key from --spare. Making a token says that
// there is no spare key, and fails if a rotation was interrupted.
func TestSpareKeyOfOldKeys(t *testing.T) {
	s := newModeServer(t)
	keygen := func(args ...string) (int, string) {
		status, _, stderr := runMode(t, append([]string{"--mode", "keygen", "--keys", s.path("keys")}, args...)...)
		return status, stderr
	}
	files := tlsFiles(t, s.dir)
	delete(files, "keys/tls-spare.crt")
	delete(files, "keys-spare/tls-spare.key")
	writeTLSFiles(t, s.dir, files)
	token := func() (int, string) {
		status, _, stderr := runMode(t, "--mode", "token", "--keys", s.path("keys"), "--id", "a", "--to", "https://x")
		return status, stderr
	}
	if status, said := keygen("--rotate", "tls"); status != exitFailure || !strings.Contains(said, "there is no spare key") {
		t.Errorf("rotation without a spare key: exit %d: %s", status, said)
	}
	if status, said := token(); status != exitOK || !strings.Contains(said, "no spare pin") {
		t.Errorf("token without a spare key: exit %d: %s", status, said)
	}
	if status, said := keygen("--spare", s.path("safe")); status != exitOK || !strings.Contains(said, "tokens that exist already do not accept the spare key") {
		t.Errorf("keygen for old keys: exit %d: %s", status, said)
	}
	if status, said := token(); status != exitOK || strings.Contains(said, "no spare pin") {
		t.Errorf("token with a spare key: exit %d: %s", status, said)
	}
	if status, said := keygen("--rotate", "tls"); status != exitFailure || !strings.Contains(said, "keys-spare/tls-spare.key is missing: name the directory where it is with --spare DIR") {
		t.Errorf("rotation without --spare: exit %d: %s", status, said)
	}
	spare := readIn(t, s.dir, "keys/tls-spare.crt")
	if status, said := keygen("--rotate", "tls", "--spare", s.path("safe")); status != exitOK || readIn(t, s.dir, "keys/tls.crt") != spare {
		t.Errorf("rotation with --spare: exit %d: %s", status, said)
	}
	writeIn(t, s.dir, "keys/tls-spare.crt", spare)
	if status, said := token(); status != exitFailure || !strings.Contains(said, "--rotate tls") {
		t.Errorf("token during a rotation: exit %d: %s", status, said)
	}
}

// keygen refuses flags that exclude each other and a spare directory in the directory of the keys,
// and creates no file.
func TestSpareKeyConflicts(t *testing.T) {
	dir := t.TempDir()
	keys := filepath.Join(dir, "keys")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--rotate", "all"}, "--rotate must be cluster, token or tls"},
		{[]string{"--rotate", "tls", "--host", "a"}, "--rotate and --host cannot be combined"},
		{[]string{"--rotate", "token", "--spare", dir}, "--spare has no effect with --rotate token"},
		{[]string{"--host", "a", "--spare", ""}, "--spare DIR is empty"},
		{[]string{"--host", "a", "--spare", keys}, "--spare must not be in the directory --keys"},
		{[]string{"--host", "a", "--spare", keys + "/../keys/spare"}, "--spare must not be in the directory --keys"},
	} {
		status, _, stderr := runMode(t, append([]string{"--mode", "keygen", "--keys", keys}, c.args...)...)
		if status != exitUsage || !strings.Contains(stderr, c.want) {
			t.Errorf("%q: exit %d, want %d and %q:\n%s", c.args, status, exitUsage, c.want, stderr)
		}
	}
	if found, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(found) > 0 {
		t.Errorf("conflicts left files: %q (%v)", found, err)
	}
}
