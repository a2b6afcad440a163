package main

// Tests of keys, tokens and certificates: a token has exactly one text and counts only if it is
// signed, rotation leaves no gap, no key file is ever lost, a pin holds also on resumed sessions,
// and no error has a secret.

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func authToken() Token {
	return Token{
		Kind: KindClient, ClusterID: "site-7", URLs: []string{"https://hub.example:9003", "https://b/?a=1&b=<2>"},
		Pin: pinPrefix + keyLine(9), Labels: map[string]string{"region": "süd", "a": "\u2028"},
		Issued: testNow.Unix(), ID: strings.Repeat("0f", 16),
	}
}

// authForge signs any payload with the first key, as only its holder can.
func authForge(ks Keys, payload string) string {
	signed := tokenPrefix + base64.RawURLEncoding.EncodeToString([]byte(payload))
	return signed + "." + base64.RawURLEncoding.EncodeToString(ks.keys[0].mac(signed))
}

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
		{"one", keyLine(1), 1, ""},
		{"comments, blank lines, CRLF, space", "# a\r\n\r\n  " + keyLine(1) + " \r\n\t# b\n" + keyLine(2) + "\r\n", 2, ""},
		{"sixteen", many[:maxKeys*45], maxKeys, ""},
		{"seventeen", many, 0, "line 17: more than 16 keys"},
		{"empty", "", 0, "no key"},
		{"only comments", "# " + keyLine(1) + "\n\n", 0, "no key"},
		{"short key", "\n" + keyLine(1)[:40], 0, "line 2: not a key"},
		{"33 bytes", base64.StdEncoding.EncodeToString(make([]byte, 33)), 0, "line 1: not a key"},
		{"no padding", strings.TrimRight(keyLine(1), "="), 0, "line 1: not a key"},
		{"trailing bits", nonCanonical, 0, "line 1: not a key"},
		{"url alphabet", strings.Repeat("_", 42) + "8=", 0, "line 1: not a key"},
		{"trailing comment", keyLine(1) + " # mine", 0, "line 1: not a key"},
		{"two on a line", keyLine(1) + keyLine(2), 0, "line 1: not a key"},
		{"hex", strings.Repeat("ab", 32), 0, "line 1: not a key"},
		{"twice", keyLine(1) + "\n" + keyLine(2) + "\n" + keyLine(1), 0, "line 3: the same key"},
		{"too large", keyLine(1) + strings.Repeat("\n", MaxKeyFile), 0, "larger than 65536"},
	} {
		ks, err := ParseKeys([]byte(c.file))
		switch {
		case c.err == "" && (err != nil || len(ks.IDs()) != c.keys):
			t.Errorf("%s: %d keys, error %v; want %d", c.name, len(ks.IDs()), err, c.keys)
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("%s: error %v, want %q", c.name, err, c.err)
		}
		for line := range strings.FieldsSeq(c.file) {
			if err != nil && len(line) > 8 && strings.Contains(err.Error(), line[:8]) {
				t.Errorf("%s: error echoes the file: %v", c.name, err)
			}
		}
	}
}

// Key IDs and subkeys are on disk and on the wire of running clusters: they may
// never change. The wanted values are HKDF written out as in RFC 5869.
func TestSubkeys(t *testing.T) {
	secret := bytes.Repeat([]byte{7}, keySize)
	sum := func(key []byte, msg string) []byte {
		h := hmac.New(sha256.New, key)
		io.WriteString(h, msg)
		return h.Sum(nil)
	}
	derive := func(label string) []byte {
		return sum(sum(make([]byte, 32), string(secret)), label+"\x01")
	}
	ks := testKeys(t, 7, 8)
	if got, want := ks.IDs()[0], fmt.Sprintf("%x", derive("telemeter key id v1")[:4]); got != want {
		t.Errorf("key ID %s, want %s", got, want)
	}
	sub := derive("telemeter token v1")
	if !bytes.Equal(ks.keys[0].mac("tm1.x"), sum(sub, "tm1.x")) {
		t.Error("tokens are not signed under HKDF-SHA256 of the key and its label")
	}
	if ids := ks.IDs(); ids[0] == ids[1] {
		t.Error("two keys share an ID")
	}
	// Neither bare nor inside a private field does printing show key bytes.
	for _, v := range []any{ks, &ks, struct{ ks Keys }{ks}, []any{ks}} {
		for _, verb := range []string{"v", "+v", "#v", "s", "q", "x", "X", "d", "c", "t", "p"} {
			text := fmt.Sprintf("%"+verb, v)
			for _, b := range [][]byte{sub, secret} {
				if strings.Contains(text, string(b[:4])) || strings.Contains(text, strings.Trim(fmt.Sprintf("%"+verb, b[:4]), "[]")) {
					t.Errorf("%%%s of %T shows a secret: %s", verb, v, text)
				}
			}
		}
	}
}

