package main

// This file carries a push from the HTTP request to the store. It reads the headers and the body of
// the push. Then it either forwards the push to the owner of the site, or has it decoded and
// appends it to the site log. The answer 200 means that one server has stored every sample of the
// push that was not dropped, now or with an earlier push. With a storage directory, these samples
// are in the log, which is flushed unless the sender keeps the samples. All memory that remote input
// can claim is bounded, both per site and in total.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Results of a push: values of the label result in telemeter_pushes_total.
const (
	resultAccepted    = "accepted"
	resultRateLimited = "rate_limited"
	resultOverloaded  = "overloaded"
	resultFull        = "full"
	resultFailed      = "failed"
	resultTooLarge    = "too_large"
	resultUnsupported = "unsupported"
	resultMalformed   = "malformed"
)

// Reasons for which the store drops a sample: values of the label reason in
// telemeter_samples_dropped_total. serverDropReasons also lists the reasons for which a sample is
// dropped before the store gets it.
const (
	dropConflict    = "conflicting_value"
	dropTooOld      = "too_old"
	dropFuture      = "future"
	dropSeriesLimit = "series_limit"
)

// serverDropReasons lists all reasons for which a server drops samples of a push that it accepts.
// The alert TelemeterSamplesDropped in testdata/alerts.yml fires only for those reasons that an
// operator has to look into.
var serverDropReasons = [...]string{DropNotAllowed, DropRequiredLabel, DropInvalid, dropConflict, dropTooOld, dropFuture, dropSeriesLimit}

// dropCounts counts the dropped samples of one push by reason, in the order of serverDropReasons. It
// is an array, because most pushes drop no sample.
type dropCounts [len(serverDropReasons)]int

// add counts n samples that are dropped for a reason, which must be one of serverDropReasons.
func (c *dropCounts) add(reason string, n int) {
	c[slices.Index(serverDropReasons[:], reason)] += n
}

// of returns the number of samples that are dropped for a reason, which must be one of
// serverDropReasons.
func (c *dropCounts) of(reason string) int {
	return c[slices.Index(serverDropReasons[:], reason)]
}

// byReason returns the counts that are not 0.
func (c *dropCounts) byReason() map[string]int {
	counts := map[string]int{}
	for i, n := range c {
		if n > 0 {
			counts[serverDropReasons[i]] = n
		}
	}
	return counts
}

// uploadError is the error of a push that the server refuses. Its text goes to the client.
type uploadError struct {
	status     int
	result     string
	text       string
	retryAfter time.Duration // how soon the client may try again, for the header Retry-After; 0 = no such header
}

func (e *uploadError) Error() string { return e.text }

func errOverloaded(text string) error {
	return &uploadError{http.StatusServiceUnavailable, resultOverloaded, text, 5 * time.Second}
}

func errPushTooLarge(text string) error {
	return &uploadError{http.StatusRequestEntityTooLarge, resultTooLarge, text, 0}
}

func errMalformed(text string) error {
	return &uploadError{http.StatusBadRequest, resultMalformed, text, 0}
}

func errUnsupported(text string) error {
	return &uploadError{http.StatusUnsupportedMediaType, resultUnsupported, text, 0}
}

// refusalResponse returns the response to a push that failed with err. It cuts a text of more than
// maxErrorText bytes, because the text can quote a whole header. An error that is not an
// uploadError gets a fixed text.
func refusalResponse(err error) *pushResponse {
	var e *uploadError
	if !errors.As(err, &e) {
		e = &uploadError{http.StatusInternalServerError, resultFailed, "the push could not be handled", 0}
	}
	text := e.text
	if len(text) > maxErrorText {
		text = strings.ToValidUTF8(text[:maxErrorText], "") + "…"
	}
	return &pushResponse{Status: e.status, Result: e.result, Body: []byte(text + "\n"), RetryAfter: int(math.Ceil(e.retryAfter.Seconds()))}
}

