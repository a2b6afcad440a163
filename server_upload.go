package main

// A push on its way from the request to the store: limits, decoding, the answer. A 200 means
// durable. All memory that remote input can claim is bounded, per sender and in all.

import (
	"context"
	"encoding/json"
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

// Results of a push, as telemeter_pushes_total names them.
const (
	resultAccepted    = "accepted"
	resultRateLimited = "rate_limited"
	resultOverloaded  = "overloaded"
	resultFull        = "full"
	resultFailed      = "failed"
	resultTooLarge    = "too_large"
	resultUnsupported = "unsupported"
	resultMalformed   = "malformed"

	dropConflict = "conflicting_value"
	dropTooOld   = "too_old"
	dropFuture   = "future"
)

// refusal is a push that is not taken: the status, what metrics call it, and
// what the sender is told.
type refusal struct {
	status int
	result string
	why    string
	retry  time.Duration
}

// answer returns what the sender gets.
func (r *refusal) answer() *PushResult {
	why := r.why
	if len(why) > maxReason {
		why = strings.ToValidUTF8(why[:maxReason], "") + "…"
	}
	return &PushResult{Status: r.status, Result: r.result, Body: []byte(why + "\n"), Retry: int(math.Ceil(r.retry.Seconds()))}
}

// upload takes a push.
func (s *Server) upload(w http.ResponseWriter, r *http.Request) {
	kinds := []string{KindUpload, KindClient}
	if s.cfg.Authorizer != nil {
		kinds = kinds[:1]
	}
	t, ok := s.authenticate(w, r, kinds...)
	if !ok {
		return
	}
	if t.Kind == KindClient {
		s.senders.SetTokenExpiry(t.Cluster, t.Expires, s.cfg.Now())
	}
	a, ref := s.admit(w, r, t)
	if ref != nil {
		a = ref.answer()
	}
	s.pushes.Inc(a.Result)
	// A server that starts or ends is no fault of the push.
	if a.Untimely || a.Status != http.StatusOK && s.ready.Load() {
		s.senders.SetFailed(t.Cluster, s.cfg.Now())
	}
	if a.Status == http.StatusOK {
		w.Header().Del("Connection")
		w.Header().Set("Content-Type", "application/json")
		w.Write(a.Body) // an error is the connection's: the sender asks again
		return
	}
	level := slog.LevelInfo
	switch a.Result {
	case resultFailed, resultFull, resultRateLimited:
		level = slog.LevelDebug // logged with the cause; and the limit holds for the log too
	}
	why := strings.TrimSpace(string(a.Body))
	s.cfg.Log.Log(r.Context(), level, "push refused", "cluster", t.Cluster, "remote", r.RemoteAddr, "status", a.Status, "reason", why)
	if a.Retry > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(a.Retry))
	}
	http.Error(w, why, a.Status)
}

func overloaded(why string) *refusal {
	return &refusal{http.StatusServiceUnavailable, resultOverloaded, why, 5 * time.Second}
}

// begin lets a push begin, as far as the rate and the number in flight allow. end has to be
// called when it is done.
func (s *Server) begin(id string) (end func(), ref *refusal) {
	if !s.ready.Load() {
		return nil, overloaded("the server is not ready")
	}
	if wait, err := s.senders.AcquirePush(id, s.cfg.Now()); err != nil {
		return nil, &refusal{http.StatusTooManyRequests, resultRateLimited, err.Error(), wait}
	}
	select {
	case s.uploads <- struct{}{}:
	default:
		s.senders.ReleasePush(id)
		return nil, overloaded("too many pushes are being handled")
	}
	s.inFlight.Add(1)
	return func() {
		s.inFlight.Add(-1)
		<-s.uploads
		s.senders.ReleasePush(id)
	}, nil
}

