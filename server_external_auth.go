package main

// Another service, the --authorize URL, is asked whether a client token may push for a cluster
// ID. Only a complete answer that is understood counts as a yes. Requests in flight and answers are
// bounded. The token goes to that URL and nowhere else.

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
	// errNotAuthorized: the service refused the token (401).
	errNotAuthorized = errors.New("the token was refused by the authorization service")
	// errOtherClusterID: the service refused it for this cluster ID (403).
	errOtherClusterID = errors.New("the authorization service refused this token for this cluster ID")
)

// ExternalAuthorizer asks one URL. It is safe for concurrent use.
type ExternalAuthorizer struct {
	url      *url.URL
	client   *http.Client
	requests semaphore
}

// NewExternalAuthorizer returns an ExternalAuthorizer that asks u. The client has a timeout, and
// follows no redirects.
func NewExternalAuthorizer(u *url.URL, client *http.Client) *ExternalAuthorizer {
	return &ExternalAuthorizer{u, client, newSemaphore(maxAuthorizing)}
}

// Authorize asks in the form of this program's own /authorize, with id in the query and the token
// in the header. Any 2xx is a yes; if the body is a JSON object, its labels are returned. Any
// error but the two above means that there is no answer.
func (a *ExternalAuthorizer) Authorize(ctx context.Context, clusterID, token string) (labels map[string]string, err error) {
	if !a.requests.TryAcquire() {
		return nil, errors.New("too many requests are being authorized")
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
		return nil, fmt.Errorf("it answered %s", resp.Status)
	}
	return readAuthorizedLabels(resp.Body)
}

// readAuthorizedLabels reads the body of a yes. If it is no JSON object, the yes adds no labels. A
// body that cannot be read is no yes: its labels may keep tenants apart.
func readAuthorizedLabels(r io.Reader) (map[string]string, error) {
	body, err := io.ReadAll(io.LimitReader(r, maxAuthorizeAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("reading its answer: %w", err)
	}
	if len(body) > maxAuthorizeAnswer {
		return nil, fmt.Errorf("its answer is larger than %d bytes", maxAuthorizeAnswer)
	}
	var answer struct{ Labels map[string]string }
	if bytes.HasPrefix(bytes.TrimSpace(body), []byte("{")) {
		if err := json.Unmarshal(body, &answer); err != nil {
			return nil, fmt.Errorf("reading its answer: %w", err)
		}
	}
	return answer.Labels, nil
}
