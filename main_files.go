package main

// The files and addresses that flags name: keys, selectors, certificates, URLs. Sizes are
// bounded, because an operator may name the wrong file.

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxRulesFile bounds a file of selectors or certificates, in bytes.
const maxRulesFile = 4 << 20

// readSmallFile reads a file of at most max bytes.
func readSmallFile(path string, max int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(max)+1))
	if err == nil && len(b) > max {
		err = fmt.Errorf("%s is larger than %d bytes", path, max)
	}
	return b, err
}

// readKeyFile reads a key file in the directory of keys.
func readKeyFile(dir, file string) (Keys, error) {
	path := filepath.Join(dir, file)
	b, err := readSmallFile(path, MaxKeyFile)
	if errors.Is(err, os.ErrNotExist) {
		return Keys{}, fmt.Errorf("%w; telemeter --mode keygen --keys %s makes it", err, dir)
	}
	if err != nil {
		return Keys{}, fmt.Errorf("reading key file: %w", err)
	}
	keys, err := ParseKeys(b)
	if err != nil {
		return Keys{}, fmt.Errorf("reading %s: %w", path, err)
	}
	return keys, nil
}

// readOptionalSecret reads a secret of at most MaxToken bytes; nil if no file is named. what says in
// an error what the file has.
func readOptionalSecret(path, what string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	secret, err := ReadSecret(path, MaxToken)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", what, err)
	}
	return secret, nil
}

// readSelectors returns the selectors given and those of a file with one a line, if it is named.
func readSelectors(given Selectors, file string) (Selectors, error) {
	if file == "" {
		return given, nil
	}
	b, err := readSmallFile(file, maxRulesFile)
	if err != nil {
		return nil, fmt.Errorf("reading selectors: %w", err)
	}
	var lines []string
	for _, line := range NonCommentLines(b) {
		lines = append(lines, line)
	}
	if len(lines) == 0 {
		return nil, fmt.Errorf("%s holds no selector", file)
	}
	more, err := ParseSelectors(lines)
	return slices.Concat(given, more), err
}

// readCAs reads a file of CA certificates.
func readCAs(path string) (*x509.CertPool, error) {
	b, err := readSmallFile(path, maxRulesFile)
	if err != nil {
		return nil, fmt.Errorf("reading CA certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s holds no PEM certificate", path)
	}
	return pool, nil
}

// isLoopback reports whether a host is this one, as far as its name says.
func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// parseHTTPURL parses an http:// or https:// URL with a host.
func parseHTTPURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%s is not an http:// or https:// URL", s)
	}
	return u, nil
}

// parseServerURL parses the URL of a server: it has no path and no credentials.
func parseServerURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%q is not a URL", s)
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return nil, fmt.Errorf("%q is not an http:// or https:// URL with a host", s)
	case u.User != nil || u.RawQuery != "" || strings.Trim(u.Path, "/") != "":
		return nil, fmt.Errorf("%q has more than scheme, host and port", s)
	}
	u.Path = ""
	return u, nil
}
