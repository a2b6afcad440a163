package main

// The client: scrape the source, clean what it gave, push it out, at the site's
// own phase of the interval. Invariants: nothing leaves that Cleaner did not
// pass; a token goes to no other address than the ones it was given for; trouble
// with the source and trouble with the destination are told apart in logs and
// metrics. This file must not know of flags, files or TLS: main wires those.

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	maxScrape    = 256 << 20 // bytes of a scrape, uncompressed
	maxAnswer    = 64 << 10
	firstJitter  = time.Second
	expiryNotice = 30 * 24 * time.Hour
	minBackoff   = time.Second
	maxBackoff   = time.Minute
	scrapeAccept = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.9," +
		"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.8,text/plain;version=0.0.4;q=0.7," +
		"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.1"
)

// ClientConfig configures a Client.
type ClientConfig struct {
	From       *url.URL     // what is scraped, without match[]
	FromClient *http.Client // with a timeout; follows no redirects
	To         []string     // servers, in the order in which they are tried
	ToClient   *http.Client // with a timeout; follows no redirects
	Cluster    string       // the cluster ID
	Interval   time.Duration
	LimitBytes int64 // of a push's body; decompressed, DecodedFactor times
	Metrics    *Metrics
	Log        *slog.Logger
	Now        func() time.Time
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
	cfg   ClientConfig
	state atomic.Pointer[ClientState]
	sent  atomic.Pointer[Push] // the last set that was delivered; immutable
	ready atomic.Bool          // the last push was delivered

	// The upload token in use, what it was got with, and when to get a new one.
	uploadToken, uploadFor string
	refresh                time.Time

	scrapes, pushes, scraped, pushed, dropped, skipped *Counter
	scrapeSeconds, pushSeconds                         *Histogram
	lastScrape, lastPush, bodyBytes, expiry            *Gauge
}

// NewClient returns a Client without state: see Reload.
func NewClient(cfg ClientConfig) *Client {
	m := cfg.Metrics
	seconds := []float64{.01, .05, .1, .5, 1, 5, 10, 30, 60}
	c := &Client{
		cfg:           cfg,
		scrapes:       m.Counter("telemeter_source_scrapes_total", "Scrapes of the source by result.", "result"),
		scrapeSeconds: m.Histogram("telemeter_source_scrape_duration_seconds", "Time to scrape the source.", seconds),
		lastScrape:    m.Gauge("telemeter_source_last_success_timestamp_seconds", "When the source was last scraped; 0 if never."),
		pushes:        m.Counter("telemeter_destination_pushes_total", "Attempts to push by result.", "result"),
		pushSeconds:   m.Histogram("telemeter_destination_push_duration_seconds", "Time of an attempt to push.", seconds),
		lastPush:      m.Gauge("telemeter_destination_last_success_timestamp_seconds", "When a push was last accepted; 0 if never."),
		bodyBytes:     m.Gauge("telemeter_destination_push_bytes", "Compressed size of the last push accepted."),
		scraped:       m.Counter("telemeter_samples_scraped_total", "Samples that the source gave."),
		pushed:        m.Counter("telemeter_samples_pushed_total", "Samples in pushes that were accepted."),
		dropped:       m.Counter("telemeter_samples_dropped_total", "Samples that did not leave the site, by reason.", "reason"),
		skipped:       m.Counter("telemeter_parts_skipped_total", "Parts of samples that are not carried, by kind.", "kind"),
	}
	c.expiry = m.Gauge("telemeter_token_expiry_timestamp_seconds", "When the client token expires; 0 if never, or not known.")
	for _, result := range []string{"ok", "failed"} {
		c.scrapes.Add(0, result)
		c.pushes.Add(0, result)
	}
	for _, reason := range []string{DropNotMatched, DropReserved, DropInvalid, dropUndelivered} {
		c.dropped.Add(0, reason)
	}
	return c
}

const dropUndelivered = "undelivered"

// Reload replaces tokens and rules.
func (c *Client) Reload(st ClientState) {
	c.state.Store(&st)
	c.expiry.Set(float64(st.Expires))
}

