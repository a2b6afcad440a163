package main

// Forwarding between the members of the ring. A server passes a push unchanged to the owner of its
// site. A forwarded push is never forwarded again. If the owner cannot take the push, the server
// that received it stores it. Requests and answers are sealed with the cluster key, and an answer
// is bound to its request. A server reads only the request's headers if the sender lacks the key.

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

const (
	forwardPath      = "/forward"
	envelopeHeader   = "Telemeter-Forward"
	envelopeVersion  = 1
	forwardTimeout   = 20 * time.Second // shorter than the time that a client waits for its answer
	maxEnvelope      = 12 << 10         // bytes when sealed; in base64 it still fits maxHeaderBytes
	maxForwards      = 32               // requests in flight: received in all, and sent to one owner
	maxForwardBody   = 64<<20 + 1<<10   // bytes: the highest --limit-bytes, and room for the seal
	maxForwardAnswer = 256 << 10        // bytes
	maxForwardError  = 200              // bytes of an unsealed error text that are logged
)

// The purposes of seals. Each differs, so that a message sealed for one purpose cannot be used for
// another.
const (
	envelopeSeal = "forward envelope"
	bodySeal     = "forward body"
	answerSeal   = "forward answer"
)

// pushRequest is a push without its body: the cluster ID and labels of the client's token, the time
// at which the receiving server got the push's headers, and the headers that describe the body.
type pushRequest struct {
	ClusterID        string
	Labels           map[string]string `json:",omitempty"`
	Arrival          int64             // ms; by the clock of the server that the client pushed to
	Type, Encoding   string
	Spool, Consumers string `json:",omitempty"`
}

// pushResponse is the answer to a push. The body is JSON if the status is 200, else plain text.
type pushResponse struct {
	Status      int
	Result      string // value of the label result in telemeter_pushes_total
	Body        []byte
	RetryAfter  int  `json:",omitempty"` // seconds; 0 = no Retry-After header
	AllUntimely bool `json:",omitempty"` // all samples were dropped because of their timestamps
}

// forwardEnvelope has the sender and recipient of a forwarded request, and the push without its
// body. It is sealed separately, so that a server need not read the body of a sender without the
// key. The sessions and the sequence number reveal a replay, even after either side has restarted.
type forwardEnvelope struct {
	Version                int `json:"v"`
	From, To               string
	FromSession, ToSession uint64
	Sequence               uint64
	Push                   pushRequest
}

// ForwarderConfig configures a Forwarder.
type ForwarderConfig struct {
	Name    string // name of this server
	Sealer  *MessageSealer
	Client  *http.Client
	Log     *slog.Logger
	Metrics *Metrics
}

// Forwarder sends pushes to their owners, and receives pushes that other members forward. It is
// safe for concurrent use.
type Forwarder struct {
	cfg       ForwarderConfig
	view      atomic.Pointer[RingView]
	sequence  atomic.Uint64 // number of the last request sent since this process started
	receiving semaphore     // bounds the requests of other members that are in flight

	mu      sync.Mutex                    // guards senders and owners
	senders map[string]*senderSession     // by member name
	owners  map[string]*ownerRequestSlots // by member name

	sentTotal, receivedTotal *Counter
	seconds                  *Histogram
}

// senderSession is the newest known session of a member that forwards pushes to this server.
type senderSession struct {
	session uint64
	window  ReplayWindow // of the sequence numbers in that session
}

// ownerRequestSlots bounds the requests in flight to one session of an owner.
type ownerRequestSlots struct {
	session  uint64
	requests semaphore
	ctx      context.Context // ends when the session is no longer live
	cancel   context.CancelFunc
}

