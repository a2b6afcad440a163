package main

// Connections of a listener: their number is bounded, those that only wait make room, and it is
// known of a request whether it came after its sender had read the previous answer.

import (
	"container/list"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
)

// AnswerReadTracker is one connection. It knows whether a request on it was sequential: no byte of
// the request was read before the last byte of the previous answer was written. It counts the empty
// lines that end the headers of requests. A body makes it count too many, or leaves bytes after the
// last end; then the next request counts as not sequential, which is the safe error. It does not
// see bytes that the kernel has received and no Read has returned. The address of a
// AnswerReadTracker is unlike that of any other in use.
type AnswerReadTracker struct {
	mu          sync.Mutex // guards the rest: net/http reads ahead while a handler runs
	seen        requestHeadCounter
	seenAtWrite requestHeadCounter // seen before the last byte that was written
	requests    int
	sequential  bool // the last request was
}

// requestHeadCounter counts the headers of requests in the bytes of a connection.
type requestHeadCounter struct {
	complete int  // headers that have ended
	partial  bool // bytes stand after the last end
	inLine   bool // bytes stand in the last line
}

func (h *requestHeadCounter) countHeadEnds(p []byte) {
	for _, b := range p {
		switch {
		case b == '\n' && !h.inLine: // net/http takes an end without carriage returns too
			h.complete, h.partial = h.complete+1, false
		case b == '\n':
			h.inLine = false
		default:
			h.partial = true
			h.inLine = h.inLine || b != '\r'
		}
	}
}

// countRequestHeads takes bytes that were read.
func (t *AnswerReadTracker) countRequestHeads(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seen.countHeadEnds(p)
}

// snapshotHeadsAtWrite notes that the last byte of a write is about to be written.
func (t *AnswerReadTracker) snapshotHeadsAtWrite() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seenAtWrite = t.seen
}

// countRequest counts a request whose headers net/http has read.
func (t *AnswerReadTracker) countRequest() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sequential = t.seenAtWrite.complete == t.requests && !t.seenAtWrite.partial
	t.requests++
}

type connTrackerKey struct{}

// TrackerIfPreviousAnswerRead returns the connection that a request came on, if the request is
// sequential. Any other request gets a new AnswerReadTracker, because its sender has not read the
// previous answer. So does a request over TLS, where the end of an answer cannot be seen, and one
// to a server without TrackConns.
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

// trackConn is an http.Server's ConnContext, for TrackerIfPreviousAnswerRead.
func trackConn(ctx context.Context, c net.Conn) context.Context {
	plain, ok := c.(*trackedConn)
	if !ok {
		return ctx
	}
	plain.tracker = &AnswerReadTracker{}
	return context.WithValue(ctx, connTrackerKey{}, plain.tracker)
}

// limitListener bounds connections. When there are max, the one that has waited longest for a
// request is closed for the new one, so that a peer that opens many and asks nothing keeps no
// other out. If all are busy, the new one waits.
type limitListener struct {
	net.Listener
	max  int
	room *sync.Cond // on mu: signalled when there may be room

	mu      sync.Mutex // guards the rest
	open    int
	closed  bool
	waiting list.List // of *trackedConn whose next request has no complete header, the longest first
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

// Close closes the listener, and ends an Accept that waits for room.
func (l *limitListener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.room.Signal()
	return l.Listener.Close()
}

// trackWaitingConn is an http.Server's ConnState: a connection is active from the end of a
// request's head to that of its answer.
func (l *limitListener) trackWaitingConn(c net.Conn, st http.ConnState) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	conn := c.(*trackedConn) // all are of Accept
	if st == http.StateActive && conn.tracker != nil {
		conn.tracker.countRequest() // once for each request, before its handler runs
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

// trackedConn is a connection of a limitListener.
type trackedConn struct {
	net.Conn
	listener *limitListener
	tracker  *AnswerReadTracker // nil over TLS
	closed   bool               // the listener's mu guards it
	waiting  *list.Element      // and this: among those waiting, or nil
}

func (c *trackedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.tracker != nil {
		c.tracker.countRequestHeads(p[:n])
	}
	return n, err
}

// Write writes the last byte of p by itself, if the connection is tracked. The peer cannot have
// the whole answer before that byte, so every request that was read until then is not sequential,
// even if the peer was slow to take the rest.
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

// CloseWrite closes one direction. net/http calls it, so that a peer that still sends can read the
// answer.
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
