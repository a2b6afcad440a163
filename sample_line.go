package main

// A line is the rendered form of a series: name, then labels, quoted as in the text
// exposition format. Names of the legacy charset stand without quotes.

import (
	"bytes"
	"slices"
	"strconv"
)

// legacyByte says where a byte may stand in a name of the legacy charset:
// 1 a metric's or label's first byte, 2 a later one, 4 a metric's only (':').
var legacyByte = func() (t [256]byte) {
	for c := range t {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c == '_':
			t[c] = 1 | 2
		case c >= '0' && c <= '9':
			t[c] = 2
		case c == ':':
			t[c] = 4
		}
	}
	return t
}()

// legacyPrefix returns how many leading bytes of b form a legacy name; colon is
// 4 for a metric's name and 0 for a label's.
func legacyPrefix(b []byte, colon byte) int {
	if len(b) == 0 || legacyByte[b[0]]&(1|colon) == 0 {
		return 0
	}
	i := 1
	for i < len(b) && legacyByte[b[i]]&(2|colon) != 0 {
		i++
	}
	return i
}

// AppendSeries appends the line of a series whose labels are sorted.
func AppendSeries(b, name []byte, labels []Label) []byte {
	legacy := legacyPrefix(name, 4) == len(name)
	if legacy {
		b = append(b, name...)
		if len(labels) == 0 {
			return b
		}
		b = append(b, '{')
	} else {
		b = append(b, '{')
		b = appendQuoted(b, name)
	}
	for i, l := range labels {
		if i > 0 || !legacy {
			b = append(b, ',')
		}
		if legacyPrefix(l.Name, 0) == len(l.Name) {
			b = append(b, l.Name...)
		} else {
			b = appendQuoted(b, l.Name)
		}
		b = append(b, '=')
		b = appendQuoted(b, l.Value)
	}
	return append(b, '}')
}

func appendQuoted(b, s []byte) []byte {
	b = append(b, '"')
	from := 0
	for i, c := range s {
		var esc byte
		switch c {
		case '\\', '"':
			esc = c
		case '\n':
			esc = 'n'
		default:
			continue
		}
		b = append(append(b, s[from:i]...), '\\', esc)
		from = i + 1
	}
	return append(append(b, s[from:]...), '"')
}

// Excerpt is the beginning of a line as an error may show it: the series is the
// sender's own, but a hostile one must not fill a log.
func Excerpt(line []byte) string {
	if len(line) > 200 {
		line = append(bytes.Clone(line[:200]), "…"...)
	}
	return strconv.QuoteToGraphic(string(bytes.ToValidUTF8(line, []byte("\ufffd"))))
}

// IsLegacyLine is IsLegacy for a rendered line.
func IsLegacyLine(line []byte) bool {
	// Only a name that is quoted puts a quote behind a brace or comma that is
	// outside of a value; most lines have neither sequence.
	if len(line) > 0 && line[0] != '{' && !bytes.Contains(line, []byte(`{"`)) && !bytes.Contains(line, []byte(`,"`)) {
		return true
	}
	var p SeriesParser
	name, labels, err := p.ParseLine(line)
	return err == nil && IsLegacy(name, labels)
}

// IsLegacy reports whether all names of a parsed series are of the charset that
// every Prometheus reads unquoted.
func IsLegacy(name []byte, labels []Label) bool {
	return legacyPrefix(name, 4) == len(name) &&
		!slices.ContainsFunc(labels, func(l Label) bool { return legacyPrefix(l.Name, 0) != len(l.Name) })
}

// LineName returns the metric name of a rendered line.
func LineName(line []byte) []byte {
	if len(line) > 0 && line[0] == '{' {
		var p SeriesParser
		name, _, _ := p.ParseLine(line)
		return name
	}
	return line[:legacyPrefix(line, 4)]
}
