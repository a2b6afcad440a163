package main

// This file decodes text exposition and OpenMetrics text, line by line. Memory used beyond the
// body is bounded by the longest line that SeriesParser accepts.

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
)

// decodeText decodes a part of a body: of OpenMetrics if openMetrics is true, and of text exposition
// otherwise. Text exposition must end in a newline, and OpenMetrics in "# EOF". So decodeText
// detects truncated bodies, except text exposition that is cut off exactly at the end of a line.
// Every part but the last one must end in a newline.
func (d *Decoder) decodeText(body []byte, openMetrics, isLast bool, emit func(*RawSample) error) error {
	for len(body) > 0 {
		d.units++
		n := d.units
		if d.ended {
			return fmt.Errorf("line %d: content after # EOF", n)
		}
		line, rest, ended := bytes.Cut(body, []byte("\n"))
		if !ended && !(openMetrics && string(body) == "# EOF") {
			return fmt.Errorf("line %d: truncated: the last line does not end in a newline", n)
		}
		body, line = rest, skipBlanks(line)
		switch {
		case len(line) == 0:
		case openMetrics && string(line) == "# EOF":
			d.ended = true
		case line[0] == '#':
			if family, ok := bytes.CutPrefix(line, []byte("# TYPE ")); ok && openMetrics {
				d.created = d.appendCreatedName(d.created[:0], family)
			}
		default:
			if err := d.decodeKnownLine(line, openMetrics, d.created, emit); err != nil {
				return fmt.Errorf("line %d: series %s: %w", n, Excerpt(line), err)
			}
		}
	}
	if isLast && openMetrics && !d.ended {
		return errors.New("truncated: OpenMetrics text does not end in # EOF")
	}
	return nil
}

// decodeKnownLine decodes the line of one sample, quickly if the series is known. In OpenMetrics no
// series is known.
func (d *Decoder) decodeKnownLine(line []byte, openMetrics bool, createdName []byte, emit func(*RawSample) error) error {
	var l plainLine
	if d.known == nil || openMetrics || !l.split(line) {
		return d.decodeSampleLine(line, openMetrics, createdName, emit)
	}
	if !l.hasT {
		l.t = d.known.arrival
	}
	h := d.known.known.hashForm(formHash{}, l.series)
	if known, err := d.known.addIfKnown(h, l.t, l.v); known {
		return err
	}
	return d.learn(h, func() error { return d.decodeSampleLine(line, openMetrics, createdName, emit) })
}

// decodeSampleLine decodes the line of one sample and emits the sample. If createdName is not
// empty, a sample with this name is a _created sample: it is skipped and counted.
func (d *Decoder) decodeSampleLine(line []byte, openMetrics bool, createdName []byte, emit func(*RawSample) error) error {
	if err := d.parseSample(line, openMetrics); err != nil {
		return err
	}
	if len(createdName) > 0 && bytes.Equal(d.raw.Name, createdName) {
		d.skipped.Created++
		return nil
	}
	return emit(&d.raw)
}

// appendCreatedName appends to dst the name that the _created samples of a family have. nameAndType
// is the text after "# TYPE ". appendCreatedName appends nothing if families of this type have no
// _created samples, or if the text is malformed.
func (d *Decoder) appendCreatedName(dst, nameAndType []byte) []byte {
	i := bytes.LastIndexByte(nameAndType, ' ')
	if i <= 0 || i > MaxLine {
		return dst
	}
	switch string(nameAndType[i+1:]) {
	case "counter", "histogram", "summary":
	default:
		return dst
	}
	name := nameAndType[:i]
	if name[0] == '"' { // put the quoted name in braces: that makes a series, which the parser can unquote
		var err error
		if name, _, err = d.parser.ParseLine(slices.Concat([]byte("{"), name, []byte("}"))); err != nil {
			return dst
		}
	}
	return append(append(dst, name...), "_created"...)
}

