package main

// This file sends one request to a server: a push, a question (a push without scrapes) or the
// exchange of tokens. It builds the headers and interprets the answer. A 200 whose body is not a
// server's answer counts as no answer. A refusal is final only if it is about the samples. This
// file does not choose what is sent next.

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

const maxAnswer = 256 << 10 // most bytes of an answer that are read; enough for two lists of MaxRanges ranges of 13-digit numbers and a list of MaxConsumers consumers

// pushFailureReason is the reason why a push failed. It decides what the Pusher does next.
type pushFailureReason int

const (
	pushNoAnswer    pushFailureReason = iota // the server may or may not have stored the push
	pushUnavailable                          // the server stored nothing but may accept the push later
	pushInvalid                              // every server would refuse these samples
	pushTooLarge                             // every server would refuse this push but may accept a smaller one
	pushDenied                               // the server accepts no push of this client until a person acts
)

// pushError is the error for an answer with a status other than 200.
type pushError struct {
	err        error
	reason     pushFailureReason
	retryAfter time.Duration // how long the server asked to wait; 0 if it did not ask
}

func (e *pushError) Error() string { return e.err.Error() }
func (e *pushError) Unwrap() error { return e.err }

// failureReasonOf returns the reason of err if err is a pushError, pushDenied for a DeniedError,
// and pushNoAnswer for any other error.
func failureReasonOf(err error) pushFailureReason {
	if e := (*pushError)(nil); errors.As(err, &e) {
		return e.reason
	}
	if e := (*DeniedError)(nil); errors.As(err, &e) {
		return pushDenied
	}
	return pushNoAnswer
}

// retryAfterOf returns how long the server asked to wait, or 0 if it did not ask.
func retryAfterOf(err error) time.Duration {
	if e := (*pushError)(nil); errors.As(err, &e) {
		return e.retryAfter
	}
	return 0
}

// isFinalRefusal reports whether err means that the same push would be refused at every attempt, by
// any server.
func isFinalRefusal(err error) bool {
	reason := failureReasonOf(err)
	return reason == pushInvalid || reason == pushTooLarge
}

// uploadToken is a short-lived upload token with the client token that was exchanged for it. value
// is "" if there is no upload token.
type uploadToken struct {
	value       string
	clientToken string
	renewAt     time.Time
}

// uploadAnswer is the answer to a push or to a question.
type uploadAnswer struct {
	PushAnswer
	spool SpoolAnswer
}

func (p *Pusher) currentServerURL() string { return p.cfg.To[p.servers.current] }

