package main

// Tests of how a server authenticates requests: which tokens it refuses and with which answer, how
// it exchanges a client token for an upload token, which connections it protects, and when it shows
// the series telemeter_cluster_token_expiry_seconds of a site.

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// The server answers a request without a token that is valid for this request with 401,
// WWW-Authenticate and the reason. It answers 403 if the token is valid but the query names another
// cluster ID than the token.
func TestTokenRefused(t *testing.T) {
	r := newAnswerRig(t)
	revokedID := strings.Repeat("ab", 16)
	revoked, err := ParseRevokedIDs([]byte("gone\n" + revokedID + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	r.reload(func(st *ReloadableServerConfig) { st.Revoked = revoked })
	foreign := testKeys(t, 7)
	forged := func(kind string) string {
		return signToken(t, foreign, Token{Kind: kind, ClusterID: "site-a", ID: strings.Repeat("0", 32)})
	}
	expires := func(d time.Duration) func(*Token) {
		return func(tok *Token) { tok.Expires = testNow.Add(d).Unix() }
	}
	withRevokedID := func(tok *Token) { tok.ID = revokedID }
	const authorize, upload = "/authorize", "/upload"
	unauthorized := map[string]string{"WWW-Authenticate": `Bearer realm="telemeter", error="invalid_token", error_description=`}
	var cases []answerCase
	for _, c := range []struct{ name, path, token, reason string }{
		{"no token", upload, "", "Authorization: Bearer <token>"},
		{"no token, authorize", authorize + "?id=site-a", "", "Bearer"},
		{"garbage", upload, "garbage", "malformed"},
		{"long garbage", upload, strings.Repeat("x", 9<<10), "malformed"},
		{"truncated", upload, r.uploadToken[:len(r.uploadToken)-3], "malformed"},
		{"forged upload token", upload, forged(KindUpload), "not signed by a key of this server"},
		{"forged client token", authorize, forged(KindClient), "not signed"},
		{"changed payload", upload, strings.Replace(r.uploadToken, "tm1.e", "tm1.f", 1), "not signed"},
		{"expired client token", authorize, r.token(KindClient, "site-a", expires(-time.Second)), "expired"},
		{"upload token that expires now", upload, r.token(KindUpload, "site-a", expires(0)), "expired"},
		{"revoked token ID, client token", authorize, r.token(KindClient, "site-a", withRevokedID), "revoked"},
		{"revoked token ID, upload token", upload, r.token(KindUpload, "site-a", withRevokedID), "revoked"},
		{"revoked cluster ID, client token", authorize, r.token(KindClient, "gone"), "revoked"},
		{"revoked cluster ID, upload token", upload, r.token(KindUpload, "gone"), "revoked"},
		{"upload token at authorize", authorize, r.uploadToken, "kind client, not upload"},
	} {
		cases = append(cases, answerCase{c.name, srvRequest{method: "POST", url: c.path, token: c.token}, 401, unauthorized, []string{c.reason}})
	}
	r.check(t, append(cases,
		answerCase{"another scheme", srvRequest{method: "POST", url: upload, header: map[string]string{"Authorization": "Basic eDp5"}}, 401, unauthorized, []string{"no bearer token"}},
		answerCase{"another cluster ID at authorize", srvRequest{method: "POST", url: authorize + "?id=site-x", token: r.clientToken}, 403, nil, []string{"the token is for another cluster ID"}},
		answerCase{"another cluster ID at upload", srvRequest{method: "POST", url: upload + "?id=site-x", token: r.uploadToken}, 403, nil, []string{"another cluster ID"}},
	))
}

// The server warns of a refused token, and says what to do. The warning names the site and the token
// if the token is authentic, and otherwise only the address of the sender. It is written once an hour
// for each site or address, and each cause.
func TestRefusedTokensLogged(t *testing.T) {
	r := newSrvRig(t)
	revoked, err := ParseRevokedIDs([]byte("gone\n"))
	if err != nil {
		t.Fatal(err)
	}
	r.reload(func(st *ReloadableServerConfig) { st.Revoked = revoked })
	expired := func(tok *Token) { tok.Expires = testNow.Add(-time.Second).Unix() }
	forged := signToken(t, testKeys(t, 7), Token{Kind: KindClient, ClusterID: "site-a", ID: strings.Repeat("0", 32)})
	id := func(site string) string {
		return " cluster_id=" + site + " token_id=" + fmt.Sprintf("%032x", site)[:32]
	}
	for _, c := range []struct{ name, path, token, message, site string }{
		{"no token", "/upload", "", "request refused: it has no token; send the header Authorization: Bearer TOKEN", ""},
		{"expired", "/authorize", r.token(KindClient, "a", expired), "token refused: it has expired; create a new token with telemeter --mode token, and replace the client's --token-file", id("a")},
		{"expired, another site", "/authorize", r.token(KindClient, "b", expired), "token refused: it has expired", id("b")},
		{"another cause", "/authorize", r.token(KindUpload, "a"), "token refused: it is of the wrong kind", id("a")},
		{"revoked", "/upload", r.token(KindUpload, "gone"), "token refused: the file of --revoked-file lists it", id("gone")},
		{"another cluster ID", "/upload?id=b", r.token(KindUpload, "a"), "token refused: the request names another cluster ID", id("a")},
		{"malformed", "/upload", "garbage", "token refused: it is malformed", ""},
		{"forged", "/upload", forged, "token refused: no key of this server signed it", ""},
	} {
		r.logged()
		for range 3 {
			r.do(srvRequest{method: "POST", url: r.external.URL + c.path, token: c.token})
		}
		got := r.logged()
		if strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, `WARN msg="`+c.message) || !strings.Contains(got, c.site+" remote=127.0.0.1:") || strings.Contains(got, "cluster_id") != (c.site != "") {
			t.Errorf("%s: the log is\n%s\nwant one warning %q with %q", c.name, got, c.message, c.site)
		}
	}
	r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: r.token(KindUpload, "c", expired)})
	if got := r.logged(); got != "" {
		t.Errorf("an expired upload token, which a client renews by itself, is logged:\n%s", got)
	}
	r.clock.Add(int64(siteLogEvery))
	r.logged()
	r.do(srvRequest{method: "POST", url: r.external.URL + "/upload", token: "garbage"})
	r.do(srvRequest{method: "POST", url: r.external.URL + "/authorize", token: r.token(KindClient, "a", expired)})
	if got := r.logged(); strings.Count(got, "WARN") != 2 || strings.Count(got, "suppressed=2") != 2 {
		t.Errorf("after an hour, the log is\n%s\nwant two warnings", got)
	}
}

