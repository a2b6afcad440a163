package main

// This file makes one scrape of the source: the request, the decoding, the cleaning and the text
// that is pushed. Samples that the ClientCleaner drops are never pushed. Sample times are times of
// the source's clock until AppendText or correctToServerTime shifts them to the servers' clock.

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	maxScrape     = 256 << 20       // most bytes of a scrape, uncompressed
	maxRedirects  = 3               // most redirects of the source that a scrape follows
	skewTolerance = 2 * time.Second // the skew changes only if the source's Date header is missing, or differs by more than this from the time that the old skew predicts
	scrapeAccept  = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;escaping=allow-utf-8;q=0.9," +
		"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.8,text/plain;version=0.0.4;q=0.7," +
		"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.1"
)

// CleanedScrape has the cleaned samples of a scrape.
type CleanedScrape struct {
	List       SampleList
	At         Moment     // when the answer of the source arrived
	SourceTime int64      // time of the source's clock at At, in ms since the epoch
	Shift      int64      // ms that AppendText adds to the times in List
	ShiftKnown bool       // a server's time is known, so Shift is final; otherwise Shift is 0
	Scraped    int        // samples that the source sent
	Use        CleanerUse // which cleaning rules matched
}

// AppendText appends samples of the scrape to b in the text exposition format, with Shift added to
// their times. If ShiftKnown is false, correctToServerTime shifts the text again before it is
// pushed.
func (sr *CleanedScrape) AppendText(b []byte, samples []Sample) []byte {
	for _, s := range samples {
		b = AppendSample(b, sr.List.Line(s), s.T+sr.Shift, s.V)
	}
	return b
}

// Scrape scrapes the source and cleans the samples. A sample without a timestamp gets the time at
// which the scrape began. This time is by the source's clock, as all other times are.
func (c *Client) Scrape(ctx context.Context) (*CleanedScrape, error) {
	begin := c.cfg.Now()
	got, err := c.scrape(ctx, begin)
	c.scrapeSeconds.Observe(c.cfg.Now().Sub(begin).Seconds())
	if err != nil {
		c.scrapes.Inc("failed")
		return nil, err
	}
	c.scrapes.Inc("ok")
	c.lastScrape.Set(float64(begin.UnixMilli()) / 1000)
	return got, nil
}

func (c *Client) scrape(ctx context.Context, begin time.Time) (*CleanedScrape, error) {
	req, cleaner, err := c.scrapeRequest(ctx, c.state.Load())
	if err != nil {
		return nil, fmt.Errorf("scraping: %w", err)
	}
	resp, err := c.cfg.FromClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("scraping: %w", adviseOnSource(err))
	}
	defer resp.Body.Close()
	got := &CleanedScrape{At: c.moment()}
	c.sourceSkew = skewByDateOrZero(resp.Header.Get("Date"), got.At.Wall, c.sourceSkew)
	got.SourceTime = max(0, got.At.Wall+c.sourceSkew)
	body, format, err := readScrape(resp)
	if err == nil {
		got.Scraped, err = c.decodeAndClean(&got.List, body, format, cleaner, begin.UnixMilli()+c.sourceSkew)
		got.Use = cleaner.Use()
	}
	if err != nil {
		return nil, fmt.Errorf("scraping %s: %w", req.URL.Redacted(), err)
	}
	return got, nil
}

