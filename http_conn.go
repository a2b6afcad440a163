package main

// Connections of a listener: their number is bounded, the ones that only wait make room, and a
// request is known to come after its connection's last answer was read, or not.

import (
	"container/list"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
)

// ConnTracker is one connection; its address is unlike that of any other that lives. It knows
// whether a request is in turn: no byte of the request was read before the last byte of
// the previous answer was written. It counts the empty lines that end the heads of
// requests. A body makes it count too many, or leaves bytes after the last end; then the
// next request counts as not in turn, which is the safe error. It does not see bytes that
// the kernel has received and no Read has returned.
type ConnTracker struct {
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
func (t *ConnTracker) received(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := &t.read
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
func (t *ConnTracker) writes() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.written = t.read
}

// request counts a request that was read.
func (t *ConnTracker) request() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.inTurn = t.written.ends == t.requests && !t.written.more
	t.requests++
}

type connKey struct{}

// TrackerOf returns the connection that a request came on. A request that is not in turn
// gets a Conn of its own, because its sender has not read the previous answer. A request
// over TLS also does, because the turns cannot be seen there, and a request to a server
// that is no Web with Turns.
func TrackerOf(r *http.Request) *ConnTracker {
	if c, ok := r.Context().Value(connKey{}).(*ConnTracker); ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.inTurn {
			return c
		}
	}
	return &ConnTracker{}
}

// withConn is an http.Server's ConnContext, for ConnOf.
func withConn(ctx context.Context, c net.Conn) context.Context {
	plain, ok := c.(*limitConn)
	if !ok {
		return ctx
	}
	plain.conn = &ConnTracker{}
	return context.WithValue(ctx, connKey{}, plain.conn)
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
	conn     *ConnTracker  // nil over TLS
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
