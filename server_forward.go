package main

// The sealed port for other members: a push that reaches one server is passed unchanged to the
// server that owns its site. A push is forwarded at most once. An answer comes from the member
// asked, which holds the cluster key. Of a stranger nothing is read but a header. If the owner
// cannot be reached, the receiver stores the push itself.

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

const (
	forwardPath    = "/forward"
	forwardHeader  = "Telemeter-Forward"
	forwardTimeout = 20 * time.Second // less than a client waits
	maxForwardHead = 12 << 10         // bytes, sealed: in base64 they fit the heads of a request
	maxForwards    = 32               // in flight: received of all, each holding a body; sent to one owner
	maxForwardBody = 64<<20 + 1<<10   // the most that --limit-bytes can be, sealed
	maxForwardText = 256 << 10        // bytes of an answer
)

// What a seal is for, so that none can stand for another.
const (
	headSeal   = "forward head"
	bodySeal   = "forward body"
	answerSeal = "forward answer"
)

// RingPeer is a live member of the cluster of servers.
type RingPeer struct {
	Name    string
	Addr    string // host:port of its cluster port
	Session uint64
	KeyID   uint32 // of the key that it seals with, and so holds
}

// RingView is who is live and who owns what. It is immutable.
type RingView struct {
	Ring  *Ring
	Peers map[string]RingPeer // by name, this server included
}

// ForwardedPush is what is to be known of a push beside its body: the claims of its token, when
// its head arrived at the first server, and its headers.
type ForwardedPush struct {
	Cluster          string
	Labels           map[string]string `json:",omitempty"`
	Arrival          int64             // ms
	Type, Encoding   string
	Spool, Consumers string `json:",omitempty"`
}

// PushResult is the answer to a push. The body is text, or JSON if the status is 200.
type PushResult struct {
	Status   int
	Result   string // as telemeter_pushes_total names it
	Body     []byte
	Retry    int  `json:",omitempty"` // s
	Untimely bool `json:",omitempty"` // every sample was dropped for its time
}

// ForwarderConfig configures a Forward.
type ForwarderConfig struct {
	Name    string // this server's
	Box     *Box
	Client  *http.Client
	Log     *slog.Logger
	Metrics *Metrics
	// Take takes a push that another member received. An error has the receiver keep it.
	Take func(ctx context.Context, up *ForwardedPush, body []byte) (*PushResult, error)
}

// Forwarder sends pushes to their owners and receives those of others. It is safe
// for concurrent use.
type Forwarder struct {
	cfg      ForwarderConfig
	view     atomic.Pointer[RingView]
	count    atomic.Uint64 // of requests sent in this session
	received chan struct{}

	mu      sync.Mutex // guards both
	windows map[string]*peerWindow
	asked   map[string]*asked // by the owner's name

	sent, taken *Counter
	seconds     *Histogram
}

type peerWindow struct {
	session uint64
	window  ReplayWindow
}

// asked is what waits for the answers of one owner.
type asked struct {
	session uint64
	n       int
	ctx     context.Context // ends when that session of the owner is live no more
	cancel  context.CancelFunc
}

// NewForwarder returns a Forward that knows of no members: this server owns all.
func NewForwarder(cfg ForwarderConfig) *Forwarder {
	m := cfg.Metrics
	f := &Forwarder{
		cfg: cfg, received: make(chan struct{}, maxForwards), windows: map[string]*peerWindow{}, asked: map[string]*asked{},
		sent:    m.Counter("telemeter_forwards_sent_total", "Pushes for other owners by result: accepted, refused by the owner, or kept: held here because the owner could not take them.", "result"),
		taken:   m.Counter("telemeter_forwards_received_total", "Pushes forwarded by other members by result.", "result"),
		seconds: m.Histogram("telemeter_forward_duration_seconds", "Time until the owner answered.", []float64{.001, .005, .01, .05, .1, .5, 1, 5, 20}),
	}
	for _, result := range []string{"accepted", "refused", "kept"} {
		f.sent.Add(0, result)
	}
	for _, result := range []string{"accepted", "refused", "forged", "misrouted", "replayed", "malformed", "overloaded", "returned"} {
		f.taken.Add(0, result)
	}
	f.view.Store(&RingView{Ring: NewRing(nil, 0)})
	return f
}