func TestTokenRoundTrip(t *testing.T) {
	ks := testKeys(t, 1)
	for name, edit := range map[string]func(*Token){
		"client":              func(*Token) {},
		"upload":              func(k *Token) { k.Kind = KindUpload },
		"bare":                func(k *Token) { k.URLs, k.Pin, k.Labels, k.Issued = nil, "", nil, 0 },
		"issued in future":    func(k *Token) { k.Issued = testNow.AddDate(30, 0, 0).Unix() },
		"not yet expired":     func(k *Token) { k.Expires = testNow.Unix() + 1 },
		"key ID is filled in": func(k *Token) { k.KeyID = "whatever" },
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
			t.Errorf("%s: ParseToken = %+v, %v; want %+v", name, got, err, want)
		}
		if again := signToken(t, ks, got); again != s {
			t.Errorf("%s: signed twice, two texts:\n%s\n%s", name, s, again)
		}
		if again := signToken(t, testKeys(t, 2), got); again == s {
			t.Errorf("%s: two keys, one text", name)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	ks := testKeys(t, 1)
	for name, c := range map[string]struct {
		ks   Keys
		edit func(*Token)
		err  string
	}{
		"no key":         {Keys{}, func(*Token) {}, "no key"},
		"no kind":        {ks, func(k *Token) { k.Kind = "" }, "unknown kind"},
		"other kind":     {ks, func(k *Token) { k.Kind = "admin" }, "unknown kind"},
		"no cluster":     {ks, func(k *Token) { k.ClusterID = "" }, "cluster ID"},
		"bad cluster":    {ks, func(k *Token) { k.ClusterID = "a/b" }, "cluster ID"},
		"no token ID":    {ks, func(k *Token) { k.ID = "" }, "token ID"},
		"token ID case":  {ks, func(k *Token) { k.ID = strings.ToUpper(k.ID) }, "token ID"},
		"token ID short": {ks, func(k *Token) { k.ID = k.ID[2:] }, "token ID"},
		"bad pin":        {ks, func(k *Token) { k.Pin = "sha256/x" }, "not a pin"},
		"too long":       {ks, func(k *Token) { k.Labels = map[string]string{"a": strings.Repeat("x", MaxToken)} }, "longer than 8192"},
	} {
		tok := authToken()
		c.edit(&tok)
		if s, err := c.ks.Sign(tok); s != "" || err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: Sign = %q, %v; want error %q", name, s, err, c.err)
		}
	}
	// The longest that Sign makes, Verify takes.
	tok := authToken()
	for n := MaxToken; ; n-- {
		tok.Labels = map[string]string{"a": strings.Repeat("x", n)}
		if s, err := ks.Sign(tok); err == nil {
			if _, err := ks.Verify(s+"\n", testNow); err != nil || len(s) < MaxToken-2 {
				t.Errorf("longest token, %d bytes: %v", len(s), err)
			}
			break
		}
	}
}

