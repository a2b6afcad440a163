package main

// How a client with a spool and a server talk about scrapes. A push names its scrapes by
// spool ID and number; the answer says which numbers the server holds and which of them
// every consumer has read. Each side tells the other which consumers it knows. All lists
// are bounded. Pure. This file must not know of files, stores or connections.

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Headers of a push. A push that names no number and has no samples is a question: the
// server stores nothing and answers as to any other push.
const (
	SpoolHeader       = "Telemeter-Spool"        // spool ID in 16 hex digits, a space, ranges of numbers
	ConsumersHeader   = "Telemeter-Consumers"    // as FormatConsumers writes them
	ClockOffsetHeader = "Telemeter-Clock-Offset" // ms by which the source's clock was behind at the newest scrape
)

const (
	// MaxRanges bounds the ranges that a server keeps of one spool: a scrape every two seconds,
	// each by a process of its own, makes 3,600 in two hours. MaxPushRanges bounds those that
	// one push names, because a server keeps them with each batch.
	MaxRanges     = 4096
	MaxPushRanges = 32
	// MaxSpoolNumber bounds the number of a scrape.
	MaxSpoolNumber = 1 << 53
	// MaxConsumers bounds the consumers that a server knows, and those that a push tells.
	MaxConsumers = 64
)

var errSpoolHeader = errors.New("malformed " + SpoolHeader)

// Range is the numbers from From to To, both included.
type Range struct{ From, To uint64 }

// Ranges is a set of numbers. Its ranges ascend, and there is a gap between each two.
type Ranges []Range

// Add returns r with the numbers from from to to. It may change r. Above MaxRanges it
// forgets the lowest numbers.
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

// Has reports whether n is in r.
func (r Ranges) Has(n uint64) bool {
	i, _ := slices.BinarySearchFunc(r, n, func(a Range, n uint64) int { return cmp.Compare(a.To, n) })
	return i < len(r) && r[i].From <= n
}

// Covers reports whether all numbers of a are in r.
func (r Ranges) Covers(a Range) bool {
	i, _ := slices.BinarySearchFunc(r, a.From, func(b Range, n uint64) int { return cmp.Compare(b.To, n) })
	return i < len(r) && r[i].From <= a.From && r[i].To >= a.To
}

// Union returns the numbers of r and of o. It may change r.
func (r Ranges) Union(o Ranges) Ranges {
	for _, a := range o {
		r = r.Add(a.From, a.To)
	}
	return r
}

// Without returns the numbers of r that are not in o, as a new set.
func (r Ranges) Without(o Ranges) (left Ranges) {
	for _, a := range r {
		from := a.From
		for _, b := range o {
			if b.To < from || b.From > a.To {
				continue
			}
			if b.From > from {
				left = append(left, Range{from, b.From - 1})
			}
			from = b.To + 1
		}
		if from <= a.To {
			left = append(left, Range{from, a.To})
		}
	}
	return left
}

// ReadRanges reads what AppendRanges wrote.
func ReadRanges(r *WireReader) (numbers Ranges) {
	n := r.Uvarint()
	if r.Bad = r.Bad || n > MaxRanges; r.Bad {
		return nil
	}
	end := uint64(0)
	for range n {
		from := end + r.Uvarint()
		to := from + r.Uvarint()
		if r.Bad = r.Bad || from <= end || to < from || to > MaxSpoolNumber; r.Bad {
			return nil
		}
		numbers = numbers.Add(from, to)
		end = to
	}
	return numbers
}

// AppendRanges appends the number of ranges, and each as its distance from the end of the
// one before and its length less one.
func AppendRanges(b []byte, numbers Ranges) []byte {
	b = binary.AppendUvarint(b, uint64(len(numbers)))
	end := uint64(0)
	for _, r := range numbers {
		b = binary.AppendUvarint(binary.AppendUvarint(b, r.From-end), r.To-r.From)
		end = r.To
	}
	return b
}

// String returns r as headers and answers have it, such as "118-121,130".
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

