package main

// Decompression of whole and damaged streams: incomplete input is refused, and no input makes more
// than the limit. Streams are made by a small encoder here, after framing_format.txt and
// format_description.txt of snappy.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func TestDecompressIdentity(t *testing.T) {
	var d Decompressor
	for _, encoding := range []string{"", "identity"} {
		if got, over, err := d.Decompress([]byte("abc"), encoding, 3); string(got) != "abc" || over || err != nil {
			t.Errorf("%q: %q %v %v", encoding, got, over, err)
		}
		if _, over, err := d.Decompress([]byte("abcd"), encoding, 3); !over || err != nil {
			t.Errorf("%q over the limit: %v %v", encoding, over, err)
		}
	}
	for encoding, want := range map[string]bool{"": true, "identity": true, "gzip": true, "snappy": true, "x-snappy-framed": true,
		"deflate": false, "br": false, "zstd": false, "GZIP": false, "gzip, gzip": false, " ": false} {
		if SupportsEncoding(encoding) != want {
			t.Errorf("%q: supported %v", encoding, !want)
		}
	}
}

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
		want  string // "ok", "over", "error"
	}{
		{"whole", whole, len(data), "ok"},
		{"several members", two, len(data), "ok"},
		{"over by a byte", whole, len(data) - 1, "over"},
		{"several members, over by a byte", two, len(data) - 1, "over"},
		{"a limit of nothing", whole, 0, "over"},
		{"empty", nil, len(data), "error"},
		{"not gzip", data, len(data), "error"},
		{"snappy", snappyIdentifier, len(data), "error"},
		{"garbage behind it", append(slices.Clip(whole), "garbage"...), len(data), "error"},
		{"zeroes behind it", append(slices.Clip(whole), make([]byte, 20)...), len(data), "error"},
		{"a wrong checksum", flipped, len(data), "error"},
	} {
		var d Decompressor
		got, over, err := d.Decompress(c.in, "gzip", c.limit)
		if (err != nil) != (c.want == "error") || over != (c.want == "over") || c.want == "ok" && !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, over %v, %v", c.name, len(got), over, err)
		}
	}
	var d Decompressor // one for all: an error must not spoil the next
	for i := range whole {
		if _, over, err := d.Decompress(whole[:i], "gzip", len(data)); err == nil || over {
			t.Errorf("%d of %d bytes: over %v, %v", i, len(whole), over, err)
		}
	}
	if got, over, err := d.Decompress(whole, "gzip", len(data)); !bytes.Equal(got, data) || over || err != nil {
		t.Errorf("after errors: %d bytes, over %v, %v", len(got), over, err)
	}
}

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
		// Growing by steps allocates a few times the limit, freed in between.
		if !over || err != nil || used > 8*limit {
			t.Errorf("%s: over %v, %v; %d bytes allocated for a limit of %d", encoding, over, err, used, limit)
		}
	}
}

// One byte at a time, and an error after the end.
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

func TestReadInto(t *testing.T) {
	buf := []byte("old contents")
	got, err := ReadAllInto(buf, &dribble{strings.Repeat("abc", 1000), io.EOF})
	if err != nil || string(got) != strings.Repeat("abc", 1000) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	again, err := ReadAllInto(got, strings.NewReader("xy"))
	if err != nil || string(again) != "xy" || &again[0] != &got[0] {
		t.Errorf("%q, %v: memory is to be reused", again, err)
	}
	if got, err := ReadAllInto(nil, &dribble{"abc", io.ErrUnexpectedEOF}); !errors.Is(err, io.ErrUnexpectedEOF) || string(got) != "abc" {
		t.Errorf("%q %v", got, err)
	}
}

var snappyIdentifier = []byte("\xff\x06\x00\x00sNaPpY")

// snappyChunk frames payload, whose content is data, with data's checksum.
func snappyChunk(kind byte, data, payload []byte) []byte {
	crc := crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))
	b := binary.LittleEndian.AppendUint32(nil, uint32(4+len(payload))<<8|uint32(kind))
	return append(binary.LittleEndian.AppendUint32(b, (crc>>15|crc<<17)+0xa282ead8), payload...)
}

// snappyBlock puts the length of n bytes before the elements that make them.
func snappyBlock(n int, elements ...[]byte) []byte {
	return append(binary.AppendUvarint(nil, uint64(n)), bytes.Join(elements, nil)...)
}

