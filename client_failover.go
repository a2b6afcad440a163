package main

// The state of failover: the server of the next attempt, the pause after all servers have
// failed, and the number of scrapes that a push may have. Pure: the time comes in.

import "time"

const (
	minBackoff = time.Second
	maxBackoff = time.Minute

	maxUnreadTime = 30 * time.Minute // with a server on which nobody reads, and then with the next

	maxPushScrapes = 1 << 20 // no bound beside those in bytes
)

// failover chooses the server of each attempt, by its index in PusherConfig.To. A round is a
// series of attempts, one at each server until one of them answers.
type failover struct {
	servers int // their number
	current int // of this attempt
	last    int // that answered last

	// Rounds begin with preferred. It is 0, except for maxUnreadTime after scrapes stayed unread
	// on another server.
	preferred      int
	preferredUntil time.Time
	// Until startUntil rounds begin with start instead, a server that answered when others did
	// not, because a backlog must not wait at each push for a server that hangs.
	start      int
	startUntil time.Time

	failed     int           // attempts of this round
	retryAfter time.Duration // the longest that a server of this round asked for
	declined   int           // servers in a row that declined the same scrape
}

// begin begins a series of rounds. unreadFor is the time since a consumer read anything that the
// last server holds. If that is too long, moved reports that the next server is preferred from
// now on: perhaps the consumers cannot reach the last one.
func (f *failover) begin(now time.Time, unreadFor time.Duration) (moved bool) {
	if f.servers > 1 && !now.Before(f.preferredUntil) {
		f.preferred = 0
		if moved = unreadFor > maxUnreadTime; moved {
			f.preferred, f.preferredUntil = f.next(f.last), now.Add(maxUnreadTime)
		}
	}
	f.start, f.startUntil = f.preferred, time.Time{}
	f.failed, f.declined = 0, 0
	return moved
}

func (f *failover) next(server int) int { return (server + 1) % f.servers }

// choose makes the server of the next attempt current.
func (f *failover) choose(now time.Time) {
	if f.failed > 0 {
		return // fail chose it
	}
	if !now.Before(f.startUntil) {
		f.start = f.preferred
	}
	f.current = f.start
}

// fail notes that the current server failed, and asked to wait for retryAfter. more reports that
// another server is left in this round; it is then current. Otherwise the round is over.
func (f *failover) fail(retryAfter time.Duration) (more bool) {
	if f.failed == 0 {
		f.retryAfter = 0
	}
	f.retryAfter = max(f.retryAfter, retryAfter)
	if f.current == f.preferred {
		f.preferred = 0
	}
	if f.failed++; f.failed == f.servers {
		f.failed = 0
		return false
	}
	f.current = f.next(f.current)
	return true
}

// isLastTry reports whether a failure of the current server ends the round.
func (f *failover) isLastTry() bool { return f.failed+1 == f.servers }

// succeed notes that the current server answered a push. If rounds began with another server,
// they begin with this one until now+stay.
func (f *failover) succeed(now time.Time, stay time.Duration) {
	if f.current != f.start {
		f.start, f.startUntil = f.current, now.Add(stay)
	}
	f.failed = 0
}

// decline notes that the last server declined a scrape. more reports that a server is left that
// has not declined it; rounds then begin with the next one until now+stay.
func (f *failover) decline(now time.Time, stay time.Duration) (more bool) {
	if f.declined+1 >= f.servers {
		f.declined = 0
		return false
	}
	f.declined++
	f.start, f.startUntil = f.next(f.last), now.Add(stay)
	return true
}

// roundBackoff is the pause between rounds.
type roundBackoff struct{ next time.Duration }

// reset begins anew with the shortest pause.
func (b *roundBackoff) reset() { b.next = minBackoff }

// pause returns for how long to wait, at least as long as servers asked for. The next pause is
// twice as long.
func (b *roundBackoff) pause(retryAfter time.Duration) time.Duration {
	pause := max(retryAfter, b.next/2)
	b.next = min(2*b.next, maxBackoff)
	return pause
}

// pushSize bounds the scrapes of a push. After a push of several scrapes failed because of them,
// pushes are smaller until as many scrapes are settled. Then the bound doubles with each push.
type pushSize struct {
	max     int
	careful int // scrapes to settle before the bound doubles
}

// halve is for a push of n scrapes that was too large, or too slow.
func (s *pushSize) halve(n int) { s.max, s.careful = n/2, n }

// single is for a push of n scrapes of which one was refused; pushes of one scrape find it.
func (s *pushSize) single(n int) { s.max, s.careful = 1, n }

// settled is for a push of n scrapes that need not be sent again.
func (s *pushSize) settled(n int) {
	if s.careful -= n; s.careful <= 0 {
		s.max, s.careful = min(2*s.max, maxPushScrapes), 0
	}
}
