package main

import (
	"fmt"
	"testing"
	"time"
)

// A failureLog lets a cause be logged once in failureLogInterval, and another cause at once. While
// maxLoggedFailures causes are recent, no other cause is logged.
func TestFailureLog(t *testing.T) {
	var l failureLog
	begin := time.Unix(1e9, 0)
	take := func(after time.Duration, cause string, wantOK bool, wantSuppressed int) {
		t.Helper()
		if n, ok := l.take(begin.Add(after), cause); ok != wantOK || n != wantSuppressed {
			t.Errorf("%s after %v: got %v with %d suppressed, want %v with %d", cause, after, ok, n, wantOK, wantSuppressed)
		}
	}
	take(0, "a", true, 0)
	take(time.Minute, "a", false, 0)
	take(time.Minute, "b", true, 0)
	take(2*time.Minute, "a", false, 0)
	take(10*time.Minute, "a", true, 2)
	take(10*time.Minute, "b", false, 0)
	for i := range maxLoggedFailures - 2 {
		take(10*time.Minute, fmt.Sprint("c", i), true, 0)
	}
	take(10*time.Minute, "d", false, 0)
	take(11*time.Minute, "b", true, 1)
	take(20*time.Minute, "d", true, 0)
	if n := len(l.logged); n > maxLoggedFailures {
		t.Errorf("%d causes are remembered, want at most %d", n, maxLoggedFailures)
	}
}

// Two errors of the same connection fault have the same text, whatever their local ports are.
func TestWithoutLocalEnds(t *testing.T) {
	for text, want := range map[string]string{
		`Get "http://a:1/": read tcp 127.0.0.1:43512->127.0.0.1:9090: i/o timeout`: `Get "http://a:1/": read tcp 127.0.0.1:9090: i/o timeout`,
		`read udp [::1]:5->[::1]:53: x`:                                            `read udp [::1]:53: x`,
		`dial tcp 127.0.0.1:9090: connect: connection refused`:                     `dial tcp 127.0.0.1:9090: connect: connection refused`,
	} {
		if got := withoutLocalEnds(text); got != want {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
}
