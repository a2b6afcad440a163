package main

// This file authenticates requests. The server verifies tokens itself or asks the service at the
// --authorize URL, and it exchanges client tokens for upload tokens. An answer to a refused request
// states the reason, but contains no secret and no labels of a token. A cluster ID that is
// added to the file of --revoked-file is refused once the server has reloaded the file. So is a
// token with a listed ID, except a client token that the --authorize URL checks. This file must not
// know of samples.

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// denyToken answers 401 and counts the refusal under reason in telemeter_unauthorized_total. text
// goes to the client, so it must not contain a secret.
func (s *Server) denyToken(w http.ResponseWriter, reason, text string) {
	s.unauthorizedTotal.Inc(reason)
	w.Header().Add("WWW-Authenticate", fmt.Sprintf("Bearer realm=%q, error=%q, error_description=%q", "telemeter", "invalid_token", text))
	http.Error(w, text, http.StatusUnauthorized)
}

// denyOtherClusterID answers 403 to a request whose token may not be used for the cluster ID in the
// request. text goes to the client.
func (s *Server) denyOtherClusterID(w http.ResponseWriter, text string) {
	s.unauthorizedTotal.Inc("other_cluster")
	http.Error(w, text, http.StatusForbidden)
}

// bearerOrDeny returns the bearer token of a request. If the request has none, it answers 401 and
// returns false.
func (s *Server) bearerOrDeny(w http.ResponseWriter, r *http.Request) (text string, ok bool) {
	text, ok = ParseBearer(r.Header.Get("Authorization"))
	if !ok {
		s.denyToken(w, "missing", "no bearer token; send Authorization: Bearer <token>")
		s.logDenied(r, "missing", Token{})
	}
	return text, ok
}

// authenticate returns the token of a request if the token is valid, it is not revoked, and its
// kind is one of kinds. It then protects the connection of the request. Otherwise it answers 401 or
// 403 and returns false. If the query of the request has a parameter id that is not empty, its value
// must be the token's cluster ID.
func (s *Server) authenticate(w http.ResponseWriter, r *http.Request, kinds ...string) (t Token, ok bool) {
	text, ok := s.bearerOrDeny(w, r)
	if !ok {
		return t, false
	}
	st := s.state.Load()
	t, err := st.verifier.Verify(text, s.cfg.Now())
	id := r.URL.Query().Get("id")
	reason := ""
	switch {
	case errors.Is(err, ErrTokenExpired):
		reason = "expired"
		t, _ = ParseUnverifiedToken(text) // Verify has verified the signature before the expiry
		s.denyToken(w, reason, TokenExpiredText)
	case errors.Is(err, ErrTokenMalformed):
		reason = "malformed"
		s.denyToken(w, reason, TokenMalformedText)
	case err != nil:
		reason = "forged"
		s.denyToken(w, reason, TokenForgedText)
	case st.Revoked.IsRevoked(t):
		reason = "revoked"
		s.denyToken(w, reason, TokenRevokedText)
	case !slices.Contains(kinds, t.Kind):
		reason = "kind"
		s.denyToken(w, reason, fmt.Sprintf("this request needs a token of kind %s, not %s", strings.Join(kinds, " or "), t.Kind))
	case id != "" && id != t.ClusterID:
		reason = "other_cluster"
		s.denyOtherClusterID(w, OtherClusterText)
	default:
		ProtectConn(r, t.ClusterID)
		return t, true
	}
	s.logDenied(r, reason, t)
	return t, false
}

