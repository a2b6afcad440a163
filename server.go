package main

// The server's HTTP side: its routes, configuration and state. Handlers read no byte of a body
// before its sender is authenticated. An answer to one site tells nothing of another, no
// secret and no path. This family must not know of sockets, TLS, files or signals: main wires
// them.

import (
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
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
	Forwarder    *Forwarder // to the owners of cluster IDs; nil: this server owns all
	Member       *RingMember
	Metrics      *Metrics
	Log          *slog.Logger
	Now          func() time.Time
	MaxSampleAge time.Duration // how long the newest sample of a series is shown
	LimitBytes   int64         // of a body as sent
	LimitScrape  int           // samples in one scrape
	RateEvery    time.Duration // one push per cluster ID and this, in bursts of 60; 0 = no limit
	Authorizer   *Authorizer   // asked instead of verifying client tokens; nil: verify
}

// ServerState is what a reload replaces, all at once.
type ServerState struct {
	Keys          Keys
	Revoked       RevokedSet
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
	federate *FederateHandler
}

// workspace is the memory that decoding a push takes, reused unless it has grown: a
// push that waits to be stored keeps it, and only what the push itself takes of it is
// counted.
type workspace struct {
	decompressor Decompressor
	decoder      Decoder
	push         SampleList
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
	s.federate = NewFederateHandler(FederateHandlerConfig{
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
		clusters.Set(float64(len(st.Sites)))
		held, n := int64(0), 0
		for _, c := range st.Sites {
			held, n = held+c.Samples, n+c.Series
		}
		series.Set(float64(n))
		samples.Set(float64(held))
		damaged.SetTotal(float64(st.Damaged))
		torn.SetTotal(float64(st.Torn))
		evicted.SetTotal(float64(st.Evicted))
		expired.SetTotal(float64(st.Expired))
		unread.SetTotal(float64(st.Unread))
		compactions.SetTotal(float64(st.Compactions))
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
	mux.Handle("GET /{$}", protect("index", IndexHandler(paths...)))
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

// Owned reports whether this server owns the site of a hash. A member of a ring does not
// know that before it is ready: whatever its disk has, another member may be the owner.
func (s *Server) Owned(hash uint64) bool {
	if s.cfg.Forwarder == nil {
		return true
	}
	_, self := s.cfg.Forwarder.Owner(hash)
	return self && s.ready.Load()
}