// upload pushes scrapes to the current server. Unless spoolID is 0, the push names the scrapes by
// spoolID and their numbers. Without scrapes, the push is a question. If the server answers 401 to
// an upload token that this call did not renew, upload renews the token once and tries again. A
// token can become invalid early, because keys rotate and clocks differ.
func (p *Pusher) upload(ctx context.Context, spoolID uint64, scrapes []Scrape) (answer uploadAnswer, err error) {
	gzips := make([][]byte, len(scrapes))
	for i, sc := range scrapes {
		gzips[i] = sc.Gzip
	}
	body := slices.Concat(gzips...) // concatenated gzip members form one gzip stream
	for {
		renewed, err := p.ensureUploadToken(ctx)
		if err != nil {
			return answer, err
		}
		resp, err := p.post(ctx, "/upload", p.token.value, p.uploadHeader(spoolID, scrapes), body)
		if err != nil {
			return answer, fmt.Errorf("pushing: %w", err)
		}
		if err = p.checkResponse(resp, "/upload"); err == nil {
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

// uploadHeader returns the header of a push. If spoolID is not 0, the header names the scrapes and
// lists the known consumers. It asks the server to sync the push if a scrape is in memory only, because
// this process may end before a consumer reads the scrape. If there are scrapes and a server's time is known, the header also
// states how many ms the source's clock was behind the servers' clocks at the newest scrape.
func (p *Pusher) uploadHeader(spoolID uint64, scrapes []Scrape) http.Header {
	h := http.Header{"Content-Type": {"text/plain; version=1.0.0; charset=utf-8"}}
	if spoolID != 0 {
		names := ScrapeNames{SpoolID: spoolID}
		for _, sc := range scrapes {
			names.Numbers = names.Numbers.Add(sc.Number, sc.Number)
		}
		h.Set(SpoolHeader, names.String())
		if p.cfg.Spool.MayLoseInFlight() {
			h.Set(SyncHeader, "1")
		}
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
		p.setClockOffset(time.Duration(ms) * time.Millisecond)
	}
	return h
}

// parseAnswer parses the body of a 200 answer to a push.
func (p *Pusher) parseAnswer(body io.Reader) (answer uploadAnswer, err error) {
	if err := json.NewDecoder(io.LimitReader(body, maxAnswer)).Decode(&answer.PushAnswer); err != nil {
		return answer, fmt.Errorf("pushing to %s: the answer is not JSON: %w", p.currentServerURL(), err)
	}
	if answer.Accepted == nil { // a telemeter server always sends this field, so another program answered
		return answer, fmt.Errorf("pushing to %s: the answer has no field accepted, so it is not a telemeter server's", p.currentServerURL())
	}
	answer.spool = SpoolAnswer{Server: p.currentServerURL(), KnowsSpools: answer.Held != nil, DoneWhenHeld: answer.Read == nil}
	if answer.Held != nil {
		if err := answer.spool.parseLists(&answer.PushAnswer); err != nil {
			return answer, fmt.Errorf("pushing to %s: the answer is malformed: %w", p.currentServerURL(), err)
		}
	}
	return answer, nil
}

// parseLists parses the lists of scrape numbers and consumers in an answer. from.Held must not be
// nil.
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

// ensureUploadToken exchanges the client token for an upload token at the current server. It does
// nothing if the Pusher has an upload token for the present client token that is not due for
// renewal. Every server accepts the upload tokens of the other servers. renewed reports whether an
// exchange took place.
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
	if err := p.checkResponse(resp, "/authorize"); err != nil {
		if isFinalRefusal(err) { // this refusal is not about scrapes, so it must not count as a final refusal of scrapes
			err = &pushError{err: err, retryAfter: retryAfterOf(err)}
		}
		return false, err
	}
	var answer struct {
		Version          int
		Token            string
		ExpiresInSeconds int64
		Server           string // name of the answering server, as in PushAnswer
		Time             int64
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&answer); err != nil || answer.Version != 1 || answer.Token == "" {
		return false, fmt.Errorf("authorizing at %s: the answer is not an upload token, so it is not a telemeter server's: check --to, or the URL in the token", p.currentServerURL())
	}
	p.cfg.SourceClock.Observe(cmp.Or(answer.Server, p.currentServerURL()), answer.Time, p.cfg.Moment())
	// Renew the token when 4/5 of its lifetime have passed. The answer states the lifetime as a
	// duration, so a difference between the clocks of the server and of this machine does not
	// matter.
	lifetime := time.Duration(answer.ExpiresInSeconds) * time.Second
	p.token = uploadToken{answer.Token, clientToken, p.cfg.Now().Add(lifetime * 4 / 5)}
	return true, nil
}

// post sends a request to the current server, with token as the bearer token.
func (p *Pusher) post(ctx context.Context, path, token string, header http.Header, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.currentServerURL()+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = header
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := p.cfg.ToClient.Do(req)
	if errors.Is(err, http.ErrSchemeMismatch) {
		err = fmt.Errorf("%w: the server has no TLS, or the port is wrong: check --to, or the URL in the token", err)
	}
	return resp, err
}

// checkResponse returns nil if resp, which answers a request for path, has status 200, and a
// pushError otherwise. A refusal of the samples (400 or 413) is final, except for a 400 of a TLS port
// to plain HTTP. A refusal of the sender or of the request's form is not final, because tokens, keys
// and servers are replaced over time. A server has the paths that the client uses, so 404 and 405
// come from another program.
func (p *Pusher) checkResponse(resp *http.Response, path string) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	answer := describeResponse(resp)
	e := &pushError{err: fmt.Errorf("%s answered %s", p.currentServerURL()+path, answer)}
	switch status := resp.StatusCode; {
	case status == http.StatusRequestEntityTooLarge:
		e.reason = pushTooLarge
	case status == http.StatusBadRequest && IsAnswerOfTLSPort(answer): // the server has not read the samples
		e.err = fmt.Errorf("%w: write https:// instead of http:// in --to, or in the token", e.err)
	case status == http.StatusBadRequest:
		e.reason = pushInvalid
	case status == http.StatusTooManyRequests, status == http.StatusServiceUnavailable:
		e.reason = pushUnavailable
	case isDeniedStatus(status):
		e.reason, e.err = pushDenied, &DeniedError{e.err, p.denialAdvice(answer)}
	case status/100 == 3:
		if to, err := resp.Location(); err == nil {
			// The query is left out, because a login page puts secrets in it that differ each time.
			e.err = fmt.Errorf("%s answered %s to %.300s; redirects of a server are not followed: if that is the server, pass %.300s as --to",
				p.currentServerURL()+path, resp.Status, &url.URL{Scheme: to.Scheme, Host: to.Host, Path: to.Path}, &url.URL{Scheme: to.Scheme, Host: to.Host})
		}
	case status == http.StatusNotFound, status == http.StatusMethodNotAllowed:
		e.err = fmt.Errorf("%w: no telemeter server accepts pushes at this URL; check --to, or the URL in the token: it must be the address of --listen of a server", e.err)
	}
	e.retryAfter = min(max(0, parseRetryAfter(resp.Header, p.cfg.Now())), time.Hour)
	return e
}

// parseRetryAfter returns how long a response asks the client to wait. The result is 0 if the
// response does not ask, and may be negative for a date in the past. Servers send seconds. Proxies
// may send a date. The wait is then counted from the response's own Date header, or from now if
// that header is missing.
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

// describeResponse returns the status of a failed response and the first 500 bytes of its body.
func describeResponse(resp *http.Response) string {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 500))
	if text := strings.TrimSpace(string(b)); text != "" {
		return resp.Status + ": " + strconv.QuoteToGraphic(text)
	}
	return resp.Status
}
