package main

// Tests of SampleList: the lines that Add renders, the series that it refuses, and the limits of a
// list. A random test checks that expfmt's parser can read back every accepted sample.

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
)

// manyLabels returns the names and values of n labels for expoRaw, with the names in descending
// order.
func manyLabels(n int) (pairs []string) {
	for i := range n {
		pairs = append(pairs, fmt.Sprintf("l%03d", n-i), "v")
	}
	return pairs
}

// longestValue is the value of label b in a series a{b="…"} whose line has exactly MaxLine bytes.
var longestValue = strings.Repeat("x", MaxLine-len(`a{b=""}`))

// Add renders a series as its metric name and its labels. The labels are sorted by name. Names
// outside the legacy charset are quoted.
func TestSampleListAdd(t *testing.T) {
	for _, c := range []struct {
		name  string
		pairs []string
		want  string // the rendered line
	}{
		{"up", nil, `up`},
		{"a:b", []string{"c", "d"}, `a:b{c="d"}`},
		{"up", []string{"b", "2", "a", "1", "B", "3", "_", ""}, `up{B="3",_="",a="1",b="2"}`},
		{"a.b", nil, `{"a.b"}`},
		{"a.b", []string{"x", "y"}, `{"a.b",x="y"}`},
		{"9", []string{"9", "y", "a:b", "z"}, `{"9","9"="y","a:b"="z"}`},
		{"a", []string{"x", "\"\\\n\r\t{},=#"}, "a{x=\"\\\"\\\\\\n\r\t{},=#\"}"},
		{"\"\\\n", []string{"\"\\\n", "y"}, `{"\"\\\n","\"\\\n"="y"}`},
		{"é", []string{"世", "界"}, `{"é","世"="界"}`},
		{"a", []string{"b", longestValue}, `a{b="` + longestValue + `"}`},
	} {
		p := expoPush(t, expoRaw(c.name, 1, 2, c.pairs...))
		if got := string(p.Arena); got != c.want {
			t.Errorf("line of %.40q with labels %.40q:\n got %.200s\nwant %.200s", c.name, c.pairs, got, c.want)
		}
	}
	p := expoPush(t, expoRaw("a", 1, 2, manyLabels(MaxLabels)...))
	if _, _, err := new(SeriesParser).ParseCanonicalLine(p.Arena); err != nil {
		t.Errorf("series with %d labels: %v", MaxLabels, err)
	}
}

// Add refuses an invalid series with an error of at most 500 bytes. It then leaves the list
// unchanged and allocates little memory.
func TestSampleListAddRefuses(t *testing.T) {
	for _, c := range []struct {
		name    string
		pairs   []string
		want    string // text that the error must contain
		wrapped error  // ErrTooLarge or ErrNULValue if the error must wrap it, else nil
	}{
		{"", nil, "no metric name", nil},
		{"a", []string{"", "x"}, "empty label name", nil},
		{"a", []string{"b", "1", "c", "3", "b", "2"}, `label "b" occurs twice`, nil},
		{"a", []string{"__name__", "x"}, `label name "__name__" is reserved`, nil},
		{"a", []string{"__", ""}, `label name "__" is reserved`, nil},
		{"\xff", nil, `metric name "\xff" is not UTF-8`, nil},
		{"a", []string{"\xff", "x"}, `label name "\xff" is not UTF-8`, nil},
		{"a", []string{"x", "a\xffb"}, `label value "a\xffb" is not UTF-8`, nil},
		{"a", []string{"x", "\xed\xa0\x80"}, `is not UTF-8`, nil}, // the UTF-8 form of a surrogate, which is not valid UTF-8
		{"a\x00", nil, `metric name "a\x00" has a NUL byte`, nil},
		{"a", []string{"\x00", ""}, `label name "\x00" has a NUL byte`, nil},
		{"a", []string{"x", "\x00"}, `label value "\x00" has a NUL byte`, ErrNULValue},
		{"a", []string{"b", longestValue + "x"}, "too large: the series has 65536 bytes, limit 65535", ErrTooLarge},
		{"a", []string{"b", strings.Repeat("x", 1<<20)}, "too large: the series has 1048578 bytes, limit 65535", ErrTooLarge},
		{"a", manyLabels(MaxLabels + 1), "too large: the series has 129 labels, limit 128", ErrTooLarge},
		{"a", []string{strings.Repeat("x", 300), "", strings.Repeat("x", 300), ""}, "occurs twice", nil},
	} {
		var p SampleList
		err := p.Add(expoRaw(c.name, 1, 2, c.pairs...))
		if err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 500 {
			t.Errorf("adding %.40q with labels %.40q: got error %.600v, want a short one with %q", c.name, c.pairs, err, c.want)
		}
		if len(p.Arena) > 0 || len(p.Samples) > 0 || cap(p.Arena) > 2*MaxLine {
			t.Errorf("adding %.40q with labels %.40q failed: the list has %d samples and %d bytes, %d allocated",
				c.name, c.pairs, len(p.Samples), len(p.Arena), cap(p.Arena))
		}
		for _, sentinel := range []error{ErrTooLarge, ErrNULValue} {
			if got, want := errors.Is(err, sentinel), sentinel == c.wrapped; got != want {
				t.Errorf("adding %.40q with labels %.40q: error %v wraps %q: %v, want %v", c.name, c.pairs, err, sentinel, got, want)
			}
		}
	}
}