// snappyLiteral is a literal whose length takes extra bytes (0 to 4) of its own.
func snappyLiteral(s string, extra int) []byte {
	n := len(s) - 1
	if extra == 0 {
		return append([]byte{byte(n) << 2}, s...)
	}
	b := binary.LittleEndian.AppendUint32([]byte{byte(59+extra) << 2}, uint32(n))
	return append(b[:1+extra], s...)
}

// snappyCopy is a copy with an offset of 1, 2 or 4 bytes.
func snappyCopy(kind, offset, length int) []byte {
	switch kind {
	case 1:
		return []byte{byte(offset>>8<<5 | (length-4)<<2 | 1), byte(offset)}
	case 2:
		return binary.LittleEndian.AppendUint16([]byte{byte((length-1)<<2 | 2)}, uint16(offset))
	}
	return binary.LittleEndian.AppendUint32([]byte{byte((length-1)<<2 | 3)}, uint32(offset))
}

// snappyCopies is a block of n zeroes, n a multiple of 64.
func snappyCopies(n int) []byte {
	b := snappyBlock(n, snappyLiteral("\x00", 0), snappyCopy(2, 1, 63))
	for range n/64 - 1 {
		b = append(b, snappyCopy(2, 64, 64)...)
	}
	return b
}

// snappyEncode compresses greedily; it need not be good, only use every element.
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

