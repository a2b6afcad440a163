package main

// The sealed cluster port: a push that reaches one server of a cluster of servers
// is stored by the one that owns its cluster ID. Invariants: a push is forwarded
// once at most; a success means that the member asked, who holds the cluster key,
// has it durable; of a stranger nothing is read but a header; an owner that cannot
// be reached costs no sample, only order. This file must not know of tokens, of
// what clients send, or how members are found.

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

const (
	forwardPath    = "/forward"
	forwardHeader  = "Telemeter-Forward"
	forwardTimeout = 20 * time.Second // less than a client waits
	maxForwardHead = 4 << 10          // bytes in base64
	maxForwards    = 32               // in flight: received of all, each holding a body; sent to one owner
	maxForwardBody = 256 << 20
	maxNotes       = 1024 // waiting to be told to owners
)

// What a seal is for, so that none can stand for another.
const (
	headSeal   = "forward head"
	bodySeal   = "forward body"
	answerSeal = "forward answer"
)

// ErrPace: the owner has seen more pushes of the cluster ID than its pace allows.
type ErrPace struct {
	Reason string
	Retry  time.Duration
}

func (e *ErrPace) Error() string { return e.Reason }

// Peer is a live member of the cluster of servers.
type Peer struct {
	Name    string
	Addr    string // host:port of its cluster port
	Session uint64
	KeyID   uint32 // of the key that it seals with, and so holds
}

// View is who is live and who owns what. It is immutable.
type View struct {
	Ring  *Ring
	Peers map[string]Peer // by name, this server included
}

// NeverExpires says that a token does not expire.
const NeverExpires = -1

// Note is what a server tells the owner of a cluster ID beside samples, so that
// one server alone shows it.
type Note struct {
	Expires int64 // of the client token, Unix seconds, or NeverExpires; 0 = not known
	Failed  bool  // a push was refused
}

// ForwardConfig configures a Forward.
type ForwardConfig struct {
	Name    string // this server's
	Store   *Store
	Box     *Box
	Client  *http.Client
	Log     *slog.Logger
	Metrics *Metrics
	// Begin and End hold the pace of a cluster ID at its owner, for one that
	// alternates between servers. Noted hears what others note.
	Begin func(id string) (wait time.Duration, err error)
	End   func(id string)
	Noted func(id string, n Note)
	// Handed takes what another member hands over, durable when it returns nil.
	Handed func(ctx context.Context, from string, m HandoffMessage) error
}

// HandoffMessage is what one server hands another: batches of a cluster, or, without
// one, the word that it holds nothing more of what the other owns on that ring.
type HandoffMessage struct {
	Cluster string
	Ring    uint64 // its version
	Batches []byte // as AppendBatches made them
}

// ErrNotOwner: a server was handed a cluster that it does not own, or while it leaves.
var ErrNotOwner = errors.New("it does not own the cluster ID")

// RefusedByOwner is an owner's answer that it does not take a cluster.
type RefusedByOwner struct{ err error }

func (e *RefusedByOwner) Error() string { return e.err.Error() }
func (e *RefusedByOwner) Unwrap() error { return e.err }

// Forward sends pushes to their owners and receives those of others. It is safe
// for concurrent use.
type Forward struct {
	cfg      ForwardConfig
	view     atomic.Pointer[View]
	count    atomic.Uint64 // of requests sent in this session
	received chan struct{}
	notes    chan noted

	mu      sync.Mutex // guards both
	windows map[string]*peerWindow
	asked   map[string]*asked // by the owner's name

	sent, taken, lostNotes *Counter
	seconds                *Histogram
}

type peerWindow struct {
	session uint64
	window  Window
}

// asked is what waits for the answers of one owner.
type asked struct {
	session uint64
	n       int
	ctx     context.Context // ends when that session of the owner is live no more
	cancel  context.CancelFunc
}

type noted struct {
	id   string
	note Note
}

