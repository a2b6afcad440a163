package main

// Tests of external authorization: the server asks the service at the --authorize URL whether a
// client token may push for a cluster ID.

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"
)

// externalAuthToken is the client token that these tests send to /authorize. The server cannot
// verify it itself, so it must ask the service at the --authorize URL.
const externalAuthToken = "opaque~token"

// externalAuthRig is a server with an --authorize URL, and the service at that URL.
type externalAuthRig struct {
	*srvRig
	answer func(w http.ResponseWriter, clusterID string) // answers the requests to the service

	mu    sync.Mutex     // guards asked
	asked map[string]int // requests to the service, by cluster ID
}

// newExternalAuthRig returns a server and a service that answers with answer. It checks the form of
// each request to the service.
func newExternalAuthRig(t *testing.T, answer func(w http.ResponseWriter, clusterID string), change ...func(*StoreConfig, *ServerConfig)) *externalAuthRig {
	r := &externalAuthRig{answer: answer, asked: map[string]int{}}
	service := httptest.NewServer(http.HandlerFunc(r.serve))
	t.Cleanup(service.Close)
	r.srvRig = newSrvRig(t, append(change, func(_ *StoreConfig, c *ServerConfig) {
		u, err := url.Parse(service.URL + "/auth?tenant=7")
		if err != nil {
			t.Fatal(err)
		}
		c.ExternalAuthorizer = NewExternalAuthorizer(u, NewHTTPClient(nil, 300*time.Millisecond, 10*time.Second), c.Now)
	})...)
	r.secrets = append(r.secrets, "internal detail", service.Listener.Addr().String())
	return r
}

func (r *externalAuthRig) serve(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	var question map[string]string
	if err != nil || json.Unmarshal(body, &question) != nil {
		r.t.Errorf("the service was sent %q: %v", body, err)
	}
	id := question["cluster_id"]
	if req.Method != "POST" || req.URL.String() != "/auth?tenant=7" || req.Header.Get("Content-Type") != "application/json" || req.Header.Get("Authorization") != "" ||
		!maps.Equal(question, map[string]string{"api_version": "v1", "cluster_id": id, "authorization_token": question["authorization_token"]}) {
		r.t.Errorf("the service was sent %s %s %v %s", req.Method, req.URL, req.Header, body)
	}
	r.mu.Lock()
	r.asked[id]++
	r.mu.Unlock()
	r.answer(w, id)
}

// questions returns how often the service was asked about a cluster ID.
func (r *externalAuthRig) questions(id string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asked[id]
}

// authorizeExternally sends a client token to the server's /authorize, with the cluster ID id in
// the query.
func (r *externalAuthRig) authorizeExternally(id, token string) srvAnswer {
	r.t.Helper()
	return r.do(srvRequest{method: "POST", url: r.external.URL + "/authorize?id=" + url.QueryEscape(id), token: token})
}

