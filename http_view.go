package main

// A View is what a status shows, in the order in which it is read: the page for browsers and the mode
// status both show it, so they say the same. Server and client make their views; this file makes only
// the sections that both have. Any text in a view may come from outside, so the code that shows a
// view must escape it.

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// View is a status for people.
type View struct {
	Process  *ProcessStatus
	Links    []Link // to the same view of other processes, or to the whole of which this view is a part
	Sections []Section
}

// Section is a titled part of a view. Empty fields are not shown.
type Section struct {
	ID, Title string
	Note      Cell
	Facts     []Fact
	Bar       []BarPart
	Filter    *Filter
	Table     *Table
	Pages     []Link // of the table; the link without an address is the page that is shown
	Plots     []Plot
}

// Fact is a named value.
type Fact struct {
	Name  string
	Value Cell
}

// Table has a row of heads and rows with one cell for each head. The first cell of a row names it.
type Table struct {
	Columns      []Column
	Rows         [][]Cell
	OnOtherPages int    // number of rows that are left out here
	Empty        string // shown if there are no rows
	Caption      string
}

// Column is the head of a column.
type Column struct {
	Title       string
	IsNumber    bool
	IsSecondary bool   // left out on a narrow screen
	Link        string // address that sorts by this column
	Sorted      string // "ascending", "descending", or "" if the table is not sorted by this column
}

// Tone is how a cell stands out.
type Tone string

const (
	TonePlain Tone = ""
	ToneGood  Tone = "good"
	ToneBad   Tone = "bad" // needs attention
	ToneSoft  Tone = "soft"
)

// Cell is a text in a table or a fact.
type Cell struct {
	Text string
	Tone Tone
	Link string
	Hint string  // more precise text, such as the time for an age
	Part float64 // part of a limit that is shown as a bar, from 0 to 1; 0 shows none
}

// Link is a text with an address. The page for browsers follows only http, https and relative
// addresses.
type Link struct{ Text, Address string }

// BarPart is a part of a bar. The widths of all parts add up to at most 1.
type BarPart struct {
	Name  string
	Width float64
}

// Filter is a form that selects rows of a table. Only the page for browsers shows it.
type Filter struct {
	Search       string // value of the parameter q
	OnlyProblems bool   // value of the parameter show
	Keep         []Link // other parameters, as name and value
}

// Plot is a small diagram of values over the last hour.
type Plot struct {
	Title     string
	Values    []float64 // oldest first; a value that is negative or not finite counts as 0
	IsSeconds bool      // the values are durations in seconds
}

// plotted returns the value that a plot shows for v: 0 if v is negative or not finite.
func plotted(v float64) float64 {
	if v >= 0 && v <= math.MaxFloat64 {
		return v
	}
	return 0
}

// format returns a value as text.
func (p Plot) format(v float64) string {
	if p.IsSeconds {
		return FormatSeconds(v)
	}
	return FormatCount(v)
}

// Latest returns the newest value as text.
func (p Plot) Latest() string {
	if len(p.Values) == 0 {
		return p.format(0)
	}
	return p.format(plotted(p.Values[len(p.Values)-1]))
}

func (p Plot) highest() (highest float64) {
	for _, v := range p.Values {
		highest = max(highest, plotted(v))
	}
	return highest
}

// Highest returns the highest value as text.
func (p Plot) Highest() string { return p.format(p.highest()) }

// Heights returns each value as a part of the highest one, from 0 to 1.
func (p Plot) Heights() []float64 {
	heights, highest := make([]float64, len(p.Values)), p.highest()
	for i, v := range p.Values {
		if highest > 0 {
			heights[i] = plotted(v) / highest
		}
	}
	return heights
}

// Plain, Good, Bad and Soft return cells with a text.
func Plain(format string, args ...any) Cell { return Cell{Text: fmt.Sprintf(format, args...)} }
func Good(text string) Cell                 { return Cell{Text: text, Tone: ToneGood} }
func Bad(text string) Cell                  { return Cell{Text: text, Tone: ToneBad} }
func Soft(text string) Cell                 { return Cell{Text: text, Tone: ToneSoft} }

// Count returns a cell with a number.
func Count[N int | int64 | float64](n N) Cell { return Cell{Text: FormatCount(float64(n))} }

// Ago returns a cell with the time since at, or "never" if at is nil.
func Ago(now time.Time, at *time.Time) Cell {
	if at == nil {
		return Soft("never")
	}
	return Cell{Text: FormatAge(now.Sub(*at)) + " ago", Hint: FormatTime(*at)}
}

