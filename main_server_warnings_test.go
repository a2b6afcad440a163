package main

// Tests of what a server prints about mistakes of its operator and of its sites.

import (
	"crypto/tls"
	"net/http"
	"strings"
	"testing"
)

// A server says once in its log what an operator must correct: a rule that is misspelled, a site with
// too many series, a client with a wrong token, with plain HTTP or without trust in the certificate,
// and a scrape with a misspelled parameter. It goes on serving the samples that it can serve.
func TestServerWarns(t *testing.T) {
	s := newModeServer(t)
	s.args = []string{"--limit-series", "2", "--elide-label", "instnce"}
	s.start()
	for range 2 {
		if status, answer := s.push(s.token, "a 1\nb 1\nc 1\n"); status != 200 || !strings.Contains(answer, `"dropped":{"series_limit":1}`) || !strings.Contains(answer, "--limit-series") {
			t.Errorf("the push got %d %s", status, answer)
		}
		s.push("garbage", "a 1\n")
		s.request(http.DefaultClient, "GET", "http://"+s.external+"/", "", "")
		s.request(&http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{}}}, "GET", "https://"+s.external+"/", "", "")
		if status, answer := s.mustRequest(http.DefaultClient, "GET", "http://"+s.internal+"/federate?cosumer=central", "first", ""); status != 400 || answer != "unknown parameter \"cosumer\": known are match[], consumer\n" {
			t.Errorf("a scrape with a misspelled parameter got %d %s", status, answer)
		}
	}
	if status, answer := s.mustRequest(http.DefaultClient, "GET", "http://"+s.internal+"/sd", "first", ""); status != 200 || !strings.Contains(answer, `"targets":["`+s.internal+`"]`) {
		t.Errorf("/sd answered %d %s, want the target %s", status, answer, s.internal)
	}
	for _, want := range []string{
		`level=INFO msg="first push of site" cluster_id=site-7 remote=127.0.0.1:`,
		`level=WARN msg="no pushed sample matches this rule: if it is not for a site that has yet to push, correct its spelling, or remove it" flag=--elide-label value=instnce samples=3`,
		`level=WARN msg="samples of new series were dropped, because the site has as many series as --limit-series allows" cluster_id=site-7 dropped=1`,
		`level=WARN msg="token refused: it is malformed; copy the whole token file to the client again" remote=127.0.0.1:`,
		`level=WARN msg="TLS handshake failed: the client sends plain HTTP; use https:// in its URL" listener=external remote=127.0.0.1:`,
		`level=WARN msg="TLS handshake failed: the client does not trust this server's certificate; `,
		`level=WARN msg="scrape refused: correct the scrape configuration" remote=127.0.0.1:`,
	} {
		eventually(t, "the log has "+want, func() bool { return strings.Contains(s.log.String(), want) })
		if n := strings.Count(s.log.String(), want); n != 1 {
			t.Errorf("the log has %d times %s:\n%s", n, want, s.log.String())
		}
	}
}
