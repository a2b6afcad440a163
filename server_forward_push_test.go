package main

// Tests of pushes that a client sends to another server than the owner of its site, with whole
// servers and stores: what the client is answered, which server stores the samples, and which
// timestamps the samples get. The "receiver" is the server that the client pushes to.

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

// If the owner answers a forwarded push, the client gets the same answer as for a push to the
// owner, and the receiver stores no samples. If the owner refuses the push, or drops all its
// samples as untimely (too old or in the future), the receiver shows push_failure_time_seconds for
// the site.
func TestForwardedPushAnswer(t *testing.T) {
	large := strings.Repeat("# a comment counts too\n", 80)
	for _, c := range []struct {
		name    string
		owner   func(b *ringServer) // prepares the owner b before the push; nil: no preparation
		body    string
		header  []string
		status  int
		retry   string // Retry-After header of the answer; "" if there is none
		samples int    // number of samples of the site that the owner stores
	}{
		{"accepted", nil, "m 1\nn 2\n", nil, 200, "", 2},
		{"gzip", nil, string(gzipped([]byte("m 1\n"))), []string{"Content-Encoding", "gzip"}, 200, "", 1},
		{"OpenMetrics", nil, "# TYPE c counter\nc_total 1 # {t=\"x\"} 1\n# EOF\n", []string{"Content-Type", omType}, 200, "", 1},
		{"scrape named", nil, "m 1\n", []string{SpoolHeader, "00000000000000ab 7"}, 200, "", 1},
		{"question", nil, "", []string{SpoolHeader, "00000000000000ab"}, 200, "", 0},
		{"untimely", nil, "m 1 5\n", nil, 200, "", 0},
		{"malformed", nil, "m{ 1\n", nil, 400, "", 0},
		{"too large", func(b *ringServer) { b.server.cfg.LimitBytes = 1 << 10 }, large, nil, 413, "", 0},
		{"too many series", func(b *ringServer) { b.store.cfg.LimitSeries = 1 }, "m 1\nn 1\n", nil, 200, "", 1},
		{"too fast", func(b *ringServer) {
			b.server.sites = NewSitePushLimiter(7*time.Second, 1<<20)
			for n := range 2 {
				for range rateBurst {
					id := ownedBy(b.t, b.node.Forwarder, "b", n)
					b.server.sites.AcquirePush(id, b.now())
					b.server.sites.ReleasePush(id)
				}
			}
		}, "m 1\n", nil, 429, "7", 0},
		{"busy", func(b *ringServer) {
			for range maxUploads {
				b.server.uploads.TryAcquire()
			}
		}, "m 1\n", nil, 503, "5", 0},
		{"full", func(b *ringServer) { b.store.cfg.LimitSamples = 1 }, "m 1\nn 1\n", nil, 503, "60", 0},
		{"clock in doubt", func(b *ringServer) {
			b.store.cfg.NowInterval = func() PresentTimeRange { return PresentTimeRange{b.now(), b.now().Add(3 * time.Hour)} }
		}, "m 1\n", nil, 503, "30", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			ring := newRingServers(t, 2)
			a, b := ring[0], ring[1]
			if c.owner != nil {
				c.owner(b)
			}
			push := func(to *ringServer, id string) srvAnswer {
				return to.upload(to.token(KindUpload, id), []byte(c.body), c.header...)
			}
			direct, id := push(b, ownedBy(t, b.node.Forwarder, "b", 1)), ownedBy(t, b.node.Forwarder, "b")
			got := push(a, id)
			if got.status != c.status || got.header.Get("Retry-After") != c.retry {
				t.Errorf("answered %d %v %s, want %d and Retry-After %q", got.status, got.header, got.body, c.status, c.retry)
			}
			if got.status != direct.status || got.body != direct.body || got.header.Get("Retry-After") != direct.header.Get("Retry-After") ||
				got.header.Get("Content-Type") != direct.header.Get("Content-Type") {
				t.Errorf("answered:\n%d %v %s\nbut the owner answers a direct push:\n%d %v %s", got.status, got.header, got.body, direct.status, direct.header, direct.body)
			}
			if a.samples(id) != 0 || b.samples(id) != c.samples {
				t.Errorf("the receiver holds %d samples and the owner %d, want 0 and %d", a.samples(id), b.samples(id), c.samples)
			}
			if first := strings.Contains(b.log.String(), `msg="first push of site" cluster_id=`+id+` remote=127.0.0.1:`); first != (c.samples > 0) {
				t.Errorf("the owner logs the first push of the site with the client's address: %t, want %t", first, c.samples > 0)
			}
			failed := c.status != 200 || c.name == "untimely"
			if shown := strings.Contains(a.held(id, ""), PushFailureTimeName+`{_id="`+id+`",instance="",job="",server="a"}`); shown != failed {
				t.Errorf("the receiver shows a failure of the push: %t, want %t", shown, failed)
			}
			if n := a.node.sentTotal.Value("accepted") + a.node.sentTotal.Value("refused"); n != 1 {
				t.Errorf("%v pushes are counted as answered by the owner, want 1", n)
			}
			if n := a.server.pushesTotal.Value("accepted"); n != map[bool]float64{true: 1}[c.status == 200] {
				t.Errorf("the receiver counts %v pushes as accepted", n)
			}
		})
	}
}

