package main

// The HTTP plumbing that server and client share: hardened listeners, counted
// handlers, health, compressed answers. Invariants: every connection has
// deadlines, and their number is bounded; those that only wait make room. This file
// must not know what is served.

import (
	"bytes"
	"compress/gzip"
	"container/list"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	maxConnections = 4096 // per listener
	maxHeaderBytes = 16 << 10
	shutdownWait   = 20 * time.Second // for requests in flight
)

// NewInstrument registers what is counted of HTTP requests, and returns a
// function that counts and times those of a handler under a name.
func NewInstrument(m *Metrics) func(name string, h http.Handler) http.Handler {
	requests := m.Counter("telemeter_http_requests_total", "HTTP requests by handler and status code.", "handler", "code")
	seconds := m.Histogram("telemeter_http_request_duration_seconds", "Time to answer HTTP requests, by handler and status code.",
		[]float64{.001, .005, .01, .05, .1, .25, .5, 1, 5, 10, 30}, "handler", "code")
	return func(name string, h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			begin := time.Now()
			sw := &statusWriter{ResponseWriter: w, code: http.StatusOK}
			code := "panic"
			defer func() {
				requests.Inc(name, code)
				seconds.Observe(time.Since(begin).Seconds(), name, code)
			}()
			h.ServeHTTP(sw, r)
			code = strconv.Itoa(sw.code)
		})
	}
}

// statusWriter remembers the status that a handler wrote.
type statusWriter struct {
	http.ResponseWriter
	code    int
	written bool
}

func (w *statusWriter) WriteHeader(code int) {
	if !w.written {
		w.code, w.written = code, true
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *statusWriter) Write(p []byte) (int, error) {
	w.written = true
	return w.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController reach the connection.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// CountWriter counts the bytes written to W.
type CountWriter struct {
	W io.Writer
	N int64
}

func (c *CountWriter) Write(p []byte) (int, error) {
	n, err := c.W.Write(p)
	c.N += int64(n)
	return n, err
}

// CompressResponse returns what to write the body to, compressed if the request
// takes gzip. finish has to be called at its end; its error is the connection's.
func CompressResponse(w http.ResponseWriter, r *http.Request) (body io.Writer, finish func() error) {
	if !TakesGzip(r.Header) {
		return w, func() error { return nil }
	}
	w.Header().Set("Content-Encoding", "gzip")
	z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // the level is valid
	return z, z.Close
}

// WriteJSON answers with v.
func WriteJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) // an error is the connection's: nobody is left to tell
}

// Index answers with a list of paths.
func Index(paths ...string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		WriteJSON(w, map[string][]string{"paths": paths})
	})
}

// HealthRoutes adds /healthz, which answers while the process does, and
// /healthz/ready.
func HealthRoutes(mux *http.ServeMux, ready func() bool) {
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, r *http.Request) {
		if !ready() {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
}

// Listen opens a TCP listener.
func Listen(addr string) (net.Listener, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	return ln, nil
}

// HTTPClient returns a client that follows no redirects, since each request
// carries a token, and asks no proxy of the environment.
func HTTPClient(config *tls.Config, timeout, dial time.Duration) *http.Client {
	return &http.Client{
		Timeout:       timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			TLSClientConfig: config, TLSHandshakeTimeout: dial, IdleConnTimeout: 10 * time.Minute, MaxIdleConnsPerHost: 32,
			DialContext: (&net.Dialer{Timeout: dial}).DialContext, MaxResponseHeaderBytes: 64 << 10,
		},
	}
}

// Conn is one connection; its address is unlike that of any other that lives. It knows
// whether a request is in turn: no byte of the request was read before the last byte of
// the previous answer was written. It counts the empty lines that end the heads of
// requests. A body makes it count too many, or leaves bytes after the last end; then the
// next request counts as not in turn, which is the safe error. It does not see bytes that
// the kernel has received and no Read has returned.
type Conn struct {
	mu       sync.Mutex // guards the rest: net/http reads ahead while a handler runs
	read     headCount
	written  headCount // read before the last byte that was written
	requests int
	inTurn   bool // the last request is
}

type headCount struct {
	ends int
	more bool // bytes stand after the last end
	line bool // bytes stand in the last line
}

// received counts what was read.
func (c *Conn) received(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := &c.read
	for _, b := range p {
		switch {
		case b == '\n' && !h.line: // net/http takes an end without carriage returns too
			h.ends, h.more = h.ends+1, false
		case b == '\n':
			h.line = false
		default:
			h.more = true
			h.line = h.line || b != '\r'
		}
	}
}

// writes notes that the last byte of something is to be written.
func (c *Conn) writes() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.written = c.read
}

// request counts a request that was read.
func (c *Conn) request() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inTurn = c.written.ends == c.requests && !c.written.more
	c.requests++
}

type connKey struct{}

// ConnOf returns the connection that a request came on. A request that is not in turn
// gets a Conn of its own, because its sender has not read the previous answer. A request
// over TLS also does, because the turns cannot be seen there, and a request to a server
// that is no Web with Turns.
func ConnOf(r *http.Request) *Conn {
	if c, ok := r.Context().Value(connKey{}).(*Conn); ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.inTurn {
			return c
		}
	}
	return &Conn{}
}

// withConn is an http.Server's ConnContext, for ConnOf.
func withConn(ctx context.Context, c net.Conn) context.Context {
	plain, ok := c.(*limitConn)
	if !ok {
		return ctx
	}
	plain.conn = &Conn{}
	return context.WithValue(ctx, connKey{}, plain.conn)
}

