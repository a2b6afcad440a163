package main

// The server's HTTP side: who may push what, and what a scrape gets. Invariants:
// nothing of a body is read before its sender is authenticated; a 200 to /upload
// means durable; an answer to one site tells nothing of another, no secret and no
// path; all memory that remote input can claim is bounded, per sender and in all.
// This file must not know of sockets, TLS, files or signals: main wires those.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"slices"
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
	maxOffset      = 1 << 53          // ms, of a source's clock
	clocksApart    = time.Minute      // by which two servers' clocks may differ; see Forwarded
	maxReason      = 1 << 10          // bytes said of a refused push: an error can quote all that was sent
)

// ServerConfig configures a Server.
type ServerConfig struct {
	Name         string // of this server
	Store        *Store
	Forward      *Forward // to the owners of cluster IDs; nil: this server owns all
	Member       *RingMember
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
		Name: cfg.Name, Store: cfg.Store, Senders: s.senders, Owned: s.Owned, Revoked: s.revoked, Metrics: m, Log: cfg.Log, Now: cfg.Now,
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

// answer returns what the sender gets.
func (r *refusal) answer() *UploadAnswer {
	why := r.why
	if len(why) > maxReason {
		why = strings.ToValidUTF8(why[:maxReason], "") + "…"
	}
	return &UploadAnswer{Status: r.status, Result: r.result, Body: []byte(why + "\n"), Retry: int(math.Ceil(r.retry.Seconds()))}
}

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
	if t.Kind == KindClient {
		s.senders.Authorized(t.Cluster, t.Expires, s.cfg.Now())
	}
	a, ref := s.admit(w, r, t)
	if ref != nil {
		a = ref.answer()
	}
	s.pushes.Inc(a.Result)
	// A server that starts or ends is no fault of the push.
	if a.Untimely || a.Status != http.StatusOK && s.ready.Load() {
		s.senders.Failed(t.Cluster, s.cfg.Now())
	}
	if a.Status == http.StatusOK {
		w.Header().Del("Connection")
		w.Header().Set("Content-Type", "application/json")
		w.Write(a.Body) // an error is the connection's: the sender asks again
		return
	}
	level := slog.LevelInfo
	switch a.Result {
	case resultFailed, resultFull, resultRateLimited:
		level = slog.LevelDebug // logged with the cause; and the limit holds for the log too
	}
	why := strings.TrimSpace(string(a.Body))
	s.cfg.Log.Log(r.Context(), level, "push refused", "cluster", t.Cluster, "remote", r.RemoteAddr, "status", a.Status, "reason", why)
	if a.Retry > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(a.Retry))
	}
	http.Error(w, why, a.Status)
}

func overloaded(why string) *refusal {
	return &refusal{http.StatusServiceUnavailable, resultOverloaded, why, 5 * time.Second}
}

// begin lets a push begin, as far as the rate and the number in flight allow. end has to be
// called when it is done.
func (s *Server) begin(id string) (end func(), ref *refusal) {
	if !s.ready.Load() {
		return nil, overloaded("the server is not ready")
	}
	if wait, err := s.senders.Begin(id, s.cfg.Now()); err != nil {
		return nil, &refusal{http.StatusTooManyRequests, resultRateLimited, err.Error(), wait}
	}
	select {
	case s.uploads <- struct{}{}:
	default:
		s.senders.End(id)
		return nil, overloaded("too many pushes are being handled")
	}
	s.inFlight.Add(1)
	return func() {
		s.inFlight.Add(-1)
		<-s.uploads
		s.senders.End(id)
	}, nil
}

// admit limits an authenticated push before anything of it is read, and has its owner take
// it. If the owner cannot be reached, this server takes it.
func (s *Server) admit(w http.ResponseWriter, r *http.Request, t Token) (*UploadAnswer, *refusal) {
	arrival := s.cfg.Now() // of the head: the body may take long
	end, ref := s.begin(t.Cluster)
	if ref != nil {
		return nil, ref
	}
	defer end()
	up := &Upload{
		Cluster: t.Cluster, Labels: t.Labels, Arrival: arrival.UnixMilli(), Type: r.Header.Get("Content-Type"),
		Encoding: strings.ToLower(r.Header.Get("Content-Encoding")), Spool: r.Header.Get(SpoolHeader), Consumers: r.Header.Get(ConsumersHeader),
	}
	head, ref := readHead(up)
	if ref != nil {
		return nil, ref
	}
	if offset, err := strconv.ParseInt(r.Header.Get(ClockOffsetHeader), 10, 64); err == nil && offset >= -maxOffset && offset <= maxOffset {
		s.senders.Clock(t.Cluster, time.Duration(offset)*time.Millisecond, arrival)
	}
	body := s.bodies.Get().(*[]byte)
	defer s.bodies.Put(body)
	if ref := s.read(w, r, body); ref != nil {
		return nil, ref
	}
	// Only now: a thin line may take longer than this for the body alone.
	ctx, cancel := context.WithTimeout(r.Context(), uploadWait)
	defer cancel()
	if s.cfg.Forward != nil {
		if a := s.cfg.Forward.Push(ctx, up, *body); a != nil {
			return a, nil
		}
	}
	return s.take(ctx, up, head, *body)
}

