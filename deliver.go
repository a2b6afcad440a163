package main

// Delivery: what the spool holds goes to the first server that takes it, several scrapes
// to a push, as the spool's plan says. Invariants: a scrape leaves the spool only when an
// answer says that it is done, or refuses it as invalid; after an attempt without an
// answer the server is asked first; a token goes to no other address than the ones it was
// given for. This file must not know of sources, flags, files or TLS.

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"time"
)

const (
	minBackoff = time.Second
	maxBackoff = time.Minute

	maxTogether = 1 << 20 // scrapes in a push: no bound beside those in bytes
	maxAlone    = 8       // lines of a scrape that are refused alone before no more is split

	unreadPatience = 30 * time.Minute // with a server on which nobody reads, and then with the next
)

// Reasons for which samples of a push are dropped.
const (
	DropRefused  = "refused"   // no server will have them
	DropByServer = "by_server" // the server took the push without them
)

var errNotTaken = errors.New("the server took no sample of a scrape; it stays in the spool")

// CourierConfig configures a Courier.
type CourierConfig struct {
	To          []string      // servers, in the order in which they are tried
	ToClient    *http.Client  // with a timeout; follows no redirects
	Cluster     string        // the cluster ID
	Token       func() string // the client token
	LimitBytes  int64         // of a push's body; decompressed, DecodedFactor times
	MaxWait     time.Duration // that a server may ask for between attempts
	Spool       *Spool
	Clocks      *ServerClocks
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

	// Indexes in To. An attempt begins with first until firstUntil, then with home again,
	// because a backlog must not wait at each push for a server that hangs. A Drain begins
	// with home, which is 0 but for half an hour (homeUntil) after scrapes stayed unread on
	// a server. last is the server that answered last.
	first, home, last     int
	firstUntil, homeUntil time.Time

	// Scrapes in one push at most, and how many scrapes to go so before it doubles:
	// after a push of many was refused, or took too long for a slow line.
	most, careful int

	pushes, pushed              *Counter
	pushSeconds                 *Histogram
	lastPush, bodyBytes, offset *Gauge
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
		offset:      m.Gauge("telemeter_source_clock_offset_seconds", "By how much the source's clock was behind the servers' at the newest scrape pushed; 0 if not known."),
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
		st := d.cfg.Spool.Stats()
		d.cfg.Log.Info("pushed", "samples", t.samples, "scrapes", t.scrapes, "pushes", t.pushes,
			"took", d.cfg.Now().Sub(t.begin).Round(time.Millisecond),
			"undelivered", st.By[ScrapeUndelivered].Scrapes, "unread", st.Unread())
	}
	*t = tally{begin: d.cfg.Now()}
}

// Drain delivers until the servers hold all that is in the spool. While no server takes
// anything it tries all again, after a pause that doubles, is spread by jitter, and is at
// least what the servers asked for. The same goes for a spool that cannot be read. It
// ends early with ctx, or when its deadline comes before the next attempt; the error is
// then the last one. A scrape that a server refuses as invalid is set aside, and one that
// it does not take stays; that is the error if nothing worse happens.
func (d *Courier) Drain(ctx context.Context) error {
	r := round{backoff: minBackoff, tally: tally{begin: d.cfg.Now()}}
	d.leave()
	var refusal error
	for {
		step, wait := d.cfg.Spool.Step()
		if step == StepEnd || step == StepWait && !sleepUnlessDone(ctx, wait) {
			d.report(&r.tally)
			return refusal
		}
		if step == StepWait {
			continue
		}
		d.choose(&r)
		// Before Next: the answer tells the time, by which Next makes times final.
		err := d.authorized(ctx, &r)
		if err == nil && step == StepAsk {
			if err = d.ask(ctx, &r); err == nil {
				continue
			}
		}
		var batch []Scrape
		var out SpoolOutcome
		if err == nil {
			var unread error
			batch, unread = d.cfg.Spool.Next(PushLimits{Bytes: d.cfg.LimitBytes, Text: DecodedFactor * d.cfg.LimitBytes, Scrapes: d.most})
			if unread != nil {
				d.cfg.SpoolErrors.Inc()
				if end := d.rest(ctx, &pushError{err: unread}, &r); end != nil {
					return end
				}
				continue
			}
			if len(batch) == 0 {
				continue
			}
			out, err = d.push(ctx, &r, batch, true)
		}
		refused := 0 // samples
		why := err
		var end error
		switch {
		case err == nil || !err.final:
		case len(batch) > 1:
			d.cfg.Spool.Release()
			d.tread(len(batch), err.large)
			continue
		case err.large:
			s := splitting{round: &r, at: -1, why: err}
			end = d.split(ctx, batch[0], true, &s)
			out, refused, why, err = s.outcome, s.refused, s.why, nil
			if end == nil && refused == 0 && s.apart {
				d.cfg.Spool.Failed(false) // it starts anew, where the last piece went
				continue
			}
		default:
			refused, err = max(1, batch[0].Samples), nil // an empty one is refused as well
		}
		if err != nil {
			d.cfg.Spool.Failed(err.refused)
			if ctx.Err() == nil && timedOut(err) && len(batch) > 1 && r.tried+1 == len(d.cfg.To) {
				d.tread(len(batch), true)
			}
			if end = d.again(ctx, err, &r); end == nil {
				continue
			}
		}
		if end != nil {
			d.cfg.Spool.Failed(false)
			return end
		}
		r.backoff = minBackoff
		d.ok.Store(refused == 0 && len(out.NotTaken) == 0)
		pushed := len(batch)
		batch = slices.DeleteFunc(batch, func(sc Scrape) bool { return out.NotTaken.Has(sc.Number) })
		switch {
		case refused > 0:
			d.cfg.Spool.SetAside()
			d.cfg.Dropped.Add(float64(refused), DropRefused)
			d.cfg.Log.Error("destination refused a scrape; it is set aside", "samples", refused, "err", why)
			refusal = why
		case len(out.NotTaken) > 0 && pushed == 1 && r.passed+1 < len(d.cfg.To):
			// This server's clock may be wrong, and that of the next one right.
			r.passed++
			d.first, d.firstUntil = (d.last+1)%len(d.cfg.To), d.cfg.Now().Add(d.cfg.MaxWait)
			d.cfg.Spool.Again(out.NotTaken)
			continue
		case len(out.NotTaken) > 0 && pushed == 1:
			r.passed = 0
			refusal = errNotTaken
		default:
			r.passed = 0
			d.delivered(batch)
			r.tally.scrapes += len(batch)
		}
		if len(out.NotTaken) > 0 && pushed > 1 {
			d.tread(pushed, false)
		} else if d.careful -= pushed; d.careful <= 0 {
			d.careful, d.most = 0, min(2*d.most, maxTogether)
		}
	}
}

