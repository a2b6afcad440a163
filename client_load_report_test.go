package main

// Tests of the report of the load generator: quantiles, texts and failures.

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// A quantile is at most 4 % or 1 µs above the exact one, and never above the greatest duration.
func TestLatencyHistogram(t *testing.T) {
	seed := testSeed(t, 0)
	rnd := rand.New(rand.NewPCG(seed, 2))
	for range 200 {
		var h LatencyHistogram
		var all []time.Duration
		for range 1 + rnd.IntN(300) {
			d := time.Duration(rnd.Int64N(int64(1) << rnd.IntN(41))) // up to 18 minutes
			all = append(all, d)
			h.Add(d)
		}
		slices.Sort(all)
		for _, q := range []float64{0, 0.5, 0.9, 0.99, 1} {
			exact, got := all[int(q*float64(len(all)-1))], h.Quantile(q)
			if got < exact || got > exact+exact/25+time.Microsecond || got > all[len(all)-1] {
				t.Fatalf("seed %d: of %d durations the quantile %v is %v, want %v", seed, len(all), q, got, exact)
			}
		}
	}
	var h LatencyHistogram
	if h.Quantile(0.99) != 0 {
		t.Error("an empty histogram has a quantile")
	}
	h.Add(100 * time.Hour)
	h.Add(-time.Second)
	if h.Quantile(0) > time.Microsecond || h.Quantile(1) < time.Hour {
		t.Errorf("the quantiles of a negative duration and of 100 hours are %v and %v", h.Quantile(0), h.Quantile(1))
	}
}

// A report lists what was pushed and each kind of answer with its first reason. It has an error
// unless every push was answered with 200 and no sample was dropped.
func TestLoadReport(t *testing.T) {
	newReport := func() *LoadReport {
		return &LoadReport{Took: 2 * time.Second, answers: map[int]loadAnswers{}, dropped: map[string]int64{}}
	}
	accepted := func(r *LoadReport, n int, dropped map[string]int) {
		r.addPush(1000, 200, "", 3*time.Millisecond)
		r.addAnswer(&PushAnswer{Accepted: &n, Dropped: dropped})
	}
	for _, c := range []struct {
		name string
		fill func(*LoadReport)
		err  string
		want []string
	}{
		{"no push", func(*LoadReport) {}, "no push was sent", []string{"pushes    0 in 2.0 s"}},
		{"all accepted", func(r *LoadReport) { accepted(r, 225, nil); accepted(r, 225, map[string]int{}) }, "",
			[]string{"pushes    2 in 2.0 s, 1 a second", "samples   450 accepted, 225 a second", "bytes     2000 sent in bodies, 1000 a push", "p99 3.00 ms, max 3.00 ms", "answer 200 2 pushes\n"}},
		{"dropped", func(r *LoadReport) { accepted(r, 25, map[string]int{"series_limit": 200}) }, "servers dropped samples of the pushes",
			[]string{"samples   200 dropped by the servers: series_limit"}},
		{"failed", func(r *LoadReport) {
			accepted(r, 225, nil)
			r.addPush(1000, 429, `429 Too Many Requests: "first"`, time.Hour)
			r.addPush(1000, 429, "second", time.Hour)
			r.addPush(1000, noAnswer, "connection refused", time.Hour)
		}, "3 of 4 pushes failed", []string{`answer 429 2 pushes; the first: 429 Too Many Requests: "first"` + "\n", "no answer 1 push; the first: connection refused\n", "max 3.00 ms", "bytes     3000 sent in bodies, 1000 a push"}},
		{"no answer", func(r *LoadReport) { r.addPush(1000, noAnswer, "connection refused", time.Hour) }, "1 of 1 pushes failed", []string{"pushes    1 in 2.0 s"}},
		{"a note", func(r *LoadReport) { accepted(r, 225, nil); r.notes = []string{"interrupted"} }, "", []string{"note      interrupted\n", "answer 200 1 push\n"}},
	} {
		r := newReport()
		c.fill(r)
		got := ""
		if err := r.Err(); err != nil {
			got = err.Error()
		}
		if got != c.err {
			t.Errorf("%s: the error is %q, want %q", c.name, got, c.err)
		}
		if happened := r.Pushes > r.answers[noAnswer].count; strings.Contains(r.String(), "bytes ") != happened || strings.Contains(r.String(), "latency ") != happened {
			t.Errorf("%s: the report must have the bytes and latencies only of pushes that were answered:\n%s", c.name, r)
		}
		for _, want := range c.want {
			if !strings.Contains(r.String(), want) {
				t.Errorf("%s: the report lacks %q:\n%s", c.name, want, r)
			}
		}
	}
}

// The advice fits the reason of a refusal and the kind of the tokens.
func TestLoadAdvice(t *testing.T) {
	for _, c := range []struct {
		status      int
		reason      string
		isTokenFile bool
		want        string
	}{
		{401, TokenForgedText, false, "make sure that --keys"},
		{401, TokenForgedText, true, "make a new token"},
		{401, TokenExpiredText, false, "correct the clock"},
		{401, TokenRevokedText, true, "use the token of another site"},
		{401, TokenRevokedText, false, "use another --prefix"},
		{401, "this request needs a token of kind upload, not client", true, "use --keys instead of --token-file"},
		{413, NoBodyText, false, "the listener for clients"},
		{413, "the body is larger than 9 bytes", false, "use fewer --series"},
		{404, "404 page not found", false, "the listener for clients"},
		{400, "Client sent an HTTP request to an HTTPS server.", false, "write https:// instead of http://"},
		{400, "line 1", false, ""},
		{429, "the push is too early", false, "start the servers with --ratelimit 0"},
		{503, "the server is overloaded", false, ""},
	} {
		got := loadAdvice(c.status, c.reason, c.isTokenFile)
		if !strings.Contains(got, c.want) || c.want == "" && got != "" {
			t.Errorf("%d %s with --token-file=%t: the advice is %q, want %q", c.status, c.reason, c.isTokenFile, got, c.want)
		}
	}
}

// A server cannot make the report grow: at most maxLoadReasons reasons are kept.
func TestLoadReportIsBounded(t *testing.T) {
	r := &LoadReport{answers: map[int]loadAnswers{}, dropped: map[string]int64{}}
	none := 0
	for i := range 1000 {
		r.addAnswer(&PushAnswer{Accepted: &none, Dropped: map[string]int{strings.Repeat("x", i): 1}})
	}
	if len(r.dropped) != maxLoadReasons {
		t.Errorf("the report has %d reasons, want %d", len(r.dropped), maxLoadReasons)
	}
}
