package main

// Authentication of requests: the server verifies tokens, or asks the --authorize URL, and
// exchanges client tokens for upload tokens. An answer says nothing that an attacker does not
// know. A revoked token is refused from the reload on. This file must not know of samples.

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strings"
)

// refuse answers 401. why is for the sender, and says nothing that an attacker
// does not know.
func (s *Server) refuse(w http.ResponseWriter, reason, why string) {
	s.unauthorized.Inc(reason)
	w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer realm=%q, error=%q, error_description=%q", "telemeter", "invalid_token", why))
	http.Error(w, why, http.StatusUnauthorized)
}

// authenticate returns the token of a request if it is valid and of one of the
// kinds, or answers. An id in the query has to be the token's cluster.
func (s *Server) authenticate(w http.ResponseWriter, r *http.Request, kinds ...string) (Token, bool) {
	text, ok := Bearer(r.Header.Get("Authorization"))
	if !ok {
		s.refuse(w, "missing", "no bearer token; send Authorization: Bearer <token>")
		return Token{}, false
	}
	st := s.state.Load()
	t, err := st.Keys.Verify(text, s.cfg.Now())
	switch {
	case errors.Is(err, ErrTokenExpired):
		s.refuse(w, "expired", "the token has expired")
	case errors.Is(err, ErrTokenMalformed):
		s.refuse(w, "malformed", "the token is malformed")
	case err != nil:
		s.refuse(w, "forged", "the token is not signed by a key of this server")
	case st.Revoked.IsRevoked(t):
		s.refuse(w, "revoked", "the token has been revoked")
	default:
		kindOK := false
		for _, k := range kinds {
			kindOK = kindOK || k == t.Kind
		}
		if !kindOK {
			s.refuse(w, "kind", fmt.Sprintf("this takes a token of kind %s, not %s", strings.Join(kinds, " or "), t.Kind))
			return t, false
		}
		if id := r.URL.Query().Get("id"); id != "" && id != t.Cluster {
			s.unauthorized.Inc("other_cluster")
			http.Error(w, "the token is for another cluster ID", http.StatusForbidden)
			return t, false
		}
		return t, true
	}
	return t, false
}

// authorize exchanges a client token for an upload token.
func (s *Server) authorize(w http.ResponseWriter, r *http.Request) {
	var t Token
	if s.cfg.Authorizer != nil {
		var ok bool
		if t, ok = s.ask(w, r); !ok {
			return
		}
	} else {
		var ok bool
		if t, ok = s.authenticate(w, r, KindClient); !ok {
			return
		}
		s.senders.SetTokenExpiry(t.Cluster, t.Expires, s.cfg.Now())
	}
	now := s.cfg.Now()
	expires := now.Add(UploadTokenTTL).Unix()
	if t.Expires != 0 {
		expires = min(expires, t.Expires)
	}
	token, err := s.state.Load().Keys.Sign(Token{
		Kind: KindUpload, Cluster: t.Cluster, Labels: t.Labels, Issued: now.Unix(), Expires: expires, ID: t.ID,
	})
	if err != nil {
		s.cfg.Log.Error("signing upload token", "cluster", t.Cluster, "err", err)
		s.unauthorized.Inc("signing")
		http.Error(w, "the token could not be signed", http.StatusInternalServerError)
		return
	}
	labels := map[string]string{}
	maps.Copy(labels, t.Labels)
	labels[ClusterLabel] = t.Cluster
	if r.ContentLength == 0 {
		w.Header().Del("Connection")
	}
	WriteJSON(w, map[string]any{
		"version": 1, "token": token, "expiresInSeconds": expires - now.Unix(), "labels": labels,
		"server": s.cfg.Name, "time": now.UnixMilli(),
	})
}

// ask has the --authorize URL judge a client token, instead of its signature.
func (s *Server) ask(w http.ResponseWriter, r *http.Request) (t Token, ok bool) {
	id := r.URL.Query().Get("id")
	text, has := Bearer(r.Header.Get("Authorization"))
	if !has {
		s.refuse(w, "missing", "no bearer token; send Authorization: Bearer <token>")
		return t, false
	}
	if err := CheckClusterID(id); err != nil {
		http.Error(w, "id: "+err.Error(), http.StatusBadRequest)
		return t, false
	}
	t = Token{Cluster: id, ID: NewTokenID()}
	if s.state.Load().Revoked.IsRevoked(t) {
		s.refuse(w, "revoked", "the cluster ID has been revoked")
		return t, false
	}
	labels, err := s.cfg.Authorizer.Authorize(r.Context(), id, text)
	delete(labels, ClusterLabel)
	for name, value := range labels {
		err = errors.Join(err, CheckLabel(name, value))
	}
	switch {
	case errors.Is(err, ErrNotAuthorized):
		s.refuse(w, "forged", err.Error())
		return t, false
	case errors.Is(err, ErrOtherClusterID):
		s.unauthorized.Inc("other_cluster")
		http.Error(w, err.Error(), http.StatusForbidden)
		return t, false
	case err != nil:
		s.cfg.Log.Warn("asking --authorize URL", "cluster", id, "err", err)
		s.unauthorized.Inc("unavailable")
		w.Header().Set("Retry-After", "5")
		http.Error(w, "the authorization service cannot be reached", http.StatusServiceUnavailable)
		return t, false
	}
	t.Labels = labels
	return t, true
}

// revoked reports whether a cluster ID was revoked.
func (s *Server) revoked(id string) bool { return s.state.Load().Revoked.IsRevoked(Token{Cluster: id}) }
