package main

// No sample that a site pushes, of whatever age, makes a scrape of the central Prometheus fail, and
// with it the samples of other sites. With a real server and a real Prometheus; run by make
// test-outage.

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// agesTight is the shortest window that goes with the default --retention of 2h: longer
// by a minute that samples may be ahead, and 40 s to scrape and append.
const agesTight = "2h1m40s"

// ages are of all kinds around the limits. A negative one is ahead of now.
func ages(now time.Time) []time.Duration {
	seconds := []int{-61, -60, -59, 0, 7000, 7100, 7150, 7190, 7195, 7198, 7199, 7200, 7201, 3 * 3600, 25 * 3600, int(now.Unix())}
	for m := 49; m <= 61; m++ {
		seconds = append(seconds, m*60)
	}
	slices.Sort(seconds)
	all := make([]time.Duration, len(seconds))
	for i, s := range seconds {
		all[i] = time.Duration(s) * time.Second
	}
	return all
}

// agedSample is a sample that the bad site pushed.
type agedSample struct {
	name, k string
	t       int64
	age     time.Duration // when it was pushed
}

// v is the sample's value. It follows from the time, so that another of the same time
// is no conflict.
func (s agedSample) v() float64 { return float64(s.t % 1000003) }

// agesSite pushes samples of all ages.
type agesSite struct {
	pusher *outagePusher

	mu     sync.Mutex // guards the rest
	pushed []agedSample
}

// push pushes samples of some ages at once: of series that are new, of a series for each
// age, and of one series for all ages.
func (s *agesSite) push(how string, round int, ages func(now time.Time) []time.Duration) {
	now := time.Now()
	var samples []agedSample
	var text []byte
	for _, age := range ages(now) {
		t := now.Add(-age).UnixMilli()
		samples = append(samples,
			agedSample{"bad_new", fmt.Sprintf("%s %v %d", how, age.Seconds(), round), t, age},
			agedSample{"bad_age", fmt.Sprintf("%s %v", how, age.Seconds()), t, age},
			agedSample{"bad_all", how, t, age})
	}
	for _, x := range samples {
		text = fmt.Appendf(text, "%s{k=\"%s\"} %v %d\n", x.name, x.k, x.v(), x.t)
	}
	s.pusher.push("bad", text)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pushed = append(s.pushed, samples...)
}

// round pushes all ages in one push, and each in its own.
func (s *agesSite) round(n int) {
	s.push("together", n, ages)
	for i := range ages(time.Now()) {
		s.push("alone", n, func(now time.Time) []time.Duration { return ages(now)[i : i+1] })
	}
}

func (s *agesSite) all() []agedSample {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.pushed)
}

// agesDiff compares what a Prometheus has with what the bad site pushed.
type agesDiff struct {
	samples, missing int // that it must have
	more             int // that it may have
	never            int // that it has and that no server may serve
	twice            int
}

// compareAges compares by series and time: two ages are of one time if they were pushed
// at different times.
func compareAges(p *outagePrometheus, pushed []agedSample, must, may func(agedSample) bool) (d agesDiff, err error) {
	type key struct {
		name, k string
		t       int64
	}
	byKey := map[key][]agedSample{}
	for _, s := range pushed {
		byKey[key{s.name, s.k, s.t}] = append(byKey[key{s.name, s.k, s.t}], s)
	}
	got := map[string]map[string]map[int64]float64{}
	for _, name := range []string{"bad_new", "bad_age", "bad_all"} {
		var twice int
		if got[name], twice, err = p.query(name+`{_id="bad"}[3h]`, "k"); err != nil {
			return d, err
		}
		d.twice += twice
	}
	for k, samples := range byKey {
		v, has := got[k.name][k.k][k.t]
		switch has = has && v == samples[0].v(); {
		case slices.ContainsFunc(samples, must) && has:
			d.samples++
		case slices.ContainsFunc(samples, must):
			d.missing++
		case slices.ContainsFunc(samples, may) && has:
			d.more++
		case has:
			d.never++
		}
	}
	return d, nil
}