// NewForward returns a Forward that knows of no members: it stores all itself.
func NewForward(cfg ForwardConfig) *Forward {
	m := cfg.Metrics
	f := &Forward{
		cfg: cfg, received: make(chan struct{}, maxForwards), notes: make(chan noted, maxNotes), windows: map[string]*peerWindow{}, asked: map[string]*asked{},
		sent:      m.Counter("telemeter_forwards_sent_total", "Pushes for other owners by result: stored, refused by the owner, or hinted: held here because the owner could not be reached.", "result"),
		taken:     m.Counter("telemeter_forwards_received_total", "Pushes forwarded by other members by result.", "result"),
		lostNotes: m.Counter("telemeter_forward_notes_lost_total", "Notes on cluster IDs that their owner was not told."),
		seconds:   m.Histogram("telemeter_forward_duration_seconds", "Time until the owner answered.", []float64{.001, .005, .01, .05, .1, .5, 1, 5, 20}),
	}
	for _, result := range []string{"stored", "refused", "hinted"} {
		f.sent.Add(0, result)
	}
	for _, result := range []string{"stored", "refused", "forged", "misrouted", "replayed", "malformed", "overloaded"} {
		f.taken.Add(0, result)
	}
	f.view.Store(&View{Ring: NewRing(nil, 0)})
	return f
}

// SetView replaces who is live and who owns what. Nobody waits any longer for
// an owner that is live no more.
func (f *Forward) SetView(v *View) {
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
func (f *Forward) View() *View { return f.view.Load() }

// Owner returns the member that owns a cluster ID, and whether it is this one.
// While nobody is known, it is.
func (f *Forward) Owner(id string) (p Peer, self bool) {
	v := f.view.Load()
	name, ok := v.Ring.Owner(RingKey(id))
	if p, live := v.Peers[name]; ok && live && name != f.cfg.Name {
		return p, false
	}
	return Peer{Name: f.cfg.Name}, true
}

// Append stores a push at the owner of its cluster ID, as Store.Append does: nil
// means durable there. The errors of the owner's store come back as such, and its
// pace as ErrPace. When the owner cannot be reached, or what answers is not the
// owner, the push is held here: a hint.
func (f *Forward) Append(ctx context.Context, id string, p *Push, n Note) (AppendResult, error) {
	for {
		owner, self := f.Owner(id)
		if self {
			f.cfg.Noted(id, n)
			return f.cfg.Store.Append(ctx, id, p)
		}
		begin := time.Now()
		a, err := f.ask(ctx, owner, head{Cluster: id, Note: n}, EncodePush(nil, p))
		f.seconds.Observe(time.Since(begin).Seconds())
		switch {
		case err == nil && a.Kind == "":
			f.sent.Inc("stored")
			return a.Result, nil
		case err == nil:
			f.sent.Inc("refused")
			return AppendResult{}, a.err()
		case ctx.Err() != nil:
			return AppendResult{}, ctx.Err()
		}
		if now, _ := f.Owner(id); now != owner {
			continue // it died meanwhile, and there is another; each turn takes a change of the ring
		}
		f.sent.Inc("hinted")
		f.cfg.Log.Warn("owner cannot be reached; the push is held here", "cluster", id, "owner", owner.Name, "err", err)
		return f.cfg.Store.Append(ctx, id, p)
	}
}

// reach returns a context for asking an owner, and what has to be called when
// that is done. So many may wait for one owner and no more: one that hangs must
// not gather all the memory there is.
func (f *Forward) reach(ctx context.Context, to Peer) (context.Context, func(), error) {
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

// Tell has the owner of a cluster ID know n, later and if it can. It reports
// false if this server is the owner.
func (f *Forward) Tell(id string, n Note) bool {
	if _, self := f.Owner(id); self {
		return false
	}
	select {
	case f.notes <- noted{id, n}:
	default:
		f.lostNotes.Inc()
	}
	return true
}

// Run tells owners what is noted, until ctx ends.
func (f *Forward) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case n := <-f.notes:
			owner, self := f.Owner(n.id)
			if self {
				f.cfg.Noted(n.id, n.note)
			} else if _, err := f.ask(ctx, owner, head{Cluster: n.id, Note: n.note}, nil); err != nil {
				f.lostNotes.Inc()
				f.cfg.Log.Debug("owner was not told", "cluster", n.id, "owner", owner.Name, "err", err)
			}
		}
	}
}

// head says what a request is, to whom, and from whom. It is sealed by itself, so
// that no body is read of one who could not seal it; sessions and the count make
// a replay known, also across restarts of either side.
type head struct {
	From, To               string
	FromSession, ToSession uint64
	Count                  uint64
	Kind                   string
	Cluster                string // of a push, and of what is handed over
	Note                   Note
	Ring                   uint64 // of what is handed over
}

// What a request can be beside a push.
const (
	kindHandoff = "handoff" // with batches
	kindDone    = "done"    // nothing more is held here of what the other owns
)

// verdict is what the owner says. Kind is empty for a success.
type verdict struct {
	Result AppendResult
	Kind   string
	Text   string
	Retry  time.Duration
}

