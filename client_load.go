package main

// This file implements the load generator of --mode load, which pushes made-up series as many sites
// at once. One goroutine renders bodies and decides which site pushes next; others send. A body is
// rendered once for all sites, so that the generator takes little of the processors that it may share
// with the servers. The sites push in turn, and no two pushes of a site have the same time. A report
// counts every push that was begun.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

const (
	loadBodyAge      = time.Second            // a body is used for at most this time
	loadFailurePause = 100 * time.Millisecond // pause after a push without an answer, so that a server that is down causes no busy loop
)

// LoadConfig configures RunLoad. Interval, Pushes, FirstSpoolID and Progress may be zero.
type LoadConfig struct {
	To           []string     // URLs of the servers; site i pushes to server i modulo their number
	ToClient     *http.Client // has a timeout, and keeps InFlight connections open
	Tokens       []string     // a client or upload token for each site
	Series       int          // series of each site
	Format       string       // LoadText or LoadProtobuf
	Encoding     string       // LoadIdentity, LoadGzip or LoadSnappy
	FirstSpoolID uint64       // spool ID of site 0; site i has FirstSpoolID+i; 0: the pushes do not name their scrapes
	InFlight     int          // most pushes in flight
	Duration     time.Duration
	Interval     time.Duration // time between two pushes of a site; 0: as fast as possible
	Pushes       int           // most pushes of each site; 0: no limit
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
	begin time.Time // also determines the numbers of the scrapes

	mu     sync.Mutex // guards report
	report LoadReport
}

// RunLoad pushes until Duration is over, each site has pushed Pushes times, or ctx ends. Pushes that
// are in flight then are completed. With Interval, the pushes of the sites are spread evenly over it,
// and the latency of a push begins when the push is due, so that it includes a wait for one of the
// InFlight. Otherwise it begins when the push is sent.
func RunLoad(ctx context.Context, cfg LoadConfig) LoadReport {
	l := &loadRun{LoadConfig: cfg, begin: time.Now()}
	l.report.answers, l.report.dropped = map[int]loadAnswers{}, map[string]int64{}
	ctx, cancel := context.WithTimeout(ctx, cfg.Duration)
	defer cancel()
	pushes := make(chan loadPush)
	var senders sync.WaitGroup
	for range min(cfg.InFlight, len(cfg.Tokens)) {
		senders.Go(func() {
			for p := range pushes {
				l.send(ctx, p)
			}
		})
	}
	var printer sync.WaitGroup
	if cfg.Progress != nil {
		printer.Go(func() { l.printProgress(ctx) })
	}
	l.dispatch(ctx, pushes)
	close(pushes)
	senders.Wait()
	l.report.Took = time.Since(l.begin)
	cancel()
	printer.Wait()
	return l.report
}

// dispatch sends the pushes of all sites to the channel, each when it is due.
func (l *loadRun) dispatch(ctx context.Context, pushes chan<- loadPush) {
	bodies := newLoadBodies(l.Series, l.Format, l.Encoding)
	var body []byte
	var bodyTime int64 // of the samples in body, in ms since the epoch
	for round := 0; l.Pushes == 0 || round < l.Pushes; round++ {
		for site := range l.Tokens {
			p := loadPush{site: site, number: uint64(l.begin.UnixMilli()) + uint64(round)}
			if l.Interval > 0 {
				p.due = l.begin.Add(time.Duration(round)*l.Interval + time.Duration(float64(site)/float64(len(l.Tokens))*float64(l.Interval)))
				if !sleepUntil(ctx, p.due) {
					return
				}
			}
			if now := time.Now().UnixMilli(); site == 0 || now-bodyTime >= loadBodyAge.Milliseconds() {
				if !sleepUntil(ctx, time.UnixMilli(bodyTime+1)) {
					return
				}
				bodyTime = time.Now().UnixMilli()
				body = bodies.next(bodyTime)
			}
			p.body = body
			select {
			case pushes <- p:
			case <-ctx.Done():
				return
			}
		}
	}
}

// sleepUntil waits until t. It returns false if ctx has ended.
func sleepUntil(ctx context.Context, t time.Time) bool {
	Sleep(ctx, time.Until(t), nil)
	return ctx.Err() == nil
}

// send sends p and counts the result. The end of ctx does not cut off the request.
func (l *loadRun) send(ctx context.Context, p loadPush) {
	begin := p.due
	if begin.IsZero() {
		begin = time.Now()
	}
	status, answer, err := l.post(context.WithoutCancel(ctx), p)
	latency := time.Since(begin)
	why := ""
	if err != nil {
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
		return noAnswer, nil, errors.New("the answer is not a telemeter server's: check --to")
	}
	return resp.StatusCode, answer, nil
}

// printProgress prints a line each second until ctx ends.
func (l *loadRun) printProgress(ctx context.Context) {
	pushes, samples := 0, int64(0)
	for second := 1; sleepUntil(ctx, l.begin.Add(time.Duration(second)*time.Second)); second++ {
		l.mu.Lock()
		r := &l.report
		line := fmt.Sprintf("%d s: %d pushes, %d a second, %d samples a second, p99 %v, %d failed\n", second,
			r.Pushes, r.Pushes-pushes, r.Samples-samples, r.Latency.Quantile(0.99).Round(10*time.Microsecond), r.Failed())
		pushes, samples = r.Pushes, r.Samples
		l.mu.Unlock()
		io.WriteString(l.Progress, line)
	}
}
