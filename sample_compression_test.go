package main

// Tests of decompression: intact streams, incomplete and damaged streams, and streams that expand
// beyond the limit. Snappy streams come from a small encoder in this file, which follows
// framing_format.txt and format_description.txt of google/snappy.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// The identity encoding returns the body itself and reports a body over the limit.
func TestDecompressIdentity(t *testing.T) {
	var d Decompressor
	for _, encoding := range []string{"", "identity"} {
		if got, over, err := d.Decompress([]byte("abc"), encoding, 3); string(got) != "abc" || over || err != nil {
			t.Errorf("encoding %q: got %q, over the limit %v, %v", encoding, got, over, err)
		}
		if _, over, err := d.Decompress([]byte("abcd"), encoding, 3); !over || err != nil {
			t.Errorf("encoding %q, 4 bytes with a limit of 3: over the limit %v, %v", encoding, over, err)
		}
	}
}

// SupportsEncoding accepts the names of identity, gzip and framed snappy in lower case, and no
// other name.
func TestSupportsEncoding(t *testing.T) {
	for encoding, want := range map[string]bool{"": true, "identity": true, "gzip": true, "snappy": true, "x-snappy-framed": true,
		"deflate": false, "br": false, "zstd": false, "GZIP": false, "gzip, gzip": false, " ": false} {
		if got := SupportsEncoding(encoding); got != want {
			t.Errorf("encoding %q supported: got %v, want %v", encoding, got, want)
		}
	}
}

// Decompress accepts only complete gzip streams and reports streams that expand beyond the limit.
// An error does not affect later calls.
func TestDecompressGzip(t *testing.T) {
	data := []byte(strings.Repeat("up{job=\"a\"} 1\n", 5000))
	whole := gzipped(data)
	two := slices.Concat(gzipped(data[:100]), gzipped(nil), gzipped(data[100:]))
	flipped := slices.Clone(whole)
	flipped[len(flipped)-6] ^= 1
	for _, c := range []struct {
		name  string
		in    []byte
		limit int
		want  string // "ok" for the decoded data, "over" for a result over the limit, or "error"
	}{
		{"complete stream", whole, len(data), "ok"},
		{"several members", two, len(data), "ok"},
		{"one byte over the limit", whole, len(data) - 1, "over"},
		{"several members, one byte over the limit", two, len(data) - 1, "over"},
		{"limit of 0", whole, 0, "over"},
		{"empty", nil, len(data), "error"},
		{"not gzip", data, len(data), "error"},
		{"snappy", snappyIdentifier, len(data), "error"},
		{"followed by garbage", append(slices.Clip(whole), "garbage"...), len(data), "error"},
		{"followed by zeros", append(slices.Clip(whole), make([]byte, 20)...), len(data), "error"},
		{"wrong checksum", flipped, len(data), "error"},
	} {
		var d Decompressor
		got, over, err := d.Decompress(c.in, "gzip", c.limit)
		if (err != nil) != (c.want == "error") || over != (c.want == "over") || c.want == "ok" && !bytes.Equal(got, data) {
			t.Errorf("%s: got %d bytes, over the limit %v, error %v; want %s", c.name, len(got), over, err, c.want)
		}
	}
	var d Decompressor // one Decompressor for all calls, because an error must not affect later calls
	for i := range whole {
		if _, over, err := d.Decompress(whole[:i], "gzip", len(data)); err == nil || over {
			t.Errorf("first %d of %d bytes: over the limit %v, error %v", i, len(whole), over, err)
		}
	}
	if got, over, err := d.Decompress(whole, "gzip", len(data)); !bytes.Equal(got, data) || over || err != nil {
		t.Errorf("complete stream after errors: %d bytes, over the limit %v, %v", len(got), over, err)
	}
}

