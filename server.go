package main

// The server's HTTP side: who may push what, and what a scrape gets. Invariants:
// nothing of a body is read before its sender is authenticated; a 200 to /upload
// means durable; an answer to one site tells nothing of another, no secret and no
// path; all memory that remote input can claim is bounded, per sender and in all.
// This file must not know of sockets, TLS, files or signals: main wires those.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// UploadTokenTTL is how long an upload token is valid: short, because it is
	// the one that is sent often, long against an interval.
	UploadTokenTTL = time.Hour
	maxUploads     = 256              // in flight, each holding a body
	sampleBytes    = 24               // of a Sample
	maxPending     = 512 << 20        // bytes of decoded pushes that wait to be stored
	maxWorkspace   = 1 << 20          // bytes of one that is kept for the next push
	uploadWait     = 30 * time.Second // for an earlier push or a busy disk
	maxReason      = 1 << 10          // bytes said of a refused push: an error can quote all that was sent
)

// ServerConfig configures a Server.
type ServerConfig struct {
	Store        *Store
	Forward      *Forward // to the owners of cluster IDs; nil: this server owns all
	Member       *RingMember
	Hidden       func(id string, consumer bool) bool // see Scraper
	Metrics      *Metrics
	Log          *slog.Logger
	Now          func() time.Time
	MaxSampleAge time.Duration // how long the newest sample of a series is shown
	LimitBytes   int64         // of a body as sent
	LimitScrape  int           // samples in one scrape
	RateEvery    time.Duration // one push per cluster ID and this, in bursts of 60; 0 = no limit
	Authorize    *Asker        // asked instead of verifying client tokens; nil: verify
}

// ServerState is what a reload replaces, all at once.
type ServerState struct {
	Keys          Keys
	Revoked       Revoked
	Normalizer    *Normalizer
	FederateToken string // asked for on the internal listener; "" = open
}

// Server answers clients and scrapers. It is safe for concurrent use.
type Server struct {
	cfg        ServerConfig
	state      atomic.Pointer[ServerState]
	ready      atomic.Bool
	uploads    chan struct{}
	pending    atomic.Int64 // bytes of decoded pushes that wait to be stored
	decoding   chan struct{}
	bodies     sync.Pool // *[]byte
	workspaces sync.Pool // *workspace
	instrument func(string, http.Handler) http.Handler

	pushes, samples, accepted, duplicates, dropped, skipped, received *Counter
	unauthorized                                                      *Counter
	write                                                             *Histogram
	inFlight                                                          *Gauge

	senders  *Senders
	federate *Federate
}

// workspace is the memory that decoding a push takes, reused unless it has grown: a
// push that waits to be stored keeps it, and only what the push itself takes of it is
// counted.
type workspace struct {
	decompressor Decompressor
	decoder      Decoder
	push         Push
	size         int // bytes, of what can grow
}

