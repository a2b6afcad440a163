package main

// The parser of series: name and labels of a line of text, foreign or rendered by this
// program. Results share memory with the line. Lengths are bounded before memory is taken.

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
)

// SeriesParser parses series. It keeps scratch memory between calls and is not safe
// for concurrent use. The zero value is ready.
type SeriesParser struct {
	labels    []Label
	unescaped []byte     // of the quoted strings of the current line
	rendered  SampleList // of ParseCanonicalLine
}

// parsePrefix parses the name and labels that line begins with and returns what
// follows them. The results share memory with line, which stays as it is, and
// with p; they are valid until p's next use.
func (p *SeriesParser) parsePrefix(line []byte) (name []byte, labels []Label, rest []byte, err error) {
	if len(line) > 2*MaxLine { // room for blanks; SampleList.Add bounds the series itself
		return nil, nil, nil, fmt.Errorf("%w: a line of %d bytes", ErrTooLarge, len(line))
	}
	// The unescaped strings of one line share this buffer. With room for the whole
	// line it never moves, so that earlier strings stay valid.
	p.unescaped = slices.Grow(p.unescaped[:0], len(line))
	p.labels = slices.Grow(p.labels[:0], 32) // room for labels that are added later
	n := LegacyMetricPrefix(line)
	name = line[:n]
	b := skipBlanks(line[n:])
	switch {
	case len(b) > 0 && b[0] == '{':
		if name, b, err = p.parseLabels(name, b[1:]); err != nil {
			return nil, nil, nil, err
		}
	case n == 0:
		return nil, nil, nil, errors.New("no valid metric name")
	case len(b) > 0 && len(b) == len(line)-n:
		return nil, nil, nil, fmt.Errorf("unexpected %q in the metric name", b[0])
	}
	return name, p.labels, b, nil
}

// parseLabels parses what follows {, to p.labels, and returns what follows }. A name that is
// not legacy stands quoted among the labels, and is returned if name is empty.
func (p *SeriesParser) parseLabels(name, b []byte) (_, rest []byte, err error) {
	for b = skipBlanks(b); ; {
		if len(b) == 0 {
			return nil, nil, errors.New("the labels do not end in }")
		}
		if b[0] == '}' {
			if len(name) == 0 {
				return nil, nil, errNoMetricName
			}
			return name, b[1:], nil
		}
		var label Label
		var hasValue bool
		if b, hasValue, err = p.parseLabel(b, &label); err != nil {
			return nil, nil, err
		}
		switch {
		case hasValue && len(p.labels) >= MaxLabels:
			return nil, nil, fmt.Errorf("%w: more than %d labels", ErrTooLarge, MaxLabels)
		case hasValue:
			p.labels = append(p.labels, label)
		case len(name) > 0:
			return nil, nil, fmt.Errorf("label %.100q has no value", label.Name)
		case len(label.Name) == 0:
			return nil, nil, errNoMetricName
		default: // {"a.name",…} or {…,"a.name"}
			name = label.Name
		}
		if b = skipBlanks(b); len(b) > 0 && b[0] == ',' {
			b = skipBlanks(b[1:])
		} else if len(b) > 0 && b[0] != '}' {
			return nil, nil, fmt.Errorf("unexpected %q after label %.100q", b[0], label.Name)
		}
	}
}

// parseLabel parses the label that b begins with, and returns what follows it. A quoted string
// has no value if it is the metric's name.
func (p *SeriesParser) parseLabel(b []byte, label *Label) (rest []byte, hasValue bool, err error) {
	quoted := b[0] == '"'
	if quoted {
		if label.Name, b, err = p.parseQuoted(b); err != nil {
			return nil, false, err
		}
	} else {
		n := LegacyLabelPrefix(b)
		if n == 0 {
			return nil, false, fmt.Errorf("unexpected %q where a label name should begin", b[0])
		}
		label.Name, b = b[:n], b[n:]
	}
	b = skipBlanks(b)
	if len(b) == 0 || b[0] != '=' {
		if !quoted {
			return nil, false, fmt.Errorf("label %.100q has no value", label.Name)
		}
		return b, false, nil
	}
	b = skipBlanks(b[1:])
	if len(b) == 0 || b[0] != '"' {
		return nil, false, fmt.Errorf("the value of label %.100q is not quoted", label.Name)
	}
	label.Value, b, err = p.parseQuoted(b)
	return b, true, err
}

func skipBlanks(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	return b
}

// parseQuoted parses the quoted string that b begins with, and returns what follows it.
func (p *SeriesParser) parseQuoted(b []byte) (s, rest []byte, err error) {
	b = b[1:]
	end := bytes.IndexByte(b, '"')
	if end >= 0 && bytes.IndexByte(b[:end], '\\') < 0 {
		return b[:end], b[end+1:], nil
	}
	return p.unescape(b)
}

// unescape is parseQuoted behind the first quote. As in Prometheus's parser a backslash before
// any other byte than a backslash, a quote or n stands for itself.
func (p *SeriesParser) unescape(b []byte) (s, rest []byte, err error) {
	from := len(p.unescaped)
	for i := 0; i < len(b); i++ {
		switch {
		case b[i] == '"':
			return p.unescaped[from:], b[i+1:], nil
		case b[i] != '\\' || i+1 == len(b):
			p.unescaped = append(p.unescaped, b[i])
			continue
		}
		i++
		switch b[i] {
		case '\\', '"':
			p.unescaped = append(p.unescaped, b[i])
		case 'n':
			p.unescaped = append(p.unescaped, '\n')
		default:
			p.unescaped = append(p.unescaped, '\\', b[i])
		}
	}
	return nil, nil, errors.New("a quoted string does not end")
}

// ParseLine parses a line that holds a series and nothing else.
func (p *SeriesParser) ParseLine(line []byte) (name []byte, labels []Label, err error) {
	name, labels, rest, err := p.parsePrefix(line)
	if err == nil && len(rest) > 0 {
		err = errors.New("bytes after the series")
	}
	if err != nil {
		return nil, nil, fmt.Errorf("series %s: %w", Excerpt(line), err)
	}
	return name, labels, nil
}

// ParseCanonicalLine is ParseLine for a line that has to be, byte for byte, as SampleList.Add
// renders it. Recovery checks so the lines of a damaged disk, which are served as they are.
func (p *SeriesParser) ParseCanonicalLine(line []byte) (name []byte, labels []Label, err error) {
	if name, labels, err = p.ParseLine(line); err != nil {
		return nil, nil, err
	}
	p.rendered.Reset()
	if err := p.rendered.Add(&RawSample{Name: name, Labels: labels}); err != nil {
		return nil, nil, err
	}
	if !bytes.Equal(p.rendered.Arena, line) {
		return nil, nil, fmt.Errorf("series %s is not in normal form", Excerpt(line))
	}
	return name, labels, nil
}
