package main

// The client: it scrapes the source, cleans and spools the samples, and has them pushed, at the
// site's own phase of the interval. Every scrape is spooled before it is pushed. Neither a bad
// source nor a bad destination delays the other, and logs and metrics tell the two apart. This
// family must not know of flags or TLS.

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxScrape        = 256 << 20 // bytes of a scrape, uncompressed
	firstJitter      = time.Second
	expiryNotice     = 30 * 24 * time.Hour
	minScrapeTimeout = 10 * time.Second
	maxScrapeTimeout = time.Minute
	scrapeGrace      = 2 * time.Second  // that a push which is due waits for a scrape which is under way
	sourceSlack      = 2 * time.Second  // by which a source's Date may differ and say nothing
	lastAttempt      = 5 * time.Second  // at the end, for what is in memory only
	dropWait         = time.Minute      // between log lines of drops
	sourceNotice     = 10 * time.Minute // between log lines of a source that goes on failing
	scrapeAccept     = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;escaping=allow-utf-8;q=0.9," +
		"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.8,text/plain;version=0.0.4;q=0.7," +
		"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.1"
)

// ClientConfig configures a Client.
type ClientConfig struct {
	From           *url.URL     // what is scraped, without match[]
	FromClient     *http.Client // follows no redirects
	To             []string     // servers, in the order in which they are tried
	ToClient       *http.Client // with a timeout; follows no redirects
	Cluster        string       // the cluster ID
	Interval       time.Duration
	ScrapeInterval time.Duration // at most Interval
	LimitBytes     int64         // of a push's body; decompressed, MaxDecodedFactor times
	Metrics        *Metrics
	Log            *slog.Logger
	Now            func() time.Time
	Boot           func() (ms int64, id string) // the boot-time clock, and the boot's ID
}

// ClientState is what a reload replaces, all at once.
type ClientState struct {
	Token     string
	FromToken string // "" = none
	Match     Selectors
	Cleaner   func() *Cleaner // a new one, without Match
	Expires   int64           // of Token in Unix seconds; 0 = never, or not known
}

// Client pushes from one source to one cluster of servers. Handler may be used
// concurrently to all else; of the others, one call at a time.
type Client struct {
	cfg       ClientConfig
	state     atomic.Pointer[ClientState]
	spool     *Spool
	pusher    *Pusher
	clocks    *SourceClock
	scrapedOK atomic.Bool // the last scrape succeeded

	// For the scraping goroutine.
	spoolFailing  bool // the last scrape could not be put on disk
	sourceFailing int  // scrapes that failed since the last good one
	sourceLogged  time.Time
	skew          int64 // ms; see sourceSkew

	mu    sync.Mutex    // guards drops
	drops [2]dropNotice // of scrapes that no server holds, and of others

	scrapes, scraped, dropped, skipped, spoolErrors *Counter
	scrapeSeconds                                   *Histogram
	lastScrape, expiry                              *Gauge
	spoolScrapes, spoolBytes, spoolAge              *Gauge
}

// dropNotice is what was logged of drops.
type dropNotice struct {
	at               time.Time
	scrapes, samples int // dropped since
}

// NewClient returns a Client without state and spool: see Reload, Open.
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
	}
	c.expiry = m.Gauge("telemeter_token_expiry_timestamp_seconds", "When the client token expires; 0 if never, or not known.")
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

