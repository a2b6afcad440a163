package main

// This file implements the load generator of --mode load, which pushes made-up series as many sites
// at once. One goroutine renders bodies and decides which site pushes next; others send. A body is
// rendered once for all sites, so that the generator takes little of the processors that it may share
// with the servers. The sites push in turn, and no two pushes of a site have the same time. A report
// counts every push that was begun. Before the run, one site pushes to each server, so that a mistake
// that would make all pushes fail ends the run at once.

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	loadBodyAge      = time.Second            // a body is used for at most this time
	loadLate         = 100 * time.Millisecond // a push that is later than this shows that the pace is not kept
	loadFailurePause = 100 * time.Millisecond // pause after a push without an answer, so that a server that is down causes no busy loop
)

// LoadConfig configures RunLoad. Interval, FirstSpoolID and Progress may be zero, and so may
// Duration or Pushes.
type LoadConfig struct {
	To           []string      // URLs of the servers; site i pushes to server i modulo their number
	ToClient     *http.Client  // has a timeout, and keeps InFlight connections open
	Tokens       []string      // a client or upload token for each site
	Series       int           // series of each site
	Format       string        // LoadText or LoadProtobuf
	Encoding     string        // LoadIdentity, LoadGzip or LoadSnappy
	FirstSpoolID uint64        // spool ID of site 0; site i has FirstSpoolID+i; 0: the pushes do not name their scrapes
	InFlight     int           // most pushes in flight
	Duration     time.Duration // 0: until each site has pushed Pushes times
	Interval     time.Duration // time between two pushes of a site; 0: as fast as possible
	Pushes       int           // most pushes of each site; 0: no limit
	IsTokenFile  bool          // the token is that of --token-file; otherwise the tokens are signed with --keys
	Progress     io.Writer     // gets a line each second; nil: nobody
}

// loadPush is one push of a site.
type loadPush struct {
	site   int
	number uint64    // number of the scrape
	body   []byte    // shared by several pushes
	due    time.Time // when the push should be sent; zero: at once
}

// loadRun is one call of RunLoad.
type loadRun struct {
	LoadConfig
	begin time.Time // of the run after the first pushes; also determines the numbers of the scrapes

	// These fields belong to the goroutine that runs RunLoad.
	bodies   *loadBodies
	body     []byte
	bodyTime int64         // of the samples in body, in ms since the epoch
	reached  int           // sites that have pushed
	due      time.Duration // when the last push was due, from begin; only with Interval
	sent     time.Duration // when a sender took that push, or the run ended instead

	mu     sync.Mutex // guards report
	report LoadReport
}

// RunLoad pushes until Duration is over, each site has pushed Pushes times, or ctx ends. Pushes that
// are in flight then are completed. With Interval, the pushes of the sites are spread evenly over it,
// and the latency of a push begins when the push is due, so that it includes a wait for one of the
// InFlight. Otherwise it begins when the push is sent. Before that, one site pushes to each server.
// If such a push fails in a way that lasts, nothing else is pushed, and Stopped in the report says why.
func RunLoad(ctx context.Context, cfg LoadConfig) LoadReport {
	l := &loadRun{LoadConfig: cfg, bodies: newLoadBodies(cfg.Series, cfg.Format, cfg.Encoding)}
	l.report.answers, l.report.dropped = map[int]loadAnswers{}, map[string]int64{}
	l.renderBody()
	l.begin = time.Now()
	begin := l.begin
	for l.reached < min(len(l.To), len(l.Tokens)) && ctx.Err() == nil {
		status, err := l.send(ctx, loadPush{site: l.reached, number: uint64(l.begin.UnixMilli()), body: l.body})
		if isLasting(status, err) {
			l.report.Stopped = fmt.Errorf("stopped, because the first push to %s failed: %w", l.To[l.reached], err)
			return l.report
		}
		l.reached++
	}
	l.begin = time.Now()
	runCtx, cancel := context.WithTimeout(ctx, cmp.Or(l.Duration, math.MaxInt64))
	defer cancel()
	pushes := make(chan loadPush)
	var senders sync.WaitGroup
	for range min(cfg.InFlight, len(cfg.Tokens)) {
		senders.Go(func() {
			for p := range pushes {
				l.send(runCtx, p)
			}
		})
	}
	var printer sync.WaitGroup
	if cfg.Progress != nil {
		printer.Go(func() { l.printProgress(runCtx) })
	}
	completed := l.dispatch(runCtx, pushes)
	interrupted := !completed && ctx.Err() != nil
	ran := time.Since(l.begin)
	close(pushes)
	senders.Wait()
	l.report.Took = time.Since(begin)
	cancel()
	printer.Wait()
	l.addNotes(interrupted, ran)
	return l.report
}

