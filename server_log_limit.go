package main

// This file limits how often one message is written to the process log. Strangers and hostile sites
// can cause some messages at any rate. They must not fill the disk with the log, or hide other
// messages in it.

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// limitedLogEvery is the shortest time between two lines with the same message.
const limitedLogEvery = 10 * time.Second

// limitedLog writes at most one line with each message in limitedLogEvery. The next line with the
// message says how many were left out. So the caller must count the events elsewhere. limitedLog is
// safe for concurrent use.
type limitedLog struct {
	log *slog.Logger
	now func() time.Time

	mu       sync.Mutex                // guards messages
	messages map[string]limitedMessage // by message; bounded, because messages are constants
}

// limitedMessage limits the lines with one message. The zero value is ready for use.
type limitedMessage struct {
	written    time.Time // when the last line with the message was written
	suppressed int       // lines with the message that were left out since then
}

// take reports whether a line with the message may be written now, and how many were left out
// before.
func (m *limitedMessage) take(now time.Time) (suppressed int, ok bool) {
	if !m.written.IsZero() && now.Sub(m.written) < limitedLogEvery {
		m.suppressed++
		return 0, false
	}
	suppressed = m.suppressed
	*m = limitedMessage{written: now}
	return suppressed, true
}

func newLimitedLog(log *slog.Logger, now func() time.Time) *limitedLog {
	return &limitedLog{log: log, now: now, messages: map[string]limitedMessage{}}
}

// Log writes a line to the process log, unless it wrote a line with the same message a short time
// before. message must be a constant of the program.
func (l *limitedLog) Log(level slog.Level, message string, args ...any) {
	ctx := context.Background()
	if !l.log.Enabled(ctx, level) {
		return
	}
	if suppressed, ok := l.take(message); ok {
		if suppressed > 0 {
			args = append(args, "suppressed", suppressed)
		}
		l.log.Log(ctx, level, message, args...)
	}
}

func (l *limitedLog) take(message string) (suppressed int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.messages[message]
	suppressed, ok = m.take(l.now())
	l.messages[message] = m
	return suppressed, ok
}