// logDenied warns that a request was refused because of its token. reason is the value of the label
// reason in telemeter_unauthorized_total. If t has a cluster ID, t must be authentic: the warning
// then names the site, and is written at most once in siteLogEvery for each site and reason.
// Otherwise it is limited by the address of the sender. An expired upload token causes no warning
// and is not remembered as a refusal, because the client gets a new one by itself.
func (s *Server) logDenied(r *http.Request, reason string, t Token) {
	if reason == "expired" && t.Kind == KindUpload {
		return
	}
	message := denialMessage(reason)
	if t.ClusterID == "" {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		s.noteRefusal(reason, "", fmt.Sprintf("from %s: %s", host, message), false)
		s.limitedLog.LogPeer(slog.LevelWarn, message, r.RemoteAddr)
		return
	}
	s.noteRefusal(reason, t.ClusterID, message, false)
	s.logSite(slog.LevelWarn, t.ClusterID, message, "token_id", t.ID, "remote", r.RemoteAddr)
}

// denialMessage returns the message for a reason of logDenied. It says what to do.
func denialMessage(reason string) string {
	switch reason {
	case "missing":
		return "request refused: it has no token; send the header Authorization: Bearer TOKEN"
	case "expired":
		return "token refused: it has expired; create a new token with telemeter --mode token, and replace the client's --token-file"
	case "malformed":
		return "token refused: it is malformed; copy the whole token file to the client again"
	case "forged":
		return "token refused: no key of this server signed it; create the token with the servers' token.key, and copy that file to every server"
	case "revoked":
		return "token refused: the file of --revoked-file lists it or its cluster ID; if the site may push again, create a new token, and remove the cluster ID from the file"
	case "kind":
		return "token refused: it is of the wrong kind; give the client the token that telemeter --mode token printed"
	}
	return "token refused: the request names another cluster ID than the token; leave out --id of the client, or create a token for that cluster ID"
}

// authenticateClient checks the client token of a request and returns what the token permits. If
// the token is refused, it answers with an error and returns false. If an --authorize URL is
// configured, the service at that URL decides whether the token is valid; see authorizeExternally.
// Otherwise the server verifies the token itself.
func (s *Server) authenticateClient(w http.ResponseWriter, r *http.Request) (Token, bool) {
	if s.cfg.ExternalAuthorizer != nil {
		return s.authorizeExternally(w, r)
	}
	t, ok := s.authenticate(w, r, KindClient)
	if ok {
		s.sites.SetTokenExpiry(t.ClusterID, t.Expires, s.cfg.Now())
	}
	return t, ok
}

// handleAuthorize answers POST /authorize. It exchanges a client token for an upload token, which
// is valid for uploadTokenTTL but not longer than the client token. If the --authorize URL decided,
// the server does not know when the client token expires, and the upload token is valid for
// uploadTokenTTL.
func (s *Server) handleAuthorize(w http.ResponseWriter, r *http.Request) {
	t, ok := s.authenticateClient(w, r)
	if !ok {
		return
	}
	token, expires, err := s.signUploadToken(t)
	if err != nil {
		s.limitedLog.Log(slog.LevelError, "cannot sign upload token", "cluster_id", t.ClusterID, "err", err)
		s.unauthorizedTotal.Inc("signing")
		http.Error(w, "the token could not be signed", http.StatusInternalServerError)
		return
	}
	labels := map[string]string{}
	maps.Copy(labels, t.Labels)
	labels[ClusterLabel] = t.ClusterID
	if r.ContentLength == 0 {
		w.Header().Del("Connection")
	}
	now := s.cfg.Now()
	WriteJSON(w, map[string]any{
		"version": 1, "token": token, "expiresInSeconds": expires - now.Unix(), "labels": labels,
		"server": s.cfg.Name, "time": now.UnixMilli(),
	})
}

// signUploadToken returns the text of an upload token for the site of the client token t, and when
// it expires, in Unix seconds.
func (s *Server) signUploadToken(t Token) (text string, expires int64, err error) {
	now := s.cfg.Now()
	expires = now.Add(uploadTokenTTL).Unix()
	if t.Expires != 0 {
		expires = min(expires, t.Expires)
	}
	text, err = s.state.Load().Keys.Sign(Token{
		Kind: KindUpload, ClusterID: t.ClusterID, Labels: t.Labels, Issued: now.Unix(), Expires: expires, ID: t.ID,
	})
	return text, expires, err
}

