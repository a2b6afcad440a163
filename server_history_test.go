package main

// Tests of the history of a server: the activities of the last hour against a simple model, and the
// bounds of the refusals that a server remembers.

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// The activities of the last hour are the same as those of a model that keeps every event, also if
// the clock jumps ahead by hours. If the clock jumps back by less than an hour, events count for the
// newest step until the clock has caught up. If it jumps back further, the history begins again.
func TestActivityHistory(t *testing.T) {
	rnd := rand.New(rand.NewPCG(testSeed(t, 0), 1))
	var h activityHistory
	pushes, newest, now := map[int64]int{}, int64(0), testNow // pushes by number of the step
	for i := range 20_000 {
		switch rnd.IntN(200) {
		case 0:
			now = now.Add(time.Duration(rnd.Int64N(int64(5 * time.Hour))))
		case 1:
			now = now.Add(-time.Duration(rnd.Int64N(int64(5 * time.Hour))))
		default:
			now = now.Add(time.Duration(rnd.Int64N(int64(20 * time.Second))))
		}
		if step := now.UnixMilli() / historyStep.Milliseconds(); step <= newest-historySteps {
			newest = step
			clear(pushes)
		} else {
			newest = max(newest, step)
		}
		if rnd.IntN(3) > 0 {
			pushes[newest]++
			h.add(now, func(a *activity) { a.Pushes++ })
			continue
		}
		steps, end := h.upTo(now)
		var got, want []int
		for j, a := range steps {
			got, want = append(got, a.Pushes), append(want, pushes[newest-historySteps+1+int64(j)])
		}
		if wantEnd := time.UnixMilli((newest + 1) * historyStep.Milliseconds()); len(got) != historySteps || !slices.Equal(got, want) || !end.Equal(wantEnd) {
			t.Fatalf("event %d: the last hour to %v has the pushes %v, want that to %v with %v", i, end, got, wantEnd, want)
		}
	}
}

// A server remembers the newest refusal for each of at most maxRefusalReasons reasons, newest first,
// and how often each occurred.
func TestRefusalHistory(t *testing.T) {
	var h refusalHistory
	if got := h.newestFirst(); got == nil || len(got) != 0 {
		t.Errorf("without a refusal: %#v, want an empty list that is not nil", got)
	}
	count := map[string]int{}
	rnd := rand.New(rand.NewPCG(testSeed(t, 0), 2))
	for i := range 5000 {
		reason := fmt.Sprint("reason ", min(i, rnd.IntN(2*maxRefusalReasons)))
		if _, known := count[reason]; known || len(count) < maxRefusalReasons {
			count[reason]++
		}
		h.add(newRefusal(testNow.Add(time.Duration(i)*time.Second), reason, "site", fmt.Sprint(i)))
	}
	got := h.newestFirst()
	if len(got) != maxRefusalReasons || !slices.IsSortedFunc(got, func(a, b Refusal) int { return b.At.Compare(a.At) }) {
		t.Errorf("%d refusals are remembered, want %d, newest first: %v", len(got), maxRefusalReasons, got)
	}
	for _, r := range got {
		if r.Count != count[r.Reason] || r.Text != fmt.Sprint(int(r.At.Sub(testNow).Seconds())) {
			t.Errorf("%+v: want the count %d, and the text of the newest refusal", r, count[r.Reason])
		}
	}
}

// The text of a refusal is cut at a rune, and is valid UTF-8 whatever a site sends.
func TestRefusalText(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{" short \n", "short"},
		{"a\xffb", "ab"},
		{strings.Repeat("x", maxRefusalText), strings.Repeat("x", maxRefusalText)},
		{strings.Repeat("x", maxRefusalText+1), strings.Repeat("x", maxRefusalText) + "…"},
		{strings.Repeat("x", maxRefusalText-1) + "€€", strings.Repeat("x", maxRefusalText-1) + "…"},
		{strings.Repeat("\xff", 1000), "…"},
	} {
		got := newRefusal(testNow, "reason", "", c.text).Text
		if got != c.want || !utf8.ValidString(got) {
			t.Errorf("%.300q became %q, want %q", c.text, got, c.want)
		}
	}
}
