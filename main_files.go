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

// readFile reads a file of at most max bytes.
func ReadFile(path string, max int) ([]byte, error) {
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

func ReadKeys(dir, name string) (Keys, error) {
	path := filepath.Join(dir, name)
	b, err := ReadFile(path, MaxKeyFile)
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

// readSelectors parses selectors of flags and of a file with one a line.
func ReadSelectors(texts []string, file string) (Selectors, error) {
	if file != "" {
		b, err := ReadFile(file, MaxFile)
		if err != nil {
			return nil, fmt.Errorf("reading selectors: %w", err)
		}
		lines := SelectorLines(b)
		if len(lines) == 0 {
			return nil, fmt.Errorf("%s holds no selector", file)
		}
		texts = slices.Concat(texts, lines)
	}
	return ParseSelectors(texts)
}

func ReadCAs(path string) (*x509.CertPool, error) {
	b, err := ReadFile(path, MaxFile)
	if err != nil {
		return nil, fmt.Errorf("reading CA certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s holds no PEM certificate", path)
	}
	return pool, nil
}

func IsLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// baseURL parses the address of a server: no path, no credentials.
func BaseURL(s string) (*url.URL, error) {
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
