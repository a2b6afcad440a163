package main

// Tests of telemeter --mode client --dry-run at the level of the command line: samples on standard
// output, the summary and the warnings on standard error, and the exit status.

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// A dry run prints on standard output the samples that would leave the site, and nothing else. On
// standard error it prints a summary, and then the warnings about flags that match no series. A
// warning does not change the exit status.
func TestDryRunSummary(t *testing.T) {
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/login" {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<title>Log in</title>")
			return
		}
		io.WriteString(w, `up{job="node",instance="a:1",node="a"} 1 1000
up{job="node",instance="b:1",node="b"} 1 1000
up{job="prometheus",instance="b:1"} 1 1000
down{job="node",instance="a:1"} 1 1000
push_time_seconds 1 1000
secret 1 1000
bad{a="1",a="2"} 1 1000
`)
	}))
	defer source.Close()
	salt := filepath.Join(t.TempDir(), "salt")
	if err := os.WriteFile(salt, []byte(cleanerSalt), 0o600); err != nil {
		t.Fatal(err)
	}
	hashes := []string{"--anonymize-salt-file", salt, "--anonymize-labels", "instance,nod"}
	for _, tt := range []struct {
		name   string
		path   string
		args   []string
		status int
		lines  int      // lines of standard output
		stderr []string // regular expressions, for standard error from its beginning to its end
	}{
		{"everything", "/metrics", nil, exitOK, 5, []string{
			`\S+ level=WARN msg="invalid samples dropped" samples=1 last="series bad: label \\"a\\" occurs twice"\n`,
			`dry run: nothing was pushed; of 7 scraped series, 5 would leave the site\n`,
			`  source    http://127.0.0.1:\d+/metrics\n`,
			`  dropped   1 series: the server uses their names for its own metrics \(reserved_name\)\n`,
			`  dropped   1 series: they are not valid \(invalid\)\n`,
			`  hashed    no label; --anonymize-labels names the labels to hash\n`,
			`  readable  labels instance, job, node\n`,
			`  size      \d+ bytes, \d+ bytes compressed\n`,
		}},
		{"cleaned", "/metrics", append(hashes, "--match", "up", "--match", "down", "--match", "upp", "--rename", "down=off", "--label", "region=r", "--rename", "uup=x"), exitOK, 4, []string{
			`dry run: nothing was pushed; of 7 scraped series, 4 would leave the site\n`,
			`  source    http://127.0.0.1:\d+/metrics\n`,
			`  dropped   3 series: no --match selects them \(not_matched\)\n`,
			`  renamed   down to off: 1 series\n`,
			`  renamed   uup to x: 0 series\n`,
			`  hashed    label instance of 4 series, 2 values\n`,
			`  hashed    label nod of 0 series, 0 values\n`,
			`  readable  labels job, node, region\n`,
			`  size      \d+ bytes, \d+ bytes compressed\n`,
			`\S+ level=WARN msg="no series matches --match upp" advice=.*\n`,
			`\S+ level=WARN msg="no series has the name uup: --rename uup=x renames nothing" advice="did you mean up\? .*\n`,
			`\S+ level=WARN msg="no series has the label nod: --anonymize-labels nod hashes nothing" advice="did you mean node\? .*\n`,
		}},
		{"nothing", "/metrics", append(hashes, "--match", "none"), exitOK, 0, []string{
			`dry run: nothing was pushed; of 7 scraped series, 0 would leave the site\n`,
			`  source    http://127.0.0.1:\d+/metrics\n`,
			`  dropped   7 series: no --match selects them \(not_matched\)\n`,
			`  hashed    label instance of 0 series, 0 values\n`,
			`  hashed    label nod of 0 series, 0 values\n`,
			`  size      0 bytes, \d+ bytes compressed\n`,
			`\S+ level=WARN msg="no series leaves the site" from=http://127.0.0.1:\d+/metrics scraped=7 advice="no series matches .* the selectors are: none"\n`,
		}},
		{"selected by the source", "", []string{"--match", "up", "--match", "upp"}, exitOK, 5, []string{
			`\S+ level=WARN msg="invalid samples dropped" samples=1 last="series bad: label \\"a\\" occurs twice"\n`,
			`dry run: nothing was pushed; of 7 scraped series, 5 would leave the site\n`,
			`  source    http://127.0.0.1:\d+/federate\n`,
			`(?s:.*)\S+ level=WARN msg="no series matches --match upp" advice=.*\n`,
		}},
		{"login page", "/login", nil, exitFailure, 0, []string{
			`telemeter: source: scraping http://127.0.0.1:\d+/login: the source answered 200 OK with a web page titled "Log in": check --from.*\n`,
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status, stdout, stderr := runMode(t, append([]string{"--mode", "client", "--dry-run", "--from", source.URL + tt.path}, tt.args...)...)
			if n := strings.Count(stdout, "\n"); status != tt.status || n != tt.lines {
				t.Errorf("exit status %d and %d lines, want %d and %d; standard output:\n%s", status, n, tt.status, tt.lines, stdout)
			}
			for line := range strings.Lines(stdout) {
				if _, err := new(Decoder).Decode([]byte(line), FormatText, func(*RawSample) error { return nil }); err != nil || strings.HasPrefix(line, "#") {
					t.Errorf("standard output has the line %q, which is no sample: %v", line, err)
				}
			}
			if want := `^` + strings.Join(tt.stderr, "") + `$`; !regexp.MustCompile(want).MatchString(stderr) {
				t.Errorf("standard error:\n%swant:\n%s", stderr, want)
			}
			if size := fmt.Sprintf("  size      %d bytes,", len(stdout)); status == exitOK && !strings.Contains(stderr, size) {
				t.Errorf("the summary does not say %q:\n%s", size, stderr)
			}
		})
	}
}

// With --backfill, a dry run prints first what would be fetched if scrapes had been missing for that
// time. If the source answers no queries, that is a failure, and the scrape is printed all the same.
func TestDryRunBackfill(t *testing.T) {
	p := newFakePrometheus(t, fakeSeries{labels: map[string]string{"__name__": "up", "job": "a"}, step: 15 * time.Second, begin: -time.Hour})
	p.external = map[string]string{"site": "west"}
	source := httptest.NewServer(p)
	defer source.Close()
	args := []string{"--mode", "client", "--from", source.URL, "--match", "up", "--dry-run", "--backfill", "10m"}
	status, stdout, stderr := runMode(t, args...)
	lines := strings.Count(stdout, `up{job="a",site="west"} `)
	if status != exitOK || lines != 5 || lines != strings.Count(stdout, "\n") || !strings.HasPrefix(stderr, "dry run: 4 samples of the last 10m would be fetched for missing scrapes\ndry run: nothing was pushed; of 1 scraped series, 1 would") {
		t.Errorf("exit status %d, %d lines on stdout:\n%s%s", status, lines, stdout, stderr)
	}
	p.api = func(*http.Request) *http.Response { return respond(404, nil, "404 page not found") }
	if status, stdout, stderr := runMode(t, args...); status != exitFailure || strings.Count(stdout, "\n") != 1 || !strings.Contains(stderr, "source: fetching the samples of missing scrapes: /api/v1/query: not an answer of the query API of Prometheus: 404 Not Found") {
		t.Errorf("without a query API: exit status %d, %q, %q", status, stdout, stderr)
	}
}
