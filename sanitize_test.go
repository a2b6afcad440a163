package main

// The grammar of selectors and the series that they choose; the server's normal form of any
// push; and that no value that is to be anonymized leaves the client.

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// selected says which of a fixed set of series a selector chooses.
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

func TestSelector(t *testing.T) {
	for _, c := range []struct {
		text string
		want []string // the series chosen
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
		{`up{job=~"a.b"}`, []string{"up{job=\"a\\nb\"}", `up{job="a\"b"}`}}, // . is any byte
		{`up{job="\u00e9"}`, []string{`up{job="é"}`}},
		{`up{job="\303\251"}`, []string{`up{job="é"}`}},
		{`up{job="a\"b"}`, []string{`up{job="a\"b"}`}},
		{`up{job='a"b'}`, []string{`up{job="a\"b"}`}},
		{"up{job=`a\"b`}", []string{`up{job="a\"b"}`}},
		{`up{job=""}`, []string{`up`, `up{job=""}`}}, // empty and missing are one
		{`up{job!="a"}`, []string{`up`, `up{job="ab"}`, `up{job=""}`, `up{env="x",job="b"}`, "up{job=\"a\\nb\"}", `up{job="é"}`, `up{job="a\"b"}`}},
		{`up{job!=""}`, []string{`up{job="a"}`, `up{job="ab"}`, `up{env="x",job="b"}`, "up{job=\"a\\nb\"}", `up{job="é"}`, `up{job="a\"b"}`}},
		{`up{job=~"a"}`, []string{`up{job="a"}`}}, // anchored
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
		sel, err := parseSelector(c.text)
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		if got := selected(Selectors{sel}); !slices.Equal(got, c.want) {
			t.Errorf("%s:\n got %q\nwant %q", c.text, got, c.want)
		}
		if sel.String() != strings.TrimSpace(c.text) {
			t.Errorf("%s: shown as %s", c.text, sel)
		}
	}
}

