package main

// This file sends requests to the query API of the source (web/api/v1/api.go in the source of
// Prometheus), with the credentials and the rules for redirects of a scrape.

import (
	"context"
	"errors"
	"fmt"
	"math"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

const maxAPIAnswer = 1 << 30 // most bytes of an answer of the query API, uncompressed; it is decoded series by series

// sourceAPI asks a source for other answers than a scrape.
type sourceAPI struct {
	c   *Client
	src *source
	st  *ClientReloadConfig
}

// newSourceAPI returns a sourceAPI of the source in use, with the configuration in use.
func (c *Client) newSourceAPI() sourceAPI { return sourceAPI{c, c.sources.inUse(), c.state.Load()} }

// selectors returns the selectors of the scrapes of the source.
func (a sourceAPI) selectors() (Selectors, error) {
	ofURL, err := ParseSelectors(a.src.url.Query()["match[]"])
	if err != nil {
		return nil, fmt.Errorf("reading the match[] parameters of --from: %w", err)
	}
	return append(ofURL, a.st.Match...), nil
}

// query asks the query API for the value of an expression at a time by the source's clock, in
// ms, and calls emit for each series.
func (a sourceAPI) query(ctx context.Context, expression string, atMs int64, emit func(*apiSeries) error) error {
	u := *a.src.url
	u.Path = strings.TrimSuffix(u.Path, "/federate") + "/api/v1/query"
	q := u.Query()
	q.Del("match[]")
	q.Set("query", expression)
	q.Set("time", strconv.FormatFloat(float64(atMs)/1000, 'f', 3, 64))
	u.RawQuery = q.Encode()
	return a.get(ctx, &u, "application/json", func(resp *http.Response) error {
		kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
		isBusy := resp.StatusCode >= 500
		switch {
		case resp.StatusCode == http.StatusTooManyRequests:
			return fmt.Errorf("the source answered %s", resp.Status)
		case kind == "application/json", kind == "application/stream+json": // the latter is of VictoriaMetrics
		case isBusy:
			return fmt.Errorf("the source answered %s", resp.Status)
		default:
			return fmt.Errorf("%w: %s with content type %.80q", errNoAPIAnswer, resp.Status, resp.Header.Get("Content-Type"))
		}
		// VictoriaMetrics stores no NaN but stale markers, and returns them as NaN. Prometheus returns no
		// stale markers.
		nanIsStale := resp.Header.Get("X-Server-Hostname") != ""
		err := decodeAPIAnswer(&sourceBody{r: resp.Body, limit: maxAPIAnswer}, func(s *apiSeries) error {
			if nanIsStale {
				s.Values = slices.DeleteFunc(s.Values, func(v apiSample) bool { return math.IsNaN(v.V) })
			}
			return emit(s)
		})
		if isBusy && errors.Is(err, errNoAPIAnswer) { // of a proxy
			return fmt.Errorf("the source answered %s", resp.Status)
		}
		return err
	})
}

// get sends a request to the source, and calls read with its answer. It takes at most
// maxScrapeTimeout.
func (a sourceAPI) get(ctx context.Context, u *url.URL, accept string, read func(*http.Response) error) error {
	ctx, cancel := context.WithTimeout(ctx, maxScrapeTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	setSourceHeaders(req, a.st, accept)
	resp, err := a.c.cfg.FromClient.Do(req)
	if err != nil {
		return adviseOnSource(err)
	}
	defer resp.Body.Close()
	if a.src != a.c.sources.inUse() { // else the scrapes set the skew
		a.src.skew.Store(skewByDateOrZero(resp.Header.Get("Date"), a.c.moment().Wall, a.src.skew.Load()))
	}
	if err := decompressAnswer(resp); err != nil {
		return err
	}
	if err := read(resp); err != nil {
		return fmt.Errorf("%s: %w", u.Path, err)
	}
	return nil
}