func TestVerifyRefuses(t *testing.T) {
	ks := testKeys(t, 1, 2)
	good := signToken(t, ks, authToken())
	parts := strings.Split(good, ".")
	edited := func(from, to string) string {
		payload, err := base64.RawURLEncoding.DecodeString(parts[1])
		if err != nil || !bytes.Contains(payload, []byte(from)) {
			t.Fatalf("payload %s has no %s (%v)", payload, from, err)
		}
		return authForge(ks, strings.Replace(string(payload), from, to, 1))
	}
	expiring := authToken()
	expiring.Expires = testNow.Unix()
	other := testKeys(t, 3)
	for name, c := range map[string]struct {
		s      string
		want   error
		parses bool // ParseUnverifiedToken, which checks neither signature nor expiry
	}{
		"empty":                   {"", ErrTokenMalformed, false},
		"space":                   {" \n", ErrTokenMalformed, false},
		"one part":                {"tm1.", ErrTokenMalformed, false},
		"two parts":               {"tm1." + parts[1], ErrTokenMalformed, false},
		"four parts":              {good + ".x", ErrTokenMalformed, false},
		"empty parts":             {"tm1..", ErrTokenMalformed, false},
		"no signature":            {"tm1." + parts[1] + ".", ErrTokenMalformed, false},
		"short signature":         {good[:len(good)-4], ErrTokenMalformed, false},
		"long signature":          {good + "AAAA", ErrTokenMalformed, false},
		"another version":         {"tm2" + good[3:], ErrTokenMalformed, false},
		"prefix in upper case":    {"TM1" + good[3:], ErrTokenMalformed, false},
		"JWT with alg none":       {"eyJhbGciOiJub25lIn0." + parts[1] + ".", ErrTokenMalformed, false},
		"padded":                  {good + "=", ErrTokenMalformed, false},
		"standard alphabet":       {"tm1.++++." + parts[2], ErrTokenMalformed, false},
		"line end in payload":     {"tm1.\n" + parts[1] + "." + parts[2], ErrTokenMalformed, false},
		"line end in signature":   {good[:len(good)-5] + "\r\n" + good[len(good)-5:], ErrTokenMalformed, false},
		"space inside":            {"tm1. " + parts[1] + "." + parts[2], ErrTokenMalformed, false},
		"too long":                {"tm1." + strings.Repeat("A", MaxToken) + "." + parts[2], ErrTokenMalformed, false},
		"unknown key":             {signToken(t, other, authToken()), ErrTokenForged, true},
		"signature of another":    {"tm1." + strings.Split(edited("site-7", "site-8"), ".")[1] + "." + parts[2], ErrTokenForged, true},
		"garbage, not signed":     {"tm1.AAAA." + parts[2], ErrTokenForged, false},
		"garbage, signed":         {authForge(ks, "\x00"), ErrTokenMalformed, false},
		"null, signed":            {authForge(ks, "null"), ErrTokenMalformed, false},
		"empty payload, signed":   {authForge(ks, ""), ErrTokenMalformed, false},
		"two values, signed":      {authForge(ks, "{}{}"), ErrTokenMalformed, false},
		"wrong type, signed":      {edited(`"site-7"`, `["site-7"]`), ErrTokenMalformed, false},
		"unknown kind, signed":    {edited(`"client"`, `"admin"`), ErrTokenMalformed, false},
		"kind by case, signed":    {edited(`"client"`, `"Client"`), ErrTokenMalformed, false},
		"bad cluster, signed":     {edited("site-7", "../site"), ErrTokenMalformed, false},
		"bad token ID, signed":    {edited("0f0f", "0F0F"), ErrTokenMalformed, false},
		"names a key of ours":     {edited(ks.IDs()[0], ks.IDs()[1]), ErrTokenMalformed, true},
		"expired this second":     {signToken(t, ks, expiring), ErrTokenExpired, true},
		"negative expiry, signed": {edited(`"issued"`, `"expires":-1,"issued"`), ErrTokenExpired, true},
	} {
		got, err := ks.Verify(c.s, testNow)
		if name == "another version" && !strings.HasSuffix(fmt.Sprint(err), "it has version 2; this program knows version 1") {
			t.Errorf("%s: the error does not say so: %v", name, err)
		}
		if !errors.Is(err, c.want) || !reflect.DeepEqual(got, Token{}) {
			t.Errorf("%s: Verify = %+v, %v; want %v", name, got, err, c.want)
		}
		_, perr := ParseUnverifiedToken(c.s)
		if (perr == nil) != c.parses || perr != nil && !errors.Is(perr, ErrTokenMalformed) {
			t.Errorf("%s: ParseToken: %v; want parsed: %v", name, perr, c.parses)
		}
		for _, err := range []error{err, perr} {
			if err == nil {
				continue
			}
			for _, secret := range []string{parts[1][:12], parts[2][:8], ks.IDs()[0], ks.IDs()[1], "site-7"} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("%s: the error tells %q: %v", name, secret, err)
				}
			}
		}
	}
	if _, err := (Keys{}).Verify(good, testNow); !errors.Is(err, ErrTokenForged) {
		t.Errorf("no key at all: %v", err)
	}
	// Fields that a later version adds do not break this one.
	if _, err := ks.Verify(edited(`"kind"`, `"later":{"x":[1]},"kind"`), testNow); err != nil {
		t.Errorf("unknown field: %v", err)
	}
}

// No other byte at any place, and no spelling of the last bits, opens a token.
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
				t.Fatalf("byte %d as %q: %v", i, alphabet[j], err)
			}
		}
		for _, bad := range []string{good[:i] + good[i+1:], good[:i], good[:i] + "\n" + good[i:]} {
			if _, err := ks.Verify(bad, testNow); err == nil && strings.TrimSpace(bad) != good {
				t.Fatalf("cut or split at byte %d: accepted", i)
			}
		}
	}
	// 43 digits carry 258 bits for 256: the last two must be zero.
	last := strings.IndexByte(alphabet, good[len(good)-1])
	for bits := 1; bits < 4; bits++ {
		if _, err := ks.Verify(good[:len(good)-1]+alphabet[last+bits:last+bits+1], testNow); !errors.Is(err, ErrTokenMalformed) {
			t.Errorf("trailing bits %02b: %v", bits, err)
		}
	}
}

func TestClusterID(t *testing.T) {
	for id, ok := range map[string]bool{
		"a": true, "0": true, "Site-7.example:1_x@y": true, strings.Repeat("a", 128): true,
		"": false, strings.Repeat("a", 129): false, "-a": false, ".a": false, "_a": false, "a b": false, "a/b": false,
		"a\n": false, "a#": false, "ä": false, "a\x00": false, "aé": false,
	} {
		err := CheckClusterID(id)
		if (err == nil) != ok {
			t.Errorf("%q: %v", id, err)
		}
		if err != nil && !strings.Contains(err.Error(), "1 to 128 of") {
			t.Errorf("%q: the error does not say the rule: %v", id, err)
		}
	}
}

