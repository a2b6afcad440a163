package main

// Tests of HTTPServer and NewHTTPClient: deadlines, shutdown, TLS, redirects and proxies. Tests of
// deadlines and of shutdown run in virtual time, over pipes in memory.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// pipeListener is a net.Listener whose connections are pipes in memory.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once // lets only the first call of Close close the channel
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error { l.once.Do(func() { close(l.closed) }); return nil }

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// dial opens a connection to the listener and returns its client side, and whether the server
// accepted the connection within a second.
func (l *pipeListener) dial() (net.Conn, bool) {
	mine, its := net.Pipe()
	select {
	case l.conns <- its:
		return mine, true
	case <-l.closed:
	case <-time.After(time.Second):
	}
	return mine, false
}

// runHTTPServer runs an HTTPServer with the handler h over pipes. end stops the server, and returns
// how long the stop took and the error of Run.
func runHTTPServer(h http.HandlerFunc) (l *pipeListener, end func() (time.Duration, error)) {
	return runTLSServer(nil, h)
}

// runTLSServer is runHTTPServer with TLS, unless config is nil.
func runTLSServer(config *tls.Config, h http.HandlerFunc) (l *pipeListener, end func() (time.Duration, error)) {
	l = newPipeListener()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		srv := HTTPServer{Name: "test", Listener: l, Handler: h, TrackConns: true, TLS: config, Conns: NewConnMetrics(NewMetrics()), Log: slog.New(slog.DiscardHandler)}
		ended <- srv.Run(ctx)
	}()
	return l, func() (time.Duration, error) {
		begin := time.Now()
		cancel()
		err := <-ended
		return time.Since(begin), err
	}
}

// tenBytePost is the header of a POST request with a body of ten bytes. A test adds the body.
const tenBytePost = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"

// answerMegabyte is a handler that reads the whole body of a request and then answers with 1 MiB.
// If it cannot read the body, it answers 400.
func answerMegabyte(w http.ResponseWriter, r *http.Request) {
	if _, err := io.ReadAll(r.Body); err != nil {
		http.Error(w, "late", http.StatusBadRequest)
		return
	}
	w.Write(make([]byte, 1<<20))
}

// An HTTPServer closes a connection if the peer does not send the whole header or the whole body of
// a request in time, or if the peer sends no further request for too long.
func TestHTTPServerReadDeadlines(t *testing.T) {
	for _, c := range []struct {
		name string
		send []string      // texts that the peer sends, each 90 s after the previous one
		want time.Duration // time from the opening of the connection until the server closes it
	}{
		{"sends nothing", nil, 10 * time.Second},
		{"never ends its header", []string{"GET / HTTP/1.1\r\nX: "}, 10 * time.Second},
		{"never ends its body", []string{tenBytePost + "12345"}, time.Minute},
		{"is idle after a request", []string{tenBytePost + "1234567890"}, 6 * time.Minute},
		{"is idle after a second request", []string{tenBytePost + "1234567890", tenBytePost + "1234567890"}, 90*time.Second + 6*time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, end := runHTTPServer(answerMegabyte)
				begin := time.Now()
				conn, ok := l.dial()
				if !ok {
					t.Fatal("the connection was not accepted")
				}
				go func() {
					for i, s := range c.send {
						if i > 0 {
							time.Sleep(90 * time.Second)
						}
						io.WriteString(conn, s)
					}
				}()
				io.Copy(io.Discard, conn) // returns when the server closes the connection
				if got := time.Since(begin); got < c.want || got > c.want+2*time.Second {
					t.Errorf("the connection was closed after %v, want %v", got, c.want)
				}
				conn.Close()
				if _, err := end(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// An HTTPServer with TLS closes a connection if the peer does not end its handshake within ten
// seconds, also if it tracks its connections.
func TestHTTPServerHandshakeDeadline(t *testing.T) {
	for i, text := range []string{"", "\x16\x03\x01\x02\x00\x01\x00", "", "\x16\x03\x01\x02\x00\x01\x00"} {
		synctest.Test(t, func(t *testing.T) {
			l := newPipeListener()
			srv := HTTPServer{Name: "tls", Listener: l, TrackConns: i >= 2, Conns: NewConnMetrics(NewMetrics()), Log: slog.New(slog.DiscardHandler), TLS: &tls.Config{}}
			ended := make(chan error, 1)
			ctx, cancel := context.WithCancel(t.Context())
			go func() { ended <- srv.Run(ctx) }()
			begin := time.Now()
			conn, _ := l.dial()
			go io.WriteString(conn, text)
			io.Copy(io.Discard, conn) // returns when the server closes the connection
			if got := time.Since(begin); got != 10*time.Second {
				t.Errorf("after %q the connection was closed after %v, want 10s", text, got)
			}
			conn.Close()
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}

// An HTTPServer closes a connection if the peer does not read the whole answer within two minutes.
func TestHTTPServerWriteDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, end := runHTTPServer(answerMegabyte)
		conn, ok := l.dial()
		if !ok {
			t.Fatal("the connection was not accepted")
		}
		go io.WriteString(conn, tenBytePost+"1234567890")
		time.Sleep(2*time.Minute + time.Second)
		if n, err := io.Copy(io.Discard, conn); n >= 1<<20 {
			t.Errorf("after two minutes the peer could still read the whole answer: %v", err)
		}
		conn.Close()
		if _, err := end(); err != nil {
			t.Error(err)
		}
	})
}

// An HTTPServer that stops accepts no new connections and still answers requests in flight. It cuts
// off a request that is still in flight after shutdownWait. Run returns no error, even if a request
// was cut off.
func TestHTTPServerShutdown(t *testing.T) {
	for _, c := range []struct {
		name string
		// takes is how long the handler works on the request. want is how long the stop of the
		// server takes.
		takes, want time.Duration
		answered    bool
	}{
		{"short request", 15 * time.Second, 15 * time.Second, true},
		{"long request", time.Hour, shutdownWait, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cutOff := make(chan struct{})
				l, end := runHTTPServer(func(w http.ResponseWriter, r *http.Request) {
					select {
					case <-time.After(c.takes):
						io.WriteString(w, "done")
					case <-r.Context().Done():
						close(cutOff)
					}
				})
				idle, _ := l.dial()
				busy, _ := l.dial()
				go func() { io.Copy(io.Discard, idle) }()
				answered := make(chan string, 1)
				go func() {
					io.WriteString(busy, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
					b, _ := io.ReadAll(busy)
					answered <- string(b)
				}()
				go func() {
					time.Sleep(10 * time.Second)
					if _, ok := l.dial(); ok {
						t.Error("a connection was accepted while the server stops")
					}
				}()
				synctest.Wait()
				took, err := end()
				if took < c.want || took > c.want+2*time.Second || err != nil {
					t.Errorf("the server stopped after %v: %v; want %v and no error", took, err, c.want)
				}
				if got := <-answered; c.answered != strings.HasSuffix(got, "done") {
					t.Errorf("the request in flight was answered %q, want an answer: %t", got, c.answered)
				}
				if !c.answered {
					<-cutOff
				}
				idle.Close()
			})
		})
	}
}

// If the listener fails, Run of an HTTPServer returns an error that contains the name of the
// listener.
func TestHTTPServerFails(t *testing.T) {
	l := newPipeListener()
	l.Close()
	srv := HTTPServer{Name: "external", Listener: l, Conns: NewConnMetrics(NewMetrics()), Log: slog.New(slog.DiscardHandler)}
	if err := srv.Run(t.Context()); !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), "external") {
		t.Errorf("Run returned %v, want net.ErrClosed and the name", err)
	}
}