const (
	refusedSeries   = "series limit"
	refusedTooLarge = "too large"
	refusedFull     = "full"
	refusedPace     = "pace"
	refusedNotOwner = "not the owner"
	refusedClock    = "clock"
	refusedOther    = "other"
)

// err makes of a refusal what the store returned there.
func (a *verdict) err() error {
	switch a.Kind {
	case refusedSeries:
		return fmt.Errorf("%w (at its owner: %s)", ErrSeriesLimit, a.Text)
	case refusedTooLarge:
		return fmt.Errorf("%w (at its owner: %s)", ErrTooLarge, a.Text)
	case refusedFull:
		return fmt.Errorf("%w (at its owner: %s)", ErrFull, a.Text)
	case refusedPace:
		return &ErrPace{Reason: a.Text, Retry: a.Retry}
	case refusedNotOwner:
		return ErrNotOwner
	case refusedClock:
		return fmt.Errorf("%w (at its owner)", ErrClock)
	}
	return fmt.Errorf("the owner refused: %s", a.Text)
}

func refusalOf(err error) verdict {
	a := verdict{Kind: refusedOther, Text: err.Error()}
	for kind, is := range map[string]error{
		refusedSeries: ErrSeriesLimit, refusedTooLarge: ErrTooLarge, refusedFull: ErrFull, refusedNotOwner: ErrNotOwner, refusedClock: ErrClock,
	} {
		if errors.Is(err, is) {
			a.Kind = kind
		}
	}
	return a
}

// Hand hands a message over: nil means that the member has it durable. Errors:
// ErrNotOwner, RefusedByOwner, and that it cannot be reached.
func (f *Forward) Hand(ctx context.Context, to Peer, m HandoffMessage) error {
	h := head{Kind: kindHandoff, Cluster: m.Cluster, Ring: m.Ring}
	if m.Cluster == "" {
		h.Kind = kindDone
	}
	a, err := f.ask(ctx, to, h, m.Batches)
	if err != nil {
		return err
	}
	if a.Kind == "" {
		return nil
	}
	if err := a.err(); errors.Is(err, ErrNotOwner) {
		return err
	}
	return &RefusedByOwner{a.err()}
}

// ask sends one request and returns the authenticated answer. h says what it is.
func (f *Forward) ask(ctx context.Context, to Peer, h head, body []byte) (*verdict, error) {
	ctx, done, err := f.reach(ctx, to)
	if err != nil {
		return nil, fmt.Errorf("forwarding: %w", err)
	}
	defer done()
	h.From, h.FromSession = f.cfg.Name, f.view.Load().Peers[f.cfg.Name].Session
	h.To, h.ToSession, h.Count = to.Name, to.Session, f.count.Add(1)
	said, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("forwarding: %w", err)
	}
	sealed := f.cfg.Box.Seal(nil, said, headSeal, nil, to.KeyID)
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
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
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
	var a verdict
	if err := json.Unmarshal(plain, &a); err != nil {
		return nil, fmt.Errorf("forwarding: the answer of %s: %w", to.Addr, err)
	}
	return &a, nil
}

// Handler returns the handler of the cluster port.
func (f *Forward) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+forwardPath, f.receive)
	return mux
}

// receive stores what another member forwards. It is never forwarded again,
// whoever owns it by now: a push that went round would never be answered. Who
// cannot seal learns nothing but that.
func (f *Forward) receive(w http.ResponseWriter, r *http.Request) {
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
	if err := json.Unmarshal(plain, &h); err != nil || h.Kind != kindDone && ValidClusterID(h.Cluster) != nil {
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
	a := f.store(r.Context(), h, body)
	b, err := json.Marshal(a)
	if err != nil {
		refuse(http.StatusInternalServerError, "malformed")
		return
	}
	if a.Kind == "" {
		f.taken.Inc("stored")
	} else {
		f.taken.Inc("refused")
	}
	w.Write(f.cfg.Box.Seal(nil, b, answerSeal, sealed, f.cfg.Box.KeyID(sealed))) // an error is the connection's
}

// fresh reports whether a request was not seen before. Of each sender only its
// newest session counts.
func (f *Forward) fresh(h head) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.windows[h.From]
	if w == nil || h.FromSession > w.session {
		w = &peerWindow{session: h.FromSession}
		f.windows[h.From] = w
	}
	return h.FromSession == w.session && w.window.Take(h.Count)
}

