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

// Selector is a series selector as Prometheus writes them, up{job="x",a!~"b|c"}: it chooses the
// series that every matcher matches.
type Selector struct {
	text     string
	matchers []matcher
}

// String returns the selector as it was written.
func (s Selector) String() string { return s.text }

type matcher struct {
	label  string // nameLabel is the metric's name
	negate bool
	value  string
	re     *regexp.Regexp // anchored; nil compares with value
}

const nameLabel = "__name__"

// parseSelector parses one selector of at most maxSelector bytes. As in Prometheus's
// /federate at least one matcher must refuse the empty string, or the selector
// would match everything by mistake.
func parseSelector(text string) (Selector, error) {
	text = strings.TrimSpace(text)
	if len(text) > maxSelector {
		return Selector{}, fmt.Errorf("selector of %d bytes: %w: at most %d", len(text), ErrTooLarge, maxSelector)
	}
	p := selectorParser{rest: text}
	err := p.parse()
	if err == nil && !slices.ContainsFunc(p.matchers, func(m matcher) bool { return !m.matches(nil) }) {
		err = errors.New("at least one matcher must not match the empty string")
	}
	if err != nil {
		return Selector{}, fmt.Errorf("selector %s: %w", Excerpt([]byte(text)), err)
	}
	return Selector{text, p.matchers}, nil
}

// selectorParser holds the text that is left, and the matchers before it.
type selectorParser struct {
	rest     string
	matchers []matcher
}

func (p *selectorParser) parse() error {
	if name := p.acceptName(true); name != "" {
		p.matchers = append(p.matchers, matcher{label: nameLabel, value: name})
		if p.skipBlanks(); p.rest == "" {
			return nil
		}
	}
	if !p.accept("{") {
		return errors.New("expected a metric name or {")
	}
	for !p.accept("}") {
		m, err := p.parseMatcher()
		if err != nil {
			return err
		}
		p.matchers = append(p.matchers, m)
		if !p.accept(",") && !strings.HasPrefix(p.rest, "}") {
			return fmt.Errorf("expected , or } at %s", Excerpt([]byte(p.rest)))
		}
	}
	if p.skipBlanks(); p.rest != "" {
		return fmt.Errorf("unexpected %s after }", Excerpt([]byte(p.rest)))
	}
	return nil
}

// parseMatcher parses label, operator and value, or a quoted metric name alone.
func (p *selectorParser) parseMatcher() (m matcher, err error) {
	quoted := p.atQuote()
	if quoted {
		m.label, err = p.parseQuoted()
	} else {
		m.label = p.acceptName(false)
	}
	if err != nil {
		return m, err
	}
	if m.label == "" {
		return m, fmt.Errorf("expected a label name at %s", Excerpt([]byte(p.rest)))
	}
	operator := p.acceptOperator()
	if operator == "" && quoted { // {"a.name"}
		if slices.ContainsFunc(p.matchers, func(m matcher) bool { return m.label == nameLabel }) {
			return m, fmt.Errorf("a second metric name %.100q", m.label)
		}
		return matcher{label: nameLabel, value: m.label}, nil
	}
	if operator == "" {
		return m, fmt.Errorf("expected =, !=, =~ or !~ after %.100q at %s", m.label, Excerpt([]byte(p.rest)))
	}
	m.negate = operator[0] == '!'
	if m.value, err = p.parseQuoted(); err != nil {
		return m, err
	}
	if strings.HasSuffix(operator, "~") {
		if m.re, err = compilePattern(m.value); err != nil {
			return m, fmt.Errorf("pattern of %.100q: %w", m.label, err)
		}
	}
	return m, nil
}

func (p *selectorParser) skipBlanks() { p.rest = strings.TrimLeft(p.rest, " \t\r\n") }

// accept consumes prefix if it comes next.
func (p *selectorParser) accept(prefix string) (ok bool) {
	p.skipBlanks()
	p.rest, ok = strings.CutPrefix(p.rest, prefix)
	return ok
}

