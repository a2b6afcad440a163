package main

// This file makes the status of a server. The status page, /api/status and --mode status all show the
// same ServerStatus. This file alone decides which problems a server has, with the limits of the
// recommended alerts. Making a status changes nothing.

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	maxSiteFamilies = 500             // metric names in the details of a site
	namesInProblem  = 5               // sites that a problem names; it counts the others
	consumerIsLate  = 5 * time.Minute // without a scrape for this long, a consumer needs attention
	maxUnconfirmed  = 3               // a consumer with more unconfirmed scrapes in a row needs attention
	nearlyFull      = 0.9             // part of a limit from which it needs attention
)

// ServerStatus is the status of a server, and the JSON that /api/status answers with.
type ServerStatus struct {
	ProcessStatus
	Limits    []LimitStatus    `json:"limits"`
	Members   []memberStatus   `json:"members"` // empty for a server without a ring
	Join      []joinStatus     `json:"join"`    // of each value of --join
	Consumers []ConsumerStatus `json:"consumers"`
	Refusals  []Refusal        `json:"refusals"` // the newest for each reason, of sites and of strangers, newest first
	History   HistoryStatus    `json:"history"`
	Sites     SitesStatus      `json:"sites"`
	Site      *SiteDetail      `json:"site,omitempty"` // if the query names a site
}

// LimitStatus is how much of one limit is used.
type LimitStatus struct {
	Name  string  `json:"name"`
	Flag  string  `json:"flag,omitempty"` // flag that sets the limit
	Unit  string  `json:"unit"`           // "bytes", or "" for a number
	Used  float64 `json:"used"`
	Limit float64 `json:"limit"` // 0 = no limit
	// Informative states that a high use of the limit is no problem.
	Informative bool `json:"informative,omitempty"`
}

// HistoryStatus has the last hour in steps of equal length, oldest first. All lists have the same
// length. The newest step has not ended yet.
type HistoryStatus struct {
	End                  time.Time `json:"end"` // of the newest step
	StepSeconds          float64   `json:"step_seconds"`
	Pushes               []int     `json:"pushes"`   // pushes that this server stored, also those that other members forwarded
	Samples              []int     `json:"samples"`  // new samples that were stored
	Refusals             []int     `json:"refusals"` // refused requests of this server's clients, scrapers and strangers
	Scrapes              []int     `json:"scrapes"`
	SlowestScrapeSeconds []float64 `json:"slowest_scrape_seconds"`
}

// ConsumerStatus is one consumer of a server. Consumers that differ only in their match[] selectors
// are one, with the latest scrape and the highest numbers.
type ConsumerStatus struct {
	Name        string    `json:"name"`
	Address     string    `json:"address"`
	LastScrape  time.Time `json:"last_scrape"`
	Backlog     int       `json:"backlog_samples"`     // samples that it has not read
	Unconfirmed int       `json:"unconfirmed_scrapes"` // scrapes in a row that served samples again
	Problem     string    `json:"problem,omitempty"`
}

// StatusQuery selects the sites in a status.
type StatusQuery struct {
	Site         string // cluster ID of the site whose details are wanted; "" = none
	Search       string // part of the cluster ID, in any case
	OnlyProblems bool   // only sites that need attention
	Sort         string // one of SiteOrders
	Descending   bool
	Page         int // from 1 on
}

// ParseStatusQuery returns the query of a request for a status, with the parameters site, q, show,
// sort, order and page. An unknown parameter or value is an error.
func ParseStatusQuery(values url.Values) (q StatusQuery, err error) {
	q = StatusQuery{Sort: SiteOrders()[0], Page: 1}
	for name, given := range values {
		value := given[0]
		switch {
		case len(given) > 1:
			err = errors.New("it is given more than once")
		case name == "site":
			q.Site = value
		case name == "q":
			q.Search = value
		case name == "show":
			if q.OnlyProblems = value == "problems"; !q.OnlyProblems && value != "all" && value != "" {
				err = errors.New("its values are all, problems")
			}
		case name == "sort":
			q.Sort = value
			if !slices.Contains(SiteOrders(), value) {
				err = fmt.Errorf("its values are %s", strings.Join(SiteOrders(), ", "))
			}
		case name == "order":
			if q.Descending = value == "desc"; !q.Descending && value != "asc" {
				err = errors.New("its values are asc, desc")
			}
		case name == "page":
			if q.Page, err = strconv.Atoi(value); err != nil || q.Page < 1 {
				err = errors.New("it must be a number from 1 on")
			}
		default:
			err = errors.New("the known ones are site, q, show, sort, order, page")
		}
		if err != nil {
			return q, fmt.Errorf("parameter %.100q: %w", name, err)
		}
	}
	return q, nil
}

