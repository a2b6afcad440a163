package main

// The client scrapes the source, cleans the samples, writes them to the spool and pushes them to
// the destination, which is the list of servers. After the first ones, its scrapes and pushes begin
// at the site's phase, an offset in the interval that depends on the cluster ID. Every scrape
// enters the spool before it is pushed. A failing source delays a due push by at most pushGrace,
// and a failing destination does not delay scrapes. Logs and metrics name the part that failed:
// source, spool or destination. This family must not parse flags or know of TLS.

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	expiryWarning   = 30 * 24 * time.Hour // the client logs a warning if its token expires within this time
	dropLogInterval = time.Minute         // least time between two log lines that one dropLogLimiter allows
)

// ClientConfig configures a Client.
type ClientConfig struct {
	From           *url.URL      // URL of the source; the client adds match[] parameters if the path ends in /federate
	Replicas       []*url.URL    // URLs of further sources, which have the same series as From
	FromClient     *http.Client  // for requests to the source; its CheckRedirect is not used, because the client has its own rules
	To             []string      // URLs of the servers, tried in this order
	ToClient       *http.Client  // for requests to the servers; has a timeout and must not follow redirects
	ClusterID      string        // names this site
	Interval       time.Duration // time between two pushes, except at start, at shutdown, and for retries and backlogs
	ScrapeInterval time.Duration // time between two scrapes; at most Interval
	Backfill       time.Duration // scrapes that are missing for at most this long are filled in from the query API of the source; 0 = none
	LimitBytes     int64         // most bytes of the compressed body of a push; the decompressed body may have MaxDecodedFactor times as many; a push of a single scrape may exceed both
	Metrics        *Metrics
	Log            *slog.Logger
	Now            func() time.Time             // reads the wall clock
	Warnings       *WarningLog                  // newest warnings and errors of Log, for the status; nil = none are known
	Boot           func() (ms int64, id string) // reads the boot-time clock and the ID of this boot
}

// ClientReloadConfig is the part of the configuration that Reload replaces as a whole.
type ClientReloadConfig struct {
	Token             string                // the client token, which servers exchange for upload tokens
	FromAuthorization string                // value of the header Authorization in requests to the source; "" means none
	Match             Selectors             // selects the series to push
	NewCleaner        func() *ClientCleaner // returns a new cleaner whose Match is not set; the client sets Match if the source does not select the series itself
	TokenExpires      int64                 // when Token expires, in Unix seconds; 0 means never or unknown
}

// Client pushes the samples of one source to the servers of one ring. Reload and the handler that
// Handler returns are safe for concurrent use with all methods. Of the other exported methods, only
// one may run at a time.
type Client struct {
	cfg         ClientConfig
	state       atomic.Pointer[ClientReloadConfig]
	spool       *Spool
	pusher      *Pusher
	sourceClock *SourceClockTracker
	scrapedOK   atomic.Bool // the last scrape of the source succeeded
	sources     *sources
	differing   atomic.Pointer[string] // see compareReplicas; nil if replicas do not differ
	backfiller  *backfiller            // nil until OpenSpool

	// The next fields are used only by the goroutine that scrapes.
	spoolFailing   bool         // Spool.Add returned an error for the last scrape
	sourceFailures failureLog   // failures of the source that were logged
	invalidSamples failureLog   // scrapes with invalid samples that were logged
	sourceOutage   outage       // failed scrapes since the last successful scrape
	unmatched      unmatchedLog // flags that match no series of the source

	started time.Time // when NewClient made this client

	mu           sync.Mutex   // guards the fields below
	source       SourceStatus // without the fields that Status sets
	unmatchedNow []string     // flags with a value that matched no series of the newest scrape; nil if no series was left of that scrape
	loggedShift  loggedShift
	// held limits the log lines about scrapes dropped for the reason DropSpoolHeld. lost limits the
	// log lines about all other dropped scrapes.
	lost, held dropLogLimiter

	scrapes, scraped, dropped, skipped, spoolErrors *Counter
	scrapeSeconds                                   *Histogram
	sourceChanges                                   *Counter
	lastScrape, expiry, unmatchedFlags              *Gauge
	spoolScrapes, spoolBytes, spoolAge              *Gauge
}

