package main

// Tests of filling gaps from the query API of the source, under virtual time.

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fillRig is a client with a fake Prometheus and a hub. The client can be stopped and started again
// with the same spool.
type fillRig struct {
	t          *testing.T
	source     *fakePrometheus
	hub        *fakeHub
	log        *logBuffer
	spool      SpoolConfig
	change     func(*ClientConfig, *ClientReloadConfig)
	boot       func() (int64, string)
	spoolLimit int64   // 0 = that of newSpoolClient
	killAt     int     // operation on the disk at which the client is killed; -1 = it is not killed
	client     *Client // of the last run

	anyValue bool // values do not tell the time
	texts    []string
}

func newFillRig(t *testing.T, series ...fakeSeries) *fillRig {
	return &fillRig{t: t, source: newFakePrometheus(t, series...), spool: diskSpool(), boot: testBoot(), killAt: -1}
}

// run runs a client for d.
func (r *fillRig) run(d time.Duration) {
	r.t.Helper()
	c, hub, log := newSpoolClient(r.t, "", r.spool, func(cfg *ClientConfig, st *ClientReloadConfig) {
		cfg.From, _ = url.Parse("http://source.example/federate")
		cfg.FromClient, cfg.Boot = &http.Client{Transport: r.source}, r.boot
		cfg.Interval, cfg.ScrapeInterval, cfg.Backfill = 10*time.Second, 10*time.Second, 2*time.Hour
		if r.change != nil {
			r.change(cfg, st)
		}
	})
	r.client, r.hub, r.log = c, hub, log
	c.spool.cfg.Limit = cmp.Or(r.spoolLimit, c.spool.cfg.Limit)
	hub.tellsTime = true
	alive, kill := context.WithCancel(r.t.Context())
	defer kill()
	disk := r.spool.FS.(*crashFS)
	disk.ops, disk.hook = 0, func(n int, _, _ string) fault {
		if n == r.killAt {
			kill()
		}
		return fault{Kill: n == r.killAt}
	}
	ctx, cancel := context.WithTimeout(alive, d)
	defer cancel()
	if err := c.Run(ctx); err != nil {
		r.t.Error(err)
	}
	c.pusher.DrainSpool(alive)
	r.texts = append(r.texts, hub.bodies...)
	if err := c.Close(); err != nil && !disk.killed {
		r.t.Error(err)
	}
	if disk.killed {
		disk.crash()
	}
	disk.restart()
}

// received returns the times of the samples of each series that the hub got, sorted. It reports
// a sample whose value is wrong.
func (r *fillRig) received() map[string][]int64 {
	r.t.Helper()
	got := map[string]map[int64]bool{}
	for _, text := range r.texts {
		_, err := new(Decoder).Decode([]byte(text), FormatText, func(s *RawSample) error {
			var l SampleList
			v, at := s.V, s.T
			if err := l.Add(s); err != nil {
				return err
			}
			line := string(l.Line(l.Samples[0]))
			if got[line] == nil {
				got[line] = map[int64]bool{}
			}
			got[line][at] = true
			if want := float64(at % 100_000); v != want && !r.anyValue {
				r.t.Errorf("%s has the value %v at %d, want %v", line, v, at, want)
			}
			return nil
		})
		if err != nil {
			r.t.Errorf("decoding a push: %v", err)
		}
	}
	times := map[string][]int64{}
	for line, set := range got {
		times[line] = slices.Sorted(maps.Keys(set))
	}
	return times
}

// wantNoGap checks that a series has a sample at least every most from the first to the last sample.
func (r *fillRig) wantNoGap(line string, most, atLeast time.Duration) {
	r.t.Helper()
	times := r.received()[line]
	if len(times) < 2 || time.Duration(times[len(times)-1]-times[0])*time.Millisecond < atLeast {
		r.t.Fatalf("%s has the samples %v, of less than %v; all series: %v\n%s", line, times, atLeast, slices.Sorted(maps.Keys(r.received())), r.log.String())
	}
	for i := range times[1:] {
		if d := time.Duration(times[i+1]-times[i]) * time.Millisecond; d > most {
			r.t.Errorf("%s has no sample for %v after %v", line, d, time.UnixMilli(times[i]).UTC())
		}
	}
}

