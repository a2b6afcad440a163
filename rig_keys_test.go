package main

// Keys and tokens for tests.

import (
	"bytes"
	"encoding/base64"
	"testing"
	"time"
)

// testNow is the time at which the tokens of tests are issued.
var testNow = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// keyLine returns a line of a key file: a key that consists of 32 bytes b, in base64.
func keyLine(b byte) string {
	return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32))
}

// testKeys returns the keys of a file with a keyLine for each of bs.
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

// signToken returns the token, signed with the first of keys.
func signToken(t testing.TB, keys Keys, token Token) string {
	t.Helper()
	s, err := keys.Sign(token)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
