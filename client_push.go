package main

// The Pusher delivers scrapes from the spool to the first server that accepts them, several scrapes
// in one push. It removes a scrape from the spool only when a server answers that the scrape is no
// longer needed, or refuses the scrape for good. If a push fails and the server may have stored its
// scrapes, the Pusher asks a server which scrapes that server holds before it pushes again. Only a
// piece of a scrape is pushed again without asking. Tokens are sent only to the URLs in
// PusherConfig.To, because redirects are not followed. This file must not know how the source is
// scraped.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Reasons for which samples of a push are dropped, as values of the label reason in metrics.
const (
	DropRefused  = "refused"   // a server refused the samples for good
	DropByServer = "by_server" // the server accepted the push but dropped these samples
)

var errDeclined = errors.New("the server dropped all samples of a scrape; the scrape stays in the spool")

// PusherConfig configures a Pusher.
type PusherConfig struct {
	To            []string      // URLs of the servers, tried in this order
	ToClient      *http.Client  // has a timeout and must not follow redirects
	ClusterID     string        // names this site
	Token         func() string // returns the client token
	LimitBytes    int64         // most bytes of the compressed body of a push; the decompressed body may have MaxDecodedFactor times as many; a push of a single scrape may exceed both
	MaxRetryAfter time.Duration // longest Retry-After that is obeyed; also the longest time for which pushes stay with a server after a failover to it
	Spool         *Spool
	SourceClock   *SourceClockTracker
	Moment        func() Moment    // reads the wall clock and the boot-time clock
	Now           func() time.Time // reads the wall clock
	Metrics       *Metrics
	Dropped       *Counter // counts dropped samples, by reason
	SpoolErrors   *Counter // counts errors that Spool.BeginPush returns
	Log           *slog.Logger
}

// Pusher delivers the scrapes of a spool. Only one goroutine at a time may call DrainSpool. The
// other exported methods are safe for concurrent use.
type Pusher struct {
	cfg           PusherConfig
	lastDelivered atomic.Pointer[[]Scrape] // delivered pieces of the scrape that was delivered last
	healthy       atomic.Bool              // the result of IsHealthy

	statusMu     sync.Mutex        // guards status and sourceOffset
	status       DestinationStatus // without the field To
	sourceOffset time.Duration     // see ClockOffset

	retryNow chan struct{} // has a value after RetryNow, until the next attempt begins or a pause ends

	// The next six fields are used only by the goroutine that calls DrainSpool.
	token      uploadToken
	servers    serverFailover
	size       pushScrapeLimit
	failures   failureLog // failed attempts that were logged
	drops      failureLog // reasons why servers dropped samples that were logged
	spoolIsNew bool       // the spool is new, and no server has answered yet whether the site pushed from another spool before

	pushes, pushed              *Counter
	pushSeconds                 *Histogram
	lastPush, bodyBytes, offset *Gauge
}

// NewPusher returns a Pusher. It needs at least one server in cfg.To.
func NewPusher(cfg PusherConfig) *Pusher {
	m := cfg.Metrics
	p := &Pusher{
		cfg: cfg, servers: serverFailover{servers: len(cfg.To)}, size: pushScrapeLimit{max: maxPushScrapes}, retryNow: make(chan struct{}, 1), spoolIsNew: cfg.Spool.IsNew(),
		pushes:      m.Counter("telemeter_destination_pushes_total", "Attempts to push, by result; denied: the server does not let the client in, or the client does not trust the server's certificate.", "result"),
		pushSeconds: m.Histogram("telemeter_destination_push_duration_seconds", "Duration of attempts to push.", []float64{.01, .05, .1, .5, 1, 5, 10, 30, 60}),
		lastPush:    m.Gauge("telemeter_destination_last_success_timestamp_seconds", "Unix time at which a push was last accepted; 0 if never."),
		bodyBytes:   m.Gauge("telemeter_destination_push_bytes", "Compressed size of the last accepted push."),
		pushed:      m.Counter("telemeter_samples_pushed_total", "Samples in accepted pushes."),
		offset:      m.Gauge("telemeter_source_clock_offset_seconds", "How far the source's clock was behind the servers' clocks at the newest pushed scrape; 0 if unknown."),
	}
	for _, result := range []string{"ok", "failed", "denied"} {
		p.pushes.Add(0, result)
	}
	return p
}

