package main

// This file answers GET /federate of a server: scrapes with and without a consumer's name, and the
// server's own series about each site. A scrape never fails because of the samples of one site. A
// consumer gets unread samples again until a later scrape on the same connection shows that it
// received them. A scrape ends at its timeout. This file must not know of pushes or of how samples
// are stored.

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unique"
)

// keepsOnlyFirst matches the User-Agent of scrapers that must not get several samples of one series
// in one scrape. Prometheus 2.52.0 to 2.53.2 and 2.54.0 keep only the first of several samples of a
// series. VictoriaMetrics and vmagent mark a series as stale if one scrape has two samples of the
// series and the next scrape has one.
var keepsOnlyFirst = regexp.MustCompile(`^(Prometheus/2\.(52\.\d+|53\.[0-2]|54\.0)|vm_promscrape)\b`)

type federateConfig struct {
	Store        *Store
	Sites        *SitePushLimiter
	History      *activityHistory
	Owned        func(hash uint64) bool // reports whether this server shows the newest samples of the site with this key again, even to consumers that have read them; see AllSitesReader.Owned
	Revoked      func(id string) bool
	Issued       func() iter.Seq2[string, time.Time] // returns the cluster IDs of the sites that have a valid token, in order, as far as this server knows; see IssuedTokens.ValidSites
	Name         string
	Metrics      *Metrics
	Log          *slog.Logger
	Now          func() time.Time
	MaxSampleAge time.Duration // a sample that is older is not served again to a consumer that has read it, nor to a scraper without a consumer name; a site's clock offset is not shown once it is older
	LimitScrape  int           // maximum samples of sites in one scrape; one site alone may have more if the scrape names no consumer; 0 = no limit
}

// federateHandler answers GET /federate. It is safe for concurrent use.
type federateHandler struct {
	cfg        federateConfig
	scraper    *AllSitesReader
	limitedLog *LimitedLog // for messages that each scrape can cause
	slots      *scrapeSlots
	// spare has the memory of an earlier scrape, for the next one, or is nil. It is no sync.Pool,
	// because the garbage collector empties a pool, and growing new memory takes longer than the rest
	// of a scrape before its first byte.
	spare atomic.Pointer[FamilyGrouper]

	seconds, bytes              *Histogram
	samples                     *Gauge
	truncated, hidden, repeated *Counter
	endedEarly                  *Counter
}

// newFederateHandler returns a handler for /federate and registers its metrics.
func newFederateHandler(cfg federateConfig) *federateHandler {
	m := cfg.Metrics
	unconfirmed := m.Gauge("telemeter_consumer_unconfirmed_scrapes", "Consecutive scrapes of a consumer that served it unread samples and that its next scrape did not confirm.", "consumer", "address")
	m.OnCollect(func() {
		unconfirmed.ReplaceSeries(func(set func(v float64, labelValues ...string)) {
			for _, c := range cfg.Store.Consumers.Summaries() {
				set(float64(c.Unconfirmed), c.Name, c.Address)
			}
		})
	})
	return &federateHandler{
		cfg: cfg, scraper: &AllSitesReader{Store: cfg.Store, MaxSampleAge: cfg.MaxSampleAge, Now: cfg.Now, Owned: cfg.Owned},
		limitedLog: NewLimitedLog(cfg.Log, cfg.Now),
		slots:      newScrapeSlots(),
		seconds:    m.Histogram("telemeter_scrape_duration_seconds", "Seconds to answer a request to /federate.", []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30}),
		bytes:      m.Histogram("telemeter_scrape_size_bytes", "Bytes of an answer to /federate before compression.", []float64{1e3, 1e4, 1e5, 1e6, 1e7, 1e8}),
		samples:    m.Gauge("telemeter_scrape_samples", "Samples in the last answer to /federate."),
		truncated:  m.Counter("telemeter_scrapes_truncated_total", "Answers to /federate that met a limit and left samples for later scrapes."),
		hidden:     m.Counter("telemeter_scrape_samples_hidden_total", "Samples left out of answers to /federate because escaping made their series equal to another series."),
		endedEarly: m.Counter("telemeter_scrapes_cut_total", "Answers to /federate that failed because their connection ended or their timeout passed."),
		repeated:   m.Counter("telemeter_scrapes_repeated_total", "Scrapes that served a consumer the same samples again, because its previous scrape on another connection was not confirmed."),
	}
}

