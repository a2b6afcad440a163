package main

// This file answers GET /federate of a server: scrapes with and without a consumer's name, and the
// server's own series about each site. A scrape never fails because of the samples of one site. A
// consumer gets unread samples again until a later scrape on the same connection shows that it
// received them. This file must not know of pushes or of how samples are stored.

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// keepsOnlyFirst matches the User-Agent of scrapers that must not get several samples of one series
// in one scrape. Prometheus 2.52.0 to 2.53.2 and 2.54.0 keep only the first of several samples of a
// series. VictoriaMetrics and vmagent mark a series as stale if one scrape has two samples of the
// series and the next scrape has one.
var keepsOnlyFirst = regexp.MustCompile(`^(Prometheus/2\.(52\.\d+|53\.[0-2]|54\.0)|vm_promscrape)\b`)

type federateConfig struct {
	Store        *Store
	Sites        *SitePushLimiter
	Owned        func(hash uint64) bool // reports whether this server shows the newest samples of the site with this key again, even to consumers that have read them; see AllSitesReader.Owned
	Revoked      func(id string) bool
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
	limitedLog *limitedLog // for messages that each scrape can cause

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
			cfg.Store.Consumers.ForEachUnconfirmedCount(func(name, address string, scrapes int) { set(float64(scrapes), name, address) })
		})
	})
	return &federateHandler{
		cfg: cfg, scraper: &AllSitesReader{Store: cfg.Store, MaxSampleAge: cfg.MaxSampleAge, Now: cfg.Now, Owned: cfg.Owned},
		limitedLog: newLimitedLog(cfg.Log, cfg.Now),
		seconds:    m.Histogram("telemeter_scrape_duration_seconds", "Seconds to answer a request to /federate.", []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30}),
		bytes:      m.Histogram("telemeter_scrape_size_bytes", "Bytes of an answer to /federate before compression.", []float64{1e3, 1e4, 1e5, 1e6, 1e7, 1e8}),
		samples:    m.Gauge("telemeter_scrape_samples", "Samples in the last answer to /federate."),
		truncated:  m.Counter("telemeter_scrapes_truncated_total", "Answers to /federate that met a limit and left samples for later scrapes."),
		hidden:     m.Counter("telemeter_scrape_samples_hidden_total", "Samples left out of answers to /federate because escaping made their series equal to another series."),
		endedEarly: m.Counter("telemeter_scrapes_cut_total", "Answers to /federate that were cut off because their connection failed."),
		repeated:   m.Counter("telemeter_scrapes_repeated_total", "Scrapes that served a consumer the same samples again, because its previous scrape on another connection was not confirmed."),
	}
}

// ServeHTTP answers a scrape. A GET request with a consumer's name gets the samples that the
// consumer has not read, up to a limit. If the limit leaves room, it also gets the newest samples
// of sites that this server owns. Any other request gets only these newest samples. Every answer
// also has the server's own series about each site. All samples and series are those that match[]
// selects.
func (h *federateHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	begin := time.Now()
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		http.Error(w, "the query is malformed", http.StatusBadRequest)
		return
	}
	match, err := ParseSelectors(q["match[]"])
	if err != nil {
		http.Error(w, "match[]: "+err.Error(), http.StatusBadRequest)
		return
	}
	var families []Family
	var session *ConsumerSession // nil for a HEAD request, and for a scrape without a consumer's name
	// A HEAD request must not move a consumer's cursor, because the sender of a HEAD request gets
	// no samples.
	if q.Has("consumer") && r.Method == http.MethodGet {
		if session, err = h.beginScrape(r, q); err != nil {
			refuseConsumer(w, err)
			return
		}
		families = h.takeUnreadAndNewest(session, r, q.Get("consumer"), match)
	} else {
		families = h.newestSamples(match)
	}
	families = append(families, h.siteStatusFamilies(match)...)
	slices.SortFunc(families, func(a, b Family) int { return strings.Compare(a.Name, b.Name) })
	err = h.write(w, r, families)
	took := time.Since(begin)
	h.seconds.Observe(took.Seconds())
	if session != nil {
		session.EndScrapeAndLimitNext(took, scraperTimeout(r.Header)/2, err)
	}
	if err != nil {
		h.endedEarly.Inc()
		h.limitedLog.Log(slog.LevelInfo, "answer to scrape was cut off", "remote", r.RemoteAddr, "err", err)
	}
}

// refuseConsumer answers a scrape with 400 if the consumer's name is invalid. It answers 503 if the
// consumer cannot be added because too many consumers are known.
func refuseConsumer(w http.ResponseWriter, err error) {
	status := http.StatusBadRequest
	if errors.Is(err, ErrConsumers) {
		w.Header().Set("Retry-After", "60")
		status = http.StatusServiceUnavailable
	}
	http.Error(w, "consumer: "+err.Error(), status)
}

// takeUnreadAndNewest returns samples that a consumer has not read, up to the limit on its scrape,
// and marks them as served. If the limit leaves room, it adds the newest samples of sites that this
// server owns.
func (h *federateHandler) takeUnreadAndNewest(session *ConsumerSession, r *http.Request, consumer string, match Selectors) []Family {
	limit := session.SampleLimit(h.cfg.LimitScrape)
	families, unread, more := h.scraper.ServeUnreadAndNewest(session, limit, keepsOnlyFirst.MatchString(r.UserAgent()), match.LineMatcherOrNil())
	if more {
		h.truncated.Inc()
		h.cfg.Log.Debug("scrape met a limit; later scrapes get the other samples", "consumer", consumer, "samples", unread, "limit", limit)
	}
	return families
}