// RetryNow makes the next attempt begin at once if DrainSpool pauses because of a failure.
func (p *Pusher) RetryNow() { notify(p.retryNow) }

// countFailure counts an attempt to push that failed with err.
func (p *Pusher) countFailure(err error) {
	p.setPushFailed(err)
	result := "failed"
	if isDenied(err) {
		result = "denied"
	}
	p.pushes.Inc(result)
}

// IsHealthy reports whether scrapes are being delivered. It begins as false. It becomes true when a
// push delivers all of its scrapes, or when the answer to a question shows that no scrape is
// undelivered. It becomes false when all servers have failed, when a scrape is refused for good or
// declined, when the spool cannot be read, or when ctx ends during an attempt.
func (p *Pusher) IsHealthy() bool { return p.healthy.Load() }

// LastDeliveredPieces returns the delivered pieces of the scrape that was delivered last. A scrape
// within the size limits of a push has one piece. The caller must not change the pieces.
func (p *Pusher) LastDeliveredPieces() []Scrape {
	if pieces := p.lastDelivered.Load(); pieces != nil {
		return *pieces
	}
	return nil
}

// spoolDrain is the state of one call of DrainSpool.
type spoolDrain struct {
	*Pusher
	backoff roundBackoff
	lastErr error // the error that caused the last pause
	// deadlineLogged states that logDeadline has logged the deadline.
	deadlineLogged bool
	rejected       error // the newest error of a scrape that was refused for good or declined by all servers
	progress       pushProgress
}

// pushProgress counts the accepted pushes of a drain, their samples, and the delivered scrapes.
type pushProgress struct {
	begin                    time.Time // when the drain began
	samples, scrapes, pushes int
	// The rate is measured since rateBegin, when rateScrapes scrapes had been delivered. These
	// fields are set when a line is logged, and when a pause ends.
	rateBegin   time.Time
	rateScrapes int
}

// progressInterval is the time between two log lines about the progress of a drain.
const progressInterval = 10 * time.Second

// DrainSpool pushes until no scrape is left to push now. If all servers fail, or if the spool
// cannot be read, DrainSpool pauses and tries again. The pauses grow up to a limit until a push
// succeeds. A pause has jitter and is at least the Retry-After that the servers sent, up to
// MaxRetryAfter. If every server has denied access, the pause is deniedPause. RetryNow ends a
// pause.
//
// DrainSpool returns early if ctx ends during an attempt or a pause, if the next attempt would come
// after the deadline of ctx, or if ctx has a deadline and every server has denied access. The error
// is then that of the last failed round, or of the last attempt if no round has failed. A scrape
// that a server refuses for good, as a whole or in a piece, is set aside. A scrape that all servers
// decline stays in the spool. If DrainSpool does not return early, its error is the newest such
// refusal or decline, or nil.
func (p *Pusher) DrainSpool(ctx context.Context) error {
	now := p.cfg.Now()
	d := spoolDrain{Pusher: p, progress: pushProgress{begin: now, rateBegin: now}}
	defer d.logPushed()
	d.backoff.reset()
	unreadFor := p.cfg.Spool.NoReadProgressFor()
	if p.servers.beginDrain(now, unreadFor) {
		p.cfg.Log.Warn("no consumer reads scrapes on a server; trying the next server", "server", p.cfg.To[p.servers.last],
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
			return d.rejected
		}
		if err := d.attempt(ctx, step); err != nil {
			return err
		}
		d.logProgress()
	}
}

// logPushed logs what the whole drain has pushed, including its pauses.
func (d *spoolDrain) logPushed() {
	if d.progress.pushes == 0 {
		return
	}
	st := d.cfg.Spool.Stats()
	d.cfg.Log.Info("pushed", "samples", d.progress.samples, "scrapes", d.progress.scrapes, "pushes", d.progress.pushes,
		"took", d.cfg.Now().Sub(d.progress.begin).Round(time.Millisecond),
		"undelivered", st.ByState[ScrapeUndelivered].Scrapes, "unread", st.DeliveredScrapes())
}