func TestNewTokenID(t *testing.T) {
	a, b := NewTokenID(), NewTokenID()
	if !isTokenID(a) || !isTokenID(b) || a == b {
		t.Errorf("token IDs %q, %q", a, b)
	}
}

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
		{"empty", "", nil, []Token{client, upload}, ""},
		{"comments", "# site-7\n \n#" + id, nil, []Token{client}, ""},
		{"cluster", "x\nsite-7 # stolen\r\n", []Token{client, upload}, []Token{hexCluster}, ""},
		{"token", id + "#stolen", []Token{client, upload}, []Token{hexCluster}, ""},
		{"token in upper case", strings.ToUpper(id), []Token{client}, nil, ""},
		{"cluster ID like a token ID", hexCluster.ClusterID, []Token{hexCluster}, []Token{client}, ""},
		{"cluster IDs have a case", "Site-7\n" + strings.ToLower(hexCluster.ClusterID), nil, []Token{client, hexCluster}, ""},
		{"no part of an ID", "site-\n" + id[:30], nil, []Token{client}, ""},
		{"two on a line", "a\nb c", nil, nil, "line 2"},
		{"a whole token", "\n" + signToken(t, testKeys(t, 1), authToken()), nil, nil, "line 2"},
		{"too large", strings.Repeat("\n", MaxRevokedFile+1), nil, nil, "larger than 4194304"},
	} {
		r, err := ParseRevokedIDs([]byte(c.file))
		if (c.err == "") != (err == nil) || err != nil && (!strings.Contains(err.Error(), c.err) || strings.Contains(err.Error(), "tm1.")) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.err)
		}
		for _, tok := range c.revoked {
			if !r.IsRevoked(tok) {
				t.Errorf("%s: %+v is not revoked", c.name, tok)
			}
		}
		for _, tok := range c.kept {
			if r.IsRevoked(tok) || (RevokedIDs{}).IsRevoked(tok) {
				t.Errorf("%s: %+v is revoked", c.name, tok)
			}
		}
	}
}

// authTree returns each file's content and checks its mode.
func authTree(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		want := fs.FileMode(0o600)
		if e.Name() == TLSCertFile {
			want = 0o644
		}
		if info.Mode() != want {
			t.Errorf("%s has mode %v, want %v", e.Name(), info.Mode(), want)
		}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = string(data)
	}
	return files
}

func TestKeygen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "keys")
	gen := func(hosts []string, wantCreated, wantKept []string) map[string]string {
		t.Helper()
		created, kept, err := Keygen(dir, hosts, testNow)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ got, want []string }{{created, wantCreated}, {kept, wantKept}} {
			for i, name := range c.want {
				c.want[i] = filepath.Join(dir, name)
			}
			if !slices.Equal(c.got, c.want) {
				t.Errorf("reported %q, want %q", c.got, c.want)
			}
		}
		return authTree(t, dir)
	}
	if _, _, err := Keygen(dir, []string{"https://x"}, testNow); err == nil {
		t.Error("bad host accepted")
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a bad host left something behind: %v", err)
	}
	first := gen(nil, []string{ClusterKeyFile, TokenKeyFile}, nil)
	if info, err := os.Stat(dir); err != nil || info.Mode() != fs.ModeDir|0o700 {
		t.Errorf("directory: %v, %v", info.Mode(), err)
	}
	for _, name := range []string{ClusterKeyFile, TokenKeyFile} {
		if _, err := ParseKeys([]byte(first[name])); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(first) != 2 || first[ClusterKeyFile] == first[TokenKeyFile] {
		t.Errorf("files %q", first)
	}
	second := gen([]string{"hub.example"}, []string{TLSCertFile, TLSKeyFile}, []string{ClusterKeyFile, TokenKeyFile})
	third := gen([]string{"other.example"}, nil, []string{ClusterKeyFile, TokenKeyFile, TLSCertFile, TLSKeyFile})
	if len(second) != 4 || !reflect.DeepEqual(second, third) ||
		second[ClusterKeyFile] != first[ClusterKeyFile] || second[TokenKeyFile] != first[TokenKeyFile] {
		t.Errorf("a later run changed files:\n%q\n%q\n%q", first, second, third)
	}
	if _, err := tls.X509KeyPair([]byte(second[TLSCertFile]), []byte(second[TLSKeyFile])); err != nil {
		t.Error(err)
	}
	// One key gone: only that one is made again.
	if err := os.Remove(filepath.Join(dir, TokenKeyFile)); err != nil {
		t.Fatal(err)
	}
	gen(nil, []string{TokenKeyFile}, []string{ClusterKeyFile})
}

