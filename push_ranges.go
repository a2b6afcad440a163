package main

// This file implements sets of scrape numbers, stored as ranges. Sets are kept in memory and
// written to headers and records. The size of a set is limited, because a set can come from a
// client. Pure: no I/O, no clock.

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Range is a set of consecutive numbers. From is the first and To is the last.
type Range struct{ From, To uint64 }

// Ranges is a set of scrape numbers. Its ranges are in ascending order, and at least one number is
// missing between any two of them.
type Ranges []Range

// Add returns the union of r and the Range{from, to}. It may change r. If the set then has more
// than MaxRanges ranges, the ranges with the lowest numbers are removed.
func (r Ranges) Add(from, to uint64) Ranges {
	i, _ := slices.BinarySearchFunc(r, from, func(a Range, n uint64) int { return cmp.Compare(a.To+1, n) })
	j := i
	for j < len(r) && r[j].From <= to+1 {
		from, to = min(from, r[j].From), max(to, r[j].To)
		j++
	}
	r = slices.Replace(r, i, j, Range{from, to})
	return r[max(0, len(r)-MaxRanges):]
}

// Has reports whether number is in r.
func (r Ranges) Has(number uint64) bool {
	i, _ := slices.BinarySearchFunc(r, number, func(a Range, n uint64) int { return cmp.Compare(a.To, n) })
	return i < len(r) && r[i].From <= number
}

// EndOfRangeWith returns the last number of the range that contains number, or 0 if number is not in
// r.
func (r Ranges) EndOfRangeWith(number uint64) uint64 {
	i, _ := slices.BinarySearchFunc(r, number, func(a Range, n uint64) int { return cmp.Compare(a.To, n) })
	if i == len(r) || r[i].From > number {
		return 0
	}
	return r[i].To
}

// AddAll returns the union of r and o, limited to MaxRanges ranges as in Add. It may change r.
func (r Ranges) AddAll(o Ranges) Ranges {
	for _, a := range o {
		r = r.Add(a.From, a.To)
	}
	return r
}

// Without returns the numbers of r that are not in o, as a new set.
func (r Ranges) Without(o Ranges) (left Ranges) {
	for _, a := range r {
		for len(o) > 0 && o[0].To < a.From {
			o = o[1:]
		}
		from := a.From
		for len(o) > 0 && o[0].From <= a.To {
			if o[0].From > from {
				left = append(left, Range{from, o[0].From - 1})
			}
			if from = o[0].To + 1; from > a.To {
				break // o[0] may have numbers of the next range of r, too
			}
			o = o[1:]
		}
		if from <= a.To {
			left = append(left, Range{from, a.To})
		}
	}
	return left
}

// ReadRanges reads a set that AppendRanges wrote. If the set is malformed, the reader fails and the
// result is nil.
func ReadRanges(r *WireReader) (numbers Ranges) {
	n, end := r.Count(2), uint64(0)
	if r.Require(n <= MaxRanges); r.Err() != nil {
		return nil
	}
	numbers = make(Ranges, 0, n) // because a slice that grows step by step would need four times as much
	for range n {
		from := end + r.Uvarint(MaxScrapeNumber)
		to := from + r.Uvarint(MaxScrapeNumber)
		if r.Require(from > end && to <= MaxScrapeNumber); r.Err() != nil {
			return nil
		}
		numbers = numbers.Add(from, to)
		end = to
	}
	return numbers
}

// AppendRanges appends the number of ranges, and then two uvarints for each range. The first
// uvarint is From minus the To of the previous range, or From itself for the first range. The
// second uvarint is To minus From.
func AppendRanges(b []byte, numbers Ranges) []byte {
	b = binary.AppendUvarint(b, uint64(len(numbers)))
	end := uint64(0)
	for _, r := range numbers {
		b = binary.AppendUvarint(binary.AppendUvarint(b, r.From-end), r.To-r.From)
		end = r.To
	}
	return b
}

// String returns r in the format of headers and answers, such as "118-121,130".
func (r Ranges) String() string {
	var b []byte
	for i, a := range r {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, a.From, 10)
		if a.To > a.From {
			b = strconv.AppendUint(append(b, '-'), a.To, 10)
		}
	}
	return string(b)
}

// ParseRanges parses a set in the format of String. It returns an error for more than maxRanges
// ranges. The text "" is the empty set.
func ParseRanges(text string, maxRanges int) (Ranges, error) {
	if text == "" {
		return nil, nil
	}
	if strings.Count(text, ",") >= maxRanges {
		return nil, fmt.Errorf("more than %d ranges of numbers", maxRanges)
	}
	var r Ranges
	for part := range strings.SplitSeq(text, ",") {
		first, last, several := strings.Cut(part, "-")
		from, ok := parseScrapeNumber(first)
		to := from
		if several && ok {
			to, ok = parseScrapeNumber(last)
		}
		if !ok || to < from || len(r) > 0 && from <= r[len(r)-1].To {
			return nil, fmt.Errorf("malformed range of numbers %.50q", part)
		}
		r = r.Add(from, to)
	}
	return r, nil
}

func parseScrapeNumber(text string) (n uint64, ok bool) {
	n, err := strconv.ParseUint(text, 10, 64)
	return n, err == nil && n > 0 && n <= MaxScrapeNumber
}
