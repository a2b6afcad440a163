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
	"slices"
	"strconv"
	"strings"
	"time"
)

const maxAnswer = 256 << 10 // bytes: two lists of MaxRanges, and one of MaxConsumers

// pushFailureReason is why a push failed; it decides what follows.
type pushFailureReason int

const (
	pushNoAnswer    pushFailureReason = iota // the server may have stored the push or not
	pushUnavailable                          // the server stored nothing, but may accept the push later
	pushInvalid                              // every server refuses these samples
	pushTooLarge                             // every server refuses this push, but not a smaller one
)

// pushError is an answer other than 200.
type pushError struct {
	err        error
	reason     pushFailureReason
	retryAfter time.Duration // the server asked not to be tried before
}

func (e *pushError) Error() string { return e.err.Error() }
func (e *pushError) Unwrap() error { return e.err }

// failureReasonOf returns the reason of a pushError, and pushNoAnswer for any other error.
func failureReasonOf(err error) pushFailureReason {
	if e := (*pushError)(nil); errors.As(err, &e) {
		return e.reason
	}
	return pushNoAnswer
}

// retryAfterOf returns for how long the server asked to wait; 0 if it did not ask.
func retryAfterOf(err error) time.Duration {
	if e := (*pushError)(nil); errors.As(err, &e) {
		return e.retryAfter
	}
	return 0
}

// isFinalRefusal reports whether err says that the same push would fail at every attempt.
func isFinalRefusal(err error) bool {
	reason := failureReasonOf(err)
	return reason == pushInvalid || reason == pushTooLarge
}

// uploadToken is what a client token was exchanged for; "" if nothing yet.
type uploadToken struct {
	value       string
	clientToken string
	renewAt     time.Time
}

// uploadAnswer is the answer to a push or a question.
type uploadAnswer struct {
	PushAnswer
	spool SpoolAnswer
}

// currentServerURL returns the URL of the current server.
func (p *Pusher) currentServerURL() string { return p.cfg.To[p.servers.current] }

