package main

// Tests of the connections of a listener: the bound on their number, and AnswerReadTracker, which
// finds out whether a peer sent a request only after it had the previous answer. The tests run over
// pipes in memory, most of them in virtual time.

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A request is sequential only if the server read no byte of it before it wrote the last byte of
// the previous answer. For a sequential request, TrackerIfPreviousAnswerRead returns the tracker of
// the connection. For any other request, each call returns a new tracker.
func TestTrackerOfRequest(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	const large = "GET /large HTTP/1.1\r\nHost: x\r\n\r\n"
	const bare = "GET / HTTP/1.1\nHost: x\n\n"
	post := func(body string) string {
		return fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	const begins = 0 // this step waits until the first byte of an answer has arrived
	for _, c := range []struct {
		name  string
		steps []any  // each step is a text to send, the number of whole answers to read, or begins
		want  []bool // whether each request is sequential, in the order of the requests
	}{
		{"each after the answer", []any{get, 1, large, 1, get, 1, get, 1}, []bool{true, true, true, true}},
		{"without carriage returns", []any{bare, 1, bare, 1}, []bool{true, true}},
		{"two at once", []any{get + get, 2, get, 1}, []bool{true, false, true}},
		{"two at once, one without carriage returns", []any{bare + get, 2, get, 1}, []bool{true, false, true}},
		{"two at once, and a third before the second answer", []any{get + get, 1, get, 2, get, 1}, []bool{true, false, false, true}},
		{"during a large answer", []any{large, begins, get, 2, get, 1}, []bool{true, false, true}},
		{"during a small answer", []any{get, begins, get, 2, get, 1}, []bool{true, false, true}},
		{"half before the answer", []any{get + get[:20], 1, get[20:], 1, get, 1}, []bool{true, false, true}},
		{"a byte before the end of the answer", []any{get, begins, "G", 1, get[1:], 1, get, 1}, []bool{true, false, true}},
		{"all but a byte before the answer", []any{get + get[:len(get)-1], 1, "\n", 1, get, 1}, []bool{true, false, true}},
		{"in pieces", []any{get[:5], get[5:], 1, get[:len(get)-2], "\r", "\n", 1}, []bool{true, true}},
		{"after a body", []any{post("1234567890"), 1, get, 1, get, 1}, []bool{true, false, true}},
		{"after a body that looks like a header", []any{post(get), 1, get, 1, get, 1}, []bool{true, false, false}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex // guards got
				var got []bool
				l, end := runHTTPServer(func(w http.ResponseWriter, r *http.Request) {
					mu.Lock()
					defer mu.Unlock()
					// The two calls return the same tracker only if the request is sequential.
					a, b := TrackerIfPreviousAnswerRead(r), TrackerIfPreviousAnswerRead(r)
					got = append(got, a == b)
					if r.URL.Path == "/large" {
						w.Write(make([]byte, 1<<20))
					} else {
						io.WriteString(w, strings.Repeat("x", 100))
					}
				})
				conn, ok := l.dial()
				if !ok {
					t.Fatal("the connection was not accepted")
				}
				sent := make(chan string, 10)
				go func() {
					for text := range sent {
						io.WriteString(conn, text)
					}
				}()
				// The buffer is small, so that the server cannot write the rest of an answer before
				// the test reads it.
				answers := bufio.NewReaderSize(conn, 16)
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
					t.Errorf("sequential requests: %v, want %v", got, c.want)
				}
				conn.Close()
				if _, err := end(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

const (
	fastRequest = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	slowRequest = "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
)

// limitRig is an HTTP server behind a limitListener, with its client connections. It answers a
// slowRequest only when the channel finish is closed. It answers any other request at once.
type limitRig struct {
	t       *testing.T
	pipes   *pipeListener
	finish  chan struct{}
	conns   []net.Conn
	closed  chan int // indices in conns of the connections that the server has closed
	answers chan int // for each answer that arrived, the index of its connection in conns
}

// newLimitRig starts the server with at most max open connections. It must be called in a synctest
// bubble.
func newLimitRig(t *testing.T, max int) *limitRig {
	r := &limitRig{t: t, pipes: newPipeListener(), finish: make(chan struct{}), closed: make(chan int, 100), answers: make(chan int, 100)}
	limited := newLimitListener(r.pipes, max)
	srv := http.Server{ConnState: limited.trackWaitingConn, Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/slow" {
			<-r.finish
		}
	})}
	go srv.Serve(limited)
	t.Cleanup(func() {
		for _, c := range r.conns {
			c.Close()
		}
		srv.Close()
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

// When the limit on open connections is reached, a new connection replaces the connection that has
// waited longest for a request. A connection waits if its peer has sent no complete request header
// since the connection was opened or since the last answer. A connection with a request in flight
// is never closed for a new one.
func TestConnectionLimitClosesLongestWaiting(t *testing.T) {
	const max = 8
	synctest.Test(t, func(t *testing.T) {
		r := newLimitRig(t, max)
		for _, text := range []string{"", "GET / HTTP/1.1\r\nX: ", slowRequest, fastRequest, fastRequest} {
			r.open(text)
		}
		r.send(3, fastRequest) // after this request, connection 4 has waited longer than connection 3
		for range max - len(r.conns) {
			r.open(slowRequest)
		}
		r.checkTotals(0, 3)
		for _, want := range []int{0, 1, 4, 3} {
			r.open(slowRequest)
			r.checkClosed(want)
		}
		close(r.finish)
		synctest.Wait()
	})
}

// If the limit on open connections is reached and all of them have a request in flight, a new
// connection waits. When a request has been answered, the new connection replaces the connection of
// that request.
func TestConnectionLimitAllBusy(t *testing.T) {
	const max = 8
	synctest.Test(t, func(t *testing.T) {
		r := newLimitRig(t, max)
		for range max {
			r.open(slowRequest)
		}
		r.open(fastRequest)
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

// If a connection is closed twice, and net/http reports it as idle after that, a limitListener
// counts it as closed once and does not add it to the waiting connections.
func TestLimitListenerCountsCloseOnce(t *testing.T) {
	inner := newPipeListener()
	limited := newLimitListener(inner, 1)
	go inner.dial()
	c, err := limited.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	c.Close()
	limited.trackWaitingConn(c, http.StateIdle)
	if limited.open != 0 || limited.waiting.Len() != 0 {
		t.Errorf("%d connections are open and %d wait, want 0 and 0", limited.open, limited.waiting.Len())
	}
}

// If an Accept of a limitListener waits because the limit on connections is reached, Close makes it
// return net.ErrClosed.
func TestLimitListenerCloseEndsAccept(t *testing.T) {
	inner := newPipeListener()
	limited := newLimitListener(inner, 1)
	go inner.dial()
	if _, err := limited.Accept(); err != nil {
		t.Fatal(err)
	}
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
