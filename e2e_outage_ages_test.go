package main

// A test with samples of every age. Prometheus fails a whole scrape for one sample that is too old
// or too new, which would cost the samples of other sites. So no sample that a site pushes may
// cause that. The test needs a real Prometheus, and "make test-outage" runs it.

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

// agesTight is an out_of_order_time_window that barely suffices for the default --retention of 2h.
// It is one minute longer than 2h because samples may be one minute ahead, and another 40 s longer
// for the time that a scrape and the appending take.
const agesTight = "2h1m40s"

// ages returns ages of samples around all limits: one minute ahead (a negative age), --retention,
// and the 50 minutes up to which Prometheus accepts late samples without out_of_order_time_window.
// Some are older, back to the Unix epoch.
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

// agedSample is a sample that the badly behaved site pushed.
type agedSample struct {
	name, k string        // metric name and label k
	t       int64         // ms since the epoch
	age     time.Duration // age of the sample when it was pushed
}

// v returns the value of the sample. It depends only on the time, so that two samples of one series
// with the same time do not conflict.
func (s agedSample) v() float64 { return float64(s.t % 1000003) }

// agesSite is the badly behaved site: it pushes samples of all ages.
type agesSite struct {
	pusher *outagePusher

	mu     sync.Mutex // guards pushed
	pushed []agedSample
}

// push pushes three samples of each age in one push. The sample of the metric bad_new belongs to a
// new series in every round. The sample of bad_age belongs to one series for each age, and the
// sample of bad_all to one series for all ages. The parameter how names the kind of push; different
// kinds push different series.
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

// round pushes all ages in one push, and then each age in its own push.
func (s *agesSite) round(n int) {
	s.push("together", n, ages)
	for i := range ages(time.Now()) {
		s.push("alone", n, func(now time.Time) []time.Duration { return ages(now)[i : i+1] })
	}
}

// all returns all samples that the site has pushed.
func (s *agesSite) all() []agedSample {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.pushed)
}

// agesDiff compares the samples in one Prometheus with the samples that the badly behaved site
// pushed.
type agesDiff struct {
	samples int // number of samples that Prometheus must have and has
	missing int // number of samples that Prometheus must have and lacks
	more    int // number of samples that Prometheus has but need not have
	never   int // number of samples that Prometheus has, although no server may serve them
	twice   int // number of samples that Prometheus has twice
}

// compareAges compares the pushed samples with the samples in Prometheus p. The function must
// selects the samples that p has to have, and the function may selects the samples that p is
// allowed to have. Pushed samples with the same series and time count as one sample, which can have
// several ages, because it was pushed at different times.
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

// agesConsumer is a Prometheus that scrapes the server as a consumer.
type agesConsumer struct {
	*outagePrometheus
	must func(agedSample) bool // selects the samples of the badly behaved site that this Prometheus must have
}

// agedBetween returns a function that reports whether the age of a sample is from least to most.
func agedBetween(least, most time.Duration) func(agedSample) bool {
	return func(s agedSample) bool { return s.age >= least && s.age <= most }
}

// newAgesConsumers starts three Prometheus with different out_of_order_time_window: the recommended
// window, no window, and agesTight. The last Prometheus scrapes through the proxy. Each Prometheus
// also scrapes a target whose samples are one minute ahead, so that the newest time in Prometheus
// is as far ahead as the server allows.
func newAgesConsumers(t *testing.T, internal string, proxy *outageProxy) []agesConsumer {
	ahead := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "ahead 1 %d\n", time.Now().Add(time.Minute).UnixMilli())
	}))
	t.Cleanup(ahead.Close)
	job := "- {job_name: ahead, scrape_interval: 1s, scrape_timeout: 1s, static_configs: [{targets: ['" + ahead.Listener.Addr().String() + "']}]}"
	inOrder := agedBetween(-time.Minute, 50*time.Minute)
	// The greatest age is below --retention (7200 s), because a sample must still be younger than
	// --retention when it is served.
	inWindow := agedBetween(-time.Minute, 7100*time.Second)
	consumers := []agesConsumer{
		{newOutagePrometheus(t, internal, "with", outageWindow, outageTimeout, job), inWindow},
		{newOutagePrometheus(t, internal, "without", "", outageTimeout, job), func(s agedSample) bool { return s.name != "bad_all" && inOrder(s) }},
		{newOutagePrometheus(t, proxy.addr(), "tight", agesTight, outageTimeout, job), inWindow},
	}
	for _, p := range consumers {
		p.start()
	}
	for _, p := range consumers {
		eventually(t, "Prometheus has a sample that is one minute ahead", func() bool {
			got, _, err := p.query("ahead[5m]", "")
			return err == nil && len(got[""]) > 0
		})
	}
	return consumers
}

