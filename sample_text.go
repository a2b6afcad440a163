package main

// Decoding of text exposition and OpenMetrics, line by line. Memory used beyond the body is
// bounded by the longest line.

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
)

func (d *Decoder) text(body []byte, openMetrics bool, emit func(*RawSample) error) error {
	var created []byte // the name of the current family's _created samples
	for n := 1; len(body) > 0; n++ {
		end := bytes.IndexByte(body, '\n')
		line := body
		if end < 0 {
			if !openMetrics || string(body) != "# EOF" {
				return fmt.Errorf("line %d: truncated: the last line does not end in a newline", n)
			}
			body = nil
		} else {
			line, body = body[:end], body[end+1:]
		}
		line = bytes.TrimLeft(line, " \t")
		if len(line) == 0 {
			continue
		}
		if line[0] == '#' {
			if openMetrics && string(line) == "# EOF" {
				if len(body) > 0 {
					return fmt.Errorf("line %d: content after # EOF", n+1)
				}
				return nil
			}
			if rest, ok := bytes.CutPrefix(line, []byte("# TYPE ")); ok && openMetrics {
				created = d.createdName(created[:0], rest)
			}
			continue
		}
		err := d.sample(line, openMetrics)
		if err == nil {
			if len(created) > 0 && bytes.Equal(d.raw.Name, created) {
				d.skipped.Created++
				continue
			}
			err = emit(&d.raw)
		}
		if err != nil {
			return fmt.Errorf("line %d: series %s: %w", n, Excerpt(line), err)
		}
	}
	if openMetrics {
		return errors.New("truncated: OpenMetrics text does not end in # EOF")
	}
	return nil
}

// createdName appends to b the name of the _created samples of the family whose
// name and type follow # TYPE; nothing if it cannot have such.
func (d *Decoder) createdName(b, family []byte) []byte {
	i := bytes.LastIndexByte(family, ' ')
	if i <= 0 || i > MaxLine {
		return b
	}
	switch string(family[i+1:]) {
	case "counter", "histogram", "summary":
	default:
		return b
	}
	name := family[:i]
	if name[0] == '"' { // alone in braces it is a series
		var err error
		if name, _, err = d.parser.ParseLine(slices.Concat([]byte("{"), name, []byte("}"))); err != nil {
			return b
		}
	}
	return append(append(b, name...), "_created"...)
}

func cutToken(b []byte) (token, rest []byte) {
	i := 0
	for i < len(b) && b[i] != ' ' && b[i] != '\t' {
		i++
	}
	return b[:i], bytes.TrimLeft(b[i:], " \t")
}

// sample parses one line into d.raw.
func (d *Decoder) sample(line []byte, openMetrics bool) (err error) {
	var token, rest []byte
	if d.raw.Name, d.raw.Labels, rest, err = d.parser.ParsePrefix(line); err != nil {
		return err
	}
	n := len(d.raw.Labels)
	d.raw.Labels = slices.DeleteFunc(d.raw.Labels, func(l Label) bool { return metadataLabel(l.Name) })
	d.skipped.Metadata += n - len(d.raw.Labels)
	token, rest = cutToken(bytes.TrimLeft(rest, " \t"))
	if d.raw.V, err = parseFloat(token); err != nil {
		return err
	}
	d.raw.HasT = len(rest) > 0 && rest[0] != '#'
	if d.raw.HasT {
		token, rest = cutToken(rest)
		if openMetrics {
			sec, err := parseFloat(token)
			if err != nil || !(math.Abs(sec) < 1e13) {
				return fmt.Errorf("timestamp %s is not a number of seconds", Excerpt(token))
			}
			d.raw.T = int64(math.Round(sec * 1000))
		} else if d.raw.T, err = strconv.ParseInt(string(token), 10, 64); err != nil {
			return fmt.Errorf("timestamp %s is not a whole number of milliseconds", Excerpt(token))
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

// parseFloat takes what Prometheus takes (model/textparse): no hexadecimal
// floats and no underscores, which its parser refuses.
func parseFloat(b []byte) (float64, error) {
	if len(b) == 0 {
		return 0, errors.New("no value")
	}
	if v, err := strconv.ParseFloat(string(b), 64); err == nil && !bytes.ContainsAny(b, "pPxX_") {
		return v, nil
	}
	return 0, fmt.Errorf("value %s is not a float", Excerpt(b))
}