// ServeHTTP answers a scrape. A GET request with a consumer's name gets the samples that the
// consumer has not read, up to a limit. If the limit leaves room, it also gets the newest samples
// of sites that this server owns. Any other request gets only these newest samples. Every answer
// also has the server's own series about each site. All samples and series are those that match[]
// selects. A scrape waits until few other scrapes are being answered; see scrapeSlots. It gets 503
// if its timeout passes before the answer begins, and is cut off if the timeout passes later.
func (h *federateHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	begin := time.Now()
	timeout := scrapeTime(r.Header)
	ctx, cancel := context.WithDeadline(r.Context(), begin.Add(timeout))
	defer cancel()
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		h.refuse(w, r, fmt.Errorf("the query is malformed: %w", err))
		return
	}
	if err := checkScrapeParams(q); err != nil {
		h.refuse(w, r, err)
		return
	}
	// A HEAD request must not move a consumer's cursor, because the sender of a HEAD request gets
	// no samples.
	var c scrapingConsumer
	if q.Has("consumer") && r.Method == http.MethodGet {
		if c, err = h.identifyConsumer(r, q); err != nil {
			h.refuse(w, r, err)
			return
		}
	}
	match, release, err := h.slots.acquire(ctx, c.key, c.isEstablished, q["match[]"])
	if err != nil {
		h.refuse(w, r, err)
		return
	}
	defer release()
	beginAnswer := time.Now()
	var session *ConsumerSession // nil for a HEAD request, and for a scrape without a consumer's name
	if c.name != "" {
		if session, err = h.beginScrape(r, c); err != nil {
			h.refuse(w, r, err)
			return
		}
	}
	if session == nil && r.Method == http.MethodGet {
		h.limitedLog.LogPeer(slog.LevelInfo, "a scrape without consumer gets only the newest sample of each series: add params: {consumer: [NAME]} to the scrape configuration", r.RemoteAddr)
	}
	g := h.spare.Swap(nil)
	if g == nil { // this is the first scrape, or another one is being answered
		g = &FamilyGrouper{}
	}
	err = h.collect(ctx, g, r, c.name, session, match)
	if err != nil {
		refuseScrape(w, err) // the end of this method logs the error
	} else {
		err = h.write(w, r, begin.Add(timeout), g.Families())
	}
	g.Reset()
	h.spare.Store(g)
	took := time.Since(begin)
	h.seconds.Observe(took.Seconds())
	h.cfg.History.add(h.cfg.Now(), func(a *activity) { a.Scrapes, a.SlowestScrape = a.Scrapes+1, max(a.SlowestScrape, took) })
	if session != nil {
		session.EndScrapeAndLimitNext(time.Since(beginAnswer), timeout/2, err)
	}
	if err != nil {
		h.endedEarly.Inc()
		h.limitedLog.Log(slog.LevelInfo, "answer to scrape was cut off", "remote", r.RemoteAddr, "err", err)
	}
}

// checkScrapeParams returns an error if the query of a scrape has a parameter that /federate does not
// know, or a consumer's name that is empty or not the only one. Without this check, a misspelled
// parameter would be ignored, and a consumer would silently get only the newest samples.
func checkScrapeParams(q url.Values) error {
	for _, name := range slices.Sorted(maps.Keys(q)) {
		if name != "match[]" && name != "consumer" {
			return fmt.Errorf("unknown parameter %.100q: known are match[], consumer", name)
		}
	}
	names, named := q["consumer"]
	switch {
	case len(names) > 1:
		return fmt.Errorf("the parameter consumer is given %d times: give one name", len(names))
	case named && names[0] == "":
		return fmt.Errorf("the parameter consumer is empty: %w; leave the parameter out to get only the newest samples", CheckConsumerName(""))
	}
	return nil
}

// refuse answers a scrape with an error. It logs the error unless the scraper may succeed later,
// because the page /targets of Prometheus shows only the status of the answer.
func (h *federateHandler) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if refuseScrape(w, err) < http.StatusInternalServerError {
		h.limitedLog.LogPeer(slog.LevelWarn, "scrape refused: correct the scrape configuration", r.RemoteAddr, "reason", err)
	}
}