// Forwarded takes a push that another server received. The error says that the receiver
// should keep the push itself.
func (s *Server) Forwarded(ctx context.Context, up *Upload, body []byte) (*UploadAnswer, error) {
	if !s.ready.Load() {
		return nil, errors.New("the server is not ready")
	}
	end, ref := s.begin(up.Cluster)
	if ref != nil {
		return ref.answer(), nil
	}
	defer end()
	head, ref := readHead(up)
	if ref != nil {
		return ref.answer(), nil
	}
	ctx, cancel := context.WithTimeout(ctx, uploadWait)
	defer cancel()
	now := s.cfg.Now()
	a, ref := s.take(ctx, up, head, body)
	if ref != nil {
		return ref.answer(), nil
	}
	if apart := now.Sub(time.UnixMilli(up.Arrival)).Abs(); a.Untimely && apart > clocksApart {
		return nil, fmt.Errorf("no sample is of its time, and its clock differs from the receiver's by %v", apart.Round(time.Second))
	}
	return a, nil
}

// pushHead is what the headers of a push say.
type pushHead struct {
	format    Format
	names     SpoolNames
	consumers []ConsumerAge
}

func readHead(up *Upload) (h pushHead, ref *refusal) {
	var err, consumersErr error
	if h.format, err = ParseFormat(up.Type); err != nil {
		return h, &refusal{http.StatusUnsupportedMediaType, resultUnsupported, err.Error(), 0}
	}
	if !new(Decompressor).Supports(up.Encoding) {
		return h, &refusal{http.StatusUnsupportedMediaType, resultUnsupported,
			fmt.Sprintf("content encoding %q is not supported; supported: %s", up.Encoding, SupportedEncodings), 0}
	}
	h.names, err = ParseSpoolNames(up.Spool)
	h.consumers, consumersErr = ParseConsumers(up.Consumers)
	if err = errors.Join(err, consumersErr); err != nil {
		return h, &refusal{http.StatusBadRequest, resultMalformed, err.Error(), 0}
	}
	return h, nil
}

// take decodes a push and stores it here.
func (s *Server) take(ctx context.Context, up *Upload, head pushHead, body []byte) (*UploadAnswer, *refusal) {
	if int64(len(body)) > s.cfg.LimitBytes {
		return nil, s.tooLarge()
	}
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
	d, ref := s.decode(ws, up, head.format, body)
	if ref != nil {
		return nil, ref
	}
	defer s.pending.Add(-d.bytes)
	if s.pending.Add(d.bytes) > maxPending {
		return nil, overloaded("too many pushes wait to be stored")
	}
	return s.keep(ctx, up, head, &ws.push, d)
}

func (s *Server) tooLarge() *refusal {
	return &refusal{http.StatusRequestEntityTooLarge, resultTooLarge,
		fmt.Sprintf("the body is larger than %d bytes; the server's --limit-bytes raises that", s.cfg.LimitBytes), 0}
}

// read reads a body into body's memory.
func (s *Server) read(w http.ResponseWriter, r *http.Request, body *[]byte) (ref *refusal) {
	if r.ContentLength > s.cfg.LimitBytes {
		return s.tooLarge()
	}
	var err error
	*body, err = ReadInto(*body, http.MaxBytesReader(w, r.Body, s.cfg.LimitBytes))
	s.received.Add(float64(len(*body)))
	if max := (*http.MaxBytesError)(nil); errors.As(err, &max) {
		return s.tooLarge()
	}
	if err != nil {
		return &refusal{http.StatusRequestTimeout, resultMalformed, "the body ended early, or came too slowly", 0}
	}
	return nil
}

// readPush is what is known of a push before it is stored.
type readPush struct {
	drops   map[string]int
	skipped Skipped
	bytes   int64 // of memory
}

// decode decodes and normalizes a body into ws.push. Samples without a time get that of the
// arrival at the first server.
// It gives back a slot of decoding, before the push is stored: an owner or a disk that
// does not answer must not keep other sites waiting.
func (s *Server) decode(ws *workspace, up *Upload, format Format, sent []byte) (*readPush, *refusal) {
	defer func() { <-s.decoding }()
	limit := DecodedFactor * int(s.cfg.LimitBytes)
	body, over, err := ws.decompressor.Decompress(sent, up.Encoding, limit)
	defer func() { ws.size = cap(body) + cap(ws.push.Arena) + cap(ws.push.Samples)*sampleBytes }()
	if err != nil {
		return nil, &refusal{http.StatusBadRequest, resultMalformed, err.Error(), 0}
	}
	if over {
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge,
			fmt.Sprintf("the decompressed body is larger than %d bytes, %d times --limit-bytes", limit, DecodedFactor), 0}
	}
	st := s.state.Load()
	forced := st.Normalizer.Forced(up.Cluster, up.Labels)
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
			r.T = up.Arrival
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

