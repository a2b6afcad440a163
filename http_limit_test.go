package main

// Tests of limitListener: which connection a full listener closes, how it handles errors of accept,
// and that a site can push while others flood the listener.

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const (
	strangerRequest     = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	slowStrangerRequest = "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
	siteRequest         = "GET /site HTTP/1.1\r\nHost: x\r\n\r\n"
	slowSiteRequest     = "GET /site/slow HTTP/1.1\r\nHost: x\r\n\r\n"
)

// limitRig is an HTTPServer with a low limit on connections, with its client connections. Requests
// whose path begins with /site count as authenticated. The server answers a request whose path ends
// in /slow only when the channel finish is closed, and any other request at once.
type limitRig struct {
	t       *testing.T
	pipes   *pipeListener
	finish  chan struct{}
	conns   []net.Conn
	closed  chan int // indices in conns of the connections that the server has closed
	answers chan int // for each answer that arrived, the index of its connection in conns
}

// newLimitRig starts the server with at most max open connections. It must be called in a synctest
// bubble. The test must close finish if it has sent a slow request.
func newLimitRig(t *testing.T, max int) *limitRig {
	r := &limitRig{t: t, pipes: newPipeListener(), finish: make(chan struct{}), closed: make(chan int, 100), answers: make(chan int, 100)}
	srv := HTTPServer{Name: "test", Listener: r.pipes, Conns: NewConnMetrics(NewMetrics()), Log: slog.New(slog.DiscardHandler),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if strings.HasPrefix(req.URL.Path, "/site") {
				ProtectConn(req, "site")
			}
			if strings.HasSuffix(req.URL.Path, "/slow") {
				<-r.finish
			}
		})}
	ended := make(chan error, 1)
	go func() { ended <- srv.runWithLimit(t.Context(), max) }()
	t.Cleanup(func() {
		for _, c := range r.conns {
			c.Close()
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return r
}

// open opens a connection, sends text on it, and waits until every goroutine of the test is
// blocked, so that the server has done all that it can do by now.
func (r *limitRig) open(text string) {
	r.t.Helper()
	c, ok := r.pipes.dial()
	if !ok {
		r.t.Fatalf("connection %d was not accepted", len(r.conns))
	}
	n := len(r.conns)
	r.conns = append(r.conns, c)
	go func() {
		for b := make([]byte, 4<<10); ; {
			if _, err := c.Read(b); err != nil {
				r.closed <- n
				return
			}
			r.answers <- n
		}
	}()
	r.send(n, text)
}

// send sends text on the connection with number n, and waits until every goroutine of the test is
// blocked, so that the server has done all that it can do by now.
func (r *limitRig) send(n int, text string) {
	if text != "" {
		go io.WriteString(r.conns[n], text)
	}
	synctest.Wait()
}

// checkClosed takes the next closed connection from r.closed, and checks that its number is want.
// The test fails if no connection has been closed.
func (r *limitRig) checkClosed(want int) {
	r.t.Helper()
	select {
	case n := <-r.closed:
		if n != want {
			r.t.Errorf("connection %d was closed, want %d", n, want)
		}
	default:
		r.t.Errorf("no connection was closed, want %d", want)
	}
}

// checkTotals checks how many connections were closed, except those that checkClosed has taken, and
// how many answers arrived since the start.
func (r *limitRig) checkTotals(closed, answers int) {
	r.t.Helper()
	if len(r.closed) != closed || len(r.answers) != answers {
		r.t.Errorf("%d connections were closed and %d answers arrived, want %d and %d", len(r.closed), len(r.answers), closed, answers)
	}
}

// When the limit on open connections is reached, a new connection replaces another one. Of the
// connections of one address, connections without an authenticated request are replaced first, even
// while such a request is being handled. Among equals it is the connection that has waited longest
// since it was opened or since its last answer. A connection is never replaced while an
// authenticated request on it is being handled.
func TestConnectionLimitReplaces(t *testing.T) {
	const max = 8
	synctest.Test(t, func(t *testing.T) {
		r := newLimitRig(t, max)
		for _, text := range []string{"", "GET / HTTP/1.1\r\nX: ", slowStrangerRequest, siteRequest, siteRequest, strangerRequest, strangerRequest} {
			r.open(text)
		}
		r.send(3, siteRequest)     // after this request, connection 4 has waited longer than connection 3
		r.send(5, strangerRequest) // after this request, connection 6 has waited longer than connection 5
		r.open(slowSiteRequest)
		r.checkTotals(0, 6)
		for _, want := range []int{0, 1, 2, 6, 5, 4, 3} {
			r.open(slowSiteRequest)
			r.checkClosed(want)
		}
		close(r.finish)
		synctest.Wait()
	})
}

// If the limit on open connections is reached and all of them have an authenticated request in
// flight, a new connection waits. When a request has been answered, the new connection replaces the
// connection of that request.
func TestConnectionLimitAllProtected(t *testing.T) {
	const max = 8
	synctest.Test(t, func(t *testing.T) {
		r := newLimitRig(t, max)
		for range max {
			r.open(slowSiteRequest)
		}
		r.open(strangerRequest)
		time.Sleep(10 * time.Second)
		r.checkTotals(0, 0)
		close(r.finish)
		synctest.Wait()
		r.checkTotals(1, max+1)
	})
}

// If an HTTPServer has maxConnections idle connections, one more connection makes it close the
// connection that was opened first. It does so at once, not at the end of a timeout.
func TestConnectionLimitOfServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		l, end := runHTTPServer(func(w http.ResponseWriter, r *http.Request) {})
		var conns []net.Conn
		for range maxConnections + 1 {
			c, _ := l.dial()
			conns = append(conns, c)
		}
		if _, err := conns[0].Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("reading from the first connection: %v, want EOF", err)
		}
		if d := time.Since(begin); d > time.Second {
			t.Errorf("the first connection was closed after %v, want at once", d)
		}
		for _, c := range conns {
			c.Close()
		}
		if _, err := end(); err != nil {
			t.Error(err)
		}
	})
}