// Decompress reports a small stream that expands to many megabytes as too large. It allocates at
// most 8 times the limit for that.
func TestDecompressBombs(t *testing.T) {
	const limit = 128 << 10
	bomb := gzipped(make([]byte, 16<<20))
	var frames []byte
	frame := snappyChunk(0, make([]byte, 64<<10), snappyCopies(64<<10))
	for range 1000 {
		frames = append(frames, frame...)
	}
	for encoding, in := range map[string][]byte{"gzip": bomb, "snappy": append(slices.Clip(snappyIdentifier), frames...)} {
		var over bool
		var err error
		used := allocated(func() {
			var d Decompressor
			_, over, err = d.Decompress(in, encoding, limit)
		})
		// The output buffer grows in steps, so that all buffers together are larger than the limit.
		if !over || err != nil || used > 8*limit {
			t.Errorf("%s: over the limit %v, %v; %d bytes allocated with a limit of %d", encoding, over, err, used, limit)
		}
	}
}

// dribble is a reader that returns its data one byte at a time, and then err.
type dribble struct {
	data string
	err  error
}

func (d *dribble) Read(p []byte) (int, error) {
	if d.data == "" {
		return 0, d.err
	}
	p[0] = d.data[0]
	d.data = d.data[1:]
	return 1, nil
}

// ReadAllInto reads a reader to its end and reuses the buffer's memory. If the reader fails,
// ReadAllInto returns the bytes read before the error, and the error.
func TestReadAllInto(t *testing.T) {
	buf := []byte("old contents")
	got, err := ReadAllInto(buf, &dribble{strings.Repeat("abc", 1000), io.EOF})
	if err != nil || string(got) != strings.Repeat("abc", 1000) {
		t.Errorf("reading 3,000 bytes one by one: got %d bytes, %v", len(got), err)
	}
	again, err := ReadAllInto(got, strings.NewReader("xy"))
	if err != nil || string(again) != "xy" || &again[0] != &got[0] {
		t.Errorf("reading into a buffer again: %q, %v, memory reused %v", again, err, &again[0] == &got[0])
	}
	if got, err := ReadAllInto(nil, &dribble{"abc", io.ErrUnexpectedEOF}); !errors.Is(err, io.ErrUnexpectedEOF) || string(got) != "abc" {
		t.Errorf("reading abc and then an error: got %q, %v", got, err)
	}
}

// snappyIdentifier is the chunk with which every framed snappy stream begins.
var snappyIdentifier = []byte("\xff\x06\x00\x00sNaPpY")

// snappyChunk returns a chunk of framed snappy with this payload and with the checksum of data. The
// chunk is valid if the payload decodes to data.
func snappyChunk(kind byte, data, payload []byte) []byte {
	crc := crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))
	b := binary.LittleEndian.AppendUint32(nil, uint32(4+len(payload))<<8|uint32(kind))
	return append(binary.LittleEndian.AppendUint32(b, (crc>>15|crc<<17)+0xa282ead8), payload...)
}

// snappyBlock returns a snappy block of these elements. n is the decoded length in bytes that the
// block states.
func snappyBlock(n int, elements ...[]byte) []byte {
	return append(binary.AppendUvarint(nil, uint64(n)), bytes.Join(elements, nil)...)
}

// snappyLiteral returns a literal element with the bytes of s. extra is the number of bytes after
// the tag that encode the length, 0 to 4.
func snappyLiteral(s string, extra int) []byte {
	n := len(s) - 1
	if extra == 0 {
		return append([]byte{byte(n) << 2}, s...)
	}
	b := binary.LittleEndian.AppendUint32([]byte{byte(59+extra) << 2}, uint32(n))
	return append(b[:1+extra], s...)
}

// snappyCopy returns a copy element, which repeats length decoded bytes that begin offset bytes
// back. The kinds 1, 2 and 3 encode the offset in 11, 16 and 32 bits; math.MinInt32 has the bits of 1<<31.
func snappyCopy(kind, offset, length int) []byte {
	switch kind {
	case 1:
		return []byte{byte(offset>>8<<5 | (length-4)<<2 | 1), byte(offset)}
	case 2:
		return binary.LittleEndian.AppendUint16([]byte{byte((length-1)<<2 | 2)}, uint16(offset))
	}
	return binary.LittleEndian.AppendUint32([]byte{byte((length-1)<<2 | 3)}, uint32(offset))
}

