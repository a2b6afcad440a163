package main

// Tests of a Forwarder, all but one without a server: which pushes it forwards, when it leaves a
// push to its own server, how it treats owners that hang, and how keys are rotated. The
// forwardNodes of these tests store no samples.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TryForward returns nil if the server knows no other member or owns the site itself. The server
// then has to store the push itself.
func TestForwardNotToSelf(t *testing.T) {
	a := newForwardNode(t, "a", testKeys(t, 1))
	if got := a.push(t.Context(), "x", "m 1\n"); got != "" {
		t.Errorf("without other members the push was accepted by %q", got)
	}
	join(1, a, newForwardNode(t, "b", testKeys(t, 1)))
	if got := a.push(t.Context(), ownedBy(t, a.Forwarder, "a"), "m 1\n"); got != "" || a.took() > 0 {
		t.Errorf("a push of its own site was accepted by %q", got)
	}
}

// The owner gets a forwarded push unchanged. The server that forwarded the push gets the owner's
// answer unchanged, whether the owner accepts or refuses the push.
func TestForwardUnchanged(t *testing.T) {
	a, b, id := newForwardPair(t)
	push := pushRequest{
		ClusterID: id, Labels: map[string]string{"region": "eu", "note": "<\u00e9\">"}, Arrival: 1_700_000_000_123,
		Type: "text/plain; version=0.0.4", Encoding: "gzip", Spool: "00000000000000ab 1-4,9", Consumers: "00000000000000cd:7", Sync: true,
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
		got := a.TryForward(t.Context(), &push, []byte(body))
		if !reflect.DeepEqual(got, answer) {
			t.Errorf("push %d: the owner answered %+v, but the receiver got %+v", i, answer, got)
		}
		if last := b.pushes[len(b.pushes)-1]; !reflect.DeepEqual(last.push, push) || last.body != body {
			t.Errorf("push %d: the owner got %+v and a body of %d bytes", i, last.push, len(last.body))
		}
	}
	if b.took() != len(answers) || a.took() != 0 {
		t.Errorf("the owner got %d pushes and the receiver %d, want %d and 0", b.took(), a.took(), len(answers))
	}
	checkCounts(t, "sent", a.sentTotal, map[string]float64{"accepted": 2, "refused": 6, "kept": 0})
	checkCounts(t, "received", b.receivedTotal, map[string]float64{"accepted": 2, "refused": 6, "returned": 0})
}

// TryForward returns nil if the owner hands the push back or is down. The server that the client
// pushed to then has to store the push itself.
func TestForwardFallsBack(t *testing.T) {
	a, b, id := newForwardPair(t)
	b.answer = func() (*pushResponse, error) { return nil, errors.New("not ready") }
	if got := a.push(t.Context(), id, "returned"); got != "" {
		t.Errorf("a push that was handed back was accepted by %q", got)
	}
	b.answer = nil
	b.down.Store(true)
	if got := a.push(t.Context(), id, "down"); got != "" {
		t.Errorf("a push whose owner is down was accepted by %q", got)
	}
	checkCounts(t, "sent", a.sentTotal, map[string]float64{"kept": 2})
	checkCounts(t, "received", b.receivedTotal, map[string]float64{"returned": 1})
}

// A push whose client has disconnected is not counted as kept, because the client will send it
// again.
func TestForwardClientGone(t *testing.T) {
	a, _, id := newForwardPair(t)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	a.push(gone, id, "m 1\n")
	checkCounts(t, "sent", a.sentTotal, map[string]float64{"accepted": 0, "refused": 0, "kept": 0})
}

// A member that receives a forwarded push accepts it, and does not forward it again, even if the
// member's own view of the ring names another owner.
func TestForwardedOnlyOnce(t *testing.T) {
	a, b, id := newForwardPair(t)
	b.SetView(&RingView{Ring: NewRing([]Claim{{Slot: 0, Lamport: 1, Name: "a"}}, 0), Members: b.View().Members})
	if got := a.push(t.Context(), id, "m 1\n"); got != "b" || a.took() != 0 {
		t.Errorf("the push was accepted by %q, and a got %d pushes back", got, a.took())
	}
}

