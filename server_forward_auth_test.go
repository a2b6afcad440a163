package main

// Tests of authentication between the members of a ring: the server refuses forwarded pushes that
// are forged, replayed or meant for another member, and it ignores answers that are forged in the
// name of an owner.

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// capturedForward is a forwarded push that the member b has accepted from the member a, and b's
// answer. The fields envelope, body and answer have what an attacker on the network can capture.
type capturedForward struct {
	a, b, stranger *forwardNode // members of the ring; stranger has another cluster key than a and b
	id             string       // cluster ID of the push; b owns this site
	envelope       string       // sealed envelope of the forwarded push, in base64
	body           []byte       // sealed body of the forwarded push
	answer         []byte       // sealed answer of b to the forwarded push
}

func newCapturedForward(t *testing.T) *capturedForward {
	t.Helper()
	f := &capturedForward{}
	f.a, f.b, f.stranger = newForwardNode(t, "a", testKeys(t, 1)), newForwardNode(t, "b", testKeys(t, 1)), newForwardNode(t, "c", testKeys(t, 2))
	join(1, f.a, f.b, f.stranger)
	f.id = ownedBy(t, f.a.Forwarder, "b")
	record := &recordAnswer{next: f.a.cfg.Client.Transport}
	f.a.cfg.Client.Transport = record
	if got := f.a.push(t.Context(), f.id, "m 1\n"); got != "b" {
		t.Fatalf("the push was accepted by %q, want b", got)
	}
	f.a.cfg.Client.Transport = record.next
	f.envelope, f.body, f.answer = f.b.last.Load().Header.Get(envelopeHeader), *f.b.body.Load(), record.body
	return f
}

// seal encodes v as JSON, seals the JSON as an envelope with b's cluster key, and returns the
// sealed envelope in base64.
func (f *capturedForward) seal(t *testing.T, v any) string {
	plain, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(f.b.cfg.Sealer.Seal(nil, plain, envelopeSeal, nil, 0))
}

// A server refuses a forwarded push whose envelope is forged, replayed, malformed, of another
// version, addressed to another member, or sealed for another body. It counts the refusal by its
// reason. Its answer names the versions if they differ, and does not reveal the site of the push.
// The server protects the connection of a request only if the envelope is valid.
func TestForwardRefusesForged(t *testing.T) {
	f := newCapturedForward(t)
	valid := forwardEnvelope{Version: envelopeVersion, From: "a", FromSession: 1, To: "b", ToSession: 1, Sequence: 100, Push: pushRequest{ClusterID: f.id}}
	changed := func(change func(*forwardEnvelope)) string {
		e := valid
		change(&e)
		return f.seal(t, e)
	}
	unsealed, err := base64.RawURLEncoding.DecodeString(f.envelope)
	if err != nil {
		t.Fatal(err)
	}
	otherSeal := base64.RawURLEncoding.EncodeToString(append([]byte{sealVersion + 1}, unsealed[1:]...))
	const otherBody = "body of another push" // the only case whose envelope is valid
	restart := func() { join(2, f.a, f.b, f.stranger) }
	for _, c := range []struct {
		name, result string
		envelope     string
		prepare      func() // called before the forwarded push is sent; nil: nothing is called
	}{
		{"replayed", "replayed", f.envelope, nil},
		{"no envelope", "forged", "", nil},
		{"garbage", "forged", base64.RawURLEncoding.EncodeToString([]byte{sealVersion, 0, 0}), nil},
		{"truncated", "forged", f.envelope[:len(f.envelope)-4], nil},
		{"too long", "forged", strings.Repeat("A", 2*maxEnvelope), nil},
		{"envelope that is a string", "malformed", f.seal(t, "x"), nil},
		{"another version of seals", "version", otherSeal, nil},
		{"another version of envelopes", "version", changed(func(e *forwardEnvelope) { e.Version = 2 }), nil},
		{"another version with other fields", "version", f.seal(t, map[string]any{"v": 2, "To": 7}), nil},
		{"no version", "version", f.seal(t, map[string]any{"To": "b"}), nil},
		{"no cluster ID", "malformed", changed(func(e *forwardEnvelope) { e.Push.ClusterID = "" }), nil},
		{"invalid cluster ID", "malformed", changed(func(e *forwardEnvelope) { e.Push.ClusterID = "a b" }), nil},
		{"for another member", "misrouted", changed(func(e *forwardEnvelope) { e.To = "c" }), nil},
		{"for another session", "misrouted", changed(func(e *forwardEnvelope) { e.ToSession = 2 }), nil},
		{"from an earlier session", "replayed", changed(func(e *forwardEnvelope) { e.FromSession = 0 }), nil},
		{otherBody, "forged", f.seal(t, valid), nil},
		{"for the session before a restart", "misrouted", f.envelope, restart},
	} {
		if c.prepare != nil {
			c.prepare()
		}
		before := f.b.receivedTotal.Value(c.result)
		req := httptest.NewRequest("POST", forwardPath, bytes.NewReader(f.body))
		req.Header.Set(envelopeHeader, c.envelope)
		protected, rec := protectedAfter(f.b.receiver(), req)
		text := rec.Body.String()
		if rec.Code != http.StatusForbidden || strings.Contains(text, "version") != (c.result == "version") {
			t.Errorf("%s: answered %d %s, want 403", c.name, rec.Code, text)
		}
		if strings.Contains(text, f.id) {
			t.Errorf("%s: the answer reveals the push: %s", c.name, text)
		}
		if protected != (c.name == otherBody) {
			t.Errorf("%s: the connection is protected: %t", c.name, protected)
		}
		if f.b.receivedTotal.Value(c.result) != before+1 {
			t.Errorf("%s: not counted as %s", c.name, c.result)
		}
	}
	if n := f.b.took(); n != 1 {
		t.Errorf("b accepted %d pushes, want only the first", n)
	}
}

