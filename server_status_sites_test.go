package main

// Tests of the query of a status, and of the page of sites that it selects.

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// A query has defaults for missing parameters. A parameter that is unknown, given twice or has a
// value out of its range is an error that names the parameter.
func TestParseStatusQuery(t *testing.T) {
	for _, c := range []struct {
		query string
		want  StatusQuery
		err   string
	}{
		{"", StatusQuery{Sort: "state", Page: 1}, ""},
		{"site=a%20b&q=X&show=problems&sort=push&order=desc&page=7", StatusQuery{"a b", "X", true, "push", true, 7}, ""},
		{"show=all&order=asc&page=1000000000", StatusQuery{Sort: "state", Page: 1_000_000_000}, ""},
		{"show=", StatusQuery{Sort: "state", Page: 1}, ""},
		{"x=1", StatusQuery{}, `parameter "x": the known ones are site, q, show, sort, order, page`},
		{"q=a&q=b", StatusQuery{}, `parameter "q": it is given more than once`},
		{"show=some", StatusQuery{}, `parameter "show": its values are all, problems`},
		{"sort=x", StatusQuery{}, `parameter "sort": its values are state, id, owner, series, push, backlog, clock, token, error`},
		{"sort=", StatusQuery{}, `parameter "sort": its values are state, `},
		{"order=up", StatusQuery{}, `parameter "order": its values are asc, desc`},
		{"page=0", StatusQuery{}, `parameter "page": it must be a number from 1 on`},
		{"page=-1", StatusQuery{}, `parameter "page": `},
		{"page=1.5", StatusQuery{}, `parameter "page": `},
		{"page=99999999999999999999", StatusQuery{}, `parameter "page": `},
	} {
		values, err := url.ParseQuery(c.query)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseStatusQuery(values)
		if c.err == "" && (err != nil || got != c.want) || c.err != "" && (err == nil || !strings.HasPrefix(err.Error(), c.err)) {
			t.Errorf("%q: got %+v, %v, want %+v, %q", c.query, got, err, c.want, c.err)
		}
	}
}

// randomSites returns sites with random states, so that many are equal in each order but that of
// cluster IDs.
func randomSites(rnd *rand.Rand, n int) (sites []SiteStatus) {
	maybe := func() *time.Time {
		if rnd.IntN(3) == 0 {
			return nil
		}
		return TimeOrNil(testNow.Add(time.Duration(rnd.IntN(20)) * time.Second))
	}
	for i := range n {
		s := SiteStatus{
			ID: fmt.Sprintf("Site-%d", i), Owner: fmt.Sprint("s", rnd.IntN(3)), Series: rnd.IntN(9), Backlog: rnd.IntN(9),
			LastPush: maybe(), TokenExpires: maybe(), LastError: strings.Repeat("e", rnd.IntN(3)),
		}
		if offset := float64(rnd.IntN(9) - 4); offset != 0 {
			s.ClockOffset = &offset
		}
		switch rnd.IntN(4) {
		case 0:
			s.Problem = "late"
		case 1:
			s.Revoked = true
		}
		sites = append(sites, s)
	}
	rnd.Shuffle(n, func(i, j int) { sites[i], sites[j] = sites[j], sites[i] })
	return sites
}

// In each order, ascending and descending, the pages of a query have each of the selected sites
// exactly once and in order. A page beyond the last one is the last one.
func TestSelectSites(t *testing.T) {
	all := randomSites(rand.New(rand.NewPCG(testSeed(t, 0), 3)), 1000)
	inOrder := map[string]func(a, b *SiteStatus) bool{ // whether a may come before b
		"state":  func(a, b *SiteStatus) bool { return !a.Revoked && (a.Problem != "" || b.Problem == "") || b.Revoked },
		"id":     func(a, b *SiteStatus) bool { return a.ID < b.ID },
		"owner":  func(a, b *SiteStatus) bool { return a.Owner <= b.Owner },
		"series": func(a, b *SiteStatus) bool { return a.Series <= b.Series },
		"push": func(a, b *SiteStatus) bool {
			return b.LastPush == nil || a.LastPush != nil && !a.LastPush.After(*b.LastPush)
		},
		"backlog": func(a, b *SiteStatus) bool { return a.Backlog <= b.Backlog },
		"clock": func(a, b *SiteStatus) bool {
			return a.ClockOffset == nil || b.ClockOffset != nil && *a.ClockOffset**a.ClockOffset <= *b.ClockOffset**b.ClockOffset
		},
		"token": func(a, b *SiteStatus) bool {
			return b.TokenExpires == nil || a.TokenExpires != nil && !a.TokenExpires.After(*b.TokenExpires)
		},
		"error": func(a, b *SiteStatus) bool { return a.LastError <= b.LastError },
	}
	problems := 0
	for _, s := range all {
		if s.Problem != "" {
			problems++
		}
	}
	for _, order := range SiteOrders() {
		for _, q := range []StatusQuery{
			{Sort: order}, {Sort: order, Descending: true}, {Sort: order, OnlyProblems: true}, {Sort: order, Search: "iTe-1", Descending: true},
		} {
			want := map[string]bool{}
			for _, s := range all {
				if strings.Contains(s.ID, strings.Replace(q.Search, "iTe", "ite", 1)) && (s.Problem != "" || !q.OnlyProblems) {
					want[s.ID] = true
				}
			}
			var got []SiteStatus
			for q.Page = 1; ; q.Page++ {
				st := selectSites(slices.Clone(all), q)
				if st.Total != len(all) || st.Problems != problems || st.Matched != len(want) || st.Page != q.Page || len(st.Sites) > sitesPerPage {
					t.Fatalf("%+v: got %d sites of %+v", q, len(st.Sites), st)
				}
				got = append(got, st.Sites...)
				if q.Page == st.Pages {
					break
				}
			}
			for i := range got {
				if !want[got[i].ID] {
					t.Fatalf("%+v: %s is there twice, or is not selected", q, got[i].ID)
				}
				delete(want, got[i].ID)
				if i == 0 {
					continue
				}
				a, b := &got[i-1], &got[i]
				if q.Descending {
					a, b = b, a
				}
				if !inOrder[order](a, b) {
					t.Fatalf("%+v: %+v and %+v are in the wrong order", q, got[i-1], got[i])
				}
			}
			if len(want) > 0 {
				t.Errorf("%+v: no page has %v", q, want)
			}
			last := q.Page
			q.Page = 1_000_000_000
			if st := selectSites(slices.Clone(all), q); st.Page != last || len(st.Sites) == 0 {
				t.Errorf("page %d is page %d of %d with %d sites, want the last one", q.Page, st.Page, st.Pages, len(st.Sites))
			}
		}
	}
	if st := selectSites(slices.Clone(all), StatusQuery{Sort: "id", Search: "none", Page: 3}); st.Sites == nil || st.Page != 1 || st.Pages != 1 || st.Matched != 0 {
		t.Errorf("no site matches: got %+v, want page 1 of 1 with an empty list", st)
	}
}