// refuseScrape answers a scrape with 503 and Retry-After if the server can answer it later, with 403
// if the consumer is not allowed to scrape, and with 400 if the scrape is invalid. It returns the
// status.
func refuseScrape(w http.ResponseWriter, err error) (status int) {
	status, retryAfter := http.StatusBadRequest, ""
	switch {
	case errors.Is(err, ErrConsumerNotAllowed):
		status = http.StatusForbidden
	case errors.Is(err, ErrConsumers):
		status, retryAfter = http.StatusServiceUnavailable, "60"
	case errors.Is(err, errScrapesBusy), errors.Is(err, errScrapeEnded):
		status, retryAfter = http.StatusServiceUnavailable, "10"
	}
	if retryAfter != "" {
		w.Header().Set("Retry-After", retryAfter)
	}
	http.Error(w, err.Error(), status)
	return status
}

// errScrapeEnded means that the timeout of a scrape passed, or that its connection ended, while
// match[] was applied to samples.
var errScrapeEnded = errors.New("the scrape ended before match[] was applied to all samples; if this is not rare, use cheaper selectors or a longer scrape_timeout")

// collect adds the content of the answer to a scrape to g. If session is not nil, the samples are
// those of ServeUnreadAndNewest. The error is errScrapeEnded if ctx ends before match is applied to
// all samples.
func (h *federateHandler) collect(ctx context.Context, g *FamilyGrouper, r *http.Request, consumer string, session *ConsumerSession, match Selectors) error {
	matchLine := match.LineMatcherOrNil()
	if all := matchLine; all != nil {
		matchLine = func(line []byte) bool { return ctx.Err() == nil && all(line) }
	}
	if session != nil {
		h.addUnreadAndNewest(g, session, r, consumer, matchLine)
	} else {
		h.addNewest(g, matchLine)
	}
	h.addSiteStatus(g, func(name []byte, labels []Label) bool {
		return ctx.Err() == nil && match.MatchOrEmpty(name, labels)
	})
	if ctx.Err() != nil {
		return errScrapeEnded
	}
	return nil
}

// addUnreadAndNewest adds to g samples that a consumer has not read, up to the limit on its scrape,
// and marks them as served. If the limit leaves room, it adds the newest samples of sites that this
// server owns.
func (h *federateHandler) addUnreadAndNewest(g *FamilyGrouper, session *ConsumerSession, r *http.Request, consumer string, match func(line []byte) bool) {
	limit := session.SampleLimit(h.cfg.LimitScrape)
	unread, more := h.scraper.ServeUnreadAndNewest(g, session, limit, keepsOnlyFirst.MatchString(r.UserAgent()), match)
	if more {
		h.truncated.Inc()
		h.cfg.Log.Debug("scrape met a limit; later scrapes get the other samples", "consumer", consumer, "samples", unread, "limit", limit)
	}
}

// addNewest adds to g the newest sample of each series of the sites that this server owns, unless
// that sample is older than MaxSampleAge. If LimitScrape leaves out sites, the next scrape begins
// with other sites.
func (h *federateHandler) addNewest(g *FamilyGrouper, match func(line []byte) bool) {
	if h.scraper.NewestPerSeries(g, h.cfg.LimitScrape, match) {
		h.truncated.Inc()
		h.limitedLog.Log(slog.LevelWarn, "scrape met the limit on samples; the next scrape begins with other sites", "limit", h.cfg.LimitScrape)
	}
}

// write writes families to the scraper, with the escaping and compression that the scraper asks
// for. An error means that the connection failed, or that the scraper did not take the answer before
// deadline.
func (h *federateHandler) write(w http.ResponseWriter, r *http.Request, deadline time.Time, families []Family) error {
	if err := http.NewResponseController(w).SetWriteDeadline(deadline); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return fmt.Errorf("setting the deadline of an answer: %w", err)
	}
	escaping := NegotiateEscaping(r.Header.Get("Accept"))
	w.Header().Set("Content-Type", escaping.ContentType())
	out, finish := CompressResponse(w, r)
	count := &CountWriter{W: out}
	written, hidden, err := WriteFamilies(count, escaping, families)
	err = errors.Join(err, finish())
	h.bytes.Observe(float64(count.N))
	h.samples.Set(float64(written))
	h.hidden.Add(float64(hidden))
	return err
}

