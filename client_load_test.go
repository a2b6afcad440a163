package main

// Tests of the load generator in virtual time, with a transport that answers in place of servers.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// loadServer is a transport that records each push and answers after a delay, in the virtual time of a
// synctest bubble.
type loadServer struct {
	delay  time.Duration
	status func(push int) int // 0: no answer
	begin  time.Time

	mu       sync.Mutex // guards the fields below
	pushes   []string   // "host token at second", in the order of arrival
	headers  []http.Header
	times    map[string]map[int64]bool // token → times of its samples
	inFlight int
	most     int // pushes in flight at the same time
}

func (s *loadServer) RoundTrip(req *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	token := strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer ")
	s.mu.Lock()
	n := len(s.pushes)
	s.pushes = append(s.pushes, fmt.Sprintf("%s%s %s at %v", req.URL.Host, req.URL.Path, token, time.Since(s.begin).Round(10*time.Millisecond)))
	s.headers = append(s.headers, req.Header)
	s.inFlight++
	s.most = max(s.most, s.inFlight)
	new(Decoder).Decode(body, FormatText, func(r *RawSample) error {
		if s.times[token] == nil {
			s.times[token] = map[int64]bool{}
		}
		s.times[token][r.T] = true
		return nil
	})
	s.mu.Unlock()
	time.Sleep(s.delay)
	s.mu.Lock()
	s.inFlight--
	s.mu.Unlock()
	if err := req.Context().Err(); err != nil {
		return nil, err
	}
	status := http.StatusOK
	if s.status != nil {
		status = s.status(n)
	}
	if status == 0 {
		return nil, errors.New("connection refused")
	}
	text := `{"accepted":9,"duplicates":0,"dropped":{},"server":"s","time":1}`
	if status != http.StatusOK {
		text = "because"
	}
	return &http.Response{StatusCode: status, Status: fmt.Sprint(status), Body: io.NopCloser(strings.NewReader(text)), Header: http.Header{}, Request: req}, nil
}

// runLoadAt runs RunLoad with three sites of nine series against s. change edits the configuration.
func runLoadAt(ctx context.Context, s *loadServer, change func(*LoadConfig)) LoadReport {
	s.begin, s.times = time.Now(), map[string]map[int64]bool{}
	cfg := LoadConfig{
		To: []string{"http://a"}, ToClient: &http.Client{Transport: s}, Tokens: []string{"t1", "t2", "t3"}, Series: 9,
		Format: LoadText, Encoding: LoadIdentity, InFlight: 10, Duration: time.Minute,
	}
	change(&cfg)
	return RunLoad(ctx, cfg)
}

// With an interval the sites push in turn, spread evenly over it, until the duration is over. The
// sites are spread over the servers. The first push to each server precedes the run.
func TestLoadInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &loadServer{delay: 20 * time.Millisecond}
		r := runLoadAt(t.Context(), s, func(c *LoadConfig) {
			c.Interval, c.Duration, c.To = 3*time.Second, 5500*time.Millisecond, []string{"http://a", "http://b"}
		})
		want := "[a/upload t1 at 0s b/upload t2 at 20ms a/upload t3 at 2.04s a/upload t1 at 3.04s b/upload t2 at 4.04s a/upload t3 at 5.04s]"
		if got := fmt.Sprint(s.pushes); got != want {
			t.Errorf("the pushes are %s, want %s", got, want)
		}
		if r.Pushes != 6 || r.Samples != 54 || r.Err() != nil || r.Latency.Quantile(1) != 20*time.Millisecond {
			t.Errorf("the report is:\n%s", &r)
		}
	})
}

// If all pushes in flight are slow, the later pushes are late, and their latency shows it.
func TestLoadLatencyCountsFromDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &loadServer{delay: 2 * time.Second}
		r := runLoadAt(t.Context(), s, func(c *LoadConfig) { c.Interval, c.Pushes, c.InFlight = 3*time.Second, 1, 1 })
		if got := r.Latency.Quantile(1); r.Pushes != 3 || got != 3*time.Second { // due at 2 s of the run, sent at 3 s, answered at 5 s
			t.Errorf("the greatest latency of %d pushes is %v, want 3s", r.Pushes, got)
		}
	})
}

