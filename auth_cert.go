package main

// The servers' certificate, and the pin by which clients know it. A pin covers the public key,
// so that a renewed certificate keeps its pin.

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// SelfSignedCert makes an ECDSA P-256 key (PKCS #8) and a server certificate for
// hosts: DNS names and IP addresses, without scheme, port or brackets. It is
// valid from a day before now, for peers whose clocks lag, and for 20 years:
// clients pin the key and look at no date.
func SelfSignedCert(hosts []string, now time.Time) (certPEM, keyPEM []byte, err error) {
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
		} else if err != nil && isHostname(h) {
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

// isHostname applies RFC 1123, but also allows underscores, which container
// names have. A last label of digits alone is a mistyped address.
func isHostname(h string) bool {
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

func checkPinFormat(pin string) error {
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
	if err := checkPinFormat(pin); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// This skips the chain to a trusted root and the host name; the pin says more than
		// either. The handshake still proves that the peer holds the certificate's key.
		InsecureSkipVerify: true,
		// VerifyPeerCertificate is not called when a session is resumed, so a cached session
		// would stay valid after a change of the pin.
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