// serviceAnswers returns an answer function that answers every request with the given status,
// content type and body.
func serviceAnswers(status int, contentType, body string) func(http.ResponseWriter, string) {
	return func(w http.ResponseWriter, _ string) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

const jsonType = "application/json"

// If the authorization service permits, /authorize returns an upload token for the cluster ID. The
// service may answer like a service of the original telemeter, with an account ID, or with the
// status "ok". The answer of /authorize lists the labels in the service's answer, but its label _id
// is always the cluster ID.
func TestExternalAuthAccepted(t *testing.T) {
	for name, c := range map[string]struct {
		status    int
		mediaType string
		body      string
		labels    string // labels in the answer besides _id, as JSON
	}{
		"original, known":     {200, jsonType, `{"account_id":"a1","cluster_id":"site-a","authorization_token":"opaque~token"}`, `{}`},
		"original, new":       {201, jsonType, "{\n \"account_id\": \"a1\",\n \"cluster_id\": \"site-a\"\n}", `{}`},
		"status only":         {200, jsonType, `{"api_version":"v1","status":"ok"}`, `{}`},
		"everything":          {200, "application/json; charset=utf-8", `{"api_version":"v1","status":"ok","account_id":"a1","labels":{"region":"eu"},"more":[1]}`, `{"region":"eu"}`},
		"original and labels": {200, "Application/JSON", `{"account_id":"a1","labels":{"region":"eu","zone":""}}`, `{"region":"eu","zone":""}`},
		"other _id":           {200, jsonType, `{"status":"ok","labels":{"_id":"site-b","region":"eu"}}`, `{"region":"eu"}`},
		"no labels":           {200, jsonType, `{"status":"ok","labels":null}`, `{}`},
	} {
		t.Run(name, func(t *testing.T) {
			r := newExternalAuthRig(t, serviceAnswers(c.status, c.mediaType, c.body))
			got := r.authorizeExternally("site-a", externalAuthToken)
			var a authorizeAnswer
			want := map[string]string{}
			if err := json.Unmarshal([]byte(c.labels), &want); err != nil {
				t.Fatal(err)
			}
			want["_id"] = "site-a"
			if err := json.Unmarshal([]byte(got.body), &a); err != nil || got.status != 200 || a.ExpiresInSeconds != 3600 || a.Server != "s1" || a.Time != testNow.UnixMilli() || !maps.Equal(a.Labels, want) {
				t.Fatalf("/authorize was answered %d %s", got.status, got.body)
			}
			if n := r.accepted(r.upload(a.Token, []byte("up 1\n"))).Accepted; n != 1 {
				t.Errorf("%d samples accepted, want 1", n)
			}
		})
	}
}

// If the authorization service does not permit, the server answers with the service's 401, 409 or
// 429, with 401 for another 4xx, and with 503 for anything else. A 200 does not permit if it cannot
// be read whole, is not JSON, lacks a permission or has labels that are not strings, because
// without its labels the samples of tenants could mix. The answer has a text of the server's own.
// The refusal is counted, and the server's log quotes at most 200 bytes of the service's reason,
// without the token.
func TestExternalAuthRefused(t *testing.T) {
	failed := func(status int) func(http.ResponseWriter, string) {
		return serviceAnswers(status, "text/plain", "internal detail about "+externalAuthToken+strings.Repeat(" and more", 100))
	}
	limited := func(retryAfter string) func(http.ResponseWriter, string) {
		return func(w http.ResponseWriter, id string) {
			w.Header().Set("Retry-After", retryAfter)
			failed(429)(w, id)
		}
	}
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("the server followed a redirect, with the token")
	}))
	defer elsewhere.Close()
	var hang chan struct{} // closed at the end of each subtest
	for name, c := range map[string]struct {
		answer     func(http.ResponseWriter, string)
		status     int
		reason     string // value of the label reason of the metric
		retryAfter string
	}{
		"401":           {failed(401), 401, "forged", ""},
		"400":           {failed(400), 401, "forged", ""},
		"403":           {failed(403), 401, "forged", ""},
		"404":           {failed(404), 401, "forged", ""},
		"409":           {failed(409), 409, "conflict", ""},
		"429":           {limited("17"), 429, "rate_limited", "17"},
		"429, zero":     {limited("0"), 429, "rate_limited", "1"},
		"429, for ever": {limited("99999999"), 429, "rate_limited", "3600"},
		"429, unknown":  {limited("soon"), 429, "rate_limited", "30"},
		"429, negative": {limited("-1"), 429, "rate_limited", "30"},
		"500":           {failed(500), 503, "unavailable", "5"},
		"503":           {failed(503), 503, "unavailable", "5"},
		"202":           {serviceAnswers(202, jsonType, `{"status":"ok"}`), 503, "unavailable", "5"},
		"204":           {serviceAnswers(204, jsonType, ""), 503, "unavailable", "5"},
		"redirect": {func(w http.ResponseWriter, _ string) {
			w.Header().Set("Location", elsewhere.URL)
			w.WriteHeader(307)
		}, 503, "unavailable", "5"},
		"no answer": {func(http.ResponseWriter, string) { <-hang }, 503, "unavailable", "5"},
		"too large": {serviceAnswers(200, jsonType, fmt.Sprintf(`{"status":"ok","pad":%q}`, strings.Repeat("x", 1<<20))), 503, "unavailable", "5"},
		"cut": {func(w http.ResponseWriter, id string) {
			w.Header().Set("Content-Length", "100")
			serviceAnswers(200, jsonType, `{"status":"ok"}`)(w, id)
		}, 503, "unavailable", "5"},
		"text":              {serviceAnswers(200, "text/plain", `{"status":"ok"}`), 503, "unavailable", "5"},
		"no type":           {serviceAnswers(200, "", `{"status":"ok"}`), 503, "unavailable", "5"},
		"not JSON":          {serviceAnswers(200, jsonType, `internal detail`), 503, "unavailable", "5"},
		"empty":             {serviceAnswers(200, jsonType, ``), 503, "unavailable", "5"},
		"null":              {serviceAnswers(200, jsonType, `null`), 503, "unavailable", "5"},
		"list":              {serviceAnswers(200, jsonType, `["ok"]`), 503, "unavailable", "5"},
		"two objects":       {serviceAnswers(200, jsonType, `{"status":"ok"}{"status":"no"}`), 503, "unavailable", "5"},
		"no permission":     {serviceAnswers(200, jsonType, `{"api_version":"v1","labels":{"region":"eu"}}`), 503, "unavailable", "5"},
		"empty account":     {serviceAnswers(200, jsonType, `{"account_id":""}`), 503, "unavailable", "5"},
		"status error":      {serviceAnswers(200, jsonType, `{"status":"error","account_id":"a1"}`), 503, "unavailable", "5"},
		"status empty":      {serviceAnswers(200, jsonType, `{"status":"","account_id":"a1"}`), 503, "unavailable", "5"},
		"status null":       {serviceAnswers(200, jsonType, `{"status":null,"account_id":"a1"}`), 503, "unavailable", "5"},
		"other version":     {serviceAnswers(200, jsonType, `{"api_version":"v2","status":"ok"}`), 503, "unavailable", "5"},
		"label is a number": {serviceAnswers(200, jsonType, `{"status":"ok","labels":{"region":7}}`), 503, "unavailable", "5"},
		"label is null":     {serviceAnswers(200, jsonType, `{"status":"ok","labels":{"region":null}}`), 503, "unavailable", "5"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newExternalAuthRig(t, c.answer)
			hang = make(chan struct{})
			t.Cleanup(func() { close(hang) })
			r.secrets = append(r.secrets, elsewhere.URL)
			got := r.authorizeExternally("site-a", externalAuthToken)
			if got.status != c.status || got.header.Get("Retry-After") != c.retryAfter || c.status == 401 != (got.header.Get("WWW-Authenticate") != "") {
				t.Errorf("/authorize was answered %d %v %s, want %d", got.status, got.header, got.body, c.status)
			}
			if n := r.server.unauthorizedTotal.Value(c.reason); n != 1 {
				t.Errorf("%v requests are counted as %s, want 1", n, c.reason)
			}
			if got := r.server.refusals.newestFirst(); len(got) != 1 || got[0].Reason != c.reason || got[0].Text == "" || got[0].ClusterID != "" {
				t.Errorf("the status has the refusals %+v", got)
			}
			log := r.log.String()
			if strings.Count(log, "\n") != 1 || !strings.Contains(log, "cluster_id=site-a") || strings.Contains(log, externalAuthToken) || len(log) > 700 {
				t.Errorf("the log has %d bytes: %s", len(log), log)
			}
			if c.status < 500 && !strings.Contains(log, "internal detail about [token] and more") {
				t.Errorf("the log does not quote the reason: %s", log)
			}
		})
	}
}