// scrapingConsumer is the consumer that a request names.
type scrapingConsumer struct {
	name, address string
	key           uint64
	isEstablished bool // the consumer has confirmed a scrape before
}

// identifyConsumer returns the consumer that a request names. A consumer is identified by its name,
// its IP address and its match[] selectors, whose order does not matter. The error is that the name
// is invalid or not allowed.
func (h *federateHandler) identifyConsumer(r *http.Request, q url.Values) (c scrapingConsumer, err error) {
	if c.address, _, err = net.SplitHostPort(r.RemoteAddr); err != nil {
		c.address = r.RemoteAddr
	}
	c.name = q.Get("consumer")
	if err := h.cfg.Store.Consumers.CheckMayScrape(c.name); err != nil {
		return c, fmt.Errorf("consumer: %w", err)
	}
	c.key = ConsumerKey(c.name, c.address, strings.Join(slices.Sorted(slices.Values(q["match[]"])), "\x00"))
	c.isEstablished = h.cfg.Store.Consumers.HasConfirmed(c.key)
	return c, nil
}

// beginScrape begins the scrape of a consumer. If samples are served again because an earlier scrape
// of the consumer was not confirmed, beginScrape logs a message. The text of the error goes to the
// scraper.
func (h *federateHandler) beginScrape(r *http.Request, c scrapingConsumer) (*ConsumerSession, error) {
	conn, viaProxy := TrackerIfPreviousAnswerRead(r), isProxied(r.Header)
	if viaProxy {
		conn = &AnswerReadTracker{} // a new tracker stands for a connection never seen before, so this scrape does not confirm the previous one
	}
	now := h.cfg.Now()
	log := func(level slog.Level, message string, args ...any) { // by rate, because scrapers can invent consumers
		h.limitedLog.Log(level, message, append(args, "consumer", c.name, "remote", r.RemoteAddr)...)
	}
	session, repeated, err := h.cfg.Store.Consumers.BeginScrape(c.key, c.name, c.address, conn, now)
	if err != nil {
		return nil, fmt.Errorf("consumer: %w", err)
	}
	// Save the consumer before it is served anything, so that after a crash this server still knows
	// that the consumer has samples to read. If saving fails, the scrape goes on. A consumer that
	// has confirmed a scrape was saved at an earlier scrape. Its scrapes do not wait while the disk
	// writes consumers that others invent.
	if !h.cfg.Store.Consumers.HasConfirmed(c.key) {
		h.cfg.Store.SaveConsumers()
	}
	if viaProxy && session.TakeProxyWarning(now) {
		log(slog.LevelWarn, "the consumer scrapes through a proxy, which cannot confirm that samples arrived, so the same samples are served again; make the consumer scrape this server directly")
	}
	unconfirmed, warn := session.TakeUnconfirmedWarning(now)
	if repeated {
		h.repeated.Inc()
		level := slog.LevelInfo
		if unconfirmed > 1 {
			level = slog.LevelDebug // the warning below reports scrapes that stay unconfirmed, but not at each scrape
		}
		log(level, "the consumer's previous scrape is not confirmed, so its samples are served again")
	}
	if warn {
		log(slog.LevelWarn, "the consumer's scrapes are never confirmed, so the same samples are served again and again; look for a proxy that closes, pools or buffers connections, a scrape_interval of five minutes or more, or a scraper other than Prometheus", "scrapes", unconfirmed)
	}
	return session, nil
}

// isProxied reports whether the headers of a request show that it came through a proxy. Such a
// request does not prove that the consumer received the previous answer, because a proxy can read
// an answer to its end without passing it on.
func isProxied(h http.Header) bool {
	for _, name := range []string{"Via", "Forwarded", "X-Forwarded-For"} {
		if _, ok := h[name]; ok {
			return true
		}
	}
	return false
}

// siteStatus adds series of single sites to a FamilyGrouper. Its labels are reused for all sites.
type siteStatus struct {
	g       *FamilyGrouper
	match   func(name []byte, labels []Label) bool
	site    [4]Label // sorted labels of the series of a site
	backlog [6]Label // sorted labels of the series of a site and a consumer
}

