package main

// This file shows the status of a server to people: as a page for a browser, which sorts, filters and
// pages the sites by links and a form, and as the View that the mode status prints.

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// handleIndex answers GET / with the status page. A client that is no browser gets the answer of
// index instead. If the query names a site that this server does not know, the page says so and has
// all sites, because the link may come from the page of another member.
func (s *Server) handleIndex(index http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !WantsHTML(r) {
			index.ServeHTTP(w, r)
			return
		}
		st, q, err := s.requestedStatus(r)
		unknown := Section{ID: "unknown", Title: "Site " + q.Site, Note: Bad("This server knows no site with this cluster ID.")}
		isUnknown := errors.Is(err, errNoSuchSite)
		if isUnknown {
			q.Site = ""
			st, err = s.Status(q)
		}
		if err != nil {
			answerStatusError(w, err)
			return
		}
		v := ServerView(st, q)
		if isUnknown {
			v.Sections = slices.Insert(v.Sections, 0, unknown)
		}
		WritePage(w, r, v)
	})
}

// ServerView returns the view of a status that was made for the query q.
func ServerView(st *ServerStatus, q StatusQuery) *View {
	v := &View{Process: &st.ProcessStatus, Links: otherMembers(st)}
	if st.Site != nil {
		v.Links = append([]Link{{"All sites of " + st.Name, "./"}}, v.Links...)
		v.Sections = []Section{
			siteSection(st), refusalsSection(st.Site.Refusals, st.Now), FamiliesSection("Series", st.Site.Families, st.Site.Others),
		}
		return v
	}
	v.Sections = []Section{sitesSection(st, q), hourSection(&st.History), consumersSection(st)}
	if len(st.Members) > 0 {
		v.Sections = append(v.Sections, membersSection(st))
	}
	v.Sections = append(v.Sections, limitsSection(st.Limits), refusalsSection(st.Refusals, st.Now), WarningsSection(&st.ProcessStatus))
	return v
}

// otherMembers returns links to the same page on the other live members.
func otherMembers(st *ServerStatus) (links []Link) {
	for _, m := range st.Members {
		if m.Name == st.Name || m.Internal == "" || m.State == StateDead.String() || m.State == StateLeft.String() {
			continue
		}
		address := m.Internal + "/"
		if !strings.HasPrefix(address, SDSchemeTLS) {
			address = "http://" + address
		}
		if st.Site != nil {
			address += siteLink(st.Site.ID)
		}
		links = append(links, Link{"server " + m.Name, address})
	}
	return links
}

// siteLink returns the link to the page of a site.
func siteLink(clusterID string) string { return "?" + url.Values{"site": {clusterID}}.Encode() }

// link returns the link to the page that q asks for.
func (q StatusQuery) link() string {
	values := url.Values{}
	if q.Search != "" {
		values.Set("q", q.Search)
	}
	if q.OnlyProblems {
		values.Set("show", "problems")
	}
	if q.Sort != SiteOrders()[0] {
		values.Set("sort", q.Sort)
	}
	if q.Descending {
		values.Set("order", "desc")
	}
	if q.Page > 1 {
		values.Set("page", strconv.Itoa(q.Page))
	}
	return "?" + values.Encode() + "#sites"
}

// sitesSection returns the section with the sites that q selects.
func sitesSection(st *ServerStatus, q StatusQuery) Section {
	table := &Table{Columns: siteColumns(q), Caption: fmt.Sprintf("%s of %s sites", FormatCount(float64(st.Sites.Matched)), FormatCount(float64(st.Sites.Total)))}
	if st.Sites.Pages > 1 {
		table.Caption += fmt.Sprintf(", page %d of %d", st.Sites.Page, st.Sites.Pages)
	}
	table.OnOtherPages = st.Sites.Matched - len(st.Sites.Sites)
	if table.Empty = "No site matches."; st.Sites.Total == 0 {
		table.Empty = "No site has pushed yet. Create a token with telemeter --mode token, and start a client with it."
	}
	for _, site := range st.Sites.Sites {
		row := siteCells(&site, st.Name, st.Now)
		row[0].Link = siteLink(site.ID)
		table.Rows = append(table.Rows, row)
	}
	s := Section{ID: "sites", Title: "Sites", Table: table, Pages: sitePages(st, q), Filter: &Filter{Search: q.Search, OnlyProblems: q.OnlyProblems}}
	if st.Sites.Problems > 0 {
		s.Note = Bad(fmt.Sprintf("%s of %s need attention.", FormatCount(float64(st.Sites.Problems)), FormatCount(float64(st.Sites.Total))))
	}
	if q.Sort != SiteOrders()[0] {
		s.Filter.Keep = append(s.Filter.Keep, Link{"sort", q.Sort})
	}
	if q.Descending {
		s.Filter.Keep = append(s.Filter.Keep, Link{"order", "desc"})
	}
	return s
}