// acceptOperator consumes an operator and returns it, or "".
func (p *selectorParser) acceptOperator() string {
	for _, operator := range [...]string{"=~", "!~", "!=", "="} {
		if p.accept(operator) {
			return operator
		}
	}
	return ""
}

// acceptName consumes an unquoted name and returns it, or "". A metric's name may have colons.
func (p *selectorParser) acceptName(isMetric bool) string {
	p.skipBlanks()
	var n int
	if isMetric {
		n = LegacyMetricPrefix(p.rest)
	} else {
		n = LegacyLabelPrefix(p.rest)
	}
	name := p.rest[:n]
	p.rest = p.rest[n:]
	return name
}

// atQuote reports whether a quoted string comes next.
func (p *selectorParser) atQuote() bool {
	p.skipBlanks()
	return p.rest != "" && strings.ContainsRune("\"'`", rune(p.rest[0]))
}

// parseQuoted parses a string in ", ' or `, with the escapes of Go, as PromQL has it.
func (p *selectorParser) parseQuoted() (string, error) {
	if !p.atQuote() {
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

// compilePattern compiles a pattern that has to match a whole value. It is checked without
// the anchors first, because "a)|(b" is a pattern only between them.
func compilePattern(pattern string) (*regexp.Regexp, error) {
	if err := checkPattern(pattern); err != nil {
		return nil, err
	}
	return regexp.Compile("^(?s:" + pattern + ")$")
}

// checkPattern reports text that is no pattern, or a pattern of more than maxPattern steps. A
// few bytes, .{1000} several times, would otherwise cost much time and memory.
func checkPattern(pattern string) error {
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return err
	}
	if n := patternSteps(re); n > maxPattern {
		return fmt.Errorf("%w: it has %d steps; at most %d", ErrTooLarge, n, maxPattern)
	}
	return nil
}

func patternSteps(re *syntax.Regexp) int {
	n := 1
	if re.Op == syntax.OpLiteral {
		n = len(re.Rune)
	}
	for _, sub := range re.Sub {
		n += patternSteps(sub)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(1, re.Min, re.Max)
	}
	return n
}

func (m *matcher) matches(v []byte) bool {
	if m.re != nil {
		return m.re.Match(v) != m.negate
	}
	return (string(v) == m.value) != m.negate
}

// Selectors choose the series that any of them matches. Without any they choose all.
type Selectors []Selector

// ParseSelectors parses at most maxSelectors selectors.
func ParseSelectors(texts []string) (Selectors, error) {
	if len(texts) > maxSelectors {
		return nil, fmt.Errorf("%d selectors: %w: at most %d", len(texts), ErrTooLarge, maxSelectors)
	}
	var s Selectors
	for _, text := range texts {
		sel, err := parseSelector(text)
		if err != nil {
			return nil, err
		}
		s = append(s, sel)
	}
	return s, nil
}

// MatchOrEmpty reports whether a series is chosen.
func (s Selectors) MatchOrEmpty(name []byte, labels []Label) bool {
	for i := range s {
		if s[i].matches(name, labels) {
			return true
		}
	}
	return len(s) == 0
}

func (s *Selector) matches(name []byte, labels []Label) bool {
	for i := range s.matchers {
		m := &s.matchers[i]
		value := name
		if m.label != nameLabel {
			value = labelValue(labels, m.label)
		}
		if !m.matches(value) {
			return false
		}
	}
	return true
}

// LineMatcherOrNil returns a function that matches rendered lines, or nil if s
// chooses all. It is not safe for concurrent use.
func (s Selectors) LineMatcherOrNil() func(line []byte) bool {
	if len(s) == 0 {
		return nil
	}
	var p SeriesParser
	return func(line []byte) bool {
		name, labels, err := p.ParseLine(line)
		return err == nil && s.MatchOrEmpty(name, labels)
	}
}
