package main

// This file shows a View as a page for a browser. A page loads nothing, and works without
// JavaScript; a few lines of JavaScript refresh it. Text reaches the page only through the methods
// text and open of pageWriter, which escape it. html/template would escape it as well, but would make
// the binary larger by a sixth.

import (
	"bytes"
	"crypto/sha256"
	_ "embed" // for the directive go:embed
	"encoding/base64"
	"fmt"
	"html"
	"io"
	"net/http"
	"strings"
	"unicode"
)

//go:embed http_page.css
var pageStyle string

//go:embed http_page.js
var pageScript string

// WantsHTML reports whether a request comes from a browser that shows a page.
func WantsHTML(r *http.Request) bool { return strings.Contains(r.Header.Get("Accept"), "text/html") }

// WritePage answers a request with a view as a page.
func WritePage(w http.ResponseWriter, r *http.Request, v *View) {
	var p pageWriter
	p.page(v)
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", fmt.Sprintf("default-src 'none'; style-src %s; script-src %s; img-src data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
		sourceHash(pageStyle), sourceHash(pageScript)))
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	body, finish := CompressResponse(w, r)
	io.Copy(body, &p.buf) // an error here and in finish means only that the connection failed
	finish()
}

// sourceHash returns the source expression of a Content-Security-Policy for an inline text.
func sourceHash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// pageWriter writes HTML. Its names of elements and attributes are constants of the program.
type pageWriter struct{ buf bytes.Buffer }

// raw writes HTML that is a constant of the program.
func (p *pageWriter) raw(constant string) { p.buf.WriteString(constant) }

// text writes a text. It replaces control characters, which a page must not have, and the characters
// that change the direction of text, which could make a text look like another.
func (p *pageWriter) text(text string) {
	p.buf.WriteString(html.EscapeString(strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' || unicode.Is(unicode.Bidi_Control, r) {
			return unicode.ReplacementChar
		}
		return r
	}, text)))
}

// open begins an element. The attributes are pairs of a name and a value; an attribute whose value is
// "" is left out.
func (p *pageWriter) open(element string, attributes ...string) {
	p.raw("<" + element)
	for i := 0; i < len(attributes); i += 2 {
		if attributes[i+1] != "" {
			p.raw(" " + attributes[i] + `="`)
			p.text(attributes[i+1])
			p.raw(`"`)
		}
	}
	p.raw(">")
}

// close ends elements.
func (p *pageWriter) close(elements ...string) {
	for _, element := range elements {
		p.raw("</" + element + ">")
	}
	p.raw("\n")
}

// element writes an element with a text.
func (p *pageWriter) element(element, text string, attributes ...string) {
	p.open(element, attributes...)
	p.text(text)
	p.close(element)
}

// safeAddress returns the address if it is an http, an https or a relative one, or else "": following
// an address with another scheme could run a script.
func safeAddress(address string) string {
	scheme, _, hasScheme := strings.Cut(address, ":")
	if hasScheme && scheme != "http" && scheme != "https" && !strings.ContainsAny(scheme, "/?#") {
		return ""
	}
	return address
}

// link writes a text, as a link if safeAddress accepts the address.
func (p *pageWriter) link(text, address string, attributes ...string) {
	if address = safeAddress(address); address == "" {
		p.text(text)
		return
	}
	p.element("a", text, append([]string{"href", address}, attributes...)...)
}

// cell writes the content of a cell. The caller writes the element around it.
func (p *pageWriter) cell(c Cell) {
	if c.Tone != TonePlain || c.Hint != "" {
		p.open("span", "class", string(c.Tone), "title", c.Hint)
		defer p.raw("</span>")
	}
	p.link(c.Text, c.Link)
	if c.Part > 0 {
		p.raw(`<svg class="bar small" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class="track" width="100" height="10"/>`)
		p.open("rect", "class", "s0", "height", "10", "width", fmt.Sprintf("%.1f", 100*min(c.Part, 1)))
		p.close("rect", "svg")
	}
}