// snappyCopies returns a block that decodes to n zero bytes. n must be a multiple of 64.
func snappyCopies(n int) []byte {
	b := snappyBlock(n, snappyLiteral("\x00", 0), snappyCopy(2, 1, 63))
	for range n/64 - 1 {
		b = append(b, snappyCopy(2, 64, 64)...)
	}
	return b
}

// snappyEncode returns data as a framed snappy stream. It chooses chunks and elements at random, so
// that every kind of chunk and element can occur. It does not try to compress well.
func snappyEncode(data []byte, rnd *rand.Rand) []byte {
	out := slices.Clone(snappyIdentifier)
	for len(data) > 0 {
		n := 1 + rnd.IntN(min(len(data), 64<<10))
		part := data[:n]
		data = data[n:]
		switch rnd.IntN(4) {
		case 0:
			out = append(out, snappyChunk(1, part, part)...)
			continue
		case 1:
			out = append(out, 0x80+byte(rnd.IntN(0x7f)), 3, 0, 0, 'p', 'a', 'd')
		}
		var elements []byte
		for i := 0; i < n; {
			if i > 0 {
				offset := 1 + rnd.IntN(min(i, 2000))
				length := 0
				for i+length < n && length < 64 && part[i+length] == part[i+length-offset] {
					length++
				}
				if length > 0 {
					kind := 2 + rnd.IntN(2)
					if length >= 4 && length < 12 && rnd.IntN(2) == 0 {
						kind = 1
					}
					elements = append(elements, snappyCopy(kind, offset, length)...)
					i += length
					continue
				}
			}
			length := min(n-i, 1+rnd.IntN(70))
			extra := rnd.IntN(5)
			if extra == 0 && length > 60 {
				extra = 1
			}
			elements = append(elements, snappyLiteral(string(part[i:i+length]), extra)...)
			i += length
		}
		out = append(out, snappyChunk(0, part, snappyBlock(n, elements))...)
	}
	return out
}

