package main

// This file shows the status of a client to people: as a page for a browser, and as the View that the
// mode status prints.

import (
	"net/http"
	"strings"
	"time"
)

// handleIndex answers GET / with the status page. A client that is no browser gets the answer of
// index instead.
func (c *Client) handleIndex(index http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !WantsHTML(r) {
			index.ServeHTTP(w, r)
			return
		}
		WritePage(w, r, ClientView(c.Status()))
	})
}

// ClientView returns the view of a status.
func ClientView(st *ClientStatus) *View {
	sections := []Section{sourceSection(st), destinationSection(st), spoolSection(&st.Spool)}
	if st.Sent != nil {
		sent := FamiliesSection("Samples", st.Sent.Families, st.Sent.Others)
		sent.ID, sent.Title = "sent", "Sent last"
		sent.Facts = []Fact{
			{"Scraped", Ago(st.Now, &st.Sent.ScrapedAt)}, {"Samples", Count(st.Sent.Samples)}, {"All of them", Cell{Text: "/federate", Link: "federate"}},
		}
		sections = append(sections, sent)
	}
	return &View{Process: &st.ProcessStatus, Sections: append(sections, WarningsSection(&st.ProcessStatus))}
}

func sourceSection(st *ClientStatus) Section {
	src := &st.Source
	facts := []Fact{{"URL", Cell{Text: src.URL}}, {"Last scrape", Ago(st.Now, src.LastScrape)}}
	if src.LastScrape != nil {
		facts = append(facts, Fact{"Samples", Plain("%s, of which %s are pushed; the scrape took %s",
			FormatCount(float64(src.Samples)), FormatCount(float64(src.Kept)), FormatSeconds(src.Seconds))})
	}
	if len(src.Others) > 0 {
		facts = append(facts, Fact{"Replicas", Cell{Text: strings.Join(src.Others, " ")}})
	}
	if src.Missing > 0 {
		text := "samples of " + FormatAge(time.Duration(src.Missing*float64(time.Second)))
		missing := Plain("%s are still to be fetched", text)
		if src.MissingError != "" {
			missing = Bad(text + " cannot be fetched: " + src.MissingError)
		}
		facts = append(facts, Fact{"Missing scrapes", missing})
	}
	facts = append(facts, failingFact(src.FailingSince, src.Error, st.Now)...)
	if src.OffsetSeconds != 0 {
		facts = append(facts, Fact{"Clock", Plain("%+.1f s behind the servers", src.OffsetSeconds)})
	}
	for _, flag := range st.Unmatched {
		facts = append(facts, Fact{flag, Bad("matches no series")})
	}
	return Section{ID: "source", Title: "Source", Facts: facts}
}

// failingFact returns the fact that something fails, or nil if since is nil.
func failingFact(since *time.Time, text string, now time.Time) []Fact {
	if since == nil {
		return nil
	}
	return []Fact{{"Failing for " + FormatAge(now.Sub(*since)), Bad(text)}}
}

func destinationSection(st *ClientStatus) Section {
	to := &st.Destination
	facts := []Fact{{"Servers, in order", Cell{Text: strings.Join(to.To, " ")}}}
	if to.Server != "" {
		facts = append(facts, Fact{"Tried last", Cell{Text: to.Server}})
	}
	facts = append(facts, Fact{"Last push", Ago(st.Now, to.LastPush)})
	if to.LastPush != nil {
		facts = append(facts, Fact{"Its size", Plain("%s samples, %s", FormatCount(float64(to.Samples)), FormatBytes(float64(to.Bytes)))})
	}
	facts = append(facts, failingFact(to.FailingSince, to.Error, st.Now)...)
	if st.TokenExpires != nil {
		facts = append(facts, Fact{"Token expires", Cell{Text: FormatTime(*st.TokenExpires)}})
	}
	return Section{ID: "destination", Title: "Destination", Facts: facts}
}

func spoolSection(s *ClientSpoolStatus) Section {
	dir := Cell{Text: s.Dir}
	if s.Dir == "" {
		dir = Bad("in memory only: a restart loses the scrapes")
	}
	used := Plain("%s of %s", FormatBytes(float64(s.Used)), FormatBytes(float64(s.Limit)))
	used.Part = float64(s.Used) / max(1, float64(s.Limit))
	table := &Table{Columns: []Column{{Title: "Scrapes that are"}, {Title: "Number", IsNumber: true}, {Title: "Size", IsNumber: true}, {Title: "Oldest"}}}
	for _, st := range s.States {
		oldest := Cell{}
		if st.Scrapes > 0 {
			oldest.Text = FormatAge(time.Duration(st.OldestAgeSeconds * float64(time.Second)))
		}
		table.Rows = append(table.Rows, []Cell{{Text: st.describe()}, Count(st.Scrapes), {Text: FormatBytes(float64(st.Bytes))}, oldest})
	}
	return Section{ID: "spool", Title: "Spool", Facts: []Fact{{"Directory", dir}, {"Used", used}}, Table: table}
}

// describe returns the delivery state in words.
func (s SpoolStateStatus) describe() string {
	switch s.State {
	case ScrapeHeld.String():
		return "held by the server, and not read by every consumer"
	case ScrapeElsewhere.String():
		return "held by another server"
	}
	return "not delivered yet"
}
