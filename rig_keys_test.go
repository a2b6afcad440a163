package main

// Helpers for tests that need keys and signed tokens.

import (
	"bytes"
	"encoding/base64"
	"testing"
	"time"
)

// testNow is the time at which the clocks of many tests start.
var testNow = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// keyLine returns a line of a key file: the base64 of a key that consists of 32 times the byte b.
func keyLine(b byte) string {
	return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32))
}

// testKeys returns the keys of a key file that has the line keyLine(b) for each b of bs.
func testKeys(t testing.TB, bs ...byte) Keys {
	t.Helper()
	var file string
	for _, b := range bs {
		file += keyLine(b) + "\n"
	}
	keys, err := ParseKeys([]byte(file))
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// signToken returns the text of token, signed with the first key of keys. It fails the test if Sign
// fails.
func signToken(t testing.TB, keys Keys, token Token) string {
	t.Helper()
	s, err := keys.Sign(token)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
