package main

// Tests of the mode client, in which telemeter scrapes a Prometheus and pushes to a server. The
// client and the server run as processes of their own.

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
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
