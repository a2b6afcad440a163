package main

// This file warns of values of the flags --match, --rename, --anonymize-labels and --elide-label
// that no series of the source matches, because they are probably misspelled. It warns at the first
// scrape, and when a value begins to match nothing; it also logs when such a value matches again.
// It warns of a scrape without series, too. Each message is limited to one line in
// unmatchedLogInterval. Memory is bounded, because only values in the present configuration are
// remembered.

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Names of flags, as they are in the label flag of telemeter_source_unmatched_flags.
const (
	matchFlag      = "match"
	renameFlag     = "rename"
	anonymizeFlag  = "anonymize-labels"
	elideLabelFlag = "elide-label"
)

// unmatchedLogInterval is the least time between two warnings of one value, because some series
// come and go.
const unmatchedLogInterval = time.Hour

// flagValue is one value of a flag.
type flagValue struct{ flag, value string }

// unmatchedLog remembers which warnings were logged. The zero value is ready for use.
type unmatchedLog struct {
	values map[flagValue]warning
	empty  warning // of a scrape without series
	costly warning // of selectors that were not checked
}

// warning is the state of one warning. The zero value is ready for use.
type warning struct {
	on bool      // the warning was logged, and its end was not
	at time.Time // when it was logged last
}

// update takes whether the warning's reason holds now. It reports whether the warning or its end
// must be logged now.
func (w *warning) update(now time.Time, holds bool) (begins, ends bool) {
	begins = holds && !w.on && (w.at.IsZero() || now.Sub(w.at) >= unmatchedLogInterval)
	ends = !holds && w.on
	if begins {
		w.on, w.at = true, now
	} else if ends {
		w.on = false
	}
	return begins, ends
}

// LogUnmatchedFlags logs warnings about the flags that match no series of a scrape, and sets the
// gauge of these flags. If no series is left, it logs only a warning of that, because nothing can
// then be said about renames and labels. If the selectors were not checked, their warnings and their
// gauge stay as they are.
func (c *Client) LogUnmatchedFlags(got *CleanedScrape) {
	now := c.cfg.Now()
	if !got.Use.Unchecked {
		c.unmatchedFlags.Set(float64(len(got.Use.UnmatchedSelectors)), matchFlag)
	}
	switch begins, ends := c.unmatched.empty.update(now, got.Samples == 0); {
	case begins:
		c.cfg.Log.Warn("no series leaves the site", "from", c.cfg.From.Redacted(), "scraped", got.Scraped, "advice", emptyAdvice(got))
	case ends:
		c.cfg.Log.Info("series leave the site now", "samples", got.Samples)
	}
	if got.Samples == 0 {
		c.setUnmatched(nil)
		return
	}
	if begins, _ := c.unmatched.costly.update(now, got.Use.Unchecked); begins {
		c.cfg.Log.Info("it is not checked whether every --match matches a series, because there are too many selectors and series")
	}
	var unmatched []string
	values := map[flagValue]warning{}
	count := map[string]int{}
	update := func(flag, value string, matches bool, text func() (warn, advice string)) {
		key := flagValue{flag, value}
		if _, repeated := values[key]; repeated {
			return
		}
		if !matches {
			count[flag]++
			unmatched = append(unmatched, fmt.Sprintf("--%s %.200s", flag, value))
		}
		w := c.unmatched.values[key]
		switch begins, ends := w.update(now, !matches); {
		case begins:
			warn, advice := text()
			c.cfg.Log.Warn(warn, "advice", advice)
		case ends:
			c.cfg.Log.Info(fmt.Sprintf("--%s %.200s matches series now", flag, value))
		}
		values[key] = w
	}
	isUnmatched := map[string]bool{}
	for _, s := range got.Use.UnmatchedSelectors {
		isUnmatched[s.String()] = true
	}
	for _, s := range got.Use.Selectors {
		if got.Use.Unchecked {
			key := flagValue{matchFlag, s.String()}
			values[key] = c.unmatched.values[key]
			continue
		}
		update(matchFlag, s.String(), !isUnmatched[s.String()], func() (warn, advice string) {
			return fmt.Sprintf("no series matches --match %.200s", s), "correct the selector, or remove it from --match or --match-file; --dry-run without --match prints all series of the source"
		})
	}
	cleaner := c.state.Load().NewCleaner()
	isNewName := map[string]bool{}
	for _, name := range cleaner.Rename {
		isNewName[name] = true
	}
	for _, old := range slices.Sorted(maps.Keys(got.Use.Renamed)) {
		value := old + "=" + cleaner.Rename[old]
		update(renameFlag, value, got.Use.Renamed[old] > 0, func() (warn, advice string) {
			names, _ := namesIn(got)
			names = slices.DeleteFunc(names, func(name string) bool { return isNewName[name] })
			return fmt.Sprintf("no series has the name %.200s: --rename %.200s renames nothing", old, value), didYouMean(old, names) + "correct the name, or remove the flag"
		})
	}
	for _, name := range slices.Sorted(maps.Keys(got.Use.Anonymized)) {
		update(anonymizeFlag, name, got.Use.Anonymized[name] > 0, func() (warn, advice string) {
			_, labels := namesIn(got)
			return fmt.Sprintf("no series has the label %.200s: --anonymize-labels %.200s hashes nothing", name, name),
				didYouMean(name, labels) + "values of a label that is not named leave the site readable; --dry-run prints what leaves"
		})
	}
	for _, name := range slices.Sorted(maps.Keys(got.Use.Elided)) {
		update(elideLabelFlag, name, got.Use.Elided[name] > 0, func() (warn, advice string) {
			_, labels := namesIn(got)
			return fmt.Sprintf("no series has the label %.200s: --elide-label %.200s removes nothing", name, name), didYouMean(name, labels) + "correct the name, or remove the flag"
		})
	}
	c.unmatched.values = values
	c.setUnmatched(unmatched)
	for _, flag := range []string{renameFlag, anonymizeFlag, elideLabelFlag} {
		c.unmatchedFlags.Set(float64(count[flag]), flag)
	}
}

