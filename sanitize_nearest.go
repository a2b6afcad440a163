package main

// This file finds the name that a misspelled word stands for, so that a warning about a flag can say
// which label, metric or flag was probably meant. Pure: no I/O.

// NearestName returns the name in names that word is most likely a misspelling of, or "" if no name
// is near. A name is near if at most a third of the characters of word must be inserted, removed,
// replaced or swapped with their neighbour.
func NearestName(word string, names []string) string {
	nearest, least := "", len(word)/3+1
	for _, name := range names {
		if max(len(name)-len(word), len(word)-len(name)) < least {
			if d := editDistance(word, name); d < least {
				nearest, least = name, d
			}
		}
	}
	return nearest
}

// editDistance returns the number of insertions, removals, replacements and swaps of neighbouring
// bytes that turn a into b.
func editDistance(a, b string) int {
	var older []int // distances from the prefix of a that is two bytes shorter, to each prefix of b
	last := make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row := make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = min(last[j+1]+1, row[j]+1, last[j]+cost)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], older[j-1]+1)
			}
		}
		older, last = last, row
	}
	return last[len(b)]
}
