package main

import (
	"bytes"
	"encoding/json"
	oldrand "math/rand"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/quick"
	"time"
)

// AppendJSON writes what json.Marshal writes, for random answers and for texts that need escaping.
func TestPushAnswerJSON(t *testing.T) {
	same := func(a PushAnswer) {
		t.Helper()
		want, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		if got := a.AppendJSON([]byte("x")); !bytes.Equal(got[1:], want) || got[0] != 'x' {
			t.Errorf("got\n%s, want\n%s", got, want)
		}
	}
	same(PushAnswer{Dropped: map[string]int{}})
	accepted, held, read := 230, "118-121,130", ""
	same(PushAnswer{Accepted: &accepted, Dropped: map[string]int{}, Skipped: map[string]int{}, Server: "s1", Time: 1, Held: &held, Read: &read, Consumers: "0000000000000001:7"})
	same(PushAnswer{Dropped: map[string]int{"b": 1, "a": 2}, Skipped: map[string]int{"<": -1}})
	for c := range rune(0x100) {
		same(PushAnswer{Dropped: map[string]int{}, Server: "a" + string(c) + "b", Hint: "a" + string([]byte{byte(c)})})
	}
	same(PushAnswer{Dropped: map[string]int{}, Server: "\u2028"})
	for seed := range testSeeds(t, 300) {
		a, ok := quick.Value(reflect.TypeFor[PushAnswer](), oldrand.New(oldrand.NewSource(int64(seed))))
		if !ok {
			t.Fatalf("seed %d: no random answer", seed)
		}
		same(a.Interface().(PushAnswer))
	}
}

// Parsing a formatted header of a push gives the same values. Malformed values are refused, and so
// are lists that are too long.
func TestPushHeaders(t *testing.T) {
	long := strings.Repeat("7,", MaxPushRanges) + "9"
	for _, bad := range []string{
		"x", "0123456789abcdef0 1", "0123456789abcdeg 1", "0000000000000000 1", "0123456789abcdef 0", "0123456789abcdef 2-1", "0123456789abcdef 1,1",
		"0123456789abcdef 3,2", "0123456789abcdef 1-", "0123456789abcdef -1", "0123456789abcdef 1,,3", "0123456789abcdef 9007199254740993",
		"0123456789abcdef " + long, "0123456789abcdef  1",
	} {
		if n, err := ParseScrapeNames(bad); err == nil {
			t.Errorf("the malformed scrape names %q were parsed as %v", bad, n)
		}
	}
	names := ScrapeNames{SpoolID: 0x1f, Numbers: Ranges{{118, 121}, {130, 130}}}
	if got := names.String(); got != "000000000000001f 118-121,130" {
		t.Errorf("the scrape names were formatted as %q, want %q", got, "000000000000001f 118-121,130")
	}
	if got, err := ParseScrapeNames(names.String()); err != nil || got.SpoolID != names.SpoolID || !slices.Equal(got.Numbers, names.Numbers) {
		t.Errorf("the scrape names were parsed as %v, with the error %v; want %v", got, err, names)
	}
	if got, err := ParseScrapeNames("000000000000001f "); err != nil || got.SpoolID != 0x1f || len(got.Numbers) != 0 {
		t.Errorf("a spool ID without numbers was parsed as %v, with the error %v", got, err)
	}
	consumers := []ConsumerAge{{1, 0}, {1 << 63, 90 * time.Minute}}
	if got, err := ParseConsumers(FormatConsumers(consumers)); err != nil || !slices.Equal(got, consumers) {
		t.Errorf("the consumers were parsed as %v, with the error %v; want %v", got, err, consumers)
	}
	many := strings.TrimSuffix(strings.Repeat("0123456789abcdef:1,", MaxConsumers+1), ",")
	for _, bad := range []string{"1:1", "0123456789abcdef", "0123456789abcdef:-1", "0123456789abcdef:99999999999999999999", many} {
		if got, err := ParseConsumers(bad); err == nil {
			t.Errorf("the malformed consumers %q were parsed as %v", bad, got)
		}
	}
}

// If a header value can be parsed, formatting the result and parsing it again gives the same
// result.
func FuzzPushHeaders(f *testing.F) {
	f.Add("0123456789abcdef 118-121,130", "0123456789abcdef:7")
	f.Fuzz(func(t *testing.T, spool, consumers string) {
		if n, err := ParseScrapeNames(spool); err == nil && n.SpoolID != 0 {
			if again, err := ParseScrapeNames(n.String()); err != nil || !slices.Equal(again.Numbers, n.Numbers) {
				t.Fatalf("header %q: %v was parsed as %v after formatting, with the error %v", spool, n, again, err)
			}
		}
		if all, err := ParseConsumers(consumers); err == nil {
			if again, err := ParseConsumers(FormatConsumers(all)); err != nil || !slices.Equal(again, all) {
				t.Fatalf("header %q: %v was parsed as %v after formatting, with the error %v", consumers, all, again, err)
			}
		}
	})
}