// agesLoad is a good site and a badly behaved site. The good site pushes current samples every
// second. The badly behaved site pushes a round of all ages every second.
type agesLoad struct {
	series int            // number of series of the good site
	good   []outageScrape // pushes of the good site; must not be read before end returns
	bad    *agesSite
	end    func() // stops both sites and waits until they have ended
}

func startAgesLoad(t *testing.T, pusher *outagePusher) *agesLoad {
	l := &agesLoad{series: 20, bad: &agesSite{pusher: pusher}}
	stop := make(chan struct{})
	var sites sync.WaitGroup
	l.end = sync.OnceFunc(func() { close(stop); sites.Wait() })
	t.Cleanup(l.end)
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
		for k := range l.series {
			text = fmt.Appendf(text, "good_total{k=\"%d\"} %v %d\n", k, s.v, s.t)
		}
		pusher.push("good", text)
		l.good = append(l.good, s)
	})
	everySecond(l.bad.round)
	return l
}

// check waits until Prometheus p has all samples of the good site and the samples of the badly
// behaved site that p must have. It prints the result. It reports an error if samples are missing,
// duplicate or too old, or if a scrape failed outside the outage from cut to healed.
func (p agesConsumer) check(load *agesLoad, cut, healed time.Time) {
	pushed := load.bad.all()
	// The function may also selects samples exactly at a limit, because the duration of their push
	// decides whether they are served.
	may := agedBetween(-61*time.Second, 2*time.Hour)
	var d outageDiff
	var aged agesDiff
	for deadline := time.Now().Add(outagePatience / 4); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		got, n, err := p.query(`good_total{_id="good"}[3h]`, "k")
		if err != nil {
			continue
		}
		d = compareOutage(load.good, load.series, got, n)
		if aged, err = compareAges(p.outagePrometheus, pushed, p.must, may); err == nil && d.whole() && aged.missing == 0 {
			break
		}
	}
	failed, scrapes := 0, 0
	up, _, err := p.query(`up{job="federate"}[3h]`, "job")
	if err != nil {
		p.t.Errorf("querying the scrapes of Prometheus %s: %v", p.consumer, err)
	}
	for at, v := range up["federate"] {
		// Scrapes through the proxy may fail during the outage, or if the cut of the network
		// interrupted them.
		if p.consumer == "tight" && at > cut.Add(-outageTimeout).UnixMilli() && at <= healed.UnixMilli() {
			continue
		}
		if scrapes++; v != 1 {
			failed++
		}
	}
	_, lines := p.log()
	// Without an out-of-order window, Prometheus drops some samples as too old and logs their
	// number, which is no fault.
	if p.consumer == "without" {
		lines = slices.DeleteFunc(lines, func(line string) bool { return strings.Contains(line, "too old or are too far") })
	}
	fmt.Printf("ages: %-8s scrapes %d, failed %d; well-behaved site: samples %d, missing %d, duplicate %d, wrong %d; bad site: samples %d, missing %d, duplicate %d, wrong (older than --retention) %d, and %d more\n",
		p.consumer+",", scrapes, failed, d.samples, d.missing, d.twice, d.wrong, aged.samples, aged.missing, aged.twice, aged.never, aged.more)
	if failed > 0 || scrapes == 0 || !d.whole() || aged.samples == 0 || aged.missing+aged.twice+aged.never > 0 {
		p.t.Errorf("Prometheus %s: %d of %d scrapes failed; well-behaved site %+v, bad site %+v", p.consumer, failed, scrapes, d, aged)
	}
	if len(lines) > 0 {
		p.t.Errorf("Prometheus %s: faults in its log:\n%s", p.consumer, strings.Join(lines, ""))
	}
}

// A site can push samples of every age without making a scrape of Prometheus fail or costing
// another site a sample. This holds with an out-of-order window and without one. It also holds
// after an outage in which samples have become older than --retention.
func TestOutageAges(t *testing.T) {
	outage, more := 45*time.Second, 5*time.Second
	if outageForm(t) {
		more = time.Minute
	}
	_, internal, pusher, _ := outageServer(t)
	proxy := newOutageProxy(t, internal)
	consumers := newAgesConsumers(t, internal, proxy)
	load := startAgesLoad(t, pusher)
	for _, p := range consumers {
		eventually(t, "the first scrapes of the server", func() bool {
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
	load.end()
	for _, p := range consumers {
		p.check(load, cut, healed)
	}
}
