package main

// This file makes the status of a client. The status page, /api/status and --mode status all show the
// same ClientStatus. This file alone decides which problems a client has. Making a status changes
// nothing.

import (
	"cmp"
	"fmt"
	"net/http"
	"time"
)

const (
	maxStatusFamilies = 50               // metric names of the newest delivered scrape in a status
	readIsLate        = 30 * time.Minute // scrapes that a server holds and no consumer has read for this long need attention
	spoolIsNearlyFull = 0.9              // part of --spool-limit from which the spool needs attention
)

// ClientStatus is the status of a client, and the JSON that /api/status answers with.
type ClientStatus struct {
	ProcessStatus
	Source       SourceStatus      `json:"source"`
	Destination  DestinationStatus `json:"destination"`
	Spool        ClientSpoolStatus `json:"spool"`
	Sent         *SentStatus       `json:"sent,omitempty"`          // nil if no scrape was delivered since the start
	TokenExpires *time.Time        `json:"token_expires,omitempty"` // nil if it never does, or if that is not known
	Unmatched    []string          `json:"unmatched_flags"`         // flags with a value that matches no series of the source
}

// SourceStatus describes the scrapes of the source.
type SourceStatus struct {
	URL           string     `json:"url"`
	Others        []string   `json:"other_urls,omitempty"`  // other values of --from
	LastScrape    *time.Time `json:"last_scrape,omitempty"` // the newest successful one; nil if there was none
	Samples       int        `json:"samples"`               // of that scrape, before cleaning
	Kept          int        `json:"kept"`                  // of these samples, after cleaning
	Seconds       float64    `json:"seconds"`               // that it took
	FailingSince  *time.Time `json:"failing_since,omitempty"`
	Error         string     `json:"error,omitempty"`
	Missing       float64    `json:"missing_seconds"`         // time whose samples are still to be fetched
	MissingError  string     `json:"missing_error,omitempty"` // why they could not be fetched at the last attempt
	OffsetSeconds float64    `json:"clock_offset_seconds"`    // how far the source's clock is behind the servers' clocks; 0 if unknown

	emptyAdvice string // remedy if Kept of the newest successful scrape is 0; otherwise ""
}

// DestinationStatus describes the pushes to the servers.
type DestinationStatus struct {
	To           []string   `json:"to"`
	Server       string     `json:"server,omitempty"`    // the one of the newest attempt
	LastPush     *time.Time `json:"last_push,omitempty"` // the newest one that a server accepted
	Samples      int        `json:"samples"`             // of that push
	Bytes        int        `json:"bytes"`               // of that push, compressed
	FailingSince *time.Time `json:"failing_since,omitempty"`
	Error        string     `json:"error,omitempty"`
}

// ClientSpoolStatus describes the spool.
type ClientSpoolStatus struct {
	Dir    string             `json:"dir"` // "" = in memory only
	Used   int64              `json:"used_bytes"`
	Limit  int64              `json:"limit_bytes"`
	States []SpoolStateStatus `json:"states"` // one for each delivery state
}

// SpoolStateStatus describes the scrapes with one delivery state.
type SpoolStateStatus struct {
	State            string  `json:"state"`
	Scrapes          int     `json:"scrapes"`
	Bytes            int64   `json:"bytes"`
	OldestAgeSeconds float64 `json:"oldest_age_seconds"`
}

// SentStatus describes the scrape that was delivered last.
type SentStatus struct {
	ScrapedAt time.Time     `json:"scraped_at"`
	Samples   int           `json:"samples"`
	Families  []FamilyCount `json:"families"` // most samples first, at most maxStatusFamilies
	Others    int           `json:"other_families"`
}

// setScraped records a successful scrape for the status.
func (c *Client) setScraped(got *CleanedScrape, begin time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.source = SourceStatus{LastScrape: TimeOrNil(begin), Samples: got.Scraped, Kept: got.Samples, Seconds: c.cfg.Now().Sub(begin).Seconds()}
	if got.Samples == 0 {
		c.source.emptyAdvice = emptyAdvice(got)
	}
}

// setSourceFailed records a failed scrape for the status.
func (c *Client) setSourceFailed(err error, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.source.FailingSince, c.source.Error = cmp.Or(c.source.FailingSince, TimeOrNil(now)), err.Error()
}

// setPushed records for the status that a server has accepted a push. With 0 samples it records only
// that the server has answered, because a question is a push without samples.
func (p *Pusher) setPushed(samples, bytes int) {
	p.statusMu.Lock()
	defer p.statusMu.Unlock()
	st := &p.status
	st.Server, st.FailingSince, st.Error = p.currentServerURL(), nil, ""
	if samples > 0 {
		st.LastPush, st.Samples, st.Bytes = TimeOrNil(p.cfg.Now()), samples, bytes
	}
}

// setPushFailed records a failed attempt for the status.
func (p *Pusher) setPushFailed(err error) {
	p.statusMu.Lock()
	defer p.statusMu.Unlock()
	st := &p.status
	st.Server, st.FailingSince, st.Error = p.currentServerURL(), cmp.Or(st.FailingSince, TimeOrNil(p.cfg.Now())), err.Error()
}

// setClockOffset records how far the source's clock is behind the servers' clocks, for the status.
func (p *Pusher) setClockOffset(offset time.Duration) {
	p.statusMu.Lock()
	defer p.statusMu.Unlock()
	p.sourceOffset = offset
}

// ClockOffset returns how far the source's clock was behind the servers' clocks at the newest pushed
// scrape, or 0 if that is not known.
func (p *Pusher) ClockOffset() time.Duration {
	p.statusMu.Lock()
	defer p.statusMu.Unlock()
	return p.sourceOffset
}

