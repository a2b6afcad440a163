package main

// A line is the rendered form of a series: name, then labels, quoted as in the text
// exposition format. Names of the legacy charset stand without quotes.

import (
	"bytes"
	"slices"
	"strconv"
)

// Where a byte may stand in a name of the legacy charset.
const (
	nameFirst byte = 1 << iota // the first byte of a metric's or a label's name
	nameLater                  // a later byte of one
	nameColon                  // any byte of a metric's name only
)

var legacyByte = func() (t [256]byte) {
	for c := range t {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c == '_':
			t[c] = nameFirst | nameLater
		case c >= '0' && c <= '9':
			t[c] = nameLater
		case c == ':':
			t[c] = nameColon
		}
	}
	return t
}()

// LegacyMetricPrefix returns how many leading bytes of b form a metric's name of the legacy
// charset.
func LegacyMetricPrefix[T string | []byte](b T) int { return legacyPrefix(b, nameColon) }

// LegacyLabelPrefix is LegacyMetricPrefix for the name of a label.
func LegacyLabelPrefix[T string | []byte](b T) int { return legacyPrefix(b, 0) }

func isLegacyMetricName[T string | []byte](name T) bool { return LegacyMetricPrefix(name) == len(name) }
func isLegacyLabelName[T string | []byte](name T) bool  { return LegacyLabelPrefix(name) == len(name) }

func legacyPrefix[T string | []byte](b T, colonBit byte) int {
	if len(b) == 0 || legacyByte[b[0]]&(nameFirst|colonBit) == 0 {
		return 0
	}
	i := 1
	for i < len(b) && legacyByte[b[i]]&(nameLater|colonBit) != 0 {
		i++
	}
	return i
}

// appendLine appends the line of a series, whose labels are sorted.
func appendLine(b, name []byte, labels []Label) []byte {
	legacy := isLegacyMetricName(name)
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
		if isLegacyLabelName(l.Name) {
			b = append(b, l.Name...)
		} else {
			b = appendQuoted(b, l.Name)
		}
		b = append(b, '=')
		b = appendQuoted(b, l.Value)
	}
	return append(b, '}')
}

// appendQuoted appends s as a quoted string of the text exposition format.
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

// Excerpt returns the beginning of foreign text, quoted, as an error may show it: a sender may
// see its own text, but a hostile one must not fill a log.
func Excerpt(text []byte) string {
	if len(text) > 200 {
		text = append(bytes.Clone(text[:200]), "…"...)
	}
	return strconv.QuoteToGraphic(string(bytes.ToValidUTF8(text, []byte("\ufffd"))))
}

// IsLegacy reports whether all names of a series are of the charset that every Prometheus
// reads unquoted.
func IsLegacy(name []byte, labels []Label) bool {
	return isLegacyMetricName(name) &&
		!slices.ContainsFunc(labels, func(l Label) bool { return !isLegacyLabelName(l.Name) })
}

// IsLegacyLine is IsLegacy for a rendered line.
func IsLegacyLine(line []byte) bool {
	// Only a quoted name puts a quote behind a brace or comma outside of a value. Most lines
	// have neither sequence, so that they need not be parsed.
	if len(line) > 0 && line[0] != '{' && !bytes.Contains(line, []byte(`{"`)) && !bytes.Contains(line, []byte(`,"`)) {
		return true
	}
	var p SeriesParser
	name, labels, err := p.ParseLine(line)
	return err == nil && IsLegacy(name, labels)
}

// LineName returns the metric name of a rendered line.
func LineName(line []byte) []byte {
	if len(line) > 0 && line[0] == '{' {
		var p SeriesParser
		name, _, _ := p.ParseLine(line)
		return name
	}
	return line[:LegacyMetricPrefix(line)]
}
