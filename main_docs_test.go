package main

// Tests that the documents agree with the program: the flags, metrics, log messages, Go files and
// links in the documents exist. go test -run Reference . -args -update writes the parts of
// docs/reference.md and docs/metrics.md that are generated from the program.

import (
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	referencePage = "docs/reference.md"
	metricsPage   = "docs/metrics.md"
)

var updateFlag = flag.Bool("update", false, "write the generated parts of "+referencePage+" and "+metricsPage+" anew")

// documents returns the text of README.md and of each page in docs, by path from the top of the
// repository.
func documents(t *testing.T) map[string]string {
	t.Helper()
	paths, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	pages := map[string]string{}
	for _, path := range append(paths, "README.md") {
		pages[path] = readIn(t, ".", path)
	}
	return pages
}

// updateReference compares have, a generated part of the page at path, with want, the text that the
// program generates. If they differ, the test fails, or with -update replaces have by want in the
// page. The parameter what names the part in messages.
func updateReference(t *testing.T, path, what, have, want string) {
	t.Helper()
	if have == want {
		return
	}
	if !*updateFlag {
		t.Errorf("%s in %s differ from the program; update them with: go test -run Reference . -args -update", what, path)
		return
	}
	page := readIn(t, ".", path)
	if have == "" || strings.Count(page, have) != 1 {
		t.Fatalf("%s has no place for %s", path, what)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(page, have, want, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
}

func helpOf(t *testing.T, mode string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), time.Now, []string{"--mode", mode, "--help"}, &stdout, &stderr); code != exitOK {
		t.Fatalf("--mode %s --help: exit %d: %s", mode, code, &stderr)
	}
	return stdout.String()
}

var modesWithFlags = []string{"server", "client", "keygen", "token", "status", "show", "load"}

// The reference page lists for each mode exactly the flags that --help of this mode prints.
func TestReferenceFlags(t *testing.T) {
	for _, mode := range modesWithFlags {
		list, _, _ := strings.Cut(helpOf(t, mode), "\nExample:")
		have := regexp.MustCompile("(?s)```\ntelemeter --mode " + mode + ": .*?```\n").FindString(readIn(t, ".", referencePage))
		updateReference(t, referencePage, "the flags of --mode "+mode, have, "```\n"+list+"```\n")
	}
}

// README.md has at most 250 lines, and every page in docs at most 400.
func TestDocumentsAreShort(t *testing.T) {
	for path, text := range documents(t) {
		limit := 400
		if path == "README.md" {
			limit = 250
		}
		if n := strings.Count(text, "\n"); n > limit {
			t.Errorf("%s has %d lines, more than %d", path, n, limit)
		}
	}
}

// Every link in the documents leads to an existing file of the repository. If the link has a
// fragment, the file has a heading with that anchor. Links to web sites are faults.
func TestDocumentsLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#]*)(?:#([^)]*))?\)`)
	heading := regexp.MustCompile(`(?m)^#+ (.*)$`)
	notInAnchor := regexp.MustCompile(`[^a-z0-9 _-]`)
	n := 0
	for path, text := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			n++
			target := path
			if m[1] != "" {
				target = filepath.Join(filepath.Dir(path), m[1])
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
				continue
			}
			var anchors []string
			for _, h := range heading.FindAllStringSubmatch(readIn(t, ".", target), -1) {
				anchors = append(anchors, strings.ReplaceAll(notInAnchor.ReplaceAllString(strings.ToLower(h[1]), ""), " ", "-"))
			}
			if m[2] != "" && !slices.Contains(anchors, m[2]) {
				t.Errorf("%s links to #%s of %s, which has no such heading", path, m[2], target)
			}
		}
	}
	if n < 20 {
		t.Errorf("only %d links found", n)
	}
}

// Every flag that the documents or the files of the mode show name is a flag of telemeter, or one of
// the known flags of other programs.
func TestDocumentsFlags(t *testing.T) {
	known := map[string]bool{"--mode": true, "--help": true}
	name := regexp.MustCompile(`--[a-z][a-z-]+`)
	for _, mode := range modesWithFlags {
		for _, m := range regexp.MustCompile(`(?m)^  (--[a-z-]+)`).FindAllStringSubmatch(helpOf(t, mode), -1) {
			known[m[1]] = true
		}
	}
	// These are flags of curl, Prometheus, systemctl and useradd in commands that the pages show.
	for _, foreign := range []string{"--cacert", "--data-binary", "--max-time", "--log", "--now", "--full", "--system"} {
		known[foreign] = true
	}
	pages := documents(t)
	for _, file := range filesToShow() {
		if strings.HasPrefix(file.path, "testdata/") {
			pages[file.path] = readIn(t, ".", file.path)
		}
	}
	for path, text := range pages {
		for _, flag := range name.FindAllString(text, -1) {
			if !known[flag] {
				t.Errorf("%s names the flag %s, which does not exist", path, flag)
			}
		}
	}
}

