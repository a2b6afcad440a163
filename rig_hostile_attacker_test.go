package main

// The attacker of TestHostile: a process of its own that attacks servers with requests, connections
// and packets, all of which the test has prepared. The process gets its load as JSON on standard
// input. It attacks until its input ends, and then prints its attackResult as JSON.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// asAttacker is an environment variable. If it is set, the test binary runs runAttacker instead of
// the tests.
const asAttacker = "TELEMETER_TEST_AS_ATTACKER"

// attackGroup is a part of an attack: a number of workers that all do the same. One of Requests,
// Conns, Packets and Burn is set. Worker i begins with a different element than worker i+1.
type attackGroup struct {
	Workers  int
	Requests []attackRequest // sent in turn, each after the answer to the request before it
	Conns    []attackConn    // opened in turn, each after the connection before it has ended
	Packets  []attackPacket  // sent in turn, as fast as possible
	Burn     bool            // each worker uses a processor and sends nothing
}

// attackRequest is a complete HTTP request. The answer to a request with MustRefuse must not have a
// 2xx status.
type attackRequest struct {
	Method, URL string
	Host        string // value of the header Host, if it is not the host of the URL
	Header      map[string]string
	Body        []byte
	Zeros       int64 // length of a body of zeros that is sent instead of Body
	MustRefuse  bool
}

// attackConn is a TCP connection on which the attacker writes First. Unless Unread is set, the
// attacker then reads until the server closes the connection.
type attackConn struct {
	To     string
	TLS    bool // whether to make a TLS handshake before First is written
	First  []byte
	Unread bool // do not read the answer, and close the connection after attackUnread
}

// attackUnread is how long a connection with Unread lasts.
const attackUnread = 5 * time.Second

type attackPacket struct {
	To   string
	Data []byte
}

// Keys of attackResult.Answers that are not the status of an answer.
const (
	attackNoAnswer = "none"   // the connection failed or was closed without an answer
	attackLetIn    = "let in" // a request with MustRefuse got a 2xx status
)

// attackResult is the result of an attack. Answers has the number of answers by status, and by the
// constants above.
type attackResult struct {
	Tries   int
	Answers map[string]int
}

// attacker has the state of the attacker's process.
type attacker struct {
	ctx    context.Context // ends at the end of the attack
	client *http.Client

	mu     sync.Mutex // guards result
	result attackResult
}

// newAttacker returns an attacker whose attack ends with ctx.
func newAttacker(ctx context.Context) *attacker {
	return &attacker{ctx: ctx, result: attackResult{Answers: map[string]int{}}, client: &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxIdleConnsPerHost: 64, DialContext: attackDial},
	}}
}

// count counts tries and, if answer is not empty, one answer.
func (a *attacker) count(tries int, answer string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.result.Tries += tries
	if answer != "" && a.ctx.Err() == nil { // the end of the attack cuts connections, which is no answer
		a.result.Answers[answer]++
	}
}

// runAttacker reads a list of attackGroup from in, attacks until in ends, and writes the
// attackResult to out. It returns the exit status of the process.
func runAttacker(in io.Reader, out io.Writer) int {
	var groups []attackGroup
	input := json.NewDecoder(in)
	if err := input.Decode(&groups); err != nil {
		fmt.Fprintln(os.Stderr, "reading the load:", err)
		return exitFailure
	}
	ctx, cancel := context.WithCancel(context.Background())
	a := newAttacker(ctx)
	var workers sync.WaitGroup
	for _, g := range groups {
		for i := range g.Workers {
			workers.Go(func() { a.work(g, i) })
		}
	}
	input.Token() // blocks until the end of the input
	cancel()
	workers.Wait()
	if err := json.NewEncoder(out).Encode(a.result); err != nil {
		return exitFailure
	}
	return exitOK
}

// work is one worker of a group.
func (a *attacker) work(g attackGroup, i int) {
	for n := i; len(g.Requests) > 0 && a.ctx.Err() == nil; n++ {
		a.count(1, a.request(g.Requests[n%len(g.Requests)]))
	}
	for n := i; len(g.Conns) > 0 && a.ctx.Err() == nil; n++ {
		a.count(1, a.connect(g.Conns[n%len(g.Conns)]))
	}
	if len(g.Packets) > 0 {
		a.flood(g.Packets)
	}
	for g.Burn && a.ctx.Err() == nil {
		for i := range 1 << 20 {
			_ = i
		}
	}
}

