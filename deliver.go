package main

// Delivery: what the spool holds goes to the first server that takes it, oldest
// first, several scrapes to a push. Invariants: a scrape leaves the spool only
// when a server answered 200 for all of it or refused it as invalid; a token goes
// to no other address than the ones it was given for; a push states its age anew
// at each attempt. This file must not know of sources, flags, files or TLS.

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	maxAnswer  = 64 << 10
	minBackoff = time.Second
	maxBackoff = time.Minute

	maxTogether = 1 << 20 // scrapes in a push: no bound beside those in bytes
	maxAlone    = 8       // lines of a scrape that are refused alone before no more is split
)

// Reasons for which samples of a push are dropped.
const (
	DropRefused  = "refused"   // no server will have them
	DropByServer = "by_server" // the server took the push without them
)

// CourierConfig configures a Courier.
type CourierConfig struct {
	To          []string      // servers, in the order in which they are tried
	ToClient    *http.Client  // with a timeout; follows no redirects
	Cluster     string        // the cluster ID
	Token       func() string // the client token
	LimitBytes  int64         // of a push's body; decompressed, DecodedFactor times
	MaxWait     time.Duration // that a server may ask for between attempts
	Spool       *Spool
	Moment      func() Moment
	Now         func() time.Time
	Metrics     *Metrics
	Dropped     *Counter // of samples by reason
	SpoolErrors *Counter // of failures to read the spool, beside those it tells of itself
	Log         *slog.Logger
}

// Courier delivers what a spool holds. Drain is for one goroutine at a time;
// the other methods may be called concurrently.
type Courier struct {
	cfg  CourierConfig
	sent atomic.Pointer[[]Scrape] // the pieces of the last scrape delivered; immutable
	ok   atomic.Bool              // the last push was delivered

	// The upload token in use, what it was got with, and when to get a new one.
	uploadToken, uploadFor string
	refresh                time.Time

	// Which of To is tried first, and until when before the first of all is again: a
	// backlog must not wait for one that hangs at each push.
	first      int
	firstUntil time.Time

	// Scrapes in one push at most, and how many scrapes to go so before it doubles:
	// after a push of many was refused, or took too long for a slow line.
	most, careful int

	pushes, pushed      *Counter
	pushSeconds         *Histogram
	lastPush, bodyBytes *Gauge
}

// NewCourier returns a Courier.
func NewCourier(cfg CourierConfig) *Courier {
	m := cfg.Metrics
	d := &Courier{
		cfg: cfg, most: maxTogether,
		pushes:      m.Counter("telemeter_destination_pushes_total", "Attempts to push by result.", "result"),
		pushSeconds: m.Histogram("telemeter_destination_push_duration_seconds", "Time of an attempt to push.", []float64{.01, .05, .1, .5, 1, 5, 10, 30, 60}),
		lastPush:    m.Gauge("telemeter_destination_last_success_timestamp_seconds", "When a push was last accepted; 0 if never."),
		bodyBytes:   m.Gauge("telemeter_destination_push_bytes", "Compressed size of the last push accepted."),
		pushed:      m.Counter("telemeter_samples_pushed_total", "Samples in pushes that were accepted."),
	}
	d.pushes.Add(0, "ok")
	d.pushes.Add(0, "failed")
	return d
}

// OK tells whether the last push was delivered.
func (d *Courier) OK() bool { return d.ok.Load() }

// Sent returns the pieces of the scrape that was delivered last, not to be
// changed.
func (d *Courier) Sent() []Scrape {
	if p := d.sent.Load(); p != nil {
		return *p
	}
	return nil
}

// tally is what a Drain has done since it last logged it.
type tally struct {
	begin                    time.Time
	samples, scrapes, pushes int
}

func (d *Courier) report(t *tally) {
	if t.pushes > 0 {
		d.cfg.Log.Info("pushed", "samples", t.samples, "scrapes", t.scrapes, "pushes", t.pushes,
			"took", d.cfg.Now().Sub(t.begin).Round(time.Millisecond))
	}
	*t = tally{begin: d.cfg.Now()}
}