// Without an interval the generator keeps as many pushes in flight as it may, but no more than it
// has sites. No two pushes of a site have the same time or name the same scrape.
func TestLoadAsFastAsPossible(t *testing.T) {
	for _, inFlight := range []int{1, 2, 10} {
		synctest.Test(t, func(t *testing.T) {
			s := &loadServer{delay: time.Millisecond / 4}
			r := runLoadAt(t.Context(), s, func(c *LoadConfig) { c.InFlight, c.Pushes, c.FirstSpoolID = inFlight, 40, 1 })
			if r.Pushes != 120 || r.Err() != nil || s.most != min(inFlight, 3) {
				t.Errorf("%d in flight: %d pushes, %d in flight, %v", inFlight, r.Pushes, s.most, r.Err())
			}
			names := map[string]bool{}
			for _, h := range s.headers {
				if n, err := ParseScrapeNames(h.Get(SpoolHeader)); err != nil || !n.IsSingle() {
					t.Fatalf("the header %q names no scrape: %v", h.Get(SpoolHeader), err)
				}
				names[h.Get(SpoolHeader)] = true
			}
			if len(names) != 120 {
				t.Errorf("120 pushes name %d scrapes", len(names))
			}
			for _, token := range []string{"t1", "t2", "t3"} {
				if len(s.times[token]) != 40 {
					t.Errorf("the 40 pushes of %s have %d times", token, len(s.times[token]))
				}
			}
		})
	}
}

// The headers state the format, the encoding and, only if the pushes name their scrapes, the spool.
func TestLoadHeaders(t *testing.T) {
	for _, c := range []struct {
		format, encoding string
		spool            uint64
		wantType         string
		wantEncoding     string
	}{
		{LoadText, LoadIdentity, 0, "text/plain", ""}, {LoadText, LoadGzip, 7, "text/plain", "gzip"}, {LoadProtobuf, LoadSnappy, 1<<64 - 1, "application/vnd.google.protobuf", "snappy"},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := &loadServer{}
			runLoadAt(t.Context(), s, func(cfg *LoadConfig) {
				cfg.Pushes, cfg.Format, cfg.Encoding, cfg.FirstSpoolID = 1, c.format, c.encoding, c.spool
			})
			h := s.headers[0]
			if _, err := ParseFormat(h.Get("Content-Type")); err != nil || !strings.HasPrefix(h.Get("Content-Type"), c.wantType) || h.Get("Content-Encoding") != c.wantEncoding || (h.Get(SpoolHeader) != "") != (c.spool != 0) {
				t.Errorf("%+v: the headers are %v", c, h)
			}
		})
	}
}

// When ctx ends, the pushes in flight are completed and counted, and no other push begins.
func TestLoadEndsEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		s := &loadServer{delay: time.Second}
		r := runLoadAt(ctx, s, func(*LoadConfig) {})
		if r.Pushes != 4 || r.Err() != nil || r.Took.Round(10*time.Millisecond) != 2*time.Second || !strings.Contains(r.String(), "interrupted after 0.5 s of 60 s\n") {
			t.Errorf("the report is:\n%s", &r)
		}
	})
}

// A first push that fails in a way that lasts ends the run. A server that is overloaded does not.
func TestLoadStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for status, stops := range map[int]bool{200: false, 400: true, 401: true, 403: true, 404: true, 413: true, 429: false, 500: false, 503: false} {
			s := &loadServer{delay: time.Millisecond, status: func(int) int { return status }}
			r := runLoadAt(t.Context(), s, func(c *LoadConfig) { c.Pushes = 2 })
			if (r.Stopped != nil) != stops || r.Stopped != nil && (r.Pushes != 1 || r.Err() != r.Stopped) || !stops && r.Pushes != 6 {
				t.Errorf("answers %d: %d pushes, stopped because of %v", status, r.Pushes, r.Stopped)
			}
		}
		for _, c := range []struct {
			err   error
			stops bool
		}{
			{&net.OpError{Op: "dial", Err: errors.New("connection refused")}, true}, {&net.OpError{Op: "read", Err: errors.New("reset")}, false},
			{&DeniedError{errors.New("pin"), "advice"}, true}, {http.ErrSchemeMismatch, true},
		} {
			if isLasting(noAnswer, c.err) != c.stops {
				t.Errorf("%v: want a stop: %t", c.err, c.stops)
			}
		}
	})
}

