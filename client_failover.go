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

// serverFailover chooses the server of each attempt, by its index in PusherConfig.To. A round is a
// series of attempts, one at each server until one of them answers.
type serverFailover struct {
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

// beginDrain begins a series of rounds. unreadByConsumersFor is the time since a
// consumer read anything that the last server holds. If that is too long, nextPreferred reports
// that the next server is preferred from now on: perhaps the consumers cannot reach the last one.
func (f *serverFailover) beginDrain(now time.Time, unreadByConsumersFor time.Duration) (nextPreferred bool) {
	if f.servers > 1 && !now.Before(f.preferredUntil) {
		f.preferred = 0
		if nextPreferred = unreadByConsumersFor > maxUnreadTime; nextPreferred {
			f.preferred, f.preferredUntil = f.serverAfter(f.last), now.Add(maxUnreadTime)
		}
	}
	f.start, f.startUntil = f.preferred, time.Time{}
	f.failed, f.declined = 0, 0
	return nextPreferred
}

func (f *serverFailover) serverAfter(server int) int { return (server + 1) % f.servers }

// chooseServer makes the server of the next attempt current.
func (f *serverFailover) chooseServer(now time.Time) {
	if f.failed > 0 {
		return // advanceAfterFailure chose it
	}
	if !now.Before(f.startUntil) {
		f.start = f.preferred
	}
	f.current = f.start
}

// advanceAfterFailure notes that the current server failed, and asked to wait for retryAfter.
// hasUntried reports that another server is left in this round; it is then current. Otherwise the
// round is over.
func (f *serverFailover) advanceAfterFailure(retryAfter time.Duration) (hasUntried bool) {
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
	f.current = f.serverAfter(f.current)
	return true
}

// isLastOfRound reports whether a failure of the current server ends the round.
func (f *serverFailover) isLastOfRound() bool { return f.failed+1 == f.servers }

// stayAfterAnswer notes that the current server answered a push. If rounds began with another
// server, they begin with this one until now+stayFor.
func (f *serverFailover) stayAfterAnswer(now time.Time, stayFor time.Duration) {
	if f.current != f.start {
		f.start, f.startUntil = f.current, now.Add(stayFor)
	}
	f.failed = 0
}

// advanceAfterDecline notes that the last server declined a scrape. hasUntried reports that a server
// is left that has not declined it; rounds then begin with the next one until now+stayFor.
func (f *serverFailover) advanceAfterDecline(now time.Time, stayFor time.Duration) (hasUntried bool) {
	if f.declined+1 >= f.servers {
		f.declined = 0
		return false
	}
	f.declined++
	f.start, f.startUntil = f.serverAfter(f.last), now.Add(stayFor)
	return true
}

// roundBackoff is the pause between rounds.
type roundBackoff struct{ next time.Duration }

// reset begins anew with the shortest pause.
func (b *roundBackoff) reset() { b.next = minBackoff }

// nextPause returns for how long to wait, at least as long as servers asked for. The next pause is
// twice as long.
func (b *roundBackoff) nextPause(retryAfter time.Duration) time.Duration {
	pause := max(retryAfter, b.next/2)
	b.next = min(2*b.next, maxBackoff)
	return pause
}

// pushScrapeLimit bounds the scrapes of a push. After a push of several scrapes failed because of
// them, pushes are smaller until as many scrapes are settled. Then the bound doubles with each
// push.
type pushScrapeLimit struct {
	max     int
	careful int // scrapes to settle before the bound doubles
}

// limitToHalf is for a push of so many scrapes that was too large, or too slow.
func (s *pushScrapeLimit) limitToHalf(pushed int) { s.max, s.careful = pushed/2, pushed }

// limitToOne is for a push of so many scrapes of which one was refused; pushes of one scrape find
// it.
func (s *pushScrapeLimit) limitToOne(pushed int) { s.max, s.careful = 1, pushed }

// growAfter is for a push of so many scrapes that need not be sent again.
func (s *pushScrapeLimit) growAfter(settled int) {
	if s.careful -= settled; s.careful <= 0 {
		s.max, s.careful = min(2*s.max, maxPushScrapes), 0
	}
}
