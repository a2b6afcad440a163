package main

// This file manages single connections, which handlers find through their requests. A connection
// can be tracked, to find out whether the peer had read the previous answer before it sent its next
// request. A connection on which a request has been authenticated is protected from being closed for
// another. The body of a refused request is not read after the answer.

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// lingerTime is how long a connection stays half open after the answer to a request whose body has
// not been read. If it were closed at once, the kernel would send a reset, and the peer could lose
// the answer.
const lingerTime = 500 * time.Millisecond

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
// returns a new tracker, which differs from the tracker of every connection. A request to an
// HTTPServer without TrackConns always gets a new tracker.
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

// putTrackerIntoContext puts the tracker of a connection into the context of the connection's
// requests, where TrackerIfPreviousAnswerRead finds it.
func putTrackerIntoContext(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*answerConn); ok {
		return context.WithValue(ctx, connTrackerKey{}, t.tracker)
	}
	return ctx
}

type trackedConnKey struct{}

// putConnIntoContext puts a connection into the context of the connection's requests, where
// connOfRequest finds it.
func putConnIntoContext(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, trackedConnKey{}, trackedConnOf(c))
}

// trackedConnOf returns the trackedConn that carries c. c is a connection of a limitListener, a TLS
// connection over one, or an answerConn over either.
func trackedConnOf(c net.Conn) *trackedConn {
	if t, ok := c.(*answerConn); ok {
		c = t.Conn
	}
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	return c.(*trackedConn) // limitListener.Accept returns no other type of connection
}

// connOfRequest returns the connection of a request, or nil if no HTTPServer serves the request.
func connOfRequest(r *http.Request) *trackedConn {
	c, _ := r.Context().Value(trackedConnKey{}).(*trackedConn)
	return c
}

// ProtectConn must be called once r has been authenticated. Until r is answered, the listener does
// not close r's connection to make room for another connection. The listener also remembers that
// sender uses the address from which r came, so that connections from there are closed after
// connections of strangers. sender names the authenticated sender, such as a cluster ID. If sender
// is empty, its address stands for it. ProtectConn does nothing if no HTTPServer serves r.
func ProtectConn(r *http.Request, sender string) {
	if c := connOfRequest(r); c != nil {
		c.listener.protect(c, sender)
	}
}

// leaveBodyUnread wraps h. If h has not read the whole body of a request, no more of it is read from
// the connection, and the connection is closed after the answer. Otherwise net/http would read up to
// 256 KiB of the body, for up to the ReadTimeout of the server.
func leaveBodyUnread(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength == 0 {
			h.ServeHTTP(w, r)
			return
		}
		// A copy of r, because net/http looks at the Body of r itself.
		body := &endingBody{ReadCloser: r.Body}
		copied := r.WithContext(r.Context())
		copied.Body = body
		defer func() {
			// A deadline after the end of the body would break the connection for later requests: a
			// background read of net/http would fail, and end the contexts of all of them.
			if !body.ended {
				http.NewResponseController(w).SetReadDeadline(time.Unix(1, 0))
				connOfRequest(r).lingers.Store(true)
			}
		}()
		h.ServeHTTP(w, copied)
	})
}

// endingBody is the body of a request, and knows whether it was read to its end.
type endingBody struct {
	io.ReadCloser
	ended bool
}

func (b *endingBody) Read(p []byte) (n int, err error) {
	n, err = b.ReadCloser.Read(p)
	b.ended = b.ended || err == io.EOF
	return n, err
}

// peerAddr returns the address by which connections are counted; see peerNetwork. It returns the
// zero Addr if a is not a TCP address.
func peerAddr(a net.Addr) netip.Addr {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return peerNetwork(tcp.AddrPort().Addr())
}

// answerListener wraps the connections that a listener accepts in answerConns.
type answerListener struct {
	net.Listener
	errorLog *log.Logger // for failed TLS handshakes
}

func (l answerListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &answerConn{Conn: c, tracker: &AnswerReadTracker{}, errorLog: l.errorLog}, nil
}

// answerConn is the outermost layer of a tracked connection. It sees requests and answers as plain
// text, with and without TLS. net/http does the TLS handshake only if the outermost layer is a
// tls.Conn, so answerConn does the handshake in the first Read.
type answerConn struct {
	net.Conn // a trackedConn, or a TLS connection over one
	tracker  *AnswerReadTracker
	errorLog *log.Logger
	begun    bool // whether Read has been called; used only by Read, which net/http never calls concurrently
}