// The server answers a request without a valid cluster ID with 400, and a request without a token
// with 401, and does not ask the authorization service.
func TestExternalAuthNotAsked(t *testing.T) {
	r := newExternalAuthRig(t, serviceAnswers(200, jsonType, `{"status":"ok"}`))
	for _, id := range []string{"", "a b", "\x00"} {
		if got := r.authorizeExternally(id, externalAuthToken); got.status != 400 {
			t.Errorf("%q was answered %d, want 400: %s", id, got.status, got.body)
		}
	}
	if got := r.authorizeExternally("site-a", ""); got.status != 401 {
		t.Errorf("a request without a token was answered %d, want 401", got.status)
	}
	if len(r.asked) > 0 {
		t.Errorf("the service was asked about %v", r.asked)
	}
}

// A server with an --authorize URL accepts only upload tokens at /upload. It refuses every client
// token there with 401, even a client token that is signed with one of its own keys.
func TestExternalAuthUpload(t *testing.T) {
	r := newExternalAuthRig(t, serviceAnswers(200, jsonType, `{"status":"ok"}`))
	for _, token := range []string{externalAuthToken, r.token(KindClient, "site-a")} {
		if got := r.upload(token, []byte("up 1\n")); got.status != 401 {
			t.Errorf("an upload with a client token was answered %d, want 401", got.status)
		}
	}
}