// NewClient returns a Client. The caller must call Reload before any scrape or push, and OpenSpool
// before any method other than Reload and Scrape.
func NewClient(cfg ClientConfig) *Client {
	m := cfg.Metrics
	from := *cfg.FromClient
	from.CheckRedirect = checkSourceRedirect
	cfg.FromClient = &from
	if cfg.Warnings == nil {
		cfg.Warnings = &WarningLog{}
	}
	c := &Client{
		cfg:            cfg,
		started:        cfg.Now(),
		sources:        newSources(append([]*url.URL{cfg.From}, cfg.Replicas...)),
		sourceChanges:  m.Counter("telemeter_source_changes_total", "Changes from one value of --from to another, because a source failed or was behind."),
		scrapes:        m.Counter("telemeter_source_scrapes_total", "Scrapes of the source by result.", "result"),
		scrapeSeconds:  m.Histogram("telemeter_source_scrape_duration_seconds", "Duration of scrapes of the source.", []float64{.01, .05, .1, .5, 1, 5, 10, 30, 60}),
		lastScrape:     m.Gauge("telemeter_source_last_success_timestamp_seconds", "Unix time of the last successful scrape of the source; 0 if none succeeded yet."),
		scraped:        m.Counter("telemeter_samples_scraped_total", "Samples in successful scrapes of the source, before cleaning."),
		unmatchedFlags: m.Gauge("telemeter_source_unmatched_flags", "Values of a flag about series that match no series of the last scrape, by flag: a misspelled anonymized label lets values leave the site readable.", "flag"),
		dropped:        m.Counter("telemeter_samples_dropped_total", "Samples dropped by the client or by a server, by reason.", "reason"),
		skipped:        m.Counter("telemeter_parts_skipped_total", "Parts of scraped samples that cannot be pushed, such as exemplars, by kind.", "kind"),
		spoolErrors:    m.Counter("telemeter_spool_errors_total", "Failed reads and writes of the spool, and damaged spool files."),
		spoolScrapes:   m.Gauge("telemeter_spool_scrapes", "Scrapes in the spool, by delivery state; a large scrape counts once for each of its pieces.", "state"),
		spoolBytes:     m.Gauge("telemeter_spool_bytes", "Bytes that the scrapes in the spool occupy, by delivery state.", "state"),
		spoolAge:       m.Gauge("telemeter_spool_oldest_age_seconds", "Age of the oldest scrape in the spool, by delivery state; 0 if there is none.", "state"),
		expiry:         m.Gauge("telemeter_token_expiry_timestamp_seconds", "Unix time at which the client token expires; 0 if it never does or if the expiry is unknown."),
	}
	for _, result := range []string{"ok", "failed"} {
		c.scrapes.Add(0, result)
	}
	for _, flag := range []string{matchFlag, renameFlag, anonymizeFlag, elideLabelFlag} {
		c.unmatchedFlags.Set(0, flag)
	}
	for _, reason := range []string{
		DropNotMatched, DropReserved, DropInvalid, DropRefused, DropByServer, DropSpoolFull, DropSpoolOld, DropSpoolDamaged, DropSpoolClosed, DropSpoolHeld, DropReplica,
	} {
		c.dropped.Add(0, reason)
	}
	return c
}

