package main

// Values of flags: how they are read and shown, and what is said of those out of bounds.

import (
	"io"
	"strings"
	"testing"
	"time"
)

func TestSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "1024": 1 << 10, "1KiB": 1 << 10, "1MiB": 1 << 20, "3GiB": 3 << 30, "10000000000": 10_000_000_000, "8589934591GiB": 8589934591 << 30,
	} {
		n, err := parseSize(text)
		if err != nil || n != want {
			t.Errorf("%s: %d, %v", text, n, err)
		}
		if again, err := parseSize(formatSize(n)); err != nil || again != n {
			t.Errorf("%s prints as %s: %v", text, formatSize(n), err)
		}
	}
	for _, text := range []string{"", "-1", "1MB", "1 MiB", "MiB", "1.5GiB", "1e6", "0x10", "9223372036854775808", "8589934592GiB", "1mib"} {
		if n, err := parseSize(text); err == nil {
			t.Errorf("%q is taken as %d", text, n)
		}
	}
}

func TestFormatDuration(t *testing.T) {
	for _, d := range []time.Duration{time.Second, 10 * time.Second, 10 * time.Minute, 90 * time.Second, 2 * time.Hour, 20 * time.Hour, 90 * time.Minute, 36610 * time.Second} {
		short := formatDuration(d)
		if back, err := time.ParseDuration(short); err != nil || back != d || strings.Contains(strings.TrimLeft(short, "1234567890"), "m0s") {
			t.Errorf("%v is shown as %s: %v", d, short, err)
		}
	}
}

// TestFlagProblems: one message has all problems, and a value with a problem is not taken.
func TestFlagProblems(t *testing.T) {
	type values struct {
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
	}
	for args, want := range map[string]string{
		"": "",
		"--d 2s --n 5 --size 2KiB --addr :1 --opt= --id a --labels b=1 --labels a=2 --names a,b --allow {a=\"b\"} --renames c=d": "",
		"--d 999ms":           "--d is from 1s to 1h",
		"--d 61m":             "--d is from 1s to 1h",
		"--n 0":               "--n is above 0",
		"--n -1":              "--n is above 0",
		"--size 1":            "--size is at least 1KiB",
		"--d 1":               `invalid value "1" for flag -d: time: missing unit in duration "1"`,
		"--n x":               `invalid value "x" for flag -n: not a number`,
		"--size 1k":           `invalid value "1k" for flag -size: not a number of bytes, such as 1048576 or 1MiB`,
		"--addr= --opt x":     "--addr: missing port in address; --opt: address x: missing port in address",
		"--labels a":          `--labels: label "a" is not NAME=VALUE`,
		"--names a,_id":       `--names: label name "_id" is reserved`,
		"--renames x":         `--renames: rename "x" is not OLD=NEW with a valid metric name`,
		"--n 0 --d 0s y":      `--n is above 0; --d is from 1s to 1h; unexpected argument "y": every value belongs to a flag`,
		"--labels a --labels": `--labels: label "a" is not NAME=VALUE; flag needs an argument: -labels`,
	} {
		c := newCommand("test", strings.Fields(args), io.Discard, io.Discard)
		v := values{}
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
		got := ""
		if c.parseArgs(); c.err() != nil {
			got = c.err().Error()
		}
		if got != want {
			t.Errorf("%s: %q, want %q", args, got, want)
		}
		switch {
		case args == "":
			if v.d != time.Minute || v.n != 3 || v.size != 1<<20 || v.addr != ":9" || v.opt != "h:1" || len(v.renames) != 1 {
				t.Errorf("the defaults are %+v", v)
			}
		case want == "":
			if v.d != 2*time.Second || v.n != 5 || v.size != 2<<10 || v.addr != ":1" || v.opt != "" || v.id != "a" || len(v.labels) != 2 ||
				string(v.labels[0].Name) != "a" || len(v.names) != 2 || len(v.allow) != 1 || len(v.renames) != 2 {
				t.Errorf("%s: %+v", args, v)
			}
		case len(v.labels)+len(v.names)+len(v.allow) > 0 || len(v.renames) != 1 || v.addr != ":9" || v.opt != "h:1":
			t.Errorf("%s: a value with a problem is taken: %+v", args, v)
		}
	}
}
