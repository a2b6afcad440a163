package main

import (
	"fmt"
	"testing"
)

// Use tells how many samples were renamed and anonymized, and which selectors no sample matches.
// Selectors that may match nothing without a mistake are left out.
func TestCleanerUse(t *testing.T) {
	texts := []string{"up", `{job=~"no.*"}`, `down{job="node"}`, "upp", "ALERTS", `ALERTS_FOR_STATE{a="b"}`, MatchAll, `up{job="x"}`}
	samples := func() []*RawSample {
		return []*RawSample{
			expoRaw("down", 0, 0, "job", "node", "instance", "a", "region", "r"),
			expoRaw("up", 0, 0, "job", "prom", "instance", "b"),
			expoRaw("up", 0, 0, "job", "prom", "empty", ""),
			expoRaw("push_time_seconds", 0, 0, "reserved", "x"),
		}
	}
	for _, tt := range []struct {
		name string
		c    *ClientCleaner
	}{
		{"the client selects", &ClientCleaner{Match: mustSelect(t, texts...)}},
		{"the source selects", &ClientCleaner{MatchedBySource: mustSelect(t, texts...)}},
	} {
		c := tt.c
		c.Rename = map[string]string{"up": "up2", "upp": "x", "ALERTS": "alerts"}
		c.Anonymize = []string{"instance", "instnce", "empty", "reserved", "region"}
		c.Labels = []Label{{[]byte("region"), []byte("set")}}
		c.SetSalt([]byte(cleanerSalt))
		for _, r := range samples() {
			c.Clean(r)
		}
		got := c.Use()
		if shown, want := fmt.Sprint(got.UnmatchedSelectors), fmt.Sprint(mustSelect(t, "upp", `up{job="x"}`)); shown != want {
			t.Errorf("%s: unmatched selectors %s, want %s", tt.name, shown, want)
		}
		if len(got.Selectors) != 5 || got.Unchecked {
			t.Errorf("%s: checked the selectors %v (unchecked: %v), want all but those of alerts and of all series", tt.name, got.Selectors, got.Unchecked)
		}
		if shown, want := fmt.Sprint(got.Renamed), "map[up:2 upp:0]"; shown != want {
			t.Errorf("%s: renamed %s, want %s", tt.name, shown, want)
		}
		if shown, want := fmt.Sprint(got.Anonymized), "map[empty:0 instance:2 instnce:0 reserved:0]"; shown != want {
			t.Errorf("%s: anonymized %s, want %s", tt.name, shown, want)
		}
	}
	c := &ClientCleaner{MatchedBySource: mustSelect(t, "up"), Rename: map[string]string{"a": "b"}, Anonymize: []string{"l"}}
	if got := fmt.Sprint(c.Use()); got != fmt.Sprint(CleanerUse{Selectors: c.MatchedBySource, UnmatchedSelectors: c.MatchedBySource, Renamed: map[string]int{"a": 0}, Anonymized: map[string]int{"l": 0}}) {
		t.Errorf("without samples: got %s, want that no rule matches", got)
	}
}

// If a Prometheus selects the series, the client does not call a selector unmatched because of
// labels that the Prometheus compares and the client sees in another way: the external labels,
// which Prometheus adds to its answer, and __type__ and __unit__, which the decoders remove.
func TestCleanerUseOfSelectingSource(t *testing.T) {
	for text, unmatched := range map[string]bool{
		`up{prometheus=""}`:           false,
		`up{prometheus!="site"}`:      false,
		`up{prometheus!~"s.*"}`:       false,
		`up{__type__="gauge"}`:        false,
		`up{prometheus="other"}`:      true,
		`upp{__type__="gauge"}`:       true,
		`{prometheus="",job="none"}`:  true,
		`{__name__!="up",job="node"}`: true,
	} {
		c := &ClientCleaner{MatchedBySource: mustSelect(t, text)}
		c.Clean(expoRaw("up", 0, 0, "job", "node", "prometheus", "site"))
		if got := len(c.Use().UnmatchedSelectors) > 0; got != unmatched {
			t.Errorf("%s: unmatched %v, want %v", text, got, unmatched)
		}
	}
}

// The check of selectors ends at a cost, and Use then says so and names no selector.
func TestCleanerUseIsBounded(t *testing.T) {
	c := &ClientCleaner{MatchedBySource: mustSelect(t, "nosuch", `{__name__=~"no.*"}`, `up{job="a",instance=~"x.*"}`, `down{job=~"x.*"}`)}
	c.Clean(expoRaw("up", 0, 0, "job", "a"))
	if cost, want := maxMatchCost-c.unmatched.budget, 4*selectorCost+2*patternCost; cost != want {
		t.Errorf("one sample cost %d, want %d, because two patterns are evaluated", cost, want)
	}
	c.unmatched.budget = 1
	c.Clean(expoRaw("up", 0, 0))
	c.Clean(expoRaw("nosuch", 0, 0))
	if use := c.Use(); !use.Unchecked || len(use.UnmatchedSelectors) > 0 {
		t.Errorf("after the budget is spent: unchecked %v, unmatched %v; want true and none", use.Unchecked, use.UnmatchedSelectors)
	}
}

// Use tells how many samples had each label that is removed. A label that the operator sets counts
// neither as removed nor as anonymized, and a label that is removed does not count as anonymized,
// because its original value cannot leave the site.
func TestCleanerUseOfElidedLabels(t *testing.T) {
	c := &ClientCleaner{Elide: []string{"replica", "replca", "instance", "region"}, Anonymize: []string{"instance", "job"}, Labels: []Label{{[]byte("region"), []byte("set")}}}
	c.SetSalt([]byte(cleanerSalt))
	c.Clean(expoRaw("up", 0, 0, "replica", "a", "instance", "i", "job", "j"))
	c.Clean(expoRaw("up", 0, 0, "replica", "b", "region", "r"))
	c.Clean(expoRaw("up", 0, 0, "replica", ""))
	use := c.Use()
	if got, want := fmt.Sprint(use.Elided, use.Anonymized), "map[instance:1 replca:0 replica:2] map[job:1]"; got != want {
		t.Errorf("removed and anonymized %s, want %s", got, want)
	}
}
