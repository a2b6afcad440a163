package main

// Tests of the list of issued tokens: what a record has, appends by several processes, torn and
// faulty lines, limits, and which sites may push.

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// issuedToken returns the text of a client token for the cluster ID cluster. Its token ID has the
// hex digits of n at the end.
func issuedToken(t testing.TB, cluster string, n int) string {
	t.Helper()
	return signToken(t, testKeys(t, 1), Token{Kind: KindClient, ClusterID: cluster, Issued: testNow.Unix(), ID: fmt.Sprintf("%032x", n)})
}

// issuedLine returns the record of the token issuedToken(t, cluster, n) with a line end.
func issuedLine(t testing.TB, cluster string, n int) string {
	t.Helper()
	_, payload, _, err := splitToken(issuedToken(t, cluster, n))
	if err != nil {
		t.Fatal(err)
	}
	return string(payload) + "\n"
}

// issuedIDs returns the cluster ID and the last hex digit of the token ID of each token of l.
func issuedIDs(l IssuedTokens) (ids string) {
	for _, t := range l.Tokens() {
		ids += t.ClusterID + "/" + t.ID[31:] + " "
	}
	return ids
}

// A record has all fields of its token, including the ID of the key, but not the signature. The
// list is created with a mode that lets every user read it, whatever the umask is.
func TestIssuedRecord(t *testing.T) {
	dir := t.TempDir()
	want := authToken()
	text := signToken(t, testKeys(t, 1), want)
	want.KeyID = testKeys(t, 1).IDs()[0]
	if err := RecordIssuedToken(dir, text); err != nil {
		t.Fatal(err)
	}
	file := readIn(t, dir, IssuedFile)
	l, err := ParseIssuedTokens([]byte(file))
	if err != nil || !reflect.DeepEqual(l.Tokens(), []Token{want}) {
		t.Errorf("the list has %+v, %v; want %+v", l.Tokens(), err, want)
	}
	if signature := text[strings.LastIndexByte(text, '.')+1:]; strings.Contains(file, signature) {
		t.Errorf("the list has the signature of the token: %s", file)
	}
	info, err := os.Stat(filepath.Join(dir, IssuedFile))
	if err != nil || info.Mode() != 0o644 {
		t.Errorf("the list has the mode %v (%v), want 0644", info.Mode(), err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("the directory has the files %v (%v), want only the list", entries, err)
	}
}

// If many processes record tokens at once, the list has each record on a line of its own, although
// the list did not exist or had a torn last line before. The list is open several times in this
// test, as it is in several processes.
func TestIssuedConcurrentAppends(t *testing.T) {
	first := issuedLine(t, "first", 1)
	for round := range 40 {
		dir := t.TempDir()
		const writers = 8
		want := writers
		if round > 0 {
			writeIn(t, dir, IssuedFile, first+first[:30])
			want++
		}
		var done sync.WaitGroup
		for w := range writers {
			done.Go(func() {
				if err := RecordIssuedToken(dir, issuedToken(t, "site", w)); err != nil {
					t.Error(err)
				}
			})
		}
		done.Wait()
		file := readIn(t, dir, IssuedFile)
		l, err := ParseIssuedTokens([]byte(file))
		if err != nil || len(l.Tokens()) != want || strings.Count(file, "\n") != want {
			t.Fatalf("the list has %d tokens on %d lines (%v), want %d", len(l.Tokens()), strings.Count(file, "\n"), err, want)
		}
	}
}

// ParseIssuedTokens sorts the tokens. It skips a torn last line, but reports a faulty line before
// it. RecordIssuedToken removes a torn last line, and keeps a whole record without a line end.
func TestIssuedLines(t *testing.T) {
	a, b := issuedLine(t, "a", 1), issuedLine(t, "b", 2)
	upload := strings.Replace(a, KindClient, KindUpload, 1)
	long := strings.Replace(a, `"id"`, `"more":"`+strings.Repeat("x", MaxToken)+`","id"`, 1)
	for name, c := range map[string]struct {
		file    string
		want    string // tokens that ParseIssuedTokens returns
		err     string // error of ParseIssuedTokens
		appends string // tokens after an append of the token c/3
		refused string // error of the append
	}{
		"empty":                  {"", "", "", "c/3 ", ""},
		"sorted":                 {b + a, "a/1 b/2 ", "", "a/1 b/2 c/3 ", ""},
		"two lists in one":       {a + b + a, "a/1 b/2 ", "", "a/1 b/2 c/3 ", ""},
		"blank lines, CR LF":     {"\n" + strings.Replace(a, "\n", "\r\n", 1) + " \n", "a/1 ", "", "a/1 c/3 ", ""},
		"torn":                   {a + b[:len(b)-5], "a/1 ", "", "a/1 c/3 ", ""},
		"torn first line":        {a[:20], "", "", "c/3 ", ""},
		"zeroes at the end":      {a + strings.Repeat("\x00", 4096), "a/1 ", "", "a/1 c/3 ", ""},
		"no line end":            {a + b[:len(b)-1], "a/1 b/2 ", "", "a/1 b/2 c/3 ", ""},
		"faulty line":            {a + "x\n" + b, "", "line 2 ", "", ""},
		"faulty last line":       {a + "{}\n", "", "line 2 ", "", ""},
		"upload token":           {upload, "", "line 1 ", "", ""},
		"too long a line":        {a + long, "", "line 2 ", "", ""},
		"too long a torn line":   {a + long[:len(long)-1], "a/1 ", "", "", "delete the line"},
		"too large":              {strings.Repeat("\n", MaxIssuedFile+1), "", "larger than", "", "is full"},
		"no room for one record": {strings.Repeat(" ", MaxIssuedFile-1) + "\n", "", "", "", "is full"},
	} {
		check := func(what, file, want, wantErr string) {
			t.Helper()
			l, err := ParseIssuedTokens([]byte(file))
			if got := issuedIDs(l); got != want || (err == nil) != (wantErr == "") || err != nil && !strings.Contains(err.Error(), wantErr) {
				t.Errorf("%s, %s: got %q, %v; want %q and an error with %q", name, what, got, err, want, wantErr)
			}
		}
		check("parsed", c.file, c.want, c.err)
		dir := t.TempDir()
		writeIn(t, dir, IssuedFile, c.file)
		err := RecordIssuedToken(dir, issuedToken(t, "c", 3))
		if (err == nil) != (c.refused == "") || err != nil && !strings.Contains(err.Error(), c.refused) {
			t.Errorf("%s: the append got the error %v, want %q", name, err, c.refused)
		}
		if c.refused == "" {
			check("after an append", readIn(t, dir, IssuedFile), c.appends, c.err)
		} else if readIn(t, dir, IssuedFile) != c.file {
			t.Errorf("%s: a refused append changed the file", name)
		}
	}
}

// A site may push if one of its tokens has neither expired nor been revoked, by its token ID or by
// its cluster ID. The sites come in order, each once, with the time at which the oldest such token was
// issued.
func TestIssuedValidSites(t *testing.T) {
	id := func(n int) string { return fmt.Sprintf("%032x", n) }
	revoked, err := ParseRevokedIDs([]byte("stolen\n" + id(7) + "\n" + id(9)))
	if err != nil {
		t.Fatal(err)
	}
	l := IssuedTokens{tokens: []Token{
		{ClusterID: "a", ID: id(1), Expires: testNow.Unix()},
		{ClusterID: "b", ID: id(2), Issued: 2, Expires: testNow.Unix()}, {ClusterID: "b", ID: id(3), Issued: 3, Expires: testNow.Unix() + 1}, {ClusterID: "b", ID: id(4), Issued: 4},
		{ClusterID: "c", ID: id(5)},
		{ClusterID: "d", ID: id(7)}, {ClusterID: "d", ID: id(8), Expires: 1},
		{ClusterID: "e", ID: id(9)}, {ClusterID: "e", ID: id(10)},
		{ClusterID: "stolen", ID: id(11)},
	}}
	sites := func(now time.Time, revoked RevokedIDs) (all []string) {
		for id, issued := range l.ValidSites(now, revoked) {
			all = append(all, fmt.Sprint(id, issued.Unix()))
		}
		return all
	}
	if got, want := sites(testNow, revoked), []string{"b3", "c0", "e0"}; !slices.Equal(got, want) {
		t.Errorf("the sites %q may push, want %q", got, want)
	}
	if got, want := sites(testNow.Add(-time.Second), RevokedIDs{}), []string{"a0", "b2", "c0", "d0", "e0", "stolen0"}; !slices.Equal(got, want) {
		t.Errorf("before the expiry and the revocation the sites %q may push, want %q", got, want)
	}
}

// A list that ParseIssuedTokens accepts has only valid client tokens. A list with an error has no
// token.
func FuzzIssued(f *testing.F) {
	line := issuedLine(f, "a", 1)
	f.Add([]byte(line))
	f.Add([]byte(line + line[:30]))
	f.Add([]byte("\n{}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := ParseIssuedTokens(data)
		for _, tok := range l.Tokens() {
			if tok.Kind != KindClient || tok.checkFields() != nil || err != nil {
				t.Errorf("the list has the token %+v, with the error %v", tok, err)
			}
		}
	})
}