// authorizeAnswer is the decoded JSON body of an answer of /authorize.
type authorizeAnswer struct {
	Version, ExpiresInSeconds int
	Token, Server             string
	Time                      int64 // server's time, in ms since the Unix epoch
	Labels                    map[string]string
}

// authorize sends a client token for site-a to /authorize, and returns the decoded answer. The test
// fails at once if the status is not 200.
func (r *srvRig) authorize(token string) (a authorizeAnswer) {
	r.t.Helper()
	got := r.do(srvRequest{method: "POST", url: r.external.URL + "/authorize?id=site-a", token: token})
	if err := json.Unmarshal([]byte(got.body), &a); err != nil || got.status != 200 || got.header.Get("Content-Type") != "application/json" {
		r.t.Fatalf("/authorize was answered %d %s", got.status, got.body)
	}
	return a
}

// /authorize answers a client token that never expires with an upload token that is valid for an
// hour. The upload token has the cluster ID, labels and token ID of the client token. The answer
// also lists these labels. Its label _id is the cluster ID, even if the client token has another
// _id.
func TestAuthorize(t *testing.T) {
	r := newSrvRig(t)
	client := r.token(KindClient, "site-a", func(tok *Token) { tok.Labels = map[string]string{"region": "eu", "_id": "site-b"} })
	a := r.authorize(client)
	if a.Version != 1 || a.ExpiresInSeconds != 3600 || !maps.Equal(a.Labels, map[string]string{"region": "eu", "_id": "site-a"}) {
		t.Errorf("/authorize answered %+v", a)
	}
	if a.Server != "s1" || a.Time != testNow.UnixMilli() {
		t.Errorf("/authorize answered server %q and time %d", a.Server, a.Time)
	}
	tok, err := r.keys.Verify(a.Token, r.now())
	if err != nil || tok.Kind != KindUpload || tok.ClusterID != "site-a" || tok.ID != fmt.Sprintf("%032x", "site-a") {
		t.Errorf("upload token %+v: %v", tok, err)
	}
	if n := r.accepted(r.upload(a.Token, []byte("up 1\n"))).Accepted; n != 1 {
		t.Errorf("%d samples accepted, want 1", n)
	}
	if !strings.Contains(r.held("site-a", ""), `up{_id="site-a",instance="",job="",region="eu"} 1`) {
		t.Errorf("the sample does not have the labels of the token:\n%s", r.held("site-a", ""))
	}
}