// Decompress decodes every kind of element and chunk of framed snappy, even if the decoded size
// equals the limit. It returns an error for each malformed stream of the table.
func TestSnappyElements(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", 4000) // 64,000 bytes
	whole := func(want string, elements ...[]byte) []byte {
		return append(slices.Clip(snappyIdentifier), snappyChunk(0, []byte(want), snappyBlock(len(want), elements...))...)
	}
	uncompressed := func(s string) []byte {
		return append(slices.Clip(snappyIdentifier), snappyChunk(1, []byte(s), []byte(s))...)
	}
	for _, c := range []struct {
		name string
		in   []byte
		want string // the decoded data; "\xff" means an error
	}{
		{"only the identifier", snappyIdentifier, ""},
		{"an empty block", whole(""), ""},
		{"an empty uncompressed chunk", uncompressed(""), ""},
		{"uncompressed", uncompressed("abc"), "abc"},
		{"a literal", whole("abc", snappyLiteral("abc", 0)), "abc"},
		{"a literal of 60 bytes", whole(long[:60], snappyLiteral(long[:60], 0)), long[:60]},
		{"literals with lengths of 1 to 4 bytes", whole(long[:61]+long[:300]+"ab"+"c", snappyLiteral(long[:61], 1), snappyLiteral(long[:300], 2),
			snappyLiteral("ab", 3), snappyLiteral("c", 4)), long[:61] + long[:300] + "abc"},
		{"a copy of kind 1", whole("abcdabcd", snappyLiteral("abcd", 0), snappyCopy(1, 4, 4)), "abcdabcd"},
		{"a copy of kind 1 with offset 2047", whole(long[:2047]+long[:11], snappyLiteral(long[:2047], 2), snappyCopy(1, 2047, 11)), long[:2047] + long[:11]},
		{"a copy of kind 2", whole("abcb", snappyLiteral("abc", 0), snappyCopy(2, 2, 1)), "abcb"},
		{"a copy of kind 2 with offset 64,000", whole(long+long[:64], snappyLiteral(long, 2), snappyCopy(2, 64000, 64)), long + long[:64]},
		{"a copy of kind 3", whole("abcabc", snappyLiteral("abc", 0), snappyCopy(3, 3, 3)), "abcabc"},
		{"copies that overlap", whole("ababababaaaaa", snappyLiteral("ab", 0), snappyCopy(1, 2, 7), snappyCopy(2, 1, 3), snappyCopy(3, 1, 1)), "ababababaaaaa"},
		{"two chunks", append(whole("a", snappyLiteral("a", 0)), snappyChunk(1, []byte("b"), []byte("b"))...), "ab"},
		{"the identifier repeated", append(uncompressed("a"), uncompressed("b")...), "ab"},
		{"padding and skippable chunks", slices.Concat(uncompressed("a"), []byte{0xfe, 2, 0, 0, 1, 2}, []byte{0x80, 0, 0, 0}, []byte{0xfd, 1, 0, 0, 9}, uncompressed("b")), "ab"},
		{"an uncompressed chunk of 64 KiB", uncompressed(long + long[:1536]), long + long[:1536]},

		{"no bytes", nil, "\xff"},
		{"no identifier", snappyChunk(1, []byte("a"), []byte("a")), "\xff"},
		{"snappy without framing", snappyBlock(3, snappyLiteral("abc", 0)), "\xff"},
		{"a wrong identifier later", append(uncompressed("a"), "\xff\x06\x00\x00sNaPpX"...), "\xff"},
		{"a short identifier later", append(uncompressed("a"), "\xff\x05\x00\x00sNaPp"...), "\xff"},
		{"an unskippable chunk", append(uncompressed("a"), 0x02, 0, 0, 0), "\xff"},
		{"an unskippable chunk of the highest kind", append(uncompressed("a"), 0x7f, 0, 0, 0), "\xff"},
		{"a wrong checksum", append(slices.Clip(snappyIdentifier), snappyChunk(1, []byte("a"), []byte("b"))...), "\xff"},
		{"a wrong checksum of a block", append(slices.Clip(snappyIdentifier), snappyChunk(0, []byte("a"), snappyBlock(1, snappyLiteral("b", 0)))...), "\xff"},
		{"a chunk too short for a checksum", append(slices.Clip(snappyIdentifier), 1, 3, 0, 0, 1, 2, 3), "\xff"},
		{"a chunk with a checksum only", append(slices.Clip(snappyIdentifier), snappyChunk(0, nil, nil)...), "\xff"},
		{"a chunk longer than the input", append(slices.Clip(snappyIdentifier), 1, 0xff, 0xff, 0xff), "\xff"},
		{"a block longer than stated", whole("ab", snappyLiteral("abc", 0)), "\xff"},
		{"a block shorter than stated", whole("abcd", snappyLiteral("abc", 0)), "\xff"},
		{"a copy past the stated length", whole("aaaa", snappyLiteral("a", 0), snappyCopy(1, 1, 11)), "\xff"},
		{"a copy from before the block", append(uncompressed("abc"), snappyChunk(0, []byte("abca"), snappyBlock(4, snappyLiteral("abc", 0), snappyCopy(2, 6, 1)))...), "\xff"},
		{"a copy at the beginning of a block", whole("abcd", snappyCopy(1, 1, 4)), "\xff"},
		{"a copy with offset 0", whole("aaaaa", snappyLiteral("a", 0), snappyCopy(1, 0, 4)), "\xff"},
		{"a copy with offset 1<<31", whole("aaaaa", snappyLiteral("a", 0), snappyCopy(3, math.MinInt32, 4)), "\xff"},
		{"a truncated copy", whole("aaaaa", snappyLiteral("a", 0), snappyCopy(3, 1, 4)[:4]), "\xff"},
		{"a truncated literal", whole("abc", snappyLiteral("abc", 0)[:3]), "\xff"},
		{"a truncated length of a literal", whole("abc", snappyLiteral("abc", 4)[:3]), "\xff"},
		{"a literal of 4 GiB", whole("abc", []byte{63 << 2, 0xff, 0xff, 0xff, 0xff, 'a'}), "\xff"},
		{"a block whose length is no varint", append(slices.Clip(snappyIdentifier), snappyChunk(0, nil, bytes.Repeat([]byte{0xff}, 11))...), "\xff"},
		{"a block that claims 64 KiB and 1 byte", append(slices.Clip(snappyIdentifier), snappyChunk(0, nil, snappyBlock(64<<10+1))...), "\xff"},
		{"a block that claims 2 GiB", append(slices.Clip(snappyIdentifier), snappyChunk(0, nil, binary.AppendUvarint(nil, 1<<31))...), "\xff"},
		{"an uncompressed chunk of 64 KiB and 1 byte", uncompressed(long + long[:1537]), "\xff"},
	} {
		var d Decompressor
		got, over, err := d.Decompress(c.in, "snappy", 1<<20)
		if over || (err != nil) != (c.want == "\xff") || err == nil && string(got) != c.want || err != nil && !strings.HasPrefix(err.Error(), "malformed framed snappy: ") {
			t.Errorf("%s: got %.60q, over the limit %v, error %v; want %.60q", c.name, got, over, err, c.want)
		}
		if err == nil && len(c.want) > 0 {
			if got, over, err := d.Decompress(c.in, "x-snappy-framed", len(c.want)); string(got) != c.want || over || err != nil {
				t.Errorf("%s, limit equal to the length: over the limit %v, %v", c.name, over, err)
			}
			if _, over, err := d.Decompress(c.in, "snappy", len(c.want)-1); !over || err != nil {
				t.Errorf("%s, one byte over the limit: over the limit %v, %v", c.name, over, err)
			}
		}
	}
}

