package main

// The replay window tells a packet from its repetition: it accepts a counter at most once. Pure.
// This file must not know where counters come from.

// A ReplayWindow remembers which counters of one sender and session were seen, as in RFC 6479: a
// ring of words, of which whole words are cleared when the window moves on. A counter that is
// more than windowSize below the highest one is taken for a replay. (A sender has one counter
// for all receivers, so a receiver sees only a part of its values.)
type ReplayWindow struct {
	highest uint64 // counter seen
	seen    [windowWords]uint64
}

const (
	windowWords = 16 // a power of 2; one word is always partly unused
	windowSize  = (windowWords - 1) * 64
)

// StartAfter makes the window refuse counter and all counters below it.
func (w *ReplayWindow) StartAfter(counter uint64) {
	w.highest = counter
	for i := range w.seen {
		w.seen[i] = ^uint64(0)
	}
	// In the last word, only the bits up to counter's are set.
	w.seen[counter/64%windowWords] = 1<<(counter%64+1) - 1
}

// Accept tells whether counter is new, and remembers it.
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