func TestSnappyElements(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", 4000) // 64,000
	whole := func(want string, elements ...[]byte) []byte {
		return append(slices.Clip(snappyIdentifier), snappyChunk(0, []byte(want), snappyBlock(len(want), elements...))...)
	}
	uncompressed := func(s string) []byte {
		return append(slices.Clip(snappyIdentifier), snappyChunk(1, []byte(s), []byte(s))...)
	}
	for _, c := range []struct {
		name string
		in   []byte
		want string // "\xff" is an error
	}{
		{"nothing", snappyIdentifier, ""},
		{"an empty block", whole(""), ""},
		{"an empty uncompressed chunk", uncompressed(""), ""},
		{"uncompressed", uncompressed("abc"), "abc"},
		{"a literal", whole("abc", snappyLiteral("abc", 0)), "abc"},
		{"a literal of 60", whole(long[:60], snappyLiteral(long[:60], 0)), long[:60]},
		{"literals with lengths of 1 to 4 bytes", whole(long[:61]+long[:300]+"ab"+"c", snappyLiteral(long[:61], 1), snappyLiteral(long[:300], 2),
			snappyLiteral("ab", 3), snappyLiteral("c", 4)), long[:61] + long[:300] + "abc"},
		{"a copy of kind 1", whole("abcdabcd", snappyLiteral("abcd", 0), snappyCopy(1, 4, 4)), "abcdabcd"},
		{"a copy of kind 1 from 2047", whole(long[:2047]+long[:11], snappyLiteral(long[:2047], 2), snappyCopy(1, 2047, 11)), long[:2047] + long[:11]},
		{"a copy of kind 2", whole("abcb", snappyLiteral("abc", 0), snappyCopy(2, 2, 1)), "abcb"},
		{"a copy of kind 2 from 64,000", whole(long+long[:64], snappyLiteral(long, 2), snappyCopy(2, 64000, 64)), long + long[:64]},
		{"a copy of kind 3", whole("abcabc", snappyLiteral("abc", 0), snappyCopy(3, 3, 3)), "abcabc"},
		{"copies that overlap", whole("ababababaaaaa", snappyLiteral("ab", 0), snappyCopy(1, 2, 7), snappyCopy(2, 1, 3), snappyCopy(3, 1, 1)), "ababababaaaaa"},
		{"two chunks", append(whole("a", snappyLiteral("a", 0)), snappyChunk(1, []byte("b"), []byte("b"))...), "ab"},
		{"the identifier again", append(uncompressed("a"), uncompressed("b")...), "ab"},
		{"padding and skippable chunks", slices.Concat(uncompressed("a"), []byte{0xfe, 2, 0, 0, 1, 2}, []byte{0x80, 0, 0, 0}, []byte{0xfd, 1, 0, 0, 9}, uncompressed("b")), "ab"},
		{"64 KiB", uncompressed(long + long[:1536]), long + long[:1536]},

		{"no bytes", nil, "\xff"},
		{"no identifier", snappyChunk(1, []byte("a"), []byte("a")), "\xff"},
		{"plain snappy", snappyBlock(3, snappyLiteral("abc", 0)), "\xff"},
		{"another identifier later", append(uncompressed("a"), "\xff\x06\x00\x00sNaPpX"...), "\xff"},
		{"a short identifier later", append(uncompressed("a"), "\xff\x05\x00\x00sNaPp"...), "\xff"},
		{"an unskippable chunk", append(uncompressed("a"), 0x02, 0, 0, 0), "\xff"},
		{"the last unskippable kind", append(uncompressed("a"), 0x7f, 0, 0, 0), "\xff"},
		{"a wrong checksum", append(slices.Clip(snappyIdentifier), snappyChunk(1, []byte("a"), []byte("b"))...), "\xff"},
		{"a wrong checksum of a block", append(slices.Clip(snappyIdentifier), snappyChunk(0, []byte("a"), snappyBlock(1, snappyLiteral("b", 0)))...), "\xff"},
		{"no room for a checksum", append(slices.Clip(snappyIdentifier), 1, 3, 0, 0, 1, 2, 3), "\xff"},
		{"a checksum and no block", append(slices.Clip(snappyIdentifier), snappyChunk(0, nil, nil)...), "\xff"},
		{"a chunk longer than the input", append(slices.Clip(snappyIdentifier), 1, 0xff, 0xff, 0xff), "\xff"},
		{"a block longer than stated", whole("ab", snappyLiteral("abc", 0)), "\xff"},
		{"a block shorter than stated", whole("abcd", snappyLiteral("abc", 0)), "\xff"},
		{"a copy past the stated length", whole("aaaa", snappyLiteral("a", 0), snappyCopy(1, 1, 11)), "\xff"},
		{"a copy from before the block", append(uncompressed("abc"), snappyChunk(0, []byte("abca"), snappyBlock(4, snappyLiteral("abc", 0), snappyCopy(2, 6, 1)))...), "\xff"},
		{"a copy from nowhere", whole("abcd", snappyCopy(1, 1, 4)), "\xff"},
		{"a copy with offset 0", whole("aaaaa", snappyLiteral("a", 0), snappyCopy(1, 0, 4)), "\xff"},
		{"a copy with offset 1<<31", whole("aaaaa", snappyLiteral("a", 0), snappyCopy(3, 1<<31, 4)), "\xff"},
		{"a cut copy", whole("aaaaa", snappyLiteral("a", 0), snappyCopy(3, 1, 4)[:4]), "\xff"},
		{"a cut literal", whole("abc", snappyLiteral("abc", 0)[:3]), "\xff"},
		{"a cut length", whole("abc", snappyLiteral("abc", 4)[:3]), "\xff"},
		{"a literal of 4 GiB", whole("abc", []byte{63 << 2, 0xff, 0xff, 0xff, 0xff, 'a'}), "\xff"},
		{"a length that is no varint", append(slices.Clip(snappyIdentifier), snappyChunk(0, nil, bytes.Repeat([]byte{0xff}, 11))...), "\xff"},
		{"a block that states 64 KiB and 1", append(slices.Clip(snappyIdentifier), snappyChunk(0, nil, snappyBlock(64<<10+1))...), "\xff"},
		{"a block that states 2 GiB", append(slices.Clip(snappyIdentifier), snappyChunk(0, nil, snappyBlock(1<<31))...), "\xff"},
		{"an uncompressed chunk of 64 KiB and 1", uncompressed(long + long[:1537]), "\xff"},
	} {
		var d Decompressor
		got, over, err := d.Decompress(c.in, "snappy", 1<<20)
		if over || (err != nil) != (c.want == "\xff") || err == nil && string(got) != c.want || err != nil && !strings.HasPrefix(err.Error(), "malformed framed snappy: ") {
			t.Errorf("%s: %.60q, over %v, %v", c.name, got, over, err)
		}
		if err == nil && len(c.want) > 0 {
			if got, over, err := d.Decompress(c.in, "x-snappy-framed", len(c.want)); string(got) != c.want || over || err != nil {
				t.Errorf("%s, the limit met: over %v, %v", c.name, over, err)
			}
			if _, over, err := d.Decompress(c.in, "snappy", len(c.want)-1); !over || err != nil {
				t.Errorf("%s, over the limit by a byte: %v, %v", c.name, over, err)
			}
		}
	}
}