func (p *pageWriter) page(v *View) {
	st := v.Process
	title := fmt.Sprintf("%s · telemeter %s", st.Name, st.Kind)
	if len(st.Problems) > 0 {
		title = fmt.Sprintf("(%d) %s", len(st.Problems), title)
	}
	p.raw("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n")
	p.element("title", title)
	p.raw("<link rel=\"icon\" href=\"data:,\"><style>" + pageStyle + "</style><noscript><meta http-equiv=\"refresh\" content=\"30\"></noscript></head>\n")
	p.raw("<body><a class=\"skip\" href=\"#content\">Skip to the content</a>\n" +
		"<p id=\"lost\" class=\"bad\" role=\"status\" hidden>The last refresh failed: this page is old.</p>\n<header>")
	p.element("h1", st.Name)
	p.element("span", fmt.Sprintf("telemeter %s %s, up for %s", st.Kind, st.Version, FormatAge(st.Now.Sub(st.Started))), "class", "soft")
	if st.NotReady != "" {
		p.element("span", "not ready", "class", "bad", "title", st.NotReady)
	} else {
		p.element("span", "ready", "class", "good")
	}
	if len(v.Links) > 0 {
		p.raw("<nav aria-label=\"Other pages\"><ul>")
		for _, l := range v.Links {
			p.raw("<li>")
			p.link(l.Text, l.Address)
			p.close("li")
		}
		p.close("ul", "nav")
	}
	p.raw("</header>\n<main id=\"content\">\n")
	p.problems(st.Problems)
	for i := range v.Sections {
		p.section(&v.Sections[i])
	}
	p.raw("</main>\n<footer><p id=\"refresh\" hidden><label><input type=\"checkbox\" id=\"pause\"> Pause the automatic refresh</label></p>\n<p>")
	p.raw("The same as JSON: <a href=\"api/status\">/api/status</a>. Metrics: <a href=\"metrics\">/metrics</a>. Made at ")
	p.element("span", FormatTime(st.Now), "id", "now")
	p.raw("</p></footer>\n<script>" + pageScript + "</script></body></html>\n")
}

func (p *pageWriter) problems(problems []string) {
	if len(problems) == 0 {
		p.element("p", "Nothing needs attention.", "class", "fine")
		return
	}
	p.raw("<section class=\"problems\" aria-labelledby=\"problems\"><h2 id=\"problems\">Needs attention</h2><ul>")
	for _, problem := range problems {
		p.element("li", problem)
	}
	p.close("ul", "section")
}

func (p *pageWriter) section(s *Section) {
	p.open("section", "aria-labelledby", s.ID)
	p.element("h2", s.Title, "id", s.ID)
	if s.Note.Text != "" {
		p.raw("<p>")
		p.cell(s.Note)
		p.close("p")
	}
	if len(s.Facts) > 0 {
		p.raw("<dl>")
		for _, f := range s.Facts {
			p.element("dt", f.Name)
			p.raw("<dd>")
			p.cell(f.Value)
			p.close("dd")
		}
		p.close("dl")
	}
	p.bar(s.Bar)
	if s.Filter != nil {
		p.filter(s.Filter, s.ID)
	}
	if s.Table != nil {
		p.table(s.Table, s.ID)
	}
	if len(s.Pages) > 0 {
		p.open("nav", "aria-label", "Pages of "+strings.ToLower(s.Title))
		p.raw("<ul class=\"pages\">")
		for _, l := range s.Pages {
			p.raw("<li>")
			if l.Address != "" {
				p.link(l.Text, l.Address)
			} else {
				p.element("strong", l.Text, "aria-current", "page")
			}
			p.close("li")
		}
		p.close("ul", "nav")
	}
	if len(s.Plots) > 0 {
		p.raw("<div class=\"plots\">")
		for _, plot := range s.Plots {
			p.plot(plot)
		}
		p.close("div")
	}
	p.close("section")
}

// barColors is the number of classes s0, s1 and so on in the style.
const barColors = 6