// renderBody renders a new body, with the current time.
func (l *loadRun) renderBody() {
	l.bodyTime = time.Now().UnixMilli()
	l.body = l.bodies.next(l.bodyTime)
}

// dispatch sends the pushes of all sites to the channel, each when it is due, except the pushes that
// preceded the run. It returns whether each site has pushed Pushes times; otherwise ctx has ended.
func (l *loadRun) dispatch(ctx context.Context, pushes chan<- loadPush) (completed bool) {
	first := l.reached
	for round := 0; l.Pushes == 0 || round < l.Pushes; round++ {
		for site := range l.Tokens {
			if round == 0 && site < first {
				continue
			}
			p := loadPush{site: site, number: uint64(l.begin.UnixMilli()) + uint64(round)}
			if l.Interval > 0 {
				p.due = l.begin.Add(time.Duration(round)*l.Interval + time.Duration(float64(site)/float64(len(l.Tokens))*float64(l.Interval)))
				if !sleepUntil(ctx, p.due) {
					return false
				}
			}
			if now := time.Now().UnixMilli(); site == 0 || now-l.bodyTime >= loadBodyAge.Milliseconds() {
				if !sleepUntil(ctx, time.UnixMilli(l.bodyTime+1)) {
					return false
				}
				l.renderBody()
			}
			p.body = l.body
			l.due = p.due.Sub(l.begin)
			select {
			case pushes <- p:
				l.sent = time.Since(l.begin)
				l.reached = max(l.reached, site+1)
			case <-ctx.Done():
				l.sent = time.Since(l.begin)
				return false
			}
		}
	}
	return true
}

// addNotes adds to the report what kept the run from being the one that the configuration describes.
// ran is how long the run lasted.
func (l *loadRun) addNotes(interrupted bool, ran time.Duration) {
	note := func(format string, args ...any) {
		l.report.notes = append(l.report.notes, fmt.Sprintf(format, args...))
	}
	if interrupted {
		of := ""
		if l.Duration > 0 {
			of = fmt.Sprintf(" of %g s", l.Duration.Seconds())
		}
		note("interrupted after %g s%s", ran.Round(100*time.Millisecond).Seconds(), of)
	}
	if late := l.sent - l.due; l.Interval > 0 && late > max(l.sent/100, loadLate) {
		rate := float64(len(l.Tokens)) / l.Interval.Seconds()
		round := func(perSecond float64) float64 { return math.Round(perSecond*10) / 10 }
		note("the servers did not keep the pace: %v of %v pushes a second", round(rate*l.due.Seconds()/l.sent.Seconds()), round(rate))
	}
	if silent := len(l.Tokens) - l.reached; silent > 0 {
		why := "the run was too short for them"
		if l.Interval > l.Duration && l.Duration > 0 {
			why = "--duration is shorter than --interval"
		}
		note("%d of %d sites never pushed: %s", silent, len(l.Tokens), why)
	}
}

// sleepUntil waits until t. It returns false if ctx has ended.
func sleepUntil(ctx context.Context, t time.Time) bool {
	Sleep(ctx, time.Until(t), nil)
	return ctx.Err() == nil
}

