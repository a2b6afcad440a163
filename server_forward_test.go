package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// forwardNode is a member with a real listener. Unless a test says otherwise, it takes
// each push and answers its own name.
type forwardNode struct {
	*Forwarder
	url   string
	store storeForwardedFunc
	down  atomic.Bool // the network drops what comes
	last  atomic.Pointer[http.Request]
	body  atomic.Pointer[[]byte]

	mu     sync.Mutex // guards the rest
	pushes []takenPush
	answer func() (*pushResponse, error) // nil: 200
}

type takenPush struct {
	push pushRequest
	body string
}

// receiver is the handler that gets what others forward.
func (n *forwardNode) receiver() http.Handler {
	return n.Handler(func(ctx context.Context, push *pushRequest, body []byte) (*pushResponse, error) {
		return n.store(ctx, push, body)
	})
}

func (n *forwardNode) answerName(_ context.Context, push *pushRequest, body []byte) (*pushResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pushes = append(n.pushes, takenPush{*push, string(body)})
	if n.answer != nil {
		return n.answer()
	}
	return &pushResponse{Status: http.StatusOK, Result: resultAccepted, Body: []byte(n.cfg.Name)}, nil
}

// took returns how many pushes n took of others.
func (n *forwardNode) took() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.pushes)
}

// push has n forward a push with the given body, and returns the body of the answer: the
// name of the member that took the push, or "" if n has to take it itself.
func (n *forwardNode) push(ctx context.Context, id, body string) string {
	a := n.TryForward(ctx, &pushRequest{ClusterID: id, Arrival: 5, Type: "text/plain"}, []byte(body))
	if a == nil {
		return ""
	}
	return string(a.Body)
}