// handleUpload answers POST /upload: it authenticates the client, stores the push or forwards it,
// and answers with the counts of its samples or with a refusal.
func (s *Server) handleUpload(w http.ResponseWriter, r *http.Request) {
	kinds := []string{KindUpload}
	if s.cfg.ExternalAuthorizer == nil {
		kinds = append(kinds, KindClient)
	}
	t, ok := s.authenticate(w, r, kinds...)
	if !ok {
		return
	}
	if t.Kind == KindClient {
		s.sites.SetTokenExpiry(t.ClusterID, t.Expires, s.cfg.Now())
	}
	resp, err := s.receivePush(w, r, t)
	if err != nil {
		resp = refusalResponse(err)
	}
	s.pushesTotal.Inc(resp.Result)
	if resp.Status == http.StatusOK {
		if resp.AllUntimely {
			s.noteRefusal("timestamps", t.ClusterID, "all samples were dropped because of their timestamps", true)
		} else {
			s.sites.SetPushAccepted(t.ClusterID, s.cfg.Now())
		}
		w.Header().Del("Connection")
		w.Header().Set("Content-Type", "application/json")
		w.Write(resp.Body) // an error means only that the connection failed; the client then pushes again
		return
	}
	text := strings.TrimSpace(string(resp.Body))
	// While this server is starting or stopping, a refused push does not count as a failed push of the
	// site.
	s.noteRefusal(resp.Result, t.ClusterID, text, s.ready.Load())
	s.logRefusal(resp.Result, t.ClusterID, "cluster_id", t.ClusterID, "remote", r.RemoteAddr, "status", resp.Status, "reason", text)
	if resp.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(resp.RetryAfter))
	}
	http.Error(w, text, resp.Status)
}

// noteRefusal remembers a refusal for the status. The cluster ID is "" if the sender is not
// authenticated. If isFailure is true, a push of the site failed for a reason that its alerts must
// see.
func (s *Server) noteRefusal(reason, clusterID, text string, isFailure bool) {
	now := s.cfg.Now()
	r := newRefusal(now, reason, clusterID, text)
	s.refusals.add(r)
	s.history.add(now, func(a *activity) { a.Refusals++ })
	if clusterID != "" {
		s.sites.AddRefusal(r, isFailure)
	}
}

// logSite writes a line about a site to the process log, at most once in siteLogEvery for each site
// and message. The next line with the message says how many were left out. message must be a
// constant of the program. The caller must count the events elsewhere.
func (s *Server) logSite(level slog.Level, clusterID, message string, args ...any) {
	if suppressed, ok := s.sites.TakeSiteLog(clusterID, message, s.cfg.Now()); ok {
		args = append([]any{"cluster_id", clusterID}, args...)
		if suppressed > 0 {
			args = append(args, "suppressed", suppressed)
		}
		s.cfg.Log.Log(context.Background(), level, message, args...)
	}
}

// logRefusal logs that a push of a site was refused. It logs at most one refusal of each site in
// LimitedLogEvery, because a site may push what it likes, and refusals for lack of room at most once
// for all sites together.
func (s *Server) logRefusal(result, clusterID string, args ...any) {
	level := refusalLevel(result)
	switch {
	case result == resultOverloaded:
		s.limitedLog.Log(level, "push refused because the server is overloaded or not ready", args...)
		return
	case level > slog.LevelDebug:
		suppressed, ok := s.sites.TakeRefusalLog(clusterID, s.cfg.Now())
		if !ok {
			return
		}
		if suppressed > 0 {
			args = append(args, "suppressed", suppressed)
		}
	}
	s.cfg.Log.Log(context.Background(), level, "push refused", args...)
}

