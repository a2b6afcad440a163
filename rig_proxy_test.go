package main

// Proxies for tests of --to-proxy: an HTTP proxy, with or without TLS, and a SOCKS5 proxy. They may
// require a user and a password, and record where they connect to.

import (
	"bufio"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"sync"
	"testing"
)

// testProxy is a proxy on a port of 127.0.0.1.
type testProxy struct {
	t       *testing.T
	address string // host:port
	user    string // USER:PASSWORD that the proxy requires; "" means none
	refuses bool   // the proxy refuses to connect to any host

	mu      sync.Mutex // guards the fields below
	targets []string   // each host:port that the proxy was told to connect to
	conns   []net.Conn // all tunnels, which are closed at the end of the test
}

// targetsSeen returns each host:port that the proxy was told to connect to.
func (p *testProxy) targetsSeen() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.targets)
}

// connect dials target, and copies between it and conn until one of the two ends. It calls
// established before it copies.
func (p *testProxy) connect(conn net.Conn, from io.Reader, target string, established func()) {
	out, err := net.Dial("tcp", target)
	if err != nil {
		p.t.Errorf("the proxy cannot connect to %s: %v", target, err)
		conn.Close()
		return
	}
	p.mu.Lock()
	p.targets = append(p.targets, target)
	p.conns = append(p.conns, conn, out)
	p.mu.Unlock()
	established()
	go func() {
		io.Copy(out, from)
		out.Close()
	}()
	io.Copy(conn, out)
	conn.Close()
}

// closeConns closes all tunnels.
func (p *testProxy) closeConns() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
}

// startHTTPProxy starts an HTTP proxy, which answers CONNECT and requests for http:// URLs. If
// config is not nil, clients connect to it with TLS.
func startHTTPProxy(t *testing.T, config *tls.Config, user string) *testProxy {
	t.Helper()
	p := &testProxy{t: t, user: user}
	srv := httptest.NewUnstartedServer(p)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	if config == nil {
		srv.Start()
	} else {
		srv.TLS = config
		srv.StartTLS()
	}
	p.address = srv.Listener.Addr().String()
	t.Cleanup(func() {
		p.closeConns()
		srv.Close()
	})
	return p
}

// ServeHTTP answers a request to an HTTP proxy.
func (p *testProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case p.user != "" && r.Header.Get("Proxy-Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte(p.user)):
		w.Header().Set("Proxy-Authenticate", "Basic")
		w.WriteHeader(http.StatusProxyAuthRequired)
	case p.refuses:
		w.WriteHeader(http.StatusForbidden)
	case r.Method == http.MethodConnect:
		conn, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			p.t.Error(err)
			return
		}
		p.connect(conn, rw, r.Host, func() { io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n") })
	default:
		p.mu.Lock()
		p.targets = append(p.targets, r.URL.Host)
		p.mu.Unlock()
		r.RequestURI = ""
		r.Header.Del("Proxy-Authorization")
		resp, err := http.DefaultTransport.RoundTrip(r)
		if err != nil {
			p.t.Error(err)
			return
		}
		defer resp.Body.Close()
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	}
}

// startSOCKSProxy starts a SOCKS5 proxy (RFC 1928), which knows the command CONNECT only.
func startSOCKSProxy(t *testing.T, user string) *testProxy {
	t.Helper()
	ln, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{t: t, user: user, address: ln.Addr().String()}
	t.Cleanup(func() {
		ln.Close()
		p.closeConns()
	})
	go serveConns(ln, p.serveSOCKS)
	return p
}

// serveSOCKS serves one connection of a SOCKS5 client. It closes the connection of a client that
// does not speak SOCKS5.
func (p *testProxy) serveSOCKS(conn net.Conn) {
	in := bufio.NewReader(conn)
	// field reads a field with a length byte in front.
	field := func() []byte {
		n, _ := in.ReadByte()
		b := make([]byte, n)
		io.ReadFull(in, b)
		return b
	}
	if version, _ := in.ReadByte(); version != 5 {
		conn.Close()
		return
	}
	methods, method := field(), byte(0)
	if p.user != "" {
		method = 2
	}
	if !slices.Contains(methods, method) {
		conn.Write([]byte{5, 0xff})
		conn.Close()
		return
	}
	conn.Write([]byte{5, method})
	if method == 2 {
		in.ReadByte() // version of the subnegotiation (RFC 1929)
		if got := string(field()) + ":" + string(field()); got != p.user {
			conn.Write([]byte{1, 1})
			conn.Close()
			return
		}
		conn.Write([]byte{1, 0})
	}
	var request [4]byte // version, command, reserved, address type
	io.ReadFull(in, request[:])
	var host string
	if request[3] == 1 {
		var ip [4]byte
		io.ReadFull(in, ip[:])
		host = net.IP(ip[:]).String()
	} else {
		host = string(field())
	}
	var port [2]byte
	io.ReadFull(in, port[:])
	if p.refuses {
		conn.Write([]byte{5, 2, 0, 1, 0, 0, 0, 0, 0, 0})
		conn.Close()
		return
	}
	target := net.JoinHostPort(host, strconv.Itoa(int(binary.BigEndian.Uint16(port[:]))))
	p.connect(conn, in, target, func() { conn.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}) })
}