// Handler returns the handler of the client's listener.
func (c *Client) Handler() http.Handler {
	mux := http.NewServeMux()
	instrument := NewInstrument(c.cfg.Metrics)
	HealthRoutes(mux, c.ready.Load)
	mux.Handle("GET /metrics", instrument("metrics", c.cfg.Metrics))
	mux.Handle("GET /federate", instrument("federate", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := c.sent.Load()
		if p == nil {
			p = &Push{}
		}
		escaping := NegotiateEscaping(r.Header.Get("Accept"))
		w.Header().Set("Content-Type", escaping.ContentType())
		body, finish := CompressResponse(w, r)
		defer finish()
		if _, _, err := WriteFamilies(body, escaping, GroupByName(p)); err != nil {
			c.cfg.Log.Debug("answer to /federate ended early", "remote", r.RemoteAddr, "err", err)
		}
	})))
	mux.Handle("GET /{$}", instrument("index", Index("/federate", "/metrics", "/healthz", "/healthz/ready")))
	return mux
}

// Run scrapes and pushes until ctx ends: first at once, then whenever the clock
// is at this cluster's phase of the interval, so that the pushes of many sites
// that start together spread. A set that cannot be delivered before the next is
// due is dropped and counted.
func (c *Client) Run(ctx context.Context) error {
	wait := rand.N(firstJitter)
	var warned time.Time
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		now := c.cfg.Now()
		if at := c.state.Load().Expires; at != 0 && now.Add(expiryNotice).Unix() > at && now.Sub(warned) > 24*time.Hour {
			c.cfg.Log.Warn("the token expires soon; this site is silent afterwards", "at", time.Unix(at, 0).UTC())
			warned = now
		}
		next := now.Add(c.untilPhase(now))
		cycle, cancel := context.WithTimeout(ctx, next.Sub(now))
		err := c.Once(cycle)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		c.ready.Store(err == nil)
		wait = max(0, next.Sub(c.cfg.Now()))
	}
}

// untilPhase returns the time until this cluster's phase comes next.
func (c *Client) untilPhase(now time.Time) time.Duration {
	h := fnv.New64a()
	io.WriteString(h, c.cfg.Cluster)
	phase := time.Duration(h.Sum64() % uint64(c.cfg.Interval))
	return c.cfg.Interval - (time.Duration(now.UnixNano())-phase)%c.cfg.Interval
}

// Once scrapes once and delivers what it got, retrying until ctx ends. What
// fails is logged and counted here, and returned.
func (c *Client) Once(ctx context.Context) error {
	p, err := c.Scrape(ctx)
	if err != nil {
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			c.cfg.Log.Error("source failed", "from", c.cfg.From.Redacted(), "err", err)
		}
		return fmt.Errorf("source: %w", err)
	}
	begin := c.cfg.Now()
	bodies, err := c.bodies(p, p.Samples)
	if err == nil {
		for _, body := range bodies {
			if err = c.deliver(ctx, body); err != nil {
				break
			}
		}
	}
	if err != nil {
		c.dropped.Add(float64(len(p.Samples)), dropUndelivered)
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			c.cfg.Log.Error("destination failed; this scrape is lost", "samples", len(p.Samples), "err", err)
		}
		return fmt.Errorf("destination: %w", err)
	}
	c.sent.Store(p)
	c.cfg.Log.Info("pushed", "samples", len(p.Samples), "pushes", len(bodies), "took", c.cfg.Now().Sub(begin).Round(time.Millisecond))
	return nil
}

// Scrape gets what the source has and cleans it. Samples without a time get that
// of the scrape's begin.
func (c *Client) Scrape(ctx context.Context) (*Push, error) {
	begin := c.cfg.Now()
	p, err := c.scrape(ctx, begin)
	c.scrapeSeconds.Observe(c.cfg.Now().Sub(begin).Seconds())
	if err != nil {
		c.scrapes.Inc("failed")
		return nil, err
	}
	c.scrapes.Inc("ok")
	c.lastScrape.Set(float64(begin.UnixMilli()) / 1000)
	return p, nil
}

