package main

// Tests of ServerNormalizer and ClientCleaner: forced labels, dropped samples, reserved names, and
// anonymized labels, whose original values must never leave the client.

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// Normalize gives every sample that it accepts the forced labels and the labels job and instance.
// Before that, it removes the sample's own empty labels and labels in Elide. It drops samples that
// lack a required label or match no Allow selector. It returns an error for the server's own metric
// names.
func TestNormalizer(t *testing.T) {
	n := &ServerNormalizer{
		Elide:    []string{"replica", "instance"},
		Labels:   []Label{{[]byte("region"), []byte("eu")}, {[]byte("tier"), []byte("operator")}},
		Required: []Label{{[]byte("env"), nil}, {[]byte("tier"), []byte("token")}},
		Allow:    mustSelect(t, `up{_id="site",region="eu"}`, `{"a.b"}`, "push_time", "telemeter_cluster", "push_time_seconds2", "many"),
	}
	use := n.NewUse()
	forced := n.ForcedLabels("site", map[string]string{"tier": "token", "_id": "forged", "note": ""})
	for _, c := range []struct {
		r    *RawSample
		line string // the line of the normalized sample; "" if Normalize drops or refuses it
		drop string // the reason that Normalize must return; "error" if it must return an error
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
		{expoRaw("push.time.seconds", 0, 0, "env", "p"), "", "error"}, // escaping with underscores makes the name push_time_seconds
		{expoRaw("telemeter_cluster.x", 0, 0), "", "error"},
		{expoRaw("telemeter.cluster\n"+strings.Repeat("x", 5000), 0, 0), "", "error"},
		{expoRaw("telemeter_cluster", 0, 0, "env", "p"), `telemeter_cluster{_id="site",env="p",instance="",job="",note="",region="eu",tier="token"}`, ""},
		{expoRaw("push_time_seconds2", 0, 0, "env", "p"), `push_time_seconds2{_id="site",env="p",instance="",job="",note="",region="eu",tier="token"}`, ""},
	} {
		shown := string(appendLine(nil, c.r.Name, c.r.Labels))
		drop, err := n.Normalize(c.r, forced, &use)
		if err != nil {
			drop = "error"
			if len(err.Error()) > 500 || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "reserved") {
				t.Errorf("normalizing %.60s: got error %.600q, want a short one that says the name is reserved", shown, err)
			}
		}
		var p SampleList
		if drop == "" {
			if err := p.Add(c.r); err != nil {
				t.Errorf("adding the normalized %s: %v", shown, err)
			}
		}
		if drop != c.drop || string(p.Arena) != c.line {
			t.Errorf("normalizing %.60s:\n got line %s, drop reason %q\nwant line %s, drop reason %q", shown, p.Arena, drop, c.line, c.drop)
		}
	}
	if string(forced[0].Name) != ClusterLabel || string(forced[0].Value) != "site" || len(n.Labels) != 2 {
		t.Errorf("forced labels: got %q, want %s=site first", forced, ClusterLabel)
	}
}

// Normalize reports which rules a sample matches, also if it drops the sample, and also the selectors
// after the first that matches.
func TestNormalizerUse(t *testing.T) {
	n := &ServerNormalizer{
		Elide: []string{"replica", "region"}, Labels: []Label{{[]byte("region"), []byte("eu")}},
		Required: []Label{{[]byte("env"), nil}, {[]byte("tier"), []byte("gold")}, {[]byte("region"), nil}},
		Allow:    mustSelect(t, "up", `{env="p"}`, "down"),
	}
	for _, c := range []struct {
		r    *RawSample
		want string
	}{
		{expoRaw("a", 0, 0), "{[false false] [false false true] [false false false]}"},
		{expoRaw("up", 0, 0, "replica", "", "tier", "gold"), "{[false false] [false true true] [true false false]}"},
		{expoRaw("up", 0, 0, "region", "us", "env", "p"), "{[false true] [true false true] [true true false]}"},
	} {
		use := n.NewUse()
		line := string(appendLine(nil, c.r.Name, c.r.Labels))
		if _, err := n.Normalize(c.r, n.ForcedLabels("site", nil), &use); err != nil || fmt.Sprint(use) != c.want {
			t.Errorf("%s: got %v and the error %v, want %s", line, use, err, c.want)
		}
	}
}

