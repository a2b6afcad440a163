package main

// This file has the HTTP side of a server: routes, configuration and state. On the listeners for
// clients and for other members, a handler reads no byte of a request's body before it has
// authenticated the sender. An answer to a site contains no secret except the site's own upload
// token, no file path, and no data of another site. The family server must not know of sockets,
// TLS, files or signals, which the family main wires up.

import (
	"iter"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// uploadTokenTTL is how long an upload token is valid. The time is short, because each push
	// with an upload token sends the token over the network. The time is still much longer than the
	// usual interval between pushes.
	uploadTokenTTL = time.Hour

	maxUploads       = 256              // pushes in flight at a time, each with its body in memory
	maxPending       = 512 << 20        // bytes of all decoded pushes that wait to be stored or are being stored
	maxPooledBuffers = 1 << 20          // bytes; decodeBuffers that have grown larger are not reused
	storeTimeout     = 30 * time.Second // limit for forwarding, decoding and storing a push, once its body has arrived
	maxErrorText     = 1 << 10          // bytes of the text that tells a client why its push is refused; a longer text is cut

	maxClockOffset     = math.MaxInt64 / int64(time.Millisecond) // ms, as many as a time.Duration holds; if a push reports that its source's clock is off by more, the server ignores the report
	maxClockDifference = time.Minute                             // a forwarded push whose samples all seem too old or in the future is handed back to the server that forwarded it, if the clocks of the two servers seem to differ by more
)

// ServerConfig configures a Server.
type ServerConfig struct {
	Name               string
	Store              *Store
	Forwarder          *Forwarder  // nil if this server has no ring: it then owns all sites
	Member             *RingKeeper // source of /debug/ring and ring metrics; nil if this server has no ring
	Gossip             *Gossip     // source of /sd, /debug/ring and ring metrics; nil if Member is nil: /sd then lists only this server
	SDScheme           string      // precedes the address of this server's internal listener in /sd: SDSchemeTLS or empty
	Metrics            *Metrics
	Log                *slog.Logger
	Now                func() time.Time
	MaxSampleAge       time.Duration        // a sample that is older is not served again to a consumer that has read it, nor to a scraper without a consumer name
	LimitBytes         int64                // maximum bytes of the body of a push, before decompression
	LimitScrape        int                  // maximum samples of sites in one answer to /federate; one site alone may have more if the scrape names no consumer; 0 = no limit
	RateInterval       time.Duration        // each site may push once per RateInterval on average, in bursts of at most 60 pushes; 0 = no limit
	Warnings           *WarningLog          // newest warnings and errors of Log, for the status; nil = none are known
	HostLimits         func() []LimitStatus // use of the host's disk and memory, for the status; one with limit 0 is left out; nil = not known
	ExternalAuthorizer *ExternalAuthorizer  // decides whether client tokens are valid; nil = the server verifies client tokens itself
}

// ReloadableServerConfig has the keys and rules that Server.Reload replaces, all at once.
type ReloadableServerConfig struct {
	Keys          Keys
	Revoked       RevokedIDs
	Normalizer    *ServerNormalizer
	FederateToken string // bearer token that requests to the internal listener must send, except health checks; "" = no token is needed

	verifier *TokenVerifier // of Keys; Reload makes a new one, so that a token that only old keys signed is not accepted
}

// Server answers clients, scrapers and other members. It is safe for concurrent use.
type Server struct {
	cfg        ServerConfig
	state      atomic.Pointer[ReloadableServerConfig]
	issued     atomic.Pointer[IssuedTokens]
	ready      atomic.Bool
	stopping   atomic.Bool  // set if ready is false because the server stops
	uploads    semaphore    // one slot for each push in flight
	decoding   decodeLanes  // slots for pushes that are being decoded
	pending    atomic.Int64 // bytes of decoded pushes that wait to be stored or are being stored
	bodies     sync.Pool    // of *[]byte: reusable memory for the bodies of pushes
	sites      *SitePushLimiter
	federate   *federateHandler
	ruleWatch  *ruleWatch
	history    activityHistory
	refusals   refusalHistory
	started    time.Time   // when NewServer made this server
	limitedLog *LimitedLog // for messages that a stranger or a hostile site can cause at any rate
	instrument func(string, http.Handler) http.Handler
	serverMetrics
}