// NewServer returns a Server that is not ready and has no keys: see Reload.
func NewServer(cfg ServerConfig) *Server {
	m := cfg.Metrics
	s := &Server{
		cfg: cfg, instrument: NewInstrument(m), senders: NewSenders(cfg.RateEvery),
		uploads:  make(chan struct{}, maxUploads),
		decoding: make(chan struct{}, max(4, 2*runtime.GOMAXPROCS(0))),

		pushes:       m.Counter("telemeter_pushes_total", "Pushes by result.", "result"),
		received:     m.Counter("telemeter_received_bytes_total", "Bytes of push bodies received, as sent."),
		samples:      m.Counter("telemeter_samples_received_total", "Samples in pushes that could be decoded."),
		accepted:     m.Counter("telemeter_samples_accepted_total", "Samples that were new and are durable."),
		duplicates:   m.Counter("telemeter_samples_duplicate_total", "Samples that were held already with the same value."),
		dropped:      m.Counter("telemeter_samples_dropped_total", "Samples of accepted pushes that were dropped, by reason.", "reason"),
		skipped:      m.Counter("telemeter_parts_skipped_total", "Parts of samples that are not carried, by kind.", "kind"),
		unauthorized: m.Counter("telemeter_unauthorized_total", "Requests without a valid token, by reason.", "reason"),
		write:        m.Histogram("telemeter_store_fsync_duration_seconds", "Time to write a push to its log and fsync it.", []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5}),
		inFlight:     m.Gauge("telemeter_pushes_in_flight", "Pushes being handled."),
	}
	s.federate = NewFederate(FederateConfig{
		Store: cfg.Store, Senders: s.senders, Owned: s.owned, Revoked: s.revoked, Hidden: cfg.Hidden, Metrics: m, Log: cfg.Log, Now: cfg.Now,
		MaxSampleAge: cfg.MaxSampleAge, LimitScrape: cfg.LimitScrape,
	})
	s.bodies.New = func() any { return new([]byte) }
	s.workspaces.New = func() any { return &workspace{} }
	s.state.Store(&ServerState{Normalizer: &Normalizer{}})
	for _, reason := range []string{DropNotAllowed, DropRequiredLabel, DropInvalid, dropConflict, dropTooOld, dropFuture} {
		s.dropped.Add(0, reason)
	}
	for _, reason := range []string{
		"missing", "malformed", "expired", "forged", "revoked", "kind", "other_cluster", "federate_token", "unavailable", "signing",
	} {
		s.unauthorized.Add(0, reason)
	}
	for kind := range (Skipped{}).ByKind() {
		s.skipped.Add(0, kind)
	}
	for _, result := range []string{
		resultAccepted, resultRateLimited, resultOverloaded, resultFull, resultFailed, resultTooLarge, resultUnsupported, resultMalformed,
	} {
		s.pushes.Add(0, result)
	}
	m.OnCollect(s.collect(m))
	return s
}

// collect returns a function that sets metrics from the store's stats.
func (s *Server) collect(m *Metrics) func() {
	bytes := m.Gauge("telemeter_store_bytes", "Bytes of all logs on disk.")
	clusters := m.Gauge("telemeter_store_clusters", "Clusters known.")
	series := m.Gauge("telemeter_store_series", "Series held.")
	samples := m.Gauge("telemeter_store_samples", "Samples held.")
	damaged := m.Counter("telemeter_store_logs_damaged_total", "Logs found damaged, cut short or missing at start; of damaged ones copies are kept.")
	torn := m.Counter("telemeter_store_torn_bytes_total", "Bytes of unfinished writes that were cut from the ends of logs at start.")
	evicted := m.Counter("telemeter_store_samples_evicted_total", "Samples dropped to stay within the limit on samples: every consumer has read them, or there was none so far.")
	expired := m.Counter("telemeter_store_samples_expired_total", "Samples dropped because they outlived retention.")
	unread := m.Counter("telemeter_store_samples_unread_dropped_total", "Samples dropped because they outlived retention before every consumer had them.")
	compactions := m.Counter("telemeter_store_compactions_total", "Logs rewritten.")
	return func() {
		st := s.cfg.Store.Stats()
		bytes.Set(float64(st.Bytes))
		clusters.Set(float64(len(st.Clusters)))
		held, n := int64(0), 0
		for _, c := range st.Clusters {
			held, n = held+c.Samples, n+c.Series
		}
		series.Set(float64(n))
		samples.Set(float64(held))
		damaged.Total(float64(st.Damaged))
		torn.Total(float64(st.Torn))
		evicted.Total(float64(st.Evicted))
		expired.Total(float64(st.Expired))
		unread.Total(float64(st.Unread))
		compactions.Total(float64(st.Compactions))
	}
}

// Reload replaces keys, revocations, rules and the federate token.
func (s *Server) Reload(st ServerState) { s.state.Store(&st) }

// SetReady says whether /healthz/ready answers 200, and pushes are taken.
func (s *Server) SetReady(ready bool) { s.ready.Store(ready) }