// setUnmatched records the flags that match no series, for the status.
func (c *Client) setUnmatched(flags []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unmatchedNow = flags
}

// didYouMean returns the question whether the name in names that is nearest to word was meant, or
// "" if none is near.
func didYouMean(word string, names []string) string {
	if nearest := NearestName(word, names); nearest != "" {
		return "did you mean " + nearest + "? "
	}
	return ""
}

// emptyAdvice returns what the operator can do about a scrape without series.
func emptyAdvice(got *CleanedScrape) string {
	var selectors []string
	for _, s := range got.Use.UnmatchedSelectors {
		selectors = append(selectors, s.String())
	}
	switch {
	case len(selectors) > 0:
		return fmt.Sprintf("no series matches --match or --match-file: correct the selectors; --dry-run without them prints all series of the source; the selectors are: %.500s", strings.Join(selectors, " "))
	case got.Scraped == 0:
		return "the source has no series: check --from, and that the source scrapes its own targets"
	}
	return "all series were dropped; telemeter_samples_dropped_total has the reasons"
}

// namesIn returns the names of the metrics and of the labels in a scrape, sorted.
func namesIn(got *CleanedScrape) (metrics, labels []string) {
	ofMetrics, ofLabels := map[string]bool{}, map[string]bool{}
	got.eachSeries(func(name []byte, labels []Label) {
		addKey(ofMetrics, name)
		for i := range labels {
			addKey(ofLabels, labels[i].Name)
		}
	})
	return slices.Sorted(maps.Keys(ofMetrics)), slices.Sorted(maps.Keys(ofLabels))
}

// addKey adds key to set. It allocates no memory for a key that set has already.
func addKey(set map[string]bool, key []byte) {
	if !set[string(key)] {
		set[string(key)] = true
	}
}