// A server logs a forwarded push that is sealed with another key, or that comes from another
// version, with the address of the sender and what to do, at most once an hour for each address. It
// does not log garbage, which anybody can send.
func TestForwardLogsOtherKey(t *testing.T) {
	f := newCapturedForward(t)
	var log logBuffer
	clock := time.Unix(0, 0)
	f.b.limitedLog = NewLimitedLog(slog.New(slog.NewTextHandler(&log, nil)), func() time.Time { return clock })
	for _, c := range []struct{ about, envelope, want string }{
		{"garbage", "AgAA", ""},
		{"another key", base64.RawURLEncoding.EncodeToString(f.stranger.cfg.Sealer.Seal(nil, []byte("{}"), envelopeSeal, nil, 0)), "copy the same cluster.key to both servers"},
		{"another version", f.seal(t, map[string]any{"v": 2}), "run the same version on all servers"},
	} {
		log.Reset()
		req := httptest.NewRequest("POST", forwardPath, nil)
		req.Header.Set(envelopeHeader, c.envelope)
		for range 2 {
			f.b.receiver().ServeHTTP(httptest.NewRecorder(), req)
			clock = clock.Add(time.Minute)
		}
		lines := map[bool]int{true: 1}[c.want != ""]
		if got := log.String(); strings.Count(got, "\n") != lines || !strings.Contains(got, c.want) || lines > 0 && !strings.Contains(got, "level=WARN") || lines > 0 && !strings.Contains(got, "remote="+req.RemoteAddr) {
			t.Errorf("%s: logged %q, want %d lines with %q", c.about, got, lines, c.want)
		}
	}
}

// A server ignores an answer to a forwarded push unless the answer is sealed with the cluster key
// for this very request and has a valid status. TryForward then returns nil, so that the server
// stores the push itself.
func TestForwardRefusesForgedAnswer(t *testing.T) {
	f := newCapturedForward(t)
	sealed := func(n *forwardNode, w http.ResponseWriter, bound []byte) {
		w.Write(n.cfg.Sealer.Seal(nil, []byte("{}"), answerSeal, bound, 0))
	}
	for name, impostor := range map[string]http.HandlerFunc{
		"unsealed 200":                      func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "{}") },
		"sealed with another cluster key":   func(w http.ResponseWriter, r *http.Request) { sealed(f.stranger, w, nil) },
		"the owner's answer to another one": func(w http.ResponseWriter, r *http.Request) { w.Write(f.answer) },
		"the request's own body":            func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) },
		"sealed for another request":        func(w http.ResponseWriter, r *http.Request) { sealed(f.b, w, []byte("other")) },
		"sealed for this request, but without a status": func(w http.ResponseWriter, r *http.Request) {
			envelope, _ := base64.RawURLEncoding.DecodeString(r.Header.Get(envelopeHeader))
			sealed(f.b, w, envelope)
		},
	} {
		srv := httptest.NewServer(impostor)
		f.a.setAddress("b", srv.URL)
		before := f.a.sentTotal.Value("kept")
		if got := f.a.TryForward(t.Context(), &pushRequest{ClusterID: f.id}, nil); got != nil || f.a.sentTotal.Value("kept") != before+1 {
			t.Errorf("%s: the answer was believed: %+v", name, got)
		}
		srv.Close()
	}
}

