package main

// Tests of the limits on how often one message is written to the process log, and about one peer.

import (
	"fmt"
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
	l := NewLimitedLog(slog.New(slog.NewTextHandler(&buf, nil)), func() time.Time { return now })
	for range 3 {
		l.Log(slog.LevelWarn, "a", "n", 1)
		l.Log(slog.LevelDebug, "a")
	}
	l.Log(slog.LevelInfo, "b")
	now = now.Add(LimitedLogEvery - 1)
	l.Log(slog.LevelWarn, "a", "n", 2)
	now = now.Add(1)
	l.Log(slog.LevelWarn, "a", "n", 3)
	now = now.Add(LimitedLogEvery)
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

// A message about a peer is written at most once an hour for each peer, and at most once in 10 s for
// all peers. A peer whose line was left out because of another peer is logged later. The addresses of
// a /64 network are one peer.
func TestLogPeer(t *testing.T) {
	var buf logBuffer
	now := testNow
	l := NewLimitedLog(slog.New(slog.NewTextHandler(&buf, nil)), func() time.Time { return now })
	const a, b, six, sameSix = "192.0.2.1:1", "192.0.2.2:1", "[2001:db8::1]:1", "[2001:db8::2]:2"
	for i, c := range []struct {
		after   time.Duration
		message string
		remote  string
		want    string // end of the line that is written; "" if none is
	}{
		{0, "x", a, "INFO msg=x remote=192.0.2.1:1 n=1"},
		{0, "x", b, ""},
		{0, "y", a, "INFO msg=y remote=192.0.2.1:1 n=1"},
		{LimitedLogEvery, "x", "192.0.2.1:2", ""},
		{0, "x", b, "INFO msg=x remote=192.0.2.2:1 n=1 suppressed=1"},
		{LimitedLogEvery, "x", six, "INFO msg=x remote=[2001:db8::1]:1 n=1"},
		{LimitedLogEvery, "x", sameSix, ""},
		{LimitedLogEvery, "x", "", "INFO msg=x remote=\"\" n=1"},
		{LimitedLogEvery, "x", "pipe", ""},
		{peerLogEvery, "x", a, "INFO msg=x remote=192.0.2.1:1 n=1 suppressed=1"},
		{LimitedLogEvery, "x", sameSix, "INFO msg=x remote=[2001:db8::2]:2 n=1 suppressed=1"},
	} {
		now = now.Add(c.after)
		before := len(buf.String())
		l.LogPeer(slog.LevelInfo, c.message, c.remote, "n", 1)
		_, got, _ := strings.Cut(strings.TrimSpace(buf.String()[before:]), " level=")
		if got != c.want {
			t.Errorf("call %d: got %q, want %q", i, got, c.want)
		}
	}
}

// The memory for peers is bounded. While it is full, only the limit of the message applies to new
// peers. Peers that may be logged again make room.
func TestLogPeerIsBounded(t *testing.T) {
	var buf logBuffer
	now := testNow
	l := NewLimitedLog(slog.New(slog.NewTextHandler(&buf, nil)), func() time.Time { return now })
	log := func(peer int) bool {
		before := len(buf.String())
		l.LogPeer(slog.LevelInfo, fmt.Sprint("m", peer), fmt.Sprintf("10.0.%d.%d:1", peer/256, peer%256))
		return len(buf.String()) > before
	}
	for i := range maxLoggedPeers + 100 {
		if !log(i) {
			t.Fatalf("peer %d is not logged", i)
		}
	}
	now = now.Add(LimitedLogEvery)
	if n := len(l.peers); n != maxLoggedPeers || log(0) || !log(maxLoggedPeers) || log(maxLoggedPeers) {
		t.Errorf("%d peers are remembered, want %d; or a remembered peer is logged, or a new one is not logged by the limit of its message", n, maxLoggedPeers)
	}
	now = now.Add(peerLogEvery)
	if !log(maxLoggedPeers) || len(l.peers) != 1 {
		t.Errorf("%d peers are remembered after an hour, want 1", len(l.peers))
	}
}