// If all samples of a forwarded push are untimely (too old or in the future) and the clocks of both
// servers agree, only the receiver shows push_failure_time_seconds for the site. The owner, which
// dropped the samples, logs the warning.
func TestUntimelyForwardedPush(t *testing.T) {
	ring := newRingServers(t, 2)
	a, b := ring[0], ring[1]
	id := ownedBy(t, a.node.Forwarder, "b")
	if got := a.accepted(a.push(id, "up 1 5\n")); got.Dropped["too_old"] != 1 || got.Hint == "" || got.Server != "b" {
		t.Errorf("answered %+v", got)
	}
	if got := a.held(id, ""); !strings.Contains(got, PushFailureTimeName+"{") {
		t.Errorf("the receiver does not show the failure:\n%s", got)
	}
	if got := b.held(id, ""); strings.Contains(got, PushFailureTimeName+"{") {
		t.Errorf("the owner shows the failure:\n%s", got)
	}
	if log := b.log.String(); !strings.Contains(log, "all samples of a push were dropped because of their timestamps") {
		t.Errorf("the owner does not log the warning:\n%s", log)
	}
}

// The receiver handles a push itself, as if it were the owner, if the owner is down, is not ready,
// or would drop all samples as untimely while the clocks of the two servers differ by more than a
// minute. A sample without a timestamp gets the time at which the receiver got the push. The owner
// never forwards a forwarded push again.
func TestForwardedPushKept(t *testing.T) {
	ms := testNow.UnixMilli()
	timed := fmt.Sprintf("m 1 %d\n", ms)
	ownerClock := func(d time.Duration) func(b *ringServer) {
		return func(b *ringServer) { b.clock.Store(int64(d)) }
	}
	for _, c := range []struct {
		name  string
		owner func(b *ringServer) // prepares the owner b before the push; nil: no preparation
		body  string
		taker string  // name of the server that answers 200 to the push; "" if the push is refused
		times []int64 // timestamps of the stored samples, in ms after testNow
	}{
		{"owner is well", nil, "m 1\n", "b", []int64{0}},
		{"owner is down", func(b *ringServer) { b.node.down.Store(true) }, "m 1\n", "a", []int64{0}},
		{"owner is not ready", func(b *ringServer) { b.server.SetReady(false) }, "m 1\n", "a", []int64{0}},
		{"owner's clock is 30 s ahead", ownerClock(30 * time.Second), "m 1\n", "b", []int64{0}},
		{"owner's clock is ahead by less than retention", ownerClock(time.Hour), "m 1\n", "b", []int64{0}},
		{"owner's clock is ahead by more than retention", ownerClock(3 * time.Hour), "m 1\n", "a", []int64{0}},
		{"owner's clock is ahead by more than retention, timestamps", ownerClock(3 * time.Hour), timed, "a", []int64{0}},
		{"owner's clock is behind", ownerClock(-time.Hour), timed, "a", []int64{0}},
		{"owner's clock is ahead by more than retention, one sample is timely there", ownerClock(3 * time.Hour),
			timed + fmt.Sprintf("n 1 %d\n", ms+3*3600_000), "b", []int64{3 * 3600_000}},
		{"untimely for both, clocks agree", nil, "m 1 5\n", "b", nil},
		{"untimely for both, clocks differ", ownerClock(3 * time.Hour), "m 1 5\n", "a", nil},
		{"malformed, clocks differ", ownerClock(3 * time.Hour), "m{\n", "", nil},
		{"each server takes the other one for the owner", func(b *ringServer) {
			b.node.SetView(&RingView{Ring: NewRing([]Claim{{Slot: 0, Lamport: 1, Name: "a"}}, 0), Members: b.node.View().Members})
		}, "m 1\n", "b", []int64{0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ring := newRingServers(t, 2)
			a, b := ring[0], ring[1]
			id := ownedBy(t, a.node.Forwarder, "b")
			if c.owner != nil {
				c.owner(b)
			}
			got := a.push(id, c.body)
			if c.taker == "" {
				if got.status != 400 || a.samples(id)+b.samples(id) > 0 {
					t.Errorf("answered %d %s, want 400 and no sample stored", got.status, got.body)
				}
				return
			}
			if answer := a.accepted(got); answer.Server != c.taker {
				t.Errorf("stored by %q, want %q: %s", answer.Server, c.taker, got.body)
			}
			for _, r := range ring {
				want := c.times
				if r.server.cfg.Name != c.taker {
					want = nil
				}
				if times := r.times(id); !slices.Equal(times, want) {
					t.Errorf("%s holds samples of %v ms, want %v", r.server.cfg.Name, times, want)
				}
			}
			if n := a.node.receivedTotal.Value("accepted"); n != 0 {
				t.Errorf("the receiver got %v pushes back, want 0", n)
			}
		})
	}
}

