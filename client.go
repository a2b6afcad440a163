package main

// The client: it scrapes the source, cleans and spools the samples, and pushes them to servers, at
// the site's own phase of the interval. Every scrape is spooled before it is pushed. Neither a
// bad source nor a bad destination delays the other, and logs and metrics tell the two apart.
// This family must not know of flags or TLS.

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"
)

const (
	expiryWarning   = 30 * 24 * time.Hour // before the token expires
	dropLogInterval = time.Minute         // between log lines of scrapes that are dropped
)

// ClientConfig configures a Client.
type ClientConfig struct {
	From           *url.URL     // of the source, without match[]
	FromClient     *http.Client // follows no redirects
	To             []string     // servers, in the order in which they are tried
	ToClient       *http.Client // with a timeout; follows no redirects
	ClusterID      string       // the cluster ID
	Interval       time.Duration
	ScrapeInterval time.Duration // at most Interval
	LimitBytes     int64         // of a push's body; decompressed, MaxDecodedFactor times
	Metrics        *Metrics
	Log            *slog.Logger
	Now            func() time.Time
	Boot           func() (ms int64, id string) // the boot-time clock, and the boot's ID
}

// ClientReloadConfig is what a reload replaces, all at once.
type ClientReloadConfig struct {
	Token        string
	FromToken    string // "" = none
	Match        Selectors
	NewCleaner   func() *ClientCleaner // a new one, without Match
	TokenExpires int64                 // of Token in Unix seconds; 0 = never, or not known
}

// Client pushes from one source to the servers of one ring. Handler may be used while other
// methods run; of the others, one runs at a time.
type Client struct {
	cfg         ClientConfig
	state       atomic.Pointer[ClientReloadConfig]
	spool       *Spool
	pusher      *Pusher
	sourceClock *SourceClockTracker
	scrapedOK   atomic.Bool // the last scrape succeeded

	// For the scraping goroutine.
	spoolFailing   bool      // the last scrape could not be put on disk
	sourceFailures int       // scrapes that failed since the last good one
	sourceLogged   time.Time // when such a failure was logged last
	sourceSkew     int64     // ms; see skewByDateOrZero

	mu         sync.Mutex     // guards lost and held
	lost, held dropLogLimiter // scrapes that the spool dropped, by whether a server holds them

	scrapes, scraped, dropped, skipped, spoolErrors *Counter
	scrapeSeconds                                   *Histogram
	lastScrape, expiry                              *Gauge
	spoolScrapes, spoolBytes, spoolAge              *Gauge
}

// NewClient returns a Client, which needs a call of Reload and, to push, of OpenSpool.
func NewClient(cfg ClientConfig) *Client {
	m := cfg.Metrics
	c := &Client{
		cfg:           cfg,
		scrapes:       m.Counter("telemeter_source_scrapes_total", "Scrapes of the source by result.", "result"),
		scrapeSeconds: m.Histogram("telemeter_source_scrape_duration_seconds", "Time to scrape the source.", []float64{.01, .05, .1, .5, 1, 5, 10, 30, 60}),
		lastScrape:    m.Gauge("telemeter_source_last_success_timestamp_seconds", "When the source was last scraped; 0 if never."),
		scraped:       m.Counter("telemeter_samples_scraped_total", "Samples that the source gave."),
		dropped:       m.Counter("telemeter_samples_dropped_total", "Samples that did not leave the site, or that the server dropped, by reason.", "reason"),
		skipped:       m.Counter("telemeter_parts_skipped_total", "Parts of samples that are not carried, by kind.", "kind"),
		spoolErrors:   m.Counter("telemeter_spool_errors_total", "Reads and writes of the spool that failed, and damaged files."),
		spoolScrapes:  m.Gauge("telemeter_spool_scrapes", "Scrapes, or pieces of large ones, in the spool, by whether a server holds them.", "state"),
		spoolBytes:    m.Gauge("telemeter_spool_bytes", "Size of the scrapes in the spool.", "state"),
		spoolAge:      m.Gauge("telemeter_spool_oldest_age_seconds", "Age of the oldest scrape in the spool; 0 if there is none.", "state"),
		expiry:        m.Gauge("telemeter_token_expiry_timestamp_seconds", "When the client token expires; 0 if never, or not known."),
	}
	for _, result := range []string{"ok", "failed"} {
		c.scrapes.Add(0, result)
	}
	for _, reason := range []string{
		DropNotMatched, DropReserved, DropInvalid, DropRefused, DropByServer, DropSpoolFull, DropSpoolOld, DropSpoolDamaged, DropSpoolClosed, DropSpoolHeld,
	} {
		c.dropped.Add(0, reason)
	}
	return c
}

