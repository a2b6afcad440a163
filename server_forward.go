package main

// This file forwards pushes between the members of the ring. A server passes the body of a client's
// push unchanged to the owner of the site. The owner never forwards the push again. If the owner
// cannot take the push, the server that the client pushed to stores it. Forwarded requests are
// sealed with the cluster key. So are answers with status 200, and each can be opened only together
// with its request. Any other answer means only that forwarding failed. A server does not read the
// body of a request without a sealed envelope.

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
	forwardTimeout   = 20 * time.Second // limit of one request to an owner; shorter than the 40 s that a client waits for the answer to its push
	maxEnvelope      = 12 << 10         // bytes of a sealed envelope; in base64 it takes 16 KiB, as much as maxHeaderBytes, and the 4 KiB that net/http adds are left for the other headers
	maxForwards      = 32               // forwarded requests in flight: at most this many received from all members together, and as many sent to each owner
	maxForwardBody   = 64<<20 + 1<<10   // bytes of a sealed body: the highest --limit-bytes, and room for the seal
	maxForwardAnswer = 256 << 10        // bytes of an answer to a forwarded push; a longer answer is cut and cannot be opened
	maxForwardError  = 200              // bytes of the text of an unsealed answer that are quoted in an error
)

// The purposes for which the cluster key seals a message. A message that is sealed for one purpose
// cannot be opened for another.
const (
	envelopeSeal = "forward envelope"
	bodySeal     = "forward body"
	answerSeal   = "forward answer"
)

// pushRequest is a push without its body. It has the cluster ID and labels of the client's token,
// the time at which the headers of the push arrived at the server that the client pushed to, and
// the headers that describe the body, its scrapes and the consumers.
type pushRequest struct {
	ClusterID        string
	Labels           map[string]string `json:",omitempty"`
	Arrival          int64             // ms since the Unix epoch, by the clock of the server that the client pushed to
	Type, Encoding   string
	Spool, Consumers string `json:",omitempty"`
	Sync             bool   `json:",omitempty"` // a member that does not know this field syncs every push
	Remote           string `json:",omitempty"` // address from which the client pushed, for the log
}

// pushResponse is the answer to a push. Body is JSON if Status is 200, and plain text otherwise.
type pushResponse struct {
	Status      int
	Result      string // value of the label result in telemeter_pushes_total
	Body        []byte
	RetryAfter  int  `json:",omitempty"` // seconds, for the header Retry-After; 0 = no such header
	AllUntimely bool `json:",omitempty"` // all samples that reached the store were dropped because of their timestamps
	// Time is when the member that stored a forwarded push answered, by its own clock, in ms since the
	// Unix epoch; 0 if the member does not tell.
	Time int64 `json:",omitempty"`
}

// forwardEnvelope has the sender and the recipient of a forwarded request, and the push without its
// body. It is sealed separately from the body, so that a server need not read the body if the
// sender lacks the key. A member has a new session number each time its process starts, and may
// also begin a new session while it runs. The sessions of sender and recipient and the sequence
// number reveal a replayed request, even after either process has restarted.
type forwardEnvelope struct {
	Version                int `json:"v"`
	From, To               string
	FromSession, ToSession uint64
	Sequence               uint64
	Push                   pushRequest
}

// ForwarderConfig configures a Forwarder.
type ForwarderConfig struct {
	Name    string
	Sealer  *MessageSealer
	Client  *http.Client
	Log     *slog.Logger
	Metrics *Metrics
}

// Forwarder forwards pushes to the owners of their sites, and receives pushes that other members
// forward. It is safe for concurrent use.
type Forwarder struct {
	cfg        ForwarderConfig
	view       atomic.Pointer[RingView]
	change     atomic.Pointer[ringChange] // the last change of the ring; nil before the first view was set
	sequence   atomic.Uint64              // number of the last request that this process prepared to send
	receiving  semaphore                  // one slot for each request of another member that this server is handling
	limitedLog *LimitedLog                // for messages that each push can cause

	mu      sync.Mutex                    // guards senders and owners
	senders map[string]*senderSession     // by the name of the member that forwards pushes to this server
	owners  map[string]*ownerRequestSlots // by the name of the owner that this server forwards pushes to

	sentTotal, receivedTotal *Counter
	seconds                  *Histogram
}

// senderSession is the newest known session of a member that forwards pushes to this server.
type senderSession struct {
	session uint64
	window  ReplayWindow // the sequence numbers of this session that were accepted
}

// ownerRequestSlots bounds the requests in flight to one owner during one session of the owner.
type ownerRequestSlots struct {
	session  uint64
	requests semaphore
	clock    *time.Duration  // how far the owner's clock was ahead of this server's clock at its last answer; nil if there was none
	ctx      context.Context // ends when the owner has died, left the ring or begun a new session, and then cancels the requests
	cancel   context.CancelFunc
}

