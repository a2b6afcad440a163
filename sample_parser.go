package main

// The parser of series: name and labels of a line of text, foreign or rendered by this
// program. Results share memory with the line. Lengths are bounded before memory is taken.

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
)

func skipBlank(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	return b
}

// SeriesParser parses series. It keeps scratch memory between calls and is not safe
// for concurrent use. The zero value is ready.
type SeriesParser struct {
	labels []Label
	unesc  []byte // unescaped text of the current line
	check  SampleList
}

// ParsePrefix parses the name and labels that line begins with and returns what
// follows them. The results share memory with line, which stays as it is, and
// with p; they are valid until p's next use.
func (p *SeriesParser) ParsePrefix(line []byte) (name []byte, labels []Label, rest []byte, err error) {
	fail := func(format string, args ...any) ([]byte, []Label, []byte, error) {
		return nil, nil, nil, fmt.Errorf(format, args...)
	}
	if len(line) > 2*MaxLine { // room for blanks; Add judges what is left of it
		return fail("%w: a line of %d bytes", ErrTooLarge, len(line))
	}
	// Unescaped values of one line share this buffer; with room for the whole
	// line it never moves, so that earlier values stay valid.
	p.unesc = slices.Grow(p.unesc[:0], len(line))
	p.labels = slices.Grow(p.labels[:0], 32) // room for labels that are added later
	n := legacyPrefix(line, 4)
	name = line[:n]
	b := skipBlank(line[n:])
	if len(b) == 0 || b[0] != '{' {
		if n == 0 {
			return fail("no valid metric name")
		}
		if len(b) > 0 && len(b) == len(line)-n {
			return fail("unexpected %q in the metric name", b[0])
		}
		return name, nil, b, nil
	}
	b = skipBlank(b[1:])
	for {
		if len(b) == 0 {
			return fail("the labels do not end in }")
		}
		if b[0] == '}' {
			break
		}
		var label []byte
		quoted := b[0] == '"'
		if quoted {
			if label, b, err = p.quoted(b); err != nil {
				return fail("%w", err)
			}
		} else {
			n := legacyPrefix(b, 0)
			if n == 0 {
				return fail("unexpected %q where a label name should begin", b[0])
			}
			label, b = b[:n], b[n:]
		}
		b = skipBlank(b)
		if len(b) > 0 && b[0] == '=' {
			b = skipBlank(b[1:])
			if len(b) == 0 || b[0] != '"' {
				return fail("the value of label %.100q is not quoted", label)
			}
			var value []byte
			if value, b, err = p.quoted(b); err != nil {
				return fail("%w", err)
			}
			if len(p.labels) >= MaxLabels {
				return fail("%w: more than %d labels", ErrTooLarge, MaxLabels)
			}
			p.labels = append(p.labels, Label{label, value})
		} else if quoted && len(name) == 0 {
			if name = label; len(name) == 0 { // {"a.name",…} or {…,"a.name"}
				return fail("no metric name")
			}
		} else {
			return fail("label %.100q has no value", label)
		}
		b = skipBlank(b)
		if len(b) > 0 && b[0] == ',' {
			b = skipBlank(b[1:])
		} else if len(b) > 0 && b[0] != '}' {
			return fail("unexpected %q after label %.100q", b[0], label)
		}
	}
	if len(name) == 0 {
		return fail("no metric name")
	}
	return name, p.labels, b[1:], nil
}

// quoted parses the quoted string that b begins with. As in Prometheus's parser
// a backslash before any other byte stands for itself.
func (p *SeriesParser) quoted(b []byte) (s, rest []byte, err error) {
	from := len(p.unesc)
	for i := 1; i < len(b); i++ {
		switch b[i] {
		case '"':
			if len(p.unesc) == from {
				return b[1:i], b[i+1:], nil
			}
			return p.unesc[from:], b[i+1:], nil
		case '\\':
			if len(p.unesc) == from {
				p.unesc = append(p.unesc, b[1:i]...)
			}
			i++
			if i == len(b) {
				continue
			}
			switch b[i] {
			case '\\', '"':
				p.unesc = append(p.unesc, b[i])
			case 'n':
				p.unesc = append(p.unesc, '\n')
			default:
				p.unesc = append(p.unesc, '\\', b[i])
			}
		default:
			if len(p.unesc) > from {
				p.unesc = append(p.unesc, b[i])
			}
		}
	}
	return nil, nil, errors.New("a quoted string does not end")
}

// ParseLine parses a rendered line, wholly.
func (p *SeriesParser) ParseLine(line []byte) (name []byte, labels []Label, err error) {
	name, labels, rest, err := p.ParsePrefix(line)
	if err == nil && len(rest) > 0 {
		err = errors.New("bytes after the series")
	}
	if err != nil {
		return nil, nil, fmt.Errorf("series %s: %w", Excerpt(line), err)
	}
	return name, labels, nil
}

// ParseRendered reports a line that Push.Add did not render, byte for byte: what
// recovery found on a damaged disk, and will serve as it is, is checked so.
func (p *SeriesParser) ParseRendered(line []byte) (name []byte, labels []Label, err error) {
	if name, labels, err = p.ParseLine(line); err != nil {
		return nil, nil, err
	}
	p.check.Reset()
	if err := p.check.Add(&RawSample{Name: name, Labels: labels}); err != nil {
		return nil, nil, err
	}
	if !bytes.Equal(p.check.Arena, line) {
		return nil, nil, fmt.Errorf("series %s is not in normal form", Excerpt(line))
	}
	return name, labels, nil
}

// CheckOf is Check for a line that has to be of a cluster.
func (p *SeriesParser) CheckOf(line []byte, cluster string) error {
	_, labels, err := p.ParseRendered(line)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(labels, func(l Label) bool { return string(l.Name) == ClusterLabel && string(l.Value) == cluster }) {
		return fmt.Errorf("series %s is not of cluster %q", Excerpt(line), cluster)
	}
	return nil
}
