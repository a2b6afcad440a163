package main

// This file implements the mode status, which prints the status of a server or of a client. It prints
// what /api/status of that process answers, so the page for browsers shows the same. It prints no
// control character that came from outside. The exit status is 1 if something needs attention.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	statusTimeout   = 20 * time.Second // limit of the request
	maxStatusAnswer = 64 << 20         // bytes of the answer
	maxStatusRows   = 15               // sites, refusals and warnings that are printed, each
	maxStatusText   = 120              // characters of a message that are printed
)

type statusFlags struct {
	from      *url.URL
	tokenFile string
	caFile    string
	site      string
	asJSON    bool
}

func statusMode(ctx context.Context, c *command) error {
	c.about = "shows how a running server or client is, and exits with 1 if something needs attention."
	c.example = "telemeter --mode status --from http://localhost:9004"
	var f statusFlags
	c.defineGroup("Process", func() {
		c.urlFlag(&f.from, "from", "http://localhost:9004", "`URL` URL of the internal listener of a server, or of the listener of a client, such as http://localhost:9002")
		c.StringVar(&f.tokenFile, "federate-token-file", "", "`FILE` file with the bearer token of the server's --federate-token-file")
		c.StringVar(&f.caFile, "from-ca-file", "", "`FILE` file with CA certificates to verify the certificate of --from, such as the server's tls.crt")
	})
	c.defineGroup("Output", func() {
		c.clusterIDFlag(&f.site, "site", "`ID` cluster ID of a site whose details are shown; only of a server")
		c.BoolVar(&f.asJSON, "json", false, "print the status as JSON, as /api/status answers it")
	})
	if err := c.parseArgs(); err != nil {
		return err
	}
	if err := c.err(); err != nil {
		return err
	}
	body, err := f.fetch(ctx)
	if err != nil {
		return err
	}
	view, site, err := parseStatus(body)
	if err != nil {
		return fmt.Errorf("reading the status of %s: %w", f.from.Redacted(), err)
	}
	st := view.Process
	if f.site != "" && st.Kind == KindClientStatus {
		return fmt.Errorf("--site: %s is a client, which knows only its own site: leave the flag out, or name a server with --from", f.from.Redacted())
	}
	if f.asJSON {
		_, err = c.stdout.Write(body)
	} else {
		p := &statusPrinter{inColor: isTerminal(c.stdout)}
		p.view(view)
		_, err = io.WriteString(c.stdout, p.text.String())
	}
	if err != nil {
		return fmt.Errorf("printing the status: %w", err)
	}
	return attention(st, site)
}

// parseStatus returns the view of a status, and the site that was asked for, or nil. The parameter
// body is the JSON of the status.
func parseStatus(body []byte) (*View, *SiteDetail, error) {
	var st ProcessStatus
	if err := json.Unmarshal(body, &st); err != nil {
		return nil, nil, err
	}
	switch st.Kind {
	case KindServerStatus:
		var server ServerStatus
		if err := json.Unmarshal(body, &server); err != nil {
			return nil, nil, err
		}
		return ServerView(&server, StatusQuery{Sort: SiteOrders()[0], Page: 1}), server.Site, nil
	case KindClientStatus:
		var client ClientStatus
		if err := json.Unmarshal(body, &client); err != nil {
			return nil, nil, err
		}
		return ClientView(&client), nil, nil
	}
	return nil, nil, fmt.Errorf("it is of the unknown kind %.20q", st.Kind)
}

// attention returns an error that says what needs attention, or nil if nothing does. If a site was
// asked for, only the site counts.
func attention(st *ProcessStatus, site *SiteDetail) error {
	switch {
	case site != nil && site.Problem != "":
		return fmt.Errorf("site %s needs attention: %s", printable(site.ID), printable(site.Problem))
	case site != nil || len(st.Problems) == 0:
		return nil
	case len(st.Problems) == 1:
		return fmt.Errorf("%s %s needs attention: %s", st.Kind, printable(st.Name), printable(st.Problems[0]))
	}
	return fmt.Errorf("%s %s needs attention: %d problems", st.Kind, printable(st.Name), len(st.Problems))
}

// fetch returns the JSON of the status.
func (f *statusFlags) fetch(ctx context.Context) (body []byte, err error) {
	token, err := readOptionalSecret("federate-token-file", f.tokenFile)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.caFile != "" {
		if config.RootCAs, err = readCAs("from-ca-file", f.caFile); err != nil {
			return nil, err
		}
	}
	target := f.from.JoinPath("api/status")
	if f.site != "" {
		target.RawQuery = url.Values{"site": {f.site}}.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("--from %s: %w", f.from.Redacted(), err)
	}
	if token != nil {
		req.Header.Set("Authorization", "Bearer "+string(token))
	}
	resp, err := NewHTTPClient(config, statusTimeout, 10*time.Second).Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking %s: %w: %s", f.from.Redacted(), err, statusAdvice(err))
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxStatusAnswer+1))
	answered := fmt.Sprintf("%s answered %s", f.from.Redacted(), printable(resp.Status))
	switch {
	case resp.StatusCode == http.StatusUnauthorized:
		return nil, fmt.Errorf("%s: name the file with the server's federate token with --federate-token-file", answered)
	case resp.StatusCode == http.StatusNotFound && f.site == "":
		return nil, fmt.Errorf("%s: it is no listener of this version of telemeter that has a status: by default, a server has its status at http://localhost:9004, and a client at http://localhost:9002", answered)
	case resp.StatusCode == http.StatusBadRequest && IsAnswerOfTLSPort(string(body)):
		return nil, fmt.Errorf("%s: the listener uses TLS: write https:// in --from", answered)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s: %s", answered, short(string(body[:min(len(body), maxStatusText*utf8.UTFMax)])))
	case err != nil:
		return nil, fmt.Errorf("reading the answer of %s: %w", f.from.Redacted(), err)
	case len(body) > maxStatusAnswer:
		return nil, fmt.Errorf("%s with more than %s, so it is no status of telemeter", answered, FormatBytes(maxStatusAnswer))
	}
	return body, nil
}

