package main

// This file parses key files, derives subkeys from the keys, checks cluster IDs, and reads small
// secret files. No error of the auth family quotes a key, a token or the content of a file. The
// auth family proves which site may push. It must not know of HTTP handlers, of the values of flags,
// or of the meaning of a token's labels. Its errors may name the command that an operator must run.

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"strings"
)

// Names of the files in a --keys directory.
const (
	ClusterKeyFile = "cluster.key"
	TokenKeyFile   = "token.key"
	TLSCertFile    = "tls.crt"
	TLSKeyFile     = "tls.key"
	IssuedFile     = "issued.jsonl"
)

// Limits of tokens, key files, revocation files, lists of issued tokens and cluster IDs.
const (
	MaxToken       = 8 << 10  // bytes of a token's text form
	MaxKeyFile     = 64 << 10 // bytes of a key file
	MaxRevokedFile = 4 << 20  // bytes of a revocation file
	MaxIssuedFile  = 32 << 20 // bytes of a list of issued tokens, enough for about 100,000 tokens

	maxKeys      = 16  // keys in a key file; with monthly rotation, an old key stays valid for over a year
	maxClusterID = 128 // bytes of a cluster ID
	keySize      = 32  // bytes of a key, before base64
)

// Labels for the info parameter of HKDF (RFC 5869). Each purpose of a subkey has its own label, so
// that no subkey reveals anything about another. In particular, a key's ID, which is public,
// reveals nothing about its token subkey.
const (
	labelToken = "telemeter token v1"
	labelKeyID = "telemeter key id v1"
)

// Keys holds the keys of one key file. New tokens, packets and messages are signed or sealed with
// the first key by default. Every key can verify or open them. The zero value has no key: it signs
// nothing and verifies nothing. Keys is immutable and safe for concurrent use.
type Keys struct {
	keys []key
}

// A key keeps its secret inside closures. No verb of fmt prints what a closure has captured. So a
// Keys value that is logged by mistake shows key IDs but no secret.
type key struct {
	id     string                             // public ID of the key: 8 hex digits
	mac    func(signed string) []byte         // returns the HMAC-SHA256 of signed under the token subkey
	derive func(label string) ([]byte, error) // returns the 32-byte subkey for an HKDF label
}

// NonCommentLines yields the trimmed lines of a file that an operator wrote. It yields each line
// with its number in the file, counted from 1. It skips blank lines and lines that begin with #.
func NonCommentLines(data []byte) iter.Seq2[int, string] {
	return func(yield func(n int, line string) bool) {
		n := 0
		for line := range strings.Lines(string(data)) {
			n++
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' && !yield(n, line) {
				return
			}
		}
	}
}

// ParseKeys parses a key file. Each line holds one key: the standard base64 of exactly 32 random
// bytes. Blank lines and lines that begin with # are ignored. The file must hold 1 to 16 keys, all
// different, in at most MaxKeyFile bytes. An error about a line gives its number and never quotes
// it.
func ParseKeys(data []byte) (Keys, error) {
	if len(data) > MaxKeyFile {
		return Keys{}, fmt.Errorf("key file is larger than %d bytes", MaxKeyFile)
	}
	var ks Keys
	for n, line := range NonCommentLines(data) {
		if len(ks.keys) == maxKeys {
			return Keys{}, fmt.Errorf("line %d: more than %d keys: delete the oldest keys, which are the lowest lines", n, maxKeys)
		}
		secret, err := base64.StdEncoding.Strict().DecodeString(line)
		if err != nil || len(secret) != keySize {
			return Keys{}, fmt.Errorf("line %d: not a key: want the base64 of %d bytes", n, keySize)
		}
		k, err := newKey(secret)
		if err != nil {
			return Keys{}, fmt.Errorf("line %d: deriving subkeys: %w", n, err)
		}
		for _, o := range ks.keys {
			// Refuse a duplicate key: it would stay valid after the operator deletes one of its two
			// lines.
			if hmac.Equal(o.mac(""), k.mac("")) {
				return Keys{}, fmt.Errorf("line %d: duplicate of a key above", n)
			}
		}
		ks.keys = append(ks.keys, k)
	}
	if len(ks.keys) == 0 {
		return Keys{}, errors.New("key file contains no key")
	}
	return ks, nil
}