func TestKeygenHalfPair(t *testing.T) {
	for _, name := range []string{TLSCertFile, TLSKeyFile} {
		for _, hosts := range [][]string{nil, {"hub.example"}} {
			dir := t.TempDir()
			path := filepath.Join(dir, name)
			// A dangling link is as good as a file: it may point to a disk that
			// is not mounted.
			if err := os.Symlink(filepath.Join(dir, "away", "x"), path); err != nil {
				t.Fatal(err)
			}
			created, kept, err := Keygen(dir, hosts, testNow)
			if err == nil || !strings.Contains(err.Error(), path) || created != nil || kept != nil {
				t.Errorf("%s alone: %q, %q, %v", name, created, kept, err)
			}
			if entries, _ := os.ReadDir(dir); len(entries) != 1 {
				t.Errorf("%s alone: the refusal left %v", name, entries)
			}
		}
	}
}

func TestKeygenFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{file, filepath.Join(file, "sub")} {
		if _, _, err := Keygen(dir, nil, testNow); err == nil {
			t.Errorf("%s: no error", dir)
		}
	}
}

// Runs that race leave one matching set of files, made by one of them.
func TestKeygenRace(t *testing.T) {
	for range 5 {
		dir := t.TempDir()
		created := make(chan []string)
		for range 8 {
			go func() {
				names, _, _ := Keygen(dir, []string{"hub.example"}, testNow) // losers may fail
				created <- names
			}()
		}
		var all []string
		for range 8 {
			all = append(all, <-created...)
		}
		if files := authTree(t, dir); len(files) != 4 || len(all) != 4 {
			t.Errorf("%d files, reported as created: %q", len(files), all)
		}
		if _, err := tls.LoadX509KeyPair(filepath.Join(dir, TLSCertFile), filepath.Join(dir, TLSKeyFile)); err != nil {
			t.Error(err)
		}
	}
}

// Of several that create one file at once, one does, and the others get an error.
func TestCreateKeyFileNeverReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.key")
	errs := make(chan error)
	for n := range 8 {
		go func() { errs <- createKeyFile(path, []byte{byte(n)}, 0o600) }()
	}
	won := 0
	for range 8 {
		if err := <-errs; err == nil {
			won++
		} else if !errors.Is(err, fs.ErrExist) {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d of 8 writers won", won)
	}
	if files := authTree(t, filepath.Dir(path)); len(files) != 1 {
		t.Errorf("left behind: %q", files)
	}
}