// An upload token expires no later than the client token from which /authorize made it. From the
// time when the client token expires, the server refuses both tokens.
func TestUploadTokenExpiry(t *testing.T) {
	r := newSrvRig(t)
	client := r.token(KindClient, "site-a", func(tok *Token) { tok.Expires = testNow.Unix() + 90 })
	a := r.authorize(client)
	if a.ExpiresInSeconds != 90 {
		t.Fatalf("the upload token is valid for %d s, but its client token for 90 s", a.ExpiresInSeconds)
	}
	r.clock.Store(int64(90 * time.Second))
	for _, token := range []string{a.Token, client} {
		if got := r.upload(token, []byte("up 2\n")); got.status != 401 {
			t.Errorf("an expired token was answered %d, want 401", got.status)
		}
	}
}

// The server signs upload tokens with the first of its keys. After a reload with a new first key,
// tokens signed with an older key stay valid until they expire or a reload removes that key.
func TestAuthorizeAfterKeyRotation(t *testing.T) {
	r := newSrvRig(t)
	client := r.token(KindClient, "site-a")
	old := r.authorize(client).Token
	r.keys = testKeys(t, 2, 1)
	r.reload(func(*ReloadableServerConfig) {})
	if got, err := ParseUnverifiedToken(r.authorize(client).Token); err != nil || got.KeyID != r.keys.IDs()[0] {
		t.Errorf("key %s signs, want %s: %v", got.KeyID, r.keys.IDs()[0], err)
	}
	r.keys = testKeys(t, 2)
	r.reload(func(*ReloadableServerConfig) {})
	if got := r.upload(old, nil); got.status != 401 {
		t.Errorf("a token of a removed key was answered %d, want 401", got.status)
	}
}

// A token that the server has accepted before is refused once it has expired, it or its cluster ID is
// revoked, or the key that signed it is removed.
func TestAcceptedTokenIsRefusedLater(t *testing.T) {
	revoke := func(id string) func(*srvRig, *ReloadableServerConfig) {
		return func(r *srvRig, st *ReloadableServerConfig) {
			revoked, err := ParseRevokedIDs([]byte(id))
			if err != nil {
				r.t.Fatal(err)
			}
			st.Revoked = revoked
		}
	}
	for name, change := range map[string]func(*srvRig, *ReloadableServerConfig){
		"expired":            func(r *srvRig, _ *ReloadableServerConfig) { r.clock.Store(int64(time.Hour)) },
		"token ID revoked":   revoke(strings.Repeat("cd", 16)),
		"cluster ID revoked": revoke("site-a"),
		"key removed":        func(r *srvRig, st *ReloadableServerConfig) { st.Keys = testKeys(r.t, 2) },
	} {
		r := newSrvRig(t)
		for _, kind := range []string{KindClient, KindUpload} {
			token := r.token(kind, "site-a", func(tok *Token) {
				tok.ID, tok.Expires = strings.Repeat("cd", 16), testNow.Add(time.Hour).Unix()
			})
			r.reload(func(*ReloadableServerConfig) {})
			r.clock.Store(0)
			for range 2 {
				if got := r.upload(token, []byte("up 1\n")); got.status != 200 {
					t.Fatalf("%s, token of kind %s: first answered %d %s", name, kind, got.status, got.body)
				}
			}
			r.reload(func(st *ReloadableServerConfig) { change(r, st) })
			if got := r.upload(token, []byte("up 1\n")); got.status != 401 {
				t.Errorf("%s, token of kind %s: answered %d %s, want 401", name, kind, got.status, got.body)
			}
		}
	}
}