// If the owner stores a push but its answer is lost, the receiver stores the push too. Both servers
// then serve the same samples with the same timestamps, so that a consumer keeps each sample only
// once.
func TestForwardedPushAnswerLost(t *testing.T) {
	ms := testNow.UnixMilli()
	ring := newRingServers(t, 2)
	a, b := ring[0], ring[1]
	b.clock.Store(int64(20 * time.Second))
	a.node.cfg.Client = &http.Client{Transport: loseAnswer{http.DefaultTransport, func() { a.clock.Store(int64(5 * time.Second)) }}}
	id := ownedBy(t, a.node.Forwarder, "b")
	if answer := a.accepted(a.push(id, fmt.Sprintf("m 1\nn 2 %d\n", ms-60_000))); answer.Server != "a" || answer.Accepted != 2 {
		t.Errorf("answered %+v, want 2 samples accepted by a", answer)
	}
	want := fmt.Sprintf("m{_id=\"%s\",instance=\"\",job=\"\"} 1 %d\nn{_id=\"%[1]s\",instance=\"\",job=\"\"} 2 %[3]d\n", id, ms, ms-60_000)
	for _, r := range ring {
		var got []string
		for line := range strings.Lines(r.federate("consumer=c", "")) {
			if strings.HasPrefix(line, "m{") || strings.HasPrefix(line, "n{") {
				got = append(got, line)
			}
		}
		slices.Sort(got)
		if text := strings.Join(got, ""); text != want {
			t.Errorf("%s serves\n%s\nwant\n%s", r.node.cfg.Name, text, want)
		}
	}
}

