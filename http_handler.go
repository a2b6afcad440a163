package main

// This file has HTTP handlers and helpers that server and client share: request metrics, health
// checks, compressed answers and the list of paths. The request metrics have only two labels, the
// handler's name and the status code, so the number of their series is bounded.

import (
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// NewInstrument registers the metrics of HTTP requests. It returns a function that wraps a handler:
// the wrapped handler counts and times its requests under the given name.
func NewInstrument(m *Metrics) func(name string, h http.Handler) http.Handler {
	requests := m.Counter("telemeter_http_requests_total", "HTTP requests by handler and status code.", "handler", "code")
	seconds := m.Histogram("telemeter_http_request_duration_seconds", "Seconds to answer an HTTP request, by handler and status code.",
		[]float64{.001, .005, .01, .05, .1, .25, .5, 1, 5, 10, 30}, "handler", "code")
	return func(name string, h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			begin := time.Now()
			sw := &statusWriter{ResponseWriter: w, code: http.StatusOK}
			code := "panic"
			defer func() {
				requests.Inc(name, code)
				seconds.Observe(time.Since(begin).Seconds(), name, code)
			}()
			h.ServeHTTP(sw, r)
			code = strconv.Itoa(sw.code)
		})
	}
}

// statusWriter remembers the status code that a handler wrote.
type statusWriter struct {
	http.ResponseWriter
	code    int
	written bool
}

func (w *statusWriter) WriteHeader(code int) {
	if !w.written {
		w.code, w.written = code, true
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *statusWriter) Write(p []byte) (int, error) {
	w.written = true
	return w.ResponseWriter.Write(p)
}

// Unwrap returns the wrapped writer. http.ResponseController uses it to reach the connection.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// CountWriter writes to W, and counts in N the bytes that W accepted.
type CountWriter struct {
	W io.Writer
	N int64
}

func (c *CountWriter) Write(p []byte) (int, error) {
	n, err := c.W.Write(p)
	c.N += int64(n)
	return n, err
}

// CompressResponse returns a writer for the body of an answer. If the request accepts gzip, the
// writer compresses, and CompressResponse sets Content-Encoding. Otherwise the writer is w. The
// caller must call finish at the end of the body. An error of finish means that the connection
// failed.
func CompressResponse(w http.ResponseWriter, r *http.Request) (body io.Writer, finish func() error) {
	if !AcceptsGzip(r.Header) {
		return w, func() error { return nil }
	}
	w.Header().Set("Content-Encoding", "gzip")
	z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // NewWriterLevel fails only for an invalid level
	return z, z.Close
}

// WriteJSON answers with v encoded as JSON.
func WriteJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) // every caller passes a v that can be encoded, so an error means only that the connection failed
}

// IndexHandler returns a handler that answers with a JSON object, which lists paths under the key
// "paths".
func IndexHandler(paths ...string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		WriteJSON(w, map[string][]string{"paths": paths})
	})
}

// HealthPaths lists the paths that AddHealthRoutes adds.
func HealthPaths() []string {
	return []string{"/healthz", "/healthz/ready", "/-/healthy", "/-/ready"}
}

// AddHealthRoutes adds the routes of health checks to mux. /healthz and /-/healthy always answer
// 200. /healthz/ready and /-/ready answer 200 while whyNotReady returns "". Otherwise they answer
// 503 with the text that whyNotReady returns. The names with /-/ are those of Prometheus.
func AddHealthRoutes(mux *http.ServeMux, whyNotReady func() string) {
	healthy := func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "ok") }
	ready := func(w http.ResponseWriter, r *http.Request) {
		if why := whyNotReady(); why != "" {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "not ready: "+why, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	}
	for _, path := range HealthPaths() {
		if strings.HasSuffix(path, "/ready") {
			mux.HandleFunc("GET "+path, ready)
		} else {
			mux.HandleFunc("GET "+path, healthy)
		}
	}
}
