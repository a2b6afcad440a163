package main

// This file is a fake Prometheus as a source: it answers /federate and the query API as Prometheus does
// (web/federate.go, web/api/v1/api.go and promql/engine.go in its source), from series that are
// functions of time. Without a listener it runs under virtual time.

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeSeries has a sample every step, from begin until end.
type fakeSeries struct {
	labels     map[string]string // with __name__
	step       time.Duration
	begin, end time.Duration // since testNow of the rig; end 0 = never
	late       time.Duration // of every seventh sample
}

// fakePrometheus is an http.RoundTripper and an http.Handler.
type fakePrometheus struct {
	t        testing.TB
	start    time.Time
	external map[string]string
	series   []fakeSeries
	ahead    time.Duration    // of its clock
	behind   time.Duration    // samples that are younger are not there yet
	hole     [2]time.Duration // there are no samples between these times since start
	value    func(ms int64) string

	mu        sync.Mutex                         // guards the fields below
	down      bool                               // no connection
	api       func(*http.Request) *http.Response // answers a request to the query API; nil, or a nil response: as Prometheus does
	federated int
	queries   []string
	longest   time.Duration // longest range that was asked for
}

func newFakePrometheus(t testing.TB, series ...fakeSeries) *fakePrometheus {
	return &fakePrometheus{t: t, start: time.Now(), series: series, value: func(ms int64) string { return strconv.FormatInt(ms%100_000, 10) }}
}

func (p *fakePrometheus) setDown(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
}

// times returns the times of the samples in (from, to], in ms by the clock of the fake Prometheus.
func (p *fakePrometheus) times(s fakeSeries, from, to int64) (times []int64) {
	first := p.start.Add(s.begin + p.ahead).UnixMilli()
	step := s.step.Milliseconds()
	for n := max(0, (from-first)/step-1); first+n*step <= to; n++ {
		ms := first + n*step
		if n%7 == 0 {
			ms += s.late.Milliseconds()
		}
		if at := time.UnixMilli(ms).Sub(p.start.Add(p.ahead)); at > p.hole[0] && at < p.hole[1] {
			continue
		}
		if ms > from && ms <= to && (s.end == 0 || ms < p.start.Add(s.end+p.ahead).UnixMilli()) {
			times = append(times, ms)
		}
	}
	return times
}

func (p *fakePrometheus) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.down {
		return nil, fmt.Errorf("connection refused")
	}
	now := time.Now().Add(p.ahead)
	header := http.Header{"Date": {now.UTC().Format(http.TimeFormat)}}
	newest := now.Add(-p.behind).UnixMilli()
	switch r.URL.Path {
	case "/federate":
		p.federated++
		selectors, err := ParseSelectors(r.URL.Query()["match[]"])
		if err != nil {
			return respond(400, header, err.Error()), nil
		}
		var b strings.Builder
		for _, s := range p.series {
			if !matchesMap(selectors, s.labels) || s.end > 0 && now.Sub(p.start.Add(p.ahead)) >= s.end {
				continue
			}
			times := p.times(s, newest-5*time.Minute.Milliseconds(), newest)
			if len(times) == 0 {
				continue
			}
			labels := maps.Clone(p.external)
			if labels == nil {
				labels = map[string]string{}
			}
			labels["instance"] = ""
			maps.Copy(labels, s.labels)
			at := times[len(times)-1]
			fmt.Fprintf(&b, "%s %s %d\n", renderMap(labels), p.value(at), at)
		}
		header.Set("Content-Type", "text/plain; version=0.0.4")
		return respond(200, header, b.String()), nil
	case "/api/v1/query":
		p.queries = append(p.queries, r.URL.Query().Get("query"))
		if p.api != nil {
			if resp := p.api(r); resp != nil {
				return resp, nil
			}
		}
		header.Set("Content-Type", "application/json")
		return respond(200, header, p.query(r.URL.Query().Get("query"), r.URL.Query().Get("time"), newest)), nil
	}
	return respond(404, header, "404 page not found"), nil
}

// ServeHTTP implements http.Handler.
func (p *fakePrometheus) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	resp, err := p.RoundTrip(r)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	defer resp.Body.Close()
	maps.Copy(w.Header(), resp.Header)
	w.WriteHeader(resp.StatusCode)
	io.Copy(w, resp.Body)
}

// query answers an instant query for a selector, or for a selector with a range.
func (p *fakePrometheus) query(expression, at string, newest int64) string {
	seconds, err := strconv.ParseFloat(at, 64)
	if err != nil {
		return `{"status":"error","errorType":"bad_data","error":"time"}`
	}
	to := min(int64(seconds*1000+0.5), newest)
	span, isRange := 5*time.Minute, strings.HasSuffix(expression, "]")
	if isRange {
		i := strings.LastIndex(expression, "[")
		if span, err = time.ParseDuration(strings.TrimSuffix(expression[i+1:], "]")); err != nil {
			return `{"status":"error","errorType":"bad_data","error":"range"}`
		}
		expression = expression[:i]
		p.longest = max(p.longest, span)
	}
	selectors, err := ParseSelectors([]string{expression})
	if err != nil {
		p.t.Errorf("query %s: %v", expression, err)
	}
	var result []map[string]any
	for _, s := range p.series {
		times := p.times(s, to-span.Milliseconds(), to)
		if !matchesMap(selectors, s.labels) || len(times) == 0 || !isRange && s.end > 0 && to >= p.start.Add(s.end+p.ahead).UnixMilli() {
			continue
		}
		var values [][2]any
		for _, ms := range times {
			values = append(values, [2]any{json.Number(fmt.Sprintf("%d.%03d", ms/1000, ms%1000)), p.value(ms)})
		}
		if isRange {
			result = append(result, map[string]any{"metric": s.labels, "values": values})
		} else {
			result = append(result, map[string]any{"metric": s.labels, "value": values[len(values)-1]})
		}
	}
	text, err := json.Marshal(map[string]any{"status": "success", "data": map[string]any{"resultType": "matrix", "result": result}})
	if err != nil {
		p.t.Error(err)
	}
	return strings.Replace(string(text), `"result":null`, `"result":[]`, 1)
}

func matchesMap(selectors Selectors, labels map[string]string) bool {
	return selectors.MatchOrEmpty([]byte(labels["__name__"]), labelList(labels))
}

// renderMap returns the line of a series without sorting its labels in any particular way.
func renderMap(labels map[string]string) string {
	var b strings.Builder
	b.WriteString(labels["__name__"] + "{")
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		if name != "__name__" {
			fmt.Fprintf(&b, "%s=%q,", name, labels[name])
		}
	}
	return b.String() + "}"
}