// logProgress logs once in progressInterval how far the drain has come, if it goes on.
func (d *spoolDrain) logProgress() {
	now := d.cfg.Now()
	passed, done := now.Sub(d.progress.rateBegin), d.progress.scrapes-d.progress.rateScrapes
	if passed < progressInterval || done <= 0 {
		return
	}
	st := d.cfg.Spool.Stats() // looks at every scrape in the spool
	left := st.ByState[ScrapeUndelivered].Scrapes + st.ByState[ScrapeElsewhere].Scrapes
	if left == 0 {
		return
	}
	perSecond := float64(done) / passed.Seconds()
	d.cfg.Log.Info("pushing a backlog", "done", d.progress.scrapes, "left", left, "per_second", fmt.Sprintf("%.1f", perSecond),
		"time_left", (time.Duration(float64(left) / perSecond * float64(time.Second))).Round(time.Second))
	d.progress.rateBegin, d.progress.rateScrapes = now, d.progress.scrapes
}

// attempt asks the current server which scrapes it holds, or sends the next push to it. It returns
// nil if another step may follow, even after a failed attempt. An error ends the drain.
func (d *spoolDrain) attempt(ctx context.Context, step DrainStep) (endsDrain error) {
	select { // this attempt uses what was loaded before RetryNow was called
	case <-d.retryNow:
		d.servers.forgetDenials()
	default:
	}
	d.servers.chooseServer(d.cfg.Now())
	// Get the token before the next push is built: the answer to the token request states the
	// server's time, which the spool needs to correct the times of scrapes.
	_, err := d.ensureUploadToken(ctx)
	switch {
	case err != nil:
		d.countFailure(err)
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

// askHeldScrapes asks the current server which scrapes it holds, by a push without scrapes. A
// server that finally refuses such a push is taken not to support spools.
func (d *spoolDrain) askHeldScrapes(ctx context.Context) error {
	answer, err := d.upload(ctx, d.cfg.Spool.ID(), nil)
	if isFinalRefusal(err) {
		answer, err = uploadAnswer{spool: SpoolAnswer{Server: d.currentServerURL()}}, nil
	}
	if err != nil {
		d.countFailure(err)
		return err
	}
	d.setPushed(0, 0)
	d.servers.last = d.servers.current
	d.warnOfOtherSpool(answer)
	d.cfg.Spool.ApplyAnswer(answer.spool)
	if st := d.cfg.Spool.Stats(); st.ByState[ScrapeUndelivered].Scrapes == 0 {
		d.healthy.Store(true) // every scrape is delivered, perhaps by an earlier push whose answer was lost
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
		d.setScrapeAside(max(1, scrapes[0].Samples), err) // a refused scrape without samples counts as one sample
	}
	return nil
}

// push sends scrapes to the current server. If nameScrapes is true, the request names the scrapes
// and the answer is applied to the spool. After an error for which isFinalRefusal is false, the
// caller may push the scrapes again. After any other error, every server would refuse the same
// push.
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
		d.countFailure(err)
		return outcome, err
	}
	d.pushes.Inc("ok")
	d.setPushed(samples, bytes)
	d.pushed.Add(float64(samples))
	d.lastPush.Set(float64(d.cfg.Now().UnixMilli()) / 1000)
	d.bodyBytes.Set(float64(bytes))
	d.progress.samples, d.progress.pushes = d.progress.samples+samples, d.progress.pushes+1
	if nameScrapes {
		d.servers.last = d.servers.current
		d.warnOfOtherSpool(answer)
		outcome = d.cfg.Spool.ApplyAnswer(answer.spool)
	}
	d.logAndCountDropped(answer, outcome, samples)
	return outcome, nil
}