// The report says if the pace was not kept, and if sites never pushed. A run that is as asked for has
// no note.
func TestLoadNotes(t *testing.T) {
	for _, c := range []struct {
		delay  time.Duration
		change func(*LoadConfig)
		want   string
	}{
		{time.Millisecond, func(c *LoadConfig) { c.Interval, c.Duration = time.Second, 10*time.Second }, "[]"},
		{time.Millisecond, func(c *LoadConfig) { c.Interval, c.Pushes, c.Duration = time.Second, 3, 0 }, "[]"},
		{time.Millisecond, func(c *LoadConfig) { c.Duration = time.Second }, "[]"},
		{time.Second, func(c *LoadConfig) { c.Interval, c.Duration = time.Second, 10*time.Second; c.InFlight = 1 }, "[the servers did not keep the pace: 1.1 of 3 pushes a second]"},
		{time.Second, func(c *LoadConfig) { c.Interval, c.Duration, c.Pushes, c.InFlight = time.Second, 0, 31, 1 }, "[the servers did not keep the pace: 1 of 3 pushes a second]"},
		{time.Millisecond, func(c *LoadConfig) { c.Interval, c.Duration = time.Minute, 10*time.Second }, "[2 of 3 sites never pushed: --duration is shorter than --interval]"},
		{time.Minute, func(c *LoadConfig) { c.InFlight, c.Duration = 1, time.Second }, "[1 of 3 sites never pushed: the run was too short for them]"},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := runLoadAt(t.Context(), &loadServer{delay: c.delay}, c.change)
			if got := fmt.Sprint(r.notes); got != c.want {
				t.Errorf("the notes are %s, want %s", got, c.want)
			}
		})
	}
}

// Failures are counted by status. A server that gives no answer causes no busy loop.
func TestLoadFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &loadServer{status: func(push int) int { return []int{200, 429, 0}[push%3] }}
		r := runLoadAt(t.Context(), s, func(c *LoadConfig) { c.Pushes, c.InFlight = 2, 1 })
		if r.Failed() != 4 || r.answers[429].count != 2 || !strings.HasPrefix(r.answers[429].first, `429: "because"; the sites push faster`) || !strings.Contains(r.answers[noAnswer].first, "connection refused") {
			t.Errorf("the report is:\n%s", &r)
		}
		s = &loadServer{status: func(int) int { return 0 }}
		if r = runLoadAt(t.Context(), s, func(c *LoadConfig) { c.Duration = 10 * time.Second }); r.Pushes < 100 || r.Pushes > 304 {
			t.Errorf("%d pushes in 10 s to a server that gives no answer, want at most ten a second for each of three in flight", r.Pushes)
		}
	})
}

// An answer 200 of another program is a failure, which ends the run.
func TestLoadForeignAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, text := range []string{"<html>", "{}", ""} {
			client := &http.Client{Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
				return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(text)), Request: req}, nil
			})}
			r := runLoadAt(t.Context(), &loadServer{}, func(c *LoadConfig) { c.ToClient, c.Pushes = client, 1 })
			if r.Failed() != 1 || r.Stopped == nil || !strings.Contains(r.String(), "the answer is not a telemeter server's") {
				t.Errorf("%q: the report is:\n%s", text, &r)
			}
		}
	})
}

// The progress has a line for each second.
func TestLoadProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var progress bytes.Buffer
		runLoadAt(t.Context(), &loadServer{delay: 10 * time.Millisecond}, func(c *LoadConfig) {
			c.Progress, c.Interval, c.Duration = &progress, time.Second, 3500*time.Millisecond
		})
		lines := strings.Split(progress.String(), "\n")
		if len(lines) != 4 || !strings.HasPrefix(lines[1], "2 s: 6 pushes, 3 a second, 27 samples a second, p99 10.00 ms, 0 failed") {
			t.Errorf("the progress is:\n%s", &progress)
		}
	})
}