// statusName is the name of series that siteStatus adds.
type statusName struct {
	text   []byte
	handle unique.Handle[string]
}

func newStatusName(name string) statusName { return statusName{[]byte(name), unique.Make(name)} }

func newSiteStatus(g *FamilyGrouper, server string, match func(name []byte, labels []Label) bool) *siteStatus {
	label := func(name, value string) Label { return Label{[]byte(name), []byte(value)} }
	id, instance, job, by := label(ClusterLabel, ""), label("instance", ""), label("job", ""), label("server", server)
	return &siteStatus{g, match, [4]Label{id, instance, job, by}, [6]Label{id, label("address", ""), label("consumer", ""), instance, job, by}}
}

// setSite sets the site of the series that are added next.
func (s *siteStatus) setSite(id string) {
	value := append(s.site[0].Value[:0], id...)
	s.site[0].Value, s.backlog[0].Value = value, value
}

// add adds a series of the site, if match selects it. The line is short and its labels are valid:
// the server's name and the cluster ID are checked.
func (s *siteStatus) add(name statusName, v float64) {
	if s.match(name.text, s.site[:]) {
		s.g.AddSeries(name.handle, s.site[:], v)
	}
}

// addBacklog adds a series of the site and a consumer, whose name is checked, as add does.
func (s *siteStatus) addBacklog(name statusName, b ConsumerSiteBacklog) {
	address, consumer := &s.backlog[1], &s.backlog[2]
	address.Value, consumer.Value = append(address.Value[:0], b.Address...), append(consumer.Value[:0], b.Name...)
	if s.match(name.text, s.backlog[:]) {
		s.g.AddSeries(name.handle, s.backlog[:], float64(b.UnreadSamples))
	}
}

// addSiteStatus adds to g the series that this server itself makes for each site that is not
// revoked, so that alerts can find a silent site. It adds only series that match selects. Their
// label "server" is this server's name. If the store knows no push of a site that has a valid token,
// the owner of the site shows the push time 0.
func (h *federateHandler) addSiteStatus(g *FamilyGrouper, match func(name []byte, labels []Label) bool) {
	status := newSiteStatus(g, h.cfg.Name, match)
	pushTime, failureTime := newStatusName(PushTimeName), newStatusName(PushFailureTimeName)
	series, samples := newStatusName(ClusterNamePrefix+"series"), newStatusName(ClusterNamePrefix+"samples")
	backlog, expiry := newStatusName(ClusterNamePrefix+"backlog_samples"), newStatusName(ClusterNamePrefix+"token_expiry_seconds")
	offset := newStatusName(ClusterNamePrefix + "clock_offset_seconds")

	pushed := h.cfg.Store.Stats().Sites
	later := pushed // sites with IDs that are not lower than the present ID; both lists are sorted
	for id := range h.cfg.Issued() {
		for len(later) > 0 && later[0].ID < id {
			later = later[1:]
		}
		if known := len(later) > 0 && later[0].ID == id; !known && h.cfg.Owned(SiteKey(id)) && !h.cfg.Revoked(id) {
			status.setSite(id)
			status.add(pushTime, 0)
		}
	}
	for _, site := range pushed {
		if h.cfg.Revoked(site.ID) { // a revoked site is silent on purpose, so alerts must not see its series
			continue
		}
		status.setSite(site.ID)
		status.add(pushTime, float64(site.LastPush)/1000)
		status.add(series, float64(site.Series))
		status.add(samples, float64(site.Samples))
		for _, b := range site.Backlogs {
			status.addBacklog(backlog, b)
		}
	}
	now := h.cfg.Now()
	h.cfg.Sites.ForEach(func(id string, a siteHealth) {
		if h.cfg.Revoked(id) {
			return
		}
		status.setSite(id)
		if !a.LastFailure.IsZero() {
			status.add(failureTime, float64(a.LastFailure.UnixMilli())/1000)
		}
		if a.TokenExpiry > 0 {
			status.add(expiry, float64(a.TokenExpiry))
		}
		if now.Sub(a.ClockOffsetAt) <= h.cfg.MaxSampleAge { // an older offset may be wrong, because the site may push to another server by now
			status.add(offset, a.ClockOffset.Seconds())
		}
	})
	g.EndSeries()
}