// Every message that the documents explain in a table with the column "log message" occurs in the
// source of the program. Every Go file that the documents name exists.
func TestDocumentsMessages(t *testing.T) {
	var sources strings.Builder
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") {
			sources.WriteString(readIn(t, ".", file))
		}
	}
	goFile := regexp.MustCompile("`([a-z_]+\\.go)`")
	message := regexp.MustCompile("^\\| `([^`]+)` \\|")
	n := 0
	for path, text := range documents(t) {
		for _, m := range goFile.FindAllStringSubmatch(text, -1) {
			if !slices.Contains(files, m[1]) {
				t.Errorf("%s names the file %s, which does not exist", path, m[1])
			}
		}
		inTable := false
		for line := range strings.SplitSeq(text, "\n") {
			inTable = strings.HasPrefix(line, "| log message") || inTable && strings.HasPrefix(line, "|")
			if m := message.FindStringSubmatch(line); inTable && m != nil {
				if n++; !strings.Contains(sources.String(), m[1]) {
					t.Errorf("%s explains the log message %q, which the program does not have", path, m[1])
				}
			}
		}
	}
	if n < 5 {
		t.Errorf("only %d log messages found", n)
	}
}

// metricsOfAll starts a server that is the only member of a ring, and a client that pushes to it.
// It returns three texts: the answer of the server's /metrics, the answer of the server's /federate
// to a consumer, and the answer of the client's /metrics.
func metricsOfAll(t *testing.T) (server, federate, client string) {
	t.Helper()
	dir := t.TempDir()
	mustTool(t, dir, "--mode", "keygen", "--keys", "keys")
	a := startMember(t, dir, "a")
	agree(t, 1, a)
	token := mustTool(t, dir, "--mode", "token", "--keys", "keys", "--id", "site-7", "--to", a.external, "--ttl", "1h")
	writeIn(t, dir, "token", token)
	if code := a.push(token, "not a sample\n", ClockOffsetHeader, "1500"); code != http.StatusBadRequest {
		t.Fatalf("a bad push: %d", code)
	}
	c := start(t, dir, "--mode", "client", "--token-file", "token", "--from", a.internal+"/federate", "--listen", "127.0.0.1:0")
	address := c.await(`msg=listening address=(\S+)`)
	c.await("msg=pushed")
	// This scrape makes the consumer known to the server, so that the next scrape shows the
	// consumer's backlog.
	get(t, a.internal+"/federate?consumer=central")
	return get(t, a.internal+"/metrics"), get(t, a.internal+"/federate?consumer=central"), get(t, "http://"+address+"/metrics")
}

// metricsTable returns a Markdown table of the telemeter_ metrics in text, which is in the text
// exposition format. Each row has the name, type, labels and help of a metric. It also lists the
// values of labels that have a fixed set of values, such as reason.
func metricsTable(text string) string {
	help := map[string]string{}
	kind := map[string]string{}
	labels := map[string][]string{}                                // metric → names of its labels, in the order of the exposition
	values := map[string]map[string][]string{}                     // metric → label → values of this label, for the labels in fixed
	fixed := []string{"reason", "result", "state", "kind", "flag"} // labels with a fixed set of values
	label := regexp.MustCompile(`([a-z_]+)="([^"]*)"`)
	for line := range strings.SplitSeq(text, "\n") {
		fields := strings.SplitN(line, " ", 4)
		switch {
		case strings.HasPrefix(line, "# HELP telemeter_"):
			help[fields[2]] = fields[3]
		case strings.HasPrefix(line, "# TYPE telemeter_"):
			kind[fields[2]] = fields[3]
		case strings.HasPrefix(line, "telemeter_"):
			name, rest, _ := strings.Cut(line, "{")
			name, _, _ = strings.Cut(name, " ")
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				if base, ok := strings.CutSuffix(name, suffix); ok && kind[base] == "histogram" {
					name = base
				}
			}
			for _, m := range label.FindAllStringSubmatch(rest, -1) {
				if m[1] == "le" {
					continue
				}
				if !slices.Contains(labels[name], m[1]) {
					labels[name] = append(labels[name], m[1])
				}
				if values[name] == nil {
					values[name] = map[string][]string{}
				}
				if slices.Contains(fixed, m[1]) && !slices.Contains(values[name][m[1]], m[2]) {
					values[name][m[1]] = append(values[name][m[1]], m[2])
				}
			}
		}
	}
	var b strings.Builder
	b.WriteString("| metric | type | labels | meaning |\n|---|---|---|---|\n")
	names := make([]string, 0, len(help))
	for name := range help {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		var list []string
		for _, l := range labels[name] {
			if v := values[name][l]; len(v) > 0 {
				slices.Sort(v)
				l += ": " + strings.Join(v, ", ")
			}
			list = append(list, l)
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", name, kind[name], strings.Join(list, "; "), help[name])
	}
	return b.String()
}