// Samples of every age that a site can push cost no other site a sample, with the window
// and without one, and none that is held in an outage until it outlived --retention.
func TestOutageAges(t *testing.T) {
	outage, more := 45*time.Second, 5*time.Second
	if outageForm(t) {
		more = time.Minute
	}
	_, internal, pusher, _ := outageServer(t)
	// The head's newest time is a minute ahead, as far as samples of the server may take it.
	ahead := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "ahead 1 %d\n", time.Now().Add(time.Minute).UnixMilli())
	}))
	defer ahead.Close()
	job := "- {job_name: ahead, scrape_interval: 1s, scrape_timeout: 1s, static_configs: [{targets: ['" + ahead.Listener.Addr().String() + "']}]}"
	proxy := newOutageProxy(t, internal)
	within := func(least, most time.Duration) func(agedSample) bool {
		return func(s agedSample) bool { return s.age >= least && s.age <= most }
	}
	inOrder := within(-time.Minute, 50*time.Minute)
	// Older ones may outlive --retention before they are served.
	inWindow := within(-time.Minute, 7100*time.Second)
	consumers := []struct {
		*outagePrometheus
		must func(agedSample) bool // that this one has of the bad site
	}{
		{newOutagePrometheus(t, internal, "with", outageWindow, outageTimeout, job), inWindow},
		{newOutagePrometheus(t, internal, "without", "", outageTimeout, job), func(s agedSample) bool { return s.name != "bad_all" && inOrder(s) }},
		{newOutagePrometheus(t, proxy.addr(), "tight", agesTight, outageTimeout, job), inWindow},
	}
	for _, p := range consumers {
		p.start()
	}
	for _, p := range consumers {
		eventually(t, "the head's newest time", func() bool {
			got, _, err := p.query("ahead[5m]", "")
			return err == nil && len(got[""]) > 0
		})
	}

	const series = 20
	bad := &agesSite{pusher: pusher}
	var good []outageScrape
	stop := make(chan struct{})
	var sites sync.WaitGroup
	end := sync.OnceFunc(func() { close(stop); sites.Wait() })
	defer end()
	everySecond := func(do func(n int)) {
		sites.Go(func() {
			tick := time.NewTicker(time.Second)
			defer tick.Stop()
			for n := 1; ; n++ {
				do(n)
				select {
				case <-stop:
					return
				case <-tick.C:
				}
			}
		})
	}
	everySecond(func(n int) {
		s := outageScrape{t: time.Now().UnixMilli(), v: float64(n)}
		var text []byte
		for k := range series {
			text = fmt.Appendf(text, "good_total{k=\"%d\"} %v %d\n", k, s.v, s.t)
		}
		pusher.push("good", text)
		good = append(good, s)
	})
	everySecond(bad.round)
	for _, p := range consumers {
		eventually(t, "the first scrapes", func() bool {
			got, _, err := p.query(`up{job="federate"}[5m]`, "job")
			return err == nil && len(got["federate"]) > 1
		})
	}
	time.Sleep(more)
	cut := time.Now()
	proxy.set("hold")
	time.Sleep(outage / 3)
	proxy.set("refuse")
	time.Sleep(outage - outage/3)
	proxy.set("")
	healed := time.Now()
	time.Sleep(more)
	end()

	pushed := bad.all()
	// At the limits themselves it depends on how long a push takes.
	may := within(-61*time.Second, 2*time.Hour)
	for _, p := range consumers {
		var d outageDiff
		var aged agesDiff
		for deadline := time.Now().Add(outagePatience / 4); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
			got, n, err := p.query(`good_total{_id="good"}[3h]`, "k")
			if err != nil {
				continue
			}
			d = compareOutage(good, series, got, n)
			if aged, err = compareAges(p.outagePrometheus, pushed, p.must, may); err == nil && d.whole() && aged.missing == 0 {
				break
			}
		}
		failed, scrapes := 0, 0
		up, _, err := p.query(`up{job="federate"}[3h]`, "job")
		if err != nil {
			t.Error(err)
		}
		for at, v := range up["federate"] {
			// A scrape that began before the cut may have been cut in the middle.
			if p.consumer == "tight" && at > cut.Add(-outageTimeout).UnixMilli() && at <= healed.UnixMilli() {
				continue
			}
			if scrapes++; v != 1 {
				failed++
			}
		}
		_, lines := p.log()
		if p.consumer == "without" { // it says how many it drops, and that is all
			lines = slices.DeleteFunc(lines, func(line string) bool { return strings.Contains(line, "too old or are too far") })
		}
		fmt.Printf("ages: %-8s scrapes %d, failed %d; well-behaved site: samples %d, missing %d, duplicate %d, wrong %d; bad site: samples %d, missing %d, duplicate %d, wrong (older than --retention) %d, and %d more\n",
			p.consumer+",", scrapes, failed, d.samples, d.missing, d.twice, d.wrong, aged.samples, aged.missing, aged.twice, aged.never, aged.more)
		if failed > 0 || scrapes == 0 || !d.whole() || aged.samples == 0 || aged.missing+aged.twice+aged.never > 0 {
			t.Errorf("%s: %d of %d scrapes failed; well-behaved site %+v, bad site %+v", p.consumer, failed, scrapes, d, aged)
		}
		if len(lines) > 0 {
			t.Errorf("%s: Prometheus said\n%s", p.consumer, strings.Join(lines, ""))
		}
	}
}