// NewServer returns a Server that has no keys and is not ready. The caller must call Reload, then
// SetReady.
func NewServer(cfg ServerConfig) *Server {
	m := cfg.Metrics
	if cfg.Warnings == nil {
		cfg.Warnings = &WarningLog{}
	}
	if cfg.HostLimits == nil {
		cfg.HostLimits = func() []LimitStatus { return nil }
	}
	s := &Server{
		cfg: cfg, started: cfg.Now(), uploads: newSemaphore(maxUploads), decoding: newDecodeLanes(runtime.GOMAXPROCS(0)),
		sites: NewSitePushLimiter(cfg.RateInterval, int(cfg.LimitBytes)), limitedLog: NewLimitedLog(cfg.Log, cfg.Now), ruleWatch: newRuleWatch(m, cfg.Log, cfg.Now),
		instrument: NewInstrument(m), serverMetrics: newServerMetrics(m),
	}
	s.federate = newFederateHandler(federateConfig{
		Name: cfg.Name, Store: cfg.Store, Sites: s.sites, Owned: s.servesNewestOfSite, Revoked: s.isRevokedClusterID, Issued: s.IssuedSites, Metrics: m, Log: cfg.Log, Now: cfg.Now, History: &s.history,
		MaxSampleAge: cfg.MaxSampleAge, LimitScrape: cfg.LimitScrape,
	})
	s.bodies.New = func() any { return new([]byte) }
	s.Reload(ReloadableServerConfig{Normalizer: &ServerNormalizer{}})
	s.issued.Store(&IssuedTokens{})
	updateStore, updateLimits := storeUpdater(m), s.limitUpdater(m)
	m.OnCollect(func() {
		st := cfg.Store.Stats()
		updateStore(st)
		updateLimits(st)
	})
	if cfg.Member != nil {
		m.OnCollect(s.ringCollector(m))
	}
	return s
}

type serverMetrics struct {
	pushesTotal, samplesTotal, acceptedTotal, duplicatesTotal, droppedTotal, skippedTotal, receivedBytes *Counter
	unauthorizedTotal                                                                                    *Counter
	appendSeconds                                                                                        *Histogram
	inFlight                                                                                             *Gauge
}

