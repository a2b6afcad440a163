package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// The client warns of values of --match, --rename and --anonymize-labels that no series matches: at
// the first scrape, when they begin to match nothing, and not again within an hour. It also says
// when they match again. A gauge has their number.
func TestClientWarnsOfUnmatchedFlags(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var text string
		c, _, log := newTestClient(t, "", func(cfg *ClientConfig, st *ClientReloadConfig) {
			cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) { return respond(200, nil, text), nil })
			st.Match = mustSelect(t, `{job=~".+"}`, "upp", "ALERTS")
			st.NewCleaner = func() *ClientCleaner {
				c := &ClientCleaner{Rename: map[string]string{"up": "up2", "down_totl": "x", "ALERTS": "alerts"}, Anonymize: []string{"instance", "nod"}}
				c.SetSalt([]byte(cleanerSalt))
				return c
			}
		})
		const (
			good = "up{job=\"a\",instance=\"i\"} 1\ndown_total{job=\"a\",node=\"n\"} 1\n"
			bad  = "down_total{job=\"a\",node=\"n\"} 1\n"
		)
		const (
			noMatch    = `level=WARN msg="no series matches --match upp" advice="correct the selector`
			noRename   = `level=WARN msg="no series has the name down_totl: --rename down_totl=x renames nothing" advice="did you mean down_total? `
			noLabel    = `level=WARN msg="no series has the label nod: --anonymize-labels nod hashes nothing" advice="did you mean node? `
			noUp       = `level=WARN msg="no series has the name up: --rename up=up2 renames nothing"`
			noInstance = `level=WARN msg="no series has the label instance: --anonymize-labels instance hashes nothing"`
			upAgain    = `level=INFO msg="--rename up=up2 matches series now"`
			instAgain  = `level=INFO msg="--anonymize-labels instance matches series now"`
			empty      = `level=WARN msg="no series leaves the site" from=http://source.example/metrics scraped=0 advice="no series matches --match or --match-file`
			notEmpty   = `level=INFO msg="series leave the site now"`
		)
		for i, tt := range []struct {
			text  string
			wait  time.Duration // before the scrape
			lines []string
			gauge map[string]int
		}{
			{good, 0, []string{noMatch, noRename, noLabel}, map[string]int{"match": 1, "rename": 1, "anonymize-labels": 1}},
			{good, 2 * time.Hour, nil, nil},
			{bad, time.Minute, []string{noUp, noInstance}, map[string]int{"match": 1, "rename": 2, "anonymize-labels": 2}},
			{good, time.Minute, []string{upAgain, instAgain}, map[string]int{"rename": 1, "anonymize-labels": 1}},
			{bad, time.Minute, nil, map[string]int{"rename": 2, "anonymize-labels": 2}},
			{bad, time.Hour, []string{noUp, noInstance}, nil},
			{"", time.Minute, []string{empty}, map[string]int{"match": 2, "rename": 2, "anonymize-labels": 2}},
			{"", time.Minute, nil, nil},
			{good, time.Minute, []string{notEmpty, upAgain, instAgain}, map[string]int{"match": 1, "rename": 1, "anonymize-labels": 1}},
		} {
			time.Sleep(tt.wait)
			log.Reset()
			text = tt.text
			got, err := c.Scrape(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			c.LogUnmatchedFlags(got)
			if n := strings.Count(log.String(), "\n"); n != len(tt.lines) {
				t.Errorf("scrape %d logged %d lines, want %d", i, n, len(tt.lines))
			}
			for _, line := range tt.lines {
				if !strings.Contains(log.String(), line) {
					t.Errorf("scrape %d: no line with %s", i, line)
				}
			}
			for flag, n := range tt.gauge {
				if want := fmt.Sprintf("telemeter_source_unmatched_flags{flag=%q} %d\n", flag, n); !strings.Contains(metricsText(t, c.cfg.Metrics), want) {
					t.Errorf("scrape %d: the metrics do not have %s", i, want)
				}
			}
			if t.Failed() {
				t.Fatalf("log of scrape %d:\n%s", i, log)
			}
		}
	})
}

