package main

// Tests of decoding text exposition and OpenMetrics: the samples of valid bodies, and the errors
// for malformed bodies.

import (
	"strings"
	"testing"
)

// Valid text exposition within the limits is decoded to its samples in the order of the body.
// Comments, including TYPE and HELP lines, are ignored.
func TestDecodeText(t *testing.T) {
	for _, c := range []struct {
		body string
		want []string // the samples, in the form that the function decoded returns
	}{
		{"", nil},
		{"\n\n \t\n# a comment\n#\n# HELP x y\n# TYPE a what ever\n", nil},
		{"a 1\n", []string{"a 1 -"}},
		{"a 1 5\nb 2\nc 3 7\n", []string{"a 1 5", "b 2 -", "c 3 7"}},
		{" \ta{ b = \"c\" , } \t1\t 5 \t\n", []string{`a{b="c"} 1 5`}},
		{"a{b=\"c\"}1\n", []string{`a{b="c"} 1 -`}},
		{"a:b{z=\"1\",y=\"2\"} 1\n", []string{`a:b{y="2",z="1"} 1 -`}},
		{"{\"a.b\",x=\"y\"} 1\n", []string{`{"a.b",x="y"} 1 -`}},
		{"{x=\"y\",\"a.b\",c=\"d\"} 1\n{x=\"y\",\"a\"} 2\n", []string{`{"a.b",c="d",x="y"} 1 -`, `a{x="y"} 2 -`}},
		{"{\"a.b\"} 1\n{\"a\",\"c.d\"=\"e\"} 2\n", []string{`{"a.b"} 1 -`, `a{"c.d"="e"} 2 -`}},
		{`a{x="\\\"\n\t\x\\n"} 1` + "\n", []string{`a{x="\\\"\n\\t\\x\\n"} 1 -`}}, // only \\ \" \n are escapes
		{"a{x=\"\r\t,}{ # é\"} 1\n", []string{"a{x=\"\r\t,}{ # é\"} 1 -"}},
		{"a +Inf\na -Inf\na inf\na Infinity\na NaN\na nan\n", []string{"a +Inf -", "a -Inf -", "a +Inf -", "a +Inf -", "a NaN -", "a NaN -"}},
		{"a 1e3\na -0\na .5\na 5.\na +1\na 1E-3\na 1e-999\n", []string{"a 1000 -", "a -0 -", "a 0.5 -", "a 5 -", "a 1 -", "a 0.001 -", "a 0 -"}},
		{"a 1 -5\na 1 0\na 1 9223372036854775807\na 1 -9223372036854775808\n",
			[]string{"a 1 -5", "a 1 0", "a 1 9223372036854775807", "a 1 -9223372036854775808"}},
		{"# EOF\na 1\n", []string{"a 1 -"}}, // in text exposition, "# EOF" is an ordinary comment
		{"# TYPE a counter\na_total 1\na_created 2\n", []string{"a_total 1 -", "a_created 2 -"}},
		{"a_bucket{le=\"0.50\"} 1\n", []string{`a_bucket{le="0.50"} 1 -`}}, // the value 0.50 of le stays as it is
	} {
		checkDecoded(t, []byte(c.body), FormatText, c.want, UnsupportedParts{}, nil)
	}
}

// Malformed or truncated text exposition is refused. The error names the line by its number, and
// the fault.
func TestDecodeTextRefuses(t *testing.T) {
	long := strings.Repeat("x", MaxLine)
	for _, c := range []struct {
		body string
		want []string // texts that the error must contain
	}{
		{"a 1", []string{"line 1", "truncated", "newline"}},
		{"a 1\nb 2", []string{"line 2", "truncated"}},
		{"a 1\n# com", []string{"line 2", "truncated"}},
		{"# EOF", []string{"line 1", "truncated"}},
		{"a 1\r\n", []string{"line 1", `series "a 1\r"`, `value "1\r"`}},
		{"\r\na 1\n", []string{"line 1", "no valid metric name"}},
		{"a 1\n\n# x\nb\n", []string{"line 4", `series "b"`, "no value"}},
		{"a 0x1p-2\n", []string{"line 1", `value "0x1p-2" is not a float`}},
		{"a 0x10\n", []string{"is not a float"}},
		{"a 1_000\n", []string{"is not a float"}},
		{"a 1e999\n", []string{"is not a float"}},
		{"a one\n", []string{`"one" is not a float`}},
		{"a 1,5\n", []string{"is not a float"}},
		{"a 1 1.5\n", []string{"line 1", `timestamp "1.5" is not a whole number of milliseconds`}},
		{"a 1 1e3\n", []string{"timestamp"}},
		{"a 1 9223372036854775808\n", []string{"timestamp"}},
		{"a 1 0x5\n", []string{"timestamp"}},
		{"a 1 5 6\n", []string{`unexpected "6" after the sample`}},
		{"a 1 5 # {x=\"y\"} 1\n", []string{"unexpected", "after the sample"}}, // only OpenMetrics has exemplars
		{"a 1 # {x=\"y\"} 1\n", []string{"after the sample"}},
		{"a{b=\"c\",b=\"d\"} 1\n", []string{"line 1", `series "a{b=\"c\",b=\"d\"} 1"`, `label "b" occurs twice`}},
		{"a{__name__=\"c\"} 1\n", []string{"reserved"}},
		{"a{\"\"=\"c\"} 1\n", []string{"empty label name"}},
		{"a{b=\"\xff\"} 1\n", []string{"line 1", "not UTF-8"}},
		{"{\"\xff\"} 1\n", []string{"metric name", "not UTF-8"}},
		{"\xff 1\n", []string{"no valid metric name"}},
		{"a{b=\"\x00\"} 1\n", []string{"NUL"}},
		{"a\x00 1\n", []string{"unexpected '\\x00'"}},
		{"a{b=\"c\n\"} 1\n", []string{"line 1", "does not end"}},
		{"<html>\n", []string{"line 1", `"<html>"`, "no valid metric name"}},
		{"a{x=\"" + long + "\"} 1\n", []string{"line 1", "too large", "limit 65535"}},
		{"a{x=\"" + long + long + "\"} 1\n", []string{"line 1", "too large"}},
		{"a " + long + "\n", []string{"line 1", "is not a float"}},
		{"a 1 " + long + "\n", []string{"timestamp"}},
		{"a 1 1 " + long + "\n", []string{"after the sample"}},
		{"a{x=\"" + strings.Repeat("\xff", 60000) + "\"} 1\n", []string{"not UTF-8"}},
		{"a{" + strings.Repeat("b=\"\",", 129) + "} 1\n", []string{"too large", "128 labels"}},
	} {
		checkDecoded(t, []byte(c.body), FormatText, nil, UnsupportedParts{}, c.want)
	}
}

