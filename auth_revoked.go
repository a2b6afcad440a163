package main

// This file decides which tokens are revoked. A revocation file lists token IDs and cluster IDs. A
// token with a listed ID is refused, even if it has not expired. The set of listed IDs is
// immutable. When the file changes, a new set replaces the old set.

import (
	"fmt"
	"slices"
	"strings"
)

// RevokedIDs is a set of token IDs and cluster IDs. The zero value revokes nothing. RevokedIDs is
// immutable and safe for concurrent use.
type RevokedIDs struct {
	tokenIDs   map[string]struct{}
	clusterIDs map[string]struct{}
}

// ParseRevokedIDs parses a revocation file of at most MaxRevokedFile bytes. Each line holds a token
// ID or a cluster ID, and # begins a comment. A line of 32 hex digits, in upper or lower case,
// revokes both the token ID and the cluster ID with these digits. That is safe, because a token ID
// has 128 random bits and equals no cluster ID by accident. An error about a line gives its number.
func ParseRevokedIDs(data []byte) (RevokedIDs, error) {
	if len(data) > MaxRevokedFile {
		return RevokedIDs{}, fmt.Errorf("revocation file is larger than %d bytes", MaxRevokedFile)
	}
	r := RevokedIDs{tokenIDs: map[string]struct{}{}, clusterIDs: map[string]struct{}{}}
	for n, line := range NonCommentLines(data) {
		id, _, _ := strings.Cut(line, "#")
		id = strings.TrimSpace(id)
		if err := CheckClusterID(id); err != nil {
			return RevokedIDs{}, fmt.Errorf("line %d: neither a token ID (32 hex digits, not the token itself) nor a cluster ID", n)
		}
		r.clusterIDs[id] = struct{}{}
		if low := strings.ToLower(id); isTokenID(low) {
			r.tokenIDs[low] = struct{}{}
		}
	}
	return r, nil
}

// NotIssued returns, sorted, the listed IDs that are neither the token ID nor the cluster ID of a
// token in l.
func (s RevokedIDs) NotIssued(l IssuedTokens) (ids []string) {
	issued := map[string]struct{}{}
	for _, t := range l.Tokens() {
		issued[t.ID], issued[t.ClusterID] = struct{}{}, struct{}{}
	}
	for id := range s.clusterIDs { // has every listed ID, also the token IDs
		_, exact := issued[id]
		_, lower := issued[strings.ToLower(id)]
		if _, isToken := s.tokenIDs[strings.ToLower(id)]; !exact && !(isToken && lower) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// IsRevoked reports whether t's token ID or cluster ID is revoked. If a server verified a client
// token itself, the upload token that it issued has the same token ID. So revoking the client token
// also revokes the upload token.
func (s RevokedIDs) IsRevoked(t Token) bool {
	_, byToken := s.tokenIDs[t.ID]
	_, byCluster := s.clusterIDs[t.ClusterID]
	return byToken || byCluster
}
