package main

// This file implements external authorization: the service at the --authorize URL decides whether a
// client token may push for a cluster ID. It is asked in the protocol of the original telemeter.
// Only a complete and valid answer counts as permission. Answers are remembered for a short time,
// and the size of answers is bounded; server_external_auth_queue.go bounds the requests. The server
// sends the token to that URL and nowhere else. No error text for a client quotes the service.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	maxAuthorizeAnswer    = 64 << 10 // bytes of the body of an answer that permits; a larger body is an error
	maxAuthorizeReason    = 200      // bytes of the body of any other answer that the process log quotes
	authorizeRetryAfter   = 5        // seconds, for the header Retry-After if the service is not to blame or gives no valid answer
	unknownRetryAfter     = 30       // seconds, for the header Retry-After if the service answers 429 without a number of seconds
	maxServiceRetryAfter  = 3600     // seconds; a longer time in Retry-After of the service is cut
	authorizationProtocol = "v1"     // version of the protocol, in the field api_version
)

// authorizeError means that a client token is not permitted.
type authorizeError struct {
	status     int    // HTTP status of the answer to the client
	reason     string // value of the label reason in telemeter_unauthorized_total
	text       string // text for the client, and message in the process log; one of a few constants
	retryAfter int    // seconds, for the header Retry-After; 0 = no such header
	refused    bool   // the service has refused this token for this cluster ID, which is worth remembering
	detail     error  // cause, for the process log only
}

func (e *authorizeError) Error() string { return fmt.Sprintf("%s: %v", e.text, e.detail) }

func (e *authorizeError) Unwrap() error { return e.detail }

// errNoValidAnswer returns the error of a question that got no valid answer.
func errNoValidAnswer(detail error) *authorizeError {
	return &authorizeError{
		status: http.StatusServiceUnavailable, reason: "unavailable", retryAfter: authorizeRetryAfter,
		text: "the authorization service gave no valid answer", detail: detail,
	}
}

// ExternalAuthorizer asks the authorization service at one URL. It is safe for concurrent use.
type ExternalAuthorizer struct {
	url    *url.URL
	client *http.Client
	now    func() time.Time
	memory *authorizeMemory
	// Senders that the service has permitted lately have slots and waiting places of their own. So
	// strangers cannot keep them out.
	known, strangers *authorizeQueue

	mu        sync.Mutex                          // guards questions
	questions map[authorizeKey]*authorizeQuestion // the questions that are waiting or in flight, by credential
}

// authorizeQuestion asks whether a client may push. labels and err are the result, which may be
// read once done is closed.
type authorizeQuestion struct {
	clusterID, token    string
	credential, address authorizeKey
	done                chan struct{}
	labels              map[string]string
	err                 error
}

// NewExternalAuthorizer returns an ExternalAuthorizer that sends requests to u. client must have a
// timeout and must not follow redirects.
func NewExternalAuthorizer(u *url.URL, client *http.Client, now func() time.Time) *ExternalAuthorizer {
	return &ExternalAuthorizer{
		url: u, client: client, now: now, memory: newAuthorizeMemory(), known: newAuthorizeQueue(maxQueuedPerKnown), strangers: newAuthorizeQueue(maxQueuedPerStranger),
		questions: map[authorizeKey]*authorizeQuestion{},
	}
}

// Authorize asks the authorization service whether token may push for clusterID, unless it
// remembers the answer. remoteAddr is the address of the client, host:port. It returns the labels
// in the service's answer, which the caller must not change. Concurrent calls with the same
// clusterID and token ask once. The error is an authorizeError, or wraps the error of ctx if ctx
// ends.
func (a *ExternalAuthorizer) Authorize(ctx context.Context, remoteAddr, clusterID, token string) (labels map[string]string, err error) {
	q := &authorizeQuestion{
		clusterID: clusterID, token: token, credential: newAuthorizeKey("credential", clusterID, token), address: addressKey(remoteAddr),
		done: make(chan struct{}),
	}
	if labels, err, ok := a.memory.verdict(q, a.now()); ok {
		return labels, err
	}
	queue := a.strangers
	sender, known := a.memory.sender(q, a.now())
	if known {
		queue = a.known
	}
	place, err := queue.enter(sender)
	if err != nil {
		return nil, err
	}
	defer queue.leave(sender)
	waitCtx, cancel := context.WithTimeoutCause(ctx, maxAuthorizeWait, errAuthorizeBusy(errAuthorizeWait))
	defer cancel()
	for {
		equal := a.joinQuestion(q)
		if equal == q {
			a.askInTurn(ctx, waitCtx, q, queue, place)
			return q.labels, q.err
		}
		select {
		case <-equal.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		// If the client of the call that asked has closed its connection, the question got no
		// answer.
		if !errors.Is(equal.err, context.Canceled) {
			return equal.labels, equal.err
		}
	}
}

// joinQuestion returns the question with the same credential as q that is waiting or in flight. If
// there is none, it returns q, and the caller must call askInTurn.
func (a *ExternalAuthorizer) joinQuestion(q *authorizeQuestion) *authorizeQuestion {
	a.mu.Lock()
	defer a.mu.Unlock()
	if equal := a.questions[q.credential]; equal != nil {
		return equal
	}
	a.questions[q.credential] = q
	return q
}

// askInTurn waits for a slot until waitCtx ends, asks the service, and remembers its verdict. It
// sets the result of q and closes q.done.
func (a *ExternalAuthorizer) askInTurn(ctx, waitCtx context.Context, q *authorizeQuestion, queue *authorizeQueue, place semaphore) {
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.questions, q.credential)
		close(q.done)
	}()
	if q.err = queue.acquireSlot(waitCtx, place); q.err != nil {
		return
	}
	defer queue.releaseSlot(place)
	q.labels, q.err = a.ask(ctx, q.clusterID, q.token)
	if e := (*authorizeError)(nil); q.err == nil || errors.As(q.err, &e) && e.refused {
		a.memory.remember(q, a.now())
	}
}

