package main

// Tests of the dashboard for Grafana and of the queries of the alerts. The file of the dashboard is
// one that Grafana can show, and it fits the alerts. TestQueriesReturnData checks that every query
// returns data; test/integration.sh runs it against the Prometheus of a ring of servers and of a
// site, with: -args -prometheus URL.

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

const dashboardFile = "testdata/dashboard.json"

var prometheusFlag = flag.String("prometheus", "", "run TestQueriesReturnData against the Prometheus with this URL")

// dashboard has the parts of a dashboard's JSON that the tests check.
type dashboard struct {
	Title, UID    string
	SchemaVersion int
	Panels        []dashboardPanel
	Templating    struct {
		List []struct {
			Name, Type, Definition, AllValue string
			IncludeAll                       bool
		}
	}
}

type dashboardPanel struct {
	ID                       int
	Type, Title, Description string
	Datasource               struct{ Type, UID string }
	GridPos                  struct{ X, Y, W, H int }
	Targets                  []struct {
		RefID, Expr, LegendFormat string
		Datasource                struct{ Type, UID string }
	}
	FieldConfig struct {
		Defaults struct {
			Unit       string
			Thresholds dashboardThresholds
		}
		Overrides []struct{ Matcher struct{ Options string } }
	}
}

type dashboardThresholds struct{ Steps []struct{ Value *float64 } }

func loadDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	if err := json.Unmarshal([]byte(readIn(t, ".", dashboardFile)), &d); err != nil {
		t.Fatalf("%s: %v", dashboardFile, err)
	}
	return d
}

