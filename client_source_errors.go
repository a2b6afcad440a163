package main

// This file explains a failed scrape of the source: it adds to the error what the operator can do.
// The advice names the flag that is probably wrong. A cause that the operator cannot change by a
// flag, such as a connection that is reset, gets no advice.

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"html"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"syscall"
)

// adviceOnURL is for an answer that does not come from a Prometheus or an exporter.
const adviceOnURL = "check --from: a URL without a path is asked for /federate; with a path, it must be the whole URL of a Prometheus's /federate or of an exporter's /metrics"

const maxTitlePage = 4 << 10 // bytes of a web page that are searched for its title

var pageTitle = regexp.MustCompile(`(?is)<title[^>]*>([^<]*)`)

// tlsAlert is how net/http quotes the answer of a TLS port to a request over plain HTTP.
const tlsAlert = `malformed HTTP response "\x15\x03`

// adviseOnSource returns the error err of a request to the source, with advice if there is any.
func adviseOnSource(err error) error {
	if advice := sourceAdvice(err); advice != "" {
		return fmt.Errorf("%w: %s", err, advice)
	}
	return err
}

func sourceAdvice(err error) string {
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	var dns *net.DNSError
	var timeout net.Error
	var request *url.Error
	switch {
	case errors.Is(err, http.ErrSchemeMismatch):
		return "the source speaks plain HTTP: write http:// in --from"
	case strings.Contains(err.Error(), tlsAlert):
		return "the source speaks TLS: write https:// in --from"
	case errors.As(err, &unknown):
		return "name the file of the CA that signed the source's certificate in --from-ca-file"
	case errors.As(err, &name):
		return "use a host name in --from that is in the source's certificate"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "renew the source's certificate, or set the clock of this machine"
	case strings.Contains(err.Error(), "remote error: tls: certificate required"), strings.Contains(err.Error(), "remote error: tls: bad certificate"),
		strings.Contains(err.Error(), "remote error: tls: unknown certificate"):
		return "the source wants a client certificate that it trusts: use --from-crt and --from-key"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nothing listens there: start the source, or correct the host and port in --from"
	case errors.As(err, &dns) && dns.IsNotFound:
		return "correct the host in --from"
	case errors.Is(err, io.EOF) && errors.As(err, &request) && strings.HasPrefix(request.URL, "http://"):
		return "the source closed the connection without an answer: if it speaks TLS, write https:// in --from"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "the source is down or too slow: if it must collect many series, select fewer with --match, or allow more time with a longer --scrape-interval (up to a minute)"
	}
	return ""
}

// checkSourceAnswer returns an error unless resp can be an answer with samples: its status is 200
// and it is not a web page. It reads the beginning of the body, which resp then still has.
func checkSourceAnswer(resp *http.Response) error {
	start, err := io.ReadAll(io.LimitReader(resp.Body, maxTitlePage))
	if err != nil && resp.StatusCode == http.StatusOK {
		return fmt.Errorf("reading the answer: %w", adviseOnSource(err))
	}
	resp.Body = io.NopCloser(io.MultiReader(bytes.NewReader(start), resp.Body)) // scrape closes the body that it got
	isPage := isWebPage(resp.Header.Get("Content-Type"), start)
	if resp.StatusCode == http.StatusOK && !isPage {
		return nil
	}
	described := ""
	switch {
	case !isPage:
		described = describeResponse(resp)
	case pageTitle.Match(start):
		title := strings.Join(strings.Fields(html.UnescapeString(string(pageTitle.FindSubmatch(start)[1]))), " ")
		described = resp.Status + " with a web page titled " + strconv.QuoteToGraphic(title[:min(len(title), 100)])
	default:
		described = resp.Status + " with a web page"
	}
	if advice := answerAdvice(resp, isPage, start); advice != "" {
		described += ": " + advice
	}
	return fmt.Errorf("the source answered %s", described)
}

// isWebPage reports whether an answer with this content type and beginning is HTML. No line of text
// exposition begins with <, but a body of protobuf can.
func isWebPage(contentType string, start []byte) bool {
	isText := contentType == "" || strings.HasPrefix(contentType, "text/plain")
	return strings.Contains(strings.ToLower(contentType), "html") || isText && bytes.HasPrefix(bytes.TrimSpace(start), []byte("<"))
}

// answerAdvice returns what the operator can do about an answer of the source that has no samples.
func answerAdvice(resp *http.Response, isPage bool, start []byte) string {
	switch sent := resp.Request != nil && resp.Request.Header.Get("Authorization") != ""; {
	case resp.StatusCode == http.StatusBadRequest && IsAnswerOfTLSPort(string(start)):
		return "the source speaks TLS: write https:// in --from"
	case (resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden) && sent:
		return "the source does not accept these credentials: replace the contents of --from-token-file or --from-user-file"
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden:
		return "the source wants credentials: use --from-token-file or --from-user-file"
	case resp.StatusCode == http.StatusNotFound, resp.StatusCode == http.StatusMethodNotAllowed:
		return adviceOnURL
	case resp.StatusCode == http.StatusOK && isPage:
		return adviceOnURL + "; if the page asks for a login, use --from-token-file or --from-user-file"
	}
	return ""
}