// newServerMetrics registers the metrics of serverMetrics. It sets each counter that has a label to
// 0 for every value of the label, so that all series of the counter exist from the start.
func newServerMetrics(m *Metrics) serverMetrics {
	sm := serverMetrics{
		pushesTotal:       m.Counter("telemeter_pushes_total", "Pushes received from clients, by result.", "result"),
		receivedBytes:     m.Counter("telemeter_received_bytes_total", "Bytes of push bodies received from clients, before decompression."),
		samplesTotal:      m.Counter("telemeter_samples_received_total", "Samples in the pushes that this server decoded."),
		acceptedTotal:     m.Counter("telemeter_samples_accepted_total", "New samples that were stored."),
		duplicatesTotal:   m.Counter("telemeter_samples_duplicate_total", "Samples that this server already held with the same value."),
		droppedTotal:      m.Counter("telemeter_samples_dropped_total", "Samples of accepted pushes that were dropped, by reason.", "reason"),
		skippedTotal:      m.Counter("telemeter_parts_skipped_total", "Unsupported parts of samples that were dropped, such as exemplars, by kind.", "kind"),
		unauthorizedTotal: m.Counter("telemeter_unauthorized_total", "Requests that could not be authorized, by reason.", "reason"),
		appendSeconds:     m.Histogram("telemeter_store_fsync_duration_seconds", "Seconds to write a push to its log and fsync it, for pushes that are flushed.", []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5}),
		inFlight:          m.Gauge("telemeter_pushes_in_flight", "Pushes in flight."),
	}
	for _, reason := range serverDropReasons {
		sm.droppedTotal.Add(0, reason)
	}
	for _, reason := range []string{
		"missing", "malformed", "expired", "forged", "revoked", "kind", "other_cluster", "federate_token", "unavailable", "overloaded", "conflict", "rate_limited", "canceled", "signing",
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

// storeUpdater registers the metrics of the store. It returns a function that updates them.
func storeUpdater(m *Metrics) func(StoreStats) {
	bytes := m.Gauge("telemeter_store_bytes", "Bytes of all logs on disk.")
	sites := m.Gauge("telemeter_store_clusters", "Sites that this server knows.")
	series := m.Gauge("telemeter_store_series", "Series held.")
	samples := m.Gauge("telemeter_store_samples", "Samples held.")
	damaged := m.Counter("telemeter_store_logs_damaged_total", "Site logs that the server found damaged, cut short or missing when it started. It keeps a copy of each log that has damaged bytes.")
	torn := m.Counter("telemeter_store_logs_torn_total", "Site logs that the server found ending early when it started, as after a power cut. Clients push again from their spools what such a log lost.")
	evicted := m.Counter("telemeter_store_samples_evicted_total", "Samples evicted to stay within the limit on samples, after every consumer had read them or while no consumer was known.")
	expired := m.Counter("telemeter_store_samples_expired_total", "Samples dropped because they were older than retention.")
	unread := m.Counter("telemeter_store_samples_unread_dropped_total", "Samples dropped because they were older than retention, before every consumer had read them.")
	compactions := m.Counter("telemeter_store_compactions_total", "Compactions of logs.")
	return func(st StoreStats) {
		bytes.Set(float64(st.LogBytes))
		sites.Set(float64(len(st.Sites)))
		heldSamples, heldSeries := int64(0), 0
		for _, site := range st.Sites {
			heldSamples, heldSeries = heldSamples+site.Samples, heldSeries+site.Series
		}
		series.Set(float64(heldSeries))
		samples.Set(float64(heldSamples))
		damaged.RaiseTo(float64(st.DamagedLogs))
		torn.RaiseTo(float64(st.TornLogs))
		evicted.RaiseTo(float64(st.Evicted))
		expired.RaiseTo(float64(st.Expired))
		unread.RaiseTo(float64(st.ExpiredUnread))
		compactions.RaiseTo(float64(st.Compactions))
	}
}

// Reload replaces the keys, the revoked IDs, the normalizer's rules and the federate token, all at
// once.
func (s *Server) Reload(st ReloadableServerConfig) {
	st.verifier = NewTokenVerifier(st.Keys)
	s.state.Store(&st)
}

// SetReady makes the server ready, or makes it not ready because it stops. While it is not ready,
// /healthz/ready answers 503 and pushes are refused. A new Server is not ready because it starts.
func (s *Server) SetReady(ready bool) {
	s.stopping.Store(!ready)
	s.ready.Store(ready)
}

// whyNotReady returns the reason why the server is not ready, or "" if it is ready. In the text, "it"
// stands for the server.
func (s *Server) whyNotReady() string {
	switch {
	case s.ready.Load():
		return ""
	case s.stopping.Load():
		return "it is stopping"
	}
	return "it is starting, and does not know yet which server of the ring owns which site"
}

// SetIssuedTokens replaces the list of issued tokens. It is not a part of the configuration that
// Reload replaces, so that a fault in the list delays no revocation and no new key.
func (s *Server) SetIssuedTokens(l IssuedTokens) { s.issued.Store(&l) }

// IssuedSites yields, in order, the cluster IDs of sites that may push according to the list of
// issued tokens, because one of their tokens has not expired and is not revoked. See
// IssuedTokens.ValidSites for the time.
func (s *Server) IssuedSites() iter.Seq2[string, time.Time] {
	return s.issued.Load().ValidSites(s.cfg.Now(), s.state.Load().Revoked)
}

// ExternalHandler returns the handler of the listener for clients.
func (s *Server) ExternalHandler() http.Handler {
	mux := http.NewServeMux()
	AddHealthRoutes(mux, s.whyNotReady)
	mux.Handle("POST /authorize", s.instrument("authorize", http.HandlerFunc(s.handleAuthorize)))
	mux.Handle("POST /upload", s.instrument("upload", http.HandlerFunc(s.handleUpload)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// By default, close the connection after the answer. A handler may remove this header to
		// keep the connection. If the connection of a client that was refused were kept, it would
		// stay open and count toward maxConnections.
		w.Header().Set("Connection", "close")
		mux.ServeHTTP(w, r)
	})
}

// InternalHandler returns the handler of the listener for scrapers and operators. onLoopback must be
// true only if the listener is bound to a loopback address.
func (s *Server) InternalHandler(onLoopback bool) http.Handler {
	mux := http.NewServeMux()
	AddHealthRoutes(mux, s.whyNotReady)
	mux.Handle("GET /federate", s.requireFederateTokenIfSet("federate", s.federate))
	mux.Handle("GET /metrics", s.requireFederateTokenIfSet("metrics", s.cfg.Metrics))
	mux.Handle("GET /sd", s.requireFederateTokenIfSet("sd", http.HandlerFunc(s.serveSD)))
	mux.Handle("GET /api/status", s.requireFederateTokenIfSet("status", http.HandlerFunc(s.handleStatusJSON)))
	paths := append([]string{"/api/status", "/federate", "/metrics", "/sd", "/debug/pprof/"}, HealthPaths()...)
	if s.cfg.Member != nil {
		paths = append(paths, "/debug/ring")
		mux.Handle("GET /debug/ring", s.requireFederateTokenIfSet("ring", http.HandlerFunc(s.serveDebugRing)))
	}
	mux.Handle("GET /{$}", s.requireFederateTokenIfSet("index", s.handleIndex(IndexHandler(paths...))))
	mux.Handle("GET /debug/pprof/", s.requireFederateTokenIfSet("pprof", loopbackPprofHandler()))
	return RefuseForeignRequests(onLoopback, s.instrument, mux)
}

// ForwardHandler returns the handler of the listener for other members. It must be called only if
// the server has a Forwarder.
func (s *Server) ForwardHandler() http.Handler { return s.cfg.Forwarder.Handler(s.storeForwarded) }

// requireFederateTokenIfSet wraps h. If a federate token is configured, it refuses requests that do
// not send the token: as a bearer token, or as the password of HTTP Basic authentication, for which a
// browser asks. It counts and times all requests under handlerName.
func (s *Server) requireFederateTokenIfSet(handlerName string, h http.Handler) http.Handler {
	return s.instrument(handlerName, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, isBearer := ParseBearer(r.Header.Get("Authorization"))
		if !isBearer {
			_, token, _ = r.BasicAuth()
		}
		if want := s.state.Load().FederateToken; want != "" && !EqualSecret(token, want) {
			if WantsHTML(r) {
				w.Header().Add("WWW-Authenticate", `Basic realm="telemeter: any user, and the federate token as the password"`)
			}
			s.denyToken(w, "federate_token", "this listener requires the bearer token in the file of --federate-token-file")
			if WantsHTML(r) && r.Header.Get("Authorization") == "" {
				return // a browser asks for the password only after this answer, so nothing needs attention
			}
			s.noteRefusal("federate_token", "", "a request to the internal listener did not have the token of --federate-token-file", false)
			s.limitedLog.LogPeer(slog.LevelWarn, "request to the internal listener refused, because it does not have the bearer token of --federate-token-file: in the scrape configuration, set authorization: {type: Bearer, credentials_file: FILE} in the job and in each of its http_sd_configs", r.RemoteAddr, "handler", handlerName)
			return
		}
		ProtectConn(r, "") // all scrapers send the same token, or none
		h.ServeHTTP(w, r)
	}))
}

// loopbackPprofHandler serves the profiles of net/http/pprof to peers with a loopback address, and
// answers 403 to all others.
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

// servesNewestOfSite reports whether this server serves the newest samples of a site again and
// again, even to a consumer that has read them already. A server without a ring does so for all
// sites. A member of a ring does so once it is ready, for the sites that it owns.
func (s *Server) servesNewestOfSite(siteKey uint64) bool {
	return s.cfg.Forwarder == nil || s.ready.Load() && s.cfg.Forwarder.OwnsSite(siteKey)
}