func (c *answerConn) Read(p []byte) (int, error) {
	if !c.begun {
		c.begun = true
		if secure, ok := c.Conn.(*tls.Conn); ok && !c.handshake(secure) {
			return 0, io.EOF // net/http then closes the connection, and reports no further error
		}
	}
	n, err := c.Conn.Read(p)
	c.tracker.countRequestHeads(p[:n])
	return n, err
}

// handshake does the TLS handshake, and reports whether it succeeded. A failure is reported in the
// words of net/http. net/http has set the deadline for reading, which is readHeaderTimeout. A
// request in plain HTTP is answered in plain HTTP, as net/http does.
func (c *answerConn) handshake(secure *tls.Conn) (ok bool) {
	secure.SetWriteDeadline(time.Now().Add(readHeaderTimeout)) // net/http sets another deadline when it has read a request
	err := secure.Handshake()
	if err == nil {
		return true
	}
	reason := err.Error()
	var bad tls.RecordHeaderError
	if errors.As(err, &bad) && bad.Conn != nil && bad.RecordHeader[0] >= 'A' && bad.RecordHeader[0] <= 'Z' {
		io.WriteString(bad.Conn, "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n"+speaksTLSText+"\n")
		reason = "client sent an HTTP request to an HTTPS server"
	}
	c.errorLog.Printf("http: TLS handshake error from %s: %s", c.RemoteAddr(), reason)
	return false
}

// speaksTLSText is the answer of a TLS listener to a request in plain HTTP.
const speaksTLSText = "this listener speaks TLS: use https://"

// IsAnswerOfTLSPort reports whether a TLS port has answered a request in plain HTTP with this text
// and the status 400. It knows the texts of this program, of net/http, nginx and Apache.
func IsAnswerOfTLSPort(text string) bool {
	return slices.ContainsFunc([]string{speaksTLSText, "HTTP request to an HTTPS server", "HTTP request was sent to HTTPS port", "speaking plain HTTP to an SSL-enabled server port"},
		func(known string) bool { return strings.Contains(text, known) })
}

// httpWriteBuffer is the size of the buffer that net/http writes answers from.
const httpWriteBuffer = 4 << 10

// Write writes the last byte of p by itself if p may be the end of an answer. Before that byte is
// sent, the peer cannot have read the whole answer. So the next request is not sequential if the
// server reads a byte of it before that, even while the peer is slow to read the rest of p. Only a
// write that is larger than net/http's buffer is certainly not the end: it is the inner part of a
// large chunk of a chunked answer, and the end of the answer follows from the buffer.
func (c *answerConn) Write(p []byte) (n int, err error) {
	if len(p) > httpWriteBuffer {
		return c.Conn.Write(p)
	}
	if len(p) > 1 {
		if n, err = c.Conn.Write(p[:len(p)-1]); err != nil {
			return n, err
		}
	}
	if len(p) > 0 {
		c.tracker.snapshotHeadsAtWrite()
	}
	last, err := c.Conn.Write(p[n:])
	return n + last, err
}

// CloseWrite closes the sending direction of the layer below, which has one.
func (c *answerConn) CloseWrite() error {
	return c.Conn.(interface{ CloseWrite() error }).CloseWrite()
}

// trackedConn is a connection that limitListener.Accept returned.
type trackedConn struct {
	net.Conn
	listener *limitListener
	entry    connEntry   // guarded by the listener's mu
	lingers  atomic.Bool // whether Close waits for lingerTime before it closes the connection
}

// CloseWrite closes the sending direction only. A peer that is still sending can then read the
// answer. If net/http calls CloseWrite, it waits for as long as lingerTime itself before it calls
// Close.
func (c *trackedConn) CloseWrite() error {
	c.lingers.Store(false)
	if tcp, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return tcp.CloseWrite()
	}
	return nil
}

// Close closes the connection. If the peer may still be sending the body of a refused request,
// Close only closes the sending direction, and the connection is closed after lingerTime. Until
// then it counts as open, and it may be closed at any time to make room.
func (c *trackedConn) Close() error {
	if c.lingers.Swap(false) {
		c.listener.unprotect(c)
		time.AfterFunc(lingerTime, func() { c.Close() })
		return c.CloseWrite()
	}
	c.listener.remove(c)
	return c.Conn.Close()
}