func (c *Client) scrape(ctx context.Context, begin time.Time) (*Push, error) {
	st := c.state.Load()
	cleaner := st.Cleaner()
	u := *c.cfg.From
	if strings.HasSuffix(u.Path, "/federate") {
		// The source chooses, which saves it the rest.
		q := u.Query()
		for _, m := range st.Match {
			q.Add("match[]", m.String())
		}
		u.RawQuery = q.Encode()
	} else {
		cleaner.Match = st.Match
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("scraping: %w", err)
	}
	req.Header.Set("Accept", scrapeAccept)
	if st.FromToken != "" {
		req.Header.Set("Authorization", "Bearer "+st.FromToken)
	}
	resp, err := c.cfg.FromClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("scraping: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("scraping %s: it answered %s", u.Redacted(), answer(resp))
	}
	format, err := ParseFormat(resp.Header.Get("Content-Type"))
	if err != nil {
		return nil, fmt.Errorf("scraping %s: %w", u.Redacted(), err)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxScrape+1))
	if err != nil {
		return nil, fmt.Errorf("scraping %s: reading the answer: %w", u.Redacted(), err)
	}
	if len(body) > maxScrape {
		return nil, fmt.Errorf("scraping %s: the answer is larger than %d bytes", u.Redacted(), maxScrape)
	}
	p := &Push{}
	var d Decoder
	n := 0
	var invalid error
	skipped, err := d.Decode(body, format, func(r *RawSample) error {
		n++
		drop := cleaner.Apply(r)
		if drop == "" {
			if !r.HasT {
				r.T = begin.UnixMilli()
			}
			if err := p.Add(r); err != nil {
				drop, invalid = DropInvalid, err
			}
		}
		if drop != "" {
			c.dropped.Inc(drop)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("scraping %s: %w", u.Redacted(), err)
	}
	if invalid != nil {
		c.cfg.Log.Warn("invalid samples were dropped", "last", invalid)
	}
	c.scraped.Add(float64(n))
	c.skipped.Add(float64(skipped.Exemplars), "exemplar")
	c.skipped.Add(float64(skipped.Created), "created")
	c.skipped.Add(float64(skipped.NativeHistograms), "native_histogram")
	return p, nil
}

// answer says what a failed response said, for a log line.
func answer(resp *http.Response) string {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 500))
	if text := strings.TrimSpace(string(b)); text != "" {
		return resp.Status + ": " + strconv.QuoteToGraphic(text)
	}
	if to := resp.Header.Get("Location"); to != "" {
		return resp.Status + " to " + to + "; redirects are not followed"
	}
	return resp.Status
}

// Text appends what is pushed of some samples of p, before compression.
func (c *Client) Text(b []byte, p *Push, samples []Sample) []byte {
	for _, s := range samples {
		b = AppendSample(b, p.Line(s), s.T, s.V)
	}
	return b
}

// body is one push.
type body struct {
	gzip    []byte
	samples int
}

// bodies renders samples of p as one push, or as several if the limits need it.
func (c *Client) bodies(p *Push, samples []Sample) ([]body, error) {
	text := c.Text(nil, p, samples)
	if int64(len(text)) <= DecodedFactor*c.cfg.LimitBytes {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		w.Write(text) // to memory: does not fail
		w.Close()
		if int64(z.Len()) <= c.cfg.LimitBytes {
			return []body{{z.Bytes(), len(samples)}}, nil
		}
	}
	if len(samples) == 1 {
		return nil, fmt.Errorf("one series of %d bytes does not fit --limit-bytes", len(text))
	}
	first, err := c.bodies(p, samples[:len(samples)/2])
	if err != nil {
		return nil, err
	}
	second, err := c.bodies(p, samples[len(samples)/2:])
	return append(first, second...), err
}

// pushError is why an attempt failed.
type pushError struct {
	err   error
	final bool          // another attempt would fail as well
	retry time.Duration // asked for by the server
}

func (e *pushError) Error() string { return e.err.Error() }
func (e *pushError) Unwrap() error { return e.err }

