package main

// The connections of a listener: the bound on their number, and the tracker that finds sequential
// requests. The tests run in virtual time, over pipes.

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

// A request is sequential only if no byte of it was read before the previous answer was written to
// its end. A request that is not sequential gets a tracker of its own.
func TestTrackerOfRequest(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	const large = "GET /large HTTP/1.1\r\nHost: x\r\n\r\n"
	const bare = "GET / HTTP/1.1\nHost: x\n\n"
	post := func(body string) string {
		return fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	const begins = 0 // wait for the first byte of an answer
	for _, c := range []struct {
		name  string
		steps []any  // a text to send, or the number of whole answers to read
		want  []bool // which requests are sequential
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
					// A request that is not sequential gets another new tracker from each call.
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
				answers := bufio.NewReaderSize(conn, 16) // small, so that the server cannot write ahead
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

// limitRig is an HTTP server behind a limitListener. It answers a slowRequest after finish is
// closed, and other requests at once.
type limitRig struct {
	t       *testing.T
	pipes   *pipeListener
	finish  chan struct{}
	conns   []net.Conn
	closed  chan int // numbers of the connections that the server has closed
	answers chan int // numbers of the connections on which an answer arrived
}

// newLimitRig starts the server. It must run in a synctest bubble.
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

// open opens a connection, sends text on it, and waits until the server has done what it can.
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

// send sends text on a connection, and waits until the server has done what it can.
func (r *limitRig) send(n int, text string) {
	if text != "" {
		go io.WriteString(r.conns[n], text)
	}
	synctest.Wait()
}

// checkClosed checks that the server has closed one connection, with number want.
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

// checkTotals checks how many connections were closed and how many answers arrived, since the last
// check of them.
func (r *limitRig) checkTotals(closed, answers int) {
	r.t.Helper()
	if len(r.closed) != closed || len(r.answers) != answers {
		r.t.Errorf("%d connections were closed and %d answers arrived, want %d and %d", len(r.closed), len(r.answers), closed, answers)
	}
}

// At the limit, a new connection replaces the connection that has waited longest for a request. A
// connection waits if its peer has sent nothing or an incomplete header, or has got an answer and
// sent no further request. A connection with a request in flight is never closed.
func TestConnectionLimitClosesLongestWaiting(t *testing.T) {
	const max = 8
	synctest.Test(t, func(t *testing.T) {
		r := newLimitRig(t, max)
		for _, text := range []string{"", "GET / HTTP/1.1\r\nX: ", slowRequest, fastRequest, fastRequest} {
			r.open(text)
		}
		r.send(3, fastRequest) // from now on connection 4 has waited longer than connection 3
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

// If every open connection has a request in flight, a new connection waits until one of them has
// been answered, and replaces it.
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

// An HTTPServer at its limit closes its first idle connection at once when another one is opened.
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

// A connection that is closed twice, and that net/http reports as idle afterwards, counts once.
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

// Close ends an Accept that waits for room.
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
	inner.dial() // Accept has this connection, but no room for it
	limited.Close()
	if err := <-refused; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v, want net.ErrClosed", err)
	}
}