func TestSnappyRoundTrip(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	var d Decompressor
	for range 200 {
		var data []byte
		for range rnd.IntN(3000) {
			data = append(data, []string{"up", "{job=\"", "a", "\"} ", "1\n", "\xff", fmt.Sprint(rnd.IntN(100)), strings.Repeat("x", rnd.IntN(100))}[rnd.IntN(8)]...)
		}
		got, over, err := d.Decompress(snappyEncode(data, rnd), "snappy", len(data))
		if over || err != nil || !bytes.Equal(got, data) {
			t.Fatalf("seed %d: %d bytes of %d, over %v, %v", seed, len(got), len(data), over, err)
		}
	}
}

// The framing format has no end. Cut off between two chunks a stream is a shorter
// one, which a content with an end of its own notices; cut off elsewhere it is an
// error.
func TestSnappyTruncatedAnywhere(t *testing.T) {
	in := slices.Clone(snappyIdentifier)
	want := ""
	borders := map[int]string{len(in): ""}
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
	var d Decompressor
	for i := range len(in) + 1 {
		got, over, err := d.Decompress(in[:i], "snappy", 100)
		want, border := borders[i]
		if over || (err == nil) != border || err == nil && string(got) != want {
			t.Errorf("%d of %d bytes: %q, over %v, %v", i, len(in), got, over, err)
		}
	}
	// Flipped anywhere it is never other content, though a kind that is flipped
	// makes its chunk skippable: checksums do not cover kinds.
	for i := range len(in) * 8 {
		bad := slices.Clone(in)
		bad[i/8] ^= 1 << (i % 8)
		got, over, err := d.Decompress(bad, "snappy", 100)
		if err == nil && !over && !slices.Contains([]string{want, "xdefdefx", "abcabcabcdefdefx", "abcabcabcxx", "abcabcabcxdefdef"}, string(got)) {
			t.Errorf("bit %d flipped: %q", i, got)
		}
	}
}

func FuzzSnappy(f *testing.F) {
	rnd := rand.New(rand.NewPCG(1, 0))
	f.Add(snappyEncode([]byte(strings.Repeat("up{job=\"a\"} 1\n", 20)), rnd), 1000)
	f.Add(append(slices.Clip(snappyIdentifier), snappyChunk(0, nil, snappyCopies(128))...), 100)
	f.Fuzz(func(t *testing.T, in []byte, limit int) {
		limit = int(uint(limit) % (1 << 20))
		var d Decompressor
		got, over, err := d.Decompress(in, "snappy", limit)
		if len(got) > limit || cap(got) > 2*limit+1024 || (over || err != nil) && got != nil {
			t.Fatalf("%d bytes (of %d) within %d, over %v, %v", len(got), cap(got), limit, over, err)
		}
		// Elements, without the checksums that keep a fuzzer out.
		n := limit % (64<<10 + 1)
		out, ok := decodeSnappyBlock([]byte("before"), NewWireReader(in), n)
		if len(out) > n+6 || ok && len(out) != n+6 || !bytes.HasPrefix(out, []byte("before")) {
			t.Fatalf("a block of %d bytes within %d: %v", len(out), n, ok)
		}
		// Whatever bytes, framed they come back.
		if got, over, err := d.Decompress(snappyEncode(in, rand.New(rand.NewPCG(uint64(limit), 0))), "snappy", len(in)); over || err != nil || !bytes.Equal(got, in) {
			t.Fatalf("round trip: over %v, %v", over, err)
		}
	})
}

func FuzzGzip(f *testing.F) {
	f.Add(gzipped([]byte(strings.Repeat("up 1\n", 100))), 1000)
	f.Fuzz(func(t *testing.T, in []byte, limit int) {
		limit = int(uint(limit) % (1 << 20))
		var d Decompressor
		got, over, err := d.Decompress(in, "gzip", limit)
		if over != (len(got) > limit) || len(got) > limit+1 || err != nil && got != nil {
			t.Fatalf("%d bytes within %d, over %v, %v", len(got), limit, over, err)
		}
	})
}