// A server refuses a forwarded push as forged if its body was not sealed for its envelope.
func TestForwardRefusesForeignBody(t *testing.T) {
	f := newCapturedForward(t)
	flipped := bytes.Clone(f.body)
	flipped[len(flipped)-1] ^= 1
	f.a.cfg.Client.Transport = swapBody{flipped, f.a.cfg.Client.Transport}
	if got := f.a.push(t.Context(), f.id, "m 1\n"); got != "" || f.b.receivedTotal.Value("forged") != 1 || f.b.took() != 1 {
		t.Errorf("the push was accepted by %q, %v are counted as forged, and b got %d pushes", got, f.b.receivedTotal.Value("forged"), f.b.took())
	}
}

// A server accepts each sequence number of a session of a forwarding member at most once. It
// refuses a request from a session that is older than the newest session of this member that it has
// seen.
func TestForwardReplay(t *testing.T) {
	f := newForwardNode(t, "a", testKeys(t, 1)).Forwarder
	for i, c := range []struct {
		from              string
		session, sequence uint64
		want              bool
	}{
		{"b", 2, 1, true}, {"b", 2, 1, false}, {"b", 1, 2, false}, {"b", 2, 3, true}, {"b", 2, 2, true},
		{"c", 1, 1, true}, {"b", 3, 1, true}, {"b", 2, 4, false}, {"b", 3, 2, true},
	} {
		if got := f.acceptSequence(forwardEnvelope{From: c.from, FromSession: c.session, Sequence: c.sequence}); got != c.want {
			t.Errorf("request %d, %+v: accepted %t, want %t", i, c, got, c.want)
		}
	}
}

// FuzzForwardReceive checks that the receiver of a forwarded push accepts the push only if envelope
// and body are sealed, the receiver is the addressee, and the cluster ID is valid. plain is the
// JSON of the envelope. sealed tells whether envelope and body are sealed with the cluster key.
func FuzzForwardReceive(f *testing.F) {
	node := newForwardNode(f, "b", testKeys(f, 1))
	node.SetView(&RingView{Ring: NewRing(nil, 0), Members: map[string]RingMember{"b": {Name: "b", Session: 1}}})
	var pushes []takenPush
	node.store = func(_ context.Context, push *pushRequest, body []byte) (*pushResponse, error) {
		pushes = append(pushes, takenPush{*push, string(body)})
		return &pushResponse{Status: http.StatusOK}, nil
	}
	handler := node.receiver()
	valid, err := json.Marshal(forwardEnvelope{Version: envelopeVersion, From: "a", FromSession: 1, To: "b", ToSession: 1, Sequence: 1, Push: pushRequest{ClusterID: "x", Arrival: 5}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(valid, []byte("m 1\n"), true)
	f.Add(valid, []byte("m 1\n"), false)
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
			t.Fatalf("answered %d, and %d pushes were accepted", rec.Code, len(pushes))
		}
		var e forwardEnvelope
		for _, p := range pushes {
			if !sealed || p.body != string(body) || CheckClusterID(p.push.ClusterID) != nil || json.Unmarshal(plain, &e) != nil || e.To != "b" {
				t.Errorf("%q was accepted as %+v", plain, p)
			}
		}
	})
}

// A MessageSealer never opens a message that was sealed for another purpose.
func FuzzBoxOpen(f *testing.F) {
	sealer, err := NewMessageSealer(testKeys(f, 1), "c")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealer.Seal(nil, []byte("x"), "p", nil, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		if plain, err := sealer.Open(nil, b, "other", nil); err == nil {
			t.Errorf("%q was opened to %q", b, plain)
		}
	})
}