// Web is one listener with its handler.
type Web struct {
	Name     string // for logs
	Listener net.Listener
	Handler  http.Handler
	Turns    bool        // ConnOf knows the connections of plain HTTP; costs a system call a write
	TLS      *tls.Config // nil for plain HTTP
	Log      *slog.Logger
}

// Run serves until ctx ends, then waits 20 seconds at most for requests in flight. A peer
// that does not end its request must not make the process fail.
func (l *Web) Run(ctx context.Context) error {
	srv := &http.Server{
		Handler:           l.Handler,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       time.Minute,
		WriteTimeout:      2 * time.Minute,
		IdleTimeout:       6 * time.Minute, // longer than common intervals: connections are kept
		MaxHeaderBytes:    maxHeaderBytes,
		TLSConfig:         l.TLS,
		ErrorLog:          log.New(errorLog{l.Log.With("listener", l.Name)}, "", 0),
	}
	if l.Turns {
		srv.ConnContext = withConn
	}
	limited := newLimitListener(l.Listener, maxConnections)
	srv.ConnState = limited.state
	ln := net.Listener(limited)
	if l.TLS != nil {
		// HTTP/1.1 only: one request a connection at a time is what the bounds count.
		l.TLS.NextProtos = []string{"http/1.1"}
		ln = tls.NewListener(ln, l.TLS)
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(ln) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serving %s: %w", l.Name, err)
	case <-ctx.Done():
	}
	wait, cancel := context.WithTimeout(context.Background(), shutdownWait)
	defer cancel()
	if err := srv.Shutdown(wait); err != nil {
		l.Log.Warn("requests in flight are cut off", "listener", l.Name, "after", shutdownWait, "err", err)
		srv.Close()
	}
	<-failed
	return nil
}

// errorLog takes what net/http complains of: mostly peers, which is nobody's
// business, but also panics.
type errorLog struct{ log *slog.Logger }

func (e errorLog) Write(p []byte) (int, error) {
	level := slog.LevelDebug
	if bytes.Contains(p, []byte("panic serving")) {
		level = slog.LevelError
	}
	e.log.Log(context.Background(), level, "http", "err", strings.TrimSpace(string(p)))
	return len(p), nil
}

// limitListener bounds connections. When there are max, the one that has waited
// longest for its peer's next request is closed for the new one, so that who opens
// many and asks nothing keeps nobody out. If every one is busy, the new one waits.
type limitListener struct {
	net.Listener
	max     int
	changed *sync.Cond // on mu: there may be room

	mu      sync.Mutex // guards the rest
	open    int
	closed  bool
	waiting list.List // of *limitConn without a whole head of a request, the longest first
}

func newLimitListener(l net.Listener, max int) *limitListener {
	limited := &limitListener{Listener: l, max: max}
	limited.changed = sync.NewCond(&limited.mu)
	return limited
}

func (l *limitListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	for l.open >= l.max && !l.closed {
		if first := l.waiting.Front(); first != nil {
			l.mu.Unlock()
			first.Value.(*limitConn).Close()
			l.mu.Lock()
		} else {
			l.changed.Wait()
		}
	}
	defer l.mu.Unlock()
	if l.closed {
		c.Close()
		return nil, net.ErrClosed
	}
	l.open++
	return &limitConn{Conn: c, listener: l}, nil
}

// Close has nothing wait for room any more.
func (l *limitListener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.changed.Signal()
	return l.Listener.Close()
}

// state is an http.Server's ConnState: a connection is active from the end of a
// request's head to that of its answer.
func (l *limitListener) state(c net.Conn, st http.ConnState) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	conn := c.(*limitConn) // all are of Accept
	if st == http.StateActive && conn.conn != nil {
		conn.conn.request() // before its handler, and once for each
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case conn.ended:
	case st == http.StateNew, st == http.StateIdle:
		conn.place = l.waiting.PushBack(conn)
		l.changed.Signal()
	case conn.place != nil:
		l.waiting.Remove(conn.place)
		conn.place = nil
	}
}

type limitConn struct {
	net.Conn
	listener *limitListener
	conn     *Conn         // nil over TLS
	ended    bool          // the listener's mu guards it
	place    *list.Element // and this: among those waiting, or nil
}

func (c *limitConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.conn != nil {
		c.conn.received(p[:n])
	}
	return n, err
}

// Write writes the last byte of p by itself. The peer cannot have the whole answer before
// that byte, so every request that was read until then is early, even if the peer was slow
// to take the rest.
func (c *limitConn) Write(p []byte) (n int, err error) {
	if c.conn != nil && len(p) > 0 {
		if len(p) > 1 {
			if n, err = c.Conn.Write(p[:len(p)-1]); err != nil {
				return n, err
			}
		}
		c.conn.writes()
	}
	last, err := c.Conn.Write(p[n:])
	return n + last, err
}

// CloseWrite is what net/http looks for, to let a peer that still sends read the
// answer first.
func (c *limitConn) CloseWrite() error {
	if tcp, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return tcp.CloseWrite()
	}
	return nil
}

func (c *limitConn) Close() error {
	err := c.Conn.Close()
	l := c.listener
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.ended {
		return err
	}
	c.ended = true
	l.open--
	if c.place != nil {
		l.waiting.Remove(c.place)
	}
	l.changed.Signal()
	return err
}
