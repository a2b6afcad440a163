package main

// This file renders lines. A line is the rendered form of a series: the metric name and then the
// labels, with the quoting of the text exposition format. Names of the legacy charset are not
// quoted. The legacy charset is [a-zA-Z_:][a-zA-Z0-9_:]* for metric names, and the same without
// colons for label names. Every version of Prometheus can read such names.

import (
	"bytes"
	"slices"
	"strconv"
)

// Flags for the positions at which a byte may occur in a name of the legacy charset.
const (
	nameFirst byte = 1 << iota // allowed as the first byte of a metric name or label name
	nameLater                  // allowed after the first byte of a metric name or label name
	nameColon                  // allowed at any position of a metric name, but not in a label name
)

// legacyByte maps every byte to its flags. It is read-only.
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

// LegacyMetricPrefix returns the length of the longest metric name of the legacy charset with which
// b begins. It returns 0 if b does not begin with such a name.
func LegacyMetricPrefix[T string | []byte](b T) int { return legacyPrefix(b, nameColon) }

// LegacyLabelPrefix returns the length of the longest label name of the legacy charset with which b
// begins. It returns 0 if b does not begin with such a name.
func LegacyLabelPrefix[T string | []byte](b T) int { return legacyPrefix(b, 0) }

func isLegacyMetricName[T string | []byte](name T) bool { return LegacyMetricPrefix(name) == len(name) }
func isLegacyLabelName[T string | []byte](name T) bool  { return LegacyLabelPrefix(name) == len(name) }

// legacyPrefix does the work of LegacyMetricPrefix and LegacyLabelPrefix. colonBit is nameColon if
// colons are allowed, and 0 otherwise.
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

// appendLine appends the rendered line of a series to b. The labels must be sorted by name.
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

// appendQuoted appends s to b as a quoted string of the text exposition format, with backslashes,
// quotes and line feeds escaped.
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

// Excerpt returns the first 200 bytes of text for use in an error message. The result is quoted,
// with control characters escaped. Its length is bounded so that a hostile sender cannot fill the
// process log.
func Excerpt(text []byte) string {
	if len(text) > 200 {
		text = append(bytes.Clone(text[:200]), "…"...)
	}
	return strconv.QuoteToGraphic(string(bytes.ToValidUTF8(text, []byte("\ufffd"))))
}

// IsLegacy reports whether the metric name and all label names of a series belong to the legacy
// charset.
func IsLegacy(name []byte, labels []Label) bool {
	return isLegacyMetricName(name) &&
		!slices.ContainsFunc(labels, func(l Label) bool { return !isLegacyLabelName(l.Name) })
}

// IsLegacyLine reports whether the metric name and all label names in a rendered line belong to the
// legacy charset. The result for other text has no meaning.
func IsLegacyLine(line []byte) bool {
	// A line with a quoted name contains {" or ," before that name. Most lines contain neither, so
	// that they need not be parsed.
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
