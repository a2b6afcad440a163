package main

// The server's HTTP side: its routes, configuration and state. Handlers read no byte of a body
// before its client is authenticated. An answer to one site has nothing of another, no secret
// and no path. This family must not know of sockets, TLS, files or signals: main wires them.

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
	// uploadTokenTTL is how long an upload token is valid: short, because it is
	// the one that is sent often, long against an interval.
	uploadTokenTTL = time.Hour

	maxUploads       = 256              // in flight, each holding a body
	sampleBytes      = 24               // of a Sample
	maxPending       = 512 << 20        // bytes of decoded pushes that wait to be stored
	maxPooledBuffers = 1 << 20          // bytes of buffers that are kept for the next push
	storeTimeout     = 30 * time.Second // of a push that waits for its owner, an earlier push or a busy disk
	maxErrorText     = 1 << 10          // bytes of the answer to a refused push

	maxClockOffset     = 1 << 53     // ms, of a source's clock
	maxClockDifference = time.Minute // between two servers; see storeForwarded
)

// ServerConfig configures a Server.
type ServerConfig struct {
	Name               string // of this server
	Store              *Store
	Forwarder          *Forwarder  // to the owners of sites; nil: this server is alone and owns all
	Member             *RingKeeper // for /debug/ring and metrics; nil: none
	Gossip             *Gossip     // for /sd, /debug/ring and metrics; nil if Member is
	Metrics            *Metrics
	Log                *slog.Logger
	Now                func() time.Time
	MaxSampleAge       time.Duration       // how long the newest sample of a series is shown
	LimitBytes         int64               // of a body as sent
	LimitScrape        int                 // samples in one scrape
	RateInterval       time.Duration       // one push per site and this, in bursts of 60; 0 = no limit
	ExternalAuthorizer *ExternalAuthorizer // asked instead of verifying client tokens; nil: verify
}

// ReloadableServerConfig has the keys and rules that a reload replaces, all at once.
type ReloadableServerConfig struct {
	Keys          Keys
	Revoked       RevokedIDs
	Normalizer    *ServerNormalizer
	FederateToken string // asked for on the internal listener; "" = open
}

// Server answers clients and scrapers. It is safe for concurrent use.
type Server struct {
	cfg        ServerConfig
	state      atomic.Pointer[ReloadableServerConfig]
	ready      atomic.Bool
	uploads    semaphore
	decoding   semaphore
	pending    atomic.Int64 // bytes of decoded pushes that wait to be stored
	bodies     sync.Pool    // *[]byte
	buffers    sync.Pool    // *decodeBuffers
	sites      *SitePushLimiter
	federate   *federateHandler
	instrument func(string, http.Handler) http.Handler
	serverMetrics
}

// NewServer returns a Server that is not ready and has no keys: see Reload.
func NewServer(cfg ServerConfig) *Server {
	m := cfg.Metrics
	s := &Server{
		cfg: cfg, uploads: newSemaphore(maxUploads), decoding: newSemaphore(max(4, 2*runtime.GOMAXPROCS(0))),
		sites: NewSitePushLimiter(cfg.RateInterval), instrument: NewInstrument(m), serverMetrics: newServerMetrics(m),
	}
	s.federate = newFederateHandler(federateConfig{
		Name: cfg.Name, Store: cfg.Store, Sites: s.sites, Owned: s.servesNewestOfSite, Revoked: s.isRevokedClusterID, Metrics: m, Log: cfg.Log, Now: cfg.Now,
		MaxSampleAge: cfg.MaxSampleAge, LimitScrape: cfg.LimitScrape,
	})
	s.bodies.New = func() any { return new([]byte) }
	s.buffers.New = func() any { return &decodeBuffers{} }
	s.state.Store(&ReloadableServerConfig{Normalizer: &ServerNormalizer{}})
	m.OnCollect(storeCollector(m, cfg.Store))
	if cfg.Member != nil {
		m.OnCollect(s.ringCollector(m))
	}
	return s
}