// DestinationStatus returns the status of the pushes.
func (p *Pusher) DestinationStatus() DestinationStatus {
	p.statusMu.Lock()
	defer p.statusMu.Unlock()
	st := p.status
	st.To = p.cfg.To
	return st
}

// Status returns the status of the client.
func (c *Client) Status() *ClientStatus {
	now := c.cfg.Now()
	c.mu.Lock()
	source, unmatched := c.source, c.unmatchedNow
	c.mu.Unlock()
	source.URL, source.OffsetSeconds = c.sources.inUse().url.Redacted(), c.pusher.ClockOffset().Seconds()
	for _, src := range c.sources.all {
		if src != c.sources.inUse() {
			source.Others = append(source.Others, src.url.Redacted())
		}
	}
	if c.backfiller != nil {
		source.Missing, source.MissingError = c.backfiller.pending().Seconds(), c.backfiller.lastFailure()
	}
	st := &ClientStatus{
		ProcessStatus: NewProcessStatus(KindClientStatus, c.cfg.ClusterID, c.started, now, c.cfg.Warnings,
			"source failed", "destination failed", "spool failed; scrapes are kept", "the client token"),
		Source: source, Destination: c.pusher.DestinationStatus(), Spool: c.spoolStatus(), Sent: c.sentStatus(),
		Unmatched: append([]string{}, unmatched...),
	}
	if at := c.state.Load().TokenExpires; at != 0 {
		st.TokenExpires = TimeOrNil(time.Unix(at, 0))
	}
	st.NotReady = c.whyNotReady()
	st.Problems = append(c.problems(st), st.Problems...)
	return st
}

func (c *Client) spoolStatus() ClientSpoolStatus {
	stats, limit := c.spool.Stats(), c.spool.Limit()
	st := ClientSpoolStatus{Dir: c.spool.Dir(), Used: stats.Bytes, Limit: limit}
	for state, part := range stats.ByState {
		st.States = append(st.States, SpoolStateStatus{DeliveryState(state).String(), part.Scrapes, part.Bytes, part.OldestAge.Seconds()})
	}
	return st
}

// sentStatus returns nil if no scrape was delivered since the start, or if it cannot be decoded.
func (c *Client) sentStatus() *SentStatus {
	pieces := c.pusher.LastDeliveredPieces()
	if len(pieces) == 0 {
		return nil
	}
	st := &SentStatus{ScrapedAt: time.UnixMilli(pieces[0].At.Wall).UTC()}
	counts := map[string]int{}
	for _, piece := range pieces {
		err := piece.eachSample(func(r *RawSample) error {
			st.Samples++
			counts[string(r.Name)]++
			return nil
		})
		if err != nil {
			return nil
		}
	}
	st.Families, st.Others = HighestFamilies(counts, maxStatusFamilies)
	return st
}

// problems returns the problems that need attention, except for errors in the process log. The most
// urgent problem is first.
func (c *Client) problems(st *ClientStatus) []string {
	problems := []string{} // not nil, because a status is also JSON
	add := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	age := func(since time.Time) string { return FormatAge(st.Now.Sub(since)) }
	switch {
	case st.Source.FailingSince != nil:
		add("the source has failed for %s: %s", age(*st.Source.FailingSince), st.Source.Error)
	case st.Source.LastScrape == nil:
		add("the source has not been scraped yet")
	case st.Source.emptyAdvice != "":
		add("no series leaves the site: %s", st.Source.emptyAdvice)
	}
	if st.Source.Missing > 0 && st.Source.MissingError != "" {
		add("the samples of missing scrapes of %s cannot be fetched: %s", FormatAge(time.Duration(st.Source.Missing*float64(time.Second))), st.Source.MissingError)
	}
	if text := c.replicasDiffer(); text != "" {
		add("%s", text)
	}
	switch {
	case st.Destination.FailingSince != nil:
		add("pushes have failed for %s: %s", age(*st.Destination.FailingSince), st.Destination.Error)
	case st.NotReady != "" && len(problems) == 0:
		add("%s", st.NotReady)
	}
	if t := st.TokenExpires; t != nil {
		switch left := t.Sub(st.Now); {
		case left <= 0:
			add("the client token expired %s ago: %s", age(*t), RenewToken)
		case left < expiryWarning:
			add("the client token expires in %s: %s", FormatAge(left), RenewToken)
		}
	}
	if n := c.spool.Stats().InMemory; n > 0 && st.Spool.Dir != "" {
		add("%d scrapes are in memory only, because the spool's disk has failed: see the log", n)
	}
	if used := float64(st.Spool.Used); st.Spool.Limit > 0 && used >= spoolIsNearlyFull*float64(st.Spool.Limit) {
		add("the spool uses %.0f %% of --spool-limit; when it is full, the oldest scrapes are dropped", 100*used/float64(st.Spool.Limit))
	}
	if unread := c.spool.NoReadProgressFor(); unread >= readIsLate {
		add("no consumer has read scrapes on the server for %s: check the central Prometheus", FormatAge(unread))
	}
	if off := time.Duration(st.Source.OffsetSeconds * float64(time.Second)); off.Abs() >= MinClockShift*time.Millisecond {
		add("the clock of the source is off by %s: synchronize the clock of that host (NTP)", FormatAge(off.Abs()))
	}
	for _, flag := range st.Unmatched {
		add("%s matches no series of the source: correct or remove it", flag)
	}
	return problems
}

// handleStatusJSON answers GET /api/status.
func (c *Client) handleStatusJSON(w http.ResponseWriter, r *http.Request) { WriteJSON(w, c.Status()) }
