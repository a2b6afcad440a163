package main

// Tests of selectors: the series that a selector matches, and the selectors that are refused
// because they are malformed or too costly.

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// selected returns the series of a fixed list that match the selectors s.
func selected(s Selectors) (got []string) {
	match := s.LineMatcherOrNil()
	for _, line := range []string{
		`up`, `up{job="a"}`, `up{job="ab"}`, `up{job=""}`, `up{env="x",job="b"}`, "up{job=\"a\\nb\"}",
		`down{job="a"}`, `a:b`, `{"a.b",job="a"}`, `{"a.b","c.d"="e"}`, `up{job="é"}`, `up{job="a\"b"}`,
	} {
		if match == nil || match([]byte(line)) {
			got = append(got, line)
		}
	}
	return got
}

// parseOne parses a list of one selector.
func parseOne(text string) (Selector, error) {
	s, err := ParseSelectors([]string{text})
	if err != nil {
		return Selector{}, err
	}
	return s[0], nil
}

// A selector matches the same series as in PromQL. String returns the selector as it was written,
// without the blanks around it.
func TestSelector(t *testing.T) {
	for _, c := range []struct {
		text string
		want []string // the series of the fixed list in selected that match the selector
	}{
		{`up`, []string{`up`, `up{job="a"}`, `up{job="ab"}`, `up{job=""}`, `up{env="x",job="b"}`, "up{job=\"a\\nb\"}", `up{job="é"}`, `up{job="a\"b"}`}},
		{" up { } \n", selected(mustSelect(t, "up"))},
		{`up{job="a"}`, []string{`up{job="a"}`}},
		{"\tup\n{ job\t= \"a\" , }", []string{`up{job="a"}`}},
		{`{job="a"}`, []string{`up{job="a"}`, `down{job="a"}`, `{"a.b",job="a"}`}},
		{`up{job='a'}`, []string{`up{job="a"}`}},
		{"up{job=`a`}", []string{`up{job="a"}`}},
		{`up{job="\x61"}`, []string{`up{job="a"}`}},
		{`up{job="a\nb"}`, []string{"up{job=\"a\\nb\"}"}},
		{"up{job=`a\nb`}", []string{"up{job=\"a\\nb\"}"}},
		{`up{job=~"a.b"}`, []string{"up{job=\"a\\nb\"}", `up{job="a\"b"}`}}, // the dot matches any character, even a newline
		{`up{job="\u00e9"}`, []string{`up{job="é"}`}},
		{`up{job="\303\251"}`, []string{`up{job="é"}`}},
		{`up{job="a\"b"}`, []string{`up{job="a\"b"}`}},
		{`up{job='a"b'}`, []string{`up{job="a\"b"}`}},
		{"up{job=`a\"b`}", []string{`up{job="a\"b"}`}},
		{`up{job=""}`, []string{`up`, `up{job=""}`}}, // an empty label and a missing label are equal
		{`up{job!="a"}`, []string{`up`, `up{job="ab"}`, `up{job=""}`, `up{env="x",job="b"}`, "up{job=\"a\\nb\"}", `up{job="é"}`, `up{job="a\"b"}`}},
		{`up{job!=""}`, []string{`up{job="a"}`, `up{job="ab"}`, `up{env="x",job="b"}`, "up{job=\"a\\nb\"}", `up{job="é"}`, `up{job="a\"b"}`}},
		{`up{job=~"a"}`, []string{`up{job="a"}`}}, // a pattern must match the whole value
		{`up{job=~"a|b"}`, []string{`up{job="a"}`, `up{env="x",job="b"}`}},
		{`up{job=~"a?b"}`, []string{`up{job="ab"}`, `up{env="x",job="b"}`}},
		{`up{job=~"a*"}`, []string{`up`, `up{job="a"}`, `up{job=""}`}},
		{`up{job=~"(?i)A"}`, []string{`up{job="a"}`}},
		{`up{job!~"a.*|"}`, []string{`up{env="x",job="b"}`, `up{job="é"}`}},
		{`up{job!~".+"}`, []string{`up`, `up{job=""}`}},
		{`{job=~".*",env="x"}`, []string{`up{env="x",job="b"}`}},
		{`{__name__="down"}`, []string{`down{job="a"}`}},
		{`{__name__=~"d.*|a:.",job!="x"}`, []string{`down{job="a"}`, `a:b`}},
		{`a:b`, []string{`a:b`}},
		{`{"a.b"}`, []string{`{"a.b",job="a"}`, `{"a.b","c.d"="e"}`}},
		{`{ 'a.b' , job="a" }`, []string{`{"a.b",job="a"}`}},
		{"{job=\"a\",`a.b`}", []string{`{"a.b",job="a"}`}},
		{`{"c.d"="e"}`, []string{`{"a.b","c.d"="e"}`}},
		{`{"c.d"=~"e|f","a.b"}`, []string{`{"a.b","c.d"="e"}`}},
		{`{"up",job=~"a"}`, []string{`up{job="a"}`}},
	} {
		sel, err := parseOne(c.text)
		if err != nil {
			t.Errorf("parsing selector %s: %v", c.text, err)
			continue
		}
		if got := selected(Selectors{sel}); !slices.Equal(got, c.want) {
			t.Errorf("series that selector %s matches:\n got %q\nwant %q", c.text, got, c.want)
		}
		if sel.String() != strings.TrimSpace(c.text) {
			t.Errorf("String of selector %s: got %s", c.text, sel)
		}
	}
}

