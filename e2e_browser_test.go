package main

// TestBrowser reads the status pages of a real server and of a client as people do: in a headless
// Chromium, with the mouse and the keyboard, with and without JavaScript. Cluster IDs, metric names,
// names of consumers and messages of refusals are hostile. The driver fails the test if a page opens
// a dialog, violates its Content-Security-Policy, or requests anything from elsewhere.

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const (
	browserSites = 450 // sites of newBrowserRig: three pages
	hostileHTML  = `"><script>alert(1)</script><img src=x onerror=alert(2)>javascript:alert(3)`
)

// longSite is a cluster ID of the greatest length.
var longSite = "javascript:alert-2" + strings.Repeat("w", 110)

// newBrowserRig returns a server that holds browserSites sites: site-000 and so on, where site i has
// i % 7 + 1 series, and three sites with hostile names at the end. The push of site-001 is refused.
func newBrowserRig(t *testing.T) *srvRig {
	r := newSrvRig(t, func(s *StoreConfig, _ *ServerConfig) { s.LimitSites = 1000 })
	for i := range browserSites - 3 {
		var text strings.Builder
		for n := range i%7 + 1 {
			fmt.Fprintf(&text, "up{n=\"%d\"} 1\n", n)
		}
		r.accepted(r.push(fmt.Sprintf("site-%03d", i), text.String()))
	}
	for _, id := range []string{"javascript:alert-1", longSite, "z--.._:@-"} {
		r.accepted(r.push(id, fmt.Sprintf("{%q} 1\n", hostileHTML)))
	}
	r.clock.Add(int64(time.Minute))
	if a := r.push("site-001", "up{} "+hostileHTML+"\n"); a.status != 400 {
		t.Fatalf("a faulty push was answered %d", a.status)
	}
	return r
}

const (
	jsRows   = "[...document.querySelectorAll('#sites-table tbody th')].map(e => e.innerText)"
	jsSeries = "[...document.querySelectorAll('#sites-table tbody td:nth-of-type(3)')].map(e => +e.innerText)"
	jsSorted = "[...document.querySelectorAll('#sites-table thead th')].filter(e => e.ariaSort).map(e => e.innerText + e.ariaSort).join()"

	// A tab that is shown again is refreshed. The driver turns off the refresh at intervals.
	jsRefresh = "document.dispatchEvent(new Event('visibilitychange'))"
)

func TestBrowser(t *testing.T) {
	r := newBrowserRig(t)
	b := startBrowser(t, r.internal.URL)
	b.browseSites(r.internal.URL)
	b.checkReading(r.internal.URL)
	b.call("Emulation.setScriptExecutionDisabled", map[string]any{"value": true}, nil)
	b.browseSites(r.internal.URL)
	b.is("true", "document.getElementById('refresh').hidden")
	b.call("Emulation.setScriptExecutionDisabled", map[string]any{"value": false}, nil)
	b.checkRefresh(r)
	b.is("true", "!!document.querySelector('main')")
	if requested := b.requested(); !slices.Contains(requested, r.internal.URL+"/") {
		t.Errorf("the driver has not seen the request for the page, only %q", requested)
	}
}

// browseSites sorts, selects and pages the sites of newBrowserRig.
func (b *browser) browseSites(server string) {
	b.t.Helper()
	b.open(server + "/")
	b.is("site-001", jsRows+"[0]") // its last push failed
	b.is("200", jsRows+".length")

	b.click("#sites-table thead th:nth-child(4) a")
	b.until(jsSorted + " === 'Series ▲ascending'")
	b.is("true", fmt.Sprintf("(s => s.length === 200 && s[0] === 1 && s.every((n, i) => !i || s[i-1] <= n))(%s)", jsSeries))
	b.click("#sites-table thead th:nth-child(4) a")
	b.until(jsSorted + " === 'Series ▼descending'")
	b.is("true", fmt.Sprintf("(s => s.length === 200 && s[0] === 7 && s.every((n, i) => !i || s[i-1] >= n))(%s)", jsSeries))

	for _, page := range []struct{ number, rows string }{{"2", "200"}, {"3", "50"}} {
		b.click(fmt.Sprintf(".pages a[href*='page=%s']", page.number))
		b.until(fmt.Sprintf("document.querySelector('.pages [aria-current=page]').innerText === %q", page.number))
		b.is(page.rows, jsRows+".length")
		b.is("Series ▼descending", jsSorted)
	}

	// The form keeps the order, and shows the first page.
	b.typeText("#sites-search", "ITE-44")
	b.press("Enter")
	b.until(jsRows + ".length === 7")
	b.is("site-440 site-441 site-442 site-443 site-444 site-445 site-446", jsRows+".sort().join(' ')")
	b.is("ITE-44", "document.getElementById('sites-search').value")
	b.is("Series ▼descending", jsSorted)
	b.do("document.getElementById('sites-search').value = ''; document.getElementById('sites-show').value = 'problems'")
	b.click("#sites-filter")
	b.until(jsRows + ".join() === 'site-001'")
	b.is("problems", "document.getElementById('sites-show').value")

	b.click("#sites-table tbody a")
	b.until("document.querySelector('h2#site')?.innerText === 'Site site-001'")
	b.open(server + "/?site=" + url.QueryEscape("javascript:alert-1"))
	b.is("true", fmt.Sprintf("document.querySelector('main').innerText.includes(%q)", hostileHTML)) // the metric name
}