// request sends one request. It returns the status of the answer or a constant of
// attackResult.Answers.
func (a *attacker) request(r attackRequest) string {
	body := io.Reader(bytes.NewReader(r.Body))
	if r.Zeros > 0 {
		body = io.LimitReader(attackZeros{}, r.Zeros)
	}
	req, err := http.NewRequestWithContext(a.ctx, r.Method, r.URL, body)
	if err != nil {
		return err.Error() // a fault of the test, which attackRow.faults reports
	}
	if r.Zeros > 0 {
		req.ContentLength = r.Zeros
	}
	if r.Host != "" {
		req.Host = r.Host
	}
	for name, value := range r.Header {
		req.Header.Set(name, value)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return attackNoAnswer
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, resp.Body) // an error is of no interest, because the status has arrived
	if r.MustRefuse && resp.StatusCode/100 == 2 {
		return attackLetIn
	}
	return strconv.Itoa(resp.StatusCode)
}

// attackZeros is an endless body.
type attackZeros struct{}

func (attackZeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// attackDial connects from a random address of the network 127.0.0.0/8.
func attackDial(ctx context.Context, network, to string) (net.Conn, error) {
	from := net.IPv4(127, byte(1+rand.N(250)), byte(rand.N(250)), byte(1+rand.N(250)))
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}, Timeout: 5 * time.Second}
	return d.DialContext(ctx, network, to)
}

// connect opens one connection and waits until it ends. It returns the status of the answer, if an
// answer arrives, or attackNoAnswer.
func (a *attacker) connect(c attackConn) string {
	conn, err := attackDial(a.ctx, "tcp", c.To)
	if err != nil {
		select { // the server or this process may be out of connections, which must not make this process spin
		case <-a.ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
		return attackNoAnswer
	}
	defer conn.Close()
	defer context.AfterFunc(a.ctx, func() { conn.Close() })()
	if c.TLS {
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	}
	if len(c.First) > 0 {
		if _, err := conn.Write(c.First); err != nil {
			return attackNoAnswer
		}
	} else if t, ok := conn.(*tls.Conn); ok && t.HandshakeContext(a.ctx) != nil {
		return attackNoAnswer
	}
	if c.Unread {
		select {
		case <-a.ctx.Done():
		case <-time.After(attackUnread):
		}
		return attackNoAnswer
	}
	answer := bufio.NewReaderSize(conn, 512)
	line, _ := answer.ReadString('\n')
	io.Copy(io.Discard, answer)
	if _, status, ok := strings.Cut(line, " "); ok && strings.HasPrefix(line, "HTTP/") {
		return strings.TrimSpace(status[:min(len(status), 3)])
	}
	return attackNoAnswer
}

// flood sends packets from one socket until the attack ends. Packets get no answers.
func (a *attacker) flood(packets []attackPacket) {
	sock, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		a.count(0, err.Error())
		return
	}
	defer sock.Close()
	var to []*net.UDPAddr
	for _, p := range packets {
		addr, err := net.ResolveUDPAddr("udp", p.To)
		if err != nil {
			a.count(0, err.Error())
			return
		}
		to = append(to, addr)
	}
	n := 0
	for ; a.ctx.Err() == nil; n++ {
		sock.WriteToUDP(packets[n%len(packets)].Data, to[n%len(packets)]) // fails while the receiver does not run
	}
	a.count(n, "")
}

// attackProcess is a running attacker.
type attackProcess struct {
	t     *testing.T
	cmd   *exec.Cmd
	input io.WriteCloser
	out   bytes.Buffer
	err   logBuffer
}