// Normalize and Clean do not report a label that occurs twice. SampleList.Add then refuses the
// sample.
func TestDuplicateLabelsAreRefused(t *testing.T) {
	var n ServerNormalizer
	use := n.NewUse()
	r := expoRaw("a", 0, 0, "b", "1", "b", "2")
	if drop, err := n.Normalize(r, n.ForcedLabels("site", nil), &use); drop != "" || err != nil {
		t.Errorf("normalizing a sample with a duplicate label: drop reason %q, %v", drop, err)
	} else if err := new(SampleList).Add(r); err == nil {
		t.Error("Add accepts a normalized sample with a duplicate label")
	}
	if _, err := cleaned(&ClientCleaner{}, expoRaw("a", 0, 0, "b", "1", "b", "2")); err == nil {
		t.Error("Add accepts a cleaned sample with a duplicate label")
	}
}

// Normalize does not change the list of forced labels or the memory behind it, because all samples
// of a push share the list.
func TestNormalizerLeavesForcedLabels(t *testing.T) {
	var n ServerNormalizer
	use := n.NewUse()
	forced := slices.Grow(n.ForcedLabels("site", map[string]string{"z": "1"}), 10)
	want := fmt.Sprintf("%q", forced)
	for range 3 {
		r := &RawSample{Name: []byte("a")} // the sample has no labels, so that a careless append could return the memory of forced
		if _, err := n.Normalize(r, forced, &use); err != nil {
			t.Fatal(err)
		}
		if err := new(SampleList).Add(r); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%q", forced); got != want || fmt.Sprintf("%q", forced[:cap(forced)][len(forced)]) != `{"" ""}` {
			t.Fatalf("forced labels after normalizing a sample: got %s, want %s", got, want)
		}
	}
}

// cleaned cleans a sample with c. It returns the rendered line, or the reason why Clean drops the
// sample.
func cleaned(c *ClientCleaner, r *RawSample) (string, error) {
	if drop := c.Clean(r); drop != "" {
		return drop, nil
	}
	var p SampleList
	err := p.Add(r)
	return string(p.Arena), err
}

// Clean drops samples that match no Match selector, and samples whose name, after renaming, is
// reserved for the server. It renames metrics, removes empty labels and adds the operator's labels.
func TestCleaner(t *testing.T) {
	c := &ClientCleaner{
		Match:  mustSelect(t, `{secret!="x",__name__!~"unwanted|"}`, "ALERTS", `{"rename.to.reserved"}`, "push_time_seconds"),
		Rename: map[string]string{"ALERTS": "alerts", "rename.to.reserved": "push_time_seconds"},
		Labels: []Label{{[]byte("site"), []byte("s")}, {[]byte("added"), []byte("a")}},
	}
	for _, k := range []struct {
		r    *RawSample
		want string // the rendered line, or the reason why Clean drops the sample
	}{
		{expoRaw("up", 0, 0, "b", "1"), `up{added="a",b="1",site="s"}`},
		{expoRaw("up", 0, 0, "site", "theirs", "empty", ""), `up{added="a",site="s"}`},
		{expoRaw("ALERTS", 0, 0, "alertname", "x"), `alerts{added="a",alertname="x",site="s"}`},
		{expoRaw("unwanted", 0, 0), DropNotMatched},
		{expoRaw("push_time_seconds", 0, 0), DropReserved},
		{expoRaw("push-time-seconds", 0, 0, "a", "b"), DropReserved},
		{expoRaw("rename.to.reserved", 0, 0), DropReserved},
	} {
		shown := string(appendLine(nil, k.r.Name, k.r.Labels))
		if got, err := cleaned(c, k.r); err != nil || got != k.want {
			t.Errorf("cleaning %s: got %s (%v), want %s", shown, got, err, k.want)
		}
	}
}

