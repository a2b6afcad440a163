package main

// This file implements --to-proxy: the client reaches its servers through an HTTP, HTTPS or SOCKS5
// proxy. To an https:// server the proxy only forwards bytes, so that the client still checks the
// server's certificate itself. The pin or CA of the servers is never applied to the proxy: the
// system's CAs verify an https:// proxy. Errors say that the proxy failed, and what to do.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// parseProxyURL parses the URL in --to-proxy, which has a scheme, a host and a port. Credentials in
// the URL are an error, because every user of the host can read a command line.
func parseProxyURL(s string) (*url.URL, error) {
	const want = "want http://, https:// or socks5:// with a host and a port, such as http://proxy.example:3128"
	shown := withoutCredentials(s)
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%q is not a URL: %s", shown, want)
	case u.User != nil:
		return nil, errors.New("the URL contains a user or password, which every user of this host could read: write USER:PASSWORD into a file, and add --to-proxy-user-file FILE")
	case u.Scheme != "http" && u.Scheme != "https" && u.Scheme != "socks5" && u.Scheme != "socks5h":
		return nil, fmt.Errorf("%q is not the URL of a proxy: %s", shown, want)
	case u.Hostname() == "" || u.Port() == "":
		return nil, fmt.Errorf("%q has no host or no port: %s", shown, want)
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return nil, fmt.Errorf("%q must have only a scheme, a host and a port", shown)
	}
	u.Path = ""
	return u, nil
}

// proxyError is an error of the proxy, or a timeout that may be due to the proxy. Its text says
// what to do about the proxy.
type proxyError struct{ error }

// Unwrap returns the error in e without its type.
func (e *proxyError) Unwrap() error { return e.error }

// proxyTransport is an http.RoundTripper that reaches servers through a proxy.
type proxyTransport struct {
	*http.Transport
	proxy *url.URL // the URL in --to-proxy, without credentials
	user  *url.Userinfo
}

// newProxyTransport changes t, which has made no connection yet, so that it reaches all hosts
// through proxy, and returns the RoundTripper to use instead of t. user is nil if the proxy needs
// no credentials.
func newProxyTransport(t *http.Transport, proxy *url.URL, user *url.Userinfo) *proxyTransport {
	p := &proxyTransport{Transport: t, proxy: proxy, user: user}
	through := *proxy
	through.User = user
	dial := t.DialContext
	t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, p.errorf("the proxy %s cannot be reached: %w: check that the proxy runs, and the URL in --to-proxy", proxy, err)
		}
		return conn, nil
	}
	if proxy.Scheme == "https" {
		// http.Transport would verify the proxy's certificate with TLSClientConfig, which is made
		// for the servers. So dial makes the TLS connection to the proxy, and http.Transport uses
		// this connection as one to an http:// proxy.
		through.Scheme = "http"
		plain := t.DialContext
		t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := plain(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			secure := tls.Client(conn, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: proxy.Hostname()})
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			if err := secure.HandshakeContext(ctx); err != nil {
				conn.Close()
				// err is not wrapped, because it must not be taken for an error about the server's
				// certificate.
				return nil, p.errorf("the TLS handshake with the proxy %s failed: %v: the system's CAs must verify the proxy's certificate; if the proxy speaks plain HTTP, use http:// in --to-proxy", proxy, err)
			}
			return secure, nil
		}
	}
	t.Proxy = http.ProxyURL(&through)
	t.OnProxyConnectResponse = func(_ context.Context, _ *url.URL, connect *http.Request, resp *http.Response) error {
		switch resp.StatusCode {
		case http.StatusOK:
			return nil
		case http.StatusProxyAuthRequired:
			return p.credentialsError(resp.Status)
		}
		return p.errorf("the proxy %s answered %s when asked to connect to %s: check that the proxy allows this host and port, and that it can reach them", proxy, resp.Status, connect.URL.Opaque)
	}
	return p
}

// RoundTrip sends req through the proxy. An error of the proxy is a proxyError. All other errors,
// such as those about the server's certificate, name the proxy and are wrapped.
func (p *proxyTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := p.Transport.RoundTrip(req)
	var byProxy *proxyError
	var op *net.OpError
	switch {
	case err == nil && resp.StatusCode == http.StatusProxyAuthRequired && req.URL.Scheme == "http":
		resp.Body.Close()
		return nil, p.credentialsError(resp.Status)
	case err == nil:
		return resp, nil
	case errors.As(err, &byProxy):
		return nil, byProxy
	case errors.As(err, &op) && op.Op == "socks connect": // net/http has no other mark of these errors
		if text := op.Err.Error(); strings.Contains(text, "authentication") {
			return nil, p.credentialsError(text)
		}
		return nil, p.errorf("the proxy %s did not connect to %s: %w: check that the proxy allows this host and port and can reach them, and that it is a SOCKS5 proxy", p.proxy, req.URL.Host, op.Err)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, p.errorf("through the proxy %s: %w: check the scheme and the port in --to-proxy, and that the proxy can reach the server", p.proxy, err)
	}
	return nil, fmt.Errorf("through the proxy %s: %w", p.proxy, err)
}

// credentialsError returns the error for a proxy that does not accept the credentials, or that got
// none. The parameter answer is the proxy's answer.
func (p *proxyTransport) credentialsError(answer string) error {
	if p.user == nil {
		return p.errorf("the proxy %s requires a user and a password (%s): write USER:PASSWORD into a file, and add --to-proxy-user-file FILE", p.proxy, answer)
	}
	return p.errorf("the proxy %s does not accept the user and password in --to-proxy-user-file (%s): correct the file, and send SIGHUP to the client", p.proxy, answer)
}

func (p *proxyTransport) errorf(format string, args ...any) error {
	return &proxyError{fmt.Errorf(format, args...)}
}
