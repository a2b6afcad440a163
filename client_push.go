package main

// Delivery: scrapes go from the spool to the first server that accepts them, several to a push.
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

// Reasons for which samples of a push are dropped.
const (
	DropRefused  = "refused"   // no server accepts them
	DropByServer = "by_server" // the server accepted the push without them
)

var errDeclined = errors.New("the server took no sample of a scrape; it stays in the spool")

// PusherConfig configures a Pusher.
type PusherConfig struct {
	To            []string      // servers, in the order in which they are tried
	ToClient      *http.Client  // with a timeout; follows no redirects
	ClusterID     string        // the cluster ID
	Token         func() string // the client token
	LimitBytes    int64         // of a push's body; decompressed, MaxDecodedFactor times
	MaxRetryAfter time.Duration // that a server may ask for between attempts
	Spool         *Spool
	SourceClock   *SourceClockTracker
	Moment        func() Moment
	Now           func() time.Time
	Metrics       *Metrics
	Dropped       *Counter // of samples by reason
	SpoolErrors   *Counter // of failures to read the spool, beside those it reports itself
	Log           *slog.Logger
}

// Pusher delivers what a spool holds. Drain is for one goroutine at a time;
// the other methods may be called concurrently.
type Pusher struct {
	cfg           PusherConfig
	lastDelivered atomic.Pointer[[]Scrape] // see LastDeliveredPieces
	healthy       atomic.Bool              // the last push was delivered

	// For DrainSpool's goroutine.
	token   uploadToken
	servers serverFailover
	size    pushScrapeLimit

	pushes, pushed              *Counter
	pushSeconds                 *Histogram
	lastPush, bodyBytes, offset *Gauge
}

// NewPusher returns a Pusher.
func NewPusher(cfg PusherConfig) *Pusher {
	m := cfg.Metrics
	p := &Pusher{
		cfg: cfg, servers: serverFailover{servers: len(cfg.To)}, size: pushScrapeLimit{max: maxPushScrapes},
		pushes:      m.Counter("telemeter_destination_pushes_total", "Attempts to push by result.", "result"),
		pushSeconds: m.Histogram("telemeter_destination_push_duration_seconds", "Time of an attempt to push.", []float64{.01, .05, .1, .5, 1, 5, 10, 30, 60}),
		lastPush:    m.Gauge("telemeter_destination_last_success_timestamp_seconds", "When a push was last accepted; 0 if never."),
		bodyBytes:   m.Gauge("telemeter_destination_push_bytes", "Compressed size of the last push accepted."),
		pushed:      m.Counter("telemeter_samples_pushed_total", "Samples in pushes that were accepted."),
		offset:      m.Gauge("telemeter_source_clock_offset_seconds", "By how much the source's clock was behind the servers' at the newest scrape pushed; 0 if not known."),
	}
	p.pushes.Add(0, "ok")
	p.pushes.Add(0, "failed")
	return p
}

// IsHealthy reports whether the last push was delivered.
func (p *Pusher) IsHealthy() bool { return p.healthy.Load() }

// LastDeliveredPieces returns the pieces of the scrape that was delivered last. The caller must not
// change them.
func (p *Pusher) LastDeliveredPieces() []Scrape {
	if pieces := p.lastDelivered.Load(); pieces != nil {
		return *pieces
	}
	return nil
}

// spoolDrain is the state of one call of Drain.
type spoolDrain struct {
	*Pusher
	backoff  roundBackoff
	lastErr  error // why the last round failed
	rejected error // of the last scrape that was refused as invalid, or that all servers declined
	progress pushProgress
}

// pushProgress counts what was pushed since the last log line.
type pushProgress struct {
	begin                    time.Time
	samples, scrapes, pushes int
}

