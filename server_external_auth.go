package main

// External authorization: the service at the --authorize URL decides whether a client token may
// push for a cluster ID. Only a complete and valid answer counts as permission. The number of
// requests in flight and the size of answers are bounded. The token is sent to that URL and nowhere
// else.

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
	maxAuthorizing     = 32       // requests in flight
	maxAuthorizeAnswer = 64 << 10 // bytes
)

var (
	// errNotAuthorized means that the service answered 401: it refuses the token.
	errNotAuthorized = errors.New("the token was refused by the authorization service")
	// errOtherClusterID means that the service answered 403: it refuses the token for this cluster ID.
	errOtherClusterID = errors.New("the authorization service refused this token for this cluster ID")
)

// ExternalAuthorizer asks the service at one URL. It is safe for concurrent use.
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

// Authorize asks the service whether token may push for clusterID. The request has the form of this
// program's own /authorize: the cluster ID in the query and the token in the header. Any 2xx status
// permits the push; if the body is a JSON object, its labels are returned. The error wraps
// errNotAuthorized or errOtherClusterID if the service refused. Any other error means that there is
// no valid answer.
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

// readAuthorizedLabels reads the labels from the body of a 2xx answer. A body that is not a JSON
// object adds no labels. A body that cannot be read whole is an error, and permits nothing, because
// its labels may be what separates tenants.
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