// The page of metrics lists every metric of a server and of a client. The documents, the
// alerts and the dashboard name no metric, label or label value that neither server nor client
// exposes, because an alert on such a name would not work.
func TestReferenceMetrics(t *testing.T) {
	server, federate, client := metricsOfAll(t)
	const begin, end = "<!-- metrics -->\n", "<!-- end of metrics -->\n"
	_, have, _ := strings.Cut(readIn(t, ".", metricsPage), begin)
	have, _, _ = strings.Cut(have, end)
	want := "\n## Metrics of a server\n\n" + metricsTable(server) + "\n## Metrics of a client\n\n" + metricsTable(client) + "\n"
	updateReference(t, metricsPage, "the metrics", begin+have+end, begin+want+end)

	exposed := strings.Join([]string{server, federate, client}, "\n")
	pages := documents(t)
	pages["testdata/alerts.yml"] = readIn(t, ".", "testdata/alerts.yml")
	d := loadDashboard(t)
	pages[dashboardFile] = strings.Join(d.queries(".+"), "\n")
	n := 0
	for path, text := range pages {
		for _, m := range mentionedMetrics(text) {
			n++
			if !exposes(exposed, m.name, "") {
				t.Errorf("%s mentions %s, which neither server nor client exposes", path, m.name)
			}
			for _, matcher := range m.matchers {
				if !exposes(exposed, m.name, matcher) {
					t.Errorf("%s mentions %s, which neither server nor client exposes with %s", path, m.text, matcher)
				}
			}
		}
	}
	if n < 100 {
		t.Errorf("documents and alerts mention %d metrics, want at least 100", n)
	}
}

// metricMention is a metric that a document mentions, such as telemeter_members{state="dead"}, with
// its label matchers.
type metricMention struct {
	text string // the mention as the document writes it, with the braces
	name string
	// matchers has one text for each label matcher in the braces. state=" matches any value of the
	// label state, and state="dead" matches one value.
	matchers []string
}

// mentionedMetrics returns the metrics of telemeter that text mentions. A matcher with
// alternatives, such as state=~"a|b", becomes one matcher for each alternative. A matcher that
// excludes a value, such as state!="dead", becomes a matcher of that value. Matchers of _id and job
// are left out, because servers and Prometheus add these labels.
func mentionedMetrics(text string) (all []metricMention) {
	metric := regexp.MustCompile(`\b((?:telemeter|push|process)_[a-z_]+)(?:\{([^}]*)\})?`)
	// The name of a source file, such as push_ranges.go, looks like the name of a metric, so it is
	// removed from the text.
	sourceFile := regexp.MustCompile(`\b\w+\.go\b`)
	label := regexp.MustCompile(`([a-z_]+)(?:(?:=~?|!=)"([^"]*)")?`)
	for _, m := range metric.FindAllStringSubmatch(sourceFile.ReplaceAllString(text, ""), -1) {
		mention := metricMention{text: m[0], name: m[1]}
		for _, l := range label.FindAllStringSubmatch(m[2], -1) {
			if l[1] == "_id" || l[1] == "job" {
				continue
			}
			for value := range strings.SplitSeq(l[2], "|") {
				matcher := l[1] + `="` + value
				if l[2] != "" {
					matcher += `"`
				}
				mention.matchers = append(mention.matchers, matcher)
			}
		}
		all = append(all, mention)
	}
	return all
}

// exposes reports whether the exposition in text has a sample line of the metric with this name. If
// matcher is not empty, the line must also have a label that begins with matcher, such as
// state="dead".
func exposes(text, name, matcher string) bool {
	for line := range strings.SplitSeq(text, "\n") {
		rest, ok := strings.CutPrefix(line, name)
		if ok && matcher == "" && strings.HasPrefix(rest, "_bucket{") { // a histogram has no line with its bare name
			return true
		}
		if ok && (rest[0] == '{' || rest[0] == ' ') && (matcher == "" || strings.Contains(rest, "{"+matcher) || strings.Contains(rest, ","+matcher)) {
			return true
		}
	}
	return false
}
