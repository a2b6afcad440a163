package main

// Signed tokens. Verify parses nothing that a token says before it has checked the signature;
// ParseUnverifiedToken, for a token's own holder, is the exception. One token has one spelling.

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

// Kinds of token: what an operator gives a site, and what /authorize answers.
const (
	KindClient = "client"
	KindUpload = "upload"
)

// Reasons for which Verify refuses.
var (
	ErrTokenMalformed = errors.New("malformed token")
	ErrTokenForged    = errors.New("token is not signed by a known key")
	ErrTokenExpired   = errors.New("token has expired")
)

const tokenPrefix = "tm1."

// A Token says which site may push, and where to. Its text form is
//
//	tm1.<base64url(JSON)>.<base64url(HMAC-SHA256 over all before this dot)>
//
// without padding. Its holder can read it; the signature makes it a credential. Fields added
// later are ignored, and kinds added later are refused. URLs and labels are bounded by the
// token's length alone; whoever signs a token has to check them.
type Token struct {
	KeyID     string            `json:"key"`     // of the key that signed
	Kind      string            `json:"kind"`    // KindClient or KindUpload
	ClusterID string            `json:"cluster"` // a valid cluster ID
	URLs      []string          `json:"urls,omitempty"`
	Pin       string            `json:"pin,omitempty"` // of the servers' certificate; see CertPin
	Labels    map[string]string `json:"labels,omitempty"`
	Issued    int64             `json:"issued"`            // Unix seconds; shown, never checked
	Expires   int64             `json:"expires,omitempty"` // Unix seconds; 0 = until revoked
	ID        string            `json:"id"`                // NewTokenID; an upload token has its client token's
}

// Sign returns t's text form, signed by the first key, whose ID becomes t.KeyID. Errors: no key,
// a field that breaks the rules, a text longer than MaxToken.
func (ks Keys) Sign(t Token) (string, error) {
	if len(ks.keys) == 0 {
		return "", errors.New("signing a token: no key")
	}
	k := ks.keys[0]
	t.KeyID = k.id
	if err := t.checkFields(); err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	payload, err := json.Marshal(t) // sorts labels: equal tokens have equal text
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	signed := tokenPrefix + base64.RawURLEncoding.EncodeToString(payload)
	s := signed + "." + base64.RawURLEncoding.EncodeToString(k.mac(signed))
	if len(s) > MaxToken {
		return "", fmt.Errorf("signing a token: longer than %d bytes: give it fewer URLs or labels", MaxToken)
	}
	return s, nil
}

// Verify parses a token that one of the keys signed and that has not expired at now. Space around
// it is ignored. The errors are ErrTokenMalformed, ErrTokenForged and ErrTokenExpired, wrapped.
// The caller has to check revocation, the kind and the cluster ID.
func (ks Keys) Verify(text string, now time.Time) (Token, error) {
	signed, payload, mac, err := splitToken(text)
	if err != nil {
		return Token{}, err
	}
	// Every key is tried and not just the one that the payload names, so that nothing unsigned
	// is ever parsed. At most 16 HMACs over 8 KiB cost far less than the TLS handshake before
	// them.
	for _, k := range ks.keys {
		if !hmac.Equal(mac, k.mac(signed)) {
			continue
		}
		t, err := decodeToken(payload)
		if err != nil {
			return Token{}, err
		}
		if t.KeyID != k.id {
			return Token{}, malformedToken("it names another key than the one that signed it")
		}
		if t.Expires != 0 && now.Unix() >= t.Expires {
			return Token{}, fmt.Errorf("%w on %s", ErrTokenExpired, time.Unix(t.Expires, 0).UTC().Format(time.RFC3339))
		}
		return t, nil
	}
	return Token{}, ErrTokenForged
}

// ParseUnverifiedToken parses a token without checking its signature or expiry: for its holder, who
// has no key. Space around it is ignored. The error is ErrTokenMalformed, wrapped.
func ParseUnverifiedToken(text string) (Token, error) {
	_, payload, _, err := splitToken(text)
	if err != nil {
		return Token{}, err
	}
	return decodeToken(payload)
}

// splitToken splits a token's text into what is signed, the payload and the signature. It checks
// none of them.
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
	// Strict refuses stray trailing bits, but every decoder of encoding/base64
	// skips line ends: either would give one token several spellings.
	if !ok || strings.ContainsAny(s, "\r\n") {
		return "", nil, nil, malformedToken("want three parts between dots, on one line")
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

func decodeToken(payload []byte) (Token, error) {
	var t Token
	if json.Unmarshal(payload, &t) != nil { // its error can quote the payload
		return Token{}, malformedToken("payload is not the JSON of a token")
	}
	if err := t.checkFields(); err != nil {
		return Token{}, malformedToken("%w", err)
	}
	return t, nil
}

// malformedToken returns ErrTokenMalformed with a reason, which must not quote the token.
func malformedToken(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrTokenMalformed}, args...)...)
}

// checkFields returns an error if a field breaks the rules. Sign, Verify and ParseUnverifiedToken
// return only tokens that pass.
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
	if t.Pin != "" {
		return checkPinFormat(t.Pin)
	}
	return nil
}

// NewTokenID returns 128 random bits as 32 lower-case hex digits.
func NewTokenID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails since Go 1.24
	return hex.EncodeToString(b[:])
}

func isTokenID(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 16 && s == strings.ToLower(s)
}
