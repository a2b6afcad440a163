package main

// Tests of tokens: equal tokens have the same text, a token is valid only if a known key signed it,
// and no error quotes the payload or the signature of a token.

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
)

// authToken returns a client token with every optional field set, except Expires and SparePin.
func authToken() Token {
	return Token{
		Kind: KindClient, ClusterID: "site-7", URLs: []string{"https://hub.example:9003", "https://b/?a=1&b=<2>"},
		Pin: pinPrefix + keyLine(9), Labels: map[string]string{"region": "süd", "a": "\u2028"},
		Issued: testNow.Unix(), ID: strings.Repeat("0f", 16),
	}
}

// authForge signs any payload, even an invalid one, with the first key of ks, and returns the text
// of a token. Only a holder of that key can make such a text.
func authForge(ks Keys, payload string) string {
	signed := tokenPrefix + base64.RawURLEncoding.EncodeToString([]byte(payload))
	return signed + "." + base64.RawURLEncoding.EncodeToString(ks.keys[0].mac(signed))
}

// Verify and ParseUnverifiedToken return the token that was signed. Signing the returned token
// again gives the same text.
func TestTokenRoundTrip(t *testing.T) {
	ks := testKeys(t, 1)
	for name, edit := range map[string]func(*Token){
		"client token":         func(*Token) {},
		"upload token":         func(k *Token) { k.Kind = KindUpload },
		"spare pin":            func(k *Token) { k.SparePin = pinPrefix + keyLine(7) },
		"no optional field":    func(k *Token) { k.URLs, k.Pin, k.Labels, k.Issued = nil, "", nil, 0 },
		"issued in the future": func(k *Token) { k.Issued = testNow.AddDate(30, 0, 0).Unix() },
		"not yet expired":      func(k *Token) { k.Expires = testNow.Unix() + 1 },
		"Sign sets the key ID": func(k *Token) { k.KeyID = "whatever" },
	} {
		want := authToken()
		edit(&want)
		s := signToken(t, ks, want)
		want.KeyID = ks.IDs()[0]
		got, err := ks.Verify(" \t"+s+"\r\n", testNow)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: Verify = %+v, %v; want %+v", name, got, err, want)
		}
		if got, err = ParseUnverifiedToken(s + "\n"); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: ParseUnverifiedToken = %+v, %v; want %+v", name, got, err, want)
		}
		if again := signToken(t, ks, got); again != s {
			t.Errorf("%s: signing the token twice gives two texts:\n%s\n%s", name, s, again)
		}
		if again := signToken(t, testKeys(t, 2), got); again == s {
			t.Errorf("%s: two keys give the same text", name)
		}
	}
}

// Sign refuses a token with an invalid field, a token that is too long, and Keys without a key.
func TestSignRefuses(t *testing.T) {
	ks := testKeys(t, 1)
	for name, c := range map[string]struct {
		ks   Keys
		edit func(*Token)
		err  string
	}{
		"no key":                 {Keys{}, func(*Token) {}, "no key"},
		"no kind":                {ks, func(k *Token) { k.Kind = "" }, "unknown kind"},
		"unknown kind":           {ks, func(k *Token) { k.Kind = "admin" }, "unknown kind"},
		"no cluster ID":          {ks, func(k *Token) { k.ClusterID = "" }, "cluster ID"},
		"bad cluster ID":         {ks, func(k *Token) { k.ClusterID = "a/b" }, "cluster ID"},
		"no token ID":            {ks, func(k *Token) { k.ID = "" }, "token ID"},
		"token ID in upper case": {ks, func(k *Token) { k.ID = strings.ToUpper(k.ID) }, "token ID"},
		"short token ID":         {ks, func(k *Token) { k.ID = k.ID[2:] }, "token ID"},
		"bad pin":                {ks, func(k *Token) { k.Pin = "sha256/x" }, "not a pin"},
		"bad spare pin":          {ks, func(k *Token) { k.SparePin = "sha256/x" }, "not a pin"},
		"too long":               {ks, func(k *Token) { k.Labels = map[string]string{"a": strings.Repeat("x", MaxToken)} }, "longer than 8192"},
	} {
		tok := authToken()
		c.edit(&tok)
		if s, err := c.ks.Sign(tok); s != "" || err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: Sign = %q, %v; want an error with %q", name, s, err, c.err)
		}
	}
}

