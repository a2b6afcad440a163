package main

// Tests of the routes of a server's external and internal listener: paths, methods, health checks,
// and the federate token. Profiles (/debug/pprof/) are served to loopback addresses only.

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
)

// The external listener answers 405 with Allow to a wrong method. It answers 404 to unknown paths
// and to paths that only the internal listener serves, such as /federate, /metrics and
// /debug/pprof/. While the server is ready, it answers 200 to health checks.
func TestExternalRoutes(t *testing.T) {
	r := newAnswerRig(t)
	allowPost := map[string]string{"Allow": "POST"}
	r.check(t, []answerCase{
		{"GET upload", srvRequest{method: "GET", url: "/upload", token: r.uploadToken}, 405, allowPost, []string{"Method Not Allowed"}},
		{"PUT upload", srvRequest{method: "PUT", url: "/upload", token: r.uploadToken}, 405, allowPost, nil},
		{"GET authorize", srvRequest{method: "GET", url: "/authorize"}, 405, allowPost, nil},
		{"POST healthz", srvRequest{method: "POST", url: "/healthz"}, 405, map[string]string{"Allow": "GET, HEAD"}, nil},

		{"federate is internal", srvRequest{method: "GET", url: "/federate"}, 404, nil, []string{"404"}},
		{"metrics are internal", srvRequest{method: "GET", url: "/metrics"}, 404, nil, nil},
		{"pprof is internal", srvRequest{method: "GET", url: "/debug/pprof/"}, 404, nil, nil},
		{"root", srvRequest{method: "GET", url: "/"}, 404, nil, nil},
		{"path below upload", srvRequest{method: "POST", url: "/upload/", token: r.uploadToken}, 404, nil, nil},

		{"health", srvRequest{method: "GET", url: "/healthz"}, 200, nil, []string{"ok"}},
		{"ready", srvRequest{method: "GET", url: "/healthz/ready"}, 200, nil, []string{"ready"}},
	})
}

// getInternal sends a GET request with a bearer token to a path of the internal listener. With the
// token "" it sends no token.
func (r *srvRig) getInternal(path, token string) srvAnswer {
	r.t.Helper()
	return r.do(srvRequest{method: "GET", url: r.internal.URL + path, token: token})
}

// The internal listener lists its paths at / and serves metrics at /metrics. It answers 404 to
// /upload and /authorize, which only the external listener serves. It allows only GET and HEAD,
// and refuses requests with a body at every path.
func TestInternalRoutes(t *testing.T) {
	r := newSrvRig(t)
	if got := r.getInternal("/", ""); got.status != 200 || !strings.Contains(got.body, `"/federate"`) {
		t.Errorf("/ was answered %d %s", got.status, got.body)
	}
	if got := r.getInternal("/metrics", ""); got.status != 200 || !strings.Contains(got.body, "telemeter_pushes_total") {
		t.Errorf("/metrics was answered %d %.100s", got.status, got.body)
	}
	for _, path := range []string{"/upload", "/authorize", "/nothing", "/federate/"} {
		if got := r.getInternal(path, ""); got.status != 404 {
			t.Errorf("%s was answered %d, want 404", path, got.status)
		}
	}
	if got := r.do(srvRequest{method: "POST", url: r.internal.URL + "/federate"}); got.status != 405 || got.header.Get("Allow") != "GET, HEAD" {
		t.Errorf("POST /federate was answered %d %v", got.status, got.header)
	}
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/symbol", "/debug/pprof/profile"} {
		if got := r.do(srvRequest{method: "POST", url: r.internal.URL + path}); got.status != 405 || got.header.Get("Allow") != "GET, HEAD" {
			t.Errorf("POST %s was answered %d %v", path, got.status, got.header)
		}
	}
	for _, path := range []string{"/federate", "/debug/pprof/symbol", "/nothing"} {
		if got := r.do(srvRequest{method: "POST", url: r.internal.URL + path, body: []byte("body")}); got.status != 413 {
			t.Errorf("POST %s with a body was answered %d, want 413", path, got.status)
		}
	}
	if got := r.do(srvRequest{method: "HEAD", url: r.internal.URL + "/federate"}); got.status != 200 || got.body != "" {
		t.Errorf("HEAD /federate was answered %d %s", got.status, got.body)
	}
}