// A client with a token that the service refuses cannot tell whether the cluster ID is revoked. A
// client that the service permits is refused as soon as the cluster ID is revoked, even while the
// server remembers the permission.
func TestExternalAuthRevoked(t *testing.T) {
	permitted := true
	r := newExternalAuthRig(t, func(w http.ResponseWriter, id string) {
		if permitted {
			serviceAnswers(200, jsonType, `{"status":"ok"}`)(w, id)
			return
		}
		http.Error(w, "no", http.StatusUnauthorized)
	})
	if got := r.authorizeExternally("gone", externalAuthToken); got.status != 200 {
		t.Fatalf("before the revocation: answered %d %s", got.status, got.body)
	}
	revoked, err := ParseRevokedIDs([]byte("gone\n"))
	if err != nil {
		t.Fatal(err)
	}
	r.reload(func(st *ReloadableServerConfig) { st.Revoked = revoked })
	if got := r.authorizeExternally("gone", externalAuthToken); got.status != 401 || !strings.Contains(got.body, "revoked") {
		t.Errorf("after the revocation: answered %d %s", got.status, got.body)
	}
	permitted = false
	gone, other := r.authorizeExternally("gone", "guess"), r.authorizeExternally("site-a", "guess")
	if gone.status != 401 || gone.body != other.body || gone.header.Get("WWW-Authenticate") != other.header.Get("WWW-Authenticate") {
		t.Errorf("a stranger gets %d %q for a revoked cluster ID, and %d %q for another", gone.status, gone.body, other.status, other.body)
	}
}

// The server remembers a permission for 30 s and a refusal for 10 s, for the same cluster ID and
// token. It asks again about another cluster ID or token, after that time, and after an answer that
// was not a verdict.
func TestExternalAuthMemory(t *testing.T) {
	for name, c := range map[string]struct {
		answer   func(http.ResponseWriter, string)
		status   int
		remember time.Duration
	}{
		"permitted":    {serviceAnswers(200, jsonType, `{"status":"ok","labels":{"_id":"b","region":"eu"}}`), 200, 30 * time.Second},
		"401":          {serviceAnswers(401, "", "no"), 401, 10 * time.Second},
		"404":          {serviceAnswers(404, "", "no"), 401, 10 * time.Second},
		"409":          {serviceAnswers(409, "", "no"), 409, 10 * time.Second},
		"rate limited": {serviceAnswers(429, "", "no"), 429, 0},
		"500":          {serviceAnswers(500, "", "no"), 503, 0},
		"bad labels":   {serviceAnswers(200, jsonType, `{"status":"ok","labels":{"region":null}}`), 503, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r := newExternalAuthRig(t, c.answer)
			ask := func(id, token string, want int) {
				t.Helper()
				if got := r.authorizeExternally(id, token); got.status != c.status {
					t.Errorf("answered %d %s, want %d", got.status, got.body, c.status)
				}
				if n := r.questions(id); n != want {
					t.Errorf("the service was asked %d times about %s, want %d", n, id, want)
				}
			}
			ask("site-a", externalAuthToken, 1)
			if c.remember == 0 {
				ask("site-a", externalAuthToken, 2)
				return
			}
			r.clock.Store(int64(c.remember - 1))
			ask("site-a", externalAuthToken, 1)
			ask("site-b", externalAuthToken, 1)
			r.clock.Store(int64(c.remember))
			ask("site-a", externalAuthToken, 2)
			ask("site-a", "another-token", 3)
		})
	}
}

