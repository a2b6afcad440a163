package main

// This file reads files that flags name (keys, secrets, selectors, CA certificates), warns of
// secrets that every user may read, and parses the URLs that flags contain. Every read in this file
// is bounded, because an operator can name a wrong file that is huge.

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxRulesFile bounds a file of selectors or certificates, in bytes.
const maxRulesFile = 4 << 20

// readSmallFile returns the contents of the file at path. A file of more than max bytes is an
// error.
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

// readKeyFile reads the key file named file in dir, the directory of --keys.
func readKeyFile(dir, file string) (Keys, error) {
	path := filepath.Join(dir, file)
	b, err := readSmallFile(path, MaxKeyFile)
	if errors.Is(err, os.ErrNotExist) {
		return Keys{}, fmt.Errorf("%w: create it with telemeter --mode keygen --keys %s", err, dir)
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

// readOptionalSecret returns the secret in the file at path, or nil if path is empty. A secret of
// more than MaxToken bytes is an error. The parameter what names the secret in error texts.
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

// warnOfReadableSecrets logs a warning for each of the files that every user may read according to
// its mode. For a symbolic link, the mode of the target counts. Paths that are empty or lead to no
// file are skipped, because reading the file reports them.
func warnOfReadableSecrets(log *slog.Logger, paths ...string) {
	for _, path := range paths {
		info, err := os.Stat(path)
		if err == nil && info.Mode()&0o004 != 0 {
			log.Warn("the mode of a secret file lets every user read it: run chmod o-r on the file", "file", path, "mode", fmt.Sprintf("%04o", info.Mode().Perm()))
		}
	}
}

// readSelectors returns the selectors in given, followed by the selectors in the file named file,
// which has one selector per line. If file is "", it returns given. A file without any selector is
// an error.
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
		return nil, fmt.Errorf("selector file %s contains no selector", file)
	}
	more, err := ParseSelectors(lines)
	return slices.Concat(given, more), err
}

// readCAs returns a pool of the CA certificates in the PEM file at path.
func readCAs(path string) (*x509.CertPool, error) {
	b, err := readSmallFile(path, maxRulesFile)
	if err != nil {
		return nil, fmt.Errorf("reading CA certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("CA file %s contains no PEM certificate", path)
	}
	return pool, nil
}

// parseHTTPURL parses s, which must be an http:// or https:// URL with a host.
func parseHTTPURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%s is not an http:// or https:// URL", s)
	}
	return u, nil
}

// parseServerURL parses the URL of a server, which has a scheme, a host and an optional port. A
// path other than /, a query or credentials are an error.
func parseServerURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%q is not a URL", s)
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return nil, fmt.Errorf("%q is not an http:// or https:// URL with a host", s)
	case u.User != nil || u.RawQuery != "" || strings.Trim(u.Path, "/") != "":
		return nil, fmt.Errorf("%q must have only a scheme, a host and a port", s)
	}
	u.Path = ""
	return u, nil
}
