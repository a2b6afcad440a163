package main

// This file counts the results of the load generator's pushes and prints them. The memory of a
// report is bounded, whatever the servers answer. Latencies are kept in a histogram whose buckets
// are at most 4 % wide.

import (
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"net/http"
	"slices"
	"strings"
	"time"
)

// LatencyHistogram counts durations in buckets. Below 32 µs a bucket is 1 µs wide. Above, each
// power of two has 32 buckets. The zero value is empty. It is not safe for concurrent use.
type LatencyHistogram struct {
	buckets [32 * 32]int
	count   int
	max     time.Duration
}

// Add adds d. A duration of more than an hour counts as an hour.
func (h *LatencyHistogram) Add(d time.Duration) {
	h.max = max(h.max, d)
	us := uint64(max(0, min(d, time.Hour)).Microseconds())
	i := int(us)
	if us >= 32 {
		shift := bits.Len64(us) - 6 // the six highest bits remain: a 1 and five bits that choose the bucket
		i = shift*32 + int(us>>shift)
	}
	h.buckets[i]++
	h.count++
}

// Quantile returns the upper bound of the bucket that has the quantile q, which is from 0 to 1, and
// at most the greatest duration. It returns 0 if the histogram is empty.
func (h *LatencyHistogram) Quantile(q float64) time.Duration {
	rank, sum := int(q*float64(h.count-1)), 0
	for i, n := range h.buckets {
		if sum += n; sum > rank {
			upper := int64(i + 1)
			if i >= 64 {
				shift := i/32 - 1
				upper = int64(i%32+33) << shift
			}
			return min(h.max, time.Duration(upper)*time.Microsecond)
		}
	}
	return 0
}

// loadAnswers counts the answers with one status.
type loadAnswers struct {
	count int
	first string // the reason in the first of these answers; empty for 200
}

// LoadReport has the results of RunLoad.
type LoadReport struct {
	Took       time.Duration
	Pushes     int   // pushes that were answered or failed
	Samples    int64 // samples that servers accepted
	Duplicates int64 // samples that servers held already
	Bytes      int64 // bytes of the bodies of all pushes that were answered, as sent
	Stopped    error // why nothing was pushed after the first pushes; nil if the run took place
	Latency    LatencyHistogram
	answers    map[int]loadAnswers // by status; 0: the push failed without an answer
	dropped    map[string]int64    // samples that servers dropped, by reason; at most maxLoadReasons reasons
	notes      []string            // what kept the run from being the one that was asked for
}

const (
	noAnswer       = 0
	maxLoadReasons = 32
)

// addPush counts a push whose body has size bytes and that was answered with status. why is the
// reason of a failure, with what to do about it. Only pushes that succeeded count for the latency.
func (r *LoadReport) addPush(size, status int, why string, latency time.Duration) {
	r.Pushes++
	if status != noAnswer {
		r.Bytes += int64(size)
	}
	a, known := r.answers[status]
	if !known {
		a.first = why
	}
	a.count++
	r.answers[status] = a
	if status == http.StatusOK {
		r.Latency.Add(latency)
	}
}

// addAnswer counts the samples of a push that a server answered with 200.
func (r *LoadReport) addAnswer(a *PushAnswer) {
	r.Samples += int64(*a.Accepted)
	r.Duplicates += int64(a.Duplicates)
	for reason, n := range a.Dropped {
		if _, known := r.dropped[reason]; known || len(r.dropped) < maxLoadReasons {
			r.dropped[reason] += int64(n)
		}
	}
}

// Failed returns the number of pushes that were not answered with 200.
func (r *LoadReport) Failed() int { return r.Pushes - r.answers[http.StatusOK].count }

// Err returns an error unless every push was answered with 200 and no sample was dropped.
func (r *LoadReport) Err() error {
	switch {
	case r.Stopped != nil:
		return r.Stopped
	case r.Pushes == 0:
		return errors.New("no push was sent")
	case r.Failed() > 0:
		return fmt.Errorf("%d of %d pushes failed", r.Failed(), r.Pushes)
	case len(r.dropped) > 0:
		return errors.New("servers dropped samples of the pushes")
	}
	return nil
}

