package main

// Tests of key files, subkeys, cluster IDs and small secret files. They also check that no error
// and no printed value contains a secret.

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// ParseKeys accepts 1 to 16 different keys. Its errors name the line, if one line is at fault, and
// never quote the file.
func TestParseKeys(t *testing.T) {
	var many string
	for n := range byte(maxKeys + 1) {
		many += keyLine(n) + "\n"
	}
	nonCanonical := strings.Replace(keyLine(1), "E=", "F=", 1)
	for _, c := range []struct {
		name, file string
		keys       int
		err        string
	}{
		{"one key", keyLine(1), 1, ""},
		{"comments, blank lines, CRLF and spaces", "# a\r\n\r\n  " + keyLine(1) + " \r\n\t# b\n" + keyLine(2) + "\r\n", 2, ""},
		{"sixteen keys", many[:maxKeys*45], maxKeys, ""},
		{"seventeen keys", many, 0, "line 17: more than 16 keys"},
		{"empty file", "", 0, "no key"},
		{"only comments", "# " + keyLine(1) + "\n\n", 0, "no key"},
		{"short key", "\n" + keyLine(1)[:40], 0, "line 2: not a key"},
		{"key of 33 bytes", base64.StdEncoding.EncodeToString(make([]byte, 33)), 0, "line 1: not a key"},
		{"key without padding", strings.TrimRight(keyLine(1), "="), 0, "line 1: not a key"},
		{"key with stray trailing bits", nonCanonical, 0, "line 1: not a key"},
		{"base64url alphabet", strings.Repeat("_", 42) + "8=", 0, "line 1: not a key"},
		{"comment behind a key", keyLine(1) + " # mine", 0, "line 1: not a key"},
		{"two keys on a line", keyLine(1) + keyLine(2), 0, "line 1: not a key"},
		{"hex instead of base64", strings.Repeat("ab", 32), 0, "line 1: not a key"},
		{"duplicate key", keyLine(1) + "\n" + keyLine(2) + "\n" + keyLine(1), 0, "line 3: duplicate of a key"},
		{"too large", keyLine(1) + strings.Repeat("\n", MaxKeyFile), 0, "larger than 65536"},
	} {
		ks, err := ParseKeys([]byte(c.file))
		switch {
		case c.err == "" && (err != nil || len(ks.IDs()) != c.keys):
			t.Errorf("%s: got %d keys and error %v, want %d keys", c.name, len(ks.IDs()), err, c.keys)
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("%s: got error %v, want an error with %q", c.name, err, c.err)
		}
		for line := range strings.FieldsSeq(c.file) {
			if err != nil && len(line) > 8 && strings.Contains(err.Error(), line[:8]) {
				t.Errorf("%s: the error quotes the file: %v", c.name, err)
			}
		}
	}
}

// Key IDs and token subkeys are HKDF-SHA256 (RFC 5869) of a key and a label. This derivation must
// never change, because existing tokens contain key IDs and are signed with token subkeys. The test
// computes HKDF without the package crypto/hkdf.
func TestKeyDerivation(t *testing.T) {
	secret := bytes.Repeat([]byte{7}, keySize)
	ks := testKeys(t, 7, 8)
	if got, want := ks.IDs()[0], fmt.Sprintf("%x", hkdfByHand(secret, "telemeter key id v1")[:4]); got != want {
		t.Errorf("key ID: got %s, want %s", got, want)
	}
	if !bytes.Equal(ks.keys[0].mac("tm1.x"), hmacSHA256(hkdfByHand(secret, "telemeter token v1"), "tm1.x")) {
		t.Error("the token subkey is not HKDF-SHA256 of the key and the token label")
	}
	if ids := ks.IDs(); ids[0] == ids[1] {
		t.Errorf("two keys have the same ID %s", ids[0])
	}
}

func hmacSHA256(key []byte, msg string) []byte {
	h := hmac.New(sha256.New, key)
	io.WriteString(h, msg)
	return h.Sum(nil)
}

// hkdfByHand returns the first 32 bytes of HKDF-SHA256 (RFC 5869) of secret, without a salt and
// with label as the info parameter.
func hkdfByHand(secret []byte, label string) []byte {
	return hmacSHA256(hmacSHA256(make([]byte, 32), string(secret)), label+"\x01")
}

// fmt prints neither a secret key nor its token subkey with the usual verbs, even if the Keys value
// is in a private field of another value. The test looks for the first four bytes of each.
func TestKeysPrintNoSecret(t *testing.T) {
	secret := bytes.Repeat([]byte{7}, keySize)
	ks := testKeys(t, 7, 8)
	for _, v := range []any{ks, &ks, struct{ ks Keys }{ks}, []any{ks}} {
		for _, verb := range []string{"v", "+v", "#v", "s", "q", "x", "X", "d", "c", "t", "p"} {
			text := fmt.Sprintf("%"+verb, v)
			for _, b := range [][]byte{hkdfByHand(secret, "telemeter token v1"), secret} {
				if strings.Contains(text, string(b[:4])) || strings.Contains(text, strings.Trim(fmt.Sprintf("%"+verb, b[:4]), "[]")) {
					t.Errorf("%%%s of %T shows a secret: %s", verb, v, text)
				}
			}
		}
	}
}

// Subkeys returns a 32-byte subkey for each key. All subkeys of different keys or different
// purposes differ.
func TestSubkeys(t *testing.T) {
	keys := testKeys(t, 1, 2)
	a, err := keys.Subkeys("a")
	b, err2 := keys.Subkeys("b")
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	all := append(a, b...)
	for i, k := range all {
		if len(k) != 32 || slices.IndexFunc(all, func(o []byte) bool { return bytes.Equal(k, o) }) != i {
			t.Errorf("subkey %d has %d bytes, want 32, or it equals another subkey", i, len(k))
		}
	}
}

