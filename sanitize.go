package main

// What may pass: series selectors, the client's cleanup and anonymization, the
// server's normal form. Invariants: after the server's Normalizer a sample
// carries the authenticated cluster ID and no name that the server itself
// serves; after the client's Cleaner no anonymized label holds its value. This
// file must not know of HTTP, files or stores, and keeps no state between samples.

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"maps"
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
	var p Parser
	return func(line []byte) bool {
		name, labels, err := p.Line(line)
		return err == nil && s.Match(name, labels)
	}
}

// labelValue returns the value of a label, empty if there is none: to Prometheus
// an empty label and a missing one are the same.
func labelValue[T string | []byte](labels []Label, name T) []byte {
	for i := range labels {
		if string(labels[i].Name) == string(name) {
			return labels[i].Value
		}
	}
	return nil
}

func hasLabel[T string | []byte](labels []Label, name T) bool {
	for i := range labels {
		if string(labels[i].Name) == string(name) {
			return true
		}
	}
	return false
}

// Names that the server adds for each cluster. A push must not bring them, or a
// site could deny its own silence, and a scrape hold one series twice.
const (
	PushTimeName        = "push_time_seconds"
	PushFailureTimeName = "push_failure_time_seconds"
	ClusterNamePrefix   = "telemeter_cluster_"
)

func reserved(name []byte) bool {
	if !Legacy(name, nil) { // push.time.seconds is shown as push_time_seconds
		name = []byte(NegotiateEscaping("").Name(string(name)))
	}
	return string(name) == PushTimeName || string(name) == PushFailureTimeName ||
		bytes.HasPrefix(name, []byte(ClusterNamePrefix))
}

// SortedLabels makes a list of a map.
func SortedLabels(m map[string]string) []Label {
	var list []Label
	for _, name := range slices.Sorted(maps.Keys(m)) {
		list = append(list, Label{[]byte(name), []byte(m[name])})
	}
	return list
}

// CheckLabelName reports a name that an operator must not set or remove.
func CheckLabelName(name string) error {
	switch {
	case name == "" || !Legacy([]byte("a"), []Label{{Name: []byte(name)}}):
		return fmt.Errorf("label name %q: use letters, digits and _, not a digit first", name)
	case strings.HasPrefix(name, "__") || name == ClusterLabel:
		return fmt.Errorf("label name %q is reserved", name)
	}
	return nil
}

// CheckLabel reports a label that an operator must not set: every sample with it
// would be refused.
func CheckLabel(name, value string) error {
	if err := CheckLabelName(name); err != nil {
		return err
	}
	var p Push
	if err := p.Add(&RawSample{Name: []byte("a"), Labels: []Label{{[]byte(name), []byte(value)}}}); err != nil {
		return fmt.Errorf("label %q: %w", name, err)
	}
	return nil
}

// Reasons for which a sample is dropped, as metrics and answers name them.
const (
	DropNotAllowed    = "not_allowed"
	DropRequiredLabel = "required_label"
	DropReserved      = "reserved_name"
	DropNotMatched    = "not_matched"
	DropInvalid       = "invalid"
)

// Normalizer brings samples into the server's normal form. It is immutable and
// safe for concurrent use.
type Normalizer struct {
	Elide    []string  // labels to remove
	Labels   []Label   // the operator's
	Required []Label   // a sample without is dropped; an empty value asks for any
	Allow    Selectors // of the sample in normal form
}

// Forced returns the labels that Apply forces on every sample of a push: the
// operator's, over them the token's, which say more of the site, and over all
// the cluster ID.
func (n *Normalizer) Forced(cluster string, token map[string]string) []Label {
	m := map[string]string{}
	for _, l := range n.Labels {
		m[string(l.Name)] = string(l.Value)
	}
	maps.Copy(m, token)
	m[ClusterLabel] = cluster
	return SortedLabels(m)
}

