package main

// Tests of NewInstrument, which wraps HTTP handlers to count their requests in
// telemeter_http_requests_total.

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// An instrumented handler counts its requests by the handler's name and by the first status that
// the handler writes. If the handler writes no status and does not panic, the request counts as
// 200. http.ResponseController can flush through the wrapped ResponseWriter.
func TestInstrument(t *testing.T) {
	m := NewMetrics()
	wrap := NewInstrument(m)
	for i, h := range []http.HandlerFunc{
		func(w http.ResponseWriter, r *http.Request) {},
		func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "x"); w.WriteHeader(500) },
		func(w http.ResponseWriter, r *http.Request) { http.Error(w, "x", 404) },
		func(w http.ResponseWriter, r *http.Request) {
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
		},
	} {
		wrap(fmt.Sprintf("h%d", i), h).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	}
	text := metricsText(t, m)
	for _, want := range []string{`{handler="h0",code="200"} 1`, `{handler="h1",code="200"} 1`, `{handler="h2",code="404"} 1`, `{handler="h3",code="200"} 1`} {
		if !strings.Contains(text, "telemeter_http_requests_total"+want+"\n") {
			t.Errorf("the metrics do not have %s:\n%s", want, text)
		}
	}
}
