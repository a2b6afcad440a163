package main

// Tests of several sources, which are replicas of one Prometheus, under virtual time.

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// newReplicaRig returns a rig with two replicas, whose samples of a series have different times. The
// external label replica tells them apart, and the client removes it.
func newReplicaRig(t *testing.T) (r *fillRig, a, b *fakePrometheus) {
	up, slow := map[string]string{"__name__": "up"}, map[string]string{"__name__": "slow"}
	r = newFillRig(t, fakeSeries{labels: up, step: 5 * time.Second}, fakeSeries{labels: slow, step: 30 * time.Second})
	a = r.source
	b = newFakePrometheus(t, fakeSeries{labels: up, step: 5 * time.Second, begin: -5*time.Minute + 2*time.Second},
		fakeSeries{labels: slow, step: 30 * time.Second, begin: -5*time.Minute + 23*time.Second})
	a.external, b.external = map[string]string{"replica": "a"}, map[string]string{"replica": "b"}
	r.change = func(cfg *ClientConfig, st *ClientReloadConfig) {
		replica, _ := url.Parse("http://replica.example/federate")
		cfg.Replicas = []*url.URL{replica}
		cfg.FromClient = &http.Client{Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
			if req.URL.Host == "replica.example" {
				return b.RoundTrip(req)
			}
			return a.RoundTrip(req)
		})}
		st.NewCleaner = func() *ClientCleaner { return &ClientCleaner{Elide: []string{"replica"}} }
	}
	return r, a, b
}

// inOrder checks that the pushed samples of a series, in the order of the scrapes, have ascending
// times.
func (r *fillRig) inOrder(line string) {
	r.t.Helper()
	last := ""
	for at := range strings.Lines(strings.Join(r.texts, "")) {
		if rest, ok := strings.CutPrefix(at, line+" "); ok {
			now := strings.Fields(rest)[1]
			if now < last {
				r.t.Errorf("%s has the time %s after %s", line, now, last)
			}
			last = now
		}
	}
}

// When a replica fails, the client goes on with the other one in the same scrape, and stays there. No
// sample is missing, and times do not run backwards, however far the other one is behind.
func TestReplicaFails(t *testing.T) {
	for _, behind := range []time.Duration{0, 4 * time.Second, 30 * time.Second} {
		t.Run(fmt.Sprint(behind, " behind"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, a, b := newReplicaRig(t)
				b.behind = behind
				time.AfterFunc(3*time.Minute+time.Second, func() { a.setDown(true) })
				time.AfterFunc(6*time.Minute, func() { a.setDown(false) })
				r.run(10 * time.Minute)
				r.wantNoGap("up", 15*time.Second, 9*time.Minute)
				r.wantNoGap("slow", 60*time.Second, 9*time.Minute)
				if n := len(r.received()); n != 2 {
					t.Errorf("there are %d series", n)
				}
				r.inOrder("up")
				r.inOrder("slow")
				if n := strings.Count(r.log.String(), `msg="source changed"`); n != 1 {
					t.Errorf("the source changed %d times: %s", n, r.log.String())
				}
				if b.federated < 7*6-2 {
					t.Errorf("the other replica was scraped %d times", b.federated)
				}
			})
		})
	}
}

// After a restart, the client goes on with the source that it used last. When that one is down after
// the restart, the samples of the other one follow those of the earlier process.
func TestReplicaAfterRestart(t *testing.T) {
	for _, failsAgain := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r, a, b := newReplicaRig(t)
			a.behind = 8 * time.Second
			time.AfterFunc(time.Minute, func() { a.setDown(true) })
			r.run(2 * time.Minute)
			a.setDown(false)
			b.setDown(failsAgain)
			before := a.federated
			r.run(2 * time.Minute)
			if changed := strings.Contains(r.log.String(), `msg="source changed"`); changed != failsAgain {
				t.Errorf("replica b down %v: after the restart the log is %s", failsAgain, r.log.String())
			}
			if n := a.federated - before; (n > 1) != failsAgain { // one compares the external labels
				t.Errorf("replica b down %v: replica a was scraped %d times after the restart", failsAgain, n)
			}
			r.wantNoGap("up", 15*time.Second, 3*time.Minute)
			r.inOrder("up")
			r.inOrder("slow")
		})
	}
}

// A source whose newest sample is older than that of another one by more than minLag is left, even if
// its scrapes succeed. The samples that it does not have are there afterwards.
func TestReplicaLags(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, a, b := newReplicaRig(t)
		stopped := time.Now().Add(3 * time.Minute)
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		go func() {
			for now := range ticker.C {
				a.mu.Lock()
				a.behind = max(0, now.Sub(stopped))
				a.mu.Unlock()
				if now.Sub(stopped) > 10*time.Minute {
					return
				}
			}
		}()
		r.run(10 * time.Minute)
		if b.federated == 0 || !strings.Contains(r.log.String(), `msg="source changed"`) {
			t.Fatalf("the client did not leave the replica that lags: %s", r.log.String())
		}
		r.wantNoGap("up", 15*time.Second, 9*time.Minute)
		if n := strings.Count(r.log.String(), `msg="source changed"`); n != 1 {
			t.Errorf("the source changed %d times: %s", n, r.log.String())
		}
		time.Sleep(10 * time.Minute) // ends the goroutine
	})
}

