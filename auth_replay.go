package main

// The replay window detects repeated packets: it accepts each packet counter at most once. Pure: no
// I/O and no clock. This file must not know where the counters come from.

// A ReplayWindow records which packet counters of one sender's session were seen, as in RFC 6479: a
// circular array of words, in which whole words are cleared when the window advances. A counter
// that is more than windowSize below the highest counter is treated as a replay. (A sender uses one
// counter for all receivers, so that each receiver sees only some of its values.)
type ReplayWindow struct {
	highest uint64              // highest counter seen
	seen    [windowWords]uint64 // one bit per counter
}

const (
	windowWords = 16 // a power of 2; windowSize excludes one word, because the newest word is only partly used
	windowSize  = (windowWords - 1) * 64
)

// StartAfter makes the window refuse counter and all counters below it.
func (w *ReplayWindow) StartAfter(counter uint64) {
	w.highest = counter
	for i := range w.seen {
		w.seen[i] = ^uint64(0)
	}
	// In counter's own word, set only the bits up to counter's.
	w.seen[counter/64%windowWords] = 1<<(counter%64+1) - 1
}

// Accept reports whether counter is new, and records it as seen.
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
