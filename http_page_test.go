package main

// Tests of pages for browsers: their structure, the headers of the answer, what becomes of hostile
// texts, and the colors of the style.

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// writtenPage returns the answer that has v as a page.
func writtenPage(v *View, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest("GET", "/", nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	WritePage(w, r, v)
	return w
}

// filledViews returns a view with all fields, and the views of a client and of a server. The map has
// the texts of the first view, by the paths of their fields.
func filledViews(prefix string) (views []*View, texts map[string]string) {
	all, client, server := &View{}, &ClientStatus{}, &ServerStatus{}
	texts = fillFields(all, prefix)
	fillFields(client, prefix)
	fillFields(server, prefix)
	site := ServerView(server, StatusQuery{})
	server.Site = nil
	return []*View{all, ClientView(client), site, ServerView(server, StatusQuery{Search: prefix, Sort: "id", Descending: true, OnlyProblems: true})}, texts
}

// A page has the elements and labels that assistive technology needs, and loads nothing. It shows
// every text of a view.
func TestPage(t *testing.T) {
	views, texts := filledViews("x")
	views = append(views, &View{Process: &ProcessStatus{}}, &View{Process: &ProcessStatus{}, Sections: []Section{{ID: "a", Table: &Table{Empty: "none"}, Plots: make([]Plot, 1)}}})
	for _, v := range views {
		parsePage(t, writtenPage(v).Body.String()).check(t)
	}
	shown := parsePage(t, writtenPage(views[0]).Body.String()).texts()
	notShown := regexp.MustCompile(`^\.Process\.(Revision|Warnings.*)$|\.Table\.Empty$`) // a section of its own shows warnings; Empty is only for tables without rows
	for field, text := range texts {
		if !notShown.MatchString(field) && !strings.Contains(shown, text) {
			t.Errorf("the page does not show %s", field)
		}
	}
	if len(texts) < 50 {
		t.Errorf("a view has %d texts", len(texts))
	}
}

// The page of a view has the same elements and attributes with any texts. A text stays as
// it is, except for control characters.
func TestPageOfHostileTexts(t *testing.T) {
	harmless, _ := filledViews("x")
	for _, hostile := range []string{
		`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onclick='alert(1)`, `</style></script><!--`, `]]><![CDATA[`,
		"javascript:alert(1)//", "data:text/html,<script>alert(1)</script>", "&amp;", "&#60;b&#62;", "'", "\u202e", "\u2066", "\x00", "\x1b[31m", "\x9b", "\u009b", "\xff\xfe",
	} {
		views, texts := filledViews(hostile)
		for i, v := range views {
			page := parsePage(t, writtenPage(v).Body.String())
			want := parsePage(t, writtenPage(harmless[i]).Body.String()).structure()
			if got := page.structure(); !slices.Equal(got, want) {
				t.Errorf("%q changes the structure of view %d from\n%s\nto\n%s", hostile, i, strings.Join(want, "\n"), strings.Join(got, "\n"))
			}
			page.check(t)
		}
		shown := parsePage(t, writtenPage(views[0]).Body.String()).texts()
		text := texts[".Sections[1].Table.Rows[1][1].Text"]
		clean := strings.NewReplacer("\u202e", "\ufffd", "\u2066", "\ufffd", "\x00", "\ufffd", "\x1b", "\ufffd", "\u009b", "\ufffd").Replace(strings.ToValidUTF8(text, "\ufffd"))
		if hostile == "\xff\xfe" { // ToValidUTF8 replaces both bytes by one character
			clean = strings.Replace(clean, "\ufffd", "\ufffd\ufffd", 1)
		}
		if text == "" || !strings.Contains(shown, clean+"\n") {
			t.Errorf("the page does not show %q as %q", text, clean)
		}
	}
}

// Only http, https and relative addresses become links.
func TestSafeAddress(t *testing.T) {
	for _, safe := range []string{
		"http://h/", "https://h/", "http:", "//host", "/", "./", "../a", "a", "?q=a:b", "#a:b", "/javascript:alert(1)", "./javascript:alert(1)", "?site=a%3Ab#sites",
	} {
		if got := safeAddress(safe); got != safe {
			t.Errorf("safeAddress(%q) = %q, want the same", safe, got)
		}
	}
	for _, bad := range []string{
		"", "javascript:alert(1)", "JavaScript:alert(1)", " javascript:alert(1)", "\tjavascript:alert(1)", "java\nscript:alert(1)", "java\tscript:/alert(1)", "\x00javascript:alert(1)",
		"\u00a0javascript:alert(1)", "javascript\t:alert(1)", "javascript://http://h/%0aalert(1)", "data:text/html,x", "vbscript:x", "blob:http://h/x", "filesystem:http://h/", "file:///etc/passwd",
		"view-source:http://h/", "about:blank", "mailto:a@h", "httpx:", ":", "a:b",
	} {
		if got := safeAddress(bad); got != "" {
			t.Errorf("safeAddress(%q) = %q, want none", bad, got)
		}
	}
}

// The policy of a page allows its own style and script, and nothing else. A page can be compressed.
func TestPageHeaders(t *testing.T) {
	views, _ := filledViews("x")
	answer := writtenPage(views[0])
	page := parsePage(t, answer.Body.String())
	hash := func(element string) string {
		sum := sha256.Sum256([]byte(page.named(element)[0].text))
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	policy := strings.Split(answer.Header().Get("Content-Security-Policy"), "; ")
	want := []string{
		"default-src 'none'", "style-src " + hash("style"), "script-src " + hash("script"), "img-src data:", "connect-src 'self'",
		"form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'",
	}
	if !slices.Equal(policy, want) {
		t.Errorf("the policy is\n%q, want\n%q", policy, want)
	}
	for name, want := range map[string]string{
		"Content-Type": "text/html; charset=utf-8", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store", "Content-Encoding": "",
	} {
		if got := answer.Header().Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	compressed := writtenPage(views[0], "Accept-Encoding", "gzip")
	if compressed.Header().Get("Content-Encoding") != "gzip" || string(gunzipped(t, compressed.Body.Bytes())) != answer.Body.String() {
		t.Errorf("the compressed page differs from the other; Content-Encoding: %q", compressed.Header().Get("Content-Encoding"))
	}
}

// Browsers get a page; curl, Prometheus and scripts do not.
func TestWantsHTML(t *testing.T) {
	for accept, want := range map[string]bool{
		"": false, "*/*": false, "application/json": false, "text/plain;version=0.0.4;q=0.5,*/*;q=0.1": false,
		"text/html": true, "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8": true,
	} {
		if got := WantsHTML(&http.Request{Header: http.Header{"Accept": {accept}}}); got != want {
			t.Errorf("Accept: %s: got %t, want %t", accept, got, want)
		}
	}
}

// colorSchemes returns the custom properties of the style that are colors, of the light and of the
// dark scheme.
func colorSchemes(t *testing.T) (light, dark map[string]string) {
	t.Helper()
	parts := strings.SplitN(pageStyle, "@media (prefers-color-scheme: dark) {", 2)
	if len(parts) != 2 {
		t.Fatal("the style has no dark scheme")
	}
	colors := func(text string) map[string]string {
		all := map[string]string{}
		for _, m := range regexp.MustCompile(`--([a-z0-9]+): #([0-9a-f]{3}|[0-9a-f]{6});`).FindAllStringSubmatch(text, -1) {
			all[m[1]] = m[2]
		}
		return all
	}
	return colors(parts[0]), colors(parts[1])
}

// luminance returns the relative luminance of a color, as WCAG 2 defines it.
func luminance(t *testing.T, color string) float64 {
	t.Helper()
	if len(color) == 3 {
		color = string([]byte{color[0], color[0], color[1], color[1], color[2], color[2]})
	}
	rgb, err := strconv.ParseUint(color, 16, 24)
	if err != nil || len(color) != 6 {
		t.Fatalf("%q is no color", color)
	}
	linear := func(shift int) float64 {
		if c := float64(rgb>>shift&0xff) / 255; c > 0.04045 {
			return math.Pow((c+0.055)/1.055, 2.4)
		} else {
			return c / 12.92
		}
	}
	return 0.2126*linear(16) + 0.7152*linear(8) + 0.0722*linear(0)
}

// In both color schemes, texts have the contrast to their backgrounds that level AA of WCAG 2 asks
// for. The parts of bars and plots have the contrast that it asks for graphics.
func TestPageContrast(t *testing.T) {
	light, dark := colorSchemes(t)
	graphics := []string{}
	for i := range barColors {
		graphics = append(graphics, fmt.Sprintf("c%d", i))
	}
	for scheme, colors := range map[string]map[string]string{"light": light, "dark": dark} {
		for _, ground := range []string{"bg", "raised"} {
			check := func(names []string, least float64) {
				for _, name := range names {
					a, b := luminance(t, colors[name]), luminance(t, colors[ground])
					if ratio := (max(a, b) + 0.05) / (min(a, b) + 0.05); ratio < least {
						t.Errorf("%s scheme: the contrast of --%s to --%s is %.2f, want %.1f", scheme, name, ground, ratio, least)
					}
				}
			}
			check([]string{"fg", "soft", "good", "bad", "accent"}, 4.5)
			check(graphics, 3)
		}
	}
}

// The style hides secondary columns on a narrow screen. It has each class that pages have, and each
// custom property that it uses.
func TestPageStyle(t *testing.T) {
	_, narrow, _ := strings.Cut(pageStyle, "@media (max-width: ")
	if !strings.Contains(narrow, ".wide { display: none; }") {
		t.Error("the style does not hide secondary columns on a narrow screen")
	}
	light, _ := colorSchemes(t)
	for _, m := range regexp.MustCompile(`var\(--(\w+)\)`).FindAllStringSubmatch(pageStyle, -1) {
		if light[m[1]] == "" {
			t.Errorf("the style uses --%s, which is no color", m[1])
		}
	}
	used := map[string]bool{"skip": true}
	for _, m := range regexp.MustCompile(`class=\\?"([a-z0-9 ]+)\\?"|"class", "([a-z0-9 ]+)"|classes, "(\w+)"`).FindAllStringSubmatch(readIn(t, ".", "http_page.go"), -1) {
		for _, class := range strings.Fields(m[1] + m[2] + m[3]) {
			used[class] = true
		}
	}
	for _, tone := range []Tone{ToneGood, ToneBad, ToneSoft} {
		used[string(tone)] = true
	}
	for i := range barColors {
		used[fmt.Sprintf("s%d", i)] = true
	}
	defined := map[string]bool{}
	for _, m := range regexp.MustCompile(`\.([a-z]\w*)[^;]*\{`).FindAllString(pageStyle, -1) {
		for _, class := range regexp.MustCompile(`\.([a-z]\w*)`).FindAllStringSubmatch(m, -1) {
			defined[class[1]] = true
		}
	}
	for class := range used {
		if !defined[class] {
			t.Errorf("pages have the class %s, which the style does not", class)
		}
	}
	for class := range defined {
		if !used[class] {
			t.Errorf("the style has the class %s, which pages do not", class)
		}
	}
}
