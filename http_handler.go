package main

// Handlers that server and client share: counted requests, health, compressed answers, the
// list of paths. Counts are by handler and status, so that their number is bounded.

import (
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// NewInstrument registers metrics of HTTP requests, and returns a function that counts and times
// the requests of a handler under a name.
func NewInstrument(m *Metrics) func(name string, h http.Handler) http.Handler {
	requests := m.Counter("telemeter_http_requests_total", "HTTP requests by handler and status code.", "handler", "code")
	seconds := m.Histogram("telemeter_http_request_duration_seconds", "Time to answer HTTP requests, by handler and status code.",
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

// statusWriter remembers the status that a handler wrote.
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

// Unwrap lets http.ResponseController reach the connection.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// CountWriter counts the bytes written to W.
type CountWriter struct {
	W io.Writer
	N int64
}

func (c *CountWriter) Write(p []byte) (int, error) {
	n, err := c.W.Write(p)
	c.N += int64(n)
	return n, err
}

// CompressResponse returns a writer for the body, which compresses if the request accepts gzip.
// finish has to be called at the end of the body; its error is the connection's.
func CompressResponse(w http.ResponseWriter, r *http.Request) (body io.Writer, finish func() error) {
	if !AcceptsGzip(r.Header) {
		return w, func() error { return nil }
	}
	w.Header().Set("Content-Encoding", "gzip")
	z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // the level is valid
	return z, z.Close
}

// WriteJSON answers with v in JSON.
func WriteJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) // an error is the connection's
}

// IndexHandler answers with a list of paths.
func IndexHandler(paths ...string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		WriteJSON(w, map[string][]string{"paths": paths})
	})
}

// AddHealthRoutes adds /healthz, which answers 200 while the process lives, and /healthz/ready,
// which answers 200 while ready returns true.
func AddHealthRoutes(mux *http.ServeMux, ready func() bool) {
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, r *http.Request) {
		if !ready() {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
}
