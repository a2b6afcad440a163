package main

// The server's /federate: scrapes with and without a consumer's name, and the server's own
// view of each site. A scrape never fails because of one site's samples. Samples of which
// nothing proves that they arrived are served again. This file must not know of pushes, or of
// how samples are held.

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

// keepsOnlyFirst matches the scrapers that get one sample of each series in a scrape. Prometheus
// 2.52.0 to 2.53.2, and 2.54.0, keep only the first of several. VictoriaMetrics and
// vmagent mark a series stale when one scrape has two samples of it and the next has one.
var keepsOnlyFirst = regexp.MustCompile(`^(Prometheus/2\.(52\.\d+|53\.[0-2]|54\.0)|vm_promscrape)\b`)

// federateConfig configures a federateHandler.
type federateConfig struct {
	Store        *Store
	Sites        *SitePushLimiter
	Owned        func(hash uint64) bool // see AllSitesReader
	Revoked      func(id string) bool   // whether a cluster ID was revoked
	Name         string                 // of this server
	Metrics      *Metrics
	Log          *slog.Logger
	Now          func() time.Time
	MaxSampleAge time.Duration // how long the newest sample of a series, or a site's clock offset, is shown
	LimitScrape  int           // samples in one scrape
}

// federateHandler answers scrapes. It is safe for concurrent use.
type federateHandler struct {
	cfg     federateConfig
	scraper *AllSitesReader

	seconds, bytes              *Histogram
	samples                     *Gauge
	truncated, hidden, repeated *Counter
	endedEarly                  *Counter
}

// newFederateHandler returns a handler for /federate.
func newFederateHandler(cfg federateConfig) *federateHandler {
	m := cfg.Metrics
	unconfirmed := m.Gauge("telemeter_consumer_unconfirmed_scrapes", "Scrapes in a row that served a consumer samples that it had not had, and that its next scrape did not confirm.", "consumer", "address")
	m.OnCollect(func() {
		unconfirmed.ReplaceSeries(func(set func(v float64, labelValues ...string)) {
			cfg.Store.Consumers.ForEachUnconfirmedCount(func(name, address string, scrapes int) { set(float64(scrapes), name, address) })
		})
	})
	return &federateHandler{
		cfg: cfg, scraper: &AllSitesReader{Store: cfg.Store, MaxSampleAge: cfg.MaxSampleAge, Now: cfg.Now, Owned: cfg.Owned},
		seconds:    m.Histogram("telemeter_scrape_duration_seconds", "Time to answer /federate.", []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30}),
		bytes:      m.Histogram("telemeter_scrape_size_bytes", "Size of answers to /federate before compression.", []float64{1e3, 1e4, 1e5, 1e6, 1e7, 1e8}),
		samples:    m.Gauge("telemeter_scrape_samples", "Samples in the last answer to /federate."),
		truncated:  m.Counter("telemeter_scrapes_truncated_total", "Answers to /federate that left unread samples, or sites, for the next scrape."),
		hidden:     m.Counter("telemeter_scrape_samples_hidden_total", "Samples left out of answers because escaping made their series equal to another."),
		endedEarly: m.Counter("telemeter_scrapes_cut_total", "Answers to /federate that ended early, because their connection did."),
		repeated:   m.Counter("telemeter_scrapes_repeated_total", "Scrapes of a consumer on a new connection, when what it was served last is not known to have arrived and is served again."),
	}
}

// ServeHTTP answers a scrape: a consumer's with its unread samples, any other with the newest of
// each series.
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
	var session *ConsumerSession // nil without a consumer
	// A consumer that asks by HEAD would confirm samples that it never saw.
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
		h.cfg.Log.Info("scrape ended early", "remote", r.RemoteAddr, "err", err)
	}
}

// refuseConsumer answers a consumer whose scrape cannot begin.
func refuseConsumer(w http.ResponseWriter, err error) {
	status := http.StatusBadRequest
	if errors.Is(err, ErrConsumers) {
		w.Header().Set("Retry-After", "60")
		status = http.StatusServiceUnavailable
	}
	http.Error(w, "consumer: "+err.Error(), status)
}

