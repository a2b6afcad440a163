package main

// Tests of certificates and pins: a client with a pin accepts exactly the servers that hold the
// pinned key, on resumed sessions too.

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

// A self-signed certificate matches its key. A client that has the certificate instead of its pin
// (curl --cacert) can verify it in the usual way, for each of its hosts, from 23 hours before it is
// made until 19 years later.
func TestSelfSignedCert(t *testing.T) {
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
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	for _, at := range []time.Time{testNow, testNow.Add(-23 * time.Hour), testNow.AddDate(19, 0, 0)} {
		for _, h := range []string{"hub.example", "localhost", "my_pod-1", "1.example", "192.0.2.7", "2001:db8::7", "192.0.2.8"} {
			opts := x509.VerifyOptions{DNSName: h, Roots: roots, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
			if _, err := cert.Verify(opts); err != nil {
				t.Errorf("verifying the certificate for %s at %v: %v", h, at, err)
			}
		}
	}
	if cert.IsCA || cert.SerialNumber.Sign() <= 0 {
		t.Errorf("certificate authority: %v, serial number %v; want no authority and a positive number", cert.IsCA, cert.SerialNumber)
	}
}

// SelfSignedCert refuses an invalid host and quotes it. It also refuses an empty list of hosts.
func TestSelfSignedCertRefusesHosts(t *testing.T) {
	if _, _, err := SelfSignedCert(nil, testNow); err == nil {
		t.Error("no hosts: got no error")
	}
	for _, h := range []string{"", " ", "hub.example:9003", "192.0.2.7:9003", "[::1]", "[::1]:9003", "https://hub.example",
		"hub.example/", "a b", "a,b", "*.example", ".a", "a.", "a..b", "-a", "a-", "bücher.example", "192.0.2.999", "10", "0.0.0.0", "::",
		"fe80::1%eth0", "a\n", strings.Repeat("a", 64), strings.Repeat("a.", 127) + "a"} {
		if _, _, err := SelfSignedCert([]string{"ok.example", h}, testNow); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", h)) {
			t.Errorf("host %q: got error %v, want one that quotes the host", h, err)
		}
	}
}

// selfSigned makes a certificate for host with SelfSignedCert at the time issued. It returns the
// certificate and its key as PEM and as a pair for crypto/tls, and the certificate's pin.
func selfSigned(t *testing.T, host string, issued time.Time) (certPEM, keyPEM []byte, pair tls.Certificate, pin string) {
	t.Helper()
	certPEM, keyPEM, err := SelfSignedCert([]string{host}, issued)
	if err != nil {
		t.Fatal(err)
	}
	if pair, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		t.Fatal(err)
	}
	return certPEM, keyPEM, pair, CertPin(pair.Leaf)
}

// A pin is the SHA-256 of the certificate's public key. PinFromPEM returns the pin of the first
// certificate, and an error if there is no valid certificate.
func TestPin(t *testing.T) {
	certPEM, keyPEM, pair, pin := selfSigned(t, "a.example", testNow)
	second, _, _, _ := selfSigned(t, "b.example", testNow)
	spki, err := x509.MarshalPKIXPublicKey(pair.Leaf.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(spki)
	if want := "sha256/" + base64.StdEncoding.EncodeToString(sum[:]); pin != want {
		t.Errorf("CertPin = %s, want %s", pin, want)
	}
	for name, c := range map[string]struct {
		pem []byte
		ok  bool
	}{
		"certificate":               {certPEM, true},
		"key and text before":       {slices.Concat(keyPEM, []byte("text\n"), certPEM), true},
		"chain of two certificates": {slices.Concat(certPEM, second), true},
		"empty":                     {nil, false},
		"only a key":                {keyPEM, false},
		"invalid certificate":       {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}), false},
	} {
		got, err := PinFromPEM(c.pem)
		if c.ok != (err == nil) || c.ok && got != pin {
			t.Errorf("%s: got pin %q and error %v, want success: %v, with pin %s", name, got, err, c.ok, pin)
		}
	}
}

// PinnedTLS refuses a pin that does not have exactly the form of a pin.
func TestPinnedTLSRefusesBadPins(t *testing.T) {
	_, _, _, pin := selfSigned(t, "a.example", testNow)
	for _, bad := range []string{"", "sha256/", pin[7:], pin + "=", pin[:len(pin)-1], "sha1" + pin[6:], " " + pin, pin + "\n",
		pin[:20] + "\n" + pin[20:], "SHA256" + pin[6:], "sha256//" + pin[7:]} {
		if _, err := PinnedTLS(bad); err == nil {
			t.Errorf("PinnedTLS accepts the pin %q", bad)
		}
	}
}