// /sd of a server without a ring lists the server under the address by which it was asked, which is
// the address that the asking Prometheus can reach.
func TestLoneServerSD(t *testing.T) {
	r := newSrvRig(t)
	sd := func(host string) *httptest.ResponseRecorder {
		req, answer := httptest.NewRequest("GET", "/sd", nil), httptest.NewRecorder()
		req.Host = host
		r.server.InternalHandler(false).ServeHTTP(answer, req)
		return answer
	}
	for host, want := range map[string]string{
		"hub.example:9004": "hub.example:9004", "localhost:1": "localhost:1", "192.0.2.1:9004": "192.0.2.1:9004", "[2001:db8::1]:9004": "[2001:db8::1]:9004",
		"hub.example": "hub.example:80", "[::1]": "[::1]:80",
	} {
		if a := sd(host); a.Code != 200 || a.Header().Get("Content-Type") != "application/json" || strings.TrimSpace(a.Body.String()) != `[{"targets":["`+want+`"]}]` {
			t.Errorf("Host %s: answered %d %s, want the target %s", host, a.Code, a.Body, want)
		}
	}
	for _, host := range []string{"", ":9004", "a:b", "a:0", "a:65536", "a/b:1", "u@a:1", "a b:1", "a:1?x", "a\x00:1"} {
		if a := sd(host); a.Code != 400 || !strings.Contains(a.Body.String(), "Host") {
			t.Errorf("Host %q: answered %d %s, want 400", host, a.Code, a.Body)
		}
	}
	r.server.cfg.SDScheme = SDSchemeTLS
	if a, want := sd("hub.example"), `[{"targets":["hub.example:443"],"labels":{"__scheme__":"https"}}]`; strings.TrimSpace(a.Body.String()) != want {
		t.Errorf("over TLS: answered %s, want %s", a.Body, want)
	}
}

// If a federate token is configured, every path that the internal listener serves, except the
// health checks, requires exactly that token. The external listener does not accept the federate
// token for pushes.
func TestFederateToken(t *testing.T) {
	const secret = "s3cr3t-of-the-scraper"
	r := newSrvRig(t)
	r.secrets = append(r.secrets, secret)
	r.reload(func(st *ReloadableServerConfig) { st.FederateToken = secret })
	for _, path := range []string{"/", "/federate", "/federate?match[]=up", "/metrics", "/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/cmdline"} {
		for _, token := range []string{"", "xyzzy", secret + "x", secret[1:], r.token(KindUpload, "site-a"), r.token(KindClient, "site-a")} {
			if got := r.getInternal(path, token); got.status != 401 || !strings.HasPrefix(got.header.Get("WWW-Authenticate"), "Bearer ") || !strings.Contains(got.body, "--federate-token-file") {
				t.Errorf("%s with token %.10q was answered %d %v %s", path, token, got.status, got.header, got.body)
			}
		}
		if got := r.getInternal(path, secret); got.status != 200 {
			t.Errorf("%s with the federate token was answered %d, want 200", path, got.status)
		}
	}
	for _, path := range HealthPaths() {
		if got := r.getInternal(path, ""); got.status != 200 {
			t.Errorf("%s without a token was answered %d, want 200", path, got.status)
		}
	}
	if got := r.upload(secret, nil); got.status != 401 {
		t.Errorf("an upload with the federate token was answered %d, want 401", got.status)
	}
}

// The federate token is accepted as the password of HTTP Basic authentication with any user, on every
// path that needs the token. Only a browser is asked for a password. A wrong password is refused and
// counted. The first request of a browser, which has no password yet, is counted, but the status does
// not show it as a refusal.
func TestFederateTokenAsPassword(t *testing.T) {
	const secret = "s3cr3t-of-the-scraper"
	r := newSrvRig(t)
	r.secrets = append(r.secrets, secret)
	r.reload(func(st *ReloadableServerConfig) { st.FederateToken = secret })
	refused, asked := 0, 0
	for _, path := range []string{"/", "/api/status", "/federate", "/metrics", "/sd", "/debug/pprof/"} {
		for _, c := range []struct {
			user, password, accept string
			want                   int
		}{
			{"", secret, "text/html", 200}, {"any", secret, "*/*", 200}, {"any", secret + "x", "text/html", 401}, {secret, "", "text/html", 401}, {"any", "wrong", "*/*", 401},
			{"", "", "text/html", 401}, {"", "", "*/*", 401},
		} {
			req := httptest.NewRequest("GET", path, nil)
			req.RemoteAddr = "127.0.0.1:9"
			if c.user+c.password != "" {
				req.SetBasicAuth(c.user, c.password)
			}
			req.Header.Set("Accept", c.accept)
			rec := httptest.NewRecorder()
			r.server.InternalHandler(false).ServeHTTP(rec, req)
			offers := strings.Contains(strings.Join(rec.Header().Values("WWW-Authenticate"), "\n"), "Basic realm=")
			if rec.Code != c.want || offers != (c.want == 401 && c.accept == "text/html") {
				t.Errorf("%s as %q with password %q and Accept %s was answered %d %v, want %d", path, c.user, c.password, c.accept, rec.Code, rec.Header(), c.want)
			}
			switch {
			case c.want == 401 && c.user+c.password == "" && c.accept == "text/html":
				asked++
			case c.want == 401:
				refused++
			}
		}
	}
	checkCounts(t, "telemeter_unauthorized_total", r.server.unauthorizedTotal, map[string]float64{"federate_token": float64(refused + asked)})
	r.reload(func(st *ReloadableServerConfig) { st.FederateToken = "" })
	if got := r.status("").Refusals; len(got) != 1 || got[0].Reason != "federate_token" || got[0].Count != refused || got[0].ClusterID != "" {
		t.Errorf("the refusals are %+v, want %d for federate_token", got, refused)
	}
}

