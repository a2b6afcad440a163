package main

// The deadlines and bounds of every connection, and an end that waits for requests in flight. Most
// tests run under a fake clock, over pipes: a minute of waiting costs nothing.

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
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// pipeListener accepts connections that dial makes.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
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

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// dial reports whether the connection was accepted within a second.
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

// runHTTPServer runs an HTTPServer over pipes. end ends it, and returns how long that took and
// what Run returned.
func runHTTPServer(h http.HandlerFunc) (l *pipeListener, end func() (time.Duration, error)) {
	l = newPipeListener()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		srv := HTTPServer{Name: "test", Listener: l, Handler: h, TrackConns: true, Log: slog.New(slog.DiscardHandler)}
		ended <- srv.Run(ctx)
	}()
	return l, func() (time.Duration, error) {
		begin := time.Now()
		cancel()
		err := <-ended
		return time.Since(begin), err
	}
}

func TestHTTPServerDeadlines(t *testing.T) {
	const post = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
	for _, c := range []struct {
		name string
		send []string // a minute and a half apart
		read bool     // what is answered
		want time.Duration
	}{
		{"says nothing", nil, true, 10 * time.Second},
		{"never ends its header", []string{"GET / HTTP/1.1\r\nX: "}, true, 10 * time.Second},
		{"never ends its body", []string{post + "12345"}, true, time.Minute},
		{"reads no answer", []string{post + "1234567890"}, false, 2 * time.Minute},
		{"rests", []string{post + "1234567890"}, true, 6 * time.Minute},
		{"comes back", []string{post + "1234567890", post + "1234567890"}, true, 90*time.Second + 6*time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, end := runHTTPServer(func(w http.ResponseWriter, r *http.Request) {
					if _, err := io.ReadAll(r.Body); err != nil {
						http.Error(w, "late", http.StatusBadRequest)
						return
					}
					w.Write(make([]byte, 1<<20))
				})
				begin := time.Now()
				conn, ok := l.dial()
				if !ok {
					t.Fatal("not accepted")
				}
				closed := make(chan time.Duration, 1)
				go func() {
					for i, s := range c.send {
						if i > 0 {
							time.Sleep(90 * time.Second)
						}
						io.WriteString(conn, s)
					}
				}()
				go func() {
					if !c.read {
						time.Sleep(time.Hour) // a pipe tells of its end only who reads or writes
						closed <- 0
						return
					}
					io.Copy(io.Discard, conn)
					closed <- time.Since(begin)
				}()
				if c.read {
					if got := <-closed; got < c.want || got > c.want+2*time.Second {
						t.Errorf("closed after %v, not %v", got, c.want)
					}
				} else {
					time.Sleep(c.want + time.Second)
					if n, err := conn.Read(make([]byte, 1<<20)); err == nil {
						n2, err := io.Copy(io.Discard, conn)
						if int64(n)+n2 >= 1<<20 {
							t.Errorf("still open after %v: %v", time.Since(begin), err)
						}
					}
					<-closed
				}
				conn.Close()
				if _, err := end(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestHTTPServerShutdown: a request in flight is finished and answered, for a time; new
// connections are not taken meanwhile.
func TestHTTPServerShutdown(t *testing.T) {
	for _, c := range []struct {
		name        string
		takes, want time.Duration
		ok          bool
	}{
		{"in flight", 15 * time.Second, 15 * time.Second, true},
		{"stuck", time.Hour, shutdownWait, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gone := make(chan struct{})
				l, end := runHTTPServer(func(w http.ResponseWriter, r *http.Request) {
					select {
					case <-time.After(c.takes):
						io.WriteString(w, "done")
					case <-r.Context().Done():
						close(gone)
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
						t.Error("a connection was accepted while stopping")
					}
				}()
				synctest.Wait()
				took, err := end()
				if took < c.want || took > c.want+2*time.Second || err != nil {
					t.Errorf("ended after %v: %v", took, err)
				}
				got := <-answered
				if c.ok != strings.HasSuffix(got, "done") {
					t.Errorf("answered %q", got)
				}
				if !c.ok {
					<-gone
				}
				idle.Close()
			})
		})
	}
}

// TestTrackerOf: a request is sequential only if no part of it came before the previous
// answer was written to its end; else it has a connection of its own.
func TestTrackerOf(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	const large = "GET /large HTTP/1.1\r\nHost: x\r\n\r\n"
	const bare = "GET / HTTP/1.1\nHost: x\n\n"
	post := func(body string) string {
		return fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	const begins = 0 // an answer does
	for _, c := range []struct {
		name  string
		steps []any // text to send, or how many whole answers to read
		want  []bool
	}{
		{"each after the answer", []any{get, 1, large, 1, get, 1, get, 1}, []bool{true, true, true, true}},
		{"without carriage returns", []any{bare, 1, bare, 1}, []bool{true, true}},
		{"two at once", []any{get + get, 2, get, 1}, []bool{true, false, true}},
		{"two at once, of another make", []any{bare + get, 2, get, 1}, []bool{true, false, true}},
		{"two at once, and the next", []any{get + get, 1, get, 2, get, 1}, []bool{true, false, false, true}},
		{"during a large answer", []any{large, begins, get, 2, get, 1}, []bool{true, false, true}},
		{"during a small answer", []any{get, begins, get, 2, get, 1}, []bool{true, false, true}},
		{"half before", []any{get + get[:20], 1, get[20:], 1, get, 1}, []bool{true, false, true}},
		{"a byte before", []any{get, begins, "G", 1, get[1:], 1, get, 1}, []bool{true, false, true}},
		{"all but a byte before", []any{get + get[:len(get)-1], 1, "\n", 1, get, 1}, []bool{true, false, true}},
		{"in pieces", []any{get[:5], get[5:], 1, get[:len(get)-2], "\r", "\n", 1}, []bool{true, true}},
		{"after a body", []any{post("1234567890"), 1, get, 1, get, 1}, []bool{true, false, true}},
		{"after a body that looks like a header", []any{post(get), 1, get, 1, get, 1}, []bool{true, false, false}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var got []bool
				l, end := runHTTPServer(func(w http.ResponseWriter, r *http.Request) {
					mu.Lock()
					defer mu.Unlock()
					a, b := TrackerIfPreviousAnswerRead(r), TrackerIfPreviousAnswerRead(r) // one of its own is another each time
					got = append(got, a == b)
					if r.URL.Path == "/large" {
						w.Write(make([]byte, 1<<20))
					} else {
						io.WriteString(w, strings.Repeat("x", 100))
					}
				})
				conn, ok := l.dial()
				if !ok {
					t.Fatal("not accepted")
				}
				sent := make(chan string, 10)
				go func() {
					for text := range sent {
						io.WriteString(conn, text)
					}
				}()
				answers := bufio.NewReaderSize(conn, 16) // the rest of an answer is not written
				for _, step := range c.steps {
					switch step := step.(type) {
					case string:
						sent <- step
					case int:
						if step == begins {
							answers.Peek(1)
						}
						for range step {
							resp, err := http.ReadResponse(answers, nil)
							if err != nil {
								t.Fatal(err)
							}
							io.Copy(io.Discard, resp.Body)
						}
					}
					synctest.Wait()
				}
				if close(sent); !slices.Equal(got, c.want) {
					t.Errorf("of the connection: %v, want %v", got, c.want)
				}
				conn.Close()
				if _, err := end(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestHTTPServerFails: a listener that breaks ends Run with an error that names it.
func TestHTTPServerFails(t *testing.T) {
	l := newPipeListener()
	l.Close()
	srv := HTTPServer{Name: "external", Listener: l, Log: slog.New(slog.DiscardHandler)}
	if err := srv.Run(t.Context()); !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), "external") {
		t.Error(err)
	}
}

// TestConnectionLimit: over the limit, the connection that has waited longest for
// a request makes room, whether it has said nothing, half of a head or rests after
// an answer. What is being answered is left alone, and then the new one waits.
func TestConnectionLimit(t *testing.T) {
	const request = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	const max = 8
	synctest.Test(t, func(t *testing.T) {
		finish := make(chan struct{})
		l := newPipeListener()
		limited := newLimitListener(l, max)
		srv := http.Server{ConnState: limited.trackWaitingConn, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				<-finish
			}
		})}
		go srv.Serve(limited)
		var conns []net.Conn
		closed := make(chan int, 100)
		answers := make(chan int, 100)
		open := func(say string) {
			t.Helper()
			c, ok := l.dial()
			if !ok {
				t.Fatalf("connection %d was not accepted", len(conns))
			}
			n := len(conns)
			conns = append(conns, c)
			go func() {
				for b := make([]byte, 4<<10); ; {
					if _, err := c.Read(b); err != nil {
						closed <- n
						return
					}
					answers <- n
				}
			}()
			if say != "" {
				go io.WriteString(c, say)
			}
		}
		gone := func(want int) {
			t.Helper()
			select {
			case n := <-closed:
				if n != want {
					t.Errorf("connection %d was closed, not %d", n, want)
				}
			default:
				t.Errorf("none was closed; connection %d should be", want)
			}
		}
		slow := strings.Replace(request, "/ ", "/slow ", 1)
		for _, say := range []string{"", "GET / HTTP/1.1\r\nX: ", slow, request, request} {
			open(say)
			synctest.Wait()
		}
		go io.WriteString(conns[3], request) // 4 has rested for longer now
		synctest.Wait()
		for range max - len(conns) {
			open(slow)
		}
		synctest.Wait()
		for range 3 {
			<-answers
		}
		if len(closed) > 0 {
			t.Errorf("connection %d was closed below the limit", <-closed)
		}
		for _, want := range []int{0, 1, 4, 3} {
			open(slow)
			synctest.Wait()
			gone(want)
		}
		open(request) // all are busy
		time.Sleep(10 * time.Second)
		if len(closed) > 0 || len(answers) > 0 {
			t.Errorf("%d closed, %d answered while all are busy", len(closed), len(answers))
		}
		close(finish)
		synctest.Wait()
		// All are answered now; one of them rested first, and made room for the last.
		if len(closed) != 1 || len(answers) != max+1 {
			t.Errorf("%d closed, %d answered", len(closed), len(answers))
		}
		for _, c := range conns {
			c.Close()
		}
		srv.Close()
	})
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		l, end := runHTTPServer(func(w http.ResponseWriter, r *http.Request) {})
		var conns []net.Conn
		for range maxConnections + 1 {
			c, _ := l.dial()
			conns = append(conns, c)
		}
		if _, err := conns[0].Read(make([]byte, 1)); err != io.EOF {
			t.Error(err)
		}
		if d := time.Since(begin); d > time.Second {
			t.Errorf("the first was closed after %v", d)
		}
		for _, c := range conns {
			c.Close()
		}
		if _, err := end(); err != nil {
			t.Error(err)
		}
	})
	inner := newPipeListener()
	limited := newLimitListener(inner, 1)
	go inner.dial()
	c, err := limited.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	c.Close()
	limited.trackWaitingConn(c, http.StateIdle) // net/http may say so after
	if limited.open != 0 || limited.waiting.Len() != 0 {
		t.Errorf("%d are open, %d wait", limited.open, limited.waiting.Len())
	}
	go inner.dial()
	if _, err = limited.Accept(); err != nil {
		t.Fatal(err)
	}
	refused := make(chan error, 1)
	go func() {
		_, err := limited.Accept()
		refused <- err
	}()
	inner.dial() // is busy for ever: the listener's end ends the wait
	limited.Close()
	if err := <-refused; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed listener: %v", err)
	}
}