// SetView replaces who is live and who owns what. Nobody waits any longer for
// an owner that is live no more.
func (f *Forwarder) SetView(v *RingView) {
	f.view.Store(v)
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, a := range f.asked {
		if p, live := v.Peers[name]; !live || p.Session != a.session {
			a.cancel()
			delete(f.asked, name)
		}
	}
	for name := range f.windows {
		if _, live := v.Peers[name]; !live && len(f.windows) > MaxSlots {
			delete(f.windows, name)
		}
	}
}

// View returns what SetView set.
func (f *Forwarder) View() *RingView { return f.view.Load() }

// Owner returns the member that owns the site of a hash, and whether it is this one.
// While nobody is known, it is.
func (f *Forwarder) Owner(hash uint64) (p RingPeer, self bool) {
	v := f.view.Load()
	name, ok := v.Ring.Owner(hash)
	if p, live := v.Peers[name]; ok && live && name != f.cfg.Name {
		return p, false
	}
	return RingPeer{Name: f.cfg.Name}, true
}

// Forward has the owner of a push take it, and returns the owner's answer; nil if this server
// is the owner, or has to take the push because the owner cannot.
func (f *Forwarder) Forward(ctx context.Context, up *ForwardedPush, body []byte) *PushResult {
	hash := SiteKey(up.Cluster)
	for {
		owner, self := f.Owner(hash)
		if self {
			return nil
		}
		begin := time.Now()
		a, err := f.ask(ctx, owner, up, body)
		f.seconds.Observe(time.Since(begin).Seconds())
		if err == nil {
			result := "accepted"
			if a.Status != http.StatusOK {
				result = "refused"
			}
			f.sent.Inc(result)
			return a
		}
		if ctx.Err() != nil {
			return nil // the sender has gone, or no time is left: it sends the push again
		}
		if now, _ := f.Owner(hash); now != owner {
			continue // it died meanwhile, and there is another; each turn takes a change of the ring
		}
		f.sent.Inc("kept")
		f.cfg.Log.Warn("owner cannot take the push; it is held here", "cluster", up.Cluster, "owner", owner.Name, "err", err)
		return nil
	}
}

// reach returns a context for asking an owner, and what has to be called when
// that is done. So many may wait for one owner and no more: one that hangs must
// not gather all the memory there is.
func (f *Forwarder) reach(ctx context.Context, to RingPeer) (context.Context, func(), error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a := f.asked[to.Name]
	if a == nil || a.session != to.Session {
		if a != nil {
			a.cancel()
		}
		a = &asked{session: to.Session}
		a.ctx, a.cancel = context.WithCancel(context.Background())
		f.asked[to.Name] = a
	}
	if a.n >= maxForwards {
		return nil, nil, fmt.Errorf("%d pushes wait for it", a.n)
	}
	a.n++
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	stop := context.AfterFunc(a.ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
		f.mu.Lock()
		a.n--
		f.mu.Unlock()
	}, nil
}

// head says what a request is, to whom, and from whom. It is sealed by itself, so
// that no body is read of one who could not seal it; sessions and the count make
// a replay known, also across restarts of either side.
type head struct {
	From, To               string
	FromSession, ToSession uint64
	Count                  uint64
	Upload                 ForwardedPush
}

