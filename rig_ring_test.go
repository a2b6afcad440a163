package main

// The rig of forwarding tests: members of a ring with real listeners on 127.0.0.1, and HTTP
// transports that change, record or lose requests and answers. The tests give each member its view
// of the ring; there is no gossip.

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// forwardNode is a member of a ring that can forward pushes and receive forwarded pushes. By
// default it records each forwarded push that its Forwarder does not refuse, and accepts the push.
// The body of the answer is then the name of the node.
type forwardNode struct {
	*Forwarder
	url   string
	store storeForwardedFunc           // called for each forwarded push that the Forwarder of this node does not refuse
	down  atomic.Bool                  // if true, the node aborts every request, as if it were unreachable
	last  atomic.Pointer[http.Request] // last request that this node received from another member
	body  atomic.Pointer[[]byte]       // body of the request in the field last

	mu     sync.Mutex // guards pushes and answer while requests are in flight
	pushes []takenPush
	answer func() (*pushResponse, error) // returns the answer that answerName gives; nil: answerName answers 200
}

// takenPush is a push that another member forwarded to a forwardNode.
type takenPush struct {
	push pushRequest
	body string
}

// receiver returns the node's HTTP handler for requests of other members. It passes to n.store each
// push that the Forwarder does not refuse.
func (n *forwardNode) receiver() http.Handler {
	return n.Handler(func(ctx context.Context, push *pushRequest, body []byte) (*pushResponse, error) {
		return n.store(ctx, push, body)
	})
}

// answerName is the default value of the field store. It records the push in n.pushes. It returns
// the result of n.answer, or status 200 with the node's name as body if n.answer is nil.
func (n *forwardNode) answerName(_ context.Context, push *pushRequest, body []byte) (*pushResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pushes = append(n.pushes, takenPush{*push, string(body)})
	if n.answer != nil {
		return n.answer()
	}
	return &pushResponse{Status: http.StatusOK, Result: resultAccepted, Body: []byte(n.cfg.Name)}, nil
}

// took returns how many pushes of other members answerName has recorded in n.pushes.
func (n *forwardNode) took() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.pushes)
}

// push calls TryForward with a push of the site id. It returns the body of the answer, which by
// default is the name of the member that accepted the push. It returns "" if TryForward returns
// nil; the node then has to store the push itself, unless ctx has ended.
func (n *forwardNode) push(ctx context.Context, id, body string) string {
	a := n.TryForward(ctx, &pushRequest{ClusterID: id, Arrival: 5, Type: "text/plain"}, []byte(body))
	if a == nil {
		return ""
	}
	return string(a.Body)
}

// newForwardNode starts a forwardNode whose view of the ring has no members yet.
func newForwardNode(t testing.TB, name string, keys Keys) *forwardNode {
	t.Helper()
	n := &forwardNode{}
	sealer, err := NewMessageSealer(keys, "telemeter")
	if err != nil {
		t.Fatal(err)
	}
	n.Forwarder = NewForwarder(ForwarderConfig{
		Name: name, Sealer: sealer, Client: NewHTTPClient(nil, time.Minute, 10*time.Second), Metrics: NewMetrics(),
		Log: slog.New(slog.DiscardHandler),
	})
	n.store = n.answerName
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n.down.Load() {
			panic(http.ErrAbortHandler)
		}
		b, _ := io.ReadAll(r.Body)
		n.body.Store(&b)
		n.last.Store(r)
		r.Body = io.NopCloser(bytes.NewReader(b))
		n.receiver().ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	n.url = srv.URL
	return n
}

// newForwardPair starts two nodes with the names a and b and the same cluster key. It joins them to
// a ring and returns them, and the cluster ID of a site that b owns.
func newForwardPair(t testing.TB) (a, b *forwardNode, id string) {
	t.Helper()
	keys := testKeys(t, 1)
	a, b = newForwardNode(t, "a", keys), newForwardNode(t, "b", keys)
	join(1, a, b)
	return a, b, ownedBy(t, a.Forwarder, "b")
}

