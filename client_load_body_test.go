package main

// Tests of the bodies of the load generator: a server's decoder reads each of them, and they are as
// large and as different from each other as promised.

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// Every format and encoding has the same series: nine in a family, each with at least 250 bytes of
// text. Compression makes a body four times smaller or more. A later body has the same series with other
// values and the later time.
func TestLoadBodies(t *testing.T) {
	const series = 100
	for _, c := range []struct {
		format, encoding string
		decoded          Format
	}{
		{LoadText, LoadIdentity, FormatText}, {LoadText, LoadGzip, FormatText}, {LoadText, LoadSnappy, FormatText},
		{LoadProtobuf, LoadIdentity, FormatProto}, {LoadProtobuf, LoadGzip, FormatProto}, {LoadProtobuf, LoadSnappy, FormatProto},
	} {
		bodies := newLoadBodies(series, c.format, c.encoding)
		var lines [2][]string
		var values [2][]float64
		for round := range 2 {
			ms := 1_700_000_000_000 + int64(round)
			var decompressor Decompressor
			body := bodies.next(ms)
			plain, tooLarge, err := decompressor.Decompress(body, c.encoding, 1<<20)
			if err != nil || tooLarge || c.encoding != LoadIdentity && len(body) > len(plain)/4 {
				t.Fatalf("%s %s: %d of %d bytes, too large %v, %v", c.format, c.encoding, len(body), len(plain), tooLarge, err)
			}
			names := map[string]int{}
			var list SampleList
			_, err = new(Decoder).Decode(plain, c.decoded, func(r *RawSample) error {
				names[string(r.Name)]++
				if !r.HasT || r.T != ms {
					t.Errorf("%s %s: a sample has the time %d, want %d", c.format, c.encoding, r.T, ms)
				}
				return list.Add(r)
			})
			if err != nil {
				t.Fatalf("%s %s: %v", c.format, c.encoding, err)
			}
			for _, s := range list.Samples {
				lines[round] = append(lines[round], string(list.Line(s)))
				values[round] = append(values[round], s.V)
				if len(list.Line(s)) < 250 {
					t.Fatalf("a series has %d bytes of text, want at least 250: %s", len(list.Line(s)), list.Line(s))
				}
			}
			if most := (series + 8) / 9; len(names) != most {
				t.Errorf("%s %s: %d families, want %d", c.format, c.encoding, len(names), most)
			}
		}
		seen := map[string]bool{}
		for i := range series {
			if i >= len(lines[0]) || i >= len(lines[1]) || lines[0][i] != lines[1][i] || values[0][i] == values[1][i] || seen[lines[0][i]] {
				t.Fatalf("%s %s: series %d of %d and %d is missing, repeated, or has the same value in both bodies", c.format, c.encoding, i, len(lines[0]), len(lines[1]))
			}
			seen[lines[0][i]] = true
		}
	}
}

// A server decompresses what frameSnappy makes of any input.
func TestFrameSnappy(t *testing.T) {
	seed := testSeed(t, 0)
	rnd := rand.New(rand.NewPCG(seed, 1))
	for i := range 200 {
		in := make([]byte, rnd.IntN(200_000))
		alphabet := 1 + rnd.IntN(256)
		for j := range in {
			in[j] = byte(rnd.IntN(alphabet))
		}
		if i%3 == 0 {
			in = bytes.Repeat(in[:min(len(in), rnd.IntN(5000))], 20)
		}
		out := frameSnappy(in)
		var d Decompressor
		got, tooLarge, err := d.Decompress(out, LoadSnappy, len(in))
		if err != nil || tooLarge || !bytes.Equal(got, in) {
			t.Fatalf("seed %d, input %d of %d bytes: %d bytes, too large %v, %v", seed, i, len(in), len(got), tooLarge, err)
		}
	}
}