// String returns the report as lines for a person.
func (r *LoadReport) String() string {
	var b strings.Builder
	seconds := max(r.Took.Seconds(), 1e-9)
	for _, note := range r.notes {
		fmt.Fprintf(&b, "note      %s\n", note)
	}
	fmt.Fprintf(&b, "pushes    %d in %.1f s, %.0f a second\n", r.Pushes, seconds, float64(r.Pushes)/seconds)
	fmt.Fprintf(&b, "samples   %d accepted, %.0f a second\n", r.Samples, float64(r.Samples)/seconds)
	if r.Duplicates > 0 {
		fmt.Fprintf(&b, "samples   %d that the servers held already\n", r.Duplicates)
	}
	for _, reason := range slices.Sorted(maps.Keys(r.dropped)) {
		fmt.Fprintf(&b, "samples   %d dropped by the servers: %.50s\n", r.dropped[reason], reason)
	}
	if answered := r.Pushes - r.answers[noAnswer].count; answered > 0 {
		fmt.Fprintf(&b, "bytes     %d sent in bodies, %.0f a push\n", r.Bytes, float64(r.Bytes)/float64(answered))
	}
	if r.Latency.count > 0 {
		fmt.Fprintf(&b, "latency   %s\n", r.latencyText())
	}
	for _, status := range slices.Sorted(maps.Keys(r.answers)) {
		a, name := r.answers[status], fmt.Sprint("answer ", status)
		if status == noAnswer {
			name = "no answer"
		}
		fmt.Fprintf(&b, "%-9s %s", name, countPushes(a.count))
		if a.first != "" {
			fmt.Fprintf(&b, "; the first: %s", a.first)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// loadAdvice returns what to do about a push that failed for reason, or "" if the reason says it. status
// is that of the answer. isTokenFile is as in LoadConfig.
func loadAdvice(status int, reason string, isTokenFile bool) string {
	has := func(text string) bool { return strings.Contains(reason, text) }
	switch revoked := has(TokenRevokedText) || has(ClusterRevokedText); {
	case status == http.StatusBadRequest && IsAnswerOfTLSPort(reason):
		return "write https:// instead of http:// in --to"
	case status == http.StatusUnauthorized && revoked && isTokenFile:
		return "--revoked-file of the servers has this token or its cluster ID: use the token of another site"
	case status == http.StatusUnauthorized && revoked:
		return "--revoked-file of the servers has the cluster ID: use another --prefix, or remove the ID from the file"
	case status == http.StatusUnauthorized && isTokenFile && has("needs a token of kind"):
		return "servers with --authorize take no client tokens here: use --keys instead of --token-file"
	case status == http.StatusUnauthorized && isTokenFile:
		return ReplaceToken
	case status == http.StatusUnauthorized && has(TokenExpiredText):
		return "correct the clock of this machine or of the servers"
	case status == http.StatusUnauthorized:
		return "make sure that --keys are the keys of these servers"
	case status == http.StatusRequestEntityTooLarge && !has(NoBodyText):
		return "use fewer --series, or start the servers with a larger --limit-bytes"
	case status == http.StatusRequestEntityTooLarge, status == http.StatusNotFound, status == http.StatusMethodNotAllowed:
		return "--to must be the address of --listen of a server, the listener for clients"
	case status == http.StatusTooManyRequests:
		return "the sites push faster than the servers' --ratelimit allows: use --interval or more --sites, or start the servers with --ratelimit 0"
	}
	return ""
}

// countPushes returns "1 push" or "2 pushes".
func countPushes(n int) string {
	if n == 1 {
		return "1 push"
	}
	return fmt.Sprintf("%d pushes", n)
}

func formatLatency(d time.Duration) string { return fmt.Sprintf("%.2f ms", d.Seconds()*1000) }

// latencyText describes the latencies of the pushes that were answered with 200.
func (r *LoadReport) latencyText() string {
	h := &r.Latency
	return fmt.Sprintf("p50 %s, p90 %s, p99 %s, max %s",
		formatLatency(h.Quantile(0.5)), formatLatency(h.Quantile(0.9)), formatLatency(h.Quantile(0.99)), formatLatency(h.max))
}
