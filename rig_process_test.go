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

// Helpers for tests that run processes of telemeter. If the environment variable that asTelemeter
// names is set, TestMain makes the test binary run as telemeter. So tests can start, signal and
// kill processes without building a program.

// process is a running telemeter process. Its logBuffer holds everything that the process has
// written to standard output and standard error.
type process struct {
	logBuffer
	t   *testing.T
	cmd *exec.Cmd
}

func (p *process) text() string { return p.String() }

// telemeterCommand returns a command that runs telemeter with args in the directory dir. It skips
// the test if -short is set.
func telemeterCommand(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	skipProcesses(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Dir = dir
	// Without GORACE, a process under the race detector would sleep for a second when it exits.
	cmd.Env = append(os.Environ(), asTelemeter+"=1", "GORACE=atexit_sleep_ms=0")
	return cmd
}

// start starts telemeter with args in the directory dir. The process is killed at the end of the
// test.
func start(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	return startCommand(t, telemeterCommand(t, dir, args...))
}

// startCommand starts cmd. The process is killed at the end of the test.
func startCommand(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.cmd.Wait()
		if t.Failed() {
			t.Logf("%v said:\n%s", cmd.Args[1:], p.text())
		}
	})
	return p
}

// await waits until the output of the process matches pattern, for at most 30 s. It returns the
// text of the last group in pattern, or the whole match if pattern has no group. It fails the test
// if there is no match in time.
func (p *process) await(pattern string) string {
	p.t.Helper()
	return p.awaitWithin(30*time.Second, pattern)
}

// awaitWithin does the same as await, with the time limit limit.
func (p *process) awaitWithin(limit time.Duration, pattern string) string {
	p.t.Helper()
	re := regexp.MustCompile(pattern)
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if m := re.FindStringSubmatch(p.text()); m != nil {
			return m[len(m)-1]
		}
	}
	p.t.Fatalf("no %q within %v in:\n%s", pattern, limit, p.text())
	return ""
}

// end sends the signal sig to the process, waits up to 30 s for its exit, and returns its exit
// status.
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

// tool runs telemeter with args in the directory dir and waits for its exit. It returns the output
// and the exit status.
func tool(t *testing.T, dir string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := telemeterCommand(t, dir, args...)
	var out, err bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &err
	cmd.Run() // the error is not needed, because the result has the exit status
	return out.String(), err.String(), cmd.ProcessState.ExitCode()
}

// mustTool does the same as tool, but fails the test unless the exit status is 0. It returns the
// standard output.
func mustTool(t *testing.T, dir string, args ...string) string {
	t.Helper()
	stdout, stderr, code := tool(t, dir, args...)
	if code != 0 {
		t.Fatalf("telemeter %v: exit %d:\n%s", args, code, stderr)
	}
	return stdout
}

// get sends a GET request to url and returns the body of the response. It fails the test unless the
// status is 200.
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

// startServer starts a telemeter server in the directory dir, with free ports of the loopback
// address. dir must contain the key directory "keys".
func startServer(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	return start(t, dir, append([]string{"--mode", "server", "--keys", "keys", "--listen", "127.0.0.1:0",
		"--listen-internal", "127.0.0.1:0", "--storage-dir", "data"}, args...)...)
}
