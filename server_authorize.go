package main

// Another service, the --authorize URL, is asked whether a client token may push for a cluster
// ID. Only a complete and understood yes counts as one. Requests in flight and answers are
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
	maxAsked     = 32       // requests in flight
	maxAskAnswer = 64 << 10 // bytes
)

var (
	// ErrNotAuthorized: the service refused the token (401).
	ErrNotAuthorized = errors.New("the token was refused by the authorization service")
	// ErrOtherClusterID: the service refused it for this cluster ID (403).
	ErrOtherClusterID = errors.New("the authorization service refused this token for this cluster ID")
)

// Authorizer asks one URL. It is safe for concurrent use.
type Authorizer struct {
	url    *url.URL
	client *http.Client
	slots  chan struct{}
}

// NewAuthorizer returns an Asker of a URL. The client has a timeout, and follows no
// redirects.
func NewAuthorizer(rawURL string, client *http.Client) (*Authorizer, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%s is not an http:// or https:// URL", rawURL)
	}
	return &Authorizer{u, client, make(chan struct{}, maxAsked)}, nil
}

// Authorize puts the question in the form of this program's own /authorize, with id in
// the query and the token in the header. Any 2xx is a yes; of a JSON object in
// its body the labels are returned. Errors but the two above mean that there is
// no answer.
func (a *Authorizer) Authorize(ctx context.Context, id, token string) (labels map[string]string, err error) {
	select {
	case a.slots <- struct{}{}:
		defer func() { <-a.slots }()
	default:
		return nil, errors.New("too many requests are being authorized")
	}
	u := *a.url
	q := u.Query()
	q.Set("id", id)
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
		return nil, ErrNotAuthorized
	case resp.StatusCode == http.StatusForbidden:
		return nil, ErrOtherClusterID
	case resp.StatusCode/100 != 2:
		return nil, fmt.Errorf("it answered %s", resp.Status)
	}
	// A yes whose body is no JSON adds no labels. One that cannot be read is no yes:
	// its labels may be what keeps tenants apart.
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAskAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("reading its answer: %w", err)
	}
	if len(body) > maxAskAnswer {
		return nil, fmt.Errorf("its answer is larger than %d bytes", maxAskAnswer)
	}
	var yes struct{ Labels map[string]string }
	if bytes.HasPrefix(bytes.TrimSpace(body), []byte("{")) {
		if err := json.Unmarshal(body, &yes); err != nil {
			return nil, fmt.Errorf("reading its answer: %w", err)
		}
	}
	return yes.Labels, nil
}