// join gives all nodes the same view of the ring, in which each node is live, has the given
// session, and has claimed the slot whose number is its index in nodes.
func join(session uint64, nodes ...*forwardNode) {
	var claims []Claim
	members := map[string]RingMember{}
	for i, n := range nodes {
		claims = append(claims, Claim{Slot: i, Lamport: uint64(i + 1), Name: n.cfg.Name})
		members[n.cfg.Name] = RingMember{Name: n.cfg.Name, Addr: strings.TrimPrefix(n.url, "http://"), Session: session}
	}
	for _, n := range nodes {
		n.SetView(&RingView{Ring: NewRing(claims, 0), Members: members})
	}
}

// setAddress replaces the address of the given member in n's view of the ring by the address in
// url.
func (n *forwardNode) setAddress(member, url string) {
	v := *n.View()
	v.Members = maps.Clone(v.Members)
	v.Members[member] = RingMember{Name: member, Addr: strings.TrimPrefix(url, "http://"), Session: v.Members[member].Session}
	n.SetView(&v)
}

// checkCounts checks a counter with one label. want maps values of this label to the counts that
// they must have. name is the counter's name in failure messages.
func checkCounts(t testing.TB, name string, c *Counter, want map[string]float64) {
	t.Helper()
	for result, n := range want {
		if got := c.Value(result); got != n {
			t.Errorf("%s: %v counted as %s, want %v", name, got, result, n)
		}
	}
}

// ownedBy tries the cluster IDs "site0", "site1" and so on, and returns the first site that the
// named member owns in f's view of the ring. With the argument nth it first skips nth such sites.
func ownedBy(t testing.TB, f *Forwarder, name string, nth ...int) string {
	t.Helper()
	skip := 0
	for _, n := range nth {
		skip = n
	}
	for i := range 10_000 {
		id := fmt.Sprint("site", i)
		if p, _ := f.SiteOwner(SiteKey(id)); p.Name == name {
			if skip == 0 {
				return id
			}
			skip--
		}
	}
	t.Fatalf("%s owns too few of 10,000 sites", name)
	return ""
}

// ringServer is a whole server and the forwardNode through which it is a member of a ring.
type ringServer struct {
	*srvRig
	node *forwardNode
}

// newRingServers starts n servers named "a", "b" and so on. They form a ring and forward pushes to
// each other. The functions in change edit the configuration of each server.
func newRingServers(t testing.TB, n int, change ...func(*StoreConfig, *ServerConfig)) (all []*ringServer) {
	t.Helper()
	var nodes []*forwardNode
	for i := range n {
		name := string(rune('a' + i))
		node := newForwardNode(t, name, testKeys(t, 1))
		r := newSrvRig(t, append([]func(*StoreConfig, *ServerConfig){func(_ *StoreConfig, c *ServerConfig) {
			c.Name, c.Forwarder = name, node.Forwarder
		}}, change...)...)
		node.store = r.server.storeForwarded
		all, nodes = append(all, &ringServer{r, node}), append(nodes, node)
	}
	join(1, nodes...)
	return all
}

// changeSealVersion is an HTTP transport that raises the version of the seal in the envelope of
// each forwarded push by one.
type changeSealVersion struct{ next http.RoundTripper }

func (o changeSealVersion) RoundTrip(r *http.Request) (*http.Response, error) {
	sealed, err := base64.RawURLEncoding.DecodeString(r.Header.Get(envelopeHeader))
	if err != nil {
		return nil, err
	}
	sealed[0]++
	r = r.Clone(r.Context())
	r.Header.Set(envelopeHeader, base64.RawURLEncoding.EncodeToString(sealed))
	return o.next.RoundTrip(r)
}

// hangs is an HTTP transport that never returns an answer. Each request fails when its context
// ends.
type hangs struct{}

func (hangs) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// recordAnswer is an HTTP transport that keeps a copy of the body of the last answer in the field
// body.
type recordAnswer struct {
	next http.RoundTripper
	body []byte
}

func (s *recordAnswer) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := s.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	s.body, err = io.ReadAll(resp.Body)
	resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(s.body))
	return resp, err
}

// swapBody is an HTTP transport that replaces the body of every request by the field body.
type swapBody struct {
	body []byte
	next http.RoundTripper
}

func (s swapBody) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(s.body)), int64(len(s.body))
	return s.next.RoundTrip(r)
}

// loseAnswer is an HTTP transport that sends each request and waits for its answer, but then
// returns an error instead of the answer.
type loseAnswer struct {
	next http.RoundTripper
	lost func() // called after the answer to a request was dropped
}

func (l loseAnswer) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	l.lost()
	return nil, errors.New("the answer is lost")
}