func newForwardNode(t testing.TB, name string, keys Keys) *forwardNode {
	t.Helper()
	n := &forwardNode{}
	box, err := NewMessageSealer(keys, "telemeter")
	if err != nil {
		t.Fatal(err)
	}
	n.Forwarder = NewForwarder(ForwarderConfig{
		Name: name, Sealer: box, Client: NewHTTPClient(nil, time.Minute, 10*time.Second), Metrics: NewMetrics(),
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

// join gives all the same view: everyone is live, with the session given.
func join(session uint64, nodes ...*forwardNode) {
	var claims []Claim
	peers := map[string]RingMember{}
	for i, n := range nodes {
		claims = append(claims, Claim{Slot: i, Lamport: uint64(i + 1), Name: n.cfg.Name})
		peers[n.cfg.Name] = RingMember{Name: n.cfg.Name, Addr: strings.TrimPrefix(n.url, "http://"), Session: session}
	}
	for _, n := range nodes {
		n.SetView(&RingView{Ring: NewRing(claims, 0), Members: peers})
	}
}

// ownedBy returns the nth cluster ID that the member owns.
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
	t.Fatalf("%s owns too little", name)
	return ""
}

// ringServer is a server that is a member of a ring.
type ringServer struct {
	*srvRig
	node *forwardNode
}

// newRingServers returns servers named "a", "b" … that forward to each other.
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

// samples returns how many samples the server holds of a site.
func (r *srvRig) samples(id string) int {
	for _, c := range r.store.Stats().Sites {
		if c.ID == id {
			return int(c.Samples)
		}
	}
	return 0
}

func TestForward(t *testing.T) {
	keys := testKeys(t, 1)
	a, b := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys)
	ctx := t.Context()
	if got := a.push(ctx, "x", "alone"); got != "" {
		t.Errorf("alone, a server has its push taken by %q", got)
	}
	join(1, a, b)
	if got := a.push(ctx, ownedBy(t, a.Forwarder, "a"), "its own"); got != "" || a.took() > 0 {
		t.Errorf("its own push is taken by %q", got)
	}

	// The owner gets the push as it came, and its answer comes back as it is.
	up := pushRequest{
		ClusterID: ownedBy(t, a.Forwarder, "b"), Labels: map[string]string{"region": "eu", "note": "<\u00e9\">"}, Arrival: 1_700_000_000_123,
		Type: "text/plain; version=0.0.4", Encoding: "gzip", Spool: "00000000000000ab 1-4,9", Consumers: "00000000000000cd:7",
	}
	bodies := []string{"", "a 1\n", "\x00\xff\x1f\x8b", strings.Repeat("z", 1<<20)}
	answers := []*pushResponse{
		{Status: 200, Result: resultAccepted, Body: []byte("{\"accepted\":1}\n")},
		{Status: 200, Result: resultAccepted, Body: []byte("{}\n"), AllUntimely: true},
		{Status: 400, Result: resultMalformed, Body: []byte("line 1: <html> \xff\n")},
		{Status: 413, Result: resultTooLarge, Body: []byte("too large\n")},
		{Status: 415, Result: resultUnsupported, Body: []byte("what?\n")},
		{Status: 429, Result: resultRateLimited, Body: []byte("too fast\n"), RetryAfter: 7},
		{Status: 503, Result: resultFull, Body: []byte("no room\n"), RetryAfter: 60},
		{Status: 503, Result: resultFailed, Body: bytes.Repeat([]byte("x"), 100<<10), RetryAfter: 30},
	}
	for i, answer := range answers {
		body := bodies[i%len(bodies)]
		b.answer = func() (*pushResponse, error) { return answer, nil }
		got := a.TryForward(ctx, &up, []byte(body))
		if !reflect.DeepEqual(got, answer) {
			t.Errorf("the owner answered %+v, the receiver has %+v", answer, got)
		}
		if last := b.pushes[len(b.pushes)-1]; !reflect.DeepEqual(last.push, up) || last.body != body {
			t.Errorf("push %d: the owner got %+v and a body of %d bytes", i, last.push, len(last.body))
		}
	}
	if b.took() != len(answers) || a.took() != 0 {
		t.Errorf("%d pushes were taken, %d of them by the receiver", b.took(), a.took())
	}
	counted := func(c *Counter, want map[string]float64) {
		t.Helper()
		for result, n := range want {
			if got := c.Value(result); got != n {
				t.Errorf("%v counted as %s, want %v", got, result, n)
			}
		}
	}
	counted(a.sentTotal, map[string]float64{"accepted": 2, "refused": 6, "kept": 0})
	counted(b.receivedTotal, map[string]float64{"accepted": 2, "refused": 6, "returned": 0})

	// A push that the owner returns, and one for an owner that is away, is the receiver's.
	b.answer = func() (*pushResponse, error) { return nil, errors.New("not ready") }
	if got := a.push(ctx, up.ClusterID, "returned"); got != "" {
		t.Errorf("a push that was returned is taken by %q", got)
	}
	b.answer = nil
	b.down.Store(true)
	if got := a.push(ctx, up.ClusterID, "down"); got != "" {
		t.Errorf("a push for an owner that is down is taken by %q", got)
	}
	b.down.Store(false)
	counted(a.sentTotal, map[string]float64{"kept": 2})
	counted(b.receivedTotal, map[string]float64{"returned": 1})
	// The sender of a push that has gone tries again: nothing is kept for it.
	gone, cancel := context.WithCancel(ctx)
	cancel()
	a.push(gone, up.ClusterID, "gone")
	counted(a.sentTotal, map[string]float64{"kept": 2})

	// A push is forwarded once: b takes it, though a is the owner by b's view.
	b.SetView(&RingView{Ring: NewRing([]Claim{{Slot: 0, Lamport: 1, Name: "a"}}, 0), Members: b.View().Members})
	if got := a.push(ctx, up.ClusterID, "once"); got != "b" || a.took() != 0 {
		t.Errorf("taken by %q, and %d pushes came back", got, a.took())
	}
}

// The longest head that the limits on headers allow still fits.
func TestForwardLongHead(t *testing.T) {
	keys := testKeys(t, 1)
	a, b := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys)
	join(1, a, b)
	names := ScrapeNames{SpoolID: 1<<64 - 1}
	for i := range uint64(MaxPushRanges) {
		names.Numbers = names.Numbers.Add(MaxScrapeNumber-1000+4*i, MaxScrapeNumber-998+4*i)
	}
	var consumers []ConsumerAge
	for i := range MaxConsumers {
		consumers = append(consumers, ConsumerAge{uint64(i), consumerIdle})
	}
	up := pushRequest{
		ClusterID: ownedBy(t, a.Forwarder, "b"), Labels: map[string]string{"note": strings.Repeat("x", 1000)}, Arrival: 1_700_000_000_123,
		Type: protoType, Encoding: "gzip", Spool: names.String(), Consumers: FormatConsumers(consumers),
	}
	if got := a.TryForward(t.Context(), &up, []byte("x")); got == nil || !reflect.DeepEqual(b.pushes[0].push, up) {
		t.Errorf("a head with %d bytes of numbers and %d of consumers was answered %v", len(up.Spool), len(up.Consumers), got)
	}
	// A longer one is not sent: the owner would count it as forged.
	up.Labels["note"] = strings.Repeat("x", maxEnvelope)
	if got := a.TryForward(t.Context(), &up, []byte("x")); got != nil || a.sentTotal.Value("kept") != 1 || b.receivedTotal.Value("forged") != 0 {
		t.Errorf("a head that is too long was answered %v, and %v were counted as forged", got, b.receivedTotal.Value("forged"))
	}
}

