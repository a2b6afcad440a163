package main

// Tests of the parser of series: which texts are a series, and which lines have the form that
// SampleList.Add renders.

import (
	"fmt"
	"strings"
	"testing"
)

// parsePrefix returns the metric name, the labels and the remaining text of a line, or an error
// that states the fault. It does not change the line.
func TestParserSeries(t *testing.T) {
	show := func(name []byte, labels []Label, rest []byte) string {
		var b strings.Builder
		fmt.Fprintf(&b, "%q", name)
		for _, l := range labels {
			fmt.Fprintf(&b, " %q=%q", l.Name, l.Value)
		}
		fmt.Fprintf(&b, "|%s", rest)
		return b.String()
	}
	var p SeriesParser
	for _, c := range []struct {
		line string
		want string // name, labels and remaining text, formatted by show; or a part of the error
	}{
		{`a 1`, `"a"|1`},
		{`a`, `"a"|`},
		{`a{} 1`, `"a"| 1`},
		{`a{}1`, `"a"|1`},
		{"a \t{ x = \"y\" , z\t=\"\" , } 1", `"a" "x"="y" "z"=""| 1`},
		{`a{x="y",x="z"}`, `"a" "x"="y" "x"="z"|`}, // SampleList.Add refuses duplicate labels, but the parser does not
		{`{"a.b"}`, `"a.b"|`},
		{`{ "a.b" , x="y" } 1`, `"a.b" "x"="y"| 1`},
		{`{"a","b.c"="d"}`, `"a" "b.c"="d"|`},
		{`{x="y","a.b"} 1`, `"a.b" "x"="y"| 1`},
		{`{x="y" , "a\"b" , "c.d"="e",} 1`, `"a\"b" "x"="y" "c.d"="e"| 1`},
		{`{"a\"b\\c\nd\e"}`, `"a\"b\\c\nd\\e"|`},
		{`a{x="\"\\\n\e\\n\""}`, `"a" "x"="\"\\\n\\e\\n\""|`}, // \e is no escape, so its backslash is kept
		{`a{x="\n",y="\\",z="plain"}`, `"a" "x"="\n" "y"="\\" "z"="plain"|`},
		{`a{x="}{,\\"} 1`, `"a" "x"="}{,\\"| 1`},
		{`:a{x="y"}`, `":a" "x"="y"|`},
		{``, "no valid metric name"},
		{`1a 1`, "no valid metric name"},
		{"\ufeffa 1", "no valid metric name"},
		{`a.b 1`, `unexpected '.' in the metric name`},
		{`{} 1`, "no metric name"},
		{`{x="y"} 1`, "no metric name"},
		{`{""} 1`, "no metric name"},
		{`a{"b"} 1`, `label "b" has no value`},
		{`{"a","b"} 1`, `label "b" has no value`},
		{`{"a",x="y","b"} 1`, `label "b" has no value`},
		{`{x="y","a","b"} 1`, `label "b" has no value`},
		{`{"","b"} 1`, `no metric name`},
		{`a{x="y","b"} 1`, `label "b" has no value`},
		{`{a} 1`, `label "a" has no value`},
		{`a{,} 1`, `unexpected ',' where a label name`},
		{`a{x="y",,} 1`, `unexpected ',' where a label name`},
		{`a{x="y" z="w"} 1`, `unexpected 'z' after label "x"`},
		{`a{x=y} 1`, `the value of label "x" is not quoted`},
		{`a{x=`, `the value of label "x" is not quoted`},
		{`a{x="y`, "a quoted string does not end"},
		{`a{x="y\`, "a quoted string does not end"},
		{`a{x="y\"`, "a quoted string does not end"},
		{`a{x="y"`, "the labels do not end in }"},
		{`a{x="y",`, "the labels do not end in }"},
		{`a{`, "the labels do not end in }"},
		{`a{x`, `label "x" has no value`},
		{`a{a:b="c"}`, `label "a" has no value`},
		{`a{1b="c"}`, `unexpected '1' where`},
		{"a{x='y'}", "is not quoted"},
		{`a{` + strings.Repeat("x", 5000), "has no value"},
		{`a{` + strings.Repeat(`x="",`, MaxLabels+1) + `}`, "too large: more than 128 labels"},
		{strings.Repeat("x", 2*MaxLine+1), "too large: the line has 131071 bytes, limit 131070"},
	} {
		before := c.line
		line := []byte(c.line)
		name, labels, rest, err := p.parsePrefix(line)
		got := show(name, labels, rest)
		if err != nil {
			got = err.Error()
			if len(got) > 500 {
				t.Errorf("line %.40q: the error has %d bytes, want at most 500", c.line, len(got))
			}
		}
		if err == nil && got != c.want || err != nil && !strings.Contains(got, c.want) {
			t.Errorf("line %.60q:\n got %.200s\nwant %s", c.line, got, c.want)
		}
		if string(line) != before {
			t.Errorf("line %.60q: the parser changed it", c.line)
		}
	}
	if _, _, err := p.ParseLine([]byte("a 1")); err == nil || !strings.Contains(err.Error(), `series "a 1"`) {
		t.Errorf("ParseLine of a series with a value after it: got error %v", err)
	}
}

// ParseCanonicalLine refuses every line that differs from the line that SampleList.Add renders for
// the same series.
func TestParserRefusesOtherForms(t *testing.T) {
	var p SeriesParser
	for _, line := range []string{
		`a{}`, `a{b="1",a="2"}`, `a{a="1",}`, `a{a="1", b="2"}`, `a {a="1"}`, ` a`, `a `, `a{a="1"} `, `a{a="1"}1`, `a 1`,
		`{"a"}`, `{"a",b="c"}`, `{"a.b","c"="d"}`, `{"a.b",}`, `a{"b"="c"}`, `a{b="\e"}`, "a{b=\"\n\"}", `a{b="1",b="1"}`,
		`a{__b="1"}`, "a{b=\"\x00\"}", "a{b=\"\xff\"}", `a.b`, ``, `a{b="1"`, `{x="y","a.b"}`,
	} {
		if _, _, err := p.ParseCanonicalLine([]byte(line)); err == nil {
			t.Errorf("line %q is accepted as normal form", line)
		}
	}
	// Change each byte of a valid line to a quote, drop it, double it, or insert a space before it.
	// The result must be refused, or must be exactly the line that is rendered for another series.
	for _, line := range []string{`a{b="c",d="\\e\n"}`, `{"a.b","c.d"="e",f=""}`} {
		if _, _, err := p.ParseCanonicalLine([]byte(line)); err != nil {
			t.Errorf("line in normal form: %v", err)
		}
		for i := range line {
			for _, other := range []string{line[:i] + line[i+1:], line[:i] + " " + line[i:], line[:i] + line[i:i+1] + line[i:], line[:i] + "\"" + line[i+1:]} {
				name, labels, err := p.ParseCanonicalLine([]byte(other))
				if err == nil && string(appendLine(nil, name, labels)) != other {
					t.Errorf("line %q is accepted as normal form, but is rendered as %q", other, appendLine(nil, name, labels))
				}
			}
		}
	}
}