// queries returns the queries of all panels and variables as Grafana sends them while the variable
// site has the value site. The query of a variable, label_values(SELECTOR, LABEL), becomes a query
// that counts the values of the label.
func (d *dashboard) queries(site string) (all []string) {
	variables := strings.NewReplacer("$site", site, "$__range", "5m")
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			all = append(all, variables.Replace(target.Expr))
		}
	}
	values := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`)
	for _, v := range d.Templating.List {
		if v.Type == "query" {
			all = append(all, values.ReplaceAllString(v.Definition, `count by ($2) ($1{$2!=""})`))
		}
	}
	return all
}

// Grafana can show every panel: IDs are unique, panels do not overlap and are within the 24
// columns, and every panel has a title. A panel with data also has a unit, a description, and
// queries of the data source that the reader selects. The dashboard names no host.
func TestDashboardPanels(t *testing.T) {
	d := loadDashboard(t)
	if d.Title == "" || d.UID == "" || d.SchemaVersion < 36 || len(d.Panels) < 20 {
		t.Errorf("the dashboard has title %q, uid %q, schemaVersion %d and %d panels", d.Title, d.UID, d.SchemaVersion, len(d.Panels))
	}
	if url := regexp.MustCompile(`https?://|localhost|\.example`).FindString(readIn(t, ".", dashboardFile)); url != "" {
		t.Errorf("the dashboard names a host: %s", url)
	}
	names := []string{}
	for _, v := range d.Templating.List {
		names = append(names, v.Name)
		if v.IncludeAll && v.AllValue != ".+" { // ".*" would also select the servers' own series, which have no label _id
			t.Errorf("the variable %s has the value %q for All, want .+", v.Name, v.AllValue)
		}
	}
	variable := regexp.MustCompile(`\$\{?(\w+)`)
	for i, p := range d.Panels {
		g := p.GridPos
		if p.Title == "" || g.W < 1 || g.H < 1 || g.X < 0 || g.Y < 0 || g.X+g.W > 24 {
			t.Errorf("panel %d has title %q and gridPos %+v", p.ID, p.Title, g)
		}
		for _, q := range d.Panels[:i] {
			h := q.GridPos
			if p.ID == q.ID {
				t.Errorf("panels %q and %q have the ID %d", q.Title, p.Title, p.ID)
			}
			if p.Title == q.Title {
				t.Errorf("two panels have the title %q", p.Title)
			}
			if g.X < h.X+h.W && h.X < g.X+g.W && g.Y < h.Y+h.H && h.Y < g.Y+g.H {
				t.Errorf("panels %q and %q overlap: %+v, %+v", q.Title, p.Title, h, g)
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.FieldConfig.Defaults.Unit == "" || p.Description == "" || len(p.Targets) == 0 || p.Datasource.UID != "${datasource}" {
			t.Errorf("panel %q has unit %q, description %q, %d queries and data source %q", p.Title, p.FieldConfig.Defaults.Unit, p.Description, len(p.Targets), p.Datasource.UID)
		}
		for j, target := range p.Targets {
			if target.Expr == "" || target.RefID != string(rune('A'+j)) || target.Datasource.UID != "${datasource}" {
				t.Errorf("query %d of panel %q: %+v", j, p.Title, target)
			}
			for _, m := range variable.FindAllStringSubmatch(target.Expr, -1) {
				if m[1] != "__range" && !slices.Contains(names, m[1]) {
					t.Errorf("panel %q uses the variable %s, which does not exist", p.Title, m[0])
				}
			}
		}
	}
}

// An alert that a panel names in its description exists. The thresholds of panels are the alerts'
// own: each text of a row is in the expressions of the panel and of the alert, and each limit is in
// the alert's expression and is a threshold of the panel.
func TestDashboardFitsAlerts(t *testing.T) {
	d := loadDashboard(t)
	exprs := alertExpressions(t)
	panels := map[string]dashboardPanel{}
	named := 0
	for _, p := range d.Panels {
		panels[p.Title] = p
		for _, name := range regexp.MustCompile(`Telemeter\w+`).FindAllString(p.Description, -1) {
			named++
			if exprs[name] == "" {
				t.Errorf("panel %q names the alert %s, which does not exist", p.Title, name)
			}
		}
	}
	if named < 10 {
		t.Errorf("the panels name %d alerts, want at least 10", named)
	}
	for _, row := range []struct{ panel, alert, same, limit string }{
		{"Silent sites", "TelemeterSiteSilent", "600", ""},
		{"Sites with refused pushes", "TelemeterPushesRefused", "< 600", ""},
		{"Consumers behind", "TelemeterConsumerBehind", "group_left () 0.25 * telemeter_cluster_samples", ""},
		{"Pushes not stored", "TelemeterPushesNotStored", `result=~"full|failed"`, ""},
		{"Servers down", "TelemeterServerDown", `job=~"federate|telemeter"`, ""},
		{"Tokens that expire soon", "TelemeterTokenExpires", "< 30 * 24 * 3600", ""},
		{"Sites with a wrong clock", "TelemeterSiteClockOff", "> 60", ""},
		{"Age of the newest push", "TelemeterSiteSilent", "", "600"},
		{"Unread share of a site's samples", "TelemeterConsumerBehind", "[15m]", "0.25"},
		{"Clock offset", "TelemeterSiteClockOff", "", "60"},
		{"Scrapes that a consumer did not confirm", "TelemeterScrapesUnconfirmed", "", "3"},
		{"Difference of the clocks", "TelemeterServerClockOff", "", "30"},
		{"Fullest limit", "TelemeterLimitNear", `telemeter_limit_used_ratio{_id=""}`, "0.9"},
		{"Limits", "TelemeterLimitNear", `telemeter_limit_used_ratio{_id=""}`, "0.9"},
	} {
		p, alert := panels[row.panel], exprs[row.alert]
		if len(p.Targets) == 0 || !strings.Contains(p.Targets[0].Expr, row.same) || !strings.Contains(alert, row.same) {
			t.Errorf("panel %q and the alert %s do not both have %q", row.panel, row.alert, row.same)
		}
		if row.limit == "" {
			continue
		}
		steps := p.FieldConfig.Defaults.Thresholds.Steps
		if len(steps) != 2 || steps[1].Value == nil || fmt.Sprint(*steps[1].Value) != row.limit || !regexp.MustCompile(`> .*\b`+regexp.QuoteMeta(row.limit)+`\b`).MatchString(alert) {
			t.Errorf("the threshold %s is not that of panel %q and of the alert %s", row.limit, row.panel, row.alert)
		}
	}
}

// seriesSelected returns the series that an expression selects. A matcher with alternatives, such as
// state=~"a|b", becomes one selector for each alternative. The error tells of a part of the
// expression in braces that is no selector of a known metric.
func seriesSelected(expr string) (all []string, err error) {
	selector := regexp.MustCompile(`\b(?:(?:telemeter|push|process)_\w+|up)\b(?:\{[^}]*\})?`)
	alternatives := regexp.MustCompile(`=~"(\w+(?:\|\w+)+)"`)
	for _, s := range selector.FindAllString(expr, -1) {
		m := alternatives.FindStringSubmatch(s)
		if m == nil {
			all = append(all, s)
			continue
		}
		for value := range strings.SplitSeq(m[1], "|") {
			all = append(all, strings.Replace(s, m[0], `="`+value+`"`, 1))
		}
	}
	if rest := selector.ReplaceAllString(expr, ""); len(all) == 0 || strings.Contains(rest, "{") {
		return nil, fmt.Errorf("%s: no selectors, or more than %q", expr, all)
	}
	return all, nil
}

// Every query of the dashboard returns data, and so does every selector of the dashboard and of the
// alerts: a query that selects nothing would look like health. A counter of an event that has not
// happened yet must exist with the value 0. An alert itself returns nothing while all is well.
// Prometheus says which alerts it has loaded; they are those of alerts.yml.
func TestQueriesReturnData(t *testing.T) {
	if *prometheusFlag == "" {
		t.Skip("needs the Prometheus of test/integration.sh, and the flag -prometheus")
	}
	d := loadDashboard(t)
	queries := d.queries(".+")
	nDashboard := len(queries)
	exprs := slices.Clone(queries)
	var answer struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Query, Health, LastError string }
			}
		}
	}
	getAPI(t, "/api/v1/rules?type=alert", &answer)
	loaded := map[string]string{}
	for _, group := range answer.Data.Groups {
		for _, rule := range group.Rules {
			if rule.Health == "err" {
				t.Errorf("the alert %s fails: %s", rule.Name, rule.LastError)
			}
			loaded[rule.Name] = rule.Query
		}
	}
	nAlerts := 0
	for name := range alertExpressions(t) {
		if nAlerts++; loaded[name] == "" {
			t.Errorf("Prometheus has not loaded the alert %s", name)
			continue
		}
		exprs = append(exprs, loaded[name])
	}
	for _, expr := range exprs {
		selected, err := seriesSelected(expr)
		if err != nil {
			t.Error(err)
		}
		queries = append(queries, selected...)
	}
	slices.Sort(queries)
	queries = slices.Compact(queries)
	// Rates need two scrapes, and a range of 15 minutes needs none that is 15 minutes old.
	deadline := time.Now().Add(time.Minute)
	for _, q := range queries {
		for !returnsData(t, q) {
			if time.Now().After(deadline) {
				t.Errorf("the query returns nothing: %s", q)
				break
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
	fmt.Printf("%d queries of the dashboard and the selectors of it and of %d alerts: %d queries\n", nDashboard, nAlerts, len(queries))
}

// returnsData reports whether the query returns at least one series.
func returnsData(t *testing.T, promql string) bool {
	t.Helper()
	var answer struct {
		Data struct{ Result []any }
	}
	getAPI(t, "/api/v1/query?query="+url.QueryEscape(promql), &answer)
	return len(answer.Data.Result) > 0
}

// getAPI decodes the JSON that the Prometheus of the flag -prometheus answers.
func getAPI(t *testing.T, path string, answer any) {
	t.Helper()
	resp, err := http.Get(*prometheusFlag + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s", path, resp.Status)
	}
	if err := json.NewDecoder(resp.Body).Decode(answer); err != nil {
		t.Fatalf("GET %s: %v", path, err)
	}
}

// seriesSelected finds each series that an expression selects, and reports what it does not know.
func TestSeriesSelected(t *testing.T) {
	for _, c := range []struct {
		expr string
		want []string
	}{
		{`time() - max by (_id) (push_time_seconds{_id=~".+"} > 0)`, []string{`push_time_seconds{_id=~".+"}`}},
		{`absent(up{_id="",job="federate"}) or up`, []string{`up{_id="",job="federate"}`, "up"}},
		{`increase(telemeter_pushes_total{result=~"full|failed"}[10m]) > 0`, []string{`telemeter_pushes_total{result="full"}`, `telemeter_pushes_total{result="failed"}`}},
		{`node_load1{job="node"} + up`, nil},
		{`sum by (instance) (group_left)`, nil},
	} {
		if got, err := seriesSelected(c.expr); !slices.Equal(got, c.want) || (err == nil) != (c.want != nil) {
			t.Errorf("series selected by %s: %q, %v, want %q", c.expr, got, err, c.want)
		}
	}
}
