package main

// Tests of sealing: a packet or message opens only under a key of its ring, unchanged, and with the
// purpose and context for which it was sealed.

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
)

// testSealer returns a PacketSealer for the named ring, with the keys testKeys(tb, secrets...).
// seed determines the random bytes of its nonces.
func testSealer(tb testing.TB, seed byte, ring string, secrets ...byte) *PacketSealer {
	tb.Helper()
	s, err := NewPacketSealer(testKeys(tb, secrets...), ring, rand.NewChaCha8([32]byte{seed}))
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// otherVersion returns a copy of sealed with version as its first byte.
func otherVersion(sealed []byte, version byte) []byte {
	return append([]byte{version}, sealed[1:]...)
}

// A message opens only with the purpose and context for which it was sealed, in its own ring, with
// the key that sealed it, and if it has this program's version.
func TestSealMessage(t *testing.T) {
	box := func(ring string, secrets ...byte) *MessageSealer {
		s, err := NewMessageSealer(testKeys(t, secrets...), ring)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	a := box("c", 1)
	plain := bytes.Repeat([]byte("x"), 5000)
	sealed := a.Seal(nil, plain, "p", []byte("context"), 0)
	rotated := box("c", 2, 1)
	for _, c := range []struct {
		about            string
		opener           *MessageSealer
		message          []byte
		purpose, context string
		want             error
	}{
		{"opener with the same key", box("c", 1), sealed, "p", "context", nil},
		{"opener with a new key above the old key", rotated, sealed, "p", "context", nil},
		{"sealed with the preferred key of its receiver", a, rotated.Seal(nil, plain, "p", []byte("context"), SealedKeyID(sealed)), "p", "context", nil},
		{"sealed with a key that its receiver does not hold", a, rotated.Seal(nil, plain, "p", []byte("context"), 0), "p", "context", ErrUnknownKey},
		{"opener of another ring", box("d", 1), sealed, "p", "context", ErrForged},
		{"another purpose", a, sealed, "q", "context", ErrForged},
		{"another context", a, sealed, "p", "contex", ErrForged},
		{"boundary between purpose and context moved", a, sealed, "pc", "ontext", ErrForged},
		{"empty message", a, nil, "p", "context", ErrNotSealed},
		{"message without its last byte", a, sealed[:len(sealed)-1], "p", "context", ErrForged},
		{"another version", a, otherVersion(sealed, sealVersion+1), "p", "context", ErrSealVersion},
		{"another version, one byte", a, []byte{sealVersion + 1}, "p", "context", ErrSealVersion},
	} {
		got, err := c.opener.Open(nil, c.message, c.purpose, []byte(c.context))
		if !errors.Is(err, c.want) || err == nil && !bytes.Equal(got, plain) {
			t.Errorf("%s: got %d bytes and error %v, want error %v", c.about, len(got), err, c.want)
		}
	}
}

// The error for a packet of another version names both that version and the version that this
// program knows.
func TestSealVersionInWords(t *testing.T) {
	a := testSealer(t, 1, "c", 1)
	_, _, err := a.Open(nil, otherVersion(a.Seal(nil, nil, 0), 7))
	if want := "sealed by another version of telemeter: it has version 7; this program knows version 2"; err == nil || err.Error() != want {
		t.Errorf("got error %v, want %q", err, want)
	}
}

// A packet opens only if it is complete and unchanged. Its opener must belong to the same ring,
// hold the key that sealed it, and have the same version of the sealed form.
func TestOpenPacket(t *testing.T) {
	a := testSealer(t, 1, "c", 1)
	plain := bytes.Repeat([]byte("x"), 100)
	sealed := a.Seal(nil, plain, 0)
	rotated := testSealer(t, 2, "c", 2, 1)
	for _, c := range []struct {
		about  string
		opener *PacketSealer
		packet []byte
		want   error
	}{
		{"opener with the same key", testSealer(t, 3, "c", 1), sealed, nil},
		{"opener with a new key above the old key", rotated, sealed, nil},
		{"sealed with a new key, opener has only the old key", a, rotated.Seal(nil, plain, 0), ErrUnknownKey},
		{"sealed with the preferred key of its receiver", a, rotated.Seal(nil, plain, a.KeyIDs()[0]), nil},
		{"opener with another key", testSealer(t, 4, "c", 3), sealed, ErrUnknownKey},
		{"opener of another ring", testSealer(t, 5, "d", 1), sealed, ErrForged},
		{"empty packet", a, nil, ErrNotSealed},
		{"another version", a, otherVersion(sealed, sealVersion+1), ErrSealVersion},
		{"another version and another key", testSealer(t, 4, "c", 3), otherVersion(sealed, 0), ErrSealVersion},
		{"another version, one byte", a, []byte{sealVersion + 1}, ErrSealVersion},
		{"too short for header, nonce and tag", a, sealed[:SealOverhead-1], ErrNotSealed},
		{"packet without its last byte", a, sealed[:len(sealed)-1], ErrForged},
		{"packet with one byte more", a, append(slices.Clone(sealed), 0), ErrForged},
	} {
		got, count, err := c.opener.Open(nil, c.packet)
		if !errors.Is(err, c.want) || err == nil && (!bytes.Equal(got, plain) || count == 0) {
			t.Errorf("%s: got %q, counter %d and error %v, want error %v", c.about, got, count, err, c.want)
		}
	}
	for i := range sealed {
		bad := slices.Clone(sealed)
		bad[i] ^= 1
		if _, _, err := a.Open(nil, bad); err == nil {
			t.Errorf("the packet opens although byte %d was changed", i)
		}
	}
}

// Sealing adds SealOverhead bytes to a packet. Sealing the same packet twice gives different bytes,
// because the nonce differs.
func TestSealPacket(t *testing.T) {
	a := testSealer(t, 1, "c", 1)
	plain := bytes.Repeat([]byte("x"), 100)
	sealed := a.Seal(nil, plain, 0)
	if got := len(sealed) - len(plain); got != SealOverhead {
		t.Errorf("sealing adds %d bytes, want %d", got, SealOverhead)
	}
	if again := a.Seal(nil, plain, 0); bytes.Equal(sealed, again) {
		t.Error("two packets were sealed with the same nonce")
	}
}

// NewPacketSealer returns an error if it can read no random bytes. SetKeys returns an error for
// Keys without a key, and the PacketSealer keeps its old keys.
func TestPacketSealerRefuses(t *testing.T) {
	a := testSealer(t, 1, "c", 1)
	if a.SetKeys(Keys{}) == nil || a.KeyIDs()[0] == 0 {
		t.Error("SetKeys accepts Keys without a key, or drops the old keys")
	}
	if _, err := NewPacketSealer(testKeys(t, 1), "c", bytes.NewReader(nil)); err == nil {
		t.Error("NewPacketSealer accepts a source without random bytes")
	}
}

// Sealing and opening a packet into buffers that are large enough allocate no memory.
func TestSealAllocates(t *testing.T) {
	s := testSealer(t, 1, "telemeter", 1)
	plain, sealed, opened := make([]byte, 100), make([]byte, 0, MaxPacket), make([]byte, 0, MaxPacket)
	if n := testing.AllocsPerRun(100, func() {
		packet := s.Seal(sealed, plain, 0)
		if _, _, err := s.Open(opened, packet); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("sealing and opening a packet allocate %v times, want 0", n)
	}
}

// A PacketSealer refuses all bytes except the one packet that was sealed with its keys.
func FuzzOpenPacket(f *testing.F) {
	s := testSealer(f, 1, "c", 1, 2)
	sealed := s.Seal(nil, []byte("hello"), 0)
	f.Add(sealed)
	f.Add(sealed[:SealOverhead])
	f.Add([]byte{sealVersion})
	f.Fuzz(func(t *testing.T, b []byte) {
		if plain, _, err := s.Open(nil, b); err == nil && !bytes.Equal(b, sealed) {
			t.Errorf("a packet that was never sealed opens as %q", plain)
		}
	})
}

// BenchmarkSeal seals a packet of 100 bytes.
func BenchmarkSeal(b *testing.B) {
	s := testSealer(b, 1, "telemeter", 1, 2)
	plain, buf := make([]byte, 100), make([]byte, 0, MaxPacket)
	b.ReportAllocs()
	for b.Loop() {
		s.Seal(buf, plain, 0)
	}
}

// BenchmarkOpen opens a packet of 100 bytes.
func BenchmarkOpen(b *testing.B) {
	s := testSealer(b, 1, "telemeter", 1, 2)
	sealed, buf := s.Seal(nil, make([]byte, 100), 0), make([]byte, 0, MaxPacket)
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := s.Open(buf, sealed); err != nil {
			b.Fatal(err)
		}
	}
}