// Refusals of any number of random tokens push out no permission, and no address of a permitted
// site. The memory for refusals, sites and addresses is bounded.
func TestExternalAuthMemoryIsBounded(t *testing.T) {
	m := newAuthorizeMemory()
	question := func(id, token, address string, err error) *authorizeQuestion {
		return &authorizeQuestion{clusterID: id, credential: newAuthorizeKey(id, token), address: newAuthorizeKey(address), err: err}
	}
	m.remember(question("site-a", "good", "a1", nil), testNow)
	refused := errNoValidAnswer(nil)
	for i := range 3 * maxRefusals {
		m.remember(question("site-a", fmt.Sprint(i), "a1", refused), testNow)
	}
	if len(m.refusals) > maxRefusals {
		t.Errorf("%d refusals are remembered, want at most %d", len(m.refusals), maxRefusals)
	}
	if _, err, ok := m.verdict(question("site-a", "good", "a2", nil), testNow); !ok || err != nil {
		t.Errorf("the permission is remembered: %t, %v", ok, err)
	}
	if _, known := m.sender(question("site-b", "", "a1", nil), testNow); !known {
		t.Error("the address of the permitted site is not known")
	}
	for i := range 1000 { // a site that moves through many addresses
		m.remember(question("site-a", "good", fmt.Sprint(i), nil), testNow)
	}
	if len(m.addresses) != 1 {
		t.Errorf("%d addresses of one site are known, want 1", len(m.addresses))
	}
	m.remember(question("site-a", "good", "a1", refused), testNow)
	if len(m.sites)+len(m.addresses) != 0 {
		t.Error("a site whose token the service refuses is still known")
	}
	for i := range maxTrackedSites + 10 {
		m.remember(question(fmt.Sprint(i), "", fmt.Sprint(i), nil), testNow)
	}
	if len(m.sites) != maxTrackedSites || len(m.addresses) != maxTrackedSites {
		t.Errorf("%d sites and %d addresses are known, want %d", len(m.sites), len(m.addresses), maxTrackedSites)
	}
	m.remember(question("new", "", "new", nil), testNow.Add(siteIdle))
	if len(m.sites) != 1 || len(m.addresses) != 1 {
		t.Errorf("%d sites and %d addresses are known after all were idle for a day, want 1", len(m.sites), len(m.addresses))
	}
}

// An address is known for a day after the service has permitted a site from there. It is forgotten
// once every such site has moved to another address, but not when only some of them have.
func TestAddressOfSeveralSites(t *testing.T) {
	m := newAuthorizeMemory()
	question := func(id, address string) *authorizeQuestion {
		return &authorizeQuestion{clusterID: id, credential: newAuthorizeKey(id, "good"), address: newAuthorizeKey(address)}
	}
	m.remember(question("site-a", "a1"), testNow)
	m.remember(question("site-b", "a1"), testNow)
	m.remember(question("site-b", "a2"), testNow)
	for address, want := range map[string]bool{"a1": true, "a2": true, "a3": false} {
		if _, known := m.sender(question("site-c", address), testNow); known != want {
			t.Errorf("the address %s is known: %t, want %t", address, known, want)
		}
	}
	m.remember(question("site-a", "a2"), testNow)
	if len(m.addresses) != 1 {
		t.Errorf("%d addresses are known after both sites have moved to one, want 1", len(m.addresses))
	}
	if _, known := m.sender(question("site-c", "a2"), testNow.Add(siteIdle)); known {
		t.Error("an address is known after a day without a permission")
	}
}

