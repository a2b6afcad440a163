package main

// Tests of excerpts of untrusted text in error messages. The other functions of sample_line.go are
// tested by the tests of SampleList and by expoCheck.

import (
	"strings"
	"testing"
)

// Excerpt returns at most 1,000 bytes without control characters. It does not change its argument
// or the memory behind the argument.
func TestExcerptBounded(t *testing.T) {
	for _, line := range []string{"a", "", "a\nb", "\xff\x00\x1b[31m", strings.Repeat("é", 1000), strings.Repeat("\x01", 1<<20)} {
		got := Excerpt([]byte(line))
		if len(got) > 1000 || strings.ContainsAny(got, "\x00\n\x1b") {
			t.Errorf("excerpt of %.20q has %d bytes and is %.40q", line, len(got), got)
		}
	}
	line := []byte(strings.Repeat("x", 300))
	Excerpt(line[:250])
	if line[200] != 'x' {
		t.Error("Excerpt wrote into the memory after its argument")
	}
}