// External returns the handler of the listener for clients.
func (s *Server) External() http.Handler {
	mux := http.NewServeMux()
	HealthRoutes(mux, s.ready.Load)
	mux.Handle("POST /authorize", s.instrument("authorize", http.HandlerFunc(s.authorize)))
	mux.Handle("POST /upload", s.instrument("upload", http.HandlerFunc(s.upload)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Until it is known that nothing of the body is left. A connection that is to
		// be kept waits for the rest of it before the answer goes out, when nothing
		// counts it any more; and one that rests takes one of a bounded number.
		w.Header().Set("Connection", "close")
		mux.ServeHTTP(w, r)
	})
}

// Internal returns the handler of the listener for scrapers and operators.
func (s *Server) Internal() http.Handler {
	mux := http.NewServeMux()
	HealthRoutes(mux, s.ready.Load)
	protect := func(name string, h http.Handler) http.Handler {
		return s.instrument(name, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			token, _ := Bearer(r.Header.Get("Authorization"))
			if want := s.state.Load().FederateToken; want != "" && !EqualSecret(token, want) {
				s.refuse(w, "federate_token", "this listener needs the bearer token of --federate-token-file")
				return
			}
			h.ServeHTTP(w, r)
		}))
	}
	mux.Handle("GET /federate", protect("federate", s.federate))
	mux.Handle("GET /metrics", protect("metrics", s.cfg.Metrics))
	paths := []string{"/federate", "/metrics", "/healthz", "/healthz/ready", "/debug/pprof/"}
	if s.cfg.Member != nil {
		paths = append(paths, "/sd", "/debug/cluster")
		mux.Handle("GET /sd", protect("sd", http.HandlerFunc(s.cfg.Member.ServeSD)))
		mux.Handle("GET /debug/cluster", protect("cluster", http.HandlerFunc(s.cfg.Member.ServeDebug)))
	}
	mux.Handle("GET /{$}", protect("index", Index(paths...)))
	debug := http.NewServeMux()
	debug.HandleFunc("/debug/pprof/", pprof.Index)
	debug.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	debug.HandleFunc("/debug/pprof/profile", pprof.Profile)
	debug.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	debug.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.Handle("/debug/pprof/", protect("pprof", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
			http.Error(w, "profiles are served to loopback addresses only", http.StatusForbidden)
			return
		}
		debug.ServeHTTP(w, r)
	})))
	return mux
}

// Results of a push, as telemeter_pushes_total names them.
const (
	resultAccepted    = "accepted"
	resultRateLimited = "rate_limited"
	resultOverloaded  = "overloaded"
	resultFull        = "full"
	resultFailed      = "failed"
	resultTooLarge    = "too_large"
	resultUnsupported = "unsupported"
	resultMalformed   = "malformed"

	dropConflict = "conflicting_value"
	dropTooOld   = "too_old"
	dropFuture   = "future"
)

// refusal is a push that is not taken: the status, what metrics call it, and
// what the sender is told.
type refusal struct {
	status int
	result string
	why    string
	retry  time.Duration
}

func (r *refusal) Error() string { return r.why }

// upload takes a push.
func (s *Server) upload(w http.ResponseWriter, r *http.Request) {
	kinds := []string{KindUpload, KindClient}
	if s.cfg.Authorize != nil {
		kinds = kinds[:1]
	}
	t, ok := s.authenticate(w, r, kinds...)
	if !ok {
		return
	}
	arrival := s.cfg.Now() // of the head: the body may take long
	answer, ref := s.admit(w, r, t, arrival)
	if ref == nil {
		w.Header().Del("Connection")
		s.pushes.Inc(resultAccepted)
		WriteJSON(w, answer)
		return
	}
	s.pushes.Inc(ref.result)
	s.note(t.Cluster, Note{Failed: true})
	level, why := slog.LevelInfo, ref.why
	switch ref.result {
	case resultFailed, resultFull, resultRateLimited:
		level = slog.LevelDebug // logged with the cause; and the limit holds for the log too
	}
	if len(why) > maxReason {
		why = strings.ToValidUTF8(why[:maxReason], "") + "…"
	}
	s.cfg.Log.Log(r.Context(), level, "push refused", "cluster", t.Cluster, "remote", r.RemoteAddr, "status", ref.status, "reason", why)
	if ref.retry > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(ref.retry.Seconds()))))
	}
	http.Error(w, why, ref.status)
}

