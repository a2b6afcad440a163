package main

// This file implements the mode show, which prints the files that an operator needs on a host that
// has only this binary: the documents, the man page, configurations to copy, and the licences of
// what is linked in. The files are embedded as they are in the repository, so that tests check what
// the binary prints. The man page is made from the flags of each mode.

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"text/tabwriter"
)

//go:embed README.md docs/*.md testdata/prometheus.yml testdata/alerts.yml testdata/dashboard.json
//go:embed testdata/telemeter-server.service testdata/telemeter-client.service testdata/telemeter-curl.cron testdata/licenses.txt
var shownFiles embed.FS

// manPage is the name under which the mode show prints the man page.
const manPage = "telemeter.1"

// shownFile is a file that the mode show prints. Its path is that of the embedded file, or manPage.
type shownFile struct{ path, about string }

// filesToShow returns the files in the order in which the mode show lists them.
func filesToShow() []shownFile {
	return []shownFile{
		{"README.md", "what telemeter is, how to set it up, what it promises"},
		{"docs/operating.md", "how to run it: servers, clients, Prometheus, keys, upgrades"},
		{"docs/outages.md", "what is missing after an outage, and how to survive longer ones"},
		{"docs/troubleshooting.md", "what messages and symptoms mean, and what to do"},
		{"docs/reference.md", "all flags, HTTP paths, files and exit statuses"},
		{"docs/metrics.md", "all metrics"},
		{"docs/security.md", "what is trusted, and what an attacker can do"},
		{"docs/design.md", "how it works"},
		{"docs/figures.md", "what was measured, and how to repeat it"},
		{manPage, "man page; read it with: telemeter --mode show --file telemeter.1 | man -l -"},
		{"testdata/prometheus.yml", "configuration for the central Prometheus"},
		{"testdata/alerts.yml", "alert rules for the central Prometheus"},
		{"testdata/dashboard.json", "dashboard for Grafana"},
		{"testdata/telemeter-server.service", "systemd unit for a server"},
		{"testdata/telemeter-client.service", "systemd unit for a client"},
		{"testdata/telemeter-curl.cron", "cron line that pushes with curl, without a client"},
		{"testdata/licenses.txt", "licences of the modules in this binary"},
	}
}

func showMode(_ context.Context, c *command) error {
	c.about = "lists or prints the documents and configurations that this binary contains."
	c.example = "telemeter --mode show --file telemeter-server.service > /etc/systemd/system/telemeter-server.service"
	var name string
	c.defineGroup("Output", func() {
		c.StringVar(&name, "file", "", "`NAME` name of the file to print; without it, the files are listed")
	})
	if err := c.parseArgs(); err != nil {
		return err
	}
	var content []byte
	if name != "" {
		var err error
		content, err = contentToShow(name)
		c.addProblemUnless(err == nil, "--file %s: %v", name, err)
	}
	if err := c.err(); err != nil {
		return err
	}
	var err error
	if name == "" {
		err = listFilesToShow(c.stdout)
	} else {
		_, err = c.stdout.Write(content)
	}
	if err != nil {
		return fmt.Errorf("printing: %w", err)
	}
	return nil
}

func listFilesToShow(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, f := range filesToShow() {
		fmt.Fprintf(w, "%s\t%s\n", path.Base(f.path), f.about)
	}
	fmt.Fprintf(w, "\nPrint one of them with: telemeter --mode show --file NAME\n")
	return w.Flush()
}

// contentToShow returns the file with the given base name or path.
func contentToShow(name string) ([]byte, error) {
	var names []string
	for _, f := range filesToShow() {
		base := path.Base(f.path)
		if name != base && name != f.path {
			names = append(names, base)
			continue
		}
		if f.path == manPage {
			var page bytes.Buffer
			writeManPage(&page)
			return page.Bytes(), nil
		}
		return shownFiles.ReadFile(f.path)
	}
	advice := "telemeter --mode show lists the files"
	if near := nearest(name, names); near != "" {
		advice = "did you mean " + near + "? " + advice
	}
	return nil, fmt.Errorf("there is no such file: %s", advice)
}

// writeManPage writes the man page, in the macros of man(7). It has the usage text, and the flags of
// each mode as --help prints them.
func writeManPage(w io.Writer) {
	version, _ := ProgramVersion()
	about, rest, _ := strings.Cut(strings.TrimPrefix(usage, "telemeter: "), "\n\n")
	fmt.Fprintf(w, ".TH TELEMETER 1 \"\" \"telemeter %s\" \"User Commands\"\n.SH NAME\ntelemeter \\- %s\n", escapeRoff(version), escapeRoff(strings.TrimSuffix(about, ".")))
	fmt.Fprintf(w, ".SH SYNOPSIS\n.B telemeter \\-\\-mode\n.I MODE\n.RI [ flags ]\n.SH DESCRIPTION\n")
	writeRoffText(w, rest)
	for _, mode := range modeNames() {
		c := newCommand(mode, []string{"--help"}, io.Discard, io.Discard)
		modes()[mode](context.Background(), c) // returns flag.ErrHelp after it has defined the flags
		var help bytes.Buffer
		c.writeHelp(&help)
		fmt.Fprintf(w, ".SH %s\n", escapeRoff("MODE "+strings.ToUpper(mode)))
		writeRoffText(w, help.String())
	}
	fmt.Fprintf(w, ".SH EXIT STATUS\n0: success. 1: failure; the last line on standard error says why. 2: the command line is invalid.\n")
	fmt.Fprintf(w, ".SH FILES\n.B telemeter \\-\\-mode show\nlists the documents and configurations that the program contains.\n")
}

// modeNames returns the names of the modes in the order of the usage text.
func modeNames() []string {
	place := func(mode string) int { return strings.Index(usage, "\n  "+mode+" ") }
	return slices.SortedFunc(maps.Keys(modes()), func(a, b string) int { return place(a) - place(b) })
}

// writeRoffText writes text without filling its lines.
func writeRoffText(w io.Writer, text string) {
	fmt.Fprintf(w, ".nf\n%s\n.fi\n", escapeRoff(strings.TrimSpace(text)))
}

// escapeRoff returns text such that roff prints it as it is: with its backslashes, hyphens and quotes
// in ASCII, and with no line taken for a request.
func escapeRoff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", `\(ga`, "^", `\(ha`, "~", `\(ti`, "\n.", "\n\\&.").Replace(text)
	if strings.HasPrefix(text, ".") {
		text = `\&` + text
	}
	return text
}