// Random data that is encoded as framed snappy is decoded to the same data.
func TestSnappyRoundTrip(t *testing.T) {
	rnd := rand.New(rand.NewPCG(testSeed(t, 0), 0))
	var d Decompressor
	for range 200 {
		var data []byte
		for range rnd.IntN(3000) {
			data = append(data, []string{"up", "{job=\"", "a", "\"} ", "1\n", "\xff", fmt.Sprint(rnd.IntN(100)), strings.Repeat("x", rnd.IntN(100))}[rnd.IntN(8)]...)
		}
		got, over, err := d.Decompress(snappyEncode(data, rnd), "snappy", len(data))
		if over || err != nil || !bytes.Equal(got, data) {
			t.Fatalf("got %d bytes of %d, over the limit %v, %v", len(got), len(data), over, err)
		}
	}
}

// snappyStream returns a framed snappy stream of several chunks, and the data that it decodes to.
// borders maps each offset between two chunks to the decoded data of the chunks before it.
func snappyStream() (in []byte, want string, borders map[int]string) {
	in = slices.Clone(snappyIdentifier)
	borders = map[int]string{len(in): ""}
	for _, s := range []string{"abcabcabc", "defdef"} {
		in = append(in, snappyChunk(0, []byte(s), snappyBlock(len(s), snappyLiteral(s[:3], 0), snappyCopy(2, 3, len(s)-3)))...)
		want += s
		borders[len(in)] = want
		in = append(in, 0xfe, 1, 0, 0, 0)
		borders[len(in)] = want
		in = append(in, snappyChunk(1, []byte("x"), []byte("x"))...)
		want += "x"
		borders[len(in)] = want
	}
	return in, want, borders
}

