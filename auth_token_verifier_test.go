package main

// The tokens that a TokenVerifier remembers: it answers as the keys do for every token and time, and
// remembers a bounded number of tokens, and of each site.

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// A TokenVerifier returns for each token, at each time, what Keys.Verify returns: also for tokens
// that expire after they were verified, tokens that differ in one character from a verified token,
// and several tokens of one site.
func TestVerifierAnswersAsKeys(t *testing.T) {
	for seed := range testSeeds(t, 20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		keys := testKeys(t, 2)
		v := NewTokenVerifier(keys)
		var texts []string
		for i := range 12 {
			tok := Token{Kind: KindUpload, ClusterID: fmt.Sprint("site-", i%3), ID: fmt.Sprintf("%032x", i)}
			if rng.IntN(2) == 0 {
				tok.Expires = testNow.Unix() + int64(rng.IntN(100))
			}
			if rng.IntN(2) == 0 {
				tok.Labels = map[string]string{"region": fmt.Sprint("r", i)}
			}
			by := keys
			if rng.IntN(4) == 0 {
				by = testKeys(t, 7)
			}
			text := signToken(t, by, tok)
			at := len(tokenPrefix) + rng.IntN(len(text)-len(tokenPrefix))
			texts = append(texts, text, text[:at]+string(text[at]^1)+text[at+1:])
		}
		for step := range 300 {
			now := testNow.Add(time.Duration(step/3) * time.Second)
			text := texts[rng.IntN(len(texts))]
			got, err := v.Verify(text, now)
			want, wantErr := keys.Verify(text, now)
			if fmt.Sprint(err) != fmt.Sprint(wantErr) || err == nil && (got.Kind != want.Kind || got.ClusterID != want.ClusterID || got.ID != want.ID || got.Expires != want.Expires || got.KeyID != want.KeyID || !maps.Equal(got.Labels, want.Labels)) {
				t.Fatalf("seed %d, step %d: got %+v, %v; want %+v, %v", seed, step, got, err, want, wantErr)
			}
		}
	}
}

// A TokenVerifier remembers the newest tokensPerSite tokens of a site, and nothing of a token that it
// refused. A site with many tokens displaces no token of another site. Once maxVerifiedSites sites
// are remembered, another site makes it begin anew.
func TestVerifierIsBounded(t *testing.T) {
	keys := testKeys(t, 1)
	v := NewTokenVerifier(keys)
	verify := func(site string, n int) {
		t.Helper()
		text := signToken(t, keys, Token{Kind: KindClient, ClusterID: site, ID: fmt.Sprintf("%032x", n), URLs: []string{"https://hub.example:9003"}, Pin: pinPrefix + keyLine(9)})
		for range 2 {
			if _, err := v.Verify(text, testNow); err != nil {
				t.Fatal(err)
			}
		}
	}
	verify("quiet", 0)
	for n := range 10 {
		verify("busy", n)
	}
	forged := signToken(t, testKeys(t, 7), Token{Kind: KindClient, ClusterID: "forged", ID: strings.Repeat("0", 32)})
	if _, err := v.Verify(forged, testNow); !errors.Is(err, ErrTokenForged) {
		t.Errorf("the forged token: %v", err)
	}
	sites := map[string]int{}
	for _, tok := range v.verified {
		sites[tok.ClusterID]++
		if len(tok.URLs) > 0 {
			t.Errorf("the URLs %q are remembered", tok.URLs)
		}
		if tok.Pin != "" {
			t.Errorf("the pin %q is remembered", tok.Pin)
		}
	}
	if want := map[string]int{"quiet": 1, "busy": tokensPerSite}; !maps.Equal(sites, want) {
		t.Errorf("the tokens remembered by site are %v, want %v", sites, want)
	}
	for n := range maxVerifiedSites {
		v.remember(tokenHash{byte(n), byte(n >> 8), 1}, Token{ClusterID: fmt.Sprint("site-", n)})
	}
	if len(v.bySite) > maxVerifiedSites || len(v.verified) > maxVerifiedSites*tokensPerSite {
		t.Errorf("%d tokens of %d sites are remembered", len(v.verified), len(v.bySite))
	}
	verify("quiet", 0)
	if len(v.verified) == 0 || len(v.bySite) == 0 {
		t.Error("no token is remembered after the limit was reached")
	}
}