// NewForwarder returns a Forwarder that knows no members. Until the first call of SetView it
// forwards no push, and OwnsSite returns false for every site.
func NewForwarder(cfg ForwarderConfig) *Forwarder {
	m := cfg.Metrics
	f := &Forwarder{
		cfg: cfg, receiving: newSemaphore(maxForwards), limitedLog: NewLimitedLog(cfg.Log, time.Now), senders: map[string]*senderSession{}, owners: map[string]*ownerRequestSlots{},
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

// SetKeys replaces the keys that seal requests and answers. After an error the old keys stay in
// use.
func (f *Forwarder) SetKeys(keys Keys) error { return f.cfg.Sealer.SetKeys(keys) }

// SetView replaces the view of the ring. It cancels requests in flight to members that have died,
// left the ring or begun a new session.
func (f *Forwarder) SetView(v *RingView) {
	if old := f.view.Swap(v); f.change.Load() == nil || old.Ring.Digest() != v.Ring.Digest() {
		f.change.Store(&ringChange{time.Now(), old})
	}
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

// ringChange is a change of the ring. A new view of the same ring is none, because the ring keeper sets
// a view in each interval.
type ringChange struct {
	at     time.Time
	before *RingView
}

// OwnerSince returns when the owner of a site last changed, or the zero time if the last change of the
// ring has not changed it.
func (f *Forwarder) OwnerSince(siteKey uint64) time.Time {
	change := f.change.Load()
	if change == nil {
		return time.Time{}
	}
	before, _ := change.before.Owner(siteKey)
	if now, _ := f.View().Owner(siteKey); now.Name == before.Name {
		return time.Time{}
	}
	return change.at
}

// ClockAhead returns how far a member's clock was ahead of this server's clock when the member last
// answered a forwarded push. The error is at most the time of that answer's way. It is not known if
// the member has answered none since it, or its session, began.
func (f *Forwarder) ClockAhead(member string) (ahead time.Duration, known bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if o := f.owners[member]; o != nil && o.clock != nil {
		return *o.clock, true
	}
	return 0, false
}

// noteClock records the time that an owner states in an answer that has just arrived.
func (f *Forwarder) noteClock(owner RingMember, ownerTime int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if o := f.owners[owner.Name]; o != nil && o.session == owner.Session && ownerTime != 0 {
		ahead := time.Duration(ownerTime-time.Now().UnixMilli()) * time.Millisecond
		o.clock = &ahead
	}
}

// SiteOwner returns the member that owns a site, and whether that member is this server. If no
// owner is known, it returns this server.
func (f *Forwarder) SiteOwner(siteKey uint64) (owner RingMember, self bool) {
	if p, ok := f.View().Owner(siteKey); ok && p.Name != f.cfg.Name {
		return p, false
	}
	return RingMember{Name: f.cfg.Name}, true
}

// OwnsSite reports whether the ring makes this server the owner of a site. While no owner is known,
// it returns false even for a site whose samples are on this server's disk, because another member
// may own that site.
func (f *Forwarder) OwnsSite(siteKey uint64) bool {
	p, ok := f.View().Owner(siteKey)
	return ok && p.Name == f.cfg.Name
}

// TryForward forwards a push to the owner of its site and returns the owner's answer. It returns
// nil if this server has to store the push, because this server is the owner or because the owner
// cannot take the push. It also returns nil if ctx ends before an answer has arrived. If forwarding
// fails and the ring has meanwhile got another owner for the site, or a new session of the same
// owner, TryForward tries again.
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
			return nil // the client has closed the connection or the time is over; in both cases the client pushes again
		}
		if now, _ := f.SiteOwner(key); now != owner {
			continue // the ring now names another owner of the site, or the owner has changed its session, address or key
		}
		f.sentTotal.Inc("kept")
		f.limitedLog.Log(slog.LevelWarn, "owner cannot take the push, so this server stores it", "cluster_id", push.ClusterID, "owner", owner.Name, "err", err)
		return nil
	}
}

// acquireOwnerSlot reserves one of the maxForwards slots for requests to an owner. The limit keeps
// an owner that hangs from tying up all memory of this server. It returns an error if no slot is
// free. Otherwise the caller must call release at the end of the request. forwardCtx ends when ctx
// ends, after forwardTimeout, or when the owner has died, left the ring or begun a new session.
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

// send forwards one push to a member and returns the member's answer, which is authenticated with
// the cluster key.
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
	answer, err := f.readAnswer(resp, sealed)
	if err == nil {
		f.noteClock(to, answer.Time)
	}
	return answer, err
}

