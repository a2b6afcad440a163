package main

// Tests of the types of command-line flags: how values of each type are parsed and formatted, and
// which problems of a command line are reported.

import (
	"fmt"
	"io"
	"net/url"
	"strings"
	"testing"
	"time"
)

// The value of a size flag is a decimal number of bytes, or of KiB, MiB or GiB if it ends in that
// unit. parseSize turns a text of formatSize back into the same number.
func TestSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "1024": 1 << 10, "1KiB": 1 << 10, "1MiB": 1 << 20, "3GiB": 3 << 30, "10000000000": 10_000_000_000, "8589934591GiB": 8589934591 << 30,
	} {
		n, err := parseSize(text)
		if err != nil || n != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", text, n, err, want)
		}
		if again, err := parseSize(formatSize(n)); err != nil || again != n {
			t.Errorf("formatSize(%d) = %s, which parses as %d, %v", n, formatSize(n), again, err)
		}
	}
	for _, text := range []string{"", "-1", "1MB", "1 MiB", "MiB", "1.5GiB", "1e6", "0x10", "9223372036854775808", "8589934592GiB", "1mib"} {
		if n, err := parseSize(text); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", text, n)
		}
	}
}

// formatDuration omits zero minutes and seconds at the end of a duration, such as "0s" in "10m0s".
// time.ParseDuration turns the text back into the same duration.
func TestFormatDuration(t *testing.T) {
	for _, d := range []time.Duration{time.Second, 10 * time.Second, 10 * time.Minute, 90 * time.Second, 2 * time.Hour, 20 * time.Hour, 90 * time.Minute, 36610 * time.Second} {
		short := formatDuration(d)
		if back, err := time.ParseDuration(short); err != nil || back != d || strings.Contains(strings.TrimLeft(short, "1234567890"), "m0s") {
			t.Errorf("formatDuration(%v) = %s, which parses as %v, %v", d, short, back, err)
		}
	}
}

// A duration is written as Go or as Prometheus writes it.
func TestParseDuration(t *testing.T) {
	const day = 24 * time.Hour
	for text, want := range map[string]time.Duration{
		"0": 0, "0s": 0, "90s": 90 * time.Second, "1.5h": 90 * time.Minute, "1m30s": 90 * time.Second, "300ms": 300 * time.Millisecond,
		"1d": day, "2w": 14 * day, "1y": 365 * day, "1d12h": 36 * time.Hour, "1w2d3h4m5s": 9*day + 3*time.Hour + 4*time.Minute + 5*time.Second,
	} {
		if d, err := parseDuration(text); err != nil || d != want {
			t.Errorf("parseDuration(%q) = %v, %v; want %v", text, d, err, want)
		}
	}
	for _, text := range []string{"", "1", "d", "1D", "1 d", "12h1d", "-1d", "1.5d", "1month", "300y", "soon"} {
		if d, err := parseDuration(text); err == nil || !strings.Contains(err.Error(), "1d12h") {
			t.Errorf("parseDuration(%q) = %v, %v; want an error with an example", text, d, err)
		}
	}
}

// nearest finds the name that was probably meant. It finds none if all names are too different.
func TestNearest(t *testing.T) {
	names := []string{"anonymize-salt-file", "from", "id", "listen", "listen-internal", "storage-dir", "to", "to-key"}
	for word, want := range map[string]string{
		"storage-dri": "storage-dir", "storage_dir": "storage-dir", "storage": "storage-dir", "salt-file": "anonymize-salt-file", "lisen": "listen",
		"list": "listen", "web.listen-address": "listen", "listen-intrnal": "listen-internal", "form": "from", "ids": "id", "tokey": "to-key", "": "", "x": "", "config": "", "storage.tsdb.path": "",
	} {
		if got := nearest(word, names); got != want {
			t.Errorf("nearest(%q) = %q, want %q", word, got, want)
		}
	}
}

// flagValues holds the values of the flags in these tests, which are of different types.
type flagValues struct {
	d       time.Duration
	n       int
	size    int64
	addr    string
	opt     string
	id      string
	labels  []Label
	names   []string
	allow   Selectors
	renames map[string]string
	url     *url.URL
	urls    []*url.URL
}

// parseFlagValues parses args, which has command-line arguments separated by spaces. It returns the
// values of the flags, and the reported problems in one text, or "" if there are none.
func parseFlagValues(args string) (v flagValues, problems string) {
	c := newCommand("test", strings.Fields(args), io.Discard, io.Discard)
	c.durationFlag(&v.d, "d", time.Minute, time.Second, time.Hour, "")
	c.countFlag(&v.n, "n", 3, "")
	c.sizeFlag(&v.size, "size", 1<<20, 1<<10, 0, "")
	c.addressFlag(&v.addr, "addr", ":9", "")
	c.optionalAddressFlag(&v.opt, "opt", "h:1", "")
	c.clusterIDFlag(&v.id, "id", "")
	c.labelsFlag(&v.labels, "labels", "")
	c.labelNamesFlag(&v.names, "names", "", true)
	c.selectorsFlag(&v.allow, "allow", "")
	c.metricRenamesFlag(&v.renames, "renames", []string{"x=y"}, "")
	c.urlFlag(&v.url, "url", "", "")
	c.StringVar(new(string), "url-user-file", "", "")
	c.urlsFlag(&v.urls, "urls", "http://default.example:1", "")
	c.parseArgs()
	if err := c.err(); err != nil {
		problems = err.Error()
	}
	return v, problems
}