// warnOfOtherSpool logs a warning if the spool is new and the first answer of a server that knows
// spools says that this site pushed from another spool before. The directory may have changed by
// mistake, and the scrapes in the old one are not pushed then.
func (d *spoolDrain) warnOfOtherSpool(answer uploadAnswer) {
	if !d.spoolIsNew || !answer.spool.KnowsSpools {
		return
	}
	d.spoolIsNew = false
	if answer.OtherSpoolTime > 0 {
		d.cfg.Log.Warn("the spool is new, but this site pushed from another spool before: if the directory changed by mistake, its backlog is in the old directory; restart with --spool-dir and the old directory; if another client runs with this token, stop one of the two",
			"dir", d.cfg.Spool.Dir(), "other_pushed", time.UnixMilli(answer.OtherSpoolTime).UTC())
	}
}

// logAndCountDropped logs and counts the samples that the server dropped. If a scrape of the push
// was declined, nothing is counted, because the scrape stays in the spool. A server declines a
// single scrape if it dropped all samples because of their times. It declines several scrapes
// together if it dropped any samples because of their times. The first decline of a scrape in a
// push without other scrapes is logged.
func (d *spoolDrain) logAndCountDropped(answer uploadAnswer, outcome PushOutcome, pushedSamples int) {
	if len(outcome.Declined) > 0 {
		if outcome.FirstDecline {
			d.cfg.Log.Warn("the server dropped all samples of a scrape; the scrape stays in the spool and is tried again",
				"server", cmp.Or(answer.Server, d.currentServerURL()), "samples", pushedSamples, "dropped", answer.Dropped, "hint", answer.Hint)
		}
		return
	}
	for reason, n := range answer.Dropped {
		d.cfg.Dropped.Add(float64(max(0, n)), DropByServer)
		suppressed, ok := d.drops.take(d.cfg.Now(), reason)
		if !ok {
			continue
		}
		args := []any{"reason", reason, "samples", n}
		if suppressed > 0 {
			args = append(args, "suppressed", suppressed)
		}
		if answer.Hint != "" {
			args = append(args, "hint", answer.Hint)
		}
		d.cfg.Log.Warn("the server dropped samples", args...)
	}
}