// The client warns once of a value of --elide-label that no series has, says when a series has it, and
// counts it in the gauge.
func TestClientWarnsOfUnmatchedElideLabel(t *testing.T) {
	var text string
	c, _, log := newTestClient(t, "", func(cfg *ClientConfig, st *ClientReloadConfig) {
		cfg.FromClient.Transport = roundTrip(func(*http.Request) (*http.Response, error) { return respond(200, nil, text), nil })
		st.NewCleaner = func() *ClientCleaner {
			return &ClientCleaner{Elide: []string{"prometheus", "replca", "site"}, Labels: []Label{{[]byte("site"), []byte("s")}}}
		}
	})
	const (
		misspelled = "up{replica=\"a\",prometheus=\"p\"} 1\n"
		warning    = `level=WARN msg="no series has the label replca: --elide-label replca removes nothing" advice="did you mean replica? correct the name, or remove the flag"`
	)
	for i, tt := range []struct {
		text, line string // line is the only one that is logged; "" if none is
		gauge      int
	}{
		{misspelled, warning, 1},
		{misspelled, "", 1},
		{"up{replca=\"a\",prometheus=\"p\"} 1\n", `level=INFO msg="--elide-label replca matches series now"`, 0},
		{misspelled, "", 1}, // not again within unmatchedLogInterval
	} {
		text = tt.text
		log.Reset()
		if err := c.scrapeAndSpool(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(log.String(), "\n"); n != strings.Count(tt.line, "level=") || !strings.Contains(log.String(), tt.line) {
			t.Errorf("scrape %d: want the line %q, got %d lines:\n%s", i, tt.line, n, log)
		}
		if want := fmt.Sprintf("telemeter_source_unmatched_flags{flag=\"elide-label\"} %d\n", tt.gauge); !strings.Contains(metricsText(t, c.cfg.Metrics), want) {
			t.Errorf("scrape %d: the metrics do not have %s", i, want)
		}
	}
}

// A flag that Reload has replaced is forgotten, and the new value is checked at the next scrape.
func TestClientForgetsReplacedFlags(t *testing.T) {
	c, _, log := newTestClient(t, "up 1\n", func(_ *ClientConfig, st *ClientReloadConfig) { st.Match = mustSelect(t, "up", "a") })
	scrape := func() {
		t.Helper()
		log.Reset()
		if err := c.scrapeAndSpool(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	scrape()
	st := *c.state.Load()
	st.Match = mustSelect(t, "up", "b")
	c.Reload(st)
	scrape()
	if !strings.Contains(log.String(), "--match b") || strings.Contains(log.String(), "--match a") || len(c.unmatched.values) != 2 {
		t.Errorf("after a reload that replaced a by b, the client remembers %d values, want 2, and logged:\n%s", len(c.unmatched.values), log)
	}
}

// If the selectors of a scrape were not checked, the client does not say that they match now, and
// does not repeat the warnings of the scrape before.
func TestClientKeepsWarningsOfUncheckedSelectors(t *testing.T) {
	c, _, log := newTestClient(t, "up 1\n", func(_ *ClientConfig, st *ClientReloadConfig) { st.Match = mustSelect(t, "up", "upp") })
	for _, unchecked := range []bool{false, true, false} {
		got, err := c.Scrape(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if unchecked {
			got.Use.Unchecked, got.Use.UnmatchedSelectors = true, nil
		}
		c.LogUnmatchedFlags(got)
		if !strings.Contains(metricsText(t, c.cfg.Metrics), "telemeter_source_unmatched_flags{flag=\"match\"} 1\n") {
			t.Errorf("unchecked %v: the gauge does not have the value 1", unchecked)
		}
	}
	if n := strings.Count(log.String(), "no series matches --match upp"); n != 1 || strings.Contains(log.String(), "matches series now") {
		t.Errorf("got %d warnings, want 1, and no line that the selector matches; log:\n%s", n, log)
	}
}

// The advice about a scrape without series depends on what was scraped.
func TestClientWarnsOfEmptyScrape(t *testing.T) {
	for _, tt := range []struct{ text, match, want string }{
		{"up 1\n", `{a="b"}`, `scraped=1 advice="no series matches --match or --match-file: correct the selectors; --dry-run without them prints all series of the source; the selectors are: {a=\"b\"}"`},
		{"", MatchAll, `scraped=0 advice="the source has no series: check --from, and that the source scrapes its own targets"`},
		{"push_time_seconds 1\n", MatchAll, `scraped=1 advice="all series were dropped; telemeter_samples_dropped_total has the reasons"`},
	} {
		c, _, log := newTestClient(t, tt.text, func(_ *ClientConfig, st *ClientReloadConfig) { st.Match = mustSelect(t, tt.match) })
		log.Reset()
		if err := c.scrapeAndSpool(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), `msg="no series leaves the site"`) || !strings.Contains(log.String(), tt.want) {
			t.Errorf("source %q with --match %s: want one line with %s, got:\n%s", tt.text, tt.match, tt.want, log)
		}
	}
}
