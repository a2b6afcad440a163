package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// SIGHUP rereads what vouches for the servers and for this client; what cannot be read
// is told, and changes nothing.
func TestClientRereadsCertificates(t *testing.T) {
	dir := t.TempDir()
	path := func(name ...string) string { return filepath.Join(dir, filepath.Join(name...)) }
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	copied := func(from ...string) string {
		t.Helper()
		b, err := os.ReadFile(path(from...))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "127.0.0.1")
	mustTool(t, dir, "--mode", "keygen", "--keys", "others", "--host", "127.0.0.1")
	server := startServer(t, dir)
	put("token", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", "https://"+server.await(externalAddr)))
	put("ca", copied("others", TLSCertFile))
	put("crt", copied("keys", TLSCertFile))
	put("key", copied("keys", TLSKeyFile))
	client := start(t, dir, "--mode", "client", "--token-file", "token", "--from", "http://"+server.await(internalAddr)+"/metrics",
		"--to-ca-file", "ca", "--to-crt", "crt", "--to-key", "key", "--interval", "1s", "--listen", "127.0.0.1:0")
	client.await("destination failed.*certificate")
	for i, bad := range []string{"ca", "crt"} {
		good := copied(bad)
		put(bad, "nonsense")
		client.cmd.Process.Signal(syscall.SIGHUP)
		eventually(t, "a bad "+bad+" is told", func() bool { return strings.Count(client.text(), "reload failed") == i+1 })
		put(bad, good)
	}
	if strings.Contains(client.text(), "msg=pushed") {
		t.Error("pushed to a server that nobody vouches for")
	}
	put("ca", copied("keys", TLSCertFile))
	client.cmd.Process.Signal(syscall.SIGHUP)
	client.await("msg=pushed")
}
