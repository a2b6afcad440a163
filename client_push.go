package main

// Delivery: scrapes go from the spool to the first server that takes them, several to a push.
// A scrape leaves the spool only when an answer says that it is done, or refuses it as
// invalid. After an attempt without an answer the server is asked first. A token goes to no
// other address than the ones it was given for. This file must not know of the source.

import (
	"cmp"
	"context"
	"errors"
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

// PusherConfig configures a Pusher.
type PusherConfig struct {
	To          []string      // servers, in the order in which they are tried
	ToClient    *http.Client  // with a timeout; follows no redirects
	Cluster     string        // the cluster ID
	Token       func() string // the client token
	LimitBytes  int64         // of a push's body; decompressed, MaxDecodedFactor times
	MaxWait     time.Duration // that a server may ask for between attempts
	Spool       *Spool
	Clocks      *SourceClock
	Moment      func() Moment
	Now         func() time.Time
	Metrics     *Metrics
	Dropped     *Counter // of samples by reason
	SpoolErrors *Counter // of failures to read the spool, beside those it tells of itself
	Log         *slog.Logger
}

// Pusher delivers what a spool holds. Drain is for one goroutine at a time;
// the other methods may be called concurrently.
type Pusher struct {
	cfg  PusherConfig
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

// NewPusher returns a Pusher.
func NewPusher(cfg PusherConfig) *Pusher {
	m := cfg.Metrics
	d := &Pusher{
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
func (p *Pusher) OK() bool { return p.ok.Load() }

// Sent returns the pieces of the scrape that was delivered last, not to be
// changed.
func (d *Pusher) Sent() []Scrape {
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

func (p *Pusher) report(t *tally) {
	if t.pushes > 0 {
		st := p.cfg.Spool.Stats()
		p.cfg.Log.Info("pushed", "samples", t.samples, "scrapes", t.scrapes, "pushes", t.pushes,
			"took", p.cfg.Now().Sub(t.begin).Round(time.Millisecond),
			"undelivered", st.By[ScrapeUndelivered].Scrapes, "unread", st.Unread())
	}
	*t = tally{begin: p.cfg.Now()}
}

// Drain delivers until the servers hold all that is in the spool. While no server takes
// anything it tries all again, after a pause that doubles, is spread by jitter, and is at
// least what the servers asked for. The same goes for a spool that cannot be read. It
// ends early with ctx, or when its deadline comes before the next attempt; the error is
// then the last one. A scrape that a server refuses as invalid is set aside, and one that
// it does not take stays; that is the error if nothing worse happens.
func (p *Pusher) Drain(ctx context.Context) error {
	r := round{backoff: minBackoff, tally: tally{begin: p.cfg.Now()}}
	p.leave()
	var refusal error
	for {
		step, wait := p.cfg.Spool.Step()
		if step == StepWait {
			if _, ok := Sleep(ctx, wait, nil); ok {
				continue
			}
		}
		if step == StepEnd || step == StepWait {
			p.report(&r.tally)
			return refusal
		}
		p.choose(&r)
		// Before Next: the answer tells the time, by which Next makes times final.
		err := p.authorized(ctx, &r)
		if err == nil && step == StepAsk {
			if err = p.ask(ctx, &r); err == nil {
				continue
			}
		}
		var batch []Scrape
		var out SpoolOutcome
		if err == nil {
			var unread error
			batch, unread = p.cfg.Spool.Next(PushLimits{Bytes: p.cfg.LimitBytes, Text: MaxDecodedFactor * p.cfg.LimitBytes, Scrapes: p.most})
			if unread != nil {
				p.cfg.SpoolErrors.Inc()
				if end := p.rest(ctx, &pushError{err: unread}, &r); end != nil {
					return end
				}
				continue
			}
			if len(batch) == 0 {
				continue
			}
			out, err = p.push(ctx, &r, batch, true)
		}
		refused := 0 // samples
		why := err
		var end error
		switch {
		case err == nil || !err.final:
		case len(batch) > 1:
			p.cfg.Spool.Release()
			p.tread(len(batch), err.large)
			continue
		case err.large:
			s := splitting{round: &r, at: -1, why: err}
			end = p.split(ctx, batch[0], true, &s)
			out, refused, why, err = s.outcome, s.refused, s.why, nil
			if end == nil && refused == 0 && s.apart {
				p.cfg.Spool.Failed(false) // it starts anew, where the last piece went
				continue
			}
		default:
			refused, err = max(1, batch[0].Samples), nil // an empty one is refused as well
		}
		if err != nil {
			p.cfg.Spool.Failed(err.refused)
			if ctx.Err() == nil && timedOut(err) && len(batch) > 1 && r.tried+1 == len(p.cfg.To) {
				p.tread(len(batch), true)
			}
			if end = p.again(ctx, err, &r); end == nil {
				continue
			}
		}
		if end != nil {
			p.cfg.Spool.Failed(false)
			return end
		}
		r.backoff = minBackoff
		p.ok.Store(refused == 0 && len(out.NotTaken) == 0)
		pushed := len(batch)
		batch = slices.DeleteFunc(batch, func(sc Scrape) bool { return out.NotTaken.Has(sc.Number) })
		switch {
		case refused > 0:
			p.cfg.Spool.SetAside()
			p.cfg.Dropped.Add(float64(refused), DropRefused)
			p.cfg.Log.Error("destination refused a scrape; it is set aside", "samples", refused, "err", why)
			refusal = why
		case len(out.NotTaken) > 0 && pushed == 1 && r.passed+1 < len(p.cfg.To):
			// This server's clock may be wrong, and that of the next one right.
			r.passed++
			p.first, p.firstUntil = (p.last+1)%len(p.cfg.To), p.cfg.Now().Add(p.cfg.MaxWait)
			p.cfg.Spool.Again(out.NotTaken)
			continue
		case len(out.NotTaken) > 0 && pushed == 1:
			r.passed = 0
			refusal = errNotTaken
		default:
			r.passed = 0
			p.delivered(batch)
			r.tally.scrapes += len(batch)
		}
		if len(out.NotTaken) > 0 && pushed > 1 {
			p.tread(pushed, false)
		} else if p.careful -= pushed; p.careful <= 0 {
			p.careful, p.most = 0, min(2*p.most, maxTogether)
		}
	}
}

// leave chooses the server that a Drain begins with: where nobody reads for long, perhaps
// because the center lost its way there, the next of To may do better.
func (p *Pusher) leave() {
	now, n := p.cfg.Now(), len(p.cfg.To)
	if n > 1 && !now.Before(p.homeUntil) {
		p.home = 0
		if held := p.cfg.Spool.HeldFor(); held > unreadPatience {
			p.home, p.homeUntil = (p.last+1)%n, now.Add(unreadPatience)
			p.cfg.Log.Warn("scrapes stay unread on a server; trying the next", "server", p.cfg.To[p.last],
				"unread_for", held.Round(time.Second), "next", p.cfg.To[p.home])
		}
	}
	p.first, p.firstUntil = p.home, time.Time{}
}

// choose chooses the server of the next attempt.
func (p *Pusher) choose(r *round) {
	if r.tried > 0 {
		return // of the same round
	}
	if !p.cfg.Now().Before(p.firstUntil) {
		p.first = p.home
	}
	r.at = p.first
}

// tread makes the next pushes smaller, after one of n scrapes: half as large
// if it was too large, else of one scrape each, to find the one that is wrong.
func (p *Pusher) tread(n int, large bool) {
	p.most, p.careful = 1, n
	if large {
		p.most = n / 2
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
func (p *Pusher) again(ctx context.Context, err *pushError, r *round) error {
	r.retry = max(r.retry, err.retry)
	if r.at == p.home {
		p.home = 0
	}
	if r.tried++; r.tried < len(p.cfg.To) && ctx.Err() == nil {
		p.cfg.Log.Warn("destination failed; trying the next", "to", p.cfg.To[r.at], "err", err)
		r.at = (r.at + 1) % len(p.cfg.To)
		return nil
	}
	err.retry = r.retry
	r.tried, r.retry = 0, 0
	return p.rest(ctx, err, r)
}

// rest pauses; else it is as again.
func (p *Pusher) rest(ctx context.Context, err *pushError, r *round) error {
	p.ok.Store(false)
	if ctx.Err() != nil && r.last != nil {
		return r.last // says more than that the time is up
	}
	r.last = err
	p.report(&r.tally)
	// Sites that were refused together come back apart.
	pause := max(min(err.retry, p.cfg.MaxWait), r.backoff/2)
	pause += rand.N(pause)
	r.backoff = min(2*r.backoff, maxBackoff)
	if !p.pause(ctx, pause, err) {
		return err
	}
	return nil
}

// pause waits, and tells whether there is time for another attempt.
func (p *Pusher) pause(ctx context.Context, pause time.Duration, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	held, who := p.cfg.Spool.Stats().By[ScrapeUndelivered].Scrapes, "destination"
	if errors.Is(err, ErrSpoolRead) {
		who = "spool"
	}
	if deadline, ok := ctx.Deadline(); ok && p.cfg.Now().Add(pause).After(deadline) {
		p.cfg.Log.Error(who+" failed; scrapes are kept", "scrapes", held, "err", err)
		return false
	}
	p.cfg.Log.Warn(who+" failed; scrapes are kept, trying again", "scrapes", held, "in", pause.Round(time.Millisecond), "err", err)
	_, ok := Sleep(ctx, pause, nil)
	return ok
}

// delivered keeps the pieces of the newest scrape for Sent.
func (p *Pusher) delivered(batch []Scrape) {
	sent := p.Sent()
	for _, sc := range batch {
		if len(sent) > 0 && sent[0].At != sc.At {
			sent = nil
		}
		sent = append(sent[:len(sent):len(sent)], sc)
	}
	p.sent.Store(&sent)
}

// push offers scrapes to the server whose turn it is. If named, it names them, and the
// spool takes in the answer.
func (p *Pusher) push(ctx context.Context, r *round, batch []Scrape, named bool) (out SpoolOutcome, failed *pushError) {
	size, samples := 0, 0
	var names ScrapeNames
	for _, sc := range batch {
		size, samples = size+len(sc.Gzip), samples+sc.Samples
		names.Numbers = names.Numbers.Add(sc.Number, sc.Number)
	}
	if named {
		names.ID = p.cfg.Spool.ID()
	}
	// Several gzips in a row are one.
	body := make([]byte, 0, size)
	for _, sc := range batch {
		body = append(body, sc.Gzip...)
	}
	begin := p.cfg.Now()
	got, answer, err := p.request(ctx, p.cfg.To[r.at], names, &batch[len(batch)-1], body)
	p.pushSeconds.Observe(p.cfg.Now().Sub(begin).Seconds())
	failed = p.failed(err)
	if failed != nil && !failed.final {
		return out, failed
	}
	if r.at != p.first {
		p.first, p.firstUntil = r.at, p.cfg.Now().Add(p.cfg.MaxWait)
	}
	r.tried, r.retry = 0, 0
	if failed != nil {
		return out, failed
	}
	p.pushes.Inc("ok")
	p.pushed.Add(float64(samples))
	p.lastPush.Set(float64(p.cfg.Now().UnixMilli()) / 1000)
	p.bodyBytes.Set(float64(size))
	r.tally.samples, r.tally.pushes = r.tally.samples+samples, r.tally.pushes+1
	if named {
		p.last, out = r.at, p.cfg.Spool.Answer(answer)
	}
	if len(out.NotTaken) > 0 { // the samples are not dropped yet
		if out.Tell {
			p.cfg.Log.Warn("the server took no sample of a scrape; it stays in the spool and is tried again",
				"server", cmp.Or(got.Server, p.cfg.To[r.at]), "samples", samples, "dropped", got.Dropped, "hint", got.Hint)
		}
		return out, nil
	}
	for reason, n := range got.Dropped {
		args := []any{"reason", reason, "samples", n}
		if got.Hint != "" {
			args = append(args, "hint", got.Hint)
		}
		p.cfg.Dropped.Add(float64(max(0, n)), DropByServer)
		p.cfg.Log.Warn("the server dropped samples", args...)
	}
	return out, nil
}

// ask asks the server whose turn it is what it holds, by a push without scrapes. A server
// that refuses that does not know what a spool is.
func (p *Pusher) ask(ctx context.Context, r *round) *pushError {
	_, answer, err := p.request(ctx, p.cfg.To[r.at], ScrapeNames{ID: p.cfg.Spool.ID()}, nil, nil)
	var e *pushError
	if errors.As(err, &e) && e.final {
		answer, err = SpoolAnswer{To: p.cfg.To[r.at]}, nil
	}
	if err != nil {
		return p.failed(err)
	}
	p.last = r.at
	p.cfg.Spool.Answer(answer)
	if st := p.cfg.Spool.Stats(); st.By[ScrapeUndelivered].Scrapes == 0 {
		p.ok.Store(true) // the push before was delivered, and its answer lost
	}
	return nil
}
