package main

// Tests of the warnings about rules of the operator that match no sample, and about sites of which
// the rules drop all samples.

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// logged returns the lines of the process log since the last call, without their times.
func (r *srvRig) logged() (lines string) {
	for line := range strings.Lines(r.log.String()[r.logRead:]) {
		_, text, _ := strings.Cut(line, " level=")
		lines += text
	}
	r.logRead = len(r.log.String())
	return lines
}

// useRules makes the server use rules, as a reload does.
func (r *srvRig) useRules(elide []string, required []Label, allow ...string) {
	r.t.Helper()
	selectors, err := ParseSelectors(allow)
	if err != nil {
		r.t.Fatal(err)
	}
	r.reload(func(st *ReloadableServerConfig) {
		st.Normalizer = &ServerNormalizer{Elide: elide, Required: required, Allow: selectors}
	})
}

// The server warns of each rule that matches no sample of the first push, or of all pushes of ten
// minutes. It does not repeat a warning until the rule has matched a sample again, which it logs.
// A reload checks the new rules with the next push, and keeps what is known of the others.
func TestUnmatchedRules(t *testing.T) {
	r := newSrvRig(t)
	r.accepted(r.push("first", "x 1\n")) // without rules, nothing is checked
	r.clock.Add(int64(ruleCheckEvery))
	r.logged()
	elide, required, allow := []string{"replica", "instnce"}, []Label{{Name: []byte("env")}}, []string{"up", `{job="node"}`, "dwn"}
	r.useRules(elide, required, allow...)
	const warn, info = "WARN msg=\"no pushed sample matches this rule: if it is not for a site that has yet to push, correct its spelling, or remove it\" ", "INFO msg=\"pushed samples match this rule again\" "
	for i, step := range []struct {
		after time.Duration
		text  string
		want  string // lines in the log, in any order, separated by |
	}{
		{0, "", ""},
		{0, "up{replica=\"a\",env=\"p\",job=\"node\"} 1\nup{env=\"p\"} 1\n",
			warn + "flag=--elide-label value=instnce samples=2|" + warn + "flag=\"--allow or --allow-file\" value=dwn samples=2"},
		{time.Minute, "up{env=\"p\"} 2\n", ""},
		{8*time.Minute + 59*time.Second, "up{env=\"p\",job=\"node\"} 3\n", ""},
		{time.Second, "up{env=\"p\"} 4\n", warn + "flag=--elide-label value=replica samples=3"},
		{5 * time.Minute, "dwn{env=\"p\",replica=\"a\"} 5\n", ""},
		{5 * time.Minute, "up{job=\"node\"} 6\nup{env=\"p\"} 1\n", info + "flag=--elide-label value=replica|" + info + "flag=\"--allow or --allow-file\" value=dwn"},
		{10 * time.Minute, "up{job=\"node\",replica=\"a\",env=\"p\"} 7\n", warn + "flag=\"--allow or --allow-file\" value=dwn samples=1"},
	} {
		r.clock.Add(int64(step.after))
		r.accepted(r.push("first", step.text))
		got := r.logged()
		var want []string
		if step.want != "" {
			want = strings.Split(step.want, "|")
		}
		for _, line := range want {
			if !strings.Contains(got, line+"\n") {
				t.Errorf("step %d: the log lacks %s:\n%s", i, line, got)
			}
		}
		if n := strings.Count(got, "\n"); n != len(want) {
			t.Errorf("step %d: the log has %d lines, want %d:\n%s", i, n, len(want), got)
		}
	}
	r.useRules([]string{"replica", "pod"}, required, append(allow, "other")...)
	r.clock.Add(int64(9 * time.Minute))
	r.accepted(r.push("first", "up{env=\"p\",pod=\"a\"} 1\n"))
	if got := r.logged(); got != warn+"flag=\"--allow or --allow-file\" value=other samples=1\n" {
		t.Errorf("after a reload, the log has:\n%s", got)
	}
	if got := metricsText(t, r.server.cfg.Metrics); !strings.Contains(got, `telemeter_unmatched_flags{flag="allow"} 2`) {
		t.Errorf("the metrics do not count two unmatched selectors:\n%s", got)
	}
}

// The server warns, at most once an hour for each site, if its rules drop all samples of a push, and
// tells the client so.
func TestRulesDropAll(t *testing.T) {
	const msg = `WARN msg="--allow or --required-label dropped all samples of a push: correct these flags, or what the site pushes" cluster_id=`
	for _, c := range []struct {
		name, text string
		counts     string // of the warning; "" if the server must not warn
	}{
		{"all not allowed", "a{env=\"p\"} 1\nb{env=\"p\"} 1\n", "samples=2 not_allowed=2 required_label=0"},
		{"all without the label", "up 1\n", "samples=1 not_allowed=0 required_label=1"},
		{"both", "a{env=\"p\"} 1\nup 1\n", "samples=2 not_allowed=1 required_label=1"},
		{"one accepted", "up{env=\"p\"} 1\nb 1\n", ""},
		{"no samples", "", ""},
	} {
		r := newSrvRig(t)
		r.useRules(nil, []Label{{Name: []byte("env")}}, "up")
		for _, site := range []string{"a", "a", "b"} {
			got := r.accepted(r.push(site, c.text))
			if (got.Hint == rulesHint) != (c.counts != "") {
				t.Errorf("%s: answered %+v", c.name, got)
			}
		}
		log := r.logged()
		want := map[bool]int{true: 2}[c.counts != ""]
		if n := strings.Count(log, msg); n != want || n > 0 && !strings.Contains(log, msg+"b "+c.counts) {
			t.Errorf("%s: %d warnings, want %d with %s:\n%s", c.name, n, want, c.counts, log)
		}
	}
}

// BenchmarkRuleWatch measures what the watch costs a push, with 1,000 selectors.
func BenchmarkRuleWatch(b *testing.B) {
	var allow []string
	for i := range 1000 {
		allow = append(allow, fmt.Sprintf("m%d", i))
	}
	selectors, err := ParseSelectors(allow)
	if err != nil {
		b.Fatal(err)
	}
	rules := &ServerNormalizer{Allow: selectors}
	w := newRuleWatch(NewMetrics(), newSrvRig(b).server.cfg.Log, time.Now)
	use := rules.NewUse()
	b.ReportAllocs()
	for b.Loop() {
		w.beginPush(rules, use)
		w.finishPush(rules, use, 1000)
	}
}