// mustSelect parses a list of selectors and fails the test if ParseSelectors refuses the list.
func mustSelect(t testing.TB, texts ...string) Selectors {
	t.Helper()
	s, err := ParseSelectors(texts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A selector is refused if it is malformed, if all its matchers match the empty string, or if it is
// too long or too costly. The error is at most 16 KiB long.
func TestSelectorErrors(t *testing.T) {
	const empty = "at least one matcher must not match the empty string"
	for _, c := range []struct{ text, want string }{
		{``, "expected a metric name or {"},
		{`1up`, "expected a metric name or {"},
		{`up{`, "expected a label name"},
		{`up}`, "expected a metric name or {"},
		{`up{job}`, `expected =, !=, =~ or !~ after "job" at "}"`},
		{`up{job=}`, `expected a quoted string at "}"`},
		{`up{job=a}`, `expected a quoted string at "a}"`},
		{`up{job=="a"}`, `expected a quoted string at "=\"a\"}"`},
		{`up{job>"a"}`, `after "job" at ">`},
		{`up{job="a}`, "a quoted string does not end"},
		{"up{job=`a}", "a quoted string does not end"},
		{`up{job="a"`, "expected , or } at"},
		{`up{job="a",`, "expected a label name"},
		{`up{job="a" env="b"}`, `expected , or } at "env=`},
		{`up{job="a",,}`, `expected a label name at ",}"`},
		{`up{,}`, `expected a label name at ",}"`},
		{`up{1b="a"}`, `expected a label name at "1b`},
		{`up{a:b="a"}`, `after "a" at ":b`},
		{`up{""="a"}`, "expected a label name"},
		{`up{job="\q"}`, `bad escape at "\\q`},
		{`up{job="\'"}`, "bad escape"},
		{`up{job="a"} 5`, `unexpected "5" after }`},
		{`up{job="a"}[5m]`, `unexpected "[5m]" after }`},
		{`up offset 5m`, "expected a metric name or {"},
		{`up{job=~"("}`, `pattern of "job"`},
		{`up{job=~"a)|(b"}`, `pattern of "job"`}, // this pattern is valid only between anchors, where it would mean two alternatives
		{`up{job=~"a{1001}"}`, `pattern of "job"`},
		{`{"a.b" job="x"}`, `expected , or } at "job=`},
		{`{"a.b","c.d"}`, `a second metric name "c.d"`},
		{`{job="x","a.b","c.d"}`, `a second metric name "c.d"`},
		{`up{"a.b"}`, `a second metric name "a.b"`},
		{`{}`, empty},
		{`{job=""}`, empty},
		{`{job=~".*"}`, empty},
		{`{job!="a"}`, empty},
		{`{job!~"a",env=~"x|"}`, empty},
		{strings.Repeat("x", maxSelector+1), "too large"},
		{"{" + strings.Repeat("x", maxSelector-1), "expected =,"},
		{`{x=~"` + strings.Repeat("(", 8000) + `"}`, "pattern of"},
		{`{x=~"a` + strings.Repeat(".{1000}", 1000) + `"}`, "too large: the pattern has "}, // the pattern has a million steps
		{`{x=~"a` + strings.Repeat("(b.{10}){100}", 30) + `"}`, "too large: the pattern has "},
		{`{x=~"a` + strings.Repeat(`\\pL.`, 1000) + `"}`, "too large: the pattern has "}, // each \pL has hundreds of ranges
	} {
		_, err := parseOne(c.text)
		if err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 2*maxSelector {
			t.Errorf("parsing selector %.60s: got error %.300v, want one with %q", c.text, err, c.want)
		}
	}
	if _, err := parseOne(`{x=~"` + strings.Repeat("a.b|", 2000) + "c{2,1000}" + `"}`); err != nil {
		t.Errorf("parsing a long pattern of few steps: %v", err)
	}
	if _, err := ParseSelectors(make([]string, maxSelectors+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("parsing %d selectors: got error %v, want ErrTooLarge", maxSelectors+1, err)
	}
	if _, err := ParseSelectors([]string{"up", "{"}); err == nil || !strings.Contains(err.Error(), `"{"`) {
		t.Errorf("parsing a list whose second selector is malformed: got error %v, want one with %q", err, `"{"`)
	}
}

// The selectors of one scrape are refused if together they have more steps than allowed: one for
// each matcher, and the steps of each pattern. The error says so. An operator's list has no such
// limit.
func TestSelectorsWithin(t *testing.T) {
	many := func(n int, text string) []string { return slices.Repeat([]string{text}, n) }
	for _, c := range []struct {
		name  string
		texts []string
		steps int
	}{
		{"no pattern", []string{`up{job="a"}`, "down"}, 3},
		{"literal", []string{`{job=~"abc"}`}, 1 + 3},
		{"repetition", []string{`{job=~"a.{1000}"}`}, 1 + 1 + 1 + 2000},
		{"class", []string{`{job!~"[a-z]|"}`, `{a!=""}`}, 1 + 3 + 1},
		{"hundreds of costly patterns", many(214, `{job=~"a.{999}.{999}.{999}.{999}"}`), 214 * (1 + 1 + 1 + 4*1998)},
		{"many matchers", many(1000, `{`+strings.Repeat("a!='',", 21)+`}`), 21_000},
	} {
		_, err := ParseSelectorsWithin(c.texts, c.steps-1)
		if want := fmt.Sprintf("all selectors together have more than %d steps", c.steps-1); !errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got error %v, want one with %q", c.name, err, want)
		}
		for _, parse := range []func() (Selectors, error){
			func() (Selectors, error) { return ParseSelectorsWithin(c.texts, c.steps) },
			func() (Selectors, error) { return ParseSelectors(c.texts) },
		} {
			if s, err := parse(); err != nil || len(s) != len(c.texts) {
				t.Errorf("%s: got %d selectors, error %v", c.name, len(s), err)
			}
		}
	}
}

// A list of selectors matches a series if at least one of the selectors matches it. An empty list
// matches every series.
func TestSelectors(t *testing.T) {
	if s := mustSelect(t); s.LineMatcherOrNil() != nil || !s.MatchOrEmpty([]byte("a"), nil) {
		t.Error("an empty list does not match every series")
	}
	if got := selected(mustSelect(t, "down", `{"c.d"!=""}`)); !slices.Equal(got, []string{`down{job="a"}`, `{"a.b","c.d"="e"}`}) {
		t.Errorf("series that a list of two selectors matches: got %q", got)
	}
	if mustSelect(t, "up").LineMatcherOrNil()([]byte("up{")) {
		t.Error("a malformed line matches a selector")
	}
}

// For any text, ParseSelectors returns a selector or an error of bounded length. The selector does
// not match a series without a name and labels, and parsing its String gives the same selector.
func FuzzSelector(f *testing.F) {
	for _, s := range []string{`up{job="a",env!~"b|c"}`, `{"a.b",'c'=~"d"}`, "{a=`b`}", `{a="\x61\u00e9"}`} {
		f.Add(s, `up{job="a"}`)
	}
	f.Fuzz(func(t *testing.T, text, line string) {
		if len(text) > 500 {
			return // long patterns compile slowly, which would slow down the fuzzer
		}
		sel, err := parseOne(text)
		if err != nil {
			if len(err.Error()) > 4000 {
				t.Fatalf("the error has %d bytes, want at most 4,000", len(err.Error()))
			}
			return
		}
		if s := (Selectors{sel}); s.MatchOrEmpty(nil, nil) {
			t.Fatalf("selector %q matches a series without a name and labels", text)
		} else {
			s.LineMatcherOrNil()([]byte(line))
		}
		again, err := parseOne(sel.String())
		if err != nil || again.String() != sel.String() {
			t.Fatalf("parsing the String %q of a selector: got %q, %v", sel, again, err)
		}
	})
}

// BenchmarkSelectors matches one line against a list of three selectors, of which one matches.
func BenchmarkSelectors(b *testing.B) {
	match := mustSelect(b, `up{job="a"}`, `{job=~"x.*",code!="5"}`, "down").LineMatcherOrNil()
	line := []byte(`a_total{code="7",instance="localhost:9090",job="x",method="get"}`)
	b.ReportAllocs()
	for b.Loop() {
		if !match(line) {
			b.Fatal("the line does not match")
		}
	}
}
