package main

// This file loads the token of --token-file and chooses the servers to push to. The flags --id and
// --to take precedence over the contents of the token. A file that cannot be a token of any service
// is an error that says what the file is instead. A text that may be a token of another format
// needs --id and --to, because only a server with --authorize accepts it.

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"unicode"
)

// getToken says how to get the file of --token-file.
const getToken = "make a token on the hub with telemeter --mode token --id SITE --to https://HUB:9003 > site.token, and copy this file to the site"

// loadToken reads the file of --token-file. It returns the token's text and its contents. The flags
// --id and --to, if set, replace the cluster ID and the URLs in t. The error is a usageError if no
// cluster ID is known, or if chooseServerURLs finds a problem.
func (f *clientFlags) loadToken() (text string, t Token, err error) {
	b, err := ReadSecret(f.tokenFile, MaxToken)
	switch pathErr := (*fs.PathError)(nil); {
	case errors.Is(err, fs.ErrNotExist), err != nil && !errors.As(err, &pathErr): // missing, empty or too large
		return "", t, fmt.Errorf("--token-file %s: %w: %s", f.tokenFile, err, getToken)
	case err != nil:
		return "", t, flagError("token-file", f.tokenFile, err)
	}
	b = bytes.TrimSpace(b) // ParseUnverifiedToken ignores white space, but a header must not have it
	t, parseErr := ParseUnverifiedToken(string(b))
	if parseErr == nil && t.Kind != KindClient {
		return "", t, fmt.Errorf("--token-file %s contains a token of kind %q, not a client's token: %s", f.tokenFile, t.Kind, getToken)
	}
	if parseErr != nil {
		// A token that does not parse is not an error yet, because a server with --authorize may
		// accept tokens in another format. --id and --to must then supply the cluster ID and the
		// servers.
		if what := describeNonToken(b); what != "" {
			return "", t, fmt.Errorf("--token-file %s %s", f.tokenFile, what)
		}
		if f.id == "" || len(f.to) == 0 {
			if _, err := ParseKeys(b); err == nil {
				return "", t, fmt.Errorf("--token-file %s is a key file of the servers, which must not leave the hub, or a salt: %s", f.tokenFile, getToken)
			}
			if f.ownTokenOnly {
				return "", t, fmt.Errorf("--token-file %s contains no token of telemeter (%w): %s", f.tokenFile, parseErr, getToken)
			}
			return "", t, usageError{fmt.Sprintf("--token-file %s contains no token of telemeter (%v): %s; for a token of another kind, which a server with --authorize accepts, add --id ID and --to URL",
				f.tokenFile, parseErr, getToken)}
		}
	}
	if f.id != "" {
		t.ClusterID = f.id
	}
	servers, problems := f.chooseServerURLs(t.URLs)
	if len(problems) > 0 {
		return "", t, problems
	}
	t.URLs = servers
	return string(b), t, nil
}

// describeNonToken returns what is wrong with a file that cannot have a token of any format, and
// what to do. It returns "" if the content may be a token. The result does not quote the content,
// which may be secret.
func describeNonToken(content []byte) string {
	tokenLines := 0
	for line := range bytes.Lines(content) {
		if bytes.HasPrefix(line, []byte("tm1.")) {
			tokenLines++
		}
	}
	switch {
	case bytes.Contains(content, []byte("-----BEGIN ")):
		return "is a PEM file, such as a certificate or a private key, not a token: " + getToken
	case bytes.HasPrefix(bytes.TrimSpace(content), []byte("<")):
		return "is an HTML page, such as the error page of a download, not a token: " + getToken
	case tokenLines > 1:
		return "has several tokens: leave the line of this site's token, and delete all other lines"
	case tokenLines == 1:
		return "has other text besides the token, or a damaged token: leave the line that begins with tm1., and delete all other text; or " + getToken
	case bytes.ContainsFunc(content, func(r rune) bool { return r > unicode.MaxASCII || !unicode.IsPrint(r) || r == ' ' }):
		return "has spaces, line ends or other characters that no token has: " + getToken
	}
	return ""
}

// chooseServerURLs returns the URLs of the servers to push to: the URLs of --to if there are any,
// else tokenURLs. problems lists invalid URLs, the lack of any URL, and URLs that would send the
// token over plain HTTP to another host, which may be the proxy, without --plain-http.
func (f *clientFlags) chooseServerURLs(tokenURLs []string) (urls []string, problems usageError) {
	servers := f.to
	if len(servers) == 0 {
		for _, s := range tokenURLs {
			u, err := parseServerURL(s)
			if err != nil {
				problems = append(problems, fmt.Sprintf("--token-file %s: server URL %v", f.tokenFile, err))
				continue
			}
			servers = append(servers, u)
		}
		if len(tokenURLs) == 0 {
			problems = append(problems, "the token names no server: pass --to https://HUB:9003, or make a token with --to")
		}
	}
	for _, u := range servers {
		onHost := IsLoopbackHost(u.Hostname()) && (f.toProxy == nil || IsLoopbackHost(f.toProxy.Hostname()))
		if u.Scheme == "http" && !onHost && !f.plainHTTP {
			problems = append(problems, fmt.Sprintf("the token would be sent to %s over plain HTTP, where anybody on the network can read it: use https://, or add --plain-http to allow it", u))
		}
		urls = append(urls, u.String())
	}
	return urls, problems
}

// logSystemCAs logs that the system's CAs verify the servers, if that is so. Many hubs have a
// certificate that no CA has signed.
func (p *clientProcess) logSystemCAs() {
	if p.token.Pin != "" || p.toCAFile != "" {
		return
	}
	for _, u := range p.token.URLs {
		if strings.HasPrefix(u, "https://") {
			p.log.Info("the token has no pin, and there is no --to-ca-file, so a CA of this system must have signed the servers' certificate")
			return
		}
	}
}