// serverMetrics counts pushes.
type serverMetrics struct {
	pushesTotal, samplesTotal, acceptedTotal, duplicatesTotal, droppedTotal, skippedTotal, receivedBytes *Counter
	unauthorizedTotal                                                                                    *Counter
	appendSeconds                                                                                        *Histogram
	inFlight                                                                                             *Gauge
}

// newServerMetrics registers the metrics, with a 0 for each value of their labels.
func newServerMetrics(m *Metrics) serverMetrics {
	sm := serverMetrics{
		pushesTotal:       m.Counter("telemeter_pushes_total", "Pushes by result.", "result"),
		receivedBytes:     m.Counter("telemeter_received_bytes_total", "Bytes of push bodies received, as sent."),
		samplesTotal:      m.Counter("telemeter_samples_received_total", "Samples in pushes that could be decoded."),
		acceptedTotal:     m.Counter("telemeter_samples_accepted_total", "Samples that were new and are durable."),
		duplicatesTotal:   m.Counter("telemeter_samples_duplicate_total", "Samples that were held already with the same value."),
		droppedTotal:      m.Counter("telemeter_samples_dropped_total", "Samples of accepted pushes that were dropped, by reason.", "reason"),
		skippedTotal:      m.Counter("telemeter_parts_skipped_total", "Parts of samples that are not carried, by kind.", "kind"),
		unauthorizedTotal: m.Counter("telemeter_unauthorized_total", "Requests without a valid token, by reason.", "reason"),
		appendSeconds:     m.Histogram("telemeter_store_fsync_duration_seconds", "Time to write a push to its log and fsync it.", []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5}),
		inFlight:          m.Gauge("telemeter_pushes_in_flight", "Pushes being handled."),
	}
	for _, reason := range serverDropReasons {
		sm.droppedTotal.Add(0, reason)
	}
	for _, reason := range []string{
		"missing", "malformed", "expired", "forged", "revoked", "kind", "other_cluster", "federate_token", "unavailable", "signing",
	} {
		sm.unauthorizedTotal.Add(0, reason)
	}
	for kind := range (UnsupportedParts{}).ByKind() {
		sm.skippedTotal.Add(0, kind)
	}
	for _, result := range []string{
		resultAccepted, resultRateLimited, resultOverloaded, resultFull, resultFailed, resultTooLarge, resultUnsupported, resultMalformed,
	} {
		sm.pushesTotal.Add(0, result)
	}
	return sm
}

// storeCollector returns a function that sets metrics from the store's stats.
func storeCollector(m *Metrics, store *Store) func() {
	bytes := m.Gauge("telemeter_store_bytes", "Bytes of all logs on disk.")
	sites := m.Gauge("telemeter_store_clusters", "Sites known.")
	series := m.Gauge("telemeter_store_series", "Series held.")
	samples := m.Gauge("telemeter_store_samples", "Samples held.")
	damaged := m.Counter("telemeter_store_logs_damaged_total", "Logs found damaged, cut short or missing at start; of damaged ones copies are kept.")
	torn := m.Counter("telemeter_store_torn_bytes_total", "Bytes of unfinished writes that were cut from the ends of logs at start.")
	evicted := m.Counter("telemeter_store_samples_evicted_total", "Samples dropped to stay within the limit on samples: every consumer has read them, or there was none so far.")
	expired := m.Counter("telemeter_store_samples_expired_total", "Samples dropped because they outlived retention.")
	unread := m.Counter("telemeter_store_samples_unread_dropped_total", "Samples dropped because they outlived retention before every consumer had them.")
	compactions := m.Counter("telemeter_store_compactions_total", "Logs rewritten.")
	return func() {
		st := store.Stats()
		bytes.Set(float64(st.LogBytes))
		sites.Set(float64(len(st.Sites)))
		heldSamples, heldSeries := int64(0), 0
		for _, site := range st.Sites {
			heldSamples, heldSeries = heldSamples+site.Samples, heldSeries+site.Series
		}
		series.Set(float64(heldSeries))
		samples.Set(float64(heldSamples))
		damaged.RaiseTo(float64(st.DamagedLogs))
		torn.RaiseTo(float64(st.TornBytes))
		evicted.RaiseTo(float64(st.Evicted))
		expired.RaiseTo(float64(st.Expired))
		unread.RaiseTo(float64(st.ExpiredUnread))
		compactions.RaiseTo(float64(st.Compactions))
	}
}