// newTestLimitListener returns a limitListener that counts and logs nowhere.
func newTestLimitListener(l net.Listener, max int) *limitListener {
	return newLimitListener(l, "test", max, NewConnMetrics(NewMetrics()), slog.New(slog.DiscardHandler))
}

// If a connection is closed twice, and net/http reports it as idle after that, a limitListener
// counts it as closed once.
func TestLimitListenerCountsCloseOnce(t *testing.T) {
	inner := newPipeListener()
	limited := newTestLimitListener(inner, 1)
	go inner.dial()
	c, err := limited.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	c.Close()
	limited.onConnState(c, http.StateIdle)
	if limited.table.open != 0 {
		t.Errorf("%d connections are open, want 0", limited.table.open)
	}
}

// If an Accept of a limitListener waits because the limit on connections is reached, Close makes it
// return net.ErrClosed.
func TestLimitListenerCloseEndsAccept(t *testing.T) {
	inner := newPipeListener()
	limited := newTestLimitListener(inner, 1)
	go inner.dial()
	c, err := limited.Accept()
	if err != nil {
		t.Fatal(err)
	}
	limited.protect(c.(*trackedConn), "site")
	refused := make(chan error, 1)
	go func() {
		_, err := limited.Accept()
		refused <- err
	}()
	// Accept gets this connection from the inner listener, but waits because the first connection
	// uses up the limit of 1.
	inner.dial()
	limited.Close()
	if err := <-refused; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v, want net.ErrClosed", err)
	}
}

// failingListener is a listener whose Accept first returns each of errs, and then accepts from the
// pipeListener.
type failingListener struct {
	*pipeListener
	errs []error
}

func (l *failingListener) Accept() (net.Conn, error) {
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", err)}
	}
	return l.pipeListener.Accept()
}

// An HTTPServer goes on after any error of accept. It counts all errors, and logs at most one of
// them per acceptLogInterval.
func TestAcceptErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &failingListener{pipeListener: newPipeListener()}
		for range 100 { // http.Server waits for a second after most of these errors
			l.errs = append(l.errs, syscall.EMFILE, syscall.ENOBUFS, syscall.EPROTO)
		}
		var log logBuffer
		m := NewMetrics()
		srv := HTTPServer{Name: "test", Listener: l, Conns: NewConnMetrics(m), Log: slog.New(slog.NewTextHandler(&log, nil)),
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {})}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- srv.Run(ctx) }()
		begin := time.Now()
		mine, its := net.Pipe()
		l.conns <- its
		if took := time.Since(begin); took < 290*time.Second || took > 300*time.Second {
			t.Errorf("a connection was accepted after %v, want after 292.3s", took)
		}
		go io.WriteString(mine, strangerRequest)
		if _, err := http.ReadResponse(bufio.NewReader(mine), nil); err != nil {
			t.Errorf("no answer: %v", err)
		}
		mine.Close()
		if text := metricsText(t, m); !strings.Contains(text, `telemeter_accept_errors_total{listener="test"} 300`+"\n") {
			t.Errorf("%s\nwant 300 errors", text)
		}
		if n := strings.Count(log.String(), "cannot accept connections"); n != 5 {
			t.Errorf("%d log lines in five minutes, want 5:\n%s", n, log.String())
		}
		// A bubble's time stands still once this function has returned, and Shutdown waits on a timer
		// while a connection is not idle yet.
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// If a process may not open more files, a limitListener closes a connection, as if it were full, and
// accepts at once. It closes no protected connection.
func TestAcceptWithoutFileDescriptors(t *testing.T) {
	inner := &failingListener{pipeListener: newPipeListener()}
	limited := newTestLimitListener(inner, 100)
	accept := func() (*trackedConn, error) {
		go inner.dial()
		c, err := limited.Accept()
		conn, _ := c.(*trackedConn)
		return conn, err
	}
	busy, err := accept()
	if err != nil {
		t.Fatal(err)
	}
	limited.protect(busy, "site")
	idle, err := accept()
	if err != nil {
		t.Fatal(err)
	}
	inner.errs = []error{syscall.EMFILE}
	if _, err := accept(); err != nil {
		t.Errorf("Accept: %v, want a connection", err)
	}
	if _, err := idle.Conn.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("the idle connection was not closed: %v", err)
	}
	inner.errs = []error{syscall.EMFILE, syscall.ENFILE}
	_, err = accept()
	if temporary, ok := err.(interface{ Temporary() bool }); !errors.Is(err, syscall.ENFILE) || !ok || !temporary.Temporary() {
		t.Errorf("Accept with only a protected connection: %v, want a temporary error", err)
	}
	if limited.table.open != 1 || busy.entry.peer == nil {
		t.Errorf("%d connections are open, want only the protected one", limited.table.open)
	}
}