// NewForwarder returns a Forwarder that knows no members. The caller must set a view with SetView.
func NewForwarder(cfg ForwarderConfig) *Forwarder {
	m := cfg.Metrics
	f := &Forwarder{
		cfg: cfg, receiving: newSemaphore(maxForwards), senders: map[string]*senderSession{}, owners: map[string]*ownerRequestSlots{},
		sentTotal:     m.Counter("telemeter_forwards_sent_total", "Pushes for sites of other owners, by result: accepted by the owner, refused by the owner, or kept here because the owner could not take them.", "result"),
		receivedTotal: m.Counter("telemeter_forwards_received_total", "Pushes received from other members of the ring, by result.", "result"),
		seconds:       m.Histogram("telemeter_forward_duration_seconds", "Seconds to forward a push, until the owner answers or the attempt fails.", []float64{.001, .005, .01, .05, .1, .5, 1, 5, 20}),
	}
	for _, result := range []string{"accepted", "refused", "kept"} {
		f.sentTotal.Add(0, result)
	}
	for _, result := range []string{"accepted", "refused", "forged", "version", "misrouted", "replayed", "malformed", "overloaded", "returned"} {
		f.receivedTotal.Add(0, result)
	}
	f.view.Store(&RingView{Ring: NewRing(nil, 0)})
	return f
}

// SetKeys replaces the keys that seal requests and answers. If it returns an error, nothing has
// changed.
func (f *Forwarder) SetKeys(keys Keys) error { return f.cfg.Sealer.SetKeys(keys) }

// SetView replaces the view of the ring. It cancels requests to sessions that are no longer live.
func (f *Forwarder) SetView(v *RingView) {
	f.view.Store(v)
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, o := range f.owners {
		if p, live := v.Members[name]; !live || p.Session != o.session {
			o.cancel()
			delete(f.owners, name)
		}
	}
	for name := range f.senders {
		if _, live := v.Members[name]; !live && len(f.senders) > MaxSlots {
			delete(f.senders, name)
		}
	}
}

// View returns the current view of the ring.
func (f *Forwarder) View() *RingView { return f.view.Load() }

// SiteOwner returns the member that owns a site, and whether that member is this server. If no
// owner is known, it returns this server.
func (f *Forwarder) SiteOwner(siteKey uint64) (owner RingMember, self bool) {
	if p, ok := f.View().Owner(siteKey); ok && p.Name != f.cfg.Name {
		return p, false
	}
	return RingMember{Name: f.cfg.Name}, true
}

// OwnsSite reports whether the ring makes this server the owner of a site. It returns false while
// no owner is known, because another member may own a site whose samples are on this server's disk.
func (f *Forwarder) OwnsSite(siteKey uint64) bool {
	p, ok := f.View().Owner(siteKey)
	return ok && p.Name == f.cfg.Name
}

// TryForward forwards a push to the owner of its site and returns the owner's answer. It returns
// nil if this server has to store the push, because it is the owner or because the owner cannot
// take the push. If the ring names another owner after a failure, TryForward tries that owner. It
// also returns nil when ctx ends.
func (f *Forwarder) TryForward(ctx context.Context, push *pushRequest, body []byte) (ownerAnswer *pushResponse) {
	key := SiteKey(push.ClusterID)
	for {
		owner, self := f.SiteOwner(key)
		if self {
			return nil
		}
		begin := time.Now()
		resp, err := f.send(ctx, owner, push, body)
		f.seconds.Observe(time.Since(begin).Seconds())
		if err == nil {
			result := "accepted"
			if resp.Status != http.StatusOK {
				result = "refused"
			}
			f.sentTotal.Inc(result)
			return resp
		}
		if ctx.Err() != nil {
			return nil // the client has gone or the time is over, so the client will push again
		}
		if now, _ := f.SiteOwner(key); now != owner {
			continue // the ring has changed and names another owner
		}
		f.sentTotal.Inc("kept")
		f.cfg.Log.Warn("owner cannot take the push, so this server stores it", "cluster_id", push.ClusterID, "owner", owner.Name, "err", err)
		return nil
	}
}

// acquireOwnerSlot reserves one of the maxForwards requests to an owner, so that an owner that
// hangs cannot tie up all memory. The returned context ends after forwardTimeout, or when the
// owner's session is no longer live. The caller must call release.
func (f *Forwarder) acquireOwnerSlot(ctx context.Context, to RingMember) (forwardCtx context.Context, release func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	o := f.owners[to.Name]
	if o == nil || o.session != to.Session {
		if o != nil {
			o.cancel()
		}
		o = &ownerRequestSlots{session: to.Session, requests: newSemaphore(maxForwards)}
		o.ctx, o.cancel = context.WithCancel(context.Background())
		f.owners[to.Name] = o
	}
	if !o.requests.TryAcquire() {
		return nil, nil, fmt.Errorf("%d pushes to this owner are already in flight", o.requests.InUse())
	}
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	stop := context.AfterFunc(o.ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
		o.requests.Release()
	}, nil
}

