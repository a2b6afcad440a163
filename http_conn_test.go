package main

// Tests of AnswerReadTracker, which finds out whether a peer sent a request only after it had the
// previous answer, and of requests whose body the handler does not read.

import (
	"bufio"
	"crypto/tls"
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
// the connection. For any other request, each call returns a new tracker. With TLS, all this is the
// same.
func TestTrackerOfRequest(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
	const large = "GET /large HTTP/1.1\r\nHost: x\r\n\r\n"
	const bare = "GET / HTTP/1.1\nHost: x\n\n"
	post := func(body string) string {
		return fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	const begins = 0 // this step waits until the first byte of an answer has arrived
	for _, c := range []struct {
		name  string // of a case that needs the server to block in the middle of a TLS record, begins with "plain:"
		steps []any  // each step is a text to send, the number of whole answers to read, or begins
		want  []bool // whether each request is sequential, in the order of the requests
	}{
		{"each after the answer", []any{get, 1, large, 1, get, 1, get, 1}, []bool{true, true, true, true}},
		{"without carriage returns", []any{bare, 1, bare, 1}, []bool{true, true}},
		{"two at once", []any{get + get, 2, get, 1}, []bool{true, false, true}},
		{"two at once, one without carriage returns", []any{bare + get, 2, get, 1}, []bool{true, false, true}},
		{"two at once, and a third before the second answer", []any{get + get, 1, get, 2, get, 1}, []bool{true, false, false, true}},
		{"during a large answer", []any{large, begins, get, 2, get, 1}, []bool{true, false, true}},
		{"plain: during a small answer", []any{get, begins, get, 2, get, 1}, []bool{true, false, true}},
		{"half before the answer", []any{get + get[:20], 1, get[20:], 1, get, 1}, []bool{true, false, true}},
		{"plain: a byte before the end of the answer", []any{get, begins, "G", 1, get[1:], 1, get, 1}, []bool{true, false, true}},
		{"all but a byte before the answer", []any{get + get[:len(get)-1], 1, "\n", 1, get, 1}, []bool{true, false, true}},
		{"in pieces", []any{get[:5], get[5:], 1, get[:len(get)-2], "\r", "\n", 1}, []bool{true, true}},
		{"after a body", []any{post("1234567890"), 1, get, 1, get, 1}, []bool{true, false, true}},
		{"after a body that looks like a header", []any{post(get), 1, get, 1, get, 1}, []bool{true, false, false}},
	} {
		check := func(t *testing.T, secure bool) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex // guards got
				var got []bool
				var serverTLS, clientTLS *tls.Config
				if secure {
					serverTLS, clientTLS = selfSignedTLS(t)
				}
				l, end := runTLSServer(serverTLS, func(w http.ResponseWriter, r *http.Request) {
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
				if secure {
					conn = tls.Client(conn, clientTLS)
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
		}
		t.Run(c.name, func(t *testing.T) { check(t, false) })
		if !strings.HasPrefix(c.name, "plain:") {
			t.Run("TLS: "+c.name, func(t *testing.T) { check(t, true) })
		}
	}
}

// closeWriteConn is a pipe that records when CloseWrite was first called and how many bytes were
// read.
type closeWriteConn struct {
	net.Conn
	closedWrite time.Time
	read        int
}

func (c *closeWriteConn) CloseWrite() error {
	if c.closedWrite.IsZero() {
		c.closedWrite = time.Now()
	}
	return nil
}

func (c *closeWriteConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.read += n
	return n, err
}

// If a handler does not read the whole body of a request, an HTTPServer sends the answer, reads no
// more of the body, and closes its sending direction at once. It closes the connection after
// lingerTime, in which the peer can read the answer. If the handler has read the whole body, or the
// body has arrived with the headers, the connection is kept and later closed without delay.
func TestBodyLeftUnread(t *testing.T) {
	const large = 200_000 // bytes; less than net/http would read after the answer
	for _, c := range []struct {
		name, header, body string
		kept               bool
	}{
		{"never sent", "Content-Length: 10", "", false},
		{"sent in part", "Content-Length: 10", "12345", false},
		{"large", fmt.Sprintf("Content-Length: %d", large), strings.Repeat("x", large), false},
		{"larger than net/http would read", "Content-Length: 1000000", strings.Repeat("x", large), false},
		{"chunked, never ends", "Transfer-Encoding: chunked", "5\r\n12345\r\n", false},
		{"not sent before 100 Continue", "Content-Length: 10\r\nExpect: 100-continue", "", false},
		{"read in part", "Content-Length: 10\r\nX-Read: part", "12345", false},
		{"none", "Content-Length: 0", "", true},
		{"sent with the headers", "Content-Length: 10", "1234567890", true},
		{"chunked, sent with the headers", "Transfer-Encoding: chunked", "5\r\n12345\r\n0\r\n\r\n", true},
		{"read whole", "Content-Length: 10\r\nX-Read: all", "1234567890", true},
		{"chunked, read whole", "Transfer-Encoding: chunked\r\nX-Read: all", "5\r\n12345\r\n0\r\n\r\n", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var answered time.Time // when the handler returned
				l, end := runHTTPServer(func(w http.ResponseWriter, r *http.Request) {
					defer func() { answered = time.Now() }()
					if r.Header.Get("X-Read") != "" {
						io.CopyN(io.Discard, r.Body, 5)
					}
					if r.Header.Get("X-Read") == "all" {
						io.ReadAll(r.Body)
					}
					http.Error(w, "answer", http.StatusUnauthorized)
				})
				mine, its := net.Pipe()
				server := &closeWriteConn{Conn: its}
				l.conns <- server
				go io.WriteString(mine, "POST / HTTP/1.1\r\nHost: x\r\n"+c.header+"\r\n\r\n"+c.body)
				answers := bufio.NewReader(mine)
				resp, err := http.ReadResponse(answers, nil)
				if err != nil {
					t.Fatal(err)
				}
				if body, err := io.ReadAll(resp.Body); string(body) != "answer\n" || err != nil {
					t.Errorf("the answer is %q: %v", body, err)
				}
				if resp.Close == c.kept {
					t.Errorf("the answer says that the connection closes: %t, want %t", resp.Close, !c.kept)
				}
				if _, err := answers.ReadByte(); err != io.EOF {
					t.Errorf("after the answer: %v, want EOF", err)
				}
				closed := time.Now()
				synctest.Wait() // until the server's goroutines have ended, because they write the variables that follow
				want, closedWrite := lingerTime, answered
				if c.kept {
					want, closedWrite = 6*time.Minute, time.Time{} // the limit on idle connections
				}
				if got := closed.Sub(answered); got != want || server.closedWrite != closedWrite {
					t.Errorf("the connection was closed %v after the answer, and its sending direction at %v; want %v and %v", got, server.closedWrite, want, closedWrite)
				}
				if server.read > 8<<10 {
					t.Errorf("the server read %d bytes of the request", server.read)
				}
				mine.Close()
				if _, err := end(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// The context of a request lives until the request is answered, also after an earlier request with a
// body on the same connection.
func TestRequestContextOnKeptConnection(t *testing.T) {
	addrs := map[string]bool{} // of the client; only one request is handled at a time
	addr := serveHTTP(t, HTTPServer{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.ReadAll(r.Body)
		addrs[r.RemoteAddr] = true
		if err := r.Context().Err(); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})})
	client := scraperOf(t)
	for i := range 5 {
		resp, err := client.Post("http://"+addr, "text/plain", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Errorf("request %d: the context had ended", i+1)
		}
	}
	if len(addrs) != 1 {
		t.Errorf("the requests came on %d connections, want 1", len(addrs))
	}
}