func TestRotateKey(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := Keygen(dir, nil, testNow); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, TokenKeyFile)
	// As an operator's editor leaves it, and owned by the server's user.
	old := keyLine(1) + "\n# from 2024\n" + keyLine(2)
	if err := os.WriteFile(path, []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	uid := os.Getuid()
	if uid == 0 {
		uid = 12345
		if err := os.Chown(path, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	before := testKeys(t, 1, 2)
	token := signToken(t, before, authToken())
	if err := RotateKey(dir, "token"); err != nil {
		t.Fatal(err)
	}
	files := authTree(t, dir)
	if !strings.HasSuffix(files[TokenKeyFile], "\n"+old+"\n") {
		t.Errorf("rotation changed what was there: %q", files[TokenKeyFile])
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != uid {
		t.Errorf("owner is not kept: %+v", info.Sys())
	}
	after, err := ParseKeys([]byte(files[TokenKeyFile]))
	if err != nil || len(after.IDs()) != 3 || !slices.Equal(after.IDs()[1:], before.IDs()) {
		t.Fatalf("keys %v after %v: %v", after.IDs(), before.IDs(), err)
	}
	// The old token opens as long as its key is there; new ones are signed anew.
	if tok, err := after.Verify(token, testNow); err != nil || tok.KeyID != before.IDs()[0] {
		t.Errorf("old token after rotation: %+v, %v", tok, err)
	}
	if _, err := testKeys(t, 2).Verify(token, testNow); !errors.Is(err, ErrTokenForged) {
		t.Errorf("old token after its key is deleted: %v", err)
	}
	if tok, err := ParseUnverifiedToken(signToken(t, after, authToken())); err != nil || tok.KeyID != after.IDs()[0] {
		t.Errorf("new token: %+v, %v", tok, err)
	}

	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := RotateKey(dir, "token"); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
		t.Errorf("mode not kept: %v, %v", info.Mode(), err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}

	for n := 1; n < maxKeys; n++ {
		if err := RotateKey(dir, "cluster"); err != nil {
			t.Fatalf("rotation %d: %v", n, err)
		}
	}
	full := authTree(t, dir)
	if err := RotateKey(dir, "cluster"); err == nil || !strings.Contains(err.Error(), "delete old keys") {
		t.Errorf("rotation beyond 16 keys: %v", err)
	}
	for which, bad := range map[string]string{"": "", "tls": "", "../token": "", "token": "# none\n"} {
		if bad != "" {
			if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
				t.Fatal(err)
			}
			full[TokenKeyFile] = bad
		}
		if err := RotateKey(dir, which); err == nil {
			t.Errorf("rotating %q, content %q: no error", which, bad)
		}
	}
	if now := authTree(t, dir); !reflect.DeepEqual(now, full) {
		t.Errorf("refused rotations changed files:\n%q\n%q", full, now)
	}
	if err := RotateKey(t.TempDir(), "token"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("rotating nothing: %v", err)
	}
}

func TestSelfSigned(t *testing.T) {
	hosts := []string{"Hub.Example", "localhost", "my_pod-1", "1.example", "192.0.2.7", "2001:db8::7", "::ffff:192.0.2.8"}
	certPEM, keyPEM, err := SelfSignedCert(hosts, testNow)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tls.X509KeyPair(certPEM, keyPEM); err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(certPEM)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	// Peers without the pin (curl --cacert) verify it the usual way.
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	for _, at := range []time.Time{testNow, testNow.Add(-23 * time.Hour), testNow.AddDate(19, 0, 0)} {
		for _, h := range []string{"hub.example", "localhost", "my_pod-1", "1.example", "192.0.2.7", "2001:db8::7", "192.0.2.8"} {
			opts := x509.VerifyOptions{DNSName: h, Roots: roots, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
			if _, err := cert.Verify(opts); err != nil {
				t.Errorf("%s at %v: %v", h, at, err)
			}
		}
	}
	if cert.IsCA || cert.SerialNumber.Sign() <= 0 {
		t.Errorf("CA %v, serial number %v", cert.IsCA, cert.SerialNumber)
	}
	if _, _, err := SelfSignedCert(nil, testNow); err == nil {
		t.Error("no hosts: no error")
	}
	for _, h := range []string{"", " ", "hub.example:9003", "192.0.2.7:9003", "[::1]", "[::1]:9003", "https://hub.example",
		"hub.example/", "a b", "a,b", "*.example", ".a", "a.", "a..b", "-a", "a-", "bücher.example", "192.0.2.999", "10", "0.0.0.0", "::",
		"fe80::1%eth0", "a\n", strings.Repeat("a", 64), strings.Repeat("a.", 127) + "a"} {
		if _, _, err := SelfSignedCert([]string{"ok.example", h}, testNow); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", h)) {
			t.Errorf("host %q: %v", h, err)
		}
	}
}

func TestPin(t *testing.T) {
	certPEM, keyPEM, err := SelfSignedCert([]string{"a.example"}, testNow)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(pair.Leaf.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(spki)
	want := "sha256/" + base64.StdEncoding.EncodeToString(sum[:])
	if got := CertPin(pair.Leaf); got != want {
		t.Errorf("CertPin = %s, want %s", got, want)
	}
	second, _, err := SelfSignedCert([]string{"b.example"}, testNow)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		pem []byte
		ok  bool
	}{
		"certificate":       {certPEM, true},
		"key before":        {slices.Concat(keyPEM, []byte("text\n"), certPEM), true},
		"first of a chain":  {slices.Concat(certPEM, second), true},
		"empty":             {nil, false},
		"key only":          {keyPEM, false},
		"not a certificate": {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}), false},
	} {
		got, err := PinFromPEM(c.pem)
		if c.ok != (err == nil) || c.ok && got != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", "sha256/", want[7:], want + "=", want[:len(want)-1], "sha1" + want[6:], " " + want, want + "\n",
		want[:20] + "\n" + want[20:], "SHA256" + want[6:], "sha256//" + want[7:]} {
		if _, err := PinnedTLS(bad); err == nil {
			t.Errorf("pin %q accepted", bad)
		}
	}
}

