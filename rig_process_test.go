package main

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"syscall"
	"testing"
	"time"
)

// Processes of telemeter. The test binary runs as telemeter when asTelemeter is set in its
// environment (TestMain), so tests can start, signal and kill processes without building a program.

// process is a running telemeter. Its log has everything that it writes.
type process struct {
	logBuffer
	t   *testing.T
	cmd *exec.Cmd
}

// text returns everything that the process has written so far.
func (p *process) text() string { return p.String() }

// telemeterCommand returns a command that runs telemeter in dir. It skips the test if -short is
// set.
func telemeterCommand(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	skipProcesses(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Dir = dir
	// Under the race detector, a process otherwise sleeps a second when it exits.
	cmd.Env = append(os.Environ(), asTelemeter+"=1", "GORACE=atexit_sleep_ms=0")
	return cmd
}

// start starts telemeter in dir, and kills it at the end of the test.
func start(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: telemeterCommand(t, dir, args...)}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.cmd.Wait()
		if t.Failed() {
			t.Logf("%v said:\n%s", args, p.text())
		}
	})
	return p
}

// await waits until the log matches pattern, for at most 30 s, and returns the last group of the
// match.
func (p *process) await(pattern string) string {
	p.t.Helper()
	re := regexp.MustCompile(pattern)
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if m := re.FindStringSubmatch(p.text()); m != nil {
			return m[len(m)-1]
		}
	}
	p.t.Fatalf("no %q within 30 s in:\n%s", pattern, p.text())
	return ""
}

// end sends a signal and returns the exit status.
func (p *process) end(sig syscall.Signal) int {
	p.t.Helper()
	p.cmd.Process.Signal(sig)
	done := make(chan struct{})
	go func() { p.cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		p.t.Fatalf("still running 30 s after %v:\n%s", sig, p.text())
	}
	return p.cmd.ProcessState.ExitCode()
}

// tool runs telemeter in dir until it exits.
func tool(t *testing.T, dir string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := telemeterCommand(t, dir, args...)
	var out, err bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &err
	cmd.Run() // its status is the result
	return out.String(), err.String(), cmd.ProcessState.ExitCode()
}

// mustTool is tool for commands that must exit with 0; it returns their standard output.
func mustTool(t *testing.T, dir string, args ...string) string {
	t.Helper()
	stdout, stderr, code := tool(t, dir, args...)
	if code != 0 {
		t.Fatalf("telemeter %v: exit %d:\n%s", args, code, stderr)
	}
	return stdout
}

// get returns the body of url, which must answer 200.
func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %v\n%s", url, resp.Status, err, b)
	}
	return string(b)
}

const (
	externalAddr = `msg=serving .*external=(\S+)`
	internalAddr = `msg=serving .*internal=(\S+)`
)

// startServer starts a server in dir on free ports. dir must have the directory keys.
func startServer(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	return start(t, dir, append([]string{"--mode", "server", "--keys", "keys", "--listen", "127.0.0.1:0",
		"--listen-internal", "127.0.0.1:0", "--storage-dir", "data"}, args...)...)
}
