package main

// Forwarding between the members of the ring: a push that reaches one server is passed unchanged
// to the server that owns its site, at most once. If the owner cannot take it, the server that
// received it stores it. Requests and answers are sealed with the cluster key, and an answer is
// bound to its request. Of a sender without the key nothing is read but a header.

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
	forwardTimeout   = 20 * time.Second // less than a client waits
	maxEnvelope      = 12 << 10         // bytes, sealed: in base64 they fit the headers of a request
	maxForwards      = 32               // in flight: received in all, each with a body; sent to one owner
	maxForwardBody   = 64<<20 + 1<<10   // the most that --limit-bytes can be, sealed
	maxForwardAnswer = 256 << 10        // bytes
	maxForwardError  = 200              // bytes of a plain error that are logged
)

// The purposes of seals, so that none can stand for another.
const (
	envelopeSeal = "forward envelope"
	bodySeal     = "forward body"
	answerSeal   = "forward answer"
)

// pushRequest is a push without its body: the site and labels of its token, when its headers
// arrived at the server that the client pushed to, and those of its headers that matter.
type pushRequest struct {
	ClusterID        string
	Labels           map[string]string `json:",omitempty"`
	Arrival          int64             // ms
	Type, Encoding   string
	Spool, Consumers string `json:",omitempty"`
}

// pushResponse is the answer to a push. The body is text, or JSON if the status is 200.
type pushResponse struct {
	Status      int
	Result      string // as telemeter_pushes_total names it
	Body        []byte
	RetryAfter  int  `json:",omitempty"` // s
	AllUntimely bool `json:",omitempty"` // every sample was dropped for its time
}

// forwardEnvelope has the addresses of a forwarded request, and all of the push but its body. It is
// sealed by itself, so that no body is read of a sender without the key. Sessions and the
// sequence number reveal a replay, also across restarts of either side.
type forwardEnvelope struct {
	Version                int `json:"v"`
	From, To               string
	FromSession, ToSession uint64
	Sequence               uint64
	Push                   pushRequest
}

// ForwarderConfig configures a Forwarder.
type ForwarderConfig struct {
	Name    string // of this server
	Sealer  *MessageSealer
	Client  *http.Client
	Log     *slog.Logger
	Metrics *Metrics
}

// Forwarder sends pushes to their owners and receives those of other members. It is safe for
// concurrent use.
type Forwarder struct {
	cfg       ForwarderConfig
	view      atomic.Pointer[RingView]
	sequence  atomic.Uint64 // of the last request sent in this session
	receiving semaphore     // requests of other members

	mu      sync.Mutex                    // guards senders and owners
	senders map[string]*senderSession     // by member name
	owners  map[string]*ownerRequestSlots // by member name

	sentTotal, receivedTotal *Counter
	seconds                  *Histogram
}

// senderSession is the newest known session of a member that forwards to this server.
type senderSession struct {
	session uint64
	window  ReplayWindow // over its sequence numbers
}

// ownerRequestSlots has the requests that wait for one session of an owner.
type ownerRequestSlots struct {
	session  uint64
	requests semaphore
	ctx      context.Context // ends when that session is live no more
	cancel   context.CancelFunc
}

// NewForwarder returns a Forwarder that knows no members: see SetView.
func NewForwarder(cfg ForwarderConfig) *Forwarder {
	m := cfg.Metrics
	f := &Forwarder{
		cfg: cfg, receiving: newSemaphore(maxForwards), senders: map[string]*senderSession{}, owners: map[string]*ownerRequestSlots{},
		sentTotal:     m.Counter("telemeter_forwards_sent_total", "Pushes for other owners by result: accepted, refused by the owner, or kept: held here because the owner could not take them.", "result"),
		receivedTotal: m.Counter("telemeter_forwards_received_total", "Pushes forwarded by other members by result.", "result"),
		seconds:       m.Histogram("telemeter_forward_duration_seconds", "Time until the owner answered.", []float64{.001, .005, .01, .05, .1, .5, 1, 5, 20}),
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

// SetKeys replaces the keys that requests and answers are sealed with. On an error nothing changed.
func (f *Forwarder) SetKeys(keys Keys) error { return f.cfg.Sealer.SetKeys(keys) }

// SetView replaces the view of the ring. Requests to sessions that are live no more end.
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

// View returns the view that SetView set.
func (f *Forwarder) View() *RingView { return f.view.Load() }

// SiteOwner returns the member that pushes for a site key go to, and whether it is this server. It
// is this server while no owner is known.
func (f *Forwarder) SiteOwner(siteKey uint64) (owner RingMember, self bool) {
	if p, ok := f.View().Owner(siteKey); ok && p.Name != f.cfg.Name {
		return p, false
	}
	return RingMember{Name: f.cfg.Name}, true
}

// OwnsSite reports whether the ring makes this server the owner of a site key. While there is no
// ring, it owns nothing: whatever its disk has, another member may be the owner.
func (f *Forwarder) OwnsSite(siteKey uint64) bool {
	p, ok := f.View().Owner(siteKey)
	return ok && p.Name == f.cfg.Name
}

// TryForward passes a push to its owner and returns the owner's answer. It returns nil if this
// server has to store the push, because it is the owner or because the owner cannot take it.
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
			return nil // the client has gone, or no time is left: it sends the push again
		}
		if now, _ := f.SiteOwner(key); now != owner {
			continue // the ring has changed, and there is another owner
		}
		f.sentTotal.Inc("kept")
		f.cfg.Log.Warn("owner cannot take the push; it is held here", "cluster_id", push.ClusterID, "owner", owner.Name, "err", err)
		return nil
	}
}