// ask sends one request to the service. It returns the labels of an answer that permits, without
// ClusterLabel. Otherwise the error is an authorizeError.
func (a *ExternalAuthorizer) ask(ctx context.Context, clusterID, token string) (map[string]string, error) {
	body, err := json.Marshal(map[string]string{"api_version": authorizationProtocol, "authorization_token": token, "cluster_id": clusterID})
	if err != nil {
		return nil, errNoValidAnswer(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.url.String(), bytes.NewReader(body))
	if err != nil {
		return nil, errNoValidAnswer(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	// net/http sends an idempotent request again if the service has just closed the idle
	// connection. The empty list marks the request as idempotent without sending the header.
	req.Header["Idempotency-Key"] = []string{}
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, errNoValidAnswer(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated {
		return nil, notPermitted(resp, token)
	}
	labels, err := readAuthorizedLabels(resp)
	if err != nil {
		return nil, errNoValidAnswer(err)
	}
	return labels, nil
}

// notPermitted returns the error for an answer whose status does not permit the push. Its detail
// quotes the beginning of the body without token.
func notPermitted(resp *http.Response, token string) *authorizeError {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxAuthorizeAnswer)) // after an error, quote what could be read
	// Remove the token before the text is cut, because a cut token could no longer be found.
	reason := strings.TrimSpace(strings.ReplaceAll(string(body), token, "[token]"))
	e := errNoValidAnswer(fmt.Errorf("the service answered %d: %q", resp.StatusCode, reason[:min(len(reason), maxAuthorizeReason)]))
	switch {
	case resp.StatusCode == http.StatusTooManyRequests:
		e.status, e.reason, e.text, e.retryAfter = http.StatusTooManyRequests, "rate_limited", "the authorization service limits the rate of requests", serviceRetryAfter(resp.Header)
	case resp.StatusCode == http.StatusConflict:
		e.status, e.reason, e.text, e.retryAfter, e.refused = http.StatusConflict, "conflict", "the authorization service reports that the cluster ID is in use by another account", 0, true
	case resp.StatusCode/100 == 4:
		e.status, e.reason, e.text, e.retryAfter, e.refused = http.StatusUnauthorized, "forged", "the authorization service refused the token", 0, true
	}
	return e
}

// serviceRetryAfter returns the seconds in the header Retry-After, but at least 1 and at most
// maxServiceRetryAfter. Without a number of seconds it returns unknownRetryAfter.
func serviceRetryAfter(h http.Header) int {
	seconds, err := strconv.ParseUint(h.Get("Retry-After"), 10, 32)
	if err != nil {
		return unknownRetryAfter
	}
	return int(min(max(seconds, 1), maxServiceRetryAfter))
}

// serviceAnswer is the body of an answer that permits. The original's services answer with an
// account ID and without a status. Status is raw so that null differs from a missing field.
type serviceAnswer struct {
	APIVersion string             `json:"api_version"`
	Status     json.RawMessage    `json:"status"`
	AccountID  string             `json:"account_id"`
	Labels     map[string]*string `json:"labels"`
}

// readAuthorizedLabels returns the labels of an answer with the status 200 or 201, without
// ClusterLabel, because the cluster ID of the request decides. It returns an error unless the
// answer is complete, is JSON of at most maxAuthorizeAnswer bytes, and has the status "ok" or no
// status and an account ID. Every label must be a string. Otherwise the push is not permitted,
// because labels that cannot be read may be labels that keep tenants apart.
func readAuthorizedLabels(resp *http.Response) (map[string]string, error) {
	mediaType, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" {
		return nil, fmt.Errorf("the answer has the content type %.100q, not application/json", resp.Header.Get("Content-Type"))
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAuthorizeAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	if len(body) > maxAuthorizeAnswer {
		return nil, fmt.Errorf("the answer is larger than %d bytes", maxAuthorizeAnswer)
	}
	var answer serviceAnswer
	if err := json.Unmarshal(body, &answer); err != nil { // the error does not quote the token, which the answer may repeat
		return nil, fmt.Errorf("decoding the answer: %w", err)
	}
	switch {
	case answer.APIVersion != "" && answer.APIVersion != authorizationProtocol:
		return nil, fmt.Errorf("the answer has the api_version %.100q, not %s", answer.APIVersion, authorizationProtocol)
	case answer.Status != nil && string(answer.Status) != `"ok"`:
		return nil, errors.New(`the answer has a status other than "ok"`)
	case answer.Status == nil && answer.AccountID == "":
		return nil, errors.New(`the answer has neither the status "ok" nor an account_id`)
	}
	labels := make(map[string]string, len(answer.Labels))
	for name, value := range answer.Labels {
		if value == nil {
			return nil, fmt.Errorf("the label %.100q is null", name)
		}
		labels[name] = *value
	}
	delete(labels, ClusterLabel)
	return labels, nil
}
