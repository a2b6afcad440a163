package main

// This file fills gaps: it fetches the samples that missing scrapes would have given, oldest first. The
// source is asked for a slice of a gap at a time, and rests after each slice for as long as the slice
// took. So neither memory nor load grows with the length of a gap. Scrapes go on meanwhile.

import (
	"cmp"
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

const (
	sliceSamples = 2_000_000        // samples of the source in a slice, unless a single scrape interval has more
	maxSlice     = 10 * time.Minute // longest slice, unless a single scrape interval is longer
	minSlice     = time.Second      // shortest slice

	growAfter  = 10              // slices without a failure after which a slice may be twice as long
	gapOverlap = 2 * time.Minute // see gapRules; a scrape interval if that is longer

	minRest             = 100 * time.Millisecond // shortest pause after a slice
	firstRetry          = 5 * time.Second        // pause after a failure; it doubles with each further one
	maxRetry            = 5 * time.Minute        // longest such pause
	backfillLogInterval = 30 * time.Second       // time between two log lines about how far filling is
)

// filledSlice is a slice of a gap with its samples, on its way to the goroutine that scrapes, which
// owns the spool's end for new scrapes.
type filledSlice struct {
	slice  gap
	src    *source // that gave the samples
	scrape *CleanedScrape
	taken  chan bool // receives whether the samples are in the spool
}

// backfiller fills the gaps of a client.
type backfiller struct {
	rules         gapRules
	c             *Client
	maxAge        time.Duration    // older parts of gaps are not filled; 0 = nothing is filled
	filled        chan filledSlice // to the goroutine that scrapes
	wake          chan struct{}    // a value is sent when there may be a slice to fetch
	sourceChanged chan struct{}    // a value is sent when another source is in use

	requests, samplesTotal, expired *Counter

	// The next fields are used only by run.
	perMs      float64                       // samples of the source per ms in the last slice; -1 = not known
	sliceLimit time.Duration                 // longest slice, after failures that a shorter slice may avoid; 0 = no such limit
	successes  int                           // slices since the last failure
	external   map[*source]map[string]string // labels that /federate of a source adds, as far as they are known
	log        backfillLog

	mu       sync.Mutex // guards the fields below
	failure  string     // of the last slice; "" if it was fetched
	outage   gap        // from the last scrape before the gaps to the first one after them; zero if there are none
	progress scrapeProgress
	clock    Scrape // At, SourceTime, Shift and Corrected of the newest scrape

	expiryLogged time.Time // when it was logged that missing scrapes are too old; used only by the goroutine that scrapes
}

// newBackfiller returns a backfiller for a client that has scraped what progress says. It fills gaps
// that are at most maxAge old. It also keeps the progress if maxAge is 0.
func newBackfiller(c *Client, maxAge time.Duration, progress scrapeProgress) *backfiller {
	m := c.cfg.Metrics
	b := &backfiller{
		c: c, rules: gapRules{c.cfg.ScrapeInterval.Milliseconds(), max(c.cfg.ScrapeInterval, gapOverlap).Milliseconds(), maxAge.Milliseconds()},
		maxAge: maxAge, progress: progress, perMs: -1, external: map[*source]map[string]string{},
		filled: make(chan filledSlice), wake: make(chan struct{}, 1), sourceChanged: make(chan struct{}, 1),
		requests:     m.Counter("telemeter_backfill_slices_total", "Slices of missing scrapes that were requested from the query API of the source, by result.", "result"),
		samplesTotal: m.Counter("telemeter_backfill_samples_total", "Samples of missing scrapes that were fetched from the query API of the source and put into the spool."),
		expired:      m.Counter("telemeter_backfill_expired_seconds_total", "Time whose scrapes are missing and are not fetched any more, because they are older than --backfill."),
	}
	for _, result := range []string{"ok", "failed"} {
		b.requests.Add(0, result)
	}
	pending := m.Gauge("telemeter_backfill_pending_seconds", "Time whose samples are still to be fetched from the source, because scrapes are missing.")
	m.OnCollect(func() { pending.Set(b.pending().Seconds()) })
	return b
}

// notify sends a value to c unless one waits there.
func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// pending returns the length of all gaps.
func (b *backfiller) pending() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return time.Duration(b.progress.pending()) * time.Millisecond
}