// Apply puts the forced labels on r, and makes job and instance empty where they
// are missing: under honor_labels a series then keeps its identity whichever
// server exposes it. It returns why the sample is to be dropped, or ""; an error
// refuses the push.
func (n *Normalizer) Apply(r *RawSample, forced []Label) (drop string, err error) {
	if reserved(r.Name) {
		return "", fmt.Errorf("the name %.100q is reserved for what the server itself serves", r.Name)
	}
	labels := r.Labels[:0]
	for _, l := range r.Labels {
		if len(l.Value) > 0 && !slices.Contains(n.Elide, string(l.Name)) && !hasLabel(forced, l.Name) {
			labels = append(labels, l)
		}
	}
	r.Labels = append(labels, forced...)
	for _, q := range n.Required {
		if v := labelValue(r.Labels, q.Name); len(v) == 0 || len(q.Value) > 0 && !bytes.Equal(v, q.Value) {
			return DropRequiredLabel, nil
		}
	}
	if !n.Allow.Match(r.Name, r.Labels) {
		return DropNotAllowed, nil
	}
	for _, name := range [...]string{"instance", "job"} {
		if !hasLabel(r.Labels, name) {
			r.Labels = append(r.Labels, Label{Name: []byte(name)})
		}
	}
	return "", nil
}

// Cleaner is the client's half: what leaves the site. It is not safe for
// concurrent use.
type Cleaner struct {
	Match     Selectors         // of the sample as scraped
	Rename    map[string]string // metric names
	Labels    []Label
	Anonymize []string // labels whose values are replaced
	mac       hash.Hash
}

// Salt sets the key under which values are anonymized.
func (c *Cleaner) Salt(salt []byte) { c.mac = hmac.New(sha256.New, salt) }

// Apply cleans r and returns why it must not leave, or "". What it leaves in may
// still be refused by Push.Add, as DropInvalid. Anonymized values are an HMAC and
// not a salted hash, so that without the salt nobody can try guesses; equal
// values stay equal, under every label.
func (c *Cleaner) Apply(r *RawSample) (drop string) {
	if !c.Match.Match(r.Name, r.Labels) {
		return DropNotMatched
	}
	if name, ok := c.Rename[string(r.Name)]; ok {
		r.Name = []byte(name)
	}
	if reserved(r.Name) {
		return DropReserved
	}
	r.Labels = slices.DeleteFunc(r.Labels, func(l Label) bool {
		return len(l.Value) == 0 || hasLabel(c.Labels, l.Name)
	})
	for i := range r.Labels {
		if l := &r.Labels[i]; slices.Contains(c.Anonymize, string(l.Name)) {
			c.mac.Reset()
			c.mac.Write(l.Value)
			l.Value = base64.RawURLEncoding.AppendEncode(nil, c.mac.Sum(nil)[:16])
		}
	}
	r.Labels = append(r.Labels, c.Labels...)
	return ""
}

// ParseLabels parses NAME=VALUE pairs, later ones winning.
func ParseLabels(pairs []string) ([]Label, error) {
	m := map[string]string{}
	for _, pair := range pairs {
		name, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, fmt.Errorf("label %q is not NAME=VALUE", pair)
		}
		if err := CheckLabel(name, value); err != nil {
			return nil, err
		}
		m[name] = value
	}
	return SortedLabels(m), nil
}

// ParseRename parses OLD=NEW pairs of metric names, later ones winning.
func ParseRename(pairs []string) (map[string]string, error) {
	m := map[string]string{}
	for _, pair := range pairs {
		old, name, ok := strings.Cut(pair, "=")
		if !ok || old == "" || !Legacy([]byte(name), nil) || name == "" {
			return nil, fmt.Errorf("rename %q is not OLD=NEW with a valid metric name", pair)
		}
		m[old] = name
	}
	maps.DeleteFunc(m, func(old, name string) bool { return old == name })
	return m, nil
}
