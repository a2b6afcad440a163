// auth.go: who may push, and how that is proven. Key files and the subkeys
// derived from them, signed tokens, revocation, certificate pins, small secret
// files.
//
// Invariants: no secret and no token ever appears in an error; nothing a token
// says is parsed before its signature is checked (ParseToken, for a token's own
// holder, apart); one token has one spelling; no existing key is overwritten or
// left half written. It must not know HTTP handlers, flags, or what labels mean.
package main

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
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

// HKDF info labels. Each purpose has its own, so that what one subkey gives
// away (a key ID is public) says nothing about another.
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

// A key holds its secret in a closure, which fmt prints as an address whatever
// the verb: a Keys that strays into a log line shows nothing but IDs.
type key struct {
	id     string
	sum    func(signed string) []byte         // HMAC-SHA256 under the token subkey
	derive func(label string) ([]byte, error) // another subkey
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
	n := 0
	for line := range bytes.Lines(data) {
		n++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		if len(ks.keys) == maxKeys {
			return Keys{}, fmt.Errorf("line %d: more than %d keys: delete old ones, which are the lowest", n, maxKeys)
		}
		secret, err := base64.StdEncoding.Strict().DecodeString(string(line))
		if err != nil || len(secret) != keySize {
			return Keys{}, fmt.Errorf("line %d: not a key: want the base64 of %d bytes", n, keySize)
		}
		k, err := newKey(secret)
		if err != nil {
			return Keys{}, fmt.Errorf("line %d: deriving subkeys: %w", n, err)
		}
		for _, o := range ks.keys {
			// A second copy would survive the deletion of the first.
			if hmac.Equal(o.sum(""), k.sum("")) {
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
	return key{id: hex.EncodeToString(id), sum: func(signed string) []byte {
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

// Subkeys derives from each key, in the order of IDs, 32 bytes for the purpose
// that label names. No two purposes share a label.
func (ks Keys) Subkeys(label string) ([][]byte, error) {
	subkeys := make([][]byte, len(ks.keys))
	for i, k := range ks.keys {
		var err error
		if subkeys[i], err = k.derive(label); err != nil {
			return nil, err
		}
	}
	return subkeys, nil
}

// Keygen fills dir (created 0700 if missing) with the key files it lacks, and
// when hosts are given with a TLS key and a certificate for them. Nothing that
// exists is overwritten: kept lists what was there already, created what is new,
// also when an error ends it early. One of tls.crt and tls.key without the other
// is an error before anything is written.
func Keygen(dir string, hosts []string, now time.Time) (created, kept []string, err error) {
	crt, tlsKey := filepath.Join(dir, TLSCertFile), filepath.Join(dir, TLSKeyFile)
	var pair []string
	for _, path := range []string{crt, tlsKey} {
		// Lstat: a dangling link is somebody's file too.
		if _, err := os.Lstat(path); err == nil {
			pair = append(pair, path)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, err
		}
	}
	if len(pair) == 1 {
		return nil, nil, fmt.Errorf("%s is half of a pair: restore the other half, or delete it", pair[0])
	}
	var crtPEM, keyPEM []byte
	if len(hosts) > 0 {
		// Also when it is not needed, so that a bad host is always told.
		if crtPEM, keyPEM, err = SelfSigned(hosts, now); err != nil {
			return nil, nil, err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	for _, name := range []string{ClusterKeyFile, TokenKeyFile} {
		path := filepath.Join(dir, name)
		switch err := install(path, newKeyLine(), 0o600, nil, os.Link); {
		case err == nil:
			created = append(created, path)
		case errors.Is(err, fs.ErrExist):
			kept = append(kept, path)
		default:
			return created, kept, err
		}
	}
	if len(hosts) == 0 {
		return created, kept, nil
	}
	if len(pair) == 2 {
		return created, append(kept, pair...), nil
	}
	// The key first: of two racing runs only the one whose key won goes on to
	// write a certificate, so the pair always matches.
	if err := install(tlsKey, keyPEM, 0o600, nil, os.Link); err != nil {
		return created, kept, err
	}
	if err := install(crt, crtPEM, 0o644, nil, os.Link); err != nil {
		os.Remove(tlsKey) // useless alone, and the next run would refuse it
		return created, kept, err
	}
	return append(created, crt, tlsKey), kept, nil
}

// RotateKey puts a new key first into dir's "cluster" or "token" key file; the
// old ones stay below it and still verify. The file is replaced atomically and
// keeps its mode and owner (root may rotate the key of a server that is not
// root). Of two rotations at once, one may be lost; no old key ever is.
func RotateKey(dir, which string) error {
	if which != "cluster" && which != "token" {
		return fmt.Errorf("cannot rotate %q: want cluster or token", which)
	}
	path := filepath.Join(dir, which+".key")
	old, err := ReadSecret(path, MaxKeyFile)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	ks, err := ParseKeys(old)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	data := append(append(newKeyLine(), old...), '\n')
	if len(ks.keys) == maxKeys || len(data) > MaxKeyFile {
		return fmt.Errorf("%s is full (%d keys, %d bytes): delete old keys, which are the lowest lines, and rotate again", path, maxKeys, MaxKeyFile)
	}
	return install(path, data, info.Mode().Perm(), info, os.Rename)
}

func newKeyLine() []byte {
	secret := make([]byte, keySize)
	rand.Read(secret) // never fails since Go 1.24
	return append(base64.StdEncoding.AppendEncode(nil, secret), '\n')
}

// install writes data beside path, syncs it and then gives it its name by place:
// os.Link never replaces (fs.ErrExist), os.Rename always does. Either way the
// name never stands for a part of the data. A non-nil like lends its owner.
func install(path string, data []byte, mode fs.FileMode, like fs.FileInfo, place func(from, to string) error) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // 0600 from the start
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if like != nil {
		if st, ok := like.Sys().(*syscall.Stat_t); ok {
			err = f.Chown(int(st.Uid), int(st.Gid))
		}
	}
	// Chmod because the umask is not ours to trust. All of them run, so that the
	// file is always closed; the first failure is the one told.
	_, werr := f.Write(data)
	if err := cmp.Or(err, werr, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := place(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return cmp.Or(d.Sync(), d.Close())
}

// SelfSigned makes an ECDSA P-256 key (PKCS #8) and a server certificate for
// hosts: DNS names and IP addresses, without scheme, port or brackets. It is
// valid from a day before now, for peers whose clocks lag, and for 20 years:
// clients pin the key and look at no date.
func SelfSigned(hosts []string, now time.Time) (certPEM, keyPEM []byte, err error) {
	if len(hosts) == 0 {
		return nil, nil, errors.New("a certificate needs at least one host")
	}
	tmpl := &x509.Certificate{ // no serial number: a random one is filled in
		Subject:               pkix.Name{CommonName: "telemeter"},
		NotBefore:             now.Add(-24 * time.Hour),
		NotAfter:              now.AddDate(20, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	for _, h := range hosts {
		if a, err := netip.ParseAddr(h); err == nil && a.Zone() == "" && !a.IsUnspecified() {
			tmpl.IPAddresses = append(tmpl.IPAddresses, a.AsSlice())
		} else if err != nil && validHostname(h) {
			tmpl.DNSNames = append(tmpl.DNSNames, strings.ToLower(h))
		} else {
			return nil, nil, fmt.Errorf("host %q: want a DNS name or an IP address that clients connect to, without scheme, port or brackets", h)
		}
	}
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generating a TLS key: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, priv.Public(), priv)
	if err != nil {
		return nil, nil, fmt.Errorf("signing the certificate: %w", err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		return nil, nil, fmt.Errorf("encoding the TLS key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
}

// validHostname applies RFC 1123, but also allows underscores, which container
// names have. A last label of digits alone is a mistyped address.
func validHostname(h string) bool {
	if len(h) > 253 {
		return false
	}
	labels := strings.Split(h, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for i := range len(l) {
			if !isAlnum(l[i]) && l[i] != '-' && l[i] != '_' {
				return false
			}
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}

const pinPrefix = "sha256/"

// CertPin returns the certificate's public key pin: "sha256/" and the standard
// base64 of SHA-256 over SubjectPublicKeyInfo (RFC 7469, 2.4). A renewed
// certificate for the same key has the same pin.
func CertPin(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return pinPrefix + base64.StdEncoding.EncodeToString(sum[:])
}

// PinFromPEM returns the pin of the first certificate, which in a server's
// chain is its own.
func PinFromPEM(certPEM []byte) (string, error) {
	for {
		var b *pem.Block
		if b, certPEM = pem.Decode(certPEM); b == nil {
			return "", errors.New("no certificate in the PEM data")
		}
		if b.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return "", fmt.Errorf("parsing the certificate: %w", err)
		}
		return CertPin(cert), nil
	}
}

func validPin(pin string) error {
	b64, ok := strings.CutPrefix(pin, pinPrefix)
	sum, err := base64.StdEncoding.Strict().DecodeString(b64)
	if !ok || err != nil || len(sum) != sha256.Size || strings.ContainsAny(b64, "\r\n") {
		return fmt.Errorf("not a pin: want %q and the base64 of %d bytes", pinPrefix, sha256.Size)
	}
	return nil
}

// PinnedTLS returns a client configuration, TLS 1.2 or newer, that accepts any
// server that holds the key with this pin and no other. The caller owns it and
// may set ServerName, a session cache or client certificates.
func PinnedTLS(pin string) (*tls.Config, error) {
	if err := validPin(pin); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// What this skips is the way from the certificate to a trusted root and
		// to the host name; the pin is a stronger statement than either. The
		// handshake still proves that the peer holds the certificate's key.
		InsecureSkipVerify: true,
		// Not VerifyPeerCertificate: that one is not called when a session is
		// resumed, so a cached session would outlive a change of pin.
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return errors.New("server shows no certificate")
			}
			got := CertPin(cs.PeerCertificates[0])
			if subtle.ConstantTimeCompare([]byte(got), []byte(pin)) != 1 {
				return fmt.Errorf("server's certificate has pin %s, not %s: not the expected server, or its TLS key was replaced", got, pin)
			}
			return nil
		},
	}, nil
}

// Kinds of token: what an operator gives a site, and what /authorize answers.
const (
	KindClient = "client"
	KindUpload = "upload"
)

// Why Verify refuses.
var (
	ErrTokenMalformed = errors.New("malformed token")
	ErrTokenForged    = errors.New("token is not signed by a known key")
	ErrTokenExpired   = errors.New("token has expired")
)

const tokenPrefix = "tm1."

// A Token says who may push and where to. Its text form is
//
//	tm1.<base64url(JSON)>.<base64url(HMAC-SHA256 over all before this dot)>
//
// without padding. What it says is public to its holder; the signature makes it
// a credential. Fields added later are ignored here, kinds added later refused.
// URLs and labels are bounded by the token's length alone; their rules are the
// minter's to apply.
type Token struct {
	KeyID   string            `json:"key"`     // of the key that signed
	Kind    string            `json:"kind"`    // KindClient or KindUpload
	Cluster string            `json:"cluster"` // a valid cluster ID
	URLs    []string          `json:"urls,omitempty"`
	Pin     string            `json:"pin,omitempty"` // of the servers' certificate; see CertPin
	Labels  map[string]string `json:"labels,omitempty"`
	Issued  int64             `json:"issued"`            // Unix seconds; only told, never judged
	Expires int64             `json:"expires,omitempty"` // Unix seconds; 0 = until revoked
	ID      string            `json:"id"`                // NewTokenID; an upload token has its client token's
}

// Sign returns t's text form, signed by the first key, whose ID it takes for
// t.KeyID. Errors: no key, a field against the rules, longer than MaxToken.
func (ks Keys) Sign(t Token) (string, error) {
	if len(ks.keys) == 0 {
		return "", errors.New("signing a token: no key")
	}
	k := ks.keys[0]
	t.KeyID = k.id
	if err := t.check(); err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	payload, err := json.Marshal(t) // sorts labels: equal tokens have equal text
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	signed := tokenPrefix + base64.RawURLEncoding.EncodeToString(payload)
	s := signed + "." + base64.RawURLEncoding.EncodeToString(k.sum(signed))
	if len(s) > MaxToken {
		return "", fmt.Errorf("signing a token: longer than %d bytes: give it fewer URLs or labels", MaxToken)
	}
	return s, nil
}

// Verify returns what a token says if one of the keys signed it and it has not
// expired at now. Space around it is ignored. The errors are ErrTokenMalformed,
// ErrTokenForged and ErrTokenExpired, wrapped. Revocation and whether the kind
// and cluster are the wanted ones is the caller's to check.
func (ks Keys) Verify(s string, now time.Time) (Token, error) {
	signed, payload, mac, err := splitToken(s)
	if err != nil {
		return Token{}, err
	}
	// Every key is tried, rather than the one the payload names, so that nothing
	// unsigned is ever parsed. At most 16 HMACs over 8 KiB: far less than the TLS
	// handshake before them.
	for _, k := range ks.keys {
		if !hmac.Equal(mac, k.sum(signed)) {
			continue
		}
		t, err := decodeToken(payload)
		if err != nil {
			return Token{}, err
		}
		if t.KeyID != k.id {
			return Token{}, malformed("it names another key than the one that signed it")
		}
		if t.Expires != 0 && now.Unix() >= t.Expires {
			return Token{}, fmt.Errorf("%w on %s", ErrTokenExpired, time.Unix(t.Expires, 0).UTC().Format(time.RFC3339))
		}
		return t, nil
	}
	return Token{}, ErrTokenForged
}

// ParseToken returns what a token says without checking its signature or expiry:
// for its holder, who has no key. Space around it is ignored. The error is
// ErrTokenMalformed, wrapped.
func ParseToken(s string) (Token, error) {
	_, payload, _, err := splitToken(s)
	if err != nil {
		return Token{}, err
	}
	return decodeToken(payload)
}

// splitToken takes a token's text apart without believing any of it.
func splitToken(s string) (signed string, payload, mac []byte, err error) {
	s = strings.TrimSpace(s)
	if len(s) > MaxToken {
		return "", nil, nil, malformed(fmt.Sprintf("longer than %d bytes", MaxToken))
	}
	body, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		return "", nil, nil, malformed("does not begin with " + tokenPrefix)
	}
	p, m, ok := strings.Cut(body, ".")
	// Strict refuses stray trailing bits, but every decoder of encoding/base64
	// skips line ends: either would give one token several spellings.
	if !ok || strings.ContainsAny(s, "\r\n") {
		return "", nil, nil, malformed("want three parts between dots, on one line")
	}
	enc := base64.RawURLEncoding.Strict()
	if payload, err = enc.DecodeString(p); err != nil {
		return "", nil, nil, malformed("payload is not base64url")
	}
	if mac, err = enc.DecodeString(m); err != nil || len(mac) != sha256.Size {
		return "", nil, nil, malformed(fmt.Sprintf("signature is not the base64url of %d bytes", sha256.Size))
	}
	return s[:len(s)-len(m)-1], payload, mac, nil
}

func decodeToken(payload []byte) (Token, error) {
	var t Token
	if json.Unmarshal(payload, &t) != nil { // its error can quote the payload
		return Token{}, malformed("payload is not the JSON of a token")
	}
	if err := t.check(); err != nil {
		return Token{}, malformed(err.Error())
	}
	return t, nil
}

func malformed(why string) error { return fmt.Errorf("%w: %s", ErrTokenMalformed, why) }

// check holds for every token that Sign makes and that Verify or ParseToken
// returns.
func (t Token) check() error {
	if t.Kind != KindClient && t.Kind != KindUpload {
		return fmt.Errorf("unknown kind: want %s or %s", KindClient, KindUpload)
	}
	if err := ValidClusterID(t.Cluster); err != nil {
		return err
	}
	if !isTokenID(t.ID) {
		return errors.New("token ID is not 32 lower-case hex digits")
	}
	if t.Pin != "" {
		return validPin(t.Pin)
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

// ValidClusterID tells whether id may name a cluster; the error says the rule
// and does not echo id.
func ValidClusterID(id string) error {
	ok := 0 < len(id) && len(id) <= maxClusterID && isAlnum(id[0])
	for i := 1; ok && i < len(id); i++ {
		ok = isAlnum(id[i]) || strings.IndexByte("._:@-", id[i]) >= 0
	}
	if !ok {
		return fmt.Errorf("not a cluster ID: want 1 to %d of A-Z a-z 0-9 . _ : @ - with a letter or digit first", maxClusterID)
	}
	return nil
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// Revoked is a set of token IDs and cluster IDs. The zero value revokes nothing.
// Immutable, safe for concurrent use.
type Revoked struct {
	tokens   map[string]struct{}
	clusters map[string]struct{}
}

// ParseRevoked reads a revocation file of at most MaxRevokedFile bytes: a token
// ID or a cluster ID a line, # begins a comment. 32 hex digits, in either case,
// are both a token ID and a cluster ID: with 128 random bits a token ID meets no
// cluster ID by accident. An error names the line.
func ParseRevoked(data []byte) (Revoked, error) {
	if len(data) > MaxRevokedFile {
		return Revoked{}, fmt.Errorf("revocation file is larger than %d bytes", MaxRevokedFile)
	}
	r := Revoked{tokens: map[string]struct{}{}, clusters: map[string]struct{}{}}
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		id, _, _ := strings.Cut(line, "#")
		if id = strings.TrimSpace(id); id == "" {
			continue
		}
		if err := ValidClusterID(id); err != nil {
			return Revoked{}, fmt.Errorf("line %d: neither a token ID (32 hex digits, not the token itself) nor a cluster ID", n)
		}
		r.clusters[id] = struct{}{}
		if low := strings.ToLower(id); isTokenID(low) {
			r.tokens[low] = struct{}{}
		}
	}
	return r, nil
}

// Has tells whether t is revoked, by its own ID (for an upload token, that of
// its client token) or by its cluster's.
func (r Revoked) Has(t Token) bool {
	_, token := r.tokens[t.ID]
	_, cluster := r.clusters[t.Cluster]
	return token || cluster
}

// ReadSecret reads the small file at path (a token, a salt, a key file) without
// the space and line ends after it. Nothing left, or more than max bytes, is an
// error. Errors name the path.
func ReadSecret(path string, max int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const lineEnd = 2 // CR LF after a secret of just max bytes
	raw, err := io.ReadAll(io.LimitReader(f, int64(max)+lineEnd+1))
	if err != nil {
		return nil, err
	}
	secret := bytes.TrimRight(raw, " \t\r\n")
	// By the untrimmed length too: there may be more after the space.
	if len(secret) > max || len(raw) > max+lineEnd {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, max)
	}
	if len(secret) == 0 {
		return nil, fmt.Errorf("%s is empty", path)
	}
	return secret, nil
}

// EqualSecret compares in a time that tells nothing of where, or whether in
// length, the two differ.
func EqualSecret(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// Bearer returns the credential of an Authorization header's value (RFC 6750,
// 2.1; the scheme in any case). It takes any visible ASCII, not just the RFC's
// base64 set, as an operator's own secret may hold more.
func Bearer(header string) (string, bool) {
	scheme, cred, _ := strings.Cut(header, " ")
	cred = strings.Trim(cred, " ")
	if !strings.EqualFold(scheme, "Bearer") || cred == "" {
		return "", false
	}
	for i := range len(cred) {
		if cred[i] <= ' ' || cred[i] > '~' {
			return "", false
		}
	}
	return cred, true
}
