package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// forwardNode is a member with a store in memory and a real listener.
type forwardNode struct {
	*Forward
	store *Store
	url   string
	noted []string
	pace  error
	busy  atomic.Int64 // pushes that began and have not ended
	down  atomic.Bool  // the network drops what comes
	last  atomic.Pointer[http.Request]
	body  atomic.Pointer[[]byte]
}

func clusterKeys(t testing.TB, lines ...string) Keys {
	t.Helper()
	keys, err := ParseKeys([]byte(strings.Join(lines, "\n") + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// Keys of 32 equal bytes, in base64.
func testKey(b byte) string { return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32)) }

func newForwardNode(t *testing.T, name string, keys Keys) *forwardNode {
	t.Helper()
	n := &forwardNode{}
	store, err := OpenStore(StoreConfig{Retention: time.Hour, MaxSampleAge: time.Hour, LimitSeries: 100, Now: time.Now, OnError: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	box, err := NewBox(keys, "telemeter")
	if err != nil {
		t.Fatal(err)
	}
	n.store = store
	n.Forward = NewForward(ForwardConfig{
		Name: name, Store: store, Box: box, Client: HTTPClient(nil, time.Minute, 10*time.Second), Metrics: NewMetrics(),
		Log: slog.New(slog.DiscardHandler),
		Begin: func(string) (time.Duration, error) {
			if n.pace == nil {
				n.busy.Add(1)
			}
			return 7 * time.Second, n.pace
		},
		End:   func(string) { n.busy.Add(-1) },
		Noted: func(id string, note Note) { n.noted = append(n.noted, fmt.Sprint(id, note)) },
	})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n.down.Load() {
			panic(http.ErrAbortHandler)
		}
		b, _ := io.ReadAll(r.Body)
		n.body.Store(&b)
		n.last.Store(r)
		r.Body = io.NopCloser(bytes.NewReader(b))
		n.Handler().ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	n.url = srv.URL
	return n
}

// join gives all the same view: everyone is live, with the session given.
func join(session uint64, nodes ...*forwardNode) {
	var claims []Claim
	peers := map[string]Peer{}
	for i, n := range nodes {
		claims = append(claims, Claim{Slot: i, Lamport: uint64(i + 1), Name: n.cfg.Name})
		peers[n.cfg.Name] = Peer{Name: n.cfg.Name, Addr: strings.TrimPrefix(n.url, "http://"), Session: session}
	}
	for _, n := range nodes {
		n.SetView(&View{Ring: NewRing(claims, 0), Peers: peers})
	}
}

func forwardPush(t testing.TB, id string, n int) *Push {
	t.Helper()
	var p Push
	now := time.Now().UnixMilli()
	for i := range n {
		r := RawSample{Name: []byte("m"), T: now, V: float64(i), Labels: []Label{
			{[]byte(ClusterLabel), []byte(id)}, {[]byte("i"), fmt.Append(nil, i)}, {Name: []byte("instance")}, {Name: []byte("job")},
		}}
		if err := p.Add(&r); err != nil {
			t.Fatal(err)
		}
	}
	return &p
}

// ownedBy returns a cluster ID that the member owns.
func ownedBy(t *testing.T, f *Forward, name string) string {
	t.Helper()
	for i := range 10_000 {
		id := fmt.Sprint("site", i)
		if p, _ := f.Owner(id); p.Name == name {
			return id
		}
	}
	t.Fatalf("%s owns nothing", name)
	return ""
}

func heldAt(n *forwardNode, id string) int {
	for _, c := range n.store.Stats().Clusters {
		if c.ID == id {
			return int(c.Samples)
		}
	}
	return 0
}

func TestForward(t *testing.T) {
	keys := clusterKeys(t, testKey(1))
	a, b := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys)
	ctx := t.Context()

	// Alone, a server stores all itself.
	if res, err := a.Append(ctx, "x", forwardPush(t, "x", 3), Note{}); err != nil || res.Accepted != 3 || heldAt(a, "x") != 3 {
		t.Fatalf("%+v %v", res, err)
	}
	join(1, a, b)
	id := ownedBy(t, a.Forward, "b")
	res, err := a.Append(ctx, id, forwardPush(t, id, 5), Note{Expires: 9})
	if err != nil || res.Accepted != 5 {
		t.Fatalf("%+v %v", res, err)
	}
	if heldAt(a, id) != 0 || heldAt(b, id) != 5 {
		t.Errorf("a holds %d, b holds %d: the owner alone should", heldAt(a, id), heldAt(b, id))
	}
	if want := fmt.Sprint(id, Note{Expires: 9}); len(b.noted) != 1 || b.noted[0] != want {
		t.Errorf("noted %v, want %s", b.noted, want)
	}
	own := ownedBy(t, a.Forward, "a")
	if _, err := a.Append(ctx, own, forwardPush(t, own, 1), Note{}); err != nil || heldAt(a, own) != 1 {
		t.Errorf("its own push is not stored here: %v", err)
	}

	// The owner's refusals come back as what they are, and nothing is held here.
	if _, err := a.Append(ctx, id, forwardPush(t, id, 101), Note{}); !errors.Is(err, ErrSeriesLimit) {
		t.Errorf("got %v, want the owner's series limit", err)
	}
	b.store.cfg.Span = func() Span { return Span{time.Now(), time.Now().Add(24 * time.Hour)} }
	if _, err := a.Append(ctx, id, forwardPush(t, id, 1), Note{}); !errors.Is(err, ErrClock) {
		t.Errorf("got %v, want the owner's doubt of its clock", err)
	}
	b.store.cfg.Span = func() Span { return At(time.Now()) }
	b.pace = errors.New("too fast")
	var pace *ErrPace
	if _, err := a.Append(ctx, id, forwardPush(t, id, 1), Note{}); !errors.As(err, &pace) || pace.Retry != 7*time.Second {
		t.Errorf("got %v, want the owner's pace", err)
	}
	b.pace = nil
	if heldAt(a, id) != 0 {
		t.Error("a refused push is held here")
	}
	if n := b.busy.Load(); n != 0 {
		t.Errorf("%d more pushes began at the owner than ended", n)
	}

	// A push is forwarded once: b, for which a is the owner by now, keeps it.
	peers := b.View().Peers
	b.SetView(&View{Ring: NewRing([]Claim{{Slot: 0, Lamport: 1, Name: "a"}}, 0), Peers: peers})
	before := heldAt(b, id)
	// One series more than before: the others may be repeated, in the same millisecond.
	if _, err := a.Append(ctx, id, forwardPush(t, id, 6), Note{}); err != nil {
		t.Fatal(err)
	}
	if heldAt(b, id) == before && heldAt(a, id) == 0 {
		t.Error("the push is nowhere")
	}
	if heldAt(a, id) != 0 {
		t.Error("the push came back")
	}
	join(1, a, b)

	// An owner that cannot be reached costs nothing: the push is held here.
	b.down.Store(true)
	if res, err := a.Append(ctx, id, forwardPush(t, id, 4), Note{}); err != nil || res.Accepted != 4 || heldAt(a, id) != 4 {
		t.Errorf("%+v %v, %d held", res, err, heldAt(a, id))
	}
	if got := a.sent.Value("hinted"); got != 1 {
		t.Errorf("%v hints counted", got)
	}
	// A sender that has gone makes no hint: it will try again.
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := a.Append(gone, id, forwardPush(t, id, 1), Note{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// An owner that hangs keeps nobody waiting once it is known to be dead, and only
// so many until then.
func TestForwardHangingOwner(t *testing.T) {
	keys := clusterKeys(t, testKey(1))
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
	v.Peers = maps.Clone(v.Peers)
	v.Peers["b"] = Peer{Name: "b", Addr: strings.TrimPrefix(hang.URL, "http://"), Session: 1}
	a.SetView(&v)
	id := ownedBy(t, a.Forward, "b")
	var wg sync.WaitGroup
	for range maxForwards {
		wg.Go(func() {
			if _, err := a.Append(t.Context(), id, forwardPush(t, id, 3), Note{}); err != nil {
				t.Error(err)
			}
		})
	}
	for range maxForwards {
		<-asked
	}
	// One more does not wait, and its push is held here.
	if res, err := a.Append(t.Context(), id, forwardPush(t, id, 2), Note{}); err != nil || res.Accepted != 2 || heldAt(a, id) != 2 {
		t.Errorf("%+v %v, %d held", res, err, heldAt(a, id))
	}
	// The owner is known to be dead: those that wait go to the next one.
	claims := []Claim{{Slot: 0, Lamport: 1, Name: "a"}, {Slot: 2, Lamport: 3, Name: "c"}}
	next := &View{Ring: NewRing(claims, 3), Peers: map[string]Peer{"a": v.Peers["a"], "c": v.Peers["c"]}}
	a.SetView(next)
	wg.Wait()
	heir := c
	if _, self := a.Owner(id); self {
		heir = a
	}
	if heldAt(heir, id) < 3 || a.sent.Value("hinted") != 1 {
		t.Errorf("the heir holds %d, %v hints", heldAt(heir, id), a.sent.Value("hinted"))
	}
}

// Whatever number of pushes waits for an owner, other sites' pushes go on.
func TestForwardKeepsNobodyWaiting(t *testing.T) {
	r := newSrvRig(t)
	f := newForwardNode(t, "a", clusterKeys(t, testKey(1)))
	f.cfg.Store = r.store
	f.cfg.Noted = r.server.Noted
	hung, asked := make(chan struct{}), make(chan struct{}, 100)
	owner := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		io.Copy(io.Discard, req.Body)
		asked <- struct{}{}
		<-hung
	}))
	defer owner.Close()
	defer close(hung)
	f.SetView(&View{
		Ring:  NewRing([]Claim{{Slot: 0, Lamport: 1, Name: "a"}, {Slot: 1, Lamport: 2, Name: "b"}}, 0),
		Peers: map[string]Peer{"a": {Name: "a"}, "b": {Name: "b", Addr: strings.TrimPrefix(owner.URL, "http://")}},
	})
	r.server.cfg.Forward = f.Forward
	r.server.decoding = make(chan struct{}, 4) // as few as on the smallest machine
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	waiting := 0
	for i := 0; waiting < 4*cap(r.server.decoding); i++ {
		id := fmt.Sprint("away", i)
		if _, self := f.Owner(id); self {
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
	r.accepted(r.push(ownedBy(t, f.Forward, "a"), "up 1\n"))
}

// What is not from a member, or not for this one, is refused, counted, and tells
// nothing; and whoever does not hold the key cannot say that a push is stored.
func TestForwardTrustsNobody(t *testing.T) {
	keys := clusterKeys(t, testKey(1))
	a, b, c := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys), newForwardNode(t, "c", clusterKeys(t, testKey(2)))
	join(1, a, b, c)
	id := ownedBy(t, a.Forward, "b")
	earlier := &recordAnswer{next: a.cfg.Client.Transport}
	a.cfg.Client.Transport = earlier
	if _, err := a.Append(t.Context(), id, forwardPush(t, id, 2), Note{}); err != nil {
		t.Fatal(err)
	}
	a.cfg.Client.Transport = earlier.next
	captured, body := b.last.Load(), *b.body.Load()
	send := func(header string, body []byte) int {
		rec := httptest.NewRecorder()
		req := httptest.NewRequest("POST", forwardPath, bytes.NewReader(body))
		req.Header.Set(forwardHeader, header)
		b.Handler().ServeHTTP(rec, req)
		if text := rec.Body.String(); rec.Code == 200 || strings.Contains(text, "b") && strings.Contains(text, id) {
			t.Errorf("answered %d %q", rec.Code, text)
		}
		return rec.Code
	}
	head := captured.Header.Get(forwardHeader)
	count := func(result string) float64 { return b.taken.Value(result) }
	flipped := bytes.Clone(body)
	flipped[len(flipped)-1] ^= 1
	tests := []struct {
		name, result string
		prepare      func()
		head         string
		body         []byte
	}{
		{"replayed", "replayed", nil, head, body},
		{"no header", "forged", nil, "", body},
		{"garbage", "forged", nil, "AAAA", body},
		{"truncated", "forged", nil, head[:len(head)-4], body},
		{"too long", "forged", nil, strings.Repeat("A", 2*maxForwardHead), body},
		{"of another session of ours", "misrouted", func() { join(2, a, b, c) }, head, body},
	}
	for _, tt := range tests {
		if tt.prepare != nil {
			tt.prepare()
		}
		before := count(tt.result)
		send(tt.head, tt.body)
		if count(tt.result) != before+1 {
			t.Errorf("%s: not counted as %s", tt.name, tt.result)
		}
	}
	join(1, a, b, c)
	// Another member's answer, and that of a stranger, is none: the push is a hint.
	for name, impostor := range map[string]http.HandlerFunc{
		"a bare 200": func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "{}") },
		"another's seal": func(w http.ResponseWriter, r *http.Request) {
			w.Write(c.cfg.Box.Seal(nil, []byte("{}"), answerSeal, nil, 0))
		},
		"the owner's own answer to an earlier request": func(w http.ResponseWriter, r *http.Request) { w.Write(earlier.body) },
		"a reflection": func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) },
		"an answer to another request": func(w http.ResponseWriter, r *http.Request) {
			w.Write(b.cfg.Box.Seal(nil, []byte("{}"), answerSeal, []byte("other"), 0))
		},
	} {
		srv := httptest.NewServer(impostor)
		v := *a.View()
		v.Peers = map[string]Peer{"a": v.Peers["a"], "b": {Name: "b", Addr: strings.TrimPrefix(srv.URL, "http://"), Session: 1}}
		a.SetView(&v)
		before := a.sent.Value("hinted")
		if _, err := a.Append(t.Context(), id, forwardPush(t, id, 1), Note{}); err != nil || a.sent.Value("hinted") != before+1 {
			t.Errorf("%s was believed (%v)", name, err)
		}
		srv.Close()
	}
	join(1, a, b, c)
	// A body that belongs to another head.
	a.cfg.Client.Transport = swapBody{flipped, a.cfg.Client.Transport}
	before := count("forged")
	if _, err := a.Append(t.Context(), id, forwardPush(t, id, 1), Note{}); err != nil || count("forged") != before+1 {
		t.Errorf("a foreign body was taken (%v)", err)
	}
}