// send sends one push to a member and returns its authenticated answer.
func (f *Forwarder) send(ctx context.Context, to RingMember, push *pushRequest, body []byte) (_ *pushResponse, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("forwarding to %s: %w", to.Addr, err)
		}
	}()
	ctx, release, err := f.acquireOwnerSlot(ctx, to)
	if err != nil {
		return nil, err
	}
	defer release()
	plain, err := json.Marshal(forwardEnvelope{
		Version: envelopeVersion, From: f.cfg.Name, FromSession: f.View().Members[f.cfg.Name].Session,
		To: to.Name, ToSession: to.Session, Sequence: f.sequence.Add(1), Push: *push,
	})
	if err != nil {
		return nil, err
	}
	sealed := f.cfg.Sealer.Seal(nil, plain, envelopeSeal, nil, to.KeyID)
	if len(sealed) > maxEnvelope {
		return nil, fmt.Errorf("the labels and headers of the push take %d bytes, more than the limit of %d", len(sealed), maxEnvelope)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+to.Addr+forwardPath,
		bytes.NewReader(f.cfg.Sealer.Seal(nil, body, bodySeal, sealed, to.KeyID)))
	if err != nil {
		return nil, err
	}
	req.Header.Set(envelopeHeader, base64.RawURLEncoding.EncodeToString(sealed))
	resp, err := f.cfg.Client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return f.readAnswer(resp, sealed)
}

// readAnswer reads the answer to the request whose sealed envelope is given. It returns an error
// unless the answer is sealed with the cluster key for this very request.
func (f *Forwarder) readAnswer(resp *http.Response, sealedEnvelope []byte) (*pushResponse, error) {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxForwardAnswer))
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK { // such an answer is not sealed, so it is only reported
		return nil, fmt.Errorf("answered %s: %q", resp.Status, bytes.TrimSpace(b[:min(len(b), maxForwardError)]))
	}
	plain, err := f.cfg.Sealer.Open(nil, b, answerSeal, sealedEnvelope)
	if err != nil {
		return nil, fmt.Errorf("opening the sealed answer: %w", err)
	}
	var push pushResponse
	if err := json.Unmarshal(plain, &push); err != nil {
		return nil, fmt.Errorf("decoding the answer: %w", err)
	}
	if push.Status < 200 || push.Status > 599 {
		return nil, fmt.Errorf("the answer has the invalid status %d", push.Status)
	}
	return &push, nil
}

// storeForwardedFunc stores a push that another member forwarded, and returns the answer for the
// client. An error hands the push back to that member, which then stores the push itself.
type storeForwardedFunc func(ctx context.Context, push *pushRequest, body []byte) (*pushResponse, error)

// Handler returns the handler of the listener for other members. It passes each authentic push to
// store.
func (f *Forwarder) Handler(store storeForwardedFunc) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+forwardPath, func(w http.ResponseWriter, r *http.Request) {
		answer, result, err := f.receiveForwarded(w, r, store)
		if err != nil {
			refused := toForwardRefused(err)
			f.receivedTotal.Inc(refused.result)
			w.Header().Set("Connection", "close")
			http.Error(w, refused.text, refused.status)
			return
		}
		f.receivedTotal.Inc(result)
		w.Write(answer) // fails only if the connection does
	})
	return mux
}

// forwardRefusedError says why a forwarded request is refused. Its text goes to a sender that may
// not have the key, so it reveals nothing else but the versions that do not match.
type forwardRefusedError struct {
	status int
	result string // value of the label result in telemeter_forwards_received_total
	text   string
}

func (e *forwardRefusedError) Error() string { return e.text }

// errForwardRefused returns a forwardRefusedError with the standard text of the HTTP status.
func errForwardRefused(status int, result string) error {
	return &forwardRefusedError{status, result, http.StatusText(status)}
}

// toForwardRefused returns the forwardRefusedError in err's chain, or one for an internal error if
// there is none.
func toForwardRefused(err error) *forwardRefusedError {
	var e *forwardRefusedError
	if !errors.As(err, &e) {
		e = &forwardRefusedError{http.StatusInternalServerError, "malformed", "the request could not be handled"}
	}
	return e
}

