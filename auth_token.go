package main

// This file signs and verifies tokens, which are text credentials. Verify checks the signature of a
// token before it parses the payload. Only ParseUnverifiedToken parses an unverified payload; it is
// for the holder of the token. No change of a token's text leaves the token valid, apart from white
// space around it.

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Kinds of token. An operator gives a client token to a site. A server's /authorize returns an
// upload token in exchange for a client token.
const (
	KindClient = "client"
	KindUpload = "upload"
)

// Errors of Verify. Test for them with errors.Is, because Verify wraps some of them.
var (
	ErrTokenMalformed = errors.New("malformed token")
	ErrTokenForged    = errors.New("token is not signed by a known key")
	ErrTokenExpired   = errors.New("token has expired")
)

const tokenPrefix = "tm1."

// A Token states which site may push, and to which servers. Its text form, in base64url without
// padding, is
//
//	tm1.<base64url(JSON)>.<base64url(HMAC-SHA256 over all text before this dot)>
//
// A token's holder can read the payload, because it is not encrypted. The signature makes the token
// a credential. Unknown JSON fields are ignored, so that later versions can add fields. A token of
// an unknown kind is refused. URLs and labels have no limits but the token's length, and their
// content is not checked here; the program that signs must check it.
type Token struct {
	KeyID     string            `json:"key"`     // ID of the key that signed the token
	Kind      string            `json:"kind"`    // KindClient or KindUpload
	ClusterID string            `json:"cluster"` // a valid cluster ID
	URLs      []string          `json:"urls,omitempty"`
	Pin       string            `json:"pin,omitempty"`       // pin of the servers' certificate; see CertPin
	SparePin  string            `json:"spare_pin,omitempty"` // pin of the spare key, which may replace the servers' TLS key
	Labels    map[string]string `json:"labels,omitempty"`
	Issued    int64             `json:"issued"`            // Unix seconds; only displayed, never checked
	Expires   int64             `json:"expires,omitempty"` // Unix seconds; 0 = valid until revoked
	ID        string            `json:"id"`                // 32 hex digits from NewTokenID; an upload token has the ID of its client token, unless an external service checked that token
}

// Sign returns t's text form, signed with the first key. The KeyID in the text is the ID of that
// key, whatever t.KeyID is. Sign returns an error if there is no key, if a field of t is invalid,
// or if the text is longer than MaxToken.
func (ks Keys) Sign(t Token) (string, error) {
	if len(ks.keys) == 0 {
		return "", errors.New("signing a token: no key")
	}
	k := ks.keys[0]
	t.KeyID = k.id
	if err := t.checkFields(); err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	payload, err := json.Marshal(t) // Marshal sorts the labels, so that equal tokens have the same text
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	signed := tokenPrefix + base64.RawURLEncoding.EncodeToString(payload)
	s := signed + "." + base64.RawURLEncoding.EncodeToString(k.mac(signed))
	if len(s) > MaxToken {
		return "", fmt.Errorf("signing a token: the token is longer than %d bytes: use fewer URLs or labels", MaxToken)
	}
	return s, nil
}

// Verify returns the token in text if one of the keys signed the token and it has not expired at
// the time now. It ignores white space around text. The errors are ErrTokenMalformed,
// ErrTokenForged and ErrTokenExpired, wrapped or bare. The caller must check the token's
// revocation, kind and cluster ID.
func (ks Keys) Verify(text string, now time.Time) (Token, error) {
	signed, payload, mac, err := splitToken(text)
	if err != nil {
		return Token{}, err
	}
	// Try every key, not only the key that the payload names, because the payload must not be
	// parsed before its signature is verified. This costs at most 16 HMACs over 8 KiB, which is as
	// much as hashing 128 KiB.
	for _, k := range ks.keys {
		if !hmac.Equal(mac, k.mac(signed)) {
			continue
		}
		t, err := decodeToken(payload)
		if err != nil {
			return Token{}, err
		}
		if t.KeyID != k.id {
			return Token{}, malformedToken("the key ID in it is not the ID of the key that signed it")
		}
		if t.IsExpired(now) {
			return Token{}, fmt.Errorf("%w on %s", ErrTokenExpired, time.Unix(t.Expires, 0).UTC().Format(time.RFC3339))
		}
		return t, nil
	}
	return Token{}, ErrTokenForged
}

