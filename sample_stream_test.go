package main

// Tests of DecodeFrom: samples, counts and errors are those of Decode, however the body arrives.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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

// decodedFrom is decoded for DecodeFrom.
func decodedFrom(r io.Reader, f Format) (samples []string, skipped UnsupportedParts, err error) {
	var p SampleList
	skipped, err = new(Decoder).DecodeFrom(r, f, func(r *RawSample) error {
		if err := p.Add(r); err != nil {
			return err
		}
		s := p.Samples[len(p.Samples)-1]
		at := "-"
		if r.HasT {
			at = fmt.Sprint(r.T)
		}
		samples = append(samples, fmt.Sprintf("%s %v %s", p.Line(s), s.V, at))
		return nil
	})
	return samples, skipped, err
}

// checkDecodedFrom fails the test unless DecodeFrom has the results of Decode for body, which it reads
// in pieces of random sizes.
func checkDecodedFrom(t *testing.T, body []byte, f Format, seed uint64) {
	t.Helper()
	want, wantSkipped, wantErr := decoded(body, f)
	got, skipped, err := decodedFrom(&randomReads{rand.New(rand.NewPCG(seed, 0)), body}, f)
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
	for seed := range testSeeds(t, 20) {
		for f, list := range bodies {
			for _, body := range list {
				checkDecodedFrom(t, body, f, seed)
			}
		}
	}
	for f, list := range bodies {
		for _, body := range list {
			got, _, err := decodedFrom(iotest.OneByteReader(bytes.NewReader(body)), f)
			if want, _, wantErr := decoded(body, f); !slices.Equal(got, want) || fmt.Sprint(err) != fmt.Sprint(wantErr) {
				t.Errorf("format %d, body %.100q, read byte by byte: got %.200q, %.200v, want %.200q, %.200v", f, body, got, err, want, wantErr)
			}
		}
	}
}

// What a Decoder decoded before, whole or not, changes nothing in the results of the next body.
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
				d.DecodeFrom(bytes.NewReader(before), format, func(*RawSample) error { return nil })
				if got, want := count(&d), count(&Decoder{}); got != want {
					t.Errorf("format %d, body %.100q after %.100q: got %.300s, want %.300s", format, body, before, got, want)
				}
			}
		}
	}
}

// DecodeFrom returns an error of the reader as it is, also if the body would be whole without the rest.
func TestDecodeFromReadError(t *testing.T) {
	broken := errors.New("connection lost")
	for f, body := range map[Format]string{FormatText: "a 1\n", FormatOpenMetrics: "a 1\n# EOF\n", FormatProto: ""} {
		if _, _, err := decodedFrom(io.MultiReader(strings.NewReader(body), iotest.ErrReader(broken)), f); err != broken {
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
		// A body that repeats more labels than it may by its beginning is refused earlier if it is read
		// in pieces. Only a body above 16 KB can do so.
		if len(body) > 16<<10 {
			return
		}
		checkDecodedFrom(t, body, Format(format%3), seed)
	})
}
