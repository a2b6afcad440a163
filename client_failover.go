package main

// This file chooses the server of the next attempt to push, the pause after all servers have
// failed, and the maximum number of scrapes in a push. Pure: no I/O, and callers pass the time.

import "time"

const (
	minBackoff = time.Second
	maxBackoff = time.Minute

	// maxUnreadTime is how long scrapes may stay unread on one server before the client prefers the
	// next server. It is also how long the client then prefers that next server.
	maxUnreadTime = 30 * time.Minute

	maxPushScrapes = 1 << 20 // highest limit on the scrapes in a push; so high that a push normally reaches its other limits first
)

// serverFailover chooses the server of each attempt, by its index in PusherConfig.To. A round of
// attempts tries each server at most once. It ends when a server accepts or finally refuses a push,
// when all servers have failed, or with the drain.
type serverFailover struct {
	servers int
	current int // the server of this attempt
	last    int // the server that last accepted a push that names scrapes, or answered a question (a push without scrapes)

	// Rounds begin with the server preferred, which is normally 0. If scrapes stay unread on one
	// server for maxUnreadTime, preferred is the next server until that server fails, or until a
	// drain begins after preferredUntil.
	preferred      int
	preferredUntil time.Time
	// Until startUntil, rounds begin with the server start instead of preferred. start is a server
	// that answered after others failed, or the next server after a server that declined a scrape.
	// Without start, every push of a backlog would first wait for a server that hangs.
	start      int
	startUntil time.Time

	// deniedUntil has the servers that denied access lately. Until the given time, a round begins with
	// another server, if there is one. A round in which all others fail still tries such a server.
	deniedUntil map[int]time.Time

	failed     int           // number of failed attempts in this round
	denied     int           // number of servers that denied access in this round
	retryAfter time.Duration // longest Retry-After that a server of this round sent
	declined   int           // number of pushes of a single scrape that servers declined in a row
}

// beginDrain starts the rounds of one call of DrainSpool. unreadByConsumersFor is the result of
// Spool.NoReadProgressFor: how long scrapes have stayed unread on the server f.last. If that is
// longer than maxUnreadTime, a consumer may be unable to reach that server. In that case,
// beginDrain prefers the server after f.last for maxUnreadTime and returns true. It does not do so
// if there is only one server or if preferredUntil has not passed.
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

// chooseServer sets current to the server of the next attempt.
func (f *serverFailover) chooseServer(now time.Time) {
	if f.failed > 0 {
		return // inside a round, advanceAfterFailure has set current
	}
	if !now.Before(f.startUntil) {
		f.start = f.preferred
	}
	f.current = f.start
	for range f.servers {
		if !now.Before(f.deniedUntil[f.current]) {
			return
		}
		f.current = f.serverAfter(f.current)
	}
}

// avoidDenied records that the current server denied access. Rounds do not begin with it for
// deniedPause, because only a person can mend the cause.
func (f *serverFailover) avoidDenied(now time.Time) {
	if f.deniedUntil == nil {
		f.deniedUntil = map[int]time.Time{}
	}
	f.deniedUntil[f.current] = now.Add(deniedPause)
}

// forgetDenials makes rounds begin with servers that denied access, too.
func (f *serverFailover) forgetDenials() { clear(f.deniedUntil) }

// advanceAfterFailure records that the current server failed and sent this Retry-After (0 if none),
// and whether it failed because it denied access.
// If the round has a server that was not tried yet, that server becomes current and hasUntried is
// true. Otherwise the round is over. If the current server was the preferred one, server 0 is
// preferred again.
func (f *serverFailover) advanceAfterFailure(retryAfter time.Duration, denied bool) (hasUntried bool) {
	if f.failed == 0 {
		f.retryAfter, f.denied = 0, 0
	}
	if denied {
		f.denied++
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

// allDenied reports whether every server denied access in the round that is over.
func (f *serverFailover) allDenied() bool { return f.denied == f.servers }

// isLastOfRound reports whether a failure of the current server would end the round.
func (f *serverFailover) isLastOfRound() bool { return f.failed+1 == f.servers }

// stayAfterAnswer records that the current server accepted or finally refused a push, which ends
// the round. If rounds begin with another server, they begin with the current server until
// now+stayFor.
func (f *serverFailover) stayAfterAnswer(now time.Time, stayFor time.Duration) {
	if f.current != f.start {
		f.start, f.startUntil = f.current, now.Add(stayFor)
	}
	f.failed = 0
}

// advanceAfterDecline records that the server f.last declined a scrape: that server accepted the
// push but stored no sample of the scrape. If fewer declines in a row than servers are recorded,
// hasUntried is true and rounds begin with the next server until now+stayFor.
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

// reset makes the next pause the shortest one again.
func (b *roundBackoff) reset() { b.next = minBackoff }

// nextPause returns how long to wait before the next round, without jitter. The result is half of
// b.next, but at least retryAfter. Each call doubles b.next, up to maxBackoff.
func (b *roundBackoff) nextPause(retryAfter time.Duration) time.Duration {
	pause := max(retryAfter, b.next/2)
	b.next = min(2*b.next, maxBackoff)
	return pause
}

// pushScrapeLimit limits the number of scrapes in a push. The limit shrinks when a push of several
// scrapes is too large or too slow, or when a server finally refuses the push or declines scrapes
// of it. The limit stays small until as many scrapes as that push had are settled: delivered, set
// aside or declined by all servers. After that, the limit doubles with each push that settles its
// scrapes.
type pushScrapeLimit struct {
	max     int // the limit: most scrapes in a push
	careful int // scrapes that must be settled before max doubles
}

// limitToHalf lowers the limit to half after a push of this many scrapes was too large or too slow.
func (s *pushScrapeLimit) limitToHalf(pushed int) { s.max, s.careful = pushed/2, pushed }

// limitToOne lowers the limit to one, after the server refused a push of this many scrapes because
// of a scrape in it, or declined one or more of its scrapes. Pushes of a single scrape then find
// the bad ones.
func (s *pushScrapeLimit) limitToOne(pushed int) { s.max, s.careful = 1, pushed }

// growAfter records that this many scrapes are settled, which means that they are not sent again
// now. The limit may then grow.
func (s *pushScrapeLimit) growAfter(settled int) {
	if s.careful -= settled; s.careful <= 0 {
		s.max, s.careful = min(2*s.max, maxPushScrapes), 0
	}
}
