package main

// Tests of the mode show: the files that it lists and prints, the man page, and that the printed
// configurations and licences fit this program.

import (
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The mode show lists every document and every embedded file, and prints each as it is in the
// repository, by its name and by its path.
func TestShowFiles(t *testing.T) {
	paths, err := filepath.Glob("docs/*.md")
	if err != nil || len(paths) == 0 {
		t.Fatal(paths, err)
	}
	err = fs.WalkDir(shownFiles, ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !slices.Contains(paths, path) {
			paths = append(paths, path)
		}
		return err
	})
	if err != nil || !slices.Contains(paths, "README.md") {
		t.Fatal(paths, err)
	}
	_, list, _ := runMode(t, "--mode", "show")
	if n, want := strings.Count(list, "\n"), len(paths)+3; n != want { // the man page, an empty line and a hint
		t.Errorf("the list has %d lines, want %d:\n%s", n, want, list)
	}
	for _, file := range paths {
		name, want := path.Base(file), readIn(t, ".", file)
		if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` +\w`).MatchString(list) {
			t.Errorf("the list has no %s:\n%s", name, list)
		}
		for _, as := range []string{name, file} {
			if status, got, stderr := runMode(t, "--mode", "show", "--file", as); status != exitOK || got != want || stderr != "" {
				t.Errorf("--file %s: exit status %d, %d bytes, want the %d bytes of %s; stderr %q", as, status, len(got), len(want), file, stderr)
			}
		}
	}
}

// A name that the mode show does not have is a mistake. The message suggests a similar name.
func TestShowUnknownFile(t *testing.T) {
	for _, tt := range []struct{ name, want string }{
		{"operation.md", "--file operation.md: there is no such file: did you mean operating.md? telemeter --mode show lists the files"},
		{"server.service", "did you mean telemeter-server.service?"},
		{"docs", "there is no such file"},
		{"../go.mod", "there is no such file"},
		{"", "Print one of them with"},
	} {
		status, stdout, stderr := runMode(t, "--mode", "show", "--file", tt.name)
		want := exitUsage
		if tt.name == "" {
			want = exitOK
		}
		if status != want || !strings.Contains(stdout+stderr, tt.want) || (stdout == "") != (want == exitUsage) {
			t.Errorf("--file %s: exit status %d, want %d and %q\nstdout: %s\nstderr: %s", tt.name, status, want, tt.want, stdout, stderr)
		}
	}
}

// runTool runs a program that the test needs, and returns its output. It skips the test if the
// program is missing.
func runTool(t *testing.T, env []string, name string, args ...string) (stdout, stderr string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("left out: %s needs %s, which is missing", t.Name(), name)
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = append(os.Environ(), env...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Errorf("%s %q: %v: %s", name, args, err, &errs)
	}
	return out.String(), errs.String()
}

// helpTexts returns the usage text and the --help of each mode.
func helpTexts(t *testing.T) []string {
	t.Helper()
	_, shown, _ := strings.Cut(usage, "\n\n")
	texts := []string{shown}
	for mode := range modes() {
		texts = append(texts, helpOf(t, mode))
	}
	return texts
}

