package main

// The connections of a listener. Their number is bounded, and a connection that only waits for a
// request is closed when a new one needs its place. Each plain HTTP connection can be tracked, to
// find out whether a peer had read the previous answer before it sent its next request.

import (
	"container/list"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
)

// AnswerReadTracker tracks one connection. It finds out whether a request is sequential. A request
// is sequential if the server read no byte of it before the server wrote the last byte of the
// previous answer, or if it is the first on the connection. The tracker recognizes requests by the
// empty line that ends their headers. A request body makes it count too many headers, or leaves
// bytes after the last counted header. The next request then counts as not sequential, which is the
// safe error. Bytes in the kernel's receive buffer that no Read has returned are not seen. Each
// tracker in use has its own address, so a pointer to it identifies the connection. Safe for
// concurrent use.
type AnswerReadTracker struct {
	mu          sync.Mutex // guards the fields below, because net/http reads ahead while a handler runs
	seen        requestHeadCounter
	seenAtWrite requestHeadCounter // value of seen just before the last byte was written
	requests    int                // requests whose headers net/http has read
	sequential  bool               // whether the newest request is sequential
}

// requestHeadCounter counts the request headers in the bytes read from a connection.
type requestHeadCounter struct {
	complete int  // headers that have ended
	partial  bool // there are bytes after the end of the last complete header
	inLine   bool // the current line is not empty
}

func (h *requestHeadCounter) countHeadEnds(p []byte) {
	for _, b := range p {
		switch {
		case b == '\n' && !h.inLine: // net/http also accepts lines that end without a carriage return
			h.complete, h.partial = h.complete+1, false
		case b == '\n':
			h.inLine = false
		default:
			h.partial = true
			h.inLine = h.inLine || b != '\r'
		}
	}
}

// countRequestHeads counts the headers in p, the bytes that a Read returned.
func (t *AnswerReadTracker) countRequestHeads(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seen.countHeadEnds(p)
}

// snapshotHeadsAtWrite records what has been read so far. The connection calls it just before it
// writes the last byte of each Write.
func (t *AnswerReadTracker) snapshotHeadsAtWrite() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seenAtWrite = t.seen
}

// countRequest counts a request when net/http has read its headers, and decides whether the request
// is sequential.
func (t *AnswerReadTracker) countRequest() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sequential = t.seenAtWrite.complete == t.requests && !t.seenAtWrite.partial
	t.requests++
}

type connTrackerKey struct{}

// TrackerIfPreviousAnswerRead returns the tracker of the connection that r came on, if r is
// sequential: its sender then had read the previous answer on that connection. Otherwise it returns
// a new tracker, which equals that of no other connection. A request over TLS always gets a new
// tracker, because the end of an answer cannot be seen inside TLS. So does a request to an
// HTTPServer without TrackConns.
func TrackerIfPreviousAnswerRead(r *http.Request) (trackerOrNew *AnswerReadTracker) {
	if t, ok := r.Context().Value(connTrackerKey{}).(*AnswerReadTracker); ok {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.sequential {
			return t
		}
	}
	return &AnswerReadTracker{}
}

// trackConn is the ConnContext of an http.Server. It puts the connection's tracker into the context
// of its requests, for TrackerIfPreviousAnswerRead.
func trackConn(ctx context.Context, c net.Conn) context.Context {
	plain, ok := c.(*trackedConn)
	if !ok {
		return ctx
	}
	plain.tracker = &AnswerReadTracker{}
	return context.WithValue(ctx, connTrackerKey{}, plain.tracker)
}

// limitListener bounds the number of open connections. When max connections are open, a new one
// replaces the connection that has waited longest for a request. So a peer that opens many
// connections without sending requests cannot keep others out. If every open connection has a
// request in flight, the new one waits.
type limitListener struct {
	net.Listener
	max  int
	room *sync.Cond // uses mu; signalled when a connection may be accepted

	mu      sync.Mutex // guards the fields below
	open    int
	closed  bool
	waiting list.List // of *trackedConn without a complete request header, the longest waiting first
}

func newLimitListener(l net.Listener, max int) *limitListener {
	limited := &limitListener{Listener: l, max: max}
	limited.room = sync.NewCond(&limited.mu)
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
			first.Value.(*trackedConn).Close()
			l.mu.Lock()
		} else {
			l.room.Wait()
		}
	}
	defer l.mu.Unlock()
	if l.closed {
		c.Close()
		return nil, net.ErrClosed
	}
	l.open++
	return &trackedConn{Conn: c, listener: l}, nil
}

// Close closes the listener. An Accept that waits for room returns net.ErrClosed.
func (l *limitListener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.room.Signal()
	return l.Listener.Close()
}

// trackWaitingConn is the ConnState of an http.Server. It keeps the list of waiting connections.
// net/http reports StateActive when it has read the headers of a request, and StateIdle when it has
// written the answer.
func (l *limitListener) trackWaitingConn(c net.Conn, st http.ConnState) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	conn := c.(*trackedConn) // Accept returns no other type
	if st == http.StateActive && conn.tracker != nil {
		conn.tracker.countRequest() // StateActive comes once for each request, before its handler runs
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case conn.closed:
	case st == http.StateNew, st == http.StateIdle:
		conn.waiting = l.waiting.PushBack(conn)
		l.room.Signal()
	case conn.waiting != nil:
		l.waiting.Remove(conn.waiting)
		conn.waiting = nil
	}
}

// trackedConn is a connection that limitListener.Accept returned.
type trackedConn struct {
	net.Conn
	listener *limitListener
	tracker  *AnswerReadTracker // nil over TLS and without TrackConns
	closed   bool               // guarded by the listener's mu
	waiting  *list.Element      // element of the listener's waiting list, or nil; guarded by its mu
}

func (c *trackedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.tracker != nil {
		c.tracker.countRequestHeads(p[:n])
	}
	return n, err
}

// Write writes the last byte of p by itself if the connection is tracked. The peer cannot have the
// whole answer before that byte is sent. So every request read until then is not sequential, even
// if the peer was slow to read the first part of the answer.
func (c *trackedConn) Write(p []byte) (n int, err error) {
	if c.tracker != nil && len(p) > 0 {
		if len(p) > 1 {
			if n, err = c.Conn.Write(p[:len(p)-1]); err != nil {
				return n, err
			}
		}
		c.tracker.snapshotHeadsAtWrite()
	}
	last, err := c.Conn.Write(p[n:])
	return n + last, err
}

// CloseWrite closes the sending direction only. net/http calls it before it closes a connection, so
// that a peer that is still sending can read the answer.
func (c *trackedConn) CloseWrite() error {
	if tcp, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return tcp.CloseWrite()
	}
	return nil
}

func (c *trackedConn) Close() error {
	err := c.Conn.Close()
	l := c.listener
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.closed {
		return err
	}
	c.closed = true
	l.open--
	if c.waiting != nil {
		l.waiting.Remove(c.waiting)
	}
	l.room.Signal()
	return err
}
