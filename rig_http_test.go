package main

// Helpers for tests of HTTP: compressed bodies, protobuf bodies, handlers that protect connections,
// and connections on which a test writes bytes of its own.

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// gzipped returns data compressed as one gzip member.
func gzipped(data []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(data) // cannot fail, because a bytes.Buffer accepts everything
	w.Close()
	return b.Bytes()
}

func gunzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// protoBody returns the families as a body of delimited protobuf. It does not escape names.
func protoBody(t testing.TB, fams ...*dto.MetricFamily) []byte {
	t.Helper()
	var b bytes.Buffer
	enc := expfmt.NewEncoder(&b, expfmt.FmtProtoDelim.WithEscapingScheme(model.NoEscaping))
	for _, f := range fams {
		if err := enc.Encode(f); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// gaugeFamily returns a metric family with one gauge of value v. ms is the gauge's timestamp, or
// nil for none. labels alternates the names and the values of its labels.
func gaugeFamily(name string, v float64, ms *int64, labels ...string) *dto.MetricFamily {
	m := &dto.Metric{Gauge: &dto.Gauge{Value: &v}, TimestampMs: ms}
	for i := 0; i < len(labels); i += 2 {
		m.Label = append(m.Label, &dto.LabelPair{Name: &labels[i], Value: &labels[i+1]})
	}
	return &dto.MetricFamily{Name: &name, Type: dto.MetricType_GAUGE.Enum(), Metric: []*dto.Metric{m}}
}

// protectedAfter calls h with r, as if r had come over a connection of an HTTPServer. It reports
// whether the handler has protected the connection, and returns the handler's answer.
func protectedAfter(h http.Handler, r *http.Request) (protected bool, answer *httptest.ResponseRecorder) {
	c := &trackedConn{listener: newTestLimitListener(nil, 1)}
	c.listener.table.add(&c.entry)
	answer = httptest.NewRecorder()
	h.ServeHTTP(answer, r.WithContext(putConnIntoContext(r.Context(), c)))
	return c.entry.authenticated, answer
}

// rawConn is a TCP connection on which a test writes HTTP requests byte by byte.
type rawConn struct {
	net.Conn
	t       testing.TB
	answers *bufio.Reader
}

// dialRaw connects to address. After 20 s, reads and writes on the connection fail. The connection
// is closed at the end of the test.
func dialRaw(t testing.TB, address string) *rawConn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return &rawConn{conn, t, bufio.NewReader(conn)}
}

func (c *rawConn) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Error(err)
	}
}

// readAnswer reads the next HTTP response up to its body.
func (c *rawConn) readAnswer() (*http.Response, error) {
	return http.ReadResponse(c.answers, nil)
}

// serveHTTP serves srv on a port of 127.0.0.1 until the end of the test, and returns its address.
// The caller sets srv.Handler, and may set srv.TrackConns, srv.TLS, srv.Conns and srv.Log.
func serveHTTP(t testing.TB, srv HTTPServer) (addr string) {
	t.Helper()
	ln, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv.Name, srv.Listener = cmp.Or(srv.Name, "test"), ln
	srv.Conns = cmp.Or(srv.Conns, NewConnMetrics(NewMetrics()))
	srv.Log = cmp.Or(srv.Log, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- srv.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

// selfSignedTLS returns the TLS configurations of a server on 127.0.0.1, and of a client that trusts
// only the key of this server.
func selfSignedTLS(t testing.TB) (server, client *tls.Config) {
	t.Helper()
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
	if client, err = PinnedTLS(pin); err != nil {
		t.Fatal(err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}, client
}

// serveConns calls serve in a goroutine for each connection that ln accepts, until ln is closed.
func serveConns(ln net.Listener, serve func(net.Conn)) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go serve(c)
	}
}
