package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// The error of a failed scrape says what the operator can do, if a flag is probably wrong or the
// source is down.
func TestSourceErrorsAdvise(t *testing.T) {
	page := func(status int, header http.Header, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			for name := range header {
				w.Header().Set(name, header.Get(name))
			}
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	html := http.Header{"Content-Type": {"text/html; charset=utf-8"}}
	const grafana = "<!DOCTYPE html>\n<html><head><TITLE lang=en>\n Grafana &amp;\n more </title>"
	start := func(h http.HandlerFunc, tlsConfig *tls.Config) string {
		s := httptest.NewUnstartedServer(h)
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		if tlsConfig != nil {
			s.TLS = tlsConfig
			s.StartTLS()
		} else {
			s.Start()
		}
		t.Cleanup(s.Close)
		return s.URL
	}
	plain := func(h http.HandlerFunc) string { return start(h, nil) }
	secure := start(page(200, nil, "a 1\n"), &tls.Config{})
	mutual := start(page(200, nil, "a 1\n"), &tls.Config{ClientAuth: tls.RequireAnyClientCert})
	hangs, err := net.Listen("tcp", "127.0.0.1:0") // connections are not accepted, so requests get no answer
	if err != nil {
		t.Fatal(err)
	}
	defer hangs.Close()
	closes, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer closes.Close()
	go func() {
		for {
			conn, err := closes.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 4096)) // read the request, so that the end of the connection is not a reset
			conn.Close()
		}
	}()
	trusting := &tls.Config{InsecureSkipVerify: true}
	for _, tt := range []struct {
		name, from, token string
		config            *tls.Config
		want              []string
	}{
		{"page", plain(page(200, html, grafana)), "", nil, []string{`200 OK with a web page titled "Grafana & more": check --from`, "--from-token-file"}},
		{"page without a title", plain(page(200, http.Header{"Content-Type": {"text/plain"}}, "\n<html>")), "", nil, []string{"200 OK with a web page: check --from"}},
		{"JSON", plain(page(200, http.Header{"Content-Type": {"application/json"}}, "{}")), "", nil, []string{`content type "application/json" is not supported`, "check --from"}},
		{"404", plain(page(404, nil, "no such path")), "", nil, []string{`404 Not Found: "no such path": check --from`, "/federate", "/metrics"}},
		{"404 page", plain(page(404, html, grafana)), "", nil, []string{`404 Not Found with a web page titled "Grafana & more": check --from`}},
		{"401", plain(page(401, nil, "")), "", nil, []string{"401 Unauthorized: the source wants credentials: use --from-token-file or --from-user-file"}},
		{"403 with a token", plain(page(403, nil, "")), "t", nil, []string{"403 Forbidden: the source does not accept these credentials: replace"}},
		{"503", plain(page(503, nil, "starting")), "", nil, []string{`503 Service Unavailable: "starting"`}},
		{"TLS port", strings.Replace(secure, "https:", "http:", 1), "", nil, []string{"HTTPS", "write https:// in --from"}},
		{"plain port", strings.Replace(plain(page(200, nil, "")), "http:", "https:", 1), "", trusting, []string{"write http:// in --from"}},
		{"unknown CA", secure, "", nil, []string{"--from-ca-file"}},
		{"other name", strings.Replace(secure, "127.0.0.1", "localhost", 1), "", &tls.Config{RootCAs: testServerCAs(t, secure)}, []string{"use a host name in --from"}},
		{"client certificate", mutual, "", trusting, []string{"--from-crt and --from-key"}},
		{"nothing listens", "http://" + refusingAddr(t), "", nil, []string{"nothing listens there"}},
		{"no answer", "http://" + hangs.Addr().String(), "", nil, []string{"down or too slow", "--match", "--scrape-interval"}},
		{"closed", "http://" + closes.Addr().String(), "", nil, []string{"if it speaks TLS, write https://"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, _, _ := newTestClient(t, "", func(cfg *ClientConfig, st *ClientReloadConfig) {
				cfg.From, _ = url.Parse(tt.from + "/metrics")
				timeout := 20 * time.Second
				if tt.name == "no answer" {
					timeout = 50 * time.Millisecond
				}
				cfg.FromClient = NewHTTPClient(tt.config, timeout, timeout)
				if tt.token != "" {
					st.FromAuthorization = "Bearer " + tt.token
				}
			})
			_, err := c.Scrape(t.Context())
			if err == nil {
				t.Fatal("the scrape succeeded, want an error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got the error %v, want %q in it", err, want)
				}
			}
			if text := err.Error(); strings.ContainsAny(text, "\n\r") || len(text) > 1000 {
				t.Errorf("the error has line breaks or %d bytes: %q", len(text), text)
			}
		})
	}
}

// testServerCAs returns a pool with the certificate of the TLS server at rawURL.
func testServerCAs(t *testing.T, rawURL string) *x509.CertPool {
	t.Helper()
	conn, err := tls.Dial("tcp", strings.TrimPrefix(rawURL, "https://"), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	pool := x509.NewCertPool()
	pool.AddCert(conn.ConnectionState().PeerCertificates[0])
	return pool
}

// An error of the source is logged when its text changes, apart from the port of this end of the
// connection. Each text is logged at most once in failureLogInterval. The end of the outage is
// logged once, with how long it lasted.
func TestClientLogsChangedSourceErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		port := 40000
		var fail func() error
		c, _, log := newTestClient(t, "", func(cfg *ClientConfig, _ *ClientReloadConfig) {
			cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) {
				port++
				if fail != nil {
					return nil, fail()
				}
				return respond(200, nil, "a 1\n"), nil
			})
		})
		reset := func() error {
			return fmt.Errorf("read tcp 127.0.0.1:%d->127.0.0.1:9090: connection reset by peer", port)
		}
		refused := func() error { return errors.New("dial tcp 127.0.0.1:9090: connection refused") }
		for i, tt := range []struct {
			fail func() error
			want string // text of the log, which is "" for no line
		}{
			{reset, "connection reset"},
			{reset, ""},
			{refused, "connection refused"},
			{reset, ""},
			{refused, ""},
			{nil, `level=INFO msg="source works again" failed=5 lasted=5m0s`},
			{nil, ""},
			{reset, ""}, // 7 minutes after the first line
			{nil, ""},   // the end of an outage that was not logged
			{reset, ""},
			{reset, `suppressed=4 err="`},
			{nil, `failed=2 lasted=2m0s`},
		} {
			log.Reset()
			fail = tt.fail
			c.scrapeAndSpool(t.Context())
			if n := strings.Count(log.String(), "\n"); n > 1 || !strings.Contains(log.String(), tt.want) || (n == 1) != (tt.want != "") {
				t.Errorf("scrape %d: want a line with %q, or none if that is empty; got:\n%s", i, tt.want, log)
			}
			time.Sleep(time.Minute)
		}
	})
}
