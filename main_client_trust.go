package main

// This file says what to do about failures of connections between a client and its servers. A failure
// of TLS that only a person can mend, such as a certificate that does not match the token's pin, is
// a DeniedError. A connection that cannot be made gets advice, but is no DeniedError, because the
// failure may end by itself. Other failures are passed on unchanged.

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
)

// trustTransport is an http.RoundTripper that returns a DeniedError if the client does not trust
// the server, or if the server does not trust the client's certificate. It adds advice to the error
// of a connection that cannot be made.
type trustTransport struct {
	next   http.RoundTripper
	caFile string // of --to-ca-file
	trustAdvice
}

// trustAdvice has the parts of the advice on a server that is not trusted that depend on the mode.
type trustAdvice struct {
	pinOwner string // what has the pin, such as "the token"
	renew    string // how to get the pin of new keys
	again    string // how to use a flag or a file that has changed
}

// clientTrustAdvice is the trustAdvice of a client.
var clientTrustAdvice = trustAdvice{"the token", RenewToken, "send this client SIGHUP"}

func (t trustTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(req)
	if err == nil {
		return resp, nil
	}
	if advice := t.advice(err); advice != "" {
		return nil, &DeniedError{Err: err, Advice: advice}
	}
	if isDialError(err) {
		return nil, fmt.Errorf("%w: check the address in --to or in the token, that something listens there, and that no firewall is in the way", err)
	}
	return nil, err
}

// isDialError reports whether err means that no connection to a server could be made: its name was
// not found, or its address refused the connection or did not answer in time. An error of the proxy
// has advice of its own.
func isDialError(err error) bool {
	var byProxy *proxyError
	var op *net.OpError
	return !errors.As(err, &byProxy) && errors.As(err, &op) && op.Op == "dial"
}

// advice returns what a person must do about the error of a request. It returns "" if the error is
// not about trust. An error of the proxy has advice of its own.
func (t trustTransport) advice(err error) string {
	if byProxy := (*proxyError)(nil); errors.As(err, &byProxy) {
		return ""
	}
	var (
		unknown x509.UnknownAuthorityError
		host    x509.HostnameError
		invalid x509.CertificateInvalidError
	)
	switch text := err.Error(); {
	case errors.Is(err, ErrOtherPin):
		return "the certificate of the hub does not match " + t.pinOwner + "'s pin: either someone intercepts the connection, or the hub has new keys; if it has, " + t.renew
	case errors.As(err, &unknown) && t.caFile != "":
		return "no CA in --to-ca-file " + t.caFile + " has signed the server's certificate: replace the file with the server's certificate or its CA, and " + t.again
	case errors.As(err, &unknown):
		return "no CA of this system has signed the server's certificate, and " + t.pinOwner + " has no pin: restart with --to-ca-file and a copy of the server's tls.crt; or, to get the pin, " + t.renew
	case errors.As(err, &host):
		return "the server's certificate is for other names: use one of them in --to, or make a certificate for this name with telemeter --mode keygen --host; or use a token that has the pin of the certificate"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "renew the server's certificate if it has expired, and correct the clock of this machine if it is wrong"
	case errors.As(err, &invalid):
		return "replace the server's certificate, or use a token that has the pin of the certificate"
	case strings.Contains(text, "remote error: tls:") && strings.Contains(text, "certificate"):
		return "the server refuses the client's certificate, or wants one: check --to-crt and --to-key, which a CA of the server's --tls-client-ca must have signed"
	}
	return ""
}