// admit limits an authenticated push before anything of it is read, and has its owner take
// it. If the owner cannot be reached, this server takes it.
func (s *Server) admit(w http.ResponseWriter, r *http.Request, t Token) (*PushResult, *refusal) {
	arrival := s.cfg.Now() // of the head: the body may take long
	end, ref := s.begin(t.Cluster)
	if ref != nil {
		return nil, ref
	}
	defer end()
	up := &ForwardedPush{
		Cluster: t.Cluster, Labels: t.Labels, Arrival: arrival.UnixMilli(), Type: r.Header.Get("Content-Type"),
		Encoding: strings.ToLower(r.Header.Get("Content-Encoding")), Spool: r.Header.Get(SpoolHeader), Consumers: r.Header.Get(ConsumersHeader),
	}
	head, ref := readHead(up)
	if ref != nil {
		return nil, ref
	}
	if offset, err := strconv.ParseInt(r.Header.Get(ClockOffsetHeader), 10, 64); err == nil && offset >= -maxOffset && offset <= maxOffset {
		s.senders.SetClockOffset(t.Cluster, time.Duration(offset)*time.Millisecond, arrival)
	}
	body := s.bodies.Get().(*[]byte)
	defer s.bodies.Put(body)
	if ref := s.read(w, r, body); ref != nil {
		return nil, ref
	}
	// Only now: a thin line may take longer than this for the body alone.
	ctx, cancel := context.WithTimeout(r.Context(), uploadWait)
	defer cancel()
	if s.cfg.Forwarder != nil {
		if a := s.cfg.Forwarder.Forward(ctx, up, *body); a != nil {
			return a, nil
		}
	}
	return s.take(ctx, up, head, *body)
}

// Forwarded takes a push that another server received. The error says that the receiver
// should keep the push itself.
func (s *Server) Forwarded(ctx context.Context, up *ForwardedPush, body []byte) (*PushResult, error) {
	if !s.ready.Load() {
		return nil, errors.New("the server is not ready")
	}
	end, ref := s.begin(up.Cluster)
	if ref != nil {
		return ref.answer(), nil
	}
	defer end()
	head, ref := readHead(up)
	if ref != nil {
		return ref.answer(), nil
	}
	ctx, cancel := context.WithTimeout(ctx, uploadWait)
	defer cancel()
	now := s.cfg.Now()
	a, ref := s.take(ctx, up, head, body)
	if ref != nil {
		return ref.answer(), nil
	}
	if apart := now.Sub(time.UnixMilli(up.Arrival)).Abs(); a.Untimely && apart > clocksApart {
		return nil, fmt.Errorf("no sample is of its time, and its clock differs from the receiver's by %v", apart.Round(time.Second))
	}
	return a, nil
}

// pushHead is what the headers of a push say.
type pushHead struct {
	format    Format
	names     ScrapeNames
	consumers []ConsumerAge
}

func readHead(up *ForwardedPush) (h pushHead, ref *refusal) {
	var err, consumersErr error
	if h.format, err = ParseFormat(up.Type); err != nil {
		return h, &refusal{http.StatusUnsupportedMediaType, resultUnsupported, err.Error(), 0}
	}
	if !new(Decompressor).Supports(up.Encoding) {
		return h, &refusal{http.StatusUnsupportedMediaType, resultUnsupported,
			fmt.Sprintf("content encoding %q is not supported; supported: %s", up.Encoding, SupportedEncodings), 0}
	}
	h.names, err = ParseScrapeNames(up.Spool)
	h.consumers, consumersErr = ParseConsumers(up.Consumers)
	if err = errors.Join(err, consumersErr); err != nil {
		return h, &refusal{http.StatusBadRequest, resultMalformed, err.Error(), 0}
	}
	return h, nil
}

// take decodes a push and stores it here.
func (s *Server) take(ctx context.Context, up *ForwardedPush, head pushHead, body []byte) (*PushResult, *refusal) {
	if int64(len(body)) > s.cfg.LimitBytes {
		return nil, s.tooLarge()
	}
	// Bodies wait here in the bounded form in which they came.
	select {
	case s.decoding <- struct{}{}:
	case <-ctx.Done():
		return nil, overloaded("the server is too busy to decode the push")
	}
	ws := s.workspaces.Get().(*workspace)
	defer func() {
		if ws.size <= maxWorkspace {
			s.workspaces.Put(ws)
		}
	}()
	d, ref := s.decode(ws, up, head.format, body)
	if ref != nil {
		return nil, ref
	}
	defer s.pending.Add(-d.bytes)
	if s.pending.Add(d.bytes) > maxPending {
		return nil, overloaded("too many pushes wait to be stored")
	}
	return s.keep(ctx, up, head, &ws.push, d)
}

