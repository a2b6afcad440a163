package main

// Tests of the status page of a server: who gets it, that no text from outside becomes markup, and
// where its links lead.

import (
	"fmt"
	"net/url"
	"strings"
	"testing"
)

var htmlHeader = map[string]string{"Accept": "text/html,*/*;q=0.8"}

// page returns the answer of a path of the internal listener to a browser.
func (r *srvRig) page(path string) srvAnswer {
	r.t.Helper()
	return r.do(srvRequest{method: "GET", url: r.internal.URL + path, header: htmlHeader})
}

// A browser gets the page, and other clients get the list of paths. A faulty query is an error that
// says what is wrong. For an unknown site, the page has all sites, and the JSON is an error.
func TestServerPage(t *testing.T) {
	r := newStatusRig(t)
	if a := r.page("/"); a.status != 200 || a.header.Get("Content-Type") != "text/html; charset=utf-8" || !strings.Contains(a.body, ">pushes</a>") || !strings.Contains(a.body, "Nothing needs attention.") {
		t.Errorf("a browser gets %d %v %s", a.status, a.header, a.body)
	}
	for _, accept := range []string{"", "*/*", "application/json"} {
		a := r.do(srvRequest{method: "GET", url: r.internal.URL + "/", header: map[string]string{"Accept": accept}})
		if a.status != 200 || a.header.Get("Content-Type") != "application/json" || !strings.Contains(a.body, `"/api/status"`) {
			t.Errorf("Accept %q gets %d %v %s", accept, a.status, a.header, a.body)
		}
	}
	for path, want := range map[string]int{"?site=pushes": 200, "?x=1": 400, "?page=0": 400, "?sort=" + strings.Repeat("x", 9000): 400} {
		for _, page := range []string{"/", "/api/status"} {
			if a := r.page(page + path); a.status != want || strings.Contains(a.body, "<script>\n") {
				t.Errorf("%s%.40s is answered %d %.300s, want %d", page, path, a.status, a.body, want)
			}
		}
	}
	const unknown = "?site=%3Cscript%3E"
	if a := r.page("/api/status" + unknown); a.status != 404 || !strings.Contains(a.body, "knows no site") {
		t.Errorf("the status of an unknown site is answered %d %.300s", a.status, a.body)
	}
	if a := r.page("/" + unknown); a.status != 200 || !strings.Contains(a.body, "Site &lt;script&gt;") || !strings.Contains(a.body, "knows no site") || !strings.Contains(a.body, ">pushes</a>") {
		t.Errorf("the page of an unknown site is answered %d %.300s", a.status, a.body)
	}
}

// No text that a site or a scraper sends reaches the page as markup.
func TestServerPageEscapes(t *testing.T) {
	const evil = `<b onx='"&amp;>`
	r := newStatusRig(t)
	r.upload(r.token(KindUpload, "pushes"), nil, "Content-Encoding", evil)
	r.accepted(r.push("pushes", `{"`+strings.ReplaceAll(evil, `"`, `\"`)+`"} 1`+"\n"))
	st := &ServerStatus{
		ProcessStatus: ProcessStatus{Name: evil, Problems: []string{evil}, NotReady: evil, Warnings: []LoggedWarning{{Level: evil, Text: evil}}},
		Members:       []memberStatus{{Name: evil, State: evil, Address: evil, Internal: evil}}, Join: []joinStatus{{Address: evil, Problem: evil}},
		Consumers: []ConsumerStatus{{Name: evil, Address: evil, Problem: evil}}, Refusals: []Refusal{{Reason: evil, ClusterID: evil, Text: evil}},
		Limits: []LimitStatus{{Name: evil, Flag: evil}},
		Sites:  SitesStatus{Page: 1, Pages: 2, Sites: []SiteStatus{{ID: evil, Owner: evil, LastError: evil, Problem: evil}}},
	}
	q := StatusQuery{Search: evil, Sort: evil, OnlyProblems: true, Page: 1}
	var all, site pageWriter
	all.page(ServerView(st, q))
	st.Site = &SiteDetail{SiteStatus: st.Sites.Sites[0], Families: []FamilyCount{{evil, 1}}, Refusals: st.Refusals}
	st.Site.Backlogs = []SiteBacklog{{Consumer: evil, Address: evil}}
	site.page(ServerView(st, q))
	pages := map[string]string{
		"the page": all.buf.String(), "the page of a site": site.buf.String(),
		"the answer": r.page("/?show=problems&q=" + url.QueryEscape(evil)).body, "the answer of a site": r.page("/?site=pushes").body,
	}
	for name, body := range pages {
		if strings.Contains(body, "<b onx") || strings.Contains(body, evil) || !strings.Contains(body, "&lt;b onx=&#39;&#34;&amp;amp;&gt;") {
			t.Errorf("%s has the text as markup, or does not have it:\n%s", name, body)
		}
	}
}

