package main

// This file makes the list of sites in the status of a server. It finds the problems of each site,
// and the page of sites that a query selects.

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	sitesPerPage = 200 // sites in one page of a status

	siteIsLate       = 10 * time.Minute    // without a push for this long, a site is silent
	siteClockIsOff   = time.Minute         // offset of the clock of a site's source that needs attention
	tokenExpiresSoon = 30 * 24 * time.Hour // validity of a token that is left when it needs attention
)

// SitesStatus is one page of the sites that a StatusQuery selects.
type SitesStatus struct {
	Total    int          `json:"total"`    // all sites
	Problems int          `json:"problems"` // sites that need attention
	Matched  int          `json:"matched"`  // sites that the query selects
	Page     int          `json:"page"`     // from 1 on
	Pages    int          `json:"pages"`
	Sites    []SiteStatus `json:"list"`
}

// SiteStatus is one site as this server sees it. Times are nil if this server does not know them.
type SiteStatus struct {
	ID           string        `json:"cluster_id"`
	Owner        string        `json:"owner"` // name of the server
	Series       int           `json:"series"`
	Samples      int64         `json:"samples"`
	LastPush     *time.Time    `json:"last_push,omitempty"`
	Backlog      int           `json:"backlog_samples"` // highest of Backlogs
	Backlogs     []SiteBacklog `json:"backlogs,omitempty"`
	ClockOffset  *float64      `json:"clock_offset_seconds,omitempty"` // how far the clock of the site's source is behind
	TokenExpires *time.Time    `json:"token_expires,omitempty"`
	LastFailure  *time.Time    `json:"last_failure,omitempty"`
	LastError    string        `json:"last_error,omitempty"` // text of the newest refusal, also of a request that is no push
	Revoked      bool          `json:"revoked,omitempty"`
	Problem      string        `json:"problem,omitempty"` // all problems of the site that need attention; "" if there are none
	Waiting      string        `json:"waiting,omitempty"` // why this server, which owns the site, does not know yet whether the site is silent

	silent      bool
	failureText string    // text of the refusal at LastFailure
	issued      time.Time // when the oldest valid token of the site was issued; zero if that is not known
}

// SiteBacklog is how many samples of a site one consumer has not read.
type SiteBacklog struct {
	Consumer string `json:"consumer"`
	Address  string `json:"address"`
	Samples  int    `json:"samples"`
}

// SiteDetail is the status of one site, with the details that only the page of the site shows.
type SiteDetail struct {
	SiteStatus
	Families []FamilyCount `json:"families"` // most series first, at most maxSiteFamilies
	Others   int           `json:"other_families"`
	Refusals []Refusal     `json:"refusals"` // newest first
}

// SiteOrders returns the values of the parameter sort. The first one is the default.
func SiteOrders() []string {
	return []string{"state", "id", "owner", "series", "push", "backlog", "clock", "token", "error"}
}

// compareSites compares two sites by one of SiteOrders, and then by their cluster IDs.
func compareSites(order string, a, b *SiteStatus) (c int) {
	switch order {
	case "state":
		c = cmp.Compare(siteRank(a), siteRank(b))
	case "owner":
		c = strings.Compare(a.Owner, b.Owner)
	case "series":
		c = cmp.Compare(a.Series, b.Series)
	case "push":
		c = compareTimes(a.LastPush, b.LastPush)
	case "backlog":
		c = cmp.Compare(a.Backlog, b.Backlog)
	case "clock":
		c = cmp.Compare(clockError(a), clockError(b))
	case "token":
		c = compareTimes(a.TokenExpires, b.TokenExpires)
	case "error":
		c = strings.Compare(a.LastError, b.LastError)
	}
	return cmp.Or(c, strings.Compare(a.ID, b.ID))
}

// siteRank is lowest for sites with a problem, and highest for revoked sites.
func siteRank(s *SiteStatus) int {
	switch {
	case s.Revoked:
		return 2
	case s.Problem != "":
		return 0
	}
	return 1
}

// clockError returns the size of a site's clock offset, or -1 if the offset is not known.
func clockError(s *SiteStatus) float64 {
	if s.ClockOffset == nil {
		return -1
	}
	return max(*s.ClockOffset, -*s.ClockOffset)
}

// compareTimes compares two times. A time that is not known is later than all others.
func compareTimes(a, b *time.Time) int {
	switch {
	case a == b:
		return 0
	case a == nil:
		return 1
	case b == nil:
		return -1
	}
	return a.Compare(*b)
}

// selectSites returns the page of sites that q selects. If the page is beyond the last one, it
// returns the last one. It changes the order of sites.
func selectSites(sites []SiteStatus, q StatusQuery) SitesStatus {
	st := SitesStatus{Total: len(sites)}
	search := strings.ToLower(q.Search)
	selected := sites[:0]
	for _, site := range sites {
		if site.Problem != "" {
			st.Problems++
		}
		if strings.Contains(strings.ToLower(site.ID), search) && (site.Problem != "" || !q.OnlyProblems) {
			selected = append(selected, site)
		}
	}
	sign := 1
	if q.Descending {
		sign = -1
	}
	slices.SortFunc(selected, func(a, b SiteStatus) int { return sign * compareSites(q.Sort, &a, &b) })
	st.Matched, st.Pages = len(selected), max(1, (len(selected)+sitesPerPage-1)/sitesPerPage)
	st.Page = min(q.Page, st.Pages)
	first := (st.Page - 1) * sitesPerPage
	st.Sites = selected[first:min(first+sitesPerPage, len(selected))]
	return st
}