// Valid OpenMetrics text is decoded to its samples. Exemplars are skipped and counted. The _created
// samples of counters, histograms and summaries are skipped and counted too.
func TestDecodeOpenMetrics(t *testing.T) {
	for _, c := range []struct {
		body    string
		want    []string // the samples, in the form that the function decoded returns
		skipped UnsupportedParts
	}{
		{"# EOF\n", nil, UnsupportedParts{}},
		{"# EOF", nil, UnsupportedParts{}}, // the rule "exposition" of OpenMetrics's ABNF makes the newline after "# EOF" optional
		{"a 1\n# EOF", []string{"a 1 -"}, UnsupportedParts{}},
		{"# TYPE a gauge\n# UNIT a_s s\n# HELP a b\na 1 1520879607.789\n# EOF\n", []string{"a 1 1520879607789"}, UnsupportedParts{}},
		{"a 1 1.0005\na 1 -1.5\na 1 0\na 1 1e3\na 1 1e12\n# EOF\n", []string{"a 1 1001", "a 1 -1500", "a 1 0", "a 1 1000000", "a 1 1000000000000000"}, UnsupportedParts{}},
		{"a_total 1 # {trace_id=\"x\"} 0.5\na_total{b=\"#\"} 2 3 # {} 1 2\n# EOF\n", []string{"a_total 1 -", `a_total{b="#"} 2 3000`}, UnsupportedParts{Exemplars: 2}},
		{"# TYPE a counter\na_total 1\na_created 2\na_created{b=\"c\"} 2\n# TYPE b histogram\nb_created 1\n# TYPE c summary\nc_created 1\n# EOF\n",
			[]string{"a_total 1 -"}, UnsupportedParts{Created: 4}},
		{"# TYPE a gauge\na_created 2\nb_created 3\n# TYPE c counter\nb_created 4\n# EOF\n",
			[]string{"a_created 2 -", "b_created 3 -", "b_created 4 -"}, UnsupportedParts{}}, // none of these _created samples belongs to a counter, histogram or summary
		{"# TYPE a counter\na_created 1\n# TYPE b gauge\na_created 1\n# EOF\n", []string{"a_created 1 -"}, UnsupportedParts{Created: 1}},
		{"# TYPE \"a.b c\" counter\n{\"a.b c_total\"} 1\n{\"a.b c_created\"} 2\n# EOF\n", []string{`{"a.b c_total"} 1 -`}, UnsupportedParts{Created: 1}},
		{"# TYPE \"a\\\n# TYPE \" counter\n# TYPE counter\n# TYPE a\na 1\n# EOF\n", []string{"a 1 -"}, UnsupportedParts{}},
	} {
		checkDecoded(t, []byte(c.body), FormatOpenMetrics, c.want, c.skipped, nil)
	}
}

// Malformed or truncated OpenMetrics text is refused. Text without "# EOF" at its end counts as
// truncated.
func TestDecodeOpenMetricsRefuses(t *testing.T) {
	for _, c := range []struct {
		body string
		want []string // texts that the error must contain
	}{
		{"", []string{"truncated", "# EOF"}},
		{"a 1\n", []string{"truncated", "# EOF"}},
		{"a 1\n# EOF\r\n", []string{"truncated", "# EOF"}},
		{"a 1\n# EO", []string{"line 2", "truncated"}},
		{"a 1\n#EOF\n", []string{"truncated"}},
		{"a 1\n# EOF\na 2\n", []string{"line 3", "content after # EOF"}},
		{"# EOF\n\n", []string{"line 2", "content after # EOF"}},
		{"# EOF\n# EOF\n", []string{"content after # EOF"}},
		{"a 1\nb 1", []string{"line 2", "truncated"}},
		{"a 1 NaN\n# EOF\n", []string{"line 1", `timestamp "NaN" is not a number of seconds`}},
		{"a 1 Inf\n# EOF\n", []string{"timestamp"}},
		{"a 1 1e13\n# EOF\n", []string{"timestamp"}},
		{"a 1 -1e300\n# EOF\n", []string{"timestamp"}},
		{"a 1 now\n# EOF\n", []string{"timestamp"}},
		{"a 1 2 3\n# EOF\n", []string{"after the sample"}},
		{"a\n# EOF\n", []string{"no value"}},
		{"a # {} 1\n# EOF\n", []string{"is not a float"}},
	} {
		checkDecoded(t, []byte(c.body), FormatOpenMetrics, nil, UnsupportedParts{}, c.want)
	}
}