// A flag that the command line does not set has its default value.
func TestFlagDefaults(t *testing.T) {
	v, problems := parseFlagValues("")
	if problems != "" || v.d != time.Minute || v.n != 3 || v.size != 1<<20 || v.addr != ":9" || v.opt != "h:1" || len(v.renames) != 1 {
		t.Errorf("the defaults are %+v, with the problems %q", v, problems)
	}
}

// A flag stores its value. A flag that may be repeated, such as --labels, collects its values in a
// list.
func TestFlagValues(t *testing.T) {
	const args = "--d 2s --n 5 --size 2KiB --addr :1 --opt= --id a --labels b=1 --labels a=2 --names a,b --allow {a=\"b\"} --renames c=d"
	v, problems := parseFlagValues(args)
	if problems != "" || v.d != 2*time.Second || v.n != 5 || v.size != 2<<10 || v.addr != ":1" || v.opt != "" || v.id != "a" || len(v.labels) != 2 ||
		string(v.labels[0].Name) != "a" || len(v.names) != 2 || len(v.allow) != 1 || len(v.renames) != 2 {
		t.Errorf("%s: the values are %+v, with the problems %q", args, v, problems)
	}
}

// The first value of a repeatable flag for URLs replaces the default. Further values are added, in their
// order. Each value is checked, and a faulty one is left out.
func TestURLsFlag(t *testing.T) {
	const credentials = "--urls: http://u:xxxxx@h/ contains credentials, which every user of this host can see in a command line: remove them"
	for args, want := range map[string]struct{ urls, problems string }{
		"":                                   {"[http://default.example:1]", ""},
		"--urls http://b":                    {"[http://b]", ""},
		"--urls http://default.example:1":    {"[http://default.example:1]", ""},
		"--urls http://b --urls https://a:1": {"[http://b https://a:1]", ""},
		"--urls=http://b/x?y=z --urls http://b/x?y=z --urls http://a": {"[http://b/x?y=z http://b/x?y=z http://a]", ""},
		"--urls http://u:p@h/":                                {"[http://default.example:1]", credentials},
		"--urls http://b --urls http://u:p@h/":                {"[http://b]", credentials},
		"--urls ftp://b --urls http://u:p@h/ --urls http://a": {"[http://a]", `--urls: "ftp://b" has the scheme ftp: use http:// or https://; ` + credentials},
	} {
		v, problems := parseFlagValues(args)
		if got := fmt.Sprint(v.urls); got != want.urls || problems != want.problems {
			t.Errorf("%s: the URLs are %s, with the problems %q; want %s, with %q", args, got, problems, want.urls, want.problems)
		}
	}
}

// The problems of a command line are reported in one message. If the value of a list flag or an
// address flag has a problem, the flag keeps its default.
func TestFlagProblems(t *testing.T) {
	for args, want := range map[string]string{
		"--addr :70000":         `--addr: ":70000" has no valid port: use a number from 0 to 65535, such as :9000`,
		"--addr h:":             `--addr: "h:" has no valid port: use a number from 0 to 65535, such as h:9000`,
		"--addr --n 5":          "--addr needs a value: write --addr value",
		"--dd 1s -labls a=b":    "unknown flag --dd; unknown flag --labls: did you mean --labels?",
		"--n 5 --nnnnnnnnn":     "unknown flag --nnnnnnnnn",
		"--d 999ms":             "--d must be from 1s to 1h",
		"--url http://u:p@h/":   `--url: http://u:xxxxx@h/ contains credentials, which every user of this host can see in a command line: remove them, and write USER:PASSWORD into a file that --url-user-file names`,
		"--url http://u:p%zz@h": `--url: "…@h" is not a URL, such as https://hub.example:9003`,
		"--d 61m":               "--d must be from 1s to 1h",
		"--n 0":                 "--n must be above 0",
		"--n -1":                "--n must be above 0",
		"--size 1":              "--size must be at least 1KiB",
		"--d 1":                 `invalid value "1" for --d: not a duration, such as 30s, 10m, 2h or 1d12h`,
		"--n x":                 `invalid value "x" for --n: not a whole number, such as 1000`,
		"--size 1k":             `invalid value "1k" for --size: not a number of bytes, such as 1048576 or 1MiB`,
		"--addr= --opt x":       `--addr: "" is not HOST:PORT, such as localhost:9000 or :9000; --opt: "x" is not HOST:PORT, such as localhost:9000 or :9000`,
		"--labels a":            `--labels: label "a" is not NAME=VALUE`,
		"--names a,_id":         `--names: label name "_id" is reserved: use another name`,
		"--renames x":           `--renames: rename "x" is not OLD=NEW with a valid metric name`,
		"--n 0 --d 0s y":        `--n must be above 0; --d must be from 1s to 1h; unexpected argument "y": every value must follow its flag`,
		"--labels a --labels":   `--labels: label "a" is not NAME=VALUE; --labels needs a value: write --labels value`,
	} {
		v, problems := parseFlagValues(args)
		if problems != want {
			t.Errorf("%s: the problems are %q, want %q", args, problems, want)
		}
		if len(v.labels)+len(v.names)+len(v.allow) > 0 || len(v.renames) != 1 || v.addr != ":9" || v.opt != "h:1" {
			t.Errorf("%s: a value with a problem is stored: %+v", args, v)
		}
	}
}