// siteStatuses returns all sites that this server knows, in any order: those with a push, those that
// authenticated, and those that it owns and that may push according to the list of issued tokens.
func (s *Server) siteStatuses(store StoreStats, now time.Time) []SiteStatus {
	all := make([]SiteStatus, 0, len(store.Sites))
	index := make(map[string]int, len(store.Sites))
	add := func(id string) *SiteStatus {
		if _, known := index[id]; !known {
			index[id] = len(all)
			all = append(all, SiteStatus{ID: id, Owner: s.ownerName(id), Revoked: s.isRevokedClusterID(id)})
		}
		return &all[index[id]]
	}
	for _, in := range store.Sites {
		site := add(in.ID)
		site.Series, site.Samples, site.LastPush = in.Series, in.Samples, TimeOrNil(time.UnixMilli(in.LastPush))
		for _, b := range in.Backlogs {
			site.Backlogs = append(site.Backlogs, SiteBacklog{b.Name, b.Address, b.UnreadSamples})
			site.Backlog = max(site.Backlog, b.UnreadSamples)
		}
	}
	s.sites.ForEach(func(id string, h siteHealth) {
		site := add(id)
		site.LastFailure, site.failureText, site.LastError = TimeOrNil(h.LastFailure), h.FailureText, h.LastError
		if site.LastPush == nil || h.LastSuccess.After(*site.LastPush) {
			site.LastPush = TimeOrNil(h.LastSuccess) // the owner stores the pushes that this server forwards
		}
		// A push that was stored well after the expiry came with a newer token, which only another
		// server has seen. Clocks of servers differ, and a push may take a while.
		if expiry := time.Unix(h.TokenExpiry, 0); h.TokenExpiry != 0 && (site.LastPush == nil || site.LastPush.Before(expiry.Add(time.Minute))) {
			site.TokenExpires = TimeOrNil(expiry)
		}
		if now.Sub(h.ClockOffsetAt) <= s.cfg.MaxSampleAge {
			offset := h.ClockOffset.Seconds()
			site.ClockOffset = &offset
		}
	})
	for id, issued := range s.IssuedSites() {
		if _, known := index[id]; known || s.ownerName(id) == s.cfg.Name {
			add(id).issued = issued
		}
	}
	for i := range all {
		s.setSiteProblem(&all[i], now)
	}
	return all
}

// ownerName returns the name of the server that owns a site.
func (s *Server) ownerName(clusterID string) string {
	if s.cfg.Forwarder == nil {
		return s.cfg.Name
	}
	owner, _ := s.cfg.Forwarder.SiteOwner(SiteKey(clusterID))
	return owner.Name
}

// ownerSince returns the time since which this server runs and the owner of a site has not changed.
// Before that time, another server may have got the pushes of the site.
func (s *Server) ownerSince(clusterID string) time.Time {
	if s.cfg.Forwarder != nil {
		if changed := s.cfg.Forwarder.OwnerSince(SiteKey(clusterID)); changed.After(s.started) {
			return changed
		}
	}
	return s.started
}

// setSiteProblem sets the problem of a site, unless the site is revoked. Only the owner of a site says
// that the site is silent, and only after the owner had time to see a push. Until then it says that it
// waits.
func (s *Server) setSiteProblem(site *SiteStatus, now time.Time) {
	if site.Revoked {
		return
	}
	var problems []string
	heard, silence := site.issued, "no push yet"
	if heard.After(now) { // the clock of the host that made the token is wrong
		heard = time.Time{}
	}
	if site.LastPush != nil {
		heard, silence = *site.LastPush, fmt.Sprintf("no push for %s", FormatAge(now.Sub(*site.LastPush)))
	}
	if site.Owner == s.cfg.Name && now.Sub(heard) > siteIsLate {
		if since := s.ownerSince(site.ID); now.Sub(since) > siteIsLate {
			site.silent = true
			problems = append(problems, silence)
		} else {
			site.Waiting = fmt.Sprintf("%s; this server has waited for one for %s", silence, FormatAge(now.Sub(since)))
		}
	}
	if f := site.LastFailure; f != nil && now.Sub(*f) < siteIsLate && (site.LastPush == nil || !f.Before(*site.LastPush)) { // a push whose samples were all untimely is the last push and the last failure
		problems = append(problems, fmt.Sprintf("its last push failed: %s", site.failureText))
	}
	if t := site.TokenExpires; t != nil {
		switch left := t.Sub(now); {
		case left <= 0:
			problems = append(problems, fmt.Sprintf("its token expired %s ago", FormatAge(-left)))
		case left < tokenExpiresSoon:
			problems = append(problems, fmt.Sprintf("its token expires in %s", FormatAge(left)))
		}
	}
	if site.ClockOffset != nil && clockError(site) > siteClockIsOff.Seconds() {
		problems = append(problems, fmt.Sprintf("the clock of its source is off by %s", FormatAge(time.Duration(clockError(site)*float64(time.Second)))))
	}
	if limit := s.cfg.Store.Limits().Series; limit > 0 && site.Series >= limit {
		problems = append(problems, "it has as many series as --limit-series allows")
	}
	site.Problem = strings.Join(problems, "; ")
}