// checkReading checks the page for people with a narrow screen, a keyboard or a screen reader.
func (b *browser) checkReading(server string) {
	b.t.Helper()
	for _, query := range []string{"", "?q=javascript", "?site=" + longSite, "?site=site-001"} {
		b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": true}, nil)
		b.open(server + "/" + query)
		b.is("360", "innerWidth")
		b.is("360", "document.documentElement.scrollWidth")
	}
	b.call("Emulation.clearDeviceMetricsOverride", nil, nil)

	b.open(server + "/")
	b.press("Tab")
	b.is("Skip to the content", "document.activeElement.innerText")
	b.is("true", "(r => r.left >= 0 && r.top >= 0 && r.right <= innerWidth && r.bottom <= innerHeight)(document.activeElement.getBoundingClientRect())")
	seen := map[string]bool{}
	for range 12 {
		b.is("solid", "getComputedStyle(document.activeElement).outlineStyle")
		what, err := b.evaluate("document.activeElement.id || document.activeElement.innerText")
		if err != nil {
			b.t.Fatal(err)
		}
		seen[what] = true
		b.press("Tab")
	}
	for _, want := range []string{"sites-search", "sites-show", "sites-filter", "sites-table", "Cluster ID", "Series"} {
		if !seen[want] {
			b.t.Errorf("the key Tab does not reach %s, only %v", want, seen)
		}
	}

	var tree struct {
		Nodes []struct{ Role, Name struct{ Value any } }
	}
	b.call("Accessibility.getFullAXTree", nil, &tree)
	roles := map[string][]string{}
	for _, n := range tree.Nodes {
		role := fmt.Sprint(n.Role.Value)
		roles[role] = append(roles[role], fmt.Sprint(n.Name.Value))
	}
	if len(roles["main"]) != 1 || len(roles["table"]) == 0 || !slices.Contains(roles["heading"], "Sites") {
		b.t.Errorf("the accessibility tree has main %q, table %q, heading %q", roles["main"], roles["table"], roles["heading"])
	}
	if heads := roles["columnheader"]; len(heads) < 9 || slices.Contains(heads, "") || !slices.Contains(heads, "Last push here") {
		b.t.Errorf("the column heads have the names %q", heads)
	}
	for _, role := range []string{"link", "button", "searchbox", "combobox", "checkbox", "region", "navigation", "image"} {
		if names := roles[role]; slices.Contains(names, "") || slices.Contains(names, "<nil>") {
			b.t.Errorf("an element with the role %s has no name: %q", role, names)
		}
	}
}

// checkRefresh checks the refresh of the page of all sites, and stops the server.
func (b *browser) checkRefresh(r *srvRig) {
	b.t.Helper()
	address := r.internal.URL + "/?sort=id#sites"
	b.open(address)
	b.do("window.mark = 1; document.getElementById('sites-search').value = 'typed'")
	b.do("document.querySelector('#sites-table thead th:nth-child(4) a').focus(); scrollTo(0, 500)")
	b.until("scrollY === 500")
	now := r.now().Add(time.Minute)
	r.clock.Add(int64(time.Minute))
	r.accepted(r.push("site-000-new", "up 1\n"))
	b.do(jsRefresh)
	b.until(jsRows + ".includes('site-000-new')")
	b.is("1", "window.mark") // the page was not loaded again
	b.is(FormatTime(now), "document.getElementById('now').innerText")
	b.is("Series", "document.activeElement.innerText")
	b.is("typed", "document.getElementById('sites-search').value")
	b.is("500", "scrollY")
	b.is("10000", "window.refreshInterval")
	b.is(address, "location.href")
	b.is("true", "document.getElementById('lost').hidden")

	// A refresh that should not happen would have to reach the server before one that happens later.
	requests := len(b.requested())
	b.click("#pause")
	b.do(jsRefresh)
	b.click("#pause")
	b.do("document.getElementById('sites-search').focus()")
	b.do(jsRefresh)
	b.do("document.activeElement.blur(); getSelection().selectAllChildren(document.querySelector('h1'))")
	b.do(jsRefresh)
	b.do("getSelection().removeAllRanges()")
	r.accepted(r.push("site-000-newer", "up 1\n"))
	b.do(jsRefresh)
	b.until(jsRows + ".includes('site-000-newer')")
	if all := b.requested(); len(all) != requests+1 {
		b.t.Errorf("the page refreshed while it was paused, somebody typed or text was selected: %q", all[requests:])
	}

	r.internal.Close()
	b.do(jsRefresh)
	b.until("!document.getElementById('lost').hidden")
	b.is("true", "(r => r.top >= 0 && r.bottom <= innerHeight)(document.getElementById('lost').getBoundingClientRect())")
	b.is("true", jsRows+".includes('site-000-newer')")
}

// The page of a client works in a browser. It stays if another page answers the refresh, such as that
// of a proxy that asks for a password.
func TestBrowserClient(t *testing.T) {
	c, _, _ := newTestClient(t, "up 1\n{\"<b>bold</b>\"} 1\n", nil)
	stop := startClient(t, c)
	defer stop()
	var otherAnswers atomic.Bool
	status := c.Handler(true)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if otherAnswers.Load() {
			fmt.Fprint(w, "<h1>Password</h1>")
			return
		}
		status.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	b := startBrowser(t, srv.URL)
	b.open(srv.URL + "/")
	b.until("document.querySelector('.good')?.innerText === 'ready' || (" + jsRefresh + ", false)")
	b.is("Source Destination Spool Sent last", "[...document.querySelectorAll('h2')].slice(0, 4).map(e => e.innerText).join(' ')")
	b.is("true", "document.querySelector('main').innerText.includes('<b>bold</b>')")
	otherAnswers.Store(true)
	b.until("!document.getElementById('lost').hidden || (" + jsRefresh + ", false)")
	b.is("true", "document.querySelector('main').innerText.includes('<b>bold</b>')")
}