// Verify accepts the longest token that Sign makes. The text of that token has almost MaxToken
// bytes.
func TestLongestToken(t *testing.T) {
	ks := testKeys(t, 1)
	tok := authToken()
	for n := MaxToken; ; n-- {
		tok.Labels = map[string]string{"a": strings.Repeat("x", n)}
		s, err := ks.Sign(tok)
		if err != nil {
			continue
		}
		if _, err := ks.Verify(s+"\n", testNow); err != nil || len(s) < MaxToken-2 {
			t.Errorf("longest token: %d bytes, Verify returns %v", len(s), err)
		}
		return
	}
}

// A verifyCase is a text that Verify refuses with the error want. parses is true if
// ParseUnverifiedToken accepts the text nevertheless, because it checks neither the signature nor
// the expiry.
type verifyCase struct {
	name, text string
	want       error
	parses     bool
}

// check fails the test unless Verify and ParseUnverifiedToken treat c.text as c states. It also
// fails the test if an error of theirs contains one of the texts in secrets.
func (c verifyCase) check(t *testing.T, ks Keys, secrets []string) {
	t.Helper()
	got, err := ks.Verify(c.text, testNow)
	if !errors.Is(err, c.want) || !reflect.DeepEqual(got, Token{}) {
		t.Errorf("%s: Verify = %+v, %v; want error %v", c.name, got, err, c.want)
	}
	_, parseErr := ParseUnverifiedToken(c.text)
	if (parseErr == nil) != c.parses || parseErr != nil && !errors.Is(parseErr, ErrTokenMalformed) {
		t.Errorf("%s: ParseUnverifiedToken returns %v; want parsed: %v", c.name, parseErr, c.parses)
	}
	for _, err := range []error{err, parseErr} {
		for _, secret := range secrets {
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("%s: the error quotes %q of the token: %v", c.name, secret, err)
			}
		}
	}
}

