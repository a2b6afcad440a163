package main

// The headers and the answer by which a client with a spool and a server speak of scrapes. A push
// names its scrapes by spool ID and number; the answer says which numbers the server holds and
// which every consumer has read. Each side reports the consumers that it knows. All lists are
// bounded. Pure.

import (
	"errors"
	"fmt"
	"math"
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
	// MaxScrapeNumber bounds the number of a scrape.
	MaxScrapeNumber = 1 << 53
	// MaxConsumers bounds the consumers that a server knows, those that a push or an answer lists,
	// and those in the files of servers and clients, which refuse more.
	MaxConsumers = 64
)

// ScrapeNames are the names of the scrapes in one push. ID 0 names nothing.
type ScrapeNames struct {
	SpoolID uint64
	Numbers Ranges
}

// String returns n as SpoolHeader has it.
func (n ScrapeNames) String() string { return fmt.Sprintf("%016x %s", n.SpoolID, n.Numbers) }

// IsSingle reports whether n names one scrape.
func (n ScrapeNames) IsSingle() bool {
	return len(n.Numbers) == 1 && n.Numbers[0].From == n.Numbers[0].To
}

// ParseScrapeNames reads the value of a SpoolHeader; "" is the zero value.
func ParseScrapeNames(text string) (n ScrapeNames, err error) {
	if text == "" {
		return n, nil
	}
	malformed := errors.New("malformed " + SpoolHeader)
	id, numbers, _ := strings.Cut(text, " ")
	if n.SpoolID, err = strconv.ParseUint(id, 16, 64); err != nil || n.SpoolID == 0 || len(id) != 16 {
		return ScrapeNames{}, malformed
	}
	if n.Numbers, err = ParseRanges(numbers, MaxPushRanges); err != nil {
		return ScrapeNames{}, fmt.Errorf("%w: %w", malformed, err)
	}
	return n, nil
}

// ConsumerAge is a consumer by its key, and the time since its newest scrape that the sender
// knows of.
type ConsumerAge struct {
	Key uint64
	Age time.Duration
}

// FormatConsumers returns consumers as headers and answers have them: key in 16 hex digits,
// colon, age in seconds; separated by commas. Ages are rounded up, or they would never grow
// while client and servers report to each other.
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