// The man page has the help of every mode, in the order of the usage text.
func TestManPage(t *testing.T) {
	page := getManPage(t)
	plain := strings.NewReplacer(`\-`, "-", `\(aq`, "'", `\(ga`, "`", `\(ha`, "^", `\(ti`, "~", `\&`, "", `\e`, `\`).Replace(page)
	for _, text := range helpTexts(t) {
		if !strings.Contains(plain, strings.TrimSpace(text)) {
			t.Errorf("the man page does not have this help:\n%s", text)
		}
	}
	var titles []string
	for _, m := range regexp.MustCompile(`(?m)^\.SH (.*)$`).FindAllStringSubmatch(page, -1) {
		titles = append(titles, m[1])
	}
	want := []string{"NAME", "SYNOPSIS", "DESCRIPTION"}
	for _, m := range regexp.MustCompile(`(?m)^  ([a-z]+) `).FindAllStringSubmatch(strings.Split(usage, "\n\n")[2], -1) {
		want = append(want, "MODE "+strings.ToUpper(m[1]))
	}
	if want = append(want, "EXIT STATUS", "FILES"); !slices.Equal(titles, want) || len(want) != 5+len(modes()) {
		t.Errorf("the sections are %q, want %q", titles, want)
	}
}

func getManPage(t *testing.T) string {
	t.Helper()
	status, page, stderr := runMode(t, "--mode", "show", "--file", manPage)
	if status != exitOK || stderr != "" {
		t.Fatalf("exit status %d: %s", status, stderr)
	}
	return page
}

// man reports nothing about the man page, and prints each line of the help as it is.
func TestManPageRendered(t *testing.T) {
	if version, _ := runTool(t, nil, "man", "--version"); !strings.HasPrefix(version, "man ") {
		t.Skipf("left out: %s needs the man of man-db, and this one is: %s", t.Name(), version)
	}
	if _, err := exec.LookPath("groff"); err != nil {
		t.Skipf("left out: %s needs groff, which is missing", t.Name())
	}
	file := filepath.Join(t.TempDir(), manPage)
	writeIn(t, filepath.Dir(file), manPage, getManPage(t))
	if _, warnings := runTool(t, nil, "man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", file); warnings != "" {
		t.Errorf("man warns: %s", warnings)
	}
	rendered, _ := runTool(t, []string{"MANWIDTH=200", "MAN_KEEP_FORMATTING="}, "man", "-E", "UTF-8", "-l", "-Tutf8", file)
	words := func(text string) string { return strings.Join(strings.Fields(text), " ") }
	rendered = words(rendered)
	for _, text := range helpTexts(t) {
		for line := range strings.Lines(text) {
			if !strings.Contains(rendered, words(line)) {
				t.Errorf("man does not print this line of a help: %s", line)
			}
		}
	}
}

func TestEscapeRoff(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "a b": "a b", `\n`: `\en`, "--a-b": `\-\-a\-b`, ".TH": `\&.TH`, "a.b\n.c\n..d": "a.b\n\\&.c\n\\&..d", "'a\n'b": `\(aqa` + "\n" + `\(aqb`, "`^~": `\(ga\(ha\(ti`,
	} {
		if got := escapeRoff(text); got != want {
			t.Errorf("escapeRoff(%q) = %q, want %q", text, got, want)
		}
	}
}

// systemd finds no fault in the units. The command of a unit has only flags of its mode.
func TestUnits(t *testing.T) {
	for _, mode := range []string{"server", "client"} {
		t.Run(mode, func(t *testing.T) {
			name := "telemeter-" + mode + ".service"
			unit := strings.ReplaceAll(readIn(t, "testdata", name), "\\\n", " ")
			const program = "ExecStart=/usr/local/bin/telemeter "
			_, command, found := strings.Cut(unit, "\n"+program)
			command, _, _ = strings.Cut(command, "\n")
			if !found || !strings.HasPrefix(command, "--mode "+mode+" ") {
				t.Fatalf("the command is %q", command)
			}
			help := helpOf(t, mode)
			for _, flag := range regexp.MustCompile(`--[a-z-]+`).FindAllString(command, -1) {
				if flag != "--mode" && !strings.Contains(help, "\n  "+flag+" ") {
					t.Errorf("--mode %s has no flag %s", mode, flag)
				}
			}
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			writeIn(t, dir, name, strings.Replace(unit, program, "ExecStart="+self+" ", 1))
			out, faults := runTool(t, nil, "systemd-analyze", "verify", filepath.Join(dir, name))
			for line := range strings.Lines(out + faults) {
				if strings.Contains(line, name) {
					t.Errorf("systemd says: %s", line)
				}
			}
		})
	}
}

// The licences name each module that is in the binary, and have the texts of its licence and of its
// notice, and those of Go.
func TestLicenses(t *testing.T) {
	licenses := strings.Join(strings.Fields(readIn(t, "testdata", "licenses.txt")), " ")
	check := func(title, file string) {
		t.Helper()
		text, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
		} else if want := "=== " + title + " === " + strings.Join(strings.Fields(string(text)), " "); !strings.Contains(licenses, want) {
			t.Errorf("testdata/licenses.txt does not have %s below the title %s", file, title)
		}
	}
	t.Setenv("GOARCH", "amd64") // other processors need fewer modules
	goroot, _ := runTool(t, nil, "go", "env", "GOROOT")
	check("Go standard library", filepath.Join(strings.TrimSpace(goroot), "LICENSE"))
	list, _ := runTool(t, nil, "go", "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Dir}}{{end}}{{end}}", ".")
	modules := strings.Fields(list)
	if len(modules) == 0 {
		t.Error("the binary has no modules")
	}
	seen := map[string]bool{}
	for i := 0; i < len(modules); i += 2 {
		module, dir := modules[i], modules[i+1]
		if seen[module] {
			continue
		}
		seen[module] = true
		check(module, filepath.Join(dir, "LICENSE"))
		if notice := filepath.Join(dir, "NOTICE"); fileExists(notice) {
			check(module+" NOTICE", notice)
		}
	}
	for _, m := range regexp.MustCompile(`=== (\S+\.\S+)(?: NOTICE)? ===`).FindAllStringSubmatch(licenses, -1) {
		if !seen[m[1]] {
			t.Errorf("testdata/licenses.txt has the licence of %s, which is not in the binary", m[1])
		}
	}
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