// Clean removes the labels in Elide before it anonymizes others, also if they are to be anonymized. A
// label of the operator stays, and replaces the one that the sample has. Only the labels with the very
// names in Elide are removed.
func TestCleanerElides(t *testing.T) {
	c := testAnonymizer(t, cleanerSalt)
	c.Elide = []string{"replica", "instance", "site"}
	c.Labels = []Label{{[]byte("site"), []byte("s")}}
	for _, tt := range []struct {
		labels []string
		want   string
	}{
		{nil, `up{site="s"}`},
		{[]string{"replica", "r"}, `up{site="s"}`},
		{[]string{"replica", "r", "job", "j"}, `up{job="j",site="s"}`},
		{[]string{"replica", "", "job", "j"}, `up{job="j",site="s"}`},
		{[]string{"instance", "secret", "replica2", "x", "Replica", "y"}, `up{Replica="y",replica2="x",site="s"}`},
		{[]string{"site", "theirs"}, `up{site="s"}`},
	} {
		if got, err := cleaned(c, expoRaw("up", 0, 0, tt.labels...)); err != nil || got != tt.want {
			t.Errorf("%q: got %s (%v), want %s", tt.labels, got, err, tt.want)
		}
	}
	// A selector sees the labels before they are removed.
	c = &ClientCleaner{Match: mustSelect(t, `up{replica="r"}`), Elide: []string{"replica"}}
	for replica, want := range map[string]string{"r": "up", "s": DropNotMatched} {
		if got, err := cleaned(c, expoRaw("up", 0, 0, "replica", replica)); err != nil || got != want {
			t.Errorf("replica %s: got %s (%v), want %s", replica, got, err, want)
		}
	}
}

const cleanerSalt = "salt one, of 32 bytes or so....."

// testAnonymizer returns a ClientCleaner that anonymizes the labels instance and a.b with this
// salt.
func testAnonymizer(t *testing.T, salt string) *ClientCleaner {
	t.Helper()
	c := &ClientCleaner{Match: mustSelect(t, `{__name__=~".+"}`), Anonymize: []string{"instance", "a.b", "absent"}}
	c.SetSalt([]byte(salt))
	return c
}

// anonymized cleans a sample whose label has the value v, and returns the label's anonymized value.
// It fails the test if the line contains v, if the label job changed, or if Clean overwrote the
// memory of v.
func anonymized(t *testing.T, c *ClientCleaner, label, v string) string {
	t.Helper()
	r := expoRaw("up", 0, 0, "job", "j", label, v)
	source := r.Labels[1].Value
	line, err := cleaned(c, r)
	if err != nil || v != "" && strings.Contains(line, v) || string(source) != v {
		t.Fatalf("anonymizing label %s of value %q: got %s, %v; the memory of the value is now %q", label, v, line, err, source)
	}
	_, labels, err := new(SeriesParser).ParseCanonicalLine([]byte(line))
	if err != nil || string(labelValue(labels, "job")) != "j" {
		t.Fatalf("anonymizing label %s changed label job: %s, %v", label, line, err)
	}
	return string(labelValue(labels, label))
}

// An anonymized value is the HMAC-SHA256 of the value under the salt, of which the first 16 bytes
// are written in base64. This must not change between releases, because the labels of existing
// series would change.
func TestCleanerAnonymizes(t *testing.T) {
	const secret = "db-7.internal.example"
	mac := hmac.New(sha256.New, []byte(cleanerSalt))
	mac.Write([]byte(secret))
	want := base64.RawURLEncoding.EncodeToString(mac.Sum(nil)[:16])
	c := testAnonymizer(t, cleanerSalt)
	for _, label := range []string{"instance", "a.b", "instance"} {
		if got := anonymized(t, c, label, secret); got != want || len(got) != 22 {
			t.Errorf("anonymized value of label %s: got %s, want %s", label, got, want)
		}
	}
	if got := anonymized(t, c, "instance", secret+"0"); got == want {
		t.Error("two different values are anonymized to the same value")
	}
	if got := anonymized(t, testAnonymizer(t, "salt two"), "instance", secret); got == want {
		t.Error("a value is anonymized to the same value under two salts")
	}
	if got := anonymized(t, c, "instance", ""); got != "" {
		t.Errorf("anonymized value of an empty label: got %q, want an empty one", got)
	}
}

