package main

// The test of make dist: two clones of a commit give the same static binaries, with the checksums that
// SHA256SUMS lists. The test compiles everything anew for three architectures, so it is behind a flag.
// "make test-dist" runs it.

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var distFlag = flag.String("dist", "", "run TestDist with these architectures, separated by spaces: amd64, arm64, armv7")

// distLimit is the size in bytes that the binary for amd64 must stay below.
const distLimit = 14_000_000

// distMachines are the architectures of make dist, with their names in debug/elf.
var distMachines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64, "armv7": elf.EM_ARM}

// runIn runs a program in the directory dir with additional environment variables, and returns its
// output. It fails the test unless the exit status is 0.
func runIn(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// makeDist runs make dist for the architectures archs in the directory dir. It returns the version in
// the names of the binaries, and the checksum of each binary by architecture. A missing or additional
// file fails the test, and so does a SHA256SUMS that does not list exactly the binaries.
func makeDist(t *testing.T, dir string, archs []string, env ...string) (version string, sums map[string]string) {
	t.Helper()
	t.Logf("%s", runIn(t, dir, env, "make", "--no-print-directory", "dist", "ARCHS="+strings.Join(archs, " ")))
	entries, err := os.ReadDir(filepath.Join(dir, "dist"))
	if err != nil {
		t.Fatal(err)
	}
	sums = map[string]string{}
	want := ""
	for _, e := range entries {
		if e.Name() == "SHA256SUMS" {
			continue
		}
		m := regexp.MustCompile(`^telemeter-(.+)-linux-([a-z0-9]+)$`).FindStringSubmatch(e.Name())
		if m == nil || version != "" && m[1] != version {
			t.Fatalf("make dist made %s, want a name telemeter-VERSION-linux-ARCHITECTURE, with one version", e.Name())
		}
		version = m[1]
		sums[m[2]] = fmt.Sprintf("%x", sha256.Sum256([]byte(readIn(t, dir, "dist/"+e.Name()))))
		want += sums[m[2]] + "  " + e.Name() + "\n"
	}
	if got := readIn(t, dir, "dist/SHA256SUMS"); got != want {
		t.Errorf("SHA256SUMS:\n%swant:\n%s", got, want)
	}
	if got, want := slices.Sorted(maps.Keys(sums)), slices.Sorted(slices.Values(archs)); !slices.Equal(got, want) {
		t.Fatalf("make dist made binaries for %v, want %v", got, want)
	}
	return version, sums
}

// copyRepository makes a clone of HEAD at the path to, or copies the files if they are no git clone.
func copyRepository(t *testing.T, to string) (git bool) {
	t.Helper()
	if _, err := os.Stat(".git"); err == nil {
		runIn(t, ".", nil, "git", "clone", "--quiet", ".", to)
		return true
	}
	if err := os.CopyFS(to, os.DirFS(".")); err != nil {
		t.Fatal(err)
	}
	return false
}

// Two clones in different directories, built with different build caches, give the same binaries. The
// binaries are named after the version that they print. They are static, for the machine in their
// name, and the one for amd64 is below the limit. Files without git give a "devel" version.
func TestDist(t *testing.T) {
	archs := strings.Fields(*distFlag)
	if len(archs) == 0 {
		t.Skip("run by make test-dist")
	}
	one, other := filepath.Join(t.TempDir(), "one"), filepath.Join(t.TempDir(), "other", "place")
	git := copyRepository(t, one)
	copyRepository(t, other)
	version, sums := makeDist(t, one, archs, "GOCACHE="+t.TempDir())
	// The second run finds dist/ of the first, which must not count as a change of the source.
	for i := range 2 {
		if v, s := makeDist(t, other, archs); v != version || !maps.Equal(s, sums) {
			t.Errorf("run %d of make dist in another directory: version %s, checksums %v; want %s, %v", i+1, v, s, version, sums)
		}
	}
	for _, arch := range archs {
		path := filepath.Join(one, "dist", "telemeter-"+version+"-linux-"+arch)
		checkStatic(t, path, distMachines[arch])
		if info, err := os.Stat(path); err != nil || arch == "amd64" && info.Size() >= distLimit {
			t.Errorf("%s: got %v, %v; want less than %d bytes", path, info, err, distLimit)
		}
		settings := runIn(t, one, nil, "go", "version", "-m", path)
		if arch == "armv7" && !strings.Contains(settings, "GOARM=7") || !strings.Contains(settings, "CGO_ENABLED=0") {
			t.Errorf("%s is built with other settings:\n%s", path, settings)
		}
		if git {
			head := strings.TrimSpace(runIn(t, one, nil, "git", "rev-parse", "HEAD"))
			if !strings.Contains(settings, "vcs.revision="+head) || !strings.Contains(settings, "vcs.modified=false") || !strings.Contains(settings, "\t"+version+"\t") {
				t.Errorf("%s has not the version %s and the unmodified revision %s:\n%s", path, version, head, settings)
			}
		}
	}
	if !git {
		return
	}
	if err := os.RemoveAll(filepath.Join(other, ".git")); err != nil {
		t.Fatal(err)
	}
	if v, _ := makeDist(t, other, archs); v != "devel" {
		t.Errorf("make dist without git: version %s, want devel", v)
	}
}

// checkStatic reports an error unless the file is an ELF program for the machine that needs no
// interpreter and no library.
func checkStatic(t *testing.T, path string, machine elf.Machine) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	libraries, err := f.DynString(elf.DT_NEEDED)
	interpreter := slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
	if err != nil || f.Machine != machine || interpreter || len(libraries) > 0 {
		t.Errorf("%s: machine %v, interpreter %v, libraries %v, %v; want machine %v, no interpreter, no library", path, f.Machine, interpreter, libraries, err, machine)
	}
}