// IsExpired reports whether t has expired at the time now.
func (t Token) IsExpired(now time.Time) bool { return t.Expires != 0 && now.Unix() >= t.Expires }

// ParseUnverifiedToken returns the token in text without checking its signature or expiry. It is
// for the token's holder, which has no key to verify the signature. It ignores white space around
// text. Every error wraps ErrTokenMalformed.
func ParseUnverifiedToken(text string) (Token, error) {
	_, payload, _, err := splitToken(text)
	if err != nil {
		return Token{}, err
	}
	return decodeToken(payload)
}

// splitToken splits a token's text into the signed part (the prefix and the encoded payload), the
// decoded payload and the decoded signature. It does not verify the signature or check the fields
// of the payload.
func splitToken(s string) (signed string, payload, mac []byte, err error) {
	s = strings.TrimSpace(s)
	if len(s) > MaxToken {
		return "", nil, nil, malformedToken("longer than %d bytes", MaxToken)
	}
	body, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		version, _, _ := strings.Cut(strings.TrimPrefix(s, "tm"), ".")
		if n, err := strconv.ParseUint(version, 10, 16); err == nil && strings.HasPrefix(s, "tm") {
			return "", nil, nil, malformedToken("it has version %d; this program knows version 1", n)
		}
		return "", nil, nil, malformedToken("does not begin with %s", tokenPrefix)
	}
	p, m, ok := strings.Cut(body, ".")
	// A token must have only one valid text. Strict below makes the base64 decoder refuse stray
	// bits in the last digit. But the decoders of encoding/base64 skip line ends, so this check
	// must refuse them.
	if !ok || strings.ContainsAny(s, "\r\n") {
		return "", nil, nil, malformedToken("want three parts separated by dots, on one line")
	}
	enc := base64.RawURLEncoding.Strict()
	if payload, err = enc.DecodeString(p); err != nil {
		return "", nil, nil, malformedToken("payload is not base64url")
	}
	if mac, err = enc.DecodeString(m); err != nil || len(mac) != sha256.Size {
		return "", nil, nil, malformedToken("signature is not the base64url of %d bytes", sha256.Size)
	}
	return s[:len(s)-len(m)-1], payload, mac, nil
}

// decodeToken parses a token's payload and checks its fields. Every error wraps ErrTokenMalformed.
func decodeToken(payload []byte) (Token, error) {
	var t Token
	if json.Unmarshal(payload, &t) != nil { // the error is dropped, because it can quote the payload
		return Token{}, malformedToken("payload is not the JSON of a token")
	}
	if err := t.checkFields(); err != nil {
		return Token{}, malformedToken("%w", err)
	}
	return t, nil
}

// malformedToken returns an error that wraps ErrTokenMalformed and adds a reason. The reason must
// not quote the token.
func malformedToken(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrTokenMalformed}, args...)...)
}

// checkFields returns an error if a field of t is invalid. It checks the kind, the cluster ID, the
// token ID and the pins. Sign, Verify and ParseUnverifiedToken refuse a token with an invalid field.
func (t Token) checkFields() error {
	if t.Kind != KindClient && t.Kind != KindUpload {
		return fmt.Errorf("unknown kind: want %s or %s", KindClient, KindUpload)
	}
	if err := CheckClusterID(t.ClusterID); err != nil {
		return err
	}
	if !isTokenID(t.ID) {
		return errors.New("token ID is not 32 lower-case hex digits")
	}
	for _, pin := range t.Pins() {
		if err := checkPinFormat(pin); err != nil {
			return err
		}
	}
	return nil
}

// Pins returns the pins of the keys that the servers may have. It returns none if t has no pin.
func (t Token) Pins() (pins []string) {
	for _, pin := range []string{t.Pin, t.SparePin} {
		if pin != "" {
			pins = append(pins, pin)
		}
	}
	return pins
}

// NewTokenID returns 128 random bits as 32 lower-case hex digits.
func NewTokenID() string {
	var b [16]byte
	rand.Read(b[:]) // crypto/rand.Read never returns an error since Go 1.24
	return hex.EncodeToString(b[:])
}

func isTokenID(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 16 && s == strings.ToLower(s)
}