// parseSample parses the line of one sample into d.raw. It removes and counts labels with the type
// or unit of the metric. It skips and counts an exemplar.
func (d *Decoder) parseSample(line []byte, openMetrics bool) error {
	var rest []byte
	var err error
	if d.raw.Name, d.raw.Labels, rest, err = d.parser.parsePrefix(line); err != nil {
		return err
	}
	n := len(d.raw.Labels)
	d.raw.Labels = slices.DeleteFunc(d.raw.Labels, func(l Label) bool { return isTypeOrUnitLabel(l.Name) })
	d.skipped.Metadata += n - len(d.raw.Labels)
	value, rest := cutAtBlank(skipBlanks(rest))
	if d.raw.V, err = parseFloat(value); err != nil {
		return err
	}
	if d.raw.HasT = len(rest) > 0 && rest[0] != '#'; d.raw.HasT {
		var timestamp []byte
		timestamp, rest = cutAtBlank(rest)
		if d.raw.T, err = parseTimestamp(timestamp, openMetrics); err != nil {
			return err
		}
	}
	if len(rest) > 0 {
		if !openMetrics || rest[0] != '#' {
			return fmt.Errorf("unexpected %s after the sample", Excerpt(rest))
		}
		d.skipped.Exemplars++
	}
	return nil
}

// cutAtBlank splits b at its first blanks, which are spaces or tabs. token is the part before the
// blanks. rest is the part after them.
func cutAtBlank(b []byte) (token, rest []byte) {
	i := 0
	for i < len(b) && b[i] != ' ' && b[i] != '\t' {
		i++
	}
	return b[:i], skipBlanks(b[i:])
}

// parseTimestamp parses a timestamp and returns it in ms since the epoch. Timestamps are seconds
// in OpenMetrics and milliseconds in text exposition.
func parseTimestamp(b []byte, openMetrics bool) (int64, error) {
	if openMetrics {
		sec, err := parseFloat(b)
		if err != nil || !(math.Abs(sec) < 1e13) {
			return 0, fmt.Errorf("timestamp %s is not a number of seconds", Excerpt(b))
		}
		return int64(math.Round(sec * 1000)), nil
	}
	if ms, ok := parseDigits(b); ok {
		return ms, nil
	}
	ms, err := strconv.ParseInt(string(b), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("timestamp %s is not a whole number of milliseconds", Excerpt(b))
	}
	return ms, nil
}

// parseFloat parses a value. It accepts the floats that Prometheus accepts (model/textparse), so
// it rejects hexadecimal floats and underscores.
func parseFloat(b []byte) (float64, error) {
	if len(b) == 0 {
		return 0, errors.New("no value")
	}
	if v, ok := parseShortDecimal(b); ok {
		return v, nil
	}
	if v, err := strconv.ParseFloat(string(b), 64); err == nil && !bytes.ContainsAny(b, "pPxX_") {
		return v, nil
	}
	return 0, fmt.Errorf("value %s is not a float", Excerpt(b))
}

// powersOfTen has the powers of ten that a float64 holds exactly and parseShortDecimal needs.
var powersOfTen = [...]float64{1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15}

// parseShortDecimal parses a number of at most 15 digits without an exponent, and returns the same as
// strconv.ParseFloat. Both the digits and the power of ten are then exact as float64, so that their
// quotient is rounded once (Clinger, "How to read floating point numbers accurately", 1990).
func parseShortDecimal(b []byte) (v float64, ok bool) {
	const maxDigits = len(powersOfTen) - 1
	i, point := 0, -1
	if b[0] == '-' {
		i = 1
	}
	first, n := i, int64(0)
	for ; i < len(b); i++ {
		switch c := b[i]; {
		case c >= '0' && c <= '9':
			n = 10*n + int64(c-'0')
		case c == '.' && point < 0:
			point = i
		default:
			return 0, false
		}
	}
	digits, decimals := len(b)-first, 0
	if point >= 0 {
		digits, decimals = digits-1, len(b)-1-point
	}
	if digits == 0 || digits > maxDigits {
		return 0, false
	}
	if v = float64(n) / powersOfTen[decimals]; first > 0 {
		v = -v
	}
	return v, true
}

// parseDigits parses a number of 1 to 18 digits.
func parseDigits(b []byte) (n int64, ok bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = 10*n + int64(c-'0')
	}
	return n, true
}