// A server that starts or stops is not ready: /healthz/ready and /-/ready answer 503 with
// Retry-After and the reason. /healthz and /-/healthy answer 200.
func TestHealthWhileNotReady(t *testing.T) {
	r := newSrvRig(t)
	r.server.SetReady(false)
	starting := NewServer(ServerConfig{Store: r.store, Metrics: NewMetrics(), Log: slog.New(slog.DiscardHandler), Now: r.now})
	for want, server := range map[string]*Server{"not ready: it is stopping\n": r.server, "not ready: it is starting, and ": starting} {
		for _, h := range []http.Handler{server.ExternalHandler(), server.InternalHandler(false)} {
			for _, path := range HealthPaths() {
				rec := httptest.NewRecorder()
				h.ServeHTTP(rec, httptest.NewRequest("GET", path, nil))
				code, body := 200, "ok\n"
				if strings.HasSuffix(path, "/ready") {
					code, body = 503, want
				}
				if rec.Code != code || !strings.HasPrefix(rec.Body.String(), body) || code == 503 && rec.Header().Get("Retry-After") == "" {
					t.Errorf("%s was answered %d %v %q, want %d %q", path, rec.Code, rec.Header(), rec.Body, code, body)
				}
			}
		}
	}
}

// A server serves profiles only to loopback addresses. A header X-Forwarded-For with a loopback
// address, or a valid federate token, does not give another address access.
func TestProfilesOnLoopbackOnly(t *testing.T) {
	const secret = "s3cr3t-of-the-scraper"
	r := newSrvRig(t)
	r.reload(func(st *ReloadableServerConfig) { st.FederateToken = secret })
	for remote, want := range map[string]int{
		"127.0.0.1:9": 200, "127.9.9.9:9": 200, "[::1]:9": 200, "[::ffff:127.0.0.1]:9": 200,
		"10.0.0.1:9": 403, "[2001:db8::1]:9": 403, "[fe80::1%lo]:9": 403, "": 403, "@": 403,
	} {
		req := httptest.NewRequest("GET", "/debug/pprof/cmdline", nil)
		req.RemoteAddr = remote
		req.Header.Set("Authorization", "Bearer "+secret)
		req.Header.Set("X-Forwarded-For", "127.0.0.1")
		rec := httptest.NewRecorder()
		r.server.InternalHandler(false).ServeHTTP(rec, req)
		if rec.Code != want {
			t.Errorf("a profile for %q was answered %d, want %d", remote, rec.Code, want)
		}
	}
}

// The metric of the limits has the used share of each limit that is set and whose use can do harm.
func TestLimitMetric(t *testing.T) {
	r := newSrvRig(t, func(_ *StoreConfig, cfg *ServerConfig) {
		cfg.HostLimits = func() []LimitStatus {
			return []LimitStatus{{Name: "disk", Used: 1, Limit: 4}, {Name: "memory"}, {Name: "harmless", Used: 1, Limit: 1, Informative: true}}
		}
	})
	if answer := r.push("site-1", "a 1\nb 2\n"); answer.status != 200 {
		t.Fatalf("the push was answered %d", answer.status)
	}
	var got []string
	for line := range strings.Lines(metricsText(t, r.server.cfg.Metrics)) {
		if strings.HasPrefix(line, "telemeter_limit_used_ratio{") {
			got = append(got, strings.TrimPrefix(strings.TrimSpace(line), "telemeter_limit_used_ratio"))
		}
	}
	// The rig has no limit of the bytes of logs, and allows 10 sites and 100,000 samples.
	want := []string{`{limit="consumers"} 0`, `{limit="disk"} 0.25`, `{limit="samples held and unread"} 0`, `{limit="sites"} 0.1`}
	if !slices.Equal(got, want) {
		t.Errorf("the server exposes the used limits %q, want %q", got, want)
	}
}