// If the owner of a site dies before it answers a forwarded push, the receiver sends the push to
// the next owner of the site, or stores it if it is itself the next owner. A sample without a
// timestamp gets the time at which the receiver got the push.
func TestForwardedPushOwnerDies(t *testing.T) {
	for _, left := range []string{"ac", "a"} { // names of the members that are still in the ring after the owner b has died
		ring := newRingServers(t, 3)
		a := ring[0]
		asked := make(chan struct{}, 1)
		ring[1].node.store = func(ctx context.Context, _ *pushRequest, _ []byte) (*pushResponse, error) {
			asked <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		next := &RingView{Members: map[string]RingMember{}}
		var claims []Claim
		for i, r := range ring {
			if name := r.node.cfg.Name; strings.Contains(left, name) {
				claims = append(claims, Claim{Slot: i, Lamport: uint64(i + 1), Name: name})
				next.Members[name] = a.node.View().Members[name]
			}
		}
		next.Ring = NewRing(claims, 3)
		id, heir := "", left[len(left)-1:]
		for n := 0; ; n++ {
			id = ownedBy(t, a.node.Forwarder, "b", n)
			if name, _ := next.Ring.Owner(SiteKey(id)); name == heir {
				break
			}
		}
		answered := make(chan srvAnswer, 1)
		go func() { answered <- a.push(id, "m 1\n") }()
		<-asked
		for _, r := range ring {
			r.clock.Store(int64(5 * time.Second))
		}
		a.node.SetView(next)
		got := <-answered
		if answer := a.accepted(got); answer.Server != heir || answer.Accepted != 1 {
			t.Errorf("with %s left: answered %s, want 1 sample accepted by %s", left, got.body, heir)
		}
		for _, r := range ring {
			want := []int64(nil)
			if r.node.cfg.Name == heir {
				want = []int64{0}
			}
			if times := r.times(id); !slices.Equal(times, want) {
				t.Errorf("with %s left: %s holds samples of %v ms, want %v", left, r.node.cfg.Name, times, want)
			}
		}
		if n := a.node.sentTotal.Value("kept"); n != 0 {
			t.Errorf("with %s left: %v pushes are counted as kept for an owner, want 0", left, n)
		}
	}
}

// BenchmarkForwardedPush measures the CPU time that a push of 500 series costs if the client sends
// it to another server than the owner. It counts the CPU time of both servers and of the client
// together. "ratio" is this time divided by the CPU time of the same push sent directly to the
// owner. All requests use real loopback connections.
func BenchmarkForwardedPush(b *testing.B) {
	ring := newRingServers(b, 2, func(s *StoreConfig, c *ServerConfig) {
		s.FS, s.Dir, s.LimitSeries, s.LimitSamples, s.LimitSites = nil, "", 20_000, 500_000_000, 100_000
		c.LimitBytes, c.RateInterval = 1<<20, 0
	})
	for _, r := range ring {
		// Each member serves its handler directly here, because the server of forwardNode also
		// records every request, which would cost CPU time.
		srv := httptest.NewServer(r.node.receiver())
		b.Cleanup(srv.Close)
		r.node.url = srv.URL
	}
	join(1, ring[0].node, ring[1].node)
	const series, bodies = 500, 32
	pushes := make([][]byte, bodies)
	for n := range pushes {
		var text bytes.Buffer
		for i := range series {
			fmt.Fprintf(&text, "node_subsystem_%d_seconds_total{instance=\"10.1.2.3:9100\",job=\"node-exporter\",namespace=\"monitoring\",device=\"eth%d\",mode=\"idle\"} %v %d\n",
				i/10, i, float64(i)*1.5+float64(n), testNow.UnixMilli()-int64(n)*15_000)
		}
		pushes[n] = gzipped(text.Bytes())
	}
	client := NewHTTPClient(nil, time.Minute, time.Second)
	site := 0
	// round sends each body once as a push to one of the servers. All pushes are for one new site,
	// which the second server owns. round returns the CPU time that the whole process used, in
	// seconds.
	round := func(to *ringServer) float64 {
		id := ownedBy(b, ring[0].node.Forwarder, "b", site)
		site++
		token := to.token(KindUpload, id)
		begin := processCPU(b).Seconds()
		for _, body := range pushes {
			req, err := http.NewRequest("POST", to.external.URL+"/upload", bytes.NewReader(body))
			if err != nil {
				b.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+token)
			req.Header.Set("Content-Encoding", "gzip")
			resp, err := client.Do(req)
			if err != nil {
				b.Fatal(err)
			}
			text, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || !bytes.Contains(text, []byte(`"accepted":500,`)) || !bytes.Contains(text, []byte(`"server":"b"`)) {
				b.Fatalf("answered %d %s: %v", resp.StatusCode, text, err)
			}
		}
		return processCPU(b).Seconds() - begin
	}
	round(ring[0])
	round(ring[1])
	var direct, forwarded float64
	rounds := 0
	for b.Loop() {
		direct += round(ring[1])
		forwarded += round(ring[0])
		rounds++
	}
	b.ReportMetric(forwarded/direct, "ratio")
	b.ReportMetric(1e6*direct/float64(rounds*bodies), "direct-cpu-us/push")
	b.ReportMetric(1e6*forwarded/float64(rounds*bodies), "forwarded-cpu-us/push")
}