// An owner that hangs keeps nobody waiting once it is known to be dead, and only
// so many until then.
func TestForwardHangingOwner(t *testing.T) {
	keys := testKeys(t, 1)
	a, b, c := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys), newForwardNode(t, "c", keys)
	join(1, a, b, c)
	asked := make(chan struct{}, 100)
	hang := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		asked <- struct{}{}
		<-r.Context().Done()
	}))
	defer hang.Close()
	v := *a.View()
	v.Members = maps.Clone(v.Members)
	v.Members["b"] = RingMember{Name: "b", Addr: strings.TrimPrefix(hang.URL, "http://"), Session: 1}
	a.SetView(&v)
	id := ownedBy(t, a.Forwarder, "b")
	took := make(chan string, maxForwards)
	var wg sync.WaitGroup
	for range maxForwards {
		wg.Go(func() {
			took <- a.push(t.Context(), id, "m 1\n")
		})
	}
	for range maxForwards {
		<-asked
	}
	// One more does not wait, and the receiver takes its push.
	if got := a.push(t.Context(), id, "m 2\n"); got != "" || a.sentTotal.Value("kept") != 1 {
		t.Errorf("one more is taken by %q", got)
	}
	// The owner is known to be dead: those that wait go to the next one.
	claims := []Claim{{Slot: 0, Lamport: 1, Name: "a"}, {Slot: 2, Lamport: 3, Name: "c"}}
	next := &RingView{Ring: NewRing(claims, 3), Members: map[string]RingMember{"a": v.Members["a"], "c": v.Members["c"]}}
	a.SetView(next)
	wg.Wait()
	heir := "c"
	if _, self := a.SiteOwner(SiteKey(id)); self {
		heir = ""
	}
	for range maxForwards {
		if got := <-took; got != heir {
			t.Fatalf("a push that waited is taken by %q, want %q", got, heir)
		}
	}
	if n := a.sentTotal.Value("kept"); n != 1 {
		t.Errorf("%v pushes kept", n)
	}
}

// Pushes that wait for an owner, however many, don't block the pushes of other sites.
func TestForwardKeepsNobodyWaiting(t *testing.T) {
	r := newSrvRig(t)
	f := newForwardNode(t, "a", testKeys(t, 1))
	hung, asked := make(chan struct{}), make(chan struct{}, 100)
	owner := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		io.Copy(io.Discard, req.Body)
		asked <- struct{}{}
		<-hung
	}))
	defer owner.Close()
	defer close(hung)
	f.SetView(&RingView{
		Ring:    NewRing([]Claim{{Slot: 0, Lamport: 1, Name: "a"}, {Slot: 1, Lamport: 2, Name: "b"}}, 0),
		Members: map[string]RingMember{"a": {Name: "a"}, "b": {Name: "b", Addr: strings.TrimPrefix(owner.URL, "http://")}},
	})
	r.server.cfg.Forwarder = f.Forwarder
	r.server.decoding = newSemaphore(4) // as few as on the smallest machine
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	waiting := 0
	for i := 0; waiting < 4*cap(r.server.decoding); i++ {
		id := fmt.Sprint("away", i)
		if _, self := f.SiteOwner(SiteKey(id)); self {
			continue
		}
		waiting++
		go func() {
			req, err := http.NewRequestWithContext(ctx, "POST", r.external.URL+"/upload", strings.NewReader("up 1\n"))
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Authorization", "Bearer "+r.token(KindUpload, id))
			if resp, err := http.DefaultClient.Do(req); err == nil {
				resp.Body.Close()
			}
		}()
	}
	for range waiting {
		<-asked
	}
	r.accepted(r.push(ownedBy(t, f.Forwarder, "a"), "up 1\n"))
}