// adjustServerAndPushSize acts on a push that a server answered with 200. It chooses the server and
// the size of the next pushes and updates the health, the progress and the last delivered pieces.
func (d *spoolDrain) adjustServerAndPushSize(scrapes []Scrape, outcome PushOutcome) {
	d.backoff.reset()
	n, declined := len(scrapes), len(outcome.Declined) > 0
	d.healthy.Store(!declined)
	if declined && n == 1 {
		// A server drops samples whose times are wrong by its own clock. The clock of the next
		// server may be right, so try the next server.
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

// setScrapeAside removes the scrape in flight from the spool, because servers refused
// refusedSamples of its samples for good. A file on disk is set aside, which means renamed and
// kept; only the last maxAsideFiles files are kept.
func (d *spoolDrain) setScrapeAside(refusedSamples int, why error) {
	d.backoff.reset()
	d.healthy.Store(false)
	d.rejected = why
	d.size.growAfter(1)
	d.cfg.Spool.SetInFlightAside()
	d.cfg.Dropped.Add(float64(refusedSamples), DropRefused)
	d.cfg.Log.Error("destination refused a scrape as invalid; its file is set aside", "samples", refusedSamples, "err", why)
}

// keepLastDeliveredPieces stores the pieces of the last of the delivered scrapes, for
// LastDeliveredPieces. A piece that belongs to the scrape stored before is added to its pieces. Pieces
// of one scrape have the same time At. A scrape that is older than the stored one is not stored.
func (p *Pusher) keepLastDeliveredPieces(scrapes []Scrape) {
	pieces := p.LastDeliveredPieces()
	for _, sc := range scrapes {
		if len(pieces) > 0 && pieces[0].At != sc.At {
			if pieces[0].At.Since(sc.At) > 0 {
				continue
			}
			pieces = nil
		}
		pieces = append(pieces[:len(pieces):len(pieces)], sc)
	}
	p.lastDelivered.Store(&pieces)
}

// markFailedAndFailOver records an attempt that failed and may be repeated, then continues with the
// next server or pauses. An error ends the drain.
func (d *spoolDrain) markFailedAndFailOver(ctx context.Context, err error) (endsDrain error) {
	d.cfg.Spool.MarkPushFailed(failureReasonOf(err) == pushUnavailable)
	return d.nextServerOrPause(ctx, err)
}

// nextServerOrPause makes the next server current. If all servers of this round have failed, it
// pauses instead. It returns an error, which ends the drain, under the conditions of
// pauseBeforeRound.
func (d *spoolDrain) nextServerOrPause(ctx context.Context, err error) (endsDrain error) {
	failed := d.currentServerURL()
	if isDenied(err) {
		d.servers.avoidDenied(d.cfg.Now())
	}
	if d.servers.advanceAfterFailure(retryAfterOf(err), isDenied(err)) && ctx.Err() == nil {
		d.logFailure(ctx, failed, err, "destination failed; trying the next server", "to", failed)
		d.logDeadline(ctx)
		return nil
	}
	return d.pauseBeforeRound(ctx, err, d.servers.retryAfter)
}

// logFailure logs that an attempt at a server failed. A failure that was logged a short time before
// is logged at level Debug, so that an outage does not fill the log. Each attempt is counted.
func (d *spoolDrain) logFailure(ctx context.Context, server string, err error, message string, args ...any) {
	level := slog.LevelWarn
	if isDenied(err) {
		level = slog.LevelError
	}
	suppressed, ok := d.failures.take(d.cfg.Now(), causeOf(server, err))
	switch {
	case !ok:
		level = slog.LevelDebug
	case suppressed > 0:
		args = append(args, "suppressed", suppressed)
	}
	d.cfg.Log.Log(ctx, level, message, append(args, "err", err)...)
}

// pauseBeforeRound waits before the next round, for at least the smaller of retryAfter and
// MaxRetryAfter. The pauses grow up to a limit until a push succeeds. After a round in which every
// server denied access, the pause is deniedPause. pauseBeforeRound returns an error, which ends the
// drain, if ctx has ended, ends during the pause, or has a deadline before the end of the pause. If
// every server denied access, any deadline ends the drain, because nobody waits for a person to
// act.
func (d *spoolDrain) pauseBeforeRound(ctx context.Context, err error, retryAfter time.Duration) (endsDrain error) {
	d.healthy.Store(false)
	if ctx.Err() != nil {
		return cmp.Or(d.lastErr, err) // err may only report that ctx has ended; lastErr is why the previous round failed
	}
	d.lastErr = err
	pause := d.backoff.nextPause(min(retryAfter, d.cfg.MaxRetryAfter))
	pause += rand.N(pause) // jitter, so that sites whose pushes failed at the same time do not retry at the same time
	denied := isDenied(err) && d.servers.allDenied()
	if denied {
		pause = deniedPause
	}
	kept, part := d.cfg.Spool.Stats().ByState[ScrapeUndelivered].Scrapes, "destination"
	if errors.Is(err, ErrSpoolRead) {
		part = "spool"
	}
	if deadline, ok := ctx.Deadline(); ok && (denied || d.cfg.Now().Add(pause).After(deadline)) {
		d.cfg.Log.Error(part+" failed; scrapes are kept", "scrapes", kept, "err", err)
		return err
	}
	d.logFailure(ctx, d.currentServerURL(), err, part+" failed; scrapes are kept, trying again", "scrapes", kept, "in", pause.Round(time.Millisecond))
	d.logDeadline(ctx)
	if _, ok := Sleep(ctx, pause, d.retryNow); !ok {
		return err
	}
	d.progress.rateBegin, d.progress.rateScrapes = d.cfg.Now(), d.progress.scrapes
	return nil
}

// logDeadline logs after the first failure how long the drain goes on trying, if ctx has a
// deadline.
func (d *spoolDrain) logDeadline(ctx context.Context) {
	if deadline, ok := ctx.Deadline(); ok && !d.deadlineLogged {
		d.deadlineLogged = true
		d.cfg.Log.Info("no server has accepted the scrapes yet; trying again until the time is over", "up_to", deadline.Sub(d.cfg.Now()).Round(time.Second))
	}
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}