// refusalLevel returns the level at which this server logs that it refused a push with the given
// result.
func refusalLevel(result string) slog.Level {
	switch result {
	case resultFailed, resultFull: // the server whose store failed has already logged the cause, at error level
		return slog.LevelDebug
	case resultRateLimited: // otherwise a site that pushes too fast would flood the process log
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// receivePush reads an authenticated push and has it stored by the owner of its site. This server
// stores the push itself if it is the owner, or if the owner cannot take the push. receivePush
// checks the rate limit and the limits on pushes in flight before it reads the body.
func (s *Server) receivePush(w http.ResponseWriter, r *http.Request, t Token) (*pushResponse, error) {
	arrival := s.cfg.Now() // taken before the body is read, because reading the body may take long
	release, err := s.acquirePush(t.ClusterID)
	if err != nil {
		return nil, err
	}
	defer release()
	push := &pushRequest{
		ClusterID: t.ClusterID, Labels: t.Labels, Arrival: arrival.UnixMilli(), Type: r.Header.Get("Content-Type"),
		Encoding: strings.ToLower(r.Header.Get("Content-Encoding")), Spool: r.Header.Get(SpoolHeader), Consumers: r.Header.Get(ConsumersHeader),
		Sync: r.Header.Get(SyncHeader) == "1", Remote: r.RemoteAddr,
	}
	params, err := parsePushParams(push)
	if err != nil {
		return nil, err
	}
	if offset, err := strconv.ParseInt(r.Header.Get(ClockOffsetHeader), 10, 64); err == nil && offset >= -maxClockOffset && offset <= maxClockOffset {
		s.setClockOffset(t.ClusterID, time.Duration(offset)*time.Millisecond, arrival)
	}
	body := s.bodies.Get().(*[]byte)
	defer s.bodies.Put(body)
	if err := s.readPushBody(w, r, body); err != nil {
		return nil, err
	}
	// storeTimeout begins only after the body has been read, because over a slow link the body
	// alone may take longer than storeTimeout.
	ctx, cancel := context.WithTimeout(r.Context(), storeTimeout)
	defer cancel()
	if s.cfg.Forwarder != nil {
		if resp := s.cfg.Forwarder.TryForward(ctx, push, *body); resp != nil {
			return resp, nil
		}
	}
	return s.decodeAndStorePush(ctx, push, params, *body)
}

// setClockOffset records how far the clock of a site's source is behind the servers' clocks, as the
// client reports it. It warns of a clock that is off by so much that the client shifts timestamps.
func (s *Server) setClockOffset(clusterID string, behind time.Duration, now time.Time) {
	s.sites.SetClockOffset(clusterID, behind, now)
	if behind.Abs() >= MinClockShift*time.Millisecond {
		s.logSite(slog.LevelWarn, clusterID, "the clock of the site's source is off, and the client corrects the timestamps by the offset: synchronize the clock of that host (NTP)", "behind", behind)
	}
}

// storeForwarded stores a push that another member forwarded; see storeForwardedFunc. It returns
// the error handBack, so that the other member stores the push, in two cases. One is that this
// server is not ready. The other is that all samples were dropped because of their timestamps, and
// the arrival time of the push by the other server's clock is more than maxClockDifference before
// or after the current time.
func (s *Server) storeForwarded(ctx context.Context, push *pushRequest, body []byte) (resp *pushResponse, handBack error) {
	if !s.ready.Load() {
		return nil, errors.New("the server is not ready")
	}
	now := s.cfg.Now()
	resp, err := s.acquireAndStorePush(ctx, push, body)
	if err != nil {
		return refusalResponse(err), nil
	}
	if apart := now.Sub(time.UnixMilli(push.Arrival)).Abs(); resp.AllUntimely && apart > maxClockDifference {
		return nil, fmt.Errorf("all samples are too old or in the future, and the clocks of the two servers differ by %v", apart.Round(time.Second))
	}
	return resp, nil
}

// acquireAndStorePush stores a forwarded push. The same limits apply as to a push from a client.
func (s *Server) acquireAndStorePush(ctx context.Context, push *pushRequest, body []byte) (*pushResponse, error) {
	release, err := s.acquirePush(push.ClusterID)
	if err != nil {
		return nil, err
	}
	defer release()
	params, err := parsePushParams(push)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	return s.decodeAndStorePush(ctx, push, params, body)
}

// acquirePush lets a push of a site begin. It returns an error if this server is not ready, if the
// site exceeds its rate limit, or if too many pushes of the site or of all sites are in flight. It
// also returns an error if the site is new and too many sites are tracked. Unless it returns an
// error, the caller must call release at the end of the push.
func (s *Server) acquirePush(clusterID string) (release func(), err error) {
	if why := s.whyNotReady(); why != "" {
		return nil, errOverloaded("the server is not ready: " + why)
	}
	if wait, err := s.sites.AcquirePush(clusterID, s.cfg.Now()); err != nil {
		return nil, &uploadError{http.StatusTooManyRequests, resultRateLimited, err.Error(), wait}
	}
	if !s.uploads.TryAcquire() {
		s.sites.ReleasePush(clusterID)
		return nil, errOverloaded("too many pushes are in flight")
	}
	s.inFlight.Add(1)
	return func() {
		s.inFlight.Add(-1)
		s.uploads.Release()
		s.sites.ReleasePush(clusterID)
	}, nil
}

// pushParams has the parsed headers of a push.
type pushParams struct {
	format    Format
	scrapes   ScrapeNames
	consumers []ConsumerAge
	sync      bool // the sender may not keep the scrapes
}

func parsePushParams(push *pushRequest) (p pushParams, err error) {
	if p.format, err = ParseFormat(push.Type); err != nil {
		return p, errUnsupported(err.Error())
	}
	if !SupportsEncoding(push.Encoding) {
		return p, errUnsupported(fmt.Sprintf("content encoding %q is not supported; supported: %s", push.Encoding, SupportedEncodings))
	}
	var consumersErr error
	p.sync = push.Sync
	p.scrapes, err = ParseScrapeNames(push.Spool)
	p.consumers, consumersErr = ParseConsumers(push.Consumers)
	if err = errors.Join(err, consumersErr); err != nil {
		return p, errMalformed(err.Error())
	}
	return p, nil
}

func (s *Server) errBodyTooLarge() error {
	return errPushTooLarge(fmt.Sprintf("the body is larger than %d bytes; raise the server's --limit-bytes to accept larger bodies", s.cfg.LimitBytes))
}

// readPushBody reads the body of a push into *body and reuses the memory of *body. It returns an
// error if the body has more than LimitBytes bytes, ends early or arrives too slowly.
func (s *Server) readPushBody(w http.ResponseWriter, r *http.Request, body *[]byte) (err error) {
	if r.ContentLength > s.cfg.LimitBytes {
		return s.errBodyTooLarge()
	}
	*body, err = ReadAllInto(*body, http.MaxBytesReader(w, r.Body, s.cfg.LimitBytes))
	s.receivedBytes.Add(float64(len(*body)))
	if max := (*http.MaxBytesError)(nil); errors.As(err, &max) {
		return s.errBodyTooLarge()
	}
	if err != nil {
		return &uploadError{http.StatusRequestTimeout, resultMalformed, "the body ended early or arrived too slowly", 0}
	}
	return nil
}

// appendPush appends the samples of a push and the names of its scrapes to the site's log, unless
// the push only asks which scrapes are held and read. It returns an uploadError if the store
// refuses the push, or ErrDecodeAgain.
func (s *Server) appendPush(ctx context.Context, clusterID string, params pushParams, samples *SampleList) (res AppendResult, err error) {
	// Add the consumers that the client reports before the samples are stored. Otherwise the
	// samples could be evicted before these consumers have read them.
	s.cfg.Store.Consumers.AddClientReportedConsumers(SiteKey(clusterID), params.consumers, s.cfg.Now())
	if params.scrapes.SpoolID != 0 && len(params.scrapes.Numbers) == 0 && len(samples.Samples) == 0 {
		return res, nil // this push only asks which scrapes are held and read
	}
	res, err = s.cfg.Store.Append(ctx, clusterID, samples, params.scrapes, params.sync)
	switch {
	case err == nil, errors.Is(err, ErrDecodeAgain):
		return res, err
	case errors.Is(err, ErrTooLarge):
		return res, errPushTooLarge(err.Error())
	case errors.Is(err, ErrFull):
		s.limitedLog.Log(slog.LevelError, "cannot store push", "cluster_id", clusterID, "err", err)
		return res, &uploadError{http.StatusServiceUnavailable, resultFull, "the server has no room for more samples", time.Minute}
	case errors.Is(err, ErrClockInDoubt):
		return res, &uploadError{http.StatusServiceUnavailable, resultOverloaded, err.Error(), 30 * time.Second}
	case errors.Is(err, ErrClosed), ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return res, errOverloaded("the server is too busy to store the push")
	}
	s.limitedLog.Log(slog.LevelError, "cannot store push", "cluster_id", clusterID, "err", err)
	return res, &uploadError{http.StatusServiceUnavailable, resultFailed, "the server could not store the push", 30 * time.Second}
}

// countAndAnswerAccepted counts a stored push and returns the answer to it. If all samples that
// reached the store were dropped because of their timestamps, if the operator's rules dropped all
// samples, or if samples of new series were dropped because of the limit on series, the answer has a
// hint. The cause is also logged, at most once in siteLogEvery for each site.
func (s *Server) countAndAnswerAccepted(push *pushRequest, params pushParams, samples *SampleList, counts pushDropCounts, res AppendResult) *pushResponse {
	clusterID, allUntimely := push.ClusterID, res.IsAllUntimely()
	if res.FirstOfSite {
		s.logFirstPush(push, res.Accepted)
	}
	res.Duplicates += counts.repeated
	counts.dropped.add(dropConflict, res.Conflicts)
	counts.dropped.add(dropTooOld, res.TooOld)
	counts.dropped.add(dropFuture, res.Future)
	counts.dropped.add(dropSeriesLimit, res.NoRoom)
	s.countAcceptedPush(counts, res)
	now := s.cfg.Now()
	s.history.add(now, func(a *activity) { a.Pushes, a.Samples = a.Pushes+1, a.Samples+res.Accepted })
	answer := &PushAnswer{
		Accepted: &res.Accepted, Duplicates: res.Duplicates, Dropped: counts.dropped.byReason(), Skipped: counts.skippedByKind(),
		Server: s.cfg.Name, Time: now.UnixMilli(),
	}
	switch {
	case allUntimely:
		answer.Hint = untimelyHint(samples, res.TooOld, res.Future, s.cfg.Store.KeptSince(), now.UnixMilli())
		s.logSite(slog.LevelWarn, clusterID, "all samples of a push were dropped because of their timestamps", "too_old", res.TooOld, "future", res.Future, "hint", answer.Hint)
	case counts.received > 0 && counts.dropped.of(DropNotAllowed)+counts.dropped.of(DropRequiredLabel) == counts.received:
		answer.Hint = rulesHint
		s.logSite(slog.LevelWarn, clusterID, "--allow or --required-label dropped all samples of a push: correct these flags, or what the site pushes",
			"samples", counts.received, DropNotAllowed, counts.dropped.of(DropNotAllowed), DropRequiredLabel, counts.dropped.of(DropRequiredLabel))
	case res.NoRoom > 0:
		answer.Hint = seriesLimitHint
		s.logSite(slog.LevelWarn, clusterID, "samples of new series were dropped, because the site has as many series as --limit-series allows", "dropped", res.NoRoom, "hint", answer.Hint)
	}
	if spool := params.scrapes.SpoolID; spool != 0 {
		st := s.cfg.Store.RefreshSpoolStatus(clusterID, spool)
		held, read := st.Held.String(), st.Read.String()
		answer.Held, answer.Consumers, answer.OtherSpoolTime = &held, FormatConsumers(st.Consumers), st.OtherTime
		if st.HasConsumers || res.KeptBySender { // without the list the client would remove the scrapes
			answer.Read = &read
		}
	}
	body := append(answer.AppendJSON(make([]byte, 0, 256)), '\n')
	return &pushResponse{Status: http.StatusOK, Result: resultAccepted, Body: body, AllUntimely: allUntimely}
}

// logFirstPush logs that this server has stored the first push of a site. A server that joins a ring,
// or starts without its storage, logs it again.
func (s *Server) logFirstPush(push *pushRequest, accepted int) {
	args := []any{"cluster_id", push.ClusterID, "remote", push.Remote, "samples", accepted}
	if len(push.Labels) > 0 {
		args = append(args, "labels", push.Labels)
	}
	s.cfg.Log.Info("first push of site", args...)
}

func (s *Server) countAcceptedPush(counts pushDropCounts, res AppendResult) {
	if res.WriteTime > 0 && !res.KeptBySender {
		s.appendSeconds.Observe(res.WriteTime.Seconds())
	}
	s.acceptedTotal.Add(float64(res.Accepted))
	s.duplicatesTotal.Add(float64(res.Duplicates))
	for i, n := range counts.dropped {
		if n > 0 {
			s.droppedTotal.Add(float64(n), serverDropReasons[i])
		}
	}
	for kind, n := range counts.skippedByKind() {
		s.skippedTotal.Add(float64(n), kind)
	}
}

// rulesHint tells the client what to do if all samples were dropped because of the operator's rules.
const rulesHint = "the server's --allow or --required-label accepts none of these series: push other series, or have these flags corrected on every server"

// seriesLimitHint tells the client what to do if samples were dropped because of the limit on series.
const seriesLimitHint = "the site has as many series as the server's --limit-series allows: push fewer series (--match of the client), or raise --limit-series on every server"

// untimelyHint explains to the client what is wrong with the timestamps of a push, if all samples
// that reached the store are too old or in the future. Such a push is answered with 200, but for
// the site's alerts it counts as failed. oldestAccepted is the oldest timestamp that is accepted,
// and now is the current time, both in ms since the Unix epoch.
//
// A client may send timestamps in seconds by mistake. A current time in seconds, read as
// milliseconds, lies in January 1970. No real sample is that old, so one such timestamp is enough
// to recognize the mistake. One day of tolerance on either side allows for a wrong clock or time
// zone.
func untimelyHint(samples *SampleList, tooOld, future int, oldestAccepted, now int64) string {
	const day = 24 * 60 * 60 // seconds
	switch {
	case slices.ContainsFunc(samples.Samples, func(s Sample) bool { return s.T >= oldestAccepted/1000-day && s.T <= now/1000+day }):
		return "the timestamps look like seconds, but must be milliseconds"
	case future == 0:
		return "all samples are older than --retention"
	case tooOld == 0:
		return "all samples are ahead of the server's clock"
	}
	return "all samples are older than --retention or ahead of the server's clock"
}