// Verify refuses a malformed text, a signature of another key or of another payload, a signed
// payload with an invalid field, and an expired token. No error quotes the payload or the
// signature.
func TestVerifyRefuses(t *testing.T) {
	ks := testKeys(t, 1, 2)
	good := signToken(t, ks, authToken())
	payload, signature := strings.Split(good, ".")[1], strings.Split(good, ".")[2]
	edited := func(from, to string) string { return editedToken(t, ks, payload, from, to) }
	expiring := authToken()
	expiring.Expires = testNow.Unix()
	for _, c := range []verifyCase{
		{"empty text", "", ErrTokenMalformed, false},
		{"only white space", " \n", ErrTokenMalformed, false},
		{"one part", "tm1.", ErrTokenMalformed, false},
		{"two parts", "tm1." + payload, ErrTokenMalformed, false},
		{"four parts", good + ".x", ErrTokenMalformed, false},
		{"empty parts", "tm1..", ErrTokenMalformed, false},
		{"no signature", "tm1." + payload + ".", ErrTokenMalformed, false},
		{"short signature", good[:len(good)-4], ErrTokenMalformed, false},
		{"long signature", good + "AAAA", ErrTokenMalformed, false},
		{"another version", "tm2" + good[3:], ErrTokenMalformed, false},
		{"prefix in upper case", "TM1" + good[3:], ErrTokenMalformed, false},
		{"JWT with alg none", "eyJhbGciOiJub25lIn0." + payload + ".", ErrTokenMalformed, false},
		{"base64 padding", good + "=", ErrTokenMalformed, false},
		{"standard base64 alphabet", "tm1.++++." + signature, ErrTokenMalformed, false},
		{"line end in the payload", "tm1.\n" + payload + "." + signature, ErrTokenMalformed, false},
		{"line end in the signature", good[:len(good)-5] + "\r\n" + good[len(good)-5:], ErrTokenMalformed, false},
		{"space inside the token", "tm1. " + payload + "." + signature, ErrTokenMalformed, false},
		{"too long", "tm1." + strings.Repeat("A", MaxToken) + "." + signature, ErrTokenMalformed, false},
		{"unknown key", signToken(t, testKeys(t, 3), authToken()), ErrTokenForged, true},
		{"signature of another token", "tm1." + strings.Split(edited("site-7", "site-8"), ".")[1] + "." + signature, ErrTokenForged, true},
		{"garbage, not signed", "tm1.AAAA." + signature, ErrTokenForged, false},
		{"garbage, signed", authForge(ks, "\x00"), ErrTokenMalformed, false},
		{"JSON null, signed", authForge(ks, "null"), ErrTokenMalformed, false},
		{"empty payload, signed", authForge(ks, ""), ErrTokenMalformed, false},
		{"two JSON values, signed", authForge(ks, "{}{}"), ErrTokenMalformed, false},
		{"wrong JSON type, signed", edited(`"site-7"`, `["site-7"]`), ErrTokenMalformed, false},
		{"unknown kind, signed", edited(`"client"`, `"admin"`), ErrTokenMalformed, false},
		{"kind in another case, signed", edited(`"client"`, `"Client"`), ErrTokenMalformed, false},
		{"bad cluster ID, signed", edited("site-7", "../site"), ErrTokenMalformed, false},
		{"bad token ID, signed", edited("0f0f", "0F0F"), ErrTokenMalformed, false},
		{"ID of another known key, signed", edited(ks.IDs()[0], ks.IDs()[1]), ErrTokenMalformed, true},
		{"expires this second", signToken(t, ks, expiring), ErrTokenExpired, true},
		{"negative expiry, signed", edited(`"issued"`, `"expires":-1,"issued"`), ErrTokenExpired, true},
	} {
		c.check(t, ks, []string{payload[:12], signature[:8], ks.IDs()[0], ks.IDs()[1], "site-7"})
	}
	if _, err := (Keys{}).Verify(good, testNow); !errors.Is(err, ErrTokenForged) {
		t.Errorf("Verify without any key: got error %v, want %v", err, ErrTokenForged)
	}
}

// editedToken replaces the first occurrence of from by to in the JSON of payload, which is in
// base64url. It returns a token with the result as payload, signed with the first key of ks.
func editedToken(t *testing.T, ks Keys, payload, from, to string) string {
	t.Helper()
	text, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil || !bytes.Contains(text, []byte(from)) {
		t.Fatalf("payload %s does not contain %s (%v)", text, from, err)
	}
	return authForge(ks, strings.Replace(string(text), from, to, 1))
}

// The error for a token of another version names that version and the version that this program
// knows. A token with an unknown JSON field, as a later version may add it, is valid.
func TestTokenOfAnotherVersion(t *testing.T) {
	ks := testKeys(t, 1, 2)
	good := signToken(t, ks, authToken())
	_, err := ks.Verify("tm2"+good[3:], testNow)
	if want := "it has version 2; this program knows version 1"; err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("token of version 2: got error %v, want one that ends with %q", err, want)
	}
	later := editedToken(t, ks, strings.Split(good, ".")[1], `"kind"`, `"later":{"x":[1]},"kind"`)
	if _, err := ks.Verify(later, testNow); err != nil {
		t.Errorf("token with an unknown field: %v", err)
	}
}

