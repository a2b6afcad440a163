package main

// Revocation: a set of token IDs and cluster IDs that a file lists. A revoked token is refused
// however long it is valid. The set is immutable, so that a reload replaces it whole.

import (
	"fmt"
	"strings"
)

// RevokedIDs is a set of token IDs and cluster IDs. The zero value revokes nothing.
// Immutable, safe for concurrent use.
type RevokedIDs struct {
	tokenIDs   map[string]struct{}
	clusterIDs map[string]struct{}
}

// ParseRevokedIDs reads a revocation file of at most MaxRevokedFile bytes: a token
// ID or a cluster ID a line, # begins a comment. 32 hex digits, in either case, count as both:
// a token ID of 128 random bits equals no cluster ID by accident. An error names the line.
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

// IsRevoked tells whether t is revoked by its ID (an upload token has its client token's) or by
// its cluster ID.
func (s RevokedIDs) IsRevoked(t Token) bool {
	_, byToken := s.tokenIDs[t.ID]
	_, byCluster := s.clusterIDs[t.ClusterID]
	return byToken || byCluster
}
