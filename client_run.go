package main

// The client has two loops: one scrapes, the other pushes. Each works at the site's phase, an
// instant of its interval that depends on the cluster ID. A due push waits at most pushGrace for a
// scrape, and a scrape never waits for a push. Failures of the source, the spool and the
// destination are logged separately; see failureLog for a source that keeps failing.

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
	firstJitter      = time.Second      // the first scrape is delayed by a random time below this
	minScrapeTimeout = 10 * time.Second // shortest timeout of a scrape, even if ScrapeInterval is shorter
	maxScrapeTimeout = time.Minute      // longest timeout of a scrape, even if ScrapeInterval is longer
	pushGrace        = 2 * time.Second  // how long a due push waits for a scrape
	finalPushTimeout = 5 * time.Second  // timeout of the last push at shutdown, which is made only if scrapes are in memory only
)

// Run scrapes and pushes until ctx ends. It starts within firstJitter. Then it works at this site's
// phase of the interval, so that many sites that start together do not push together. A backlog is
// pushed without waiting for the phase. When ctx has ended, Run tries once more to push if scrapes
// are in memory only. It always returns nil.
func (c *Client) Run(ctx context.Context) error {
	due := make(chan struct{}, 1) // a value is sent when a push is due and its newest scrape is in the spool
	var wg sync.WaitGroup
	wg.Go(func() { c.scrapeLoop(ctx, due) })
	if len(c.sources.all) > 1 && c.canBackfill() {
		wg.Go(func() { c.compareReplicas(ctx) })
	}
	if c.backfiller.maxAge > 0 {
		wg.Go(func() { c.backfiller.run(ctx) })
	}
	c.deliverLoop(ctx, due)
	wg.Wait()
	if c.spool.Stats().InMemory > 0 {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), finalPushTimeout)
		defer cancel()
		c.pusher.DrainSpool(last) // the error can be ignored, because DrainSpool logs every failure but repeated declines and the end of ctx
	}
	return nil
}

// ScrapeOnceAndDrain scrapes once and pushes all scrapes in the spool, retrying until ctx ends. It
// pushes even if the scrape fails. Failures are logged and counted. Failures of the source and of
// DrainSpool are returned. Each of these errors begins with the part that failed: source, spool or
// destination.
func (c *Client) ScrapeOnceAndDrain(ctx context.Context) error {
	err := c.scrapeAndSpool(ctx)
	begin := c.cfg.Now()
	if err != nil {
		err = fmt.Errorf("source: %w", err)
	}
	if e := c.pusher.DrainSpool(ctx); e != nil {
		st, part := c.spool.Stats(), "destination"
		if errors.Is(e, ErrSpoolRead) {
			part = "spool"
		}
		err = errors.Join(err, fmt.Errorf("%s: failed after %v: %w (scrapes kept in the spool: %d, in memory only: %d)",
			part, c.cfg.Now().Sub(begin).Round(time.Millisecond), e, st.ByState[ScrapeUndelivered].Scrapes-st.InMemory, st.InMemory))
	}
	return err
}

// scrapeLoop scrapes at the site's phase of ScrapeInterval until ctx ends. If a push must follow a
// scrape (see scrapeStartsPush), scrapeLoop sends a value to pushDue.
func (c *Client) scrapeLoop(ctx context.Context, pushDue chan<- struct{}) {
	var warned, nextPush time.Time
	wait := rand.N(firstJitter)
	for {
		if !c.spoolSlicesFor(ctx, wait) {
			return
		}
		begin := c.cfg.Now()
		if at := c.state.Load().TokenExpires; at != 0 && begin.Add(expiryWarning).Unix() > at && begin.Sub(warned) > 24*time.Hour {
			level, message := slog.LevelWarn, "the client token expires soon; servers will refuse this site afterwards: "+RenewToken
			if begin.Unix() >= at {
				level, message = slog.LevelError, "the client token has expired, so servers refuse this site: "+RenewToken
			}
			c.cfg.Log.Log(ctx, level, message, "at", time.Unix(at, 0).UTC())
			warned = begin
		}
		if c.scrapeAndSpool(ctx) == nil {
			var starts bool
			if starts, nextPush = c.scrapeStartsPush(begin, nextPush); starts {
				notify(pushDue)
			}
		}
		next := begin.Add(c.untilNextPhase(begin, c.cfg.ScrapeInterval))
		for next.Before(c.cfg.Now()) { // after a slow scrape, skip the scrapes whose time has passed, to keep the phase
			next = next.Add(c.cfg.ScrapeInterval)
		}
		wait = next.Sub(c.cfg.Now())
	}
}