// scrapeRequest returns the request of a scrape and the ClientCleaner for its samples. If the
// source's path ends in /federate, the request has match[] parameters, and the source sends only
// the selected series. From any other source, the ClientCleaner selects the series.
func (c *Client) scrapeRequest(ctx context.Context, st *ClientReloadConfig) (*http.Request, *ClientCleaner, error) {
	cleaner := st.NewCleaner()
	u := *c.cfg.From
	if strings.HasSuffix(u.Path, "/federate") {
		q := u.Query()
		for _, m := range st.Match {
			q.Add("match[]", m.String())
		}
		u.RawQuery = q.Encode()
		cleaner.MatchedBySource = st.Match
	} else {
		cleaner.Match = st.Match
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Accept", scrapeAccept)
	if st.FromAuthorization != "" {
		req.Header.Set("Authorization", st.FromAuthorization)
	}
	return req, cleaner, nil
}

// checkSourceRedirect decides, as the CheckRedirect of an http.Client, whether a redirect of the
// source is followed. It must stay on the source's host, so that credentials go to no other host.
// It must keep the port, unless it leads from http:// to https://. If the request selects series by
// match[], the redirect must keep the selectors and lead to another /federate. Otherwise series
// that --match excludes would leave the site.
func checkSourceRedirect(next *http.Request, via []*http.Request) error {
	first, last := via[0].URL, via[len(via)-1].URL
	to := url.URL{Scheme: next.URL.Scheme, Host: next.URL.Host, Path: next.URL.Path} // without credentials and query
	const advice = "if that is the source, pass it as --from"
	switch {
	case !strings.EqualFold(to.Hostname(), last.Hostname()):
		return fmt.Errorf("the source redirects to another host, %.300s: %s", &to, advice)
	case last.Scheme == "https" && to.Scheme != "https":
		return fmt.Errorf("the source redirects from https:// to %.300s: %s", &to, advice)
	case to.Scheme == last.Scheme && effectivePort(&to) != effectivePort(last):
		return fmt.Errorf("the source redirects to another port, %.300s: %s", &to, advice)
	case first.Query().Has("match[]") && (!slices.Equal(first.Query()["match[]"], next.URL.Query()["match[]"]) || !strings.HasSuffix(to.Path, "/federate")):
		return fmt.Errorf("the source redirects to %.300s without the series selectors of the request: pass the URL of its /federate as --from", &to)
	case len(via) > maxRedirects:
		return fmt.Errorf("the source redirects more than %d times, at last to %.300s: %s", maxRedirects, &to, advice)
	}
	return nil
}

// effectivePort returns the port in u, or the default port of its scheme.
func effectivePort(u *url.URL) string {
	switch {
	case u.Port() != "":
		return u.Port()
	case u.Scheme == "https":
		return "443"
	}
	return "80"
}

// readScrape checks the source's answer and returns its body and format.
func readScrape(resp *http.Response) (body []byte, format Format, err error) {
	if err := checkSourceAnswer(resp); err != nil {
		return nil, format, err
	}
	if format, err = ParseFormat(resp.Header.Get("Content-Type")); err != nil {
		return nil, format, fmt.Errorf("%w: %s", err, adviceOnURL)
	}
	// net/http asks for gzip, decompresses a gzip body and removes the header Content-Encoding. If
	// the header is still there, it names an encoding that net/http did not decode.
	if encoding := strings.Join(resp.Header.Values("Content-Encoding"), ", "); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return nil, format, fmt.Errorf("content encoding %.100q is not supported; supported: identity, gzip", encoding)
	}
	if body, err = io.ReadAll(io.LimitReader(resp.Body, maxScrape+1)); err != nil {
		return nil, format, fmt.Errorf("reading the answer: %w", adviseOnSource(err))
	}
	if len(body) > maxScrape {
		return nil, format, fmt.Errorf("the answer is larger than %d bytes", maxScrape)
	}
	return body, format, nil
}

// decodeAndClean decodes body, adds the samples that cleaner does not drop to list, and counts the
// scraped and the dropped samples. It returns the number of scraped samples. Samples without a
// timestamp get defaultMs.
func (c *Client) decodeAndClean(list *SampleList, body []byte, format Format, cleaner *ClientCleaner, defaultMs int64) (n int, err error) {
	var d Decoder
	var invalid error // of the last invalid sample
	invalids := 0
	skipped, err := d.Decode(body, format, func(r *RawSample) error {
		n++
		drop := cleaner.Clean(r)
		if drop == "" {
			if !r.HasT {
				r.T = defaultMs
			}
			if err := list.Add(r); err != nil {
				drop, invalid, invalids = DropInvalid, fmt.Errorf("series %.100s: %w", bytes.ToValidUTF8(r.Name, nil), err), invalids+1
			}
		}
		if drop != "" {
			c.dropped.Inc(drop)
		}
		return nil
	})
	if err != nil {
		return n, err
	}
	if invalid != nil {
		c.logInvalid(invalids, invalid)
	}
	c.scraped.Add(float64(n))
	for kind, n := range skipped.ByKind() {
		c.skipped.Add(float64(n), kind)
	}
	return n, nil
}

