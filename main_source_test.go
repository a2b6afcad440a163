package main

// Tests of how a client reaches its source and its servers: redirects, client certificates, and
// users with passwords.

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// A client follows redirects of its source only on the source's host, on the same port or from
// http:// to https://, and only with the series selectors of the request. Credentials go to no
// other host. The error of any other redirect names its target and says what to do.
func TestSourceRedirects(t *testing.T) {
	dir := t.TempDir()
	writeIn(t, dir, "user", "me:secret")
	var strangers atomic.Int32
	stranger := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { strangers.Add(1) }))
	defer stranger.Close()
	strangerURL := strings.Replace(stranger.URL, "127.0.0.1", "localhost", 1)
	var secure *httptest.Server
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" {
			t.Errorf("%s was requested with the user %q and the password %q", r.URL, user, password)
		}
		query := ""
		if r.URL.RawQuery != "" {
			query = "?" + r.URL.RawQuery
		}
		switch r.URL.Path {
		case "/metrics", "/prometheus/federate":
			fmt.Fprintln(w, "up 1")
		case "/moved", "/no-selectors/federate":
			http.Redirect(w, r, "/metrics", http.StatusFound)
		case "/federate":
			http.Redirect(w, r, "/prometheus/federate"+query, http.StatusMovedPermanently)
		case "/metrics-with-selectors/federate":
			http.Redirect(w, r, "/metrics"+query, http.StatusFound)
		case "/secure":
			http.Redirect(w, r, secure.URL+"/metrics", http.StatusFound)
		case "/stranger":
			http.Redirect(w, r, strangerURL+"/login?next=x", http.StatusTemporaryRedirect)
		case "/port":
			http.Redirect(w, r, stranger.URL+"/metrics", http.StatusFound)
		default:
			http.Redirect(w, r, "/loop", http.StatusFound)
		}
	})
	plain := httptest.NewServer(handler)
	defer plain.Close()
	secure = httptest.NewTLSServer(handler)
	defer secure.Close()
	writeIn(t, dir, "ca", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})))
	for _, tt := range []struct{ from, want string }{
		{plain.URL + "/moved", ""},
		{plain.URL + "/federate", ""},
		{plain.URL + "/secure", ""},
		{secure.URL + "/moved", ""},
		{plain.URL + "/stranger", "the source redirects to another host, " + strangerURL + "/login: if that is the source, pass it as --from"},
		{plain.URL + "/port", "the source redirects to another port, " + stranger.URL + "/metrics: if that is the source, pass it as --from"},
		{secure.URL + "/port", "the source redirects from https:// to " + stranger.URL + "/metrics"},
		{plain.URL + "/loop", "the source redirects more than 3 times, at last to " + plain.URL + "/loop"},
		{plain.URL + "/no-selectors/federate", "redirects to " + plain.URL + "/metrics without the series selectors of the request: pass the URL of its /federate as --from"},
		{plain.URL + "/metrics-with-selectors/federate", "without the series selectors"},
	} {
		status, stdout, stderr := runMode(t, "--mode", "client", "--dry-run", "--from", tt.from, "--from-user-file", dir+"/user", "--from-ca-file", dir+"/ca")
		if ok := status == exitOK && strings.HasPrefix(stdout, "up 1 "); ok != (tt.want == "") || !strings.Contains(stderr, tt.want) {
			t.Errorf("--from %s: exit status %d, want the error %q; stdout %q, stderr:\n%s", tt.from, status, tt.want, stdout, stderr)
		}
	}
	if n := strangers.Load(); n > 0 {
		t.Errorf("%d requests went to another host or port", n)
	}
}

// A client follows no redirect of a server, because the redirected request would carry the token.
// The error names the target of the redirect.
func TestServerRedirects(t *testing.T) {
	s := newModeServer(t)
	writeIn(t, s.dir, "token", s.token)
	var strangers atomic.Int32
	stranger := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { strangers.Add(1) }))
	defer stranger.Close()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", stranger.URL+r.URL.RequestURI())
		w.WriteHeader(http.StatusPermanentRedirect)
		io.WriteString(w, "<html>moved</html>")
	}))
	defer server.Close()
	status, _, stderr := runMode(t, "--mode", "client", "--from", startTextSource(t), "--token-file", s.path("token"), "--to", server.URL,
		"--once", "--interval", "1s", "--spool-dir", s.path("spool"))
	want := "308 Permanent Redirect to " + stranger.URL + "/authorize; redirects of a server are not followed: if that is the server, pass " + stranger.URL + " as --to"
	if n := strangers.Load(); status != exitFailure || !strings.Contains(stderr, want) || n > 0 {
		t.Errorf("exit status %d, want %d and %q; %d redirected requests; stderr:\n%s", status, exitFailure, want, n, stderr)
	}
}

// A client presents the certificate of --from-crt and the user of --from-user-file to its source.
// On SIGHUP, it reads both again.
func TestSourceCredentials(t *testing.T) {
	dir := t.TempDir()
	writeSelfSigned(t, dir)
	cas := x509.NewCertPool()
	cas.AppendCertsFromPEM([]byte(readIn(t, dir, "site.crt")))
	source := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "me" || password != "right:secret" {
			http.Error(w, "wrong user", http.StatusUnauthorized)
			return
		}
		fmt.Fprintln(w, "up 1")
	}))
	source.Config.ErrorLog = log.New(io.Discard, "", 0)
	source.TLS = &tls.Config{MinVersion: tls.VersionTLS12, ClientCAs: cas, ClientAuth: tls.RequireAndVerifyClientCert}
	source.StartTLS()
	defer source.Close()
	writeIn(t, dir, "ca", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: source.Certificate().Raw})))
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	writeIn(t, dir, "token", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a"))
	writeIn(t, dir, "user", "me:wrong-secret")
	from := []string{"--mode", "client", "--from", source.URL + "/metrics", "--from-ca-file", "ca", "--from-user-file", "user"}
	if stdout, stderr, code := tool(t, dir, append(from, "--dry-run")...); code != exitFailure || !strings.Contains(stderr, "certificate required") || stdout != "" {
		t.Errorf("without a client certificate: exit status %d, stdout %q, stderr:\n%s", code, stdout, stderr)
	}
	client := start(t, dir, append(from, "--from-crt", "site.crt", "--from-key", "site.key", "--token-file", "token", "--to", startPlainHub(t), "--interval", "1s", "--listen", "")...)
	client.await("401 Unauthorized")
	writeIn(t, dir, "user", "me:right:secret\n")
	client.cmd.Process.Signal(syscall.SIGHUP)
	client.await("msg=pushed")
	if strings.Contains(client.text(), "secret") {
		t.Error("the log has a password")
	}
}

// The file of --from-user-file and --to-proxy-user-file has exactly one line USER:PASSWORD. A fault
// is reported without the content of the file.
func TestUserFile(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]*url.Userinfo{
		"me:sesame": url.UserPassword("me", "sesame"), "me:a:sesame\r\n": url.UserPassword("me", "a:sesame"), "me:\n": url.UserPassword("me", ""),
		"sesame": nil, ":sesame": nil, "me:sesame\nmore\n": nil, "me:ses\x00ame": nil, "\n": nil,
	} {
		writeIn(t, dir, "user", text)
		got, err := readUserFile("from-user-file", dir+"/user")
		if want == nil && (err == nil || strings.Contains(err.Error(), "sesame")) || want != nil && (err != nil || *got != *want) {
			t.Errorf("%q: got %v, %v; want %v, or an error that does not quote the file", text, got, err, want)
		}
	}
}