// siteColumns returns the heads of the table of sites. Each sorts by its column, or turns the order
// round if the table is sorted by it already.
func siteColumns(q StatusQuery) (columns []Column) {
	for _, c := range []struct {
		order string
		Column
	}{
		{"id", Column{Title: "Cluster ID"}}, {"state", Column{Title: "State"}}, {"push", Column{Title: "Last push here"}}, {"series", Column{Title: "Series", IsNumber: true}},
		{"backlog", Column{Title: "Backlog", IsNumber: true}}, {"owner", Column{Title: "Owner", IsSecondary: true}},
		{"clock", Column{Title: "Clock", IsNumber: true, IsSecondary: true}}, {"token", Column{Title: "Token expires", IsSecondary: true}},
		{"error", Column{Title: "Last error", IsSecondary: true}},
	} {
		by := q
		by.Sort, by.Page, by.Descending = c.order, 1, false
		if c.order == q.Sort {
			c.Sorted, by.Descending = "ascending", !q.Descending
			if q.Descending {
				c.Sorted = "descending"
			}
		}
		c.Link = by.link()
		columns = append(columns, c.Column)
	}
	return columns
}

// siteState returns the state of a site on the server with the name self.
func siteState(s *SiteStatus, self string) Cell {
	switch {
	case s.Revoked:
		return Soft("revoked")
	case s.Problem != "":
		return Bad(s.Problem)
	case s.Waiting != "":
		return Soft(s.Waiting)
	case s.Owner != self:
		return Soft("see server " + s.Owner)
	case s.LastPush == nil:
		return Soft("no push yet")
	}
	return Good("ok")
}

// siteCells returns the row of a site on the server with the name self, in the order of siteColumns.
func siteCells(s *SiteStatus, self string, now time.Time) []Cell {
	lastError := Cell{Text: s.LastError}
	if s.LastError != "" && strings.Contains(s.Problem, s.LastError) {
		lastError = Soft("see the state")
	}
	return []Cell{
		{Text: s.ID}, siteState(s, self), Ago(now, s.LastPush), Count(s.Series), Count(s.Backlog), {Text: s.Owner}, clockCell(s.ClockOffset), expiryCell(s.TokenExpires, now), lastError,
	}
}

func clockCell(seconds *float64) Cell {
	if seconds == nil {
		return Cell{}
	}
	return Plain("%+.1f s", math.Round(*seconds*10)/10+0) // adding 0 turns -0 into 0
}

func expiryCell(at *time.Time, now time.Time) Cell {
	switch {
	case at == nil:
		return Cell{}
	case at.Before(now):
		return Bad("expired")
	}
	return Cell{Text: "in " + FormatAge(at.Sub(now)), Hint: FormatTime(*at)}
}