// A push whose headers are as long as the limits on scrape numbers and consumers allow fits into an
// envelope, even with a label of 1,000 bytes. A push whose envelope would be longer than
// maxEnvelope is not forwarded, and TryForward returns nil.
func TestForwardLongEnvelope(t *testing.T) {
	a, b, id := newForwardPair(t)
	names := ScrapeNames{SpoolID: 1<<64 - 1}
	for i := range uint64(MaxPushRanges) {
		names.Numbers = names.Numbers.Add(MaxScrapeNumber-1000+4*i, MaxScrapeNumber-998+4*i)
	}
	var consumers []ConsumerAge
	for i := range MaxConsumers {
		consumers = append(consumers, ConsumerAge{uint64(i), consumerIdle})
	}
	push := pushRequest{
		ClusterID: id, Labels: map[string]string{"note": strings.Repeat("x", 1000)}, Arrival: 1_700_000_000_123,
		Type: protoType, Encoding: "gzip", Spool: names.String(), Consumers: FormatConsumers(consumers), Sync: true,
	}
	if got := a.TryForward(t.Context(), &push, []byte("x")); got == nil || !reflect.DeepEqual(b.pushes[0].push, push) {
		t.Errorf("a push with %d bytes of scrape numbers and %d bytes of consumers was answered %v", len(push.Spool), len(push.Consumers), got)
	}
	push.Labels["note"] = strings.Repeat("x", maxEnvelope)
	if got := a.TryForward(t.Context(), &push, []byte("x")); got != nil || a.sentTotal.Value("kept") != 1 || b.receivedTotal.Value("forged") != 0 {
		t.Errorf("a push with too long an envelope was answered %v, and %v were counted as forged", got, b.receivedTotal.Value("forged"))
	}
}

// hangingOwner starts a member that reads each request but does not answer it before the end of the
// test. It returns the URL of the member. The channel asked gets a value for each request that has
// arrived.
func hangingOwner(t *testing.T) (url string, asked chan struct{}) {
	asked = make(chan struct{}, 100)
	end := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		asked <- struct{}{}
		select {
		case <-end:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(func() {
		close(end)
		srv.Close()
	})
	return srv.URL, asked
}

// At most maxForwards requests to one owner are in flight. While so many requests wait for an owner
// that hangs, TryForward returns nil for a further push to this owner. When the owner is known to
// be dead, the waiting pushes go to the next owner; for those that this server owns by then,
// TryForward returns nil.
func TestForwardHangingOwner(t *testing.T) {
	keys := testKeys(t, 1)
	a, b, c := newForwardNode(t, "a", keys), newForwardNode(t, "b", keys), newForwardNode(t, "c", keys)
	join(1, a, b, c)
	url, asked := hangingOwner(t)
	a.setAddress("b", url)
	id := ownedBy(t, a.Forwarder, "b")
	answers := make(chan string, maxForwards)
	var wg sync.WaitGroup
	for range maxForwards {
		wg.Go(func() { answers <- a.push(t.Context(), id, "m 1\n") })
	}
	for range maxForwards {
		<-asked
	}
	if got := a.push(t.Context(), id, "m 2\n"); got != "" || a.sentTotal.Value("kept") != 1 {
		t.Errorf("a push beyond the bound was accepted by %q, and %v are counted as kept", got, a.sentTotal.Value("kept"))
	}
	claims := []Claim{{Slot: 0, Lamport: 1, Name: "a"}, {Slot: 2, Lamport: 3, Name: "c"}}
	members := a.View().Members
	a.SetView(&RingView{Ring: NewRing(claims, 3), Members: map[string]RingMember{"a": members["a"], "c": members["c"]}})
	wg.Wait()
	heir := "c"
	if _, self := a.SiteOwner(SiteKey(id)); self {
		heir = ""
	}
	for range maxForwards {
		if got := <-answers; got != heir {
			t.Fatalf("a waiting push was accepted by %q, want %q", got, heir)
		}
	}
	if n := a.sentTotal.Value("kept"); n != 1 {
		t.Errorf("%v pushes are counted as kept, want 1", n)
	}
}

// Pushes that wait for the answer of an owner that hangs do not block pushes of other sites, even
// if more pushes wait than the server has slots for decoding pushes.
func TestForwardBlocksNoOtherSite(t *testing.T) {
	r := newSrvRig(t)
	f := newForwardNode(t, "a", testKeys(t, 1))
	url, asked := hangingOwner(t)
	f.SetView(&RingView{
		Ring:    NewRing([]Claim{{Slot: 0, Lamport: 1, Name: "a"}, {Slot: 1, Lamport: 2, Name: "b"}}, 0),
		Members: map[string]RingMember{"a": {Name: "a"}, "b": {Name: "b", Addr: strings.TrimPrefix(url, "http://")}},
	})
	r.server.cfg.Forwarder = f.Forwarder
	r.server.decoding = newDecodeLanes(1) // as few decoding slots as on a machine with one processor
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	waiting := 4 * cap(r.server.decoding.express.slots)
	for i := range waiting {
		id := ownedBy(t, f.Forwarder, "b", i)
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

// A request to an owner that hangs ends at once when a new view of the ring shows that the owner is
// dead or has restarted. If the owner stays live in the view, the request ends after
// forwardTimeout.
func TestForwardGivesUp(t *testing.T) {
	for name, c := range map[string]struct {
		session uint64 // the owner's session in the next view of the ring; 0: the next view does not have the owner
		want    time.Duration
	}{"dead": {0, 0}, "restarted": {2, 0}, "live": {1, forwardTimeout}} {
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
				t.Errorf("%s: got %v after %v, want an error after %v", name, err, time.Since(begin), c.want)
			}
		})
	}
}

