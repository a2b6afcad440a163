package main

// The replay window tells a packet from its repetition. A counter passes a window at most
// once. Pure.

// A ReplayWindow remembers which counters of one sender and session were seen, as RFC
// 6479 does it: a ring of words, of which advancing clears whole ones. A packet
// that comes more than windowSize counters after its time is taken for a replay;
// the counter runs on for all that a member sends, to whomever.
type ReplayWindow struct {
	top   uint64 // the highest counter seen
	words [windowWords]uint64
}

const (
	windowWords = 16 // a power of 2; one word is always partly unused
	windowSize  = (windowWords - 1) * 64
)

// StartAfter begins at count: it and all before it are refused.
func (w *ReplayWindow) StartAfter(count uint64) {
	w.top = count
	for i := range w.words {
		w.words[i] = ^uint64(0)
	}
	// Of the word of count, what is above it has not been seen.
	w.words[count/64%windowWords] = 1<<(count%64+1) - 1
}

// Accept tells whether count is new, and remembers it.
func (w *ReplayWindow) Accept(count uint64) bool {
	if count < w.top && w.top-count > windowSize {
		return false
	}
	if last, next := w.top/64, count/64; next > last {
		for i := last + 1; i <= min(next, last+windowWords); i++ {
			w.words[i%windowWords] = 0
		}
	}
	w.top = max(w.top, count)
	word, bit := &w.words[count/64%windowWords], uint64(1)<<(count%64)
	fresh := *word&bit == 0
	*word |= bit
	return fresh
}
