package main

// This file makes one scrape of the source: the request, the decoding and the cleaning. Samples that
// the ClientCleaner drops are never pushed. The answer is decoded while it arrives, and each cleaned
// sample goes to a pieceWriter at once, so that memory does not grow with the size of a scrape, but
// only with its compressed size and with the largest family of a protobuf answer. Sample times are
// times of the source's clock until the pieceWriter or correctToServerTime shifts them to the servers'
// clock.

import (
	"bytes"
	"compress/gzip"
	"context"
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
	Pieces     []Scrape   // at least one; together they have the samples in their order
	At         Moment     // when the answer of the source arrived
	SourceTime int64      // time of the source's clock at At, in ms since the epoch
	Newest     int64      // time of the newest sample that was not dropped, by the source's clock, in ms; 0 if there is none
	IsBehind   bool       // one of several sources gave no samples, or none that is newer than those of another one
	Scraped    int        // samples that the source sent
	Samples    int        // samples in Pieces
	Use        CleanerUse // which cleaning rules matched

	given map[uint64]givenSample // see sources; nil if there is only one source
	known int                    // how many samples are of series that were given before; 0 if there is only one source
}

// eachSeries calls f for the series of all samples in the pieces. The arguments are valid until f
// returns.
func (sr *CleanedScrape) eachSeries(f func(name []byte, labels []Label)) {
	for i := range sr.Pieces {
		// The error can be ignored, because this process rendered and compressed the text.
		sr.Pieces[i].eachSample(func(r *RawSample) error {
			f(r.Name, r.Labels)
			return nil
		})
	}
}

// Scrape scrapes the source and cleans the samples. A sample without a timestamp gets the time at
// which the scrape began. This time is by the source's clock, as all other times are.
func (c *Client) Scrape(ctx context.Context) (*CleanedScrape, error) {
	return c.scrapeSource(ctx, c.sources.inUse())
}

func (c *Client) scrapeSource(ctx context.Context, src *source) (*CleanedScrape, error) {
	begin := c.cfg.Now()
	got, err := c.scrape(ctx, src, begin)
	c.scrapeSeconds.Observe(c.cfg.Now().Sub(begin).Seconds())
	if err != nil {
		c.scrapes.Inc("failed")
		return nil, err
	}
	c.scrapes.Inc("ok")
	c.lastScrape.Set(float64(begin.UnixMilli()) / 1000)
	return got, nil
}

func (c *Client) scrape(ctx context.Context, src *source, begin time.Time) (*CleanedScrape, error) {
	req, cleaner, err := c.scrapeRequest(ctx, src, c.state.Load())
	if err != nil {
		return nil, fmt.Errorf("scraping: %w", err)
	}
	resp, err := c.cfg.FromClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("scraping: %w", adviseOnSource(err))
	}
	defer resp.Body.Close()
	got := &CleanedScrape{At: c.moment()}
	skew := skewByDateOrZero(resp.Header.Get("Date"), got.At.Wall, src.skew.Load())
	src.skew.Store(skew)
	got.SourceTime = max(0, got.At.Wall+skew)
	if err := c.readScrape(got, resp, cleaner, begin.UnixMilli()+skew, src); err != nil {
		return nil, fmt.Errorf("scraping %s: %w", req.URL.Redacted(), err)
	}
	return got, nil
}

