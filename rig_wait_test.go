package main

// Helpers for tests on the real clock: waiting for a condition, the CPU time of the process, whether a
// test yields, and addresses that are free or refuse connections. Tests in virtual time use
// testing/synctest instead.

import (
	"net"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// eventually calls ok every 2 ms until it returns true. It fails the test if that takes more than a
// minute. The parameter what describes the condition in the failure message.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	eventuallyWithin(t, time.Minute, 2*time.Millisecond, what, ok)
}

// eventuallyWithin does the same as eventually, with the time limit limit and the interval poll
// between calls.
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

// freeAddr returns a loopback address with a TCP port that was free when freeAddr looked. Another
// program may take the port before the test uses it.
func freeAddr(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// refusingAddr returns a loopback address that refuses every TCP connection until the test ends: a
// socket that does not listen is bound to it, so that no other program or test gets the port.
func refusingAddr(t testing.TB) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	bound, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(bound.(*syscall.SockaddrInet4).Port))
}

// countTurns limits the test to one processor until it ends, and starts a goroutine beside it. The
// result is the number of times that this goroutine has run. It rises if the test yields.
func countTurns(t *testing.T) *atomic.Int64 {
	procs := runtime.GOMAXPROCS(1)
	var turns atomic.Int64
	var ended atomic.Bool
	var beside sync.WaitGroup
	beside.Go(func() {
		for !ended.Load() {
			turns.Add(1)
			runtime.Gosched()
		}
	})
	t.Cleanup(func() {
		ended.Store(true)
		beside.Wait()
		runtime.GOMAXPROCS(procs)
	})
	return &turns
}