func (s *Server) tooLarge() *refusal {
	return &refusal{http.StatusRequestEntityTooLarge, resultTooLarge,
		fmt.Sprintf("the body is larger than %d bytes; the server's --limit-bytes raises that", s.cfg.LimitBytes), 0}
}

// read reads a body into body's memory.
func (s *Server) read(w http.ResponseWriter, r *http.Request, body *[]byte) (ref *refusal) {
	if r.ContentLength > s.cfg.LimitBytes {
		return s.tooLarge()
	}
	var err error
	*body, err = ReadInto(*body, http.MaxBytesReader(w, r.Body, s.cfg.LimitBytes))
	s.received.Add(float64(len(*body)))
	if max := (*http.MaxBytesError)(nil); errors.As(err, &max) {
		return s.tooLarge()
	}
	if err != nil {
		return &refusal{http.StatusRequestTimeout, resultMalformed, "the body ended early, or came too slowly", 0}
	}
	return nil
}

// readPush is what is known of a push before it is stored.
type readPush struct {
	drops   map[string]int
	skipped Skipped
	bytes   int64 // of memory
}

// decode decodes and normalizes a body into ws.push. Samples without a time get that of the
// arrival at the first server.
// It gives back a slot of decoding, before the push is stored: an owner or a disk that
// does not answer must not keep other sites waiting.
func (s *Server) decode(ws *workspace, up *ForwardedPush, format Format, sent []byte) (*readPush, *refusal) {
	defer func() { <-s.decoding }()
	limit := MaxDecodedFactor * int(s.cfg.LimitBytes)
	body, over, err := ws.decompressor.Decompress(sent, up.Encoding, limit)
	defer func() { ws.size = cap(body) + cap(ws.push.Arena) + cap(ws.push.Samples)*sampleBytes }()
	if err != nil {
		return nil, &refusal{http.StatusBadRequest, resultMalformed, err.Error(), 0}
	}
	if over {
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge,
			fmt.Sprintf("the decompressed body is larger than %d bytes, %d times --limit-bytes", limit, MaxDecodedFactor), 0}
	}
	st := s.state.Load()
	forced := st.Normalizer.Forced(up.Cluster, up.Labels)
	ws.push.Reset()
	ws.push.MaxBytes = 4 * limit
	ws.push.MaxSamples = limit / 16
	drops := map[string]int{}
	received := 0
	skipped, err := ws.decoder.Decode(body, format, func(r *RawSample) error {
		received++
		drop, err := st.Normalizer.Apply(r, forced)
		if err != nil {
			return err
		}
		if drop != "" {
			drops[drop]++
			return nil
		}
		if !r.HasT {
			r.T = up.Arrival
		}
		if err = ws.push.Add(r); errors.Is(err, ErrNULValue) {
			drops[DropInvalid]++
			return nil
		}
		return err
	})
	switch {
	case errors.Is(err, ErrListSize):
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge, err.Error() + "; the server's --limit-bytes raises that", 0}
	case errors.Is(err, ErrTooLarge):
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge, err.Error(), 0}
	case err != nil:
		return nil, &refusal{http.StatusBadRequest, resultMalformed, err.Error(), 0}
	}
	s.samples.Add(float64(received))
	memory := len(body) + len(ws.push.Arena) + len(ws.push.Samples)*sampleBytes
	return &readPush{drops: drops, skipped: skipped, bytes: int64(memory)}, nil
}

