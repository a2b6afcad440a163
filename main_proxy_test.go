package main

// Tests of --to-proxy at the command line: a client pushes through proxies that work, refuse, or
// are not there. In every case the client checks the server's certificate itself.

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startTextSource starts a source that serves one sample, and returns its URL.
func startTextSource(t *testing.T) string {
	t.Helper()
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "up 1") }))
	t.Cleanup(source.Close)
	return source.URL + "/metrics"
}

// startPlainHub starts an http:// server that accepts every push, and returns its URL.
func startPlainHub(t *testing.T) string {
	t.Helper()
	hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/authorize" {
			fmt.Fprintln(w, `{"version":1,"token":"t","expiresInSeconds":600}`)
		} else {
			fmt.Fprintln(w, `{"accepted":1}`)
		}
	}))
	t.Cleanup(hub.Close)
	return hub.URL
}

// A client with --to-proxy pushes through an HTTP or SOCKS5 proxy, and connects to no server by
// itself. If the proxy refuses, or if the server behind it has another certificate, the client does
// not push, and the error says what to do.
func TestProxy(t *testing.T) {
	s := newModeServer(t)
	s.start()
	server := "https://" + s.external
	other := httptest.NewUnstartedServer(http.NotFoundHandler())
	other.Config.ErrorLog = log.New(io.Discard, "", 0)
	other.StartTLS()
	defer other.Close()
	plainHub := startPlainHub(t)
	source := startTextSource(t)
	writeIn(t, s.dir, "token", s.token)
	writeIn(t, s.dir, "right", "user:pass:word\n")
	writeIn(t, s.dir, "wrong", "user:guess\n")
	const (
		right   = "user:pass:word"
		useFile = "write USER:PASSWORD into a file, and add --to-proxy-user-file FILE"
		correct = "does not accept the user and password in --to-proxy-user-file"
	)
	httpProxy, socksProxy := func(user string) *testProxy { return startHTTPProxy(t, nil, user) }, func(user string) *testProxy { return startSOCKSProxy(t, user) }
	refusing := func(p *testProxy) *testProxy {
		p.refuses = true
		return p
	}
	nobody := &testProxy{address: refusingAddr(t)}
	t.Run("group", func(t *testing.T) { // returns when all parallel tests in it have ended
		for i, tt := range []struct {
			name     string
			scheme   string
			proxy    *testProxy
			userFile string
			to       string
			reaches  bool   // the proxy is told to connect to the server
			want     string // text in stderr; "" if the push must succeed
		}{
			{"http", "http", httpProxy(""), "", server, true, ""},
			{"http, with user", "http", httpProxy(right), "right", server, true, ""},
			{"http, wrong password", "http", httpProxy(right), "wrong", server, false, correct},
			{"http, no user", "http", httpProxy(right), "", server, false, useFile},
			{"http, refuses", "http", refusing(httpProxy("")), "", server, false, "answered 403 Forbidden when asked to connect to " + s.external},
			{"http, nobody there", "http", nobody, "", server, false, "the proxy http://" + nobody.address + " cannot be reached: dial tcp"},
			{"http, other certificate", "http", httpProxy(""), "", other.URL, true, "pin"},
			{"http to plain server", "http", httpProxy(""), "", plainHub, true, ""},
			{"http to plain server, with user", "http", httpProxy(right), "right", plainHub, true, ""},
			{"http to plain server, wrong password", "http", httpProxy(right), "wrong", plainHub, false, correct},
			{"https, but the proxy speaks plain HTTP", "https", httpProxy(""), "", server, false, "use http:// in --to-proxy"},
			{"socks5", "socks5", socksProxy(""), "", server, true, ""},
			{"socks5h, with user", "socks5h", socksProxy(right), "right", server, true, ""},
			{"socks5, wrong password", "socks5", socksProxy(right), "wrong", server, false, correct},
			{"socks5, no user", "socks5", socksProxy(right), "", server, false, useFile},
			{"socks5, refuses", "socks5", refusing(socksProxy("")), "", server, false, "check that the proxy allows this host and port"},
			{"socks5, other certificate", "socks5", socksProxy(""), "", other.URL, true, "pin"},
			{"socks5 to plain server", "socks5", socksProxy(""), "", plainHub, true, ""},
			{"socks5, but an HTTP proxy", "socks5", httpProxy(""), "", server, false, "check the scheme and the port in --to-proxy"},
			{"http, but a SOCKS5 proxy", "http", socksProxy(""), "", server, false, "through the proxy http://"},
		} {
			t.Run(tt.name, func(t *testing.T) {
				t.Parallel() // a client that fails tries for a second
				args := []string{"--mode", "client", "--from", source, "--token-file", s.path("token"), "--to", tt.to, "--once", "--interval", "1s",
					"--spool-dir", s.path(fmt.Sprint("spool", i)), "--to-proxy", tt.scheme + "://" + tt.proxy.address}
				if tt.userFile != "" {
					args = append(args, "--to-proxy-user-file", s.path(tt.userFile))
				}
				status, _, stderr := runMode(t, args...)
				if tt.want == "" && (status != exitOK || !strings.Contains(stderr, "msg=pushed")) {
					t.Errorf("exit status %d, want %d and a push:\n%s", status, exitOK, stderr)
				}
				if tt.want != "" && (status != exitFailure || !strings.Contains(stderr, tt.want) || strings.Contains(stderr, "msg=pushed")) {
					t.Errorf("exit status %d, want %d, no push and %q:\n%s", status, exitFailure, tt.want, stderr)
				}
				if strings.Contains(stderr, "pass:word") || strings.Contains(stderr, "guess") {
					t.Errorf("the log has the proxy's password:\n%s", stderr)
				}
				_, target, _ := strings.Cut(tt.to, "://")
				if got := tt.proxy.targetsSeen(); (len(got) > 0) != tt.reaches || len(got) > 0 && !slices.Equal(slices.Compact(got), []string{target}) {
					t.Errorf("the proxy was told to connect to %q, want %s: %v", got, target, tt.reaches)
				}
			})
		}
	})
}