// A server refuses and counts a forwarded push that is not from a member or not addressed
// to this server, and its answer reveals nothing. A host without the key cannot forge the
// answer that a push is stored.
func TestForwardTrustsNobody(t *testing.T) {
	keys := testKeys(t, 1)
	a, b, c := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys), newForwardNode(t, "c", testKeys(t, 2))
	join(1, a, b, c)
	id := ownedBy(t, a.Forwarder, "b")
	earlier := &recordAnswer{next: a.cfg.Client.Transport}
	a.cfg.Client.Transport = earlier
	if got := a.push(t.Context(), id, "m 1\n"); got != "b" {
		t.Fatalf("taken by %q", got)
	}
	a.cfg.Client.Transport = earlier.next
	captured, body := b.last.Load(), *b.body.Load()
	send := func(header string, body []byte) (int, string) {
		rec := httptest.NewRecorder()
		req := httptest.NewRequest("POST", forwardPath, bytes.NewReader(body))
		req.Header.Set(envelopeHeader, header)
		b.receiver().ServeHTTP(rec, req)
		if text := rec.Body.String(); rec.Code == 200 || strings.Contains(text, "b") && strings.Contains(text, id) {
			t.Errorf("answered %d %q", rec.Code, text)
		}
		return rec.Code, rec.Body.String()
	}
	sealed := captured.Header.Get(envelopeHeader)
	seal := func(h any) string {
		plain, err := json.Marshal(h)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(b.cfg.Sealer.Seal(nil, plain, envelopeSeal, nil, 0))
	}
	valid := forwardEnvelope{Version: envelopeVersion, From: "a", FromSession: 1, To: "b", ToSession: 1, Sequence: 100, Push: pushRequest{ClusterID: id}}
	change := func(f func(*forwardEnvelope)) string {
		h := valid
		f(&h)
		return seal(h)
	}
	count := func(result string) float64 { return b.receivedTotal.Value(result) }
	flipped := bytes.Clone(body)
	flipped[len(flipped)-1] ^= 1
	unsealed, err := base64.RawURLEncoding.DecodeString(sealed)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name, result string
		prepare      func()
		head         string
		body         []byte
	}{
		{"replayed", "replayed", nil, sealed, body},
		{"no header", "forged", nil, "", body},
		{"garbage", "forged", nil, base64.RawURLEncoding.EncodeToString([]byte{sealVersion, 0, 0}), body},
		{"truncated", "forged", nil, sealed[:len(sealed)-4], body},
		{"too long", "forged", nil, strings.Repeat("A", 2*maxEnvelope), body},
		{"a head that is none", "malformed", nil, seal("x"), body},
		{"of another version of seals", "version", nil, base64.RawURLEncoding.EncodeToString(append([]byte{sealVersion + 1}, unsealed[1:]...)), body},
		{"of another version of envelopes", "version", nil, change(func(h *forwardEnvelope) { h.Version = 2 }), body},
		{"of a version with other fields", "version", nil, seal(map[string]any{"v": 2, "To": 7}), body},
		{"of no version", "version", nil, seal(map[string]any{"To": "b"}), body},
		{"no site", "malformed", nil, change(func(h *forwardEnvelope) { h.Push.ClusterID = "" }), body},
		{"a site that is none", "malformed", nil, change(func(h *forwardEnvelope) { h.Push.ClusterID = "a b" }), body},
		{"for another member", "misrouted", nil, change(func(h *forwardEnvelope) { h.To = "c" }), body},
		{"for another session", "misrouted", nil, change(func(h *forwardEnvelope) { h.ToSession = 2 }), body},
		{"of an earlier session", "replayed", nil, change(func(h *forwardEnvelope) { h.FromSession = 0 }), body},
		{"another push's body", "forged", nil, seal(valid), body},
		{"of another session of ours", "misrouted", func() { join(2, a, b, c) }, sealed, body},
	}
	for _, tt := range tests {
		if tt.prepare != nil {
			tt.prepare()
		}
		before := count(tt.result)
		code, text := send(tt.head, tt.body)
		if code != http.StatusForbidden || strings.Contains(text, "version") != (tt.result == "version") {
			t.Errorf("%s: %d %s", tt.name, code, text)
		}
		if count(tt.result) != before+1 {
			t.Errorf("%s: not counted as %s", tt.name, tt.result)
		}
	}
	join(1, a, b, c)
	if b.took() != 1 {
		t.Errorf("%d pushes were taken, not the first alone", b.took())
	}
	// Another member's answer, and that of a stranger, is none: the receiver takes the push.
	for name, impostor := range map[string]http.HandlerFunc{
		"a bare 200": func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "{}") },
		"another's seal": func(w http.ResponseWriter, r *http.Request) {
			w.Write(c.cfg.Sealer.Seal(nil, []byte("{}"), answerSeal, nil, 0))
		},
		"the owner's own answer to an earlier request": func(w http.ResponseWriter, r *http.Request) { w.Write(earlier.body) },
		"a reflection": func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) },
		"an answer of no status": func(w http.ResponseWriter, r *http.Request) {
			sealed, _ := base64.RawURLEncoding.DecodeString(r.Header.Get(envelopeHeader))
			w.Write(b.cfg.Sealer.Seal(nil, []byte("{}"), answerSeal, sealed, 0))
		},
		"an answer to another request": func(w http.ResponseWriter, r *http.Request) {
			w.Write(b.cfg.Sealer.Seal(nil, []byte("{}"), answerSeal, []byte("other"), 0))
		},
	} {
		srv := httptest.NewServer(impostor)
		v := *a.View()
		v.Members = map[string]RingMember{"a": v.Members["a"], "b": {Name: "b", Addr: strings.TrimPrefix(srv.URL, "http://"), Session: 1}}
		a.SetView(&v)
		before := a.sentTotal.Value("kept")
		if got := a.TryForward(t.Context(), &pushRequest{ClusterID: id}, nil); got != nil || a.sentTotal.Value("kept") != before+1 {
			t.Errorf("%s was believed: %+v", name, got)
		}
		srv.Close()
	}
	join(1, a, b, c)
	// A body that belongs to another head.
	a.cfg.Client.Transport = swapBody{flipped, a.cfg.Client.Transport}
	before := count("forged")
	if got := a.push(t.Context(), id, "m 1\n"); got != "" || count("forged") != before+1 || b.took() != 1 {
		t.Errorf("a foreign body was taken by %q", got)
	}
}