// upload pushes scrapes to the current server, under the spool's ID, or without names if spoolID is
// 0. Without scrapes it is a question. An upload token that is refused is renewed once, because
// keys rotate and clocks differ.
func (p *Pusher) upload(ctx context.Context, spoolID uint64, scrapes []Scrape) (answer uploadAnswer, err error) {
	gzips := make([][]byte, len(scrapes))
	for i, sc := range scrapes {
		gzips[i] = sc.Gzip
	}
	body := slices.Concat(gzips...) // gzips in a row are one gzip
	for {
		renewed, err := p.ensureUploadToken(ctx)
		if err != nil {
			return answer, err
		}
		resp, err := p.post(ctx, "/upload", p.token.value, p.uploadHeader(spoolID, scrapes), body)
		if err != nil {
			return answer, fmt.Errorf("pushing: %w", err)
		}
		if err = checkResponse(resp, p.currentServerURL()+"/upload", p.cfg.Now()); err == nil {
			answer, err = p.parseAnswer(resp.Body)
		}
		if err == nil {
			p.cfg.SourceClock.Observe(cmp.Or(answer.Server, p.currentServerURL()), answer.Time, p.cfg.Moment())
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusUnauthorized && !renewed {
			p.token.value = ""
			continue
		}
		return answer, err
	}
}

// uploadHeader returns the header of a push: names of the scrapes and consumers known if id is
// not 0, and by how much the source's clock was behind at the last scrape.
func (p *Pusher) uploadHeader(spoolID uint64, scrapes []Scrape) http.Header {
	h := http.Header{"Content-Type": {"text/plain; version=1.0.0; charset=utf-8"}}
	if spoolID != 0 {
		names := ScrapeNames{SpoolID: spoolID}
		for _, sc := range scrapes {
			names.Numbers = names.Numbers.Add(sc.Number, sc.Number)
		}
		h.Set(SpoolHeader, names.String())
		if all := p.cfg.Spool.Consumers(); len(all) > 0 {
			h.Set(ConsumersHeader, FormatConsumers(all))
		}
	}
	if len(scrapes) == 0 {
		return h
	}
	h.Set("Content-Encoding", "gzip")
	newest := scrapes[len(scrapes)-1]
	if ms, known := p.cfg.SourceClock.Offset(newest.At, newest.SourceTime); known {
		h.Set(ClockOffsetHeader, strconv.FormatInt(ms, 10))
		p.offset.Set(float64(ms) / 1000)
	}
	return h
}

// parseAnswer parses the body of a 200 to a push.
func (p *Pusher) parseAnswer(body io.Reader) (answer uploadAnswer, err error) {
	if err := json.NewDecoder(io.LimitReader(body, maxAnswer)).Decode(&answer.PushAnswer); err != nil {
		return answer, fmt.Errorf("pushing to %s: its answer is not JSON: %w", p.currentServerURL(), err)
	}
	if answer.Accepted == nil { // another program than a server answered 200, and stored nothing
		return answer, fmt.Errorf("pushing to %s: its answer does not say what it accepted", p.currentServerURL())
	}
	answer.spool = SpoolAnswer{Server: p.currentServerURL(), KnowsSpools: answer.Held != nil, DoneWhenHeld: answer.Read == nil}
	if answer.Held != nil {
		if err := answer.spool.parseLists(&answer.PushAnswer); err != nil {
			return answer, fmt.Errorf("pushing to %s: its answer is malformed: %w", p.currentServerURL(), err)
		}
	}
	return answer, nil
}

// parseLists reads the lists of an answer that has Held.
func (a *SpoolAnswer) parseLists(from *PushAnswer) (err error) {
	if a.Held, err = ParseRanges(*from.Held, MaxRanges); err != nil {
		return err
	}
	if from.Read != nil {
		if a.Read, err = ParseRanges(*from.Read, MaxRanges); err != nil {
			return err
		}
	}
	a.Consumers, err = ParseConsumers(from.Consumers)
	return err
}

// ensureUploadToken exchanges the client token for an upload token at the current server, unless
// there is a good one, which every server accepts. renewed reports that it did.
func (p *Pusher) ensureUploadToken(ctx context.Context) (renewed bool, err error) {
	clientToken := p.cfg.Token()
	if p.token.value != "" && p.token.clientToken == clientToken && p.cfg.Now().Before(p.token.renewAt) {
		return false, nil
	}
	resp, err := p.post(ctx, "/authorize?id="+url.QueryEscape(p.cfg.ClusterID), clientToken, http.Header{}, nil)
	if err != nil {
		return false, fmt.Errorf("authorizing: %w", err)
	}
	defer resp.Body.Close()
	if err := checkResponse(resp, p.currentServerURL()+"/authorize", p.cfg.Now()); err != nil {
		if isFinalRefusal(err) { // it is not about scrapes
			err = &pushError{err: err, retryAfter: retryAfterOf(err)}
		}
		return false, err
	}
	var answer struct {
		Version          int
		Token            string
		ExpiresInSeconds int64
		Server           string // as in PushAnswer
		Time             int64
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&answer); err != nil || answer.Version != 1 || answer.Token == "" {
		return false, fmt.Errorf("authorizing at %s: its answer is not an upload token", p.currentServerURL())
	}
	p.cfg.SourceClock.Observe(cmp.Or(answer.Server, p.currentServerURL()), answer.Time, p.cfg.Moment())
	// It is renewed well before it expires; both times are of this machine's clock.
	lifetime := time.Duration(answer.ExpiresInSeconds) * time.Second
	p.token = uploadToken{answer.Token, clientToken, p.cfg.Now().Add(lifetime * 4 / 5)}
	return true, nil
}

// post sends a request to the current server.
func (p *Pusher) post(ctx context.Context, path, token string, header http.Header, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.currentServerURL()+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = header
	req.Header.Set("Authorization", "Bearer "+token)
	return p.cfg.ToClient.Do(req)
}

// checkResponse returns a pushError unless resp is a 200. A refusal of the samples is final. A
// refusal of the sender, or of the form of the request, is not, because tokens, keys and servers
// are replaced.
func checkResponse(resp *http.Response, endpoint string, now time.Time) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	e := &pushError{err: fmt.Errorf("%s answered %s", endpoint, describeResponse(resp))}
	switch resp.StatusCode {
	case http.StatusRequestEntityTooLarge:
		e.reason = pushTooLarge
	case http.StatusBadRequest:
		e.reason = pushInvalid
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		e.reason = pushUnavailable
	}
	e.retryAfter = min(max(0, parseRetryAfter(resp.Header, now)), time.Hour)
	return e
}

// parseRetryAfter returns for how long a response asks to wait; 0 if it does not ask. Servers
// state seconds. Proxies state a date, by the same clock as the response's own Date.
func parseRetryAfter(h http.Header, now time.Time) time.Duration {
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

// describeResponse returns the status of a failed response and the start of its body.
func describeResponse(resp *http.Response) string {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 500))
	if text := strings.TrimSpace(string(b)); text != "" {
		return resp.Status + ": " + strconv.QuoteToGraphic(text)
	}
	if to := resp.Header.Get("Location"); to != "" {
		return resp.Status + " to " + to + "; redirects are not followed"
	}
	return resp.Status
}
