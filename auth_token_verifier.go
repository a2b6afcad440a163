package main

// A TokenVerifier remembers the tokens that it has verified, because a site sends the same token
// with each push, and checking its signature and parsing its payload takes longer than finding it.
// It remembers at most tokensPerSite tokens of each of maxVerifiedSites sites, so that no site
// displaces the tokens of another. It remembers hashes and no token's text. It must not know which
// tokens are revoked.

import (
	"crypto/sha256"
	"sync"
	"time"
)

const (
	tokensPerSite    = 2       // a site's clients use one or two tokens at a time
	maxVerifiedSites = 100_000 // with more sites, all tokens are forgotten and remembering begins anew
)

// tokenHash is the SHA-256 of a token's text. Looking up a hash in a map does not take constant
// time. But the time depends only on the bytes in which the hash of a guessed token equals the hash
// of a remembered token, and whoever chooses a text does not choose its hash.
type tokenHash [sha256.Size]byte

// TokenVerifier verifies tokens with one set of keys. It is safe for concurrent use.
type TokenVerifier struct {
	keys Keys

	mu       sync.RWMutex // guards the fields below
	verified map[tokenHash]Token
	bySite   map[string]*[tokensPerSite]tokenHash // keys of verified by cluster ID, newest first
}

// NewTokenVerifier returns a TokenVerifier that remembers no token.
func NewTokenVerifier(keys Keys) *TokenVerifier {
	return &TokenVerifier{keys: keys, verified: map[tokenHash]Token{}, bySite: map[string]*[tokensPerSite]tokenHash{}}
}

// Verify returns the same as Keys.Verify. The token may lack its URLs and pins, which only a client
// needs. The caller must not change its labels.
func (v *TokenVerifier) Verify(text string, now time.Time) (Token, error) {
	hash := tokenHash(sha256.Sum256([]byte(text)))
	v.mu.RLock()
	t, known := v.verified[hash]
	v.mu.RUnlock()
	if known && !t.IsExpired(now) {
		return t, nil
	}
	t, err := v.keys.Verify(text, now)
	if err == nil {
		v.remember(hash, t)
	}
	return t, err
}

// remember remembers a token that keys have verified. The oldest token of its site is forgotten if
// there are tokensPerSite.
func (v *TokenVerifier) remember(hash tokenHash, t Token) {
	t.URLs, t.Pin, t.SparePin = nil, "", ""
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, known := v.verified[hash]; known {
		return // another request has just verified the same token
	}
	hashes := v.bySite[t.ClusterID]
	if hashes == nil {
		if len(v.bySite) >= maxVerifiedSites {
			clear(v.bySite)
			clear(v.verified)
		}
		hashes = new([tokensPerSite]tokenHash)
		v.bySite[t.ClusterID] = hashes
	}
	delete(v.verified, hashes[tokensPerSite-1])
	copy(hashes[1:], hashes[:])
	hashes[0] = hash
	v.verified[hash] = t
}
