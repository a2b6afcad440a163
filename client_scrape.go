package main

// One scrape of the source: request, decoding, cleaning, and the text that is pushed. Nothing
// leaves that the Cleaner did not pass. Times are of the source's clock.

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Scraped is what a scrape gave.
type Scraped struct {
	Push   SampleList
	At     Moment // when the source answered
	Source int64  // what its clock showed then, in ms since the epoch
	Shift  int64  // ms, which the times in Push do not have yet
	Final  bool   // Shift is known
}

// Scrape gets what the source has and cleans it. Samples without a time get that
// of the scrape's begin, by the source's clock as all others.
func (c *Client) Scrape(ctx context.Context) (*Scraped, error) {
	begin := c.cfg.Now()
	p, err := c.scrape(ctx, begin)
	c.scrapeSeconds.Observe(c.cfg.Now().Sub(begin).Seconds())
	if err != nil {
		c.scrapes.Inc("failed")
		return nil, err
	}
	c.scrapes.Inc("ok")
	c.lastScrape.Set(float64(begin.UnixMilli()) / 1000)
	return p, nil
}

func (c *Client) scrape(ctx context.Context, begin time.Time) (*Scraped, error) {
	st := c.state.Load()
	cleaner := st.Cleaner()
	u := *c.cfg.From
	if strings.HasSuffix(u.Path, "/federate") {
		// The source chooses, which saves it the rest.
		q := u.Query()
		for _, m := range st.Match {
			q.Add("match[]", m.String())
		}
		u.RawQuery = q.Encode()
	} else {
		cleaner.Match = st.Match
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("scraping: %w", err)
	}
	req.Header.Set("Accept", scrapeAccept)
	if st.FromToken != "" {
		req.Header.Set("Authorization", "Bearer "+st.FromToken)
	}
	resp, err := c.cfg.FromClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("scraping: %w", err)
	}
	defer resp.Body.Close()
	got := &Scraped{At: c.moment()}
	c.skew = sourceSkew(resp.Header.Get("Date"), got.At.Wall, c.skew)
	skew := c.skew
	got.Source = max(0, got.At.Wall+skew)
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("scraping %s: it answered %s", u.Redacted(), Answer(resp))
	}
	format, err := ParseFormat(resp.Header.Get("Content-Type"))
	if err != nil {
		return nil, fmt.Errorf("scraping %s: %w", u.Redacted(), err)
	}
	// Gzip was asked for, undone and taken from the header by net/http.
	if encoding := strings.Join(resp.Header.Values("Content-Encoding"), ", "); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return nil, fmt.Errorf("scraping %s: content encoding %.100q is not supported; supported: identity, gzip", u.Redacted(), encoding)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxScrape+1))
	if err != nil {
		return nil, fmt.Errorf("scraping %s: reading the answer: %w", u.Redacted(), err)
	}
	if len(body) > maxScrape {
		return nil, fmt.Errorf("scraping %s: the answer is larger than %d bytes", u.Redacted(), maxScrape)
	}
	p := &got.Push
	var d Decoder
	n := 0
	var invalid error
	skipped, err := d.Decode(body, format, func(r *RawSample) error {
		n++
		drop := cleaner.Apply(r)
		if drop == "" {
			if !r.HasT {
				r.T = begin.UnixMilli() + skew
			}
			if err := p.Add(r); err != nil {
				drop, invalid = DropInvalid, err
			}
		}
		if drop != "" {
			c.dropped.Inc(drop)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("scraping %s: %w", u.Redacted(), err)
	}
	if invalid != nil {
		c.cfg.Log.Warn("invalid samples were dropped", "last", invalid)
	}
	c.scraped.Add(float64(n))
	for kind, n := range skipped.ByKind() {
		c.skipped.Add(float64(n), kind)
	}
	return got, nil
}

// sourceSkew returns by how many ms the source's clock is ahead of this one's: as
// before, unless its Date differs from that by more than truncation to seconds and the
// way here make of clocks that go alike; 0 if it says nothing. So the times of samples
// that have none do not jump to and fro with what is truncated.
func sourceSkew(date string, wall, before int64) int64 {
	t, err := http.ParseTime(date)
	if err != nil || t.Unix() < 0 {
		return 0
	}
	skew := t.UnixMilli() - wall
	if changed := skew - before; max(changed, -changed) > sourceSlack.Milliseconds() {
		return skew
	}
	return before
}

// Text appends what is pushed of a scrape's samples, before compression.
func (c *Client) Text(b []byte, got *Scraped, samples []Sample) []byte {
	for _, s := range samples {
		b = AppendSample(b, got.Push.Line(s), s.T+got.Shift, s.V)
	}
	return b
}

// final returns a scrape, which was spooled before any server was heard, with its final
// times.
func (c *Client) final(sc Scrape) Scrape {
	sc.Shift, _ = c.clocks.Shift(sc.At, sc.Source)
	sc.Final = true
	if sc.Shift == 0 {
		return sc
	}
	var unpack Decompressor
	text, _, err := unpack.Decompress(sc.Gzip, "gzip", sc.Size)
	if err != nil { // never: the spool has checked it
		sc.Shift = 0
		return sc
	}
	text = shiftText(text, sc.Shift)
	sc.Size, sc.Gzip = len(text), Gzip(text)
	return sc
}

// pieces renders samples of a scrape as one piece, or as several if the limits
// need it. A series that alone is over them is dropped.
func (c *Client) pieces(got *Scraped, samples []Sample) []Scrape {
	limit := min(c.cfg.LimitBytes, MaxPiece)
	text := c.Text(nil, got, samples)
	if int64(len(text)) <= MaxDecodedFactor*limit {
		if z := Gzip(text); int64(len(z)) <= limit {
			return []Scrape{{At: got.At, Source: got.Source, Shift: got.Shift, Final: got.Final, Samples: len(samples), Size: len(text), Gzip: z}}
		}
	}
	if len(samples) <= 1 {
		c.dropped.Inc(DropInvalid)
		c.cfg.Log.Warn("a series that does not fit --limit-bytes was dropped", "bytes", len(text))
		return nil
	}
	return append(c.pieces(got, samples[:len(samples)/2]), c.pieces(got, samples[len(samples)/2:])...)
}

// shiftText returns text exposition as Client.Text renders it with all times shifted. A line
// without a time stays as it is.
func shiftText(text []byte, ms int64) []byte {
	out := make([]byte, 0, len(text)+len(text)/16)
	for line := range bytes.Lines(text) {
		end := bytes.LastIndexByte(line, ' ')
		value := bytes.LastIndexByte(line[:max(0, end)], ' ')
		if value >= 0 {
			t, err := strconv.ParseInt(string(bytes.TrimSuffix(line[end+1:], []byte("\n"))), 10, 64)
			// Else the blank before is in a label's value.
			if _, bad := strconv.ParseFloat(string(line[value+1:end]), 64); err == nil && bad == nil {
				out = append(strconv.AppendInt(append(out, line[:end+1]...), t+ms, 10), '\n')
				continue
			}
		}
		out = append(out, line...)
	}
	return out
}