// The client ignores the proxy variables of the environment. An https:// proxy must have a
// certificate that the system's CAs verify; the pin of the servers does not matter for it. On
// SIGHUP, the client reads the file of --to-proxy-user-file again.
func TestProxyOfProcess(t *testing.T) {
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys", "--host", "127.0.0.1")
	mustTool(t, dir, "--mode", "keygen", "--keys", "proxy", "--host", "127.0.0.1")
	server := startServer(t, dir)
	address := server.await(externalAddr)
	source := startTextSource(t)
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "proxy", TLSCertFile), filepath.Join(dir, "proxy", TLSKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	proxy := startHTTPProxy(t, &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}, "user:password")
	env := append(os.Environ(), asTelemeter+"=1", "GORACE=atexit_sleep_ms=0", "HTTPS_PROXY=http://"+refusingAddr(t), "HTTP_PROXY=http://"+refusingAddr(t))
	writeIn(t, dir, "token", mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "a", "--to", "https://"+address))
	writeIn(t, dir, "user", "user:wrong")
	args := []string{"--mode", "client", "--from", source, "--token-file", "token", "--listen", "", "--interval", "1s"}

	alone := telemeterCommand(t, dir, append(args, "--once")...)
	alone.Env = env
	if out, err := alone.CombinedOutput(); err != nil {
		t.Errorf("a client without --to-proxy does not push: %v\n%s", err, out)
	}
	args = append(args, "--to-proxy", "https://"+proxy.address, "--to-proxy-user-file", "user")
	distrustful := telemeterCommand(t, dir, append(args, "--once")...)
	distrustful.Env = env
	if out, err := distrustful.CombinedOutput(); err == nil || !strings.Contains(string(out), "the system's CAs must verify the proxy's certificate") {
		t.Errorf("a client whose system does not trust the proxy's certificate: %v\n%s", err, out)
	}

	var logged logBuffer
	client := telemeterCommand(t, dir, args...)
	client.Env = append(env, "SSL_CERT_FILE="+filepath.Join(dir, "proxy", TLSCertFile))
	client.Stdout, client.Stderr = &logged, &logged
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		client.Process.Kill()
		client.Wait()
	}()
	await := func(text string) {
		t.Helper()
		eventuallyWithin(t, 20*time.Second, 5*time.Millisecond, "the client logs "+text+"; it logged:\n"+logged.String(), func() bool { return strings.Contains(logged.String(), text) })
	}
	await("does not accept the user and password")
	writeIn(t, dir, "user", "user:password\n")
	client.Process.Signal(syscall.SIGHUP)
	await("msg=pushed")
	if got := proxy.targetsSeen(); len(got) == 0 || got[0] != address {
		t.Errorf("the proxy was told to connect to %q, want %s", got, address)
	}
}

// An error of the proxy is not about trust between the client and a server, even if its text looks
// like that of such an error.
func TestProxyErrorIsNotAboutTrust(t *testing.T) {
	alert := errors.New("remote error: tls: bad certificate")
	var transport trustTransport
	if transport.advice(alert) == "" {
		t.Errorf("there is no advice on the alert of a server: %v", alert)
	}
	if advice := transport.advice(new(proxyTransport).errorf("the TLS handshake with the proxy failed: %w", alert)); advice != "" {
		t.Errorf("the advice on the alert of a proxy is about the server: %s", advice)
	}
}