// CheckClusterID accepts 1 to 128 of the allowed characters, and its error states that rule.
func TestClusterID(t *testing.T) {
	for id, ok := range map[string]bool{
		"a": true, "0": true, "Site-7.example:1_x@y": true, strings.Repeat("a", 128): true,
		"": false, strings.Repeat("a", 129): false, "-a": false, ".a": false, "_a": false, "a b": false, "a/b": false,
		"a\n": false, "a#": false, "ä": false, "a\x00": false, "aé": false,
	} {
		err := CheckClusterID(id)
		if (err == nil) != ok {
			t.Errorf("cluster ID %q: got error %v, want accepted: %v", id, err, ok)
		}
		if err != nil && !strings.Contains(err.Error(), "1 to 128 of") {
			t.Errorf("cluster ID %q: the error does not state the rule: %v", id, err)
		}
	}
}

// ReadSecret removes white space only at the end of the file, limits the size, and names the path
// in its errors.
func TestReadSecret(t *testing.T) {
	for _, c := range []struct {
		name, content, want, err string
	}{
		{"one word", "s3cret", "s3cret", ""},
		{"white space behind the secret", "s3cret \t\r\n\n", "s3cret", ""},
		{"white space before and inside the secret", " a\nb\n", " a\nb", ""},
		{"longest secret and CRLF", strings.Repeat("x", 16) + "\r\n", strings.Repeat("x", 16), ""},
		{"empty file", "", "", "is empty"},
		{"only white space", " \n", "", "is empty"},
		{"secret too long", strings.Repeat("x", 17), "", "larger than 16 bytes"},
		{"text behind much white space", "x" + strings.Repeat(" ", 20) + "y", "", "larger than 16 bytes"},
	} {
		path := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadSecret(path, 16)
		if string(got) != c.want || (err == nil) != (c.err == "") {
			t.Errorf("%s: got %q and error %v, want %q", c.name, got, err, c.want)
		}
		if err != nil && (!strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.err) || strings.Contains(err.Error(), "xx")) {
			t.Errorf("%s: got error %v, want the path and %q in it, and no part of the secret", c.name, err, c.err)
		}
	}
	for _, path := range []string{t.TempDir(), filepath.Join(t.TempDir(), "none")} {
		if _, err := ReadSecret(path, 16); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("directory or missing file %s: got error %v, want an error with the path", path, err)
		}
	}
}

// EqualSecret reports whether two strings are exactly equal.
func TestEqualSecret(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{{"", "", true}, {"a", "a", true}, {"a", "b", false}, {"a", "aa", false}, {"", "a", false}, {"A", "a", false}} {
		if EqualSecret(c.a, c.b) != c.want || EqualSecret(c.b, c.a) != c.want {
			t.Errorf("EqualSecret(%q, %q) is not %v in both orders", c.a, c.b, c.want)
		}
	}
}

// ParseBearer returns the credential of a well-formed header, and false for every other header.
func TestBearer(t *testing.T) {
	for header, want := range map[string]string{
		"Bearer abc": "abc", "bearer abc": "abc", "BEARER   a.b-c_d~e+f/g==": "a.b-c_d~e+f/g==", "Bearer abc ": "abc", "Bearer p!w": "p!w",
		"": "", "Bearer": "", "Bearer ": "", "abc": "", "Basic abc": "", "Bearerabc": "", "Bearer\tabc": "", " Bearer abc": "",
		"Bearer a b": "", "Bearer a\tb": "", "Bearer a\x00": "", "Bearer ä": "", "Bearer, abc": "",
	} {
		got, ok := ParseBearer(header)
		if got != want || ok != (want != "") {
			t.Errorf("header %q: got %q, %v; want %q", header, got, ok, want)
		}
	}
}

// NonCommentLines skips blank lines and comments, and trims the other lines. The line numbers count
// the skipped lines too.
func TestNonCommentLines(t *testing.T) {
	file := "\n# all\n up \n\t{job=\"#\"}\r\n  # no\nlast{a=\"b\"}"
	got := maps.Collect(NonCommentLines([]byte(file)))
	if want := map[int]string{3: "up", 4: `{job="#"}`, 6: `last{a="b"}`}; !maps.Equal(got, want) {
		t.Errorf("got lines %v, want %v", got, want)
	}
}

// A key file that ParseKeys accepts has 1 to 16 keys. If a new key fits as the first line, where
// RotateKey adds it, the IDs of the other keys stay unchanged and a token that was signed before
// stays valid.
func FuzzKeys(f *testing.F) {
	f.Add([]byte(keyLine(1)))
	f.Add([]byte("# a\r\n" + keyLine(1) + "\n\n" + keyLine(2) + "\n"))
	f.Add([]byte(keyLine(1) + "\n" + keyLine(1)))
	f.Add([]byte("AAAA\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		ks, err := ParseKeys(data)
		if err != nil {
			if len(ks.keys) != 0 {
				t.Error("ParseKeys returns keys together with an error")
			}
			return
		}
		if n := len(ks.IDs()); n < 1 || n > maxKeys {
			t.Fatalf("got %d keys, want 1 to %d", n, maxKeys)
		}
		more, err := ParseKeys(append(generateKeyLine(), data...))
		if err == nil && !slices.Equal(more.IDs()[1:], ks.IDs()) {
			t.Errorf("a new first key changed the key IDs %v to %v", ks.IDs(), more.IDs())
		}
		if s := signToken(t, ks, authToken()); err == nil {
			if _, err := more.Verify(s, testNow); err != nil {
				t.Errorf("an old token does not verify after a new key was added: %v", err)
			}
		}
	})
}