// receiveForwarded stores a push that another member forwarded, and returns the sealed answer and
// the result to count. It never forwards the push again, even if another member owns the site by
// now, because a push that went in a circle would never be answered.
func (f *Forwarder) receiveForwarded(w http.ResponseWriter, r *http.Request, store storeForwardedFunc) (answer []byte, result string, err error) {
	env, sealed, err := f.openEnvelope(r.Header.Get(envelopeHeader))
	if err != nil {
		return nil, "", err
	}
	if env.To != f.cfg.Name || env.ToSession != f.View().Members[f.cfg.Name].Session {
		return nil, "", errForwardRefused(http.StatusForbidden, "misrouted")
	}
	if !f.acceptSequence(env) {
		return nil, "", errForwardRefused(http.StatusForbidden, "replayed")
	}
	if !f.receiving.TryAcquire() {
		return nil, "", errForwardRefused(http.StatusServiceUnavailable, "overloaded")
	}
	defer f.receiving.Release()
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxForwardBody))
	if err == nil {
		body, err = f.cfg.Sealer.Open(nil, body, bodySeal, sealed)
	}
	if err != nil {
		return nil, "", errForwardRefused(http.StatusForbidden, "forged")
	}
	resp, err := store(r.Context(), &env.Push, body)
	if err != nil {
		f.cfg.Log.Debug("forwarded push is handed back", "cluster_id", env.Push.ClusterID, "from", env.From, "err", err)
		return nil, "", errForwardRefused(http.StatusServiceUnavailable, "returned")
	}
	b, err := json.Marshal(resp)
	if err != nil {
		return nil, "", fmt.Errorf("encoding the answer to a forwarded push: %w", err)
	}
	result = "accepted"
	if resp.Status != http.StatusOK {
		result = "refused"
	}
	return f.cfg.Sealer.Seal(nil, b, answerSeal, sealed, SealedKeyID(sealed)), result, nil
}

// openEnvelope decodes and opens a sealed envelope in base64. It also returns the sealed bytes, to
// which the body and the answer are bound. The error is a forwardRefusedError.
func (f *Forwarder) openEnvelope(header string) (env forwardEnvelope, sealedEnvelope []byte, err error) {
	sealedEnvelope, err = base64.RawURLEncoding.DecodeString(header)
	if err != nil || len(sealedEnvelope) > maxEnvelope {
		return env, nil, errForwardRefused(http.StatusForbidden, "forged")
	}
	plain, err := f.cfg.Sealer.Open(nil, sealedEnvelope, envelopeSeal, nil)
	if err == nil {
		err = checkEnvelopeVersion(plain)
	}
	switch {
	case errors.Is(err, ErrSealVersion), errors.Is(err, errEnvelopeVersion):
		return env, nil, &forwardRefusedError{http.StatusForbidden, "version", "forwarding needs servers of the same version: " + err.Error()}
	case err != nil:
		return env, nil, errForwardRefused(http.StatusForbidden, "forged")
	case json.Unmarshal(plain, &env) != nil || CheckClusterID(env.Push.ClusterID) != nil:
		return env, nil, errForwardRefused(http.StatusForbidden, "malformed")
	}
	return env, sealedEnvelope, nil
}

var errEnvelopeVersion = errors.New("the envelope has another version")

// checkEnvelopeVersion returns an error if the envelope has another version. It decodes no other
// field, because the fields of another version may differ.
func checkEnvelopeVersion(plain []byte) error {
	env := struct {
		Version int `json:"v"`
	}{}
	if json.Unmarshal(plain, &env) == nil && env.Version != envelopeVersion {
		return fmt.Errorf("%w: it has version %d, and this server supports version %d", errEnvelopeVersion, env.Version, envelopeVersion)
	}
	return nil
}

// acceptSequence reports whether a request is new and not a replay. It records the request's
// sequence number, so that a repetition is refused. Only the newest known session of each sender is
// accepted.
func (f *Forwarder) acceptSequence(env forwardEnvelope) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.senders[env.From]
	if s == nil || env.FromSession > s.session {
		s = &senderSession{session: env.FromSession}
		f.senders[env.From] = s
	}
	return env.FromSession == s.session && s.window.Accept(env.Sequence)
}