// lastFailure returns why the last slice could not be fetched; "" if it was fetched.
func (b *backfiller) lastFailure() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.failure
}

func (b *backfiller) setFailure(text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failure = text
}

// clockChanged makes the progress refer to another clock, which is ahead by ms.
func (b *backfiller) clockChanged(ms int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress = b.progress.shifted(ms)
}

// scraped records a successful scrape. If IsBehind is set, the scrape is not recorded, so that the next
// scrape with newer samples leaves a gap.
func (b *backfiller) scraped(got *CleanedScrape) {
	if got.IsBehind {
		return
	}
	b.mu.Lock()
	progress, expired := b.progress.scraped(got.SourceTime, cmp.Or(got.Newest, got.SourceTime), sourceID(b.c.sources.inUse().url), b.rules)
	if len(progress.Gaps) > 0 && b.outage.To == 0 {
		b.outage = gap{b.progress.Last, got.SourceTime}
		if len(b.progress.Gaps) > 0 { // of an earlier process
			b.outage.From = b.progress.Gaps[0].From
		}
	}
	b.progress, b.clock = progress, got.Pieces[0]
	b.clock.Gzip = nil
	b.mu.Unlock()
	if expired > 0 && b.maxAge > 0 {
		b.expired.Add(float64(expired) / 1000)
		if now := b.c.cfg.Now(); now.Sub(b.expiryLogged) >= failureLogInterval {
			b.expiryLogged = now
			b.c.cfg.Log.Warn("missing scrapes are older than --backfill, so their samples are not fetched", "missing", time.Duration(expired)*time.Millisecond, "backfill", b.maxAge)
		}
	}
	b.c.spool.SaveProgress(progress)
	notify(b.wake)
}

// nextSlice returns the slice to fetch next. ok is false if there is none, or if no scrape has shown
// the source's clock yet.
func (b *backfiller) nextSlice() (slice gap, ok bool) {
	step := b.c.cfg.ScrapeInterval.Milliseconds()
	length := max(step, maxSlice.Milliseconds()/step*step)
	switch {
	case b.perMs < 0:
		length = step
	case b.perMs > 0:
		length = max(step, min(length, int64(sliceSamples/b.perMs)/step*step))
	}
	if b.sliceLimit > 0 {
		length = min(length, b.sliceLimit.Milliseconds())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.clock.SourceTime == 0 {
		return gap{}, false
	}
	return b.progress.firstSlice(length)
}

// run fetches slices until ctx ends.
func (b *backfiller) run(ctx context.Context) {
	for {
		slice, ok := b.nextSlice()
		if !ok {
			b.logEnd()
			b.sliceLimit = 0
			clear(b.external) // a source may have other labels when scrapes are missing again
			if _, alive := Sleep(ctx, maxRetry, b.wake); !alive {
				return
			}
			continue
		}
		b.logProgress()
		wait := b.fill(ctx, slice)
		changed, alive := Sleep(ctx, wait, b.sourceChanged)
		if !alive {
			return
		}
		if changed { // failures of the last source say nothing about this one
			b.log.noAPI, b.log.failed, b.log.failures, b.sliceLimit, b.perMs = false, false, 0, 0, -1
		}
	}
}

// fill fetches a slice, and waits until its samples are in the spool. It returns how long to wait
// before the next slice.
func (b *backfiller) fill(ctx context.Context, slice gap) (wait time.Duration) {
	if !b.c.spool.HasRoom() { // the source keeps the samples better
		return b.c.cfg.ScrapeInterval
	}
	begin := b.c.cfg.Now()
	done, err := b.fetch(ctx, slice)
	rest := max(minRest, b.c.cfg.Now().Sub(begin))
	switch {
	case ctx.Err() != nil:
		return 0
	case err != nil:
		b.requests.Inc("failed")
		b.successes = 0
		if b.shorten(slice, err) && isTooMuch(err) {
			return rest
		}
		return b.logFailure(err)
	}
	b.requests.Inc("ok")
	select {
	case b.filled <- done:
	case <-ctx.Done():
		return 0
	}
	if <-done.taken {
		b.samplesTotal.Add(float64(done.scrape.Samples))
		b.log.samples += done.scrape.Samples
	}
	b.log.failures = 0
	b.setFailure("")
	if b.successes++; b.successes%growAfter == 0 {
		b.sliceLimit *= 2
	}
	return rest
}

// isTooMuch reports whether a request for a slice failed with err because the slice has too many
// samples.
func isTooMuch(err error) bool {
	refused := new(apiError)
	return errors.Is(err, errAnswerTooLarge) || errors.As(err, &refused) && refused.Type != "unavailable"
}

// shorten makes the next slices shorter than slice, and reports whether that is possible and may avoid
// the failure err. A slice that is shorter than a scrape interval yields more samples than the missing
// scrapes would have given, so it is tried only if the answer was too much for the source or for this
// client.
func (b *backfiller) shorten(slice gap, err error) bool {
	least := minSlice
	switch {
	case isTooMuch(err), errors.Is(err, context.DeadlineExceeded):
	case errors.Is(err, io.ErrUnexpectedEOF): // the source may have died
		least = b.c.cfg.ScrapeInterval
	default:
		return false
	}
	if slice.length() <= least {
		return false
	}
	b.sliceLimit = max(least, slice.length()/2)
	return true
}

// removeGap records that the samples of a slice are in the spool, and returns the new progress.
func (b *backfiller) removeGap(slice gap) scrapeProgress {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.progress = b.progress.without(slice)
	return b.progress
}

// spoolSlicesFor puts filled slices into the spool for the time wait. It returns false if ctx ended
// before.
func (c *Client) spoolSlicesFor(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case f := <-c.backfiller.filled:
			// After a change of the source, the gap may begin elsewhere, by another clock.
			isTaken := f.src == c.sources.inUse()
			if isTaken {
				if f.scrape.Samples > 0 {
					c.addToSpool(f.scrape)
				}
				c.spool.SaveProgress(c.backfiller.removeGap(f.slice))
			}
			f.taken <- isTaken
		}
	}
}