// changeSealVersion makes the seal of an envelope one of another version.
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

// A member of another version is told so, and the log of the server that keeps the push says it.
func TestForwardOtherVersion(t *testing.T) {
	keys := testKeys(t, 1)
	a, b := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys)
	join(1, a, b)
	log := &logBuffer{}
	a.cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	a.cfg.Client.Transport = changeSealVersion{a.cfg.Client.Transport}
	if got := a.push(t.Context(), ownedBy(t, a.Forwarder, "b"), "m 1\n"); got != "" || a.sentTotal.Value("kept") != 1 || b.receivedTotal.Value("version") != 1 {
		t.Errorf("taken by %q, %v counted", got, b.receivedTotal.Value("version"))
	}
	if text := log.String(); !strings.Contains(text, fmt.Sprintf("it has version %d; this program knows version %d", sealVersion+1, sealVersion)) {
		t.Errorf("the log says:\n%s", text)
	}
}

// A member takes no more at once than it has memory for; the receiver takes the rest.
func TestForwardOverloaded(t *testing.T) {
	keys := testKeys(t, 1)
	a, b := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys)
	join(1, a, b)
	id := ownedBy(t, a.Forwarder, "b")
	for range maxForwards {
		b.receiving.TryAcquire()
	}
	if got := a.push(t.Context(), id, "m 1\n"); got != "" || b.receivedTotal.Value("overloaded") != 1 {
		t.Errorf("taken by %q, %v refused", got, b.receivedTotal.Value("overloaded"))
	}
	b.receiving.Release()
	if got := a.push(t.Context(), id, "m 1\n"); got != "b" {
		t.Errorf("with room again: taken by %q", got)
	}
}

// Of each sender every request counts once, and none of an earlier session.
func TestForwardReplay(t *testing.T) {
	f := newForwardNode(t, "a", testKeys(t, 1)).Forwarder
	for i, c := range []struct {
		from           string
		session, count uint64
		want           bool
	}{
		{"b", 2, 1, true}, {"b", 2, 1, false}, {"b", 1, 2, false}, {"b", 2, 3, true}, {"b", 2, 2, true},
		{"c", 1, 1, true}, {"b", 3, 1, true}, {"b", 2, 4, false}, {"b", 3, 2, true},
	} {
		if got := f.acceptSequence(forwardEnvelope{From: c.from, FromSession: c.session, Sequence: c.count}); got != c.want {
			t.Errorf("request %d, %+v: accepted %v", i, c, got)
		}
	}
}

type hangs struct{}

func (hangs) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// A push that waits for a hung owner gives up once the owner is known to be dead or to have
// restarted. It also gives up, after a limit, on an owner that stays alive.
func TestForwardGivesUp(t *testing.T) {
	for name, c := range map[string]struct {
		session uint64 // of the owner, in the next view; 0: it is live no more
		want    time.Duration
	}{"dead": {0, 0}, "begun anew": {2, 0}, "alive": {1, forwardTimeout}} {
		f := newForwardNode(t, "a", testKeys(t, 1)).Forwarder
		f.cfg.Client = &http.Client{Transport: hangs{}}
		synctest.Test(t, func(t *testing.T) {
			owner := RingMember{Name: "b", Addr: "b:1", Session: 1}
			f.SetView(&RingView{Ring: NewRing(nil, 0), Members: map[string]RingMember{"b": owner}})
			begin := time.Now()
			answered := make(chan error, 1)
			go func() {
				_, err := f.send(t.Context(), owner, &pushRequest{ClusterID: "x"}, nil)
				answered <- err
			}()
			synctest.Wait()
			next := map[string]RingMember{}
			if c.session > 0 {
				next["b"] = RingMember{Name: "b", Addr: "b:1", Session: c.session}
			}
			f.SetView(&RingView{Ring: NewRing(nil, 0), Members: next})
			if err := <-answered; err == nil || time.Since(begin) != c.want {
				t.Errorf("%s: %v after %v, want an error after %v", name, err, time.Since(begin), c.want)
			}
		})
	}
}