// StateOr returns the problem as a cell, or ok if there is none.
func StateOr(problem string, ok Cell) Cell {
	if problem != "" {
		return Bad(problem)
	}
	return ok
}

// FamiliesSection returns the section with the metric names that have the highest counts.
func FamiliesSection(what string, families []FamilyCount, others int) Section {
	table := &Table{Columns: []Column{{Title: "Metric name"}, {Title: what, IsNumber: true}}, Empty: "There are none."}
	for _, f := range families {
		table.Rows = append(table.Rows, []Cell{{Text: f.Name}, Count(f.Count)})
	}
	s := Section{ID: "families", Title: what + " by metric name", Table: table}
	table.OnOtherPages = others
	if others > 0 {
		table.Caption = FormatCount(float64(others)) + " more metric names have fewer."
	}
	return s
}

// WarningsSection returns the section with the newest lines of the log.
func WarningsSection(st *ProcessStatus) Section {
	table := &Table{Columns: []Column{{Title: "When"}, {Title: "Level"}, {Title: "Message"}}, Empty: "There are none since the start."}
	for _, w := range st.Warnings {
		level := Plain("%s", w.Level)
		if w.Level == "ERROR" {
			level.Tone = ToneBad
		}
		table.Rows = append(table.Rows, []Cell{Ago(st.Now, &w.At), level, {Text: w.Text}})
	}
	return Section{ID: "log", Title: "Newest warnings and errors of the log", Table: table}
}

// FormatTime returns a time for people, in UTC.
func FormatTime(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 MST") }

// FormatAge returns a time span for people, in its two largest units, such as 4s, 2m30s, 3h5m or
// 12d4h. A negative span counts as 0.
func FormatAge(d time.Duration) string {
	d = max(0, d)
	const day = 24 * time.Hour
	large, small, units := d/day, d%day/time.Hour, "dh"
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		large, small, units = d/time.Minute, d%time.Minute/time.Second, "ms"
	case d < day:
		large, small, units = d/time.Hour, d%time.Hour/time.Minute, "hm"
	}
	if small == 0 {
		return fmt.Sprintf("%d%c", large, units[0])
	}
	return fmt.Sprintf("%d%c%d%c", large, units[0], small, units[1])
}

// FormatCount returns a number for people, with a comma before each three digits. A fraction that is
// rounded to less than 100 has two digits.
func FormatCount(v float64) string {
	switch {
	case math.IsInf(v, 0):
		return strconv.FormatFloat(v, 'g', -1, 64)
	case v != math.Trunc(v) && math.Abs(v) < 99.5:
		return strconv.FormatFloat(v, 'g', 2, 64)
	}
	digits := strconv.FormatFloat(math.Abs(v), 'f', 0, 64)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	if v < 0 {
		return "-" + digits
	}
	return digits
}

// FormatBytes returns a number of bytes for people, such as 512 B, 1.4 MiB or 23 GiB.
func FormatBytes(v float64) string {
	units, unit := []string{"B", "KiB", "MiB", "GiB", "TiB"}, 0
	for v >= 1023.5 && unit < len(units)-1 { // 1023.5 would be rounded to 1024
		v, unit = v/1024, unit+1
	}
	if unit == 0 || v >= 9.95 { // 9.95 would be rounded to 10.0
		return fmt.Sprintf("%.0f %s", v, units[unit])
	}
	return fmt.Sprintf("%.1f %s", v, units[unit])
}

// FormatSeconds returns a duration in seconds for people, rounded to milliseconds.
func FormatSeconds(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(time.Millisecond).String()
}

// ListNames returns the first names as text, at most limit of them, and the number of the other names.
func ListNames(names []string, limit int) string {
	if len(names) <= limit {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:limit], ", "), len(names)-limit)
}

// HighestFamilies returns the metric names with the highest counts, at most limit of them, highest
// first, and the number of the other metric names.
func HighestFamilies(byName map[string]int, limit int) (highest []FamilyCount, others int) {
	highest = []FamilyCount{} // not nil, because a status is also JSON
	for name, n := range byName {
		highest = append(highest, FamilyCount{name, n})
	}
	slices.SortFunc(highest, func(a, b FamilyCount) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(a.Name, b.Name))
	})
	others = max(0, len(highest)-limit)
	return highest[:len(highest)-others], others
}
