package main

// Bodies and connections for tests of HTTP: compressed bodies, protobuf bodies, and connections on
// which a test writes its own bytes.

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// gzipped returns data as one gzip member.
func gzipped(data []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(data) // a bytes.Buffer never fails
	w.Close()
	return b.Bytes()
}

// gunzipped returns what the gzip data expands to.
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

// protoBody returns families as a delimited protobuf exposition. Names are not escaped.
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

// gaugeFamily returns a family of one gauge. ms is its timestamp, or nil. labels alternates names
// and values.
func gaugeFamily(name string, v float64, ms *int64, labels ...string) *dto.MetricFamily {
	m := &dto.Metric{Gauge: &dto.Gauge{Value: &v}, TimestampMs: ms}
	for i := 0; i < len(labels); i += 2 {
		m.Label = append(m.Label, &dto.LabelPair{Name: &labels[i], Value: &labels[i+1]})
	}
	return &dto.MetricFamily{Name: &name, Type: dto.MetricType_GAUGE.Enum(), Metric: []*dto.Metric{m}}
}

// rawConn is a TCP connection on which a test writes HTTP requests byte by byte.
type rawConn struct {
	net.Conn
	t       testing.TB
	answers *bufio.Reader
}

// dialRaw connects to address. The connection fails after 20 s, and is closed at the end of the
// test.
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

// send writes text to the connection.
func (c *rawConn) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Error(err)
	}
}

// readAnswer reads the header of the next HTTP response.
func (c *rawConn) readAnswer() (*http.Response, error) {
	return http.ReadResponse(c.answers, nil)
}