// keep stores a decoded push.
func (s *Server) keep(ctx context.Context, up *ForwardedPush, head pushHead, p *SampleList, d *readPush) (*PushResult, *refusal) {
	drops, skipped, names := d.drops, d.skipped, head.names
	// Before the push is stored: its samples must not be evicted unread.
	s.cfg.Store.Consumers.AddReported(SiteKey(up.Cluster), head.consumers, s.cfg.Now())
	var res AppendResult
	var err error
	if names.ID == 0 || len(names.Numbers) > 0 || len(p.Samples) > 0 { // else it is only a question
		res, err = s.cfg.Store.Append(ctx, up.Cluster, p, names)
	}
	switch {
	case errors.Is(err, ErrSeriesLimit):
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge, err.Error() + "; the server's --limit-series raises that", 0}
	case errors.Is(err, ErrTooLarge):
		return nil, &refusal{http.StatusRequestEntityTooLarge, resultTooLarge, err.Error(), 0}
	case errors.Is(err, ErrFull):
		s.cfg.Log.Error("storing push", "cluster", up.Cluster, "err", err)
		return nil, &refusal{http.StatusServiceUnavailable, resultFull, "the server has no room for more samples", time.Minute}
	case errors.Is(err, ErrClock):
		return nil, &refusal{http.StatusServiceUnavailable, resultOverloaded, err.Error(), 30 * time.Second}
	case errors.Is(err, ErrClosed), ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return nil, overloaded("the server is too busy to store the push")
	case err != nil:
		s.cfg.Log.Error("storing push", "cluster", up.Cluster, "err", err)
		return nil, &refusal{http.StatusServiceUnavailable, resultFailed, "the server could not store the push", 30 * time.Second}
	}
	if res.Write > 0 {
		s.write.Observe(res.Write.Seconds())
	}
	for reason, n := range map[string]int{dropConflict: res.Conflicts, dropTooOld: res.TooOld, dropFuture: res.Future} {
		if n > 0 {
			drops[reason] = n
		}
	}
	for reason, n := range drops {
		s.dropped.Add(float64(n), reason)
	}
	s.accepted.Add(float64(res.Accepted))
	s.duplicates.Add(float64(res.Duplicates))
	now := s.cfg.Now()
	answer := &PushAnswer{
		Accepted: &res.Accepted, Duplicates: res.Duplicates, Dropped: drops, Hint: s.timely(up.Cluster, p, res, now),
		Server: s.cfg.Name, Time: now.UnixMilli(),
	}
	for kind, n := range skipped.ByKind() {
		if n > 0 {
			if answer.Skipped == nil {
				answer.Skipped = map[string]int{}
			}
			answer.Skipped[kind] = n
			s.skipped.Add(float64(n), kind)
		}
	}
	if names.ID != 0 {
		st := s.cfg.Store.Spool(up.Cluster, names.ID)
		held, read := st.Held.String(), st.Read.String()
		answer.Held, answer.Consumers = &held, FormatConsumers(st.Consumers)
		if st.Settled {
			answer.Read = &read
		}
	}
	b, err := json.Marshal(answer)
	if err != nil { // of numbers and strings: cannot be
		return nil, &refusal{http.StatusInternalServerError, resultFailed, "the answer could not be made", 0}
	}
	return &PushResult{Status: http.StatusOK, Result: resultAccepted, Body: append(b, '\n'), Untimely: res.Untimely()}, nil
}

// timely returns a hint for the sender if the time of every sample of a push is too old or
// in the future. Such a push is answered 200, but counts as failed for the site's alerts.
func (s *Server) timely(id string, p *SampleList, res AppendResult, now time.Time) (hint string) {
	if !res.Untimely() {
		return ""
	}
	hint = timesHint(p, res.TooOld, res.Future, s.cfg.Store.Oldest(), now.UnixMilli())
	if s.senders.ShouldLogUntimely(id, now) {
		s.cfg.Log.Warn("every sample of a push was dropped for its time", "cluster", id, "too_old", res.TooOld, "future", res.Future, "hint", hint)
	}
	return hint
}

// timesHint says what is wrong with the times of a push whose samples are all too old or of
// the future. oldest is the least time that is accepted, in ms, as is now. A present time
// in seconds, read as milliseconds, is in January 1970, and no sample is that old, so a
// single one tells. A day more on either side allows for a wrong clock or time zone.
func timesHint(p *SampleList, tooOld, future int, oldest, now int64) string {
	const day = 24 * 60 * 60 // s
	switch {
	case slices.ContainsFunc(p.Samples, func(s Sample) bool { return s.T >= oldest/1000-day && s.T <= now/1000+day }):
		return "the times look like seconds; they have to be milliseconds"
	case future == 0:
		return "all samples are older than --retention"
	case tooOld == 0:
		return "all samples are ahead of the server's clock"
	}
	return "all samples are older than --retention or ahead of the server's clock"
}
