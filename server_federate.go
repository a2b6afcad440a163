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

// onlyFirst are the scrapers that get one sample of each series in a scrape. Prometheus
// 2.52.0 to 2.53.2, and 2.54.0, keep only the first of several. VictoriaMetrics and
// vmagent mark a series stale when one scrape has two samples of it and the next has one.
var onlyFirst = regexp.MustCompile(`^(Prometheus/2\.(52\.\d+|53\.[0-2]|54\.0)|vm_promscrape)\b`)

// FederateHandlerConfig configures a Federate.
type FederateHandlerConfig struct {
	Store        *Store
	Senders      *Senders
	Owned        func(hash uint64) bool // see Scraper
	Revoked      func(id string) bool   // whether a cluster ID was revoked: it is silent on purpose
	Name         string                 // of this server
	Metrics      *Metrics
	Log          *slog.Logger
	Now          func() time.Time
	MaxSampleAge time.Duration // how long the newest sample of a series, or a site's clock offset, is shown
	LimitScrape  int           // samples in one scrape
}

// FederateHandler answers scrapes. It is safe for concurrent use.
type FederateHandler struct {
	cfg     FederateHandlerConfig
	scraper *Scraper

	seconds, bytes              *Histogram
	samples                     *Gauge
	truncated, hidden, repeated *Counter
	cut                         *Counter
}

// NewFederateHandler returns a handler for /federate.
func NewFederateHandler(cfg FederateHandlerConfig) *FederateHandler {
	m := cfg.Metrics
	unconfirmed := m.Gauge("telemeter_consumer_unconfirmed_scrapes", "Scrapes in a row that served a consumer samples that it had not had, and that its next scrape did not confirm.", "consumer", "address")
	m.OnCollect(func() {
		unconfirmed.Replace(func(set func(v float64, labelValues ...string)) {
			cfg.Store.Consumers.ForEachUnconfirmed(func(name, address string, scrapes int) { set(float64(scrapes), name, address) })
		})
	})
	return &FederateHandler{
		cfg: cfg, scraper: &Scraper{Store: cfg.Store, MaxAge: cfg.MaxSampleAge, Now: cfg.Now, Owned: cfg.Owned},
		seconds:   m.Histogram("telemeter_scrape_duration_seconds", "Time to answer /federate.", []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30}),
		bytes:     m.Histogram("telemeter_scrape_size_bytes", "Size of answers to /federate before compression.", []float64{1e3, 1e4, 1e5, 1e6, 1e7, 1e8}),
		samples:   m.Gauge("telemeter_scrape_samples", "Samples in the last answer to /federate."),
		truncated: m.Counter("telemeter_scrapes_truncated_total", "Answers to /federate that left unread samples, or sites, for the next scrape."),
		hidden:    m.Counter("telemeter_scrape_samples_hidden_total", "Samples left out of answers because escaping made their series equal to another."),
		cut:       m.Counter("telemeter_scrapes_cut_total", "Answers to /federate that ended early, because their connection did."),
		repeated:  m.Counter("telemeter_scrapes_repeated_total", "Scrapes of a consumer on a new connection, when what it was served last is not known to have arrived and is served again."),
	}
}

func (h *FederateHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
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
	var fams []Family
	var reading *ScrapeSession
	// Who asks by HEAD would confirm what it never saw.
	if q.Has("consumer") && r.Method == http.MethodGet {
		if reading, err = h.consumer(r, q); err != nil {
			status := http.StatusBadRequest
			if errors.Is(err, ErrConsumers) {
				w.Header().Set("Retry-After", "60")
				status = http.StatusServiceUnavailable
			}
			http.Error(w, "consumer: "+err.Error(), status)
			return
		}
		limit := reading.Limit(h.cfg.LimitScrape)
		var unread int
		var more bool
		fams, unread, more = h.scraper.Unread(reading, limit, onlyFirst.MatchString(r.UserAgent()), match.LineMatcher())
		if more {
			h.truncated.Inc()
			h.cfg.Log.Debug("scrape met a limit; the rest follows", "consumer", q.Get("consumer"), "samples", unread, "limit", limit)
		}
	} else {
		var truncated bool
		if fams, truncated = h.scraper.Newest(h.cfg.LimitScrape, match.LineMatcher()); truncated {
			h.truncated.Inc()
			h.cfg.Log.Warn("scrape met the limit on samples; the next begins elsewhere", "limit", h.cfg.LimitScrape)
		}
	}
	fams = append(fams, h.clusterFamilies(match)...)
	slices.SortFunc(fams, func(a, b Family) int { return strings.Compare(a.Name, b.Name) })
	escaping := NegotiateEscaping(r.Header.Get("Accept"))
	w.Header().Set("Content-Type", escaping.ContentType())
	out, finish := CompressResponse(w, r)
	count := &CountWriter{W: out}
	written, hidden, err := WriteFamilies(count, escaping, fams)
	err = errors.Join(err, finish())
	took := time.Since(begin)
	if reading != nil {
		reading.Finish(took, scrapeTime(r.Header)/2, err)
	}
	h.seconds.Observe(took.Seconds())
	h.bytes.Observe(float64(count.N))
	h.samples.Set(float64(written))
	h.hidden.Add(float64(hidden))
	if err != nil {
		h.cut.Inc()
		h.cfg.Log.Info("scrape ended early", "remote", r.RemoteAddr, "err", err)
	}
}