// uploadAnswer is the body of a 200.
type uploadAnswer struct {
	Accepted   int            `json:"accepted"`
	Duplicates int            `json:"duplicates"`
	Dropped    map[string]int `json:"dropped"`
	Skipped    map[string]int `json:"skipped,omitempty"`
	Hint       string         `json:"hint,omitempty"` // what is wrong with the times of the samples, if none is taken
}

// admit limits an authenticated push, before anything of it is read.
func (s *Server) admit(w http.ResponseWriter, r *http.Request, t Token, arrival time.Time) (*uploadAnswer, *refusal) {
	overloaded := func(why string) *refusal {
		return &refusal{http.StatusServiceUnavailable, resultOverloaded, why, 5 * time.Second}
	}
	if !s.ready.Load() {
		return nil, overloaded("the server is not ready")
	}
	if wait, err := s.senders.Begin(t.Cluster, s.cfg.Now()); err != nil {
		return nil, &refusal{http.StatusTooManyRequests, resultRateLimited, err.Error(), wait}
	}
	defer s.senders.End(t.Cluster)
	select {
	case s.uploads <- struct{}{}:
		defer func() { <-s.uploads }()
	default:
		return nil, overloaded("too many pushes are being handled")
	}
	s.inFlight.Add(1)
	defer s.inFlight.Add(-1)
	clock, now := PushClock(r.Header, arrival)
	body := s.bodies.Get().(*[]byte)
	defer s.bodies.Put(body)
	format, encoding, ref := s.read(w, r, body)
	if ref != nil {
		return nil, ref
	}
	// Only now: a thin line may take longer than this for the body alone.
	ctx, cancel := context.WithTimeout(r.Context(), uploadWait)
	defer cancel()
	// Bodies wait here in the bounded form in which they came.
	select {
	case s.decoding <- struct{}{}:
	case <-ctx.Done():
		return nil, overloaded("the server is too busy to decode the push")
	}
	ws := s.workspaces.Get().(*workspace)
	defer func() {
		if ws.size <= maxWorkspace {
			s.workspaces.Put(ws)
		}
	}()
	d, ref := s.decode(ws, *body, t, format, encoding, now)
	ws.push.Clock = clock
	if ref != nil {
		return nil, ref
	}
	defer s.pending.Add(-d.bytes)
	if s.pending.Add(d.bytes) > maxPending {
		return nil, overloaded("too many pushes wait to be stored")
	}
	return s.keep(ctx, &ws.push, t, d)
}

// read checks what the headers say and reads the body into body's memory.
func (s *Server) read(w http.ResponseWriter, r *http.Request, body *[]byte) (Format, string, *refusal) {
	format, err := ParseFormat(r.Header.Get("Content-Type"))
	if err != nil {
		return 0, "", &refusal{http.StatusUnsupportedMediaType, resultUnsupported, err.Error(), 0}
	}
	encoding := strings.ToLower(r.Header.Get("Content-Encoding"))
	if !new(Decompressor).Supports(encoding) {
		return 0, "", &refusal{http.StatusUnsupportedMediaType, resultUnsupported,
			fmt.Sprintf("content encoding %q is not supported; supported: %s", encoding, SupportedEncodings), 0}
	}
	tooLarge := &refusal{http.StatusRequestEntityTooLarge, resultTooLarge,
		fmt.Sprintf("the body is larger than %d bytes; the server's --limit-bytes raises that", s.cfg.LimitBytes), 0}
	if r.ContentLength > s.cfg.LimitBytes {
		return 0, "", tooLarge
	}
	*body, err = ReadInto(*body, http.MaxBytesReader(w, r.Body, s.cfg.LimitBytes))
	s.received.Add(float64(len(*body)))
	if max := (*http.MaxBytesError)(nil); errors.As(err, &max) {
		return 0, "", tooLarge
	}
	if err != nil {
		return 0, "", &refusal{http.StatusRequestTimeout, resultMalformed, "the body ended early, or came too slowly", 0}
	}
	return format, encoding, nil
}