// newestSamples returns the newest sample of each series of the sites that this server owns, unless
// that sample is older than MaxSampleAge. If LimitScrape leaves out sites, the next scrape begins
// with other sites.
func (h *federateHandler) newestSamples(match Selectors) []Family {
	families, truncated := h.scraper.NewestPerSeries(h.cfg.LimitScrape, match.LineMatcherOrNil())
	if truncated {
		h.truncated.Inc()
		h.limitedLog.Log(slog.LevelWarn, "scrape met the limit on samples; the next scrape begins with other sites", "limit", h.cfg.LimitScrape)
	}
	return families
}

// write writes families to the scraper, with the escaping and compression that the scraper asks
// for. An error means that the connection failed.
func (h *federateHandler) write(w http.ResponseWriter, r *http.Request, families []Family) error {
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

// beginScrape begins the scrape of a consumer. A consumer is identified by its name, its IP address
// and its match[] selectors, whose order does not matter. If samples are served again because an
// earlier scrape of the consumer was not confirmed, beginScrape logs a message. The text of the
// error goes to the scraper.
func (h *federateHandler) beginScrape(r *http.Request, q url.Values) (*ConsumerSession, error) {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		host = r.RemoteAddr
	}
	name := q.Get("consumer")
	if err := CheckConsumerName(name); err != nil {
		return nil, err
	}
	conn, viaProxy := TrackerIfPreviousAnswerRead(r), isProxied(r.Header)
	if viaProxy {
		conn = &AnswerReadTracker{} // a new tracker stands for a connection never seen before, so this scrape does not confirm the previous one
	}
	selectors := slices.Sorted(slices.Values(q["match[]"]))
	now, log := h.cfg.Now(), h.cfg.Log.With("consumer", name, "remote", r.RemoteAddr)
	session, repeated, err := h.cfg.Store.Consumers.BeginScrape(ConsumerKey(name, host, strings.Join(selectors, "\x00")), name, host, conn, now)
	if err != nil {
		return nil, err
	}
	// Save the consumer before it is served anything, so that after a crash this server still knows
	// that the consumer has samples to read. If saving fails, the scrape goes on.
	h.cfg.Store.SaveConsumers()
	if viaProxy && session.MarkConsumerProxied() {
		log.Warn("the consumer scrapes through a proxy, which cannot confirm that samples arrived, so the same samples are served again; make the consumer scrape this server directly")
	}
	unconfirmed, warn := session.TakeUnconfirmedWarning(now)
	if repeated {
		h.repeated.Inc()
		level := slog.LevelInfo
		if unconfirmed > 1 {
			level = slog.LevelDebug // the warning below reports scrapes that stay unconfirmed, but not at each scrape
		}
		log.Log(r.Context(), level, "the consumer's previous scrape is not confirmed, so its samples are served again")
	}
	if warn {
		log.Warn("the consumer's scrapes are never confirmed, so the same samples are served again and again; look for a proxy that closes, pools or buffers connections, a scrape_interval of five minutes or more, or a scraper other than Prometheus", "scrapes", unconfirmed)
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

// scraperTimeout returns the timeout that a scraper announces in its headers. It returns 0 if the
// scraper announces no timeout, an invalid timeout, or a timeout of more than an hour.
func scraperTimeout(h http.Header) time.Duration {
	s, err := strconv.ParseFloat(h.Get("X-Prometheus-Scrape-Timeout-Seconds"), 64)
	if err != nil || !(s > 0 && s <= 3600) { // this form of the condition is also true for NaN
		return 0
	}
	return time.Duration(s * float64(time.Second))
}

// siteStatusFamilies returns the series that this server itself makes for each site that is not
// revoked, so that alerts can find a silent site. It returns only series that match selects. Their
// label "server" is this server's name.
func (h *federateHandler) siteStatusFamilies(match Selectors) []Family {
	var p SampleList
	add := func(name, id string, v float64, more ...Label) {
		if h.cfg.Revoked(id) { // a revoked site is silent on purpose, so alerts must not see its series
			return
		}
		r := RawSample{Name: []byte(name), T: NoTime, V: v, Labels: append(more, Label{[]byte("server"), []byte(h.cfg.Name)},
			Label{[]byte(ClusterLabel), []byte(id)}, Label{Name: []byte("instance")}, Label{Name: []byte("job")})}
		if match.MatchOrEmpty(r.Name, r.Labels) {
			p.Add(&r) // cannot fail: names are constants, and the values are checked: server name, cluster ID, and name and address of the consumer
		}
	}
	for _, site := range h.cfg.Store.Stats().Sites {
		add(PushTimeName, site.ID, float64(site.LastPush)/1000)
		add(ClusterNamePrefix+"series", site.ID, float64(site.Series))
		add(ClusterNamePrefix+"samples", site.ID, float64(site.Samples))
		for _, b := range site.Backlogs {
			add(ClusterNamePrefix+"backlog_samples", site.ID, float64(b.UnreadSamples),
				Label{[]byte("consumer"), []byte(b.Name)}, Label{[]byte("address"), []byte(b.Address)})
		}
	}
	h.cfg.Sites.ForEach(func(id string, a siteHealth) {
		if !a.LastFailure.IsZero() {
			add(PushFailureTimeName, id, float64(a.LastFailure.UnixMilli())/1000)
		}
		if a.TokenExpiry > 0 {
			add(ClusterNamePrefix+"token_expiry_seconds", id, float64(a.TokenExpiry))
		}
		if h.cfg.Now().Sub(a.ClockOffsetAt) <= h.cfg.MaxSampleAge { // an older offset may be wrong, because the site may push to another server by now
			add(ClusterNamePrefix+"clock_offset_seconds", id, a.ClockOffset.Seconds())
		}
	})
	return GroupByName(&p)
}
