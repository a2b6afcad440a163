package main

// This file parses and matches series selectors with the syntax of PromQL. Selectors come from
// operators and from scrapers, so their length, their number and the cost of each pattern are
// limited. A scraper may be hostile, so the cost of all its selectors together is limited, too. No
// pattern is compiled before all limits are checked.

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
)

const (
	maxSelector  = 8 << 10 // bytes of one selector
	maxSelectors = 1000    // selectors in one list
)

// MaxPattern is the largest number of steps of one pattern, and of all selectors of one scrape
// together. Each step needs about 40 bytes of memory, and time for each byte that is matched.
const MaxPattern = 20_000

// Selector is a series selector of PromQL, such as up{job="x",a!~"b|c"}. A series matches the
// selector if it satisfies every matcher.
type Selector struct {
	text     string
	matchers []matcher
}

// String returns the selector as it was written, without the blanks around it.
func (s Selector) String() string { return s.text }

// matcher is one condition of a selector. It compares the value of one label with a value or a
// pattern.
type matcher struct {
	label     string // name of the label; nameLabel stands for the metric name
	negate    bool   // whether the operator is != or !~
	isPattern bool   // whether the operator is =~ or !~
	value     string
	re        *regexp.Regexp // anchored pattern of =~ and !~, once Selector.compile has returned; nil for = and !=
}

const nameLabel = "__name__"

// parseSelector parses one selector of at most maxSelector bytes, without compiling its patterns.
// steps is its cost: one step for each matcher, and the steps of each pattern.
func parseSelector(text string) (s Selector, steps int, err error) {
	text = strings.TrimSpace(text)
	if len(text) > maxSelector {
		return Selector{}, 0, fmt.Errorf("%w: the selector has %d bytes, limit %d", ErrTooLarge, len(text), maxSelector)
	}
	p := selectorParser{rest: text}
	if err := p.parse(); err != nil {
		return Selector{}, 0, fmt.Errorf("selector %s: %w", Excerpt([]byte(text)), err)
	}
	return Selector{text, p.matchers}, len(p.matchers) + p.patternSteps, nil
}

// compile compiles the patterns of s. As in Prometheus's /federate, a selector is refused if all its
// matchers match the empty string. Such a selector would match every series without these labels,
// which is mostly a mistake of the operator or scraper.
func (s *Selector) compile() error {
	for i := range s.matchers {
		m := &s.matchers[i]
		if !m.isPattern {
			continue
		}
		if m.value == ".+" { // The value is not empty. MatchAll has this pattern and is evaluated for every series.
			m.isPattern, m.value, m.negate = false, "", !m.negate
			continue
		}
		// parseMatcher has checked the pattern alone, because a pattern such as "a)|(b" is invalid by
		// itself but would become valid between anchors.
		re, err := regexp.Compile("^(?s:" + m.value + ")$")
		if err != nil {
			return fmt.Errorf("selector %s: pattern of %.100q: %w", Excerpt([]byte(s.text)), m.label, err)
		}
		m.re = re
	}
	if !slices.ContainsFunc(s.matchers, func(m matcher) bool { return !m.matches(nil) }) {
		return fmt.Errorf("selector %s: at least one matcher must not match the empty string", Excerpt([]byte(s.text)))
	}
	return nil
}

type selectorParser struct {
	rest         string // text that is not parsed yet
	matchers     []matcher
	patternSteps int // steps of the patterns of all matchers
}

// parse parses p.rest, which must be one selector and nothing else, and appends its matchers to
// p.matchers.
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

// parseMatcher parses one matcher: either a label, an operator and a value, or a quoted metric name
// alone.
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
	if operator == "" && quoted { // a quoted metric name, as in {"a.name"}
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
	if m.isPattern = strings.HasSuffix(operator, "~"); m.isPattern {
		steps, err := checkPattern(m.value)
		if err != nil {
			return m, fmt.Errorf("pattern of %.100q: %w", m.label, err)
		}
		p.patternSteps += steps
	}
	return m, nil
}

func (p *selectorParser) skipBlanks() { p.rest = strings.TrimLeft(p.rest, " \t\r\n") }

// accept skips blanks. If the remaining text then begins with prefix, accept consumes prefix and
// returns true.
func (p *selectorParser) accept(prefix string) (ok bool) {
	p.skipBlanks()
	p.rest, ok = strings.CutPrefix(p.rest, prefix)
	return ok
}

// acceptOperator consumes the operator of a matcher and returns it. It returns "" if the remaining
// text does not begin with an operator.
func (p *selectorParser) acceptOperator() string {
	for _, operator := range [...]string{"=~", "!~", "!=", "="} {
		if p.accept(operator) {
			return operator
		}
	}
	return ""
}