// readAnswer reads the answer to the request whose sealed envelope is given. It returns an error
// unless the answer is sealed with the cluster key for this very request.
func (f *Forwarder) readAnswer(resp *http.Response, sealedEnvelope []byte) (*pushResponse, error) {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxForwardAnswer))
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK { // an answer with any other status is not sealed, so its text is only quoted in the error
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

// Handler returns the handler of the listener for other members. It calls store only for pushes
// that are sealed with the cluster key, are addressed to this server in its present session, and
// are not replays.
func (f *Forwarder) Handler(store storeForwardedFunc) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+forwardPath, func(w http.ResponseWriter, r *http.Request) {
		answer, result, err := f.receiveForwarded(w, r, store)
		if err != nil {
			refused := toForwardRefused(err)
			f.receivedTotal.Inc(refused.result)
			if refused.hint != "" {
				f.limitedLog.LogPeer(slog.LevelWarn, refused.hint, r.RemoteAddr, "answer", refused.text)
			}
			w.Header().Set("Connection", "close")
			http.Error(w, refused.text, refused.status)
			return
		}
		f.receivedTotal.Inc(result)
		w.Write(answer) // an error means only that the connection failed
	})
	return mux
}

// forwardRefusedError is the error of a forwarded request that this server refuses. The sender gets
// status and text. The sender may lack the cluster key, so the text must not help an attacker. It
// gives no details of the reason, except that it names the versions if the versions of the two
// servers differ.
type forwardRefusedError struct {
	status int
	result string // value of the label result in telemeter_forwards_received_total
	text   string
	hint   string // message for this server's own log, which says what the operator should do; empty if nothing
}

func (e *forwardRefusedError) Error() string { return e.text }

// errForwardRefused returns a forwardRefusedError with the standard text of the HTTP status.
func errForwardRefused(status int, result string) error {
	return &forwardRefusedError{status: status, result: result, text: http.StatusText(status)}
}

// toForwardRefused returns the forwardRefusedError that err wraps. If err wraps none, it returns a
// forwardRefusedError with status 500.
func toForwardRefused(err error) *forwardRefusedError {
	var e *forwardRefusedError
	if !errors.As(err, &e) {
		e = &forwardRefusedError{status: http.StatusInternalServerError, result: "malformed", text: "the request could not be handled"}
	}
	return e
}

// receiveForwarded stores a push that another member forwarded. It returns the sealed answer, and
// the value of the label result under which the caller counts the request. It never forwards the
// push again, even if another member owns the site by now, because the push could then go in a
// circle without end.
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
	ProtectConn(r, env.From) // not before the check for replays, because anybody may send a replay
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
	resp.Time = time.Now().UnixMilli()
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

// openEnvelope decodes and opens a sealed envelope that is given in base64. It also returns the
// sealed bytes: the seals of the body and of the answer are bound to them. The error is a
// forwardRefusedError.
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
		return env, nil, &forwardRefusedError{http.StatusForbidden, "version", "forwarding needs servers of the same version: " + err.Error(),
			"a forwarded push of another version of telemeter arrives: if a server of yours sends it, run the same version on all servers; otherwise firewall the port of --listen-cluster"}
	case errors.Is(err, ErrUnknownKey):
		return env, nil, &forwardRefusedError{http.StatusForbidden, "forged", http.StatusText(http.StatusForbidden),
			"a forwarded push that is sealed with another key arrives: if a server of yours sends it, copy the same cluster.key to both servers; otherwise firewall the port of --listen-cluster"}
	case err != nil:
		return env, nil, errForwardRefused(http.StatusForbidden, "forged")
	case json.Unmarshal(plain, &env) != nil || CheckClusterID(env.Push.ClusterID) != nil:
		return env, nil, errForwardRefused(http.StatusForbidden, "malformed")
	}
	return env, sealedEnvelope, nil
}

var errEnvelopeVersion = errors.New("the envelope has another version")

// checkEnvelopeVersion returns errEnvelopeVersion, wrapped, if the envelope's version is not
// envelopeVersion. It decodes only the version, because an envelope of another version may have
// other fields.
func checkEnvelopeVersion(plain []byte) error {
	env := struct {
		Version int `json:"v"`
	}{}
	if json.Unmarshal(plain, &env) == nil && env.Version != envelopeVersion {
		return fmt.Errorf("%w: it has version %d, and this server supports version %d", errEnvelopeVersion, env.Version, envelopeVersion)
	}
	return nil
}

// acceptSequence reports whether a forwarded request is new, so that the caller can refuse replays.
// A request is new if its sender's session is the newest known session of the sender, and if the
// session's window accepts its sequence number, which happens only once. acceptSequence records
// both numbers of a new request.
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