// takeUnreadAndNewest returns the samples that a consumer has not read, as many as its scrape may
// have.
func (h *federateHandler) takeUnreadAndNewest(session *ConsumerSession, r *http.Request, consumer string, match Selectors) []Family {
	limit := session.SampleLimit(h.cfg.LimitScrape)
	families, unread, more := h.scraper.ServeUnreadAndNewest(session, limit, keepsOnlyFirst.MatchString(r.UserAgent()), match.LineMatcherOrNil())
	if more {
		h.truncated.Inc()
		h.cfg.Log.Debug("scrape met a limit; the rest follows", "consumer", consumer, "samples", unread, "limit", limit)
	}
	return families
}

// newestSamples returns the newest sample of each series.
func (h *federateHandler) newestSamples(match Selectors) []Family {
	families, truncated := h.scraper.NewestPerSeries(h.cfg.LimitScrape, match.LineMatcherOrNil())
	if truncated {
		h.truncated.Inc()
		h.cfg.Log.Warn("scrape met the limit on samples; the next begins elsewhere", "limit", h.cfg.LimitScrape)
	}
	return families
}

// write writes families as the scraper wants them. Its error is the connection's.
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

// beginScrape begins the scrape of a consumer, which is its name, address and selectors.
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
		conn = &AnswerReadTracker{} // a connection of its own confirms nothing
	}
	selectors := slices.Sorted(slices.Values(q["match[]"]))
	now, log := h.cfg.Now(), h.cfg.Log.With("consumer", name, "remote", r.RemoteAddr)
	session, repeated, err := h.cfg.Store.Consumers.BeginScrape(ConsumerKey(name, host, strings.Join(selectors, "\x00")), name, host, conn, now)
	if err != nil {
		return nil, err
	}
	// Before the consumer is served anything: a crash must not forget a consumer that has to read.
	h.cfg.Store.SaveConsumers()
	if viaProxy && session.MarkConsumerProxied() {
		log.Warn("consumer asks through a proxy, whose scrapes confirm nothing, so that it is served the same samples again; it has to scrape this server directly")
	}
	unconfirmed, warn := session.TakeUnconfirmedWarning(now)
	if repeated {
		h.repeated.Inc()
		level := slog.LevelInfo
		if unconfirmed > 1 {
			level = slog.LevelDebug // the warning counts them
		}
		log.Log(r.Context(), level, "the consumer's last scrape is not known to have arrived, and is served again")
	}
	if warn {
		log.Warn("nothing confirms the consumer's scrapes, so that it is served the same samples again and again; look for a proxy that closes, pools or buffers connections, for a scrape_interval of five minutes or more, and for a scraper that is no Prometheus", "scrapes", unconfirmed)
	}
	return session, nil
}

// isProxied reports whether a request says that it came through a proxy. A proxy that has
// read an answer to its end may not have passed it on.
func isProxied(h http.Header) bool {
	for _, name := range []string{"Via", "Forwarded", "X-Forwarded-For"} {
		if _, ok := h[name]; ok {
			return true
		}
	}
	return false
}

// scraperTimeout returns how long a scraper says that it waits; 0 if it does not say.
func scraperTimeout(h http.Header) time.Duration {
	s, err := strconv.ParseFloat(h.Get("X-Prometheus-Scrape-Timeout-Seconds"), 64)
	if err != nil || !(s > 0 && s <= 3600) { // NaN is neither
		return 0
	}
	return time.Duration(s * float64(time.Second))
}

// siteStatusFamilies returns the series that this server makes of each site, with the server's
// name, so that alerts can find a silent site.
func (h *federateHandler) siteStatusFamilies(match Selectors) []Family {
	var p SampleList
	add := func(name, id string, v float64, more ...Label) {
		if h.cfg.Revoked(id) { // it is silent on purpose
			return
		}
		r := RawSample{Name: []byte(name), T: NoTime, V: v, Labels: append(more, Label{[]byte("server"), []byte(h.cfg.Name)},
			Label{[]byte(ClusterLabel), []byte(id)}, Label{Name: []byte("instance")}, Label{Name: []byte("job")})}
		if match.MatchOrEmpty(r.Name, r.Labels) {
			p.Add(&r) // these names and an ID that was authenticated are always valid
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
		if h.cfg.Now().Sub(a.ClockOffsetAt) <= h.cfg.MaxSampleAge { // the site may push to another server by now
			add(ClusterNamePrefix+"clock_offset_seconds", id, a.ClockOffset.Seconds())
		}
	})
	return GroupByName(&p)
}
