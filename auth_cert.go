package main

// This file makes the servers' TLS certificate, and the pin by which clients recognize it. A pin is
// a hash of the public key, so that a renewed certificate for the same key keeps its pin.

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// CheckHost returns an error if host cannot be in a certificate.
func CheckHost(host string) error {
	if a, err := netip.ParseAddr(host); err == nil && a.Zone() == "" && !a.IsUnspecified() || err != nil && isHostname(host) {
		return nil
	}
	return fmt.Errorf("host %q: want a DNS name or an IP address that clients connect to, without scheme, port or brackets", host)
}

// SelfSignedCert makes an ECDSA P-256 key (PKCS #8) and a self-signed server certificate for hosts,
// both PEM-encoded. Each host is a DNS name or an IP address, without scheme, port or brackets. The
// certificate is valid as certForKey describes.
func SelfSignedCert(hosts []string, now time.Time) (certPEM, keyPEM []byte, err error) {
	if keyPEM, err = newTLSKey(); err != nil {
		return nil, nil, err
	}
	certPEM, err = certForHosts(keyPEM, hosts, now)
	return certPEM, keyPEM, err
}

// certForHosts makes a certificate like that of SelfSignedCert for a key that newTLSKey made.
func certForHosts(keyPEM []byte, hosts []string, now time.Time) (certPEM []byte, err error) {
	if len(hosts) == 0 {
		return nil, errors.New("a certificate needs at least one host")
	}
	var names []string
	var ips []net.IP
	for _, h := range hosts {
		if err := CheckHost(h); err != nil {
			return nil, err
		}
		if a, err := netip.ParseAddr(h); err == nil {
			ips = append(ips, a.AsSlice())
		} else {
			names = append(names, strings.ToLower(h))
		}
	}
	return certForKey(keyPEM, names, ips, now)
}

// newTLSKey returns a new ECDSA P-256 key, PEM-encoded in PKCS #8.
func newTLSKey() (keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generating a TLS key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding the TLS key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// certForKey makes a self-signed server certificate for a key that newTLSKey made. names and ips are
// the hosts of the certificate. It is valid from one day before now, so that programs that check the
// dates (curl --cacert) accept it at once even if their clocks lag by up to a day. It is valid for
// 20 years, because clients that use the pin ignore the dates: they check only the pin.
func certForKey(keyPEM []byte, names []string, ips []net.IP, now time.Time) (certPEM []byte, err error) {
	b, _ := pem.Decode(keyPEM)
	if b == nil {
		return nil, errors.New("no private key in the PEM data")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		return nil, errors.New("the private key is not in the form PKCS #8") // the cause is dropped, because it may quote the key
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, errors.New("the private key cannot sign a certificate")
	}
	tmpl := &x509.Certificate{ // x509.CreateCertificate chooses a random serial number, because SerialNumber is nil
		Subject:               pkix.Name{CommonName: "telemeter"},
		NotBefore:             now.Add(-24 * time.Hour),
		NotAfter:              now.AddDate(20, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		DNSNames:              names,
		IPAddresses:           ips,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("signing the certificate: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// isHostname reports whether h is a valid host name by RFC 1123. Unlike the RFC it allows
// underscores, because container names have them. It refuses a name whose last label is all digits,
// because such a name is mostly a mistyped IP address.
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

// CertPin returns the pin of cert's public key: "sha256/" followed by the standard base64 of the
// SHA-256 of SubjectPublicKeyInfo (RFC 7469, section 2.4). A renewed certificate for the same key
// has the same pin.
func CertPin(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return pinPrefix + base64.StdEncoding.EncodeToString(sum[:])
}

// PinFromPEM returns the pin of the first certificate in certPEM. In a server's certificate chain
// the first certificate is the server's own.
func PinFromPEM(certPEM []byte) (string, error) {
	cert, err := firstCert(certPEM)
	if err != nil {
		return "", err
	}
	return CertPin(cert), nil
}

// firstCert returns the first certificate in certPEM.
func firstCert(certPEM []byte) (*x509.Certificate, error) {
	for {
		var b *pem.Block
		if b, certPEM = pem.Decode(certPEM); b == nil {
			return nil, errors.New("no certificate in the PEM data")
		}
		if b.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parsing the certificate: %w", err)
		}
		return cert, nil
	}
}

// checkPinFormat returns an error unless pin has the form that CertPin returns.
func checkPinFormat(pin string) error {
	b64, ok := strings.CutPrefix(pin, pinPrefix)
	sum, err := base64.StdEncoding.Strict().DecodeString(b64)
	if !ok || err != nil || len(sum) != sha256.Size || strings.ContainsAny(b64, "\r\n") {
		return fmt.Errorf("not a pin: want %q and the base64 of %d bytes", pinPrefix, sha256.Size)
	}
	return nil
}

// ErrOtherPin is wrapped by the error of a TLS handshake with a server that has another key than
// the pin given to PinnedTLS.
var ErrOtherPin = errors.New("server's certificate does not match the pin")

// PinnedTLS returns a TLS client configuration that accepts a server only if it holds the private
// key of a public key with one of pins. The configuration requires TLS 1.2 or newer. The caller owns
// it and may set ServerName, a session cache or client certificates. An error means that one of pins
// is not in the form of a pin.
func PinnedTLS(pins ...string) (*tls.Config, error) {
	for _, pin := range pins {
		if err := checkPinFormat(pin); err != nil {
			return nil, err
		}
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// InsecureSkipVerify disables the checks of the certificate chain and the host name.
		// VerifyConnection checks the pin instead, which identifies the server's key itself. A full
		// handshake still proves that the server holds the certificate's private key.
		InsecureSkipVerify: true,
		// VerifyConnection is used because crypto/tls does not call VerifyPeerCertificate when it
		// resumes a session. With VerifyPeerCertificate, a cached session would stay valid after a
		// change of the pin.
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return errors.New("server sent no certificate")
			}
			got := CertPin(cs.PeerCertificates[0])
			if !slices.Contains(pins, got) { // pins are hashes of public keys, so the time of the comparison reveals nothing
				return fmt.Errorf("%w: it has pin %s, want %s", ErrOtherPin, got, strings.Join(pins, " or "))
			}
			return nil
		},
	}, nil
}