// acquireOwnerSlot takes one of the bounded number of requests to an owner: one that hangs must not
// gather all memory. The context returned ends after forwardTimeout, or when the owner's session
// is live no more. release has to be called at the end.
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
		return nil, nil, fmt.Errorf("%d pushes wait for it", o.requests.InUse())
	}
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	stop := context.AfterFunc(o.ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
		o.requests.Release()
	}, nil
}

// send sends one push to a member and returns the authenticated answer.
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
		return nil, fmt.Errorf("labels and headers take %d bytes, which is more than %d", len(sealed), maxEnvelope)
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

// readAnswer reads the answer to the request with a sealed envelope.
func (f *Forwarder) readAnswer(resp *http.Response, sealedEnvelope []byte) (*pushResponse, error) {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxForwardAnswer))
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK { // such an answer is not authenticated
		return nil, fmt.Errorf("answered %s: %q", resp.Status, bytes.TrimSpace(b[:min(len(b), maxForwardError)]))
	}
	plain, err := f.cfg.Sealer.Open(nil, b, answerSeal, sealedEnvelope)
	if err != nil {
		return nil, fmt.Errorf("opening the answer: %w", err)
	}
	var push pushResponse
	if err := json.Unmarshal(plain, &push); err != nil {
		return nil, fmt.Errorf("the answer is malformed: %w", err)
	}
	if push.Status < 200 || push.Status > 599 {
		return nil, fmt.Errorf("the answer has status %d", push.Status)
	}
	return &push, nil
}

// storeForwardedFunc stores a push that another member received. An error hands the push back to
// that member, which then stores it.
type storeForwardedFunc func(ctx context.Context, push *pushRequest, body []byte) (*pushResponse, error)

// Handler returns the handler of the listener for members.
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
		w.Write(answer) // an error is the connection's
	})
	return mux
}

// forwardRefusedError says why a forwarded request is refused. A sender without the key learns
// nothing from its text but that, and the version.
type forwardRefusedError struct {
	status int
	result string // as telemeter_forwards_received_total names it
	text   string
}

func (e *forwardRefusedError) Error() string { return e.text }

func errForwardRefused(status int, result string) error {
	return &forwardRefusedError{status, result, http.StatusText(status)}
}

// toForwardRefused returns err as a forwardRefusedError.
func toForwardRefused(err error) *forwardRefusedError {
	var e *forwardRefusedError
	if !errors.As(err, &e) {
		e = &forwardRefusedError{http.StatusInternalServerError, "malformed", "the request could not be handled"}
	}
	return e
}

// receiveForwarded stores a push that another member forwards, and returns the sealed answer and its
// result. The push is not forwarded again, whichever member owns its site by now: a push that
// goes round is never answered.
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

// openEnvelope opens an envelope in base64. It returns the sealed bytes too, which body and
// answer are bound to. The error is a forwardRefusedError.
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
		return env, nil, &forwardRefusedError{http.StatusForbidden, "version", "forwarding needs servers of one version: " + err.Error()}
	case err != nil:
		return env, nil, errForwardRefused(http.StatusForbidden, "forged")
	case json.Unmarshal(plain, &env) != nil || CheckClusterID(env.Push.ClusterID) != nil:
		return env, nil, errForwardRefused(http.StatusForbidden, "malformed")
	}
	return env, sealedEnvelope, nil
}

var errEnvelopeVersion = errors.New("envelope of another version")

// checkEnvelopeVersion looks at nothing but the version: the fields of another one may not fit.
func checkEnvelopeVersion(plain []byte) error {
	env := struct {
		Version int `json:"v"`
	}{}
	if json.Unmarshal(plain, &env) == nil && env.Version != envelopeVersion {
		return fmt.Errorf("%w: it has version %d, and this server knows version %d", errEnvelopeVersion, env.Version, envelopeVersion)
	}
	return nil
}

// acceptSequence reports whether a request is no replay, and makes any later one with its
// sequence number one. Of each sender only its newest session counts.
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