// If a site pushes with a client token that never expires, the server no longer shows the expiry of
// the site's earlier client token.
func TestExpiryEnds(t *testing.T) {
	r := newSrvRig(t)
	push := func(change ...func(*Token)) {
		r.accepted(r.upload(r.token(KindClient, "site-a", change...), []byte("up 1\n")))
	}
	push(func(tok *Token) { tok.Expires = testNow.Unix() + 1000 })
	if got := r.federate("", ""); !strings.Contains(got, "token_expiry_seconds{") {
		t.Errorf("the expiry is missing:\n%s", got)
	}
	push()
	if got := r.federate("", ""); strings.Contains(got, "token_expiry_seconds{") {
		t.Errorf("the expiry of the earlier token is still served:\n%s", got)
	}
}

// A server protects the connection of a request that it has authenticated, from any kind of sender.
// It does not protect the connection of a request that it refuses, or that needs no authentication.
func TestAuthenticatedConnectionProtected(t *testing.T) {
	r := newSrvRig(t)
	external := newExternalAuthRig(t, func(w http.ResponseWriter, clusterID string) {
		w.Header().Set("Content-Type", "application/json")
		if clusterID == "refused" {
			w.WriteHeader(http.StatusUnauthorized)
		}
		io.WriteString(w, `{"api_version":"v1","status":"ok"}`)
	})
	r.reload(func(st *ReloadableServerConfig) { st.FederateToken = "scraper" })
	open := newSrvRig(t)
	upload := r.token(KindUpload, "site-a")
	client := &Client{cfg: ClientConfig{Metrics: NewMetrics()}}
	for _, c := range []struct {
		name        string
		handler     http.Handler
		method, url string
		token       string
		status      int
		protected   bool
	}{
		{"upload", r.server.ExternalHandler(), "POST", "/upload", upload, 200, true},
		{"upload without a token", r.server.ExternalHandler(), "POST", "/upload", "", 401, false},
		{"upload with a forged token", r.server.ExternalHandler(), "POST", "/upload", upload + "x", 401, false},
		{"upload for another site", r.server.ExternalHandler(), "POST", "/upload?id=site-b", upload, 403, false},
		{"authorize", r.server.ExternalHandler(), "POST", "/authorize", r.token(KindClient, "site-a"), 200, true},
		{"authorize with an upload token", r.server.ExternalHandler(), "POST", "/authorize", upload, 401, false},
		{"unknown path", r.server.ExternalHandler(), "POST", "/", upload, 404, false},
		{"health check", r.server.ExternalHandler(), "GET", "/healthz", "", 200, false},
		{"authorize at the --authorize URL", external.server.ExternalHandler(), "POST", "/authorize?id=site-a", "any", 200, true},
		{"refused at the --authorize URL", external.server.ExternalHandler(), "POST", "/authorize?id=refused", "any", 401, false},
		{"scrape", r.server.InternalHandler(false), "GET", "/federate", "scraper", 200, true},
		{"scrape without the token", r.server.InternalHandler(false), "GET", "/federate", "", 401, false},
		{"scrape that needs no token", open.server.InternalHandler(false), "GET", "/federate", "", 200, true},
		{"internal health check", r.server.InternalHandler(false), "GET", "/healthz", "", 200, false},
		{"listener of a client", client.Handler(false), "GET", "/metrics", "", 200, true},
	} {
		req := httptest.NewRequest(c.method, c.url, nil)
		if c.token != "" {
			req.Header.Set("Authorization", "Bearer "+c.token)
		}
		if protected, answer := protectedAfter(c.handler, req); protected != c.protected || answer.Code != c.status {
			t.Errorf("%s: protected %t and answered %d %s, want %t and %d", c.name, protected, answer.Code, answer.Body, c.protected, c.status)
		}
	}
}
