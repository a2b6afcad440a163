package main

// This file has the listeners and HTTP clients that the modes server and client share. Every
// connection that an HTTPServer accepts has deadlines, and the number of connections of a listener
// is bounded. The family http must not know the content of requests and answers.

import (
	"context"
	"crypto/tls"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"time"
)

const (
	maxConnections = 4096 // connections open at a time on one listener
	maxHeaderBytes = 16 << 10

	readHeaderTimeout = 10 * time.Second // limit for the headers of a request, and for a TLS handshake
	shutdownWait      = 20 * time.Second // how long HTTPServer.Run waits for requests in flight before it cuts them off
)

// Listen opens a TCP listener on addr, which is host:port.
func Listen(addr string) (net.Listener, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	return ln, nil
}

// NewHTTPClient returns an HTTP client that follows no redirects, because requests carry tokens. It
// ignores the proxy settings in the environment. dialTimeout bounds the TCP connect and,
// separately, the TLS handshake. requestTimeout bounds a whole request, including reading the
// answer; 0 means no limit.
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

// HTTPServer serves one listener with one handler.
type HTTPServer struct {
	Name     string // names the listener in logs and errors
	Listener net.Listener
	Handler  http.Handler
	// TrackConns makes TrackerIfPreviousAnswerRead work for the connections of this listener. It
	// costs one more system call for each write to a connection, and with TLS one more record.
	TrackConns bool
	TLS        *tls.Config  // nil for plain HTTP; Run sets its NextProtos to HTTP/1.1 only
	Conns      *ConnMetrics // counts what happens to the connections; one ConnMetrics serves all listeners of a process
	Log        *slog.Logger
}

// Run serves until ctx ends. Then it waits up to shutdownWait for requests in flight, and cuts off
// the requests that are still not done. Cutting off requests is logged but is not an error, because
// a peer that never ends its request must not make the process fail. Run returns an error only if
// the listener has been closed.
func (s *HTTPServer) Run(ctx context.Context) error { return s.runWithLimit(ctx, maxConnections) }

// runWithLimit is Run with at most max open connections.
func (s *HTTPServer) runWithLimit(ctx context.Context, max int) error {
	srv := &http.Server{
		Handler:           leaveBodyUnread(s.Handler),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       time.Minute,
		WriteTimeout:      2 * time.Minute,
		IdleTimeout:       6 * time.Minute, // longer than common scrape and push intervals
		MaxHeaderBytes:    maxHeaderBytes,
		TLSConfig:         s.TLS,
		ErrorLog:          log.New(newErrorLogWriter(s), "", 0),
	}
	limited := newLimitListener(s.Listener, s.Name, max, s.Conns, s.Log)
	srv.ConnState = limited.onConnState
	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return putConnIntoContext(putTrackerIntoContext(ctx, c), c)
	}
	ln := net.Listener(limited)
	if s.TLS != nil {
		// Allow HTTP/1.1 only, because the limits on requests in flight assume that each connection
		// has one request at a time.
		s.TLS.NextProtos = []string{"http/1.1"}
		ln = tls.NewListener(ln, s.TLS)
	}
	if s.TrackConns {
		ln = answerListener{ln, srv.ErrorLog}
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
		s.Log.Warn("closing connections whose requests are still in flight", "listener", s.Name, "after", shutdownWait, "err", err)
		srv.Close()
	}
	<-failed
	return nil
}