// acceptName consumes an unquoted name and returns it. It returns "" if the remaining text does not
// begin with a name. isMetric allows colons in the name.
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

// atQuote skips blanks and reports whether the remaining text begins with a quote.
func (p *selectorParser) atQuote() bool {
	p.skipBlanks()
	return p.rest != "" && strings.ContainsRune("\"'`", rune(p.rest[0]))
}

// parseQuoted parses a string in double, single or back quotes and returns it unescaped. As in
// PromQL, the escapes are those of Go, and a string in back quotes has no escapes.
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

// checkPattern returns the number of steps of the pattern. It returns an error if the pattern is
// malformed or has more than MaxPattern steps. Without this limit, a pattern of a few bytes, such
// as several .{1000}, could cost much time and memory.
func checkPattern(pattern string) (steps int, err error) {
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return 0, err
	}
	if steps = patternSteps(re); steps > MaxPattern {
		return 0, fmt.Errorf("%w: the pattern has %d steps, limit %d", ErrTooLarge, steps, MaxPattern)
	}
	return steps, nil
}

// patternSteps estimates the number of steps of the compiled pattern re: each literal character and
// each operator is one step, and a repetition counts as often as it repeats. A class of characters
// is one step, and one more for every five ranges, because \pL has hundreds of ranges.
func patternSteps(re *syntax.Regexp) int {
	n := 1
	switch re.Op {
	case syntax.OpLiteral:
		n = len(re.Rune)
	case syntax.OpCharClass:
		n += len(re.Rune) / 10
	}
	for _, sub := range re.Sub {
		n += patternSteps(sub)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(1, re.Min, re.Max)
	}
	return n
}

// matches reports whether the value v of a label satisfies the condition m. The caller passes an
// empty v if the series does not have the label.
func (m *matcher) matches(v []byte) bool {
	if m.re != nil {
		return m.re.Match(v) != m.negate
	}
	return (string(v) == m.value) != m.negate
}

// Selectors is a list of selectors. A series matches the list if it matches at least one selector,
// or if the list is empty.
type Selectors []Selector

// ParseSelectors parses an operator's list of selectors. It fails if a selector is invalid, if the
// pattern of a matcher has more than MaxPattern steps, or if there are more than maxSelectors. All
// selectors together may have more steps, because the operator is trusted and the list is parsed
// only at a start or a reload.
func ParseSelectors(texts []string) (Selectors, error) {
	return ParseSelectorsWithin(texts, math.MaxInt)
}

// ParseSelectorsWithin parses the selectors of a scrape. It fails as ParseSelectors does, and also
// if all selectors together have more than maxSteps steps. Each matcher counts as one step, and
// each pattern as patternSteps counts.
func ParseSelectorsWithin(texts []string, maxSteps int) (s Selectors, err error) {
	if len(texts) > maxSelectors {
		return nil, fmt.Errorf("%w: there are %d selectors, at most %d are allowed", ErrTooLarge, len(texts), maxSelectors)
	}
	steps := 0
	for _, text := range texts {
		sel, n, err := parseSelector(text)
		if err != nil {
			return nil, err
		}
		if steps += n; steps > maxSteps {
			return nil, fmt.Errorf("%w: all selectors together have more than %d steps; each matcher and each character of a pattern is one step, and a repetition counts as often as it repeats", ErrTooLarge, maxSteps)
		}
		s = append(s, sel)
	}
	for i := range s {
		if err := s[i].compile(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// MatchOrEmpty reports whether a series matches at least one selector of s. It returns true if s is
// empty.
func (s Selectors) MatchOrEmpty(name []byte, labels []Label) bool {
	for i := range s {
		if s[i].matches(name, labels) {
			return true
		}
	}
	return len(s) == 0
}

// matches reports whether a series satisfies every matcher of s.
func (s *Selector) matches(name []byte, labels []Label) bool {
	return s.firstMismatch(name, labels) == len(s.matchers)
}

// firstMismatch returns the index of the first matcher of s that a series does not satisfy, or the
// number of matchers. It does not evaluate the matchers after that.
func (s *Selector) firstMismatch(name []byte, labels []Label) int {
	for i := range s.matchers {
		m := &s.matchers[i]
		value := name
		if m.label != nameLabel {
			value = labelValue(labels, m.label)
		}
		if !m.matches(value) {
			return i
		}
	}
	return len(s.matchers)
}

// LineMatcherOrNil returns a function that reports whether the series of a rendered line matches s.
// It returns nil if s is empty, because then every line matches. The returned function is not safe
// for concurrent use.
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
