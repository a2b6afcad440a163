package main

// Tests of the counter and the messages of failed TLS handshakes.

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// An error that only a peer other than crypto/tls can cause has the right cause, too.
func TestHandshakeCause(t *testing.T) {
	for reason, want := range map[string]string{
		"local error: tls: bad record MAC":                                        causeCertificateRefused, // OpenSSL 3.0 refuses the certificate
		"remote error: tls: unknown certificate authority":                        causeCertificateRefused,
		"remote error: tls: expired certificate":                                  causeCertificateRefused,
		"remote error: tls: handshake failure":                                    causeProtocol,
		"tls: no cipher suite supported by both client and server":                causeProtocol,
		"tls: peer doesn't support any of the certificate's signature algorithms": causeProtocol,
		"read tcp 127.0.0.1:1->127.0.0.1:2: i/o timeout":                          causeTimeout,
		"read tcp 127.0.0.1:1->127.0.0.1:2: connection reset by peer":             causeClosed,
		"remote error: tls: internal error":                                       causeOther,
	} {
		if got := handshakeCause(reason); got != want {
			t.Errorf("%s: got the cause %s, want %s", reason, got, want)
		}
	}
}

// Each failed TLS handshake is counted by its cause. All causes but a client that ends the connection
// are logged as warnings that say what to do.
func TestHandshakeFailures(t *testing.T) {
	server, trusting := selfSignedTLS(t)
	withClientCA := server.Clone()
	withClientCA.ClientAuth, withClientCA.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	_, trustsAnother := selfSignedTLS(t)
	old := trusting.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	handshake := func(config *tls.Config) func(c net.Conn) {
		return func(c net.Conn) {
			secure := tls.Client(c, config)
			if secure.Handshake() == nil { // with TLS 1.3, a client learns only later that its certificate was refused
				io.ReadAll(secure)
			}
		}
	}
	write := func(text string) func(c net.Conn) {
		return func(c net.Conn) {
			io.WriteString(c, text)
			io.ReadAll(c)
		}
	}
	for _, tt := range []struct {
		cause   string
		server  *tls.Config
		client  func(c net.Conn)
		message string // in the log; "" if nothing may be logged
		name    string // of the listener; test if it is ""
	}{
		{causePlainHTTP, server, write("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "the client sends plain HTTP; use https:// in its URL", ""},
		{causeNotTLS, server, write("\x00\x01 no TLS"), "the client does not send TLS", ""},
		{causeCertificateRefused, server, handshake(trustsAnother), "the client does not trust this server's certificate; create a new token", ""},
		{causeCertificateRefused, server, handshake(&tls.Config{ServerName: "127.0.0.1", RootCAs: x509.NewCertPool()}), "does not trust", ""},
		{causeCertificateRefused, server, handshake(trustsAnother), "the scraper does not trust this server's certificate; set tls_config: {ca_file: FILE, server_name: NAME} in the job and in each of its http_sd_configs\"", "internal"},
		{causeClientCertificate, withClientCA, handshake(trusting), "the client has no certificate that a CA of --tls-client-ca signed; give the client --to-crt", ""},
		{causeProtocol, server, handshake(old), "it needs TLS 1.2 or later", ""},
		{causeClosed, server, func(net.Conn) {}, "", ""},
		{causeClosed, server, func(c net.Conn) { io.WriteString(c, "\x16\x03") }, "", ""},
	} {
		var log logBuffer
		conns := NewConnMetrics(NewMetrics())
		addr := serveHTTP(t, HTTPServer{Name: tt.name, TLS: tt.server.Clone(), Conns: conns, Log: slog.New(slog.NewTextHandler(&log, nil)), Handler: http.NotFoundHandler()})
		for n := range 2 {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(time.Minute))
			tt.client(c)
			c.Close()
			eventually(t, tt.cause+" is counted", func() bool { return conns.handshakeErrors.Value(tt.cause) == float64(n+1) })
		}
		want := map[bool]int{true: 1}[tt.message != ""]
		const warning = `level=WARN msg="TLS handshake failed: `
		eventually(t, tt.cause+" is logged", func() bool { return strings.Count(log.String(), warning) >= want })
		if got := log.String(); strings.Count(got, "\n") != want || !strings.Contains(got, tt.message) || want > 0 && !strings.Contains(got, "listener="+cmp.Or(tt.name, "test")+" remote=127.0.0.1:") {
			t.Errorf("%s: the log is\n%s\nwant %d warning with %q", tt.cause, got, want, tt.message)
		}
	}
}