// recordAnswer keeps the body of the last answer.
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

type swapBody struct {
	body []byte
	next http.RoundTripper
}

func (s swapBody) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(s.body)), int64(len(s.body))
	return s.next.RoundTrip(r)
}

func TestForwardKeysRotate(t *testing.T) {
	old, both := testKeys(t, 1), testKeys(t, 2, 1)
	a, b := newForwardNode(t, "a", old), newForwardNode(t, "b", old)
	join(1, a, b)
	id := ownedBy(t, a.Forwarder, "b")
	oldID := SealedKeyID(a.cfg.Sealer.Seal(nil, nil, "", nil, 0))
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"before", func() error { return nil }},
		{"the owner has the new key", func() error { return b.cfg.Sealer.SetKeys(both) }},
		{"the sender too, and knows what the owner holds", func() error {
			v := *a.View()
			v.Members = map[string]RingMember{"a": v.Members["a"], "b": v.Members["b"]}
			p := v.Members["b"]
			p.KeyID = oldID
			v.Members["b"] = p
			a.SetView(&v)
			return errors.Join(a.cfg.Sealer.SetKeys(both), b.cfg.Sealer.SetKeys(old))
		}},
		{"both", func() error { return b.cfg.Sealer.SetKeys(both) }},
		{"the old one is gone", func() error {
			fresh := testKeys(t, 2)
			return errors.Join(a.cfg.Sealer.SetKeys(fresh), b.cfg.Sealer.SetKeys(fresh))
		}},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if got := a.push(t.Context(), id, "m 1\n"); got != "b" {
			t.Errorf("%s: taken by %q", step.name, got)
		}
	}
}

// times returns the times of the samples that the server holds of a site, in ms after
// testNow.
func (r *srvRig) times(id string) (times []int64) {
	r.store.ViewSite(id, func(held *SiteSamples) {
		for _, b := range held.Batches {
			for i := range b.V {
				times = append(times, b.Time(i)-testNow.UnixMilli())
			}
		}
	})
	return times
}