// statusAdvice returns what to do about a request for a status that got no answer.
func statusAdvice(err error) string {
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.Is(err, http.ErrSchemeMismatch):
		return "the listener uses plain HTTP: write http:// in --from"
	case errors.As(err, &unknown):
		return "name the file with the server's tls.crt with --from-ca-file"
	}
	return "name the internal listener of a running server, or the listener of a running client, with --from"
}

// printable returns text in one line, with a question mark for each character that could control a
// terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(strings.Join(strings.Fields(text), " "), "?"))
}

// short returns printable text that is cut after maxStatusText characters.
func short(text string) string {
	runes := []rune(printable(text))
	if len(runes) > maxStatusText {
		return string(runes[:maxStatusText-1]) + "…"
	}
	return string(runes)
}

// Escape sequences of ECMA-48 for the colors of a terminal.
const (
	colorRed   = "\x1b[31m"
	colorGreen = "\x1b[32m"
	colorBold  = "\x1b[1m"
	colorOff   = "\x1b[0m"
)

// statusPrinter writes a view as text for a terminal.
type statusPrinter struct {
	text    strings.Builder
	inColor bool
}

func (p *statusPrinter) color(color, text string) string {
	if !p.inColor || text == "" {
		return text
	}
	return color + text + colorOff
}

func (p *statusPrinter) line(format string, args ...any) { fmt.Fprintf(&p.text, format+"\n", args...) }

func (p *statusPrinter) view(v *View) {
	st := v.Process
	ready := p.color(colorGreen, "ready")
	if st.NotReady != "" {
		ready = p.color(colorRed, "not ready")
	}
	p.line("%s %s, version %s, up for %s, %s", st.Kind, p.color(colorBold, printable(st.Name)), printable(st.Version), FormatAge(st.Now.Sub(st.Started)), ready)
	if len(st.Problems) == 0 {
		p.line("%s", p.color(colorGreen, "nothing needs attention"))
	}
	for _, problem := range st.Problems {
		p.line("%s", p.color(colorRed, "needs attention: "+printable(problem)))
	}
	for i := range v.Sections {
		p.section(&v.Sections[i])
	}
}

// section writes a section.
func (p *statusPrinter) section(s *Section) {
	p.line("\n%s", p.color(colorBold, printable(s.Title)))
	if s.Note.Text != "" {
		p.line("  %s", p.cell(s.Note))
	}
	width := 0
	for _, f := range s.Facts {
		width = max(width, len([]rune(printable(f.Name))))
	}
	for _, f := range s.Facts {
		p.line("  %-*s  %s", width, printable(f.Name), p.cell(f.Value))
	}
	if s.Table != nil {
		p.table(s.Table)
	}
	for _, plot := range s.Plots {
		p.line("  %-22s %s  now %s, highest %s", printable(plot.Title), sparkline(plot.Heights()), plot.Latest(), plot.Highest())
	}
}

// cell returns the text of a cell, in its color.
func (p *statusPrinter) cell(c Cell) string {
	switch c.Tone {
	case ToneBad:
		return p.color(colorRed, printable(c.Text))
	case ToneGood:
		return p.color(colorGreen, printable(c.Text))
	}
	return printable(c.Text)
}

// table writes a table in columns, without the secondary ones, and at most maxStatusRows of its rows.
// A row that has a bad cell is red as a whole, because colors inside a row would shift its columns.
func (p *statusPrinter) table(t *Table) {
	if len(t.Rows) == 0 && t.Empty != "" {
		p.line("  %s", printable(t.Empty))
		return
	}
	rows := t.Rows[:min(len(t.Rows), maxStatusRows)]
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 0, ' ', 0)
	write := func(text func(column int) string) {
		for i, c := range t.Columns {
			if !c.IsSecondary {
				fmt.Fprintf(w, "  %s\t", short(text(i)))
			}
		}
		fmt.Fprintln(w)
	}
	write(func(i int) string { return strings.ToUpper(t.Columns[i].Title) })
	for _, row := range rows {
		write(func(i int) string { return row[i].Text })
	}
	w.Flush() // writing to a strings.Builder does not fail
	for i, line := range strings.Split(strings.TrimSuffix(text.String(), "\n"), "\n") {
		line = strings.TrimRight(line, " ")
		if i > 0 && slices.ContainsFunc(rows[i-1], func(c Cell) bool { return c.Tone == ToneBad }) {
			line = p.color(colorRed, line)
		}
		p.line("%s", line)
	}
	if left := len(t.Rows) - len(rows) + t.OnOtherPages; left > 0 {
		p.line("  and %s more", FormatCount(float64(left)))
	}
}

// sparkline returns a line of block characters, one for each two heights, which are from 0 to 1. A
// character shows the larger height of the two.
func sparkline(heights []float64) string {
	blocks := []rune(" ▁▂▃▄▅▆▇█")
	var line strings.Builder
	for two := range slices.Chunk(heights, 2) {
		line.WriteRune(blocks[int(math.Ceil(slices.Max(two)*float64(len(blocks)-1)))])
	}
	return line.String()
}