// floodRig is an HTTPServer on a real socket with a low limit on connections. A POST with the
// header X-Site counts as authenticated, and its body is read. Every other request is refused.
type floodRig struct {
	t       *testing.T
	addr    string
	config  *tls.Config // of the clients; nil for plain HTTP
	metrics *Metrics
	opened  atomic.Int64 // connections of the flood so far
}

func newFloodRig(t *testing.T, max int, useTLS bool) *floodRig {
	ln, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &floodRig{t: t, addr: ln.Addr().String(), metrics: NewMetrics()}
	srv := HTTPServer{Name: "test", Listener: ln, Conns: NewConnMetrics(r.metrics), Log: slog.New(slog.DiscardHandler),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			site := req.Header.Get("X-Site")
			if site == "" {
				w.Header().Set("Connection", "close")
				http.Error(w, "refused", http.StatusUnauthorized)
				return
			}
			ProtectConn(req, site)
			io.Copy(w, req.Body)
		})}
	if useTLS {
		srv.TLS, r.config = selfSignedTLS(t)
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.runWithLimit(t.Context(), max) }()
	t.Cleanup(func() {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return r
}

// dial connects from the given loopback address. After a minute, reads and writes on the connection
// fail.
func (r *floodRig) dial(from string, handshake bool) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.Dial("tcp", r.addr)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(time.Minute))
	if r.config == nil || !handshake {
		return c, nil
	}
	secure := tls.Client(c, r.config)
	if err := secure.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	return secure, nil
}

// flood opens connections from eight addresses until the test ends, and sends text on each. It
// keeps the newest 100 open, and reads nothing.
func (r *floodRig) flood(handshake bool, text string) {
	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	for n := 0; r.t.Context().Err() == nil; n++ {
		c, err := r.dial(fmt.Sprint("127.0.0.", 2+n%8), handshake)
		if err != nil {
			continue // the server has closed the connection for a newer one
		}
		io.WriteString(c, text)
		if held = append(held, c); len(held) > 100 {
			held[0].Close()
			held = held[1:]
		}
		r.opened.Add(1)
	}
}

// push pushes for a site over c.
func (r *floodRig) push(c net.Conn, site string) error {
	if _, err := fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: x\r\nX-Site: %s\r\nContent-Length: 4\r\n\r\nup 1", site); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || string(body) != "up 1" {
		return fmt.Errorf("answered %s %q: %v", resp.Status, body, err)
	}
	return nil
}

// While others flood a listener that is full, a site can push over a connection that it keeps, over
// new connections, and from addresses that the server does not know. None of its connections is
// closed, even if many more connections than the limit arrive between two of its pushes.
func TestSitePushesDuringFlood(t *testing.T) {
	const max = 40
	for _, c := range []struct {
		name      string
		tls       bool
		handshake bool // whether the flood does the TLS handshake
		text      string
	}{
		{"nothing is sent", false, false, ""},
		{"half a header", false, false, "POST / HTTP/1.1\r\nX: "},
		{"a request without its body", false, false, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"},
		{"a whole request", false, false, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nup 1"},
		{"TLS, nothing is sent", true, false, ""},
		{"TLS, half a handshake", true, false, "\x16\x03\x01\x02\x00\x01\x00"},
		{"TLS, a request without its body", true, true, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newFloodRig(t, max, c.tls)
			kept, err := r.dial("127.0.0.1", true)
			if err != nil {
				t.Fatal(err)
			}
			defer kept.Close()
			for i := range 12 {
				if err := r.push(kept, "kept"); err != nil {
					t.Fatalf("push %d over the kept connection: %v", i, err)
				}
				for _, from := range []string{"127.0.0.1", fmt.Sprint("127.0.1.", 1+i)} {
					conn, err := r.dial(from, true)
					if err == nil {
						err = r.push(conn, "site from "+from)
						conn.Close()
					}
					if err != nil {
						t.Fatalf("push %d over a new connection from %s: %v", i, from, err)
					}
				}
				if i == 0 {
					for range 4 {
						go r.flood(c.handshake, c.text)
					}
				}
				before := r.opened.Load()
				eventually(t, "twice as many connections as the limit are opened", func() bool { return r.opened.Load() > before+2*max })
			}
			text := metricsText(t, r.metrics)
			if !strings.Contains(text, `telemeter_connections_closed_total{listener="test",kind="known"} 0`+"\n") {
				t.Errorf("%s\nwant no closed connection of a site", text)
			}
		})
	}
}