// OpenSpool opens the spool and creates the Pusher, which Run and ScrapeOnceAndDrain use. The
// caller sets FS, Dir, Limit and MaxAge in cfg; OpenSpool sets the other fields.
func (c *Client) OpenSpool(cfg SpoolConfig) (err error) {
	cfg.ClusterID, cfg.Now, cfg.CorrectTimes, cfg.OnError, cfg.OnDrop = c.cfg.ClusterID, c.moment, c.correctToServerTime, c.onSpoolError, c.onSpoolDrop
	if c.spool, err = OpenSpool(cfg); err != nil {
		return err
	}
	c.sourceClock = NewSourceClockTracker(c.spool.LastTimeShift())
	c.sources.resume(c.spool.Progress(), c.spool.LastTimeShift())
	maxAge := min(c.cfg.Backfill, cfg.MaxAge)
	if maxAge > 0 && !c.canBackfill() {
		maxAge = 0
		c.cfg.Log.Info("the source is not the /federate of a Prometheus, so the samples of scrapes that the client misses are not fetched later")
	}
	c.backfiller = newBackfiller(c, maxAge, c.spool.Progress())
	c.cfg.Metrics.OnCollect(func() {
		st := c.spool.Stats()
		for state, part := range st.ByState {
			name := DeliveryState(state).String()
			c.spoolScrapes.Set(float64(part.Scrapes), name)
			c.spoolBytes.Set(float64(part.Bytes), name)
			c.spoolAge.Set(part.OldestAge.Seconds(), name)
		}
	})
	c.pusher = NewPusher(PusherConfig{
		To: c.cfg.To, ToClient: c.cfg.ToClient, ClusterID: c.cfg.ClusterID, Token: func() string { return c.state.Load().Token },
		LimitBytes: c.cfg.LimitBytes, MaxRetryAfter: max(c.cfg.Interval, time.Minute), Spool: c.spool, SourceClock: c.sourceClock, Moment: c.moment,
		Now: c.cfg.Now, Metrics: c.cfg.Metrics, Dropped: c.dropped, SpoolErrors: c.spoolErrors, Log: c.cfg.Log,
	})
	st := c.spool.Stats()
	if cfg.Dir == "" {
		c.cfg.Log.Warn("no --spool-dir: scrapes are kept in memory only; scrapes that no server holds are lost when this process ends")
	} else {
		c.cfg.Log.Info("spool opened", "dir", cfg.Dir, "scrapes", st.Scrapes, "bytes", st.Bytes)
	}
	return nil
}

// canBackfill reports whether all sources are Prometheus servers, which may answer queries.
func (c *Client) canBackfill() bool {
	return !slices.ContainsFunc(c.sources.all, func(src *source) bool { return !IsFederate(src.url) })
}

// IsFederate reports whether a source selects series by match[] parameters, as /federate of Prometheus
// does.
func IsFederate(u *url.URL) bool { return strings.HasSuffix(u.Path, "/federate") }

// Close closes the spool.
func (c *Client) Close() error { return c.spool.Close() }

func (c *Client) onSpoolError(err error) {
	c.spoolErrors.Inc()
	c.cfg.Log.Error("spool failed", "err", err)
}

// dropLogLimiter limits the log lines about dropped scrapes to one in dropLogInterval, because a
// full spool may drop scrapes at every Add.
type dropLogLimiter struct {
	logged           time.Time // when the last log line was written
	scrapes, samples int       // scrapes and samples dropped since the last log line
}

// addDrops adds dropped scrapes and samples to the sums and returns the new sums. If logNow is
// true, the caller must log the returned sums; the limiter's own sums then start again at 0.
func (l *dropLogLimiter) addDrops(now time.Time, scrapes, samples int) (sum dropLogLimiter, logNow bool) {
	l.scrapes, l.samples = l.scrapes+scrapes, l.samples+samples
	sum = *l
	if logNow = now.Sub(l.logged) >= dropLogInterval; logNow {
		*l = dropLogLimiter{logged: now}
	}
	return sum, logNow
}

// onSpoolDrop counts the samples of dropped scrapes and logs the drop, limited by a dropLogLimiter.
// If the reason is DropSpoolHeld, a server holds or held the scrapes. Such scrapes do not count as
// lost, so they are logged at level Info instead of Error.
func (c *Client) onSpoolDrop(reason string, scrapes, samples int) {
	c.dropped.Add(float64(samples), reason)
	log, level, text := &c.lost, slog.LevelError, "scrapes dropped from the spool"
	if reason == DropSpoolHeld {
		log, level, text = &c.held, slog.LevelInfo, "scrapes dropped from the spool before every consumer read them; a server holds or held them"
	}
	now := c.cfg.Now()
	c.mu.Lock()
	sum, due := log.addDrops(now, scrapes, samples)
	c.mu.Unlock()
	if due {
		c.cfg.Log.Log(context.Background(), level, text, "reason", reason, "scrapes", sum.scrapes, "samples", sum.samples)
	}
}