// sitePages returns links to the first and the last page of the sites, and to those near the present
// one. It returns nil if there is only one.
func sitePages(st *ServerStatus, q StatusQuery) (links []Link) {
	const near = 3
	numbers := []int{1, st.Sites.Pages}
	for n := st.Sites.Page - near; n <= st.Sites.Page+near; n++ {
		if n > 1 && n < st.Sites.Pages {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	if st.Sites.Pages <= 1 {
		numbers = nil
	}
	for _, n := range numbers {
		q.Page = n
		link := Link{strconv.Itoa(n), q.link()}
		if n == st.Sites.Page {
			link.Address = ""
		}
		links = append(links, link)
	}
	return links
}

// siteSection returns the section with the facts about the site that the query names.
func siteSection(st *ServerStatus) Section {
	s := st.Site
	facts := []Fact{
		{"State", siteState(&s.SiteStatus, st.Name)}, {"Owner", Cell{Text: s.Owner}}, {"Last push to this server", Ago(st.Now, s.LastPush)},
		{"Held here", Plain("%s series, %s samples", FormatCount(float64(s.Series)), FormatCount(float64(s.Samples)))},
	}
	for _, b := range s.Backlogs {
		facts = append(facts, Fact{"Backlog of consumer " + b.Consumer, Plain("%s samples, at %s", FormatCount(float64(b.Samples)), cmp.Or(b.Address, "another server"))})
	}
	if s.ClockOffset != nil {
		facts = append(facts, Fact{"Clock of the source", Plain("%+.1f s behind", *s.ClockOffset)})
	}
	if s.TokenExpires != nil {
		facts = append(facts, Fact{"Token expires", expiryCell(s.TokenExpires, st.Now)})
	}
	if s.LastFailure != nil {
		facts = append(facts, Fact{"Last failed push", Ago(st.Now, s.LastFailure)})
	}
	return Section{ID: "site", Title: "Site " + s.ID, Facts: facts}
}

// hourSection returns the section with the plots of the last hour.
func hourSection(h *HistoryStatus) Section {
	perMinute := func(counts []int) (values []float64) {
		for _, n := range counts {
			values = append(values, float64(n)*60/h.StepSeconds)
		}
		return values
	}
	return Section{ID: "hour", Title: "Last hour", Plots: []Plot{
		{Title: "Pushes per minute", Values: perMinute(h.Pushes)}, {Title: "New samples per minute", Values: perMinute(h.Samples)},
		{Title: "Refusals per minute", Values: perMinute(h.Refusals)}, {Title: "Scrapes per minute", Values: perMinute(h.Scrapes)},
		{Title: "Slowest scrape", Values: h.SlowestScrapeSeconds, IsSeconds: true},
	}}
}

func consumersSection(st *ServerStatus) Section {
	table := &Table{Empty: "No consumer has scraped this server yet.", Columns: []Column{
		{Title: "Name"}, {Title: "State"}, {Title: "Last scrape"}, {Title: "Backlog", IsNumber: true}, {Title: "Repeats", IsNumber: true, IsSecondary: true}, {Title: "Address"},
	}}
	for _, c := range st.Consumers {
		table.Rows = append(table.Rows, []Cell{
			{Text: c.Name}, StateOr(c.Problem, Good("ok")), Ago(st.Now, &c.LastScrape), Count(c.Backlog), Count(c.Unconfirmed), {Text: c.Address},
		})
	}
	return Section{ID: "consumers", Title: "Consumers", Table: table}
}

func membersSection(st *ServerStatus) Section {
	table := &Table{Columns: []Column{
		{Title: "Name"}, {Title: "State"}, {Title: "Share", IsNumber: true}, {Title: "Round trip", IsNumber: true}, {Title: "Last heard"},
		{Title: "Clock", IsNumber: true, IsSecondary: true}, {Title: "Address", IsSecondary: true},
	}}
	s := Section{ID: "members", Title: "Members of the ring", Table: table}
	for _, m := range st.Members {
		state := Cell{Text: m.State, Tone: ToneBad}
		switch m.State {
		case StateAlive.String():
			state.Tone = ToneGood
		case StateLeft.String():
			state.Tone = ToneSoft
		}
		switch age := FormatAge(time.Duration(m.Gone) * time.Second); {
		case m.Gone > 0 && m.State == StateLeft.String():
			state.Text += " " + age + " ago"
		case m.Gone > 0:
			state.Text += " for " + age
		}
		roundTrip, heard := Cell{}, Cell{}
		if m.RTT > 0 {
			roundTrip = Plain("%.1f ms", 1000*m.RTT)
		}
		if m.Heard != nil {
			heard = Plain("%s ago", FormatAge(time.Duration(*m.Heard*float64(time.Second))))
		}
		name := m.Name
		if name == st.Name {
			name += " (this server)"
		}
		table.Rows = append(table.Rows, []Cell{{Text: name}, state, Plain("%.0f %%", 100*m.Share), roundTrip, heard, clockCell(m.ClockAhead), {Text: m.Address}})
		if m.Share > 0 {
			s.Bar = append(s.Bar, BarPart{m.Name, m.Share})
		}
	}
	for _, j := range st.Join {
		if !j.Reached {
			s.Facts = append(s.Facts, Fact{"--join " + j.Address, Bad(j.Problem)})
		}
	}
	return s
}

func limitsSection(limits []LimitStatus) Section {
	table := &Table{Columns: []Column{{Title: "What"}, {Title: "Used", IsNumber: true}, {Title: "Limit", IsNumber: true}, {Title: "Part", IsNumber: true}, {Title: "Flag", IsSecondary: true}}}
	for _, l := range limits {
		format, limit, part, flag := FormatCount, Soft("none"), Cell{}, Cell{}
		if l.Unit == "bytes" {
			format = FormatBytes
		}
		if l.Limit > 0 {
			limit, part = Cell{Text: format(l.Limit)}, Plain("%.1f %%", 100*l.Used/l.Limit)
			part.Part = max(l.Used/l.Limit, 1e-9) // a bar, even if it is empty
		}
		if l.Flag != "" {
			flag.Text = "--" + l.Flag
		}
		table.Rows = append(table.Rows, []Cell{{Text: l.Name}, {Text: format(l.Used)}, limit, part, flag})
	}
	return Section{ID: "limits", Title: "Limits", Table: table}
}

func refusalsSection(refusals []Refusal, now time.Time) Section {
	table := &Table{Empty: "There are none since the start of this server.", Columns: []Column{
		{Title: "Reason"}, {Title: "Times", IsNumber: true}, {Title: "Newest"}, {Title: "Site", IsSecondary: true}, {Title: "Message of the newest"},
	}}
	for _, r := range refusals {
		site := Cell{Text: r.ClusterID}
		if r.ClusterID != "" {
			site.Link = siteLink(r.ClusterID)
		}
		table.Rows = append(table.Rows, []Cell{{Text: r.Reason}, Count(r.Count), Ago(now, &r.At), site, {Text: r.Text}})
	}
	return Section{ID: "refusals", Title: "Refusals", Table: table}
}