// Drain delivers until the spool is empty. While no server takes anything it
// tries all again, after a pause that doubles, is spread by jitter, and is at
// least what the servers asked for. The same goes for a spool that cannot be read. It
// ends early with ctx, or when its deadline comes before the next attempt; the error is
// then the last one. A scrape that a server refuses as invalid is set aside; that is the
// error if nothing worse happens.
func (d *Courier) Drain(ctx context.Context) error {
	t := tally{begin: d.cfg.Now()}
	p := patience{backoff: minBackoff}
	d.first = 0
	var refusal error
	for {
		batch, unread := d.cfg.Spool.Next(PushLimits{Bytes: d.cfg.LimitBytes, Text: DecodedFactor * d.cfg.LimitBytes, Scrapes: d.most})
		if unread != nil {
			d.cfg.SpoolErrors.Inc()
			if end := d.again(ctx, &pushError{err: unread}, &p, &t); end != nil {
				return end
			}
			continue
		}
		if len(batch) == 0 {
			d.report(&t)
			return refusal
		}
		refused := 0 // samples
		err := d.push(ctx, batch, &t)
		why := err
		var end error
		switch {
		case err == nil || !err.final:
		case len(batch) > 1:
			d.tread(len(batch), err.large)
			continue
		case err.large:
			s := splitting{patience: &p, tally: &t, why: err}
			end = d.split(ctx, batch[0], &s)
			refused, why, err = s.refused, s.why, nil
		default:
			refused, err = max(1, batch[0].Samples), nil // an empty one is refused as well
		}
		if err != nil {
			d.cfg.Spool.Release()
			if ctx.Err() == nil && timedOut(err) && len(batch) > 1 {
				d.tread(len(batch), true)
			}
			if end = d.again(ctx, err, &p, &t); end == nil {
				continue
			}
		}
		if end != nil {
			d.cfg.Spool.Release()
			return end
		}
		p.backoff = minBackoff
		d.ok.Store(refused == 0)
		if refused > 0 {
			d.cfg.Spool.SetAside()
			d.cfg.Dropped.Add(float64(refused), DropRefused)
			d.cfg.Log.Error("destination refused a scrape; it is set aside", "samples", refused, "err", why)
			refusal = why
		} else {
			d.cfg.Spool.Remove()
			d.delivered(batch)
			t.scrapes += len(batch)
		}
		if d.careful -= len(batch); d.careful <= 0 {
			d.careful, d.most = 0, min(2*d.most, maxTogether)
		}
	}
}

// tread makes the next pushes smaller, after one of n scrapes: half as large
// if it was too large, else of one scrape each, to find the one that is wrong.
func (d *Courier) tread(n int, large bool) {
	d.most, d.careful = 1, n
	if large {
		d.most = n / 2
	}
}