// An HTTPServer whose TLS configuration requires TLS 1.2 refuses older versions. With TLS it speaks
// only HTTP/1.1, even if the peer prefers HTTP/2. It answers a request in plain HTTP with 400 and a
// hint. All this is the same whether it tracks connections or not.
func TestHTTPServerTLS(t *testing.T) {
	for _, tracks := range []bool{false, true} {
		server, config := selfSignedTLS(t)
		addr := serveHTTP(t, HTTPServer{TrackConns: tracks, TLS: server, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, r.Proto)
		})})
		config.NextProtos = []string{"h2", "http/1.1"}
		c, err := tls.Dial("tcp", addr, config)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
			t.Errorf("the negotiated protocol is %q, want http/1.1", got)
		}
		c.Close()
		client := NewHTTPClient(config, 10*time.Second, time.Second)
		for range 2 {
			resp, err := client.Get("https://" + addr)
			if err != nil || resp.Proto != "HTTP/1.1" {
				t.Fatalf("answered %v: %v", resp, err)
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		old := config.Clone()
		old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
		if c, err := tls.Dial("tcp", addr, old); err == nil {
			c.Close()
			t.Error("a connection with TLS 1.1 was accepted")
		}
		conn := dialRaw(t, addr)
		conn.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		answer, err := io.ReadAll(conn)
		if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.0 400 ") || !strings.Contains(strings.ToLower(string(answer)), "https") {
			t.Errorf("tracks %t: plain HTTP was answered %q, %v; want 400 and a hint at https", tracks, answer, err)
		}
	}
}

// An HTTP client of NewHTTPClient sends a token only to the URL that the caller gives: it follows
// no redirect and ignores the proxy variables of the environment. The given timeout bounds a
// request, and the size of the answer's headers is bounded.
func TestHTTPClient(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { t.Error("the client contacted another server") }))
	defer other.Close()
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"} {
		t.Setenv(name, other.URL)
	}
	srv := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusTemporaryRedirect))
	defer srv.Close()
	client := NewHTTPClient(nil, 10*time.Second, 10*time.Second)
	resp, err := client.Get(srv.URL)
	if err != nil || resp.StatusCode != http.StatusTemporaryRedirect {
		t.Fatalf("answered %v: %v; want the redirect itself", resp, err)
	}
	resp.Body.Close()
	if tr := client.Transport.(*http.Transport); tr.Proxy != nil || client.Timeout != 10*time.Second || tr.MaxResponseHeaderBytes == 0 {
		t.Errorf("transport %+v with timeout %v", tr, client.Timeout)
	}
}