// readPush is what is known of a push before it is stored.
type readPush struct {
	drops   map[string]int
	skipped Skipped
	bytes   int64 // of memory
}

// decode decodes and normalizes a body into ws.push. Samples without a time get now.
// It gives back a slot of decoding, before the push is stored: an owner or a disk that
// does not answer must not keep other sites waiting.
func (s *Server) decode(ws *workspace, sent []byte, t Token, format Format, encoding string, now int64) (*readPush, *refusal) {
	defer func() { <-s.decoding }()
	limit := DecodedFactor * int(s.cfg.LimitBytes)
	body, over, err := ws.decompressor.Decompress(sent, encoding, limit)
	defer func() { ws.size = cap(body) + cap(ws.push.Arena) + cap(ws.push.Samples)*sampleBytes }()
	if err != nil {
		return nil, &refusal{http.StatusBadRequest, resultMalformed, err.Error(), 0}
	}
	if over {
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge,
			fmt.Sprintf("the decompressed body is larger than %d bytes, %d times --limit-bytes", limit, DecodedFactor), 0}
	}
	st := s.state.Load()
	forced := st.Normalizer.Forced(t.Cluster, t.Labels)
	ws.push.Reset()
	ws.push.MaxBytes = 4 * limit
	ws.push.MaxSamples = limit / 16
	drops := map[string]int{}
	received := 0
	skipped, err := ws.decoder.Decode(body, format, func(r *RawSample) error {
		received++
		drop, err := st.Normalizer.Apply(r, forced)
		if err != nil {
			return err
		}
		if drop != "" {
			drops[drop]++
			return nil
		}
		if !r.HasT {
			r.T = now
		}
		if err = ws.push.Add(r); errors.Is(err, ErrNULValue) {
			drops[DropInvalid]++
			return nil
		}
		return err
	})
	switch {
	case errors.Is(err, ErrPushSize):
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge, err.Error() + "; the server's --limit-bytes raises that", 0}
	case errors.Is(err, ErrTooLarge):
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge, err.Error(), 0}
	case err != nil:
		return nil, &refusal{http.StatusBadRequest, resultMalformed, err.Error(), 0}
	}
	s.samples.Add(float64(received))
	memory := len(body) + len(ws.push.Arena) + len(ws.push.Samples)*sampleBytes
	return &readPush{drops: drops, skipped: skipped, bytes: int64(memory)}, nil
}