func newKey(secret []byte) (key, error) {
	id, err := hkdf.Key(sha256.New, secret, nil, labelKeyID, 4)
	if err != nil {
		return key{}, err
	}
	sub, err := hkdf.Key(sha256.New, secret, nil, labelToken, sha256.Size)
	if err != nil {
		return key{}, err
	}
	return key{id: hex.EncodeToString(id), mac: func(signed string) []byte {
		h := hmac.New(sha256.New, sub)
		io.WriteString(h, signed)
		return h.Sum(nil)
	}, derive: func(label string) ([]byte, error) {
		return hkdf.Key(sha256.New, secret, nil, label, keySize)
	}}, nil
}

// IDs returns the public ID of each key, 8 hex digits, in the order of the key file. The ID of the
// signing key comes first.
func (ks Keys) IDs() []string {
	ids := make([]string, len(ks.keys))
	for i, k := range ks.keys {
		ids[i] = k.id
	}
	return ids
}

// Subkeys derives a 32-byte subkey from each key, in the order of the key file. purpose is the HKDF
// label of these subkeys. Each purpose must have its own text, which no other purpose uses.
func (ks Keys) Subkeys(purpose string) ([][]byte, error) {
	subkeys := make([][]byte, len(ks.keys))
	for i, k := range ks.keys {
		var err error
		if subkeys[i], err = k.derive(purpose); err != nil {
			return nil, err
		}
	}
	return subkeys, nil
}

// CheckClusterID returns an error if clusterID is not a valid cluster ID. The error states what a
// valid cluster ID looks like and does not quote clusterID.
func CheckClusterID(clusterID string) error {
	ok := 0 < len(clusterID) && len(clusterID) <= maxClusterID && isAlnum(clusterID[0])
	for i := 1; ok && i < len(clusterID); i++ {
		ok = isAlnum(clusterID[i]) || strings.IndexByte("._:@-", clusterID[i]) >= 0
	}
	if !ok {
		return fmt.Errorf("not a cluster ID: want 1 to %d of A-Z a-z 0-9 . _ : @ - with a letter or digit first", maxClusterID)
	}
	return nil
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// ErrEmptySecret is the error of ReadSecret for a file without a secret, wrapped in an error that
// names the file.
var ErrEmptySecret = errors.New("is empty")

// ReadSecret returns the content of the small file at path (a token, a salt, a key file) without
// trailing spaces, tabs and line ends. It returns an error if the remaining content is empty or
// longer than maxBytes, or if the whole file is longer than maxBytes plus 2 bytes for a line end.
// Errors name the path.
func ReadSecret(path string, maxBytes int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const lineEnd = 2 // bytes of CR LF, which may follow a secret of exactly maxBytes
	raw, err := io.ReadAll(io.LimitReader(f, int64(maxBytes)+lineEnd+1))
	if err != nil {
		return nil, err
	}
	secret := bytes.TrimRight(raw, " \t\r\n")
	// Check the length before trimming too. If the limit of the reader cut the file within white
	// space, TrimRight removed that white space, but the file may hold more text after it.
	if len(secret) > maxBytes || len(raw) > maxBytes+lineEnd {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxBytes)
	}
	if len(secret) == 0 {
		return nil, fmt.Errorf("%s %w", path, ErrEmptySecret)
	}
	return secret, nil
}

// EqualSecret reports whether a and b are equal. It compares the hashes of a and b in constant
// time. So its running time may depend on the lengths of a and b, but not on the bytes in which
// they differ.
func EqualSecret(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// ParseBearer returns the credential in the value of an Authorization header with the scheme
// "Bearer" (RFC 6750, section 2.1). The scheme may be in any letter case. ParseBearer returns false
// for any other value. The credential may hold all visible ASCII characters, not only the RFC's
// base64 set, because a secret that the operator chose may contain others.
func ParseBearer(header string) (string, bool) {
	scheme, credential, _ := strings.Cut(header, " ")
	credential = strings.Trim(credential, " ")
	if !strings.EqualFold(scheme, "Bearer") || credential == "" {
		return "", false
	}
	for i := range len(credential) {
		if credential[i] <= ' ' || credential[i] > '~' {
			return "", false
		}
	}
	return credential, true
}
