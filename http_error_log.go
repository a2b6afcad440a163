package main

// This file receives the error log of net/http, which reports failed TLS handshakes and panics of
// handlers. A failed handshake is counted by its cause, and logged with what to do about it. Lines
// about handshakes are limited, because strangers can cause them at any rate.

import (
	"context"
	"log/slog"
	"strings"
	"time"
)

// Causes of failed TLS handshakes: values of the label cause in
// telemeter_tls_handshake_failures_total.
const (
	causePlainHTTP          = "plain_http"
	causeNotTLS             = "not_tls"
	causeCertificateRefused = "certificate_refused"
	causeClientCertificate  = "client_certificate"
	causeProtocol           = "protocol"
	causeClosed             = "closed"
	causeTimeout            = "timeout"
	causeOther              = "other"
)

var handshakeCauses = [...]string{
	causePlainHTTP, causeNotTLS, causeCertificateRefused, causeClientCertificate, causeProtocol, causeClosed, causeTimeout, causeOther,
}

// errorLogWriter receives the error log of net/http for one listener. It logs panics of handlers at
// error level, and failed TLS handshakes as logHandshakeError does. It logs all other messages at
// debug level, because most of them report mistakes of peers.
type errorLogWriter struct {
	listener string // HTTPServer.Name
	log      *slog.Logger
	limited  *LimitedLog
	conns    *ConnMetrics
}

func newErrorLogWriter(s *HTTPServer) *errorLogWriter {
	log := s.Log.With("listener", s.Name)
	return &errorLogWriter{listener: s.Name, log: log, limited: NewLimitedLog(log, time.Now), conns: s.Conns}
}

func (e *errorLogWriter) Write(p []byte) (int, error) {
	text := strings.TrimSpace(string(p))
	if rest, ok := strings.CutPrefix(text, "http: TLS handshake error from "); ok {
		remote, reason, _ := strings.Cut(rest, ": ")
		e.logHandshakeError(remote, reason)
		return len(p), nil
	}
	level := slog.LevelDebug
	if strings.Contains(text, "panic serving") {
		level = slog.LevelError
	}
	e.log.Log(context.Background(), level, "net/http reports an error", "err", text)
	return len(p), nil
}

// logHandshakeError counts a failed TLS handshake, and logs it at most once an hour for each peer and
// cause. It logs a peer that ends the connection at debug level, because port scans and checks by
// load balancers do so.
func (e *errorLogWriter) logHandshakeError(remote, reason string) {
	cause := handshakeCause(reason)
	e.conns.handshakeErrors.Inc(cause)
	level := slog.LevelWarn
	if cause == causeClosed || cause == causeTimeout {
		level = slog.LevelDebug
	}
	e.limited.LogPeer(level, handshakeMessage(cause, e.listener), remote, "err", reason)
}

// handshakeCause returns the cause of a failed TLS handshake. reason is the error of crypto/tls or of
// the connection. crypto/tls exports no types for most of its errors, so their texts decide.
func handshakeCause(reason string) string {
	has := func(parts ...string) bool {
		for _, part := range parts {
			if strings.Contains(reason, part) {
				return true
			}
		}
		return false
	}
	switch {
	case has("client sent an HTTP request to an HTTPS server"):
		return causePlainHTTP
	case has("first record does not look like a TLS handshake"):
		return causeNotTLS
	case strings.HasPrefix(reason, "remote error: tls:") && has("certificate"):
		return causeCertificateRefused
	case has("local error: tls: bad record MAC"):
		// With TLS 1.3, OpenSSL sends the alert that it refuses the certificate without encryption.
		return causeCertificateRefused
	case has("certificate") && !has("certificate's signature algorithms"):
		return causeClientCertificate
	case has("certificate's signature algorithms", "unsupported version", "protocol version", "no cipher suite", "handshake failure", "no supported", "no mutually supported"):
		return causeProtocol
	case has("i/o timeout", "deadline exceeded"):
		return causeTimeout
	case has("EOF", "connection reset", "broken pipe", "closed network connection"):
		return causeClosed
	}
	return causeOther
}

// handshakeMessage returns the message for a cause at a listener. It says what to do. The clients of
// the listener internal are scrapers, which have no token.
func handshakeMessage(cause, listener string) string {
	if cause == causeCertificateRefused && listener == "internal" {
		return "TLS handshake failed: the scraper does not trust this server's certificate; set tls_config: {ca_file: FILE, server_name: NAME} in the job and in each of its http_sd_configs"
	}
	switch cause {
	case causePlainHTTP:
		return "TLS handshake failed: the client sends plain HTTP; use https:// in its URL"
	case causeNotTLS:
		return "TLS handshake failed: the client does not send TLS"
	case causeCertificateRefused:
		return "TLS handshake failed: the client does not trust this server's certificate; create a new token, because the token has the fingerprint of another key, or correct the client's CA file"
	case causeClientCertificate:
		return "TLS handshake failed: the client has no certificate that a CA of --tls-client-ca signed; give the client --to-crt and --to-key"
	case causeProtocol:
		return "TLS handshake failed: the client supports no TLS version and cipher of this server, or not the type of its key; it needs TLS 1.2 or later"
	case causeClosed:
		return "TLS handshake failed: the client closed the connection"
	case causeTimeout:
		return "TLS handshake failed: the client took too long"
	}
	return "TLS handshake failed"
}