// A client refuses to scrape the /federate of its own listener. It may scrape its own metrics, or a
// listener at another address. Without --token-file, no client of this test starts.
func TestFromOwnListener(t *testing.T) {
	for args, refused := range map[string]bool{
		"--from http://localhost:9002":                                true,
		"--from http://127.0.0.1:9002/":                               true,
		"--from http://[::1]:9002/federate":                           true,
		"--from http://localhost:9005/federate/ --listen :9005":       true,
		"--from http://localhost:9005 --listen 0.0.0.0:9005":          true,
		"--from http://localhost:9002 --check":                        true,
		"--from http://localhost:9090 --from http://localhost:9002":   true,
		"--from http://localhost:9002/metrics":                        false,
		"--from http://localhost:9002/prometheus/federate":            false,
		"--from http://localhost:9090":                                false,
		"--from http://192.0.2.1:9002":                                false,
		"--from http://localhost:9002 --listen 192.0.2.1:9002":        false,
		"--from http://localhost:9002 --listen=":                      false,
		"--from http://localhost:9002 --once":                         false, // it does not listen
		"--from http://localhost:9002 --once --listen 127.0.0.1:9002": false,
	} {
		status, _, stderr := runMode(t, append([]string{"--mode", "client"}, strings.Fields(args)...)...)
		if got := strings.Contains(stderr, "--from is this client's own --listen: "); status != exitUsage || got != refused {
			t.Errorf("%s: exit status %d, want %d; refused as its own listener: %t, want %t:\n%s", args, status, exitUsage, got, refused, stderr)
		}
	}
}

// A connection to a server that cannot be made gets advice. It is not denied, because the failure may
// end by itself. Other errors, and errors of the proxy, are passed on unchanged.
func TestDialAdvice(t *testing.T) {
	dial := func(err error) error { return &net.OpError{Op: "dial", Net: "tcp", Err: err} }
	for _, tt := range []struct {
		err     error
		advised bool
	}{
		{dial(syscall.ECONNREFUSED), true},
		{dial(&net.DNSError{Err: "no such host", Name: "hub.example", IsNotFound: true}), true},
		{dial(os.ErrDeadlineExceeded), true},
		{fmt.Errorf("through the proxy: %w", dial(syscall.ECONNREFUSED)), true},
		{new(proxyTransport).errorf("the proxy cannot be reached: %w", dial(syscall.ECONNREFUSED)), false},
		{&net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}, false},
		{io.ErrUnexpectedEOF, false},
	} {
		transport := trustTransport{next: roundTrip(func(*http.Request) (*http.Response, error) { return nil, tt.err })}
		_, err := transport.RoundTrip(httptest.NewRequest("POST", "http://192.0.2.1/upload", nil))
		var denied *DeniedError
		if advised := err != tt.err; advised != tt.advised || !errors.Is(err, tt.err) || errors.As(err, &denied) {
			t.Errorf("%v: got the error %v, want advice: %t, and no DeniedError", tt.err, err, tt.advised)
		}
	}
}

// Faults in the flags of the proxy and of the source's credentials are faults of the command line.
// The message says what to do, and never quotes a password.
func TestProxyAndSourceFlags(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(signToken(t, testKeys(t, 1), Token{Kind: KindClient, ClusterID: "a", ID: NewTokenID()})), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ args, want string }{
		{"--to http://localhost:9003 --to-proxy http://192.0.2.1:3128", "the token would be sent to http://localhost:9003 over plain HTTP"},
		{"--to-proxy http://user:secret@proxy:3128", "write USER:PASSWORD into a file, and add --to-proxy-user-file FILE"},
		{"--to-proxy http://user:secret@proxy:port", "want http://, https:// or socks5:// with a host and a port"},
		{"--to-proxy me:secret@proxy:3128", "is not the URL of a proxy: want http://"},
		{"--to-proxy http:me:secret@proxy:3128", "has no host or no port: want http://"},
		{"--to-proxy http://proxy", "has no host or no port: want http://"},
		{"--to-proxy proxy:3128", "is not the URL of a proxy: want http://"},
		{"--to-proxy ftp://proxy:3128", "is not the URL of a proxy: want http://"},
		{"--to-proxy http://proxy:3128/path", "must have only a scheme, a host and a port"},
		{"--to-proxy-user-file f", "--to-proxy-user-file has no effect without --to-proxy: add --to-proxy URL"},
		{"--from-user-file f --from-token-file g", "--from-token-file and --from-user-file exclude each other"},
		{"--from-user-file f --from http://192.0.2.1:9090", "--from-user-file would be sent to 192.0.2.1:9090 over plain HTTP: use https://"},
		{"--from-user-file f --from http://localhost:9090 --from http://192.0.2.1:9090", "--from-user-file would be sent to 192.0.2.1:9090 over plain HTTP: use https://"},
		{"--from-token-file f --from https://192.0.2.2 --from http://192.0.2.1:9090", "--from-token-file would be sent to 192.0.2.1:9090 over plain HTTP: use https://"},
		{"--from http://localhost:9090 --from http://me:secret@localhost:9091", "--from: http://me:xxxxx@localhost:9091 contains credentials, which every user of this host can see in a command line: remove them, and write USER:PASSWORD into a file that --from-user-file names"},
		{"--from-crt f --from https://192.0.2.1", "--from-crt and --from-key must be given together"},
		{"--from-crt f --from-key g", "--from-crt has no effect, because the URL in --from is not https://"},
	} {
		status, _, stderr := runMode(t, append([]string{"--mode", "client", "--token-file", token}, strings.Fields(tt.args)...)...)
		if status != exitUsage || !strings.Contains(stderr, tt.want) || strings.Contains(stderr, "secret") {
			t.Errorf("%s: exit status %d, want %d and %q without the password:\n%s", tt.args, status, exitUsage, tt.want, stderr)
		}
	}
}
