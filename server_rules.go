package main

// This file watches the operator's rules for samples: --elide-label, --required-label and --allow.
// A rule that matches no sample is often misspelled. The rules are checked with the first push, and
// then over all pushes since the last check. Only a change of a rule is logged. The cost for a push
// is low: it copies and merges one flag for each rule, and evaluates a selector without need only
// until the selector has matched a known series of the site.

import (
	"log/slog"
	"sync"
	"time"
)

// ruleCheckEvery is the shortest time between two checks of a rule.
const ruleCheckEvery = 10 * time.Minute

// ruleName names a rule by its flag and value.
type ruleName struct{ flag, value string }

// logArgs returns the attributes by which a log line names the rule.
func (r ruleName) logArgs() []any {
	flag := "--" + r.flag
	if r.flag == allowFlag {
		flag += " or --allow-file"
	}
	return []any{"flag", flag, "value", r.value}
}

// The flags of rules: values of the label flag in telemeter_unmatched_flags. allowFlag stands for
// --allow-file, too.
const (
	elideFlag    = "elide-label"
	requiredFlag = "required-label"
	allowFlag    = "allow"
)

// ruleWatch knows which rules have matched samples lately. It is safe for concurrent use.
type ruleWatch struct {
	log       *slog.Logger
	now       func() time.Time
	unmatched *Gauge

	mu        sync.Mutex // guards the fields below
	rules     *ServerNormalizer
	use       NormalizerUse     // of the pushes since the last check of all rules
	samples   int               // in these pushes
	checked   time.Time         // time of the last check of all rules; zero if there was none
	isMatched map[ruleName]bool // result of the last check of each rule; has no rule that is not checked yet
	hasNew    bool              // whether some rules are not checked yet
}

func newRuleWatch(m *Metrics, log *slog.Logger, now func() time.Time) *ruleWatch {
	w := &ruleWatch{
		log: log, now: now, rules: &ServerNormalizer{}, isMatched: map[ruleName]bool{},
		unmatched: m.Gauge("telemeter_unmatched_flags", "Values of --elide-label, --required-label, and --allow or --allow-file that matched no sample when they were last checked, by flag.", "flag"),
	}
	w.setUnmatched()
	return w
}

// beginPush reports whether all of these rules that match the known series of a site, as knownUse
// says, have matched a sample since the last check of all rules. If not, the push must be decoded
// without known series: a known series does not show that a sample of it was pushed lately. If the
// check falls between beginPush and finishPush, the rules of the known series count as matched for
// one more interval.
func (w *ruleWatch) beginPush(rules *ServerNormalizer, knownUse NormalizerUse) (matchedLately bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if rules != w.rules {
		w.watch(rules)
	}
	return hasFlags(w.use.Elide, knownUse.Elide) && hasFlags(w.use.Required, knownUse.Required) && hasFlags(w.use.Allow, knownUse.Allow)
}

// hasFlags reports whether each flag that is set in the list flags is also set in the list all.
func hasFlags(all, flags []bool) bool {
	for i, set := range flags {
		if set && !all[i] {
			return false
		}
	}
	return true
}

// finishPush notes which of rules have matched the samples of a push. If rules are due to be
// checked, it logs each rule that begins to match no sample, and each rule that matches samples
// again.
func (w *ruleWatch) finishPush(rules *ServerNormalizer, use NormalizerUse, samples int) {
	unmatched, again, samples := w.noteAndCheck(rules, use, samples)
	for _, r := range unmatched {
		w.log.Warn("no pushed sample matches this rule: if it is not for a site that has yet to push, correct its spelling, or remove it", append(r.logArgs(), "samples", samples)...)
	}
	for _, r := range again {
		w.log.Info("pushed samples match this rule again", r.logArgs()...)
	}
}

// noteAndCheck notes which of rules have matched the samples of a push. It returns the rules that
// begin to match no sample, the rules that match samples again, and the number of samples for which
// this holds. Rules that are new are checked with the first push, and all rules every
// ruleCheckEvery.
func (w *ruleWatch) noteAndCheck(rules *ServerNormalizer, use NormalizerUse, pushed int) (unmatched, again []ruleName, samples int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if rules != w.rules || pushed == 0 { // other rules: the push began before a reload
		return nil, nil, 0
	}
	mergeFlags(w.use.Elide, use.Elide)
	mergeFlags(w.use.Required, use.Required)
	mergeFlags(w.use.Allow, use.Allow)
	w.samples += pushed
	samples = w.samples
	now := w.now()
	allDue := now.Sub(w.checked) >= ruleCheckEvery
	if !allDue && !w.hasNew {
		return nil, nil, samples
	}
	for name, matched := range w.named() {
		before, known := w.isMatched[name]
		if known && !allDue {
			continue
		}
		w.isMatched[name] = matched
		if !matched && (before || !known) {
			unmatched = append(unmatched, name)
		} else if matched && known && !before {
			again = append(again, name)
		}
	}
	w.hasNew = false
	w.setUnmatched()
	if allDue {
		w.checked, w.samples, w.use = now, 0, w.rules.NewUse()
	}
	return unmatched, again, samples
}

func mergeFlags(into, flags []bool) {
	for i, set := range flags {
		into[i] = into[i] || set
	}
}

// watch begins to watch other rules after a reload. Rules that the server had before keep their
// state. The caller must hold w.mu.
func (w *ruleWatch) watch(rules *ServerNormalizer) {
	old, wasMatched := w.named(), w.isMatched
	w.rules, w.use, w.isMatched, w.hasNew = rules, rules.NewUse(), map[ruleName]bool{}, false
	w.forEach(func(name ruleName, matched *bool) {
		*matched = old[name]
		if before, known := wasMatched[name]; known {
			w.isMatched[name] = before
		} else {
			w.hasNew = true
		}
	})
	w.setUnmatched()
}

// named returns for each rule whether it has matched a sample. Equal rules count as one rule. The
// caller must hold w.mu.
func (w *ruleWatch) named() map[ruleName]bool {
	named := map[ruleName]bool{}
	w.forEach(func(name ruleName, matched *bool) { named[name] = named[name] || *matched })
	return named
}

// forEach calls f with each rule and its flag in w.use. The caller must hold w.mu.
func (w *ruleWatch) forEach(f func(name ruleName, matched *bool)) {
	for i, label := range w.rules.Elide {
		f(ruleName{elideFlag, label}, &w.use.Elide[i])
	}
	for i, l := range w.rules.Required {
		f(ruleName{requiredFlag, string(l.Name) + "=" + string(l.Value)}, &w.use.Required[i])
	}
	for i, s := range w.rules.Allow {
		f(ruleName{allowFlag, s.String()}, &w.use.Allow[i])
	}
}

// setUnmatched sets the gauge of the rules that match no sample. The caller must hold w.mu.
func (w *ruleWatch) setUnmatched() {
	count := map[string]int{elideFlag: 0, requiredFlag: 0, allowFlag: 0}
	for name, matched := range w.isMatched {
		if !matched {
			count[name.flag]++
		}
	}
	for flag, n := range count {
		w.unmatched.Set(float64(n), flag)
	}
}