// deliver pushes b to the first server that takes it. Until ctx ends it tries
// all again, after a pause that doubles, is spread by jitter, and is at least
// what the servers asked for.
func (c *Client) deliver(ctx context.Context, b body) error {
	backoff := minBackoff
	var last *pushError
	for {
		retry := time.Duration(0)
		for i, to := range c.cfg.To {
			begin := c.cfg.Now()
			err := c.attempt(ctx, to, b)
			c.pushSeconds.Observe(c.cfg.Now().Sub(begin).Seconds())
			if err == nil {
				c.pushes.Inc("ok")
				c.pushed.Add(float64(b.samples))
				c.lastPush.Set(float64(c.cfg.Now().UnixMilli()) / 1000)
				c.bodyBytes.Set(float64(len(b.gzip)))
				return nil
			}
			c.pushes.Inc("failed")
			if ctx.Err() != nil {
				if last != nil { // says more than that the time is up
					return last
				}
				return err
			}
			if last = nil; !errors.As(err, &last) {
				last = &pushError{err: err}
			}
			if last.final {
				return last
			}
			retry = max(retry, last.retry)
			if i+1 < len(c.cfg.To) {
				c.cfg.Log.Warn("destination failed; trying the next", "to", to, "err", err)
			}
		}
		pause := max(retry, backoff/2+rand.N(backoff/2))
		backoff = min(2*backoff, maxBackoff)
		if deadline, ok := ctx.Deadline(); ok && c.cfg.Now().Add(pause).After(deadline) {
			return last
		}
		c.cfg.Log.Warn("destination failed; trying again", "in", pause.Round(time.Millisecond), "err", last)
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return last
		case <-timer.C:
		}
	}
}

// attempt pushes b to one server. An upload token that is refused is replaced
// once: keys rotate, and clocks differ.
func (c *Client) attempt(ctx context.Context, to string, b body) error {
	st := c.state.Load()
	fresh := false
	for {
		if c.uploadToken == "" || c.uploadFor != st.Token || !c.cfg.Now().Before(c.refresh) {
			if err := c.authorize(ctx, to, st.Token); err != nil {
				return err
			}
			fresh = true
		}
		resp, err := c.post(ctx, to, "/upload", c.uploadToken, b.gzip)
		if err != nil {
			return fmt.Errorf("pushing: %w", err)
		}
		err = c.judge(resp, to+"/upload")
		if resp.StatusCode == http.StatusOK {
			var got struct {
				Dropped map[string]int
			}
			if e := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&got); e != nil {
				err = fmt.Errorf("pushing to %s: its answer is not JSON: %w", to, e)
			}
			for reason, n := range got.Dropped {
				c.cfg.Log.Warn("the server dropped samples", "reason", reason, "samples", n)
			}
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusUnauthorized && !fresh {
			c.uploadToken = ""
			continue
		}
		return err
	}
}

// authorize exchanges the client token for an upload token.
func (c *Client) authorize(ctx context.Context, to, token string) error {
	resp, err := c.post(ctx, to, "/authorize?id="+url.QueryEscape(c.cfg.Cluster), token, nil)
	if err != nil {
		return fmt.Errorf("authorizing: %w", err)
	}
	defer resp.Body.Close()
	if err := c.judge(resp, to+"/authorize"); err != nil {
		return err
	}
	var got struct {
		Version          int
		Token            string
		ExpiresInSeconds int64
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&got); err != nil || got.Version != 1 || got.Token == "" {
		return fmt.Errorf("authorizing at %s: its answer is not an upload token", to)
	}
	c.uploadToken, c.uploadFor = got.Token, token
	// Well before it expires; the time is measured here, no clock is compared.
	c.refresh = c.cfg.Now().Add(time.Duration(got.ExpiresInSeconds) * time.Second * 4 / 5)
	return nil
}

func (c *Client) post(ctx context.Context, to, path, token string, b []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to+path, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if b != nil {
		req.Header.Set("Content-Type", "text/plain; version=1.0.0; charset=utf-8")
		req.Header.Set("Content-Encoding", "gzip")
	}
	return c.cfg.ToClient.Do(req)
}

// judge makes an error of a response that is not a 200. Refusals of what was sent
// are final; those of who sent it are not, since tokens and keys are reloaded.
func (c *Client) judge(resp *http.Response, what string) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	e := &pushError{err: fmt.Errorf("%s answered %s", what, answer(resp))}
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType:
		e.final = true
	}
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
		e.retry = min(time.Duration(s)*time.Second, time.Hour)
	}
	return e
}
