package main

// Helpers for tests on the real clock: waiting for a condition, the CPU time of the process, and
// an address that is free. Tests in virtual time use testing/synctest instead.

import (
	"net"
	"syscall"
	"testing"
	"time"
)

// eventually polls ok every few milliseconds, and fails the test if ok is not true within a
// minute. what names the condition in the failure message.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	eventuallyWithin(t, time.Minute, 2*time.Millisecond, what, ok)
}

// eventuallyWithin is eventually with a time limit and a polling interval.
func eventuallyWithin(t testing.TB, limit, poll time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(poll) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// processCPU returns the CPU time, user and system, that this process has used so far.
func processCPU(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// freeAddr returns a loopback address whose TCP port was free a moment ago.
func freeAddr(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}
