package main

// Key files, the subkeys derived from them, cluster IDs, and small secret files. No secret and no
// token appears in an error. This family proves who may push; it must not know of HTTP handlers,
// flags, or the meaning of labels.

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
)

// Limits, in bytes but for maxKeys.
const (
	MaxToken       = 8 << 10
	MaxKeyFile     = 64 << 10
	MaxRevokedFile = 4 << 20

	maxKeys      = 16 // one rotation a month keeps over a year of old keys
	maxClusterID = 128
	keySize      = 32
)

// HKDF info labels. Each purpose has its own, so that one subkey (a key ID is public) says
// nothing about another.
const (
	labelToken = "telemeter token v1"
	labelKeyID = "telemeter key id v1"
)

// Keys are the keys of one key file. The first signs, every one verifies. The
// zero value has no key: it signs nothing and verifies nothing. Immutable, safe
// for concurrent use.
type Keys struct {
	keys []key
}

// A key holds its secret in closures, which fmt prints as addresses whatever the verb: a Keys
// that is logged by mistake shows nothing but IDs.
type key struct {
	id     string
	mac    func(signed string) []byte         // HMAC-SHA256 under the token subkey
	derive func(label string) ([]byte, error) // another subkey
}

// NonCommentLines yields the lines of an operator's file that are neither blank nor begin with #,
// without the blanks around them, and their numbers from 1.
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

// ParseKeys reads a key file: one key a line, standard base64 of exactly 32
// random bytes; blank lines and lines beginning with # are ignored. It takes
// 1 to 16 different keys and at most MaxKeyFile bytes. An error names the line
// and never echoes it.
func ParseKeys(data []byte) (Keys, error) {
	if len(data) > MaxKeyFile {
		return Keys{}, fmt.Errorf("key file is larger than %d bytes", MaxKeyFile)
	}
	var ks Keys
	for n, line := range NonCommentLines(data) {
		if len(ks.keys) == maxKeys {
			return Keys{}, fmt.Errorf("line %d: more than %d keys: delete old ones, which are the lowest", n, maxKeys)
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
			// A second copy would stay valid when the first is deleted.
			if hmac.Equal(o.mac(""), k.mac("")) {
				return Keys{}, fmt.Errorf("line %d: the same key stands above", n)
			}
		}
		ks.keys = append(ks.keys, k)
	}
	if len(ks.keys) == 0 {
		return Keys{}, errors.New("no key in the key file")
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

// IDs returns the public names of the keys, 8 hex digits each, the signing key's
// first.
func (ks Keys) IDs() []string {
	ids := make([]string, len(ks.keys))
	for i, k := range ks.keys {
		ids[i] = k.id
	}
	return ids
}

// Subkeys derives from each key, in the order of IDs, 32 bytes for
// purpose. No two purposes have equal texts.
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

// CheckClusterID returns an error if clusterID is not a cluster ID. The error says the rule and
// does not echo clusterID.
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

// ReadSecret reads the small file at path (a token, a salt, a key file) without the space and
// line ends after it. It is an error if nothing is left, or more than maxBytes. Errors name the
// path.
func ReadSecret(path string, maxBytes int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const lineEnd = 2 // CR LF after a secret of just max bytes
	raw, err := io.ReadAll(io.LimitReader(f, int64(maxBytes)+lineEnd+1))
	if err != nil {
		return nil, err
	}
	secret := bytes.TrimRight(raw, " \t\r\n")
	// The untrimmed length counts as well: the file may go on after the space.
	if len(secret) > maxBytes || len(raw) > maxBytes+lineEnd {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxBytes)
	}
	if len(secret) == 0 {
		return nil, fmt.Errorf("%s is empty", path)
	}
	return secret, nil
}

// EqualSecret tells whether a and b are equal. The time that it takes does not show where they
// differ, nor whether their lengths do.
func EqualSecret(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// ParseBearer returns the credential of an Authorization header's value (RFC 6750, 2.1; the scheme
// in any case). It accepts any visible ASCII and not just the RFC's base64 set, because an
// operator's own secret may hold more.
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
