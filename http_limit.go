package main

// This file bounds the number of connections of a listener. When a new connection needs room,
// another connection is closed, which connTable chooses. No limit applies until the listener is
// full, because a proxy may bring all sites from one address. An error of accept never ends the
// listener, because it may be caused by a shortage of file descriptors that passes.

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

const acceptLogInterval = time.Minute // least time between two log lines of one listener about failures to accept a connection

// ConnMetrics counts what happens to connections of the listeners of this process.
type ConnMetrics struct{ closed, acceptErrors, handshakeErrors *Counter }

// Values of the label kind in telemeter_connections_closed_total.
const (
	kindStranger = "stranger"
	kindKnown    = "known"
)

// NewConnMetrics registers the metrics of connections.
func NewConnMetrics(m *Metrics) *ConnMetrics {
	c := &ConnMetrics{
		closed: m.Counter("telemeter_connections_closed_total",
			"Connections closed to make room for new ones, by listener and kind: known if a sender has authenticated on the connection or lately from its address, else stranger.", "listener", "kind"),
		acceptErrors:    m.Counter("telemeter_accept_errors_total", "Failures to accept a connection, such as a shortage of file descriptors, by listener.", "listener"),
		handshakeErrors: m.Counter("telemeter_tls_handshake_failures_total", "Failed TLS handshakes of clients and scrapers, by cause.", "cause"),
	}
	for _, cause := range handshakeCauses {
		c.handshakeErrors.Add(0, cause)
	}
	return c
}

// limitListener bounds the number of open connections. When max connections are open, a new
// connection replaces another one; see connTable.victim. If every open connection is protected, the
// new connection waits.
type limitListener struct {
	net.Listener
	name    string // names the listener in logs and metrics
	max     int
	metrics *ConnMetrics
	log     *slog.Logger
	room    *sync.Cond // uses mu; signalled when a waiting Accept should check again whether there is room

	logged time.Time // when the last failure to accept was logged; used only by Accept, which one goroutine calls
	failed int       // failures to accept since logged; used only by Accept

	mu     sync.Mutex // guards the fields below
	closed bool
	table  *connTable // of each connection that this listener counts as open
}

func newLimitListener(l net.Listener, name string, max int, metrics *ConnMetrics, log *slog.Logger) *limitListener {
	limited := &limitListener{Listener: l, name: name, max: max, metrics: metrics, log: log, table: newConnTable(max)}
	limited.room = sync.NewCond(&limited.mu)
	metrics.closed.Add(0, name, kindStranger)
	metrics.closed.Add(0, name, kindKnown)
	metrics.acceptErrors.Add(0, name)
	return limited
}

// Accept returns the next connection, once there is room for it. If the listener is closed, the
// error is net.ErrClosed. After any other error http.Server calls Accept again. Only one goroutine
// may call Accept.
func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		switch {
		case err == nil:
			return l.admit(c)
		case errors.Is(err, net.ErrClosed):
			return nil, err
		}
		l.countAcceptError(err)
		if !errors.Is(err, syscall.EMFILE) && !errors.Is(err, syscall.ENFILE) {
			return nil, temporaryError{err}
		}
		// The process has as many files open as it may, so the listener is full before it has max
		// connections.
		l.mu.Lock()
		victim := l.takeVictim()
		l.mu.Unlock()
		if victim == nil {
			return nil, temporaryError{err}
		}
		victim.Conn.Close() // not in a goroutine, because the next accept needs its file descriptor
	}
}

// admit makes room for c and returns it as a trackedConn.
func (l *limitListener) admit(c net.Conn) (net.Conn, error) {
	conn := &trackedConn{Conn: c, listener: l}
	conn.entry.conn, conn.entry.addr = conn, peerAddr(c.RemoteAddr())
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.table.open >= l.max && !l.closed {
		if victim := l.takeVictim(); victim != nil {
			// Close waits until the goroutine that reads from the connection has noticed. A flood
			// would slow down Accept if it waited, too.
			go victim.Conn.Close()
		} else {
			l.room.Wait()
		}
	}
	if l.closed {
		c.Close()
		return nil, net.ErrClosed
	}
	l.table.add(&conn.entry)
	return conn, nil
}

// takeVictim removes the connection that should be closed to make room from l.table, and counts it
// as closed. The caller must hold l.mu and must close the connection. It returns nil if there is
// none.
func (l *limitListener) takeVictim() *trackedConn {
	victim := l.table.victim()
	if victim == nil {
		return nil
	}
	kind := kindKnown
	if l.table.isStranger(victim) {
		kind = kindStranger
	}
	l.metrics.closed.Inc(l.name, kind)
	l.table.remove(victim)
	return victim.conn
}

// countAcceptError counts an error of accept. It logs the error unless one was logged less than
// acceptLogInterval ago.
func (l *limitListener) countAcceptError(err error) {
	l.metrics.acceptErrors.Inc(l.name)
	l.failed++
	if now := time.Now(); now.Sub(l.logged) >= acceptLogInterval {
		l.log.Error("cannot accept connections", "listener", l.name, "failures", l.failed, "err", err)
		l.logged, l.failed = now, 0
	}
}

// temporaryError is an error of accept. http.Server waits for up to a second and then accepts
// again, because the method Temporary returns true.
type temporaryError struct{ error }

func (e temporaryError) Unwrap() error { return e.error }
func (temporaryError) Timeout() bool   { return false }
func (temporaryError) Temporary() bool { return true }

// Close closes the listener. A call of Accept that waits until fewer connections are open returns
// net.ErrClosed.
func (l *limitListener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.room.Signal()
	return l.Listener.Close()
}

// onConnState is the ConnState of an http.Server. net/http reports StateActive when it has read the
// headers of a request, and StateIdle when it has written the answer.
func (l *limitListener) onConnState(c net.Conn, st http.ConnState) {
	switch st {
	case http.StateIdle:
		conn := trackedConnOf(c)
		conn.lingers.Store(false)
		l.unprotect(conn)
	case http.StateActive:
		if t, ok := c.(*answerConn); ok {
			t.tracker.countRequest() // net/http reports StateActive once for each request, before it calls the handler
		}
	}
}

// protect protects c from being closed to make room, until unprotect or remove is called.
func (l *limitListener) protect(c *trackedConn, sender string) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.table.protect(&c.entry, sender, now)
}

// unprotect makes c the connection that has waited for the shortest time.
func (l *limitListener) unprotect(c *trackedConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.table.unprotect(&c.entry)
	l.room.Signal()
}

// remove makes room, because c is being closed.
func (l *limitListener) remove(c *trackedConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.table.remove(&c.entry)
	l.room.Signal()
}