// logInvalid logs that a scrape had invalid samples, unless the last of them had a text that was
// logged a short time before.
func (c *Client) logInvalid(samples int, last error) {
	if suppressed, logNow := c.invalidSamples.take(c.cfg.Now(), last.Error()); logNow {
		args := []any{"samples", samples, "last", last}
		if suppressed > 0 {
			args = append(args, "suppressed", suppressed)
		}
		c.cfg.Log.Warn("invalid samples dropped", args...)
	}
}

// skewByDateOrZero returns by how many ms the source's clock is ahead of this machine's clock,
// according to the Date header of the source's answer. It returns 0 if the header is missing or
// malformed. It returns oldSkew if the new skew differs from oldSkew by at most skewTolerance,
// because Date is truncated to seconds and the answer takes time to arrive. Without this tolerance,
// the times that are given to samples without a timestamp would jump back and forth.
func skewByDateOrZero(date string, wallMs, oldSkew int64) (sourceAhead int64) {
	t, err := http.ParseTime(date)
	if err != nil || t.Unix() < 0 {
		return 0
	}
	skew := t.UnixMilli() - wallMs
	if changed := skew - oldSkew; max(changed, -changed) > skewTolerance.Milliseconds() {
		return skew
	}
	return oldSkew
}

// correctToServerTime returns sc with its sample times shifted to the servers' clock. It is called
// for a scrape that was put into the spool before any server's time was known. The Number of sc
// does not change.
func (c *Client) correctToServerTime(sc Scrape) Scrape {
	sc.Corrected = true
	sc.Shift, _ = c.nextShift(sc.At, sc.SourceTime)
	if sc.Shift == 0 {
		return sc
	}
	text, err := sc.Text()
	if err != nil { // cannot happen, because this process made the text or the spool has checked it
		sc.Shift = 0
		return sc
	}
	text = shiftTimes(text, sc.Shift)
	sc.Size, sc.Gzip = len(text), Gzip(text)
	return sc
}

// renderPieces renders samples of a scrape as one piece, or as several if one would exceed
// LimitBytes or MaxPiece, or MaxDecodedFactor times as much without compression. A single sample
// that exceeds these limits is dropped and logged.
func (c *Client) renderPieces(got *CleanedScrape, samples []Sample) []Scrape {
	limit := min(c.cfg.LimitBytes, MaxPiece)
	text := got.AppendText(nil, samples)
	if int64(len(text)) <= MaxDecodedFactor*limit {
		if z := Gzip(text); int64(len(z)) <= limit {
			return []Scrape{{At: got.At, SourceTime: got.SourceTime, Shift: got.Shift, Corrected: got.ShiftKnown, Samples: len(samples), Size: len(text), Gzip: z}}
		}
	}
	if len(samples) <= 1 {
		c.dropped.Inc(DropInvalid)
		if _, logNow := c.invalidSamples.take(c.cfg.Now(), "--limit-bytes"); logNow {
			c.cfg.Log.Warn("series dropped because it alone exceeds --limit-bytes: allow more there, or exclude the series with --match",
				"bytes", len(text), "limit", limit, "series", Excerpt(text))
		}
		return nil
	}
	return append(c.renderPieces(got, samples[:len(samples)/2]), c.renderPieces(got, samples[len(samples)/2:])...)
}

// shiftTimes adds ms to all sample times in text, which must have the form that AppendText renders.
// A line without a time stays unchanged.
func shiftTimes(text []byte, ms int64) []byte {
	out := make([]byte, 0, len(text)+len(text)/16)
	for line := range bytes.Lines(text) {
		end := bytes.LastIndexByte(line, ' ')
		value := bytes.LastIndexByte(line[:max(0, end)], ' ')
		if value >= 0 {
			t, err := strconv.ParseInt(string(bytes.TrimSuffix(line[end+1:], []byte("\n"))), 10, 64)
			// If the field between the last two blanks is not a number, the first of these two
			// blanks is inside quotes, and the line has no time.
			if _, bad := strconv.ParseFloat(string(line[value+1:end]), 64); err == nil && bad == nil {
				out = append(strconv.AppendInt(append(out, line[:end+1]...), t+ms, 10), '\n')
				continue
			}
		}
		out = append(out, line...)
	}
	return out
}