// consumer begins the scrape of a consumer, by its name, address and selectors.
func (h *FederateHandler) consumer(r *http.Request, q url.Values) (*ScrapeSession, error) {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		host = r.RemoteAddr
	}
	name := q.Get("consumer")
	if err := CheckConsumerName(name); err != nil {
		return nil, err
	}
	conn, through := TrackerOf(r), proxied(r.Header)
	if through {
		conn = &ConnTracker{} // nothing else comes on it, so that nothing is confirmed
	}
	selectors := slices.Sorted(slices.Values(q["match[]"]))
	now, log := h.cfg.Now(), h.cfg.Log.With("consumer", name, "remote", r.RemoteAddr)
	reading, repeated, err := h.cfg.Store.Consumers.BeginScrape(ConsumerKey(name, host, strings.Join(selectors, "\x00")), name, host, conn, now)
	if err != nil {
		return nil, err
	}
	// Before it is served anything: a crash must not forget who has to read.
	h.cfg.Store.SaveConsumers()
	if through && reading.MarkProxied() {
		log.Warn("consumer asks through a proxy, whose scrapes confirm nothing, so that it is served the same samples again; it has to scrape this server directly")
	}
	n, warn := reading.UnconfirmedScrapes(now)
	if repeated {
		h.repeated.Inc()
		level := slog.LevelInfo
		if n > 1 {
			level = slog.LevelDebug // the warning tells of them
		}
		log.Log(r.Context(), level, "the consumer's last scrape is not known to have arrived, and is served again")
	}
	if warn {
		log.Warn("nothing confirms the consumer's scrapes, so that it is served the same samples again and again; look for a proxy that closes, pools or buffers connections, for a scrape_interval of five minutes or more, and for a scraper that is no Prometheus", "scrapes", n)
	}
	return reading, nil
}

// proxied reports whether a request says that it came through a proxy. A proxy that has
// read an answer to its end may not have passed it on.
func proxied(h http.Header) bool {
	for _, name := range []string{"Via", "Forwarded", "X-Forwarded-For"} {
		if _, ok := h[name]; ok {
			return true
		}
	}
	return false
}

// scrapeTime is how long a scraper says that it waits; 0 if it does not.
func scrapeTime(h http.Header) time.Duration {
	s, err := strconv.ParseFloat(h.Get("X-Prometheus-Scrape-Timeout-Seconds"), 64)
	if err != nil || !(s > 0 && s <= 3600) { // NaN is neither
		return 0
	}
	return time.Duration(s * float64(time.Second))
}

// clusterFamilies is what this server itself saw of each site, so that a silent one can be
// alerted on. Each server shows its own view, with its name.
func (h *FederateHandler) clusterFamilies(match Selectors) []Family {
	var p SampleList
	add := func(name, id string, v float64, more ...Label) {
		if h.cfg.Revoked(id) { // it is silent on purpose
			return
		}
		r := RawSample{Name: []byte(name), T: NoTime, V: v, Labels: append(more, Label{[]byte("server"), []byte(h.cfg.Name)},
			Label{[]byte(ClusterLabel), []byte(id)}, Label{Name: []byte("instance")}, Label{Name: []byte("job")})}
		if match.Match(r.Name, r.Labels) {
			p.Add(&r) // these names and an ID that was authenticated are always valid
		}
	}
	for _, c := range h.cfg.Store.Stats().Sites {
		add(PushTimeName, c.ID, float64(c.Accepted)/1000)
		add(ClusterNamePrefix+"series", c.ID, float64(c.Series))
		add(ClusterNamePrefix+"samples", c.ID, float64(c.Samples))
		for _, b := range c.Backlog {
			add(ClusterNamePrefix+"backlog_samples", c.ID, float64(b.Samples),
				Label{[]byte("consumer"), []byte(b.Name)}, Label{[]byte("address"), []byte(b.Address)})
		}
	}
	h.cfg.Senders.ForEach(func(id string, s SenderStats) {
		if !s.Failed.IsZero() {
			add(PushFailureTimeName, id, float64(s.Failed.UnixMilli())/1000)
		}
		if s.Expires > 0 {
			add(ClusterNamePrefix+"token_expiry_seconds", id, float64(s.Expires))
		}
		if h.cfg.Now().Sub(s.OffsetAt) <= h.cfg.MaxSampleAge { // the site may push to another server by now
			add(ClusterNamePrefix+"clock_offset_seconds", id, s.Offset.Seconds())
		}
	})
	return GroupByName(&p)
}