// DrainSpool delivers until the servers hold all scrapes in the spool. While all servers fail, or
// the spool cannot be read, it tries again after a pause, which doubles each time, has jitter, and
// is at least as long as the servers asked for. It ends early with ctx, or when ctx's deadline
// comes before the next attempt; the error is then the newest failure. A scrape that a server
// refuses as invalid is set aside, and a scrape that all servers decline stays in the spool; the
// error is the newest such refusal if nothing worse happens.
func (p *Pusher) DrainSpool(ctx context.Context) error {
	d := spoolDrain{Pusher: p, progress: pushProgress{begin: p.cfg.Now()}}
	d.backoff.reset()
	unreadFor := p.cfg.Spool.NoReadProgressFor()
	if p.servers.beginDrain(p.cfg.Now(), unreadFor) {
		p.cfg.Log.Warn("scrapes stay unread on a server; trying the next", "server", p.cfg.To[p.servers.last],
			"unread_for", unreadFor.Round(time.Second), "next", p.cfg.To[p.servers.preferred])
	}
	for {
		step, wait := p.cfg.Spool.NextStep()
		if step == StepWait {
			if _, ok := Sleep(ctx, wait, nil); ok {
				continue
			}
			step = StepDone
		}
		if step == StepDone {
			d.logAndResetProgress()
			return d.rejected
		}
		if err := d.attempt(ctx, step); err != nil {
			return err
		}
	}
}

func (d *spoolDrain) logAndResetProgress() {
	if d.progress.pushes > 0 {
		st := d.cfg.Spool.Stats()
		d.cfg.Log.Info("pushed", "samples", d.progress.samples, "scrapes", d.progress.scrapes, "pushes", d.progress.pushes,
			"took", d.cfg.Now().Sub(d.progress.begin).Round(time.Millisecond),
			"undelivered", st.ByState[ScrapeUndelivered].Scrapes, "unread", st.DeliveredScrapes())
	}
	d.progress = pushProgress{begin: d.cfg.Now()}
}

// attempt asks the current server what it holds, or sends the next push to it. It returns nil if
// another step may follow, even if the attempt failed; an error ends the drain.
func (d *spoolDrain) attempt(ctx context.Context, step DrainStep) (endsDrain error) {
	d.servers.chooseServer(d.cfg.Now())
	// The token comes before the next push, because the answer to its request states the time by
	// which the spool corrects the times of scrapes.
	_, err := d.ensureUploadToken(ctx)
	switch {
	case err != nil:
		d.pushes.Inc("failed")
	case step == StepPush:
		return d.pushNext(ctx)
	default:
		err = d.askHeldScrapes(ctx)
	}
	if err != nil {
		return d.markFailedAndFailOver(ctx, err)
	}
	return nil
}

// askHeldScrapes asks the current server what it holds, by a push without scrapes. A server
// that refuses that does not know what a spool is.
func (d *spoolDrain) askHeldScrapes(ctx context.Context) error {
	answer, err := d.upload(ctx, d.cfg.Spool.ID(), nil)
	if isFinalRefusal(err) {
		answer, err = uploadAnswer{spool: SpoolAnswer{Server: d.currentServerURL()}}, nil
	}
	if err != nil {
		d.pushes.Inc("failed")
		return err
	}
	d.servers.last = d.servers.current
	d.cfg.Spool.ApplyAnswer(answer.spool)
	if st := d.cfg.Spool.Stats(); st.ByState[ScrapeUndelivered].Scrapes == 0 {
		d.healthy.Store(true) // the push before was delivered, and its answer lost
	}
	return nil
}