// OpenSpool opens the spool, which Run and ScrapeOnceAndDrain need. Of cfg the caller sets FS, Dir,
// Limit and MaxAge.
func (c *Client) OpenSpool(cfg SpoolConfig) (err error) {
	cfg.ClusterID, cfg.Now, cfg.CorrectTimes, cfg.OnError, cfg.OnDrop = c.cfg.ClusterID, c.moment, c.correctToServerTime, c.onSpoolError, c.onSpoolDrop
	if c.spool, err = OpenSpool(cfg); err != nil {
		return err
	}
	c.sourceClock = NewSourceClockTracker(c.spool.LastTimeShift())
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
		c.cfg.Log.Warn("no --spool-dir: scrapes are held in memory only; when this process ends nothing is sent again, and what no server has is lost")
	} else {
		c.cfg.Log.Info("spool is open", "dir", cfg.Dir, "scrapes", st.Scrapes, "bytes", st.Bytes)
	}
	return nil
}

// Close closes the spool.
func (c *Client) Close() error { return c.spool.Close() }

func (c *Client) onSpoolError(err error) {
	c.spoolErrors.Inc()
	c.cfg.Log.Error("spool failed", "err", err)
}

// dropLogLimiter limits the log lines of dropped scrapes to one in dropLogInterval, because a full
// spool drops at each scrape.
type dropLogLimiter struct {
	logged           time.Time
	scrapes, samples int // dropped since
}

// addDrops adds scrapes that were dropped, and returns the sums. logNow reports that the sums are
// to be logged now; later sums begin at 0.
func (l *dropLogLimiter) addDrops(now time.Time, scrapes, samples int) (sum dropLogLimiter, logNow bool) {
	l.scrapes, l.samples = l.scrapes+scrapes, l.samples+samples
	sum = *l
	if logNow = now.Sub(l.logged) >= dropLogInterval; logNow {
		*l = dropLogLimiter{logged: now}
	}
	return sum, logNow
}

// onSpoolDrop counts and logs scrapes that the spool drops. Those that a server holds are no loss.
func (c *Client) onSpoolDrop(reason string, scrapes, samples int) {
	c.dropped.Add(float64(samples), reason)
	log, level, text := &c.lost, slog.LevelError, "scrapes are dropped from the spool"
	if reason == DropSpoolHeld {
		log, level, text = &c.held, slog.LevelInfo, "scrapes that a server holds are dropped from the spool, though not every consumer has read them"
	}
	now := c.cfg.Now()
	c.mu.Lock()
	sum, due := log.addDrops(now, scrapes, samples)
	c.mu.Unlock()
	if due {
		c.cfg.Log.Log(context.Background(), level, text, "reason", reason, "scrapes", sum.scrapes, "samples", sum.samples)
	}
}

// moment returns the present moment.
func (c *Client) moment() Moment {
	boot, id := c.cfg.Boot()
	return Moment{Wall: c.cfg.Now().UnixMilli(), Boot: boot, BootID: id}
}

// Reload replaces tokens and rules.
func (c *Client) Reload(st ClientReloadConfig) {
	c.state.Store(&st)
	c.expiry.Set(float64(st.TokenExpires))
}

// Handler returns the handler of the client's listener.
func (c *Client) Handler() http.Handler {
	mux := http.NewServeMux()
	instrument := NewInstrument(c.cfg.Metrics)
	AddHealthRoutes(mux, func() bool { return c.scrapedOK.Load() && c.pusher.IsHealthy() })
	mux.Handle("GET /metrics", instrument("metrics", c.cfg.Metrics))
	mux.Handle("GET /federate", instrument("federate", http.HandlerFunc(c.serveLastDelivered)))
	mux.Handle("GET /{$}", instrument("index", IndexHandler("/federate", "/metrics", "/healthz", "/healthz/ready")))
	return mux
}

// serveLastDelivered answers with the scrape that was delivered last.
func (c *Client) serveLastDelivered(w http.ResponseWriter, r *http.Request) {
	samples, err := c.lastDeliveredSamples()
	if err != nil {
		c.cfg.Log.Error("what was sent last cannot be shown", "err", err)
		http.Error(w, "cannot be shown", http.StatusInternalServerError)
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

// lastDeliveredSamples returns the samples of the scrape that was delivered last.
func (c *Client) lastDeliveredSamples() (*SampleList, error) {
	list := &SampleList{}
	for _, sc := range c.pusher.LastDeliveredPieces() {
		text, err := sc.Text()
		if err != nil {
			return nil, err
		}
		var d Decoder
		if _, err := d.Decode(text, FormatText, list.Add); err != nil {
			return nil, err
		}
	}
	return list, nil
}