// A framed snappy stream that is cut off within a chunk is an error. If it is cut off between two
// chunks, it is a valid shorter stream, because the framing format has no end marker.
func TestSnappyTruncatedAnywhere(t *testing.T) {
	in, _, borders := snappyStream()
	var d Decompressor
	for i := range len(in) + 1 {
		got, over, err := d.Decompress(in[:i], "snappy", 100)
		want, border := borders[i]
		if over || (err == nil) != border || err == nil && string(got) != want {
			t.Errorf("first %d of %d bytes: got %q, over the limit %v, error %v; want %q, error %v", i, len(in), got, over, err, want, !border)
		}
	}
}

// If one bit of the stream that snappyStream returns is flipped, Decompress returns an error,
// reports the data as too large, or returns the right data, in which one chunk may be missing. A
// chunk may be missing because the checksums do not cover the kinds of chunks, and a flipped bit
// can make a chunk skippable.
func TestSnappyFlippedAnywhere(t *testing.T) {
	in, want, _ := snappyStream()
	var d Decompressor
	for i := range len(in) * 8 {
		bad := slices.Clone(in)
		bad[i/8] ^= 1 << (i % 8)
		got, over, err := d.Decompress(bad, "snappy", 100)
		if err == nil && !over && !slices.Contains([]string{want, "xdefdefx", "abcabcabcdefdefx", "abcabcabcxx", "abcabcabcxdefdef"}, string(got)) {
			t.Errorf("bit %d flipped: got %q", i, got)
		}
	}
}

// No input makes the snappy decoder exceed its limit or change the bytes that were in the output
// before. Any data is unchanged after encoding and decoding.
func FuzzSnappy(f *testing.F) {
	rnd := rand.New(rand.NewPCG(1, 0))
	f.Add(snappyEncode([]byte(strings.Repeat("up{job=\"a\"} 1\n", 20)), rnd), 1000)
	f.Add(append(slices.Clip(snappyIdentifier), snappyChunk(0, nil, snappyCopies(128))...), 100)
	f.Fuzz(func(t *testing.T, in []byte, limit int) {
		limit = int(uint(limit) % (1 << 20))
		var d Decompressor
		got, over, err := d.Decompress(in, "snappy", limit)
		if len(got) > limit || cap(got) > 2*limit+1024 || (over || err != nil) && got != nil {
			t.Fatalf("limit %d: got %d bytes in a buffer of %d, over the limit %v, %v", limit, len(got), cap(got), over, err)
		}
		// Decode the fuzzed input as a snappy block, which has no checksum, because a fuzzer cannot
		// guess checksums.
		n := limit % (64<<10 + 1)
		out, ok := decodeSnappyBlock([]byte("before"), NewWireReader(in), n)
		if len(out) > n+6 || ok && len(out) != n+6 || !bytes.HasPrefix(out, []byte("before")) {
			t.Fatalf("block of %d bytes: output of %d bytes with the 6 before it, ok %v", n, len(out), ok)
		}
		if got, over, err := d.Decompress(snappyEncode(in, rand.New(rand.NewPCG(uint64(limit), 0))), "snappy", len(in)); over || err != nil || !bytes.Equal(got, in) {
			t.Fatalf("round trip of %d bytes: got %d bytes, over the limit %v, %v", len(in), len(got), over, err)
		}
	})
}

// No gzip input makes Decompress return more than one byte over its limit.
func FuzzGzip(f *testing.F) {
	f.Add(gzipped([]byte(strings.Repeat("up 1\n", 100))), 1000)
	f.Fuzz(func(t *testing.T, in []byte, limit int) {
		limit = int(uint(limit) % (1 << 20))
		var d Decompressor
		got, over, err := d.Decompress(in, "gzip", limit)
		if over != (len(got) > limit) || len(got) > limit+1 || err != nil && got != nil {
			t.Fatalf("limit %d: got %d bytes, over the limit %v, %v", limit, len(got), over, err)
		}
	})
}
