package main

// The client's loops: when it scrapes, and when it delivers. Both go on at the site's phase of
// their interval, whatever becomes of the other. Failures of source, spool and destination are
// logged apart, a source that goes on failing at most once in ten minutes.

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	firstJitter       = time.Second
	minScrapeTimeout  = 10 * time.Second
	maxScrapeTimeout  = time.Minute
	pushGrace         = 2 * time.Second  // how long a push that is due waits for a scrape under way
	finalPushTimeout  = 5 * time.Second  // at the end, for scrapes in memory only
	sourceLogInterval = 10 * time.Minute // between log lines of a source that goes on failing
)

// Run scrapes and delivers until ctx ends: first at once, then whenever the clock
// is at this site's phase of the interval, so that the pushes of many sites
// that start together spread. A backlog is delivered without waiting for that.
func (c *Client) Run(ctx context.Context) error {
	due := make(chan struct{}, 1) // the scrape that a push waits for is spooled
	var wg sync.WaitGroup
	wg.Go(func() { c.scrapeLoop(ctx, due) })
	c.deliverLoop(ctx, due)
	wg.Wait()
	if c.spool.Stats().InMemory > 0 {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), finalPushTimeout)
		defer cancel()
		c.pusher.DrainSpool(last) // logs what fails
	}
	return nil
}

// ScrapeOnceAndDrain scrapes once, and delivers all that is spooled, retrying until ctx ends.
// Failures are logged and counted, and returned. Each begins with the name of the part that
// failed: source, spool or destination.
func (c *Client) ScrapeOnceAndDrain(ctx context.Context) error {
	err := c.scrapeAndSpool(ctx)
	if err != nil {
		err = fmt.Errorf("source: %w", err)
	}
	if e := c.pusher.DrainSpool(ctx); e != nil {
		st, part := c.spool.Stats(), "destination"
		if errors.Is(e, ErrSpoolRead) {
			part = "spool"
		}
		err = errors.Join(err, fmt.Errorf("%s: %w (scrapes kept in the spool: %d, in memory only: %d)", part, e, st.ByState[ScrapeUndelivered].Scrapes-st.InMemory, st.InMemory))
	}
	return err
}

// scrapeLoop scrapes at its phase, and sends to pushDue when a scrape starts a push.
func (c *Client) scrapeLoop(ctx context.Context, pushDue chan<- struct{}) {
	var warned, nextPush time.Time
	wait := rand.N(firstJitter)
	for {
		if _, ok := Sleep(ctx, wait, nil); !ok {
			return
		}
		begin := c.cfg.Now()
		if at := c.state.Load().TokenExpires; at != 0 && begin.Add(expiryWarning).Unix() > at && begin.Sub(warned) > 24*time.Hour {
			c.cfg.Log.Warn("the token expires soon; this site is silent afterwards", "at", time.Unix(at, 0).UTC())
			warned = begin
		}
		if c.scrapeAndSpool(ctx) == nil {
			var starts bool
			if starts, nextPush = c.scrapeStartsPush(begin, nextPush); starts {
				select {
				case pushDue <- struct{}{}:
				default:
				}
			}
		}
		next := begin.Add(c.untilNextPhase(begin, c.cfg.ScrapeInterval))
		for next.Before(c.cfg.Now()) { // a slow source costs scrapes, not their phase
			next = next.Add(c.cfg.ScrapeInterval)
		}
		wait = next.Sub(c.cfg.Now())
	}
}

// scrapeStartsPush reports whether the scrape that began at scrapeBegin starts the push that
// is due at nextPush, and returns when the push after it is due. The first scrape starts a push at
// any time; after it, the scrape nearest to nextPush does.
func (c *Client) scrapeStartsPush(scrapeBegin, nextPush time.Time) (starts bool, newNextPush time.Time) {
	half := scrapeBegin.Add(c.cfg.ScrapeInterval / 2)
	switch {
	case nextPush.IsZero():
		return true, scrapeBegin.Add(c.untilNextPhase(scrapeBegin, c.cfg.Interval))
	case half.Before(nextPush):
		return false, nextPush
	}
	return true, half.Add(c.untilNextPhase(half, c.cfg.Interval))
}

// deliverLoop delivers when pushDue receives. It also delivers at the phase of pushes by itself, so
// that a source that hangs does not delay the scrapes in the spool.
func (c *Client) deliverLoop(ctx context.Context, pushDue <-chan struct{}) {
	for {
		wait := c.untilNextPhase(c.cfg.Now().Add(-pushGrace), c.cfg.Interval)
		if _, ok := Sleep(ctx, wait, pushDue); !ok {
			return
		}
		c.pusher.DrainSpool(ctx) // logs what fails
	}
}

// untilNextPhase returns the time until this site's phase of an interval comes
// next. One that is about to come counts as reached: a wall clock that is slewed
// lags behind the timer that was to wait for it.
func (c *Client) untilNextPhase(now time.Time, interval time.Duration) time.Duration {
	h := fnv.New64a()
	io.WriteString(h, c.cfg.ClusterID)
	phase := time.Duration(h.Sum64() % uint64(interval))
	wait := interval - (time.Duration(now.UnixNano())-phase)%interval
	if wait < interval/10 {
		wait += interval
	}
	return wait
}

// scrapeAndSpool scrapes, and spools the samples. Failures are logged and counted. Only the
// source's is returned, because a scrape that cannot be written is kept in memory.
func (c *Client) scrapeAndSpool(ctx context.Context) (sourceErr error) {
	limited, cancel := context.WithTimeout(ctx, min(max(c.cfg.ScrapeInterval, minScrapeTimeout), maxScrapeTimeout))
	defer cancel()
	got, err := c.Scrape(limited)
	if err != nil {
		c.scrapedOK.Store(false)
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			c.logSourceFailure(ctx, err)
		}
		return err
	}
	c.scrapedOK.Store(true)
	if c.sourceFailures > 0 {
		c.cfg.Log.Info("source works again", "failed", c.sourceFailures)
		c.sourceFailures = 0
	}
	got.Shift, got.ShiftKnown = c.sourceClock.NextShift(got.At, got.SourceTime)
	c.addToSpool(got)
	return nil
}

func (c *Client) logSourceFailure(ctx context.Context, err error) {
	level := slog.LevelDebug
	if now := c.cfg.Now(); c.sourceFailures == 0 || now.Sub(c.sourceLogged) >= sourceLogInterval {
		level, c.sourceLogged = slog.LevelError, now
	}
	c.sourceFailures++
	c.cfg.Log.Log(ctx, level, "source failed", "from", c.cfg.From.Redacted(), "err", err)
}

// addToSpool spools a scrape, in pieces if limits need it, and logs when the spool begins or ends
// to fail.
func (c *Client) addToSpool(got *CleanedScrape) {
	var err error
	for _, piece := range c.renderPieces(got, got.List.Samples) {
		err = errors.Join(err, c.spool.Add(piece))
	}
	switch {
	case err != nil:
		c.spoolErrors.Inc()
		if !c.spoolFailing {
			c.cfg.Log.Error("spool failed; scrapes are held in memory, as far as it allows", "err", err)
		}
	case c.spoolFailing:
		c.cfg.Log.Info("spool works again")
	}
	c.spoolFailing = err != nil
}
