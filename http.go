package main

// Listeners and clients that server and client share. Every connection has deadlines, and
// their number is bounded. This family must not know the content of requests and answers.

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"
)

const (
	maxConnections = 4096 // per listener
	maxHeaderBytes = 16 << 10
	shutdownWait   = 20 * time.Second // for requests in flight
)

// Listen opens a TCP listener.
func Listen(addr string) (net.Listener, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	return ln, nil
}

// NewHTTPClient returns a client that follows no redirects, because requests carry tokens, and uses
// no proxy of the environment. dialTimeout bounds the time to connect, and requestTimeout a whole
// request.
func NewHTTPClient(config *tls.Config, requestTimeout, dialTimeout time.Duration) *http.Client {
	return &http.Client{
		Timeout:       requestTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			TLSClientConfig: config, TLSHandshakeTimeout: dialTimeout, IdleConnTimeout: 10 * time.Minute, MaxIdleConnsPerHost: 32,
			DialContext: (&net.Dialer{Timeout: dialTimeout}).DialContext, MaxResponseHeaderBytes: 64 << 10,
		},
	}
}

// HTTPServer is one listener with its handler.
type HTTPServer struct {
	Name       string // for logs
	Listener   net.Listener
	Handler    http.Handler
	TrackConns bool        // TrackerIfPreviousAnswerRead knows the connections of plain HTTP; costs a system call a write
	TLS        *tls.Config // nil for plain HTTP
	Log        *slog.Logger
}

// Run serves until ctx ends, then waits 20 seconds at most for requests in flight. A peer
// that does not end its request must not make the process fail.
func (s *HTTPServer) Run(ctx context.Context) error {
	srv := &http.Server{
		Handler:           s.Handler,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       time.Minute,
		WriteTimeout:      2 * time.Minute,
		IdleTimeout:       6 * time.Minute, // longer than common intervals: connections are kept
		MaxHeaderBytes:    maxHeaderBytes,
		TLSConfig:         s.TLS,
		ErrorLog:          log.New(errorLogWriter{s.Log.With("listener", s.Name)}, "", 0),
	}
	if s.TrackConns {
		srv.ConnContext = trackConn
	}
	limited := newLimitListener(s.Listener, maxConnections)
	srv.ConnState = limited.trackWaitingConn
	ln := net.Listener(limited)
	if s.TLS != nil {
		// HTTP/1.1 only: the bounds count on one request at a time on each connection.
		s.TLS.NextProtos = []string{"http/1.1"}
		ln = tls.NewListener(ln, s.TLS)
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(ln) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serving %s: %w", s.Name, err)
	case <-ctx.Done():
	}
	wait, cancel := context.WithTimeout(context.Background(), shutdownWait)
	defer cancel()
	if err := srv.Shutdown(wait); err != nil {
		s.Log.Warn("requests in flight are cut off", "listener", s.Name, "after", shutdownWait, "err", err)
		srv.Close()
	}
	<-failed
	return nil
}

// errorLogWriter logs the errors of net/http: mostly mistakes of peers, at debug level, but also
// panics.
type errorLogWriter struct{ log *slog.Logger }

func (e errorLogWriter) Write(p []byte) (int, error) {
	level := slog.LevelDebug
	if bytes.Contains(p, []byte("panic serving")) {
		level = slog.LevelError
	}
	e.log.Log(context.Background(), level, "http", "err", strings.TrimSpace(string(p)))
	return len(p), nil
}
