package main

// Tests of DecodeFrom: samples, counts and errors are those of Decode, however the body arrives.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// randomReads reads data in pieces of random sizes.
type randomReads struct {
	rng  *rand.Rand
	data []byte
}

func (r *randomReads) Read(p []byte) (int, error) {
	if len(r.data) == 0 {
		return 0, io.EOF
	}
	n := min(len(p), r.rng.IntN(1+r.rng.IntN(len(r.data)+1)))
	copy(p, r.data[:n])
	r.data = r.data[n:]
	return n, nil
}

// decodedFrom is decoded for DecodeFrom. limit is the most bytes that r can have.
func decodedFrom(r io.Reader, limit int, f Format) (samples []string, skipped UnsupportedParts, err error) {
	skipped, err = new(Decoder).DecodeFrom(r, limit, f, appendFormatted(&samples))
	return samples, skipped, err
}

// checkDecodedFrom fails the test unless DecodeFrom has the results of Decode for body, which it reads
// in pieces of random sizes.
func checkDecodedFrom(t *testing.T, body []byte, f Format, seed uint64) {
	t.Helper()
	want, wantSkipped, wantErr := decoded(body, f)
	got, skipped, err := decodedFrom(&randomReads{rand.New(rand.NewPCG(seed, 0)), body}, len(body), f)
	if !slices.Equal(got, want) || skipped != wantSkipped || fmt.Sprint(err) != fmt.Sprint(wantErr) {
		t.Errorf("format %d, body %.500q, seed %d:\n got %.500q, skipped %+v, %.300v\nwant %.500q, skipped %+v, %.300v",
			f, body, seed, got, skipped, err, want, wantSkipped, wantErr)
	}
}

// streamBodies returns bodies of each format: valid ones, and ones that are malformed at their
// beginning, in the middle and at their end.
func streamBodies(t *testing.T) map[Format][][]byte {
	proto := slices.Concat(protoBody(t, gaugeFamily("up", 1, nil, "i", "1"), gaugeFamily("size", 2, nil, "i", "2")),
		pbOne("h", 4, pbLabel("b", "c"), pbBytes(7, pbVarint(1, 5), pbBytes(3, pbFloat(2, 1)), pbVarint(5, 1))))
	bodies := map[Format][][]byte{
		FormatText: {
			[]byte(""), []byte("\n"), []byte("# TYPE a counter\na 1\n\n  \nb{c=\"d\\n}\"} 2 5\n"), []byte("a 1\nb 2"), []byte("a 1\nb{ 2\nc 3\n"), []byte("# EOF\na 1\n"),
		},
		FormatOpenMetrics: {
			[]byte("# TYPE a counter\na_total 1\na_created 2\n# TYPE b gauge\nb_created 3\n# EOF\n"), []byte("a 1\n# EOF"), []byte("a 1\n"), []byte("# EOF\n\n"), []byte("a 1\n# EOF\nb 1"), []byte("a 1\n# EO"),
			[]byte("# TYPE a_b summary\na_b_created 1\na_b_count 2 3.5 # {x=\"y\"} 1\n# EOF\n"),
		},
		FormatProto: {nil, proto, proto[:len(proto)-3], slices.Concat(proto, []byte{0x80, 0x80, 0x80, 0x80, 0x04}), slices.Concat(proto, bytes.Repeat([]byte{0xff}, 20)), slices.Concat([]byte{2, 0x22, 0x7f}, proto)},
	}
	long := "long{x=\"" + strings.Repeat("y", 40_000) + "\"} 1 5\n"
	bodies[FormatText] = append(bodies[FormatText], []byte(strings.Repeat(long, 10)), []byte("# HELP a "+strings.Repeat("z", 3*minStreamBuffer)+"\na 1\n"))
	return bodies
}

// DecodeFrom has the samples, the counts and the error of Decode, however a body is cut, and also if
// a line or a family is longer than the buffer.
func TestDecodeFrom(t *testing.T) {
	big := gaugeFamily("big", 1, nil, "i", strings.Repeat("x", 60_000))
	for range 9 {
		big.Metric = append(big.Metric, big.Metric[0])
	}
	bodies := streamBodies(t)
	bodies[FormatProto] = append(bodies[FormatProto], protoBody(t, big, gaugeFamily("up", 1, nil, "i", "1")))
	// The components repeat more than the first family allows, and less than the body allows.
	histogram := [][]byte{pbLabel("b", strings.Repeat("x", 60_000))}
	buckets := [][]byte{pbVarint(1, 5)}
	for i := range 100 {
		buckets = append(buckets, pbBytes(3, pbVarint(1, uint64(i)), pbFloat(2, float64(i))))
	}
	histogram = append(histogram, pbBytes(7, buckets...))
	repeating := pbOne("h", 4, histogram...)
	for i := range 7 {
		repeating = append(repeating, protoBody(t, gaugeFamily(fmt.Sprint("g", i), 1, nil, "i", strings.Repeat("x", 60_000)))...)
	}
	if samples, _, err := decoded(repeating, FormatProto); err != nil || len(samples) < 100 {
		t.Fatalf("the body has %d samples: %v", len(samples), err)
	}
	bodies[FormatProto] = append(bodies[FormatProto], repeating)
	for seed := range testSeeds(t, 20) {
		for f, list := range bodies {
			for _, body := range list {
				checkDecodedFrom(t, body, f, seed)
			}
		}
	}
	for f, list := range bodies {
		for _, body := range list {
			got, _, err := decodedFrom(iotest.OneByteReader(bytes.NewReader(body)), len(body), f)
			if want, _, wantErr := decoded(body, f); !slices.Equal(got, want) || fmt.Sprint(err) != fmt.Sprint(wantErr) {
				t.Errorf("format %d, body %.100q, read byte by byte: got %.200q, %.200v, want %.200q, %.200v", f, body, got, err, want, wantErr)
			}
		}
	}
}