// If no push could carry the labels in the service's answer, /authorize answers 503, and the
// server's log says why. Labels that it accepts can be pushed.
func TestExternalAuthLabels(t *testing.T) {
	many := func(n int) map[string]string {
		labels := map[string]string{}
		for i := range n {
			labels[fmt.Sprint("l", i)] = ""
		}
		return labels
	}
	one := func(name, value string) map[string]string { return map[string]string{name: value} }
	const operatorLabels = 2
	for name, c := range map[string]struct {
		labels map[string]string
		why    string // text in the log; "" if the labels can be pushed
	}{
		"reserved name":        {one("__name__", "up"), "reserved"},
		"invalid name":         {one("a.b", "x"), "invalid"},
		"empty name":           {one("", "x"), "invalid"},
		"NUL":                  {one("region", "a\x00b"), "NUL"},
		"labels of the server": {map[string]string{"job": "j", "instance": "i", "o1": "x", "region": "eu"}, ""},
		"as many as possible":  {many(MaxLabels - 3 - operatorLabels), ""},
		"one more":             {many(MaxLabels - 2 - operatorLabels), "128"},
		"long":                 {one("region", strings.Repeat("x", 5800)), ""},
		"longer than a token":  {one("region", strings.Repeat("x", 6000)), "token is longer"},
		"escaped in a token":   {one("region", strings.Repeat("<", 2000)), "token is longer"},
	} {
		t.Run(name, func(t *testing.T) {
			body, err := json.Marshal(map[string]any{"status": "ok", "labels": c.labels})
			if err != nil {
				t.Fatal(err)
			}
			r := newExternalAuthRig(t, serviceAnswers(200, jsonType, string(body)), func(_ *StoreConfig, c *ServerConfig) { c.LimitBytes = 64 << 10 })
			r.reload(func(st *ReloadableServerConfig) {
				st.Normalizer = &ServerNormalizer{Labels: []Label{{[]byte("o1"), nil}, {[]byte("o2"), nil}}, Required: []Label{{Name: []byte("absent")}}}
			})
			got := r.authorizeExternally("site-a", externalAuthToken)
			if c.why != "" {
				if got.status != 503 || got.header.Get("Retry-After") == "" || !strings.Contains(r.log.String(), c.why) || len(r.log.String()) > 1000 {
					t.Errorf("answered %d %.200s, log %s", got.status, got.body, r.log)
				}
				return
			}
			var a authorizeAnswer
			if err := json.Unmarshal([]byte(got.body), &a); err != nil || got.status != 200 {
				t.Fatalf("answered %d %.200s, log %s", got.status, got.body, r.log)
			}
			r.reload(func(st *ReloadableServerConfig) {
				st.Normalizer = &ServerNormalizer{Labels: []Label{{[]byte("o1"), nil}, {[]byte("o2"), nil}}}
			})
			if n := r.accepted(r.upload(a.Token, []byte("up 1\n"))).Accepted; n != 1 {
				t.Errorf("%d samples accepted, want 1", n)
			}
		})
	}
}

// A push with the longest upload token fits into a forwardEnvelope, together with 4 KiB of other
// headers.
func TestLongestTokenFitsEnvelope(t *testing.T) {
	keys := testKeys(t, 1)
	sealer, err := NewMessageSealer(keys, "ring")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"x", "<", "é", "\u2028", `"`} {
		token := func(n int) Token {
			return Token{
				Kind: KindUpload, ClusterID: strings.Repeat("c", 128), ID: NewTokenID(), Issued: testNow.Unix(), Expires: testNow.Unix(),
				Labels: map[string]string{"l": strings.Repeat(c, n)},
			}
		}
		n := sort.Search(MaxToken, func(n int) bool {
			_, err := keys.Sign(token(n + 1))
			return err != nil
		})
		tok := token(n)
		plain, err := json.Marshal(forwardEnvelope{
			Version: envelopeVersion, From: strings.Repeat("f", 64), To: strings.Repeat("t", 64), FromSession: 1 << 63, ToSession: 1 << 63, Sequence: 1 << 63,
			Push: pushRequest{ClusterID: tok.ClusterID, Labels: tok.Labels, Arrival: testNow.UnixMilli(), Spool: strings.Repeat("1", 4<<10)},
		})
		if err != nil {
			t.Fatal(err)
		}
		if size := len(sealer.Seal(nil, plain, envelopeSeal, nil, 0)); size > maxEnvelope {
			t.Errorf("with %d times %q as a label value the envelope has %d bytes, limit %d", n, c, size, maxEnvelope)
		}
	}
}