func mustSelect(t testing.TB, texts ...string) Selectors {
	t.Helper()
	s, err := ParseSelectors(texts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

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
		{`up{job=~"a)|(b"}`, `pattern of "job"`}, // anchors are not to be broken out of
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
		{`{x=~"a` + strings.Repeat(".{1000}", 1000) + `"}`, "too large: it has "}, // else a million steps
		{`{x=~"a` + strings.Repeat("(b.{10}){100}", 30) + `"}`, "too large: it has "},
	} {
		_, err := parseSelector(c.text)
		if err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 2*maxSelector {
			t.Errorf("%.60s: %.300v, want %s", c.text, err, c.want)
		}
	}
	if _, err := parseSelector(`{x=~"` + strings.Repeat("a.b|", 2000) + "c{2,1000}" + `"}`); err != nil {
		t.Errorf("a long pattern: %v", err)
	}
	if _, err := ParseSelectors(make([]string, maxSelectors+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too many: %v", err)
	}
	if _, err := ParseSelectors([]string{"up", "{"}); err == nil || !strings.Contains(err.Error(), `"{"`) {
		t.Errorf("the second of two: %v", err)
	}
}

func TestSelectors(t *testing.T) {
	if s := mustSelect(t); s.LineMatcherOrNil() != nil || !s.MatchOrEmpty([]byte("a"), nil) {
		t.Error("no selectors have to choose all")
	}
	if got := selected(mustSelect(t, "down", `{"c.d"!=""}`)); !slices.Equal(got, []string{`down{job="a"}`, `{"a.b","c.d"="e"}`}) {
		t.Errorf("any of two: %q", got)
	}
	if mustSelect(t, "up").LineMatcherOrNil()([]byte("up{")) {
		t.Error("what does not parse is chosen")
	}
}

func FuzzSelector(f *testing.F) {
	for _, s := range []string{`up{job="a",env!~"b|c"}`, `{"a.b",'c'=~"d"}`, "{a=`b`}", `{a="\x61\u00e9"}`} {
		f.Add(s, `up{job="a"}`)
	}
	f.Fuzz(func(t *testing.T, text, line string) {
		if len(text) > 500 {
			return // patterns may be slow to compile, as they are in Prometheus
		}
		sel, err := parseSelector(text)
		if err != nil {
			if len(err.Error()) > 4000 {
				t.Fatalf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		if s := (Selectors{sel}); s.MatchOrEmpty(nil, nil) {
			t.Fatalf("%q chooses a series of no name and labels", text)
		} else {
			s.LineMatcherOrNil()([]byte(line))
		}
		again, err := parseSelector(sel.String())
		if err != nil || again.String() != sel.String() {
			t.Fatalf("%q is not parsed again: %v", sel, err)
		}
	})
}

func TestNormalizer(t *testing.T) {
	n := &ServerNormalizer{
		Elide:    []string{"replica", "instance"},
		Labels:   []Label{{[]byte("region"), []byte("eu")}, {[]byte("tier"), []byte("operator")}},
		Required: []Label{{[]byte("env"), nil}, {[]byte("tier"), []byte("token")}},
		Allow:    mustSelect(t, `up{_id="site",region="eu"}`, `{"a.b"}`, "push_time", "telemeter_cluster", "push_time_seconds2", "many"),
	}
	forced := n.ForcedLabels("site", map[string]string{"tier": "token", "_id": "forged", "note": ""})
	for _, c := range []struct {
		r          *RawSample
		line, drop string
	}{
		{expoRaw("up", 0, 0, "env", "p"), `up{_id="site",env="p",instance="",job="",note="",region="eu",tier="token"}`, ""},
		{expoRaw("up", 0, 0, "_id", "other", "env", "p", "region", "us", "tier", "x", "note", "secret"), `up{_id="site",env="p",instance="",job="",note="",region="eu",tier="token"}`, ""},
		{expoRaw("up", 0, 0, "_id", "a", "_id", "b", "env", "p"), `up{_id="site",env="p",instance="",job="",note="",region="eu",tier="token"}`, ""},
		{expoRaw("up", 0, 0, "job", "j", "instance", "i", "replica", "1", "env", "p"), `up{_id="site",env="p",instance="",job="j",note="",region="eu",tier="token"}`, ""},
		{expoRaw("up", 0, 0, "job", "", "x", "", "__y", "", "env", "p"), `up{_id="site",env="p",instance="",job="",note="",region="eu",tier="token"}`, ""},
		{expoRaw("a.b", 0, 0, "c.d", "e", "env", "p"), `{"a.b",_id="site","c.d"="e",env="p",instance="",job="",note="",region="eu",tier="token"}`, ""},
		{expoRaw("up", 0, 0), "", DropRequiredLabel},
		{expoRaw("up", 0, 0, "env", ""), "", DropRequiredLabel},
		{expoRaw("down", 0, 0, "env", "p"), "", DropNotAllowed},
		{expoRaw("push_time_seconds", 0, 0, "env", "p"), "", "error"},
		{expoRaw("push_failure_time_seconds", 0, 0), "", "error"},
		{expoRaw("telemeter_cluster_token_expiry_seconds", 0, 0), "", "error"},
		{expoRaw("telemeter_cluster_", 0, 0), "", "error"},
		{expoRaw("push.time.seconds", 0, 0, "env", "p"), "", "error"}, // is shown as push_time_seconds
		{expoRaw("telemeter_cluster.x", 0, 0), "", "error"},
		{expoRaw("telemeter.cluster\n"+strings.Repeat("x", 5000), 0, 0), "", "error"},
		{expoRaw("telemeter_cluster", 0, 0, "env", "p"), `telemeter_cluster{_id="site",env="p",instance="",job="",note="",region="eu",tier="token"}`, ""},
		{expoRaw("push_time_seconds2", 0, 0, "env", "p"), `push_time_seconds2{_id="site",env="p",instance="",job="",note="",region="eu",tier="token"}`, ""},
	} {
		shown := string(appendLine(nil, c.r.Name, c.r.Labels))
		drop, err := n.Normalize(c.r, forced)
		if err != nil {
			drop = "error"
			if len(err.Error()) > 500 || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "reserved") {
				t.Errorf("%.60s: %.600q", shown, err)
			}
		}
		var p SampleList
		if drop == "" {
			if err := p.Add(c.r); err != nil {
				t.Errorf("%s: %v", shown, err)
			}
		}
		if drop != c.drop || string(p.Arena) != c.line {
			t.Errorf("%.60s:\n got %s %s\nwant %s %s", shown, p.Arena, drop, c.line, c.drop)
		}
	}
	var plain ServerNormalizer
	r := expoRaw("a", 0, 0, "b", "1", "b", "2")
	if drop, err := plain.Normalize(r, plain.ForcedLabels("site", nil)); drop != "" || err != nil {
		t.Errorf("%s %v", drop, err)
	} else if err := new(SampleList).Add(r); err == nil {
		t.Error("a label that occurs twice is taken")
	}
	if string(forced[0].Name) != ClusterLabel || string(forced[0].Value) != "site" || len(n.Labels) != 2 {
		t.Errorf("forced: %q", forced)
	}
}

// Forced labels are shared by all samples of a push.
func TestNormalizerLeavesForcedLabels(t *testing.T) {
	var n ServerNormalizer
	forced := slices.Grow(n.ForcedLabels("site", map[string]string{"z": "1"}), 10)
	want := fmt.Sprintf("%q", forced)
	for range 3 {
		r := &RawSample{Name: []byte("a")} // no labels, so that append could keep forced itself
		if _, err := n.Normalize(r, forced); err != nil {
			t.Fatal(err)
		}
		if err := new(SampleList).Add(r); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%q", forced); got != want || fmt.Sprintf("%q", forced[:cap(forced)][len(forced)]) != `{"" ""}` {
			t.Fatalf("forced labels became %s", got)
		}
	}
}

func cleaned(c *ClientCleaner, r *RawSample) (string, error) {
	if drop := c.Clean(r); drop != "" {
		return drop, nil
	}
	var p SampleList
	err := p.Add(r)
	return string(p.Arena), err
}

func TestCleaner(t *testing.T) {
	c := &ClientCleaner{
		Match:  mustSelect(t, `{secret!="x",__name__!~"unwanted|"}`, "ALERTS", `{"rename.to.reserved"}`, "push_time_seconds"),
		Rename: map[string]string{"ALERTS": "alerts", "rename.to.reserved": "push_time_seconds"},
		Labels: []Label{{[]byte("site"), []byte("s")}, {[]byte("added"), []byte("a")}},
	}
	for _, k := range []struct {
		r    *RawSample
		want string
	}{
		{expoRaw("up", 0, 0, "b", "1"), `up{added="a",b="1",site="s"}`},
		{expoRaw("up", 0, 0, "site", "theirs", "empty", ""), `up{added="a",site="s"}`},
		{expoRaw("ALERTS", 0, 0, "alertname", "x"), `alerts{added="a",alertname="x",site="s"}`},
		{expoRaw("unwanted", 0, 0), DropNotMatched},
		{expoRaw("push_time_seconds", 0, 0), DropReserved},
		{expoRaw("push-time-seconds", 0, 0, "a", "b"), DropReserved},
		{expoRaw("rename.to.reserved", 0, 0), DropReserved},
	} {
		if got, err := cleaned(c, k.r); err != nil || got != k.want {
			t.Errorf("got %s (%v), want %s", got, err, k.want)
		}
	}
	if _, err := cleaned(&ClientCleaner{}, expoRaw("a", 0, 0, "b", "1", "b", "2")); err == nil {
		t.Error("a label that occurs twice is taken")
	}
}

func TestCleanerAnonymizes(t *testing.T) {
	const secret = "db-7.internal.example"
	anonymizer := func(salt string) *ClientCleaner {
		c := &ClientCleaner{Match: mustSelect(t, `{__name__=~".+"}`), Anonymize: []string{"instance", "a.b", "absent"}}
		c.SetSalt([]byte(salt))
		return c
	}
	value := func(c *ClientCleaner, label, v string) string {
		t.Helper()
		r := expoRaw("up", 0, 0, "job", "j", label, v)
		before := slices.Clone(r.Labels[1].Value)
		source := r.Labels[1].Value
		line, err := cleaned(c, r)
		if err != nil || strings.Contains(line, secret) || !bytes.Equal(source, before) {
			t.Fatalf("%s %v (source is now %q)", line, err, source)
		}
		_, labels, err := new(SeriesParser).ParseCanonicalLine([]byte(line))
		if err != nil || string(labelValue(labels, "job")) != "j" {
			t.Fatalf("%s: %v", line, err)
		}
		return string(labelValue(labels, label))
	}
	c := anonymizer("salt one, of 32 bytes or so.....")
	a := value(c, "instance", secret)
	if len(a) != 22 {
		t.Errorf("a value of %q; want 16 bytes in base64", a)
	}
	mac := hmac.New(sha256.New, []byte("salt one, of 32 bytes or so....."))
	mac.Write([]byte(secret))
	if want := base64.RawURLEncoding.EncodeToString(mac.Sum(nil)[:16]); a != want { // values must stay the same through releases
		t.Errorf("got %s, want %s", a, want)
	}
	if b := value(c, "a.b", secret); b != a {
		t.Error("equal values differ under two labels")
	}
	if b := value(c, "instance", secret); b != a {
		t.Error("the second time the value differs")
	}
	if b := value(c, "instance", secret+"0"); b == a {
		t.Error("two values became one")
	}
	if b := value(anonymizer("salt two"), "instance", secret); b == a {
		t.Error("another salt gives the same value")
	}
	if b := value(c, "instance", ""); b != "" {
		t.Errorf("an empty label became %q", b)
	}
	// No value stays, also with many labels and strange bytes.
	for _, v := range []string{"\xff", "\x00", "\n", strings.Repeat("x", 1<<20), "q"} {
		if line, err := cleaned(c, expoRaw("up", 0, 0, "instance", v, "a.b", v)); err != nil || strings.Contains(line, `"`+v) {
			t.Errorf("%.20q: %.200s %v", v, line, err)
		}
	}
}

func TestParseLabelsAndRenames(t *testing.T) {
	labels, err := ParseLabels([]string{"b=1", "a=x=y", "b=2", "c="})
	if err != nil || string(appendLine(nil, []byte("m"), labels)) != `m{a="x=y",b="2",c=""}` {
		t.Errorf("%q %v", labels, err)
	}
	for _, bad := range []string{"", "a", "=x", "1a=x", "a.b=x", "a:b=x", "__a=x", "_id=x", "é=x"} {
		if _, err := ParseLabels([]string{bad}); err == nil {
			t.Errorf("label %q is taken", bad)
		}
	}
	renames, err := ParseRenames([]string{"ALERTS=alerts", "a.b=c", "x=y", "x=x", "x:y=z:w"})
	if err != nil || !maps.Equal(renames, map[string]string{"ALERTS": "alerts", "a.b": "c", "x:y": "z:w"}) {
		t.Errorf("%q %v", renames, err)
	}
	for _, bad := range []string{"", "a", "=x", "a=", "a=b.c", "a=1", "a=b=c"} {
		if _, err := ParseRenames([]string{bad}); err == nil {
			t.Errorf("rename %q is taken", bad)
		}
	}
}

func BenchmarkSelectors(b *testing.B) {
	match := mustSelect(b, `up{job="a"}`, `{job=~"x.*",code!="5"}`, "down").LineMatcherOrNil()
	line := []byte(`a_total{code="7",instance="localhost:9090",job="x",method="get"}`)
	b.ReportAllocs()
	for b.Loop() {
		if !match(line) {
			b.Fatal("the line is not chosen")
		}
	}
}