// Open opens the spool, which Run and Once need; FS, Dir, Limit and MaxAge are
// the caller's to say.
func (c *Client) Open(cfg SpoolConfig) (err error) {
	cfg.Cluster, cfg.Now, cfg.Final, cfg.OnError, cfg.OnDrop = c.cfg.Cluster, c.moment, c.final, c.onSpoolError, c.onDrop
	if c.spool, err = OpenSpool(cfg); err != nil {
		return err
	}
	c.clocks = NewSourceClock(c.spool.NewestShift())
	c.cfg.Metrics.OnCollect(func() {
		st := c.spool.Stats()
		for state, part := range st.By {
			name := SpoolState(state).String()
			c.spoolScrapes.Set(float64(part.Scrapes), name)
			c.spoolBytes.Set(float64(part.Bytes), name)
			c.spoolAge.Set(part.Oldest.Seconds(), name)
		}
	})
	c.pusher = NewPusher(PusherConfig{
		To: c.cfg.To, ToClient: c.cfg.ToClient, Cluster: c.cfg.Cluster, Token: func() string { return c.state.Load().Token },
		LimitBytes: c.cfg.LimitBytes, MaxWait: max(c.cfg.Interval, time.Minute), Spool: c.spool, Clocks: c.clocks, Moment: c.moment,
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

// onDrop counts, and logs at most once a minute: a full spool drops at each scrape. What
// a server holds is no loss.
func (c *Client) onDrop(reason string, scrapes, samples int) {
	c.dropped.Add(float64(samples), reason)
	now, kind, level, text := c.cfg.Now(), 0, slog.LevelError, "scrapes are dropped from the spool"
	if reason == DropSpoolHeld {
		kind, level, text = 1, slog.LevelInfo, "scrapes that a server holds are dropped from the spool, though not every consumer has read them"
	}
	c.mu.Lock()
	n := &c.drops[kind]
	n.scrapes, n.samples = n.scrapes+scrapes, n.samples+samples
	told, due := *n, now.Sub(n.at) >= dropWait
	if due {
		*n = dropNotice{at: now}
	}
	c.mu.Unlock()
	if due {
		c.cfg.Log.Log(context.Background(), level, text, "reason", reason, "scrapes", told.scrapes, "samples", told.samples)
	}
}

func (c *Client) moment() Moment {
	boot, id := c.cfg.Boot()
	return Moment{Wall: c.cfg.Now().UnixMilli(), Boot: boot, BootID: id}
}

// Reload replaces tokens and rules.
func (c *Client) Reload(st ClientState) {
	c.state.Store(&st)
	c.expiry.Set(float64(st.Expires))
}

// Handler returns the handler of the client's listener.
func (c *Client) Handler() http.Handler {
	mux := http.NewServeMux()
	instrument := NewInstrument(c.cfg.Metrics)
	HealthRoutes(mux, func() bool { return c.scrapedOK.Load() && c.pusher.OK() })
	mux.Handle("GET /metrics", instrument("metrics", c.cfg.Metrics))
	mux.Handle("GET /federate", instrument("federate", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := c.sent()
		if err != nil {
			c.cfg.Log.Error("what was sent last cannot be shown", "err", err)
			http.Error(w, "cannot be shown", http.StatusInternalServerError)
			return
		}
		escaping := NegotiateEscaping(r.Header.Get("Accept"))
		w.Header().Set("Content-Type", escaping.ContentType())
		body, finish := CompressResponse(w, r)
		_, _, err = WriteFamilies(body, escaping, GroupByName(p))
		if err = errors.Join(err, finish()); err != nil {
			c.cfg.Log.Debug("answer to /federate ended early", "remote", r.RemoteAddr, "err", err)
		}
	})))
	mux.Handle("GET /{$}", instrument("index", IndexHandler("/federate", "/metrics", "/healthz", "/healthz/ready")))
	return mux
}

// sent returns what was delivered last.
func (c *Client) sent() (*SampleList, error) {
	p := &SampleList{}
	var unpack Decompressor
	for _, sc := range c.pusher.Sent() {
		text, _, err := unpack.Decompress(sc.Gzip, "gzip", sc.Size)
		if err != nil {
			return nil, err
		}
		var d Decoder
		if _, err := d.Decode(text, FormatText, p.Add); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// Run scrapes and delivers until ctx ends: first at once, then whenever the clock
// is at this cluster's phase of the interval, so that the pushes of many sites
// that start together spread. A backlog is delivered without waiting for that.
func (c *Client) Run(ctx context.Context) error {
	due := make(chan struct{}, 1) // the scrape that a push waits for is spooled
	var wg sync.WaitGroup
	wg.Go(func() { c.scrapeLoop(ctx, due) })
	c.deliverLoop(ctx, due)
	wg.Wait()
	if c.spool.Stats().InMemory > 0 {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastAttempt)
		defer cancel()
		c.pusher.Drain(last) // logs what fails
	}
	return nil
}

// scrapeLoop scrapes at its phase, whatever becomes of deliveries.
func (c *Client) scrapeLoop(ctx context.Context, due chan<- struct{}) {
	var warned, push time.Time // push: when the next push is due
	wait := rand.N(firstJitter)
	for {
		if _, ok := Sleep(ctx, wait, nil); !ok {
			return
		}
		begin := c.cfg.Now()
		if at := c.state.Load().Expires; at != 0 && begin.Add(expiryNotice).Unix() > at && begin.Sub(warned) > 24*time.Hour {
			c.cfg.Log.Warn("the token expires soon; this site is silent afterwards", "at", time.Unix(at, 0).UTC())
			warned = begin
		}
		err := c.spoolOne(ctx)
		// The scrape nearest to when a push is due starts it. The first scrape starts one
		// at any time, and takes the place of none.
		if half := begin.Add(c.cfg.ScrapeInterval / 2); err == nil && !half.Before(push) {
			select {
			case due <- struct{}{}:
			default:
			}
			if push.IsZero() {
				half = begin
			}
			push = half.Add(c.untilPhase(half, c.cfg.Interval))
		}
		next := begin.Add(c.untilPhase(begin, c.cfg.ScrapeInterval))
		for next.Before(c.cfg.Now()) { // a slow source costs scrapes, not their phase
			next = next.Add(c.cfg.ScrapeInterval)
		}
		wait = next.Sub(c.cfg.Now())
	}
}

// deliverLoop delivers when a scrape starts a push, and, lest a source that hangs
// delays what is spooled, at the phase of pushes by itself.
func (c *Client) deliverLoop(ctx context.Context, due <-chan struct{}) {
	for ctx.Err() == nil {
		now := c.cfg.Now()
		timer := time.NewTimer(c.untilPhase(now.Add(-scrapeGrace), c.cfg.Interval))
		select {
		case <-ctx.Done():
		case <-due:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() == nil {
			c.pusher.Drain(ctx) // logs what fails
		}
	}
}

// untilPhase returns the time until this cluster's phase of an interval comes
// next. One that is about to come counts as reached: a wall clock that is slewed
// lags behind the timer that was to wait for it.
func (c *Client) untilPhase(now time.Time, interval time.Duration) time.Duration {
	h := fnv.New64a()
	io.WriteString(h, c.cfg.Cluster)
	phase := time.Duration(h.Sum64() % uint64(interval))
	wait := interval - (time.Duration(now.UnixNano())-phase)%interval
	if wait < interval/10 {
		wait += interval
	}
	return wait
}

// Once scrapes once, and delivers all that is spooled, retrying until ctx ends.
// What fails is logged and counted here, and returned.
func (c *Client) Once(ctx context.Context) error {
	err := c.spoolOne(ctx)
	if err != nil {
		err = fmt.Errorf("source: %w", err)
	}
	if e := c.pusher.Drain(ctx); e != nil {
		st, who := c.spool.Stats(), "destination"
		if errors.Is(e, ErrSpoolRead) {
			who = "spool"
		}
		err = errors.Join(err, fmt.Errorf("%s: %w (scrapes kept in the spool: %d, in memory only: %d)", who, e, st.By[ScrapeUndelivered].Scrapes-st.InMemory, st.InMemory))
	}
	return err
}

// spoolOne scrapes, and spools what it got. What fails is logged and counted
// here, and returned if it is the source.
func (c *Client) spoolOne(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, min(max(c.cfg.ScrapeInterval, minScrapeTimeout), maxScrapeTimeout))
	defer cancel()
	got, err := c.Scrape(limited)
	c.scrapedOK.Store(err == nil)
	if err != nil {
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			level := slog.LevelDebug
			if now := c.cfg.Now(); c.sourceFailing == 0 || now.Sub(c.sourceLogged) >= sourceNotice {
				level, c.sourceLogged = slog.LevelError, now
			}
			c.sourceFailing++
			c.cfg.Log.Log(ctx, level, "source failed", "from", c.cfg.From.Redacted(), "err", err)
		}
		return err
	}
	if c.sourceFailing > 0 {
		c.cfg.Log.Info("source works again", "failed", c.sourceFailing)
		c.sourceFailing = 0
	}
	got.Shift, got.Final = c.clocks.Shift(got.At, got.Source)
	for _, piece := range c.pieces(got, got.Push.Samples) {
		err = errors.Join(err, c.spool.Add(piece))
	}
	switch {
	case err != nil:
		c.spoolErrors.Inc()
		if !c.spoolFailing {
			c.cfg.Log.Error("spool failed; scrapes are held in memory, as far as it allows", "err", err)
		}
	case c.spoolFailing:
		c.cfg.Log.Info("spool works again")
	}
	c.spoolFailing = err != nil
	return nil
}
