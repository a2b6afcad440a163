package main

import (
	"testing"
	"time"
)

// serverFailover chooses the server of each attempt. After a failure it tries the other servers in
// turn. It stays for a time with a server that answered after others failed, and then returns to
// the first server. Each row of the table continues in the state that the previous row left.
func TestFailover(t *testing.T) {
	const stay = time.Minute
	now := time.Unix(0, 0)
	f := serverFailover{servers: 3}
	f.beginDrain(now, 0)
	for i, tt := range []struct {
		do     string
		after  time.Duration // time that passes between the previous row and this row
		retry  time.Duration // Retry-After that the failing server sends; 0 if it sends none
		result bool          // wanted after a failure or a decline: whether an untried server is left; true after a success
		server int           // wanted index of the server of the next attempt
	}{
		{"fail", 0, time.Second, true, 1},
		{"succeed", 0, 0, true, 1},
		{"succeed", stay - 1, 0, true, 1},
		{"succeed", 1, 0, true, 0}, // the time to stay with server 1 is over, so the next attempt is at the first server
		{"fail", 0, 5 * time.Second, true, 1},
		{"fail", 0, 9 * time.Second, true, 2},
		{"fail", 0, 7 * time.Second, false, 0}, // all three servers have failed, so the round is over and the next round begins with server 0
		{"fail", 0, time.Second, true, 1},
		{"fail", 0, 0, true, 2},
		{"succeed", 0, 0, true, 2},
		{"fail", 0, 0, true, 0}, // server 2 answered last, so this round began with server 2; after its failure server 0 is next
		{"fail", 0, 0, true, 1},
		{"fail", 0, 0, false, 2},
		{"succeed", stay, 0, true, 0},
		{"decline", 0, 0, true, 1},
		{"decline", 0, 0, true, 2},
		{"decline", 0, 0, false, 2}, // all three servers have declined the scrape, so no server is left
		{"decline", 0, 0, true, 0},
		{"succeed", stay, 0, true, 0},
	} {
		now = now.Add(tt.after)
		got := true
		switch tt.do {
		case "fail":
			isLast := f.isLastOfRound()
			if got = f.advanceAfterFailure(tt.retry, false); got == isLast {
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

// If at least one consumer has not read the scrapes on a server for longer than maxUnreadTime,
// serverFailover prefers the next server. The preference ends with the first drain after
// maxUnreadTime, or when that server fails.
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
	begin(0, 2*maxUnreadTime, true, 0) // server 1 answered last, so the next server is 0
	f.last = 0
	begin(maxUnreadTime, 2*maxUnreadTime, true, 1)
	f.advanceAfterFailure(0, false)
	begin(time.Minute, 2*maxUnreadTime, false, 0)
	alone := serverFailover{servers: 1}
	if alone.beginDrain(now, 2*maxUnreadTime) {
		t.Error("a single server was replaced by another one")
	}
}

// nextPause returns the pause between two rounds of attempts, without jitter. The pause doubles
// with each round, up to half of maxBackoff. It is never shorter than the Retry-After that the
// servers sent.
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

// pushScrapeLimit lowers the maximum number of scrapes in a push after a push was too large or too
// slow, or had a bad scrape. The maximum then stays until as many scrapes are settled as that push
// had. From then on, it doubles with each push that settles scrapes.
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
		{s.growAfter, 1, 8}, // with this scrape, nine scrapes are settled since limitToHalf, so the maximum doubles
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