// The page links to the same page of the other live members, by https if their internal listeners
// use TLS.
func TestOtherMembers(t *testing.T) {
	st := &ServerStatus{ProcessStatus: ProcessStatus{Name: "a"}, Members: []memberStatus{
		{Name: "a", State: StateAlive.String(), Internal: "a:1"}, {Name: "b", State: StateAlive.String(), Internal: "b:1"},
		{Name: "c", State: StateAlive.String(), Internal: SDSchemeTLS + "c:1"}, {Name: "d", State: StateDead.String(), Internal: "d:1"},
		{Name: "e", State: StateLeft.String(), Internal: "e:1"}, {Name: "f", State: StateAlive.String()},
	}}
	if got, want := fmt.Sprint(ServerView(st, StatusQuery{}).Links), "[{server b http://b:1/} {server c https://c:1/}]"; got != want {
		t.Errorf("the links are %s, want %s", got, want)
	}
	st.Site = &SiteDetail{SiteStatus: SiteStatus{ID: "x y&z"}}
	if got, want := fmt.Sprint(ServerView(st, StatusQuery{}).Links), "[{All sites of a ./} {server b http://b:1/?site=x+y%26z} {server c https://c:1/?site=x+y%26z}]"; got != want {
		t.Errorf("the links of a site are %s, want %s", got, want)
	}
}

// Each link of the table of sites, and its form, keeps the rest of the query. The link of the column
// by which the table is sorted turns the order round.
func TestSiteLinks(t *testing.T) {
	q := StatusQuery{Search: "a&b", OnlyProblems: true, Sort: "push", Page: 2}
	st := &ServerStatus{Sites: SitesStatus{Total: 900, Page: 2, Pages: 4}}
	query := func(address string) StatusQuery {
		u, err := url.Parse(address)
		if err != nil || u.Fragment != "sites" {
			t.Fatalf("the address %q: %v", address, err)
		}
		got, err := ParseStatusQuery(u.Query())
		if err != nil {
			t.Errorf("the address %q: %v", address, err)
		}
		return got
	}
	for _, descending := range []bool{false, true} {
		q.Descending = descending
		s := sitesSection(st, q)
		sorted := map[string]bool{}
		for _, c := range s.Table.Columns {
			got, want := query(c.Link), q
			sorted[got.Sort] = true
			want.Sort, want.Page, want.Descending = got.Sort, 1, got.Sort == "push" && !descending
			if wantSorted := map[bool]string{false: "ascending", true: "descending"}[descending]; got != want || (c.Sorted == wantSorted) != (got.Sort == "push") {
				t.Errorf("%s, %q, leads to %+v, want %+v", c.Title, c.Sorted, got, want)
			}
		}
		for _, order := range SiteOrders() {
			if !sorted[order] {
				t.Errorf("no column sorts by %s", order)
			}
		}
		for i, l := range s.Pages {
			if want := q; i+1 != q.Page {
				if want.Page = i + 1; query(l.Address) != want {
					t.Errorf("page %s leads to %q, want %+v", l.Text, l.Address, want)
				}
			} else if l.Address != "" {
				t.Errorf("the present page has the link %q", l.Address)
			}
		}
		if want := map[bool]string{false: "[{sort push}]", true: "[{sort push} {order desc}]"}[descending]; fmt.Sprint(s.Filter.Keep) != want || len(s.Pages) != 4 || s.Filter.Search != q.Search || !s.Filter.OnlyProblems {
			t.Errorf("the form is %+v with %d pages, want it to keep %s", s.Filter, len(s.Pages), want)
		}
	}
}

// The state of a site says first what needs attention, and is good only on the owner, after a push.
func TestSiteState(t *testing.T) {
	for _, c := range []struct {
		site SiteStatus
		want Cell
	}{
		{SiteStatus{Owner: "a", LastPush: &testNow}, Good("ok")},
		{SiteStatus{Owner: "a"}, Soft("no push yet")},
		{SiteStatus{Owner: "b", LastPush: &testNow}, Soft("see server b")},
		{SiteStatus{Owner: "a", Waiting: "no push for 11m; waiting"}, Soft("no push for 11m; waiting")},
		{SiteStatus{Owner: "b", Problem: "its token expired 1m ago"}, Bad("its token expired 1m ago")},
		{SiteStatus{Owner: "a", Problem: "x", Revoked: true}, Soft("revoked")},
	} {
		if got := siteState(&c.site, "a"); got != c.want {
			t.Errorf("the state of %+v is %+v, want %+v", c.site, got, c.want)
		}
	}
}
