package main

// This file remembers the newest warnings and errors of the process log, for the status page.
// Memory is bounded.

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	maxRecentWarnings = 20  // log lines that a WarningLog remembers
	maxWarningText    = 400 // bytes of a log line that it remembers
)

// LoggedWarning is a line of the process log with level warning or error.
type LoggedWarning struct {
	At    time.Time `json:"at"`
	Level string    `json:"level"` // WARN or ERROR
	Text  string    `json:"text"`  // message and attributes
}

// WarningLog remembers the newest warnings and errors that are logged through its handler. It is
// safe for concurrent use.
type WarningLog struct {
	mu    sync.Mutex // guards lines
	lines []LoggedWarning
}

// Handler returns a handler that passes all lines to next, and remembers warnings and errors. It does
// not remember a line whose level next does not log.
func (l *WarningLog) Handler(next slog.Handler) slog.Handler {
	return &warningHandler{Handler: next, log: l}
}

// NewestFirst returns the newest warnings and errors.
func (l *WarningLog) NewestFirst() []LoggedWarning {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := append([]LoggedWarning{}, l.lines...)
	slices.Reverse(lines)
	return lines
}

func (l *WarningLog) add(line LoggedWarning) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.lines) >= maxRecentWarnings {
		l.lines = slices.Delete(l.lines, 0, len(l.lines)-maxRecentWarnings+1)
	}
	l.lines = append(l.lines, line)
}

// warningHandler is the handler of a WarningLog.
type warningHandler struct {
	slog.Handler
	log   *WarningLog
	attrs string // the attributes of WithAttrs as text
	group string // prefix of the names of further attributes, such as "peer.", from WithGroup
}

func (h *warningHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		var text strings.Builder
		text.WriteString(r.Message)
		text.WriteString(h.attrs)
		r.Attrs(func(a slog.Attr) bool {
			writeAttr(&text, h.group, a)
			return text.Len() <= maxWarningText
		})
		line := text.String()
		if len(line) > maxWarningText {
			line = line[:maxWarningText] + "…"
		}
		h.log.add(LoggedWarning{At: r.Time.UTC(), Level: r.Level.String(), Text: strings.ToValidUTF8(line, "")})
	}
	return h.Handler.Handle(ctx, r)
}

func (h *warningHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var text strings.Builder
	for _, a := range attrs {
		writeAttr(&text, h.group, a)
	}
	return &warningHandler{h.Handler.WithAttrs(attrs), h.log, h.attrs + text.String(), h.group}
}

func (h *warningHandler) WithGroup(name string) slog.Handler {
	return &warningHandler{h.Handler.WithGroup(name), h.log, h.attrs, h.group + name + "."}
}

// writeAttr writes an attribute as text. The attributes in a group have the group's name as prefix.
func writeAttr(text *strings.Builder, group string, a slog.Attr) {
	value := a.Value.Resolve()
	if value.Kind() != slog.KindGroup {
		fmt.Fprintf(text, " %s%s=%v", group, a.Key, value)
		return
	}
	if a.Key != "" {
		group += a.Key + "."
	}
	for _, member := range value.Group() {
		writeAttr(text, group, member)
	}
}