// backfillLog is the state of the log lines about filling.
type backfillLog struct {
	begin, last time.Time // of filling, and of the last line; zero if nothing is being filled
	samples     int       // since begin
	failures    int       // in a row
	failed      bool      // a failure was logged since begin
	noAPI       bool      // it was logged since begin that the source has no query API
}

// logProgress logs that filling has begun, and then how far it is, at most once in
// backfillLogInterval.
func (b *backfiller) logProgress() {
	now := b.c.cfg.Now()
	if now.Sub(b.log.last) < backfillLogInterval {
		return
	}
	b.log.last = now
	if b.log.begin.IsZero() {
		b.log.begin = now
		b.mu.Lock()
		outage := b.outage
		b.mu.Unlock()
		b.c.cfg.Log.Info("scrapes are missing; their samples are fetched from the source", "missing", outage.length(), "since", time.UnixMilli(outage.From).UTC())
		return
	}
	b.c.cfg.Log.Info("fetching the samples of missing scrapes from the source", "left", b.pending(), "samples", b.log.samples)
}

// logEnd logs the end of filling, unless it ended because what was missing has become too old.
func (b *backfiller) logEnd() {
	if b.log.begin.IsZero() {
		return
	}
	if b.log.failures == 0 {
		b.c.cfg.Log.Info("the samples of missing scrapes are fetched", "samples", b.log.samples, "took", b.c.cfg.Now().Sub(b.log.begin).Round(time.Millisecond))
	}
	b.log = backfillLog{}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failure, b.outage = "", gap{}
}

// logFailure logs a failed request, unless one like it was logged since filling began. It returns how
// long to wait before the next request.
func (b *backfiller) logFailure(err error) time.Duration {
	b.log.failures++
	b.setFailure(err.Error())
	switch noAPI := errors.Is(err, errNoAPIAnswer); {
	case noAPI && !b.log.noAPI:
		b.log.noAPI = true
		b.c.cfg.Log.Warn("the source does not answer queries, so the samples of missing scrapes cannot be fetched: permit /api/v1/query beside /federate, or set --backfill 0", "err", err)
	case !noAPI && !b.log.failed:
		b.log.failed = true
		b.c.cfg.Log.Warn("fetching the samples of missing scrapes failed; it is tried again", "err", err)
	}
	return min(maxRetry, firstRetry<<min(b.log.failures-1, 10))
}