// keep stores a decoded push at its owner.
func (s *Server) keep(ctx context.Context, p *Push, t Token, d *readPush) (*uploadAnswer, *refusal) {
	drops, skipped := d.drops, d.skipped
	res, err := s.append(ctx, t, p)
	var pace *ErrPace
	switch {
	case errors.As(err, &pace):
		return nil, &refusal{http.StatusTooManyRequests, resultRateLimited, pace.Reason, pace.Retry}
	case errors.Is(err, ErrSeriesLimit):
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge, err.Error() + "; the server's --limit-series raises that", 0}
	case errors.Is(err, ErrTooLarge):
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge, err.Error(), 0}
	case errors.Is(err, ErrFull):
		s.cfg.Log.Error("storing push", "cluster", t.Cluster, "err", err)
		return nil, &refusal{http.StatusServiceUnavailable, resultFull, "the server has no room for more samples", time.Minute}
	case errors.Is(err, ErrClock):
		return nil, &refusal{http.StatusServiceUnavailable, resultOverloaded, err.Error(), 30 * time.Second}
	case errors.Is(err, ErrClosed), ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return nil, &refusal{http.StatusServiceUnavailable, resultOverloaded, "the server is too busy to store the push", 5 * time.Second}
	case err != nil:
		s.cfg.Log.Error("storing push", "cluster", t.Cluster, "err", err)
		return nil, &refusal{http.StatusServiceUnavailable, resultFailed, "the server could not store the push", 30 * time.Second}
	}
	if res.Write > 0 {
		s.write.Observe(res.Write.Seconds())
	}
	for reason, n := range map[string]int{dropConflict: res.Conflicts, dropTooOld: res.TooOld, dropFuture: res.Future} {
		if n > 0 {
			drops[reason] = n
		}
	}
	for reason, n := range drops {
		s.dropped.Add(float64(n), reason)
	}
	s.accepted.Add(float64(res.Accepted))
	s.duplicates.Add(float64(res.Duplicates))
	answer := &uploadAnswer{Accepted: res.Accepted, Duplicates: res.Duplicates, Dropped: drops, Hint: s.timely(t.Cluster, p, res)}
	for kind, n := range skipped.ByKind() {
		if n > 0 {
			if answer.Skipped == nil {
				answer.Skipped = map[string]int{}
			}
			answer.Skipped[kind] = n
			s.skipped.Add(float64(n), kind)
		}
	}
	return answer, nil
}

// timely returns a hint for the sender if the time of every sample of a push is too old or
// in the future. Such a push is answered 200, but counts as failed for the site's alerts.
func (s *Server) timely(id string, p *Push, res AppendResult) (hint string) {
	if res.TooOld+res.Future == 0 || res.Accepted+res.Duplicates+res.Conflicts > 0 {
		return ""
	}
	now := s.cfg.Now()
	hint = TimesHint(p, res.TooOld, res.Future, s.cfg.Store.Oldest(), now.UnixMilli())
	s.note(id, Note{Failed: true})
	if s.senders.Untimely(id, now) {
		s.cfg.Log.Warn("every sample of a push was dropped for its time", "cluster", id, "too_old", res.TooOld, "future", res.Future, "hint", hint)
	}
	return hint
}

// append stores a push at its owner.
func (s *Server) append(ctx context.Context, t Token, p *Push) (AppendResult, error) {
	var n Note
	if t.Kind == KindClient {
		n.Expires = noteExpiry(t)
	}
	if s.cfg.Forward == nil {
		s.Noted(t.Cluster, n)
		return s.cfg.Store.Append(ctx, t.Cluster, p)
	}
	return s.cfg.Forward.Append(ctx, t.Cluster, p, n)
}

// noteExpiry is when a client token expires, as a Note says it.
func noteExpiry(t Token) int64 {
	if t.Expires == 0 {
		return NeverExpires
	}
	return t.Expires
}

// note has the owner of a cluster ID know n.
func (s *Server) note(id string, n Note) {
	if s.cfg.Forward == nil || !s.cfg.Forward.Tell(id, n) {
		s.Noted(id, n)
	}
}

// Noted takes what this or another server notes of a cluster ID that this one
// owns, and shows it to scrapers.
func (s *Server) Noted(id string, n Note) {
	if n.Expires != 0 {
		s.senders.Authorized(id, max(0, n.Expires), s.cfg.Now())
	}
	if n.Failed {
		s.senders.Failed(id, s.cfg.Now())
	}
}

// Begin and End hold the pace of a cluster ID whose push another server forwards,
// for a site that alternates between servers.
func (s *Server) Begin(id string) (time.Duration, error) { return s.senders.Begin(id, s.cfg.Now()) }

// End ends what Begin let begin.
func (s *Server) End(id string) { s.senders.End(id) }

// owned reports whether this server owns a cluster ID.
func (s *Server) owned(id string) bool {
	if s.cfg.Forward == nil {
		return true
	}
	_, self := s.cfg.Forward.Owner(id)
	return self
}