// Add fails if the list would get more than MaxSamples samples or more than MaxBytes bytes of
// lines. Reset keeps the limits.
func TestSampleListLimits(t *testing.T) {
	p := &SampleList{MaxSamples: 2}
	for i := range 4 {
		err := p.Add(expoRaw("a", int64(i), 0))
		if (err == nil) != (i < 2) || err != nil && !errors.Is(err, ErrTooLarge) {
			t.Errorf("adding sample %d to a list of at most 2: %v", i+1, err)
		}
	}
	p.Reset()
	p.MaxSamples, p.MaxBytes = 0, 10
	for i := range 4 {
		err := p.Add(expoRaw("abcd", int64(i), 0))
		if (err == nil) != (i < 2) || err != nil && !errors.Is(err, ErrTooLarge) {
			t.Errorf("adding line %d of 4 bytes to a list of at most 10 bytes: %v", i+1, err)
		}
	}
	if len(p.Samples) != 2 || string(p.Line(p.Samples[1])) != "abcd" {
		t.Errorf("a refused sample changed the list: %q %v", p.Arena, p.Samples)
	}
	if p.Reset(); len(p.Samples) != 0 || p.MaxBytes != 10 {
		t.Errorf("after Reset: %d samples, limit of %d bytes; want 0 and 10", len(p.Samples), p.MaxBytes)
	}
}

// Add stores a stale marker, which is a NaN with certain bits, as the usual NaN, because text
// exposition cannot express the difference.
func TestSampleListAddMakesNaNsEqual(t *testing.T) {
	p := expoPush(t, expoRaw("a", 1, math.Float64frombits(0x7ff0000000000002)))
	if got := math.Float64bits(p.Samples[0].V); got != math.Float64bits(math.NaN()) {
		t.Errorf("bits of the NaN: got %x, want %x", got, math.Float64bits(math.NaN()))
	}
}

// All random samples that Add accepts pass expoCheck: they can be written as text exposition and
// read back.
func TestAcceptedSamplesCanBeRead(t *testing.T) {
	rnd := rand.New(rand.NewPCG(testSeed(t, 0), 0))
	added := 0
	for range 300 {
		p := &SampleList{}
		for range 40 {
			if p.Add(expoRandom(rnd)) == nil {
				added++
			}
		}
		expoUnique(p)
		expoCheck(t, p)
	}
	if added < 3000 {
		t.Errorf("only %d of 12,000 random samples were accepted, too few to test anything", added)
	}
}

// AddUnlessRepeated adds the first sample of each series and time. It reports each later one as a
// repetition of the sample or of its time, also if the list is full.
func TestAddUnlessRepeated(t *testing.T) {
	rnd := rand.New(rand.NewPCG(testSeed(t, 0), 0))
	const most = 100
	l := SampleList{MaxSamples: most}
	for range 20 {
		l.Reset()
		type key struct {
			line string
			t    int64
		}
		first := map[key]float64{}
		for range 2000 {
			labels := []string{"a", strconv.Itoa(rnd.IntN(8)), "b", strconv.Itoa(rnd.IntN(3))}
			if rnd.IntN(2) == 0 { // the order of the labels does not matter
				labels = append(labels[2:], labels[:2]...)
			}
			v := float64(rnd.IntN(2))
			if rnd.IntN(10) == 0 {
				v = math.NaN()
			}
			r := expoRaw("m", int64(rnd.IntN(10)), v, labels...)
			var one SampleList
			if err := one.Add(expoRaw("m", r.T, v, labels...)); err != nil {
				t.Fatal(err)
			}
			k := key{string(one.Arena), r.T}
			before := len(l.Arena)
			got, err := l.AddUnlessRepeated(r)
			old, repeated := first[k]
			switch {
			case !repeated && len(first) == most:
				if !errors.Is(err, ErrListTooLarge) || len(l.Arena) != before {
					t.Fatalf("a new sample in a full list: %v, %d bytes more", err, len(l.Arena)-before)
				}
				continue
			case !repeated:
				first[k] = v
				if got != RepeatsNothing || err != nil || l.Samples[len(l.Samples)-1].T != r.T || string(l.Line(l.Samples[len(l.Samples)-1])) != k.line {
					t.Fatalf("the first sample of %v: %v, %v", k, got, err)
				}
				continue
			}
			want := RepeatsTime
			if old == v || old != old && v != v {
				want = RepeatsSample
			}
			if got != want || err != nil || len(l.Arena) != before {
				t.Fatalf("%v with %v after %v: %v, %v, %d bytes more; want %v", k, v, old, got, err, len(l.Arena)-before, want)
			}
		}
		if len(l.Samples) != most {
			t.Fatalf("the list has %d samples, want %d", len(l.Samples), most)
		}
	}
}

// BenchmarkSampleListAdd adds a sample with five labels to an empty list.
func BenchmarkSampleListAdd(b *testing.B) {
	r := expoRaw("http_requests_total", 1, 2, "_id", "site-7", "code", "200", "handler", "/api/v1/query", "instance", "localhost:9090", "job", "prometheus")
	var p SampleList
	b.ReportAllocs()
	for b.Loop() {
		p.Reset()
		if err := p.Add(r); err != nil {
			b.Fatal(err)
		}
	}
}