// A member takes no more at once than it has memory for; the sender holds the push.
func TestForwardOverloaded(t *testing.T) {
	keys := clusterKeys(t, testKey(1))
	a, b := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys)
	join(1, a, b)
	id := ownedBy(t, a.Forward, "b")
	for range maxForwards {
		b.received <- struct{}{}
	}
	if _, err := a.Append(t.Context(), id, forwardPush(t, id, 2), Note{}); err != nil || heldAt(a, id) != 2 || b.taken.Value("overloaded") != 1 {
		t.Errorf("%v, %d held, %v refused", err, heldAt(a, id), b.taken.Value("overloaded"))
	}
	<-b.received
	if _, err := a.Append(t.Context(), id, forwardPush(t, id, 3), Note{}); err != nil || heldAt(b, id) != 3 {
		t.Errorf("with room again: %v, %d at the owner", err, heldAt(b, id))
	}
}

// Of each sender every request counts once, and none of an earlier session.
func TestForwardFresh(t *testing.T) {
	f := newForwardNode(t, "a", clusterKeys(t, testKey(1))).Forward
	for i, c := range []struct {
		from           string
		session, count uint64
		want           bool
	}{
		{"b", 2, 1, true}, {"b", 2, 1, false}, {"b", 1, 2, false}, {"b", 2, 3, true}, {"b", 2, 2, true},
		{"c", 1, 1, true}, {"b", 3, 1, true}, {"b", 2, 4, false}, {"b", 3, 2, true},
	} {
		if got := f.fresh(head{From: c.from, FromSession: c.session, Count: c.count}); got != c.want {
			t.Errorf("request %d, %+v: fresh %v", i, c, got)
		}
	}
}

