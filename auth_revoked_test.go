package main

// Tests of revocation files, and of the tokens that they revoke.

import (
	"strings"
	"testing"
)

// A revocation file revokes exactly the tokens whose token ID or cluster ID it lists.
func TestRevoked(t *testing.T) {
	id := strings.Repeat("0f", 16)
	client := Token{Kind: KindClient, ClusterID: "site-7", ID: id}
	upload := Token{Kind: KindUpload, ClusterID: "site-7", ID: id}
	hexCluster := Token{ClusterID: strings.Repeat("AB", 16), ID: strings.Repeat("1", 32)}
	for _, c := range []struct {
		name, file string
		revoked    []Token
		kept       []Token
		err        string
	}{
		{"empty file", "", nil, []Token{client, upload}, ""},
		{"only comments", "# site-7\n \n#" + id, nil, []Token{client}, ""},
		{"cluster ID", "x\nsite-7 # stolen\r\n", []Token{client, upload}, []Token{hexCluster}, ""},
		{"token ID", id + "#stolen", []Token{client, upload}, []Token{hexCluster}, ""},
		{"token ID in upper case", strings.ToUpper(id), []Token{client}, nil, ""},
		{"cluster ID of 32 hex digits", hexCluster.ClusterID, []Token{hexCluster}, []Token{client}, ""},
		{"cluster ID in another case", "Site-7\n" + strings.ToLower(hexCluster.ClusterID), nil, []Token{client, hexCluster}, ""},
		{"only parts of IDs", "site-\n" + id[:30], nil, []Token{client}, ""},
		{"two IDs on a line", "a\nb c", nil, nil, "line 2"},
		{"token instead of its ID", "\n" + signToken(t, testKeys(t, 1), authToken()), nil, nil, "line 2"},
		{"too large", strings.Repeat("\n", MaxRevokedFile+1), nil, nil, "larger than 4194304"},
	} {
		r, err := ParseRevokedIDs([]byte(c.file))
		if (c.err == "") != (err == nil) || err != nil && (!strings.Contains(err.Error(), c.err) || strings.Contains(err.Error(), "tm1.")) {
			t.Errorf("%s: got error %v, want an error with %q and no token", c.name, err, c.err)
		}
		for _, tok := range c.revoked {
			if !r.IsRevoked(tok) {
				t.Errorf("%s: token %+v is not revoked, but should be", c.name, tok)
			}
		}
		for _, tok := range c.kept {
			if r.IsRevoked(tok) || (RevokedIDs{}).IsRevoked(tok) {
				t.Errorf("%s: token %+v is revoked, but should not be", c.name, tok)
			}
		}
	}
}

// A revocation file that ParseRevokedIDs accepts revokes the ID on each of its lines. No file
// revokes the zero Token.
func FuzzRevoked(f *testing.F) {
	f.Add([]byte("site-7 # stolen\r\n\n#x\n" + strings.Repeat("0F", 16)))
	f.Add([]byte("a b"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseRevokedIDs(data)
		if err != nil {
			if r.IsRevoked(Token{}) || len(r.clusterIDs) != 0 {
				t.Error("ParseRevokedIDs returns IDs together with an error")
			}
			return
		}
		for id := range r.clusterIDs {
			if err := CheckClusterID(id); err != nil {
				t.Errorf("the set contains %q: %v", id, err)
			}
		}
		for line := range strings.SplitSeq(string(data), "\n") {
			id, _, _ := strings.Cut(line, "#")
			id = strings.TrimSpace(id)
			if id != "" && !r.IsRevoked(Token{ClusterID: id}) || isTokenID(id) && !r.IsRevoked(Token{ID: id}) {
				t.Errorf("line %q does not revoke its ID", line)
			}
		}
		if r.IsRevoked(Token{}) {
			t.Error("the zero token is revoked")
		}
	})
}