// keep stores a decoded push.
func (s *Server) keep(ctx context.Context, up *Upload, head pushHead, p *Push, d *readPush) (*UploadAnswer, *refusal) {
	drops, skipped, names := d.drops, d.skipped, head.names
	// Before the push is stored: its samples must not be evicted unread.
	s.cfg.Store.Consumers.Tell(RingKey(up.Cluster), head.consumers, s.cfg.Now())
	var res AppendResult
	var err error
	if names.ID == 0 || len(names.Numbers) > 0 || len(p.Samples) > 0 { // else it is only a question
		res, err = s.cfg.Store.Append(ctx, up.Cluster, p, names)
	}
	switch {
	case errors.Is(err, ErrSeriesLimit):
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge, err.Error() + "; the server's --limit-series raises that", 0}
	case errors.Is(err, ErrTooLarge):
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge, err.Error(), 0}
	case errors.Is(err, ErrFull):
		s.cfg.Log.Error("storing push", "cluster", up.Cluster, "err", err)
		return nil, &refusal{http.StatusServiceUnavailable, resultFull, "the server has no room for more samples", time.Minute}
	case errors.Is(err, ErrClock):
		return nil, &refusal{http.StatusServiceUnavailable, resultOverloaded, err.Error(), 30 * time.Second}
	case errors.Is(err, ErrClosed), ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return nil, overloaded("the server is too busy to store the push")
	case err != nil:
		s.cfg.Log.Error("storing push", "cluster", up.Cluster, "err", err)
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
	now := s.cfg.Now()
	answer := &PushAnswer{
		Accepted: &res.Accepted, Duplicates: res.Duplicates, Dropped: drops, Hint: s.timely(up.Cluster, p, res, now),
		Server: s.cfg.Name, Time: now.UnixMilli(),
	}
	for kind, n := range skipped.ByKind() {
		if n > 0 {
			if answer.Skipped == nil {
				answer.Skipped = map[string]int{}
			}
			answer.Skipped[kind] = n
			s.skipped.Add(float64(n), kind)
		}
	}
	if names.ID != 0 {
		st := s.cfg.Store.Spool(up.Cluster, names.ID)
		held, read := st.Held.String(), st.Read.String()
		answer.Held, answer.Consumers = &held, FormatConsumers(st.Consumers)
		if st.Settled {
			answer.Read = &read
		}
	}
	b, err := json.Marshal(answer)
	if err != nil { // of numbers and strings: cannot be
		return nil, &refusal{http.StatusInternalServerError, resultFailed, "the answer could not be made", 0}
	}
	return &UploadAnswer{Status: http.StatusOK, Result: resultAccepted, Body: append(b, '\n'), Untimely: res.Untimely()}, nil
}

// timely returns a hint for the sender if the time of every sample of a push is too old or
// in the future. Such a push is answered 200, but counts as failed for the site's alerts.
func (s *Server) timely(id string, p *Push, res AppendResult, now time.Time) (hint string) {
	if !res.Untimely() {
		return ""
	}
	hint = timesHint(p, res.TooOld, res.Future, s.cfg.Store.Oldest(), now.UnixMilli())
	if s.senders.Untimely(id, now) {
		s.cfg.Log.Warn("every sample of a push was dropped for its time", "cluster", id, "too_old", res.TooOld, "future", res.Future, "hint", hint)
	}
	return hint
}

// timesHint says what is wrong with the times of a push whose samples are all too old or of
// the future. oldest is the least time that is accepted, in ms, as is now. A present time
// in seconds, read as milliseconds, is in January 1970, and no sample is that old, so a
// single one tells. A day more on either side allows for a wrong clock or time zone.
func timesHint(p *Push, tooOld, future int, oldest, now int64) string {
	const day = 24 * 60 * 60 // s
	switch {
	case slices.ContainsFunc(p.Samples, func(s Sample) bool { return s.T >= oldest/1000-day && s.T <= now/1000+day }):
		return "the times look like seconds; they have to be milliseconds"
	case future == 0:
		return "all samples are older than --retention"
	case tooOld == 0:
		return "all samples are ahead of the server's clock"
	}
	return "all samples are older than --retention or ahead of the server's clock"
}

// Owned reports whether this server owns the site of a hash. A member of a ring does not
// know that before it is ready: whatever its disk has, another member may be the owner.
func (s *Server) Owned(hash uint64) bool {
	if s.cfg.Forward == nil {
		return true
	}
	_, self := s.cfg.Forward.Owner(hash)
	return self && s.ready.Load()
}