// Reload replaces keys, revocations, rules and the federate token.
func (s *Server) Reload(st ReloadableServerConfig) { s.state.Store(&st) }

// SetReady says whether /healthz/ready answers 200, and pushes are taken.
func (s *Server) SetReady(ready bool) { s.ready.Store(ready) }

// ExternalHandler returns the handler of the listener for clients.
func (s *Server) ExternalHandler() http.Handler {
	mux := http.NewServeMux()
	AddHealthRoutes(mux, s.ready.Load)
	mux.Handle("POST /authorize", s.instrument("authorize", http.HandlerFunc(s.handleAuthorize)))
	mux.Handle("POST /upload", s.instrument("upload", http.HandlerFunc(s.handleUpload)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Handlers remove this when they have read the whole body. Otherwise net/http would
		// read the rest of it before it answers, past all limits, and an idle connection would
		// take one of a bounded number.
		w.Header().Set("Connection", "close")
		mux.ServeHTTP(w, r)
	})
}

// InternalHandler returns the handler of the listener for scrapers and operators.
func (s *Server) InternalHandler() http.Handler {
	mux := http.NewServeMux()
	AddHealthRoutes(mux, s.ready.Load)
	mux.Handle("GET /federate", s.requireFederateTokenIfSet("federate", s.federate))
	mux.Handle("GET /metrics", s.requireFederateTokenIfSet("metrics", s.cfg.Metrics))
	paths := []string{"/federate", "/metrics", "/healthz", "/healthz/ready", "/debug/pprof/"}
	if s.cfg.Member != nil {
		paths = append(paths, "/sd", "/debug/ring")
		mux.Handle("GET /sd", s.requireFederateTokenIfSet("sd", http.HandlerFunc(s.serveSD)))
		mux.Handle("GET /debug/ring", s.requireFederateTokenIfSet("ring", http.HandlerFunc(s.serveDebugRing)))
	}
	mux.Handle("GET /{$}", s.requireFederateTokenIfSet("index", IndexHandler(paths...)))
	mux.Handle("/debug/pprof/", s.requireFederateTokenIfSet("pprof", loopbackPprofHandler()))
	return mux
}

// ForwardHandler returns the handler of the listener for the other members of the ring, which a
// server with a Forwarder has.
func (s *Server) ForwardHandler() http.Handler { return s.cfg.Forwarder.Handler(s.storeForwarded) }

// requireFederateTokenIfSet counts the requests of a handler under a name, and asks for the federate
// token if there is one.
func (s *Server) requireFederateTokenIfSet(handlerName string, h http.Handler) http.Handler {
	return s.instrument(handlerName, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, _ := ParseBearer(r.Header.Get("Authorization"))
		if want := s.state.Load().FederateToken; want != "" && !EqualSecret(token, want) {
			s.denyToken(w, "federate_token", "this listener needs the bearer token of --federate-token-file")
			return
		}
		h.ServeHTTP(w, r)
	}))
}

// loopbackPprofHandler serves profiles to loopback addresses.
func loopbackPprofHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
			http.Error(w, "profiles are served to loopback addresses only", http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// servesNewestOfSite reports whether this server shows the newest samples of a site key's site:
// those of its own sites, once it is ready.
func (s *Server) servesNewestOfSite(siteKey uint64) bool {
	return s.cfg.Forwarder == nil || s.ready.Load() && s.cfg.Forwarder.OwnsSite(siteKey)
}