// A token is invalid after any of its bytes is replaced or removed, after it is cut at any byte, or
// if a line end is inserted within it. It is also invalid if the last digit of its signature has
// stray bits.
func TestTokenTamper(t *testing.T) {
	ks := testKeys(t, 1, 2)
	good := signToken(t, ks, authToken())
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.=+/ \n\x00\xff"
	for i := range good {
		for j := range len(alphabet) {
			if good[i] == alphabet[j] {
				continue
			}
			bad := good[:i] + alphabet[j:j+1] + good[i+1:]
			if _, err := ks.Verify(bad, testNow); !errors.Is(err, ErrTokenForged) && !errors.Is(err, ErrTokenMalformed) {
				t.Fatalf("byte %d replaced by %q: got error %v, want a forged or malformed token", i, alphabet[j], err)
			}
		}
		for _, bad := range []string{good[:i] + good[i+1:], good[:i], good[:i] + "\n" + good[i:]} {
			if _, err := ks.Verify(bad, testNow); err == nil && strings.TrimSpace(bad) != good {
				t.Fatalf("the token verifies although it was cut or split at byte %d", i)
			}
		}
	}
	// A signature has 256 bits and 43 base64url digits, which can hold 258 bits. The last two bits
	// must be zero.
	last := strings.IndexByte(alphabet, good[len(good)-1])
	for bits := 1; bits < 4; bits++ {
		if _, err := ks.Verify(good[:len(good)-1]+alphabet[last+bits:last+bits+1], testNow); !errors.Is(err, ErrTokenMalformed) {
			t.Errorf("stray bits %02b: got error %v, want %v", bits, err, ErrTokenMalformed)
		}
	}
}

// NewTokenID returns a valid token ID, and a different one each time.
func TestNewTokenID(t *testing.T) {
	a, b := NewTokenID(), NewTokenID()
	if !isTokenID(a) || !isTokenID(b) || a == b {
		t.Errorf("got token IDs %q and %q, want two different valid IDs", a, b)
	}
}

// If Verify accepts the fuzzed text as a token, signing this token again gives the same text. The
// test also uses the fuzzed text as the payload of a correctly signed token, so that it reaches the
// code behind the signature check.
func FuzzToken(f *testing.F) {
	ks := testKeys(f, 1)
	good := signToken(f, ks, authToken())
	upload := authToken()
	upload.Kind, upload.Expires = KindUpload, testNow.Unix()+60
	f.Add(good)
	f.Add(good + "\n")
	f.Add(signToken(f, ks, upload))
	f.Add(signToken(f, testKeys(f, 2), authToken()))
	f.Add("tm1..")
	for _, tok := range []Token{authToken(), upload} {
		tok.KeyID = ks.IDs()[0]
		payload, err := json.Marshal(tok)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(payload))
	}
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ks.Verify(s, testNow)
		parsed, perr := ParseUnverifiedToken(s)
		if err == nil {
			if again := signToken(t, ks, tok); again != strings.TrimSpace(s) {
				t.Errorf("%q verifies, but its token signs as %q", s, again)
			}
			if perr != nil || !reflect.DeepEqual(parsed, tok) {
				t.Errorf("Verify returns %+v, but ParseUnverifiedToken returns %+v, %v", tok, parsed, perr)
			}
		} else if !errors.Is(err, ErrTokenMalformed) && !errors.Is(err, ErrTokenForged) && !errors.Is(err, ErrTokenExpired) {
			t.Errorf("%q: the error is none of the documented errors: %v", s, err)
		}

		tok, err = ks.Verify(authForge(ks, s), testNow)
		if err != nil {
			return
		}
		if CheckClusterID(tok.ClusterID) != nil || !isTokenID(tok.ID) || tok.KeyID != ks.IDs()[0] {
			t.Errorf("payload %q verifies as %+v, which has an invalid field", s, tok)
		}
		text, err := ks.Sign(tok)
		if err != nil {
			// Sign may fail only because the token is too long: it writes some characters as longer
			// JSON escapes than the fuzzed payload has.
			if !strings.Contains(err.Error(), "longer than") || len(s) < MaxToken/16 {
				t.Errorf("payload %q verifies but does not sign: %v", s, err)
			}
			return
		}
		tok, err = ks.Verify(text, testNow)
		if err != nil || signToken(t, ks, tok) != text {
			t.Errorf("payload %q signs as %q, which does not verify to the same token: %v", s, text, err)
		}
	})
}
