package main

// Tests of RefuseForeignRequests: which requests reach the handler, and how the others are answered
// and counted.

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
)

// A listener that is bound to a loopback address answers 421 to requests for other hosts. Every
// listener answers 403 to requests that a page of another site made a browser send. Each refused
// request closes its connection and is counted.
func TestForeignRequestsRefused(t *testing.T) {
	const onLoopback, notLoopback = true, false
	m := NewMetrics()
	instrument := NewInstrument(m)
	served := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "served") })
	handlers := map[bool]http.Handler{}
	for _, on := range []bool{onLoopback, notLoopback} {
		handlers[on] = RefuseForeignRequests(on, instrument, served)
	}
	for _, c := range []struct {
		onLoopback bool
		host, site string // Host and Sec-Fetch-Site
		want       int
	}{
		{onLoopback, "localhost:9004", "", 200},
		{onLoopback, "localhost", "", 200},
		{onLoopback, "LocalHost.:9004", "", 200},
		{onLoopback, "a.localhost:9004", "", 200},
		{onLoopback, "127.0.0.1:9004", "", 200},
		{onLoopback, "127.9.9.9", "", 200},
		{onLoopback, "[::1]:9004", "", 200},
		{onLoopback, "[::1]", "", 200},
		{onLoopback, "[::ffff:127.0.0.1]:80", "", 200},
		{onLoopback, "", "", 200},
		{onLoopback, "evil.example:9004", "", 421},
		{onLoopback, "localhost.evil.example", "", 421},
		{onLoopback, "notlocalhost:9004", "", 421},
		{onLoopback, "127.0.0.1.evil.example", "", 421},
		{onLoopback, "10.0.0.1:9004", "", 421},
		{onLoopback, "0.0.0.0:9004", "", 421},
		{onLoopback, "[::]:9004", "", 421},
		{onLoopback, ":9004", "", 421},
		{onLoopback, "localhost:9004", "cross-site", 403},
		{onLoopback, "localhost:9004", "same-origin", 200},
		{onLoopback, "localhost:9004", "none", 200},
		{notLoopback, "hub.example:9004", "", 200},
		{notLoopback, "10.0.0.1:9004", "none", 200},
		{notLoopback, "hub.example:9004", "cross-site", 403},
	} {
		req := httptest.NewRequest("GET", "/", nil)
		req.Host = c.host
		if c.site != "" {
			req.Header.Set("Sec-Fetch-Site", c.site)
		}
		rec := httptest.NewRecorder()
		handlers[c.onLoopback].ServeHTTP(rec, req)
		if rec.Code != c.want || (rec.Body.String() == "served") != (c.want == 200) || (rec.Header().Get("Connection") == "close") != (c.want != 200) {
			t.Errorf("bound to loopback %t, Host %q, Sec-Fetch-Site %q: answered %d %v %s, want %d", c.onLoopback, c.host, c.site, rec.Code, rec.Header(), rec.Body, c.want)
		}
	}
	text := metricsText(t, m)
	for _, want := range []string{`{handler="refused",code="421"} 8`, `{handler="refused",code="403"} 2`} {
		if !strings.Contains(text, "telemeter_http_requests_total"+want+"\n") {
			t.Errorf("the metrics do not have %s:\n%s", want, text)
		}
	}
}

// A request with a body is answered 413 at every path, and the connection is closed although most
// of the body was not sent.
func TestRequestWithBodyRefused(t *testing.T) {
	for _, path := range []string{"/known", "/unknown"} {
		for _, head := range []string{
			"POST " + path + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 67108864\r\n\r\nabc",
			"GET " + path + " HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1000000\r\nabc",
			"PUT " + path + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n",
		} {
			mux := http.NewServeMux()
			mux.HandleFunc("GET /known", func(w http.ResponseWriter, r *http.Request) { t.Errorf("%q reached the handler", head) })
			conn := dialRaw(t, serveHTTP(t, HTTPServer{Handler: RefuseForeignRequests(true, NewInstrument(NewMetrics()), mux)}))
			conn.send(head)
			resp, err := conn.readAnswer()
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != 413 || !strings.Contains(string(body), "must have no body") {
				t.Errorf("%q was answered %d %s, %v", head, resp.StatusCode, body, err)
			}
			if _, err := conn.answers.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%q: reading after the answer: %v, want a closed connection", head, err)
			}
		}
	}
}

// A cross-site request reaches the handler only if a user follows a link to the status page. Every
// other request that a page of another site makes a browser send is answered 403.
func TestLinkFromOtherSite(t *testing.T) {
	h := RefuseForeignRequests(false, NewInstrument(NewMetrics()), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
	for _, c := range []struct {
		method, path, mode, dest string
		want                     int
	}{
		{"GET", "/", "navigate", "document", 200},
		{"GET", "/?site=a", "navigate", "document", 200},
		{"GET", "/", "no-cors", "document", 403},
		{"GET", "/", "cors", "empty", 403},
		{"GET", "/", "navigate", "iframe", 403},
		{"GET", "/", "navigate", "embed", 403},
		{"GET", "/", "", "", 403},
		{"HEAD", "/", "navigate", "document", 403},
		{"POST", "/", "navigate", "document", 403},
		{"GET", "/api/status", "navigate", "document", 403},
		{"GET", "/federate", "navigate", "document", 403},
		{"GET", "/metrics", "navigate", "document", 403},
		{"GET", "//", "navigate", "document", 403},
	} {
		req := httptest.NewRequest(c.method, "http://hub.example"+c.path, nil)
		req.Header.Set("Sec-Fetch-Site", "cross-site")
		req.Header.Set("Sec-Fetch-Mode", c.mode)
		req.Header.Set("Sec-Fetch-Dest", c.dest)
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, req)
		if rec.Code != c.want {
			t.Errorf("%s %s with mode %q and destination %q was answered %d, want %d", c.method, c.path, c.mode, c.dest, rec.Code, c.want)
		}
	}
}
