package main

// This file has the failures that only a person can mend: a server does not let this client in, or
// this client does not trust the server. Their errors say what the person must do. Nothing is
// dropped from the spool meanwhile, and another server may still take the scrapes. Failures of TLS
// are recognized by the family main, which returns a DeniedError from ClientConfig.ToClient.

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
)

const (
	// ReplaceToken says how to replace the file of --token-file.
	ReplaceToken = "make a new token on the hub with telemeter --mode token, replace the file of --token-file with it"
	// RenewToken says how to replace the token of a running client.
	RenewToken = ReplaceToken + ", and send this client SIGHUP"
)

// deniedPause is the longest pause after a round in which every server denied access. A shorter
// pause would not help, because only a person can mend the cause. Reload ends the pause.
const deniedPause = 5 * time.Minute

// DeniedError is the error of a request that fails until a person acts.
type DeniedError struct {
	Err    error
	Advice string // what the person must do; constant for one cause and one configuration
}

func (e *DeniedError) Error() string { return e.Err.Error() + ": " + e.Advice }
func (e *DeniedError) Unwrap() error { return e.Err }

// isDenied reports whether err means that every attempt fails until a person acts.
func isDenied(err error) bool { return failureReasonOf(err) == pushDenied }

// isDeniedStatus reports whether a server that answers with this status does not let the client in.
// A server answers 409 if its --authorize URL knows the cluster ID as that of another account.
func isDeniedStatus(status int) bool {
	return status == http.StatusUnauthorized || status == http.StatusForbidden || status == http.StatusConflict
}

// denialAdvice returns what a person must do after a server has answered with a status for which
// isDeniedStatus is true. answer is the description of the answer.
func (p *Pusher) denialAdvice(answer string) string {
	const makeToken = "--mode token"
	newToken := strings.Replace(RenewToken, makeToken, fmt.Sprintf("%s --id %s --to %s", makeToken, p.cfg.ClusterID, strings.Join(p.cfg.To, " --to ")), 1)
	switch {
	case strings.Contains(answer, TokenRevokedText), strings.Contains(answer, ClusterRevokedText):
		return "if this site is to push again, remove its cluster ID from --revoked-file of the servers if it is listed there, and " + newToken
	case strings.Contains(answer, TokenExpiredText):
		return newToken
	case strings.Contains(answer, TokenMalformedText):
		return "the file of --token-file is damaged: copy the token from the hub again, or " + newToken
	case strings.Contains(answer, TokenForgedText):
		return "the token was made with other keys than those of this server: check that --to names the right hub, and that all of its servers have the same --keys; then " + newToken
	case strings.Contains(answer, OtherClusterText):
		return fmt.Sprintf("this client pushes as cluster ID %s, which is not that of its token (telemeter --mode token --inspect shows it): correct --id, or %s", p.cfg.ClusterID, newToken)
	}
	return "if a proxy or a login page answered, let this client reach the server; if the server itself answered, " + newToken
}

// causeOf returns the text by which failureLog recognizes a failure at a server. It has no address
// of the local end of a connection; see withoutLocalEnds. The advice of a
// DeniedError is enough, because the text of its error may contain the time.
func causeOf(server string, err error) string {
	if denied := (*DeniedError)(nil); errors.As(err, &denied) {
		return server + " " + denied.Advice
	}
	return withoutLocalEnds(err.Error())
}
