package main

// This file has the part of the status that server and client share: /api/status answers with it as
// JSON, and the status page and --mode status show it.

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Kinds of process, in ProcessStatus.Kind.
const (
	KindServerStatus = "server"
	KindClientStatus = "client"
)

// errorIsCurrent is how long after an error of the process log a status names the error among its
// problems.
const errorIsCurrent = 10 * time.Minute

// ProcessStatus is the part of the status of a server and of a client that both have.
type ProcessStatus struct {
	Kind     string    `json:"kind"` // KindServerStatus or KindClientStatus
	Name     string    `json:"name"` // name of the server, or cluster ID of the client
	Version  string    `json:"version"`
	Revision string    `json:"revision"`
	Now      time.Time `json:"now"`
	Started  time.Time `json:"started"`
	NotReady string    `json:"not_ready,omitempty"` // reason why the readiness check fails
	// Problems says what needs attention, one sentence each, the most urgent first. It is empty if
	// nothing does.
	Problems []string        `json:"problems"`
	Warnings []LoggedWarning `json:"warnings"` // newest first
}

// NewProcessStatus returns a ProcessStatus without NotReady. Its problems are the errors that were
// logged a short time before now, except for messages that begin with one of judged: the caller knows
// itself whether their causes last.
func NewProcessStatus(kind, name string, started, now time.Time, log *WarningLog, judged ...string) ProcessStatus {
	version, revision := ProgramVersion()
	st := ProcessStatus{Kind: kind, Name: name, Version: version, Revision: revision, Now: now.UTC(), Started: started.UTC(), Problems: []string{}, Warnings: log.NewestFirst()}
	named := map[string]bool{}
	for _, line := range st.Warnings {
		if slices.ContainsFunc(judged, func(message string) bool { return strings.HasPrefix(line.Text, message) }) {
			continue
		}
		if line.Level == "ERROR" && now.Sub(line.At) < errorIsCurrent && !named[line.Text] {
			named[line.Text] = true
			st.Problems = append(st.Problems, fmt.Sprintf("error %s ago: %s", FormatAge(now.Sub(line.At)), line.Text))
		}
	}
	return st
}

// TimeOrNil returns a pointer to t in UTC, or nil if t is zero.
func TimeOrNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// FamilyCount is a metric name and the number of its series or samples.
type FamilyCount struct {
	Name  string `json:"name"`
	Count int    `json:"count"`
}