func TestPinnedTLS(t *testing.T) {
	for _, c := range []struct {
		name    string
		version uint16
		issued  time.Time
		resumes bool // crypto/tls does not resume sessions of expired certificates
	}{
		{"TLS 1.2", tls.VersionTLS12, time.Now(), true},
		{"TLS 1.3", tls.VersionTLS13, time.Now(), true},
		{"expired", tls.VersionTLS13, time.Now().AddDate(-40, 0, 0), false},
	} {
		// Made for another host, or expired as well: the pin alone decides.
		certPEM, keyPEM, err := SelfSignedCert([]string{"elsewhere.example"}, c.issued)
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.X509KeyPair(certPEM, keyPEM)
		if err != nil {
			t.Fatal(err)
		}
		pin, err := PinFromPEM(certPEM)
		if err != nil {
			t.Fatal(err)
		}
		srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") }))
		srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MaxVersion: c.version}
		srv.Config.ErrorLog = log.New(io.Discard, "", 0)
		srv.StartTLS()
		defer srv.Close()

		cache := tls.NewLRUClientSessionCache(4)
		get := func(pin string, conf func(*tls.Config)) (resumed bool, err error) {
			t.Helper()
			cfg, err := PinnedTLS(pin)
			if err != nil {
				t.Fatal(err)
			}
			cfg.ClientSessionCache = cache
			if conf != nil {
				conf(cfg)
			}
			verify := cfg.VerifyConnection
			cfg.VerifyConnection = func(cs tls.ConnectionState) error {
				resumed = cs.DidResume
				return verify(cs)
			}
			tr := &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}
			defer tr.CloseIdleConnections()
			resp, err := (&http.Client{Transport: tr}).Get(srv.URL)
			if err != nil {
				return resumed, err
			}
			_, err = io.ReadAll(resp.Body)
			return resumed, errors.Join(err, resp.Body.Close())
		}
		if resumed, err := get(pin, nil); err != nil || resumed {
			t.Fatalf("%s, right pin: resumed %v, %v", c.name, resumed, err)
		}
		if resumed, err := get(pin, nil); err != nil || resumed != c.resumes {
			t.Fatalf("%s, right pin again: resumed %v, %v", c.name, resumed, err)
		}
		wrong := pinPrefix + keyLine(1)
		resumed, err := get(wrong, nil)
		if err == nil || resumed != c.resumes || !strings.Contains(err.Error(), pin) || !strings.Contains(err.Error(), wrong) {
			t.Errorf("%s, wrong pin on a resumed session: resumed %v, %v", c.name, resumed, err)
		}
		resumed, err = get(wrong, func(c *tls.Config) { c.ClientSessionCache = nil })
		if err == nil || resumed {
			t.Errorf("%s, wrong pin: resumed %v, %v", c.name, resumed, err)
		}
	}
	cfg, err := PinnedTLS(pinPrefix + keyLine(1))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.MinVersion != tls.VersionTLS12 {
		t.Errorf("minimum version %s", tls.VersionName(cfg.MinVersion))
	}
	if err := cfg.VerifyConnection(tls.ConnectionState{}); err == nil {
		t.Error("a server without a certificate is accepted")
	}
}

// A copy of the certificate without its key is worth nothing: the handshake
// proves possession although the chain is not verified.
func TestPinnedTLSNeedsKey(t *testing.T) {
	certPEM, keyPEM, err := SelfSignedCert([]string{"x"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	thief, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	victim, _, err := SelfSignedCert([]string{"x"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pin, err := PinFromPEM(victim)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(victim)
	thief.Certificate, thief.Leaf = [][]byte{block.Bytes}, nil
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		srv := httptest.NewUnstartedServer(http.NotFoundHandler())
		srv.TLS = &tls.Config{Certificates: []tls.Certificate{thief}, MaxVersion: version}
		srv.Config.ErrorLog = log.New(io.Discard, "", 0)
		srv.StartTLS()
		defer srv.Close()
		cfg, err := PinnedTLS(pin)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := tls.Dial("tcp", srv.Listener.Addr().String(), cfg)
		if err == nil {
			conn.Close()
			t.Errorf("%s: a stolen certificate is accepted without its key", tls.VersionName(version))
		} else if !strings.Contains(err.Error(), "signature") {
			t.Errorf("%s: refused for another reason: %v", tls.VersionName(version), err)
		}
	}
}

func TestReadSecret(t *testing.T) {
	for _, c := range []struct {
		name, content, want, err string
	}{
		{"plain", "s3cret", "s3cret", ""},
		{"line end", "s3cret \t\r\n\n", "s3cret", ""},
		{"inner and leading space stay", " a\nb\n", " a\nb", ""},
		{"just max and CRLF", strings.Repeat("x", 16) + "\r\n", strings.Repeat("x", 16), ""},
		{"empty", "", "", "is empty"},
		{"blank", " \n", "", "is empty"},
		{"over max", strings.Repeat("x", 17), "", "larger than 16 bytes"},
		{"more after much space", "x" + strings.Repeat(" ", 20) + "y", "", "larger than 16 bytes"},
	} {
		path := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadSecret(path, 16)
		if string(got) != c.want || (err == nil) != (c.err == "") {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
		if err != nil && (!strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.err) || strings.Contains(err.Error(), "xx")) {
			t.Errorf("%s: error %v, want the path and %q", c.name, err, c.err)
		}
	}
	for _, path := range []string{t.TempDir(), filepath.Join(t.TempDir(), "none")} {
		if _, err := ReadSecret(path, 16); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestEqualSecret(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{{"", "", true}, {"a", "a", true}, {"a", "b", false}, {"a", "aa", false}, {"", "a", false}, {"A", "a", false}} {
		if EqualSecret(c.a, c.b) != c.want || EqualSecret(c.b, c.a) != c.want {
			t.Errorf("%q, %q: not %v", c.a, c.b, c.want)
		}
	}
}

func TestBearer(t *testing.T) {
	for header, want := range map[string]string{
		"Bearer abc": "abc", "bearer abc": "abc", "BEARER   a.b-c_d~e+f/g==": "a.b-c_d~e+f/g==", "Bearer abc ": "abc", "Bearer p!w": "p!w",
		"": "", "Bearer": "", "Bearer ": "", "abc": "", "Basic abc": "", "Bearerabc": "", "Bearer\tabc": "", " Bearer abc": "",
		"Bearer a b": "", "Bearer a\tb": "", "Bearer a\x00": "", "Bearer ä": "", "Bearer, abc": "",
	} {
		got, ok := ParseBearer(header)
		if got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v; want %q", header, got, ok, want)
		}
	}
}

// FuzzToken takes each input as a token's text and, signed, as its payload, so
// that also what stands behind the signature is reached.
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
				t.Errorf("verified %q, signs as %q", s, again)
			}
			if perr != nil || !reflect.DeepEqual(parsed, tok) {
				t.Errorf("verified %+v, parsed %+v, %v", tok, parsed, perr)
			}
		} else if !errors.Is(err, ErrTokenMalformed) && !errors.Is(err, ErrTokenForged) && !errors.Is(err, ErrTokenExpired) {
			t.Errorf("%q: error of no kind: %v", s, err)
		}

		tok, err = ks.Verify(authForge(ks, s), testNow)
		if err != nil {
			return
		}
		if CheckClusterID(tok.ClusterID) != nil || !isTokenID(tok.ID) || tok.KeyID != ks.IDs()[0] {
			t.Errorf("payload %q gives %+v", s, tok)
		}
		text, err := ks.Sign(tok)
		if err != nil {
			// JSON escapes can make the same content longer, nothing else.
			if !strings.Contains(err.Error(), "longer than") || len(s) < MaxToken/16 {
				t.Errorf("payload %q verifies but does not sign: %v", s, err)
			}
			return
		}
		tok, err = ks.Verify(text, testNow)
		if err != nil || signToken(t, ks, tok) != text {
			t.Errorf("payload %q: %q does not verify to itself: %v", s, text, err)
		}
	})
}

