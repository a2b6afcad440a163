package main

// Tests of the limit on how often one message is written to the process log.

import (
	"log/slog"
	"strings"
	"testing"
	"time"
)

// A message is written at most once in 10 s, and its next line says how many lines were left out.
// Other messages are not affected. Lines below the level of the log do not count.
func TestLimitedLog(t *testing.T) {
	var buf logBuffer
	now := testNow
	l := newLimitedLog(slog.New(slog.NewTextHandler(&buf, nil)), func() time.Time { return now })
	for range 3 {
		l.Log(slog.LevelWarn, "a", "n", 1)
		l.Log(slog.LevelDebug, "a")
	}
	l.Log(slog.LevelInfo, "b")
	now = now.Add(limitedLogEvery - 1)
	l.Log(slog.LevelWarn, "a", "n", 2)
	now = now.Add(1)
	l.Log(slog.LevelWarn, "a", "n", 3)
	now = now.Add(limitedLogEvery)
	l.Log(slog.LevelWarn, "a", "n", 4)
	var got []string
	for line := range strings.Lines(buf.String()) {
		_, level, _ := strings.Cut(line, " level=")
		got = append(got, strings.TrimSpace(level))
	}
	want := "WARN msg=a n=1|INFO msg=b|WARN msg=a n=3 suppressed=3|WARN msg=a n=4"
	if strings.Join(got, "|") != want {
		t.Errorf("the log has %q, want %s", got, want)
	}
}