// scrapeRequest returns the request of a scrape and the ClientCleaner for its samples. If the
// source's path ends in /federate, the request has match[] parameters, and the source sends only
// the selected series. From any other source, the ClientCleaner selects the series.
func (c *Client) scrapeRequest(ctx context.Context, src *source, st *ClientReloadConfig) (*http.Request, *ClientCleaner, error) {
	cleaner := st.NewCleaner()
	u := *src.url
	if IsFederate(&u) {
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
	setSourceHeaders(req, st, scrapeAccept)
	return req, cleaner, nil
}

// setSourceHeaders sets the headers that all requests to the source have.
func setSourceHeaders(req *http.Request, st *ClientReloadConfig, accept string) {
	req.Header.Set("Accept", accept)
	// Over loopback, compressing an answer costs more time on both sides than sending it.
	req.Header.Set("Accept-Encoding", "gzip")
	if IsLoopbackHost(req.URL.Hostname()) {
		req.Header.Set("Accept-Encoding", "identity")
	}
	if st.FromAuthorization != "" {
		req.Header.Set("Authorization", st.FromAuthorization)
	}
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
	case first.Query().Get("query") != next.URL.Query().Get("query"), first.Query().Get("time") != next.URL.Query().Get("time"):
		return fmt.Errorf("the source redirects to %.300s without the query of the request: pass the URL of its /federate as --from", &to)
	case first.Query().Has("match[]") && (!slices.Equal(first.Query()["match[]"], next.URL.Query()["match[]"]) || !IsFederate(&to)):
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

// readScrape reads, decodes and cleans the source's answer. It fills in the fields of got that depend
// on the body. Samples without a timestamp get defaultMs.
func (c *Client) readScrape(got *CleanedScrape, resp *http.Response, cleaner *ClientCleaner, defaultMs int64, src *source) error {
	if err := decompressAnswer(resp); err != nil {
		if resp.StatusCode == http.StatusOK {
			return err
		}
		resp.Body = http.NoBody // the status says more than a body that cannot be read
	}
	if err := checkSourceAnswer(resp); err != nil {
		return err
	}
	format, err := ParseFormat(resp.Header.Get("Content-Type"))
	if err != nil {
		return fmt.Errorf("%w: %s", err, adviceOnURL)
	}
	if encoding := strings.Join(resp.Header.Values("Content-Encoding"), ", "); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return fmt.Errorf("content encoding %.100q is not supported; supported: identity, gzip", encoding)
	}
	body := sourceBody{r: resp.Body, limit: maxScrape}
	piece := Scrape{At: got.At, SourceTime: got.SourceTime}
	// The shift must be known before the first sample is rendered, so that also a scrape that then fails
	// can change it.
	piece.Shift, piece.Corrected = c.nextShift(got.At, got.SourceTime)
	w := newPieceWriter(piece, min(c.cfg.LimitBytes, MaxPiece))
	if err = c.decodeAndClean(got, w, &body, format, cleaner, defaultMs, src); err != nil {
		return err
	}
	if got.Pieces, err = w.finish(); err != nil {
		return err
	}
	got.Use = cleaner.Use()
	for _, p := range got.Pieces {
		got.Samples += p.Samples
	}
	if w.tooLarge > 0 {
		c.dropped.Add(float64(w.tooLarge), DropInvalid)
		if _, logNow := c.invalidSamples.take(c.cfg.Now(), "--limit-bytes"); logNow {
			c.cfg.Log.Warn("series dropped because it alone exceeds --limit-bytes: allow more there, or exclude the series with --match",
				"bytes", w.tooLargeSize, "limit", w.limit, "series", w.tooLargeSeries)
		}
	}
	return nil
}

// decompressAnswer makes resp.Body decompress a body that is compressed with gzip, and removes the
// header Content-Encoding. net/http does this only if it has chosen the header Accept-Encoding itself.
// An empty body is not compressed.
func decompressAnswer(resp *http.Response) error {
	if !strings.EqualFold(strings.Join(resp.Header.Values("Content-Encoding"), ", "), "gzip") {
		return nil
	}
	resp.Header.Del("Content-Encoding")
	z, err := gzip.NewReader(resp.Body)
	if err == io.EOF {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the answer: %w", adviseOnSource(err))
	}
	resp.Body = io.NopCloser(z) // scrape closes the body that it got
	return nil
}

// sourceBody reads the body of a source's answer and limits its size. Its errors say that they are
// about reading.
type sourceBody struct {
	r     io.Reader
	limit int // most bytes that the body may have
	read  int // bytes that it had until now
}

// errAnswerTooLarge is wrapped by the error of a sourceBody that is larger than its limit.
var errAnswerTooLarge = errors.New("the answer is too large")

// Read implements io.Reader.
func (b *sourceBody) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.read += n; b.read > b.limit {
		return 0, fmt.Errorf("%w: more than %d bytes", errAnswerTooLarge, b.limit) // package json may ignore an error beside bytes
	}
	if err != nil && err != io.EOF {
		err = fmt.Errorf("reading the answer: %w", adviseOnSource(err))
	}
	return n, err
}

// decodeAndClean decodes body, passes the samples that cleaner does not drop to w, and counts the
// scraped and the dropped samples. It sets Scraped, Newest and IsBehind of got. See readScrape.
func (c *Client) decodeAndClean(got *CleanedScrape, w *pieceWriter, body io.Reader, format Format, cleaner *ClientCleaner, defaultMs int64, src *source) error {
	var d Decoder
	var one SampleList // the current sample
	var invalid error  // of the last invalid sample
	invalids := 0
	dropped := map[string]int{}
	skipped, err := d.DecodeFrom(body, maxScrape, format, func(r *RawSample) error {
		got.Scraped++
		if drop := cleaner.Clean(r); drop != "" {
			dropped[drop]++
			return nil
		}
		if !r.HasT {
			r.T = defaultMs
		}
		one.Reset()
		if err := one.Add(r); err != nil {
			dropped[DropInvalid]++
			invalid, invalids = fmt.Errorf("series %.100s: %w", bytes.ToValidUTF8(r.Name, nil), err), invalids+1
			return nil
		}
		s := one.Samples[0]
		got.Newest = max(got.Newest, s.T)
		line := one.Line(s)
		if c.sources.isOld(got, src, line, s.T+w.piece.Shift) {
			dropped[DropReplica]++
			return nil
		}
		w.add(line, s.T, s.V)
		return nil
	})
	if err != nil {
		return err
	}
	got.IsBehind = len(c.sources.all) > 1 && w.piece.Samples == 0 && len(w.pieces) == 0
	if invalid != nil {
		c.logInvalid(invalids, invalid)
	}
	c.scraped.Add(float64(got.Scraped))
	for reason, n := range dropped {
		c.dropped.Add(float64(n), reason)
	}
	for kind, n := range skipped.ByKind() {
		c.skipped.Add(float64(n), kind)
	}
	return nil
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

// shiftTimes adds ms to all sample times in text, which must have the form that a pieceWriter renders.
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