// send sends p, counts the result and returns it as post does, with what to do about an error. The end
// of ctx does not cut off the request.
func (l *loadRun) send(ctx context.Context, p loadPush) (status int, err error) {
	begin := p.due
	if begin.IsZero() {
		begin = time.Now()
	}
	status, answer, err := l.post(context.WithoutCancel(ctx), p)
	latency := time.Since(begin)
	why := ""
	if err != nil {
		if advice := loadAdvice(status, err.Error(), l.IsTokenFile); advice != "" {
			err = fmt.Errorf("%w; %s", err, advice)
		}
		why = err.Error()
	}
	l.mu.Lock()
	l.report.addPush(len(p.body), status, why, latency)
	if answer != nil {
		l.report.addAnswer(answer)
	}
	l.mu.Unlock()
	if status == noAnswer {
		sleepUntil(ctx, time.Now().Add(loadFailurePause))
	}
	return status, err
}

// isLasting reports whether the result of a push is a failure that does not end by itself: no
// connection can be made, the server is not trusted, or it refuses the push for a reason other than
// its load.
func isLasting(status int, err error) bool {
	var denied *DeniedError
	var op *net.OpError
	if status == noAnswer {
		return errors.As(err, &denied) || errors.Is(err, http.ErrSchemeMismatch) || errors.As(err, &op) && op.Op == "dial"
	}
	return status != http.StatusOK && status != http.StatusTooManyRequests && status/100 != 5
}

// post sends p. It returns the status of the answer, or noAnswer if there is none or a program other
// than telemeter has answered. answer is nil and err says why unless the status is 200.
func (l *loadRun) post(ctx context.Context, p loadPush) (status int, answer *PushAnswer, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, l.To[p.site%len(l.To)]+"/upload", bytes.NewReader(p.body))
	if err != nil {
		return noAnswer, nil, err
	}
	contentType := "text/plain; version=1.0.0; charset=utf-8"
	if l.Format == LoadProtobuf {
		contentType = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
	}
	req.Header = http.Header{"Content-Type": {contentType}, "Authorization": {"Bearer " + l.Tokens[p.site]}}
	if l.Encoding != LoadIdentity {
		req.Header["Content-Encoding"] = []string{l.Encoding}
	}
	if l.FirstSpoolID != 0 {
		names := ScrapeNames{SpoolID: max(1, l.FirstSpoolID+uint64(p.site)), Numbers: Ranges{{From: p.number, To: p.number}}}
		req.Header[SpoolHeader] = []string{names.String()}
	}
	resp, err := l.ToClient.Do(req)
	if errors.Is(err, http.ErrSchemeMismatch) {
		err = fmt.Errorf("%w: write http:// instead of https:// in --to, or correct the port", err)
	}
	if err != nil {
		return noAnswer, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		err = errors.New(describeResponse(resp))
		io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer)) // so that the connection can be used again
		return resp.StatusCode, nil, err
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return noAnswer, nil, fmt.Errorf("reading the answer: %w", err)
	}
	answer = &PushAnswer{}
	if err := json.Unmarshal(body, answer); err != nil || answer.Accepted == nil {
		return noAnswer, nil, &DeniedError{errors.New("the answer is not a telemeter server's"), "check --to"}
	}
	return resp.StatusCode, answer, nil
}

// printProgress prints a line each second until ctx ends.
func (l *loadRun) printProgress(ctx context.Context) {
	pushes, samples := 0, int64(0)
	for second := 1; sleepUntil(ctx, l.begin.Add(time.Duration(second)*time.Second)); second++ {
		l.mu.Lock()
		r := &l.report
		line := fmt.Sprintf("%d s: %s, %d a second, %d samples a second, p99 %s, %d failed\n", second,
			countPushes(r.Pushes), r.Pushes-pushes, r.Samples-samples, formatLatency(r.Latency.Quantile(0.99)), r.Failed())
		pushes, samples = r.Pushes, r.Samples
		l.mu.Unlock()
		io.WriteString(l.Progress, line)
	}
}
