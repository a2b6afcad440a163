package main

// This file remembers the last hour of a server's pushes and scrapes, for the plots of the status
// page, and the newest refusals by reason. Memory is fixed. Pure: callers pass the time.

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	historyStep  = 30 * time.Second // span of one activity
	historySteps = 120              // activities that are kept: one hour

	maxRefusalReasons = 64  // refusals that a refusalHistory remembers; the program has fewer reasons
	maxRefusalText    = 200 // bytes of the text of a refusal that are remembered, apart from the sign that it is cut
)

// activity has the counts of one historyStep.
type activity struct {
	Pushes, Samples, Refusals, Scrapes int
	SlowestScrape                      time.Duration
}

// activityHistory has the activities of the last historySteps steps. The zero value is ready for
// use. It is safe for concurrent use.
type activityHistory struct {
	mu    sync.Mutex // guards the fields below
	steps [historySteps]activity
	last  int64 // number of the newest step since the Unix epoch; it has index last % historySteps
}

// add calls change with the activity at the time now. If the clock was set back by less than the
// history lasts, this is the newest activity that there is. If it was set back further, the history
// begins again.
func (h *activityHistory) add(now time.Time, change func(*activity)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.advance(now)
	change(&h.steps[h.last%historySteps])
}

// advance clears the steps between the newest one and the time now. The caller must hold h.mu.
func (h *activityHistory) advance(now time.Time) {
	step := max(now.UnixMilli()/historyStep.Milliseconds(), historySteps)
	if step <= h.last-historySteps {
		h.last = step - historySteps
	}
	for h.last = max(h.last, step-historySteps); h.last < step; {
		h.last++
		h.steps[h.last%historySteps] = activity{}
	}
}

// upTo returns the activities of the last hour before now, oldest first. The newest one has only
// begun. end is the end of its step.
func (h *activityHistory) upTo(now time.Time) (steps []activity, end time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.advance(now)
	for i := h.last + 1; i <= h.last+historySteps; i++ {
		steps = append(steps, h.steps[i%historySteps])
	}
	return steps, time.UnixMilli((h.last + 1) * historyStep.Milliseconds())
}

// Refusal is the newest of the refusals for one reason.
type Refusal struct {
	Reason    string    `json:"reason"` // value of the label result of telemeter_pushes_total or of the label reason of telemeter_unauthorized_total
	Count     int       `json:"count"`  // refusals for this reason since the server started
	At        time.Time `json:"at"`
	ClusterID string    `json:"cluster_id,omitempty"` // "" if the request was not authenticated
	Text      string    `json:"text"`                 // cut to maxRefusalText bytes
}

// newRefusal returns a Refusal with the count 1. Its text is a cut copy of text, in valid UTF-8, so
// that the refusal keeps no larger string in memory.
func newRefusal(now time.Time, reason, clusterID, text string) Refusal {
	text = strings.TrimSpace(text)
	if len(text) > maxRefusalText {
		text = text[:maxRefusalText] + "…"
	}
	return Refusal{Reason: reason, Count: 1, At: now.UTC(), ClusterID: clusterID, Text: strings.Clone(strings.ToValidUTF8(text, ""))}
}

// refusalHistory has the newest refusal for each refusalKey. The zero value is ready for use. It is
// safe for concurrent use.
type refusalHistory struct {
	mu    sync.Mutex // guards byKey
	byKey map[refusalKey]Refusal
}

// refusalKey tells refusals of sites from those of strangers. A stranger must not replace the newest
// refusal of a site, and some reasons mean a faulty token for the one and a faulty push for the other.
type refusalKey struct {
	reason   string
	isOfSite bool // the request was authenticated
}

// add records a refusal. The reason must be a constant of the program. A further refusalKey than
// maxRefusalReasons is ignored.
func (h *refusalHistory) add(r Refusal) {
	h.mu.Lock()
	defer h.mu.Unlock()
	key := refusalKey{r.Reason, r.ClusterID != ""}
	old, known := h.byKey[key]
	if !known && len(h.byKey) >= maxRefusalReasons {
		return
	}
	if h.byKey == nil {
		h.byKey = map[refusalKey]Refusal{}
	}
	r.Count += old.Count
	h.byKey[key] = r
}

// newestFirst returns the newest refusal for each refusalKey.
func (h *refusalHistory) newestFirst() []Refusal {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := []Refusal{}
	for _, r := range h.byKey {
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b Refusal) int {
		return cmp.Or(b.At.Compare(a.At), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.ClusterID, b.ClusterID))
	})
	return all
}
