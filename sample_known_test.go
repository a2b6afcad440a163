package main

// Tests of known series without a server: bodies of bytes that no encoder would write, limits, and
// what a push of the site makes known.

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// knownDecoder decodes bodies with known series. It gives IDs to lines as a store does.
type knownDecoder struct {
	known KnownSeries
	push  KnownPush
	ids   map[string]uint32
	lines []string // by ID
}

// decode decodes a body and then makes its series known. It returns a text of each sample and of
// all counts. Series whose name begins with d are dropped.
func (k *knownDecoder) decode(body []byte, f Format, limit int) (string, error) {
	var d Decoder
	var out []string
	p := SampleList{MaxSamples: 1000}
	k.push.Reset(&k.known, &p, 5)
	p.WantSeriesIDs = true
	received, dropped, repeats := 0, 0, [RepeatsTime + 1]int{}
	skipped, err := d.DecodeKnown(body, f, &k.push, func(r *RawSample) error {
		received++
		if strings.HasPrefix(string(r.Name), "d") {
			dropped++
			r.DropCode = 1
			return nil
		}
		if !r.HasT {
			r.T = 5
		}
		repeat, err := p.AddUnlessRepeated(r)
		if err == nil {
			repeats[repeat]++
		}
		return err
	})
	if err != nil {
		return "", err
	}
	if k.ids == nil {
		k.ids = map[string]uint32{}
	}
	for _, s := range p.Samples {
		id, ok := s.KnownID()
		if !ok {
			line := string(p.Line(s))
			if id, ok = k.ids[line]; !ok {
				id = uint32(len(k.lines))
				k.ids[line], k.lines = id, append(k.lines, line)
			} else if p.HasKnown(id) {
				return "", ErrDecodeAgain
			}
		}
		p.SeriesIDs = append(p.SeriesIDs, id)
		out = append(out, fmt.Sprintf("%s %d %x", k.lines[id], s.T, math.Float64bits(s.V)))
	}
	for i, n := range k.push.Repetitions {
		repeats[i] += n
	}
	out = append(out, fmt.Sprint(received+k.push.Received, dropped+k.push.Dropped[1], repeats, skipped))
	k.push.Learn(limit)
	return strings.Join(out, "\n"), nil
}

// checkKnown checks that a body has the same samples when its series are known as when they are
// decoded.
func checkKnown(t *testing.T, body []byte, f Format) {
	t.Helper()
	var k knownDecoder
	want, err := k.decode(body, f, 1000)
	if err != nil {
		return
	}
	for range 2 {
		got, err := k.decode(body, f, 1000)
		if errors.Is(err, ErrDecodeAgain) {
			return
		}
		if err != nil || got != want {
			t.Fatalf("body %q\nwith known series: %s, %v\nwith decoded series: %s", body, got, err, want)
		}
	}
}

// Samples of known series are recognized in the order of the push before, in another order, and if
// the site sends its series in turns. At most as many series become known as the limit says.
func TestKnownSeriesOrder(t *testing.T) {
	var k knownDecoder
	for i, step := range []struct {
		names string
		known int // samples of known series
		limit int
	}{
		{"a b c", 0, 9}, {"a b c", 3, 9}, {"c a b", 3, 9}, {"b", 1, 9}, {"a x c", 2, 9}, {"b x", 2, 9},
		{"e f", 0, 9}, {"a b c x", 4, 9}, {"e f", 2, 9}, {"a a a", 3, 9},
		{"g h i", 0, 4}, {"g h i", 3, 4}, {"a b e f", 1, 9}, {"d1 d2", 0, 9}, {"d2 d1 a", 3, 9},
	} {
		var body string
		for j, name := range strings.Fields(step.names) {
			body += fmt.Sprintf("%s{l=\"v\"} 1 %d\n", name, 1000*i+j)
		}
		got, err := k.decode([]byte(body), FormatText, step.limit)
		if err != nil || k.push.Received != step.known {
			t.Errorf("step %d: %d samples are of known series, want %d; %v, %s", i, k.push.Received, step.known, err, got)
		}
		if k.known.Len() > step.limit {
			t.Errorf("step %d: %d series are known, want at most %d", i, k.known.Len(), step.limit)
		}
	}
}