// ParseRanges reads what String wrote, of at most most ranges; "" is the empty set.
func ParseRanges(text string, most int) (Ranges, error) {
	if text == "" {
		return nil, nil
	}
	if strings.Count(text, ",") >= most {
		return nil, fmt.Errorf("more than %d ranges of numbers", most)
	}
	var r Ranges
	for part := range strings.SplitSeq(text, ",") {
		first, last, several := strings.Cut(part, "-")
		from, err := parseSpoolNumber(first)
		to := from
		if several && err == nil {
			to, err = parseSpoolNumber(last)
		}
		if err != nil || to < from || len(r) > 0 && from <= r[len(r)-1].To {
			return nil, fmt.Errorf("malformed range of numbers %.50q", part)
		}
		r = r.Add(from, to)
	}
	return r, nil
}

func parseSpoolNumber(text string) (uint64, error) {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil || n == 0 || n > MaxSpoolNumber {
		return 0, errSpoolHeader
	}
	return n, nil
}

// SpoolNames are the names of the scrapes in one push. ID 0 names nothing.
type SpoolNames struct {
	ID      uint64
	Numbers Ranges
}

// String returns n as SpoolHeader has it.
func (n SpoolNames) String() string { return fmt.Sprintf("%016x %s", n.ID, n.Numbers) }

// Single reports whether n names one scrape.
func (n SpoolNames) Single() bool { return len(n.Numbers) == 1 && n.Numbers[0].From == n.Numbers[0].To }

// ParseSpoolNames reads the value of a SpoolHeader; "" is the zero value.
func ParseSpoolNames(text string) (n SpoolNames, err error) {
	if text == "" {
		return n, nil
	}
	id, numbers, _ := strings.Cut(text, " ")
	if len(id) != 16 {
		return n, errSpoolHeader
	}
	if n.ID, err = strconv.ParseUint(id, 16, 64); err != nil || n.ID == 0 {
		return SpoolNames{}, errSpoolHeader
	}
	if n.Numbers, err = ParseRanges(numbers, MaxPushRanges); err != nil {
		return SpoolNames{}, fmt.Errorf("%w: %w", errSpoolHeader, err)
	}
	return n, nil
}

// ConsumerAge is a consumer by its key, and the time since its last scrape that the teller
// has heard of.
type ConsumerAge struct {
	Key uint64
	Age time.Duration
}

// FormatConsumers returns consumers as headers and answers have them: key in 16 hex digits,
// colon, age in seconds; separated by commas. Ages are rounded up, or they would never grow
// while client and servers tell each other the same.
func FormatConsumers(all []ConsumerAge) string {
	var parts []string
	for _, c := range all {
		parts = append(parts, fmt.Sprintf("%016x:%d", c.Key, int64((c.Age+time.Second-1)/time.Second)))
	}
	return strings.Join(parts, ",")
}

// ParseConsumers reads what FormatConsumers wrote, of at most MaxConsumers.
func ParseConsumers(text string) ([]ConsumerAge, error) {
	if text == "" {
		return nil, nil
	}
	if strings.Count(text, ",") >= MaxConsumers {
		return nil, fmt.Errorf("more than %d consumers", MaxConsumers)
	}
	var all []ConsumerAge
	for part := range strings.SplitSeq(text, ",") {
		k, age, _ := strings.Cut(part, ":")
		key, err := strconv.ParseUint(k, 16, 64)
		seconds, ageErr := strconv.ParseUint(age, 10, 64)
		if len(k) != 16 || err != nil || ageErr != nil || seconds > uint64(math.MaxInt64/time.Second) {
			return nil, fmt.Errorf("malformed consumer %.50q", part)
		}
		all = append(all, ConsumerAge{key, time.Duration(seconds) * time.Second})
	}
	return all, nil
}

// PushAnswer is the body of a 200 to a push.
type PushAnswer struct {
	Accepted   *int           `json:"accepted"` // nil only in what another program answers
	Duplicates int            `json:"duplicates"`
	Dropped    map[string]int `json:"dropped"`
	Skipped    map[string]int `json:"skipped,omitempty"`
	Hint       string         `json:"hint,omitempty"` // what is wrong with the times of the samples, if none is taken
	Server     string         `json:"server"`         // name of the server that answers
	Time       int64          `json:"time"`           // ms; the server's clock

	// For a push that names a spool. Held has the numbers that this server holds and not
	// every consumer has read, Read the numbers that every consumer has read. Read is nil
	// if neither the server nor the site knows a consumer: then 200 is the end. A number
	// that the push names and neither list has was not taken.
	Held      *string `json:"held,omitempty"`
	Read      *string `json:"read,omitempty"`
	Consumers string  `json:"consumers,omitempty"`
}
