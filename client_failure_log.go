package main

// This file chooses which failures are logged at a high level: each cause once in
// failureLogInterval. So a long outage does not fill the log, and a failure that changes its cause
// is logged at once. Few causes are remembered, and while all of them are recent, no other cause is
// logged. The caller counts all failures in a metric. Pure: callers pass the time.

import (
	"slices"
	"strings"
	"time"
)

const (
	failureLogInterval = 10 * time.Minute // least time between two log lines about the same cause
	maxLoggedFailures  = 8                // most causes that are logged in failureLogInterval; enough for two causes at each of four servers
	maxFailureCause    = 1 << 10          // bytes of a cause that are remembered and compared
)

// failureLog remembers which failures were logged. The zero value is ready for use. It is not safe
// for concurrent use.
type failureLog struct {
	logged []loggedFailure
}

type loggedFailure struct {
	cause      string
	at         time.Time // when it was logged last
	suppressed int       // how often it was not logged since then
}

// take reports whether a failure with this cause is to be logged now, and how often it was not
// logged before.
func (l *failureLog) take(now time.Time, cause string) (suppressed int, ok bool) {
	cause = strings.Clone(cause[:min(len(cause), maxFailureCause)])
	isRecent := func(f loggedFailure) bool { return now.Sub(f.at) < failureLogInterval }
	i := slices.IndexFunc(l.logged, func(f loggedFailure) bool { return f.cause == cause })
	switch {
	case i >= 0 && isRecent(l.logged[i]):
		l.logged[i].suppressed++
		return 0, false
	case i >= 0:
		suppressed = l.logged[i].suppressed
		l.logged = slices.Delete(l.logged, i, i+1)
	case len(l.logged) >= maxLoggedFailures:
		l.logged = slices.DeleteFunc(l.logged, func(f loggedFailure) bool { return !isRecent(f) })
		if len(l.logged) >= maxLoggedFailures {
			return 0, false
		}
	}
	l.logged = append(l.logged, loggedFailure{cause: cause, at: now})
	return suppressed, true
}

// withoutLocalEnds returns the text of an error without the addresses of this end of connections,
// because each connection has another one. net writes a connection as LOCAL->REMOTE.
func withoutLocalEnds(text string) string {
	words := strings.Split(text, " ")
	for i, word := range words {
		if _, remote, ok := strings.Cut(word, "->"); ok {
			words[i] = remote
		}
	}
	return strings.Join(words, " ")
}

// outage counts consecutive failures. The zero value means that the last attempt succeeded, or that
// there was none.
type outage struct {
	begin    time.Time // time of the first failure
	failures int
	logged   bool // one of the failures was logged at a high level
}

// addFailure records a failure that is, or is not, logged at a high level.
func (o *outage) addFailure(now time.Time, logged bool) {
	if o.failures == 0 {
		o.begin = now
	}
	o.failures++
	o.logged = o.logged || logged
}
