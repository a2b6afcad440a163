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
	"unicode"
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
		err = fmt.Errorf("%s is larger than %d bytes: it is probably another file than you meant", path, max)
	}
	return b, err
}

// readKeyFile reads the key file named file in dir, the directory of --keys.
func readKeyFile(dir, file string) (Keys, error) {
	path := filepath.Join(dir, file)
	b, err := readSmallFile(path, MaxKeyFile)
	if err != nil {
		return Keys{}, keysError(dir, err)
	}
	keys, err := ParseKeys(b)
	if err != nil {
		return Keys{}, fmt.Errorf("--keys %s: reading %s: %w: restore the file from a copy, such as the one on another server", dir, path, err)
	}
	return keys, nil
}

// keysError returns the error of reading a key file in dir, the directory of --keys. If the file is
// missing, the path is probably mistyped: whoever then creates keys has a second set of keys, which
// the other servers and the sites do not know.
func keysError(dir string, err error) error {
	if errors.Is(err, os.ErrNotExist) {
		begins := ""
		if wd, wdErr := os.Getwd(); wdErr == nil && !filepath.IsAbs(dir) {
			begins = fmt.Sprintf(" (a relative path begins at %s)", wd)
		}
		return fmt.Errorf("--keys %s: %w: correct --keys%s; for the first server only, create the keys with telemeter --mode keygen --keys %s --host NAME; for another server, copy them from the first", dir, err, begins, dir)
	}
	return flagError("keys", dir, err)
}

// readRevoked returns the IDs in the revocation file at path, or no IDs if path is "".
func readRevoked(path string) (RevokedIDs, error) {
	if path == "" {
		return RevokedIDs{}, nil
	}
	b, err := readSmallFile(path, MaxRevokedFile)
	if err != nil {
		return RevokedIDs{}, flagError("revoked-file", path, err)
	}
	revoked, err := ParseRevokedIDs(b)
	if err != nil {
		return RevokedIDs{}, fmt.Errorf("--revoked-file %s: %w: correct the line", path, err)
	}
	return revoked, nil
}

// readOptionalSecret returns the secret in the file at path, the value of the flag --flag, or nil if
// path is empty. A secret of more than MaxToken bytes is an error.
func readOptionalSecret(flag, path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	secret, err := ReadSecret(path, MaxToken)
	if errors.Is(err, ErrEmptySecret) {
		err = fmt.Errorf("%w: write the secret into it", err)
	}
	return secret, flagError(flag, path, err)
}

// readUserFile returns the user and the password in the file at path, the value of the flag --flag,
// which has one line USER:PASSWORD. The password may contain colons. Errors never quote the file.
func readUserFile(flag, path string) (*url.Userinfo, error) {
	line, err := readOptionalSecret(flag, path)
	if err != nil {
		return nil, err
	}
	user, password, ok := strings.Cut(string(line), ":")
	if !ok || user == "" || strings.ContainsFunc(string(line), unicode.IsControl) {
		return nil, fmt.Errorf("--%s %s: want exactly one line of the form USER:PASSWORD", flag, path)
	}
	return url.UserPassword(user, password), nil
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
// the value of the flag --flag, which has one selector per line. If file is "", it returns given. A
// file without any selector is an error.
func readSelectors(given Selectors, flag, file string) (Selectors, error) {
	if file == "" {
		return given, nil
	}
	b, err := readSmallFile(file, maxRulesFile)
	if err != nil {
		return nil, flagError(flag, file, err)
	}
	var lines []string
	for _, line := range NonCommentLines(b) {
		lines = append(lines, line)
	}
	if len(lines) == 0 {
		return nil, fmt.Errorf("--%s %s contains no selector: write one selector per line, such as {job=\"node\"}, or remove the flag", flag, file)
	}
	more, err := parseSelectors(lines, "", "")
	return slices.Concat(given, more), flagError(flag, file, err)
}

// parseSelectors parses selectors like ParseSelectors. Errors show an example between the quotes
// open and end.
func parseSelectors(texts []string, open, end string) (Selectors, error) {
	s, err := ParseSelectors(texts)
	if err != nil {
		err = fmt.Errorf("%w: write a selector like up or %s{job=\"node\"}%s", err, open, end)
	}
	return s, err
}

// readCAs returns a pool of the CA certificates in the PEM file at path, the value of the flag
// --flag.
func readCAs(flag, path string) (*x509.CertPool, error) {
	b, err := readSmallFile(path, maxRulesFile)
	if err != nil {
		return nil, flagError(flag, path, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("--%s %s contains no PEM certificate: name a file with lines -----BEGIN CERTIFICATE-----", flag, path)
	}
	return pool, nil
}

// withoutCredentials returns the text of a URL for a message. It replaces all text before the last @,
// which may be a password, even if the text is not a valid URL.
func withoutCredentials(text string) string {
	if at := strings.LastIndex(text, "@"); at >= 0 {
		return "…" + text[at:]
	}
	return text
}

// parseHTTPURL parses s, which must be an http:// or https:// URL with a host and without a
// fragment. Errors contain no password.
func parseHTTPURL(s string) (*url.URL, error) {
	shown := withoutCredentials(s)
	u, err := url.Parse(s)
	switch {
	case !strings.Contains(s, "://"):
		return nil, fmt.Errorf("%q does not begin with http:// or https://", shown)
	case err != nil:
		return nil, fmt.Errorf("%q is not a URL, such as https://hub.example:9003", shown)
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("%q has the scheme %s: use http:// or https://", shown, u.Scheme)
	case u.Hostname() == "":
		return nil, fmt.Errorf("%q has no host: write the host after %s://", shown, u.Scheme)
	case strings.Contains(s, "#"):
		return nil, fmt.Errorf("%q has a fragment, which is not sent: remove the part from # on", shown)
	case u.ForceQuery:
		return nil, fmt.Errorf("%q has an empty query: remove the ? at its end", shown)
	}
	return u, nil
}

// parseServerURL parses the URL of a server, which has a scheme, a host and an optional port. A
// path other than /, a query or credentials are an error.
func parseServerURL(s string) (*url.URL, error) {
	u, err := parseHTTPURL(s)
	if err != nil {
		return nil, err
	}
	bare := &url.URL{Scheme: u.Scheme, Host: u.Host}
	switch {
	case u.User != nil:
		return nil, fmt.Errorf("%q contains credentials, but the token is the only credential of a site: use %s", u.Redacted(), bare)
	case u.RawQuery != "" || strings.Trim(u.Path, "/") != "":
		return nil, fmt.Errorf("%q must have only a scheme, a host and a port: use %s", u, bare)
	}
	return bare, nil
}
