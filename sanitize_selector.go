package main

// Series selectors as in PromQL. Selectors come from operators and from scrapers, so that
// their length, their number and the cost of their patterns are bounded.

import (
	"errors"
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
)

const (
	maxSelector  = 8 << 10 // bytes
	maxSelectors = 1000
	maxPattern   = 20_000 // steps of a pattern; each costs 40 bytes and more, and time for each byte matched
)

// Selector is a series selector as Prometheus writes them: up{job="x",a!~"b|c"}.
type Selector struct {
	text     string
	matchers []matcher
}

type matcher struct {
	label  string // "__name__" is the metric's name
	negate bool
	value  string
	re     *regexp.Regexp // anchored; nil compares with value
}

// String returns the selector as it was written.
func (s Selector) String() string { return s.text }

// ParseSelector parses one selector of at most 8 KiB. As in Prometheus's
// /federate at least one matcher must refuse the empty string, or the selector
// would be true of everything by mistake.
func ParseSelector(text string) (Selector, error) {
	text = strings.TrimSpace(text)
	sel := Selector{text: text}
	if len(text) > maxSelector {
		return sel, fmt.Errorf("selector of %d bytes: %w: at most %d", len(text), ErrTooLarge, maxSelector)
	}
	p := selectorParser{rest: text}
	if err := p.parse(&sel); err != nil {
		return sel, fmt.Errorf("selector %s: %w", Excerpt([]byte(text)), err)
	}
	if !slices.ContainsFunc(sel.matchers, func(m matcher) bool { return !m.matches(nil) }) {
		return sel, fmt.Errorf("selector %s: at least one matcher must not match the empty string", Excerpt([]byte(text)))
	}
	return sel, nil
}

type selectorParser struct{ rest string }

func (p *selectorParser) blank() { p.rest = strings.TrimLeft(p.rest, " \t\r\n") }

func (p *selectorParser) take(prefix string) bool {
	p.blank()
	rest, ok := strings.CutPrefix(p.rest, prefix)
	p.rest = rest
	return ok
}

// name takes an identifier; colon says whether it may hold colons.
func (p *selectorParser) name(colon bool) string {
	p.blank()
	i := strings.IndexFunc(p.rest, func(r rune) bool {
		return !(r == '_' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || colon && r == ':')
	})
	if i < 0 {
		i = len(p.rest)
	}
	if i > 0 && p.rest[0] >= '0' && p.rest[0] <= '9' {
		return ""
	}
	name := p.rest[:i]
	p.rest = p.rest[i:]
	return name
}

// quoted takes a string in ", ' or `, with the escapes of Go, as PromQL has it.
func (p *selectorParser) quoted() (string, error) {
	p.blank()
	if p.rest == "" || !strings.ContainsRune("\"'`", rune(p.rest[0])) {
		return "", fmt.Errorf("expected a quoted string at %s", Excerpt([]byte(p.rest)))
	}
	quote := p.rest[0]
	p.rest = p.rest[1:]
	var b strings.Builder
	for {
		if p.rest == "" {
			return "", errors.New("a quoted string does not end")
		}
		if p.rest[0] == quote {
			p.rest = p.rest[1:]
			return b.String(), nil
		}
		if quote == '`' {
			b.WriteByte(p.rest[0])
			p.rest = p.rest[1:]
			continue
		}
		r, multibyte, tail, err := strconv.UnquoteChar(p.rest, quote)
		if err != nil {
			return "", fmt.Errorf("bad escape at %s", Excerpt([]byte(p.rest)))
		}
		if multibyte {
			b.WriteRune(r)
		} else {
			b.WriteByte(byte(r))
		}
		p.rest = tail
	}
}

