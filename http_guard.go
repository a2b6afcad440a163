package main

// This file refuses requests that neither a scraper nor an operator sends. Any web page that a
// browser on the same host shows can send requests to a listener on a loopback address: directly,
// or under the page's own host name, if the page's DNS server answers with a loopback address (DNS
// rebinding). A request with a body makes the server hold memory for nothing.

import (
	"fmt"
	"net"
	"net/http"
	"strings"
)

// IsLoopbackHost reports whether host is "localhost" or a loopback IP address. It does not resolve
// host names.
func IsLoopbackHost(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// IsOnLoopback reports whether l is bound to a loopback address. A listener that is bound to all
// addresses is not.
func IsOnLoopback(l net.Listener) bool {
	host, _, _ := net.SplitHostPort(l.Addr().String())
	return IsLoopbackHost(host)
}

// RefuseForeignRequests returns a handler that passes requests to h, except these: a request with a
// body gets 413, and its body is not read. A request that a page of another site made a browser send
// gets 403, unless a user follows a link to the status page. If onLoopback is true, a request for a
// host other than localhost, a name below localhost or a loopback address gets 421; onLoopback must be
// true only if the listener is bound to a loopback address. Each refused request closes its connection
// and is counted by instrument under the name "refused".
func RefuseForeignRequests(onLoopback bool, instrument func(name string, h http.Handler) http.Handler, h http.Handler) http.Handler {
	refuse := instrument("refused", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		status, reason := reasonToRefuse(r, onLoopback)
		w.Header().Set("Connection", "close") // without it, net/http would read the body before it answers
		http.Error(w, reason, status)
	}))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status, _ := reasonToRefuse(r, onLoopback); status != 0 {
			refuse.ServeHTTP(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// NoBodyText is the answer 413 of RefuseForeignRequests to a request that has a body.
const NoBodyText = "requests to this listener must have no body"

// reasonToRefuse returns the status and the text with which RefuseForeignRequests refuses r. The
// status is 0 if it does not refuse r.
func reasonToRefuse(r *http.Request, onLoopback bool) (status int, reason string) {
	switch {
	case r.ContentLength != 0: // -1 for a body in chunks
		return http.StatusRequestEntityTooLarge, NoBodyText
	case r.Header.Get("Sec-Fetch-Site") == "cross-site" && !followsLinkToPage(r):
		return http.StatusForbidden, "this listener does not answer requests that come from a page of another site"
	case onLoopback && !isLocalHostHeader(r.Host):
		return http.StatusMisdirectedRequest, fmt.Sprintf("this listener is bound to a loopback address, so it answers only to localhost and to loopback addresses, not to the host %.100q", r.Host)
	}
	return 0, ""
}

// followsLinkToPage reports whether a browser sends a request because its user followed a link to the
// status page, such as the link on the page of another member. Such a request changes nothing, and a
// page with the link cannot read the answer. A page that shows the status page in a frame does not
// count.
func followsLinkToPage(r *http.Request) bool {
	return r.Method == http.MethodGet && r.URL.Path == "/" && r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document"
}

// isLocalHostHeader reports whether the Host header of a request names this host itself: localhost,
// a name that ends in .localhost, or a loopback IP address, each with or without a port. An empty
// Host, which only HTTP/1.0 allows, is accepted too, because browsers never send it.
func isLocalHostHeader(hostPort string) bool {
	host, _, err := net.SplitHostPort(hostPort)
	if err != nil { // there is no port
		host = strings.TrimSuffix(strings.TrimPrefix(hostPort, "["), "]")
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	return hostPort == "" || IsLoopbackHost(host) || strings.HasSuffix(host, ".localhost")
}