func timedOut(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// patience is how long the next pause between attempts is, and why the last failed.
type patience struct {
	backoff time.Duration
	last    error
}

// again pauses after an attempt that failed but may be repeated, and returns nil
// when it is time for the next; else what to end with.
func (d *Courier) again(ctx context.Context, err *pushError, p *patience, t *tally) error {
	d.ok.Store(false)
	if ctx.Err() != nil && p.last != nil {
		return p.last // says more than that the time is up
	}
	p.last = err
	d.report(t)
	pause := max(min(err.retry, d.cfg.MaxWait), p.backoff/2+rand.N(p.backoff/2))
	p.backoff = min(2*p.backoff, maxBackoff)
	if !d.pause(ctx, pause, err) {
		return err
	}
	return nil
}

// pause waits, and tells whether there is time for another attempt.
func (d *Courier) pause(ctx context.Context, pause time.Duration, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	held, who := d.cfg.Spool.Stats().Scrapes, "destination"
	if errors.Is(err, ErrSpoolRead) {
		who = "spool"
	}
	if deadline, ok := ctx.Deadline(); ok && d.cfg.Now().Add(pause).After(deadline) {
		d.cfg.Log.Error(who+" failed; scrapes are kept", "scrapes", held, "err", err)
		return false
	}
	d.cfg.Log.Warn(who+" failed; scrapes are kept, trying again", "scrapes", held, "in", pause.Round(time.Millisecond), "err", err)
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// delivered keeps the pieces of the newest scrape for Sent.
func (d *Courier) delivered(batch []Scrape) {
	sent := d.Sent()
	for _, sc := range batch {
		if len(sent) > 0 && sent[0].At != sc.At {
			sent = nil
		}
		sent = append(sent[:len(sent):len(sent)], sc)
	}
	d.sent.Store(&sent)
}

// splitting is a scrape that is pushed in pieces.
type splitting struct {
	patience *patience
	tally    *tally
	refused  int // samples that no server will have, and why
	why      *pushError
	alone    int // lines that were refused though nothing was with them
}

// split pushes the halves of a scrape that is too large for the servers, which
// may be stricter than LimitBytes, and so on down to single lines. A piece that
// fails is tried again by itself: with the whole scrape anew, one of more pieces
// than the servers' pace allows would never end. When many lines were refused
// alone it is the number of series that is too large, and no piece is small
// enough: then pieces are no longer split. The error is why it had to end.
func (d *Courier) split(ctx context.Context, sc Scrape, s *splitting) error {
	halves, err := halve(sc)
	if err == nil && len(halves) == 0 {
		s.alone++
		err = fmt.Errorf("one series alone is too large: %w", s.why)
	}
	if err != nil {
		s.refused, s.why = s.refused+max(1, sc.Samples), &pushError{err: err}
		return nil
	}
	for _, half := range halves {
		e := d.push(ctx, []Scrape{half}, s.tally)
		for e != nil && !e.final {
			if err := d.again(ctx, e, s.patience, s.tally); err != nil {
				return err
			}
			e = d.push(ctx, []Scrape{half}, s.tally)
		}
		s.patience.backoff = minBackoff
		switch {
		case e == nil:
		case e.large && s.alone < maxAlone:
			s.why = e
			if err := d.split(ctx, half, s); err != nil {
				return err
			}
		default:
			s.refused, s.why = s.refused+half.Samples, e
		}
	}
	return nil
}

// halve cuts a scrape in two between lines; into none if it has only one.
func halve(sc Scrape) ([]Scrape, error) {
	z, err := gzip.NewReader(bytes.NewReader(sc.Gzip))
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(z)
	if err != nil {
		return nil, err
	}
	if sc.Samples < 2 {
		return nil, nil
	}
	at := 0
	for range sc.Samples / 2 {
		at += bytes.IndexByte(text[at:], '\n') + 1
	}
	first, second := sc, sc
	first.Samples, first.Size, first.Gzip = sc.Samples/2, at, Gzip(text[:at])
	second.Samples, second.Size, second.Gzip = sc.Samples-sc.Samples/2, len(text)-at, Gzip(text[at:])
	return []Scrape{first, second}, nil
}

// Gzip returns text compressed.
func Gzip(text []byte) []byte {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write(text) // to memory: does not fail
	w.Close()
	return z.Bytes()
}

// pushError is why an attempt failed.
type pushError struct {
	err   error
	final bool          // another attempt would fail as well
	large bool          // but smaller ones may not
	retry time.Duration // asked for by the server
}

func (e *pushError) Error() string { return e.err.Error() }
func (e *pushError) Unwrap() error { return e.err }

// push offers scrapes to one server after the other until one takes them, or
// refuses them for good.
func (d *Courier) push(ctx context.Context, batch []Scrape, t *tally) *pushError {
	size, samples := 0, 0
	for _, sc := range batch {
		size, samples = size+len(sc.Gzip), samples+sc.Samples
	}
	// Several gzips in a row are one.
	body := make([]byte, 0, size)
	for _, sc := range batch {
		body = append(body, sc.Gzip...)
	}
	newest := batch[len(batch)-1]
	var last *pushError
	retry := time.Duration(0)
	if !d.cfg.Now().Before(d.firstUntil) {
		d.first = 0
	}
	n := len(d.cfg.To)
	for i := range n {
		at := (d.first + i) % n
		to, begin := d.cfg.To[at], d.cfg.Now()
		err := d.attempt(ctx, to, newest, body)
		d.pushSeconds.Observe(d.cfg.Now().Sub(begin).Seconds())
		if last = nil; err != nil && !errors.As(err, &last) {
			last = &pushError{err: err}
		}
		if (last == nil || last.final) && at != d.first {
			d.first, d.firstUntil = at, d.cfg.Now().Add(d.cfg.MaxWait)
		}
		if last == nil {
			d.pushes.Inc("ok")
			d.pushed.Add(float64(samples))
			d.lastPush.Set(float64(d.cfg.Now().UnixMilli()) / 1000)
			d.bodyBytes.Set(float64(size))
			t.samples, t.pushes = t.samples+samples, t.pushes+1
			return nil
		}
		d.pushes.Inc("failed")
		if last.final || ctx.Err() != nil {
			return last
		}
		retry = max(retry, last.retry)
		if i+1 < n {
			d.cfg.Log.Warn("destination failed; trying the next", "to", to, "err", err)
		}
	}
	last.retry = retry
	return last
}

// attempt pushes to one server. An upload token that is refused is replaced
// once: keys rotate, and clocks differ.
func (d *Courier) attempt(ctx context.Context, to string, newest Scrape, body []byte) error {
	token := d.cfg.Token()
	fresh := false
	for {
		if d.uploadToken == "" || d.uploadFor != token || !d.cfg.Now().Before(d.refresh) {
			if err := d.authorize(ctx, to, token); err != nil {
				return err
			}
			fresh = true
		}
		resp, err := d.post(ctx, to, "/upload", d.uploadToken, body, http.Header{
			"Content-Type":     {"text/plain; version=1.0.0; charset=utf-8"},
			"Content-Encoding": {"gzip"},
			SourceClockHeader:  {strconv.FormatInt(newest.Source, 10)},
			BootClockHeader:    {strconv.FormatInt(newest.At.Boot, 10)},
			BootIDHeader:       {newest.At.BootID},
			ScrapeAgeHeader:    {strconv.FormatInt(d.cfg.Moment().Since(newest.At).Milliseconds(), 10)},
		})
		if err != nil {
			return fmt.Errorf("pushing: %w", err)
		}
		err = judge(resp, to+"/upload", d.cfg.Now())
		if resp.StatusCode == http.StatusOK {
			var got struct {
				Accepted *int // always there: anything else that answers 200 has stored nothing
				Dropped  map[string]int
				Hint     string
			}
			if e := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&got); e != nil {
				err = fmt.Errorf("pushing to %s: its answer is not JSON: %w", to, e)
			} else if got.Accepted == nil {
				err = fmt.Errorf("pushing to %s: its answer does not say what it accepted", to)
			}
			for reason, n := range got.Dropped {
				args := []any{"reason", reason, "samples", n}
				if got.Hint != "" {
					args = append(args, "hint", got.Hint)
				}
				d.cfg.Dropped.Add(float64(max(0, n)), DropByServer)
				d.cfg.Log.Warn("the server dropped samples", args...)
			}
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusUnauthorized && !fresh {
			d.uploadToken = ""
			continue
		}
		return err
	}
}

// authorize exchanges the client token for an upload token.
func (d *Courier) authorize(ctx context.Context, to, token string) error {
	resp, err := d.post(ctx, to, "/authorize?id="+url.QueryEscape(d.cfg.Cluster), token, nil, http.Header{})
	if err != nil {
		return fmt.Errorf("authorizing: %w", err)
	}
	defer resp.Body.Close()
	if err := judge(resp, to+"/authorize", d.cfg.Now()); err != nil {
		if e := (*pushError)(nil); errors.As(err, &e) {
			e.final, e.large = false, false // it says nothing of the scrapes
		}
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
	d.uploadToken, d.uploadFor = got.Token, token
	// Well before it expires; the time is measured here, no clock is compared.
	d.refresh = d.cfg.Now().Add(time.Duration(got.ExpiresInSeconds) * time.Second * 4 / 5)
	return nil
}

func (d *Courier) post(ctx context.Context, to, path, token string, b []byte, header http.Header) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to+path, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	req.Header = header
	req.Header.Set("Authorization", "Bearer "+token)
	return d.cfg.ToClient.Do(req)
}

// judge makes an error of a response that is not a 200. Refusals of what was sent
// are final; those of who sent it, or of its form, are not, since tokens, keys and
// servers are replaced.
func judge(resp *http.Response, what string, now time.Time) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	e := &pushError{err: fmt.Errorf("%s answered %s", what, Answer(resp))}
	switch resp.StatusCode {
	case http.StatusRequestEntityTooLarge:
		e.final, e.large = true, true
	case http.StatusBadRequest:
		e.final = true
	}
	e.retry = min(max(0, retryAfter(resp.Header, now)), time.Hour)
	return e
}

// retryAfter returns for how long a response asks to wait: in seconds, or, as
// proxies do, until a date, which is of the sender's clock as its own date is.
func retryAfter(h http.Header, now time.Time) time.Duration {
	text := h.Get("Retry-After")
	if s, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(s) * time.Second
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0
	}
	if sent, err := http.ParseTime(h.Get("Date")); err == nil {
		now = sent
	}
	return at.Sub(now)
}

// Answer says what a failed response said, for a log line.
func Answer(resp *http.Response) string {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 500))
	if text := strings.TrimSpace(string(b)); text != "" {
		return resp.Status + ": " + strconv.QuoteToGraphic(text)
	}
	if to := resp.Header.Get("Location"); to != "" {
		return resp.Status + " to " + to + "; redirects are not followed"
	}
	return resp.Status
}