// ask sends one push and returns the authenticated answer.
func (f *Forwarder) ask(ctx context.Context, to RingPeer, up *ForwardedPush, body []byte) (*PushResult, error) {
	ctx, done, err := f.reach(ctx, to)
	if err != nil {
		return nil, fmt.Errorf("forwarding: %w", err)
	}
	defer done()
	said, err := json.Marshal(head{
		From: f.cfg.Name, FromSession: f.view.Load().Peers[f.cfg.Name].Session,
		To: to.Name, ToSession: to.Session, Count: f.count.Add(1), Upload: *up,
	})
	if err != nil {
		return nil, fmt.Errorf("forwarding: %w", err)
	}
	sealed := f.cfg.Box.Seal(nil, said, headSeal, nil, to.KeyID)
	if len(sealed) > maxForwardHead {
		return nil, fmt.Errorf("forwarding: labels and headers take %d bytes, which is more than %d", len(sealed), maxForwardHead)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+to.Addr+forwardPath,
		bytes.NewReader(f.cfg.Box.Seal(nil, body, bodySeal, sealed, to.KeyID)))
	if err != nil {
		return nil, fmt.Errorf("forwarding: %w", err)
	}
	req.Header.Set(forwardHeader, base64.RawURLEncoding.EncodeToString(sealed))
	resp, err := f.cfg.Client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("forwarding: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxForwardText))
	if err != nil {
		return nil, fmt.Errorf("forwarding: reading the answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("forwarding: %s answered %s", to.Addr, resp.Status)
	}
	plain, err := f.cfg.Box.Open(nil, b, answerSeal, sealed)
	if err != nil {
		return nil, fmt.Errorf("forwarding: the answer of %s: %w", to.Addr, err)
	}
	var a PushResult
	if err := json.Unmarshal(plain, &a); err != nil || a.Status < 200 || a.Status > 599 {
		return nil, fmt.Errorf("forwarding: the answer of %s is malformed (%v)", to.Addr, err)
	}
	return &a, nil
}

// Handler returns the handler of the cluster port.
func (f *Forwarder) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+forwardPath, f.receive)
	return mux
}

// receive takes a push that another member forwards. The push is not forwarded again,
// whichever member owns its site by now, because a push that went round would never be
// answered. A stranger learns nothing but that it cannot seal.
func (f *Forwarder) receive(w http.ResponseWriter, r *http.Request) {
	refuse := func(status int, result string) {
		f.taken.Inc(result)
		w.Header().Set("Connection", "close")
		http.Error(w, http.StatusText(status), status)
	}
	var h head
	sealed, err := base64.RawURLEncoding.DecodeString(r.Header.Get(forwardHeader))
	if err != nil || len(sealed) > maxForwardHead {
		refuse(http.StatusForbidden, "forged")
		return
	}
	plain, err := f.cfg.Box.Open(nil, sealed, headSeal, nil)
	if err != nil {
		refuse(http.StatusForbidden, "forged")
		return
	}
	if err := json.Unmarshal(plain, &h); err != nil || CheckClusterID(h.Upload.Cluster) != nil {
		refuse(http.StatusForbidden, "malformed")
		return
	}
	if v := f.view.Load(); h.To != f.cfg.Name || h.ToSession != v.Peers[f.cfg.Name].Session {
		refuse(http.StatusForbidden, "misrouted")
		return
	}
	if !f.fresh(h) {
		refuse(http.StatusForbidden, "replayed")
		return
	}
	select {
	case f.received <- struct{}{}:
		defer func() { <-f.received }()
	default:
		refuse(http.StatusServiceUnavailable, "overloaded")
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxForwardBody))
	if err == nil {
		body, err = f.cfg.Box.Open(nil, body, bodySeal, sealed)
	}
	if err != nil {
		refuse(http.StatusForbidden, "forged")
		return
	}
	a, err := f.cfg.Take(r.Context(), &h.Upload, body)
	if err != nil {
		f.cfg.Log.Debug("forwarded push is left to its receiver", "cluster", h.Upload.Cluster, "from", h.From, "err", err)
		refuse(http.StatusServiceUnavailable, "returned")
		return
	}
	b, err := json.Marshal(a)
	if err != nil {
		refuse(http.StatusInternalServerError, "malformed")
		return
	}
	if a.Status == http.StatusOK {
		f.taken.Inc("accepted")
	} else {
		f.taken.Inc("refused")
	}
	w.Write(f.cfg.Box.Seal(nil, b, answerSeal, sealed, f.cfg.Box.KeyID(sealed))) // an error is the connection's
}

// fresh reports whether a request was not seen before. Of each sender only its
// newest session counts.
func (f *Forwarder) fresh(h head) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.windows[h.From]
	if w == nil || h.FromSession > w.session {
		w = &peerWindow{session: h.FromSession}
		f.windows[h.From] = w
	}
	return h.FromSession == w.session && w.window.Accept(h.Count)
}
