package main

// This file implements external authorization: the service at the --authorize URL decides whether a
// client token may push for a cluster ID. Only a complete and valid answer counts as permission.
// The number of requests in flight and the size of answers are bounded. The server sends the token
// to that URL and nowhere else.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

const (
	maxAuthorizing     = 32       // requests to the authorization service in flight at a time
	maxAuthorizeAnswer = 64 << 10 // bytes of the body of a 2xx answer; a larger body is an error
)

var (
	// errNotAuthorized means that the authorization service answered 401: it refuses the token.
	errNotAuthorized = errors.New("the token was refused by the authorization service")
	// errOtherClusterID means that the authorization service answered 403: it refuses the token for
	// this cluster ID.
	errOtherClusterID = errors.New("the authorization service refused this token for this cluster ID")
)

// ExternalAuthorizer asks the authorization service at one URL. It is safe for concurrent use.
type ExternalAuthorizer struct {
	url      *url.URL
	client   *http.Client
	requests semaphore
}

// NewExternalAuthorizer returns an ExternalAuthorizer that sends requests to u. client must have a
// timeout and must not follow redirects.
func NewExternalAuthorizer(u *url.URL, client *http.Client) *ExternalAuthorizer {
	return &ExternalAuthorizer{u, client, newSemaphore(maxAuthorizing)}
}

// Authorize asks the authorization service whether token may push for clusterID. The request has
// the form of a request to this program's own /authorize: the cluster ID in the query and the token
// in the header Authorization. An answer with any 2xx status permits the push, unless its body is
// too large or cannot be read; see readAuthorizedLabels. If the body is a JSON object, Authorize
// returns the labels in the object. If the service refused, the error is errNotAuthorized or
// errOtherClusterID. Any other error means that there was no valid answer, or that too many
// requests are in flight.
func (a *ExternalAuthorizer) Authorize(ctx context.Context, clusterID, token string) (labels map[string]string, err error) {
	if !a.requests.TryAcquire() {
		return nil, errors.New("too many requests to the authorization service are in flight")
	}
	defer a.requests.Release()
	u := *a.url
	q := u.Query()
	q.Set("id", clusterID)
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusUnauthorized:
		return nil, errNotAuthorized
	case resp.StatusCode == http.StatusForbidden:
		return nil, errOtherClusterID
	case resp.StatusCode/100 != 2:
		return nil, fmt.Errorf("the authorization service answered %s", resp.Status)
	}
	return readAuthorizedLabels(resp.Body)
}

// readAuthorizedLabels returns the labels in the body of a 2xx answer. A body that does not begin
// with {, after white space, has no labels, which is not an error. It is an error if the body
// cannot be read completely or is larger than maxAuthorizeAnswer. It is also an error if the body
// begins with { but is not valid JSON, or has labels that are neither strings nor null. The push is
// then not permitted, because labels that cannot be read may be labels that keep tenants apart.
func readAuthorizedLabels(r io.Reader) (map[string]string, error) {
	body, err := io.ReadAll(io.LimitReader(r, maxAuthorizeAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("reading the answer of the authorization service: %w", err)
	}
	if len(body) > maxAuthorizeAnswer {
		return nil, fmt.Errorf("the answer of the authorization service is larger than %d bytes", maxAuthorizeAnswer)
	}
	var answer struct{ Labels map[string]string }
	if bytes.HasPrefix(bytes.TrimSpace(body), []byte("{")) {
		if err := json.Unmarshal(body, &answer); err != nil {
			return nil, fmt.Errorf("reading the answer of the authorization service: %w", err)
		}
	}
	return answer.Labels, nil
}