func (p *pageWriter) bar(parts []BarPart) {
	if len(parts) == 0 {
		return
	}
	label, x := []string{}, 0.0
	for _, part := range parts {
		label = append(label, fmt.Sprintf("%s %.0f percent", part.Name, 100*part.Width))
	}
	p.open("svg", "class", "bar", "viewBox", "0 0 100 10", "preserveAspectRatio", "none", "role", "img", "aria-label", strings.Join(label, ", "))
	for i, part := range parts {
		p.open("rect", "class", fmt.Sprintf("s%d", i%barColors), "x", fmt.Sprintf("%.3f", x), "width", fmt.Sprintf("%.3f", 100*part.Width), "height", "10")
		p.raw("</rect>")
		x += 100 * part.Width
	}
	p.raw("</svg><ul class=\"pages\">")
	for i, part := range parts {
		p.raw("<li><svg class=\"bar key\" aria-hidden=\"true\">")
		p.open("rect", "class", fmt.Sprintf("s%d", i%barColors), "width", "100%", "height", "100%")
		p.raw("</rect></svg>")
		p.text(fmt.Sprintf("%s %.0f %%", part.Name, 100*part.Width))
		p.close("li")
	}
	p.close("ul")
}

func (p *pageWriter) filter(f *Filter, sectionID string) {
	p.raw("<form method=\"get\" role=\"search\"><label>Cluster ID contains ")
	p.open("input", "type", "search", "id", sectionID+"-search", "name", "q", "value", f.Search)
	p.raw("</label> <label>Show ")
	p.open("select", "id", sectionID+"-show", "name", "show")
	p.raw("<option value=\"all\">all sites</option>")
	selected := ""
	if f.OnlyProblems {
		selected = "selected"
	}
	p.element("option", "sites that need attention", "value", "problems", "selected", selected)
	p.raw("</select></label>\n")
	for _, l := range f.Keep {
		p.open("input", "type", "hidden", "name", l.Text, "value", l.Address)
	}
	p.element("button", "Filter", "id", sectionID+"-filter")
	p.close("form")
}

func (p *pageWriter) table(t *Table, labelledBy string) {
	if len(t.Rows) == 0 && t.Empty != "" {
		p.element("p", t.Empty, "class", "soft")
		return
	}
	p.open("div", "id", labelledBy+"-table", "class", "scroll", "tabindex", "0", "role", "region", "aria-labelledby", labelledBy)
	p.raw("<table>")
	if t.Caption != "" {
		p.element("caption", t.Caption)
	}
	p.raw("<thead><tr>")
	for _, c := range t.Columns {
		p.open("th", "scope", "col", "class", c.class(), "aria-sort", c.Sorted)
		arrow := map[string]string{"ascending": " ▲", "descending": " ▼"}[c.Sorted]
		p.link(c.Title+arrow, c.Link)
		p.close("th")
	}
	p.raw("</tr></thead><tbody>\n")
	for _, row := range t.Rows {
		p.raw("<tr>")
		for i, c := range row {
			element, scope := "td", ""
			if i == 0 {
				element, scope = "th", "row"
			}
			p.open(element, "scope", scope, "class", t.Columns[i].class())
			p.cell(c)
			p.close(element)
		}
		p.raw("</tr>\n")
	}
	p.close("tbody", "table", "div")
}

// class returns the classes of the cells in a column.
func (c Column) class() string {
	var classes []string
	if c.IsNumber {
		classes = append(classes, "num")
	}
	if c.IsSecondary {
		classes = append(classes, "wide")
	}
	return strings.Join(classes, " ")
}

const plotWidth, plotHeight = 240.0, 48.0 // of a plot, in the units of its SVG

func (p *pageWriter) plot(plot Plot) {
	summary := fmt.Sprintf("now %s, highest %s", plot.Latest(), plot.Highest())
	var path strings.Builder
	for i, height := range plot.Heights() {
		x, y := plotWidth*float64(i)/max(1, float64(len(plot.Values)-1)), plotHeight-1-(plotHeight-2)*height
		fmt.Fprintf(&path, "%c%.1f %.1f", "ML"[min(i, 1)], x, y)
	}
	p.raw("<figure><figcaption>")
	p.element("span", plot.Title)
	p.element("span", summary, "class", "soft")
	p.raw("</figcaption>")
	p.open("svg", "class", "plot", "viewBox", fmt.Sprintf("0 0 %v %v", plotWidth, plotHeight), "preserveAspectRatio", "none", "role", "img", "aria-label", plot.Title+" in the last hour: "+summary)
	p.open("path", "d", path.String())
	p.close("path", "svg", "figure")
}
