package main

import (
	"testing"
	"time"
)

// Failover chooses the server of each attempt: it tries the other servers of a round after a
// failure, stays for a time with a server that answered, and then returns to the first server. Each
// row continues where the previous row ended.
func TestFailover(t *testing.T) {
	const stay = time.Minute
	now := time.Unix(0, 0)
	f := serverFailover{servers: 3}
	f.beginDrain(now, 0)
	for i, tt := range []struct {
		do     string
		after  time.Duration // how much time passes first
		retry  time.Duration // Retry-After of a server that fails
		result bool          // for a failure or decline: whether an untried server is left
		server int           // of the next attempt
	}{
		{"fail", 0, time.Second, true, 1},
		{"succeed", 0, 0, true, 1},
		{"succeed", stay - 1, 0, true, 1},
		{"succeed", 1, 0, true, 0}, // back to the first server
		{"fail", 0, 5 * time.Second, true, 1},
		{"fail", 0, 9 * time.Second, true, 2},
		{"fail", 0, 7 * time.Second, false, 0}, // the round is over
		{"fail", 0, time.Second, true, 1},
		{"fail", 0, 0, true, 2},
		{"succeed", 0, 0, true, 2},
		{"fail", 0, 0, true, 0}, // the round begins with the server that answered last
		{"fail", 0, 0, true, 1},
		{"fail", 0, 0, false, 2},
		{"succeed", stay, 0, true, 0},
		{"decline", 0, 0, true, 1},
		{"decline", 0, 0, true, 2},
		{"decline", 0, 0, false, 2}, // all servers have declined
		{"decline", 0, 0, true, 0},
		{"succeed", stay, 0, true, 0},
	} {
		now = now.Add(tt.after)
		got := true
		switch tt.do {
		case "fail":
			isLast := f.isLastOfRound()
			if got = f.advanceAfterFailure(tt.retry); got == isLast {
				t.Errorf("row %d: isLastOfRound is %v, but whether a server is untried is %v", i, isLast, got)
			}
		case "succeed":
			f.stayAfterAnswer(now, stay)
			f.last = f.current
		case "decline":
			f.last = f.current
			got = f.advanceAfterDecline(now, stay)
		}
		if f.chooseServer(now); got != tt.result || f.current != tt.server {
			t.Errorf("row %d: %s: got %v and then server %d, want %v and server %d", i, tt.do, got, f.current, tt.result, tt.server)
		}
		if i == 6 && f.retryAfter != 9*time.Second {
			t.Errorf("after Retry-After of 5, 9 and 7 seconds: got %v, want 9 s", f.retryAfter)
		}
	}
	if f.retryAfter != 0 {
		t.Errorf("after a round without Retry-After: got %v, want 0", f.retryAfter)
	}
}

// If scrapes stay unread on a server, failover prefers the next server for maxUnreadTime. If that
// server fails meanwhile, it is no longer preferred.
func TestFailoverAfterUnreadScrapes(t *testing.T) {
	now := time.Unix(0, 0)
	f := serverFailover{servers: 2}
	begin := func(after, unreadFor time.Duration, wantMoved bool, want int) {
		t.Helper()
		now = now.Add(after)
		moved := f.beginDrain(now, unreadFor)
		if f.chooseServer(now); moved != wantMoved || f.current != want {
			t.Errorf("at %v s: next server preferred: %v, server %d; want %v, server %d", now.Unix(), moved, f.current, wantMoved, want)
		}
	}
	begin(0, maxUnreadTime, false, 0)
	begin(time.Minute, maxUnreadTime+1, true, 1)
	f.last = f.current
	begin(maxUnreadTime-1, 0, false, 1)
	begin(1, 0, false, 0)
	begin(0, 2*maxUnreadTime, true, 0) // the last server is 1, so the next is 0
	f.last = 0
	begin(maxUnreadTime, 2*maxUnreadTime, true, 1)
	f.advanceAfterFailure(0)
	begin(time.Minute, 2*maxUnreadTime, false, 0)
	alone := serverFailover{servers: 1}
	if alone.beginDrain(now, 2*maxUnreadTime) {
		t.Error("a single server was replaced by another one")
	}
}

// The pause between rounds doubles up to half of maxBackoff, and is at least as long as the servers
// asked for.
func TestBackoff(t *testing.T) {
	var b roundBackoff
	b.reset()
	for i, tt := range []struct{ retryAfter, want time.Duration }{
		{0, time.Second / 2}, {0, time.Second}, {7 * time.Second, 7 * time.Second}, {time.Second, 4 * time.Second},
		{0, 8 * time.Second}, {0, 16 * time.Second}, {0, 30 * time.Second}, {0, 30 * time.Second}, {time.Hour, time.Hour},
	} {
		if got := b.nextPause(tt.retryAfter); got != tt.want {
			t.Errorf("pause %d: got %v, want %v", i, got, tt.want)
		}
	}
	if b.reset(); b.nextPause(0) != minBackoff/2 {
		t.Error("after a reset the pause is not the shortest")
	}
}

// The bound on the scrapes of a push shrinks after a failure, stays until as many scrapes are
// settled, and then doubles.
func TestPushScrapeLimit(t *testing.T) {
	s := pushScrapeLimit{max: maxPushScrapes}
	for i, tt := range []struct {
		change func(n int)
		n      int
		want   int
	}{
		{s.growAfter, 9, maxPushScrapes},
		{s.limitToHalf, 9, 4},
		{s.growAfter, 4, 4},
		{s.growAfter, 4, 4},
		{s.growAfter, 1, 8}, // nine scrapes are settled
		{s.growAfter, 1, 16},
		{s.limitToOne, 3, 1},
		{s.growAfter, 1, 1},
		{s.growAfter, 1, 1},
		{s.growAfter, 1, 2},
	} {
		if tt.change(tt.n); s.max != tt.want {
			t.Errorf("row %d: a push may have %d scrapes, want %d", i, s.max, tt.want)
		}
	}
}