var fillSeries = []fakeSeries{
	{labels: map[string]string{"__name__": "up", "job": "a"}, step: time.Second},
	{labels: map[string]string{"__name__": "slow", "job": "a", "cluster": "own"}, step: 30 * time.Second},
	{labels: map[string]string{"__name__": "ended", "job": "a"}, step: time.Second, end: 5 * time.Minute},
	{labels: map[string]string{"__name__": "began", "job": "b", "x": `q"\`}, step: 5 * time.Second, begin: 6 * time.Minute},
}

// While the client is down, or its source is, nothing is missing afterwards. The labels are those of
// /federate.
func TestBackfill(t *testing.T) {
	for name, outage := range map[string]func(*fillRig){
		"client down": func(r *fillRig) { time.Sleep(10 * time.Minute) },
		"source down": func(r *fillRig) {
			r.source.setDown(true)
			r.run(10 * time.Minute)
			r.source.setDown(false)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newFillRig(t, fillSeries...)
				r.source.external = map[string]string{"cluster": "west", "replica": "a"}
				r.run(2 * time.Minute)
				outage(r)
				r.run(3 * time.Minute)
				r.wantNoGap(`up{cluster="west",job="a",replica="a"}`, 11*time.Second, 14*time.Minute)
				r.wantNoGap(`slow{cluster="own",job="a",replica="a"}`, 40*time.Second, 14*time.Minute)
				r.wantNoGap(`ended{cluster="west",job="a",replica="a"}`, 11*time.Second, 4*time.Minute)
				r.wantNoGap(`began{cluster="west",job="b",replica="a",x="q\"\\"}`, 15*time.Second, 8*time.Minute)
				if n := len(r.received()); n != 4 {
					t.Errorf("there are %d series: %v", n, slices.Sorted(maps.Keys(r.received())))
				}
				times := r.received()[`up{cluster="west",job="a",replica="a"}`]
				if n := len(times); n > 15*6+5 {
					t.Errorf("up has %d samples, more than a scrape every ten seconds gives", n)
				}
				if strings.Count(r.log.String(), "their samples are fetched from the source\" missing=10m") != 1 || strings.Count(r.log.String(), "the samples of missing scrapes are fetched") != 1 || strings.Contains(r.log.String(), "level=WARN") {
					t.Errorf("the log is %s", r.log.String())
				}
			})
		})
	}
}

// A source that does not answer queries is scraped as before, and the log says so once.
func TestBackfillWithoutAPI(t *testing.T) {
	page := func(status int) func(*http.Request) *http.Response {
		return func(*http.Request) *http.Response {
			return respond(status, http.Header{"Content-Type": {"text/html"}}, "<html>no</html>")
		}
	}
	for name, api := range map[string]func(*http.Request) *http.Response{"401": page(401), "403": page(403), "404": page(404), "login page": page(200)} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newFillRig(t, fillSeries[0])
				r.source.api = api
				r.run(time.Minute)
				time.Sleep(10 * time.Minute)
				r.run(30 * time.Minute)
				if n := strings.Count(r.log.String(), "the source does not answer queries"); n != 1 {
					t.Errorf("the log says %d times that the source does not answer queries: %s", n, r.log.String())
				}
				if n := len(r.source.queries); n > 12 {
					t.Errorf("in half an hour the client sent %d queries", n)
				}
				if n := r.source.federated; n < 31*6-3 {
					t.Errorf("the client made %d scrapes", n)
				}
			})
		})
	}
}

// Requests that fail for a while are repeated with growing pauses, which is said once. Those that the
// source finds too large are repeated with shorter slices. Nothing is missing in the end.
func TestBackfillRetries(t *testing.T) {
	for name, answer := range map[string]string{
		"too many samples": `{"status":"error","errorType":"execution","error":"query processing would load too many samples into memory"}`,
		"unavailable":      "",
		"bad gateway":      `{"message":"no healthy upstream"}`,
		"cut":              `{"status":"success","data":{"resultType":"matrix","result":[{"metric":{"__name__":"up"},"values":[[1,"1"]`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newFillRig(t, fillSeries[0])
				failures := 3
				r.source.api = func(req *http.Request) *http.Response {
					if failures--; failures < 0 {
						return nil
					}
					status, header := 422, http.Header{"Content-Type": {"application/json"}}
					switch name {
					case "unavailable":
						status, header = 503, nil
					case "bad gateway":
						status = 502
					case "cut":
						status = 200
					}
					return respond(status, header, answer)
				}
				r.run(time.Minute)
				time.Sleep(20 * time.Minute)
				r.run(5 * time.Minute)
				r.wantNoGap(`up{job="a"}`, 11*time.Second, 25*time.Minute)
				if name == "too many samples" && r.source.longest > 5*time.Minute {
					t.Errorf("after failures the client asked for %v", r.source.longest)
				}
				if n := strings.Count(r.log.String(), "level=WARN"); n != map[bool]int{false: 1}[name == "too many samples"] {
					t.Errorf("the log has %d warnings: %s", n, r.log.String())
				}
			})
		})
	}
}

// Samples that are older than --backfill are not fetched.
func TestBackfillIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFillRig(t, fillSeries[0])
		r.change = func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.Backfill = 10 * time.Minute }
		r.run(time.Minute)
		time.Sleep(time.Hour)
		r.run(2 * time.Minute)
		times := r.received()[`up{job="a"}`]
		begin := r.source.start.Add(61 * time.Minute).UnixMilli()
		var fetched int
		for _, at := range times {
			if at > r.source.start.Add(2*time.Minute).UnixMilli() && at < begin {
				fetched++
			}
		}
		if fetched < 55 || fetched > 62 {
			t.Errorf("%d samples of the hour before the start were fetched, want those of ten minutes", fetched)
		}
		r.change = func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.Backfill = 0 }
		queries := len(r.source.queries)
		time.Sleep(10 * time.Minute)
		r.run(time.Minute)
		if n := len(r.source.queries) - queries; n != 0 {
			t.Errorf("with --backfill 0 the client sent %d queries", n)
		}
	})
}

// A client that is killed at a random operation on its disk, 30 times, misses nothing, also while it
// fills gaps.
func TestBackfillKilled(t *testing.T) {
	for seed := range testSeeds(t, 3) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(seed, 1))
				r := newFillRig(t, fakeSeries{labels: map[string]string{"__name__": "up"}, step: time.Second})
				r.run(time.Minute)
				for range 30 {
					r.killAt = rnd.IntN(200)
					r.run(time.Duration(rnd.Int64N(int64(40 * time.Second))))
					time.Sleep(time.Duration(rnd.Int64N(int64(time.Minute))))
				}
				r.killAt = -1
				r.run(5 * time.Minute)
				r.wantNoGap("up", 16*time.Second, 20*time.Minute)
				if strings.Contains(r.log.String(), "level=WARN") {
					t.Errorf("the last run logs a warning: %s", r.log.String())
				}
			})
		})
	}
}

// The samples of a slice that are too many for the source, or for the client, are fetched in slices
// that are shorter than a scrape interval.
func TestBackfillShortSlices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFillRig(t, fakeSeries{labels: map[string]string{"__name__": "up"}, step: time.Second})
		r.source.api = func(req *http.Request) *http.Response {
			query := req.URL.Query().Get("query")
			if ms, _ := strconv.Atoi(between(query, "[", "ms]")); ms > 3000 {
				return respond(422, http.Header{"Content-Type": {"application/json"}}, `{"status":"error","errorType":"execution","error":"query processing would load too many samples into memory in query execution"}`)
			}
			return nil
		}
		r.run(time.Minute)
		time.Sleep(5 * time.Minute)
		r.run(10 * time.Minute)
		r.wantNoGap("up", 11*time.Second, 15*time.Minute)
		if !strings.Contains(r.log.String(), "the samples of missing scrapes are fetched") {
			t.Errorf("the log does not say that the samples are fetched: %s", r.log.String())
		}
	})
}

// between returns the text between two others, or "" if they are not in s.
func between(s, begin, end string) string {
	_, s, _ = strings.Cut(s, begin)
	s, _, found := strings.Cut(s, end)
	if !found {
		return ""
	}
	return s
}

// The external labels are known also if no selected series is there when the gap is filled. While they
// cannot be known, nothing is fetched.
func TestBackfillLearnsExternalLabels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := fakeSeries{labels: map[string]string{"__name__": "ended", "job": "a"}, step: time.Second, end: 5 * time.Minute}
		up := fakeSeries{labels: map[string]string{"__name__": "up", "job": "a"}, step: time.Second, begin: 16 * time.Minute}
		r := newFillRig(t, ended, up)
		r.source.external = map[string]string{"cluster": "west"}
		r.change = func(_ *ClientConfig, st *ClientReloadConfig) { st.Match, _ = ParseSelectors([]string{"ended"}) }
		r.run(2 * time.Minute)
		time.Sleep(10 * time.Minute)
		r.run(10 * time.Minute)
		r.wantNoGap(`ended{cluster="west",job="a"}`, 11*time.Second, 4*time.Minute)
		if got := slices.Collect(maps.Keys(r.received())); len(got) != 1 {
			t.Errorf("there are the series %v", got)
		}
	})
}

// VictoriaMetrics returns stale markers as NaN, and has no other NaN. Prometheus returns only NaN that
// are values.
func TestBackfillNaN(t *testing.T) {
	for _, victoria := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := newFillRig(t, fillSeries[0])
			r.source.api = func(req *http.Request) *http.Response {
				header := http.Header{"Content-Type": {"application/json"}}
				if victoria {
					header = http.Header{"Content-Type": {"application/stream+json; charset=utf-8"}, "X-Server-Hostname": {"vm"}}
				}
				query := req.URL.Query().Get("query")
				if !strings.Contains(query, "[") {
					return nil
				}
				at := r.source.start.Add(5 * time.Minute).Unix()
				return respond(200, header, fmt.Sprintf(`{"status":"success","data":{"resultType":"matrix","result":[{"metric":{"__name__":"up","job":"a"},"values":[[%d,"NaN"],[%d.5,"-Inf"]]}]}}`, at, at+20))
			}
			r.run(time.Minute)
			time.Sleep(10 * time.Minute)
			r.run(time.Minute)
			text := strings.Join(r.texts, "")
			if strings.Contains(text, `up{job="a"} NaN`) == victoria || !strings.Contains(text, `up{job="a"} -Inf`) {
				t.Errorf("VictoriaMetrics %v: pushed are %s", victoria, text)
			}
		})
	}
}

// Series that several selectors match are given once. Scrapes that are older than --backfill are said
// to be missing.
func TestBackfillOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFillRig(t, fillSeries[0], fillSeries[1])
		r.change = func(cfg *ClientConfig, st *ClientReloadConfig) {
			cfg.Backfill = 10 * time.Minute
			st.Match, _ = ParseSelectors([]string{"up", `{job="a"}`, `{__name__=~"up|slow"}`})
		}
		r.run(time.Minute)
		time.Sleep(20 * time.Minute)
		r.run(time.Minute)
		samples := map[string]int{}
		for line := range strings.Lines(strings.Join(r.texts, "")) {
			samples[line]++
		}
		twice := 0
		for line, n := range samples {
			if n > 1 && strings.HasPrefix(line, "up") {
				twice++
			}
		}
		if twice > 2 {
			t.Errorf("%d samples were given twice", twice)
		}
		if n := strings.Count(r.log.String(), "missing scrapes are older than --backfill"); n != 1 {
			t.Errorf("the log says %d times that scrapes are too old: %s", n, r.log.String())
		}
		if got := r.client.backfiller.expired.Value(); got < 700 || got > 750 {
			t.Errorf("telemeter_backfill_expired_seconds_total is %v", got)
		}
	})
}

// If the scrapes of the client are as frequent as those of the source, each sample is fetched, although
// some are a few ms late.
func TestBackfillLateSamples(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFillRig(t, fakeSeries{labels: map[string]string{"__name__": "up"}, step: 10 * time.Second, late: 3 * time.Millisecond})
		r.run(2 * time.Minute)
		time.Sleep(10 * time.Minute)
		r.run(2 * time.Minute)
		r.wantNoGap("up", 10*time.Second+3*time.Millisecond, 13*time.Minute)
	})
}

// Failures because of too many samples do not make slices short for good.
func TestBackfillGrowsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFillRig(t, fakeSeries{labels: map[string]string{"__name__": "up"}, step: time.Second})
		failures := 5
		r.source.api = func(req *http.Request) *http.Response {
			if strings.Contains(req.URL.Query().Get("query"), "[") {
				if failures--; failures >= 0 {
					return respond(422, http.Header{"Content-Type": {"application/json"}}, `{"status":"error","errorType":"execution","error":"too many samples"}`)
				}
			}
			return nil
		}
		r.run(time.Minute)
		time.Sleep(100 * time.Minute)
		r.run(5 * time.Minute)
		r.wantNoGap("up", 11*time.Second, 100*time.Minute)
		if n := len(r.source.queries); n > 300 {
			t.Errorf("the client sent %d queries", n)
		}
	})
}

// Gaps that become too old while the source answers no queries are not said to be filled.
func TestBackfillExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFillRig(t, fillSeries[0])
		r.source.api = func(*http.Request) *http.Response { return respond(403, nil, "no") }
		r.change = func(cfg *ClientConfig, _ *ClientReloadConfig) { cfg.Backfill = 10 * time.Minute }
		r.run(time.Minute)
		time.Sleep(5 * time.Minute)
		r.run(5 * time.Minute)
		if st := r.client.Status(); st.Source.Missing < 200 || !strings.Contains(strings.Join(st.Problems, "\n"), "s cannot be fetched: /api/v1/query: not an answer of the query API") {
			t.Errorf("while queries fail, %v s are missing, and the problems are %q", st.Source.Missing, st.Problems)
		}
		r.run(20 * time.Minute)
		if log := r.log.String(); strings.Contains(log, "missing scrapes are fetched") || !strings.Contains(log, "missing scrapes are older than --backfill") {
			t.Errorf("the log is %s", log)
		}
		if st := r.client.Status(); st.Source.Missing != 0 || len(st.Problems) != 0 {
			t.Errorf("afterwards %v s are missing, and the problems are %q", st.Source.Missing, st.Problems)
		}
	})
}

// While the spool is more than half full, the samples stay in the source.
func TestBackfillWaitsForSpool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFillRig(t, fillSeries[0])
		r.run(time.Minute)
		time.Sleep(100 * time.Minute)
		begin := time.Now()
		r.change = func(cfg *ClientConfig, _ *ClientReloadConfig) {
			next := cfg.ToClient.Transport
			cfg.ToClient = &http.Client{Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
				if time.Since(begin) < 30*time.Second {
					return nil, io.ErrClosedPipe
				}
				return next.RoundTrip(req)
			})}
		}
		r.spoolLimit = 48 << 10
		time.AfterFunc(15*time.Second, func() {
			if st := r.client.spool.Stats(); r.client.backfiller.pending() < 30*time.Minute || st.Bytes < 24<<10 || r.client.dropped.Value(DropSpoolFull) > 0 {
				t.Errorf("%v is missing, the spool has %d bytes, and %v samples were dropped", r.client.backfiller.pending(), st.Bytes, r.client.dropped.Value(DropSpoolFull))
			}
		})
		r.run(5 * time.Minute)
		r.wantNoGap(`up{job="a"}`, 16*time.Second, 100*time.Minute)
	})
}

// Gaps of an earlier process are filled only after the first scrape, which shows the source's clock.
func TestBackfillAfterFirstScrape(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFillRig(t, fillSeries[0])
		r.source.ahead = 10 * time.Minute
		r.anyValue = true
		r.run(time.Minute)
		time.Sleep(5 * time.Minute)
		r.source.api = func(*http.Request) *http.Response { return respond(403, nil, "no") }
		r.run(20 * time.Second)
		scrapes, isFirst := r.source.federated, true
		r.source.api = func(*http.Request) *http.Response {
			if isFirst && r.source.federated == scrapes {
				t.Error("a query comes before the first scrape")
			}
			isFirst = false
			return nil
		}
		r.run(time.Minute)
		r.wantNoGap(`up{job="a"}`, 16*time.Second, 5*time.Minute)
	})
}

// A slice does not replace the newest scrape in the client's /federate.
func TestBackfillAndOwnFederate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFillRig(t, fillSeries[0])
		r.run(time.Minute)
		time.Sleep(9 * time.Minute)
		r.run(3 * time.Second)
		text := clientGet(r.client.Handler(false), "/federate", "*/*").Body.String()
		fields := strings.Fields(text[strings.LastIndex(text, "up{"):])
		at, err := strconv.ParseInt(fields[len(fields)-1], 10, 64)
		if age := time.Since(time.UnixMilli(at)); err != nil || strings.Count(text, "up{") != 1 || age > 10*time.Second {
			t.Errorf("/federate has a sample that is %v old, %v: %s", age, err, text)
		}
	})
}
