package main

// Tests of the status of a server, from its JSON. They cover pushes, refusals, sites, consumers,
// limits and the problems of each. A healthy server has no problem.

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// status returns the status that /api/status answers a query with. It checks that a decoded status
// has the same JSON as the answer, and that no list is null.
func (r *srvRig) status(query string) (st ServerStatus) {
	r.t.Helper()
	a := r.do(srvRequest{method: "GET", url: r.internal.URL + "/api/status?" + query})
	dec := json.NewDecoder(strings.NewReader(a.body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&st); err != nil || a.status != 200 || a.header.Get("Content-Type") != "application/json" {
		r.t.Fatalf("/api/status?%s was answered %d %v %s: %v", query, a.status, a.header, a.body, err)
	}
	again, err := json.Marshal(st)
	var twice ServerStatus
	if err != nil || json.Unmarshal(again, &twice) != nil || !reflect.DeepEqual(st, twice) || strings.TrimSpace(a.body) != string(again) {
		r.t.Errorf("the status\n%s became\n%s, %v", a.body, again, err)
	}
	var values any
	if err := json.Unmarshal([]byte(a.body), &values); err != nil {
		r.t.Error(err)
	}
	r.wantNoNull("status", values)
	return st
}

// wantNoNull fails the test if a JSON value contains null, except for the slot of a member.
func (r *srvRig) wantNoNull(path string, value any) {
	r.t.Helper()
	switch v := value.(type) {
	case nil:
		r.t.Errorf("%s is null", path)
	case []any:
		for i, e := range v {
			r.wantNoNull(fmt.Sprintf("%s[%d]", path, i), e)
		}
	case map[string]any:
		for k, e := range v {
			r.wantNoNull(path+"."+k, e)
		}
	}
}

// move moves the server's clock ahead by d.
func (r *srvRig) move(d time.Duration) { r.clock.Add(int64(d)) }

// wantProblems fails the test unless the status of the server has exactly these problems.
func (r *srvRig) wantProblems(when string, want ...string) {
	r.t.Helper()
	if got := r.status("").Problems; !slices.Equal(got, want) {
		r.t.Errorf("%s: the problems are %q, want %q", when, got, want)
	}
}

// newStatusRig returns a server that started an hour ago, with a site that has pushed and a consumer
// that has read the push and confirmed that it did.
func newStatusRig(t testing.TB, change ...func(*StoreConfig, *ServerConfig)) *srvRig {
	r := newSrvRig(t, change...)
	r.move(time.Hour)
	r.works()
	return r
}

// works makes the site pushes push, and the consumer scrape and confirm.
func (r *srvRig) works() {
	r.t.Helper()
	r.accepted(r.push("pushes", "up 1\n"))
	conn := &AnswerReadTracker{}
	for range 2 {
		r.scrapeOn(conn, "consumer=prom")
	}
}

// A push and a scrape show in the lists and in the history of a healthy server.
func TestStatusHealthy(t *testing.T) {
	r := newStatusRig(t)
	r.accepted(r.push("pushes", "a{x=\"1\"} 1\na{x=\"2\"} 1\nb 1\n"))
	st := r.status("site=pushes")
	if len(st.Problems) != 0 || st.NotReady != "" || st.Kind != KindServerStatus || st.Name != "s1" || !st.Now.Equal(r.now()) || !st.Started.Equal(testNow) {
		t.Errorf("the process is %+v", st.ProcessStatus)
	}
	if s := st.Sites; s.Total != 1 || s.Problems != 0 || s.Matched != 1 || len(s.Sites) != 1 {
		t.Fatalf("the sites are %+v", s)
	}
	site := SiteStatus{ID: "pushes", Owner: "s1", Series: 4, Samples: 4, LastPush: TimeOrNil(r.now()), Backlog: 3, Backlogs: []SiteBacklog{{"prom", "192.0.2.1", 3}}}
	if got := st.Sites.Sites[0]; !reflect.DeepEqual(got, site) {
		t.Errorf("the site is %+v, want %+v", got, site)
	}
	if want := (&SiteDetail{site, []FamilyCount{{"a", 2}, {"b", 1}, {"up", 1}}, 0, []Refusal{}}); !reflect.DeepEqual(st.Site, want) {
		t.Errorf("the details of the site are %+v, want %+v", st.Site, want)
	}
	if want := []ConsumerStatus{{Name: "prom", Address: "192.0.2.1", LastScrape: r.now(), Backlog: 3}}; !reflect.DeepEqual(st.Consumers, want) {
		t.Errorf("the consumers are %+v, want %+v", st.Consumers, want)
	}
	h, last := st.History, historySteps-1
	if len(h.Pushes) != historySteps || h.Pushes[last] != 2 || h.Samples[last] != 4 || h.Scrapes[last] != 2 || h.Refusals[last] != 0 || h.SlowestScrapeSeconds[last] <= 0 || h.StepSeconds != 30 {
		t.Errorf("the history is %+v", h)
	}
	used := map[string][2]float64{}
	for _, l := range st.Limits {
		used[l.Name] = [2]float64{l.Used, l.Limit}
	}
	if used["samples held"] != [2]float64{4, 100_000} || used["sites"] != [2]float64{1, 10} || used["consumers"] != [2]float64{1, MaxConsumers} || used["logs on disk"][0] == 0 {
		t.Errorf("the limits are %v", used)
	}
}

// Each kind of refused push shows in the refusals of the server and of the site, and in the history.
// One that is a failure of the site is the site's problem until the site pushes again.
func TestStatusRefusals(t *testing.T) {
	r := newStatusRig(t, func(_ *StoreConfig, c *ServerConfig) { c.RateInterval = time.Hour })
	r.accepted(r.push("bad", "up 1\n"))
	problem := "" // of the site; a refused token is no failed push, so it does not change the problem
	old := fmt.Sprintf("up 1 %d\n", testNow.Add(-24*time.Hour).UnixMilli())
	for i, c := range []struct {
		reason, text string // the text only begins with text
		failure      bool
		push         func() srvAnswer
	}{
		{"malformed", "line 1", true, func() srvAnswer { return r.push("bad", "{{{\n") }},
		{"too_large", "the body is larger than", true, func() srvAnswer { return r.push("bad", strings.Repeat("x", 5<<10)) }},
		{"unsupported", "", true, func() srvAnswer {
			return r.upload(r.token(KindUpload, "bad"), nil, "Content-Encoding", "x")
		}},
		{"timestamps", "all samples were dropped because of their timestamps", true, func() srvAnswer { return r.push("bad", old) }},
		{"kind", "token refused: it is of the wrong kind", false, func() srvAnswer {
			return r.do(srvRequest{method: "POST", url: r.external.URL + "/authorize", token: r.token(KindUpload, "bad")})
		}},
		{"expired", "token refused: it has expired", false, func() srvAnswer {
			return r.upload(r.token(KindClient, "bad", func(t *Token) { t.Expires = testNow.Unix() + 1 }), nil)
		}},
	} {
		r.move(historyStep)
		answer := c.push()
		st := r.status("site=bad")
		got := st.Refusals[0]
		if got.Reason != c.reason || !strings.HasPrefix(got.Text, c.text) || got.Text == "" || got.ClusterID != "bad" || got.Count != 1 || !got.At.Equal(r.now()) || len(st.Refusals) != i+1 {
			t.Errorf("%s: the refusals are %+v after the answer %v", c.reason, st.Refusals, answer)
		}
		if newest := st.Site.Refusals[0]; newest != got || st.Site.LastError != got.Text || len(st.Site.Refusals) != min(i+1, maxSiteRefusals) {
			t.Errorf("%s: the refusals of the site are %+v, its last error is %q", c.reason, st.Site.Refusals, st.Site.LastError)
		}
		if n := st.History.Refusals[historySteps-1]; n != 1 {
			t.Errorf("%s: the history has %d refusals", c.reason, n)
		}
		if isFailure := st.Site.LastFailure != nil && st.Site.LastFailure.Equal(r.now()); isFailure != c.failure {
			t.Errorf("%s: the last failure of the site is at %v", c.reason, st.Site.LastFailure)
		}
		if c.failure {
			problem = "its last push failed: " + got.Text
		}
		if st.Site.Problem != problem {
			t.Errorf("%s: the problem of the site is %q, want %q", c.reason, st.Site.Problem, problem)
		}
		r.wantProblems(c.reason, "1 of 2 sites need attention: bad")
	}
	r.move(time.Second)
	r.accepted(r.push("bad", "up 1\n"))
	r.works()
	r.wantProblems("after a push", []string{}...)

	for range rateBurst {
		r.push("fast", "up 1\n")
	}
	for range 3 {
		r.push("fast", "up 1\n")
	}
	st := r.status("site=fast")
	if got := st.Site.Refusals; len(got) != 1 || got[0].Reason != "rate_limited" || got[0].Count != 3 {
		t.Errorf("the refusals of a site that pushes too fast are %+v", got)
	}
	r.upload("", nil)
	r.upload("junk", nil)
	for _, want := range []Refusal{{Reason: "missing"}, {Reason: "malformed"}, {Reason: "malformed", ClusterID: "bad"}} {
		if !slices.ContainsFunc(r.status("").Refusals, func(got Refusal) bool {
			return got.Reason == want.Reason && got.ClusterID == want.ClusterID && got.Count == 1
		}) {
			t.Errorf("no refusal has the reason %s and the cluster ID %q once", want.Reason, want.ClusterID)
		}
	}
}

// Each cause has exactly the problems that the table lists, one a line. A store that is
// full of samples that every consumer has read needs none, because it evicts them.
func TestStatusProblems(t *testing.T) {
	warnings := &WarningLog{}
	withLog := func(_ *StoreConfig, c *ServerConfig) { c.Warnings = warnings }
	for _, c := range []struct {
		name   string
		change func(*StoreConfig, *ServerConfig)
		cause  func(r *srvRig)
		want   string // one problem a line
	}{
		{"not ready", nil, func(r *srvRig) { r.server.SetReady(false) }, "this server is not ready: it is stopping"},
		{"silent site", nil, func(r *srvRig) {
			r.accepted(r.push("late", "up 1\n"))
			r.move(siteIsLate + time.Second)
			r.works()
		}, "1 of 2 sites have not pushed for 10m: late"},
		{"site that never pushed", nil, func(r *srvRig) { r.server.SetIssuedTokens(issuedFor("never")) }, "1 of 2 sites have not pushed for 10m: never"},
		{"token that expires soon", nil, func(r *srvRig) {
			r.upload(r.token(KindClient, "pushes", func(t *Token) { t.Expires = r.now().Add(2 * 24 * time.Hour).Unix() }), []byte("up 1\n"))
		}, "1 of 1 sites need attention: pushes"},
		{"clock", nil, func(r *srvRig) {
			r.accepted(r.pushSpool("pushes", "up 1\n", ClockOffsetHeader, "-61000"))
		}, "1 of 1 sites need attention: pushes"},
		{"series limit", func(c *StoreConfig, _ *ServerConfig) { c.LimitSeries = 2 }, func(r *srvRig) {
			r.accepted(r.push("pushes", "a 1\nb 1\n"))
		}, "1 of 1 sites need attention: pushes"},
		{"late consumer", nil, func(r *srvRig) {
			r.move(consumerIsLate + time.Second)
			r.accepted(r.push("pushes", "up 1\n"))
		}, "consumer prom at 192.0.2.1: no scrape for 5m1s"},
		{"unconfirmed consumer", nil, func(r *srvRig) {
			r.accepted(r.push("pushes", "a 1\n"))
			for range maxUnconfirmed + 2 { // each scrape counts when the next one does not confirm it
				r.scrapeOn(&AnswerReadTracker{}, "consumer=prom")
			}
		}, "consumer prom at 192.0.2.1: its last 4 scrapes are not confirmed, so it gets the same samples again"},
		{"limit full of read samples", func(c *StoreConfig, _ *ServerConfig) { c.LimitSamples = 1 }, func(r *srvRig) {}, ""},
		{"limit full of unread samples", func(c *StoreConfig, _ *ServerConfig) { c.LimitSamples = 11 }, func(r *srvRig) {
			r.accepted(r.push("pushes", strings.Join([]string{"a 1", "b 1", "c 1", "d 1", "e 1", "f 1", "g 1", "h 1", "i 1", "j 1\n"}, "\n")))
		}, "samples held and unread: 91 % of the limit is used"},
		{"push without room", func(c *StoreConfig, _ *ServerConfig) { c.LimitSamples = 4 }, func(r *srvRig) {
			r.accepted(r.push("pushes", "a 1\nb 1\nc 1\n"))
			r.push("pushes", "d 1\ne 1\n")
			r.move(time.Minute)
		}, "1m ago, a push of pushes was not stored: the server has no room for more samples\n1 of 1 sites need attention: pushes"},
		{"full limit", func(c *StoreConfig, _ *ServerConfig) { c.LimitSites = 1 }, func(r *srvRig) {}, "sites: 100 % of the limit is used"},
		{"consumers with one name", nil, func(r *srvRig) {
			for i := range MaxConsumers - 2 { // prom itself is one more
				r.scrapeOn(&AnswerReadTracker{}, fmt.Sprintf("consumer=prom&match[]=a%d", i))
			}
		}, "consumers: 98 % of the limit is used"},
		{"full host", func(_ *StoreConfig, c *ServerConfig) {
			c.HostLimits = func() []LimitStatus {
				return []LimitStatus{{Name: "disk", Used: 95, Limit: 100}, {Name: "memory", Used: 99, Limit: 100, Informative: true}, {Name: "other", Used: 5}}
			}
		}, func(r *srvRig) {}, "disk: 95 % of the limit is used"},
		{"error in the log", withLog, func(r *srvRig) {
			warnings.add(LoggedWarning{r.now().Add(-errorIsCurrent), "ERROR", "old"})
			warnings.add(LoggedWarning{r.now(), "WARN", "warning"})
			warnings.add(LoggedWarning{r.now().Add(-2 * time.Minute), "ERROR", "cannot write"})
		}, "error 2m ago: cannot write"},
	} {
		t.Run(c.name, func(t *testing.T) {
			change := func(*StoreConfig, *ServerConfig) {}
			if c.change != nil {
				change = c.change
			}
			r := newStatusRig(t, change)
			c.cause(r)
			r.wantProblems(c.name, slices.DeleteFunc(strings.Split(c.want, "\n"), func(want string) bool { return want == "" })...)
		})
	}
}

// The status of a site joins all problems of the site. A revoked site has none.
func TestSiteProblems(t *testing.T) {
	r := newStatusRig(t, func(c *StoreConfig, _ *ServerConfig) { c.LimitSeries = 1 })
	expires := func(d time.Duration) string {
		return r.token(KindClient, "site", func(t *Token) { t.Expires = r.now().Add(d).Unix() })
	}
	want := func(when, want string) {
		t.Helper()
		if got := r.status("site=site").Site.Problem; got != want {
			t.Errorf("%s: the problem is %q, want %q", when, got, want)
		}
	}
	r.accepted(r.upload(expires(31*24*time.Hour), []byte("a 1\n")))
	want("full", "it has as many series as --limit-series allows")
	r.accepted(r.upload(expires(time.Minute), []byte("a 1\n"), ClockOffsetHeader, "90000"))
	want("clock", "its token expires in 1m; the clock of its source is off by 1m30s; it has as many series as --limit-series allows")
	r.move(siteIsLate + time.Second)
	want("silent", "no push for 10m1s; its token expired 9m1s ago; it has as many series as --limit-series allows")
	r.accepted(r.push("site", "a 1\n")) // with a token that another server has seen
	want("new token", "it has as many series as --limit-series allows")
	revoked, err := ParseRevokedIDs([]byte("site"))
	if err != nil {
		t.Fatal(err)
	}
	r.reload(func(st *ReloadableServerConfig) { st.Revoked = revoked })
	want("revoked", "")
	if site := r.status("site=site").Site; !site.Revoked {
		t.Errorf("the revoked site is %+v", site)
	}
	r.server.SetIssuedTokens(issuedFor("never"))
	if got := r.status("site=never").Site; got.Problem != "no push yet" || got.LastPush != nil || len(got.Families) != 0 {
		t.Errorf("the site that never pushed is %+v", got)
	}
	for issued, want := range map[time.Duration]string{-siteIsLate: "", -siteIsLate - time.Second: "no push yet", time.Hour: "no push yet"} {
		r.server.SetIssuedTokens(IssuedTokens{tokens: []Token{{ClusterID: "new", ID: "1", Issued: r.now().Add(issued).Unix()}}})
		if got := r.status("site=new").Site.Problem; got != want {
			t.Errorf("the problem of a site whose token was issued %v from now is %q, want %q", issued, got, want)
		}
	}
}

// A server that has just started gives sites and consumers time before it calls them late.
func TestStatusAfterStart(t *testing.T) {
	r := newStatusRig(t)
	r.server.SetIssuedTokens(issuedFor("never"))
	r.move(time.Hour)
	restarted := func(when string, want ...string) {
		t.Helper()
		st, err := r.server.Status(StatusQuery{Sort: "state", Page: 1})
		if err != nil || !slices.Equal(st.Problems, want) {
			t.Errorf("%s: the problems are %q, %v, want %q", when, st.Problems, err, want)
		}
	}
	r.server.started = r.now()
	restarted("at the start")
	r.move(consumerIsLate + time.Second)
	restarted("five minutes later", "consumer prom at 192.0.2.1: no scrape for 1h5m")
	r.move(siteIsLate - consumerIsLate)
	restarted("ten minutes later", "consumer prom at 192.0.2.1: no scrape for 1h10m", "2 of 2 sites have not pushed for 10m: never, pushes")

	fresh := newSrvRig(t)
	fresh.accepted(fresh.push("a", "up 1\n"))
	fresh.wantProblems("a push before the first scrape", []string{}...)
	fresh.move(consumerIsLate + time.Second)
	fresh.wantProblems("no scrape", "no consumer has scraped this server: add params: {consumer: [NAME]} to the scrape configuration of Prometheus")
}

// In a ring, a member that forwards the pushes of a site does not call the site silent, forgets a
// failure when the owner accepts a push, and shows when it did. A new view of the same ring, or a
// change of the ring that leaves the site to its owner, does not keep the owner from calling the site
// silent. A new owner waits.
func TestStatusInRing(t *testing.T) {
	all := newRingServers(t, 2)
	a, b := all[0], all[1]
	id := ownedBy(t, a.node.Forwarder, "b")
	a.push(id, "{{{\n")
	a.move(time.Second)
	a.accepted(a.push(id, "up 1\n"))
	site := a.status("site=" + id).Site
	if site.Owner != "b" || site.Problem != "" || site.LastPush == nil || !site.LastPush.Equal(a.now()) || site.LastFailure == nil {
		t.Errorf("the member that forwards shows the site %+v", site)
	}
	// The ring has changed at the real time, so the clocks of the servers move beyond it.
	beyond := time.Since(testNow) + 2*siteIsLate
	for _, r := range all {
		r.clock.Store(int64(beyond))
		r.node.SetView(&RingView{Ring: r.node.View().Ring, Members: r.node.View().Members})
	}
	if site := a.status("site=" + id).Site; site.Problem != "" {
		t.Errorf("the member that is not the owner calls the site %q", site.Problem)
	}
	if site := b.status("site=" + id).Site; !strings.HasPrefix(site.Problem, "no push for ") {
		t.Errorf("the owner calls the silent site %q", site.Problem)
	}
	before := b.node.OwnerSince(SiteKey(id))
	b.node.SetView(&RingView{Ring: b.node.View().Ring, Members: b.node.View().Members})
	if got := b.node.OwnerSince(SiteKey(id)); got != before || got.IsZero() {
		t.Errorf("after a view of the same ring, the site has its owner since %v, want %v", got, before)
	}

	// The member b dies, so a must wait for the pushes of its sites, but not for those of its own.
	own := ownedBy(t, a.node.Forwarder, "a")
	a.accepted(a.push(own, "up 1\n"))
	a.node.SetView(&RingView{Ring: NewRing([]Claim{{Slot: 0, Lamport: 1, Name: "a"}}, 2), Members: map[string]RingMember{"a": a.node.View().Members["a"]}})
	a.move(siteIsLate + time.Second)
	if site := a.status("site=" + own).Site; site.Problem != "no push for 10m1s" || site.Waiting != "" {
		t.Errorf("after the loss of another member, the owner has the site %+v", site)
	}
	a.clock.Store(int64(time.Since(testNow)))
	if site := a.status("site=" + id).Site; site.Owner != "a" || site.Problem != "" || !strings.HasPrefix(site.Waiting, "no push for ") || !strings.HasSuffix(site.Waiting, "; this server has waited for one for 0s") {
		t.Errorf("the new owner has the site %+v", site)
	}
}

// BenchmarkStatusPage5000Sites answers / and /api/status of a server with 5000 sites and 3 consumers.
func BenchmarkStatusPage5000Sites(b *testing.B) {
	r := newSrvRig(b, func(sc *StoreConfig, _ *ServerConfig) {
		sc.FS, sc.LimitSites, sc.LimitSamples = nullFS{newCrashFS(1, "/secretdir")}, 0, 0
	})
	for i := range 5000 {
		r.accepted(r.push(fmt.Sprintf("site-%d", i), "a{x=\"1\"} 1\nb 2\n"))
	}
	for i := range 3 {
		r.scrapeOn(&AnswerReadTracker{}, fmt.Sprintf("consumer=prom-%d", i))
	}
	handler := r.server.InternalHandler(false)
	for _, path := range []string{"/", "/api/status"} {
		b.Run(path, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				req := httptest.NewRequest("GET", path, nil)
				req.Header.Set("Accept", "text/html")
				w := &discardResponse{header: http.Header{}}
				handler.ServeHTTP(w, req)
				if w.n < 10_000 {
					b.Fatalf("the answer has only %d bytes", w.n)
				}
			}
		})
	}
}
