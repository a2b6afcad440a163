package main

// The state of failover is the server of the next attempt, the pause after all servers have failed,
// and the maximum number of scrapes in a push. Pure: callers pass the time.

import "time"

const (
	minBackoff = time.Second
	maxBackoff = time.Minute

	maxUnreadTime = 30 * time.Minute // how long scrapes may stay unread on one server before the next server is tried, and how long that server is then preferred

	maxPushScrapes = 1 << 20 // so high that only the byte limits bound a push
)

// serverFailover chooses the server of each attempt, by its index in PusherConfig.To. A round is a
// series of attempts, one at each server, which ends when a server answers or when all servers have
// failed.
type serverFailover struct {
	servers int // number of servers
	current int // the server of this attempt
	last    int // the server that last answered a push that names scrapes, or a question

	// Rounds begin with preferred, which is normally 0. After scrapes stayed unread on one server,
	// preferred is the next server until preferredUntil.
	preferred      int
	preferredUntil time.Time
	// Until startUntil, rounds begin with start instead of preferred. start is a server that
	// answered after others failed. Without it, every push of a backlog would first wait for a
	// server that hangs.
	start      int
	startUntil time.Time

	failed     int           // failed attempts in this round
	retryAfter time.Duration // longest Retry-After that a server of this round sent
	declined   int           // consecutive servers that declined the same scrape
}

// beginDrain starts a series of rounds. unreadByConsumersFor is how long no consumer has read any
// scrape that the last server holds. If that is longer than maxUnreadTime, the consumers may be
// unable to reach the last server. Then beginDrain prefers the next server for maxUnreadTime and
// returns true.
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

// chooseServer sets current for the next attempt.
func (f *serverFailover) chooseServer(now time.Time) {
	if f.failed > 0 {
		return // inside a round, advanceAfterFailure has set current
	}
	if !now.Before(f.startUntil) {
		f.start = f.preferred
	}
	f.current = f.start
}

// advanceAfterFailure records that the current server failed and sent this Retry-After. If the
// round has a server that was not tried yet, that server becomes current and hasUntried is true.
// Otherwise the round is over. A preferred server that fails is no longer preferred.
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

// isLastOfRound reports whether a failure of the current server would end the round.
func (f *serverFailover) isLastOfRound() bool { return f.failed+1 == f.servers }

// stayAfterAnswer records that the current server answered a push, which ends the round. If rounds
// have begun with another server, they begin with the current one until now+stayFor.
func (f *serverFailover) stayAfterAnswer(now time.Time, stayFor time.Duration) {
	if f.current != f.start {
		f.start, f.startUntil = f.current, now.Add(stayFor)
	}
	f.failed = 0
}

// advanceAfterDecline records that the last server declined a scrape. If a server remains that has
// not declined it, hasUntried is true and rounds begin with the next server until now+stayFor.
func (f *serverFailover) advanceAfterDecline(now time.Time, stayFor time.Duration) (hasUntried bool) {
	if f.declined+1 >= f.servers {
		f.declined = 0
		return false
	}
	f.declined++
	f.start, f.startUntil = f.serverAfter(f.last), now.Add(stayFor)
	return true
}

// roundBackoff computes the pauses between rounds.
type roundBackoff struct{ next time.Duration }

// reset returns to the shortest pause.
func (b *roundBackoff) reset() { b.next = minBackoff }

// nextPause returns how long to wait, which is at least retryAfter. The base of the pause doubles
// with each call, up to maxBackoff.
func (b *roundBackoff) nextPause(retryAfter time.Duration) time.Duration {
	pause := max(retryAfter, b.next/2)
	b.next = min(2*b.next, maxBackoff)
	return pause
}

// pushScrapeLimit bounds the number of scrapes in a push. When a push of several scrapes fails
// because of its scrapes, the bound shrinks. It stays small until as many scrapes as that push had
// are delivered or set aside. After that, it doubles with each push.
type pushScrapeLimit struct {
	max     int // most scrapes in a push
	careful int // scrapes that must be settled before max doubles
}

// limitToHalf lowers the bound after a push of this many scrapes was too large or too slow.
func (s *pushScrapeLimit) limitToHalf(pushed int) { s.max, s.careful = pushed/2, pushed }

// limitToOne lowers the bound to one after a push of this many scrapes was refused because of one
// of its scrapes. Pushes of a single scrape then find the bad one.
func (s *pushScrapeLimit) limitToOne(pushed int) { s.max, s.careful = 1, pushed }

// growAfter records that this many scrapes are settled, so that they need not be sent again now.
// The bound may then grow.
func (s *pushScrapeLimit) growAfter(settled int) {
	if s.careful -= settled; s.careful <= 0 {
		s.max, s.careful = min(2*s.max, maxPushScrapes), 0
	}
}
