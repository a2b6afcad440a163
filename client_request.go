package main

// One request of a delivery: the headers of a push and of a question, the exchange of tokens,
// and the meaning of their answers. An answer that is not a server's counts as none. A refusal
// is final only if it is about the samples. This file does not choose what is sent next.

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const maxAnswer = 256 << 10 // two lists of MaxRanges, and one of MaxConsumers

// pushError is why an attempt failed.
type pushError struct {
	err     error
	final   bool          // another attempt would fail as well
	large   bool          // but smaller ones may not
	refused bool          // the server took nothing, for now
	retry   time.Duration // asked for by the server
}

func (e *pushError) Error() string { return e.err.Error() }
func (e *pushError) Unwrap() error { return e.err }

// failed makes a pushError of an attempt's error, and counts it; nil stays nil.
func (p *Pusher) failed(err error) *pushError {
	if err == nil {
		return nil
	}
	p.pushes.Inc("failed")
	var e *pushError
	if !errors.As(err, &e) {
		e = &pushError{err: err}
	}
	return e
}

// request sends a push, or a question if newest is nil, to one server. An upload token
// that is refused is replaced once: keys rotate, and clocks differ.
func (p *Pusher) request(ctx context.Context, to string, names ScrapeNames, newest *Scrape, body []byte) (got PushAnswer, answer SpoolAnswer, err error) {
	for {
		fresh, err := p.authorize(ctx, to)
		if err != nil {
			return got, answer, err
		}
		resp, err := p.post(ctx, to, "/upload", p.uploadToken, body, p.header(names, newest))
		if err != nil {
			return got, answer, fmt.Errorf("pushing: %w", err)
		}
		err = judge(resp, to+"/upload", p.cfg.Now())
		if err == nil {
			got, answer, err = p.read(resp.Body, to)
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusUnauthorized && !fresh {
			p.uploadToken = ""
			continue
		}
		return got, answer, err
	}
}

// header returns what a push tells beside its samples.
func (p *Pusher) header(names ScrapeNames, newest *Scrape) http.Header {
	h := http.Header{"Content-Type": {"text/plain; version=1.0.0; charset=utf-8"}}
	if names.ID != 0 {
		h.Set(SpoolHeader, names.String())
		if all := p.cfg.Spool.Consumers(); len(all) > 0 {
			h.Set(ConsumersHeader, FormatConsumers(all))
		}
	}
	if newest == nil {
		return h
	}
	h.Set("Content-Encoding", "gzip")
	if ms, known := p.cfg.Clocks.Error(newest.At, newest.Source); known {
		h.Set(ClockOffsetHeader, strconv.FormatInt(ms, 10))
		p.offset.Set(float64(ms) / 1000)
	}
	return h
}

// read reads the body of a 200.
func (p *Pusher) read(body io.Reader, to string) (got PushAnswer, answer SpoolAnswer, err error) {
	if err := json.NewDecoder(io.LimitReader(body, maxAnswer)).Decode(&got); err != nil {
		return got, answer, fmt.Errorf("pushing to %s: its answer is not JSON: %w", to, err)
	}
	if got.Accepted == nil { // anything else that answers 200 has stored nothing
		return got, answer, fmt.Errorf("pushing to %s: its answer does not say what it accepted", to)
	}
	answer = SpoolAnswer{To: to, Known: got.Held != nil, End: got.Read == nil}
	if answer.Known {
		var errs [3]error
		answer.Held, errs[0] = ParseRanges(*got.Held, MaxRanges)
		if got.Read != nil {
			answer.Read, errs[1] = ParseRanges(*got.Read, MaxRanges)
		}
		answer.Consumers, errs[2] = ParseConsumers(got.Consumers)
		if err := errors.Join(errs[:]...); err != nil {
			return got, answer, fmt.Errorf("pushing to %s: its answer is malformed: %w", to, err)
		}
	}
	p.cfg.Clocks.Hear(cmp.Or(got.Server, to), got.Time, p.cfg.Moment())
	return got, answer, nil
}

// authorized makes sure that there is an upload token, before anything is made ready to
// be pushed.
func (p *Pusher) authorized(ctx context.Context, r *round) *pushError {
	_, err := p.authorize(ctx, p.cfg.To[r.at])
	return p.failed(err)
}

// authorize exchanges the client token for an upload token, unless there is a good one.
// fresh says that it is new.
func (p *Pusher) authorize(ctx context.Context, to string) (fresh bool, err error) {
	token := p.cfg.Token()
	if p.uploadToken != "" && p.uploadFor == token && p.cfg.Now().Before(p.refresh) {
		return false, nil
	}
	resp, err := p.post(ctx, to, "/authorize?id="+url.QueryEscape(p.cfg.Cluster), token, nil, http.Header{})
	if err != nil {
		return false, fmt.Errorf("authorizing: %w", err)
	}
	defer resp.Body.Close()
	if err := judge(resp, to+"/authorize", p.cfg.Now()); err != nil {
		if e := (*pushError)(nil); errors.As(err, &e) {
			e.final, e.large = false, false // it says nothing of the scrapes
		}
		return false, err
	}
	var got struct {
		Version          int
		Token            string
		ExpiresInSeconds int64
		Server           string // as in PushAnswer
		Time             int64
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&got); err != nil || got.Version != 1 || got.Token == "" {
		return false, fmt.Errorf("authorizing at %s: its answer is not an upload token", to)
	}
	p.cfg.Clocks.Hear(cmp.Or(got.Server, to), got.Time, p.cfg.Moment())
	p.uploadToken, p.uploadFor = got.Token, token
	// Well before it expires; the time is measured here, no clock is compared.
	p.refresh = p.cfg.Now().Add(time.Duration(got.ExpiresInSeconds) * time.Second * 4 / 5)
	return true, nil
}

func (p *Pusher) post(ctx context.Context, to, path, token string, b []byte, header http.Header) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to+path, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	req.Header = header
	req.Header.Set("Authorization", "Bearer "+token)
	return p.cfg.ToClient.Do(req)
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
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		e.refused = true
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