// pushNext pushes the next scrapes of the spool and acts on the result. An error ends the drain.
func (d *spoolDrain) pushNext(ctx context.Context) (endsDrain error) {
	scrapes, err := d.cfg.Spool.BeginPush(PushLimits{Bytes: d.cfg.LimitBytes, Text: MaxDecodedFactor * d.cfg.LimitBytes, Scrapes: d.size.max})
	if err != nil {
		d.cfg.SpoolErrors.Inc()
		return d.pauseBeforeRound(ctx, err, 0)
	}
	n := len(scrapes)
	if n == 0 {
		return nil
	}
	outcome, err := d.push(ctx, scrapes, true)
	switch {
	case err == nil:
		d.adjustServerAndPushSize(scrapes, outcome)
	case !isFinalRefusal(err):
		if ctx.Err() == nil && isTimeout(err) && n > 1 && d.servers.isLastOfRound() {
			d.size.limitToHalf(n)
		}
		return d.markFailedAndFailOver(ctx, err)
	case n > 1:
		d.cfg.Spool.ReleaseInFlight()
		if failureReasonOf(err) == pushTooLarge {
			d.size.limitToHalf(n)
		} else {
			d.size.limitToOne(n)
		}
	case failureReasonOf(err) == pushTooLarge:
		return d.pushInPieces(ctx, scrapes[0], err)
	default:
		d.setScrapeAside(max(1, scrapes[0].Samples), err) // an empty one is refused as well
	}
	return nil
}

// push sends scrapes to the current server. If nameScrapes, the push names them, and the
// answer goes to the spool. After an error the scrapes can be pushed again, unless isFinalRefusal
// says that it is about them.
func (d *spoolDrain) push(ctx context.Context, scrapes []Scrape, nameScrapes bool) (outcome PushOutcome, err error) {
	bytes, samples := 0, 0
	for _, sc := range scrapes {
		bytes, samples = bytes+len(sc.Gzip), samples+sc.Samples
	}
	id := uint64(0)
	if nameScrapes {
		id = d.cfg.Spool.ID()
	}
	begin := d.cfg.Now()
	answer, err := d.upload(ctx, id, scrapes)
	d.pushSeconds.Observe(d.cfg.Now().Sub(begin).Seconds())
	if err == nil || isFinalRefusal(err) {
		d.servers.stayAfterAnswer(d.cfg.Now(), d.cfg.MaxRetryAfter)
	}
	if err != nil {
		d.pushes.Inc("failed")
		return outcome, err
	}
	d.pushes.Inc("ok")
	d.pushed.Add(float64(samples))
	d.lastPush.Set(float64(d.cfg.Now().UnixMilli()) / 1000)
	d.bodyBytes.Set(float64(bytes))
	d.progress.samples, d.progress.pushes = d.progress.samples+samples, d.progress.pushes+1
	if nameScrapes {
		d.servers.last = d.servers.current
		outcome = d.cfg.Spool.ApplyAnswer(answer.spool)
	}
	d.logAndCountDropped(answer, outcome, samples)
	return outcome, nil
}

// logAndCountDropped logs and counts the samples that the server dropped. Those of a declined
// scrape are logged once and not counted, since the scrape stays in the spool.
func (d *spoolDrain) logAndCountDropped(answer uploadAnswer, outcome PushOutcome, pushedSamples int) {
	if len(outcome.Declined) > 0 {
		if outcome.FirstDecline {
			d.cfg.Log.Warn("the server took no sample of a scrape; it stays in the spool and is tried again",
				"server", cmp.Or(answer.Server, d.currentServerURL()), "samples", pushedSamples, "dropped", answer.Dropped, "hint", answer.Hint)
		}
		return
	}
	for reason, n := range answer.Dropped {
		args := []any{"reason", reason, "samples", n}
		if answer.Hint != "" {
			args = append(args, "hint", answer.Hint)
		}
		d.cfg.Dropped.Add(float64(max(0, n)), DropByServer)
		d.cfg.Log.Warn("the server dropped samples", args...)
	}
}