// TestHTTPServerTLS: TLS 1.2 or newer, and HTTP/1.1 only, whatever the peer would rather.
func TestHTTPServerTLS(t *testing.T) {
	crt, key, err := SelfSignedCert([]string{"127.0.0.1"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(crt, key)
	if err != nil {
		t.Fatal(err)
	}
	pin, err := PinFromPEM(crt)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		srv := HTTPServer{Name: "tls", Listener: ln, TrackConns: true, Log: slog.New(slog.DiscardHandler),
			TLS: &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}},
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				fmt.Fprint(w, r.Proto)
				if a, b := TrackerIfPreviousAnswerRead(r), TrackerIfPreviousAnswerRead(r); a == b {
					t.Error("a request over TLS is of its connection")
				}
			})}
		ended <- srv.Run(ctx)
	}()
	config, err := PinnedTLS(pin)
	if err != nil {
		t.Fatal(err)
	}
	config.NextProtos = []string{"h2", "http/1.1"}
	c, err := tls.Dial("tcp", ln.Addr().String(), config)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("negotiated %q", got)
	}
	c.Close()
	client := NewHTTPClient(config, 10*time.Second, time.Second)
	for range 2 {
		resp, err := client.Get("https://" + ln.Addr().String())
		if err != nil || resp.Proto != "HTTP/1.1" {
			t.Fatalf("%v %v", resp, err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	old := config.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	if c, err := tls.Dial("tcp", ln.Addr().String(), old); err == nil {
		c.Close()
		t.Error("TLS 1.1 is spoken")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestHTTPClient: neither redirects nor the environment lead a token astray.
func TestHTTPClient(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { t.Error("led astray") }))
	defer other.Close()
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"} {
		t.Setenv(name, other.URL)
	}
	srv := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusTemporaryRedirect))
	defer srv.Close()
	client := NewHTTPClient(nil, 10*time.Second, 10*time.Second)
	resp, err := client.Get(srv.URL)
	if err != nil || resp.StatusCode != http.StatusTemporaryRedirect {
		t.Fatalf("%v %v", resp, err)
	}
	resp.Body.Close()
	if tr := client.Transport.(*http.Transport); tr.Proxy != nil || client.Timeout != 10*time.Second || tr.MaxResponseHeaderBytes == 0 {
		t.Errorf("%+v", tr)
	}
}

// TestInstrument counts by the status that was sent first, also none and 200.
func TestInstrument(t *testing.T) {
	m := NewMetrics()
	wrap := NewInstrument(m)
	for i, h := range []http.HandlerFunc{
		func(w http.ResponseWriter, r *http.Request) {},
		func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "x"); w.WriteHeader(500) },
		func(w http.ResponseWriter, r *http.Request) { http.Error(w, "x", 404) },
		func(w http.ResponseWriter, r *http.Request) {
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
		},
	} {
		wrap(fmt.Sprintf("h%d", i), h).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	}
	text := metricsText(t, m)
	for _, want := range []string{`{handler="h0",code="200"} 1`, `{handler="h1",code="200"} 1`, `{handler="h2",code="404"} 1`, `{handler="h3",code="200"} 1`} {
		if !strings.Contains(text, "telemeter_http_requests_total"+want+"\n") {
			t.Errorf("no %s in:\n%s", want, text)
		}
	}
}