// A sample of a known series that cannot be counted exactly makes the decoder return ErrDecodeAgain.
func TestKnownSeriesDecodeAgain(t *testing.T) {
	for _, c := range []struct {
		name, body string
		want       error
	}{
		{"later", "a 1 10\na 1 11\n", nil}, {"repeated", "a 1 10\na 1 10\na 2 10\n", nil}, {"earlier", "a 1 10\na 1 9\n", ErrDecodeAgain},
		{"also with its line", "a 1 10\na  1 10\n", ErrDecodeAgain}, {"too many", strings.Repeat("a 1\n", 1000), nil},
		{"more samples than the list may have", func() (b string) {
			for i := range 1001 {
				b += fmt.Sprintf("a 1 %d\n", i)
			}
			return b
		}(), ErrDecodeAgain},
	} {
		var k knownDecoder
		if _, err := k.decode([]byte("a 1\n"), FormatText, 10); err != nil {
			t.Fatal(err)
		}
		if _, err := k.decode([]byte(c.body), FormatText, 10); !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", c.name, err, c.want)
		}
	}
}

// A Metric message whose length field exceeds the message does not have the plain form, also if the
// length is as large as an int of 32 bits can be.
func TestSplitMetricLengths(t *testing.T) {
	pair := pbBytes(1, make([]byte, 40))
	for _, c := range []struct {
		name   string
		labels []byte
		want   bool
	}{
		{"short", pair, true},
		{"two bytes of length", pbBytes(1, make([]byte, 300)), true},
		{"2^31-1", append([]byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0x07}, make([]byte, 40)...), false},
		{"2^31-1 after a label", append(append(slices.Clone(pair), 0x0a, 0xff, 0xff, 0xff, 0xff, 0x07), make([]byte, 40)...), false},
		{"2^32", append([]byte{0x0a, 0x80, 0x80, 0x80, 0x80, 0x10}, make([]byte, 40)...), false},
		{"2^64-1", append([]byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}, make([]byte, 40)...), false},
		{"as long as the message", append([]byte{0x0a, 0xb9, 0x00}, make([]byte, 40)...), false},
	} {
		var m plainMetric
		if got := m.split(append(slices.Clone(c.labels), pbBytes(3, pbFloat(1, 5))...), 3<<3|2); got != c.want {
			t.Errorf("%s: the form is plain: %t, want %t", c.name, got, c.want)
		}
	}
}

// parseFloat returns the same as strconv.ParseFloat for short decimal numbers, which it parses itself.
func TestParseShortDecimal(t *testing.T) {
	rng := rand.New(rand.NewPCG(testSeed(t, 0), 0))
	texts := []string{"0", "-0", "-", ".", "-.", "5.", ".5", "-.5", "1.5.2", "00012", "123456789012345", "1234567890123456", "0.000000000000001", "-99999999999.9999"}
	for range 20_000 {
		b := strconv.AppendInt(nil, rng.Int64N(int64(math.Pow10(1+rng.IntN(17)))), 10)
		if at := rng.IntN(2 * len(b)); at <= len(b) {
			b = slices.Insert(b, at, '.')
		}
		texts = append(texts, string(b), "-"+string(b))
	}
	for _, text := range texts {
		want, wantErr := strconv.ParseFloat(text, 64)
		got, err := parseFloat([]byte(text))
		if (err == nil) != (wantErr == nil) || err == nil && math.Float64bits(got) != math.Float64bits(want) {
			t.Errorf("%q: got %v, %v; want %v, %v", text, got, err, want, wantErr)
		}
	}
}
