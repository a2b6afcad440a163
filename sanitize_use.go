package main

// This file finds the rules of a ClientCleaner that no sample of a scrape matches: selectors,
// renames, removed and anonymized labels. Such a rule is often misspelled, and a misspelled
// anonymized label lets values leave the site readable. Only selectors that no sample has matched
// yet are evaluated, and the time for that is bounded. Pure: no I/O.

import (
	"slices"
	"strings"
)

// MatchAll is the text of a selector that matches every series.
const MatchAll = `{__name__=~".+"}`

const (
	// Evaluating a selector costs selectorCost, and patternCost for each pattern that is evaluated.
	// An unmatchedSelectors stops at maxMatchCost, which is some tenths of a second.
	selectorCost = 1
	patternCost  = 100
	maxMatchCost = 50_000_000
)

// CleanerUse says which rules of a ClientCleaner matched the samples that Clean did not drop.
type CleanerUse struct {
	Selectors          []Selector     // selectors that can be checked; see unmatchedSelectors
	UnmatchedSelectors []Selector     // subset of Selectors: selectors that matched no sample
	Unchecked          bool           // checking Selectors was given up because of its cost; UnmatchedSelectors is empty
	Renamed            map[string]int // number of renamed samples by old name, for every old name of Rename but ALERTS
	Anonymized         map[string]int // number of samples with the label, for every label of Anonymize that Labels does not replace and Elide does not remove
	Elided             map[string]int // number of samples with the label, for every label of Elide that Labels does not replace
}

// isAlertName reports whether name is a metric that a Prometheus has only while an alert is pending
// or firing. A rule for it that matches nothing is therefore not a mistake.
func isAlertName(name string) bool { return name == "ALERTS" || name == "ALERTS_FOR_STATE" }

// Use returns which rules matched the samples that were passed to Clean so far.
func (c *ClientCleaner) Use() CleanerUse {
	c.prepareUse()
	use := CleanerUse{
		Selectors: c.unmatched.all, UnmatchedSelectors: c.unmatched.list(), Unchecked: c.unmatched.budget <= 0,
		Renamed: map[string]int{}, Anonymized: map[string]int{}, Elided: map[string]int{},
	}
	for i, name := range c.Elide {
		if !hasLabel(c.Labels, name) {
			use.Elided[name] += c.elided[i]
		}
	}
	for old := range c.Rename {
		if n := c.renamed[old]; n > 0 || !isAlertName(old) {
			use.Renamed[old] = n
		}
	}
	for i, name := range c.Anonymize {
		if !hasLabel(c.Labels, name) && !slices.Contains(c.Elide, name) {
			use.Anonymized[name] += c.anonymized[i]
		}
	}
	return use
}

// prepareUse allocates what Use needs, at its first call.
func (c *ClientCleaner) prepareUse() {
	if c.unmatched != nil {
		return
	}
	c.unmatched = newUnmatchedSelectors(c.Match, c.MatchedBySource)
	c.renamed, c.anonymized, c.elided, c.hashed = map[string]int{}, make([]int, len(c.Anonymize)), make([]int, len(c.Elide)), map[string][]byte{}
}

// unmatchedSelectors finds the selectors that match none of the observed series.
type unmatchedSelectors struct {
	all    Selectors // as the operator wrote them; without selectors that may match nothing without a mistake
	left   []int     // indices in all of the selectors that no observed series matches
	tested Selectors // parallel to all: the selectors without the matchers that cannot be tested here
	budget int       // cost that observe may still have
}

// newUnmatchedSelectors returns an unmatchedSelectors of two lists. The selectors in bySource were
// evaluated by a Prometheus, on series that the client sees with other labels: Prometheus adds its
// external labels to the answer, and the decoders remove __type__ and __unit__. The matchers that
// these labels can affect are not tested.
func newUnmatchedSelectors(byClient, bySource Selectors) *unmatchedSelectors {
	u := &unmatchedSelectors{budget: maxMatchCost}
	add := func(s Selector, matchers []matcher) {
		if s.text == MatchAll || slices.ContainsFunc(s.matchers, func(m matcher) bool {
			return m.label == nameLabel && !m.negate && !m.isPattern && isAlertName(m.value)
		}) {
			return
		}
		u.left = append(u.left, len(u.all))
		u.all = append(u.all, s)
		u.tested = append(u.tested, Selector{s.text, matchers})
	}
	for _, s := range byClient {
		add(s, s.matchers)
	}
	for _, s := range bySource {
		add(s, slices.DeleteFunc(slices.Clone(s.matchers), func(m matcher) bool {
			return m.label != nameLabel && (strings.HasPrefix(m.label, "__") || m.matches(nil))
		}))
	}
	return u
}

// observe removes the selectors that match this series from u.left.
func (u *unmatchedSelectors) observe(name []byte, labels []Label) {
	if len(u.left) == 0 || u.budget <= 0 {
		return
	}
	u.left = slices.DeleteFunc(u.left, func(i int) bool {
		matchers := u.tested[i].matchers
		mismatch := u.tested[i].firstMismatch(name, labels)
		u.budget -= selectorCost
		for k := range matchers[:min(mismatch+1, len(matchers))] {
			if matchers[k].isPattern {
				u.budget -= patternCost
			}
		}
		return mismatch == len(matchers)
	})
}

// list returns the selectors that match no observed series. It returns none if observe has stopped
// because of its cost, because then they may match a series that was not tested.
func (u *unmatchedSelectors) list() (unmatched []Selector) {
	if u.budget <= 0 {
		return nil
	}
	for _, i := range u.left {
		unmatched = append(unmatched, u.all[i])
	}
	return unmatched
}