// Clean replaces the values of all labels to anonymize, whatever bytes the values contain and
// however long they are.
func TestCleanerAnonymizesAnyValue(t *testing.T) {
	c := testAnonymizer(t, cleanerSalt)
	for _, v := range []string{"\xff", "\x00", "\n", strings.Repeat("x", 1<<20), "q"} {
		if line, err := cleaned(c, expoRaw("up", 0, 0, "instance", v, "a.b", v)); err != nil || strings.Contains(line, `"`+v) {
			t.Errorf("anonymizing value %.20q: got %.200s, %v", v, line, err)
		}
	}
}

// ParseLabels sorts labels by name. If a name is repeated, it uses the last value. It refuses
// labels that an operator must not set.
func TestParseLabels(t *testing.T) {
	labels, err := ParseLabels([]string{"b=1", "a=x=y", "b=2", "c="})
	if err != nil || string(appendLine(nil, []byte("m"), labels)) != `m{a="x=y",b="2",c=""}` {
		t.Errorf("parsed labels: got %q, %v", labels, err)
	}
	for _, bad := range []string{"", "a", "=x", "1a=x", "a.b=x", "a:b=x", "__a=x", "_id=x", "é=x"} {
		if _, err := ParseLabels([]string{bad}); err == nil {
			t.Errorf("label %q is accepted", bad)
		}
	}
}

// If a metric is renamed repeatedly, ParseRenames uses the last new name. If that is the old name,
// the metric is not renamed. ParseRenames refuses new names outside the legacy charset.
func TestParseRenames(t *testing.T) {
	renames, err := ParseRenames([]string{"ALERTS=alerts", "a.b=c", "x=y", "x=x", "x:y=z:w"})
	if err != nil || !maps.Equal(renames, map[string]string{"ALERTS": "alerts", "a.b": "c", "x:y": "z:w"}) {
		t.Errorf("parsed renames: got %q, %v", renames, err)
	}
	for _, bad := range []string{"", "a", "=x", "a=", "a=b.c", "a=1", "a=b=c"} {
		if _, err := ParseRenames([]string{bad}); err == nil {
			t.Errorf("rename %q is accepted", bad)
		}
	}
}

// A ClientCleaner remembers a bounded number of hashes of short values, and no hash of a long value.
// Equal values have equal hashes, whether they are remembered or not.
func TestCleanRemembersFewHashes(t *testing.T) {
	c := ClientCleaner{Anonymize: []string{"a"}}
	c.SetSalt([]byte("0123456789abcdef"))
	hashOf := func(value string) string {
		r := RawSample{Name: []byte("m"), Labels: []Label{{[]byte("a"), []byte(value)}}}
		if drop := c.Clean(&r); drop != "" {
			t.Fatalf("the sample is dropped as %s", drop)
		}
		return string(r.Labels[0].Value)
	}
	long := strings.Repeat("x", maxHashedValue+1)
	first, second, ofLong := hashOf("0"), hashOf("1"), hashOf(long)
	if len(c.hashed) != 2 {
		t.Errorf("the cleaner remembers %d hashes, want those of the 2 short values", len(c.hashed))
	}
	for i := range 2*maxHashed + 100 {
		hashOf(fmt.Sprint(i))
		if len(c.hashed) > maxHashed {
			t.Fatalf("the cleaner remembers %d hashes, want at most %d", len(c.hashed), maxHashed)
		}
	}
	if got := []string{hashOf("0"), hashOf("1"), hashOf("1"), hashOf(long)}; !slices.Equal(got, []string{first, second, second, ofLong}) {
		t.Errorf("got the hashes %q, want %q as before", got, []string{first, second, second, ofLong})
	}
}