func FuzzKeys(f *testing.F) {
	f.Add([]byte(keyLine(1)))
	f.Add([]byte("# a\r\n" + keyLine(1) + "\n\n" + keyLine(2) + "\n"))
	f.Add([]byte(keyLine(1) + "\n" + keyLine(1)))
	f.Add([]byte("AAAA\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		ks, err := ParseKeys(data)
		if err != nil {
			if len(ks.keys) != 0 {
				t.Error("keys beside an error")
			}
			return
		}
		if n := len(ks.IDs()); n < 1 || n > maxKeys {
			t.Fatalf("%d keys", n)
		}
		// One more key above changes nothing below it, as in a rotation.
		more, err := ParseKeys(append(generateKeyLine(), data...))
		if err == nil && !slices.Equal(more.IDs()[1:], ks.IDs()) {
			t.Errorf("keys %v became %v", ks.IDs(), more.IDs())
		}
		if s := signToken(t, ks, authToken()); err == nil {
			if _, err := more.Verify(s, testNow); err != nil {
				t.Error(err)
			}
		}
	})
}

func FuzzRevoked(f *testing.F) {
	f.Add([]byte("site-7 # stolen\r\n\n#x\n" + strings.Repeat("0F", 16)))
	f.Add([]byte("a b"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseRevokedIDs(data)
		if err != nil {
			if r.IsRevoked(Token{}) || len(r.clusterIDs) != 0 {
				t.Error("revocations beside an error")
			}
			return
		}
		for id := range r.clusterIDs {
			if err := CheckClusterID(id); err != nil {
				t.Errorf("%q: %v", id, err)
			}
		}
		for line := range strings.SplitSeq(string(data), "\n") {
			id, _, _ := strings.Cut(line, "#")
			id = strings.TrimSpace(id)
			if id != "" && !r.IsRevoked(Token{ClusterID: id}) || isTokenID(id) && !r.IsRevoked(Token{ID: id}) {
				t.Errorf("line %q revokes nothing", line)
			}
		}
		if r.IsRevoked(Token{}) {
			t.Error("the zero token is revoked")
		}
	})
}

func TestContentLines(t *testing.T) {
	file := "\n# all\n up \n\t{job=\"#\"}\r\n  # no\nlast{a=\"b\"}"
	got := maps.Collect(NonCommentLines([]byte(file)))
	if want := map[int]string{3: "up", 4: `{job="#"}`, 6: `last{a="b"}`}; !maps.Equal(got, want) {
		t.Errorf("lines of a file: %v, want %v", got, want)
	}
}