// handleStatusJSON answers GET /api/status.
func (s *Server) handleStatusJSON(w http.ResponseWriter, r *http.Request) {
	st, _, err := s.requestedStatus(r)
	if err != nil {
		answerStatusError(w, err)
		return
	}
	WriteJSON(w, st)
}

// errNoSuchSite means that a query names a site that the server does not know.
var errNoSuchSite = errors.New("this server knows no site with this cluster ID")

// answerStatusError answers a request for a status whose query is faulty.
func answerStatusError(w http.ResponseWriter, err error) {
	status := http.StatusBadRequest
	if errors.Is(err, errNoSuchSite) {
		status = http.StatusNotFound
	}
	http.Error(w, err.Error(), status)
}

// requestedStatus returns the status that a request asks for, and the query of the request. The error
// is about the query.
func (s *Server) requestedStatus(r *http.Request) (st *ServerStatus, q StatusQuery, err error) {
	if q, err = ParseStatusQuery(r.URL.Query()); err == nil {
		st, err = s.Status(q)
	}
	return st, q, err
}

// Status returns the status of the server with the sites that q selects. The error is errNoSuchSite.
func (s *Server) Status(q StatusQuery) (*ServerStatus, error) {
	now := s.cfg.Now()
	store := s.cfg.Store.Stats()
	sites := s.siteStatuses(store, now)
	st := &ServerStatus{
		ProcessStatus: NewProcessStatus(KindServerStatus, s.cfg.Name, s.started, now, s.cfg.Warnings),
		Limits:        s.limitStatuses(store), Members: []memberStatus{}, Join: []joinStatus{},
		Consumers: s.consumerStatuses(store, now), Refusals: s.refusals.newestFirst(), History: s.historyStatus(now),
	}
	st.NotReady = s.whyNotReady()
	if s.cfg.Gossip != nil {
		st.Members, st.Join = s.memberStatuses(), s.joinStatuses()
	}
	st.Problems = append(s.problems(st, sites), st.Problems...)
	if q.Site != "" {
		i := slices.IndexFunc(sites, func(site SiteStatus) bool { return site.ID == q.Site })
		if i < 0 {
			return nil, errNoSuchSite
		}
		st.Site = &SiteDetail{SiteStatus: sites[i], Refusals: s.sites.Refusals(q.Site)}
		st.Site.Families, st.Site.Others = HighestFamilies(s.cfg.Store.SiteFamilies(q.Site), maxSiteFamilies)
	}
	st.Sites = selectSites(sites, q)
	return st, nil
}

// limitStatuses returns how much of each limit is used.
func (s *Server) limitStatuses(store StoreStats) []LimitStatus {
	samples, unread, limits := int64(0), 0, s.cfg.Store.Limits()
	for _, site := range store.Sites {
		samples += site.Samples
		most := 0
		for _, b := range site.Backlogs {
			most = max(most, b.UnreadSamples)
		}
		unread += most
	}
	all := []LimitStatus{
		// The store evicts samples that every consumer has read, so only unread ones can fill it.
		{Name: "samples held", Flag: "limit-samples", Used: float64(samples), Limit: float64(limits.Samples), Informative: true},
		{Name: "samples held and unread", Flag: "limit-samples", Used: float64(unread), Limit: float64(limits.Samples)},
		{Name: "sites", Flag: "limit-clusters", Used: float64(len(store.Sites)), Limit: float64(limits.Sites)},
		{Name: "consumers", Used: float64(s.cfg.Store.Consumers.Len()), Limit: MaxConsumers},
		{Name: "logs on disk", Flag: "limit-storage", Unit: "bytes", Used: float64(store.LogBytes), Limit: float64(limits.Storage)},
	}
	for _, l := range s.cfg.HostLimits() {
		if l.Limit > 0 {
			all = append(all, l)
		}
	}
	return all
}

// limitUpdater registers the metric of the limits. It returns a function that updates it.
func (s *Server) limitUpdater(m *Metrics) func(StoreStats) {
	used := m.Gauge("telemeter_limit_used_ratio", "Used share of each limit of this server, from 0 to 1. Limits that are not set, and limits whose full use is harmless, are left out.", "limit")
	return func(store StoreStats) {
		used.ReplaceSeries(func(set func(v float64, labelValues ...string)) {
			for _, l := range s.limitStatuses(store) {
				if l.Limit > 0 && !l.Informative {
					set(l.Used/l.Limit, l.Name)
				}
			}
		})
	}
}

