package main

// This file manages the connections of a listener. Their number is bounded. When a new connection
// needs room, a connection that only waits for a request is closed, if there is one. A plain HTTP
// connection can be tracked, to find out whether the peer had read the previous answer before it
// sent its next request.

import (
	"container/list"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
)

// AnswerReadTracker tracks one connection, and finds out whether a request is sequential. A request
// is sequential if it is the first on the connection. It is also sequential if the server wrote the
// last byte of the previous answer before it read the first byte of the request.
//
// The tracker recognizes the end of a request's headers by the empty line. A request with a body
// makes the tracker count too many headers, or leaves bytes after the counted headers. The next
// request then usually counts as not sequential. This error is safe, because then no caller assumes
// that the peer has read the previous answer. The tracker does not see bytes that are in the
// kernel's receive buffer but that no Read has returned. No two trackers in use have the same
// address, so a pointer to a tracker identifies the connection. Safe for concurrent use.
type AnswerReadTracker struct {
	mu          sync.Mutex // guards the fields below, because net/http reads ahead while a handler runs
	seen        requestHeadCounter
	seenAtWrite requestHeadCounter // value of seen just before the last byte of the latest Write was written
	requests    int                // number of requests whose headers net/http has read
	sequential  bool               // whether the newest request is sequential
}

// requestHeadCounter counts request heads in the bytes read from a connection. A head is the
// request line and the headers of one request, up to the empty line after them.
type requestHeadCounter struct {
	complete int  // number of heads that have ended
	partial  bool // whether bytes have come after the last complete head, or since the start if there is none
	inLine   bool // whether the current line has bytes other than carriage returns
}

func (h *requestHeadCounter) countHeadEnds(p []byte) {
	for _, b := range p {
		switch {
		case b == '\n' && !h.inLine: // an empty line; like net/http, accept a line that ends without a carriage return
			h.complete, h.partial = h.complete+1, false
		case b == '\n':
			h.inLine = false
		default:
			h.partial = true
			h.inLine = h.inLine || b != '\r'
		}
	}
}

// countRequestHeads counts the request heads in p, which has the bytes that one Read returned.
func (t *AnswerReadTracker) countRequestHeads(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seen.countHeadEnds(p)
}

// snapshotHeadsAtWrite records the request heads counted so far. The connection calls it in each
// Write, just before it writes the last byte.
func (t *AnswerReadTracker) snapshotHeadsAtWrite() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seenAtWrite = t.seen
}

// countRequest counts a request and decides whether the request is sequential. It must be called
// each time that net/http has read the headers of a request.
func (t *AnswerReadTracker) countRequest() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sequential = t.seenAtWrite.complete == t.requests && !t.seenAtWrite.partial
	t.requests++
}

type connTrackerKey struct{}

// TrackerIfPreviousAnswerRead returns the tracker of r's connection if r is sequential. The caller
// may then assume that the sender of r had read the previous answer on that connection, because
// HTTP clients that do not pipeline read an answer before they send the next request. Otherwise it
// returns a new tracker, which differs from the tracker of every connection. A request over TLS
// always gets a new tracker, because the end of an answer cannot be seen inside TLS. So does a
// request to an HTTPServer without TrackConns.
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

// trackConn is the ConnContext of an http.Server. It creates a tracker for each plain HTTP
// connection. It puts the tracker into the context of the connection's requests, where
// TrackerIfPreviousAnswerRead finds it.
func trackConn(ctx context.Context, c net.Conn) context.Context {
	plain, ok := c.(*trackedConn)
	if !ok {
		return ctx
	}
	plain.tracker = &AnswerReadTracker{}
	return context.WithValue(ctx, connTrackerKey{}, plain.tracker)
}

// limitListener bounds the number of open connections. When max connections are open, a new
// connection replaces the connection that has waited longest for a request. So a peer that opens
// many connections without sending requests cannot keep others out. If every open connection has a
// request in flight, the new connection waits.
type limitListener struct {
	net.Listener
	max  int
	room *sync.Cond // uses mu; signalled when a waiting Accept should check again whether there is room

	mu      sync.Mutex // guards the fields below
	open    int
	closed  bool
	waiting list.List // of each *trackedConn that waits for a complete request header, the longest waiting first
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

// Close closes the listener. A call of Accept that waits until fewer connections are open returns
// net.ErrClosed.
func (l *limitListener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.room.Signal()
	return l.Listener.Close()
}

// trackWaitingConn is the ConnState of an http.Server. It updates l.waiting, the list of the
// connections that wait for a request. net/http reports StateActive when it has read the headers of
// a request, and StateIdle when it has written the answer.
func (l *limitListener) trackWaitingConn(c net.Conn, st http.ConnState) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	conn := c.(*trackedConn) // limitListener.Accept returns no other type of connection
	if st == http.StateActive && conn.tracker != nil {
		conn.tracker.countRequest() // net/http reports StateActive once for each request, before it calls the handler
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
	tracker  *AnswerReadTracker // nil for TLS, and for an HTTPServer without TrackConns
	closed   bool               // whether Close was called; guarded by the listener's mu
	waiting  *list.Element      // this connection in the listener's waiting list, or nil; guarded by the listener's mu
}

func (c *trackedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.tracker != nil {
		c.tracker.countRequestHeads(p[:n])
	}
	return n, err
}

// Write writes the last byte of p by itself if the connection is tracked. Before that byte is sent,
// the peer cannot have read the whole answer. So the next request is not sequential if the server
// reads a byte of it before that, even while the peer is slow to read the rest of p.
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

// CloseWrite closes the sending direction only. net/http may call it before it closes a connection,
// so that a peer that is still sending can read the answer.
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
