package main

// This file decides which tests run when. "go test -short" leaves out sweeps and tests that start
// processes. "make check" runs sweeps without the race detector, and all other tests with it.

import (
	"runtime/debug"
	"slices"
	"strings"
	"testing"
)

// sweep marks the test t as a sweep: a test that goes through many states in one goroutine, such as
// a crash sweep, a model or a simulation. The name of a sweep must begin with TestSweep, so that
// "make sweeps" finds it. sweep skips the test under the race detector, because the detector finds
// nothing in one goroutine and slows the test down ten times. sweep also skips the test with
// -short.
func sweep(t *testing.T) {
	t.Helper()
	if !strings.HasPrefix(t.Name(), "TestSweep") {
		t.Fatal("the name of a sweep does not begin with TestSweep: make sweeps would not run it")
	}
	if testing.Short() {
		t.Skip("a sweep: left out by -short")
	}
	if raceDetector() {
		t.Skip("a sweep: run without the race detector by make sweeps")
	}
}

// skipProcesses skips a test that starts processes if -short is set.
func skipProcesses(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("starts processes: left out by -short")
	}
}

// raceDetector reports whether the test binary was built with -race.
func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}