// consumerStatuses returns the consumers that have scraped this server, sorted by name and address.
func (s *Server) consumerStatuses(store StoreStats, now time.Time) []ConsumerStatus {
	type id struct{ name, address string }
	backlogs := map[id]int{}
	for _, site := range store.Sites {
		for _, b := range site.Backlogs {
			backlogs[id{b.Name, b.Address}] += b.UnreadSamples
		}
	}
	all := []ConsumerStatus{}
	for _, c := range s.cfg.Store.Consumers.Summaries() {
		st := ConsumerStatus{Name: c.Name, Address: c.Address, LastScrape: c.LastScrape.UTC(), Backlog: backlogs[id{c.Name, c.Address}], Unconfirmed: c.Unconfirmed}
		switch {
		case now.Sub(c.LastScrape) > consumerIsLate && now.Sub(s.started) > consumerIsLate: // a server that has just started gives the consumer time to scrape
			st.Problem = fmt.Sprintf("no scrape for %s", FormatAge(now.Sub(c.LastScrape)))
		case c.Unconfirmed > maxUnconfirmed:
			st.Problem = fmt.Sprintf("its last %d scrapes are not confirmed, so it gets the same samples again", c.Unconfirmed)
		}
		all = append(all, st)
	}
	return all
}

// historyStatus returns the last hour.
func (s *Server) historyStatus(now time.Time) HistoryStatus {
	steps, end := s.history.upTo(now)
	st := HistoryStatus{End: end.UTC(), StepSeconds: historyStep.Seconds()}
	for _, a := range steps {
		st.Pushes, st.Samples, st.Refusals = append(st.Pushes, a.Pushes), append(st.Samples, a.Samples), append(st.Refusals, a.Refusals)
		st.Scrapes, st.SlowestScrapeSeconds = append(st.Scrapes, a.Scrapes), append(st.SlowestScrapeSeconds, a.SlowestScrape.Seconds())
	}
	return st
}

// problems returns the problems that need attention, except for errors in the process log. The most
// urgent problem is first.
func (s *Server) problems(st *ServerStatus, sites []SiteStatus) []string {
	problems := []string{} // not nil, because a status is also JSON
	add := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	if st.NotReady != "" {
		add("this server is not ready: %s", st.NotReady)
	}
	for _, m := range st.Members {
		if m.State == StateDead.String() {
			add("member %s has been dead for %s: start it again", m.Name, FormatAge(time.Duration(m.Gone)*time.Second))
		}
	}
	for _, j := range st.Join {
		if !j.Reached {
			add("no server of the ring answers at --join %s: %s", j.Address, j.Problem)
		}
	}
	for _, l := range st.Limits {
		if l.Limit > 0 && l.Used >= nearlyFull*l.Limit && !l.Informative {
			add("%s: %.0f %% of the limit is used", l.Name, 100*l.Used/l.Limit)
		}
	}
	for _, r := range st.Refusals {
		if (r.Reason == resultFull || r.Reason == resultFailed) && st.Now.Sub(r.At) < siteIsLate {
			add("%s ago, a push of %s was not stored: %s", FormatAge(st.Now.Sub(r.At)), r.ClusterID, r.Text)
		}
	}
	if len(st.Consumers) == 0 && len(sites) > 0 && st.Now.Sub(st.Started) > consumerIsLate {
		add("no consumer has scraped this server: add params: {consumer: [NAME]} to the scrape configuration of Prometheus")
	}
	for _, c := range st.Consumers {
		if c.Problem != "" {
			add("consumer %s at %s: %s", c.Name, c.Address, c.Problem)
		}
	}
	var silent, other []string
	for i := range sites {
		switch site := &sites[i]; {
		case site.silent:
			silent = append(silent, site.ID)
		case site.Problem != "":
			other = append(other, site.ID)
		}
	}
	slices.Sort(silent)
	slices.Sort(other)
	if len(silent) > 0 {
		add("%s of %s sites have not pushed for %s: %s", FormatCount(float64(len(silent))), FormatCount(float64(len(sites))), FormatAge(siteIsLate), ListNames(silent, namesInProblem))
	}
	if len(other) > 0 {
		add("%s of %s sites need attention: %s", FormatCount(float64(len(other))), FormatCount(float64(len(sites))), ListNames(other, namesInProblem))
	}
	return problems
}