// adjustServerAndPushSize follows a push that a server answered with 200.
func (d *spoolDrain) adjustServerAndPushSize(scrapes []Scrape, outcome PushOutcome) {
	d.backoff.reset()
	n, declined := len(scrapes), len(outcome.Declined) > 0
	d.healthy.Store(!declined)
	if declined && n == 1 {
		// This server's clock may be wrong, and that of the next one right.
		if d.servers.advanceAfterDecline(d.cfg.Now(), d.cfg.MaxRetryAfter) {
			d.cfg.Spool.ClearRetryPause(outcome.Declined)
			return
		}
		d.rejected = errDeclined
		d.size.growAfter(n)
		return
	}
	d.servers.declined = 0
	delivered := slices.DeleteFunc(scrapes, func(sc Scrape) bool { return outcome.Declined.Has(sc.Number) })
	d.keepLastDeliveredPieces(delivered)
	d.progress.scrapes += len(delivered)
	if declined {
		d.size.limitToOne(n)
	} else {
		d.size.growAfter(n)
	}
}

// setScrapeAside sets the scrape in flight aside, because no server accepts some of its samples.
func (d *spoolDrain) setScrapeAside(refusedSamples int, why error) {
	d.backoff.reset()
	d.healthy.Store(false)
	d.rejected = why
	d.size.growAfter(1)
	d.cfg.Spool.SetInFlightAside()
	d.cfg.Dropped.Add(float64(refusedSamples), DropRefused)
	d.cfg.Log.Error("destination refused a scrape; it is set aside", "samples", refusedSamples, "err", why)
}

// keepLastDeliveredPieces keeps the pieces of the newest scrape for LastDeliveredPieces.
func (p *Pusher) keepLastDeliveredPieces(scrapes []Scrape) {
	pieces := p.LastDeliveredPieces()
	for _, sc := range scrapes {
		if len(pieces) > 0 && pieces[0].At != sc.At {
			pieces = nil
		}
		pieces = append(pieces[:len(pieces):len(pieces)], sc)
	}
	p.lastDelivered.Store(&pieces)
}

// markFailedAndFailOver follows an attempt that failed and may be repeated. An error ends the drain.
func (d *spoolDrain) markFailedAndFailOver(ctx context.Context, err error) (endsDrain error) {
	d.cfg.Spool.MarkPushFailed(failureReasonOf(err) == pushUnavailable)
	return d.nextServerOrPause(ctx, err)
}

// nextServerOrPause makes the next server current, or pauses if all servers of this round have
// failed. An error ends the drain.
func (d *spoolDrain) nextServerOrPause(ctx context.Context, err error) (endsDrain error) {
	failed := d.currentServerURL()
	if d.servers.advanceAfterFailure(retryAfterOf(err)) && ctx.Err() == nil {
		d.cfg.Log.Warn("destination failed; trying the next", "to", failed, "err", err)
		return nil
	}
	return d.pauseBeforeRound(ctx, err, d.servers.retryAfter)
}

// pauseBeforeRound waits before the next round: at least retryAfter, and longer each time. An error
// ends the drain: ctx has ended, or would before the pause does.
func (d *spoolDrain) pauseBeforeRound(ctx context.Context, err error, retryAfter time.Duration) (endsDrain error) {
	d.healthy.Store(false)
	if ctx.Err() != nil {
		return cmp.Or(d.lastErr, err) // err says only that the time is up
	}
	d.lastErr = err
	d.logAndResetProgress()
	pause := d.backoff.nextPause(min(retryAfter, d.cfg.MaxRetryAfter))
	pause += rand.N(pause) // sites that were refused together come back apart
	kept, part := d.cfg.Spool.Stats().ByState[ScrapeUndelivered].Scrapes, "destination"
	if errors.Is(err, ErrSpoolRead) {
		part = "spool"
	}
	if deadline, ok := ctx.Deadline(); ok && d.cfg.Now().Add(pause).After(deadline) {
		d.cfg.Log.Error(part+" failed; scrapes are kept", "scrapes", kept, "err", err)
		return err
	}
	d.cfg.Log.Warn(part+" failed; scrapes are kept, trying again", "scrapes", kept, "in", pause.Round(time.Millisecond), "err", err)
	if _, ok := Sleep(ctx, pause, nil); !ok {
		return err
	}
	return nil
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}