// startAttack starts an attacker. Unless control is set, it has the lowest priority of the CPU, so
// that the servers and the well-behaved sites do not lack the CPU that the attacker itself uses.
func startAttack(t *testing.T, groups []attackGroup, control bool) *attackProcess {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &attackProcess{t: t, cmd: exec.Command("nice", "-n", "19", self)}
	if control {
		p.cmd = exec.Command(self)
	}
	p.cmd.Env = append(os.Environ(), asAttacker+"=1")
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.err
	if p.input, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.cmd.Process.Kill() })
	if err := json.NewEncoder(p.input).Encode(groups); err != nil {
		t.Fatal(err)
	}
	return p
}

// end ends the attack and returns its result. It fails the test if the attacker fails.
func (p *attackProcess) end() (result attackResult) {
	p.t.Helper()
	p.input.Close()
	timer := time.AfterFunc(30*time.Second, func() { p.cmd.Process.Kill() })
	defer timer.Stop()
	err := p.cmd.Wait()
	if err := errors.Join(err, json.Unmarshal(p.out.Bytes(), &result)); err != nil {
		p.t.Fatalf("the attacker failed: %v\n%s", err, p.err.String())
	}
	return result
}

// The attacker tells the answers to its requests and connections apart, by status. A 2xx answer to a
// request that must be refused is not taken for another 2xx answer.
func TestHostileAttacker(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch n, _ := io.Copy(io.Discard, r.Body); {
		case r.URL.Path == "/close":
			panic(http.ErrAbortHandler)
		case r.Host == "attacker.example", n == 1000, r.Header.Get("X") == "y":
			w.WriteHeader(http.StatusTeapot)
		case r.URL.Path == "/refused":
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer server.Close()
	a := newAttacker(t.Context())
	for _, test := range []struct {
		request attackRequest
		want    string
	}{
		{attackRequest{}, "200"},
		{attackRequest{MustRefuse: true}, attackLetIn},
		{attackRequest{URL: "/refused", MustRefuse: true}, "401"},
		{attackRequest{URL: "/close", MustRefuse: true}, attackNoAnswer},
		{attackRequest{Host: "attacker.example"}, "418"},
		{attackRequest{Header: map[string]string{"X": "y"}}, "418"},
		{attackRequest{Zeros: 1000}, "418"},
		{attackRequest{Body: make([]byte, 1000)}, "418"},
	} {
		test.request.Method, test.request.URL = "POST", server.URL+test.request.URL
		if got := a.request(test.request); got != test.want {
			t.Errorf("request %+v: got %q, want %q", test.request, got, test.want)
		}
	}
	address := strings.TrimPrefix(server.URL, "http://")
	for first, want := range map[string]string{
		"GET /refused HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n": "401",
		"garbage\r\n\r\n":                        "400",
		"GET /close HTTP/1.1\r\nHost: x\r\n\r\n": attackNoAnswer,
	} {
		if got := a.connect(attackConn{To: address, First: []byte(first)}); got != want {
			t.Errorf("connection %q: got %q, want %q", first, got, want)
		}
	}
}

// An attacker begins when it has its load, goes on until its input ends, and then prints what it
// counted.
func TestHostileAttackerProcess(t *testing.T) {
	var asked atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer server.Close()
	sock, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	sock.SetReadDeadline(time.Now().Add(time.Minute))
	in, load := io.Pipe()
	var out bytes.Buffer
	ended := make(chan int, 1)
	go func() { ended <- runAttacker(in, &out) }()
	if err := json.NewEncoder(load).Encode([]attackGroup{
		{Workers: 2, Requests: []attackRequest{{Method: "GET", URL: server.URL}}},
		{Workers: 1, Packets: []attackPacket{{sock.LocalAddr().String(), []byte("x")}}},
	}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "requests arrive", func() bool { return asked.Load() > 10 })
	if _, err := sock.Read(make([]byte, 9)); err != nil {
		t.Errorf("no packet arrives: %v", err)
	}
	load.Close()
	code := <-ended
	var result attackResult
	if err := json.Unmarshal(out.Bytes(), &result); code != exitOK || err != nil {
		t.Fatalf("exit status %d, %v", code, err)
	}
	if n := result.Answers["200"]; n < 9 || int64(n) > asked.Load() || result.Tries <= n || len(result.Answers) != 1 {
		t.Errorf("of %d requests and some packets, the attacker counted %+v", asked.Load(), result)
	}
}