// A push that reaches another server is answered as its owner answers it, and nothing of
// it stays at the receiver but what alerts go by.
func TestForwardedPushAnswer(t *testing.T) {
	big := strings.Repeat("# a comment is content too\n", 70)
	for _, c := range []struct {
		name    string
		owner   func(b *ringServer)
		body    string
		header  map[string]string
		status  int
		retry   string
		samples int
	}{
		{"taken", nil, "m 1\nn 2\n", nil, 200, "", 2},
		{"gzip", nil, string(gzipped([]byte("m 1\n"))), map[string]string{"Content-Encoding": "gzip"}, 200, "", 1},
		{"OpenMetrics", nil, "# TYPE c counter\nc_total 1 # {t=\"x\"} 1\n# EOF\n", map[string]string{"Content-Type": omType}, 200, "", 1},
		{"named", nil, "m 1\n", map[string]string{SpoolHeader: "00000000000000ab 7"}, 200, "", 1},
		{"a question", nil, "", map[string]string{SpoolHeader: "00000000000000ab"}, 200, "", 0},
		{"untimely", nil, "m 1 5\n", nil, 200, "", 0},
		{"malformed", nil, "m{ 1\n", nil, 400, "", 0},
		{"too large", func(b *ringServer) { b.server.cfg.LimitBytes = 1 << 10 }, big, nil, 413, "", 0},
		{"too many series", func(b *ringServer) { b.store.cfg.LimitSeries = 1 }, "m 1\nn 1\n", nil, 413, "", 0},
		{"too fast", func(b *ringServer) {
			b.server.sites = NewSitePushLimiter(7 * time.Second)
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
		{"its clock in doubt", func(b *ringServer) {
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
				return to.do(srvRequest{method: "POST", url: to.external.URL + "/upload", token: to.token(KindUpload, id), header: c.header, body: []byte(c.body)})
			}
			direct, id := push(b, ownedBy(t, b.node.Forwarder, "b", 1)), ownedBy(t, b.node.Forwarder, "b")
			got := push(a, id)
			if got.status != c.status || got.header.Get("Retry-After") != c.retry {
				t.Errorf("%d %v %s", got.status, got.header, got.body)
			}
			if got.status != direct.status || got.body != direct.body || got.header.Get("Retry-After") != direct.header.Get("Retry-After") ||
				got.header.Get("Content-Type") != direct.header.Get("Content-Type") {
				t.Errorf("answered:\n%d %v %s\nand straight to the owner:\n%d %v %s", got.status, got.header, got.body, direct.status, direct.header, direct.body)
			}
			if a.samples(id) != 0 || b.samples(id) != c.samples {
				t.Errorf("the receiver holds %d samples, the owner %d, want %d", a.samples(id), b.samples(id), c.samples)
			}
			failed := c.status != 200 || c.name == "untimely"
			if shown := strings.Contains(a.held(id, ""), PushFailureTimeName+`{_id="`+id+`",instance="",job="",server="a"}`); shown != failed {
				t.Errorf("the receiver shows that the push failed: %t", shown)
			}
			if n := a.node.sentTotal.Value("accepted") + a.node.sentTotal.Value("refused"); n != 1 || a.server.pushesTotal.Value("accepted") != map[bool]float64{true: 1}[c.status == 200] {
				t.Errorf("%v pushes were answered by the owner", n)
			}
		})
	}
}

// A push that its owner cannot take is the receiver's: with the time at which it arrived
// there, and with an answer of the receiver. It is never forwarded twice.
func TestForwardedPushKept(t *testing.T) {
	ms := testNow.UnixMilli()
	timed := fmt.Sprintf("m 1 %d\n", ms)
	for _, c := range []struct {
		name  string
		owner func(a, b *ringServer)
		body  string
		taker string
		times []int64
	}{
		{"owner is well", nil, "m 1\n", "b", []int64{0}},
		{"owner is down", func(_, b *ringServer) { b.node.down.Store(true) }, "m 1\n", "a", []int64{0}},
		{"owner is not ready", func(_, b *ringServer) { b.server.SetReady(false) }, "m 1\n", "a", []int64{0}},
		{"owner's clock is a little ahead", func(_, b *ringServer) { b.clock.Store(int64(30 * time.Second)) }, "m 1\n", "b", []int64{0}},
		{"owner's clock is ahead, within retention", func(_, b *ringServer) { b.clock.Store(int64(time.Hour)) }, "m 1\n", "b", []int64{0}},
		{"owner's clock is far ahead", func(_, b *ringServer) { b.clock.Store(int64(3 * time.Hour)) }, "m 1\n", "a", []int64{0}},
		{"owner's clock is far ahead, samples with a time", func(_, b *ringServer) { b.clock.Store(int64(3 * time.Hour)) }, timed, "a", []int64{0}},
		{"owner's clock is behind", func(_, b *ringServer) { b.clock.Store(-int64(time.Hour)) }, timed, "a", []int64{0}},
		{"owner's clock is far ahead, one sample is of its time", func(_, b *ringServer) { b.clock.Store(int64(3 * time.Hour)) },
			timed + fmt.Sprintf("n 1 %d\n", ms+3*3600_000), "b", []int64{3 * 3600_000}},
		{"untimely for both, clocks agree", nil, "m 1 5\n", "b", nil},
		{"untimely for both, clocks differ", func(_, b *ringServer) { b.clock.Store(int64(3 * time.Hour)) }, "m 1 5\n", "a", nil},
		{"malformed, clocks differ", func(_, b *ringServer) { b.clock.Store(int64(3 * time.Hour)) }, "m{\n", "", nil},
		{"each thinks that the other is the owner", func(a, b *ringServer) {
			b.node.SetView(&RingView{Ring: NewRing([]Claim{{Slot: 0, Lamport: 1, Name: "a"}}, 0), Members: b.node.View().Members})
		}, "m 1\n", "b", []int64{0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ring := newRingServers(t, 2)
			a, b := ring[0], ring[1]
			id := ownedBy(t, a.node.Forwarder, "b")
			if c.owner != nil {
				c.owner(a, b)
			}
			got := a.push(id, c.body)
			if c.taker == "" {
				if got.status != 400 || a.samples(id)+b.samples(id) > 0 {
					t.Errorf("%d %s", got.status, got.body)
				}
				return
			}
			if answer := a.accepted(got); answer.Server != c.taker {
				t.Errorf("taken by %q, want %q: %s", answer.Server, c.taker, got.body)
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
				t.Errorf("%v pushes came back to the receiver", n)
			}
		})
	}
}

// loseAnswer loses every answer that came.
type loseAnswer struct {
	next http.RoundTripper
	lost func()
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

// When the owner's answer is lost the receiver keeps the push as well. Both then serve the
// same samples with the same times, which a consumer keeps once: samples with a time keep
// it, others have the time of arrival at the receiver.
func TestForwardedPushAnswerLost(t *testing.T) {
	ms := testNow.UnixMilli()
	ring := newRingServers(t, 2)
	a, b := ring[0], ring[1]
	b.clock.Store(int64(20 * time.Second))
	a.node.cfg.Client = &http.Client{Transport: loseAnswer{http.DefaultTransport, func() { a.clock.Store(int64(5 * time.Second)) }}}
	id := ownedBy(t, a.node.Forwarder, "b")
	if answer := a.accepted(a.push(id, fmt.Sprintf("m 1\nn 2 %d\n", ms-60_000))); answer.Server != "a" || answer.Accepted != 2 {
		t.Errorf("answered %+v", answer)
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

// When the owner dies while it has a push, the next owner takes it, or the receiver if that
// is the next; with the arrival time of the head at the receiver.
func TestForwardedPushOwnerDies(t *testing.T) {
	for _, left := range []string{"ac", "a"} {
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
			t.Errorf("%s are left: %s", left, got.body)
		}
		for _, r := range ring {
			want := []int64(nil)
			if r.node.cfg.Name == heir {
				want = []int64{0}
			}
			if times := r.times(id); !slices.Equal(times, want) {
				t.Errorf("%s are left: %s holds samples of %v ms, want %v", left, r.node.cfg.Name, times, want)
			}
		}
		if n := a.node.sentTotal.Value("kept"); n != 0 {
			t.Errorf("%s are left: %v pushes were kept for an owner", left, n)
		}
	}
}

// Nothing is taken but a whole push of a site, whatever a member seals or a stranger sends.
func FuzzForwardReceive(f *testing.F) {
	node := newForwardNode(f, "b", testKeys(f, 1))
	node.SetView(&RingView{Ring: NewRing(nil, 0), Members: map[string]RingMember{"b": {Name: "b", Session: 1}}})
	var pushes []takenPush
	node.store = func(_ context.Context, push *pushRequest, body []byte) (*pushResponse, error) {
		pushes = append(pushes, takenPush{*push, string(body)})
		return &pushResponse{Status: http.StatusOK}, nil
	}
	handler := node.receiver()
	good, err := json.Marshal(forwardEnvelope{Version: envelopeVersion, From: "a", FromSession: 1, To: "b", ToSession: 1, Sequence: 1, Push: pushRequest{ClusterID: "x", Arrival: 5}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, []byte("m 1\n"), true)
	f.Add(good, []byte("m 1\n"), false)
	f.Add([]byte(`{"To":"b","ToSession":1,"v":1,"Push":{"ClusterID":"a\u0000"}}`), []byte{}, true)
	f.Add([]byte(`[]`), []byte{}, true)
	f.Fuzz(func(t *testing.T, plain, body []byte, sealed bool) {
		header, sent := plain, body
		if sealed {
			header = node.cfg.Sealer.Seal(nil, plain, envelopeSeal, nil, 0)
			sent = node.cfg.Sealer.Seal(nil, body, bodySeal, header, 0)
		}
		clear(node.senders)
		pushes = nil
		req := httptest.NewRequest("POST", forwardPath, bytes.NewReader(sent))
		req.Header.Set(envelopeHeader, base64.RawURLEncoding.EncodeToString(header))
		rec := httptest.NewRecorder()
		handler.ServeHTTP(rec, req)
		if (rec.Code == http.StatusOK) != (len(pushes) == 1) || len(pushes) > 1 {
			t.Fatalf("answered %d, and %d pushes were taken", rec.Code, len(pushes))
		}
		var h forwardEnvelope
		for _, p := range pushes {
			if !sealed || p.body != string(body) || CheckClusterID(p.push.ClusterID) != nil || json.Unmarshal(plain, &h) != nil || h.To != "b" {
				t.Errorf("%q was taken as %+v", plain, p)
			}
		}
	})
}

func FuzzBoxOpen(f *testing.F) {
	box, err := NewMessageSealer(testKeys(f, 1), "c")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(box.Seal(nil, []byte("x"), "p", nil, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		if plain, err := box.Open(nil, b, "other", nil); err == nil {
			t.Errorf("opened to %q", plain)
		}
	})
}

// BenchmarkForwardedPush: the CPU of a push of 500 series that reaches another server than
// its owner, with that of all who take part, as a multiple ("ratio") of the CPU of the same
// push straight to its owner. Both go over real connections of loopback.
func BenchmarkForwardedPush(b *testing.B) {
	ring := newRingServers(b, 2, func(s *StoreConfig, c *ServerConfig) {
		s.FS, s.Dir, s.LimitSeries, s.LimitSamples, s.LimitSites = nil, "", 20_000, 500_000_000, 100_000
		c.LimitBytes, c.RateInterval = 1<<20, 0
	})
	for _, r := range ring {
		// As a member serves it, without what the tests look at.
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
	// round pushes each body once, for a new site of b's.
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
				b.Fatalf("%d %s %v", resp.StatusCode, text, err)
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
