package main

// This file parses series: the metric name and the labels at the beginning of a line of text. The
// text may come from a body or may be a line that this program rendered. The parsed names and
// labels share memory with the text or with the parser. Lengths are checked before memory is
// allocated.

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
)

// SeriesParser parses series. It keeps scratch memory between calls, so it is not safe for
// concurrent use. The zero value is ready for use.
type SeriesParser struct {
	labels    []Label
	unescaped []byte     // quoted strings of the current line that had escapes, with the escapes resolved
	rendered  SampleList // scratch memory of ParseCanonicalLine
}

// parsePrefix parses the metric name and the labels with which line begins. rest is the text after
// them. The results share memory with line and with p and are valid until p is used again.
// parsePrefix does not change line.
func (p *SeriesParser) parsePrefix(line []byte) (name []byte, labels []Label, rest []byte, err error) {
	// The limit is twice MaxLine, because the line may also contain blanks, a value, a timestamp,
	// an exemplar, and labels that the caller removes. SampleList.Add checks the rendered series
	// against MaxLine.
	if len(line) > 2*MaxLine {
		return nil, nil, nil, fmt.Errorf("%w: the line has %d bytes, limit %d", ErrTooLarge, len(line), 2*MaxLine)
	}
	// All unescaped strings of one line share this buffer. It has room for the whole line, so that
	// appending never reallocates it, and earlier strings of the same line stay valid.
	p.unescaped = slices.Grow(p.unescaped[:0], len(line))
	p.labels = slices.Grow(p.labels[:0], 32) // room for the labels of most series, and for labels that the caller adds
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

// parseLabels parses the labels of a series into p.labels. b begins after the opening brace, and
// rest begins after the closing brace. parseLabels returns the metric name. If the parameter name
// is empty, the metric name must be among the labels, as a quoted string without a value.
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
		default: // a quoted metric name, as in {"a.name",…} or {…,"a.name"}
			name = label.Name
		}
		if b = skipBlanks(b); len(b) > 0 && b[0] == ',' {
			b = skipBlanks(b[1:])
		} else if len(b) > 0 && b[0] != '}' {
			return nil, nil, fmt.Errorf("unexpected %q after label %.100q", b[0], label.Name)
		}
	}
}

// parseLabel parses the label with which b begins and stores it in label. b must not be empty. rest
// is the text after the label. hasValue is false for a quoted string without a value, which is a
// metric name.
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

// parseQuoted parses the quoted string with which b begins. It returns the unescaped string and
// the text after the closing quote.
func (p *SeriesParser) parseQuoted(b []byte) (s, rest []byte, err error) {
	b = b[1:]
	end := bytes.IndexByte(b, '"')
	if end >= 0 && bytes.IndexByte(b[:end], '\\') < 0 {
		return b[:end], b[end+1:], nil
	}
	return p.unescape(b)
}

// unescape does the work of parseQuoted for a string with escapes. b begins after the opening
// quote. A backslash escapes only a backslash, a quote or n. Before any other byte the backslash is
// kept, as in Prometheus's parser.
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

// ParseLine parses a line that must contain a series and nothing else. The results share memory
// with line and with p and are valid until p is used again. An error quotes the beginning of the
// line.
func (p *SeriesParser) ParseLine(line []byte) (name []byte, labels []Label, err error) {
	name, labels, rest, err := p.parsePrefix(line)
	if err == nil && len(rest) > 0 {
		err = errors.New("unexpected bytes after the series")
	}
	if err != nil {
		return nil, nil, fmt.Errorf("series %s: %w", Excerpt(line), err)
	}
	return name, labels, nil
}

// ParseCanonicalLine parses line as ParseLine does. It also fails if SampleList.Add would not
// render the series as exactly the bytes of line. The store checks the lines that it reads from
// disk in this way, because it does not render them again.
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
