package main

import (
	"testing"
	"time"
)

// A walk of attempts at three servers; each row begins where the one before ended.
func TestFailover(t *testing.T) {
	const stay = time.Minute
	now := time.Unix(0, 0)
	f := serverFailover{servers: 3}
	f.beginDrain(now, 0)
	for i, tt := range []struct {
		do     string
		after  time.Duration // that passes before
		retry  time.Duration // asked for by the server that fails
		result bool
		server int // of the attempt that follows
	}{
		{"fail", 0, time.Second, true, 1},
		{"succeed", 0, 0, true, 1},
		{"succeed", stay - 1, 0, true, 1},
		{"succeed", 1, 0, true, 0}, // the first again
		{"fail", 0, 5 * time.Second, true, 1},
		{"fail", 0, 9 * time.Second, true, 2},
		{"fail", 0, 7 * time.Second, false, 0}, // the round is over
		{"fail", 0, time.Second, true, 1},
		{"fail", 0, 0, true, 2},
		{"succeed", 0, 0, true, 2},
		{"fail", 0, 0, true, 0}, // a round begins with the one that worked
		{"fail", 0, 0, true, 1},
		{"fail", 0, 0, false, 2},
		{"succeed", stay, 0, true, 0},
		{"decline", 0, 0, true, 1},
		{"decline", 0, 0, true, 2},
		{"decline", 0, 0, false, 2}, // all have declined
		{"decline", 0, 0, true, 0},
		{"succeed", stay, 0, true, 0},
	} {
		now = now.Add(tt.after)
		got := true
		switch tt.do {
		case "fail":
			isLast := f.isLastOfRound()
			if got = f.advanceAfterFailure(tt.retry); got == isLast {
				t.Errorf("row %d: the last try of a round: %v, and more: %v", i, isLast, got)
			}
		case "succeed":
			f.stayAfterAnswer(now, stay)
			f.last = f.current
		case "decline":
			f.last = f.current
			got = f.advanceAfterDecline(now, stay)
		}
		if f.chooseServer(now); got != tt.result || f.current != tt.server {
			t.Errorf("row %d: %s: %v, then server %d, want %v, %d", i, tt.do, got, f.current, tt.result, tt.server)
		}
		if i == 6 && f.retryAfter != 9*time.Second {
			t.Errorf("a round of 5, 9 and 7 seconds: retry after %v", f.retryAfter)
		}
	}
	if f.retryAfter != 0 {
		t.Errorf("a round in which no server asked: retry after %v", f.retryAfter)
	}
}

// Where nobody reads, the next server is preferred for as long; one that fails meanwhile is left
// for that time.
func TestFailoverOfUnread(t *testing.T) {
	now := time.Unix(0, 0)
	f := serverFailover{servers: 2}
	begin := func(after, unreadFor time.Duration, wantMoved bool, want int) {
		t.Helper()
		now = now.Add(after)
		moved := f.beginDrain(now, unreadFor)
		if f.chooseServer(now); moved != wantMoved || f.current != want {
			t.Errorf("at %v: moved %v, server %d, want %v, %d", now.Unix(), moved, f.current, wantMoved, want)
		}
	}
	begin(0, maxUnreadTime, false, 0)
	begin(time.Minute, maxUnreadTime+1, true, 1)
	f.last = f.current
	begin(maxUnreadTime-1, 0, false, 1)
	begin(1, 0, false, 0)
	begin(0, 2*maxUnreadTime, true, 0) // last is 1
	f.last = 0
	begin(maxUnreadTime, 2*maxUnreadTime, true, 1)
	f.advanceAfterFailure(0)
	begin(time.Minute, 2*maxUnreadTime, false, 0)
	alone := serverFailover{servers: 1}
	if alone.beginDrain(now, 2*maxUnreadTime) {
		t.Error("one server has no next")
	}
}

func TestBackoff(t *testing.T) {
	var b roundBackoff
	b.reset()
	for i, tt := range []struct{ retryAfter, want time.Duration }{
		{0, time.Second / 2}, {0, time.Second}, {7 * time.Second, 7 * time.Second}, {time.Second, 4 * time.Second},
		{0, 8 * time.Second}, {0, 16 * time.Second}, {0, 30 * time.Second}, {0, 30 * time.Second}, {time.Hour, time.Hour},
	} {
		if got := b.nextPause(tt.retryAfter); got != tt.want {
			t.Errorf("pause %d: %v, want %v", i, got, tt.want)
		}
	}
	if b.reset(); b.nextPause(0) != minBackoff/2 {
		t.Error("it goes on after a reset")
	}
}

func TestPushSize(t *testing.T) {
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
		{s.growAfter, 1, 8}, // nine are settled
		{s.growAfter, 1, 16},
		{s.limitToOne, 3, 1},
		{s.growAfter, 1, 1},
		{s.growAfter, 1, 1},
		{s.growAfter, 1, 2},
	} {
		if tt.change(tt.n); s.max != tt.want {
			t.Errorf("row %d: at most %d scrapes, want %d", i, s.max, tt.want)
		}
	}
}
