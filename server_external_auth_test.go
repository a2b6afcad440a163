package main

// Tests of external authorization: the server asks the service at the --authorize URL whether a
// client token may push for a cluster ID.

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
)

// externalAuthToken is the client token that these tests send to /authorize. The server cannot
// verify it itself, so it must ask the service at the --authorize URL.
const externalAuthToken = "opaque~token"

// newExternalAuthRig returns a server with an --authorize URL, and starts the service at that URL.
// The service chooses its answer by the cluster ID, such as "code-403" for the status 403. The
// server itself has revoked the cluster ID "gone".
func newExternalAuthRig(t *testing.T) *srvRig {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.Error("the server followed a redirect, with the token")
	}))
	hang := make(chan struct{})
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "POST" || r.URL.Path != "/auth" || r.URL.Query().Get("tenant") != "7" || r.Header.Get("Authorization") != "Bearer "+externalAuthToken {
			t.Errorf("the service was sent %s %s %v", r.Method, r.URL, r.Header)
		}
		switch id := r.URL.Query().Get("id"); id {
		case "labels":
			fmt.Fprint(w, `{"labels":{"region":"eu","_id":"site-b"},"more":[1]}`)
		case "text":
			fmt.Fprint(w, "fine")
		case "empty":
			w.WriteHeader(204)
		case "redirect":
			http.Redirect(w, r, elsewhere.URL, http.StatusFound)
		case "hang":
			<-hang
		case "huge":
			fmt.Fprintf(w, `{"labels":{"region":"eu"},"pad":%q}`, strings.Repeat("x", 1<<20))
		case "cut":
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, `{"labels":{"reg`)
		case "mistyped":
			fmt.Fprint(w, `{"labels":{"region":7}}`)
		case "reserved":
			fmt.Fprint(w, `{"labels":{"__name__":"up"}}`)
		default:
			code, _ := strconv.Atoi(strings.TrimPrefix(id, "code-"))
			http.Error(w, "internal detail", code)
		}
	}))
	t.Cleanup(func() {
		close(hang)
		service.Close()
		elsewhere.Close()
	})
	r := newSrvRig(t, func(_ *StoreConfig, c *ServerConfig) {
		u, err := url.Parse(service.URL + "/auth?tenant=7&id=forged")
		if err != nil {
			t.Fatal(err)
		}
		c.ExternalAuthorizer = NewExternalAuthorizer(u, NewHTTPClient(nil, 300*time.Millisecond, 10*time.Second))
	})
	r.secrets = append(r.secrets, "internal detail", service.Listener.Addr().String(), elsewhere.URL)
	revoked, err := ParseRevokedIDs([]byte("gone\n"))
	if err != nil {
		t.Fatal(err)
	}
	r.reload(func(st *ReloadableServerConfig) { st.Revoked = revoked })
	return r
}

// authorizeExternally sends externalAuthToken to the server's /authorize, with the cluster ID id in
// the query.
func (r *srvRig) authorizeExternally(id string) srvAnswer {
	r.t.Helper()
	return r.do(srvRequest{method: "POST", url: r.external.URL + "/authorize?id=" + url.QueryEscape(id), token: externalAuthToken})
}

// If the authorization service gives a valid answer with a 2xx status, /authorize returns an upload
// token for the cluster ID. The answer of /authorize lists the labels in the service's answer, but
// its label _id is always the cluster ID. An answer of the service that is not a JSON object adds
// no labels.
func TestExternalAuthAccepted(t *testing.T) {
	r := newExternalAuthRig(t)
	for id, labels := range map[string]map[string]string{
		"labels": {"_id": "labels", "region": "eu"}, "text": {"_id": "text"}, "empty": {"_id": "empty"},
	} {
		got := r.authorizeExternally(id)
		var a authorizeAnswer
		if err := json.Unmarshal([]byte(got.body), &a); err != nil || got.status != 200 || a.ExpiresInSeconds != 3600 || a.Server != "s1" || a.Time != testNow.UnixMilli() || !maps.Equal(a.Labels, labels) {
			t.Fatalf("%s: /authorize was answered %d %s", id, got.status, got.body)
		}
		if n := r.accepted(r.upload(a.Token, []byte("up 1\n"))).Accepted; n != 1 {
			t.Errorf("%s: %d samples accepted, want 1", id, n)
		}
	}
}

// If the authorization service answers 401 or 403, the server answers with the same status. If the
// service gives no valid answer, the server answers 503. An answer with a 2xx status is not valid
// if it cannot be read whole or has invalid labels, because without its labels the samples of
// tenants could mix. The server answers an invalid cluster ID with 400 and a revoked one with 401.
func TestExternalAuthRefused(t *testing.T) {
	r := newExternalAuthRig(t)
	for id, want := range map[string]int{
		"code-401": 401, "code-403": 403, "code-404": 503, "code-500": 503, "redirect": 503, "hang": 503,
		"huge": 503, "cut": 503, "mistyped": 503, "reserved": 503,
		"": 400, "a b": 400, "\x00": 400, "gone": 401,
	} {
		got := r.authorizeExternally(id)
		if got.status != want {
			t.Errorf("%q was answered %d, want %d: %s", id, got.status, want, got.body)
		}
		if want == 503 && got.header.Get("Retry-After") == "" || want == 401 && got.header.Get("WWW-Authenticate") == "" {
			t.Errorf("%q was answered with the headers %v", id, got.header)
		}
	}
	if got := r.do(srvRequest{method: "POST", url: r.external.URL + "/authorize?id=labels"}); got.status != 401 {
		t.Errorf("a request without a token was answered %d, want 401", got.status)
	}
}

// A server with an --authorize URL accepts only upload tokens at /upload. It refuses every client
// token there with 401, even a client token that is signed with one of its own keys.
func TestExternalAuthUpload(t *testing.T) {
	r := newExternalAuthRig(t)
	for _, token := range []string{externalAuthToken, r.token(KindClient, "labels")} {
		if got := r.upload(token, []byte("up 1\n")); got.status != 401 {
			t.Errorf("an upload with a client token was answered %d, want 401", got.status)
		}
	}
}