func (p *selectorParser) parse(sel *Selector) error {
	p.blank()
	if name := p.name(true); name != "" {
		sel.matchers = append(sel.matchers, matcher{label: "__name__", value: name})
	}
	if p.blank(); p.rest == "" && len(sel.matchers) > 0 {
		return nil
	}
	if !p.take("{") {
		return errors.New("expected a metric name or {")
	}
	for !p.take("}") {
		m := matcher{}
		var err error
		quoted := false
		if p.blank(); p.rest != "" && strings.ContainsRune("\"'`", rune(p.rest[0])) {
			quoted = true
			m.label, err = p.quoted()
		} else {
			m.label = p.name(false)
		}
		if err != nil {
			return err
		}
		if m.label == "" {
			return fmt.Errorf("expected a label name at %s", Excerpt([]byte(p.rest)))
		}
		var pattern, nameOnly bool
		switch {
		case p.take("=~"):
			pattern = true
		case p.take("!~"):
			pattern, m.negate = true, true
		case p.take("!="):
			m.negate = true
		case p.take("="):
		case quoted: // {"a.name"}
			if slices.ContainsFunc(sel.matchers, func(m matcher) bool { return m.label == "__name__" }) {
				return fmt.Errorf("a second metric name %.100q", m.label)
			}
			nameOnly = true
			m.label, m.value = "__name__", m.label
		default:
			return fmt.Errorf("expected =, !=, =~ or !~ after %.100q at %s", m.label, Excerpt([]byte(p.rest)))
		}
		if !nameOnly {
			if m.value, err = p.quoted(); err != nil {
				return err
			}
		}
		if pattern {
			// Alone first: "a)|(b" would be a pattern only inside of the anchors.
			if err = checkPattern(m.value); err == nil {
				m.re, err = regexp.Compile("^(?s:" + m.value + ")$")
			}
			if err != nil {
				return fmt.Errorf("pattern of %.100q: %w", m.label, err)
			}
		}
		sel.matchers = append(sel.matchers, m)
		if p.blank(); !strings.HasPrefix(p.rest, "}") && !p.take(",") {
			return fmt.Errorf("expected , or } at %s", Excerpt([]byte(p.rest)))
		}
	}
	if p.blank(); p.rest != "" {
		return fmt.Errorf("unexpected %s after }", Excerpt([]byte(p.rest)))
	}
	return nil
}

// checkPattern reports what is no pattern, or one that a few bytes, .{1000} and
// again, make take a long time and much memory.
func checkPattern(pattern string) error {
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return err
	}
	var steps func(re *syntax.Regexp) int
	steps = func(re *syntax.Regexp) int {
		n := 1
		if re.Op == syntax.OpLiteral {
			n = len(re.Rune)
		}
		for _, sub := range re.Sub {
			n += steps(sub)
		}
		if re.Op == syntax.OpRepeat {
			n *= max(1, re.Min, re.Max)
		}
		return n
	}
	if n := steps(re); n > maxPattern {
		return fmt.Errorf("%w: it has %d steps; at most %d", ErrTooLarge, n, maxPattern)
	}
	return nil
}

func (m *matcher) matches(v []byte) bool {
	if m.re != nil {
		return m.re.Match(v) != m.negate
	}
	return (string(v) == m.value) != m.negate
}

// Selectors is a choice: a series is chosen by any of them, or if there are none.
type Selectors []Selector

// ParseSelectors parses selectors.
func ParseSelectors(texts []string) (Selectors, error) {
	if len(texts) > maxSelectors {
		return nil, fmt.Errorf("%d selectors: %w: at most %d", len(texts), ErrTooLarge, maxSelectors)
	}
	var s Selectors
	for _, text := range texts {
		sel, err := ParseSelector(text)
		if err != nil {
			return nil, err
		}
		s = append(s, sel)
	}
	return s, nil
}

// SelectorLines returns the selectors of a file: one a line, but for blank lines
// and those that begin with #.
func SelectorLines(data []byte) []string {
	var lines []string
	for line := range strings.Lines(string(data)) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			lines = append(lines, line)
		}
	}
	return lines
}

// Match reports whether a series is chosen.
func (s Selectors) Match(name []byte, labels []Label) bool {
	return len(s) == 0 || slices.ContainsFunc(s, func(sel Selector) bool {
		for i := range sel.matchers {
			m := &sel.matchers[i]
			v := name
			if m.label != "__name__" {
				v = labelValue(labels, m.label)
			}
			if !m.matches(v) {
				return false
			}
		}
		return true
	})
}

// LineMatcher returns a function that matches rendered lines, or nil if s
// chooses all. It is not safe for concurrent use.
func (s Selectors) LineMatcher() func(line []byte) bool {
	if len(s) == 0 {
		return nil
	}
	var p SeriesParser
	return func(line []byte) bool {
		name, labels, err := p.ParseLine(line)
		return err == nil && s.Match(name, labels)
	}
}