type hangs struct{}

func (hangs) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// Who waits for an owner that hangs waits until it is known to be dead, or has begun
// anew, and no longer; and not for ever for one that lives.
func TestForwardGivesUp(t *testing.T) {
	for name, c := range map[string]struct {
		session uint64 // of the owner, in the next view; 0: it is live no more
		want    time.Duration
	}{"dead": {0, 0}, "begun anew": {2, 0}, "alive": {1, forwardTimeout}} {
		f := newForwardNode(t, "a", clusterKeys(t, testKey(1))).Forward
		f.cfg.Client = &http.Client{Transport: hangs{}}
		synctest.Test(t, func(t *testing.T) {
			owner := Peer{Name: "b", Addr: "b:1", Session: 1}
			f.SetView(&View{Ring: NewRing(nil, 0), Peers: map[string]Peer{"b": owner}})
			begin := time.Now()
			answered := make(chan error, 1)
			go func() {
				_, err := f.ask(t.Context(), owner, head{Cluster: "x"}, nil)
				answered <- err
			}()
			synctest.Wait()
			next := map[string]Peer{}
			if c.session > 0 {
				next["b"] = Peer{Name: "b", Addr: "b:1", Session: c.session}
			}
			f.SetView(&View{Ring: NewRing(nil, 0), Peers: next})
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
	old, both := clusterKeys(t, testKey(1)), clusterKeys(t, testKey(2), testKey(1))
	a, b := newForwardNode(t, "a", old), newForwardNode(t, "b", old)
	join(1, a, b)
	id := ownedBy(t, a.Forward, "b")
	oldID := a.cfg.Box.KeyID(a.cfg.Box.Seal(nil, nil, "", nil, 0))
	for i, step := range []struct {
		name string
		do   func() error
	}{
		{"before", func() error { return nil }},
		{"the owner has the new key", func() error { return b.cfg.Box.SetKeys(both) }},
		{"the sender too, and knows what the owner holds", func() error {
			v := *a.View()
			v.Peers = map[string]Peer{"a": v.Peers["a"], "b": v.Peers["b"]}
			p := v.Peers["b"]
			p.KeyID = oldID
			v.Peers["b"] = p
			a.SetView(&v)
			return errors.Join(a.cfg.Box.SetKeys(both), b.cfg.Box.SetKeys(old))
		}},
		{"both", func() error { return b.cfg.Box.SetKeys(both) }},
		{"the old one is gone", func() error {
			fresh := clusterKeys(t, testKey(2))
			return errors.Join(a.cfg.Box.SetKeys(fresh), b.cfg.Box.SetKeys(fresh))
		}},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Append(t.Context(), id, forwardPush(t, id, i+1), Note{}); err != nil || a.sent.Value("hinted") > 0 {
			t.Errorf("%s: %v, %v hints", step.name, err, a.sent.Value("hinted"))
		}
	}
}

func TestPushEncoding(t *testing.T) {
	p := forwardPush(t, "x", 4)
	p.Samples = append(p.Samples, p.Samples[3], Sample{Off: p.Samples[0].Off, Len: p.Samples[0].Len, T: -5, V: math.Inf(-1)})
	var got Push
	if err := DecodePush(&got, EncodePush(nil, p), "x"); err != nil {
		t.Fatal(err)
	}
	if len(got.Samples) != len(p.Samples) {
		t.Fatalf("%d samples of %d", len(got.Samples), len(p.Samples))
	}
	for i, s := range p.Samples {
		g := got.Samples[i]
		if !bytes.Equal(got.Line(g), p.Line(s)) || g.T != s.T || g.V != s.V {
			t.Errorf("sample %d: %s %d %v", i, got.Line(g), g.T, g.V)
		}
	}
	if err := DecodePush(&Push{}, EncodePush(nil, p), "y"); err == nil {
		t.Error("another cluster's samples were taken")
	}
}

func FuzzDecodePush(f *testing.F) {
	f.Add(EncodePush(nil, forwardPush(f, "x", 3)))
	f.Add([]byte{0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var p Push
		if DecodePush(&p, b, "x") != nil {
			return
		}
		if len(p.Arena) > len(b) {
			t.Errorf("%d bytes of lines from %d", len(p.Arena), len(b))
		}
		var again Push
		if err := DecodePush(&again, EncodePush(nil, &p), "x"); err != nil || len(again.Samples) != len(p.Samples) {
			t.Errorf("does not read back: %v", err)
		}
	})
}

func FuzzBoxOpen(f *testing.F) {
	box, err := NewBox(clusterKeys(f, testKey(1)), "c")
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

func BenchmarkForward(b *testing.B) {
	p := forwardPush(b, "x", 230)
	box, err := NewBox(clusterKeys(b, testKey(byte(rand.IntN(256)))), "c")
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		sealed := box.Seal(nil, EncodePush(nil, p), bodySeal, nil, 0)
		plain, err := box.Open(nil, sealed, bodySeal, nil)
		if err != nil {
			b.Fatal(err)
		}
		if err := DecodePush(&Push{}, plain, "x"); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(230*b.N)/b.Elapsed().Seconds(), "samples/s")
}