// authorizeExternally asks the service at the --authorize URL about the client token of a request.
// The returned Token has the cluster ID of the request's query, the labels of the service's answer
// except ClusterLabel, and a new token ID. authorizeExternally answers with an error and returns
// false if the request has no bearer token, the cluster ID is invalid or revoked, or the service
// does not permit the push or gives no valid answer.
func (s *Server) authorizeExternally(w http.ResponseWriter, r *http.Request) (t Token, ok bool) {
	id := r.URL.Query().Get("id")
	text, ok := s.bearerOrDeny(w, r)
	if !ok {
		return t, false
	}
	if err := CheckClusterID(id); err != nil {
		http.Error(w, "id: "+err.Error(), http.StatusBadRequest)
		return t, false
	}
	labels, err := s.cfg.ExternalAuthorizer.Authorize(r.Context(), r.RemoteAddr, id, text)
	t = Token{ClusterID: id, Labels: labels, ID: NewTokenID()}
	if err == nil {
		// Only a client that the service has permitted may learn that the cluster ID is revoked.
		if s.isRevokedClusterID(id) {
			s.denyToken(w, "revoked", ClusterRevokedText)
			s.logDenied(r, "revoked", t)
			return t, false
		}
		err = s.checkServiceLabels(t)
	}
	if err != nil {
		s.denyExternally(w, r, id, err)
		return t, false
	}
	ProtectConn(r, id)
	return t, true
}

// checkServiceLabels returns an authorizeError if no push could carry the labels of t. It builds
// the smallest sample of such a push, and signs the upload token. A token that is short enough to
// be signed also leaves enough room in the headers of a push and in a forwardEnvelope.
func (s *Server) checkServiceLabels(t Token) error {
	for name, value := range t.Labels {
		if err := CheckLabel(name, value); err != nil {
			return errNoValidAnswer(err)
		}
	}
	rules := ServerNormalizer{Labels: s.state.Load().Normalizer.Labels}
	sample := RawSample{Name: []byte("m")}
	use := rules.NewUse()
	_, err := rules.Normalize(&sample, rules.ForcedLabels(t.ClusterID, t.Labels), &use)
	if err == nil {
		err = new(SampleList).Add(&sample)
	}
	if err == nil {
		_, _, err = s.signUploadToken(t)
	}
	if err != nil {
		return errNoValidAnswer(fmt.Errorf("no push can carry the labels of the answer: %w", err))
	}
	return nil
}

// denyExternally answers a request whose client token the authorization service did not permit. err
// is an error of ExternalAuthorizer.Authorize. The cause is logged by rate, and counted.
func (s *Server) denyExternally(w http.ResponseWriter, r *http.Request, clusterID string, err error) {
	var e *authorizeError
	if r.Context().Err() != nil || !errors.As(err, &e) {
		s.unauthorizedTotal.Inc("canceled")
		http.Error(w, "the connection has ended", http.StatusServiceUnavailable) // for the metrics of requests, because the client is gone
		return
	}
	s.limitedLog.Log(slog.LevelWarn, e.text, "cluster_id", clusterID, "remote", r.RemoteAddr, "err", e.detail)
	s.noteRefusal(e.reason, "", e.text, false) // the sender has not proven the cluster ID
	if e.retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(e.retryAfter))
	}
	if e.status == http.StatusUnauthorized {
		s.denyToken(w, e.reason, e.text)
		return
	}
	s.unauthorizedTotal.Inc(e.reason)
	http.Error(w, e.text, e.status)
}

// isRevokedClusterID reports whether the cluster ID itself is revoked, and not just a token for it.
func (s *Server) isRevokedClusterID(clusterID string) bool {
	return s.state.Load().Revoked.IsRevoked(Token{ClusterID: clusterID})
}