// A member that is already handling maxForwards forwarded pushes refuses a further one. If the ring
// still has the same owner, the server that sent the push then has to store it itself.
func TestForwardOverloaded(t *testing.T) {
	a, b, id := newForwardPair(t)
	for range maxForwards {
		b.receiving.TryAcquire()
	}
	if got := a.push(t.Context(), id, "m 1\n"); got != "" || b.receivedTotal.Value("overloaded") != 1 {
		t.Errorf("without a free slot the push was accepted by %q, and %v are counted as overloaded", got, b.receivedTotal.Value("overloaded"))
	}
	b.receiving.Release()
	if got := a.push(t.Context(), id, "m 1\n"); got != "b" {
		t.Errorf("with a free slot the push was accepted by %q, want b", got)
	}
}

// Pushes are forwarded at every step of a rotation of the cluster key: before the rotation, while
// only one side or both sides have the new key, and after the old key is removed.
func TestForwardKeysRotate(t *testing.T) {
	old, both, fresh := testKeys(t, 1), testKeys(t, 2, 1), testKeys(t, 2)
	a, b, id := newForwardPair(t)
	oldID := SealedKeyID(a.cfg.Sealer.Seal(nil, nil, "", nil, 0))
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"before the rotation", func() error { return nil }},
		{"the owner has both keys", func() error { return b.cfg.Sealer.SetKeys(both) }},
		{"the sender has both keys, and knows that the owner has only the old one", func() error {
			v := *a.View()
			owner := v.Members["b"]
			owner.KeyID = oldID
			v.Members = map[string]RingMember{"a": v.Members["a"], "b": owner}
			a.SetView(&v)
			return errors.Join(a.cfg.Sealer.SetKeys(both), b.cfg.Sealer.SetKeys(old))
		}},
		{"both have both keys", func() error { return b.cfg.Sealer.SetKeys(both) }},
		{"both have only the new key", func() error {
			return errors.Join(a.cfg.Sealer.SetKeys(fresh), b.cfg.Sealer.SetKeys(fresh))
		}},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if got := a.push(t.Context(), id, "m 1\n"); got != "b" {
			t.Errorf("%s: the push was accepted by %q, want b", step.name, got)
		}
	}
}

// A member refuses a forwarded push whose seal has another version, and its answer names both
// versions. The server that sent the push logs both versions.
func TestForwardOtherVersion(t *testing.T) {
	a, b, id := newForwardPair(t)
	log := &logBuffer{}
	a.limitedLog = NewLimitedLog(slog.New(slog.NewTextHandler(log, nil)), time.Now)
	a.cfg.Client.Transport = changeSealVersion{a.cfg.Client.Transport}
	if got := a.push(t.Context(), id, "m 1\n"); got != "" || a.sentTotal.Value("kept") != 1 || b.receivedTotal.Value("version") != 1 {
		t.Errorf("the push was accepted by %q, and %v are counted as of another version", got, b.receivedTotal.Value("version"))
	}
	if text := log.String(); !strings.Contains(text, fmt.Sprintf("it has version %d; this program knows version %d", sealVersion+1, sealVersion)) {
		t.Errorf("the log does not name the versions:\n%s", text)
	}
}