// store takes one forwarded push, or note, or what is handed over.
func (f *Forward) store(ctx context.Context, h head, body []byte) verdict {
	if h.Kind != "" {
		m := HandoffMessage{Cluster: h.Cluster, Ring: h.Ring, Batches: body}
		if !(h.Kind == kindHandoff && h.Cluster != "" || h.Kind == kindDone && h.Cluster == "") {
			return verdict{Kind: refusedOther, Text: "a message of no known kind"}
		}
		if err := f.cfg.Handed(ctx, h.From, m); err != nil {
			return refusalOf(err)
		}
		return verdict{}
	}
	if h.Note != (Note{}) {
		f.cfg.Noted(h.Cluster, h.Note)
	}
	if len(body) == 0 {
		return verdict{}
	}
	if wait, err := f.cfg.Begin(h.Cluster); err != nil {
		return verdict{Kind: refusedPace, Text: err.Error(), Retry: wait}
	}
	defer f.cfg.End(h.Cluster)
	var p Push
	if err := DecodePush(&p, body, h.Cluster); err != nil {
		return verdict{Kind: refusedOther, Text: err.Error()}
	}
	res, err := f.cfg.Store.Append(ctx, h.Cluster, &p)
	if err != nil {
		f.cfg.Log.Warn("forwarded push refused", "cluster", h.Cluster, "from", h.From, "err", err)
		return refusalOf(err)
	}
	return verdict{Result: res}
}

// EncodePush appends p as it is forwarded: what it tells of the source's clock, and
// for each sample its line (empty if it is that of the sample before), time and value.
func EncodePush(b []byte, p *Push) []byte {
	b = appendClock(b, p.Clock)
	var before []byte
	for _, s := range p.Samples {
		line := p.Line(s)
		if bytes.Equal(line, before) {
			b = append(b, 0)
		} else {
			b = append(binary.AppendUvarint(b, uint64(len(line))), line...)
		}
		before = line
		b = binary.AppendVarint(b, s.T)
		b = binary.LittleEndian.AppendUint64(b, math.Float64bits(s.V))
	}
	return b
}

func appendClock(b []byte, c ScrapeClock) []byte {
	if !c.Known {
		return append(b, 0)
	}
	b = binary.AppendVarint(append(b, 1), c.Offset)
	return binary.LittleEndian.AppendUint64(binary.AppendVarint(b, c.Base), c.Boot)
}

func cutClock(b []byte) (c ScrapeClock, rest []byte, err error) {
	if len(b) == 0 || b[0] > 1 {
		return c, nil, errPush
	}
	if c.Known, b = b[0] == 1, b[1:]; !c.Known {
		return c, b, nil
	}
	for _, v := range []*int64{&c.Offset, &c.Base} {
		n := 0
		if *v, n = binary.Varint(b); n <= 0 || *v < -2*MaxClockTime || *v > 2*MaxClockTime {
			return c, nil, errPush
		}
		b = b[n:]
	}
	if len(b) < 8 {
		return c, nil, errPush
	}
	c.Boot = binary.LittleEndian.Uint64(b)
	return c, b[8:], nil
}

var errPush = errors.New("malformed push")

// DecodePush reads what EncodePush wrote into p. Every line has to be in normal
// form and of the cluster: a member's mistake should not be served.
func DecodePush(p *Push, b []byte, cluster string) error {
	var parser Parser
	var err error
	if p.Clock, b, err = cutClock(b); err != nil {
		return err
	}
	last := Sample{}
	for len(b) > 0 {
		n, k := binary.Uvarint(b)
		if k <= 0 || n > uint64(len(b)-k) || n > MaxLine {
			return errPush
		}
		if n > 0 {
			line := b[k : k+int(n)]
			if err := parser.CheckOf(line, cluster); err != nil {
				return err
			}
			if int64(len(p.Arena)+len(line)) > math.MaxUint32 {
				return errPush
			}
			last.Off, last.Len = uint32(len(p.Arena)), uint32(n)
			p.Arena = append(p.Arena, line...)
		} else if last.Len == 0 {
			return errPush
		}
		b = b[k+int(n):]
		if last.T, k = binary.Varint(b); k <= 0 || len(b)-k < 8 {
			return errPush
		}
		if last.V = math.Float64frombits(binary.LittleEndian.Uint64(b[k:])); last.V != last.V {
			last.V = math.NaN()
		}
		b = b[k+8:]
		p.Samples = append(p.Samples, last)
	}
	return nil
}