// scrapeStartsPush reports whether a push must follow the scrape that began at scrapeBegin. It is
// called only for successful scrapes. The next push is due at nextPush, which is zero at the first
// call. A push follows the first scrape. After that, a push follows the first scrape that begins at
// most half of ScrapeInterval before nextPush, or later. newNextPush replaces nextPush in the next
// call.
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

// deliverLoop pushes when a value is received from pushDue. Without such a value, it pushes
// pushGrace after each instant of the site's phase of Interval, so that a hanging source does not
// delay the scrapes in the spool.
func (c *Client) deliverLoop(ctx context.Context, pushDue <-chan struct{}) {
	for {
		wait := c.untilNextPhase(c.cfg.Now().Add(-pushGrace), c.cfg.Interval)
		if _, ok := Sleep(ctx, wait, pushDue); !ok {
			return
		}
		c.pusher.DrainSpool(ctx) // the error can be ignored, because DrainSpool logs every failure but repeated declines and the end of ctx
	}
}

// untilNextPhase returns the time from now until the next instant of this site's phase of interval.
// The phase is an offset in the interval that is a hash of the cluster ID. An instant that is less
// than a tenth of the interval ahead is skipped. It was probably reached already: a slewed wall
// clock can lag behind the timer that waited for the instant.
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

// scrapeAndSpool scrapes the source and puts the samples into the spool. Failures are counted. A
// failure of the source is logged unless ctx was canceled. Only a failure of the source is
// returned, because a scrape that cannot be written to disk stays in memory.
func (c *Client) scrapeAndSpool(ctx context.Context) (sourceErr error) {
	begin := c.cfg.Now()
	got, err := c.scrapeAny(ctx)
	if err != nil {
		c.scrapedOK.Store(false)
		c.setSourceFailed(err, c.cfg.Now())
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			c.logSourceFailure(ctx, err)
		}
		return err
	}
	c.scrapedOK.Store(true)
	c.setScraped(got, begin)
	if o := c.sourceOutage; o.logged {
		c.cfg.Log.Info("source works again", "failed", o.failures, "lasted", c.cfg.Now().Sub(o.begin).Round(time.Second))
	}
	c.sourceOutage = outage{}
	c.LogUnmatchedFlags(got)
	c.addToSpool(got)
	c.backfiller.scraped(got)
	return nil
}

// logSourceFailure logs a failed scrape at level Error, or at level Debug if its text was logged a
// short time before.
func (c *Client) logSourceFailure(ctx context.Context, err error) {
	now, level := c.cfg.Now(), slog.LevelDebug
	args := []any{"from", c.sources.inUse().url.Redacted()}
	suppressed, logNow := c.sourceFailures.take(now, withoutLocalEnds(err.Error()))
	if logNow {
		level = slog.LevelError
	}
	if suppressed > 0 {
		args = append(args, "suppressed", suppressed)
	}
	c.sourceOutage.addFailure(now, logNow)
	c.cfg.Log.Log(ctx, level, "source failed", append(args, "err", err)...)
}

// addToSpool puts the pieces of a scrape into the spool. It logs when
// Spool.Add begins to fail and when it succeeds again.
func (c *Client) addToSpool(got *CleanedScrape) {
	var err error
	for _, piece := range got.Pieces {
		err = errors.Join(err, c.spool.Add(piece))
	}
	switch {
	case err != nil:
		c.spoolErrors.Inc()
		if !c.spoolFailing {
			c.cfg.Log.Error("spool failed; scrapes are kept in memory, up to its limit", "err", err)
		}
	case c.spoolFailing:
		c.cfg.Log.Info("spool works again")
	}
	c.spoolFailing = err != nil
}
