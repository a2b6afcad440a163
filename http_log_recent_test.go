package main

// Tests of the newest warnings and errors that a WarningLog remembers.

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// A WarningLog remembers warnings and errors with their time, level and attributes, newest first.
// All lines reach the next handler, as they are.
func TestWarningLog(t *testing.T) {
	var l WarningLog
	var out bytes.Buffer
	if got := l.NewestFirst(); got == nil || len(got) != 0 { // nil would be null in JSON
		t.Errorf("before the first line: got %#v, want an empty list", got)
	}
	handler := slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelInfo})
	log := slog.New(l.Handler(handler))
	begin := time.Now()
	log.Info("not remembered")
	log.Warn("plain")
	log.Error("with attributes", "err", fmt.Errorf("no %s", "luck"), "n", 3)
	site := log.With("site", "a b")
	site.Warn("late", "age", time.Minute)
	site.WithGroup("peer").With("name", "b").WithGroup("clock").Warn("off", "by", 2, slog.Group("limits", "low", 1))
	log.Warn("in a group", slog.Group("peer", "name", "b", slog.Group("", "inline", true)))
	got := l.NewestFirst()
	want := []string{
		"WARN in a group peer.name=b peer.inline=true",
		"WARN off site=a b peer.name=b peer.clock.by=2 peer.clock.limits.low=1",
		"WARN late site=a b age=1m0s",
		"ERROR with attributes err=no luck n=3",
		"WARN plain",
	}
	var texts []string
	for _, w := range got {
		texts = append(texts, w.Level+" "+w.Text)
		if w.At.Before(begin) || w.At.After(time.Now()) || w.At.Location() != time.UTC {
			t.Errorf("%s: logged at %v, want a time in UTC from %v on", w.Text, w.At, begin)
		}
	}
	if !slices.Equal(texts, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(texts, "\n"), strings.Join(want, "\n"))
	}
	for _, line := range []string{"msg=\"not remembered\"\n", "msg=plain\n", "msg=off site=\"a b\" peer.name=b peer.clock.by=2 peer.clock.limits.low=1\n"} {
		if !strings.Contains(out.String(), line) {
			t.Errorf("the next handler did not write %q:\n%s", line, &out)
		}
	}
}

// A WarningLog keeps only the newest lines, and cuts a long line between two characters.
func TestWarningLogIsBounded(t *testing.T) {
	var l WarningLog
	log := slog.New(l.Handler(slog.DiscardHandler))
	if log.Warn("lost"); len(l.NewestFirst()) != 0 {
		t.Error("a line below the level of the next handler is remembered")
	}
	log = slog.New(l.Handler(slog.NewTextHandler(&bytes.Buffer{}, nil)))
	for i := range 3 * maxRecentWarnings {
		log.Warn("warning", "n", i)
	}
	got := l.NewestFirst()
	if len(got) != maxRecentWarnings {
		t.Fatalf("%d lines are remembered, want %d", len(got), maxRecentWarnings)
	}
	for i, w := range got {
		if want := fmt.Sprintf("warning n=%d", 3*maxRecentWarnings-1-i); w.Text != want {
			t.Errorf("line %d is %q, want %q", i, w.Text, want)
		}
	}
	for _, tt := range []struct{ name, message, want string }{
		{"longest", strings.Repeat("x", maxWarningText), strings.Repeat("x", maxWarningText)},
		{"one byte more", strings.Repeat("x", maxWarningText+1), strings.Repeat("x", maxWarningText) + "…"},
		{"two bytes for each character", "x" + strings.Repeat("ü", maxWarningText), "x" + strings.Repeat("ü", maxWarningText/2-1) + "…"},
		{"four bytes for each character", "xyz" + strings.Repeat("😀", maxWarningText), "xyz" + strings.Repeat("😀", maxWarningText/4-1) + "…"},
		{"no UTF-8", "a\xffb", "ab"},
	} {
		log.Warn(tt.message)
		got := l.NewestFirst()[0].Text
		if got != tt.want || !utf8.ValidString(got) {
			t.Errorf("%s: got %q (%d bytes), want %q", tt.name, got, len(got), tt.want)
		}
	}
	log.With("a", strings.Repeat("x", 10*maxWarningText)).Warn("long attributes", "b", strings.Repeat("y", 10*maxWarningText))
	if got := l.NewestFirst()[0].Text; len(got) != maxWarningText+len("…") || !strings.HasPrefix(got, "long attributes a=xxx") {
		t.Errorf("a line with long attributes is %q (%d bytes)", got, len(got))
	}
}

func TestWarningLogConcurrently(t *testing.T) {
	var l WarningLog
	log := slog.New(l.Handler(slog.NewTextHandler(&logBuffer{}, nil)))
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			site := log.With("site", i)
			for n := range 200 {
				site.Warn("late", "n", n)
				for _, w := range l.NewestFirst() {
					if !strings.HasPrefix(w.Text, "late site=") {
						t.Errorf("a remembered line is %q", w.Text)
					}
				}
			}
		})
	}
	all.Wait()
	if n := len(l.NewestFirst()); n != maxRecentWarnings {
		t.Errorf("%d lines are remembered, want %d", n, maxRecentWarnings)
	}
}