// startTLS starts an HTTPS server with the certificate and key in pair. The server answers "ok" to
// every request and is closed at the end of the test.
func startTLS(t *testing.T, pair tls.Certificate, maxVersion uint16) *httptest.Server {
	t.Helper()
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") }))
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MaxVersion: maxVersion}
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

// getPinned sends a GET request to url on a new connection, with the configuration of
// PinnedTLS(pin) and the session cache. It reports whether the connection resumed a TLS session of
// the cache.
func getPinned(t *testing.T, url, pin string, cache tls.ClientSessionCache) (resumed bool, err error) {
	t.Helper()
	cfg, err := PinnedTLS(pin)
	if err != nil {
		t.Fatal(err)
	}
	cfg.ClientSessionCache = cache
	verify := cfg.VerifyConnection
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		resumed = cs.DidResume
		return verify(cs)
	}
	tr := &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Get(url)
	if err != nil {
		return resumed, err
	}
	_, err = io.ReadAll(resp.Body)
	return resumed, errors.Join(err, resp.Body.Close())
}

// A client with a pin accepts exactly the servers with this pin, whatever the host and the dates of
// their certificates. It checks the pin on a new TLS session and on a resumed TLS session.
func TestPinnedTLS(t *testing.T) {
	for _, c := range []struct {
		name    string
		version uint16
		issued  time.Time
		resumes bool // whether the second connection resumes; crypto/tls does not resume a session with an expired certificate
	}{
		{"TLS 1.2", tls.VersionTLS12, time.Now(), true},
		{"TLS 1.3", tls.VersionTLS13, time.Now(), true},
		{"expired certificate", tls.VersionTLS13, time.Now().AddDate(-40, 0, 0), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, pair, pin := selfSigned(t, "elsewhere.example", c.issued)
			url := startTLS(t, pair, c.version).URL
			cache := tls.NewLRUClientSessionCache(4)
			if resumed, err := getPinned(t, url, pin, cache); err != nil || resumed {
				t.Fatalf("right pin, first connection: resumed %v, error %v", resumed, err)
			}
			if resumed, err := getPinned(t, url, pin, cache); err != nil || resumed != c.resumes {
				t.Fatalf("right pin, second connection: resumed %v, error %v; want resumed %v", resumed, err, c.resumes)
			}
			wrong := pinPrefix + keyLine(1)
			resumed, err := getPinned(t, url, wrong, cache)
			if err == nil || resumed != c.resumes || !strings.Contains(err.Error(), pin) || !strings.Contains(err.Error(), wrong) {
				t.Errorf("wrong pin, third connection: resumed %v, error %v; want resumed %v and an error with both pins", resumed, err, c.resumes)
			}
			if resumed, err := getPinned(t, url, wrong, nil); err == nil || resumed {
				t.Errorf("wrong pin, new session: resumed %v, error %v; want an error", resumed, err)
			}
		})
	}
}

// A pinned client requires TLS 1.2, and refuses a server without a certificate.
func TestPinnedTLSConfig(t *testing.T) {
	cfg, err := PinnedTLS(pinPrefix + keyLine(1))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.MinVersion != tls.VersionTLS12 {
		t.Errorf("minimum version is %s, want TLS 1.2", tls.VersionName(cfg.MinVersion))
	}
	if err := cfg.VerifyConnection(tls.ConnectionState{}); err == nil {
		t.Error("a server without a certificate is accepted")
	}
}

// A server that has a copy of the pinned certificate, but not the certificate's private key, is
// refused. The handshake proves possession of the private key, although the chain is not verified.
func TestPinnedTLSNeedsKey(t *testing.T) {
	_, _, thief, _ := selfSigned(t, "x", time.Now())
	_, _, victim, pin := selfSigned(t, "x", time.Now())
	thief.Certificate, thief.Leaf = victim.Certificate, nil
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		srv := startTLS(t, thief, version)
		cfg, err := PinnedTLS(pin)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := tls.Dial("tcp", srv.Listener.Addr().String(), cfg)
		if err == nil {
			conn.Close()
			t.Errorf("%s: a copied certificate is accepted without its key", tls.VersionName(version))
		} else if !strings.Contains(err.Error(), "signature") {
			t.Errorf("%s: got error %v, want one about the signature", tls.VersionName(version), err)
		}
	}
}