// leave chooses the server that a Drain begins with: where nobody reads for long, perhaps
// because the center lost its way there, the next of To may do better.
func (d *Courier) leave() {
	now, n := d.cfg.Now(), len(d.cfg.To)
	if n > 1 && !now.Before(d.homeUntil) {
		d.home = 0
		if held := d.cfg.Spool.HeldFor(); held > unreadPatience {
			d.home, d.homeUntil = (d.last+1)%n, now.Add(unreadPatience)
			d.cfg.Log.Warn("scrapes stay unread on a server; trying the next", "server", d.cfg.To[d.last],
				"unread_for", held.Round(time.Second), "next", d.cfg.To[d.home])
		}
	}
	d.first, d.firstUntil = d.home, time.Time{}
}

// choose chooses the server of the next attempt.
func (d *Courier) choose(r *round) {
	if r.tried > 0 {
		return // of the same round
	}
	if !d.cfg.Now().Before(d.firstUntil) {
		d.first = d.home
	}
	r.at = d.first
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

// round is a series of attempts, one at each server until one takes what is pushed.
type round struct {
	at, tried int           // the server of the next attempt, and how many failed before
	retry     time.Duration // that servers asked for meanwhile
	passed    int           // servers that took nothing of the same scrape
	backoff   time.Duration // the next pause when all have failed
	last      error         // why the last round failed
	tally     tally
}

// again goes on to the next server after an attempt that failed but may be repeated, or
// pauses if it was the last one. It returns nil when it is time for the next attempt;
// else what to end with.
func (d *Courier) again(ctx context.Context, err *pushError, r *round) error {
	r.retry = max(r.retry, err.retry)
	if r.at == d.home {
		d.home = 0
	}
	if r.tried++; r.tried < len(d.cfg.To) && ctx.Err() == nil {
		d.cfg.Log.Warn("destination failed; trying the next", "to", d.cfg.To[r.at], "err", err)
		r.at = (r.at + 1) % len(d.cfg.To)
		return nil
	}
	err.retry = r.retry
	r.tried, r.retry = 0, 0
	return d.rest(ctx, err, r)
}

// rest pauses; else it is as again.
func (d *Courier) rest(ctx context.Context, err *pushError, r *round) error {
	d.ok.Store(false)
	if ctx.Err() != nil && r.last != nil {
		return r.last // says more than that the time is up
	}
	r.last = err
	d.report(&r.tally)
	// Sites that were refused together come back apart.
	pause := max(min(err.retry, d.cfg.MaxWait), r.backoff/2)
	pause += rand.N(pause)
	r.backoff = min(2*r.backoff, maxBackoff)
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
	held, who := d.cfg.Spool.Stats().By[ScrapeUndelivered].Scrapes, "destination"
	if errors.Is(err, ErrSpoolRead) {
		who = "spool"
	}
	if deadline, ok := ctx.Deadline(); ok && d.cfg.Now().Add(pause).After(deadline) {
		d.cfg.Log.Error(who+" failed; scrapes are kept", "scrapes", held, "err", err)
		return false
	}
	d.cfg.Log.Warn(who+" failed; scrapes are kept, trying again", "scrapes", held, "in", pause.Round(time.Millisecond), "err", err)
	return sleepUnlessDone(ctx, pause)
}

// sleepUnlessDone returns false if ctx ends before the time is over.
func sleepUnlessDone(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
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
	round   *round
	outcome SpoolOutcome
	at      int  // the server that took the first piece; -1 if none did
	apart   bool // another took a piece: no server has all
	refused int  // samples that no server will have, and why
	why     *pushError
	alone   int // lines that were refused though nothing was with them
}

// split pushes the halves of a scrape that is too large for the servers, which
// may be stricter than LimitBytes, and so on down to single lines. A piece that
// fails is tried again by itself: with the whole scrape anew, one of more pieces
// than the servers' pace allows would never end. When many lines were refused
// alone it is the number of series that is too large, and no piece is small
// enough: then pieces are no longer split. If named, the last piece names the scrape,
// since only then all of it is with the server. The error is why it had to end.
func (d *Courier) split(ctx context.Context, sc Scrape, named bool, s *splitting) error {
	halves, err := halve(sc)
	if err == nil && len(halves) == 0 {
		s.alone++
		err = fmt.Errorf("one series alone is too large: %w", s.why)
	}
	if err != nil {
		s.refused, s.why = s.refused+max(1, sc.Samples), &pushError{err: err}
		return nil
	}
	for i, half := range halves {
		last := named && i == len(halves)-1
		var e *pushError
		var apart bool
		for {
			d.choose(s.round)
			apart = s.apart || s.at >= 0 && s.at != s.round.at
			// A scrape that is set aside in the end is not named.
			s.outcome, e = d.push(ctx, s.round, []Scrape{half}, last && s.refused == 0 && !apart)
			if e == nil || e.final {
				break
			}
			if err := d.again(ctx, e, s.round); err != nil {
				return err
			}
		}
		s.round.backoff = minBackoff
		switch {
		case e == nil:
			s.apart = apart
			if s.at < 0 {
				s.at = s.round.at
			}
		case e.large && s.alone < maxAlone:
			s.why = e
			if err := d.split(ctx, half, last, s); err != nil {
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

// push offers scrapes to the server whose turn it is. If named, it names them, and the
// spool takes in the answer.
func (d *Courier) push(ctx context.Context, r *round, batch []Scrape, named bool) (out SpoolOutcome, failed *pushError) {
	size, samples := 0, 0
	var names SpoolNames
	for _, sc := range batch {
		size, samples = size+len(sc.Gzip), samples+sc.Samples
		names.Numbers = names.Numbers.Add(sc.Number, sc.Number)
	}
	if named {
		names.ID = d.cfg.Spool.ID()
	}
	// Several gzips in a row are one.
	body := make([]byte, 0, size)
	for _, sc := range batch {
		body = append(body, sc.Gzip...)
	}
	begin := d.cfg.Now()
	got, answer, err := d.request(ctx, d.cfg.To[r.at], names, &batch[len(batch)-1], body)
	d.pushSeconds.Observe(d.cfg.Now().Sub(begin).Seconds())
	failed = d.failed(err)
	if failed != nil && !failed.final {
		return out, failed
	}
	if r.at != d.first {
		d.first, d.firstUntil = r.at, d.cfg.Now().Add(d.cfg.MaxWait)
	}
	r.tried, r.retry = 0, 0
	if failed != nil {
		return out, failed
	}
	d.pushes.Inc("ok")
	d.pushed.Add(float64(samples))
	d.lastPush.Set(float64(d.cfg.Now().UnixMilli()) / 1000)
	d.bodyBytes.Set(float64(size))
	r.tally.samples, r.tally.pushes = r.tally.samples+samples, r.tally.pushes+1
	if named {
		d.last, out = r.at, d.cfg.Spool.Answer(answer)
	}
	if len(out.NotTaken) > 0 { // the samples are not dropped yet
		if out.Tell {
			d.cfg.Log.Warn("the server took no sample of a scrape; it stays in the spool and is tried again",
				"server", cmp.Or(got.Server, d.cfg.To[r.at]), "samples", samples, "dropped", got.Dropped, "hint", got.Hint)
		}
		return out, nil
	}
	for reason, n := range got.Dropped {
		args := []any{"reason", reason, "samples", n}
		if got.Hint != "" {
			args = append(args, "hint", got.Hint)
		}
		d.cfg.Dropped.Add(float64(max(0, n)), DropByServer)
		d.cfg.Log.Warn("the server dropped samples", args...)
	}
	return out, nil
}

// ask asks the server whose turn it is what it holds, by a push without scrapes. A server
// that refuses that does not know what a spool is.
func (d *Courier) ask(ctx context.Context, r *round) *pushError {
	_, answer, err := d.request(ctx, d.cfg.To[r.at], SpoolNames{ID: d.cfg.Spool.ID()}, nil, nil)
	var e *pushError
	if errors.As(err, &e) && e.final {
		answer, err = SpoolAnswer{To: d.cfg.To[r.at]}, nil
	}
	if err != nil {
		return d.failed(err)
	}
	d.last = r.at
	d.cfg.Spool.Answer(answer)
	if st := d.cfg.Spool.Stats(); st.By[ScrapeUndelivered].Scrapes == 0 {
		d.ok.Store(true) // the push before was delivered, and its answer lost
	}
	return nil
}