// The clocks of replicas may differ. The times of samples are by the servers' clock all the same.
func TestReplicaClocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, a, b := newReplicaRig(t)
		b.ahead = 10 * time.Minute
		for _, p := range []*fakePrometheus{a, b} {
			p.value = func(int64) string { return "1" }
		}
		r.anyValue = true
		time.AfterFunc(3*time.Minute+time.Second, func() { a.setDown(true); b.setDown(true) })
		time.AfterFunc(6*time.Minute, func() { b.setDown(false) })
		begin := time.Now()
		r.run(10 * time.Minute)
		times := r.received()["up"]
		if last := time.UnixMilli(times[len(times)-1]); last.After(time.Now().Add(time.Second)) || last.Before(time.Now().Add(-20*time.Second)) {
			t.Errorf("at %v the newest sample is of %v", time.Since(begin), last.Sub(begin))
		}
		r.wantNoGap("up", 16*time.Second, 9*time.Minute)
	})
}

// Replicas that differ in a label that is not removed double all series, which is said at the change of
// the source. The status names the other replicas, and the time whose scrapes are missing.
func TestReplicasDiffer(t *testing.T) {
	for _, elides := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r, a, b := newReplicaRig(t)
			change := r.change
			r.change = func(cfg *ClientConfig, st *ClientReloadConfig) {
				if change(cfg, st); !elides {
					st.NewCleaner = func() *ClientCleaner { return &ClientCleaner{} }
				}
			}
			b.api = func(*http.Request) *http.Response { return respond(503, nil, "") }
			time.AfterFunc(time.Minute, func() { a.setDown(true); b.setDown(true) })
			time.AfterFunc(2*time.Minute, func() { b.setDown(false) })
			r.run(5 * time.Minute)
			if n, want := strings.Count(r.log.String(), "consumers see all series twice"), map[bool]int{false: 1}[elides]; n != want {
				t.Errorf("with --elide-label %v, the log says %d times that series are doubled, want %d: %s", elides, n, want, r.log.String())
			}
			st := r.client.Status()
			if st.Source.URL != "http://replica.example/federate" || fmt.Sprint(st.Source.Others) != "[http://source.example/federate]" || st.Source.Missing < 50 || st.Source.Missing > 80 {
				t.Errorf("the status of the source is %+v", st.Source)
			}
		})
	}
}

// If a replica answers no queries, its gaps are filled from the next replica as soon as the client uses
// that one.
func TestReplicaWithoutAPI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, a, _ := newReplicaRig(t)
		a.api = func(*http.Request) *http.Response {
			return respond(403, http.Header{"Content-Type": {"text/html"}}, "<html>no</html>")
		}
		r.run(time.Minute)
		time.Sleep(5 * time.Minute)
		time.AfterFunc(time.Minute, func() { a.setDown(true) })
		r.run(2 * time.Minute)
		r.wantNoGap("up", 16*time.Second, 7*time.Minute)
	})
}

// If the client and the replica that it uses were down together, the samples of that time come from the
// other replica, also if the clocks of the replicas differ.
func TestReplicaDownWithClient(t *testing.T) {
	for _, ahead := range []time.Duration{0, 3 * time.Minute} {
		for _, length := range []time.Duration{20 * time.Second, 25 * time.Minute} {
			t.Run(fmt.Sprint(length, ", clock ahead ", ahead), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r, a, b := newReplicaRig(t)
					b.ahead = ahead
					b.value = func(ms int64) string { return a.value(ms - ahead.Milliseconds()) }
					a.hole = [2]time.Duration{3*time.Minute + 1*time.Second, 3*time.Minute + length}
					r.run(3 * time.Minute)
					time.Sleep(length + time.Minute)
					r.run(3 * time.Minute)
					r.wantNoGap("up", 15*time.Second, 6*time.Minute+length)
					if n := len(r.received()); n != 2 {
						t.Errorf("there are %d series", n)
					}
					if strings.Contains(r.log.String(), "source changed") {
						t.Errorf("the source changed: %s", r.log.String())
					}
				})
			})
		}
	}
}

// Replicas that scrape a slow target at different times are ahead of each other by turns. The client
// stays on one.
func TestReplicasWithSlowTargets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, a, b := newReplicaRig(t)
		a.series = []fakeSeries{{labels: map[string]string{"__name__": "slow"}, step: 4 * time.Minute}}
		b.series = []fakeSeries{{labels: map[string]string{"__name__": "slow"}, step: 4 * time.Minute, begin: -8*time.Minute + 2*time.Minute}}
		r.run(time.Hour)
		if strings.Contains(r.log.String(), "source changed") {
			t.Errorf("the source changed: %s", r.log.String())
		}
	})
}

// If the source changes while a slice is fetched, to a source whose clock is behind, nothing is missing.
func TestReplicaChangesDuringFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, a, b := newReplicaRig(t)
		r.anyValue = true
		b.ahead = -5 * time.Minute
		change, queries := r.change, 0
		r.change = func(cfg *ClientConfig, st *ClientReloadConfig) {
			change(cfg, st)
			next := cfg.FromClient.Transport
			cfg.FromClient = &http.Client{Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
				resp, err := next.RoundTrip(req)
				if strings.Contains(req.URL.Query().Get("query"), "[") && req.URL.Host != "replica.example" {
					if queries++; queries == 2 {
						a.setDown(true)
						time.Sleep(15 * time.Second)
					}
				}
				return resp, err
			})}
		}
		r.run(time.Minute)
		time.Sleep(15 * time.Minute)
		r.run(3 * time.Minute)
		r.wantNoGap("up", 16*time.Second, 8*time.Minute)
	})
}
