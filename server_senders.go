package main

// State of each cluster ID that authenticated: rate limit, pushes in flight, last failure,
// token expiry, clock offset. Memory is bounded, and forgetting a sender at rest never lets it
// push faster. Time comes in with each call. This file must not know of HTTP or stores.

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	rateBurst    = 60
	maxPerSender = 4 // pushes in flight
	maxSenders   = 100_000
	senderIdle   = 24 * time.Hour

	untimelyNotice = time.Hour // between log lines of a sender whose samples' times are wrong
)

// Senders holds what is remembered. It is safe for concurrent use.
type Senders struct {
	every time.Duration

	mu   sync.Mutex // guards byID
	byID map[string]*sender
}

type sender struct {
	// tat is the theoretical arrival time of GCRA (ITU-T I.371): when the next
	// push is due if the ones before had kept the pace. In the past it says
	// nothing, so a sender at rest can be forgotten.
	tat      time.Time
	inFlight int
	stats    SenderStats
	seen     time.Time
	untimely time.Time // of the last log line on its samples' times
}

// SenderStats is what is shown of a sender.
type SenderStats struct {
	Failed   time.Time     // of its newest refused push
	Expires  int64         // s; of its client token, 0 = never
	Offset   time.Duration // by which the source's clock is behind, as the client says
	OffsetAt time.Time     // when it said so
}

// NewSenders allows one push per sender and every, in bursts of 60; 0 does not
// limit the pace.
func NewSenders(every time.Duration) *Senders {
	return &Senders{every: every, byID: map[string]*sender{}}
}

// get returns the sender of id, nil if nothing more can be remembered. s.mu is held.
func (s *Senders) get(id string, now time.Time) *sender {
	snd := s.byID[id]
	if snd == nil {
		if len(s.byID) >= maxSenders {
			maps.DeleteFunc(s.byID, func(_ string, snd *sender) bool {
				return snd.inFlight == 0 && now.Sub(snd.seen) > senderIdle && snd.tat.Before(now)
			})
		}
		if len(s.byID) >= maxSenders {
			return nil
		}
		snd = &sender{}
		s.byID[id] = snd
	}
	snd.seen = now
	return snd
}

// AcquirePush counts a push as begun, which End ends. An error says why it must not,
// and wait after what time another try makes sense.
func (s *Senders) AcquirePush(id string, now time.Time) (wait time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	snd := s.get(id, now)
	if snd == nil {
		return time.Minute, errors.New("too many cluster IDs are pushing")
	}
	tat := snd.tat
	if tat.Before(now) {
		tat = now
	}
	if wait := tat.Sub(now) - (rateBurst-1)*s.every; s.every > 0 && wait > 0 {
		return wait, fmt.Errorf("pushes faster than one every %v, after a burst of %d", s.every, rateBurst)
	}
	if snd.inFlight >= maxPerSender {
		return time.Second, fmt.Errorf("%d pushes of this cluster ID are being handled", snd.inFlight)
	}
	snd.tat = tat.Add(s.every)
	snd.inFlight++
	return 0, nil
}

// ReleasePush ends a push that Begin let begin.
func (s *Senders) ReleasePush(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.byID[id].inFlight--
}

// SetTokenExpiry notes when the client token of id expires, in Unix seconds or 0.
func (s *Senders) SetTokenExpiry(id string, expires int64, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if snd := s.get(id, now); snd != nil {
		snd.stats.Expires = expires
	}
}

// SetClockOffset notes by how much the clock of id's source is behind, as its client says.
func (s *Senders) SetClockOffset(id string, offset time.Duration, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if snd := s.get(id, now); snd != nil {
		snd.stats.Offset, snd.stats.OffsetAt = offset, now
	}
}

// SetFailed notes that a push was refused.
func (s *Senders) SetFailed(id string, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if snd := s.get(id, now); snd != nil {
		snd.stats.Failed = now
	}
}

// ShouldLogUntimely notes that a push had samples but none whose time is accepted. It reports whether
// to log that: once in untimelyNotice.
func (s *Senders) ShouldLogUntimely(id string, now time.Time) (tell bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	snd := s.get(id, now)
	if snd == nil || !snd.untimely.IsZero() && now.Sub(snd.untimely) < untimelyNotice {
		return false
	}
	snd.untimely = now
	return true
}

// ForEach calls f with what is remembered of each sender, by ID. f must not call s.
func (s *Senders) ForEach(f func(id string, stats SenderStats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(s.byID)) {
		f(id, s.byID[id].stats)
	}
}