// The results for a body do not depend on the body that the Decoder decoded before, whole or not.
func TestDecoderIsReusable(t *testing.T) {
	var d Decoder
	for format, list := range streamBodies(t) {
		for _, before := range list {
			for _, body := range list {
				count := func(d *Decoder) string {
					n := 0
					skipped, err := d.Decode(body, format, func(*RawSample) error { n++; return nil })
					return fmt.Sprint(n, skipped, err)
				}
				d.DecodeFrom(bytes.NewReader(before), len(before), format, func(*RawSample) error { return nil })
				if got, want := count(&d), count(&Decoder{}); got != want {
					t.Errorf("format %d, body %.100q after %.100q: got %.300s, want %.300s", format, body, before, got, want)
				}
			}
		}
	}
}

// DecodeFrom refuses a line of text that exceeds the limit, however the body arrives, and does not read
// it to its end.
func TestDecodeFromLongLine(t *testing.T) {
	comment := func(size int) string { return "# " + strings.Repeat("x", size-3) + "\n" }
	for _, f := range []Format{FormatText, FormatOpenMetrics} {
		for _, c := range []struct {
			body string
			err  string
		}{
			{"a 1\n" + comment(maxTextLine) + "b 1\n# EOF\n", ""},
			{"a 1\n" + comment(maxTextLine+1) + "b 1\n# EOF\n", "line 2: too large: a line has more than 1048576 bytes"},
		} {
			for seed := range testSeeds(t, 10) {
				_, _, err := decodedFrom(&randomReads{rand.New(rand.NewPCG(seed, 0)), []byte(c.body)}, len(c.body), f)
				if got := fmt.Sprint(err); err != nil && got != c.err || err == nil && c.err != "" {
					t.Errorf("format %d, seed %d: got the error %v, want %q", f, seed, err, c.err)
				}
			}
		}
		endless := endlessReader("x")
		if _, _, err := decodedFrom(&endless, math.MaxInt, f); !errors.Is(err, ErrTooLarge) {
			t.Errorf("format %d: an endless line gives the error %v, want ErrTooLarge", f, err)
		}
	}
}

// endlessReader repeats its text.
type endlessReader string

func (r endlessReader) Read(p []byte) (n int, err error) {
	for n < len(p) {
		n += copy(p[n:], r)
	}
	return n, nil
}

// DecodeFrom returns an error of the reader as it is, also if the body would be whole without the rest.
func TestDecodeFromReadError(t *testing.T) {
	broken := errors.New("connection lost")
	for f, body := range map[Format]string{FormatText: "a 1\n", FormatOpenMetrics: "a 1\n# EOF\n", FormatProto: ""} {
		if _, _, err := decodedFrom(io.MultiReader(strings.NewReader(body), iotest.ErrReader(broken)), 100, f); err != broken {
			t.Errorf("format %d: got the error %v, want %v", f, err, broken)
		}
	}
}

// Any body, read in pieces of any size, has the results that it has as a whole.
func FuzzDecodeFrom(f *testing.F) {
	for format, bodies := range map[Format][][]byte{
		FormatText:        {[]byte("# TYPE a counter\na 1\nb{c=\"d\\n}\"} 2 5\n")},
		FormatOpenMetrics: {[]byte("# TYPE a counter\na_total 1\na_created 2\n# EOF\n")},
		FormatProto:       {pbOne("a", 2, pbBytes(4, pbVarint(1, 5), pbBytes(3, pbFloat(1, 0.5)))), {0x80, 0x80, 0x80, 0x80, 0x04}},
	} {
		for _, body := range bodies {
			f.Add(body, uint8(format), uint64(1))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte, format uint8, seed uint64) {
		if len(body) > maxTextLine { // Decode has no such limit for a comment
			return
		}
		checkDecodedFrom(t, body, Format(format%3), seed)
	})
}