// moment reads the wall clock and the boot-time clock.
func (c *Client) moment() Moment {
	boot, id := c.cfg.Boot()
	return Moment{Wall: c.cfg.Now().UnixMilli(), Boot: boot, BootID: id}
}

// Reload replaces the tokens, the selectors and the cleaning rules. If pushes pause because of a
// failure, the next attempt begins at once.
func (c *Client) Reload(st ClientReloadConfig) {
	c.state.Store(&st)
	c.expiry.Set(float64(st.TokenExpires))
	if c.pusher != nil {
		c.pusher.RetryNow()
	}
}

// Handler returns the handler of the client's own HTTP listener: health, metrics, and /federate
// with the scrape that was delivered last. onLoopback must be true only if the listener is bound to
// a loopback address.
func (c *Client) Handler(onLoopback bool) http.Handler {
	mux := http.NewServeMux()
	instrument := NewInstrument(c.cfg.Metrics)
	AddHealthRoutes(mux, c.whyNotReady)
	mux.Handle("GET /metrics", instrument("metrics", c.cfg.Metrics))
	mux.Handle("GET /federate", instrument("federate", http.HandlerFunc(c.serveLastDelivered)))
	mux.Handle("GET /api/status", instrument("status", http.HandlerFunc(c.handleStatusJSON)))
	index := IndexHandler(append([]string{"/api/status", "/federate", "/metrics"}, HealthPaths()...)...)
	mux.Handle("GET /{$}", instrument("index", c.handleIndex(index)))
	return RefuseForeignRequests(onLoopback, instrument, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ProtectConn(r, "") // no request to this listener needs a token
		mux.ServeHTTP(w, r)
	}))
}

// whyNotReady returns the reason why the client's readiness check fails, or "" if samples go from the
// source to a server.
func (c *Client) whyNotReady() string {
	switch {
	case !c.scrapedOK.Load():
		return "no scrape of the source has succeeded yet, or the newest one failed; the client's log says why"
	case !c.pusher.IsHealthy():
		return "no push has delivered its scrapes yet, or the newest one failed; the client's log says why"
	}
	return ""
}

// serveLastDelivered answers with the samples of the scrape that was delivered last. After a
// failover this may be an older scrape, delivered again to another server.
func (c *Client) serveLastDelivered(w http.ResponseWriter, r *http.Request) {
	samples, err := c.lastDeliveredSamples()
	if err != nil {
		c.cfg.Log.Error("cannot decode the last delivered scrape for /federate", "err", err)
		http.Error(w, "cannot decode the last delivered scrape", http.StatusInternalServerError)
		return
	}
	escaping := NegotiateEscaping(r.Header.Get("Accept"))
	w.Header().Set("Content-Type", escaping.ContentType())
	body, finish := CompressResponse(w, r)
	_, _, err = WriteFamilies(body, escaping, GroupByName(samples))
	if err = errors.Join(err, finish()); err != nil {
		c.cfg.Log.Debug("answer to /federate ended early", "remote", r.RemoteAddr, "err", err)
	}
}

// lastDeliveredSamples returns the samples of the scrape that was delivered last. The list is empty
// if no scrape was delivered yet.
func (c *Client) lastDeliveredSamples() (*SampleList, error) {
	pieces := c.pusher.LastDeliveredPieces()
	size, samples := 0, 0
	for _, sc := range pieces {
		size, samples = size+sc.Size, samples+sc.Samples
	}
	list := &SampleList{Arena: make([]byte, 0, size), Samples: make([]Sample, 0, samples)} // a list that grows needs twice the memory
	for _, sc := range pieces {
		if err := sc.eachSample(list.Add); err != nil {
			return nil, err
		}
	}
	return list, nil
}
