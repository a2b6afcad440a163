package main

// A replay window detects repeated gossip packets and repeated requests between servers: it accepts
// each packet counter or sequence number at most once. This file does no I/O and reads no clock. It
// must not know where the counters come from.

// A ReplayWindow records which counters of one sender's session were seen, as in RFC 6479. A
// counter is a packet counter or the sequence number of a request. The record is a circular array
// of words. When the highest counter advances into new words, the window clears them. A counter
// that is more than windowSize below the highest counter is treated as a replay. Gaps between the
// counters are normal: a sender uses one counter for all its receivers, so that each receiver sees
// only some of the counters.
type ReplayWindow struct {
	highest uint64              // highest counter seen
	seen    [windowWords]uint64 // one bit for each counter that the window covers
}

const (
	// windowWords is a power of 2, which makes a division by it cheap. windowSize counts one word
	// less, because the word of the highest counter may be only partly used.
	windowWords = 16
	windowSize  = (windowWords - 1) * 64
)

// StartAfter makes the window treat counter and all lower counters as replays.
func (w *ReplayWindow) StartAfter(counter uint64) {
	w.highest = counter
	for i := range w.seen {
		w.seen[i] = ^uint64(0)
	}
	// In the word that holds counter, set only the bits of counter and of lower counters. The bits
	// of higher counters stay 0, because these counters are new.
	w.seen[counter/64%windowWords] = 1<<(counter%64+1) - 1
}

// Accept reports whether counter is new, and records it as seen. It returns false for a counter
// that was seen before or is more than windowSize below the highest counter.
func (w *ReplayWindow) Accept(counter uint64) bool {
	if counter < w.highest && w.highest-counter > windowSize {
		return false
	}
	if last, next := w.highest/64, counter/64; next > last {
		for i := last + 1; i <= min(next, last+windowWords); i++ {
			w.seen[i%windowWords] = 0
		}
	}
	w.highest = max(w.highest, counter)
	word, bit := &w.seen[counter/64%windowWords], uint64(1)<<(counter%64)
	isNew := *word&bit == 0
	*word |= bit
	return isNew
}
